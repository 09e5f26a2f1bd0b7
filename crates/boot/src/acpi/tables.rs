//! The tables but for the DSDT.

use acpi_tables::sdt::Sdt;

use super::{Blob, Config, PluggableMemory, dsdt};

const OEM: [u8; 6] = *b"LODGE ";
const OEM_TABLE: [u8; 8] = *b"LODGEPC ";

const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
const HPET: u64 = 0xfed0_0000;

/// Offsets of addresses in the FADT (ACPI 6.5, table 5.9).
mod fadt {
    pub const LEN: u32 = 276;
    pub const FACS: usize = 36;
    pub const DSDT: usize = 40;
    pub const X_FACS: usize = 132;
    pub const X_DSDT: usize = 140;
}

/// All tables, in the order in which they are placed.
pub fn all(config: &Config) -> Vec<Blob> {
    let mut all = vec![facs(), plain("DSDT", dsdt::build(config)), fadt(config), plain("APIC", madt(config))];
    all.push(plain("HPET", hpet()));
    all.push(plain("MCFG", mcfg(config)));
    let mut listed = vec!["FACP", "APIC", "HPET", "MCFG"];
    if let Some(pluggable) = &config.pluggable {
        all.push(plain("SRAT", srat(config.cpus, pluggable)));
        listed.push("SRAT");
    }
    all.push(root("RSDT", 4, &listed));
    all.push(root("XSDT", 8, &listed));
    all.push(rsdp());
    all
}

pub fn table(signature: &[u8; 4], len: u32, revision: u8) -> Sdt {
    Sdt::new(*signature, len, revision, OEM, OEM_TABLE, 1)
}

fn plain(name: &'static str, sdt: Sdt) -> Blob {
    Blob { bytes: sdt.as_slice().to_vec(), links: Vec::new(), name, align: 16 }
}

/// Sets the checksums of a table whose addresses were put in.
pub fn fix_checksums(blob: &mut Blob) {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_sub(*b));
    match blob.name {
        "FACS" => {}
        "RSDP" => {
            (blob.bytes[8], blob.bytes[32]) = (0, 0);
            blob.bytes[8] = sum(&blob.bytes[..20]);
            blob.bytes[32] = sum(&blob.bytes);
        }
        _ => {
            blob.bytes[9] = 0;
            blob.bytes[9] = sum(&blob.bytes);
        }
    }
}

fn facs() -> Blob {
    let mut bytes = vec![0; 64];
    bytes[..4].copy_from_slice(b"FACS");
    bytes[4] = 64;
    bytes[32] = 2; // version
    Blob { bytes, links: Vec::new(), name: "FACS", align: 64 }
}

/// A generic address: an I/O port of `bits` (ACPI 6.5, 5.2.3.2).
fn io(sdt: &mut Sdt, offset: usize, port: u16, bits: u8) {
    sdt.write_bytes(offset, &[1, bits, 0, if bits == 8 { 1 } else { 0 }]);
    sdt.write_u64(offset + 4, port.into());
}

fn fadt(config: &Config) -> Blob {
    let pm = &config.pm;
    let mut t = table(b"FACP", fadt::LEN, 6);
    t.write_u16(46, config.sci.into());
    // SMI_CMD is 0: the machine is always in ACPI mode.
    t.write_u32(56, pm.event.into());
    t.write_u32(64, pm.control.into());
    t.write_u32(76, pm.timer.into());
    t.write_u32(80, pm.gpe0.into());
    t.write_bytes(88, &[4, 2, 0, 4, pm.gpe0_len]);
    t.write_u16(96, 0xfff); // no C2
    t.write_u16(98, 0xfff); // no C3
    t.write_u8(108, 0x32); // the RTC's century
    // Legacy devices; an 8042 to drive, or no VGA.
    t.write_u16(109, 1 << 0 | if config.screen { 1 << 1 } else { 1 << 2 });
    // WBINVD works; C1 on all; sleep button is no fixed one; reset register.
    t.write_u32(112, 1 << 0 | 1 << 2 | 1 << 5 | 1 << 10);
    io(&mut t, 116, 0xcf9, 8);
    t.write_u8(128, 6);
    t.write_u8(131, 5); // minor version
    io(&mut t, 148, pm.event, 32);
    io(&mut t, 172, pm.control, 16);
    io(&mut t, 208, pm.timer, 32);
    io(&mut t, 220, pm.gpe0, pm.gpe0_len * 8);
    t.write_bytes(268, b"KVMKVMKV"); // hypervisor vendor: as CPUID says
    let links = vec![
        (fadt::FACS, 4, "FACS"),
        (fadt::DSDT, 4, "DSDT"),
        (fadt::X_FACS, 8, "FACS"),
        (fadt::X_DSDT, 8, "DSDT"),
    ];
    Blob { bytes: t.as_slice().to_vec(), links, name: "FACP", align: 16 }
}

