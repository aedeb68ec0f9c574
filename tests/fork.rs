//! K1: the two sides of a fork, the token of the child, and `spawn`. K7. Bad use. errno.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::{Fork, ForkError, ForkOptions, Hook, Signals};
use common::{Setup, Verdict, check, isolated, isolated_with, raw, reap};
use kit::{
    Calls, InRegion, Ran, SOON, Stop, assert_gate_open, assert_no_child, captured, code, foreign, forked, shared,
};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread;
use std::time::Duration;

fn errno_is(e: i32) {
    // SAFETY: takes nothing.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the location is this thread's own.
    unsafe { *place = e };
}

#[test]
fn both_sides_know_each_other() {
    isolated("both_sides_know_each_other", 20, || {
        let parent = raw::getpid();
        let seen = shared();
        let mut child = forked(&ForkOptions::new(), |token| {
            seen[0].store(raw::getpid() as u64, SeqCst);
            // SAFETY: takes nothing.
            check(1, unsafe { libc::getppid() } == parent);
            token.exit(33)
        });
        assert_eq!(code(&mut child), 33);
        assert_eq!(seen[0].load(SeqCst), u64::from(child.id()));
        assert_no_child();
    });
}

#[test]
fn a_dropped_token_cleans_up_an_exit_does_not() {
    isolated("a_dropped_token_cleans_up_an_exit_does_not", 20, || {
        let calls = Calls::new();
        let _hook = calls.register("counter");
        let care = carefork::CareFd::open(|| std::fs::File::open("/dev/null")).expect("a care-fd");
        let fd = care.as_raw_fd();
        let open = || common::self_fds().contains(fd);

        let mut child = forked(&ForkOptions::new(), |token| {
            check(1, open());
            drop(token);
            check(2, !open());
            0
        });
        assert_eq!(code(&mut child), 0);
        assert_eq!(calls.ran(), Ran { prepare: 1, parent: 1, child: 1, cleanup: 1, undo: 0 });
        // Its pidfd is a care-fd, too.
        drop(child);

        let mut child = forked(&ForkOptions::new(), |token| {
            // SAFETY: the number is only looked up.
            let done = unsafe { token.cleanup() };
            check(1, !open());
            check(2, done.closed == 1 && done.kept == 0 && done.hooks == 1 && done.panicked == 0 && !done.already);
            0
        });
        assert_eq!(code(&mut child), 0);
        assert_eq!(calls.ran().cleanup, 2);

        assert_eq!(code(&mut forked(&ForkOptions::new(), |token| token.exit(4))), 4);
        assert_eq!(calls.ran(), Ran { prepare: 3, parent: 3, child: 3, cleanup: 2, undo: 0 });
        assert!(open());
    });
}

#[test]
fn exec_becomes_the_program_without_a_clean_up() {
    isolated("exec_becomes_the_program_without_a_clean_up", 20, || {
        let calls = Calls::new();
        let _hook = calls.register("counter");
        let care = carefork::CareFd::open(|| std::fs::File::open("/dev/null")).expect("a care-fd");
        let fd = care.as_raw_fd();
        // Tests whether the descriptor came through, and hands on an argument as exit code.
        let script = std::ffi::CString::new(format!("[ -e /proc/self/fd/{fd} ] && exit 1; exit $1"));
        let script = script.expect("no NUL");
        let mut child = forked(&ForkOptions::new(), |mut token| {
            drop(token.exec(c"/bin/sh", &[c"sh", c"-c", &script, c"sh", c"23"]));
            99
        });
        assert_eq!(code(&mut child), 23);
        assert_eq!(calls.ran(), Ran { prepare: 1, parent: 1, child: 1, ..Ran::default() });

        // Where there is no such program the child goes on as before.
        let mut child = forked(&ForkOptions::new(), |mut token| {
            let error = token.exec(c"/nonexistent", &[c"x"]);
            check(1, error.raw_os_error() == Some(libc::ENOENT));
            check(2, common::self_fds().contains(fd));
            drop(token);
            check(3, !common::self_fds().contains(fd));
            0
        });
        assert_eq!(code(&mut child), 0);
        assert_eq!(calls.ran().cleanup, 1);
    });
}

