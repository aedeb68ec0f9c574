//! How long things took, in buckets that the handlers of a fork can write: no allocation, no lock (D1).

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::time::Duration;

/// Bucket k counts what took less than 2^k ns and no less than half of that; the last one all that took longer, from 9 minutes on.
const BUCKETS: usize = 40;

/// Written by the holder of the gate's role, and now and then by one who never had it (`note_beside`); read by anybody at any time.
#[derive(Debug)]
pub(crate) struct Clocked {
    /// The generation that all of it is of: a child need not write to begin anew.
    counted_in: AtomicU32,
    buckets: [AtomicU32; BUCKETS],
    total: AtomicU64,
    longest: AtomicU64,
}

impl Clocked {
    pub(crate) const fn new() -> Self {
        Self {
            counted_in: AtomicU32::new(0),
            buckets: [const { AtomicU32::new(0) }; BUCKETS],
            total: AtomicU64::new(0),
            longest: AtomicU64::new(0),
        }
    }

    /// One that took `ns`, in the process of that generation. Async-signal-safe.
    pub(crate) fn note(&self, ns: u64, generation: u32) {
        if self.counted_in.load(Relaxed) != generation {
            self.begin(generation);
        }
        // One writer: no read-modify-write needed.
        let bucket = self.bucket(ns);
        bucket.store(bucket.load(Relaxed).wrapping_add(1), Relaxed);
        self.total.store(self.total.load(Relaxed).wrapping_add(ns), Relaxed);
        if ns > self.longest.load(Relaxed) {
            self.longest.store(ns, Relaxed);
        }
    }

    /// As `note`, by a fork that does not hold the role. The role's holder stores without looking twice: one that notes in the same
    /// instant may undo this, which a lock on the way of every fork would not be worth.
    #[cold]
    pub(crate) fn note_beside(&self, ns: u64, generation: u32) {
        if self.counted_in.load(Relaxed) != generation {
            self.begin(generation);
        }
        self.bucket(ns).fetch_add(1, Relaxed);
        self.total.fetch_add(ns, Relaxed);
        self.longest.fetch_max(ns, Relaxed);
    }

    fn bucket(&self, ns: u64) -> &AtomicU32 {
        &self.buckets[((u64::BITS - ns.leading_zeros()) as usize).min(BUCKETS - 1)]
    }

    #[cold]
    fn begin(&self, generation: u32) {
        self.buckets.iter().for_each(|b| b.store(0, Relaxed));
        self.total.store(0, Relaxed);
        self.longest.store(0, Relaxed);
        // Pairs with the Acquire in `read`: who finds the generation finds nothing of another.
        self.counted_in.store(generation, Release);
    }

    /// What was noted in the process of that generation.
    pub(crate) fn read(&self, generation: u32) -> Durations {
        if self.counted_in.load(Acquire) != generation {
            return Durations::default();
        }
        let buckets = self.buckets.each_ref().map(|b| u64::from(b.load(Relaxed)));
        let count: u64 = buckets.iter().sum();
        let longest = self.longest.load(Relaxed);
        let below = |share: u64| {
            let mut left = (count * share).div_ceil(100);
            let bucket = buckets.iter().position(|&n| {
                let found = left <= n;
                left = left.saturating_sub(n);
                found
            });
            let bound = bucket.filter(|&k| k < BUCKETS - 1).map_or(longest, |k| 1 << k);
            Duration::from_nanos(bound.min(longest))
        };
        Durations {
            count,
            total: Duration::from_nanos(self.total.load(Relaxed)),
            longest: Duration::from_nanos(longest),
            median: below(50),
            p99: below(99),
        }
    }
}

/// How long something took, over all the times that it happened.
///
/// ```
/// let regions = carefork::stats().regions;
/// assert!(regions.median <= regions.longest && regions.longest <= regions.total);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Durations {
    /// How often.
    pub count: u64,
    /// All of them together.
    pub total: Duration,
    /// The longest.
    pub longest: Duration,
    /// Half of them took no longer than this: an upper bound, at most twice what is true.
    pub median: Duration,
    /// As `median`, for 99 of 100.
    pub p99: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(all: &[u64]) -> Durations {
        let clocked = Clocked::new();
        all.iter().for_each(|&ns| clocked.note(ns, 0));
        clocked.read(0)
    }

    #[test]
    fn nothing_took_nothing() {
        assert_eq!(of(&[]), Durations::default());
    }

    #[test]
    fn bounds_are_never_below_and_at_most_twice() {
        let all: Vec<u64> = (0..1000).map(|i| i * i * 7 + 1).collect();
        let d = of(&all);
        let exact = |share: usize| u128::from(all[all.len() * share / 100 - 1]);
        for (bound, exact) in [(d.median, exact(50)), (d.p99, exact(99))] {
            assert!((exact..=2 * exact).contains(&bound.as_nanos()), "{bound:?} for {exact} ns");
        }
        assert_eq!((d.count, d.longest.as_nanos()), (1000, u128::from(all[999])));
        assert_eq!(d.total.as_nanos(), u128::from(all.iter().sum::<u64>()));
    }

    #[test]
    fn one_is_its_own_bound() {
        for ns in [0, 1, 2, 3, 1000, 1 << 38, u64::MAX] {
            let d = of(&[ns]);
            let exact = Duration::from_nanos(ns);
            assert_eq!((d.median, d.p99, d.longest), (exact, exact, exact));
        }
    }

    #[test]
    fn without_the_role_the_same_is_noted() {
        let clocked = Clocked::new();
        [700, 3, 90, u64::MAX >> 20].into_iter().for_each(|ns| clocked.note_beside(ns, 0));
        assert_eq!(clocked.read(0), of(&[700, 3, 90, u64::MAX >> 20]));
    }

    #[test]
    fn a_child_begins_anew() {
        let clocked = Clocked::new();
        clocked.note(5, 0);
        assert_eq!(clocked.read(1), Durations::default());
        clocked.note(7, 1);
        assert_eq!((clocked.read(1).count, clocked.read(1).longest), (1, Duration::from_nanos(7)));
        clocked.note_beside(3, 2);
        assert_eq!((clocked.read(2).count, clocked.read(2).longest), (1, Duration::from_nanos(3)));
    }
}
