//! A graphics adapter in 2D (5.7): the driver draws into its own memory, and tells what the device is to copy and to show. It has
//! a monitor, whose size the viewer can choose, and a cursor of its own.

mod resource;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, OnceLock};

use machine::Memory;
use screens::{Cursor, Picture, Source, edid};
use serde::{Deserialize, Serialize};

use super::{Broken, Device, In, Out, Wires};
use crate::{Saved, lock};

pub use resource::{Format, Rect, Resource};

/// EDID can be asked for.
const F_EDID: u64 = 1 << 1;
/// Of `events_read`: the monitor is another.
const EVENT_DISPLAY: u32 = 1;
const CONTROL: usize = 0;
/// Resources at most.
const RESOURCES: usize = 1024;
/// Pieces of guest memory of a resource at most.
const PIECES: u32 = 16384;
/// The cursor's width and height.
const CURSOR: u32 = 64;
/// In the header: the answer tells the fence.
const FENCE: u32 = 1;

mod command {
    pub const GET_DISPLAY_INFO: u32 = 0x100;
    pub const CREATE_2D: u32 = 0x101;
    pub const UNREF: u32 = 0x102;
    pub const SET_SCANOUT: u32 = 0x103;
    pub const FLUSH: u32 = 0x104;
    pub const TRANSFER: u32 = 0x105;
    pub const ATTACH: u32 = 0x106;
    pub const DETACH: u32 = 0x107;
    pub const GET_EDID: u32 = 0x10a;
    pub const UPDATE_CURSOR: u32 = 0x300;
    pub const MOVE_CURSOR: u32 = 0x301;
}
mod answer {
    pub const OK: u32 = 0x1100;
    pub const DISPLAY_INFO: u32 = 0x1101;
    pub const EDID: u32 = 0x1104;
}

/// Why a command was not done: what the answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Error {
    Unknown = 0x1200,
    Memory = 0x1201,
    Scanout = 0x1202,
    Resource = 0x1203,
    Parameter = 0x1205,
}

/// What is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// By number.
    pub resources: BTreeMap<u32, Resource>,
    /// What is shown: a resource and a part of it.
    pub scanout: Option<(u32, Rect)>,
    /// What the driver drew as the cursor: pixels with opacity, width, and the pixel that points.
    pub cursor: Option<(Vec<u32>, u32, (u32, u32))>,
    /// Whether the driver has set a cursor at all.
    pub own_cursor: bool,
    /// The monitor's size.
    pub size: Option<(u32, u32)>,
    /// Events that the driver has not seen yet.
    pub events: u32,
}

/// The adapter.
pub struct Gpu {
    memory: Memory,
    state: Mutex<State>,
    shown: Mutex<Option<Arc<Cursor>>>,
    wires: OnceLock<Wires>,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu").field("scanout", &lock(&self.state).scanout).finish_non_exhaustive()
    }
}

/// Little-endian words of a command.
struct Words<'a, 'b>(&'a mut In<'b>);

impl Words<'_, '_> {
    fn word(&mut self) -> Result<u32, Error> {
        let mut bytes = [0; 4];
        self.0.read_exact(&mut bytes).map_err(|_| Error::Parameter)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn long(&mut self) -> Result<u64, Error> {
        Ok(u64::from(self.word()?) | u64::from(self.word()?) << 32)
    }

    fn rect(&mut self) -> Result<Rect, Error> {
        Ok(Rect { x: self.word()?, y: self.word()?, width: self.word()?, height: self.word()? })
    }
}

impl Gpu {
    /// An adapter for guests with `memory`; its monitor likes [`edid::PREFERRED`] until a viewer wants another size.
    pub fn new(memory: Memory) -> Self {
        Self { memory, state: Mutex::default(), shown: Mutex::default(), wires: OnceLock::new() }
    }

    /// Resources and what is shown.
    pub fn state(&self) -> Saved<State> {
        Saved::V1(lock(&self.state).clone())
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        let mut state = state.clone();
        let mut pixels = 0;
        state.resources.retain(|_, resource| {
            pixels += resource.count();
            resource.is_sound() && resource.backing.len() <= PIECES as usize && pixels <= resource::MAX_PIXELS
        });
        let resources = &state.resources;
        state.scanout = state.scanout.filter(|(id, rect)| {
            resources.get(id).is_some_and(|resource| rect.is_in(resource.size().0, resource.size().1))
        });
        *lock(&self.state) = state;
        self.show_cursor();
    }