/// Counts where it is dropped.
struct Dropped(&'static AtomicU64);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}

static AT_EXIT: std::sync::OnceLock<&'static AtomicU64> = std::sync::OnceLock::new();

extern "C" fn at_exit() {
    if let Some(count) = AT_EXIT.get() {
        count.fetch_add(1, SeqCst);
    }
}

#[test]
fn spawn_runs_its_function_and_nothing_of_the_parents() {
    isolated("spawn_runs_its_function_and_nothing_of_the_parents", 20, || {
        let seen = shared();
        AT_EXIT.set(&seen[1]).expect("once");
        // SAFETY: the handler only counts.
        assert_eq!(unsafe { libc::atexit(at_exit) }, 0);
        let calls = Calls::new();
        let _hook = calls.register("counter");
        {
            let _frame = Dropped(&seen[0]);
            let moved = Dropped(&seen[2]);
            // SAFETY: the closure touches nothing but shared memory.
            let child = unsafe {
                carefork::spawn(|| {
                    // Cleaned up before it began.
                    check(90, calls.ran().cleanup == 1);
                    drop(moved);
                    19
                })
            };
            assert_eq!(code(&mut child.expect("a child")), 19);
            // What the closure owned: dropped by both sides.
            assert_eq!(seen[2].load(SeqCst), 2);
        }
        assert_eq!(seen[0].load(SeqCst), 1, "a destructor of the parent's frame ran in the child");
        assert_eq!(seen[1].load(SeqCst), 0, "an atexit handler ran in the child");
    });
}

#[test]
fn spawn_ends_with_the_low_byte_of_any_code() {
    isolated("spawn_ends_with_the_low_byte_of_any_code", 20, || {
        for (given, seen) in [(0, 0), (255, 255), (256, 0), (-1, 255)] {
            // SAFETY: the closure does nothing.
            let mut child = unsafe { carefork::spawn(|| given) }.expect("a child");
            assert_eq!(code(&mut child), seen);
        }
    });
}

#[test]
fn spawn_catches_a_panic_and_says_what() {
    isolated("spawn_catches_a_panic_and_says_what", 20, || {
        let seen = shared();
        let said = captured(2, || {
            let _frame = Dropped(&seen[0]);
            // Both kinds of text.
            for text in ["for a static reason", "and a made one"] {
                // SAFETY: the closure touches nothing but shared memory.
                let child = unsafe {
                    carefork::spawn(|| {
                        if text.starts_with("for") {
                            panic!("for a static reason");
                        }
                        panic!("{}", text.to_owned());
                    })
                };
                assert_eq!(code(&mut child.expect("a child")), 101);
            }
        });
        assert!(said.contains("for a static reason") && said.contains("and a made one"), "{said:?}");
        assert!(said.contains("fork.rs"), "{said:?}");
        assert_eq!(seen[0].load(SeqCst), 1, "the panic unwound the parent's frames");
    });
}

struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("the payload's destructor panics");
    }
}

#[test]
fn spawn_survives_a_payload_that_panics_when_dropped() {
    isolated("spawn_survives_a_payload_that_panics_when_dropped", 20, || {
        // SAFETY: the closure touches nothing.
        let child = unsafe { carefork::spawn(|| std::panic::panic_any(Bomb)) };
        assert_eq!(code(&mut child.expect("a child")), 101);
    });
}

/// How a child of `spawn` ends while another thread holds what `lock` takes.
fn ended_beside<G>(lock: fn() -> G, f: fn() -> i32) -> Option<i32> {
    let held = AtomicBool::new(false);
    let done = Stop::default();
    thread::scope(|s| {
        s.spawn(|| {
            let _held = lock();
            held.store(true, SeqCst);
            while !done.is_set() {
                thread::sleep(Duration::from_millis(1));
            }
        });
        let _done = done.on_drop();
        while !held.load(SeqCst) {
            thread::yield_now();
        }
        // SAFETY: each `f` touches nothing of the parent's.
        let mut child = unsafe { carefork::spawn(f) }.expect("a child");
        let status = child.wait_timeout(SOON);
        drop(child.kill());
        drop(child.wait());
        status.ok().flatten().and_then(|s| s.code())
    })
}

#[test]
fn spawn_panics_while_another_thread_holds_standard_error() {
    isolated("spawn_panics_while_another_thread_holds_standard_error", 20, || {
        assert_eq!(ended_beside(|| std::io::stderr().lock(), || panic!("said by write(2)")), Some(101));
    });
}

#[test]
fn spawn_flushes_standard_output_under_the_guard() {
    isolated("spawn_flushes_standard_output_under_the_guard", 20, || {
        let _guard = carefork::stdio::guard();
        let text = captured(1, || {
            print!("parent;");
            // SAFETY: the closure prints.
            let child = unsafe {
                carefork::spawn(|| {
                    print!("child;");
                    0
                })
            };
            assert_eq!(code(&mut child.expect("a child")), 0);
            println!("end");
        });
        assert_eq!(text, "parent;child;end\n");
    });
}

#[test]
fn spawn_leaves_standard_output_alone_without_the_guard() {
    isolated("spawn_leaves_standard_output_alone_without_the_guard", 20, || {
        assert_eq!(ended_beside(|| std::io::stdout().lock(), || 0), Some(0));
    });
}

