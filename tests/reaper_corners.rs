//! Reapers in corners: statuses that come before their watch, forks inside callbacks, owners without children, displaced, refused or
//! half closed (C1-C6).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod watching;

use carefork::{Claim, Fork, ForkOptions, Reaper, Sigchld, SigchldOwner};
use common::seccomp::Filter;
use common::{Refuse, Setup, isolated, isolated_with, raw};
use crossbeam_channel::{Receiver, unbounded};
use kit::{SOON, foreign, forked, shared};
use std::future::Future as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};
use watching::{
    ends_with, is_readable, kill, no_zombie_left, only, owner, run_until, sleep_on, sleeper, strangers, until_dead,
    watch, without_pidfds,
};

/// The application waits for its own child.
fn wait_for(pid: i32) -> ExitStatus {
    let mut status = 0;
    // SAFETY: `status` is live.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    ExitStatus::from_raw(status)
}

extern "C" fn shrug(_: i32) {}

// -- the main loop

/// A thread forks beside a main loop that waits: the status is there before the child is watched.
#[test]
fn a_status_that_comes_before_the_watch_is_told_of() {
    isolated("a_status_that_comes_before_the_watch_is_told_of", 60, || {
        let reaper = owner(SigchldOwner::MainLoop);
        let child = ends_with(3);
        let status = wait_for(child.id().cast_signed());
        reaper.reaped(child.id(), status).expect("held by hand");
        let (_, exits) = watch(&reaper, child);
        assert_eq!(only(&reaper, &exits).code(), Some(3));
        let mut child = ends_with(4);
        child.wait().expect("a status");
        let (watched, exits) = watch(&reaper, child);
        assert_eq!(only(&reaper, &exits).code(), Some(4));
        assert!(!watched.is_watched());
    });
}

// -- a fork inside a callback, whose child comes back through the dispatch

/// Forks in the callback; the child returns from it, and from the dispatch.
fn forks(reaper: &Reaper) -> Receiver<carefork::Child> {
    let (send, receive) = unbounded();
    let then = move |_| {
        // SAFETY: the child returns to the test, which ends it.
        match unsafe { carefork::fork() }.expect("a child") {
            Fork::Child(token) => drop(token),
            Fork::Parent(child) => send.send(child).expect("the test waits"),
        }
    };
    let mut waited = ends_with(0);
    waited.wait().expect("a status");
    reaper.watch(waited, then).expect("watched");
    receive
}

fn is_child(parent: u32) -> bool {
    raw::getpid().cast_unsigned() != parent
}

/// Dispatches until the callback has run; in the child `f`, which ends it.
fn dispatch_on_both_sides(reaper: &Reaper, children: &Receiver<carefork::Child>, f: impl FnOnce() -> i32) {
    let parent = raw::getpid().cast_unsigned();
    loop {
        let told = catch_unwind(AssertUnwindSafe(|| reaper.dispatch()));
        if is_child(parent) {
            let refused = told.is_ok_and(|told| told.is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD)));
            raw::exit_now(if refused { f() } else { 99 });
        }
        told.expect("no panic").expect("dispatch");
        if !children.is_empty() {
            break;
        }
    }
}

#[test]
fn the_parents_callbacks_do_not_run_in_a_child_of_one_of_them() {
    isolated("the_parents_callbacks_do_not_run_in_a_child_of_one_of_them", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let children = forks(&reaper);
        let (parent, [here, there]) = (raw::getpid().cast_unsigned(), [0, 1].map(|at| &shared()[at]));
        let mut waited = ends_with(0);
        waited.wait().expect("a status");
        reaper
            .watch(waited, move |_| {
                let side = if is_child(parent) { there } else { here };
                side.fetch_add(1, SeqCst);
            })
            .expect("watched");
        dispatch_on_both_sides(&reaper, &children, || 0);
        assert_eq!(kit::code(&mut children.recv().expect("a child")), 0);
        run_until(&reaper, || reaper.is_empty());
        assert_eq!((here.load(SeqCst), there.load(SeqCst)), (1, 0));
    });
}

