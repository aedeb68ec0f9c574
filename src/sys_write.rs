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

/// As [`write`], without waiting: `WouldBlock` where there is no room, also if another thread took it since poll(2) said that there was. A
/// kernel that cannot be asked that (for pipes, those before 6.4) may wait then.
///
/// # Errors
/// As for [`write`].
pub(crate) fn write_now(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // Without waiting a file may take a part: what it has no page in memory for comes later, behind another's line.
    if is_regular(fd) {
        return write(fd, bytes);
    }
    let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // At the file's own place, as write(2).
    let at: libc::c_long = -1;
    // SAFETY: one live iovec with the pointer and the length of `bytes`, which are only read.
    let n = unsafe { libc::syscall(libc::SYS_pwritev2, fd, &raw const part, 1, at, at, libc::RWF_NOWAIT) };
    match usize::try_from(n) {
        Ok(n @ 1..) => Ok(n),
        Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => {
            Err(io::ErrorKind::WouldBlock.into())
        }
        // Refused, interrupted, or an error that write(2) gives as well.
        _ => write(fd, bytes),
    }
}

/// Sleeps until `fd` takes a write, or will say why not, for no longer than `ms` (-1: without end); whether it does. A signal ends it too.
pub(crate) fn wait_writable(fd: RawFd, ms: i32) -> bool {
    let mut p = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&mut p, 1, ms) == 1 }
}

/// Whether `fd` is a regular file, which takes a write of any length in one piece.
pub(crate) fn is_regular(fd: RawFd) -> bool {
    file_type(fd) == libc::S_IFREG
}

/// Whether `fd` is a pipe, which takes a write of up to `PIPE_BUF` bytes in one piece.
pub(crate) fn is_pipe(fd: RawFd) -> bool {
    file_type(fd) == libc::S_IFIFO
}

fn file_type(fd: RawFd) -> libc::mode_t {
    // SAFETY: stat is plain data.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `st` is live; where it fails it stays zero, which is no type.
    unsafe { libc::fstat(fd, &mut st) };
    st.st_mode & libc::S_IFMT
}

/// Runs `f` when the process ends by exit(3) or the return of `main`; false if libc has no room for it.
pub(crate) fn at_exit(f: extern "C" fn()) -> bool {
    // SAFETY: `f` is a function of this library, which may not be unloaded.
    unsafe { libc::atexit(f) == 0 }
}
