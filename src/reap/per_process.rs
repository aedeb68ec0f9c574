//! A static that each process has for itself.
//!
//! A child of any kind of fork begins with a fresh one and leaves the parent's where it lies: a thread that is gone may
//! hold its locks (a dirty fork, `_Fork`), and what it owns is the parent's to free.

#![allow(unsafe_code)]

use crate::runtime;
use std::sync::atomic::{AtomicPtr, Ordering};

pub(crate) struct PerProcess<T: 'static> {
    at: AtomicPtr<Owned<T>>,
    make: fn() -> T,
}

struct Owned<T> {
    generation: u64,
    value: T,
}

impl<T: Send + Sync> PerProcess<T> {
    pub(crate) const fn new(make: fn() -> T) -> Self {
        Self { at: AtomicPtr::new(std::ptr::null_mut()), make }
    }

    /// This process's value, made when it is first asked for.
    pub(crate) fn get(&self) -> &'static T {
        let generation = runtime::generation();
        loop {
            let seen = self.at.load(Ordering::Acquire);
            // SAFETY: null, or leaked below, and never freed.
            if let Some(owned) = unsafe { seen.as_ref() }
                && owned.generation == generation
            {
                return &owned.value;
            }
            let new = Box::into_raw(Box::new(Owned { generation, value: (self.make)() }));
            if self.at.compare_exchange(seen, new, Ordering::AcqRel, Ordering::Acquire).is_err() {
                // SAFETY: another thread was faster; nobody else knows this one.
                drop(unsafe { Box::from_raw(new) });
            }
        }
    }
}
