//! What a fork leaves of the signal mask and errno, and where signals are handled meanwhile (G8).

use crate::common::{check, isolated, raw, refuse_forks};
use crate::drive::{
    BOTH, MS, Stop, block, coordinated, foreign, fork_with, freeze, gettid, inside, no_child_left, on_signal,
    run_clock, signal_thread, until, until_shut,
};
use crate::{ends_well, mask};
use carefork::{ForkError, ForkOptions, Hook, no_forking, register};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread;

/// Every signal but SIGKILL, SIGSTOP and libc's own two.
const ALL: u64 = !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1) | 1 << 31 | 1 << 32);

#[test]
fn the_mask_comes_back_exactly() {
    isolated("masks::the_mask_comes_back_exactly", 60, || {
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

        refuse_forks(libc::EAGAIN).expect("a filter");
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
    isolated("masks::errno_is_as_after_fork", 30, || {
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
    isolated("masks::signals_are_blocked_while_the_gate_is_shut", 30, || {
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
    isolated("masks::signals_come_through_while_a_fork_waits", 30, || {
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
    isolated("masks::no_handler_runs_in_a_child_that_is_thrown_away", 60, || {
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
    isolated("masks::a_thrown_away_child_may_be_reaped_by_others", 60, || {
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
