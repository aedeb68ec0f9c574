//! What forks wait for is counted and timed (D1). Time is driven, so the figures are exact.

// Forks.
#![allow(unsafe_code, clippy::disallowed_methods, clippy::cast_possible_truncation)]

mod common;
mod drive;

use carefork::testing::advance;
use carefork::{ForkError, ForkOptions, Hook, Registration, register, report, stats};
use common::{Verdict, check, isolated, reap};
use drive::{BOTH, MS, SOON, freeze, gettid, inside, run_clock, until_it_looked, until_shut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::SeqCst};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::Duration;

/// What another library's handlers take, in driven ms: between carefork's in prepare and libc's fork, and between libc's fork and carefork's in
/// the parent.
static BEFORE: AtomicU32 = AtomicU32::new(0);
static AFTER: AtomicU32 = AtomicU32::new(0);

extern "C" fn before() {
    let ms = BEFORE.load(SeqCst);
    if ms > 0 {
        advance(ms * MS);
    }
}

extern "C" fn after() {
    let ms = AFTER.load(SeqCst);
    if ms > 0 {
        advance(ms * MS);
    }
}

extern "C" fn in_child() {}

early_foreign_handlers!(before, after, in_child);

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

#[test]
fn every_fork_is_timed_once_and_children_start_from_nothing() {
    isolated("every_fork_is_timed_once_and_children_start_from_nothing", 30, || {
        freeze();
        let _hook = register(Hook::new("slow").prepare(|| advance(3 * MS)));
        for kind in BOTH {
            ends_well(kind.fork(|| {
                let s = stats();
                check(2, (s.turns.count, s.regions.count, s.hooks.count, s.copying.count) == (0, 0, 0, 0));
                check(3, s.hooks.longest == Duration::ZERO && s.hooks.total == Duration::ZERO);
                0
            }));
        }
        let s = stats();
        assert_eq!((s.turns.count, s.regions.count, s.hooks.count, s.copying.count), (2, 2, 2, 2));
        assert_eq!((s.hooks.total, s.hooks.longest, s.hooks.median), (6 * MS, 3 * MS, 3 * MS));
        assert_eq!((s.turns.longest, s.regions.longest, s.copying.longest), Default::default());
    });
}

/// Up to 64 hooks are timed, and only those that were among the first 64 when they came.
#[test]
fn hooks_are_timed_while_they_are_few() {
    fn count(name: &str) -> u64 {
        let hooks = report().hooks.unwrap();
        hooks.iter().find(|h| h.name == name).unwrap().waited.count
    }
    fn slow(name: &'static str) -> Registration {
        register(Hook::new(name).prepare(|| advance(3 * MS)))
    }
    fn fork() {
        ends_well(BOTH[0].fork(|| 0));
    }
    isolated("hooks_are_timed_while_they_are_few", 30, || {
        freeze();
        let mut idle: Vec<_> = (0..62).map(|_| register(Hook::new("idle"))).collect();
        let _early = slow("early");
        let _last = slow("last");
        fork();
        assert_eq!((count("early"), count("last")), (1, 1));
        let late = slow("late");
        fork();
        assert_eq!((count("early"), count("last"), count("late")), (1, 1, 0));
        drop(idle.pop());
        fork();
        assert_eq!((count("early"), count("last"), count("late")), (2, 2, 0));
        drop(late);
        let _late = slow("late");
        fork();
        assert_eq!((count("early"), count("last"), count("late")), (3, 3, 1));
    });
}

#[test]
fn each_hook_is_timed_anew_in_each_process() {
    fn slow() -> (u64, Duration) {
        let waited = report().hooks.map(|hooks| hooks[0].waited).unwrap_or_default();
        (waited.count, waited.total)
    }
    isolated("each_hook_is_timed_anew_in_each_process", 30, || {
        freeze();
        let _hook = register(Hook::new("slow").prepare(|| advance(3 * MS)));
        for (i, kind) in (1u32..).zip(BOTH) {
            ends_well(kind.noexec(|| {
                check(2, slow() == (0, Duration::ZERO));
                let pid = kind.fork(|| i32::from(slow() != (0, Duration::ZERO)));
                check(3, reap(pid, SOON) == Verdict::Exited(0));
                check(4, slow() == (1, 3 * MS));
                0
            }));
            assert_eq!(slow(), (i.into(), 3 * i * MS));
        }
    });
}

