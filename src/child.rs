//! The parent's hold on one child (C1's first part): pid, pidfd, wait, kill.

use crate::carefd::{CareFd, OnFork};
use crate::region::no_forking;
use crate::{clock, runtime, sys};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

/// A child of this process.
///
/// Dropping it neither kills nor waits: an unreaped child stays a zombie until this process waits for it or ends. In a
/// child of this process it is nobody's: waiting and killing are refused there.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    /// A care-fd: a sibling forked later has no use for it.
    pidfd: Option<CareFd<OwnedFd>>,
    status: Option<ExitStatus>,
    generation: u64,
}

impl Child {
    /// After a fork that succeeded: nothing here can fail it.
    pub(crate) fn new(pid: u32, watched: bool) -> Self {
        let pidfd = if watched { watch(pid) } else { None };
        Child { pid, pidfd, status: None, generation: runtime::generation() }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.pid
    }

    /// The pidfd, readable once the child has ended; a care-fd, so that it does not linger in other children. `None` where the kernel or
    /// a filter refused one, or [`ForkOptions::pidfd`](crate::ForkOptions::pidfd) said so: then everything else works still, with the pid.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().and_then(CareFd::get).map(AsFd::as_fd)
    }

    /// Waits for the child to end and reaps it; the same status again afterwards.
    ///
    /// # Errors
    /// ECHILD if somebody else took the status (`waitpid(-1)`, an ignored SIGCHLD), or in a process that is not the parent.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.look(true)? {
                return Ok(status);
            }
        }
    }

    /// The status if the child has ended.
    ///
    /// # Errors
    /// As for [`Child::wait`].
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.look(false)
    }

    /// Waits at most `limit`; `None` if the child runs on.
    ///
    /// # Errors
    /// As for [`Child::wait`].
    pub fn wait_timeout(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        let deadline = clock::now().saturating_add(limit);
        let mut pause = 100_000;
        loop {
            if let Some(status) = self.look(false)? {
                return Ok(Some(status));
            }
            let left = deadline.saturating_sub(clock::now());
            if left == 0 {
                return Ok(None);
            }
            match &self.pidfd {
                Some(fd) => {
                    let ms = i32::try_from(clock::real_wait(left).div_ceil(1_000_000)).unwrap_or(i32::MAX);
                    match sys::poll_in(fd.as_fd(), ms) {
                        Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
                        _ => {}
                    }
                }
                // Without a pidfd nothing tells of one child's end but asking.
                None => {
                    sys::sleep(pause.min(left));
                    pause = (pause * 2).min(10_000_000);
                }
            }
        }
    }

    /// Sends SIGKILL. A child that has been reaped is left alone.
    ///
    /// # Errors
    /// As kill(2); ECHILD in a process that is not the parent.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(libc::SIGKILL)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// As for [`Child::kill`].
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        self.check_parent()?;
        if self.status.is_some() {
            return Ok(());
        }
        match &self.pidfd {
            Some(fd) => match sys::pidfd_signal(fd.as_fd(), signal) {
                // Ended: the same as reaped.
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                // An old kernel; a filter.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => self.signal_by_pid(signal),
                r => r,
            },
            None => self.signal_by_pid(signal),
        }
    }

    /// The number is somebody else's once the child was reaped by another `waitpid`. One that comes between the two calls cannot
    /// be seen: that is what a pidfd is for.
    fn signal_by_pid(&self, signal: i32) -> io::Result<()> {
        if sys::is_unreaped(self.pid) { sys::kill(self.pid, signal) } else { Ok(()) }
    }

    fn check_parent(&self) -> io::Result<()> {
        if runtime::generation() == self.generation {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(libc::ECHILD))
    }

    fn look(&mut self, block: bool) -> io::Result<Option<ExitStatus>> {
        self.check_parent()?;
        if self.status.is_none() {
            match sys::reap(self.pid, block)? {
                None => {}
                Some(Some(raw)) => self.status = Some(ExitStatus::from_raw(raw)),
                Some(None) => return Err(io::Error::from_raw_os_error(libc::ECHILD)),
            }
        }
        Ok(self.status)
    }
}

fn watch(pid: u32) -> Option<CareFd<OwnedFd>> {
    let region = no_forking();
    let pidfd = region.care_cloexec(OnFork::Cleanup, sys::pidfd_open(pid).ok()?).ok()?;
    drop(region);
    // The number is this child's as long as nobody has reaped it: then so is the pidfd, which was opened before.
    sys::is_unreaped(pid).then_some(pidfd)
}
