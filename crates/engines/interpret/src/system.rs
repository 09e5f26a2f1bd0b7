//! Privileged instructions, flags, control and debug registers, I/O, and what asks the processor about itself.

use machine::cpu::Activity;
use x86::control::{cr0, cr3, cr4, dr6, dr7, efer};
use x86::cpuid::Feature;
use x86::exception::vector;
use x86::gpr::{RAX, RBX, RCX, RDX};
use x86::segment::{attr, index};
use x86::{Exception, flags};

use crate::core::{Core, attention};
use crate::flags::Lazy;
use crate::mmu::canonical;
use crate::op::{Flow, Op, Result};
use crate::word::Word;

/// What raises #UD.
pub fn ud(c: &mut Core, _: &Op) -> Result<Flow> {
    c.ud()
}

/// What raises #GP(0).
pub fn gp(c: &mut Core, _: &Op) -> Result<Flow> {
    c.gp()
}

impl Core {
    /// #GP(0) unless at privilege 0.
    #[inline]
    pub fn privileged(&mut self) -> Result<()> {
        if self.cpl == 0 { Ok(()) } else { self.gp() }
    }

    /// #GP(0) if CR4.UMIP hides descriptor tables from user mode.
    pub fn check_umip(&mut self) -> Result<()> {
        if self.s.cr4 & cr4::UMIP != 0 && self.cpl != 0 { self.gp() } else { Ok(()) }
    }

    /// #GP(0) unless the I/O privilege level or the TSS's bitmap lets `size` ports at `port` be accessed.
    pub fn check_port(&mut self, port: u16, size: u8) -> Result<()> {
        let by_level = self.protected() && self.cpl <= self.iopl();
        if self.s.cr0 & cr0::PE == 0 || by_level {
            return Ok(());
        }
        let tr = self.s.tr;
        if !tr.usable() || tr.kind() & 8 == 0 || tr.limit < 0x67 {
            return self.gp();
        }
        let map = self.read_system::<u16>(tr.base.wrapping_add(0x66))?;
        let at = u64::from(map) + u64::from(port / 8);
        if at + 1 > tr.limit.into() {
            return self.gp();
        }
        let bits = self.read_system::<u16>(tr.base.wrapping_add(at))? >> (port % 8);
        if bits & ((1 << size) - 1) != 0 { self.gp() } else { Ok(()) }
    }

    /// Reads a port.
    pub fn port_read(&mut self, port: u16, size: u8) -> u64 {
        self.count.ports += 1;
        self.check_port_watch(port, size);
        self.machine.ports.read(port.into(), size)
    }

    /// Writes a port.
    pub fn port_write(&mut self, port: u16, size: u8, value: u64) {
        self.count.ports += 1;
        self.check_port_watch(port, size);
        self.machine.ports.write(port.into(), size, value);
        self.look_at_map();
    }

    /// The guest's time-stamp counter.
    pub fn tsc(&self) -> u64 {
        self.machine.clock.tsc().wrapping_add(self.s.msrs.tsc_offset)
    }

