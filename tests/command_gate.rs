//! Starts beside regions and forks: what a program's start waits for, what waits for it, and what its child does meanwhile.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used, clippy::cast_sign_loss)]

mod common;
mod kit;

use carefork::{Command, ForkOptions, Signals, no_forking};
use common::{Setup, check, count_syscalls, isolated, raw, self_fds, strace};
use kit::Stop;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::thread;
use std::time::Duration;

/// Ends a process that is not the one it was told of: a program's child that shares the memory, between clone and exec.
struct OnlyHere;

#[global_allocator]
static ALLOC: OnlyHere = OnlyHere;
static HERE: AtomicU32 = AtomicU32::new(0);

fn only_here() {
    let here = HERE.load(SeqCst);
    if here != 0 && here != raw::getpid() as u32 {
        raw::Line::new().text("allocated between clone and exec").send();
        raw::exit_now(77);
    }
}

// SAFETY: every call is handed to `System` as it came, or does not return.
unsafe impl GlobalAlloc for OnlyHere {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        only_here();
        // SAFETY: our caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        only_here();
        // SAFETY: our caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[test]
fn the_child_allocates_nothing() {
    isolated("the_child_allocates_nothing", 30, || {
        HERE.store(raw::getpid() as u32, SeqCst);
        let (a, b) = (raw::memfd(), raw::memfd());
        let mut command = Command::new("true");
        command.pass_fd_as(&a, 100).pass_fd_as(&b, 101).session(true).umask(0).current_dir("/").death_signal(9);
        command.rlimit(carefork::Resource::Core, 0, 0).env("A", "B");
        for signals in [Signals::Reset, Signals::Inherit, Signals::List(vec![libc::SIGINT])] {
            assert_eq!(command.signals(signals).status().expect("it starts").code(), Some(0));
        }
        assert!(command.current_dir("/nonexistent").status().is_err());
        assert!(Command::new("/nonexistent").status().is_err());
        HERE.store(0, SeqCst);
    });
}

/// The table of `exec_child.rs`.
#[test]
fn the_child_takes_its_steps_in_order() {
    let root = common::can_change_user();
    let calls = count_syscalls("the_child_takes_its_steps_in_order", 60, Setup::default(), || {
        let (a, b) = (raw::memfd(), raw::memfd());
        let mut command = Command::new("true");
        command.pass_fd_as(&a, 100).pass_fd_as(&b, 101).session(true).umask(0).current_dir("/").death_signal(9);
        command.rlimit(carefork::Resource::Core, 0, 0);
        if root {
            command.uid(1).gid(1);
        }
        thread::scope(|scope| {
            // Another thread, which libc's setuid would look for.
            let other = scope.spawn(thread::park);
            assert!(command.status().expect("it starts").success());
            other.thread().unpark();
        });
    });
    let Some(calls) = calls else { return };
    let clone = calls.iter().position(|c| c.name == "clone" && c.line.contains("CLONE_VFORK")).expect("a vfork");
    assert!(calls[clone].line.contains("CLONE_PIDFD"), "{}", calls[clone].line);
    let child = calls[clone].line.rsplit("= ").next().and_then(|n| n.trim().parse().ok()).expect("a pid");
    let mut names: Vec<&str> = calls.iter().filter(|c| c.pid == child).map(|c| c.name.as_str()).collect();
    let exec = names.iter().position(|n| *n == "execve").expect("an exec");
    names.truncate(exec + 1);
    names.dedup();
    let user: &[&str] = if root { &["getuid", "setgroups", "setgid", "setuid"] } else { &[] };
    let mut wanted = vec!["rt_sigaction", "setsid", "dup3", "close_range", "umask", "prlimit64"];
    wanted.extend(user);
    wanted.extend(["chdir", "prctl", "getppid", "rt_sigprocmask", "execve"]);
    // A mapping for the pidfd's word, and a wake-up at the gate, come first where they are needed.
    names.retain(|n| !matches!(*n, "mmap" | "futex" | "newfstatat" | "fstat"));
    assert_eq!(names, wanted);
}

/// A region that changes the umask and puts it back: no program is started in between.
#[test]
fn programs_are_not_started_in_the_middle_of_a_region() {
    isolated("programs_are_not_started_in_the_middle_of_a_region", 120, || {
        // SAFETY: an integer argument.
        unsafe { libc::umask(0o022) };
        let stop = Stop::default();
        let changes = AtomicU64::new(0);
        thread::scope(|scope| {
            let _stop = stop.on_drop();
            scope.spawn(|| {
                while !stop.is_set() {
                    let region = no_forking();
                    // SAFETY: as above.
                    unsafe { libc::umask(0o777) };
                    changes.fetch_add(1, SeqCst);
                    for _ in 0..20 {
                        thread::yield_now();
                    }
                    // SAFETY: as above.
                    unsafe { libc::umask(0o022) };
                    drop(region);
                }
            });
            let start = || {
                for _ in (0..).take_while(|&n| n < 60 || changes.load(SeqCst) <= 100) {
                    let output = Command::new("sh").args(["-c", "umask"]).timeout_never().output().expect("sh");
                    assert_eq!(output.stdout, b"0022\n");
                }
            };
            let other = scope.spawn(start);
            start();
            other.join().expect("no panic");
        });
    });
}

/// Starts, forks and regions at once: nobody hangs, and no child of a fork keeps a program's pidfd or a pipe of its start.
#[test]
fn starts_beside_forks_leak_nothing_into_them() {
    isolated("starts_beside_forks_leak_nothing_into_them", 240, || {
        let before = self_fds();
        let stop = Stop::default();
        thread::scope(|scope| {
            let _stop = stop.on_drop();
            for i in 0..2 {
                let (stop, before) = (&stop, &before);
                scope.spawn(move || {
                    let mut n = 0;
                    while !stop.is_set() {
                        n += 1;
                        let mut command = Command::new(if n % 5 == 0 { "/nonexistent" } else { "true" });
                        let started = command.timeout_never().spawn();
                        assert_eq!(started.is_ok(), n % 5 != 0);
                        let ok = started.map_or(true, |mut c| c.wait().is_ok_and(|s| s.success()));
                        assert!(ok, "thread {i} with {:?}", before.as_slice());
                    }
                });
            }
            scope.spawn(|| {
                while !stop.is_set() {
                    drop(no_forking());
                }
            });
            for _ in 0..300 {
                let options = ForkOptions::new().timeout_never();
                let mut child = kit::forked(&options, |token| {
                    // SAFETY: the child uses no descriptor but its standard streams.
                    unsafe { token.cleanup() };
                    check(41, self_fds().first_not_in(&before).is_none());
                    0
                });
                assert_eq!(kit::code(&mut child), 0);
            }
        });
        kit::assert_gate_open();
    });
}

/// Runs this test under strace, which delays a system call of `inject`; true in that process.
fn delayed(name: &str, inject: &str) -> bool {
    if std::env::var_os("CAREFORK_DELAYED").is_some() {
        return true;
    }
    let strace = strace::find();
    if strace.is_none() && std::env::var_os("CAREFORK_REQUIRE_TOOLS").is_none() {
        eprintln!("skipped: strace cannot be run here");
        return false;
    }
    let output = std::process::Command::new("timeout")
        .args(["--signal=KILL", "1000"])
        .arg(strace.expect("strace is asked for"))
        .args(["-f", "-qq", "-o", "/dev/null", "-e"])
        .arg(format!("inject={inject}"))
        .arg(std::env::current_exe().expect("this binary"))
        .args(["--exact", name, "--nocapture"])
        .env("CAREFORK_DELAYED", "1")
        .output()
        .expect("timeout and strace");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{:?}\n{text}", output.status);
    false
}

/// A program that takes long to exec keeps nobody out: regions begin and forks go on, without the gate being reopened by force.
#[test]
fn others_are_kept_out_until_the_clone_and_not_until_the_exec() {
    let name = "others_are_kept_out_until_the_clone_and_not_until_the_exec";
    if !delayed(name, "execve:delay_enter=8000000") {
        return;
    }
    // Who was kept out would be until the exec.
    kit::freeze();
    let (done, seen) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            assert!(Command::new("true").status().expect("it starts").success());
            done.store(true, SeqCst);
        });
        // The child is there once this process has one; its exec is seconds away.
        while !has_child() {
            thread::yield_now();
        }
        while !done.load(SeqCst) {
            drop(no_forking());
            let mut child = kit::forked(&ForkOptions::new(), |_| 0);
            assert_eq!(kit::code(&mut child), 0);
            if !done.load(SeqCst) {
                seen.fetch_add(1, SeqCst);
            }
        }
    });
    assert!(seen.load(SeqCst) > 0, "nothing went on between clone and exec");
    assert_eq!(carefork::stats().reopened, 0, "a waiter had to open the gate");
}

