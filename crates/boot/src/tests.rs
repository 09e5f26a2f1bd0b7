use std::io::Write;

use memory::Memory;
use vm_memory::{Bytes, GuestAddress};
use x86::control::{cr0, efer};
use x86::gpr;

use super::*;

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("lodge-boot-{}-{name}", std::process::id()));
    File::create(&path).unwrap().write_all(bytes).unwrap();
    path
}

fn try_load(name: &str, bytes: &[u8], memory: &Memory) -> Result<State, Error> {
    let path = file(name, bytes);
    let initrd = [file(&format!("{name}-initrd"), b"a disk")];
    let result = load(memory, &Kernel { kernel: &path, initrd: &initrd, cmdline: "quiet", rsdp: 0xe_0000 });
    std::fs::remove_file(path).unwrap();
    std::fs::remove_file(&initrd[0]).unwrap();
    result
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage of protocol 2.15 with a 64-bit entry, that wants 8 MiB at 16 MiB.
fn bzimage() -> Vec<u8> {
    let mut b = vec![0; 0x400 + 0x1000];
    put(&mut b, 0x200, &[0xeb, 0x6a]);
    b[0x1f1] = 1; // one sector of set-up
    put(&mut b, 0x202, b"HdrS\x0f\x02");
    b[0x211] = 1;
    put(&mut b, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut b, 0x234, &[1, 21, 1, 0]);
    put(&mut b, 0x238, &2047u32.to_le_bytes());
    put(&mut b, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut b, 0x260, &0x80_0000u32.to_le_bytes());
    put(&mut b, 0x400, b"kernel");
    b
}

/// An ELF file of 32 or 64 bits with one segment at 1 MiB, and a PVH note if `pvh`.
fn elf(bits: u8, pvh: bool) -> Vec<u8> {
    let mut b = vec![0; 0x400];
    put(&mut b, 0, b"\x7fELF");
    (b[4], b[5], b[6], b[16], b[18], b[20]) = (bits / 32, 1, 1, 2, if bits == 64 { 62 } else { 3 }, 1);
    let word = |b: &mut Vec<u8>, at: usize, v: u64| put(b, at, &v.to_le_bytes()[..usize::from(bits / 8)]);
    let headers = if bits == 64 { 64 } else { 52 };
    word(&mut b, 24, 0x10_0010);
    word(&mut b, if bits == 64 { 32 } else { 28 }, headers as u64);
    let sizes = if bits == 64 { 52 } else { 40 };
    put(&mut b, sizes, &[headers as u8, 0, if bits == 64 { 56 } else { 32 }, 0, 2, 0]);
    for (n, (kind, offset, size)) in
        [(1u8, 0x200u64, 0x100u64), (4, 0x300, if pvh { 20 } else { 0 })].iter().enumerate()
    {
        let h = headers + n * if bits == 64 { 56 } else { 32 };
        b[h] = *kind;
        let fields: [usize; 5] = if bits == 64 { [8, 24, 32, 40, 48] } else { [4, 12, 16, 20, 28] };
        for (at, v) in fields.iter().zip([*offset, 0x10_0000, *size, *size, 4]) {
            word(&mut b, h + at, v);
        }
    }
    put(&mut b, 0x200, b"segment");
    put(&mut b, 0x300, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut b, 0x30c, b"Xen\0\x20\0\x10\0");
    b
}

fn word(memory: &Memory, at: u64) -> u64 {
    memory.guest().read_obj::<u32>(GuestAddress(at)).unwrap().into()
}

fn text(memory: &Memory, at: u64, len: usize) -> String {
    let mut bytes = vec![0; len];
    memory.guest().read_slice(&mut bytes, GuestAddress(at)).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn linux_starts_at_its_64_bit_entry() {
    let memory = Memory::new(64 << 20, 0).unwrap();
    let state = try_load("bz", &bzimage(), &memory).unwrap();
    assert_eq!((state.rip, state.gpr[gpr::RSI]), (0x100_0200, at::ZERO_PAGE));
    assert!(state.efer & efer::LMA != 0 && state.cr0 & cr0::PG != 0);
    assert_eq!(text(&memory, 0x100_0000, 6), "kernel");
    let zero = |offset| word(&memory, at::ZERO_PAGE + offset);
    assert_eq!(text(&memory, zero(0x228), 6), "quiet\0");
    assert_eq!(text(&memory, zero(0x218), zero(0x21c) as usize), "a disk");
    assert_eq!(zero(0x70), 0xe_0000);
    assert_eq!(zero(0x1e8) & 0xff, 5);
}

#[test]
fn an_old_or_32_bit_linux_starts_in_protected_mode() {
    let memory = Memory::new(64 << 20, 0).unwrap();
    let mut b = bzimage();
    b[0x236] = 0;
    let state = try_load("bz32", &b, &memory).unwrap();
    assert_eq!((state.rip, state.efer), (0x100_0000, 0));
    assert!(state.cr0 & cr0::PG == 0);
}

#[test]
fn elf_starts_by_pvh_or_multiboot() {
    let memory = Memory::new(64 << 20, 0).unwrap();
    for bits in [32, 64] {
        let state = try_load(&format!("pvh{bits}"), &elf(bits, true), &memory).unwrap();
        assert_eq!((state.rip, state.gpr[gpr::RBX]), (0x10_0020, at::INFO));
        assert_eq!(word(&memory, at::INFO), 0x336e_c578);
        let list = word(&memory, at::INFO + 16);
        assert_eq!(text(&memory, word(&memory, list), 6), "a disk");
    }
    let mut b = elf(32, false);
    assert!(
        try_load("none", &b, &memory)
            .unwrap_err()
            .to_string()
            .contains("neither a PVH note nor a multiboot header")
    );
    put_multiboot(&mut b, 0x210, 3, [0; 5]);
    let state = try_load("mb", &b, &memory).unwrap();
    assert_eq!((state.rip, state.gpr[gpr::RAX], state.gpr[gpr::RBX]), (0x10_0010, 0x2bad_b002, at::INFO));
    assert_eq!(word(&memory, at::INFO + 8), (63 << 20) / 1024);
    let module = word(&memory, at::INFO + 24);
    assert_eq!(text(&memory, word(&memory, module), 6), "a disk");
}

#[test]
fn damaged_files_are_refused_in_one_sentence() {
    let small = Memory::new(8 << 20, 0).unwrap();
    assert!(matches!(try_load("small", &bzimage(), &small), Err(Error::TooLarge { .. })));
    let memory = Memory::new(64 << 20, 0).unwrap();
    for (name, bytes) in
        [("empty", vec![]), ("text", b"hello".to_vec()), ("gzip", b"\x1f\x8b\x08\0".to_vec())]
    {
        let error = try_load(name, &bytes, &memory).unwrap_err().to_string();
        assert!(error.contains("lodge-boot-") && !error.contains('\n'), "{error}");
    }
    let mut low = elf(64, true);
    put(&mut low, 64 + 24, &0x1000u64.to_le_bytes());
    assert!(try_load("low", &low, &memory).is_err());
}

/// A multiboot header with `flags` and addresses, at `at`.
fn put_multiboot(bytes: &mut [u8], at: usize, flags: u32, addresses: [u32; 5]) {
    let fixed = [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002u32.wrapping_add(flags))];
    for (n, word) in fixed.iter().chain(&addresses).enumerate() {
        put(bytes, at + 4 * n, &word.to_le_bytes());
    }
}

/// A file that is no ELF, whose multiboot header, 16 bytes into it, says to load all of it at 2 MiB.
fn flat_multiboot() -> Vec<u8> {
    let mut b = vec![0x90; 0x200];
    put_multiboot(&mut b, 16, 1 << 16, [0x20_0010, 0x20_0000, 0, 0x20_8000, 0x20_0040]);
    b
}

#[test]
fn multiboot_by_addresses_and_by_virtual_entry() {
    let memory = Memory::new(64 << 20, 0).unwrap();
    let state = try_load("flat", &flat_multiboot(), &memory).unwrap();
    assert_eq!(state.rip, 0x20_0040);
    assert_eq!(word(&memory, 0x20_0010), 0x1bad_b002);
    let mut missing = flat_multiboot();
    put_multiboot(&mut missing, 16, 0, [0; 5]);
    assert!(try_load("flat-without", &missing, &memory).is_err());
    let mut unknown = flat_multiboot();
    put_multiboot(&mut unknown, 16, 1 << 16 | 1 << 5, [0x20_0010, 0x20_0000, 0, 0, 0x20_0040]);
    assert!(try_load("flat-unknown", &unknown, &memory).unwrap_err().to_string().contains("features"));

    // Linked at 3 GiB, loaded at 1 MiB.
    let mut high = elf(32, false);
    put_multiboot(&mut high, 0x210, 0, [0; 5]);
    put(&mut high, 24, &0xc000_0010u32.to_le_bytes());
    put(&mut high, 52 + 8, &0xc000_0000u32.to_le_bytes());
    assert_eq!(try_load("high", &high, &memory).unwrap().rip, 0x10_0010);
}

/// Any damage to any header gives an error or a loaded guest, never a panic. `LODGE_MUTATIONS` says how often to try.
#[test]
fn mutated_headers_do_no_harm() {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let times = std::env::var("LODGE_MUTATIONS").map_or(5000, |n| n.parse().unwrap());
    println!("seed {x:#x}, {times} times");
    let mut multiboot = elf(32, false);
    put_multiboot(&mut multiboot, 0x210, 3, [0; 5]);
    let originals = [bzimage(), elf(32, true), elf(64, true), multiboot, flat_multiboot()];
    let memory = Memory::new(64 << 20, 0).unwrap();
    for n in 0..times {
        let kind = n % originals.len();
        let mut b = originals[kind].clone();
        for _ in 0..=n % 4 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let area = [0x1f0..0x270, 0..0x320, 0..0x320, 0..0x230, 16..48][kind].clone();
            let at = area.start + (x >> 8) as usize % (area.end - area.start);
            b[at] = [0, 0xff, 0x7f, 0x80, (x >> 48) as u8][(x >> 40) as usize % 5];
        }
        if kind == 4 {
            // Else the sum would be all that is tested.
            let words: Vec<u32> =
                (0..7).map(|n| u32::from_le_bytes(b[20 + 4 * n..][..4].try_into().unwrap())).collect();
            put_multiboot(&mut b, 16, words[0] & 0x1_0007, words[2..].try_into().unwrap());
        }
        b.truncate(if n % 3 == 0 { (x >> 16) as usize % b.len() } else { b.len() });
        let _ = try_load("mutated", &b, &memory);
    }
}

