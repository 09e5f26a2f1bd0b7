//! Windows: pieces of guest memory whose address changes while the guest runs, or that it sees at none (a PCI BAR that is
//! memory; a ROM that answers commands at times).
//!
//! A window's bytes stay where they are in the block for the guest's life. Only which guest-physical address leads there
//! changes, so whoever still uses what the map said before reaches a byte of the guest's own, and never one of the host's.
//!
//! A vCPU of a software engine keeps what it found of the map in its TLB. It holds a [`Keeper`]: a change kicks it, and it
//! forgets before its next instruction but one. Who made the change, if it was a vCPU, waits for all others, so that no
//! guest can see one after the instruction that made it. Other engines are called with every change.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::{Gpa, Kind, Memory, PAGE_SIZE, Region};

/// Bits beside the address in [`Piece::at`].
const RAM: u64 = 1;
const ROM: u64 = 2;
/// What [`Seen::version`] is while no guest code runs: no change has to wait for it.
const AWAY: u64 = u64::MAX;

/// A window's place in the block, and where the guest sees it.
struct Piece {
    offset: u64,
    size: u64,
    /// Guest-physical address and kind, or 0.
    at: AtomicU64,
}

impl Piece {
    fn region(&self) -> Option<Region> {
        let at = self.at.load(Ordering::SeqCst);
        let kind = match at & (PAGE_SIZE - 1) {
            RAM => Kind::Ram,
            ROM => Kind::Rom,
            _ => return None,
        };
        Some(Region { gpa: at & !(PAGE_SIZE - 1), size: self.size, offset: self.offset, kind })
    }
}

/// What a vCPU knows of the map.
struct Seen {
    version: AtomicU64,
    kick: Box<dyn Fn() + Send + Sync>,
}

type Listener = Box<dyn Fn(&Memory) + Send + Sync>;

#[derive(Default)]
struct Followers {
    vcpus: Vec<Arc<Seen>>,
    listeners: Vec<Listener>,
}

/// All windows, and who wants to know where they are.
pub(crate) struct Windows {
    pieces: Vec<Piece>,
    /// Counts the changes after which something that was kept is wrong.
    version: AtomicU64,
    /// Held while the map changes.
    followers: Mutex<Followers>,
}

impl Windows {
    /// Windows of `sizes` bytes each, one after the other from `offset` on; none is shown.
    pub(crate) fn new(sizes: &[u64], mut offset: u64) -> Self {
        let pieces = sizes.iter().map(|&size| {
            let piece = Piece { offset, size, at: AtomicU64::new(0) };
            offset += size;
            piece
        });
        Self { pieces: pieces.collect(), version: AtomicU64::new(0), followers: Mutex::default() }
    }

    /// The window that the guest sees at `gpa`.
    #[inline]
    pub(crate) fn find(&self, gpa: Gpa) -> Option<Region> {
        self.pieces.iter().filter_map(Piece::region).find(|r| gpa >= r.gpa && gpa - r.gpa < r.size)
    }

    /// All windows, in the order in which they were asked for: where they are now.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Option<Region>> + '_ {
        self.pieces.iter().map(Piece::region)
    }

    fn followers(&self) -> MutexGuard<'_, Followers> {
        self.followers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Has vCPUs forget what they have kept of the map.
    fn outdate(&self, followers: &Followers) {
        self.version.fetch_add(1, Ordering::SeqCst);
        followers.vcpus.iter().for_each(|seen| (seen.kick)());
    }

    /// Changes another part of the map, one change at a time. Listeners are not told.
    pub(crate) fn change<R>(&self, change: impl FnOnce() -> R) -> R {
        let _one = self.followers();
        change()
    }

    /// As [`Windows::change`], after which what vCPUs have kept of the map may be wrong: they are kicked, not waited for.
    pub(crate) fn take_away<R>(&self, change: impl FnOnce() -> R) -> R {
        let followers = self.followers();
        let result = change();
        self.outdate(&followers);
        result
    }

    pub(crate) fn listen(&self, memory: &Memory, listener: Listener) {
        let mut followers = self.followers();
        listener(memory);
        followers.listeners.push(listener);
    }
}

/// A window. Clones are the same one.
#[derive(Clone)]
pub struct Window {
    memory: Memory,
    index: usize,
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("at", &self.piece().region()).finish_non_exhaustive()
    }
}

impl Window {
    pub(crate) fn new(memory: &Memory, index: usize) -> Self {
        Self { memory: memory.clone(), index }
    }

