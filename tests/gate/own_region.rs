//! Forks inside the forking thread's own region (G4).

use crate::common::{Verdict, check, isolated, reap};
use crate::drive::{BOTH, MS, SOON, Stop, coordinated, foreign, freeze, no_child_left, until, until_shut};
use crate::{all_is_well, ends_well};
use carefork::{ForkError, fork_generation, no_forking};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

#[test]
fn a_fork_in_ones_own_region_is_refused() {
    isolated("own_region::a_fork_in_ones_own_region_is_refused", 30, || {
        let (region, line) = (no_forking(), line!());
        let nested = no_forking();
        let before = carefork::stats();
        let error = coordinated(|| 1).expect_err("it is in a region");
        let ForkError::Forbidden { entered } = &error else { panic!("{error}") };
        if cfg!(debug_assertions) {
            let at = entered.expect("recorded in this build");
            assert_eq!((at.file(), at.line()), (file!(), line));
        }
        assert!(error.to_string().contains("end it first"), "{error}");
        drop(region);
        assert!(matches!(coordinated(|| 1), Err(ForkError::Forbidden { .. })));
        let after = carefork::stats();
        // Refused beforehand: no fork was spent.
        assert_eq!((after.refused - before.refused, after.thrown_away), (2, 0));
        assert!(no_child_left());
        drop(nested);
        all_is_well();
    });
}

#[test]
fn a_foreign_fork_in_ones_own_region_goes_ahead() {
    isolated("own_region::a_foreign_fork_in_ones_own_region_goes_ahead", 30, || {
        freeze();
        let region = no_forking();
        let pid = foreign(move || {
            check(1, !carefork::lineage().dirty);
            // Still in that region, and in no other.
            check(2, matches!(coordinated(|| 1), Err(ForkError::Forbidden { .. })));
            drop(region);
            for kind in BOTH {
                let pid = kind.fork(|| i32::from(fork_generation() != 2));
                check(3, reap(pid, SOON) == Verdict::Exited(0));
            }
            check(4, carefork::stats().in_region == 0);
            0
        });
        // `region` moved into the closure, whose copy in this process is dropped by now.
        ends_well(pid);
        assert_eq!(carefork::stats().in_region, 1);
        let _region = no_forking();
        ends_well(foreign(|| {
            // With threads of its own.
            let pid = thread::scope(|s| {
                let from_another = s.spawn(|| foreign(|| 0));
                thread::sleep(5 * MS);
                // SAFETY: the guard was inherited, its memory is the parent's; it is never dropped here.
                unsafe { carefork::force_unlock() };
                from_another.join().unwrap_or(-1)
            });
            check(5, pid > 0 && reap(pid, SOON) == Verdict::Exited(0));
            check(6, carefork::stats().dirty == 0);
            0
        }));
        assert_eq!(carefork::stats().in_region, 2);
    });
}

/// With foreign forks only, whose regions are allowed: of two that fork at once, the one that others wait for is first.
#[test]
fn who_forks_in_a_region_goes_first() {
    isolated("own_region::who_forks_in_a_region_goes_first", 30, || {
        // Were it not so, each would wait for the other, and time does not pass.
        freeze();
        for kind in BOTH {
            let (begun, go) = (AtomicBool::new(false), AtomicBool::new(false));
            thread::scope(|s| {
                let _end = Stop(&go);
                s.spawn(|| {
                    let region = no_forking();
                    begun.store(true, SeqCst);
                    until(|| go.load(SeqCst));
                    let pid = foreign(|| 0);
                    drop(region);
                    ends_well(pid);
                });
                until(|| begun.load(SeqCst));
                s.spawn(|| ends_well(kind.fork(|| 0)));
                until_shut();
                go.store(true, SeqCst);
            });
        }
        carefork::testing::release();
        all_is_well();
    });
}
