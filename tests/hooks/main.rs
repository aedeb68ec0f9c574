//! Hooks: order, the two sides, vetoes, panics, registration from anywhere, clean-ups, and locks nested both ways round regions
//! (H1 to H4).

// Forks and shared memory.
#![allow(unsafe_code, clippy::disallowed_methods)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../drive/mod.rs"]
mod drive;

mod cleanups;
mod nesting;
mod order;
mod registering;
mod vetoes;

use carefork::{ForkError, Hook, no_forking};
use common::{Verdict, raw, reap};
use drive::{BOTH, SOON};
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::AsRawFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;

/// Events of a parent and its children, in memory that they share. Async-signal-safe.
#[derive(Clone, Copy)]
struct Log(&'static [AtomicU64; 512]);

impl Log {
    fn new() -> Log {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, kind, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: the mapping has 4096 zeroed bytes and is never unmapped.
        let log = Log(unsafe { &*page.cast() });
        log.0[511].store(raw::getpid() as u64, SeqCst);
        log
    }

    fn add(self, phase: u8, hook: u8) {
        let at = self.0[0].fetch_add(1, SeqCst) as usize + 1;
        let here = u64::from(self.0[511].load(SeqCst) != raw::getpid() as u64);
        self.0[at].store(here << 32 | u64::from(phase) << 8 | u64::from(hook), SeqCst);
    }

    /// "pA pB" and so on: prepare, undo, parent (r), child, clean-up (e); of the process that made the log, or of its children.
    fn of(self, children: bool) -> String {
        let n = self.0[0].load(SeqCst) as usize;
        let events = self.0[1..=n].iter().map(|e| e.load(SeqCst));
        let words = events.filter(|e| e >> 32 == u64::from(children)).map(|e| {
            let bytes = [(e >> 8) as u8, e as u8];
            String::from_utf8_lossy(&bytes).into_owned()
        });
        words.collect::<Vec<_>>().join(" ")
    }

    fn clear(self) {
        self.0[0].store(0, SeqCst);
    }

    #[track_caller]
    fn expect(self, parent: &str, child: &str) {
        assert_eq!((self.of(false).as_str(), self.of(true).as_str()), (parent, child));
        self.clear();
    }

    fn hook(self, name: &'static str) -> Hook {
        let letter = name.as_bytes()[0];
        Hook::new(name)
            .prepare(move || self.add(b'p', letter))
            .undo(move || self.add(b'u', letter))
            .parent(move || self.add(b'r', letter))
            .child(move || self.add(b'c', letter))
            .cleanup(move || self.add(b'e', letter))
    }
}

#[track_caller]
fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// The gate is open on this and on other threads, and forks work.
#[track_caller]
fn all_is_well() {
    let other = thread::spawn(|| carefork::try_no_forking().is_some());
    assert!(other.join().expect("no panic"), "the gate is shut");
    for kind in BOTH {
        ends_well(kind.fork(|| {
            drop(no_forking());
            0
        }));
    }
}

/// What is written to fd 2 while `f` runs, by this process and its children.
fn stderr_of(f: impl FnOnce()) -> String {
    let mut file = File::from(raw::memfd());
    // SAFETY: numbers only; the copy is put back below.
    let aside = unsafe { libc::fcntl(2, libc::F_DUPFD_CLOEXEC, 10) };
    // SAFETY: as above.
    unsafe { libc::dup2(file.as_raw_fd(), 2) };
    let end = catch_unwind(AssertUnwindSafe(f));
    // SAFETY: as above.
    unsafe { libc::dup2(aside, 2) };
    // SAFETY: the copy is ours.
    unsafe { libc::close(aside) };
    let mut text = String::new();
    file.rewind().and_then(|()| file.read_to_string(&mut text)).expect("the file can be read");
    eprint!("{text}");
    if let Err(payload) = end {
        std::panic::resume_unwind(payload);
    }
    text
}

/// Panics say nothing by themselves: what is reported is carefork's own.
fn quiet_panics() {
    std::panic::set_hook(Box::new(|_| {}));
}

fn vetoed(error: ForkError) -> (&'static str, String) {
    match error {
        ForkError::Vetoed { hook, reason } => (hook, reason.into_owned()),
        other => panic!("not a veto: {other:?}"),
    }
}
