//! Hooks for locks that others made: `std::sync`, parking_lot, and any raw lock of `lock_api` (L5).
//!
//! Each takes the lock by trying (`hook::take` paces the tries), holds it over the fork, and lets go of it on each side in the
//! way that is right there. Nothing here allocates, waits, or looks at what the lock protects.

#![allow(unsafe_code)]

use crate::hook::{Foreign, Hook};
use crate::locks;
use std::any::TypeId;
use std::cell::UnsafeCell;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync;

/// # Locks of others
/// A hook that holds a lock over the fork: every child finds it free, and what it protects at rest. `lock` is an `Arc` of it, a
/// `&'static`, or anything else that derefs to it and owns it. Rank and further functions can be added; setting
/// `prepare` or `try_prepare` on such a hook replaces the taking of the lock.
///
/// The lock is tried, again and again within the fork's budget, never waited for. So a fork that does not get it is
/// [`ForkError::Busy`](crate::ForkError::Busy) with the hook's name, or dirty if it is a foreign one; and **a thread that
/// forks while it holds the lock itself** gets just that after the whole budget, since to these locks it is one more that
/// holds them (but for a reentrant one). So does every fork while two such hooks hold one lock. So does a lock that is never free because it is handed from each holder to the next
/// (parking_lot's `FairMutex` with waiters at all times). Fork with the lock free, or use [`Mutex`](crate::Mutex) or
/// [`RwLock`](crate::RwLock), which let their holder fork.
///
/// Forking 2000 times while four threads hammer the lock, and children that lock it once or let two new threads fight over
/// it, hung this often:
///
/// | lock, with its hook | child locks | two new threads | one new thread must wake another |
/// |---|---|---|---|
/// | `std::sync::Mutex`, `RwLock` | 0 | 0 | 0 |
/// | parking_lot 0.13 | 0 | 0.2 % | 54 % |
/// | parking_lot 0.12 | 0 | 36 % | 53 % |
/// | any, all its uses inside [`no_forking`](crate::no_forking) | 0 | 0 | 0 |
/// | this library's own, without any hook | 0 | 0 | 0 |
///
/// **parking_lot keeps its waiting threads in a table of the whole process**, whose locks nobody outside can take. A
/// child inherits that table with entries, and perhaps locks, of threads that are gone. Holding one mutex over the fork
/// does not mend the table: so a child with one thread may use the lock, a child that starts threads which wait for each
/// other through parking_lot (through any of its locks, also new ones) may hang. `Condvar`, `Once` and `ReentrantMutex` of
/// parking_lot wait in the same table.
impl Hook {
    /// Holds a [`std::sync::Mutex`] over the fork. A poisoned one is taken like any other and stays poisoned; this never
    /// poisons one.
    ///
    /// Cannot be promised: nothing; this lock waits in the kernel, and children may use it with any number of threads. A `Condvar`
    /// used with it is fine too.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// let log = Arc::new(Mutex::new(Vec::<String>::new()));
    /// let hook = carefork::register(carefork::Hook::std_mutex("log", Arc::clone(&log)));
    /// # drop(hook);
    /// ```
    pub fn std_mutex<T: ?Sized + 'static>(
        name: &'static str,
        lock: impl Deref<Target = sync::Mutex<T>> + Send + Sync + 'static,
    ) -> Hook {
        Hook::foreign(name, StdMutex { guard: UnsafeCell::new(None), lock })
    }

    /// Holds a [`std::sync::RwLock`] over the fork, for writing: a reader's hold would not keep out the other readers, who
    /// would be counted in the child for ever (96 % of children that write hung). Poison is left as it is.
    ///
    /// Cannot be promised: that a lock with readers at all times is ever free; such a fork is `Busy`. Readers in regions
    /// of their own let it in.
    ///
    /// ```
    /// use std::sync::RwLock;
    /// static SETTINGS: RwLock<u32> = RwLock::new(1);
    /// let hook = carefork::register(carefork::Hook::std_rwlock("settings", &SETTINGS));
    /// # drop(hook);
    /// ```
    pub fn std_rwlock<T: ?Sized + 'static>(
        name: &'static str,
        lock: impl Deref<Target = sync::RwLock<T>> + Send + Sync + 'static,
    ) -> Hook {
        Hook::foreign(name, StdRwLock { guard: UnsafeCell::new(None), lock })
    }
}

