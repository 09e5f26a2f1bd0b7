//! The name servers that the host uses, and asking them: messages are passed on as they are, under another number.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::names::PORT;

/// After so long without an answer the next one is asked.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the file is looked at.
const FRESH: Duration = Duration::from_secs(2);
/// As many are used of a file.
const MOST: usize = 3;
/// Header and question.
const HEADER: usize = 12;

/// The name servers that the host uses.
#[derive(Debug)]
pub struct Upstream {
    file: PathBuf,
    port: u16,
    /// Addresses of our own, which may not be asked: the question would come back.
    own: Vec<IpAddr>,
    servers: Mutex<(Option<Instant>, Vec<SocketAddr>)>,
}

impl Upstream {
    /// As `file` names them, which has the form of `resolv.conf(5)`.
    pub fn new(file: PathBuf, own: Vec<IpAddr>) -> Self {
        Self { file, port: PORT, own, servers: Mutex::default() }
    }

    /// Servers that listen elsewhere, for tests.
    #[cfg(test)]
    pub fn at(self, port: u16) -> Self {
        Self { port, ..self }
    }

    fn servers(&self) -> Vec<SocketAddr> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if servers.0.is_none_or(|read| read.elapsed() > FRESH) {
            let text = std::fs::read_to_string(&self.file).unwrap_or_default();
            let mut all = parse(&text);
            all.retain(|address| !self.own.contains(address));
            *servers = (
                Some(Instant::now()),
                all.into_iter().take(MOST).map(|address| SocketAddr::new(address, self.port)).collect(),
            );
        }
        servers.1.clone()
    }

    /// Has a question answered that came in a datagram, by the first that does.
    pub async fn ask(&self, question: &[u8]) -> Option<Vec<u8>> {
        for server in self.servers() {
            if let Ok(Ok(answer)) = timeout(PATIENCE, by_datagram(server, question)).await {
                return Some(answer);
            }
        }
        None
    }

    /// Has a question answered that came in a stream, so that the answer may be long.
    pub async fn ask_long(&self, question: &[u8]) -> Option<Vec<u8>> {
        for server in self.servers() {
            if let Ok(Ok(answer)) = timeout(PATIENCE, by_stream(server, question)).await {
                return Some(answer);
            }
        }
        None
    }
}

/// Each question has a socket of its own, and so a port by chance, besides a number by chance: who cannot see it can hardly forge
/// an answer (RFC 5452).
async fn by_datagram(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let asked = renumbered(question)?;
    socket.send(&asked).await?;
    let mut answer = vec![0; 65_536];
    loop {
        let len = socket.recv(&mut answer).await?;
        if let Some(answer) = answer_to(&asked, &answer[..len], question) {
            return Ok(answer);
        }
    }
}

async fn by_stream(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let asked = renumbered(question)?;
    write(&mut stream, &asked).await?;
    let answer = read(&mut stream).await?;
    answer_to(&asked, &answer, question).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Reads a message of a stream (RFC 1035, 4.2.2).
pub async fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes a message to a stream.
pub async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&len.to_be_bytes(), message].concat()).await
}

fn renumbered(question: &[u8]) -> io::Result<Vec<u8>> {
    let mut question = question.to_vec();
    let number = question.get_mut(..2).ok_or(io::ErrorKind::InvalidInput)?;
    rustix::rand::getrandom(number, rustix::rand::GetRandomFlags::empty())?;
    Ok(question)
}

/// `answer` under the number of `question`, if it answers what was `asked`: number, and the same name.
fn answer_to(asked: &[u8], answer: &[u8], question: &[u8]) -> Option<Vec<u8>> {
    let is_answer = answer.len() >= HEADER && answer[2] & 0x80 != 0 && answer[..2] == asked[..2];
    let end = HEADER + asked.get(HEADER..)?.iter().position(|byte| *byte == 0)? + 5;
    let name = asked.get(HEADER..end)?;
    // Servers that refuse may leave the question out.
    let same = match answer.get(4..6)? {
        [0, 0] => true,
        _ => answer.get(HEADER..end)?.eq_ignore_ascii_case(name),
    };
    (is_answer && same).then(|| [&question[..2], &answer[2..]].concat())
}

fn parse(text: &str) -> Vec<IpAddr> {
    let named = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        // A zone is of no use here: such servers are on one of the host's links.
        (words.next()? == "nameserver").then(|| words.next()?.parse().ok())?
    });
    let mut servers: Vec<IpAddr> = named.collect();
    if servers.is_empty() {
        // As the C library does.
        servers.push(Ipv4Addr::LOCALHOST.into());
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_the_host_but_never_ourselves() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            &file,
            "# comment\nsearch lan\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver ::1\n",
        )
        .unwrap();
        let own = vec!["192.0.2.1".parse().unwrap()];
        let upstream = Upstream::new(file.path().into(), own);
        assert_eq!(upstream.servers(), ["[::1]:53".parse().unwrap()]);
        assert_eq!(
            Upstream::new("/nonexistent".into(), Vec::new()).servers(),
            ["127.0.0.1:53".parse().unwrap()]
        );
    }

    #[test]
    fn only_answers_to_the_question_count() {
        let question = b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x00\x00\x01\x00\x01";
        let asked = [b"\xab\xcd", &question[2..]].concat();
        let mut answer = asked.clone();
        assert_eq!(answer_to(&asked, &answer, question), None, "a question");
        answer[2] |= 0x80;
        answer[14] = b'E';
        assert_eq!(answer_to(&asked, &answer, question).unwrap()[..2], [0, 1]);
        answer[14] = b'x';
        assert_eq!(answer_to(&asked, &answer, question), None, "another name");
        answer[14] = b'e';
        answer[0] = 0;
        assert_eq!(answer_to(&asked, &answer, question), None, "another number");
    }
}
