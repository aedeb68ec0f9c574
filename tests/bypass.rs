//! Children that no at-fork handler has seen: raw clone and `_Fork` (G10), and kernels that refuse what noticing and
//! fencing stand on.

#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;
mod drive;

use carefork::{
    ForkError, ForkOptions, Hook, Mutex, Registration, fork_generation, lineage, no_forking, register, stats,
    try_no_forking,
};
use common::{Refuse, Setup, Verdict, check, isolated, isolated_with, raw, reap, seccomp_refuse, status_here};
use drive::{
    BOTH, MS, SOON, Stop, block, coordinated, foreign, fork_with, freeze, inside, run_clock, until, until_shut,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bypass {
    Clone,
    LibcsOwn,
}

const WAYS: [Bypass; 2] = [Bypass::Clone, Bypass::LibcsOwn];

impl Bypass {
    /// None where libc has no `_Fork`.
    fn fork(self, f: impl FnOnce() -> i32) -> Option<i32> {
        let pid = match self {
            Bypass::Clone => {
                let (flags, none) = (libc::SIGCHLD, std::ptr::null::<u8>());
                // SAFETY: the arguments of a fork; the child keeps to what a child may do, but for libc's caches.
                unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) as i32 }
            }
            Bypass::LibcsOwn => {
                // SAFETY: a C string.
                let f = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"_Fork".as_ptr()) };
                if f.is_null() {
                    eprintln!("skipped: no _Fork in this libc");
                    return None;
                }
                // SAFETY: POSIX gives `_Fork` this type.
                let f: extern "C" fn() -> i32 = unsafe { std::mem::transmute(f) };
                f()
            }
        };
        if pid == 0 {
            // Time stands still here, so that nobody's budget ends on a busy machine.
            freeze();
            raw::exit_now(f());
        }
        assert!(pid > 0);
        Some(pid)
    }
}

/// What a child can do that nobody told.
fn works(generation: u64) -> i32 {
    check(1, fork_generation() == generation);
    let seen = lineage();
    check(2, seen.bypass && seen.generation == generation);
    check(3, try_no_forking().is_some());
    drop(no_forking());
    thread::scope(|s| {
        let threads: Vec<_> = (0..3).map(|_| s.spawn(|| (0..100).for_each(|_| drop(no_forking())))).collect();
        for kind in BOTH {
            let pid = kind.fork(|| i32::from(fork_generation() != generation + 1 || !lineage().bypass));
            check(4, reap(pid, SOON) == Verdict::Exited(0));
        }
        threads.into_iter().for_each(|t| check(5, t.join().is_ok()));
    });
    check(6, stats().dirty == 0 && stats().forks == 1);
    0
}

#[test]
fn a_bypass_is_noticed_at_the_first_call() {
    isolated("a_bypass_is_noticed_at_the_first_call", 60, || {
        let generation = fork_generation();
        for way in WAYS {
            // Each first call by itself.
            let firsts: [fn() -> bool; 5] = [
                || fork_generation() == 1,
                || lineage().bypass,
                || try_no_forking().is_some(),
                || {
                    drop(no_forking());
                    lineage().bypass
                },
                || {
                    let pid = coordinated(|| i32::from(fork_generation() != 2)).unwrap_or(0);
                    reap(pid, SOON) == Verdict::Exited(0)
                },
            ];
            for first in firsts {
                way.fork(|| i32::from(!first())).into_iter().for_each(ends_well);
            }
        }
        assert_eq!(fork_generation(), generation);
        assert!(!lineage().bypass);
    });
}

#[test]
fn while_others_are_in_regions_and_the_gate_is_shut() {
    isolated("while_others_are_in_regions_and_the_gate_is_shut", 60, || {
        freeze();
        let busy: Vec<_> = (0..4).map(|_| inside("busy")).collect();
        for way in WAYS {
            way.fork(|| works(1)).into_iter().for_each(ends_well);
        }
        thread::scope(|s| {
            s.spawn(|| ends_well(coordinated(|| 0).expect("they leave")));
            until_shut();
            // Waiting at the gate.
            s.spawn(|| drop(no_forking()));
            for way in WAYS {
                way.fork(|| works_alone(1)).into_iter().for_each(ends_well);
            }
            drop(busy);
        });
    });
}

