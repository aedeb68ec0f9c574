//! Locks that others made, held over the fork by hooks or used inside regions (L5).

// Forks, and locks held across them.
#![allow(unsafe_code, clippy::disallowed_methods, clippy::mem_forget)]

mod common;
mod drive;

use carefork::{ForkError, ForkOptions, Hook, no_forking, register};
use common::{ForkGuardAlloc, Verdict, check, fork_many, isolated, reap};
use drive::{BOTH, Kind, SOON, Stop, a_while, coordinated, fork_with, freeze, run_clock};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

#[global_allocator]
static ALLOC: ForkGuardAlloc = ForkGuardAlloc;

const FORKS: u32 = 2000;
const THREADS: usize = 4;

#[track_caller]
fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// Forks both ways while threads do `work` without pause; each child does `child`, and none may hang.
#[track_caller]
fn storm(work: impl Fn(usize) + Sync, child: impl Fn() -> i32) {
    let stop = AtomicBool::new(false);
    // A forking thread may be off its processor for longer than others wait at the gate (G11): they wait on.
    freeze();
    thread::scope(|s| {
        let _stop = Stop(&stop);
        for n in 0..THREADS {
            let (stop, work) = (&stop, &work);
            s.spawn(move || {
                for round in 0.. {
                    if stop.load(SeqCst) {
                        break;
                    }
                    work(n);
                    pause();
                    // More threads than processors: without a nap now and then each fork waits out time slices.
                    if round % 16 == n {
                        thread::sleep(Duration::from_micros(50));
                    }
                }
            });
        }
        // On a machine with more to do, the threads that hold the lock may be off their processors for long.
        carefork::set_foreign_budget(None);
        let options = ForkOptions::new().timeout_never();
        let tally = fork_many(FORKS, 1, SOON, |i| match BOTH[i as usize % 2] {
            Kind::Coordinated => fork_with(&options, &child).expect("a child"),
            kind => kind.fork(&child),
        });
        tally.expect_clean(FORKS);
    });
    let stats = carefork::stats();
    assert_eq!((stats.refused, stats.dirty), (0, 0));
}

/// In a child: two new threads fight over something.
fn fight(times: u32, f: impl Fn() + Sync) {
    thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| (0..times).for_each(|_| f()));
        }
    });
}

/// Long enough that others queue, and that a fork falls in between.
fn pause() {
    for _ in 0..50 {
        std::hint::spin_loop();
    }
}

/// Two numbers that are equal whenever nobody holds their lock.
#[derive(Default)]
struct Pair(u64, u64);

impl Pair {
    fn step(&mut self) {
        self.0 += 1;
        pause();
        self.1 += 1;
    }

    fn at_rest(&self) -> bool {
        self.0 == self.1
    }
}

// -- std

#[test]
fn std_mutex() {
    isolated("std_mutex", 240, || {
        let lock = Arc::new(std::sync::Mutex::new(Pair::default()));
        let _hook = register(Hook::std_mutex("pair", Arc::clone(&lock)));
        let step = || lock.lock().expect("not poisoned").step();
        let child = || {
            check(10, lock.try_lock().is_ok_and(|pair| pair.at_rest()));
            step();
            fight(20, step);
            i32::from(!lock.lock().is_ok_and(|pair| pair.at_rest()))
        };
        storm(|_| step(), child);
    });
}

#[test]
fn std_rwlock() {
    isolated("std_rwlock", 240, || {
        static LOCK: std::sync::RwLock<Pair> = std::sync::RwLock::new(Pair(0, 0));
        let _hook = register(Hook::std_rwlock("pair", &LOCK));
        let read = || assert!(LOCK.read().expect("not poisoned").at_rest());
        let step = || LOCK.write().expect("not poisoned").step();
        let child = || {
            check(20, LOCK.try_write().is_ok_and(|pair| pair.at_rest()));
            read();
            step();
            fight(20, || {
                read();
                step();
            });
            0
        };
        storm(|n| if n % 2 == 0 { read() } else { step() }, child);
    });
}

