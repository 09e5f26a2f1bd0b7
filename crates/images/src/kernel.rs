//! The kernel inside a bzImage, unpacked on the host.
//!
//! A bzImage unpacks itself first of all. On an engine without hardware virtualization that is a large part of the
//! boot, and always the same work: so it can be done once here, and the ELF kernel be started by its PVH or 64-bit
//! entry. The layout is that of Linux, `Documentation/arch/x86/boot.rst`.

use std::io::Read;

use ruzstd::decoding::StreamingDecoder;

/// No kernel unpacks to more; today's have some 60 MB.
const LARGEST_KERNEL: u64 = 512 << 20;
/// Kernels are packed with `zstd -22 --ultra`, whose window is 128 MiB.
const ZSTD_WINDOW: u64 = 128 << 20;
/// What unpacking xz may take, in KiB.
const XZ_MEMORY: u32 = 256 << 10;
/// The block size of LZ4's legacy format.
const LZ4_BLOCK: usize = 8 << 20;

/// Why there is no kernel to take out. The image itself can be started all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnpackError {
    /// Not a bzImage of boot protocol 2.08 or later (Linux 2.6.26).
    #[error("it is not a bzImage, or one of a very old kernel")]
    NotBzImage,
    /// Packed in a way that we do not undo: bzip2, LZMA, LZO or none at all.
    #[error("the kernel in it is compressed in a way that is not known")]
    UnknownCompression,
    /// The packed kernel is damaged.
    #[error("the kernel in it cannot be unpacked")]
    Damaged,
}

/// Gives the ELF kernel in the bzImage `image`. Tables for its relocation may follow at the end.
pub fn unpack(image: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let payload = payload(image).ok_or(UnpackError::NotBzImage)?;
    // All forms end in the size of what was packed; gzip's own trailer is just that.
    let (packed, size) = payload.split_last_chunk::<4>().ok_or(UnpackError::Damaged)?;
    let size = u64::from(u32::from_le_bytes(*size));
    if size > LARGEST_KERNEL {
        return Err(UnpackError::Damaged);
    }
    let kernel = match payload {
        [0x1F, 0x8B, ..] => read(flate2::read::GzDecoder::new(payload), size),
        [0xFD, b'7', b'z', b'X', b'Z', 0, ..] => {
            read(lzma_rust2::XzReader::new_mem_limit(packed, false, XZ_MEMORY), size)
        }
        [0x28, 0xB5, 0x2F, 0xFD, ..] => StreamingDecoder::new_with_max_window_size(packed, ZSTD_WINDOW)
            .ok()
            .and_then(|input| read(input, size)),
        [0x02, 0x21, 0x4C, 0x18, ..] => packed.get(4..).and_then(|blocks| lz4(blocks, size)),
        _ => return Err(UnpackError::UnknownCompression),
    };
    kernel.filter(|kernel| kernel.starts_with(b"\x7fELF")).ok_or(UnpackError::Damaged)
}

/// The packed kernel, by the fields of the setup header.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(*image.get(at..)?.first_chunk()?));
    let version = u16::from_le_bytes(*image.get(0x206..)?.first_chunk()?);
    if image.get(0x202..0x206)? != b"HdrS" || version < 0x208 {
        return None;
    }
    let sectors = match *image.get(0x1F1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = ((sectors + 1) * 512).checked_add(u32_at(0x248)? as usize)?;
    image.get(start..start.checked_add(u32_at(0x24C)? as usize)?)
}

/// All that `input` gives, if it is of this size.
fn read(input: impl Read, size: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(size + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 == size).then_some(bytes)
}

/// LZ4's legacy format after its magic number: blocks, each after its packed size.
fn lz4(mut packed: &[u8], size: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while let Some((length, rest)) = packed.split_first_chunk::<4>() {
        let (input, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        let written = lz4_flex::block::decompress_into(input, &mut block).ok()?;
        bytes.extend_from_slice(&block[..written]);
        if bytes.len() as u64 > size {
            return None;
        }
        packed = rest;
    }
    (bytes.len() as u64 == size).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(packed: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * 512];
        image[0x1F1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20Fu16.to_le_bytes());
        image[0x248..0x24C].copy_from_slice(&100u32.to_le_bytes());
        image[0x24C..0x250].copy_from_slice(&(packed.len() as u32).to_le_bytes());
        image.extend_from_slice(&[0; 100]);
        image.extend_from_slice(packed);
        image.extend_from_slice(b"whatever follows");
        image
    }

    fn kernel() -> Vec<u8> {
        let mut kernel = b"\x7fELF".to_vec();
        kernel.extend((0..300_000u32).flat_map(|n| (n / 3).to_le_bytes()));
        kernel
    }

    /// The kernel packed in every way, with its size after it where the way does not have that itself.
    fn packed(kernel: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
        let sized = |mut bytes: Vec<u8>| {
            bytes.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
            bytes
        };
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(kernel).unwrap();
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        xz.write_all(kernel).unwrap();
        let zstd = ruzstd::encoding::compress_to_vec(kernel, ruzstd::encoding::CompressionLevel::Fastest);
        let mut lz4 = vec![0x02, 0x21, 0x4C, 0x18];
        for part in kernel.chunks(500_000) {
            let block = lz4_flex::block::compress(part);
            lz4.extend_from_slice(&(block.len() as u32).to_le_bytes());
            lz4.extend_from_slice(&block);
        }
        vec![
            ("gzip", gzip.finish().unwrap()),
            ("xz", sized(xz.finish().unwrap())),
            ("zstd", sized(zstd)),
            ("lz4", sized(lz4)),
        ]
    }

    #[test]
    fn every_compression_is_undone() {
        let kernel = kernel();
        for (name, packed) in packed(&kernel) {
            assert!(unpack(&image(&packed)).as_deref() == Ok(&kernel), "{name}");
        }
    }

    #[test]
    fn damage_is_an_error() {
        let kernel = kernel();
        for (name, packed) in packed(&kernel) {
            for length in [0, 3, 4, 7, 8, 20, packed.len() / 2, packed.len() - 1] {
                let error = unpack(&image(&packed[..length])).unwrap_err();
                assert!(
                    matches!(error, UnpackError::Damaged | UnpackError::UnknownCompression),
                    "{name} {length}"
                );
            }
            // Another size, up to the largest.
            for size in [0, 1, kernel.len() as u32 - 1, kernel.len() as u32 + 1, u32::MAX] {
                let mut wrong = packed.clone();
                let at = wrong.len() - 4;
                wrong[at..].copy_from_slice(&size.to_le_bytes());
                assert_eq!(unpack(&image(&wrong)), Err(UnpackError::Damaged), "{name} {size}");
            }
        }
        let gzip = &packed(b"no ELF file")[0].1;
        assert_eq!(unpack(&image(gzip)), Err(UnpackError::Damaged));
    }

    #[test]
    fn what_is_no_image_is_said_to_be_none() {
        let sound = image(&packed(&kernel())[0].1);
        for length in (0..2000).chain([sound.len() - 20]) {
            assert_eq!(unpack(&sound[..length]), Err(UnpackError::NotBzImage), "{length}");
        }
        for (at, value) in [(0x202, b'X'), (0x207, 1), (0x24B, 0xFF), (0x24F, 0xFF)] {
            let mut wrong = sound.clone();
            wrong[at] = value;
            assert_eq!(unpack(&wrong), Err(UnpackError::NotBzImage), "{at:#x}");
        }
    }
}
