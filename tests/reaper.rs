//! `Reaper`: one callback a child, exactly once, whatever happens around it (C1, C2).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::{Child, Exit, Fork, ForkOptions, Reaper, Watched};
use common::{Refuse, Setup, isolated, isolated_with, raw};
use crossbeam_channel::{Receiver, unbounded};
use kit::{SOON, assert_no_child, forked};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

fn sleeper() -> Child {
    forked(&ForkOptions::new(), |_| sleep_on())
}

fn sleep_on() -> i32 {
    thread::sleep(Duration::from_secs(60));
    1
}

fn ends_with(code: i32) -> Child {
    forked(&ForkOptions::new().name("worker"), |_| code)
}

/// Waits for the reaper's descriptor and dispatches, until `done`.
#[track_caller]
fn run_until(reaper: &Reaper, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + raw::patience(SOON);
    while !done() {
        assert!(Instant::now() < end, "nothing came");
        raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], end.saturating_duration_since(Instant::now()));
        reaper.dispatch().expect("dispatch");
    }
}

#[track_caller]
fn watch(reaper: &Reaper, child: Child) -> (Watched, Receiver<Exit>) {
    let (send, receive) = unbounded();
    let watched = reaper.watch(child, move |exit| send.send(exit).expect("the test waits")).expect("watched");
    (watched, receive)
}

/// One exit, and never a second.
#[track_caller]
fn only(reaper: &Reaper, exits: &Receiver<Exit>) -> Exit {
    run_until(reaper, || !exits.is_empty());
    let exit = exits.try_recv().expect("one");
    reaper.dispatch().expect("dispatch");
    assert!(exits.is_empty(), "called twice");
    exit
}

fn is_readable(reaper: &Reaper) -> bool {
    let mut fds = [raw::pollfd(reaper.as_raw_fd())];
    raw::poll_readable(&mut fds, Duration::ZERO);
    fds[0].revents != 0
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: a child of the test's.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

fn without_pidfds() -> Setup {
    Setup { refuse: vec![Refuse::call(libc::SYS_pidfd_open, libc::EPERM)], ..Setup::default() }
}

/// What every reaper offers, with and without pidfds.
fn watches() {
    let reaper = Reaper::new().expect("a reaper");
    assert!(!is_readable(&reaper));
    let (watched, exits) = watch(&reaper, ends_with(3));
    let pid = watched.id();
    let exit = only(&reaper, &exits);
    assert_eq!((exit.pid, exit.code(), exit.name.as_deref()), (pid, Some(3), Some("worker")));
    assert!(exit.usage.is_some_and(|u| u.max_rss > 0));
    assert!(exit.to_string().starts_with(&format!("worker[{pid}] exited with code 3 after ")), "{exit}");
    assert!(!watched.is_watched() && reaper.is_empty());
    // Reaped, before the callback ran.
    assert_no_child();
    // Gone: nobody is hit, and it is no error.
    watched.kill().expect("left alone");

    // Killed, with a name and without.
    let (watched, exits) = watch(&reaper, sleeper());
    reaper.dispatch().expect("dispatch");
    assert!(exits.is_empty() && watched.is_watched() && reaper.len() == 1);
    watched.kill().expect("ours");
    assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));

    // Waited for before.
    let mut child = ends_with(5);
    child.wait().expect("a status");
    let (_, exits) = watch(&reaper, child);
    let exit = only(&reaper, &exits);
    assert_eq!((exit.code(), exit.name.as_deref()), (Some(5), Some("worker")));

    // Forked without a pidfd: it gets one where there are any.
    let (_, exits) = watch(&reaper, forked(&ForkOptions::new().pidfd(false), |_| 6));
    assert_eq!(only(&reaper, &exits).code(), Some(6));

    // Status taken by another wait: said so, once.
    let (_, exits) = watch(&reaper, ends_with(7));
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {}
    assert!(only(&reaper, &exits).is_lost());
    assert_no_child();
}

