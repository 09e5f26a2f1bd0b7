//! A VNC server: the RFB protocol, versions 3.3 to 3.8 (RFC 6143, and the community's `rfbproto` for what came later), plain or in
//! WebSockets on the same port, so that noVNC in a browser can show the screen.
//!
//! [`Session`] is the protocol without any socket: bytes in, bytes out. [`Server`] listens, and gives each viewer a thread.

mod encode;
mod server;
mod session;
#[cfg(test)]
mod tests;
mod wire;

pub use server::{Address, Error, Server};
pub use session::{Gone, Session};

/// Encodings, and what viewers understand beside them, by their numbers.
mod encoding {
    pub const RAW: i32 = 0;
    pub const ZLIB: i32 = 6;
    pub const ZRLE: i32 = 16;
    pub const DESKTOP_SIZE: i32 = -223;
    pub const CURSOR: i32 = -239;
    pub const QEMU_KEY: i32 = -258;
    pub const EXTENDED_DESKTOP_SIZE: i32 = -308;
}
