//! `Child`: wait, kill, pidfd, and what becomes of it where the kernel refuses a pidfd or somebody else takes the status.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::{Child, ForkOptions};
use common::{Refuse, Setup, isolated, isolated_with, raw};
use kit::{SOON, assert_no_child, code, forked, shared};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

fn sleeper() -> Child {
    sleeper_with(&ForkOptions::new())
}

fn sleeper_with(options: &ForkOptions<'_>) -> Child {
    forked(options, |_| {
        loop {
            thread::sleep(Duration::from_secs(3600));
        }
    })
}

fn is_alive(pid: u32) -> bool {
    let mut buf = [0; 512];
    let path = std::ffi::CString::new(format!("/proc/{pid}/stat")).expect("no NUL");
    // The state comes after the name in brackets.
    raw::read_into(&path, &mut buf).is_ok_and(|text| !text.windows(4).any(|w| w == b") Z " || w == b") X "))
}

fn has_pidfds() -> bool {
    raw::pidfd_open(raw::getpid()).is_some()
}

/// What every child offers, with and without a pidfd.
fn life_and_death() {
    lives_and_dies(true);
}

fn lives_and_dies(watched: bool) {
    let options = &ForkOptions::new().pidfd(watched);
    let mut child = forked(options, |_| 42);
    assert_eq!(child.pidfd().is_some(), watched && has_pidfds());
    assert_eq!(child.wait().expect("a status").code(), Some(42));
    // The same again, by each way to ask.
    assert_eq!(child.wait().expect("a status").code(), Some(42));
    assert_eq!(child.try_wait().expect("a status").and_then(|s| s.code()), Some(42));
    assert_eq!(child.wait_timeout(Duration::ZERO).expect("a status").and_then(|s| s.code()), Some(42));
    // Reaped: nobody is killed, and it is no error.
    child.kill().expect("left alone");
    assert_no_child();

    let mut child = sleeper_with(options);
    assert!(matches!(child.try_wait(), Ok(None)));
    let begun = Instant::now();
    assert!(matches!(child.wait_timeout(Duration::from_millis(30)), Ok(None)));
    assert!(begun.elapsed() >= Duration::from_millis(30));
    assert!(is_alive(child.id()));
    child.kill().expect("it is ours");
    let status = child.wait_timeout(SOON).expect("a status").expect("in time");
    assert_eq!((status.code(), status.signal()), (None, Some(libc::SIGKILL)));
    assert_no_child();

    // Dead and not reaped.
    let mut child = forked(options, |_| 1);
    while is_alive(child.id()) {
        thread::yield_now();
    }
    child.kill().expect("it is still ours");
    assert_eq!(child.wait().expect("a status").code(), Some(1));

    let mut child = sleeper_with(options);
    child.signal(libc::SIGTERM).expect("it is ours");
    assert_eq!(code(&mut child), -libc::SIGTERM);

    // Neither killed nor waited for.
    let child = sleeper_with(options);
    let pid = child.id();
    drop(child);
    assert!(is_alive(pid));
    // SAFETY: a child of ours that nobody has reaped.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
    assert_eq!(common::reap(pid as i32, SOON), common::Verdict::Signaled(libc::SIGKILL));
    stolen();
}

/// Takes every child's status away.
fn steal() {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {}
}

fn stolen() {
    let lost =
        |r: std::io::Result<_>| assert_eq!(r.map(|_: ()| ()).map_err(|e| e.raw_os_error()), Err(Some(libc::ECHILD)));
    let mut child = forked(&ForkOptions::new(), |_| 42);
    steal();
    lost(child.wait().map(drop));
    lost(child.try_wait().map(drop));
    lost(child.wait_timeout(SOON).map(drop));
    // The number may be anybody's by now.
    child.kill().expect("left alone");

    // While somebody sleeps in it.
    let mut child = sleeper();
    let pid = child.id() as i32;
    thread::scope(|s| {
        s.spawn(move || {
            thread::sleep(Duration::from_millis(20));
            // SAFETY: a child of ours that nobody has reaped.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            steal();
        });
        match child.wait_timeout(SOON) {
            Ok(Some(status)) => assert_eq!(status.signal(), Some(libc::SIGKILL)),
            other => lost(other.map(drop)),
        }
    });

    // With SIGCHLD ignored nobody gets a status.
    kit::ignore(libc::SIGCHLD);
    let mut child = forked(&ForkOptions::new(), |_| 42);
    lost(child.wait().map(drop));
    let mut child = forked(&ForkOptions::new(), |_| 42);
    lost(child.wait_timeout(SOON).map(drop));
}

#[test]
fn with_a_pidfd() {
    isolated("with_a_pidfd", 30, life_and_death);
}

#[test]
fn by_number_where_asked_for() {
    isolated("by_number_where_asked_for", 30, || lives_and_dies(false));
}

