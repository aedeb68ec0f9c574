//! The parent's hold on one child (C1): pid, pidfd, wait, signals.

use crate::carefd::CareFd;
use crate::reap::body::{Body, FIRST_PAUSE};
use crate::reap::exit::Exit;
use crate::reap::known::Began;
use crate::reap::orphans;
use crate::sys_reap::How;
use crate::{clock, sys};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::time::Duration;

/// A child of this process.
///
/// Waiting goes by pidfd: a status is this child's or it is lost, never that of another child with the same number
/// ([without pidfds](crate::Reaper#without-pidfds) less is promised). Dropping
/// a `Child` neither kills nor waits: once it has ended, a [`Reaper`](crate::Reaper) or the next fork or wait of carefork's
/// reaps it. In a child of this process it is nobody's: waiting and signalling are refused there.
#[derive(Debug)]
pub struct Child {
    /// The writing end of its standard input, where [`Command`](crate::Command) was asked for a pipe.
    pub stdin: Option<CareFd<PipeWriter>>,
    /// The reading end of its standard output, where [`Command`](crate::Command) was asked for a pipe.
    pub stdout: Option<CareFd<PipeReader>>,
    /// The reading end of its standard error, where [`Command`](crate::Command) was asked for a pipe.
    pub stderr: Option<CareFd<PipeReader>>,
    body: Body,
    /// Apart, since a `Child` is moved more often than it ends.
    exit: Option<Box<Exit>>,
}

/// This process's ends of a child's standard streams.
pub(crate) struct Pipes(Option<CareFd<PipeWriter>>, Option<CareFd<PipeReader>>, Option<CareFd<PipeReader>>);

impl Child {
    /// After a fork that succeeded: nothing here can fail it.
    pub(crate) fn new(pid: u32, watched: bool, began: Began) -> Self {
        Child::from_body(Body::new(pid, watched, began), None)
    }

    /// With the pidfd that the kernel made together with the child.
    pub(crate) fn with_pidfd(pid: u32, pidfd: Option<OwnedFd>, began: Began) -> Self {
        Child::from_body(Body::with_pidfd(pid, pidfd, began), None)
    }

    /// What it was told to be.
    pub(crate) fn known_as(mut self, name: Option<&str>, leads: bool) -> Self {
        self.body.name = name.map(Into::into);
        self.body.leads = leads;
        self
    }

    /// But for the pipes, which are to be taken before: [`Child::take_pipes`].
    pub(crate) fn into_parts(mut self) -> (Body, Option<Exit>) {
        (std::mem::replace(&mut self.body, Body::nobody()), self.exit.take().map(|e| *e))
    }

    pub(crate) fn from_body(body: Body, exit: Option<Exit>) -> Self {
        Child { stdin: None, stdout: None, stderr: None, body, exit: exit.map(Box::new) }
    }

    /// ECHILD in a process that is not the parent.
    pub(crate) fn check_parent(&self) -> io::Result<()> {
        self.body.check_parent()
    }

    pub(crate) fn take_pipes(&mut self) -> Pipes {
        Pipes(self.stdin.take(), self.stdout.take(), self.stderr.take())
    }

    pub(crate) fn with_pipes(mut self, Pipes(stdin, stdout, stderr): Pipes) -> Self {
        (self.stdin, self.stdout, self.stderr) = (stdin, stdout, stderr);
        self
    }

    /// Of this process, and not of one that it was forked from.
    pub(crate) fn is_ours(&self) -> bool {
        self.body.is_ours()
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.body.pid
    }

