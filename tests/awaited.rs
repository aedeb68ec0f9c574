//! Threads of carefork's own that others wait for in regions: a pending fork waits for those regions, and must not keep out, meanwhile,
//! the thread that they wait for. The clock stands still: no bound ends.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod adder;
mod common;
mod drive;
mod kit;

use adder::{Message, adder, passed};
use carefork::OnChild;
use carefork::log::{Builder, Output};
use common::isolated;
use drive::BOTH;
use std::sync::mpsc::channel;
use std::thread;

/// A thread does this in a region, when a fork waits for that already.
fn in_the_way(waits: impl Fn() -> Box<dyn FnOnce() + Send>) {
    drive::freeze();
    for kind in BOTH {
        let (waits, (tell, told), (go, gone_on)) = (waits(), channel(), channel::<()>());
        thread::scope(|s| {
            s.spawn(move || {
                let _region = carefork::no_forking();
                tell.send(()).expect("the test waits");
                let _ = gone_on.recv();
                waits();
            });
            told.recv().expect("it enters its region");
            s.spawn(move || {
                drive::until_shut();
                drop(go);
            });
            passed(kind.noexec(|| 0));
        });
    }
    assert!(carefork::stats().dirty == 0 && !carefork::lineage().dirty);
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
fn a_log_behind_a_queue() {
    isolated("a_log_behind_a_queue", 30, || {
        in_the_way(|| {
            let logger = Builder::new().output(Output::writer(std::io::sink())).background(1).build();
            Box::new(move || {
                let record = || log::Record::builder().level(log::Level::Info).args(format_args!("text")).build();
                (0..20).for_each(|_| log::Log::log(&logger, &record()));
                logger.flush();
            })
        });
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
