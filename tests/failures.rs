//! K2 and H3: a fork that fails leaves everything as it was, whatever it fails by; and what works where the kernel refuses something.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::{CareFd, Fork, ForkError, ForkOptions, Hook, Signals};
use common::{Refuse, Setup, Verdict, can_change_user, isolated, isolated_with, raw, reap, seccomp_refuse};
use kit::{
    Calls, InRegion, Ran, SOON, State, Stop, assert_gate_open, assert_no_child, block, captured, catch, code, foreign,
    forked, ignore, shared,
};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

extern "C" fn do_nothing(_: i32) {}

/// Forks with `options`, which must fail, and looks whether anything is different afterwards.
#[track_caller]
fn fails(options: &ForkOptions<'_>) -> ForkError {
    let before = (State::now(), carefork::stats().refused, carefork::fork_generation());
    // SAFETY: no child comes of it; one that does ends here.
    let error = match unsafe { options.fork() } {
        Err(e) => e,
        Ok(Fork::Child(_)) => raw::exit_now(98),
        Ok(Fork::Parent(mut child)) => panic!("a child, which ended with {:?}", child.wait()),
    };
    assert_no_child();
    assert_eq!((State::now(), carefork::stats().refused - 1, carefork::fork_generation()), before);
    assert_gate_open();
    error
}

/// A thread with something to lose: odd mask, dispositions of each kind, a care-fd.
fn dress() -> CareFd<std::fs::File> {
    catch(libc::SIGUSR1, do_nothing);
    ignore(libc::SIGUSR2);
    block(&[libc::SIGTERM, libc::SIGRTMAX()]);
    CareFd::open(|| std::fs::File::open("/dev/null")).expect("a care-fd")
}

/// Options with which a child would be very different.
fn many_options() -> ForkOptions<'static> {
    ForkOptions::new()
        .signals(Signals::Reset)
        .new_session(true)
        .name("other")
        .stdio_null(true)
        .close_others(true)
        .death_signal(libc::SIGKILL)
}

/// libc's fork fails with EAGAIN here. With undo and without, coordinated and foreign.
fn libc_fork_fails() {
    let _care = dress();
    let (with, without) = (Calls::new(), Calls::new());
    let _with = with.register("with undo");
    let hook = Hook::new("without undo").rank(1).prepare(move || without.add(0)).parent(move || without.add(2));
    let _without = carefork::register(hook.child(move || without.add(3)));
    for (i, options) in [ForkOptions::new(), many_options(), ForkOptions::new().timeout_never()].iter().enumerate() {
        let ForkError::Os(e) = fails(options) else { panic!("another error") };
        assert_eq!(e.raw_os_error(), Some(libc::EAGAIN));
        let n = i as u64 + 1;
        assert_eq!(with.ran(), Ran { prepare: n, undo: n, ..Ran::default() });
        // Without undo parent serves.
        assert_eq!(without.ran(), Ran { prepare: n, parent: n, ..Ran::default() });
    }
    assert_eq!(carefork::stats().forks, 0);
    // SAFETY: the closure is not run.
    let spawned = unsafe { carefork::spawn(|| 98) };
    assert!(matches!(spawned, Err(ForkError::Os(_))));

    let before = State::now();
    // SAFETY: it fails.
    let pid = unsafe { libc::fork() };
    let errno = raw::errno();
    assert_eq!((pid, errno), (-1, libc::EAGAIN));
    assert_eq!(State::now(), before);
    assert_eq!(with.ran(), Ran { prepare: 5, undo: 5, ..Ran::default() });
    assert_gate_open();
    assert_no_child();
}

#[test]
fn a_fork_that_the_kernel_refuses() {
    isolated("a_fork_that_the_kernel_refuses", 20, || {
        seccomp_refuse(&[(libc::SYS_clone, libc::EAGAIN)]).expect("a filter");
        libc_fork_fails();
    });
}

