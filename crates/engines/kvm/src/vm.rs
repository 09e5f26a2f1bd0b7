//! A VM of the host's KVM: memory slots, interrupts in, and what all its vCPUs share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use kvm_bindings::{
    CpuId, KVM_CAP_SET_GUEST_DEBUG2, KVM_CAP_SPLIT_IRQCHIP, KVM_GUESTDBG_BLOCKIRQ, KVM_IRQ_ROUTING_MSI,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KvmIrqRouting, kvm_clock_data, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use machine::bus::{Doorbells, Watch};
use machine::cpu::Error;
use machine::irq::{Controllers, LocalApics, Msi, Route};
use machine::{EFD_CLOEXEC, EventFd, Gpa, Machine};
use memory::{Kind, Memory, Region, Slot};
use x86::cpuid::{Cpuid, Features};

use crate::kick::{self, Kick};
use crate::vcpu::Vcpu;
use crate::{cpuid, host};

/// Pins of the IOAPIC.
const PINS: usize = 24;
/// Messages that KVM has routes for (its KVM_MAX_IRQ_ROUTES is 4096).
const MOST_MESSAGES: usize = 4096 - PINS;
/// Bit of an MSI's data: level-triggered (SDM vol. 3A, 10.11.2).
const LEVEL: u32 = 1 << 15;
/// Four pages that Intel processors without unrestricted guest mode need; no memory and no device is there.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// What an engine must be able to do, and what KVM calls it.
pub(crate) const CAPABILITIES: [(Cap, &str); 12] = [
    (Cap::UserMemory, "guest memory from user space"),
    (Cap::ReadonlyMem, "read-only memory"),
    (Cap::SplitIrqchip, "LAPICs without an IOAPIC (split irqchip)"),
    (Cap::SignalMsi, "message-signalled interrupts"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::TscDeadlineTimer, "the TSC-deadline timer"),
    (Cap::ExtCpuid, "CPUID by leaf"),
    (Cap::Xsave, "XSAVE state"),
    (Cap::VcpuEvents, "vCPU events"),
];

/// What a VM's vCPUs share.
pub(crate) struct Shared {
    pub fd: VmFd,
    pub supported_cpuid: CpuId,
    pub block_irqs: bool,
    /// The PICs and the IOAPIC.
    pub controllers: OnceLock<Weak<dyn Controllers>>,
    /// The level of the PICs' INTR.
    pub intr: AtomicBool,
    /// The processor that takes INTR.
    pub boot: OnceLock<Arc<Kick>>,
    routes: Mutex<Routes>,
    /// Guest memory stays mapped for as long as the VM is there.
    _memory: Memory,
}

/// A VM of the host's KVM. It is the machine's [`LocalApics`], and looks after its [`Doorbells`]; clones share it.
#[derive(Clone)]
pub struct Vm {
    shared: Arc<Shared>,
}

/// KVM's interrupt routes: of the IOAPIC's pins, then of each [`Irqfd`] (`None`: one that is gone).
#[derive(Default)]
struct Routes {
    pins: [Option<(Msi, bool)>; PINS],
    messages: Vec<Option<Msi>>,
}

impl Vm {
    /// Makes a VM with `memory` in it.
    ///
    /// # Errors
    /// No usable KVM: [`crate::probe()`] tells why, and what to do.
    pub fn new(memory: &Memory) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(host("/dev/kvm cannot be opened; see `lodge host`"))?;
        let fd = kvm.create_vm().map_err(host("KVM made no VM; see `lodge host`"))?;
        let supported_cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(host("KVM did not tell which CPUID features it has"))?;
        fd.set_identity_map_address(IDENTITY_MAP).map_err(host("KVM took no identity map"))?;
        fd.set_tss_address(TSS).map_err(host("KVM took no TSS address"))?;
        let split =
            kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [PINS as u64, 0, 0, 0], ..Default::default() };
        fd.enable_cap(&split).map_err(host("KVM has no split irqchip"))?;
        kick::install_handler();
        let debug = fd.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
        let shared = Shared {
            block_irqs: debug > 0 && debug as u32 & KVM_GUESTDBG_BLOCKIRQ != 0,
            fd,
            supported_cpuid,
            controllers: OnceLock::new(),
            intr: AtomicBool::new(false),
            boot: OnceLock::new(),
            routes: Mutex::default(),
            _memory: memory.clone(),
        };
        let shared = Arc::new(shared);
        let mut slots = Slots::default();
        slots.follow(&shared.fd, memory)?;
        if let Some(slot) = memory.pluggable_slot().map_err(|e| Error::Guest(e.to_string()))? {
            set(&shared.fd, slots.0.len(), Some(&slot))?;
        }
        let (weak, slots) = (Arc::downgrade(&shared), Mutex::new(slots));
        memory.listen(move |memory| {
            if let Some(shared) = weak.upgrade() {
                // What KVM does not map (its own pages are there) is reached through the bus, as a device.
                let _ = slots.lock().unwrap_or_else(|e| e.into_inner()).follow(&shared.fd, memory);
            }
        });
        Ok(Self { shared })
    }

    /// Makes the vCPU with LAPIC `id` (0 is the boot processor) of the processor `model`, which has no more than
    /// [`Vm::features`]. It is as after reset, at the time that the machine's clock shows.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn vcpu(&self, id: u8, model: &Cpuid, machine: Arc<Machine>) -> Result<Vcpu, Error> {
        let kick = Arc::new(Kick::default());
        if id == 0 {
            // The paravirtual clock counts from when the VM was made; that of guest time, from when the machine was.
            let clock = kvm_clock_data { clock: machine.clock.now(), ..Default::default() };
            self.shared.fd.set_clock(&clock).map_err(host("KVM did not take the time"))?;
        }
        let vcpu = Vcpu::new(self.shared.clone(), id, model, machine, kick.clone())?;
        if id == 0 {
            let _ = self.shared.boot.set(kick);
        }
        Ok(vcpu)
    }

    /// The processor features that a guest can have on this host.
    pub fn features(&self) -> Features {
        cpuid::features(&self.shared.supported_cpuid)
    }
}

