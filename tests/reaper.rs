//! `Reaper`: one callback a child, exactly once, whatever becomes of the child and its status (C1, C2).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod watching;

use carefork::{Child, Exit, ForkOptions, Reaper};
use common::{Refuse, Setup, isolated, isolated_with, raw};
use crossbeam_channel::unbounded;
use kit::{SOON, assert_no_child, forked};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use watching::{ends_with, is_readable, kill, no_zombie_left, only, run_until, sleeper, watch, without_pidfds};

/// Whether the child stops, instead of ending.
fn stops(pid: u32) -> bool {
    let child = nix::unistd::Pid::from_raw(pid.cast_signed());
    matches!(waitpid(child, Some(WaitPidFlag::WUNTRACED)), Ok(WaitStatus::Stopped(..)))
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

    // Killed; not by a handle of who was in its place before.
    let gone = watched;
    let (watched, exits) = watch(&reaper, sleeper());
    gone.kill().expect("left alone");
    gone.kill_deregister().expect("left alone");
    assert!(!gone.is_watched());
    watched.signal(libc::SIGSTOP).expect("ours");
    assert!(stops(watched.id()), "a handle of another child's has killed it");
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

/// A filter that knows wait4 only.
#[test]
fn waitid_refused() {
    let refuse = vec![Refuse::call(libc::SYS_waitid, libc::EPERM)];
    isolated_with("waitid_refused", 30, Setup { refuse, ..Setup::default() }, || {
        watches();
        let status = sleeper().terminate(Duration::from_secs(3600)).expect("a status");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGTERM));
    });
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
        // In a child, which has this thread only: the test harness has another one, which would take the signal.
        let pid = kit::foreign(|| {
            kit::block(&[libc::SIGCHLD]);
            let reaper = Reaper::new().expect("a reaper");
            let (_, exits) = watch(&reaper, ends_with(3));
            assert_eq!(only(&reaper, &exits).code(), Some(3));
            0
        });
        assert_eq!(common::reap(pid, SOON), common::Verdict::Exited(0));
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
                traced.store(2, SeqCst);
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
        assert_eq!(traced.load(SeqCst), 1, "ptrace is refused here");
        watched.kill().expect("ours");
        // It has died: the descriptor says so again and again, but a dispatch quiets it for a while.
        // (The while may be over before this thread comes to look: then it is quieted again.)
        raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
        loop {
            reaper.dispatch().expect("dispatch");
            assert!(exits.is_empty() && watched.is_watched(), "a status that the debugger has not let go of");
            if !is_readable(&reaper) {
                break;
            }
        }
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

/// Somebody else's `waitpid(-1)`: a status is right or lost, and each is told of once.
#[test]
fn beside_a_foreign_waitpid() {
    isolated("beside_a_foreign_waitpid", 120, || {
        const N: i32 = 400;
        let reaper = Reaper::new().expect("a reaper");
        let exits = reaper.receiver().expect("a receiver");
        let stop = kit::Stop::default();
        let stolen = AtomicU32::new(0);
        let mut tally = (0, 0);
        thread::scope(|s| {
            s.spawn(|| {
                while !stop.is_set() {
                    // SAFETY: no status is asked for.
                    if unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {
                        stolen.fetch_add(1, SeqCst);
                    }
                }
            });
            let _stop = stop.on_drop();
            let mut codes = std::collections::BTreeMap::new();
            // And until something was stolen: otherwise this says nothing.
            for i in (0..).take_while(|&i| i < N || stolen.load(SeqCst) == 0) {
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
        assert_eq!(tally.0, stolen.into_inner(), "lost, and stolen");
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
