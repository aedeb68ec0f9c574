//! `flush`, and what is written when a process, a logger or a thread ends.

use crate::common::{Verdict, isolated, raw, reap};
use crate::drive::{self, BOTH, Kind, SOON};
use crate::logs::{Scratch, by_pid, noexec, numbers, standard_error_to};
use crate::{By, drained, ends_well, full_pipe, in_both, log_by, numbered};
use carefork::log::{self, Builder, Logger, Output, WhenFull};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};
use std::thread;

/// Killed at any moment: each record at most once, in order, and all that `flush` answered for.
#[test]
fn killed() {
    isolated("ends::killed", 200, || {
        for round in 0..200 {
            let file = Scratch::new(&format!("killed-{round}"));
            let shared = shared::<AtomicU64>();
            let background = round % 4;
            let pid = noexec(BOTH[round % 2], || {
                let builder = Builder::new().output(Output::file(&file.0).expect("a file"));
                let builder = match background {
                    0 => builder,
                    1 => builder.background(1),
                    2 => builder.background(64),
                    _ => builder.background(8).when_full(WhenFull::GrowTo(100_000)),
                };
                let logger = builder.init().expect("the first logger");
                for n in 0.. {
                    ::log::info!(target: "storm", "record 0 {n}");
                    if n % 50 == 49 {
                        logger.flush();
                        shared.store(n + 1, SeqCst);
                    }
                }
                0
            });
            drive::until(|| shared.load(SeqCst) > 50 * (round as u64 % 7));
            // SAFETY: our own child.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            assert_eq!(reap(pid, SOON), Verdict::Signaled(libc::SIGKILL));
            let text = file.text();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let found: Vec<u64> = whole.lines().map(|line| numbers(line, "record").expect("a record").1).collect();
            assert!(found.iter().enumerate().all(|(at, &n)| at as u64 == n), "round {round}: lost or doubled");
            assert!(found.len() as u64 >= shared.load(SeqCst), "round {round}: flush had answered for more");
        }
    });
}

/// Zeroes that a child shares. Its type has no value that zeroes are not.
fn shared<T>() -> &'static T {
    let (read_write, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<T>(), read_write, kind, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    // SAFETY: zeroed bytes, which are values of the types it is used for, on a page that is never unmapped.
    unsafe { &*page.cast() }
}

/// Not before the thread has written what it took out of the queue.
#[test]
fn flush_waits_for_what_the_thread_has_in_its_hands() {
    isolated("ends::flush_waits_for_what_the_thread_has_in_its_hands", 60, || {
        let (mut from, to) = full_pipe();
        let logger = Builder::new().output(Output::fd(to).expect("a pipe")).background(8).build();
        log_by(&logger, "record 0 0");
        // The thread is stuck with the first; the second fills a page of the pipe by itself.
        drive::a_while();
        log_by(&logger, &"x".repeat(libc::PIPE_BUF - 150));
        let flushing = thread::spawn({
            let logger = logger.clone();
            move || logger.flush()
        });
        drive::a_while();
        // Room for the first.
        from.read_exact(&mut [0; libc::PIPE_BUF]).expect("a page");
        drive::a_while();
        assert!(!flushing.is_finished(), "flush answered while the second record was not written");
        let reader = drained(from);
        flushing.join().expect("no panic");
        drop(logger);
        let text = reader.join().expect("no panic");
        assert_eq!(text.lines().count(), 2);
    });
}

/// The end of the process by exit(3), and of a child of `spawn`, writes what is queued.
#[test]
fn an_orderly_end_writes_what_is_queued() {
    isolated("ends::an_orderly_end_writes_what_is_queued", 60, || {
        let (by_exit, by_spawn) = (Scratch::new("exit"), Scratch::new("spawn"));
        let lines = 500;
        let logger = Builder::new().background(1000).init().expect("the first logger");
        for kind in BOTH {
            ends_well(noexec(kind, || {
                log::set_output(Output::file(&by_exit.0).expect("a file")).expect("a logger");
                (0..lines).for_each(|n| ::log::info!(target: "storm", "record 0 {n}"));
                std::process::exit(0)
            }));
            assert_eq!(numbered(&by_exit.text()), (0..lines).collect::<Vec<_>>());
            std::fs::remove_file(&by_exit.0).expect("it was there");
        }
        let to = by_spawn.0.clone();
        // SAFETY: the child uses what is the log's only.
        let child = unsafe {
            carefork::spawn(move || {
                log::set_output(Output::file(to).expect("a file")).expect("a logger");
                (0..lines).for_each(|n| ::log::info!(target: "storm", "record 0 {n}"));
                0
            })
        };
        assert!(child.expect("a child").wait().expect("a status").success());
        assert_eq!(numbered(&by_spawn.text()), (0..lines).collect::<Vec<_>>());
        // A child that has nothing of its own has nothing to wait for, though its parent's queue is not empty.
        drop(logger);
    });
}

