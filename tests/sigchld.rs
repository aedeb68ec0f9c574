//! SIGCHLD shared: the owners, the handler, what was there before and what comes after (C3, C4).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod watching;

use carefork::{Claim, Exit, ForkOptions, Reaper, Sigchld, SigchldOwner};
use common::{Refuse, Setup, isolated, isolated_with, raw};
use crossbeam_channel::{Receiver, unbounded};
use kit::{SOON, assert_no_child, disposition, foreign, forked};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};
use watching::{ends_with, only, run_until, strangers};

/// A child that ends with `code` once told.
fn on_word(code: i32) -> (carefork::Child, impl Fn()) {
    let word = &kit::shared()[0];
    let child = forked(&ForkOptions::new(), |_| {
        while word.load(SeqCst) == 0 {
            thread::yield_now();
        }
        code
    });
    (child, move || word.store(1, SeqCst))
}

/// The endings of `child`.
#[track_caller]
fn watch(reaper: &Reaper, child: carefork::Child) -> Receiver<Exit> {
    watching::watch(reaper, child).1
}

fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

fn wait_for_zombie(pid: i32) {
    let end = Instant::now() + raw::patience(SOON);
    while !is_zombie(pid) {
        assert!(Instant::now() < end, "{pid} does not end");
        thread::yield_now();
    }
}

static PLAIN: AtomicU32 = AtomicU32::new(0);
static INFORMED: AtomicU32 = AtomicU32::new(0);
static SENDER: AtomicI32 = AtomicI32::new(0);

extern "C" fn plain(signal: i32) {
    assert_eq!(signal, libc::SIGCHLD);
    PLAIN.fetch_add(1, SeqCst);
    // What a handler does to errno is not for the interrupted code to see.
    nix::errno::Errno::set_raw(libc::EBADMSG);
}

extern "C" fn informed(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    assert!(signal == libc::SIGCHLD && !context.is_null());
    // SAFETY: the kernel's siginfo, for as long as the handler runs.
    let info = unsafe { &*info };
    // SAFETY: a SIGCHLD has it.
    SENDER.store(unsafe { info.si_pid() }, SeqCst);
    INFORMED.fetch_add(1, SeqCst);
}

/// Installs a handler the way other code does, with a mask and flags of its own.
fn install(handler: usize, flags: i32) {
    // SAFETY: sigaction is plain data.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is live.
    unsafe { libc::sigaddset(&raw mut action.sa_mask, libc::SIGUSR2) };
    // SAFETY: a handler that keeps to what handlers may do.
    assert_eq!(unsafe { libc::sigaction(libc::SIGCHLD, &raw const action, std::ptr::null_mut()) }, 0);
}

fn masks_usr2() -> bool {
    // SAFETY: sigaction is plain data.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks.
    unsafe { libc::sigaction(libc::SIGCHLD, std::ptr::null(), &raw mut action) };
    // SAFETY: `action` is live.
    unsafe { libc::sigismember(&raw const action.sa_mask, libc::SIGUSR2) == 1 }
}

const OWNERS: [SigchldOwner; 3] = [SigchldOwner::WhileChildren, SigchldOwner::Always, SigchldOwner::Selective];

/// The default leaves the signal and everybody else's children alone.
#[test]
fn nobody_owns_it_at_first() {
    isolated("nobody_owns_it_at_first", 30, || {
        let before = disposition(libc::SIGCHLD);
        let reaper = Reaper::new().expect("a reaper");
        let pid = foreign(|| 7);
        let exits = watch(&reaper, ends_with(3));
        assert_eq!((disposition(libc::SIGCHLD), reaper.sigchld()), (before, Sigchld::Free));
        wait_for_zombie(pid);
        assert_eq!(only(&reaper, &exits).code(), Some(3));
        assert_eq!(common::reap(pid, SOON), common::Verdict::Exited(7));
    });
}

