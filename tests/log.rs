//! The log across forks: each record once, where its process writes, whole (B1, B3).

// Forks, and signals sent to children.
#![allow(unsafe_code, clippy::disallowed_methods, clippy::mem_forget, clippy::expect_used)]

mod common;
mod drive;
mod logs;

use carefork::log::{self, Builder, Logger, Output, WhenFull};
use common::{Verdict, check, isolated, isolated_with, reap, thread_count};
use drive::{BOTH, Kind, SOON};
use logs::{Scratch, assert_each_once, by_pid, fork_then, noexec, numbers, standard_error_to, storm, storm_of};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const FORKS: u32 = 5000;

#[track_caller]
fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// A fork of each kind, one after the other; the children clean up.
#[track_caller]
fn in_both(f: impl Fn() -> i32) {
    for kind in BOTH {
        ends_well(noexec(kind, &f));
    }
}

/// A line of ours: time, level, thread, target, all of them well-formed.
#[track_caller]
fn assert_whole(line: &str) {
    let mut parts = line.splitn(3, ' ');
    let stamp = parts.next().expect("split finds one");
    let parsed: Result<jiff::Timestamp, _> = stamp.parse();
    assert!(parsed.is_ok() && stamp.len() == "2026-11-21T07:03:12.345678+01:00".len(), "{line:?}");
    assert_eq!(parts.next(), Some("INFO"), "{line:?}");
    let rest = parts.next().expect("more than that").trim_start();
    assert!(rest.starts_with('['), "{line:?}");
    assert!(rest.contains("] storm: "), "{line:?}");
}

// -- once, in order, on the right side

/// Half of the children log: before a clean-up, after it, into a file of their own.
fn each_record_once(builder: Builder) {
    let (file, error, own) = (Scratch::new("parent"), Scratch::new("error"), Scratch::new("own"));
    let _redirected = standard_error_to(&error);
    let logger = builder.output(Output::file(&file.0).expect("a file")).init().expect("the first logger");
    let record = |thread: usize, number: u64| ::log::info!(target: "storm", "record {thread} {number}");
    let mut wrote = [0, 0];
    let made = storm_of(FORKS, &record, |i| {
        let role = i / 2 % 6;
        let (to_error, to_own) = match role {
            0 => (2, 0),
            1 => (3, 0),
            2 => (1, 1),
            _ => (0, 0),
        };
        wrote[0] += to_error;
        wrote[1] += to_own;
        fork_then(BOTH[i as usize % 2], role != 1, || {
            for n in 0..to_error {
                ::log::info!(target: "storm", "child {i} {n}");
            }
            if to_own > 0 {
                log::set_output(Output::file(&own.0).expect("a file")).expect("a logger");
                ::log::info!(target: "storm", "child {i} own");
                ::log::logger().flush();
            }
            0
        })
    });
    logger.flush();
    let text = file.text();
    text.lines().for_each(assert_whole);
    assert!(!text.contains("pid") && !text.contains("child"), "a child wrote into the parent's file");
    assert_each_once(&text, &made, |line| Some(numbers(line, "record").expect("a record")));
    for (scratch, lines) in [(&error, wrote[0]), (&own, wrote[1])] {
        let text = scratch.text();
        assert_eq!(text.lines().count(), lines, "{text}");
        text.lines().for_each(assert_whole);
        // Each child's are there once, in order, with its pid. (Pids come round again in so many forks.)
        let mut seen: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
        for line in text.lines() {
            let pid = line.split_once("[pid ").expect("a pid").1.split(' ').next().expect("split finds one");
            let (child, what) = line.split_once(" child ").expect("a child's").1.split_once(' ').expect("two");
            seen.entry(child).or_default().push((pid, what));
        }
        for (child, lines) in seen {
            assert!(lines.iter().all(|(pid, _)| *pid == lines[0].0), "child {child}: {lines:?}");
            let order: Vec<_> = lines.iter().map(|(_, what)| *what).collect();
            assert!(
                [&["0", "1", "2"][..], &["0", "1"], &["0"], &["own"]].contains(&&order[..]),
                "child {child}: {lines:?}"
            );
        }
    }
}

