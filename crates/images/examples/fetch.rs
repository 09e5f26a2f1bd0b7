//! Fetches the default guest, or another by its suite, architecture and kernel, and prints where it is.
//!
//! `cargo run -p lodge-images --example fetch -- [--suite S] [--arch A] [--kernel PACKAGE] [--mirror URL] [--keyring FILE]
//! [--refresh] [--file PATTERN]…`: with `--file`, those files of the kernel's package in place of a guest.

use images::{Options, Progress, Source};

/// Prints each step with its size.
struct Print(u64);

impl Progress for Print {
    fn begin(&mut self, what: &str, total: Option<u64>) {
        let size = total.map_or(String::new(), |total| format!(" ({} KB)", total / 1000));
        eprintln!("{what}{size}");
        self.0 = 0;
    }
    fn advance(&mut self, bytes: u64) {
        self.0 += bytes;
    }
    fn finish(&mut self) {}
    fn note(&mut self, text: &str) {
        eprintln!("note: {text}");
    }
}

fn main() -> std::process::ExitCode {
    match fetch() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn fetch() -> Result<(), Box<dyn std::error::Error>> {
    let mut options = Options::default();
    let mut patterns = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--suite" => options.suite = Some(value()?),
            "--arch" => options.arch = value()?,
            "--kernel" => options.kernel = Some(value()?),
            "--mirror" => options.mirror = Some(value()?),
            "--keyring" => options.keyring = Some(value()?.into()),
            "--file" => patterns.push(value()?),
            "--refresh" => options.refresh = true,
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    if patterns.is_empty() {
        let guest = images::default_guest(&options, &mut Print(0))?;
        println!("{}{}", guest.description, if guest.cached { " (cached)" } else { "" });
        println!(
            "kernel={}\ninitrd={}\ncmdline={}",
            guest.kernel.display(),
            guest.initrd.display(),
            guest.cmdline
        );
        println!("vmlinux={}", images::unpacked_kernel(&options, &guest.kernel, &mut Print(0))?.display());
        return Ok(());
    }
    let kernel = options.kernel.clone().unwrap_or_else(|| "linux-image-cloud-amd64".to_owned());
    let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
    let found = Source::new(&options)?.files(&[&kernel], &patterns, &mut Print(0))?;
    println!("{} {} from {}", found.package, found.version, found.archive);
    for file in found.files {
        println!("{}={}", file.path, file.stored.display());
    }
    Ok(())
}
