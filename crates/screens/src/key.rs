//! Keys, by the numbers of Linux's input events (`linux/input-event-codes.h`), and how other worlds call them.

/// A key of a PC's keyboard: Linux's event code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub u16);

/// A key that types a character, on a US keyboard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stroke {
    /// The key.
    pub key: Key,
    /// Whether together with shift.
    pub shift: bool,
}

/// Keys whose codes in scan code set 1 have a prefix of 0xe0, with these; all others up to 0x58 have their own number.
const EXTENDED: [(u16, u8); 29] = [
    (96, 0x1c),  // keypad enter
    (97, 0x1d),  // right control
    (98, 0x35),  // keypad /
    (99, 0x37),  // print screen
    (100, 0x38), // right alt
    (102, 0x47), // home
    (103, 0x48), // up
    (104, 0x49), // page up
    (105, 0x4b), // left
    (106, 0x4d), // right
    (107, 0x4f), // end
    (108, 0x50), // down
    (109, 0x51), // page down
    (110, 0x52), // insert
    (111, 0x53), // delete
    (113, 0x20), // mute
    (114, 0x2e), // volume down
    (115, 0x30), // volume up
    (116, 0x5e), // power
    (119, 0x46), // pause: as control-pause, which has a release
    (125, 0x5b), // left meta
    (126, 0x5c), // right meta
    (127, 0x5d), // menu
    (140, 0x21), // calculator
    (142, 0x5f), // sleep
    (143, 0x63), // wake up
    (163, 0x19), // next song
    (164, 0x22), // play, pause
    (165, 0x10), // previous song
];
/// Rows of a US keyboard: the first key's code, and what its keys type without and with shift.
const ROWS: [(u16, &str, &str); 5] = [
    (2, "1234567890-=", "!@#$%^&*()_+"),
    (16, "qwertyuiop[]", "QWERTYUIOP{}"),
    (30, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
    (43, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    (57, " ", ""),
];
/// Keys by name, with their keysyms (X11's `keysymdef.h`); for a name given twice, the first key is meant.
const NAMED: [(&str, u16, u32); 72] = [
    ("esc", 1, 0xff1b),
    ("backspace", 14, 0xff08),
    ("tab", 15, 0xff09),
    ("tab", 15, 0xfe20),
    ("enter", 28, 0xff0d),
    ("ctrl", 29, 0xffe3),
    ("shift", 42, 0xffe1),
    ("right-shift", 54, 0xffe2),
    ("alt", 56, 0xffe9),
    ("alt", 56, 0xffe7),
    ("caps-lock", 58, 0xffe5),
    ("num-lock", 69, 0xff7f),
    ("scroll-lock", 70, 0xff14),
    ("sysrq", 99, 0xff15),
    ("print", 99, 0xff61),
    ("pause", 119, 0xff13),
    ("right-ctrl", 97, 0xffe4),
    ("altgr", 100, 0xffea),
    ("altgr", 100, 0xfe03),
    ("altgr", 100, 0xff7e),
    ("altgr", 100, 0xffe8),
    ("home", 102, 0xff50),
    ("up", 103, 0xff52),
    ("pageup", 104, 0xff55),
    ("left", 105, 0xff51),
    ("right", 106, 0xff53),
    ("end", 107, 0xff57),
    ("down", 108, 0xff54),
    ("pagedown", 109, 0xff56),
    ("insert", 110, 0xff63),
    ("delete", 111, 0xffff),
    ("meta", 125, 0xffeb),
    ("right-meta", 126, 0xffec),
    ("menu", 127, 0xff67),
    ("space", 57, 0x20),
    ("less", 86, 0xffff_ffff),
    ("f1", 59, 0xffbe),
    ("f2", 60, 0xffbf),
    ("f3", 61, 0xffc0),
    ("f4", 62, 0xffc1),
    ("f5", 63, 0xffc2),
    ("f6", 64, 0xffc3),
    ("f7", 65, 0xffc4),
    ("f8", 66, 0xffc5),
    ("f9", 67, 0xffc6),
    ("f10", 68, 0xffc7),
    ("f11", 87, 0xffc8),
    ("f12", 88, 0xffc9),
    ("kp-enter", 96, 0xff8d),
    ("kp-multiply", 55, 0xffaa),
    ("kp-plus", 78, 0xffab),
    ("kp-minus", 74, 0xffad),
    ("kp-dot", 83, 0xffae),
    ("kp-dot", 83, 0xff9f),
    ("kp-slash", 98, 0xffaf),
    ("kp-0", 82, 0xffb0),
    ("kp-1", 79, 0xffb1),
    ("kp-2", 80, 0xffb2),
    ("kp-3", 81, 0xffb3),
    ("kp-4", 75, 0xffb4),
    ("kp-5", 76, 0xffb5),
    ("kp-6", 77, 0xffb6),
    ("kp-7", 71, 0xffb7),
    ("kp-8", 72, 0xffb8),
    ("kp-9", 73, 0xffb9),
    ("kp-7", 71, 0xff95),
    ("kp-8", 72, 0xff97),
    ("kp-4", 75, 0xff96),
    ("kp-6", 77, 0xff98),
    ("kp-1", 79, 0xff9c),
    ("kp-2", 80, 0xff99),
    ("kp-3", 81, 0xff9b),
];

impl Key {
    /// Left shift.
    pub const SHIFT: Self = Self(42);
    /// Enter.
    pub const ENTER: Self = Self(28);

    /// Its number in scan code set 1, where bit 7 stands for a prefix of 0xe0.
    pub fn xt(self) -> Option<u8> {
        match self.0 {
            1..=0x58 => Some(self.0 as u8),
            code => EXTENDED.iter().find(|(key, _)| *key == code).map(|(_, xt)| xt | 0x80),
        }
    }

    /// The key of a number as [`Key::xt`] gives it.
    pub fn from_xt(xt: u8) -> Option<Self> {
        match xt {
            1..=0x58 => Some(Self(xt.into())),
            xt if xt & 0x80 != 0 => {
                EXTENDED.iter().find(|(_, code)| *code == xt & 0x7f).map(|(key, _)| Self(*key))
            }
            _ => None,
        }
    }

    /// The key of a keysym, as RFB's key events have it. Where shift is to be held, the viewer says so itself.
    pub fn from_keysym(keysym: u32) -> Option<Self> {
        if let Some((_, code, _)) = NAMED.iter().find(|(_, _, known)| *known == keysym) {
            return Some(Self(*code));
        }
        char::from_u32(keysym).filter(char::is_ascii).and_then(Stroke::of).map(|stroke| stroke.key)
    }

    /// The key called so, in small letters: `enter`, `f1`, `delete`, `a`.
    pub fn named(name: &str) -> Option<Self> {
        if let Some((_, code, _)) = NAMED.iter().find(|(known, ..)| *known == name) {
            return Some(Self(*code));
        }
        let mut chars = name.chars();
        let only = chars.next().filter(|_| chars.next().is_none())?;
        Stroke::of(only).filter(|stroke| !stroke.shift).map(|stroke| stroke.key)
    }

    /// Keys to press together, such as `ctrl-alt-delete`.
    ///
    /// # Errors
    /// The name that no key has.
    pub fn chord(text: &str) -> Result<Vec<Self>, String> {
        let mut keys = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            // Names have hyphens of their own: the longest that fits is meant.
            let ends = rest.match_indices('-').map(|(at, _)| at).chain([rest.len()]).filter(|&at| at > 0);
            let found = ends.filter_map(|at| Some((at, Self::named(&rest[..at])?))).next_back();
            let (at, key) = found.ok_or_else(|| rest.to_owned())?;
            keys.push(key);
            rest = rest[at..].strip_prefix('-').unwrap_or(&rest[at..]);
        }
        if keys.is_empty() { Err(text.to_owned()) } else { Ok(keys) }
    }
}

impl Stroke {
    /// What types `c`: ASCII, tabs and ends of lines.
    pub fn of(c: char) -> Option<Self> {
        let code = |code| Some(Self { key: Key(code), shift: false });
        match c {
            '\n' | '\r' => return code(28),
            '\t' => return code(15),
            '\x1b' => return code(1),
            '\x08' | '\x7f' => return code(14),
            _ => {}
        }
        ROWS.iter().find_map(|(first, plain, shifted)| {
            let key = |row: &str| row.chars().position(|k| k == c).map(|n| Key(first + n as u16));
            key(plain)
                .map(|key| Self { key, shift: false })
                .or_else(|| key(shifted).map(|key| Self { key, shift: true }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ascii_character_has_a_stroke() {
        let mut seen = std::collections::HashSet::new();
        for c in ' '..='~' {
            let stroke = Stroke::of(c).unwrap_or_else(|| panic!("{c:?}"));
            assert!(seen.insert((stroke.key, stroke.shift)), "{c:?} has the stroke of another");
            assert_eq!(Key::from_keysym(c as u32), Some(stroke.key));
        }
        assert_eq!(Stroke::of('ä'), None);
    }

    #[test]
    fn names_numbers_and_keysyms() {
        assert_eq!(Key::chord("ctrl-alt-delete"), Ok(vec![Key(29), Key(56), Key(111)]));
        assert_eq!(Key::chord("right-ctrl-a"), Ok(vec![Key(97), Key(30)]));
        assert_eq!(Key::chord("-"), Ok(vec![Key(12)]));
        assert_eq!(Key::chord("ctrl-ä"), Err("ä".into()));
        assert!(Key::chord("").is_err());
        for code in 0..=0x2ff {
            if let Some(xt) = Key(code).xt() {
                assert_eq!(Key::from_xt(xt), Some(Key(code)));
            }
        }
        for (name, code, _) in NAMED {
            assert_eq!(Key::named(name), Some(Key(code)), "{name}");
            assert!(Key(code).xt().is_some(), "{name}");
        }
    }
}
