//! The parent's side of a program's start: gate, clone, and what came of it.
//!
//! # Why vfork
//! The child shares this process's memory, so the start costs the same whatever its size, and tells its error by a store. The calling
//! thread sleeps until the exec (CLONE_VFORK), which is what lets the child use its stack, its shadow stack (CET) and its
//! thread-local storage, and what the kernel's time namespaces ask for. Other threads run on.
//!
//! As for a fork, no other thread may be in a region at the instant of the clone, which copies the descriptor table, working directory,
//! umask and limits. Nobody can wait for the exec, so the *child* opens the gate, as its very first step, in the place of the thread
//! that sleeps: by an atomic store and a wake-up, which is all that takes. No hook runs: the child takes no lock.
//!
//! clone and not clone3: the one flag that only clone3 has and that would be of use, CLONE_CLEAR_SIGHAND, leaves ignored signals ignored, so that
//! the child would have to go through all of them all the same; and clone3 is what sandboxes refuse.
//!
//! # What can happen meanwhile
//! - *A signal*: all are blocked on this thread, libc's own too, from before the clone until the child has exec'ed or was reaped. Its
//!   dispositions are a copy of its own, and at their defaults before its mask is opened.
//! - *Another thread changes the user, execs or exits*: libc's setuid waits for this thread until the exec, and does not reach the
//!   child, which is another process. An exec or exit kills this thread in its sleep; the child keeps the memory until its own exec.
//! - *The child is killed*: this thread goes on, and opens the gate if the child had not (`Start::end`).
//! - *Another thread forks* once the gate is open: its child has a copy of a sleeping thread, like any other.

#![allow(unsafe_code)]

use crate::care_table::TABLE;
use crate::carefd::CareFd;
use crate::dumpable::Dumpable;
use crate::error::ForkError;
use crate::exec_child::{self, Failure, Shared, Stage};
use crate::exec_plan::Plan;
use crate::fork::Fork;
use crate::options::ForkOptions;
use crate::reap::child::Child;
use crate::reap::known::{self, Began};
use crate::region::no_forking;
use crate::runtime::{Start, count};
use crate::signals::Signals;
use crate::sys_reap::{self, How, Which};
use crate::{clock, stdio, sys, sys_exec, sys_signals};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// Why there is no program.
#[derive(Debug)]
pub(crate) enum NotStarted {
    Fork(ForkError),
    Pipe(io::Error),
    Child(Failure),
}

/// A closure for the child.
pub(crate) type PreExec = Box<dyn FnMut() -> io::Result<()> + Send + Sync>;

/// Starts the program by a child that shares this memory.
pub(crate) fn start(plan: &Plan, timeout: Option<Duration>) -> Result<Child, NotStarted> {
    let deadline = timeout.map(|t| clock::now().saturating_add(u64::try_from(t.as_nanos()).unwrap_or(u64::MAX)));
    let _dumpable = plan.changes_user().then(Dumpable::hold);
    loop {
        match once(plan, deadline)? {
            Ok(child) => {
                count().programs.fetch_add(1, Relaxed);
                return Ok(child);
            }
            Err(Failure { stage: Stage::GaveWay, .. }) => drop(count().thrown_away.fetch_add(1, Relaxed)),
            Err(failure) => return Err(NotStarted::Child(failure)),
        }
    }
}

/// The outer error: no child; the inner one: a child that ended, and was reaped.
fn once(plan: &Plan, deadline: Option<u64>) -> Result<Result<Child, Failure>, NotStarted> {
    // Until there is a `Child`: an owner of SIGCHLD must not take it for a stranger's.
    let mut under_way = known::making_one();
    let start = Start::begin(deadline).map_err(NotStarted::Fork)?;
    if let Some(fork) = &mut under_way {
        fork.is_made();
    }
    let shared = Shared::new(plan, &start);
    let cloned = clone(&shared, libc::CLONE_PIDFD).or_else(|errno| match errno {
        libc::EAGAIN | libc::ENOMEM => Err(errno),
        // An old kernel, a filter, no number left for the pidfd: the child works without.
        _ => {
            shared.pidfd.store(-1, Relaxed);
            clone(&shared, 0)
        }
    });
    let (opened, pidfd, failure) = (shared.opened(), shared.pidfd(), shared.failure());
    if let (Ok(pid), Some(_)) = (cloned, failure) {
        // Before a handler for SIGCHLD can run on this thread.
        reap(pid, pidfd.map(|(fd, _)| fd));
        known::forget_thrown_away(pid, under_way.as_ref());
    }
    start.end(opened);
    if let (Ok(pid), Some(_)) = (cloned, failure) {
        known::forget_thrown_away(pid, under_way.as_ref());
    }
    let pid = cloned.map_err(|errno| NotStarted::Fork(ForkError::Os(io::Error::from_raw_os_error(errno))))?;
    // One region from the registration that the child made to the `Child`'s own.
    let _region = no_forking();
    let pidfd = pidfd.map(|(fd, stamp)| {
        TABLE.unregister(fd, stamp);
        // SAFETY: the kernel gave us this number with the clone, and nobody else knows it.
        unsafe { OwnedFd::from_raw_fd(fd) }
    });
    let began = Began::of(under_way.as_ref());
    Ok(match (failure, pidfd) {
        (Some(failure), _) => Err(failure),
        (None, None) => Ok(Child::new(pid, true, began)),
        (None, pidfd) => Ok(Child::with_pidfd(pid, pidfd, began)),
    })
}

