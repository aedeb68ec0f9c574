//! H5: a service in the parent and in its children, one behaviour at a time. `service_forks.rs` has the thousands of forks.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;
mod kit;

use carefork::{OnChild, Reply, Service, ServiceError};
use common::{Verdict, check, isolated, raw, reap, seccomp_refuse, thread_count};
use drive::{BOTH, Kind, SOON, freeze, inside, no_child_left, until, until_shut};
use kit::{captured, shared};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

const NEVER: Duration = Duration::MAX;

/// A service that adds up, and says its sum.
enum Message {
    Add(u64),
    Sum(Reply<u64>),
    /// Tells that it is being handled, then waits until the sender is gone.
    Wait(mpsc::Sender<()>, mpsc::Receiver<()>),
    Do(Box<dyn FnOnce(&mut u64) + Send>),
}

fn adder(on_child: OnChild<u64>) -> Service<Message> {
    builder(on_child).start(handle).expect("a thread")
}

fn builder(on_child: OnChild<u64>) -> carefork::ServiceBuilder<u64> {
    Service::builder("adder", || 0).on_child(on_child)
}

fn add(to: &AtomicU64, n: u64) {
    to.fetch_add(n, SeqCst);
}

fn handle(sum: &mut u64, message: Message) {
    match message {
        Message::Add(n) => *sum += n,
        Message::Sum(reply) => reply.send(*sum),
        Message::Wait(begun, go) => {
            begun.send(()).expect("the test waits");
            let _ = go.recv();
        }
        Message::Do(f) => f(sum),
    }
}

/// Has the service handle a message until the result is dropped.
fn keep_busy(service: &Service<Message>) -> mpsc::Sender<()> {
    let (begun, begins) = mpsc::channel();
    let (go, wait) = mpsc::channel();
    service.send(Message::Wait(begun, wait)).expect("sent");
    begins.recv().expect("it is handled");
    go
}

