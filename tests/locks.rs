//! The locks as locks (L1): exclusion, wake-ups, time-outs and initialisation among threads. No test here forks.

mod common;

use carefork::{
    Condvar, ForkOptions, LazyLock, Mutex, MutexGuard, OnceLock, RwLock, RwLockUpgradableReadGuard, RwLockWriteGuard,
};
use common::{Rng, isolated};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

const MS: Duration = Duration::from_millis(1);
/// No wait takes this long, on whatever machine.
const LONG: Duration = Duration::from_secs(600);

/// The message of the panic that `f` ends with.
fn panic_of<R>(f: impl FnOnce() -> R) -> String {
    let Err(why) = catch_unwind(AssertUnwindSafe(f)) else { panic!("it should have panicked") };
    match why.downcast::<String>() {
        Ok(text) => *text,
        Err(why) => (*why.downcast::<&str>().expect("a text")).to_owned(),
    }
}

/// No region is left open on this thread: a fork would be allowed, and nobody is kept waiting. (The other tests are threads of this
/// process, and may be in regions of theirs for as long as a busy machine makes it: no budget.)
#[track_caller]
fn no_region_left() {
    // SAFETY: the child does nothing.
    #[allow(unsafe_code)]
    let child = unsafe { ForkOptions::new().timeout_never().spawn(|| 7) };
    let status = child.expect("no region is open").wait().expect("the child is ours");
    assert_eq!(status.code(), Some(7));
}

// -- Mutex

#[test]
fn mutex_excludes() {
    static TOTAL: Mutex<(u64, u64)> = Mutex::new((0, 0));
    const EACH: u64 = 20_000;
    thread::scope(|s| {
        for _ in 0..6 {
            s.spawn(|| {
                for _ in 0..EACH {
                    let mut both = TOTAL.lock();
                    both.0 += 1;
                    both.1 += 1;
                    assert_eq!(both.0, both.1);
                }
            });
        }
    });
    assert_eq!(*TOTAL.lock(), (6 * EACH, 6 * EACH));
    no_region_left();
}

/// With holders that sleep, so that everybody goes through the kernel, and waiters that give up in between.
#[test]
fn mutex_with_waiters_that_give_up() {
    let (m, got) = (Mutex::new(0_u32), AtomicU32::new(0));
    let mut seed = Rng::new();
    thread::scope(|s| {
        for i in 0..8 {
            let (m, got) = (&m, &got);
            let mut rng = seed.split();
            s.spawn(move || {
                for _ in 0..150 {
                    let guard =
                        if i % 2 == 0 { Some(m.lock()) } else { m.try_lock_for(Duration::from_micros(rng.below(400))) };
                    if let Some(mut guard) = guard {
                        *guard += 1;
                        got.fetch_add(1, Ordering::Relaxed);
                        if rng.below(4) == 0 {
                            thread::sleep(Duration::from_micros(200));
                        }
                    }
                }
            });
        }
    });
    assert_eq!(*m.lock(), got.into_inner());
    assert!(*m.lock() >= 4 * 150);
    no_region_left();
}

#[test]
fn mutex_time_outs() {
    let m = Mutex::new(());
    let held = m.lock();
    thread::scope(|s| {
        s.spawn(|| {
            let begun = Instant::now();
            assert!(m.try_lock().is_none());
            assert!(m.try_lock_for(20 * MS).is_none());
            assert!(m.try_lock_until(Instant::now() + 20 * MS).is_none());
            assert!(m.try_lock_until(begun).is_none(), "a moment in the past");
            assert!(begun.elapsed() >= 40 * MS);
            assert!(m.is_locked());
        });
    });
    drop(held);
    assert!(m.try_lock_for(Duration::MAX).is_some());
    assert!(!m.is_locked());
    no_region_left();
}

