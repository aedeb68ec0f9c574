//! `OnceLock`: initialised once, inside a region.

#![allow(unsafe_code)]

use super::word_mutex::WordMutex;
use crate::gate::Slot;
use crate::region::{no_forking, record};
use crate::runtime::{gate, me};
use std::cell::UnsafeCell;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

const DONE: u32 = 1;

/// A cell that is written once, by any thread, and never found half written by a child.
///
/// std's interface. The initialiser runs inside a region: forks by other threads wait for it, so it must not wait for a fork, and
/// a fork inside it is refused (G4). Threads that wait for another's initialiser are in no region.
///
/// ```
/// static NAME: carefork::OnceLock<String> = carefork::OnceLock::new();
/// assert_eq!(NAME.get_or_init(|| "first".into()), "first");
/// assert_eq!(NAME.get_or_init(|| "second".into()), "first");
/// ```
pub struct OnceLock<T> {
    state: AtomicU32,
    mutex: WordMutex,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: the value is written once under the mutex and read only after `state` says so (Release/Acquire): shared reads of T. It may
// be written and dropped by another thread than the one that made it, hence Send.
unsafe impl<T: Send + Sync> Sync for OnceLock<T> {}
impl<T: std::panic::RefUnwindSafe + std::panic::UnwindSafe> std::panic::RefUnwindSafe for OnceLock<T> {}

impl<T> OnceLock<T> {
    /// An empty cell.
    pub const fn new() -> Self {
        OnceLock { state: AtomicU32::new(0), mutex: WordMutex::new(), value: UnsafeCell::new(None) }
    }

    /// The value, if it is there.
    #[inline]
    pub fn get(&self) -> Option<&T> {
        // Acquire pairs with the Release in `get_or_init`.
        if self.state.load(Ordering::Acquire) != DONE {
            return None;
        }
        // SAFETY: once DONE the value is only read, until `&mut self`.
        unsafe { &*self.value.get() }.as_ref()
    }

    /// The value, if it is there, to be changed.
    pub fn get_mut(&mut self) -> Option<&mut T> {
        self.value.get_mut().as_mut()
    }

    /// Writes the value.
    ///
    /// # Errors
    /// `value` itself, if there was one already.
    ///
    /// # Panics
    /// Inside this cell's own initialiser.
    #[track_caller]
    pub fn set(&self, value: T) -> Result<(), T> {
        let mut value = Some(value);
        self.get_or_init(|| value.take().expect("an initialiser is called once"));
        value.map_or(Ok(()), Err)
    }

    /// The value; the first to ask makes it with `f`, the others wait.
    ///
    /// # Panics
    /// With `f`; the cell stays empty then. If `f` asks this cell for its value.
    #[inline]
    #[track_caller]
    pub fn get_or_init(&self, f: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.get() {
            return value;
        }
        self.init(f)
    }

    #[cold]
    #[track_caller]
    fn init(&self, f: impl FnOnce() -> T) -> &T {
        /// Unlocks on return and on unwinding.
        struct Unlock<'a>(&'a WordMutex, &'static Slot);
        impl Drop for Unlock<'_> {
            fn drop(&mut self) {
                self.0.unlock(gate(), self.1);
            }
        }

        let me = me();
        assert!(!self.mutex.is_mine(me), "carefork: an initialiser asks for the value that it makes");
        if self.mutex.lock(gate(), me) {
            record(me);
        }
        let unlock = Unlock(&self.mutex, me);
        if self.get().is_none() {
            let region = no_forking();
            let value = f();
            // SAFETY: the mutex is held and the state is not DONE: nobody else looks at the value.
            unsafe { *self.value.get() = Some(value) };
            self.state.store(DONE, Ordering::Release);
            drop(region);
        }
        drop(unlock);
        self.get().expect("initialised above")
    }

    /// The value, by value.
    pub fn into_inner(self) -> Option<T> {
        self.value.into_inner()
    }

    /// Takes the value out; the cell is empty again.
    pub fn take(&mut self) -> Option<T> {
        *self.state.get_mut() = 0;
        self.value.get_mut().take()
    }
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: fmt::Debug> fmt::Debug for OnceLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.get() {
            Some(v) => f.debug_tuple("OnceLock").field(v).finish(),
            None => f.write_str("OnceLock(<uninit>)"),
        }
    }
}

impl<T> From<T> for OnceLock<T> {
    fn from(value: T) -> Self {
        OnceLock { state: AtomicU32::new(DONE), mutex: WordMutex::new(), value: UnsafeCell::new(Some(value)) }
    }
}

impl<T: Clone> Clone for OnceLock<T> {
    fn clone(&self) -> Self {
        self.get().map_or_else(Self::new, |v| Self::from(v.clone()))
    }
}

impl<T: PartialEq> PartialEq for OnceLock<T> {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl<T: Eq> Eq for OnceLock<T> {}
