//! What other libraries' at-fork handlers do to a fork from inside it: an errno left behind, forks and registrations of their own (G2, K2).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;
mod handlers;

use carefork::{
    CareFd, ForkError, ForkOptions, ForkReplacement, Hook, Mutex, fork_generation, lineage, no_forking,
    postfork_child_noexec, register, set_foreign_budget, set_fork_replacement, stats, try_no_forking,
};
use common::{Setup, Verdict, can_change_user, check, isolated, isolated_with, raw, reap, refuse_forks, status_here};
use drive::{
    BOTH, Kind, MS, SOON, block, coordinated, foreign, fork_with, freeze, gettid, inside, no_child_left, run_clock,
    until, until_shut,
};
use handlers::{Act, LATE_LOCK, both_with_locks, early, late, nothing};
use std::fs::File;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

static MADE: AtomicU32 = AtomicU32::new(0);
static UNDONE: AtomicU32 = AtomicU32::new(0);

/// How often a hook's parent and undo ran since the last look.
fn ends() -> (u32, u32) {
    (MADE.swap(0, SeqCst), UNDONE.swap(0, SeqCst))
}

fn counting() -> Hook {
    let count = |n: &'static AtomicU32| {
        move || {
            n.fetch_add(1, SeqCst);
        }
    };
    Hook::new("counting").parent(count(&MADE)).undo(count(&UNDONE))
}

fn blocked() -> u64 {
    status_here().map_or(!0, |s| s.sig_blk)
}

static LEAVE: AtomicI32 = AtomicI32::new(0);

fn leaves_errno() {
    // SAFETY: takes nothing.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the location is this thread's own.
    unsafe { *errno = LEAVE.load(SeqCst) };
}

/// What libc says of a failed fork, what it does not, and nothing.
const LEFT: [i32; 6] = [libc::EAGAIN, libc::ENOMEM, libc::ENOSYS, libc::EPERM, libc::EBADF, 0];

#[test]
fn a_coordinated_fork_that_was_made_is_never_undone() {
    isolated("a_coordinated_fork_that_was_made_is_never_undone", 30, || {
        let _hook = register(counting());
        for at in 0..2 {
            let mut acts: [Act; 3] = [nothing; 3];
            acts[at] = leaves_errno;
            early(acts);
            late(acts);
            for errno in LEFT {
                LEAVE.store(errno, SeqCst);
                let pid = coordinated(|| i32::from(lineage().dirty)).expect("a fork");
                assert_eq!(ends(), (1, 0), "errno {errno}, handler {at}");
                assert!(try_no_forking().is_some());
                assert_eq!(reap(pid, SOON), Verdict::Exited(0));
            }
        }
    });
}

#[test]
fn a_coordinated_fork_that_failed_is_always_undone() {
    isolated("a_coordinated_fork_that_failed_is_always_undone", 30, || {
        refuse_forks(libc::ENOMEM).expect("a filter");
        let _hook = register(counting());
        early([nothing, leaves_errno, nothing]);
        let mask = blocked();
        for errno in LEFT {
            LEAVE.store(errno, SeqCst);
            let Err(ForkError::Os(error)) = coordinated(|| 1) else { panic!("it cannot succeed") };
            // glibc and musl put their own back after the handlers.
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
            assert_eq!(ends(), (0, 1), "errno {errno}");
            assert!(try_no_forking().is_some());
            assert_eq!(blocked(), mask);
        }
    });
}

/// What is in errno when handlers leave it alone is known for certain, whatever it was before.
#[test]
fn a_foreign_fork_is_told_apart_where_handlers_leave_errno_alone() {
    isolated("a_foreign_fork_is_told_apart_where_handlers_leave_errno_alone", 30, || {
        let _hook = register(counting());
        for errno in LEFT {
            LEAVE.store(errno, SeqCst);
            leaves_errno();
            let pid = foreign(|| i32::from(raw::errno() != LEAVE.load(SeqCst)));
            assert_eq!((raw::errno(), ends()), (errno, (1, 0)));
            assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        }
        // A handler that is done with a conversion of strtol's.
        LEAVE.store(0, SeqCst);
        early([nothing, leaves_errno, nothing]);
        assert_eq!(reap(foreign(|| 0), SOON), Verdict::Exited(0));
        assert_eq!(ends(), (1, 0));
        early([nothing, nothing, nothing]);
        // All that fork(2) says; of several filters the latest counts.
        for errno in [libc::EAGAIN, libc::ENOMEM, libc::ENOSYS, libc::EPERM] {
            refuse_forks(errno).expect("a filter");
            assert_eq!((foreign(|| 1), raw::errno(), ends()), (-1, errno, (0, 1)));
        }
    });
}

