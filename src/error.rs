//! What a fork can fail with, and the fixed buffers it is collected in (K1, G6).

use crate::at_work::Preparing;
use crate::gate::{Busy, NAMED, Seen};
use crate::prepare::Outcome;
use crate::print_wait::Waiting;
use crate::sys;
use std::borrow::Cow;
use std::fmt;
use std::io;
use std::panic::Location;

/// Why there is no child.
///
/// Every one of them leaves the process as it was: signal mask, dispositions, hooks, gate (K2).
#[derive(Debug)]
#[non_exhaustive]
pub enum ForkError {
    /// The calling thread is in a region of its own (G4): drop its `NoForking` guard first, or end the initialiser or the
    /// opening of a care-fd that `fork` was called from.
    Forbidden {
        /// Where the region began, in builds with debug assertions.
        entered: Option<&'static Location<'static>>,
    },
    /// Called from a hook or from another library's at-fork handler, in the middle of a fork.
    InFork,
    /// The budget ended while other threads were in regions or a hooked lock was not to be had (G6).
    Busy {
        /// Who was in the way.
        culprits: Culprits,
    },
    /// This thread holds something that another waits for, which in turn keeps this fork waiting (G5). Let go of the lock
    /// before forking, or fork from one thread at a time while holding locks.
    WouldDeadlock {
        /// Who was in the way.
        culprits: Culprits,
    },
    /// A hook's `try_prepare` said no, or its prepare panicked (H3).
    Vetoed {
        /// The hook's name.
        hook: &'static str,
        /// What it said.
        reason: Cow<'static, str>,
    },
    /// Options that contradict each other or name something that is not there; found before anything was forked.
    Invalid(&'static str),
    /// The system call failed: EAGAIN (limits on processes), ENOMEM; EMFILE or ENFILE where there is no descriptor for the /dev/null of
    /// [`ForkOptions::stdio_null`](crate::ForkOptions::stdio_null).
    Os(io::Error),
}

impl fmt::Display for ForkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ForkError::Forbidden { entered } => {
                f.write_str("fork inside the calling thread's own no-forking region")?;
                if let Some(at) = entered {
                    write!(f, ", which began at {at}")?;
                }
                f.write_str(": end it first (a guard; an initialiser of OnceLock, LazyLock or PerProcess; what CareFd::open runs)")
            }
            ForkError::InFork => f.write_str("fork called from inside a hook or an at-fork handler: fork after that, or in the child's Hook::cleanup"),
            ForkError::Busy { culprits } => {
                write!(f, "the budget of the fork ended; in the way: {culprits}; see ForkOptions::timeout")
            }
            ForkError::WouldDeadlock { culprits } => write!(
                f,
                "this thread holds a lock and forks, and cannot go on before another thread, which waits for that lock, or holds one and forks too: \
                 {culprits}; release the lock first"
            ),
            ForkError::Vetoed { hook, reason } => write!(f, "hook \"{hook}\" vetoed the fork: {reason}"),
            ForkError::Invalid(what) => write!(f, "invalid fork options: {what}"),
            ForkError::Os(e) => write!(f, "fork failed: {e}"),
        }
    }
}

impl std::error::Error for ForkError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ForkError::Os(e) => Some(e),
            _ => None,
        }
    }
}

/// A thread that was in a region.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Culprit {
    /// The kernel's number of the thread.
    pub tid: u32,
    /// The thread's name as it was when it first entered a region, at most 15 bytes.
    pub name: String,
    /// Where it entered its outermost region, in builds with debug assertions (a lock of this library is recorded too).
    pub entered: Option<&'static Location<'static>>,
}

/// Who kept a fork from happening.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Culprits {
    /// The hook whose lock was not to be had, if any; that of [`stdio::guard`](crate::stdio::guard) where it was had late.
    pub hook: Option<&'static str>,
    /// Threads in regions; at most eight are named.
    pub threads: Vec<Culprit>,
    /// All threads in regions, named or not.
    pub count: usize,
    /// Another thread's fork held everything up: this one never came to its turn.
    pub queue: bool,
    /// That fork waits for a stream that a thread holds which is stuck printing: see [`stdio::guard`](crate::stdio::guard).
    pub waiting: Option<Waiting>,
    /// That fork is held up by a hook.
    pub preparing: Option<Box<Preparing>>,
}

impl fmt::Display for Culprits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sep = "";
        if let Some(hook) = self.hook {
            write!(f, "hook \"{hook}\"")?;
            sep = ", ";
        }
        for t in &self.threads {
            write!(f, "{sep}thread {} \"{}\" in a region or with a carefork lock", t.tid, t.name)?;
            if let Some(at) = t.entered {
                write!(f, " since {at}")?;
            }
            sep = ", ";
        }
        if self.count > self.threads.len() {
            write!(f, "{sep}{} more threads", self.count - self.threads.len())?;
            sep = ", ";
        }
        match (&self.waiting, &self.preparing) {
            (Some(waiting), _) => write!(f, "{sep}{waiting}"),
            (None, Some(preparing)) => write!(f, "{sep}{preparing}"),
            (None, None) if sep.is_empty() => f.write_str("another thread's fork"),
            (None, None) => Ok(()),
        }
    }
}

/// What a fork collects on its way, without allocation; made into a `ForkError` after its return.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) busy: Busy,
    /// The hook that conflicted or vetoed last, or std's streams where they took long.
    pub(crate) hook: Option<&'static str>,
    pub(crate) veto: Option<Cow<'static, str>>,
    pub(crate) panic: Text,
    /// Another fork that waited for a stream when this one's time was over.
    pub(crate) print_wait: Option<Waiting>,
    /// Another fork that was preparing a hook then.
    pub(crate) preparing: Option<Preparing>,
}

