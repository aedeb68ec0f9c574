//! What makes a child that does not exec a process of its own (K5).

#![allow(unsafe_code)]

use crate::error::NotAChild;
use crate::reap::sigchld;
use crate::{care_table, registration, runtime};

use std::os::fd::RawFd;

/// What a clean-up did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cleanup {
    /// Care-fds that it closed.
    pub closed: usize,
    /// Care-fds that were to be kept.
    pub kept: usize,
    /// Hooks whose `cleanup` ran.
    pub hooks: usize,
    /// Those of them that panicked; each was reported on fd 2.
    pub panicked: usize,
    /// This process had been cleaned up before: nothing was done.
    pub already: bool,
}

/// Cleans up in a child made by foreign code (`fork` of a C library) that goes on without exec: closes the care-fds, runs the
/// hooks' clean-ups. Children of [`fork`](crate::fork) use [`InChild::cleanup`](crate::InChild::cleanup).
///
/// Doing it twice does nothing the second time. Comes from libxl's `libxl_postfork_child_noexec`.
///
/// # Errors
/// [`NotAChild`] in a process that no fork has made: its care-fds are in use.
///
/// # Safety
/// No borrowed or raw descriptor of a care-fd is used afterwards, and no other thread of this child is using one.
///
/// ```
/// // SAFETY: refused, because this process is no child.
/// assert!(unsafe { carefork::postfork_child_noexec() }.is_err());
/// ```
#[unsafe(link_section = ".text_carefork")]
pub unsafe fn postfork_child_noexec() -> Result<Cleanup, NotAChild> {
    if runtime::is_no_child() {
        return Err(NotAChild { private: () });
    }
    Ok(run(&[]))
}

/// `keep` is sorted.
#[unsafe(link_section = ".text_carefork")]
pub(crate) fn run(keep: &[RawFd]) -> Cleanup {
    if !runtime::first_clean_up() {
        return Cleanup { already: true, ..Cleanup::default() };
    }
    sigchld::put_back_in_child();
    let (closed, kept) = care_table::clean_up(keep);
    runtime::care_fds_cleaned();
    let (hooks, panicked) = registration::clean_up();
    Cleanup { closed, kept, hooks, panicked, already: false }
}
