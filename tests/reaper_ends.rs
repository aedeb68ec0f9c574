//! Ends of children in full: cores, times, groups, debuggers; and the SIGCHLD handler where it is called in odd circumstances (C1-C5).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod watching;

use carefork::{
    Child, Claim, Ending, Exit, ForkOptions, ForkReplacement, Reaper, SigchldOwner, Usage, set_fork_replacement,
};
use common::{Setup, isolated, isolated_with, raw};
use crossbeam_channel::unbounded;
use kit::{SOON, assert_no_child, code, foreign, forked};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};
use watching::{is_readable, kill, no_zombie_left, only, owner, sleep_on, sleeper, watch, without_pidfds};

static NOTES: OnceLock<&'static [AtomicU64; 64]> = OnceLock::new();
/// This process's place in the notes.
static PLACE: AtomicUsize = AtomicUsize::new(0);
const PIDS: usize = 32;

/// Of this test's processes: how many signals each has heard, and from `PIDS` on who it is.
fn notes() -> &'static [AtomicU64; 64] {
    NOTES.get_or_init(kit::shared)
}

extern "C" fn note(_: i32) {
    notes()[PLACE.load(SeqCst)].fetch_add(1, SeqCst);
}

/// In a child: counts these signals, and does not go by them.
fn hears(signal: i32, place: usize) -> i32 {
    PLACE.store(place, SeqCst);
    kit::catch(signal, note);
    notes()[PIDS + place].store(raw::getpid().cast_unsigned().into(), SeqCst);
    sleep_on()
}

/// Who hears at this place by now.
#[track_caller]
fn hearer(place: usize) -> u32 {
    until("nobody hears", || notes()[PIDS + place].load(SeqCst) != 0);
    notes()[PIDS + place].load(SeqCst).try_into().expect("a pid")
}

#[track_caller]
fn has_heard(place: usize, times: u64) {
    until("it was not told", || notes()[place].load(SeqCst) >= times);
    assert_eq!(notes()[place].load(SeqCst), times);
}

#[track_caller]
fn until(otherwise: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + raw::patience(SOON);
    while !done() {
        assert!(Instant::now() < end, "{otherwise}");
        thread::yield_now();
    }
}

fn wait_for_zombie(pid: i32) {
    until("it does not end", || {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    });
}

/// As other code does it, with a mask of its own.
fn install(handler: extern "C" fn(i32), flags: i32) {
    // SAFETY: sigaction is plain data.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = flags;
    // SAFETY: `action` is live.
    unsafe { libc::sigaddset(&raw mut action.sa_mask, libc::SIGUSR2) };
    // SAFETY: a handler that keeps to what handlers may do.
    assert_eq!(unsafe { libc::sigaction(libc::SIGCHLD, &raw const action, std::ptr::null_mut()) }, 0);
}

/// To the calling thread.
fn signal_here() {
    // SAFETY: takes nothing.
    let own = unsafe { libc::pthread_self() };
    // SAFETY: a thread that runs.
    unsafe { libc::pthread_kill(own, libc::SIGCHLD) };
}

fn aborts() -> i32 {
    // SAFETY: as a crash.
    unsafe { libc::abort() }
}

