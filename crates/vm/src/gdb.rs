//! Debugging a guest with gdb: registers, memory, breakpoints, watchpoints, single steps, on every engine.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use gdbstub::common::{Signal, Tid};
use gdbstub::conn::ConnectionExt;
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use machine::cpu::{Debug, State, Stop};
use machine::{Memory, Power};
use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::cpus::{Cpus, DebugStop};

/// How often a running guest's connection is looked at.
const POLL: Duration = Duration::from_millis(10);

/// gdb's order of general-purpose registers, in the processor's numbers.
const ORDER: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];

/// Serves one gdb after the other, on a thread of its own, until the machine ends. The guest stands still until the first
/// one lets it run, and runs on when one leaves.
pub fn serve(listener: TcpListener, cpus: &Arc<Cpus>, memory: &Memory, power: &Power) -> Result<(), Error> {
    let Some(stops) = cpus.stops() else { return Ok(()) };
    let mut guest = Guest {
        cpus: cpus.clone(),
        memory: memory.clone(),
        power: power.clone(),
        stops,
        breakpoints: Vec::new(),
        watchpoints: Vec::new(),
        stepping: Vec::new(),
        before: None,
    };
    let run = move || {
        for connection in listener.incoming() {
            if guest.power.requested().is_some() {
                return;
            }
            let Ok(connection) = connection else { return };
            // Without it each small packet waits for the acknowledgement of the one before.
            let _ = connection.set_nodelay(true);
            guest.cpus.pause_all();
            let connection: Box<dyn ConnectionExt<Error = std::io::Error>> = Box::new(connection);
            if let Err(error) = GdbStub::new(connection).run_blocking::<Loop>(&mut guest) {
                eprint!("lodge: the connection to gdb ended: {error}\r\n");
            }
            guest.breakpoints.clear();
            guest.watchpoints.clear();
            guest.stepping.clear();
            guest.arm();
            guest.cpus.resume_all();
        }
    };
    std::thread::Builder::new()
        .name("gdb".into())
        .spawn(run)
        .map(drop)
        .map_err(|source| Error::Host { what: "a thread for gdb", source })
}

struct Guest {
    cpus: Arc<Cpus>,
    memory: Memory,
    power: Power,
    stops: Receiver<DebugStop>,
    breakpoints: Vec<u64>,
    watchpoints: Vec<(u64, u64, bool)>,
    /// vCPUs that are to execute one instruction.
    stepping: Vec<usize>,
    /// The vCPU that stands before a breakpoint which gdb does not recognize, and so does not step over by itself.
    before: Option<usize>,
}

fn tid(index: usize) -> Tid {
    Tid::new(index + 1).unwrap_or(Tid::MIN)
}

fn index(tid: Tid) -> usize {
    tid.get() - 1
}

impl Guest {
    /// Tells all vCPUs what to stop at.
    fn arm(&self) -> bool {
        (0..self.cpus.count()).all(|n| {
            let debug = Debug {
                step: self.stepping.contains(&n),
                breakpoints: self.breakpoints.clone(),
                watchpoints: self.watchpoints.clone(),
            };
            self.cpus.debug(n, debug).is_ok()
        })
    }

    /// Has a vCPU execute the instruction that it stands before, whatever breakpoint is there.
    fn step_over(&self, n: usize) {
        if self.cpus.debug(n, Debug { step: true, ..Debug::default() }).is_ok() {
            self.cpus.resume(n);
            // In a halt the step does not end; then the vCPU is past the instruction all the same.
            let _ = self.stops.recv_timeout(POLL);
            self.cpus.pause_all();
            while self.stops.try_recv().is_ok() {}
        }
    }

