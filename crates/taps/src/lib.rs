//! Linux's TAP and MacVTap devices: links of the host's whose other end is a descriptor
//! (the kernel's `Documentation/networking/tuntap.rst`, `include/uapi/linux/if_tun.h`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::ioctl::{Updater, ioctl, opcode};

/// The device that makes TAP devices.
pub const TUN: &str = "/dev/net/tun";
/// Bytes before each frame that is read or written: see [`prepare`].
pub const HEADER: usize = 12;

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// What a reader of the descriptor takes: frames without these are made whole by the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksums are to be computed.
    pub checksum: bool,
    /// Long TCP segments over IPv4; needs `checksum`.
    pub tso4: bool,
    /// Long TCP segments over IPv6; needs `checksum`.
    pub tso6: bool,
}

/// `struct ifreq`, with flags in its union.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Makes a TAP device with so many queues, each a descriptor that does not wait. The kernel puts a number for `%d` in its name. The device
/// ends with the last descriptor.
///
/// # Errors
/// Its maker has no CAP_NET_ADMIN, the name is taken or too long, or the host has no TAP devices.
pub fn create(name: &str, queues: usize) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut request = Request { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    if queues > 1 {
        request.flags |= IFF_MULTI_QUEUE;
    }
    // The last byte stays 0.
    let place = request.name[..15].get_mut(..name.len()).ok_or(io::ErrorKind::InvalidInput)?;
    place.copy_from_slice(name.as_bytes());
    let mut descriptors = Vec::new();
    for _ in 0..queues.max(1) {
        let tap = open(TUN, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose 40 bytes `Request` has.
        unsafe { ioctl(&tap, Updater::<{ opcode::write::<i32>(b'T', 202) }, Request>::new(&mut request))? };
        descriptors.push(tap);
    }
    let name = request.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((String::from_utf8_lossy(name).into_owned(), descriptors))
}

/// Gives the descriptor of a TAP or MacVTap device headers of [`HEADER`] bytes, virtio's with a number of buffers.
///
/// # Errors
/// It is none.
pub fn prepare(tap: impl AsFd) -> io::Result<()> {
    let mut size = HEADER as i32;
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    unsafe { ioctl(tap, Updater::<{ opcode::write::<i32>(b'T', 216) }, i32>::new(&mut size))? };
    Ok(())
}

/// Whether the device is still there. That of a MacVTap may be removed without a word to who reads.
pub fn is_there(tap: impl AsFd) -> bool {
    let mut request = Request { name: [0; 16], flags: 0, rest: [0; 22] };
    // SAFETY: TUNGETIFF writes one `struct ifreq`, whose 40 bytes `Request` has.
    unsafe { ioctl(tap, Updater::<{ opcode::read::<u32>(b'T', 210) }, Request>::new(&mut request)).is_ok() }
}

/// Tells what its reader takes from now on.
///
/// # Errors
/// It is no TAP or MacVTap device.
pub fn set_offloads(tap: impl AsFd, offloads: Offloads) -> io::Result<()> {
    const CSUM: usize = 1;
    const TSO4: usize = 2;
    const TSO6: usize = 4;
    const TSO_ECN: usize = 8;
    let Offloads { checksum, tso4, tso6 } = offloads;
    let mut flags = 0;
    if checksum {
        flags |= CSUM;
        flags |= if tso4 { TSO4 } else { 0 };
        flags |= if tso6 { TSO6 } else { 0 };
        flags |= if tso4 || tso6 { TSO_ECN } else { 0 };
    }
    type Set = rustix::ioctl::IntegerSetter<{ opcode::write::<u32>(b'T', 208) }>;
    // SAFETY: TUNSETOFFLOAD takes a number, and no pointer.
    unsafe { ioctl(tap, Set::new_usize(flags))? };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tap_is_refused() {
        let null = open("/dev/null", OFlags::RDWR, Mode::empty()).unwrap();
        assert!(prepare(&null).is_err());
        assert!(set_offloads(&null, Offloads::default()).is_err());
        assert!(create("a-name-that-is-too-long", 1).is_err());
    }
}