/// A core that was dumped is told of, and none that was not; as wait(2) tells of the same child made by foreign code, since whether there
/// is one at all is the machine's to say.
#[test]
fn a_core_is_told_of() {
    isolated("a_core_is_told_of", 60, || {
        let dir = std::env::temp_dir().join(format!("carefork-core-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("a directory");
        std::env::set_current_dir(&dir).expect("there");
        // Nothing of the memory is in it: a page or two.
        std::fs::write("/proc/self/coredump_filter", "0").expect("/proc");
        let (_, most) = getrlimit(Resource::RLIMIT_CORE).expect("a limit");
        let reaper = Reaper::new().expect("a reaper");
        let mut dumped = 0;
        for limit in [most, 0] {
            setrlimit(Resource::RLIMIT_CORE, limit, most).expect("lowered");
            let mut status = 0;
            let pid = foreign(aborts);
            // SAFETY: `status` is live.
            assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
            let core = ExitStatus::from_raw(status).core_dumped();
            dumped += u32::from(core);
            let expected = Ending::Killed { signal: libc::SIGABRT, core };
            let mut child = forked(&ForkOptions::new(), |_| aborts());
            assert_eq!(child.wait().expect("a status").core_dumped(), core, "limit {limit}");
            assert_eq!(child.exit().map(|exit| exit.status), Some(expected));
            let (_, exits) = watch(&reaper, forked(&ForkOptions::new(), |_| aborts()));
            let exit = only(&reaper, &exits);
            assert_eq!((exit.status, exit.exit_status().map(ExitStatus::into_raw)), (expected, Some(status)));
            assert_eq!(exit.to_string().contains("(core dumped)"), core, "{exit}");
        }
        std::fs::remove_dir_all(&dir).expect("removed");
        if dumped == 0 {
            println!("no core is to be had here (RLIMIT_CORE, /proc/sys/kernel/core_pattern): half of the test");
        }
    });
}

/// What this process has used: user and system time, µs.
fn used() -> [u64; 2] {
    // SAFETY: rusage is plain data.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is live.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    [usage.ru_utime, usage.ru_stime].map(|t| t.tv_sec.cast_unsigned() * 1_000_000 + t.tv_usec.cast_unsigned())
}

/// A child that is busy until most of its time, by its own account, is of one kind: 0 is the program's, 1 the kernel's.
fn busy(kind: usize, mut work: impl FnMut()) -> Child {
    forked(&ForkOptions::new(), |_| {
        loop {
            work();
            let used = used();
            if used[kind] > 100_000 && used[kind] > 8 * used[1 - kind] {
                [0, 1].into_iter().for_each(|i| notes()[i].store(used[i], SeqCst));
                return 0;
            }
        }
    })
}

/// Time in the program and time in the kernel, each as the child itself had it counted.
#[test]
fn user_and_system_time_are_told_apart() {
    isolated("user_and_system_time_are_told_apart", 60, || {
        notes();
        let computes = || {
            (0..1_000_000u64).for_each(|i| {
                std::hint::black_box(i);
            });
        };
        let zeros = std::fs::File::open("/dev/zero").expect("zeros");
        let mut buffer = vec![0; 1 << 20];
        let mut calls = || {
            (0..10).for_each(|_| drop((&zeros).read(&mut buffer)));
        };
        let reaper = Reaper::new().expect("a reaper");
        let as_counted = |usage: Usage, kind: usize| {
            let told = [usage.user, usage.system];
            let counted = [0, 1].map(|i| Duration::from_micros(notes()[i].load(SeqCst)));
            // The rest is its exit's.
            assert!(told[0] >= counted[0] && told[1] >= counted[1], "{told:?}, {counted:?}");
            assert!(told[kind] > 2 * told[1 - kind], "{told:?}, {counted:?}");
        };
        for kind in [0, 1] {
            let busy = |calls: &mut dyn FnMut()| if kind == 0 { busy(0, computes) } else { busy(1, calls) };
            let mut child = busy(&mut calls);
            assert_eq!(code(&mut child), 0);
            as_counted(child.exit().and_then(|exit| exit.usage).expect("not lost"), kind);
            let (_, exits) = watch(&reaper, busy(&mut calls));
            as_counted(only(&reaper, &exits).usage.expect("not lost"), kind);
        }
    });
}

/// A child that a sibling may trace, asleep.
fn traceable(options: &ForkOptions<'_>) -> Child {
    let ready = &kit::shared()[0];
    let child = forked(options, |_| {
        // SAFETY: numbers only. Where there is no Yama, nobody needs the permission.
        unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::c_ulong::MAX, 0, 0, 0) };
        ready.store(1, SeqCst);
        sleep_on()
    });
    until("it does not start", || ready.load(SeqCst) == 1);
    child
}

/// A debugger of these, until a byte comes.
fn debugger(pids: &[u32]) -> (Child, UnixStream) {
    let traced = &kit::shared()[0];
    let (let_go, mut wait) = UnixStream::pair().expect("a pair");
    let mut debugger = forked(&ForkOptions::new(), |_| {
        let none = std::ptr::null_mut::<libc::c_void>();
        for &pid in pids {
            // SAFETY: a child of the same user; nothing is written to it.
            if unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, none, none) } != 0 {
                return raw::errno();
            }
        }
        traced.store(1, SeqCst);
        // Ends, and with it the trace.
        i32::from(wait.read_exact(&mut [0]).is_err())
    });
    while traced.load(SeqCst) == 0 {
        assert!(debugger.try_wait().expect("ours").is_none(), "there is no tracing here");
        thread::yield_now();
    }
    (debugger, let_go)
}

