//! What a guest's screen is shown on, and where its keyboard and mouse come from.
//!
//! A [`Screen`] belongs to a VM and outlives resets of its machine. The display device of each machine is its [`Source`], which
//! draws a [`Picture`] when somebody looks: nothing is drawn for nobody. Keyboards and mice are its [`Input`]s. On the other side
//! are viewers: [`vnc`] servers, PNG files ([`Picture::png`]), and whoever types.
#![forbid(unsafe_code)]

pub mod edid;
mod key;
mod picture;
mod screen;
pub mod vnc;

pub use key::{Key, Stroke};
pub use picture::{Cursor, MAX_SIDE, Picture, Rect};
pub use screen::{Changes, Input, Point, Screen, Source};

use std::sync::{Mutex, MutexGuard};

/// Locks; a thread that panicked with the lock leaves what it was.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