#[test]
fn each_record_once_with_no_thread() {
    isolated("each_record_once_with_no_thread", 400, || each_record_once(Builder::new()));
}

#[test]
fn each_record_once_in_the_background() {
    isolated("each_record_once_in_the_background", 400, || each_record_once(Builder::new().background(64)));
}

#[test]
fn each_record_once_through_a_queue_of_one() {
    isolated("each_record_once_through_a_queue_of_one", 400, || each_record_once(Builder::new().background(1)));
}

/// Fills a pipe to the brim, so that the next write sleeps.
fn full_pipe() -> (io::PipeReader, io::PipeWriter) {
    let (from, mut to) = io::pipe().expect("a pipe");
    let blocking = |fd: i32, on: bool| {
        // SAFETY: flags of a pipe of ours.
        unsafe { libc::fcntl(fd, libc::F_SETFL, if on { 0 } else { libc::O_NONBLOCK }) };
    };
    blocking(to.as_raw_fd(), false);
    while to.write(&[b'-'; 4096]).is_ok() {}
    blocking(to.as_raw_fd(), true);
    (from, to)
}

/// Reads what is there after the filling, until the last writer is gone.
fn drained(mut from: io::PipeReader) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        from.read_to_string(&mut text).expect("text");
        text.trim_start_matches('-').to_owned()
    })
}

/// More than a queue and the thread's hands hold.
const RECORDS: u64 = 300;

/// The thread stuck in a write, the queue full, and some records waiting outside: forks go on, and every record is the parent's.
fn stuck(when_full: WhenFull, capacity: usize) -> (String, String) {
    let error = Scratch::new("error");
    let _redirected = standard_error_to(&error);
    let (from, to) = full_pipe();
    let output = Output::fd(to).expect("a pipe");
    let logger = Builder::new().output(output).background(capacity).when_full(when_full).build();
    let log = |logger: &Logger, n: u64| {
        let arguments = format_args!("record 0 {n}");
        ::log::Log::log(
            logger,
            &::log::Record::builder().level(::log::Level::Info).target("storm").args(arguments).build(),
        );
    };
    // Until this thread would have to wait, some of them taken by the thread and in its hands.
    let logging = thread::spawn({
        let logger = logger.clone();
        move || (0..RECORDS).for_each(|n| log(&logger, n))
    });
    if when_full == WhenFull::Block {
        drive::a_while();
        assert!(!logging.is_finished(), "there was room for all");
    } else {
        drive::until(|| logging.is_finished());
    }
    for i in 0..40 {
        ends_well(noexec(BOTH[i % 2], || {
            // The parent's queue is not this process's to wait for, before its first record and after.
            logger.flush();
            log(&logger, 1000);
            logger.flush();
            0
        }));
    }
    let reader = drained(from);
    logging.join().expect("no panic");
    logger.flush();
    drop(logger);
    (reader.join().expect("no panic"), error.text())
}

fn numbered(text: &str) -> Vec<u64> {
    let lines = text.lines().filter(|line| !line.contains(" lost: "));
    lines.map(|line| numbers(line, "record").expect("a record").1).collect()
}

/// How many records the lines of the log's own say were lost.
fn lost(text: &str) -> u64 {
    let told = text.lines().filter_map(|line| line.split_once("carefork::log: ")?.1.split_once(" record"));
    told.map(|(n, _)| n.parse::<u64>().expect("a number")).sum()
}

fn assert_children_on(error: &str) {
    let found = by_pid(error);
    assert_eq!((found.len(), error.lines().count()), (40, 40), "{error}");
}

#[test]
fn a_full_queue_that_blocks_loses_nothing_at_a_fork() {
    isolated("a_full_queue_that_blocks_loses_nothing_at_a_fork", 60, || {
        // The second queue holds more than goes into a pipe at once.
        for capacity in [8, 90] {
            let (text, error) = stuck(WhenFull::Block, capacity);
            assert_eq!(numbered(&text), (0..RECORDS).collect::<Vec<_>>());
            assert_children_on(&error);
        }
    });
}

