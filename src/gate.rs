//! The gate: regions shared by any number of threads, shut by one forker at a time (G1-G5, G11).
//!
//! Pure protocol: no system call but through `sync`, no static. loom compiles this file as it is.
//!
//! # States
//! `word` holds one of three states and an epoch that every change moves on:
//!
//! | state    | an outermost region            | who leaves the state                              |
//! |----------|--------------------------------|---------------------------------------------------|
//! | `OPEN`   | begins                         | the role's holder: `shut`                         |
//! | `FENCED` | begins, with a fence of its own | the same (membarrier was refused once, for good) |
//! | `SHUT`   | waits; a nested one begins; one that others wait for does not, where their regions keep the forker waiting (`goes_first`) | the forker; a waiter past `deadline` (G11) |
//!
//! A thread's seat (`Slot`) holds how deep it is in regions; only that thread writes it. The forker holds the *role*
//! from its first try to its parent handler, gate open or shut, so that hooks are run by one forker at a time.
//!
//! # The fence
//! Entering stores `depth`, then loads `word`; shutting stores `word`, then loads every `depth`. One of the two must
//! see the other's store. The forker's `heavy_fence` (membarrier) makes both sides' accesses ordered, so that a
//! region costs no fence of its own. The same pairing serves `leave` against a forker that goes to sleep.

pub(crate) use crate::seat::*;
use crate::sync::{self, ANY, AtomicU32, AtomicU64, Ordering, Wake, fault, fence, heavy_fence, light_fence};
use crate::verdict;

use Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

// loom's atomics cannot be const; its constructors, and the copy that a fork makes, live with the models.
#[cfg(loom)]
#[path = "../loom-tests/src/twins.rs"]
mod twins;

const STATE: u32 = 3;
const OPEN: u32 = 1;
const FENCED: u32 = 2;
const SHUT: u32 = 3;
const EPOCH: u32 = 4;

/// The first time that a pending fork keeps others out, in ns; doubles up to `LAST_BOUND` (G11).
pub(crate) const FIRST_BOUND: u64 = 1_000_000;
/// The longest that a pending fork keeps others out at a time, and the bound after commitment.
pub(crate) const LAST_BOUND: u64 = 100_000_000;
/// How long a committed fork is watched before it is taken to wait for somebody (`Gate::past_bound`).
const WATCH: u64 = LAST_BOUND / 2;
/// How much of that the kernel must have been at work for it to be a copy, in ms.
const AT_WORK: u64 = WATCH / 8 / 1_000_000;
/// How long a forker lets those in first that an earlier fork kept waiting (G3).
pub(crate) const COURTESY: u64 = 1_000_000;
/// How soon a thread that seems to wait for a lock of the forker's is asked again: it may have been on its way to sleep.
pub(crate) const ASK_AGAIN: u64 = 50_000;
/// How often a forker looks again before it sleeps: regions end in nanoseconds, a sleep costs microseconds.
const LOOKS: u32 = if cfg!(loom) { 0 } else { 200 };

/// No time that a thread has used.
const UNWATCHED: u64 = u64::MAX;

/// How waiting for the regions to end went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Nobody else is in a region and the gate is still shut.
    Drained,
    /// The bound passed.
    TimedOut,
    /// A waiter reopened the gate.
    Reopened,
    /// A thread that holds a lock wants to fork: it goes first.
    GiveWay,
    /// That thread and this one each hold something the other waits for.
    Deadlock,
}

/// The words first, the seats after them (runtime/mod.rs counts on it).
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Gate<S> {
    word: AtomicU32,
    /// `OPEN` or `FENCED`: what an opening puts into `word`.
    mode: AtomicU32,
    /// When a waiter may reopen a shut gate.
    deadline: AtomicU64,
    /// The word of the committed gate. Who reopens it and who forked take it away; the second of them ends `Seats::loosen`.
    committed: AtomicU32,
    /// What the committed fork had used when a waiter began to watch it (`Used`), or `UNWATCHED`.
    watched: AtomicU64,
    /// Threads kept waiting at the gate and not let in yet.
    waiters: AtomicU32,
    /// A forker waits for `waiters` to become 0.
    courteous: AtomicU32,
    /// Moves on when a region ends at a shut gate; the forker sleeps on it.
    drain: AtomicU32,
    sleeping: AtomicU32,
    /// The word of the shut gate that was found without regions: from here on nobody goes first.
    drained: AtomicU32,
    /// Moves on when the gate is opened and when somebody goes first: those who may go first sleep on it, and ask again.
    asks: AtomicU32,
    /// The id of the role's holder; 0 if free.
    role: AtomicU32,
    queued: AtomicU32,
    tickets: AtomicU32,
    /// Moves on when the role is given back or a turn given up. Those who queue sleep on it: `role` itself may have been
    /// taken and given back between their look and their sleep.
    turn: AtomicU32,
    /// Copied to children: once left behind, a lock stays held.
    ghosts: AtomicU32,
    /// How often a waiter reopened the gate, and the whole time regions waited, for `stats`.
    pub(crate) reopened: AtomicU64,
    pub(crate) seats: S,
}