    /// Writes CR0.
    pub fn set_cr0(&mut self, value: u64) -> Result<()> {
        let bad = value >> 32 != 0
            || value & (cr0::PG | cr0::PE) == cr0::PG
            || value & (cr0::CD | cr0::NW) == cr0::NW;
        if bad {
            return self.gp();
        }
        let new = value & cr0::DEFINED | cr0::ET;
        let old = self.s.cr0;
        let changed = old ^ new;
        let enters = changed & new & cr0::PG != 0 && self.s.efer & efer::LME != 0;
        let leaves = changed & old & cr0::PG != 0 && self.long();
        let cs = self.s.segments[index::CS];
        if enters && (self.s.cr4 & cr4::PAE == 0 || cs.has(attr::L)) || leaves && self.bits == 64 {
            return self.gp();
        }
        if old & cr0::PG != 0 && new & cr0::PG == 0 && self.s.cr4 & cr4::PCIDE != 0 {
            return self.gp();
        }
        let before = self.s.efer;
        if enters {
            self.s.efer |= efer::LMA;
        } else if leaves {
            self.s.efer &= !efer::LMA;
        }
        self.s.cr0 = new;
        if changed & cr0::PG != 0
            && let Err(e) = self.load_pdptes()
        {
            (self.s.cr0, self.s.efer) = (old, before);
            return Err(e);
        }
        if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.tlb.flush_all();
        }
        if changed & new & cr0::PE != 0 {
            // Real mode's segments stay as they are until loaded; the privilege level is 0.
            self.cpl = 0;
        }
        self.code_segment_changed();
        self.rights_changed();
        Ok(())
    }

    /// Writes CR3.
    pub fn set_cr3(&mut self, value: u64) -> Result<()> {
        let pcid = self.s.cr4 & cr4::PCIDE != 0;
        let keep = value & cr3::NO_FLUSH != 0;
        let value = if pcid { value & !cr3::NO_FLUSH } else { value };
        if self.long() && value >> x86::cpuid::PHYSICAL_BITS != 0 {
            return self.gp();
        }
        let old = std::mem::replace(&mut self.s.cr3, value);
        if let Err(e) = self.load_pdptes() {
            self.s.cr3 = old;
            return Err(e);
        }
        self.tlb.switch(if pcid { (value & cr3::PCID) as u16 } else { 0 }, pcid && keep);
        self.context_changed();
        Ok(())
    }

    /// The bits of CR4 that this processor has.
    fn cr4_defined(&self) -> u64 {
        let bits = [
            (Feature::VME, cr4::VME | cr4::PVI),
            (Feature::TSC, cr4::TSD),
            (Feature::DE, cr4::DE),
            (Feature::PSE, cr4::PSE),
            (Feature::PAE, cr4::PAE),
            (Feature::MCE, cr4::MCE),
            (Feature::PGE, cr4::PGE),
            (Feature::FPU, cr4::PCE),
            (Feature::FXSR, cr4::OSFXSR),
            (Feature::SSE, cr4::OSXMMEXCPT),
            (Feature::UMIP, cr4::UMIP),
            (Feature::FSGSBASE, cr4::FSGSBASE),
            (Feature::PCID, cr4::PCIDE),
            (Feature::XSAVE, cr4::OSXSAVE),
            (Feature::SMEP, cr4::SMEP),
            (Feature::SMAP, cr4::SMAP),
        ];
        bits.iter().filter(|(f, _)| self.cpuid.has(*f)).fold(0, |all, (_, b)| all | b)
    }

    /// Writes CR4.
    pub fn set_cr4(&mut self, value: u64) -> Result<()> {
        let old = self.s.cr4;
        let changed = old ^ value;
        let pcide_on = changed & value & cr4::PCIDE != 0;
        let bad = value & !self.cr4_defined() != 0
            || self.long() && value & cr4::PAE == 0
            || pcide_on && (!self.long() || self.s.cr3 & cr3::PCID != 0);
        if bad {
            return self.gp();
        }
        self.s.cr4 = value;
        let paging = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::PCIDE;
        if changed & (cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP) != 0
            && let Err(e) = self.load_pdptes()
        {
            self.s.cr4 = old;
            return Err(e);
        }
        if changed & paging != 0 {
            self.tlb.flush_all();
        }
        self.rights_changed();
        if changed & cr4::DE != 0 {
            self.breakpoints_changed();
        }
        Ok(())
    }

    /// #GP(0) unless the mode and IOPL let IF be changed; for CLI and STI.
    fn check_interrupt_flag(&mut self) -> Result<()> {
        if self.cpl <= self.iopl() || self.s.cr0 & cr0::PE == 0 { Ok(()) } else { self.gp() }
    }
}

/// CLI.
pub fn cli(c: &mut Core, _: &Op) -> Result<Flow> {
    c.check_interrupt_flag()?;
    c.rflags &= !flags::IF;
    c.poll &= !machine::apic::INTERRUPT;
    Ok(Flow::Next)
}

/// STI: interrupts wait for one more instruction if they were off.
pub fn sti(c: &mut Core, _: &Op) -> Result<Flow> {
    c.check_interrupt_flag()?;
    if c.rflags & flags::IF == 0 {
        c.rflags |= flags::IF;
        c.poll |= machine::apic::INTERRUPT;
        c.attend(attention::SHADOW, true);
    }
    Ok(Flow::End)
}

