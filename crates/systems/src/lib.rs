//! Whole systems on disks.
//!
//! A *base* is a system made once from a distribution's packages and kept in the cache: a disk image that nobody writes to, with a
//! kernel and an initial RAM disk beside it. Lodge makes it with Lodge: the packages are unpacked on the host into one tar archive
//! ([`images::tree`]), and a VM turns that into a file system and lets the packages configure themselves. So neither root nor any
//! tool of the host's is needed.
//!
//! [`pulled`] images are fetched as they are: the distributions' own for clouds.
//!
//! An [`Instance`] is what one VM has of it: an overlay over one of these, and a seed with its name, its users and keys.
#![forbid(unsafe_code)]

mod base;
mod build;
mod error;
mod instance;
mod kernel;
mod layout;
mod packages;
pub mod pulled;
mod recipe;
mod seed;

pub use base::{Base, Listed, debian, list, remove};
pub use error::Error;
pub use instance::{Instance, Origin, Start, data_dir};
pub use packages::Packages;
pub use recipe::Release;
pub use seed::{Settings, is_name};
