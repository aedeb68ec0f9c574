//! Forks, threads in regions and driven time, for the tests of the gate.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    // Forking is what this is for.
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::cast_possible_wrap,
    clippy::cast_possible_truncation
)]

use crate::common::raw;
use carefork::{Fork, ForkError, ForkOptions};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A child, or a fork, may take this long on a loaded machine.
pub const SOON: Duration = Duration::from_secs(20);
pub const MS: Duration = Duration::from_millis(1);

/// The two kinds of fork that run at-fork handlers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Coordinated,
    Foreign,
}

pub const BOTH: [Kind; 2] = [Kind::Coordinated, Kind::Foreign];

/// A coordinated fork whose child ends with what `f` returns; the child's pid.
pub fn coordinated(f: impl FnOnce() -> i32) -> Result<i32, ForkError> {
    fork_with(&ForkOptions::new(), f)
}

pub fn fork_with(options: &ForkOptions<'_>, f: impl FnOnce() -> i32) -> Result<i32, ForkError> {
    // SAFETY: each `f` keeps to what a child may do.
    match unsafe { options.fork() }? {
        Fork::Parent(child) => Ok(child.into_id() as i32),
        // Not by the token: its clean-up is not what is tested here.
        Fork::Child(_token) => raw::exit_now(f()),
    }
}

/// A fork by somebody who knows nothing of carefork. -1 if it failed.
pub fn foreign(f: impl FnOnce() -> i32) -> i32 {
    // SAFETY: as above.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        raw::exit_now(f());
    }
    pid
}

impl Kind {
    /// # Panics
    /// If the fork fails.
    #[track_caller]
    pub fn fork(self, f: impl FnOnce() -> i32) -> i32 {
        match self {
            Kind::Coordinated => coordinated(f).expect("a coordinated fork"),
            Kind::Foreign => {
                let pid = foreign(f);
                assert!(pid > 0, "fork: errno {}", raw::errno());
                pid
            }
        }
    }
}

impl Kind {
    /// As [`Kind::fork`], in a child that has cleaned up, as one does that goes on without exec.
    #[track_caller]
    pub fn noexec(self, f: impl FnOnce() -> i32) -> i32 {
        match self {
            // SAFETY: each `f` keeps to what a child may do.
            Kind::Coordinated => match unsafe { carefork::fork() }.expect("a coordinated fork") {
                Fork::Parent(child) => child.into_id() as i32,
                Fork::Child(token) => {
                    // SAFETY: no `f` uses a borrowed descriptor.
                    let done = unsafe { token.cleanup() };
                    raw::exit_now(if done.already || done.panicked > 0 { 120 } else { f() })
                }
            },
            Kind::Foreign => self.fork(|| {
                // SAFETY: as above.
                match unsafe { carefork::postfork_child_noexec() } {
                    Ok(done) if !done.already && done.panicked == 0 => f(),
                    _ => 120,
                }
            }),
        }
    }
}

/// Waits until `f`; the watchdog of the isolated test is the bound.
pub fn until(mut f: impl FnMut() -> bool) {
    while !f() {
        thread::sleep(MS / 5);
    }
}

/// Waits until the gate is shut, as only a fork shuts it.
pub fn until_shut() {
    until(|| carefork::try_no_forking().is_none());
}

/// Enough real time for something that must not happen to happen.
pub fn a_while() {
    thread::sleep(40 * MS);
}

/// Stops the clock: nothing that waits for a bound or a budget comes to an end.
pub fn freeze() {
    carefork::testing::advance(Duration::ZERO);
}

