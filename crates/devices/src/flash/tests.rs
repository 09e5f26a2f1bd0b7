use super::*;
use crate::testing::{batter, through_json};

const AT: Gpa = 0xffc0_0000;

fn chip(contents: Arc<Contents>) -> (memory::Memory, Arc<Flash>) {
    let (memory, [rom]) = memory::Memory::with_windows(1 << 20, 0, [contents.size()]).unwrap();
    (memory, Flash::new(contents, rom, AT))
}

fn write(flash: &Flash, offset: u64, values: &[u8]) {
    values.iter().for_each(|value| flash.write(offset, 1, (*value).into()));
}

#[test]
fn programming_clears_bits_and_erasing_sets_a_block() {
    let contents = Contents::in_memory(vec![0xff; 3 * 4096]);
    let (_memory, flash) = chip(contents.clone());
    write(&flash, 0x1001, &[0x10, 0x0f]);
    assert_eq!(flash.read(0, 1), u64::from(status::READY));
    write(&flash, 0x1001, &[0x40, 0x3c, 0xff]);
    assert_eq!(flash.read(0x1000, 4), 0xffff_0cff, "what both had");
    write(&flash, 0x1fff, &[0x20, 0x00]);
    assert_eq!(flash.read(0x1001, 1), u64::from(status::READY | status::SEQUENCE), "not confirmed");
    write(&flash, 0x1fff, &[0x50, 0x20, 0xd0, 0xff]);
    assert_eq!(flash.read(0x1000, 8), u64::MAX);
}

/// As OVMF looks for it: neither RAM nor ROM answers like this.
#[test]
fn it_is_told_from_ram_and_rom() {
    let (_memory, flash) = chip(Contents::in_memory(vec![0x5f; 4096]));
    write(&flash, 7, &[0x50]);
    assert_eq!(flash.read(7, 1), 0x5f);
    write(&flash, 7, &[0x70]);
    assert_eq!(flash.read(7, 1), 0);
    write(&flash, 7, &[0x98]);
    assert_eq!(flash.read(0x10, 2), u64::from(u16::from_le_bytes(*b"QR")));
}

#[test]
fn a_file_keeps_it() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8192).unwrap();
    let (_memory, flash) = chip(Contents::in_file(file.try_clone().unwrap()).unwrap());
    write(&flash, 4096, &[0x20, 0xd0, 0x10, 0xa5]);
    let state = flash.state();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0).unwrap();
    std::io::Seek::rewind(&mut &file).unwrap();
    let (_memory, again) = chip(Contents::in_file(file).unwrap());
    assert_eq!(again.read(0, 1), u64::from(b'x'));
    assert_eq!(again.read(4096, 2), 0xffa5);
    again.set_state(&through_json(&state));
    assert_eq!(again.read(4096, 1), u64::from(status::READY));
    let odd = tempfile::tempfile().unwrap();
    odd.set_len(4097).unwrap();
    assert!(Contents::in_file(odd).is_err());
}

#[test]
fn a_hostile_guest_is_bounded() {
    batter(&*chip(Contents::in_memory(vec![0; 2 * 4096])).1, 3 * 4096, 200_000, None);
}

#[test]
fn contents_are_rom_but_while_a_command_says_otherwise() {
    let (memory, flash) = chip(Contents::in_memory(vec![0x5f; 2 * 4096]));
    let seen = || memory.region(AT + 4097).map(|r| (r.kind, memory.load::<u8>(r.offset + 4097)));
    assert_eq!((seen(), memory.region(AT + 8192)), (Some((Kind::Rom, 0x5f)), None));
    for command in [0x70, 0x90, 0x98] {
        write(&flash, 0, &[command]);
        assert_eq!(seen(), None, "{command:x}");
        write(&flash, 0, &[0xff]);
        assert_eq!(seen(), Some((Kind::Rom, 0x5f)));
    }
    write(&flash, 4097, &[0x40]);
    assert!(seen().is_some(), "until the command is whole");
    write(&flash, 4097, &[0x0f]);
    let (state, programming) = (flash.state(), seen());
    write(&flash, 0, &[0xff]);
    assert_eq!((programming, seen()), (None, Some((Kind::Rom, 0x0f))));
    flash.set_state(&state);
    assert_eq!(seen(), None);
    write(&flash, 4096, &[0x20, 0xd0, 0xff]);
    assert_eq!(seen(), Some((Kind::Rom, 0xff)));
}
