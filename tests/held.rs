//! Locks of the library and forks: held by the forking thread, waited for inside regions, left behind by dirty forks
//! (G5, G6, L4).

#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;
mod drive;

use carefork::{
    ForkError, LazyLock, Mutex, OnceLock, RwLock, lineage, no_forking, set_foreign_budget, stats, try_no_forking,
};
use common::{Verdict, check, foreign_handlers, isolated, raw, reap};
use drive::{
    BOTH, Kind, MS, SOON, Stop, a_while, coordinated, foreign, freeze, inside, run_clock, run_slowly, until, until_shut,
};
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

// -- L4

#[test]
fn a_guard_held_over_a_fork_is_valid_on_both_sides() {
    isolated("a_guard_held_over_a_fork_is_valid_on_both_sides", 60, || {
        let (mutex, rw) = (Mutex::new(vec![1]), RwLock::new(vec![1]));
        for kind in BOTH {
            let (mut m, mut w) = (mutex.lock(), rw.write());
            let pid = kind.fork(|| {
                check(1, mutex.try_lock().is_none() && rw.try_read().is_none());
                // Threads of the child are kept out as they were of the parent.
                let entered = AtomicBool::new(false);
                thread::scope(|s| {
                    s.spawn(|| {
                        let m = mutex.lock();
                        entered.store(true, SeqCst);
                        check(2, *m == [1, 7]);
                    });
                    thread::sleep(5 * MS);
                    check(3, !entered.load(SeqCst));
                    m.push(7);
                    w.push(7);
                    drop((m, w));
                });
                check(4, *rw.read() == [1, 7]);
                check(5, !lineage().dirty);
                ends_well(Kind::Coordinated.fork(|| i32::from(mutex.try_lock().is_none())));
                0
            });
            // The closure, and the guards in it, are this side's as well: dropped by now.
            ends_well(pid);
            assert_eq!((&*mutex.lock(), &*rw.read()), (&vec![1], &vec![1]));
            assert!(try_no_forking().is_some());
        }
        assert_eq!(stats().dirty, 0);
    });
}

#[test]
fn threads_that_wait_for_a_lock_keep_no_fork_waiting() {
    isolated("threads_that_wait_for_a_lock_keep_no_fork_waiting", 60, || {
        freeze();
        let (mutex, rw, stop) = (Mutex::new(0), RwLock::new(0), AtomicBool::new(false));
        for kind in BOTH {
            let (m, w) = (mutex.lock(), rw.write());
            let waiting = AtomicU32::new(0);
            thread::scope(|s| {
                let _end = Stop(&stop);
                for n in 0..4 {
                    let (mutex, rw, waiting) = (&mutex, &rw, &waiting);
                    s.spawn(move || {
                        waiting.fetch_add(1, SeqCst);
                        match n {
                            0 | 1 => drop(mutex.lock()),
                            2 => drop(rw.read()),
                            _ => drop(rw.write()),
                        }
                    });
                }
                until(|| waiting.load(SeqCst) == 4);
                a_while();
                for _ in 0..10 {
                    ends_well(kind.fork(|| i32::from(lineage().dirty)));
                }
                drop((m, w));
            });
        }
    });
}

// -- G5

#[test]
fn who_holds_a_lock_forks_first() {
    isolated("who_holds_a_lock_forks_first", 60, || {
        // Were it not so, each would wait for the other, and time does not pass.
        freeze();
        let mutex = Mutex::new(0);
        for holder in BOTH {
            for other in BOTH {
                let (held, go) = (AtomicBool::new(false), AtomicBool::new(false));
                thread::scope(|s| {
                    let _end = Stop(&go);
                    s.spawn(|| {
                        let guard = mutex.lock();
                        held.store(true, SeqCst);
                        until(|| go.load(SeqCst));
                        let pid = holder.fork(|| i32::from(lineage().dirty || mutex.try_lock().is_some()));
                        drop(guard);
                        ends_well(pid);
                    });
                    until(|| held.load(SeqCst));
                    s.spawn(|| ends_well(other.fork(|| i32::from(lineage().dirty || mutex.try_lock().is_none()))));
                    until_shut();
                    go.store(true, SeqCst);
                });
            }
        }
        assert_eq!(stats().dirty + stats().refused, 0);
    });
}

