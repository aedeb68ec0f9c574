//! SIGCHLD owned in odd company: handlers that come and go, strangers that come at the wrong time, groups that outlive their leaders
//! (C3-C5).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod watching;

use carefork::{Claim, ForkOptions, Reaper, Sigchld, SigchldOwner, Signals};
use common::{Refuse, Setup, isolated, isolated_with, raw};
use crossbeam_channel::unbounded;
use kit::{SOON, assert_no_child, disposition, foreign, forked};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};
use watching::{
    ends_with, is_readable, kill, no_zombie_left, only, owner, run_until, sleep_on, sleeper, strangers, watch,
};

static PLAIN: AtomicU32 = AtomicU32::new(0);

extern "C" fn plain(_: i32) {
    PLAIN.fetch_add(1, SeqCst);
}

/// As other code does it.
fn install(handler: usize, flags: i32) {
    // SAFETY: sigaction is plain data.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
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

fn wait_for_zombie(pid: i32) {
    let end = Instant::now() + raw::patience(SOON);
    while !std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z ")) {
        assert!(Instant::now() < end, "{pid} does not end");
        thread::yield_now();
    }
}

/// The descriptors that `f` opens.
fn opened(f: impl FnOnce()) -> Vec<i32> {
    let before: Vec<i32> = common::self_fds().as_slice().to_vec();
    f();
    common::self_fds().as_slice().iter().copied().filter(|fd| !before.contains(fd)).collect()
}

/// A signal came while something else had the number of the handler's socket, which is back by now: whoever finds that out has all
/// others look, too.
#[test]
fn what_was_missed_is_looked_for_by_all() {
    isolated("what_was_missed_is_looked_for_by_all", 60, || {
        let (reaper, other) = (Reaper::new().expect("a reaper"), Reaper::new().expect("a reaper"));
        let pair = opened(|| reaper.set_owner(SigchldOwner::Always).expect("owned"));
        other.set_owner(SigchldOwner::Always).expect("owned");
        let null = std::fs::File::open("/dev/null").expect("there");
        for &fd in &pair {
            // SAFETY: a number of this process's.
            let saved = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
            kit::redirect(null.as_raw_fd(), fd);
            signal_here();
            kit::redirect(saved, fd);
            // SAFETY: the test's own.
            unsafe { libc::close(saved) };
        }
        reaper.dispatch().expect("dispatch");
        assert!(is_readable(&other));
        other.dispatch().expect("dispatch");
        assert!(!is_readable(&other));
    });
}

static OURS: AtomicUsize = AtomicUsize::new(0);

/// Calls what it displaced.
extern "C" fn calls_ours(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let ours = OURS.load(SeqCst) as *const ();
    // SAFETY: it was installed with SA_SIGINFO.
    let ours: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = unsafe { std::mem::transmute(ours) };
    ours(signal, info, context);
}

/// Who displaced us calls us still when nobody wants the signal any more: the next owner is not woken for that.
#[test]
fn called_by_others_it_does_nothing_for_nobody() {
    isolated("called_by_others_it_does_nothing_for_nobody", 60, || {
        let reaper = owner(SigchldOwner::Always);
        OURS.store(disposition(libc::SIGCHLD).0, SeqCst);
        install(calls_ours as *const () as usize, libc::SA_SIGINFO);
        signal_here();
        assert!(is_readable(&reaper));
        reaper.dispatch().expect("dispatch");
        reaper.set_owner(SigchldOwner::Nobody).expect("given up");
        signal_here();
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        assert!(!is_readable(&reaper), "it was poked");
        signal_here();
        assert!(is_readable(&reaper));
    });
}

/// Who displaced us is gone, and has left the default: nobody there calls us, so the next owner is one.
#[test]
fn a_handler_from_after_that_is_gone_is_in_nobodys_way() {
    isolated("a_handler_from_after_that_is_gone_is_in_nobodys_way", 60, || {
        for left in [libc::SIG_DFL, libc::SIG_IGN] {
            let reaper = owner(SigchldOwner::Always);
            install(plain as *const () as usize, libc::SA_RESTART);
            reaper.set_owner(SigchldOwner::Nobody).expect("given up");
            install(left, 0);
            reaper.set_owner(SigchldOwner::Always).expect("owned");
            assert_eq!(reaper.sigchld(), Sigchld::Held);
            let unknown = strangers(&reaper);
            let pid = foreign(|| 7);
            assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
            drop(reaper);
            assert_eq!(disposition(libc::SIGCHLD).0, left);
        }
        kit::catch(libc::SIGCHLD, plain);
        // A child that resets its signals is rid of it, too.
        let reaper = {
            install(libc::SIG_DFL, 0);
            owner(SigchldOwner::Always)
        };
        install(plain as *const () as usize, libc::SA_RESTART);
        reaper.set_owner(SigchldOwner::Nobody).expect("given up");
        let mut child = forked(&ForkOptions::new().signals(Signals::Reset), |token| {
            drop(token);
            let own = owner(SigchldOwner::Always);
            let unknown = strangers(&own);
            let pid = foreign(|| 7);
            i32::from(own.sigchld() != Sigchld::Held || only(&own, &unknown).pid.cast_signed() != pid)
        });
        assert_eq!(kit::code(&mut child), 0);
    });
}

