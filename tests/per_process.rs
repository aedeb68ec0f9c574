//! `PerProcess`: made once in each process, and never the parent's.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;
mod kit;

use carefork::PerProcess;
use common::{Verdict, check, isolated, raw, reap};
use drive::{BOTH, Kind, SOON, freeze};
use kit::{Stop, shared};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};
use std::thread;

#[track_caller]
fn passed(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// Counts where it is dropped, in which process ever.
struct Counted {
    made_by: i32,
    dropped: &'static AtomicU64,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, SeqCst);
    }
}

#[test]
fn once_in_each_process() {
    isolated("once_in_each_process", 60, || {
        let [made, dropped, ..] = shared();
        let cell = PerProcess::new(|| {
            made.fetch_add(1, SeqCst);
            Counted { made_by: raw::getpid(), dropped }
        });
        let together = Barrier::new(8);
        thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| {
                    together.wait();
                    assert_eq!(cell.get().made_by, raw::getpid());
                });
            }
        });
        assert_eq!(made.load(SeqCst), 1);
        let old = cell.get();
        let mut cell_of_child = Some(&cell);
        for (i, kind) in (0..).zip(BOTH) {
            passed(kind.fork(|| {
                let cell = cell_of_child.take().expect("here");
                check(1, cell.get().made_by == raw::getpid() && std::ptr::eq(cell.get(), cell.get()));
                // What was borrowed from the parent's is there still.
                check(2, old.made_by != raw::getpid());
                // A child of a child.
                passed(kind.noexec(|| i32::from(cell.get().made_by != raw::getpid())));
                0
            }));
            assert_eq!((made.load(SeqCst), dropped.load(SeqCst)), (3 + 2 * i, 0));
        }
        assert!(std::ptr::eq(old, cell.get()));
        drop(cell);
        assert_eq!(dropped.load(SeqCst), 1);
    });
}

#[test]
fn a_child_drops_its_own_only() {
    isolated("a_child_drops_its_own_only", 60, || {
        let [dropped, ..] = shared();
        let mut cell = Some(PerProcess::new(|| Counted { made_by: raw::getpid(), dropped }));
        cell.as_ref().expect("here").get();
        for kind in BOTH {
            passed(kind.fork(|| {
                drop(cell.take());
                check(1, dropped.swap(0, SeqCst) == 0);
                0
            }));
            passed(kind.fork(|| {
                cell.as_ref().expect("here").get();
                drop(cell.take());
                check(1, dropped.swap(0, SeqCst) == 1);
                0
            }));
        }
        drop(cell.take());
        assert_eq!(dropped.load(SeqCst), 1);
        // Empty: nothing to drop.
        drop(PerProcess::new(|| Counted { made_by: 0, dropped }));
        assert_eq!(dropped.load(SeqCst), 1);
    });
}

#[test]
fn a_panic_leaves_it_empty() {
    isolated("a_panic_leaves_it_empty", 60, || {
        let fails = AtomicBool::new(true);
        let cell = PerProcess::new(|| assert!(!fails.load(SeqCst), "on purpose"));
        assert!(catch_unwind(AssertUnwindSafe(|| *cell.get())).is_err());
        // Neither a region nor a lock is left.
        passed(Kind::Coordinated.fork(|| 0));
        fails.store(false, SeqCst);
        cell.get();
    });
}

#[test]
fn making_is_a_region_and_asks_not_for_itself() {
    isolated("making_is_a_region_and_asks_not_for_itself", 60, || {
        static SELF: PerProcess<u32> = PerProcess::new(|| *SELF.get());
        let panic = catch_unwind(|| *SELF.get()).expect_err("it would wait for itself");
        assert!(panic.downcast_ref::<&str>().is_some_and(|m| m.contains("asks for the value that it makes")));

        let cell = PerProcess::new(|| {
            // SAFETY: there is no child.
            let refused = unsafe { carefork::fork() };
            assert!(matches!(refused, Err(carefork::ForkError::Forbidden { .. })));
            1
        });
        assert_eq!(*cell.get(), 1);
    });
}

/// A foreign fork in a region goes ahead (G4); its child goes on making the value, has it, and makes another one next time.
#[test]
fn a_foreign_fork_while_making() {
    isolated("a_foreign_fork_while_making", 60, || {
        let (pid, made) = (AtomicI32::new(-1), AtomicU64::new(0));
        let cell = PerProcess::new(|| {
            if made.fetch_add(1, SeqCst) == 0 {
                // SAFETY: the child exits below.
                pid.store(unsafe { libc::fork() }, SeqCst);
            }
            raw::getpid()
        });
        let first = *cell.get();
        if pid.load(SeqCst) == 0 {
            check(1, first == raw::getpid());
            check(2, *cell.get() == raw::getpid() && made.load(SeqCst) == 2);
            check(3, cell.get() == cell.get() && made.load(SeqCst) == 2);
            raw::exit_now(0);
        }
        passed(pid.load(SeqCst));
        assert_eq!((first, *cell.get(), made.load(SeqCst)), (raw::getpid(), raw::getpid(), 1));
    });
}

/// No fork finds one half made.
#[test]
fn forks_while_it_is_made() {
    isolated("forks_while_it_is_made", 120, || {
        freeze();
        let turn = AtomicU64::new(0);
        let stop = Stop::default();
        let cells: Vec<_> = (0..1000_u64).map(|i| PerProcess::new(move || vec![i; 500])).collect();
        thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    while !stop.is_set() {
                        if let Some(cell) = turn.load(SeqCst).checked_sub(1) {
                            check(1, cells[cell as usize].get().len() == 500);
                        }
                        thread::yield_now();
                    }
                });
            }
            let _stop = stop.on_drop();
            for i in 0..1000_u64 {
                turn.store(i + 1, SeqCst);
                passed(BOTH[i as usize % 2].fork(|| {
                    check(2, cells[i as usize].get() == &vec![i; 500]);
                    0
                }));
            }
        });
    });
}
