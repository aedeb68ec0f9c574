//! A thread's seat: what it has to do with regions and forks, for other threads to see; and the seats of a process, as the gate needs them.
//!
//! Pure, as the gate. Only its own thread writes a seat, but for the fields that say who sits there.

use crate::passage::Passage;
use crate::sync::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::panic::Location;

use Ordering::{Relaxed, Release};

/// One region of the user's own making (`NoForking`, an initialiser, a care-fd's opening).
pub(crate) const GUARD: u64 = 1;
/// One held lock of section L.
pub(crate) const LOCK: u64 = 1 << 32;

// What a thread has to do with forking.
/// Not forking.
pub(crate) const NONE: u8 = 0;
/// In a coordinated fork, not yet in carefork's prepare handler (other libraries' handlers come first).
pub(crate) const ENTERED: u8 = 1;
/// Waits for the role.
pub(crate) const QUEUED: u8 = 2;
/// Holds the role.
pub(crate) const OWNER: u8 = 3;

// Who may wait for whom in regions: a thread goes through a shut gate into one of its own for the regions of those of a lower rank
// (`Gate::goes_first`). Handlers join threads and log; so do the destructors of threads that end.
/// For whom nobody waits that carefork knew of.
pub(crate) const ANYBODY: u8 = 0;
/// A service's, or a reaper's.
pub(crate) const HANDLER: u8 = 1;
/// One that began by `carefork::thread` and ends.
pub(crate) const ENDING: u8 = 2;
/// A log's.
pub(crate) const WRITER: u8 = 3;

/// A lock's word, as the lowest bit of its address tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Word {
    Mutex = 0,
    Rw = 1,
}

impl Word {
    /// The bits of such a word that say that somebody sleeps.
    pub(crate) const fn sleepers(self) -> u32 {
        match self {
            Word::Mutex => 1 << 31,
            Word::Rw => 7 << 28,
        }
    }
}

/// A seat without a thread.
pub(crate) const VACANT: u32 = 0;
/// A seat whose thread was left behind by a dirty fork or a bypass: its locks are held for ever, it is not given out again.
pub(crate) const GHOST: u32 = u32::MAX;

/// One thread's seat. 128 bytes of its own, so that no two threads write the same cache line (nor its prefetched twin).
#[repr(align(128))]
#[derive(Debug)]
pub(crate) struct Slot {
    /// `GUARD`s and `LOCK`s this thread is in. Written by its own thread only.
    pub(crate) depth: AtomicU64,
    /// `VACANT`, `GHOST` or the thread's tid.
    pub(crate) tid: AtomicU32,
    /// This seat's number, from 1; set before the seat is first given out. What a lock word names its owner by.
    pub(crate) id: AtomicU32,
    pub(crate) fork: AtomicU8,
    /// Who may wait for this thread in regions of theirs.
    pub(crate) rank: AtomicU8,
    pub(crate) ticket: AtomicU32,
    /// The id of the owner of the lock that this thread, inside a region, waits for (low half; 0 if none), and a number that
    /// moves on with each look at such a lock.
    pub(crate) waits: AtomicU64,
    /// The word of the lock that this thread sleeps on, in a region or not; null if none.
    pub(crate) waits_at: AtomicPtr<u32>,
    /// Where the outermost region was entered, in builds that record it.
    pub(crate) entered: AtomicPtr<Location<'static>>,
    /// The thread's name as it was when the seat was taken, as two words.
    pub(crate) name: [AtomicU64; 2],
    /// The coordinated fork in progress on this thread (fork.rs), null if none.
    pub(crate) request: AtomicPtr<()>,
    /// What the handlers of a fork leave for each other.
    pub(crate) passage: Passage,
}

// With the passage.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Slot>() == 128);