/// Processors and interrupt controllers (ACPI 6.5, 5.2.12).
fn madt(config: &Config) -> Sdt {
    let mut t = table(b"APIC", 36, 5);
    t.append_slice(&LAPIC.to_le_bytes());
    t.append_slice(&1u32.to_le_bytes()); // 8259s are there too
    for id in 0..config.cpus {
        if id < 255 {
            t.append_slice(&[0, 8, id as u8, id as u8, 1, 0, 0, 0]);
        } else {
            t.append_slice(&[9, 16, 0, 0]);
            [id, 1, id].iter().for_each(|w| t.append_slice(&w.to_le_bytes()));
        }
    }
    t.append_slice(&[1, 12, 0, 0]);
    [IOAPIC, 0].iter().for_each(|w| t.append_slice(&w.to_le_bytes()));
    t.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]); // IRQ 0 is GSI 2
    t.append_slice(&[2, 10, 0, config.sci, config.sci, 0, 0, 0, 0xd, 0]); // level-triggered, active high
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]); // NMI at LINT1 of all
    t
}

/// The HPET (IA-PC HPET specification 1.0a, 3.2.4).
fn hpet() -> Sdt {
    let mut t = table(b"HPET", 36, 1);
    t.append_slice(&0x8086_a201u32.to_le_bytes());
    t.append_slice(&[0, 64, 0, 0]);
    t.append_slice(&HPET.to_le_bytes());
    t.append_slice(&[0, 100, 0, 0]); // number 0, minimum tick 100
    t
}

/// PCI configuration space in memory (PCI Firmware specification 3.3, 4.1.2).
fn mcfg(config: &Config) -> Sdt {
    let mut t = table(b"MCFG", 36, 1);
    t.append_slice(&[0; 8]);
    t.append_slice(&config.mcfg.to_le_bytes());
    t.append_slice(&[0, 0, 0, 0xff, 0, 0, 0, 0]); // segment 0, buses 0 to 255
    t
}

/// Which memory there is and may come (ACPI 6.5, 5.2.16), all of it in domain 0 with all processors: a system may have to know the
/// highest address before it has memory there, to tell whether devices reach all of it.
fn srat(cpus: u32, memory: &PluggableMemory) -> Sdt {
    let mut t = table(b"SRAT", 36, 3);
    t.append_slice(&1u32.to_le_bytes());
    t.append_slice(&[0; 8]);
    for id in 0..cpus {
        if id < 255 {
            t.append_slice(&[0, 16, 0, id as u8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        } else {
            t.append_slice(&[2, 24, 0, 0]);
            [0, id, 1, 0, 0].iter().for_each(|w| t.append_slice(&w.to_le_bytes()));
        }
    }
    const ENABLED: u32 = 1;
    const HOT_PLUGGABLE: u32 = 2;
    let fixed = memory.fixed.iter().map(|range| (range, ENABLED));
    for (range, flags) in fixed.chain([(&memory.room, ENABLED | HOT_PLUGGABLE)]) {
        t.append_slice(&[1, 40, 0, 0, 0, 0, 0, 0]);
        t.append_slice(&range.start.to_le_bytes());
        t.append_slice(&(range.end - range.start).to_le_bytes());
        [0, flags, 0, 0].iter().for_each(|w| t.append_slice(&w.to_le_bytes()));
    }
    t
}

fn root(name: &'static str, width: usize, listed: &[&'static str]) -> Blob {
    let signature = if width == 4 { b"RSDT" } else { b"XSDT" };
    let t = table(signature, 36 + (width * listed.len()) as u32, 1);
    let links = listed.iter().enumerate().map(|(n, to)| (36 + n * width, width, *to)).collect();
    Blob { bytes: t.as_slice().to_vec(), links, name, align: 16 }
}

fn rsdp() -> Blob {
    let mut bytes = vec![0; 36];
    bytes[..8].copy_from_slice(b"RSD PTR ");
    bytes[9..15].copy_from_slice(&OEM);
    bytes[15] = 2;
    bytes[20] = 36;
    Blob { bytes, links: vec![(16, 4, "RSDT"), (24, 8, "XSDT")], name: "RSDP", align: 16 }
}
