//! The system calls of the log: plain writes to descriptors, and the process's end.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

/// write(2), begun again after EINTR; how many bytes went out, at least one.
///
/// # Errors
/// errno's; `WriteZero` where the kernel takes nothing and gives no reason.
pub(crate) fn write(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the pointer and the length are those of `bytes`.
        let n = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(n) {
            Ok(0) if !bytes.is_empty() => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => return Ok(n),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

/// Sleeps until `fd` takes a write, or will say why not.
pub(crate) fn wait_writable(fd: RawFd) {
    let mut p = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one live pollfd. The caller writes again whatever the answer is, so EINTR needs no care.
    unsafe { libc::poll(&mut p, 1, -1) };
}

/// Whether `fd` is a regular file, which takes a write of any length in one piece.
pub(crate) fn is_regular(fd: RawFd) -> bool {
    // SAFETY: stat is plain data.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `st` is live.
    let r = unsafe { libc::fstat(fd, &mut st) };
    r == 0 && st.st_mode & libc::S_IFMT == libc::S_IFREG
}

/// Runs `f` when the process ends by exit(3) or the return of `main`; false if libc has no room for it.
pub(crate) fn at_exit(f: extern "C" fn()) -> bool {
    // SAFETY: `f` is a function of this library, which may not be unloaded.
    unsafe { libc::atexit(f) == 0 }
}