/// What each owner does with the signal, its own children, and those of others.
#[test]
fn owners() {
    isolated("owners", 60, || {
        let free = disposition(libc::SIGCHLD);
        let held = || disposition(libc::SIGCHLD) != free;
        for owner in OWNERS {
            let reaper = Reaper::new().expect("a reaper");
            let unknown = strangers(&reaper);
            reaper.set_owner(owner).expect("owned");
            assert_eq!(held(), owner != SigchldOwner::WhileChildren, "{owner:?}");
            let (child, tell) = on_word(3);
            let exits = watch(&reaper, child);
            assert!(held() && reaper.sigchld() == Sigchld::Held);
            // Of foreign code: reaped and offered, or left alone.
            let pid = foreign(|| 7);
            if owner == SigchldOwner::Selective {
                wait_for_zombie(pid);
                reaper.dispatch().expect("dispatch");
                assert_eq!(common::reap(pid, SOON), common::Verdict::Exited(7));
            } else {
                let stranger = only(&reaper, &unknown);
                assert_eq!((stranger.pid.cast_signed(), stranger.code()), (pid, Some(7)));
            }
            // A child that a `Child` holds, and one of another reaper: theirs, whoever finds them.
            let mut held_by_hand = ends_with(11);
            let other = Reaper::new().expect("a reaper");
            let others = watch(&other, ends_with(12));
            wait_for_zombie(held_by_hand.id().cast_signed());
            reaper.dispatch().expect("dispatch");
            assert_eq!(held_by_hand.wait().expect("a status").code(), Some(11));
            assert!(held_by_hand.exit().is_some_and(|e| e.usage.is_some()));
            assert_eq!(only(&other, &others).code(), Some(12));
            tell();
            assert_eq!(only(&reaper, &exits).code(), Some(3));
            assert_eq!(held(), owner != SigchldOwner::WhileChildren, "{owner:?}");
            assert!(unknown.is_empty());
            drop(reaper);
            assert!(!held(), "{owner:?}");
            assert_eq!(disposition(libc::SIGCHLD), free);
        }
        assert_no_child();
    });
}

/// The same with no pidfds: the signal is what tells.
#[test]
fn owners_without_pidfds() {
    let refuse = vec![Refuse::call(libc::SYS_pidfd_open, libc::EPERM)];
    isolated_with("owners_without_pidfds", 60, Setup { refuse, ..Setup::default() }, || {
        for owner in OWNERS {
            let reaper = Reaper::new().expect("a reaper");
            let unknown = strangers(&reaper);
            reaper.set_owner(owner).expect("owned");
            let exits = watch(&reaper, ends_with(3));
            assert_eq!(only(&reaper, &exits).code(), Some(3));
            assert!(unknown.is_empty());
        }
        assert_no_child();
    });
}

#[test]
fn the_main_loop_owns_it() {
    isolated("the_main_loop_owns_it", 30, || {
        let reaper = Reaper::new().expect("a reaper");
        reaper.set_owner(SigchldOwner::MainLoop).expect("owned");
        assert_eq!(reaper.sigchld(), Sigchld::Free);
        // It waits, and brings the status.
        let exits = watch(&reaper, ends_with(3));
        let mut status = 0;
        // SAFETY: `status` is live.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        reaper.dispatch().expect("dispatch");
        assert!(exits.is_empty(), "nothing is lost before the main loop has spoken");
        let pid = pid.cast_unsigned();
        // Stopped: noted, and nobody ended.
        reaper.reaped(pid, ExitStatus::from_raw(libc::SIGSTOP << 8 | 0x7f)).expect("ours");
        assert!(exits.is_empty());
        reaper.reaped(pid, ExitStatus::from_raw(status)).expect("ours");
        assert_eq!(exits.try_recv().expect("called at once").code(), Some(3));
        // Once.
        let refused = reaper.reaped(pid, ExitStatus::from_raw(status)).expect_err("not any more");
        assert_eq!((refused.pid, refused.status.code()), (pid, Some(3)));
        // Somebody's else.
        let other = Reaper::new().expect("a reaper");
        let (child, tell) = on_word(4);
        let pid = child.id();
        let others = watch(&other, child);
        assert!(reaper.reaped(pid, ExitStatus::from_raw(0)).is_err());
        tell();
        assert_eq!(only(&other, &others).code(), Some(4));
        // It has the reaper look: at its own only.
        let stranger = foreign(|| 7);
        let exits = watch(&reaper, ends_with(5));
        wait_for_zombie(stranger);
        let end = Instant::now() + raw::patience(SOON);
        while exits.is_empty() {
            assert!(Instant::now() < end);
            reaper.sigchld_occurred().expect("a look");
        }
        assert_eq!(exits.try_recv().expect("one").code(), Some(5));
        assert_eq!(common::reap(stranger, SOON), common::Verdict::Exited(7));
        // A child that a `Child` holds gets its status from the main loop, too.
        let mut child = ends_with(6);
        // SAFETY: `status` is live.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        reaper.reaped(pid.cast_unsigned(), ExitStatus::from_raw(status)).expect("held by hand");
        assert_eq!(child.wait().expect("a status").code(), Some(6));
        // Back to pidfds, with a child that is there already.
        let exits = watch(&reaper, ends_with(8));
        reaper.set_owner(SigchldOwner::Nobody).expect("owned");
        assert_eq!(only(&reaper, &exits).code(), Some(8));
        assert_no_child();
    });
}