/// A call that the program's own handler was to interrupt is interrupted still.
#[test]
fn a_handler_that_interrupts_goes_on_interrupting() {
    isolated("a_handler_that_interrupts_goes_on_interrupting", 60, || {
        for (handler, flags, restarts) in [
            (plain as *const () as usize, 0, false),
            (plain as *const () as usize, libc::SA_RESTART, true),
            (libc::SIG_DFL, 0, true),
        ] {
            install(handler, flags);
            let reaper = owner(SigchldOwner::Always);
            assert_eq!(disposition(libc::SIGCHLD).1 & libc::SA_RESTART != 0, restarts);
            drop(reaper);
        }
    });
}

/// One number of the handler's pair is closed and somebody's socket has it: what that one receives is not ours to take.
#[test]
fn a_strangers_socket_is_not_read() {
    isolated("a_strangers_socket_is_not_read", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let unknown = strangers(&reaper);
        let before: Vec<i32> = common::self_fds().as_slice().to_vec();
        reaper.set_owner(SigchldOwner::Always).expect("owned");
        let now: Vec<i32> = common::self_fds().as_slice().to_vec();
        for &fd in now.iter().filter(|fd| !before.contains(fd)) {
            let (here, there) = UnixDatagram::pair().expect("a pair");
            there.send(b"for somebody").expect("sent");
            kit::redirect(here.as_raw_fd(), fd);
            reaper.dispatch().expect("dispatch");
            here.set_nonblocking(true).expect("set");
            let mut text = [0; 32];
            assert_eq!(here.recv(&mut text).expect("it is there still"), 12);
            // And strangers are heard of.
            let pid = foreign(|| 7);
            assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
        }
    });
}

/// A callback that says disaster, or panics, keeps no other stranger from being asked about.
#[test]
fn a_disaster_hides_nobody() {
    isolated("a_disaster_hides_nobody", 60, || {
        let reaper = owner(SigchldOwner::Always);
        for panics in [false, true] {
            let (send, asked) = unbounded();
            reaper.on_unknown(move |exit| {
                send.send(exit.pid.cast_signed()).expect("the test waits");
                assert!(!panics, "as a test");
                Claim::Disaster(format!("child {}", exit.pid).into())
            });
            let mut pids = [foreign(|| 1), foreign(|| 2), foreign(|| 3)];
            pids.iter().for_each(|&pid| wait_for_zombie(pid));
            let dispatched = catch_unwind(AssertUnwindSafe(|| reaper.dispatch()));
            assert!(dispatched.is_err() || dispatched.is_ok_and(|d| d.is_err()));
            let mut seen: Vec<i32> = asked.try_iter().collect();
            seen.sort_unstable();
            pids.sort_unstable();
            assert_eq!(seen, pids, "panics: {panics}");
            reaper.dispatch().expect("dispatch");
        }
        assert_no_child();
    });
}

/// A stranger that ended while a fork was under way, which might have been that fork's child: told of once it is known not to be,
/// though no signal comes any more.
#[test]
fn a_stranger_found_during_a_fork_is_told_of_after_it() {
    isolated("a_stranger_found_during_a_fork_is_told_of_after_it", 60, || {
        let reaper = owner(SigchldOwner::Always);
        let unknown = strangers(&reaper);
        let pid = foreign(|| 7);
        wait_for_zombie(pid);
        let in_the_way = kit::InRegion::new("in the way");
        thread::scope(|s| {
            let forks = s.spawn(|| {
                let child = forked(&ForkOptions::new().timeout_never(), |_| sleep_on());
                child.id()
            });
            while carefork::try_no_forking().is_some() {
                thread::yield_now();
            }
            reaper.dispatch().expect("dispatch");
            assert!(unknown.is_empty(), "the fork is not under way");
            drop(in_the_way);
            let sleeper = forks.join().expect("no panic");
            raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
            assert!(is_readable(&reaper), "nothing tells of it any more");
            assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
            kill(sleeper, libc::SIGKILL);
        });
        no_zombie_left();
    });
}

