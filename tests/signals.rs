//! K3 and G8: dispositions and masks of children, and that no handler of the parent runs in one.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::{ForkError, ForkOptions, Hook, Signals};
use common::{Status, check, isolated, raw, status_here};
use kit::{State, Stop, bits, block, captured, catch, code, disposition, forked, ignore, shared};
use libc::{SIGHUP, SIGPIPE, SIGTERM, SIGUSR1, SIGUSR2};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicI32, AtomicU64};
use std::thread;
use std::time::Duration;

extern "C" fn do_nothing(_: i32) {}

/// A parent with something of everything: caught, ignored, blocked. Rust's runtime ignores SIGPIPE.
fn dress() {
    catch(SIGUSR1, do_nothing);
    catch(libc::SIGRTMIN() + 3, do_nothing);
    catch(libc::SIGRTMAX(), do_nothing);
    ignore(SIGUSR2);
    ignore(SIGHUP);
    block(&[SIGTERM, SIGUSR1, libc::SIGRTMAX(), libc::SIGCHLD]);
    let status = status_here().expect("/proc");
    assert!(status.ignores(SIGPIPE) && status.ignores(SIGUSR2) && status.catches(SIGUSR1) && status.blocks(SIGTERM));
}

/// libc's own two, which it sets when it first needs them and no program may.
const LIBCS: u64 = 0b11 << 31;

/// What a child of a fork with `options` finds.
fn child_of(options: &ForkOptions<'_>) -> Status {
    let seen = shared();
    let parents = State::now();
    let mut child = forked(options, |_| {
        let Ok(status) = status_here() else { return 1 };
        seen[0].store(status.sig_blk, SeqCst);
        seen[1].store(status.sig_ign, SeqCst);
        seen[2].store(status.sig_cgt & !LIBCS, SeqCst);
        0
    });
    assert_eq!(code(&mut child), 0);
    drop(child);
    assert_eq!(State::now(), parents, "something changed in the parent");
    let [sig_blk, sig_ign, sig_cgt] = [0, 1, 2].map(|i| seen[i].load(SeqCst));
    Status { sig_blk, sig_ign, sig_cgt, threads: 1, ppid: 0, tracer: 0 }
}

#[test]
fn reset_leaves_nothing_of_the_parents() {
    isolated("reset_leaves_nothing_of_the_parents", 20, || {
        dress();
        let child = child_of(&ForkOptions::new().signals(Signals::Reset));
        assert_eq!((child.sig_blk, child.sig_ign, child.sig_cgt), (0, 0, bits(&[SIGPIPE])));
    });
}

#[test]
fn inherit_changes_nothing() {
    isolated("inherit_changes_nothing", 20, || {
        dress();
        let parent = status_here().expect("/proc");
        for options in [ForkOptions::new(), ForkOptions::new().signals(Signals::Inherit)] {
            let child = child_of(&options);
            assert_eq!(child.sig_blk, parent.sig_blk);
            assert_eq!(child.sig_ign, parent.sig_ign);
            assert_eq!(child.sig_cgt, parent.sig_cgt & !LIBCS);
        }
        // To the handlers and their flags.
        let parents: [_; 64] = std::array::from_fn(|i| disposition(i as i32 + 1));
        let mut child = forked(&ForkOptions::new(), |_| {
            i32::from(!(1..=64).zip(parents).all(|(signal, parent)| disposition(signal) == parent))
        });
        assert_eq!(code(&mut child), 0);
    });
}

#[test]
fn a_list_changes_what_it_lists() {
    isolated("a_list_changes_what_it_lists", 20, || {
        dress();
        let parent = status_here().expect("/proc");
        // Caught and blocked; ignored; blocked only.
        let list = vec![SIGUSR1, SIGUSR2, SIGTERM];
        let gone = bits(&list);
        let child = child_of(&ForkOptions::new().signals(Signals::List(list)));
        assert_eq!(child.sig_blk, parent.sig_blk & !gone);
        assert_eq!(child.sig_ign, parent.sig_ign & !gone);
        assert_eq!(child.sig_cgt, parent.sig_cgt & !gone & !LIBCS);
        assert!(child.blocks(libc::SIGRTMAX()) && child.ignores(SIGHUP) && child.ignores(SIGPIPE));
    });
}

#[test]
fn a_given_mask_is_the_childs() {
    isolated("a_given_mask_is_the_childs", 20, || {
        dress();
        let all = [Signals::Reset, Signals::Inherit, Signals::List(vec![SIGUSR1])];
        for signals in all {
            let options = ForkOptions::new().signals(signals.clone());
            for mask in [&[][..], &[SIGHUP], &[libc::SIGINT, libc::SIGRTMIN(), 64]] {
                let child = child_of(&options.clone().mask(mask));
                assert_eq!(child.sig_blk, bits(mask), "{signals:?}");
            }
        }
    });
}

