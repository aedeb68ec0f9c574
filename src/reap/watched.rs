//! The parent's hold on a child that a reaper watches.

use super::engine::Key;
use super::reaper::{Shared, Then};
use crate::clock;
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// A child that a [`Reaper`](crate::Reaper) watches: it may be signalled, and only the reaper reaps it.
///
/// Signals go by pidfd and by the entry in the table, so they reach the child or nobody ([without pidfds](crate::Reaper#without-pidfds)
/// nearly so). Dropping it changes nothing.
#[derive(Clone)]
pub struct Watched {
    reaper: Weak<Shared>,
    key: Key,
    pid: u32,
}

impl Watched {
    pub(crate) fn new(reaper: &Arc<Shared>, key: Key, pid: u32) -> Self {
        Watched { reaper: Arc::downgrade(reaper), key, pid }
    }

    /// The process id; somebody else's once the child's callback has run.
    pub fn id(&self) -> u32 {
        self.pid
    }

    /// Sends a signal; a child that was reaped is left alone.
    ///
    /// # Errors
    /// As kill(2); ECHILD in a child of this process; `BrokenPipe` if the reaper was closed: the child is nobody's then.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        self.open()?.engine.with(self.key, |entry| entry.body.signal(signal)).unwrap_or(Ok(()))
    }

    /// Sends a signal to the child's process group, as [`Child::signal_group`](crate::Child::signal_group) does.
    ///
    /// # Errors
    /// As for [`Watched::signal`].
    pub fn signal_group(&self, signal: i32) -> io::Result<()> {
        self.open()?.engine.with(self.key, |entry| entry.body.signal_all(signal)).unwrap_or(Ok(()))
    }

    /// Sends SIGKILL.
    ///
    /// # Errors
    /// As for [`Watched::signal`].
    pub fn kill(&self) -> io::Result<()> {
        self.signal(libc::SIGKILL)
    }

    /// SIGTERM (and SIGCONT) now, SIGKILL after `grace` unless it has ended by then; to the process group if the child leads one.
    /// Does not wait: the reaper's descriptor becomes readable when the time has come, and the callback runs as ever. A reaper that is closed
    /// before that kills nobody any more.
    ///
    /// # Errors
    /// As for [`Watched::signal`]; as timerfd_create(2), and then nothing was sent.
    pub fn terminate(&self, grace: Duration) -> io::Result<()> {
        let shared = self.open()?;
        // Without one, nothing would tell of the end of the grace.
        shared.timer.make_ready(&shared)?;
        let Some(sent) = shared.engine.with(self.key, |entry| entry.body.ask_to_end()) else { return Ok(()) };
        let ns = u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX);
        shared.timer.kill_at(clock::now().saturating_add(ns), self.key);
        shared.timer.rearm(&shared);
        sent
    }

    /// Kills the child, and not the group that it may lead, and forgets it: its callback is dropped and never runs, and it is reaped all
    /// the same.
    ///
    /// # Errors
    /// As for [`Watched::signal`]; it is forgotten then too.
    pub fn kill_deregister(&self) -> io::Result<()> {
        let shared = self.open()?;
        let out = shared.engine.with(self.key, |entry| {
            (std::mem::replace(&mut entry.then, Then::Nothing), entry.body.signal(libc::SIGKILL))
        });
        // With no lock held: what a callback owns may be anything.
        let Some((_then, sent)) = out else { return Ok(()) };
        sent
    }

    /// It has not been reaped yet.
    pub fn is_watched(&self) -> bool {
        self.open().is_ok_and(|shared| shared.engine.with(self.key, |_| ()).is_some())
    }

    fn open(&self) -> io::Result<Arc<Shared>> {
        let closed = || io::Error::new(io::ErrorKind::BrokenPipe, "the reaper was closed");
        let shared = self.reaper.upgrade().ok_or_else(closed)?;
        if !shared.is_ours() {
            // In a child nothing of the parent's reaper is ever dropped.
            std::mem::forget(shared);
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        if shared.is_closed() { Err(closed()) } else { Ok(shared) }
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("pid", &self.pid).finish_non_exhaustive()
    }
}
