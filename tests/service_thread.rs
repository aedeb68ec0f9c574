//! H5: a service as a thread: stopping, panics, its own handler, regions, replies, time.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod adder;
mod common;
mod drive;
mod kit;

use adder::{Counted, Message, add, adder, builder, handle, keep_busy, passed};
use carefork::{OnChild, Reply, Service, ServiceError};
use common::{check, isolated, thread_count};
use drive::{BOTH, Kind, freeze, inside, no_child_left, run_slowly, until, until_shut};
use kit::shared;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

#[test]
fn stop_handles_what_was_sent_before() {
    isolated("stop_handles_what_was_sent_before", 60, || {
        let [handled, ..] = shared();
        let service = Service::builder("slow", || Counted(handled)).capacity(4);
        let service = service.start(move |_, (): ()| add(handled, 100)).expect("a thread");
        thread::scope(|s| {
            for _ in 0..50 {
                service.send(()).expect("sent");
            }
            // Whoever stops it comes back when all is done.
            for _ in 0..4 {
                s.spawn(|| {
                    service.stop().expect("no panic");
                    assert_eq!(handled.load(SeqCst), 50 * 100 + 1);
                });
            }
        });
        assert!(matches!(service.send(()), Err(e) if matches!(e.error, ServiceError::Stopped { service: "slow" })));
        assert!(matches!(service.flush(), Err(ServiceError::Stopped { .. })));
        // What has ended stays so in a child.
        for kind in BOTH {
            passed(kind.noexec(|| {
                check(1, matches!(service.send(()), Err(e) if matches!(e.error, ServiceError::Stopped { .. })));
                check(2, matches!(service.flush(), Err(ServiceError::Stopped { .. })));
                0
            }));
        }
    });
}

#[test]
fn a_panic_ends_it() {
    isolated("a_panic_ends_it", 60, || {
        for on_child in [OnChild::Restart, OnChild::HandOver(|sum| *sum)] {
            let service = adder(on_child);
            service.send(Message::Do(Box::new(|_| panic!("on purpose")))).expect("sent");
            let panicked = |e: &ServiceError| matches!(e, ServiceError::Panicked { service: "adder" });
            let mut sent = 0_u64;
            let error = loop {
                match service.send(Message::Add(1)) {
                    Ok(()) => sent += 1,
                    Err(e) => break e,
                }
            };
            assert!(panicked(&error.error) && sent < 1_000_000, "{error:?} after {sent}");
            assert!(service.call(Message::Sum).is_err_and(|e| panicked(&e)));
            assert!(service.flush().is_err_and(|e| panicked(&e)));
            for kind in BOTH {
                passed(kind.noexec(|| {
                    check(1, service.send(Message::Add(1)).is_err_and(|e| panicked(&e.error)));
                    check(2, service.stop().is_err_and(|e| panicked(&e)));
                    0
                }));
            }
            assert!(service.stop().is_err_and(|e| panicked(&e)));
            assert!(service.stop().is_err_and(|e| panicked(&e)));
        }
    });
}

