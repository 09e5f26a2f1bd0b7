//! A SATA CD-ROM drive (ATA8-ACS, PACKET; SPC-3 and MMC-5 for what is in the packets).

use std::sync::Arc;

use disks::Disk;
use serde::{Deserialize, Serialize};

use super::fis::{Done, Kind, Taskfile, error, status};
use super::{Io, identify};
use crate::dma::Fault;

/// Bytes of a block.
const BLOCK: u64 = 2048;
/// Blocks of a read at most.
const MOST: u64 = 1 << 15;
/// Above so many blocks it is no CD, but a DVD.
const CD_BLOCKS: u64 = 80 * 60 * 75;

/// Commands of ATA.
const PACKET: u8 = 0xa0;
const IDENTIFY_PACKET: u8 = 0xa1;
const DEVICE_RESET: u8 = 0x08;
const DIAGNOSTIC: u8 = 0x90;
const SET_FEATURES: u8 = 0xef;

/// Commands in packets.
mod packet {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP: u8 = 0x1b;
    pub const PREVENT_ALLOW: u8 = 0x1e;
    pub const READ_CAPACITY: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const SEEK: u8 = 0x2b;
    pub const SYNCHRONIZE_CACHE: u8 = 0x35;
    pub const READ_TOC: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT_STATUS: u8 = 0x4a;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_12: u8 = 0xa8;
    pub const SET_SPEED: u8 = 0xbb;
    pub const MECHANISM_STATUS: u8 = 0xbd;
    pub const READ_CD: u8 = 0xbe;
}

/// Sense data: key, additional code and its qualifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sense(u8, u8, u8);

impl Sense {
    const NONE: Self = Self(0, 0, 0);
    const NO_MEDIUM: Self = Self(2, 0x3a, 0);
    const UNREADABLE: Self = Self(3, 0x11, 0);
    const BAD_COMMAND: Self = Self(5, 0x20, 0);
    const OUT_OF_RANGE: Self = Self(5, 0x21, 0);
    const BAD_FIELD: Self = Self(5, 0x24, 0);
    const LOCKED: Self = Self(5, 0x53, 2);
    const MEDIUM_CHANGED: Self = Self(6, 0x28, 0);
}

/// What the drive remembers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtapiState {
    /// Why the last command failed, until somebody asks.
    pub sense: Sense,
    /// The medium is to stay in.
    pub locked: bool,
    /// The tray is out.
    pub open: bool,
    /// The medium came back, and the host has not heard of it.
    pub changed: bool,
    /// An event that the host has not asked for: 0, or what GET EVENT STATUS NOTIFICATION calls it.
    pub event: u8,
}

/// The drive, with a medium.
#[derive(Debug)]
pub struct Atapi {
    disk: Arc<Disk>,
    serial: String,
    pub state: AtapiState,
}

/// What a packet is answered with.
enum Reply {
    Nothing,
    /// No more than the host asked for.
    Bytes(Vec<u8>),
    /// First block and how many.
    Blocks(u64, u64),
}

/// A command did not work: the sense data, or the controller's matter.
enum Trouble {
    Sense(Sense),
    Bus(Fault),
}

impl From<Sense> for Trouble {
    fn from(sense: Sense) -> Self {
        Self::Sense(sense)
    }
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Disk => Self::Sense(Sense::UNREADABLE),
            fault => Self::Bus(fault),
        }
    }
}

impl Atapi {
    pub fn new(disk: Arc<Disk>, serial: &str) -> Self {
        Self { disk, serial: serial.into(), state: AtapiState::default() }
    }

    /// Its signature in the registers after a reset.
    pub fn signature() -> Done {
        Done { status: 0, error: 1, lba: 0xeb_1401, device: 0, count: 1, kind: Kind::Plain, bytes: 0 }
    }

    /// Does a command.
    ///
    /// # Errors
    /// Guest memory is not where it should be.
    pub fn command(&mut self, t: &Taskfile, packet: &[u8; 16], io: &Io<'_>) -> Result<Done, Fault> {
        let ready = status::READY | status::SEEK_DONE;
        let done = Done {
            status: ready,
            error: 0,
            lba: t.lba,
            device: t.device,
            count: t.count,
            kind: Kind::Plain,
            bytes: 0,
        };
        let failed = Done { status: status::READY | status::ERROR, error: error::ABORTED, ..done };
        match t.command {
            PACKET => self.packet(t, packet, io, done),
            IDENTIFY_PACKET => {
                let bytes = identify::cd(&self.serial);
                io.pieces.put(io.memory, &bytes)?;
                Ok(Done { kind: Kind::PioIn(512), bytes: 512, ..done })
            }
            DEVICE_RESET | DIAGNOSTIC => Ok(Self::signature()),
            // The transfer mode: nothing comes of it.
            SET_FEATURES if t.features & 0xff == 3 => Ok(done),
            // IDENTIFY DEVICE and READ SECTORS leave the signature, by which old systems know us.
            0x20 | 0xec => Ok(Done { lba: 0xeb_1401, count: 1, ..failed }),
            // Power modes.
            0xe0..=0xe3 | 0xe6 => Ok(done),
            0xe5 => Ok(Done { count: 0xff, ..done }),
            _ => Ok(failed),
        }
    }

