//! D2: what a report says of hooks, regions, care-fds and counters, also while a fork is in progress.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;
mod kit;

use carefork::audit::Kind;
use carefork::report::{CareFdEntry, HookEntry};
use carefork::stdio::{self, Stream};
use carefork::testing::advance;
use carefork::{CareFd, Fork, ForkOptions, Hook, Mutex, OnFork, Report, force_unlock, no_forking, register, report};
use common::{Setup, Verdict, check, isolated, isolated_with, raw, reap};
use drive::{BOTH, Kind as ForkKind, SOON, until};
use kit::{InRegion, code};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

fn names(report: &Report) -> Vec<(i32, &'static str)> {
    let hooks = report.hooks.as_ref().expect("no fork is in progress");
    hooks.iter().map(|h: &HookEntry| (h.rank, h.name)).collect()
}

#[test]
fn hooks_come_in_the_order_of_prepare() {
    isolated("hooks_come_in_the_order_of_prepare", 20, || {
        let before = names(&report()).len();
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let hook = |name: &'static str, rank| {
            let order = Arc::clone(&order);
            Hook::new(name).rank(rank).prepare(move || order.lock().expect("not poisoned").push(name))
        };
        let kept = [hook("late", 7), hook("early", -7), hook("older", 0), hook("newer", 0)].map(register);
        let gone = register(hook("gone", 3));
        assert_eq!(names(&report()).len(), before + 5);
        assert_eq!(common::status_here().map(|s| s.sig_blk), Ok(0), "the mask is as it was");
        drop(gone);
        let found = names(&report());
        // SAFETY: the child exits at once.
        match unsafe { carefork::fork() }.expect("a child") {
            Fork::Child(child) => child.exit(0),
            Fork::Parent(mut child) => assert_eq!(code(&mut child), 0),
        }
        assert_eq!(found, [(-7, "early"), (0, "newer"), (0, "older"), (7, "late")]);
        let prepared = order.lock().expect("not poisoned").clone();
        assert_eq!(found.iter().map(|(_, name)| *name).collect::<Vec<_>>(), prepared);
        drop(kept);
        assert_eq!(names(&report()), []);
    });
}

/// And of a fork that is over no more is said, on both sides.
#[test]
fn a_fork_that_is_over_is_not_said() {
    isolated("a_fork_that_is_over_is_not_said", 20, || {
        let _hook = register(Hook::new("idle").prepare(|| ()));
        let nothing_more = || {
            let seen = report();
            i32::from(seen.preparing.is_some()) + 2 * i32::from(seen.hooks.is_none_or(|hooks| hooks.len() != 1))
        };
        for kind in BOTH {
            let pid = kind.fork(nothing_more);
            assert_eq!((reap(pid, SOON), nothing_more()), (Verdict::Exited(0), 0), "{kind:?}");
        }
    });
}

/// The hooks are the fork's; the rest of the report does not wait for it.
#[test]
fn a_fork_in_progress_is_said() {
    isolated("a_fork_in_progress_is_said", 30, || {
        let (in_prepare, prepares) = mpsc::channel();
        let (go, gone) = mpsc::channel::<()>();
        let gone = std::sync::Mutex::new(gone);
        let inside = Arc::new(AtomicBool::new(false));
        let from_hook = Arc::clone(&inside);
        let kept = register(Hook::new("slow").prepare(move || {
            // From inside a hook it does not wait for itself.
            from_hook.store(report().hooks.is_none(), SeqCst);
            in_prepare.send(()).expect("the test waits");
            gone.lock().expect("not poisoned").recv().expect("told to go on");
        }));
        let forker = thread::spawn(|| {
            // SAFETY: the child exits at once.
            match unsafe { carefork::ForkOptions::new().timeout_never().fork() }.expect("a child") {
                Fork::Child(child) => child.exit(0),
                Fork::Parent(mut child) => code(&mut child),
            }
        });
        prepares.recv().expect("the fork has begun");
        let during = report();
        assert_eq!(during.hooks, None);
        assert!(during.to_string().contains("a fork is in progress and has them"), "{during}");
        let preparing = during.preparing.expect("at this moment");
        assert_eq!(preparing.hook, "slow");
        let threads = std::fs::read_dir("/proc/self/task").expect("/proc");
        let mut tids = threads.map(|t| t.expect("a thread").file_name());
        assert!(tids.any(|t| t.to_str() == Some(&preparing.tid.to_string())) && preparing.tid != std::process::id());
        let line = format!("\nnow: the fork of thread {} has been preparing hook \"slow\" for ", preparing.tid);
        assert!(during.to_string().contains(&line), "{during}");
        go.send(()).expect("it waits");
        // A fork that gave way prepares again.
        while !forker.is_finished() {
            let _ = go.send(());
            thread::yield_now();
        }
        assert_eq!(forker.join().expect("no panic"), 0);
        assert!(inside.load(SeqCst));
        assert_eq!(names(&report()), [(0, "slow")]);
        assert_eq!(report().preparing, None);
        drop(kept);
    });
}

