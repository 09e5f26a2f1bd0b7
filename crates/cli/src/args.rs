//! Every command and flag, in one place: the parser, the help, the completions and the man pages all come from here.

mod net;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use net::NET_EXAMPLES;
pub use net::{Net, NetBridge, NetCreate};

/// Exit statuses of `lodge run`, as help and man page show them.
pub const EXIT_STATUS: &str = "\
Exit status of `lodge run`:
  0    the guest powered off (or was reset, with --no-reboot)
  2    the command line or the configuration file is wrong
  4    the host or Lodge failed: no memory, no file, no network, a full disk under the output …
  6    the guest ended badly: its kernel panicked, or a triple fault (which resets a machine with firmware, unless --no-reboot)
  124  --timeout ran out
  130  ended by the escape key, Ctrl-C, a signal, or the output's reader going away (`| head`)
  odd  with --debug-exit: (v << 1) | 1, where v is what the guest wrote to port 0xf4";

const RUN_EXAMPLES: &str = "\
Examples:
  lodge run                                 a Debian kernel and a shell, fetched on first use
  lodge run tiny:trixie --cpus 2            the same with Debian 13's kernel, on two processors
  lodge run debian                          a whole Debian 13, made on first use; thrown away at its end
  lodge run debian:12 --name web --user ada a Debian 12 that stays, with a user of that name
  lodge run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0'
  echo 'cat /proc/cpuinfo' | lodge run | grep 'model name'
  lodge run ubuntu --name u --user ada      a cloud image, fetched on first use
  lodge run docker:alpine                   an OCI image's command, in a machine of its own
  lodge run disk.qcow2                      a disk, by its own boot loader
  lodge run disk.qcow2 --firmware uefi --name web
  lodge run --gdb 127.0.0.1:1234            then, in gdb: target remote :1234";

/// Runs whole operating systems inside Linux, with KVM or without.
#[derive(Debug, Parser)]
#[command(name = "lodge", version, about, after_long_help = EXIT_STATUS, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a guest with its console on this terminal
    #[command(after_help = RUN_EXAMPLES, after_long_help = format!("{RUN_EXAMPLES}\n\n{EXIT_STATUS}"))]
    Run(Box<Run>),
    /// Write what a running guest's screen shows into a PNG file
    Screenshot {
        /// The virtual machine's name, as `lodge ls` shows it
        name: String,
        /// Where to write
        file: PathBuf,
    },
    /// Type text on a running guest's keyboard, which is a US one
    #[command(after_help = "Example:\n  lodge type web \"$(printf 'ls -l\\n ')\"")]
    Type {
        /// The virtual machine's name
        name: String,
        /// What to type; ends of lines are Enter
        text: String,
    },
    /// Press keys together on a running guest's keyboard, such as ctrl-alt-delete
    Key {
        /// The virtual machine's name
        name: String,
        /// Keys with hyphens between them; several such are pressed one after the other
        #[arg(required = true)]
        keys: Vec<String>,
    },
    /// Show which engines this host can use, and what keeps it from the others
    Host(Host),
    /// List the virtual machines that run
    Ls(Ls),
    /// See the console of one that runs, and type there
    Console {
        /// Its name, as `lodge ls` shows it
        name: String,
    },
    /// Press the power button of one that runs, and wait for its end
    Stop(Stop),
    /// Run a command in one that runs, without a network
    #[command(after_help = EXEC_EXAMPLES)]
    Exec(Exec),
    /// Log in to one that runs by ssh, without a network
    Ssh(Ssh),
    /// Connect standard input and output to a TCP port of one that runs, without a network
    Forward(Forward),
    /// Show how much memory a guest has, or have it use less or more
    #[command(
        after_help = "Examples:\n  lodge memory web          what it has, and what of it takes memory of the host\n  \
                            lodge memory web 512M     it is to use no more, as far as it can"
    )]
    Memory(Memory),
    /// Attach disks to a guest that runs, detach and list them
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Give running guests network cards, take them away, put cables in and out
    #[command(subcommand)]
    Nic(NicCommand),
    /// Make, change, list and mend networks that guests share with each other and with this host
    #[command(subcommand, after_help = NET_EXAMPLES)]
    Net(Net),
    /// Fetch images of whole systems; list, describe and remove those that were fetched or made
    #[command(subcommand)]
    Image(Image),
    /// Print shell completions
    #[command(
        after_help = "Example:\n  lodge completions bash > ~/.local/share/bash-completion/completions/lodge"
    )]
    Completions {
        /// The shell to complete for
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory
    Man {
        /// Where to write them; made if missing
        directory: PathBuf,
    },
}

