//! Neither regions nor forks starve the other (G3).

use crate::common::isolated;
use crate::drive::{BOTH, Kind, Stop, freeze, gettid, until, until_it_looked};
use crate::ends_well;
use carefork::{Hook, no_forking, register, try_no_forking};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

/// At most how many regions three threads begin, back to back in regions of 3 ms, from when a fork has shut the gate until it commits.
/// Everybody lives by one clock, which moves on when all have looked at it, so nobody is overtaken by time that he was not there
/// for. Carefork's own stands still unless `passes`.
fn regions_begun_while_forking(kind: Kind, passes: bool) -> u64 {
    const STEP: u64 = 500;
    const LENGTH: u64 = 3000;
    let (begun, at_commitment) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
    let (now, stop, go) = (AtomicU64::new(0), AtomicBool::new(false), AtomicU32::new(0));
    let (forked, tids) = (AtomicU32::new(0), [const { AtomicI32::new(0) }; 4]);
    let begun: &'static AtomicU64 = Box::leak(Box::new(begun));
    let seen = Arc::clone(&at_commitment);
    // The gate is shut, and nobody is in a region: the last time it comes to this is the commitment.
    let _hook = register(Hook::new("counts").prepare(move || seen.store(begun.load(SeqCst), SeqCst)));
    let mut most = 0;
    freeze();
    thread::scope(|s| {
        let _end = Stop(&stop);
        let (now, stop, go, forked, tids) = (&now, &stop, &go, &forked, &tids);
        for n in 0..3 {
            s.spawn(move || {
                tids[n as usize].store(gettid(), SeqCst);
                // Not all at once.
                until(|| now.load(SeqCst) >= n * LENGTH / 3);
                while !stop.load(SeqCst) {
                    let _region = no_forking();
                    let end = now.load(SeqCst) + LENGTH;
                    begun.fetch_add(1, SeqCst);
                    until(|| now.load(SeqCst) >= end || stop.load(SeqCst));
                }
            });
        }
        s.spawn(move || {
            tids[3].store(gettid(), SeqCst);
            for n in 1.. {
                until(|| go.load(SeqCst) == n || stop.load(SeqCst));
                if stop.load(SeqCst) {
                    break;
                }
                let pid = kind.fork(|| 0);
                forked.store(n, SeqCst);
                ends_well(pid);
            }
        });
        until(|| tids.iter().all(|tid| tid.load(SeqCst) != 0));
        let step = |both: bool| {
            now.fetch_add(STEP, SeqCst);
            if both {
                carefork::testing::advance(Duration::from_micros(STEP));
            }
            tids.iter().for_each(|tid| until_it_looked(tid.load(SeqCst)));
        };
        for n in 1..=8 {
            // At another moment of the regions each time.
            (0..7 + n).for_each(|_| step(false));
            go.store(n, SeqCst);
            until(|| try_no_forking().is_none() || forked.load(SeqCst) == n);
            let before = begun.load(SeqCst);
            while forked.load(SeqCst) != n {
                step(passes);
            }
            most = most.max(at_commitment.load(SeqCst).saturating_sub(before));
        }
    });
    most
}

#[test]
fn back_to_back_regions_delay_a_fork_by_few_of_them() {
    isolated("fairness::back_to_back_regions_delay_a_fork_by_few_of_them", 120, || {
        for kind in BOTH {
            // Each of three threads begins few: those let in before the bound has grown to a region's length.
            let begun = regions_begun_while_forking(kind, true);
            assert!(begun <= 3 * 4, "{begun} regions while one fork waited ({kind:?})");
            // Where the bound never passes, no new region begins at all; one that came before the gate was shut may not be counted yet.
            let begun = regions_begun_while_forking(kind, false);
            assert!(begun <= 3, "{begun} regions while one fork waited ({kind:?})");
        }
    });
}

#[test]
fn forks_in_a_loop_let_regions_in() {
    isolated("fairness::forks_in_a_loop_let_regions_in", 60, || {
        // Standing still: the courtesy that a fork shows to those who wait has no end but their entering.
        freeze();
        // Children are gone without being waited for: nothing comes between two forks.
        // SAFETY: ignoring calls nothing.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
        let (stop, forks) = (AtomicBool::new(false), AtomicU32::new(0));
        let mut waits: Vec<u32> = Vec::new();
        thread::scope(|s| {
            let _end = Stop(&stop);
            for kind in BOTH {
                let (stop, forks) = (&stop, &forks);
                s.spawn(move || {
                    while !stop.load(SeqCst) {
                        kind.fork(|| 0);
                        forks.fetch_add(1, SeqCst);
                    }
                });
            }
            while waits.len() < 200 {
                // Only those that had to wait count.
                if let Some(_region) = try_no_forking() {
                    continue;
                }
                let before = forks.load(SeqCst);
                let region = no_forking();
                waits.push(forks.load(SeqCst) - before);
                drop(region);
            }
        });
        waits.sort_unstable();
        // This thread may be set aside between asking and entering; not often.
        assert!(waits[150] <= 2, "forks that overtook a waiting region: {waits:?}");
    });
}
