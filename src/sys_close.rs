//! Closing spans of numbers where most are not open. Async-signal-safe.

#![allow(unsafe_code, clippy::disallowed_methods)]

use crate::sys;

/// Closes whatever is open in `first..=last`, a span too wide to try each number.
///
/// Three ways: close_range; where it is missing or refused, the numbers that /proc lists; without /proc, each number up to
/// the limit on open files (what a process opened before it lowered its limit stays).
#[unsafe(link_section = ".text_carefork")]
pub(crate) fn close_span(first: u32, last: u32) {
    let errno = sys::errno();
    // SAFETY: integers only. The caller is a child that gives these numbers up.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0;
    if !done && !close_listed(first, last) {
        close_each(first, last);
    }
    sys::set_errno(errno);
}

fn close(fd: u32) {
    // SAFETY: as in `close_span`. EBADF is harmless, EINTR closes on Linux.
    unsafe { libc::close(fd as i32) };
}

fn close_each(first: u32, last: u32) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is live.
    let r = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    let max = if r == 0 { limit.rlim_cur } else { 65536 };
    for fd in first..=last.min(u32::try_from(max).unwrap_or(u32::MAX).min(i32::MAX as u32)) {
        close(fd);
    }
}

/// False if /proc is not there.
fn close_listed(first: u32, last: u32) -> bool {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: the path is a C string.
    let dir = unsafe { libc::open(c"/proc/self/fd".as_ptr(), flags) };
    if dir < 0 {
        // No number left for it: the first of the span is to be closed anyway.
        if sys::errno() != libc::EMFILE || first == last {
            return false;
        }
        for fd in first..=last.min(i32::MAX as u32) {
            // SAFETY: as in `close`.
            if unsafe { libc::close(fd as i32) } == 0 {
                return close_listed(first, last);
            }
        }
        return false;
    }
    let complete = walk(dir, |fd| {
        if fd != dir as u32 && (first..=last).contains(&fd) {
            close(fd);
        }
    });
    // SAFETY: opened above and known to nobody else.
    unsafe { libc::close(dir) };
    complete
}

/// Calls `f` with each number that the directory `dir` lists; false if it could not be read to its end. Leaves errno alone.
pub(crate) fn walk(dir: i32, mut f: impl FnMut(u32)) -> bool {
    // struct linux_dirent64: inode 8, offset 8, record length 2, type 1, then the name with its final zero.
    const LENGTH: usize = 16;
    const NAME: usize = 19;
    let mut buf = [0u8; 2048];
    loop {
        // SAFETY: pointer and length are those of `buf`, which is ours to write.
        let got =
            unsafe { sys::raw(libc::SYS_getdents64, [dir as usize, buf.as_mut_ptr() as usize, buf.len(), 0, 0, 0]) };
        let Ok(got @ 1..) = usize::try_from(got) else { return got == 0 };
        let mut rest = &buf[..got];
        while rest.len() > NAME {
            let length = usize::from(u16::from_ne_bytes([rest[LENGTH], rest[LENGTH + 1]]));
            let Some(record) = rest.get(..length).filter(|r| r.len() > NAME) else { return false };
            if let Some(fd) = number(&record[NAME..]) {
                f(fd);
            }
            rest = &rest[length..];
        }
    }
}

/// The decimal number up to the zero byte; `None` for "." and "..".
fn number(name: &[u8]) -> Option<u32> {
    let digits = name.split(|&b| b == 0).next().filter(|d| !d.is_empty())?;
    digits.iter().try_fold(0u32, |n, &b| {
        let digit = b.is_ascii_digit().then(|| u32::from(b - b'0'))?;
        n.checked_mul(10)?.checked_add(digit)
    })
}
