//! Standard output and error of Rust's std, and the panic message, in children (L6).

// Forks, and descriptors moved about.
#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;
mod drive;
mod streams;

use carefork::stdio::{self, Stream};
use carefork::{ForkError, ForkOptions, no_forking};
use common::{ForkGuardAlloc, Setup, Tally, Verdict, check, fork_many, isolated, isolated_with, raw, reap};
use drive::{BOTH, Kind, MS, SOON, Stop, freeze, run_clock, run_slowly, until};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;
use streams::{Capture, Pipe, flush, stderr_of};

#[global_allocator]
static ALLOC: ForkGuardAlloc = ForkGuardAlloc;

/// Threads that print, in every storm.
const THREADS: usize = 4;
const FORKS: u32 = 2000;

#[track_caller]
fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// A fork of that kind without a budget.
fn fork_without_end(kind: Kind, child: impl FnOnce() -> i32) -> i32 {
    match kind {
        Kind::Coordinated => drive::fork_with(&ForkOptions::new().timeout_never(), child).expect("a child"),
        Kind::Foreign => {
            carefork::set_foreign_budget(None);
            kind.fork(child)
        }
    }
}

/// Forks of both kinds in turn, while each of the threads calls `work` with its number and the number of the call; how many
/// calls each has made.
fn storm(child: impl Fn(u32) -> i32, work: impl Fn(usize, u64) + Sync) -> [u64; THREADS] {
    let stop = AtomicBool::new(false);
    let done = [const { AtomicU64::new(0) }; THREADS];
    // A thread that panics waits inside a region for a stream that the fork may hold: time must pass.
    let _clock = run_slowly();
    let mut tally = Tally::default();
    thread::scope(|s| {
        let _stop = Stop(&stop);
        for (n, done) in done.iter().enumerate() {
            let (stop, work) = (&stop, &work);
            s.spawn(move || {
                while !stop.load(SeqCst) {
                    let i = done.fetch_add(1, SeqCst);
                    work(n, i);
                    // std's locks are unfair: threads that never pause keep a fork waiting for long.
                    if i % 32 == 0 {
                        thread::sleep(MS / 5);
                    }
                }
            });
        }
        tally = fork_many(FORKS, 1, SOON, |i| fork_without_end(BOTH[i as usize % 2], || child(i)));
    });
    tally.expect_clean(FORKS);
    assert_eq!((carefork::stats().refused, carefork::stats().dirty), (0, 0));
    done.map(AtomicU64::into_inner)
}

/// Each word came once, the children's `<c 0>` and on, and the threads' `<t0 0>` and on.
fn each_once(capture: &Capture, done: [u64; THREADS]) {
    let words = capture.words();
    let wrong: Vec<_> = words.iter().filter(|(_, n)| **n != 1).take(10).collect();
    assert!(wrong.is_empty(), "words that came more than once: {wrong:?}");
    for (n, done) in done.iter().enumerate() {
        let lost = (0..*done).find(|i| !words.contains_key(&format!("t{n} {i}")));
        assert_eq!(lost, None, "thread {n}'s word is lost, of {done}");
    }
    let lost = (0..FORKS).find(|i| !words.contains_key(&format!("c {i}")));
    assert_eq!(lost, None, "a child's word is lost");
    assert_eq!(words.len() as u64, done.iter().sum::<u64>() + u64::from(FORKS), "words that nobody has printed");
}

// -- children print while threads print

#[test]
fn println_in_children_while_threads_print() {
    isolated("println_in_children_while_threads_print", 240, || {
        let _guard = stdio::guard();
        let capture = Capture::new();
        let redirected = capture.on(1);
        let child = |i| {
            println!("<c {i}>");
            0
        };
        // Parts of lines too: they are in the buffer when a fork comes.
        let done = storm(child, |n, i| if i % 3 == 0 { print!("<t{n} {i}> ") } else { println!("<t{n} {i}>") });
        drop(redirected);
        each_once(&capture, done);
    });
}

#[test]
fn eprintln_in_children_while_threads_print() {
    isolated("eprintln_in_children_while_threads_print", 240, || {
        let _guard = stdio::guard();
        let capture = Capture::new();
        let redirected = capture.on(2);
        // A word is one write: fd 2 has no buffer, and parts of it would mix with other processes'.
        let print = |word: String| eprintln!("{word}");
        let child = |i| {
            print(format!("<c {i}>"));
            0
        };
        let done = storm(child, |n, i| print(format!("<t{n} {i}>")));
        drop(redirected);
        each_once(&capture, done);
    });
}

