//! `PerProcess`: a value that each process makes for itself.

#![allow(unsafe_code)]

use super::word_mutex::WordMutex;
use crate::gate::Slot;
use crate::region::{no_forking, record};
use crate::runtime::{self, gate, me};
use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A value that each process makes for itself: like [`LazyLock`](crate::LazyLock), but a child finds it empty again.
///
/// For what does not survive a fork: a thread pool (its threads are the parent's), a connection, a cache of the process id. The
/// first to ask makes the value, inside a region: see [`OnceLock`](crate::OnceLock) for what that means. A child's copy of its
/// parent's value is neither used nor dropped: it stays in memory, because dropping a pool, say, would wait for threads that are not
/// there. Descriptors in it stay open in the child unless they are care-fds.
///
/// ```
/// static PID: carefork::PerProcess<u32> = carefork::PerProcess::new(std::process::id);
/// let parent = *PID.get();
/// // SAFETY: the child uses no descriptor of the parent's.
/// let mut child = unsafe { carefork::spawn(|| i32::from(*PID.get() == parent)) }?;
/// assert!(child.wait()?.success());
/// assert_eq!(*PID.get(), parent);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PerProcess<T, F = fn() -> T> {
    own: Own<T>,
    make: F,
}

impl<T, F: Fn() -> T> PerProcess<T, F> {
    /// A value to be made by `make`, once in each process that asks for it.
    pub const fn new(make: F) -> Self {
        PerProcess { own: Own::new(), make }
    }

    /// This process's value; the first to ask makes it, the others wait.
    ///
    /// # Panics
    /// With `make`; the next to ask tries again. If `make` asks for the value that it makes. In a child of a *dirty* fork or a bypass
    /// (see [`lineage`](crate::lineage())) that came while another thread made the value.
    #[inline]
    #[track_caller]
    pub fn get(&self) -> &T {
        match self.own.here() {
            Some(value) => value,
            None => {
                let Ok(value) = self.own.get_or_make(|| Ok::<_, Infallible>((self.make)()));
                value
            }
        }
    }
}

impl<T: fmt::Debug, F> fmt::Debug for PerProcess<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.own.here() {
            Some(v) => f.debug_tuple("PerProcess").field(v).finish(),
            None => f.write_str("PerProcess(<not made here>)"),
        }
    }
}

/// The cell under [`PerProcess`]: a value and the generation that made it.
///
/// Reading costs a load beside [`fork_generation`](crate::fork_generation), in no region: a value that was once seen lives as long as
/// the cell, because what a later generation replaces is leaked.
pub(crate) struct Own<T> {
    /// Null, or a box that only `drop` frees.
    last: AtomicPtr<Made<T>>,
    /// Held while a value is made.
    making: WordMutex,
    /// Owns a T, shares it between threads, and may drop it on another one than made it.
    owns: PhantomData<std::sync::OnceLock<T>>,
}

struct Made<T> {
    generation: u64,
    value: T,
}

impl<T> Own<T> {
    pub(crate) const fn new() -> Self {
        Own { last: AtomicPtr::new(std::ptr::null_mut()), making: WordMutex::new(), owns: PhantomData }
    }

    #[inline]
    fn last(&self) -> Option<&Made<T>> {
        // Acquire pairs with the Release in `get_or_make`: the value is whole.
        let last = self.last.load(Ordering::Acquire);
        // SAFETY: null or from `Box::into_raw`, shared only, and freed by `drop` alone, which has the cell to itself.
        unsafe { last.as_ref() }
    }

    /// This process's value.
    #[inline]
    pub(crate) fn here(&self) -> Option<&T> {
        self.last().filter(|made| made.generation == runtime::generation()).map(|made| &made.value)
    }

    /// This process's value, made by `f` if need be, inside a region.
    #[cold]
    #[track_caller]
    pub(crate) fn get_or_make<E>(&self, f: impl FnOnce() -> Result<T, E>) -> Result<&T, E> {
        /// Unlocks on return and on unwinding.
        struct Unlock<'a>(&'a WordMutex, &'static Slot);
        impl Drop for Unlock<'_> {
            fn drop(&mut self) {
                self.0.unlock(gate(), self.1);
            }
        }

        let me = me();
        assert!(!self.making.is_mine(me), "carefork: an initialiser asks for the value that it makes");
        if self.making.lock(gate(), me) {
            record(me);
        }
        let _unlock = Unlock(&self.making, me);
        if let Some(value) = self.here() {
            return Ok(value);
        }
        let _region = no_forking();
        let made = Box::new(Made { generation: runtime::generation(), value: f()? });
        // What was there is another process's: leaked, see the type.
        self.last.store(Box::into_raw(made), Ordering::Release);
        // Not `here`: foreign code in `f` may have forked, and then this is not what the next to ask will get.
        Ok(&self.last().expect("stored above").value)
    }
}

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        if self.here().is_some() {
            // SAFETY: `here` has seen a pointer from `Box::into_raw`, and `&mut self` is the only way to it.
            drop(unsafe { Box::from_raw(*self.last.get_mut()) });
        }
    }
}