#[test]
fn condvar_with_a_hooked_mutex() {
    isolated("condvar_with_a_hooked_mutex", 240, || {
        let lock = Arc::new(std::sync::Mutex::new(0u64));
        let turn = std::sync::Condvar::new();
        let _hook = register(Hook::std_mutex("turn", Arc::clone(&lock)));
        // Whose turn it is goes round; everybody else sleeps.
        let step = |n: usize, of: u64| {
            let mut now = lock.lock().expect("not poisoned");
            let bound = Duration::from_millis(1);
            while *now % of != n as u64 {
                let (guard, end) = turn.wait_timeout(now, bound).expect("not poisoned");
                now = guard;
                if end.timed_out() {
                    return;
                }
            }
            *now += 1;
            turn.notify_all();
        };
        let child = || {
            thread::scope(|s| {
                for n in 0..2 {
                    s.spawn(move || (0..20).for_each(|_| step(n, 2)));
                }
            });
            0
        };
        storm(|n| step(n, THREADS as u64), child);
    });
}

#[test]
fn poison_is_left_as_it_is() {
    isolated("poison_is_left_as_it_is", 60, || {
        std::panic::set_hook(Box::new(|_| {}));
        let mutex = Arc::new(std::sync::Mutex::new(()));
        let rwlock = Arc::new(std::sync::RwLock::new(()));
        let hooks = [Hook::std_mutex("mutex", Arc::clone(&mutex)), Hook::std_rwlock("rwlock", Arc::clone(&rwlock))];
        let _hooks = hooks.map(register);
        // Forks while this thread unwinds: taken and let go of by a panicking thread.
        struct Forks<'a>(&'a dyn Fn(bool));
        impl Drop for Forks<'_> {
            fn drop(&mut self) {
                (self.0)(false);
            }
        }
        let fork = |poisoned: bool| {
            for kind in BOTH {
                ends_well(kind.fork(|| {
                    check(30, mutex.is_poisoned() == poisoned && rwlock.is_poisoned() == poisoned);
                    check(31, mutex.try_lock().is_ok() != poisoned && rwlock.try_write().is_ok() != poisoned);
                    0
                }));
            }
            assert_eq!((mutex.is_poisoned(), rwlock.is_poisoned()), (poisoned, poisoned));
        };
        let unwound = catch_unwind(AssertUnwindSafe(|| {
            let _forks = Forks(&fork);
            panic!("on the way out");
        }));
        assert!(unwound.is_err());
        fork(false);
        let poison = catch_unwind(AssertUnwindSafe(|| {
            let (_mutex, _rwlock) = (mutex.lock(), rwlock.write());
            panic!("poisons both");
        }));
        assert!(poison.is_err());
        fork(true);
    });
}

// -- parking_lot, both versions

