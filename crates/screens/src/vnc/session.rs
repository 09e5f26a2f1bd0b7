//! One viewer: the protocol's state, without a socket.

use std::collections::BTreeSet;
use std::sync::Arc;

use des::Des;
use des::cipher::{BlockEncrypt, KeyInit};

use super::encode::{self, Stream};
use super::encoding;
use super::wire::{self, Format, LONGEST, Message};
use crate::{Changes, Cursor, Key, Point, Rect, Screen};

/// The version that we speak.
const VERSION: &[u8; 12] = b"RFB 003.008\n";
const SECURITY_NONE: u8 = 1;
const SECURITY_VNC: u8 = 2;

/// The viewer said what cannot be understood, or may not look: its connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Gone {
    /// It does not speak the protocol.
    #[error("the viewer does not speak VNC")]
    Nonsense,
    /// Its password is wrong.
    #[error("the viewer's password is wrong")]
    Password,
    /// It wants pixels in a way that nobody does.
    #[error("the viewer wants a colour map, which this server has not")]
    Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Version,
    Security,
    Password([u8; 16]),
    Init,
    Running,
}

/// A viewer's session.
pub struct Session {
    screen: Arc<Screen>,
    name: String,
    password: Option<Vec<u8>>,
    stage: Stage,
    /// The minor version that the viewer speaks: 3, 7 or 8.
    minor: u8,
    input: Vec<u8>,
    output: Vec<u8>,
    format: Format,
    encodings: Vec<i32>,
    zlib: Stream,
    zrle: Stream,
    /// What the viewer has seen, when.
    seen: u64,
    size: (u32, u32),
    /// It waits for an update; of all, or of what is new.
    wants: Option<bool>,
    /// An answer to its wish for a size: the status.
    resized: Option<u16>,
    /// It is to be told that we know more of keys.
    tell_keys: bool,
    pressed: BTreeSet<Key>,
}

impl Session {
    /// A viewer of `screen`, which is told that it is called `name`, and has to know the password if there is one.
    pub fn new(screen: Arc<Screen>, name: &str, password: Option<&[u8]>) -> Self {
        Self {
            screen,
            name: name.to_owned(),
            password: password.map(<[u8]>::to_vec),
            stage: Stage::Version,
            minor: 8,
            input: Vec::new(),
            output: VERSION.to_vec(),
            format: Format::OURS,
            encodings: Vec::new(),
            zlib: Stream::default(),
            zrle: Stream::default(),
            seen: 0,
            size: (0, 0),
            wants: None,
            resized: None,
            tell_keys: false,
            pressed: BTreeSet::new(),
        }
    }

    /// Whether the viewer has got in.
    pub fn running(&self) -> bool {
        self.stage == Stage::Running
    }

    /// What is to be sent now.
    pub fn output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Whether the viewer waits for something to change.
    pub fn waits(&self) -> bool {
        self.wants.is_some()
    }