    /// Copies between `len` bytes at a linear address and guest memory, a page at a time; how many were copied.
    fn pages(
        &self,
        tid: Tid,
        start: u64,
        len: usize,
        mut copy: impl FnMut(GuestAddress, usize, usize) -> bool,
    ) -> usize {
        let mut done = 0;
        while done < len {
            let linear = start.wrapping_add(done as u64);
            let n = (len - done).min(0x1000 - (linear & 0xfff) as usize);
            let Some(Some(gpa)) = self.cpus.call(index(tid), move |vcpu| vcpu.translate(linear)) else {
                break;
            };
            if !copy(GuestAddress(gpa), done, n) {
                break;
            }
            done += n;
        }
        done
    }
}

impl Target for Guest {
    type Arch = X86_64_SSE;
    type Error = &'static str;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

const GONE: &str = "the vCPU has ended";

impl MultiThreadBase for Guest {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let state = self.cpus.call(index(tid), |vcpu| vcpu.state()).ok_or(TargetError::Fatal(GONE))?;
        *regs = to_gdb(&state.map_err(|_| TargetError::NonFatal)?);
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let regs = regs.clone();
        let done = self.cpus.call(index(tid), move |vcpu| {
            let mut state = vcpu.state()?;
            from_gdb(&regs, &mut state);
            vcpu.set_state(&state)
        });
        done.ok_or(TargetError::Fatal(GONE))?.map_err(|_| TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let memory = self.memory.clone();
        let len = data.len();
        let done = self.pages(tid, start, len, |gpa, at, n| {
            memory.guest().read_slice(&mut data[at..at + n], gpa).is_ok()
        });
        if done == 0 && len > 0 { Err(TargetError::NonFatal) } else { Ok(done) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let memory = self.memory.clone();
        let done = self.pages(tid, start, data.len(), |gpa, at, n| {
            memory.guest().write_slice(&data[at..at + n], gpa).is_ok()
        });
        if done < data.len() { Err(TargetError::NonFatal) } else { Ok(()) }
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), Self::Error> {
        (0..self.cpus.count()).for_each(|n| active(tid(n)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Guest {
    fn resume(&mut self) -> Result<(), Self::Error> {
        if let Some(n) = self.before.take().filter(|_| self.stepping.is_empty()) {
            self.step_over(n);
        }
        if !self.arm() {
            return Err("this engine cannot watch so many addresses at once");
        }
        if self.stepping.is_empty() {
            self.cpus.resume_all();
        } else {
            // One instruction of one vCPU, with the others still, is what somebody who steps expects.
            self.stepping.iter().for_each(|&n| self.cpus.resume(n));
        }
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Self::Error> {
        self.stepping.clear();
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Self::Error> {
        self.stepping.retain(|&n| n != index(tid));
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Guest {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Self::Error> {
        self.stepping.push(index(tid));
        Ok(())
    }
}

impl Breakpoints for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl Guest {
    fn add(&mut self, addr: u64) -> bool {
        self.breakpoints.push(addr);
        let armed = self.arm();
        if !armed {
            self.breakpoints.pop();
        }
        armed
    }

    fn remove(&mut self, addr: u64) -> bool {
        let at = self.breakpoints.iter().position(|&a| a == addr);
        at.map(|n| self.breakpoints.swap_remove(n)).is_some()
    }
}

/// Breakpoints never change guest memory, so those that gdb calls software breakpoints are of the same kind.
impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.add(addr))
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.remove(addr))
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.add(addr))
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.remove(addr))
    }
}

impl HwWatchpoint for Guest {
    fn add_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.watchpoints.push((addr, len, kind != WatchKind::Write));
        let armed = self.arm();
        if !armed {
            self.watchpoints.pop();
        }
        Ok(armed)
    }

    fn remove_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let wanted = (addr, len, kind != WatchKind::Write);
        let at = self.watchpoints.iter().position(|w| *w == wanted);
        Ok(at.map(|n| self.watchpoints.swap_remove(n)).is_some())
    }
}

struct Loop;

impl BlockingEventLoop for Loop {
    type Target = Guest;
    type Connection = Box<dyn ConnectionExt<Error = std::io::Error>>;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        guest: &mut Guest,
        connection: &mut Self::Connection,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<&'static str, std::io::Error>> {
        loop {
            if connection.peek().map_err(WaitForStopReasonError::Connection)?.is_some() {
                let byte = connection.read().map_err(WaitForStopReasonError::Connection)?;
                return Ok(Event::IncomingData(byte));
            }
            match guest.stops.recv_timeout(POLL) {
                Ok(stop) => return Ok(Event::TargetStopped(guest.stopped(stop))),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(WaitForStopReasonError::Target(GONE)),
            }
            if guest.power.requested().is_some() {
                return Ok(Event::TargetStopped(MultiThreadStopReason::Exited(0)));
            }
        }
    }

