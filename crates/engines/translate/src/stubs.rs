//! The code between Rust and translated code.

use std::mem::offset_of;

use native::SimdState;

use crate::asm::{Asm, based, frame, reg};
use crate::buffer::Buffer;
use crate::frame::{Frame, at, reason};
use crate::host::Host;
use crate::seats::{STOLEN, Seat, seat};

/// Addresses of the code that enters and leaves translated code.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    enter: u64,
    /// Leaves at a site, whose number is in the frame.
    pub site: u64,
    /// Leaves after a host fault.
    pub fault: u64,
}

const XMM0: i32 = offset_of!(SimdState, ymm) as i32;
const MXCSR: i32 = offset_of!(SimdState, mxcsr) as i32;
/// What a function of the System V ABI leaves as it was: RBX, RBP, R12 to R15.
const SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

impl Stubs {
    /// Makes them at the start of `buffer`.
    pub fn new(buffer: &mut Buffer, host: Host) -> Self {
        let mut a = Asm::new(buffer.next());
        let mut stubs = Self { enter: a.address(), ..Self::default() };
        enter(&mut a, host);
        stubs.site = a.address();
        let site = leave_for(&mut a, reason::SITE);
        stubs.fault = a.address();
        let fault = leave_for(&mut a, reason::FAULT);
        for fixup in [site, fault] {
            a.bind(fixup);
        }
        leave(&mut a, host);
        buffer.push(&a.code);
        stubs
    }

    /// Runs translated code from `host` on, until it is left.
    ///
    /// # Safety
    /// `host` is the address of an instruction boundary in live translated code of this vCPU at which code may be entered.
    /// The frame's pointers to registers and SIMD state are valid, and GS base is that of a linear page table whose entries
    /// all lead to guest memory.
    #[inline]
    pub unsafe fn enter(&self, frame: &Frame, host: u64) {
        // SAFETY: made by `enter` below as a function of this type. It keeps what the ABI wants kept, and gives back MXCSR
        // and the direction flag as Rust wants them; the rest is the caller's promise.
        unsafe {
            let f = std::mem::transmute::<u64, unsafe extern "sysv64" fn(*mut u8, u64)>(self.enter);
            f(frame.base(), host);
        }
    }
}

fn enter(a: &mut Asm, host: Host) {
    for r in SAVED {
        push(a, r);
    }
    a.store(based(reg::T, at::HOST_RSP), reg::RSP);
    a.mov(reg::RSP, reg::T);
    a.store(frame(at::SCRATCH), reg::U);
    a.load(reg::T, frame(at::SIMD));
    mxcsr(a, 2, reg::T, MXCSR);
    for n in 0..16 {
        vector(a, host, false, n);
    }
    a.load(reg::U, frame(at::REGISTERS));
    for guest in 0..16 {
        let from = based(reg::U, 8 * i32::from(guest));
        match seat(guest) {
            Seat::Host(r) => a.load(r, from),
            Seat::Frame(slot) => {
                a.load(reg::T, from);
                a.store(frame(slot), reg::T);
            }
        }
    }
    a.jump_mem(frame(at::SCRATCH));
}

fn leave_for(a: &mut Asm, why: u32) -> crate::asm::Fixup {
    a.store(frame(at::LINEAR), reg::T);
    a.store_imm32(frame(at::REASON), why);
    a.jump()
}

fn leave(a: &mut Asm, host: Host) {
    a.load(reg::U, frame(at::REGISTERS));
    for guest in 0..16 {
        if let Seat::Host(r) = seat(guest) {
            a.store(based(reg::U, 8 * i32::from(guest)), r);
        }
    }
    for guest in STOLEN {
        if let Seat::Frame(slot) = seat(guest) {
            a.load(reg::T, frame(slot));
            a.store(based(reg::U, 8 * i32::from(guest)), reg::T);
        }
    }
    a.load(reg::T, frame(at::SIMD));
    mxcsr(a, 3, reg::T, MXCSR);
    for n in 0..16 {
        vector(a, host, true, n);
    }
    if host.avx {
        a.raw(&[0xc5, 0xf8, 0x77]); // VZEROUPPER
    }
    mxcsr(a, 2, reg::RSP, at::MXCSR);
    a.load(reg::RSP, frame(at::HOST_RSP));
    for r in SAVED.into_iter().rev() {
        pop(a, r);
    }
    a.raw(&[0xc3]);
}

fn push(a: &mut Asm, r: u8) {
    if r >= 8 {
        a.raw(&[0x41]);
    }
    a.raw(&[0x50 | r & 7]);
}

fn pop(a: &mut Asm, r: u8) {
    if r >= 8 {
        a.raw(&[0x41]);
    }
    a.raw(&[0x58 | r & 7]);
}

/// LDMXCSR (2) or STMXCSR (3).
fn mxcsr(a: &mut Asm, which: u8, base: u8, disp: i32) {
    a.rm(false, &[0x0f, 0xae], which, based(base, disp));
}

/// VMOVUPS or MOVUPS between a vector register and its place in the state that RDI points to.
fn vector(a: &mut Asm, host: Host, store: bool, n: u8) {
    let disp = XMM0 + 32 * i32::from(n);
    let opcode = if store { 0x11 } else { 0x10 };
    if host.avx {
        // VEX.256.0F.WIG 10/11 /r
        let r = if n >= 8 { 0 } else { 0x80 };
        a.raw(&[0xc5, r | 0x7c, opcode, 0x87 | (n & 7) << 3]);
        a.raw(&disp.to_le_bytes());
    } else {
        a.rm(false, &[0x0f, opcode], n, based(reg::T, disp));
    }
}