/// Debian's kernels, where the cache has any.
#[test]
fn real_kernels_are_understood() {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache")));
    let files = cache.and_then(|c| std::fs::read_dir(c.join("lodge/files")).ok());
    let paths = files.into_iter().flatten().flatten().map(|f| f.path());
    let kernels: Vec<_> = paths.filter(|p| p.to_string_lossy().contains("-vmlinuz-")).collect();
    if kernels.is_empty() {
        println!("skipped: no kernel in Lodge's cache; `lodge run` fetches one");
    }
    for path in kernels {
        let memory = Memory::new(256 << 20, 0).unwrap();
        let state = load(&memory, &Kernel { kernel: &path, initrd: &[], cmdline: "quiet", rsdp: 0xe_0000 })
            .unwrap_or_else(|error| panic!("{error}"));
        let long = state.efer & efer::LMA != 0;
        let place = word(&memory, at::ZERO_PAGE + 0x214);
        println!("{}: 64-bit entry: {long}, at {place:#x}", path.display());
        assert_eq!(state.rip, if long { place + 0x200 } else { place });
        // Every kernel's entry clears the direction flag first: that is code, and not the file's set-up part.
        assert_eq!(word(&memory, state.rip) & 0xff, 0xfc, "{}", path.display());
    }
}

