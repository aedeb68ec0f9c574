//! `Condvar`: lock_api's condition variable over a word that waiters sleep on.

#![allow(unsafe_code)]

use super::mutex::{Held, RawMutex};
use super::word_condvar::WordCondvar;
use super::{deadline_after, deadline_at};
use lock_api::RawMutex as _;
use std::time::{Duration, Instant};

pub use lock_api::WaitTimeoutResult;

/// A condition variable for [`Mutex`](crate::Mutex) that works in a child, whoever waited in the parent.
///
/// A thread that waits is in no region (unless it holds another lock): forks go on meanwhile. Wake-ups may be spurious.
///
/// ```
/// use carefork::{Condvar, Mutex};
/// let (ready, bell) = (Mutex::new(false), Condvar::new());
/// std::thread::scope(|s| {
///     s.spawn(|| {
///         *ready.lock() = true;
///         bell.notify_one();
///     });
///     let mut guard = ready.lock();
///     while !*guard {
///         bell.wait(&mut guard);
///     }
/// });
/// ```
pub type Condvar = lock_api::Condvar<RawCondvar>;

/// The raw condition variable under [`Condvar`]. Its wake-ups may be spurious.
#[derive(Debug)]
pub struct RawCondvar {
    word: WordCondvar,
}

/// Without the mutex there is no way back into the caller's guard, not even by unwinding.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        std::process::abort();
    }
}

impl RawCondvar {
    /// True if woken, false at the deadline.
    fn wait_until_ns(&self, mutex: &RawMutex, guard: &mut Held, deadline: Option<u64>) -> bool {
        // SAFETY: the caller holds `mutex` by `guard`; a guard of the same thread stands for the same seat until it is replaced.
        let unlock = || unsafe { mutex.unlock(Held::new(guard.me)) };
        let woke = self.word.wait(deadline, unlock);
        let bomb = Bomb;
        *guard = mutex.lock();
        std::mem::forget(bomb);
        woke
    }
}

// SAFETY: a notification after the unlock ends the sleep or keeps it from beginning (loom-tests); the mutex is locked again before the return,
// and locking a mutex that was ours cannot panic (only a ghost's does).
unsafe impl lock_api::RawCondvar for RawCondvar {
    const INIT: Self = RawCondvar { word: WordCondvar::new() };
    type RawMutex = RawMutex;

    unsafe fn wait(&self, mutex: &RawMutex, guard: &mut Held) {
        self.wait_until_ns(mutex, guard, None);
    }

    fn notify_one(&self) -> bool {
        self.word.notify(1);
        false
    }

    fn notify_all(&self) -> usize {
        self.word.notify(u32::MAX);
        0
    }
}

// SAFETY: as above.
unsafe impl lock_api::RawCondvarTimed for RawCondvar {
    fn checked_duration_to_instant(timeout: &Duration) -> Option<Instant> {
        Instant::now().checked_add(*timeout)
    }

    unsafe fn wait_until(&self, mutex: &RawMutex, guard: &mut Held, timeout: &Instant) -> bool {
        !self.wait_until_ns(mutex, guard, Some(deadline_at(*timeout)))
    }

    unsafe fn wait_for(&self, mutex: &RawMutex, guard: &mut Held, timeout: &Duration) -> bool {
        !self.wait_until_ns(mutex, guard, Some(deadline_after(*timeout)))
    }
}
