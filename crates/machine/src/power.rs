//! How a machine ends: devices ask, the owner waits.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Why the machine is to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u32),
    /// The guest's kernel said that it panicked.
    Panic,
    /// A triple fault.
    TripleFault,
    /// The user, a signal or a time-out.
    Stopped(&'static str),
    /// The host or Lodge failed: what happened.
    Failed(String),
}

/// The machine's power switch. The first to ask is heard; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Power(Arc<(Mutex<Option<End>>, Condvar)>);

impl Power {
    /// Asks for the machine to end, unless somebody did already.
    pub fn request(&self, end: End) {
        self.0.0.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(end);
        self.0.1.notify_all();
    }

    /// What was asked for, if anything.
    pub fn requested(&self) -> Option<End> {
        self.0.0.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Waits for a request until `deadline`, or for ever.
    pub fn wait(&self, deadline: Option<Instant>) -> Option<End> {
        let mut end = self.0.0.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if end.is_some() {
                return end.clone();
            }
            let left =
                deadline.map_or(Duration::from_secs(3600), |d| d.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            end = self.0.1.wait_timeout(end, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Forgets the request: the machine starts again.
    pub fn clear(&self) {
        *self.0.0.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }
}
