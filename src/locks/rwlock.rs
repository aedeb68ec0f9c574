//! `RwLock`: parking_lot's interface over a word whose critical sections are regions.

#![allow(unsafe_code)]

use super::mutex::{Held, held};
use super::word_rw::{Want, WordRw};
use super::{deadline_after, deadline_at};
use crate::region::record;
use crate::runtime::{gate, generation_here, me};
use std::time::{Duration, Instant};

/// A readers-writer lock that no fork by another thread finds held.
///
/// As [`Mutex`](crate::Mutex), with any number of readers. A waiting writer keeps new readers out while somebody holds the lock, so a
/// thread that reads must not wait to read again.
///
/// # Panics
/// As for [`Mutex`](crate::Mutex); readers left behind in a dirty child cannot be told from its own, so there a writer panics after one
/// second.
///
/// ```
/// static NAMES: carefork::RwLock<Vec<String>> = carefork::RwLock::new(Vec::new());
/// NAMES.write().push("a".into());
/// assert_eq!(NAMES.read().len(), 1);
/// ```
pub type RwLock<T> = lock_api::RwLock<RawRwLock, T>;

/// A [`RwLock`] held for reading.
pub type RwLockReadGuard<'a, T> = lock_api::RwLockReadGuard<'a, RawRwLock, T>;

/// A [`RwLock`] held for writing.
pub type RwLockWriteGuard<'a, T> = lock_api::RwLockWriteGuard<'a, RawRwLock, T>;

/// A [`RwLock`] held for reading by the one reader that may become the writer.
pub type RwLockUpgradableReadGuard<'a, T> = lock_api::RwLockUpgradableReadGuard<'a, RawRwLock, T>;

/// A [`RwLock`] held for reading, seen as a part of its data.
pub type MappedRwLockReadGuard<'a, T> = lock_api::MappedRwLockReadGuard<'a, RawRwLock, T>;

/// A [`RwLock`] held for writing, seen as a part of its data.
pub type MappedRwLockWriteGuard<'a, T> = lock_api::MappedRwLockWriteGuard<'a, RawRwLock, T>;

/// The raw lock under [`RwLock`], for `lock_api`'s generic types. Dropping it locked is safe.
#[derive(Debug)]
pub struct RawRwLock {
    word: WordRw,
}

impl RawRwLock {
    #[inline]
    #[track_caller]
    fn lock(&self, want: Want) -> Held {
        let me = me();
        if self.word.lock(gate(), me, want, generation_here()) {
            record(me);
        }
        Held::new(me)
    }

    #[inline]
    #[track_caller]
    fn try_lock(&self, want: Want) -> Option<Held> {
        let me = me();
        // No closure: it would be the place that is recorded.
        if self.word.try_lock(gate(), me, want, generation_here()) { Some(held(me)) } else { None }
    }

    #[track_caller]
    fn lock_until(&self, want: Want, deadline: u64) -> Option<Held> {
        let me = me();
        // No closure: it would be the place that is recorded.
        if self.word.lock_until(gate(), me, want, generation_here(), deadline) { Some(held(me)) } else { None }
    }
}

// SAFETY: the word gives exclusion (loom-tests), Acquire on locking and Release on unlocking; an operation that panics (a ghost's
// lock) holds nothing new. The word is plain data: dropping or moving it locked leaves nothing behind.
unsafe impl lock_api::RawRwLock for RawRwLock {
    const INIT: Self = RawRwLock { word: WordRw::new() };
    type SharedGuard = Held;
    type ExclusiveGuard = Held;

    #[inline]
    #[track_caller]
    fn lock_shared(&self) -> Held {
        self.lock(Want::Read)
    }

    #[inline]
    #[track_caller]
    fn try_lock_shared(&self) -> Option<Held> {
        self.try_lock(Want::Read)
    }

    #[inline]
    unsafe fn unlock_shared(&self, guard: Held) {
        self.word.unlock_read(gate(), guard.me);
    }

    #[inline]
    #[track_caller]
    fn lock_exclusive(&self) -> Held {
        self.lock(Want::Write)
    }

    #[inline]
    #[track_caller]
    fn try_lock_exclusive(&self) -> Option<Held> {
        self.try_lock(Want::Write)
    }