#[test]
fn a_fork_beyond_the_limit_on_processes() {
    if !can_change_user() {
        eprintln!("skipped: needs root, whom the limit does not hold");
        return;
    }
    let setup = Setup { uid: Some(61_723), ..Setup::default() };
    isolated_with("a_fork_beyond_the_limit_on_processes", 20, setup, || {
        // The gate is looked at from a thread, which needs its place below the limit: it gets it between two forks.
        let limit = |n: u64| {
            let limit = libc::rlimit { rlim_cur: n, rlim_max: 100 };
            // SAFETY: `limit` is live.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &raw const limit) }, 0);
        };
        let calls = Calls::new();
        let _hook = calls.register("counter");
        let _care = dress();
        for n in 1..=3 {
            limit(1);
            let before = State::now();
            // SAFETY: it fails.
            let failed = unsafe { many_options().fork() };
            let errno = raw::errno();
            assert_eq!(State::now(), before);
            assert_no_child();
            limit(100);
            let Err(ForkError::Os(e)) = failed else { panic!("{failed:?}") };
            assert_eq!((e.raw_os_error(), errno), (Some(libc::EAGAIN), libc::EAGAIN));
            assert_gate_open();
            assert_eq!(calls.ran(), Ran { prepare: n, undo: n, ..Ran::default() });
        }
        // With room again it forks.
        assert_eq!(code(&mut forked(&ForkOptions::new(), |t| t.exit(3))), 3);
        assert_eq!(calls.ran(), Ran { prepare: 4, undo: 3, parent: 1, child: 1, cleanup: 0 });
    });
}

#[test]
fn a_veto_and_a_panic_in_prepare() {
    isolated("a_veto_and_a_panic_in_prepare", 20, || {
        static ORDER: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let note = |what: &str| ORDER.lock().expect("no panic").push(what.to_owned());
        let _care = dress();
        let calls = Calls::new();
        let _counter = calls.register("counter");
        let named = |name: &'static str, rank| {
            Hook::new(name)
                .rank(rank)
                .prepare(move || note(&format!("prepare {name}")))
                .undo(move || note(&format!("undo {name}")))
                .parent(move || note(&format!("parent {name}")))
        };
        let _outer = carefork::register(named("outer", 1));
        let _inner = carefork::register(named("inner", 2));
        let _never = carefork::register(named("never reached", 4));
        let prepare: [Box<dyn Fn() -> Result<(), carefork::Veto> + Send + Sync>; 4] = [
            Box::new(|| Err("a transaction is open".into())),
            Box::new(|| Err(format!("made {}", "up").into())),
            Box::new(|| panic!("out of order")),
            Box::new(|| panic!("made {}", "up")),
        ];
        let said = ["a transaction is open", "made up", "out of order", "made up"];
        for (prepare, (said, n)) in prepare.into_iter().zip(said.into_iter().zip(1..)) {
            ORDER.lock().expect("no panic").clear();
            let hook = Hook::new("says no").rank(3).try_prepare(prepare);
            let says_no =
                carefork::register(hook.undo(move || note("undo says no")).parent(move || note("parent says no")));
            let ForkError::Vetoed { hook, reason } = fails(&many_options()) else { panic!("another error") };
            assert_eq!(hook, "says no");
            assert!(reason.ends_with(said), "{reason}");
            let order = std::mem::take(&mut *ORDER.lock().expect("no panic"));
            assert_eq!(order, ["prepare outer", "prepare inner", "undo inner", "undo outer"]);
            assert_eq!(calls.ran(), Ran { prepare: n, undo: n, ..Ran::default() });
            drop(says_no);
        }
        assert_eq!(code(&mut forked(&ForkOptions::new(), |t| t.exit(3))), 3);
        assert_eq!(calls.ran(), Ran { prepare: 5, undo: 4, parent: 1, child: 1, cleanup: 0 });
    });
}

#[test]
fn a_budget_that_ends() {
    isolated("a_budget_that_ends", 20, || {
        let _care = dress();
        let calls = Calls::new();
        let _hook = calls.register("counter");
        let busy = InRegion::new("busy one");
        for budget in [0, 1, 30] {
            let options = many_options().timeout(Duration::from_millis(budget));
            let ForkError::Busy { culprits } = fails(&options) else { panic!("another error") };
            assert_eq!(culprits.count, 1);
            assert_eq!(culprits.threads[0].name, "busy one");
            if cfg!(debug_assertions) {
                assert!(culprits.threads[0].entered.is_some_and(|at| at.file().ends_with("kit/mod.rs")));
            }
        }
        let Ran { prepare, undo, parent, child, .. } = calls.ran();
        assert_eq!((prepare, parent, child), (undo, 0, 0));
        drop(busy);
        assert_eq!(code(&mut forked(&ForkOptions::new(), |t| t.exit(3))), 3);
    });
}

