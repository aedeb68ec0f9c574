//! Atomics, fences and the futex: std's and the kernel's, or loom's. The only file that knows loom.
//!
//! Under loom the futex is a model: a queue of sleepers behind one lock, with the kernel's rule that
//! the comparison and the falling asleep are one step, so that a lost wake-up is a deadlock loom reports.

#[cfg(loom)]
pub(crate) use model::*;
#[cfg(not(loom))]
pub(crate) use real::*;

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
    pub(crate) use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering, compiler_fence, fence};

    /// A deviation that the models must catch. Compiled in, and named by the environment, only under loom.
    #[inline(always)]
    pub(crate) const fn fault(_: &str) -> bool {
        false
    }

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
    pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, bits: u32, deadline: Option<u64>) -> Wake {
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

    /// Has the processor fetch the line at `p`, which need not be mapped: only a hint.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(crate) fn prefetch<T>(p: *const T) {
        // SAFETY: touches nothing that a program can see; an address that is not mapped is passed over.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
        }
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        unsafe {
            std::arch::asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, readonly, preserves_flags));
        }
    }

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
    use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
    use loom::thread::{Thread, current, park};
    use std::sync::Arc;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, AtomicU64 as StdAtomicU64};

    loom::lazy_static! {
        static ref WORLD: World = World {
            sleepers: Mutex::new(Vec::new()),
            time: StdAtomicU64::new(0),
            membarrier: AtomicBool::new(true),
        };
    }

    struct World {
        sleepers: Mutex<Vec<Sleeper>>,
        /// Not loom's: when time moves on is told apart where threads sleep, and not at every look at the clock.
        time: StdAtomicU64,
        membarrier: AtomicBool,
    }

    struct Sleeper {
        word: usize,
        bits: u32,
        deadline: u64,
        woken: Arc<AtomicBool>,
        thread: Thread,
    }

    impl Sleeper {
        fn wake(&self) -> bool {
            self.woken.store(true, Ordering::Relaxed);
            self.thread.unpark();
            true
        }
    }

    /// Before the first thread of a model: time 0, nobody asleep, membarrier to be had or not.
    pub(crate) fn begin(membarrier: bool) {
        WORLD.membarrier.store(membarrier, Ordering::Relaxed);
    }

    pub(crate) fn fault(name: &str) -> bool {
        static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
        CHOSEN.get_or_init(|| std::env::var("CAREFORK_FAULT").ok()).as_deref() == Some(name)
    }

    /// membarrier is modelled as a full fence on both sides.
    pub(crate) fn light_fence() {
        if WORLD.membarrier.load(Ordering::Relaxed) {
            fence(Ordering::SeqCst);
        }
    }

    pub(crate) fn heavy_fence() -> bool {
        fence(Ordering::SeqCst);
        WORLD.membarrier.load(Ordering::Relaxed)
    }

    /// Time stands still until a thread of the model calls `advance`: a time-out is an interleaving.
    pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, bits: u32, deadline: Option<u64>) -> Wake {
        let deadline = deadline.unwrap_or(u64::MAX);
        let woken = Arc::new(AtomicBool::new(false));
        // The kernel's own, between the call and its look at the word.
        fence(Ordering::SeqCst);
        let mut sleepers = WORLD.sleepers.lock().unwrap();
        if word.load(Ordering::Relaxed) != expected {
            return Wake::Look;
        }
        if now() >= deadline {
            return Wake::TimedOut;
        }
        let address = std::ptr::from_ref(word) as usize;
        let me = Sleeper { word: address, bits, deadline, woken: Arc::clone(&woken), thread: current() };
        sleepers.push(me);
        drop(sleepers);
        while !woken.load(Ordering::Relaxed) {
            park();
        }
        if now() >= deadline { Wake::TimedOut } else { Wake::Look }
    }

    /// The clock of the model moves on by `ns`, and every sleeper whose deadline that is wakes.
    pub(crate) fn advance(ns: u64) {
        let mut sleepers = WORLD.sleepers.lock().unwrap();
        let to = now() + ns;
        WORLD.time.store(to, Ordering::Relaxed);
        sleepers.retain(|s| !(s.deadline <= to && s.wake()));
    }

    pub(crate) fn fence_by_other_means() {}

    pub(crate) fn prefetch<T>(_: *const T) {}

    pub(crate) fn futex_wake(word: &AtomicU32, count: u32, bits: u32) -> bool {
        wake(std::ptr::from_ref(word) as usize, count, bits)
    }

    pub(crate) fn futex_wake_at(at: *const u32) {
        wake(at as usize, u32::MAX, super::ANY);
    }

    fn wake(address: usize, count: u32, bits: u32) -> bool {
        let mut sleepers = WORLD.sleepers.lock().unwrap();
        let mut left = count;
        sleepers.retain(|s| {
            let it = left > 0 && s.word == address && s.bits & bits != 0 && s.wake();
            left -= u32::from(it);
            !it
        });
        left < count
    }

    pub(crate) fn now() -> u64 {
        WORLD.time.load(Ordering::Relaxed)
    }
}
