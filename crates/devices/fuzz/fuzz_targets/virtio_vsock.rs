//! The virtio socket device: a guest that sends any packets at all, and programs of the host that use its streams meanwhile.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use devices::virtio::vsock::{Hub, Stream};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A program connects, to one of two ports.
    Begin(bool),
    /// It reads, writes, ends its half, or leaves.
    Read(u8, u16),
    Write(u8, u16),
    End(u8),
    Leave(u8),
    /// The guest takes a packet of at most so many bytes.
    Take(u16),
    /// It sends one about a stream that there may be: operation, flags, what it says of its buffer, and bytes.
    Send {
        stream: u8,
        op: u8,
        flags: u8,
        room: u32,
        read: u32,
        len: u16,
    },
    /// It sends bytes.
    Bytes(Vec<u8>),
}

const NOW: Option<Duration> = Some(Duration::ZERO);
/// The host's first port.
const FIRST_PORT: u32 = 1 << 16;

fn packet(stream: u8, op: u8, flags: u8, room: u32, read: u32, len: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(3u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend((u32::from(stream & 1) + 842).to_le_bytes());
    bytes.extend((FIRST_PORT + u32::from(stream % 16)).to_le_bytes());
    bytes.extend(u32::from(len).to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(u16::from(op % 9).to_le_bytes());
    bytes.extend(u32::from(flags).to_le_bytes());
    bytes.extend(room.to_le_bytes());
    bytes.extend(read.to_le_bytes());
    bytes.resize(bytes.len() + usize::from(len), 7);
    bytes
}

fuzz_target!(|steps: Vec<Step>| {
    let hub = Arc::new(Hub::default());
    let mut streams: Vec<Stream> = Vec::new();
    // Whether something comes of it is not what is tested.
    for step in steps.into_iter().take(256) {
        let chosen = |n: u8| usize::from(n) % streams.len().max(1);
        match step {
            Step::Begin(other) => streams.extend(hub.begin(842 + u32::from(other))),
            Step::Read(n, len) => {
                let mut bytes = vec![0; len.into()];
                let _ = streams.get(chosen(n)).map(|stream| stream.read_within(&mut bytes, NOW));
            }
            Step::Write(n, len) => {
                let _ = streams.get(chosen(n)).map(|stream| stream.write_within(&vec![1; len.into()], NOW));
            }
            Step::End(n) => {
                let _ = streams.get(chosen(n)).map(Stream::end_writing);
            }
            Step::Leave(n) if !streams.is_empty() => drop(streams.swap_remove(chosen(n))),
            Step::Leave(_) => {}
            Step::Take(room) => {
                let mut bytes = Vec::new();
                if let Ok(len) = hub.give_packet(&mut bytes, room.into()) {
                    assert_eq!(len, bytes.len());
                    assert!(len <= usize::from(room));
                }
            }
            Step::Send { stream, op, flags, room, read, len } => {
                let bytes = packet(stream, op, flags, room, read, len);
                let _ = hub.take_packet(&bytes[..], bytes.len());
            }
            Step::Bytes(bytes) => {
                let _ = hub.take_packet(&bytes[..], bytes.len());
            }
        }
    }
    // When the guest takes all that there is, and ends all that it is told of, nothing stays behind.
    drop(streams);
    for _ in 0..10_000 {
        let mut bytes = Vec::new();
        if hub.give_packet(&mut bytes, 1 << 16).expect("there is room") == 0 {
            return;
        }
    }
    panic!("there is no end of packets");
});