#[test]
fn a_fork_by_foreign_code_keeps_errno() {
    isolated("a_fork_by_foreign_code_keeps_errno", 20, || {
        let spoil = || errno_is(libc::ENOTTY);
        let _hook = carefork::register(Hook::new("spoils").prepare(spoil).parent(spoil).child(spoil));
        for _ in 0..10 {
            errno_is(libc::EXDEV);
            let parent = raw::getpid();
            // SAFETY: the child looks at errno and ends.
            let pid = unsafe { libc::fork() };
            let errno = raw::errno();
            if raw::getpid() != parent {
                raw::exit_now(errno);
            }
            assert_eq!(errno, libc::EXDEV);
            assert_eq!(reap(pid, SOON), Verdict::Exited(libc::EXDEV));
        }
    });
}

/// Must be refused, and leave nothing.
#[track_caller]
fn refused() -> ForkError {
    // SAFETY: no child comes of it; one that does ends here.
    match unsafe { carefork::fork() } {
        Err(e) => e,
        Ok(Fork::Child(_)) => raw::exit_now(98),
        Ok(Fork::Parent(mut c)) => panic!("was not refused, and the child ended with {:?}", c.wait()),
    }
}

#[test]
fn a_fork_in_a_region_of_ones_own_is_refused() {
    isolated("a_fork_in_a_region_of_ones_own_is_refused", 20, || {
        let region = carefork::no_forking();
        let line = line!() - 1;
        let nested = carefork::no_forking();
        for _ in 0..2 {
            let ForkError::Forbidden { entered } = refused() else { panic!("another error") };
            if let Some(at) = entered {
                assert_eq!((at.line(), at.file()), (line, file!()));
            }
            assert!(entered.is_some() || !cfg!(debug_assertions));
        }
        drop(nested);
        assert!(matches!(refused(), ForkError::Forbidden { .. }));
        drop(region);
        assert_no_child();
        assert_eq!(carefork::stats().thrown_away, 0, "it cost a fork");
        assert_gate_open();
        assert_eq!(code(&mut forked(&ForkOptions::new(), |_| 0)), 0);

        let once = carefork::OnceLock::new();
        once.get_or_init(|| assert!(matches!(refused(), ForkError::Forbidden { .. })));
        drop(carefork::CareFd::open(|| {
            assert!(matches!(refused(), ForkError::Forbidden { .. }));
            std::fs::File::open("/dev/null")
        }));
    });
}

#[test]
fn a_fork_in_a_hook_is_refused() {
    isolated("a_fork_in_a_hook_is_refused", 20, || {
        let seen = shared();
        let try_it = move |at: usize| {
            if matches!(refused(), ForkError::InFork) {
                seen[at].fetch_add(1, SeqCst);
            }
        };
        let hook = Hook::new("forks")
            .prepare(move || try_it(0))
            .parent(move || try_it(1))
            .child(move || try_it(2))
            // This one may.
            .cleanup(move || {
                if code(&mut forked(&ForkOptions::new(), |token| token.exit(7))) == 7 {
                    seen[3].fetch_add(1, SeqCst);
                }
            });
        let _hook = carefork::register(hook);
        // SAFETY: the closure does nothing.
        let mut child = unsafe { carefork::spawn(|| 0) }.expect("a child");
        assert_eq!(code(&mut child), 0);
        // The child's own fork went through the hooks as well.
        assert_eq!([0, 1, 2, 3].map(|i| seen[i].load(SeqCst)), [2, 2, 2, 1]);
        assert_no_child();
    });
}

static TRY_IN_HANDLER: AtomicBool = AtomicBool::new(false);
static IN_HANDLER: AtomicU64 = AtomicU64::new(0);

extern "C" fn foreign_prepare() {
    if TRY_IN_HANDLER.swap(false, SeqCst) && matches!(refused(), ForkError::InFork) {
        IN_HANDLER.fetch_add(1, SeqCst);
    }
}

extern "C" fn nothing() {}

