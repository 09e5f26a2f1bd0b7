//! Breakpoints and watchpoints: the guest's in DR0–DR7, and the debugger's.

use x86::control::cr4;
use x86::exception::vector;

use crate::core::Core;

impl Core {
    fn guest_watch(&self, n: usize) -> Option<(u64, u64, u64)> {
        let enabled = self.s.dr7 >> (2 * n) & 3 != 0;
        let kind = self.s.dr7 >> (16 + 4 * n) & 3;
        let len = [1, 2, 8, 4][(self.s.dr7 >> (18 + 4 * n) & 3) as usize];
        (enabled && kind & 1 != 0).then(|| (self.s.dr[n] & !(len - 1), len, kind))
    }

    /// Whether the page of `linear` holds a watched address, and so must not be in the TLB.
    pub fn page_watched(&self, linear: u64) -> bool {
        let page = linear & !0xfff;
        let touches =
            |at: u64, len: u64| at >> 12 == page >> 12 || at.wrapping_add(len - 1) >> 12 == page >> 12;
        (0..4).filter_map(|n| self.guest_watch(n)).any(|(at, len, _)| touches(at, len))
            || self.debug.watchpoints.iter().any(|&(at, len, _)| {
                at.wrapping_add(len.max(1) - 1) >> 12 >= page >> 12 && at >> 12 <= page >> 12
            })
    }

    /// Notes the watchpoints that an access meets.
    pub fn check_watch(&mut self, linear: u64, size: u64, write: bool) {
        let meets = |at: u64, len: u64| linear < at.saturating_add(len) && at < linear.saturating_add(size);
        for n in 0..4 {
            // Kind 1 is writes, 3 reads and writes.
            if let Some((at, len, kind)) = self.guest_watch(n)
                && meets(at, len)
                && (write || kind == 3)
            {
                self.pending_db |= 1 << n;
            }
        }
        let hit = self.debug.watchpoints.iter().find(|&&(at, len, reads)| meets(at, len) && (write || reads));
        if let Some(&(at, _, _)) = hit {
            self.watch_hit = Some(at);
        }
    }

    /// Notes the breakpoints on I/O that an access to ports meets.
    pub fn check_port_watch(&mut self, port: u16, size: u8) {
        if self.s.cr4 & cr4::DE == 0 {
            return;
        }
        let (first, last) = (u64::from(port), u64::from(port) + u64::from(size) - 1);
        for n in 0..4 {
            let enabled = self.s.dr7 >> (2 * n) & 3 != 0 && self.s.dr7 >> (16 + 4 * n) & 3 == 2;
            let len = [1, 2, 8, 4][(self.s.dr7 >> (18 + 4 * n) & 3) as usize];
            let at = self.s.dr[n] & !(len - 1);
            if enabled && first < at.saturating_add(len) && at <= last {
                self.pending_db |= 1 << n;
            }
        }
    }

    /// The DR6 bits of execution breakpoints at `linear`.
    pub fn breakpoints_at(&self, linear: u64) -> u64 {
        (0..4)
            .filter(|&n| {
                let enabled = self.s.dr7 >> (2 * n) & 3 != 0;
                enabled && self.s.dr7 >> (16 + 4 * n) & 3 == 0 && self.s.dr[n] == linear
            })
            .fold(0, |bits, n| bits | 1 << n)
    }

    /// A #DB with these DR6 bits.
    pub fn debug_exception(&self, bits: u64) -> x86::Exception {
        x86::Exception { address: bits, ..x86::Exception::new(vector::DB) }
    }
}