#[test]
fn one_callback_a_child() {
    isolated("one_callback_a_child", 30, watches);
}

#[test]
fn without_a_pidfd() {
    isolated_with("without_a_pidfd", 30, without_pidfds(), watches);
}

/// Linux 5.3: pidfds, but no waiting by them.
#[test]
fn pidfds_that_cannot_be_waited_by() {
    let refuse = vec![Refuse::when(libc::SYS_waitid, 0, libc::P_PIDFD, libc::EINVAL)];
    isolated_with("pidfds_that_cannot_be_waited_by", 30, Setup { refuse, ..Setup::default() }, watches);
}

/// With SIGCHLD ignored the kernel throws statuses away.
#[test]
fn sigchld_ignored() {
    isolated("sigchld_ignored", 30, || {
        kit::ignore(libc::SIGCHLD);
        let reaper = Reaper::new().expect("a reaper");
        let (_, exits) = watch(&reaper, ends_with(3));
        assert!(only(&reaper, &exits).is_lost());
        assert_no_child();
    });
}

#[test]
fn sigchld_blocked() {
    isolated("sigchld_blocked", 30, || {
        kit::block(&[libc::SIGCHLD]);
        let reaper = Reaper::new().expect("a reaper");
        let (_, exits) = watch(&reaper, ends_with(3));
        assert_eq!(only(&reaper, &exits).code(), Some(3));
    });
}

/// A stop and a continuation end nobody.
#[test]
fn stopped_and_continued() {
    isolated("stopped_and_continued", 30, || {
        let reaper = Reaper::new().expect("a reaper");
        let (watched, exits) = watch(&reaper, sleeper());
        for signal in [libc::SIGSTOP, libc::SIGCONT] {
            watched.signal(signal).expect("ours");
            let options = if signal == libc::SIGSTOP { libc::WSTOPPED } else { libc::WCONTINUED };
            // SAFETY: no siginfo is asked for; a stop is not an end.
            unsafe { libc::waitid(libc::P_PID, watched.id(), std::ptr::null_mut(), options | libc::WNOWAIT) };
            reaper.dispatch().expect("dispatch");
            assert!(exits.is_empty() && watched.is_watched());
        }
        watched.kill().expect("ours");
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
    });
}

/// A child that ended under a debugger: the pidfd says so, and the status is the debugger's to see first. Not a busy loop, not a
/// made-up status, and the real one once the debugger lets go.
#[test]
fn ended_under_a_debugger() {
    isolated("ended_under_a_debugger", 60, || {
        let [traced, let_go] = [0, 1].map(|i| &kit::shared()[i]);
        let reaper = Reaper::new().expect("a reaper");
        let child = sleeper();
        let pid = child.id();
        let debugger = forked(&ForkOptions::new(), |_| {
            let none = std::ptr::null_mut::<libc::c_void>();
            // SAFETY: a child of the same user; nothing is written to it.
            if unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, none, none) } != 0 {
                return raw::errno();
            }
            traced.store(1, SeqCst);
            while let_go.load(SeqCst) == 0 {
                thread::yield_now();
            }
            // Ends, and with it the trace.
            0
        });
        let (watched, exits) = watch(&reaper, child);
        while traced.load(SeqCst) == 0 {
            thread::yield_now();
        }
        watched.kill().expect("ours");
        // It has died: the descriptor says so again and again, but a dispatch quiets it for a while.
        raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
        reaper.dispatch().expect("dispatch");
        assert!(exits.is_empty() && watched.is_watched(), "a status that the debugger has not let go of");
        assert!(!is_readable(&reaper), "a busy loop");
        let_go.store(1, SeqCst);
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
        assert_eq!(kit::code(&mut { debugger }), 0);
        assert_no_child();
    });
}