/// A child that not even SIGKILL makes go, since a debugger has the end to see first: an error after a while, and the child is what it
/// was. Reaped when the debugger lets go: by who waits on, or by the next call if it was dropped.
#[test]
fn terminate_is_bounded() {
    isolated("terminate_is_bounded", 60, || {
        let (mut child, mut dropped) = (traceable(&ForkOptions::new()), traceable(&ForkOptions::new().pidfd(false)));
        let pid = child.id();
        let (mut debugger, mut let_go) = debugger(&[pid, dropped.id()]);
        thread::scope(|s| {
            for child in [&mut child, &mut dropped] {
                s.spawn(|| {
                    let late = child.terminate(Duration::ZERO).expect_err("it cannot be reaped");
                    assert_eq!(late.kind(), std::io::ErrorKind::TimedOut, "{late}");
                    assert!(child.exit().is_none());
                    assert!(matches!(child.try_wait(), Ok(None)));
                });
            }
        });
        assert_eq!(child.id(), pid);
        drop(dropped);
        let_go.write_all(b".").expect("it waits");
        assert_eq!(code(&mut debugger), 0);
        assert!(child.wait().expect("a status").signal().is_some());
        no_zombie_left();
        assert_no_child();
    });
}

/// An orphan whose end a debugger has first, found so by a fork: a reaper that sleeps beside it is woken when the debugger lets go.
#[test]
fn an_orphan_under_a_debugger_is_reaped() {
    isolated("an_orphan_under_a_debugger_is_reaped", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let orphan = traceable(&ForkOptions::new());
        let pid = orphan.id();
        let (mut debugger, mut let_go) = debugger(&[pid]);
        drop(orphan);
        kill(pid, libc::SIGKILL);
        wait_for_zombie(pid.cast_signed());
        // Looks after orphans.
        assert!(matches!(debugger.try_wait(), Ok(None)));
        let_go.write_all(b".").expect("it waits");
        let gone = || std::fs::metadata(format!("/proc/{pid}")).is_err();
        let end = Instant::now() + raw::patience(SOON);
        while !gone() {
            assert!(Instant::now() < end, "a zombie stays");
            let mut fds = [raw::pollfd(reaper.as_raw_fd())];
            raw::poll_readable(&mut fds, end.saturating_duration_since(Instant::now()));
            if fds[0].revents != 0 {
                reaper.dispatch().expect("dispatch");
            }
        }
        assert_eq!(code(&mut debugger), 0);
        assert_no_child();
    });
}

/// Signals to groups: to all in that of a leader, until that is reaped; to the child alone if it was not made to lead one.
fn groups() {
    const USR1: i32 = libc::SIGUSR1;
    notes();
    let group = |place: usize| {
        let leader = forked(&ForkOptions::new().new_session(true), |token| {
            drop(token);
            drop(forked(&ForkOptions::new(), |_| hears(USR1, place + 1)));
            hears(USR1, place)
        });
        assert_eq!(hearer(place), leader.id());
        hearer(place + 1);
        leader
    };
    // Nobody is hit once the leader was reaped: the number may be another group's.
    let lives = |place: usize, heard: u64| {
        kill(hearer(place), USR1);
        has_heard(place, heard + 1);
        kill(hearer(place), libc::SIGKILL);
    };
    let mut leader = group(0);
    leader.signal_group(USR1).expect("ours");
    has_heard(0, 1);
    has_heard(1, 1);
    leader.kill().expect("ours");
    assert_eq!(code(&mut leader), -libc::SIGKILL);
    leader.signal_group(libc::SIGKILL).expect("left alone");
    lives(1, 1);

    let reaper = Reaper::new().expect("a reaper");
    let (watched, exits) = watch(&reaper, group(2));
    watched.signal_group(USR1).expect("ours");
    has_heard(2, 1);
    has_heard(3, 1);
    watched.kill().expect("ours");
    assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
    watched.signal_group(libc::SIGKILL).expect("left alone");
    lives(3, 1);

    // In this process's own group, which would go by such a signal.
    let child = forked(&ForkOptions::new(), |_| hears(USR1, 4));
    hearer(4);
    child.signal_group(USR1).expect("ours");
    has_heard(4, 1);
    let (watched, exits) = watch(&reaper, child);
    watched.signal_group(USR1).expect("ours");
    has_heard(4, 2);
    watched.kill().expect("ours");
    assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
    // In one that it has made by itself.
    let mut child = forked(&ForkOptions::new(), |token| {
        drop(token);
        // SAFETY: numbers only.
        unsafe { libc::setpgid(0, 0) };
        drop(forked(&ForkOptions::new(), |_| hears(USR1, 5)));
        sleep_on()
    });
    hearer(5);
    child.signal_group(libc::SIGKILL).expect("ours");
    assert_eq!(code(&mut child), -libc::SIGKILL);
    lives(5, 0);
    assert_no_child();
}

