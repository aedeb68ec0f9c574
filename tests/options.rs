//! K4: descriptors kept and closed, death signal, name, session, standard streams.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::{CareFd, ForkOptions, Hook, OnFork, Signals};
use common::{Refuse, Setup, Verdict, check, isolated, isolated_with, raw, reap, self_fds};
use kit::{SOON, assert_no_child, code, forked};
use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

fn null() -> File {
    File::open("/dev/null").expect("/dev/null")
}

#[test]
fn a_kept_care_fd_outlives_the_clean_up() {
    isolated("a_kept_care_fd_outlives_the_clean_up", 20, || {
        let kept = CareFd::open(|| Ok(null())).expect("a care-fd");
        let lost = CareFd::open(|| Ok(null())).expect("a care-fd");
        let options = ForkOptions::new().keep(&kept);
        let mut child = forked(&options, |token| {
            // SAFETY: no borrowed descriptor of `lost` is used.
            let done = unsafe { token.cleanup() };
            check(1, (done.closed, done.kept) == (1, 1));
            check(2, self_fds().as_slice() == [0, 1, 2, kept.as_raw_fd()]);
            check(3, kept.is_open_here() && !lost.is_open_here());
            // It stays registered: a child of this child closes it, unless it is kept again.
            check(
                4,
                code(&mut forked(&ForkOptions::new(), |t| {
                    drop(t);
                    i32::from(self_fds().as_slice() != [0, 1, 2])
                })) == 0,
            );
            check(
                5,
                code(&mut forked(&options, |t| {
                    drop(t);
                    i32::from(!kept.is_open_here())
                })) == 0,
            );
            0
        });
        assert_eq!(code(&mut child), 0);
        assert!(kept.is_open_here() && lost.is_open_here());
    });
}

#[test]
fn keep_does_not_keep_what_is_closed_at_every_fork() {
    isolated("keep_does_not_keep_what_is_closed_at_every_fork", 20, || {
        let close = CareFd::open_on(OnFork::Close, || Ok(null())).expect("a care-fd");
        let mut child = forked(&ForkOptions::new().keep(&close), |_| i32::from(close.is_open_here()));
        assert_eq!(code(&mut child), 0);
        assert!(close.is_open_here());
    });
}

fn close_others() {
    let plain = null();
    let kept = null();
    let care = CareFd::open(|| Ok(null())).expect("a care-fd");
    let kept_care = CareFd::open(|| Ok(null())).expect("a care-fd");
    let high = nix::fcntl::fcntl(&plain, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(777)).expect("a number");
    let options = ForkOptions::new().close_others(true).keep(&kept).keep(&kept_care);
    let (plain_fd, care_fd) = (plain.as_raw_fd(), care.as_raw_fd());
    let mut expected = [0, 1, 2, kept.as_raw_fd(), kept_care.as_raw_fd()];
    expected.sort_unstable();
    let mut child = forked(&options, |token| {
        check(1, self_fds().as_slice() == expected);
        check(2, !care.is_open_here());
        // A number that is in use again is somebody else's: neither the clean-up nor the dead value closes it.
        let again = raw::open(c"/dev/null", libc::O_RDONLY).map(std::mem::ManuallyDrop::new);
        let Ok(again) = again else { return 3 };
        check(4, again.as_raw_fd() == plain_fd.min(care_fd));
        let reused: [_; 4] =
            std::array::from_fn(|_| raw::open(c"/dev/null", libc::O_RDONLY).map(std::mem::ManuallyDrop::new));
        check(5, reused.iter().flatten().any(|fd| fd.as_raw_fd() == care_fd));
        check(6, !care.is_open_here());
        let before = self_fds();
        drop(token);
        check(7, before.first_not_in(&self_fds()).is_none());
        0
    });
    assert_eq!(code(&mut child), 0);
    // With standard streams to /dev/null, and a mask of odd numbers: nothing of it is left over.
    let mut child = forked(&options.clone().stdio_null(true), |_| i32::from(self_fds().as_slice() != expected));
    assert_eq!(code(&mut child), 0);
    // None kept.
    let mut child = forked(&ForkOptions::new().close_others(true), |token| {
        check(1, self_fds().as_slice() == [0, 1, 2]);
        drop(token);
        i32::from(self_fds().as_slice() != [0, 1, 2])
    });
    assert_eq!(code(&mut child), 0);
    for fd in [plain.as_raw_fd(), kept.as_raw_fd(), care.as_raw_fd(), kept_care.as_raw_fd(), high] {
        assert!(self_fds().contains(fd));
    }
    assert!(care.is_open_here() && kept_care.is_open_here());
    // SAFETY: made above, owned by nobody.
    unsafe { libc::close(high) };
}

#[test]
fn close_others_closes_all_but_the_kept() {
    isolated("close_others_closes_all_but_the_kept", 20, close_others);
}

#[test]
fn close_others_without_close_range() {
    for errno in [libc::ENOSYS, libc::EPERM] {
        let refuse = vec![Refuse::call(libc::SYS_close_range, errno)];
        let setup = Setup { refuse, env: vec![("ERRNO".to_owned(), errno.to_string())], ..Setup::default() };
        isolated_with("close_others_without_close_range", 20, setup, close_others);
    }
}