#[test]
fn a_full_queue_that_drops_says_how_many() {
    isolated("a_full_queue_that_drops_says_how_many", 60, || {
        let (text, error) = stuck(WhenFull::Drop, 8);
        let written = numbered(&text);
        assert!(written.is_sorted() && written.len() >= 8 && (written.len() as u64) < RECORDS, "{written:?}");
        assert_eq!(written.len() as u64 + lost(&text), RECORDS);
        assert_children_on(&error);
    });
}

#[test]
fn a_queue_grows_to_its_bound() {
    isolated("a_queue_grows_to_its_bound", 60, || {
        let (text, error) = stuck(WhenFull::GrowTo(50), 8);
        let written = numbered(&text);
        // What the thread has in its hands is in the queue no more.
        assert!(written.starts_with(&(0..50).collect::<Vec<_>>()) && (written.len() as u64) < RECORDS, "{written:?}");
        assert_eq!(written.len() as u64 + lost(&text), RECORDS);
        assert_children_on(&error);
    });
}

/// Without a thread behind it, too: whoever logs waits in the kernel, in no region.
#[test]
fn a_thread_stuck_in_a_full_pipe_holds_up_no_fork() {
    isolated("a_thread_stuck_in_a_full_pipe_holds_up_no_fork", 60, || {
        let (from, to) = full_pipe();
        let logger = Builder::new().output(Output::fd(to).expect("a pipe")).init().expect("the first logger");
        let stuck = thread::spawn(|| ::log::info!(target: "storm", "record 0 0"));
        drive::a_while();
        assert!(!stuck.is_finished());
        drive::freeze();
        for kind in BOTH {
            ends_well(kind.fork(|| 0));
        }
        let reader = drained(from);
        stuck.join().expect("no panic");
        logger.set_output(Output::stderr());
        assert_eq!(numbered(&reader.join().expect("no panic")), [0]);
    });
}

// -- the end