    /// The viewer sent `bytes`.
    ///
    /// # Errors
    /// The connection is to be ended, when what [`Session::output`] has was sent.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        self.input.extend(bytes);
        let mut used = 0;
        let input = std::mem::take(&mut self.input);
        while let Some(length) = self.step(&input[used..])? {
            used += length;
        }
        self.input = input[used..].to_vec();
        if self.input.len() > LONGEST { Err(Gone::Nonsense) } else { Ok(()) }
    }

    /// Takes what comes next, if it is there whole: the number of its bytes.
    fn step(&mut self, input: &[u8]) -> Result<Option<usize>, Gone> {
        match self.stage {
            Stage::Version => match input.get(..12) {
                Some(version) => self.version(version).map(|()| Some(12)),
                None => Ok(None),
            },
            Stage::Security => match input.first() {
                Some(&chosen) if chosen == self.security() => {
                    self.challenge();
                    Ok(Some(1))
                }
                Some(_) => Err(Gone::Nonsense),
                None => Ok(None),
            },
            Stage::Password(challenge) => match input.get(..16) {
                Some(answer) => self.answer(&challenge, answer).map(|()| Some(16)),
                None => Ok(None),
            },
            // Whether it shares the screen with others: it has to.
            Stage::Init if input.is_empty() => Ok(None),
            Stage::Init => {
                self.greet();
                Ok(Some(1))
            }
            Stage::Running => match wire::parse(input) {
                Ok(Some((message, length))) => {
                    self.obey(message);
                    Ok(Some(length))
                }
                Ok(None) => Ok(None),
                Err(_) if input[0] == 0 => Err(Gone::Format),
                Err(_) => Err(Gone::Nonsense),
            },
        }
    }

    fn security(&self) -> u8 {
        if self.password.is_some() { SECURITY_VNC } else { SECURITY_NONE }
    }

    fn version(&mut self, version: &[u8]) -> Result<(), Gone> {
        if !version.starts_with(b"RFB 003.") || version[11] != b'\n' {
            return Err(Gone::Nonsense);
        }
        // Some say 3.5 or 3.889; what is not known is 3.3.
        self.minor = match &version[8..11] {
            b"008" => 8,
            b"007" => 7,
            _ => 3,
        };
        if self.minor == 3 {
            self.output.extend([0, 0, 0, self.security()]);
            self.challenge();
        } else {
            self.output.extend([1, self.security()]);
            self.stage = Stage::Security;
        }
        Ok(())
    }

    fn challenge(&mut self) {
        if self.password.is_none() {
            return self.accept();
        }
        let mut challenge = [0; 16];
        // 16 bytes always come at once (getrandom(2)).
        let _ = rustix::rand::getrandom(&mut challenge, rustix::rand::GetRandomFlags::empty());
        self.output.extend(challenge);
        self.stage = Stage::Password(challenge);
    }

    fn answer(&mut self, challenge: &[u8; 16], answer: &[u8]) -> Result<(), Gone> {
        let expected = encrypt(self.password.as_deref().unwrap_or_default(), challenge);
        let differs = expected.iter().zip(answer).fold(0, |d, (a, b)| d | (a ^ b));
        if differs == 0 {
            self.accept();
            return Ok(());
        }
        self.output.extend([0, 0, 0, 1]);
        if self.minor == 8 {
            let reason = b"the password is wrong";
            self.output.extend((reason.len() as u32).to_be_bytes());
            self.output.extend(reason);
        }
        Err(Gone::Password)
    }

    fn accept(&mut self) {
        if self.minor == 8 || self.password.is_some() {
            self.output.extend([0; 4]);
        }
        self.stage = Stage::Init;
    }

    fn greet(&mut self) {
        self.size = self.screen.look(u64::MAX, |changes| changes.picture.size());
        self.output.extend((self.size.0 as u16).to_be_bytes());
        self.output.extend((self.size.1 as u16).to_be_bytes());
        self.output.extend(Format::OURS.to_bytes());
        self.output.extend((self.name.len() as u32).to_be_bytes());
        self.output.extend(self.name.as_bytes());
        self.stage = Stage::Running;
    }

    fn obey(&mut self, message: Message) {
        match message {
            Message::SetFormat(format) => self.format = format,
            Message::SetEncodings(encodings) => {
                self.tell_keys |= encodings.contains(&encoding::QEMU_KEY);
                self.encodings = encodings;
                // It may have come to know cursors.
                self.seen = 0;
            }
            Message::Update { changes, .. } => self.wants = Some(self.wants.unwrap_or(true) && changes),
            Message::Keysym { down, keysym } => self.key(Key::from_keysym(keysym), down),
            Message::Key { down, keysym, xt } => {
                let key = u8::try_from(xt).ok().and_then(Key::from_xt);
                self.key(key.or_else(|| Key::from_keysym(keysym)), down);
            }
            Message::Pointer { buttons, x, y } => {
                let (width, height) = self.size;
                let (x, y) = (u32::from(x), u32::from(y));
                let (x, y) = (x.min(width.saturating_sub(1)), y.min(height.saturating_sub(1)));
                self.screen.point(Point { x, y, size: self.size, buttons });
            }
            Message::Resize { width, height } => {
                let told = width > 0 && height > 0 && self.screen.resize(width.into(), height.into());
                // 0: done, or on its way; 1: not allowed.
                self.resized = Some(if told { 0 } else { 1 });
            }
            Message::Other => {}
        }
    }

    fn key(&mut self, key: Option<Key>, down: bool) {
        let Some(key) = key else { return };
        if down {
            self.pressed.insert(key);
        } else {
            self.pressed.remove(&key);
        }
        self.screen.key(key, down);
    }

    fn knows(&self, encoding: i32) -> bool {
        self.encodings.contains(&encoding)
    }

    /// Puts an update into the output, if the viewer waits for one and there is something new.
    pub fn update(&mut self) {
        let Some(changes) = self.wants else { return };
        let screen = self.screen.clone();
        let since = if changes { self.seen } else { 0 };
        screen.look(since, |mut changes| {
            let size = changes.picture.size();
            let known = self.knows(encoding::EXTENDED_DESKTOP_SIZE) || self.knows(encoding::DESKTOP_SIZE);
            let resized = known && size != self.size;
            let cursor = changes.cursor.take().filter(|_| self.knows(encoding::CURSOR));
            let seen = self.seen;
            // The first cursor is the viewer's own unless there is one.
            let cursor = cursor.filter(|cursor| seen != 0 || cursor.is_some());
            self.seen = changes.now;
            if changes.rects.is_empty()
                && !resized
                && cursor.is_none()
                && self.resized.is_none()
                && !self.tell_keys
            {
                return;
            }
            self.wants = None;
            if resized || self.resized.is_some() {
                self.tell_size(size);
            } else {
                self.pixels(&changes, cursor);
            }
        });
    }

    /// An update that only tells the size; what is seen comes with the next.
    fn tell_size(&mut self, size: (u32, u32)) {
        self.seen = 0;
        self.size = size;
        let (width, height) = size;
        let rect = Rect { x: 0, y: 0, width, height };
        self.begin(1);
        let status = self.resized.take();
        if !self.knows(encoding::EXTENDED_DESKTOP_SIZE) {
            return self.rect(rect, encoding::DESKTOP_SIZE);
        }
        // Why (0: the server's doing, 1: this viewer's), and how it went.
        let (x, y) = (u32::from(status.is_some()), u32::from(status.unwrap_or(0)));
        self.rect(Rect { x, y, ..rect }, encoding::EXTENDED_DESKTOP_SIZE);
        // One screen, number 0, over all of it.
        self.output.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.output.extend((width as u16).to_be_bytes());
        self.output.extend((height as u16).to_be_bytes());
        self.output.extend([0; 4]);
    }

    fn pixels(&mut self, changes: &Changes<'_>, cursor: Option<Option<Arc<Cursor>>>) {
        // A viewer that cannot be told of another size sees what it has room for.
        let (width, height) = self.size;
        let rects: Vec<Rect> = changes
            .rects
            .iter()
            .filter(|rect| rect.x < width && rect.y < height)
            .map(|rect| Rect {
                width: rect.width.min(width - rect.x),
                height: rect.height.min(height - rect.y),
                ..*rect
            })
            .collect();
        let keys = std::mem::take(&mut self.tell_keys);
        self.begin(rects.len() + usize::from(cursor.is_some()) + usize::from(keys));
        if keys {
            self.rect(Rect { x: 0, y: 0, width: 0, height: 0 }, encoding::QEMU_KEY);
        }
        if let Some(cursor) = cursor {
            self.cursor(cursor.as_deref());
        }
        let ours = [encoding::RAW, encoding::ZLIB, encoding::ZRLE];
        let chosen =
            self.encodings.iter().copied().find(|known| ours.contains(known)).unwrap_or(encoding::RAW);
        for rect in rects {
            self.rect(rect, chosen);
            let (picture, format, to) = (changes.picture, self.format, &mut self.output);
            match chosen {
                encoding::ZRLE => encode::zrle(picture, rect, format, &mut self.zrle, to),
                encoding::ZLIB => encode::zlib(picture, rect, format, &mut self.zlib, to),
                _ => encode::raw(picture, rect, format, to),
            }
        }
    }

    /// The cursor's pixels, and a bit for each that is to be seen; none hides it.
    fn cursor(&mut self, cursor: Option<&Cursor>) {
        let hidden = Cursor::default();
        let cursor = cursor.unwrap_or(&hidden);
        let (width, height) = cursor.picture.size();
        let (x, y) = cursor.hot;
        self.rect(Rect { x, y, width, height }, encoding::CURSOR);
        encode::raw(&cursor.picture, Rect { x: 0, y: 0, width, height }, self.format, &mut self.output);
        for y in 0..height {
            for pixels in cursor.picture.row(y).chunks(8) {
                let bit = |(n, pixel): (usize, &u32)| if pixel >> 31 != 0 { 0x80u8 >> n } else { 0 };
                self.output.push(pixels.iter().enumerate().map(bit).fold(0, |byte, bit| byte | bit));
            }
        }
    }

    fn begin(&mut self, rects: usize) {
        self.output.extend([0, 0]);
        self.output.extend((rects as u16).to_be_bytes());
    }

    fn rect(&mut self, rect: Rect, encoding: i32) {
        for word in [rect.x, rect.y, rect.width, rect.height] {
            self.output.extend((word as u16).to_be_bytes());
        }
        self.output.extend(encoding.to_be_bytes());
    }
}

impl Drop for Session {
    /// Lets go of what the viewer held down.
    fn drop(&mut self) {
        for key in std::mem::take(&mut self.pressed) {
            self.screen.key(key, false);
        }
    }
}

/// The answer to a challenge (RFC 6143, 7.2.2): DES, with the bits of each of the password's 8 bytes turned round.
pub(super) fn encrypt(password: &[u8], challenge: &[u8; 16]) -> [u8; 16] {
    let mut key = [0; 8];
    key.iter_mut().zip(password).for_each(|(to, from)| *to = from.reverse_bits());
    let des = Des::new(&key.into());
    let mut out = *challenge;
    out.chunks_exact_mut(8).for_each(|block| des.encrypt_block(block.into()));
    out
}
