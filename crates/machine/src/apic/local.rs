//! A processor's own APIC, for engines that have none in the host's kernel.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};

use x86::msr;

use super::apics::Shared;
use super::registers::{LocalState, at, base, esr, get, lvt, set};
use super::{Destination, Mode};
use crate::clock::Timer;

/// Bit of [`Local::pending`]: [`Local::take_events`] has something.
pub const EVENT: u32 = 1;
/// Bit of [`Local::pending`]: [`Local::acknowledge`] would give a vector.
pub const INTERRUPT: u32 = 2;

/// A guest that asks for a shorter period than this (nanoseconds) gets this: timers must not eat the host.
const SHORTEST_PERIOD: u64 = 20_000;

/// What happened to the processor, beside interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Somebody wants [`crate::cpu::Vcpu::run`] to return.
    pub kicked: bool,
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// INIT, before `sipi` if both are there.
    pub init: bool,
    /// A start-up IPI with this vector.
    pub sipi: Option<u8>,
}

type Bell = Box<dyn Fn() + Send + Sync>;

struct Inner {
    /// Its `nmi`, `init` and `sipi` are meaningless here: `events` has them.
    state: LocalState,
    events: Events,
}

/// A processor's own APIC.
pub struct Local {
    pending: AtomicU32,
    inner: Mutex<Inner>,
    wake: Condvar,
    bell: OnceLock<Bell>,
    timer: Timer,
    shared: Weak<Shared>,
    id: u32,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Local {
    pub(super) fn new(id: u32, shared: &Weak<Shared>, timers: &crate::Timers) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            let this = this.clone();
            let timer = timers.timer(move || {
                if let Some(local) = this.upgrade() {
                    local.expired();
                }
            });
            Self {
                pending: AtomicU32::new(0),
                inner: Mutex::new(Inner { state: LocalState::new(id), events: Events::default() }),
                wake: Condvar::new(),
                bell: OnceLock::new(),
                timer,
                shared: shared.clone(),
                id,
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Does something to the registers, and tells the processor what follows from it.
    fn with<R>(&self, f: impl FnOnce(&mut LocalState, &mut Events) -> R) -> R {
        let mut inner = self.lock();
        let Inner { state, events } = &mut *inner;
        let result = f(state, events);
        let mut pending = if *events == Events::default() { 0 } else { EVENT };
        if state.deliverable().is_some() || state.extint_ready() {
            pending |= INTERRUPT;
        }
        let before = self.pending.swap(pending, Ordering::AcqRel);
        drop(inner);
        if pending & !before != 0 {
            self.wake.notify_all();
            if let Some(ring) = self.bell.get() {
                ring();
            }
        }
        result
    }

    /// The initial APIC id, which is the vCPU's number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// [`EVENT`] and [`INTERRUPT`]: cheap, to be polled between blocks of instructions.
    #[inline]
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::Acquire)
    }

    /// Has `ring` called, by whichever thread, when [`Local::pending`] gains a bit: for engines whose code does not poll.
    /// Only the first one counts.
    pub fn set_bell(&self, ring: impl Fn() + Send + Sync + 'static) {
        let _ = self.bell.set(Box::new(ring));
    }

    /// What happened, and forgets it.
    pub fn take_events(&self) -> Events {
        self.with(|_, events| std::mem::take(events))
    }

    /// The interrupt that the processor takes now: it goes into service.
    pub fn acknowledge(&self) -> Option<u8> {
        let (vector, extint) = self.with(|state, _| {
            if let Some(vector) = state.deliverable() {
                set(&mut state.irr, vector, false);
                set(&mut state.isr, vector, true);
                return (Some(vector), false);
            }
            let extint = state.extint_ready();
            state.extint_message = false;
            (None, extint)
        });
        // The 8259 is asked without our lock: it will tell us of its INTR.
        if extint { self.shared.upgrade()?.acknowledge() } else { vector }
    }

