//! Task state segments of legacy mode, 32-bit and 16-bit (SDM 3A, 8.2.1 and 8.6).

use crate::{
    cpu,
    paging::frame,
    segments::{self, CODE32, DATA, set_system},
};

/// A TSS in a test frame. Its fields are counted in words of its own size, in the order in which the manual has them.
#[derive(Clone, Copy)]
pub struct Task {
    /// Its selector.
    pub selector: u16,
    /// Its linear address.
    pub address: u64,
    /// Whether it is a 32-bit one.
    wide: bool,
}

/// The back link, in both kinds.
pub const LINK: usize = 0;

/// Fields of a 32-bit TSS.
#[allow(missing_docs)]
pub mod wide {
    pub const ESP0: usize = 1;
    pub const SS0: usize = 2;
    pub const CR3: usize = 7;
    pub const EIP: usize = 8;
    pub const EFLAGS: usize = 9;
    pub const EBX: usize = 13;
    pub const ESP: usize = 14;
    pub const ESI: usize = 16;
    pub const ES: usize = 18;
    pub const CS: usize = 19;
    pub const SS: usize = 20;
    pub const DS: usize = 21;
    pub const FS: usize = 22;
    pub const GS: usize = 23;
    /// The offset of the I/O bitmap in its upper half, the T bit in its lowest bit.
    pub const IO: usize = 25;
}

/// Fields of a 16-bit TSS.
#[allow(missing_docs)]
pub mod narrow {
    pub const IP: usize = 7;
    pub const FLAGS: usize = 8;
    pub const BX: usize = 12;
    pub const SP: usize = 13;
    pub const SI: usize = 15;
    pub const ES: usize = 17;
    pub const CS: usize = 18;
    pub const SS: usize = 19;
    pub const DS: usize = 20;
}

impl Task {
    /// A fresh 32-bit task in test frame `n`: flat segments, interrupts off, no I/O bitmap, the stack in test frame
    /// `stack`; it begins at `code`.
    pub fn wide(selector: u16, n: usize, stack: usize, code: u64) -> Self {
        let task = Task { selector, address: frame(n), wide: true };
        task.clear();
        task.describe(103, 0x89);
        for n in wide::ES..wide::ES + 6 {
            task.set(n, DATA.into());
        }
        for (n, value) in [
            (wide::CS, CODE32.into()),
            (wide::EIP, code as u32),
            (wide::EFLAGS, 2),
            (wide::ESP, frame(stack) as u32 + 4096),
            (wide::ESP0, frame(stack) as u32 + 4096),
            (wide::SS0, DATA.into()),
            (wide::CR3, cpu::cr3() as u32),
            (wide::IO, 104 << 16),
        ] {
            task.set(n, value);
        }
        task
    }

    /// A fresh 16-bit task in test frame `n`, whose code and stack segments are `cs` and `ss`; it begins at offset 0.
    pub fn narrow(selector: u16, n: usize, cs: u16, ss: u16) -> Self {
        let task = Task { selector, address: frame(n), wide: false };
        task.clear();
        task.describe(43, 0x81);
        for (n, value) in [
            (narrow::FLAGS, 2),
            (narrow::SP, 0x800),
            (narrow::ES, DATA),
            (narrow::CS, cs),
            (narrow::SS, ss),
            (narrow::DS, DATA),
        ] {
            task.set(n, value.into());
        }
        task
    }

    fn clear(&self) {
        // SAFETY: a test frame.
        unsafe { (self.address as *mut u8).write_bytes(0, 4096) };
    }

    /// Sets its descriptor's limit and access byte.
    pub fn describe(&self, limit: u32, access: u8) {
        set_system(0, self.selector, self.address, limit, access);
    }

    /// A field.
    pub fn get(&self, n: usize) -> u32 {
        // SAFETY: a test frame.
        unsafe {
            if self.wide {
                (self.address as *const u32).add(n).read_volatile()
            } else {
                (self.address as *const u16).add(n).read_volatile().into()
            }
        }
    }

    /// Sets a field.
    pub fn set(&self, n: usize, value: u32) {
        // SAFETY: a test frame.
        unsafe {
            if self.wide {
                (self.address as *mut u32).add(n).write_volatile(value)
            } else {
                (self.address as *mut u16).add(n).write_volatile(value as u16)
            }
        }
    }

    /// Its descriptor's type: 1 or 9 available, 3 or 0xb busy.
    pub fn kind(&self) -> u64 {
        segments::gdt(self.selector) >> 40 & 15
    }

    /// A task gate to it that any privilege level may use.
    pub fn gate(&self) -> u64 {
        segments::gate(0, self.selector, 0, 0xe5)
    }
}