#[test]
fn groups_are_signalled() {
    isolated("groups_are_signalled", 60, groups);
}

#[test]
fn groups_are_signalled_without_pidfds() {
    isolated_with("groups_are_signalled_without_pidfds", 60, without_pidfds(), groups);
}

/// A reaper that is closed kills nobody any more: nor does whoever reaps the leader that it asked to end.
#[test]
fn a_closed_reaper_kills_no_group() {
    isolated("a_closed_reaper_kills_no_group", 60, || {
        notes();
        let (leader, member) = stubborn_group();
        let pid = leader.id();
        let reaper = Reaper::new().expect("a reaper");
        let (watched, _exits) = watch(&reaper, leader);
        watched.terminate(Duration::from_secs(3600)).expect("ours");
        has_heard(0, 1);
        has_heard(1, 1);
        reaper.close();
        kill(pid, libc::SIGKILL);
        no_zombie_left();
        kill(member, libc::SIGTERM);
        has_heard(1, 2);
        kill(member, libc::SIGKILL);
        assert_no_child();
    });
}

/// A leader and a member of its group, which hear SIGTERM and do not go by it.
fn stubborn_group() -> (Child, u32) {
    let leader = forked(&ForkOptions::new().new_session(true), |token| {
        drop(token);
        drop(forked(&ForkOptions::new(), |_| hears(libc::SIGTERM, 1)));
        hears(libc::SIGTERM, 0)
    });
    assert_eq!(hearer(0), leader.id());
    (leader, hearer(1))
}

/// A leader that was asked to end and has not: its group is not killed by a look at it.
#[test]
fn a_group_lives_as_long_as_its_leader() {
    isolated_with("a_group_lives_as_long_as_its_leader", 60, without_pidfds(), || {
        notes();
        let (leader, member) = stubborn_group();
        let reaper = Reaper::new().expect("a reaper");
        let (watched, exits) = watch(&reaper, leader);
        watched.terminate(Duration::from_secs(3600)).expect("ours");
        for _ in 0..3 {
            reaper.dispatch().expect("dispatch");
        }
        has_heard(1, 1);
        kill(member, libc::SIGTERM);
        has_heard(1, 2);
        watched.kill().expect("ours");
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
        no_zombie_left();
    });
}

/// C5: nor by `kill_deregister`, which kills the leader alone.
#[test]
fn a_deregistered_leader_leaves_its_group() {
    isolated("a_deregistered_leader_leaves_its_group", 60, || {
        notes();
        let (leader, member) = stubborn_group();
        let reaper = Reaper::new().expect("a reaper");
        let (watched, _exits) = watch(&reaper, leader);
        watched.kill_deregister().expect("ours");
        until("it is not reaped", || {
            reaper.dispatch().expect("dispatch");
            reaper.is_empty()
        });
        kill(member, libc::SIGTERM);
        has_heard(1, 1);
        kill(member, libc::SIGKILL);
        assert_no_child();
    });
}

/// In the child: before it leads a session.
unsafe fn stuck() -> i32 {
    // SAFETY: the caller's promise.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        loop {
            // SAFETY: until it is killed.
            unsafe { libc::pause() };
        }
    }
    pid
}

