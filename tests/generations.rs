//! K5 and K6: children made by foreign code, and children of children; lineage and counters.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::{CareFd, Cleanup, Fork, ForkError, ForkOptions, Mutex, NotAChild, OnFork, Stats};
use common::{Verdict, check, isolated, raw, reap, self_fds};
use kit::{Calls, Ran, SOON, Stop, assert_no_child, code, foreign, forked};
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

fn null() -> std::io::Result<File> {
    File::open("/dev/null")
}

fn postfork() -> Result<Cleanup, NotAChild> {
    // SAFETY: no test here uses a borrowed descriptor of a care-fd afterwards.
    unsafe { carefork::postfork_child_noexec() }
}

#[test]
fn a_child_of_foreign_code_cleans_up_once() {
    isolated("a_child_of_foreign_code_cleans_up_once", 20, || {
        let calls = Calls::new();
        let _hook = calls.register("counter");
        let _idle = carefork::register(carefork::Hook::new("has no clean-up"));
        let plain = null().expect("/dev/null");
        let care: Vec<_> = (0..3).map(|_| CareFd::open(null).expect("a care-fd")).collect();
        let between = null().expect("/dev/null");
        let more = CareFd::open(null).expect("a care-fd");
        let at_fork = CareFd::open_on(OnFork::Close, null).expect("a care-fd");
        let gone = CareFd::open(null).expect("a care-fd");
        let gone_fd = gone.as_raw_fd();
        drop(gone);
        let expected = [0, 1, 2, plain.as_raw_fd(), between.as_raw_fd()];

        // Not in the original: its care-fds are in use.
        assert_eq!(postfork().err().map(|e| e.to_string().contains("no fork's child")), Some(true));
        assert_eq!(calls.ran().cleanup, 0);

        let open = care.iter().map(|c| c.as_raw_fd()).chain([more.as_raw_fd()]).max().expect("some");
        let pid = foreign(|| {
            check(1, self_fds().contains(open) && !at_fork.is_open_here());
            let Ok(first) = postfork() else { return 2 };
            check(3, first.closed == 4 && first.kept == 0 && first.hooks == 1 && first.panicked == 0 && !first.already);
            check(4, self_fds().as_slice() == expected);
            check(5, care.iter().chain([&more]).all(|c| !c.is_open_here()));
            // The numbers are free: what is opened there now is somebody else's.
            let again: [_; 5] = std::array::from_fn(|_| raw::open(c"/dev/null", libc::O_RDONLY));
            check(6, again.iter().all(Result::is_ok));
            let before = self_fds();
            for _ in 0..2 {
                let Ok(second) = postfork() else { return 7 };
                check(8, second.already && second.closed == 0 && second.hooks == 0);
            }
            check(9, self_fds().as_slice() == before.as_slice());
            0
        });
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        assert_eq!(calls.ran(), Ran { prepare: 1, parent: 1, child: 1, cleanup: 1, undo: 0 });
        // The parent's are untouched.
        assert!(care.iter().chain([&more, &at_fork]).all(CareFd::is_open_here));
        assert!(!self_fds().contains(gone_fd));
        assert_eq!(postfork().err().map(|e| e.to_string().contains("no fork's child")), Some(true));
    });
}

#[test]
fn the_token_and_the_call_are_one_clean_up() {
    isolated("the_token_and_the_call_are_one_clean_up", 20, || {
        let calls = Calls::new();
        let _hook = calls.register("counter");
        let mut child = forked(&ForkOptions::new(), |token| {
            check(1, postfork().is_ok_and(|c| !c.already && c.hooks == 1));
            // SAFETY: no care-fd is used.
            check(2, unsafe { token.cleanup() }.already);
            // Its own child is another process, and cleans up for itself.
            let mut child = forked(&ForkOptions::new(), |token| {
                // SAFETY: no care-fd is used.
                check(3, !unsafe { token.cleanup() }.already);
                check(4, postfork().is_ok_and(|c| c.already));
                0
            });
            code(&mut child)
        });
        assert_eq!(code(&mut child), 0);
        assert_eq!(calls.ran().cleanup, 2);
    });
}

#[test]
fn a_panic_in_a_foreign_childs_clean_up_is_told() {
    isolated("a_panic_in_a_foreign_childs_clean_up_is_told", 20, || {
        let _bad = carefork::register(carefork::Hook::new("bad").cleanup(|| panic!("no")));
        let care = CareFd::open(null).expect("a care-fd");
        let pid = foreign(|| {
            let Ok(done) = postfork() else { return 1 };
            i32::from((done.closed, done.hooks, done.panicked) != (1, 1, 1) || care.is_open_here())
        });
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
    });
}

