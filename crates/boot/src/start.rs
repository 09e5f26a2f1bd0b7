//! The processor's state at the entry of a kernel.

use machine::cpu::State;
use memory::Memory;
use x86::control::{cr0, cr4, efer};
use x86::segment::{attr, index};
use x86::{Segment, Table, gpr};

use crate::{Error, at, place};

/// Descriptors as Linux' boot protocol wants them: code at 0x10, data at 0x18.
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;

/// Protected mode, flat, paging off: 32-bit entries of Linux, PVH and multiboot.
pub fn protected(memory: &Memory, entry: u64) -> Result<State, Error> {
    with_gdt(memory, entry, CODE32)
}

/// Long mode with the first 4 GiB mapped one to one: Linux' 64-bit entry.
pub fn long(memory: &Memory, entry: u64) -> Result<State, Error> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let page = |n: u64| at::PAGE_TABLES + n * 0x1000;
    let mut tables = vec![0u64; 6 * 512];
    tables[0] = page(1) | PRESENT_WRITABLE;
    for n in 0..4 {
        tables[512 + n as usize] = page(2 + n) | PRESENT_WRITABLE;
    }
    for n in 0..4 * 512 {
        tables[1024 + n as usize] = n << 21 | PRESENT_WRITABLE | LARGE;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|e| e.to_le_bytes()).collect();
    place::bytes(memory, at::PAGE_TABLES, &bytes)?;
    let mut state = with_gdt(memory, entry, CODE64)?;
    state.cr0 |= cr0::PG;
    state.cr3 = at::PAGE_TABLES;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA;
    Ok(state)
}

fn with_gdt(memory: &Memory, entry: u64, code: u64) -> Result<State, Error> {
    let descriptors = [0, 0, code, DATA];
    let bytes: Vec<u8> = descriptors.iter().flat_map(|d| d.to_le_bytes()).collect();
    place::bytes(memory, at::GDT, &bytes)?;
    let mut state = State::reset(true, 0);
    state.gpr = [0; 16];
    state.gpr[gpr::RSP] = at::GDT; // not promised to any kernel, but harmless
    state.rip = entry;
    state.cr0 = cr0::PE | cr0::ET;
    state.gdtr = Table { base: at::GDT, limit: bytes.len() as u16 - 1 };
    state.idtr = Table::default();
    state.segments = [Segment::from_descriptor(0x18, DATA); 6];
    state.segments[index::CS] = Segment::from_descriptor(0x10, code);
    state.ldtr = Segment { attributes: attr::P | 2, ..Segment::default() };
    state.tr = Segment { attributes: attr::P | 11, limit: 0x67, ..Segment::default() };
    Ok(state)
}