#[test]
fn a_replacement_may_try_again() {
    fn set_processes(limit: libc::rlim_t) {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: 100 };
        // SAFETY: the limit is whole.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &raw const limit) }, 0);
    }
    unsafe fn stubborn() -> i32 {
        set_processes(1);
        // SAFETY: as the caller says.
        let first = unsafe { libc::fork() };
        check(1, first == -1 && raw::errno() == libc::EAGAIN);
        set_processes(100);
        // SAFETY: as the caller says.
        unsafe { libc::fork() }
    }
    if !can_change_user() {
        eprintln!("skipped: needs root, whom the limit does not hold");
        return;
    }
    let setup = Setup { uid: Some(61_724), ..Setup::default() };
    isolated_with("a_replacement_may_try_again", 30, setup, || {
        freeze();
        let _hook = register(counting());
        // SAFETY: it is libc's fork, twice if need be.
        unsafe { set_fork_replacement(Some(ForkReplacement::Calls(stubborn))) };
        let pid = coordinated(|| i32::from(lineage().dirty)).expect("the second try");
        assert_eq!(ends(), (1, 1));
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        assert_eq!((stats().forks, stats().thrown_away, stats().dirty), (1, 0, 0));
        assert!(no_child_left() && try_no_forking().is_some());
    });
}

// -- a fork inside a fork

static INNER: AtomicI32 = AtomicI32::new(0);

/// Forks, once each time it is armed, a child that looks at what it was given.
fn forks_inside() {
    if INNER.compare_exchange(1, 2, SeqCst, SeqCst).is_ok() {
        let pid = foreign(|| {
            check(1, blocked() == 0);
            check(2, try_no_forking().is_some());
            7
        });
        check(3, pid > 0 && reap(pid, SOON) == Verdict::Exited(7));
        INNER.store(3, SeqCst);
    }
}

#[test]
fn a_fork_inside_another_librarys_handler_is_foreign() {
    isolated("a_fork_inside_another_librarys_handler_is_foreign", 30, || {
        freeze();
        late([forks_inside, nothing, nothing]);
        let _hook = register(counting());
        INNER.store(1, SeqCst);
        let pid = coordinated(|| i32::from(lineage().dirty)).expect("a fork");
        assert_eq!((reap(pid, SOON), INNER.load(SeqCst)), (Verdict::Exited(0), 3));
        assert_eq!(ends(), (2, 0));
        assert_eq!((stats().forks, stats().foreign, stats().dirty), (1, 1, 0));

        // The outer one is refused; the one inside, which is nobody's to refuse, goes ahead.
        let veto = register(Hook::new("veto").try_prepare(|| Err("no".into())));
        INNER.store(1, SeqCst);
        assert!(matches!(coordinated(|| 1), Err(ForkError::Vetoed { .. })));
        assert_eq!(INNER.load(SeqCst), 3);
        assert_eq!((stats().forks, stats().foreign, stats().dirty, stats().thrown_away), (1, 2, 1, 1));
        drop(veto);
        assert!(no_child_left() && try_no_forking().is_some());
        assert_eq!(blocked(), 0);
    });
}

/// What another fork on this thread collects must not take the place of why this one was refused.
#[test]
fn why_a_fork_was_refused_outlives_a_fork_inside_it() {
    isolated("why_a_fork_was_refused_outlives_a_fork_inside_it", 30, || {
        freeze();
        late([nothing, forks_inside, nothing]);
        let _veto = register(Hook::new("veto").try_prepare(|| Err("no".into())));
        for armed in [0, 1] {
            INNER.store(armed, SeqCst);
            let Err(ForkError::Vetoed { hook, reason }) = coordinated(|| 1) else { panic!("vetoed") };
            assert_eq!((hook, &*reason, INNER.load(SeqCst)), ("veto", "no", armed * 3));
        }
        assert!(no_child_left() && try_no_forking().is_some());
    });
}