    #[inline]
    unsafe fn unlock_exclusive(&self, guard: Held) {
        self.word.unlock_write(gate(), guard.me);
    }

    fn is_locked(&self) -> bool {
        self.word.is_locked()
    }

    fn is_locked_exclusive(&self) -> bool {
        self.word.is_locked_exclusive()
    }
}

// SAFETY: one swap of the word; the holder stays in its region.
unsafe impl lock_api::RawRwLockDowngrade for RawRwLock {
    unsafe fn downgrade(&self, guard: Held) -> Held {
        self.word.downgrade(false, generation_here());
        guard
    }
}

// SAFETY: as for `RawRwLock`; giving up leaves the lock as it was.
unsafe impl lock_api::RawRwLockTimed for RawRwLock {
    type Duration = Duration;
    type Instant = Instant;

    #[track_caller]
    fn try_lock_shared_for(&self, timeout: Duration) -> Option<Held> {
        self.lock_until(Want::Read, deadline_after(timeout))
    }

    #[track_caller]
    fn try_lock_shared_until(&self, timeout: Instant) -> Option<Held> {
        self.lock_until(Want::Read, deadline_at(timeout))
    }

    #[track_caller]
    fn try_lock_exclusive_for(&self, timeout: Duration) -> Option<Held> {
        self.lock_until(Want::Write, deadline_after(timeout))
    }

    #[track_caller]
    fn try_lock_exclusive_until(&self, timeout: Instant) -> Option<Held> {
        self.lock_until(Want::Write, deadline_at(timeout))
    }
}

// SAFETY: the word lets one upgradable reader in at a time, and make it the writer once it is alone.
unsafe impl lock_api::RawRwLockUpgrade for RawRwLock {
    type UpgradableGuard = Held;

    #[track_caller]
    fn lock_upgradable(&self) -> Held {
        self.lock(Want::Upgradable)
    }

    #[track_caller]
    fn try_lock_upgradable(&self) -> Option<Held> {
        self.try_lock(Want::Upgradable)
    }

    unsafe fn unlock_upgradable(&self, guard: Held) {
        self.word.unlock_upgradable(gate(), guard.me);
    }

    unsafe fn upgrade(&self, guard: Held) -> Held {
        self.word.upgrade(gate(), guard.me, generation_here(), None);
        guard
    }

    unsafe fn try_upgrade(&self, guard: Held) -> Result<Held, Held> {
        if self.word.try_upgrade(guard.me) { Ok(guard) } else { Err(guard) }
    }
}

// SAFETY: one step of the word each; the holder stays in its region.
unsafe impl lock_api::RawRwLockUpgradeDowngrade for RawRwLock {
    unsafe fn downgrade_upgradable(&self, guard: Held) -> Held {
        self.word.downgrade_upgradable();
        guard
    }

    unsafe fn downgrade_to_upgradable(&self, guard: Held) -> Held {
        self.word.downgrade(true, generation_here());
        guard
    }
}

// SAFETY: as above; an upgrader that gives up is an upgradable reader still.
unsafe impl lock_api::RawRwLockUpgradeTimed for RawRwLock {
    #[track_caller]
    fn try_lock_upgradable_for(&self, timeout: Duration) -> Option<Held> {
        self.lock_until(Want::Upgradable, deadline_after(timeout))
    }

    #[track_caller]
    fn try_lock_upgradable_until(&self, timeout: Instant) -> Option<Held> {
        self.lock_until(Want::Upgradable, deadline_at(timeout))
    }

    unsafe fn try_upgrade_for(&self, guard: Held, timeout: Duration) -> Result<Held, Held> {
        let upgraded = self.word.upgrade(gate(), guard.me, generation_here(), Some(deadline_after(timeout)));
        if upgraded { Ok(guard) } else { Err(guard) }
    }

    unsafe fn try_upgrade_until(&self, guard: Held, timeout: Instant) -> Result<Held, Held> {
        let upgraded = self.word.upgrade(gate(), guard.me, generation_here(), Some(deadline_at(timeout)));
        if upgraded { Ok(guard) } else { Err(guard) }
    }
}