// -- ten generations

const DEPTH: u64 = 10;

static LOCK: Mutex<u64> = Mutex::new(0);

/// Ends with 0 if all is well from here down, else with a number that says where and what.
fn generation(depth: u64, calls: Calls, inherited: &[CareFd<File>], foreign_too: bool) -> i32 {
    let wrong = |what: i32| depth as i32 * 16 + what;
    let lineage = carefork::lineage();
    if (lineage.generation, carefork::fork_generation()) != (depth, depth) || lineage.dirty || lineage.bypass {
        return wrong(1);
    }
    let stats = carefork::stats();
    if (stats.forks, stats.foreign, stats.refused, stats.thrown_away) != (0, 0, 0, 0) {
        return wrong(2);
    }
    if self_fds().as_slice() != [0, 1, 2] && depth > 0 || inherited.iter().any(CareFd::is_open_here) {
        return wrong(3);
    }
    if common::thread_count() != if depth == 0 { 2 } else { 1 } {
        return wrong(4);
    }
    let ran = calls.ran();
    if (ran.child, ran.cleanup, ran.undo) != (depth, depth, 0) {
        return wrong(5);
    }
    let mine = [CareFd::open(null), CareFd::open(null)];
    let [Ok(a), Ok(b)] = mine else { return wrong(6) };
    let mine = [a, b];
    let stop = Stop::default();
    let rounds = AtomicU64::new(0);
    let result = thread::scope(|s| {
        // Fight over a lock, regions and descriptors while this thread forks.
        for _ in 0..2 {
            s.spawn(|| {
                while !stop.is_set() {
                    // All ancestors' threads do this too, on whatever processors there are.
                    thread::sleep(Duration::from_micros(100));
                    *LOCK.lock() += 1;
                    let _region = carefork::no_forking();
                    drop(CareFd::open(null));
                    rounds.fetch_add(1, SeqCst);
                }
            });
        }
        let _stop = stop.on_drop();
        while rounds.load(SeqCst) < 4 {
            thread::yield_now();
        }
        let below = || if depth < DEPTH { generation(depth + 1, calls, &mine, foreign_too) } else { 0 };
        let result = if foreign_too && depth.is_multiple_of(2) {
            match reap(foreign(|| if postfork().is_ok_and(|c| c.closed >= 2) { below() } else { wrong(7) }), SOON) {
                Verdict::Exited(code) => code,
                _ => wrong(8),
            }
        } else {
            let mut child = forked(&ForkOptions::new().timeout(SOON), |token| {
                // SAFETY: no care-fd is used but by its own value.
                let done = unsafe { token.cleanup() };
                if done.closed < 2 || done.hooks != 1 || done.already {
                    return wrong(9);
                }
                below()
            });
            code(&mut child)
        };
        // Here all goes on.
        let held = *LOCK.lock();
        let before = rounds.load(SeqCst);
        while rounds.load(SeqCst) < before + 4 {
            thread::yield_now();
        }
        if result == 0 && (held == 0 || !mine.iter().all(CareFd::is_open_here)) { wrong(10) } else { result }
    });
    let stats = carefork::stats();
    if result == 0 && stats.forks + stats.foreign != 1 {
        return wrong(11);
    }
    result
}

#[track_caller]
fn ten_generations(foreign_too: bool) {
    kit::freeze();
    let calls = Calls::new();
    let _hook = calls.register("counter");
    let code = generation(0, calls, &[], foreign_too);
    assert_eq!(code, 0, "generation {}, check {}", code / 16, code % 16);
    assert_eq!(calls.ran(), Ran { prepare: 11, parent: 11, child: 11, cleanup: 11, undo: 0 });
    assert_no_child();
}

#[test]
fn ten_generations_work_like_one() {
    isolated("ten_generations_work_like_one", 60, || ten_generations(false));
}

#[test]
fn ten_generations_of_both_kinds() {
    isolated("ten_generations_of_both_kinds", 60, || ten_generations(true));
}

#[test]
fn spawn_in_spawn() {
    isolated("spawn_in_spawn", 30, || {
        fn nest(n: i32) -> i32 {
            if n == 0 {
                return 1;
            }
            // SAFETY: the closure touches nothing of the parent's.
            unsafe { carefork::spawn(|| nest(n - 1)) }.map_or(100, |mut c| code(&mut c) + 1)
        }
        assert_eq!(nest(10), 11);
        assert_no_child();
    });
}