/// PUSHF.
pub fn pushf<T: Word>(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.v8086() && c.iopl() < 3 {
        return c.gp();
    }
    c.push(T::of(c.get_flags() & !(flags::VM | flags::RF)))
}

/// POPF.
pub fn popf<T: Word>(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.v8086() && c.iopl() < 3 {
        return c.gp();
    }
    let v = c.pop::<T>()?.u();
    let mut mask = c.changeable_flags(T::SIZE) & !flags::RF;
    if c.v8086() {
        mask &= !flags::IOPL;
    }
    let new = c.get_flags() & !(mask | flags::RF) | v & mask;
    c.set_flags(new);
    Ok(Flow::End)
}

/// HLT.
pub fn hlt(c: &mut Core, _: &Op) -> Result<Flow> {
    c.privileged()?;
    c.count.halts += 1;
    c.s.activity = Activity::Halted;
    c.attend(attention::IDLE, true);
    Ok(Flow::End)
}

/// CLTS.
pub fn clts(c: &mut Core, _: &Op) -> Result<Flow> {
    c.privileged()?;
    c.s.cr0 &= !cr0::TS;
    Ok(Flow::Next)
}

/// STAC, CLAC.
pub fn ac<const ON: bool>(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.cpl != 0 {
        return c.ud();
    }
    c.set_ac(ON);
    Ok(Flow::Next)
}

/// SMSW.
pub fn smsw<T: Word, const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.check_umip()?;
    if M { c.store(op, c.s.cr0 as u16) } else { c.set_rm::<T, false>(op, T::of(c.s.cr0)) }
}

/// LMSW: sets PE, MP, EM and TS; it cannot clear PE.
pub fn lmsw<const M: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    c.privileged()?;
    let v = u64::from(c.get_rm::<u16, M>(op, op.dst)?);
    let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let pe = c.s.cr0 & cr0::PE;
    c.set_cr0(c.s.cr0 & !low | v & low | pe)?;
    Ok(Flow::End)
}

/// MOV to CRn.
pub fn mov_to_cr(c: &mut Core, op: &Op) -> Result<Flow> {
    c.privileged()?;
    let raw = c.r[usize::from(op.src & 15)];
    let v = if c.bits == 64 { raw } else { raw & 0xffff_ffff };
    match op.dst {
        0 => c.set_cr0(v)?,
        2 => c.s.cr2 = v,
        3 => c.set_cr3(v)?,
        4 => c.set_cr4(v)?,
        8 if v >> 4 == 0 => c.local.set_tpr(v as u8),
        8 => return c.gp(),
        _ => return c.ud(),
    }
    Ok(Flow::End)
}

/// MOV from CRn.
pub fn mov_from_cr(c: &mut Core, op: &Op) -> Result<Flow> {
    c.privileged()?;
    let v = match op.src {
        0 => c.s.cr0,
        2 => c.s.cr2,
        3 => c.s.cr3,
        4 => c.s.cr4,
        8 => c.local.tpr().into(),
        _ => return c.ud(),
    };
    c.r[usize::from(op.dst & 15)] = if c.bits == 64 { v } else { v & 0xffff_ffff };
    Ok(Flow::Next)
}

fn debug_register(c: &mut Core, n: u8) -> Result<u8> {
    let n = match n {
        4 | 5 if c.s.cr4 & cr4::DE == 0 => n + 2,
        4 | 5 | 8.. => return c.ud(),
        n => n,
    };
    c.privileged()?;
    if c.s.dr7 & dr7::GD != 0 {
        return c.raise(Exception { address: dr6::BD, ..Exception::new(vector::DB) });
    }
    Ok(n)
}

