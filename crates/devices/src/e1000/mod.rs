//! Intel's Gigabit Ethernet controller 82540EM, for which every system of the last two decades has a driver (PCI/PCI-X Family of Gigabit
//! Ethernet Controllers Software Developer's Manual, 317453: "the manual").
//!
//! One thread does descriptors and delivers frames. Whatever leaves the guest is finished: checksums are computed and long segments cut
//! here. Interrupts are not delayed (RDTR, RADV, TIDV, TADV are taken as 0) but throttled (ITR). Not there: loopback, wake-up, flow
//! control, jumbo frames over 16 KiB.

mod eeprom;
mod phy;
mod receive;
mod registers;
#[cfg(test)]
mod tests;
mod transmit;

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;

use machine::{Clock, Timer, Timers};
use memory::Memory;
use serde::{Deserialize, Serialize};

use crate::net::{Guest, Header, LONGEST_FRAME, Link, Mac, Receiver};
use crate::pci::{Bar, Config, Function, Id};
use crate::{Saved, join, lock, write_words};
use eeprom::Microwire;
use phy::Phy;
use receive::Outcome;
use registers::{EE_RST, Words, cause, ctrl, kept, reg, status};
use transmit::Transmitter;

const ID: Id =
    Id { vendor: 0x8086, device: 0x100e, revision: 2, class: 0x02_0000, subsystem: (0x8086, 0x001e) };
/// BAR 0: the registers. BAR 2: two words in ports, an address and what is there.
const REGISTERS: u32 = 0x2_0000;
const PORTS: u32 = 0x40;
const PORTS_BAR: usize = 2;
/// Bytes of frames that wait for the guest at most, and a frame more.
const FULL: usize = 1 << 20;
/// ITR's unit in ns.
const THROTTLE_UNIT: u64 = 256;

/// The controller's state. Its configuration space is saved with the PCI host's; frames that wait for the guest are lost, as on
/// any network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct E1000State {
    words: Words,
    phy: Phy,
    microwire: Microwire,
    eerd: u32,
    mdic: u32,
    cause: u32,
    mask: u32,
    /// When the next interrupt may be, in ns of guest time.
    next: u64,
    transmitter: Transmitter,
    /// The register that the ports reach.
    address: u32,
}

struct State {
    saved: E1000State,
    /// The interrupt is on.
    asserted: bool,
    cable: bool,
    waiting: VecDeque<(Header, Vec<u8>)>,
    bytes: usize,
    /// A frame was refused.
    refused: bool,
    /// The first frame waits for descriptors.
    stalled: bool,
    stopped: bool,
}

/// The controller as a PCI function.
pub struct E1000 {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Inner {
    config: Config,
    memory: Memory,
    link: Arc<dyn Link>,
    mac: Mac,
    eeprom: [u16; 64],
    clock: Arc<Clock>,
    timer: Timer,
    state: Mutex<State>,
    wake: Condvar,
}

impl fmt::Debug for E1000 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("E1000").field("mac", &self.inner.mac).finish_non_exhaustive()
    }
}

impl E1000 {
    /// A controller with the address `mac` at `link`, which works in `memory`.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn new(
        mac: Mac,
        link: Arc<dyn Link>,
        memory: Memory,
        clock: Arc<Clock>,
        timers: &Timers,
    ) -> std::io::Result<Arc<Self>> {
        let mut config = Config::new(ID);
        config.use_intx();
        config.add_bar_at(0, Bar::Memory32(REGISTERS));
        config.add_bar_at(PORTS_BAR, Bar::Io(PORTS));
        let inner = Arc::new_cyclic(|weak: &Weak<Inner>| {
            let weak = weak.clone();
            let timer = timers.timer(move || {
                if let Some(inner) = weak.upgrade() {
                    inner.settle(&mut lock(&inner.state));
                }
            });
            let state = Mutex::new(State::new(mac));
            let eeprom = eeprom::contents(mac);
            Inner { config, memory, link, mac, eeprom, clock, timer, state, wake: Condvar::new() }
        });
        let receiver: Weak<dyn Receiver> = Arc::<Inner>::downgrade(&inner);
        inner.link.connect(Guest::new(receiver));
        let this = Arc::new(Self { inner: inner.clone(), threads: Mutex::default() });
        let thread = std::thread::Builder::new().name("e1000".into()).spawn(move || inner.serve())?;
        lock(&this.threads).push(thread);
        Ok(this)
    }

    /// Does all that there is to do, so that a fuzzer's input always does the same.
    #[cfg(fuzzing)]
    pub fn drain(&self) {
        while self.inner.has_work(&lock(&self.inner.state)) {
            self.inner.step();
        }
    }

    /// Its registers.
    pub fn state(&self) -> Saved<E1000State> {
        Saved::V1(lock(&self.inner.state).saved.clone())
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<E1000State>) {
        let Saved::V1(from) = state;
        let mut state = lock(&self.inner.state);
        state.saved = from.clone();
        state.saved.words.sanitize();
        state.saved.phy.sanitize();
        state.saved.microwire.sanitize();
        state.saved.transmitter.sanitize();
        let longest = self.inner.clock.now().saturating_add(0xffff * THROTTLE_UNIT);
        state.saved.next = state.saved.next.min(longest);
        state.forget_frames();
        self.inner.settle(&mut state);
        self.inner.wake.notify_all();
    }
}

