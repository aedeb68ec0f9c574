//! How a fork is modelled: `prepare`, a copy of every word, and only the forker goes on in the child.
//!
//! Each thread has a cell that it writes in its regions. The forker reads them all at the instant: loom reports any region
//! that is not ordered before or after it, whether or not the two were seen to overlap. Where waiters may reopen the gate
//! (G11) a region may overlap rightly, so there the copy itself is looked at: a region in it, and a verdict that it is whole, is
//! the failure. The kernel copies page by page, in no order that a program knows: here the gate first, and what regions did last.
//!
//! Time stands still but for `Clock`. So in a model without one, what the library would mend by a time-out is a deadlock.

mod care;
mod clocked;
mod condvars;
mod faults;
mod forkers;
mod hooks;
mod nested;
mod regions;
mod verdicts;
mod words;

use crate::gate::{
    ASK_AGAIN, Busy, COURTESY, Drain, FIRST_BOUND, GUARD, Gate, HANDLER, LAST_BOUND, LOCK, Seats, Slot, WRITER, Word,
};
use crate::prepare::{Hooks, How, Outcome, Plan, Steps, prepare};
use crate::sync;
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread::{self, JoinHandle};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Runs `f` in every interleaving with at most `preemptions` switches away from a thread that could go on.
fn check(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    check_with(preemptions, true, f);
}

fn check_with(preemptions: usize, membarrier: bool, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    let runs = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = Arc::clone(&runs);
    let start = std::time::Instant::now();
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        sync::begin(membarrier);
        f();
    });
    println!("{} interleavings, {:?}", runs.load(Ordering::Relaxed), start.elapsed());
}

/// The seats of threads 0, 1, ...; their ids are one more.
struct Table {
    seats: Vec<Slot>,
    /// How often the registry is loosened.
    loose: AtomicU32,
    /// One for all forks: each takes it from the one before.
    verdict: AtomicU32,
}

impl Table {
    fn new(seats: Vec<Slot>) -> Table {
        Table { seats, loose: AtomicU32::new(0), verdict: AtomicU32::new(0) }
    }
}

impl Seats for Table {
    fn each(&self, mut f: impl FnMut(&Slot) -> bool) {
        let _all = self.seats.iter().all(&mut f);
    }

    fn seat(&self, id: u32) -> Option<&Slot> {
        self.seats.get((id as usize).checked_sub(1)?)
    }

    fn verdict(&self, _: u32) -> Option<&AtomicU32> {
        Some(&self.verdict)
    }

    fn loosen(&self, begins: bool) {
        self.loose.fetch_add(if begins { 1 } else { u32::MAX }, Ordering::AcqRel);
    }
}

/// What the threads of a model share.
struct World {
    gate: Gate<Table>,
    /// What thread `i` writes in its regions.
    data: Vec<UnsafeCell<u32>>,
    inside: Vec<AtomicU32>,
    /// Written by whoever holds the role.
    role: UnsafeCell<u32>,
    /// No waiter of this model can reopen the gate.
    strict: bool,
    /// The child goes on; it costs, so not in every model.
    child: bool,
}

// SAFETY: not a promise but the question: loom checks each access to the cells.
unsafe impl Sync for World {}
// SAFETY: as above.
unsafe impl Send for World {}

impl World {
    fn new(threads: u32) -> Arc<World> {
        Self::with(threads, true, false)
    }

    /// A model where the child goes on after each fork.
    fn with_child(threads: u32) -> Arc<World> {
        Self::with(threads, true, true)
    }

    /// A model with a clock: waiters may reopen the gate.
    fn reopening(threads: u32) -> Arc<World> {
        Self::with(threads, false, false)
    }

    fn with(threads: u32, strict: bool, child: bool) -> Arc<World> {
        Arc::new(World {
            gate: Gate::new(Table::new((1..=threads).map(Slot::new).collect())),
            data: (0..threads).map(|_| UnsafeCell::new(0)).collect(),
            inside: (0..threads).map(|_| AtomicU32::new(0)).collect(),
            role: UnsafeCell::new(0),
            strict,
            child,
        })
    }

    fn seat(&self, i: usize) -> &Slot {
        &self.gate.seats.seats[i]
    }

