//! What is on a guest's screen: pictures, the text in them, and a viewer of VNC.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use flate2::{Decompress, FlushDecompress};

/// What stands for a character that is not in the font.
const UNKNOWN: char = '\u{fffd}';

/// A picture: 0x00RRGGBB, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels of a row.
    pub width: usize,
    /// All pixels.
    pub pixels: Vec<u32>,
}

impl Picture {
    /// Reads a PNG file.
    pub fn read(path: &Path) -> Self {
        let file = std::io::BufReader::new(std::fs::File::open(path).expect("there is a picture"));
        let mut reader = png::Decoder::new(file).read_info().expect("it is a PNG");
        let mut bytes = vec![0; reader.output_buffer_size().expect("it has a size")];
        let info = reader.next_frame(&mut bytes).expect("it has pixels");
        assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
        let pixels = bytes.chunks_exact(3).map(|p| u32::from_be_bytes([0, p[0], p[1], p[2]])).collect();
        Self { width: info.width as usize, pixels }
    }

    /// Width and height.
    pub fn size(&self) -> (usize, usize) {
        (self.width, self.pixels.len() / self.width)
    }

    /// Whether it is of a size that [`Picture::text`] reads.
    pub fn has_text(&self) -> bool {
        matches!(self.size(), (720, 400) | (640, 400 | 480))
    }

    /// The text on a screen of 80 by 25 characters of 9 by 16 pixels, or of 8 by 16 in its middle, read with the font of the
    /// VGA BIOS. What is no printable character is a space.
    pub fn text(&self) -> String {
        self.lines().iter().map(|line| line.replace(UNKNOWN, " ").trim_end().to_owned() + "\n").collect()
    }

    /// Whether a line has this text, as far as its font is that of the VGA BIOS: at least two thirds of it.
    pub fn shows(&self, what: &str) -> bool {
        let what: Vec<char> = what.chars().collect();
        let is_it = |window: &[char]| {
            let known = window.iter().filter(|c| **c != UNKNOWN).count();
            known * 3 >= what.len() * 2 && window.iter().zip(&what).all(|(c, w)| c == w || *c == UNKNOWN)
        };
        self.lines().iter().any(|line| line.chars().collect::<Vec<_>>().windows(what.len()).any(is_it))
    }

    fn lines(&self) -> Vec<String> {
        assert!(self.has_text(), "80 by 25 characters, not {:?} pixels", self.size());
        let font = font();
        let line = |line| (0..80).map(|column| self.character(&font, column, line)).collect();
        (0..25).map(line).collect()
    }

    fn character(&self, font: &HashMap<[u8; 16], char>, column: usize, line: usize) -> char {
        let top = (self.size().1 - 400) / 2;
        let at = (top + line * 16) * self.width + column * (self.width / 80);
        // Nothing that is read here touches the upper left corner.
        let back = self.pixels[at];
        let glyph: [u8; 16] = std::array::from_fn(|y| {
            let pixels = &self.pixels[at + y * self.width..][..8];
            pixels.iter().enumerate().fold(0, |bits, (x, p)| bits | if *p != back { 0x80 >> x } else { 0 })
        });
        if glyph == [0; 16] { ' ' } else { font.get(&glyph).copied().unwrap_or(UNKNOWN) }
    }
}

/// Glyphs of 8 by 16 pixels, from the VGA BIOS: it has them all behind each other, and the second is a face.
fn font() -> HashMap<[u8; 16], char> {
    const FACE: [u8; 12] = [0, 0, 0x7e, 0x81, 0xa5, 0x81, 0x81, 0xbd, 0x99, 0x81, 0x81, 0x7e];
    let files = images::firmware(&images::Options::default(), images::Firmware::Bios, &mut images::Silent);
    let rom = std::fs::read(files.expect("SeaBIOS").vga.expect("its VGA BIOS")).expect("it can be read");
    let face = rom.windows(12).position(|bytes| bytes == FACE).expect("a font of 16 rows");
    let glyphs = rom[face - 16..].chunks_exact(16).map(|rows| <[u8; 16]>::try_from(rows).expect("16 rows"));
    glyphs.zip(0..128u8).filter(|(_, c)| (b'!'..=b'~').contains(c)).map(|(g, c)| (g, c.into())).collect()
}

/// A viewer of VNC that sees the screen in one encoding.
pub struct Viewer {
    stream: UnixStream,
    zlib: Decompress,
    /// What it has seen.
    pub picture: Picture,
    /// The guest's cursor, if that is left to the viewer.
    pub cursor: Option<Cursor>,
}