/// The driven clock runs, faster or slower than the real one; until dropped. In a child it stands still.
pub struct Clock {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Moves the driven clock on by `step` whenever the thread, which waits in carefork, has looked at it: however slow it is, it sees all
/// that there is to see. Not for one that waits elsewhere: it would wait for ever.
pub fn run_with(tid: i32, step: Duration) -> Clock {
    clock(step, move |stop| looked(tid, stop))
}

/// Moves the driven clock on by `step` for about each 0.2 ms of real time: more of it where the machine is busy, as the thread that
/// does it waits for a processor like any other.
pub fn run_clock(step: Duration) -> Clock {
    clock(step, |_| thread::sleep(MS / 5))
}

fn clock(step: Duration, pause: impl Fn(&AtomicBool) + Send + 'static) -> Clock {
    freeze();
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let thread = thread::spawn(move || {
        while !seen.load(SeqCst) {
            carefork::testing::advance(step);
            pause(&seen);
        }
    });
    Clock { stop, thread: Some(thread) }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Slowly, for tests in which threads wait for each other until a bound passes: it passes soon enough, and a thread that is kept
/// from its processor does not find the end of a budget when it comes back. A second is 50 000 steps.
pub fn run_slowly() -> Clock {
    run_clock(MS / 50)
}

/// Waits until the thread, which waits in carefork, has looked at the driven clock and gone to sleep again.
pub fn until_it_looked(tid: i32) {
    looked(tid, &AtomicBool::new(false));
}

fn looked(tid: i32, stop: &AtomicBool) {
    let slept = || {
        let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        line.map_or(u64::MAX, |n| n.trim().parse().expect("a number"))
    };
    // Its first sleep may follow a look from before.
    let enough = slept().saturating_add(2);
    until(|| slept() >= enough || stop.load(SeqCst));
}

/// Waits until all other threads of this process sleep: whatever libc keeps under locks is at rest. For threads that have nothing to do.
pub fn until_others_sleep() {
    let own = gettid().to_string();
    until(|| {
        let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
        let others = tasks.map(|task| task.expect("/proc").path()).filter(|path| !path.ends_with(&own));
        let stats: Vec<_> = others.filter_map(|path| std::fs::read_to_string(path.join("stat")).ok()).collect();
        stats.iter().all(|stat| stat.contains(") S "))
    });
}

/// A thread that sits in a region until told to leave.
pub struct Inside {
    leave: Arc<AtomicBool>,
    pub tid: i32,
    pub line: u32,
    thread: Option<JoinHandle<()>>,
}

/// Starts a thread of that name and waits until it is in a region.
pub fn inside(name: &str) -> Inside {
    let leave = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&leave);
    let (tell, told_tid) = std::sync::mpsc::channel();
    let body = move || {
        let (region, line) = (carefork::no_forking(), line!());
        tell.send((gettid(), line)).expect("the test waits");
        until(|| told.load(SeqCst));
        drop(region);
    };
    let thread = thread::Builder::new().name(name.to_owned()).spawn(body).expect("a thread");
    let (tid, line) = told_tid.recv().expect("it enters its region");
    Inside { leave, tid, line, thread: Some(thread) }
}

impl Inside {
    pub fn leave(self) {}
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.leave.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Sets a stop flag when dropped, so that a failed assertion does not leave `thread::scope` waiting.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

pub fn gettid() -> i32 {
    // SAFETY: takes nothing.
    unsafe { libc::gettid() }
}

/// Whether no child of this process is left, dead or alive. (One that runs on is left alone.)
pub fn no_child_left() -> bool {
    // SAFETY: no status is asked for.
    let r = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
    r == -1 && raw::errno() == libc::ECHILD
}

/// Sends a signal to one thread of this process.
pub fn signal_thread(tid: i32, signal: i32) {
    // SAFETY: takes no pointers.
    unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, signal) };
}

/// Installs a handler.
pub fn on_signal(signal: i32, handler: extern "C" fn(i32)) {
    // SAFETY: all-zero is an empty mask and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as extern "C" fn(i32) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the action is whole; the handlers of these tests are async-signal-safe.
    let r = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    assert_eq!(r, 0);
}

/// Blocks these signals in the calling thread, beside those that are blocked.
pub fn block(signals: &[i32]) {
    // SAFETY: an all-zero signal set is an empty one on Linux.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    for &signal in signals {
        // SAFETY: the set is ours.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set is ours, the old one is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}