#[test]
fn a_fork_in_another_librarys_handler_is_refused() {
    isolated("a_fork_in_another_librarys_handler_is_refused", 20, || {
        // Runs before ours, when carefork's own part of the fork has not begun.
        common::foreign_handlers(foreign_prepare, nothing, nothing);
        TRY_IN_HANDLER.store(true, SeqCst);
        let calls = Calls::new();
        let _hook = calls.register("counter");
        assert_eq!(code(&mut forked(&ForkOptions::new(), |t| t.exit(5))), 5);
        assert_eq!(IN_HANDLER.load(SeqCst), 1);
        assert_eq!(calls.ran(), Ran { prepare: 1, parent: 1, child: 1, ..Ran::default() });
        assert_no_child();
    });
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    isolated("options_that_contradict_each_other_are_refused", 20, || {
        let calls = Calls::new();
        let _hook = calls.register("counter");
        let usr1 = || Signals::List(vec![libc::SIGUSR1]);
        let o = ForkOptions::new;
        let null = std::io::stdout();
        let bad = [
            o().signals(usr1()).mask(&[libc::SIGTERM, libc::SIGUSR1]),
            o().signals(Signals::List(vec![libc::SIGKILL])),
            o().signals(Signals::List(vec![libc::SIGSTOP])),
            o().signals(Signals::List(vec![0])),
            o().signals(Signals::List(vec![65])),
            o().signals(Signals::List(vec![-3])),
            o().mask(&[65]),
            o().mask(&[0]),
            o().death_signal(0),
            o().death_signal(65),
            o().name("with\0nul"),
            o().stdio_null(true).keep(&null),
        ];
        let before = carefork::stats();
        for options in &bad {
            // SAFETY: as in `refused`.
            match unsafe { options.fork() } {
                Err(ForkError::Invalid(what)) => assert!(what.len() > 10, "{what}"),
                Ok(Fork::Child(_)) => raw::exit_now(98),
                other => panic!("{options:?} gave {other:?}"),
            }
            // SAFETY: the same.
            assert!(matches!(unsafe { options.spawn(|| 98) }, Err(ForkError::Invalid(_))));
        }
        let after = carefork::stats();
        assert_eq!(calls.ran(), Ran::default(), "something was prepared");
        assert_eq!((after.forks, after.thrown_away), (before.forks, before.thrown_away), "it cost a fork");
        assert_eq!(after.refused, before.refused + 2 * bad.len() as u64);
        assert_no_child();
        // These only look like it.
        let good = [
            o().signals(usr1()).mask(&[libc::SIGTERM]),
            o().signals(Signals::Reset).mask(&[libc::SIGUSR1]),
            o().close_others(true).keep(&null),
            o().signals(Signals::List(Vec::new())).mask(&[]),
            o().name("a name that is longer than the kernel keeps"),
        ];
        for options in &good {
            assert_eq!(code(&mut forked(options, |_| 0)), 0);
        }
    });
}

#[test]
fn turned_off_by_the_environment() {
    let env = vec![("CAREFORK".to_owned(), "off".to_owned())];
    isolated_with("turned_off_by_the_environment", 20, Setup { env, ..Setup::default() }, || {
        let calls = Calls::new();
        let _hook = calls.register("counter");
        let _busy = InRegion::new("busy");
        let mine = carefork::no_forking();
        // Neither this thread's region nor the other's keeps a fork from happening, nor does a hook run.
        // Time stands still: who waited would wait for ever.
        kit::freeze();
        assert_eq!(code(&mut forked(&ForkOptions::new().timeout_never(), |_| 3)), 3);
        assert_eq!(reap(foreign(|| 4), SOON), Verdict::Exited(4));
        drop(mine);
        // No child is told, so none is known to be a bypass; and none is at rest.
        let seen_in_child = || {
            let seen = carefork::lineage();
            i32::from((seen.generation, seen.dirty, seen.bypass) != (1, true, false))
        };
        assert_eq!(reap(foreign(seen_in_child), SOON), Verdict::Exited(0));
        assert_eq!(code(&mut forked(&ForkOptions::new(), |_| seen_in_child())), 0);
        // SAFETY: the closure does nothing.
        assert_eq!(code(&mut unsafe { carefork::spawn(|| 5) }.expect("a child")), 5);
        assert_eq!(calls.ran(), Ran::default());
        // What the options ask for is done all the same.
        kit::block(&[libc::SIGUSR1]);
        let options = ForkOptions::new().signals(Signals::Reset);
        let mut child = forked(&options, |_| i32::from(common::status_here().map(|s| s.sig_blk) != Ok(0)));
        assert_eq!(code(&mut child), 0);
        assert_eq!(common::status_here().map(|s| s.sig_blk), Ok(kit::bits(&[libc::SIGUSR1])));
        assert_no_child();
    });
}

#[test]
fn any_other_value_of_the_variable_turns_nothing_off() {
    let env = vec![("CAREFORK".to_owned(), "on".to_owned())];
    isolated_with("any_other_value_of_the_variable_turns_nothing_off", 20, Setup { env, ..Setup::default() }, || {
        let calls = Calls::new();
        let _hook = calls.register("counter");
        assert_eq!(code(&mut forked(&ForkOptions::new(), |_| 3)), 3);
        assert_eq!(calls.ran().prepare, 1);
    });
}
