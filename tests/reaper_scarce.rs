//! Reapers without descriptors to spare: nothing is lost, nothing hangs, and what cannot be promised is an error (C1, C2, C5).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod watching;

use carefork::{Command, ForkOptions, Reaper, SigchldOwner, Stdio};
use common::{isolated, raw};
use kit::{SOON, assert_no_child, disposition, foreign, forked};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};
use watching::{ends_with, is_readable, kill, no_zombie_left, only, owner, sleeper, until_dead, watch};

/// Takes every descriptor that this process may have.
fn take_all() -> Vec<File> {
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 4096 };
    // SAFETY: `limit` is live.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    std::iter::from_fn(|| File::open("/dev/null").ok()).collect()
}

fn is_full(e: &std::io::Error) -> bool {
    e.raw_os_error() == Some(libc::EMFILE)
}

/// One that will not go by SIGTERM.
fn stubborn() -> carefork::Child {
    extern "C" fn shrug(_: i32) {}
    let ready = &kit::shared()[0];
    let child = forked(&ForkOptions::new(), |_| {
        kit::catch(libc::SIGTERM, shrug);
        ready.store(1, SeqCst);
        watching::sleep_on()
    });
    while ready.load(SeqCst) == 0 {
        thread::yield_now();
    }
    child
}

/// The first child that was ever dropped, at a moment when there is no descriptor to watch it by.
#[test]
fn a_child_dropped_meanwhile_is_reaped_later() {
    isolated("a_child_dropped_meanwhile_is_reaped_later", 60, || {
        let all = take_all();
        let children = [sleeper(), sleeper()];
        let pids = children.each_ref().map(carefork::Child::id);
        drop(children);
        // Nothing to be reaped yet, and still no room.
        ends_with(0).wait().expect("a status");
        assert!(Reaper::new().is_err_and(|e| is_full(&e)), "it could not hear of them");
        drop(all);
        kill(pids[0], libc::SIGKILL);
        no_zombie_left_but(pids[1]);
        // A reaper hears of the other.
        let reaper = Reaper::new().expect("a reaper");
        reaper.dispatch().expect("dispatch");
        kill(pids[1], libc::SIGKILL);
        raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
        assert!(is_readable(&reaper), "it was not told of the orphan");
        no_zombie_left();
        assert_no_child();
    });
}

/// Carefork's next calls reap all but `pid`, which lives.
#[track_caller]
fn no_zombie_left_but(pid: u32) {
    let end = Instant::now() + raw::patience(SOON);
    let zombies = || {
        let children = std::fs::read_to_string("/proc/thread-self/children").expect("/proc");
        children.split_whitespace().filter(|c| *c != pid.to_string()).count()
    };
    while zombies() > 0 {
        assert!(Instant::now() < end, "a zombie stays");
        ends_with(0).wait().expect("a status");
    }
}

/// Whose end no descriptor would tell of is refused, and comes back.
#[test]
fn who_cannot_be_heard_of_is_refused() {
    isolated("who_cannot_be_heard_of_is_refused", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let all = take_all();
        let child = ends_with(3);
        assert!(child.pidfd().is_none());
        let refused = reaper.watch(child, |_| ()).expect_err("no descriptor for it, nor for a timer");
        assert!(is_full(&refused.error), "{refused}");
        let mut waited_for = ends_with(4);
        waited_for.wait().expect("a status");
        let again = reaper.watch(waited_for, |_| ()).expect_err("no descriptor for a timer");
        assert!(is_full(&again.error), "{again}");
        assert!(reaper.is_empty());
        drop(all);
        let (_, exits) = watch(&reaper, refused.into_child());
        assert_eq!(only(&reaper, &exits).code(), Some(3));
        let (_, exits) = watch(&reaper, again.into_child());
        assert_eq!(only(&reaper, &exits).code(), Some(4));
        assert_no_child();
    });
}

