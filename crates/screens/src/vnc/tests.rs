use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use flate2::{Decompress, FlushDecompress};

use super::*;
use crate::{Cursor, Input, Key, Picture, Point, Screen, Source, lock};

/// A display with noise, few colours and one colour, whose size can be set; it takes what is typed.
struct Guest {
    size: Mutex<(u32, u32)>,
    seed: Mutex<u32>,
    events: Mutex<Vec<(Key, bool)>>,
    points: Mutex<Vec<Point>>,
}

impl Source for Guest {
    fn draw(&self, picture: &mut Picture) {
        let (width, height) = *lock(&self.size);
        let seed = *lock(&self.seed);
        picture.resize(width, height);
        for y in 0..height {
            for (x, pixel) in picture.row_mut(y).iter_mut().enumerate() {
                let noise = (x as u32 * 31 + y * 97 + seed).wrapping_mul(0x9e37_79b9) >> 8;
                *pixel = match x / 64 {
                    0 => noise,
                    1 => [0, 0xffffff, 0x123456][noise as usize % 3],
                    2 => noise % 2 * 0xff,
                    3 => noise % 11 * 0x10101,
                    _ => 0x336699,
                };
            }
        }
    }

    fn cursor(&self) -> Option<Arc<Cursor>> {
        let mut picture = Picture::default();
        picture.resize(9, 2);
        picture.row_mut(1)[8] = 0xff00_00ff;
        Some(Arc::new(Cursor { picture, hot: (1, 1) }))
    }

    fn resize(&self, width: u32, height: u32) -> bool {
        *lock(&self.size) = (width.min(512), height.min(512));
        true
    }
}

impl Input for Guest {
    fn key(&self, key: Key, down: bool) -> bool {
        lock(&self.events).push((key, down));
        true
    }

    fn point(&self, point: Point) -> bool {
        lock(&self.points).push(point);
        true
    }
}

fn guest() -> (Arc<Screen>, Arc<Guest>) {
    let guest = Arc::new(Guest {
        size: Mutex::new((330, 70)),
        seed: Mutex::new(1),
        events: Mutex::default(),
        points: Mutex::default(),
    });
    let screen = Screen::new();
    let (source, input): (Arc<dyn Source>, Arc<dyn Input>) = (guest.clone(), guest.clone());
    screen.show(Arc::downgrade(&source));
    screen.plug(Arc::downgrade(&input));
    (screen, guest)
}

/// What a viewer has seen; reads updates.
struct Viewer {
    streams: [Decompress; 2],
    picture: Picture,
    cursor: Option<Vec<u8>>,
    keys: bool,
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take(&mut self, n: usize) -> Vec<u8> {
        let (head, rest) = self.0.split_at(n);
        self.0 = rest;
        head.to_vec()
    }

    fn word(&mut self) -> u32 {
        self.take(2).iter().fold(0, |v, b| v << 8 | u32::from(*b))
    }

    fn long(&mut self) -> u32 {
        self.word() << 16 | self.word()
    }
}

impl Viewer {
    fn new(size: (u32, u32)) -> Self {
        let mut picture = Picture::default();
        picture.resize(size.0, size.1);
        Self { streams: [Decompress::new(true), Decompress::new(true)], picture, cursor: None, keys: false }
    }

