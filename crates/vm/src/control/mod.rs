//! The control socket: how other programs of the user's talk to a running VM.
//!
//! A Unix socket, one request per connection. The client sends one line of JSON, a [`Request`]; the server answers with one line,
//! an [`Answer`]. After [`Answer::Stream`] the connection carries bytes in both directions until either side closes it. All
//! connections end with the VM.

mod client;
mod server;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use client::{Client, Refused};
pub use server::{Server, Subject, Taken};

pub use crate::nics::NicStatus;
pub use crate::storage::{DiskState, DiskStatus, NewDisk};

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// What the VM is: [`Answer::Status`].
    Status,
    /// The guest's console, what it wrote last first: [`Answer::Stream`].
    Console,
    /// How much memory the guest has: [`Answer::Memory`]. It is to have so many bytes from now on, if some are given.
    Memory(Option<u64>),
    /// The power button: most systems shut down.
    PowerButton,
    /// The end of the VM, at once.
    Stop,
    /// What the screen shows: [`Answer::Stream`], a PNG file.
    Screenshot,
    /// Text to be typed on the keyboard.
    Type(String),
    /// Keys to be pressed together, such as `ctrl-alt-delete`.
    Press(String),
    /// The VM's end: [`Answer::Stream`], which ends then.
    Wait,
    /// Another disk for the guest: [`Answer::Disks`], of that one alone.
    AttachDisk(NewDisk),
    /// The guest is to give up a disk, whose image is closed then.
    DetachDisk {
        /// Its serial number or path.
        which: String,
        /// The path as an absolute one, if there is such a file.
        path: Option<PathBuf>,
        /// How long the guest has for it, in seconds.
        patience: f64,
        /// It is taken away, whether or not the guest gives it up.
        force: bool,
    },
    /// What disks there are: [`Answer::Disks`].
    Disks,
    /// Another network card for the guest, in the words of `lodge run --network`: [`Answer::Nics`], of that one alone.
    AttachNic(String),
    /// The guest is to give up a network card.
    DetachNic {
        /// Its number, from 1 on, or its address.
        which: String,
        /// How long the guest has for it, in seconds.
        patience: f64,
        /// It is taken away, whether or not the guest gives it up.
        force: bool,
    },
    /// The cable of a network card is put in, or taken out.
    PlugNic {
        /// Its number, from 1 on, or its address.
        which: String,
        /// Put in.
        plugged: bool,
    },
    /// What network cards there are: [`Answer::Nics`].
    Nics,
    /// A stream to a port of the guest's virtio socket: [`Answer::Stream`].
    Socket {
        /// The port.
        port: u32,
    },
}

/// What it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It was done.
    Done,
    /// What the VM is.
    Status(Status),
    /// How much memory the guest has.
    Memory(Memory),
    /// The disks.
    Disks(Vec<DiskStatus>),
    /// The network cards.
    Nics(Vec<NicStatus>),
    /// Bytes follow, in both directions.
    Stream,
    /// It was not done: one line, with a way out.
    Refused(String),
}

/// What a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// What runs it.
    pub engine: String,
    /// Virtual processors.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// Its process.
    pub pid: u32,
    /// Seconds since it was started.
    pub seconds: u64,
}

/// How much memory a guest has, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// What it was started with.
    pub size: u64,
    /// What it may come to have: `size`, or more. 0 from a version of Lodge in which it is always `size`.
    #[serde(default)]
    pub max: u64,
    /// What it is to have.
    pub target: u64,
    /// What it has: what is missing is in its balloon, or not plugged.
    pub has: u64,
    /// What of it takes memory of the host's.
    pub held: u64,
    /// What it does not use, if it says so.
    pub free: Option<u64>,
    /// What its programs could have, if it says so.
    pub available: Option<u64>,
}

/// A request in JSON at most.
const LONGEST_LINE: u64 = 64 << 10;
/// How long either side waits for the other's line.
const PATIENCE: Duration = Duration::from_secs(10);

/// A guest's time, of a day at most.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default().min(Duration::from_secs(86400))
}

#[cfg(test)]
mod tests;
