//! The gate: regions, commitment, fairness, forbidden forks, ends of regions, signal masks, signal handlers
//! (G1 to G4, G7, G8, G12).

// Forks, masks and raw threads.
#![allow(unsafe_code, clippy::disallowed_methods)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../drive/mod.rs"]
mod drive;

mod ends;
mod fairness;
mod masks;
mod own_region;
mod regions;
mod trying;

use carefork::{no_forking, try_no_forking};
use common::{Verdict, check, reap, status_here};
use drive::{BOTH, SOON, no_child_left};
use std::sync::atomic::AtomicU64;

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// The gate is open, nobody but perhaps this thread is in a region, and both kinds of fork work.
#[track_caller]
fn all_is_well() {
    assert!(try_no_forking().is_some(), "the gate is shut");
    for kind in BOTH {
        ends_well(kind.fork(|| {
            check(101, try_no_forking().is_some());
            drop(no_forking());
            0
        }));
    }
    assert_eq!(carefork::stats().dirty, 0);
    assert!(no_child_left());
}

/// Two words that are equal outside regions.
struct Pair(AtomicU64, AtomicU64);

fn mask() -> u64 {
    status_here().map_or(0, |s| s.sig_blk)
}
