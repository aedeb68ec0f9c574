//! H5 under load: services in use by many threads, and thousands of forks of both kinds.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;
mod kit;

use carefork::{OnChild, Reply, Service};
use common::{check, fork_many, isolated, thread_count};
use drive::{BOTH, SOON, freeze, run_slowly};
use kit::Stop;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

const SENDERS: usize = 8;
/// Half of them coordinated, half foreign.
const FORKS: u32 = 2200;

/// What the service has seen. `twins` are never apart but in the middle of a message.
#[derive(Clone, Copy, Default)]
struct Book {
    next: [u64; SENDERS],
    wrong: u64,
    own: u64,
    twins: [u64; 2],
}

enum Message {
    Numbered(usize, u64),
    Own,
    Look(Reply<Book>),
}

fn handle(book: &mut Book, message: Message) {
    book.twins[0] += 1;
    match message {
        Message::Numbered(thread, n) => {
            book.wrong += u64::from(book.next[thread] != n);
            book.next[thread] = n + 1;
        }
        Message::Own => book.own += 1,
        Message::Look(reply) => reply.send(*book),
    }
    book.twins[1] += 1;
}

/// Eight threads send without pause, most of the time parked at a full channel, and others wait for answers.
fn storm(on_child: OnChild<Book>, in_child: impl Fn(&Book)) {
    freeze();
    let service = Service::builder("book", Book::default).on_child(on_child).capacity(64);
    let service = service.start(handle).expect("a thread");
    let stop = Stop::default();
    let sent: [AtomicU64; SENDERS] = Default::default();
    thread::scope(|s| {
        for (i, sent) in sent.iter().enumerate() {
            let (service, stop) = (&service, &stop);
            s.spawn(move || {
                while !stop.is_set() {
                    let n = sent.load(SeqCst);
                    service.send(Message::Numbered(i, n)).expect("sent");
                    sent.store(n + 1, SeqCst);
                    if n % 64 == 0 {
                        let book = service.call(Message::Look).expect("an answer");
                        assert!(book.next[i] == n + 1 && book.wrong == 0);
                    }
                }
            });
        }
        let _stop = stop.on_drop();
        let tally = fork_many(FORKS, 1, SOON, |i| {
            BOTH[i as usize % 2].noexec(|| {
                service.send(Message::Own).expect("it works at once");
                let book = service.call(Message::Look).expect("an answer");
                check(1, book.own == 1 && book.wrong == 0);
                in_child(&book);
                let again = service.call(Message::Look).expect("an answer");
                check(2, again.next == book.next);
                check(3, service.stop().is_ok());
                0
            })
        });
        tally.expect_clean(FORKS);
    });
    let book = service.call(Message::Look).expect("an answer");
    assert_eq!((book.next, book.wrong, book.own), (sent.map(AtomicU64::into_inner), 0, 0));
    assert!(book.next.iter().all(|&n| n > 0), "{:?}", book.next);
    assert!(!carefork::lineage().dirty && carefork::stats().dirty == 0);
}

#[test]
fn each_message_once_in_order_a_child_starts_empty() {
    isolated("each_message_once_in_order_a_child_starts_empty", 300, || {
        storm(OnChild::Restart, |book| check(10, book.next == [0; SENDERS]));
    });
}

#[test]
fn each_message_once_in_order_a_state_is_handed_over() {
    isolated("each_message_once_in_order_a_state_is_handed_over", 300, || {
        fn hand_over(book: &Book) -> Book {
            Book { wrong: book.wrong + u64::from(book.twins[0] != book.twins[1]), ..*book }
        }
        storm(OnChild::HandOver(hand_over), |book| {
            // One `Look` of its own under way.
            check(10, book.twins[0] == book.twins[1] + 1);
            check(11, book.twins[0] >= book.next.iter().sum());
        });
    });
}

/// The receiver is parked at every fork: with the parent's channel every child would hang.
#[test]
fn at_rest() {
    isolated("at_rest", 300, || {
        let service = Service::builder("rest", || 0).start(|n, reply: Reply<u32>| {
            *n += 1;
            reply.send(*n);
        });
        let service = service.expect("a thread");
        assert_eq!(service.call(|reply| reply).expect("an answer"), 1);
        let fds = common::self_fds();
        let tally = fork_many(FORKS, 1, SOON, |i| {
            BOTH[i as usize % 2].noexec(|| {
                check(1, thread_count() == 1);
                check(2, service.call(|reply| reply).is_ok_and(|n| n == 1));
                check(3, thread_count() == 2);
                check(4, common::self_fds().first_not_in(&fds).is_none());
                0
            })
        });
        tally.expect_clean(FORKS);
        assert_eq!(service.call(|reply| reply).expect("an answer"), 2);
    });
}

/// Threads of services begin and end all the time; children start threads, too.
#[test]
fn services_come_and_go() {
    isolated("services_come_and_go", 300, || {
        // A thread is started inside a region, and may have to wait for one in its turn.
        let _clock = run_slowly();
        let stop = AtomicBool::new(false);
        let lasting = Service::builder("lasting", || 0).start(|n, more: u32| *n += more).expect("a thread");
        thread::scope(|s| {
            for on_child in [OnChild::Restart, OnChild::HandOver(|n: &u32| *n), OnChild::Nothing] {
                let stop = &stop;
                s.spawn(move || {
                    while !stop.load(SeqCst) {
                        let service = Service::builder("short", || 0).on_child(on_child).eager();
                        let service = service.start(|n, more: u32| *n += more).expect("a thread");
                        service.send(1).expect("sent");
                    }
                });
            }
            let _stop = drive::Stop(&stop);
            let tally = fork_many(FORKS, 1, SOON, |i| {
                BOTH[i as usize % 2].noexec(|| {
                    lasting.send(1).expect("it works at once");
                    check(1, lasting.flush().is_ok());
                    let own = Service::builder("own", || ()).start(|(), ()| ()).expect("a thread");
                    check(2, own.send(()).is_ok() && own.stop().is_ok());
                    thread::spawn(|| ()).join().expect("no panic");
                    0
                })
            });
            tally.expect_clean(FORKS);
        });
    });
}