    fn inflate(&mut self, stream: usize, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 << 20);
        self.streams[stream].decompress_vec(bytes, &mut out, FlushDecompress::Sync).unwrap();
        out
    }

    /// Reads updates in our own format, with the numbers of their rectangles' encodings.
    fn read(&mut self, bytes: &[u8]) -> Vec<i32> {
        let mut bytes = Bytes(bytes);
        let mut seen = Vec::new();
        while !bytes.0.is_empty() {
            assert_eq!(bytes.word(), 0);
            for _ in 0..bytes.word() {
                let [x, y, width, height] = std::array::from_fn(|_| bytes.word());
                let encoding = bytes.long() as i32;
                seen.push(encoding);
                match encoding {
                    encoding::RAW => {
                        let pixels = bytes.take((width * height * 4) as usize);
                        self.paint(x, y, width, &pixels, 4);
                    }
                    encoding::ZLIB => {
                        let length = bytes.long() as usize;
                        let pixels = self.inflate(0, &bytes.take(length));
                        self.paint(x, y, width, &pixels, 4);
                    }
                    encoding::ZRLE => {
                        let length = bytes.long() as usize;
                        let tiles = self.inflate(1, &bytes.take(length));
                        self.tiles(x, y, width, height, &tiles);
                    }
                    encoding::CURSOR => {
                        let length = width * height * 4 + width.div_ceil(8) * height;
                        self.cursor = Some(bytes.take(length as usize));
                    }
                    encoding::QEMU_KEY => self.keys = true,
                    encoding::EXTENDED_DESKTOP_SIZE => {
                        assert_eq!(bytes.take(4), [1, 0, 0, 0]);
                        bytes.take(16);
                        self.picture.resize(width, height);
                    }
                    other => panic!("encoding {other}"),
                }
            }
        }
        seen
    }

    fn paint(&mut self, x: u32, y: u32, width: u32, bytes: &[u8], size: usize) {
        for (n, pixel) in bytes.chunks_exact(size).enumerate() {
            let (column, row) = (n as u32 % width, n as u32 / width);
            self.picture.row_mut(y + row)[(x + column) as usize] =
                u32::from_le_bytes([pixel[0], pixel[1], pixel[2], 0]);
        }
    }

    fn tiles(&mut self, x: u32, y: u32, width: u32, height: u32, tiles: &[u8]) {
        let mut bytes = Bytes(tiles);
        for ty in (0..height).step_by(64) {
            for tx in (0..width).step_by(64) {
                let (w, h) = ((width - tx).min(64), (height - ty).min(64));
                let colours = usize::from(bytes.take(1)[0]);
                let pixels = if colours == 0 {
                    bytes.take((w * h * 3) as usize)
                } else {
                    let palette: Vec<Vec<u8>> = (0..colours).map(|_| bytes.take(3)).collect();
                    let bits = [0, 0, 1, 2, 2].get(colours).copied().unwrap_or(4);
                    let mut pixels = Vec::new();
                    for _ in 0..h {
                        let row = bytes.take((w as usize * bits).div_ceil(8));
                        for n in 0..w as usize {
                            let index = match bits {
                                0 => 0,
                                _ => row[n * bits / 8] >> (8 - bits - n * bits % 8) & ((1 << bits) - 1),
                            };
                            pixels.extend(&palette[usize::from(index)]);
                        }
                    }
                    pixels
                };
                self.paint(x + tx, y + ty, w, &pixels, 3);
            }
        }
        assert!(bytes.0.is_empty(), "no more in the rectangle");
    }
}

fn encodings(list: &[i32]) -> Vec<u8> {
    let mut message = vec![2, 0];
    message.extend((list.len() as u16).to_be_bytes());
    list.iter().for_each(|n| message.extend(n.to_be_bytes()));
    message
}

fn ask(changes: bool) -> [u8; 10] {
    [3, changes.into(), 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]
}

/// A session that runs, and the size that it told.
fn running(screen: &Arc<Screen>) -> (Session, (u32, u32)) {
    let mut session = Session::new(screen.clone(), "test", None);
    assert_eq!(session.output(), b"RFB 003.008\n");
    session.receive(b"RFB 003.008\n\x01\x01").unwrap();
    let hello = session.output();
    assert_eq!(hello[..6], [1, 1, 0, 0, 0, 0]);
    assert_eq!(hello[26..], *b"\0\0\0\x04test");
    assert!(session.running());
    let size = |at| u32::from(u16::from_be_bytes([hello[at], hello[at + 1]]));
    (session, (size(6), size(8)))
}

/// Time goes on until the screen may be drawn again.
fn wait() {
    std::thread::sleep(std::time::Duration::from_millis(20));
}