#[test]
fn two_that_hold_locks_and_fork() {
    isolated("two_that_hold_locks_and_fork", 60, || {
        freeze();
        for kinds in [[Kind::Coordinated; 2], BOTH, [Kind::Foreign; 2]] {
            let before = stats();
            let locks = [Mutex::new(0), Mutex::new(0)];
            let both_hold = std::sync::Barrier::new(2);
            let refused: u32 = thread::scope(|s| {
                let forkers = [0, 1].map(|n| {
                    let (locks, both_hold) = (&locks, &both_hold);
                    s.spawn(move || {
                        let _guard = locks[n].lock();
                        both_hold.wait();
                        match kinds[n] {
                            Kind::Foreign => {
                                ends_well(foreign(|| 0));
                                0
                            }
                            Kind::Coordinated => match coordinated(|| i32::from(lineage().dirty)) {
                                Err(ForkError::WouldDeadlock { culprits }) => {
                                    assert_eq!(culprits.count, 1);
                                    1
                                }
                                end => {
                                    ends_well(end.expect("the one or the other"));
                                    0
                                }
                            },
                        }
                    })
                });
                forkers.into_iter().map(|f| f.join().unwrap_or(9)).sum()
            });
            let dirty = stats().dirty - before.dirty;
            // At once, by one of them; the other came through.
            assert_eq!(u64::from(refused) + dirty, 1, "{kinds:?}");
            assert!(locks.iter().all(|l| l.try_lock().is_some()));
        }
    });
}

/// How a thread inside a region may come to wait for the forker's lock.
#[derive(Clone, Copy, Debug)]
enum Inside {
    Region,
    Lock,
    ReadLock,
}

#[test]
fn who_is_waited_for_inside_a_region_cannot_fork() {
    isolated("who_is_waited_for_inside_a_region_cannot_fork", 60, || {
        freeze();
        for how in [Inside::Region, Inside::Lock, Inside::ReadLock] {
            for kind in BOTH {
                for rw in [false, true] {
                    let (mutex, write, other, third) = (Mutex::new(0), RwLock::new(0), Mutex::new(0), RwLock::new(0));
                    let dirty = stats().dirty;
                    let (guard, wguard) = if rw { (None, Some(write.write())) } else { (Some(mutex.lock()), None) };
                    let begun = AtomicBool::new(false);
                    thread::scope(|s| {
                        s.spawn(|| {
                            let region = matches!(how, Inside::Region).then(no_forking);
                            let lock = matches!(how, Inside::Lock).then(|| other.lock());
                            let read = matches!(how, Inside::ReadLock).then(|| third.read());
                            begun.store(true, SeqCst);
                            if rw {
                                drop(write.read());
                            } else {
                                drop(mutex.lock());
                            }
                            drop((region, lock, read));
                        });
                        until(|| begun.load(SeqCst));
                        match kind {
                            Kind::Coordinated => {
                                let end = coordinated(|| 1);
                                assert!(matches!(end, Err(ForkError::WouldDeadlock { .. })), "{how:?} {rw} {end:?}");
                            }
                            Kind::Foreign => {
                                ends_well(foreign(|| i32::from(!lineage().dirty)));
                                assert_eq!(stats().dirty, dirty + 1, "{how:?} {rw}");
                            }
                        }
                        drop((guard, wguard));
                    });
                }
            }
        }
        ends_well(coordinated(|| 0).expect("nobody waits"));
    });
}