impl<S: Seats> Gate<S> {
    #[cfg(not(loom))]
    pub(crate) const fn new(seats: S) -> Self {
        Self {
            word: AtomicU32::new(OPEN),
            mode: AtomicU32::new(OPEN),
            deadline: AtomicU64::new(0),
            committed: AtomicU32::new(0),
            watched: AtomicU64::new(UNWATCHED),
            waiters: AtomicU32::new(0),
            courteous: AtomicU32::new(0),
            drain: AtomicU32::new(0),
            sleeping: AtomicU32::new(0),
            drained: AtomicU32::new(0),
            asks: AtomicU32::new(0),
            role: AtomicU32::new(0),
            queued: AtomicU32::new(0),
            tickets: AtomicU32::new(0),
            turn: AtomicU32::new(0),
            ghosts: AtomicU32::new(0),
            reopened: AtomicU64::new(0),
            seats,
        }
    }

    // -- regions

    /// Begins a region of `kind`; an outermost one waits while the gate is shut. True if it was outermost.
    #[inline(always)]
    pub(crate) fn enter(&self, me: &Slot, kind: u64) -> bool {
        let d = me.depth.load(Relaxed);
        me.depth.store(d + kind, Relaxed);
        if d != 0 {
            return false;
        }
        if !fault("enter_no_fence") {
            light_fence();
        }
        // Acquire pairs with the opening's Release: this region sees what the forker's hooks left.
        if self.word.load(if fault("enter_relaxed") { Relaxed } else { Acquire }) & STATE != OPEN {
            self.enter_slow(me, kind, None);
        }
        true
    }

    /// `enter` with an end to the waiting; false, and no region, when it passes.
    pub(crate) fn enter_until(&self, me: &Slot, kind: u64, deadline: Option<u64>) -> bool {
        let d = me.depth.load(Relaxed);
        me.depth.store(d + kind, Relaxed);
        if d != 0 {
            return true;
        }
        light_fence();
        self.word.load(Acquire) & STATE == OPEN || self.enter_slow(me, kind, deadline)
    }

    /// Begins a region unless the gate is shut. Never waits. Async-signal-safe.
    ///
    /// A nested one looks at the gate too: a signal may have come between the outer region's store of `depth` and its
    /// look at the gate, where `depth` says more than is true yet.
    pub(crate) fn try_enter(&self, me: &Slot, kind: u64) -> bool {
        let d = me.depth.load(Relaxed);
        me.depth.store(d + kind, Relaxed);
        fence(SeqCst);
        if self.word.load(Acquire) & STATE != SHUT || self.role.load(Relaxed) == me.id() {
            return true;
        }
        me.depth.store(d, Release);
        self.left();
        false
    }

