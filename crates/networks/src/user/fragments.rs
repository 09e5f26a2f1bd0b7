//! Packets that the guest has cut to pieces.

use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Packets in pieces at once, and pieces of each.
const MOST: usize = 16;
const MOST_PIECES: usize = 128;
/// How long the rest may take (RFC 8200, 4.5).
const PATIENCE: Duration = Duration::from_secs(60);
const LONGEST: usize = 65_535;

/// Which packet a piece is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    pub from: IpAddr,
    pub to: IpAddr,
    pub protocol: u8,
    pub ident: u32,
}

/// A piece.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    pub offset: usize,
    pub more: bool,
    pub data: &'a [u8],
}

#[derive(Debug)]
struct Packet {
    key: Key,
    /// By offset; they do not overlap.
    pieces: Vec<(usize, Vec<u8>)>,
    /// Bytes of all of it, once the last piece is there.
    total: Option<usize>,
    begun: Instant,
}

/// Packets in pieces.
#[derive(Debug, Default)]
pub struct Fragments(Vec<Packet>);

impl Fragments {
    /// Takes a piece.
    ///
    /// # Errors
    /// It makes no sense, or overlaps another: all of the packet is given up (RFC 5722).
    pub fn add(&mut self, key: Key, piece: Piece<'_>, now: Instant) -> Result<Option<Vec<u8>>, ()> {
        self.0.retain(|packet| now < packet.begun + PATIENCE);
        let index = self.0.iter().position(|packet| packet.key == key).unwrap_or_else(|| {
            if self.0.len() >= MOST {
                self.0.remove(0);
            }
            self.0.push(Packet { key, pieces: Vec::new(), total: None, begun: now });
            self.0.len() - 1
        });
        match self.0[index].add(piece) {
            Err(()) => {
                self.0.remove(index);
                Err(())
            }
            Ok(false) => Ok(None),
            Ok(true) => {
                let packet = self.0.remove(index);
                Ok(Some(packet.pieces.into_iter().flat_map(|(_, data)| data).collect()))
            }
        }
    }
}

impl Packet {
    /// Whether all is there.
    fn add(&mut self, Piece { offset, more, data }: Piece<'_>) -> Result<bool, ()> {
        let end = offset + data.len();
        let cut = more && (data.is_empty() || data.len() % 8 != 0);
        if cut || end > LONGEST || self.pieces.len() >= MOST_PIECES {
            return Err(());
        }
        if !more {
            if self.total.is_some() {
                return Err(());
            }
            self.total = Some(end);
        }
        let at = self.pieces.partition_point(|(start, _)| *start < offset);
        let before = at.checked_sub(1).map(|n| &self.pieces[n]);
        let overlaps = before.is_some_and(|(start, data)| start + data.len() > offset)
            || self.pieces.get(at).is_some_and(|(start, _)| *start < end);
        if overlaps {
            return Err(());
        }
        self.pieces.insert(at, (offset, data.to_vec()));
        let last = self.pieces.last().map_or(0, |(start, data)| start + data.len());
        let got: usize = self.pieces.iter().map(|(_, data)| data.len()).sum();
        match self.total {
            Some(total) if last > total => Err(()),
            total => Ok(total == Some(got)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key {
        from: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        to: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        protocol: 17,
        ident: 1,
    };

    fn piece(offset: usize, more: bool, data: &[u8]) -> Piece<'_> {
        Piece { offset, more, data }
    }

    #[test]
    fn pieces_in_any_order_make_a_packet() {
        let mut fragments = Fragments::default();
        let now = Instant::now();
        assert_eq!(fragments.add(KEY, piece(16, false, b"end"), now), Ok(None));
        assert_eq!(fragments.add(Key { ident: 2, ..KEY }, piece(8, true, &[0; 8]), now), Ok(None));
        assert_eq!(fragments.add(KEY, piece(0, true, b"01234567"), now), Ok(None));
        assert_eq!(
            fragments.add(KEY, piece(8, true, b"89abcdef"), now),
            Ok(Some(b"0123456789abcdefend".to_vec()))
        );
    }

    #[test]
    fn pieces_that_overlap_or_make_no_sense_end_the_packet() {
        let now = Instant::now();
        let bad = [
            [piece(0, true, &[0; 16]), piece(8, true, &[0; 8])],
            [piece(8, true, &[0; 8]), piece(0, true, &[0; 16])],
            [piece(0, true, &[0; 8]), piece(0, true, &[0; 8])],
            [piece(0, true, &[0; 16]), piece(8, false, &[0; 2])],
            [piece(16, true, &[0; 8]), piece(8, false, &[0; 2])],
            [piece(8, false, &[0; 2]), piece(16, false, &[0; 2])],
            [piece(0, true, &[0; 8]), piece(8, true, &[0; 7])],
            [piece(0, true, &[0; 8]), piece(65_528, false, &[0; 16])],
        ];
        for pieces in bad {
            let mut fragments = Fragments::default();
            assert_eq!(fragments.add(KEY, pieces[0], now), Ok(None), "{pieces:?}");
            assert_eq!(fragments.add(KEY, pieces[1], now), Err(()), "{pieces:?}");
            assert!(fragments.0.is_empty());
        }
    }

    #[test]
    fn what_never_ends_is_bounded() {
        let mut fragments = Fragments::default();
        let now = Instant::now();
        for ident in 0..100 {
            let _ = fragments.add(Key { ident, ..KEY }, piece(0, true, &[0; 8]), now);
        }
        assert_eq!(fragments.0.len(), MOST);
        let ends = (1..1000).find(|n| fragments.add(KEY, piece(n * 16, true, &[0; 8]), now).is_err());
        assert_eq!(ends, Some(MOST_PIECES + 1));
        let _ = fragments.add(KEY, piece(0, true, &[0; 8]), now + PATIENCE);
        assert_eq!(fragments.0.len(), 1);
    }
}