/// The arrangement may change in the middle of a dispatch, by a callback.
#[test]
fn callbacks_change_the_owner() {
    isolated("callbacks_change_the_owner", 60, || {
        let all = [SigchldOwner::Nobody, SigchldOwner::MainLoop, OWNERS[0], OWNERS[1], OWNERS[2]];
        let free = disposition(libc::SIGCHLD);
        for from in all {
            for to in all {
                let reaper = Reaper::new().expect("a reaper");
                reaper.set_owner(from).expect("owned");
                let (inner, (send, told)) = (reaper.clone(), unbounded());
                let first = ends_with(3);
                wait_for_zombie(first.id().cast_signed());
                let change = move |exit: Exit| {
                    inner.set_owner(to).expect("owned");
                    send.send(exit.code()).expect("the test waits");
                };
                reaper.watch(first, change).expect("watched");
                let second = watch(&reaper, ends_with(4));
                while told.is_empty() || second.is_empty() {
                    // A main loop that has the reaper look, whoever owns the signal now.
                    reaper.sigchld_occurred().expect("a look");
                    reaper.dispatch().expect("dispatch");
                }
                assert_eq!(told.try_recv().expect("one"), Some(3), "{from:?} {to:?}");
                assert_eq!(second.try_recv().expect("one").code(), Some(4), "{from:?} {to:?}");
                drop(reaper);
                assert_eq!(disposition(libc::SIGCHLD), free, "{from:?} {to:?}");
            }
        }
        assert_no_child();
    });
}

#[test]
fn unknown_children_are_claimed_refused_or_a_disaster() {
    isolated("unknown_children_are_claimed_refused_or_a_disaster", 60, || {
        let [first, second] = [Reaper::new().expect("a reaper"), Reaper::new().expect("a reaper")];
        for reaper in [&first, &second] {
            reaper.set_owner(SigchldOwner::Always).expect("owned");
        }
        let asked = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&asked);
        let inner = first.clone();
        first.on_unknown(move |_| {
            counted.fetch_add(1, SeqCst);
            // Called with no lock held.
            inner.dispatch().expect("dispatch");
            inner.set_owner(SigchldOwner::Always).expect("owned");
            Claim::NotMine
        });
        // The other one's.
        let unknown = strangers(&second);
        let pid = foreign(|| 7);
        run_until(&first, || !unknown.is_empty());
        assert_eq!(unknown.try_recv().expect("one").pid.cast_signed(), pid);
        assert_eq!(asked.load(SeqCst), 1);
        // Nobody's: said on fd 2.
        second.on_unknown(|_| Claim::NotMine);
        let said = kit::captured(2, || {
            let pid = foreign(|| 9);
            wait_for_zombie(pid);
            first.dispatch().expect("dispatch");
        });
        assert!(said.contains("exited with code 9") && said.contains("on_unknown"), "{said}");
        // A disaster: the dispatch fails, and goes on afterwards.
        second.on_unknown(|_| Claim::Disaster("no such child".into()));
        wait_for_zombie(foreign(|| 1));
        assert!(first.dispatch().is_err_and(|e| e.to_string() == "no such child"));
        first.dispatch().expect("dispatch");
        drop(first.clone());
        // It closes the reaper that asks.
        let inner = second.clone();
        second.on_unknown(move |_| {
            inner.close();
            Claim::Mine
        });
        wait_for_zombie(foreign(|| 1));
        second.dispatch().expect("dispatch");
        first.close();
        assert_no_child();
        assert_eq!(disposition(libc::SIGCHLD).0, libc::SIG_DFL);
    });
}

