//! H5: what a child finds of a service, one case at a time. `service_thread.rs` has the service without children,
//! `service_forks.rs` thousands of forks.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod adder;
mod common;
mod drive;
mod kit;

use adder::{Counted, Message, add, adder, builder, handle, keep_busy, passed};
use carefork::{OnChild, Reply, Service, ServiceError};
use common::{Verdict, check, isolated, raw, reap, seccomp_refuse, thread_count};
use drive::{BOTH, Kind, SOON, freeze, until, until_shut};
use kit::{captured, shared};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

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
        freeze();
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
                    let f = move |_: &mut u64| match split(kind) {
                        0 => {}
                        pid => tell.send(pid).expect("the test waits"),
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

/// Forks and goes on in both; 0 in the child.
fn split(kind: Kind) -> i32 {
    match kind {
        // SAFETY: the child does little more than end.
        Kind::Foreign => unsafe { libc::fork() },
        // SAFETY: as above.
        Kind::Coordinated => match unsafe { carefork::fork() }.expect("a child") {
            carefork::Fork::Parent(child) => child.into_id() as i32,
            carefork::Fork::Child(_token) => 0,
        },
    }
}

/// It is no better than one that returns: the state is not dropped there as if the parent's work were done.
#[test]
fn a_child_of_the_handler_that_panics() {
    isolated("a_child_of_the_handler_that_panics", 60, || {
        let [dropped, ..] = shared();
        for (kind, in_every) in BOTH.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
            let (tell, told) = mpsc::channel();
            let (tell, forked) = (std::sync::Mutex::new(tell), AtomicBool::new(false));
            let fork_once = Arc::new(move || {
                if !forked.swap(true, SeqCst) {
                    match split(kind) {
                        0 => std::panic::resume_unwind(Box::new(())),
                        pid => tell.lock().expect("not poisoned").send(pid).expect("the test waits"),
                    }
                }
            });
            let also = Arc::clone(&fork_once);
            dropped.store(0, SeqCst);
            let said = captured(2, || {
                let builder = Service::builder("panics", || Counted(dropped));
                let builder = builder.every(Duration::from_secs(3600), move |_| {
                    if in_every {
                        also();
                    }
                });
                let service = builder.start(move |_, ()| {
                    if !in_every {
                        fork_once();
                    }
                });
                let service = service.expect("a thread");
                service.send(()).expect("sent");
                service.flush().expect("the parent's goes on");
                assert_eq!(reap(told.recv().expect("forked"), SOON), Verdict::Exited(101), "{kind:?} {in_every}");
                assert_eq!(dropped.load(SeqCst), 0, "{kind:?} {in_every}");
            });
            assert!(said.contains("service panics: the handler forked and returned or panicked"), "{said:?}");
            assert_eq!(dropped.load(SeqCst), 1);
        }
    });
}

/// The caller is a ghost in the child, parked for an answer: the channel to it is left alone.
#[test]
fn a_reply_in_a_child_answers_nobody() {
    isolated("a_reply_in_a_child_answers_nobody", 60, || {
        let [dropped, ..] = shared();
        let service = Service::builder("forker", || ()).start(|(), (kind, reply): (Kind, Reply<Counted>)| {
            let mut reply = Some(reply);
            dropped.store(0, SeqCst);
            passed(kind.noexec(|| {
                reply.take().expect("taken once").send(Counted(dropped));
                // Not put where a ghost would have to take it out.
                check(1, dropped.load(SeqCst) == 1);
                0
            }));
            passed(kind.noexec(|| {
                drop(reply.take());
                0
            }));
            reply.take().expect("taken once").send(Counted(dropped));
        });
        let service = service.expect("a thread");
        for _ in 0..50 {
            for kind in BOTH {
                drop(service.call(|reply| (kind, reply)).expect("an answer"));
                assert_eq!(dropped.load(SeqCst), 2);
            }
        }
    });
}

/// Who makes the message may fork: the child sends nothing to its parent's thread, and waits for no answer to it.
#[test]
fn a_call_whose_message_forks_ends_in_the_child() {
    isolated("a_call_whose_message_forks_ends_in_the_child", 60, || {
        let service = adder(OnChild::Restart);
        for kind in BOTH {
            let (mut pid, before) = (0, carefork::fork_generation());
            let answer = service.call(|reply| {
                pid = split(kind);
                // The other kind's token has done it.
                if pid == 0 && kind == Kind::Foreign {
                    // SAFETY: no descriptor of a care-fd is used in the child.
                    check(1, unsafe { carefork::postfork_child_noexec() }.is_ok());
                }
                Message::Sum(reply)
            });
            if carefork::fork_generation() != before {
                check(2, matches!(answer, Err(ServiceError::NoReply { .. })));
                check(3, service.call(Message::Sum).is_ok());
                raw::exit_now(0);
            }
            assert_eq!(answer.expect("an answer"), 0);
            passed(pid);
        }
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

/// A state that a panic has left half done is handed to nobody, whenever the fork comes.
#[test]
fn no_child_is_handed_what_a_panic_left() {
    isolated("no_child_is_handed_what_a_panic_left", 120, || {
        freeze();
        for i in 0..300 {
            let service = adder(OnChild::HandOver(|sum| *sum));
            let go = keep_busy(&service);
            let f = |sum: &mut u64| {
                *sum = 1;
                std::panic::resume_unwind(Box::new("half done"));
            };
            service.send(Message::Do(Box::new(f))).expect("sent");
            drop(go);
            passed(BOTH[i % 2].noexec(|| match service.call(Message::Sum) {
                Ok(sum) => i32::from(sum != 0),
                Err(ServiceError::Panicked { .. }) => 0,
                Err(_) => 2,
            }));
        }
    });
}
