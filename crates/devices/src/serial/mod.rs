//! A serial port: National Semiconductor's PC16550D (data sheet of 1995), with 16-byte FIFOs.
//!
//! Not made of vm-superio's, which has no FIFO control, encodes pending interrupts as a set of bits instead of the most
//! urgent one (data and "transmitter empty" together read as "line status"), forgets the data interrupt when the
//! identification register is read, and knows no level of the interrupt pin.
//!
//! Characters take no time on the wire. Both directions have a queue on the host's side, and neither loses bytes:
//! * Output is written by a thread of its own, so that a slow terminal does not hold the guest. While that thread is
//!   [`FULL`] bytes behind, the transmitter reports that it is busy.
//! * Input is sent when the guest listens: it has the data interrupt enabled, or polls the line status. What it throws
//!   away by clearing its FIFO is sent again. So commands piped in before the guest has booted reach its shell.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use machine::Registers;
use machine::irq::Line;
use serde::{Deserialize, Serialize};

use crate::{At, Saved, lock, read_bytes, write_bytes};

#[cfg(test)]
mod tests;

/// COM1's ports; its interrupt is 4.
pub const COM1: At = At::new(0x3f8, 8);
/// COM2's ports; its interrupt is 3.
pub const COM2: At = At::new(0x2f8, 8);

/// Bytes of output that wait for the host before the transmitter is busy, and of input before [`Serial::push`] takes no
/// more.
pub const FULL: usize = 64 << 10;
/// A guest that ignores that the transmitter is busy is stopped here …
const OVERFULL: usize = 2 * FULL;
/// … for so long for each byte, which is then lost.
const PATIENCE: Duration = Duration::from_secs(1);

const FIFO: usize = 16;
/// Line status reads in a row that count as polling for input. Linux reads it up to three times while it sets up the port,
/// and throws away what it finds.
const POLLS: u8 = 4;

mod ier {
    pub const DATA: u8 = 1;
    pub const THR_EMPTY: u8 = 2;
    pub const LINE_STATUS: u8 = 4;
    pub const MODEM_STATUS: u8 = 8;
}
mod iir {
    pub const NONE: u8 = 1;
    pub const MODEM_STATUS: u8 = 0;
    pub const THR_EMPTY: u8 = 2;
    pub const DATA: u8 = 4;
    pub const LINE_STATUS: u8 = 6;
    pub const TIMEOUT: u8 = 0xc;
    pub const FIFOS: u8 = 0xc0;
}
mod lsr {
    pub const DATA_READY: u8 = 1;
    pub const OVERRUN: u8 = 2;
    pub const EMPTY: u8 = 0x60;
}
mod mcr {
    pub const OUT2: u8 = 8;
    pub const LOOP: u8 = 0x10;
}
const DLAB: u8 = 0x80;
const FIFO_ENABLE: u8 = 1;
/// The terminal is there and ready: DCD, DSR, CTS.
const CONNECTED: u8 = 0xb0;

/// The port's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Interrupt enable.
    pub ier: u8,
    /// FIFO control, as written, without the bits that clear.
    pub fcr: u8,
    /// Line control.
    pub lcr: u8,
    /// Modem control.
    pub mcr: u8,
    /// Scratch.
    pub scr: u8,
    /// Divisor latch.
    pub divisor: u16,
    /// Bits 0–3 of modem status: what changed since it was read.
    pub modem_changes: u8,
    /// A byte came when the FIFO was full.
    pub overrun: bool,
    /// "Transmitter empty" waits to be reported.
    pub thr_interrupt: bool,
    /// Line status reads in a row.
    pub polls: u8,
    /// The receiver's FIFO.
    pub received: VecDeque<u8>,
    /// Bytes from the host on their way.
    pub input: VecDeque<u8>,
}

impl State {
    fn reset() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            divisor: 12,
            modem_changes: 0,
            overrun: false,
            thr_interrupt: false,
            polls: 0,
            received: VecDeque::new(),
            input: VecDeque::new(),
        }
    }

    fn capacity(&self) -> usize {
        if self.fcr & FIFO_ENABLE != 0 { FIFO } else { 1 }
    }

    fn modem_lines(&self) -> u8 {
        if self.mcr & mcr::LOOP == 0 {
            return CONNECTED;
        }
        // CTS = RTS, DSR = DTR, RI = OUT1, DCD = OUT2.
        (self.mcr & 2) << 3 | (self.mcr & 1) << 5 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
    }

    /// Moves input into the FIFO if the guest listens.
    fn receive(&mut self) {
        let listens = self.ier & ier::DATA != 0 || self.polls >= POLLS;
        while listens && self.mcr & mcr::LOOP == 0 && self.received.len() < self.capacity() {
            let Some(byte) = self.input.pop_front() else { return };
            self.received.push_back(byte);
        }
    }

    fn unreceive(&mut self) {
        while let Some(byte) = self.received.pop_back() {
            if self.mcr & mcr::LOOP == 0 {
                self.input.push_front(byte);
            }
        }
    }

    /// The most urgent interrupt, as the identification register tells it.
    fn interrupt(&self) -> u8 {
        let trigger = match self.fcr >> 6 {
            _ if self.fcr & FIFO_ENABLE == 0 => 1,
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        };
        if self.ier & ier::LINE_STATUS != 0 && self.overrun {
            iir::LINE_STATUS
        } else if self.ier & ier::DATA != 0 && self.received.len() >= trigger {
            iir::DATA
        } else if self.ier & ier::DATA != 0 && !self.received.is_empty() {
            // The time-out is four characters of silence, and characters take no time.
            iir::TIMEOUT
        } else if self.ier & ier::THR_EMPTY != 0 && self.thr_interrupt {
            iir::THR_EMPTY
        } else if self.ier & ier::MODEM_STATUS != 0 && self.modem_changes != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }
}