/// Where the user took the lock, by whichever of its functions.
#[cfg(debug_assertions)]
#[test]
fn every_way_to_a_lock_names_its_place() {
    isolated("every_way_to_a_lock_names_its_place", 20, || {
        static LOCK: Mutex<u8> = Mutex::new(0);
        static TABLE: carefork::RwLock<u8> = carefork::RwLock::new(0);
        let (soon, now) = (std::time::Duration::from_secs(9), std::time::Instant::now());
        fn place<G>(guard: Option<G>) -> &'static str {
            let found = report();
            drop(guard.expect("free"));
            found.regions[0].entered.expect("recorded").file()
        }
        for found in [
            place(Some(LOCK.lock())),
            place(LOCK.try_lock()),
            place(LOCK.try_lock_for(soon)),
            place(LOCK.try_lock_until(now + soon)),
            place(TABLE.try_read()),
            place(TABLE.try_write()),
            place(TABLE.try_write_for(soon)),
            place(TABLE.try_upgradable_read()),
        ] {
            assert_eq!(found, file!());
        }
    });
}

#[test]
fn regions_name_thread_place_and_depth() {
    isolated("regions_name_thread_place_and_depth", 20, || {
        static LOCK: Mutex<u8> = Mutex::new(0);
        assert_eq!(report().regions, []);
        let sleeper = InRegion::new("sleeper");
        let locked = LOCK.lock();
        let (outer, inner) = (no_forking(), no_forking());
        let found = report();
        assert_eq!(found.regions.len(), 2, "{found}");
        let me = found.regions.iter().find(|r| r.name != "sleeper").expect("this thread");
        let other = found.regions.iter().find(|r| r.name == "sleeper").expect("the other");
        assert_eq!(me.tid, nix::unistd::gettid().as_raw() as u32);
        assert_eq!((me.regions, me.locks, other.regions, other.locks), (2, 1, 1, 0));
        if cfg!(debug_assertions) {
            assert!(me.entered.expect("recorded").file().ends_with("report.rs"), "{found}");
            assert!(other.entered.expect("recorded").file().ends_with("mod.rs"), "{found}");
        }
        // It is the one that a fork names.
        drop((outer, inner, locked));
        // SAFETY: no child comes of it.
        let error =
            unsafe { carefork::ForkOptions::new().timeout(std::time::Duration::ZERO).fork() }.expect_err("busy");
        assert!(error.to_string().contains(&format!("thread {} \"sleeper\"", other.tid)), "{error}");
        let found = report();
        assert_eq!((found.regions.len(), found.stats.refused), (1, 1));
        drop(sleeper);
        assert_eq!(report().regions, []);
    });
}

