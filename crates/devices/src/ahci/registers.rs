//! The controller's registers (AHCI 1.3.1, chapter 3), without anything that takes time.

use serde::{Deserialize, Serialize};

use super::fis::{Done, status};

/// Ports of the controller.
pub const PORTS: usize = 6;
/// Where the ports' registers begin, and bytes of each.
pub const PORT_BASE: u64 = 0x100;
pub const PORT_SIZE: u64 = 0x80;

/// Generic registers.
pub mod host {
    pub const CAP: u64 = 0;
    pub const GHC: u64 = 4;
    pub const IS: u64 = 8;
    pub const PI: u64 = 0xc;
    pub const VS: u64 = 0x10;
    pub const CAP2: u64 = 0x24;
}

/// CAP: 64-bit addresses, NCQ, command list override, AHCI only, 6 Gbit/s, 32 slots, 6 ports.
const CAPABILITIES: u32 = 1 << 31 | 1 << 30 | 1 << 24 | 3 << 20 | 1 << 18 | 31 << 8 | (PORTS as u32 - 1);
const VERSION: u32 = 0x1_0301;

/// Bits of GHC.
mod ghc {
    pub const RESET: u32 = 1;
    pub const INTERRUPTS: u32 = 2;
    pub const AHCI: u32 = 1 << 31;
}

/// Registers of a port.
pub mod port {
    pub const CLB: u64 = 0;
    pub const CLBU: u64 = 4;
    pub const FB: u64 = 8;
    pub const FBU: u64 = 0xc;
    pub const IS: u64 = 0x10;
    pub const IE: u64 = 0x14;
    pub const CMD: u64 = 0x18;
    pub const TFD: u64 = 0x20;
    pub const SIG: u64 = 0x24;
    pub const SSTS: u64 = 0x28;
    pub const SCTL: u64 = 0x2c;
    pub const SERR: u64 = 0x30;
    pub const SACT: u64 = 0x34;
    pub const CI: u64 = 0x38;
}

/// Bits of PxCMD.
mod cmd {
    pub const START: u32 = 1;
    pub const SPIN_UP: u32 = 2;
    pub const POWER: u32 = 4;
    pub const OVERRIDE: u32 = 8;
    pub const RECEIVE: u32 = 0x10;
    pub const RECEIVING: u32 = 1 << 14;
    pub const RUNNING: u32 = 1 << 15;
    pub const CURRENT: u32 = 0x1f << 8;
    /// What the host may set and clear: start, receive, "is ATAPI", and its LED.
    pub const WRITABLE: u32 = START | RECEIVE | 3 << 24;
}

/// Bits of PxIS.
pub mod is {
    pub const REGISTERS: u32 = 1;
    pub const PIO: u32 = 2;
    pub const DEVICE_BITS: u32 = 8;
    pub const PIECE: u32 = 0x20;
    pub const CONNECTED: u32 = 0x40;
    pub const OVERFLOW: u32 = 1 << 24;
    pub const PROTOCOL: u32 = 1 << 27;
    pub const BUS_DATA: u32 = 1 << 28;
    pub const BUS: u32 = 1 << 29;
    pub const TASK_FILE: u32 = 1 << 30;
    pub const ALL: u32 = 0xfdc0_00ff;
}

/// PxSERR: a device was connected.
const EXCHANGED: u32 = 1 << 26;
/// PxSSTS: a device, at 6 Gbit/s, active; the port is off.
const LINK_UP: u32 = 0x133;
const LINK_OFF: u32 = 4;

/// A port's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Guest-physical addresses of the command list and of received FISes.
    pub list: u64,
    pub received: u64,
    pub is: u32,
    pub ie: u32,
    pub cmd: u32,
    pub tfd: u32,
    pub sig: u32,
    pub sctl: u32,
    pub serr: u32,
    pub sact: u32,
    pub ci: u32,
    /// After an error no command is fetched until the host has started the port anew.
    pub halted: bool,
    /// The device is to be reset.
    pub reset: bool,
    /// The command at hand is of no interest any more if this changes.
    #[serde(skip)]
    pub era: u64,
    /// Its thread is at a command.
    #[serde(skip)]
    pub busy: bool,
}