/// C3: a handler that was there before is called, and comes back exactly.
#[test]
fn a_handler_from_before_is_chained_and_restored() {
    isolated("a_handler_from_before_is_chained_and_restored", 60, || {
        let (p, i) = (plain as *const () as usize, informed as *const () as usize);
        for (handler, flags) in [(p, libc::SA_RESTART), (i, libc::SA_SIGINFO | libc::SA_NODEFER), (p, libc::SA_ONSTACK)]
        {
            install(handler, flags);
            let before = disposition(libc::SIGCHLD);
            let count = if handler == p { &PLAIN } else { &INFORMED };
            let reapers = [Reaper::new().expect("a reaper"), Reaper::new().expect("a reaper")];
            for reaper in &reapers {
                reaper.set_owner(SigchldOwner::Always).expect("owned");
            }
            let seen = count.load(SeqCst);
            let exits = watch(&reapers[0], ends_with(3));
            let exit = only(&reapers[0], &exits);
            assert_eq!(exit.code(), Some(3));
            assert!(count.load(SeqCst) > seen, "the handler from before was not called");
            if handler == i {
                assert_eq!(SENDER.load(SeqCst), exit.pid.cast_signed());
            }
            // Restored by the last of them, not the first.
            let [one, two] = reapers;
            drop(one);
            assert_ne!(disposition(libc::SIGCHLD), before);
            two.set_owner(SigchldOwner::Nobody).expect("given up");
            assert_eq!(disposition(libc::SIGCHLD), before);
            assert!(masks_usr2());
        }
        // Ignored before: strangers are not left as zombies, statuses of our own are not lost.
        kit::ignore(libc::SIGCHLD);
        for owner in OWNERS {
            let reaper = Reaper::new().expect("a reaper");
            let _claimed = strangers(&reaper);
            reaper.set_owner(owner).expect("owned");
            let (child, tell) = on_word(3);
            let exits = watch(&reaper, child);
            let stranger = foreign(|| 0);
            let end = Instant::now() + raw::patience(SOON);
            // SAFETY: only asks.
            while unsafe { libc::kill(stranger, 0) } == 0 {
                assert!(Instant::now() < end, "{owner:?}: a zombie stays");
                raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], Duration::from_millis(100));
                reaper.dispatch().expect("dispatch");
            }
            tell();
            assert_eq!(only(&reaper, &exits).code(), Some(3), "{owner:?}");
            drop(reaper);
            assert_eq!(disposition(libc::SIGCHLD).0, libc::SIG_IGN);
        }
    });
}

/// C3: one that is installed over ours is noticed and left alone.
#[test]
fn a_handler_from_after_is_left_alone() {
    isolated("a_handler_from_after_is_left_alone", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        let ours = disposition(libc::SIGCHLD).0;
        install(plain as *const () as usize, libc::SA_RESTART);
        let theirs = disposition(libc::SIGCHLD);
        assert_eq!(reaper.sigchld(), Sigchld::Displaced);
        let said = kit::captured(2, || {
            let exits = watch(&reaper, ends_with(3));
            assert_eq!(only(&reaper, &exits).code(), Some(3));
            reaper.dispatch().expect("dispatch");
        });
        assert_eq!(said.matches("installed over carefork's").count(), 1, "{said}");
        // Neither the last user nor the next first one touches it.
        reaper.set_owner(SigchldOwner::Nobody).expect("given up");
        assert_eq!(disposition(libc::SIGCHLD), theirs);
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        assert_eq!((disposition(libc::SIGCHLD), reaper.sigchld()), (theirs, Sigchld::Displaced));
        // It gives back what it found: ours works again, and goes when it is given up.
        install(ours, libc::SA_SIGINFO | libc::SA_RESTART);
        assert_eq!(reaper.sigchld(), Sigchld::Held);
        let unknown = strangers(&reaper);
        let pid = foreign(|| 7);
        assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
        drop(reaper);
        assert_eq!(disposition(libc::SIGCHLD).0, libc::SIG_DFL);
    });
}

