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
use crate::runtime;
use crate::sys_reap::{self, How, Which};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

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

/// A status of a child that is not known, or not yet.
struct Stranger {
    pid: u32,
    /// The ticket of the next fork when it was found: one with that ticket or a later one has not made it.
    found: u64,
    /// It is the n-th that was found: a child that was born when there were as many is not it.
    nth: u64,
    /// Nobody is to be told of it: the main loop brought it, and was told that nobody knows it; or it would have been ignored.
    refused: bool,
    record: Box<Record>,
}

impl Known {
    /// It lives, or nobody has taken its status: whoever has that number's status has another child's.
    fn is_unreaped(&self, pid: u32) -> bool {
        let which = if self.pidfd >= 0 { Which::Pidfd(self.pidfd()) } else { Which::Pid(pid) };
        self.ended.is_none() && sys_reap::wait(which, How::Peek).is_ok()
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the entry is here, and the book's lock keeps it here.
        #[allow(unsafe_code)]
        unsafe {
            BorrowedFd::borrow_raw(self.pidfd)
        }
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
    book: Mutex<Book>,
    /// How many strangers were found. Counted under the book's lock, which is a region: it stands still while a fork copies.
    found: AtomicU64,
    /// Forks whose child may be there and is not known yet.
    made: AtomicUsize,
    /// There are strangers to be told of; those that a fork under way may have made, later.
    strangers_wait: AtomicBool,
}

struct Book {
    by_pid: BTreeMap<u32, Known>,
    strangers: Vec<Stranger>,
    /// Statuses whose number is another child's by now, until their holder asks: number, start.
    left: Vec<(u32, u64, Box<Record>)>,
    /// The tickets of forks whose child may be dead before it is known here, rising.
    under_way: Vec<u64>,
    /// The next fork's.
    ticket: u64,
}

static CHILDREN: PerProcess<Children> = PerProcess::new(|| Children {
    book: Mutex::new(Book {
        by_pid: BTreeMap::new(),
        strangers: Vec::new(),
        left: Vec::new(),
        under_way: Vec::new(),
        ticket: 1,
    }),
    found: AtomicU64::new(0),
    made: AtomicUsize::new(0),
    strangers_wait: AtomicBool::new(false),
});

pub(crate) fn children() -> &'static Children {
    CHILDREN.get()
}

/// What [`Children::hand_in`] made of a status.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum HandedIn {
    /// It lies here until the holder asks.
    Kept,
    /// No child of carefork's, or not yet.
    Unknown,
}

/// While it lives, a child that nobody knows may be one that is being made.
#[derive(Debug)]
pub(crate) struct UnderWay {
    ticket: u64,
    generation: u64,
    /// How many strangers were found before its child was.
    found: u64,
    made: bool,
}

impl UnderWay {
    /// Right before the child is made, with the gate shut.
    pub(crate) fn is_made(&mut self) {
        self.was_made(note_made(self.made));
    }

    /// `found` is what `note_made` said.
    pub(crate) fn was_made(&mut self, found: u64) {
        (self.found, self.made) = (found, true);
    }
}

