//! The guest's screen: viewers and pictures of it; and its keyboard.

use std::fs::File;
use std::io::{BufWriter, Read};
use std::path::Path;

use anyhow::Context;
use screens::{Screen, vnc};
use vm::control::Request;

use crate::args::{Display, Run};
use crate::report::{Help, Usage};
use crate::running::connect;

/// Which display the guest has; `firmware`: whether firmware starts it.
pub fn display(args: &Run, firmware: bool) -> vm::Display {
    match args.display {
        Some(Display::None) => vm::Display::None,
        Some(Display::Virtio) => vm::Display::Virtio,
        Some(Display::Vga) => vm::Display::Vga,
        None if firmware || args.vnc.is_some() => vm::Display::Vga,
        None => vm::Display::None,
    }
}

/// Writes what the screen shows into a PNG file.
pub fn save(screen: &Screen, path: &Path) -> anyhow::Result<()> {
    let failed = || Usage(format!("cannot write the picture of the screen to {}", path.display()));
    let file = File::create(path).with_context(failed)?;
    screen.picture().png(BufWriter::new(file)).with_context(failed)
}

/// Lets viewers see the screen, if they shall.
pub fn serve(args: &Run, config: &vm::Config) -> anyhow::Result<Option<vnc::Server>> {
    let Some(address) = &args.vnc else { return Ok(None) };
    let password = args.vnc_password_file.as_deref().map(|path| {
        let text = std::fs::read(path);
        text.with_context(|| Usage(format!("cannot read the password in {}", path.display())))
    });
    // As editors write it.
    let password = password.transpose()?.map(|text| text.trim_ascii_end().to_vec());
    let server = vnc::Server::start(address, config.screen.clone(), &config.name, password.as_deref())
        .map_err(|error| match error {
            vnc::Error::Open(_) => anyhow::Error::new(Usage(error.to_string())).context(Help(
                "put a password into a file and name it with --vnc-password-file, or leave the address away and come by ssh".into(),
            )),
            other => Usage(other.to_string()).into(),
        })?;
    eprintln!("The screen is at {server} (VNC)");
    Ok(Some(server))
}

/// `lodge screenshot`.
pub fn screenshot(name: &str, path: &Path) -> anyhow::Result<()> {
    let (mut from, _) = connect(name)?.stream(&Request::Screenshot)?;
    let mut png = Vec::new();
    from.read_to_end(&mut png).context("cannot get the picture")?;
    std::fs::write(path, png).with_context(|| Usage(format!("cannot write {}", path.display())))
}

/// `lodge type`: in parts that are typed soon.
pub fn type_text(name: &str, text: &str) -> anyhow::Result<()> {
    let characters: Vec<char> = text.chars().collect();
    for part in characters.chunks(64) {
        connect(name)?.tell(&Request::Type(part.iter().collect()))?;
    }
    Ok(())
}

/// `lodge key`.
pub fn press(name: &str, chords: &[String]) -> anyhow::Result<()> {
    chords.iter().try_for_each(|keys| Ok(connect(name)?.tell(&Request::Press(keys.clone()))?))
}
