//! Hardware task switches (SDM vol. 3A, 7.3), between 32-bit and 16-bit TSSs.

use x86::control::cr0;
use x86::exception::vector;
use x86::gpr::RSP;
use x86::segment::{attr, index};
use x86::{Segment, flags};

use crate::core::{Core, attention};
use crate::op::Result;
use crate::segment::{kind, v8086};

/// What causes a task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// JMP.
    Jump,
    /// CALL: nests.
    Call,
    /// An interrupt or exception through a task gate: nests.
    Interrupt,
    /// IRET with NT set: goes back.
    Return,
}

/// Where a TSS keeps what, and how wide.
struct Layout {
    word: u64,
    rip: u64,
    flags: u64,
    gpr: u64,
    segments: u64,
    count: usize,
    ldt: u64,
    limit: u32,
}

const WIDE: Layout =
    Layout { word: 4, rip: 0x20, flags: 0x24, gpr: 0x28, segments: 0x48, count: 6, ldt: 0x60, limit: 0x67 };
const NARROW: Layout =
    Layout { word: 2, rip: 0x0e, flags: 0x10, gpr: 0x12, segments: 0x22, count: 4, ldt: 0x2a, limit: 0x2b };

impl Core {
    /// Switches to the task of TSS `selector`. RIP must be that of the next instruction.
    ///
    /// # Errors
    /// Outside: nothing has changed. Inside: the new task has begun, and the fault is its own.
    pub fn task_switch(&mut self, selector: u16, why: Why, code: Option<u32>) -> Result<Result<()>> {
        let v = if why == Why::Return { vector::TS } else { vector::GP };
        if selector & 4 != 0 || selector & !3 == 0 {
            return self.selector_fault(v, selector);
        }
        let d = self.descriptor(selector, v)?;
        let k = d.segment.kind();
        let wanted = if why == Why::Return {
            matches!(k, kind::TSS_BUSY | kind::TSS16_BUSY)
        } else {
            matches!(k, kind::TSS | kind::TSS16)
        };
        if d.segment.has(attr::S) || !wanted {
            return self.selector_fault(v, selector);
        }
        if !d.segment.has(attr::P) {
            return self.selector_fault(vector::NP, selector);
        }
        let layout = if k & 8 != 0 { WIDE } else { NARROW };
        if d.segment.limit < layout.limit {
            return self.selector_fault(vector::TS, selector);
        }
        let new = d.segment.base;
        // Everything of the new TSS is read, and the old one's pages are made sure of, before anything changes.
        let image = self.read_task(new, &layout)?;
        let old = self.s.tr;
        let nests = matches!(why, Why::Call | Why::Interrupt);
        self.save_task(why)?;
        if !nests {
            let at = self.s.gdtr.base.wrapping_add(u64::from(old.selector & !7) + 5);
            let byte = self.read_system::<u8>(at)?;
            self.write_system(at, byte & !2)?;
        }
        if nests {
            self.write_system(new, old.selector)?;
        }
        if why != Why::Return {
            self.write_system(d.at.wrapping_add(5), (d.raw >> 40) as u8 | 2)?;
        }
        self.s.tr = Segment { attributes: d.segment.attributes | 2, ..d.segment };
        self.s.cr0 |= cr0::TS;
        self.s.dr7 &= !0x155;
        self.breakpoints_changed();
        Ok(self.begin_task(new, &image, &layout, nests, code))
    }

    /// A task switch by an instruction, which a fault of the new task is none of: it comes before the task's first one.
    pub fn switch_by_instruction(&mut self, selector: u16, why: Why) -> Result<()> {
        let begun = self.task_switch(selector, why, None)?;
        if begun.is_err() {
            self.s.events.exception = Some(self.exception);
            self.attend(attention::EVENT, true);
        }
        Ok(())
    }

    fn begin_task(
        &mut self,
        tss: u64,
        image: &Image,
        layout: &Layout,
        nests: bool,
        code: Option<u32>,
    ) -> Result<()> {
        self.enter_task(image, layout, nests)?;
        if let Some(code) = code {
            if layout.word == 4 {
                self.push(code)?
            } else {
                self.push(code as u16)?
            };
        }
        if layout.word == 4 && self.read_system::<u16>(tss.wrapping_add(0x64))? & 1 != 0 {
            self.s.dr6 |= x86::control::dr6::BT;
            return self.raise(x86::Exception::new(vector::DB));
        }
        Ok(())
    }

    fn task_word(&mut self, at: u64, layout: &Layout) -> Result<u64> {
        if layout.word == 4 {
            self.read_system::<u32>(at).map(u64::from)
        } else {
            self.read_system::<u16>(at).map(u64::from)
        }
    }

