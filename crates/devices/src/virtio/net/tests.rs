use super::*;
use crate::testing::until;
use crate::virtio::testing::Driver;

const MACS: [Mac; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
const EVERYTHING: u64 = (1 << b::VIRTIO_NET_F_MQ)
    | (1 << b::VIRTIO_NET_F_CTRL_VQ)
    | (1 << b::VIRTIO_NET_F_CTRL_RX)
    | (1 << b::VIRTIO_NET_F_CTRL_MAC_ADDR)
    | (1 << b::VIRTIO_NET_F_MAC)
    | OFFLOADS;
const OFFLOADS: u64 = (1 << b::VIRTIO_NET_F_CSUM)
    | (1 << b::VIRTIO_NET_F_GUEST_CSUM)
    | (1 << b::VIRTIO_NET_F_HOST_TSO4)
    | (1 << b::VIRTIO_NET_F_GUEST_TSO4);

/// One end of a cable between two guests.
#[derive(Default)]
struct Cable {
    here: OnceLock<Guest>,
    there: OnceLock<Arc<Cable>>,
    room: Mutex<u32>,
}

impl Link for Cable {
    fn offloads(&self) -> bool {
        true
    }
    fn connect(&self, guest: Guest) {
        self.here.set(guest).unwrap();
    }
    fn send(&self, header: &Header, frame: &[u8]) {
        self.there.get().unwrap().here.get().unwrap().deliver(header, frame);
    }
    fn room(&self) {
        *lock(&self.room) += 1;
    }
}

/// Two guests at a cable, with the ends of it.
fn two(features: [u64; 2]) -> [(Driver, Arc<Cable>); 2] {
    let ends = [0, 1].map(|_| Arc::new(Cable::default()));
    for (end, other) in [(0, 1), (1, 0)] {
        let _ = ends[end].there.set(ends[other].clone());
    }
    [0, 1].map(|n| {
        let options = Options { mac: MACS[n], mtu: 1500, pairs: 4 };
        let device = Net::new(options, ends[n].clone());
        (Driver::new(Arc::new(device), features[n]), ends[n].clone())
    })
}

/// A TCP segment over IPv4 to a guest, from `port`.
fn segment(to: Mac, port: u8, data: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 9, 8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0]].concat();
    frame.extend([10, 0, 0, 1, 10, 0, 0, 2, 0, port, 0, 80]);
    frame.extend([0; 16]);
    frame.extend(data);
    frame
}

fn with(header: &Header, frame: &[u8]) -> Vec<u8> {
    [&header.bytes()[..], frame].concat()
}

const PLAIN: Header = Header { checksum: None, valid: false, segments: None };

#[test]
fn frames_go_from_guest_to_guest() {
    let [(mut one, _), (mut two, _)] = two([EVERYTHING; 2]);
    let mac = two.config(0, 4) | two.config(4, 2) << 32;
    assert_eq!(mac.to_le_bytes()[..6], MACS[1]);
    assert_eq!((two.config(6, 2), two.config(8, 2), two.config(10, 2)), (1, 4, 1500));
    let frame = segment(MACS[1], 1, b"hello");
    one.call(1, &with(&PLAIN, &frame), 0);
    assert_eq!(two.call(0, &[], 2000), with(&PLAIN, &frame));
    // What the receiver is to do is told it.
    let long = Header {
        checksum: Some((34, 16)),
        valid: false,
        segments: Some(Segments { ipv6: false, ecn: true, size: 1000, header: 54 }),
    };
    let frame = segment(MACS[1], 1, &[7; 5000]);
    one.call(1, &with(&long, &frame), 0);
    assert_eq!(two.call(0, &[], 6000), with(&long, &frame));
    // A buffer that is too short holds none of it.
    one.call(1, &with(&PLAIN, &frame), 0);
    assert!(two.call(0, &[], 1000).is_empty());
}