/// A child that has ended, or is about to. Reaped by others (ECHILD) it is gone, which is the same; its number may be another's then,
/// which a pidfd does not mistake for it.
fn reap(pid: u32, pidfd: Option<RawFd>) {
    let by_pidfd = pidfd.map(|fd| {
        // SAFETY: a care-fd that the child registered, open until `once` makes it its own.
        let pidfd = unsafe { BorrowedFd::borrow_raw(fd) };
        sys_reap::wait(Which::Pidfd(pidfd), How::Block)
    });
    match by_pidfd {
        Some(Ok(_)) => {}
        Some(Err(e)) if e.raw_os_error() == Some(libc::ECHILD) => {}
        // None, or Linux 5.3, or a filter.
        _ => drop(sys::reap(pid, true)),
    }
}

fn clone(shared: &Shared<'_>, pidfd: i32) -> Result<u32, i32> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | pidfd | libc::SIGCHLD;
    let arg = std::ptr::from_ref(shared).cast_mut().cast();
    // SAFETY: `Start` has blocked all signals; `entry` keeps to its module's rules, and all that it writes to is atomic or meant for
    // it; `shared` outlives the call.
    unsafe { sys_exec::clone_vfork(flags, shared.pidfd.as_ptr(), exec_child::entry, arg) }
}

// -- with closures: by a fork

/// Starts the program by a coordinated fork, whose child has memory of its own for `closures` to use. Its error comes through a pipe that
/// the exec closes.
///
/// # Safety
/// As for [`ForkOptions::fork`]; the closures keep to what its child may do.
pub(crate) unsafe fn start_by_fork(
    plan: &Plan,
    timeout: Option<Duration>,
    closures: &mut [PreExec],
) -> Result<Child, NotStarted> {
    // A closure that panics: another thread may be in the middle of a panic's message.
    stdio::panics_by_write();
    let (from, to) = report_pipe(plan).map_err(NotStarted::Pipe)?;
    let before = sys_signals::current_mask();
    let all: Vec<i32> = (1..=crate::signals::LAST).collect();
    let options = ForkOptions::new().signals(Signals::Inherit).mask(&all);
    let options = match timeout {
        Some(budget) => options.timeout(budget),
        None => options.timeout_never(),
    };
    // SAFETY: the caller's promise.
    let mut child = match unsafe { options.fork() }.map_err(NotStarted::Fork)? {
        Fork::Parent(child) => child,
        Fork::Child(token) => {
            // Its clean-up is for children that do not exec.
            std::mem::forget(token);
            stdio::in_spawned_child();
            let failure = prepare_and_exec(plan, &before, closures);
            sys_exec::tell(to.as_raw_fd(), &failure.to_bytes());
            sys_exec::exit_group(127)
        }
    };
    drop(to);
    let mut bytes = [0; 12];
    match (&*from).read_exact(&mut bytes) {
        Ok(()) => {}
        // Closed by the exec, or by the child's death, which its status tells.
        Err(_) => {
            count().programs.fetch_add(1, Relaxed);
            return Ok(child);
        }
    }
    // ECHILD is the same: it is gone.
    drop(child.wait());
    Failure::from_bytes(bytes).map_or(Ok(child), |failure| Err(NotStarted::Child(failure)))
}

/// Its writing end is at a number that the program's descriptors do not need.
fn report_pipe(plan: &Plan) -> io::Result<(CareFd<PipeReader>, CareFd<OwnedFd>)> {
    let region = no_forking();
    let (from, to) = io::pipe()?;
    let from = region.care(from)?;
    let above = put_aside(to.as_raw_fd(), &plan.moves.targets).map_err(io::Error::from_raw_os_error)?;
    // SAFETY: the kernel just gave us this number.
    let to = region.care(unsafe { OwnedFd::from_raw_fd(above) })?;
    Ok((from, to))
}

/// A copy at a number that is neither open nor one of `targets`, which are sorted.
fn put_aside(from: RawFd, targets: &[RawFd]) -> Result<RawFd, i32> {
    let mut least = 3;
    loop {
        while targets.binary_search(&least).is_ok() {
            least += 1;
        }
        let fd = sys_exec::dup_above(from, least)?;
        if targets.binary_search(&fd).is_err() {
            return Ok(fd);
        }
        sys_exec::close(fd);
        least = fd + 1;
    }
}

fn prepare_and_exec(plan: &Plan, before: &sys_signals::SigSet, closures: &mut [PreExec]) -> Failure {
    if let Err(failure) = exec_child::prepare(plan, before) {
        return failure;
    }
    for (index, closure) in (0..).zip(closures) {
        let errno = match catch_unwind(AssertUnwindSafe(closure)) {
            Ok(Ok(())) => continue,
            Ok(Err(e)) => e.raw_os_error().unwrap_or(libc::EINVAL),
            Err(payload) => {
                std::mem::forget(payload);
                PANICKED
            }
        };
        return Failure { stage: Stage::PreExec, index, errno };
    }
    exec_child::exec(plan)
}

/// In place of an errno: the closure panicked, and its message was printed.
pub(crate) const PANICKED: i32 = 0;