    #[cold]
    #[inline(never)]
    fn enter_slow(&self, me: &Slot, kind: u64, deadline: Option<u64>) -> bool {
        // In FENCED mode this fence is the region's half; it pairs with the one in `shut`.
        fence(SeqCst);
        let mut asked = self.asks.load(Acquire);
        let shut = self.word.load(Acquire);
        if shut & STATE != SHUT {
            return true;
        }
        // The forker itself: its hooks and other libraries' handlers may use regions. Only this thread writes its id here.
        if self.role.load(Relaxed) == me.id() || self.goes_first(me, shut) {
            return true;
        }
        // Counted before stepping back, so that a forker never sees neither.
        self.waiters.fetch_add(1, SeqCst);
        let entered = loop {
            me.depth.store(0, Release);
            self.left();
            if !self.wait_open(me, asked, deadline) {
                break false;
            }
            me.depth.store(kind, Relaxed);
            asked = self.asks.load(Acquire);
            fence(SeqCst);
            let shut = self.word.load(Acquire);
            if shut & STATE != SHUT || fault("enter_no_recheck") || self.goes_first(me, shut) {
                break true;
            }
        };
        // 0 in the child of a fork that a signal handler has made here: nobody counts it any more.
        let last = self.waiters.fetch_update(AcqRel, Relaxed, |n| n.checked_sub(1)) == Ok(1);
        // Pairs with the kernel's own between `courtesy` calling it and its look at the count.
        fence(SeqCst);
        if last && self.courteous.load(Relaxed) != 0 && !fault("courteous_no_wake") {
            sync::futex_wake(&self.waiters, u32::MAX, ANY);
        }
        entered
    }

    /// At a gate that was found shut by `shut`, the region in the thread's seat: whether it may have it, because the forker has to wait in any
    /// case for a region that may wait for this thread. Of a lower rank, or two of them would let each other in for ever.
    ///
    /// A no is for as long as `asks` stands still. There is no new reason before the gate is opened but another that has gone first, for one
    /// of a lower rank or, without need, for an ordinary thread on its way back from the gate.
    pub(crate) fn goes_first(&self, me: &Slot, shut: u32) -> bool {
        if me.rank() == ANYBODY {
            return false;
        }
        // Those who passed the gate before it was shut are seen; where there is no membarrier, their own fence does it.
        heavy_fence();
        let forker = self.role.load(Relaxed);
        let mut waited_for = false;
        self.seats.each(|s| {
            let waits = s.depth.load(Acquire) != 0 && s.rank() < me.rank();
            waited_for = waits && s.id() != forker && !s.is_ghost();
            !waited_for
        });
        if !waited_for || fault("goes_last") {
            return false;
        }
        // Pairs with `drain`: the forker finds the count moved and looks again, or this finds that it has looked for the last time.
        self.drain.fetch_add(1, SeqCst);
        fence(SeqCst);
        if self.drained.load(Relaxed) == shut {
            return false;
        }
        if me.rank() < WRITER && !fault("goes_silently") {
            self.ask_again();
        }
        true
    }

    fn ask_again(&self) {
        self.asks.fetch_add(1, AcqRel);
        // Pairs with the kernel's own between `wait_open` calling it and its look at `asks`.
        fence(SeqCst);
        if self.waiters.load(Relaxed) != 0 {
            sync::futex_wake(&self.asks, u32::MAX, ANY);
        }
    }

    /// Waits while the gate is shut; reopens it when the forker's time is up (G11). Who may go first waits no longer than while `asks`
    /// is `asked`.
    fn wait_open(&self, me: &Slot, asked: u32, deadline: Option<u64>) -> bool {
        let asks = me.rank() != ANYBODY && !fault("asks_once");
        loop {
            // Acquire: the `deadline` that goes with this word was stored before it.
            let w = self.word.load(Acquire);
            if w & STATE != SHUT || (asks && self.asks.load(Acquire) != asked) {
                return true;
            }
            let bound = self.deadline.load(Relaxed);
            let now = sync::now();
            if now >= bound {
                self.past_bound(w, bound);
                continue;
            }
            if deadline.is_some_and(|d| now >= d) {
                return false;
            }
            let until = deadline.map_or(bound, |d| d.min(bound));
            let (place, seen) = if asks { (&self.asks, asked) } else { (&self.word, w) };
            sync::futex_wait(place, seen, ANY, Some(until));
        }
    }

    /// By a waiter. A committed fork that is at work has its time: the kernel copies page tables, 20 ms for each GiB. One that waits, in
    /// the handler of another library, may do so for a thread that is kept out here.
    fn past_bound(&self, shut: u32, bound: u64) {
        if self.committed.load(Acquire) == shut {
            let longer = sync::now().saturating_add(WATCH);
            if self.deadline.compare_exchange(bound, longer, AcqRel, Relaxed).is_err() {
                // Another waiter looks.
                return;
            }
            let used = self.seats.used(self.role.load(Relaxed));
            let before = self.watched.swap(used.pack(), AcqRel);
            if before == UNWATCHED || used.is_copying(before, AT_WORK) {
                return;
            }
        }
        self.reopen_late(shut);
    }

