//! What stands between a card and its link, whatever these are: a switch, limits, and what is counted.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use devices::net::{Guest, Header, Link, Offloads, Receiver};
use serde::{Deserialize, Serialize};

/// Of a limit's time, so much may go at once after a pause.
const BURST: f64 = 0.05;
/// Bytes that may go at once, however low the limit: a long segment.
const LEAST_BURST: f64 = 65536.0;

/// How many bytes a second may go each way; none: as many as can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// To the guest.
    pub to_guest: Option<u64>,
    /// From the guest.
    pub from_guest: Option<u64>,
}

/// What has gone one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Frames; long segments are one.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that were thrown away, for the cable was out.
    pub dropped: u64,
}

/// What has gone through, and whether anything can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// To the guest.
    pub to_guest: Count,
    /// From the guest.
    pub from_guest: Count,
    /// The link is there.
    pub present: bool,
    /// The cable is in.
    pub plugged: bool,
}

/// What may go, in bytes: below 0 nothing, until enough time has passed.
#[derive(Debug)]
struct Bucket {
    /// Bytes a second.
    rate: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(rate: u64) -> Self {
        let rate = rate.max(1) as f64;
        Self { rate, level: 0.0, at: Instant::now() }
    }

    /// How long until something may go, if not now.
    fn wait(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let burst = (self.rate * BURST).max(LEAST_BURST);
        self.level = (self.level + now.duration_since(self.at).as_secs_f64() * self.rate).min(burst);
        self.at = now;
        (self.level < 0.0).then(|| Duration::from_secs_f64((-self.level / self.rate).min(3600.0)))
    }
}

#[derive(Debug)]
struct State {
    device: Guest,
    traffic: Traffic,
    buckets: [Option<Bucket>; 2],
    /// When the link is told that there is room, because a limit refused a frame.
    due: Option<Instant>,
    over: bool,
}

const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Traffic)) {
        let mut state = self.state();
        let was = state.traffic.present && state.traffic.plugged;
        change(&mut state.traffic);
        let is = state.traffic.present && state.traffic.plugged;
        let device = state.device.clone();
        drop(state);
        self.changed.notify_all();
        if is != was {
            device.set_up(is);
        }
    }
}

/// The card's side of a link, as the link sees it.
impl Receiver for Shared {
    fn deliver(&self, header: Header, frame: &[u8]) -> bool {
        let mut state = self.state();
        if !state.traffic.plugged {
            state.traffic.to_guest.dropped += 1;
            return true;
        }
        if let Some(wait) = state.buckets[TO_GUEST].as_mut().and_then(Bucket::wait) {
            state.due.get_or_insert(Instant::now() + wait);
            self.changed.notify_all();
            return false;
        }
        let device = state.device.clone();
        drop(state);
        if !device.deliver(&header, frame) {
            return false;
        }
        let mut state = self.state();
        state.traffic.to_guest.frames += 1;
        state.traffic.to_guest.bytes += frame.len() as u64;
        if let Some(bucket) = &mut state.buckets[TO_GUEST] {
            bucket.level -= frame.len() as f64;
        }
        true
    }

    fn set_up(&self, up: bool) {
        self.change(|traffic| traffic.present = up);
    }

    fn offloads(&self) -> Offloads {
        let device = self.state().device.clone();
        device.offloads()
    }
}

/// A link, with a switch and limits.
pub struct Port {
    link: Arc<dyn Link>,
    shared: Arc<Shared>,
}

impl Port {
    /// Where `link` ends at a card.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn new(link: Arc<dyn Link>, limits: Limits) -> std::io::Result<Arc<Self>> {
        let traffic = Traffic { present: true, plugged: true, ..Traffic::default() };
        let buckets = [limits.to_guest, limits.from_guest].map(|rate| rate.map(Bucket::new));
        let state = State { device: Guest::default(), traffic, buckets, due: None, over: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        if limits.to_guest.is_some() {
            let (link, its) = (Arc::downgrade(&link), shared.clone());
            std::thread::Builder::new().name("limit".into()).spawn(move || tell_of_room(&its, &link))?;
        }
        Ok(Arc::new(Self { link, shared }))
    }

    /// What has gone through.
    pub fn traffic(&self) -> Traffic {
        self.shared.state().traffic
    }

    /// Puts the cable in, or takes it out.
    pub fn plug(&self, plugged: bool) {
        self.shared.change(|traffic| traffic.plugged = plugged);
        // What waits is thrown away, or may go.
        self.link.room();
    }
}

/// Tells the link when a limit lets frames through again.
fn tell_of_room(shared: &Shared, link: &Weak<dyn Link>) {
    let mut state = shared.state();
    while !state.over {
        let Some(due) = state.due else {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let left = due.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            state = shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            continue;
        }
        state.due = None;
        drop(state);
        // It delivers from there.
        let Some(link) = link.upgrade() else { return };
        link.room();
        drop(link);
        state = shared.state();
    }
}