/// Callbacks run with no lock held.
#[test]
fn callbacks_call_back_in() {
    isolated("callbacks_call_back_in", 60, || {
        // More, from inside, ten generations.
        let reaper = Reaper::new().expect("a reaper");
        let ends = Arc::new(AtomicU32::new(0));
        fn again(reaper: &Reaper, left: u32, ends: &Arc<AtomicU32>) {
            let (inner, counted) = (reaper.clone(), Arc::clone(ends));
            let then = move |exit: Exit| {
                assert_eq!(exit.code(), Some(left.cast_signed()));
                counted.fetch_add(1, SeqCst);
                // A dispatch inside a dispatch.
                inner.dispatch().expect("dispatch");
                if left > 0 {
                    again(&inner, left - 1, &counted);
                }
            };
            reaper.watch(ends_with(left.cast_signed()), then).expect("watched");
        }
        again(&reaper, 9, &ends);
        run_until(&reaper, || ends.load(SeqCst) == 10);

        // It panics: the others are called all the same.
        let (_, exits) = watch(&reaper, ends_with(0));
        reaper.watch(ends_with(0), |_| panic!("as a test")).expect("watched");
        let (_, more) = watch(&reaper, ends_with(0));
        let mut panics = 0;
        let end = Instant::now() + raw::patience(SOON);
        while exits.is_empty() || more.is_empty() || panics == 0 {
            assert!(Instant::now() < end, "nothing came");
            let dispatch = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| reaper.dispatch()));
            panics += u32::from(dispatch.is_err());
        }
        assert_eq!((panics, exits.len(), more.len()), (1, 1, 1));

        // The reaper is closed, or its last handle dropped, in a callback: nobody is called any more.
        for drops in [false, true] {
            let reaper = Reaper::new().expect("a reaper");
            let slot = Arc::new(Mutex::new(Some(reaper.clone())));
            let called = Arc::new(AtomicU32::new(0));
            let go = &kit::shared()[0];
            for _ in 0..20 {
                let child = forked(&ForkOptions::new(), |_| {
                    while go.load(SeqCst) == 0 {
                        thread::yield_now();
                    }
                    0
                });
                let (slot, called) = (Arc::clone(&slot), Arc::clone(&called));
                let then = move |_| {
                    called.fetch_add(1, SeqCst);
                    match slot.lock().expect("not poisoned").take() {
                        Some(last) if drops => drop(last),
                        Some(last) => last.close(),
                        None => {}
                    }
                };
                reaper.watch(child, then).expect("watched");
            }
            let poll = [raw::pollfd(reaper.as_raw_fd())];
            go.store(1, SeqCst);
            if drops {
                // What dispatches is a handle of its own, dropped here with the closure.
                let handle = slot.lock().expect("not poisoned").clone().expect("there");
                drop(reaper);
                raw::poll_readable(&mut { poll }, SOON);
                handle.dispatch().expect("dispatch");
                drop(handle);
            } else {
                raw::poll_readable(&mut { poll }, SOON);
                reaper.dispatch().expect("dispatch");
                assert_eq!(called.load(SeqCst), 1);
                assert!(reaper.watch(ends_with(0), |_| ()).is_err_and(|e| e.error.to_string().contains("closed")));
            }
            // Reaped by whatever comes next.
            no_zombie_left();
        }
        assert_no_child();
    });
}

/// Children that nobody holds are reaped by carefork's next calls.
#[track_caller]
fn no_zombie_left() {
    let end = Instant::now() + raw::patience(SOON);
    loop {
        forked(&ForkOptions::new(), |_| 0).wait().expect("a status");
        // SAFETY: no status is asked for.
        if unsafe { libc::waitid(libc::P_ALL, 0, std::ptr::null_mut(), libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) }
            != 0
        {
            return;
        }
        assert!(Instant::now() < end, "a zombie stays");
    }
}

