//! What the tests of services share: one that adds up.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

use crate::common::{Verdict, reap};
use crate::drive::SOON;
use carefork::{OnChild, Reply, Service, ServiceBuilder};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc;

/// A service that adds up, and says its sum.
pub enum Message {
    Add(u64),
    Sum(Reply<u64>),
    /// Tells that it is being handled, then waits until the sender is gone.
    Wait(mpsc::Sender<()>, mpsc::Receiver<()>),
    Do(Box<dyn FnOnce(&mut u64) + Send>),
}

pub fn adder(on_child: OnChild<u64>) -> Service<Message> {
    builder(on_child).start(handle).expect("a thread")
}

pub fn builder(on_child: OnChild<u64>) -> ServiceBuilder<u64> {
    Service::builder("adder", || 0).on_child(on_child)
}

pub fn add(to: &AtomicU64, n: u64) {
    to.fetch_add(n, SeqCst);
}

pub fn handle(sum: &mut u64, message: Message) {
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
pub fn keep_busy(service: &Service<Message>) -> mpsc::Sender<()> {
    let (begun, begins) = mpsc::channel();
    let (go, wait) = mpsc::channel();
    service.send(Message::Wait(begun, wait)).expect("sent");
    begins.recv().expect("it is handled");
    go
}

#[track_caller]
pub fn passed(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// Counts where it is dropped, in which process ever.
pub struct Counted(pub &'static AtomicU64);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}
