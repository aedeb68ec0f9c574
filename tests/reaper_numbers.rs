//! Numbers that come round again under every arrangement of SIGCHLD: each status goes to its own child, or is lost (C1, C3, C4).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod numbers;
mod watching;

use carefork::{Child, ForkOptions, ForkReplacement, Reaper, SigchldOwner, set_fork_replacement};
use common::{Refuse, Setup, isolated, isolated_with};
use kit::{InRegion, code, foreign, forked};
use numbers::{child_with, in_a_namespace, next_pid, steal};
use std::os::unix::process::ExitStatusExt as _;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;
use watching::{kill, only, owner, sleep_on, sleeper, strangers, until_dead, watch, without_pidfds};

fn sleeper_with(pid: u32) -> Child {
    next_pid(pid);
    let child = sleeper();
    assert_eq!(child.id(), pid, "somebody forks here");
    child
}

fn end(mut child: Child) {
    child.kill().expect("ours");
    assert_eq!(code(&mut child), -libc::SIGKILL);
}

/// The owner has taken two statuses for their holders, and both numbers are others' when those ask.
#[test]
fn a_status_waits_for_its_holder_whoever_has_the_number() {
    isolated("a_status_waits_for_its_holder_whoever_has_the_number", 60, || {
        in_a_namespace(|| {
            let (always, other) = (owner(SigchldOwner::Always), Reaper::new().expect("a reaper"));
            let unknown = strangers(&always);
            let mut held = child_with(300, &ForkOptions::new(), 1);
            let (_watched, exits) = watch(&other, child_with(301, &ForkOptions::new(), 2));
            until_dead(300);
            until_dead(301);
            always.dispatch().expect("dispatch");
            let later = [sleeper_with(300), sleeper_with(301)];
            assert_eq!(code(&mut held), 1);
            assert_eq!(only(&other, &exits).code(), Some(2));
            assert!(unknown.is_empty());
            later.into_iter().for_each(end);
        });
    });
}

/// The same by number, and a stranger has it by then: that one is neither waited for nor signalled.
#[test]
fn a_number_that_was_given_up_is_nobodys() {
    isolated_with("a_number_that_was_given_up_is_nobodys", 60, without_pidfds(), || {
        in_a_namespace(|| {
            let (always, other) = (owner(SigchldOwner::Always), Reaper::new().expect("a reaper"));
            let unknown = strangers(&always);
            let mut held = child_with(300, &ForkOptions::new(), 1);
            let (watched, exits) = watch(&other, child_with(301, &ForkOptions::new(), 2));
            until_dead(300);
            until_dead(301);
            always.dispatch().expect("dispatch");
            for pid in [300, 301] {
                next_pid(pid);
                assert_eq!(foreign(sleep_on).cast_unsigned(), pid);
            }
            held.kill().expect("left alone");
            watched.kill().expect("left alone");
            assert_eq!(code(&mut held), 1);
            assert_eq!(only(&other, &exits).code(), Some(2));
            assert!(unknown.is_empty());
            for pid in [300, 301] {
                kill(pid, libc::SIGTERM);
                assert_eq!(steal(pid).signal(), Some(libc::SIGTERM), "a stranger was hit");
            }
        });
    });
}

/// Between the main loop's wait and its word another thread's fork was given the number.
#[test]
fn the_main_loops_word_ends_nobody_who_lives() {
    isolated("the_main_loops_word_ends_nobody_who_lives", 60, || {
        in_a_namespace(|| {
            let reaper = owner(SigchldOwner::MainLoop);
            let (_, first) = watch(&reaper, child_with(300, &ForkOptions::new(), 1));
            let status = steal(300);
            let (watched, second) = watch(&reaper, sleeper_with(300));
            let mut held = sleeper_with(301);
            assert!(reaper.reaped(300, status).is_err());
            assert!(reaper.reaped(301, status).is_err());
            assert!(second.is_empty() && watched.is_watched());
            assert!(matches!(held.try_wait(), Ok(None)));
            // The first one's own pidfd tells what has become of it.
            reaper.sigchld_occurred().expect("a look");
            assert!(first.try_recv().is_ok_and(|exit| exit.is_lost()));
            watched.kill().expect("ours");
            let status = steal(300);
            reaper.reaped(300, status).expect("known, and dead");
            assert_eq!(second.try_recv().map(|exit| exit.signal()), Ok(Some(libc::SIGKILL)));
            end(held);
        });
    });
}