/// `lodge image`.
#[derive(Debug, Subcommand)]
pub enum Image {
    /// Fetch one: from the catalogue, by its URL, or an OCI image from its registry. A fetch that was broken off goes on where it was
    #[command(
        after_help = "Examples:\n  lodge image pull ubuntu\n  lodge image pull https://example.org/disk.qcow2 --name mine"
    )]
    Pull(Pull),
    /// List what can be fetched by name: the catalogue
    Catalogue,
    /// List those that were fetched or made, with the space that they take
    Ls,
    /// Print what one is: where it comes from, its packages and their versions
    Inspect {
        /// Its name, as `lodge image ls` shows it
        name: String,
    },
    /// Remove one; it is made anew when it is wanted. Virtual machines with names keep what they need of it
    Rm {
        /// Its name, as `lodge image ls` shows it
        name: String,
    },
}

/// `lodge ls`.
#[derive(Debug, Args)]
pub struct Ls {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

const EXEC_EXAMPLES: &str = "\
Examples:
  lodge exec web                            root's shell, on this terminal
  lodge exec web -- systemctl status ssh    a command; the exit status is its own
  lodge exec web --user ada -- tar -C ~ -c . >ada.tar
  lodge exec web -t -- top";

/// `lodge exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// Its name, as `lodge ls` shows it
    pub name: String,
    /// Give the command a terminal
    #[arg(long, short)]
    pub terminal: bool,
    /// Who runs it [default: root]
    #[arg(long, short, value_name = "USER")]
    pub user: Option<String>,
    /// A variable of its environment. May be given several times
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<std::ffi::OsString>,
    /// Where it runs [default: the user's home]
    #[arg(long, short, value_name = "DIR")]
    pub workdir: Option<std::ffi::OsString>,
    /// The command and its arguments [default: the user's shell, with a terminal]
    #[arg(last = true)]
    pub command: Vec<std::ffi::OsString>,
}

/// `lodge ssh`.
#[derive(Debug, Args)]
pub struct Ssh {
    /// Its name, as `lodge ls` shows it
    pub name: String,
    /// Who logs in
    #[arg(long, short, value_name = "USER", default_value = "root")]
    pub user: String,
    /// More for ssh: options, and a command
    #[arg(last = true)]
    pub command: Vec<std::ffi::OsString>,
}

/// `lodge forward`.
#[derive(Debug, Args)]
pub struct Forward {
    /// Its name, as `lodge ls` shows it
    pub name: String,
    /// The port, at which a program of the guest's listens on its loopback
    pub port: u16,
    /// Wait so many seconds for somebody to listen there
    #[arg(long, value_name = "SECS", value_parser = parse_seconds)]
    pub wait: Option<std::time::Duration>,
}

/// `lodge stop`.
#[derive(Debug, Args)]
pub struct Stop {
    /// Its name, as `lodge ls` shows it
    pub name: String,
    /// End it at once, as when a PC's power fails
    #[arg(long)]
    pub force: bool,
    /// Wait no longer than so many seconds [default: as long as it takes]
    #[arg(long, value_name = "SECS", value_parser = parse_seconds)]
    pub timeout: Option<std::time::Duration>,
}

