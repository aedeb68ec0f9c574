//! A table that grows without moving: no allocation, nothing unmapped, async-signal-safe (G9).

#![allow(unsafe_code)]

use crate::sys;
use std::sync::atomic::{AtomicPtr, Ordering};

/// The first entries are there without a mapping; each chunk after them doubles what there is.
pub(crate) const FIRST: u32 = 64;
const CHUNKS: usize = 20;

/// What the kernel's fresh memory is a value of, whoever looks at it from whichever thread.
///
/// # Safety
/// All bytes zero is a valid value.
pub(crate) unsafe trait Zeroed: Sync {}

#[derive(Debug)]
#[repr(C)]
pub(crate) struct Chunks<T> {
    /// Chunk k holds the entries `FIRST << k .. FIRST << (k + 1)`. Never unmapped.
    mapped: [AtomicPtr<T>; CHUNKS],
    first: [T; FIRST as usize],
}

impl<T: Zeroed> Chunks<T> {
    pub(crate) const fn new(first: [T; FIRST as usize]) -> Self {
        Self { mapped: [const { AtomicPtr::new(std::ptr::null_mut()) }; CHUNKS], first }
    }

    /// The entry with that index, if there was ever need of it.
    pub(crate) fn at(&self, index: u32) -> Option<&T> {
        if index < FIRST {
            return self.first.get(index as usize);
        }
        let k = (index / FIRST).ilog2();
        let chunk = self.mapped.get(k as usize)?.load(Ordering::Acquire);
        if chunk.is_null() {
            return None;
        }
        // SAFETY: chunk k has FIRST << k entries and `index - (FIRST << k)` is less than that, by the choice of k.
        let entry = unsafe { chunk.add((index - (FIRST << k)) as usize) };
        // SAFETY: chunks come zeroed from the kernel, which is valid (`Zeroed`), and are never unmapped.
        Some(unsafe { &*entry })
    }

    /// Makes sure that there is an entry with that index; false if there is no memory.
    pub(crate) fn grow(&self, index: u32) -> bool {
        if index < FIRST {
            return true;
        }
        let k = (index / FIRST).ilog2();
        let Some(place) = self.mapped.get(k as usize) else { return false };
        if !place.load(Ordering::Acquire).is_null() {
            return true;
        }
        let len = (FIRST as usize * size_of::<T>()) << k;
        let Ok(fresh) = sys::map(len, false) else { return false };
        let null = std::ptr::null_mut();
        // AcqRel: who finds the chunk finds it zeroed.
        if place.compare_exchange(null, fresh.cast(), Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: another thread was faster; nobody else knows this mapping.
            unsafe { sys::unmap(fresh, len) };
        }
        true
    }
}
