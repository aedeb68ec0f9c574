//! What a socket is: by its path, and by its own word.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::RawFd;

/// The protocol of the socket that `path` (a link in `/proc/PID/fd`) leads to: `TCP`, `UDPv6`, `UNIX-STREAM`, `NETLINK`.
/// `None` if it leads to no socket, or the kernel does not say.
pub(crate) fn protocol(path: &CStr) -> Option<String> {
    let mut name = [0u8; 64];
    // SAFETY: two C strings, and a buffer of that length.
    let n = unsafe {
        libc::getxattr(path.as_ptr(), c"system.sockprotoname".as_ptr(), name.as_mut_ptr().cast(), name.len())
    };
    let name = name.get(..usize::try_from(n).ok()?)?;
    // It comes with its NUL.
    let name = name.split(|&b| b == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned())
}

/// What a socket of this process says of itself.
pub(crate) struct Said {
    pub(crate) family: i32,
    pub(crate) kind: i32,
    pub(crate) listens: bool,
    /// Of a Unix socket that has one, as the kernel's table shows it, `@` for NUL.
    pub(crate) name: Option<Vec<u8>>,
}

/// `None` if the number is no socket's, or the kernel does not say.
pub(crate) fn said(number: RawFd) -> Option<Said> {
    let family = option(number, libc::SO_DOMAIN)?;
    let name = if family == libc::AF_UNIX { unix_name(number) } else { None };
    let (kind, listens) = (option(number, libc::SO_TYPE)?, option(number, libc::SO_ACCEPTCONN)? != 0);
    Some(Said { family, kind, listens, name })
}

fn option(number: RawFd, name: libc::c_int) -> Option<i32> {
    let (mut value, mut len) = (0i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: an integer, and its length.
    let done = unsafe { libc::getsockopt(number, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len) };
    (done == 0).then_some(value)
}

fn unix_name(number: RawFd) -> Option<Vec<u8>> {
    // SAFETY: all zeroes are a valid sockaddr_storage.
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: there is room for `len` bytes.
    if unsafe { libc::getsockname(number, (&raw mut address).cast(), &raw mut len) } != 0 {
        return None;
    }
    // SAFETY: plain data, all of it written.
    let bytes: [u8; size_of::<libc::sockaddr_storage>()] = unsafe { std::mem::transmute(address) };
    let name = bytes.get(size_of::<libc::sa_family_t>()..len as usize)?;
    match name {
        [] => None,
        [0, ..] => Some(name.iter().map(|&b| if b == 0 { b'@' } else { b }).collect()),
        _ => name.split(|&b| b == 0).next().map(<[u8]>::to_vec),
    }
}
