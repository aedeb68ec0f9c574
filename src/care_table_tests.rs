//! The registry without a fork: words, runs, far numbers.

use super::*;
use crate::care_word::{KIND, MARK};
use std::collections::BTreeSet;

const BOTH: &[Kind] = &[Kind::Cleanup, Kind::Close];

/// A table of this test's own.
macro_rules! table {
    () => {{
        static T: CareTable = CareTable::new();
        &T
    }};
}

type Runs = Vec<(u32, u32)>;

fn runs(t: &CareTable, kinds: &[Kind], keep: &[RawFd]) -> (Runs, (usize, usize)) {
    let mut runs = Vec::new();
    let counts = t.close_runs(kinds, in_sorted(keep), |first, last| runs.push((first, last)));
    (runs, counts)
}

#[test]
fn a_stamp_fits_until_the_number_is_given_back() {
    let t = table!();
    let stamp = t.register(7, Kind::Cleanup).unwrap();
    assert!(t.is_live(7, stamp));
    assert_eq!(t.kind(7), Some(Kind::Cleanup));
    assert!(!t.is_live(8, stamp));
    assert!(t.unregister(7, stamp));
    assert!(!t.is_live(7, stamp));
    assert_eq!(t.kind(7), None);
    assert!(!t.unregister(7, stamp), "twice");
    assert_eq!(t.count(), 0);
}

#[test]
fn each_registration_has_a_stamp_of_its_own() {
    let t = table!();
    let first = t.register(7, Kind::Cleanup).unwrap();
    t.unregister(7, first);
    let second = t.register(7, Kind::Cleanup).unwrap();
    assert_ne!(first, second);
    assert!(!t.is_live(7, first));
    assert!(!t.unregister(7, first), "the old owner must not end the new registration");
    assert!(t.is_live(7, second));
}

#[test]
fn a_number_registered_over_belongs_to_the_newer() {
    let t = table!();
    let first = t.register(7, Kind::Cleanup).unwrap();
    let second = t.register(7, Kind::Close).unwrap();
    assert_eq!((t.state(7, first), t.state(7, second)), (State::Taken, State::Live));
    assert!(!t.unregister(7, first));
    assert!(t.is_live(7, second));
}

#[test]
fn the_generation_survives_a_clean_up() {
    let t = table!();
    let first = t.register(7, Kind::Cleanup).unwrap();
    assert_eq!(runs(t, BOTH, &[]), (vec![(7, 7)], (1, 0)));
    assert_eq!(t.state(7, first), State::Closed);
    let second = t.register(7, Kind::Cleanup).unwrap();
    assert_eq!(t.state(7, first), State::Taken);
    assert!(t.is_live(7, second));
}

#[test]
fn the_generation_goes_round_without_touching_the_kind() {
    let t = table!();
    t.register(7, Kind::Cleanup).unwrap();
    t.words.get(7).unwrap().store(!(KIND | MARK), Relaxed);
    let stamp = t.register(7, Kind::Close).unwrap();
    assert_eq!(stamp, Kind::Close as u32);
    assert!(t.is_live(7, stamp));
    t.unregister(7, stamp);
    assert!(!t.is_live(7, stamp));
}

#[test]
fn neighbours_are_one_run() {
    let t = table!();
    for fd in [3, 4, 5, 9, 15, 16, 17, 100] {
        t.register(fd, Kind::Cleanup).unwrap();
    }
    let expected = vec![(3, 5), (9, 9), (15, 17), (100, 100)];
    assert_eq!(runs(t, BOTH, &[]), (expected, (8, 0)));
    assert_eq!(runs(t, BOTH, &[]), (vec![], (0, 0)), "a second clean-up finds nothing");
}

#[test]
fn kept_ones_split_a_run_and_stay() {
    let t = table!();
    let stamps: Vec<u32> = (0..10).map(|fd| t.register(fd, Kind::Cleanup).unwrap()).collect();
    // Numbers that are not registered, and ones beyond the end, may be named too.
    assert_eq!(runs(t, BOTH, &[-5, 4, 5, 9, 77, 1 << 30]), (vec![(0, 3), (6, 8)], (7, 3)));
    let live: Vec<i32> = (0..10).filter(|&fd| t.is_live(fd, stamps[fd as usize])).collect();
    assert_eq!(live, [4, 5, 9]);
    assert_eq!(runs(t, BOTH, &[]), (vec![(4, 5), (9, 9)], (3, 0)), "the next generation closes them");
}

#[test]
fn kinds_are_closed_apart() {
    let t = table!();
    for fd in 10..20 {
        t.register(fd, if fd % 5 == 0 { Kind::Close } else { Kind::Cleanup }).unwrap();
    }
    assert_eq!(runs(t, &[Kind::Close], &[]).0, [(10, 10), (15, 15)]);
    assert_eq!(runs(t, &[Kind::Cleanup], &[]).0, [(11, 14), (16, 19)]);
}

#[test]
fn without_any_to_close_at_the_fork_nothing_is_looked_at() {
    let t = table!();
    t.register(20_000, Kind::Cleanup).unwrap();
    assert_eq!(t.above[Kind::Close as usize - 1].load(Relaxed), 0);
    assert_eq!(runs(t, &[Kind::Close], &[]), (vec![], (0, 0)));
}