#[test]
fn a_region_in_the_way_is_timed() {
    isolated("a_region_in_the_way_is_timed", 30, || {
        freeze();
        for (i, kind) in BOTH.into_iter().enumerate() {
            let region = inside("slow");
            let tid = AtomicI32::new(0);
            thread::scope(|s| {
                let forker = s.spawn(|| {
                    tid.store(gettid(), SeqCst);
                    ends_well(kind.fork(|| 0));
                });
                until_shut();
                // It has noted since when it waits.
                until_it_looked(tid.load(SeqCst));
                advance(MS / 2);
                region.leave();
                forker.join().expect("the child is well");
            });
            let s = stats();
            assert_eq!((s.regions.count, s.regions.longest), (1 + i as u64, MS / 2));
            assert_eq!(s.regions.total, (1 + i as u32) * MS / 2);
            assert_eq!((s.turns.longest, s.hooks.longest, s.copying.longest), Default::default());
        }
    });
}

/// Gate shut, opened again, shut: one wait, from the first to the last.
#[test]
fn a_region_that_outlasts_bounds_is_one_wait() {
    isolated("a_region_that_outlasts_bounds_is_one_wait", 30, || {
        freeze();
        let region = inside("slow");
        let (tid, never) = (AtomicI32::new(0), ForkOptions::new().timeout_never());
        thread::scope(|s| {
            let forker = s.spawn(|| {
                tid.store(gettid(), SeqCst);
                ends_well(drive::fork_with(&never, || 0).expect("a child"));
            });
            until_shut();
            for _ in 0..20 {
                until_it_looked(tid.load(SeqCst));
                advance(MS);
            }
            region.leave();
            // It may be in the middle of a rest.
            let _clock = run_clock(MS);
            forker.join().expect("the child is well");
        });
        let regions = stats().regions;
        assert_eq!(regions.count, 1);
        assert!(regions.longest >= 20 * MS, "{regions:?}");
    });
}

/// A thread that forks within 2 s, and what it is told by.
fn fork_slowly<'s>(s: &'s Scope<'s, '_>, tid: &'s AtomicI32) -> ScopedJoinHandle<'s, Result<i32, ForkError>> {
    s.spawn(|| {
        tid.store(gettid(), SeqCst);
        drive::fork_with(&ForkOptions::new().timeout(2000 * MS), || 0)
    })
}

/// Moves the clock on for a fork that waits in carefork, until `end`; by how much.
fn drive_until(tid: &AtomicI32, end: impl Fn() -> bool) -> Duration {
    let mut driven = Duration::ZERO;
    while !end() {
        until_it_looked(tid.load(SeqCst));
        advance(20 * MS);
        driven += 20 * MS;
    }
    driven
}

/// Half way through its budget the fork lets libc make a child, throws it away and begins anew: that is one wait still.
#[test]
fn a_fork_that_begins_anew_has_waited_once() {
    isolated("a_fork_that_begins_anew_has_waited_once", 30, || {
        freeze();
        let (region, tid) = (inside("slow"), AtomicI32::new(0));
        thread::scope(|s| {
            let forker = fork_slowly(s, &tid);
            until_shut();
            let waited = drive_until(&tid, || stats().thrown_away >= 2);
            assert!(waited >= 1000 * MS, "{waited:?}");
            region.leave();
            let more = drive_until(&tid, || stats().forks == 1);
            ends_well(forker.join().expect("no panic").expect("a child"));
            let s = stats();
            assert_eq!((s.regions.count, s.turns.count, s.regions.longest), (1, 1, s.regions.total), "{s:?}");
            assert!((waited..=waited + more).contains(&s.regions.total), "{s:?} for {waited:?} and {more:?}");
        });
    });
}

#[test]
fn a_refused_fork_has_waited_once() {
    isolated("a_refused_fork_has_waited_once", 30, || {
        freeze();
        let (region, tid) = (inside("slow"), AtomicI32::new(0));
        thread::scope(|s| {
            let forker = fork_slowly(s, &tid);
            until_shut();
            let waited = drive_until(&tid, || stats().refused == 1);
            assert!(matches!(forker.join().expect("no panic"), Err(ForkError::Busy { .. })));
            let s = stats();
            assert!(s.thrown_away >= 2, "{s:?}");
            assert_eq!((s.regions.count, s.turns.count, s.regions.longest), (1, 1, s.regions.total), "{s:?}");
            assert!((2000 * MS..=waited).contains(&s.regions.total), "{s:?} for {waited:?}");
        });
        region.leave();
    });
}

/// The budget ends where carefork's handlers are not at work.
#[test]
fn a_fork_refused_between_two_tries_has_waited() {
    isolated("a_fork_refused_between_two_tries_has_waited", 30, || {
        freeze();
        AFTER.store(5000, SeqCst);
        let (region, tid) = (inside("slow"), AtomicI32::new(0));
        thread::scope(|s| {
            let forker = fork_slowly(s, &tid);
            until_shut();
            let waited = drive_until(&tid, || stats().refused == 1);
            assert!(matches!(forker.join().expect("no panic"), Err(ForkError::Busy { .. })));
            let s = stats();
            assert_eq!((s.thrown_away, s.regions.count, s.regions.longest), (1, 1, s.regions.total), "{s:?}");
            assert!((6000 * MS..=5000 * MS + waited).contains(&s.regions.total), "{s:?} for {waited:?}");
        });
        region.leave();
    });
}

