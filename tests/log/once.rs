//! Through thousands of forks: each record once, in order, on the right side.

use crate::common::isolated;
use crate::drive::BOTH;
use crate::logs::{Scratch, assert_each_once, fork_then, noexec, numbers, standard_error_to, storm_of};
use crate::{assert_whole, ends_well, log_by, numbered};
use carefork::log::{self, Builder, Logger, Output};
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

const FORKS: u32 = 5000;

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
    isolated("once::each_record_once_with_no_thread", 400, || each_record_once(Builder::new()));
}

#[test]
fn each_record_once_in_the_background() {
    isolated("once::each_record_once_in_the_background", 400, || each_record_once(Builder::new().background(64)));
}

#[test]
fn each_record_once_through_a_queue_of_one() {
    isolated("once::each_record_once_through_a_queue_of_one", 400, || each_record_once(Builder::new().background(1)));
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

/// `count` records of all lengths that a pipe takes in one piece, each of one letter.
fn write_batches(logger: &Logger, letter: &str, count: u64) {
    for n in 0..count {
        let long = if n % 16 == 0 { libc::PIPE_BUF - 200 } else { n as usize * 37 % 600 };
        log_by(logger, &format!("{} {letter} 0 {n}", letter.repeat(long)));
    }
    logger.flush();
}

/// Parent and child write batches to one pipe: no line has anything of another's in it, and each process's are there in their order.
#[test]
fn two_processes_tear_no_line_of_a_pipe() {
    const COUNT: u64 = 4000;
    isolated("once::two_processes_tear_no_line_of_a_pipe", 120, || {
        for kind in BOTH {
            for (nonblocking, background) in [(false, true), (true, true), (false, false), (true, false)] {
                let (mut from, to) = io::pipe().expect("a pipe");
                if nonblocking {
                    // SAFETY: flags of a pipe of ours.
                    assert_eq!(unsafe { libc::fcntl(to.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }, 0);
                }
                let theirs = to.try_clone().expect("a descriptor");
                let builder = if background { Builder::new().background(256) } else { Builder::new() };
                let logger = builder.output(Output::fd(to).expect("a pipe")).build();
                log_by(&logger, "p begin 0 0");
                let pid = noexec(kind, || {
                    logger.set_output(Output::fd(theirs.try_clone().expect("a descriptor")).expect("a pipe"));
                    write_batches(&logger, "c", COUNT);
                    0
                });
                drop(theirs);
                // Slower than those who write: they find the pipe full, and the queues fill.
                let reader = thread::spawn(move || {
                    let (mut text, mut page) = (Vec::new(), [0; 8192]);
                    loop {
                        match from.read(&mut page).expect("a pipe") {
                            0 => return String::from_utf8(text).expect("text"),
                            n => text.extend_from_slice(&page[..n]),
                        }
                        thread::sleep(Duration::from_micros(20));
                    }
                });
                write_batches(&logger, "p", COUNT);
                ends_well(pid);
                drop(logger);
                let text = reader.join().expect("no panic");
                let mut next = [0; 2];
                for line in text.lines().filter(|line| !line.ends_with("p begin 0 0")) {
                    let message = line.rsplit_once("storm: ").expect("a whole line").1;
                    assert_eq!(line.matches("storm: ").count(), 1, "{line:?}");
                    let at = usize::from(message.contains(" c 0 "));
                    let letter = ["p", "c"][at];
                    let n =
                        message.rsplit_once(" 0 ").and_then(|(_, n)| n.parse::<u64>().ok()).expect("a whole record");
                    assert_eq!(n, next[at], "lost, doubled or out of order: {line:?}");
                    let rest = message.strip_suffix(&format!(" {letter} 0 {n}")).expect("the end of a record");
                    assert_eq!(rest.matches(letter).count(), rest.len(), "torn: {line:?}");
                    assert_eq!(line.contains("[pid "), at == 1, "{line:?}");
                    next[at] += 1;
                }
                assert_eq!(next, [COUNT; 2], "{kind:?}, nonblocking {nonblocking}, background {background}");
            }
        }
    });
}
