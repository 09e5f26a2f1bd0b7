//! Packed rings (virtio 1.2, section 2.8): one ring of descriptors, which the driver makes available and the device overwrites
//! with what it has used. Two bits of each tell, by how often the ring has been gone around, whose it is.

use std::sync::atomic::{Ordering, fence};

use memory::Memory;
use virtio_bindings::virtio_ring as b;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::Broken;
use super::request::Request;
use crate::dma::{fetch, le16, le32, le64, publish, store};

/// Bytes of a descriptor: address (8), length (4), buffer's id (2), flags (2).
const DESCRIPTOR: u64 = 16;
const FLAGS: u64 = 14;
const NEXT: u16 = b::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = b::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = b::VRING_DESC_F_INDIRECT as u16;
const AVAILABLE: u16 = 1 << b::VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << b::VRING_PACKED_DESC_F_USED;
/// Where wrap counters are beside an index.
const WRAP: u16 = 1 << b::VRING_PACKED_EVENT_F_WRAP_CTR;

/// A place in the ring.
#[derive(Clone, Copy, Debug)]
struct Place {
    index: u16,
    /// The wrap counter, which begins as 1.
    wrap: bool,
}

impl Place {
    fn new(bits: u16) -> Self {
        Self { index: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    fn bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// Goes on by `n` places of `size`. Tells whether that went past the end.
    fn advance(&mut self, n: u16, size: u16) -> bool {
        let index = u32::from(self.index) + u32::from(n);
        let around = index >= u32::from(size);
        self.index = if around { (index - u32::from(size)) as u16 } else { index as u16 };
        self.wrap ^= around;
        around
    }
}

/// A packed ring.
#[derive(Debug)]
pub struct Packed {
    size: u16,
    /// The descriptors, and the event suppression structures of the driver and of the device.
    rings: [u64; 3],
    event_idx: bool,
    available: Place,
    used: Place,
    /// Places of the requests that were taken and not given back.
    taken: u32,
    /// Places that have been given back since the driver was asked whether it wants to hear of them.
    given: u16,
    listening: bool,
}

struct Descriptor {
    address: u64,
    len: u32,
    id: u16,
    flags: u16,
}

impl Packed {
    /// Where a new ring begins: see [`Packed::next`].
    pub const START: [u16; 2] = [WRAP; 2];

    /// A ring that goes on at `next`. None where that cannot be.
    pub fn new(size: u16, rings: [u64; 3], next: [u16; 2], memory: &Memory, event_idx: bool) -> Option<Self> {
        let parts = [(rings[0], u64::from(size) * DESCRIPTOR, 16), (rings[1], 4, 4), (rings[2], 4, 4)];
        let sound = |&(at, len, align): &(u64, u64, u64)| {
            let inside = memory.guest().check_range(GuestAddress(at), len as usize, Permissions::ReadWrite);
            inside && at.is_multiple_of(align)
        };
        let [available, used] = next.map(Place::new);
        let fits = available.index < size && used.index < size && size <= WRAP;
        (fits && parts.iter().all(sound)).then_some(Self {
            size,
            rings,
            event_idx,
            available,
            used,
            taken: 0,
            given: 0,
            listening: true,
        })
    }

    /// Where the device looks for requests and where it puts them back: indices with the wrap counters in bit 15.
    pub fn next(&self) -> [u16; 2] {
        [self.available.bits(), self.used.bits()]
    }

    fn at(&self, index: u16) -> u64 {
        self.rings[0] + u64::from(index) * DESCRIPTOR
    }

    /// See [`super::ring::Ring::is_waiting`].
    pub fn is_waiting(&self, memory: &Memory) -> Result<bool, Broken> {
        let at = GuestAddress(self.at(self.available.index) + FLAGS);
        let flags: u16 = memory.guest().load(at, Ordering::Acquire).map_err(|_| Broken)?;
        let (available, used) = (flags & AVAILABLE != 0, flags & USED != 0);
        Ok(available == self.available.wrap && used != self.available.wrap)
    }

    /// See [`super::ring::Ring::take`].
    pub fn take(&mut self, memory: &Memory) -> Result<Option<Request>, Broken> {
        if !self.is_waiting(memory)? {
            return Ok(None);
        }
        let (mut request, mut place) = (Request::default(), self.available);
        for places in 1..=self.size {
            let descriptor = descriptor(memory, self.at(place.index))?;
            place.advance(1, self.size);
            let more = descriptor.flags & NEXT != 0;
            if descriptor.flags & INDIRECT == 0 {
                let write = descriptor.flags & WRITE != 0;
                request.push(memory, descriptor.address, descriptor.len, write)?;
            } else if places == 1 && !more {
                indirect(memory, &descriptor, &mut request)?;
            } else {
                return Err(Broken);
            }
            if !more {
                self.taken += u32::from(places);
                if self.taken > self.size.into() {
                    return Err(Broken);
                }
                self.available = place;
                (request.id, request.places) = (descriptor.id, places);
                return Ok(Some(request));
            }
        }
        Err(Broken)
    }

    /// See [`super::ring::Ring::listen`].
    pub fn listen(&mut self, memory: &Memory, on: bool) -> Result<(), Broken> {
        let [place, how] = match on {
            true if self.event_idx => [self.available.bits(), b::VRING_PACKED_EVENT_FLAG_DESC as u16],
            true => [0, b::VRING_PACKED_EVENT_FLAG_ENABLE as u16],
            false if !self.listening => return Ok(()),
            false => [0, b::VRING_PACKED_EVENT_FLAG_DISABLE as u16],
        };
        self.listening = on;
        publish(memory, self.rings[2], u32::from(how) << 16 | u32::from(place)).map_err(|_| Broken)
    }

    /// See [`super::ring::Ring::give`].
    pub fn give(&mut self, memory: &Memory, request: &Request, written: u32) -> Result<(), Broken> {
        let at = self.at(self.used.index);
        store(memory, at + 8, &written.to_le_bytes()).map_err(|_| Broken)?;
        let flags = if written > 0 { WRITE } else { 0 } | if self.used.wrap { AVAILABLE | USED } else { 0 };
        // The id with the flags, whole: they make the rest the driver's.
        publish(memory, at + 12, u32::from(flags) << 16 | u32::from(request.id)).map_err(|_| Broken)?;
        self.used.advance(request.places, self.size);
        self.taken -= u32::from(request.places);
        self.given = self.given.saturating_add(request.places);
        Ok(())
    }

    /// See [`super::ring::Ring::is_awaited`].
    pub fn is_awaited(&mut self, memory: &Memory) -> Result<bool, Broken> {
        fence(Ordering::SeqCst);
        let event =
            memory.guest().load(GuestAddress(self.rings[1]), Ordering::Acquire).map_err(|_| Broken)?;
        let event = u32::from_le(event);
        let given = std::mem::take(&mut self.given);
        let awaited = match event >> 16 & 3 {
            b::VRING_PACKED_EVENT_FLAG_DISABLE => false,
            b::VRING_PACKED_EVENT_FLAG_DESC if self.event_idx => {
                // How many places ago the one was used that the driver waits for.
                let place = Place::new(event as u16);
                let around = if place.wrap == self.used.wrap { 0 } else { i32::from(self.size) };
                let since = i32::from(self.used.index) + around - i32::from(place.index);
                (1..=i32::from(given)).contains(&since)
            }
            _ => true,
        };
        Ok(awaited)
    }
}

fn descriptor(memory: &Memory, at: u64) -> Result<Descriptor, Broken> {
    let d: [u8; DESCRIPTOR as usize] = fetch(memory, at).map_err(|_| Broken)?;
    Ok(Descriptor {
        address: le64(&d, 0),
        len: le32(&d, 8),
        id: le16(&d, 12),
        flags: le16(&d, FLAGS as usize),
    })
}

/// A request whose descriptors lie in a table of their own (2.8.7).
fn indirect(memory: &Memory, table: &Descriptor, request: &mut Request) -> Result<(), Broken> {
    let entries = u64::from(table.len) / DESCRIPTOR;
    if !u64::from(table.len).is_multiple_of(DESCRIPTOR) || !(1..=u64::from(u16::MAX)).contains(&entries) {
        return Err(Broken);
    }
    for n in 0..entries {
        let at = table.address.checked_add(n * DESCRIPTOR).ok_or(Broken)?;
        let descriptor = descriptor(memory, at)?;
        request.push(memory, descriptor.address, descriptor.len, descriptor.flags & WRITE != 0)?;
    }
    Ok(())
}
