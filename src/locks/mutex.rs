//! `Mutex`: parking_lot's interface over a word whose critical section is a region.

#![allow(unsafe_code)]

use super::word_mutex::WordMutex;
use super::{deadline_after, deadline_at};
use crate::gate::{LOCK, Slot};
use crate::region::record;
use crate::runtime::{gate, me};
use std::marker::PhantomData;
use std::time::{Duration, Instant};

/// A mutual exclusion lock that no fork by another thread finds held.
///
/// The interface is `lock_api`'s, as in parking_lot. While it is held, forks by other threads wait; the holder itself may fork, and
/// the guard is valid on both sides then, over data at rest (L4). Two holders, of two locks, that fork at the same time cannot both: one gets
/// [`WouldDeadlock`](crate::ForkError::WouldDeadlock). In a child every such lock is free or held by the child's one
/// thread. Not `Send` guards: a region belongs to its thread.
///
/// # Panics
/// In a child of a *dirty* fork or a bypass (see [`lineage`](crate::lineage())) waiting for a lock that a thread left behind
/// holds panics instead of hanging (G6, G10).
///
/// ```
/// static COUNT: carefork::Mutex<u32> = carefork::Mutex::new(0);
/// *COUNT.lock() += 1;
/// // SAFETY: the child uses no descriptor of the parent's.
/// let mut child = unsafe { carefork::spawn(|| *COUNT.lock() as i32) }?;
/// assert_eq!(child.wait()?.code(), Some(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type Mutex<T> = lock_api::Mutex<RawMutex, T>;

/// A held [`Mutex`].
///
/// ```compile_fail
/// fn send<T: Send>(_: T) {}
/// let m = carefork::Mutex::new(1);
/// send(m.lock());
/// ```
/// ```
/// fn keep<T>(_: T) {}
/// let m = carefork::Mutex::new(1);
/// keep(m.lock());
/// ```
pub type MutexGuard<'a, T> = lock_api::MutexGuard<'a, RawMutex, T>;

/// A held [`Mutex`], seen as a part of its data.
pub type MappedMutexGuard<'a, T> = lock_api::MappedMutexGuard<'a, RawMutex, T>;

/// What a guard holds beside the lock: its thread's seat, so that unlocking need not look it up.
#[derive(Debug)]
pub struct Held {
    pub(super) me: &'static Slot,
    not_send: PhantomData<*mut ()>,
}

// SAFETY: a shared Held offers nothing; a seat is shared state anyway.
unsafe impl Sync for Held {}

impl Held {
    #[inline(always)]
    pub(super) fn new(me: &'static Slot) -> Self {
        Held { me, not_send: PhantomData }
    }
}

/// After an attempt that succeeded.
#[inline(always)]
#[track_caller]
pub(super) fn held(me: &'static Slot) -> Held {
    if me.only(LOCK) {
        record(me);
    }
    Held::new(me)
}

/// The raw lock under [`Mutex`], for `lock_api`'s generic types. Dropping it locked is safe.
#[derive(Debug)]
pub struct RawMutex {
    pub(super) word: WordMutex,
}

// SAFETY: the word gives exclusion (loom-tests), Acquire on locking and Release on unlocking; an operation that panics (a ghost's
// lock) holds nothing new. The word is plain data: dropping or moving it locked leaves nothing behind.
unsafe impl lock_api::RawMutex for RawMutex {
    const INIT: Self = RawMutex { word: WordMutex::new() };
    type Guard = Held;

    #[inline]
    #[track_caller]
    fn lock(&self) -> Held {
        let me = me();
        if self.word.lock(gate(), me) {
            record(me);
        }
        Held::new(me)
    }

    #[inline]
    #[track_caller]
    fn try_lock(&self) -> Option<Held> {
        let me = me();
        // No closure: it would be the place that is recorded.
        if self.word.try_lock(gate(), me) { Some(held(me)) } else { None }
    }

    #[inline]
    unsafe fn unlock(&self, guard: Held) {
        self.word.unlock(gate(), guard.me);
    }

    #[inline]
    fn is_locked(&self) -> bool {
        self.word.is_locked()
    }
}

// SAFETY: as for `RawMutex`; giving up leaves the lock as it was.
unsafe impl lock_api::RawMutexTimed for RawMutex {
    type Duration = Duration;
    type Instant = Instant;

    #[track_caller]
    fn try_lock_for(&self, timeout: Duration) -> Option<Held> {
        let me = me();
        // No closure: it would be the place that is recorded.
        if self.word.lock_until(gate(), me, deadline_after(timeout)) { Some(held(me)) } else { None }
    }

    #[track_caller]
    fn try_lock_until(&self, timeout: Instant) -> Option<Held> {
        let me = me();
        // No closure: it would be the place that is recorded.
        if self.word.lock_until(gate(), me, deadline_at(timeout)) { Some(held(me)) } else { None }
    }
}
