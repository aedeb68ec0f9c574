//! Started in a region, in a hook, in a child, and with carefork switched off.

use crate::common::{Setup, isolated, isolated_with};
use crate::kit::{self, State};
use carefork::{Command, CommandError, ForkError};
use std::thread;
use std::time::Duration;

#[test]
fn in_ones_own_region_it_is_refused() {
    isolated("anywhere::in_ones_own_region_it_is_refused", 30, || {
        let region = carefork::no_forking();
        let e = Command::new("true").spawn().expect_err("inside a region");
        assert_eq!(carefork::stats().refused, 1);
        assert!(matches!(e, CommandError::Fork(ForkError::Forbidden { .. })), "{e}");
        drop(region);
        // A lock may be held, as over a fork (G5).
        let lock = carefork::Mutex::new(1);
        let guard = lock.lock();
        assert!(Command::new("true").status().expect("it starts").success());
        drop(guard);
        let elsewhere = kit::InRegion::new("reader");
        let before = State::now();
        let e = Command::new("true").timeout(Duration::from_millis(50)).spawn().expect_err("past the budget");
        let CommandError::Fork(ForkError::Busy { culprits }) = &e else { panic!("{e:?}") };
        assert_eq!((culprits.count, culprits.threads[0].name.as_str()), (1, "reader"), "{e}");
        // Its own way out, not a fork's, also where somebody prints the chain of causes.
        let text = format!("{e}; {:?}", std::error::Error::source(&e));
        assert!(text.contains("Command::timeout") && !text.contains("ForkOptions"), "{text}");
        assert_eq!(State::now(), before);
        kit::assert_no_child();
        drop(elsewhere);
        kit::assert_gate_open();
        assert!(Command::new("true").status().expect("it starts").success());
    });
}

/// A start is no fork in a hook's eyes, but a hook may not start programs in the middle of one.
#[test]
fn hooks_are_not_run_and_cannot_start_programs() {
    isolated("anywhere::hooks_are_not_run_and_cannot_start_programs", 30, || {
        let calls = kit::Calls::new();
        let registration = calls.register("counted");
        assert!(Command::new("true").status().expect("it starts").success());
        assert_eq!(calls.ran(), kit::Ran::default());
        drop(registration);
        let refused = kit::shared();
        let starts = move || {
            let e = Command::new("true").spawn();
            let is = matches!(e, Err(CommandError::Fork(ForkError::InFork)));
            refused[0].store(1 + u64::from(is), std::sync::atomic::Ordering::SeqCst);
        };
        let registration = carefork::register(carefork::Hook::new("starts").prepare(starts));
        let mut child = kit::forked(&carefork::ForkOptions::new(), |_| 0);
        assert_eq!((kit::code(&mut child), refused[0].load(std::sync::atomic::Ordering::SeqCst)), (0, 2));
        drop(registration);
    });
}

#[test]
fn turned_off_programs_start_all_the_same() {
    let setup = Setup { env: vec![("CAREFORK".to_owned(), "off".to_owned())], ..Setup::default() };
    isolated_with("anywhere::turned_off_programs_start_all_the_same", 30, setup, || {
        let _region = carefork::no_forking();
        let before = State::now();
        assert!(Command::new("true").status().expect("it starts").success());
        assert!(Command::new("/nonexistent").status().is_err());
        assert_eq!(State::now(), before);
    });
}

/// In a child that does not exec, from a thread with little stack, and many generations down.
#[test]
fn programs_are_started_from_anywhere() {
    isolated("anywhere::programs_are_started_from_anywhere", 60, || {
        let started = || Command::new("true").status().is_ok_and(|s| s.success());
        let small = thread::Builder::new().stack_size(64 * 1024).spawn(started).expect("a thread");
        assert!(small.join().expect("no panic"));
        let shell = || {
            let status = Command::new("sh").args(["-c", "exit 7"]).status();
            status.ok().and_then(|s| s.code()).unwrap_or(1)
        };
        let child = || {
            // SAFETY: neither child uses a descriptor that the clean-up closes.
            let grandchild = unsafe { carefork::spawn(shell) };
            match grandchild.map(|mut c| c.wait().ok().and_then(|s| s.code())) {
                Ok(Some(7)) if started() => 9,
                _ => 2,
            }
        };
        // SAFETY: as above.
        let mut child = unsafe { carefork::spawn(child) }.expect("a child");
        assert_eq!(kit::code(&mut child), 9);
    });
}
