//! From the start of prepare to the child's return carefork allocates, frees and says nothing, and makes few system calls (G9).

#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;
mod drive;

use carefork::{CareFd, ForkError, Hook, Mutex, OnFork, Reaper, SigchldOwner, lineage, no_forking, register, stats};
use common::{ForkGuardAlloc, Setup, Verdict, between, count_syscalls, foreign_handlers, isolated, reap, strace_mark};
use drive::{BOTH, Kind, MS, SOON, coordinated, foreign, freeze, inside, run_clock, until, until_shut};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread;

#[global_allocator]
static ALLOC: ForkGuardAlloc = ForkGuardAlloc;

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// Registered after carefork's: prepares before it, and runs after it on both sides.
fn arm_in_every_fork() {
    extern "C" fn arm() {
        ForkGuardAlloc::arm();
    }
    extern "C" fn disarm() {
        ForkGuardAlloc::disarm();
    }
    foreign_handlers(arm, disarm, disarm);
}

#[test]
fn neither_kind_of_fork_allocates() {
    isolated("neither_kind_of_fork_allocates", 60, || {
        arm_in_every_fork();
        for kind in BOTH {
            ends_well(kind.fork(|| 0));
            // A thread that carefork has never seen: its seat is taken in the prepare handler.
            let fresh = thread::spawn(move || ends_well(kind.fork(|| 0)));
            assert!(fresh.join().is_ok());
        }
        // More threads than there are seats at first, each forking before it has done anything else.
        let all_there = std::sync::Barrier::new(80);
        thread::scope(|s| {
            for n in 0..80 {
                let all_there = &all_there;
                s.spawn(move || {
                    all_there.wait();
                    if n % 8 == 0 {
                        ends_well(foreign(|| 0));
                    }
                    drop(no_forking());
                    all_there.wait();
                });
            }
        });
    });
}

/// Forks are noted down for an owner of SIGCHLD, in the prepare handler too.
#[test]
fn nor_with_an_owner_of_sigchld() {
    isolated("nor_with_an_owner_of_sigchld", 30, || {
        let reaper = Reaper::new().expect("a reaper");
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        arm_in_every_fork();
        for kind in BOTH {
            (0..3).for_each(|_| ends_well(kind.fork(|| 0)));
        }
    });
}

/// The whole call, but for the options and what the parent's `Child` is made of, which allocate nothing either.
#[test]
fn the_whole_call_allocates_nothing() {
    isolated("the_whole_call_allocates_nothing", 30, || {
        ForkGuardAlloc::arm();
        let pid = coordinated(|| 0);
        ForkGuardAlloc::disarm();
        ends_well(pid.expect("a fork"));
    });
}

#[test]
fn with_hooks_locks_and_care_fds() {
    isolated("with_hooks_locks_and_care_fds", 60, || {
        arm_in_every_fork();
        static RAN: AtomicU32 = AtomicU32::new(0);
        let count = || {
            RAN.fetch_add(1, SeqCst);
        };
        let locks: Vec<_> = (0..20).map(|_| Arc::new(std::sync::Mutex::new(vec![1]))).collect();
        let mut hooks: Vec<_> = locks.iter().map(|lock| register(Hook::std_mutex("lock", Arc::clone(lock)))).collect();
        hooks.push(register(Hook::new("all").prepare(count).parent(count).child(count).undo(count)));
        let open = || File::open("/dev/null");
        let fds: Vec<_> =
            (0..50).map(|n| CareFd::open_on(if n % 2 == 0 { OnFork::Close } else { OnFork::Cleanup }, open)).collect();
        let own: Vec<_> = (0..50).map(Mutex::new).collect();
        for kind in BOTH {
            ends_well(kind.fork(|| i32::from(own.iter().any(|m| m.try_lock().is_none()))));
        }
        assert_eq!(RAN.load(SeqCst), 4);
        // Newcomers are linked, and those that left unlinked, by the fork; freed outside.
        freeze();
        for kind in BOTH {
            let stop = AtomicBool::new(false);
            thread::scope(|s| {
                s.spawn(|| {
                    while !stop.load(SeqCst) {
                        let some: Vec<_> = (0..10).map(|_| register(Hook::new("short-lived").prepare(count))).collect();
                        drop(some);
                    }
                });
                for _ in 0..50 {
                    ends_well(kind.fork(|| 0));
                }
                stop.store(true, SeqCst);
            });
        }
        assert!(fds.iter().all(Result::is_ok));
    });
}

#[test]
fn forks_that_wait_fail_or_go_dirty() {
    isolated("forks_that_wait_fail_or_go_dirty", 60, || {
        arm_in_every_fork();
        let clock = run_clock(20 * MS);
        let busy: Vec<_> = (0..10).map(|_| inside("busy")).collect();
        assert!(matches!(coordinated(|| 1), Err(ForkError::Busy { .. })));
        ends_well(foreign(|| i32::from(!lineage().dirty)));
        drop(busy);
        // Time stands still: nobody's budget ends.
        drop(clock);
        // With a lock that is not to be had: once round the other way.
        let lock = Arc::new(std::sync::Mutex::new(0));
        let hook = register(Hook::std_mutex("lock", Arc::clone(&lock)));
        for kind in BOTH {
            let held = lock.lock().expect("not poisoned");
            thread::scope(|s| {
                s.spawn(|| ends_well(kind.fork(|| 0)));
                until_shut_or_soon();
                drop(held);
            });
        }
        drop(hook);
        assert_eq!(stats().dirty, 1);
    });
}

