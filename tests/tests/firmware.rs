//! Firmware: SeaBIOS and OVMF start GRUB from disks, and GRUB a stock kernel; again after a reset.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use images::{Options, Silent, Source};
use lodge_tests::bootable::{self, ENTRY, Kind};
use lodge_tests::{Done, Scratch, lodge, start_with};

const PATIENCE: Duration = Duration::from_secs(300);

fn run(scratch: &Scratch, disk: &Path, args: &[&str]) -> Done {
    let mut command = Command::new(lodge());
    command.env("LODGE_DATA_DIR", scratch.path()).arg("run").arg(disk).args(args);
    start_with(&mut command, "").wait(PATIENCE).expect(0)
}

/// How often `what` is in it.
fn count(done: &Done, what: &str) -> usize {
    done.text().matches(what).count()
}

#[test]
fn seabios_starts_grub_and_that_a_kernel_and_again_after_a_reset() {
    let scratch = Scratch::new("bios");
    // Sector 1000 is in nobody's way: between GRUB and the partition.
    let script = "grep -q Lodge /sys/class/dmi/id/sys_vendor && ls /sys/firmware/acpi/tables\n\
                  [ -e /sys/firmware/efi ] && echo 'this is UEFI'\n\
                  if dd if=/dev/vda skip=1000 count=1 2>/dev/null | grep -q before; then echo found it; exit; fi\n\
                  echo before | dd of=/dev/vda seek=1000 conv=fsync 2>/dev/null\n\
                  reboot -f\n";
    let Some(disk) = bootable::disk(&scratch, Kind::Bios, script, &[]) else { return };
    let done = run(&scratch, &disk, &[]);
    for (what, times) in [
        ("SeaBIOS (version", 2),
        ("Welcome to GRUB", 2),
        ("Lodge: Linux", 2),
        ("found it", 1),
        ("MCFG", 2),
        ("this is UEFI", 0),
    ] {
        assert_eq!(count(&done, what), times, "{what}: {}", done.out);
    }
    assert!(done.text().contains(ENTRY), "the menu is on the serial port: {}", done.out);
}

#[test]
fn ovmf_starts_grub_and_its_variables_outlive_resets_and_power_offs() {
    let Ok(kernel) = Source::new(&Options::default())
        .and_then(|mut source| source.files(&["linux-image-cloud-amd64"], &["*/efivarfs.ko*"], &mut Silent))
    else {
        println!("skipped: no kernel in the archive");
        return;
    };
    let module = kernel.files[0].module().unwrap();
    let scratch = Scratch::new("uefi");
    // One variable at each start: the first resets, the others power off.
    let script = "insmod /lib/extra/efivarfs.ko; cd /sys/firmware/efi/efivars || exit 1\n\
                  mount -t efivarfs efivarfs .; cd .\n\
                  for n in 1 2 3; do\n\
                  v=Lodge$n-0b8d1f5c-52a4-4a3c-9b1e-6a1d3f0c2e47\n\
                  if [ -e $v ]; then echo \"kept $n: $(dd if=$v bs=1 skip=4 2>/dev/null)\"; continue; fi\n\
                  printf '\\007\\000\\000\\000start%s' $n >$v && echo made $n\n\
                  [ $n = 1 ] && reboot -f; exit; done\n";
    let Some(raw) = bootable::disk(&scratch, Kind::Uefi, script, &[("efivarfs.ko", module)]) else { return };
    // By way of a qcow2 image.
    let bytes = std::fs::read(raw).unwrap();
    let path = scratch.path().join("disk.qcow2");
    disks::create(&path, disks::Format::Qcow2, bytes.len() as u64, None).unwrap();
    let disk = disks::Disk::open(&path, &disks::Options::default()).unwrap();
    disk.write(0, &bytes).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let args = ["--firmware", "uefi", "--name", "keeper"];
    let first = run(&scratch, &path, &args);
    for (what, times) in
        [("Welcome to GRUB", 2), ("Lodge: Linux", 2), ("made 1", 1), ("kept 1: start1", 1), ("made 2", 1)]
    {
        assert_eq!(count(&first, what), times, "{what}: {}", first.out);
    }
    let second = run(&scratch, &path, &args);
    assert!(second.out.contains("kept 2: start2") && second.out.contains("made 3"), "{}", second.out);
    // Without a name there is nothing to remember.
    let other = run(&scratch, &path, &args[..2]);
    assert!(!other.out.contains("start2"), "{}", other.out);
}