impl Shared {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn set_routes(&self, routes: &Routes) -> Result<(), Error> {
        let entries = entries(routes);
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Guest("there are more interrupt routes than KVM takes".into()))?;
        self.fd.set_gsi_routing(&table).map_err(host("KVM took no interrupt routes"))
    }

    fn send(&self, msi: Msi) -> bool {
        let msi = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // 0: no LAPIC took it.
        self.fd.signal_msi(msi).is_ok_and(|delivered| delivered > 0)
    }
}

/// An event that stands for a message: when it is signalled, KVM delivers the message of its route.
struct Irqfd {
    vm: Arc<Shared>,
    event: EventFd,
    /// The place of its route among the messages.
    index: usize,
    /// The message of its route.
    routed: Mutex<Option<Msi>>,
}

impl Irqfd {
    /// `None` where KVM or the process has none left.
    fn new(vm: &Arc<Shared>) -> Option<Self> {
        let event = EventFd::new(EFD_CLOEXEC).ok()?;
        let mut routes = vm.routes();
        let free = routes.messages.iter().position(Option::is_none);
        let index = free.unwrap_or(routes.messages.len());
        if index >= MOST_MESSAGES {
            return None;
        }
        vm.fd.register_irqfd(&event, gsi(index)).ok()?;
        if free.is_none() {
            routes.messages.push(None);
        }
        // Taken, until there is a message.
        routes.messages[index] = Some(Msi::default());
        drop(routes);
        Some(Self { vm: vm.clone(), event, index, routed: Mutex::new(None) })
    }

    fn reroute(&self, msi: Msi) -> Result<(), Error> {
        let mut routes = self.vm.routes();
        let before = routes.messages[self.index].replace(msi);
        // One that KVM does not take must not keep it from taking others.
        self.vm.set_routes(&routes).inspect_err(|_| routes.messages[self.index] = before)
    }
}

impl Route for Irqfd {
    fn send(&self, msi: Msi) {
        let mut routed = self.routed.lock().unwrap_or_else(|e| e.into_inner());
        if *routed != Some(msi) {
            *routed = self.reroute(msi).is_ok().then_some(msi);
        }
        if routed.is_none() || self.event.write(1).is_err() {
            self.vm.send(msi);
        }
    }
}

impl Drop for Irqfd {
    fn drop(&mut self) {
        let mut routes = self.vm.routes();
        // The route stays until KVM is told others, and nothing uses it.
        let _ = self.vm.fd.unregister_irqfd(&self.event, gsi(self.index));
        routes.messages[self.index] = None;
    }
}

/// What KVM calls the route at `index` of the messages.
fn gsi(index: usize) -> u32 {
    (PINS + index) as u32
}

/// An event that KVM signals when the guest writes to an address, instead of an exit.
struct Ioeventfd {
    vm: Arc<Shared>,
    event: Arc<EventFd>,
    address: IoEventAddress,
}

impl Drop for Ioeventfd {
    fn drop(&mut self) {
        // It was there.
        let _ = self.vm.fd.unregister_ioevent(&self.event, &self.address, NoDatamatch);
    }
}