impl Port {
    /// As after a reset of the controller, with a device or without.
    fn new(device: bool) -> Self {
        let mut port = Self { cmd: cmd::SPIN_UP | cmd::POWER, sig: u32::MAX, tfd: 0x7f, ..Self::default() };
        if device {
            port.begin_reset();
        }
        port
    }

    fn begin_reset(&mut self) {
        self.era += 1;
        self.reset = true;
        self.tfd = u32::from(status::BUSY) | 0x7f;
    }

    /// The device came back from a reset.
    pub fn end_reset(&mut self, signature: &Done) {
        self.reset = false;
        self.serr |= EXCHANGED;
        self.present(signature);
    }

    /// Takes the registers that a device presents after a reset.
    pub fn present(&mut self, signature: &Done) {
        self.tfd = signature.task();
        self.sig = (signature.lba as u32) << 8 | u32::from(signature.count & 0xff);
    }

    fn is(&self) -> u32 {
        self.is | if self.serr & EXCHANGED != 0 { is::CONNECTED } else { 0 }
    }

    /// Something asks for an interrupt.
    fn asks(&self) -> bool {
        self.is() & self.ie != 0
    }

    /// The slots of commands that can be fetched now.
    fn fetchable(&self) -> u32 {
        if self.cmd & cmd::RUNNING != 0 && self.cmd & cmd::START != 0 && !self.halted { self.ci } else { 0 }
    }

    pub fn has_work(&self) -> bool {
        self.reset || self.fetchable() != 0
    }

    /// Takes the next command, in turns: gives its slot.
    pub fn take(&mut self) -> Option<u32> {
        let ready = self.fetchable();
        if ready == 0 {
            return None;
        }
        let last = self.cmd >> 8 & 0x1f;
        let slot = (last + 1 + ready.rotate_right(last + 1).trailing_zeros()) & 0x1f;
        self.cmd = self.cmd & !cmd::CURRENT | slot << 8;
        self.tfd |= u32::from(status::BUSY);
        self.busy = true;
        Some(slot)
    }

    /// The thread is done with a command. If the host stopped the port meanwhile, it stops now.
    pub fn idle(&mut self) {
        self.busy = false;
        if self.cmd & cmd::START == 0 {
            self.cmd &= !(cmd::RUNNING | cmd::CURRENT);
        }
    }

    /// Whether received FISes are to be written to memory.
    pub fn receives(&self) -> bool {
        self.cmd & cmd::RECEIVE != 0
    }

    fn write_cmd(&mut self, value: u32) {
        let before = self.cmd;
        self.cmd = before & !cmd::WRITABLE | value & cmd::WRITABLE;
        if value & cmd::OVERRIDE != 0 {
            self.tfd &= !u32::from(status::BUSY_AND_REQUEST);
        }
        let receiving = if self.cmd & cmd::RECEIVE != 0 { cmd::RECEIVING } else { 0 };
        self.cmd = self.cmd & !cmd::RECEIVING | receiving;
        if before & !value & cmd::START != 0 {
            self.era += 1;
            (self.ci, self.sact, self.halted) = (0, 0, false);
            if !self.busy {
                self.idle();
            }
        } else if self.cmd & cmd::START != 0 {
            self.cmd |= cmd::RUNNING;
        }
    }

    fn write_sctl(&mut self, value: u32) {
        let (before, after) = (self.sctl & 0xf, value & 0xf);
        self.sctl = value & 0xfff;
        if before != 0 && after == 0 {
            self.begin_reset();
        }
    }

    fn read(&self, at: u64) -> u32 {
        match at {
            port::CLB => self.list as u32,
            port::CLBU => (self.list >> 32) as u32,
            port::FB => self.received as u32,
            port::FBU => (self.received >> 32) as u32,
            port::IS => self.is(),
            port::IE => self.ie,
            port::CMD => self.cmd,
            port::TFD => self.tfd,
            port::SIG => self.sig,
            port::SSTS => match self.sctl & 0xf {
                4 => LINK_OFF,
                0 => LINK_UP,
                _ => 0,
            },
            port::SCTL => self.sctl,
            port::SERR => self.serr,
            port::SACT => self.sact,
            port::CI => self.ci,
            _ => 0,
        }
    }

