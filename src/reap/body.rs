//! A child as all its holders see it: `Child`, a reaper's table, the orphans.

use super::exit::{Ending, Exit, Record};
use super::known::{self, Began, Holder, children};
use super::orphans;
use crate::carefd::{CareFd, OnFork};
use crate::region::no_forking;
use crate::sys_reap::{self, How, Which};
use crate::{clock, runtime, sys};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) pid: u32,
    /// A care-fd: a sibling forked later has no use for it.
    pidfd: Option<CareFd<OwnedFd>>,
    /// It leads a session of its own, and so a process group.
    pub(crate) leads: bool,
    /// It was asked to end, with its group: what is left of the group when it has ended is to be killed.
    ending: bool,
    /// Written down in `known`.
    known: bool,
    start: u64,
    generation: u64,
    pub(crate) name: Option<Box<str>>,
}

impl Body {
    /// After a fork that succeeded: nothing here can fail it.
    pub(crate) fn new(pid: u32, watched: bool, began: Began) -> Self {
        Self::with(pid, if watched { watch(pid) } else { None }, began)
    }

    /// With a pidfd that came with the child.
    pub(crate) fn with_pidfd(pid: u32, pidfd: Option<OwnedFd>, began: Began) -> Self {
        Self::with(pid, pidfd.and_then(|fd| CareFd::new(fd).ok()), began)
    }

    fn with(pid: u32, pidfd: Option<CareFd<OwnedFd>>, began: Began) -> Self {
        let generation = runtime::generation();
        if pidfd.is_none() {
            // Only what is forked from now on can tell whether the number is still this child's.
            known::want();
        }
        let mut body =
            Body { pid, pidfd, leads: false, ending: false, known: false, start: clock::now(), generation, name: None };
        if known::is_wanted() {
            body.write_down_as(Some(began));
        }
        body
    }

    /// In the place of one that was handed on.
    pub(crate) fn nobody() -> Self {
        Body {
            pid: 0,
            pidfd: None,
            leads: false,
            ending: false,
            known: false,
            start: 0,
            generation: u64::MAX,
            name: None,
        }
    }