#[test]
fn locking_twice_says_so() {
    let m = Mutex::new(());
    let held = m.lock();
    assert!(panic_of(|| m.lock()).contains("holds this lock already"));
    assert!(m.try_lock().is_none());
    assert!(m.try_lock_for(5 * MS).is_none());
    drop(held);
    let l = RwLock::new(());
    let held = l.write();
    assert!(panic_of(|| l.write()).contains("holds this lock already"));
    assert!(panic_of(|| l.read()).contains("holds this lock already"));
    assert!(l.try_read().is_none());
    drop(held);
    assert!(m.try_lock().is_some() && l.try_write().is_some());
    no_region_left();
}

#[test]
fn a_panic_unlocks() {
    let (m, l) = (Mutex::new(0), RwLock::new(0));
    panic_of(|| {
        let _a = m.lock();
        let _b = l.write();
        panic!("on purpose");
    });
    assert!(m.try_lock().is_some() && l.try_write().is_some());
    no_region_left();
}

#[test]
fn mapped_guards_and_unlocked() {
    let m = Mutex::new((1, String::from("a")));
    let mut guard = m.lock();
    MutexGuard::unlocked(&mut guard, || {
        m.lock().1.push('b');
        // Free of regions in here: nothing keeps a fork waiting.
        no_region_left();
    });
    let mut text = MutexGuard::map(guard, |both| &mut both.1);
    text.push('c');
    drop(text);
    assert_eq!(m.into_inner().1, "abc");
}

/// Dropping and moving a locked lock is safe (L1), and the region of a forgotten guard is no more than a region.
#[test]
fn a_locked_lock_may_be_dropped_or_moved() {
    thread::spawn(|| {
        let m = Mutex::new(vec![1]);
        std::mem::forget(m.lock());
        let m = Box::new(m);
        assert!(m.is_locked());
        drop(m);
        let l = RwLock::new(vec![1]);
        std::mem::forget(l.read());
        drop(l);
    })
    .join()
    .expect("nothing to panic about");
    // The thread's end ended its regions (G7).
    no_region_left();
}

#[test]
fn sizes() {
    assert_eq!(size_of::<Mutex<()>>(), 4);
    assert_eq!(size_of::<RwLock<()>>(), 8);
    assert_eq!(size_of::<Condvar>(), 4);
    assert!(size_of::<OnceLock<u64>>() <= 24);
}

// -- RwLock

