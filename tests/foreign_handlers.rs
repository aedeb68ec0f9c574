//! At-fork handlers of other libraries, registered before carefork's and after: order, locks that threads in regions take
//! too, both kinds of fork at once (G2, G3, G5, G8).

#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;
mod drive;
mod handlers;

use carefork::{
    ForkError, ForkOptions, Hook, fork_generation, lineage, no_forking, register, set_foreign_budget, stats,
    try_no_forking,
};
use common::{Rng, Verdict, check, isolated, raw, reap, refuse_forks};
use drive::{
    BOTH, Kind, MS, SOON, Stop, coordinated, foreign, fork_with, freeze, no_child_left, run_clock, until, until_shut,
};
use handlers::{EARLY_LOCK, LATE_LOCK, both_with_locks, early, late, nothing};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

// -- order

static ORDER: [AtomicU32; 8] = [const { AtomicU32::new(0) }; 8];
static NEXT: AtomicUsize = AtomicUsize::new(0);

fn note(who: u8) {
    ORDER[NEXT.fetch_add(1, SeqCst) % 8].store(who.into(), SeqCst);
}

/// What was noted since the last look, as text of six.
fn order() -> [u8; 6] {
    NEXT.store(0, SeqCst);
    std::array::from_fn(|i| ORDER[i].swap(0, SeqCst) as u8)
}

#[test]
fn both_kinds_of_fork_take_everything_in_one_order() {
    isolated("both_kinds_of_fork_take_everything_in_one_order", 30, || {
        early([|| note(b'E'), || note(b'e'), || note(b'1')]);
        late([|| note(b'L'), || note(b'l'), || note(b'3')]);
        let _hook = register(
            Hook::new("h").prepare(|| note(b'H')).parent(|| note(b'h')).child(|| note(b'2')).undo(|| note(b'u')),
        );
        for kind in BOTH {
            let pid = kind.fork(|| i32::from(&order() != b"LHE123"));
            assert_eq!(order(), *b"LHEehl", "{kind:?}");
            ends_well(pid);
        }
    });
}

#[test]
fn a_child_that_is_thrown_away_does_nothing() {
    isolated("a_child_that_is_thrown_away_does_nothing", 30, || {
        // SAFETY: a new shared mapping at the kernel's choice.
        let page = unsafe {
            let (rw, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), 4096, rw, kind, -1, 0)
        };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: zeroed, aligned, never unmapped.
        let ran: &'static AtomicU32 = unsafe { &*page.cast::<AtomicU32>() };
        static RAN: AtomicUsize = AtomicUsize::new(0);
        RAN.store(ran.as_ptr() as usize, SeqCst);
        fn in_child() {
            let ran = std::ptr::with_exposed_provenance::<AtomicU32>(RAN.load(SeqCst));
            // SAFETY: the word is mapped for good.
            unsafe { &*ran }.fetch_add(1, SeqCst);
        }
        late([nothing, nothing, in_child]);
        let _hook = register(Hook::new("child").child(in_child));
        let veto = register(Hook::new("veto").try_prepare(|| Err("no".into())));
        for _ in 0..20 {
            assert!(matches!(coordinated(|| 1), Err(ForkError::Vetoed { .. })));
            assert!(no_child_left());
        }
        assert_eq!((ran.load(SeqCst), stats().thrown_away), (0, 20));
        drop(veto);
        ends_well(coordinated(|| 0).expect("a fork"));
        assert_eq!(ran.load(SeqCst), 2);
    });
}

#[test]
fn a_failed_fork_undoes() {
    isolated("a_failed_fork_undoes", 30, || {
        refuse_forks(libc::ENOMEM).expect("a filter");
        both_with_locks();
        let _hook = register(
            Hook::new("h").prepare(|| note(b'H')).parent(|| note(b'h')).child(|| note(b'2')).undo(|| note(b'u')),
        );
        let Err(ForkError::Os(error)) = coordinated(|| 1) else { panic!("it cannot succeed") };
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        assert_eq!(order()[..3], *b"Hu\0");
        assert_eq!((foreign(|| 1), raw::errno()), (-1, libc::ENOMEM));
        assert_eq!(order()[..3], *b"Hu\0");
        assert!(EARLY_LOCK.is_free() && LATE_LOCK.is_free() && try_no_forking().is_some());
    });
}

