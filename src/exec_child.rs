//! What the child does between clone and exec.
//!
//! # Who may do what
//! The child shares memory with the parent, whose other threads run on, and has the sleeping thread's stack and thread-local
//! storage. So nothing here calls libc, allocates, locks, unwinds, or touches a thread-local; it reads the `Plan`, writes the
//! `Report` and the place for its number, and makes system calls (`sys_exec.rs`). Where there are closures to run before the exec the
//! child is a forked one with memory of its own, and does the same.
//!
//! # The order
//! | step | why there |
//! |---|---|
//! | gate | first: the descriptor table, umask, working directory and limits are copies since the clone |
//! | signals | while all are blocked: no handler of the parent's may ever run here |
//! | session, process group | before anything that signals are about |
//! | descriptors | before limits, so that a lower limit on open files does not stand in the way of a high number, and before the user changes |
//! | umask, limits | a hard limit may take privilege to raise |
//! | groups, group, user | in this order: each takes the privilege that the last gives up |
//! | working directory | with the new user's permissions, as std |
//! | death signal | a change of user clears it |
//! | LISTEN_PID | this is the process that execs |
//! | mask | last: what was held back comes now, to its default |
//! | exec | |

#![allow(unsafe_code)]

use crate::care_table::{Kind, TABLE};
use crate::exec_plan::{Move, Plan};
use crate::runtime::Start;
use crate::sys_exec::{self, Errno};
use crate::sys_signals;
use std::ffi::c_void;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use Ordering::{Acquire, Relaxed, Release};

/// A step that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Stage {
    /// A waiter had reopened the gate: to be tried again.
    GaveWay = 1,
    Session,
    ProcessGroup,
    Descriptor,
    Limit,
    Groups,
    Gid,
    Uid,
    CurrentDir,
    DeathSignal,
    PreExec,
    Exec,
}

impl Stage {
    pub(crate) const ALL: [Stage; 12] = [
        Stage::GaveWay,
        Stage::Session,
        Stage::ProcessGroup,
        Stage::Descriptor,
        Stage::Limit,
        Stage::Groups,
        Stage::Gid,
        Stage::Uid,
        Stage::CurrentDir,
        Stage::DeathSignal,
        Stage::PreExec,
        Stage::Exec,
    ];
}

/// Why there is no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) stage: Stage,
    /// Which move or limit.
    pub(crate) index: u32,
    pub(crate) errno: Errno,
}

impl Failure {
    /// For an error pipe.
    pub(crate) fn to_bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&(self.stage as u32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.index.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.errno.to_ne_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: [u8; 12]) -> Option<Failure> {
        let [stage, index, errno] = [0, 4, 8].map(|i| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[i..i + 4]);
            u32::from_ne_bytes(word)
        });
        Failure::new(stage, index, errno.cast_signed())
    }

    fn new(stage: u32, index: u32, errno: Errno) -> Option<Failure> {
        let stage = *Stage::ALL.iter().find(|s| **s as u32 == stage)?;
        Some(Failure { stage, index, errno })
    }
}

/// What parent and child have in common, on the parent's stack.
#[derive(Debug)]
pub(crate) struct Shared<'a> {
    plan: &'a Plan,
    start: &'a Start,
    /// Filled in by the kernel, before the child runs.
    pub(crate) pidfd: AtomicI32,
    /// The pidfd's registration as a care-fd, 0 if none: made by the child, before another thread can fork.
    stamp: AtomicU32,
    opened: AtomicU32,
    stage: AtomicU32,
    index: AtomicU32,
    errno: AtomicI32,
}

impl<'a> Shared<'a> {
    pub(crate) fn new(plan: &'a Plan, start: &'a Start) -> Self {
        Shared {
            plan,
            start,
            pidfd: AtomicI32::new(-1),
            stamp: AtomicU32::new(0),
            opened: AtomicU32::new(0),
            stage: AtomicU32::new(0),
            index: AtomicU32::new(0),
            errno: AtomicI32::new(0),
        }
    }

    /// The pidfd and its stamp, if there is one.
    pub(crate) fn pidfd(&self) -> Option<(RawFd, u32)> {
        let fd = self.pidfd.load(Relaxed);
        (fd >= 0).then(|| (fd, self.stamp.load(Relaxed)))
    }

    /// The child came through the gate's opening.
    pub(crate) fn opened(&self) -> bool {
        self.opened.load(Acquire) != 0
    }

    pub(crate) fn failure(&self) -> Option<Failure> {
        Failure::new(self.stage.load(Acquire), self.index.load(Relaxed), self.errno.load(Relaxed))
    }

    fn fail(&self, failure: Failure) {
        self.index.store(failure.index, Relaxed);
        self.errno.store(failure.errno, Relaxed);
        self.stage.store(failure.stage as u32, Release);
    }
}