#[test]
fn what_a_guest_cannot_do_is_done_for_it() {
    let [(mut one, _), (mut two, _)] = two([EVERYTHING, EVERYTHING & !OFFLOADS]);
    let mut frame = segment(MACS[1], 1, b"odd");
    // The pseudo header's sum: addresses, protocol, length.
    let sum = 0x0a00 + 1 + 0x0a00 + 2 + 6 + 23u16;
    frame[50..52].copy_from_slice(&sum.to_be_bytes());
    let header = Header { checksum: Some((34, 16)), ..PLAIN };
    one.call(1, &with(&header, &frame), 0);
    let came = two.call(0, &[], 2000);
    assert_eq!(came[..HEADER], PLAIN.bytes());
    let pseudo = [10, 0, 0, 1, 10, 0, 0, 2, 0, 6, 0, 23];
    let all = [&pseudo[..], &came[HEADER + 34..], &[0]].concat();
    let total: u32 = all.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    assert_eq!((total & 0xffff) + (total >> 16), 0xffff, "a right checksum");
    // Long segments are lost to it, and what is next is not.
    let segments = Some(Segments { ipv6: false, ecn: false, size: 1000, header: 54 });
    one.call(1, &with(&Header { segments, ..header }, &segment(MACS[1], 1, &[1; 3000])), 0);
    one.call(1, &with(&PLAIN, &frame), 0);
    assert_eq!(two.call(0, &[], 6000).len(), HEADER + frame.len());
}

#[test]
fn the_driver_says_which_frames_it_wants() {
    let [(mut d, end), _] = two([EVERYTHING; 2]);
    let deliver = |to: Mac| end.here.get().unwrap().deliver(&PLAIN, &segment(to, 0, to.as_slice()));
    let (other, group, all) = ([2, 0, 0, 0, 0, 77], [0x33, 0, 0, 0, 0, 1], [0xff; 6]);
    // Offers commands, and then gets a frame at most: the first that is wanted.
    let mut wanted = |commands: &[&[u8]]| {
        for command in commands {
            assert_eq!(d.call(8, command, 1), [0], "{command:?}");
        }
        let mut came = Vec::new();
        for to in [other, group, all, MACS[0]] {
            assert!(deliver(to));
        }
        // The last one is wanted always, but where it is not the guest's any more.
        while came.last() != Some(&MACS[0]) {
            came.push(*d.call(0, &[], 2000)[HEADER..].first_chunk::<6>().unwrap());
        }
        came
    };
    assert_eq!(wanted(&[]), [other, group, all, MACS[0]], "everything at first");
    assert_eq!(wanted(&[&[0, 0, 0]]), [all, MACS[0]]);
    assert_eq!(wanted(&[&[0, 1, 1]]), [group, all, MACS[0]]);
    assert_eq!(wanted(&[&[0, 5, 1], &[0, 1, 0]]), [MACS[0]]);
    let table = [&[1, 0, 1, 0, 0, 0], &other[..], &[1, 0, 0, 0], &group].concat();
    assert_eq!(wanted(&[&table]), [other, group, MACS[0]]);
    let many = [&[1, 0, 0, 0, 0, 0, 65, 0, 0, 0], &[9; 65 * 6][..]].concat();
    assert_eq!(wanted(&[&many]), [group, MACS[0]], "too many to remember: all");
    assert_eq!(wanted(&[&[0, 3, 1], &[0, 2, 1]]), [other, MACS[0]]);
    for bad in [&[0, 6, 1][..], &[0, 0], &[1, 1, 0], &table[..11], &[1, 0, 255, 255, 255, 255], &[9, 9]] {
        assert_eq!(d.call(8, bad, 1), [1], "{bad:?}");
    }
    assert_eq!(d.call(8, &[&[1, 1], &other[..]].concat(), 1), [0]);
    assert_eq!(d.config(5, 1), 77, "its address has changed");
}

