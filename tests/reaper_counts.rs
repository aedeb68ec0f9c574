//! What watching costs: system calls, memory, descriptors; and numbers that come round again.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod numbers;

use carefork::{Child, ForkOptions, Reaper};
use common::{Refuse, Setup, between, count_syscalls, isolated, isolated_with, raw, strace_mark};
use kit::{SOON, forked};
use numbers::{child_with, in_a_namespace, next_pid, steal};
use std::alloc::{GlobalAlloc, Layout, System};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

/// Counts what is held.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: handed on to the system's as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOC: Counting = Counting;

/// Sleeps in one system call until it is killed.
fn asleep(n: usize) -> Vec<Child> {
    let one = |_| {
        forked(&ForkOptions::new(), |_| {
            loop {
                thread::sleep(Duration::from_secs(3600));
            }
        })
    };
    (0..n).map(one).collect()
}

fn room_for_descriptors() -> Setup {
    Setup { rlimits: vec![(libc::RLIMIT_NOFILE, 4096)], ..Setup::default() }
}

/// SEEDS 14: 900 live and 100 dead took libxl 91 000 calls of waitpid.
#[test]
fn a_thousand_live_and_a_hundred_dead() {
    let calls = count_syscalls("a_thousand_live_and_a_hundred_dead", 300, room_for_descriptors(), || {
        let reaper = Reaper::new().expect("a reaper");
        let called = Arc::new(AtomicU32::new(0));
        let watched: Vec<_> = asleep(1000)
            .into_iter()
            .map(|child| {
                let called = Arc::clone(&called);
                reaper
                    .watch(child, move |_| {
                        called.fetch_add(1, SeqCst);
                    })
                    .expect("watched")
            })
            .collect();
        strace_mark("idle-from");
        reaper.dispatch().expect("dispatch");
        strace_mark("idle-to");
        for child in &watched[450..550] {
            child.kill().expect("ours");
        }
        for child in &watched[450..550] {
            // SAFETY: no siginfo is asked for; the child is left as it is.
            unsafe { libc::waitid(libc::P_PID, child.id(), std::ptr::null_mut(), libc::WEXITED | libc::WNOWAIT) };
        }
        strace_mark("from");
        let n = reaper.dispatch().expect("dispatch");
        strace_mark("to");
        assert_eq!((n, called.load(SeqCst), reaper.len()), (100, 100, 900));
        for child in watched {
            child.kill_deregister().expect("ours");
        }
        let end = Instant::now() + raw::patience(Duration::from_secs(100));
        while !reaper.is_empty() {
            assert!(Instant::now() < end, "not all were reaped");
            raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
            reaper.dispatch().expect("dispatch");
        }
        kit::assert_no_child();
    });
    let Some(calls) = calls else { return };
    // Debug builds look at a care-fd's descriptor before they close it, and so does std.
    let ours = |from, to| -> Vec<&str> {
        let names = between(&calls, from, to).iter().map(|c| c.name.as_str());
        names.filter(|n| !(cfg!(debug_assertions) && ["fstat", "newfstatat", "fcntl"].contains(n))).collect()
    };
    let count = |list: &[&str], name| list.iter().filter(|n| **n == name).count();
    let all = ours("from", "to");
    let [waits, dels, closes] = ["waitid", "epoll_ctl", "close"].map(|name| count(&all, name));
    assert_eq!((waits, dels, closes), (100, 100, 100), "{all:?}");
    assert!(all.len() <= 302, "{} besides: {all:?}", all.len() - 300);
    let idle = ours("idle-from", "idle-to");
    assert!(idle.len() <= 2, "{idle:?}");
}

