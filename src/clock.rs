//! The time that bounds and budgets are measured in: `CLOCK_MONOTONIC`, or a clock that a test drives (G11).

use crate::sys;
#[cfg(feature = "testing")]
use std::sync::atomic::{AtomicU64, Ordering};

/// The test clock in ns; 0 while the real clock runs.
#[cfg(feature = "testing")]
static DRIVEN: AtomicU64 = AtomicU64::new(0);

/// Nanoseconds since some fixed moment. Async-signal-safe.
pub(crate) fn now() -> u64 {
    #[cfg(feature = "testing")]
    {
        let driven = DRIVEN.load(Ordering::SeqCst);
        if driven != 0 {
            return driven;
        }
    }
    sys::monotonic()
}

/// How long the kernel may be asked to sleep when `left` ns are to pass: a driven clock is looked at
/// again every millisecond, because nobody wakes a sleeper when it moves.
pub(crate) fn real_wait(left: u64) -> u64 {
    #[cfg(feature = "testing")]
    if DRIVEN.load(Ordering::SeqCst) != 0 {
        return left.min(1_000_000);
    }
    left
}

/// Stops the real clock (at its present time) and moves the driven one on by `by`.
#[cfg(feature = "testing")]
pub fn advance(by: std::time::Duration) {
    let by = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX / 4);
    let start = sys::monotonic();
    let _ = DRIVEN.compare_exchange(0, start, Ordering::SeqCst, Ordering::SeqCst);
    DRIVEN.fetch_add(by, Ordering::SeqCst);
}

/// Lets the real clock run again.
#[cfg(feature = "testing")]
pub fn release() {
    DRIVEN.store(0, Ordering::SeqCst);
}