#[test]
fn care_fds_show_what_they_are() {
    isolated("care_fds_show_what_they_are", 20, || {
        let (read, write) = CareFd::open_pair(std::io::pipe).expect("a pipe");
        let file = CareFd::open_on(OnFork::Close, || File::open("/dev/null")).expect("open");
        let plain = File::open("/dev/zero").expect("open");
        let found = report().care_fds;
        let tell = |c: &CareFdEntry| (c.number, c.on_fork, c.kind, c.target.starts_with("pipe:["));
        let expected = [
            (read.as_raw_fd(), OnFork::Cleanup, Some(Kind::Pipe), true),
            (write.as_raw_fd(), OnFork::Cleanup, Some(Kind::Pipe), true),
            (file.as_raw_fd(), OnFork::Close, Some(Kind::Device), false),
        ];
        assert_eq!(found.iter().map(tell).collect::<Vec<_>>(), expected);
        assert_eq!(found[2].target, "/dev/null");
        // Closed behind its owner's back: the number is registered, and not open.
        let number = file.as_raw_fd();
        // SAFETY: this is the misuse under test.
        assert_eq!(unsafe { libc::close(number) }, 0);
        let found = report();
        let closed = found.care_fds.iter().find(|c| c.number == number).expect("registered");
        assert_eq!((closed.kind, closed.target.as_str()), (None, ""));
        assert!(found.to_string().contains("not open"), "{found}");
        std::mem::forget(file);
        drop((read, write, plain));
    });
}

/// Whichever thread made them.
#[test]
fn children_of_all_threads_are_listed() {
    isolated("children_of_all_threads_are_listed", 30, || {
        let asleep = |name: &str| {
            kit::forked(&ForkOptions::new().name(name), |_| {
                loop {
                    thread::sleep(Duration::from_secs(3600));
                }
            })
        };
        let (tell, told) = mpsc::channel();
        let (go, gone) = mpsc::channel::<()>();
        thread::scope(|s| {
            s.spawn(move || {
                tell.send(asleep("theirs")).expect("the test waits");
                // A thread that ends leaves its children to another.
                let _ended = gone.recv();
            });
            let mut children = [told.recv().expect("it forks"), asleep("ours")];
            let mut expected = children.each_ref().map(|c| c.id());
            expected.sort_unstable();
            let found = report().children.expect("the kernel lists them");
            assert_eq!(found.iter().map(|c| c.pid).collect::<Vec<_>>(), expected);
            drop(go);
            for child in &mut children {
                child.kill().expect("it is ours");
                child.wait().expect("a status");
            }
        });
        assert_eq!(report().children, Some(Vec::new()));
    });
}

/// Where there are no descriptors left, that is not said to be the kernel's doing.
#[test]
fn children_that_cannot_be_listed_now() {
    let limit = Setup { rlimits: vec![(libc::RLIMIT_NOFILE, 32)], ..Setup::default() };
    isolated_with("children_that_cannot_be_listed_now", 20, limit, || {
        let taken: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        let during = report();
        drop(taken);
        assert_eq!(during.children, None);
        assert!(during.to_string().contains("\nchildren: not listed: Too many open files"), "{during}");
        assert_eq!(report().children, Some(Vec::new()));
    });
}

#[test]
fn turned_off_is_said() {
    let env = vec![("CAREFORK".to_owned(), "off".to_owned())];
    isolated_with("turned_off_is_said", 20, Setup { env, ..Setup::default() }, || {
        let here = report();
        assert!(here.off);
        let head = format!("carefork in process {}: generation 0, CAREFORK=off\n", here.pid);
        assert!(here.to_string().starts_with(&head), "{here}");
    });
}

/// A child tells of itself.
#[test]
fn a_child_reports_what_it_has() {
    isolated("a_child_reports_what_it_has", 20, || {
        let file = CareFd::open(|| File::open("/dev/null")).expect("open");
        let kept = register(Hook::new("kept").cleanup(|| ()));
        // SAFETY: no descriptor of a care-fd is used in the child.
        let spawned = unsafe {
            carefork::spawn(|| {
                let here = report();
                check(1, here.pid == std::process::id() && here.lineage.generation == 1);
                check(2, here.regions.is_empty() && here.care_fds.is_empty());
                check(3, names(&here) == [(0, "kept")]);
                check(4, here.stats.forks == 0);
                0
            })
        };
        assert_eq!(code(&mut spawned.expect("a child")), 0);
        assert_eq!((report().stats.forks, report().care_fds.len()), (1, 1));
        drop((file, kept));
    });
}