/// Somebody else may reap the throw-away child: that is the same.
#[test]
fn a_refused_fork_whose_child_somebody_else_reaps() {
    isolated("a_refused_fork_whose_child_somebody_else_reaps", 20, || {
        let _never = carefork::register(Hook::new("never").try_prepare(|| Err("no".into())));
        kit::ignore(libc::SIGCHLD);
        for _ in 0..20 {
            assert!(matches!(fails(&ForkOptions::new()), ForkError::Vetoed { .. }));
        }
        catch(libc::SIGCHLD, do_nothing);
        let stop = Stop::default();
        thread::scope(|s| {
            s.spawn(|| {
                while !stop.is_set() {
                    // SAFETY: no status is asked for.
                    unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) };
                }
            });
            let _stop = stop.on_drop();
            for _ in 0..200 {
                // SAFETY: no child comes of it.
                let refused = unsafe { carefork::fork() };
                assert!(matches!(refused, Err(ForkError::Vetoed { .. })), "{refused:?}");
            }
        });
        assert_no_child();
    });
}

/// What carefork has to say on a pipe without a reader is dropped and counted; SIGPIPE, at its default, ends nobody.
#[test]
fn nobody_reads_what_it_says() {
    isolated("nobody_reads_what_it_says", 30, || {
        // SAFETY: plain dispositions.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        std::panic::set_hook(Box::new(|_| ()));
        let hook = carefork::register(Hook::new("bad").parent(|| panic!("on purpose")));
        let broken = std::io::pipe().expect("a pipe").1;
        let stderr = raw::aside(std::io::stderr().as_fd());
        // SAFETY: this process's own stream, which is put back.
        unsafe { libc::dup2(broken.as_raw_fd(), 2) };
        assert_eq!(code(&mut forked(&ForkOptions::new(), |_| 3)), 3);
        assert!(carefork::stats().unreported > 0);
        // SAFETY: as above.
        unsafe { libc::dup2(stderr.as_raw_fd(), 2) };
        drop(hook);
    });
}

/// H3: a panic in a later phase is reported, and the others still run.
#[test]
fn a_panic_in_a_later_phase() {
    isolated("a_panic_in_a_later_phase", 20, || {
        let calls = Calls::new();
        let _outer = carefork::register(calls.hook("outer").rank(1));
        let bad = Hook::new("bad").rank(2);
        let bad = bad.parent(|| panic!("in parent")).child(|| panic!("in child")).cleanup(|| panic!("in cleanup"));
        let _bad = carefork::register(bad.undo(|| panic!("in undo")));
        let _inner = carefork::register(calls.hook("inner").rank(3));
        let said = captured(2, || {
            let mut child = forked(&ForkOptions::new(), |token| {
                // SAFETY: no care-fd is used.
                let done = unsafe { token.cleanup() };
                i32::from((done.hooks, done.panicked) != (3, 1))
            });
            assert_eq!(code(&mut child), 0);
        });
        assert_eq!(calls.ran(), Ran { prepare: 2, parent: 2, child: 2, cleanup: 2, undo: 0 });
        let reported = |text: &str, phase: &str| {
            let line = format!("carefork: hook bad panicked in {phase}: in {phase}\n");
            assert!(text.contains(&line), "{text}");
        };
        ["parent", "child", "cleanup"].iter().for_each(|phase| reported(&said, phase));

        let veto = carefork::register(Hook::new("veto").rank(4).try_prepare(|| Err("no".into())));
        let said =
            captured(2, || assert!(matches!(fails(&ForkOptions::new()), ForkError::Vetoed { hook: "veto", .. })));
        reported(&said, "undo");
        assert_eq!(calls.ran().undo, 2);
        drop(veto);
        assert_gate_open();
    });
}

