//! Guest time, and what is to happen at a point of it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

/// Guest time: nanoseconds since the machine was made. Either the host's monotonic time, or a number that the owner moves
/// (tests, and engines run in lockstep, where the same inputs must give the same guest).
#[derive(Debug)]
pub struct Clock {
    source: Source,
    tsc_khz: u64,
}

#[derive(Debug)]
enum Source {
    Host { start: Instant },
    Manual(AtomicU64),
}

impl Clock {
    /// A clock that goes with the host's, and a time-stamp counter of `tsc_khz`.
    pub fn host(tsc_khz: u64) -> Self {
        Self { source: Source::Host { start: Instant::now() }, tsc_khz }
    }

    /// A clock that stands until [`Timers::advance`] moves it.
    pub fn manual(tsc_khz: u64) -> Self {
        Self { source: Source::Manual(AtomicU64::new(0)), tsc_khz }
    }

    /// Nanoseconds of guest time.
    pub fn now(&self) -> u64 {
        match &self.source {
            Source::Host { start } => start.elapsed().as_nanos() as u64,
            Source::Manual(now) => now.load(Ordering::Relaxed),
        }
    }

    /// The time-stamp counter's rate in kHz.
    pub fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    /// The time-stamp counter of a processor with offset 0.
    pub fn tsc(&self) -> u64 {
        self.tsc_at(self.now())
    }

    /// What [`Clock::tsc`] is at `ns`.
    pub fn tsc_at(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.tsc_khz) / 1_000_000) as u64
    }

    /// The first nanosecond at which [`Clock::tsc`] is at least `tsc`.
    pub fn ns_at_tsc(&self, tsc: u64) -> u64 {
        (u128::from(tsc) * 1_000_000).div_ceil(u128::from(self.tsc_khz)).try_into().unwrap_or(u64::MAX)
    }
}

type Callback = Box<dyn FnMut() + Send>;

struct Entry {
    deadline: u64,
    /// Tells a setting from the ones before it.
    turn: u64,
    timer: Weak<TimerInner>,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.deadline == other.deadline && self.turn == other.turn
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.deadline, self.turn).cmp(&(other.deadline, other.turn))
    }
}

#[derive(Default)]
struct Queue {
    heap: BinaryHeap<Reverse<Entry>>,
    turns: u64,
    stop: bool,
}

struct Shared {
    clock: Arc<Clock>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Calls what is due at `now`. Returns the next deadline, and the queue's lock.
    fn fire(&self, now: u64) -> (MutexGuard<'_, Queue>, Option<u64>) {
        let mut queue = self.queue();
        while let Some(Reverse(entry)) = queue.heap.peek() {
            if entry.deadline > now {
                let next = entry.deadline;
                return (queue, Some(next));
            }
            let Some(Reverse(entry)) = queue.heap.pop() else { break };
            drop(queue);
            if let Some(timer) = entry.timer.upgrade()
                && timer.armed.compare_exchange(entry.turn, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                (timer.callback.lock().unwrap_or_else(|e| e.into_inner()))();
            }
            queue = self.queue();
        }
        (queue, None)
    }
}

/// All timers of a machine. With a host clock, one thread sleeps until the next deadline.
pub struct Timers {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl fmt::Debug for Timers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timers").field("pending", &self.shared.queue().heap.len()).finish()
    }
}

impl Timers {
    /// Timers of `clock`.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn new(clock: Arc<Clock>) -> std::io::Result<Self> {
        let host = matches!(clock.source, Source::Host { .. });
        let shared = Arc::new(Shared { clock, queue: Mutex::default(), changed: Condvar::new() });
        let theirs = shared.clone();
        let thread = host
            .then(|| std::thread::Builder::new().name("timers".into()).spawn(move || run(&theirs)))
            .transpose()?;
        Ok(Self { shared, thread })
    }

    /// A timer that calls `callback` when it expires, on the thread that moves time. The callback may set timers,
    /// its own too; it is not called once the timer is dropped.
    pub fn timer(&self, callback: impl FnMut() + Send + 'static) -> Timer {
        Timer(Arc::new(TimerInner {
            shared: self.shared.clone(),
            armed: AtomicU64::new(0),
            callback: Mutex::new(Box::new(callback)),
        }))
    }

    /// Moves a manual clock on by `ns`, with everything that falls due on the way happening at its time.
    pub fn advance(&self, ns: u64) {
        let Source::Manual(now) = &self.shared.clock.source else { return };
        let end = now.load(Ordering::Relaxed).saturating_add(ns);
        loop {
            let (queue, next) = self.shared.fire(now.load(Ordering::Relaxed));
            drop(queue);
            match next.filter(|&n| n <= end) {
                Some(next) => now.store(next, Ordering::Relaxed),
                None => break,
            }
        }
        now.store(end, Ordering::Relaxed);
    }

    /// The next deadline in nanoseconds, if any timer is set.
    pub fn next(&self) -> Option<u64> {
        self.shared.queue().heap.peek().map(|Reverse(e)| e.deadline)
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.queue().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A callback that panicked has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    loop {
        let (queue, next) = shared.fire(shared.clock.now());
        if queue.stop {
            return;
        }
        let wait = next.map_or(Duration::from_secs(3600), |next| {
            Duration::from_nanos(next.saturating_sub(shared.clock.now()))
        });
        drop(shared.changed.wait_timeout(queue, wait));
    }
}