/// A fork returns before its child leads the session that it was asked for: signals to the group are for the child then.
#[test]
fn a_group_that_is_not_there_yet() {
    for setup in [Setup::default(), without_pidfds()] {
        isolated_with("a_group_that_is_not_there_yet", 60, setup, || {
            // SAFETY: it calls libc's fork.
            unsafe { set_fork_replacement(Some(ForkReplacement::Calls(stuck))) };
            let mut child = forked(&ForkOptions::new().new_session(true), |_| 0);
            child.signal_group(libc::SIGKILL).expect("ours");
            assert_eq!(code(&mut child), -libc::SIGKILL);
        });
    }
}

static CALLED: AtomicU32 = AtomicU32::new(0);
static SEEN: AtomicU32 = AtomicU32::new(0);
const USR2_BLOCKED: u32 = 1;
const CHLD_BLOCKED: u32 = 2;
const ON_STACK: u32 = 4;

/// A handler that notes what it runs under.
extern "C" fn looks_around(_: i32) {
    CALLED.fetch_add(1, SeqCst);
    SEEN.store(circumstances(), SeqCst);
}

fn circumstances() -> u32 {
    // SAFETY: sigset_t is plain data.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: only asks.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set) };
    // SAFETY: stack_t is plain data.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: only asks.
    unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    // SAFETY: `set` is live.
    let blocks = |signal| unsafe { libc::sigismember(&raw const set, signal) == 1 };
    let on_stack = stack.ss_flags & libc::SS_ONSTACK != 0;
    [(blocks(libc::SIGUSR2), USR2_BLOCKED), (blocks(libc::SIGCHLD), CHLD_BLOCKED), (on_stack, ON_STACK)]
        .into_iter()
        .map(|(is, bit)| u32::from(is) * bit)
        .sum()
}

/// C3: a handler from before is called as if it were still installed: under its mask, and on the alternate stack if it wanted that.
#[test]
fn a_handler_from_before_is_called_as_it_was_installed() {
    isolated("a_handler_from_before_is_called_as_it_was_installed", 60, || {
        let memory = vec![0u8; 1 << 16].leak();
        let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() };
        // SAFETY: the memory is nobody else's, for ever.
        assert_eq!(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) }, 0);
        let called = || {
            let seen = CALLED.load(SeqCst);
            signal_here();
            assert_eq!(CALLED.load(SeqCst), seen + 1);
            SEEN.load(SeqCst)
        };
        for (flags, expected) in [
            (libc::SA_ONSTACK, USR2_BLOCKED | CHLD_BLOCKED | ON_STACK),
            (libc::SA_ONSTACK | libc::SA_NODEFER, USR2_BLOCKED | ON_STACK),
            (0, USR2_BLOCKED | CHLD_BLOCKED),
            (libc::SA_NODEFER | libc::SA_RESTART, USR2_BLOCKED),
        ] {
            install(looks_around, flags);
            assert_eq!(called(), expected);
            let reaper = owner(SigchldOwner::Always);
            assert_eq!(called(), expected, "{flags:#x}");
            drop(reaper);
            assert_eq!(called(), expected);
            assert_eq!(circumstances(), 0);
        }
    });
}

extern "C" fn signals_itself(_: *mut libc::c_void) -> i32 {
    // Not `raise`, which asks this thread's memory for a number that is the parent's.
    // SAFETY: to itself.
    unsafe { libc::kill(raw::getpid(), libc::SIGCHLD) }
}

/// C6: nor does it do anything in a child that shares the memory, as vfork's do: the generation there is the parent's.
#[test]
fn in_shared_memory_the_handler_is_the_parents() {
    isolated("in_shared_memory_the_handler_is_the_parents", 60, || {
        install(looks_around, libc::SA_RESTART);
        let reaper = owner(SigchldOwner::Always);
        let mut stack = vec![0u128; 1 << 14];
        // Its end comes without a signal.
        let flags = libc::CLONE_VM | libc::CLONE_VFORK;
        let top = stack.as_mut_ptr_range().end.cast();
        // SAFETY: this thread sleeps until the child has ended, which has a stack of its own and makes two system calls.
        let pid = unsafe { libc::clone(signals_itself, top, flags, std::ptr::null_mut()) };
        assert!(pid > 0, "clone: {}", std::io::Error::last_os_error());
        // It was called there.
        assert_eq!(CALLED.load(SeqCst), 1);
        assert!(!is_readable(&reaper), "the child wrote into the parent's socket");
        let mut status = -1;
        // SAFETY: `status` is live.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) }, pid);
        assert_eq!(status, 0);
        // The parent's own does write.
        signal_here();
        assert_eq!(CALLED.load(SeqCst), 2);
        assert!(is_readable(&reaper));
        reaper.dispatch().expect("dispatch");
        assert!(!is_readable(&reaper));
    });
}

