//! The child's token: clean up, exec or exit (K1).

#![allow(unsafe_code)]

use crate::cleanup::{self, Cleanup};
use crate::sys;
use std::ffi::CStr;
use std::io;
use std::os::fd::RawFd;

/// In a fresh child: what has to be decided. Dropping it cleans up; so bind it to a name, as `Fork::Child(token)`: with `_` it is dropped where the
/// `match` ends, after all that the child did there.
///
/// - [`InChild::cleanup`]: this child goes on running the program (a noexec child).
/// - [`InChild::exec`]: it becomes another program.
/// - [`InChild::exit`]: it ends.
#[derive(Debug)]
#[must_use = "clean up, exec or exit"]
pub struct InChild {
    keep: Vec<RawFd>,
    done: bool,
}

impl InChild {
    pub(crate) fn new(keep: Vec<RawFd>) -> Self {
        Self { keep, done: false }
    }

    /// Cleans up for a child that does not exec: closes the care-fds that were not kept, runs the hooks' clean-ups. Says what
    /// it did.
    ///
    /// # Safety
    /// No borrowed or raw descriptor of a care-fd that is closed here is used afterwards.
    pub unsafe fn cleanup(mut self) -> Cleanup {
        self.done = true;
        cleanup::run(&self.keep)
    }

    /// Becomes the program at `path` (execv(3)): close-on-exec closes the care-fds, the environment is the parent's.
    ///
    /// # Errors
    /// Returns only with one, and the child is as before.
    pub fn exec(&mut self, path: &CStr, argv: &[&CStr]) -> io::Error {
        let mut pointers: Vec<_> = argv.iter().map(|a| a.as_ptr()).collect();
        pointers.push(std::ptr::null());
        // SAFETY: `pointers` ends with NULL, its strings outlive the call.
        unsafe { sys::execv(path, pointers.as_ptr()) }
    }

    /// Ends the child at once (_exit(2)): no destructor, no atexit handler, nothing flushed.
    #[inline]
    pub fn exit(self, code: i32) -> ! {
        sys::exit_now(code)
    }
}

impl Drop for InChild {
    fn drop(&mut self) {
        if !self.done {
            cleanup::run(&self.keep);
        }
    }
}