#[test]
fn memory_and_descriptors_of_a_watched_child() {
    isolated_with("memory_and_descriptors_of_a_watched_child", 300, room_for_descriptors(), || {
        let reaper = Reaper::new().expect("a reaper");
        let called = Arc::new(AtomicU32::new(0));
        let fds = || std::fs::read_dir("/proc/self/fd").expect("/proc").count();
        let mut pids = Vec::with_capacity(1000);
        let (memory, open) = (HELD.load(SeqCst), fds());
        let n = 1000;
        for child in asleep(n) {
            let called = Arc::clone(&called);
            let watched = reaper
                .watch(child, move |_| {
                    called.fetch_add(1, SeqCst);
                })
                .expect("watched");
            pids.push(watched.id().cast_signed());
        }
        let (each, descriptors) = ((HELD.load(SeqCst) - memory) / n, fds() - open);
        println!("{each} bytes and {descriptors} descriptors for {n} watched children");
        assert!(each <= 200, "{each} bytes each");
        assert_eq!(descriptors, n);
        for &pid in &pids {
            // SAFETY: a child of the test's.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        let end = Instant::now() + raw::patience(Duration::from_secs(100));
        while called.load(SeqCst) < n as u32 {
            assert!(Instant::now() < end, "not all were reaped");
            raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
            reaper.dispatch().expect("dispatch");
        }
        assert_eq!(fds(), open);
    });
}

/// A number that comes round again: the first child's status is lost, the second's its own, and signals hit nobody wrong.
#[test]
fn a_number_that_comes_round_again() {
    isolated("a_number_that_comes_round_again", 60, || {
        in_a_namespace(|| {
            let reaper = Reaper::new().expect("a reaper");
            let (send, exits) = crossbeam_channel::unbounded();
            let first = child_with(300, &ForkOptions::new(), 1);
            let watched = {
                let send = send.clone();
                reaper
                    .watch(child_with(301, &ForkOptions::new(), 2), move |e| drop(send.send(("first", e))))
                    .expect("ok")
            };
            let mut first = first;
            steal(300);
            steal(301);
            // The same numbers, alive.
            next_pid(300);
            let mut again = asleep(2).into_iter();
            let (mut third, fourth) = (again.next().expect("one"), again.next().expect("two"));
            assert_eq!((third.id(), fourth.id()), (300, 301));
            reaper.watch(fourth, move |e| drop(send.send(("second", e)))).expect("watched");
            first.kill().expect("left alone");
            watched.kill().expect("left alone");
            assert!(first.wait().is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD)));
            assert!(first.exit().is_some_and(carefork::Exit::is_lost));
            assert!(matches!(third.try_wait(), Ok(None)), "a signal went to a stranger");
            let next = || {
                let end = Instant::now() + raw::patience(SOON);
                loop {
                    if let Ok(told) = exits.try_recv() {
                        return told;
                    }
                    assert!(Instant::now() < end, "nothing came");
                    reaper.dispatch().expect("dispatch");
                }
            };
            let (which, exit) = next();
            assert!(which == "first" && exit.is_lost(), "{which}: {exit}");
            reaper.dispatch().expect("dispatch");
            assert!(exits.is_empty());
            // SAFETY: children of ours that nobody has reaped.
            unsafe { libc::kill(301, libc::SIGKILL) };
            let (which, exit) = next();
            assert!(which == "second" && exit.signal() == Some(libc::SIGKILL), "{which}: {exit}");
            third.kill().expect("ours");
            assert_eq!(kit::code(&mut third), -libc::SIGKILL);
        });
    });
}

/// The same by number: what this process has forked since is known.
#[test]
fn a_number_that_comes_round_again_without_pidfds() {
    let refuse = vec![Refuse::call(libc::SYS_pidfd_open, libc::EPERM)];
    let setup = Setup { refuse, ..Setup::default() };
    isolated_with("a_number_that_comes_round_again_without_pidfds", 60, setup, || {
        in_a_namespace(|| {
            let reaper = Reaper::new().expect("a reaper");
            let (send, exits) = crossbeam_channel::unbounded();
            let watched =
                reaper.watch(child_with(301, &ForkOptions::new(), 2), move |e| drop(send.send(e))).expect("watched");
            steal(301);
            let mut again = child_with(301, &ForkOptions::new(), 3);
            watched.kill().expect("left alone");
            reaper.dispatch().expect("dispatch");
            assert!(exits.try_recv().expect("an end").is_lost());
            assert_eq!(again.wait().expect("a status").code(), Some(3));
        });
    });
}

/// The same by hand, where no reaper has ever asked for it; and when a reaper comes last.
#[test]
fn a_number_that_comes_round_again_without_a_reaper() {
    isolated("a_number_that_comes_round_again_without_a_reaper", 60, || {
        in_a_namespace(|| {
            let by_number = ForkOptions::new().pidfd(false);
            let mut first = child_with(300, &by_number, 1);
            let second = child_with(301, &by_number, 2);
            steal(300);
            steal(301);
            next_pid(300);
            let mut again = asleep(2);
            first.kill().expect("left alone");
            assert!(first.wait_timeout(Duration::ZERO).is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD)));
            assert!(first.exit().is_some_and(carefork::Exit::is_lost));
            let reaper = Reaper::new().expect("a reaper");
            let (send, exits) = crossbeam_channel::unbounded();
            let watched = reaper.watch(second, move |e| drop(send.send(e))).expect("watched");
            watched.kill().expect("left alone");
            reaper.dispatch().expect("dispatch");
            assert!(exits.try_recv().expect("an end").is_lost());
            for child in &mut again {
                assert!(matches!(child.try_wait(), Ok(None)), "a signal went to a stranger");
                child.kill().expect("ours");
                assert_eq!(kit::code(child), -libc::SIGKILL);
            }
            // One whose number is its own is given a pidfd, and watched by it.
            let third = child_with(300, &by_number, 3);
            let (send, exits) = crossbeam_channel::unbounded();
            reaper.watch(third, move |e| drop(send.send(e))).expect("watched");
            let end = Instant::now() + raw::patience(SOON);
            while exits.is_empty() {
                assert!(Instant::now() < end, "nothing came");
                raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
                reaper.dispatch().expect("dispatch");
            }
            assert_eq!(exits.try_recv().expect("one").code(), Some(3));
        });
    });
}