/// Bytes on their way to the host.
#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    /// The writer has bytes that it took from the queue.
    writing: bool,
    /// The host refused output, or the port is gone.
    closed: bool,
    /// The transmitter said that it was busy: the guest is to be told when it is not.
    owes_interrupt: bool,
    lost: u64,
}

struct Shared {
    state: Mutex<State>,
    room: Condvar,
    output: Mutex<Output>,
    changed: Condvar,
    irq: Line,
}

/// A 16550A.
pub struct Serial(Arc<Shared>);

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Serial").field(&*lock(&self.0.state)).finish()
    }
}

impl Serial {
    /// A port whose interrupt pin is `irq`, and that writes to `out`. An error of `out` closes the output: what the guest
    /// sends then is dropped.
    ///
    /// # Panics
    /// The host gives no thread.
    pub fn new(irq: Line, out: Box<dyn Write + Send>) -> Arc<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::reset()),
            room: Condvar::new(),
            output: Mutex::default(),
            changed: Condvar::new(),
            irq,
        });
        let theirs = shared.clone();
        std::thread::Builder::new()
            .name("serial".into())
            .spawn(move || theirs.write_out(out))
            .expect("the host gives a thread");
        Arc::new(Self(shared))
    }

    /// Sends bytes to the guest. Returns how many were taken; the others found the queue full.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut state = lock(&self.0.state);
        let n = bytes.len().min(FULL.saturating_sub(state.input.len()));
        state.input.extend(&bytes[..n]);
        self.0.settle(state);
        n
    }

    /// Sends bytes to the guest, and waits until the queue took them all or the time is up. Returns how many were taken.
    pub fn push_all(&self, bytes: &[u8], patience: Duration) -> usize {
        let end = Instant::now() + patience;
        let mut taken = 0;
        loop {
            taken += self.push(&bytes[taken..]);
            let left = end.saturating_duration_since(Instant::now());
            if taken == bytes.len() || left.is_zero() {
                return taken;
            }
            let state = lock(&self.0.state);
            if state.input.len() >= FULL {
                drop(self.0.room.wait_timeout(state, left));
            }
        }
    }

    /// Waits until all output is written, at most so long. Tells whether it is.
    pub fn drain(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut output = lock(&self.0.output);
        while output.writing || !output.bytes.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if output.closed || left.is_zero() {
                return false;
            }
            output = self.0.changed.wait_timeout(output, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        true
    }

    /// Bytes of output that were lost, for the guest ignored that the transmitter was busy.
    pub fn lost(&self) -> u64 {
        lock(&self.0.output).lost
    }

    /// The registers and the input on its way. Output on its way is the host's business: [`Serial::drain`] it.
    pub fn state(&self) -> Saved<State> {
        Saved::V1(lock(&self.0.state).clone())
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut state = state.clone();
        state.received.truncate(FIFO);
        state.input.truncate(FULL);
        let mut ours = lock(&self.0.state);
        *ours = state;
        self.0.settle(ours);
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        lock(&self.0.output).closed = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    /// Receives what can be, and tells pushers when there is room.
    fn refill(&self, state: &mut State) {
        let before = state.input.len();
        state.receive();
        if before >= FULL && state.input.len() < FULL {
            self.room.notify_all();
        }
    }

    /// After a change: more input may come, and the pin may change.
    fn settle(&self, mut state: MutexGuard<'_, State>) {
        self.refill(&mut state);
        // The board gates the pin with OUT2, and loopback turns OUT2 off.
        let gate = state.mcr & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2;
        self.irq.set(gate && state.interrupt() != iir::NONE);
    }

    fn read(&self, offset: u64) -> u8 {
        let mut state = lock(&self.state);
        let polls = std::mem::take(&mut state.polls);
        let value = match offset {
            0 if state.lcr & DLAB != 0 => state.divisor as u8,
            1 if state.lcr & DLAB != 0 => (state.divisor >> 8) as u8,
            0 => state.received.pop_front().unwrap_or(0),
            1 => state.ier,
            2 => {
                let id = state.interrupt();
                state.thr_interrupt &= id != iir::THR_EMPTY;
                id | if state.fcr & FIFO_ENABLE != 0 { iir::FIFOS } else { 0 }
            }
            3 => state.lcr,
            4 => state.mcr,
            5 => {
                state.polls = polls.saturating_add(1);
                // Now that it polls, this very read is to see what there is.
                self.refill(&mut state);
                let overrun = if std::mem::take(&mut state.overrun) { lsr::OVERRUN } else { 0 };
                let ready = if state.received.is_empty() { 0 } else { lsr::DATA_READY };
                ready | overrun | if self.busy() { 0 } else { lsr::EMPTY }
            }
            6 => state.modem_lines() | std::mem::take(&mut state.modem_changes),
            _ => state.scr,
        };
        self.settle(state);
        value
    }

    fn write(&self, offset: u64, value: u8) {
        let mut state = lock(&self.state);
        state.polls = 0;
        match offset {
            0 if state.lcr & DLAB != 0 => state.divisor = state.divisor & 0xff00 | u16::from(value),
            1 if state.lcr & DLAB != 0 => state.divisor = state.divisor & 0xff | u16::from(value) << 8,
            0 => {
                state.thr_interrupt = false;
                if state.mcr & mcr::LOOP == 0 {
                    drop(state);
                    let busy = self.send(value);
                    state = lock(&self.state);
                    // The writer may have said so already.
                    state.thr_interrupt |= !busy;
                } else {
                    if state.received.len() < state.capacity() {
                        state.received.push_back(value);
                    } else {
                        state.overrun = true;
                    }
                    state.thr_interrupt = true;
                }
            }
            1 => {
                // Enabling the interrupt while the transmitter is empty raises it.
                if value & !state.ier & ier::THR_EMPTY != 0 && !self.busy() {
                    state.thr_interrupt = true;
                }
                state.ier = value & 0xf;
            }
            2 => {
                if value & 2 != 0 || (value ^ state.fcr) & FIFO_ENABLE != 0 {
                    state.unreceive();
                }
                state.fcr = if value & FIFO_ENABLE != 0 { value & 0xc9 } else { 0 };
            }
            3 => state.lcr = value,
            4 => {
                let before = state.modem_lines();
                // What loops round does not mix with what comes from outside.
                if (value ^ state.mcr) & mcr::LOOP != 0 {
                    state.unreceive();
                }
                state.mcr = value & 0x1f;
                let after = state.modem_lines();
                let changed = (before ^ after) >> 4;
                // RI's bit tells the end of a ring only.
                state.modem_changes |= changed & 0xb | changed & (before >> 4) & 4;
            }
            7 => state.scr = value,
            _ => {}
        }
        self.settle(state);
    }

    /// Whether the transmitter cannot take a byte. If so the guest is told when it can.
    fn busy(&self) -> bool {
        let mut output = lock(&self.output);
        output.owes_interrupt |= output.bytes.len() >= FULL;
        output.bytes.len() >= FULL
    }

    /// Queues a byte of output. Tells whether the transmitter is busy now.
    fn send(&self, byte: u8) -> bool {
        let mut output = lock(&self.output);
        let end = Instant::now() + PATIENCE;
        while output.bytes.len() >= OVERFULL && !output.closed {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                output.lost += 1;
                return true;
            }
            output = self.changed.wait_timeout(output, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        if output.closed {
            return false;
        }
        output.bytes.push_back(byte);
        if !output.writing {
            self.changed.notify_all();
        }
        output.owes_interrupt |= output.bytes.len() >= FULL;
        output.bytes.len() >= FULL
    }

    /// The writer's thread: writes whatever is there, all at once. While the host takes its time, the next batch gathers.
    fn write_out(&self, mut out: Box<dyn Write + Send>) {
        loop {
            let mut output = lock(&self.output);
            output.writing = false;
            self.changed.notify_all();
            while output.bytes.is_empty() {
                if output.closed {
                    return;
                }
                output = self.changed.wait(output).unwrap_or_else(|e| e.into_inner());
            }
            output.writing = true;
            let bytes = std::mem::take(&mut output.bytes);
            let owes = std::mem::take(&mut output.owes_interrupt);
            drop(output);
            if owes {
                let mut state = lock(&self.state);
                state.thr_interrupt = true;
                self.settle(state);
            }
            self.changed.notify_all();
            let (a, b) = bytes.as_slices();
            if [a, b].into_iter().try_for_each(|part| out.write_all(part)).and_then(|()| out.flush()).is_err()
            {
                let mut output = lock(&self.output);
                output.closed = true;
                output.writing = false;
                output.bytes.clear();
                self.changed.notify_all();
                return;
            }
        }
    }
}

impl Registers for Serial {
    fn read(&self, offset: u64, size: u8) -> u64 {
        read_bytes(offset, size, |offset| self.0.read(offset))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        write_bytes(offset, size, value, |offset, value| self.0.write(offset, value));
    }
}
