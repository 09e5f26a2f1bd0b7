//! Faults of the host's processor in translated code, and how a bug of ours is told.

use std::fmt::Write;

use iced_x86::{Decoder, Instruction, OpAccess, Register};
use interpret::flags::Lazy;
use interpret::op::slot;

use super::{Cpu, Next, Stop};
use crate::frame::at;
use crate::seats::number;
use crate::strings;

/// Bytes of code that a report has at most.
const CODE: usize = 512;

impl Cpu {
    /// A fault of the host's processor.
    pub(super) fn fault(&mut self) -> Result<Next, Stop> {
        self.count.faults += 1;
        let pc = self.frame.get(at::FAULT_PC);
        let address = self.frame.get(at::FAULT_ADDRESS);
        let signal = self.frame.get(at::FAULT_SIGNAL) as i32;
        let Some((mark, host)) = self.cache.mark(pc) else {
            let offset = pc.wrapping_sub(self.cache.range().0);
            return Err(Stop::Bug(format!(
                "signal {signal} for {address:#x} at {offset:#x} of its code, in no block"
            )));
        };
        self.set_rip(mark.guest);
        if let Some(trace) = &self.cache.trace {
            let rip = self.vcpu.core().rip;
            trace.say(&format!("signal {signal} at {pc:#x} for {address:#x}: the instruction at {rip:#x}"));
        }
        if mark.flags_in_host {
            let bits = self.frame.get(at::FAULT_FLAGS);
            self.vcpu.core().lazy = Lazy::from_bits(bits);
        } else {
            self.flags_out();
        }
        let instruction = self.decode();
        if let Some(i) = &instruction {
            self.catch_up(i);
        }
        let (rw, ro, len) = self.alias;
        let inside = (rw..rw + len).contains(&address) || (ro..ro + len).contains(&address);
        if signal == libc::SIGSEGV && inside {
            if instruction.is_some_and(|i| self.store_fault(&i, address)) && mark.access {
                return Ok(Next::Host(host));
            }
        } else if signal == libc::SIGSEGV && address != 0 && address >> 47 == 0 {
            // (What is not canonical for 48 bits is the guest's fault; a host with 57 tells its address.)
            let rip = self.vcpu.core().rip;
            return Err(Stop::Bug(format!(
                "an access to {address:#x} for the instruction at {rip:#x} left guest memory"
            )));
        }
        self.interpret()
    }

    /// Brings the registers of a string instruction that faulted on its way up to date.
    fn catch_up(&mut self, i: &Instruction) {
        if let Some((registers, size)) = strings::behind(i) {
            let count = self.frame.get(at::SCRATCH2);
            let core = self.vcpu.core();
            let done = count.wrapping_sub(core.r[1]).wrapping_mul(size);
            for &r in registers {
                let moved = core.r[usize::from(r)].wrapping_add(done);
                core.r[usize::from(r)] = if core.bits == 64 { moved } else { moved & 0xffff_ffff };
            }
        }
    }

    /// The instruction at RIP.
    fn decode(&mut self) -> Option<Instruction> {
        let core = self.vcpu.core();
        let linear = core.code_linear(core.rip);
        let at = core.fetch(linear).ok()??;
        let mut bytes = [0; 15];
        self.memory.read(at, &mut bytes);
        let core = self.vcpu.core();
        Some(Decoder::with_ip(core.bits.into(), &bytes, core.rip, interpret::options(core)).decode())
    }

    /// A store met a page that cannot be written. True if it can be now.
    fn store_fault(&mut self, i: &Instruction, address: u64) -> bool {
        let (rw, ro, len) = self.alias;
        let offset = if (rw..rw + len).contains(&address) { address - rw } else { address - ro } & !0xfff;
        let wide = self.vcpu.core().bits == 64;
        let value = |core: &interpret::core::Core, r: Register| -> u64 {
            match r {
                Register::FS => core.r[usize::from(slot::FS)],
                Register::GS => core.r[usize::from(slot::GS)],
                r if r.is_segment_register() => 0,
                Register::RIP => i.next_ip(),
                r if r.is_gpr32() => core.r[usize::from(number(r))] & 0xffff_ffff,
                r => core.r[usize::from(number(r))],
            }
        };
        let info = self.info.info(i);
        let stores: Vec<(u64, u8)> = info
            .used_memory()
            .iter()
            .filter(|m| {
                !matches!(
                    m.access(),
                    OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None
                )
            })
            .filter_map(|m| {
                let at = m.virtual_address(0, |r, _, _| Some(value(self.vcpu.core(), r)))?;
                Some((if wide { at } else { at & 0xffff_ffff }, m.memory_size().size().clamp(1, 64) as u8))
            })
            .collect();
        if self.memory.code().holds_code(offset) {
            if self.hits.len() > 4096 {
                self.hits.clear();
            }
            *self.hits.entry(offset).or_default() += 1;
        }
        for (linear, size) in stores {
            let entry = self.table().get(linear);
            let page = entry.wrapping_add(linear & !0xfff);
            if entry == 0 || (page != rw + offset && page != ro + offset) {
                continue;
            }
            self.table().forget(linear);
            return self.fill(linear, size, true)
                && !self.memory.code().holds_code(offset)
                && self.is_writable(linear);
        }
        false
    }

    fn is_writable(&mut self, linear: u64) -> bool {
        let (rw, _, len) = self.alias;
        let host = self.table().get(linear).wrapping_add(linear & !0xfff);
        (rw..rw + len).contains(&host)
    }

    /// What is said of a bug of ours: the guest's registers, and the code that was left last.
    pub(super) fn report(&mut self, what: &str) -> String {
        let mut out = format!(
            "the translate engine has a bug: {}; please report it with what follows, and use --engine interpret\n",
            what.trim_end()
        );
        let pc = self.frame.get(at::FAULT_PC);
        let core = self.vcpu.core();
        // Writing to a string cannot fail.
        let _ = write!(
            out,
            "  rip {:#x} rflags {:#x} cpl {}",
            core.rip,
            core.rflags | core.lazy.bits(),
            core.cpl
        );
        let _ = write!(out, " cr0 {:#x} cr3 {:#x} cr4 {:#x}", core.s.cr0, core.s.cr3, core.s.cr4);
        for n in 0..16 {
            let end = if n % 4 == 0 { "\n  " } else { " " };
            let _ = write!(out, "{end}{:?} {:#x}", Register::RAX + n as u32, core.r[n]);
        }
        if let Some((start, code)) = self.cache.code(pc)
            && pc - start < code.len() as u64
        {
            let hex: String = code.iter().take(CODE).map(|b| format!("{b:02x}")).collect();
            let _ = write!(out, "\n  last fault at {:#x} of the block {hex}", pc - start);
        }
        out
    }
}
