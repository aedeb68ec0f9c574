//! A replacement for libc's fork (C5).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::{ForkError, ForkOptions, ForkReplacement, Hook, set_fork_replacement};
use common::{isolated, raw};
use kit::{Calls, InRegion, Ran, assert_gate_open, assert_no_child, code, forked};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::time::Duration;

static SEEN: AtomicI32 = AtomicI32::new(0);

unsafe fn noted() -> i32 {
    // SAFETY: the caller's promise.
    let pid = unsafe { libc::fork() };
    if pid > 0 {
        SEEN.store(pid, SeqCst);
    }
    pid
}

unsafe fn cloned() -> i32 {
    // SAFETY: the arguments of a fork; no at-fork handler runs.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } as i32;
    if pid > 0 {
        SEEN.store(pid, SeqCst);
    }
    pid
}

unsafe fn fails() -> i32 {
    nix::errno::Errno::set_raw(libc::EAGAIN);
    -1
}

const BOTH: [ForkReplacement; 2] = [ForkReplacement::Calls(noted), ForkReplacement::Bare(cloned)];

fn set(replacement: Option<ForkReplacement>) {
    // SAFETY: the functions above answer as fork does.
    unsafe { set_fork_replacement(replacement) };
}

#[test]
fn every_pid_is_seen_and_everything_at_rest() {
    isolated("every_pid_is_seen_and_everything_at_rest", 60, || {
        static LOCK: carefork::Mutex<u32> = carefork::Mutex::new(0);
        let calls = Calls::new();
        let _hook = calls.register("counted");
        for (i, replacement) in (1..).zip(BOTH) {
            set(Some(replacement));
            let mut child = forked(&ForkOptions::new(), |_| {
                let rested = LOCK.try_lock().is_some() && !carefork::lineage().dirty && !carefork::lineage().bypass;
                if rested && carefork::fork_generation() == 1 { 3 } else { 4 }
            });
            assert_eq!(child.id().cast_signed(), SEEN.load(SeqCst));
            assert_eq!(code(&mut child), 3);
            assert_eq!(calls.ran(), Ran { prepare: i, parent: i, child: i, cleanup: i, ..Ran::default() });
            assert_gate_open();
        }
        set(None);
        SEEN.store(0, SeqCst);
        assert_eq!(code(&mut forked(&ForkOptions::new(), |_| 5)), 5);
        assert_eq!(SEEN.load(SeqCst), 0);
        assert_no_child();
    });
}

#[test]
fn refused_and_failed() {
    isolated("refused_and_failed", 60, || {
        // SAFETY: a child would exit at once.
        let fork = |options: &ForkOptions<'_>| unsafe { options.fork() }.map(|_| ()).expect_err("no child");
        for replacement in BOTH {
            set(Some(replacement));
            let busy = InRegion::new("busy");
            let refused = fork(&ForkOptions::new().timeout(Duration::from_millis(20)));
            assert!(matches!(refused, ForkError::Busy { .. }), "{refused:?}");
            drop(busy);
            let veto = carefork::register(Hook::new("veto").try_prepare(|| Err("no".into())));
            assert!(matches!(fork(&ForkOptions::new()), ForkError::Vetoed { .. }));
            drop(veto);
            assert_gate_open();
            assert_no_child();
        }
        // No child was made: hooks hear of it, the error says why.
        let calls = Calls::new();
        let _hook = calls.register("counted");
        set(Some(ForkReplacement::Bare(fails)));
        let ForkError::Os(e) = fork(&ForkOptions::new()) else { panic!("another error") };
        assert_eq!(e.raw_os_error(), Some(libc::EAGAIN));
        assert_eq!(calls.ran(), Ran { prepare: 1, undo: 1, ..Ran::default() });
        assert_gate_open();
        raw::Line::new().text("done").send();
    });
}

/// The fork fails, the next one does not, and everything is as it was.
#[test]
fn one_that_panics() {
    isolated("one_that_panics", 60, || {
        unsafe fn before() -> i32 {
            panic!("on purpose")
        }
        unsafe fn in_child() -> i32 {
            // SAFETY: the caller's promise.
            let pid = unsafe { libc::fork() };
            assert_ne!(pid, 0, "on purpose");
            pid
        }
        std::panic::set_hook(Box::new(|_| ()));
        let calls = Calls::new();
        let _hook = calls.register("counted");
        for replacement in [ForkReplacement::Calls(before), ForkReplacement::Bare(before)] {
            let state = kit::State::now();
            set(Some(replacement));
            // SAFETY: there is no child.
            let failed = unsafe { ForkOptions::new().fork() }.map(|_| ()).expect_err("no child");
            assert!(matches!(failed, ForkError::Os(e) if e.raw_os_error() == Some(libc::ECANCELED)));
            assert_eq!(kit::State::now(), state);
            assert_gate_open();
            set(None);
            assert_eq!(code(&mut forked(&ForkOptions::new(), |_| 5)), 5);
            let pid = kit::foreign(|| i32::from(carefork::lineage().dirty));
            assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Exited(0));
        }
        assert_eq!(calls.ran().undo, 1);
        set(Some(ForkReplacement::Calls(in_child)));
        assert_eq!(code(&mut forked(&ForkOptions::new(), |_| 5)), 101);
        raw::Line::new().text("done").send();
    });
}

/// Whether there is a child is what the replacement answers, not what it leaves in errno.
#[test]
fn errno_is_the_replacements_own() {
    isolated("errno_is_the_replacements_own", 60, || {
        unsafe fn careless() -> i32 {
            // SAFETY: the caller's promise.
            let pid = unsafe { cloned() };
            nix::errno::Errno::set_raw(libc::EAGAIN);
            pid
        }
        unsafe fn refuses() -> i32 {
            nix::errno::Errno::set_raw(libc::EINVAL);
            -1
        }
        let calls = Calls::new();
        let _hook = calls.register("counted");
        set(Some(ForkReplacement::Bare(careless)));
        assert_eq!(code(&mut forked(&ForkOptions::new(), |_| 5)), 5);
        assert_eq!(calls.ran(), Ran { prepare: 1, parent: 1, child: 1, cleanup: 1, ..Ran::default() });
        set(Some(ForkReplacement::Bare(refuses)));
        // SAFETY: there is no child.
        let refused = unsafe { ForkOptions::new().fork() }.map(|_| ()).expect_err("no child");
        assert!(matches!(refused, ForkError::Os(e) if e.raw_os_error() == Some(libc::EINVAL)));
        assert_eq!(calls.ran(), Ran { prepare: 2, undo: 1, parent: 1, child: 1, cleanup: 1 });
        assert_gate_open();
    });
}
