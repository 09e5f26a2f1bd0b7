//! A viewer that sends anything at all, while the guest draws, changes its mode and its cursor.
#![no_main]

use std::sync::{Arc, Mutex};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use screens::vnc::Session;
use screens::{Cursor, Input as Plugged, Key, Picture, Point, Screen, Source};

#[derive(Arbitrary, Debug)]
enum Step {
    /// Bytes of the viewer's.
    Bytes(Vec<u8>),
    /// Whole messages: SetPixelFormat, SetEncodings, FramebufferUpdateRequest, SetDesktopSize.
    Format([u8; 13]),
    Encodings(Vec<i8>),
    Update(bool, [u16; 4]),
    Size(u16, u16),
    /// A pixel of another colour, a mode, a cursor.
    Pixel(u16, u32),
    Mode(u8, u8),
    Cursor(u8, u8),
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// 3.3, 3.7, 3.8, or none of them; the handshake is over then.
    version: u8,
    password: bool,
    steps: Vec<Step>,
}

#[derive(Default)]
struct Display(Mutex<(Picture, Option<Arc<Cursor>>)>);

impl Source for Display {
    fn draw(&self, picture: &mut Picture) {
        picture.clone_from(&self.0.lock().expect("nobody panicked").0);
    }

    fn cursor(&self) -> Option<Arc<Cursor>> {
        self.0.lock().expect("nobody panicked").1.clone()
    }

    fn resize(&self, width: u32, _: u32) -> bool {
        width % 2 == 0
    }
}

impl Plugged for Display {
    fn key(&self, _: Key, _: bool) -> bool {
        true
    }

    fn point(&self, point: Point) -> bool {
        assert!(point.x < point.size.0.max(1) && point.y < point.size.1.max(1), "{point:?}");
        true
    }
}

fn send(session: &mut Session, bytes: &[u8]) -> bool {
    let well = session.receive(bytes).is_ok();
    session.update();
    // All of a small screen, in every encoding.
    assert!(session.output().len() < 4 << 20);
    well
}

fn encodings(list: &[i8]) -> Vec<u8> {
    let mut bytes = vec![2, 0];
    bytes.extend((list.len() as u16).to_be_bytes());
    for n in list {
        // Those that we know, near them, and others: raw 0, zlib 6, ZRLE 16, cursor -239, sizes -223 and -308, keys -258.
        let n = match n {
            -1 => -239,
            -2 => -223,
            -3 => -308,
            -4 => -258,
            n => i32::from(*n),
        };
        bytes.extend(n.to_be_bytes());
    }
    bytes
}

fn step(session: &mut Session, display: &Display, step: Step) -> bool {
    let words = |kind: &[u8], words: &[u16]| -> Vec<u8> {
        [kind.to_vec(), words.iter().flat_map(|word| word.to_be_bytes()).collect()].concat()
    };
    match step {
        Step::Bytes(bytes) => return send(session, &bytes),
        Step::Format(format) => return send(session, &[&[0, 0, 0, 0][..], &format, &[0; 3]].concat()),
        Step::Encodings(list) => return send(session, &encodings(&list[..list.len().min(100)])),
        Step::Update(new, at) => return send(session, &words(&[3, new.into()], &at)),
        Step::Size(width, height) => {
            let screen = words(&[0; 8], &[width, height, 0, 0]);
            return send(session, &[words(&[251, 0], &[width, height, 0x100]), screen].concat());
        }
        Step::Pixel(at, colour) => {
            let picture = &mut display.0.lock().expect("nobody panicked").0;
            let (width, height) = picture.size();
            if width > 0 && height > 0 {
                let at = u32::from(at) % (width * height);
                picture.row_mut(at / width)[(at % width) as usize] = colour & 0xff_ffff;
            }
        }
        Step::Mode(width, height) => {
            display.0.lock().expect("nobody panicked").0.resize(width.into(), height.into());
        }
        Step::Cursor(width, height) => {
            let (width, height) = (u32::from(width % 65), u32::from(height % 65));
            let mut picture = Picture::default();
            picture.resize(width, height);
            picture.fill(0x80ff_ffff);
            let cursor = Cursor { picture, hot: (width / 2, height) };
            display.0.lock().expect("nobody panicked").1 = (width % 8 != 0).then(|| Arc::new(cursor));
        }
    }
    true
}

fuzz_target!(|input: Input| {
    let (screen, display) = (Screen::new(), Arc::new(Display::default()));
    let source: Arc<dyn Source> = display.clone();
    screen.show(Arc::downgrade(&source));
    let keyboard: Arc<dyn Plugged> = display.clone();
    screen.plug(Arc::downgrade(&keyboard));
    display.0.lock().expect("nobody panicked").0.resize(80, 70);
    let password = input.password.then_some(&b"secret"[..]);
    let mut session = Session::new(screen, "fuzz", password);
    let hello = [&b"RFB 003.003\n\x01"[..], b"RFB 003.007\n\x01\x01", b"RFB 003.008\n\x01\x01", b""];
    let mut well = send(&mut session, hello[usize::from(input.version & 3)]);
    for one in input.steps.into_iter().take(64) {
        if !well {
            break;
        }
        well = step(&mut session, &display, one);
    }
});