    fn piece(&self) -> &Piece {
        &self.memory.windows().pieces[self.index]
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.piece().size
    }

    /// Lets the guest see the window as memory at this address (a multiple of the page size) alone, or nowhere. Tells
    /// whether it does: not where other memory is, or the address space ends.
    ///
    /// vCPUs that run learn of it as the module's page says.
    pub fn show(&self, to: Option<(Gpa, Kind)>) -> bool {
        let (piece, windows) = (self.piece(), self.memory.windows());
        let followers = windows.followers();
        let to = to.filter(|&(gpa, _)| self.has_room(gpa));
        let at = to.map_or(0, |(gpa, kind)| gpa | if kind == Kind::Ram { RAM } else { ROM });
        let before = piece.at.swap(at, Ordering::SeqCst);
        if before != at {
            if before != 0 {
                windows.outdate(&followers);
            }
            followers.listeners.iter().for_each(|listener| listener(&self.memory));
        }
        at != 0
    }

    fn has_room(&self, gpa: Gpa) -> bool {
        let Some(end) = gpa.checked_add(self.size()).filter(|&end| end <= 1 << 52) else { return false };
        let others = self.memory.windows().pieces.iter().enumerate();
        let others = others.filter(|(index, _)| *index != self.index).filter_map(|(_, piece)| piece.region());
        let pluggable = self.memory.plugs().whole();
        let mut taken = self.memory.regions().iter().copied().chain(others).chain(pluggable);
        self.size() > 0
            && gpa.is_multiple_of(PAGE_SIZE)
            && !taken.any(|r| r.gpa < end && gpa < r.gpa + r.size)
    }

    /// How many of `len` bytes at `at` there are.
    fn clip(&self, at: u64, len: usize) -> usize {
        (len as u64).min(self.size().saturating_sub(at)) as usize
    }

    /// Copies bytes out, from `at` in the window on; zeroes beyond its end.
    pub fn read(&self, at: u64, to: &mut [u8]) {
        let (known, rest) = to.split_at_mut(self.clip(at, to.len()));
        self.memory.read(self.piece().offset.saturating_add(at), known);
        rest.fill(0);
    }

    /// Copies bytes in, as far as there is room for them.
    pub fn write(&self, at: u64, from: &[u8]) {
        self.memory.write(self.piece().offset.saturating_add(at), &from[..self.clip(at, from.len())]);
    }

    /// Sets the first `len` bytes to 0.
    pub fn clear(&self, len: u64) {
        self.memory.clear(self.piece().offset, len.min(self.size()));
    }
}

