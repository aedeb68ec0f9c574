//! What every integration test here stands on: tests that fork run in a process of their own, under a watchdog, and
//! a hang is a failure with the stacks of everybody involved, never a stuck run.
//!
//! | file | has |
//! |---|---|
//! | `raw` | one-line reports, pidfd, poll: what may run in a forked child |
//! | `proc` | descriptors, masks and thread counts out of /proc, without allocating |
//! | `trace` | every thread of a process tree: state, wait channel, system call, stack |
//! | `child` | a child's verdict by exit code; waiting for one child or for thousands |
//! | `seccomp` | system calls that the kernel refuses |
//! | `isolate` | a test in a process of its own |
//! | `strace` | the same, with every system call listed |
//! | `foreign` | other libraries' at-fork handlers, registered before or after ours |
//! | `guard_alloc` | an allocator that ends the process when it is used where it must not be |
//! | `rng` | random numbers that can be had again |
//!
//! Environment: `CAREFORK_SEED` repeats a random run, `CAREFORK_PATIENCE` (a whole number, 10 unless given) multiplies
//! every bound, `CAREFORK_REQUIRE_TOOLS=1` makes a missing strace a failure instead of a skip.
//!
//! Bounds are for hangs, and machines are slow: no test may fail because it was kept from its processor. What depends on time
//! has a clock of its own (`drive`), and what has to happen beside something else is waited for.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unused_imports,
    unreachable_pub,
    // Forking, and looking at what came of it, is what this is for.
    unsafe_code,
    clippy::disallowed_methods,
    // A test that cannot be set up should panic.
    clippy::expect_used,
    // Pids, signal numbers and small counts, between C's types and Rust's.
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::missing_panics_doc,
    clippy::missing_errors_doc
)]

pub mod child;
pub mod foreign;
pub mod guard_alloc;
pub mod isolate;
pub mod proc;
pub mod raw;
pub mod rng;
pub mod seccomp;
pub mod strace;
pub mod trace;

pub use child::{Tally, Verdict, check, fork_many, reap};
pub use foreign::foreign_handlers;
pub use guard_alloc::ForkGuardAlloc;
pub use isolate::{Outcome, Setup, can_change_user, isolated, isolated_with, run_isolated};
pub use proc::{FdList, Status, fds_of, self_fds, status_here, status_of, temp_dir, thread_count};
pub use rng::Rng;
pub use seccomp::{Refuse, refuse_forks, seccomp_refuse};
pub use strace::{Syscall, between, count_syscalls, strace_mark};