#[test]
fn handlers_of_others_are_a_part_of_the_copy() {
    isolated("handlers_of_others_are_a_part_of_the_copy", 30, || {
        freeze();
        BEFORE.store(3, SeqCst);
        AFTER.store(4, SeqCst);
        for (i, kind) in (1u32..).zip(BOTH) {
            ends_well(kind.fork(|| 0));
            let s = stats();
            assert_eq!((s.copying.count, s.copying.total, s.copying.longest), (i.into(), 7 * i * MS, 7 * MS));
            assert_eq!((s.turns.longest, s.regions.longest, s.hooks.longest), Default::default());
        }
    });
}

/// The gate is shut while they run in the parent, too.
#[test]
fn slow_parent_hooks_are_timed() {
    isolated("slow_parent_hooks_are_timed", 30, || {
        freeze();
        let slow = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&slow);
        let _hook = register(Hook::new("slow").parent(move || {
            if asked.load(SeqCst) {
                advance(3 * MS);
            }
        }));
        for (i, kind) in (1u32..).zip(BOTH) {
            slow.store(false, SeqCst);
            ends_well(kind.fork(|| 0));
            slow.store(true, SeqCst);
            ends_well(kind.fork(|| 0));
            let s = stats();
            // A walk before each fork, and one after each second.
            assert_eq!((s.hooks.count, s.hooks.total, s.hooks.longest), ((3 * i).into(), 3 * i * MS, 3 * MS));
            assert_eq!(s.copying.longest, Duration::ZERO);
        }
    });
}

#[test]
fn waiting_for_another_fork_in_vain_is_timed() {
    isolated("waiting_for_another_fork_in_vain_is_timed", 30, || {
        freeze();
        let held = Arc::new(AtomicBool::new(true));
        let (told, begun) = std::sync::mpsc::channel();
        let gate = Arc::clone(&held);
        let _hook = register(Hook::new("held").parent(move || {
            told.send(()).expect("the test waits");
            drive::until(|| !gate.load(SeqCst));
        }));
        thread::scope(|s| {
            let first = s.spawn(|| ends_well(drive::coordinated(|| 0).expect("a child")));
            begun.recv().expect("the first is in its parent handler");
            let tid = AtomicI32::new(0);
            thread::scope(|s| {
                let second = fork_slowly(s, &tid);
                drive::until(|| tid.load(SeqCst) != 0);
                let waited = drive_until(&tid, || stats().refused == 1);
                assert!(matches!(second.join().expect("no panic"), Err(ForkError::Busy { .. })));
                let turns = stats().turns;
                assert_eq!((turns.count, turns.total), (2, turns.longest));
                assert!((2000 * MS..=waited).contains(&turns.longest), "{turns:?} for {waited:?}");
            });
            held.store(false, SeqCst);
            first.join().expect("the child is well");
        });
    });
}

#[test]
fn waiting_for_another_fork_is_timed() {
    isolated("waiting_for_another_fork_is_timed", 30, || {
        freeze();
        let held = Arc::new(AtomicBool::new(true));
        let (told, begun) = std::sync::mpsc::channel();
        let gate = Arc::clone(&held);
        let _hook = register(Hook::new("held").parent(move || {
            if gate.load(SeqCst) {
                told.send(()).expect("the test waits");
                drive::until(|| !gate.load(SeqCst));
            }
        }));
        thread::scope(|s| {
            let first = s.spawn(|| ends_well(drive::coordinated(|| 0).expect("a child")));
            begun.recv().expect("the first is in its parent handler");
            let (tell, tid) = std::sync::mpsc::channel();
            let second = s.spawn(move || {
                tell.send(drive::gettid()).expect("the test waits");
                ends_well(drive::coordinated(|| 0).expect("a child"));
            });
            let tid = tid.recv().expect("it begins");
            // Asleep for its turn: there is nothing else that it waits for.
            let call = format!("/proc/self/task/{tid}/syscall");
            drive::until(|| {
                std::fs::read_to_string(&call).is_ok_and(|c| c.starts_with(&format!("{} ", libc::SYS_futex)))
            });
            advance(7 * MS);
            held.store(false, SeqCst);
            for thread in [first, second] {
                thread.join().expect("the child is well");
            }
        });
        let s = stats();
        assert_eq!((s.turns.count, s.turns.longest), (2, 7 * MS));
    });
}