/// Where a child that shares memory begins.
///
/// # Safety
/// Called by `sys_exec::clone_vfork` only; `shared` points to a `Shared`, which lives until the parent's thread goes on.
pub(crate) unsafe extern "C" fn entry(shared: *mut c_void) -> ! {
    // SAFETY: the caller's promise; all that is written there is atomic.
    let shared = unsafe { &*shared.cast::<Shared<'_>>() };
    let pidfd = shared.pidfd.load(Relaxed);
    if pidfd >= 0
        && let Ok(stamp) = TABLE.register(pidfd, Kind::Cleanup)
    {
        shared.stamp.store(stamp, Relaxed);
    }
    let clean = shared.start.open();
    shared.opened.store(1, Release);
    let failure = if clean {
        let done = prepare(shared.plan, shared.start.mask());
        done.map_or_else(|failure| failure, |()| exec(shared.plan))
    } else {
        Failure { stage: Stage::GaveWay, index: 0, errno: libc::EAGAIN }
    };
    shared.fail(failure);
    sys_exec::exit_group(127)
}

/// Everything before the exec; `before` is the mask of the thread that starts the program. Every signal is blocked before, and not
/// afterwards.
pub(crate) fn prepare(plan: &Plan, before: &sys_signals::SigSet) -> Result<(), Failure> {
    let at = |stage| move |errno| Failure { stage, index: 0, errno };
    plan.signals.for_program();
    if plan.session {
        sys_exec::new_session().map_err(at(Stage::Session))?;
    }
    if let Some(group) = plan.process_group {
        sys_exec::set_process_group(group).map_err(at(Stage::ProcessGroup))?;
    }
    descriptors(plan)?;
    if let Some(mask) = plan.umask {
        sys_exec::umask(mask);
    }
    for (index, l) in (0..).zip(&plan.limits) {
        sys_exec::set_limit(l.resource, l.soft, l.hard).map_err(|errno| Failure {
            stage: Stage::Limit,
            index,
            errno,
        })?;
    }
    who(plan)?;
    if let Some(dir) = &plan.current_dir {
        sys_exec::change_dir(dir).map_err(at(Stage::CurrentDir))?;
    }
    if let Some(signal) = plan.death_signal {
        sys_exec::death_signal(signal, plan.parent).map_err(at(Stage::DeathSignal))?;
    }
    if let Some(place) = plan.envp.pid_place() {
        // SAFETY: room for eleven bytes, which nobody reads before the exec.
        unsafe { sys_exec::write_pid(place) };
    }
    sys_signals::set_mask(&plan.signals.mask(before, None));
    Ok(())
}

fn who(plan: &Plan) -> Result<(), Failure> {
    let at = |stage| move |errno| Failure { stage, index: 0, errno };
    match &plan.groups {
        Some(groups) => sys_exec::set_groups(groups).map_err(at(Stage::Groups))?,
        // As std: root's own groups would stay with the other user.
        None if plan.uid.is_some() && sys_exec::real_uid() == 0 => {
            sys_exec::set_groups(&[]).map_err(at(Stage::Groups))?;
        }
        None => {}
    }
    if let Some(gid) = plan.gid {
        sys_exec::set_gid(gid).map_err(at(Stage::Gid))?;
    }
    if let Some(uid) = plan.uid {
        sys_exec::set_uid(uid).map_err(at(Stage::Uid))?;
    }
    Ok(())
}

fn descriptors(plan: &Plan) -> Result<(), Failure> {
    let mut aside: RawFd = -1;
    let steps = &plan.moves.steps;
    for (index, step) in (0..).zip(steps) {
        let done = match *step {
            Move::Stay(fd) => sys_exec::keep_across_exec(fd),
            Move::Dup { from, to } => sys_exec::dup_onto(from, to),
            Move::Aside { from, .. } => {
                // Rings come last, and all of this one is open: so no number that is still to be written is given out.
                for (index, later) in (0..).zip(steps).skip(index as usize + 1) {
                    match *later {
                        Move::Dup { from, .. } if sys_exec::is_open(from) => {}
                        Move::Dup { .. } => {
                            return Err(Failure { stage: Stage::Descriptor, index, errno: libc::EBADF });
                        }
                        _ => break,
                    }
                }
                sys_exec::dup_above(from, 0).map(|fd| aside = fd)
            }
            Move::Back { to, .. } => {
                let done = sys_exec::dup_onto(aside, to);
                sys_exec::close(aside);
                done
            }
        };
        done.map_err(|errno| Failure { stage: Stage::Descriptor, index, errno })?;
    }
    sys_exec::close_others_at_exec(&plan.moves.targets);
    Ok(())
}

/// Returns only without success. As execvp(3) goes along PATH, and as posix_spawnp hands no script without a `#!` to a shell.
pub(crate) fn exec(plan: &Plan) -> Failure {
    let mut errno = libc::ENOENT;
    let mut denied = false;
    for program in &plan.programs {
        // SAFETY: `Strings` is such an array.
        errno = unsafe { sys_exec::execve(program, plan.argv.as_ptr(), plan.envp.as_ptr()) };
        match errno {
            libc::EACCES => denied = true,
            libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT => {}
            _ => return Failure { stage: Stage::Exec, index: 0, errno },
        }
    }
    Failure { stage: Stage::Exec, index: 0, errno: if denied { libc::EACCES } else { errno } }
}
