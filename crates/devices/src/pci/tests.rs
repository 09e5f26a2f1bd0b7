use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use machine::irq::{Line, Msi};
use machine::{Bus, Machine, Memory, Power, Registers};

use super::*;
use crate::testing::{Probe, batter, probe, through_json, time};
use crate::{Saved, lock, pm, reset};

/// A function with every kind of BAR, one register in each, and every kind of interrupt.
struct Dummy {
    config: Config,
    registers: Mutex<[u64; 6]>,
}

impl Dummy {
    fn new() -> Arc<Self> {
        let mut config = Config::new(Id {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: 0x02_0000,
            subsystem: (1, 2),
        });
        config.use_intx();
        assert_eq!(config.add_bar(Bar::Memory64(0x4000)), 0);
        assert_eq!(config.add_bar(Bar::Io(0x20)), 2);
        assert_eq!(config.add_bar(Bar::Memory64(1 << 30)), 3);
        config.add_capability(9, &[0x10, 1, 0, 0, 0, 0]);
        config.add_msi();
        assert_eq!(config.add_msix(3), 5);
        Arc::new(Self { config, registers: Mutex::default() })
    }
}

impl Function for Dummy {
    fn config(&self) -> &Config {
        &self.config
    }
    fn read_bar(&self, bar: usize, _: u64, _: u8) -> u64 {
        lock(&self.registers)[bar]
    }
    fn write_bar(&self, bar: usize, _: u64, _: u8, value: u64) {
        lock(&self.registers)[bar] = value;
    }
}

struct Bed {
    pm: Arc<pm::Pm>,
    machine: Arc<Machine>,
    host: Arc<Host>,
    lpc: Arc<Lpc>,
    dummy: Arc<Dummy>,
    gsis: Vec<Arc<Probe>>,
    messages: mpsc::Receiver<Msi>,
}

fn bed() -> Bed {
    let (clock, timers) = time();
    let power = Power::default();
    let pm = pm::Pm::new(Line::unconnected(), power.clone(), clock.clone(), &timers);
    let machine = Arc::new(Machine {
        memory: Memory::new(2 << 20, 0).unwrap(),
        ports: Bus::default(),
        mmio: Bus::default(),
        clock,
        timers,
        power: power.clone(),
    });
    let (lines, gsis): (Vec<_>, Vec<_>) = (0..24).map(|_| probe()).unzip();
    let lpc = Lpc::new(Arc::downgrade(&machine), pm.clone(), |gsi| lines[usize::from(gsi)].clone());
    let (tx, messages) = mpsc::channel();
    let tx = Arc::new(Mutex::new(tx));
    let pirqs = lpc.clone();
    let host = Host::new(
        Arc::downgrade(&machine),
        Windows::default(),
        move |pirq| pirqs.line(pirq),
        move || {
            let tx = tx.clone();
            Box::new(move |msi| lock(&tx).send(msi).unwrap_or(()))
        },
        reset::Control::new(power),
    );
    host.insert(&machine.ports).unwrap();
    host.plug(Some(LPC), lpc.clone()).unwrap();
    let dummy = Dummy::new();
    assert_eq!(host.plug(None, dummy.clone()).unwrap(), Address::new(1, 0).unwrap());
    Bed { pm, machine, host, lpc, dummy, gsis, messages }
}

impl Bed {
    fn read(&self, device: u64, offset: u64, size: u8) -> u64 {
        self.machine.ports.write(0xcf8, 4, 0x8000_0000 | device << 11 | offset & 0xfc);
        self.machine.ports.read(0xcfc + (offset & 3), size)
    }

    fn write(&self, device: u64, offset: u64, size: u8, value: u64) {
        self.machine.ports.write(0xcf8, 4, 0x8000_0000 | device << 11 | offset & 0xfc);
        self.machine.ports.write(0xcfc + (offset & 3), size, value);
    }
}

#[test]
fn functions_are_found_both_ways() {
    let bed = bed();
    let found: Vec<_> = (0..32).map(|d| bed.read(d, 0, 4)).filter(|&id| id != 0xffff_ffff).collect();
    assert_eq!(found, [0x29c0_8086, 0x1041_1af4, 0x2918_8086]);
    assert_eq!(bed.machine.mmio.read(ECAM.start | 1 << 15, 4), 0x1041_1af4);
    assert_eq!(bed.machine.mmio.read(ECAM.start | 1 << 20, 4), 0xffff_ffff, "no second bus");
    assert_eq!(bed.machine.mmio.read(ECAM.start | 1 << 15 | 0x100, 4), 0xffff_ffff);
    assert_eq!(bed.read(1, 8, 4), 0x0200_0001);
    // The reset control register is in between.
    bed.machine.ports.write(0xcf9, 1, 6);
    assert_eq!(bed.machine.power.requested(), Some(machine::power::End::Reset));
    // Firmware moves the memory-mapped space.
    bed.write(0, 0x60, 4, 0xa000_0005);
    assert_eq!(bed.machine.mmio.read(0xa000_0000 | 1 << 15, 4), 0x1041_1af4);
    assert_eq!(bed.machine.mmio.read(ECAM.start | 1 << 15, 4), 0xffff_ffff);
}