#[test]
fn inside_ones_own_region() {
    isolated("inside_ones_own_region", 60, || {
        for way in WAYS {
            let region = no_forking();
            let pid = way.fork(|| {
                check(1, coordinated(|| 1).is_err());
                // SAFETY: the guard is in the parent's frame, which this child never goes back to.
                unsafe { carefork::force_unlock() };
                works(1)
            });
            pid.into_iter().for_each(ends_well);
            drop(region);
        }
    });
}

/// The thread that made the child takes no part in what another finds out there first: what it had it has still, and forks wait for it.
#[test]
fn where_a_new_thread_is_the_first_to_call() {
    fn another() {
        check(1, thread::spawn(|| drop(no_forking())).join().is_ok());
    }
    fn is_waited_for() {
        let at_once = ForkOptions::new().timeout(Duration::ZERO);
        let _region = no_forking();
        let forked = thread::spawn(move || fork_with(&at_once, || 0).is_ok()).join();
        check(2, matches!(forked, Ok(false)));
    }
    isolated("where_a_new_thread_is_the_first_to_call", 60, || {
        drop(no_forking());
        for way in WAYS {
            let pid = way.fork(|| {
                another();
                is_waited_for();
                works(1)
            });
            pid.into_iter().for_each(ends_well);
            let region = no_forking();
            let pid = way.fork(|| {
                another();
                check(3, matches!(coordinated(|| 1), Err(ForkError::Forbidden { .. })));
                // SAFETY: as in `inside_ones_own_region`.
                unsafe { carefork::force_unlock() };
                is_waited_for();
                works(1)
            });
            pid.into_iter().for_each(ends_well);
            drop(region);
        }
    });
}

#[test]
fn under_a_storm_of_regions_and_forks() {
    isolated("under_a_storm_of_regions_and_forks", 60, || {
        // No budget ends here, however busy the machine.
        freeze();
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _end = Stop(&stop);
            for _ in 0..2 {
                s.spawn(|| {
                    while !stop.load(SeqCst) {
                        drop(no_forking());
                    }
                });
            }
            for kind in BOTH {
                let stop = &stop;
                s.spawn(move || {
                    while !stop.load(SeqCst) {
                        ends_well(kind.fork(|| i32::from(lineage().bypass)));
                    }
                });
            }
            for i in 0..200 {
                WAYS[i % 2].fork(|| works_alone(1)).into_iter().for_each(ends_well);
            }
        });
    });
}

/// As `works`, without libc's fork and without threads: another thread may be in the middle of either, with libc's or std's own
/// lock, and no library can help that.
fn works_alone(generation: u64) -> i32 {
    check(1, fork_generation() == generation && lineage().bypass);
    check(2, try_no_forking().is_some());
    drop(no_forking());
    let pid = Bypass::Clone.fork(|| {
        drop(no_forking());
        i32::from(fork_generation() != generation + 1)
    });
    check(3, pid.is_some_and(|pid| reap(pid, SOON) == Verdict::Exited(0)));
    0
}

#[test]
fn generations_of_bypasses() {
    isolated("generations_of_bypasses", 60, || {
        fn down(generation: u64) -> i32 {
            check(1, fork_generation() == generation);
            if generation == 6 {
                return 0;
            }
            let pid = match generation % 3 {
                0 => Some(foreign(|| down(generation + 1))),
                1 => Bypass::Clone.fork(|| down(generation + 1)),
                _ => coordinated(|| down(generation + 1)).ok(),
            };
            i32::from(reap(pid.unwrap_or(-1), SOON) != Verdict::Exited(0))
        }
        assert_eq!(down(0), 0);
    });
}

/// A thread of a bypass child that knows nothing yet and one that does, at once.
#[test]
fn two_threads_make_the_first_call() {
    isolated("two_threads_make_the_first_call", 60, || {
        for _ in 0..50 {
            let pid = Bypass::Clone.fork(|| {
                thread::scope(|s| {
                    let threads: Vec<_> = (0..3).map(|_| s.spawn(fork_generation)).collect();
                    let here = fork_generation();
                    threads.into_iter().for_each(|t| check(1, t.join().is_ok_and(|g| g == 1)));
                    check(2, here == 1);
                });
                works(1)
            });
            pid.into_iter().for_each(ends_well);
        }
    });
}