struct StdMutex<L, T: ?Sized + 'static> {
    /// Before `lock`, which it points into: dropped first. The `'static` is a lie that the field order makes good.
    guard: UnsafeCell<Option<sync::MutexGuard<'static, T>>>,
    lock: L,
}

// SAFETY: `guard` is touched by `Foreign`'s three functions only, which run on the thread that holds the gate's role, one at a
// time; it is `None` outside a fork, so whoever drops the adapter drops no guard of another thread.
unsafe impl<L: Send, T: ?Sized> Send for StdMutex<L, T> {}
// SAFETY: as above.
unsafe impl<L: Sync, T: ?Sized> Sync for StdMutex<L, T> {}

impl<L, T> Foreign for StdMutex<L, T>
where
    L: Deref<Target = sync::Mutex<T>> + Send + Sync,
    T: ?Sized + 'static,
{
    fn take(&self) -> bool {
        let lock: *const sync::Mutex<T> = &*self.lock;
        // SAFETY: `self.lock` stays borrowed as long as the guard lives, in effect: nothing moves, changes or drops the adapter
        // while a fork has it in its hands, and `guard` is dropped before `lock`.
        let guard = match unsafe { &*lock }.try_lock() {
            Ok(guard) => guard,
            Err(sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(sync::TryLockError::WouldBlock) => return false,
        };
        // SAFETY: only the role's holder comes here, and no reference into the cell outlives a statement.
        unsafe { *self.guard.get() = Some(guard) };
        true
    }

    fn release(&self) {
        // SAFETY: as in `take`.
        drop(unsafe { &mut *self.guard.get() }.take());
    }

    /// One store and a wake-up of nobody: it waits in the kernel, whose queue knows no ghosts.
    fn release_in_child(&self) {
        self.release();
    }
}

struct StdRwLock<L, T: ?Sized + 'static> {
    /// As in `StdMutex`.
    guard: UnsafeCell<Option<sync::RwLockWriteGuard<'static, T>>>,
    lock: L,
}

// SAFETY: as for `StdMutex`.
unsafe impl<L: Send, T: ?Sized> Send for StdRwLock<L, T> {}
// SAFETY: as for `StdMutex`.
unsafe impl<L: Sync, T: ?Sized> Sync for StdRwLock<L, T> {}

impl<L, T> Foreign for StdRwLock<L, T>
where
    L: Deref<Target = sync::RwLock<T>> + Send + Sync,
    T: ?Sized + 'static,
{
    fn take(&self) -> bool {
        let lock: *const sync::RwLock<T> = &*self.lock;
        // SAFETY: as in `StdMutex::take`.
        let guard = match unsafe { &*lock }.try_write() {
            Ok(guard) => guard,
            Err(sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(sync::TryLockError::WouldBlock) => return false,
        };
        // SAFETY: as in `StdMutex::take`.
        unsafe { *self.guard.get() = Some(guard) };
        true
    }

    fn release(&self) {
        // SAFETY: as in `StdMutex::release`.
        drop(unsafe { &mut *self.guard.get() }.take());
    }

    fn release_in_child(&self) {
        self.release();
    }
}

/// In a child: a raw lock as if new, whatever queues or bits of threads that are gone it was copied with. Unlocking it
/// would have it look for them.
///
/// # Safety
/// `raw` is shared memory that its own methods change through `&self`; the calling thread is the only one of the process
/// and is in no method of it.
unsafe fn overwrite<R>(raw: &R, init: R) {
    let raw = std::ptr::from_ref(raw).cast_mut();
    // SAFETY: the caller's promise. The old value is forgotten: dropping it could free what the parent's waiters queue on.
    unsafe { raw.write(init) };
}

/// carefork's own locks, whose waiters are no threads that are gone, and whose hold is a region of the thread's that has to end.
fn is_own<R: 'static>() -> bool {
    let raw = TypeId::of::<R>();
    raw == TypeId::of::<locks::RawMutex>() || raw == TypeId::of::<locks::RawRwLock>()
}