/// Waiting for a lock that a third thread holds, or giving up in time, is no deadlock.
#[test]
fn only_a_deadlock_is_called_one() {
    isolated("only_a_deadlock_is_called_one", 60, || {
        let (mine, theirs, stop) = (Mutex::new(0), Mutex::new(0), AtomicBool::new(false));
        let _clock = run_slowly();
        thread::scope(|s| {
            let _end = Stop(&stop);
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    let _region = no_forking();
                    // Gives up soon: the fork goes on then.
                    drop(mine.try_lock_for(Duration::from_micros(300)));
                    drop(theirs.lock());
                }
            });
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    let guard = theirs.lock();
                    thread::sleep(MS / 4);
                    drop(guard);
                }
            });
            for i in 0..60 {
                let guard = mine.lock();
                match BOTH[i % 2] {
                    // It may be seen waiting twice.
                    Kind::Coordinated => match coordinated(|| i32::from(lineage().dirty)) {
                        Ok(pid) => ends_well(pid),
                        Err(ForkError::WouldDeadlock { .. }) => {}
                        Err(other) => panic!("{other}"),
                    },
                    Kind::Foreign => ends_well(foreign(|| 0)),
                }
                drop(guard);
                let free = coordinated(|| i32::from(lineage().dirty));
                ends_well(free.expect("this thread holds nothing"));
            }
        });
    });
}

// Another library's handler lock, which two forks meet in.

struct CLock(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: it is a mutex.
unsafe impl Sync for CLock {}

static C_LOCK: CLock = CLock(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));

extern "C" fn c_lock() {
    // SAFETY: initialised statically, never moved.
    unsafe { libc::pthread_mutex_lock(C_LOCK.0.get()) };
}

extern "C" fn c_unlock() {
    // SAFETY: locked by this thread, or by the one that this child's is a copy of.
    unsafe { libc::pthread_mutex_unlock(C_LOCK.0.get()) };
}

/// One thread forks while it holds a lock of this library, as does the other a moment later; each takes another library's
/// lock on its way to carefork. Who came there first without holding anything gives way, also in that.
#[test]
fn forks_with_locks_meet_in_a_handlers_lock() {
    isolated("forks_with_locks_meet_in_a_handlers_lock", 60, || {
        foreign_handlers(c_lock, c_unlock, c_unlock);
        let mutex = Mutex::new(0);
        // First the one meeting, step by step: coordinated forks, so one can give way, well before its budget.
        freeze();
        let (held, go) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|s| {
            let _end = Stop(&go);
            s.spawn(|| {
                let guard = mutex.lock();
                held.store(true, SeqCst);
                until(|| go.load(SeqCst));
                let pid = coordinated(|| i32::from(lineage().dirty)).expect("the other gives way");
                drop(guard);
                ends_well(pid);
            });
            until(|| held.load(SeqCst));
            let never = carefork::ForkOptions::new().timeout_never();
            s.spawn(move || ends_well(drive::fork_with(&never, || 0).expect("after the other")));
            until_shut();
            go.store(true, SeqCst);
            // Slowly: 0.4 s in all are less than half of any budget, and 20 000 steps.
            for _ in 0..20_000 {
                carefork::testing::advance(MS / 50);
                thread::sleep(MS / 5);
                if stats().forks == 2 {
                    break;
                }
            }
            until(|| stats().forks == 2);
        });
        assert!(stats().thrown_away >= 1);
        // Then many of them.
        set_foreign_budget(Some(50 * MS));
        let _clock = run_clock(MS / 5);
        let failed = AtomicU32::new(0);
        thread::scope(|s| {
            for n in 0..2 {
                let (mutex, failed) = (&mutex, &failed);
                s.spawn(move || {
                    for i in 0..130 {
                        let guard = ((i + n) % 3 != 0).then(|| mutex.lock());
                        let pid = match BOTH[i % 4 / 3] {
                            Kind::Coordinated => coordinated(|| i32::from(lineage().dirty)).unwrap_or(-1),
                            Kind::Foreign => foreign(|| 0),
                        };
                        drop(guard);
                        if pid > 0 {
                            ends_well(pid);
                        } else {
                            failed.fetch_add(1, SeqCst);
                        }
                    }
                });
            }
        });
        println!("{failed:?} of 260 failed, {:?}", stats());
        assert!(failed.load(SeqCst) < 26);
    });
}

// -- G6: what a dirty child finds

fn panics(f: impl FnOnce()) -> bool {
    let Err(panic) = catch_unwind(AssertUnwindSafe(f)) else { return false };
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    raw::Line::new().text("panic: ").text(text.unwrap_or("?")).send();
    text.is_some_and(|text| text.contains("fork"))
}

