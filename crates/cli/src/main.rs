//! The `lodge` command.
#![forbid(unsafe_code)]

mod args;
mod config;
mod console;
mod disk;
mod exec;
mod firmware;
mod host;
mod image;
mod net;
mod network;
mod progress;
mod report;
mod run;
mod running;
mod screen;
mod share;
mod system;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let done = match cli.command {
        args::Command::Run(args) => run::run(&args),
        args::Command::Host(args) => host::host(&args).map(|()| ExitCode::SUCCESS),
        args::Command::Image(args) => image::image(&args).map(|()| ExitCode::SUCCESS),
        args::Command::Ls(args) => running::ls(&args).map(|()| ExitCode::SUCCESS),
        args::Command::Console { name } => running::console(&name),
        args::Command::Screenshot { name, file } => {
            screen::screenshot(&name, &file).map(|()| ExitCode::SUCCESS)
        }
        args::Command::Type { name, text } => screen::type_text(&name, &text).map(|()| ExitCode::SUCCESS),
        args::Command::Key { name, keys } => screen::press(&name, &keys).map(|()| ExitCode::SUCCESS),
        args::Command::Stop(args) => running::stop(&args),
        args::Command::Exec(args) => exec::exec(&args),
        args::Command::Ssh(args) => exec::ssh(&args),
        args::Command::Forward(args) => exec::forward(&args),
        args::Command::Memory(args) => running::memory(&args).map(|()| ExitCode::SUCCESS),
        args::Command::Net(command) => net::net(&command),
        args::Command::Nic(command) => network::nic(&command).map(|()| ExitCode::SUCCESS),
        args::Command::Disk(command) => disk::disk(&command).map(|()| ExitCode::SUCCESS),
        args::Command::Completions { shell } => {
            clap_complete::generate(shell, &mut args::Cli::command(), "lodge", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        args::Command::Man { directory } => man(&directory).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| report::report(&error))
}

/// Writes a man page for each command.
fn man(directory: &std::path::Path) -> anyhow::Result<()> {
    use anyhow::Context;
    std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(args::Cli::command(), directory))
        .with_context(|| {
            format!(
                "cannot write man pages into {}; name a directory that you may write",
                directory.display()
            )
        })
}
