//! What the tests of reapers share: children to watch, and a loop to watch them in.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

use crate::common::{Refuse, Setup, raw};
use crate::kit::{SOON, forked};
use carefork::{Child, Claim, Exit, ForkOptions, Reaper, SigchldOwner, Watched};
use crossbeam_channel::{Receiver, unbounded};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

pub fn sleeper() -> Child {
    forked(&ForkOptions::new(), |_| sleep_on())
}

/// Until it is killed.
pub fn sleep_on() -> i32 {
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

pub fn ends_with(code: i32) -> Child {
    forked(&ForkOptions::new().name("worker"), |_| code)
}

/// Waits for the reaper's descriptor and dispatches, until `done`.
#[track_caller]
pub fn run_until(reaper: &Reaper, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + raw::patience(SOON);
    while !done() {
        assert!(Instant::now() < end, "nothing came");
        raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], end.saturating_duration_since(Instant::now()));
        reaper.dispatch().expect("dispatch");
    }
}

#[track_caller]
pub fn watch(reaper: &Reaper, child: Child) -> (Watched, Receiver<Exit>) {
    let (send, receive) = unbounded();
    let watched = reaper.watch(child, move |exit| send.send(exit).expect("the test waits")).expect("watched");
    (watched, receive)
}

/// One exit, and never a second.
#[track_caller]
pub fn only(reaper: &Reaper, exits: &Receiver<Exit>) -> Exit {
    run_until(reaper, || !exits.is_empty());
    let exit = exits.try_recv().expect("one");
    reaper.dispatch().expect("dispatch");
    assert!(exits.is_empty(), "called twice");
    exit
}

pub fn is_readable(reaper: &Reaper) -> bool {
    let mut fds = [raw::pollfd(reaper.as_raw_fd())];
    raw::poll_readable(&mut fds, Duration::ZERO);
    fds[0].revents != 0
}

pub fn kill(pid: u32, signal: i32) {
    // SAFETY: a child of the test's.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

/// Waits until the child has ended, and leaves it to be reaped.
pub fn until_dead(pid: u32) {
    // SAFETY: no status is asked for.
    let r = unsafe { libc::waitid(libc::P_PID, pid, std::ptr::null_mut(), libc::WEXITED | libc::WNOWAIT) };
    assert_eq!(r, 0, "a child of this process that nobody has reaped");
}

pub fn without_pidfds() -> Setup {
    Setup { refuse: vec![Refuse::call(libc::SYS_pidfd_open, libc::EPERM)], ..Setup::default() }
}

/// Children that nobody holds are reaped by carefork's next calls.
#[track_caller]
pub fn no_zombie_left() {
    let end = Instant::now() + raw::patience(SOON);
    loop {
        forked(&ForkOptions::new(), |_| 0).wait().expect("a status");
        // SAFETY: no status is asked for.
        if unsafe { libc::waitid(libc::P_ALL, 0, std::ptr::null_mut(), libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) }
            != 0
        {
            return;
        }
        assert!(Instant::now() < end, "a zombie stays");
    }
}

#[track_caller]
pub fn owner(mode: SigchldOwner) -> Reaper {
    let reaper = Reaper::new().expect("a reaper");
    reaper.set_owner(mode).expect("owned");
    reaper
}

/// Unknown children that the reaper's callback was asked about, all claimed.
pub fn strangers(reaper: &Reaper) -> Receiver<Exit> {
    let (send, receive) = unbounded();
    reaper.on_unknown(move |exit| {
        send.send(exit.clone()).expect("the test waits");
        Claim::Mine
    });
    receive
}
