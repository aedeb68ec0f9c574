//! Beside threads that open and close all the time, clean and dirty forks (F2, G6).

use crate::common::{Verdict, check, isolated, reap, self_fds};
use crate::kit::{SOON, foreign};
use crate::{care, in_noexec_child, null};
use carefork::{CareFd, no_forking, postfork_child_noexec};
use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

#[test]
fn no_child_ever_inherits_one() {
    isolated("threads::no_child_ever_inherits_one", 60, || {
        static STOP: AtomicBool = AtomicBool::new(false);
        let busy = |i: usize| {
            move || {
                while !STOP.load(SeqCst) {
                    match i % 3 {
                        0 => drop(care()),
                        1 => drop(CareFd::open_pair(UnixStream::pair)),
                        _ => drop(CareFd::new(care().into_inner())),
                    }
                    if i == 3 {
                        thread::sleep(Duration::from_micros(50));
                    }
                }
            }
        };
        let threads: Vec<_> = (0..2).chain(3..4).map(|i| thread::spawn(busy(i))).collect();
        // Time stands still: where this thread is kept from the processor in the middle of a fork, no waiter reopens the gate, which
        // would make the child a dirty one that may have one too many (G6, G11).
        carefork::testing::advance(Duration::ZERO);
        for _ in 0..300 {
            in_noexec_child(|| check(1, self_fds().as_slice() == [0, 1, 2]));
        }
        assert_eq!((carefork::stats().late, carefork::stats().dirty), (0, 0));
        STOP.store(true, SeqCst);
        threads.into_iter().for_each(|t| t.join().expect("no panic"));
        assert_eq!(self_fds().as_slice(), [0, 1, 2]);
    });
}

/// The kernel copies descriptors first and memory after: in between, a stranger's number can become a care-fd's. A large
/// process makes that long.
#[test]
fn the_child_of_a_dirty_fork_closes_no_strangers() {
    isolated("threads::the_child_of_a_dirty_fork_closes_no_strangers", 60, || {
        static STOP: AtomicBool = AtomicBool::new(false);
        let ballast = vec![1u8; 128 << 20];
        carefork::set_foreign_budget(Some(Duration::from_millis(1)));
        let (ready, entered) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let region = no_forking();
            ready.send(()).expect("the test waits");
            while !STOP.load(SeqCst) {
                let stranger = File::open("/dev/zero").expect("open");
                drop(stranger);
                drop(region.care(null().expect("open")).expect("adopted"));
            }
        });
        entered.recv().expect("the thread runs");
        let zero = std::fs::metadata("/dev/zero")
            .map(|m| {
                use std::os::unix::fs::MetadataExt as _;
                m.rdev()
            })
            .expect("/dev/zero");
        let is_zero = |fd: RawFd| {
            // SAFETY: stat is plain data.
            let mut st: libc::stat = unsafe { std::mem::zeroed() };
            // SAFETY: `st` is live.
            unsafe { libc::fstat(fd, &raw mut st) == 0 && st.st_rdev == zero }
        };
        let mut strangers = 0;
        for _ in 0..150 {
            let pid = foreign(|| {
                check(1, carefork::lineage().dirty);
                let held = is_zero(3);
                // SAFETY: nothing is borrowed.
                check(2, unsafe { postfork_child_noexec() }.is_ok());
                check(3, !held || is_zero(3));
                if held { 10 } else { 0 }
            });
            match reap(pid, SOON) {
                Verdict::Exited(10) => strangers += 1,
                other => assert_eq!(other, Verdict::Exited(0)),
            }
        }
        STOP.store(true, SeqCst);
        thread.join().expect("no panic");
        println!("{strangers} children had a stranger's");
        drop(ballast);
    });
}