impl Slot {
    #[cfg(not(loom))]
    pub(crate) const fn new() -> Self {
        Self {
            depth: AtomicU64::new(0),
            tid: AtomicU32::new(VACANT),
            id: AtomicU32::new(0),
            fork: AtomicU8::new(NONE),
            rank: AtomicU8::new(ANYBODY),
            ticket: AtomicU32::new(0),
            waits: AtomicU64::new(0),
            waits_at: AtomicPtr::new(std::ptr::null_mut()),
            entered: AtomicPtr::new(std::ptr::null_mut()),
            name: [const { AtomicU64::new(0) }; 2],
            request: AtomicPtr::new(std::ptr::null_mut()),
            passage: Passage::new(),
        }
    }

    #[inline(always)]
    pub(crate) fn id(&self) -> u32 {
        self.id.load(Relaxed)
    }

    /// Guards and locks together.
    #[inline(always)]
    pub(crate) fn depth(&self) -> u64 {
        self.depth.load(Relaxed)
    }

    /// Inside a `GUARD` region.
    pub(crate) fn in_guard(&self) -> bool {
        !self.depth().is_multiple_of(LOCK)
    }

    /// Holds a lock of section L.
    pub(crate) fn holds_lock(&self) -> bool {
        self.depth() >= LOCK
    }

    /// This thread is in no region but one of `kind`.
    #[inline(always)]
    pub(crate) fn only(&self, kind: u64) -> bool {
        self.depth() == kind
    }

    #[inline(always)]
    pub(crate) fn rank(&self) -> u8 {
        self.rank.load(Relaxed)
    }

    /// By this thread: for what it is to be let in from here on.
    pub(crate) fn rise(&self, rank: u8) {
        self.rank.store(rank.max(self.rank()), Relaxed);
    }

    /// For a thread's end, `force_unlock` and the child: as if never entered. The caller calls `Gate::left`.
    pub(crate) fn clear(&self) {
        self.depth.store(0, Release);
        self.forget_fork();
    }

    /// In a child, whose owner of this seat was left behind: in no queue of forks.
    pub(crate) fn bury(&self) {
        self.forget_fork();
        self.tid.store(GHOST, Relaxed);
    }

    fn forget_fork(&self) {
        self.waits.store(0, Relaxed);
        self.waits_at.store(std::ptr::null_mut(), Relaxed);
        self.fork.store(NONE, Relaxed);
        self.request.store(std::ptr::null_mut(), Relaxed);
    }

    pub(crate) fn clear_guards(&self) {
        let d = self.depth();
        self.depth.store(d - d % LOCK, Release);
    }

    /// Before a sleep on a lock's word of that kind; what `woke` is to be given, for one that a signal handler on this thread interrupts.
    pub(crate) fn sleeps(&self, at: *const u32, kind: Word) -> *mut u32 {
        let before = self.waits_at.load(Relaxed);
        self.waits_at.store(at.cast_mut().map_addr(|at| at | kind as usize), Relaxed);
        before
    }

    pub(crate) fn woke(&self, before: *mut u32) {
        self.waits_at.store(before, Relaxed);
    }

    /// The word that this thread sleeps on, and its kind.
    pub(crate) fn waits_at(&self) -> (*mut u32, Word) {
        let at = self.waits_at.load(Relaxed);
        let kind = if at.addr() & Word::Rw as usize == 0 { Word::Mutex } else { Word::Rw };
        (at.map_addr(|at| at & !(Word::Rw as usize)), kind)
    }

    /// In a child that a signal handler forked while this thread slept for a lock whose owner is not here: the kernel goes on with the
    /// sleep when the handler returns, but for a word that has changed. Others who sleep are not here either.
    #[cfg(not(loom))]
    pub(crate) fn end_sleep(&self) {
        let (at, kind) = self.waits_at();
        if !at.is_null() {
            // SAFETY: `sleeps` was given it by a wait for a lock that has not come to its `woke`: it is further down on this thread's
            // stack, and borrows the lock.
            #[allow(unsafe_code)]
            let word = unsafe { AtomicU32::from_ptr(at) };
            word.fetch_and(!kind.sleepers(), Relaxed);
        }
    }

    /// Where this thread's outermost region began, if recorded.
    pub(crate) fn entered(&self) -> Option<&'static Location<'static>> {
        location(&self.entered)
    }

