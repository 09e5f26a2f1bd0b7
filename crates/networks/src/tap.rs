//! A link of the host's: TAP or MacVTap devices, whose descriptors somebody with rights has made.

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::net::{ETHERNET, Guest, HEADER, Header, LONGEST_FRAME, Link, queue_of};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// How long to wait before a link that is gone is asked for again.
const AGAIN: Duration = Duration::from_secs(1);
/// How often is looked whether a link is there of which nothing is heard.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Who makes the link.
pub trait Maker: Send + Sync {
    /// Makes it again: descriptors, one for each queue. None if that cannot be now.
    fn attach(&self) -> Option<Vec<OwnedFd>>;

    /// Hears what happens to it, on a thread of the link's.
    fn tell(&self, event: Event);

    /// It is not used any more, and its descriptors are closed.
    fn detach(&self);
}

/// What happens to a link while it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is gone: somebody has removed it. The guest's cable is out.
    Gone,
    /// It is there again.
    Back,
}

/// A link of the host's. It ends with its value.
pub struct Tap {
    shared: Arc<Shared>,
    maker: Arc<dyn Maker>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// None while the link is gone.
    queues: RwLock<Vec<Queue>>,
    guest: Mutex<Guest>,
    over: AtomicBool,
    lost: AtomicBool,
    /// Told when it is over.
    end: Condvar,
}

/// One of the link's queues.
#[derive(Debug)]
struct Queue {
    tap: OwnedFd,
    /// Ends waits.
    wake: OwnedFd,
}