#[test]
fn panics_in_children_while_threads_panic() {
    // Without backtraces std takes the same locks, and writes less.
    let setup = Setup { env: vec![("RUST_BACKTRACE".to_owned(), "0".to_owned())], ..Setup::default() };
    isolated_with("panics_in_children_while_threads_panic", 240, setup, || {
        let _guard = stdio::guard();
        let capture = Capture::new();
        let redirected = capture.on(2);
        let panics = || catch_unwind(|| panic!("on purpose")).is_err();
        let child = |_| {
            check(10, panics());
            eprintln!("child done");
            0
        };
        let done = storm(child, |_, _| assert!(panics()));
        drop(redirected);
        let text = capture.text();
        assert_eq!(text.matches("child done\n").count(), FORKS as usize);
        assert_eq!(text.matches("\non purpose\n").count() as u64, done.iter().sum::<u64>() + u64::from(FORKS));
    });
}

/// The forking thread's own copy could print even with the locks held: they are reentrant.
#[test]
fn threads_that_a_child_starts_print() {
    isolated("threads_that_a_child_starts_print", 60, || {
        let _guards = [stdio::guard(), stdio::guard()];
        let captures = [1, 2].map(|stream| (Capture::new(), stream));
        let redirected = captures.each_ref().map(|(capture, stream)| capture.on(*stream));
        let print = || {
            println!("<out>");
            eprintln!("<err>");
            panic!("<panic>");
        };
        for kind in BOTH {
            ends_well(kind.fork(|| i32::from(thread::spawn(print).join().is_ok())));
        }
        drop(redirected);
        let [out, err] = captures.map(|(capture, _)| capture.text());
        assert_eq!(out, "<out>\n<out>\n");
        assert_eq!((err.matches("<err>\n").count(), err.matches("<panic>\n").count()), (2, 2), "{err}");
    });
}

#[test]
fn the_panic_hook_from_before_runs_in_a_region() {
    isolated("the_panic_hook_from_before_runs_in_a_region", 60, || {
        static SEEN: AtomicU32 = AtomicU32::new(0);
        std::panic::set_hook(Box::new(|info| {
            assert_eq!(info.payload().downcast_ref::<&str>(), Some(&"once"));
            // Inside a region of its own.
            if let Err(ForkError::Forbidden { .. }) = drive::coordinated(|| 1) {
                SEEN.fetch_add(1, SeqCst);
            }
        }));
        // However often it is called, the hook is wrapped once.
        let guards = [(); 3].map(|()| stdio::guard());
        drop(guards);
        assert!(catch_unwind(|| panic!("once")).is_err());
        assert_eq!(SEEN.load(SeqCst), 1);
        ends_well(drive::coordinated(|| 0).expect("the region has ended"));
    });
}

// -- when it cannot be flushed

#[test]
fn a_full_pipe_is_said_and_nothing_comes_twice() {
    isolated("a_full_pipe_is_said_and_nothing_comes_twice", 60, || {
        let _guard = stdio::guard();
        let pipe = Pipe::new();
        let redirected = pipe.on(1);
        for (kind, flags) in BOTH.into_iter().zip([0, libc::FD_CLOEXEC]) {
            // SAFETY: numbers only.
            unsafe { libc::fcntl(1, libc::F_SETFD, flags) };
            pipe.fill();
            print!("<half>");
            let mut pid = 0;
            let said = stderr_of(|| {
                let before = common::self_fds();
                pid = kind.fork(|| {
                    // The stream is what it was, and nothing is left open.
                    check(20, common::self_fds().as_slice() == before.as_slice());
                    // SAFETY: numbers only.
                    check(21, unsafe { libc::fcntl(1, libc::F_GETFD) } == flags);
                    // The buffer is empty: this flush has nothing to wait for.
                    check(22, std::io::stdout().flush().is_ok());
                    0
                });
                ends_well(pid);
            });
            let expected = format!(
                "carefork: standard output could not be flushed before a fork: 6 bytes are left to the parent to \
                 write, and dropped in child {pid}\n"
            );
            assert_eq!(said, expected, "{kind:?}");
            assert_eq!(pipe.drain(), "");
            flush();
            assert_eq!(pipe.drain(), "<half>", "{kind:?}");
            // With nothing in the buffer there is nothing to say.
            pipe.fill();
            assert_eq!(stderr_of(|| ends_well(kind.fork(|| 0))), "");
            pipe.drain();
        }
        drop(redirected);
        assert_eq!(carefork::stats().dirty, 0);
    });
}

