//! Logging in the middle of a fork: in hooks, at a shut gate, by a record that forks.

use crate::common::{isolated, raw};
use crate::drive::{self, BOTH, Kind};
use crate::logs::{Scratch, by_pid, standard_error_to};
use crate::{ends_well, in_both, log_by, logger_of, messages, numbered};
use carefork::log::{Builder, Logger, Output};
use carefork::{Fork, ForkOptions};
use std::cell::Cell;
use std::fmt;
use std::io::Write;
use std::sync::Mutex;
use std::thread;
use tracing_subscriber::fmt::MakeWriter;

/// Forks and goes on in both; the child's number, 0 in the child.
fn split(kind: Kind) -> i32 {
    drive::freeze();
    match kind {
        // SAFETY: the child uses what is the log's only, and ends.
        Kind::Foreign => unsafe { libc::fork() },
        // SAFETY: as above.
        Kind::Coordinated => match unsafe { ForkOptions::new().timeout_never().fork() }.expect("a child") {
            Fork::Parent(child) => i32::try_from(child.into_id()).expect("a pid"),
            Fork::Child(token) => {
                std::mem::forget(token);
                0
            }
        },
    }
}

/// Forks in the middle of its text, the first `times` times that it is formatted.
struct Forks {
    kind: Kind,
    times: Cell<u32>,
    child: Cell<i32>,
}

impl Forks {
    fn new(kind: Kind, times: u32) -> Forks {
        Forks { kind, times: Cell::new(times), child: Cell::new(-1) }
    }
}

impl fmt::Display for Forks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("first half,")?;
        if self.times.get() > 0 {
            self.times.set(self.times.get() - 1);
            self.child.set(split(self.kind));
        }
        f.write_str(" second half")
    }
}

/// Runs `record` with a value that forks: the record is there once, whole, of the parent; what the child logs next goes to fd 2.
#[track_caller]
fn is_the_parents_alone(kind: Kind, logger: &Logger, file: &Scratch, record: impl Fn(&Forks)) {
    let error = Scratch::new("error");
    let redirected = standard_error_to(&error);
    let forks = Forks::new(kind, 1);
    record(&forks);
    if forks.child.get() == 0 {
        log_by(logger, "the child goes on");
        raw::exit_now(0);
    }
    ends_well(forks.child.get());
    logger.flush();
    drop(redirected);
    assert_eq!(messages(&file.text()), ["first half, second half"], "{kind:?}");
    assert_eq!(messages(&error.text()), ["the child goes on"], "{kind:?}");
    assert_eq!(by_pid(&error.text()).into_keys().collect::<Vec<_>>(), [forks.child.get() as u32]);
}

#[test]
fn a_record_that_forks_half_way_is_the_parents() {
    isolated("amid_forks::a_record_that_forks_half_way_is_the_parents", 60, || {
        for kind in BOTH {
            for n in 0..4 {
                let file = Scratch::new("half");
                let logger = logger_of(&file, n);
                is_the_parents_alone(kind, &logger, &file, |forks| {
                    let builder = &mut ::log::Record::builder();
                    ::log::Log::log(&logger, &builder.level(::log::Level::Info).args(format_args!("{forks}")).build());
                });
            }
        }
    });
}

/// A filter by text formats the record first, to see whether it fits.
#[test]
fn a_record_that_forks_in_a_filter_by_text_is_the_parents() {
    isolated("amid_forks::a_record_that_forks_in_a_filter_by_text_is_the_parents", 60, || {
        for kind in BOTH {
            let file = Scratch::new("filter");
            let builder = Builder::new().filters("info/on").expect("a filter");
            let logger = builder.output(Output::file(&file.0).expect("a file")).build();
            is_the_parents_alone(kind, &logger, &file, |forks| {
                let builder = &mut ::log::Record::builder();
                ::log::Log::log(&logger, &builder.level(::log::Level::Info).args(format_args!("{forks}")).build());
            });
        }
    });
}

/// What somebody writes piece by piece into a `RecordWriter`, with a fork between two pieces.
#[test]
fn a_record_writer_that_forks_half_way_is_the_parents() {
    isolated("amid_forks::a_record_writer_that_forks_half_way_is_the_parents", 60, || {
        for kind in BOTH {
            for n in 0..4 {
                let file = Scratch::new("pieces");
                let logger = logger_of(&file, n);
                is_the_parents_alone(kind, &logger, &file, |forks| {
                    let mut writer = logger.make_writer();
                    writeln!(writer, "head: {forks}").expect("into memory");
                });
            }
        }
    });
}

/// The first words of a fresh child, in its at-fork handlers, are the child's already.
#[test]
fn hooks_may_log() {
    isolated("amid_forks::hooks_may_log", 60, || {
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
    isolated("amid_forks::a_thread_logs_while_the_gate_is_shut", 60, || {
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
