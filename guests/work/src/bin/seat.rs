//! What is at a guest's screen and desk, for tests: `seat cursor CARD` shows a mouse cursor of the display adapter's (a device of the
//! kernel's DRM) until it is killed, `seat events DEVICE` prints what an input device tells, `TYPE CODE VALUE` line by line.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;

/// The cursor's width and height: the one size that virtio-gpu takes.
const SIDE: u32 = 64;
/// Opaque, at the cursor's upper left, 16 pixels wide and high; the rest is not to be seen.
const COLOUR: u32 = 0xff12_3456;
/// The pixel that points.
const HOT: (i32, i32) = (7, 9);

/// `struct drm_mode_card_res` (include/uapi/drm/drm_mode.h, as all of these).
#[repr(C)]
#[derive(Default)]
struct Resources {
    pointers: [u64; 4],
    counts: [u32; 4],
    sizes: [u32; 4],
}

/// `struct drm_mode_create_dumb`.
#[repr(C)]
#[derive(Default)]
struct CreateDumb {
    height: u32,
    width: u32,
    bits: u32,
    flags: u32,
    handle: u32,
    pitch: u32,
    size: u64,
}

/// `struct drm_mode_map_dumb`.
#[repr(C)]
#[derive(Default)]
struct MapDumb {
    handle: u32,
    pad: u32,
    offset: u64,
}

/// `struct drm_mode_cursor2`.
#[repr(C)]
#[derive(Default)]
struct Cursor {
    flags: u32,
    crtc: u32,
    x: i32,
    y: i32,
    width: u32,
    height: u32,
    handle: u32,
    hot_x: i32,
    hot_y: i32,
}

/// Does a request of DRM's, which reads and writes `T`.
fn ask<T>(card: &File, number: u64, request: &mut T) -> io::Result<()> {
    // _IOWR('d', number, T)
    let code = 3 << 30 | (size_of::<T>() as u64) << 16 | u64::from(b'd') << 8 | number;
    // SAFETY: the kernel reads and writes as many bytes as the code says, which `request` has; any bits are a value of these types.
    match unsafe { libc::ioctl(card.as_raw_fd(), code as _, request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn show_cursor(path: &str) -> io::Result<()> {
    let card = OpenOptions::new().read(true).write(true).open(path)?;
    // The first controller, of those that there are.
    let mut crtcs = [0u32; 8];
    let mut counted = Resources::default();
    ask(&card, 0xa0, &mut counted)?;
    let mut found = Resources::default();
    found.pointers[1] = crtcs.as_mut_ptr() as u64;
    found.counts[1] = counted.counts[1].min(crtcs.len() as u32);
    ask(&card, 0xa0, &mut found)?;
    let mut buffer = CreateDumb { height: SIDE, width: SIDE, bits: 32, ..CreateDumb::default() };
    ask(&card, 0xb2, &mut buffer)?;
    let mut place = MapDumb { handle: buffer.handle, ..MapDumb::default() };
    ask(&card, 0xb3, &mut place)?;
    let (length, protection) = (buffer.size as usize, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: a new mapping, where the kernel has room, of a buffer of this size.
    let pixels = unsafe {
        let (fd, at) = (card.as_raw_fd(), place.offset as libc::off_t);
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, at)
    };
    if pixels == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just mapped, aligned to a page, and nobody else's in this process.
    let pixels = unsafe { std::slice::from_raw_parts_mut(pixels.cast::<u32>(), length / 4) };
    for row in pixels.chunks_mut(buffer.pitch as usize / 4).take(16) {
        row[..16].fill(COLOUR);
    }
    // A picture, and a place.
    let mut cursor = Cursor {
        flags: 3,
        crtc: crtcs[0],
        x: 100,
        y: 100,
        width: SIDE,
        height: SIDE,
        handle: buffer.handle,
        hot_x: HOT.0,
        hot_y: HOT.1,
    };
    ask(&card, 0xbb, &mut cursor)?;
    println!("the cursor is shown");
    // It goes with the process.
    loop {
        std::thread::park();
    }
}

fn print_events(path: &str) -> io::Result<()> {
    let mut device = File::open(path)?;
    println!("listening");
    // `struct input_event`: a time of 16 bytes, type, code, value.
    let mut event = [0; 24];
    loop {
        device.read_exact(&mut event)?;
        let half = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
        let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
        println!("{} {} {value}", half(16), half(18));
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["cursor", card] => show_cursor(card),
        ["events", device] => print_events(device),
        _ => Err(io::Error::other("say `cursor CARD` or `events DEVICE`")),
    };
    if let Err(error) = done {
        eprintln!("seat: {error}");
        std::process::exit(1);
    }
}
