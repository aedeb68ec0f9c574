//! What the tests about forking share: forks whose children end with a code, memory shared with them, and a look at all that
//! a fork must leave as it was.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    // Forking, and looking at what came of it, is what this is for.
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::missing_panics_doc,
    // Pids and signal sets, between C's types and Rust's.
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]

use crate::common::{self, Verdict, raw};
use carefork::{Child, Fork, ForkOptions, Hook, InChild, Registration};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// No child and no thread takes this long, on whatever machine.
pub const SOON: Duration = Duration::from_secs(100);

/// Forks with `options`, and without a budget, so that no busy machine refuses it; the child ends with what `f` returns.
#[track_caller]
pub fn forked(options: &ForkOptions<'_>, f: impl FnOnce(InChild) -> i32) -> Child {
    // SAFETY: each `f` keeps to what a child of a process with threads may do.
    match unsafe { options.clone().timeout_never().fork() }.expect("a child") {
        Fork::Parent(child) => child,
        Fork::Child(token) => raw::exit_now(f(token)),
    }
}

/// Forks by libc, as foreign code does; the child ends with what `f` returns.
pub fn foreign(f: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: as in `forked`.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        raw::exit_now(f());
    }
    assert!(pid > 0, "fork: {}", std::io::Error::last_os_error());
    pid
}

/// Stops the clock: nothing that waits for a bound or a budget comes to an end, so a thread that is kept from its processor makes
/// no fork dirty and has none made again (G6, G11).
pub fn freeze() {
    carefork::testing::advance(Duration::ZERO);
}

/// How the child ended: its exit code, or minus the signal that killed it.
#[track_caller]
pub fn code(child: &mut Child) -> i32 {
    match child.wait_timeout(raw::patience(SOON)).expect("a status") {
        Some(status) => status.code().unwrap_or_else(|| -status.signal().expect("exit or signal")),
        None => match common::reap(child.id() as i32, Duration::ZERO) {
            Verdict::Hung { trace } => panic!("the child hangs:\n{trace}"),
            other => panic!("the child ended late: {other:?}"),
        },
    }
}

/// This process has no child, dead or alive.
#[track_caller]
pub fn assert_no_child() {
    // SAFETY: no status is asked for.
    let pid = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
    assert_eq!((pid, raw::errno()), (-1, libc::ECHILD), "a child was left");
}

/// Numbers that parents and children share, at first 0.
pub fn shared() -> &'static [AtomicU64; 64] {
    let (read_write, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 512, read_write, kind, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    // SAFETY: the mapping has 512 zeroed bytes at the start of a page, and is never unmapped.
    unsafe { &*page.cast() }
}

