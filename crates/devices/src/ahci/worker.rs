//! What a port's thread does: fetches commands from guest memory, has the device do them, and tells their ends (AHCI 1.3.1,
//! chapters 4 and 5).

use std::sync::atomic::Ordering;

use super::fis::{Done, Kind, Taskfile};
use super::registers::{Port, is};
use super::{Inner, Io, Unit};
use crate::dma::{Fault, Pieces, fetch, le32, store};
use crate::lock;

/// Bytes of a command's header, and of an entry of its table of pieces.
const HEADER: usize = 32;
const ENTRY: usize = 16;
/// Where packet and pieces are in a command table.
const PACKET: u64 = 0x40;
const TABLE: u64 = 0x80;

/// Where FISes are received.
const AT_PIO: u64 = 0x20;
const AT_REGISTERS: u64 = 0x40;
const AT_BITS: u64 = 0x58;

/// Control register: the device is to be in reset.
const SOFT_RESET: u8 = 4;

/// A command from the list.
struct Command {
    task: Option<Taskfile>,
    packet: [u8; 16],
    pieces: Pieces,
    /// An interrupt is wanted when a piece is done.
    piece_interrupt: bool,
    /// Where the count of moved bytes goes.
    count_at: u64,
}

/// How a command ended.
enum End {
    Done(Done, bool),
    /// A value of the control register, which nothing answers.
    Control,
    /// The end of a software reset.
    Signature(Done),
    /// The bits of PxIS of an error of the controller's.
    Broken(u32),
}

impl Inner {
    /// The thread of port `n`, until the controller goes.
    pub(super) fn serve(&self, n: usize) {
        while self.wait(n) {
            self.step(n);
        }
    }

    /// Does the next thing that there is to do at port `n`, if there is any.
    pub(super) fn step(&self, n: usize) {
        let mut unit = lock(&self.units[n]);
        let (slot, era, list) = {
            let mut registers = lock(&self.registers);
            let port = &mut registers.ports[n];
            if port.reset {
                port.end_reset(&unit.signature());
                // Where the host has no room for it, it sees the registers all the same.
                let _ = self.receive(port, AT_REGISTERS, &unit.signature().registers(false));
                registers.check_reset();
                self.settle(&mut registers, true);
                return;
            }
            let Some(slot) = port.take() else { return };
            (slot, port.era, port.list)
        };
        let (end, count_at) = match self.fetch(list, slot) {
            Ok(command) => (self.execute(&mut unit, &command), command.count_at),
            Err(_) => (End::Broken(is::BUS), 0),
        };
        let mut registers = lock(&self.registers);
        let port = &mut registers.ports[n];
        if port.era == era {
            self.finish(port, slot, count_at, &end);
        }
        port.idle();
        self.settle(&mut registers, true);
    }