#[test]
fn every_encoding_shows_the_same() {
    let (screen, guest) = guest();
    for chosen in [encoding::RAW, encoding::ZLIB, encoding::ZRLE] {
        *lock(&guest.size) = (330, 70);
        wait();
        let (mut session, size) = running(&screen);
        let mut viewer = Viewer::new(size);
        let known = [7, chosen, encoding::CURSOR, encoding::QEMU_KEY, encoding::EXTENDED_DESKTOP_SIZE];
        session.receive(&encodings(&known)).unwrap();
        session.receive(&ask(false)).unwrap();
        session.update();
        viewer.read(&session.output());
        assert!(viewer.picture == screen.picture() && viewer.keys);
        let cursor = viewer.cursor.take().unwrap();
        assert_eq!((cursor[17 * 4], &cursor[18 * 4..]), (0xff, &[0, 0, 0, 0x80][..]), "one pixel of it");
        // Nothing new: nothing is sent, until something is.
        session.receive(&ask(true)).unwrap();
        session.update();
        assert_eq!(session.output(), []);
        for _ in 0..5 {
            *lock(&guest.seed) += 1;
            wait();
            session.update();
            assert!(viewer.read(&session.output()).contains(&chosen));
            assert!(viewer.picture == screen.picture(), "encoding {chosen}");
            session.receive(&ask(true)).unwrap();
        }
        // Another size, by the viewer's wish.
        session.receive(&[251, 0, 0x01, 0x00, 0x00, 0x90, 1, 0]).unwrap();
        session.receive(&[0; 16]).unwrap();
        wait();
        session.update();
        assert_eq!(viewer.read(&session.output()), [encoding::EXTENDED_DESKTOP_SIZE]);
        assert_eq!(viewer.picture.size(), (256, 144));
        session.receive(&ask(true)).unwrap();
        session.update();
        viewer.read(&session.output());
        assert!(viewer.picture == screen.picture());
    }
}

#[test]
fn pixels_in_other_formats() {
    let (screen, _guest) = guest();
    let (mut session, _) = running(&screen);
    // 16 bits, 5-6-5, big-endian.
    let format = [16, 16, 1, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0, 0, 0, 0];
    session.receive(&[&[0, 0, 0, 0][..], &format].concat()).unwrap();
    session.receive(&ask(false)).unwrap();
    session.update();
    let update = session.output();
    // The first rectangle is as wide as the screen, and ends in 0x336699.
    let at = 4 + 12 + 2 * 329;
    let [r, g, b] = [(0x33, 31), (0x66, 63), (0x99, 31)].map(|(part, max)| (part * max + 127) / 255);
    let expected = r << 11 | g << 5 | b;
    assert_eq!(u16::from_be_bytes([update[at], update[at + 1]]), expected as u16);
    // A colour map is refused.
    let map = [8, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(session.receive(&[&[0, 0, 0, 0][..], &map].concat()), Err(Gone::Format));
}

#[test]
fn what_is_typed_arrives_and_is_let_go() {
    let (screen, guest) = guest();
    let (mut session, _) = running(&screen);
    // By keysym, and by number; messages in pieces.
    for byte in [4, 1, 0, 0, 0, 0, 0, b'a', 4, 0, 0, 0, 0, 0, 0, b'a'] {
        session.receive(&[byte]).unwrap();
    }
    session.receive(&[255, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 0, 0, 0xd3]).unwrap();
    session.receive(&[5, 4, 0xff, 0xff, 0, 7]).unwrap();
    // The clipboard, and a key that there is not.
    session.receive(&[6, 0, 0, 0, 0, 0, 0, 2, b'h', b'i', 4, 1, 0, 0, 1, 0, 0, 0]).unwrap();
    drop(session);
    let (a, delete) = (Key(30), Key(111));
    assert_eq!(*lock(&guest.events), [(a, true), (a, false), (delete, true), (delete, false)]);
    assert_eq!(*lock(&guest.points), [Point { x: 329, y: 7, size: (330, 70), buttons: 4 }]);
}

#[test]
fn a_password_opens() {
    for version in [3, 7, 8] {
        for (password, opens) in [(&b"secret12"[..], true), (b"secret", false)] {
            let mut session = Session::new(Screen::new(), "x", Some(b"secret1234"));
            session.output();
            session.receive(format!("RFB 003.00{version}\n").as_bytes()).unwrap();
            let mut offered = session.output();
            if version == 3 {
                assert_eq!(offered[..4], [0, 0, 0, 2]);
                offered = offered.split_off(4);
            } else {
                assert_eq!(offered, [1, 2]);
                session.receive(&[2]).unwrap();
                offered = session.output();
            }
            let challenge: [u8; 16] = offered.try_into().unwrap();
            let answer = session::encrypt(password, &challenge);
            let got = session.receive(&answer);
            let told = session.output();
            assert_eq!(got, if opens { Ok(()) } else { Err(Gone::Password) });
            assert_eq!(told[..4], [0, 0, 0, u8::from(!opens)]);
            assert!(opens || version < 8 || told.ends_with(b"wrong"));
        }
    }
    // What others compute: the example of a DES test vector, whose key has its bits turned round.
    let key = [0x13, 0x34, 0x57, 0x79, 0x9b, 0xbc, 0xdf, 0xf1u8].map(u8::reverse_bits);
    let block = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef];
    let twice: [u8; 16] = [block, block].concat().try_into().unwrap();
    assert_eq!(session::encrypt(&key, &twice)[..8], [0x85, 0xe8, 0x13, 0x54, 0x0f, 0x0a, 0xb4, 0x05]);
    // Nobody gets round it by asking for no security.
    let mut session = Session::new(Screen::new(), "x", Some(b"secret"));
    assert_eq!(session.receive(b"RFB 003.008\n\x01\x01"), Err(Gone::Nonsense));
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n
    }
}

