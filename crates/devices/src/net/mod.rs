//! What network devices have in common: the cable ([`Link`]) with the guest at one end of it, and what is said of a frame that
//! goes through.

mod header;

use std::fmt;
use std::sync::Weak;

pub use header::{ETHERNET, HEADER, Header, LONGEST_FRAME, Segments, queue_of};
pub(crate) use header::{checksum, sum};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The other end of the guest's cable: what carries its frames.
pub trait Link: Send + Sync {
    /// Whether it can send and deliver frames whose checksums are to be computed, and long TCP segments.
    fn offloads(&self) -> bool {
        false
    }

    /// Called before all else, and again with each new machine after a reset: where frames for the guest go from now on.
    fn connect(&self, guest: Guest);

    /// Sends a frame of the guest's, of [`ETHERNET`] to [`LONGEST_FRAME`] bytes; it should not wait. Without
    /// [`Link::offloads`] nothing is left to do on it.
    fn send(&self, header: &Header, frame: &[u8]);

    /// There is room again for frames to the guest, after one was refused.
    fn room(&self) {}
}

/// What a guest does itself with frames that it gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// It takes frames whose checksums are to be computed.
    pub checksum: bool,
    /// And long TCP segments over IPv4.
    pub tso4: bool,
    /// And over IPv6.
    pub tso6: bool,
}

/// A network device, as the cable sees it.
pub trait Receiver: Send + Sync {
    /// Takes a frame. False if there is no room: the device then tells the link when there is.
    fn deliver(&self, header: Header, frame: &[u8]) -> bool;

    /// The cable is there, or not.
    fn set_up(&self, up: bool);

    /// What the driver has agreed to; it may change with the next driver.
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }
}

/// The guest's end, as its link has it: any thread may use it. Without a device it takes and forgets all.
#[derive(Clone, Default)]
pub struct Guest(Option<Weak<dyn Receiver>>);

impl Guest {
    /// The end at which this device is.
    pub fn new(device: Weak<dyn Receiver>) -> Self {
        Self(Some(device))
    }

    /// Delivers a frame. False if the guest has no room: [`Link::room`] tells when it has. One that it does not want, or that it
    /// cannot take, is delivered to nobody.
    pub fn deliver(&self, header: &Header, frame: &[u8]) -> bool {
        let device = self.0.as_ref().and_then(Weak::upgrade);
        device.is_none_or(|device| device.deliver(*header, frame))
    }

    /// What the guest does itself with frames: longer ones are delivered to nobody.
    pub fn offloads(&self) -> Offloads {
        let device = self.0.as_ref().and_then(Weak::upgrade);
        device.map(|device| device.offloads()).unwrap_or_default()
    }

    /// Tells the guest that the cable is there, or not.
    pub fn set_up(&self, up: bool) {
        if let Some(device) = self.0.as_ref().and_then(Weak::upgrade) {
            device.set_up(up);
        }
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guest")
    }
}