/// What a writer has in its buffer too, with no thread behind it: by exit(3), by the end of a child of `spawn`; each writes what is its own.
#[test]
fn an_orderly_end_flushes_a_writer() {
    isolated("ends::an_orderly_end_flushes_a_writer", 60, || {
        let (file, own) = (Scratch::new("writer"), Scratch::new("own"));
        let buffered = |to: &Scratch| Output::writer(std::io::BufWriter::new(to.append()));
        // In a process of its own, whose end can be waited for.
        ends_well(noexec(Kind::Foreign, || {
            Builder::new().output(buffered(&file)).init().expect("the first logger");
            ::log::info!(target: "storm", "record 0 0");
            ends_well(noexec(Kind::Foreign, || std::process::exit(0)));
            std::process::exit(i32::from(!file.text().is_empty()))
        }));
        assert_eq!(numbered(&file.text()), [0]);

        Builder::new().output(Output::file(&file.0).expect("a file")).init().expect("the first logger here");
        ends_well(noexec(Kind::Foreign, || {
            log::set_output(buffered(&own)).expect("a logger");
            ::log::info!(target: "storm", "record 0 1");
            std::process::exit(0)
        }));
        assert_eq!(numbered(&own.text()), [1], "turned to a writer in a child that ends by exit(3)");
        let to = own.append();
        // SAFETY: the child uses what is the log's only.
        let child = unsafe {
            carefork::spawn(move || {
                log::set_output(Output::writer(std::io::BufWriter::new(to))).expect("a logger");
                ::log::info!(target: "storm", "record 0 2");
                0
            })
        };
        assert!(child.expect("a child").wait().expect("a status").success());
        assert_eq!(numbered(&own.text()), [1, 2], "turned to a writer in a child of spawn");
    });
}

/// What is logged after the logger's own atexit handler has run, by a handler that was registered before it.
#[test]
fn the_last_words_of_a_process_are_written() {
    extern "C" fn last() {
        ::log::info!(target: "storm", "record 0 1");
        ::log::info!(target: "storm", "record 0 2");
    }
    isolated("ends::the_last_words_of_a_process_are_written", 30, || {
        for (background, when_full) in [(None, WhenFull::Block), (Some(8), WhenFull::Block), (Some(8), WhenFull::Drop)]
        {
            let file = Scratch::new("last");
            ends_well(noexec(Kind::Foreign, || {
                // SAFETY: a handler that logs.
                unsafe { libc::atexit(last) };
                let mut to = file.append();
                // So slow that the process would be gone.
                let slow = By(move |bytes: &[u8]| {
                    drive::a_while();
                    to.write(bytes)
                });
                let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
                let output = Output::writer(std::io::BufWriter::new(slow));
                builder.output(output).when_full(when_full).init().expect("the first logger");
                ::log::info!(target: "storm", "record 0 0");
                std::process::exit(0)
            }));
            let text = file.text();
            assert_eq!(numbered(&text), [0, 1, 2]);
            // Though its thread-locals are gone.
            assert_eq!(text.matches("[ends::the_last_words").count(), 3, "{text}");
        }
    });
}

/// A logger that was not installed writes what is queued when its last handle goes.
#[test]
fn dropping_a_logger_writes_what_is_queued() {
    isolated("ends::dropping_a_logger_writes_what_is_queued", 60, || {
        let file = Scratch::new("dropped");
        let logger = Builder::new().output(Output::file(&file.0).expect("a file")).background(100).build();
        log_by(&logger, "record 0 0");
        // The child's copy: dropping it is no business of the parent's queue.
        let mut here = Some(logger);
        in_both(|| {
            // SAFETY: this child's own copy of the handle, taken once.
            let copy = unsafe { std::ptr::read(&raw const here) };
            drop(copy);
            0
        });
        drop(here.take());
        assert_eq!(numbered(&file.text()), [0]);
    });
}

/// The last words of a thread, when its buffer is gone.
#[test]
fn a_thread_local_may_log_when_it_is_dropped() {
    struct Last(Logger);
    impl Drop for Last {
        fn drop(&mut self) {
            log_by(&self.0, "record 0 1");
        }
    }
    thread_local!(static LAST: std::cell::RefCell<Option<Last>> = const { std::cell::RefCell::new(None) });
    let file = Scratch::new("last");
    let logger = Builder::new().output(Output::file(&file.0).expect("a file")).build();
    let theirs = logger.clone();
    let body = move || {
        LAST.set(Some(Last(theirs.clone())));
        log_by(&theirs, "record 0 0");
    };
    thread::spawn(body).join().expect("no panic");
    assert_eq!(numbered(&file.text()), [0, 1]);
}