#[test]
fn without_descriptors_the_child_says_so() {
    isolated("without_descriptors_the_child_says_so", 60, || {
        let _guard = stdio::guard();
        let pipe = Pipe::new();
        let redirected = pipe.on(1);
        pipe.fill();
        print!("<half>");
        let limit = |n| {
            let limit = libc::rlimit { rlim_cur: n, rlim_max: 1024 };
            // SAFETY: the limit is ours, and the hard one is not passed.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
        };
        let said = stderr_of(|| {
            limit(3);
            let pid = Kind::Foreign.fork(|| 0);
            limit(1024);
            ends_well(pid);
        });
        assert!(said.contains("may be written twice"), "{said:?}");
        pipe.drain();
        drop(redirected);
        assert_eq!(pipe.drain(), "<half>");
    });
}

#[test]
fn a_socket_whose_peer_is_gone_ends_nobody() {
    isolated("a_socket_whose_peer_is_gone_ends_nobody", 30, || {
        let stdout = raw::aside(io::stdout().as_fd());
        // SAFETY: plain dispositions.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        let (ours, _) = std::os::unix::net::UnixStream::pair().expect("a pair");
        // SAFETY: this process's own stream, which is put back.
        unsafe { libc::dup2(ours.as_raw_fd(), 1) };
        let _guard = carefork::stdio::guard();
        print!("half a line");
        for kind in BOTH {
            ends_well(fork_without_end(kind, || 0));
        }
        // SAFETY: as above.
        unsafe { libc::dup2(stdout.as_raw_fd(), 1) };
    });
}

/// Nobody reads: a fork does not wait, nor end the process by SIGPIPE. Closed streams: there is nothing to say, or no place.
#[test]
fn broken_and_closed_streams() {
    isolated("broken_and_closed_streams", 60, || {
        let _guard = stdio::guard();
        // SAFETY: as every C program has it.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        let pipe = Pipe::new();
        let redirected = pipe.on(1);
        drop(pipe);
        print!("<nobody>");
        let fork_both = || {
            for kind in BOTH {
                ends_well(kind.fork(|| {
                    // The copy is gone: nothing is written.
                    flush();
                    i32::try_from(carefork::stats().unreported).expect("few")
                }));
            }
        };
        let said = stderr_of(fork_both);
        assert_eq!(said.matches(": 8 bytes are left to the parent").count(), 2, "{said:?}");
        let stderr = Capture::new().on(2);
        // SAFETY: numbers only; put back by `stderr`.
        unsafe { libc::close(2) };
        for kind in BOTH {
            ends_well(kind.fork(|| {
                check(30, carefork::stats().unreported == 1);
                eprintln!("lost, as anywhere");
                0
            }));
        }
        drop(stderr);
        let said = stderr_of(|| {
            // SAFETY: numbers only; put back by `redirected`.
            unsafe { libc::close(1) };
            fork_both();
        });
        assert_eq!(said, "");
        drop(redirected);
    });
}

// -- a thread that is stuck printing

/// Runs `f` while another thread is stuck printing a line into a full pipe, with standard output locked. That line comes
/// once, when the pipe is drained.
fn while_stuck(f: impl FnOnce(&Pipe)) {
    struct Drained<'a>(&'a Pipe);
    impl Drop for Drained<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.drain();
            }
        }
    }
    let pipe = Pipe::new();
    let redirected = pipe.on(1);
    pipe.fill();
    let tid = AtomicI32::new(0);
    let mut printed = String::new();
    thread::scope(|s| {
        // Where `f` panics: the scope waits for the printer.
        let _drained = Drained(&pipe);
        let printer = s.spawn(|| {
            tid.store(drive::gettid(), SeqCst);
            println!("<stuck>");
        });
        // Its system call and the first argument: a write to fd 1, which does not end.
        let writes = format!("{} 0x1 ", libc::SYS_write);
        until(|| {
            let call = std::fs::read_to_string(format!("/proc/self/task/{}/syscall", tid.load(SeqCst)));
            call.is_ok_and(|call| call.starts_with(&writes))
        });
        f(&pipe);
        printed += &pipe.drain();
        printer.join().expect("no panic");
    });
    printed += &pipe.drain();
    drop(redirected);
    assert_eq!(printed, "<stuck>\n");
}