/// C1: dropped, and reaped by a reaper or the next call.
#[test]
fn a_dropped_child_leaves_no_zombie() {
    for refuse in [false, true] {
        let mut setup = if refuse { without_pidfds() } else { Setup::default() };
        setup.env.push(("CASE".to_owned(), refuse.to_string()));
        isolated_with("a_dropped_child_leaves_no_zombie", 30, setup, || {
            // By the next fork or wait.
            let children: Vec<_> = (0..20).map(|_| sleeper()).collect();
            let pids: Vec<_> = children.iter().map(Child::id).collect();
            drop(children);
            pids.iter().for_each(|&pid| kill(pid, libc::SIGKILL));
            no_zombie_left();
            // By a reaper, which hears of it.
            let reaper = Reaper::new().expect("a reaper");
            let child = sleeper();
            let pid = child.id();
            drop(child);
            reaper.dispatch().expect("dispatch");
            kill(pid, libc::SIGKILL);
            if !refuse {
                raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
                assert!(is_readable(&reaper), "it was not told of the orphan");
            }
            let end = Instant::now() + raw::patience(SOON);
            // SAFETY: only asks.
            while unsafe { libc::kill(pid.cast_signed(), 0) } == 0 {
                assert!(Instant::now() < end, "a zombie stays");
                reaper.dispatch().expect("dispatch");
            }
            assert_no_child();
        });
    }
}

/// Exactly once, with many threads dispatching.
#[test]
fn many_threads_dispatch() {
    isolated("many_threads_dispatch", 120, || {
        let reaper = Reaper::new().expect("a reaper");
        let calls = Arc::new((0..300).map(|_| AtomicU32::new(0)).collect::<Vec<_>>());
        let stop = kit::Stop::default();
        thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    while !stop.is_set() {
                        reaper.dispatch().expect("dispatch");
                        thread::yield_now();
                    }
                });
            }
            let _stop = stop.on_drop();
            for i in 0..300 {
                let calls = Arc::clone(&calls);
                let then = move |_| {
                    calls[i].fetch_add(1, SeqCst);
                };
                reaper.watch(ends_with(0), then).expect("watched");
            }
            let end = Instant::now() + raw::patience(Duration::from_secs(60));
            while calls.iter().any(|c| c.load(SeqCst) == 0) {
                assert!(Instant::now() < end, "not all were called");
                thread::yield_now();
            }
        });
        assert!(calls.iter().all(|c| c.load(SeqCst) == 1));
        assert!(reaper.is_empty());
        assert_no_child();
    });
}

/// Somebody else's `waitpid(-1)`: a status is right or lost, and each is told of once.
#[test]
fn beside_a_foreign_waitpid() {
    isolated("beside_a_foreign_waitpid", 120, || {
        const N: i32 = 400;
        let reaper = Reaper::new().expect("a reaper");
        let exits = reaper.receiver().expect("a receiver");
        let stop = kit::Stop::default();
        let mut tally = (0, 0);
        thread::scope(|s| {
            s.spawn(|| {
                while !stop.is_set() {
                    // SAFETY: no status is asked for.
                    unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
                }
            });
            let _stop = stop.on_drop();
            let mut codes = std::collections::BTreeMap::new();
            for i in 0..N {
                let child = forked(&ForkOptions::new(), |_| i % 100 + 1);
                let name = (child.id(), i % 100 + 1);
                let (send, told) = unbounded();
                reaper.watch(child, move |exit| drop(send.send(exit))).expect("watched");
                codes.insert(i, (name, told));
            }
            for ((pid, code), told) in codes.values() {
                let exit = told.recv_timeout(raw::patience(SOON)).expect("told of");
                assert_eq!(exit.pid, *pid);
                assert!(exit.is_lost() || exit.code() == Some(*code), "{exit}, not {code}");
                assert!(told.recv().is_err(), "told of twice");
                *(if exit.is_lost() { &mut tally.0 } else { &mut tally.1 }) += 1;
            }
        });
        println!("{} lost, {} not", tally.0, tally.1);
        assert!(tally.0 > 0, "nothing was stolen: the test says nothing");
        drop(exits);
    });
}