#[test]
fn name_and_session() {
    isolated("name_and_session", 20, || {
        let options = ForkOptions::new().name("carefork-worker-with-a-long-name").new_session(true);
        let mut child = forked(&options, |_| {
            let mut buf = [0; 64];
            check(1, raw::read_into(c"/proc/self/comm", &mut buf) == Ok(b"carefork-worker\n"));
            // SAFETY: takes a number.
            check(2, unsafe { libc::getsid(0) } == raw::getpid());
            // SAFETY: takes a number.
            check(3, unsafe { libc::getpgid(0) } == raw::getpid());
            0
        });
        assert_eq!(code(&mut child), 0);
        // Unasked, neither changes.
        let mut parents = [0; 64];
        let parents = raw::read_into(c"/proc/thread-self/comm", &mut parents).expect("/proc");
        // SAFETY: takes a number.
        let session = unsafe { libc::getsid(0) };
        let mut child = forked(&ForkOptions::new(), |_| {
            let mut buf = [0; 64];
            check(1, raw::read_into(c"/proc/self/comm", &mut buf) == Ok(parents));
            // SAFETY: takes a number.
            check(2, unsafe { libc::getsid(0) } == session);
            0
        });
        assert_eq!(code(&mut child), 0);
    });
}

/// Device number of what `fd` is. Async-signal-safe.
fn device(fd: i32) -> Option<u64> {
    // SAFETY: stat is plain data.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `st` is live.
    (unsafe { libc::fstat(fd, &raw mut st) } == 0).then_some(st.st_rdev)
}

fn close(fd: i32) {
    // SAFETY: a standard stream of an isolated test, saved elsewhere.
    assert_eq!(unsafe { libc::close(fd) }, 0);
}

#[test]
fn standard_streams_to_null() {
    isolated("standard_streams_to_null", 20, || {
        let dev_null = device(null().as_raw_fd());
        let all_null = || (0..=2).all(|fd| device(fd) == dev_null);
        let flags = |fd| {
            // SAFETY: only asks.
            unsafe { libc::fcntl(fd, libc::F_GETFD) }
        };
        let options = ForkOptions::new().stdio_null(true);
        let saved: [OwnedFd; 2] = [1, 2].map(|fd| {
            // SAFETY: open while it is borrowed.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
            nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(10))
                .map(|n| {
                    // SAFETY: just made.
                    unsafe { std::os::fd::FromRawFd::from_raw_fd(n) }
                })
                .expect("a number")
        });
        let child = || {
            let before = self_fds();
            let mut child = forked(&options, |token| {
                check(1, all_null());
                // They come through an exec.
                check(2, (0..=2).all(|fd| flags(fd) == 0));
                drop(token);
                check(3, all_null());
                check(4, (3..40).all(|fd| before.contains(fd) == self_fds().contains(fd)));
                0
            });
            let code = code(&mut child);
            drop(child);
            assert_eq!(self_fds().as_slice(), before.as_slice(), "the parent's descriptors changed");
            code
        };
        // Whatever is closed in the parent: what is opened then has these numbers.
        let mut codes = Vec::new();
        for closed in [&[][..], &[0], &[1], &[2], &[0, 1], &[1, 2], &[0, 2], &[0, 1, 2]] {
            closed.iter().for_each(|&fd| close(fd));
            let got = child();
            for &fd in closed {
                let from = saved.get((fd as usize).wrapping_sub(1)).map_or_else(|| None, |f| Some(f.as_raw_fd()));
                match from {
                    Some(from) => kit::redirect(from, fd),
                    None => {
                        let zero = OwnedFd::from(null());
                        assert_eq!(zero.as_raw_fd(), 0);
                        std::mem::forget(zero);
                    }
                }
            }
            codes.push((closed, got));
        }
        assert!(codes.iter().all(|&(_, code)| code == 0), "{codes:?}");
    });
}

/// A care-fd on the number of a standard stream that was closed: the stream that replaces it in the child is not the care-fd.
#[test]
fn standard_streams_to_null_over_a_care_fd() {
    isolated("standard_streams_to_null_over_a_care_fd", 20, || {
        let dev_null = device(null().as_raw_fd());
        close(0);
        let care = CareFd::open(|| File::open("/dev/zero")).expect("a care-fd");
        assert_eq!(care.as_raw_fd(), 0);
        let mut child = forked(&ForkOptions::new().stdio_null(true), |token| {
            check(1, device(0) == dev_null);
            check(2, !care.is_open_here());
            drop(token);
            check(3, device(0) == dev_null);
            0
        });
        assert_eq!(code(&mut child), 0);
        assert!(care.is_open_here());
    });
}

// -- death signal