/// MOV to DRn.
pub fn mov_to_dr(c: &mut Core, op: &Op) -> Result<Flow> {
    let n = debug_register(c, op.dst)?;
    let raw = c.r[usize::from(op.src & 15)];
    let v = if c.bits == 64 { raw } else { raw & 0xffff_ffff };
    if n >= 4 && v >> 32 != 0 {
        return c.gp();
    }
    match n {
        6 => c.s.dr6 = v & 0xe00f | dr6::FIXED,
        7 => c.s.dr7 = v & 0xffff_2bff | dr7::FIXED,
        n => c.s.dr[usize::from(n & 3)] = v,
    }
    c.breakpoints_changed();
    Ok(Flow::End)
}

/// MOV from DRn.
pub fn mov_from_dr(c: &mut Core, op: &Op) -> Result<Flow> {
    let n = debug_register(c, op.src)?;
    let v = match n {
        6 => c.s.dr6,
        7 => c.s.dr7,
        n => c.s.dr[usize::from(n & 3)],
    };
    c.r[usize::from(op.dst & 15)] = v;
    Ok(Flow::Next)
}

/// INVLPG.
pub fn invlpg(c: &mut Core, op: &Op) -> Result<Flow> {
    c.privileged()?;
    let offset = c.effective(op);
    let base = if c.bits == 64 {
        c.r[usize::from(op.seg_slot & 31)]
    } else {
        c.s.segments[usize::from(op.segment) % 6].base
    };
    let linear = base.wrapping_add(offset);
    c.tlb.flush_page(if c.long() { linear } else { linear & 0xffff_ffff });
    c.context_changed();
    Ok(Flow::End)
}

/// INVPCID.
pub fn invpcid(c: &mut Core, op: &Op) -> Result<Flow> {
    c.privileged()?;
    let kind = c.r[usize::from(op.dst & 15)];
    let linear = c.operand(op, 16, false)?;
    let pcid = c.read::<u64>(linear, op.segment)?;
    let address = c.read::<u64>(linear.wrapping_add(8), op.segment)?;
    let kind = if c.bits == 64 { kind } else { kind & 0xffff_ffff };
    let wrong_pcid = pcid >> 12 != 0 || pcid != 0 && c.s.cr4 & cr4::PCIDE == 0;
    if kind > 3 || kind < 2 && wrong_pcid || kind == 0 && !canonical(address) {
        return c.gp();
    }
    match kind {
        0 => c.tlb.flush_page(address),
        1 => c.tlb.flush_context(pcid as u16),
        2 => c.tlb.flush_all(),
        _ => c.tlb.flush_local(),
    }
    c.context_changed();
    Ok(Flow::End)
}

/// INVD, WBINVD, WBNOINVD: caches are not modelled.
pub fn wbinvd(c: &mut Core, _: &Op) -> Result<Flow> {
    c.privileged()?;
    Ok(Flow::Next)
}

/// CLFLUSH, CLFLUSHOPT, CLWB: read the address's translation and nothing more.
pub fn clflush(c: &mut Core, op: &Op) -> Result<Flow> {
    c.load::<u8>(op)?;
    Ok(Flow::Next)
}

/// SWAPGS.
pub fn swapgs(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.bits != 64 {
        return c.ud();
    }
    c.privileged()?;
    let base = c.s.segments[index::GS].base;
    let new = std::mem::replace(&mut c.s.msrs.kernel_gs_base, base);
    c.set_base(index::GS, new);
    Ok(Flow::Next)
}

/// RDFSBASE, RDGSBASE (`N` is the segment register).
pub fn rdbase<T: Word, const N: usize>(c: &mut Core, op: &Op) -> Result<Flow> {
    if c.s.cr4 & cr4::FSGSBASE == 0 {
        return c.ud();
    }
    T::set(c, op.dst, T::of(c.s.segments[N].base));
    Ok(Flow::Next)
}

/// WRFSBASE, WRGSBASE.
pub fn wrbase<T: Word, const N: usize>(c: &mut Core, op: &Op) -> Result<Flow> {
    if c.s.cr4 & cr4::FSGSBASE == 0 {
        return c.ud();
    }
    let base = T::get(c, op.dst).u();
    if !canonical(base) {
        return c.gp();
    }
    c.set_base(N, base);
    Ok(Flow::Next)
}

