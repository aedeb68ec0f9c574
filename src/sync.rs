//! Atomics, fences and the futex: std's and the kernel's, or loom's. The only file that knows loom.
//!
//! Under loom the futex is a model: a queue of sleepers behind one lock, with the kernel's rule that
//! the comparison and the falling asleep are one step, so that a lost wake-up is a deadlock loom reports.

#[cfg(not(loom))]
pub(crate) use real::*;
#[cfg(loom)]
pub(crate) use model::*;

/// How a futex wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// Woken, or the word had changed already, or for no reason: look again.
    Look,
    /// The deadline passed.
    TimedOut,
}

/// The bits of a waiter that any wake-up reaches.
pub(crate) const ANY: u32 = u32::MAX;

#[cfg(not(loom))]
mod real {
    use super::Wake;
    use crate::{clock, sys};
    pub(crate) use std::hint::spin_loop;
    pub(crate) use std::sync::atomic::{
        AtomicPtr, AtomicU32, AtomicU64, Ordering, compiler_fence, fence,
    };

    /// The region's half of the asymmetric fence: nothing at run time, `heavy_fence` does the work.
    #[inline(always)]
    pub(crate) fn light_fence() {
        compiler_fence(Ordering::SeqCst);
    }

    /// The forker's half: every running thread of this process executes a full fence before this
    /// returns. False where the kernel refuses it.
    pub(crate) fn heavy_fence() -> bool {
        fence(Ordering::SeqCst);
        sys::membarrier()
    }

    /// Sleeps while `word` holds `expected`, at most until `deadline` (ns of `clock::now`).
    ///
    /// Async-signal-safe.
    pub(crate) fn futex_wait(
        word: &AtomicU32,
        expected: u32,
        bits: u32,
        deadline: Option<u64>,
    ) -> Wake {
        let Some(deadline) = deadline else {
            sys::futex_wait(word, expected, bits, None);
            return Wake::Look;
        };
        let now = clock::now();
        if now >= deadline {
            return Wake::TimedOut;
        }
        sys::futex_wait(word, expected, bits, Some(clock::real_wait(deadline - now)));
        if word.load(Ordering::Relaxed) == expected && clock::now() >= deadline {
            return Wake::TimedOut;
        }
        Wake::Look
    }

    /// Wakes at most `count` sleepers whose bits meet `bits`; true if one was woken. Async-signal-safe.
    pub(crate) fn futex_wake(word: &AtomicU32, count: u32, bits: u32) -> bool {
        sys::futex_wake(word, count, bits) > 0
    }

    pub(crate) use crate::sys::fence_by_other_means;

    /// Wakes whoever sleeps at an address, which need not be mapped any more: a spurious wake-up at worst.
    pub(crate) fn futex_wake_at(at: *const u32) {
        sys::futex_wake_at(at, u32::MAX, super::ANY);
    }

    /// The time in nanoseconds; see `clock`.
    pub(crate) fn now() -> u64 {
        clock::now()
    }
}

#[cfg(loom)]
mod model {
    use super::Wake;
    pub(crate) use loom::hint::spin_loop;
    pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
    use loom::sync::{Condvar, Mutex};
    use std::sync::Arc;

    loom::lazy_static! {
        static ref QUEUE: (Mutex<Vec<Sleeper>>, Condvar) = (Mutex::new(Vec::new()), Condvar::new());
        static ref TIME: AtomicU64 = AtomicU64::new(0);
    }

    struct Sleeper {
        word: usize,
        bits: u32,
        deadline: u64,
        woken: Arc<std::sync::atomic::AtomicBool>,
    }

    /// membarrier is modelled as a full fence on both sides.
    pub(crate) fn light_fence() {
        fence(Ordering::SeqCst);
    }

    pub(crate) fn heavy_fence() -> bool {
        fence(Ordering::SeqCst);
        true
    }

    /// Time stands still until a thread of the model calls `advance`: a time-out is an interleaving.
    pub(crate) fn futex_wait(
        word: &AtomicU32,
        expected: u32,
        bits: u32,
        deadline: Option<u64>,
    ) -> Wake {
        let deadline = deadline.unwrap_or(u64::MAX);
        let (queue, bell) = &*QUEUE;
        let mut sleepers = queue.lock().unwrap();
        if word.load(Ordering::Relaxed) != expected {
            return Wake::Look;
        }
        if now() >= deadline {
            return Wake::TimedOut;
        }
        let woken = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let address = std::ptr::from_ref(word) as usize;
        sleepers.push(Sleeper { word: address, bits, deadline, woken: Arc::clone(&woken) });
        while !woken.load(std::sync::atomic::Ordering::Relaxed) {
            sleepers = bell.wait(sleepers).unwrap();
        }
        if now() >= deadline { Wake::TimedOut } else { Wake::Look }
    }

    /// The clock of the model moves on to `to`, and every sleeper whose deadline that is wakes.
    pub(crate) fn advance(to: u64) {
        let (queue, bell) = &*QUEUE;
        let mut sleepers = queue.lock().unwrap();
        TIME.store(to, Ordering::SeqCst);
        sleepers.retain(|s| {
            let due = s.deadline <= to;
            s.woken.fetch_or(due, std::sync::atomic::Ordering::Relaxed);
            !due
        });
        bell.notify_all();
    }

    pub(crate) fn fence_by_other_means() {}

    pub(crate) fn futex_wake(word: &AtomicU32, count: u32, bits: u32) -> bool {
        wake(std::ptr::from_ref(word) as usize, count, bits)
    }

    pub(crate) fn futex_wake_at(at: *const u32) {
        wake(at as usize, u32::MAX, super::ANY);
    }

    fn wake(address: usize, count: u32, bits: u32) -> bool {
        let (queue, bell) = &*QUEUE;
        let mut sleepers = queue.lock().unwrap();
        let mut left = count;
        sleepers.retain(|s| {
            if left > 0 && s.word == address && s.bits & bits != 0 {
                left -= 1;
                s.woken.store(true, std::sync::atomic::Ordering::Relaxed);
                return false;
            }
            true
        });
        bell.notify_all();
        left < count
    }

    pub(crate) fn now() -> u64 {
        TIME.load(Ordering::SeqCst)
    }
}