/// The same by number: a child that a wait would find is not the one that was waited for.
#[test]
fn the_main_loops_word_ends_nobody_who_lives_by_number() {
    isolated_with("the_main_loops_word_ends_nobody_who_lives_by_number", 60, without_pidfds(), || {
        in_a_namespace(|| {
            let reaper = owner(SigchldOwner::MainLoop);
            let (_, first) = watch(&reaper, child_with(300, &ForkOptions::new(), 1));
            let status = steal(300);
            let (watched, second) = watch(&reaper, sleeper_with(300));
            let _stolen = child_with(301, &ForkOptions::new(), 1);
            steal(301);
            let mut held = sleeper_with(301);
            assert!(reaper.reaped(300, status).is_err());
            assert!(reaper.reaped(301, status).is_err());
            assert!(second.is_empty() && watched.is_watched());
            assert!(matches!(held.try_wait(), Ok(None)));
            reaper.sigchld_occurred().expect("a look");
            assert!(first.try_recv().is_ok_and(|exit| exit.is_lost()));
            watched.kill().expect("ours");
            let status = steal(300);
            reaper.reaped(300, status).expect("known, and dead");
            assert_eq!(second.try_recv().map(|exit| exit.signal()), Ok(Some(libc::SIGKILL)));
            held.kill().expect("ours");
            reaper.reaped(301, steal(301)).expect("held by hand");
            assert_eq!(code(&mut held), -libc::SIGKILL);
        });
    });
}

/// pidfds that cannot be waited by, as before Linux 5.4: they tell all the same whose a number is.
#[test]
fn a_pidfd_that_cannot_be_waited_by_tells_whose_the_number_is() {
    let refuse = vec![Refuse::when(libc::SYS_waitid, 0, libc::P_PIDFD, libc::EINVAL)];
    let setup = Setup { refuse, ..Setup::default() };
    isolated_with("a_pidfd_that_cannot_be_waited_by_tells_whose_the_number_is", 60, setup, || {
        in_a_namespace(|| {
            let mut first = child_with(300, &ForkOptions::new(), 1);
            steal(300);
            let mut second = child_with(300, &ForkOptions::new(), 3);
            until_dead(300);
            assert!(first.wait().is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD)));
            assert_eq!(code(&mut second), 3);
            let reaper = Reaper::new().expect("a reaper");
            let (_, first) = watch(&reaper, child_with(301, &ForkOptions::new(), 1));
            steal(301);
            let (_, second) = watch(&reaper, child_with(301, &ForkOptions::new(), 3));
            until_dead(301);
            assert!(only(&reaper, &first).is_lost());
            assert_eq!(only(&reaper, &second).code(), Some(3));
        });
    });
}

/// A child whose status was stolen is written down when somebody wants that, and its number is a later child's by then.
#[test]
fn written_down_late_it_takes_no_place_of_a_later_child() {
    isolated("written_down_late_it_takes_no_place_of_a_later_child", 60, || {
        in_a_namespace(|| {
            let first = child_with(300, &ForkOptions::new(), 1);
            steal(300);
            next_pid(300);
            let mut second = forked(&ForkOptions::new().pidfd(false), |_| sleep_on());
            assert_eq!(second.id(), 300);
            let reaper = Reaper::new().expect("a reaper");
            let (_, exits) = watch(&reaper, first);
            assert!(matches!(second.try_wait(), Ok(None)), "alive, and known");
            assert!(only(&reaper, &exits).is_lost());
            end(second);
        });
    });
}