/// Handlers of C libraries do not care for errno.
#[test]
fn handlers_may_leave_any_errno() {
    fn spoil() {
        // SAFETY: takes nothing.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: the location is this thread's own.
        unsafe { *errno = libc::EBADF };
    }
    isolated("handlers_may_leave_any_errno", 30, || {
        early([spoil, spoil, spoil]);
        late([spoil, spoil, spoil]);
        let _hook = register(Hook::new("h").parent(|| note(b'h')).undo(|| note(b'u')));
        for kind in BOTH {
            let pid = kind.fork(|| 0);
            assert_eq!(order()[..2], *b"h\0", "{kind:?}: a fork that was made is not undone");
            ends_well(pid);
        }
    });
}

/// They are told by it, as carefork's are, whether there is a child.
#[test]
fn later_handlers_find_errno_as_libc_leaves_it() {
    static SEEN: AtomicI32 = AtomicI32::new(0);
    fn errno() -> *mut i32 {
        // SAFETY: takes nothing.
        unsafe { libc::__errno_location() }
    }
    fn clear() {
        // SAFETY: the location is this thread's own.
        unsafe { *errno() = 0 };
    }
    fn look() {
        // SAFETY: as above.
        SEEN.store(unsafe { *errno() }, SeqCst);
    }
    isolated("later_handlers_find_errno_as_libc_leaves_it", 30, || {
        late([clear, look, nothing]);
        for kind in BOTH {
            SEEN.store(-1, SeqCst);
            ends_well(kind.fork(|| 0));
            assert_eq!(SEEN.load(SeqCst), 0, "{kind:?}");
        }
        // No child: by this.
        common::refuse_forks(libc::EAGAIN).expect("a filter");
        // SAFETY: there is no child.
        assert_eq!(unsafe { libc::fork() }, -1);
        assert_eq!(SEEN.load(SeqCst), libc::EAGAIN);
    });
}

// -- carefork used by handlers and hooks

#[test]
fn handlers_may_use_regions() {
    fn regions() {
        let outer = no_forking();
        drop(no_forking());
        drop(outer);
        if try_no_forking().is_none() {
            raw::Line::new().text("no region for the forker itself").send();
            raw::exit_now(9);
        }
    }
    fn in_child() {
        regions();
        check(1, fork_generation() == 1 && !lineage().bypass && !lineage().dirty);
    }
    isolated("handlers_may_use_regions", 30, || {
        early([regions, regions, in_child]);
        late([regions, regions, in_child]);
        let _hook = register(Hook::new("h").prepare(regions).parent(regions).child(regions));
        freeze();
        for kind in BOTH {
            ends_well(kind.fork(|| {
                in_child();
                check(2, stats().foreign == 0);
                0
            }));
        }
        assert_eq!(stats().dirty + stats().thrown_away + stats().in_region, 0);
    });
}

#[test]
#[allow(clippy::mem_forget)]
fn a_region_held_by_a_handler_spans_the_fork() {
    fn enter() {
        std::mem::forget(no_forking());
    }
    fn leave() {
        // SAFETY: the one guard of this thread was forgotten in `enter`.
        unsafe { carefork::force_unlock() };
    }
    isolated("a_region_held_by_a_handler_spans_the_fork", 30, || {
        late([enter, leave, leave]);
        freeze();
        for kind in BOTH {
            (0..10).for_each(|_| ends_well(kind.fork(|| i32::from(lineage().dirty))));
        }
        assert_eq!((stats().dirty, stats().in_region), (0, 10));
        assert!(try_no_forking().is_some());
    });
}

#[test]
fn a_hook_that_forks_is_no_deadlock() {
    static DO: AtomicBool = AtomicBool::new(false);
    static IN_HOOK: AtomicU32 = AtomicU32::new(0);
    fn forks() {
        if DO.swap(false, SeqCst) {
            let refused = matches!(coordinated(|| 1), Err(ForkError::InFork));
            let pid = foreign(|| 0);
            let went = pid > 0 && reap(pid, SOON) == Verdict::Exited(0);
            IN_HOOK.fetch_add(u32::from(refused) + 10 * u32::from(went), SeqCst);
        }
    }
    isolated("a_hook_that_forks_is_no_deadlock", 30, || {
        freeze();
        for kind in BOTH {
            for phase in 0..2 {
                let hook = Hook::new("forks");
                let hook = if phase == 0 { hook.prepare(forks) } else { hook.parent(forks) };
                let registration = register(hook);
                DO.store(true, SeqCst);
                ends_well(kind.fork(|| i32::from(lineage().dirty)));
                assert_eq!(IN_HOOK.swap(0, SeqCst), 11, "{kind:?}, phase {phase}");
                drop(registration);
            }
        }
        assert_eq!(stats().dirty, 0);
    });
}