/// Waits until the fork of that thread waits for standard output.
fn until_waiting(tid: &AtomicI32) {
    until(|| {
        let tid = tid.load(SeqCst);
        tid != 0 && stdio::waiting().is_some_and(|w| w.tid == tid as u32 && w.stream == Stream::Output)
    });
}

#[test]
fn a_stuck_printer_holds_up_forks_and_nothing_else() {
    isolated("a_stuck_printer_holds_up_forks_and_nothing_else", 60, || {
        let _guard = stdio::guard();
        freeze();
        for kind in BOTH {
            assert_eq!(stdio::waiting(), None);
            let tid = AtomicI32::new(0);
            thread::scope(|s| {
                while_stuck(|_| {
                    let forker = s.spawn(|| {
                        tid.store(drive::gettid(), SeqCst);
                        ends_well(fork_without_end(kind, || i32::from(stdio::waiting().is_some())));
                    });
                    until_waiting(&tid);
                    carefork::testing::advance(Duration::from_secs(3));
                    let waiting = stdio::waiting().expect("it waits still");
                    assert_eq!(waiting.waited, Duration::from_secs(3));
                    let said = format!("the fork of thread {} has waited 3s for standard output: ", waiting.tid);
                    assert!(waiting.to_string().starts_with(&said), "{waiting}");
                    // Regions begin, and standard error is nobody's: it comes second.
                    for _ in 0..20 {
                        drop(no_forking());
                        eprintln!("goes on");
                    }
                    assert!(!forker.is_finished(), "forked through a lock that is held");
                });
            });
        }
        assert_eq!((stdio::waiting(), carefork::stats().dirty, carefork::stats().refused), (None, 0, 0));
    });
}

/// As after a plain fork: of the two locks the stuck thread has the other one.
#[test]
fn a_dirty_child_prints_while_a_fork_waits_for_standard_error() {
    isolated("a_dirty_child_prints_while_a_fork_waits_for_standard_error", 60, || {
        let _guard = stdio::guard();
        carefork::set_foreign_budget(Some(Duration::ZERO));
        thread::scope(|s| {
            let held = std::io::stderr().lock();
            s.spawn(|| ends_well(fork_with_time()));
            until(|| stdio::waiting().is_some_and(|w| w.stream == Stream::Error));
            let dirty = drive::foreign(|| {
                check(1, carefork::lineage().dirty);
                drop(std::io::stdout().lock());
                0
            });
            let verdict = reap(dirty, SOON);
            drop(held);
            assert_eq!(verdict, Verdict::Exited(0));
        });
    });
}

fn fork_with_time() -> i32 {
    drive::fork_with(&ForkOptions::new().timeout_never(), || 0).expect("a child")
}

/// What a hook prints that prepares after the first of two guards comes once, too.
#[test]
fn a_hook_between_two_guards_prints() {
    isolated("a_hook_between_two_guards_prints", 60, || {
        let capture = Capture::new();
        let redirected = capture.on(1);
        // The newest prepares first.
        let _outer = stdio::guard();
        let _between =
            carefork::register(carefork::Hook::new("between").rank(i32::MAX).prepare(|| print!("<between>")));
        let _inner = stdio::guard();
        for kind in BOTH {
            ends_well(kind.fork(|| {
                flush();
                0
            }));
        }
        flush();
        drop(redirected);
        assert_eq!(capture.text(), "<between><between>");
    });
}

#[test]
fn a_fork_that_waits_for_standard_error_is_seen() {
    isolated("a_fork_that_waits_for_standard_error_is_seen", 60, || {
        let _guard = stdio::guard();
        for kind in BOTH {
            thread::scope(|s| {
                let held = std::io::stderr().lock();
                s.spawn(|| ends_well(fork_without_end(kind, || 0)));
                until(|| stdio::waiting().is_some_and(|w| w.stream == Stream::Error));
                drop(held);
            });
        }
        assert_eq!(stdio::waiting(), None);
    });
}

