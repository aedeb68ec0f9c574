//! The condition variable's word (L1 to L4): no notification is lost, whatever forks, and a child's copy works.
//!
//! Where no thread moves the clock, a lost wake-up is a deadlock, which loom reports.

use super::*;
use crate::locks::word_condvar::WordCondvar;
use crate::locks::word_mutex::WordMutex;

const ALL: u32 = u32::MAX;

/// A queue of things that are counted only.
struct Queue {
    world: Arc<World>,
    mutex: WordMutex,
    bell: WordCondvar,
    things: UnsafeCell<u32>,
}

// SAFETY: not a promise but the question: loom checks each access to the cell.
unsafe impl Sync for Queue {}
// SAFETY: as above.
unsafe impl Send for Queue {}

impl Queue {
    fn new(world: Arc<World>) -> Arc<Queue> {
        Arc::new(Queue { world, mutex: WordMutex::new(), bell: WordCondvar::new(), things: UnsafeCell::new(0) })
    }

    fn thread(self: &Arc<Self>, i: usize, f: impl FnOnce(&Queue, &Slot) + 'static) -> JoinHandle<()> {
        let queue = Arc::clone(self);
        thread::spawn(move || {
            let me = queue.me(i);
            f(&queue, me);
            assert_eq!(me.depth(), 0, "thread {i} left a region open");
        })
    }

    fn me(&self, i: usize) -> &Slot {
        self.world.seat(i)
    }

    fn lock(&self, me: &Slot) {
        self.mutex.lock(&self.world.gate, me);
    }

    fn unlock(&self, me: &Slot) {
        self.mutex.unlock(&self.world.gate, me);
    }

    /// Under the mutex.
    fn things(&self) -> u32 {
        // SAFETY: loom checks it.
        self.things.with(|t| unsafe { *t })
    }

    fn set(&self, things: u32) {
        // SAFETY: loom checks it.
        self.things.with_mut(|t| unsafe { *t = things });
    }

    /// As condvar.rs does.
    fn wait(&self, me: &Slot, deadline: Option<u64>) -> bool {
        let woken = self.bell.wait(deadline, || self.unlock(me));
        self.lock(me);
        woken
    }

    fn take(&self, me: &Slot) {
        self.lock(me);
        while self.things() == 0 {
            self.wait(me, None);
        }
        self.set(self.things() - 1);
        self.unlock(me);
    }

    fn put(&self, me: &Slot, things: u32, wakes: u32) {
        self.lock(me);
        self.set(self.things() + things);
        self.unlock(me);
        self.bell.notify(wakes);
    }

    fn fork(&self, me: &Slot) {
        assert_eq!(self.world.fork(me, &mut NoHooks, None), Ended::Forked);
    }

