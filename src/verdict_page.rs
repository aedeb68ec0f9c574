//! Where the words of verdict.rs are: a page that parent and child share, one for each process that forks.

#![allow(unsafe_code)]

use crate::sys;
use std::io;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// One page of memory of any size that Linux knows. A child that is slower than that many later forks goes by its copy of the gate.
const WORDS: u32 = 1024;
/// Two changes of the gate's word, a shutting and an opening, make one fork.
const STEP: u32 = 8;

#[derive(Debug)]
pub(crate) struct Page {
    mine: AtomicPtr<AtomicU32>,
    /// The parent's, in a child that has not needed one of its own yet.
    old: AtomicPtr<AtomicU32>,
}

impl Page {
    pub(crate) const fn new() -> Self {
        Self { mine: AtomicPtr::new(std::ptr::null_mut()), old: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// Makes sure that there is one. Before the gate is shut. Async-signal-safe.
    pub(crate) fn ready(&self) -> io::Result<()> {
        if !self.mine.load(Ordering::Acquire).is_null() {
            return Ok(());
        }
        let page = sys::map(sys::PAGE, true)?;
        let null = std::ptr::null_mut();
        if self.mine.compare_exchange(null, page.cast(), Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: another thread was faster; nobody else knows this mapping.
            unsafe { sys::unmap(page, sys::PAGE) };
        }
        let old = self.old.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if !old.is_null() {
            // SAFETY: `forget` put it there, whose process held no reference into it; the swap made it this thread's.
            unsafe { sys::unmap(old.cast(), sys::PAGE) };
        }
        Ok(())
    }

    /// The word of the fork that shut the gate by `shut`. Async-signal-safe.
    pub(crate) fn word(&self, shut: u32) -> Option<&'static AtomicU32> {
        let page = self.mine.load(Ordering::Acquire);
        if page.is_null() {
            return None;
        }
        // SAFETY: the page holds WORDS words and the index is below that.
        let word = unsafe { page.add((shut / STEP % WORDS) as usize) };
        // SAFETY: zeroed by the kernel, which is a valid AtomicU32; unmapped only in children, after `forget`.
        Some(unsafe { &*word })
    }

    /// In a child, whose one thread holds no reference into it: the page is the parent's. Unmapped with the first fork of this
    /// process's own, since most children make none.
    pub(crate) fn forget(&self) {
        let page = self.mine.swap(std::ptr::null_mut(), Ordering::Relaxed);
        if !page.is_null() {
            self.old.store(page, Ordering::Relaxed);
        }
    }
}
