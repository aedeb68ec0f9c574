//! System calls of waiting for children and watching them. EINTR stays here, as in `sys.rs`.

#![allow(unsafe_code)]

use crate::sys::{cerr, retry, timespec};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the caller has it from the kernel this moment.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

// -- waiting

/// Whom to wait for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which<'a> {
    /// This child and no other, whoever has its number by now.
    Pidfd(BorrowedFd<'a>),
    Pid(u32),
    Any,
}

/// How to wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// `None` all the same if the pidfd is non-blocking: poll it.
    Block,
    Now,
    /// Without blocking and without reaping.
    Peek,
}

/// What the kernel says of a child that has ended.
#[derive(Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) pid: u32,
    /// As wait(2) encodes it.
    pub(crate) status: i32,
    pub(crate) usage: libc::rusage,
}

/// waitid(2) with the child's resource usage, which libc's function leaves out. `None`: there is one, and it has not ended.
///
/// ECHILD: there is none, or somebody else took its status.
pub(crate) fn wait(which: Which<'_>, how: How) -> io::Result<Option<Ended>> {
    let (kind, id) = match which {
        Which::Pidfd(fd) => (libc::P_PIDFD, fd.as_raw_fd() as u32),
        Which::Pid(pid) => (libc::P_PID, pid),
        Which::Any => (libc::P_ALL, 0),
    };
    let flags = libc::WEXITED
        | match how {
            How::Block => 0,
            How::Now => libc::WNOHANG,
            How::Peek => libc::WNOHANG | libc::WNOWAIT,
        };
    // SAFETY: siginfo_t is plain data; the kernel says "nobody yet" by leaving si_pid 0.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: rusage is plain data.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both are live for the call.
    let waited = retry(|| unsafe { libc::syscall(libc::SYS_waitid, kind, id, &raw mut info, flags, &raw mut usage) });
    match waited {
        Ok(_) => {}
        // An event loop has made the pidfd non-blocking (Linux 5.10): it has not ended.
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return Ok(None),
        // A filter, or Linux 5.3, which has pidfds and cannot wait by them. For another's exact child by number there is no second way.
        Err(e) => {
            return match (e.raw_os_error(), which) {
                (Some(libc::ENOSYS | libc::EPERM), Which::Pid(pid)) if how != How::Peek => wait4(pid, how),
                _ => Err(e),
            };
        }
    }
    // SAFETY: waitid fills it in, or leaves it 0.
    let pid = unsafe { info.si_pid() };
    // SAFETY: as above.
    let value = unsafe { info.si_status() };
    if pid == 0 {
        return Ok(None);
    }
    let status = match info.si_code {
        libc::CLD_EXITED => (value & 0xff) << 8,
        libc::CLD_DUMPED => value | 0x80,
        _ => value,
    };
    Ok(Some(Ended { pid: pid as u32, status, usage }))
}

fn wait4(pid: u32, how: How) -> io::Result<Option<Ended>> {
    let mut status = 0;
    // SAFETY: rusage is plain data.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    let flags = if how == How::Block { 0 } else { libc::WNOHANG };
    // SAFETY: both are live for the call.
    let got = retry(|| unsafe { libc::wait4(pid as i32, &raw mut status, flags, &raw mut usage) }.into())?;
    Ok((got != 0).then_some(Ended { pid, status, usage }))
}

// -- signalling

/// A signal to the whole process group that the child leads, by its pidfd (Linux 6.9).
pub(crate) fn pidfd_signal_group(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    const PIDFD_SIGNAL_PROCESS_GROUP: u32 = 1 << 2;
    let (fd, none) = (pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: no siginfo is passed.
    cerr(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, PIDFD_SIGNAL_PROCESS_GROUP) }).map(drop)
}

pub(crate) fn kill_group(group: u32, signal: i32) -> io::Result<()> {
    // SAFETY: integers only.
    cerr(unsafe { libc::kill(-(group as i32), signal) }.into()).map(drop)
}

// -- epoll, timerfd

pub(crate) type Event = libc::epoll_event;
pub(crate) const NO_EVENT: Event = Event { events: 0, u64: 0 };

pub(crate) fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: an integer argument.
    cerr(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }.into()).map(owned)
}

/// Watches `fd` for reading, level-triggered.
pub(crate) fn epoll_add(epoll: BorrowedFd<'_>, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
    let mut event = Event { events: libc::EPOLLIN as u32, u64: key };
    // SAFETY: `event` is live.
    cerr(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &mut event) }.into())
        .map(drop)
}

/// Not there is as good as taken out.
pub(crate) fn epoll_del(epoll: BorrowedFd<'_>, fd: BorrowedFd<'_>) {
    let none = std::ptr::null_mut();
    // SAFETY: EPOLL_CTL_DEL looks at no event.
    unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd.as_raw_fd(), none) };
}

/// What is ready now; does not wait.
pub(crate) fn epoll_ready<'a>(epoll: BorrowedFd<'_>, into: &'a mut [Event]) -> io::Result<&'a [Event]> {
    let room = i32::try_from(into.len()).unwrap_or(i32::MAX);
    // SAFETY: room for that many events.
    let n = retry(|| unsafe { libc::epoll_wait(epoll.as_raw_fd(), into.as_mut_ptr(), room, 0) }.into())?;
    Ok(&into[..n as usize])
}

pub(crate) fn timer() -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    cerr(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) }.into())
        .map(owned)
}

/// Readable after so many ns from now, and not before; `None`: never.
pub(crate) fn timer_set(timer: BorrowedFd<'_>, after: Option<u64>) {
    let value = timespec(after.map_or(0, |ns| ns.max(1)));
    let when = libc::itimerspec { it_interval: timespec(0), it_value: value };
    // SAFETY: `when` is live, the old time is not asked for.
    unsafe { libc::timerfd_settime(timer.as_raw_fd(), 0, &when, std::ptr::null_mut()) };
}

// -- the SIGCHLD handler's socket

/// A byte to the other end, if `fd` is a socket that takes one at once. Async-signal-safe; errno is lost.
pub(crate) fn poke_socket(fd: RawFd) {
    let byte = 0u8;
    // SAFETY: one live byte. What is no socket says ENOTSOCK, and nobody gets SIGPIPE.
    unsafe { libc::send(fd, (&raw const byte).cast(), 1, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
}

/// Takes out what is there; false if `fd` is no socket any more.
pub(crate) fn drain_socket(fd: RawFd) -> bool {
    let mut byte = 0u8;
    loop {
        // SAFETY: room for one byte.
        let n = unsafe { libc::recv(fd, (&raw mut byte).cast(), 1, libc::MSG_DONTWAIT) };
        if n < 0 {
            return crate::sys::errno() == libc::EAGAIN;
        }
    }
}