/// C1: a child by itself, polled by its descriptor.
#[test]
fn a_child_tells_all() {
    isolated("a_child_tells_all", 30, || {
        use std::os::fd::AsFd as _;
        let mut child = forked(&ForkOptions::new().name("worker"), |_| {
            let pages = vec![1u8; 8 << 20];
            i32::from(std::hint::black_box(&pages)[4096] != 1)
        });
        assert_eq!(child.name(), Some("worker"));
        raw::poll_readable(&mut [raw::pollfd(child.as_fd().as_raw_fd())], SOON);
        assert!(child.exit().is_none());
        assert!(child.wait().expect("a status").success());
        let exit = child.exit().expect("it ended").clone();
        assert_eq!((exit.name.as_deref(), exit.pid, child.name()), (Some("worker"), child.id(), Some("worker")));
        let usage = exit.usage.expect("not lost");
        assert!(usage.max_rss >= 8 << 20 && usage.minor_faults > 0, "{usage:?}");
        assert!(usage.user + usage.system <= exit.ran * 2 + Duration::from_secs(1), "{usage:?} {exit:?}");

        let mut child = forked(&ForkOptions::new(), |_| {
            // SAFETY: as a crash.
            unsafe { libc::abort() }
        });
        assert!(child.wait().is_ok());
        assert_eq!(child.exit().and_then(Exit::signal), Some(libc::SIGABRT));
    });
}

#[test]
fn deregistered_children_are_killed_and_reaped_and_not_heard_of() {
    isolated("deregistered_children_are_killed_and_reaped_and_not_heard_of", 30, || {
        let reaper = Reaper::new().expect("a reaper");
        let (watched, exits) = watch(&reaper, sleeper());
        watched.kill_deregister().expect("ours");
        // Its callback is gone at once.
        assert!(exits.try_recv().is_err_and(|e| e.is_disconnected()));
        run_until(&reaper, || reaper.is_empty());
        assert_no_child();
        watched.kill_deregister().expect("left alone");
    });
}

/// TERM, and KILL when the grace is over: for a child, a group, a reaper's child.
#[test]
fn terminate() {
    isolated("terminate", 60, || {
        extern "C" fn shrug(_: i32) {}
        let hour = Duration::from_secs(3600);
        let ready = &kit::shared()[0];
        let stubborn = |options: &ForkOptions<'_>| {
            ready.store(0, SeqCst);
            let child = forked(options, |_| {
                kit::catch(libc::SIGTERM, shrug);
                ready.store(1, SeqCst);
                loop {
                    thread::sleep(Duration::from_secs(1));
                }
            });
            while ready.load(SeqCst) == 0 {
                thread::yield_now();
            }
            child
        };
        // Obeys.
        let status = sleeper().terminate(hour).expect("a status");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGTERM));
        // Stopped, it hears all the same.
        let child = sleeper();
        child.signal(libc::SIGSTOP).expect("ours");
        let status = { child }.terminate(hour).expect("a status");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGTERM));
        // Does not: an hour goes by on the driven clock.
        let mut child = stubborn(&ForkOptions::new());
        carefork::testing::advance(Duration::ZERO);
        let done = kit::Stop::default();
        thread::scope(|s| {
            s.spawn(|| {
                while !done.is_set() {
                    carefork::testing::advance(Duration::from_secs(60));
                    thread::yield_now();
                }
            });
            let _done = done.on_drop();
            let status = child.terminate(hour).expect("a status");
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
        });
        // By a reaper.
        let reaper = Reaper::new().expect("a reaper");
        let (watched, exits) = watch(&reaper, stubborn(&ForkOptions::new()));
        watched.terminate(hour).expect("ours");
        reaper.dispatch().expect("dispatch");
        assert!(watched.is_watched());
        carefork::testing::advance(hour);
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
        carefork::testing::release();
        // The timer tells of it, too.
        let (watched, exits) = watch(&reaper, stubborn(&ForkOptions::new()));
        watched.terminate(Duration::from_millis(20)).expect("ours");
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
        assert_no_child();

        // A leader that obeys, and a member of its group that does not.
        let member = &kit::shared()[0];
        let options = ForkOptions::new().new_session(true);
        let mut leader = forked(&options, |token| {
            drop(token);
            let child = stubborn(&ForkOptions::new());
            member.store(child.id().into(), SeqCst);
            sleep_on()
        });
        while member.load(SeqCst) == 0 {
            thread::yield_now();
        }
        leader.terminate(hour).expect("a status");
        gone(member.load(SeqCst));
        // The same by a reaper.
        member.store(0, SeqCst);
        let leader = forked(&options, |token| {
            drop(token);
            let child = stubborn(&ForkOptions::new());
            member.store(child.id().into(), SeqCst);
            sleep_on()
        });
        while member.load(SeqCst) == 0 {
            thread::yield_now();
        }
        let (watched, exits) = watch(&reaper, leader);
        watched.terminate(hour).expect("ours");
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGTERM));
        gone(member.load(SeqCst));
    });
}

