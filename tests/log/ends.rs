//! `flush`, and what is written when a process, a logger or a thread ends.

use crate::common::{Verdict, isolated, reap};
use crate::drive::{self, BOTH, Kind, SOON};
use crate::logs::{Scratch, noexec, numbers};
use crate::{By, drained, ends_well, full_pipe, in_both, log_by, numbered};
use carefork::log::{self, Builder, Logger, Output, WhenFull};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;

/// Killed at any moment: each record at most once, in order, and all that `flush` answered for.
#[test]
fn killed() {
    isolated("ends::killed", 200, || {
        for round in 0..200 {
            let file = Scratch::new(&format!("killed-{round}"));
            let shared = shared();
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

fn shared() -> &'static AtomicU64 {
    let (read_write, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 8, read_write, kind, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    // SAFETY: eight zeroed bytes at the start of a page that is never unmapped.
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
            assert_eq!(numbered(&file.text()), [0, 1, 2]);
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
