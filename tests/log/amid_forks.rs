//! Logging in the middle of a fork: in hooks, at a shut gate, by a record that forks.

use crate::common::{self, isolated};
use crate::drive::{self, Kind};
use crate::logs::{Scratch, by_pid, standard_error_to};
use crate::{ends_well, in_both, log_by, numbered};
use carefork::log::{Builder, Output};
use std::sync::Mutex;
use std::thread;

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
    isolated("amid_forks::a_record_whose_arguments_fork_is_the_parents", 60, || {
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
