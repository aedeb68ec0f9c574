//! Regions and one forker (G1, G2, G7, G12). No clock: nothing here may need a time-out.

use super::*;

/// What a region did is ordered before a fork that found it ended.
#[test]
fn the_end_of_a_region() {
    check(4, || {
        let w = World::new(2);
        w.gate.enter(w.seat(1), GUARD);
        let a = w.thread(1, |w, me| {
            w.acts(me, 1);
            w.leave(me, GUARD);
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
    });
}

/// Two regions and a fork: at its instant nobody else is in a region.
#[test]
fn two_regions_and_a_forker() {
    check(2, || {
        let w = World::new(3);
        let a = w.thread(1, World::region);
        let b = w.thread(2, World::region);
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
        b.join().unwrap();
    });
}

/// Back to back: who waited looks at the gate again, and is let in between two forks.
#[test]
fn regions_between_two_forks() {
    check(2, || {
        let w = World::new(2);
        let a = w.thread(1, |w, me| {
            w.region(me);
            w.region(me);
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
    });
}

/// Who is slow to come in when the gate opens, past the next fork's courtesy, finds it shut again.
#[test]
fn coming_in_late() {
    check(2, || {
        let w = World::new(2);
        let me = w.seat(0);
        assert!(w.gate.try_role(me));
        // The bound is far off: nobody but the forker reopens.
        let shut = w.gate.shut(LAST_BOUND);
        let a = w.thread(1, World::region);
        assert!(w.gate.reopen(shut));
        w.gate.drop_role(me);
        let clock = thread::spawn(|| sync::advance(COURTESY));
        let plan = Plan { coordinated: true, deadline: None, let_go_at: None, bound: LAST_BOUND, since: None };
        assert_eq!(w.fork_once(me, &mut NoHooks, &plan), Ended::Forked);
        a.join().unwrap();
        clock.join().unwrap();
    });
}

/// Without membarrier each region carries its own fence.
#[test]
fn without_membarrier() {
    check_with(3, false, || {
        let w = World::new(2);
        w.gate.use_fences();
        let a = w.thread(1, |w, me| {
            w.region(me);
            w.region(me);
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
    });
}

/// A nested region never waits: with a shut gate that no clock reopens, waiting would be a deadlock.
#[test]
fn nesting() {
    check(3, || {
        let w = World::new(2);
        let a = w.thread(1, |w, me| {
            w.enter(me, GUARD);
            w.enter(me, LOCK);
            w.leave(me, GUARD);
            w.enter(me, GUARD);
            w.leave(me, LOCK);
            w.leave(me, GUARD);
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
    });
}

/// A, in a region, waits for B, which needs a region of its own: the fork lets B go first. With a gate that no clock reopens, keeping
/// it out would be a deadlock.
#[test]
fn a_region_that_waits_for_an_awaited_one() {
    check(2, || {
        let w = World::new(3);
        let message = Arc::new(AtomicU32::new(0));
        let sends = Arc::clone(&message);
        let a = w.thread(1, move |w, me| {
            w.enter(me, GUARD);
            while message.load(Ordering::Acquire) == 0 {
                sync::futex_wait(&message, 0, sync::ANY, None);
            }
            w.leave(me, GUARD);
        });
        let b = w.thread(2, move |w, me| {
            me.rise(WRITER);
            w.enter(me, GUARD);
            sends.store(1, Ordering::Release);
            sync::futex_wake(&sends, 1, sync::ANY);
            w.leave(me, GUARD);
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
        b.join().unwrap();
    });
}

/// A waits for nobody, and may end its region between B's look at it and the forker's.
#[test]
fn an_awaited_one_and_a_region() {
    check(3, || {
        let w = World::new(3);
        w.gate.enter(w.seat(2), GUARD);
        let b = w.thread(1, |w, me| {
            me.rise(WRITER);
            w.enter(me, GUARD);
            w.leave(me, GUARD);
        });
        let a = w.thread(2, |w, me| {
            w.acts(me, 1);
            w.leave(me, GUARD);
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
        b.join().unwrap();
    });
}

/// `try_no_forking` in a signal handler: never waits, and what it says is true.
#[test]
fn trying() {
    check(2, || {
        let w = World::new(2);
        let a = w.thread(1, |w, me| {
            if w.gate.try_enter(me, GUARD) {
                w.acts(me, 1);
                w.leave(me, GUARD);
            }
            assert_eq!(me.depth(), 0);
            w.enter(me, GUARD);
            // Nested: says yes or no, but the outer region goes on.
            if w.gate.try_enter(me, GUARD) {
                w.leave(me, GUARD);
            }
            w.acts(me, 1);
            w.leave(me, GUARD);
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
    });
}

/// A thread ends inside a region, or forces it open (G7): the forker that waits for it hears of it.
#[test]
fn end_inside_a_region() {
    check(3, || {
        let w = World::new(2);
        let a = w.thread(1, |w, me| {
            w.enter(me, GUARD);
            w.enter(me, GUARD);
            me.clear();
            w.gate.left();
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
    });
}

/// The lock's wait outside the region (L2): a thread that waits for a lock holds up no fork, not even one by the holder.
#[test]
fn waiting_for_a_lock_outside_the_region() {
    check(2, || {
        let w = World::new(3);
        let lock = Arc::new(AtomicU32::new(1));
        let waits = Arc::clone(&lock);
        let a = w.thread(1, World::region);
        let b = w.thread(2, move |w, me| {
            while waits.load(Ordering::Acquire) != 0 {
                sync::futex_wait(&waits, 1, sync::ANY, None);
            }
            w.region(me);
        });
        w.enter(w.seat(0), LOCK);
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        lock.store(0, Ordering::Release);
        sync::futex_wake(&lock, u32::MAX, sync::ANY);
        w.leave(w.seat(0), LOCK);
        a.join().unwrap();
        b.join().unwrap();
    });
}

/// In the child only the forker goes on, and every operation with it, whatever the others were at.
#[test]
fn the_child_goes_on() {
    check(3, || {
        let w = World::with_child(2);
        let a = w.thread(1, |w, me| {
            w.region(me);
            w.region(me);
        });
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        a.join().unwrap();
    });
}

/// The same where the other is a forker.
#[test]
fn the_child_goes_on_after_another_forker() {
    check(2, || {
        let w = World::with_child(2);
        let a = w.thread(1, |w, me| assert_eq!(w.fork(me, &mut NoHooks, None), Ended::Forked));
        w.enter(w.seat(0), LOCK);
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, None), Ended::Forked);
        w.leave(w.seat(0), LOCK);
        a.join().unwrap();
    });
}

/// B, slow to come in when the gate opens, finds it shut again, by a fork that waits for A, who waits for B.
#[test]
fn an_awaited_one_comes_in_late() {
    check(2, || {
        let w = World::new(3);
        let me = w.seat(0);
        assert!(w.gate.try_role(me));
        // The bound is far off: nobody but the forker reopens.
        let shut = w.gate.shut(LAST_BOUND);
        let message = Arc::new(AtomicU32::new(0));
        let sends = Arc::clone(&message);
        let b = w.thread(2, move |w, me| {
            me.rise(WRITER);
            w.enter(me, GUARD);
            sends.store(1, Ordering::Release);
            sync::futex_wake(&sends, 1, sync::ANY);
            w.leave(me, GUARD);
        });
        assert!(w.gate.reopen(shut));
        w.gate.drop_role(me);
        w.enter(w.seat(1), GUARD);
        let a = w.thread(1, move |w, me| {
            while message.load(Ordering::Acquire) == 0 {
                sync::futex_wait(&message, 0, sync::ANY, None);
            }
            w.leave(me, GUARD);
        });
        let clock = thread::spawn(|| sync::advance(COURTESY));
        let plan = Plan { coordinated: true, deadline: None, let_go_at: None, bound: LAST_BOUND, since: None };
        assert_eq!(w.fork_once(me, &mut NoHooks, &plan), Ended::Forked);
        a.join().unwrap();
        b.join().unwrap();
        clock.join().unwrap();
    });
}

/// B goes first for A, whose region ends, and waits for C in its own: C sleeps at the gate by then, or comes there.
#[test]
fn an_awaited_one_waits_for_another() {
    check(2, || {
        let w = World::new(4);
        let (me, a) = (w.seat(0), w.seat(1));
        let message = Arc::new(AtomicU32::new(0));
        let sends = Arc::clone(&message);
        w.gate.enter(a, GUARD);
        assert!(w.gate.try_role(me));
        let shut = w.gate.shut(LAST_BOUND);
        let b = w.thread(2, move |w, me| {
            me.rise(HANDLER);
            w.enter(me, GUARD);
            while message.load(Ordering::Acquire) == 0 {
                sync::futex_wait(&message, 0, sync::ANY, None);
            }
            w.leave(me, GUARD);
        });
        let c = w.thread(3, move |w, me| {
            me.rise(WRITER);
            w.enter(me, GUARD);
            sends.store(1, Ordering::Release);
            sync::futex_wake(&sends, 1, sync::ANY);
            w.leave(me, GUARD);
        });
        w.gate.leave(a, GUARD);
        // The bound is far off: B and C reopen nothing.
        assert_eq!(w.gate.drain(me, shut, u64::MAX, &mut Busy::NONE.clone()), Drain::Drained);
        assert!(w.gate.commit(shut));
        assert!(w.copies(me, shut, || {}));
        w.gate.drop_role(me);
        b.join().unwrap();
        c.join().unwrap();
    });
}