/// The same where its finder gives up meanwhile: whoever is there still says so, and has its rest then.
#[test]
fn a_stranger_whose_finder_gives_up_is_told_of() {
    isolated("a_stranger_whose_finder_gives_up_is_told_of", 60, || {
        for closes in [false, true] {
            let reaper = owner(SigchldOwner::Always);
            let other = owner(SigchldOwner::Selective);
            let pid = foreign(|| 7);
            wait_for_zombie(pid);
            let in_the_way = kit::InRegion::new("in the way");
            thread::scope(|s| {
                let forks = s.spawn(|| forked(&ForkOptions::new().timeout_never(), |_| sleep_on()).id());
                while carefork::try_no_forking().is_some() {
                    thread::yield_now();
                }
                reaper.dispatch().expect("dispatch");
                if closes {
                    reaper.close();
                } else {
                    reaper.set_owner(SigchldOwner::Nobody).expect("given up");
                }
                drop(in_the_way);
                kill(forks.join().expect("no panic"), libc::SIGKILL);
            });
            let said = kit::captured(2, || {
                raw::poll_readable(&mut [raw::pollfd(other.as_raw_fd())], SOON);
                other.dispatch().expect("dispatch");
            });
            assert!(said.contains(&format!("child {pid} exited with code 7")), "{said}");
            kit::block(&[libc::SIGCHLD]);
            no_zombie_left();
            let is_quiet = || {
                other.dispatch().expect("dispatch");
                thread::sleep(Duration::from_millis(30));
                !is_readable(&other)
            };
            // The harness's other thread may hear of these children late; what is for nothing comes again and again.
            assert!((0..20).any(|_| is_quiet()), "woken for nothing");
        }
    });
}

/// SIGCHLD was ignored, and is again: who ended meanwhile, and was not seen, stays no zombie.
#[test]
fn ignored_again_it_leaves_no_zombies() {
    isolated("ignored_again_it_leaves_no_zombies", 60, || {
        install(libc::SIG_IGN, 0);
        for mode in [SigchldOwner::Selective, SigchldOwner::Always] {
            let reaper = owner(mode);
            wait_for_zombie(foreign(|| 7));
            reaper.set_owner(SigchldOwner::Nobody).expect("given up");
            assert_no_child();
        }
        // With its last child; who owned it until then is asked.
        let reaper = owner(SigchldOwner::WhileChildren);
        let unknown = strangers(&reaper);
        let then = |_| wait_for_zombie(foreign(|| 7));
        reaper.watch(ends_with(3), then).expect("watched");
        run_until(&reaper, || reaper.is_empty());
        assert_eq!((reaper.sigchld(), disposition(libc::SIGCHLD).0), (Sigchld::Free, libc::SIG_IGN));
        assert_no_child();
        assert_eq!(only(&reaper, &unknown).code(), Some(7));
    });
}

/// Children that were dropped before anybody owned the signal are carefork's, not strangers, at whatever moment they end.
#[test]
fn orphans_from_before_are_no_strangers() {
    isolated("orphans_from_before_are_no_strangers", 120, || {
        let orphans: Vec<_> = (0..200).map(|_| sleeper()).collect();
        let pids: Vec<u32> = orphans.iter().map(carefork::Child::id).collect();
        drop(orphans);
        let reaper = owner(SigchldOwner::Always);
        let unknown = strangers(&reaper);
        thread::scope(|s| {
            let killer = s.spawn(|| pids.iter().for_each(|&pid| kill(pid, libc::SIGKILL)));
            while !killer.is_finished() {
                reaper.dispatch().expect("dispatch");
            }
        });
        no_zombie_left();
        let strange: Vec<_> = unknown.try_iter().map(|exit| exit.to_string()).collect();
        assert!(strange.is_empty(), "{strange:?}");
        assert_no_child();
    });
}

