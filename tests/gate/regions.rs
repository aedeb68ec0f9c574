//! Regions are shared, and at a commitment nobody else is in one (G1, G2).

use crate::common::{Setup, check, isolated, isolated_with};
use crate::drive::{BOTH, Inside, Stop, a_while, coordinated, freeze, inside, until, until_shut};
use crate::{Pair, all_is_well, ends_well, mask};
use carefork::{ForkError, no_forking, try_no_forking};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

#[test]
fn regions_are_shared_and_nest() {
    isolated("regions::regions_are_shared_and_nest", 30, || {
        let both_inside = Barrier::new(4);
        thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    let _region = no_forking();
                    both_inside.wait();
                });
            }
        });
        // To any depth, and left in any order.
        let mut guards: Vec<_> = (0..10_000).map(|_| no_forking()).collect();
        guards.swap(0, 9_999);
        while let Some(last) = guards.pop() {
            if guards.is_empty() {
                assert!(matches!(coordinated(|| 1), Err(ForkError::Forbidden { .. })));
            }
            drop(last);
        }
        all_is_well();
    });
}

#[test]
fn a_fork_waits_for_others_and_keeps_new_ones_out() {
    isolated("regions::a_fork_waits_for_others_and_keeps_new_ones_out", 30, || {
        // Nobody's time ever comes: whoever waits, waits for the thing itself.
        freeze();
        for kind in BOTH {
            let (begun, forked, entered) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
            let (nest, nested) = (AtomicBool::new(false), AtomicBool::new(false));
            let leave = AtomicBool::new(false);
            thread::scope(|s| {
                let _end = (Stop(&leave), Stop(&nest));
                s.spawn(|| {
                    let outer = no_forking();
                    begun.store(true, SeqCst);
                    until(|| nest.load(SeqCst));
                    let inner = no_forking();
                    nested.store(true, SeqCst);
                    until(|| leave.load(SeqCst));
                    drop(outer);
                    drop(inner);
                });
                until(|| begun.load(SeqCst));
                s.spawn(|| {
                    let pid = kind.fork(|| 0);
                    forked.store(true, SeqCst);
                    ends_well(pid);
                });
                until_shut();
                s.spawn(|| {
                    let _region = no_forking();
                    entered.store(true, SeqCst);
                });
                nest.store(true, SeqCst);
                until(|| nested.load(SeqCst));
                a_while();
                assert!(!forked.load(SeqCst) && !entered.load(SeqCst), "{kind:?}");
                leave.store(true, SeqCst);
                until(|| forked.load(SeqCst) && entered.load(SeqCst));
            });
        }
        carefork::testing::release();
        all_is_well();
    });
}

#[test]
fn at_the_commitment_no_other_thread_is_in_a_region() {
    isolated("regions::at_the_commitment_no_other_thread_is_in_a_region", 60, || {
        // No budget ends here, however busy the machine.
        freeze();
        let pairs = [const { Pair(AtomicU64::new(0), AtomicU64::new(0)) }; 3];
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _end = Stop(&stop);
            for (n, pair) in pairs.iter().enumerate() {
                let stop = &stop;
                s.spawn(move || {
                    while !stop.load(SeqCst) {
                        let _region = no_forking();
                        pair.0.fetch_add(1, SeqCst);
                        (0..20 << (2 * n)).for_each(|_| std::hint::spin_loop());
                        let _nested = no_forking();
                        pair.1.fetch_add(1, SeqCst);
                    }
                });
            }
            // And until each thread has had its share of the processors.
            let shared = || pairs.iter().all(|p| p.0.load(SeqCst) > 600);
            for i in (0..).take_while(|&i| i < 600 || !shared()) {
                let kind = BOTH[i % 2];
                let pid = kind.fork(|| {
                    let whole = pairs.iter().all(|p| p.0.load(SeqCst) == p.1.load(SeqCst));
                    check(1, whole);
                    check(2, try_no_forking().is_some());
                    0
                });
                ends_well(pid);
            }
        });
        all_is_well();
    });
}

#[test]
fn switched_off_nothing_waits() {
    let env = vec![("CAREFORK".to_owned(), "off".to_owned())];
    isolated_with("regions::switched_off_nothing_waits", 30, Setup { env, ..Setup::default() }, || {
        freeze();
        let _busy: Inside = inside("busy");
        let before = mask();
        for kind in BOTH {
            ends_well(kind.fork(|| i32::from(mask() != before)));
            assert_eq!(mask(), before);
        }
        let _region = no_forking();
        ends_well(coordinated(|| 0).expect("nothing is forbidden"));
    });
}