macro_rules! parking_lot_tests {
    ($module:ident, $crate_name:ident, $mutex:ident, $rwlock:ident, $reentrant:ident, $name:literal) => {
        mod $module {
            use super::*;
            use ::$crate_name::{FairMutex, Mutex, ReentrantMutex, RwLock};

            /// The child is alone: threads of its own that wait for each other are what cannot be promised.
            #[test]
            fn mutex() {
                isolated(concat!($name, "::mutex"), 240, || {
                    let lock = Arc::new(Mutex::new(Pair::default()));
                    let _hook = register(Hook::$mutex("pair", Arc::clone(&lock)));
                    let child = || {
                        check(40, !lock.is_locked());
                        // Again and again: the first unlocking finds no waiters to wake, nor does any other.
                        for _ in 0..5 {
                            lock.lock().step();
                        }
                        i32::from(!lock.lock().at_rest())
                    };
                    storm(|_| lock.lock().step(), child);
                });
            }

            /// One thread at a time: a lock that is handed from one to the next is never free to be tried.
            #[test]
            fn fair_mutex() {
                isolated(concat!($name, "::fair_mutex"), 240, || {
                    let lock = Arc::new(FairMutex::new(Pair::default()));
                    let _hook = register(Hook::$mutex("fair", Arc::clone(&lock)));
                    let child = || {
                        check(46, !lock.is_locked());
                        (0..5).for_each(|_| lock.lock().step());
                        0
                    };
                    storm(
                        |n| {
                            if n == 0 {
                                lock.lock().step()
                            }
                        },
                        child,
                    );
                });
            }

            #[test]
            fn rwlock() {
                isolated(concat!($name, "::rwlock"), 240, || {
                    static LOCK: RwLock<Pair> = RwLock::new(Pair(0, 0));
                    let _hook = register(Hook::$rwlock("pair", &LOCK));
                    let child = || {
                        check(41, !LOCK.is_locked());
                        for _ in 0..5 {
                            check(42, LOCK.read().at_rest());
                            LOCK.write().step();
                        }
                        0
                    };
                    let work = |n: usize| match n % 2 {
                        0 => assert!(LOCK.read().at_rest()),
                        _ => LOCK.write().step(),
                    };
                    storm(work, child);
                });
            }

            #[test]
            fn reentrant() {
                isolated(concat!($name, "::reentrant"), 240, || {
                    let lock = Arc::new(ReentrantMutex::new(Cell::new(0u64)));
                    let _hook = register(Hook::$reentrant("depth", Arc::clone(&lock)));
                    // Even whenever nobody holds it.
                    let step = || {
                        let outer = lock.lock();
                        outer.set(outer.get() + 1);
                        let inner = lock.lock();
                        inner.set(inner.get() + 1);
                    };
                    let child = || {
                        check(43, !lock.is_locked());
                        (0..5).for_each(|_| step());
                        i32::from(lock.lock().get() % 2 != 0 || lock.is_locked())
                    };
                    storm(|_| step(), child);
                });
            }

            /// The forking thread holds it, deep, with others queued on it: its hold lives on, on both sides.
            #[test]
            fn a_reentrant_hold_survives() {
                isolated(concat!($name, "::a_reentrant_hold_survives"), 120, || {
                    let lock = Arc::new(ReentrantMutex::new(Cell::new(0u64)));
                    let _hook = register(Hook::$reentrant("depth", Arc::clone(&lock)));
                    for depth in 1..=3usize {
                        for kind in BOTH {
                            let mut holds: Vec<_> = (0..depth).map(|_| lock.lock()).collect();
                            thread::scope(|s| {
                                for _ in 0..2 {
                                    s.spawn(|| {
                                        let hold = lock.lock();
                                        hold.set(hold.get() + 1);
                                    });
                                }
                                a_while();
                                let free_elsewhere = || {
                                    thread::scope(|s| s.spawn(|| lock.try_lock().is_some()).join().expect("no panic"))
                                };
                                let before = holds[0].get();
                                let pid = kind.fork(|| {
                                    for hold in holds.drain(..) {
                                        check(44, lock.is_owned_by_current_thread() && !free_elsewhere());
                                        hold.set(hold.get() + 10);
                                        drop(hold);
                                    }
                                    check(45, !lock.is_locked() && free_elsewhere());
                                    for _ in 0..5 {
                                        lock.lock().set(0);
                                    }
                                    0
                                });
                                while let Some(hold) = holds.pop() {
                                    assert!(lock.is_owned_by_current_thread() && !free_elsewhere());
                                    assert_eq!(hold.get(), before, "somebody had it meanwhile");
                                    drop(hold);
                                }
                                assert!(!lock.is_owned_by_current_thread());
                                ends_well(pid);
                            });
                            assert!(!lock.is_locked());
                        }
                    }
                    assert_eq!(lock.lock().get(), 12);
                });
            }

            /// All waiting inside regions: nothing of parking_lot's table is in use at a fork, so children may do anything.
            #[test]
            fn inside_regions() {
                isolated(concat!($name, "::inside_regions"), 600, || {
                    let (mutex, rwlock) = (Mutex::new(Pair::default()), RwLock::new(Pair::default()));
                    let step = |n: usize| {
                        let _region = no_forking();
                        match n % 3 {
                            0 => mutex.lock().step(),
                            1 => rwlock.write().step(),
                            _ => assert!(rwlock.read().at_rest()),
                        }
                    };
                    let child = || {
                        (0..3).for_each(step);
                        fight(20, || (0..3).for_each(step));
                        0
                    };
                    storm(step, child);
                });
            }
        }
    };
}

parking_lot_tests!(v0_13, parking_lot, lock_api_mutex, lock_api_rwlock, lock_api_reentrant, "v0_13");
parking_lot_tests!(v0_12, parking_lot_0_12, lock_api_0_4_mutex, lock_api_0_4_rwlock, lock_api_0_4_reentrant, "v0_12");

// -- channels