#[test]
fn in_a_dirty_child_a_lock_left_held_panics() {
    isolated("in_a_dirty_child_a_lock_left_held_panics", 60, || {
        static MUTEX: Mutex<u32> = Mutex::new(0);
        static WRITTEN: RwLock<u32> = RwLock::new(0);
        static READ: RwLock<u32> = RwLock::new(0);
        static ONCE: OnceLock<u32> = OnceLock::new();
        static LAZY: LazyLock<u32> = LazyLock::new(|| {
            READY.fetch_add(1, SeqCst);
            until(|| LEAVE.load(SeqCst));
            1
        });
        static READY: AtomicU32 = AtomicU32::new(0);
        static LEAVE: AtomicBool = AtomicBool::new(false);
        static FREE: Mutex<u32> = Mutex::new(0);
        fn hold<G>(guard: G) {
            READY.fetch_add(1, SeqCst);
            until(|| LEAVE.load(SeqCst));
            drop(guard);
        }
        thread::scope(|s| {
            let _end = Stop(&LEAVE);
            s.spawn(|| hold(MUTEX.lock()));
            s.spawn(|| hold(WRITTEN.write()));
            s.spawn(|| hold(READ.read()));
            s.spawn(|| {
                ONCE.get_or_init(|| {
                    hold(());
                    1
                })
            });
            s.spawn(|| *LAZY);
            until(|| READY.load(SeqCst) == 5);
            let _clock = run_clock(20 * MS);
            fn child() -> i32 {
                check(1, lineage().dirty);
                check(2, MUTEX.try_lock().is_none() && WRITTEN.try_read().is_none() && READ.try_write().is_none());
                check(3, panics(|| drop(MUTEX.lock())));
                check(4, panics(|| drop(WRITTEN.read())));
                check(5, panics(|| drop(WRITTEN.write())));
                check(6, panics(|| drop(READ.write())));
                check(7, panics(|| assert_ne!(*ONCE.get_or_init(|| 2), 0)));
                check(8, panics(|| assert_ne!(*LAZY, 0)));
                check(9, panics(|| drop(MUTEX.try_lock_for(Duration::from_secs(3600)))) || MUTEX.try_lock().is_none());
                *FREE.lock() += 1;
                // Panicking leaves no region behind.
                ends_well(Kind::Coordinated.fork(|| 0));
                thread::scope(|s| {
                    let threads: Vec<_> = (0..80).map(|_| s.spawn(|| *FREE.lock() += 1)).collect();
                    threads.into_iter().for_each(|t| check(10, t.join().is_ok()));
                });
                // New threads are not taken for those who held the locks.
                check(11, thread::spawn(|| panics(|| drop(MUTEX.lock()))).join().unwrap_or(false));
                0
            }
            ends_well(foreign(|| {
                carefork::testing::release();
                ends_well(Kind::Coordinated.fork(child));
                child()
            }));
        });
        // In this process nothing has happened.
        drop((MUTEX.lock(), WRITTEN.write(), READ.write()));
        assert_eq!((*LAZY, ONCE.get()), (1, Some(&1)));
        ends_well(coordinated(|| 0).expect("nobody is in the way"));
    });
}

#[test]
fn a_busy_fork_names_who_holds_a_lock() {
    isolated("a_busy_fork_names_who_holds_a_lock", 60, || {
        let _clock = run_clock(10 * MS);
        let (mutex, stop, held) = (Mutex::new(0), AtomicBool::new(false), AtomicBool::new(false));
        let region = inside("a-region");
        region.leave();
        thread::scope(|s| {
            let _end = Stop(&stop);
            let holder = || {
                let _guard = mutex.lock();
                held.store(true, SeqCst);
                until(|| stop.load(SeqCst));
            };
            thread::Builder::new().name("holder".to_owned()).spawn_scoped(s, holder).expect("a thread");
            until(|| held.load(SeqCst));
            let Err(ForkError::Busy { culprits }) = coordinated(|| 1) else { panic!("it is in the way") };
            assert_eq!((culprits.count, culprits.threads[0].name.as_str()), (1, "holder"));
            if cfg!(debug_assertions) {
                let at = culprits.threads[0].entered.expect("recorded in this build");
                assert!(at.file().ends_with("held.rs"), "{at}");
            }
        });
    });
}