/// A stranger's status that came while some fork was under way is no later child's, whichever way that one's own is found.
#[test]
fn a_strangers_status_is_no_later_childs() {
    isolated("a_strangers_status_is_no_later_childs", 60, || {
        in_a_namespace(|| {
            let reaper = owner(SigchldOwner::MainLoop);
            next_pid(300);
            assert_eq!(foreign(|| 77), 300);
            let in_the_way = InRegion::new("in the way");
            thread::scope(|s| {
                let forks = s.spawn(|| forked(&ForkOptions::new().timeout_never(), |_| sleep_on()));
                while carefork::try_no_forking().is_some() {
                    thread::yield_now();
                }
                let status = steal(300);
                assert!(reaper.reaped(300, status).is_err());
                drop(in_the_way);
                end(forks.join().expect("a child"));
            });
            for before_the_word in [true, false] {
                let mut child = child_with(300, &ForkOptions::new(), 5);
                let status = steal(300);
                if before_the_word {
                    assert!(child.wait().is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD)));
                } else {
                    reaper.reaped(300, status).expect("held by hand");
                    assert_eq!(code(&mut child), 5);
                }
            }
        });
    });
}

/// Where the replacements of fork below are: the child that others are to find is made and dead; they have, and it goes on.
static MADE: AtomicBool = AtomicBool::new(false);
static FOUND: AtomicBool = AtomicBool::new(false);

fn wait_until_found() {
    MADE.store(true, SeqCst);
    while !FOUND.load(SeqCst) {
        thread::yield_now();
    }
}

/// Runs `forks` on another thread with this replacement of fork, and `meanwhile` when that is `wait_until_found`.
fn amid_a_fork(by: unsafe fn() -> i32, forks: impl FnOnce() -> Child + Send, meanwhile: impl FnOnce()) -> Child {
    // SAFETY: they call libc's fork.
    unsafe { set_fork_replacement(Some(ForkReplacement::Calls(by))) };
    let child = thread::scope(|s| {
        let forks = s.spawn(forks);
        while !MADE.load(SeqCst) {
            thread::yield_now();
        }
        meanwhile();
        FOUND.store(true, SeqCst);
        forks.join().expect("a child")
    });
    // SAFETY: libc's own.
    unsafe { set_fork_replacement(None) };
    child
}

/// Child 300, after a stranger with that number.
unsafe fn after_a_stranger() -> i32 {
    next_pid(300);
    assert_eq!(foreign(|| 77), 300);
    until_dead(300);
    wait_until_found();
    next_pid(300);
    // SAFETY: the caller's promise.
    unsafe { libc::fork() }
}

/// A stranger's status that came when the fork was announced, and its child not yet made.
#[test]
fn a_strangers_status_is_not_that_of_a_child_made_after_it() {
    isolated("a_strangers_status_is_not_that_of_a_child_made_after_it", 60, || {
        in_a_namespace(|| {
            let reaper = owner(SigchldOwner::Always);
            let unknown = strangers(&reaper);
            let child = amid_a_fork(after_a_stranger, sleeper, || {
                reaper.dispatch().expect("dispatch");
            });
            assert_eq!(child.id(), 300);
            let (watched, exits) = watch(&reaper, child);
            reaper.dispatch().expect("dispatch");
            assert!(exits.is_empty(), "it lives");
            assert_eq!(unknown.try_recv().map(|exit| exit.code()), Ok(Some(77)));
            watched.kill().expect("ours");
            assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
        });
    });
}

/// Child 300, which is dead and reaped when fork returns; a stranger has its number.
unsafe fn before_a_stranger() -> i32 {
    next_pid(300);
    // SAFETY: the caller's promise.
    let pid = unsafe { libc::fork() };
    if pid > 0 {
        until_dead(pid.cast_unsigned());
        wait_until_found();
        next_pid(300);
        // Not by libc, whose second fork would be another try of this one.
        // SAFETY: the child makes system calls only.
        let stranger = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if stranger == 0 {
            loop {
                // SAFETY: until it is killed.
                unsafe { libc::pause() };
            }
        }
        assert_eq!(stranger, pid.into());
    }
    pid
}

/// Child 300, which is dead when fork returns.
unsafe fn dead() -> i32 {
    next_pid(300);
    // SAFETY: the caller's promise.
    let pid = unsafe { libc::fork() };
    if pid > 0 {
        until_dead(pid.cast_unsigned());
        wait_until_found();
    }
    pid
}