    fn packet(&mut self, t: &Taskfile, packet: &[u8; 16], io: &Io<'_>, done: Done) -> Result<Done, Fault> {
        // The interrupt reason: the command is over.
        let done = Done { count: 3, ..done };
        match self.execute(packet).and_then(|reply| Ok(self.give(reply, io)?)) {
            Ok(bytes) if bytes > 0 && t.features & 1 == 0 => {
                // By PIO, in blocks of the size that the host gave.
                let limit = match t.lba >> 8 & 0xfffe {
                    0 => 0xfffe,
                    limit => limit,
                };
                let last = (bytes - 1) % limit + 1;
                Ok(Done { kind: Kind::PacketIn(last as u16), bytes, lba: last << 8, ..done })
            }
            Ok(bytes) => Ok(Done { bytes, ..done }),
            Err(Trouble::Bus(fault)) => Err(fault),
            Err(Trouble::Sense(sense)) => {
                self.state.sense = sense;
                let error = sense.0 << 4 | error::ABORTED;
                Ok(Done { status: status::READY | status::ERROR, error, ..done })
            }
        }
    }

    /// Hands a reply over. Gives its bytes, of which there are no more than the host has room for.
    fn give(&self, reply: Reply, io: &Io<'_>) -> Result<u64, Fault> {
        match reply {
            Reply::Nothing => Ok(0),
            Reply::Bytes(bytes) => {
                let n = io.pieces.len().min(bytes.len() as u64);
                io.pieces.put(io.memory, &bytes[..n as usize])?;
                Ok(n)
            }
            Reply::Blocks(first, count) => {
                let len = (count * BLOCK).min(io.pieces.len());
                let start = first * BLOCK;
                let there = self.disk.size().saturating_sub(start).min(len);
                io.pieces.read(io.memory, &self.disk, start, there)?;
                // A file may end within its last block.
                io.pieces.put_at(io.memory, there, &vec![0; (len - there).min(BLOCK) as usize])?;
                Ok(len)
            }
        }
    }

    /// Blocks of the medium.
    fn blocks(&self) -> u64 {
        self.disk.size().div_ceil(BLOCK).min(u32::MAX.into())
    }

    fn execute(&mut self, p: &[u8; 16]) -> Result<Reply, Trouble> {
        use packet as c;
        let word = |at: usize| usize::from(p[at]) << 8 | usize::from(p[at + 1]);
        let long = |at: usize| (word(at) as u64) << 16 | word(at + 2) as u64;
        let short = |bytes: Vec<u8>, room: usize| Ok(Reply::Bytes(cut(bytes, room)));
        match p[0] {
            c::INQUIRY if p[1] & 1 == 0 => return short(inquiry(), word(3)),
            c::REQUEST_SENSE => return short(self.request_sense(), p[4].into()),
            c::GET_EVENT_STATUS if p[1] & 1 != 0 => return short(self.event(p[4]), word(7)),
            c::GET_CONFIGURATION => {
                return short(self.configuration(word(2) as u16, p[1] & 3), word(7));
            }
            c::MECHANISM_STATUS => {
                return short(vec![0, if self.state.open { 0x10 } else { 0 }, 0, 0, 0, 0, 0, 0], word(8));
            }
            c::START_STOP => return self.start_stop(p[4]),
            c::PREVENT_ALLOW => {
                self.state.locked = p[4] & 1 != 0;
                return Ok(Reply::Nothing);
            }
            c::MODE_SENSE_6 => return short(self.mode_sense(p, false)?, p[4].into()),
            c::MODE_SENSE_10 => return short(self.mode_sense(p, true)?, word(7)),
            c::SET_SPEED => return Ok(Reply::Nothing),
            _ => {}
        }
        if std::mem::take(&mut self.state.changed) {
            return Err(Sense::MEDIUM_CHANGED.into());
        }
        // What is left needs a medium.
        let needs = [
            c::TEST_UNIT_READY,
            c::READ_CAPACITY,
            c::READ_10,
            c::READ_12,
            c::READ_CD,
            c::READ_TOC,
            c::READ_DISC_INFORMATION,
            c::SEEK,
            c::SYNCHRONIZE_CACHE,
        ];
        if needs.contains(&p[0]) && self.state.open {
            return Err(Sense::NO_MEDIUM.into());
        }
        match p[0] {
            c::TEST_UNIT_READY | c::SYNCHRONIZE_CACHE => Ok(Reply::Nothing),
            c::READ_CAPACITY => {
                let last = self.blocks().saturating_sub(1) as u32;
                let mut bytes = last.to_be_bytes().to_vec();
                bytes.extend((BLOCK as u32).to_be_bytes());
                Ok(Reply::Bytes(bytes))
            }
            c::READ_10 => self.read(long(2), word(7) as u64),
            c::READ_12 => self.read(long(2), long(6)),
            // Of data tracks (any, mode 1, or mode 2 form 1) only what the user stored there.
            c::READ_CD if matches!(p[1] >> 2 & 7, 0 | 2 | 4) && p[10] & 7 == 0 => match p[9] {
                0 => Ok(Reply::Nothing),
                0x10 => self.read(long(2), u64::from(p[6]) << 16 | word(7) as u64),
                _ => Err(Sense::BAD_FIELD.into()),
            },
            c::SEEK => self.read(long(2), 0),
            c::READ_TOC => short(self.contents(p)?, word(7)),
            c::READ_DISC_INFORMATION => {
                let mut bytes = vec![0; 34];
                // A finished disc with one session of one track.
                bytes[..7].copy_from_slice(&[0, 32, 0xe, 1, 1, 1, 1]);
                short(bytes, word(7))
            }
            c::INQUIRY | c::GET_EVENT_STATUS | c::READ_CD => Err(Sense::BAD_FIELD.into()),
            _ => Err(Sense::BAD_COMMAND.into()),
        }
    }