/// As in any child: what its parent opened before its own clean-up is the parent's.
#[test]
fn what_an_unclean_child_opened_is_closed_in_a_bypass_of_its_own() {
    isolated("what_an_unclean_child_opened_is_closed_in_a_bypass_of_its_own", 60, || {
        for (way, kind) in WAYS.into_iter().flat_map(|way| BOTH.map(|kind| (way, kind))) {
            let pid = kind.fork(|| {
                let own = carefork::CareFd::open(|| std::fs::File::open("/dev/null")).expect("opened");
                let pid = way.fork(|| {
                    // SAFETY: nothing that is closed is used.
                    check(1, unsafe { carefork::postfork_child_noexec() }.is_ok_and(|done| done.closed == 1));
                    i32::from(own.is_open_here())
                });
                check(2, pid.is_none_or(|pid| reap(pid, SOON) == Verdict::Exited(0)));
                i32::from(!own.is_open_here())
            });
            ends_well(pid);
        }
    });
}

/// What every child closes at its fork nobody closed here: the clean-up does.
#[test]
fn what_is_closed_at_the_fork_is_closed_by_a_bypass_that_cleans_up() {
    isolated("what_is_closed_at_the_fork_is_closed_by_a_bypass_that_cleans_up", 60, || {
        let null = || std::fs::File::open("/dev/null");
        let own = carefork::CareFd::open_on(carefork::OnFork::Close, null).expect("opened");
        let number = std::os::fd::AsRawFd::as_raw_fd(&own);
        // SAFETY: integers only.
        let is_open = || unsafe { libc::fcntl(number, libc::F_GETFD) } != -1;
        for pid in WAYS.into_iter().filter_map(|way| {
            way.fork(|| {
                // SAFETY: nothing that is closed is used.
                let done = unsafe { carefork::postfork_child_noexec() };
                check(1, done.is_ok_and(|done| done.closed == 1));
                i32::from(is_open())
            })
        }) {
            ends_well(pid);
        }
        assert!(is_open());
    });
}

/// The first process of a PID namespace, and the first one of a namespace inside that.
#[test]
fn a_bypass_with_the_same_pid_is_noticed() {
    isolated("a_bypass_with_the_same_pid_is_noticed", 60, || {
        ends_well(foreign(|| {
            // SAFETY: integers only.
            if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0
                // SAFETY: as above.
                && unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWPID) } != 0
            {
                eprintln!("skipped: no PID namespaces here");
                return 0;
            }
            let pid = foreign(|| {
                check(1, std::process::id() == 1 && fork_generation() == 2);
                let (flags, none) = (libc::SIGCHLD | libc::CLONE_NEWPID, std::ptr::null::<u8>());
                // SAFETY: as in `Bypass::fork`.
                let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) as i32 };
                if pid == 0 {
                    check(2, std::process::id() == 1);
                    raw::exit_now(i32::from(fork_generation() != 3 || !lineage().bypass));
                }
                check(3, pid > 0);
                i32::from(reap(pid, SOON) != Verdict::Exited(0))
            });
            i32::from(reap(pid, SOON) != Verdict::Exited(0))
        }));
    });
}