#[test]
fn channels_inside_regions() {
    isolated("channels_inside_regions", 600, || {
        let (bounded, from_bounded) = crossbeam_channel::bounded::<u64>(4);
        let (unbounded, from_unbounded) = crossbeam_channel::unbounded::<u64>();
        let (std_send, std_receive) = mpsc::sync_channel::<u64>(64);
        let std_receive = std::sync::Mutex::new(std_receive);
        let step = |n: usize| {
            let _region = no_forking();
            match n % 4 {
                0 if unbounded.len() < 64 => {
                    let _full = bounded.try_send(1);
                    unbounded.send(1).expect("there is a receiver");
                }
                0 | 1 => {
                    let _empty = (from_bounded.try_recv(), from_unbounded.try_recv());
                }
                2 => {
                    let _full = std_send.try_send(1);
                    // Sleeps in the region, so that others find somebody to wake.
                    let _none = from_unbounded.recv_timeout(Duration::from_micros(50));
                }
                _ => {
                    let receive = std_receive.lock().expect("not poisoned");
                    while receive.try_recv().is_ok() {}
                }
            }
        };
        let child = || {
            (0..4).for_each(step);
            fight(4, || (0..4).for_each(step));
            0
        };
        storm(step, child);
    });
}

// -- what every such hook keeps to

/// A lock that the forking thread holds itself is one more lock that is held: said, within the budget, and nothing is broken.
#[test]
fn the_holder_itself_is_busy() {
    isolated("the_holder_itself_is_busy", 120, || {
        let std_mutex = Arc::new(std::sync::Mutex::new(()));
        let std_rwlock = Arc::new(std::sync::RwLock::new(()));
        let mutex = Arc::new(parking_lot::Mutex::new(()));
        let rwlock = Arc::new(parking_lot::RwLock::new(()));
        let old = Arc::new(parking_lot_0_12::Mutex::new(()));
        let _hooks = [
            Hook::std_mutex("std mutex", Arc::clone(&std_mutex)),
            Hook::std_rwlock("std rwlock", Arc::clone(&std_rwlock)),
            Hook::lock_api_mutex("mutex", Arc::clone(&mutex)),
            Hook::lock_api_rwlock("rwlock", Arc::clone(&rwlock)),
            Hook::lock_api_0_4_mutex("old", Arc::clone(&old)),
        ]
        .map(register);
        let _clock = run_clock(Duration::from_millis(10));
        let busy = |name: &str| match coordinated(|| 0) {
            Err(ForkError::Busy { culprits }) => assert_eq!((culprits.hook, culprits.count), (Some(name), 0)),
            other => panic!("{name}: {other:?}"),
        };
        let hold = std_mutex.lock();
        busy("std mutex");
        drop(hold);
        for hold in [Ok(std_rwlock.read()), Err(std_rwlock.try_write())] {
            if hold.is_ok() {
                busy("std rwlock");
            }
        }
        let hold = mutex.lock();
        busy("mutex");
        drop(hold);
        let hold = rwlock.read();
        busy("rwlock");
        drop(hold);
        let hold = old.lock();
        busy("old");
        drop(hold);
        // All of them are free, and taken again and let go of by a fork that goes through.
        let free = || {
            std_mutex.try_lock().is_ok()
                && std_rwlock.try_write().is_ok()
                && mutex.try_lock().is_some()
                && rwlock.try_write().is_some()
                && old.try_lock().is_some()
        };
        for kind in BOTH {
            ends_well(kind.fork(|| i32::from(!free())));
            assert!(free());
        }
    });
}

/// The fork waits for the holder, and is there when the lock is free.
#[test]
fn a_held_lock_is_waited_for() {
    isolated("a_held_lock_is_waited_for", 60, || {
        freeze();
        let lock = Arc::new(std::sync::Mutex::new(()));
        let other = Arc::new(parking_lot::Mutex::new(()));
        let _hooks = [
            Hook::std_mutex("std", Arc::clone(&lock)),
            Hook::lock_api_mutex("parking_lot", Arc::clone(&other)).rank(1),
        ]
        .map(register);
        for kind in BOTH {
            thread::scope(|s| {
                let (one, two) = (lock.lock().expect("not poisoned"), other.lock());
                let forker = s.spawn(move || ends_well(kind.fork(|| 0)));
                a_while();
                assert!(!forker.is_finished());
                drop(two);
                a_while();
                assert!(!forker.is_finished());
                drop(one);
                forker.join().expect("the child is well");
            });
        }
        assert_eq!(carefork::stats().dirty, 0);
    });
}

