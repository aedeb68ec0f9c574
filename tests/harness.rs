//! The test infrastructure can fail: each helper is shown the fault that it is there for.

// Plain forks, and what they leave in the kernel.
#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;

use common::guard_alloc::TRIPPED;
use common::{
    ForkGuardAlloc, Outcome, Refuse, Rng, Setup, Verdict, between, check, count_syscalls, fds_of, foreign_handlers,
    fork_many, isolated, isolated_with, proc, raw, reap, run_isolated, seccomp_refuse, self_fds, status_here,
    status_of, strace_mark, thread_count,
};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOC: ForkGuardAlloc = ForkGuardAlloc;

const SOON: Duration = Duration::from_secs(10);

/// Forks by libc; the child runs `f` and ends with what it returns.
fn forked(f: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: each `f` here keeps to what a child of a process with threads may do, or is meant to hang.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        raw::exit_now(f());
    }
    pid
}

/// A file's path, given by the environment to the process of an isolated test: what that says there, others find.
const NOTE: &str = "HARNESS_NOTE";

fn note_at(name: &str) -> (PathBuf, Vec<(String, String)>) {
    let path = std::env::temp_dir().join(format!("carefork-harness-{name}-{}", std::process::id()));
    let env = vec![(NOTE.to_owned(), path.display().to_string())];
    (path, env)
}

/// In the isolated test. All of it is there, or nothing.
fn leave_note(text: &str) {
    let path = PathBuf::from(std::env::var_os(NOTE).expect("given above"));
    let aside = path.with_extension("half");
    std::fs::write(&aside, text).expect("a temporary file");
    std::fs::rename(aside, path).expect("a temporary file");
}

/// Waits until a process, or a thread of this one, sleeps in that system call; the bound is the watchdog's.
fn until_in(task: &str, call: libc::c_long) {
    let (path, call) = (format!("/proc/{task}/syscall"), format!("{call} "));
    while !std::fs::read_to_string(&path).is_ok_and(|now| now.starts_with(&call)) {
        thread::sleep(Duration::from_millis(1));
    }
}

fn is_alive(pid: i32) -> bool {
    fds_of(pid).is_ok_and(|fds| !fds.is_empty())
}

fn failure_of(outcome: &Outcome) -> String {
    outcome.failure().expect("this test is made to fail")
}

#[test]
fn isolated_runs_alone_in_a_clean_process() {
    let outer = std::process::id();
    isolated_with(
        "isolated_runs_alone_in_a_clean_process",
        20,
        Setup { env: vec![("OUTER".to_owned(), outer.to_string())], ..Setup::default() },
        || {
            assert_ne!(std::env::var("OUTER"), Ok(std::process::id().to_string()));
            assert_eq!(self_fds().as_slice(), [0, 1, 2]);
            // The test's thread and the one that waits for it.
            assert_eq!(thread_count(), 2);
            assert_eq!(status_here().map(|s| s.sig_blk), Ok(0));
            // SAFETY: takes no pointer.
            assert_eq!(unsafe { libc::getsid(0) }, raw::getpid());
        },
    );
}