    /// Starts thread `i`.
    fn thread(self: &Arc<Self>, i: usize, f: impl FnOnce(&World, &Slot) + 'static) -> JoinHandle<()> {
        let world = Arc::clone(self);
        thread::spawn(move || f(&world, world.seat(i)))
    }

    fn enter(&self, me: &Slot, kind: u64) {
        self.gate.enter(me, kind);
        self.acts(me, 1);
    }

    /// What a thread does in its region.
    fn acts(&self, me: &Slot, inside: u32) {
        let i = me.id() as usize - 1;
        if self.strict {
            // SAFETY: loom checks it.
            self.data[i].with_mut(|d| unsafe { *d += 1 });
        } else {
            // Release: who sees this in the copy sees what was said before the gate let it be.
            self.inside[i].store(inside, Ordering::Release);
        }
    }

    fn leave(&self, me: &Slot, kind: u64) {
        self.acts(me, u32::from(!me.only(kind)));
        self.gate.leave(me, kind);
    }

    fn region(&self, me: &Slot) {
        self.enter(me, GUARD);
        self.leave(me, GUARD);
    }

    /// Forks until it has worked, or to the end of the budget.
    fn fork(&self, me: &Slot, steps: &mut impl Step, deadline: Option<u64>) -> Ended {
        let let_go_at = deadline.map(|d| d / 2);
        let mut plan = Plan { coordinated: true, deadline, let_go_at, bound: FIRST_BOUND, since: None };
        loop {
            match self.fork_once(me, steps, &plan) {
                Ended::Not(Outcome::Again { bound, since }) => (plan.bound, plan.since) = (bound, Some(since)),
                Ended::Reopened if deadline.is_none_or(|d| sync::now() < d) => {}
                ended => return ended,
            }
        }
    }

    fn fork_once(&self, me: &Slot, steps: &mut impl Step, plan: &Plan) -> Ended {
        let mut busy = Busy::NONE;
        let outcome = prepare(&self.gate, me, steps, plan, &mut busy);
        let Outcome::Committed(shut) = outcome else {
            assert!(steps.is_undone());
            steps.restore_signals();
            return Ended::Not(outcome);
        };
        // Both ends of the instant: from here to the end of the copy.
        // SAFETY: loom checks it.
        self.role.with_mut(|r| unsafe { *r += 1 });
        steps.at_fork();
        let forked = self.copies(me, shut, || steps.finish());
        self.gate.drop_role(me);
        steps.restore_signals();
        if forked { Ended::Forked } else { Ended::Reopened }
    }

    /// From the copy to the reopening, with the role; `parent` is the parent's side. Whether the child is one.
    fn copies(&self, me: &Slot, shut: u32, parent: impl FnOnce()) -> bool {
        let child = self.copied();
        // By the child, whose memory is all there, in the word that it shares with the parent.
        let forked = self.gate.settle(shut);
        assert!(forked || !self.strict, "nobody could have reopened it");
        if forked {
            // `depth` would be no evidence: who is about to step back from a shut gate has said 1 there.
            for (i, inside) in child.inside.iter().enumerate() {
                assert_eq!(inside.load(Ordering::Relaxed), 0, "thread {i} is in a region of the child");
            }
            if self.child {
                child.goes_on(me.id() as usize - 1);
            }
        }
        if !forked {
            // Whoever enters from here on has seen it too: what it registers is marked.
            assert_ne!(self.loose(), 0, "reopened after the commitment, and the registry knows nothing of it");
        }
        parent();
        assert_eq!(self.gate.settle(shut), forked, "parent and child disagree");
        let ours = self.gate.reopen(shut);
        assert!(ours || !self.strict);
        if !ours {
            self.gate.was_reopened(shut);
        }
        forked
    }

    fn loose(&self) -> u32 {
        self.gate.seats.loose.load(Ordering::Acquire)
    }