/// No allocation between prepare and the child's return, with each kind of lock hooked (G9).
#[test]
fn nothing_is_allocated() {
    isolated("nothing_is_allocated", 60, || {
        let locks = (
            Arc::new(std::sync::Mutex::new(())),
            Arc::new(std::sync::RwLock::new(())),
            Arc::new(parking_lot::Mutex::new(())),
            Arc::new(parking_lot::RwLock::new(())),
            Arc::new(parking_lot::ReentrantMutex::new(())),
            Arc::new(parking_lot_0_12::ReentrantMutex::new(())),
        );
        let _hooks = [
            Hook::std_mutex("a", Arc::clone(&locks.0)),
            Hook::std_rwlock("b", Arc::clone(&locks.1)),
            Hook::lock_api_mutex("c", Arc::clone(&locks.2)),
            Hook::lock_api_rwlock("d", Arc::clone(&locks.3)),
            Hook::lock_api_reentrant("e", Arc::clone(&locks.4)),
            Hook::lock_api_0_4_reentrant("f", Arc::clone(&locks.5)),
        ]
        .map(register);
        // A foreign fork is nothing but the handlers.
        let pid = ForkGuardAlloc::armed(|| Kind::Foreign.fork(|| 0));
        ends_well(pid);
    });
}

/// The hook owns the lock it was given, and lets go of it when it is dropped.
#[test]
fn the_lock_lives_as_long_as_the_hook() {
    isolated("the_lock_lives_as_long_as_the_hook", 60, || {
        /// Owns its lock in place: it moves with the hook.
        struct Inline(std::sync::Mutex<Arc<()>>);
        impl std::ops::Deref for Inline {
            type Target = std::sync::Mutex<Arc<()>>;
            fn deref(&self) -> &Self::Target {
                &self.0
            }
        }
        let alive = Arc::new(());
        let shared = Arc::new(parking_lot::Mutex::new(Arc::clone(&alive)));
        let unsized_one: Arc<std::sync::Mutex<dyn Send>> = Arc::new(std::sync::Mutex::new(Arc::clone(&alive)));
        let hooks = [
            Hook::std_mutex("inline", Inline(std::sync::Mutex::new(Arc::clone(&alive)))),
            Hook::lock_api_mutex("shared", shared),
            Hook::std_mutex("unsized", unsized_one),
        ]
        .map(register);
        for kind in BOTH {
            ends_well(kind.fork(|| 0));
        }
        assert_eq!(Arc::strong_count(&alive), 4);
        drop(hooks);
        assert_eq!(Arc::strong_count(&alive), 1);
    });
}

/// carefork's own, where a hook holds them all the same: their hold is a region, which ends in the child, too.
#[test]
fn hooks_for_careforks_own_locks() {
    isolated("hooks_for_careforks_own_locks", 60, || {
        static MUTEX: carefork::Mutex<u32> = carefork::Mutex::new(0);
        static RWLOCK: carefork::RwLock<u32> = carefork::RwLock::new(0);
        static TREE: lock_api::ReentrantMutex<carefork::RawMutex, Number, u32> =
            lock_api::ReentrantMutex::from_raw(lock_api::RawMutex::INIT, Number, 0);
        let _mutex = register(Hook::lock_api_mutex("mutex", &MUTEX));
        let _rwlock = register(Hook::lock_api_rwlock("rwlock", &RWLOCK));
        let _tree = register(Hook::lock_api_reentrant("tree", &TREE));
        for kind in BOTH {
            ends_well(kind.noexec(|| {
                *MUTEX.lock() += 1;
                *RWLOCK.write() += 1;
                drop(TREE.lock());
                // Nobody is in a region: another thread forks.
                thread::spawn(|| ends_well(coordinated(|| 0).expect("a child"))).join().map_or(1, |()| 0)
            }));
        }
    });
}

/// A thread's number, the address of something of its own.
struct Number;

// SAFETY: each living thread has another.
unsafe impl lock_api::GetThreadId for Number {
    const INIT: Self = Number;

    fn nonzero_thread_id(&self) -> std::num::NonZeroUsize {
        thread_local!(static OWN: u8 = const { 0 });
        OWN.with(|own| std::ptr::from_ref(own).addr().try_into().expect("no null"))
    }
}
