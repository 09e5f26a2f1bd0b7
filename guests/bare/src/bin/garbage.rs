//! Reads and writes every port, PCI configuration space and the registers of IOAPIC, LAPIC and HPET at random, then
//! reports. Left out is what rightly ends the machine: power-off, reset, INIT, debug-exit.
#![no_std]
#![no_main]

use bare::{
    acpi::{self, peek},
    apic, cpu,
    cpu::{inb, inl, inw, outb, outl, outw},
    println,
    report::Report,
    serial, trap,
};

bare::guest!(main);

/// Xorshift, always the same sequence.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }
}

fn main() {
    let mut t = Report::new("garbage");
    let seed = 0x1234_5678_9abc_def1;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    cpu::cli();
    // What is asked to interrupt may do so by NMI only; that is fine.
    trap::hook(trap::NMI, Some(|_| true));
    let deadly = Deadly::find();

    for _ in 0..2 {
        devices(&mut random);
    }
    done("IOAPIC, LAPIC, HPET");
    pci(&mut random);
    done("PCI configuration space");
    ports(&mut random, &deadly);
    quiet();
    serial::init();
    println!("");
    t.check("still here", true);
    t.end()
}

fn done(what: &str) {
    println!("done: {what}");
}

/// Ports that may end the machine, from the ACPI tables: PM1 control, sleep control, reset.
struct Deadly {
    ports: [u16; 4],
    on_tcg: bool,
}

impl Deadly {
    fn find() -> Self {
        let fadt = acpi::table(b"FACP").unwrap_or(0);
        let far = |offset: u32| {
            if peek::<u32>(fadt + 4) > offset + 12 { peek::<u64>(fadt + u64::from(offset) + 4) } else { 0 }
        };
        let ports = [peek::<u32>(fadt + 64) as u16, far(116) as u16, far(172) as u16, far(244) as u16];
        Deadly { ports, on_tcg: cpu::on_tcg() }
    }

    /// Whether a write to one of `width` ports from `port` is left out.
    fn has(&self, port: u16, width: u16) -> bool {
        let touches = |first: u16, count: u16| port < first + count && first < port + width;
        let known = [(0xf4, 4), (0x60, 1), (0x64, 1), (0x92, 1), (0xcf9, 1)];
        // QEMU's chip set has a watchdog and SMIs too.
        let qemu = self.on_tcg && (touches(self.ports[0] & 0xff80, 128) || touches(0xb2, 2));
        qemu || known.iter().any(|&(first, count)| touches(first, count))
            || self.ports.iter().any(|&p| p != 0 && touches(p, 2))
    }
}

fn ports(random: &mut Random, deadly: &Deadly) {
    for port in 0..0xfff8u16 {
        inb(port);
        if !deadly.has(port, 1) {
            outb(port, random.next() as u8);
        }
    }
    for port in (0..0x1000u16).step_by(2) {
        inw(port);
        if !deadly.has(port, 2) {
            outw(port, random.next() as u16);
        }
        // QEMU's 16550 asserts when a wide access straddles its begin.
        if deadly.on_tcg && port & 2 != 0 {
            continue;
        }
        inl(port);
        if !deadly.has(port, 4) {
            outl(port, random.next());
        }
    }
}

fn config(address: u32) -> u32 {
    outl(0xcf8, 0x8000_0000 | address);
    inl(0xcfc)
}

fn set_config(address: u32, value: u32) {
    outl(0xcf8, 0x8000_0000 | address);
    outl(0xcfc, value);
}

/// Writes to every function of bus 0 (under QEMU not to the chip set's, which move RAM and the PM ports), and gives
/// each its header back.
fn pci(random: &mut Random) {
    for function in 0..256u32 {
        let base = function << 8;
        let id = config(base);
        let class = config(base + 8) >> 16;
        if id == u32::MAX || cpu::on_tcg() && matches!(class, 0x0600 | 0x0601) {
            continue;
        }
        let header: [u32; 16] = core::array::from_fn(|i| config(base + 4 * i as u32));
        for _ in 0..500 {
            let value = random.next();
            let register = random.next() & 0xff;
            outl(0xcf8, 0x8000_0000 | base | register & 0xfc);
            match value & 3 {
                0 => outb(0xcfc + (register & 3) as u16, random.next() as u8),
                1 => outw(0xcfc + (register & 2) as u16, random.next() as u16),
                _ => outl(0xcfc, random.next()),
            }
            inl(0xcfc);
        }
        for i in [4, 5, 6, 7, 8, 9, 15, 1] {
            set_config(base + 4 * i, header[i as usize]);
        }
    }
    // Functions and registers that do not exist.
    for _ in 0..2000 {
        outl(0xcf8, random.next() | 0x00ff_0000);
        outl(0xcfc, random.next());
        inb(0xcfd);
    }
    outl(0xcf8, 0);
}

fn read_device(address: u64) -> u32 {
    // SAFETY: device registers, identity-mapped.
    unsafe { (address as *const u32).read_volatile() }
}

fn write_device(address: u64, value: u32) {
    // SAFETY: device registers; interrupts are forbidden.
    unsafe { (address as *mut u32).write_volatile(value) };
}

fn devices(random: &mut Random) {
    // Fixed and NMI delivery only: INIT and SMI would end the run. Under QEMU an NMI wakes the second CPU in its BIOS.
    let modes = if cpu::on_tcg() { 0x700 } else { 0x300 };
    let harmless = |value: u32| value & !modes;
    for register in 0..=255 {
        write_device(0xfec0_0000, register);
        read_device(0xfec0_0010);
        write_device(0xfec0_0010, harmless(random.next()));
    }
    for _ in 0..200 {
        write_device(0xfec0_0000 + u64::from(random.next() & 0xffc), harmless(random.next()));
        read_device(0xfec0_0000 + u64::from(random.next() & 0xffc));
    }
    if let Some(hpet) = hpet() {
        for _ in 0..2000 {
            write_device(hpet + u64::from(random.next() & 0x3fc), random.next());
            read_device(hpet + u64::from(random.next() & 0x3fc));
        }
    }
    for _ in 0..2000 {
        apic::write(random.next() & 0xff0, harmless(random.next()));
        apic::read(random.next() & 0xff0);
    }
}

/// The HPET, but not QEMU's, which hangs for good in a short period.
fn hpet() -> Option<u64> {
    acpi::hpet().filter(|&a| (3 << 30..4 << 30).contains(&a) && !cpu::on_tcg())
}

/// Masks everything again.
fn quiet() {
    if let Some(hpet) = hpet() {
        write_device(hpet + 0x10, 0);
    }
    for pin in 0..24 {
        bare::pic::route(pin, bare::pic::MASKED, 0);
    }
    for entry in (0x320..=0x370).step_by(16) {
        apic::write(entry, apic::MASKED);
    }
}
