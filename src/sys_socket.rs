//! What the kernel calls a socket that none of its tables lists.

#![allow(unsafe_code)]

use std::ffi::CStr;

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