/// A signal comes in the middle of the first call, and its handler makes the second one (G12).
#[test]
fn a_handler_interrupts_the_first_call() {
    extern "C" fn asks(_: i32) {
        drop(try_no_forking());
    }
    fn alarm(us: i64) {
        let never = libc::timeval { tv_sec: 0, tv_usec: 0 };
        let timer = libc::itimerval { it_interval: never, it_value: libc::timeval { tv_usec: us, ..never } };
        // SAFETY: the new value is whole, the old one not asked for.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    }
    isolated("a_handler_interrupts_the_first_call", 120, || {
        drop(no_forking());
        drive::on_signal(libc::SIGALRM, asks);
        for i in 0..1500 {
            let pid = Bypass::Clone.fork(|| {
                alarm(1 + i % 30);
                let generation = fork_generation();
                alarm(0);
                i32::from(generation != 1)
            });
            pid.into_iter().for_each(ends_well);
        }
    });
}

static TALLY: AtomicU64 = AtomicU64::new(0);

#[test]
fn hooks_do_not_run_in_a_bypass_and_do_in_its_children() {
    isolated("hooks_do_not_run_in_a_bypass_and_do_in_its_children", 60, || {
        fn count(by: u64) -> impl Fn() {
            move || {
                TALLY.fetch_add(by, SeqCst);
            }
        }
        let _hook: Registration = register(Hook::new("h").prepare(count(1)).parent(count(10)).child(count(100)));
        let pid = Bypass::Clone.fork(|| {
            check(1, fork_generation() == 1 && TALLY.load(SeqCst) == 0);
            let pid = coordinated(|| i32::from(TALLY.load(SeqCst) != 101));
            check(2, TALLY.load(SeqCst) == 11);
            check(3, pid.is_ok_and(|pid| reap(pid, SOON) == Verdict::Exited(0)));
            0
        });
        pid.into_iter().for_each(ends_well);
    });
}

/// A fork of another thread has a hooked lock and std's streams in its hands, and is not here to let go of them. Whoever calls first, that is done,
/// and the signals are as they were.
#[test]
fn what_another_threads_fork_has_is_free() {
    static LET_GO: AtomicBool = AtomicBool::new(false);
    fn prints() {
        drop(std::io::stdout().lock());
        drop(std::io::stderr().lock());
    }
    isolated("what_another_threads_fork_has_is_free", 60, || {
        static REACHED: AtomicBool = AtomicBool::new(false);
        // Behind the streams, of whose rank it is: the newest prepares first.
        let _slow = register(Hook::new("slow").rank(i32::MAX).prepare(|| {
            REACHED.store(true, SeqCst);
            until(|| LET_GO.load(SeqCst));
        }));
        let _streams = carefork::stdio::guard();
        let mutex = std::sync::Arc::new(std::sync::Mutex::new(()));
        let _mutex = register(Hook::std_mutex("mutex", std::sync::Arc::clone(&mutex)));
        freeze();
        block(&[libc::SIGUSR1]);
        let blocked = || status_here().map_or(!0, |s| s.sig_blk);
        let before = blocked();
        // Looked at in the end: a panic here would wait for standard error.
        let verdicts = thread::scope(|s| {
            let _let_go = Stop(&LET_GO);
            s.spawn(|| ends_well(fork_with(&ForkOptions::new().timeout_never(), || 0).expect("no budget")));
            until(|| REACHED.load(SeqCst));
            let held = mutex.try_lock().is_err();
            let mut verdicts = vec![if held { Verdict::Exited(0) } else { Verdict::Lost }];
            for (way, by_another) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
                let pid = way.fork(|| {
                    if by_another {
                        check(1, thread::spawn(|| drop(no_forking())).join().is_ok());
                    }
                    check(2, lineage().bypass && fork_generation() == 1 && blocked() == before);
                    check(3, mutex.try_lock().is_ok() && carefork::report().preparing.is_none());
                    prints();
                    0
                });
                verdicts.extend(pid.map(|pid| reap(pid, SOON)));
            }
            verdicts
        });
        assert!(verdicts.iter().all(|v| *v == Verdict::Exited(0)), "{verdicts:?}");
        prints();
    });
}

/// A lock of section L that a thread held which is not here: contention says so instead of hanging.
#[test]
fn a_lock_left_held_panics_on_contention() {
    isolated("a_lock_left_held_panics_on_contention", 60, || {
        static LOCK: Mutex<u32> = Mutex::new(1);
        let (held, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|s| {
            let _end = Stop(&stop);
            s.spawn(|| {
                let _guard = LOCK.lock();
                held.store(true, SeqCst);
                until(|| stop.load(SeqCst));
            });
            until(|| held.load(SeqCst));
            for way in WAYS {
                let pid = way.fork(|| {
                    check(1, lineage().bypass);
                    check(2, LOCK.try_lock().is_none());
                    let Err(panic) = std::panic::catch_unwind(|| drop(LOCK.lock())) else { return 3 };
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or_default();
                    raw::Line::new().text(text).send();
                    check(4, text.contains("fork"));
                    // Nobody is in a region because of it.
                    works(1)
                });
                pid.into_iter().for_each(ends_well);
            }
        });
        // Held by this thread, it is this child's own.
        let guard = LOCK.lock();
        let pid = Bypass::Clone.fork(move || {
            check(1, LOCK.try_lock().is_none());
            drop(guard);
            check(2, LOCK.try_lock().is_some());
            // The thread above may still be on its way out, with std's lock for that.
            works_alone(1)
        });
        pid.into_iter().for_each(ends_well);
    });
}