/// A leader that was asked to end takes its group with it, whoever reaps it.
#[test]
fn a_group_goes_with_its_leader_whoever_reaps_it() {
    isolated("a_group_goes_with_its_leader_whoever_reaps_it", 60, || {
        extern "C" fn shrug(_: i32) {}
        let hour = Duration::from_secs(3600);
        for mode in [SigchldOwner::Always, SigchldOwner::WhileChildren, SigchldOwner::Selective, SigchldOwner::MainLoop]
        {
            let reaper = owner(mode);
            let member = &kit::shared()[0];
            let leader = forked(&ForkOptions::new().new_session(true), |token| {
                drop(token);
                let child = forked(&ForkOptions::new(), |_| {
                    kit::catch(libc::SIGTERM, shrug);
                    member.store(u64::from(raw::getpid().cast_unsigned()), SeqCst);
                    loop {
                        thread::sleep(Duration::from_secs(1));
                    }
                });
                drop(child);
                sleep_on()
            });
            while member.load(SeqCst) == 0 {
                thread::yield_now();
            }
            let pid = leader.id();
            let (watched, exits) = watch(&reaper, leader);
            watched.terminate(hour).expect("ours");
            if mode == SigchldOwner::MainLoop {
                let mut status = 0;
                // SAFETY: `status` is live.
                assert_eq!(unsafe { libc::waitpid(pid.cast_signed(), &raw mut status, 0) }, pid.cast_signed());
                reaper.reaped(pid, ExitStatus::from_raw(status)).expect("ours");
            }
            assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGTERM), "{mode:?}");
            let stat = format!("/proc/{}/stat", member.load(SeqCst));
            let end = Instant::now() + raw::patience(SOON);
            while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
                assert!(Instant::now() < end, "{mode:?}: a member of the group lives on");
                thread::yield_now();
            }
        }
    });
}

/// The same by number, where the leader ends at whatever moment of a look at it.
#[test]
fn a_group_goes_with_its_leader_by_number() {
    isolated_with("a_group_goes_with_its_leader_by_number", 120, watching::without_pidfds(), || {
        let reaper = Reaper::new().expect("a reaper");
        for round in 0..30 {
            let [leads, member] = [0, 1].map(|i| &kit::shared()[i]);
            let leader = forked(&ForkOptions::new().new_session(true), |token| {
                drop(token);
                kit::ignore(libc::SIGTERM);
                drop(forked(&ForkOptions::new(), |_| {
                    member.store(u64::from(raw::getpid().cast_unsigned()), SeqCst);
                    sleep_on()
                }));
                while leads.load(SeqCst) == 0 {
                    thread::yield_now();
                }
                let end = Instant::now() + Duration::from_micros(500 + 37 * round);
                while Instant::now() < end {
                    std::hint::spin_loop();
                }
                0
            });
            while member.load(SeqCst) == 0 {
                thread::yield_now();
            }
            let (watched, exits) = watch(&reaper, leader);
            watched.terminate(Duration::from_secs(3600)).expect("ours");
            leads.store(1, SeqCst);
            while exits.is_empty() {
                reaper.dispatch().expect("dispatch");
            }
            let stat = format!("/proc/{}/stat", member.load(SeqCst));
            let end = Instant::now() + raw::patience(Duration::from_secs(1));
            let lives = || std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
            while lives() && Instant::now() < end {
                thread::yield_now();
            }
            let lives = lives();
            kill(member.load(SeqCst).try_into().expect("a pid"), libc::SIGKILL);
            assert!(!lives, "a member of the group lives on");
        }
    });
}

/// Linux 5.3: pidfds, but no waiting by them.
#[test]
fn owners_where_pidfds_cannot_be_waited_by() {
    let refuse = vec![Refuse::when(libc::SYS_waitid, 0, libc::P_PIDFD, libc::EINVAL)];
    isolated_with("owners_where_pidfds_cannot_be_waited_by", 60, Setup { refuse, ..Setup::default() }, || {
        let reaper = owner(SigchldOwner::Always);
        let unknown = strangers(&reaper);
        let (_, exits) = watch(&reaper, ends_with(3));
        assert_eq!(only(&reaper, &exits).code(), Some(3));
        let mut by_hand = ends_with(4);
        wait_for_zombie(by_hand.id().cast_signed());
        reaper.dispatch().expect("dispatch");
        assert_eq!(by_hand.wait().expect("a status").code(), Some(4));
        let pid = foreign(|| 7);
        assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
        assert_no_child();
    });
}