#[test]
fn without_a_pidfd() {
    for (i, refuse) in [
        vec![Refuse::call(libc::SYS_pidfd_open, libc::ENOSYS)],
        vec![Refuse::call(libc::SYS_pidfd_open, libc::EPERM), Refuse::call(libc::SYS_pidfd_send_signal, libc::EPERM)],
        vec![Refuse::call(libc::SYS_pidfd_send_signal, libc::ENOSYS)],
        vec![Refuse::call(libc::SYS_pidfd_send_signal, libc::EPERM)],
    ]
    .into_iter()
    .enumerate()
    {
        let setup = Setup { refuse, env: vec![("CASE".to_owned(), i.to_string())], ..Setup::default() };
        isolated_with("without_a_pidfd", 30, setup, life_and_death);
    }
}

#[test]
fn the_pidfd_is_the_childs_and_is_not_inherited() {
    isolated("the_pidfd_is_the_childs_and_is_not_inherited", 20, || {
        if !has_pidfds() {
            return;
        }
        let mut child = sleeper();
        let fd = child.pidfd().expect("a pidfd").as_raw_fd();
        // SAFETY: only asks.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_GETFD) }, libc::FD_CLOEXEC);
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).expect("/proc");
        assert!(info.lines().any(|l| l == format!("Pid:\t{}", child.id())), "{info}");
        let ready = || {
            let mut p = [raw::pollfd(fd)];
            raw::poll_readable(&mut p, Duration::ZERO);
            p[0].revents != 0
        };
        assert!(!ready());
        child.kill().expect("it is ours");
        assert_eq!(code(&mut child), -libc::SIGKILL);
        assert!(ready());
        drop(child);
        assert_eq!(common::self_fds().as_slice(), [0, 1, 2]);
    });
}

/// One that was dropped is reaped by the next look at any other.
#[test]
fn a_dropped_child_is_reaped_by_a_look_at_another() {
    isolated("a_dropped_child_is_reaped_by_a_look_at_another", 20, || {
        let mut other = sleeper();
        let looks: [fn(&mut Child); 2] = [
            |other| assert!(matches!(other.try_wait(), Ok(None))),
            |other| assert!(matches!(other.wait_timeout(Duration::ZERO), Ok(None))),
        ];
        for look in looks {
            let dropped = sleeper();
            let pid = dropped.id();
            drop(dropped);
            // SAFETY: a child of ours that nobody has reaped.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
            // Not by /proc, which has it dead an instant before its pidfd says so.
            // SAFETY: no status is asked for.
            let r = unsafe { libc::waitid(libc::P_PID, pid, std::ptr::null_mut(), libc::WEXITED | libc::WNOWAIT) };
            assert_eq!(r, 0);
            look(&mut other);
            assert!(std::fs::metadata(format!("/proc/{pid}")).is_err(), "a zombie stays");
        }
        other.kill().expect("ours");
        assert_eq!(code(&mut other), -libc::SIGKILL);
        assert_no_child();
    });
}

/// As event loops make what they watch (`async_io::Async::new`).
#[test]
fn a_pidfd_that_was_made_non_blocking() {
    isolated("a_pidfd_that_was_made_non_blocking", 20, || {
        let mut child = sleeper();
        let Some(fd) = child.pidfd().map(|fd| fd.as_raw_fd()) else { return };
        // SAFETY: a flag of this descriptor.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) }, 0);
        let pid = child.id() as i32;
        thread::scope(|s| {
            let waits = s.spawn(|| child.wait());
            thread::sleep(Duration::from_millis(50));
            assert!(!waits.is_finished());
            // SAFETY: a child of ours that nobody has reaped.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            assert_eq!(waits.join().expect("no panic").expect("a status").signal(), Some(libc::SIGKILL));
        });
    });
}

/// C6: the parent's children are not the child's.
#[test]
fn in_a_child_the_parents_children_are_nobodys() {
    isolated("in_a_child_the_parents_children_are_nobodys", 20, || {
        let seen = shared();
        let mut sibling = sleeper();
        let echild = |e: std::io::Error| e.raw_os_error() == Some(libc::ECHILD);
        let mut refuses = |base: usize| {
            let all = [
                sibling.kill().is_err_and(echild),
                sibling.signal(libc::SIGTERM).is_err_and(echild),
                sibling.wait().is_err_and(echild),
                sibling.try_wait().is_err_and(echild),
                sibling.wait_timeout(SOON).is_err_and(echild),
                // Open until the clean-up, and a panic never.
                sibling.pidfd().is_none_or(|fd| fd.as_raw_fd() > 2),
            ];
            all.into_iter().enumerate().for_each(|(i, ok)| seen[base + i].store(ok.into(), SeqCst));
            0
        };
        assert_eq!(
            code(&mut forked(&ForkOptions::new(), |token| {
                drop(token);
                refuses(0)
            })),
            0
        );
        // And in its child, and in one made by foreign code.
        let mut child = forked(&ForkOptions::new(), |_| code(&mut forked(&ForkOptions::new(), |_| refuses(6))));
        assert_eq!(code(&mut child), 0);
        assert_eq!(common::reap(kit::foreign(|| refuses(12)), SOON), common::Verdict::Exited(0));
        assert!(seen[..18].iter().all(|s| s.load(SeqCst) == 1), "{:?}", &seen[..18]);
        assert!(is_alive(sibling.id()), "a signal was sent");
        assert!(matches!(sibling.try_wait(), Ok(None)));
        sibling.kill().expect("it is ours");
        assert_eq!(code(&mut sibling), -libc::SIGKILL);
        assert_no_child();
    });
}