/// Killed at any moment: each record at most once, in order, and all that `flush` answered for.
#[test]
fn killed() {
    isolated("killed", 200, || {
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
    isolated("flush_waits_for_what_the_thread_has_in_its_hands", 60, || {
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
    isolated("an_orderly_end_writes_what_is_queued", 60, || {
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

/// A logger that was not installed writes what is queued when its last handle goes.
#[test]
fn dropping_a_logger_writes_what_is_queued() {
    isolated("dropping_a_logger_writes_what_is_queued", 60, || {
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

fn log_by(logger: &Logger, message: &str) {
    let builder = &mut ::log::Record::builder();
    let arguments = format_args!("{message}");
    ::log::Log::log(logger, &builder.level(::log::Level::Info).target("storm").args(arguments).build());
}

// -- what a child keeps

#[test]
fn a_child_keeps_levels_and_filters_and_goes_to_fd_2() {
    isolated("a_child_keeps_levels_and_filters_and_goes_to_fd_2", 60, || {
        let (file, error) = (Scratch::new("parent"), Scratch::new("error"));
        let _redirected = standard_error_to(&error);
        let builder = Builder::new().filters("warn,net=debug,net::http=off").expect("filters");
        builder.output(Output::file(&file.0).expect("a file")).init().expect("the first logger");
        let all = |who: &str| {
            ::log::info!(target: "app", "{who} no");
            ::log::warn!(target: "app", "{who} yes");
            ::log::debug!(target: "net", "{who} yes");
            ::log::trace!(target: "net", "{who} no");
            ::log::error!(target: "net::http", "{who} no");
        };
        all("parent");
        in_both(|| {
            all("child");
            ends_well(noexec(Kind::Coordinated, || {
                all("grandchild");
                0
            }));
            0
        });
        all("parent");
        let text = file.text();
        assert_eq!(text.lines().filter(|l| l.ends_with("parent yes")).count(), 4, "{text}");
        assert_eq!(text.lines().count(), 4);
        let text = error.text();
        assert!(!text.contains(" no\n") && text.lines().count() == 8, "{text}");
        let found = by_pid(&text);
        assert_eq!(found.len(), 4, "children and grandchildren by their own pids: {text}");
        assert!(found.values().all(|lines| lines.len() == 2));
    });
}

#[test]
fn a_child_points_the_log_at_a_file_of_its_own_and_its_child_goes_to_fd_2() {
    isolated("a_child_points_the_log_at_a_file_of_its_own_and_its_child_goes_to_fd_2", 60, || {
        for background in [None, Some(16)] {
            let (file, error, own) = (Scratch::new("parent"), Scratch::new("error"), Scratch::new("own"));
            let _redirected = standard_error_to(&error);
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(Output::file(&file.0).expect("a file")).build();
            log_by(&logger, "parent 0 0");
            in_both(|| {
                log_by(&logger, "child 0 0");
                logger.set_output(Output::file(&own.0).expect("a file"));
                log_by(&logger, "child 0 1");
                in_both(|| {
                    log_by(&logger, "grandchild 0 0");
                    0
                });
                log_by(&logger, "child 0 2");
                logger.flush();
                0
            });
            log_by(&logger, "parent 0 1");
            logger.flush();
            let ends = |text: String| {
                text.lines().map(|l| l.rsplit("storm: ").next().expect("one").to_owned()).collect::<Vec<_>>()
            };
            assert_eq!(ends(file.text()), ["parent 0 0", "parent 0 1"]);
            assert_eq!(ends(own.text()), ["child 0 1", "child 0 2"].repeat(2));
            assert_eq!(ends(error.text()), ["child 0 0", "grandchild 0 0", "grandchild 0 0"].repeat(2));
            assert_eq!(by_pid(&error.text()).len(), 6);
        }
    });
}

/// Pointed at a file before its clean-up: the file is the child's own, and stays.
#[test]
fn a_file_set_before_the_clean_up_stays() {
    isolated("a_file_set_before_the_clean_up_stays", 60, || {
        let (error, own) = (Scratch::new("error"), Scratch::new("own"));
        let _redirected = standard_error_to(&error);
        let logger = Builder::new().build();
        ends_well(fork_then(Kind::Foreign, false, || {
            logger.set_output(Output::file(&own.0).expect("a file"));
            log_by(&logger, "record 0 0");
            // SAFETY: this is a child, and the log looks before it writes.
            unsafe { carefork::postfork_child_noexec() }.expect("a child");
            log_by(&logger, "record 0 1");
            0
        }));
        assert_eq!((numbered(&own.text()), numbered(&error.text())), (vec![0, 1], vec![]));
    });
}

#[test]
fn the_thread_comes_back_in_a_child_when_it_is_first_needed() {
    isolated("the_thread_comes_back_in_a_child_when_it_is_first_needed", 60, || {
        let (error, own) = (Scratch::new("error"), Scratch::new("own"));
        let _redirected = standard_error_to(&error);
        let before = thread_count();
        let logger = Builder::new().background(16).build();
        assert_eq!(thread_count(), before, "nothing was logged yet");
        log_by(&logger, "record 0 0");
        assert_eq!(thread_count(), before + 1);
        logger.flush();
        in_both(|| {
            check(1, thread_count() == 1);
            log_by(&logger, "record 0 0");
            logger.flush();
            check(2, thread_count() == 1);
            logger.set_output(Output::file(&own.0).expect("a file"));
            check(3, thread_count() == 1);
            log_by(&logger, "record 0 0");
            check(4, thread_count() == 2);
            logger.flush();
            0
        });
        assert_eq!(thread_count(), before + 1);
        assert_eq!(numbered(&own.text()), [0, 0]);
    });
}

/// `TZ` is read once, before any fork, and by no libc function: children log right while the parent's threads are in `localtime_r`.
#[test]
fn time_stamps_are_right_in_a_child_and_take_no_libc_lock() {
    let mut setup = common::Setup::default();
    setup.env.push(("TZ".into(), "Asia/Kathmandu".into()));
    isolated_with("time_stamps_are_right_in_a_child_and_take_no_libc_lock", 240, setup, || {
        let error = Scratch::new("error");
        let _redirected = standard_error_to(&error);
        let logger = Builder::new().init().expect("the first logger");
        // To the microsecond, as they are written.
        let begun = jiff::Timestamp::now() - Duration::from_micros(1);
        let made = storm(
            2000,
            |_, n| {
                let (time, mut broken_down) = (n as libc::time_t, std::mem::MaybeUninit::<libc::tm>::uninit());
                // More in libc's function than out of it.
                for _ in 0..200 {
                    // SAFETY: both are live for the call.
                    unsafe { libc::localtime_r(&raw const time, broken_down.as_mut_ptr()) };
                }
            },
            |i| {
                ::log::info!(target: "storm", "record 0 {i}");
                0
            },
        );
        let ended = jiff::Timestamp::now();
        assert!(made.iter().all(|&n| n > 0));
        drop(logger);
        let text = error.text();
        assert_eq!(numbered(&text), (0..2000).collect::<Vec<_>>());
        for line in text.lines() {
            assert_whole(line);
            assert!(line.contains("+05:45 INFO"), "{line}");
            let stamp: jiff::Timestamp = line.split(' ').next().expect("one").parse().expect("a time");
            assert!((begun..=ended).contains(&stamp), "{line}");
        }
    });
}

// -- what a message or an output can do

#[test]
fn a_long_line_goes_to_a_pipe_in_pieces_and_to_a_file_in_one() {
    let message = |n: usize| "0123456789".chars().cycle().take(n).collect::<String>();
    for background in [None, Some(4)] {
        let builder = || background.map_or(Builder::new(), |n| Builder::new().background(n));
        let file = Scratch::new("long");
        let logger = builder().output(Output::file(&file.0).expect("a file")).build();
        log_by(&logger, &message(100_000));
        drop(logger);
        assert!(file.text().ends_with(&(message(100_000) + "\n")) && file.text().lines().count() == 1);

        let (from, to) = io::pipe().expect("a pipe");
        let logger = builder().output(Output::fd(to).expect("a pipe")).build();
        let reader = drained(from);
        log_by(&logger, &message(10_000));
        drop(logger);
        let text = reader.join().expect("no panic");
        let mut joined = String::new();
        for line in text.lines() {
            assert!(line.len() < libc::PIPE_BUF);
            let part = line.split_once("storm: ").expect("each has the head").1;
            joined += part.strip_suffix('\\').unwrap_or(part);
        }
        assert_eq!((joined, text.lines().count()), (message(10_000), 3));
    }
}

/// The disk takes a part of a line, then nothing, then everything again: the torn line is a line by itself, and what was lost is told.
#[test]
fn a_full_disk_tears_no_other_line_and_what_is_lost_is_told() {
    isolated("a_full_disk_tears_no_other_line_and_what_is_lost_is_told", 60, || {
        // SAFETY: ignoring a signal runs no code; writes past the limit give EFBIG then, as a full disk gives ENOSPC.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        for background in [None, Some(16)] {
            let file = Scratch::new("full");
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(Output::file(&file.0).expect("a file")).build();
            let log = |n: u64| {
                log_by(&logger, &format!("record 0 {n}"));
                logger.flush();
            };
            log(0);
            limit_files(file.text().len() as u64 * 2 - 6);
            (1..4).for_each(log);
            limit_files(libc::RLIM_INFINITY);
            log(4);
            log(5);
            let text = file.text();
            let (torn, whole): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.ends_with("recor"));
            assert_eq!(torn.len(), 1, "{text}");
            assert_eq!(lost(&text), 3, "{text}");
            assert_eq!(numbered(&whole.join("\n")), [0, 4, 5], "{text}");
        }
    });
}

fn limit_files(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is live.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
}

/// A writer that logs and flushes, one that panics, one that fails: no deadlock, and the thread goes on.
#[test]
fn writers_that_misbehave() {
    struct Odd(Arc<Mutex<Vec<u8>>>, bool);
    impl Write for Odd {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let text = String::from_utf8_lossy(bytes);
            if text.contains("record 0 0") {
                ::log::info!(target: "storm", "from inside");
                ::log::logger().flush();
            }
            if text.contains("record 0 1") {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let first_telling = text.contains(" lost: ") && !std::mem::replace(&mut self.1, true);
            if text.contains("record 0 2") || first_telling {
                std::panic::resume_unwind(Box::new(()));
            }
            self.0.lock().expect("not poisoned").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            ::log::logger().flush();
            Ok(())
        }
    }
    isolated("writers_that_misbehave", 60, || {
        let error = Scratch::new("error");
        let _redirected = standard_error_to(&error);
        let text = Arc::new(Mutex::new(Vec::new()));
        let output = Output::writer(Odd(Arc::clone(&text), false));
        let logger = Builder::new().output(output).background(8).init().expect("the first logger");
        for n in 0..5 {
            ::log::info!(target: "storm", "record 0 {n}");
            logger.flush();
        }
        let text = String::from_utf8(text.lock().expect("not poisoned").clone()).expect("text");
        assert_eq!(numbered(&text), [0, 3, 4], "{text}");
        assert_eq!(lost(&text), 2, "{text}");
        assert!(error.text().ends_with("from inside\n"));
    });
}

/// A buffer in front of the output is the parent's: no child writes it, flushes it or drops it.
#[test]
fn what_a_writer_has_buffered_is_the_parents() {
    isolated("what_a_writer_has_buffered_is_the_parents", 60, || {
        let (file, own) = (Scratch::new("buffered"), Scratch::new("own"));
        for background in [None, Some(8)] {
            let output = Output::writer(io::BufWriter::new(file.append()));
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(output).build();
            log_by(&logger, "record 0 0");
            in_both(|| {
                logger.set_output(Output::file(&own.0).expect("a file"));
                log_by(&logger, "record 0 1");
                logger.flush();
                0
            });
            log_by(&logger, "record 0 2");
            logger.flush();
        }
        assert_eq!(numbered(&file.text()), [0, 2, 0, 2]);
        assert_eq!(numbered(&own.text()), [1; 4]);
    });
}

/// A `Display` that forks: the record is the parent's.
#[test]
fn a_record_whose_arguments_fork_is_the_parents() {
    struct Forks;
    impl std::fmt::Display for Forks {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            // SAFETY: the child goes on for the rest of one record, and ends.
            let pid = unsafe { libc::fork() };
            f.write_str(if pid == 0 { "child" } else { "parent" })
        }
    }
    isolated("a_record_whose_arguments_fork_is_the_parents", 60, || {
        let (file, error) = (Scratch::new("parent"), Scratch::new("error"));
        let _redirected = standard_error_to(&error);
        let logger = Builder::new().output(Output::file(&file.0).expect("a file")).build();
        let before = carefork::fork_generation();
        log_by(&logger, &Forks.to_string());
        let log = |what: &dyn std::fmt::Display| {
            let arguments = format_args!("{what}");
            ::log::Log::log(&logger, &::log::Record::builder().args(arguments).build());
        };
        if carefork::fork_generation() == before {
            log(&Forks);
        }
        if carefork::fork_generation() != before {
            common::raw::exit_now(0);
        }
        // SAFETY: no status is asked for.
        while unsafe { libc::wait(std::ptr::null_mut()) } > 0 {}
        let ends: Vec<_> = file.text().lines().map(|l| l.rsplit(": ").next().map(str::to_owned)).collect();
        assert_eq!(ends, [Some("parent".to_owned()), Some("parent".to_owned())], "{}", file.text());
    });
}

/// The output turned while threads log through the queue: each record is in the one file or the other, in order.
#[test]
fn turning_the_output_keeps_the_order() {
    for background in [None, Some(16)] {
        let (a, b) = (Scratch::new("a"), Scratch::new("b"));
        let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
        let logger = builder.output(Output::file(&a.0).expect("a file")).build();
        thread::scope(|s| {
            let logging = s.spawn(|| (0..2000).for_each(|n| log_by(&logger, &format!("record 0 {n}"))));
            for n in 0.. {
                let to = if n % 2 == 0 { &b } else { &a };
                logger.set_output(Output::file(&to.0).expect("a file"));
                thread::sleep(Duration::from_micros(200));
                if logging.is_finished() {
                    break;
                }
            }
        });
        drop(logger);
        let (a, b) = (numbered(&a.text()), numbered(&b.text()));
        assert!(a.is_sorted() && b.is_sorted());
        let mut all = [a, b].concat();
        all.sort_unstable();
        assert_eq!(all, (0..2000).collect::<Vec<_>>());
    }
}

/// A file that the log was turned away from is closed, though threads that wrote to it do nothing more.
#[test]
fn an_old_output_is_closed_while_its_threads_idle() {
    let (a, b) = (Scratch::new("a"), Scratch::new("b"));
    for builder in [Builder::new(), Builder::new().background(100)] {
        let logger = builder.output(Output::file(&a.0).expect("a file")).build();
        log_by(&logger, "record 0 0");
        let open = || {
            let fds = common::fds_of(common::raw::getpid()).expect("/proc");
            fds.iter().filter(|(_, target)| *target == a.0).count()
        };
        assert_eq!(open(), 1);
        logger.set_output(Output::file(&b.0).expect("a file"));
        log_by(&logger, "record 0 1");
        logger.flush();
        assert_eq!(open(), 0);
    }
    assert_eq!(std::fs::read_to_string(&b.0).expect("written").lines().count(), 2);
}

/// Two loggers on one thread, record by record.
#[test]
fn two_loggers_do_not_mix() {
    let files = [Scratch::new("a"), Scratch::new("b")];
    let loggers = files.each_ref().map(|f| Builder::new().output(Output::file(&f.0).expect("a file")).build());
    for n in 0..10 {
        log_by(&loggers[n % 2], &format!("record 0 {n}"));
    }
    assert_eq!(numbered(&files[0].text()), [0, 2, 4, 6, 8]);
    assert_eq!(numbered(&files[1].text()), [1, 3, 5, 7, 9]);
}

/// What was logged before the turn is in the old file, what was logged after it in the new one.
#[test]
fn the_output_turns_between_two_lines() {
    for round in 0..40 {
        let (a, b) = (Scratch::new("a"), Scratch::new("b"));
        let builder = if round % 4 == 0 { Builder::new() } else { Builder::new().background(64) };
        let logger = builder.output(Output::file(&a.0).expect("a file")).build();
        (0..50).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
        logger.set_output(Output::file(&b.0).expect("a file"));
        (50..60).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
        drop(logger);
        assert_eq!((numbered(&a.text()), numbered(&b.text())), ((0..50).collect(), (50..60).collect()));
    }
}

/// Threads in regions wait for room in a queue whose thread needs a region for each record; forks come in between all the same.
#[test]
fn threads_may_log_inside_regions_through_a_full_queue() {
    isolated("threads_may_log_inside_regions_through_a_full_queue", 300, || {
        let (file, error) = (Scratch::new("regions"), Scratch::new("error"));
        let _redirected = standard_error_to(&error);
        let output = Output::writer(file.append());
        let logger = Builder::new().output(output).background(1).init().expect("the first logger");
        // A fork that keeps the writer from its region steps back at its bound only; slower than the real one, for slow machines.
        let _clock = drive::run_slowly();
        let record = |thread: usize, number: u64| {
            let _region = carefork::no_forking();
            ::log::info!(target: "storm", "record {thread} {number}");
        };
        let made = storm(60, record, |i| {
            ::log::info!(target: "storm", "child 0 {i}");
            0
        });
        logger.flush();
        assert_each_once(&file.text(), &made, |line| Some(numbers(line, "record").expect("a record")));
        assert_eq!(by_pid(&error.text()).values().map(Vec::len).sum::<usize>(), 60);
    });
}

/// The first words of a fresh child, in its at-fork handlers, are the child's already.
#[test]
fn hooks_may_log() {
    isolated("hooks_may_log", 60, || {
        for background in [None, Some(1)] {
            let (file, error) = (Scratch::new("hooks"), Scratch::new("error"));
            let redirected = standard_error_to(&error);
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(Output::file(&file.0).expect("a file")).build();
            let say = |what: &'static str| {
                let logger = logger.clone();
                move || log_by(&logger, what)
            };
            log_by(&logger, "begin 0 0");
            let hook = carefork::Hook::new("says").prepare(say("prepare")).parent(say("parent"));
            let registration = carefork::register(hook.child(say("child")).cleanup(say("cleanup")));
            in_both(|| 0);
            drop(registration);
            logger.flush();
            drop(redirected);
            let ends = |text: &str| -> Vec<String> {
                text.lines().map(|l| l.rsplit("storm: ").next().expect("one").to_owned()).collect()
            };
            assert_eq!(ends(&file.text()), ["begin 0 0", "prepare", "parent", "prepare", "parent"]);
            assert_eq!(ends(&error.text()), ["child", "cleanup", "child", "cleanup"]);
            assert_eq!(by_pid(&error.text()).len(), 2);
        }
    });
}

/// A thread logs while a fork keeps the gate shut: it needs no region, so neither waits for the other.
#[test]
fn a_thread_logs_while_the_gate_is_shut() {
    isolated("a_thread_logs_while_the_gate_is_shut", 60, || {
        for background in [None, Some(8)] {
            let file = Scratch::new("shut");
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(Output::file(&file.0).expect("a file")).build();
            let (begin, wait) = std::sync::mpsc::channel();
            let (end, done) = std::sync::mpsc::channel();
            let logging = thread::spawn({
                let logger = logger.clone();
                move || {
                    log_by(&logger, "record 0 0");
                    end.send(()).expect("the test waits");
                    wait.recv().expect("the hook sends");
                    (1..50).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
                    logger.flush();
                    end.send(()).expect("the hook waits");
                }
            });
            done.recv().expect("its first record");
            // Nobody reopens the gate.
            drive::freeze();
            let shared = Mutex::new((begin, done));
            let hook = carefork::Hook::new("waits for a thread that logs").prepare(move || {
                let (begin, done) = &*shared.lock().expect("not poisoned");
                if begin.send(()).is_ok() {
                    done.recv().expect("it logs");
                }
            });
            let registration = carefork::register(hook);
            ends_well(Kind::Foreign.fork(|| 0));
            drop(registration);
            carefork::testing::release();
            logging.join().expect("no panic");
            assert_eq!(numbered(&file.text()), (0..50).collect::<Vec<_>>());
        }
    });
}

/// Without at-fork handlers too: by a raw clone, and where carefork is switched off.
#[test]
fn a_child_that_nobody_told_goes_to_fd_2() {
    let check_it = || {
        let (file, error) = (Scratch::new("untold"), Scratch::new("error"));
        let redirected = standard_error_to(&error);
        let logger = Builder::new().output(Output::file(&file.0).expect("a file")).background(8).build();
        log_by(&logger, "record 0 0");
        logger.flush();
        let in_child = || {
            log_by(&logger, "record 0 1");
            logger.flush();
            common::raw::exit_now(0)
        };
        drive::until_others_sleep();
        // SAFETY: the arguments of a fork; the only other threads sleep, so the allocator is at rest.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            in_child();
        }
        ends_well(i32::try_from(pid).expect("a pid"));
        // SAFETY: as above.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            in_child();
        }
        ends_well(pid);
        drop(redirected);
        assert_eq!((numbered(&file.text()), numbered(&error.text())), (vec![0], vec![1, 1]));
        assert_eq!(by_pid(&error.text()).len(), 2);
    };
    isolated("a_child_that_nobody_told_goes_to_fd_2", 60, check_it);
    let mut setup = common::Setup::default();
    setup.env.push(("CAREFORK".into(), "off".into()));
    isolated_with("a_child_that_nobody_told_goes_to_fd_2", 60, setup, check_it);
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

/// What nobody has room for is told at the end, if not before.
#[test]
fn flush_tells_what_was_lost() {
    isolated("flush_tells_what_was_lost", 60, || {
        // SAFETY: as in the test of the full disk.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        for background in [None, Some(16)] {
            let file = Scratch::new("told");
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(Output::file(&file.0).expect("a file")).build();
            limit_files(0);
            log_by(&logger, "record 0 0");
            logger.flush();
            limit_files(libc::RLIM_INFINITY);
            logger.flush();
            logger.flush();
            assert_eq!((lost(&file.text()), file.text().lines().count()), (1, 1), "{}", file.text());
        }
    });
}

#[test]
fn mistakes_are_said() {
    let error = Builder::new().filters("net=loud").expect_err("no level");
    assert!(error.to_string().contains("loud"), "{error}");
    assert!(log::set_output(Output::stderr()).is_err());
    assert!(Output::file("/nonexistent/log").is_err());
}