/// A mouse cursor.
#[derive(Debug)]
pub struct Cursor {
    /// Its pixels.
    pub picture: Picture,
    /// A bit for each pixel that is to be seen, rows of whole bytes, first pixel uppermost.
    pub mask: Vec<u8>,
    /// The pixel that points.
    pub hot: (usize, usize),
}

/// Pixels as this viewer gets them: four bytes, blue first.
fn picture(width: usize, bytes: &[u8]) -> Picture {
    let pixels = bytes.chunks_exact(4).map(|p| u32::from_le_bytes([p[0], p[1], p[2], 0])).collect();
    Picture { width, pixels }
}

/// Pixels one by one.
pub const RAW: i32 = 0;
/// The same, compressed.
pub const ZLIB: i32 = 6;

impl Viewer {
    /// Connects to the server at `path`, without a password.
    pub fn connect(path: &Path, encoding: i32) -> Self {
        let stream = UnixStream::connect(path).expect("the server listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
        let picture = Picture { width: 1, pixels: vec![0] };
        let mut this = Self { stream, zlib: Decompress::new(true), picture, cursor: None };
        assert_eq!(this.take(12), b"RFB 003.008\n");
        this.send(b"RFB 003.008\n");
        assert_eq!(this.take(2), [1, 1], "no password");
        this.send(&[1]);
        assert_eq!(this.take(4), [0; 4]);
        this.send(&[1]);
        let (width, height) = (this.word() as usize, this.word() as usize);
        this.picture = Picture { width, pixels: vec![0; width * height] };
        assert_eq!(this.take(16)[..4], [32, 24, 0, 1]);
        let name = this.word() << 16 | this.word();
        this.take(name as usize);
        // It understands another size of the screen, and cursors.
        let list: Vec<u8> = [encoding, -223, -239].iter().flat_map(|n| n.to_be_bytes()).collect();
        this.send(&[&[2, 0, 0, 3][..], &list].concat());
        this
    }

    /// Asks for all of the screen, and reads what comes.
    pub fn look(&mut self) -> &Picture {
        loop {
            let resized = self.update();
            if !resized {
                return &self.picture;
            }
        }
    }

    /// A key of a keysym goes down and up.
    pub fn press(&mut self, keysym: u32) {
        for down in [1, 0] {
            self.send(&[&[4, down, 0, 0][..], &keysym.to_be_bytes()].concat());
        }
    }

    /// The mouse is at `x` and `y`, with these buttons down: from bit 0 left, middle, right, wheel up, wheel down.
    pub fn point(&mut self, x: u16, y: u16, buttons: u8) {
        let [x, y] = [x, y].map(u16::to_be_bytes);
        self.send(&[&[5, buttons][..], &x, &y].concat());
    }

    /// Asks for a screen of this size.
    pub fn resize(&mut self, width: u16, height: u16) {
        // SetDesktopSize, with one screen: number, place, size, flags.
        let [w, h] = [width, height].map(u16::to_be_bytes);
        let message = [&[251, 0][..], &w, &h, &[1, 0], &[0; 8], &w, &h, &[0; 4]].concat();
        self.send(&message);
    }

    fn update(&mut self) -> bool {
        self.send(&[3, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(self.word(), 0, "an update");
        let mut resized = false;
        for _ in 0..self.word() {
            let [x, y, width, height] = std::array::from_fn(|_| self.word() as usize);
            let encoding = (self.word() << 16 | self.word()) as i32;
            let bytes = match encoding {
                RAW => self.take(width * height * 4),
                ZLIB => {
                    let length = self.word() << 16 | self.word();
                    let compressed = self.take(length as usize);
                    let mut out = Vec::with_capacity(width * height * 4 + 64);
                    self.zlib.decompress_vec(&compressed, &mut out, FlushDecompress::Sync).expect("zlib");
                    out
                }
                -223 => {
                    self.picture = Picture { width, pixels: vec![0; width * height] };
                    resized = true;
                    continue;
                }
                -239 => {
                    let bytes = self.take(width * height * 4);
                    let mask = self.take(width.div_ceil(8) * height);
                    self.cursor = Some(Cursor { picture: picture(width, &bytes), mask, hot: (x, y) });
                    continue;
                }
                other => panic!("encoding {other} was not asked for"),
            };
            for (row, from) in picture(width, &bytes).pixels.chunks_exact(width).enumerate() {
                self.picture.pixels[(y + row) * self.picture.width + x..][..width].copy_from_slice(from);
            }
        }
        resized
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server reads");
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    fn word(&mut self) -> u32 {
        let bytes = self.take(2);
        u32::from(bytes[0]) << 8 | u32::from(bytes[1])
    }
}
