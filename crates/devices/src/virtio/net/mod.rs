//! A network device (virtio 1.2, section 5.1): checksums and long TCP segments are left to whoever is at the other end of its
//! [`Link`], where that can; queues in pairs, and one for control.

mod filter;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net as b;

use super::{Broken, Device, In, Out, Wires};
use crate::dma::le16;
use crate::lock;
pub use crate::net::{ETHERNET, Guest, HEADER, Header, LONGEST_FRAME, Link, Mac, Offloads, Segments};
use crate::net::{Receiver, queue_of};
use filter::Filter;

const QUEUE: u16 = 256;
/// Pairs of queues at most.
pub const MOST_PAIRS: u32 = 8;
/// Bytes of frames that wait for the guest in each pair at most, and a frame more.
const FULL: usize = 1 << 20;
/// Bytes of a control command at most.
const LONGEST_COMMAND: usize = 4096;

/// What a device is to be.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Its address.
    pub mac: Mac,
    /// Bytes of the longest packet, without Ethernet's header: 68 to 65535.
    pub mtu: u16,
    /// Pairs of queues, 1 to [`MOST_PAIRS`].
    pub pairs: u32,
}

/// The device.
pub struct Net {
    options: Options,
    queues: Vec<u16>,
    link: Arc<dyn Link>,
    shared: Arc<Shared>,
    /// What is being sent, by queue.
    frames: Vec<Mutex<Vec<u8>>>,
}

struct Shared {
    wires: OnceLock<Wires>,
    state: Mutex<State>,
}

struct State {
    features: u64,
    up: bool,
    filter: Filter,
    /// Pairs that the driver uses.
    pairs: usize,
    waiting: Vec<Waiting>,
}

/// Frames, headers before them, that wait for the guest.
#[derive(Default)]
struct Waiting {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    /// One was refused.
    refused: bool,
}

impl State {
    fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// Takes from the header what the driver does not do itself. None if that cannot be.
    fn adapt(&self, mut header: Header, frame: &mut [u8]) -> Option<Header> {
        let kind = header
            .segments
            .map(|s| if s.ipv6 { b::VIRTIO_NET_F_GUEST_TSO6 } else { b::VIRTIO_NET_F_GUEST_TSO4 });
        if kind.is_some_and(|kind| !self.has(kind)) {
            return None;
        }
        if !self.has(b::VIRTIO_NET_F_GUEST_CSUM) {
            header.finish_checksum(frame);
            header.valid = false;
        }
        Some(header)
    }
}

impl Receiver for Shared {
    fn set_up(&self, up: bool) {
        lock(&self.state).up = up;
        self.wires.get().into_iter().for_each(Wires::config_changed);
    }

    fn offloads(&self) -> Offloads {
        let state = lock(&self.state);
        Offloads {
            checksum: state.has(b::VIRTIO_NET_F_GUEST_CSUM),
            tso4: state.has(b::VIRTIO_NET_F_GUEST_TSO4),
            tso6: state.has(b::VIRTIO_NET_F_GUEST_TSO6),
        }
    }

