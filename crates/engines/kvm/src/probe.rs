//! Whether this host's KVM can run a guest: found by running one.
//!
//! That `/dev/kvm` is there, opens and has every capability does not show it: some hosts offer a KVM on which a tiny guest
//! runs and a kernel does not. So a guest of a few instructions goes from ring 3 to ring 0 by SYSCALL, as every program of
//! a 64-bit system does, and reports by port.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use kvm_ioctls::Kvm;
use machine::cpu::{self, Exit, Kick, State, Vcpu as _};
use machine::{Bus, Clock, Machine, Memory, Power, Registers, Timers};
use x86::control::{cr0, cr4, efer};
use x86::cpuid::{Config, Cpuid, Features, Model, Vendor};
use x86::segment::index;
use x86::{Segment, Table, gpr};

use crate::vm::CAPABILITIES;
use crate::{Vm, host};

/// How long the trial's guest may take: it needs microseconds, and on a nested host some milliseconds.
const LIMIT: Duration = Duration::from_millis(1000);

/// This host's KVM runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usable {
    /// The rate of the host's time-stamp counter in kHz, which guests see without cost.
    pub tsc_khz: u64,
    /// The processor features that guests can have.
    pub features: Features,
}

/// Why this host's KVM is of no use, and what would help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}; {remedy}")]
pub struct Unusable {
    /// What is missing or went wrong.
    pub reason: String,
    /// What to do about it.
    pub remedy: String,
}

impl Unusable {
    fn new(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { reason: reason.into(), remedy: remedy.into() }
    }

    /// It is there, and does not work.
    fn broken(reason: impl Into<String>) -> Self {
        Self::new(
            reason,
            "use an engine that needs no KVM, or a host with complete VT-x or AMD-V virtualization",
        )
    }
}

/// Tries this host's KVM. Takes some milliseconds, and about a second on a KVM on which the trial's guest hangs.
///
/// # Errors
/// It is of no use: why, and what to do.
pub fn probe() -> Result<Usable, Unusable> {
    let kvm = open()?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(Unusable::broken(format!("/dev/kvm speaks version {version} of the KVM API, not 12")));
    }
    let missing: Vec<_> =
        CAPABILITIES.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(Unusable::new(
            format!("this KVM lacks {}", missing.join(", ")),
            "use Linux 5.10 or later with its own KVM module",
        ));
    }
    let tsc_khz = tsc_khz(&kvm).map_err(|e| failed(&e))?;
    let features = trial().map_err(|e| failed(&e))??;
    Ok(Usable { tsc_khz, features })
}

/// The rate of the host's time-stamp counter, which is that of a new vCPU.
fn tsc_khz(kvm: &Kvm) -> Result<u64, cpu::Error> {
    let vcpu = kvm.create_vm().and_then(|vm| vm.create_vcpu(0)).map_err(host("KVM made no VM"))?;
    Ok(vcpu.get_tsc_khz().map_err(host("KVM does not know the rate of the host's TSC"))?.into())
}

fn failed(error: &cpu::Error) -> Unusable {
    match error {
        cpu::Error::Host { source, .. } if source.raw_os_error() == Some(libc::EBUSY) => Unusable::new(
            "another hypervisor holds the processor's virtualization",
            "stop its virtual machines (VirtualBox, VMware), or unload its kernel modules",
        ),
        cpu::Error::Host { .. } => Unusable::broken(format!("the trial guest did not start: {error}")),
        // The first line; the registers follow.
        cpu::Error::Guest(text) => Unusable::broken(format!(
            "the trial guest did not run: {}",
            text.lines().next().unwrap_or_default()
        )),
    }
}

fn open() -> Result<Kvm, Unusable> {
    Kvm::new().map_err(|error| {
        let error = std::io::Error::from(error);
        match error.kind() {
            ErrorKind::PermissionDenied if error.raw_os_error() == Some(libc::EPERM) => Unusable::new(
                "this container may not use /dev/kvm",
                "start the container with the device, such as by --device /dev/kvm",
            ),
            ErrorKind::PermissionDenied => Unusable::new(
                "you may not open /dev/kvm",
                "add yourself to its group, by `sudo usermod -aG kvm $USER`, and log in again",
            ),
            _ if Path::new("/dev/kvm").exists() => absent("/dev/kvm has no KVM behind it"),
            _ => absent("there is no /dev/kvm"),
        }
    })
}

/// No KVM: what to do depends on what the processor says it can.
fn absent(reason: &str) -> Unusable {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Unusable::new(reason, remedy_for(&info))
}

