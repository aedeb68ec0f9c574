//! Programs beside an owner of SIGCHLD and other waits of the process: nobody takes theirs for a stranger, or a stranger for theirs
//! (C1, C4, X1).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;

use carefork::{Claim, Command, Reaper, SigchldOwner};
use common::{isolated, seccomp_refuse};
use drive::{Stop, freeze, gettid, inside, on_signal, signal_thread, until, until_shut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::SeqCst};
use std::thread;

/// Whether this process has no child, dead or alive. Takes nobody's status.
fn is_childless() -> bool {
    // SAFETY: siginfo_t is plain data.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is live.
    let r = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) };
    r == -1 && common::raw::errno() == libc::ECHILD
}

/// How often the owner has looked round.
static ROUNDS: AtomicU32 = AtomicU32::new(0);

/// Runs `f` while a reaper on another thread owns SIGCHLD and reaps what it finds; the children that it knew nothing of.
fn beside_an_owner(f: impl FnOnce()) -> Vec<String> {
    let reaper = Reaper::new().expect("a reaper");
    let unknown = Arc::new(std::sync::Mutex::new(Vec::new()));
    let told = Arc::clone(&unknown);
    reaper.on_unknown(move |exit| {
        told.lock().expect("no panic").push(exit.to_string());
        Claim::Mine
    });
    reaper.set_owner(SigchldOwner::Always).expect("the signal");
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        let _end = Stop(&stop);
        s.spawn(|| {
            while !stop.load(SeqCst) {
                reaper.dispatch().expect("no disaster");
                ROUNDS.fetch_add(1, SeqCst);
            }
        });
        f();
        let seen = ROUNDS.load(SeqCst);
        until(|| ROUNDS.load(SeqCst) > seen + 3);
    });
    let unknown = unknown.lock().expect("no panic");
    unknown.clone()
}

static CAUGHT: AtomicBool = AtomicBool::new(false);

/// On the thread that starts a program, when its signals are let through again: the program ends, the owner takes its status.
extern "C" fn waits_for_the_end(_: i32) {
    until(is_childless);
    let seen = ROUNDS.load(SeqCst);
    until(|| ROUNDS.load(SeqCst) > seen + 3);
    CAUGHT.store(true, SeqCst);
}

#[test]
fn a_program_that_ends_before_it_is_known_is_no_stranger() {
    isolated("a_program_that_ends_before_it_is_known_is_no_stranger", 30, || {
        static STARTER: AtomicI32 = AtomicI32::new(0);
        on_signal(libc::SIGUSR1, waits_for_the_end);
        freeze();
        let unknown = beside_an_owner(|| {
            let region = inside("in the way");
            thread::scope(|s| {
                s.spawn(|| {
                    STARTER.store(gettid(), SeqCst);
                    let mut child = Command::new("sh").args(["-c", "exit 7"]).spawn().expect("it starts");
                    assert!(CAUGHT.load(SeqCst));
                    assert_eq!(child.wait().expect("its own status").code(), Some(7));
                });
                until(|| STARTER.load(SeqCst) != 0);
                // Its signals are blocked from here until the program runs.
                until_shut();
                signal_thread(STARTER.load(SeqCst), libc::SIGUSR1);
                region.leave();
            });
        });
        assert_eq!(unknown, [""; 0]);
    });
}

/// Their children end at once, and the owner may be the first to see it.
#[test]
fn programs_that_do_not_start_are_nobodys() {
    isolated("programs_that_do_not_start_are_nobodys", 60, || {
        let unknown = beside_an_owner(|| {
            for _ in 0..300 {
                Command::new("/no/such/program").spawn().expect_err("there is none");
            }
        });
        assert_eq!(unknown, [""; 0]);
        assert!(is_childless());
    });
}

/// A wait by number might take another child's status, should the number have come round.
#[test]
fn a_program_that_does_not_start_is_reaped_by_pidfd() {
    isolated("a_program_that_does_not_start_is_reaped_by_pidfd", 30, || {
        seccomp_refuse(&[(libc::SYS_wait4, libc::EPERM)]).expect("a filter");
        Command::new("/no/such/program").spawn().expect_err("there is none");
        assert!(is_childless());
    });
}

/// Where there are no pidfds, or waits by them, the number has to do.
#[test]
fn without_a_pidfd_it_is_reaped_by_number() {
    isolated("without_a_pidfd_it_is_reaped_by_number", 30, || {
        seccomp_refuse(&[(libc::SYS_waitid, libc::ENOSYS)]).expect("a filter");
        Command::new("/no/such/program").spawn().expect_err("there is none");
        // SAFETY: no status is asked for.
        let r = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        assert_eq!((r, common::raw::errno()), (-1, libc::ECHILD));
    });
}
