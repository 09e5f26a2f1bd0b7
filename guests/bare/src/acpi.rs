//! The few ACPI tables that guests look at.

unsafe extern "C" {
    static boot_magic: u32;
    static boot_info: u32;
}

/// What the PVH start information begins with.
const PVH_MAGIC: u32 = 0x336e_c578;
/// What EAX holds when a multiboot loader started us.
pub const MULTIBOOT_MAGIC: u32 = 0x2bad_b002;

/// EAX and EBX as the loader left them.
pub fn boot_registers() -> (u32, u32) {
    // SAFETY: written once, before any of this runs.
    unsafe { ((&raw const boot_magic).read_volatile(), (&raw const boot_info).read_volatile()) }
}

/// Reads physical memory below 1 GiB; 0 beyond.
pub fn peek<T: Copy + Default>(address: u64) -> T {
    if address == 0 || address >= 0x4000_0000 {
        return T::default();
    }
    // SAFETY: identity-mapped; integers have no invalid values.
    unsafe { (address as *const T).read_unaligned() }
}

/// The root pointer: from the PVH start information, or found in the BIOS area.
fn root() -> Option<u64> {
    let info = u64::from(boot_registers().1);
    if peek::<u32>(info) == PVH_MAGIC {
        let root = peek::<u64>(info + 32);
        if is_root(root) {
            return Some(root);
        }
    }
    (0xe_0000..0x10_0000).step_by(16).find(|&a| is_root(a))
}

/// Whether the command line holds these bytes (PVH or multiboot).
pub fn command_line_has(word: &[u8]) -> bool {
    let (magic, info) = boot_registers();
    let info = u64::from(info);
    let line: u64 = if peek::<u32>(info) == PVH_MAGIC {
        peek(info + 24)
    } else if magic == MULTIBOOT_MAGIC && peek::<u32>(info) & 4 != 0 {
        peek::<u32>(info + 16).into()
    } else {
        0
    };
    let len = (0..1024).find(|i| peek::<u8>(line + i) == 0).unwrap_or(1024);
    (0..len).any(|at| word.iter().enumerate().all(|(i, b)| peek::<u8>(line + at + i as u64) == *b))
}

fn is_root(address: u64) -> bool {
    peek::<u64>(address) == u64::from_le_bytes(*b"RSD PTR ")
}

/// Address of the first table with this signature.
pub fn table(signature: &[u8; 4]) -> Option<u64> {
    let root = root()?;
    let extended = if peek::<u8>(root + 15) >= 2 { peek::<u64>(root + 24) } else { 0 };
    let (list, width) = if extended != 0 { (extended, 8) } else { (peek::<u32>(root + 16).into(), 4) };
    let end = list + u64::from(peek::<u32>(list + 4));
    (list + 36..end)
        .step_by(width)
        .map(|a| if width == 8 { peek::<u64>(a) } else { peek::<u32>(a).into() })
        .find(|&t| peek::<u32>(t) == u32::from_le_bytes(*signature))
}

/// APIC identifiers of the CPUs that the MADT lists as enabled; at most 8, and how many.
pub fn cpus() -> ([u32; 8], usize) {
    let mut ids = [0; 8];
    let mut count = 0;
    let Some(madt) = table(b"APIC") else { return (ids, 1) };
    let end = madt + u64::from(peek::<u32>(madt + 4));
    let mut entry = madt + 44;
    while entry < end && count < ids.len() {
        let found = match peek::<u8>(entry) {
            0 if peek::<u8>(entry + 4) & 1 != 0 => Some(peek::<u8>(entry + 3).into()),
            9 if peek::<u8>(entry + 8) & 1 != 0 => Some(peek::<u32>(entry + 4)),
            _ => None,
        };
        if let Some(id) = found {
            ids[count] = id;
            count += 1;
        }
        entry += u64::from(peek::<u8>(entry + 1)).max(2);
    }
    (ids, count.max(1))
}

/// Port of the PM timer, and its width in bits.
pub fn pm_timer() -> Option<(u16, u32)> {
    let fadt = table(b"FACP")?;
    let mut port = peek::<u32>(fadt + 76);
    if port == 0 && peek::<u32>(fadt + 4) >= 220 {
        port = peek::<u64>(fadt + 212) as u32;
    }
    let wide = peek::<u32>(fadt + 112) & 1 << 8 != 0;
    (port != 0).then_some((port as u16, if wide { 32 } else { 24 }))
}

/// Address of the HPET's registers.
pub fn hpet() -> Option<u64> {
    let table = table(b"HPET")?;
    Some(peek::<u64>(table + 44))
}