    fn on_interrupt(guest: &mut Guest) -> Result<Option<Self::StopReason>, &'static str> {
        guest.cpus.pause_all();
        Ok(Some(MultiThreadStopReason::Signal(Signal::SIGINT)))
    }
}

impl Guest {
    /// One vCPU stopped: so do all. Others may have stopped in the same moment: they will again, when resumed.
    fn stopped(&mut self, (n, why): DebugStop) -> MultiThreadStopReason<u64> {
        self.cpus.pause_all();
        while self.stops.try_recv().is_ok() {}
        let tid = tid(n);
        match why {
            Stop::Step => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
            // gdb takes RIP for an address. Where CS has a base it finds no breakpoint of its own there and would go on.
            Stop::Breakpoint(at) => match self.cpus.call(n, |vcpu| vcpu.state()) {
                Some(Ok(state)) if state.rip == at => MultiThreadStopReason::SwBreak(tid),
                _ => {
                    self.before = Some(n);
                    MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP }
                }
            },
            Stop::Watchpoint(addr) => {
                let written = |w: &&(u64, u64, bool)| addr.wrapping_sub(w.0) < w.1;
                let kind = match self.watchpoints.iter().find(written) {
                    Some((.., true)) => WatchKind::ReadWrite,
                    _ => WatchKind::Write,
                };
                MultiThreadStopReason::Watch { tid, kind, addr }
            }
        }
    }
}

fn to_gdb(state: &State) -> X86_64CoreRegs {
    let mut regs = X86_64CoreRegs {
        regs: ORDER.map(|n| state.gpr[n]),
        eflags: state.rflags as u32,
        rip: state.rip,
        st: state.fpu.st,
        mxcsr: state.fpu.mxcsr,
        ..X86_64CoreRegs::default()
    };
    let selector = |n: usize| u32::from(state.segments[n].selector);
    regs.segments.cs = selector(1);
    regs.segments.ss = selector(2);
    regs.segments.ds = selector(3);
    regs.segments.es = selector(0);
    regs.segments.fs = selector(4);
    regs.segments.gs = selector(5);
    regs.fpu.fctrl = state.fpu.fcw.into();
    regs.fpu.fstat = state.fpu.fsw.into();
    regs.fpu.ftag = state.fpu.ftw.into();
    for (to, from) in regs.xmm.iter_mut().zip(&state.fpu.ymm) {
        *to = u128::from_le_bytes(std::array::from_fn(|i| from[i]));
    }
    regs
}

/// Takes what gdb may change: not segment registers, which are more than their selectors.
fn from_gdb(regs: &X86_64CoreRegs, state: &mut State) {
    for (n, value) in ORDER.iter().zip(regs.regs) {
        state.gpr[*n] = value;
    }
    state.rip = regs.rip;
    state.rflags = u64::from(regs.eflags) & x86::flags::DEFINED | x86::flags::FIXED;
    state.fpu.st = regs.st;
    state.fpu.mxcsr = regs.mxcsr & 0xffff;
    for (to, from) in state.fpu.ymm.iter_mut().zip(regs.xmm) {
        to[..16].copy_from_slice(&from.to_le_bytes());
    }
}
