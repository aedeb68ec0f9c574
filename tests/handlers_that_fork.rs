//! A signal handler that forks in the middle of a wait, and whose child goes on with that wait (G6).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;

use carefork::testing::advance;
use carefork::{ForkOptions, Hook, Mutex, RwLock, no_forking, register, set_foreign_budget};
use common::{Verdict, isolated, raw, reap};
use drive::{Kind, SOON, freeze, gettid, until, until_shut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// The pid that the handler's fork has returned.
static HANDLERS_FORK: AtomicI32 = AtomicI32::new(-1);

extern "C" fn forks(_: i32) {
    // SAFETY: what the child does next is what is tested.
    HANDLERS_FORK.store(unsafe { libc::fork() }, SeqCst);
}

/// Runs `waits`, which waits for another thread's fork, and a handler that forks in the middle; the child goes on with it.
fn forked_in_the_middle(waits: impl FnOnce()) {
    set_foreign_budget(Some(Duration::ZERO));
    // SAFETY: a handler that forks.
    unsafe { libc::signal(libc::SIGUSR1, forks as extern "C" fn(i32) as usize) };
    let tid = gettid();
    let pid = raw::getpid();
    let other = thread::spawn(move || {
        let call = format!("/proc/self/task/{tid}/syscall");
        until(|| std::fs::read_to_string(&call).is_ok_and(|c| c.starts_with(&format!("{} ", libc::SYS_futex))));
        // SAFETY: a thread of this process.
        unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, libc::SIGUSR1) };
    });
    waits();
    if HANDLERS_FORK.load(SeqCst) == 0 {
        // Nothing is counted twice, and no fork of this child waits for that.
        advance(Duration::ZERO);
        // SAFETY: the child exits at once.
        let next = unsafe { ForkOptions::new().timeout_never().spawn(|| 0) };
        raw::exit_now(next.map_or(1, |mut c| i32::from(!c.wait().is_ok_and(|s| s.success()))));
    }
    other.join().expect("no panic");
    ends_well(HANDLERS_FORK.load(SeqCst));
}

#[test]
fn a_handler_forks_while_a_hook_is_waited_for() {
    isolated("a_handler_forks_while_a_hook_is_waited_for", 60, || {
        freeze();
        let (begun, held) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        let (tell, hold) = (Arc::clone(&begun), Arc::clone(&held));
        let slow = register(Hook::new("slow").prepare(move || {
            tell.store(true, SeqCst);
            until(|| !hold.load(SeqCst) || HANDLERS_FORK.load(SeqCst) == 0);
        }));
        let _other = register(Hook::new("other").rank(5).prepare(|| ()));
        let fork = thread::spawn(|| ends_well(Kind::Coordinated.fork(|| 0)));
        until(|| begun.load(SeqCst));
        let let_go = thread::spawn(move || {
            until(|| HANDLERS_FORK.load(SeqCst) > 0);
            held.store(false, SeqCst);
        });
        forked_in_the_middle(|| drop(slow));
        let_go.join().expect("no panic");
        fork.join().expect("the child is well");
    });
}

#[test]
fn a_handler_forks_at_the_gate() {
    isolated("a_handler_forks_at_the_gate", 60, || {
        freeze();
        let held = Arc::new(AtomicBool::new(true));
        let hold = Arc::clone(&held);
        // In the parent, where the gate is shut still.
        let _slow =
            register(Hook::new("slow").parent(move || until(|| !hold.load(SeqCst) || HANDLERS_FORK.load(SeqCst) == 0)));
        let fork = thread::spawn(|| ends_well(Kind::Coordinated.fork(|| 0)));
        until_shut();
        let let_go = thread::spawn(move || {
            until(|| HANDLERS_FORK.load(SeqCst) > 0);
            held.store(false, SeqCst);
        });
        forked_in_the_middle(|| drop(no_forking()));
        let_go.join().expect("no panic");
        fork.join().expect("the child is well");
    });
}

/// Who holds the lock is not in the child: the wait that it comes back to ends by a panic.
#[test]
fn a_handler_forks_while_a_lock_is_waited_for() {
    isolated("a_handler_forks_while_a_lock_is_waited_for", 60, || {
        freeze();
        std::panic::set_hook(Box::new(|_| ()));
        let (mutex, rw) = (&Mutex::new(()), &RwLock::new(()));
        for (in_region, way) in [false, true].into_iter().flat_map(|in_region| [0, 1, 2].map(|way| (in_region, way))) {
            HANDLERS_FORK.store(-1, SeqCst);
            thread::scope(|s| {
                let (tell, told) = channel();
                s.spawn(move || {
                    let _held = (way == 0).then(|| mutex.lock());
                    let _too = (way != 0).then(|| rw.write());
                    tell.send(()).expect("the test waits");
                    until(|| HANDLERS_FORK.load(SeqCst) > 0);
                });
                told.recv().expect("it has its lock");
                forked_in_the_middle(|| {
                    let _region = in_region.then(no_forking);
                    let had = catch_unwind(AssertUnwindSafe(|| match way {
                        0 => drop(mutex.lock()),
                        1 => drop(rw.read()),
                        _ => drop(rw.write()),
                    }));
                    if had.is_err() != (HANDLERS_FORK.load(SeqCst) == 0) {
                        raw::exit_now(2);
                    }
                });
            });
        }
    });
}