/// The adapters of one version of `lock_api`; what differs between versions stands in the module that calls this.
macro_rules! lock_api_adapters {
    () => {
        pub(super) struct ForMutex<L, R: RawMutex> {
            pub(super) held: UnsafeCell<Option<MutexState<R>>>,
            pub(super) lock: L,
        }

        // SAFETY: `held` is touched by the role's holder only, one thread at a time, and is `None` outside a fork.
        unsafe impl<L: Send, R: RawMutex> Send for ForMutex<L, R> {}
        // SAFETY: as above.
        unsafe impl<L: Sync, R: RawMutex> Sync for ForMutex<L, R> {}

        impl<L, R, T> Foreign for ForMutex<L, R>
        where
            L: Deref<Target = Mutex<R, T>> + Send + Sync,
            R: RawMutex + 'static,
            T: ?Sized,
        {
            fn take(&self) -> bool {
                // SAFETY: only what is locked here is unlocked through it.
                let raw = unsafe { self.lock.raw() };
                let Some(state) = try_mutex(raw) else { return false };
                // SAFETY: only the role's holder comes here, and no reference into the cell outlives a statement.
                unsafe { *self.held.get() = Some(state) };
                true
            }

            fn release(&self) {
                // SAFETY: as in `take`.
                let Some(state) = unsafe { &mut *self.held.get() }.take() else { return };
                // SAFETY: as in `take`.
                let raw = unsafe { self.lock.raw() };
                // SAFETY: locked by `take` on this thread, with this state.
                unsafe { unlock_mutex(raw, state) };
            }

            fn release_in_child(&self) {
                if is_own::<R>() {
                    return self.release();
                }
                // SAFETY: as in `take`. Its state goes with the value that is overwritten.
                let _state = ManuallyDrop::new(unsafe { &mut *self.held.get() }.take());
                // SAFETY: no guard of it lives in this process: this thread held it by `take`.
                let raw = unsafe { self.lock.raw() };
                // SAFETY: the child handler runs before the child can have another thread; a lock that could be taken is
                // not in use further up this thread's stack.
                unsafe { overwrite(raw, R::INIT) };
            }
        }

        pub(super) struct ForRwLock<L, R: RawRwLock> {
            pub(super) held: UnsafeCell<Option<WriteState<R>>>,
            pub(super) lock: L,
        }

        // SAFETY: as for `ForMutex`.
        unsafe impl<L: Send, R: RawRwLock> Send for ForRwLock<L, R> {}
        // SAFETY: as for `ForMutex`.
        unsafe impl<L: Sync, R: RawRwLock> Sync for ForRwLock<L, R> {}

        impl<L, R, T> Foreign for ForRwLock<L, R>
        where
            L: Deref<Target = RwLock<R, T>> + Send + Sync,
            R: RawRwLock + 'static,
            T: ?Sized,
        {
            fn take(&self) -> bool {
                // SAFETY: as in `ForMutex`.
                let raw = unsafe { self.lock.raw() };
                let Some(state) = try_write(raw) else { return false };
                // SAFETY: as in `ForMutex`.
                unsafe { *self.held.get() = Some(state) };
                true
            }

            fn release(&self) {
                // SAFETY: as in `ForMutex`.
                let Some(state) = unsafe { &mut *self.held.get() }.take() else { return };
                // SAFETY: as in `ForMutex`.
                let raw = unsafe { self.lock.raw() };
                // SAFETY: locked by `take` on this thread, with this state.
                unsafe { unlock_write(raw, state) };
            }

            fn release_in_child(&self) {
                if is_own::<R>() {
                    return self.release();
                }
                // SAFETY: as in `ForMutex`.
                let _state = ManuallyDrop::new(unsafe { &mut *self.held.get() }.take());
                // SAFETY: as in `ForMutex`.
                let raw = unsafe { self.lock.raw() };
                // SAFETY: as in `ForMutex`.
                unsafe { overwrite(raw, R::INIT) };
            }
        }

        pub(super) struct ForReentrant<L> {
            pub(super) lock: L,
        }

        impl<L, R, G, T> Foreign for ForReentrant<L>
        where
            L: Deref<Target = ReentrantMutex<R, G, T>> + Send + Sync,
            R: RawMutex + 'static,
            G: GetThreadId,
            T: ?Sized,
        {
            fn take(&self) -> bool {
                // The hold goes on without the guard: `release` ends it.
                self.lock.try_lock().map(ManuallyDrop::new).is_some()
            }

            fn release(&self) {
                // SAFETY: `take` forgot one guard of this thread.
                unsafe { self.lock.force_unlock() };
            }

            fn release_in_child(&self) {
                // Where unlocking needs something that locking gave (no lock of parking_lot), it is out of reach here.
                if !is_own::<R>() && size_of::<MutexState<R>>() == 0 {
                    // SAFETY: the owner and the count, which stand beside it, are right already: this thread holds it, by `take`
                    // and perhaps before. The raw lock is renewed and locked again, so that no unlocking finds ghosts.
                    let raw = unsafe { self.lock.raw() };
                    // SAFETY: as in `ForMutex`: no other thread, and this one is in no method of it.
                    unsafe { overwrite(raw, R::INIT) };
                    // Free, so this takes it; it has no state to keep.
                    let _state = ManuallyDrop::new(try_mutex(raw));
                }
                self.release();
            }
        }
    };
}

