//! The guest's console as its owner has it: one for the VM's whole life, through every reset of the machine.

use std::collections::VecDeque;
use std::fmt;
use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use devices::pm::Pm;
use devices::serial::Serial;
use devices::virtio::console::Port;
use machine::Power;
use machine::power::End;

/// What Linux says when it panics. It is looked for in the output, for the reset that follows looks like any other.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// Bytes of output that those who look in later are shown.
const RECENT: usize = 64 << 10;
/// Pieces of output that wait for one who looks in. Who takes no more of them is shown no more.
const BEHIND: usize = 4096;

/// Where output goes, and where input is to come out: the serial port; or a virtio console, before whose opening by the guest the
/// serial port's output is shown.
pub struct Console {
    out: Mutex<Output>,
    port: Option<Arc<Port>>,
    panicked: AtomicBool,
    machine: Mutex<Option<Plugs>>,
    attached: Condvar,
}

struct Output {
    to: Box<dyn Write + Send>,
    recent: VecDeque<u8>,
    views: Vec<(u64, SyncSender<Vec<u8>>)>,
    next_view: u64,
}

/// Somebody who looks in on the console.
#[derive(Debug)]
pub(crate) struct View {
    /// To be ended by.
    pub id: u64,
    /// The last of what was written before.
    pub recent: Vec<u8>,
    /// What is written from then on.
    pub news: Receiver<Vec<u8>>,
}

#[derive(Clone)]
struct Plugs {
    serial: Arc<Serial>,
    pm: Arc<Pm>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Console")
    }
}

impl Console {
    /// A console that writes to `to`.
    pub fn new(to: Box<dyn Write + Send>) -> Self {
        Self {
            port: None,
            out: Mutex::new(Output { to, recent: VecDeque::new(), views: Vec::new(), next_view: 0 }),
            panicked: AtomicBool::new(false),
            machine: Mutex::new(None),
            attached: Condvar::new(),
        }
    }

    /// The same with a virtio console.
    pub fn with_virtio(to: Box<dyn Write + Send>) -> Self {
        Self { port: Some(Port::new("console")), ..Self::new(to) }
    }

    /// The virtio console's port, if there is to be one.
    pub(crate) fn port(&self) -> Option<&Arc<Port>> {
        self.port.as_ref()
    }

    fn open_port(&self) -> Option<&Arc<Port>> {
        self.port().filter(|port| port.is_open())
    }

    /// Shows what the virtio console of the machine at hand writes, until it goes.
    pub(crate) fn attach_port(self: &Arc<Self>, power: &Power) -> std::io::Result<()> {
        let Some(port) = self.port.clone() else { return Ok(()) };
        let (mut writer, machine) = (self.writer_of(power, false), port.machine());
        std::thread::Builder::new().name("console".into()).spawn(move || {
            let mut bytes = Vec::new();
            // The writer itself ends a machine whose output cannot be written.
            while port.read(machine, &mut bytes) && writer.write_all(&bytes).is_ok() {}
        })?;
        Ok(())
    }

    /// Tells the guest how many columns and rows the terminal has, where it has a way to hear it.
    pub fn resize(&self, columns: u16, rows: u16) {
        if let Some(port) = self.port() {
            port.resize(columns, rows);
        }
    }

    /// The end that the machine's serial port writes to. Output that cannot be written ends the machine: nobody would learn
    /// what the guest says.
    pub(crate) fn writer(self: &Arc<Self>, power: &Power) -> Box<dyn Write + Send> {
        Box::new(self.writer_of(power, true))
    }

    fn writer_of(self: &Arc<Self>, power: &Power, serial: bool) -> Writer {
        Writer { console: self.clone(), power: power.clone(), serial, matched: 0 }
    }

    /// From now on this machine is meant.
    pub(crate) fn attach(&self, serial: &Arc<Serial>, pm: &Arc<Pm>) {
        self.panicked.store(false, Ordering::Relaxed);
        *lock(&self.machine) = Some(Plugs { serial: serial.clone(), pm: pm.clone() });
        self.attached.notify_all();
    }