impl Report {
    pub(crate) const fn new() -> Self {
        Self { busy: Busy::NONE, hook: None, veto: None, panic: Text::new(), print_wait: None, preparing: None }
    }

    /// As new, without freeing what a hook said: that is not for the middle of a fork (G9).
    pub(crate) fn forget(&mut self) {
        // Looks first: most forks meet nobody, and what they write is a page that is copied.
        if self.busy.count == 0
            && self.hook.is_none()
            && self.print_wait.is_none()
            && self.preparing.is_none()
            && self.veto.is_none()
            && self.panic.len == 0
        {
            return;
        }
        self.busy.forget();
        self.hook = None;
        self.print_wait = None;
        self.preparing = None;
        #[allow(clippy::mem_forget)]
        std::mem::forget(self.veto.take());
        self.panic.len = 0;
    }

    fn culprits(&self) -> Culprits {
        let threads =
            self.busy.seen.iter().flatten().map(|s| Culprit { tid: s.tid, name: s.name(), entered: s.entered });
        let threads: Vec<_> = threads.collect();
        let queue = threads.is_empty() && self.hook.is_none();
        Culprits {
            hook: self.hook,
            threads,
            count: self.busy.count,
            queue,
            waiting: self.print_wait,
            preparing: self.preparing.map(Box::new),
        }
    }

    /// Allocates: after the fork's return.
    pub(crate) fn into_error(mut self, outcome: Outcome) -> ForkError {
        match outcome {
            Outcome::WouldDeadlock => ForkError::WouldDeadlock { culprits: self.culprits() },
            Outcome::Vetoed => ForkError::Vetoed {
                hook: self.hook.unwrap_or("?"),
                reason: self.veto.take().unwrap_or_else(|| {
                    Cow::Owned(format!("panicked: {}", String::from_utf8_lossy(self.panic.as_bytes())))
                }),
            },
            _ => ForkError::Busy { culprits: self.culprits() },
        }
    }

    /// One line on fd 2 about a foreign fork that goes ahead dirty; false if it could not be written at once. No allocation.
    pub(crate) fn say(&self, outcome: Outcome) -> bool {
        let mut line = Text::new();
        line.push(b"carefork: a fork by foreign code goes ahead unguarded:");
        let head = line.len;
        match (outcome, self.hook) {
            (Outcome::Vetoed | Outcome::Committed(_), Some(hook)) => {
                line.push(b" vetoed by hook ");
                line.push(hook.as_bytes());
            }
            (_, Some(hook)) => {
                line.push(b" no lock for hook ");
                line.push(hook.as_bytes());
            }
            (Outcome::WouldDeadlock, None) => line.push(b" two forking threads hold locks"),
            (_, None) if self.busy.count == 0 => line.push(b" another fork did not end"),
            _ => {}
        }
        if let Some(w) = self.print_wait {
            line.push(if line.len == head { b"" } else { b":" });
            line.push(b" a fork of thread ");
            line.number(w.tid);
            line.push(b" has waited for ");
            line.push(w.stream.name().as_bytes());
            line.push(b" for ");
            line.number(u32::try_from(w.waited.as_secs()).unwrap_or(u32::MAX));
            line.push(b" s: some thread is stuck printing");
        }
        if let Some(p) = self.preparing {
            line.push(if line.len == head { b"" } else { b":" });
            line.push(b" a fork of thread ");
            line.number(p.tid);
            line.push(b" is held up by hook ");
            line.push(p.hook.as_bytes());
        }
        for s in self.busy.seen.iter().flatten().take(NAMED) {
            line.push(b" [thread ");
            line.number(s.tid);
            line.push(b" ");
            line.push(name(s).split(|&b| b == 0).next().unwrap_or_default());
            line.push(b" in a region");
            if let Some(at) = s.entered {
                line.push(b" since ");
                line.push(at.file().as_bytes());
                line.push(b":");
                line.number(at.line());
            }
            line.push(b"]");
        }
        line.push(b"\n");
        sys::say(line.as_bytes())
    }
}

impl Seen {
    /// The thread's name. Allocates.
    pub(crate) fn name(&self) -> String {
        String::from_utf8_lossy(&name(self)).trim_end_matches('\0').to_owned()
    }
}

fn name(s: &Seen) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&s.name[0].to_ne_bytes());
    bytes[8..].copy_from_slice(&s.name[1].to_ne_bytes());
    bytes
}

/// A line in a fixed buffer; what does not fit is cut off.
#[derive(Clone, Copy)]
pub(crate) struct Text {
    bytes: [u8; 512],
    len: usize,
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(self.as_bytes()), f)
    }
}

impl Text {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; 512], len: 0 }
    }

    /// Room is kept for the end of the line.
    pub(crate) fn push(&mut self, text: &[u8]) {
        let end = if text == b"\n" { 512 } else { 511 };
        let n = text.len().min(end - self.len.min(end));
        self.bytes[self.len..self.len + n].copy_from_slice(&text[..n]);
        self.len += n;
    }

    pub(crate) fn number(&mut self, mut n: u32) {
        let mut digits = [0u8; 10];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (n % 10) as u8;
            n /= 10;
            if n == 0 {
                break;
            }
        }
        self.push(&digits[at..]);
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// [`postfork_child_noexec`](crate::postfork_child_noexec) was called in a process that no fork has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAChild {
    // A unit struct would be a name in a pattern, and match everything.
    pub(crate) private: (),
}

impl fmt::Display for NotAChild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("this process is no fork's child: there is nothing to clean up, and its descriptors are in use")
    }
}

impl std::error::Error for NotAChild {}