#[test]
fn the_parents_mask_comes_back_exactly() {
    isolated("the_parents_mask_comes_back_exactly", 30, || {
        let rt: Vec<i32> = (libc::SIGRTMIN()..=libc::SIGRTMAX()).collect();
        for mask in [&[][..], &[SIGUSR1], &[libc::SIGCHLD, SIGPIPE, 64], &rt] {
            block(mask);
            for signals in [Signals::Reset, Signals::Inherit, Signals::List(vec![SIGUSR1])] {
                child_of(&ForkOptions::new().signals(signals));
                assert_eq!(status_here().expect("/proc").sig_blk, bits(mask));
            }
            let pid = kit::foreign(|| i32::from(status_here().map(|s| s.sig_blk) != Ok(bits(mask))));
            assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Exited(0));
            assert_eq!(status_here().expect("/proc").sig_blk, bits(mask));
            // Of a thread other than the first, too.
            thread::scope(|s| {
                let thread = s.spawn(|| {
                    block(&[SIGHUP]);
                    child_of(&ForkOptions::new().signals(Signals::Reset));
                    status_here().expect("/proc").sig_blk
                });
                assert_eq!(thread.join().expect("no panic"), bits(&[SIGHUP]));
            });
        }
    });
}

#[test]
fn writing_to_a_closed_pipe_is_an_error_in_a_reset_child() {
    isolated("writing_to_a_closed_pipe_is_an_error_in_a_reset_child", 20, || {
        let (reader, writer) = nix::unistd::pipe().expect("a pipe");
        drop(reader);
        let mut child = forked(&ForkOptions::new().signals(Signals::Reset), |_| {
            // SAFETY: one byte of a literal.
            let n = unsafe { libc::write(writer.as_raw_fd(), b"x".as_ptr().cast(), 1) };
            check(1, n == -1);
            check(2, raw::errno() == libc::EPIPE);
            0
        });
        assert_eq!(code(&mut child), 0);
    });
}

#[test]
fn an_executed_program_starts_clean() {
    isolated("an_executed_program_starts_clean", 20, || {
        dress();
        let line = |text: &str, name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name)).expect("a line of /proc/self/status");
            u64::from_str_radix(line.trim(), 16).expect("a number")
        };
        let run = |options: &ForkOptions<'_>| {
            let text = captured(1, || {
                let mut child = forked(options, |mut token| {
                    drop(token.exec(c"/bin/cat", &[c"cat", c"/proc/self/status"]));
                    99
                });
                assert_eq!(code(&mut child), 0);
            });
            ["SigBlk:", "SigIgn:", "SigCgt:"].map(|name| line(&text, name))
        };
        assert_eq!(run(&ForkOptions::new().signals(Signals::Reset)), [0, 0, 0]);
        let [blocked, ignored, _] = run(&ForkOptions::new());
        assert_eq!(blocked, status_here().expect("/proc").sig_blk);
        assert_eq!(ignored & !LIBCS, bits(&[SIGPIPE, SIGUSR2, SIGHUP]));
    });
}

// -- the storm

static PARENT: AtomicI32 = AtomicI32::new(0);
static IN_PARENT: AtomicU64 = AtomicU64::new(0);
static IN_CHILDREN: std::sync::OnceLock<&'static AtomicU64> = std::sync::OnceLock::new();

/// Async-signal-safe: the cell was set before the handler was.
extern "C" fn count(_: i32) {
    if raw::getpid() == PARENT.load(SeqCst) {
        IN_PARENT.fetch_add(1, SeqCst);
    } else if let Some(n) = IN_CHILDREN.get() {
        n.fetch_add(1, SeqCst);
    }
}

fn storm_signals() -> Vec<i32> {
    (0..4).map(|i| libc::SIGRTMIN() + 1 + i).collect()
}

