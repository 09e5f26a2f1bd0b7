//! An image file, locked, and the images below it.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use imago::format::gate::ImplicitOpenGate;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage, StorageOpenOptions,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::file::{File as ImageFile, Shown};
use crate::locks::Locks;
use crate::vmdk::{self, Sparse};
use crate::zstd::Zstd;
use crate::{Error, Format, qcow2, raw};

/// How many images may lie over one another.
const MAX_IMAGES: usize = 16;
/// How many files a VMDK may consist of.
const MAX_EXTENTS: usize = 256;

/// An open image with what lies below it.
pub type Layer = FormatAccess<ImageFile>;

/// One file of a chain, open and locked.
pub struct Image {
    pub path: PathBuf,
    pub file: File,
    pub format: Format,
    /// In bytes.
    pub len: u64,
    /// Device and inode: which file it is.
    id: (u64, u64),
}

impl Image {
    /// Opens and locks a file: to write it alone, or to read it along with others.
    pub fn open(path: &Path, format: Option<Format>, write: bool, locks: &mut Locks) -> Result<Image, Error> {
        let failed = |error| Error::io("open", path, error);
        let mut file = open_locked(path, write, locks)?;
        let about = file.metadata().map_err(failed)?;
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let format = match format {
            Some(format) => format,
            None => Format::detect(&raw::head(&file).map_err(failed)?),
        };
        Ok(Image { path: path.to_owned(), file, format, len, id: (about.dev(), about.ino()) })
    }
}

fn open_locked(path: &Path, write: bool, locks: &mut Locks) -> Result<File, Error> {
    let failed = |error| Error::io("open", path, error);
    // Before we open it: opening a pipe would wait for its other end.
    let kind = fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(failed(io::Error::other("it is neither a file nor a block device")));
    }
    let file = File::options().read(true).write(write).open(path).map_err(failed)?;
    locks.lock(&file, path, write)?;
    Ok(file)
}

/// What the images of one disk share while they are opened.
#[derive(Default)]
pub struct Chain {
    /// The images so far, from the topmost on: which files they are.
    above: Vec<(u64, u64)>,
    pub locks: Locks,
    /// Whether files are read and written past the host's cache.
    pub direct: bool,
}

/// Opens what an image lies over, then the image.
pub fn open(image: Image, write: bool, chain: &mut Chain) -> Result<Layer, Error> {
    let path = image.path.clone();
    let failed = |error| Error::io("open", &path, error);
    chain.above.push(image.id);
    match image.format {
        Format::Raw => {
            let file = ImageFile::new(host(image.file, chain.direct).map_err(failed)?, Shown::Whole);
            open_raw(file, false, &path)
        }
        Format::Qcow2 => {
            let mut header = qcow2::check(&image)?;
            if write {
                qcow2::check_counts(&image, &header)?;
            }
            let below = match header.backing.take() {
                Some(backing) => Some(open_backing(&path, backing, chain)?),
                None => None,
            };
            let file = |write: bool| {
                let shown = Shown::Qcow2 { l1: write.then(|| header.l1.clone()), masks: header.masks() };
                Ok(ImageFile::new(host(image.file.try_clone()?, chain.direct)?, shown))
            };
            let builder = imago::qcow2::Qcow2::builder(file(write).map_err(failed)?);
            let open =
                builder.backing(below).data_file(None).write(write).open(DenyImplicitOpenGate::default());
            let open = open.map_err(failed)?;
            if header.zstd {
                let again = file(false).map_err(failed)?;
                return Ok(FormatAccess::new(Zstd::new(open, again, &header).map_err(failed)?));
            }
            Ok(FormatAccess::new(open))
        }
        Format::Vmdk => open_vmdk(image, chain),
    }
}

fn open_backing(overlay: &Path, backing: qcow2::Backing, chain: &mut Chain) -> Result<Layer, Error> {
    let refused = |what| Err(Error::Chain { path: overlay.to_owned(), what });
    let path = folder(overlay).join(&backing.name);
    // Before it is locked, for an image over itself would seem in use.
    if fs::metadata(&path).is_ok_and(|about| chain.above.contains(&(about.dev(), about.ino()))) {
        return refused("itself");
    }
    if chain.above.len() >= MAX_IMAGES {
        return refused("more than 16 images");
    }
    let image = Image::open(&path, backing.format, false, &mut chain.locks)?;
    if backing.format.is_none() && image.format != Format::Raw {
        return Err(Error::BackingFormat {
            path: overlay.to_owned(),
            backing: backing.name,
            format: image.format,
        });
    }
    open(image, false, chain)
}