#[test]
fn far_numbers_and_chunks_that_are_not_there() {
    let t = table!();
    let edge = CHUNK as RawFd;
    let far = [0, edge - 1, edge, 3 * edge + 17, 1 << 30, RawFd::MAX];
    let stamps = far.map(|fd| t.register(fd, Kind::Cleanup).unwrap());
    assert!(t.words.chunk(2).is_none());
    assert!(!t.is_live(2 * edge, stamps[0]));
    assert!(!t.unregister(2 * edge, stamps[0]));
    assert!(far.iter().zip(stamps).all(|(&fd, s)| t.is_live(fd, s)));
    let mut seen = Vec::new();
    t.each(BOTH, |fd, kind| seen.push((fd, kind)));
    assert_eq!(seen, far.map(|fd| (fd, Kind::Cleanup)));
    let (edge, max) = (CHUNK, RawFd::MAX as u32);
    let expected = [(0, 0), (edge - 1, edge), (3 * edge + 17, 3 * edge + 17), (1 << 30, 1 << 30), (max, max)];
    assert_eq!(runs(t, BOTH, &[]).0, expected, "a run goes on over a chunk's end");
}

#[test]
fn what_is_no_number_is_refused() {
    let t = table!();
    for fd in [-1, RawFd::MIN] {
        let e = t.register(fd, Kind::Cleanup).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EBADF));
        assert!(!t.is_live(fd, 0) && !t.is_live(fd, 1) && !t.unregister(fd, 1));
    }
    assert_eq!(t.count(), 0);
}

#[test]
fn threads_that_need_the_same_chunk_at_once_share_one() {
    let t = table!();
    let start = std::sync::Barrier::new(8);
    let stamps: Vec<(RawFd, u32)> = std::thread::scope(|s| {
        let one = |i: RawFd| {
            start.wait();
            (i, t.register(i, Kind::Cleanup).unwrap())
        };
        let handles: Vec<_> = (0..8).map(|i| s.spawn(move || one(i))).collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    assert!(stamps.iter().all(|&(fd, stamp)| t.is_live(fd, stamp)));
    assert_eq!(runs(t, BOTH, &[]).0, [(0, 7)]);
}

#[test]
fn what_is_registered_during_a_dirty_fork_its_child_leaves_alone() {
    let t = table!();
    let before = t.register(10, Kind::Cleanup).unwrap();
    t.dirty.begins();
    let (during, close) = (t.register(11, Kind::Cleanup).unwrap(), t.register(12, Kind::Close).unwrap());
    assert!(t.is_live(10, before) && t.is_live(11, during) && t.is_live(12, close), "in the parent all are live");
    assert_eq!(t.state(11, during), State::Live);
    assert_eq!(t.count(), 3);

    t.dirty_child();
    assert!(t.is_live(10, before));
    assert_eq!((t.state(11, during), t.state(12, close)), (State::Closed, State::Closed));
    assert_eq!(runs(t, BOTH, &[]), (vec![(10, 10)], (1, 0)));
    let after = t.register(11, Kind::Cleanup).unwrap();
    t.dirty_child();
    assert!(t.is_live(11, after), "what comes after is not marked");
}

#[test]
fn a_mark_does_not_outlive_its_registration_nor_keep_it_from_later_clean_ups() {
    let t = table!();
    t.dirty.begins();
    let stamp = t.register(10, Kind::Cleanup).unwrap();
    t.dirty.ends();
    assert!(t.unregister(10, stamp));
    let again = t.register(10, Kind::Cleanup).unwrap();
    assert_ne!(stamp, again);
    assert_eq!(runs(t, BOTH, &[]).0, [(10, 10)]);
    t.dirty.begins();
    t.register(11, Kind::Cleanup).unwrap();
    t.dirty.ends();
    assert_eq!(runs(t, BOTH, &[]).0, [(11, 11)], "the child of a clean fork closes it");
}

/// Against a set, over random registrations, clean-ups and keeps.
#[test]
fn agrees_with_a_set() {
    let t = table!();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |n: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % n
    };
    let mut live: BTreeSet<(RawFd, u32)> = BTreeSet::new();
    for round in 0..100 {
        for _ in 0..random(200) {
            let fd = random(300) as RawFd + if random(4) == 0 { 2 * CHUNK as RawFd - 150 } else { 0 };
            match live.iter().find(|l| l.0 == fd).copied() {
                Some((fd, stamp)) => {
                    assert!(t.unregister(fd, stamp), "round {round}");
                    live.remove(&(fd, stamp));
                }
                None => {
                    let kind = if random(3) == 0 { Kind::Close } else { Kind::Cleanup };
                    live.insert((fd, t.register(fd, kind).unwrap()));
                }
            }
        }
        let every = random(8) as RawFd + 2;
        let keep: Vec<RawFd> = live.iter().map(|l| l.0).filter(|fd| fd % every == 0).collect();
        let mut closed = BTreeSet::new();
        let mut last_end = None;
        t.close_runs(BOTH, in_sorted(&keep), |first, last| {
            assert!(first <= last && last_end.is_none_or(|e| e + 1 < first), "rising, and never two that touch");
            last_end = Some(last);
            closed.extend(first as RawFd..=last as RawFd);
        });
        let expected: BTreeSet<RawFd> = live.iter().map(|l| l.0).filter(|fd| fd % every != 0).collect();
        assert_eq!(closed, expected, "round {round}");
        for &(fd, stamp) in &live {
            assert_eq!(t.is_live(fd, stamp), fd % every == 0);
        }
        live.retain(|l| l.0 % every == 0);
        assert_eq!(t.count(), live.len());
    }
}
