//! Signals across a fork: dispositions and mask in the child (K3).

use crate::error::ForkError;
use crate::sys_signals;

/// What a child does with the signal handlers and the mask that it inherits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Signals {
    /// Nothing changes: as after fork(2).
    #[default]
    Inherit,
    /// Every caught and every ignored signal goes to its default; SIGPIPE to a handler that does nothing, so that writes fail with
    /// EPIPE and a program that is exec'ed finds the default. Then the mask is emptied, unless one is given with
    /// [`ForkOptions::mask`](crate::ForkOptions::mask). No handler of the parent ever runs in the child.
    Reset,
    /// These signals go to their default and are unblocked; the others stay as they are.
    List(Vec<i32>),
}

/// The highest signal number.
pub(crate) const LAST: i32 = 64;

/// Signals whose disposition can be set by programs: not KILL and STOP, and not libc's own 32 and 33.
pub(crate) fn settable(signal: i32) -> bool {
    (1..=LAST).contains(&signal) && !matches!(signal, libc::SIGKILL | libc::SIGSTOP | 32 | 33)
}

impl Signals {
    pub(crate) fn check(&self) -> Result<(), ForkError> {
        match self {
            Signals::List(list) if !list.iter().all(|&s| settable(s)) => {
                Err(ForkError::Invalid("Signals::List names SIGKILL, SIGSTOP, 32, 33 or a number that is no signal"))
            }
            _ => Ok(()),
        }
    }

    /// In the child, with every signal blocked. Async-signal-safe.
    #[inline(always)]
    pub(crate) fn reset_dispositions(&self) {
        match self {
            Signals::Inherit => {}
            Signals::Reset => {
                for s in (1..=LAST).filter(|&s| settable(s) && s != libc::SIGPIPE) {
                    sys_signals::default_disposition(s);
                }
                sys_signals::ignore_by_handler(libc::SIGPIPE);
                // posix_spawn of glibc hands libc's own on ignored: to the program that got them so, and to all below it.
                for s in (1..=LAST).filter(|s| sys_signals::is_libc_own(*s)) {
                    if sys_signals::is_ignored(s) {
                        sys_signals::default_disposition(s);
                    }
                }
            }
            Signals::List(list) => list.iter().for_each(|&s| sys_signals::default_disposition(s)),
        }
    }

    /// In a child that is about to exec, with every signal blocked: no handler is left that could run once they are not, and the program
    /// finds ignored what this says. Async-signal-safe; also for a child that shares this memory, since dispositions are its own.
    pub(crate) fn for_program(&self) {
        for s in (1..=LAST).filter(|s| !matches!(*s, libc::SIGKILL | libc::SIGSTOP)) {
            let reset = match self {
                // Asking first would cost as much.
                Signals::Reset => true,
                Signals::Inherit => sys_signals::is_caught(s),
                Signals::List(list) => list.contains(&s) || sys_signals::is_caught(s),
            };
            if reset {
                sys_signals::default_disposition(s);
            }
        }
    }

    /// The child's mask, from the parent's.
    #[inline(always)]
    pub(crate) fn mask(
        &self,
        before: &sys_signals::SigSet,
        given: Option<&sys_signals::SigSet>,
    ) -> sys_signals::SigSet {
        match (given, self) {
            (Some(mask), _) => *mask,
            (None, Signals::Inherit) => *before,
            (None, Signals::Reset) => sys_signals::mask_of(&[]),
            (None, Signals::List(list)) => sys_signals::mask_without(before, list),
        }
    }
}