#[test]
fn forks_behind_a_stuck_one_name_it() {
    isolated("forks_behind_a_stuck_one_name_it", 60, || {
        let _guard = stdio::guard();
        let tid = AtomicI32::new(0);
        thread::scope(|s| {
            while_stuck(|pipe| {
                s.spawn(|| {
                    tid.store(drive::gettid(), SeqCst);
                    ends_well(fork_without_end(Kind::Coordinated, || 0));
                });
                until_waiting(&tid);
                let stuck = tid.load(SeqCst);
                let _clock = run_clock(20 * MS);
                let error = drive::coordinated(|| 1).expect_err("the other fork is not over");
                let said = error.to_string();
                let ForkError::Busy { culprits } = error else { panic!("{error:?}") };
                assert!(culprits.queue && culprits.hook.is_none());
                let waiting = culprits.waiting.expect("the fork that is in the way");
                assert_eq!((waiting.tid, waiting.stream), (stuck as u32, Stream::Output));
                assert!(said.contains(&format!("fork of thread {stuck} has waited ")), "{said}");
                // The child is no place for the parent's other forks.
                let child = || i32::from(stdio::waiting().is_some() || !carefork::lineage().dirty);
                let said = stderr_of(|| ends_well(drive::foreign(child)));
                let line = format!(": a fork of thread {stuck} has waited for standard output for ");
                assert!(said.contains(&line) && said.ends_with("is stuck printing\n"), "{said:?}");
                assert_eq!(said.lines().count(), 1, "{said:?}");
                // Where fd 2 is stuck too, nothing waits for it.
                let stderr = pipe.on(2);
                ends_well(drive::foreign(child));
                drop(stderr);
                assert_eq!((carefork::stats().dirty, carefork::stats().unreported), (2, 1));
            });
        });
        assert_eq!(stdio::waiting(), None);
    });
}

/// A fork that got its stream after the end of its budget, with the gate reopened meanwhile.
#[test]
fn a_fork_that_was_stuck_past_its_budget_names_the_hook() {
    isolated("a_fork_that_was_stuck_past_its_budget_names_the_hook", 60, || {
        let _guard = stdio::guard();
        freeze();
        let tid = AtomicI32::new(0);
        thread::scope(|s| {
            let mut forker = None;
            while_stuck(|_| {
                forker = Some(s.spawn(|| {
                    tid.store(drive::gettid(), SeqCst);
                    drive::coordinated(|| 1)
                }));
                until_waiting(&tid);
                carefork::testing::advance(Duration::from_secs(2));
                drop(no_forking());
            });
            let end = forker.expect("begun").join().expect("no panic");
            let Err(ForkError::Busy { culprits }) = end else { panic!("{end:?}") };
            assert_eq!((culprits.hook, culprits.queue), (Some("std's standard streams"), false));
            assert_eq!((culprits.waiting, culprits.count), (None, 0));
        });
        assert!(drive::no_child_left());
        // The streams were given back.
        thread::spawn(|| println!("free")).join().expect("no panic");
        ends_well(Kind::Coordinated.fork(|| 0));
    });
}

// -- the registration

#[test]
fn a_dropped_guard_takes_no_locks() {
    isolated("a_dropped_guard_takes_no_locks", 60, || {
        drop(stdio::guard());
        while_stuck(|_| {
            for kind in BOTH {
                ends_well(kind.fork(|| 0));
            }
        });
    });
}

/// The forking thread may hold both locks itself: they are reentrant.
#[test]
fn the_forking_thread_may_hold_the_streams() {
    isolated("the_forking_thread_may_hold_the_streams", 60, || {
        let _guard = stdio::guard();
        let capture = Capture::new();
        let redirected = capture.on(1);
        {
            let mut out = std::io::stdout().lock();
            let _err = std::io::stderr().lock();
            for (i, kind) in BOTH.into_iter().enumerate() {
                write!(out, "<before {i}>").expect("written");
                ends_well(kind.fork(|| {
                    check(40, write!(out, "<child {i}>").and_then(|()| out.flush()).is_ok());
                    0
                }));
            }
        }
        drop(redirected);
        assert!(capture.words().values().all(|n| *n == 1) && capture.words().len() == 4, "{}", capture.text());
        // Another thread gets them.
        thread::spawn(|| print!("")).join().expect("no panic");
    });
}

#[test]
fn nothing_is_allocated() {
    isolated("nothing_is_allocated", 60, || {
        let _guard = stdio::guard();
        let pipe = Pipe::new();
        let redirected = pipe.on(1);
        // The first time on this thread, with room, and without.
        thread::scope(|s| {
            s.spawn(|| {
                print!("<room>");
                ends_well(ForkGuardAlloc::armed(|| Kind::Foreign.fork(|| i32::from(stdio::waiting().is_some()))));
            });
        });
        assert_eq!(pipe.drain(), "<room>");
        pipe.fill();
        print!("<none>");
        ends_well(ForkGuardAlloc::armed(|| Kind::Foreign.fork(|| 0)));
        pipe.drain();
        drop(redirected);
        assert_eq!(pipe.drain(), "<none>");
    });
}