/// Bytes as they are.
fn open_raw(file: ImageFile, write: bool, path: &Path) -> Result<Layer, Error> {
    let raw = imago::raw::Raw::builder(file).write(write).open(DenyImplicitOpenGate::default());
    Ok(FormatAccess::new(raw.map_err(|error| Error::io("open", path, error))?))
}

/// A disk that reads as the one below, and keeps what is written in a file without a name.
pub fn over(below: Layer) -> io::Result<Layer> {
    // Of memory, as the usual place often is, there may be too little.
    let place = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    let file = tempfile::tempfile_in(place)?;
    let new = imago::qcow2::Qcow2::<imago::file::File>::create_builder(host(file.try_clone()?, false)?);
    new.size(below.size().next_multiple_of(512)).create()?;
    let builder = imago::qcow2::Qcow2::builder(ImageFile::new(host(file, false)?, Shown::Whole));
    let open = builder.backing(Some(below)).data_file(None).write(true).open(DenyImplicitOpenGate::default());
    Ok(FormatAccess::new(open?))
}

/// A raw image's file past the host's cache.
pub fn past_cache(image: &Image, write: bool) -> Result<Layer, Error> {
    let failed = |error| Error::io("open", &image.path, error);
    let host = host(image.file.try_clone().map_err(failed)?, true).map_err(failed)?;
    open_raw(ImageFile::new(host, Shown::Whole), write, &image.path)
}

/// A file for `imago`; if `direct`, opened anew past the host's cache.
fn host(file: File, direct: bool) -> io::Result<imago::file::File> {
    if !direct {
        return file.try_into();
    }
    let access = rustix::fs::fcntl_getfl(&file)? & OFlags::ACCMODE;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let file = rustix::fs::open(path, access | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty());
    let file = file.map_err(|error| match error {
        Errno::INVAL => {
            io::Error::other("its file system has no access past the host's cache; choose another cache=")
        }
        error => error.into(),
    })?;
    File::from(file).try_into()
}

fn open_vmdk(image: Image, chain: &mut Chain) -> Result<Layer, Error> {
    let failed = |error| Error::io("open", &image.path, error);
    if vmdk::is_sparse(&image.file).map_err(failed)? {
        let host = host(image.file.try_clone().map_err(failed)?, chain.direct).map_err(failed)?;
        let sparse = Sparse::open(&image, &host)?;
        return open_raw(ImageFile::new(host, Shown::Sparse(sparse)), false, &image.path);
    }
    let extents = Extents { folder: folder(&image.path), locks: &mut chain.locks };
    // By path, not by the open file: only so does imago know the folder of the extents.
    let builder = imago::vmdk::Vmdk::<ImageFile>::builder_path(&image.path);
    Ok(FormatAccess::new(builder.open(extents).map_err(failed)?))
}

/// Opens the files of a VMDK, from the folder of its descriptor only.
struct Extents<'a> {
    folder: &'a Path,
    locks: &'a mut Locks,
}

impl ImplicitOpenGate<ImageFile> for Extents<'_> {
    fn open_format<F: FormatDriverBuilder<ImageFile>>(&mut self, _: F) -> io::Result<Layer> {
        Err(io::Error::other("it lies over another image, which Lodge does not do for VMDK"))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<ImageFile> {
        let path = options.get_filename().filter(|path| folder(path) == self.folder);
        let path = path.ok_or_else(|| {
            io::Error::other("it names a file outside its own folder; convert it with qemu-img convert")
        })?;
        if self.locks.len() > MAX_EXTENTS {
            return Err(io::Error::other("it has more than 256 parts; convert it with qemu-img convert"));
        }
        open_locked(path, false, self.locks).map_err(io::Error::other)?;
        ImageFile::open(options.write(false))
    }
}

/// The folder that names in an image are relative to.
pub fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}
