//! The legacy window: video memory by its four planes.

use super::registers::{graphics, sequencer};
use super::{MEMORY, Now, Video};

/// How the window's bytes are those of memory.
enum Way {
    /// One to one.
    Chained(usize),
    /// Even bytes are of plane 0 or 2, odd ones of plane 1 or 3.
    OddEven(usize),
    /// All four planes at once: the first of four bytes.
    Planar(usize),
}

/// Where byte `at` of the window is; nowhere if the window is set to show less.
fn way(state: &Now, at: usize) -> Option<Way> {
    let registers = &state.legacy.graphics.1;
    let at = match registers[graphics::MISC] >> 2 & 3 {
        0 => at,
        1 if at < 0x1_0000 => at + state.legacy.bank as usize,
        2 if (0x1_0000..0x1_8000).contains(&at) => at - 0x1_0000,
        3 if at >= 0x1_8000 => at - 0x1_8000,
        _ => return None,
    };
    let way = if state.legacy.sequencer.1[sequencer::MEMORY_MODE] & sequencer::CHAIN_4 != 0 {
        Way::Chained(at)
    } else if registers[graphics::MODE] & 0x10 != 0 {
        let plane = usize::from(registers[graphics::READ_MAP] & 2) | at & 1;
        Way::OddEven((at & !1) << 1 | plane)
    } else {
        Way::Planar(at << 2)
    };
    let (Way::Chained(first) | Way::OddEven(first) | Way::Planar(first)) = way;
    (first + 3 < MEMORY).then_some(way)
}

/// Reads a byte of the window.
pub fn read(state: &mut Now, memory: &Video, at: usize) -> u8 {
    let Some(way) = way(state, at) else { return 0xff };
    let first = match way {
        Way::Chained(at) | Way::OddEven(at) => {
            let mut byte = [0];
            memory.read(at as u64, &mut byte);
            return byte[0];
        }
        Way::Planar(first) => first,
    };
    memory.read(first as u64, &mut state.legacy.latch);
    let registers = &state.legacy.graphics.1;
    if registers[graphics::MODE] & 8 == 0 {
        return state.legacy.latch[usize::from(registers[graphics::READ_MAP] & 3)];
    }
    // Read mode 1: which pixels have the colour that is compared with.
    let differs = (0..4).fold(0, |differs, plane| {
        let care = spread(registers[graphics::DONT_CARE], plane);
        differs | (state.legacy.latch[plane] ^ spread(registers[graphics::COMPARE], plane)) & care
    });
    !differs
}

/// Writes a byte of the window.
pub fn write(state: &mut Now, memory: &Video, at: usize, value: u8) {
    let Some(way) = way(state, at) else { return };
    let mask = state.legacy.sequencer.1[sequencer::MAP_MASK];
    match way {
        Way::Chained(at) | Way::OddEven(at) => {
            if mask & 1 << (at & 3) != 0 {
                memory.write(at as u64, &[value]);
            }
        }
        Way::Planar(first) => {
            for plane in (0..4).filter(|plane| mask & 1 << plane != 0) {
                memory.write((first + plane) as u64, &[combined(state, plane, value)]);
            }
        }
    }
}

/// Bit `plane` of `bits` in all eight bits.
fn spread(bits: u8, plane: usize) -> u8 {
    if bits & 1 << plane != 0 { 0xff } else { 0 }
}

/// What a write of `value` puts into a plane.
fn combined(state: &Now, plane: usize, value: u8) -> u8 {
    let registers = &state.legacy.graphics.1;
    let latch = state.legacy.latch[plane];
    let rotated = value.rotate_right(u32::from(registers[graphics::ROTATE] & 7));
    let mask = registers[graphics::BIT_MASK];
    let set = spread(registers[graphics::SET_RESET], plane);
    let (value, mask) = match registers[graphics::MODE] & 3 {
        0 if spread(registers[graphics::SET_RESET_ENABLE], plane) != 0 => (set, mask),
        0 => (rotated, mask),
        1 => return latch,
        2 => (spread(value, plane), mask),
        _ => (set, mask & rotated),
    };
    let value = match registers[graphics::ROTATE] >> 3 & 3 {
        0 => value,
        1 => value & latch,
        2 => value | latch,
        _ => value ^ latch,
    };
    value & mask | latch & !mask
}
