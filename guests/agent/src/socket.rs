//! Virtio sockets, which the standard library does not know.

use std::fs::File;
use std::io::{self, Error};
use std::mem::{size_of, zeroed};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// What `call` gave, unless it is -1.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

/// A socket that listens at `port`.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: it takes numbers; what it gives is ours alone.
    let socket = unsafe {
        OwnedFd::from_raw_fd(check(libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0))?)
    };
    // SAFETY: zeroes are a value of this structure.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = port;
    address.svm_cid = libc::VMADDR_CID_ANY;
    let size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is of this size, and lives until it returns.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    // SAFETY: it takes numbers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 128) })?;
    Ok(socket)
}

/// The next stream, if it comes from the host.
pub fn accept(listener: &OwnedFd) -> io::Result<Option<File>> {
    // SAFETY: zeroes are a value of this structure.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    let mut size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let (to, len) = ((&raw mut address).cast(), &raw mut size);
    // SAFETY: there is room for an address of this size; what it gives is ours alone.
    let stream = unsafe {
        File::from_raw_fd(check(libc::accept4(listener.as_raw_fd(), to, len, libc::SOCK_CLOEXEC))?)
    };
    Ok((address.svm_cid == libc::VMADDR_CID_HOST).then_some(stream))
}

/// Ends a stream in one direction or both.
pub fn shutdown(stream: &File, how: Shutdown) {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // SAFETY: it takes numbers. It fails where the other side has ended it.
    unsafe { libc::shutdown(stream.as_raw_fd(), how) };
}