#[test]
fn what_was_queued_at_a_panic_is_dropped() {
    isolated("what_was_queued_at_a_panic_is_dropped", 60, || {
        let [dropped, ..] = shared();
        let (go, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let service = Service::builder("fragile", || ()).start(move |(), _: Counted| {
            let _ = wait.lock().expect("no panic holds it").recv();
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        let service = service.expect("a thread");
        for _ in 0..5 {
            service.send(Counted(dropped)).expect("sent");
        }
        drop(go);
        assert!(matches!(service.stop(), Err(ServiceError::Panicked { .. })));
        // Not only with the service.
        assert_eq!(dropped.load(SeqCst), 5);
    });
}

#[test]
fn an_unbounded_service_is_never_full() {
    isolated("an_unbounded_service_is_never_full", 60, || {
        let service = builder(OnChild::Restart).capacity(1).unbounded().start(handle).expect("a thread");
        let go = keep_busy(&service);
        for _ in 0..5000 {
            assert!(service.try_send(Message::Add(1)).is_ok());
        }
        drop(go);
        assert_eq!(service.call(Message::Sum).expect("an answer"), 5000);
        service.stop().expect("no panic");
    });
}

#[test]
#[should_panic(expected = "a service's channel holds at least one message")]
fn a_service_without_room_is_refused() {
    drop(builder(OnChild::Restart).capacity(0));
}

/// Whoever waits for it is told, whatever it waits in, also those who found room in the channel as it ended.
#[test]
fn a_panic_wakes_those_who_wait() {
    isolated("a_panic_wakes_those_who_wait", 60, || {
        for _ in 0..100 {
            let service = builder(OnChild::Restart).capacity(1).start(handle).expect("a thread");
            let go = keep_busy(&service);
            let panics = |_: &mut u64| std::panic::resume_unwind(Box::new("on purpose"));
            service.send(Message::Do(Box::new(panics))).expect("sent");
            assert!(
                matches!(service.try_send(Message::Add(1)), Err(e) if matches!(e.error, ServiceError::Full { .. }))
            );
            thread::scope(|s| {
                let waiting = [
                    s.spawn(|| service.send(Message::Add(1)).map_err(|e| e.error)),
                    s.spawn(|| service.call(Message::Sum).map(drop)),
                    s.spawn(|| service.flush()),
                ];
                thread::sleep(drive::MS);
                drop(go);
                for (i, thread) in waiting.into_iter().enumerate() {
                    let end = thread.join().expect("no panic");
                    let sent = i == 0 && end.is_ok();
                    let told = matches!(end, Err(ServiceError::Panicked { .. }));
                    assert!(sent || told, "{i}: {end:?}");
                }
            });
        }
    });
}

/// The same where it is stopped.
#[test]
fn stopped_while_others_wait() {
    isolated("stopped_while_others_wait", 60, || {
        for i in 0..200 {
            let service = builder(OnChild::Restart).capacity(1 + i % 3).start(handle).expect("a thread");
            thread::scope(|s| {
                let send = || while service.send(Message::Add(1)).is_ok() {};
                let call = || while service.call(Message::Sum).is_ok() {};
                let flush = || while service.flush().is_ok() {};
                let threads = [s.spawn(send), s.spawn(call), s.spawn(call), s.spawn(flush), s.spawn(flush)];
                service.stop().expect("no panic");
                for thread in threads {
                    thread.join().expect("no panic");
                }
            });
            assert!(matches!(service.flush(), Err(ServiceError::Stopped { .. })));
        }
    });
}

#[test]
fn in_its_own_handler() {
    isolated("in_its_own_handler", 60, || {
        for on_child in [OnChild::Restart, OnChild::HandOver(|sum| *sum)] {
            let service = Arc::new(builder(on_child).capacity(1).start(handle).expect("a thread"));
            let (tell, told) = mpsc::channel();
            let (own, first) = (Arc::clone(&service), tell.clone());
            let f = move |_: &mut u64| {
                let room = own.send(Message::Add(1)).is_ok();
                let full = matches!(own.send(Message::Add(1)), Err(e) if matches!(e.error, ServiceError::Full { .. }));
                let call = matches!(own.call(Message::Sum), Err(ServiceError::OwnThread { service: "adder" }));
                let flush = matches!(own.flush(), Err(ServiceError::OwnThread { .. }));
                first.send((room, full, call, flush)).expect("the test waits");
            };
            service.send(Message::Do(Box::new(f))).expect("sent");
            assert_eq!(told.recv().expect("it is handled"), (true, true, true, true));
            assert_eq!(service.call(Message::Sum).expect("an answer"), 1);

            // Stopped there: it ends after what is queued.
            let own = Arc::clone(&service);
            let (wait, go) = mpsc::channel::<()>();
            let f = move |_: &mut u64| {
                let _ = go.recv();
                own.stop().expect("no panic");
            };
            service.send(Message::Do(Box::new(f))).expect("sent");
            let (tell, told) = mpsc::channel();
            service.send(Message::Do(Box::new(move |_| tell.send(()).expect("the test waits")))).expect("sent");
            drop(wait);
            told.recv().expect("handled");
            service.stop().expect("no panic");
        }
    });
}

#[test]
fn dropped_in_its_own_handler() {
    isolated("dropped_in_its_own_handler", 60, || {
        let [states, ..] = shared();
        let hand_over: fn(&Counted) -> Counted = |s| Counted(s.0);
        let threads = thread_count();
        for (i, on_child) in [(1, OnChild::Restart), (2, OnChild::HandOver(hand_over))] {
            let place = Arc::new(Mutex::new(None::<Service<()>>));
            let own = Arc::clone(&place);
            let service = Service::builder("last", || Counted(states)).on_child(on_child);
            let service = service.start(move |_, ()| drop(own.lock().expect("no panic").take())).expect("a thread");
            let mut locked = place.lock().expect("no panic");
            service.send(()).expect("sent");
            *locked = Some(service);
            drop(locked);
            until(|| states.load(SeqCst) == i && thread_count() == threads);
            // The region of the thread's end is over.
            passed(Kind::Coordinated.fork(|| 0));
        }
    });
}

#[test]
fn dropped_inside_a_region() {
    isolated("dropped_inside_a_region", 60, || {
        let _clock = run_slowly();
        for on_child in [OnChild::Restart, OnChild::HandOver(|sum| *sum)] {
            let service = builder(on_child).eager().start(handle).expect("a thread");
            let region = carefork::no_forking();
            let forker = thread::spawn(|| passed(Kind::Foreign.fork(|| 0)));
            until_shut();
            for _ in 0..10 {
                service.send(Message::Add(1)).expect("sent");
            }
            assert_eq!(service.call(Message::Sum).expect("an answer"), 10);
            drop(service);
            drop(region);
            forker.join().expect("no panic");
        }
        assert!(!carefork::lineage().dirty && carefork::stats().dirty == 0 && no_child_left());
    });
}

#[test]
fn the_thread_goes_on_while_a_fork_is_pending() {
    isolated("the_thread_goes_on_while_a_fork_is_pending", 60, || {
        let handled = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&handled);
        let service = Service::builder("counter", || ()).start(move |(), ()| add(&count, 1));
        let service = service.expect("a thread");
        let other = inside("sleeper");
        freeze();
        let forker = thread::spawn(|| passed(Kind::Foreign.fork(|| 0)));
        // With the clock at a standstill nobody reopens it.
        until_shut();
        for _ in 0..1000 {
            service.send(()).expect("sent");
        }
        until(|| handled.load(SeqCst) == 1000);
        service.flush().expect("flushed");
        assert!(carefork::try_no_forking().is_none(), "the fork was pending all the time");
        other.leave();
        forker.join().expect("no panic");
    });
}

#[test]
fn replies() {
    isolated("replies", 20, || {
        let kept = Arc::new(Mutex::new(Vec::<Reply<u64>>::new()));
        let keep = Arc::clone(&kept);
        let service = Service::builder("later", || ()).start(move |(), (later, reply): (bool, Reply<u64>)| {
            if later {
                keep.lock().expect("no panic").push(reply);
            }
        });
        let service = service.expect("a thread");
        assert!(matches!(service.call(|r| (false, r)), Err(ServiceError::NoReply { service: "later" })));
        thread::scope(|s| {
            let caller = s.spawn(|| service.call(|r| (true, r)));
            until(|| !kept.lock().expect("no panic").is_empty());
            kept.lock().expect("no panic").remove(0).send(6);
            assert_eq!(caller.join().expect("no panic").expect("an answer"), 6);
        });
    });
}

#[test]
fn every_so_often_at_flush_and_at_the_end() {
    isolated("every_so_often_at_flush_and_at_the_end", 60, || {
        let [runs, ..] = shared();
        let often = Service::builder("often", || ()).every(Duration::from_micros(100), |()| add(runs, 1));
        let often = often.start(|(), ()| ()).expect("a thread");
        until(|| runs.load(SeqCst) > 3);
        drop(often);

        runs.store(0, SeqCst);
        let rare = Service::builder("rare", || 0).every(Duration::MAX, |n: &mut u64| add(runs, *n));
        let rare = rare.start(|n, more: u64| *n += more).expect("a thread");
        rare.send(7).expect("sent");
        rare.flush().expect("flushed");
        assert_eq!(runs.load(SeqCst), 7);
        for kind in BOTH {
            passed(kind.noexec(|| {
                rare.send(1).expect("sent");
                rare.flush().expect("flushed");
                0
            }));
        }
        assert_eq!(runs.load(SeqCst), 9);
        rare.stop().expect("no panic");
        assert_eq!(runs.load(SeqCst), 16);
    });
}

#[test]
fn a_channel_that_is_never_empty_does_not_keep_it_from_its_time() {
    isolated("a_channel_that_is_never_empty_does_not_keep_it_from_its_time", 60, || {
        static SERVICE: OnceLock<Service<()>> = OnceLock::new();
        let [runs, ..] = shared();
        let service = Service::builder("own best customer", || ()).every(Duration::from_micros(100), |()| add(runs, 1));
        // Each message sends the next, until it is stopped.
        let service = service.start(|(), ()| drop(SERVICE.get().map(|own| own.send(()))));
        let service = SERVICE.get_or_init(|| service.expect("a thread"));
        service.send(()).expect("sent");
        until(|| runs.load(SeqCst) > 3);
        service.stop().expect("no panic");
    });
}

/// std takes a lock in a thread's first and last steps that threads of a child need.
#[test]
fn no_fork_comes_while_its_thread_begins_or_ends() {
    /// Asks, among the last things that a thread does, whether a fork would be one inside a region of its own.
    struct Last(Cell<Option<mpsc::Sender<bool>>>);
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
    isolated("no_fork_comes_while_its_thread_begins_or_ends", 60, || {
        let named = || {
            let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
            let names = tasks.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok());
            names.filter(|name| name == "brief\n").count()
        };
        for i in 0..100 {
            let service = Service::builder("brief", || ()).start(|(), tell| LAST.with(|last| last.0.set(Some(tell))));
            let service = service.expect("a thread");
            // A thread gives itself its name, in its first steps. One that was joined may still be listed.
            assert!(named() > 0, "round {i}: the thread has not begun");
            let (tell, told) = mpsc::channel();
            service.send(tell).expect("sent");
            drop(service);
            assert!(told.recv().expect("told"), "the thread ended outside of a region");
            until(|| named() == 0);
        }
    });
}

/// An interval that is over at once takes no turn from messages.
#[test]
fn an_interval_of_nothing_lets_messages_through() {
    isolated("an_interval_of_nothing_lets_messages_through", 30, || {
        let service = Service::builder("busy", || 0u64)
            .every(Duration::ZERO, |ran| *ran += 1)
            .start(|ran, reply: Reply<u64>| reply.send(*ran))
            .expect("a thread");
        for _ in 0..100 {
            service.call(|reply| reply).expect("an answer");
        }
        service.flush().expect("flushed");
        assert!(service.call(|reply| reply).expect("an answer") > 0, "it never ran");
        service.stop().expect("no panic");
    });
}
