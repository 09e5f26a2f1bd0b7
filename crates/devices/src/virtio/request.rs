//! A request as devices see it, whichever ring it came by: pieces of guest memory to read, and pieces to write.

use std::io::{self, Read, Write};

use memory::Memory;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::Broken;
use crate::dma::{Cursor, Pieces};

/// A request, taken out of a ring.
#[derive(Debug, Default)]
pub struct Request {
    /// What its ring knows it by, and how many places it takes there.
    pub id: u16,
    pub places: u16,
    read: Pieces,
    write: Pieces,
}

impl Request {
    /// Adds what a descriptor tells of. What the device reads comes before what it writes (2.7.4.2).
    pub fn push(&mut self, memory: &Memory, address: u64, len: u32, write: bool) -> Result<(), Broken> {
        let inside = memory.guest().check_range(GuestAddress(address), len as usize, Permissions::ReadWrite);
        if !inside || !write && self.write.len() > 0 {
            return Err(Broken);
        }
        let pieces = if write { &mut self.write } else { &mut self.read };
        pieces.push(address, len.into());
        Ok(())
    }

    /// What it brings, and where its answer goes.
    pub fn open<'a>(&'a self, memory: &'a Memory) -> (In<'a>, Out<'a>) {
        (In(Span::new(&self.read, memory)), Out(Span::new(&self.write, memory)))
    }
}

/// Bytes of pieces from a place on.
#[derive(Clone)]
struct Span<'a> {
    cursor: Cursor<'a>,
    left: usize,
    passed: usize,
}

impl<'a> Span<'a> {
    fn new(pieces: &'a Pieces, memory: &'a Memory) -> Self {
        Self { cursor: pieces.cursor(memory), left: pieces.len() as usize, passed: 0 }
    }

    fn split_at(&mut self, n: usize) -> Result<Self, Broken> {
        let left = self.left.checked_sub(n).ok_or(Broken)?;
        let mut rest = Self { left, passed: 0, ..self.clone() };
        rest.cursor.skip(n as u64);
        self.left = n;
        Ok(rest)
    }

    /// Goes on by as many of `n` bytes as there are, which `carry` moves.
    fn go<E: std::fmt::Debug>(
        &mut self,
        n: usize,
        carry: impl FnOnce(&mut Cursor<'a>, usize) -> Result<(), E>,
    ) -> io::Result<usize> {
        let n = n.min(self.left);
        carry(&mut self.cursor, n).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.left -= n;
        self.passed += n;
        Ok(n)
    }
}

/// The bytes that the driver gives with a request.
pub struct In<'a>(Span<'a>);

impl In<'_> {
    /// Bytes that are still to be read.
    pub fn available_bytes(&self) -> usize {
        self.0.left
    }

    /// Bytes that have been read.
    pub fn bytes_read(&self) -> usize {
        self.0.passed
    }

    /// Leaves the next `n` bytes, and gives those behind them.
    ///
    /// # Errors
    /// There are not so many.
    pub fn split_at(&mut self, n: usize) -> Result<Self, Broken> {
        self.0.split_at(n).map(Self)
    }
}

impl Read for In<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.0.go(to.len(), |cursor, n| cursor.get(&mut to[..n]))
    }
}

/// The room that the driver gives for an answer.
pub struct Out<'a>(Span<'a>);

impl Out<'_> {
    /// Bytes that can still be written.
    pub fn available_bytes(&self) -> usize {
        self.0.left
    }

    /// Bytes that have been written.
    pub fn bytes_written(&self) -> usize {
        self.0.passed
    }

    /// Leaves the next `n` bytes, and gives those behind them.
    ///
    /// # Errors
    /// There are not so many.
    pub fn split_at(&mut self, n: usize) -> Result<Self, Broken> {
        self.0.split_at(n).map(Self)
    }

    /// Where in guest memory the bytes are that have not been written yet: guest-physical addresses, and bytes.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.cursor.pieces(self.0.left as u64)
    }
}

impl Write for Out<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.go(from.len(), |cursor, n| cursor.put(&from[..n]))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