/// In the child: waits to be killed.
fn wait_for_death() -> i32 {
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

#[test]
fn the_death_signal_comes_when_the_forking_thread_ends() {
    isolated("the_death_signal_comes_when_the_forking_thread_ends", 20, || {
        let options = ForkOptions::new().signals(Signals::Reset).death_signal(libc::SIGUSR1);
        let mut child = thread::scope(|s| {
            let thread = s.spawn(|| {
                let mut child = forked(&options, |_| wait_for_death());
                assert!(matches!(child.wait_timeout(Duration::from_millis(30)), Ok(None)), "it came too early");
                child
            });
            thread.join().expect("no panic")
        });
        assert_eq!(code(&mut child), -libc::SIGUSR1);
    });
}

extern "C" fn nothing() {}

extern "C" fn dawdle() {
    thread::sleep(Duration::from_millis(20));
}

/// However soon the thread ends: its end is not missed by a child that has not come to ask for the signal yet.
/// A child that is the first of its PID namespace sees no parent at all, and has one.
#[test]
fn the_death_signal_in_a_pid_namespace_waits_for_the_end() {
    extern "C" fn dies(_: i32) {
        raw::exit_now(9);
    }
    isolated("the_death_signal_in_a_pid_namespace_waits_for_the_end", 20, || {
        let mut outer = forked(&ForkOptions::new(), |_| {
            // SAFETY: integers only.
            if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0
                // SAFETY: as above.
                && unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWPID) } != 0
            {
                eprintln!("skipped: no PID namespaces here");
                return 0;
            }
            kit::catch(libc::SIGUSR1, dies);
            let mut child = forked(&ForkOptions::new().death_signal(libc::SIGUSR1), |_| 0);
            code(&mut child)
        });
        assert_eq!(code(&mut outer), 0);
    });
}

#[test]
fn the_death_signal_comes_when_the_forking_thread_has_ended_already() {
    isolated("the_death_signal_comes_when_the_forking_thread_has_ended_already", 40, || {
        common::foreign_handlers(nothing, nothing, dawdle);
        let options = ForkOptions::new().signals(Signals::Reset).death_signal(libc::SIGUSR1);
        for _ in 0..20 {
            let mut child =
                thread::scope(|s| s.spawn(|| forked(&options, |_| wait_for_death())).join().expect("no panic"));
            assert_eq!(code(&mut child), -libc::SIGUSR1);
        }
        assert_no_child();
    });
}

/// The parent *process* is gone before the child asks.
#[test]
fn the_death_signal_comes_when_the_parent_is_gone_already() {
    isolated("the_death_signal_comes_when_the_parent_is_gone_already", 20, || {
        // The grandchild is ours to reap.
        // SAFETY: takes numbers.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, 0);
        common::foreign_handlers(nothing, nothing, dawdle);
        let seen = kit::shared();
        let options = ForkOptions::new().signals(Signals::Reset).death_signal(libc::SIGUSR1);
        let mut middle = forked(&ForkOptions::new(), |_| {
            thread::scope(|s| {
                // Ends the process as soon as the grandchild is there, while its fork is still under way.
                s.spawn(|| {
                    while seen[0].load(SeqCst) == 0 {
                        thread::yield_now();
                    }
                    raw::exit_now(0)
                });
                let tell = || seen[0].store(raw::getpid() as u64, SeqCst);
                let _hook = carefork::register(Hook::new("tells").child(tell));
                drop(forked(&options, |_| wait_for_death()));
                wait_for_death()
            })
        });
        assert_eq!(code(&mut middle), 0);
        let grandchild = seen[0].load(SeqCst) as i32;
        assert_eq!(reap(grandchild, SOON), Verdict::Signaled(libc::SIGUSR1));
    });
}

/// What `stdio_null` opens for one child is not what others inherit, whose forks come in between.
#[test]
fn the_null_device_is_nobody_elses() {
    isolated("the_null_device_is_nobody_elses", 60, || {
        let (go, told) = std::sync::mpsc::channel();
        let before = self_fds();
        let opened = move || self_fds().as_slice().len() > before.as_slice().len();
        let other = thread::spawn(move || {
            told.recv().expect("the hook sends");
            code(&mut forked(&ForkOptions::new().stdio_null(true), |_| 0))
        });
        let first = std::sync::Mutex::new(Some(go));
        let _hook = carefork::register(Hook::new("slow").prepare(move || {
            if let Some(go) = first.lock().expect("not poisoned").take() {
                go.send(()).expect("it waits");
                while !opened() {
                    thread::yield_now();
                }
            }
        }));
        let mut child = forked(&ForkOptions::new(), |token| {
            drop(token);
            i32::from(self_fds().as_slice() != [0, 1, 2])
        });
        assert_eq!((code(&mut child), other.join().expect("no panic")), (0, 0));
    });
}

/// A standard stream stays, also one that is a care-fd.
#[test]
fn closing_the_others_leaves_a_care_fd_that_is_standard_input() {
    isolated("closing_the_others_leaves_a_care_fd_that_is_standard_input", 20, || {
        // SAFETY: a number of this process's.
        unsafe { libc::close(0) };
        let input = CareFd::open(|| Ok(null())).expect("a care-fd");
        assert_eq!(input.as_raw_fd(), 0);
        let mut child = forked(&ForkOptions::new().close_others(true), |token| {
            check(1, input.is_open_here() && self_fds().contains(0));
            drop(token);
            check(2, !input.is_open_here());
            0
        });
        assert_eq!(code(&mut child), 0);
    });
}