#[test]
fn a_hang_becomes_a_failure_with_stacks() {
    static LOCK: Mutex<()> = Mutex::new(());
    let (path, env) = note_at("hang");
    let setup = Setup { env, hangs: Some(path.clone()), ..Setup::default() };
    let outcome = run_isolated("a_hang_becomes_a_failure_with_stacks", 1, setup, || {
        let _held = LOCK.lock();
        // Hangs on the lock, in a child in a session of its own, while the parent waits without a bound.
        let pid = forked(|| {
            // SAFETY: takes nothing.
            unsafe { libc::setsid() };
            drop(LOCK.lock());
            0
        });
        // SAFETY: takes nothing.
        let here = unsafe { libc::gettid() };
        thread::spawn(move || {
            until_in(&pid.to_string(), libc::SYS_futex);
            until_in(&format!("self/task/{here}"), libc::SYS_wait4);
            leave_note("both");
        });
        // SAFETY: no status is asked for.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    });
    std::fs::remove_file(path).expect("left by the test");
    let text = failure_of(&outcome);
    assert!(text.contains("hung") && text.contains("(not ended after 1 s)"), "{text}");
    // The name of the thread, cut to 15 by the kernel; who waits for what.
    assert!(text.contains("a_hang_becomes_"), "{text}");
    assert!(text.contains("futex"), "{text}");
    assert!(text.contains("wait4"), "{text}");
    let stacks = text.matches("harness::a_hang_becomes_a_failure_with_stacks").count();
    assert!(text.contains("no gdb") || stacks >= 2, "{text}");
}

#[test]
fn nobody_is_left_when_a_hung_test_was_killed() {
    let (path, env) = note_at("left");
    let setup = Setup { env, hangs: Some(path.clone()), ..Setup::default() };
    let outcome = run_isolated("nobody_is_left_when_a_hung_test_was_killed", 1, setup, || {
        let child = forked(|| {
            loop {
                thread::park();
            }
        });
        leave_note(&child.to_string());
        loop {
            thread::park();
        }
    });
    let child: i32 = std::fs::read_to_string(&path).expect("written by the test").parse().expect("a pid");
    std::fs::remove_file(path).expect("it was there");
    assert!(matches!(outcome.verdict, Verdict::Hung { .. }));
    // It was killed, and dies when it comes to its turn. Its new parent, init, may not have reaped it yet.
    let deadline = Instant::now() + raw::patience(SOON);
    while is_alive(child) {
        assert!(Instant::now() < deadline, "{child} lives on");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_failed_test_is_reported_with_its_output() {
    let outcome = run_isolated("a_failed_test_is_reported_with_its_output", 20, Setup::default(), || {
        println!("a line before");
        panic!("as it must");
    });
    assert_eq!(outcome.verdict, Verdict::Exited(101));
    let text = failure_of(&outcome);
    assert!(text.contains("a line before") && text.contains("as it must"), "{text}");
}

#[test]
fn a_test_killed_by_a_signal_is_reported() {
    let outcome = run_isolated("a_test_killed_by_a_signal_is_reported", 20, Setup::default(), || std::process::abort());
    assert_eq!(outcome.verdict, Verdict::Signaled(libc::SIGABRT));
    assert!(failure_of(&outcome).contains("signal 6"));
}

#[test]
fn a_test_that_does_not_run_is_a_failure() {
    let outcome = run_isolated("there_is_no_such_test", 20, Setup::default(), || ());
    assert!(failure_of(&outcome).contains("was not run"));
}

#[test]
fn an_exit_in_the_middle_is_a_failure() {
    let outcome = run_isolated("an_exit_in_the_middle_is_a_failure", 20, Setup::default(), || raw::exit_now(0));
    assert!(failure_of(&outcome).contains("before its end"));
}

#[test]
fn an_escaped_child_is_a_failure() {
    let outcome = run_isolated("an_escaped_child_is_a_failure", 20, Setup::default(), || {
        // SAFETY: the child does what it must not, and is caught at it before anything else can happen.
        let pid = unsafe { libc::fork() };
        if pid != 0 {
            assert_eq!(reap(pid, SOON), Verdict::Exited(86));
        }
    });
    assert!(failure_of(&outcome).contains("escape"));
}

#[test]
fn a_process_left_behind_is_a_failure() {
    let outcome = run_isolated("a_process_left_behind_is_a_failure", 20, Setup::default(), || {
        forked(|| {
            loop {
                thread::park();
            }
        });
    });
    assert!(failure_of(&outcome).contains("left processes behind"));
}

#[test]
fn the_watched_die_with_the_watcher() {
    let (path, env) = note_at("watched");
    // The isolated test plays the watcher: it starts this binary for one isolated test that waits, and kills that.
    let watcher = std::env::var_os("WATCHER").is_some();
    let name = "the_watched_die_with_the_watcher";
    if watcher || std::env::var_os("CAREFORK_ISOLATED").is_some() {
        isolated(name, 20, || {
            let child = forked(|| {
                loop {
                    thread::park();
                }
            });
            leave_note(&format!("{} {child}", raw::getpid()));
            loop {
                thread::park();
            }
        });
        return;
    }
    let mut watcher = std::process::Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", name])
        .env("WATCHER", "1")
        .envs(env)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("this binary starts");
    let deadline = Instant::now() + raw::patience(SOON);
    // The shell that stands guard, a third descendant, is started right after the test.
    let own = watcher.id() as i32;
    while !path.exists() || common::trace::tree(own).len() < 4 {
        assert!(Instant::now() < deadline, "no shell stands guard");
        thread::sleep(Duration::from_millis(5));
    }
    watcher.kill().expect("it is ours");
    watcher.wait().expect("it is ours");
    let text = std::fs::read_to_string(&path).expect("it is there");
    std::fs::remove_file(&path).expect("it was there");
    let pids: Vec<i32> = text.split(' ').map(|s| s.parse().expect("a pid")).collect();
    while pids.iter().any(|&pid| is_alive(pid)) {
        assert!(Instant::now() < deadline, "{pids:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn verdicts_of_children() {
    isolated("verdicts_of_children", 30, || {
        assert_eq!(reap(forked(|| 0), SOON), Verdict::Exited(0));
        let checked = forked(|| {
            check(41, true);
            check(42, false);
            0
        });
        assert_eq!(reap(checked, SOON), Verdict::Exited(42));
        assert_eq!(reap(checked, SOON), Verdict::Lost);
        let killed = forked(|| {
            // SAFETY: to itself.
            unsafe { libc::raise(libc::SIGKILL) }
        });
        assert_eq!(reap(killed, SOON), Verdict::Signaled(libc::SIGKILL));
        let hung = forked(|| {
            loop {
                thread::park();
            }
        });
        until_in(&hung.to_string(), libc::SYS_futex);
        let Verdict::Hung { trace } = reap(hung, Duration::from_millis(20)) else { panic!("it cannot end") };
        assert!(trace.contains("futex"), "{trace}");
        assert!(trace.contains(&format!("process {hung}")), "{trace}");
    });
}

#[test]
fn children_by_the_thousand() {
    isolated("children_by_the_thousand", 60, || {
        let code = |i| if i == 700 { 3 } else { 0 };
        let tally = fork_many(2000, 8, SOON, |i| forked(|| code(i)));
        assert_eq!((tally.total(), tally.exits.get(&0), tally.exits.get(&3)), (2000, Some(&1999), Some(&1)));
        let verdict = std::panic::catch_unwind(|| tally.expect_clean(2000));
        assert!(verdict.is_err());
        // Three hung ones are enough.
        let tally = fork_many(1000, 1, Duration::from_millis(50), |_| {
            forked(|| {
                loop {
                    thread::park();
                }
            })
        });
        assert_eq!((tally.total(), tally.hung, tally.traces.len()), (3, 3, 1));
    });
}

#[test]
fn refused_calls_fail() {
    isolated("refused_calls_fail", 20, || {
        let before = forked(|| 0);
        assert_eq!(reap(before, SOON), Verdict::Exited(0));
        seccomp_refuse(&[(libc::SYS_clone, libc::EAGAIN), (libc::SYS_pidfd_open, libc::EPERM)]).expect("a filter");
        assert_eq!((forked(|| 0), raw::errno()), (-1, libc::EAGAIN));
        assert!(raw::pidfd_open(raw::getpid()).is_none());
        // Threads go on, and have it too.
        let in_thread = thread::spawn(|| (forked(|| 0), raw::errno())).join();
        assert_eq!(in_thread.ok(), Some((-1, libc::EAGAIN)));
    });
}

#[test]
fn refused_before_the_start_and_only_with_one_argument() {
    let wipe = libc::MADV_WIPEONFORK.cast_unsigned();
    let refuse = vec![Refuse::when(libc::SYS_madvise, 2, wipe, libc::EINVAL)];
    let setup = Setup { refuse, ..Setup::default() };
    isolated_with("refused_before_the_start_and_only_with_one_argument", 20, setup, || {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at the kernel's choice.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, anonymous, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: the page is ours and nobody uses it.
        let other = unsafe { libc::madvise(page, 4096, libc::MADV_DONTFORK) };
        assert_eq!(other, 0);
        // SAFETY: as above.
        let refused = unsafe { libc::madvise(page, 4096, libc::MADV_WIPEONFORK) };
        assert_eq!((refused, raw::errno()), (-1, libc::EINVAL));
    });
}

#[test]
fn another_user_and_limits() {
    if !common::can_change_user() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let rlimits = vec![(libc::RLIMIT_NOFILE, 32)];
    let setup = Setup { uid: Some(61_234), rlimits, ..Setup::default() };
    isolated_with("another_user_and_limits", 20, setup, || {
        // SAFETY: takes nothing.
        assert_eq!(unsafe { libc::geteuid() }, 61_234);
        let files: Vec<_> = (0..40).map_while(|_| std::fs::File::open("/dev/null").ok()).collect();
        assert_eq!(files.len(), 32 - 3);
    });
}

#[test]
fn system_calls_are_seen() {
    let calls = count_syscalls("system_calls_are_seen", 30, Setup::default(), || {
        strace_mark("from");
        // SAFETY: takes nothing.
        unsafe { libc::getppid() };
        let pid = forked(|| {
            // SAFETY: takes nothing.
            unsafe { libc::setsid() }.min(0)
        });
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        strace_mark("to");
    });
    let Some(calls) = calls else { return };
    let calls = between(&calls, "from", "to");
    let count = |name: &str| calls.iter().filter(|c| c.name == name).count();
    assert_eq!((count("getppid"), count("clone"), count("setsid")), (1, 1, 1), "{calls:#?}");
    let (forker, child) = (calls[0].pid, calls.iter().find(|c| c.name == "setsid").map(|c| c.pid));
    assert_ne!(Some(forker), child);
    // Whatever waited for the child was resumed, and joined to its result.
    assert!(!calls.iter().any(|c| c.name != "exit_group" && c.line.contains("unfinished")), "{calls:#?}");
}

#[test]
fn the_guarding_allocator_trips() {
    isolated("the_guarding_allocator_trips", 20, || {
        let allocates = || {
            ForkGuardAlloc::armed(|| drop(std::hint::black_box(Box::new(1))));
            0
        };
        assert_eq!(reap(forked(allocates), SOON), Verdict::Exited(TRIPPED));
        let boxed = Box::new(1);
        let frees = || {
            ForkGuardAlloc::arm();
            drop(std::hint::black_box(boxed));
            0
        };
        assert_eq!(reap(forked(frees), SOON), Verdict::Exited(TRIPPED));
        let grows = || {
            let mut v = vec![0u8; 16];
            ForkGuardAlloc::arm_all();
            v.reserve_exact(4096);
            std::hint::black_box(&v).capacity() as i32 & 1
        };
        assert_eq!(reap(forked(grows), SOON), Verdict::Exited(TRIPPED));
        // Armed before the fork, the child is too; and what is allowed does not trip it.
        ForkGuardAlloc::arm();
        let quiet = forked(|| {
            check(1, self_fds().contains(2));
            check(2, status_here().is_ok());
            check(3, status_of(raw::getpid()).is_ok_and(|s| s.threads == 1));
            check(4, thread_count() == 1);
            0
        });
        let loud = forked(|| {
            drop(std::hint::black_box(vec![0u8; 64]));
            0
        });
        ForkGuardAlloc::disarm();
        assert_eq!(reap(quiet, SOON), Verdict::Exited(0));
        assert_eq!(reap(loud, SOON), Verdict::Exited(TRIPPED));
    });
}

#[test]
fn what_proc_says() {
    isolated("what_proc_says", 20, || {
        let before = self_fds();
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        let after = self_fds();
        assert_eq!(after.first_not_in(&before), Some(file.as_raw_fd()));
        assert_eq!(before.first_not_in(&after), None);
        let of = fds_of(raw::getpid()).expect("/proc/PID/fd");
        assert!(of.contains(&(file.as_raw_fd(), "/dev/null".into())));

        let set = libc::SIGUSR1;
        // SAFETY: an all-zero signal set is an empty one on Linux.
        let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is ours.
        unsafe { libc::sigaddset(&raw mut mask, set) };
        // SAFETY: the set is ours, and the old mask is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const mask, std::ptr::null_mut()) };
        // SAFETY: ignoring calls nothing.
        unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) };
        let here = status_here().expect("own status");
        assert!(here.blocks(set) && !here.blocks(libc::SIGUSR2));
        assert!(here.ignores(libc::SIGUSR2) && !here.ignores(set));
        // Rust's runtime: a handler for the stack's end, and SIGPIPE ignored.
        assert!(here.catches(libc::SIGSEGV) && here.ignores(libc::SIGPIPE));
        // In another thread's eyes the mask of a process is its first thread's.
        // (libc blocks all in it for as long as it starts this thread, and it may not have come back from that.)
        while status_of(raw::getpid()).expect("own status").blocks(set) {
            thread::yield_now();
        }
        let mut seen = 0;
        proc::for_each_fd(c"/proc/self/fd", |_| seen += 1).expect("own descriptors");
        assert_eq!(seen, after.as_slice().len());
    });
}

#[test]
fn random_numbers_repeat() {
    // The first outputs of SplitMix64 for seed 0, as its author publishes them.
    let mut rng = Rng::from_seed(0);
    assert_eq!([rng.next(), rng.next()], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    let env = vec![("CAREFORK_SEED".to_owned(), "42".to_owned())];
    isolated_with("random_numbers_repeat", 20, Setup { env, ..Setup::default() }, || {
        let (mut a, mut b) = (Rng::new(), Rng::from_seed(42));
        assert!((0..100).all(|_| a.next() == b.next()));
        let mut items: Vec<u32> = (0..100).collect();
        a.shuffle(&mut items);
        assert!(!items.is_sorted());
        items.sort_unstable();
        assert!(items.iter().copied().eq(0..100));
    });
}

// At-fork handlers, registered at three times: by .preinit_array, by a constructor as a library would, and in the test.

/// Who ran, in order; each fork of the test that looks here writes at most 6.
static ORDER: [AtomicU32; 16] = [const { AtomicU32::new(0) }; 16];
static NEXT: AtomicUsize = AtomicUsize::new(0);

fn note(who: u8) {
    let at = NEXT.fetch_add(1, Ordering::Relaxed);
    if let Some(cell) = ORDER.get(at) {
        cell.store(who.into(), Ordering::Relaxed);
    }
}

macro_rules! handlers {
    ($($name:ident $letter:literal;)*) => { $(extern "C" fn $name() { note($letter); })* };
}
handlers! {
    early_prepare b'E'; early_parent b'e'; early_child b'1';
    library_prepare b'L'; library_parent b'l'; library_child b'2';
    late_prepare b'T'; late_parent b't'; late_child b'3';
}

early_foreign_handlers!(early_prepare, early_parent, early_child);

#[used]
// SAFETY: an entry of this section is a function that takes no more than (argc, argv, envp); it may call libc.
#[unsafe(link_section = ".init_array")]
static AS_A_LIBRARY: extern "C" fn() = {
    extern "C" fn register() {
        foreign_handlers(library_prepare, library_parent, library_child);
    }
    register
};

fn order() -> [u8; 6] {
    std::array::from_fn(|i| ORDER[i].load(Ordering::Relaxed) as u8)
}

#[test]
fn early_handlers_are_early() {
    isolated("early_handlers_are_early", 20, || {
        foreign_handlers(late_prepare, late_parent, late_child);
        NEXT.store(0, Ordering::Relaxed);
        let pid = forked(|| {
            check(1, order() == *b"TLE123");
            0
        });
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        assert_eq!(order(), *b"TLEelt");
    });
}