#[test]
fn rwlock_excludes() {
    let l = RwLock::new((0_u64, 0_u64));
    let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut seed = Rng::new();
    let writes: u64 = thread::scope(|s| {
        let threads: Vec<_> = (0..6)
            .map(|_| {
                let (l, inside, most) = (&l, &inside, &most);
                let mut rng = seed.split();
                s.spawn(move || {
                    let mut writes = 0;
                    for _ in 0..4_000 {
                        match rng.below(8) {
                            0 | 1 => {
                                let mut w = l.write();
                                w.0 += 1;
                                w.1 += 1;
                                writes += 1;
                                if rng.below(3) == 0 {
                                    let r = RwLockWriteGuard::downgrade(w);
                                    assert_eq!(r.0, r.1);
                                }
                            }
                            2 => {
                                let u = l.upgradable_read();
                                let before = u.0;
                                let mut w = RwLockUpgradableReadGuard::upgrade(u);
                                assert_eq!(w.0, before);
                                w.0 += 1;
                                w.1 += 1;
                                writes += 1;
                                let u = RwLockWriteGuard::downgrade_to_upgradable(w);
                                let r = RwLockUpgradableReadGuard::downgrade(u);
                                assert_eq!(r.0, r.1);
                            }
                            3 => {
                                let wait = Duration::from_micros(rng.below(200));
                                if let Some(mut w) = l.try_write_for(wait) {
                                    w.0 += 1;
                                    w.1 += 1;
                                    writes += 1;
                                }
                            }
                            4 => {
                                if let Some(u) = l.try_upgradable_read_for(Duration::from_micros(rng.below(200))) {
                                    let wait = Duration::from_micros(rng.below(200));
                                    match RwLockUpgradableReadGuard::try_upgrade_for(u, wait) {
                                        Ok(mut w) => {
                                            w.0 += 1;
                                            w.1 += 1;
                                            writes += 1;
                                        }
                                        Err(u) => assert_eq!(u.0, u.1),
                                    }
                                }
                            }
                            _ => {
                                let r = l.read();
                                most.fetch_max(1 + inside.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
                                assert_eq!(r.0, r.1);
                                if rng.below(50) == 0 {
                                    thread::sleep(Duration::from_micros(100));
                                }
                                inside.fetch_sub(1, Ordering::Relaxed);
                            }
                        }
                    }
                    writes
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().expect("no thread panics")).sum()
    });
    assert_eq!(*l.read(), (writes, writes));
    assert!(most.into_inner() > 1, "readers never met");
    assert!(l.try_write().is_some());
    no_region_left();
}

#[test]
fn rwlock_by_kind() {
    let l = RwLock::new(1);
    {
        let (a, b) = (l.read(), l.read());
        assert!(l.try_write().is_none() && l.try_read().is_some() && *a == *b);
        let u = l.upgradable_read();
        assert!(l.try_upgradable_read().is_none() && l.try_read().is_some());
        let u = RwLockUpgradableReadGuard::try_upgrade(u).expect_err("two readers");
        let u = RwLockUpgradableReadGuard::try_upgrade_for(u, 5 * MS).expect_err("two readers");
        assert!(l.try_write_for(5 * MS).is_none());
        drop((a, b));
        let w = RwLockUpgradableReadGuard::try_upgrade(u).expect("the only reader");
        assert!(l.try_read().is_none() && l.try_read_for(5 * MS).is_none() && l.is_locked_exclusive());
        let u = RwLockWriteGuard::downgrade_to_upgradable(w);
        assert!(l.try_upgradable_read().is_none() && l.try_read().is_some());
        let r = RwLockUpgradableReadGuard::downgrade(u);
        assert!(l.try_upgradable_read().is_some() && l.try_write().is_none() && *r == 1);
    }
    assert!(l.try_write().is_some() && !l.is_locked());
    no_region_left();
}

/// A waiting writer keeps new readers out; when it gives up they get in though the first reader stays.
#[test]
fn a_writer_that_gives_up_lets_readers_in() {
    let l = RwLock::new(());
    let seen = AtomicU32::new(0);
    let first = l.read();
    thread::scope(|s| {
        let writer = s.spawn(|| {
            // Where nobody was there to see it wait, again.
            while seen.load(Ordering::Relaxed) == 0 {
                assert!(l.try_write_for(100 * MS).is_none());
            }
        });
        // The writer waits once new readers are kept out.
        let begun = Instant::now();
        while l.try_read().is_some() {
            assert!(begun.elapsed() < LONG);
            thread::sleep(MS);
        }
        seen.store(1, Ordering::Relaxed);
        let reader = s.spawn(|| l.try_read_for(LONG).is_some());
        assert!(reader.join().expect("no panic"));
        writer.join().expect("no panic");
    });
    drop(first);
    assert!(l.try_write().is_some());
}

/// Readers back to back on several threads do not starve a writer, nor writers a reader.
#[test]
fn nobody_starves() {
    let (l, stop) = (RwLock::new(0_u32), AtomicU32::new(0));
    thread::scope(|s| {
        let end = End(&stop);
        for i in 0..4 {
            let (l, stop) = (&l, &stop);
            s.spawn(move || {
                while stop.load(Ordering::Relaxed) == 0 {
                    if i < 3 {
                        drop(l.read());
                    } else {
                        *l.write() += 1;
                    }
                }
            });
        }
        for _ in 0..50 {
            assert!(l.try_write_for(LONG).is_some() && l.try_read_for(LONG).is_some());
        }
        drop(end);
    });
}

/// Stops the others however the test ends.
struct End<'a>(&'a AtomicU32);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(1, Ordering::Relaxed);
    }
}

// -- Condvar

#[test]
fn ping_pong() {
    let (turn, bell) = (Mutex::new(0_u32), Condvar::new());
    thread::scope(|s| {
        for mine in 0..3 {
            let (turn, bell) = (&turn, &bell);
            s.spawn(move || {
                for _ in 0..1_000 {
                    let mut now = turn.lock();
                    bell.wait_while(&mut now, |now| *now % 3 != mine);
                    *now += 1;
                    drop(now);
                    bell.notify_all();
                }
            });
        }
    });
    assert_eq!(turn.into_inner(), 3_000);
    no_region_left();
}

/// Each notification of a queue wakes somebody: nothing is left in it, nobody waits for ever.
#[test]
fn one_for_each() {
    let (queue, bell) = (Mutex::new(Vec::new()), Condvar::new());
    let taken: usize = thread::scope(|s| {
        let takers: Vec<_> = (0..4)
            .map(|i| {
                let (queue, bell) = (&queue, &bell);
                s.spawn(move || {
                    let mut taken = 0;
                    loop {
                        let mut q = queue.lock();
                        while q.is_empty() {
                            if i == 0 {
                                // One who gives up all the time loses no one's notification.
                                let _late = bell.wait_for(&mut q, Duration::from_micros(50)).timed_out();
                            } else {
                                bell.wait(&mut q);
                            }
                        }
                        match q.pop() {
                            Some(true) => taken += 1,
                            _ => return taken,
                        }
                    }
                })
            })
            .collect();
        for _ in 0..5_000 {
            queue.lock().insert(0, true);
            bell.notify_one();
        }
        for _ in 0..4 {
            queue.lock().insert(0, false);
            bell.notify_one();
        }
        takers.into_iter().map(|t| t.join().expect("no taker panics")).sum()
    });
    assert_eq!(taken, 5_000);
}

#[test]
fn condvar_time_outs() {
    let (m, bell) = (Mutex::new(()), Condvar::new());
    let mut guard = m.lock();
    let begun = Instant::now();
    assert!(bell.wait_for(&mut guard, 20 * MS).timed_out());
    assert!(bell.wait_until(&mut guard, Instant::now() + 20 * MS).timed_out());
    assert!(begun.elapsed() >= 40 * MS);
    assert!(bell.wait_until(&mut guard, begun).timed_out());
    assert!(m.is_locked());
    // Nobody waits: nothing is stored up.
    bell.notify_one();
    bell.notify_all();
    assert!(bell.wait_for(&mut guard, 5 * MS).timed_out());
    drop(guard);
    no_region_left();
}

/// A thread that waits is in no region: a fork goes on meanwhile.
#[test]
fn waiters_keep_no_fork_waiting() {
    isolated("waiters_keep_no_fork_waiting", 30, waiters);
}

/// In a process where nobody else is in a region: a fork that waited would wait for ever.
fn waiters() {
    let (m, bell, l) =
        (Arc::new((Mutex::new(0), Condvar::new())), Arc::new(Barrier::new(2)), Arc::new(RwLock::new(())));
    let waits = {
        let (m, bell) = (Arc::clone(&m), Arc::clone(&bell));
        thread::spawn(move || {
            let mut guard = m.0.lock();
            *guard = 1;
            bell.wait();
            m.1.wait_while(&mut guard, |g| *g != 2);
        })
    };
    bell.wait();
    // The lock is free only while the thread waits.
    assert_eq!(*m.0.lock(), 1);
    no_region_left();

    let held = m.0.lock();
    let read = l.read();
    let (also, writes) = (Arc::clone(&m), Arc::clone(&l));
    let (wants_lock, wants_write) =
        (thread::spawn(move || drop(also.0.lock())), thread::spawn(move || drop(writes.write())));
    thread::sleep(30 * MS);
    no_region_left();
    drop((held, read));
    wants_lock.join().expect("it got the lock");
    wants_write.join().expect("it got the lock");
    *m.0.lock() = 2;
    m.1.notify_all();
    waits.join().expect("it was woken");
}

// -- OnceLock, LazyLock

#[test]
fn once_among_many() {
    for _ in 0..50 {
        let (cell, calls, start) = (OnceLock::new(), AtomicU32::new(0), Barrier::new(6));
        thread::scope(|s| {
            for i in 0..6 {
                let (cell, calls, start) = (&cell, &calls, &start);
                s.spawn(move || {
                    start.wait();
                    let seen: &Vec<u32> = cell.get_or_init(|| {
                        calls.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_micros(100));
                        vec![i; 100]
                    });
                    assert!(seen.iter().all(|x| *x == seen[0]));
                });
            }
        });
        assert_eq!(calls.into_inner(), 1);
    }
    no_region_left();
}