    fn deliver(&self, header: Header, frame: &[u8]) -> bool {
        let mut state = lock(&self.state);
        let to = frame.first_chunk::<6>().copied().unwrap_or_default();
        let fits = (ETHERNET..=LONGEST_FRAME).contains(&frame.len());
        if !fits || !state.up || state.features == 0 || !state.filter.wants(to) {
            return true;
        }
        let pair = queue_of(frame, state.pairs);
        if state.waiting[pair].bytes >= FULL {
            state.waiting[pair].refused = true;
            return false;
        }
        let mut whole = [&[0; HEADER], frame].concat();
        let Some(header) = state.adapt(header, &mut whole[HEADER..]) else { return true };
        whole[..HEADER].copy_from_slice(&header.bytes());
        state.waiting[pair].bytes += whole.len();
        state.waiting[pair].frames.push_back(whole);
        drop(state);
        self.wires.get().into_iter().for_each(|wires| wires.kick(2 * pair));
        true
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Net {
    /// A device at `link`.
    pub fn new(options: Options, link: Arc<dyn Link>) -> Self {
        let pairs = options.pairs.clamp(1, MOST_PAIRS);
        let options = Options { pairs, mtu: options.mtu.max(68), ..options };
        let queues = vec![QUEUE; 2 * pairs as usize + 1];
        let state = State {
            features: 0,
            up: true,
            filter: Filter::new(options.mac),
            pairs: 1,
            waiting: (0..pairs).map(|_| Waiting::default()).collect(),
        };
        let shared = Arc::new(Shared { wires: OnceLock::new(), state: Mutex::new(state) });
        let receiver: Weak<dyn Receiver> = Arc::<Shared>::downgrade(&shared);
        link.connect(Guest::new(receiver));
        let frames = queues.iter().map(|_| Mutex::default()).collect();
        Self { options, queues, link, shared, frames }
    }

    /// The control queue: behind all pairs, or behind the first for a driver that knows of no more.
    fn is_control(&self, queue: usize) -> bool {
        let many = lock(&self.shared.state).has(b::VIRTIO_NET_F_MQ);
        queue == if many { 2 * self.options.pairs as usize } else { 2 }
    }

    /// Gives the guest a frame.
    fn receive(&self, pair: usize, answer: &mut Out<'_>) -> Result<(), Broken> {
        let mut state = lock(&self.shared.state);
        let waiting = state.waiting.get_mut(pair).ok_or(Broken)?;
        let Some(frame) = waiting.frames.pop_front() else { return Ok(()) };
        waiting.bytes -= frame.len();
        let room = waiting.refused && waiting.bytes < FULL / 2;
        waiting.refused &= !room;
        drop(state);
        if room {
            self.link.room();
        }
        // What does not fit is lost: buffers are to hold the longest frame.
        if frame.len() <= answer.available_bytes() {
            answer.write_all(&frame).map_err(|_| Broken)?;
        }
        Ok(())
    }

    /// Sends a frame of the guest's.
    fn send(&self, queue: usize, request: &mut In<'_>) -> Result<(), Broken> {
        let mut header = [0; HEADER];
        request.read_exact(&mut header).map_err(|_| Broken)?;
        let len = request.available_bytes();
        if !(ETHERNET..=LONGEST_FRAME).contains(&len) {
            return Err(Broken);
        }
        let header = Header::parse(&header, len).ok_or(Broken)?;
        let mut frame = lock(self.frames.get(queue).ok_or(Broken)?);
        frame.resize(len, 0);
        request.read_exact(&mut frame).map_err(|_| Broken)?;
        let up = {
            let state = lock(&self.shared.state);
            let long = header
                .segments
                .map(|s| if s.ipv6 { b::VIRTIO_NET_F_HOST_TSO6 } else { b::VIRTIO_NET_F_HOST_TSO4 });
            let needed = [header.checksum.map(|_| b::VIRTIO_NET_F_CSUM), long];
            if needed.into_iter().flatten().any(|bit| !state.has(bit)) {
                return Err(Broken);
            }
            state.up
        };
        if up {
            self.link.send(&header, &frame);
        }
        Ok(())
    }

    /// Does a command: whether it could be done.
    fn control(&self, request: &mut In<'_>) -> Result<bool, Broken> {
        if request.available_bytes() > LONGEST_COMMAND {
            return Ok(false);
        }
        let mut command = Vec::new();
        request.read_to_end(&mut command).map_err(|_| Broken)?;
        let [class, command, data @ ..] = &command[..] else { return Err(Broken) };
        let mut state = lock(&self.shared.state);
        let done = match u32::from(*class) {
            b::VIRTIO_NET_CTRL_RX => state.filter.set_mode(*command, data),
            b::VIRTIO_NET_CTRL_MAC => state.filter.set_macs(*command, data),
            b::VIRTIO_NET_CTRL_MQ if u32::from(*command) == b::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => {
                let pairs = (data.len() == 2).then(|| le16(data, 0).into());
                let pairs = pairs.filter(|pairs| (1..=self.options.pairs).contains(pairs));
                pairs.map(|pairs| state.pairs = pairs as usize)
            }
            _ => None,
        };
        Ok(done.is_some())
    }
}

impl Device for Net {
    fn kind(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn class(&self) -> u32 {
        // An Ethernet controller.
        0x02_0000
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            b::VIRTIO_NET_F_MAC,
            b::VIRTIO_NET_F_MTU,
            b::VIRTIO_NET_F_STATUS,
            b::VIRTIO_NET_F_CTRL_VQ,
            b::VIRTIO_NET_F_CTRL_RX,
            b::VIRTIO_NET_F_CTRL_RX_EXTRA,
            b::VIRTIO_NET_F_CTRL_MAC_ADDR,
        ];
        if self.options.pairs > 1 {
            bits.push(b::VIRTIO_NET_F_MQ);
        }
        if self.link.offloads() {
            bits.extend([b::VIRTIO_NET_F_CSUM, b::VIRTIO_NET_F_HOST_TSO4, b::VIRTIO_NET_F_HOST_TSO6]);
            bits.extend([b::VIRTIO_NET_F_GUEST_CSUM]);
            bits.extend([b::VIRTIO_NET_F_GUEST_TSO4, b::VIRTIO_NET_F_GUEST_TSO6]);
        }
        bits.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn config(&self) -> Vec<u8> {
        let state = lock(&self.shared.state);
        let status = if state.up { b::VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let words = [status, self.options.pairs as u16, self.options.mtu].map(u16::to_le_bytes);
        [&state.filter.mac[..], words.as_flattened()].concat()
    }

    fn connect(&self, wires: Wires) {
        // Called once.
        let _ = self.shared.wires.set(wires);
    }

    fn set_features(&self, features: u64) {
        lock(&self.shared.state).features = features;
    }

    fn reset(&self) {
        let mut state = lock(&self.shared.state);
        state.features = 0;
        state.filter = Filter::new(self.options.mac);
        state.pairs = 1;
        let room = state.waiting.iter().any(|waiting| waiting.refused);
        state.waiting.fill_with(Waiting::default);
        drop(state);
        // Whoever waits for this driver would wait for ever.
        if room {
            self.link.room();
        }
    }

    fn ready(&self, queue: usize) -> bool {
        if self.is_control(queue) || queue % 2 == 1 {
            return true;
        }
        lock(&self.shared.state).waiting.get(queue / 2).is_some_and(|waiting| !waiting.frames.is_empty())
    }

    fn serve(&self, queue: usize, mut request: In<'_>, mut answer: Out<'_>) -> Result<usize, Broken> {
        if self.is_control(queue) {
            let done = self.control(&mut request)?;
            let status = if done { b::VIRTIO_NET_OK } else { b::VIRTIO_NET_ERR };
            answer.write_all(&[status as u8]).map_err(|_| Broken)?;
        } else if queue % 2 == 1 {
            self.send(queue, &mut request)?;
        } else {
            self.receive(queue / 2, &mut answer)?;
        }
        Ok(answer.bytes_written())
    }
}