/// By number, one whose status was stolen asks before the fork that was given its number has returned.
#[test]
fn a_stolen_child_gets_nothing_of_a_fork_under_way() {
    isolated_with("a_stolen_child_gets_nothing_of_a_fork_under_way", 60, without_pidfds(), || {
        in_a_namespace(|| {
            let reaper = Reaper::new().expect("a reaper");
            let mut held = child_with(300, &ForkOptions::new(), 1);
            steal(300);
            let (mut asked, mut waits) = (None, None);
            let mut child = amid_a_fork(
                dead,
                || forked(&ForkOptions::new(), |_| 55),
                || {
                    asked = Some(held.try_wait());
                    waits = Some(thread::spawn(move || held.wait()));
                    reaper.dispatch().expect("dispatch");
                    thread::sleep(Duration::from_millis(50));
                },
            );
            assert_eq!(child.id(), 300);
            assert!(!matches!(asked, Some(Ok(Some(_)))), "another's status");
            let waited = waits.expect("spawned").join().expect("no panic");
            assert!(waited.is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD)));
            assert_eq!(code(&mut child), 55);
        });
    });
}

/// By number a stranger's pidfd is to be had, which is a child of this process too.
#[test]
fn a_pidfd_is_not_that_of_the_numbers_next_child() {
    isolated("a_pidfd_is_not_that_of_the_numbers_next_child", 60, || {
        in_a_namespace(|| {
            let reaper = owner(SigchldOwner::Always);
            let mut child = amid_a_fork(
                before_a_stranger,
                || forked(&ForkOptions::new(), |_| 55),
                || {
                    reaper.dispatch().expect("dispatch");
                },
            );
            assert_eq!(child.id(), 300);
            child.kill().expect("left alone");
            assert_eq!(code(&mut child), 55);
            kill(300, libc::SIGKILL);
            steal(300);
        });
    });
}

/// Child 300, which other code has waited for; its number is a grandchild's.
unsafe fn before_a_grandchild() -> i32 {
    next_pid(300);
    // SAFETY: the caller's promise.
    let pid = unsafe { libc::fork() };
    if pid > 0 {
        steal(300);
        wait_until_found();
    }
    pid
}

/// C1: a pidfd that was opened by its number is this process's child's.
#[test]
fn a_pidfd_is_not_that_of_somebody_elses_child() {
    isolated("a_pidfd_is_not_that_of_somebody_elses_child", 60, || {
        in_a_namespace(|| {
            let [asked, made] = [0, 1].map(|i| &kit::shared()[i]);
            let parent = foreign(|| {
                while asked.load(SeqCst) == 0 {
                    thread::yield_now();
                }
                next_pid(300);
                assert_eq!(foreign(sleep_on), 300);
                made.store(1, SeqCst);
                sleep_on()
            });
            let child = amid_a_fork(
                before_a_grandchild,
                || forked(&ForkOptions::new(), |_| 55),
                || {
                    asked.store(1, SeqCst);
                    while made.load(SeqCst) == 0 {
                        thread::yield_now();
                    }
                },
            );
            assert!(child.id() == 300 && child.pidfd().is_none());
            for pid in [300, parent.cast_unsigned()] {
                kill(pid, libc::SIGKILL);
            }
        });
    });
}

/// Strangers of a process that never stops forking are told of: those forks began later, and have not made them.
#[test]
fn strangers_wait_for_no_later_fork() {
    isolated("strangers_wait_for_no_later_fork", 60, || {
        let reaper = owner(SigchldOwner::Always);
        let unknown = strangers(&reaper);
        let first = foreign(|| 7).cast_unsigned();
        until_dead(first);
        let in_the_way = InRegion::new("in the way");
        thread::scope(|s| {
            let fork = || forked(&ForkOptions::new().timeout_never(), |_| sleep_on());
            let earlier = s.spawn(fork);
            while carefork::try_no_forking().is_some() {
                thread::yield_now();
            }
            reaper.dispatch().expect("dispatch");
            assert!(unknown.is_empty(), "a fork is under way that may have made it");
            drop(in_the_way);
            end(earlier.join().expect("a child"));
            let in_the_way = InRegion::new("in the way again");
            let later = s.spawn(fork);
            while carefork::try_no_forking().is_some() {
                thread::yield_now();
            }
            reaper.dispatch().expect("dispatch");
            assert_eq!(unknown.try_recv().map(|exit| (exit.pid, exit.code())), Ok((first, Some(7))));
            drop(in_the_way);
            end(later.join().expect("a child"));
        });
    });
}
