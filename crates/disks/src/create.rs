//! Making new images.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use imago::FormatCreateBuilder;

use crate::chain::folder;
use crate::{Disk, Error, Format, Options};

const MAX_SIZE: u64 = 1 << 60;

/// Makes a raw or qcow2 image at `path`, where nothing may be yet, of a disk of `size` bytes that reads as zero.
///
/// With `backing`, the image is a qcow2 overlay, which reads as that image where nothing was written to it; a `size` of 0 then
/// means that image's size. The overlay records the format of the backing image, which is detected now, and its name alone if it
/// lies in the same folder (so both can be moved together), or else its absolute path.
///
/// The image appears under its name when it is whole and on stable storage, or not at all.
pub fn create(path: &Path, format: Format, size: u64, backing: Option<&Path>) -> Result<(), Error> {
    let failed = |error| Error::io("create", path, error);
    match format {
        Format::Vmdk => return Err(Error::unsupported(path, "making VMDK images; make a qcow2 image")),
        Format::Raw if backing.is_some() => {
            return Err(Error::unsupported(path, "a raw image over another; make a qcow2 image"));
        }
        _ => {}
    }
    // Held until the overlay exists, so that nobody writes to the base meanwhile.
    let base = backing
        .map(|base| Disk::open(base, &Options { read_only: true, ..Default::default() }))
        .transpose()?;
    let size = match &base {
        Some(base) if size == 0 => base.size().next_multiple_of(512),
        _ => size,
    };
    if size == 0 || size > MAX_SIZE || !size.is_multiple_of(512) {
        return Err(Error::Size { size });
    }
    let place = folder(path);
    let temporary = tempfile::Builder::new()
        .prefix(".lodge-disk-")
        .permissions(Permissions::from_mode(0o666)) // less the umask, as for any new file
        .tempfile_in(place)
        .map_err(failed)?;
    if format == Format::Raw {
        temporary.as_file().set_len(size).map_err(failed)?;
    } else {
        let file = temporary.as_file().try_clone().and_then(imago::file::File::try_from).map_err(failed)?;
        let mut builder = imago::qcow2::Qcow2::<imago::file::File>::create_builder(file).size(size);
        if let (Some(backing), Some(base)) = (backing, &base) {
            let name = name_for(backing, place).map_err(failed)?;
            builder = builder.backing(name, base.format().to_string());
        }
        builder.create().map_err(failed)?;
    }
    temporary.as_file().sync_all().map_err(failed)?;
    temporary.persist_noclobber(path).map_err(|error| failed(error.error))?;
    File::open(place).and_then(|folder| folder.sync_all()).map_err(failed)
}

/// The name by which an overlay in `place` records its backing image.
fn name_for(backing: &Path, place: &Path) -> io::Result<String> {
    let absolute = fs::canonicalize(backing)?;
    let name = match absolute.file_name() {
        Some(name) if absolute.parent() == Some(&fs::canonicalize(place)?) => PathBuf::from(name),
        _ => absolute,
    };
    name.into_os_string()
        .into_string()
        .map_err(|_| io::Error::other("the name of its backing image is not UTF-8; rename that"))
}
