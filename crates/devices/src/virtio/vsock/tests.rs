//! A guest by hand, well-behaved and not.

use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use super::connection::{TO_GUEST, TO_HOST};
use super::packet::{HEADER, Header, NO_READING, NO_WRITING, STREAM, op};
use super::{GUEST, HOST, Hub, Stream};

const PORT: u32 = 842;
const NOW: Option<Duration> = Some(Duration::ZERO);

struct Guest {
    hub: Arc<Hub>,
    /// What the guest says of its buffer.
    room: u32,
    read: u32,
}

impl Guest {
    fn new() -> Self {
        Self { hub: Arc::default(), room: 1 << 20, read: 0 }
    }

    /// The next packet, of at most so many bytes of data.
    fn next(&self, room: usize) -> Option<(Header, Vec<u8>)> {
        let mut bytes = Vec::new();
        match self.hub.give_packet(&mut bytes, HEADER + room).unwrap() {
            0 => None,
            len => {
                assert_eq!(len, bytes.len());
                let data = bytes.split_off(HEADER);
                let header = Header::from_bytes(bytes[..].try_into().unwrap());
                assert_eq!((header.from_cid, header.to_cid, header.kind), (HOST, GUEST, STREAM));
                assert_eq!(header.len as usize, data.len());
                Some((header, data))
            }
        }
    }

    fn expect(&self, op: u16) -> Header {
        let (header, _) = self.next(4096).expect("a packet");
        assert_eq!(header.op, op);
        header
    }

    fn quiet(&self) {
        assert_eq!(self.next(4096), None);
    }

    fn packet(&self, host_port: u32, op: u16, flags: u32, data: &[u8]) -> Vec<u8> {
        let header = Header {
            from_cid: GUEST,
            to_cid: HOST,
            from_port: PORT,
            to_port: host_port,
            len: data.len() as u32,
            kind: STREAM,
            op,
            flags,
            room: self.room,
            read: self.read,
        };
        [&header.to_bytes()[..], data].concat()
    }

    fn send(&self, host_port: u32, op: u16, flags: u32, data: &[u8]) {
        let packet = self.packet(host_port, op, flags, data);
        self.hub.take_packet(&packet[..], packet.len()).unwrap();
    }

    /// A stream that is open, and the host's port.
    fn open(&self) -> (Stream, u32) {
        let stream = self.hub.begin(PORT).unwrap();
        let port = self.expect(op::REQUEST).from_port;
        assert_eq!(stream.wait(Duration::ZERO).unwrap_err().kind(), ErrorKind::TimedOut);
        self.send(port, op::RESPONSE, 0, b"");
        stream.wait(Duration::ZERO).unwrap();
        (stream, port)
    }
}

fn failed<T>(result: std::io::Result<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

#[test]
fn bytes_go_both_ways_as_far_as_there_is_room() {
    let mut guest = Guest::new();
    guest.room = 1000;
    let (stream, port) = guest.open();
    let mut bytes = [0; TO_HOST];
    assert_eq!(failed(stream.read_within(&mut bytes, NOW)), Some(ErrorKind::TimedOut));
    guest.send(port, op::RW, 0, b"hello");
    assert_eq!(stream.read_within(&mut bytes, NOW).unwrap(), 5);
    guest.quiet();
    // The guest takes 1000 bytes, then is asked for more once.
    assert_eq!(stream.write_within(&[7; 2 * TO_GUEST], NOW).unwrap(), TO_GUEST);
    assert_eq!(failed(stream.write_within(b"x", NOW)), Some(ErrorKind::TimedOut));
    let lens: Vec<_> = std::iter::from_fn(|| guest.next(600)).map(|(h, data)| (h.op, data.len())).collect();
    assert_eq!(lens, [(op::RW, 600), (op::RW, 400), (op::CREDIT_REQUEST, 0)]);
    guest.read = 1000;
    guest.send(port, op::CREDIT_UPDATE, 0, b"");
    assert_eq!(guest.next(4096).unwrap().1.len(), 1000);
    assert_eq!(stream.write_within(&[7; 2 * TO_GUEST], NOW).unwrap(), 2000);
    // The host takes what it said, and says when it takes more.
    guest.room = 0;
    assert_eq!(guest.expect(op::CREDIT_REQUEST).room as usize, TO_HOST);
    guest.send(port, op::RW, 0, &vec![1; TO_HOST]);
    assert_eq!(stream.read_within(&mut bytes, NOW).unwrap(), TO_HOST);
    assert_eq!(guest.expect(op::CREDIT_UPDATE).read as usize, TO_HOST + 5);
    guest.send(port, op::CREDIT_REQUEST, 0, b"");
    guest.expect(op::CREDIT_UPDATE);
    guest.quiet();
}

#[test]
fn each_side_ends_its_half() {
    let guest = Guest::new();
    let (stream, port) = guest.open();
    (&stream).write_all(b"all").unwrap();
    stream.end_writing();
    assert_eq!(guest.next(4096).unwrap().1, b"all");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_WRITING);
    assert_eq!(failed(stream.write_within(b"x", NOW)), Some(ErrorKind::BrokenPipe));
    guest.send(port, op::RW, 0, b"answer");
    guest.send(port, op::SHUTDOWN, NO_READING | NO_WRITING, b"");
    guest.expect(op::RST);
    let mut text = String::new();
    (&stream).read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
    // The host's program leaves first, with something under way.
    let (stream, port) = guest.open();
    (&stream).write_all(b"last").unwrap();
    drop(stream);
    assert_eq!(guest.next(4096).unwrap().1, b"last");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_READING | NO_WRITING);
    guest.send(port, op::RW, 0, b"too late");
    guest.send(port, op::RST, 0, b"");
    guest.quiet();
    guest.send(port, op::RW, 0, b"later still");
    assert_eq!(guest.expect(op::RST).from_port, port, "it is forgotten");
}

