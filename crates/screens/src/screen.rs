//! The screen of a VM: between its devices and those who look at them.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use crate::{Cursor, Key, Picture, Rect, Stroke, lock};

/// Changes are looked for in squares of so many pixels.
const TILE: u32 = 64;
/// A picture is not drawn again sooner.
const FRAME: Duration = Duration::from_millis(15);
/// How long keys that nobody holds are down: firmware has little room for what it does not read at once.
const STROKE: Duration = Duration::from_millis(15);
/// How long a key waits for a guest that is too busy to read its keyboard.
const PATIENCE: Duration = Duration::from_secs(2);

/// A display device.
pub trait Source: Send + Sync {
    /// Draws what it shows now. The picture is as it was left by the last call.
    fn draw(&self, picture: &mut Picture);

    /// The cursor that the viewer shall show in place of its own, if the guest leaves that to it.
    fn cursor(&self) -> Option<Arc<Cursor>> {
        None
    }

    /// A viewer wants another size. Whether the guest is told.
    fn resize(&self, _width: u32, _height: u32) -> bool {
        false
    }
}

/// Where the viewer's pointer is, and which of its buttons are down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// Pixels from the left, below the width.
    pub x: u32,
    /// Pixels from the top, below the height.
    pub y: u32,
    /// The picture's width and height.
    pub size: (u32, u32),
    /// From bit 0: left, middle, right, wheel up, down, left, right, back, forward.
    pub buttons: u16,
}

/// A keyboard or a pointing device, or both.
pub trait Input: Send + Sync {
    /// A key goes down or up. Whether it was taken: not if this is no keyboard, or if it has no more room.
    fn key(&self, _key: Key, _down: bool) -> bool {
        false
    }

    /// The pointer is there. Whether it was taken: not if this is no pointing device, or if nobody listens.
    fn point(&self, _point: Point) -> bool {
        false
    }
}

/// A VM's screen, keyboard and mouse.
#[derive(Default)]
pub struct Screen {
    devices: Mutex<Devices>,
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Devices {
    source: Option<Weak<dyn Source>>,
    inputs: Vec<Weak<dyn Input>>,
}

#[derive(Default)]
struct Shown {
    picture: Picture,
    next: Picture,
    cursor: Option<Arc<Cursor>>,
    drawn: Option<Instant>,
    now: u64,
    /// When each tile changed last, row by row; and the size, and the cursor.
    tiles: Vec<u64>,
    resized: u64,
    cursor_changed: u64,
}

/// What is on the screen, and what of it is new to somebody.
#[derive(Debug)]
pub struct Changes<'a> {
    /// The whole picture.
    pub picture: &'a Picture,
    /// Where it changed.
    pub rects: Vec<Rect>,
    /// Whether its size is another.
    pub resized: bool,
    /// The cursor, if it is another.
    pub cursor: Option<Option<Arc<Cursor>>>,
    /// When this was: to be given to the next call.
    pub now: u64,
}

impl fmt::Debug for Screen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Screen").field("size", &lock(&self.shown).picture.size()).finish_non_exhaustive()
    }
}

impl Screen {
    /// A screen without devices: black.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Another machine comes: its predecessor's devices are forgotten.
    pub fn unplug(&self) {
        *lock(&self.devices) = Devices::default();
    }

    /// From now on `source` draws. Nothing is kept alive.
    pub fn show(&self, source: Weak<dyn Source>) {
        lock(&self.devices).source = Some(source);
    }

    /// Adds a keyboard or pointing device. The one that came last and takes what is typed gets it.
    pub fn plug(&self, input: Weak<dyn Input>) {
        lock(&self.devices).inputs.insert(0, input);
    }

    /// Whether there is a display.
    pub fn has_display(&self) -> bool {
        self.source().is_some()
    }

    fn source(&self) -> Option<Arc<dyn Source>> {
        lock(&self.devices).source.as_ref().and_then(Weak::upgrade)
    }

    fn inputs(&self) -> Vec<Arc<dyn Input>> {
        lock(&self.devices).inputs.iter().filter_map(Weak::upgrade).collect()
    }

    /// What the screen shows now.
    pub fn picture(&self) -> Picture {
        let mut picture = Picture::default();
        picture.resize(640, 480);
        if let Some(source) = self.source() {
            source.draw(&mut picture);
        }
        picture
    }