/// A callback for strangers that owns a handle keeps the reaper no longer than it is closed.
#[test]
fn a_closed_reaper_lets_go_of_its_callback() {
    isolated("a_closed_reaper_lets_go_of_its_callback", 60, || {
        let fds = common::self_fds().as_slice().len();
        let held = Arc::new(());
        let reaper = owner(SigchldOwner::Always);
        let (inner, kept) = (reaper.clone(), Arc::clone(&held));
        reaper.on_unknown(move |_| {
            let _kept = &kept;
            assert!(!inner.is_empty());
            Claim::NotMine
        });
        reaper.close();
        drop(reaper);
        assert_eq!(Arc::strong_count(&held), 1);
        // But the handler's pair, which stays, and the orphans' epoll.
        assert!(common::self_fds().as_slice().len() <= fds + 3);
        let again = Reaper::new().expect("a reaper");
        again.close();
        let kept = Arc::clone(&held);
        again.on_unknown(move |_| {
            let _kept = &kept;
            Claim::Mine
        });
        assert_eq!(Arc::strong_count(&held), 1);
        run_until(&again, || true);
    });
}

/// A program that does not start is nobody's child, however soon an owner finds it.
#[test]
fn programs_that_do_not_start_are_no_strangers() {
    isolated("programs_that_do_not_start_are_no_strangers", 120, || {
        let reaper = owner(SigchldOwner::Always);
        let unknown = strangers(&reaper);
        let stop = kit::Stop::default();
        thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    while !stop.is_set() {
                        reaper.dispatch().expect("dispatch");
                    }
                });
            }
            let _stop = stop.on_drop();
            for _ in 0..1000 {
                let mut command = carefork::Command::new("/nonexistent");
                assert!(command.timeout_never().spawn().is_err());
            }
        });
        reaper.dispatch().expect("dispatch");
        let strange: Vec<_> = unknown.try_iter().map(|exit| exit.to_string()).collect();
        assert!(strange.is_empty(), "{} strangers: {strange:?}", strange.len());
        assert_no_child();
    });
}

/// Owners of different kinds beside each other: whoever looks first takes nothing from the one that wants every stranger.
#[test]
fn owners_beside_each_other() {
    isolated("owners_beside_each_other", 60, || {
        for (ignored, other) in [
            (false, SigchldOwner::Selective),
            (true, SigchldOwner::Selective),
            (false, SigchldOwner::MainLoop),
            (false, SigchldOwner::Nobody),
        ] {
            install(if ignored { libc::SIG_IGN } else { libc::SIG_DFL }, 0);
            let reaper = owner(SigchldOwner::Always);
            let unknown = strangers(&reaper);
            let other = owner(other);
            let pid = foreign(|| 7);
            wait_for_zombie(pid);
            other.dispatch().expect("dispatch");
            if unknown.is_empty() {
                raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
                assert!(is_readable(&reaper), "nothing tells of it any more");
            }
            assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
        }
        // The same with one that was found during a fork.
        for other in [SigchldOwner::Selective, SigchldOwner::MainLoop] {
            let (reaper, other) = (owner(SigchldOwner::Always), owner(other));
            let unknown = strangers(&reaper);
            let pid = foreign(|| 7);
            wait_for_zombie(pid);
            let in_the_way = kit::InRegion::new("in the way");
            let child = thread::scope(|s| {
                let forks = s.spawn(|| forked(&ForkOptions::new().timeout_never(), |_| sleep_on()).id());
                while carefork::try_no_forking().is_some() {
                    thread::yield_now();
                }
                reaper.dispatch().expect("dispatch");
                assert!(unknown.is_empty(), "the fork is not under way");
                drop(in_the_way);
                forks.join().expect("no panic")
            });
            other.dispatch().expect("dispatch");
            assert!(other.reaped(1, ExitStatus::from_raw(0)).is_err());
            if unknown.is_empty() {
                raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
                assert!(is_readable(&reaper), "nothing tells of it any more");
            }
            assert_eq!(only(&reaper, &unknown).pid.cast_signed(), pid);
            kill(child, libc::SIGKILL);
            no_zombie_left();
        }
    });
}