fn until_shut_or_soon() {
    let mut left = 20;
    until(|| {
        left -= 1;
        left == 0
    });
}

#[test]
fn vetoes_and_what_they_say() {
    isolated("vetoes_and_what_they_say", 60, || {
        arm_in_every_fork();
        let literal = register(Hook::new("literal").try_prepare(|| Err("no".into())));
        for _ in 0..2 {
            assert!(matches!(coordinated(|| 1), Err(ForkError::Vetoed { .. })));
            ends_well(foreign(|| 0));
        }
        drop(literal);
        // Text of its own, made beforehand: carefork does not free it in the fork either.
        let made: Vec<String> = (0..6).map(|n| format!("reason {n}")).collect();
        let made = Arc::new(std::sync::Mutex::new(made));
        let hooks: Vec<_> = (0..2)
            .map(|_| {
                let made = Arc::clone(&made);
                register(Hook::new("owned").try_prepare(move || {
                    let reason = made.lock().ok().and_then(|mut made| made.pop());
                    Err(reason.unwrap_or_default().into())
                }))
            })
            .collect();
        let Err(ForkError::Vetoed { hook, reason }) = coordinated(|| 1) else { panic!("it says no") };
        assert_eq!((hook, &*reason), ("owned", "reason 5"));
        // Both say no, and are left out.
        ends_well(foreign(|| 0));
        ends_well(foreign(|| 0));
        drop(hooks);
    });
}

// -- system calls

/// What a fork may cost a process in which nothing is in the way.
#[test]
fn a_fork_makes_few_system_calls() {
    let calls = count_syscalls("a_fork_makes_few_system_calls", 60, Setup::default(), || {
        // The first one maps what the others use.
        for kind in BOTH {
            ends_well(kind.fork(|| 0));
        }
        for (kind, [from, to]) in [(Kind::Coordinated, ["c-from", "c-to"]), (Kind::Foreign, ["f-from", "f-to"])] {
            strace_mark(from);
            let pid = kind.fork(|| 0);
            strace_mark(to);
            ends_well(pid);
        }
        strace_mark("e-from");
        let veto = register(Hook::new("veto").try_prepare(|| Err("no".into())));
        assert!(coordinated(|| 1).is_err());
        drop(veto);
        strace_mark("e-to");
    });
    let Some(calls) = calls else { return };
    for (from, to, most) in [("c-from", "c-to", 12), ("f-from", "f-to", 5)] {
        let calls = between(&calls, from, to);
        let parent = calls.first().map_or(0, |c| c.pid);
        let ours: Vec<_> = calls.iter().filter(|c| c.pid == parent).map(|c| c.name.as_str()).collect();
        println!("{from}: {ours:?}");
        assert!(ours.len() <= most, "{from}: {ours:?}");
        // From pidfd_open on: the `Child`, which is checked, registered, and closed here with it; in debug builds its
        // descriptor is looked at as well.
        let known = ["getpid", "rt_sigprocmask", "membarrier", "clone", "fork", "futex"];
        let child = ["pidfd_open", "waitid", "fcntl", "newfstatat", "fstat", "close"];
        let known = [&known[..], &child[..]].concat();
        let strange = |name: &&str| !known.contains(name);
        assert!(!ours.iter().any(strange), "{from}: {ours:?}");
    }
    // Of the child: libc's own few, the mask, and nothing else. It may run on after the mark: look at all of its calls.
    for (from, to, most) in [("c-from", "c-to", 6), ("f-from", "f-to", 6)] {
        let made = between(&calls, from, to);
        let parent = made.first().map_or(0, |c| c.pid);
        let children: Vec<_> = made.iter().filter(|c| c.name.starts_with("clone") || c.name == "fork").collect();
        let child =
            children.first().and_then(|c| c.line.rsplit_once("= ")).and_then(|(_, pid)| pid.trim().parse().ok());
        let child: i32 = child.unwrap_or_else(|| panic!("{children:?}"));
        assert_ne!(child, parent);
        let theirs: Vec<_> = calls.iter().filter(|c| c.pid == child).map(|c| c.name.as_str()).collect();
        println!("child of {from}: {theirs:?}");
        assert!(theirs.len() <= most, "{theirs:?}");
        assert!(!theirs.iter().any(|name| ["brk", "mmap", "openat", "write"].contains(name)), "{theirs:?}");
    }
}

#[test]
fn until_shut_sees_a_shut_gate() {
    isolated("until_shut_sees_a_shut_gate", 10, || {
        drive::freeze();
        let busy = inside("busy");
        thread::scope(|s| {
            s.spawn(|| ends_well(coordinated(|| 0).expect("a fork")));
            until_shut();
            busy.leave();
        });
    });
}