// -- refused

/// A few forks with threads in regions, and the check that none of them was in one.
fn the_gate_works() {
    // No budget ends here, however busy the machine.
    freeze();
    let words = [const { (AtomicU64::new(0), AtomicU64::new(0)) }; 2];
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        let _end = Stop(&stop);
        for (a, b) in &words {
            let stop = &stop;
            s.spawn(move || {
                while !stop.load(SeqCst) {
                    let _region = no_forking();
                    a.fetch_add(1, SeqCst);
                    (0..20).for_each(|_| std::hint::spin_loop());
                    b.fetch_add(1, SeqCst);
                }
            });
        }
        for i in 0..150 {
            ends_well(BOTH[i % 2].fork(|| i32::from(words.iter().any(|(a, b)| a.load(SeqCst) != b.load(SeqCst)))));
        }
        // G11 with a fence of its own in every region.
        let busy = inside("busy");
        let _clock = run_clock(5 * MS);
        assert!(coordinated(|| 1).is_err());
        busy.leave();
    });
    assert!(try_no_forking().is_some());
    assert_eq!(stats().dirty, 0);
    carefork::testing::release();
}

#[test]
fn membarrier_refused_from_the_start() {
    let setup = Setup { refuse: vec![(libc::SYS_membarrier, libc::ENOSYS).into()], ..Setup::default() };
    isolated_with("membarrier_refused_from_the_start", 60, setup, || {
        the_gate_works();
        Bypass::Clone.fork(|| works(1)).into_iter().for_each(ends_well);
    });
}

#[test]
fn membarrier_refused_later() {
    isolated("membarrier_refused_later", 60, || {
        the_gate_works();
        seccomp_refuse(&[(libc::SYS_membarrier, libc::EPERM)]).expect("a filter");
        the_gate_works();
        ends_well(
            coordinated(|| {
                the_gate_works();
                0
            })
            .expect("a fork"),
        );
    });
}

#[test]
fn without_wipeonfork_ordinary_children_are_right() {
    let wipe = libc::MADV_WIPEONFORK.cast_unsigned();
    let setup = Setup { refuse: vec![Refuse::when(libc::SYS_madvise, 2, wipe, libc::EINVAL)], ..Setup::default() };
    isolated_with("without_wipeonfork_ordinary_children_are_right", 60, setup, || {
        the_gate_works();
        for kind in BOTH {
            ends_well(kind.fork(|| {
                check(1, fork_generation() == 1 && !lineage().bypass);
                let pid = coordinated(|| i32::from(fork_generation() != 2));
                check(2, pid.is_ok_and(|pid| reap(pid, SOON) == Verdict::Exited(0)));
                0
            }));
        }
        // What is lost: a bypass is not noticed. It works where nobody was in its way, and where the gate was shut a thread
        // that waits reopens it.
        let pid = Bypass::Clone.fork(|| {
            check(1, fork_generation() == 0);
            drop(no_forking());
            0
        });
        pid.into_iter().for_each(ends_well);
        freeze();
        let busy = inside("busy");
        thread::scope(|s| {
            s.spawn(|| ends_well(coordinated(|| 0).expect("they leave")));
            until_shut();
            let pid = Bypass::Clone.fork(|| {
                // The bound passes.
                carefork::testing::release();
                drop(no_forking());
                0
            });
            pid.into_iter().for_each(ends_well);
            busy.leave();
        });
    });
}

/// An emulator that says yes to every advice, and does nothing, is found out.
#[test]
fn wipeonfork_that_lies() {
    let setup = Setup { refuse: vec![(libc::SYS_madvise, 0).into()], ..Setup::default() };
    isolated_with("wipeonfork_that_lies", 60, setup, || {
        for kind in BOTH {
            ends_well(kind.fork(|| i32::from(fork_generation() != 1)));
        }
    });
}