#[test]
fn bars_are_sized_assigned_and_moved() {
    let bed = bed();
    let size = |bar: u64, wide: bool| {
        let old = bed.read(1, 0x10 + 4 * bar, 4);
        bed.write(1, 0x10 + 4 * bar, 4, 0xffff_ffff);
        let low = bed.read(1, 0x10 + 4 * bar, 4);
        bed.write(1, 0x10 + 4 * bar, 4, old);
        if !wide {
            return low;
        }
        bed.write(1, 0x14 + 4 * bar, 4, 0xffff_ffff);
        let high = bed.read(1, 0x14 + 4 * bar, 4);
        bed.write(1, 0x14 + 4 * bar, 4, 0);
        low | high << 32
    };
    assert_eq!(size(0, true), 0xffff_ffff_ffff_c004);
    assert_eq!(size(2, false), 0xffff_ffe1);
    assert_eq!(size(3, true), 0xffff_ffff_c000_0004);
    bed.host.assign().unwrap();
    assert_eq!(bed.read(1, 4, 2) & 3, 3);
    assert_eq!(bed.read(1, 0x1c, 4) | bed.read(1, 0x20, 4) << 32, 512 << 30 | 4);
    let (low, port) = (bed.read(1, 0x10, 4) & !0xf, bed.read(1, 0x18, 4) & !3);
    assert!((0xc000_0000..0xfec0_0000).contains(&low) && (0xc000..0x1_0000).contains(&port));
    bed.machine.mmio.write(low + 8, 4, 0x1111);
    bed.machine.ports.write(port, 2, 0x2222);
    bed.machine.mmio.write((512 << 30) + 0x3fff_fff8, 8, 0x3333);
    assert_eq!(*lock(&bed.dummy.registers), [0x1111, 0, 0x2222, 0x3333, 0, 0]);
    // A kernel puts it elsewhere, on top of something else, and back.
    bed.write(1, 0x10, 4, 0xd000_0000);
    assert_eq!((bed.machine.mmio.read(0xd000_0000, 4), bed.machine.mmio.read(low, 4)), (0x1111, 0xffff_ffff));
    bed.write(1, 0x10, 4, ECAM.start);
    assert_eq!(bed.machine.mmio.read(ECAM.start, 4), 0x29c0_8086);
    bed.write(1, 0x10, 4, 0xd000_0000);
    assert_eq!(bed.machine.mmio.read(0xd000_0000, 4), 0x1111);
    bed.write(1, 4, 2, 1);
    assert_eq!(
        (bed.machine.mmio.read(0xd000_0000, 4), bed.machine.ports.read(port, 2)),
        (0xffff_ffff, 0x2222)
    );
}