#[test]
fn once_as_in_std() {
    let mut cell = OnceLock::new();
    assert!(cell.get().is_none() && cell.get_mut().is_none());
    assert_eq!(cell.set(1), Ok(()));
    assert_eq!(cell.set(2), Err(2));
    assert_eq!(*cell.get_or_init(|| 3), 1);
    if let Some(v) = cell.get_mut() {
        *v = 4;
    }
    let copy = cell.clone();
    assert_eq!(copy, OnceLock::from(4));
    assert_eq!(cell.take(), Some(4));
    assert_eq!((cell.get(), copy.into_inner()), (None, Some(4)));
    assert_eq!(*cell.get_or_init(|| 5), 5);
    assert_eq!(OnceLock::<u32>::default().into_inner(), None);
}

#[test]
fn a_panic_leaves_the_cell_empty() {
    let cell = OnceLock::new();
    panic_of(|| cell.get_or_init(|| panic!("on purpose")));
    no_region_left();
    assert_eq!(*cell.get_or_init(|| 1), 1);
}

#[test]
fn an_initialiser_that_asks_for_itself() {
    static CELL: OnceLock<u32> = OnceLock::new();
    assert!(panic_of(|| CELL.get_or_init(|| *CELL.get_or_init(|| 1))).contains("initialiser"));
    assert!(panic_of(|| CELL.get_or_init(|| CELL.set(2).map_or(0, |()| 1))).contains("initialiser"));
    no_region_left();
    assert_eq!(*CELL.get_or_init(|| 3), 3);

    static LAZY: LazyLock<u32> = LazyLock::new(|| *LAZY + 1);
    assert!(panic_of(|| *LAZY).contains("initialiser"));
    assert!(panic_of(|| *LAZY).contains("poisoned"));
    no_region_left();
}