/// A vCPU's hold on the map of memory, whose kept translations are right while [`Keeper::is_current`] says so.
pub struct Keeper {
    memory: Memory,
    seen: Arc<Seen>,
    version: u64,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Keeper {
    pub(crate) fn new(memory: &Memory, kick: Box<dyn Fn() + Send + Sync>) -> Self {
        let seen = Arc::new(Seen { version: AtomicU64::new(AWAY), kick });
        let mut followers = memory.windows().followers();
        followers.vcpus.push(seen.clone());
        let version = memory.windows().version.load(Ordering::SeqCst);
        Self { memory: memory.clone(), seen, version }
    }

    /// Whether nothing has changed since [`Keeper::enter`].
    #[inline]
    pub fn is_current(&self) -> bool {
        self.memory.windows().version.load(Ordering::Acquire) == self.version
    }

    /// Guest code is about to run. True if what was kept of the map has to be forgotten first.
    #[must_use]
    pub fn enter(&mut self) -> bool {
        let windows = self.memory.windows();
        let before = self.version;
        loop {
            self.version = windows.version.load(Ordering::SeqCst);
            self.seen.version.store(self.version, Ordering::SeqCst);
            // Who changes it now sees that this vCPU is here, or is seen.
            if windows.version.load(Ordering::SeqCst) == self.version {
                return self.version != before;
            }
        }
    }

    /// No guest code runs until [`Keeper::enter`].
    pub fn leave(&self) {
        self.seen.version.store(AWAY, Ordering::SeqCst);
    }

    /// Waits until no other vCPU uses what this one has changed, between two instructions. As [`Keeper::enter`] then.
    #[must_use]
    pub fn wait(&mut self) -> bool {
        // Two that wait for each other must not.
        self.leave();
        let version = self.memory.windows().version.load(Ordering::SeqCst);
        let others: Vec<_> = self.memory.windows().followers().vcpus.clone();
        for other in others {
            let mut tries = 0u32;
            while other.version.load(Ordering::SeqCst) < version {
                tries += 1;
                if tries < 100 {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
        }
        self.enter()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.leave();
        self.memory.windows().followers().vcpus.retain(|seen| !Arc::ptr_eq(seen, &self.seen));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_window_is_where_it_was_put_last() {
        let (memory, [a, b]) = Memory::with_windows(4 << 20, 0x1_0000, [0x4000, 0x2000]).unwrap();
        assert_eq!(
            (memory.ram_size(), memory.regions().len()),
            (4 << 20, 3),
            "none of it is the guest's RAM"
        );
        a.write(0x3ffe, &[1, 2, 3, 4]);
        assert!(memory.region(0xd000_3fff).is_none());
        assert!(a.show(Some((0xd000_0000, Kind::Ram))));
        let offset = memory.offset(0xd000_3ffe).unwrap();
        assert_eq!((memory.load::<u16>(offset), memory.region(0xd000_4000)), (0x201, None), "and no more");
        memory.store(offset, 0x605u16);
        // Not where something is already, or nothing can be.
        for gpa in [0xd000_2000, 0xcfff_f000, 0x10_0000, 0xffff_f000, !0xfff, 0xe000_0800] {
            assert!(!b.show(Some((gpa, Kind::Rom))), "{gpa:x}");
            assert_eq!(memory.slots().flatten().count(), 4);
        }
        assert!(b.show(Some((0xd000_4000, Kind::Rom))));
        assert_eq!(memory.region(0xd000_5fff).unwrap().kind, Kind::Rom);
        assert!(a.show(Some((0xc000_0000, Kind::Ram))));
        assert_eq!((memory.offset(0xc000_3ffe), memory.offset(0xd000_3ffe)), (Some(offset), None));
        let mut bytes = [9; 4];
        a.read(0x3ffe, &mut bytes);
        assert_eq!(bytes, [5, 6, 0, 0]);
        a.clear(0x3fff);
        a.read(0x3ffe, &mut bytes);
        assert_eq!(bytes, [0, 6, 0, 0]);
        assert!(!a.show(None) && memory.offset(0xc000_3ffe).is_none());
    }

    #[test]
    fn stores_to_a_window_invalidate_code() {
        let (memory, [window]) = Memory::with_windows(1 << 20, 0, [0x4000]).unwrap();
        window.show(Some((0xd000_0000, Kind::Ram)));
        let offset = memory.offset(0xd000_1000).unwrap();
        for change in [|w: &Window| w.write(0x0ff0, &[0; 64]), |w: &Window| w.clear(0x4000)] {
            let before = memory.code().generation(offset);
            memory.code().mark(offset, 16);
            change(&window);
            assert_ne!(memory.code().generation(offset), before);
        }
    }

    /// Who has waited knows that nobody is where the window was.
    #[test]
    fn nobody_uses_what_a_change_made_wrong() {
        let (memory, [window]) = Memory::with_windows(1 << 20, 0, [0x1000]).unwrap();
        let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        // Where the other one believes the window to be; 0 between two looks.
        let used = AtomicU64::new(0);
        window.show(Some((0x1000_0000, Kind::Ram)));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut keeper = memory.keeper(|| {});
                while !stop.load(Ordering::SeqCst) {
                    let _ = keeper.enter();
                    let here = memory.windows().regions().flatten().next().map_or(0, |r| r.gpa);
                    for _ in 0..20 {
                        used.store(here, Ordering::SeqCst);
                    }
                    used.store(0, Ordering::SeqCst);
                    rounds.fetch_add(1, Ordering::SeqCst);
                    if rounds.load(Ordering::SeqCst) % 3 == 0 {
                        keeper.leave();
                    }
                }
            });
            let mut keeper = memory.keeper(|| {});
            let mut n = 0;
            while n < 2000 || rounds.load(Ordering::SeqCst) < 100 {
                let _ = keeper.enter();
                n += 1;
                let to = 0x1000_0000 + n * 0x1000;
                window.show(Some((to, Kind::Ram)));
                assert!(!keeper.is_current());
                assert!(keeper.wait() && keeper.is_current());
                let used = used.load(Ordering::SeqCst);
                assert!(used == 0 || used == to, "{used:x} after it went to {to:x}");
            }
            stop.store(true, Ordering::SeqCst);
        });
    }
}
