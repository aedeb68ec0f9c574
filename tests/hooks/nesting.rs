//! Locks that hooks take, nested both ways round regions (H4).

use crate::common::{fork_many, isolated};
use crate::drive::{self, BOTH, Kind, SOON, Stop, a_while, coordinated, foreign, freeze, run_clock, run_slowly, until};
use crate::{Log, all_is_well, ends_well, stderr_of};
use carefork::{ForkError, ForkOptions, Hook, no_forking, register};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A lock that can only be waited for, as C libraries have it.
struct CLock(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: a pthread mutex is made for sharing.
unsafe impl Sync for CLock {}

impl CLock {
    fn lock(&self) {
        // SAFETY: statically initialised and never moved.
        assert_eq!(unsafe { libc::pthread_mutex_lock(self.0.get()) }, 0);
    }

    fn unlock(&self) {
        // SAFETY: as above; locked by this thread, or by the one that this child is a copy of.
        assert_eq!(unsafe { libc::pthread_mutex_unlock(self.0.get()) }, 0);
    }
}

static BLOCKS: CLock = CLock(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));
static TRIED: Mutex<(u64, u64)> = Mutex::new((0, 0));

/// One step of a thread that nests a hooked lock and a region, this way or that.
fn nest(way: u32) {
    let touch = || {
        let mut pair = TRIED.lock().unwrap_or_else(|e| e.into_inner());
        pair.0 += 1;
        pair.1 += 1;
    };
    match way {
        0 => {
            let _region = no_forking();
            BLOCKS.lock();
            BLOCKS.unlock();
        }
        1 => {
            BLOCKS.lock();
            drop(no_forking());
            BLOCKS.unlock();
        }
        2 => {
            let _region = no_forking();
            touch();
        }
        _ => {
            let mut pair = TRIED.lock().unwrap_or_else(|e| e.into_inner());
            pair.0 += 1;
            drop(no_forking());
            pair.1 += 1;
        }
    }
}

#[test]
fn hooked_locks_nest_both_ways_round_regions() {
    isolated("nesting::hooked_locks_nest_both_ways_round_regions", 240, || {
        let _blocks = register(
            Hook::new("blocks").prepare(|| BLOCKS.lock()).parent(|| BLOCKS.unlock()).child(|| BLOCKS.unlock()),
        );
        let _tried = register(Hook::std_mutex("tried", &TRIED).rank(1));
        // Such threads leave a fork few instants: it takes the time it takes, and must not hang.
        carefork::set_foreign_budget(None);
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _stop = Stop(&stop);
            for way in 0..4 {
                let stop = &stop;
                s.spawn(move || {
                    while !stop.load(SeqCst) {
                        nest(way);
                        thread::sleep(Duration::from_micros(20));
                    }
                });
            }
            let child = || {
                (0..4).for_each(nest);
                let pair = TRIED.lock().unwrap_or_else(|e| e.into_inner());
                i32::from(pair.0 != pair.1)
            };
            let forkers = BOTH.map(|kind| {
                s.spawn(move || {
                    fork_many(1000, 1, SOON, |_| match kind {
                        Kind::Coordinated => {
                            drive::fork_with(&ForkOptions::new().timeout_never(), child).expect("a child")
                        }
                        Kind::Foreign => kind.fork(child),
                    })
                })
            });
            for forker in forkers {
                forker.join().expect("forks").expect_clean(1000);
            }
        });
        let stats = carefork::stats();
        assert_eq!((stats.refused, stats.dirty), (0, 0));
    });
}

/// A thread in a region waits for a lock whose holder waits for a region: the fork steps back until they are through.
#[test]
fn a_fork_between_a_lock_and_a_region_steps_back() {
    isolated("nesting::a_fork_between_a_lock_and_a_region_steps_back", 60, || {
        let _blocks = register(
            Hook::new("blocks").prepare(|| BLOCKS.lock()).parent(|| BLOCKS.unlock()).child(|| BLOCKS.unlock()),
        );
        for kind in BOTH {
            let _clock = run_slowly();
            let inside = AtomicBool::new(false);
            thread::scope(|s| {
                BLOCKS.lock();
                s.spawn(|| {
                    let _region = no_forking();
                    inside.store(true, SeqCst);
                    BLOCKS.lock();
                    BLOCKS.unlock();
                });
                until(|| inside.load(SeqCst));
                let forker = s.spawn(move || ends_well(kind.fork(|| 0)));
                a_while();
                // This thread holds the lock and now wants a region: the gate may be shut for the fork.
                drop(no_forking());
                assert!(!forker.is_finished());
                BLOCKS.unlock();
                forker.join().expect("the child is well");
            });
        }
        assert_eq!(carefork::stats().dirty, 0);
    });
}

#[test]
fn a_lock_that_is_never_free_ends_at_the_budget() {
    isolated("nesting::a_lock_that_is_never_free_ends_at_the_budget", 60, || {
        let log = Log::new();
        let lock = Arc::new(Mutex::new(()));
        let _log = register(log.hook("A"));
        let hook = register(Hook::std_mutex("never free", Arc::clone(&lock)).rank(1));
        let prepared = |n| {
            let all = log.of(false);
            all.split(' ').filter(|w| *w == "pA").count() >= n
        };
        freeze();
        thread::scope(|s| {
            let _hold = lock.lock().expect("not poisoned");
            let forker = s.spawn(|| match coordinated(|| 0) {
                Err(ForkError::Busy { culprits }) => {
                    assert_eq!((culprits.hook, culprits.count, culprits.queue), (Some("never free"), 0, false));
                }
                other => panic!("{other:?}"),
            });
            // The second time it waits for the lock with the gate open.
            until(|| prepared(2));
            let _clock = run_clock(Duration::from_millis(10));
            forker.join().expect("it is busy");
        });
        let all = log.of(false);
        let count = |word: &str| all.split(' ').filter(|w| *w == word).count();
        assert_eq!(count("pA"), count("uA"), "{all}");
        assert!(count("pA") >= 2 && count("rA") == 0, "{all}");
        log.clear();
        // A foreign one goes ahead without any of them, and says so.
        let said = stderr_of(|| {
            thread::scope(|s| {
                let _hold = lock.lock().expect("not poisoned");
                let forker = s.spawn(|| ends_well(foreign(|| i32::from(!carefork::lineage().dirty))));
                until(|| prepared(2));
                let _clock = run_clock(Duration::from_millis(10));
                forker.join().expect("the child is well");
            });
        });
        assert!(said.contains("hook never free"), "{said:?}");
        assert_eq!(log.of(true), "");
        drop(hook);
        all_is_well();
    });
}
