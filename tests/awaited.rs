//! Threads of carefork's own that others wait for in regions: a pending fork waits for those regions, and must not keep out, meanwhile,
//! the thread that they wait for. The clock stands still: no bound ends.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod adder;
mod common;
mod drive;
mod kit;

use adder::{Message, adder, passed};
use carefork::log::{Builder, Logger, Output};
use carefork::{CareFd, Mutex, OnChild, Reply, Service};
use common::isolated;
use drive::BOTH;
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

type Body = Box<dyn FnOnce() + Send>;

/// A thread does this in a region, when a fork waits for that already.
fn in_the_way(waits: impl Fn() -> Body) {
    held_up(|body| {
        let waits = waits();
        drop(thread::spawn(move || {
            let _region = carefork::no_forking();
            body();
            waits();
        }));
    });
}

/// `in_region` has a thread call what it is given, in a region: that goes on when a fork waits for it.
fn held_up(in_region: impl Fn(Body)) {
    drive::freeze();
    for kind in BOTH {
        let ((tell, told), (go, gone_on)) = (channel(), channel::<()>());
        in_region(Box::new(move || {
            tell.send(()).expect("the test waits");
            let _ = gone_on.recv();
        }));
        told.recv().expect("it enters its region");
        thread::scope(|s| {
            s.spawn(move || {
                drive::until_shut();
                drop(go);
            });
            passed(kind.noexec(|| 0));
        });
    }
    assert!(carefork::stats().dirty == 0 && !carefork::lineage().dirty);
}

/// A log behind a queue that is soon full.
fn full_soon() -> Arc<Logger> {
    Arc::new(Builder::new().output(Output::writer(std::io::sink())).background(1).build())
}

fn log_a_lot(logger: &Logger) {
    let record = || log::Record::builder().level(log::Level::Info).args(format_args!("text")).build();
    (0..20).for_each(|_| log::Log::log(logger, &record()));
}

#[test]
fn a_service_that_hands_its_state_over() {
    isolated("a_service_that_hands_its_state_over", 30, || {
        in_the_way(|| {
            let service = adder(OnChild::HandOver(|state| *state));
            Box::new(move || {
                (0..20).for_each(|n| service.send(Message::Add(n)).expect("sent"));
                assert_eq!(service.call(Message::Sum).expect("an answer"), 190);
                service.stop().expect("it ends well");
            })
        });
    });
}

#[test]
fn a_service_with_locks_and_descriptors_of_its_own() {
    isolated("a_service_with_locks_and_descriptors_of_its_own", 30, || {
        in_the_way(|| {
            let open = || CareFd::open(|| File::open("/dev/null")).expect("it is there");
            let (service, count) = (Service::builder("locks", open), Mutex::new(0));
            let service = service.start(move |file, reply: Reply<()>| {
                *count.lock() += 1;
                *file = open();
                reply.send(());
            });
            let service = service.expect("a thread");
            Box::new(move || {
                service.call(|reply| reply).expect("an answer");
                // Its descriptor is closed by its thread.
                service.stop().expect("it ends well");
            })
        });
    });
}

#[test]
fn a_log_behind_a_queue() {
    isolated("a_log_behind_a_queue", 30, || {
        in_the_way(|| {
            let logger = full_soon();
            Box::new(move || {
                log_a_lot(&logger);
                logger.flush();
            })
        });
    });
}

#[test]
fn a_log_that_leaves_a_file() {
    isolated("a_log_that_leaves_a_file", 30, || {
        in_the_way(|| {
            let output = Output::fd(File::options().write(true).open("/dev/null").expect("it is there"));
            let logger = Builder::new().output(output.expect("a descriptor")).background(1).build();
            // Its thread has it by then.
            log_a_lot(&logger);
            Box::new(move || {
                logger.set_output(Output::writer(std::io::sink()));
                log_a_lot(&logger);
                logger.flush();
            })
        });
    });
}

/// The region that the fork waits for is one that others wait for.
#[test]
fn a_log_that_a_handler_waits_for() {
    isolated("a_log_that_a_handler_waits_for", 30, || {
        held_up(|body| {
            let logger = full_soon();
            let service = adder(OnChild::HandOver(|state| *state));
            let does = Message::Do(Box::new(move |_| {
                body();
                log_a_lot(&logger);
            }));
            service.send(does).expect("sent");
            // Its end would be waited for.
            std::mem::forget(service);
        });
    });
}

#[test]
fn a_log_that_the_end_of_a_thread_waits_for() {
    struct Last(Option<Body>);
    impl Drop for Last {
        fn drop(&mut self) {
            if let Some(body) = self.0.take() {
                body();
            }
        }
    }
    thread_local! {
        static LAST: RefCell<Last> = const { RefCell::new(Last(None)) };
    }
    isolated("a_log_that_the_end_of_a_thread_waits_for", 30, || {
        held_up(|body| {
            let logger = full_soon();
            drop(carefork::thread::spawn(move || {
                LAST.with_borrow_mut(|last| {
                    last.0 = Some(Box::new(move || {
                        body();
                        log_a_lot(&logger);
                    }));
                });
            }));
        });
    });
}

/// A writer that is stuck: the fork says whose region it is, and where in this library it began.
#[test]
fn a_writer_that_is_in_the_way() {
    struct Stuck(Receiver<()>, Sender<()>);
    impl Write for Stuck {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.1.send(()).map_err(io::Error::other)?;
            let _ = self.0.recv();
            Ok(line.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    isolated("a_writer_that_is_in_the_way", 30, || {
        let ((go, gone_on), (tell, told)) = (channel(), channel());
        let logger = Builder::new().output(Output::writer(Stuck(gone_on, tell))).background(1).build();
        log::Log::log(&logger, &log::Record::builder().level(log::Level::Info).build());
        told.recv().expect("it writes");
        // SAFETY: there is no child.
        let refused = unsafe { carefork::ForkOptions::new().timeout(50 * drive::MS).fork() };
        let why = refused.expect_err("it waits for the writer").to_string();
        assert!(why.contains("carefork-log"), "{why}");
        assert!(!cfg!(debug_assertions) || why.contains("src/log/output.rs"), "{why}");
        drop(go);
    });
}

#[test]
fn a_thread_that_is_joined() {
    isolated("a_thread_that_is_joined", 30, || {
        in_the_way(|| {
            let (go, gone_on) = channel::<()>();
            let thread = carefork::thread::spawn(move || gone_on.recv().is_ok());
            Box::new(move || {
                drop(go);
                assert!(!thread.join().expect("no panic"));
            })
        });
    });
}
