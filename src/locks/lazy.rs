//! `LazyLock`: a `OnceLock` that knows its initialiser.

#![allow(unsafe_code)]

use super::once::OnceLock;
use std::cell::Cell;
use std::fmt;
use std::ops::Deref;

/// A value that the first to look at it makes, inside a region (see [`OnceLock`]).
///
/// std's interface.
///
/// # Panics
/// Looking at it panics if the initialiser did, then and later.
///
/// ```
/// static TABLE: carefork::LazyLock<Vec<u32>> = carefork::LazyLock::new(|| (0..4).collect());
/// assert_eq!(TABLE.len(), 4);
/// ```
pub struct LazyLock<T, F = fn() -> T> {
    cell: OnceLock<T>,
    /// Taken by the one initialisation.
    init: Cell<Option<F>>,
}

// SAFETY: `init` is touched only inside the cell's initialisation, which runs on one thread at a time.
unsafe impl<T, F: Send> Sync for LazyLock<T, F> where OnceLock<T>: Sync {}
impl<T: std::panic::RefUnwindSafe + std::panic::UnwindSafe, F: std::panic::UnwindSafe> std::panic::RefUnwindSafe
    for LazyLock<T, F>
{
}

impl<T, F: FnOnce() -> T> LazyLock<T, F> {
    /// A value to be made by `f`.
    pub const fn new(f: F) -> Self {
        LazyLock { cell: OnceLock::new(), init: Cell::new(Some(f)) }
    }

    /// Makes the value if need be.
    ///
    /// # Panics
    /// If the initialiser panics or did.
    #[inline]
    #[track_caller]
    pub fn force(this: &Self) -> &T {
        this.cell.get_or_init(|| match this.init.take() {
            Some(f) => f(),
            None => panic!("LazyLock instance has previously been poisoned"),
        })
    }
}

impl<T, F: FnOnce() -> T> Deref for LazyLock<T, F> {
    type Target = T;

    #[inline]
    #[track_caller]
    fn deref(&self) -> &T {
        Self::force(self)
    }
}

impl<T: Default> Default for LazyLock<T> {
    fn default() -> Self {
        LazyLock::new(T::default)
    }
}

impl<T: fmt::Debug, F> fmt::Debug for LazyLock<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cell.get() {
            Some(v) => f.debug_tuple("LazyLock").field(v).finish(),
            None => f.write_str("LazyLock(<uninit>)"),
        }
    }
}