/// A foreign fork past its budget names who was in its way, and since where, as the report does; what that thread has left behind
/// in the dirty child is nobody's region.
#[test]
fn a_dirty_fork_names_the_culprit() {
    isolated("a_dirty_fork_names_the_culprit", 20, || {
        carefork::set_foreign_budget(Some(std::time::Duration::from_millis(1)));
        let sleeper = InRegion::new("sleeper");
        let said = kit::captured(2, || {
            let pid = kit::foreign(|| {
                let here = report();
                check(1, here.lineage.dirty && here.regions.is_empty());
                check(2, here.to_string().contains(": generation 1, after a dirty fork\n"));
                0
            });
            assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        });
        let here = report();
        assert_eq!((here.stats.foreign, here.stats.dirty, here.regions.len()), (1, 1, 1));
        assert!(!here.lineage.dirty);
        let culprit = &here.regions[0];
        let since = culprit.entered.map_or(String::new(), |at| format!(" since {}:{}", at.file(), at.line()));
        let line = format!(
            "carefork: a fork by foreign code goes ahead unguarded: [thread {} sleeper in a region{since}]\n",
            culprit.tid
        );
        assert_eq!(said, line);
        assert_eq!(cfg!(debug_assertions), here.to_string().contains("kit/mod.rs:"), "{here}");
        drop(sleeper);
    });
}

#[test]
fn the_report_reads_well() {
    isolated("the_report_reads_well", 20, || {
        advance(Duration::ZERO);
        let slow = || advance(Duration::from_micros(3_400));
        let hooks = [Hook::new("database").rank(-5).prepare(slow), Hook::new("h".repeat(120).leak()).rank(i32::MIN)]
            .map(register);
        let files = [
            CareFd::open(|| File::open("/dev/null")).expect("open"),
            CareFd::open_on(OnFork::Close, || File::open("/etc/passwd")).expect("open"),
        ];
        // SAFETY: the child exits at once.
        match unsafe { carefork::fork() }.expect("a child") {
            Fork::Child(child) => child.exit(0),
            Fork::Parent(mut child) => assert_eq!(code(&mut child), 0),
        }
        let asleep = kit::forked(&ForkOptions::new().name("a child").pidfd(false), |_| {
            loop {
                thread::sleep(Duration::from_secs(3600));
            }
        });
        let call = format!("/proc/{}/stat", asleep.id());
        while !std::fs::read_to_string(&call).is_ok_and(|s| s.contains("(a child) S")) {
            thread::yield_now();
        }
        let sleeper = InRegion::new("長い名前です");
        let found = report();
        let tid = found.regions[0].tid;
        let entered = found.regions[0].entered.map(|at| format!("{}:{}", at.file(), at.line()));
        let mut text = format!("{found}\n");
        text = text.replace(&format!("process {}:", found.pid), "process PID:");
        text = text.replace(&format!("{tid:>11}"), "        TID");
        text = text.replace(&format!("{:>11}", asleep.id()), "        PID");
        asleep.kill().expect("it is ours");
        let golden = match entered {
            Some(entered) => {
                text = text.replace(&entered, "FILE:LINE");
                GOLDEN.to_owned()
            }
            None => GOLDEN.replace("FILE:LINE", "-"),
        };
        assert_eq!(text, golden, "\n{text}");
        assert!(found.to_string().lines().all(|l| l.chars().count() <= 100), "\n{found}");
        drop((hooks, files, sleeper));
    });
}

