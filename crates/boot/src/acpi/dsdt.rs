//! The DSDT: the devices that cannot be found by asking them.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    PackageBuilder, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{Config, MCFG_SIZE};

/// AML that is being made.
pub(super) struct Bytes(pub Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// Makes the table.
pub fn build(config: &Config) -> Sdt {
    let mut aml = Bytes(Vec::new());
    sleep(config).to_aml_bytes(&mut aml);
    processors(config, &mut aml);
    pci(config, &mut aml);
    config.hotplug.event(&mut aml);
    let mut table = super::tables::table(b"DSDT", 36, 2);
    table.append_slice(&aml.0);
    table
}

pub(super) fn path(name: &str) -> Path {
    Path::new(name)
}

/// \_S5: what to write to PM1a control to power off.
fn sleep(config: &Config) -> Name {
    let mut package = PackageBuilder::new();
    for value in [config.pm.s5, config.pm.s5, 0, 0] {
        package.add_element(&value);
    }
    Name::new(path("\\_S5_"), &package)
}

fn processors(config: &Config, aml: &mut Bytes) {
    let mut inside = Bytes(Vec::new());
    for id in 0..config.cpus {
        let (hid, uid) = (Name::new(path("_HID"), &"ACPI0007"), Name::new(path("_UID"), &id));
        Device::new(path(&format!("C{id:03X}")), vec![&hid, &uid]).to_aml_bytes(&mut inside);
    }
    Scope::new(path("\\_SB_"), vec![&Raw(inside.0)]).to_aml_bytes(aml);
}

/// AML that is made already.
pub(super) struct Raw(pub Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// A device with an id, a number, and resources.
fn device(name: &str, hid: &str, uid: u32, resources: Vec<&dyn Aml>) -> Raw {
    let mut bytes = Bytes(Vec::new());
    let (hid, uid) = (Name::new(path("_HID"), &EISAName::new(hid)), Name::new(path("_UID"), &uid));
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(resources));
    Device::new(path(name), vec![&hid, &uid, &crs]).to_aml_bytes(&mut bytes);
    Raw(bytes.0)
}

/// Which GSI an INTx pin of bus 0 is wired to, by device and pin.
fn routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in 0..32u32 {
        for pin in 0..4u32 {
            let mut entry = PackageBuilder::new();
            entry.add_element(&(slot << 16 | 0xffff));
            entry.add_element(&pin);
            entry.add_element(&0u32);
            entry.add_element(&crate::acpi::intx_gsi(slot, pin));
            table.add_element(&entry);
        }
    }
    table
}

fn keyboard() -> Raw {
    let ports = [IO::new(0x60, 0x60, 1, 1), IO::new(0x64, 0x64, 1, 1)];
    device("KBD_", "PNP0303", 0, vec![&ports[0], &ports[1], &Interrupt::new(true, true, false, false, 1)])
}

fn mouse() -> Raw {
    device("MOU_", "PNP0F13", 0, vec![&Interrupt::new(true, true, false, false, 12)])
}

fn pci(config: &Config, aml: &mut Bytes) {
    let hid = Name::new(path("_HID"), &EISAName::new("PNP0A08"));
    let cid = Name::new(path("_CID"), &EISAName::new("PNP0A03"));
    let numbers = ["_UID", "_SEG", "_BBN"].map(|name| Name::new(path(name), &0u32));
    let (start64, size64) = config.pci_window64;
    let memory = |start: u64, end: u64| {
        let not_cached = AddressSpaceCacheable::NotCacheable;
        AddressSpace::new_memory(not_cached, true, start as u32, end as u32 - 1, None)
    };
    let windows: Vec<_> = std::iter::once(memory(0xa_0000, 0xc_0000))
        .chain(config.pci_windows32.iter().map(|window| memory(window.start, window.end)))
        .collect();
    let buses = AddressSpace::new_bus_number(0u16, 0xff);
    let configuration = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports = [AddressSpace::new_io(0u16, 0xcf7, None), AddressSpace::new_io(0xd00u16, 0xffff, None)];
    let not_cached = AddressSpaceCacheable::NotCacheable;
    let high = AddressSpace::new_memory(not_cached, true, start64, start64 + size64 - 1, None);
    let mut resources: Vec<&dyn Aml> = vec![&buses, &configuration, &ports[0], &ports[1]];
    resources.extend(windows.iter().map(|window| window as &dyn Aml));
    resources.push(&high);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(resources));
    let prt = Name::new(path("_PRT"), &routing());

    // Behind the ISA bridge.
    let com1 = device(
        "COM1",
        "PNP0501",
        1,
        vec![&IO::new(0x3f8, 0x3f8, 1, 8), &Interrupt::new(true, true, false, false, 4)],
    );
    let rtc = device(
        "RTC_",
        "PNP0B00",
        0,
        vec![&IO::new(0x70, 0x70, 1, 8), &Interrupt::new(true, true, false, false, 8)],
    );
    let isa_address = Name::new(path("_ADR"), &0x001f_0000u32);
    let (keyboard, mouse) = (keyboard(), mouse());
    let mut behind: Vec<&dyn Aml> = vec![&isa_address, &com1, &rtc];
    if config.screen {
        behind.extend([&keyboard as &dyn Aml, &mouse]);
    }
    let isa = Device::new(path("ISA_"), behind);

    let [uid, seg, bbn] = &numbers;
    let slots = config.hotplug.of_bridge();
    let root = Device::new(path("PCI0"), vec![&hid, &cid, uid, seg, bbn, &crs, &prt, &isa, &slots]);
    let hpet = device("HPET", "PNP0103", 0, vec![&Memory32Fixed::new(true, 0xfed0_0000, 0x400)]);
    let mcfg =
        device("MCFG", "PNP0C02", 1, vec![&Memory32Fixed::new(true, config.mcfg as u32, MCFG_SIZE as u32)]);
    let fw_cfg_hid = Name::new(path("_HID"), &"QEMU0002");
    let fw_cfg_crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&IO::new(0x510, 0x510, 1, 12)]));
    let fw_cfg = Device::new(path("FWCF"), vec![&fw_cfg_hid, &fw_cfg_crs]);
    Scope::new(path("\\_SB_"), vec![&root, &hpet, &mcfg, &fw_cfg]).to_aml_bytes(aml);
}
