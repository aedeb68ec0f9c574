//! The children of this process that carefork knows of, by number; kept only where somebody wants it.
//!
//! Three questions are answered here. Whose is a child that `waitid(P_ALL)` found (an owner of SIGCHLD asks)? Where does a status lie
//! that was found by somebody other than its child's holder? And, where there is no pidfd: is a number still the child it was, or has
//! this process forked another with it since?
//!
//! The default needs none of them: a pidfd is all that a child needs. So nothing is kept, and a fork allocates nothing, until a
//! reaper owns SIGCHLD or a child has no pidfd ([`want`]); from then on, for good.

use super::exit::Record;
use super::per_process::PerProcess;
use crate::locks::Mutex;
use crate::sys_reap::{self, How, Which};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

static WANTED: AtomicBool = AtomicBool::new(false);

/// From now on children are written down.
pub(crate) fn want() {
    if !is_wanted() {
        WANTED.store(true, Ordering::SeqCst);
    }
}

pub(crate) fn is_wanted() -> bool {
    WANTED.load(Ordering::Relaxed)
}

/// Who will hand out the child's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// A `Child`, an orphan: they ask when they want to know.
    Asks,
    /// Slot `index` of reaper `reaper`.
    Reaper { reaper: u32, index: u32 },
    /// Reaped while a fork was under way that may have made it: its `Child` may yet come.
    Nobody,
}

#[derive(Debug)]
struct Known {
    /// Tells children apart that had the same number one after the other.
    start: u64,
    /// Open as long as this entry is here; -1 where there is none.
    pidfd: RawFd,
    holder: Holder,
    /// Found by somebody else than the holder.
    ended: Option<Box<Record>>,
}

impl Known {
    fn nobodys(record: Box<Record>) -> Known {
        Known { start: 0, pidfd: -1, holder: Holder::Nobody, ended: Some(record) }
    }
}

enum Reaped {
    Record(Box<Record>),
    NotYet,
    Gone,
}

fn told(waited: io::Result<Option<sys_reap::Ended>>) -> io::Result<Reaped> {
    match waited {
        Ok(Some(ended)) => Ok(Reaped::Record(Box::new(Record::of(&ended)))),
        Ok(None) => Ok(Reaped::NotYet),
        Err(e) if e.raw_os_error() == Some(libc::ECHILD) => Ok(Reaped::Gone),
        Err(e) => Err(e),
    }
}

pub(crate) struct Children {
    by_pid: Mutex<BTreeMap<u32, Known>>,
    /// Forks whose child may be dead before it is known here.
    under_way: AtomicU32,
    /// Some found a stranger meanwhile, and could not tell.
    strangers_wait: AtomicBool,
}

static CHILDREN: PerProcess<Children> = PerProcess::new(|| Children {
    by_pid: Mutex::new(BTreeMap::new()),
    under_way: AtomicU32::new(0),
    strangers_wait: AtomicBool::new(false),
});

pub(crate) fn children() -> &'static Children {
    CHILDREN.get()
}

/// What [`Children::hand_in`] made of a status.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum HandedIn {
    /// It lies here until the holder asks.
    For(Holder),
    /// No child of carefork's, or not yet.
    Unknown,
}