/// `lodge memory`.
#[derive(Debug, Args)]
pub struct Memory {
    /// Its name, as `lodge ls` shows it
    pub name: String,
    /// What it is to have, such as 512M; at most what it was started with, or for (`--memory SIZE,max=SIZE`)
    #[arg(value_parser = parse_size)]
    pub size: Option<u64>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `lodge disk`.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Give a running guest one more disk. It stays through the guest's restarts, until the virtual machine ends
    #[command(after_help = "Example:\n  lodge disk attach web data.qcow2,serial=data")]
    Attach {
        /// The virtual machine's name, as `lodge ls` shows it
        name: String,
        /// The disk, as for `lodge run --disk`, with bus=virtio, virtio-packed or nvme
        #[arg(value_name = "PATH[,OPTION…]", value_parser = crate::disk::parse)]
        disk: crate::disk::Disk,
    },
    /// Have a running guest give up a disk, and close its image
    #[command(after_help = "Example:\n  lodge disk detach web data")]
    Detach {
        /// The virtual machine's name
        name: String,
        /// The disk's serial number or path, as `lodge disk ls` shows it
        disk: String,
        /// How long the guest has for it [default: 30]
        #[arg(long, value_name = "SECS", value_parser = parse_seconds)]
        timeout: Option<std::time::Duration>,
        /// Take the disk away without asking the guest, which loses what it has not written yet
        #[arg(long)]
        force: bool,
    },
    /// List a running guest's disks
    Ls {
        /// The virtual machine's name
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// `lodge nic`.
#[derive(Debug, Subcommand)]
pub enum NicCommand {
    /// Give a running guest one more network card. It stays through the guest's restarts, until the virtual machine ends
    #[command(after_help = "Example:\n  lodge nic attach web default,rate=10M")]
    Attach {
        /// The virtual machine's name, as `lodge ls` shows it
        name: String,
        /// The network, as for `lodge run --network`
        #[arg(value_name = "NETWORK[,OPTION…]")]
        network: String,
    },
    /// Have a running guest give up a network card
    Detach {
        /// The virtual machine's name
        name: String,
        /// The card's number or address, as `lodge nic ls` shows it
        nic: String,
        /// How long the guest has for it [default: 30]
        #[arg(long, value_name = "SECS", value_parser = parse_seconds)]
        timeout: Option<std::time::Duration>,
        /// Take the card away without asking the guest
        #[arg(long)]
        force: bool,
    },
    /// Put a network card's cable in
    Up {
        /// The virtual machine's name
        name: String,
        /// The card's number or address, as `lodge nic ls` shows it
        #[arg(default_value = "1")]
        nic: String,
    },
    /// Take a network card's cable out
    Down {
        /// The virtual machine's name
        name: String,
        /// The card's number or address, as `lodge nic ls` shows it
        #[arg(default_value = "1")]
        nic: String,
    },
    /// List a running guest's network cards, and what has gone through them
    Ls {
        /// The virtual machine's name
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// `lodge image pull`.
#[derive(Debug, Args)]
pub struct Pull {
    /// A name in the catalogue, such as `ubuntu:24.04` or `ubuntu` (the newest), or the URL of a qcow2 or raw image, perhaps
    /// compressed (.xz, .gz, .zst)
    pub what: String,
    /// What to call it [default: as in the catalogue, or after the URL]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Its SHA-256 [default: what the catalogue says, or a file of checksums beside it]
    #[arg(long, value_name = "HEX", conflicts_with = "unverified")]
    pub sha256: Option<String>,
    /// Take it without a checksum
    #[arg(long)]
    pub unverified: bool,
    /// What starts it: `bios` or `uefi` [default: as in the catalogue, else bios]
    #[arg(long, value_name = "bios|uefi", value_parser = crate::firmware::parse_known)]
    pub firmware: Option<images::Firmware>,
}

/// `lodge host`.
#[derive(Debug, Args)]
pub struct Host {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Which technique runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// The fastest that works here
    #[default]
    Auto,
    /// The host's KVM
    Kvm,
    /// Every instruction by software: slow, exact, needs nothing
    Interpret,
    /// Guest code is rewritten into host code: fast, and needs nothing of the host
    Translate,
}

/// What the terminal is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Terminal {
    /// The first serial port
    Serial,
    /// A virtio console
    Virtio,
}

/// What shows the guest's screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Display {
    /// Nothing: there is the serial console alone
    None,
    /// A VGA, which every system knows
    Vga,
    /// virtio-gpu, with a virtio keyboard and tablet: its size follows the viewer's. BIOS does not know it
    Virtio,
}

/// Which processor the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cpu {
    /// x86-64-v2: SSE4.2, POPCNT
    V2,
    /// x86-64-v3: AVX2, BMI, FMA
    V3,
    /// All that this host and the engine have
    Host,
}

/// `lodge run`.
#[derive(Debug, Args)]
pub struct Run {
    /// The guest: `debian` (a whole Debian 13; `debian:12` and `debian:13` choose), `tiny` (a Debian kernel and a shell; also
    /// `tiny:SUITE` and `tiny:i386`), one of the catalogue (`lodge image catalogue`) or that was fetched, an OCI image
    /// (`oci:REGISTRY/NAME:TAG`, `docker:NAME`), a disk image to boot from, or a kernel file
    pub image: Option<String>,

