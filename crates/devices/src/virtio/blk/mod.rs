//! A disk (virtio 1.2, section 5.2).

use std::io::{Read, Write};
use std::sync::Arc;

use disks::Disk;
use virtio_bindings::virtio_blk as b;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Broken, Device, In, Out};
use crate::dma::{le32, le64};

const SECTOR: u64 = 512;
/// Bytes that are carried between guest and disk at once.
const CHUNK: usize = 1 << 20;
/// Segments of a request that discards or writes zeroes.
const SEGMENTS: u32 = 64;
/// Sectors of such a segment at most: 1 GiB.
const MOST_SECTORS: u32 = 1 << 21;
const QUEUE: u16 = 256;
/// Queues at most.
pub const MOST_QUEUES: u32 = 16;
/// Requests that are served at once at least, over all queues.
const AT_ONCE: usize = 4;
/// Bytes of a request's header, of a segment, and of the name.
const HEADER: usize = 16;
const NAME: usize = b::VIRTIO_BLK_ID_BYTES as usize;

/// The device.
#[derive(Debug)]
pub struct Blk {
    disk: Arc<Disk>,
    name: [u8; NAME],
    /// The sizes of its queues.
    queues: Vec<u16>,
    packed: bool,
}

/// What a request came to.
enum Status {
    Ok,
    Error,
    Unsupported,
}

impl Blk {
    /// A device with the contents of `disk`, and the serial number `name`, of which the guest sees 20 bytes; it has so many
    /// queues, 1 to [`MOST_QUEUES`].
    pub fn new(disk: Arc<Disk>, name: &str, queues: u32) -> Self {
        let mut bytes = [0; NAME];
        bytes.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
        Self { disk, name: bytes, queues: vec![QUEUE; queues.clamp(1, MOST_QUEUES) as usize], packed: false }
    }

    /// Offers the driver packed rings.
    pub fn packed(self) -> Self {
        Self { packed: true, ..self }
    }

    /// Where `bytes` from `sector` on lie, if they do.
    fn place(&self, sector: u64, bytes: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        (start.checked_add(bytes)? <= self.disk.size() && bytes.is_multiple_of(SECTOR)).then_some(start)
    }

    fn read(&self, sector: u64, to: &mut Out<'_>) -> Result<Status, Broken> {
        let Some(mut at) = self.place(sector, to.available_bytes() as u64) else { return Ok(Status::Error) };
        let mut bytes = vec![0; to.available_bytes().min(CHUNK)];
        while to.available_bytes() > 0 {
            let n = to.available_bytes().min(CHUNK);
            if self.disk.read(at, &mut bytes[..n]).is_err() {
                return Ok(Status::Error);
            }
            to.write_all(&bytes[..n]).map_err(|_| Broken)?;
            at += n as u64;
        }
        Ok(Status::Ok)
    }

    fn write(&self, sector: u64, from: &mut In<'_>) -> Result<Status, Broken> {
        let Some(mut at) = self.place(sector, from.available_bytes() as u64) else {
            return Ok(Status::Error);
        };
        let mut bytes = vec![0; from.available_bytes().min(CHUNK)];
        while from.available_bytes() > 0 {
            let n = from.available_bytes().min(CHUNK);
            from.read_exact(&mut bytes[..n]).map_err(|_| Broken)?;
            if self.disk.write(at, &bytes[..n]).is_err() {
                return Ok(Status::Error);
            }
            at += n as u64;
        }
        Ok(Status::Ok)
    }