fn remedy_for(cpuinfo: &str) -> &'static str {
    let flags = cpuinfo.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|f| f == flag);
    if has("vmx") {
        "load the module, by `sudo modprobe kvm_intel`; in a container, pass the device in"
    } else if has("svm") {
        "load the module, by `sudo modprobe kvm_amd`; in a container, pass the device in"
    } else {
        "enable VT-x or AMD-V in the firmware's setup, or nested virtualization if this host is itself virtual"
    }
}

/// Ports of the trial's guest: it writes CS, reads a number, and writes that.
const PORTS: u16 = 0x80;
/// What it reads.
const NUMBER: u32 = 0x4c6f_6467;
/// Where its parts are.
const PAGES: u64 = 0x1000;
const GDT: u64 = 0x4000;
const KERNEL: u64 = 0x5000;
const USER: u64 = 0x6000;
const STACK: u64 = 0x8000;
const TASK: u64 = 0x9000;
/// Selectors, in the order that SYSCALL wants.
const KERNEL_CS: u16 = 0x10;
const USER_SS: u16 = 0x2b;
const USER_CS: u16 = 0x33;

/// SYSCALL; UD2.
const USER_CODE: [u8; 4] = [0x0f, 0x05, 0x0f, 0x0b];
/// XOR EAX, EAX; MOV EAX, CS; OUT 0x80, EAX; IN EAX, 0x81; OUT 0x82, EAX; HLT; JMP to the HLT.
const KERNEL_CODE: [u8; 13] = [
    0x31,
    0xc0,
    0x8c,
    0xc8,
    0xe7,
    PORTS as u8,
    0xe5,
    PORTS as u8 + 4,
    0xe7,
    PORTS as u8 + 8,
    0xf4,
    0xeb,
    0xfd,
];

/// What the guest reported.
#[derive(Default)]
struct Report {
    /// CS, plus one; 0 while it did not come.
    cs: AtomicU64,
    number: AtomicU64,
    vcpu: OnceLock<Arc<dyn Kick>>,
}

struct ReportPorts(Arc<Report>);

impl Registers for ReportPorts {
    fn read(&self, _: u64, _: u8) -> u64 {
        NUMBER.into()
    }

    fn write(&self, offset: u64, _: u8, value: u64) {
        if offset == 0 {
            self.0.cs.store(value + 1, Ordering::SeqCst);
        } else {
            self.0.number.store(value, Ordering::SeqCst);
            if let Some(vcpu) = self.0.vcpu.get() {
                vcpu.kick();
            }
        }
    }
}

/// A processor that has all that the host has.
fn model(vm: &Vm) -> Result<Cpuid, cpu::Error> {
    let available = vm.features();
    let config = Config {
        model: Model::Host,
        vendor: Vendor::Amd,
        available,
        vcpus: 1,
        tsc_khz: 1_000_000,
        host: None,
    };
    Cpuid::new(&config).map_err(|missing| cpu::Error::Guest(format!("the host lacks {missing:?}")))
}

/// Runs the guest; the features that the host's KVM has.
fn trial() -> Result<Result<Features, Unusable>, cpu::Error> {
    let memory = Memory::new(1 << 20, 0).map_err(|e| cpu::Error::Guest(e.to_string()))?;
    let report = Arc::new(Report::default());
    let clock = Arc::new(Clock::host(1_000_000));
    let machine = Arc::new(Machine {
        ports: Bus::default(),
        mmio: Bus::default(),
        // Nothing sets a timer, so there is no thread to have.
        timers: Timers::new(Arc::new(Clock::manual(1))).map_err(host("no timers"))?,
        power: Power::default(),
        memory,
        clock,
    });
    machine
        .ports
        .insert(PORTS.into(), 12, "trial", Arc::new(ReportPorts(report.clone())))
        .map_err(|e| cpu::Error::Guest(e.to_string()))?;
    let vm = Vm::new(&machine.memory)?;
    let mut vcpu = vm.vcpu(0, &model(&vm)?, machine.clone())?;
    let _ = report.vcpu.set(vcpu.kicker());
    load(&machine.memory);
    let state = ring3(&vcpu.state()?);
    vcpu.set_state(&state)?;

    let (done, waited) = mpsc::channel::<()>();
    let kicker = vcpu.kicker();
    let exit = std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("kvm trial limit".into())
            .spawn_scoped(scope, move || {
                if waited.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                    kicker.kick();
                }
            })
            .map_err(host("no thread for the trial's time limit"))?;
        let exit = vcpu.run();
        drop(done);
        exit
    })?;
    let (cs, number) = (report.cs.load(Ordering::SeqCst), report.number.load(Ordering::SeqCst));
    Ok(verdict(exit, cs, number).map(|()| vm.features()))
}