impl Drop for E1000 {
    fn drop(&mut self) {
        lock(&self.inner.state).stopped = true;
        self.inner.wake.notify_all();
        join(&self.threads);
    }
}

impl Function for E1000 {
    fn config(&self) -> &Config {
        &self.inner.config
    }

    fn read_bar(&self, bar: usize, offset: u64, size: u8) -> u64 {
        let mut state = lock(&self.inner.state);
        let at = match (bar, offset) {
            (0, _) => offset,
            (PORTS_BAR, 0) => return state.saved.address.into(),
            (PORTS_BAR, 4) => state.saved.address.into(),
            _ => return 0,
        };
        // Some registers change when they are read, so each is read once.
        let first = at as u32 & !3;
        let mut value = u64::from(self.inner.read(&mut state, first));
        if size == 8 {
            value |= u64::from(self.inner.read(&mut state, first.wrapping_add(4))) << 32;
        }
        value >> (8 * (at & 3))
    }

    fn write_bar(&self, bar: usize, offset: u64, size: u8, value: u64) {
        let mut state = lock(&self.inner.state);
        match (bar, offset) {
            (0, _) => {
                write_words(offset, size, value, |at, word| self.inner.write(&mut state, at as u32, word))
            }
            (PORTS_BAR, 0) => state.saved.address = value as u32 & (REGISTERS - 1),
            (PORTS_BAR, 4) if size == 4 => {
                let at = state.saved.address & !3;
                self.inner.write(&mut state, at, value as u32);
            }
            _ => {}
        }
    }

    fn config_written(&self, _: u8) {
        // It may be bus master now.
        let _state = lock(&self.inner.state);
        self.inner.wake.notify_all();
    }
}

impl State {
    fn new(mac: Mac) -> Self {
        let mut words = Words::new();
        load_address(&mut words, mac);
        let saved = E1000State {
            words,
            phy: Phy::new(),
            microwire: Microwire::default(),
            eerd: 0,
            mdic: 0,
            cause: 0,
            mask: 0,
            next: 0,
            transmitter: Transmitter::default(),
            address: 0,
        };
        Self {
            saved,
            asserted: false,
            cable: true,
            waiting: VecDeque::new(),
            bytes: 0,
            refused: false,
            stalled: false,
            stopped: false,
        }
    }

    fn is_up(&self) -> bool {
        self.cable && self.saved.phy.is_on()
    }

    fn forget_frames(&mut self) {
        self.waiting.clear();
        (self.bytes, self.stalled) = (0, false);
    }
}

/// The first receive address comes from the EEPROM.
fn load_address(words: &mut Words, mac: Mac) {
    words.set(reg::RA, u32::from_le_bytes([mac[0], mac[1], mac[2], mac[3]]));
    words.set(reg::RA + 4, 1 << 31 | u32::from(mac[5]) << 8 | u32::from(mac[4]));
}

impl Receiver for Inner {
    fn deliver(&self, mut header: Header, frame: &[u8]) -> bool {
        let mut state = lock(&self.state);
        let takes = state.is_up() && receive::is_on(&state.saved.words) && header.segments.is_none();
        if !takes || frame.len() > LONGEST_FRAME {
            return true;
        }
        if !receive::wants(&state.saved.words, frame) {
            return true;
        }
        if state.bytes >= FULL {
            state.refused = true;
            state.saved.cause |= cause::RXO;
            self.settle(&mut state);
            return false;
        }
        let mut frame = frame.to_vec();
        header.finish_checksum(&mut frame);
        state.bytes += frame.len();
        state.waiting.push_back((header, frame));
        self.wake.notify_all();
        true
    }

    fn set_up(&self, up: bool) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.cable, up) != up {
            self.link_changed(&mut state);
        }
    }
}

impl Inner {
    fn read(&self, state: &mut State, at: u32) -> u32 {
        let is_up = state.is_up();
        let saved = &mut state.saved;
        match at {
            reg::STATUS => status::FULL_DUPLEX | status::SPEED_1000 | if is_up { status::LINK_UP } else { 0 },
            reg::EECD => saved.microwire.read(),
            reg::EERD => eeprom::read(&self.eeprom, saved.eerd),
            reg::MDIC => saved.mdic,
            reg::ICR => {
                let cause = std::mem::take(&mut saved.cause);
                self.settle(state);
                cause
            }
            reg::IMS => saved.mask,
            reg::STATISTICS..reg::STATISTICS_END => saved.words.take_statistic(at),
            _ => saved.words.get(at),
        }
    }

