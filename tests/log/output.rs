//! Outputs that are slow, full, buffered, turned away from, or misbehave.

use crate::common::{self, Verdict, isolated, reap, thread_count};
use crate::drive::{self, SOON};
use crate::logs::{Scratch, standard_error_to};
use crate::{By, drained, full_pipe, in_both, limit_files, log_by, lost, numbered};
use carefork::log::{self, Builder, Logger, Output};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

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

/// A descriptor that says EAGAIN is slept for, not asked again and again, and loses nothing.
#[test]
fn a_non_blocking_pipe_is_waited_for() {
    isolated("output::a_non_blocking_pipe_is_waited_for", 10, || {
        for background in [None, Some(4)] {
            let (from, to) = full_pipe();
            // SAFETY: takes numbers only.
            assert_eq!(unsafe { libc::fcntl(to.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }, 0);
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(Output::fd(to).expect("a pipe")).build();
            let logging = std::thread::spawn(move || {
                (0..3).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
                logger.flush();
                logger.lost()
            });
            drive::a_while();
            drive::until_others_sleep();
            assert!(!logging.is_finished());
            let reader = drained(from);
            assert_eq!(logging.join().expect("no panic"), 0);
            assert_eq!(numbered(&reader.join().expect("no panic")), [0, 1, 2]);
        }
    });
}

/// Threads that log to a socket and to a non-blocking terminal: no line has another's in it.
#[test]
fn no_line_is_torn_on_sockets_and_terminals() {
    isolated("output::no_line_is_torn_on_sockets_and_terminals", 100, || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let client = std::net::TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (server, _) = listener.accept().expect("accepted");
        let (ours, theirs) = terminal();
        let pairs = [("tcp", OwnedFd::from(client), OwnedFd::from(server)), ("non-blocking terminal", theirs, ours)];
        let torn = pairs.map(|(what, to, from)| (what, torn(to, from.into())));
        assert_eq!(torn, [("tcp", 0), ("non-blocking terminal", 0)]);
    });
}

/// Both sides of a raw terminal; the second is non-blocking.
fn terminal() -> (OwnedFd, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: both are live; no name, settings or size is given.
    assert_eq!(unsafe { libc::openpty(&raw mut ours, &raw mut theirs, none, none.cast(), none.cast()) }, 0);
    // SAFETY: termios is plain data.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `settings` is live.
    assert_eq!(unsafe { libc::tcgetattr(theirs, &raw mut settings) }, 0);
    // SAFETY: as above.
    unsafe { libc::cfmakeraw(&raw mut settings) };
    // SAFETY: as above.
    assert_eq!(unsafe { libc::tcsetattr(theirs, libc::TCSANOW, &raw const settings) }, 0);
    // SAFETY: integers only.
    assert_eq!(unsafe { libc::fcntl(theirs, libc::F_SETFL, libc::O_NONBLOCK) }, 0);
    // SAFETY: openpty just gave us each of them.
    let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
    (own(ours), own(theirs))
}

