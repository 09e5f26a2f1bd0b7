//! Ports by which a guest talks to whoever tests it: exit with a value, a console without a driver, progress codes.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex};

use machine::power::End;
use machine::{Power, Registers};
use serde::{Deserialize, Serialize};

use crate::{At, Saved, lock, write_bytes};

/// Ports of [`DebugExit`], as in QEMU's isa-debug-exit.
pub const EXIT: At = At::new(0xf4, 4);
/// The console of Bochs, which GRUB and many hobby kernels write to.
pub const BOCHS: At = At::new(0xe9, 1);
/// The console of SeaBIOS and OVMF.
pub const FIRMWARE: At = At::new(0x402, 1);
/// Where firmware tells how far it got; Linux writes there to pass the time.
pub const POST: At = At::new(0x80, 1);

/// Ends the machine with the value written ([`End::DebugExit`]).
#[derive(Debug)]
pub struct DebugExit(Power);

impl DebugExit {
    /// A port that switches `power` off.
    pub fn new(power: Power) -> Arc<Self> {
        Arc::new(Self(power))
    }
}

impl Registers for DebugExit {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }

    fn write(&self, _: u64, _: u8, value: u64) {
        self.0.request(End::DebugExit(value as u32));
    }
}

/// A console without a driver: every byte written is output. Whole lines are written at once.
pub struct DebugConsole(Mutex<Console>);

struct Console {
    line: Vec<u8>,
    out: Box<dyn Write + Send>,
}

/// Longest part of a line that is kept back.
const LINE: usize = 512;

impl fmt::Debug for DebugConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DebugConsole")
    }
}

impl DebugConsole {
    /// A console that writes to `out`; its errors are nobody's concern.
    pub fn new(out: Box<dyn Write + Send>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Console { line: Vec::with_capacity(LINE), out })))
    }
}

impl Console {
    fn flush(&mut self) {
        let _ = self.out.write_all(&self.line).and_then(|()| self.out.flush());
        self.line.clear();
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Registers for DebugConsole {
    /// By 0xe9 a guest sees that the console is there.
    fn read(&self, _: u64, _: u8) -> u64 {
        0xe9
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut console = lock(&self.0);
        write_bytes(offset, size, value, |_, byte| {
            console.line.push(byte);
            if byte == b'\n' || console.line.len() == LINE {
                console.flush();
            }
        });
    }
}

/// The POST code port: remembers the last byte.
#[derive(Debug, Default)]
pub struct Post(Mutex<State>);

/// What [`Post`] remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The last code.
    pub code: u8,
}

impl Post {
    /// A port.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The last code.
    pub fn state(&self) -> Saved<State> {
        Saved::V1(*lock(&self.0))
    }

    /// Goes on from `state`.
    pub fn set_state(&self, state: &Saved<State>) {
        let Saved::V1(state) = state;
        *lock(&self.0) = *state;
    }
}

impl Registers for Post {
    fn read(&self, _: u64, _: u8) -> u64 {
        lock(&self.0).code.into()
    }

    fn write(&self, _: u64, _: u8, value: u64) {
        lock(&self.0).code = value as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::batter;
    use std::sync::mpsc;

    struct Sink(mpsc::Sender<Vec<u8>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.send(bytes.to_vec()).unwrap();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn exit_ends_with_the_value() {
        let power = Power::default();
        DebugExit::new(power.clone()).write(0, 4, 0x1234_5678);
        assert_eq!(power.requested(), Some(End::DebugExit(0x1234_5678)));
    }

    #[test]
    fn console_writes_lines_and_the_rest_at_the_end() {
        let (tx, rx) = mpsc::channel();
        let console = DebugConsole::new(Box::new(Sink(tx)));
        assert_eq!(console.read(0, 1), 0xe9);
        for byte in *b"ab\nc" {
            console.write(0, 1, byte.into());
        }
        assert_eq!(rx.try_recv().unwrap(), b"ab\n");
        assert!(rx.try_recv().is_err());
        drop(console);
        assert_eq!(rx.try_recv().unwrap(), b"c");
    }

    #[test]
    fn a_hostile_guest_is_bounded() {
        batter(&*DebugConsole::new(Box::new(std::io::sink())), 1, 100_000, None);
        let post = Post::new();
        batter(&*post, 1, 10_000, None);
        let other = Post::new();
        other.set_state(&post.state());
        assert_eq!(other.read(0, 1), post.read(0, 1));
    }
}