fn has_child() -> bool {
    // SAFETY: no status is asked for.
    unsafe { libc::waitid(libc::P_ALL, 0, std::ptr::null_mut(), libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) == 0 }
}

/// A clone that comes so late that a waiter has opened the gate gives way and is done again.
#[test]
fn a_start_that_was_overtaken_gives_way() {
    let name = "a_start_that_was_overtaken_gives_way";
    if !delayed(name, "clone:delay_enter=700000:when=1") {
        return;
    }
    let before = self_fds();
    let stop = Stop::default();
    kit::freeze();
    thread::scope(|scope| {
        let _stop = stop.on_drop();
        scope.spawn(|| {
            while !stop.is_set() {
                drop(no_forking());
            }
        });
        // Time passes until that has happened, and not for the second try.
        scope.spawn(|| {
            while !stop.is_set() && carefork::stats().thrown_away == 0 {
                carefork::testing::advance(Duration::from_millis(1));
                thread::sleep(Duration::from_millis(1));
            }
        });
        let command = || Command::new("sh").args(["-c", "exit 3"]).timeout_never().status();
        assert_eq!(command().expect("at the second try").code(), Some(3));
    });
    let stats = carefork::stats();
    assert!(stats.reopened > 0, "the gate was not opened: this has tested nothing");
    assert_eq!((stats.thrown_away, stats.programs), (1, 1));
    kit::assert_no_child();
    assert_eq!(self_fds().as_slice(), before.as_slice());
}

