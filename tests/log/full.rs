//! Full queues and full pipes hold up no fork, and what was lost is told.

use crate::common::{self, check, count_syscalls, isolated, strace_mark};
use crate::drive::{self, BOTH, Kind};
use crate::logs::{Scratch, assert_each_once, by_pid, noexec, numbers, standard_error_to, storm};
use crate::{By, drained, ends_well, full_pipe, in_both, in_pipe, limit_files, log_by, lost, numbered};
use carefork::log::{Builder, Logger, Output, WhenFull};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::{Barrier, OnceLock};
use std::thread;
use std::time::Duration;

/// More than a queue and the thread's hands hold.
const RECORDS: u64 = 300;

/// The thread stuck in a write, the queue full, and some records waiting outside: forks go on, and every record is the parent's.
/// With what the log wrote, what its children wrote, and what it says was lost.
fn stuck(when_full: WhenFull, capacity: usize) -> (String, String, u64) {
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
            // The parent's queue is not this process's to wait for, before its first record and after; nor its losses to count.
            logger.flush();
            let before = logger.lost();
            log(&logger, 1000);
            logger.flush();
            i32::from((before, logger.lost()) != (0, 0))
        }));
    }
    let reader = drained(from);
    logging.join().expect("no panic");
    logger.flush();
    let lost = logger.lost();
    drop(logger);
    (reader.join().expect("no panic"), error.text(), lost)
}

fn assert_children_on(error: &str) {
    let found = by_pid(error);
    assert_eq!((found.len(), error.lines().count()), (40, 40), "{error}");
}

#[test]
fn a_full_queue_that_blocks_loses_nothing_at_a_fork() {
    isolated("full::a_full_queue_that_blocks_loses_nothing_at_a_fork", 60, || {
        // The second queue holds more than goes into a pipe at once.
        for capacity in [8, 90] {
            let (text, error, count) = stuck(WhenFull::Block, capacity);
            assert_eq!((numbered(&text), count), ((0..RECORDS).collect::<Vec<_>>(), 0));
            assert_children_on(&error);
        }
    });
}

#[test]
fn a_full_queue_that_drops_says_how_many() {
    isolated("full::a_full_queue_that_drops_says_how_many", 60, || {
        let (text, error, count) = stuck(WhenFull::Drop, 8);
        let written = numbered(&text);
        assert!(written.is_sorted() && written.len() >= 8 && (written.len() as u64) < RECORDS, "{written:?}");
        assert_eq!((written.len() as u64 + lost(&text), count), (RECORDS, lost(&text)));
        assert_children_on(&error);
    });
}

#[test]
fn a_queue_grows_to_its_bound() {
    isolated("full::a_queue_grows_to_its_bound", 60, || {
        let (text, error, count) = stuck(WhenFull::GrowTo(50), 8);
        let written = numbered(&text);
        // What the thread has in its hands is in the queue no more.
        assert!(written.starts_with(&(0..50).collect::<Vec<_>>()) && (written.len() as u64) < RECORDS, "{written:?}");
        assert_eq!((written.len() as u64 + lost(&text), count), (RECORDS, lost(&text)));
        assert_children_on(&error);
    });
}

#[test]
fn a_queue_that_grows_to_nothing_holds_one() {
    let file = Scratch::new("one");
    let output = Output::file(&file.0).expect("a file");
    let logger = Builder::new().output(output).background(8).when_full(WhenFull::GrowTo(0)).build();
    log_by(&logger, "record 0 0");
    logger.flush();
    assert_eq!((numbered(&file.text()), logger.lost()), (vec![0], 0));
}