    /// Waits, as HLT does, for an event, or for an interrupt if `interrupts`.
    pub fn wait(&self, interrupts: bool) {
        let mask = EVENT | if interrupts { INTERRUPT } else { 0 };
        let mut inner = self.lock();
        while self.pending() & mask == 0 {
            inner = self.wake.wait(inner).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Has the processor look up, and [`Events::kicked`] say why.
    pub fn kick(&self) {
        self.with(|_, events| events.kicked = true);
    }

    /// INIT: the registers as after power-up, but for id and base.
    pub fn init(&self) {
        self.timer.cancel();
        self.with(|state, _| state.reset());
    }

    /// The task priority as CR8 shows it.
    pub fn tpr(&self) -> u8 {
        self.lock().state.tpr >> 4
    }

    /// MOV to CR8.
    pub fn set_tpr(&self, class: u8) {
        self.with(|state, _| state.tpr = class << 4);
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.lock().state.base
    }

    /// The guest's TSC is so much ahead of the clock's: TSC deadlines are by it.
    pub fn set_tsc_offset(&self, offset: u64) {
        self.with(|state, _| {
            state.tsc_offset = offset;
            self.arm_deadline(state);
        });
    }

    /// The registers, to save them.
    pub fn state(&self) -> LocalState {
        let inner = self.lock();
        let Events { nmi, init, sipi, .. } = inner.events;
        LocalState { nmi, init, sipi, ..inner.state.clone() }
    }

    /// Goes on with saved registers. The id stays.
    pub fn set_state(&self, saved: &LocalState) {
        self.with(|state, events| {
            *state = LocalState { id: self.id, ..saved.clone() };
            *events = Events { kicked: events.kicked, nmi: state.nmi, init: state.init, sipi: state.sipi };
            match state.expiry {
                0 => self.timer.cancel(),
                at => self.timer.set(at),
            }
        });
    }

    /// A read of the page of registers. Reserved registers read as 0.
    pub fn read(&self, offset: u16) -> u32 {
        let inner = self.lock();
        if inner.state.x2apic() {
            return u32::MAX;
        }
        self.register(&inner.state, offset & 0xff0).unwrap_or(0) as u32
    }

    /// A write to the page of registers.
    pub fn write(&self, offset: u16, value: u32) {
        let offset = offset & 0xff0;
        match offset {
            _ if self.lock().state.x2apic() => {}
            at::ID => self.with(|state, _| state.xid = (value >> 24) as u8),
            at::LDR => self.with(|state, _| state.ldr = value & 0xff00_0000),
            at::DFR => self.with(|state, _| state.dfr = value | 0x0fff_ffff),
            at::ICR_HIGH => {
                self.with(|state, _| state.icr = state.icr & 0xffff_ffff | u64::from(value) << 32);
            }
            at::ICR => {
                let icr = self.lock().state.icr;
                self.command(icr & !0xffff_ffff | u64::from(value));
            }
            _ if self.set_register(offset, value).is_none() => {
                self.with(|state, _| state.error(esr::REGISTER))
            }
            _ => {}
        }
    }

    /// RDMSR of the APIC's MSRs. `None` is #GP.
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        let inner = self.lock();
        match index {
            msr::APIC_BASE => Some(inner.state.base),
            msr::TSC_DEADLINE => Some(if inner.state.timer_mode() == 2 { inner.state.deadline } else { 0 }),
            msr::X2APIC..=0x8ff if inner.state.x2apic() => match ((index & 0xff) << 4) as u16 {
                at::ICR => Some(inner.state.icr),
                at::ID => Some(inner.state.id.into()),
                at::LDR => Some(inner.state.x2ldr().into()),
                at::EOI | at::SELF_IPI | at::ICR_HIGH | at::DFR | at::APR => None,
                offset => self.register(&inner.state, offset),
            },
            _ => None,
        }
    }

    /// WRMSR of the APIC's MSRs. `None` is #GP.
    pub fn write_msr(&self, index: u32, value: u64) -> Option<()> {
        match index {
            msr::APIC_BASE => self.set_base(value),
            msr::TSC_DEADLINE => {
                self.with(|state, _| {
                    if state.timer_mode() == 2 {
                        state.deadline = value;
                        self.arm_deadline(state);
                    }
                });
                Some(())
            }
            msr::X2APIC..=0x8ff if self.lock().state.x2apic() => match ((index & 0xff) << 4) as u16 {
                at::ICR => {
                    self.command(value);
                    Some(())
                }
                at::SELF_IPI if value <= 0xff => {
                    self.request(value as u8, false);
                    Some(())
                }
                at::EOI | at::ESR if value != 0 => None,
                at::TPR if value > 0xff => None,
                at::ID | at::LDR | at::DFR | at::ICR_HIGH => None,
                offset => self.set_register(offset, u32::try_from(value).ok()?),
            },
            _ => None,
        }
    }

    fn set_base(&self, value: u64) -> Option<()> {
        use base::{ADDRESS, BSP, EN, EXTD};
        let (modes, now) = (value & (EN | EXTD), self.base() & (EN | EXTD));
        let legal = match (now & EXTD != 0, modes) {
            (_, EXTD) => false,
            (true, m) => m != EN,
            (false, m) => m != EN | EXTD || now == EN,
        };
        if value & !(ADDRESS | BSP | EN | EXTD) != 0 || !legal {
            return None;
        }
        self.with(|state, _| {
            if modes & EN == 0 {
                state.reset();
                self.timer.cancel();
            }
            state.base = value;
        });
        Some(())
    }

    /// A register that is the same in both forms. `None` where there is none.
    fn register(&self, state: &LocalState, offset: u16) -> Option<u64> {
        let bank = |vectors: &[u32; 8]| Some(vectors[usize::from(offset >> 4 & 7)].into());
        match offset {
            at::ID => Some(u64::from(state.xid) << 24),
            at::VERSION => Some(0x0005_0014),
            at::TPR => Some(state.tpr.into()),
            at::APR | at::PPR => Some(state.ppr().into()),
            at::LDR => Some(state.ldr.into()),
            at::DFR => Some(state.dfr.into()),
            at::SVR => Some(state.svr.into()),
            at::ISR..=0x17f => bank(&state.isr),
            at::TMR..=0x1ff => bank(&state.tmr),
            at::IRR..=0x27f => bank(&state.irr),
            at::ESR => Some(state.esr.0.into()),
            at::ICR => Some(state.icr & 0xffff_ffff),
            at::ICR_HIGH => Some(state.icr >> 32),
            at::LVT..=0x37f => Some(state.lvt[usize::from((offset - at::LVT) >> 4)].into()),
            at::INITIAL => Some(state.initial.into()),
            at::CURRENT => Some(self.current(state)),
            at::DIVIDE => Some(state.divide.into()),
            _ => None,
        }
    }

    /// A write to a register that is the same in both forms. `None` where there is none that can be written.
    fn set_register(&self, offset: u16, value: u32) -> Option<()> {
        match offset {
            at::TPR => self.with(|state, _| state.tpr = value as u8),
            at::EOI => {
                if let Some(vector) = self.with(|state, _| state.eoi())
                    && let Some(shared) = self.shared.upgrade()
                {
                    shared.eoi(vector);
                }
            }
            at::SVR => self.with(|state, _| {
                state.svr = value & 0x1ff;
                if !state.software_enabled() {
                    state.lvt.iter_mut().for_each(|entry| *entry |= lvt::MASKED);
                }
            }),
            at::ESR => self.with(|state, _| state.esr = (state.esr.1, 0)),
            at::LVT..=0x37f => {
                self.with(|state, _| self.set_lvt(state, usize::from((offset - at::LVT) >> 4), value))
            }
            at::INITIAL => self.with(|state, _| {
                state.initial = value;
                self.start(state);
            }),
            at::DIVIDE => self.with(|state, _| {
                let left = self.current(state);
                state.divide = value & 0xb;
                if state.expiry != 0 && state.timer_mode() != 2 {
                    self.arm(state, self.now().saturating_add(left * state.divisor()));
                }
            }),
            _ => return None,
        }
        Some(())
    }

    fn set_lvt(&self, state: &mut LocalState, n: usize, value: u32) {
        let mode = state.timer_mode();
        let masked = if state.software_enabled() { 0 } else { lvt::MASKED };
        state.lvt[n] = value & lvt::WRITABLE[n] | masked;
        if n == lvt::TIMER && (mode == 2) != (state.timer_mode() == 2) {
            // Into or out of TSC-deadline mode: disarmed (SDM vol. 3A, 10.5.4.1).
            (state.expiry, state.deadline, state.initial) = (0, 0, 0);
            self.timer.cancel();
        }
    }

    fn now(&self) -> u64 {
        self.shared.upgrade().map_or(0, |shared| shared.clock.now())
    }

    fn arm(&self, state: &mut LocalState, expiry: u64) {
        state.expiry = expiry.max(1);
        self.timer.set(state.expiry);
    }

    fn disarm(&self, state: &mut LocalState) {
        state.expiry = 0;
        self.timer.cancel();
    }

    /// A write to the initial count starts the timer.
    fn start(&self, state: &mut LocalState) {
        match state.timer_mode() {
            2 => {}
            _ if state.initial == 0 => self.disarm(state),
            _ => {
                let period = u64::from(state.initial) * state.divisor();
                self.arm(state, self.now().saturating_add(period));
            }
        }
    }

    fn arm_deadline(&self, state: &mut LocalState) {
        if state.timer_mode() != 2 {
            return;
        }
        let Some(shared) = self.shared.upgrade() else { return };
        match state.deadline {
            0 => self.disarm(state),
            deadline => {
                let host = shared.clock.tsc();
                // The processor compares unsigned: a deadline that the guest's counter has passed is due now.
                let left = deadline.saturating_sub(host.wrapping_add(state.tsc_offset));
                let expiry =
                    if left == 0 { self.now() } else { shared.clock.ns_at_tsc(host.saturating_add(left)) };
                self.arm(state, expiry);
            }
        }
    }

    /// The current count.
    fn current(&self, state: &LocalState) -> u64 {
        if state.expiry == 0 || state.timer_mode() == 2 {
            return 0;
        }
        state.expiry.saturating_sub(self.now()).div_ceil(state.divisor()).min(state.initial.into())
    }

    /// The timer's time has come.
    fn expired(&self) {
        self.with(|state, _| {
            let now = self.now();
            if state.expiry == 0 || state.expiry > now {
                return; // set anew meanwhile
            }
            match state.timer_mode() {
                1 => {
                    let period = (u64::from(state.initial) * state.divisor()).max(SHORTEST_PERIOD);
                    // Ticks that were missed are lost, as on a processor that was held up.
                    let missed = (now - state.expiry) / period;
                    self.arm(state, state.expiry.saturating_add((missed + 1).saturating_mul(period)));
                }
                _ => (state.expiry, state.deadline) = (0, 0),
            }
            let entry = state.lvt[lvt::TIMER];
            if entry & lvt::MASKED == 0 {
                state.request(entry as u8, false);
            }
        });
    }

    fn request(&self, vector: u8, level: bool) {
        self.with(|state, _| state.request(vector, level));
    }

    /// The level of the 8259's INTR.
    pub(super) fn intr(&self, level: bool) {
        self.with(|state, events| {
            let before = std::mem::replace(&mut state.extint, level);
            if level && !before {
                state.local_interrupt(lvt::LINT0, events);
            }
        });
    }

    pub(super) fn is_destination(&self, destination: Destination) -> bool {
        let inner = self.lock();
        inner.state.enabled() && inner.state.is_destination(destination)
    }

    /// Processor priority, by which the lowest is chosen. `None` where software has disabled the APIC.
    pub(super) fn priority(&self) -> Option<u8> {
        let inner = self.lock();
        inner.state.software_enabled().then(|| inner.state.ppr())
    }

    /// Takes a message. False if it is refused.
    pub(super) fn deliver(&self, mode: Mode, vector: u8, level: bool) -> bool {
        self.with(|state, events| {
            match mode {
                Mode::Fixed | Mode::LowestPriority => {
                    return state.software_enabled() && state.request(vector, level);
                }
                Mode::Nmi => events.nmi = true,
                Mode::Init => (events.init, events.sipi) = (true, None),
                Mode::StartUp => events.sipi = Some(vector),
                Mode::ExtInt => state.extint_message = true,
            }
            true
        })
    }

    /// Whether `vector` is requested or in service: to see in tests and by debuggers.
    pub fn is_active(&self, vector: u8) -> bool {
        let inner = self.lock();
        get(&inner.state.irr, vector) || get(&inner.state.isr, vector)
    }

    /// LINT1, to which NMIs are wired.
    pub fn lint1(&self) {
        self.with(|state, events| state.local_interrupt(lvt::LINT1, events));
    }

    /// A write to the interrupt command register sends an interprocessor interrupt. None of our locks is held meanwhile.
    fn command(&self, icr: u64) {
        let command = self.with(|state, _| {
            state.icr = icr & !(1 << 12);
            let command = state.command()?;
            if matches!(command.0, Mode::Fixed | Mode::LowestPriority) && command.2 < 16 {
                state.error(esr::SEND_ILLEGAL);
                return None;
            }
            Some(command)
        });
        if let (Some((mode, destination, vector)), Some(shared)) = (command, self.shared.upgrade()) {
            // Interprocessor interrupts are edges, whatever the trigger bit says (SDM vol. 3A, 10.6.1).
            shared.send(mode, destination, vector, false);
        }
    }
}