/// A destructor of pthread_setspecific's, which runs when Rust's thread-locals are gone: on a thread that has logged before, and on one that has not.
#[test]
fn a_key_of_pthreads_may_log_at_its_threads_end() {
    extern "C" fn last(_: *mut libc::c_void) {
        (1..10).for_each(|n| ::log::info!(target: "storm", "record 0 {n}"));
    }
    isolated("ends::a_key_of_pthreads_may_log_at_its_threads_end", 30, || {
        for (before, background) in [(true, None), (false, None), (true, Some(1)), (false, Some(1))] {
            let file = Scratch::new("key");
            ends_well(noexec(Kind::Foreign, || {
                let mut to = file.append();
                let output = Output::writer(By(move |bytes: &[u8]| to.write(bytes)));
                let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
                let logger = builder.output(output).init().expect("the first logger");
                let mut key = 0;
                // SAFETY: `key` is live, the destructor logs.
                assert_eq!(unsafe { libc::pthread_key_create(&raw mut key, Some(last)) }, 0);
                let body = move || {
                    if before {
                        ::log::info!(target: "storm", "record 0 0");
                    }
                    // SAFETY: never dereferenced.
                    assert_eq!(unsafe { libc::pthread_setspecific(key, std::ptr::dangling()) }, 0);
                };
                thread::Builder::new()
                    .name("named".to_owned())
                    .spawn(body)
                    .expect("a thread")
                    .join()
                    .expect("no panic");
                logger.flush();
                0
            }));
            let text = file.text();
            // They do not wait for what is queued.
            let mut found = numbered(&text);
            found.sort_unstable();
            assert_eq!(found, (u64::from(!before)..10).collect::<Vec<_>>());
            assert_eq!((text.matches("[named] ").count(), text.matches("[tid ").count()), (usize::from(before), 9));
        }
    });
}

/// What processes say to each other.
struct Shared {
    flushed: AtomicU64,
    /// The child, once it is there.
    child: AtomicI32,
    killed: AtomicBool,
}

/// Logs and flushes now and then, with a thread that logs beside it; forks after some of it, and goes on until it is killed.
fn parent(kind: Kind, file: &Scratch, own: &Scratch, round: usize, shared: &Shared) -> i32 {
    let builder = Builder::new().output(Output::file(&file.0).expect("a file"));
    let logger = match round / 2 % 4 {
        0 => builder.build(),
        1 => builder.background(1).build(),
        2 => builder.background(64).build(),
        _ => builder.background(8).when_full(WhenFull::GrowTo(100_000)).build(),
    };
    let fork_at = 60 + 10 * (round as u64 % 7);
    thread::scope(|s| {
        // Its record, or its wait for room in the queue, is what a fork finds in the middle.
        let beside = logger.clone();
        s.spawn(move || {
            for n in 0.. {
                log_by(&beside, &format!("record 1 {n}"));
            }
        });
        for n in 0.. {
            log_by(&logger, &format!("record 0 {n}"));
            if n % 50 == 49 {
                logger.flush();
                shared.flushed.store(n + 1, SeqCst);
            }
            if n == fork_at {
                noexec(kind, || child(&logger, own, shared));
            }
        }
    });
    1
}

/// Logs while its parent lives, and when it is dead: to fd 2, then to a file of its own.
fn child(logger: &Logger, own: &Scratch, shared: &Shared) -> i32 {
    (0..20).for_each(|n| log_by(logger, &format!("child 0 {n}")));
    shared.child.store(raw::getpid(), SeqCst);
    drive::until(|| shared.killed.load(SeqCst));
    (20..40).for_each(|n| log_by(logger, &format!("child 0 {n}")));
    logger.flush();
    logger.set_output(Output::file(&own.0).expect("a file"));
    (0..40).for_each(|n| log_by(logger, &format!("child 0 {n}")));
    logger.flush();
    0
}

#[test]
fn a_parent_is_killed_right_after_a_fork_and_its_child_logs_on() {
    isolated("ends::a_parent_is_killed_right_after_a_fork_and_its_child_logs_on", 200, || {
        // Orphans come to this process.
        // SAFETY: this option takes a number.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, 0);
        for round in 0..80 {
            let (file, error, own) = (Scratch::new("killed"), Scratch::new("error"), Scratch::new("own"));
            let redirected = standard_error_to(&error);
            let (shared, kind) = (shared::<Shared>(), BOTH[round % 2]);
            let pid = noexec(Kind::Foreign, || parent(kind, &file, &own, round, shared));
            drive::until(|| shared.child.load(SeqCst) != 0);
            // SAFETY: our own child.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            assert_eq!(reap(pid, SOON), Verdict::Signaled(libc::SIGKILL));
            let text = file.text();
            shared.killed.store(true, SeqCst);
            ends_well(shared.child.load(SeqCst));
            drop(redirected);

            assert_eq!(file.text(), text, "round {round}: the child wrote its parent's records");
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let mut next = [0; 2];
            for line in whole.lines() {
                let (thread, n) = numbers(line, "storm: record").expect("a record of the parent's");
                assert_eq!(n, next[thread], "round {round}: lost, doubled or out of order");
                next[thread] += 1;
            }
            assert!(next[0] >= shared.flushed.load(SeqCst), "round {round}: flush had answered for more than {next:?}");
            for text in [error.text(), own.text()] {
                let found: Vec<u64> = text
                    .lines()
                    .map(|line| numbers(line, "storm: child").expect("a record of the child's").1)
                    .collect();
                assert_eq!(found, (0..40).collect::<Vec<_>>(), "round {round}");
                assert_eq!(by_pid(&text).into_keys().collect::<Vec<_>>(), [shared.child.load(SeqCst) as u32]);
            }
        }
    });
}