    fn execute(&self, kind: u32, words: &mut Words<'_, '_>) -> Result<(u32, Vec<u8>), Error> {
        let mut state = lock(&self.state);
        match kind {
            command::GET_DISPLAY_INFO => return Ok((answer::DISPLAY_INFO, display_info(state.monitor()))),
            command::GET_EDID => {
                if words.word()? != 0 {
                    return Err(Error::Scanout);
                }
                let (width, height) = state.monitor();
                let block = edid::block(width, height);
                let mut bytes = (block.len() as u32).to_le_bytes().to_vec();
                bytes.extend([0; 4]);
                bytes.extend(block);
                bytes.resize(8 + 1024, 0);
                return Ok((answer::EDID, bytes));
            }
            command::CREATE_2D => {
                let [id, format, width, height] =
                    [words.word()?, words.word()?, words.word()?, words.word()?];
                state.create(id, format, width, height)?;
            }
            command::UNREF => {
                let id = words.word()?;
                state.resources.remove(&id).ok_or(Error::Resource)?;
                state.scanout = state.scanout.filter(|(shown, _)| *shown != id);
            }
            command::SET_SCANOUT => {
                let (rect, scanout, id) = (words.rect()?, words.word()?, words.word()?);
                state.set_scanout(rect, scanout, id)?;
            }
            // What is shown is drawn when somebody looks.
            command::FLUSH => {
                let (rect, id) = (words.rect()?, words.word()?);
                state.resource(id, rect)?;
            }
            command::TRANSFER => {
                let (rect, offset, id) = (words.rect()?, words.long()?, words.word()?);
                state.resource(id, rect)?.transfer(self.memory.guest(), rect, offset);
            }
            command::ATTACH => {
                let (id, count) = (words.word()?, words.word()?);
                let resource = state.resources.get_mut(&id).ok_or(Error::Resource)?;
                if count > PIECES || !resource.backing.is_empty() {
                    return Err(Error::Parameter);
                }
                let mut backing = Vec::new();
                for _ in 0..count {
                    let piece = (words.long()?, words.word()?);
                    words.word()?;
                    backing.push(piece);
                }
                resource.backing = backing;
            }
            command::DETACH => {
                let id = words.word()?;
                state.resources.get_mut(&id).ok_or(Error::Resource)?.backing.clear();
            }
            _ => return Err(Error::Unknown),
        }
        Ok((answer::OK, Vec::new()))
    }

    fn execute_cursor(&self, kind: u32, words: &mut Words<'_, '_>) -> Result<(), Error> {
        let (_position, id) = (words.rect()?, words.word()?);
        let hot = (words.word()?, words.word()?);
        match kind {
            // The viewer knows best where its pointer is.
            command::MOVE_CURSOR => return Ok(()),
            command::UPDATE_CURSOR => {}
            _ => return Err(Error::Unknown),
        }
        let mut state = lock(&self.state);
        state.own_cursor = true;
        state.cursor = match state.resources.get(&id) {
            None if id == 0 => None,
            Some(resource) if resource.size() == (CURSOR, CURSOR) => {
                let picture = resource.picture();
                let pixels = (0..CURSOR).flat_map(|y| picture.row(y).iter().copied()).collect();
                Some((pixels, CURSOR, (hot.0.min(CURSOR - 1), hot.1.min(CURSOR - 1))))
            }
            _ => return Err(Error::Resource),
        };
        drop(state);
        self.show_cursor();
        Ok(())
    }

    fn show_cursor(&self) {
        let state = lock(&self.state);
        let cursor = state.own_cursor.then(|| match &state.cursor {
            Some((pixels, width, hot)) => {
                let mut picture = Picture::default();
                picture.resize((*width).min(CURSOR), CURSOR);
                for (y, row) in (0..CURSOR).zip(pixels.chunks((*width).clamp(1, CURSOR) as usize)) {
                    picture.row_mut(y).iter_mut().zip(row).for_each(|(to, from)| *to = *from);
                }
                Arc::new(Cursor { picture, hot: *hot })
            }
            None => Arc::default(),
        });
        *lock(&self.shown) = cursor;
    }
}

impl State {
    fn monitor(&self) -> (u32, u32) {
        self.size.unwrap_or(edid::PREFERRED)
    }

    /// A resource of which `rect` is a part.
    fn resource(&mut self, id: u32, rect: Rect) -> Result<&mut Resource, Error> {
        let resource = self.resources.get_mut(&id).ok_or(Error::Resource)?;
        let (width, height) = resource.size();
        if rect.is_in(width, height) { Ok(resource) } else { Err(Error::Parameter) }
    }