#[test]
fn hostile_viewers_are_bounded() {
    let seed = std::env::var("LODGE_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(1, |d| d.as_nanos() as u64) | 1);
    println!("LODGE_SEED={seed}");
    let mut random = Random(seed);
    let (screen, guest) = guest();
    let seeds: [&[u8]; 7] = [
        &[0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0],
        &[2, 0, 0, 2, 0, 0, 0, 16, 0xff, 0xff, 0xff, 0x11],
        &[3, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        &[4, 1, 0, 0, 0, 0, 0, 97],
        &[5, 1, 0, 10, 0, 10],
        &[6, 0, 0, 0, 0, 0, 0, 1, 65],
        &[251, 0, 0, 99, 0, 99, 0, 0],
    ];
    for _ in 0..300 {
        let (mut session, _) = running(&screen);
        for _ in 0..40 {
            let mut message = seeds[random.below(seeds.len() as u64) as usize].to_vec();
            if random.below(3) == 0 {
                let at = random.below(message.len() as u64) as usize;
                message[at] = random.below(256) as u8;
            }
            if session.receive(&message).is_err() {
                break;
            }
            if random.below(8) == 0 {
                *lock(&guest.size) = (1 + random.below(200) as u32, 1 + random.below(90) as u32);
            }
            session.update();
            assert!(session.output().len() < 1 << 20);
        }
    }
    // More than a message may have, in a message that never ends.
    let (mut session, _) = running(&screen);
    session.receive(&[6, 0, 0, 0, 0, 0x0f, 0xff, 0x00]).unwrap();
    let sent = (0..).take_while(|_| session.receive(&[0; 4096]).is_ok()).take(1000).count();
    assert!(sent < 1000);
    assert_eq!(running(&screen).0.receive(&[6, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), Err(Gone::Nonsense));
    assert_eq!(running(&screen).0.receive(&[99]), Err(Gone::Nonsense));
}

fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn viewers_and_browsers_connect_at_once() {
    let (screen, _guest) = guest();
    let at = Address::Tcp(std::net::Ipv4Addr::LOCALHOST.into(), Some(0));
    let server = Server::start(&at, screen, "two", None).unwrap();
    let mut plain = TcpStream::connect(server.to_string()).unwrap();
    plain.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    assert_eq!(read(&mut plain, 12), b"RFB 003.008\n");
    let (mut web, answer) = tungstenite::connect(format!("ws://{server}/")).unwrap();
    assert_eq!(answer.status(), 101);
    assert_eq!(web.read().unwrap().into_data(), &b"RFB 003.008\n"[..]);
    web.send(tungstenite::Message::binary(&b"RFB 003.008\n"[..])).unwrap();
    assert_eq!(web.read().unwrap().into_data(), &[1u8, 1][..]);
    plain.write_all(b"RFB 003.003\n").unwrap();
    assert_eq!(read(&mut plain, 4), [0, 0, 0, 1]);
    plain.write_all(&[1]).unwrap();
    assert_eq!(read(&mut plain, 24 + 3).len(), 27);
    plain.write_all(&ask(false)).unwrap();
    assert_eq!(read(&mut plain, 2), [0, 0]);
    // A page from elsewhere.
    let request = "GET / HTTP/1.1\r\nHost: x\r\nOrigin: https://evil.example\r\nUpgrade: websocket\r\n\
                   Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let mut evil = TcpStream::connect(server.to_string()).unwrap();
    evil.write_all(request.as_bytes()).unwrap();
    assert_eq!(read(&mut evil, 12), b"HTTP/1.1 403");
    drop(server);
    // All are sent away: what was on its way comes, then the end.
    let mut rest = Vec::new();
    let _ = plain.read_to_end(&mut rest);
}