/// As above, by the handler of a signal that came during the fork and is delivered with its end.
#[test]
fn why_a_fork_was_refused_outlives_a_signal_handlers_fork() {
    fn raises() {
        if INNER.compare_exchange(1, 2, SeqCst, SeqCst).is_ok() {
            // SAFETY: blocked, as every signal is here.
            unsafe { libc::raise(libc::SIGUSR1) };
        }
    }
    extern "C" fn on_signal(_: i32) {
        check(4, reap(foreign(|| 0), SOON) == Verdict::Exited(0));
        INNER.store(3, SeqCst);
    }
    isolated("why_a_fork_was_refused_outlives_a_signal_handlers_fork", 30, || {
        freeze();
        let handler = on_signal as extern "C" fn(i32);
        // SAFETY: the handler does what may be done in one, and fork.
        unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        let _veto = register(Hook::new("veto").try_prepare(|| Err("no".into())));
        early([raises, nothing, nothing]);
        INNER.store(1, SeqCst);
        let Err(ForkError::Vetoed { hook, reason }) = coordinated(|| 1) else { panic!("vetoed") };
        assert_eq!((hook, &*reason, INNER.load(SeqCst)), ("veto", "no", 3));
        assert!(no_child_left() && try_no_forking().is_some());
    });
}

/// A coordinated fork inside the handler of a foreign one is itself, and so is a foreign one inside the handler of that.
#[test]
fn three_forks_inside_each_other() {
    static MIDDLE: AtomicBool = AtomicBool::new(false);
    fn middle() {
        if MIDDLE.swap(false, SeqCst) {
            INNER.store(1, SeqCst);
            let pid = coordinated(|| i32::from(lineage().dirty)).expect("a fork");
            check(4, reap(pid, SOON) == Verdict::Exited(0));
        } else {
            forks_inside();
        }
    }
    isolated("three_forks_inside_each_other", 30, || {
        freeze();
        late([middle, nothing, nothing]);
        assert_eq!(reap(coordinated(|| 0).expect("a fork"), SOON), Verdict::Exited(0));
        MIDDLE.store(true, SeqCst);
        assert_eq!(reap(foreign(|| i32::from(lineage().dirty)), SOON), Verdict::Exited(0));
        assert_eq!(INNER.load(SeqCst), 3);
        assert_eq!((stats().forks, stats().foreign, stats().dirty), (2, 2, 0));
        assert!(no_child_left() && try_no_forking().is_some());
    });
}

/// A fork by a hook, or by a handler that prepares after carefork's, is foreign and dirty, and no bypass, whoever's handler is the first to call
/// in its child.
#[test]
fn a_hooks_fork_is_no_bypass() {
    static FORKS: AtomicBool = AtomicBool::new(false);
    fn forks() {
        if FORKS.swap(false, SeqCst) {
            let pid = foreign(|| {
                let seen = lineage();
                check(1, (seen.generation, seen.dirty, seen.bypass) == (1, true, false));
                check(2, try_no_forking().is_some());
                0
            });
            check(3, reap(pid, SOON) == Verdict::Exited(0));
        }
    }
    fn calls() {
        drop(try_no_forking());
    }
    isolated("a_hooks_fork_is_no_bypass", 30, || {
        freeze();
        let hooks = [Hook::new("idle"), Hook::new("forks").prepare(forks)];
        for (hook, prepare) in hooks.into_iter().zip([forks, nothing]) {
            let _hook = register(hook);
            for child in [nothing, calls] {
                early([prepare, nothing, child]);
                for kind in BOTH {
                    FORKS.store(true, SeqCst);
                    let pid = kind.fork(|| i32::from(lineage().dirty || lineage().bypass || lineage().generation != 1));
                    assert_eq!((reap(pid, SOON), FORKS.load(SeqCst)), (Verdict::Exited(0), false), "{kind:?}");
                }
            }
        }
    });
}

// -- a signal inside a fork

/// No handler runs in a child before it is one: a dirty fork's has its signals as they were, and each first write to a page is an
/// occasion.
#[test]
fn a_signal_in_a_dirty_childs_first_steps() {
    static AFTER: AtomicI32 = AtomicI32::new(0);
    static OLD: AtomicU32 = AtomicU32::new(0);
    extern "C" fn on_alarm(_: i32) {
        if fork_generation() != 1 {
            OLD.fetch_add(1, SeqCst);
        }
    }
    fn alarm() {
        let once = libc::timeval { tv_sec: 0, tv_usec: AFTER.load(SeqCst).into() };
        let timer = libc::itimerval { it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 }, it_value: once };
        // SAFETY: a whole description; the old one is not asked for.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    }
    isolated("a_signal_in_a_dirty_childs_first_steps", 60, || {
        let handler = on_alarm as extern "C" fn(i32);
        // SAFETY: the handler reads a number and counts.
        unsafe { libc::signal(libc::SIGALRM, handler as libc::sighandler_t) };
        let busy = inside("busy");
        set_foreign_budget(Some(Duration::ZERO));
        early([nothing, nothing, alarm]);
        for after in (1..60).cycle().take(1200) {
            AFTER.store(after, SeqCst);
            let pid = foreign(|| {
                check(1, lineage().dirty && OLD.load(SeqCst) == 0);
                check(2, fork_generation() == 1);
                0
            });
            assert_eq!(reap(pid, SOON), Verdict::Exited(0), "after {after} us");
        }
        drop(busy);
    });
}

