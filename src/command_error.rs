//! Why a [`Command`](crate::Command) did not start (X1).

use crate::error::ForkError;
use crate::resource::Resource;
use std::borrow::Cow;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// Why there is no program running.
///
/// After each of them but [`Step::Wait`] there is no child, after all no descriptor left, and the signal mask is as it was.
#[derive(Debug)]
#[non_exhaustive]
pub enum CommandError {
    /// No child could be made: a region of this thread, regions of others past the budget, or clone(2) itself (EAGAIN, ENOMEM).
    Fork(ForkError),
    /// What was asked for contradicts itself or cannot be written down for the kernel; found before anything was started.
    Invalid(Cow<'static, str>),
    /// A step on the way to the program failed, in this process or in the child.
    Step {
        /// Which one, with its argument.
        step: Step,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A step on the way to a running program, with what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Making a pipe for a standard stream, or the one by which a forked child reports.
    Pipe,
    /// Opening /dev/null for a standard stream.
    Null,
    /// setsid(2).
    Session,
    /// setpgid(2) into this group.
    ProcessGroup(i32),
    /// Descriptor `from` was to be number `to`, and is not open.
    NotOpen {
        /// The number in this process.
        from: RawFd,
        /// The number that the program was to find it at.
        to: RawFd,
    },
    /// Descriptor `from` could not become number `to`: above the limit on open files, or none left to exchange two.
    Descriptor {
        /// The number in this process.
        from: RawFd,
        /// The number that the program was to find it at.
        to: RawFd,
    },
    /// setrlimit(2) for this resource.
    Limit(Resource),
    /// setgroups(2).
    Groups,
    /// setgid(2) to this group.
    Gid(u32),
    /// setuid(2) to this user.
    Uid(u32),
    /// chdir(2) to this directory.
    CurrentDir(PathBuf),
    /// prctl(2), `PR_SET_PDEATHSIG`, with this signal.
    DeathSignal(i32),
    /// A closure of [`Command::pre_exec`](crate::Command::pre_exec), counted from 0.
    PreExec(usize),
    /// execve(2) of this program.
    Exec(OsString),
    /// Reading the program's output, or waiting for its end, after it had started.
    Wait,
}

impl CommandError {
    pub(crate) fn step(step: Step, source: io::Error) -> Self {
        CommandError::Step { step, source }
    }

    /// The kind of the system's error, as std's `Command` would have it.
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            CommandError::Fork(ForkError::Os(e)) | CommandError::Step { source: e, .. } => e.kind(),
            CommandError::Fork(ForkError::Busy { .. }) => io::ErrorKind::TimedOut,
            CommandError::Fork(ForkError::WouldDeadlock { .. }) => io::ErrorKind::Deadlock,
            CommandError::Fork(_) => io::ErrorKind::Other,
            CommandError::Invalid(_) => io::ErrorKind::InvalidInput,
        }
    }

    /// The system's error number, where a system call failed.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            CommandError::Fork(ForkError::Os(e)) | CommandError::Step { source: e, .. } => e.raw_os_error(),
            _ => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Pipe => f.write_str("pipe"),
            Step::Null => f.write_str("/dev/null"),
            Step::Session => f.write_str("new session"),
            Step::ProcessGroup(group) => write!(f, "process group {group}"),
            Step::NotOpen { from, to } if from == to => write!(f, "descriptor {from} to pass"),
            Step::NotOpen { from, to } => write!(f, "descriptor {from} to pass as {to}"),
            Step::Descriptor { from, to } => write!(f, "passing descriptor {from} as {to}"),
            Step::Limit(resource) => write!(f, "limit on {resource:?}"),
            Step::Groups => f.write_str("supplementary groups"),
            Step::Gid(gid) => write!(f, "group {gid}"),
            Step::Uid(uid) => write!(f, "user {uid}"),
            Step::CurrentDir(dir) => write!(f, "working directory {dir:?}"),
            Step::DeathSignal(signal) => write!(f, "death signal {signal}"),
            Step::PreExec(index) => write!(f, "pre_exec closure {index}"),
            Step::Exec(program) => write!(f, "program {program:?}"),
            Step::Wait => f.write_str("waiting for the program"),
        }
    }
}

/// What is likely to be wrong, and what to do.
fn advice(step: &Step, errno: Option<i32>) -> &'static str {
    match (step, errno) {
        (Step::Exec(_), Some(libc::ENOENT)) => "; no such program, or its interpreter is missing",
        (Step::Exec(_), Some(libc::EACCES)) => {
            "; not executable by this user, or a directory on the way is closed to it"
        }
        (Step::Exec(_), Some(libc::ENOEXEC)) => {
            "; not an executable format: a script needs a line with #! at its beginning"
        }
        (Step::Exec(_), Some(libc::E2BIG)) => "; arguments and environment together are too long",
        (Step::NotOpen { .. }, _) => "; was it closed by its number, or at a fork (OnFork::Close)?",
        (Step::Descriptor { .. }, Some(libc::EBADF)) => {
            "; the number is above the limit on open files (Resource::NoFile)"
        }
        (Step::Limit(_), Some(libc::EINVAL)) => "; the soft limit is above the hard one",
        (Step::Limit(_), Some(libc::EPERM)) => "; only a privileged process raises a hard limit",
        (Step::Uid(_) | Step::Gid(_) | Step::Groups, Some(libc::EPERM)) => {
            "; only a privileged process becomes another user"
        }
        (Step::ProcessGroup(_), Some(libc::EPERM)) => "; no such group in this session",
        _ => "",
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The way out is another one than a fork's.
            CommandError::Fork(ForkError::Busy { culprits }) => {
                write!(
                    f,
                    "no program started: the budget of the start ended; in the way: {culprits}; see Command::timeout"
                )
            }
            CommandError::Fork(e) => write!(f, "no program started: {e}"),
            CommandError::Invalid(what) => write!(f, "invalid command: {what}"),
            CommandError::Step { step, source } => {
                write!(f, "{step}: {source}{}", advice(step, source.raw_os_error()))
            }
        }
    }
}

impl std::error::Error for CommandError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            // Told in full, and its text names a fork's way out.
            CommandError::Fork(ForkError::Busy { .. }) | CommandError::Invalid(_) => None,
            CommandError::Fork(e) => Some(e),
            CommandError::Step { source, .. } => Some(source),
        }
    }
}

impl From<ForkError> for CommandError {
    fn from(e: ForkError) -> Self {
        CommandError::Fork(e)
    }
}

/// For `?` where std's `Command` was used before: the kind stays what it was.
impl From<CommandError> for io::Error {
    fn from(e: CommandError) -> io::Error {
        io::Error::new(e.kind(), e)
    }
}