    fn read(&self, first: u64, count: u64) -> Result<Reply, Trouble> {
        if first + count > self.blocks() {
            return Err(Sense::OUT_OF_RANGE.into());
        }
        if count > MOST {
            return Err(Sense::BAD_FIELD.into());
        }
        Ok(if count == 0 { Reply::Nothing } else { Reply::Blocks(first, count) })
    }

    /// Fixed-format sense data, which is told once.
    fn request_sense(&mut self) -> Vec<u8> {
        let Sense(key, code, qualifier) = std::mem::replace(&mut self.state.sense, Sense::NONE);
        let mut bytes = vec![0; 18];
        (bytes[0], bytes[2], bytes[7], bytes[12], bytes[13]) = (0x70, key, 10, code, qualifier);
        bytes
    }

    /// Media events, asked for one at a time.
    fn event(&mut self, classes: u8) -> Vec<u8> {
        const MEDIA: u8 = 4;
        if classes & 1 << MEDIA == 0 {
            return vec![0, 2, 0x80, 1 << MEDIA];
        }
        let event = std::mem::take(&mut self.state.event);
        vec![0, 6, MEDIA, 1 << MEDIA, event, if self.state.open { 1 } else { 2 }, 0, 0]
    }

    fn start_stop(&mut self, how: u8) -> Result<Reply, Trouble> {
        const NEW_MEDIUM: u8 = 2;
        const REMOVED: u8 = 3;
        // "Load or eject", and which.
        match how & 3 {
            2 if self.state.locked && !self.state.open => return Err(Sense::LOCKED.into()),
            2 if !self.state.open => (self.state.open, self.state.event) = (true, REMOVED),
            3 if self.state.open => {
                (self.state.open, self.state.event, self.state.changed) = (false, NEW_MEDIUM, true);
            }
            _ => {}
        }
        Ok(Reply::Nothing)
    }

    /// READ TOC/PMA/ATIP: one session with one track, of data.
    fn contents(&self, p: &[u8; 16]) -> Result<Vec<u8>, Sense> {
        let msf = p[1] & 2 != 0;
        let place = |lba: u64| {
            if msf {
                let frame = lba + 150;
                [0, (frame / 75 / 60).min(255) as u8, (frame / 75 % 60) as u8, (frame % 75) as u8]
            } else {
                (lba as u32).to_be_bytes()
            }
        };
        // A data track.
        let entry = |track: u8, lba: u64| [&[0, 0x14, track, 0][..], &place(lba)].concat();
        const LEAD_OUT: u8 = 0xaa;
        let entries = match (p[2] & 0xf, p[6]) {
            // Old drivers have the format in the last byte.
            (0, _) if p[9] & 0xc0 == 0x40 => entry(1, 0),
            (0, 0 | 1) => [entry(1, 0), entry(LEAD_OUT, self.blocks())].concat(),
            (0, LEAD_OUT) => entry(LEAD_OUT, self.blocks()),
            (1, _) => entry(1, 0),
            _ => return Err(Sense::BAD_FIELD),
        };
        let len = (entries.len() + 2) as u16;
        Ok([&len.to_be_bytes()[..], &[1, 1], &entries].concat())
    }

