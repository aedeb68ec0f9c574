//! The gate: regions, commitment, fairness, forbidden forks, ends of regions, signal masks, signal handlers
//! (G1 to G4, G7, G8, G12).

// Forks, masks and raw threads.
#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;
mod drive;

use carefork::{ForkError, ForkOptions, Hook, fork_generation, no_forking, register, try_no_forking};
use common::{Setup, Verdict, check, isolated, isolated_with, raw, reap, seccomp_refuse, status_here};
use drive::{
    BOTH, Inside, Kind, MS, SOON, Stop, a_while, block, coordinated, foreign, fork_with, freeze, gettid, inside,
    no_child_left, on_signal, run_clock, run_slowly, signal_thread, until, until_it_looked, until_shut,
};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// The gate is open, nobody but perhaps this thread is in a region, and both kinds of fork work.
#[track_caller]
fn all_is_well() {
    assert!(try_no_forking().is_some(), "the gate is shut");
    for kind in BOTH {
        ends_well(kind.fork(|| {
            check(101, try_no_forking().is_some());
            drop(no_forking());
            0
        }));
    }
    assert_eq!(carefork::stats().dirty, 0);
    assert!(no_child_left());
}

// -- G1, G2

#[test]
fn regions_are_shared_and_nest() {
    isolated("regions_are_shared_and_nest", 30, || {
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
    isolated("a_fork_waits_for_others_and_keeps_new_ones_out", 30, || {
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

/// Two words that are equal outside regions.
struct Pair(AtomicU64, AtomicU64);

#[test]
fn at_the_commitment_no_other_thread_is_in_a_region() {
    isolated("at_the_commitment_no_other_thread_is_in_a_region", 60, || {
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

// -- G3

/// At most how many regions three threads begin, back to back in regions of 3 ms, from when a fork has shut the gate until it commits.
/// Everybody lives by one clock, which moves on when all have looked at it, so nobody is overtaken by time that he was not there
/// for. Carefork's own stands still unless `passes`.
fn regions_begun_while_forking(kind: Kind, passes: bool) -> u64 {
    const STEP: u64 = 500;
    const LENGTH: u64 = 3000;
    let (begun, at_commitment) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
    let (now, stop, go) = (AtomicU64::new(0), AtomicBool::new(false), AtomicU32::new(0));
    let (forked, tids) = (AtomicU32::new(0), [const { AtomicI32::new(0) }; 4]);
    let begun: &'static AtomicU64 = Box::leak(Box::new(begun));
    let seen = Arc::clone(&at_commitment);
    // The gate is shut, and nobody is in a region: the last time it comes to this is the commitment.
    let _hook = register(Hook::new("counts").prepare(move || seen.store(begun.load(SeqCst), SeqCst)));
    let mut most = 0;
    freeze();
    thread::scope(|s| {
        let _end = Stop(&stop);
        let (now, stop, go, forked, tids) = (&now, &stop, &go, &forked, &tids);
        for n in 0..3 {
            s.spawn(move || {
                tids[n as usize].store(gettid(), SeqCst);
                // Not all at once.
                until(|| now.load(SeqCst) >= n * LENGTH / 3);
                while !stop.load(SeqCst) {
                    let _region = no_forking();
                    let end = now.load(SeqCst) + LENGTH;
                    begun.fetch_add(1, SeqCst);
                    until(|| now.load(SeqCst) >= end || stop.load(SeqCst));
                }
            });
        }
        s.spawn(move || {
            tids[3].store(gettid(), SeqCst);
            for n in 1.. {
                until(|| go.load(SeqCst) == n || stop.load(SeqCst));
                if stop.load(SeqCst) {
                    break;
                }
                let pid = kind.fork(|| 0);
                forked.store(n, SeqCst);
                ends_well(pid);
            }
        });
        until(|| tids.iter().all(|tid| tid.load(SeqCst) != 0));
        let step = |both: bool| {
            now.fetch_add(STEP, SeqCst);
            if both {
                carefork::testing::advance(Duration::from_micros(STEP));
            }
            tids.iter().for_each(|tid| until_it_looked(tid.load(SeqCst)));
        };
        for n in 1..=8 {
            // At another moment of the regions each time.
            (0..7 + n).for_each(|_| step(false));
            go.store(n, SeqCst);
            until(|| try_no_forking().is_none() || forked.load(SeqCst) == n);
            let before = begun.load(SeqCst);
            while forked.load(SeqCst) != n {
                step(passes);
            }
            most = most.max(at_commitment.load(SeqCst).saturating_sub(before));
        }
    });
    most
}

#[test]
fn back_to_back_regions_delay_a_fork_by_few_of_them() {
    isolated("back_to_back_regions_delay_a_fork_by_few_of_them", 120, || {
        for kind in BOTH {
            // Each of three threads begins few: those let in before the bound has grown to a region's length.
            let begun = regions_begun_while_forking(kind, true);
            assert!(begun <= 3 * 4, "{begun} regions while one fork waited ({kind:?})");
            // Where the bound never passes, no new region begins at all; one that came before the gate was shut may not be counted yet.
            let begun = regions_begun_while_forking(kind, false);
            assert!(begun <= 3, "{begun} regions while one fork waited ({kind:?})");
        }
    });
}

#[test]
fn forks_in_a_loop_let_regions_in() {
    isolated("forks_in_a_loop_let_regions_in", 60, || {
        // Standing still: the courtesy that a fork shows to those who wait has no end but their entering.
        freeze();
        // Children are gone without being waited for: nothing comes between two forks.
        // SAFETY: ignoring calls nothing.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
        let (stop, forks) = (AtomicBool::new(false), AtomicU32::new(0));
        let mut waits: Vec<u32> = Vec::new();
        thread::scope(|s| {
            let _end = Stop(&stop);
            for kind in BOTH {
                let (stop, forks) = (&stop, &forks);
                s.spawn(move || {
                    while !stop.load(SeqCst) {
                        kind.fork(|| 0);
                        forks.fetch_add(1, SeqCst);
                    }
                });
            }
            while waits.len() < 200 {
                // Only those that had to wait count.
                if let Some(_region) = try_no_forking() {
                    continue;
                }
                let before = forks.load(SeqCst);
                let region = no_forking();
                waits.push(forks.load(SeqCst) - before);
                drop(region);
            }
        });
        waits.sort_unstable();
        // This thread may be set aside between asking and entering; not often.
        assert!(waits[150] <= 2, "forks that overtook a waiting region: {waits:?}");
    });
}

// -- G4

#[test]
fn a_fork_in_ones_own_region_is_refused() {
    isolated("a_fork_in_ones_own_region_is_refused", 30, || {
        let (region, line) = (no_forking(), line!());
        let nested = no_forking();
        let before = carefork::stats();
        let error = coordinated(|| 1).expect_err("it is in a region");
        let ForkError::Forbidden { entered } = &error else { panic!("{error}") };
        if cfg!(debug_assertions) {
            let at = entered.expect("recorded in this build");
            assert_eq!((at.file(), at.line()), (file!(), line));
        }
        assert!(error.to_string().contains("end the region first"), "{error}");
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
    isolated("a_foreign_fork_in_ones_own_region_goes_ahead", 30, || {
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
    isolated("who_forks_in_a_region_goes_first", 30, || {
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

// -- G7

#[test]
fn a_panic_or_an_early_return_ends_a_region() {
    isolated("a_panic_or_an_early_return_ends_a_region", 30, || {
        let panicked = thread::spawn(|| {
            let _outer = no_forking();
            let _inner = no_forking();
            panic!("as it must");
        });
        assert!(panicked.join().is_err());
        let caught = std::panic::catch_unwind(|| {
            let _region = no_forking();
            panic!("as it must");
        });
        assert!(caught.is_err());
        fn early(go: bool) -> Option<()> {
            let _region = no_forking();
            go.then_some(())?;
            Some(())
        }
        assert_eq!(early(false), None);
        all_is_well();
    });
}

#[test]
#[allow(clippy::mem_forget)]
fn a_forgotten_guard_is_a_region_until_the_threads_end() {
    isolated("a_forgotten_guard_is_a_region_until_the_threads_end", 30, || {
        let (begun, go) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|s| {
            let _end = Stop(&go);
            s.spawn(|| {
                std::mem::forget(no_forking());
                std::mem::forget(no_forking());
                begun.store(true, SeqCst);
                until(|| go.load(SeqCst));
            });
            until(|| begun.load(SeqCst));
            let clock = run_clock(5 * MS);
            let refused = coordinated(|| 1);
            assert!(matches!(refused, Err(ForkError::Busy { .. })));
            drop(clock);
            // While a fork waits for it, and for nothing else: time stands still.
            s.spawn(|| ends_well(coordinated(|| 0).expect("a fork")));
            until_shut();
            go.store(true, SeqCst);
        });
        carefork::testing::release();
        all_is_well();
    });
}

#[test]
#[allow(clippy::mem_forget)]
fn force_unlock_ends_forgotten_regions() {
    isolated("force_unlock_ends_forgotten_regions", 30, || {
        for kind in BOTH {
            let (begun, go) = (AtomicBool::new(false), AtomicBool::new(false));
            freeze();
            thread::scope(|s| {
                let _end = Stop(&go);
                s.spawn(|| {
                    (0..100).for_each(|_| std::mem::forget(no_forking()));
                    begun.store(true, SeqCst);
                    until(|| go.load(SeqCst));
                    // SAFETY: all guards of this thread were forgotten.
                    unsafe { carefork::force_unlock() };
                    // It is not this thread's end that does it.
                    until_child_made();
                });
                until(|| begun.load(SeqCst));
                s.spawn(move || {
                    let pid = kind.fork(|| 0);
                    MADE.store(true, SeqCst);
                    ends_well(pid);
                });
                until_shut();
                go.store(true, SeqCst);
            });
            MADE.store(false, SeqCst);
        }
        carefork::testing::release();
        // Without any: nothing happens.
        // SAFETY: no guard is alive.
        unsafe { carefork::force_unlock() };
        all_is_well();
    });
}

static MADE: AtomicBool = AtomicBool::new(false);

fn until_child_made() {
    until(|| MADE.load(SeqCst));
}

unsafe extern "C-unwind" {
    fn pthread_exit(value: *mut libc::c_void) -> !;
}

extern "C-unwind" fn exits_inside(how: *mut libc::c_void) -> *mut libc::c_void {
    #[allow(clippy::mem_forget)]
    std::mem::forget(no_forking());
    if how.is_null() {
        // SAFETY: no frame of this thread has anything to drop.
        unsafe { pthread_exit(std::ptr::null_mut()) }
    }
    std::ptr::null_mut()
}

#[test]
fn pthread_exit_inside_a_region_ends_it() {
    isolated("pthread_exit_inside_a_region_ends_it", 30, || {
        for how in [std::ptr::null_mut(), std::ptr::without_provenance_mut(1)] {
            for _ in 0..50 {
                let mut thread: libc::pthread_t = 0;
                // SAFETY: the two types differ in what unwinding out of them means only, and pthread_exit's ends in libc.
                let body: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void =
                    unsafe { std::mem::transmute(exits_inside as extern "C-unwind" fn(_) -> _) };
                // SAFETY: the body touches its argument's address only.
                let r = unsafe { libc::pthread_create(&raw mut thread, std::ptr::null(), body, how) };
                assert_eq!(r, 0);
                // SAFETY: the thread was just made and is joined once.
                unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
            }
            all_is_well();
        }
    });
}

/// No destructor runs, and nobody says that the region is over.
#[test]
fn a_thread_that_vanishes_inside_a_region_is_buried() {
    isolated("a_thread_that_vanishes_inside_a_region_is_buried", 30, || {
        static LOCK: carefork::Mutex<u32> = carefork::Mutex::new(0);
        // It is looked for when a bound has passed, and may take its time to be gone.
        let _clock = run_slowly();
        for with_lock in [false, true] {
            let gone = Arc::new(AtomicBool::new(false));
            let said = Arc::clone(&gone);
            // Never joined: it has no result.
            let _handle = thread::spawn(move || {
                let region = (!with_lock).then(no_forking);
                let guard = with_lock.then(|| LOCK.lock());
                said.store(true, SeqCst);
                // SAFETY: the thread ends here; what it owns is never dropped.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
                drop((region, guard));
            });
            drive::until(|| gone.load(SeqCst));
            for kind in BOTH {
                ends_well(kind.fork(|| 0));
            }
            assert_eq!(carefork::stats().dirty, 0);
        }
        // Held for ever by nobody: said, not waited for.
        assert!(std::panic::catch_unwind(|| drop(LOCK.lock())).is_err());
    });
}

#[test]
fn threads_by_the_thousand_reuse_seats() {
    isolated("threads_by_the_thousand_reuse_seats", 60, || {
        // No budget ends here, however busy the machine.
        freeze();
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _end = Stop(&stop);
            for _ in 0..2 {
                s.spawn(|| {
                    while !stop.load(SeqCst) {
                        // More than the table begins with.
                        let threads: Vec<_> = (0..80).map(|_| thread::spawn(|| drop(no_forking()))).collect();
                        threads.into_iter().for_each(|t| drop(t.join()));
                    }
                });
            }
            for i in 0..200 {
                ends_well(BOTH[i % 2].fork(|| {
                    let region = no_forking();
                    check(1, matches!(coordinated(|| 1), Err(ForkError::Forbidden { .. })));
                    drop(region);
                    0
                }));
            }
        });
        all_is_well();
    });
}

// -- G8

/// Every signal but SIGKILL, SIGSTOP and libc's own two.
const ALL: u64 = !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1) | 1 << 31 | 1 << 32);

fn mask() -> u64 {
    status_here().map_or(0, |s| s.sig_blk)
}

#[test]
fn the_mask_comes_back_exactly() {
    isolated("the_mask_comes_back_exactly", 60, || {
        block(&[libc::SIGUSR1, libc::SIGRTMIN() + 3, libc::SIGSEGV]);
        let before = mask();
        assert_eq!(before.count_ones(), 3);
        let is_back = |after: &str| assert_eq!(mask(), before, "after {after}");
        let in_child = || i32::from(mask() != before);

        for kind in BOTH {
            ends_well(kind.fork(in_child));
            is_back("a fork");
        }
        let region = no_forking();
        assert!(coordinated(|| 1).is_err());
        is_back("Forbidden");
        ends_well(foreign(in_child));
        is_back("a foreign fork in a region");
        drop(region);

        let bad = ForkOptions::new().death_signal(999);
        assert!(fork_with(&bad, || 1).is_err());
        is_back("Invalid");

        let veto = register(Hook::new("veto").try_prepare(|| Err("no".into())));
        assert!(matches!(coordinated(|| 1), Err(ForkError::Vetoed { .. })));
        is_back("Vetoed");
        ends_well(foreign(in_child));
        is_back("a vetoed foreign fork");
        drop(veto);

        let clock = run_clock(5 * MS);
        let busy = inside("busy");
        assert!(matches!(coordinated(|| 1), Err(ForkError::Busy { .. })));
        is_back("Busy");
        ends_well(foreign(in_child));
        is_back("a dirty fork");
        let refused = carefork::stats().refused;
        thread::scope(|s| {
            s.spawn(|| {
                until(|| carefork::stats().refused > refused);
                busy.leave();
            });
            assert!(coordinated(|| 1).is_err());
        });
        ends_well(fork_with(&ForkOptions::new().timeout_never(), in_child).expect("nobody is in the way"));
        is_back("a fork that waited");
        drop(clock);

        seccomp_refuse(&[(libc::SYS_clone, libc::EAGAIN), (libc::SYS_fork, libc::EAGAIN)]).expect("a filter");
        let Err(ForkError::Os(error)) = coordinated(|| 1) else { panic!("it cannot succeed") };
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
        is_back("a failed fork");
        assert_eq!((foreign(|| 1), raw::errno()), (-1, libc::EAGAIN));
        is_back("a failed foreign fork");
        assert!(no_child_left());
    });
}

#[test]
fn errno_is_as_after_fork() {
    isolated("errno_is_as_after_fork", 30, || {
        let set = |e| {
            // SAFETY: takes nothing.
            let errno = unsafe { libc::__errno_location() };
            // SAFETY: the location is this thread's own.
            unsafe { *errno = e }
        };
        set(libc::EXDEV);
        let pid = foreign(|| i32::from(raw::errno() != libc::EXDEV));
        assert_eq!(raw::errno(), libc::EXDEV);
        ends_well(pid);
        // One that waits first.
        freeze();
        let busy = inside("busy");
        thread::scope(|s| {
            s.spawn(|| {
                until_shut();
                busy.leave();
            });
            set(libc::EXDEV);
            let pid = foreign(|| i32::from(raw::errno() != libc::EXDEV));
            assert_eq!(raw::errno(), libc::EXDEV);
            ends_well(pid);
        });
    });
}

static SEEN_IN: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

#[test]
fn signals_are_blocked_while_the_gate_is_shut() {
    isolated("signals_are_blocked_while_the_gate_is_shut", 30, || {
        let note = |n: usize| move || SEEN_IN[n].store(mask(), SeqCst);
        // The first is reached with the gate shut in the common case.
        let _hook = register(Hook::new("look").prepare(note(0)).parent(note(1)).child(note(2)).undo(note(3)));
        for kind in BOTH {
            let pid = kind.fork(|| {
                check(1, SEEN_IN[2].load(SeqCst) == ALL);
                check(2, mask() == 0);
                0
            });
            assert_eq!(SEEN_IN[0].swap(0, SeqCst), ALL);
            assert_eq!(SEEN_IN[1].swap(0, SeqCst), ALL);
            ends_well(pid);
        }
        assert_eq!(SEEN_IN[3].load(SeqCst), 0);
    });
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_handled(_: i32) {
    HANDLED.fetch_add(1, SeqCst);
}

#[test]
fn signals_come_through_while_a_fork_waits() {
    isolated("signals_come_through_while_a_fork_waits", 30, || {
        on_signal(libc::SIGUSR1, count_handled);
        // Slowly: the budget of a second is far away.
        let _clock = run_clock(MS / 100);
        for kind in BOTH {
            let busy = inside("busy");
            let forker = AtomicI32::new(0);
            thread::scope(|s| {
                s.spawn(|| {
                    forker.store(gettid(), SeqCst);
                    ends_well(kind.fork(|| 0));
                });
                until(|| forker.load(SeqCst) != 0);
                until_shut();
                let before = HANDLED.load(SeqCst);
                signal_thread(forker.load(SeqCst), libc::SIGUSR1);
                // The bound passes, the gate reopens, the handler runs; the fork waits on.
                until(|| HANDLED.load(SeqCst) > before);
                busy.leave();
            });
        }
    });
}

/// Shared with children: what a signal handler saw.
struct SharedWord(&'static AtomicU32);

fn shared_word() -> SharedWord {
    let (read_write, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at the kernel's choice.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, read_write, kind, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    // SAFETY: zeroed, aligned, and never unmapped.
    SharedWord(unsafe { &*page.cast::<AtomicU32>() })
}

static PARENT: AtomicI32 = AtomicI32::new(0);
static ELSEWHERE: std::sync::atomic::AtomicPtr<AtomicU32> = std::sync::atomic::AtomicPtr::new(std::ptr::null_mut());

extern "C" fn not_in_a_child(_: i32) {
    // SAFETY: takes nothing. (libc keeps no cache of it.)
    if unsafe { libc::getpid() } != PARENT.load(SeqCst) {
        // SAFETY: set before the handler is installed, to a word that stays mapped.
        unsafe { &*ELSEWHERE.load(SeqCst) }.fetch_add(1, SeqCst);
    } else {
        HANDLED.fetch_add(1, SeqCst);
    }
}

#[test]
fn no_handler_runs_in_a_child_that_is_thrown_away() {
    isolated("no_handler_runs_in_a_child_that_is_thrown_away", 60, || {
        let word = shared_word().0;
        ELSEWHERE.store(std::ptr::from_ref(word).cast_mut(), SeqCst);
        PARENT.store(raw::getpid(), SeqCst);
        on_signal(libc::SIGUSR1, not_in_a_child);
        on_signal(libc::SIGRTMIN() + 1, not_in_a_child);
        let _veto = register(Hook::new("veto").try_prepare(|| Err("no".into())));
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _end = Stop(&stop);
            s.spawn(|| {
                block(&[libc::SIGUSR1, libc::SIGRTMIN() + 1]);
                while !stop.load(SeqCst) {
                    for signal in [libc::SIGUSR1, libc::SIGRTMIN() + 1] {
                        // SAFETY: to this process group, which is this test's own.
                        unsafe { libc::kill(0, signal) };
                    }
                }
            });
            until(|| HANDLED.load(SeqCst) > 10);
            for _ in 0..400 {
                assert!(matches!(coordinated(|| 1), Err(ForkError::Vetoed { .. })));
                assert!(no_child_left());
            }
        });
        assert_eq!(carefork::stats().thrown_away, 400);
        assert_eq!(word.load(SeqCst), 0, "handlers that ran in children");
    });
}

#[test]
fn a_thrown_away_child_may_be_reaped_by_others() {
    isolated("a_thrown_away_child_may_be_reaped_by_others", 60, || {
        let _veto = register(Hook::new("veto").try_prepare(|| Err("no".into())));
        // SAFETY: ignoring calls nothing.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
        for _ in 0..50 {
            assert!(matches!(coordinated(|| 1), Err(ForkError::Vetoed { .. })));
            assert!(no_child_left());
        }
        // SAFETY: as above.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _end = Stop(&stop);
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    no_child_left();
                }
            });
            for _ in 0..200 {
                assert!(matches!(coordinated(|| 1), Err(ForkError::Vetoed { .. })));
            }
        });
        assert!(no_child_left());
    });
}

// -- G12

static TRIES: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];

extern "C" fn tries(_: i32) {
    let errno = raw::errno();
    match try_no_forking() {
        Some(region) => {
            TRIES[0].fetch_add(1, SeqCst);
            // Nested ones too.
            drop(try_no_forking());
            drop(region);
        }
        None => {
            TRIES[1].fetch_add(1, SeqCst);
        }
    }
    assert_eq!(raw::errno(), errno);
}

#[test]
fn signal_handlers_try() {
    isolated("signal_handlers_try", 60, || {
        // No budget ends here, however busy the machine.
        freeze();
        on_signal(libc::SIGUSR1, tries);
        let (stop, pair) = (AtomicBool::new(false), Pair(AtomicU64::new(0), AtomicU64::new(0)));
        let tids: [AtomicI32; 3] = [const { AtomicI32::new(0) }; 3];
        thread::scope(|s| {
            let _end = Stop(&stop);
            // One in and out of regions, one waiting in a system call, one that forks below.
            s.spawn(|| {
                tids[0].store(gettid(), SeqCst);
                while !stop.load(SeqCst) {
                    let _region = no_forking();
                    pair.0.fetch_add(1, SeqCst);
                    drop(no_forking());
                    pair.1.fetch_add(1, SeqCst);
                }
            });
            // This one has never used carefork but in the handler.
            s.spawn(|| {
                tids[1].store(gettid(), SeqCst);
                while !stop.load(SeqCst) {
                    thread::sleep(MS);
                }
            });
            tids[2].store(gettid(), SeqCst);
            s.spawn(|| {
                block(&[libc::SIGUSR1]);
                while !stop.load(SeqCst) {
                    tids.iter()
                        .map(|t| t.load(SeqCst))
                        .filter(|&t| t != 0)
                        .for_each(|t| signal_thread(t, libc::SIGUSR1));
                    thread::sleep(MS / 20);
                }
            });
            for i in (0..).take_while(|&i| i < 400 || TRIES[0].load(SeqCst) <= 100) {
                ends_well(BOTH[i % 2].fork(|| {
                    check(1, pair.0.load(SeqCst) == pair.1.load(SeqCst));
                    check(2, try_no_forking().is_some());
                    0
                }));
            }
        });
        all_is_well();
    });
}

#[test]
fn while_the_gate_is_shut_trying_fails() {
    isolated("while_the_gate_is_shut_trying_fails", 30, || {
        freeze();
        let busy = inside("busy");
        thread::scope(|s| {
            s.spawn(|| ends_well(coordinated(|| 0).expect("a fork")));
            until_shut();
            // A thread that was never seen, too; and failing leaves nothing behind that would hold the fork up.
            let fresh = s.spawn(|| assert!(try_no_forking().is_none()));
            assert!((0..100).all(|_| try_no_forking().is_none()));
            assert!(fresh.join().is_ok());
            busy.leave();
        });
        assert!(try_no_forking().is_some());
    });
}

struct EntersAtTheEnd;

impl Drop for EntersAtTheEnd {
    fn drop(&mut self) {
        let _region = no_forking();
        drop(try_no_forking().map(|_nested| no_forking()));
    }
}

thread_local! {
    static EARLY: EntersAtTheEnd = const { EntersAtTheEnd };
    static LATE: EntersAtTheEnd = const { EntersAtTheEnd };
}

static ROUNDS: AtomicU32 = AtomicU32::new(0);
static KEY: AtomicU32 = AtomicU32::new(0);

/// Comes again in every round of destructors that POSIX runs.
extern "C" fn enters_in_each_round(value: *mut libc::c_void) {
    let _region = no_forking();
    ROUNDS.fetch_add(1, SeqCst);
    // SAFETY: the key was created below and stays.
    unsafe { libc::pthread_setspecific(KEY.load(SeqCst), value) };
}

#[test]
fn regions_in_the_destructors_of_a_thread() {
    isolated("regions_in_the_destructors_of_a_thread", 60, || {
        // No budget ends here, however busy the machine.
        freeze();
        let mut key = 0;
        // SAFETY: the key is ours, the destructor is made for it.
        assert_eq!(unsafe { libc::pthread_key_create(&raw mut key, Some(enters_in_each_round)) }, 0);
        KEY.store(key, SeqCst);
        let body = || {
            EARLY.with(|_| ());
            drop(no_forking());
            LATE.with(|_| ());
            // SAFETY: the key was created above; the value is not looked at.
            unsafe { libc::pthread_setspecific(KEY.load(SeqCst), std::ptr::without_provenance(1)) };
        };
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _end = Stop(&stop);
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    (0..4).map(|_| thread::spawn(body)).collect::<Vec<_>>().into_iter().for_each(|t| drop(t.join()));
                }
            });
            for i in (0..).take_while(|&i| i < 100 || ROUNDS.load(SeqCst) < 8) {
                ends_well(BOTH[i % 2].fork(|| i32::from(try_no_forking().is_none())));
            }
        });
        all_is_well();
    });
}

// -- switched off

#[test]
fn switched_off_nothing_waits() {
    let env = vec![("CAREFORK".to_owned(), "off".to_owned())];
    isolated_with("switched_off_nothing_waits", 30, Setup { env, ..Setup::default() }, || {
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
