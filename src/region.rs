//! Regions: stretches of code during which no other thread may fork (G1, G4, G7, G12).

#![allow(unsafe_code)]

use crate::gate::GUARD;
use crate::runtime::{gate, me, try_me};
use std::marker::PhantomData;
use std::panic::Location;
use std::sync::atomic::Ordering::Relaxed;

/// A region: while it lives, no other thread of this process forks.
///
/// Regions are shared and nest; see [`no_forking`]. Not `Send`: a region belongs to the thread that began it.
///
/// `let _ = no_forking();` ends at once and guards nothing; write `let _region = no_forking();`, and deny rustc's
/// `let_underscore_drop`.
///
/// ```compile_fail
/// fn send<T: Send>(_: T) {}
/// send(carefork::no_forking());
/// ```
/// ```
/// fn keep<T>(_: T) {}
/// keep(carefork::no_forking());
/// ```
#[must_use = "the region ends when the guard is dropped"]
#[derive(Debug)]
pub struct NoForking {
    not_send: PhantomData<*mut ()>,
}

/// Begins a region: until the guard is dropped, a fork from any other thread waits.
///
/// An outermost region waits while the gate is shut for a fork, at most about 100 ms at a time, or as long as the kernel copies the process, some 20 ms for
/// each GiB in use (G11); a nested one never
/// waits. It costs a few nanoseconds, whatever the number of threads. What happens inside should be short and must
/// not wait for a fork: a coordinated fork that waits longer than its budget (1 s unless set) gives up with
/// [`ForkError::Busy`](crate::ForkError::Busy), which names this place in builds with debug assertions. Who waits inside for another thread
/// that begins a region keeps a pending fork from coming until its bound lets that thread in. The threads of a [`Service`](crate::Service), a
/// [`Reaper`](crate::Reaper) and a [logger](crate::log) are let in at once, as are the ends of those that [`thread::spawn`](crate::thread::spawn)
/// starts; but not a service's thread for a region that another service's handler is in.
///
/// In a child there is nothing special about it. Forking inside one's own region is refused (G4).
///
/// # Panics
/// If there is no memory for the first region of a new thread.
///
/// ```
/// let region = carefork::no_forking();
/// // Two steps that no child may see half done.
/// drop(region);
/// ```
#[inline]
#[track_caller]
pub fn no_forking() -> NoForking {
    let me = me();
    if gate().enter(me, GUARD) {
        record(me);
    }
    NoForking { not_send: PhantomData }
}

/// Begins a region unless a fork keeps the gate shut. Async-signal-safe; never waits, never allocates (G12).
///
/// `None` while the gate is shut, also inside a region of the same thread, and where a thread that was never seen before
/// finds no memory for its seat.
///
/// ```
/// if let Some(_region) = carefork::try_no_forking() {
///     // no other thread forks here
/// }
/// ```
#[inline]
#[track_caller]
pub fn try_no_forking() -> Option<NoForking> {
    let me = try_me()?;
    let outermost = me.depth() == 0;
    if !gate().try_enter(me, GUARD) {
        return None;
    }
    if outermost {
        record(me);
    }
    Some(NoForking { not_send: PhantomData })
}

/// Others may wait, in regions of theirs, for what this thread does from here on: no fork waits for them and keeps it out of its own. Until the
/// thread's end; in a child nobody does.
pub(crate) fn awaited(rank: u8) {
    // Without memory for a seat it is kept out like others, until there is some.
    if let Some(me) = try_me() {
        me.rise(rank);
    }
}

/// Where the outermost region began; only in builds that can spare the store.
#[inline(always)]
#[track_caller]
pub(crate) fn record(me: &crate::gate::Slot) {
    if cfg!(debug_assertions) {
        me.entered.store(std::ptr::from_ref(Location::caller()).cast_mut(), Relaxed);
    }
}

impl Drop for NoForking {
    #[inline]
    fn drop(&mut self) {
        gate().leave(me(), GUARD);
    }
}

/// Ends every region of the calling thread whose guard was forgotten (`mem::forget`), and leaves its locks alone (G7).
///
/// # Safety
/// No [`NoForking`] guard of this thread is alive, no initialiser of a [`OnceLock`](crate::OnceLock) or
/// [`LazyLock`](crate::LazyLock) and no opening of a [`CareFd`](crate::CareFd) is under way on it: their end would be counted
/// twice.
///
/// ```
/// std::mem::forget(carefork::no_forking());
/// // SAFETY: the only guard of this thread was forgotten.
/// unsafe { carefork::force_unlock() };
/// ```
pub unsafe fn force_unlock() {
    let me = me();
    me.clear_guards();
    if me.depth() == 0 {
        gate().left();
    }
}