    /// By a waiter past the bound. Loosened and said first, because others may enter right after.
    fn reopen_late(&self, shut: u32) {
        if !fault("loosened_late") {
            self.seats.loosen(true);
        }
        if !fault("late_too_late") {
            self.say_late(shut);
        }
        let mine = self.reopen(shut);
        if fault("late_too_late") {
            self.say_late(shut);
        }
        if fault("loosened_late") {
            self.seats.loosen(true);
        }
        if mine {
            self.reopened.fetch_add(1, Relaxed);
        }
        // This finds the commitment, or `commit` finds the gate reopened.
        if !mine || !self.takes_commitment(shut) {
            self.seats.loosen(false);
        }
    }

    fn say_late(&self, shut: u32) {
        if let Some(word) = self.seats.verdict(shut) {
            verdict::late(word, shut);
        }
    }

    /// After the copy, by parent or child: whether the gate was shut to its end.
    // Into its callers: as `reset`.
    #[inline(always)]
    pub(crate) fn settle(&self, shut: u32) -> bool {
        let said = self.seats.verdict(shut).and_then(|word| verdict::settle(word, shut));
        said.unwrap_or_else(|| self.still_shut(shut))
    }

    /// By the forker, whose gate a waiter has reopened.
    pub(crate) fn was_reopened(&self, shut: u32) {
        if !self.takes_commitment(shut) {
            self.seats.loosen(false);
        }
    }

    /// The first of the two who ask leaves the end of `loosen` to the second. By its word: a slow waiter's question about an earlier
    /// fork takes nothing from this one.
    fn takes_commitment(&self, shut: u32) -> bool {
        self.committed.compare_exchange(shut, 0, AcqRel, Acquire).is_ok()
    }

    /// Ends a region of `kind`.
    #[inline(always)]
    pub(crate) fn leave(&self, me: &Slot, kind: u64) {
        let d = me.depth.load(Relaxed);
        // Release pairs with the look round in `look`: the forker, and so the child, sees what this region did.
        me.depth.store(d - kind, if fault("leave_relaxed") { Relaxed } else { Release });
        if d == kind {
            light_fence();
            if self.word.load(Relaxed) & STATE != OPEN {
                self.left();
            }
        }
    }

    /// A seat became free of regions by other means than `leave`, or `leave` found the gate not plainly open.
    #[cold]
    #[inline(never)]
    pub(crate) fn left(&self) {
        fence(SeqCst);
        if self.word.load(Relaxed) & STATE == SHUT && !fault("no_nudge") {
            self.nudge();
        }
    }

    /// The forker that waits for regions looks again.
    fn nudge(&self) {
        // Pairs with `drain`: either the forker's look round sees the seat, or it sees the count moved, or this sees it asleep.
        self.drain.fetch_add(1, AcqRel);
        fence(SeqCst);
        if self.sleeping.load(Relaxed) != 0 {
            sync::futex_wake(&self.drain, 1, ANY);
        }
    }

    // -- locks

    /// The calling thread, inside a region that is not this lock's own, is about to wait for a lock that `owner` holds; it has said for
    /// which (`Slot::sleeps`).
    pub(crate) fn waits(&self, me: &Slot, owner: u32) {
        let looks = (me.waits.load(Relaxed) | u64::from(u32::MAX)).wrapping_add(1);
        // Release pairs with the Acquire in `look`: who sees the owner sees the address.
        me.waits.store(looks | u64::from(owner), Release);
        // Pairs with the one in `shut`: the forker sees the owner, or this sees the forker.
        fence(SeqCst);
        if self.role.load(Relaxed) == owner {
            self.nudge();
        }
    }

    /// Threads were left behind inside regions: locks may be held for ever.
    pub(crate) fn has_ghosts(&self) -> bool {
        self.ghosts.load(Relaxed) != 0
    }

    pub(crate) fn set_ghosts(&self) {
        self.ghosts.store(1, Relaxed);
    }

    pub(crate) fn waits_no_more(&self, me: &Slot) {
        me.waits.store(me.waits.load(Relaxed) & !u64::from(u32::MAX), Relaxed);
        // Pairs with the one in `shut`: either the forker sees this, or the next look at the lock sees what the forker did to it.
        fence(SeqCst);
    }

