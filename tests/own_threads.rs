//! The threads that carefork starts, for itself and for users: no fork comes while one begins or ends (std takes a lock in a thread's first and last
//! steps that threads of a child need).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::log::{Builder, Output};
use carefork::{ForkOptions, Reaper};
use common::{isolated, raw};
use kit::{SOON, Stop, forked};
use std::cell::Cell;
use std::io::{self, Write};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Instant;

/// Asks, among the last things that a thread does, whether a fork would be one inside a region of its own.
struct Last(Cell<Option<Sender<bool>>>);

impl Drop for Last {
    fn drop(&mut self) {
        // SAFETY: the child exits at once.
        let in_region = match unsafe { carefork::fork() } {
            Err(carefork::ForkError::Forbidden { .. }) => true,
            Ok(carefork::Fork::Child(child)) => child.exit(0),
            Ok(carefork::Fork::Parent(mut child)) => !child.wait().is_ok_and(|status| status.success()),
            Err(_) => false,
        };
        self.0.take().map(|tell| tell.send(in_region));
    }
}

thread_local! {
    static LAST: Last = const { Last(Cell::new(None)) };
}

/// Whether a thread of that name has begun: it gives itself its name, in its first steps.
fn runs(name: &str) -> bool {
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
    tasks.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok()).any(|n| n.trim_end() == name)
}

#[track_caller]
fn until_gone(name: &str) {
    let end = Instant::now() + raw::patience(SOON);
    while runs(name) {
        assert!(Instant::now() < end, "{name} goes on");
        thread::yield_now();
    }
}

#[test]
fn a_reapers() {
    isolated("a_reapers", 60, || {
        for i in 0..100 {
            let reaper = Reaper::new().expect("a reaper");
            drop(reaper.receiver().expect("a thread"));
            assert!(runs("carefork-reaper"), "round {i}: the thread has not begun");
            let (tell, told) = channel();
            reaper
                .watch(forked(&ForkOptions::new(), |_| 0), |_| LAST.with(|last| last.0.set(Some(tell))))
                .expect("watched");
            while !reaper.is_empty() {
                thread::yield_now();
            }
            drop(reaper);
            // Where the callback came too late it was dropped.
            assert!(told.recv_timeout(SOON).unwrap_or(true), "the thread ended outside of a region");
            until_gone("carefork-reaper");
        }
    });
}

struct Teller(Option<Sender<bool>>);

impl Write for Teller {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(tell) = self.0.take() {
            LAST.with(|last| last.0.set(Some(tell)));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_users() {
    isolated("a_users", 60, || {
        for i in 0..100 {
            let ((tell, told), (go, gone_on)) = (channel(), channel::<()>());
            let builder = carefork::thread::Builder::new().name("user".to_owned());
            let body = move || {
                let _ = gone_on.recv();
                LAST.with(|last| last.0.set(Some(tell)));
            };
            let in_region = thread::scope(|s| {
                match i % 3 {
                    0 => drop(builder.spawn(body).expect("a thread")),
                    1 => drop(builder.spawn_scoped(s, body).expect("a thread")),
                    _ => {
                        let panics = move || {
                            body();
                            // No message: the hook is not called.
                            std::panic::resume_unwind(Box::new(()))
                        };
                        drop(builder.spawn(panics).expect("a thread"));
                    }
                }
                assert!(runs("user"), "round {i}: the thread has not begun");
                drop(go);
                told.recv_timeout(SOON).expect("told")
            });
            assert!(in_region, "the thread ended outside of a region");
            until_gone("user");
        }
        assert_eq!(carefork::thread::spawn(|| 6 * 7).join().expect("no panic"), 42);
    });
}

/// Children start threads while the parent's come and go. (With std's threads in the parent, one child in some thousand hangs.)
#[test]
fn children_start_threads() {
    isolated("children_start_threads", 300, || {
        let stop = Stop::default();
        thread::scope(|s| {
            let _stop = stop.on_drop();
            for _ in 0..3 {
                s.spawn(|| {
                    while !stop.is_set() {
                        carefork::thread::spawn(|| ()).join().expect("no panic");
                    }
                });
            }
            for _ in 0..2000 {
                let mut child = forked(&ForkOptions::new(), |token| {
                    // SAFETY: nothing borrowed is used.
                    unsafe { token.cleanup() };
                    i32::from(thread::spawn(|| 7).join().ok() != Some(7))
                });
                assert_eq!(kit::code(&mut child), 0);
            }
        });
    });
}

#[test]
fn a_loggers() {
    isolated("a_loggers", 60, || {
        for i in 0..100 {
            let (tell, told) = channel();
            let logger = Builder::new().output(Output::writer(Teller(Some(tell)))).background(10).build();
            ::log::Log::log(&logger, &::log::Record::builder().args(format_args!("one")).build());
            assert!(runs("carefork-log"), "round {i}: the thread has not begun");
            drop(logger);
            assert!(told.recv_timeout(SOON).expect("told"), "the thread ended outside of a region");
            until_gone("carefork-log");
        }
    });
}