/// lock_api 0.5: locking gives a value that unlocking wants.
mod current {
    use super::{Deref, Foreign, ManuallyDrop, UnsafeCell, is_own, overwrite};
    use lock_api::{GetThreadId, Mutex, RawMutex, RawRwLock, ReentrantMutex, RwLock};

    pub(super) type MutexState<R> = <R as RawMutex>::Guard;
    pub(super) type WriteState<R> = <R as RawRwLock>::ExclusiveGuard;

    fn try_mutex<R: RawMutex>(raw: &R) -> Option<MutexState<R>> {
        raw.try_lock()
    }

    /// # Safety
    /// As for `RawMutex::unlock`.
    unsafe fn unlock_mutex<R: RawMutex>(raw: &R, state: MutexState<R>) {
        // SAFETY: the caller's promise.
        unsafe { raw.unlock(state) };
    }

    fn try_write<R: RawRwLock>(raw: &R) -> Option<WriteState<R>> {
        raw.try_lock_exclusive()
    }

    /// # Safety
    /// As for `RawRwLock::unlock_exclusive`.
    unsafe fn unlock_write<R: RawRwLock>(raw: &R, state: WriteState<R>) {
        // SAFETY: the caller's promise.
        unsafe { raw.unlock_exclusive(state) };
    }

    lock_api_adapters!();
}

impl Hook {
    /// Holds a [`lock_api::Mutex`] over the fork: `parking_lot::Mutex`, `FairMutex`, or one over a raw lock of your own.
    ///
    /// In the child the raw lock is overwritten with its `INIT`, since unlocking it would wake threads that are gone; so a raw
    /// lock that was made by `from_raw` in another state than `INIT` must not be given to this.
    ///
    /// Cannot be promised, for parking_lot: that threads which the child starts can wait through any parking_lot lock, see
    /// the table under [Locks of others](#locks-of-others). The child's own locking is safe.
    ///
    /// ```
    /// use std::sync::Arc;
    /// let cache = Arc::new(parking_lot::Mutex::new(0));
    /// let hook = carefork::register(carefork::Hook::lock_api_mutex("cache", Arc::clone(&cache)));
    /// # drop(hook);
    /// ```
    pub fn lock_api_mutex<R: lock_api::RawMutex + 'static, T: ?Sized>(
        name: &'static str,
        lock: impl Deref<Target = lock_api::Mutex<R, T>> + Send + Sync + 'static,
    ) -> Hook {
        Hook::foreign(name, current::ForMutex { held: UnsafeCell::new(None), lock })
    }

    /// Holds a [`lock_api::RwLock`] over the fork, for writing; see [`Hook::lock_api_mutex`] and [`Hook::std_rwlock`] for what
    /// cannot be promised.
    ///
    /// ```
    /// static TABLE: parking_lot::RwLock<u32> = parking_lot::RwLock::new(0);
    /// let hook = carefork::register(carefork::Hook::lock_api_rwlock("table", &TABLE));
    /// # drop(hook);
    /// ```
    pub fn lock_api_rwlock<R: lock_api::RawRwLock + 'static, T: ?Sized>(
        name: &'static str,
        lock: impl Deref<Target = lock_api::RwLock<R, T>> + Send + Sync + 'static,
    ) -> Hook {
        Hook::foreign(name, current::ForRwLock { held: UnsafeCell::new(None), lock })
    }

    /// Holds a [`lock_api::ReentrantMutex`] over the fork. A thread that holds it may fork: its own hold lives on in parent
    /// and child, as deep as it was.
    ///
    /// Cannot be promised: the same as for [`Hook::lock_api_mutex`]; and in the child that hold is only known by a thread id
    /// that a fork does not change (an address or a number of the thread's own, as parking_lot's; not the kernel's).
    ///
    /// ```
    /// use std::sync::Arc;
    /// let tree = Arc::new(parking_lot::ReentrantMutex::new(()));
    /// let hook = carefork::register(carefork::Hook::lock_api_reentrant("tree", Arc::clone(&tree)));
    /// # drop(hook);
    /// ```
    pub fn lock_api_reentrant<R: lock_api::RawMutex + 'static, G: lock_api::GetThreadId, T: ?Sized>(
        name: &'static str,
        lock: impl Deref<Target = lock_api::ReentrantMutex<R, G, T>> + Send + Sync + 'static,
    ) -> Hook {
        Hook::foreign(name, current::ForReentrant { lock })
    }
}