/// A grace period that nobody would end is not begun.
#[test]
fn a_grace_period_needs_its_timer() {
    isolated("a_grace_period_needs_its_timer", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let (watched, exits) = watch(&reaper, stubborn());
        let (meek, its) = watch(&reaper, sleeper());
        let all = take_all();
        for watched in [&watched, &meek] {
            assert!(watched.terminate(Duration::from_millis(20)).is_err_and(|e| is_full(&e)));
        }
        drop(all);
        // It was sent nothing.
        kill(meek.id(), libc::SIGSTOP);
        let child = nix::unistd::Pid::from_raw(meek.id().cast_signed());
        let stopped = nix::sys::wait::waitpid(child, Some(nix::sys::wait::WaitPidFlag::WUNTRACED));
        assert!(matches!(stopped, Ok(nix::sys::wait::WaitStatus::Stopped(..))), "{stopped:?}");
        meek.kill().expect("ours");
        assert_eq!(only(&reaper, &its).signal(), Some(libc::SIGKILL));
        watched.terminate(Duration::from_millis(20)).expect("ours");
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
        assert_no_child();
    });
}

/// An arrangement that cannot be made changes nothing.
#[test]
fn an_owner_that_cannot_be_changes_nothing() {
    isolated("an_owner_that_cannot_be_changes_nothing", 60, || {
        let free = disposition(libc::SIGCHLD);
        let reaper = Reaper::new().expect("a reaper");
        for owner in [SigchldOwner::Always, SigchldOwner::MainLoop] {
            let all = take_all();
            assert!(reaper.set_owner(owner).is_err_and(|e| is_full(&e)), "{owner:?}");
            drop(all);
            assert_eq!(disposition(libc::SIGCHLD), free);
            // The stranger is left alone, and the reaper's own are told of as before.
            let pid = foreign(|| 7);
            let (_, exits) = watch(&reaper, ends_with(3));
            assert_eq!(only(&reaper, &exits).code(), Some(3), "{owner:?}");
            assert_eq!(common::reap(pid, SOON), common::Verdict::Exited(7), "{owner:?}");
        }
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        let (send, unknown) = crossbeam_channel::unbounded();
        reaper.on_unknown(move |exit| {
            send.send(exit.clone()).expect("the test waits");
            carefork::Claim::Mine
        });
        let pid = foreign(|| 7);
        assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
        // The handler is there, and the reaper cannot hear of it.
        reaper.set_owner(SigchldOwner::Nobody).expect("given up");
        common::seccomp_refuse(&[(libc::SYS_epoll_ctl, libc::ENOSPC)]).expect("a filter");
        assert!(reaper.set_owner(SigchldOwner::Always).is_err_and(|e| e.raw_os_error() == Some(libc::ENOSPC)));
        assert_eq!((disposition(libc::SIGCHLD), reaper.sigchld()), (free, carefork::Sigchld::Free));
    });
}

/// A child that cannot be watched comes back as it was, the ends of its pipes included.
#[test]
fn a_refused_child_comes_back_whole() {
    isolated("a_refused_child_comes_back_whole", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("cat");
        common::seccomp_refuse(&[(libc::SYS_epoll_ctl, libc::ENOSPC)]).expect("a filter");
        let refused = reaper.watch(child, |_| ()).expect_err("no room in epoll");
        assert_eq!(refused.error.raw_os_error(), Some(libc::ENOSPC));
        let mut child = refused.into_child();
        child.stdin.as_mut().expect("its pipe").write_all(b"hello").expect("written");
        drop(child.stdin.take());
        let mut said = String::new();
        child.stdout.as_mut().expect("its pipe").read_to_string(&mut said).expect("read");
        assert_eq!(said, "hello");
        assert!(child.wait().expect("a status").success());
    });
}

/// Another reaper has taken its status, and there is no descriptor for the alarm that would tell of that.
#[test]
fn a_status_from_before_the_watch_is_told_of() {
    isolated("a_status_from_before_the_watch_is_told_of", 60, || {
        let always = owner(SigchldOwner::Always);
        for mode in [SigchldOwner::Nobody, SigchldOwner::MainLoop] {
            let reaper = owner(mode);
            let child = ends_with(5);
            until_dead(child.id());
            always.dispatch().expect("dispatch");
            let all = take_all();
            let (watched, exits) = watch(&reaper, child);
            drop(all);
            raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
            assert!(is_readable(&reaper), "nothing tells of it");
            assert_eq!(only(&reaper, &exits).code(), Some(5));
            assert!(!watched.is_watched() && !is_readable(&reaper));
        }
        assert_no_child();
    });
}