    /// Waits for work. False if there will be none any more.
    fn wait(&self, n: usize) -> bool {
        let mut registers = lock(&self.registers);
        loop {
            if self.stopped.load(Ordering::SeqCst) {
                return false;
            }
            let port = &registers.ports[n];
            if port.reset || port.has_work() && self.config.bus_master() {
                return true;
            }
            registers = self.wakes[n].wait(registers).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Whether port `n` has something to do.
    #[cfg(fuzzing)]
    pub(super) fn has_work(&self, n: usize) -> bool {
        let port = &lock(&self.registers).ports[n];
        port.reset || port.busy || port.has_work() && self.config.bus_master()
    }

    pub(super) fn stop(&self) {
        let _registers = lock(&self.registers);
        self.stopped.store(true, Ordering::SeqCst);
        self.wakes.iter().for_each(std::sync::Condvar::notify_all);
    }

    /// Reads the command in `slot` of the list.
    fn fetch(&self, list: u64, slot: u32) -> Result<Command, Fault> {
        let at = list.checked_add(u64::from(slot) * HEADER as u64).ok_or(Fault::Memory)?;
        let header: [u8; HEADER] = fetch(&self.memory, at)?;
        let table = u64::from(le32(&header, 12)) << 32 | u64::from(le32(&header, 8) & !0x7f);
        let below = |offset: u64| table.checked_add(offset).ok_or(Fault::Memory);
        let fis: [u8; 20] = fetch(&self.memory, table)?;
        let packet = fetch(&self.memory, below(PACKET)?)?;
        // Five double words of a FIS from the host.
        let task = Taskfile::parse(&fis).filter(|_| header[0] & 0x1f == 5);
        let entries = le32(&header, 0) >> 16;
        let mut pieces = Pieces::default();
        let mut piece_interrupt = false;
        for n in 0..u64::from(entries) {
            let entry: [u8; ENTRY] = fetch(&self.memory, below(TABLE + n * ENTRY as u64)?)?;
            let flags = le32(&entry, 12);
            // Bytes less one, always even.
            let bytes = u64::from(flags & 0x3f_ffff | 1) + 1;
            pieces.push(u64::from(le32(&entry, 4)) << 32 | u64::from(le32(&entry, 0) & !1), bytes);
            piece_interrupt |= flags >> 31 != 0;
        }
        Ok(Command { task, packet, pieces, piece_interrupt, count_at: at + 4 })
    }

    fn execute(&self, unit: &mut Unit, command: &Command) -> End {
        let Some(task) = &command.task else { return End::Broken(is::PROTOCOL) };
        if !task.is_command {
            // After the host has taken the bit back the device is there again.
            return if task.control & SOFT_RESET != 0 {
                End::Control
            } else {
                End::Signature(unit.signature())
            };
        }
        let io = Io { memory: &self.memory, pieces: &command.pieces };
        match unit.command(task, &command.packet, &io) {
            Ok(done) => End::Done(done, command.piece_interrupt),
            Err(Fault::Short) => End::Broken(is::OVERFLOW),
            Err(Fault::Memory | Fault::Disk) => End::Broken(is::BUS_DATA),
        }
    }

    /// Tells the end of the command in `slot`.
    fn finish(&self, port: &mut Port, slot: u32, count_at: u64, end: &End) {
        let told = match end {
            End::Broken(bits) => {
                port.is |= bits;
                port.halted = true;
                return;
            }
            End::Control => {
                port.ci &= !(1 << slot);
                return;
            }
            End::Signature(done) => {
                port.ci &= !(1 << slot);
                port.present(done);
                self.receive(port, AT_REGISTERS, &done.registers(false))
            }
            End::Done(done, piece) => {
                port.is |= if *piece { is::PIECE } else { 0 };
                store(&self.memory, count_at, &(done.bytes as u32).to_le_bytes())
                    .and_then(|()| self.tell(port, slot, done))
            }
        };
        if told.is_err() {
            port.is |= is::BUS;
            port.halted = true;
        }
    }

    fn tell(&self, port: &mut Port, slot: u32, done: &Done) -> Result<(), Fault> {
        port.tfd = done.task();
        if let Kind::PioIn(bytes) | Kind::PacketIn(bytes) = done.kind
            && !done.failed()
        {
            self.receive(port, AT_PIO, &done.pio(bytes))?;
            port.is |= is::PIO;
        }
        match done.kind {
            Kind::Queued(tag) => {
                let tags = if done.failed() { 0 } else { 1 << tag };
                self.receive(port, AT_BITS, &done.bits(tags))?;
                port.sact &= !tags;
                port.is |= is::DEVICE_BITS;
            }
            // The PIO setup FIS has the status at the end.
            Kind::PioIn(_) if !done.failed() => {}
            _ => {
                self.receive(port, AT_REGISTERS, &done.registers(true))?;
                port.is |= is::REGISTERS;
            }
        }
        if done.failed() {
            port.is |= is::TASK_FILE;
            port.halted = true;
        } else {
            port.ci &= !(1 << slot);
        }
        Ok(())
    }

    /// Writes a FIS to where the host wants to have it.
    fn receive(&self, port: &Port, at: u64, fis: &[u8]) -> Result<(), Fault> {
        if !port.receives() {
            return Ok(());
        }
        store(&self.memory, port.received.checked_add(at).ok_or(Fault::Memory)?, fis)
    }
}