    /// Gives `look` what changed since an earlier look, or all (`since` 0).
    pub fn look<T>(&self, since: u64, look: impl FnOnce(Changes<'_>) -> T) -> T {
        let source = self.source();
        let mut shown = lock(&self.shown);
        if shown.drawn.is_none_or(|drawn| drawn.elapsed() >= FRAME) {
            shown.draw(source.as_deref());
        }
        let cursor = (shown.cursor_changed > since).then(|| shown.cursor.clone());
        let changes = Changes {
            picture: &shown.picture,
            rects: shown.changed(since),
            resized: shown.resized > since,
            cursor,
            now: shown.now,
        };
        look(changes)
    }

    /// A key goes down or up. Whether a keyboard took it.
    pub fn key(&self, key: Key, down: bool) -> bool {
        self.inputs().iter().any(|input| input.key(key, down))
    }

    /// Presses keys together, and lets them go. Waits a moment for a guest that does not read its keyboard; whether one took them.
    pub fn press(&self, keys: &[Key]) -> bool {
        let down = keys.iter().all(|&key| self.key_soon(key, true));
        std::thread::sleep(STROKE);
        keys.iter().rev().fold(down, |taken, &key| self.key_soon(key, false) && taken)
    }

    fn key_soon(&self, key: Key, down: bool) -> bool {
        let patience = Instant::now() + PATIENCE;
        while !self.key(key, down) {
            if Instant::now() > patience {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Types text as on a US keyboard. How many characters were typed, up to the first that is not on it or that nobody took.
    pub fn type_text(&self, text: &str) -> usize {
        let typed = |c: &char| match Stroke::of(*c) {
            Some(Stroke { key, shift: true }) => self.press(&[Key::SHIFT, key]),
            Some(Stroke { key, shift: false }) => self.press(&[key]),
            None => false,
        };
        text.chars().take_while(typed).count()
    }

    /// Moves the pointer.
    pub fn point(&self, point: Point) -> bool {
        self.inputs().iter().any(|input| input.point(point))
    }

    /// Asks the guest for another size. Whether it is told.
    pub fn resize(&self, width: u32, height: u32) -> bool {
        self.source().is_some_and(|source| source.resize(width, height))
    }
}

impl Shown {
    fn draw(&mut self, source: Option<&dyn Source>) {
        self.now += 1;
        match source {
            Some(source) => source.draw(&mut self.next),
            None => {
                self.next.resize(640, 480);
                self.next.fill(0);
            }
        }
        self.drawn = Some(Instant::now());
        let cursor = source.and_then(Source::cursor);
        if cursor != self.cursor {
            (self.cursor, self.cursor_changed) = (cursor, self.now);
        }
        let (width, height) = self.next.size();
        if self.picture.size() != (width, height) {
            self.picture = self.next.clone();
            self.resized = self.now;
            self.tiles = vec![self.now; (width.div_ceil(TILE) * height.div_ceil(TILE)) as usize];
            return;
        }
        let columns = width.div_ceil(TILE) as usize;
        for y in 0..height {
            let first = (y / TILE) as usize * columns;
            let (new, old) = (self.next.row(y), self.picture.row_mut(y));
            if new == old {
                continue;
            }
            let parts = new.chunks(TILE as usize).zip(old.chunks_mut(TILE as usize));
            for ((new, old), tile) in parts.zip(&mut self.tiles[first..]) {
                if new != old {
                    old.copy_from_slice(new);
                    *tile = self.now;
                }
            }
        }
    }

    /// The tiles that changed, those side by side as one.
    fn changed(&self, since: u64) -> Vec<Rect> {
        let (width, height) = self.picture.size();
        let columns = width.div_ceil(TILE).max(1) as usize;
        let mut rects: Vec<Rect> = Vec::new();
        for (n, _) in self.tiles.iter().enumerate().filter(|(_, changed)| **changed > since) {
            let (x, y) = ((n % columns) as u32 * TILE, (n / columns) as u32 * TILE);
            let (right, bottom) = ((x + TILE).min(width), (y + TILE).min(height));
            match rects.last_mut() {
                Some(last) if last.y == y && last.x + last.width == x => last.width = right - last.x,
                _ => rects.push(Rect { x, y, width: right - x, height: bottom - y }),
            }
        }
        rects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dots(Mutex<Vec<(u32, u32)>>);

    impl Source for Dots {
        fn draw(&self, picture: &mut Picture) {
            picture.resize(200, 100);
            for (x, y) in lock(&self.0).drain(..) {
                picture.row_mut(y)[x as usize] ^= 0xffffff;
            }
        }
    }

    #[test]
    fn only_what_changed_is_told() {
        let screen = Screen::new();
        let dots = Arc::new(Dots(Mutex::default()));
        let source: Arc<dyn Source> = dots.clone();
        screen.show(Arc::downgrade(&source));
        let seen = screen.look(0, |changes| {
            assert!(changes.resized);
            let area: u32 = changes.rects.iter().map(|r| r.width * r.height).sum();
            assert_eq!(area, 200 * 100);
            changes.now
        });
        lock(&dots.0).extend([(0, 0), (70, 63), (199, 99)]);
        lock(&screen.shown).drawn = None;
        let rects = screen.look(seen, |changes| {
            assert_eq!(changes.picture.row(99)[199], 0xffffff);
            changes.rects
        });
        let rect = |x, y, width, height| Rect { x, y, width, height };
        assert_eq!(rects, [rect(0, 0, 128, 64), rect(192, 64, 8, 36)]);
        drop((dots, source));
        lock(&screen.shown).drawn = None;
        assert!(
            screen.look(seen, |changes| changes.resized && changes.picture.size() == (640, 480)),
            "no display"
        );
    }
}