/// With the gate open there is nothing that a handler could disturb: other libraries' handlers find the signals as they were, and so does the
/// child.
#[test]
fn a_dirty_fork_is_made_with_its_signals_as_they_were() {
    static SEEN: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
    isolated("a_dirty_fork_is_made_with_its_signals_as_they_were", 30, || {
        freeze();
        block(&[libc::SIGUSR1]);
        let before = blocked();
        let note = || SEEN[0].store(blocked(), SeqCst);
        let note_in_child = || SEEN[1].store(blocked(), SeqCst);
        early([note, nothing, note_in_child]);
        let clean = foreign(|| 0);
        assert_eq!(reap(clean, SOON), Verdict::Exited(0));
        assert_ne!(SEEN[0].load(SeqCst), before);
        let busy = inside("busy");
        set_foreign_budget(Some(Duration::ZERO));
        let pid = foreign(|| i32::from(SEEN[1].load(SeqCst) != before || blocked() != before));
        assert_eq!(SEEN[0].load(SeqCst), before);
        assert_eq!((reap(pid, SOON), stats().dirty, blocked()), (Verdict::Exited(0), 1, before));
        drop(busy);
    });
}

// -- a registration inside a fork

/// A fork in whose way another thread is that forks itself lets go of other libraries' locks soon, not half way through its budget: the
/// other may be waiting for one of them. It must know that the other forks, also where its handler has registered a hook or forked.
#[test]
fn a_thread_that_registers_in_a_handler_is_forking_still() {
    is_forking_still("a_thread_that_registers_in_a_handler_is_forking_still", || drop(register(Hook::new("passing"))));
}

#[test]
fn a_thread_that_forks_in_a_handler_is_forking_still() {
    is_forking_still("a_thread_that_forks_in_a_handler_is_forking_still", || {
        check(1, reap(foreign(|| 0), SOON) == Verdict::Exited(0));
    });
}

fn is_forking_still(test_name: &str, act: Act) {
    static ACT: std::sync::Mutex<Act> = std::sync::Mutex::new(nothing);
    static FIRST: AtomicBool = AtomicBool::new(false);
    static THROUGH: AtomicBool = AtomicBool::new(false);
    static GO: AtomicBool = AtomicBool::new(false);
    static WAITING: Mutex<()> = Mutex::new(());
    fn prepare() {
        if FIRST.swap(false, SeqCst) {
            let act = *ACT.lock().expect("no panic");
            act();
            THROUGH.store(true, SeqCst);
            until(|| GO.load(SeqCst));
        }
        LATE_LOCK.lock();
    }
    isolated(test_name, 30, || {
        *ACT.lock().expect("no panic") = act;
        both_with_locks();
        late([prepare, || LATE_LOCK.unlock(), || LATE_LOCK.unlock()]);
        freeze();
        let hours = ForkOptions::new().timeout(3600 * 1000 * MS);
        thread::scope(|s| {
            s.spawn(|| {
                // Holding a lock while forking is legitimate, and others wait for its end.
                let _held = WAITING.lock();
                FIRST.store(true, SeqCst);
                let pid = fork_with(&hours, || 0).expect("the other gives way");
                assert_eq!(reap(pid, SOON), Verdict::Exited(0));
            });
            until(|| THROUGH.load(SeqCst));
            s.spawn(|| {
                let pid = fork_with(&hours, || 0).expect("the first is through");
                assert_eq!(reap(pid, SOON), Verdict::Exited(0));
            });
            until_shut();
            GO.store(true, SeqCst);
            let clock = run_clock(MS);
            // Half of the budget is 1 800 000 steps away.
            until(|| stats().forks == 2);
            drop(clock);
        });
        assert_ne!(stats().thrown_away, 0);
    });
}