/// Not our child: what is left of a group.
#[track_caller]
fn gone(pid: u64) {
    let end = Instant::now() + raw::patience(SOON);
    let path = format!("/proc/{pid}/stat");
    while std::fs::read_to_string(&path).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(Instant::now() < end, "a member of the group lives on");
        thread::yield_now();
    }
}

/// C6: in a child, a parent's reaper is nobody's.
#[test]
fn in_a_child_the_parents_reaper_does_nothing() {
    isolated("in_a_child_the_parents_reaper_does_nothing", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let (watched, exits) = watch(&reaper, sleeper());
        let refused = |r: std::io::Result<()>| r.is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD));
        // In a child that has cleaned up, one that has not, one of foreign code, one by `_Fork`.
        let dead = ends_with(0);
        while !std::fs::read_to_string(format!("/proc/{}/stat", dead.id())).expect("/proc").contains(") Z ") {
            thread::yield_now();
        }
        let (_, dead_exits) = watch(&reaper, dead);
        let inside = || -> i32 {
            let checks = [
                refused(reaper.dispatch().map(drop)),
                refused(watched.kill()),
                refused(watched.terminate(Duration::ZERO)),
                refused(watched.kill_deregister()),
                refused(reaper.receiver().map(drop)),
                reaper.is_empty() && exits.is_empty() && dead_exits.is_empty(),
                refused(reaper.set_owner(carefork::SigchldOwner::Always)),
                refused(reaper.sigchld_occurred().map(drop)),
            ];
            if let Some(at) = checks.iter().position(|ok| !ok) {
                return 10 + at.try_into().unwrap_or(0);
            }
            // A child of its own is not the parent's to watch, and comes back.
            let Err(back) = reaper.watch(ends_with(4), |_| ()) else { return 30 };
            if back.error.raw_os_error() != Some(libc::ECHILD) {
                return 31;
            }
            // A reaper of its own works at once.
            let own = Reaper::new().expect("a reaper");
            let (_, exits) = watch(&own, back.into_child());
            if only(&own, &exits).code() != Some(4) {
                return 32;
            }
            // Dropping the parent's drops no callback and changes nothing.
            drop(reaper.clone());
            0
        };
        let run = |token: Option<carefork::InChild>| {
            // SAFETY: nothing borrowed from a care-fd is used afterwards.
            let _done = token.map(|token| unsafe { token.cleanup() });
            inside()
        };
        let options = ForkOptions::new();
        assert_eq!(kit::code(&mut forked(&options, |token| run(Some(token)))), 0);
        assert_eq!(kit::code(&mut forked(&options, |_| run(None))), 0);
        assert_eq!(common::reap(kit::foreign(|| run(None)), SOON), common::Verdict::Exited(0));
        // SAFETY: the child keeps to what this test does anyway.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            raw::exit_now(run(None));
        }
        assert_eq!(common::reap(i32::try_from(pid).expect("a pid"), SOON), common::Verdict::Exited(0));

        assert!(watched.is_watched(), "a signal was sent");
        // The parent's epoll is as it was.
        assert_eq!(only(&reaper, &dead_exits).code(), Some(0));
        watched.kill().expect("ours");
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
        assert_no_child();
    });
}

