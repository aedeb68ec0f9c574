//! Bounds and budgets (G6, G11): time-outs are interleavings.

use super::*;

/// Threads that wait for each other inside regions while a third forks: A, in a region, waits for B's message; B needs a
/// region of its own before it sends. The program runs on, and the fork comes to an end.
#[test]
fn waiting_for_each_other_inside_regions() {
    check(1, || {
        let w = World::reopening(3);
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
            w.region(me);
            sends.store(1, Ordering::Release);
            sync::futex_wake(&sends, 1, sync::ANY);
        });
        let clock = Clock::start(FIRST_BOUND);
        let ended = w.fork(w.seat(0), &mut NoHooks, Some(6 * FIRST_BOUND));
        assert!(matches!(ended, Ended::Forked | Ended::Not(Outcome::Busy) | Ended::Reopened), "{ended:?}");
        a.join().unwrap();
        b.join().unwrap();
        clock.stop();
        assert_eq!(w.loose(), 0, "loosened for good");
    });
}

/// A waiter past the bound reopens the gate, even after commitment: child and parent both know.
#[test]
fn reopened_after_commitment() {
    check(1, || {
        let w = World::reopening(2);
        let a = w.thread(1, |w, me| w.region(me));
        let clock = Clock::start(2 * LAST_BOUND);
        let plan = Plan { coordinated: true, deadline: None, let_go_at: None, bound: FIRST_BOUND, since: None };
        w.fork_once(w.seat(0), &mut NoHooks, &plan);
        a.join().unwrap();
        clock.stop();
        assert_eq!(w.loose(), 0, "loosened for good");
    });
}

/// Who comes in by a gate that another has reopened is in no copy that is said to be whole.
#[test]
fn reopened_by_one_entered_by_another() {
    check(2, || {
        let w = World::reopening(3);
        let me = w.seat(0);
        assert!(w.gate.try_role(me));
        let shut = w.gate.shut(FIRST_BOUND);
        assert!(w.gate.commit(shut));
        // Two looks of a waiter, time moving on before each, reopen it.
        let others = [1, 2].map(|i| {
            w.thread(i, |w, me| {
                sync::advance(LAST_BOUND);
                w.region(me);
            })
        });
        w.copies(me, shut, || {});
        w.gate.drop_role(me);
        for thread in others {
            thread.join().unwrap();
        }
        assert_eq!(w.loose(), 0, "loosened for good");
    });
}

/// A region that never ends within the budget: `Busy`, with nothing left shut.
#[test]
fn budget() {
    check(3, || {
        let w = World::reopening(2);
        w.gate.enter(w.seat(1), GUARD);
        let clock = Clock::start(FIRST_BOUND);
        assert_eq!(w.fork(w.seat(0), &mut NoHooks, Some(2 * FIRST_BOUND)), Ended::Not(Outcome::Busy));
        assert!(w.gate.try_enter(w.seat(0), GUARD));
        w.gate.leave(w.seat(0), GUARD);
        w.gate.leave(w.seat(1), GUARD);
        clock.stop();
    });
}

/// A wait with an end at the gate: over in time, and either in the region or not.
#[test]
fn waiting_with_an_end() {
    check(2, || {
        let w = World::reopening(2);
        let a = w.thread(1, |w, me| {
            if w.gate.enter_until(me, GUARD, Some(FIRST_BOUND / 2)) {
                w.acts(me, 1);
                w.leave(me, GUARD);
            }
            assert_eq!(me.depth(), 0);
        });
        let clock = thread::spawn(|| sync::advance(FIRST_BOUND / 2));
        w.fork(w.seat(0), &mut NoHooks, None);
        a.join().unwrap();
        clock.join().unwrap();
    });
}