/// Two threads in and out of regions and care-fds, forks of both kinds, all of a child's life: what must work on every kernel.
fn a_days_work() {
    kit::freeze();
    let seen = shared();
    let calls = Calls::new();
    let _hook = calls.register("counter");
    let stop = Stop::default();
    let care = CareFd::open(|| std::fs::File::open("/dev/null")).expect("a care-fd");
    let closed = CareFd::open_on(carefork::OnFork::Close, || std::fs::File::open("/dev/null")).expect("a care-fd");
    thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !stop.is_set() {
                    let _region = carefork::no_forking();
                    drop(CareFd::open(|| std::fs::File::open("/dev/null")).expect("a care-fd"));
                }
            });
        }
        let in_child = |cleaned: bool| {
            seen[0].fetch_add(1, SeqCst);
            let clean = cleaned && !care.is_open_here() && !closed.is_open_here();
            i32::from(!clean || common::self_fds().as_slice().iter().any(|&fd| fd > 2))
        };
        let _stop = stop.on_drop();
        for _ in 0..40 {
            let options = ForkOptions::new().signals(Signals::Reset);
            assert_eq!(
                code(&mut forked(&options, |token| {
                    drop(token);
                    in_child(true)
                })),
                0
            );
            let pid = foreign(|| {
                // SAFETY: no care-fd is used.
                in_child(unsafe { carefork::postfork_child_noexec() }.is_ok())
            });
            assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        }
    });
    assert_eq!(seen[0].load(SeqCst), 80);
    assert_eq!(calls.ran(), Ran { prepare: 80, parent: 80, child: 80, cleanup: 80, undo: 0 });
    assert!(!carefork::lineage().dirty);
    assert_no_child();
}

#[test]
fn with_everything_the_kernel_has() {
    isolated("with_everything_the_kernel_has", 30, a_days_work);
}

#[test]
fn without_what_a_kernel_may_refuse() {
    let wipe = Refuse::when(libc::SYS_madvise, 2, libc::MADV_WIPEONFORK as u32, libc::EINVAL);
    let lacking = [
        vec![Refuse::call(libc::SYS_close_range, libc::ENOSYS)],
        vec![Refuse::call(libc::SYS_close_range, libc::EPERM)],
        vec![Refuse::call(libc::SYS_membarrier, libc::ENOSYS)],
        vec![Refuse::call(libc::SYS_membarrier, libc::EPERM)],
        vec![wipe],
        vec![Refuse::call(libc::SYS_pidfd_open, libc::ENOSYS)],
        vec![
            Refuse::call(libc::SYS_close_range, libc::ENOSYS),
            Refuse::call(libc::SYS_membarrier, libc::ENOSYS),
            Refuse::call(libc::SYS_pidfd_open, libc::ENOSYS),
            Refuse::call(libc::SYS_pidfd_send_signal, libc::ENOSYS),
            wipe,
        ],
    ];
    for refuse in lacking {
        let setup = Setup { refuse, ..Setup::default() };
        isolated_with("without_what_a_kernel_may_refuse", 30, setup, a_days_work);
    }
}

/// The clean-up opens nothing: it works where no descriptor is left to open.
#[test]
fn a_clean_up_with_no_descriptor_left() {
    for (i, refuse) in [vec![], vec![Refuse::call(libc::SYS_close_range, libc::ENOSYS)]].into_iter().enumerate() {
        let setup = Setup { refuse, env: vec![("CASE".to_owned(), i.to_string())], ..Setup::default() };
        isolated_with("a_clean_up_with_no_descriptor_left", 20, setup, || {
            let care: Vec<_> =
                (0..5).map(|_| CareFd::open(|| std::fs::File::open("/dev/null")).expect("a care-fd")).collect();
            let limit = libc::rlimit { rlim_cur: 8, rlim_max: 8 };
            // SAFETY: `limit` is live.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
            for others in [false, true] {
                // SAFETY: no care-fd is used in the child.
                let mut child = match unsafe { ForkOptions::new().close_others(others).fork() }.expect("a child") {
                    Fork::Parent(child) => child,
                    Fork::Child(token) => {
                        // Full to the brim: not even /proc could be opened.
                        drop(token);
                        let clean = care.iter().all(|c| !c.is_open_here());
                        let fds = common::self_fds();
                        raw::exit_now(i32::from(!clean || fds.as_slice() != [0, 1, 2]))
                    }
                };
                // Nor was there room for a pidfd.
                assert!(child.pidfd().is_none());
                assert_eq!(code(&mut child), 0);
            }
        });
    }
}