    /// Discards or writes zeroes, segment by segment.
    fn clear(&self, zeroes: bool, from: &mut In<'_>) -> Result<Status, Broken> {
        if from.available_bytes() > SEGMENTS as usize * HEADER {
            return Ok(Status::Error);
        }
        while from.available_bytes() > 0 {
            let mut segment = [0; HEADER];
            from.read_exact(&mut segment).map_err(|_| Broken)?;
            let (sector, count, flags) = (le64(&segment, 0), le32(&segment, 8), le32(&segment, 12));
            let bytes = u64::from(count) * SECTOR;
            let unmap = flags & b::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !b::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || unmap && !zeroes {
                return Ok(Status::Unsupported);
            }
            let Some(at) = self.place(sector, bytes).filter(|_| count <= MOST_SECTORS) else {
                return Ok(Status::Error);
            };
            let done =
                if zeroes { self.disk.write_zeroes(at, bytes, unmap) } else { self.disk.discard(at, bytes) };
            if done.is_err() {
                return Ok(Status::Error);
            }
        }
        Ok(Status::Ok)
    }
}

impl Device for Blk {
    fn kind(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn class(&self) -> u32 {
        // A mass storage controller of no other kind.
        0x01_8000
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            b::VIRTIO_BLK_F_SEG_MAX,
            b::VIRTIO_BLK_F_BLK_SIZE,
            b::VIRTIO_BLK_F_FLUSH,
            b::VIRTIO_BLK_F_MQ,
        ];
        if self.disk.is_read_only() {
            bits.push(b::VIRTIO_BLK_F_RO);
        } else {
            bits.extend([b::VIRTIO_BLK_F_DISCARD, b::VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn packed_rings(&self) -> bool {
        self.packed
    }

    fn threads(&self) -> usize {
        AT_ONCE.div_ceil(self.queues.len())
    }

    fn config(&self) -> Vec<u8> {
        let mut c = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size() / SECTOR).to_le_bytes());
        // Descriptors of a full queue less the header and the status.
        put(12, &u32::from(QUEUE - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(34, &(self.queues.len() as u16).to_le_bytes());
        // Of discards, then of zeroes: sectors, segments.
        put(36, &MOST_SECTORS.to_le_bytes());
        put(40, &SEGMENTS.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &MOST_SECTORS.to_le_bytes());
        put(52, &SEGMENTS.to_le_bytes());
        put(56, &[1]);
        c
    }

    fn serve(&self, _: usize, mut request: In<'_>, mut answer: Out<'_>) -> Result<usize, Broken> {
        let mut header = [0; HEADER];
        request.read_exact(&mut header).map_err(|_| Broken)?;
        let (kind, sector) = (le32(&header, 0), le64(&header, 8));
        let room = answer.available_bytes().checked_sub(1).ok_or(Broken)?;
        let mut last = answer.split_at(room).map_err(|_| Broken)?;
        let writes =
            matches!(kind, b::VIRTIO_BLK_T_OUT | b::VIRTIO_BLK_T_DISCARD | b::VIRTIO_BLK_T_WRITE_ZEROES);
        let status = match kind {
            _ if writes && self.disk.is_read_only() => Status::Error,
            b::VIRTIO_BLK_T_IN => self.read(sector, &mut answer)?,
            b::VIRTIO_BLK_T_OUT => self.write(sector, &mut request)?,
            b::VIRTIO_BLK_T_FLUSH => match self.disk.flush() {
                Ok(()) => Status::Ok,
                Err(_) => Status::Error,
            },
            b::VIRTIO_BLK_T_GET_ID => {
                let n = room.min(NAME);
                answer.write_all(&self.name[..n]).map_err(|_| Broken)?;
                Status::Ok
            }
            b::VIRTIO_BLK_T_DISCARD => self.clear(false, &mut request)?,
            b::VIRTIO_BLK_T_WRITE_ZEROES => self.clear(true, &mut request)?,
            _ => Status::Unsupported,
        };
        let status = match status {
            Status::Ok => b::VIRTIO_BLK_S_OK,
            Status::Error => b::VIRTIO_BLK_S_IOERR,
            Status::Unsupported => b::VIRTIO_BLK_S_UNSUPP,
        };
        last.write_all(&[status as u8]).map_err(|_| Broken)?;
        Ok(answer.bytes_written() + 1)
    }
}