/// Nor those for strangers: two were found, and the first one's callback forks. `NotMine` would have the others asked.
#[test]
fn the_parents_strangers_are_not_offered_in_a_child_of_a_callback() {
    isolated("the_parents_strangers_are_not_offered_in_a_child_of_a_callback", 60, || {
        let (reaper, other) = (owner(SigchldOwner::Always), owner(SigchldOwner::Always));
        let (parent, [here, there]) = (raw::getpid().cast_unsigned(), [0, 1].map(|at| &shared()[at]));
        let count = move || {
            let side = if is_child(parent) { there } else { here };
            side.fetch_add(1, SeqCst)
        };
        let (send, children) = unbounded();
        reaper.on_unknown(move |_| {
            if count() == 0 {
                // SAFETY: the child returns to the test, which ends it.
                match unsafe { carefork::fork() }.expect("a child") {
                    Fork::Child(token) => drop(token),
                    Fork::Parent(child) => send.send(child).expect("the test waits"),
                }
            }
            Claim::NotMine
        });
        other.on_unknown(move |_| {
            count();
            Claim::Mine
        });
        for pid in [foreign(|| 7), foreign(|| 8)] {
            until_dead(pid.cast_unsigned());
        }
        dispatch_on_both_sides(&reaper, &children, || 0);
        assert_eq!(kit::code(&mut children.recv().expect("a child")), 0);
        assert_eq!((here.load(SeqCst), there.load(SeqCst)), (4, 0));
    });
}

/// The alarm is one open file description on both sides.
#[test]
fn the_parents_alarm_is_left_alone_by_a_child_of_its_callback() {
    isolated("the_parents_alarm_is_left_alone_by_a_child_of_its_callback", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let [ready, set] = [0, 1].map(|at| &shared()[at]);
        let stubborn = forked(&ForkOptions::new(), |_| {
            kit::catch(libc::SIGTERM, shrug);
            ready.store(1, SeqCst);
            sleep_on()
        });
        while ready.load(SeqCst) == 0 {
            thread::yield_now();
        }
        let (watched, exits) = watch(&reaper, stubborn);
        let (send, children) = unbounded();
        let mut waited = ends_with(0);
        waited.wait().expect("a status");
        reaper
            .watch(waited, move |_| {
                // SAFETY: the child returns to the test, which ends it.
                match unsafe { carefork::fork() }.expect("a child") {
                    Fork::Child(token) => {
                        drop(token);
                        // It goes on once the alarm is set.
                        while set.load(SeqCst) == 0 {
                            thread::yield_now();
                        }
                    }
                    Fork::Parent(child) => send.send(child).expect("the test waits"),
                }
            })
            .expect("watched");
        dispatch_on_both_sides(&reaper, &children, || 0);
        watched.terminate(Duration::from_millis(100)).expect("TERM");
        set.store(1, SeqCst);
        assert_eq!(kit::code(&mut children.recv().expect("a child")), 0);
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
    });
}

#[test]
fn a_child_of_a_callback_has_a_reaper_of_its_own_that_owns() {
    isolated("a_child_of_a_callback_has_a_reaper_of_its_own_that_owns", 60, || {
        let reaper = owner(SigchldOwner::WhileChildren);
        let children = forks(&reaper);
        dispatch_on_both_sides(&reaper, &children, || {
            let own = owner(SigchldOwner::Always);
            let unknown = strangers(&own);
            let held = own.sigchld() == Sigchld::Held;
            let pid = foreign(|| 5);
            run_until(&own, || !unknown.is_empty());
            let exit = unknown.recv().expect("one");
            i32::from(!held || exit.pid != pid.cast_unsigned() || exit.code() != Some(5))
        });
        assert_eq!(kit::code(&mut children.recv().expect("a child")), 0);
    });
}

// -- owners

/// "While children": without any it owns nothing, and reaps nobody's.
#[test]
fn without_children_nothing_is_owned() {
    isolated("without_children_nothing_is_owned", 60, || {
        let reaper = owner(SigchldOwner::WhileChildren);
        let pid = foreign(|| 7);
        until_dead(pid.cast_unsigned());
        reaper.dispatch().expect("dispatch");
        assert_eq!(wait_for(pid).code(), Some(7));
        // Its last child goes, by whatever way: the handler too.
        let (_, exits) = watch(&reaper, ends_with(1));
        assert_eq!(reaper.sigchld(), Sigchld::Held);
        while exits.is_empty() {
            reaper.sigchld_occurred().expect("a look");
        }
        assert_eq!(reaper.sigchld(), Sigchld::Free);
        let child = ends_with(1);
        let pid = child.id();
        let (_, exits) = watch(&reaper, child);
        reaper.reaped(pid, wait_for(pid.cast_signed())).expect("ours");
        assert_eq!((exits.len(), reaper.sigchld()), (1, Sigchld::Free));
        reaper.watch(ends_with(1), |_| panic!("on purpose")).expect("watched");
        while !reaper.is_empty() {
            drop(catch_unwind(AssertUnwindSafe(|| reaper.dispatch())));
        }
        assert_eq!(reaper.sigchld(), Sigchld::Free);
    });
}

