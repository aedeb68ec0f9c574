//! Fork-aware locks: their critical sections are regions, so no fork finds one held, but by the forking thread (L1-L4).
//!
//! Taking a lock happens inside the region, waiting for it outside, asleep in the kernel: no child finds a waiter. Nothing is
//! registered; any number of them costs a fork nothing.

mod condvar;
mod lazy;
mod mutex;
mod once;
mod per_process;
mod rwlock;
pub(crate) mod word_condvar;
pub(crate) mod word_mutex;
pub(crate) mod word_rw;
#[cfg(test)]
mod word_tests;

pub use condvar::{Condvar, RawCondvar, WaitTimeoutResult};
pub use lazy::LazyLock;
pub use mutex::{Held, MappedMutexGuard, Mutex, MutexGuard, RawMutex};
pub use once::OnceLock;
#[cfg(feature = "service")]
pub(crate) use per_process::Own;
pub use per_process::PerProcess;
pub use rwlock::{
    MappedRwLockReadGuard, MappedRwLockWriteGuard, RawRwLock, RwLock, RwLockReadGuard, RwLockUpgradableReadGuard,
    RwLockWriteGuard,
};

use crate::clock;
use std::time::{Duration, Instant};

/// The time as `clock` counts it.
fn deadline_after(d: Duration) -> u64 {
    clock::now().saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

fn deadline_at(t: Instant) -> u64 {
    deadline_after(t.saturating_duration_since(Instant::now()))
}