/// While it lives, a child that nobody knows may be one that is being made.
#[derive(Debug)]
pub(crate) struct UnderWay(&'static AtomicU32);

impl Drop for UnderWay {
    fn drop(&mut self) {
        // In a child the parent's counter: nobody reads it there.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Before anything that makes a child; to be dropped once the child is known.
pub(crate) fn making_one() -> Option<UnderWay> {
    is_wanted().then(|| children().making_one())
}

/// A child that was none, and that somebody may have found.
pub(crate) fn forget_thrown_away(pid: u32) {
    if is_wanted() {
        children().forget_thrown_away(pid);
    }
}

impl Children {
    /// Before anything that makes a child; drop it once the child is known (SEEDS: "recorded before any reaper can see it").
    fn making_one(&'static self) -> UnderWay {
        self.under_way.fetch_add(1, Ordering::AcqRel);
        UnderWay(&self.under_way)
    }

    pub(crate) fn add(&self, pid: u32, start: u64, pidfd: RawFd) {
        let mut all = self.by_pid.lock();
        // A status that came before its child is this child's. Any other entry was somebody's whose number came round again.
        let early = all.remove(&pid).filter(|k| k.holder == Holder::Nobody).and_then(|k| k.ended);
        all.insert(pid, Known { start, pidfd, holder: Holder::Asks, ended: early });
    }

    /// The child's number has not become another's, as far as this process knows.
    pub(crate) fn is(&self, pid: u32, start: u64) -> bool {
        self.by_pid.lock().get(&pid).is_some_and(|k| k.start == start)
    }

    /// It was given a pidfd.
    pub(crate) fn watched(&self, pid: u32, start: u64, pidfd: RawFd) {
        if let Some(known) = self.by_pid.lock().get_mut(&pid).filter(|k| k.start == start) {
            known.pidfd = pidfd;
        }
    }

    pub(crate) fn hold(&self, pid: u32, start: u64, holder: Holder) {
        if let Some(known) = self.by_pid.lock().get_mut(&pid).filter(|k| k.start == start) {
            known.holder = holder;
        }
    }

    /// Forgets the child; what somebody else found of it.
    pub(crate) fn take(&self, pid: u32, start: u64) -> Option<Record> {
        let mut all = self.by_pid.lock();
        if all.get(&pid)?.start != start {
            return None;
        }
        all.remove(&pid).and_then(|k| k.ended).map(|record| *record)
    }

    fn forget_thrown_away(&self, pid: u32) {
        let mut all = self.by_pid.lock();
        if all.get(&pid).is_some_and(|k| k.holder == Holder::Nobody) {
            all.remove(&pid);
        }
    }

    /// Nobody will come for that stranger, unless a fork is under way: then it is found again when that is over.
    pub(crate) fn refuse(&self, pid: u32) {
        let mut all = self.by_pid.lock();
        if self.under_way.load(Ordering::Acquire) == 0 && all.get(&pid).is_some_and(|k| k.holder == Holder::Nobody) {
            all.remove(&pid);
        }
    }

    pub(crate) fn holder(&self, pid: u32) -> Option<Holder> {
        self.by_pid.lock().get(&pid).map(|k| k.holder)
    }

    /// Reaps the child of that number, which has ended and may be anybody's; one that it cannot keep for anybody comes back.
    ///
    /// All under the lock: a holder that finds its child gone asks here next, and must not come too early. One that is known by a
    /// pidfd is reaped by it: where the number has come round again, that says so.
    pub(crate) fn reap_found(&self, pid: u32) -> io::Result<Option<Record>> {
        let mut all = self.by_pid.lock();
        if let Some(known) = all.get_mut(&pid).filter(|k| k.ended.is_none() && k.pidfd >= 0) {
            // SAFETY: open as long as the entry is here, and the lock keeps it here.
            #[allow(unsafe_code)]
            let pidfd = unsafe { BorrowedFd::borrow_raw(known.pidfd) };
            let waited = match sys_reap::wait(Which::Pidfd(pidfd), How::Now) {
                // Linux 5.3, or a filter: by number, as its holder would. The number is its own, since no other child was given it.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => {
                    sys_reap::wait(Which::Pid(pid), How::Now)
                }
                waited => waited,
            };
            match told(waited)? {
                Reaped::Record(record) => known.ended = Some(record),
                Reaped::NotYet => {}
                // Its holder will find out by the same means.
                Reaped::Gone => drop(all.remove(&pid)),
            }
            return Ok(None);
        }
        let Reaped::Record(record) = told(sys_reap::wait(Which::Pid(pid), How::Now))? else {
            // Somebody was faster.
            return Ok(None);
        };
        match all.get_mut(&pid) {
            // The number was another's, whose holder has yet to come.
            Some(known) if known.ended.is_some() => return Ok(Some(*record)),
            Some(known) => known.ended = Some(record),
            None => drop(all.insert(pid, Known::nobodys(record))),
        }
        Ok(None)
    }

    /// A status that somebody reaped by number.
    pub(crate) fn hand_in(&self, pid: u32, record: Record) -> HandedIn {
        let mut all = self.by_pid.lock();
        match all.get_mut(&pid) {
            Some(known) if known.ended.is_none() => {
                known.ended = Some(Box::new(record));
                HandedIn::For(known.holder)
            }
            _ => {
                all.insert(pid, Known::nobodys(Box::new(record)));
                HandedIn::Unknown
            }
        }
    }

    /// The last look for strangers came while a fork was under way, and there may be some.
    pub(crate) fn strangers_wait(&self) -> bool {
        self.strangers_wait.load(Ordering::Relaxed)
    }

    /// Those whom nobody will come for, once no fork is under way.
    pub(crate) fn strangers(&self) -> Vec<(u32, Record)> {
        let mut all = self.by_pid.lock();
        let wait = self.under_way.load(Ordering::Acquire) != 0;
        self.strangers_wait.store(wait && all.values().any(|k| k.holder == Holder::Nobody), Ordering::Relaxed);
        if wait {
            return Vec::new();
        }
        let pids: Vec<u32> = all.iter().filter(|(_, k)| k.holder == Holder::Nobody).map(|(&pid, _)| pid).collect();
        pids.into_iter().filter_map(|pid| Some((pid, *all.remove(&pid)?.ended?))).collect()
    }
}
