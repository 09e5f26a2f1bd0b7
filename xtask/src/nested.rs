//! `cargo xtask nested`: what the KVM engine must be able to do, on a KVM that works; and how fast it does it.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use images::{Firmware, Options, Silent};
use lodge_tests::bootable;

use crate::bed::{Bed, Job, Outcome};
use crate::{guests, sh};

/// `cargo xtask nested`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Show what the outer guest prints
    #[arg(long)]
    verbose: bool,
    /// Only jobs with this in their name
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Have the outer kernel trace its KVM, and show the end of that for a job that fails
    #[arg(long)]
    trace: bool,
    /// How often to do all of it, in one boot of the bed
    #[arg(long, value_name = "N", default_value_t = 1)]
    times: usize,
}

impl Args {
    /// All jobs, once.
    pub const ALL: Self = Self { verbose: false, only: None, trace: false, times: 1 };
}

/// The command: the one that `LODGE_BIN` names, as for the tests, or built now.
fn lodge() -> Result<PathBuf> {
    match std::env::var_os("LODGE_BIN") {
        Some(path) => Ok(path.into()),
        None => sh::build(&["build", "--release", "-p", "lodge"]),
    }
}

/// A bed with Lodge and the default guest in it.
fn furnished() -> Result<(Bed, images::Guest)> {
    let mut bed = Bed::new()?;
    let guest = images::default_guest(&Options::default(), &mut Silent)?;
    bed.file("vmlinuz", &guest.kernel)?.file("initrd", &guest.initrd)?;
    bed.program("lodge", &lodge()?)?;
    Ok((bed, guest))
}

/// Runs the jobs, and tells which failed.
pub fn run(args: &Args) -> Result<()> {
    let mut jobs = vec![
        Job::new("lodge host finds KVM usable", "/lodge host --json", 40).expecting("ran a trial guest"),
        Job::new("tiny guests", "/tiny --test-threads 1", 100),
    ];
    // How a kernel is loaded is the same on every engine, and tested where it is faster.
    let suites = || guests::SUITES.iter().filter(|name| !name.starts_with("multiboot"));
    jobs.extend(suites().map(|name| suite(name)));
    jobs.extend([1, 2].map(linux));
    let firmware = "/lodge run /grub.img --engine kvm --memory 256M --stats --timeout 220";
    jobs.extend([
        Job::new("SeaBIOS and GRUB, and again after a reset", firmware, 240).expecting("kept over the reset"),
        Job::new("devices, from both sides and over a reset", "/devices.sh", 240)
            .expecting("after the reset, on /dev/hvc0, packed: 1")
            .expecting("exec in lodge")
            .expecting("the disks are as the guest left them"),
        Job::new("memory comes and goes, and over a reset", "/memory.sh", 240)
            .expecting("the guest grew, and again after the reset")
            .expecting("the host has its memory back"),
        // Some two minutes, and more beside other work.
        Job::new("a Debian from its disk", "/debian.sh", 600).expecting("ext4").expecting("10.0.2.15/24"),
        Job::new("SATA, and a 32-bit kernel", "/sata.sh", 120).expecting("the disk has what the CD had"),
    ]);
    if let Some(only) = &args.only {
        // This takes longer than there is time for when all jobs run.
        jobs.push(Job::new("a Debian from its disk, by firmware", "/debian.sh --firmware bios", 600));
        jobs.retain(|job| job.name.contains(only));
        ensure!(!jobs.is_empty(), "no job of the nested bed has {only:?} in its name");
    }
    let (mut bed, _) = furnished()?;
    if jobs.iter().any(|job| job.command.starts_with("/tiny")) {
        bed.program("tiny", &sh::build(&["test", "--no-run", "-p", "lodge-kvm", "--test", "guests"])?)?;
    }
    bed.text("devices.sh", include_str!("nested/devices.sh"))
        .text("guest.sh", include_str!("nested/guest.sh"))
        .text("memory.sh", include_str!("nested/memory.sh"))
        .text("sata.sh", include_str!("nested/sata.sh"))
        .text("debian.sh", include_str!("nested/debian.sh"));
    if jobs.iter().any(|job| job.command.contains("/grub.img")) {
        seabios(&mut bed)?;
    }
    if jobs.iter().any(|job| job.command == "/sata.sh") {
        let options = Options { arch: "i386".into(), ..Options::default() };
        let guest = images::default_guest(&options, &mut Silent)?;
        bed.file("i386/vmlinuz", &guest.kernel)?.file("i386/initrd", &guest.initrd)?;
    }
    if jobs.iter().any(|job| job.command.starts_with("/debian.sh")) {
        debian(&mut bed)?;
    }
    let bare = guests::build()?;
    for name in suites() {
        bed.file(&format!("bare/{name}"), &bare.join(name))?;
    }
    let jobs = vec![jobs; args.times].concat();
    if args.trace {
        bed.trace();
    }
    let begun = Instant::now();
    let outcomes = bed.run(&jobs, args.verbose)?;
    println!("the nested bed ran {} jobs in {} s", jobs.len(), begun.elapsed().as_secs());
    report(&jobs, &outcomes)
}

