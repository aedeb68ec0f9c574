//! The recipes of `carefork::recipes`, as they stand there, through thousands of forks of both kinds.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used, clippy::cast_possible_truncation)]

mod common;
mod drive;
mod kit;

#[allow(unreachable_pub, missing_docs)]
#[path = "../examples/recipes/once.rs"]
mod once;
#[allow(unreachable_pub, missing_docs)]
#[path = "../examples/recipes/random.rs"]
mod random;
#[allow(unreachable_pub, missing_docs)]
#[path = "../examples/recipes/rayon_pool.rs"]
mod rayon_pool;
#[allow(unreachable_pub, missing_docs)]
#[path = "../examples/recipes/worker_pool.rs"]
mod worker_pool;

use common::{Verdict, check, fork_many, isolated, reap};
use drive::{BOTH, SOON, Stop, freeze};
use kit::shared;
use rand::RngExt as _;
use std::collections::HashSet;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread;

/// Half of them coordinated, half foreign.
const FORKS: u32 = 2200;

/// Long enough to be forked in the middle of.
fn slowly(n: u32) -> Vec<u32> {
    (0..2000).map(|i| std::hint::black_box(i ^ n)).collect()
}

/// At each fork three threads initialise the lock of that fork.
fn initialised_at_each_fork<L: Sync>(locks: &[L], value: impl Fn(&L) -> &Vec<u32> + Sync) {
    freeze();
    let turn = AtomicU32::new(0);
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                let mut done = 0;
                while !stop.load(SeqCst) {
                    let n = turn.load(SeqCst);
                    if n != done {
                        check(1, value(&locks[n as usize - 1]).len() == 2000);
                        done = n;
                    }
                    thread::yield_now();
                }
            });
        }
        let _stop = Stop(&stop);
        let tally = fork_many(FORKS, 1, SOON, |i| {
            turn.store(i + 1, SeqCst);
            // At another moment of the initialisation each time.
            for _ in 0..i % 50 * 20 {
                std::hint::spin_loop();
            }
            BOTH[i as usize % 2].noexec(|| {
                let value = value(&locks[i as usize]);
                check(2, value.len() == 2000 && value.iter().zip(0..).all(|(&v, k)| v == k ^ i));
                0
            })
        });
        tally.expect_clean(FORKS);
    });
}

#[test]
fn once_by_carefork() {
    isolated("once_by_carefork", 300, || {
        assert_eq!(once::PRIMES[24], 97);
        let locks: Vec<_> = (0..FORKS).map(|i| carefork::LazyLock::new(move || slowly(i))).collect();
        initialised_at_each_fork(&locks, |lock| &**lock);
    });
}

#[test]
fn once_by_std_inside_a_region() {
    isolated("once_by_std_inside_a_region", 300, || {
        let locks: Vec<_> = (0..FORKS).map(|i| LazyLock::new(move || slowly(i))).collect();
        initialised_at_each_fork(&locks, |lock| once::force(lock));
    });
}

/// `FORKS` forks while four threads do what the child does.
fn hammered(work: impl Fn() -> bool + Sync) {
    freeze();
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    check(1, work());
                }
            });
        }
        let _stop = Stop(&stop);
        let tally = fork_many(FORKS, 1, SOON, |i| {
            BOTH[i as usize % 2].noexec(|| {
                check(2, common::thread_count() == 1);
                check(3, work() && work());
                check(4, common::thread_count() == 3);
                0
            })
        });
        tally.expect_clean(FORKS);
    });
}

#[test]
fn rayon_in_each_process() {
    isolated("rayon_in_each_process", 300, || {
        let numbers: Vec<u64> = (1..=1000).collect();
        hammered(|| rayon_pool::sum_of_squares(&numbers) == 333_833_500);
    });
}

#[test]
fn workers_in_each_process() {
    isolated("workers_in_each_process", 300, || {
        hammered(|| {
            let (done, wait) = crossbeam_channel::bounded(10);
            for i in 0..10 {
                let done = done.clone();
                worker_pool::run(move || done.send(i).expect("somebody waits"));
            }
            drop(done);
            wait.iter().sum::<u32>() == 45
        });
        // A job that panics takes no worker with it.
        for _ in 0..4 {
            worker_pool::run(|| panic!("on purpose"));
        }
        let (done, wait) = crossbeam_channel::bounded(1);
        worker_pool::run(move || done.send(()).expect("somebody waits"));
        wait.recv().expect("done");
    });
}

/// What `make` gives in processes forked one from another, on the thread that forks: how many of the numbers came twice.
fn repeated(forks: u32, make: impl Fn() -> u64) -> usize {
    let seen = shared();
    let mut all = Vec::new();
    for i in 0..forks {
        let kind = BOTH[i as usize % 2];
        let pid = kind.noexec(|| {
            seen[0].store(make(), SeqCst);
            let inner = kind.fork(|| {
                seen[1].store(make(), SeqCst);
                0
            });
            check(1, reap(inner, SOON) == Verdict::Exited(0));
            seen[2].store(make(), SeqCst);
            0
        });
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        all.extend(seen[..3].iter().map(|n| n.load(SeqCst)));
        all.push(make());
    }
    all.len() - all.iter().collect::<HashSet<_>>().len()
}

#[test]
fn random_numbers_never_twice() {
    isolated("random_numbers_never_twice", 300, || {
        let plain = || rand::rng().random();
        let _: u64 = plain();
        assert!(repeated(20, plain) >= 20, "rand minds forks by itself now: is the recipe needed?");
        assert_eq!(repeated(FORKS / 2, || random::rng().random()), 0);

        // A thread that has used rand, and the recipe in its children only.
        let late = || {
            let _: u64 = plain();
            let in_child = |kind: drive::Kind| {
                let seen = shared();
                let pid = kind.noexec(|| {
                    seen[0].store(random::rng().random(), SeqCst);
                    0
                });
                assert_eq!(reap(pid, SOON), Verdict::Exited(0));
                seen[0].load(SeqCst)
            };
            assert_ne!(in_child(BOTH[0]), in_child(BOTH[1]));
        };
        thread::scope(|s| s.spawn(late).join().expect("no panic"));
    });
}