    fn write(&mut self, at: u64, value: u32) {
        let low = |old: u64, mask: u32| old & !0xffff_ffff | u64::from(value & mask);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            port::CLB => self.list = low(self.list, !0x3ff),
            port::CLBU => self.list = high(self.list),
            port::FB => self.received = low(self.received, !0xff),
            port::FBU => self.received = high(self.received),
            port::IS => self.is &= !value,
            port::IE => self.ie = value & is::ALL,
            port::CMD => self.write_cmd(value),
            port::SCTL => self.write_sctl(value),
            port::SERR => self.serr &= !value,
            port::SACT if self.cmd & cmd::START != 0 => self.sact |= value,
            port::CI if self.cmd & cmd::START != 0 => self.ci |= value,
            _ => {}
        }
    }
}

/// All registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    ghc: u32,
    is: u32,
    pub ports: [Port; PORTS],
    /// Which ports have a device.
    #[serde(skip)]
    implemented: u32,
}

impl Registers {
    /// As after a reset, with devices at the ports of which the bit is set.
    pub fn new(implemented: u32) -> Self {
        let ports = std::array::from_fn(|n| Port::new(implemented & 1 << n != 0));
        Self { ghc: ghc::AHCI, is: 0, ports, implemented }
    }

    /// Takes another's values, which may be made up.
    pub fn set(&mut self, from: &Self) {
        let now = self.ports.each_ref().map(|port| (port.era, port.busy));
        *self = Self { implemented: self.implemented, ..from.clone() };
        for (n, (port, (era, busy))) in self.ports.iter_mut().zip(now).enumerate() {
            (port.era, port.busy) = (era + 1, busy);
            port.reset &= self.implemented & 1 << n != 0;
            if !busy {
                port.idle();
            }
        }
    }

    pub fn read(&self, at: u64) -> u32 {
        match at {
            host::CAP => CAPABILITIES,
            host::GHC => self.ghc,
            host::IS => self.is,
            host::PI => self.implemented,
            host::VS => VERSION,
            host::CAP2 => 0,
            _ => self.port(at).map_or(0, |(n, at)| self.ports[n].read(at)),
        }
    }

    /// Writes a register. Tells whether interrupts are to be sent again.
    pub fn write(&mut self, at: u64, value: u32) -> bool {
        match at {
            host::GHC if value & ghc::RESET != 0 => {
                let fresh = Self::new(self.implemented);
                self.set(&fresh);
                if self.implemented != 0 {
                    self.ghc |= ghc::RESET;
                }
                false
            }
            host::GHC => {
                let on = value & !self.ghc & ghc::INTERRUPTS != 0;
                self.ghc = self.ghc & !ghc::INTERRUPTS | value & ghc::INTERRUPTS;
                on
            }
            host::IS => {
                self.is &= !value;
                true
            }
            _ => {
                let Some((n, at)) = self.port(at) else { return false };
                self.ports[n].write(at, value);
                at == port::IE
            }
        }
    }

    /// Ends the controller's reset when all of its devices have come back.
    pub fn check_reset(&mut self) {
        if self.ports.iter().all(|port| !port.reset) {
            self.ghc &= !ghc::RESET;
        }
    }

    /// The port of a register, which has to have a device, and the register's offset in it.
    fn port(&self, at: u64) -> Option<(usize, u64)> {
        let n = (at.checked_sub(PORT_BASE)? / PORT_SIZE) as usize;
        (n < PORTS && self.implemented & 1 << n != 0).then_some((n, (at - PORT_BASE) % PORT_SIZE))
    }

    /// Marks the ports that ask for an interrupt. Gives whether the pin is to be up.
    pub fn settle(&mut self) -> bool {
        for (n, port) in self.ports.iter().enumerate() {
            self.is |= u32::from(port.asks()) << n;
        }
        self.is != 0 && self.ghc & ghc::INTERRUPTS != 0
    }
}
