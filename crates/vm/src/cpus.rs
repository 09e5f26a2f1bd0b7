//! The threads that run vCPUs, and how others talk to them.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use machine::Power;
use machine::cpu::{Debug, Exit, Kick, Stats, Stop, Vcpu};
use machine::power::End;

use crate::Error;

type Job = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

enum Command {
    /// Do something between two instructions.
    Call(Job),
    Pause,
    Resume,
    Stop,
}

/// A vCPU stopped for the debugger: its number, and why.
pub type DebugStop = (usize, Stop);

/// All vCPUs of a VM, each on a thread of its own.
pub struct Cpus {
    cpus: Vec<Cpu>,
    stops: Mutex<Option<Receiver<DebugStop>>>,
}

struct Cpu {
    commands: Sender<Command>,
    kick: Arc<dyn Kick>,
    thread: Mutex<Option<JoinHandle<Stats>>>,
}

impl fmt::Debug for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cpus").field("count", &self.cpus.len()).finish()
    }
}

impl Cpus {
    /// Starts a thread for each of `vcpus`, all paused. How the guest ends is told to `power`.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(vcpus: Vec<Box<dyn Vcpu>>, power: &Power) -> Result<Self, Error> {
        let (stop_sender, stops) = mpsc::channel();
        let mut cpus = Vec::with_capacity(vcpus.len());
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (commands, receiver) = mpsc::channel();
            let kick = vcpu.kicker();
            let (power, stops) = (power.clone(), stop_sender.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || Thread { vcpu, commands: receiver, power, stops, index, paused: true }.run())
                .map_err(|source| Error::Host { what: "a thread for a vCPU", source })?;
            cpus.push(Cpu { commands, kick, thread: Mutex::new(Some(thread)) });
        }
        Ok(Self { cpus, stops: Mutex::new(Some(stops)) })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.cpus.len()
    }

    fn send(&self, index: usize, command: Command) {
        let Some(cpu) = self.cpus.get(index) else { return };
        // A thread that has ended has told `power` why.
        if cpu.commands.send(command).is_ok() {
            cpu.kick.kick();
        }
    }

    /// Lets one run.
    pub fn resume(&self, index: usize) {
        self.send(index, Command::Resume);
    }

    /// Lets all run.
    pub fn resume_all(&self) {
        (0..self.count()).for_each(|i| self.resume(i));
    }

    /// Holds all, between two instructions. On return none executes any more.
    pub fn pause_all(&self) {
        (0..self.count()).for_each(|i| self.send(i, Command::Pause));
        (0..self.count()).for_each(|i| {
            self.call(i, |_| ());
        });
    }

    /// Has `index` do something between two instructions, and waits for it. `None` if there is no such vCPU any more.
    pub fn call<R: Send + 'static>(
        &self,
        index: usize,
        job: impl FnOnce(&mut dyn Vcpu) -> R + Send + 'static,
    ) -> Option<R> {
        let (sender, receiver) = mpsc::channel();
        self.send(
            index,
            Command::Call(Box::new(move |vcpu| {
                // Nobody waits any more if this fails.
                let _ = sender.send(job(vcpu));
            })),
        );
        receiver.recv().ok()
    }

    /// What the debugger wants of one of them.
    ///
    /// # Errors
    /// The engine cannot do it.
    pub fn debug(&self, index: usize, debug: Debug) -> Result<(), Error> {
        self.call(index, move |vcpu| vcpu.debug(&debug)).unwrap_or(Ok(())).map_err(Error::from)
    }

    /// Where stops for the debugger arrive, for the one who debugs; a second one gets none.
    pub fn stops(&self) -> Option<Receiver<DebugStop>> {
        lock(&self.stops).take()
    }

    /// Ends all threads; what each vCPU counted.
    pub fn stop(&self) -> Vec<Stats> {
        (0..self.count()).for_each(|i| self.send(i, Command::Stop));
        self.cpus.iter().filter_map(|cpu| lock(&cpu.thread).take()?.join().ok()).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Drop for Cpus {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Thread {
    vcpu: Box<dyn Vcpu>,
    commands: Receiver<Command>,
    power: Power,
    stops: Sender<DebugStop>,
    index: usize,
    paused: bool,
}

impl Thread {
    fn run(mut self) -> Stats {
        // A panic here is a bug of ours; the owner shall hear of it instead of waiting for a guest that stands still.
        let result = catch_unwind(AssertUnwindSafe(|| {
            while self.obey() {
                self.guest();
            }
        }));
        if result.is_err() {
            let what = format!("vCPU {} hit a bug in Lodge (see above); please report it", self.index);
            self.power.request(End::Failed(what));
            return Stats::default();
        }
        self.vcpu.stats()
    }

    /// Carries out what is asked; waits while paused. False at the end.
    fn obey(&mut self) -> bool {
        loop {
            let command = if self.paused {
                self.commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(Command::Call(job)) => job(self.vcpu.as_mut()),
                Ok(Command::Pause) => self.paused = true,
                Ok(Command::Resume) => self.paused = false,
                Err(TryRecvError::Empty) => return true,
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn guest(&mut self) {
        match self.vcpu.run() {
            Ok(Exit::Kicked) => {}
            Ok(Exit::TripleFault) => {
                self.paused = true;
                self.power.request(End::TripleFault);
            }
            Ok(Exit::Debug(stop)) => {
                self.paused = true;
                // Without a debugger nobody asked for stops.
                let _ = self.stops.send((self.index, stop));
            }
            Err(error) => {
                self.paused = true;
                self.power.request(End::Failed(error.to_string()));
            }
        }
    }
}