    /// What to call the virtual machine. One of a whole system is kept under this name, and starts again with `--name N` alone;
    /// without a name it is thrown away at its end
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
    /// What runs it [default: auto, or the configuration file's]
    #[arg(long, value_enum)]
    pub engine: Option<Engine>,
    /// Virtual processors, 1 to 255 [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// The processor's model [default: v3 where the host has it, else v2]
    #[arg(long, value_enum)]
    pub cpu: Option<Cpu>,
    /// What the terminal is connected to. The virtio console knows the terminal's size; the serial port is shown until the guest has
    /// opened it
    #[arg(long, value_enum, default_value = "serial")]
    pub console: Terminal,
    /// Memory, such as 512M or 4G [default: 512M, for whole systems 1G]; with `max=` what `lodge memory` may make of it while the
    /// guest runs
    #[arg(long, value_name = "SIZE[,max=SIZE]", value_parser = parse_memory)]
    pub memory: Option<MemorySize>,

    /// A disk: an image (raw, qcow2, VMDK) or a block device. There may follow: `readonly`; `throwaway` (what is written goes at the end);
    /// `serial=TEXT`; `bus=` (virtio, virtio-packed, nvme, sata); `cache=` (writeback, writethrough, none, directsync, unsafe: as QEMU's);
    /// `format=` (raw, qcow2, vmdk), which is found out if absent. A comma in the path is doubled. May be given several times
    #[arg(long, value_name = "PATH[,OPTION…]", help_heading = "Disks", value_parser = crate::disk::parse)]
    pub disk: Vec<crate::disk::Disk>,
    /// A CD-ROM drive with this image in it. May be given several times
    #[arg(long, value_name = "FILE.iso", help_heading = "Disks")]
    pub cdrom: Vec<PathBuf>,

    /// A directory of this host that the guest may use; it mounts TAG with `mount -t virtiofs TAG DIR`, and guests of Lodge's own have
    /// it at /mnt/TAG by themselves. `readonly` may follow. May be given several times [default tag: the directory's name]
    #[arg(long, value_name = "DIR[:TAG][,readonly]", help_heading = "Disks", value_parser = crate::share::parse)]
    pub share: Vec<crate::share::Share>,

