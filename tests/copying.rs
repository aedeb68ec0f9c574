//! The gate while the kernel copies a large process, for longer than waiters wait (G11). Imitated: copying takes 20 ms for each GiB.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;

use carefork::testing::advance;
use carefork::{Fork, ForkOptions, lineage, no_forking, stats};
use common::{Verdict, isolated, raw, reap};
use drive::{BOTH, Kind, MS, SOON, Stop, foreign, freeze, until};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread;

extern "C" fn early_prepare() {
    let act = ACT.load(SeqCst);
    if !act.is_null() {
        // SAFETY: only functions of this type are stored there.
        let act: fn() = unsafe { std::mem::transmute(act) };
        act();
    }
}
extern "C" fn nothing() {}
early_foreign_handlers!(early_prepare, nothing, nothing);

/// What a handler does between carefork's commitment and the fork.
static ACT: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());
/// Driven time in 0.1 ms.
static TIME: AtomicU32 = AtomicU32::new(0);
static AT_WORK: AtomicBool = AtomicBool::new(false);
static THROUGH: AtomicBool = AtomicBool::new(false);

fn fork(kind: Kind, f: impl FnOnce() -> i32) -> i32 {
    match kind {
        // SAFETY: each `f` keeps to what a child may do.
        Kind::Coordinated => match unsafe { ForkOptions::new().timeout_never().fork() }.expect("a child") {
            Fork::Parent(child) => libc::pid_t::try_from(child.into_id()).expect("a pid"),
            Fork::Child(_token) => raw::exit_now(f()),
        },
        Kind::Foreign => foreign(f),
    }
}

/// Forks while the handler does `act`, time goes on until `end`, slower than the real one, and another thread waits at the gate.
fn fork_with_a_waiter(kind: Kind, act: fn(), end: u32) {
    freeze();
    TIME.store(0, SeqCst);
    AT_WORK.store(false, SeqCst);
    THROUGH.store(false, SeqCst);
    ACT.store(act as *mut (), SeqCst);
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        let _stop = Stop(&stop);
        s.spawn(|| {
            while !stop.load(SeqCst) && TIME.load(SeqCst) < end {
                advance(MS / 10);
                TIME.fetch_add(1, SeqCst);
                thread::sleep(MS / 5);
            }
        });
        s.spawn(|| {
            until(|| AT_WORK.load(SeqCst));
            drop(no_forking());
            THROUGH.store(true, SeqCst);
        });
        let pid = fork(kind, || i32::from(lineage().dirty));
        let dirty = kind == Kind::Foreign && stats().late > 0;
        assert_eq!(reap(pid, SOON), Verdict::Exited(dirty.into()));
        until(|| THROUGH.load(SeqCst));
    });
}

/// Three times as long as waiters wait for a fork that does nothing.
const LONG: u32 = 3000;

/// Keeps the kernel busy for this thread.
fn one_call(bytes: usize) {
    static ROOM: [AtomicU64; 1 << 17] = [const { AtomicU64::new(0) }; 1 << 17];
    // SAFETY: atomics may be written by anyone; nobody looks at them.
    unsafe { libc::getrandom(ROOM.as_ptr().cast_mut().cast(), bytes.min(size_of_val(&ROOM)), 0) };
}

/// As the kernel does while it copies page tables.
fn works_in_the_kernel() {
    AT_WORK.store(true, SeqCst);
    while TIME.load(SeqCst) < LONG {
        one_call(usize::MAX);
    }
}

#[test]
fn a_fork_at_work_is_waited_for() {
    isolated("a_fork_at_work_is_waited_for", 240, || {
        for kind in BOTH {
            fork_with_a_waiter(kind, works_in_the_kernel, LONG);
        }
        let s = stats();
        assert_eq!((s.forks, s.foreign, s.reopened, s.late, s.thrown_away), (1, 1, 0, 0, 0));
    });
}

/// Another library's handler may wait for the very thread that waits at the gate, and use the processor meanwhile.
#[test]
fn a_handler_that_spins_is_not() {
    fn spins() {
        AT_WORK.store(true, SeqCst);
        while !THROUGH.load(SeqCst) {
            one_call(65_536);
            (0..3000).for_each(|_| std::hint::spin_loop());
        }
    }
    isolated("a_handler_that_spins_is_not", 240, || {
        for kind in BOTH {
            fork_with_a_waiter(kind, spins, LONG);
        }
        // The coordinated one gives way and comes back to a handler that has nothing to wait for.
        let s = stats();
        assert_eq!((s.forks, s.foreign, s.reopened, s.late, s.thrown_away), (1, 1, 2, 1, 1));
    });
}