/// The initialiser is a region: it forbids its own thread to fork (G4). Those who wait for it are in none.
#[test]
fn an_initialiser_is_a_region() {
    static CELL: OnceLock<u32> = OnceLock::new();
    let (inside, go) = (mpsc::channel(), mpsc::channel::<()>());
    let makes = thread::spawn(move || {
        CELL.get_or_init(|| {
            // SAFETY: the child does nothing.
            #[allow(unsafe_code)]
            let fork = unsafe { carefork::spawn(|| 0) };
            assert!(matches!(fork, Err(carefork::ForkError::Forbidden { .. })));
            inside.0.send(()).expect("the test waits");
            let _told = go.1.recv();
            1
        });
    });
    inside.1.recv().expect("the initialiser runs");
    let waits = thread::spawn(|| *CELL.get_or_init(|| 2));
    thread::sleep(20 * MS);
    drop(go.0);
    makes.join().expect("the initialiser ends");
    assert_eq!(waits.join().expect("it got the value"), 1);
    no_region_left();
}

#[test]
fn lazy_poisons_as_in_std() {
    let calls = AtomicU32::new(0);
    let lazy: LazyLock<u32, _> = LazyLock::new(|| {
        calls.fetch_add(1, Ordering::Relaxed);
        panic!("on purpose")
    });
    assert_eq!(panic_of(|| *lazy), "on purpose");
    assert!(panic_of(|| LazyLock::force(&lazy)).contains("poisoned"));
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    no_region_left();
}