#[track_caller]
fn passed(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

#[test]
fn a_child_starts_empty_at_the_first_message() {
    isolated("a_child_starts_empty_at_the_first_message", 60, || {
        let service = adder(OnChild::Restart);
        service.send(Message::Add(5)).expect("sent");
        assert_eq!(service.call(Message::Sum).expect("an answer"), 5);
        let fds = common::self_fds();
        for kind in BOTH {
            passed(kind.noexec(|| {
                check(1, thread_count() == 1);
                // Nothing was sent, nothing is to be waited for.
                check(2, service.flush().is_ok() && thread_count() == 1);
                check(3, service.call(Message::Sum).is_ok_and(|sum| sum == 0));
                check(4, thread_count() == 2);
                service.send(Message::Add(3)).expect("sent");
                service.try_send(Message::Add(1)).expect("sent");
                check(5, service.call(Message::Sum).is_ok_and(|sum| sum == 4));
                check(6, thread_count() == 2 && common::self_fds().first_not_in(&fds).is_none());
                check(7, service.stop().is_ok());
                // The kernel counts a thread that was joined for a moment more.
                until(|| thread_count() == 1);
                0
            }));
        }
        assert_eq!(service.call(Message::Sum).expect("an answer"), 5);
    });
}

#[test]
fn what_was_queued_is_the_parents() {
    isolated("what_was_queued_is_the_parents", 60, || {
        let service = adder(OnChild::Restart);
        for kind in BOTH {
            let go = keep_busy(&service);
            for _ in 0..100 {
                service.send(Message::Add(1)).expect("sent");
            }
            passed(kind.noexec(|| {
                check(1, service.call(Message::Sum).is_ok_and(|sum| sum == 0));
                0
            }));
            drop(go);
        }
        assert_eq!(service.call(Message::Sum).expect("an answer"), 200);
    });
}

#[test]
fn a_state_is_handed_over() {
    isolated("a_state_is_handed_over", 60, || {
        let service = adder(OnChild::HandOver(|sum| sum + 100));
        service.send(Message::Add(5)).expect("sent");
        service.flush().expect("flushed");
        for kind in BOTH {
            passed(kind.noexec(|| {
                service.send(Message::Add(1)).expect("sent");
                check(1, service.call(Message::Sum).is_ok_and(|sum| sum == 106));
                0
            }));
        }
        assert_eq!(service.call(Message::Sum).expect("an answer"), 5);
    });
}

#[test]
fn it_does_not_run_where_it_should_not() {
    isolated("it_does_not_run_where_it_should_not", 60, || {
        let not_here = |service: &Service<Message>| {
            let refused = |e: &ServiceError| matches!(e, ServiceError::NotRestarted { service: "adder" });
            let back = service.send(Message::Add(7)).expect_err("a child");
            check(1, refused(&back.error) && matches!(back.message, Message::Add(7)));
            check(2, service.try_send(Message::Add(7)).is_err_and(|e| refused(&e.error)));
            check(3, service.call(Message::Sum).is_err_and(|e| refused(&e)));
            check(4, service.flush().is_err_and(|e| refused(&e)));
            check(5, thread_count() == 1);
            check(6, service.stop().is_ok());
            0
        };
        for on_child in [OnChild::Nothing, OnChild::Restart, OnChild::HandOver(|sum| *sum)] {
            let service = builder(on_child).eager().start(handle).expect("a thread");
            for kind in BOTH {
                // No clean-up.
                passed(kind.fork(|| not_here(&service)));
                if matches!(on_child, OnChild::Nothing) {
                    passed(kind.noexec(|| not_here(&service)));
                }
            }
            service.send(Message::Add(1)).expect("sent");
            assert_eq!(service.call(Message::Sum).expect("an answer"), 1);
        }
    });
}

#[test]
fn generations() {
    isolated("generations", 60, || {
        // Each generation hands over one more than it got.
        let service = adder(OnChild::HandOver(|sum| sum + 1));
        fn deeper(service: &Service<Message>, depth: u64, handed_over: u64) -> i32 {
            if depth == 10 {
                return 0;
            }
            let kind = BOTH[depth as usize % 2];
            // Some use it, some do not, some do not even clean up: the state is that of the last who did.
            let pid = match depth % 3 {
                0 => kind.noexec(|| {
                    check(1, service.call(Message::Sum).is_ok_and(|sum| sum == handed_over + 1));
                    deeper(service, depth + 1, handed_over + 1)
                }),
                1 => kind.noexec(|| deeper(service, depth + 1, handed_over)),
                _ => kind.fork(|| deeper(service, depth + 1, handed_over)),
            };
            i32::from(reap(pid, SOON) != Verdict::Exited(0))
        }
        assert_eq!(deeper(&service, 0, 0), 0);
        assert_eq!(service.call(Message::Sum).expect("an answer"), 0);
    });
}

/// Counts where it is dropped, in which process ever.
struct Counted(&'static AtomicU64);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[test]
fn a_child_drops_its_own_and_nothing_of_the_parents() {
    isolated("a_child_drops_its_own_and_nothing_of_the_parents", 60, || {
        let [states, messages, ..] = shared();
        let hand_over: fn(&Counted) -> Counted = |s| Counted(s.0);
        for on_child in [OnChild::Nothing, OnChild::Restart, OnChild::HandOver(hand_over)] {
            for kind in BOTH {
                let (before, sent) = (states.load(SeqCst), messages.load(SeqCst));
                let service = Service::builder("counted", || Counted(states)).on_child(on_child);
                let service = service.start(|_, _: Counted| ()).expect("a thread");
                let mut service = Some(service);
                let send = |s: &Option<Service<_>>| s.as_ref().expect("not dropped").send(Counted(messages)).is_ok();
                assert!(send(&service));
                passed(kind.noexec(|| {
                    drop(service.take());
                    check(1, states.load(SeqCst) == before);
                    0
                }));
                passed(kind.fork(|| {
                    drop(service.take());
                    check(1, states.load(SeqCst) == before);
                    0
                }));
                if !matches!(on_child, OnChild::Nothing) {
                    passed(kind.noexec(|| {
                        check(2, send(&service));
                        drop(service.take());
                        // Stopped and joined: the message was handled, the state is gone.
                        check(1, states.load(SeqCst) == before + 1);
                        0
                    }));
                }
                drop(service.take());
                let with_child = u64::from(!matches!(on_child, OnChild::Nothing));
                assert_eq!(states.load(SeqCst), before + 1 + with_child);
                assert_eq!(messages.load(SeqCst), sent + 1 + with_child);
            }
        }
    });
}

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
fn a_child_that_stops_it_stops_its_own() {
    isolated("a_child_that_stops_it_stops_its_own", 60, || {
        let service = adder(OnChild::Restart);
        for kind in BOTH {
            passed(kind.noexec(|| {
                check(1, service.stop().is_ok());
                let refused = service.send(Message::Add(1)).expect_err("stopped");
                check(2, matches!(refused.error, ServiceError::Stopped { .. }) && thread_count() == 1);
                0
            }));
        }
        service.send(Message::Add(1)).expect("the parent's runs");
        assert_eq!(service.call(Message::Sum).expect("an answer"), 1);
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

/// Whoever waits for it is told, whatever it waits in.
#[test]
fn a_panic_wakes_those_who_wait() {
    isolated("a_panic_wakes_those_who_wait", 60, || {
        let service = builder(OnChild::Restart).capacity(1).start(handle).expect("a thread");
        let go = keep_busy(&service);
        service.send(Message::Do(Box::new(|_| panic!("on purpose")))).expect("sent");
        assert!(matches!(service.try_send(Message::Add(1)), Err(e) if matches!(e.error, ServiceError::Full { .. })));
        thread::scope(|s| {
            let waiting = [
                s.spawn(|| service.send(Message::Add(1)).map_err(|e| e.error)),
                s.spawn(|| service.call(Message::Sum).map(drop)),
                s.spawn(|| service.flush()),
            ];
            drive::a_while();
            drop(go);
            for (i, thread) in waiting.into_iter().enumerate() {
                let end = thread.join().expect("no panic");
                // One of them found room before the panic.
                let sent = i == 0 && end.is_ok();
                let told = matches!(end, Err(ServiceError::Panicked { .. }));
                assert!(sent || told, "{i}: {end:?}");
            }
        });
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
        for on_child in [OnChild::Restart, OnChild::HandOver(|sum| *sum)] {
            let service = adder(on_child);
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
fn a_fork_waits_for_one_message_and_names_it() {
    isolated("a_fork_waits_for_one_message_and_names_it", 60, || {
        let short = carefork::ForkOptions::new().timeout(Duration::from_millis(20));
        // Handed over: in the middle of a message there is no fork.
        let service = adder(OnChild::HandOver(|sum| *sum));
        let go = keep_busy(&service);
        match drive::fork_with(&short, || 0) {
            Err(carefork::ForkError::Busy { culprits }) => {
                assert_eq!((culprits.count, &*culprits.threads[0].name), (1, "adder"), "{culprits}");
            }
            other => panic!("{other:?}"),
        }
        service.send(Message::Add(2)).expect("sent");
        let forker = thread::spawn(|| passed(Kind::Foreign.fork(|| 0)));
        until_shut();
        drop(go);
        forker.join().expect("no panic");
        assert_eq!(carefork::stats().dirty, 0);
        assert_eq!(service.call(Message::Sum).expect("an answer"), 2);

        // Nothing to hand over, nothing to wait for.
        for on_child in [OnChild::Restart, OnChild::Nothing] {
            let service = adder(on_child);
            let go = keep_busy(&service);
            for kind in BOTH {
                passed(kind.noexec(|| i32::from(service.send(Message::Add(1)).is_ok() != service.flush().is_ok())));
            }
            drop(go);
        }
    });
}

#[test]
fn a_child_of_the_handler() {
    isolated("a_child_of_the_handler", 60, || {
        static SERVICE: std::sync::OnceLock<[Service<Message>; 2]> = std::sync::OnceLock::new();
        let services = [adder(OnChild::Restart), adder(OnChild::HandOver(|sum| *sum))];
        let services = SERVICE.get_or_init(|| services);
        for (i, service) in services.iter().enumerate() {
            for kind in BOTH {
                let (tell, told) = mpsc::channel();
                // The child's one thread is a copy of the service's.
                let f = move |_: &mut u64| {
                    let own = &SERVICE.get().expect("set")[i];
                    let pid = kind.noexec(|| match (i, own.send(Message::Add(1))) {
                        (0, Ok(())) => i32::from(own.call(Message::Sum).ok() != Some(1)),
                        (1, Err(e)) => i32::from(!matches!(e.error, ServiceError::StateLost { .. })),
                        _ => 2,
                    });
                    tell.send(pid).expect("the test waits");
                };
                service.send(Message::Do(Box::new(f))).expect("sent");
                passed(told.recv().expect("forked"));

                // One that returns would handle the parent's messages.
                let said = captured(2, || {
                    let (tell, told) = mpsc::channel();
                    let f = move |_: &mut u64| match kind {
                        // SAFETY: the child only returns.
                        Kind::Foreign => tell.send(unsafe { libc::fork() }).expect("a channel"),
                        // SAFETY: as above.
                        Kind::Coordinated => match unsafe { carefork::fork() }.expect("a child") {
                            carefork::Fork::Parent(child) => tell.send(child.id() as i32).expect("the test waits"),
                            carefork::Fork::Child(_token) => {}
                        },
                    };
                    service.send(Message::Do(Box::new(f))).expect("sent");
                    assert_eq!(reap(told.recv().expect("forked"), SOON), Verdict::Exited(101));
                });
                assert!(said.contains("service adder: the handler forked"), "{said:?}");
            }
            assert_eq!(service.call(Message::Sum).expect("an answer"), 0);
        }
    });
}

/// The caller is a ghost in the child, parked for an answer.
#[test]
fn a_reply_in_a_child_answers_nobody() {
    isolated("a_reply_in_a_child_answers_nobody", 60, || {
        let service = Service::builder("forker", || ()).start(|(), (kind, reply): (Kind, Reply<i32>)| {
            let mut reply = Some(reply);
            let pid = kind.noexec(|| {
                let reply = reply.take().expect("taken once");
                reply.send(1);
                0
            });
            passed(pid);
            reply.take().expect("taken once").send(2);
        });
        let service = service.expect("a thread");
        for _ in 0..50 {
            for kind in BOTH {
                assert_eq!(service.call(|reply| (kind, reply)).expect("an answer"), 2);
            }
        }
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
fn a_dirty_child() {
    isolated("a_dirty_child", 60, || {
        carefork::set_foreign_budget(Some(Duration::from_millis(5)));
        let handed_over = adder(OnChild::HandOver(|sum| *sum));
        let anew = adder(OnChild::Restart);
        let go = [keep_busy(&handed_over), keep_busy(&anew)];
        let (mut handed_over, mut anew) = (Some(handed_over), Some(anew));
        passed(Kind::Foreign.noexec(|| {
            check(1, carefork::lineage().dirty);
            let refused =
                handed_over.as_ref().map(|s| s.send(Message::Add(1)).expect_err("in the middle of a message"));
            let refused = refused.expect("not dropped");
            check(2, matches!(refused.error, ServiceError::StateLost { service: "adder" }));
            check(3, anew.as_ref().is_some_and(|s| s.send(Message::Add(1)).is_ok()));
            check(4, anew.as_ref().is_some_and(|s| s.call(Message::Sum).is_ok_and(|sum| sum == 1)));
            drop(handed_over.take());
            drop(anew.take());
            0
        }));
        drop(go);
    });
}

#[test]
fn every_so_often_at_flush_and_at_the_end() {
    isolated("every_so_often_at_flush_and_at_the_end", 60, || {
        let [runs, ..] = shared();
        let often = Service::builder("often", || ()).every(Duration::from_micros(100), |()| add(runs, 1));
        let often = often.start(|(), ()| ()).expect("a thread");
        until(|| runs.load(SeqCst) > 3);
        // Not kept from it by a channel that is never empty.
        let before = runs.load(SeqCst);
        while runs.load(SeqCst) < before + 3 {
            often.send(()).expect("sent");
        }
        drop(often);

        runs.store(0, SeqCst);
        let rare = Service::builder("rare", || 0).every(NEVER, |n: &mut u64| add(runs, *n));
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
fn an_eager_one_is_back_with_the_clean_up() {
    isolated("an_eager_one_is_back_with_the_clean_up", 60, || {
        let [beats, ..] = shared();
        let service = Service::builder("heart", || ()).every(Duration::from_micros(100), |()| add(beats, 1));
        let service = service.eager().start(|(), ()| ()).expect("a thread");
        service.stop().expect("no panic");
        drop(service);
        let parent = raw::getpid();
        let service = Service::builder("heart", || ()).every(Duration::from_micros(100), move |()| {
            if raw::getpid() != parent {
                beats.fetch_add(1, SeqCst);
            }
        });
        let service = service.eager().start(|(), ()| ()).expect("a thread");
        for kind in BOTH {
            beats.store(0, SeqCst);
            passed(kind.noexec(|| {
                check(1, thread_count() == 2);
                until(|| beats.load(SeqCst) > 2);
                0
            }));
            // Not where nobody cleans up.
            passed(kind.fork(|| i32::from(thread_count() != 1)));
        }
        drop(service);
        passed(Kind::Foreign.noexec(|| i32::from(thread_count() != 1)));
    });
}

/// glibc starts threads by clone3 and forks by clone.
#[test]
fn a_child_without_a_thread_to_be_had() {
    isolated("a_child_without_a_thread_to_be_had", 60, || {
        let service = adder(OnChild::HandOver(|sum| *sum));
        service.send(Message::Add(3)).expect("sent");
        service.flush().expect("flushed");
        let refuse = || seccomp_refuse(&[(libc::SYS_clone3, libc::EAGAIN)]).expect("a filter");
        passed(Kind::Coordinated.noexec(|| {
            refuse();
            let back = service.send(Message::Add(9)).expect_err("no thread");
            check(
                1,
                matches!(&back.error, ServiceError::Os { error, .. } if error.raw_os_error() == Some(libc::EAGAIN)),
            );
            check(2, matches!(back.message, Message::Add(9)));
            check(3, Service::builder("none", || ()).start(|(), ()| ()).is_err());
            0
        }));

        let _eager = builder(OnChild::Restart).eager().start(handle).expect("a thread");
        let said = captured(2, || {
            passed(Kind::Coordinated.fork(|| {
                refuse();
                // SAFETY: no descriptor is used.
                let done = unsafe { carefork::postfork_child_noexec() }.expect("a child");
                check(1, done.panicked == 1);
                0
            }));
        });
        assert!(said.contains("hook adder panicked in cleanup: service \"adder\": no thread"), "{said:?}");
    });
}

#[test]
fn many_threads_of_a_child_start_it_once() {
    isolated("many_threads_of_a_child_start_it_once", 60, || {
        let made = shared();
        let service = Service::builder("once", || made[0].fetch_add(1, SeqCst)).start(|_, ()| add(&made[1], 1));
        let service = service.expect("a thread");
        for kind in BOTH {
            made[0].store(0, SeqCst);
            made[1].store(0, SeqCst);
            passed(kind.noexec(|| {
                let together = std::sync::Barrier::new(8);
                thread::scope(|s| {
                    for _ in 0..8 {
                        s.spawn(|| {
                            together.wait();
                            service.send(()).expect("sent");
                        });
                    }
                });
                check(1, service.flush().is_ok());
                check(2, made[0].load(SeqCst) == 1);
                check(3, made[1].load(SeqCst) == 8);
                0
            }));
        }
    });
}