    /// What a network card is connected to. `user` (the default): the guest reaches what this host reaches, nobody reaches the guest. A
    /// network's name, such as `default`: guests and this host reach each other, and the world as `lodge net` says. `bridge=LINK`: a bridge
    /// of this host's. `direct=LINK`: the guest is a machine of its own beside this host. `none`. There may follow: `model=` (virtio,
    /// e1000), `mac=`, `rate=`, `rate-in=` and `rate-out=` (bits per second, such as 10M), `link=down`; of `user` `net=` (its
    /// addresses, such as 10.0.9.0/24); of the others `ip=`, `spoofing=allow`; of direct `mode=` (bridge, vepa, private, passthru) and
    /// `host-access`. May be given several times
    #[arg(long, value_name = "NETWORK[,OPTION…]", help_heading = "Network", value_parser = crate::network::parse)]
    pub network: Vec<crate::network::Network>,
    /// A port of this host's that leads to one of the guest's. Other machines reach it only with their side's ADDRESS before it, such
    /// as 0.0.0.0. May be given several times
    #[arg(long, value_name = "[ADDRESS:]PORT:GUEST_PORT[/udp]", help_heading = "Network", value_parser = crate::network::parse_forward)]
    pub forward: Vec<networks::user::Forward>,
    /// With `user`: let the guest reach what listens on this host's loopback alone, at its gateway's address (10.0.2.2). With `direct`: let
    /// guest and host reach each other
    #[arg(long, help_heading = "Network")]
    pub host_access: bool,
    /// What the guest may reach or be reached by, such as "deny out tcp 25", "allow in tcp 22 from 192.0.2.0/24" or "deny in". The first
    /// that applies counts; what none applies to is allowed. May be given several times
    #[arg(long, value_name = "RULE", help_heading = "Network")]
    pub rule: Vec<netctl::Rule>,

    /// The machine's name in the network [default: that of the virtual machine, or `debian`]
    #[arg(long, value_name = "NAME", help_heading = "A whole system's first start")]
    pub hostname: Option<String>,
    /// A user to make, who may use sudo. The console is root's, and needs no password
    #[arg(long, value_name = "NAME", help_heading = "A whole system's first start")]
    pub user: Option<String>,
    /// A public key by which root and that user may log in; may be given several times [default: ~/.ssh/*.pub]
    #[arg(long, value_name = "FILE", help_heading = "A whole system's first start")]
    pub ssh_key: Vec<PathBuf>,
    /// A package to install, before the commands run; may be given several times, or with commas. This host fetches those for Debian
    /// systems of Lodge's own
    #[arg(long, value_name = "NAME", value_delimiter = ',', help_heading = "A whole system's first start")]
    pub package: Vec<String>,
    /// A command to run as root; may be given several times
    #[arg(long, value_name = "COMMAND", help_heading = "A whole system's first start")]
    pub runcmd: Vec<String>,

    /// A kernel: Linux bzImage, ELF with a PVH note, or multiboot
    #[arg(long, value_name = "FILE", help_heading = "Boot", conflicts_with_all = ["image", "firmware"])]
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk; for multiboot a module, `FILE ARGUMENTS`. May be given several times: they are unpacked in turn
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub initrd: Vec<PathBuf>,
    /// The kernel's command line; for the default guest, what to add to it
    #[arg(long, value_name = "TEXT", help_heading = "Boot")]
    pub cmdline: Option<String>,
    /// Firmware that starts the guest from its disks: `bios` (SeaBIOS), `uefi` (OVMF; with --name its variables are kept), or
    /// a file [default: bios, where the guest is a disk image]
    #[arg(long, value_name = "bios|uefi|FILE", help_heading = "Boot", value_parser = crate::firmware::parse)]
    pub firmware: Option<crate::firmware::Which>,
    /// The Debian archive to fetch from [default: the one that apt on this host uses]
    #[arg(long, value_name = "URL", help_heading = "Boot")]
    pub mirror: Option<String>,

