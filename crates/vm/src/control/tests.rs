use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use machine::Power;
use machine::power::End;

use super::*;
use crate::Console;

struct Bed {
    dir: tempfile::TempDir,
    power: Power,
    console: Arc<Console>,
    _server: Server,
}

impl Bed {
    fn new() -> Self {
        // Longer than a socket's address may be.
        let dir = tempfile::Builder::new().prefix(&"d".repeat(150)).tempdir().unwrap();
        let (power, console) = (Power::default(), Arc::new(Console::new(Box::new(std::io::sink()))));
        let server = Server::bind(dir.path(), "one").unwrap();
        let subject = Subject {
            status: status(),
            console: console.clone(),
            sockets: Arc::default(),
            power: power.clone(),
            balloon: Arc::default(),
            plugs: Arc::default(),
            screen: crate::Screen::new(),
            disks: Arc::default(),
            nics: Arc::default(),
        };
        server.serve(subject).unwrap();
        Self { dir, power, console, _server: server }
    }

    fn client(&self) -> Client {
        Client::connect(&self.dir.path().join("one.sock")).unwrap()
    }
}

fn status() -> Status {
    Status { name: "one".into(), engine: "none".into(), cpus: 1, memory: 1 << 20, pid: 1, seconds: 0 }
}

#[test]
fn a_name_is_taken_once_and_again_after_its_vm_is_gone() {
    let bed = Bed::new();
    assert!(matches!(Server::bind(bed.dir.path(), "one"), Err(Taken::Name(name)) if name == "one"));
    drop(Server::bind(bed.dir.path(), "two").unwrap());
    // As a killed process leaves it.
    let left = Server::bind(bed.dir.path(), "two").unwrap();
    let path = bed.dir.path().join("two.sock");
    std::fs::rename(&path, bed.dir.path().join("kept")).unwrap();
    drop(left);
    std::fs::rename(bed.dir.path().join("kept"), &path).unwrap();
    Server::bind(bed.dir.path(), "two").unwrap();
    // Something else's file is left alone.
    std::fs::write(bed.dir.path().join("three.sock"), "text").unwrap();
    assert!(matches!(Server::bind(bed.dir.path(), "three"), Err(Taken::Host(..))));
}

#[test]
fn it_tells_and_does_what_it_is_asked() {
    let bed = Bed::new();
    assert_eq!(bed.client().status().unwrap(), status());
    bed.client().tell(&Request::Stop).unwrap();
    assert_eq!(bed.power.wait(None), Some(End::Stopped("`lodge stop`")));
    let wrong = bed.client().stream(&Request::Status);
    assert!(matches!(wrong, Err(Refused::Unknown)), "{wrong:?}");
}

#[test]
fn memory_that_there_is_no_driver_for_is_refused() {
    let bed = Bed::new();
    let memory = bed.client().memory(None).unwrap();
    assert_eq!((memory.size, memory.max, memory.target, memory.has), (1 << 20, 1 << 20, 1 << 20, 1 << 20));
    let refused = |bytes| bed.client().memory(Some(bytes)).unwrap_err().to_string();
    assert!(refused((1 << 20) + 1).contains("max="), "{}", refused((1 << 20) + 1));
    assert!(refused(1 << 20).contains("virtio_balloon") && refused(4096).contains("virtio_balloon"));
    // What versions told that knew no more than the balloon.
    let told = r#"{"memory":{"size":9,"target":8,"has":7,"held":6,"free":null,"available":5}}"#;
    let old = Memory { size: 9, max: 0, target: 8, has: 7, held: 6, free: None, available: Some(5) };
    assert_eq!(serde_json::from_str::<Answer>(told).unwrap(), Answer::Memory(old));
}

#[test]
fn disks_come_and_go_by_name() {
    let bed = Bed::new();
    let path = bed.dir.path().join("a.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let options = disks::Options { format: Some(disks::Format::Raw), ..Default::default() };
    let new = NewDisk { path: path.clone(), options, serial: None, bus: Default::default() };
    let attach = |new: &NewDisk| bed.client().disks(&Request::AttachDisk(new.clone()));
    let disk = attach(&new).unwrap();
    assert_eq!(
        (disk[0].serial.as_str(), disk[0].size, disk[0].state),
        ("lodge-0", 1 << 20, DiskState::Attached)
    );
    assert_eq!(bed.client().disks(&Request::Disks).unwrap(), disk);
    let refused = |new| attach(&new).unwrap_err().to_string();
    assert!(refused(new.clone()).contains("in use"), "{}", refused(new.clone()));
    let other = path.with_file_name("b.img");
    std::fs::write(&other, []).unwrap();
    let twin = NewDisk { path: other, serial: Some("lodge-0".into()), ..new.clone() };
    assert!(refused(twin.clone()).contains("serial number lodge-0"));
    assert!(refused(NewDisk { bus: crate::DiskBus::Sata, ..twin }).contains("bus=virtio"));

    let detach = |which: &str, path| {
        let which = which.to_owned();
        bed.client().tell(&Request::DetachDisk { which, path, patience: 1.0, force: false })
    };
    assert!(detach("lodge-1", None).unwrap_err().to_string().contains("no disk is called lodge-1"));
    detach("a.img", path.canonicalize().ok()).unwrap();
    assert!(bed.client().disks(&Request::Disks).unwrap().is_empty());
    // Its image is closed.
    drop(disks::Disk::open(&path, &new.options).unwrap());
}

#[test]
fn the_console_shows_what_was_and_what_comes() {
    let bed = Bed::new();
    let mut guest = bed.console.writer(&bed.power);
    guest.write_all(b"before ").unwrap();
    let (mut from, to) = bed.client().stream(&Request::Console).unwrap();
    let mut seen = [0; 7];
    from.read_exact(&mut seen).unwrap();
    guest.write_all(b"after").unwrap();
    let mut rest = [0; 5];
    from.read_exact(&mut rest).unwrap();
    assert_eq!((&seen, &rest), (b"before ", b"after"));
    // Who leaves is forgotten, though the guest says nothing more.
    to.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(from.read(&mut rest).unwrap(), 0);
}

#[test]
fn nonsense_is_refused() {
    let bed = Bed::new();
    let path = bed.dir.path().join("one.sock");
    let mut long = vec![b'{'; 1 << 20];
    long.push(b'\n');
    for nonsense in [&b"{\"no-such-request\":null}\n"[..], b"\n", b"\xff\xfe\n", &long] {
        let mut stream = super::server::through_directory(&path, |short| UnixStream::connect(short)).unwrap();
        // It may hang up before it has read all.
        let _ = stream.write_all(nonsense);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.is_empty() || answer.starts_with("{\"refused\":"), "{answer}");
    }
    assert_eq!(bed.client().status().unwrap(), status());
}