impl Doorbells for Vm {
    fn watch(&self, address: Gpa, event: &Arc<EventFd>) -> Option<Watch> {
        let (vm, event, address) = (self.shared.clone(), event.clone(), IoEventAddress::Mmio(address));
        vm.fd.register_ioevent(&event, &address, NoDatamatch).ok()?;
        Some(Box::new(Ioeventfd { vm, event, address }))
    }
}

fn entries(routes: &Routes) -> Vec<kvm_irq_routing_entry> {
    let pins = routes.pins.iter().enumerate().filter_map(|(gsi, pin)| {
        let (msi, level) = (*pin)?;
        // The trigger mode is how KVM knows whose EOIs to hand back.
        Some((gsi, Msi { data: msi.data & !LEVEL | if level { LEVEL } else { 0 }, ..msi }))
    });
    let messages = routes.messages.iter().enumerate().filter_map(|(i, msi)| Some((PINS + i, (*msi)?)));
    let entry = |(gsi, msi): (usize, Msi)| {
        let mut entry =
            kvm_irq_routing_entry { gsi: gsi as u32, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        entry.u.msi.address_lo = msi.address as u32;
        entry.u.msi.address_hi = (msi.address >> 32) as u32;
        entry.u.msi.data = msi.data;
        entry
    };
    pins.chain(messages).map(entry).collect()
}

/// What KVM has in its memory slots.
#[derive(Default)]
struct Slots(Vec<Option<Region>>);

impl Slots {
    /// Gives the guest its memory where it is to be now.
    fn follow(&mut self, fd: &VmFd, memory: &Memory) -> Result<(), Error> {
        let wanted: Vec<Option<Slot>> = memory.slots().collect();
        self.0.resize(wanted.len(), None);
        let changed = |has: &Option<Region>, slot: &Option<Slot>| *has != slot.map(|slot| slot.region);
        // What goes makes room for what comes.
        for (number, (has, slot)) in self.0.iter_mut().zip(&wanted).enumerate() {
            if has.is_some() && changed(has, slot) {
                set(fd, number, None)?;
                *has = None;
            }
        }
        let mut result = Ok(());
        for (number, (has, slot)) in self.0.iter_mut().zip(&wanted).enumerate() {
            if let Some(slot) = slot.filter(|_| has.is_none()) {
                match set(fd, number, Some(&slot)) {
                    Ok(()) => *has = Some(slot.region),
                    Err(error) => result = Err(error),
                }
            }
        }
        result
    }
}

/// Fills or empties a memory slot.
fn set(fd: &VmFd, number: usize, slot: Option<&Slot>) -> Result<(), Error> {
    let region = kvm_userspace_memory_region {
        slot: number as u32,
        flags: if slot.is_some_and(|s| s.region.kind == Kind::Rom) { KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: slot.map_or(0, |s| s.region.gpa),
        memory_size: slot.map_or(0, |s| s.region.size),
        userspace_addr: slot.map_or(0, |s| s.host as u64),
    };
    // SAFETY: the range is mapped guest memory, which `Shared` keeps mapped for as long as the VM is there, and to which
    // nothing in this process holds a Rust reference.
    unsafe { fd.set_user_memory_region(region) }.map_err(host("KVM did not map the guest's memory"))
}

impl LocalApics for Vm {
    fn send(&self, msi: Msi) -> bool {
        self.shared.send(msi)
    }

    fn route(&self) -> Option<Box<dyn Route>> {
        Some(Box::new(Irqfd::new(&self.shared)?))
    }

    fn intr(&self, level: bool) {
        self.shared.intr.store(level, Ordering::SeqCst);
        if level && let Some(boot) = self.shared.boot.get() {
            boot.poke();
        }
    }

    fn connect(&self, controllers: Weak<dyn Controllers>) {
        // A second call has no effect.
        let _ = self.shared.controllers.set(controllers);
    }

    fn routes(&self, pins: &[Option<(Msi, bool)>; PINS]) {
        let mut routes = self.shared.routes();
        routes.pins = *pins;
        // KVM takes any MSI; should it not, the guest misses EOIs, which it is the one to notice.
        let _ = self.shared.set_routes(&routes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_tell_level_from_edge() {
        let mut routes = Routes::default();
        routes.pins[2] = Some((Msi { address: 0xfee0_1000, data: 0x30 | LEVEL }, false));
        routes.pins[11] = Some((Msi { address: 0xfee0_2000, data: 0x31 }, true));
        routes.messages = vec![None, Some(Msi { address: 0xfee0_3000, data: 0x32 })];
        let entries = entries(&routes);
        // SAFETY: the entries are MSIs, and any bits are a `u32`.
        let data: Vec<_> = entries.iter().map(|e| (e.gsi, unsafe { e.u.msi.data })).collect();
        assert_eq!(data, [(2, 0x30), (11, 0x31 | LEVEL), (25, 0x32)]);
    }
}