// -- the seat of a thread that was amid a fork

static AMID: AtomicBool = AtomicBool::new(false);
static GO_ON: AtomicBool = AtomicBool::new(false);

/// The thread whose fork stands still in its handler, and how often that came here.
static STANDS_STILL: AtomicI32 = AtomicI32::new(0);
static COMES: AtomicU32 = AtomicU32::new(0);

fn forks_inside_and_stands_still() {
    if gettid() != STANDS_STILL.load(SeqCst) {
        return;
    }
    if COMES.fetch_add(1, SeqCst) == 0 {
        // Its handlers come here again.
        let pid = foreign(|| 0);
        check(5, pid > 0 && reap(pid, SOON) == Verdict::Exited(0));
    } else {
        AMID.store(true, SeqCst);
        until(|| GO_ON.load(SeqCst));
    }
}

/// A fork that carefork's handler has refused, or let go dirty, stands still in another handler, with a fork of that handler's inside it.
/// In the child of a clean fork the thread is gone, and none of what its fork left in its seat is for the next one there.
#[test]
fn who_gets_the_seat_of_a_forking_thread_forks_as_anyone() {
    const EACH: usize = 4;
    /// All of the dead threads' seats are taken, before the first of them forks.
    fn in_the_child() -> i32 {
        let (turn, seated) = (AtomicUsize::new(0), Barrier::new(EACH));
        thread::scope(|s| {
            for n in 0..EACH {
                let (turn, seated) = (&turn, &seated);
                s.spawn(move || {
                    drop(no_forking());
                    seated.wait();
                    until(|| turn.load(SeqCst) == n);
                    block(&[libc::SIGUSR1]);
                    let before = blocked();
                    for kind in BOTH {
                        let at = 10 * (kind as i32 + 1);
                        let pid = match kind {
                            Kind::Coordinated => {
                                fork_with(&ForkOptions::new().timeout_never(), grandchild).unwrap_or(-1)
                            }
                            Kind::Foreign => foreign(grandchild),
                        };
                        check(at, pid > 0);
                        check(at + 1, reap(pid, SOON) == Verdict::Exited(0));
                        check(at + 2, blocked() == before);
                        check(at + 3, try_no_forking().is_some());
                    }
                    check(3, stats().dirty == 0 && stats().forks == n as u64 + 1 && stats().foreign == n as u64 + 1);
                    turn.store(n + 1, SeqCst);
                });
            }
        });
        0
    }
    fn grandchild() -> i32 {
        check(1, !lineage().dirty);
        // SAFETY: no borrowed descriptor is used.
        check(2, unsafe { postfork_child_noexec() }.is_ok_and(|done| done.closed == 1));
        0
    }
    isolated("who_gets_the_seat_of_a_forking_thread_forks_as_anyone", 60, || {
        freeze();
        early([forks_inside_and_stands_still, nothing, nothing]);
        for kind in BOTH {
            AMID.store(false, SeqCst);
            GO_ON.store(false, SeqCst);
            COMES.store(0, SeqCst);
            let busy = inside("busy");
            let verdict = thread::scope(|s| {
                let stands_still = s.spawn(|| {
                    STANDS_STILL.store(gettid(), SeqCst);
                    let pid = match kind {
                        // The busy thread may be gone when it tries again.
                        Kind::Coordinated => coordinated(|| 0).unwrap_or(0),
                        Kind::Foreign => foreign(|| 0),
                    };
                    assert!(pid == 0 || reap(pid, SOON) == Verdict::Exited(0));
                });
                let clock = run_clock(5 * MS);
                until(|| AMID.load(SeqCst));
                drop(clock);
                busy.leave();
                // Marked, as long as that fork is dirty and under way.
                let care = CareFd::open(|| File::open("/dev/null")).expect("a care-fd");
                let pid = coordinated(in_the_child).expect("a fork beside the other");
                let verdict = reap(pid, SOON);
                drop(care);
                GO_ON.store(true, SeqCst);
                let _clock = run_clock(5 * MS);
                assert!(stands_still.join().is_ok());
                verdict
            });
            assert_eq!(verdict, Verdict::Exited(0), "{kind:?}");
        }
        assert!(try_no_forking().is_some() && no_child_left());
    });
}