/// A pidfd of which a child has a copy keeps an epoll's entry alive unless it is taken out first.
#[test]
fn a_copy_in_a_child_keeps_nothing_alive() {
    isolated("a_copy_in_a_child_keeps_nothing_alive", 30, || {
        let reaper = Reaper::new().expect("a reaper");
        let (first, exits) = watch(&reaper, sleeper());
        // By foreign code and not cleaned up: it has everything.
        let copy = kit::foreign(sleep_on);
        first.kill().expect("ours");
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
        assert!(!is_readable(&reaper), "it fires on");
        kill(copy.cast_unsigned(), libc::SIGKILL);
        common::reap(copy, SOON);
    });
}

/// By channel, on a thread of the reaper's.
#[test]
fn by_channel() {
    for refuse in [false, true] {
        let mut setup = if refuse { without_pidfds() } else { Setup::default() };
        setup.env.push(("CASE".to_owned(), refuse.to_string()));
        isolated_with("by_channel", 60, setup, || {
            let threads = common::thread_count();
            let reaper = Reaper::new().expect("a reaper");
            // Sent before there is a receiver: not lost.
            reaper.send(ends_with(1)).expect("watched");
            let exits = reaper.receiver().expect("a receiver");
            for code in 2..20 {
                reaper.send(ends_with(code)).expect("watched");
            }
            let mut codes: Vec<_> = (1..20).map(|_| exits.recv_timeout(SOON).expect("an exit").code()).collect();
            codes.sort_unstable();
            assert_eq!(codes, (1..20).map(Some).collect::<Vec<_>>());
            // A panic in a callback does not end the thread.
            reaper.watch(ends_with(0), |_| panic!("as a test")).expect("watched");
            reaper.send(ends_with(0)).expect("watched");
            assert!(exits.recv_timeout(SOON).expect("an exit").success());
            // A fork beside it: the child's own works, and the parent's does no harm.
            let mut child = forked(&ForkOptions::new(), |token| {
                drop(token);
                let own = Reaper::new().expect("a reaper");
                own.send(ends_with(9)).expect("watched");
                let code = own.receiver().expect("a receiver").recv_timeout(SOON).expect("an exit").code();
                code.unwrap_or(-1)
            });
            assert_eq!(kit::code(&mut child), 9);
            drop(reaper);
            assert!(exits.recv_timeout(SOON).is_err_and(|e| e.is_disconnected()));
            let end = Instant::now() + raw::patience(SOON);
            while common::thread_count() > threads {
                assert!(Instant::now() < end, "the thread stays");
                thread::yield_now();
            }
            assert_no_child();
        });
    }
}

/// G9's counterpart: an idle reaper costs a fork nothing, and forks go on beside one that is busy.
#[test]
fn forks_beside_a_busy_reaper() {
    isolated("forks_beside_a_busy_reaper", 120, || {
        let reaper = Reaper::new().expect("a reaper");
        let exits = reaper.receiver().expect("a receiver");
        thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    for _ in 0..100 {
                        // SAFETY: the child ends at once, after a look at its own reaper.
                        match unsafe { ForkOptions::new().fork() }.expect("a fork") {
                            Fork::Child(token) => {
                                drop(token);
                                let own = Reaper::new().is_ok_and(|own| own.dispatch().is_ok_and(|n| n == 0));
                                raw::exit_now(i32::from(!own || carefork::lineage().dirty));
                            }
                            Fork::Parent(child) => drop(reaper.send(child).expect("watched")),
                        }
                    }
                });
            }
        });
        for _ in 0..300 {
            let exit = exits.recv_timeout(raw::patience(Duration::from_secs(30))).expect("an exit");
            assert!(exit.success(), "{exit}");
        }
        assert_no_child();
    });
}