/// Runs one of the bare-metal guests, which tells by its exit status whether it passed. It knows what QEMU's translator
/// gets wrong, but has to be told that it runs on it.
fn suite(name: &str) -> Job {
    let display = if name == "display" { "vga" } else { "none" };
    let command = format!(
        "/lodge run --engine kvm --display {display} --cpus 2 --memory 128M --debug-exit --no-reboot --timeout 100 --cmdline on-tcg \
         --kernel /bare/{name}"
    );
    let known: &[&str] = match name {
        // KVM serves port accesses without a look at the guest's I/O breakpoints,
        "debug" => &["OUT", "IN from the second of two ports"],
        // and takes whatever is written to the x2APIC's EOI.
        "interrupts" => &["x2APIC, EOI of not 0"],
        _ => &[],
    };
    Job { status: guests::PASSED, known, ..Job::new(&format!("bare-metal guest {name}"), command, 120) }
}

/// Boots the default guest's stock kernel to userspace, looks around there, and powers off.
fn linux(cpus: u32) -> Job {
    // The brackets keep the command line, which is in the log, from matching.
    let look = "cat /proc/interrupts; ! dmesg | grep -e WARNIN[G]: -e BU[G]: -e Oop[s]";
    let cmdline = format!("console=ttyS0 quiet lodge.exec=\"{look}\"");
    Job::new(
        &format!("a stock kernel, {cpus} vCPUs, to userspace and power-off"),
        format!(
            "/lodge run --engine kvm --cpus {cpus} --memory 256M --kernel /vmlinuz --initrd /initrd --stats \
             --timeout 150 --cmdline '{cmdline}'"
        ),
        170,
    )
    .expecting(&format!(", {cpus} CPUs, "))
    .expecting("the command ended with status 0")
}

/// A disk that GRUB starts from, with a guest that resets once.
fn seabios(bed: &mut Bed) -> Result<()> {
    let scratch = lodge_tests::Scratch::new("bed");
    // Sector 1000 is in nobody's way: between GRUB and the partition.
    let script = "if dd if=/dev/vda skip=1000 count=1 2>/dev/null | grep -q before; then echo kept over the reset; exit; fi\n\
                  echo before | dd of=/dev/vda seek=1000 conv=fsync 2>/dev/null\nreboot -f\n";
    let disk = bootable::disk(&scratch, bootable::Kind::Bios, script, &[]).context("there is no guest")?;
    bed.file("grub.img", &disk)?;
    seabios_files(bed)
}

fn seabios_files(bed: &mut Bed) -> Result<()> {
    let files = images::firmware(&Options::default(), Firmware::Bios, &mut Silent)?;
    bed.file("usr/share/seabios/bios-256k.bin", &files.code)?;
    if let Some(vga) = files.vga {
        bed.file("usr/share/seabios/vgabios-stdvga.bin", &vga)?;
    }
    Ok(())
}

/// A VM with Debian, which the command makes; its base is the bed's disk.
fn debian(bed: &mut Bed) -> Result<()> {
    let data = sh::target_dir().join("bed");
    let vm = data.join("vms/bed");
    if !vm.join("vm.json").exists() {
        let mut command = Command::new(lodge()?);
        command.args(["run", "debian:13"]);
        // It ends before it has written anything.
        command.args(["--name", "bed", "--engine", "translate", "--timeout", "1"]);
        command.env("LODGE_DATA_DIR", &data).stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    }
    for name in ["vm.json", "vmlinuz", "initrd.img", "disk.qcow2", "seed.img"] {
        bed.file(&format!("bed/{name}"), &vm.join(name))?;
    }
    seabios_files(bed)?;
    bed.drive(&vm.join("base.qcow2"));
    Ok(())
}