    fn copied(&self) -> World {
        if self.strict {
            for d in &self.data {
                // SAFETY: loom checks it.
                d.with(|d| unsafe { *d });
            }
        }
        let gate = self.gate.copied(Table::new(self.gate.seats.seats.iter().map(Slot::copied).collect()));
        let inside = self.inside.iter().map(|i| AtomicU32::new(i.load(Ordering::Acquire))).collect();
        World {
            gate,
            data: self.data.iter().map(|_| UnsafeCell::new(0)).collect(),
            inside,
            role: UnsafeCell::new(0),
            strict: true,
            child: false,
        }
    }

    /// In the child, where only thread `i` is: what the runtime does there.
    fn becomes_child(&self, i: usize) {
        let me = self.seat(i);
        self.gate.seats.each(|s| {
            if !std::ptr::eq(s, me) {
                s.clear();
            }
            true
        });
        self.gate.reset();
        me.set_entered(false);
    }

    /// In the child: every operation, by threads of its own in the seats that became free.
    fn goes_on(&self, i: usize) {
        self.becomes_child(i);
        let me = self.seat(i);
        let held = me.depth();
        for s in &self.gate.seats.seats {
            assert!(self.gate.try_enter(s, GUARD), "the child's gate is shut");
            self.gate.leave(s, GUARD);
            self.gate.enter(s, LOCK);
            self.gate.leave(s, LOCK);
        }
        assert_eq!(me.depth(), held);
        for s in &self.gate.seats.seats {
            if held != 0 && !std::ptr::eq(s, me) {
                continue;
            }
            let plan = Plan { coordinated: true, deadline: None, let_go_at: None, bound: FIRST_BOUND, since: None };
            let outcome = prepare(&self.gate, s, &mut NoHooks, &plan, &mut Busy::NONE.clone());
            let Outcome::Committed(shut) = outcome else { panic!("the child cannot fork: {outcome:?}") };
            assert!(self.gate.reopen(shut));
            self.gate.drop_role(s);
        }
    }
}

/// How a fork ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Forked,
    /// A waiter reopened the gate before the copy was whole.
    Reopened,
    Not(Outcome),
}

/// A model's hooks.
trait Step: Steps {
    fn at_fork(&mut self) {}
    /// The parent's side.
    fn finish(&mut self) {}
    fn is_undone(&self) -> bool {
        true
    }
}

struct NoHooks;

impl Steps for NoHooks {
    fn block_signals(&mut self) {}
    fn restore_signals(&mut self) {}
    fn hooks(&mut self, _: How) -> Hooks {
        Hooks::Ready
    }
    fn undo(&mut self) {}
}

impl Step for NoHooks {}

/// Moves time on until the model is through: first at any moment, then whenever nobody else can go on.
struct Clock {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Clock {
    fn start(step: u64) -> Clock {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            for _ in 0..MOST_STEPS {
                sync::advance(step);
                thread::yield_now();
                if seen.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        Clock { stop, thread }
    }

    /// Moves time on where nobody else can go on, and ends before a fork's first bound does.
    fn within_the_bound() -> Clock {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            for _ in 1..FIRST_BOUND / ASK_AGAIN {
                thread::yield_now();
                if seen.load(Ordering::Relaxed) {
                    return;
                }
                sync::advance(ASK_AGAIN);
            }
        });
        Clock { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// More than any model needs: a livelock is a failure.
const MOST_STEPS: u32 = 40;

/// A lock as the hooks of other libraries have it: knows nothing of forks.
struct Foreign {
    word: AtomicU32,
    held: UnsafeCell<u32>,
}

// SAFETY: loom checks each access to the cell.
unsafe impl Sync for Foreign {}

impl Foreign {
    fn new() -> Self {
        Foreign { word: AtomicU32::new(0), held: UnsafeCell::new(0) }
    }

    fn try_lock(&self) -> bool {
        let locked = self.word.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok();
        if locked {
            // SAFETY: loom checks it.
            self.held.with_mut(|h| unsafe { *h += 1 });
        }
        locked
    }

    /// True if locked before `until`.
    fn lock(&self, until: Option<u64>) -> bool {
        while !self.try_lock() {
            if sync::futex_wait(&self.word, 1, sync::ANY, until) == sync::Wake::TimedOut {
                return false;
            }
        }
        true
    }

    fn unlock(&self) {
        self.word.store(0, Ordering::Release);
        sync::futex_wake(&self.word, 1, sync::ANY);
    }
}
