//! What the guest knows of: nodes, which it has looked up, and handles, which it has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use crate::fuse::ROOT;

/// A file or directory that the guest has looked up. It is held by a descriptor that gives no access to the contents, so it stays
/// the same one when it is renamed or removed.
#[derive(Debug)]
pub struct Node {
    pub fd: OwnedFd,
    pub kind: FileType,
    /// File system and inode number.
    id: (u64, u64),
}

/// An open file or directory.
#[derive(Debug)]
pub enum Handle {
    File(OwnedFd),
    /// The lock is for its position, which every listing sets first.
    Directory(Arc<Node>, Mutex<OwnedFd>),
}

/// Nodes by their numbers, each with how often it was handed out.
#[derive(Debug, Default)]
pub struct Nodes {
    nodes: HashMap<u64, (Arc<Node>, u64)>,
    numbers: HashMap<(u64, u64), u64>,
    last: u64,
    /// File systems: inode numbers of others than the first are marked.
    devices: Vec<u64>,
}

impl Nodes {
    /// Only the shared directory.
    pub fn new(root: OwnedFd, stat: &Stat) -> Self {
        let node = Node { fd: root, kind: FileType::Directory, id: (stat.st_dev, stat.st_ino) };
        let mut this = Self { last: ROOT, devices: vec![stat.st_dev], ..Self::default() };
        this.numbers.insert(node.id, ROOT);
        this.nodes.insert(ROOT, (Arc::new(node), 1));
        this
    }

    pub fn get(&self, number: u64) -> Result<Arc<Node>, Errno> {
        self.nodes.get(&number).map(|(node, _)| node.clone()).ok_or(Errno::STALE)
    }

    /// The number of what is held by `fd`, handed out once more.
    pub fn hand_out(&mut self, fd: OwnedFd, stat: &Stat, most: usize) -> Result<u64, Errno> {
        let id = (stat.st_dev, stat.st_ino);
        if let Some(&number) = self.numbers.get(&id)
            && let Some((_, times)) = self.nodes.get_mut(&number)
        {
            *times = times.saturating_add(1);
            return Ok(number);
        }
        if self.nodes.len() >= most {
            return Err(Errno::NFILE);
        }
        self.last += 1;
        let kind = FileType::from_raw_mode(stat.st_mode);
        self.numbers.insert(id, self.last);
        self.nodes.insert(self.last, (Arc::new(Node { fd, kind, id }), 1));
        Ok(self.last)
    }

    /// The guest has forgotten a node, handed out so many times.
    pub fn forget(&mut self, number: u64, times: u64) {
        if number == ROOT {
            return;
        }
        if let Some((node, left)) = self.nodes.get_mut(&number) {
            *left = left.saturating_sub(times);
            if *left == 0 {
                let id = node.id;
                self.numbers.remove(&id);
                self.nodes.remove(&number);
            }
        }
    }

    /// An inode number that no other file has, on whichever file system below the directory.
    pub fn inode(&mut self, stat: &Stat) -> u64 {
        const MOST: usize = 255;
        let at = self.devices.iter().position(|&device| device == stat.st_dev).unwrap_or_else(|| {
            if self.devices.len() < MOST {
                self.devices.push(stat.st_dev);
            }
            self.devices.len() - 1
        });
        stat.st_ino ^ (at as u64) << 56
    }
}

/// Handles by their numbers.
#[derive(Debug, Default)]
pub struct Handles {
    handles: HashMap<u64, Arc<Handle>>,
    last: u64,
}

impl Handles {
    /// The number of a new one.
    pub fn insert(&mut self, handle: Handle, most: usize) -> Result<u64, Errno> {
        if self.handles.len() >= most {
            return Err(Errno::NFILE);
        }
        self.last += 1;
        self.handles.insert(self.last, Arc::new(handle));
        Ok(self.last)
    }

    pub fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.handles.get(&number).cloned().ok_or(Errno::BADF)
    }

    pub fn remove(&mut self, number: u64) {
        self.handles.remove(&number);
    }
}