fn verdict(exit: Exit, cs: u64, number: u64) -> Result<(), Unusable> {
    match (cs.checked_sub(1), exit) {
        (Some(cs), _) if cs & 3 != 0 => {
            Err(Unusable::broken(format!("a guest's SYSCALL ended in ring {} instead of ring 0", cs & 3)))
        }
        (Some(cs), _) if cs != u64::from(KERNEL_CS) => Err(Unusable::broken(format!(
            "a guest's SYSCALL loaded {cs:#x} into CS instead of {KERNEL_CS:#x}"
        ))),
        (Some(_), _) if number == u64::from(NUMBER) => Ok(()),
        (Some(_), _) => Err(Unusable::broken("a guest's port reads do not work")),
        (None, Exit::TripleFault) => {
            Err(Unusable::broken("a guest's SYSCALL did not reach ring 0: it ended in a triple fault"))
        }
        (None, _) => Err(Unusable::broken("a guest's SYSCALL did not reach ring 0 in time")),
    }
}

/// Puts page tables, descriptors and code in the guest's memory, where offsets are addresses.
fn load(memory: &Memory) {
    let present_write_user = 7;
    memory.store(PAGES, (PAGES + 0x1000) | present_write_user);
    memory.store(PAGES + 0x1000, (PAGES + 0x2000) | present_write_user);
    // One page of 2 MiB.
    memory.store(PAGES + 0x2000, 0x80u64 | present_write_user);
    let (code, data) = (0x00af_9b00_0000_ffffu64, 0x00cf_9300_0000_ffffu64);
    let user = 3 << 45;
    for (i, descriptor) in [0, 0, code, data, 0, data | user, code | user].into_iter().enumerate() {
        memory.store(GDT + 8 * i as u64, descriptor);
    }
    memory.write(KERNEL, &KERNEL_CODE);
    memory.write(USER, &USER_CODE);
}

/// A 64-bit program in ring 3, about to make a system call.
fn ring3(reset: &State) -> State {
    let mut s = reset.clone();
    let flat = |selector: u16, descriptor| Segment::from_descriptor(selector, descriptor);
    let data = flat(USER_SS, 0x00cf_f300_0000_ffff);
    s.segments = [data; 6];
    s.segments[index::CS] = flat(USER_CS, 0x00af_fb00_0000_ffff);
    s.tr = Segment { selector: 0x40, attributes: 0x8b, limit: 0x67, base: TASK };
    s.ldtr = Segment::default();
    s.gdtr = Table { base: GDT, limit: 0x37 };
    s.idtr = Table::default();
    s.cr0 = cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP | cr0::PE;
    s.cr3 = PAGES;
    s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    s.efer = efer::LME | efer::LMA | efer::SCE;
    s.rip = USER;
    s.gpr[gpr::RSP] = STACK;
    s.msrs.star = u64::from(USER_SS - 8) << 48 | u64::from(KERNEL_CS) << 32;
    s.msrs.lstar = KERNEL;
    s.msrs.sfmask = 0x4_7700;
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let number = NUMBER.into();
        assert!(verdict(Exit::Kicked, 0x11, number).is_ok());
        let reason = |exit, cs, number| verdict(exit, cs, number).unwrap_err().reason;
        assert_eq!(
            reason(Exit::TripleFault, 0, 0),
            "a guest's SYSCALL did not reach ring 0: it ended in a triple fault"
        );
        assert_eq!(reason(Exit::Kicked, 0, 0), "a guest's SYSCALL did not reach ring 0 in time");
        assert_eq!(reason(Exit::Kicked, 0x34, number), "a guest's SYSCALL ended in ring 3 instead of ring 0");
        assert_eq!(reason(Exit::Kicked, 0x11, 0), "a guest's port reads do not work");
    }

    #[test]
    fn remedies_follow_the_processor() {
        assert!(remedy_for("processor: 0\nflags\t\t: fpu svm nx\n").contains("kvm_amd"));
        assert!(remedy_for("flags: fpu vmx\n").contains("kvm_intel"));
        assert!(remedy_for("flags: fpu nosvm\n").contains("firmware"));
        assert!(remedy_for("").contains("firmware"));
    }
}
