//! SplitMix64: a dozen lines, no dependency, and the same numbers for the same seed on every machine.

use std::time::{SystemTime, UNIX_EPOCH};

pub struct Rng(u64);

impl Rng {
    /// Takes its seed from `CAREFORK_SEED`, else from the clock and the pid, and prints it, so that a failure can be
    /// had again.
    pub fn new() -> Rng {
        let given = std::env::var("CAREFORK_SEED").ok().map(|s| s.parse().expect("CAREFORK_SEED is a number"));
        let seed = given.unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
            now ^ u64::from(std::process::id()).rotate_left(40)
        });
        eprintln!("CAREFORK_SEED={seed}");
        Rng(seed)
    }

    pub const fn from_seed(seed: u64) -> Rng {
        Rng(seed)
    }

    /// Async-signal-safe, like everything below it.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which must not be 0. (Skewed by less than n / 2^64.)
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// A source of its own for another thread, which depends on this one's seed only.
    pub fn split(&mut self) -> Rng {
        Rng(self.next())
    }
}
