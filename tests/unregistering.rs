//! A registration that is dropped while a fork has its hook (H1): the fork waits for who drops it, by sleeping, within its budget.

#![allow(unsafe_code, clippy::expect_used)]

mod common;
mod drive;

use carefork::{ForkError, ForkOptions, Hook, register, stats};
use common::{Verdict, isolated, reap};
use drive::{MS, SOON, a_while, fork_with, freeze, gettid, on_signal, signal_thread, until};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::{fs, thread};

static PREPARED: AtomicBool = AtomicBool::new(false);
static DROPPING: AtomicI32 = AtomicI32::new(0);
static STOPPED: AtomicBool = AtomicBool::new(false);
static GO: AtomicBool = AtomicBool::new(false);

extern "C" fn stops(_: i32) {
    STOPPED.store(true, SeqCst);
    until(|| GO.load(SeqCst));
}

fn is_asleep(tid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/self/task/{tid}/stat")).expect("it lives");
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S'))
}

/// Hooks by rising rank: one that is dropped while the fork has it, one that waits for that, one whose turn comes then. Whoever drops is
/// stopped where it waits, for as long as `meanwhile` runs.
fn fork_while_dropping(meanwhile: impl FnOnce() + Send, options: &ForkOptions<'_>) -> Result<i32, ForkError> {
    on_signal(libc::SIGUSR1, stops);
    let dropped = register(Hook::new("dropped").rank(1).prepare(|| PREPARED.store(true, SeqCst)));
    let _waits = register(Hook::new("waits").rank(2).prepare(|| {
        if !STOPPED.load(SeqCst) {
            until(|| DROPPING.load(SeqCst) != 0 && is_asleep(DROPPING.load(SeqCst)));
            signal_thread(DROPPING.load(SeqCst), libc::SIGUSR1);
            until(|| STOPPED.load(SeqCst));
        }
    }));
    let _last = register(Hook::new("last").rank(3));
    freeze();
    thread::scope(|s| {
        s.spawn(move || {
            until(|| PREPARED.load(SeqCst));
            DROPPING.store(gettid(), SeqCst);
            drop(dropped);
        });
        s.spawn(|| {
            until(|| STOPPED.load(SeqCst));
            a_while();
            meanwhile();
            GO.store(true, SeqCst);
        });
        let end = fork_with(options, || 0);
        GO.store(true, SeqCst);
        end
    })
}

#[test]
fn a_fork_sleeps_while_somebody_drops_a_registration() {
    isolated("a_fork_sleeps_while_somebody_drops_a_registration", 30, || {
        let walks = || {
            let walks = stats().hooks.count;
            assert!(walks < 20, "{walks} times along the hooks while a thread was stopped");
        };
        let pid = fork_while_dropping(walks, &ForkOptions::new()).expect("a fork, when it is dropped");
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
    });
}

#[test]
fn a_fork_waits_for_a_dropped_registration_no_longer_than_its_budget() {
    isolated("a_fork_waits_for_a_dropped_registration_no_longer_than_its_budget", 30, || {
        let options = ForkOptions::new().timeout(50 * MS);
        let budget = || {
            carefork::testing::advance(51 * MS);
            until(|| stats().refused == 1);
        };
        let end = fork_while_dropping(budget, &options);
        assert!(matches!(end, Err(ForkError::Busy { .. })), "{end:?}");
    });
}