/// Handlers of both kinds, one after the other, among signals that come all the time: each is called as what it is. And one that is for
/// one signal only is called once.
#[test]
fn handlers_change_among_signals() {
    extern "C" fn informed(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        assert!(signal == libc::SIGCHLD && !context.is_null());
        // SAFETY: the kernel's siginfo, for as long as the handler runs.
        assert_eq!(unsafe { &*info }.si_signo, libc::SIGCHLD);
        PLAIN.fetch_add(1, SeqCst);
    }
    isolated("handlers_change_among_signals", 120, || {
        let stop = kit::Stop::default();
        let reaper = Reaper::new().expect("a reaper");
        thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    while !stop.is_set() {
                        signal_here();
                    }
                });
            }
            let _stop = stop.on_drop();
            // However little time those threads get.
            for i in 0.. {
                if i >= 2000 && PLAIN.load(SeqCst) > 2000 {
                    break;
                }
                if i % 2 == 0 {
                    install(plain as *const () as usize, libc::SA_RESTART);
                } else {
                    install(informed as *const () as usize, libc::SA_SIGINFO | libc::SA_RESTART);
                }
                let before = disposition(libc::SIGCHLD);
                reaper.set_owner(SigchldOwner::Always).expect("owned");
                reaper.set_owner(SigchldOwner::Nobody).expect("given up");
                assert_eq!(disposition(libc::SIGCHLD), before);
            }
        });
        for _ in 0..3 {
            install(plain as *const () as usize, libc::SA_RESETHAND | libc::SA_RESTART);
            let seen = PLAIN.load(SeqCst);
            reaper.set_owner(SigchldOwner::Always).expect("owned");
            for _ in 0..5 {
                signal_here();
            }
            assert_eq!(PLAIN.load(SeqCst), seen + 1);
            reaper.set_owner(SigchldOwner::Nobody).expect("given up");
            assert_eq!(disposition(libc::SIGCHLD).0, libc::SIG_DFL);
        }
    });
}

/// A handler that another thread installs at whatever moment of ours coming and going stays, or is called by ours.
#[test]
fn a_handler_is_installed_at_that_moment() {
    const ROUNDS: u32 = 5000;
    static OTHER: AtomicU32 = AtomicU32::new(0);
    extern "C" fn other(_: i32) {
        OTHER.fetch_add(1, SeqCst);
    }
    isolated("a_handler_is_installed_at_that_moment", 120, || {
        let reaper = Reaper::new().expect("a reaper");
        let (asked, done) = (AtomicU32::new(0), AtomicU32::new(0));
        let wait_for = |count: &AtomicU32, value: u32| {
            while count.load(SeqCst) != value {
                thread::yield_now();
            }
        };
        thread::scope(|s| {
            s.spawn(|| {
                for turn in 1..=2 * ROUNDS {
                    wait_for(&asked, turn);
                    let mode = if turn % 2 == 1 { SigchldOwner::Always } else { SigchldOwner::Nobody };
                    reaper.set_owner(mode).expect("owned");
                    done.store(turn, SeqCst);
                }
            });
            let mut lost = 0;
            for turn in 1..=2 * ROUNDS {
                let (handler, heard) = if turn % 2 == 1 {
                    install(libc::SIG_DFL, 0);
                    (plain as *const () as usize, &PLAIN)
                } else {
                    (other as *const () as usize, &OTHER)
                };
                asked.store(turn, SeqCst);
                (0..turn % 200).for_each(|_| std::hint::spin_loop());
                install(handler, libc::SA_RESTART);
                wait_for(&done, turn);
                let seen = heard.load(SeqCst);
                signal_here();
                lost += u32::from(heard.load(SeqCst) == seen);
            }
            assert_eq!(lost, 0);
        });
    });
}

/// A main loop that keeps its waits to itself is not woken for children without a pidfd, which somebody else would have to ask for; and
/// they are asked for again when it gives that up.
#[test]
fn a_main_loop_sleeps_beside_children_without_pidfds() {
    isolated_with("a_main_loop_sleeps_beside_children_without_pidfds", 60, watching::without_pidfds(), || {
        let alarms = || {
            let fds =
                std::fs::read_dir("/proc/self/fd").expect("/proc").map(|entry| entry.expect("an entry").file_name());
            let infos =
                fds.filter_map(|fd| std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.display())).ok());
            infos.filter(|i| i.contains("it_value: ") && !i.contains("it_value: (0, 0)")).count()
        };
        let reaper = owner(SigchldOwner::MainLoop);
        let (watched, exits) = watch(&reaper, sleeper());
        assert_eq!(alarms(), 0);
        reaper.dispatch().expect("dispatch");
        assert_eq!(alarms(), 0);
        reaper.set_owner(SigchldOwner::Nobody).expect("given up");
        assert_eq!(alarms(), 1);
        watched.kill().expect("ours");
        raw::poll_readable(&mut [raw::pollfd(reaper.as_raw_fd())], SOON);
        assert!(is_readable(&reaper), "nothing tells of it any more");
        assert_eq!(only(&reaper, &exits).signal(), Some(libc::SIGKILL));
        assert_no_child();
    });
}
