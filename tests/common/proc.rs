//! What /proc says about a process. Nothing here but [`fds_of`] and [`temp_dir`] allocates, so a forked child can ask about itself.

use super::raw;
use std::ffi::CStr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// Where temporary files go, by the name that /proc has for it: `TMPDIR` may lead there by links.
pub fn temp_dir() -> PathBuf {
    std::env::temp_dir().canonicalize().expect("a directory for temporary files")
}

/// Open descriptors, in a buffer of fixed size.
pub struct FdList {
    fds: [i32; 1024],
    len: usize,
    /// More were open than the buffer holds.
    pub truncated: bool,
}

impl FdList {
    /// The numbers, rising.
    pub fn as_slice(&self) -> &[i32] {
        &self.fds[..self.len]
    }

    pub fn contains(&self, fd: i32) -> bool {
        self.as_slice().binary_search(&fd).is_ok()
    }

    /// The first number that is here and not in `other`.
    pub fn first_not_in(&self, other: &FdList) -> Option<i32> {
        self.as_slice().iter().copied().find(|&fd| !other.contains(fd))
    }
}

/// This process's open descriptors, without the one used to look. Async-signal-safe.
pub fn self_fds() -> FdList {
    let mut list = FdList { fds: [0; 1024], len: 0, truncated: false };
    let walked = for_each_fd(c"/proc/self/fd", |fd| {
        if list.len < list.fds.len() {
            list.fds[list.len] = fd;
            list.len += 1;
        } else {
            list.truncated = true;
        }
    });
    if let Err(errno) = walked {
        raw::Line::new().text("cannot list /proc/self/fd: errno ").num(errno.into()).send();
        raw::exit_now(78);
    }
    list.fds[..list.len].sort_unstable();
    list
}

/// Calls `f` with each number in a `/proc/.../fd` directory but the walker's own. Async-signal-safe if `f` is.
pub fn for_each_fd(dir: &CStr, mut f: impl FnMut(i32)) -> Result<(), i32> {
    // struct linux_dirent64: inode 8, offset 8, record length 2, type 1, then the name with its final zero.
    const RECLEN: usize = 16;
    const NAME: usize = 19;
    let dir = raw::open(dir, libc::O_RDONLY | libc::O_DIRECTORY)?;
    let own = dir.as_raw_fd();
    let mut buf = [0u8; 4096];
    loop {
        // SAFETY: pointer and length are those of `buf`, which is ours to write.
        let got = unsafe { libc::syscall(libc::SYS_getdents64, own, buf.as_mut_ptr(), buf.len()) };
        let Ok(got) = usize::try_from(got) else { return Err(raw::errno()) };
        if got == 0 {
            return Ok(());
        }
        let mut at = 0;
        while at < got {
            let record = usize::from(u16::from_ne_bytes([buf[at + RECLEN], buf[at + RECLEN + 1]]));
            let name = buf[at + NAME..at + record].split(|&b| b == 0).next().unwrap_or(&[]);
            // "." and ".." are no numbers; the directory we read through is listed only in our own.
            if let Some(fd) = decimal(name).and_then(|n| i32::try_from(n).ok())
                && fd != own
            {
                f(fd);
            }
            at += record;
        }
    }
}

/// The descriptors of another process with what they point to, rising. One that closes meanwhile is left out.
pub fn fds_of(pid: libc::pid_t) -> std::io::Result<Vec<(i32, PathBuf)>> {
    let mut fds = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|s| s.parse().ok());
        if let (Some(number), Ok(target)) = (number, std::fs::read_link(entry.path())) {
            fds.push((number, target));
        }
    }
    fds.sort();
    Ok(fds)
}

/// The lines of `/proc/.../status` that say whether a process is clean. Bit n-1 of a set is signal n.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    pub sig_blk: u64,
    pub sig_ign: u64,
    pub sig_cgt: u64,
    pub threads: u32,
    pub ppid: i32,
    pub tracer: i32,
}

impl Status {
    pub fn blocks(&self, signal: i32) -> bool {
        self.sig_blk >> (signal - 1) & 1 == 1
    }

    pub fn ignores(&self, signal: i32) -> bool {
        self.sig_ign >> (signal - 1) & 1 == 1
    }

    pub fn catches(&self, signal: i32) -> bool {
        self.sig_cgt >> (signal - 1) & 1 == 1
    }
}

/// The calling *thread's* status: the mask is a thread's, `/proc/self/status` would give the first thread's.
/// Async-signal-safe.
pub fn status_here() -> Result<Status, i32> {
    status_at(c"/proc/thread-self/status")
}

/// A process's status; the mask is that of its first thread. Async-signal-safe.
pub fn status_of(pid: libc::pid_t) -> Result<Status, i32> {
    let mut path = [0u8; 32];
    let mut len = 0;
    let mut put = |bytes: &[u8]| {
        path[len..len + bytes.len()].copy_from_slice(bytes);
        len += bytes.len();
    };
    let mut digits = [0u8; 10];
    let mut at = digits.len();
    let mut rest = pid;
    while rest > 0 {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    put(b"/proc/");
    put(&digits[at..]);
    put(b"/status\0");
    status_at(CStr::from_bytes_until_nul(&path).map_err(|_| libc::EINVAL)?)
}

/// How many threads this process has. Async-signal-safe.
pub fn thread_count() -> u32 {
    status_here().map_or(0, |s| s.threads)
}

fn status_at(path: &CStr) -> Result<Status, i32> {
    let mut buf = [0u8; 4096];
    let text = raw::read_into(path, &mut buf)?;
    let field = |name: &[u8]| {
        let line = text.split(|&b| b == b'\n').find(|l| l.starts_with(name)).ok_or(libc::ENOENT)?;
        Ok::<_, i32>(line[name.len()..].trim_ascii())
    };
    let set = |name| field(name).and_then(|v| number(v, 16).ok_or(libc::EINVAL));
    let count = |name| field(name).and_then(|v| decimal(v).ok_or(libc::EINVAL));
    Ok(Status {
        sig_blk: set(b"SigBlk:")?,
        sig_ign: set(b"SigIgn:")?,
        sig_cgt: set(b"SigCgt:")?,
        threads: count(b"Threads:")? as u32,
        ppid: count(b"PPid:")? as i32,
        tracer: count(b"TracerPid:")? as i32,
    })
}

fn decimal(bytes: &[u8]) -> Option<u64> {
    number(bytes, 10)
}

fn number(bytes: &[u8], base: u32) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(bytes).ok()?, base).ok()
}