    fn plugs(&self) -> Plugs {
        let mut machine = lock(&self.machine);
        loop {
            match &*machine {
                Some(plugs) => return plugs.clone(),
                None => machine = self.attached.wait(machine).unwrap_or_else(|e| e.into_inner()),
            }
        }
    }

    /// Types `bytes`: waits until the guest has taken them.
    pub fn push(&self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let patience = Duration::from_millis(200);
            let taken = match self.port() {
                // It waits there until the guest has opened it.
                Some(port) => port.write(rest, patience),
                None => self.plugs().serial.push_all(rest, patience),
            };
            rest = &rest[taken.min(rest.len())..];
        }
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.plugs().pm.press_power_button();
    }

    /// Shows the output to one more, from a moment ago on.
    pub(crate) fn view(&self) -> View {
        let (sender, news) = sync_channel(BEHIND);
        let mut out = lock(&self.out);
        let id = out.next_view;
        out.next_view += 1;
        out.views.push((id, sender));
        View { id, recent: out.recent.iter().copied().collect(), news }
    }

    /// Shows this one no more.
    pub(crate) fn end_view(&self, id: u64) {
        lock(&self.out).views.retain(|view| view.0 != id);
    }

    /// Whether the guest's kernel said that it panicked.
    pub(crate) fn panicked(&self) -> bool {
        self.panicked.load(Ordering::Relaxed)
    }

    /// Waits for output on its way, for a moment.
    pub fn flush(&self) {
        if let Some(plugs) = lock(&self.machine).clone() {
            plugs.serial.drain(Duration::from_secs(2));
        }
        self.port().into_iter().for_each(|port| port.drain(Duration::from_secs(2)));
        // An output that cannot be written to has been closed by its reader.
        let _ = lock(&self.out).to.flush();
    }
}

impl Output {
    fn show(&mut self, bytes: &[u8]) {
        self.recent.extend(bytes);
        let over = self.recent.len().saturating_sub(RECENT);
        self.recent.drain(..over);
        self.views.retain(|(_, view)| view.try_send(bytes.to_vec()).is_ok());
    }
}

struct Writer {
    console: Arc<Console>,
    power: Power,
    /// It is the serial port's, which is shown while the virtio console is not open.
    serial: bool,
    /// How much of [`PANIC`] the last bytes match.
    matched: usize,
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for &byte in bytes {
            // The text's first letter occurs in it only once, so a failed match starts anew there or at the next byte.
            self.matched =
                if byte == PANIC[self.matched] { self.matched + 1 } else { usize::from(byte == PANIC[0]) };
            if self.matched == PANIC.len() {
                self.matched = 0;
                self.console.panicked.store(true, Ordering::Relaxed);
            }
        }
        if self.serial && self.console.open_port().is_some() {
            return Ok(bytes.len());
        }
        let mut out = lock(&self.console.out);
        out.show(bytes);
        let done = out.to.write_all(bytes).and_then(|()| out.to.flush());
        if let Err(error) = &done {
            self.power.request(lost(error));
        }
        done.map(|()| bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        lock(&self.console.out).to.flush()
    }
}

/// How a machine ends whose output cannot be written.
fn lost(error: &std::io::Error) -> End {
    match error.kind() {
        ErrorKind::BrokenPipe => End::Stopped("a closed output: its reader has gone"),
        _ => End::Failed(format!("the guest's console cannot be written to the output: {error}")),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_noticed_across_writes() {
        let console = Arc::new(Console::new(Box::new(std::io::sink())));
        let mut writer = console.writer(&Power::default());
        writer.write_all(b"Kernel panKernel panic - not").unwrap();
        assert!(!console.panicked());
        writer.write_all(b" syncing: test").unwrap();
        assert!(console.panicked());
    }
}