struct TimerInner {
    shared: Arc<Shared>,
    /// The turn that is set, 0 when none.
    armed: AtomicU64,
    callback: Mutex<Callback>,
}

/// One timer of [`Timers`]. Dropping it cancels it.
#[derive(Clone)]
pub struct Timer(Arc<TimerInner>);

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("armed", &(self.0.armed.load(Ordering::Relaxed) != 0)).finish()
    }
}

impl Timer {
    /// Expire at `deadline` nanoseconds of guest time (soon, if that is past), instead of when it was to before.
    pub fn set(&self, deadline: u64) {
        let mut queue = self.0.shared.queue();
        queue.turns += 1;
        let turn = queue.turns;
        self.0.armed.store(turn, Ordering::Release);
        let first = queue.heap.peek().is_none_or(|Reverse(e)| deadline < e.deadline);
        // Entries of timers that were set anew lie dead in the heap; a guest that sets a timer again and again must not
        // make it grow without bound.
        if queue.heap.len() > 1024 {
            queue.heap.retain(|Reverse(e)| {
                e.timer.upgrade().is_some_and(|t| t.armed.load(Ordering::Relaxed) == e.turn)
            });
        }
        queue.heap.push(Reverse(Entry { deadline, turn, timer: Arc::downgrade(&self.0) }));
        drop(queue);
        if first {
            self.0.shared.changed.notify_all();
        }
    }

    /// Do not expire.
    pub fn cancel(&self) {
        self.0.armed.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn manual_time_fires_in_order_at_the_right_moments() {
        let clock = Arc::new(Clock::manual(1_000_000));
        let timers = Timers::new(clock.clone()).unwrap();
        let (tx, rx) = mpsc::channel();
        let make = |name: &'static str| {
            let (tx, clock) = (tx.clone(), clock.clone());
            timers.timer(move || tx.send((name, clock.now())).unwrap())
        };
        let (a, b, c) = (make("a"), make("b"), make("c"));
        a.set(300);
        b.set(100);
        c.set(50);
        a.set(200);
        c.cancel();
        timers.advance(1000);
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), [("b", 100), ("a", 200)]);
        assert_eq!(clock.now(), 1000);
        b.set(1100);
        drop(b);
        timers.advance(1000);
        assert!(rx.try_recv().is_err(), "dropped timers stay silent");
    }

    #[test]
    fn host_time_fires() {
        let clock = Arc::new(Clock::host(1_000_000));
        let timers = Timers::new(clock.clone()).unwrap();
        let (tx, rx) = mpsc::channel();
        let theirs = clock.clone();
        let timer = timers.timer(move || tx.send(theirs.now()).unwrap());
        let deadline = clock.now() + 1_000_000;
        timer.set(deadline);
        assert!(rx.recv_timeout(Duration::from_secs(10)).unwrap() >= deadline);
    }

    #[test]
    fn setting_again_does_not_pile_up() {
        let timers = Timers::new(Arc::new(Clock::manual(1))).unwrap();
        let timer = timers.timer(|| {});
        (0..100_000).for_each(|i| timer.set(i));
        assert!(timers.shared.queue().heap.len() <= 1025);
    }

    #[test]
    fn tsc_and_time_convert_both_ways() {
        let clock = Clock::manual(2_445_426);
        for tsc in [0, 1, 12345, 1 << 40, (1 << 53) + 1] {
            assert!(clock.tsc_at(clock.ns_at_tsc(tsc)) >= tsc);
            assert!(clock.ns_at_tsc(tsc) == 0 || clock.tsc_at(clock.ns_at_tsc(tsc) - 1) < tsc);
        }
    }
}