/// Without a queue too: eight threads find room for one record, none of them waits, and each record is written or counted.
#[test]
fn a_full_pipe_that_drops_says_how_many() {
    isolated("full::a_full_pipe_that_drops_says_how_many", 60, || {
        for round in 0..100 {
            let when_full = [WhenFull::Drop, WhenFull::GrowTo(50)][round % 2];
            let (mut from, to) = full_pipe();
            from.read_exact(&mut [0; libc::PIPE_BUF]).expect("a page");
            let logger = Builder::new().output(Output::fd(to).expect("a pipe")).when_full(when_full).build();
            let start = Barrier::new(8);
            thread::scope(|s| {
                for t in 0..8 {
                    let (logger, start) = (&logger, &start);
                    s.spawn(move || {
                        // As long as the page: there is room for one.
                        let message = format!("{} record {t} 0", "x".repeat(libc::PIPE_BUF - 150));
                        start.wait();
                        log_by(logger, &message);
                    });
                }
            });
            assert_eq!(logger.lost(), 7);
            let before = in_pipe(&mut from);
            // There is room to tell.
            logger.flush();
            let told = in_pipe(&mut from);
            assert_eq!(
                (numbered(before.trim_start_matches('-')).len(), lost(&before), lost(&told)),
                (1, 0, 7),
                "{told}"
            );
            log_by(&logger, "record 0 1");
            assert_eq!((numbered(&in_pipe(&mut from)), logger.lost()), (vec![1], 7));
        }
    });
}

/// A child on fd 2 neither, and the line that tells what it lost is its own.
#[test]
fn a_child_whose_fd_2_is_full_drops_and_says_how_many() {
    isolated("full::a_child_whose_fd_2_is_full_drops_and_says_how_many", 20, || {
        for (background, when_full) in
            [(None, WhenFull::Drop), (Some(8), WhenFull::Drop), (Some(8), WhenFull::GrowTo(9))]
        {
            let file = Scratch::new("parent");
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n)).when_full(when_full);
            let logger = builder.output(Output::file(&file.0).expect("a file")).build();
            log_by(&logger, "record 0 0");
            in_both(|| {
                let (mut from, to) = full_pipe();
                // SAFETY: this child's own fd 2.
                check(1, unsafe { libc::dup2(to.as_raw_fd(), 2) } == 2);
                (1..4).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
                check(2, logger.lost() == 3);
                check(3, in_pipe(&mut from).bytes().all(|b| b == b'-'));
                log_by(&logger, "record 0 4");
                let text = in_pipe(&mut from);
                let mark = format!("[pid {} ", std::process::id());
                check(4, text.lines().count() == 2 && text.lines().all(|line| line.contains(&mark)));
                check(5, (numbered(&text), lost(&text), logger.lost()) == (vec![4], 3, 3));
                0
            });
            logger.flush();
            assert_eq!((numbered(&file.text()), logger.lost()), (vec![0], 0));
        }
    });
}

