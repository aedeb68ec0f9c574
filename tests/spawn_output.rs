//! What a child made by `spawn` says: its panic by one write, and what it printed (K1, L6).

// Forks, and descriptors moved about.
#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;
mod drive;
mod streams;

use carefork::stdio;
use common::{Setup, Verdict, isolated, isolated_with, reap};
use drive::{SOON, Stop, until};
use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use streams::{Capture, stderr_of};

/// Spawns a child that uses nothing of the parent's, and waits for it; its pid.
#[track_caller]
fn spawned(code: i32, f: impl FnOnce() -> i32) -> i32 {
    // SAFETY: as said above.
    let child = unsafe { carefork::spawn(f) }.expect("a child");
    let pid = child.id().cast_signed();
    assert_eq!(reap(pid, SOON), Verdict::Exited(code));
    pid
}

/// Spawns on the way out of a panic.
struct Spawns;

impl Drop for Spawns {
    fn drop(&mut self) {
        assert!(thread::panicking());
        spawned(3, || 3);
    }
}

fn spawn_on_the_way_out() {
    let unwound = catch_unwind(|| {
        let _spawns = Spawns;
        panic!("in the parent");
    });
    assert!(unwound.is_err());
}

/// Runs `f` while both streams are locked by a thread that a child does not have.
fn while_locked(f: impl FnOnce()) {
    let held = AtomicBool::new(false);
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        let _stop = Stop(&stop);
        s.spawn(|| {
            let _held = (std::io::stdout().lock(), std::io::stderr().lock());
            held.store(true, SeqCst);
            until(|| stop.load(SeqCst));
        });
        until(|| held.load(SeqCst));
        f();
    });
}

#[test]
fn a_panic_is_told_by_one_write() {
    isolated("a_panic_is_told_by_one_write", 60, || {
        let mut pid = 0;
        let said = stderr_of(|| while_locked(|| pid = spawned(101, || panic!("number {}", 7))));
        let at = format!("carefork: child {pid} panicked at tests/spawn_output.rs:");
        assert!(said.starts_with(&at) && said.ends_with(": number 7\n"), "{said:?}");
        assert_eq!(said.lines().count(), 1);
        // What is no text.
        let said = stderr_of(|| {
            spawned(101, || std::panic::panic_any(7));
        });
        assert!(said.ends_with(": (no text)\n"), "{said:?}");
        spawn_on_the_way_out();
    });
}

/// A panicking thread may not change the panic hook; `spawn` does not try.
#[test]
fn the_first_spawn_may_be_on_the_way_out_of_a_panic() {
    isolated("the_first_spawn_may_be_on_the_way_out_of_a_panic", 60, spawn_on_the_way_out);
}

#[test]
fn what_was_printed_is_flushed() {
    isolated("what_was_printed_is_flushed", 60, || {
        let guard = stdio::guard();
        let capture = Capture::new();
        let redirected = capture.on(1);
        print!("<parent>");
        spawned(0, || {
            print!("<child>");
            spawned(0, || {
                print!("<grandchild>");
                0
            });
            0
        });
        // One that panics has printed too.
        spawned(101, || {
            print!("<panics>");
            panic!("after printing")
        });
        drop(redirected);
        let words = ["child", "grandchild", "panics", "parent"].map(|word| (word.to_owned(), 1));
        assert_eq!(capture.words(), BTreeMap::from(words));
        drop(guard);
    });
}

/// Without the guard, and with everything turned off, std's locks are left alone.
#[test]
fn unguarded_streams_are_not_touched() {
    isolated("unguarded_streams_are_not_touched", 60, || {
        drop(stdio::guard());
        while_locked(|| {
            spawned(0, || 0);
        });
    });
}

#[test]
fn off_means_off() {
    let env = vec![("CAREFORK".to_owned(), "off".to_owned())];
    isolated_with("off_means_off", 60, Setup { env, ..Setup::default() }, || {
        let _guard = stdio::guard();
        while_locked(|| {
            spawned(0, || 0);
        });
    });
}