    /// Whether the owner of a lock is a thread that a dirty fork or a bypass left behind.
    pub(crate) fn is_ghost(&self, id: u32) -> bool {
        self.seats.seat(id).is_some_and(Slot::is_ghost)
    }

    // -- the role

    /// Waits for the role: the holder of a lock before others (G5), then first come, first served. False when `deadline`
    /// passes.
    pub(crate) fn take_role(&self, me: &Slot, deadline: Option<u64>) -> bool {
        me.ticket.store(self.tickets.fetch_add(1, Relaxed), Relaxed);
        // Counted for as long as it says QUEUED: a forker that gives way to this thread then queues behind it, also where it is
        // slow to go on.
        self.queued.fetch_add(1, SeqCst);
        me.fork.store(QUEUED, SeqCst);
        if me.depth() != 0 {
            self.nudge();
        }
        let mut patient = true;
        let got = loop {
            let turn = self.turn.load(Acquire);
            let holder = self.role.load(Acquire);
            if holder == 0 && (!patient || self.first_in_line(me)) {
                // Acquire pairs with `drop_role`'s Release: the hook list is as the last holder left it.
                if self.role.compare_exchange(0, me.id(), SeqCst, Relaxed).is_ok() {
                    break true;
                }
                continue;
            }
            // A free role that another is to take: it is awake, or will be in a moment. The time is for a turn misjudged, as
            // by a signal handler's region on a thread that queues.
            let until = match (holder, deadline) {
                (0, d) => Some(d.unwrap_or(u64::MAX).min(sync::now() + COURTESY)),
                (_, d) => d,
            };
            let woke = sync::futex_wait(&self.turn, turn, ANY, until);
            if woke == Wake::TimedOut {
                if deadline.is_some_and(|d| sync::now() >= d) {
                    break false;
                }
                patient = false;
            }
        };
        me.fork.store(if got { OWNER } else { NONE }, SeqCst);
        self.queued.fetch_sub(1, SeqCst);
        if !got {
            // Others may have waited for this thread to take its turn.
            self.next_turn();
        }
        got
    }

    /// Takes the role if it is free, until `release_role`; for the registration of hooks, which says nothing about this thread: it may
    /// be in a coordinated fork, in another library's handler.
    pub(crate) fn try_role(&self, me: &Slot) -> bool {
        self.role.compare_exchange(0, me.id(), SeqCst, Relaxed).is_ok()
    }

    pub(crate) fn drop_role(&self, me: &Slot) {
        me.fork.store(NONE, Relaxed);
        self.release_role();
    }

    /// After a child that shares this memory was to `reopen` and `drop_role` for `me`, and may have been killed on the way: does
    /// what it left undone.
    #[cfg(not(loom))]
    pub(crate) fn finish_for(&self, me: &Slot, shut: u32) {
        let reopened = self.reopen(shut);
        // Only this thread, and a child that acts for it, put its id there.
        if self.role.load(Acquire) == me.id() {
            if !reopened {
                self.was_reopened(shut);
            }
            self.drop_role(me);
        } else {
            self.next_turn();
        }
    }

    pub(crate) fn release_role(&self) {
        self.role.store(0, if fault("role_relaxed") { Relaxed } else { Release });
        self.next_turn();
    }

    fn next_turn(&self) {
        self.turn.fetch_add(1, AcqRel);
        // Pairs with the kernel's own between `take_role` calling it and its look at the word.
        fence(SeqCst);
        if self.queued.load(Relaxed) != 0 && !fault("turn_no_wake") {
            sync::futex_wake(&self.turn, u32::MAX, ANY);
        }
    }

    fn first_in_line(&self, me: &Slot) -> bool {
        if self.queued.load(SeqCst) <= 1 {
            return true;
        }
        let (mine, holds) = (me.ticket.load(Relaxed), me.depth() != 0);
        let mut first = true;
        self.seats.each(|s| {
            if !std::ptr::eq(s, me) && s.fork.load(SeqCst) == QUEUED {
                let theirs = s.depth.load(Relaxed) != 0;
                let older = s.ticket.load(Relaxed).wrapping_sub(mine) > u32::MAX / 2;
                first &= !((theirs && !holds) || (theirs == holds && older));
            }
            first
        });
        first
    }

    // -- the forker; all of these need the role