#[test]
fn lineage_and_counters() {
    isolated("lineage_and_counters", 20, || {
        let plain = carefork::lineage();
        assert_eq!((plain.generation, plain.dirty, plain.bypass), (0, false, false));
        assert_eq!(carefork::stats(), Stats::default());
        assert_eq!(code(&mut forked(&ForkOptions::new(), |_| 0)), 0);
        assert_eq!(reap(foreign(|| 0), SOON), Verdict::Exited(0));
        {
            let _region = carefork::no_forking();
            // SAFETY: no child comes of it.
            assert!(unsafe { carefork::fork() }.is_err());
            assert_eq!(reap(foreign(|| 0), SOON), Verdict::Exited(0));
        }
        let veto = carefork::register(carefork::Hook::new("veto").try_prepare(|| Err("no".into())));
        // SAFETY: no child comes of it.
        assert!(unsafe { carefork::fork() }.is_err());
        drop(veto);
        let s = carefork::stats();
        assert_eq!((s.forks, s.foreign, s.in_region, s.refused, s.thrown_away), (1, 2, 1, 2, 1));
        assert_eq!((s.dirty, s.reopened, s.unreported), (0, 0, 0));
        assert!(carefork::Command::new("true").status().is_ok_and(|s| s.success()));
        assert_eq!(carefork::stats().programs, 1);
        let mut child = forked(&ForkOptions::new(), |_| {
            let of_child = carefork::lineage();
            check(1, (of_child.generation, of_child.dirty, of_child.bypass) == (1, false, false));
            check(2, carefork::stats() == Stats::default());
            // SAFETY: the child ends at once.
            match unsafe { carefork::fork() } {
                Ok(Fork::Child(token)) => token.exit(i32::from(carefork::fork_generation() != 2)),
                Ok(Fork::Parent(mut child)) => check(3, code(&mut child) == 0),
                Err(_) => check(4, false),
            }
            check(5, carefork::stats().forks == 1 && carefork::fork_generation() == 1);
            0
        });
        assert_eq!(code(&mut child), 0);
        // What children counted is theirs.
        assert_eq!(carefork::stats().forks, 2);
        assert_eq!(carefork::fork_generation(), 0);
    });
}

/// The child's first thread sits in its parent's seat under the number that it has here.
#[test]
fn a_childs_first_thread_is_known() {
    isolated("a_childs_first_thread_is_known", 30, || {
        let mut child = forked(&ForkOptions::new(), |token| {
            drop(token);
            let region = carefork::no_forking();
            let options = ForkOptions::new().timeout(Duration::ZERO);
            // SAFETY: there is no child.
            let fork = move || unsafe { options.fork() }.map(drop).expect_err("the first thread is in a region");
            let refused = thread::spawn(fork).join().expect("no panic");
            drop(region);
            let ForkError::Busy { culprits } = refused else { return 1 };
            i32::from(culprits.threads.iter().map(|t| t.tid).ne([std::process::id()]))
        });
        assert_eq!(code(&mut child), 0);
    });
}

/// A hook that is being dropped while the fork has it: nobody waits for that in the child.
#[test]
fn who_waits_to_drop_a_hook_is_not_in_the_child() {
    isolated("who_waits_to_drop_a_hook_is_not_in_the_child", 60, || {
        let (go, told) = std::sync::mpsc::channel();
        let leaves = carefork::register(carefork::Hook::new("leaves").rank(1).prepare(|| ()));
        let dropper = thread::spawn(move || {
            let tid: libc::pid_t = nix::unistd::gettid().as_raw();
            told.recv()
                .map(|tell: std::sync::mpsc::Sender<libc::pid_t>| tell.send(tid))
                .expect("asked")
                .expect("heard");
            drop(leaves);
        });
        let first = std::sync::Mutex::new(Some(go));
        let _second = carefork::register(carefork::Hook::new("second").rank(2).prepare(move || {
            let Some(go) = first.lock().expect("not poisoned").take() else { return };
            let (tell, heard) = std::sync::mpsc::channel();
            go.send(tell).expect("it waits");
            let tid = heard.recv().expect("told");
            // Asleep: it waits for this fork.
            let call = format!("/proc/self/task/{tid}/syscall");
            while !std::fs::read_to_string(&call).is_ok_and(|c| c.starts_with(&format!("{} ", libc::SYS_futex))) {
                thread::yield_now();
            }
        }));
        let mut child = forked(&ForkOptions::new(), |token| {
            drop(token);
            // SAFETY: that child exits at once.
            let forked = unsafe { ForkOptions::new().spawn(|| 0) };
            forked.map_or(1, |mut c| i32::from(!c.wait().is_ok_and(|s| s.success())))
        });
        assert_eq!(code(&mut child), 0);
        dropper.join().expect("no panic");
    });
}
