//! Panics, forgotten guards and threads that end inside a region (G7).

use crate::common::{check, isolated};
use crate::drive::{self, BOTH, MS, Stop, coordinated, freeze, run_clock, run_slowly, until, until_shut};
use crate::{all_is_well, ends_well};
use carefork::{ForkError, no_forking, try_no_forking};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread;

#[test]
fn a_panic_or_an_early_return_ends_a_region() {
    isolated("ends::a_panic_or_an_early_return_ends_a_region", 30, || {
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
    isolated("ends::a_forgotten_guard_is_a_region_until_the_threads_end", 30, || {
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
    isolated("ends::force_unlock_ends_forgotten_regions", 30, || {
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
    isolated("ends::pthread_exit_inside_a_region_ends_it", 30, || {
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
    isolated("ends::a_thread_that_vanishes_inside_a_region_is_buried", 30, || {
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
    isolated("ends::threads_by_the_thousand_reuse_seats", 60, || {
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
    isolated("ends::regions_in_the_destructors_of_a_thread", 60, || {
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