#[test]
fn streams_keep_to_a_pair_of_queues() {
    let [(mut d, end), _] = two([EVERYTHING; 2]);
    let deliver = |port: u8| end.here.get().unwrap().deliver(&PLAIN, &segment(MACS[0], port, &[port]));
    assert_eq!(d.call(8, &[4, 0, 4, 0], 1), [0]);
    assert_eq!(d.call(8, &[4, 0, 5, 0], 1), [1], "more than there are");
    let mut seen = [0; 4];
    for port in 0..64 {
        let frame = segment(MACS[0], port, &[port]);
        let queue = queue_of(&frame, 4);
        let mut back = frame.clone();
        let (from, to) = (frame[26..30].to_vec(), frame[30..34].to_vec());
        back[26..34].copy_from_slice(&[to, from].concat());
        back[34..38].copy_from_slice(&[frame[36], frame[37], frame[34], frame[35]]);
        assert_eq!(queue_of(&back, 4), queue, "in both directions");
        assert!(deliver(port));
        assert_eq!(d.call(2 * queue, &[], 200)[HEADER..], frame);
        seen[queue] += 1;
    }
    assert!(seen.iter().all(|&n| n > 4), "{seen:?}");
}

#[test]
fn a_guest_that_takes_nothing_holds_little() {
    let [(mut d, end), _] = two([EVERYTHING; 2]);
    let frame = segment(MACS[0], 1, &[0; 1400]);
    let guest = end.here.get().unwrap();
    let taken = (0..10_000).take_while(|_| guest.deliver(&PLAIN, &frame)).count();
    assert!((FULL..FULL + 2 * frame.len()).contains(&(taken * (frame.len() + HEADER))), "{taken}");
    for _ in 0..taken {
        assert_eq!(d.call(0, &[], 2000).len(), HEADER + frame.len());
    }
    assert_eq!(*lock(&end.room), 1, "told once");
    // Without a cable nothing goes in either direction.
    guest.set_up(false);
    assert_eq!((d.config(6, 2), d.read(0x1000, 1) & 2), (0, 2));
    assert!(guest.deliver(&PLAIN, &frame));
    d.offer(0, &[], 2000);
    guest.set_up(true);
    assert!(guest.deliver(&PLAIN, &segment(MACS[0], 1, b"later")));
    assert_eq!(d.wait(0).len(), HEADER + 54 + 5);
    // One that has gone takes everything, and nobody gets it.
    drop(d);
    assert!(guest.deliver(&PLAIN, &frame));
}

#[test]
fn frames_that_make_no_sense_need_a_reset() {
    let frame = segment(MACS[1], 1, b"hello");
    let checksum = Header { checksum: Some((34, 16)), ..PLAIN };
    let segments = Some(Segments { ipv6: false, ecn: false, size: 9, header: 54 });
    let long = with(&Header { segments, ..checksum }, &frame);
    let spoilt = |at: usize, value: u8| {
        let mut bytes = long.clone();
        bytes[at] = value;
        bytes
    };
    for bytes in [
        with(&PLAIN, &frame[..13]),
        PLAIN.bytes().to_vec(),
        vec![0; 5],
        with(&Header { checksum: Some((58, 0)), ..PLAIN }, &frame),
        with(&Header { checksum: Some((0xffff, 0xffff)), ..PLAIN }, &frame),
        spoilt(0, 0),
        spoilt(1, 2),
        spoilt(3, 1),
        spoilt(4, 0),
        // Over IPv6, which was not accepted.
        spoilt(1, 4),
    ] {
        let [(mut one, _), _] = two([EVERYTHING; 2]);
        one.offer(1, &bytes, 0);
        until("the device says that it needs a reset", || one.needs_reset());
        one.start(0);
        // Without control of many pairs its queue is the third.
        assert_eq!(one.call(2, &[0, 0, 1], 1), [0], "{bytes:?}");
    }
}
