//! A replacement for libc's fork (C5): for a program that must see every pid, or that uses its own clone.

#![allow(unsafe_code)]

use crate::{runtime, sys};
use std::io;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicPtr, Ordering};

/// What makes children instead of libc's fork; for [`set_fork_replacement`]. The functions answer as fork(2) does: 0 in the child,
/// its number in the parent, -1 with errno.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum ForkReplacement {
    /// Calls libc's fork in the end, so that at-fork handlers run.
    Calls(unsafe fn() -> i32),
    /// Does without (raw clone, `_Fork`): no at-fork handlers run but carefork's own, so its gate, hooks and locks are at rest and
    /// what other libraries guard by handlers of theirs (the allocator, too) is not.
    Bare(unsafe fn() -> i32),
}

/// Null for libc's. What it points to is leaked: a fork may be looking at it.
static REPLACEMENT: AtomicPtr<ForkReplacement> = AtomicPtr::new(std::ptr::null_mut());

/// Has this crate's forks made by `replacement` from now on, or by libc again; children inherit it. From libxl's `fork_replacement`.
///
/// Forks by foreign code are not touched, nor is [`Command`](crate::Command), which makes no copy of this process (but with `pre_exec`). A
/// few bytes are leaked each time.
///
/// # Safety
/// The function keeps to its contract: two copies of the calling thread's process, or -1. Between its call and its return no carefork
/// function is called on this thread. Where it panics the fork fails with ECANCELED, and a child that was made is nobody's, or ends with code
/// 101 if it was the child that panicked. With [`ForkReplacement::Bare`] the child has memory of its own, and does nothing but exit or exec
/// if the allocator has no means of its own to survive.
///
/// ```
/// use carefork::{ForkReplacement, set_fork_replacement};
/// unsafe fn noted() -> i32 {
///     // SAFETY: as the caller says.
///     let pid = unsafe { libc::fork() };
///     if pid > 0 {
///         println!("made {pid}");
///     }
///     pid
/// }
/// // SAFETY: it is libc's fork, seen.
/// unsafe { set_fork_replacement(Some(ForkReplacement::Calls(noted))) };
/// // SAFETY: the child uses nothing of the parent's.
/// assert!(unsafe { carefork::spawn(|| 0) }?.wait()?.success());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub unsafe fn set_fork_replacement(replacement: Option<ForkReplacement>) {
    let new = replacement.map_or(std::ptr::null_mut(), |r| Box::into_raw(Box::new(r)));
    REPLACEMENT.store(new, Ordering::Release);
}

/// One fork, by whatever makes them here.
///
/// # Safety
/// As for fork(2) in a process with threads.
#[inline(always)]
pub(crate) unsafe fn fork() -> io::Result<u32> {
    // SAFETY: null, or leaked by `set_fork_replacement`.
    let replacement = unsafe { REPLACEMENT.load(Ordering::Acquire).as_ref() };
    match replacement {
        // SAFETY: the caller's promise.
        None => unsafe { sys::fork() },
        // SAFETY: the caller's promise, and that of whoever set it.
        Some(ForkReplacement::Calls(f)) => unsafe { call(*f) },
        Some(ForkReplacement::Bare(f)) => {
            runtime::prepare_by_hand();
            // SAFETY: as above.
            let pid = unsafe { call(*f) };
            match &pid {
                Ok(0) => runtime::child_by_hand(),
                // The handlers of a real fork are told by errno whether there is a child; what `f` leaves there says nothing.
                made => {
                    sys::set_errno(if made.is_ok() { 0 } else { libc::EAGAIN });
                    runtime::parent_by_hand();
                }
            }
            pid
        }
    }
}

/// A panic does not go on through a fork that is under way.
///
/// # Safety
/// As for `fork`.
unsafe fn call(f: unsafe fn() -> i32) -> io::Result<u32> {
    let process = sys::getpid();
    // SAFETY: the caller's promise.
    match catch_unwind(|| unsafe { f() }) {
        Ok(pid) => answer(pid),
        Err(payload) => {
            // Its destructor may panic in turn.
            #[allow(clippy::mem_forget)]
            std::mem::forget(payload);
            if sys::getpid() != process {
                sys::exit_now(101);
            }
            Err(io::Error::from_raw_os_error(libc::ECANCELED))
        }
    }
}

fn answer(pid: i32) -> io::Result<u32> {
    u32::try_from(pid).map_err(|_| io::Error::from_raw_os_error(sys::errno()))
}