    /// Show the guest's screen to viewers of VNC, plain or by WebSocket (noVNC), at an IP address, a port, both, or the path of a
    /// Unix socket [default: the first free port from 5900 at 127.0.0.1]
    #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = "127.0.0.1", help_heading = "Screen")]
    pub vnc: Option<screens::vnc::Address>,
    /// A file with the password for viewers, whose first 8 bytes count (VNC has no more)
    #[arg(long, value_name = "FILE", requires = "vnc", help_heading = "Screen")]
    pub vnc_password_file: Option<PathBuf>,
    /// What shows the guest's screen [default: vga, where firmware starts the guest or --vnc is given]
    #[arg(long, value_enum, help_heading = "Screen")]
    pub display: Option<Display>,
    /// Write what the screen shows when the guest has ended into this PNG file
    #[arg(long, value_name = "FILE.png", help_heading = "Screen")]
    pub screenshot: Option<PathBuf>,

    /// End the guest after so many seconds
    #[arg(long, value_name = "SECS", help_heading = "Ending", value_parser = parse_seconds)]
    pub timeout: Option<std::time::Duration>,
    /// End when the guest resets, instead of starting it again
    #[arg(long, help_heading = "Ending")]
    pub no_reboot: bool,
    /// Give the guest port 0xf4, through which it can end with a status of its choice
    #[arg(long, help_heading = "Ending")]
    pub debug_exit: bool,

    /// Wait for gdb at this address, such as 127.0.0.1:1234
    #[arg(long, value_name = "ADDR", help_heading = "Looking inside")]
    pub gdb: Option<SocketAddr>,
    /// Check every block of the translate engine against the reference engine (for developers)
    #[arg(long, hide_short_help = true, help_heading = "Looking inside")]
    pub lockstep: bool,
    /// Print what the guest did: instructions, exits by kind, time by phase
    #[arg(long, help_heading = "Looking inside")]
    pub stats: bool,
    /// Write the firmware's messages for its developers into this file (port 0x402)
    #[arg(long, value_name = "FILE", hide_short_help = true, help_heading = "Looking inside")]
    pub firmware_log: Option<PathBuf>,
    /// Write into this file what the engine `translate` makes of guest code: for its developers, and large
    #[arg(long, value_name = "FILE", help_heading = "Looking inside")]
    pub trace: Option<PathBuf>,
}

/// What a guest starts with, and may come to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    /// Bytes at its start.
    pub size: u64,
    /// Bytes at most: no less.
    pub max: u64,
}

/// A size, and perhaps the most that it may become.
pub fn parse_memory(text: &str) -> Result<MemorySize, String> {
    let Some((size, more)) = text.split_once(',') else {
        return parse_size(text).map(|size| MemorySize { size, max: size });
    };
    let max =
        more.trim().strip_prefix("max=").ok_or("after the size only max= may follow, as in 1G,max=4G")?;
    let memory = MemorySize { size: parse_size(size)?, max: parse_size(max)? };
    if memory.max < memory.size { Err("max= is less than the size before it".into()) } else { Ok(memory) }
}

/// Reads a size: a number with K, M, G or T after it (powers of 1024), or bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err("give a number and a unit, such as 512M or 4G".into()),
    };
    let number: u64 =
        number.parse().map_err(|_| "give a number and a unit, such as 512M or 4G".to_string())?;
    number.checked_mul(1 << shift).ok_or_else(|| "that is more than any machine has".into())
}

fn parse_seconds(text: &str) -> Result<std::time::Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "give a number of seconds, such as 30".to_string())?;
    if !(seconds > 0.0 && seconds < 1e9) {
        return Err("give more than 0 seconds".into());
    }
    Ok(std::time::Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4gib"), Ok(4 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "M", "1X", "-1G", "1.5G", "99999999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        let (size, max) = (1 << 30, 4 << 30);
        assert_eq!(parse_memory("1G"), Ok(MemorySize { size, max: size }));
        assert_eq!(parse_memory("1G,max=4G"), Ok(MemorySize { size, max }));
        for bad in ["1G,", "1G,4G", "1G,max=", "1G,max=512M", ",max=4G", "1G,max=2G,max=4G"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
    }
}