/// Sends real-time signals to the whole process group, children included, while `f` runs. What handlers counted in children.
fn in_a_storm(f: impl FnOnce()) -> u64 {
    let seen = IN_CHILDREN.get_or_init(|| &shared()[0]);
    seen.store(0, SeqCst);
    PARENT.store(raw::getpid(), SeqCst);
    let stop = Stop::default();
    storm_signals().into_iter().for_each(|s| catch(s, count));
    thread::scope(|s| {
        s.spawn(|| {
            let signals = storm_signals();
            for i in 0.. {
                if stop.is_set() {
                    break;
                }
                // SAFETY: to this process's own group, which has nobody but it and its children (isolated test).
                unsafe { libc::kill(0, signals[i % signals.len()]) };
                // Not so dense that a child on a busy machine comes to nothing but handlers.
                if i % 4 == 0 {
                    thread::sleep(Duration::from_micros(400));
                }
            }
        });
        let _stop = stop.on_drop();
        f();
    });
    seen.load(SeqCst)
}

/// A child's life: long enough to be hit.
fn linger(_: carefork::InChild) -> i32 {
    thread::sleep(Duration::from_micros(200));
    0
}

/// Forks `n` times, and on until `seen`; how many children ended with 0, and by a signal of the storm.
fn forks(n: u32, options: &ForkOptions<'_>, seen: impl Fn(u32) -> bool) -> (u32, u32) {
    let (mut well, mut hit) = (0, 0);
    while well + hit < n || !seen(hit) {
        match code(&mut forked(options, linger)) {
            0 => well += 1,
            s if storm_signals().contains(&-s) => hit += 1,
            other => panic!("a child ended with {other}"),
        }
    }
    (well, hit)
}

#[test]
fn no_handler_of_the_parent_runs_in_a_reset_child() {
    isolated("no_handler_of_the_parent_runs_in_a_reset_child", 60, || {
        let reset = ForkOptions::new().signals(Signals::Reset);
        let ran = in_a_storm(|| {
            // Default for these is death, and the mask is empty: some children are killed, as they ought to be.
            // On a busy machine the storm may come late.
            forks(1000, &reset, |hit| hit > 0 && IN_PARENT.load(SeqCst) > 1000);
            let (well, hit) = forks(1000, &reset.clone().mask(&storm_signals()), |_| true);
            assert_eq!((well, hit), (1000, 0));
        });
        assert_eq!(ran, 0, "handlers of the parent ran in children");
        kit::assert_no_child();
    });
}

#[test]
fn no_listed_handler_of_the_parent_runs_in_a_child() {
    isolated("no_listed_handler_of_the_parent_runs_in_a_child", 60, || {
        let options = ForkOptions::new().signals(Signals::List(storm_signals()));
        let ran = in_a_storm(|| {
            forks(300, &options, |hit| hit > 0);
        });
        assert_eq!(ran, 0);
    });
}

/// The control: in the same storm a child that keeps the handlers runs them.
#[test]
fn the_storm_shows_a_handler_that_runs() {
    isolated("the_storm_shows_a_handler_that_runs", 60, || {
        let ran = || IN_CHILDREN.get().is_some_and(|n| n.load(SeqCst) > 0);
        assert!(in_a_storm(|| assert_eq!(forks(200, &ForkOptions::new(), |_| ran()).1, 0)) > 0);
    });
}

/// G8: the child of a fork that is refused in the middle ends before any handler.
#[test]
fn no_handler_runs_in_a_child_that_is_thrown_away() {
    isolated("no_handler_runs_in_a_child_that_is_thrown_away", 60, || {
        let _never = carefork::register(Hook::new("never").try_prepare(|| Err("no".into())));
        let ran = in_a_storm(|| {
            for _ in 0..300 {
                // SAFETY: no child comes of it.
                let refused = unsafe { carefork::fork() };
                assert!(matches!(refused, Err(ForkError::Vetoed { .. })), "{refused:?}");
            }
        });
        assert_eq!(ran, 0);
        assert_eq!(carefork::stats().thrown_away, 300);
        kit::assert_no_child();
    });
}

/// What came while signals were blocked for a fork comes afterwards, and is not lost.
#[test]
fn a_signal_that_comes_during_a_fork_comes_after_it() {
    isolated("a_signal_that_comes_during_a_fork_comes_after_it", 20, || {
        PARENT.store(raw::getpid(), SeqCst);
        catch(SIGUSR1, count);
        let inside = shared();
        let raise = move || {
            // SAFETY: to this thread.
            unsafe { libc::raise(SIGUSR1) };
            inside[0].store(IN_PARENT.load(SeqCst), SeqCst);
        };
        let _hook = carefork::register(Hook::new("raises").prepare(raise));
        for n in 1..=20 {
            assert_eq!(code(&mut forked(&ForkOptions::new(), |_| 0)), 0);
            assert_eq!(inside[0].load(SeqCst), n - 1, "a handler ran while the gate was shut");
            assert_eq!(IN_PARENT.load(SeqCst), n);
        }
    });
}
