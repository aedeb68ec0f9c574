use carefork::{LazyLock, no_forking};

// Your own: carefork's instead of std's. The initialiser is a region.
pub static PRIMES: LazyLock<Vec<u32>> = LazyLock::new(|| (2..100).filter(|n| (2..*n).all(|d| n % d != 0)).collect());

/// Somebody else's: looked at inside a region, by everybody.
pub fn force<T, F: FnOnce() -> T>(lazy: &std::sync::LazyLock<T, F>) -> &T {
    let _region = no_forking();
    lazy
}
