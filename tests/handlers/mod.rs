//! Two other libraries' handlers, registered before carefork's and after, that do what a test wants of them, and their locks.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    unsafe_code
)]

use crate::common::foreign_handlers;
use std::cell::UnsafeCell;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

// What the early handlers (before carefork's: they prepare after it) and the late ones do, as the test wants it.

pub type Act = fn();

struct Acts([AtomicUsize; 3]);

static EARLY: Acts = Acts([const { AtomicUsize::new(0) }; 3]);
static LATE: Acts = Acts([const { AtomicUsize::new(0) }; 3]);

impl Acts {
    fn run(&self, phase: usize) {
        let act = self.0[phase].load(SeqCst);
        if act != 0 {
            // SAFETY: only `set` stores here, and it stores an `Act`.
            let act: Act = unsafe { std::mem::transmute(act) };
            act();
        }
    }

    fn set(&self, acts: [Act; 3]) {
        self.0.iter().zip(acts).for_each(|(cell, act)| cell.store(act as usize, SeqCst));
    }
}

macro_rules! handlers {
    ($($name:ident $acts:ident $phase:literal;)*) => { $(extern "C" fn $name() { $acts.run($phase); })* };
}
handlers! {
    early_prepare EARLY 0; early_parent EARLY 1; early_child EARLY 2;
    late_prepare LATE 0; late_parent LATE 1; late_child LATE 2;
}

crate::early_foreign_handlers!(early_prepare, early_parent, early_child);

pub fn early(acts: [Act; 3]) {
    EARLY.set(acts);
}

pub fn late(acts: [Act; 3]) {
    static ONCE: Once = Once::new();
    LATE.set(acts);
    ONCE.call_once(|| foreign_handlers(late_prepare, late_parent, late_child));
}

pub fn nothing() {}

/// Another library's lock: libc's, as its handlers take it and let it go on both sides.
pub struct CLock(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: it is a mutex.
unsafe impl Sync for CLock {}

impl CLock {
    pub fn lock(&self) {
        // SAFETY: initialised statically, never moved.
        unsafe { libc::pthread_mutex_lock(self.0.get()) };
    }

    pub fn unlock(&self) {
        // SAFETY: locked by this thread, or by the one that this child's is a copy of.
        unsafe { libc::pthread_mutex_unlock(self.0.get()) };
    }

    /// False if it is held.
    pub fn is_free(&self) -> bool {
        // SAFETY: as in `lock`.
        let free = unsafe { libc::pthread_mutex_trylock(self.0.get()) } == 0;
        if free {
            self.unlock();
        }
        free
    }
}

pub static EARLY_LOCK: CLock = CLock(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));
pub static LATE_LOCK: CLock = CLock(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));

pub fn both_with_locks() {
    early([|| EARLY_LOCK.lock(), || EARLY_LOCK.unlock(), || EARLY_LOCK.unlock()]);
    late([|| LATE_LOCK.lock(), || LATE_LOCK.unlock(), || LATE_LOCK.unlock()]);
}