/// C4: owned, and blocked by every thread: the handler never runs. Its own children are told of by their pidfds, strangers are found
/// by the next dispatch, whatever that is for.
#[test]
fn an_owner_of_a_signal_that_is_blocked() {
    isolated("an_owner_of_a_signal_that_is_blocked", 60, || {
        // In a child, which has this thread only: the test harness has another one, which would take the signal.
        let pid = foreign(|| {
            kit::block(&[libc::SIGCHLD]);
            owns_what_is_blocked();
            0
        });
        assert_eq!(common::reap(pid, SOON), common::Verdict::Exited(0));
    });
}

fn owns_what_is_blocked() {
    install(looks_around, 0);
    let reaper = owner(SigchldOwner::Always);
    let (send, unknown) = unbounded();
    reaper.on_unknown(move |exit: &Exit| {
        send.send(exit.pid.cast_signed()).expect("the test waits");
        Claim::Mine
    });
    let stranger = foreign(|| 7);
    wait_for_zombie(stranger);
    reaper.dispatch().expect("dispatch");
    assert_eq!(unknown.try_iter().collect::<Vec<_>>(), [stranger]);

    let (watched, exits) = watch(&reaper, sleeper());
    let stranger = foreign(|| 7);
    wait_for_zombie(stranger);
    assert!(!is_readable(&reaper));
    watched.kill().expect("ours");
    raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], raw::patience(SOON));
    assert!(is_readable(&reaper), "nothing tells of it");
    assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
    assert_eq!(unknown.try_iter().collect::<Vec<_>>(), [stranger]);
    assert_no_child();
    // Nor is there a thread that has taken one of all these.
    assert_eq!(CALLED.load(SeqCst), 0);
    kit::block(&[]);
    assert_eq!(CALLED.load(SeqCst), 1, "the signal was not pending");
}

/// C4: a main loop that waits by itself leaves the signals of `Watched::terminate` to the reaper, whose descriptor tells of the end of
/// the grace, though not of deaths.
#[test]
fn a_main_loops_child_that_will_not_go() {
    isolated("a_main_loops_child_that_will_not_go", 60, || {
        notes();
        let hour = Duration::from_secs(3600);
        let reaper = owner(SigchldOwner::MainLoop);
        let child = forked(&ForkOptions::new(), |_| hears(libc::SIGTERM, 0));
        let pid = hearer(0);
        kit::freeze();
        let (watched, exits) = watch(&reaper, child);
        watched.terminate(hour).expect("ours");
        has_heard(0, 1);
        reaper.dispatch().expect("dispatch");
        // SIGKILL would leave it no time for this.
        watched.signal(libc::SIGTERM).expect("ours");
        has_heard(0, 2);
        carefork::testing::advance(hour);
        raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], raw::patience(SOON));
        assert!(is_readable(&reaper), "nothing tells of the end of the grace");
        reaper.dispatch().expect("dispatch");
        let mut status = 0;
        // SAFETY: `status` is live.
        assert_eq!(unsafe { libc::waitpid(-1, &raw mut status, 0) }, pid.cast_signed());
        reaper.dispatch().expect("dispatch");
        assert!(exits.is_empty() && watched.is_watched() && !is_readable(&reaper));
        reaper.reaped(pid, ExitStatus::from_raw(status)).expect("ours");
        assert_eq!(
            exits.try_recv().expect("called at once").status,
            Ending::Killed { signal: libc::SIGKILL, core: false }
        );
        assert!(!watched.is_watched());
        watched.terminate(hour).expect("left alone");
        assert_no_child();
    });
}
