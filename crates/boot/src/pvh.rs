//! The PVH boot protocol (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h).

use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use machine::cpu::State;
use memory::Memory;
use vm_memory::ByteValued;
use x86::gpr;

use crate::elf::Elf;
use crate::multiboot::modules;
use crate::{Error, Image, Kernel, at, map, place, start};

const MAGIC: u32 = 0x336e_c578;

pub fn load(
    memory: &Memory,
    image: &Image,
    elf: &Elf,
    entry: u64,
    what: &Kernel<'_>,
) -> Result<State, Error> {
    let end = elf.load(image, memory)?;
    place::cmdline(memory, at::CMDLINE, what.cmdline, usize::MAX)?;
    let list: Vec<_> = modules(memory, what, end)?
        .into_iter()
        .map(|m| hvm_modlist_entry { paddr: m.start, size: m.len, ..Default::default() })
        .collect();
    let ranges: Vec<_> = map::ranges(memory)
        .iter()
        .map(|r| hvm_memmap_table_entry { addr: r.start, size: r.size, type_: r.kind as u32, reserved: 0 })
        .collect();
    let list_at = at::INFO + size_of::<hvm_start_info>() as u64;
    let map_at = list_at + size_of_val(list.as_slice()) as u64;
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: list.len() as u32,
        modlist_paddr: if list.is_empty() { 0 } else { list_at },
        cmdline_paddr: at::CMDLINE,
        rsdp_paddr: what.rsdp,
        memmap_paddr: map_at,
        memmap_entries: ranges.len() as u32,
        ..Default::default()
    };
    place::bytes(memory, at::INFO, info.as_slice())?;
    for (n, module) in list.iter().enumerate() {
        place::bytes(memory, list_at + (n * size_of::<hvm_modlist_entry>()) as u64, module.as_slice())?;
    }
    for (n, range) in ranges.iter().enumerate() {
        place::bytes(memory, map_at + (n * size_of::<hvm_memmap_table_entry>()) as u64, range.as_slice())?;
    }
    let mut state = start::protected(memory, entry)?;
    state.gpr[gpr::RBX] = at::INFO;
    Ok(state)
}