/// lock_api 0.4: the same without the value.
#[cfg(feature = "parking_lot_0_12")]
mod v0_4 {
    use super::{Deref, Foreign, ManuallyDrop, UnsafeCell, is_own, overwrite};
    use lock_api_0_4::{GetThreadId, Mutex, RawMutex, RawRwLock, ReentrantMutex, RwLock};
    use std::marker::PhantomData;

    pub(super) type MutexState<R> = PhantomData<<R as RawMutex>::GuardMarker>;
    pub(super) type WriteState<R> = PhantomData<<R as RawRwLock>::GuardMarker>;

    fn try_mutex<R: RawMutex>(raw: &R) -> Option<MutexState<R>> {
        raw.try_lock().then_some(PhantomData)
    }

    /// # Safety
    /// As for `RawMutex::unlock`.
    unsafe fn unlock_mutex<R: RawMutex>(raw: &R, _: MutexState<R>) {
        // SAFETY: the caller's promise.
        unsafe { raw.unlock() };
    }

    fn try_write<R: RawRwLock>(raw: &R) -> Option<WriteState<R>> {
        raw.try_lock_exclusive().then_some(PhantomData)
    }

    /// # Safety
    /// As for `RawRwLock::unlock_exclusive`.
    unsafe fn unlock_write<R: RawRwLock>(raw: &R, _: WriteState<R>) {
        // SAFETY: the caller's promise.
        unsafe { raw.unlock_exclusive() };
    }

    lock_api_adapters!();
}

#[cfg(feature = "parking_lot_0_12")]
#[cfg_attr(docsrs, doc(cfg(feature = "parking_lot_0_12")))]
impl Hook {
    /// [`Hook::lock_api_mutex`] for lock_api 0.4 (parking_lot 0.12), with the same limits.
    pub fn lock_api_0_4_mutex<R: lock_api_0_4::RawMutex + 'static, T: ?Sized>(
        name: &'static str,
        lock: impl Deref<Target = lock_api_0_4::Mutex<R, T>> + Send + Sync + 'static,
    ) -> Hook {
        Hook::foreign(name, v0_4::ForMutex { held: UnsafeCell::new(None), lock })
    }

    /// [`Hook::lock_api_rwlock`] for lock_api 0.4 (parking_lot 0.12), with the same limits.
    pub fn lock_api_0_4_rwlock<R: lock_api_0_4::RawRwLock + 'static, T: ?Sized>(
        name: &'static str,
        lock: impl Deref<Target = lock_api_0_4::RwLock<R, T>> + Send + Sync + 'static,
    ) -> Hook {
        Hook::foreign(name, v0_4::ForRwLock { held: UnsafeCell::new(None), lock })
    }

    /// [`Hook::lock_api_reentrant`] for lock_api 0.4 (parking_lot 0.12), with the same limits.
    pub fn lock_api_0_4_reentrant<R: lock_api_0_4::RawMutex + 'static, G: lock_api_0_4::GetThreadId, T: ?Sized>(
        name: &'static str,
        lock: impl Deref<Target = lock_api_0_4::ReentrantMutex<R, G, T>> + Send + Sync + 'static,
    ) -> Hook {
        Hook::foreign(name, v0_4::ForReentrant { lock })
    }
}
