//! Reapers among threads, forks and signals: channels, grace periods, and what is left of them in a child (C2, C5, C6).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod watching;

use carefork::{Fork, ForkOptions, Reaper};
use common::{Setup, isolated, isolated_with, raw};
use kit::{SOON, assert_no_child, forked};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};
use watching::{ends_with, is_readable, kill, only, run_until, sleep_on, sleeper, watch, without_pidfds};

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
            // A panic in a callback does not end the thread, nor does one in what it throws.
            struct Bomb;
            impl Drop for Bomb {
                fn drop(&mut self) {
                    panic!("as a test, again");
                }
            }
            reaper.watch(ends_with(0), |_| std::panic::panic_any(Bomb)).expect("watched");
            reaper.watch(ends_with(0), |_| panic!("as a test")).expect("watched");
            reaper.send(ends_with(0)).expect("watched");
            assert!(exits.recv_timeout(SOON).expect("an exit").success());
            let end = Instant::now() + raw::patience(SOON);
            while !reaper.is_empty() {
                assert!(Instant::now() < end, "the one that panics was not reaped");
                thread::yield_now();
            }
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

/// C6: a future of the parent's never comes true in a child, and says so.
#[test]
fn a_future_in_a_child_is_refused() {
    isolated("a_future_in_a_child_is_refused", 60, || {
        use std::future::Future as _;
        use std::task::{Context, Poll, Waker};
        let reaper = Reaper::new().expect("a reaper");
        let child = sleeper();
        let pid = child.id();
        let mut end = Box::pin(reaper.exit_of(child).expect("watched"));
        let mut poll = || end.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(poll().is_pending());
        let mut child = forked(&ForkOptions::new(), |_| {
            let refused = matches!(poll(), Poll::Ready(Err(e)) if e.raw_os_error() == Some(libc::ECHILD));
            i32::from(!refused)
        });
        assert_eq!(kit::code(&mut child), 0);
        assert!(poll().is_pending());
        drop(reaper);
        assert!(matches!(poll(), Poll::Ready(Err(e)) if e.kind() == std::io::ErrorKind::BrokenPipe));
        kill(pid, libc::SIGKILL);
        watching::no_zombie_left();
    });
}

/// A grace period that is over before its time wakes nobody and is not kept.
#[test]
fn a_grace_period_ends_with_its_child() {
    isolated("a_grace_period_ends_with_its_child", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let alarm = || {
            let fds =
                std::fs::read_dir("/proc/self/fd").expect("/proc").map(|entry| entry.expect("an entry").file_name());
            let infos =
                fds.filter_map(|fd| std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.display())).ok());
            infos.filter_map(|i| Some(i.split_once("it_value: ")?.1.lines().next()?.to_owned())).collect::<Vec<_>>()
        };
        let hour = Duration::from_secs(3600);
        let (first, its) = watch(&reaper, sleeper());
        let (second, others) = watch(&reaper, sleeper());
        first.terminate(hour).expect("ours");
        assert_ne!(alarm(), ["(0, 0)"]);
        assert_eq!(only(&reaper, &its).signal(), Some(libc::SIGTERM));
        assert_eq!(alarm(), ["(0, 0)"], "the alarm of a child that is gone");
        second.terminate(hour).expect("ours");
        assert_eq!(only(&reaper, &others).signal(), Some(libc::SIGTERM));
        assert_eq!(alarm(), ["(0, 0)"]);
        assert_no_child();
    });
}

/// C6: a child of the parent's is not for a reaper of the child's: it comes back, and the reaper works on.
#[test]
fn a_parents_child_is_not_to_be_watched() {
    isolated("a_parents_child_is_not_to_be_watched", 60, || {
        let [go, done] = [0, 1].map(|i| &kit::shared()[i]);
        let parents = forked(&ForkOptions::new(), |_| {
            while go.load(SeqCst) == 0 {
                thread::yield_now();
            }
            0
        });
        let pid = parents.id();
        let mut slot = Some(parents);
        let mut child = forked(&ForkOptions::new(), |token| {
            // Not cleaned up: the pidfd is there.
            std::mem::forget(token);
            let own = Reaper::new().expect("a reaper");
            let Err(refused) = own.watch(slot.take().expect("there"), |_| ()) else { return 10 };
            if refused.error.raw_os_error() != Some(libc::ECHILD)
                || !refused.to_string().contains("another process's child")
            {
                return 11;
            }
            go.store(1, SeqCst);
            while done.load(SeqCst) == 0 {
                thread::yield_now();
            }
            let (_, exits) = watch(&own, ends_with(4));
            i32::from(only(&own, &exits).code() != Some(4))
        });
        while !std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("/proc").contains(") Z ") {
            if let Ok(Some(status)) = child.try_wait() {
                panic!("{status}");
            }
            thread::yield_now();
        }
        done.store(1, SeqCst);
        assert_eq!(kit::code(&mut child), 0);
        assert!(slot.expect("there").wait().expect("a status").success());
    });
}
