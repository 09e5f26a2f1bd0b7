//! A VM of the host's KVM: memory slots, interrupts in, and what all its vCPUs share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use kvm_bindings::{
    CpuId, KVM_CAP_SET_GUEST_DEBUG2, KVM_CAP_SPLIT_IRQCHIP, KVM_GUESTDBG_BLOCKIRQ, KVM_IRQ_ROUTING_MSI,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KvmIrqRouting, kvm_clock_data, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use machine::Machine;
use machine::cpu::Error;
use machine::irq::{Controllers, LocalApics, Msi};
use memory::{Kind, Memory};
use vmm_sys_util::eventfd::EventFd;
use x86::cpuid::{Cpuid, Features};

use crate::kick::{self, Kick};
use crate::vcpu::Vcpu;
use crate::{cpuid, host};

/// Pins of the IOAPIC.
const PINS: usize = 24;
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
    /// Guest memory stays mapped for as long as the VM is there.
    _memory: Memory,
}

/// A VM of the host's KVM. It is the machine's [`LocalApics`]; clones share it.
#[derive(Clone)]
pub struct Vm {
    shared: Arc<Shared>,
    /// Routes of the IOAPIC's pins, then of [`Vm::irqfd`]'s.
    routes: Arc<Mutex<Routes>>,
}

#[derive(Default)]
struct Routes {
    pins: [Option<(Msi, bool)>; PINS],
    messages: Vec<Msi>,
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
        map(&fd, memory)?;
        kick::install_handler();
        let debug = fd.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
        let shared = Shared {
            block_irqs: debug > 0 && debug as u32 & KVM_GUESTDBG_BLOCKIRQ != 0,
            fd,
            supported_cpuid,
            controllers: OnceLock::new(),
            intr: AtomicBool::new(false),
            boot: OnceLock::new(),
            _memory: memory.clone(),
        };
        Ok(Self { shared: Arc::new(shared), routes: Arc::default() })
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

    /// Lets `event` stand for a message: when it is signalled, KVM delivers `msi` without a way through this process.
    /// The result is the handle by which to change the message with [`Vm::reroute`].
    ///
    /// # Errors
    /// KVM refuses.
    pub fn irqfd(&self, event: &EventFd, msi: Msi) -> Result<usize, Error> {
        let mut routes = self.routes.lock().unwrap_or_else(|e| e.into_inner());
        let handle = routes.messages.len();
        routes.messages.push(msi);
        self.set_routes(&routes)?;
        let gsi = (PINS + handle) as u32;
        self.shared.fd.register_irqfd(event, gsi).map_err(host("KVM took no irqfd"))?;
        Ok(handle)
    }

    /// Changes the message of an [`Vm::irqfd`].
    ///
    /// # Errors
    /// KVM refuses.
    pub fn reroute(&self, handle: usize, msi: Msi) -> Result<(), Error> {
        let mut routes = self.routes.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(message) = routes.messages.get_mut(handle) {
            *message = msi;
        }
        self.set_routes(&routes)
    }

    /// Lets `event` be signalled when the guest writes to `address` (of any size), instead of an exit.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn ioeventfd(&self, event: &EventFd, address: u64) -> Result<(), Error> {
        let address = IoEventAddress::Mmio(address);
        self.shared.fd.register_ioevent(event, &address, NoDatamatch).map_err(host("KVM took no ioeventfd"))
    }

    fn set_routes(&self, routes: &Routes) -> Result<(), Error> {
        let entries = entries(routes);
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Guest("there are more interrupt routes than KVM takes".into()))?;
        self.shared.fd.set_gsi_routing(&table).map_err(host("KVM took no interrupt routes"))
    }
}

fn entries(routes: &Routes) -> Vec<kvm_irq_routing_entry> {
    let pins = routes.pins.iter().enumerate().filter_map(|(gsi, pin)| {
        let (msi, level) = (*pin)?;
        // The trigger mode is how KVM knows whose EOIs to hand back.
        Some((gsi, Msi { data: msi.data & !LEVEL | if level { LEVEL } else { 0 }, ..msi }))
    });
    let messages = routes.messages.iter().enumerate().map(|(i, &msi)| (PINS + i, msi));
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

/// Gives the guest its memory.
fn map(fd: &VmFd, memory: &Memory) -> Result<(), Error> {
    for (slot, s) in memory.slots().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: if s.region.kind == Kind::Rom { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: s.region.gpa,
            memory_size: s.region.size,
            userspace_addr: s.host as u64,
        };
        // SAFETY: the range is mapped guest memory, which `Shared` keeps mapped for as long as the VM is there, and to
        // which nothing in this process holds a Rust reference.
        unsafe { fd.set_user_memory_region(region) }.map_err(host("KVM did not map the guest's memory"))?;
    }
    Ok(())
}

impl LocalApics for Vm {
    fn send(&self, msi: Msi) -> bool {
        let msi = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // 0: no LAPIC took it.
        self.shared.fd.signal_msi(msi).is_ok_and(|delivered| delivered > 0)
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
        let mut routes = self.routes.lock().unwrap_or_else(|e| e.into_inner());
        routes.pins = *pins;
        // KVM takes any MSI; should it not, the guest misses EOIs, which it is the one to notice.
        let _ = self.set_routes(&routes);
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
        routes.messages.push(Msi { address: 0xfee0_3000, data: 0x32 });
        let entries = entries(&routes);
        // SAFETY: the entries are MSIs, and any bits are a `u32`.
        let data: Vec<_> = entries.iter().map(|e| (e.gsi, unsafe { e.u.msi.data })).collect();
        assert_eq!(data, [(2, 0x30), (11, 0x31 | LEVEL), (24, 0x32)]);
    }
}