/// Dropping a registration inside its own hook's prepare only marks it (H1).
#[test]
fn a_hook_may_unregister_itself() {
    static MINE: std::sync::Mutex<Option<carefork::Registration>> = std::sync::Mutex::new(None);
    isolated("a_hook_may_unregister_itself", 30, || {
        for kind in BOTH {
            let hook = Hook::new("once").prepare(|| {
                note(b'p');
                drop(MINE.lock().expect("not poisoned").take());
            });
            *MINE.lock().expect("not poisoned") = Some(register(hook));
            ends_well(kind.fork(|| 0));
            ends_well(kind.fork(|| 0));
            assert_eq!(order()[..2], *b"p\0", "{kind:?}");
        }
    });
}

// -- locks

/// The fork that came first sits in carefork's prepare with the late lock; the other, in a region, wants that lock in its
/// own handler. Only the first can give way.
#[test]
fn two_forks_meet_in_a_handlers_lock() {
    isolated("two_forks_meet_in_a_handlers_lock", 60, || {
        both_with_locks();
        set_foreign_budget(Some(1000 * MS));
        for kind in BOTH {
            let (begun, go) = (AtomicBool::new(false), AtomicBool::new(false));
            let before = stats();
            freeze();
            thread::scope(|s| {
                let _end = Stop(&go);
                s.spawn(|| {
                    let region = no_forking();
                    begun.store(true, SeqCst);
                    until(|| go.load(SeqCst));
                    let pid = foreign(|| i32::from(lineage().dirty));
                    drop(region);
                    ends_well(pid);
                });
                until(|| begun.load(SeqCst));
                s.spawn(move || {
                    ends_well(kind.fork(|| i32::from(lineage().dirty != (kind == Kind::Foreign))));
                });
                until_shut();
                go.store(true, SeqCst);
                // Slowly: half a second passes before the first lets go, and half a second is left for the other and for it.
                let _clock = run_clock(MS / 10);
                until(|| stats().forks + stats().foreign >= before.forks + before.foreign + 2);
            });
            assert!(EARLY_LOCK.is_free() && LATE_LOCK.is_free());
        }
        assert_eq!(stats().dirty, 1);
    });
}

/// A region that waits for the lock which a fork without a budget holds, by its handler: plain fork would go on.
#[test]
fn a_fork_without_a_budget_lets_go_of_handlers_locks() {
    isolated("a_fork_without_a_budget_lets_go_of_handlers_locks", 30, || {
        static INSIDE: AtomicBool = AtomicBool::new(false);
        static GO: AtomicBool = AtomicBool::new(false);
        both_with_locks();
        freeze();
        thread::scope(|s| {
            s.spawn(|| {
                let _region = no_forking();
                INSIDE.store(true, SeqCst);
                until(|| GO.load(SeqCst));
                in_region_late();
            });
            until(|| INSIDE.load(SeqCst));
            s.spawn(|| ends_well(fork_with(&ForkOptions::new().timeout_never(), || 0).expect("no budget")));
            until_shut();
            GO.store(true, SeqCst);
            let _clock = run_clock(5 * MS);
            until(|| stats().forks == 1);
        });
    });
}

#[derive(Default)]
struct Ends {
    ok: u32,
    busy: u32,
    dirty: u32,
}