#[test]
fn interrupts_go_by_pin_by_msi_and_by_msix() {
    let bed = bed();
    bed.host.assign().unwrap();
    let pirq = Address::new(1, 0).unwrap().pirq(0);
    let gsi = &bed.gsis[usize::from(PIRQ_GSI + pirq)];
    assert_eq!(bed.read(1, 0x3c, 2), 0x100 | u64::from(PIRQ_GSI + pirq));
    bed.dummy.config.set_intx(true);
    assert!(gsi.level());
    assert_eq!(bed.read(1, 6, 1), 0x18);
    // The 8259s get it where the LPC bridge routes it.
    assert!(!bed.gsis[11].level());
    bed.write(0x1f, 0x68 + u64::from(pirq - 4), 1, 11);
    assert!(bed.gsis[11].level());
    bed.write(1, 4, 2, 0x407);
    assert!(!gsi.level() && !bed.gsis[11].level());
    bed.write(1, 4, 2, 7);
    assert!(gsi.level());

    let caps = |id| {
        let mut at = bed.read(1, 0x34, 1);
        while at != 0 && bed.read(1, at, 1) != id {
            at = bed.read(1, at + 1, 1);
        }
        at
    };
    let msi = caps(5);
    bed.write(1, msi + 4, 4, 0xfee0_1000);
    bed.write(1, msi + 12, 2, 0x41);
    bed.dummy.config.notify(0);
    bed.write(1, msi + 2, 2, 1);
    assert!(!gsi.level(), "messages take the pin's place");
    bed.dummy.config.notify(0);
    assert_eq!(bed.messages.try_iter().collect::<Vec<_>>(), [Msi { address: 0xfee0_1000, data: 0x41 }]);

    let msix = caps(0x11);
    assert_eq!(bed.read(1, msix + 2, 2), 2, "three vectors");
    let table = bed.read(1, 0x24, 4);
    assert_eq!(bed.read(1, msix + 8, 4), 0x1005);
    for (at, value) in [(16, 0xfee0_2000), (20, 0), (24, 0x52)] {
        bed.machine.mmio.write(table + at, 4, value);
    }
    bed.write(1, msix + 2, 2, 0xc000);
    assert!(bed.dummy.config.msix_enabled());
    bed.machine.mmio.write(table + 28, 4, 0);
    bed.dummy.config.notify(1);
    bed.dummy.config.notify(7);
    assert_eq!(bed.machine.mmio.read(table + 0x1000, 8), 2, "pending, for all are masked");
    bed.write(1, msix + 2, 2, 0x8000);
    assert_eq!(bed.messages.try_iter().collect::<Vec<_>>(), [Msi { address: 0xfee0_2000, data: 0x52 }]);
    assert_eq!(bed.machine.mmio.read(table + 0x1000, 8), 0);
    bed.machine.mmio.write(table + 28, 4, 1);
    bed.dummy.config.notify(1);
    assert!(bed.messages.try_recv().is_err());
    bed.machine.mmio.write(table + 28, 4, 0);
    assert_eq!(bed.messages.try_iter().count(), 1);
}

#[test]
fn the_pm_block_is_where_the_lpc_bridge_says() {
    let bed = bed();
    assert_eq!(bed.machine.ports.read(pm::PM.start + 4, 2) & 1, 1);
    bed.write(0x1f, 0x40, 4, 0xb001);
    assert_eq!(bed.machine.ports.read(pm::PM.start + 4, 2), 0xffff);
    assert_eq!(bed.machine.ports.read(0xb004, 2) & 1, 1);
    bed.write(0x1f, 0x44, 1, 0);
    assert_eq!(bed.machine.ports.read(0xb004, 2), 0xffff);
    assert_eq!(bed.lpc.state(), Saved::V1(LpcState::default()));
}

#[test]
fn state_moves_to_another_bus() {
    let (one, two) = (bed(), bed());
    one.host.assign().unwrap();
    one.write(1, 0x10, 4, 0xd000_0000);
    one.write(0x1f, 0x40, 4, 0xb001);
    one.write(0, 0x60, 4, 0xa000_0005);
    two.host.set_state(&through_json(&one.host.state()));
    assert_eq!(two.host.state(), one.host.state());
    two.machine.mmio.write(0xd000_0000, 4, 0x77);
    assert_eq!(lock(&two.dummy.registers)[0], 0x77);
    assert_eq!(two.machine.ports.read(0xb004, 2) & 1, 1);
    assert_eq!(two.machine.mmio.read(0xa000_0000, 4), 0x29c0_8086);
}

#[test]
fn devices_come_and_go_while_the_guest_runs() {
    let bed = bed();
    let hotplug = HotPlug::new(&bed.host, bed.pm.clone());
    bed.machine.ports.insert(HOTPLUG.start, HOTPLUG.len, "hot-plug", hotplug.clone()).unwrap();
    let registers = |at| bed.machine.ports.read(HOTPLUG.start + at, 4);
    assert_eq!(hotplug.slots(), 0x7fff_fffc, "the first device stays");
    assert!(!hotplug.has_listener());
    bed.machine.ports.write(pm::GPE0 + 8, 1, 1 << HOTPLUG_GPE);
    assert!(hotplug.has_listener());

    let dummy = Dummy::new();
    let at = hotplug.insert(dummy.clone()).unwrap();
    assert_eq!((at.device(), hotplug.slots()), (2, 0x7fff_fffc));
    assert_eq!(bed.machine.ports.read(pm::GPE0, 1), 1 << HOTPLUG_GPE);
    assert!(!hotplug.wait_noticed(at, Duration::ZERO));
    assert_eq!((registers(0), registers(0), registers(4)), (4, 0, 0));
    assert!(hotplug.wait_noticed(at, Duration::ZERO));
    bed.write(2, 0x10, 4, 0xd000_0000);
    bed.write(2, 4, 2, 2);
    assert_eq!(bed.machine.mmio.read(0xd000_0000, 4), 0);
    dummy.config.set_intx(true);
    let gsi = &bed.gsis[usize::from(PIRQ_GSI + at.pirq(0))];
    assert!(gsi.level());

    // What the host does not ask for either may go; what stays stays.
    hotplug.ask(at);
    assert_eq!(registers(4), 4);
    hotplug.withdraw(at);
    assert_eq!(registers(4), 0);
    bed.machine.ports.write(HOTPLUG.start + 8, 4, 0xffff_ffff);
    assert!(hotplug.wait_ejected(at, Duration::ZERO) && !gsi.level());
    assert_eq!(bed.read(2, 0, 4), 0xffff_ffff);
    assert_eq!(bed.machine.mmio.read(0xd000_0000, 4), 0xffff_ffff);
    assert_eq!((bed.read(1, 0, 4), bed.read(0x1f, 0, 4)), (0x1041_1af4, 0x2918_8086));
    assert_eq!(hotplug.remove(at).len(), 1);
    assert_eq!(hotplug.remove(at).len(), 0);
    assert_eq!(Arc::strong_count(&dummy), 1, "nobody holds it any more");

    // It does not come back to the buses, whoever writes to it.
    let state = Saved::V1(HotPlugState { up: u32::MAX, down: u32::MAX });
    hotplug.set_state(&through_json(&state));
    assert_eq!(hotplug.state(), Saved::V1(HotPlugState::default()));
    assert_eq!(hotplug.plug(Some(at), dummy).unwrap(), at);
    assert_eq!(hotplug.remove(at).len(), 1);
    while hotplug.insert(Dummy::new()).is_ok() {}
    batter(&*hotplug, HOTPLUG.len, 20_000, None);
    assert_eq!(bed.read(1, 0, 4), 0x1041_1af4);
}

