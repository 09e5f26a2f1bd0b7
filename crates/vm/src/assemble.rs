//! The machine's parts, put together: the list of all that is in the PC.

use std::sync::Arc;

use std::time::SystemTime;

use devices::{At, ahci, debug, fw_cfg, hpet, pci, pit, pm, ps2, reset, rtc, serial, vga, virtio};
use machine::apic::Apics;
use machine::cpu::{State, Vcpu};
use machine::irq::LocalApics;
use machine::irqs::Irqs;
use machine::{Bus, Clock, Machine, Memory, Power, Registers};
use memory::{PLUG_ALIGN, Window};
use x86::cpuid::Cpuid;

use crate::Error;
use crate::config::{Boot, Config, DiskBus, Display};
use crate::console::Console;
use crate::firmware;
use crate::host::{self, Chosen};

/// The rate of the time-stamp counter where software makes it: one tick per nanosecond.
const TSC_KHZ: u64 = 1_000_000;

/// A machine that is ready to start.
pub struct Assembly {
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub engine: &'static str,
    pub machine: Arc<Machine>,
    /// Held for the machine's life: the buses know the host bridge, and it the machine, only weakly.
    pub _pci: Arc<pci::Host>,
}

/// Puts a machine together.
pub fn assemble(config: &Config, console: &Arc<Console>, power: &Power) -> Result<Assembly, Error> {
    check(config)?;
    host::raise_file_limit();
    let rom = match &config.boot {
        Boot::Firmware(firmware) => boot::rom_size(&firmware.code)?,
        Boot::Kernel { .. } => 0,
    };
    let (memory, windows) = memory(config, rom)?;
    let engine = host::choose(config.engine)?;
    let tsc_khz = match engine {
        Chosen::Kvm { tsc_khz, .. } => tsc_khz,
        Chosen::Interpret | Chosen::Translate => TSC_KHZ,
    };
    let machine = Machine::new(memory, Clock::host(tsc_khz))
        .map_err(|source| Error::Host { what: "a thread for timers", source })?;
    let machine = Arc::new(Machine { power: power.clone(), ..machine });
    let processor = host::processor(engine, config.model, config.cpus, tsc_khz)?;
    let (mut vcpus, irqs, engine) = match engine {
        Chosen::Kvm { .. } => with_kvm(config, &machine, &processor)?,
        Chosen::Interpret => with_interpreter(config, &machine, processor)?,
        Chosen::Translate => with_translator(config, &machine, processor)?,
    };
    let (pci, hotplug) = plug(config, &machine, &irqs, console, windows)?;
    let state = load(config, &machine.memory, &hotplug)?;
    for (index, vcpu) in vcpus.iter_mut().enumerate() {
        let mut state = if index == 0 { state.clone() } else { State::reset(false, 0) };
        // What only the engine knows: it stays as it is.
        let own = vcpu.state()?;
        state.msrs.tsc_offset = own.msrs.tsc_offset;
        vcpu.set_state(&state)?;
    }
    Ok(Assembly { vcpus, engine, machine, _pci: pci })
}

/// Memory of devices that the guest reaches without them: the VGA's, and the flash chip's.
type Windows = [Window; 2];

fn memory(config: &Config, rom: u64) -> Result<(Memory, Windows), Error> {
    let frame_buffer = if config.display == Display::Vga { vga::MEMORY as u64 } else { 0 };
    let flash = match &config.boot {
        Boot::Firmware(firmware) => firmware.variables.as_ref().map_or(0, |chip| chip.size()),
        Boot::Kernel { .. } => 0,
    };
    Ok(Memory::with_pluggable(config.memory, rom, [frame_buffer, flash], config.plugs.room())?)
}

fn check(config: &Config) -> Result<(), Error> {
    if !(1..=255).contains(&config.cpus) {
        return Err(Error::Cpus(config.cpus));
    }
    if config.lockstep && (config.engine != crate::Choice::Translate || config.cpus != 1) {
        return Err(Error::Lockstep);
    }
    if config.memory < 4 << 20 {
        return Err(Error::MemorySmall(config.memory >> 20));
    }
    if !config.memory.is_multiple_of(1 << 20) {
        return Err(Error::MemoryOdd(config.memory));
    }
    let host = host::memory();
    let room = config.plugs.room();
    let most = config.memory.saturating_add(room);
    if host != 0 && most > host {
        return Err(Error::MemoryLarge(most >> 20, host >> 20));
    }
    if !room.is_multiple_of(PLUG_ALIGN) {
        return Err(Error::MemoryMaxOdd);
    }
    let end = memory::plug_start(config.memory).saturating_add(room);
    if room > 0 && end > firmware::PCI_WINDOW64.0 {
        return Err(Error::MemoryMaxLarge);
    }
    Ok(())
}