/// CPUID.
pub fn cpuid(c: &mut Core, _: &Op) -> Result<Flow> {
    let answer = c.cpuid.query(c.r[RAX] as u32, c.r[RCX] as u32, &c.live());
    c.r[RAX] = answer.eax.into();
    c.r[RBX] = answer.ebx.into();
    c.r[RCX] = answer.ecx.into();
    c.r[RDX] = answer.edx.into();
    Ok(Flow::Next)
}

fn set_pair(c: &mut Core, v: u64) {
    c.r[RAX] = v & 0xffff_ffff;
    c.r[RDX] = v >> 32;
}

/// RDTSC, and RDTSCP with `P`.
pub fn rdtsc<const P: bool>(c: &mut Core, _: &Op) -> Result<Flow> {
    if c.s.cr4 & cr4::TSD != 0 && c.cpl != 0 {
        return c.gp();
    }
    let tsc = c.tsc();
    set_pair(c, tsc);
    if P {
        c.r[RCX] = c.s.msrs.tsc_aux & 0xffff_ffff;
    }
    Ok(Flow::Next)
}

/// RDPID.
pub fn rdpid(c: &mut Core, op: &Op) -> Result<Flow> {
    c.r[usize::from(op.dst & 15)] = c.s.msrs.tsc_aux;
    Ok(Flow::Next)
}

/// RDMSR.
pub fn rdmsr(c: &mut Core, _: &Op) -> Result<Flow> {
    c.privileged()?;
    match c.read_msr(c.r[RCX] as u32) {
        Some(v) => set_pair(c, v),
        None => return c.gp(),
    }
    Ok(Flow::Next)
}

/// WRMSR.
pub fn wrmsr(c: &mut Core, _: &Op) -> Result<Flow> {
    c.privileged()?;
    let value = c.r[RDX] << 32 | c.r[RAX] & 0xffff_ffff;
    match c.write_msr(c.r[RCX] as u32, value) {
        Some(()) => Ok(Flow::End),
        None => c.gp(),
    }
}

/// RDRAND, RDSEED.
pub fn rdrand<T: Word>(c: &mut Core, op: &Op) -> Result<Flow> {
    let v = c.pv.random();
    T::set(c, op.dst, T::of(v));
    c.lazy = Lazy::from_bits(flags::CF);
    Ok(Flow::Next)
}

/// IN.
pub fn input<T: Word, const DX: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let port = if DX { c.r[RDX] as u16 } else { op.imm as u8 as u16 };
    c.check_port(port, T::SIZE as u8)?;
    let v = c.port_read(port, T::SIZE as u8);
    T::set(c, 0, T::of(v));
    Ok(Flow::End)
}

/// OUT.
pub fn output<T: Word, const DX: bool>(c: &mut Core, op: &Op) -> Result<Flow> {
    let port = if DX { c.r[RDX] as u16 } else { op.imm as u8 as u16 };
    c.check_port(port, T::SIZE as u8)?;
    c.port_write(port, T::SIZE as u8, T::get(c, 0).u());
    Ok(Flow::End)
}

/// VMCALL, VMMCALL: a KVM hypercall. None is supported: RAX becomes −KVM_ENOSYS.
pub fn hypercall(c: &mut Core, _: &Op) -> Result<Flow> {
    const KVM_ENOSYS: u64 = 1000;
    const KVM_EPERM: u64 = 1;
    if !c.cpuid.has(Feature::HYPERVISOR) {
        return c.ud();
    }
    let error = if c.cpl == 0 { KVM_ENOSYS } else { KVM_EPERM }.wrapping_neg();
    c.r[RAX] = if c.bits == 64 { error } else { error & 0xffff_ffff };
    Ok(Flow::Next)
}

/// XLAT: the index is AL alone.
pub fn xlat(c: &mut Core, op: &Op) -> Result<Flow> {
    let mask = u64::MAX >> (64 - 8 * u32::from(op.address_size.clamp(1, 8)));
    let offset = c.r[RBX].wrapping_add(c.r[RAX] & 0xff) & mask;
    let linear = c.linear(op.segment, offset, 1, false)?;
    let v = c.read::<u8>(linear, op.segment)?;
    u8::set(c, 0, v);
    Ok(Flow::Next)
}
