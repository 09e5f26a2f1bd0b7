//! Which host register holds which guest register while translated code runs.
//!
//! RSP is the frame, RSI and RDI are free for the rewriting (they need no REX prefix, so AH to BH can stand beside an
//! operand in memory). Of the sixteen guest registers three are in the frame; registers that instructions use without
//! naming them (RAX, RCX, RDX, RBX) are in themselves.

use iced_x86::Register;

use crate::frame::at;

/// Where a guest register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// In this host register.
    Host(u8),
    /// In the frame, at this offset.
    Frame(i32),
}

/// Guest registers that are in the frame.
pub const STOLEN: [u8; 3] = [10, 11, 15];

/// Where guest register `n` is.
#[inline]
pub fn seat(n: u8) -> Seat {
    match n & 15 {
        4 => Seat::Host(10),
        6 => Seat::Host(11),
        7 => Seat::Host(15),
        10 => Seat::Frame(at::STOLEN[0]),
        11 => Seat::Frame(at::STOLEN[1]),
        15 => Seat::Frame(at::STOLEN[2]),
        n => Seat::Host(n),
    }
}

/// Whether `r` is AH, CH, DH or BH.
pub fn is_high(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Number of a general-purpose register of any size.
pub fn number(r: Register) -> u8 {
    (r.full_register().number() & 15) as u8
}

/// The register of `size` bytes with a number.
pub fn register(number: u8, size: usize) -> Register {
    let first = match size {
        1 if number < 4 => Register::AL,
        // iced has AH to BH between BL and SPL.
        1 => Register::AH,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + u32::from(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_by_number_and_size() {
        assert_eq!(register(3, 1), Register::BL);
        assert_eq!(register(4, 1), Register::SPL);
        assert_eq!(register(15, 1), Register::R15L);
        assert_eq!(register(7, 2), Register::DI);
        assert_eq!(register(8, 4), Register::R8D);
        assert_eq!(register(10, 8), Register::R10);
    }
}
