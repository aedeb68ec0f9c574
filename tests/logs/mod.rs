//! What the tests of the log share: forks whose children go on without exec, and a reckoning of every line.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    // Forking, and redirecting standard error, is what this is for.
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

use crate::common::{Tally, fork_many, raw, temp_dir};
use crate::drive::{BOTH, Kind, SOON, Stop, freeze, until};
use carefork::{Fork, ForkOptions};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

pub const THREADS: usize = 8;

/// A file of this test's own, gone when dropped.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, SeqCst);
        let path = temp_dir().join(format!("carefork-{name}-{}-{number}", std::process::id()));
        drop(std::fs::remove_file(&path));
        Scratch(path)
    }

    pub fn text(&self) -> String {
        std::fs::read_to_string(&self.0).expect("what was logged can be read")
    }

    pub fn append(&self) -> File {
        OpenOptions::new().append(true).create(true).open(&self.0).expect("a scratch file")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// Where a standard stream went before.
#[must_use]
pub struct Redirected {
    before: OwnedFd,
    stream: i32,
    path: PathBuf,
}

/// Sends fd 2 into a file until the answer is dropped; by a panic, its message is in the file, and shown.
pub fn standard_error_to(to: &Scratch) -> Redirected {
    let before = std::io::stderr().as_fd().try_clone_to_owned().expect("fd 2");
    redirect(to.append().as_raw_fd(), 2);
    Redirected { before, stream: 2, path: to.0.clone() }
}

/// The same for fd 1.
pub fn standard_output_to(to: &Scratch) -> Redirected {
    let before = std::io::stdout().as_fd().try_clone_to_owned().expect("fd 1");
    redirect(to.append().as_raw_fd(), 1);
    Redirected { before, stream: 1, path: to.0.clone() }
}

impl Drop for Redirected {
    fn drop(&mut self) {
        redirect(self.before.as_raw_fd(), self.stream);
        if thread::panicking() {
            let text = std::fs::read(&self.path).unwrap_or_default();
            let tail = &text[text.len().saturating_sub(4000)..];
            eprintln!("... {}", String::from_utf8_lossy(tail));
        }
    }
}

fn redirect(from: i32, to: i32) {
    // SAFETY: its standard streams are this isolated process's to redirect.
    let done = unsafe { libc::dup2(from, to) };
    assert_eq!(done, to);
}

/// A child of either kind that goes on without exec: cleaned up, then `f`, then its end.
pub fn noexec(kind: Kind, f: impl FnOnce() -> i32) -> libc::pid_t {
    fork_then(kind, true, f)
}

/// As [`noexec`], without a clean-up if so wanted.
pub fn fork_then(kind: Kind, clean_up: bool, f: impl FnOnce() -> i32) -> libc::pid_t {
    // A forking thread may be off its processor for longer than others wait at the gate: then a foreign fork is dirty, and nothing
    // is promised for its child (G11). With the clock at rest they wait.
    freeze();
    match kind {
        // SAFETY: the children of these tests use what is the log's only.
        Kind::Coordinated => match unsafe { ForkOptions::new().timeout_never().fork() }.expect("a child") {
            Fork::Parent(child) => libc::pid_t::try_from(child.into_id()).expect("a pid"),
            Fork::Child(token) => {
                if clean_up {
                    // SAFETY: no descriptor of the parent's is used.
                    unsafe { token.cleanup() };
                } else {
                    std::mem::forget(token);
                }
                raw::exit_now(f())
            }
        },
        Kind::Foreign => {
            // SAFETY: as above.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                if carefork::lineage().dirty {
                    raw::exit_now(DIRTY);
                }
                if clean_up {
                    // SAFETY: as above.
                    unsafe { carefork::postfork_child_noexec() }.expect("this is a child");
                }
                raw::exit_now(f())
            }
            assert!(pid > 0, "fork: {}", std::io::Error::last_os_error());
            pid
        }
    }
}

/// How a child ends that was forked without everybody's consent, which no test of the log is to see.
const DIRTY: i32 = 119;

/// Forks `forks` times, both ways, while eight threads do `record(thread, number)` without end; each child does `child(i)`. How many
/// records each thread made.
pub fn storm(forks: u32, record: impl Fn(usize, u64) + Sync, child: impl Fn(u32) -> i32) -> Vec<u64> {
    storm_of(forks, &record, |i| noexec(BOTH[i as usize % 2], || child(i)))
}

pub fn storm_of(forks: u32, record: &(impl Fn(usize, u64) + Sync), fork: impl FnMut(u32) -> libc::pid_t) -> Vec<u64> {
    // On a machine with more to do a thread in a region may be off its processor for long.
    carefork::set_foreign_budget(None);
    let stop = AtomicBool::new(false);
    let made: Vec<AtomicU64> = (0..THREADS).map(|_| AtomicU64::new(0)).collect();
    let tally: Tally = thread::scope(|s| {
        let _stop = Stop(&stop);
        for (n, made) in made.iter().enumerate() {
            let stop = &stop;
            let body = move || {
                while !stop.load(SeqCst) {
                    // In bursts: more threads than processors, and a disk to fill.
                    for _ in 0..16 {
                        record(n, made.load(SeqCst));
                        made.fetch_add(1, SeqCst);
                    }
                    thread::sleep(Duration::from_millis(2));
                }
            };
            thread::Builder::new().name(format!("t{n}")).spawn_scoped(s, body).expect("a thread");
        }
        // Each of them is at it when the forks begin.
        until(|| made.iter().all(|n| n.load(SeqCst) > 0));
        fork_many(forks, 1, SOON, fork)
    });
    tally.expect_clean(forks);
    made.iter().map(|n| n.load(SeqCst)).collect()
}

/// `text` is made of whole lines, in each of which `parse` finds a thread and a number (or does not care for the line); each thread's numbers
/// are 0, 1, 2 ... as many as `made`.
#[track_caller]
pub fn assert_each_once(text: &str, made: &[u64], parse: impl Fn(&str) -> Option<(usize, u64)>) {
    assert!(text.ends_with('\n'), "the last line is torn");
    let mut next = vec![0; made.len()];
    for line in text.lines() {
        if let Some((thread, number)) = parse(line) {
            assert_eq!(number, next[thread], "thread {thread}: lost, doubled or out of order: {line:?}");
            next[thread] += 1;
        }
    }
    assert_eq!(next, made);
}

/// The two numbers of `... <what> 3 17`, which must be the end of the line.
#[track_caller]
pub fn numbers(line: &str, what: &str) -> Option<(usize, u64)> {
    let (_, rest) = line.split_once(what)?;
    let numbers = || {
        let (a, b) = rest.strip_prefix(' ')?.split_once(' ')?;
        Some((a.parse().ok()?, b.parse().ok()?))
    };
    Some(numbers().unwrap_or_else(|| panic!("a torn line: {line:?}")))
}

/// The lines of `text` that hold `[pid N`, by pid.
#[track_caller]
pub fn by_pid(text: &str) -> BTreeMap<u32, Vec<&str>> {
    let mut found: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
    for line in text.lines() {
        let Some((_, rest)) = line.split_once("[pid ") else { continue };
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next().expect("split finds one");
        found.entry(digits.parse().expect("a pid")).or_default().push(line);
    }
    found
}