#[test]
fn a_device_that_goes_while_another_vcpu_uses_it_leaves_nothing() {
    let bed = bed();
    let hotplug = HotPlug::new(&bed.host, bed.pm.clone());
    let machine = bed.machine.clone();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (done, ecam) = (stop.clone(), ECAM.start | 2 << 15);
    let vcpu = std::thread::spawn(move || {
        while !done.load(std::sync::atomic::Ordering::SeqCst) {
            machine.mmio.write(ecam | 0x10, 4, 0xd000_0000);
            machine.mmio.write(ecam | 4, 2, 3);
            machine.mmio.write(0xd000_0000, 4, 1);
        }
    });
    for _ in 0..300 {
        let dummy = Dummy::new();
        let at = hotplug.insert(dummy.clone()).unwrap();
        let patience = std::time::Instant::now() + Duration::from_secs(100);
        while lock(&dummy.registers)[0] == 0 {
            assert!(std::time::Instant::now() < patience);
            std::thread::yield_now();
        }
        assert_eq!(hotplug.remove(at).len(), 1);
    }
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    vcpu.join().unwrap();
    assert_eq!(bed.machine.mmio.read(0xd000_0000, 4), 0xffff_ffff);
}

#[test]
fn a_full_bus_says_so() {
    let bed = bed();
    for _ in 2..31 {
        bed.host.plug(None, Dummy::new()).unwrap();
    }
    assert!(bed.host.plug(None, Dummy::new()).is_err());
    assert!(bed.host.plug(Some(LPC), Dummy::new()).is_err());
    bed.host.assign().unwrap();
}

#[test]
fn a_hostile_guest_is_bounded() {
    struct Ports(Arc<Machine>);
    impl Registers for Ports {
        fn read(&self, offset: u64, size: u8) -> u64 {
            self.0.ports.read(CONFIG.start + offset, size)
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            // Mostly addresses of functions that are there.
            let value = if offset == 0 { 0x8000_0000 | value & 0x08fc | value >> 8 & 0xf800 } else { value };
            self.0.ports.write(CONFIG.start + offset, size, value & (u64::MAX >> (64 - 8 * u32::from(size))));
        }
    }
    struct Space(Arc<Machine>, u64);
    impl Registers for Space {
        fn read(&self, offset: u64, size: u8) -> u64 {
            self.0.mmio.read(self.1 + offset, size)
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            self.0.mmio.write(self.1 + offset, size, value);
        }
    }
    let bed = bed();
    bed.host.assign().unwrap();
    let table = bed.read(1, 0x24, 4);
    batter(&Space(bed.machine.clone(), table), 0x2000, 50_000, None);
    batter(&Space(bed.machine.clone(), ECAM.start), 0x1_0000, 50_000, None);
    batter(&Ports(bed.machine.clone()), 8, 50_000, None);
    for _ in 0..3 {
        bed.dummy.config.set_intx(true);
        (0..10).for_each(|v| bed.dummy.config.notify(v));
        bed.dummy.config.set_intx(false);
    }
    let other = self::bed();
    other.host.set_state(&bed.host.state());
}
