//! Guest memory: one block of host memory that holds all of a guest's RAM and ROM, and the memory of
//! its devices that it sees as its own ([`Window`]). Some of its RAM may come and go ([`Pluggable`]).
//!
//! Three views of the same bytes:
//! * by guest-physical address through [`vm_memory`]'s traits ([`Memory::guest`]), for loaders and devices;
//! * by *offset* into the block ([`Memory::load`], [`Memory::store`], …), for engines, whose TLBs hold offsets: a bounds
//!   check and a host access, nothing else;
//! * as host mappings ([`Memory::slots`]), for KVM.
//!
//! Every store, by whichever way, tells the [`code::CodeMap`], so that an engine that caches decoded or translated code
//! learns that it changed.
//!
//! Guest memory is shared between vCPU threads and devices, with data races that the guest decides on. It is never
//! borrowed as a Rust reference: all accesses are copies through volatile or atomic operations.

mod alias;
pub mod code;
mod guest;
mod layout;
mod plugs;
mod ram;
mod view;
mod windows;

pub use alias::Alias;
pub use code::{CodeMap, order_threads, order_threads_is_exact};
pub use guest::Guest;
pub use layout::{HOLE_END, HOLE_START, Kind, Region, layout};
pub use plugs::{PLUG_ALIGN, PLUG_MOST, Pluggable, block_size, plug_start};
pub use ram::{Error, Int, Memory, Slot};
pub use windows::{Keeper, Window};

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// A guest-physical address.
pub type Gpa = u64;
