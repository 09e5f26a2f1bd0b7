//! A queue with its thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{JoinHandle, Thread};

use memory::Memory;
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::{Broken, Device};
use crate::lock;

/// A queue's registers and indices as data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Guest-physical addresses of the descriptor table, the available ring and the used ring.
    pub rings: [u64; 3],
    /// Where the device is in the available ring, and in the used ring.
    pub next: [u16; 2],
    /// MSI-X vector, or 0xffff.
    pub vector: u16,
}

/// A queue. It is locked for the time of one request, so whoever holds the lock knows that the device touches no memory.
pub struct Vring {
    queue: Mutex<Queue>,
    kicked: AtomicBool,
    stopped: AtomicBool,
    thread: OnceLock<Thread>,
}

/// Who looks after a queue's results.
pub trait Owner: Send + Sync {
    /// Whether the device may serve requests.
    fn is_running(&self) -> bool;
    /// Tells the driver that requests of queue `n` were served.
    fn served(&self, n: usize);
    /// The driver broke the rules.
    fn broken(&self);
}

impl Vring {
    /// A queue of at most `size` entries.
    ///
    /// # Panics
    /// `size` is no power of two.
    pub fn new(size: u16) -> Self {
        let queue = Queue::new(size).expect("sizes of queues are powers of two");
        Self {
            queue: Mutex::new(queue),
            kicked: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            thread: OnceLock::new(),
        }
    }

    /// The queue between two requests.
    pub fn with<R>(&self, f: impl FnOnce(&mut Queue) -> R) -> R {
        f(&mut lock(&self.queue))
    }

    /// Has the thread look for requests.
    pub fn kick(&self) {
        if !self.kicked.swap(true, Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    /// Starts the thread that serves the queue, number `n` of `device`.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(
        self: &Arc<Self>,
        n: usize,
        device: Arc<dyn Device>,
        memory: Memory,
        owner: Arc<dyn Owner>,
    ) -> std::io::Result<JoinHandle<()>> {
        let this = self.clone();
        let handle =
            std::thread::Builder::new().name(format!("virtio{}-{n}", device.kind())).spawn(move || {
                while !this.stopped.load(Ordering::SeqCst) {
                    if !this.kicked.swap(false, Ordering::SeqCst) {
                        std::thread::park();
                        continue;
                    }
                    if this.work(n, &*device, &memory, &*owner).is_err() {
                        owner.broken();
                    }
                }
            })?;
        // Started once.
        let _ = self.thread.set(handle.thread().clone());
        self.kick();
        Ok(handle)
    }

    /// Has the thread end after the request at hand.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Serves what is there.
    pub fn work(
        &self,
        n: usize,
        device: &dyn Device,
        memory: &Memory,
        owner: &dyn Owner,
    ) -> Result<(), Broken> {
        loop {
            // Locked anew for each request, so that a reset need not wait for all.
            let mut queue = lock(&self.queue);
            if !owner.is_running() || !queue.ready() || self.stopped.load(Ordering::SeqCst) {
                return Ok(());
            }
            let guest = memory.guest();
            let chain = queue.iter(guest).map_err(|_| Broken)?.next();
            let Some(chain) = chain else {
                queue.enable_notification(guest).map_err(|_| Broken)?;
                // The driver's own barrier may have been dropped.
                memory::order_threads();
                if queue.avail_idx(guest, Ordering::Acquire).map_err(|_| Broken)?.0 == queue.next_avail() {
                    return Ok(());
                }
                continue;
            };
            queue.disable_notification(guest).map_err(|_| Broken)?;
            let head = chain.head_index();
            let request = chain.clone().reader(guest).map_err(|_| Broken)?;
            let answer = chain.writer(guest).map_err(|_| Broken)?;
            let written = device.serve(n, request, answer)?;
            queue.add_used(guest, head, written as u32).map_err(|_| Broken)?;
            memory::order_threads();
            let tell = queue.needs_notification(guest).map_err(|_| Broken)?;
            drop(queue);
            if tell {
                owner.served(n);
            }
        }
    }
}