/// SIGCHLD was ignored, and then the application wants its children after all.
#[test]
fn whose_handler_was_displaced_it_throws_nobody_away() {
    isolated("whose_handler_was_displaced_it_throws_nobody_away", 60, || {
        kit::ignore(libc::SIGCHLD);
        let reaper = owner(SigchldOwner::Selective);
        kit::catch(libc::SIGCHLD, shrug);
        assert_eq!(reaper.sigchld(), Sigchld::Displaced);
        let pid = foreign(|| 7);
        until_dead(pid.cast_unsigned());
        reaper.dispatch().expect("dispatch");
        assert_eq!(wait_for(pid).code(), Some(7));
    });
}

/// Only one end of the handler's pair was closed, with a byte under way: nothing fires for ever, and no number is lost.
#[test]
fn half_a_pair_is_made_anew() {
    isolated("half_a_pair_is_made_anew", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let before = common::self_fds();
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        let new = || -> Vec<i32> {
            let now = common::self_fds();
            now.as_slice().iter().copied().filter(|fd| !before.as_slice().contains(fd)).collect()
        };
        let pair = new();
        assert_eq!(pair.len(), 2);
        // SAFETY: takes nothing.
        let own = unsafe { libc::pthread_self() };
        // SAFETY: a thread that runs.
        unsafe { libc::pthread_kill(own, libc::SIGCHLD) };
        // SAFETY: what a daemon's clean-up does.
        unsafe { libc::close(pair[1]) };
        for _ in 0..3 {
            reaper.dispatch().expect("dispatch");
        }
        assert!(!is_readable(&reaper));
        assert_eq!(new().len(), 2);
    });
}

/// Both ends were closed, and one of two reapers has no room in its epoll for the new pair: that one looks by its alarm.
#[test]
fn a_reaper_that_cannot_hear_the_new_pair_looks_all_the_same() {
    isolated("a_reaper_that_cannot_hear_the_new_pair_looks_all_the_same", 60, || {
        let deaf = Reaper::new().expect("a reaper");
        let before = common::self_fds();
        deaf.set_owner(SigchldOwner::Always).expect("owned");
        let pair: Vec<i32> = common::self_fds().as_slice().iter().copied().filter(|fd| !before.contains(*fd)).collect();
        assert_eq!(pair.len(), 2);
        let other = owner(SigchldOwner::Always);
        // It has its alarm, which a child that was waited for needs.
        let mut waited = ends_with(3);
        waited.wait().expect("a status");
        let (_, exits) = watch(&deaf, waited);
        assert_eq!(only(&deaf, &exits).code(), Some(3));
        let full = Refuse::when(libc::SYS_epoll_ctl, 0, deaf.as_raw_fd().cast_unsigned(), libc::ENOSPC);
        // SAFETY: nobody else is affected.
        unsafe { Filter::new(&[full]).install() }.expect("a filter");
        for &fd in &pair {
            // SAFETY: what a daemon's clean-up does.
            unsafe { libc::close(fd) };
        }
        let refused = other.dispatch();
        assert!(refused.is_err_and(|e| e.raw_os_error() == Some(libc::ENOSPC)));
        let found = strangers(&deaf);
        let pid = foreign(|| 7);
        until_dead(pid.cast_unsigned());
        run_until(&deaf, || !found.is_empty());
        assert_eq!(found.recv().expect("one").code(), Some(7));
    });
}

