//! Interrupts between devices, interrupt controllers and vCPUs: lines and messages.

use std::fmt;
use std::sync::{Arc, Weak};

/// A message-signalled interrupt: the write that a device makes (SDM vol. 3A, 10.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Msi {
    /// 0xfeexxxxx.
    pub address: u64,
    /// Vector, delivery mode, level.
    pub data: u32,
}

/// The way of one source's messages to the processors: that of an MSI-X vector, say. Any function that takes messages is one.
pub trait Route: Send + Sync {
    /// Delivers a message.
    fn send(&self, msi: Msi);
}

impl<F: Fn(Msi) + Send + Sync> Route for F {
    fn send(&self, msi: Msi) {
        self(msi);
    }
}

/// The processors' side of interrupt delivery: the software LAPICs of [`crate`], or those in the host's KVM.
pub trait LocalApics: Send + Sync {
    /// Delivers a message. False if no processor takes it.
    fn send(&self, msi: Msi) -> bool;

    /// A way for a source that sends the same message most of the time, where the engine has a better one for such than
    /// [`LocalApics::send`].
    fn route(&self) -> Option<Box<dyn Route>> {
        None
    }

    /// The level of the 8259's INTR output, which is wired to LINT0 of every LAPIC.
    fn intr(&self, level: bool);

    /// The IOAPIC's redirection table changed: what each of its pins would send now (`None` when masked), and whether it
    /// is level-triggered, so that an engine whose LAPICs are elsewhere knows which vectors' EOIs to hand back.
    fn routes(&self, _routes: &[Option<(Msi, bool)>; 24]) {}

    /// Tells who answers when a processor takes an 8259's interrupt, or ends a level-triggered one.
    fn connect(&self, controllers: Weak<dyn Controllers>);
}

/// The devices' side of interrupt delivery, as local APICs see it.
pub trait Controllers: Send + Sync {
    /// The INTA cycle: the 8259s' vector, the spurious one if the request has gone meanwhile. `None` where there are no
    /// 8259s.
    fn acknowledge(&self) -> Option<u8>;

    /// A processor ended the service of a level-triggered `vector`.
    fn eoi(&self, vector: u8);
}

/// What is at the far end of a line.
pub trait Input: Send + Sync {
    /// The line's level changed, or was set again to what it was.
    fn set(&self, level: bool);
}

/// One interrupt line, as a device holds it.
#[derive(Clone)]
pub struct Line(Arc<dyn Input>);

impl Line {
    /// A line to `input`.
    pub fn new(input: Arc<dyn Input>) -> Self {
        Self(input)
    }

    /// A line that leads nowhere.
    pub fn unconnected() -> Self {
        Self(Arc::new(Nowhere))
    }

    /// Sets the level.
    pub fn set(&self, level: bool) {
        self.0.set(level);
    }

    /// An edge, after which the line stays up: an 8259 forgets a request whose line falls before it is acknowledged.
    pub fn edge(&self) {
        self.set(false);
        self.set(true);
    }

    /// Up and down.
    pub fn pulse(&self) {
        self.0.set(true);
        self.0.set(false);
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Line")
    }
}

struct Nowhere;

impl Input for Nowhere {
    fn set(&self, _: bool) {}
}