/// A thread may call itself anything.
#[test]
fn a_name_moves_no_cursor() {
    isolated("a_name_moves_no_cursor", 20, || {
        let sleeper = InRegion::new("\x1b]0;\x07\x07\x07\x07\x07");
        let found = report();
        assert_eq!(found.regions[0].name, "\x1b]0;\x07\x07\x07\x07\x07");
        let text = found.to_string();
        let line = text.lines().find(|l| l.contains("\\u{1b}")).expect("escaped");
        assert_eq!(&line[11..28], " \\u{1b}...}\\u{7} ", "{text}");
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text}");
        drop(sleeper);
    });
}

const GOLDEN: &str = "\
carefork in process PID: generation 0
forks: 2 own, 0 by foreign code, 0 refused; 0 programs started
       0 dirty, 0 late, 0 inside a region, 0 children thrown away
gate: 0 times reopened by a waiter; 0 lines on fd 2 dropped
forks waited for     TIMES <=MEDIAN    <=P99  LONGEST    TOTAL
  other forks            2        0        0        0        0
  regions                2        0        0        0        0
  hooks                  2  3.40 ms  3.40 ms  3.40 ms  6.80 ms
  the copy               2        0        0        0        0
hooks: 2
       RANK    WAITED  LONGEST    TOTAL NAME
-2147483648         0        0        0 hhhhhhhhhhhhhhhhhhhhhhhhhhhh...hhhhhhhhhhhhhhhhhhhhhhhhhhhhh
         -5         2  3.40 ms  6.80 ms database
threads in regions: 1
        TID NAME            REGIONS LOCKS SINCE
        TID 長い名前で            1     0 FILE:LINE
children: 1
        PID STATE NAME
        PID S     a child
care-fds: 2
         FD ON FORK KIND           TARGET
          3 cleanup device         /dev/null
          4 close   file           /etc/passwd
";

/// A guard that was forgotten is in the report until it is ended by force.
#[test]
fn a_forgotten_guard_is_found() {
    isolated("a_forgotten_guard_is_found", 20, || {
        std::mem::forget(no_forking());
        assert_eq!(report().regions.len(), 1);
        // SAFETY: the only guard of this thread was forgotten.
        unsafe { force_unlock() };
        assert_eq!(report().regions, []);
    });
}

/// Whoever forks during a report leaves nothing of it in the child.
#[test]
fn children_get_nothing_of_the_reports_own() {
    isolated("children_get_nothing_of_the_reports_own", 60, || {
        kit::freeze();
        let stop = kit::Stop::default();
        let expected: Vec<_> = common::self_fds().as_slice().to_vec();
        thread::scope(|s| {
            let _stop = stop.on_drop();
            s.spawn(|| {
                while !stop.is_set() {
                    drop(report());
                }
            });
            for _ in 0..300 {
                let pid = kit::foreign(|| {
                    // SAFETY: no descriptor of a care-fd is used.
                    check(1, unsafe { carefork::postfork_child_noexec() }.is_ok());
                    check(2, common::self_fds().as_slice() == expected);
                    0
                });
                assert_eq!(reap(pid, SOON), Verdict::Exited(0));
            }
        });
    });
}

// -- a fork that waits for a stream

#[track_caller]
fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// A fork of that kind without a budget.
fn fork_without_end(kind: ForkKind) -> i32 {
    match kind {
        ForkKind::Foreign => drive::foreign(|| 0),
        ForkKind::Coordinated => drive::fork_with(&ForkOptions::new().timeout_never(), || 0).expect("a child"),
    }
}

/// The lines of a report that begin with `now:`.
fn now() -> Vec<String> {
    report().to_string().lines().filter(|line| line.starts_with("now:")).map(str::to_owned).collect()
}