/// Another fork that is dirty and under way in the parent is over in the child of a clean one: what this registers is not marked, and its own
/// dirty fork's child closes it.
#[test]
fn a_dirty_fork_of_the_parents_is_none_of_a_clean_childs() {
    fn null() -> CareFd<File> {
        CareFd::open(|| File::open("/dev/null")).expect("a care-fd")
    }
    fn in_the_child() -> i32 {
        check(1, !lineage().dirty);
        let own = null();
        let busy = inside("busy");
        let pid = foreign(|| {
            check(2, lineage().dirty);
            // SAFETY: no borrowed descriptor is used.
            check(3, unsafe { postfork_child_noexec() }.is_ok_and(|done| done.closed == 1));
            i32::from(own.is_open_here())
        });
        check(4, reap(pid, SOON) == Verdict::Exited(0));
        busy.leave();
        i32::from(stats().dirty != 1)
    }
    isolated("a_dirty_fork_of_the_parents_is_none_of_a_clean_childs", 30, || {
        freeze();
        COMES.store(1, SeqCst);
        early([forks_inside_and_stands_still, nothing, nothing]);
        set_foreign_budget(Some(Duration::ZERO));
        thread::scope(|s| {
            let busy = inside("busy");
            s.spawn(|| {
                STANDS_STILL.store(gettid(), SeqCst);
                assert_eq!(reap(foreign(|| i32::from(!lineage().dirty)), SOON), Verdict::Exited(0));
            });
            until(|| AMID.load(SeqCst));
            busy.leave();
            let pid = coordinated(in_the_child).expect("a fork beside the other");
            let verdict = reap(pid, SOON);
            GO_ON.store(true, SeqCst);
            assert_eq!(verdict, Verdict::Exited(0));
        });
    });
}

/// The child cannot know whether its descriptors were copied before or after: it may leak one, and never closes a stranger's. With the fork that
/// is over: what is registered then is like any.
#[test]
fn what_is_registered_amid_a_dirty_fork_is_left_alone_by_its_child() {
    static AMID_IT: std::sync::Mutex<Option<CareFd<File>>> = std::sync::Mutex::new(None);
    fn null() -> CareFd<File> {
        CareFd::open(|| File::open("/dev/null")).expect("a care-fd")
    }
    fn opens() {
        *AMID_IT.lock().expect("no panic") = Some(null());
    }
    /// The child of a foreign fork is dirty or not, and closes so many.
    fn child(dirty: bool, closes: usize) {
        let pid = foreign(|| {
            check(1, lineage().dirty == dirty);
            // SAFETY: no borrowed descriptor is used.
            i32::from(!unsafe { postfork_child_noexec() }.is_ok_and(|done| done.closed == closes)) * 2
        });
        assert_eq!(reap(pid, SOON), Verdict::Exited(0), "dirty {dirty}");
    }
    isolated("what_is_registered_amid_a_dirty_fork_is_left_alone_by_its_child", 30, || {
        freeze();
        set_foreign_budget(Some(Duration::ZERO));
        let before = null();
        let busy = inside("busy");
        early([opens, nothing, nothing]);
        child(true, 1);
        early([nothing, nothing, nothing]);
        busy.leave();
        child(false, 2);
        let after = null();
        let busy = inside("busy");
        child(true, 2);
        busy.leave();
        child(false, 3);
        drop((before, after));
    });
}

fn set_errno(to: i32) {
    LEAVE.store(to, SeqCst);
    leaves_errno();
}

/// Its place is another in each thread, also in the one that has the seat of one that is gone; and hooks do not care for it.
#[test]
fn each_thread_finds_its_own_errno() {
    isolated("each_thread_finds_its_own_errno", 30, || {
        freeze();
        let spoil = || set_errno(libc::ENOTTY);
        let _hook = register(Hook::new("spoils").prepare(spoil).parent(spoil).child(spoil));
        let fork = || {
            for kind in BOTH {
                set_errno(libc::EXDEV);
                let pid = kind.fork(|| i32::from(raw::errno() != libc::EXDEV));
                let errno = raw::errno();
                assert_eq!((errno, reap(pid, SOON)), (libc::EXDEV, Verdict::Exited(0)), "{kind:?}");
            }
        };
        let gone = AtomicBool::new(false);
        thread::scope(|s| {
            // Has no seat while the first has one, and another place for its errno.
            s.spawn(|| {
                until(|| gone.load(SeqCst));
                fork();
            });
            assert!(s.spawn(fork).join().is_ok());
            gone.store(true, SeqCst);
        });
    });
}
