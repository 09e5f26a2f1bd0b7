//! The slots of bus 0, whose devices come and go while the system runs (ACPI 6.5, 5.6.6 and 6.3).

use acpi_tables::aml::{
    And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Local,
    MethodCall, Name, Notify, OpRegion, OpRegionSpace, ResourceTemplate, Scope, Store, Zero,
};
use acpi_tables::aml::{EISAName, Method, Path};
use acpi_tables::{Aml, AmlSink};

use super::dsdt::{Bytes, Raw, path};

/// Ports of the registers, which are of 32 bits, with a bit for each device of the bus: devices that came, devices that are to go,
/// and, to be written, devices that the system gives up.
const LEN: u8 = 0x10;
const REGISTERS: [&[u8; 4]; 3] = [b"PCIU", b"PCID", b"PCIE"];
/// What a slot is told (5.6.6): look whether there is a device; give it up.
const DEVICE_CHECK: u32 = 1;
const EJECT_REQUEST: u32 = 3;

/// What the tables tell of hot-plug.
#[derive(Clone, Copy, Debug)]
pub struct HotPlug {
    /// First port of its registers.
    pub port: u16,
    /// The general-purpose event that tells of news, 0 to 63.
    pub gpe: u8,
    /// Devices of bus 0 that may come or go, a bit for each.
    pub slots: u32,
}

impl HotPlug {
    fn slots(&self) -> impl Iterator<Item = u32> {
        let slots = self.slots;
        (0..32).filter(move |slot| slots >> slot & 1 == 1)
    }

    /// The objects for the host bridge's device.
    pub(super) fn of_bridge(&self) -> Raw {
        let mut aml = Bytes(Vec::new());
        let (hid, crs) = (
            Name::new(path("_HID"), &EISAName::new("PNP0A06")),
            Name::new(path("_CRS"), &ResourceTemplate::new(vec![&IO::new(self.port, self.port, 1, LEN)])),
        );
        Device::new(path("PHPR"), vec![&hid, &crs]).to_aml_bytes(&mut aml);
        OpRegion::new(path("PCST"), OpRegionSpace::SystemIO, &self.port, &LEN).to_aml_bytes(&mut aml);
        let entries = REGISTERS.iter().map(|name| FieldEntry::Named(**name, 32)).collect();
        let (access, rule) = (FieldAccessType::DWord, FieldUpdateRule::WriteAsZeroes);
        Field::new(path("PCST"), access, FieldLockRule::NoLock, rule, entries).to_aml_bytes(&mut aml);
        self.slots().for_each(|slot| self::slot(slot, &mut aml));
        self.tell(&mut aml);
        Raw(aml.0)
    }

    /// Reads the news, and tells each slot of its own.
    fn tell(&self, aml: &mut Bytes) {
        let [up, down, _] = REGISTERS.map(|name| path(&String::from_utf8_lossy(name)));
        let mut body = Bytes(Vec::new());
        Store::new(&Local(0), &up).to_aml_bytes(&mut body);
        Store::new(&Local(1), &down).to_aml_bytes(&mut body);
        for slot in self.slots() {
            let device = name(slot);
            for (news, what) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
                let (bit, notify) = (1u32 << slot, Notify::new(&device, &what));
                If::new(&And::new(&Zero {}, &news, &bit), vec![&notify]).to_aml_bytes(&mut body);
            }
        }
        Method::new(path("PCNT"), 0, true, vec![&Raw(body.0)]).to_aml_bytes(aml);
    }

    /// What the event does.
    pub(super) fn event(&self, sink: &mut dyn AmlSink) {
        let tell = MethodCall::new(path("\\_SB_.PCI0.PCNT"), Vec::new());
        // The letter says that the event is an edge.
        let method = Method::new(path(&format!("_E{:02X}", self.gpe)), 0, false, vec![&tell]);
        Scope::new(path("\\_GPE"), vec![&method]).to_aml_bytes(sink);
    }
}

fn name(slot: u32) -> Path {
    path(&format!("S{slot:02X}_"))
}

fn slot(slot: u32, aml: &mut Bytes) {
    let address = Name::new(path("_ADR"), &(slot << 16));
    let number = Name::new(path("_SUN"), &slot);
    let (eject, bit) = (path("PCIE"), 1u32 << slot);
    let give_up = Store::new(&eject, &bit);
    let eject = Method::new(path("_EJ0"), 1, false, vec![&give_up]);
    Device::new(name(slot), vec![&address, &number, &eject]).to_aml_bytes(aml);
}
