//! Linux by its own protocol (Linux, Documentation/arch/x86/boot.rst).

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use machine::cpu::State;
use memory::Memory;
use vm_memory::{ByteValued, GuestAddress};
use x86::gpr;

use crate::{Error, Image, Kernel, at, map, place, start};

/// A loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;
const LOADED_HIGH: u8 = 1 << 0;
const KEEP_SEGMENTS: u8 = 1 << 6;
const CAN_USE_HEAP: u8 = 1 << 7;
/// There is a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1 << 0;

pub fn load(memory: &Memory, image: &Image, what: &Kernel<'_>) -> Result<State, Error> {
    let mut params = boot_params::default();
    // The header ends where the jump at 0x200 goes to; code follows, which is none of the zero page's business.
    let jump = image.read(0x201, 1)?[0];
    let len = (0x11 + usize::from(jump)).min(size_of_val(&params.hdr));
    params.hdr.as_mut_slice()[..len].copy_from_slice(&image.read(0x1f1, len as u64)?);
    let version = params.hdr.version;
    if version < 0x206 || params.hdr.loadflags & LOADED_HIGH == 0 {
        return Err(image.error("a Linux kernel older than 2.6.22; use a newer one"));
    }
    let setup = (u64::from(params.hdr.setup_sects.max(1)) + 1) * 512;
    let size = image.len.checked_sub(setup).filter(|&size| size > 0x200);
    let size = size.ok_or_else(|| image.error("truncated: it ends before its kernel begins"))?;

    // Where it would decompress to, if it says so and it fits; else the traditional place.
    let (preferred, needed) = (params.hdr.pref_address, u64::from(params.hdr.init_size).max(size));
    let end = map::low_end(memory);
    let fits = |load: u64| load.checked_add(needed).is_some_and(|e| e <= end);
    let preferred =
        if version >= 0x20a && preferred >= at::HIGH && preferred % 4096 == 0 { preferred } else { at::HIGH };
    let load = [preferred, at::HIGH].into_iter().find(|&load| fits(load)).ok_or_else(|| image.too_large())?;
    if load != preferred && params.hdr.relocatable_kernel == 0 {
        return Err(image.too_large());
    }
    let mut file =
        image.file.try_clone().map_err(|source| Error::Read { path: image.path.clone(), source })?;
    BzImage::load(memory.guest(), Some(GuestAddress(load)), &mut file, None)
        .map_err(|_| image.error("damaged: its header contradicts itself"))?;

    let max = if version >= 0x206 { params.hdr.cmdline_size as usize } else { 255 };
    place::cmdline(memory, at::CMDLINE, what.cmdline, max)?;
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    params.hdr.loadflags = (params.hdr.loadflags | CAN_USE_HEAP) & !KEEP_SEGMENTS;
    params.hdr.heap_end_ptr = 0xfe00;
    params.hdr.code32_start = load as u32;
    params.hdr.cmd_line_ptr = at::CMDLINE as u32;
    params.hdr.vid_mode = 0xffff; // normal
    params.acpi_rsdp_addr = what.rsdp;
    if let Some((address, len)) = initrd(memory, what, u64::from(params.hdr.initrd_addr_max), load + needed)?
    {
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (address as u32, len as u32);
    }
    let ranges = map::ranges(memory);
    params.e820_entries = ranges.len() as u8;
    for (entry, range) in params.e820_table.iter_mut().zip(&ranges) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind as u32 };
    }
    place::bytes(memory, at::ZERO_PAGE, params.as_slice())?;

    let mut state = if version >= 0x20c && params.hdr.xloadflags & XLF_KERNEL_64 != 0 {
        start::long(memory, load + 0x200)?
    } else {
        start::protected(memory, load)?
    };
    state.gpr[gpr::RSI] = at::ZERO_PAGE;
    Ok(state)
}

/// Loads the initial RAM disks one behind the other, as high as the kernel allows and above `floor`: it unpacks them in turn.
fn initrd(memory: &Memory, what: &Kernel<'_>, max: u64, floor: u64) -> Result<Option<(u64, u64)>, Error> {
    let images = what.initrd.iter().map(|path| Image::open(path)).collect::<Result<Vec<_>, _>>()?;
    let Some(last) = images.last() else { return Ok(None) };
    // Each begins at a multiple of 4 (Linux, early-userspace/buffer-format).
    let padded = |image: &Image| image.len.checked_next_multiple_of(4);
    let len = images.iter().try_fold(0u64, |sum, image| sum.checked_add(padded(image)?));
    let len = len.ok_or_else(|| last.too_large())?;
    let limit = if max == 0 { 0x3800_0000 } else { max + 1 };
    let address = place::high(memory, len, limit, floor).ok_or_else(|| last.too_large())?;
    let mut end = address;
    for image in &images {
        let at = end.next_multiple_of(4);
        image.copy(0, image.len, memory, at)?;
        end = at + image.len;
    }
    Ok(Some((address, end - address)))
}
