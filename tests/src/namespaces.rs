//! Hosts of the tests' own: network namespaces that end with the test, however it ends.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A host: a process that does nothing in network and mount namespaces of its own. It ends when its input does, which is a pipe of ours.
pub struct Host(Child);

impl Host {
    /// Makes one, or says why not.
    pub fn new() -> Option<Self> {
        let mut child = Command::new("unshare")
            .args(["--net", "--mount", "sh", "-c", "ip link set lo up && echo ready && exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        let output = child.stdout.take().expect("piped");
        let read = BufReader::new(output).read_line(&mut line);
        if read.is_err() || line.trim() != "ready" {
            println!("skipped: this host gives no network namespaces, or `ip` is missing");
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        Some(Self(child))
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// A command that runs there.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid().to_string(), "--net", "--mount", "--"]).arg(program);
        command
    }

    /// Runs shell commands there, of which none may fail.
    #[track_caller]
    pub fn run(&self, script: &str) {
        let status = self.command("sh").args(["-ec", script]).status().expect("nsenter");
        assert!(status.success(), "{script}: {status}");
    }

    /// Does something on a thread that is there; sockets that it makes stay there.
    #[track_caller]
    pub fn inside<R: Send>(&self, what: impl FnOnce() -> R + Send) -> R {
        let space = File::open(format!("/proc/{}/ns/net", self.pid())).expect("it lives");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network)).expect("rights");
                what()
            });
            thread.join().expect("no panic")
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
