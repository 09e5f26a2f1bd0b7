//! Network cards as stock kernels use them. There are no networks yet, so these go by the library: the cable leads to a host that
//! answers ARP and pings.

use std::io::Write;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use images::Options;
use lodge_tests::default_guest;
use vm::{Boot, Choice, Config, Console, End, Guest, Header, Limits, Link, Mac, Nic, NicModel, Nics, Vm};

const PATIENCE: Duration = Duration::from_secs(240);
const HOST: Mac = [2, 0, 0, 0, 0, 1];

/// A host that answers for every address.
#[derive(Default)]
struct Answers {
    guest: Mutex<Guest>,
    pings: Mutex<u32>,
}

impl Link for Answers {
    fn connect(&self, guest: Guest) {
        *self.guest.lock().unwrap() = guest;
    }

    fn send(&self, _: &Header, frame: &[u8]) {
        let answer = match frame.get(12..14) {
            Some([8, 6]) => arp(frame),
            Some([8, 0]) if frame.get(23) == Some(&1) && frame.get(34) == Some(&8) => {
                *self.pings.lock().unwrap() += 1;
                Some(ping(frame))
            }
            _ => None,
        };
        if let Some(answer) = answer {
            self.guest.lock().unwrap().deliver(&Header::default(), &answer);
        }
    }
}

/// Whoever is asked for is this host, but a guest that asks for itself.
fn arp(frame: &[u8]) -> Option<Vec<u8>> {
    let (asks, wanted) = (frame.get(22..32)?, frame.get(38..42)?);
    if frame[21] != 1 || asks[6..] == *wanted || asks[6..] == [0; 4] {
        return None;
    }
    let mut answer = [&frame[6..12], &HOST[..], &frame[12..20], &[0, 2], &HOST, wanted, asks].concat();
    answer.resize(60, 0);
    Some(answer)
}

fn ping(frame: &[u8]) -> Vec<u8> {
    let mut answer = frame.to_vec();
    answer[..6].copy_from_slice(&frame[6..12]);
    answer[6..12].copy_from_slice(&HOST);
    answer[26..30].copy_from_slice(&frame[30..34]);
    answer[30..34].copy_from_slice(&frame[26..30]);
    answer[34] = 0;
    // 8 less in the word of the kind is 8 more in the sum's complement.
    let sum = u32::from(u16::from_be_bytes([frame[36], frame[37]])) + 0x800;
    let sum = (sum & 0xffff) as u16 + (sum >> 16) as u16;
    answer[36..38].copy_from_slice(&sum.to_be_bytes());
    answer
}

struct Sender(mpsc::Sender<Vec<u8>>);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(bytes.to_vec());
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Waits for this text in the guest's output.
fn see(output: &mpsc::Receiver<Vec<u8>>, text: &str) {
    let end = Instant::now() + PATIENCE;
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(text) {
        match output.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(bytes) => seen.extend(bytes),
            Err(error) => panic!("no {text:?} ({error}): {}", String::from_utf8_lossy(&seen)),
        }
    }
}

#[test]
fn network_cards_come_and_go_and_carry_frames() {
    let options = Options {
        suite: Some("trixie".into()),
        kernel: Some("linux-image-amd64".into()),
        ..Options::default()
    };
    let Some(guest) = default_guest(&options) else { return };
    let links = [Arc::new(Answers::default()), Arc::new(Answers::default())];
    let nic = |n: usize, model| Nic {
        mac: [2, 0, 0, 0, 1, n as u8],
        model,
        link: links[n].clone(),
        network: "answers".into(),
        limits: Limits::default(),
        plugged: true,
    };
    let nics = Arc::new(Nics::new(vec![nic(0, NicModel::Virtio)], None).unwrap());
    let boot = Boot::Kernel {
        kernel: guest.kernel,
        initrd: vec![guest.initrd],
        cmdline: format!("{} panic=-1", guest.cmdline),
    };
    let config = Config { nics: nics.clone(), ..Config::new("nics", Choice::Translate, 512 << 20, boot) };
    let (sender, output) = mpsc::channel();
    let console = Arc::new(Console::new(Box::new(Sender(sender))));
    let mut vm = Vm::new(&config, &console).unwrap();
    let running = std::thread::spawn(move || vm.run(Some(Instant::now() + PATIENCE)));
    let types = |text: &str, answer: &str| {
        console.push(text.as_bytes());
        see(&output, answer);
    };
    let pings = |name: &str, n: usize| {
        format!(
            "until [ -e /sys/class/net/{name} ]; do sleep 0.1; done; cat /sys/class/net/{name}/address\n\
             ip addr add 10.0.{n}.2/24 dev {name}; ip link set {name} up\n\
             ping -c 3 -s 1400 10.0.{n}.1 && echo pinged $(({n} + 40)) times\n"
        )
    };
    see(&output, "built-in commands");
    types(&pings("eth0", 0), "pinged 40 times");
    assert!(*links[0].pings.lock().unwrap() >= 3);

    nics.attach(nic(1, NicModel::E1000)).unwrap();
    types("insmod /lib/modules/e1000/*.ko && echo loaded $((1 + 1))\n", "loaded 2");
    types(&pings("eth1", 1), "pinged 41 times");
    types("cat /sys/class/net/eth1/speed /sys/class/net/eth1/duplex\n", "1000\r\nfull");
    let guest = links[1].guest.lock().unwrap().clone();
    let carrier = |name: &str, value: u8| {
        format!(
            "until [ $(cat /sys/class/net/{name}/carrier) = {value} ]; do sleep 0.1; done; echo {name} link $(({value} + 30))\n"
        )
    };
    guest.set_up(false);
    types(&carrier("eth1", 0), "eth1 link 30");
    guest.set_up(true);
    types(&carrier("eth1", 1), "eth1 link 31");
    nics.set_plugged("1", false).unwrap();
    types(&carrier("eth0", 0), "eth0 link 30");
    nics.set_plugged("02:00:00:00:01:00", true).unwrap();
    types(&carrier("eth0", 1), "eth0 link 31");
    assert!(nics.set_plugged("3", true).is_err());
    let counts: Vec<u64> = nics.list().iter().map(|nic| nic.traffic.from_guest.frames).collect();
    assert!(counts.len() == 2 && counts.iter().all(|frames| *frames >= 3), "{counts:?}");
    nics.detach("2", PATIENCE, false).unwrap();
    types(
        "while [ -e /sys/class/net/eth1 ]; do sleep 0.1; done; echo left $(ls /sys/class/net | wc -w)\n",
        "left 2",
    );
    console.push(b"poweroff -f\n");
    assert_eq!(running.join().unwrap(), Some(End::PowerOff));
}
