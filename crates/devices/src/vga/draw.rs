//! What the screen shows.

use screens::Picture;

use super::dispi::Dispi;
use super::registers::{Legacy, attribute, crtc, graphics, sequencer};
use super::{MEMORY, Now, Video, bytes as first_bytes};

/// Bytes of memory that the legacy modes reach: 64 KiB of each plane.
const LEGACY: usize = 0x4_0000;

/// What the legacy modes are drawn from.
struct State<'a> {
    legacy: &'a Legacy,
    dispi: &'a Dispi,
    memory: Vec<u8>,
}

/// Draws the screen.
pub fn draw(now: &Now, memory: &Video, picture: &mut Picture) {
    let Now { legacy, dispi } = now;
    let off = legacy.attribute.0 & attribute::ON == 0 || legacy.sequencer.1[sequencer::CLOCKING] & 0x20 != 0;
    let state = |bytes| State { legacy, dispi, memory: first_bytes(memory, bytes) };
    if dispi.enabled() {
        picture.resize(dispi.width.into(), dispi.height.into());
        match dispi.depth {
            _ if off => picture.fill(0),
            4 => planar(&state(MEMORY), picture, &Lines::of_dispi(dispi)),
            _ => linear(now, memory, picture),
        }
        return;
    }
    let state = &state(LEGACY);
    let graphic = legacy.graphics.1[graphics::MISC] & 1 != 0;
    if off {
        if picture.size() == (0, 0) {
            picture.resize(640, 480);
        }
        picture.fill(0);
    } else if graphic {
        let (width, height) = size(legacy, 8);
        picture.resize(width, height);
        let lines = Lines::of(legacy);
        match legacy.graphics.1[graphics::MODE] >> 5 & 3 {
            0 => planar(state, picture, &lines),
            1 => four_colours(state, picture, &lines),
            _ => bytes(state, picture, &lines),
        }
    } else {
        text(state, picture);
    }
}

/// Pixels of the legacy modes, with characters (8 pixels) `cell` wide.
fn size(legacy: &Legacy, cell: u32) -> (u32, u32) {
    let registers = &legacy.crtc.1;
    let overflow = u32::from(registers[crtc::OVERFLOW]);
    let width = (u32::from(registers[crtc::TOTAL_COLUMNS]) + 1) * cell * dots(legacy) as u32;
    let last = u32::from(registers[crtc::LAST_LINE]) | (overflow & 2) << 7 | (overflow & 0x40) << 3;
    (width, last + 1)
}

/// How wide a pixel is on the monitor.
fn dots(legacy: &Legacy) -> usize {
    if legacy.sequencer.1[sequencer::CLOCKING] & 8 != 0 { 2 } else { 1 }
}