    /// Hands the child over by its number, to code that waits for it by itself: it is not reaped from here any more, but by a reaper that
    /// reaps every child of the process, to which it is a stranger now. That reaper may have done so before: then there is nobody to wait for, and
    /// [`Reaper::on_unknown`](crate::Reaper::on_unknown) is told.
    ///
    /// ```
    /// // SAFETY: the child uses nothing of the parent's.
    /// let pid = unsafe { carefork::spawn(|| 0) }?.into_id();
    /// // SAFETY: no status is asked for.
    /// assert_eq!(unsafe { libc::waitpid(pid as i32, std::ptr::null_mut(), 0) }, pid as i32);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn into_id(self) -> u32 {
        let (body, _) = self.into_parts();
        if body.is_ours() {
            body.disown();
        }
        body.pid
    }

    /// The name it was given ([`ForkOptions::name`](crate::ForkOptions::name)); a program's, without its directory.
    pub fn name(&self) -> Option<&str> {
        self.body.name.as_deref().or_else(|| self.exit.as_ref()?.name.as_deref())
    }

    /// The pidfd, readable once the child has ended; a care-fd, so that it does not linger in other children; open until the `Child` is
    /// dropped, for event loops that have it still. `None` where the kernel or
    /// a filter refused one, or [`ForkOptions::pidfd`](crate::ForkOptions::pidfd) said so: then everything else works by number, as well as
    /// that can be ([without pidfds](crate::Reaper#without-pidfds)).
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.body.pidfd()
    }

    /// All about its end, once a wait has said that it ended: status, times, memory. Also where the status was lost, and the wait failed.
    pub fn exit(&self) -> Option<&Exit> {
        self.exit.as_deref()
    }

    /// Waits for the child to end and reaps it; the same status again afterwards. Closes `stdin` first, for which the child may wait.
    ///
    /// # Errors
    /// ECHILD if somebody else took the status (`waitpid(-1)`, an ignored SIGCHLD), or in a process that is not the parent.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        drop(self.stdin.take());
        orphans::reap();
        let mut pause = FIRST_PAUSE;
        loop {
            if let Some(status) = self.look(How::Block)? {
                return Ok(status);
            }
            self.body.doze(u64::MAX, &mut pause)?;
        }
    }

    /// The status if the child has ended.
    ///
    /// # Errors
    /// As for [`Child::wait`].
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        orphans::reap();
        self.look(How::Now)
    }

    /// Waits at most `limit`; `None` if the child runs on.
    ///
    /// # Errors
    /// As for [`Child::wait`].
    pub fn wait_timeout(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        orphans::reap();
        let deadline = after(limit);
        let mut pause = FIRST_PAUSE;
        loop {
            if let Some(status) = self.look(How::Now)? {
                return Ok(Some(status));
            }
            let left = deadline.saturating_sub(clock::now());
            if left == 0 {
                return Ok(None);
            }
            self.body.doze(left, &mut pause)?;
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
        self.body.check_parent()?;
        if self.exit.is_some() { Ok(()) } else { self.body.signal(signal) }
    }

    /// Sends a signal to the child and to all in its process group, if it was made to lead one
    /// ([`ForkOptions::new_session`](crate::ForkOptions::new_session), [`Command::session`](crate::Command::session),
    /// [`Command::process_group`](crate::Command::process_group) 0); else to the child. Nobody once the child was reaped: the group's
    /// number may be another's then.
    ///
    /// # Errors
    /// As for [`Child::kill`].
    pub fn signal_group(&self, signal: i32) -> io::Result<()> {
        self.body.check_parent()?;
        if self.exit.is_some() { Ok(()) } else { self.body.signal_all(signal) }
    }

    /// Ends the child: SIGTERM (and SIGCONT, should it be stopped), and SIGKILL after `grace`.
    ///
    /// One that was made to lead a process group ([`Child::signal_group`]) takes that with it: what is left of the group when the
    /// leader has ended or the grace is over gets SIGKILL. (Not before Linux 6.9 if another wait of this process has reaped the leader by then.)
    ///
    /// # Errors
    /// As for [`Child::wait`]. `TimedOut` if it has not ended five seconds after SIGKILL (a system call that cannot be
    /// interrupted): it is this child still, and reaped later.
    ///
    /// ```
    /// use std::{thread, time::Duration};
    /// let asleep = || -> i32 { loop { thread::sleep(Duration::from_secs(1)) } };
    /// // SAFETY: the child uses nothing of the parent's.
    /// let mut child = unsafe { carefork::spawn(asleep) }?;
    /// let status = child.terminate(Duration::from_secs(1))?;
    /// assert!(!status.success());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn terminate(&mut self, grace: Duration) -> io::Result<ExitStatus> {
        self.body.check_parent()?;
        if self.exit.is_some() {
            return self.wait();
        }
        self.body.ask_to_end()?;
        if self.body.leads {
            // A leader that has ended keeps its number, for its group's sake, until the group was killed.
            let deadline = after(grace);
            let mut pause = FIRST_PAUSE;
            while !self.body.has_died() {
                let left = deadline.saturating_sub(clock::now());
                if left == 0 {
                    break;
                }
                self.body.doze(left, &mut pause)?;
            }
        } else if let Some(status) = self.wait_timeout(grace)? {
            return Ok(status);
        }
        self.body.signal_all(libc::SIGKILL)?;
        // By the real clock: the kernel's work, not the child's.
        let end = sys::monotonic().saturating_add(AFTER_KILL);
        let mut pause = FIRST_PAUSE;
        loop {
            if let Some(status) = self.look(How::Now)? {
                return Ok(status);
            }
            let left = end.saturating_sub(sys::monotonic());
            if left == 0 {
                let pid = self.body.pid;
                let text = format!("child {pid} was sent SIGKILL and has not ended within 5 s; drop it, or wait on");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            self.body.doze(left, &mut pause)?;
        }
    }

    fn look(&mut self, how: How) -> io::Result<Option<ExitStatus>> {
        self.body.check_parent()?;
        if self.exit.is_none() {
            let Some(record) = self.body.look(how)? else { return Ok(None) };
            self.exit = Some(Box::new(self.body.exit(record)));
        }
        match self.exit().and_then(Exit::exit_status) {
            Some(status) => Ok(Some(status)),
            None => Err(io::Error::from_raw_os_error(libc::ECHILD)),
        }
    }
}

/// How long the kernel has for a child that was killed, ns.
const AFTER_KILL: u64 = 5_000_000_000;

fn after(limit: Duration) -> u64 {
    clock::now().saturating_add(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX))
}

/// The pidfd, for poll(2) and event loops: readable once the child has ended. Wait for it then; never read from it.
impl AsFd for Child {
    /// # Panics
    /// If there is none: [`Child::pidfd`] asks.
    #[track_caller]
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self.pidfd() {
            Some(fd) => fd,
            None => panic!("child {} has no pidfd here; Child::pidfd tells, and a Reaper does without", self.body.pid),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.exit.is_none() {
            orphans::adopt(std::mem::replace(&mut self.body, Body::nobody()));
        }
    }
}