    /// Those whom the last fork kept waiting get in before this one shuts (G3), for as long as `COURTESY`.
    pub(crate) fn courtesy(&self) {
        let waiting = self.waiters.load(SeqCst);
        if waiting == 0 {
            return;
        }
        let until = sync::now() + COURTESY;
        self.courteous.store(1, SeqCst);
        loop {
            let waiting = self.waiters.load(SeqCst);
            if waiting == 0 || sync::futex_wait(&self.waiters, waiting, ANY, Some(until)) == Wake::TimedOut {
                break;
            }
        }
        self.courteous.store(0, Relaxed);
    }

    /// Shuts the gate; from here on no other thread begins an outermost region. The word that says so.
    pub(crate) fn shut(&self, bound: u64) -> u32 {
        self.deadline.store(sync::now().saturating_add(bound), Relaxed);
        let open = self.word.load(Relaxed);
        debug_assert_ne!(open & STATE, SHUT, "only the role's holder shuts");
        let shut = (open & !STATE).wrapping_add(EPOCH) | SHUT;
        // SeqCst, with the fence below: the other half of `enter` and `leave`.
        self.word.store(shut, SeqCst);
        if self.mode.load(Relaxed) == FENCED {
            fence(SeqCst);
        } else if !fault("shut_no_fence") && !heavy_fence() {
            self.mode.store(FENCED, SeqCst);
            sync::fence_by_other_means();
        }
        shut
    }

    /// Opens a gate that is still shut by `shut`; false if somebody was faster.
    pub(crate) fn reopen(&self, shut: u32) -> bool {
        let open = (shut & !STATE).wrapping_add(EPOCH) | self.mode.load(Relaxed);
        let mine = self.word.compare_exchange(shut, open, AcqRel, Relaxed).is_ok();
        // Pairs with the fence in `left`, which a waiter passes between counting itself and looking at the word.
        fence(SeqCst);
        if mine && self.waiters.load(Relaxed) != 0 && !fault("reopen_no_wake") {
            sync::futex_wake(&self.word, u32::MAX, ANY);
        }
        if mine {
            self.ask_again();
        }
        mine
    }

    pub(crate) fn still_shut(&self, shut: u32) -> bool {
        self.word.load(Acquire) == shut
    }

    /// Waits until no other thread is in a region, at most until `until`.
    pub(crate) fn drain(&self, me: &Slot, shut: u32, until: u64, busy: &mut Busy) -> Drain {
        let mut looks = 0;
        let mut asked: Option<(u32, u64)> = None;
        let end = loop {
            let dozing = looks >= LOOKS;
            if dozing {
                self.sleeping.store(1, SeqCst);
            }
            let seen = self.drain.load(SeqCst);
            self.look(me, busy);
            if busy.count == 0 {
                // A waiter may have reopened before the look, and its region ended already: not drained.
                if !self.still_shut(shut) {
                    break Drain::Reopened;
                }
                self.drained.store(shut, Relaxed);
                // Pairs with `goes_first`.
                fence(SeqCst);
                if self.drain.load(Relaxed) == seen || fault("drained_in_one_look") {
                    break Drain::Drained;
                }
                continue;
            }
            if !self.still_shut(shut) {
                break Drain::Reopened;
            }
            if busy.queued && !fault("holder_not_first") {
                // Another thread in a region wants to fork too: who holds nothing lets it go first (G5).
                break if me.depth() == 0 { Drain::GiveWay } else { Drain::Deadlock };
            }
            let mut doze = until;
            if let Some((who, look)) = busy.waits_for_me {
                let again = asked.is_some_and(|(other, _)| other == who);
                if fault("stale_wait_believed") || (again && asked != Some((who, look))) {
                    break Drain::Deadlock;
                }
                // What it published may be old: make it look at its lock again. It may be about to sleep, and miss this.
                if !again || (dozing && !fault("asked_once")) {
                    asked = Some((who, look));
                    if let Some(s) = self.seats.seat(who) {
                        sync::futex_wake_at(s.waits_at().0);
                    }
                }
                if !fault("asked_once") {
                    doze = until.min(sync::now().saturating_add(ASK_AGAIN));
                }
            }
            if dozing {
                if sync::futex_wait(&self.drain, seen, ANY, Some(doze)) == Wake::TimedOut && sync::now() >= until {
                    break Drain::TimedOut;
                }
            } else {
                looks += 1;
                sync::spin_loop();
            }
        };
        self.sleeping.store(0, Relaxed);
        end
    }