    /// Features of the drive (MMC-5, 5.3), from `first` on; `which` 1 are the current ones, 2 is the first alone.
    fn configuration(&self, first: u16, which: u8) -> Vec<u8> {
        const CD: u16 = 8;
        const DVD: u16 = 0x10;
        let dvd = self.blocks() > CD_BLOCKS;
        let profile = match (self.state.open, dvd) {
            (true, _) => 0,
            (_, true) => DVD,
            (_, false) => CD,
        };
        let listed = |number: u16| [&number.to_be_bytes()[..], &[(profile == number).into(), 0]].concat();
        let there = !self.state.open;
        // Number, version, whether it is there now, and what it says: profiles, core, removable medium (locked by commands, a
        // tray), random access, several sessions, CDs, DVDs.
        let random = [&(BLOCK as u32).to_be_bytes()[..], &[0, 1, 0, 0]].concat();
        let features: [(u16, u8, bool, Vec<u8>); 7] = [
            (0, 0, true, [listed(DVD), listed(CD)].concat()),
            (1, 2, true, vec![0, 0, 0, 8, 1, 0, 0, 0]),
            (3, 1, true, vec![0x29, 0, 0, 0]),
            (0x10, 0, there, random),
            (0x1d, 0, there, vec![]),
            (0x1e, 2, there && !dvd, vec![0, 0, 0, 0]),
            (0x1f, 1, there && dvd, vec![0, 0, 0, 0]),
        ];
        let mut bytes = vec![0; 8];
        bytes[6..].copy_from_slice(&profile.to_be_bytes());
        for (number, version, current, data) in features {
            let asked = match which {
                2 => number == first,
                1 => number >= first && current,
                _ => number >= first,
            };
            if asked {
                bytes.extend(number.to_be_bytes());
                // It stays, too, if it is of no medium.
                let stays = u8::from(number < 0x10 && number != 0) << 1;
                bytes.extend([version << 2 | stays | u8::from(current), data.len() as u8]);
                bytes.extend(data);
            }
        }
        let len = bytes.len() as u32 - 4;
        bytes[..4].copy_from_slice(&len.to_be_bytes());
        bytes
    }

    /// Mode pages: error recovery, and what the drive can do.
    fn mode_sense(&self, p: &[u8; 16], long: bool) -> Result<Vec<u8>, Sense> {
        const RECOVERY: u8 = 1;
        const CAPABILITIES: u8 = 0x2a;
        const ALL: u8 = 0x3f;
        let asked = p[2] & ALL;
        let mut pages = vec![];
        if matches!(asked, RECOVERY | ALL) {
            pages.extend([RECOVERY, 6, 0, 5, 0, 0, 0, 0]);
        }
        if matches!(asked, CAPABILITIES | ALL) {
            let mut page = [0; 22];
            // Reads several sessions and mode 2; a tray that locks, and whether it is; speed in KB/s.
            page[..8].copy_from_slice(&[
                CAPABILITIES,
                20,
                0x3b,
                0,
                0x70,
                0,
                0x29 | u8::from(self.state.locked) << 1,
                0,
            ]);
            page[8..10].copy_from_slice(&0x1b90u16.to_be_bytes());
            page[14..16].copy_from_slice(&0x1b90u16.to_be_bytes());
            pages.extend(page);
        }
        // Values that could be changed there are none, and saved ones neither.
        if pages.is_empty() || p[2] >> 6 == 3 {
            return Err(Sense::BAD_FIELD);
        }
        // The medium's type: 120 mm, data; or an open tray.
        let medium = if self.state.open { 0x71 } else { 1 };
        let head = if long {
            let len = (pages.len() + 6) as u16;
            [&len.to_be_bytes()[..], &[medium, 0, 0, 0, 0, 0]].concat()
        } else {
            vec![(pages.len() + 3) as u8, medium, 0, 0]
        };
        Ok([head, pages].concat())
    }
}

fn cut(mut bytes: Vec<u8>, room: usize) -> Vec<u8> {
    bytes.truncate(room);
    bytes
}

/// A removable CD drive of SPC-3, with ATAPI's response format.
fn inquiry() -> Vec<u8> {
    let mut bytes = vec![5, 0x80, 5, 0x32, 31, 0, 0, 0];
    bytes.extend(format!("{:<8}{:<16}{:<4.4}", "Lodge", "CD-ROM", identify::REVISION).bytes());
    bytes
}