    pub(crate) fn seen(&self) -> Seen {
        Seen {
            tid: self.tid.load(Relaxed),
            name: [self.name[0].load(Relaxed), self.name[1].load(Relaxed)],
            entered: self.entered(),
        }
    }

    /// A coordinated fork begins or ends on this thread; seen by a forker that meets this seat in a region.
    pub(crate) fn set_entered(&self, on: bool) {
        self.fork.store(if on { ENTERED } else { NONE }, Release);
    }

    /// Between taking the role and giving it back: hooks run on this thread.
    pub(crate) fn is_forking(&self) -> bool {
        matches!(self.fork.load(Relaxed), QUEUED | OWNER)
    }

    pub(crate) fn is_ghost(&self) -> bool {
        self.tid.load(Relaxed) == GHOST
    }
}

/// The seats of a process.
pub(crate) trait Seats {
    /// Calls `f` on each seat ever given out until it answers false.
    fn each(&self, f: impl FnMut(&Slot) -> bool);
    /// The seat with that id, if it was ever given out.
    fn seat(&self, id: u32) -> Option<&Slot>;
    /// Ends the regions of threads that are gone without a word; whether one of them held a lock.
    fn bury(&self) -> bool {
        false
    }
    /// A gate that may be committed is about to be reopened: what is registered from here on may be unknown to the descriptors of
    /// the fork's child. `false` takes it back.
    fn loosen(&self, _begins: bool) {}
    /// The word, shared with the child, that says how the fork ended which shut the gate by `shut`; `None` if there is none.
    fn verdict(&self, _shut: u32) -> Option<&AtomicU32> {
        None
    }
    /// The processor time that the thread in seat `id` has used.
    fn used(&self, _id: u32) -> Used {
        Used::default()
    }
}

/// Processor time of a thread in ms, of the kernel's own work for it and of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) kernel: u32,
    pub(crate) user: u32,
}

impl Used {
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.kernel) << 32 | u64::from(self.user)
    }

    /// Nothing but the kernel was at work since `before`, and it was for so many ms at least: it copies. A handler of
    /// another library that waits for a thread kept out here sleeps, or runs code of its own between its looks.
    pub(crate) fn is_copying(self, before: u64, least: u64) -> bool {
        let kernel = self.kernel.wrapping_sub((before >> 32) as u32);
        self.user == before as u32 && u64::from(kernel) >= least
    }
}

/// Who kept a fork waiting, copied without allocation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) tid: u32,
    pub(crate) name: [u64; 2],
    pub(crate) entered: Option<&'static Location<'static>>,
}

/// How many threads a report names.
pub(crate) const NAMED: usize = 8;

/// What a look round the seats found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Busy {
    /// Threads in a region, other than the one that looked.
    pub(crate) count: usize,
    /// The first few of them.
    pub(crate) seen: [Option<Seen>; NAMED],
    /// One of them waits for the role itself (G5).
    pub(crate) queued: bool,
    /// One of them is in a coordinated fork, in another library's handler.
    pub(crate) entered: bool,
    /// One of them waits for a lock that the one who looked holds: its id, and what it said.
    pub(crate) waits_for_me: Option<(u32, u64)>,
}

impl Busy {
    pub(crate) const NONE: Busy =
        Busy { count: 0, seen: [None; NAMED], queued: false, entered: false, waits_for_me: None };

    /// As `NONE`. Looks first, since most forks meet nobody: nothing else is set where nobody was counted.
    pub(crate) fn forget(&mut self) {
        if self.count != 0 {
            *self = Busy::NONE;
        }
    }
}

fn location(p: &AtomicPtr<Location<'static>>) -> Option<&'static Location<'static>> {
    let p = p.load(Relaxed);
    // SAFETY: only addresses of `&'static Location` (or null) are ever stored in a seat's `entered` (region.rs).
    #[allow(unsafe_code)]
    unsafe {
        p.as_ref()
    }
}