impl Link for Port {
    fn offloads(&self) -> bool {
        self.link.offloads()
    }

    fn connect(&self, guest: Guest) {
        let mut state = self.shared.state();
        state.device = guest.clone();
        let up = state.traffic.present && state.traffic.plugged;
        drop(state);
        guest.set_up(up);
        let receiver: Weak<dyn Receiver> = Arc::<Shared>::downgrade(&self.shared);
        self.link.connect(Guest::new(receiver));
    }

    fn send(&self, header: &Header, frame: &[u8]) {
        let mut state = self.shared.state();
        while let Some(wait) = state.buckets[FROM_GUEST].as_mut().and_then(Bucket::wait)
            && !state.over
            && state.traffic.plugged
        {
            // This is a card's own thread, and the guest's queue is what fills meanwhile.
            state = self.shared.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        if !state.traffic.plugged || !state.traffic.present {
            state.traffic.from_guest.dropped += 1;
            return;
        }
        state.traffic.from_guest.frames += 1;
        state.traffic.from_guest.bytes += frame.len() as u64;
        if let Some(bucket) = &mut state.buckets[FROM_GUEST] {
            bucket.level -= frame.len() as f64;
        }
        drop(state);
        self.link.send(header, frame);
    }

    fn room(&self) {
        self.link.room();
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.shared.state().over = true;
        self.shared.changed.notify_all();
    }
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("shared", &self.shared).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link that keeps what is sent.
    #[derive(Default)]
    struct Wire {
        guest: Mutex<Guest>,
        sent: Mutex<u64>,
        room: Mutex<u32>,
        told: Condvar,
    }

    impl Link for Wire {
        fn connect(&self, guest: Guest) {
            *self.guest.lock().unwrap() = guest;
        }
        fn send(&self, _: &Header, frame: &[u8]) {
            *self.sent.lock().unwrap() += frame.len() as u64;
        }
        fn room(&self) {
            *self.room.lock().unwrap() += 1;
            self.told.notify_all();
        }
    }

    /// A card that counts what comes.
    #[derive(Default)]
    struct Card(Mutex<(u64, Vec<bool>)>);

    impl Receiver for Card {
        fn deliver(&self, _: Header, _: &[u8]) -> bool {
            self.0.lock().unwrap().0 += 1;
            true
        }
        fn set_up(&self, up: bool) {
            self.0.lock().unwrap().1.push(up);
        }
    }

    fn connected(limits: Limits) -> (Arc<Wire>, Arc<Port>, Arc<Card>) {
        let (wire, card) = (Arc::<Wire>::default(), Arc::<Card>::default());
        let port = Port::new(wire.clone(), limits).unwrap();
        let receiver: Weak<dyn Receiver> = Arc::<Card>::downgrade(&card);
        port.connect(Guest::new(receiver));
        (wire, port, card)
    }

    #[test]
    fn nothing_goes_while_the_cable_is_out() {
        let (wire, port, card) = connected(Limits::default());
        let guest = wire.guest.lock().unwrap().clone();
        port.send(&Header::default(), &[0; 60]);
        port.plug(false);
        port.send(&Header::default(), &[0; 60]);
        assert!(guest.deliver(&Header::default(), &[0; 60]), "it waits for nobody");
        // The link comes and goes behind it, which changes nothing for the guest.
        guest.set_up(false);
        port.plug(true);
        guest.set_up(true);
        guest.deliver(&Header::default(), &[0; 60]);
        assert_eq!((*wire.sent.lock().unwrap(), card.0.lock().unwrap().0), (60, 1));
        assert_eq!(card.0.lock().unwrap().1, [true, false, true]);
        let traffic = port.traffic();
        assert_eq!((traffic.to_guest.dropped, traffic.from_guest.dropped), (1, 1));
    }

    #[test]
    fn limits_hold_and_the_link_hears_when_there_is_room() {
        let limits = Limits { to_guest: Some(1 << 20), from_guest: Some(1 << 20) };
        let (wire, port, _card) = connected(limits);
        let guest = wire.guest.lock().unwrap().clone();
        let begun = Instant::now();
        let mut refused = 0;
        for _ in 0..6 {
            while !guest.deliver(&Header::default(), &[0; 60_000]) {
                refused += 1;
                let room = wire.room.lock().unwrap();
                drop(wire.told.wait_while(room, |room| std::mem::take(room) == 0).unwrap());
            }
        }
        // All but what goes at once, and the last, which goes into debt.
        assert!(begun.elapsed().as_secs_f64() > (5 * 60_000 - 65_536) as f64 / f64::from(1 << 20));
        assert!(refused > 0);
        let begun = Instant::now();
        (0..6).for_each(|_| port.send(&Header::default(), &[0; 60_000]));
        assert!(begun.elapsed().as_secs_f64() > (5 * 60_000 - 65_536) as f64 / f64::from(1 << 20));
        assert_eq!(*wire.sent.lock().unwrap(), 360_000);
    }
}