/// How many of the lines that eight threads log are not as they were logged.
fn torn(to: OwnedFd, mut from: std::fs::File) -> usize {
    let logger = Builder::new().output(Output::fd(to).expect("a descriptor")).build();
    let reader = std::thread::spawn(move || {
        let (mut text, mut page) = (Vec::new(), [0; 1000]);
        // A terminal's end is an error.
        while let Ok(n @ 1..) = from.read(&mut page) {
            text.extend_from_slice(&page[..n]);
            if text.len() % 64_000 < n {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    std::thread::scope(|s| {
        for letter in ["a", "b", "c", "d", "e", "f", "g", "h"] {
            let logger = &logger;
            s.spawn(move || (0..1000).for_each(|_| log_by(logger, &letter.repeat(3000))));
        }
    });
    drop(logger);
    let text = reader.join().expect("no panic");
    let is_whole = |line: &&str| {
        let message = line.rsplit_once("storm: ").map_or("", |(_, message)| message);
        line.matches("storm: ").count() == 1 && message.len() == 3000 && message == message[..1].repeat(3000)
    };
    assert!(text.lines().count() >= 8000);
    text.lines().count() - text.lines().filter(is_whole).count()
}

/// The disk takes a part of a line, then nothing, then everything again: the torn line is a line by itself, and what was lost is told.
#[test]
fn a_full_disk_tears_no_other_line_and_what_is_lost_is_told() {
    isolated("output::a_full_disk_tears_no_other_line_and_what_is_lost_is_told", 60, || {
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
    isolated("output::writers_that_misbehave", 60, || {
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

/// A writer that gives up and points the log elsewhere, while others fill the queue: what was logged before is lost with it.
#[test]
fn a_writer_may_turn_its_own_log() {
    isolated("output::a_writer_may_turn_its_own_log", 10, || {
        let file = Scratch::new("turned");
        let (place, path) = (Arc::new(OnceLock::<Logger>::new()), file.0.clone());
        let known = Arc::clone(&place);
        let output = Output::writer(By(move |_: &[u8]| {
            // Meanwhile the queue fills.
            drive::a_while();
            known.get().expect("set").set_output(Output::file(&path)?);
            Err(io::ErrorKind::StorageFull.into())
        }));
        let logger = Builder::new().output(output).background(4).build();
        drop(place.set(logger.clone()));
        (0..20).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
        logger.flush();
        let text = file.text();
        assert_eq!(numbered(&text), (logger.lost()..20).collect::<Vec<_>>(), "{text}");
        // Those in its hands and in the queue.
        assert!((1..=10).contains(&logger.lost()), "{text}");
    });
}

/// A writer whose end logs, or panics, on the log's thread; a panic whose payload panics in turn.
#[test]
fn a_writers_end_does_not_stop_the_log() {
    struct Ends(Box<dyn Fn() + Send>);
    impl Write for Ends {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Drop for Ends {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            std::panic::resume_unwind(Box::new(()));
        }
    }
    isolated("output::a_writers_end_does_not_stop_the_log", 10, || {
        let error = Scratch::new("error");
        let _redirected = standard_error_to(&error);
        let place = Arc::new(OnceLock::<Logger>::new());
        let known = Arc::clone(&place);
        let logs = move || {
            drive::a_while();
            log_by(known.get().expect("set"), "the last words of a writer");
        };
        let panics = || std::panic::resume_unwind(Box::new(()));
        let mut said = 0;
        let panics_twice = || std::panic::resume_unwind(Box::new(Panics));
        for end in [Box::new(logs) as Box<dyn Fn() + Send>, Box::new(panics), Box::new(panics_twice)] {
            let file = Scratch::new("next");
            let logger = Builder::new().output(Output::writer(Ends(end))).background(4).build();
            drop(place.set(logger.clone()));
            log_by(&logger, "record 0 0");
            logger.set_output(Output::file(&file.0).expect("a file"));
            (1..20).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
            logger.flush();
            // It ends where its last user lets go of it: words from the log's thread go to fd 2.
            let text = file.text();
            let records: Vec<_> = text.lines().filter(|line| !line.ends_with("of a writer")).collect();
            assert_eq!(numbered(&records.join("\n")), (1..20).collect::<Vec<_>>());
            said += text.lines().count() - records.len();
        }
        assert_eq!(said + error.text().matches("the last words of a writer\n").count(), 1);
    });
}

/// The last handle of a logger goes while its thread is in the writer: it ends, having written what was queued.
#[test]
fn a_writer_may_drop_the_last_handle() {
    isolated("output::a_writer_may_drop_the_last_handle", 10, || {
        let (before, file) = (thread_count(), Scratch::new("last"));
        let (give, given) = std::sync::mpsc::channel::<Logger>();
        let (mut to, mut last) = (file.append(), Some(given));
        let output = Output::writer(By(move |bytes: &[u8]| {
            if let Some(given) = last.take() {
                drop(given.recv().expect("the test sends it"));
            }
            to.write(bytes)
        }));
        let logger = Builder::new().output(output).background(4).build();
        (0..4).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
        give.send(logger).expect("the writer waits");
        drive::until(|| thread_count() == before);
        assert_eq!(numbered(&file.text()), [0, 1, 2, 3]);
    });
}

/// A writer that takes a part of a line and fails, or panics: the next line is one of its own.
#[test]
fn a_line_cut_by_a_writer_does_not_touch_the_next() {
    isolated("output::a_line_cut_by_a_writer_does_not_touch_the_next", 30, || {
        for background in [None, Some(8)] {
            let text = Arc::new(Mutex::new(Vec::new()));
            let to = Arc::clone(&text);
            let output = Output::writer(By(move |bytes: &[u8]| {
                let odd = [b"record 0 0\n", b"record 0 1\n"].iter().position(|end| bytes.ends_with(*end));
                let part = match odd {
                    // From its date on; the rest may begin with any number.
                    Some(_) if bytes[4] == b'-' => &bytes[..20],
                    Some(0) => return Err(io::ErrorKind::StorageFull.into()),
                    Some(_) => std::panic::resume_unwind(Box::new(())),
                    None => bytes,
                };
                to.lock().expect("not poisoned").extend_from_slice(part);
                Ok(part.len())
            }));
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(output).build();
            for n in 0..3 {
                let log = || log_by(&logger, &format!("record 0 {n}"));
                let logged = std::panic::catch_unwind(AssertUnwindSafe(log));
                assert_eq!(logged.is_err(), n == 1 && background.is_none());
            }
            logger.flush();
            let text = String::from_utf8(text.lock().expect("not poisoned").clone()).expect("text");
            let (torn, whole): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.len() == 20);
            assert_eq!(
                (torn.len(), numbered(&whole.join("\n")), lost(&text), logger.lost()),
                (2, vec![2], 2, 2),
                "{text}"
            );
            // The two losses are told together or, by a thread that is quick, one by one.
            assert_eq!(whole.len() - 1, text.matches(" lost: the writer failed").count(), "{text}");
        }
    });
}

/// The turn to another output flushes a writer, behind a thread or not.
#[test]
fn the_turn_from_a_writer_flushes_it() {
    struct Buffered(Vec<u8>, std::fs::File);
    impl Write for Buffered {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.1.write_all(&std::mem::take(&mut self.0))
        }
    }
    isolated("output::the_turn_from_a_writer_flushes_it", 30, || {
        for background in [None, Some(8)] {
            let (a, b) = (Scratch::new("a"), Scratch::new("b"));
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(Output::writer(Buffered(Vec::new(), a.append()))).build();
            log_by(&logger, "record 0 0");
            logger.set_output(Output::file(&b.0).expect("a file"));
            log_by(&logger, "record 0 1");
            logger.flush();
            assert_eq!((numbered(&a.text()), numbered(&b.text())), (vec![0], vec![1]));
        }
    });
}

/// A child of the log's thread writes nothing of its parent's.
#[test]
fn a_writer_that_forks_writes_nothing_twice() {
    isolated("output::a_writer_that_forks_writes_nothing_twice", 30, || {
        let (file, error) = (Scratch::new("forks"), Scratch::new("error"));
        let _redirected = standard_error_to(&error);
        let (mut to, mut forked, (tell, told)) = (file.append(), false, std::sync::mpsc::channel());
        let output = Output::writer(By(move |bytes: &[u8]| {
            if !std::mem::replace(&mut forked, true) {
                // Records queue up behind this one.
                drive::a_while();
                // SAFETY: the child returns, and that is the end of it.
                match unsafe { libc::fork() } {
                    0 => return Ok(bytes.len()),
                    pid => tell.send(pid).expect("the test waits"),
                }
            }
            to.write(bytes)
        }));
        let logger = Builder::new().output(output).background(40).build();
        (0..10).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
        logger.flush();
        let verdict = reap(told.recv().expect("a child"), SOON);
        assert_eq!(numbered(&file.text()), (0..10).collect::<Vec<_>>());
        assert_eq!(verdict, Verdict::Exited(101));
        assert!(error.text().contains("the writer forked and returned in the child"), "{}", error.text());
    });
}

/// A buffer in front of the output is the parent's: no child writes it, flushes it or drops it.
#[test]
fn what_a_writer_has_buffered_is_the_parents() {
    isolated("output::what_a_writer_has_buffered_is_the_parents", 60, || {
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

#[test]
fn mistakes_are_said() {
    let error = Builder::new().filters("net=loud").expect_err("no level");
    assert!(error.to_string().contains("loud"), "{error}");
    assert!(log::set_output(Output::stderr()).is_err());
    assert!(Output::file("/nonexistent/log").is_err());
}
