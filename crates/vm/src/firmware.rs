//! What firmware is told of the machine, by fw_cfg, in the files that SeaBIOS and OVMF know from QEMU.

use std::sync::Arc;

use boot::acpi::ForFirmware;
use devices::debug::{self, DebugConsole};
use devices::flash::Flash;
use devices::{fw_cfg, pci, pm, serial};
use machine::{Machine, Memory};
use memory::{HOLE_END, HOLE_START, Kind, Window};

use crate::Error;
use crate::config::{Boot, Config, Display, Firmware};

/// Where PCI devices with large BARs go: 512 GiB, up to the end of what the processor addresses.
pub const PCI_WINDOW64: (u64, u64) = (1 << 39, 1 << 39);
/// SeaBIOS' name for the display's option ROM.
const VGA_BIOS: &str = "pci1234,1111.rom";
/// No sleep but S5, whose type is 0: bytes for S0 to S5, bit 7 of each says that there is such a state.
const SYSTEM_STATES: [u8; 6] = [0x80, 0, 0, 0, 0, 0x80 | pm::SLEEP_TYPE_S5];

/// What ACPI tells of a machine that starts without firmware.
pub fn acpi(config: &Config, memory: &Memory, hotplug: &pci::HotPlug) -> boot::acpi::Config {
    let ram = memory.regions().iter().filter(|region| region.kind == Kind::Ram);
    let pluggable = memory.pluggable().map(|more| boot::acpi::PluggableMemory {
        fixed: ram.map(|region| region.gpa..region.gpa + region.size).collect(),
        room: more.gpa()..more.gpa() + more.size(),
    });
    let pm = boot::acpi::Pm {
        event: pm::PM1A_EVENT as u16,
        control: pm::PM1A_CONTROL as u16,
        timer: pm::TIMER as u16,
        gpe0: pm::GPE0 as u16,
        gpe0_len: pm::GPE0_LEN,
        s5: pm::SLEEP_TYPE_S5,
    };
    boot::acpi::Config {
        cpus: config.cpus,
        screen: config.display != Display::None,
        pm,
        sci: pm::SCI,
        pci_windows32: vec![boot::acpi::PCI_WINDOW],
        pci_window64: PCI_WINDOW64,
        mcfg: boot::acpi::MCFG,
        hotplug: boot::acpi::HotPlug {
            port: pci::HOTPLUG.start as u16,
            gpe: pci::HOTPLUG_GPE,
            slots: hotplug.slots(),
        },
        pluggable,
    }
}

/// As [`acpi`], where firmware has given PCI devices their addresses.
fn acpi_now(found: boot::acpi::Config, host: &pci::Host) -> boot::acpi::Config {
    let mcfg = host.ecam().unwrap_or(boot::acpi::MCFG);
    // Whatever is neither RAM nor configuration space, up to the IOAPIC.
    let (start, end) = (HOLE_START, boot::acpi::PCI_WINDOW.end);
    let below = start..mcfg.clamp(start, end);
    let above = mcfg.saturating_add(boot::acpi::MCFG_SIZE).clamp(start, end)..end;
    let (start, size) = PCI_WINDOW64;
    let high = host.memory_bars().into_iter().filter(|bar| bar.start >= 1 << 32);
    let first = high.map(|bar| bar.start).min().unwrap_or(start).min(start);
    boot::acpi::Config {
        pci_windows32: [below, above].into_iter().filter(|window| !window.is_empty()).collect(),
        pci_window64: (first, start + size - first),
        mcfg,
        ..found
    }
}

/// Puts the firmware's own devices on the buses: its flash chip below the code, and its console.
pub fn plug(firmware: &Firmware, machine: &Machine, flash: Window) -> Result<(), Error> {
    if let Some(contents) = &firmware.variables {
        let rom = machine.memory.regions().iter().find(|region| region.kind == Kind::Rom);
        let end = rom.map_or(HOLE_END, |rom| rom.gpa);
        let size = contents.size();
        let at = end.saturating_sub(size);
        machine.mmio.insert(at, size, "flash", Flash::new(contents.clone(), flash, at))?;
    }
    if let Some(log) = &firmware.log {
        let out = log.try_clone().map_err(|source| Error::Host { what: "one more open file", source })?;
        let at = debug::FIRMWARE;
        machine.ports.insert(at.start, at.len, "firmware's console", DebugConsole::new(Box::new(out)))?;
    }
    Ok(())
}

/// Tells firmware all that it asks; `disks` are the Open Firmware paths of what can be started from, best first.
pub fn describe(
    fw_cfg: &fw_cfg::FwCfg,
    config: &Config,
    memory: &Memory,
    host: &Arc<pci::Host>,
    hotplug: &pci::HotPlug,
    disks: &[String],
) -> Result<(), Error> {
    fw_cfg.set(fw_cfg::key::IRQ0_OVERRIDE, &1u32.to_le_bytes());
    fw_cfg.set(fw_cfg::key::NOGRAPHIC, &1u16.to_le_bytes());
    fw_cfg.add_file("etc/e820", boot::ram_for_firmware(memory))?;
    if let Some(more) = memory.pluggable() {
        // The end of what may be memory: above it PCI devices may be placed.
        fw_cfg.add_file("etc/reserved-memory-end", (more.gpa() + more.size()).to_le_bytes().to_vec())?;
    }
    fw_cfg.add_file("etc/system-states", SYSTEM_STATES.to_vec())?;
    // SeaBIOS has its text screen on this port, beside a display's.
    fw_cfg.add_file("etc/sercon-port", serial::COM1.start.to_le_bytes().to_vec())?;
    if let (Display::Vga, Boot::Firmware(Firmware { vga: Some(driver), .. })) = (config.display, &config.boot)
    {
        let bytes = std::fs::read(driver).map_err(|source| Error::Host { what: "the VGA BIOS", source })?;
        fw_cfg.add_file(VGA_BIOS, bytes)?;
    }
    let order: String = disks.iter().map(|path| format!("{path}\n")).collect();
    fw_cfg.add_file("bootorder", [order.as_bytes(), b"\0"].concat())?;
    let (tables, entry) = boot::smbios::for_firmware(memory, config.cpus);
    fw_cfg.add_file("etc/smbios/smbios-tables", tables)?;
    fw_cfg.add_file("etc/smbios/smbios-anchor", entry)?;
    // Firmware reads these when it has found and placed the PCI devices.
    let found = acpi(config, memory, hotplug);
    type Part = fn(ForFirmware) -> Vec<u8>;
    let files: [(&str, Part); 3] = [
        (boot::acpi::TABLES, |f| f.tables),
        (boot::acpi::RSDP, |f| f.rsdp),
        (boot::acpi::LOADER, |f| f.loader),
    ];
    for (name, part) in files {
        let (host, found) = (host.clone(), found.clone());
        fw_cfg.add_made_file(name, move || {
            part(boot::acpi::build(&acpi_now(found.clone(), &host)).for_firmware())
        })?;
    }
    Ok(())
}

/// The Open Firmware path of `disk` at the controller at `address`, whose kind is `kind`.
pub fn boot_path(kind: &str, address: pci::Address, disk: &str) -> String {
    let (device, function) = (address.device(), address.function());
    match function {
        0 => format!("/pci@i0cf8/{kind}@{device:x}/{disk}"),
        _ => format!("/pci@i0cf8/{kind}@{device:x},{function:x}/{disk}"),
    }
}