/// How often each function of a hook ran, in all processes together.
#[derive(Clone, Copy)]
pub struct Calls(&'static [AtomicU64; 64]);

#[derive(Debug, Default, PartialEq, Eq, Clone, Copy)]
pub struct Ran {
    pub prepare: u64,
    pub undo: u64,
    pub parent: u64,
    pub child: u64,
    pub cleanup: u64,
}

impl Calls {
    pub fn new() -> Calls {
        Calls(shared())
    }

    pub fn add(self, at: usize) {
        self.0[at].fetch_add(1, SeqCst);
    }

    pub fn ran(self) -> Ran {
        let [prepare, undo, parent, child, cleanup] = [0, 1, 2, 3, 4].map(|i| self.0[i].load(SeqCst));
        Ran { prepare, undo, parent, child, cleanup }
    }

    /// A hook that counts its calls.
    pub fn hook(self, name: &'static str) -> Hook {
        Hook::new(name)
            .prepare(move || self.add(0))
            .undo(move || self.add(1))
            .parent(move || self.add(2))
            .child(move || self.add(3))
            .cleanup(move || self.add(4))
    }

    pub fn register(self, name: &'static str) -> Registration {
        carefork::register(self.hook(name))
    }
}

/// What a fork must not change in the thread and the process that forks.
#[derive(Debug, PartialEq, Eq)]
pub struct State {
    blocked: u64,
    ignored: u64,
    caught: u64,
    handlers: Vec<(usize, i32)>,
    fds: Vec<i32>,
}

impl State {
    pub fn now() -> State {
        let status = common::status_here().expect("/proc");
        State {
            blocked: status.sig_blk,
            ignored: status.sig_ign,
            caught: status.sig_cgt,
            handlers: (1..=64).map(disposition).collect(),
            fds: common::self_fds().as_slice().to_vec(),
        }
    }
}

/// Handler and flags of a signal. Async-signal-safe.
pub fn disposition(signal: i32) -> (usize, i32) {
    // SAFETY: sigaction is plain data.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks; a number that is no signal changes nothing.
    unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    (action.sa_sigaction, action.sa_flags)
}

/// # Panics
/// If a region cannot be entered at once on another thread.
#[track_caller]
pub fn assert_gate_open() {
    let (send, receive) = mpsc::channel();
    let thread = thread::spawn(move || {
        drop(carefork::try_no_forking().expect("the gate is open"));
        drop(carefork::no_forking());
        send.send(())
    });
    receive.recv_timeout(raw::patience(SOON)).expect("the gate is shut");
    thread.join().expect("no panic").expect("received");
}

/// A thread that sits in a region until it is told.
pub struct InRegion {
    go: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl InRegion {
    pub fn new(name: &str) -> InRegion {
        let (go, wait) = mpsc::channel::<()>();
        let (entered, ready) = mpsc::channel();
        let body = move || {
            let _region = carefork::no_forking();
            entered.send(()).expect("the test waits");
            // Ends when the sender is dropped.
            let _ = wait.recv();
        };
        let thread = thread::Builder::new().name(name.to_owned()).spawn(body).expect("a thread");
        ready.recv().expect("it entered");
        InRegion { go: Some(go), thread: Some(thread) }
    }
}

impl Drop for InRegion {
    fn drop(&mut self) {
        drop(self.go.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Set when it is dropped: an assertion that fails inside `thread::scope` would otherwise wait for its threads for ever.
#[derive(Default)]
pub struct Stop(AtomicBool);

impl Stop {
    pub fn is_set(&self) -> bool {
        self.0.load(SeqCst)
    }

    pub fn on_drop(&self) -> impl Drop + '_ {
        struct Set<'a>(&'a AtomicBool);
        impl Drop for Set<'_> {
            fn drop(&mut self) {
                self.0.store(true, SeqCst);
            }
        }
        Set(&self.0)
    }
}

/// Runs `f` with descriptor `fd` (1 or 2) going to a file; what was written there.
pub fn captured(fd: i32, f: impl FnOnce()) -> String {
    let file = raw::memfd();
    let saved = nix::unistd::dup(as_fd(fd)).expect("dup");
    redirect(file.as_raw_fd(), fd);
    f();
    redirect(saved.as_raw_fd(), fd);
    contents(&file)
}

fn as_fd(fd: i32) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: the standard streams of an isolated test stay open while this is used.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

/// dup2. Async-signal-safe.
pub fn redirect(from: i32, to: i32) {
    // SAFETY: the caller's own standard streams.
    let done = unsafe { libc::dup2(from, to) };
    assert_eq!(done, to);
}

pub fn contents(file: &OwnedFd) -> String {
    std::fs::read_to_string(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("a memfd can be read by its name")
}

/// A handler for `signal`.
pub fn catch(signal: i32, handler: extern "C" fn(i32)) {
    set(signal, handler as *const () as usize);
}

pub fn ignore(signal: i32) {
    set(signal, libc::SIG_IGN);
}

fn set(signal: i32, handler: usize) {
    // SAFETY: the handlers of the tests are async-signal-safe.
    assert_ne!(unsafe { libc::signal(signal, handler) }, libc::SIG_ERR);
}

/// Sets the mask of the calling thread.
pub fn block(signals: &[i32]) {
    // SAFETY: sigset_t is plain data; all-zero is the empty set.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    for &s in signals {
        // SAFETY: `set` is live.
        unsafe { libc::sigaddset(&raw mut set, s) };
    }
    // SAFETY: `set` is live, the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

/// Bit n-1 for signal n, as /proc has it.
pub fn bits(signals: &[i32]) -> u64 {
    signals.iter().fold(0, |set, s| set | 1 << (s - 1))
}