#[test]
fn the_map_tells_all_ram_and_nothing_twice() {
    let memory = Memory::new(3 << 30, 0).unwrap();
    let ranges = map::ranges(&memory);
    assert!(ranges.windows(2).all(|w| w[0].start + w[0].size <= w[1].start), "{ranges:x?}");
    let ram: u64 = ranges.iter().filter(|r| r.kind == map::Use::Ram).map(|r| r.size).sum();
    assert_eq!(ram, (3 << 30) - (at::HIGH - at::EBDA));
    let last = ranges.last().unwrap();
    assert_eq!((last.start, last.size), (memory::HOLE_END, 1 << 30));
}

fn acpi_config(cpus: u32) -> acpi::Config {
    let pm = acpi::Pm { event: 0x600, control: 0x604, timer: 0x608, gpe0: 0x620, gpe0_len: 16, s5: 0 };
    let (window32, window64) = (vec![acpi::PCI_WINDOW], (1 << 39, 1 << 38));
    acpi::Config {
        cpus,
        screen: true,
        pm,
        sci: 9,
        pci_windows32: window32,
        pci_window64: window64,
        mcfg: acpi::MCFG,
        hotplug: acpi::HotPlug { port: 0xcc0, gpe: 1, slots: 0x7fff_fffe },
        pluggable: None,
    }
}

#[test]
fn memory_that_may_come_is_told_of() {
    let (gib, fixed) = (1u64 << 30, vec![0..0xa_0000, 0x10_0000..1 << 30]);
    let pluggable = Some(acpi::PluggableMemory { fixed, room: 4 * gib..7 * gib });
    let config = acpi::Config { pluggable, ..acpi_config(257) };
    let tables = acpi::build(&config);
    let (_, srat) = tables.iter().find(|(name, _)| *name == "SRAT").unwrap();
    let (mut entries, mut found) = (&srat[48..], Vec::new());
    while let [kind, len, ..] = *entries {
        if kind == 1 {
            let word = |at: usize| u64::from_le_bytes(entries[at..at + 8].try_into().unwrap());
            found.push((word(8), word(16), entries[28]));
        }
        entries = &entries[usize::from(len)..];
    }
    assert_eq!(found, [(0, 0xa_0000, 1), (0x10_0000, gib - 0x10_0000, 1), (4 * gib, 3 * gib, 3)]);
    let memory = Memory::new(64 << 20, 0).unwrap();
    let rsdp = tables.place(&memory).unwrap();
    assert_eq!(check_acpi(&memory, rsdp), ["FACP", "APIC", "HPET", "MCFG", "SRAT"]);
}