    fn read_task(&mut self, base: u64, layout: &Layout) -> Result<Image> {
        let mut image = Image::default();
        if layout.word == 4 {
            image.cr3 = Some(self.read_system::<u32>(base.wrapping_add(0x1c))?.into());
        }
        image.rip = self.task_word(base.wrapping_add(layout.rip), layout)?;
        image.flags = self.task_word(base.wrapping_add(layout.flags), layout)?;
        for (n, r) in image.gpr.iter_mut().enumerate() {
            *r = self.task_word(base.wrapping_add(layout.gpr + layout.word * n as u64), layout)?;
        }
        for (n, s) in image.segments.iter_mut().enumerate().take(layout.count) {
            *s = self.task_word(base.wrapping_add(layout.segments + layout.word * n as u64), layout)? as u16;
        }
        image.ldt = self.task_word(base.wrapping_add(layout.ldt), layout)? as u16;
        Ok(image)
    }

    fn save_task(&mut self, why: Why) -> Result<()> {
        let tr = self.s.tr;
        let layout = if tr.kind() & 8 != 0 { WIDE } else { NARROW };
        self.system_place(tr.base.wrapping_add(layout.rip), u64::from(layout.limit) - layout.rip, true)?;
        let mut flags = self.get_flags();
        if why == Why::Return {
            flags &= !flags::NT;
        }
        let mut words = vec![(layout.rip, self.rip), (layout.flags, flags)];
        for n in 0..8 {
            words.push((layout.gpr + layout.word * n as u64, self.r[n]));
        }
        for n in 0..layout.count {
            words.push((layout.segments + layout.word * n as u64, self.s.segments[n].selector.into()));
        }
        for (at, v) in words {
            let at = tr.base.wrapping_add(at);
            if layout.word == 4 { self.write_system(at, v as u32)? } else { self.write_system(at, v as u16)? }
        }
        Ok(())
    }

    fn enter_task(&mut self, image: &Image, layout: &Layout, nests: bool) -> Result<()> {
        if let Some(cr3) = image.cr3.filter(|_| self.s.cr0 & cr0::PG != 0) {
            self.s.cr3 = cr3;
            self.tlb.flush_local();
            self.load_pdptes_quietly();
        }
        for (n, &v) in image.gpr.iter().enumerate() {
            self.r[n] = if layout.word == 4 { v } else { self.r[n] & !0xffff | v };
        }
        self.rip = image.rip;
        self.set_flags(image.flags | if nests { flags::NT } else { 0 });
        // Selectors are there even if loading one faults.
        for (n, &selector) in image.segments.iter().enumerate() {
            self.set_segment(n, Segment { selector, ..Segment::default() });
        }
        self.s.ldtr = Segment { selector: image.ldt, ..Segment::default() };
        if image.ldt & !3 != 0 {
            let d = self.descriptor(image.ldt, vector::TS)?;
            if image.ldt & 4 != 0
                || d.segment.has(attr::S)
                || d.segment.kind() != kind::LDT
                || !d.segment.usable()
            {
                return self.selector_fault(vector::TS, image.ldt);
            }
            self.s.ldtr = d.segment;
        }
        if self.v8086() {
            for (n, &selector) in image.segments.iter().enumerate() {
                self.set_segment(n, v8086(selector));
            }
            self.set_cpl(3);
            return Ok(());
        }
        self.load_task_segments(image)
    }

    fn load_task_segments(&mut self, image: &Image) -> Result<()> {
        let cs = image.segments[index::CS];
        if cs & !3 == 0 {
            return self.selector_fault(vector::TS, cs);
        }
        let mut d = self.descriptor(cs, vector::TS)?;
        let (s, rpl) = (d.segment, (cs & 3) as u8);
        let dpl_ok = if s.has(attr::DC) { s.dpl() <= rpl } else { s.dpl() == rpl };
        if !s.has(attr::S | attr::CODE) || !dpl_ok {
            return self.selector_fault(vector::TS, cs);
        }
        if !s.has(attr::P) {
            return self.selector_fault(vector::NP, cs);
        }
        self.set_accessed(&mut d)?;
        self.set_segment(index::CS, d.segment);
        self.set_cpl(rpl);
        let ss = self.stack_segment(image.segments[index::SS], rpl, vector::TS)?;
        self.set_segment(index::SS, ss);
        for n in [index::ES, index::DS, index::FS, index::GS] {
            if let Err(e) = self.load_segment(n, image.segments[n]) {
                if self.exception.vector == vector::GP {
                    self.exception.vector = vector::TS;
                }
                return Err(e);
            }
        }
        if self.rip > self.s.segments[index::CS].limit.into() {
            return self.gp();
        }
        self.r[RSP] &= 0xffff_ffff;
        Ok(())
    }
}

/// What a TSS holds.
#[derive(Default)]
struct Image {
    cr3: Option<u64>,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
}