/// Prints a line per job, and what those that failed wrote.
fn report(jobs: &[Job], outcomes: &[Outcome]) -> Result<()> {
    let mut failed = 0;
    for (job, outcome) in jobs.iter().zip(outcomes) {
        match why_failed(job, outcome) {
            None => println!("ok      {}", job.name),
            Some(why) => {
                failed += 1;
                println!("FAILED  {}: {why}: {}\n{}", job.name, job.command, outcome.output);
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {} jobs failed in the nested bed", jobs.len());
    }
    Ok(())
}

fn why_failed(job: &Job, outcome: &Outcome) -> Option<String> {
    let failed = |line: &str| Some(line.strip_prefix("FAIL ")?.split(':').next()?.to_owned());
    let mut failures = outcome.output.lines().filter_map(failed).peekable();
    let only_known = failures.peek().is_some() && failures.all(|name| job.known.contains(&name.as_str()));
    match outcome.status {
        Some(status) if status == job.status || only_known => {}
        Some(143) => return Some(format!("it took more than {} s", job.limit)),
        Some(status) => return Some(format!("status {status}")),
        None => return Some("it did not end".into()),
    }
    let missing = job.expect.iter().find(|text| !outcome.output.contains(*text))?;
    Some(format!("it did not write {missing:?}"))
}

/// What QEMU loads at run time to boot a kernel (Debian's packages qemu-system-data and seabios).
const QEMU_FILES: [&str; 4] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
];

/// What a benchmark needs in the bed, Lodge's and QEMU's.
fn bench_bed() -> Result<(Bed, images::Guest)> {
    let (mut bed, guest) = furnished()?;
    bed.program("lodge-bench", &sh::build(&["build", "--release", "-p", "lodge-bench"])?)?;
    bed.program("usr/bin/qemu-system-x86_64", &PathBuf::from("/usr/bin/qemu-system-x86_64"))?;
    for path in QEMU_FILES {
        bed.file(path.trim_start_matches('/'), &PathBuf::from(path))?;
    }
    Ok((bed, guest))
}

/// Runs a benchmark in the bed, and prints what it says.
fn bench(bed: &Bed, name: &str, command: String) -> Result<()> {
    let jobs = [Job::new(name, command, 1800)];
    let outcomes = bed.run(&jobs, false)?;
    let outcome = outcomes.first().context("no outcome")?;
    if let Some(why) = why_failed(&jobs[0], outcome) {
        bail!("{name} failed in the nested bed: {why}\n{}", outcome.output);
    }
    // Those in brackets are the outer kernel's.
    let lines: Vec<&str> = outcome.output.lines().filter(|line| !line.starts_with('[')).collect();
    println!("\non KVM in the nested bed: {}", lines.join("\n").trim());
    Ok(())
}

/// `cargo xtask bench boot`, its second half: Lodge beside QEMU on the bed's KVM. `args` are for `lodge-bench boot`.
pub fn bench_boot(args: &[String]) -> Result<()> {
    let (bed, guest) = bench_bed()?;
    let command = format!(
        "/lodge-bench boot --engine kvm,qemu-kvm --kernel /vmlinuz --initrd /initrd --cmdline '{}' {}",
        guest.cmdline,
        args.join(" ")
    );
    bench(&bed, "bench boot", command)
}

/// `cargo xtask bench disk`, its second half, likewise. The images are in memory.
pub fn bench_disk(args: &[String]) -> Result<()> {
    let (mut bed, guest) = bench_bed()?;
    // Where it is beside the program on the host, too.
    bed.file("x86_64-unknown-linux-gnu/release/work", &guests::build_work()?)?;
    let command = format!(
        "/lodge-bench disk --engine qemu-kvm,kvm --size 64 --kernel /vmlinuz --initrd /initrd --cmdline '{}' {}",
        guest.cmdline,
        args.join(" ")
    );
    bench(&bed, "bench disk", command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_fail_by_status_and_by_what_they_write() {
        let job = Job::new("", "", 1).expecting("hello");
        let outcome = |status, output: &str| Outcome { status, output: output.into() };
        assert_eq!(why_failed(&job, &outcome(Some(0), "say hello\n")), None);
        assert!(why_failed(&job, &outcome(Some(0), "bye")).is_some());
        assert!(why_failed(&job, &outcome(Some(1), "hello")).is_some());
        assert!(why_failed(&job, &outcome(None, "hello")).is_some());
        let job = Job { known: &["OUT"], ..Job::new("", "", 1) };
        assert_eq!(why_failed(&job, &outcome(Some(3), "ok IN\nFAIL OUT: expected 1 got 2\n")), None);
        assert!(why_failed(&job, &outcome(Some(3), "FAIL OUT: x\nFAIL IN: y\n")).is_some());
        assert!(why_failed(&job, &outcome(Some(3), "ok OUT\n")).is_some());
    }
}
