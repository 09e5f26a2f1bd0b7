//! A queue with its threads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use machine::{EFD_CLOEXEC, EventFd};
use memory::Memory;

use super::ring::Queue;
use super::{Broken, Device};
use crate::lock;

/// A request that takes longer is worth waking another thread for the next one, which then need not wait for it.
const SLOW: Duration = Duration::from_micros(50);

/// A queue, served by one or more threads.
pub struct Vring {
    inner: Mutex<Inner>,
    /// A request has been served.
    served: Condvar,
    /// Wakes the first thread. An engine may signal it where the guest rings the queue's doorbell.
    event: Arc<EventFd>,
    /// It is signalled already.
    kicked: AtomicBool,
    stopped: AtomicBool,
    /// The last request took long.
    slow: AtomicBool,
    /// Helpers that wait for a call, by bits.
    idle: AtomicU64,
    /// A helper was called for, and none has come.
    called: AtomicBool,
    /// The first looks for requests when the event is signalled, the others when they are called.
    threads: OnceLock<Vec<Thread>>,
}

struct Inner {
    queue: Queue,
    /// Requests that are being served.
    under_way: usize,
    /// Somebody waits until none is: no other is begun.
    held: usize,
}

/// Threads of a queue at most.
const MOST_THREADS: usize = 16;

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
    /// # Errors
    /// The host gives no event.
    pub fn new(size: u16) -> std::io::Result<Self> {
        Ok(Self {
            event: Arc::new(EventFd::new(EFD_CLOEXEC)?),
            inner: Mutex::new(Inner { queue: Queue::new(size), under_way: 0, held: 0 }),
            served: Condvar::new(),
            kicked: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            slow: AtomicBool::new(false),
            idle: AtomicU64::new(0),
            called: AtomicBool::new(false),
            threads: OnceLock::new(),
        })
    }

    /// What has a thread look for requests when it is signalled.
    pub fn event(&self) -> &Arc<EventFd> {
        &self.event
    }

    /// The queue's registers, for whoever leaves its requests alone.
    pub fn with<R>(&self, f: impl FnOnce(&mut Queue) -> R) -> R {
        f(&mut lock(&self.inner).queue)
    }

    /// The queue when the device touches no memory for it.
    pub fn quiet<R>(&self, f: impl FnOnce(&mut Queue) -> R) -> R {
        let mut inner = lock(&self.inner);
        inner.held += 1;
        while inner.under_way > 0 {
            inner = self.served.wait(inner).unwrap_or_else(|e| e.into_inner());
        }
        inner.held -= 1;
        let result = f(&mut inner.queue);
        drop(inner);
        self.kick();
        result
    }

    /// Has a thread look for requests.
    pub fn kick(&self) {
        if !self.kicked.swap(true, Ordering::SeqCst) {
            self.signal();
        }
    }

    fn signal(&self) {
        // The count is never near its end, so this neither waits nor fails.
        let _ = self.event.write(1);
    }

    /// Starts the threads that serve the queue, number `n` of `device`.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(
        self: &Arc<Self>,
        n: usize,
        device: &Arc<dyn Device>,
        memory: &Memory,
        owner: &Arc<dyn Owner>,
    ) -> std::io::Result<Vec<JoinHandle<()>>> {
        let start = |thread: usize| {
            let (this, device, memory, owner) = (self.clone(), device.clone(), memory.clone(), owner.clone());
            let name = format!("virtio{}-{n}.{thread}", device.kind());
            std::thread::Builder::new().name(name).spawn(move || {
                while this.wait(thread) {
                    if this.work(n, &*device, &memory, &*owner).is_err() {
                        owner.broken();
                    }
                }
            })
        };
        let mut handles = Vec::new();
        for thread in 0..device.threads().clamp(1, MOST_THREADS) {
            handles.push(start(thread).inspect_err(|_| self.stopped.store(true, Ordering::SeqCst))?);
        }
        // Started once.
        let _ = self.threads.set(handles.iter().map(|handle| handle.thread().clone()).collect());
        self.kick();
        Ok(handles)
    }

    /// Has the threads end after the requests at hand.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.signal();
        self.threads.get().into_iter().flatten().for_each(Thread::unpark);
    }

    /// Waits until there may be work for a thread. False if there will be none any more.
    fn wait(&self, thread: usize) -> bool {
        if thread == 0 {
            // Should it fail, there may be work all the same.
            let _ = self.event.read();
            self.kicked.store(false, Ordering::SeqCst);
            return !self.stopped.load(Ordering::SeqCst);
        }
        let bit = 1 << thread;
        while !self.stopped.load(Ordering::SeqCst) {
            self.idle.fetch_or(bit, Ordering::SeqCst);
            // The call may have come before.
            if self.called.swap(false, Ordering::SeqCst) {
                self.idle.fetch_and(!bit, Ordering::SeqCst);
                return true;
            }
            std::thread::park();
            self.idle.fetch_and(!bit, Ordering::SeqCst);
        }
        false
    }

    /// Wakes a thread that has nothing to do.
    fn call_helper(&self) {
        self.called.store(true, Ordering::SeqCst);
        let idle = self.idle.load(Ordering::SeqCst);
        let first = idle & idle.wrapping_neg();
        if idle != 0
            && self.idle.fetch_and(!first, Ordering::SeqCst) & first != 0
            && let Some(threads) = self.threads.get()
        {
            threads[first.trailing_zeros() as usize].unpark();
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
            // What makes it ready kicks the queue.
            if !device.ready(n) {
                return Ok(());
            }
            // Locked anew for each request, so that a reset need not wait for all.
            let mut inner = lock(&self.inner);
            if inner.held > 0 || !owner.is_running() || self.stopped.load(Ordering::SeqCst) {
                return Ok(());
            }
            let Some(ring) = inner.queue.ring() else { return Ok(()) };
            let Some(request) = ring.take(memory)? else {
                ring.listen(memory, true)?;
                // The driver's own barrier may have been dropped.
                memory::order_threads();
                if !ring.is_waiting(memory)? {
                    return Ok(());
                }
                continue;
            };
            ring.listen(memory, false)?;
            if self.slow.load(Ordering::Relaxed) && ring.is_waiting(memory)? {
                self.call_helper();
            }
            inner.under_way += 1;
            drop(inner);
            let begun = Instant::now();
            let (from, to) = request.open(memory);
            let served = device.serve(n, from, to);
            self.slow.store(begun.elapsed() > SLOW, Ordering::Relaxed);
            let mut inner = lock(&self.inner);
            inner.under_way -= 1;
            self.served.notify_all();
            // It is there: whoever disables a queue waits for its requests.
            let ring = inner.queue.ring().ok_or(Broken)?;
            ring.give(memory, &request, served? as u32)?;
            memory::order_threads();
            let tell = ring.is_awaited(memory)?;
            drop(inner);
            if tell {
                owner.served(n);
            }
        }
    }
}