/// Right before a child is made that is under way, with the gate shut if it is to be exact; `again` if that was to be before, and there
/// was none. Async-signal-safe.
pub(crate) fn note_made(again: bool) -> u64 {
    let children = children();
    if !again {
        children.made.fetch_add(1, Ordering::Relaxed);
    }
    children.found.load(Ordering::Relaxed)
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        // In a child the parent's.
        if self.generation == runtime::generation() {
            let children = children();
            children.book.lock().under_way.retain(|&t| t != self.ticket);
            if self.made {
                children.made.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// How many strangers were found before a child was made, for [`Children::add`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Began(u64);

impl Began {
    /// `None` is a fork that began before anybody wanted to know.
    pub(crate) fn of(under_way: Option<&UnderWay>) -> Began {
        Began(under_way.map_or(0, |u| u.found))
    }
}

/// Before anything that makes a child; to be dropped once the child is known.
pub(crate) fn making_one() -> Option<UnderWay> {
    is_wanted().then(|| children().making_one())
}

/// The child of that fork was none, and somebody may have found it.
pub(crate) fn forget_thrown_away(pid: u32, fork: Option<&UnderWay>) {
    if let Some(fork) = fork {
        children().forget_thrown_away(pid, fork);
    }
}

/// There are strangers to be told of, now or when the forks that may have made them are over.
pub(crate) fn strangers_wait() -> bool {
    is_wanted() && children().strangers_wait.load(Ordering::Relaxed)
}

impl Book {
    /// Takes out the strangers of which `which` is true and that no fork under way can have made.
    fn settled(&mut self, which: impl Fn(&Stranger) -> bool) -> impl Iterator<Item = Stranger> {
        let first = self.under_way.first().copied().unwrap_or(u64::MAX);
        self.strangers.extract_if(.., move |s| first >= s.found && which(s))
    }
}

impl Children {
    fn keep(&self, book: &mut Book, pid: u32, refused: bool, record: Box<Record>) {
        book.settled(|s| s.refused).for_each(drop);
        if refused && book.under_way.is_empty() {
            return;
        }
        if !refused {
            self.strangers_wait.store(true, Ordering::Relaxed);
        }
        let nth = self.found.fetch_add(1, Ordering::Relaxed) + 1;
        book.strangers.push(Stranger { pid, found: book.ticket, nth, refused, record });
    }

    /// Before anything that makes a child; drop it once the child is known (SEEDS: "recorded before any reaper can see it").
    fn making_one(&self) -> UnderWay {
        let mut book = self.book.lock();
        let ticket = book.ticket;
        book.ticket += 1;
        book.under_way.push(ticket);
        let found = self.found.load(Ordering::Relaxed);
        UnderWay { ticket, generation: runtime::generation(), found, made: false }
    }

    /// A child that was just made, or with `None` one that is written down late. Its end was found before: true.
    pub(crate) fn add(&self, pid: u32, start: u64, pidfd: RawFd, began: Option<Began>) -> bool {
        let mut book = self.book.lock();
        if book.by_pid.get(&pid).is_some_and(|later| later.start > start) {
            // The number is that one's by now.
            return false;
        }
        // A status that came before its child, unless it was there before the child was made.
        let early = began.and_then(|Began(found)| book.strangers.iter().rposition(|s| s.pid == pid && s.nth > found));
        let ended = early.map(|at| book.strangers.remove(at).record);
        let has_ended = ended.is_some();
        let pidfd = if has_ended { -1 } else { pidfd };
        let earlier = book.by_pid.insert(pid, Known { start, pidfd, holder: Holder::Asks, ended });
        if let Some(Known { start, ended: Some(record), .. }) = earlier {
            // Its holder has yet to ask.
            book.left.push((pid, start, record));
        }
        has_ended
    }

    /// The child's number has not become another's, as far as this process knows. One whose end is here has given it up.
    pub(crate) fn is(&self, pid: u32, start: u64) -> bool {
        self.book.lock().by_pid.get(&pid).is_some_and(|k| k.start == start && k.ended.is_none())
    }

    /// It was given a pidfd. Its end was found before: false, and the pidfd may be another's.
    pub(crate) fn watched(&self, pid: u32, start: u64, pidfd: RawFd) -> bool {
        let mut book = self.book.lock();
        let known = book.by_pid.get_mut(&pid).filter(|k| k.start == start && k.ended.is_none());
        known.map(|known| known.pidfd = pidfd).is_some()
    }

    pub(crate) fn hold(&self, pid: u32, start: u64, holder: Holder) {
        if let Some(known) = self.book.lock().by_pid.get_mut(&pid).filter(|k| k.start == start) {
            known.holder = holder;
        }
    }

    /// Forgets the child; what somebody else found of it.
    pub(crate) fn take(&self, pid: u32, start: u64) -> Option<Record> {
        let mut book = self.book.lock();
        if book.by_pid.get(&pid).is_some_and(|k| k.start == start) {
            return book.by_pid.remove(&pid).and_then(|k| k.ended).map(|record| *record);
        }
        let at = book.left.iter().position(|(p, s, _)| (*p, *s) == (pid, start))?;
        Some(*book.left.swap_remove(at).2)
    }

    /// What somebody else found of it, if anything; then it is forgotten.
    pub(crate) fn take_ended(&self, pid: u32, start: u64) -> Option<Record> {
        let runs = self.book.lock().by_pid.get(&pid).is_some_and(|k| k.start == start && k.ended.is_none());
        if runs { None } else { self.take(pid, start) }
    }

    /// Nobody holds it any more, and it was reaped: a stranger to be told of, and of no fork under way.
    pub(crate) fn disown(&self, pid: u32, record: Record) {
        let stranger = Stranger { pid, found: 0, nth: 0, refused: false, record: Box::new(record) };
        self.book.lock().strangers.push(stranger);
        self.strangers_wait.store(true, Ordering::Relaxed);
    }

    fn forget_thrown_away(&self, pid: u32, fork: &UnderWay) {
        self.book.lock().strangers.retain(|s| s.pid != pid || s.nth <= fork.found);
    }

    pub(crate) fn holder(&self, pid: u32) -> Option<Holder> {
        self.book.lock().by_pid.get(&pid).map(|k| k.holder)
    }

    /// Reaps by number the child that is known by it, if it has ended; `None` too while the number may be that of a child that is not
    /// known yet. Under the lock, which is a region: none is made meanwhile.
    pub(crate) fn reap_by_number(&self, pid: u32, start: u64) -> io::Result<Option<sys_reap::Ended>> {
        let book = self.book.lock();
        if !book.by_pid.get(&pid).is_some_and(|k| k.start == start && k.ended.is_none()) {
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        // A hook that waits in the middle of this thread's own fork would wait for ever.
        if self.made.load(Ordering::Relaxed) != 0 && !runtime::in_fork() {
            return Ok(None);
        }
        sys_reap::wait(Which::Pid(pid), How::Now)
    }

    /// Reaps the child of that number, which has ended and may be anybody's.
    ///
    /// All under the lock: a holder that finds its child gone asks here next, and must not come too early. One that is known by a
    /// pidfd is reaped by it: where the number has come round again, that says so.
    ///
    /// If it turns out to be nobody's, that is told if `tell` says so, or it is as if it had been ignored.
    pub(crate) fn reap_found(&self, pid: u32, tell: bool) -> io::Result<()> {
        let mut book = self.book.lock();
        let book = &mut *book;
        if let Some(known) = book.by_pid.get_mut(&pid).filter(|k| k.ended.is_none() && k.pidfd >= 0) {
            let waited = match sys_reap::wait(Which::Pidfd(known.pidfd()), How::Now) {
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
                Reaped::Gone => drop(book.by_pid.remove(&pid)),
            }
            return Ok(());
        }
        let Reaped::Record(record) = told(sys_reap::wait(Which::Pid(pid), How::Now))? else {
            // Somebody was faster.
            return Ok(());
        };
        match book.by_pid.get_mut(&pid) {
            Some(known) if known.ended.is_none() => known.ended = Some(record),
            // Of the status that lies there the number was before.
            _ => self.keep(book, pid, !tell, record),
        }
        Ok(())
    }

    /// A status that somebody reaped by number.
    pub(crate) fn hand_in(&self, pid: u32, record: Record) -> HandedIn {
        let mut book = self.book.lock();
        match book.by_pid.get_mut(&pid) {
            Some(known) if known.is_unreaped(pid) => return HandedIn::Unknown,
            Some(known) if known.ended.is_none() => {
                known.ended = Some(Box::new(record));
                return HandedIn::Kept;
            }
            _ => {}
        }
        self.keep(&mut book, pid, true, Box::new(record));
        HandedIn::Unknown
    }

    /// Those whom nobody will come for: every fork that may have made them is over.
    pub(crate) fn strangers(&self) -> Vec<(u32, Record)> {
        let mut book = self.book.lock();
        let settled = book.settled(|_| true).filter(|s| !s.refused).map(|s| (s.pid, *s.record)).collect();
        self.strangers_wait.store(book.strangers.iter().any(|s| !s.refused), Ordering::Relaxed);
        settled
    }
}