/// SEEDS 11: it takes no lock, keeps errno, interrupts itself, and a storm of it loses nothing.
#[test]
fn the_handler_is_quiet() {
    isolated("the_handler_is_quiet", 60, || {
        install(plain as *const () as usize, libc::SA_NODEFER);
        let reaper = Reaper::new().expect("a reaper");
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        let storm = || {
            nix::errno::Errno::set_raw(libc::EXDEV);
            raw_raise();
            raw::errno()
        };
        let seen = PLAIN.load(SeqCst);
        assert_eq!(storm(), libc::EXDEV);
        assert_eq!(PLAIN.load(SeqCst), seen + 1);
        // From several threads at once, among forks and dispatches.
        let unknown = strangers(&reaper);
        let stop = kit::Stop::default();
        thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    while !stop.is_set() {
                        assert_eq!(storm(), libc::EXDEV);
                    }
                });
            }
            let _stop = stop.on_drop();
            for i in 0..100 {
                let exits = watch(&reaper, ends_with(i));
                assert_eq!(only(&reaper, &exits).code(), Some(i));
            }
        });
        assert!(unknown.is_empty(), "a child of ours was taken for a stranger");
        assert_no_child();
    });
}

/// A daemon's clean-up closes every descriptor, and opens others under the same numbers.
#[test]
fn the_handler_survives_its_descriptors() {
    isolated("the_handler_survives_its_descriptors", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let unknown = strangers(&reaper);
        let before: Vec<i32> = common::self_fds().as_slice().to_vec();
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        let pair: Vec<i32> = common::self_fds().as_slice().iter().copied().filter(|fd| !before.contains(fd)).collect();
        assert_eq!(pair.len(), 2, "{pair:?}");
        for by in ["nobody", "a file", "a socket"] {
            let pair: Vec<i32> =
                common::self_fds().as_slice().iter().copied().filter(|fd| !before.contains(fd)).collect();
            let (file, (here, there)) = (raw::memfd(), UnixDatagram::pair().expect("a pair"));
            for &fd in &pair {
                match by {
                    "a file" => kit::redirect(file.as_raw_fd(), fd),
                    "a socket" => kit::redirect(here.as_raw_fd(), fd),
                    // SAFETY: what the test is about.
                    _ => drop(unsafe { OwnedFd::from_raw_fd(fd) }),
                }
            }
            // The signal comes, and nothing is written anywhere.
            raw_raise();
            let exits = watch(&reaper, ends_with(3));
            assert_eq!(only(&reaper, &exits).code(), Some(3));
            assert_eq!(kit::contents(&file), "");
            there.set_nonblocking(true).expect("set");
            assert!(there.recv(&mut [0]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock), "poked");
            if by != "nobody" {
                for &fd in &pair {
                    // SAFETY: only asks.
                    assert!(unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0, "{fd} was closed");
                    // SAFETY: the test's own.
                    drop(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
            drop((file, here, there));
            // A new pair: strangers are heard of again.
            let pid = foreign(|| 7);
            assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
        }
    });
}

/// C6: nothing of it works in a child, but what was there before; and the clean-up puts that back.
#[test]
fn in_a_child_the_handler_is_nobodys() {
    isolated("in_a_child_the_handler_is_nobodys", 60, || {
        install(plain as *const () as usize, libc::SA_RESTART);
        let before = disposition(libc::SIGCHLD);
        let reaper = Reaper::new().expect("a reaper");
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        let is_quiet = || {
            let mut fds = [raw::pollfd(reaper.as_raw_fd())];
            raw::poll_readable(&mut fds, Duration::ZERO);
            fds[0].revents == 0
        };
        let poke = || {
            let seen = PLAIN.load(SeqCst);
            raw_raise();
            PLAIN.load(SeqCst) == seen + 1
        };
        let in_child = |cleaned: bool| -> i32 {
            // What was there before is called, as after a plain fork; the shared socket is left alone.
            let checks = [poke(), !cleaned || disposition(libc::SIGCHLD) == before];
            if let Some(at) = checks.iter().position(|ok| !ok) {
                return 10 + at.cast_signed() as i32;
            }
            let own = Reaper::new().expect("a reaper");
            own.set_owner(SigchldOwner::Always).expect("owned");
            let unknown = strangers(&own);
            let pid = foreign(|| 5);
            if only(&own, &unknown).pid.cast_signed() != pid || !poke() {
                return 20;
            }
            drop(own);
            if disposition(libc::SIGCHLD) == before { 0 } else { 21 }
        };
        for cleaned in [false, true] {
            let step = &kit::shared()[0];
            let mut child = forked(&ForkOptions::new(), |token| {
                if cleaned {
                    drop(token);
                }
                let poked = poke();
                step.store(1, SeqCst);
                while step.load(SeqCst) == 1 {
                    thread::yield_now();
                }
                if poked { in_child(cleaned) } else { 30 }
            });
            while step.load(SeqCst) == 0 {
                thread::yield_now();
            }
            // Before its end, which is the parent's to hear.
            let quiet = is_quiet();
            step.store(2, SeqCst);
            assert_eq!(kit::code(&mut child), 0);
            assert!(quiet, "the child wrote into the parent's socket");
            reaper.dispatch().expect("dispatch");
        }
        // By `_Fork`, no at-fork handler tells the child.
        // SAFETY: the child keeps to what this test does anyway.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            raw::exit_now(in_child(false));
        }
        let pid = i32::try_from(pid).expect("a pid");
        let unknown = strangers(&reaper);
        assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
    });
}

/// To the calling thread.
fn raw_raise() {
    // SAFETY: takes nothing.
    let own = unsafe { libc::pthread_self() };
    // SAFETY: a thread that runs.
    unsafe { libc::pthread_kill(own, libc::SIGCHLD) };
}

/// SEEDS: a child is known before any reaper can see it. An owner that reaps every child takes none of carefork's for a stranger,
/// however soon it ends; nor does it while forks are refused.
#[test]
fn a_child_is_known_before_it_can_be_seen() {
    isolated("a_child_is_known_before_it_can_be_seen", 120, || {
        let owner = Reaper::new().expect("a reaper");
        owner.set_owner(SigchldOwner::Always).expect("owned");
        let unknown = strangers(&owner);
        let stop = kit::Stop::default();
        thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    while !stop.is_set() {
                        owner.dispatch().expect("dispatch");
                    }
                });
            }
            let _stop = stop.on_drop();
            let veto = carefork::register(carefork::Hook::new("veto").try_prepare(|| Err("no".into())));
            for _ in 0..50 {
                // SAFETY: there is no child.
                assert!(unsafe { carefork::fork() }.is_err());
            }
            drop(veto);
            for i in 0..400 {
                let code = i % 50;
                let mut child = ends_with(code);
                if i % 2 == 0 {
                    assert_eq!(child.wait().expect("a status").code(), Some(code));
                } else {
                    let (send, told) = unbounded();
                    owner.watch(child, move |exit| send.send(exit).expect("the test waits")).expect("watched");
                    assert_eq!(told.recv_timeout(SOON).expect("an end").code(), Some(code));
                }
            }
        });
        let strange: Vec<_> = unknown.try_iter().map(|exit| exit.to_string()).collect();
        assert!(strange.is_empty(), "{strange:?}");
        assert_no_child();
    });
}