/// Both ends were closed, and there are no descriptors for a new pair: looked for again once there are.
#[test]
fn a_pair_that_cannot_be_made_anew_is_made_later() {
    isolated("a_pair_that_cannot_be_made_anew_is_made_later", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let before = common::self_fds();
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        let pair: Vec<i32> = common::self_fds().as_slice().iter().copied().filter(|fd| !before.contains(*fd)).collect();
        assert_eq!(pair.len(), 2);
        // It has its alarm.
        let mut waited = ends_with(3);
        waited.wait().expect("a status");
        let (_, exits) = watch(&reaper, waited);
        assert_eq!(only(&reaper, &exits).code(), Some(3));
        for &fd in &pair {
            // SAFETY: what a daemon's clean-up does.
            unsafe { libc::close(fd) };
        }
        let nofile = nix::sys::resource::Resource::RLIMIT_NOFILE;
        let (soft, hard) = nix::sys::resource::getrlimit(nofile).expect("a limit");
        nix::sys::resource::setrlimit(nofile, 3, hard).expect("lower");
        assert!(reaper.dispatch().is_err_and(|e| e.raw_os_error() == Some(libc::EMFILE)));
        nix::sys::resource::setrlimit(nofile, soft, hard).expect("as before");
        let found = strangers(&reaper);
        let pid = foreign(|| 7);
        until_dead(pid.cast_unsigned());
        run_until(&reaper, || !found.is_empty());
        assert_eq!(found.recv().expect("one").code(), Some(7));
    });
}

/// Where waitid is refused strangers cannot be found; its own children can.
#[test]
fn an_owner_that_cannot_look_for_strangers_tells_of_its_own() {
    let setup = Setup { refuse: vec![Refuse::call(libc::SYS_waitid, libc::EPERM)], ..Setup::default() };
    isolated_with("an_owner_that_cannot_look_for_strangers_tells_of_its_own", 60, setup, || {
        let reaper = owner(SigchldOwner::Always);
        let (_, exits) = watch(&reaper, ends_with(3));
        let end = Instant::now() + raw::patience(SOON);
        while exits.is_empty() {
            assert!(Instant::now() < end, "nothing came");
            let refused = reaper.dispatch();
            assert!(refused.is_err_and(|e| e.raw_os_error() == Some(libc::EPERM)));
        }
        assert_eq!(exits.recv().expect("one").code(), Some(3));
    });
}

/// Watched before the main loop wanted to be asked; or by a reaper that has closed, when the child is nobody's but carefork's still.
#[test]
fn the_main_loops_word_about_children_from_before() {
    isolated("the_main_loops_word_about_children_from_before", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let child = ends_with(3);
        let pid = child.id();
        let (_, exits) = watch(&reaper, child);
        reaper.set_owner(SigchldOwner::MainLoop).expect("owned");
        reaper.reaped(pid, wait_for(pid.cast_signed())).expect("ours");
        assert_eq!(exits.try_recv().map(|exit| exit.code()), Ok(Some(3)));
        let closed = Reaper::new().expect("a reaper");
        let child = sleeper();
        let pid = child.id();
        let (_, exits) = watch(&closed, child);
        closed.close();
        kill(pid, libc::SIGKILL);
        reaper.reaped(pid, wait_for(pid.cast_signed())).expect("no stranger");
        assert!(exits.is_empty());
    });
}

/// The owner becomes the main loop in a callback: the other children are left to it.
#[test]
fn a_callback_hands_the_rest_to_the_main_loop() {
    isolated("a_callback_hands_the_rest_to_the_main_loop", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let children = [ends_with(0), ends_with(1), ends_with(2)];
        let pids = children.each_ref().map(carefork::Child::id);
        for child in children {
            let own = reaper.clone();
            reaper.watch(child, move |_| own.set_owner(SigchldOwner::MainLoop).expect("owned")).expect("watched");
        }
        pids.iter().for_each(|&pid| until_dead(pid));
        assert_eq!(reaper.dispatch().expect("dispatch"), 1);
        assert!(!is_readable(&reaper));
        assert_eq!((reaper.dispatch().expect("dispatch"), reaper.len()), (0, 2));
        assert_eq!(reaper.sigchld_occurred().expect("a look"), 2);
    });
}

/// Handed over by its number when the owner has taken its status: told of as a stranger.
#[test]
fn handed_over_after_its_end_it_is_told_of() {
    isolated("handed_over_after_its_end_it_is_told_of", 60, || {
        let reaper = owner(SigchldOwner::Always);
        let unknown = strangers(&reaper);
        // Of a child that ends amid its fork, which has signals blocked, the harness's other thread hears, at whatever moment.
        let child = sleeper();
        kill(child.id(), libc::SIGKILL);
        until_dead(child.id());
        reaper.dispatch().expect("dispatch");
        assert!(unknown.is_empty() && !is_readable(&reaper));
        let pid = child.into_id();
        let exit = only(&reaper, &unknown);
        assert_eq!((exit.pid, exit.signal()), (pid, Some(libc::SIGKILL)));
    });
}

// -- the rest