/// Bytes at `at`; zeroes where memory ends.
fn take<const N: usize>(memory: &[u8], at: usize) -> [u8; N] {
    memory.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn linear(now: &Now, memory: &Video, picture: &mut Picture) {
    let dispi = &now.dispi;
    let first = dispi.stride() * usize::from(dispi.y) + dispi.bytes_of(dispi.x.into());
    let palette: Vec<u32> = match dispi.depth {
        8 => (0..=255).map(|index| now.legacy.colour_of(index)).collect(),
        _ => Vec::new(),
    };
    let bytes = dispi.bytes_of(1).max(1);
    let mut line = vec![0; picture.size().0 as usize * bytes];
    for y in 0..picture.size().1 {
        let start = first + dispi.stride() * y as usize;
        let row = picture.row_mut(y);
        memory.read(start as u64, &mut line);
        let known = row.len().min(MEMORY.saturating_sub(start) / bytes);
        let pixels = row.iter_mut().zip(line.chunks_exact(bytes));
        match dispi.depth {
            8 => pixels.for_each(|(to, from)| *to = palette[usize::from(from[0])]),
            15 => pixels.for_each(|(to, from)| *to = packed(u16::from_le_bytes([from[0], from[1]]), 5)),
            16 => pixels.for_each(|(to, from)| *to = packed(u16::from_le_bytes([from[0], from[1]]), 6)),
            24 => pixels.for_each(|(to, from)| *to = u32::from_le_bytes([from[0], from[1], from[2], 0])),
            _ => pixels.for_each(|(to, from)| *to = u32::from_le_bytes([from[0], from[1], from[2], 0])),
        }
        row[known..].fill(0);
    }
}

/// A pixel of 15 or 16 bits, with 5 or 6 bits of green.
fn packed(pixel: u16, green: u32) -> u32 {
    let wide = |value: u32, bits: u32| {
        let value = value & ((1 << bits) - 1);
        value << (8 - bits) | value >> (2 * bits - 8)
    };
    let pixel = u32::from(pixel);
    wide(pixel >> (5 + green), 5) << 16 | wide(pixel >> 5, green) << 8 | wide(pixel, 5)
}

/// Where rows of the legacy modes begin, as bytes of memory.
struct Lines {
    start: usize,
    offset: usize,
    /// After this row, memory's beginning is shown again.
    compare: u32,
    /// How often each is shown.
    double: u32,
    /// Rows of a character, which in graphics are the same one, or lie apart as CGA's do.
    rows: u32,
    mode: u8,
}

impl Lines {
    fn of(legacy: &Legacy) -> Self {
        let registers = &legacy.crtc.1;
        let rows = u32::from(registers[crtc::MAX_ROW]);
        let overflow = u32::from(registers[crtc::OVERFLOW]);
        Self {
            start: usize::from(u16::from_be_bytes([registers[crtc::START], registers[crtc::START + 1]])) * 4,
            offset: usize::from(registers[crtc::OFFSET]) * 8,
            compare: u32::from(registers[crtc::COMPARE]) | (overflow & 0x10) << 4 | (rows & 0x40) << 3,
            double: 1 + (rows >> 7),
            rows: (rows & 0x1f) + 1,
            mode: registers[crtc::MODE],
        }
    }

    fn of_dispi(dispi: &Dispi) -> Self {
        let offset = dispi.stride();
        let start = offset * usize::from(dispi.y) + usize::from(dispi.x) / 8 * 4;
        Self { start, offset, compare: u32::MAX, double: 1, rows: 1, mode: 3 }
    }

    /// The first byte of the line of characters at row `y` of the screen, and which of its rows that is.
    fn find(&self, y: u32) -> (usize, u32) {
        let (start, y) = if y > self.compare { (0, y - self.compare - 1) } else { (self.start, y) };
        let y = y / self.double;
        (start + (y / self.rows) as usize * self.offset, y % self.rows)
    }

    /// The first byte of row `y` in graphics.
    fn at(&self, y: u32) -> usize {
        let (at, row) = self.find(y);
        let byte_mode = u32::from(self.mode >> 6 & 1);
        let apart =
            |bit: u32| if self.mode & 1 << bit == 0 { (row >> bit & 1) << (14 + bit + byte_mode) } else { 0 };
        at + (apart(0) | apart(1)) as usize
    }
}

/// 16 colours: a bit of each plane.
fn planar(state: &State, picture: &mut Picture, lines: &Lines) {
    let legacy = state.legacy;
    let colours = legacy.colours();
    let enabled = legacy.attribute.1[attribute::PLANES] & 0xf;
    let (pan, dots) = match state.dispi.enabled() {
        true => (0, 1),
        false => (usize::from(legacy.attribute.1[attribute::PAN] & 7), dots(legacy)),
    };
    for y in 0..picture.size().1 {
        let at = lines.at(y);
        for (x, to) in picture.row_mut(y).iter_mut().enumerate() {
            let x = x / dots + pan;
            let planes: [u8; 4] = take(&state.memory, at + x / 8 * 4);
            let bit = 7 - x % 8;
            let colour = (0..4).fold(0, |colour, plane| colour | (planes[plane] >> bit & 1) << plane);
            *to = colours[usize::from(colour & enabled)];
        }
    }
}

/// CGA's 4 colours: planes 0 and 1 in turns have four pixels in a byte.
fn four_colours(state: &State, picture: &mut Picture, lines: &Lines) {
    let legacy = state.legacy;
    let colours = legacy.colours();
    let enabled = legacy.attribute.1[attribute::PLANES] & 0xf;
    for y in 0..picture.size().1 {
        let at = lines.at(y);
        for (x, to) in picture.row_mut(y).iter_mut().enumerate() {
            let x = x / dots(legacy);
            let [byte] = take(&state.memory, at + x / 8 * 4 + x / 4 % 2);
            *to = colours[usize::from(byte >> (6 - x % 4 * 2) & 3 & enabled)];
        }
    }
}

/// 256 colours, each pixel twice.
fn bytes(state: &State, picture: &mut Picture, lines: &Lines) {
    let palette: [u32; 256] = std::array::from_fn(|index| state.legacy.colour_of(index as u8));
    for y in 0..picture.size().1 {
        let at = lines.at(y);
        for (x, to) in picture.row_mut(y).iter_mut().enumerate() {
            let [byte] = take(&state.memory, at + x / 2);
            *to = palette[usize::from(byte)];
        }
    }
}

/// Text: plane 0 has characters, plane 1 attributes, plane 2 fonts of 32 bytes a character.
fn text(state: &State, picture: &mut Picture) {
    let legacy = state.legacy;
    let cell = if legacy.sequencer.1[sequencer::CLOCKING] & 1 != 0 { 8 } else { 9 };
    let (width, height) = size(legacy, cell);
    picture.resize(width, height);
    let colours = legacy.colours();
    let mode = legacy.attribute.1[attribute::MODE];
    // Where attributes can blink they have fewer colours; nothing blinks here.
    let backs = if mode & 8 != 0 { 7 } else { 0xf };
    let fonts = fonts(legacy.sequencer.1[sequencer::FONTS]);
    let (cursor, dots, lines) = (Cursor::of(legacy), dots(legacy), Lines::of(legacy));
    for y in 0..picture.size().1 {
        let (line, within) = lines.find(y);
        let cells = picture.row_mut(y).chunks_mut(cell as usize * dots);
        for (pixels, at) in cells.zip((line..).step_by(4)) {
            let [character, attribute] = take(&state.memory, at);
            let font = fonts[usize::from(attribute >> 3 & 1)];
            let [bits] = take(&state.memory, 4 * (font + usize::from(character) * 32 + within as usize) + 2);
            // The ninth column is empty, but continues lines.
            let ninth = mode & 4 != 0 && (0xc0..=0xdf).contains(&character) && bits & 1 != 0;
            let under =
                cursor.as_ref().is_some_and(|cursor| cursor.at == at && cursor.rows.contains(&within));
            let fore = colours[usize::from(attribute & 0xf)];
            let back = colours[usize::from(attribute >> 4 & backs)];
            for (x, to) in pixels.iter_mut().enumerate() {
                let lit = under || if x / dots < 8 { bits & 0x80 >> (x / dots) != 0 } else { ninth };
                *to = if lit { fore } else { back };
            }
        }
    }
}

/// Where the two fonts of a screen begin in plane 2: for characters whose attribute has bit 3 clear, and set.
fn fonts(select: u8) -> [usize; 2] {
    let font = |bits: u8| usize::from(bits & 3) * 0x4000 + usize::from(bits >> 2 & 1) * 0x2000;
    [font(select & 3 | select >> 2 & 4), font(select >> 2 & 3 | select >> 3 & 4)]
}

/// The text cursor; it does not blink.
struct Cursor {
    at: usize,
    rows: std::ops::RangeInclusive<u32>,
}

impl Cursor {
    fn of(legacy: &Legacy) -> Option<Self> {
        let registers = &legacy.crtc.1;
        let (start, end) = (registers[crtc::CURSOR_START], registers[crtc::CURSOR_END]);
        let at = u16::from_be_bytes([registers[crtc::CURSOR], registers[crtc::CURSOR + 1]]);
        let rows = u32::from(start & 0x1f)..=u32::from(end & 0x1f);
        (start & 0x20 == 0).then_some(Self { at: usize::from(at) * 4, rows })
    }
}
