//! When a reaper has to look although no pidfd says so: children to be asked for by number, and grace periods.

use super::engine::Key;
use super::orphans;
use super::reaper::{self, Shared};
use crate::carefd::CareFd;
use crate::locks::Mutex;
use crate::{clock, sys_reap};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// How often children without a pidfd are asked for, ns.
pub(crate) const ASK_EVERY: u64 = 10_000_000;

/// Made when it is first needed: most reapers never have one.
pub(crate) struct Timer {
    armed: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    fd: Option<CareFd<OwnedFd>>,
    /// When somebody gets SIGKILL, and who.
    grace: BTreeSet<(u64, Key)>,
}

impl Timer {
    pub(crate) fn new() -> Self {
        Timer { armed: AtomicBool::new(false), inner: Mutex::new(Inner { fd: None, grace: BTreeSet::new() }) }
    }

    pub(crate) fn kill_at(&self, when: u64, key: Key) {
        self.inner.lock().grace.insert((when, key));
    }

    /// Kills those whose time is up.
    pub(crate) fn tick(&self, shared: &Shared) {
        if !self.armed.load(Ordering::Acquire) {
            return;
        }
        let now = clock::now();
        let due: Vec<_> = self.inner.lock().grace.extract_if(..=(now, Key::MAX), |_| true).collect();
        for (_, key) in due {
            // Gone is as good as killed.
            shared.engine.with(key, |entry| drop(entry.body.signal_all(libc::SIGKILL)));
        }
    }

    /// Sets the alarm by what there is to do.
    pub(crate) fn rearm(&self, shared: &Shared) {
        // First: of two threads the one that looked last sets the alarm last.
        let mut inner = self.inner.lock();
        let asking = {
            let children = shared.engine.is_asking() || orphans::is_asking();
            let told = shared.engine.has_records();
            let owner = shared.owner.lock();
            children && owner.reaps_itself() || told || owner.has_to_look_again()
        };
        // Those whose child is gone: nobody is to be woken for them.
        while let Some(&(_, key)) = inner.grace.first()
            && shared.engine.with(key, |_| ()).is_none()
        {
            inner.grace.pop_first();
        }
        let grace = inner.grace.first().map(|(when, _)| when.saturating_sub(clock::now()));
        let next = grace.into_iter().chain(asking.then_some(ASK_EVERY)).min();
        if next.is_none() && !self.armed.load(Ordering::Relaxed) {
            return;
        }
        if shared.is_closed() {
            return;
        }
        // Whoever has something that cannot wait made sure before. Without a descriptor, the next death or dispatch looks.
        drop(inner.make_ready(shared));
        if let Some(fd) = &inner.fd {
            sys_reap::timer_set(fd.as_fd(), next.map(clock::real_wait));
        }
        self.armed.store(next.is_some(), Ordering::Release);
    }

    /// Makes sure that there is one.
    ///
    /// # Errors
    /// As timerfd_create(2).
    pub(crate) fn make_ready(&self, shared: &Shared) -> io::Result<()> {
        self.inner.lock().make_ready(shared)
    }

    /// The reaper has closed: whoever sleeps on its descriptor wakes, and finds it so.
    pub(crate) fn ring(&self) {
        if let Some(fd) = &self.inner.lock().fd {
            sys_reap::timer_set(fd.as_fd(), Some(1));
        }
    }
}

impl Inner {
    fn make_ready(&mut self, shared: &Shared) -> io::Result<()> {
        if self.fd.is_none() {
            let fd = CareFd::open_cloexec(sys_reap::timer)?;
            shared.hear(fd.as_fd(), reaper::TIMER)?;
            self.fd = Some(fd);
        }
        Ok(())
    }
}