#[test]
fn a_guest_that_refuses_or_breaks_off_is_noticed() {
    let guest = Guest::new();
    let stream = guest.hub.begin(PORT).unwrap();
    let port = guest.expect(op::REQUEST).from_port;
    guest.send(port, op::RST, 0, b"");
    assert_eq!(failed(stream.wait(Duration::ZERO)), Some(ErrorKind::ConnectionRefused));
    let (stream, port) = guest.open();
    guest.send(port, op::RST, 0, b"");
    assert_eq!(failed(stream.read_within(&mut [0; 9], NOW)), Some(ErrorKind::ConnectionReset));
    // A reset of the machine ends what the guest knew of, and leaves what it has not heard of.
    let (stream, _) = guest.open();
    let waiting = guest.hub.begin(PORT).unwrap();
    guest.hub.reset();
    assert_eq!(failed(stream.write_within(b"x", NOW)), Some(ErrorKind::ConnectionReset));
    let port = guest.expect(op::REQUEST).from_port;
    guest.send(port, op::RESPONSE, 0, b"");
    waiting.wait(Duration::ZERO).unwrap();
}

#[test]
fn who_breaks_the_rules_loses_the_stream() {
    let guest = Guest::new();
    for (op, len) in [(op::RESPONSE, 0), (op::REQUEST, 0), (99, 0), (op::RW, TO_HOST + 1)] {
        let (stream, port) = guest.open();
        guest.send(port, op, 0, &vec![0; len]);
        guest.expect(op::RST);
        assert_eq!(failed(stream.read_within(&mut [0; 9], NOW)), Some(ErrorKind::ConnectionReset), "{op}");
    }
    let (stream, port) = guest.open();
    guest.send(port, op::RW, 0, &vec![0; TO_HOST]);
    guest.send(port, op::RW, 0, b"x");
    guest.expect(op::RST);
    let mut bytes = Vec::new();
    assert!((&stream).read_to_end(&mut bytes).is_err());
    assert_eq!(bytes.len(), TO_HOST, "what came before is there");
    // Nobody listens on the host, and other guests are not in reach.
    guest.send(22, op::REQUEST, 0, b"");
    assert_eq!(guest.expect(op::RST).from_port, 22);
    let mut packet = guest.packet(22, op::REQUEST, 0, b"");
    packet[8] = 7;
    guest.hub.take_packet(&packet[..], packet.len()).unwrap();
    guest.quiet();
    // A packet without all of its data, or of its header.
    let packet = guest.packet(22, op::RW, 0, b"data");
    for len in [HEADER + 3, HEADER - 1, 0] {
        assert!(guest.hub.take_packet(&packet[..len], len).is_err(), "{len}");
    }
    assert!(guest.hub.give_packet(Vec::new(), HEADER - 1).is_err());
}

#[test]
fn what_waits_is_bounded() {
    let guest = Guest::new();
    // Refusals that the guest does not take.
    let mut taken = 0;
    while guest.hub.takes_packets() {
        guest.send(22, op::RW, 0, b"x");
        taken += 1;
    }
    assert_eq!(taken, 256);
    while guest.next(4096).is_some() {}
    // Streams that the guest does not end.
    let mut ports = Vec::new();
    for _ in 0..300 {
        ports.push(guest.open().1);
        while guest.next(4096).is_some() {}
    }
    guest.send(ports[0], op::RW, 0, b"x");
    guest.expect(op::RST);
    guest.send(ports[299], op::RW, 0, b"x");
    guest.quiet();
    let many: Vec<_> = std::iter::from_fn(|| guest.hub.begin(PORT).ok()).take(1000).collect();
    assert!((400..512).contains(&many.len()), "{}", many.len());
}

#[test]
fn streams_take_turns() {
    let guest = Guest::new();
    let (one, first) = guest.open();
    let (two, second) = guest.open();
    (&one).write_all(&[1; 10_000]).unwrap();
    (&two).write_all(&[2; 10_000]).unwrap();
    let order: Vec<_> = std::iter::from_fn(|| guest.next(4096)).map(|(header, _)| header.from_port).collect();
    assert_eq!(order, [first, second, first, second, first, second]);
}
