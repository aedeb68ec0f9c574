//! Numbers of processes that come round when a test says so.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

use crate::common::{Verdict, reap};
use crate::kit::{foreign, forked};
use carefork::{Child, ForkOptions};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::Duration;

/// Makes the kernel's next fork in this pid namespace take number `pid`.
pub fn next_pid(pid: u32) {
    std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).expect("ns_last_pid");
}

/// A child with number `pid` in a namespace where nobody else forks.
pub fn child_with(pid: u32, options: &ForkOptions<'_>, code: i32) -> Child {
    next_pid(pid);
    let child = forked(options, |_| code);
    assert_eq!(child.id(), pid, "somebody forks here");
    child
}

/// Runs `f` as the first process of a pid namespace with a /proc of its own: there numbers come round when the test says so.
pub fn in_a_namespace(f: impl FnOnce()) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID | nix::sched::CloneFlags::CLONE_NEWNS)
        .expect("these tests want root, or a namespace of their own");
    // A child for the namespace to begin with; by foreign code, as carefork's own are under test in it.
    let pid = foreign(|| {
        let none = std::ptr::null();
        // SAFETY: C strings; a mount namespace of this test's own.
        unsafe { libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()) };
        // SAFETY: the same; /proc of this namespace over the other one, seen by nobody else.
        unsafe { libc::mount(c"proc".as_ptr(), c"/proc".as_ptr(), c"proc".as_ptr(), 0, none.cast()) };
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)) {
            Ok(()) => 0,
            Err(_) => 1,
        }
    });
    assert_eq!(reap(pid, Duration::from_secs(30)), Verdict::Exited(0));
}

/// As other code of the process waits for it; the status.
pub fn steal(pid: u32) -> ExitStatus {
    let mut status = 0;
    // SAFETY: `status` is live.
    let got = unsafe { libc::waitpid(pid.cast_signed(), &raw mut status, 0) };
    assert_eq!(got, pid.cast_signed());
    ExitStatus::from_raw(status)
}