/// Which thread's fork waits, how long it has, for which stream; nothing before, nothing after.
#[test]
fn a_fork_that_waits_for_a_stream_is_said() {
    isolated("a_fork_that_waits_for_a_stream_is_said", 60, || {
        let _guard = stdio::guard();
        carefork::set_foreign_budget(None);
        assert_eq!((now(), report().waiting), (vec![], None));
        for kind in BOTH {
            for stream in [Stream::Output, Stream::Error] {
                let tid = AtomicI32::new(0);
                thread::scope(|s| {
                    let (out, err) = (std::io::stdout(), std::io::stderr());
                    let held = match stream {
                        Stream::Output => (Some(out.lock()), None),
                        _ => (None, Some(err.lock())),
                    };
                    s.spawn(|| {
                        tid.store(drive::gettid(), SeqCst);
                        ends_well(fork_without_end(kind));
                    });
                    until(|| stdio::waiting().is_some_and(|w| w.stream == stream));
                    let name = if stream == Stream::Output { "standard output" } else { "standard error" };
                    let found = report();
                    let waiting = found.waiting.expect("it waits still");
                    assert_eq!((waiting.tid, waiting.stream), (tid.load(SeqCst) as u32, stream));
                    // The clock is the real one: `report` itself waits at the gate that this fork keeps shut.
                    let text = found.to_string();
                    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("now:")).collect();
                    assert_eq!(lines.len(), 1, "{text}");
                    assert!(
                        lines[0].starts_with(&format!("now: the fork of thread {} has waited ", waiting.tid)),
                        "{text}"
                    );
                    assert!(lines[0].ends_with(&format!(" for {name}: a thread is stuck printing")), "{text}");
                    drive::a_while();
                    let later = report().waiting.expect("it waits still").waited;
                    assert!(
                        later >= waiting.waited + Duration::from_millis(30),
                        "{later:?} after {:?}",
                        waiting.waited
                    );
                    // Between what was counted and the hooks, which the fork has.
                    let after = text.lines().skip_while(|line| !line.starts_with("now:")).nth(1);
                    assert_eq!(after, Some("hooks: a fork is in progress and has them"), "{text}");
                    drop(held);
                });
                assert_eq!((now(), report().waiting), (vec![], None), "{kind:?}");
            }
        }
    });
}

// -- forks without handlers

/// A child of a raw clone, which no at-fork handler knows of.
fn bypass(f: impl FnOnce() -> i32) -> i32 {
    drive::until_others_sleep();
    // SAFETY: the arguments of a fork; the other threads sleep, so the allocator is at rest.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if pid == 0 {
        raw::exit_now(f());
    }
    i32::try_from(pid).expect("a pid")
}

fn head_is(ending: &str) -> bool {
    let text = report().to_string();
    text.lines().next() == Some(&format!("carefork in process {}: {ending}", std::process::id()))
}

/// The child of one says so, and its own children do, of whatever kind; its parent does not, nor children of other kinds.
#[test]
fn a_fork_without_handlers_is_said() {
    isolated("a_fork_without_handlers_is_said", 60, || {
        for kind in BOTH {
            ends_well(kind.fork(|| {
                check(1, !report().lineage.bypass);
                check(2, head_is("generation 1"));
                0
            }));
        }
        ends_well(bypass(|| {
            check(3, head_is("generation 1, after a fork without handlers"));
            check(4, report().lineage.bypass);
            for kind in BOTH {
                let pid = kind.fork(|| {
                    check(5, head_is("generation 2, after a fork without handlers"));
                    0
                });
                check(6, reap(pid, SOON) == Verdict::Exited(0));
            }
            0
        }));
        assert!(!report().lineage.bypass && head_is("generation 0"));
    });
}

/// Both at once, in that order.
#[test]
fn a_dirty_fork_before_one_without_handlers_is_said() {
    isolated("a_dirty_fork_before_one_without_handlers_is_said", 60, || {
        carefork::set_foreign_budget(Some(Duration::from_millis(1)));
        let inside = drive::inside("sleeper");
        ends_well(drive::foreign(|| {
            check(1, head_is("generation 1, after a dirty fork"));
            let pid = bypass(|| {
                check(2, head_is("generation 2, after a dirty fork, after a fork without handlers"));
                0
            });
            check(3, reap(pid, SOON) == Verdict::Exited(0));
            0
        }));
        inside.leave();
    });
}