    pub(crate) fn without_pidfd(mut self) -> Self {
        // First: the entry there has its number.
        self.cross_out();
        self.known = false;
        self.pidfd = None;
        self
    }

    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().and_then(CareFd::get).map(AsFd::as_fd)
    }

    pub(crate) fn has_pidfd(&self) -> bool {
        self.pidfd.is_some()
    }

    pub(crate) fn is_ours(&self) -> bool {
        runtime::generation() == self.generation
    }

    pub(crate) fn check_parent(&self) -> io::Result<()> {
        if self.is_ours() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ECHILD)) }
    }

    /// Where its fork is long over.
    pub(crate) fn write_down(&mut self) {
        self.write_down_as(None);
    }

    fn write_down_as(&mut self, began: Option<Began>) {
        if !std::mem::replace(&mut self.known, true) {
            let pidfd = self.pidfd().map_or(-1, |fd| fd.as_raw_fd());
            if children().add(self.pid, self.start, pidfd, began) {
                // Opened by a number that was given up, it may be another child's.
                self.pidfd = None;
            }
        }
    }

    /// What somebody else has found of it, if anything.
    pub(crate) fn found(&self) -> Option<Record> {
        if self.known { children().take_ended(self.pid, self.start) } else { None }
    }

    pub(crate) fn hold(&self, holder: Holder) {
        if self.known {
            children().hold(self.pid, self.start, holder);
        }
    }

    /// What somebody else has found of it; it is not known any more.
    pub(crate) fn cross_out(&self) -> Option<Record> {
        if self.known { children().take(self.pid, self.start) } else { None }
    }

    /// For code that waits by number. What a reaper has found is told to whoever asks about strangers; the main loop knows what it brought.
    pub(crate) fn disown(&self) {
        if let Some(record) = self.cross_out().filter(|record| record.usage.is_some()) {
            children().disown(self.pid, record);
            orphans::tell();
        }
    }

    fn is_not_another(&self) -> bool {
        !self.known || children().is(self.pid, self.start)
    }

    /// For a holder that has to hear of the end: one that was forked without is given a pidfd now, where there are any.
    pub(crate) fn want_pidfd(&mut self) {
        if self.pidfd.is_none() && self.is_ours() && self.is_not_another() {
            self.pidfd = watch(self.pid);
            if let (true, Some(fd)) = (self.known, self.pidfd())
                && !children().watched(self.pid, self.start, fd.as_raw_fd())
            {
                self.pidfd = None;
            }
        }
    }

    /// When it has ended: before it is reaped, as long as the group's number is its own; and after somebody else has reaped it, if its
    /// pidfd tells the group from others (Linux 6.9). False if it lives: should it end this instant, it keeps its number until the group
    /// was killed.
    pub(crate) fn end_group(&self) -> bool {
        if !self.ending || !self.leads {
            return true;
        }
        match self.peek() {
            Ok(None) => return false,
            Err(e) if e.raw_os_error() != Some(libc::ECHILD) => {}
            // Nobody left is as good as killed.
            _ => drop(self.signal_all(libc::SIGKILL)),
        }
        true
    }

    /// Reaps the child if it has ended, or waits for that. A status that is gone is a record of its own.
    pub(crate) fn look(&self, how: How) -> io::Result<Option<Record>> {
        self.check_parent()?;
        let got = match self.pidfd() {
            Some(fd) => sys_reap::wait(Which::Pidfd(fd), how),
            None => self.look_by_pid(how),
        };
        // Linux 5.3 has pidfds and does not wait by them; a filter may let waitpid through and not waitid.
        let got = match got {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => {
                self.look_by_pid(how)
            }
            got => got,
        };
        match got {
            Ok(None) => Ok(None),
            Ok(Some(ended)) => {
                self.cross_out();
                Ok(Some(Record::of(&ended)))
            }
            Err(e) if e.raw_os_error() == Some(libc::ECHILD) => {
                let found = self.cross_out();
                Ok(Some(found.unwrap_or_else(|| Record::new(Ending::Lost))))
            }
            Err(e) => Err(e),
        }
    }

    /// The number may have come round again: where this process has given it to another child, that is known.
    fn look_by_pid(&self, how: How) -> io::Result<Option<sys_reap::Ended>> {
        // A pidfd that cannot be waited by tells all the same whether its process was reaped: who has the number then is another.
        let reaped = |fd| sys::pidfd_signal(fd, 0).is_err_and(|e| e.raw_os_error() == Some(libc::ESRCH));
        if !self.is_not_another() || self.pidfd().is_some_and(reaped) {
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        if self.pidfd.is_some() || !self.known || how == How::Peek {
            return sys_reap::wait(Which::Pid(self.pid), how);
        }
        match children().reap_by_number(self.pid, self.start) {
            // It runs: who sleeps in the kernel sleeps for this child, whoever has the number afterwards.
            Ok(None) if how == How::Block && !matches!(self.peek(), Ok(Some(_))) => {
                sys_reap::wait(Which::Pid(self.pid), how)
            }
            reaped => reaped,
        }
    }

    /// Without reaping.
    fn peek(&self) -> io::Result<Option<sys_reap::Ended>> {
        match self.pidfd().map(|fd| sys_reap::wait(Which::Pidfd(fd), How::Peek)) {
            // As in `look`.
            Some(Err(e)) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => {
                self.look_by_pid(How::Peek)
            }
            Some(peeked) => peeked,
            None => self.look_by_pid(How::Peek),
        }
    }

    /// It has ended, and its number is still its own. Never where waitid is refused.
    fn is_zombie(&self) -> bool {
        matches!(self.peek(), Ok(Some(_)))
    }

    /// It lives, or nobody has reaped it: the number is its own. Where waitid is refused, as far as this process knows.
    pub(crate) fn is_unreaped(&self) -> bool {
        !self.peek().is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD))
    }

    /// There is a child that a wait would find, and it is this one, as far as anybody can tell: whoever has a status of that number has
    /// another's. Where waitid is refused a pidfd tells.
    pub(crate) fn can_be_waited_for(&self) -> bool {
        self.peek().map_or_else(|e| self.has_pidfd() && e.raw_os_error() != Some(libc::ECHILD), |_| true)
    }

    /// To the child; one that has ended is left alone.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        self.check_parent()?;
        let by_pid = || if self.is_unreaped() { sys::kill(self.pid, signal) } else { Ok(()) };
        let sent = match self.pidfd() {
            Some(fd) => match sys::pidfd_signal(fd, signal) {
                // An old kernel; a filter.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => by_pid(),
                sent => sent,
            },
            // Reaped between the two calls by another wait, the number may be somebody else's: that is what a pidfd is for.
            None => by_pid(),
        };
        match sent {
            // Ended: the same as reaped.
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            sent => sent,
        }
    }

    /// To the child's process group if it leads one, else to the child. As long as it is not reaped the group's number is its own.
    pub(crate) fn signal_all(&self, signal: i32) -> io::Result<()> {
        if !self.leads {
            return self.signal(signal);
        }
        self.check_parent()?;
        let by_number = || if self.is_unreaped() { sys_reap::kill_group(self.pid, signal) } else { Ok(()) };
        let sent = match self.pidfd() {
            Some(fd) => match sys_reap::pidfd_signal_group(fd, signal) {
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => by_number(),
                sent => sent,
            },
            None => by_number(),
        };
        match sent {
            // Not yet a leader: the fork returned before its setsid.
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => self.signal(signal),
            sent => sent,
        }
    }

    /// SIGTERM, to be followed by SIGKILL. A stopped process would not hear of it.
    pub(crate) fn ask_to_end(&mut self) -> io::Result<()> {
        self.ending = true;
        self.signal_all(libc::SIGTERM)?;
        self.signal_all(libc::SIGCONT)
    }

    /// Who asked it to end has gone: nobody is killed after it.
    pub(crate) fn spare_group(&mut self) {
        self.ending = false;
    }

    /// Sleeps until the child may have ended, at most `left` ns; `pause` grows where nothing tells of it.
    pub(crate) fn doze(&self, left: u64, pause: &mut u64) -> io::Result<()> {
        match self.pidfd() {
            Some(fd) if !self.is_held_up(*pause) => {
                let ms = i32::try_from(clock::real_wait(left).div_ceil(1_000_000)).unwrap_or(i32::MAX);
                match sys::poll_in(fd, ms) {
                    Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
                    Ok(true) => *pause = pause.saturating_add(1),
                    _ => {}
                }
            }
            _ => {
                sys::sleep((*pause).min(clock::real_wait(left)));
                *pause = (*pause * 2).min(LONGEST_PAUSE);
            }
        }
        Ok(())
    }

    /// The pidfd has said "ended" and a look has not found it so: a debugger has the status first. Poll would not sleep.
    fn is_held_up(&self, pause: u64) -> bool {
        pause > FIRST_PAUSE
    }

    pub(crate) fn has_died(&self) -> bool {
        self.is_zombie() || !self.is_unreaped()
    }

    /// An ending that was told once, to be told again.
    pub(crate) fn take_back(&mut self, exit: Exit) -> Record {
        self.name = exit.name;
        let seen = self.start.saturating_add(u64::try_from(exit.ran.as_nanos()).unwrap_or(u64::MAX));
        Record { status: exit.status, usage: exit.usage, seen }
    }

    /// What goes to whoever asked.
    pub(crate) fn exit(&mut self, record: Record) -> Exit {
        let ran = Duration::from_nanos(record.seen.saturating_sub(self.start));
        Exit { pid: self.pid, name: self.name.take(), status: record.status, ran, usage: record.usage }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        // The entry there has the pidfd's number, which is about to be closed.
        if self.known && self.is_ours() {
            self.cross_out();
        }
    }
}

pub(crate) const FIRST_PAUSE: u64 = 100_000;
pub(crate) const LONGEST_PAUSE: u64 = 10_000_000;

fn watch(pid: u32) -> Option<CareFd<OwnedFd>> {
    let region = no_forking();
    let pidfd = region.care_cloexec(OnFork::Cleanup, sys::pidfd_open(pid).ok()?).ok()?;
    drop(region);
    // The number is this child's as long as nobody has reaped it: then so is the pidfd, which was opened before.
    sys::is_unreaped(pid).then_some(pidfd)
}
