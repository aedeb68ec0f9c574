//! What may run in a forked child of a process with threads: no allocation, no lock, system calls only.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::time::Duration;

/// A line built on the stack and written with one `write(2)`. Async-signal-safe. What does not fit is cut off.
pub struct Line {
    buf: [u8; 512],
    len: usize,
}

impl Line {
    pub const fn new() -> Line {
        Line { buf: [0; 512], len: 0 }
    }

    #[must_use]
    pub fn text(mut self, s: &str) -> Line {
        // The last byte is kept for the newline.
        for &b in s.as_bytes() {
            if self.len < self.buf.len() - 1 {
                self.buf[self.len] = b;
                self.len += 1;
            }
        }
        self
    }

    #[must_use]
    pub fn num(self, n: i64) -> Line {
        let mut digits = [0u8; 20];
        let mut at = digits.len();
        let mut rest = n.unsigned_abs();
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        let line = if n < 0 { self.text("-") } else { self };
        line.text(std::str::from_utf8(&digits[at..]).unwrap_or("?"))
    }

    /// Writes the line and a newline to standard error; a failure to do so is nobody's to hear.
    pub fn send(mut self) {
        self.buf[self.len] = b'\n';
        // SAFETY: the buffer is ours and initialised up to and with the newline just put at `len`, which `text` keeps
        // below the buffer's length.
        unsafe { libc::write(2, self.buf.as_ptr().cast(), self.len + 1) };
    }
}

/// `_exit`: no destructor, no atexit handler. Async-signal-safe.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no precondition.
    unsafe { libc::_exit(code) }
}

/// Async-signal-safe.
pub fn errno() -> i32 {
    // Reads the thread's errno, and keeps it as a number: no allocation.
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Async-signal-safe.
pub fn getpid() -> libc::pid_t {
    // SAFETY: no precondition.
    unsafe { libc::getpid() }
}

/// The whole of a small file, or as much as fits in `buf`. Async-signal-safe: how /proc is read in a child.
pub fn read_into<'a>(path: &CStr, buf: &'a mut [u8]) -> Result<&'a [u8], i32> {
    let fd = open(path, libc::O_RDONLY)?;
    let mut len = 0;
    while len < buf.len() {
        let rest = &mut buf[len..];
        // SAFETY: the pointer and the length are those of `rest`, which is ours to write.
        let got = unsafe { libc::read(fd.as_raw_fd(), rest.as_mut_ptr().cast(), rest.len()) };
        match got {
            0 => break,
            1.. => len += got.cast_unsigned(),
            _ if errno() == libc::EINTR => {}
            _ => return Err(errno()),
        }
    }
    Ok(&buf[..len])
}

/// Opens close-on-exec. Async-signal-safe.
pub fn open(path: &CStr, flags: i32) -> Result<OwnedFd, i32> {
    // SAFETY: `path` is a C string that outlives the call.
    let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
    owned(fd)
}

/// None where the kernel has no pidfd, refuses it, or the process is gone. Async-signal-safe.
pub fn pidfd_open(pid: libc::pid_t) -> Option<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(i32::try_from(fd).ok()?).ok()
}

/// An anonymous file: what a child writes there can be read after its end, whoever else still has it open.
pub fn memfd() -> OwnedFd {
    // SAFETY: the name is a C string literal.
    let fd = unsafe { libc::memfd_create(c"carefork-test".as_ptr(), libc::MFD_CLOEXEC) };
    let fd = owned(fd).expect("memfd_create");
    // Parents and children write at once, and the place where is theirs together: of two who begin at the same one, the other's line is lost.
    // SAFETY: numbers only.
    assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_APPEND) }, 0);
    fd
}

/// A duplicate out of the way of small numbers.
pub fn aside(fd: BorrowedFd<'_>) -> OwnedFd {
    // SAFETY: numbers only.
    owned(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 50) }).expect("a duplicate")
}

fn owned(fd: RawFd) -> Result<OwnedFd, i32> {
    if fd < 0 {
        return Err(errno());
    }
    // SAFETY: the kernel has just made this descriptor for our caller, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits until one of `fds` is readable, a signal arrives, or the time is over. Async-signal-safe but for the vector.
pub fn poll_readable(fds: &mut [libc::pollfd], time: Duration) {
    // Rounded up, so that a caller with a deadline does not spin through the last millisecond.
    let ms = i32::try_from(time.as_millis() + 1).unwrap_or(i32::MAX);
    // SAFETY: pointer and count are those of the slice.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, ms) };
}

pub fn pollfd(fd: RawFd) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

/// A bound, stretched by `CAREFORK_PATIENCE`: ten times as long unless told otherwise, since a machine with much else to do can be
/// that slow. 1 is for those who wait for a hang.
pub fn patience(bound: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor =
        *FACTOR.get_or_init(|| std::env::var("CAREFORK_PATIENCE").ok().and_then(|s| s.parse().ok()).unwrap_or(10));
    bound.saturating_mul(factor.max(1))
}
