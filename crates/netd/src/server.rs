//! The socket: one line in, one line out, descriptors along with it.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as Lock, PoisonError};

use netctl::{Answer, LONGEST_REQUEST, MOST_QUEUES, Request};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;

use crate::helper::Peer;
use crate::policy::Policy;
use crate::process::Process;
use crate::{Context, Error, Helper, Result};

/// Connections at once, of all users and of each but root.
const MOST_CONNECTIONS: usize = 256;
const MOST_CONNECTIONS_EACH: usize = 64;

/// Listens where everybody may ask; what they may do is the policy's to say.
///
/// # Errors
/// The path cannot be listened at.
pub fn listen(path: &Path) -> Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let listen = || -> io::Result<_> {
        if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
            std::fs::create_dir_all(directory)?;
            std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?;
        }
        // Ours is the lock, so a socket that is there is a dead one's.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        Ok(listener)
    };
    listen().context(|| format!("{} cannot be listened at", path.display()))
}

/// Serves until the process ends. `config`: the file of the policy, read for each request.
pub async fn serve(listener: UnixListener, helper: Arc<Mutex<Helper>>, config: PathBuf) {
    let connections = Arc::new(Lock::new(HashMap::<u32, usize>::new()));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // No descriptors are left, most probably: others end first.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let Ok(credentials) = stream.peer_cred() else { continue };
        let Some(pid) = credentials.pid().and_then(|pid| u32::try_from(pid).ok()) else { continue };
        let process = Process::of_peer(&stream, pid).ok().map(Arc::new);
        let peer = Peer { uid: credentials.uid(), gid: credentials.gid(), process };
        let Some(place) = Place::take(&connections, peer.uid) else { continue };
        let (helper, config) = (helper.clone(), config.clone());
        tokio::spawn(async move {
            let _place = place;
            // Who goes away in the middle is told nothing.
            let _ = talk(stream, &peer, &helper, &config).await;
        });
    }
}

/// One of the connections that there may be.
struct Place(Arc<Lock<HashMap<u32, usize>>>, u32);

impl Place {
    fn take(connections: &Arc<Lock<HashMap<u32, usize>>>, uid: u32) -> Option<Self> {
        let mut counts = connections.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counts.values().sum();
        let own = counts.entry(uid).or_default();
        if all >= MOST_CONNECTIONS || (uid != 0 && *own >= MOST_CONNECTIONS_EACH) {
            return None;
        }
        *own += 1;
        Some(Self(connections.clone(), uid))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left = counts.get(&self.1).map_or(0, |count| count.saturating_sub(1));
        if left == 0 {
            counts.remove(&self.1);
        } else {
            counts.insert(self.1, left);
        }
    }
}

async fn talk(stream: UnixStream, peer: &Peer, helper: &Mutex<Helper>, config: &Path) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        (&mut stream).take(LONGEST_REQUEST as u64).read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Ok(());
        }
        let answered = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => answer(peer, request, helper, config).await,
            Err(error) => Err(Error::new(format!("the request is not understood: {error}"))
                .help("lodge and lodge-netd must be of the same version")),
        };
        let (answer, descriptors) = answered.unwrap_or_else(|error| (Answer::from(error), Vec::new()));
        if let Err(error) = send(stream.get_mut(), &answer, &descriptors).await {
            if let Answer::Attached(attached) = answer {
                // Nobody has it.
                let _ = helper.lock().await.detach(peer, &attached.interface).await;
            }
            return Err(error);
        }
        if !line.ends_with(b"\n") {
            return Ok(());
        }
    }
}

async fn answer(
    peer: &Peer,
    request: Request,
    helper: &Mutex<Helper>,
    config: &Path,
) -> Result<(Answer, Vec<OwnedFd>)> {
    let policy = match Policy::read(config) {
        // Who broke it can mend it.
        Err(error) if peer.uid != 0 => return Err(error),
        policy => policy.unwrap_or_default(),
    };
    // The host may look for users on other machines, and that takes its time.
    let (uid, gid) = (peer.uid, peer.gid);
    let rights = tokio::task::spawn_blocking(move || policy.rights(uid, gid)).await;
    let rights = rights.map_err(|error| Error::new(format!("nobody says who you are: {error}")))?;
    helper.lock().await.serve(&rights, peer, request).await
}

async fn send(stream: &mut UnixStream, answer: &Answer, descriptors: &[OwnedFd]) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let first = |stream: &UnixStream| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_QUEUES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(stream, &[IoSlice::new(&line[..1])], &mut control, flags)?)
    };
    let sent = stream.async_io(Interest::WRITABLE, || first(stream)).await?;
    stream.write_all(&line[sent..]).await
}