impl Queue {
    fn new(tap: OwnedFd) -> io::Result<Self> {
        taps::prepare(&tap)?;
        Ok(Self { tap, wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits for a frame if one is wanted, or for somebody who wakes, or a while. Whether the link is there.
    fn wait(&self, for_frames: bool) -> bool {
        let wake = PollFd::new(&self.wake, PollFlags::IN);
        let mut both = [wake, PollFd::new(&self.tap, PollFlags::IN)];
        let waits = if for_frames { &mut both[..] } else { &mut both[..1] };
        // A signal is no frame, and the loop looks again.
        let ready = poll(waits, Some(&LOOK));
        if ready.is_ok() && waits[0].revents().contains(PollFlags::IN) {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        ready != Ok(0) || taps::is_there(&self.tap)
    }
}

impl Shared {
    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queues(&self) -> std::sync::RwLockReadGuard<'_, Vec<Queue>> {
        self.queues.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Reads until the link is gone, and waits for another.
    fn run(&self, maker: &dyn Maker) {
        loop {
            {
                let queues = self.queues();
                std::thread::scope(|scope| {
                    for queue in &queues[1..] {
                        let _ = std::thread::Builder::new()
                            .name("tap".into())
                            .spawn_scoped(scope, || self.read(queue, &queues));
                    }
                    self.read(&queues[0], &queues);
                });
            }
            if self.is_over() {
                return;
            }
            self.queues.write().unwrap_or_else(PoisonError::into_inner).clear();
            self.guest().set_up(false);
            maker.tell(Event::Gone);
            let Some(queues) = self.again(maker) else { return };
            *self.queues.write().unwrap_or_else(PoisonError::into_inner) = queues;
            self.lost.store(false, Ordering::SeqCst);
            self.guest().set_up(true);
            maker.tell(Event::Back);
        }
    }

    /// Asks until it is given. None if it is over before.
    fn again(&self, maker: &dyn Maker) -> Option<Vec<Queue>> {
        loop {
            let guest = self.guest();
            let waited = self.end.wait_timeout_while(guest, AGAIN, |_| !self.is_over());
            drop(waited);
            if self.is_over() {
                return None;
            }
            let taps = maker.attach().unwrap_or_default().into_iter();
            let queues: io::Result<Vec<_>> = taps.map(Queue::new).collect();
            if let Some(queues) = queues.ok().filter(|queues| !queues.is_empty()) {
                return Some(queues);
            }
        }
    }

    /// Delivers what comes out of a queue until it is over, or gone.
    fn read(&self, queue: &Queue, all: &[Queue]) {
        let mut buffer = vec![0; HEADER + LONGEST_FRAME];
        let mut taken = None;
        while !self.is_over() && !self.lost.load(Ordering::SeqCst) {
            match rustix::io::read(&queue.tap, &mut buffer[..]) {
                Ok(len) if len >= HEADER + ETHERNET => self.deliver(queue, &buffer[..len]),
                Ok(0) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    // A driver has come since, or another.
                    let guest = self.guest().offloads();
                    if taken.replace(guest) != Some(guest) {
                        let (checksum, tso4, tso6) = (guest.checksum, guest.tso4, guest.tso6);
                        // Without, the kernel goes on as before, and what the guest cannot take is lost.
                        let _ = taps::set_offloads(&queue.tap, taps::Offloads { checksum, tso4, tso6 });
                    }
                    if !queue.wait(true) {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        self.lost.store(true, Ordering::SeqCst);
        all.iter().for_each(Queue::wake);
    }

    /// Delivers a frame with its header, and waits until the guest has room for it.
    fn deliver(&self, queue: &Queue, bytes: &[u8]) {
        let Some((header, frame)) = bytes.split_first_chunk() else { return };
        let Some(header) = Header::parse(header, frame.len()) else { return };
        let guest = self.guest().clone();
        while !guest.deliver(&header, frame) && !self.is_over() && !self.lost.load(Ordering::SeqCst) {
            if !queue.wait(false) {
                self.lost.store(true, Ordering::SeqCst);
            }
        }
    }
}

impl Tap {
    /// A link by these descriptors, one for each queue. When it is gone, its maker is asked for another from time to time.
    ///
    /// # Errors
    /// They are none of a TAP or MacVTap device, or the host gives no thread.
    pub fn new(taps: Vec<OwnedFd>, maker: Arc<dyn Maker>) -> io::Result<Self> {
        let queues = taps.into_iter().map(Queue::new).collect::<io::Result<Vec<_>>>()?;
        if queues.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let shared = Arc::new(Shared {
            queues: RwLock::new(queues),
            guest: Mutex::default(),
            over: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            end: Condvar::new(),
        });
        let (its, who) = (shared.clone(), maker.clone());
        let thread = std::thread::Builder::new().name("tap".into()).spawn(move || its.run(&*who))?;
        Ok(Self { shared, maker, thread: Some(thread) })
    }
}

impl Link for Tap {
    fn offloads(&self) -> bool {
        true
    }

    fn connect(&self, guest: Guest) {
        let up = !self.shared.queues().is_empty();
        *self.shared.guest() = guest.clone();
        guest.set_up(up);
        // Who waits for the last guest's room does not wait for this one's.
        self.room();
    }

    fn send(&self, header: &Header, frame: &[u8]) {
        let queues = self.shared.queues();
        let Some(queue) = queues.get(queue_of(frame, queues.len())) else { return };
        // What a link that is down does not take is lost, as on any.
        let _ = rustix::io::writev(&queue.tap, &[IoSlice::new(&header.bytes()), IoSlice::new(frame)]);
    }

    fn room(&self) {
        self.shared.queues().iter().for_each(Queue::wake);
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        {
            // Under the lock with which it waits.
            let _guest = self.shared.guest();
            self.shared.over.store(true, Ordering::SeqCst);
            self.shared.end.notify_all();
        }
        self.room();
        let Some(thread) = self.thread.take() else { return };
        // The last device may end there: the descriptors then end with the thread.
        if thread.thread().id() == std::thread::current().id() {
            return;
        }
        let _ = thread.join();
        self.shared.queues.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.maker.detach();
    }
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tap").field("queues", &self.shared.queues()).finish_non_exhaustive()
    }
}