/// A signal that comes while the child gets ready meets its default, and no handler of the parent's in the parent's memory.
#[test]
fn no_handler_of_the_parent_runs_in_the_child() {
    static RAN: AtomicU32 = AtomicU32::new(0);
    extern "C" fn count(_: i32) {
        RAN.fetch_add(1, SeqCst);
    }
    let name = "no_handler_of_the_parent_runs_in_the_child";
    if !delayed(name, "chdir:delay_enter=4000000") {
        return;
    }
    kit::catch(libc::SIGUSR2, count);
    for signals in [Signals::Reset, Signals::Inherit, Signals::List(vec![libc::SIGUSR1])] {
        thread::scope(|scope| {
            scope.spawn(|| {
                while !has_child() {
                    thread::yield_now();
                }
                to_children(libc::SIGUSR2);
            });
            let status = Command::new("true").current_dir("/").signals(signals.clone()).status().expect("it starts");
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGUSR2), "{signals:?}");
        });
    }
    assert_eq!(RAN.load(SeqCst), 0);
}

/// The parent ends before the child has asked for its death signal: the child notices.
#[test]
fn a_parent_that_ended_before_the_death_signal_was_set() {
    let name = "a_parent_that_ended_before_the_death_signal_was_set";
    if !delayed(name, "prctl:delay_enter=6000000") {
        return;
    }
    let (read, write) = std::io::pipe().expect("a pipe");
    let mut parent = kit::forked(&ForkOptions::new(), |_token| {
        thread::spawn(|| {
            while !has_child() {
                thread::yield_now();
            }
            raw::exit_now(5);
        });
        let mut sleep = Command::new("sleep");
        drop(sleep.arg("100000").pass_fd(&write).death_signal(libc::SIGKILL).spawn());
        6
    });
    drop(write);
    assert_eq!(kit::code(&mut parent), 5, "it ended in its sleep");
    // The end of the program closes it, when its call comes to an end.
    let mut p = libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(&read), events: libc::POLLIN, revents: 0 };
    // SAFETY: one live pollfd.
    let ready = unsafe { libc::poll(&raw mut p, 1, 600_000) };
    assert_eq!((ready, p.revents), (1, libc::POLLHUP), "the program lives on");
}

/// A child that ends with the gate still shut, because it was killed on its first steps, leaves it open.
#[test]
fn a_child_that_is_killed_at_once_leaves_the_gate_open() {
    isolated("a_child_that_is_killed_at_once_leaves_the_gate_open", 120, || {
        let stop = Stop::default();
        thread::scope(|scope| {
            let _stop = stop.on_drop();
            scope.spawn(|| {
                while !stop.is_set() {
                    to_children(libc::SIGKILL);
                }
            });
            for _ in 0..300 {
                // It may be killed before its exec, or after; either way there is a child with a status.
                let mut child = Command::new("true").timeout_never().spawn().expect("a child");
                child.wait().expect("its status");
                drop(no_forking());
            }
        });
        kit::assert_gate_open();
        let mut child = kit::forked(&ForkOptions::new(), |_| 0);
        assert_eq!(kit::code(&mut child), 0);
    });
}

/// A signal to every child of this process.
fn to_children(signal: i32) {
    let list = std::fs::read_dir("/proc/self/task").expect("/proc");
    for task in list.flatten() {
        let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            // SAFETY: a child of this process; if it was reaped meanwhile there is nobody.
            unsafe { libc::kill(pid, signal) };
        }
    }
}
