//! `Condvar`: a sequence that waiters sleep on, with a bit that says somebody may.

#![allow(unsafe_code)]

use super::mutex::{Held, RawMutex};
use super::{deadline_after, deadline_at};
use crate::sync::{self, ANY, AtomicU32, Ordering, Wake};
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

/// Somebody may sleep on the word.
const WAIT: u32 = 1;
const STEP: u32 = 2;

/// The raw condition variable under [`Condvar`]. Its wake-ups may be spurious.
#[derive(Debug)]
pub struct RawCondvar {
    /// A sequence that every notification moves on, and `WAIT`, which may be set with nobody asleep.
    word: AtomicU32,
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
        // Under the mutex, so that whoever changes the condition under it and notifies afterwards sees the bit.
        let seen = self.word.fetch_or(WAIT, Ordering::Relaxed) | WAIT;
        // SAFETY: the caller holds `mutex` by `guard`; a guard of the same thread stands for the same seat until it is replaced.
        unsafe { mutex.unlock(Held::new(guard.me)) };
        let woke = sync::futex_wait(&self.word, seen, ANY, deadline);
        let bomb = Bomb;
        *guard = mutex.lock();
        std::mem::forget(bomb);
        woke == Wake::Look
    }

    fn notify(&self, count: u32) {
        let mut word = self.word.load(Ordering::Relaxed);
        while word & WAIT != 0 {
            let next = if count == 1 { word } else { word & !WAIT }.wrapping_add(STEP);
            match self.word.compare_exchange_weak(word, next, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => {
                    // The bit stays even if nobody was woken: a thread may have gone to sleep on this very word meanwhile,
                    // and taking the bit off would lose it.
                    sync::futex_wake(&self.word, count, ANY);
                    return;
                }
                Err(now) => word = now,
            }
        }
    }
}

// SAFETY: a notification after the unlock moves the word on, so that the sleep does not begin or ends; the mutex is locked again before
// the return, and locking a mutex that was ours cannot panic (only a ghost's does).
unsafe impl lock_api::RawCondvar for RawCondvar {
    const INIT: Self = RawCondvar { word: AtomicU32::new(0) };
    type RawMutex = RawMutex;

    unsafe fn wait(&self, mutex: &RawMutex, guard: &mut Held) {
        self.wait_until_ns(mutex, guard, None);
    }

    fn notify_one(&self) -> bool {
        self.notify(1);
        false
    }

    fn notify_all(&self) -> usize {
        self.notify(u32::MAX);
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
