//! The guest's console on this process' standard input and output.

use std::io::{IsTerminal, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::termios::{self, OptionalActions, Termios};

/// The escape key: Ctrl-].
const ESCAPE: u8 = 0x1d;

/// Told once at the start, when input is a terminal.
pub const HINT: &str = "Escape key: Ctrl-], then q ends the guest, p presses its power button, ? lists all.";
/// The same for those who only look in.
pub const LOOK_HINT: &str =
    "Escape key: Ctrl-], then q leaves the console (the guest runs on), p presses the power button.";
const KEYS: &str = "\r\nCtrl-] then:  q  end the guest at once (leave `lodge console`)\r\n              p  press its power button\r\n              \
                    Ctrl-]  send Ctrl-] to the guest\r\n";

/// What the escape key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// End the guest.
    Quit,
    /// Press the power button.
    PowerButton,
}

/// A terminal in raw mode, as it was before once dropped (or [`Raw::restore`]d).
#[derive(Clone)]
pub struct Raw(Arc<(Termios, AtomicBool)>);

impl Raw {
    /// Puts standard input into raw mode if it is a terminal.
    pub fn new() -> Option<Self> {
        let stdin = rustix::stdio::stdin();
        let before = std::io::stdin().is_terminal().then(|| termios::tcgetattr(stdin).ok())??;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(Arc::new((before, AtomicBool::new(true)))))
    }

    /// Puts the terminal back.
    pub fn restore(&self) {
        if self.0.1.swap(false, Ordering::SeqCst) {
            // Nothing to be done about a terminal that has gone away.
            let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0.0);
        }
    }
}

/// Tells the guest how large this terminal is, if it is one.
pub fn tell_size(console: &vm::Console) {
    if let Ok(size) = termios::tcgetwinsize(rustix::stdio::stdin()) {
        console.resize(size.ws_col, size.ws_row);
    }
}

/// Takes escape sequences out of what the user types.
#[derive(Debug, Default)]
pub struct Escapes {
    escaped: bool,
}

impl Escapes {
    /// Splits `typed` into what the guest gets and what was asked for.
    pub fn take(&mut self, typed: &[u8]) -> (Vec<u8>, Vec<Ask>) {
        let (mut guest, mut asks) = (Vec::with_capacity(typed.len()), Vec::new());
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (false, _) | (true, ESCAPE) => guest.push(byte),
                (true, b'q' | b'x') => asks.push(Ask::Quit),
                (true, b'p') => asks.push(Ask::PowerButton),
                (true, _) => eprint!("{KEYS}"),
            }
        }
        (guest, asks)
    }
}

/// Reads standard input for ever, handing bytes to `guest` and escapes to `ask`. With `tell_end` input that is no terminal
/// ends with Ctrl-D, so that a shell fed by a pipe ends.
pub fn pump(raw: bool, tell_end: bool, guest: impl Fn(&[u8]), ask: impl Fn(Ask)) {
    let mut stdin = std::io::stdin().lock();
    let mut buffer = [0; 4096];
    let mut escapes = Escapes::default();
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) if raw => {
                let (bytes, asks) = escapes.take(&buffer[..n]);
                guest(&bytes);
                asks.into_iter().for_each(&ask);
            }
            Ok(n) => guest(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    // A guest that does not listen yet loses the sign, so it is given again until the guest ends.
    if !raw && tell_end {
        loop {
            guest(&[0x04]);
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_leave_the_rest_alone() {
        let mut escapes = Escapes::default();
        assert_eq!(escapes.take(b"ls\r\x1d"), (b"ls\r".to_vec(), vec![]));
        assert_eq!(escapes.take(b"pdate"), (b"date".to_vec(), vec![Ask::PowerButton]));
        assert_eq!(escapes.take(b"\x1d\x1dq\x1dq"), (b"\x1dq".to_vec(), vec![Ask::Quit]));
    }
}