type Engine = (Vec<Box<dyn Vcpu>>, Arc<Irqs>, &'static str);

fn with_kvm(config: &Config, machine: &Arc<Machine>, processor: &Cpuid) -> Result<Engine, Error> {
    let vm = kvm::Vm::new(&machine.memory)?;
    machine.mmio.leave_doorbells_to(Arc::new(vm.clone()));
    let irqs = Irqs::new(Arc::new(vm.clone()) as Arc<dyn LocalApics>);
    let vcpus = (0..config.cpus)
        .map(|n| Ok(Box::new(vm.vcpu(n as u8, processor, machine.clone())?) as Box<dyn Vcpu>))
        .collect::<Result<_, Error>>()?;
    Ok((vcpus, irqs, "kvm"))
}

fn with_interpreter(config: &Config, machine: &Arc<Machine>, processor: Cpuid) -> Result<Engine, Error> {
    let apics = Apics::new(config.cpus, &machine.clock, &machine.timers);
    let irqs = Irqs::new(Arc::new(apics.clone()) as Arc<dyn LocalApics>);
    let processor = Arc::new(processor);
    let vcpus = (0..config.cpus)
        .filter_map(|n| Some((n, apics.local(n)?)))
        .map(|(n, local)| {
            Box::new(interpret::Cpu::new(machine.clone(), local, processor.clone(), n)) as Box<dyn Vcpu>
        })
        .collect();
    Ok((vcpus, irqs, "interpret"))
}

fn with_translator(config: &Config, machine: &Arc<Machine>, processor: Cpuid) -> Result<Engine, Error> {
    let apics = Apics::new(config.cpus, &machine.clock, &machine.timers);
    let irqs = Irqs::new(Arc::new(apics.clone()) as Arc<dyn LocalApics>);
    let processor = Arc::new(processor);
    let trace = match &config.trace {
        Some(path) => Some(translate::Trace::new(
            std::fs::File::create(path).map_err(|e| Error::Trace(path.clone(), e))?,
        )),
        None => None,
    };
    let vcpus = (0..config.cpus)
        .filter_map(|n| Some((n, apics.local(n)?)))
        .map(|(n, local)| {
            let mut cpu = translate::Cpu::new(machine.clone(), local, processor.clone(), n, config.cpus)?;
            if let Some(trace) = &trace {
                cpu.set_trace(trace.clone());
            }
            if config.lockstep {
                cpu.lockstep();
            }
            Ok(Box::new(cpu) as Box<dyn Vcpu>)
        })
        .collect::<Result<_, Error>>()?;
    Ok((vcpus, irqs, "translate"))
}

/// Puts the kernel or firmware into memory, with the tables that a kernel without firmware needs.
fn load(config: &Config, memory: &Memory, hotplug: &pci::HotPlug) -> Result<State, Error> {
    let (kernel, initrd, cmdline) = match &config.boot {
        Boot::Firmware(firmware) => {
            boot::load_firmware(memory, &firmware.code)?;
            return Ok(State::reset(true, 0));
        }
        Boot::Kernel { kernel, initrd, cmdline } => (kernel, initrd, cmdline),
    };
    let rsdp = boot::acpi::build(&firmware::acpi(config, memory, hotplug)).place(memory)?;
    boot::smbios::place(memory, config.cpus)?;
    Ok(boot::load(memory, &boot::Kernel { kernel, initrd, cmdline, rsdp })?)
}

fn insert(bus: &Bus, at: At, what: &'static str, registers: Arc<dyn Registers>) -> Result<(), Error> {
    Ok(bus.insert(at.start, at.len, what, registers)?)
}

/// All devices, on the buses.
fn plug(
    config: &Config,
    machine: &Arc<Machine>,
    irqs: &Arc<Irqs>,
    console: &Arc<Console>,
    [frame_buffer, flash]: Windows,
) -> Result<(Arc<pci::Host>, Arc<pci::HotPlug>), Error> {
    let Machine { ports, mmio, clock, timers, power, .. } = &**machine;
    irqs.insert(ports, mmio)?;
    config.screen.unplug();

    let com1 = serial::Serial::new(irqs.line(4), console.writer(power));
    insert(ports, serial::COM1, "COM1", com1.clone())?;

    // In legacy replacement mode the HPET takes the lines of the 8254 and the RTC.
    let (lines, messages) = (irqs.clone(), irqs.clone());
    let hpet =
        hpet::Hpet::new(move |gsi| lines.line(gsi), move |msi| messages.msi(msi), clock.clone(), timers);
    insert(mmio, hpet::HPET, "HPET", hpet.clone())?;
    let pit = pit::Pit::new(hpet.gate(irqs.line(0)), clock.clone(), timers);
    insert(ports, pit::PIT, "8254", pit.clone())?;
    insert(ports, pit::CONTROL_B, "port 61", pit.control_b())?;
    let rtc_line = hpet.gate(irqs.line(8));
    let rtc = rtc::Rtc::new(rtc_line, clock.clone(), timers, SystemTime::now(), config.memory);
    insert(ports, rtc::RTC, "RTC", rtc)?;

    let pm = pm::Pm::new(irqs.line(pm::SCI), power.clone(), clock.clone(), timers);
    insert(ports, pm::SMI, "SMI command", pm.smi())?;
    console.attach(&com1, &pm);

    insert(ports, reset::FAST_A20, "port 92", reset::FastA20::new(power.clone()))?;
    // Firmware waits for a keyboard, also where nobody types on it.
    let plugged = match (&config.boot, config.display) {
        (Boot::Kernel { .. }, Display::None) => ps2::Plugged::Nothing,
        _ => ps2::Plugged::Both,
    };
    let i8042 = ps2::I8042::new(plugged, irqs.line(1), irqs.line(12), power.clone());
    insert(ports, ps2::DATA, "8042", i8042.data())?;
    insert(ports, ps2::COMMAND, "8042", i8042.command())?;
    let input: Arc<dyn screens::Input> = i8042;
    config.screen.plug(Arc::downgrade(&input));

    insert(ports, debug::POST, "POST code", debug::Post::new())?;
    if config.debug_exit {
        insert(ports, debug::EXIT, "debug exit", debug::DebugExit::new(power.clone()))?;
    }

    let fw_cfg = fw_cfg::FwCfg::new(machine.memory.clone());
    fw_cfg.set(fw_cfg::key::RAM_SIZE, &config.memory.to_le_bytes());
    for key in [fw_cfg::key::NB_CPUS, fw_cfg::key::MAX_CPUS] {
        fw_cfg.set(key, &(config.cpus as u16).to_le_bytes());
    }
    insert(ports, fw_cfg::FW_CFG, "fw_cfg", fw_cfg.clone())?;

    let weak = Arc::downgrade(machine);
    let lines = irqs.clone();
    let lpc = pci::Lpc::new(weak.clone(), pm.clone(), move |gsi| lines.line(gsi));
    let (pirqs, routes) = (lpc.clone(), irqs.clone());
    let host = pci::Host::new(
        weak,
        pci::Windows::default(),
        move |pin| pirqs.line(pin),
        move || routes.route(),
        reset::Control::new(power.clone()),
    );
    host.insert(ports)?;
    host.plug(Some(pci::LPC), lpc)?;
    let hotplug = pci::HotPlug::new(&host, pm);
    insert(ports, pci::HOTPLUG, "PCI hot-plug", hotplug.clone())?;
    plug_display(config, &host, machine, frame_buffer)?;
    let bootable = plug_disks(config, &hotplug, &host, machine)?;
    config.nics.plug(&hotplug, machine, config.cpus)?;
    plug_virtio(config, &host, machine, console)?;
    match &config.boot {
        // Without firmware nobody else gives devices their addresses.
        Boot::Kernel { .. } => host.assign()?,
        Boot::Firmware(firmware) => {
            firmware::plug(firmware, machine, flash)?;
            firmware::describe(&fw_cfg, config, &machine.memory, &host, &hotplug, &bootable)?;
        }
    }
    Ok((host, hotplug))
}

/// The virtio devices beside disks.
fn plug_virtio(
    config: &Config,
    host: &pci::Host,
    machine: &Machine,
    console: &Arc<Console>,
) -> Result<(), Error> {
    let entropy = virtio::rng::Rng::new().map_err(|source| Error::Host { what: "random bytes", source })?;
    virtio_function(host, machine, Arc::new(entropy))?;
    virtio_function(host, machine, Arc::new(virtio::vsock::Vsock::new(config.sockets.clone())))?;
    for share in &config.shares {
        let session = shares::Session::new(share.directory.clone())?;
        virtio_function(host, machine, Arc::new(virtio::fs::Fs::new(session, &share.tag)))?;
    }
    let balloon = virtio::balloon::Balloon::new(machine.memory.clone(), config.balloon.clone());
    virtio_function(host, machine, Arc::new(balloon))?;
    if let Some(pluggable) = machine.memory.pluggable() {
        let device = virtio::mem::Mem::new(pluggable, config.plugs.clone());
        virtio_function(host, machine, Arc::new(device))?;
    }
    if let Some(port) = console.port() {
        let device = virtio::console::Console::new(std::slice::from_ref(port));
        console
            .attach_port(&machine.power)
            .map_err(|source| Error::Host { what: "a thread for the console", source })?;
        virtio_function(host, machine, Arc::new(device))?;
    }
    Ok(())
}

/// The display, and who looks at it.
fn plug_display(
    config: &Config,
    host: &pci::Host,
    machine: &Machine,
    frame_buffer: Window,
) -> Result<(), Error> {
    match config.display {
        Display::None => {}
        Display::Vga => {
            let vga = vga::Vga::new(frame_buffer);
            vga.insert(&machine.ports, &machine.mmio)?;
            host.plug(Some(vga::ADDRESS), vga.clone())?;
            let source: Arc<dyn screens::Source> = vga;
            config.screen.show(Arc::downgrade(&source));
        }
        Display::Virtio => {
            let gpu = Arc::new(virtio::gpu::Gpu::new(machine.memory.clone()));
            virtio_function(host, machine, gpu.clone())?;
            let source: Arc<dyn screens::Source> = gpu;
            config.screen.show(Arc::downgrade(&source));
            for kind in [virtio::input::Kind::Keyboard, virtio::input::Kind::Tablet] {
                let device = Arc::new(virtio::input::InputDevice::new(kind));
                virtio_function(host, machine, device.clone())?;
                let input: Arc<dyn screens::Input> = device;
                config.screen.plug(Arc::downgrade(&input));
            }
        }
    }
    Ok(())
}

/// The disks and CD-ROM drives, each with its controller; the order in which firmware shall try to start from them.
fn plug_disks(
    config: &Config,
    hotplug: &Arc<pci::HotPlug>,
    host: &pci::Host,
    machine: &Arc<Machine>,
) -> Result<Vec<String>, Error> {
    let (mut sata, mut bootable) = (Vec::new(), Vec::new());
    for (disk, at) in config.disks.plug(hotplug, machine, config.cpus)? {
        bootable.push(match (disk.bus, at) {
            (DiskBus::Nvme, Some(at)) => firmware::boot_path("pci8086,5845", at, "namespace@1,0"),
            (_, Some(at)) => firmware::boot_path("scsi", at, "disk@0,0"),
            (_, None) => {
                let drive = format!("drive@{:x}/disk@0", sata.len());
                sata.push(ahci::Attached::Disk(disk.image, disk.serial));
                firmware::boot_path("pci8086,2922", ahci::ADDRESS, &drive)
            }
        });
    }
    for (n, cd) in config.cdroms.iter().enumerate() {
        let drive = format!("drive@{:x}/disk@0", sata.len());
        bootable.push(firmware::boot_path("pci8086,2922", ahci::ADDRESS, &drive));
        sata.push(ahci::Attached::Cd(cd.clone(), format!("lodge-cd-{n}")));
    }
    match sata.len() {
        0 => {}
        1..=ahci::PORTS => {
            let controller = ahci::Ahci::new(&sata, machine.memory.clone())
                .map_err(|source| Error::Host { what: "a thread for a device", source })?;
            host.plug(Some(ahci::ADDRESS), controller)?;
        }
        more => return Err(Error::Sata(more)),
    }
    Ok(bootable)
}

/// Puts a virtio device on the PCI bus.
fn virtio_function(
    host: &pci::Host,
    machine: &Machine,
    device: Arc<dyn virtio::Device>,
) -> Result<pci::Address, Error> {
    let function = virtio::Pci::new(device, machine.memory.clone())
        .map_err(|source| Error::Host { what: "a thread for a device", source })?;
    Ok(host.plug(None, function)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the ACPI tables tell of INTx must be how the chipset is wired.
    #[test]
    fn interrupt_routing_is_described_as_it_is() {
        for slot in 0..32 {
            for pin in 0..4 {
                let address = pci::Address::new(slot, 0).unwrap();
                let wired = u32::from(pci::PIRQ_GSI + address.pirq(pin));
                assert_eq!(wired, boot::acpi::intx_gsi(slot.into(), pin.into()), "slot {slot}, pin {pin}");
            }
        }
    }
}