    /// A look round the seats of all other threads.
    pub(crate) fn look(&self, me: &Slot, busy: &mut Busy) {
        busy.forget();
        self.seats.each(|s| {
            // Acquire pairs with `leave`'s Release. A ghost's depth is no region.
            if std::ptr::eq(s, me) || s.depth.load(Acquire) == 0 || s.is_ghost() {
                return true;
            }
            if busy.count < NAMED {
                busy.seen[busy.count] = Some(s.seen());
            }
            busy.count += 1;
            match s.fork.load(SeqCst) {
                QUEUED => busy.queued = true,
                ENTERED => busy.entered = true,
                _ => {}
            }
            let waits = s.waits.load(Acquire);
            if me.depth() != 0 && waits as u32 == me.id() {
                busy.waits_for_me = Some((s.id(), waits));
            }
            true
        });
    }

    /// Calls `f` with each thread that is in a region, its guards and its locks.
    pub(crate) fn each_busy(&self, mut f: impl FnMut(Seen, u32, u32)) {
        self.seats.each(|s| {
            // As in `look`.
            let depth = s.depth.load(Acquire);
            if depth != 0 && !s.is_ghost() {
                f(s.seen(), (depth % LOCK) as u32, (depth / LOCK) as u32);
            }
            true
        });
    }

    /// The role goes to the thread that holds something; this one queues again behind it.
    pub(crate) fn requeue(&self, me: &Slot, deadline: Option<u64>) -> bool {
        self.release_role();
        self.take_role(me, deadline)
    }

    /// The gate is shut and every hook prepared: waiters give the fork `LAST_BOUND` from here, and longer while it is at work.
    pub(crate) fn commit(&self, shut: u32) -> bool {
        self.watched.store(UNWATCHED, Relaxed);
        self.deadline.store(sync::now().saturating_add(LAST_BOUND - WATCH), Relaxed);
        // Release pairs with `past_bound`: who sees the commitment sees that nobody has watched it.
        self.committed.store(shut, Release);
        let pending = self.seats.verdict(shut).is_none_or(|word| verdict::commit(word, shut));
        // A write, so that the waiter's in `reopen` comes before it, and is found, or after, and finds `committed`.
        let kept = pending && self.word.compare_exchange(shut, shut, AcqRel, Acquire).is_ok();
        if !kept {
            self.was_reopened(shut);
        }
        kept
    }

    /// Leaves the gate open for `ns` and comes back early if a thread that holds something wants to fork.
    pub(crate) fn rest(&self, me: &Slot, ns: u64, busy: &mut Busy) {
        let until = sync::now().saturating_add(ns);
        self.sleeping.store(1, SeqCst);
        loop {
            let seen = self.drain.load(SeqCst);
            self.look(me, busy);
            if busy.queued || sync::futex_wait(&self.drain, seen, ANY, Some(until)) == Wake::TimedOut {
                break;
            }
        }
        self.sleeping.store(0, Relaxed);
    }

    /// In the child, where nobody else is: every word as if new, whatever it was copied as. Seats are the table's to mend.
    ///
    /// Overwriting, not undoing: a count or a bit that a thread left behind would stay for ever.
    // Into its caller, which lies with the code that children run: another page of code is a fault.
    #[inline(always)]
    pub(crate) fn reset(&self) {
        let w = self.word.load(Relaxed);
        self.word.store((w & !STATE).wrapping_add(EPOCH) | self.mode.load(Relaxed), Relaxed);
        // On, as the word: a signal handler may have forked while its thread slept on it, which it goes on with.
        self.asks.store(self.asks.load(Relaxed).wrapping_add(1), Relaxed);
        self.committed.store(0, Relaxed);
        for word in [
            &self.waiters,
            &self.courteous,
            &self.drain,
            &self.sleeping,
            &self.drained,
            &self.role,
            &self.queued,
            &self.turn,
        ] {
            if !fault("reset_keeps_words") {
                word.store(0, Relaxed);
            }
        }
        fence(SeqCst);
    }

    /// Membarrier is not to be had from the start: every region carries its own fence. Before any region.
    pub(crate) fn use_fences(&self) {
        self.mode.store(FENCED, SeqCst);
        self.word.store(FENCED, SeqCst);
    }
}