    /// As the child of thread `i` finds it.
    fn copied(&self, i: usize) -> Arc<Queue> {
        let world = self.world.copied();
        world.becomes_child(i);
        let things = UnsafeCell::new(self.things());
        Arc::new(Queue { world: Arc::new(world), mutex: self.mutex.copied(), bell: self.bell.copied(), things })
    }
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn a_waiter_and_a_notifier() {
    for wakes in [1, ALL] {
        check(4, move || {
            let q = Queue::new(World::new(2));
            let taker = q.thread(1, Queue::take);
            q.put(q.me(0), 1, wakes);
            join([taker]);
        });
    }
}

/// One at a time: the first notification leaves the second waiter its bit.
#[test]
fn two_waiters_and_one_notifier() {
    check(3, || {
        let q = Queue::new(World::new(3));
        let takers = [q.thread(1, Queue::take), q.thread(2, Queue::take)];
        q.put(q.me(0), 1, 1);
        q.put(q.me(0), 1, 1);
        join(takers);
    });
}

#[test]
fn all_at_once() {
    check(3, || {
        let q = Queue::new(World::new(3));
        let takers = [q.thread(1, Queue::take), q.thread(2, Queue::take)];
        q.put(q.me(0), 2, ALL);
        join(takers);
    });
}

/// A waiter that says its time was up has not taken the wake-up that was another's. It need not look at the queue then.
#[test]
fn a_timed_out_waiter_takes_no_wake_up() {
    check(2, || {
        let q = Queue::new(World::new(3));
        let got = Arc::new(AtomicBool::new(false));
        let gets = Arc::clone(&got);
        let timed = q.thread(1, move |q, me| {
            q.lock(me);
            while q.things() == 0 {
                if !q.wait(me, Some(1)) {
                    return q.unlock(me);
                }
            }
            q.set(q.things() - 1);
            gets.store(true, Ordering::Relaxed);
            q.unlock(me);
        });
        let patient = q.thread(2, Queue::take);
        let clock = thread::spawn(|| sync::advance(1));
        q.put(q.me(0), 1, 1);
        join([timed, clock]);
        if got.load(Ordering::Relaxed) {
            q.put(q.me(0), 1, 1);
        }
        join([patient]);
    });
}

/// Who waits is in no region: a fork that comes before the notification need not wait for it.
#[test]
fn a_fork_while_one_waits() {
    check(3, || {
        let q = Queue::new(World::new(2));
        let taker = q.thread(1, Queue::take);
        q.fork(q.me(0));
        q.put(q.me(0), 1, 1);
        join([taker]);
    });
}

/// A third thread forks, at any point of waiting and notifying.
#[test]
fn a_waiter_a_notifier_and_a_forker() {
    check(1, || {
        let q = Queue::new(World::new(3));
        let others = [q.thread(1, Queue::take), q.thread(2, |q, me| q.put(me, 1, 1))];
        q.fork(q.me(0));
        join(others);
    });
}

/// A waiter in a region of its own keeps forks waiting, and the notifier waits at the gate; the bound lets it by (G11).
#[test]
fn waiting_inside_a_region() {
    check(1, || {
        let q = Queue::new(World::reopening(3));
        let waits = q.thread(1, |q, me| {
            q.world.gate.enter(me, GUARD);
            q.take(me);
            q.world.gate.leave(me, GUARD);
        });
        let notifies = q.thread(2, |q, me| q.put(me, 1, 1));
        let clock = Clock::start(FIRST_BOUND);
        let ended = q.world.fork(q.me(0), &mut NoHooks, Some(6 * FIRST_BOUND));
        assert!(matches!(ended, Ended::Forked | Ended::Not(Outcome::Busy) | Ended::Reopened), "{ended:?}");
        join([waits, notifies]);
        clock.stop();
    });
}

/// The child has the queue as it was, with the bits of waiters that are not there.
struct Child<'a>(&'a Arc<Queue>);

impl Steps for Child<'_> {
    fn block_signals(&mut self) {}
    fn restore_signals(&mut self) {}
    fn hooks(&mut self, _: How) -> Hooks {
        Hooks::Ready
    }
    fn undo(&mut self) {}
}

impl Step for Child<'_> {
    fn at_fork(&mut self) {
        let q = self.0.copied(0);
        let me = q.me(0);
        if !q.mutex.is_mine(me) {
            q.lock(me);
        }
        assert!(!q.wait(me, Some(sync::now())), "nobody is there to notify");
        q.set(0);
        q.unlock(me);
        // A thread of the child's own, in the seat of the one that waited.
        let taker = q.thread(1, Queue::take);
        q.put(me, 1, 1);
        join([taker]);
        q.bell.notify(ALL);
    }
}

#[test]
fn the_childs_copy() {
    for holds in [false, true] {
        check(2, move || {
            let q = Queue::new(World::new(2));
            let me = q.me(0);
            let taker = q.thread(1, Queue::take);
            if holds {
                q.lock(me);
            }
            assert_eq!(q.world.fork(me, &mut Child(&q), None), Ended::Forked);
            if holds {
                q.unlock(me);
            }
            q.put(me, 1, 1);
            join([taker]);
        });
    }
}