/// Threads that take the two locks inside regions and round them; two of them fork, in both ways.
fn storm(nestings: &[fn()], forks: u32, step: Duration, budget: Duration) -> Ends {
    let (stop, mut ends) = (AtomicBool::new(false), Ends::default());
    let mut rng = Rng::new();
    let _clock = run_clock(step);
    thread::scope(|s| {
        let _end = Stop(&stop);
        for _ in 0..3 {
            let (mut rng, stop) = (rng.split(), &stop);
            s.spawn(move || {
                while !stop.load(SeqCst) {
                    rng.pick(nestings)();
                    (0..rng.below(2000)).for_each(|_| std::hint::spin_loop());
                }
            });
        }
        let forkers = BOTH.map(|kind| {
            s.spawn(move || {
                let options = ForkOptions::new().timeout(budget);
                let (mut ok, mut busy) = (0, 0);
                for _ in 0..forks {
                    let child = || {
                        check(1, EARLY_LOCK.is_free() && LATE_LOCK.is_free());
                        check(2, try_no_forking().is_some());
                        0
                    };
                    let pid = match kind {
                        Kind::Foreign => foreign(child),
                        Kind::Coordinated => fork_with(&options, child).unwrap_or(-1),
                    };
                    if pid > 0 {
                        ok += 1;
                        ends_well(pid);
                    } else {
                        busy += 1;
                    }
                }
                (ok, busy)
            })
        });
        for forker in forkers {
            let (ok, busy) = forker.join().expect("no child failed");
            ends.ok += ok;
            ends.busy += busy;
        }
    });
    ends.dirty = u32::try_from(stats().dirty).unwrap_or(u32::MAX);
    println!(
        "{} forks made, {} refused, {} dirty, {} thrown away, {} reopened",
        ends.ok,
        ends.busy,
        ends.dirty,
        stats().thrown_away,
        stats().reopened
    );
    assert!(EARLY_LOCK.is_free() && LATE_LOCK.is_free() && try_no_forking().is_some());
    assert!(no_child_left());
    ends
}

fn in_region_early() {
    let _region = no_forking();
    EARLY_LOCK.lock();
    EARLY_LOCK.unlock();
}

fn in_region_late() {
    let _region = no_forking();
    LATE_LOCK.lock();
    LATE_LOCK.unlock();
}

fn round_region_early() {
    EARLY_LOCK.lock();
    drop(no_forking());
    EARLY_LOCK.unlock();
}

fn round_region_late() {
    LATE_LOCK.lock();
    drop(no_forking());
    LATE_LOCK.unlock();
}

/// The ways of nesting in which nobody ever waits for time to pass.
#[test]
fn two_kinds_of_fork_with_handlers_locks_inside_and_outside() {
    isolated("two_kinds_of_fork_with_handlers_locks_inside_and_outside", 60, || {
        both_with_locks();
        let ends = storm(&[in_region_early, round_region_late], 300, Duration::ZERO, 1000 * MS);
        assert_eq!((ends.ok, ends.busy, ends.dirty), (600, 0, 0));
    });
}

/// The other ways: a fork that holds the late lock waits for a region that waits for that lock. No deadlock, but time.
#[test]
fn two_kinds_of_fork_with_handlers_locks_the_wrong_way_round() {
    isolated("two_kinds_of_fork_with_handlers_locks_the_wrong_way_round", 60, || {
        both_with_locks();
        let ways: [fn(); 4] = [in_region_early, in_region_late, round_region_early, round_region_late];
        set_foreign_budget(Some(20 * MS));
        let ends = storm(&ways, 260, MS, 200 * MS);
        assert!(ends.ok > 260, "{} of 520 forks", ends.ok);
    });
}

/// Two threads fork in turns, each now and then inside a region of its own, or with the late lock held by a third.
#[test]
fn forks_inside_regions_with_handlers_locks() {
    isolated("forks_inside_regions_with_handlers_locks", 60, || {
        both_with_locks();
        set_foreign_budget(Some(50 * MS));
        let _clock = run_clock(MS);
        let stop = AtomicBool::new(false);
        let (refused, made) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|s| {
            let _end = Stop(&stop);
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    in_region_early();
                    round_region_late();
                }
            });
            let forkers: Vec<_> = (0..2)
                .map(|n| {
                    let (refused, made) = (&refused, &made);
                    s.spawn(move || {
                        for i in 0..150 {
                            let child = || i32::from(!LATE_LOCK.is_free() || !EARLY_LOCK.is_free());
                            let pid = if (i + n) % 2 == 0 {
                                let _region = no_forking();
                                foreign(child)
                            } else {
                                fork_with(&ForkOptions::new(), child).unwrap_or(-1)
                            };
                            if pid > 0 {
                                made.fetch_add(1, SeqCst);
                                ends_well(pid);
                            } else {
                                refused.fetch_add(1, SeqCst);
                            }
                        }
                    })
                })
                .collect();
            forkers.into_iter().for_each(|f| f.join().expect("no child failed"));
        });
        println!("{made:?} forks made, {refused:?} refused, {} dirty", stats().dirty);
        assert_eq!(made.load(SeqCst) + refused.load(SeqCst), 300);
        assert!(made.load(SeqCst) > 150);
        assert!(no_child_left());
    });
}