    fn create(&mut self, id: u32, format: u32, width: u32, height: u32) -> Result<(), Error> {
        if id == 0 || self.resources.contains_key(&id) {
            return Err(Error::Resource);
        }
        let format = Format::of(format).ok_or(Error::Parameter)?;
        let used: u64 = self.resources.values().map(Resource::count).sum();
        let wanted = u64::from(width) * u64::from(height);
        if self.resources.len() >= RESOURCES || wanted > resource::MAX_PIXELS - used.min(resource::MAX_PIXELS)
        {
            return Err(Error::Memory);
        }
        let resource = Resource::new(format, width, height).ok_or(Error::Parameter)?;
        self.resources.insert(id, resource);
        Ok(())
    }

    fn set_scanout(&mut self, rect: Rect, scanout: u32, id: u32) -> Result<(), Error> {
        if scanout != 0 {
            return Err(Error::Scanout);
        }
        if id == 0 {
            self.scanout = None;
            return Ok(());
        }
        self.resource(id, rect)?;
        self.scanout = Some((id, rect));
        Ok(())
    }
}

/// The monitors (5.7.6.8): one of 16 there is.
fn display_info((width, height): (u32, u32)) -> Vec<u8> {
    let mut bytes: Vec<u8> = [0, 0, width, height, 1, 0].iter().flat_map(|w: &u32| w.to_le_bytes()).collect();
    bytes.resize(16 * 24, 0);
    bytes
}

impl Device for Gpu {
    fn kind(&self) -> u16 {
        16
    }

    fn class(&self) -> u32 {
        0x03_8000
    }

    fn features(&self) -> u64 {
        F_EDID
    }

    fn queues(&self) -> &[u16] {
        &[256, 16]
    }

    /// `events_read`, `events_clear`, one scanout, no capability sets.
    fn config(&self) -> Vec<u8> {
        let events = lock(&self.state).events;
        [events, 0, 1, 0].iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    fn write_config(&self, offset: u64, size: u8, value: u64) {
        if (offset, size) == (4, 4) {
            lock(&self.state).events &= !(value as u32);
        }
    }

    fn connect(&self, wires: Wires) {
        // The transport calls once.
        let _ = self.wires.set(wires);
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        *state = State { size: state.size, ..State::default() };
        drop(state);
        self.show_cursor();
    }

    fn serve(&self, queue: usize, mut request: In<'_>, mut to: Out<'_>) -> Result<usize, Broken> {
        let mut header = [0; 24];
        request.read_exact(&mut header).map_err(|_| Broken)?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut words = Words(&mut request);
        let done = if queue == CONTROL {
            self.execute(word(0), &mut words)
        } else {
            self.execute_cursor(word(0), &mut words).map(|()| (answer::OK, Vec::new()))
        };
        let (kind, body) = done.unwrap_or_else(|error| (error as u32, Vec::new()));
        let mut bytes = kind.to_le_bytes().to_vec();
        let fence = word(4) & FENCE;
        bytes.extend(fence.to_le_bytes());
        bytes.extend(if fence != 0 { &header[8..24] } else { &[0; 16] });
        bytes.extend(body);
        // Drivers need not leave room for an answer on the cursor's queue.
        let count = bytes.len().min(to.available_bytes());
        to.write_all(&bytes[..count]).map_err(|_| Broken)?;
        Ok(count)
    }
}

impl Source for Gpu {
    fn draw(&self, picture: &mut Picture) {
        let state = lock(&self.state);
        let shown = state.scanout.and_then(|(id, rect)| Some((state.resources.get(&id)?, rect)));
        match shown {
            Some((resource, rect)) => resource.draw(rect, picture),
            None => {
                let (width, height) = if picture.size() == (0, 0) { state.monitor() } else { picture.size() };
                picture.resize(width, height);
                picture.fill(0);
            }
        }
    }

    fn cursor(&self) -> Option<Arc<Cursor>> {
        lock(&self.shown).clone()
    }

    fn resize(&self, width: u32, height: u32) -> bool {
        let mut state = lock(&self.state);
        state.size = Some((width.clamp(320, 4095), height.clamp(200, 4095)));
        state.events |= EVENT_DISPLAY;
        drop(state);
        match self.wires.get() {
            Some(wires) => wires.config_changed(),
            None => return false,
        }
        true
    }
}