    fn write(&self, state: &mut State, at: u32, value: u32) {
        let cable = state.cable;
        let saved = &mut state.saved;
        match at {
            reg::CTRL if value & ctrl::RST != 0 => self.reset(state),
            reg::CTRL => {
                saved.words.set(at, value & !(ctrl::RST | ctrl::PHY_RST));
                if value & ctrl::PHY_RST != 0 {
                    saved.phy = Phy::new();
                    self.link_changed(state);
                }
            }
            reg::EECD => saved.microwire.write(&self.eeprom, value),
            reg::EERD => saved.eerd = value,
            reg::MDIC => {
                let done = saved.phy.access(value, cable);
                saved.mdic = done.mdic;
                saved.cause |= if done.interrupt { cause::MDAC } else { 0 };
                if done.restarted {
                    self.link_changed(state);
                }
            }
            reg::ICR => saved.cause &= !value,
            reg::ICS => saved.cause |= value & cause::ALL,
            reg::IMS => saved.mask |= value & cause::ALL,
            reg::IMC => saved.mask &= !value,
            _ => {
                if (at, value & EE_RST) == (reg::CTRL_EXT, EE_RST) {
                    load_address(&mut saved.words, self.mac);
                }
                if kept(at) != 0 {
                    saved.words.set(at, value & kept(at));
                }
            }
        }
        // There may be descriptors now.
        state.stalled = false;
        self.settle(state);
        if self.has_work(state) {
            self.wake.notify_all();
        }
    }

    /// What CTRL.RST does: everything but the PHY and what the EEPROM is at.
    fn reset(&self, state: &mut State) {
        let fresh = State::new(self.mac).saved;
        let old = std::mem::replace(&mut state.saved, fresh);
        state.saved.phy = old.phy;
        state.saved.microwire = old.microwire;
        state.saved.address = old.address;
        state.forget_frames();
    }

    fn link_changed(&self, state: &mut State) {
        state.saved.phy.link_changed();
        state.saved.cause |= cause::LSC | cause::PHY;
        self.settle(state);
    }

    /// Turns the interrupt on or off, not before its time.
    fn settle(&self, state: &mut State) {
        if state.saved.cause & state.saved.mask == 0 {
            state.asserted = false;
            self.timer.cancel();
        } else if !state.asserted {
            let now = self.clock.now();
            if now < state.saved.next {
                self.timer.set(state.saved.next);
            } else {
                state.asserted = true;
                let pause = u64::from(state.saved.words.get(reg::ITR)) * THROTTLE_UNIT;
                state.saved.next = now.saturating_add(pause);
            }
        }
        self.config.set_intx(state.asserted);
    }

    fn has_work(&self, state: &State) -> bool {
        let words = &state.saved.words;
        let receives = !state.stalled && !state.waiting.is_empty() && receive::is_on(words);
        // A reset has made room.
        let room = state.refused && state.waiting.is_empty();
        (receives || Transmitter::has_work(words)) && self.config.bus_master() || room
    }

    /// Waits for work. False if there will be none any more.
    fn wait<'a>(&'a self, mut state: MutexGuard<'a, State>) -> bool {
        while !state.stopped {
            if self.has_work(&state) {
                return true;
            }
            state = self.wake.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        false
    }

    fn serve(&self) {
        while self.wait(lock(&self.state)) {
            self.step();
        }
    }

    /// Does the next descriptor, and delivers the next frame.
    fn step(&self) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let mut frames = Vec::new();
        if Transmitter::has_work(&state.saved.words) && self.config.bus_master() {
            let saved = &mut state.saved;
            let (done, causes) = saved.transmitter.step(&mut saved.words, &self.memory);
            saved.cause |= causes;
            frames = done;
        }
        let room = self.receive(state);
        let up = state.is_up();
        self.settle(state);
        drop(guard);
        if room {
            self.link.room();
        }
        for frame in frames.iter().filter(|_| up) {
            self.link.send(&Header::default(), frame);
        }
    }

    /// Delivers the next frame. Whether there is room again for others.
    fn receive(&self, state: &mut State) -> bool {
        if state.waiting.is_empty() {
            return std::mem::take(&mut state.refused);
        }
        if state.stalled || !receive::is_on(&state.saved.words) {
            return false;
        }
        let Some((header, frame)) = state.waiting.front() else { return false };
        match receive::receive(&mut state.saved.words, &self.memory, header, frame) {
            Outcome::Wait => state.stalled = true,
            Outcome::Done(causes) => {
                state.saved.cause |= causes;
                state.bytes -= frame.len();
                state.waiting.pop_front();
            }
        }
        let room = state.refused && state.bytes < FULL / 2;
        state.refused &= !room;
        room
    }
}