/// Without a thread behind it, too: whoever logs waits in the kernel, in no region.
#[test]
fn a_thread_stuck_in_a_full_pipe_holds_up_no_fork() {
    isolated("full::a_thread_stuck_in_a_full_pipe_holds_up_no_fork", 60, || {
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

/// Threads in regions wait for room in a queue whose thread needs a region for each record; forks come in between all the same.
#[test]
fn threads_may_log_inside_regions_through_a_full_queue() {
    isolated("full::threads_may_log_inside_regions_through_a_full_queue", 300, || {
        let (file, error) = (Scratch::new("regions"), Scratch::new("error"));
        let _redirected = standard_error_to(&error);
        let output = Output::writer(file.append());
        let logger = Builder::new().output(output).background(1).init().expect("the first logger");
        // No bound ends: a fork that kept the writer from its region would wait for ever.
        drive::freeze();
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

/// What nobody has room for is told at the end, if not before.
#[test]
fn flush_tells_what_was_lost() {
    isolated("full::flush_tells_what_was_lost", 60, || {
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
            // Told, and lost for good.
            logger.set_output(Output::file(&file.0).expect("a file"));
            assert_eq!(logger.lost(), 1);
        }
    });
}

/// A program that chose to lose records ends beside a full pipe, having counted what nobody will write; one that did not waits for it.
#[test]
fn a_full_pipe_does_not_put_off_the_end_of_who_drops() {
    /// Registered before the logger's own, so called after it.
    extern "C" fn count() {
        let logger = LOGGER.get().expect("it was installed");
        // One is in the hands of the thread; or a second one, which had room beside it.
        common::raw::exit_now(i32::from(!(8..=9).contains(&logger.lost())));
    }
    static LOGGER: OnceLock<Logger> = OnceLock::new();
    isolated("full::a_full_pipe_does_not_put_off_the_end_of_who_drops", 30, || {
        let child = |when_full: WhenFull, to: io::PipeWriter| {
            noexec(Kind::Foreign, || {
                // SAFETY: `count` ends this child.
                unsafe { libc::atexit(count) };
                let builder = Builder::new().output(Output::fd(to).expect("a pipe")).background(5).when_full(when_full);
                let logger = builder.init().expect("the first logger");
                drop(LOGGER.set(logger));
                ::log::info!("in its hands");
                drive::a_while();
                (0..9).for_each(|_| ::log::info!("queued, or dropped"));
                std::process::exit(1)
            })
        };
        for when_full in [WhenFull::Drop, WhenFull::GrowTo(4)] {
            let (_from, to) = full_pipe();
            ends_well(child(when_full, to));
        }

        let (from, to) = full_pipe();
        let logger =
            Builder::new().output(Output::fd(to).expect("a pipe")).background(1).when_full(WhenFull::Drop).build();
        (0..3).for_each(|n| log_by(&logger, &format!("record 0 {n}")));
        let lost_before = logger.lost();
        drop(logger);
        // The thread has what was in the queue.
        let text = drained(from).join().expect("no panic");
        assert_eq!(numbered(&text).len() as u64 + lost_before, 3, "{text}");
    });
}

/// A slow reader is not a full pipe: the end waits for it, though it takes longer than it waits for one that reads nothing.
#[test]
fn a_slow_reader_gets_all_before_the_end() {
    isolated("full::a_slow_reader_gets_all_before_the_end", 30, || {
        let (mut from, to) = full_pipe();
        let pid = noexec(Kind::Foreign, || {
            let output = Output::fd(to).expect("a pipe");
            Builder::new().output(output).background(20).when_full(WhenFull::Drop).init().expect("the first logger");
            let long = "x".repeat(libc::PIPE_BUF - 200);
            (0..16).for_each(|n| ::log::info!(target: "storm", "{long} record 0 {n}"));
            std::process::exit(0)
        });
        let mut text = Vec::new();
        for _ in 0..16 {
            thread::sleep(Duration::from_millis(200));
            let mut page = [0; libc::PIPE_BUF];
            from.read_exact(&mut page).expect("a page");
            text.extend_from_slice(&page);
        }
        from.read_to_end(&mut text).expect("the rest");
        ends_well(pid);
        let text = String::from_utf8(text).expect("text");
        assert_eq!(numbered(text.trim_start_matches('-')), (0..16).collect::<Vec<_>>());
    });
}

/// The same for a writer, which has records for longer than the end waits for one.
#[test]
fn a_slow_writer_gets_all_before_the_end() {
    isolated("full::a_slow_writer_gets_all_before_the_end", 30, || {
        let file = Scratch::new("slow");
        let pid = noexec(Kind::Foreign, || {
            let mut to = file.append();
            let output = Output::writer(By(move |bytes: &[u8]| {
                thread::sleep(Duration::from_millis(10));
                to.write(bytes)
            }));
            let builder = Builder::new().output(output).background(1000).when_full(WhenFull::Drop);
            builder.init().expect("the first logger");
            (0..300).for_each(|n| ::log::info!(target: "storm", "record 0 {n}"));
            std::process::exit(0)
        });
        ends_well(pid);
        assert_eq!(numbered(&file.text()), (0..300).collect::<Vec<_>>());
    });
}

/// Nor is a process given up that was stopped at its end, for longer than an output has to take something.
#[test]
fn a_process_that_was_stopped_writes_all_before_the_end() {
    isolated("full::a_process_that_was_stopped_writes_all_before_the_end", 30, || {
        let file = Scratch::new("stopped");
        let pid = noexec(Kind::Foreign, || {
            let (mut to, mut stops) = (file.append(), true);
            let output = Output::writer(By(move |bytes: &[u8]| {
                if std::mem::take(&mut stops) {
                    // The end waits for this record by then.
                    drive::a_while();
                    // SAFETY: no memory is involved.
                    unsafe { libc::raise(libc::SIGSTOP) };
                    // The end looks first.
                    drive::a_while();
                }
                to.write(bytes)
            }));
            let builder = Builder::new().output(output).background(1000).when_full(WhenFull::Drop);
            builder.init().expect("the first logger");
            (0..10).for_each(|n| ::log::info!(target: "storm", "record 0 {n}"));
            std::process::exit(0)
        });
        let mut status = 0;
        // SAFETY: `status` is live.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, libc::WUNTRACED) }, pid);
        assert!(libc::WIFSTOPPED(status), "{status}");
        thread::sleep(Duration::from_millis(1500));
        // SAFETY: integers only.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGCONT) }, 0);
        ends_well(pid);
        assert_eq!(numbered(&file.text()), (0..10).collect::<Vec<_>>());
    });
}

/// Opening a named pipe waits for its reader: outside of any region.
#[test]
fn a_named_pipe_without_a_reader_holds_up_no_fork() {
    isolated("full::a_named_pipe_without_a_reader_holds_up_no_fork", 30, || {
        let pipe = Scratch::new("pipe");
        nix::unistd::mkfifo(&pipe.0, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let path = pipe.0.clone();
        let opens = thread::spawn(move || drop(Output::file(path)));
        drive::a_while();
        drive::until_others_sleep();
        let forked = BOTH.map(|kind| match kind {
            Kind::Coordinated => drive::coordinated(|| 0).expect("nobody is in its way"),
            Kind::Foreign => drive::foreign(|| i32::from(carefork::lineage().dirty)),
        });
        drop(std::fs::File::open(&pipe.0));
        opens.join().expect("no panic");
        forked.into_iter().for_each(ends_well);
    });
}

/// Who drops writes to a file as everybody does: a write that must not wait may take a part, and another's line comes between.
#[test]
fn a_file_takes_each_line_by_one_write_also_from_who_drops() {
    let calls = count_syscalls(
        "full::a_file_takes_each_line_by_one_write_also_from_who_drops",
        30,
        common::Setup::default(),
        || {
            let file = Scratch::new("whole");
            let _redirected = standard_error_to(&file);
            let outputs = [Output::file(&file.0).expect("a file"), Output::stderr()];
            let loggers = outputs.map(|output| Builder::new().output(output).when_full(WhenFull::Drop).build());
            strace_mark("begin");
            loggers.iter().for_each(|logger| log_by(logger, "record 0 0"));
            strace_mark("end");
            assert_eq!(numbered(&file.text()), [0, 0]);
        },
    );
    if let Some(calls) = calls {
        let writes = |name| common::between(&calls, "begin", "end").iter().filter(|call| call.name == name).count();
        assert_eq!((writes("write"), writes("pwritev2")), (2, 0));
    }
}

/// What was lost is told at the end of the process, with nothing behind the logger too.
#[test]
fn the_end_tells_what_was_lost() {
    isolated("full::the_end_tells_what_was_lost", 30, || {
        let (mut from, to) = full_pipe();
        ends_well(noexec(Kind::Foreign, || {
            let builder = Builder::new().output(Output::fd(to.try_clone().expect("a pipe")).expect("a pipe"));
            builder.when_full(WhenFull::Drop).init().expect("the first logger");
            (0..3).for_each(|n| ::log::info!(target: "storm", "record 0 {n}"));
            from.read_exact(&mut [0; libc::PIPE_BUF]).expect("a page");
            std::process::exit(0)
        }));
        drop(to);
        let text = drained(from).join().expect("no panic");
        assert_eq!((lost(&text), text.lines().count()), (3, 1), "{text}");
    });
}