/// A reaper sleeps beside it: nobody else will look.
#[test]
fn dropped_without_a_pidfd_it_is_reaped_by_a_reaper_that_sleeps() {
    let name = "dropped_without_a_pidfd_it_is_reaped_by_a_reaper_that_sleeps";
    isolated_with(name, 60, without_pidfds(), || {
        let reaper = Reaper::new().expect("a reaper");
        let child = sleeper();
        let pid = child.id();
        drop(child);
        kill(pid, libc::SIGKILL);
        let gone = || std::fs::metadata(format!("/proc/{pid}")).is_err();
        let mut fds = [raw::pollfd(reaper.as_raw_fd())];
        let end = Instant::now() + raw::patience(SOON);
        while !gone() {
            assert!(Instant::now() < end, "a zombie stays");
            // Woken by its own descriptor, as an event loop is.
            raw::poll_readable(&mut fds, end.saturating_duration_since(Instant::now()));
            if fds[0].revents != 0 {
                reaper.dispatch().expect("dispatch");
            }
        }
    });
}

/// What a callback owns panics as it is dropped: the others are let go all the same, and a thread that sleeps on the reaper wakes.
#[test]
fn a_callback_that_panics_as_it_is_dropped_is_in_nobodys_way() {
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            assert!(thread::panicking(), "on purpose");
        }
    }
    isolated("a_callback_that_panics_as_it_is_dropped_is_in_nobodys_way", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let threads = common::thread_count();
        let _ends = reaper.receiver().expect("a thread");
        let children = [sleeper(), sleeper(), sleeper()];
        let pids = children.each_ref().map(carefork::Child::id);
        for (child, panics) in children.into_iter().zip([Some(Panics), None, Some(Panics)]) {
            reaper.watch(child, move |_| drop(panics)).expect("watched");
        }
        assert!(catch_unwind(AssertUnwindSafe(|| reaper.close())).is_err());
        pids.iter().for_each(|&pid| kill(pid, libc::SIGKILL));
        no_zombie_left();
        let end = Instant::now() + raw::patience(SOON);
        while common::thread_count() != threads {
            assert!(Instant::now() < end, "its thread sleeps");
            thread::yield_now();
        }
    });
}

/// Or it forks, and the child comes back through the close: the other callbacks are the parent's.
#[test]
fn a_callback_that_forks_as_it_is_dropped() {
    struct Owned(u32, &'static AtomicU64);
    impl Drop for Owned {
        fn drop(&mut self) {
            if is_child(self.0) {
                self.1.fetch_add(1, SeqCst);
            } else {
                // SAFETY: the child comes back to the test, which ends it.
                assert!(unsafe { libc::fork() } >= 0);
            }
        }
    }
    isolated("a_callback_that_forks_as_it_is_dropped", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let (parent, there) = (raw::getpid().cast_unsigned(), &shared()[0]);
        let children = [sleeper(), sleeper()];
        let pids = children.each_ref().map(carefork::Child::id);
        for child in children {
            let owned = Owned(parent, there);
            reaper.watch(child, move |_| drop(owned)).expect("watched");
        }
        let owned = Owned(parent, there);
        reaper.on_unknown(move |_| {
            let _owned = &owned;
            Claim::NotMine
        });
        drop(reaper);
        if is_child(parent) {
            raw::exit_now(0);
        }
        pids.iter().for_each(|&pid| kill(pid, libc::SIGKILL));
        // SAFETY: no status is asked for.
        while unsafe { libc::wait(std::ptr::null_mut()) } > 0 {}
        assert_eq!(there.load(SeqCst), 0);
    });
}

/// A waker may own anything, the last handle of the reaper too.
#[test]
fn a_futures_old_waker_owns_the_reaper() {
    struct Owns(#[allow(dead_code)] Reaper);
    impl Wake for Owns {
        fn wake(self: Arc<Self>) {}
    }
    isolated("a_futures_old_waker_owns_the_reaper", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let child = sleeper();
        let pid = child.id();
        let mut future = Box::pin(reaper.exit_of(child).expect("watched"));
        let owning = Waker::from(Arc::new(Owns(reaper)));
        assert!(future.as_mut().poll(&mut Context::from_waker(&owning)).is_pending());
        drop(owning);
        let mut context = Context::from_waker(Waker::noop());
        assert!(future.as_mut().poll(&mut context).is_pending());
        // The reaper is closed by now.
        assert!(future.as_mut().poll(&mut context).is_ready());
        kill(pid, libc::SIGKILL);
    });
}