#[test]
fn disks_start_on_every_bus_with_more_processors_than_one() {
    let bios = ["sata", "nvme"].map(|bus| (Kind::Bios, "bios", bus));
    let uefi = ["sata", "nvme"].map(|bus| (Kind::Uefi, "uefi", bus));
    for (kind, firmware, bus) in bios.into_iter().chain(uefi) {
        let scratch = Scratch::new(&format!("{firmware}-{bus}"));
        let Some(disk) = bootable::disk(&scratch, kind, "echo \"processors: $(nproc)\"\n", &[]) else {
            return;
        };
        let mut command = Command::new(lodge());
        command.args(["run", "--cpus", "2", "--firmware", firmware, "--disk"]);
        command.arg(format!("{},bus={bus}", disk.display()));
        let done = start_with(&mut command, "").wait(PATIENCE).expect(0);
        assert!(done.out.contains("processors: 2"), "{firmware} {bus}: {}", done.out);
    }
}

#[test]
fn a_triple_fault_resets_the_machine() {
    // Looks for an X in sector 1. It is there: ends with status 7. It is not: writes it, and faults without an IDT.
    let code = [
        0x31, 0xc0, 0x8e, 0xc0, 0x8e, 0xd8, // ES, DS = 0
        0xbb, 0x00, 0x7e, 0xb9, 2, 0, 0xba, 0x80, 0, 0xb8, 0x01, 0x02, 0xcd, 0x13, // read it to 7e00
        0x80, 0x3e, 0x00, 0x7e, b'X', 0x74, 25, // compare; to the end
        0xc6, 0x06, 0x00, 0x7e, b'X', // write it
        0xbb, 0x00, 0x7e, 0xb9, 2, 0, 0xba, 0x80, 0, 0xb8, 0x01, 0x03, 0xcd, 0x13, //
        0x0f, 0x01, 0x1e, 0xf0, 0x7d, 0xcc, // LIDT of zeroes, INT3
        0xb0, 3, 0xba, 0xf4, 0, 0xee, 0xf4, // OUT 3 to port f4, HLT
    ];
    let mut image = vec![0; 1 << 20];
    image[..code.len()].copy_from_slice(&code);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    let scratch = Scratch::new("triple-fault");
    let disk = scratch.file("disk", &image);
    let mut command = Command::new(lodge());
    command.arg("run").arg(disk).args(["--debug-exit"]);
    start_with(&mut command, "").wait(PATIENCE).expect(7);
}

#[test]
fn mistakes_are_told() {
    let scratch = Scratch::new("firmware-errors");
    let nothing = scratch.file("nothing", &[0; 4096]);
    let sector = [&[0; 510][..], &[0x55, 0xaa]].concat();
    let disk = scratch.file("disk", &sector);
    let (nothing, disk) = (nothing.to_str().unwrap(), disk.to_str().unwrap());
    for (args, status, part) in [
        (vec!["tiny", "--firmware", "bios"], 2, "tiny is none"),
        (vec![nothing], 4, "no kernel that Lodge knows"),
        (vec![disk, "--cmdline", "quiet"], 2, "own boot loader"),
        (vec![disk, "--firmware", "uefi", "--name", "../x"], 2, "no name"),
    ] {
        let mut command = Command::new(lodge());
        command.env("LODGE_DATA_DIR", scratch.path()).arg("run").args(&args);
        let done = start_with(&mut command, "").wait(PATIENCE).expect(status);
        assert!(done.err.contains(part), "{}", done.err);
    }
}