#[test]
fn processors_beyond_the_8_bit_apic_ids_are_x2apics() {
    let config = acpi_config(257);
    let tables = acpi::build(&config);
    let (_, madt) = tables.iter().find(|(name, _)| *name == "APIC").unwrap();
    let mut entries = &madt[44..];
    let mut counts = [0; 16];
    while let [kind, len, ..] = *entries {
        counts[usize::from(kind)] += 1;
        entries = &entries[usize::from(len)..];
    }
    assert_eq!((counts[0], counts[9], counts[1]), (255, 2, 1));
    tables.place(&Memory::new(64 << 20, 0).unwrap()).unwrap();
}

#[test]
fn firmware_is_seen_at_the_reset_vector_and_below_one_mib() {
    let mut bytes = vec![0x90; 0x4_0000];
    put(&mut bytes, 0x3_fff0, b"reset");
    let path = file("firmware", &bytes);
    let memory = Memory::new(4 << 20, rom_size(&path).unwrap()).unwrap();
    load_firmware(&memory, &path).unwrap();
    std::fs::remove_file(path).unwrap();
    assert_eq!(text(&memory, 0xffff_fff0, 5), "reset");
    assert_eq!(text(&memory, 0xf_fff0, 5), "reset");
}

/// Checks the tables at `rsdp`; their signatures.
fn check_acpi(memory: &Memory, rsdp: u64) -> Vec<String> {
    assert_eq!(text(memory, rsdp, 8), "RSD PTR ");
    assert_eq!(rsdp % 16, 0);
    let sum = |at: u64, len: u64| (0..len).fold(0u8, |s, i| s.wrapping_add(word(memory, at + i) as u8));
    assert_eq!((sum(rsdp, 20), sum(rsdp, 36)), (0, 0));
    let xsdt = word(memory, rsdp + 24);
    let tables = (0..(word(memory, xsdt + 4) - 36) / 8).map(|n| word(memory, xsdt + 36 + 8 * n));
    let seen = tables.map(|table| {
        assert_eq!(sum(table, word(memory, table + 4)), 0);
        text(memory, table, 4)
    });
    seen.collect()
}

#[test]
fn acpi_tables_are_linked_and_sum_to_zero() {
    let memory = Memory::new(64 << 20, 0).unwrap();
    let config = acpi_config(3);
    let rsdp = acpi::build(&config).place(&memory).unwrap();
    assert_eq!(check_acpi(&memory, rsdp), ["FACP", "APIC", "HPET", "MCFG"]);
    if let Ok(directory) = std::env::var("LODGE_DUMP_ACPI") {
        for (name, bytes) in acpi::build(&config).iter() {
            std::fs::write(Path::new(&directory).join(format!("{name}.dat")), bytes).unwrap();
        }
    }
}

/// As firmware does what the commands say.
#[test]
fn acpi_tables_come_together_by_the_loader() {
    let memory = Memory::new(64 << 20, 0).unwrap();
    let acpi::ForFirmware { mut tables, mut rsdp, loader } = acpi::build(&acpi_config(2)).for_firmware();
    let (high, low) = (0x200_0040u64, 0xf_1230u64);
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    for command in loader.chunks(128) {
        let name =
            |at: usize| String::from_utf8(command[at..].split(|b| *b == 0).next().unwrap().into()).unwrap();
        let file = if name(4) == acpi::RSDP { &mut rsdp } else { &mut tables };
        let field = |n: usize| number(&command[60 + 4 * n..][..4]) as usize;
        match number(&command[..4]) {
            1 => assert!([high, low].iter().any(|at| at % field(0) as u64 == 0)),
            2 => {
                assert_eq!(name(60), acpi::TABLES);
                let (offset, width) = (number(&command[116..120]) as usize, command[120].into());
                let field = &mut file[offset..][..width];
                let value = number(field) + high;
                field.copy_from_slice(&value.to_le_bytes()[..width]);
            }
            3 => {
                let sum = file[field(1)..][..field(2)].iter().fold(0u8, |s, b| s.wrapping_sub(*b));
                file[field(0)] = file[field(0)].wrapping_add(sum);
            }
            other => panic!("command {other}"),
        }
    }
    place::bytes(&memory, high, &tables).unwrap();
    place::bytes(&memory, low, &rsdp).unwrap();
    assert_eq!(check_acpi(&memory, low), ["FACP", "APIC", "HPET", "MCFG"]);
}
