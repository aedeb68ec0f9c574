//! How to fork: budget, signals, descriptors and the few things people want of a fresh child (K3, K4).

#![allow(unsafe_code)]

use crate::carefd::CareFd;
use crate::error::ForkError;
use crate::signals::{LAST, Signals};
use crate::{sys, sys_signals};
use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::Duration;

/// Options for a fork; [`fork`](crate::fork) is `ForkOptions::new().fork()`.
///
/// ```
/// use carefork::{ForkOptions, Signals};
/// let options = ForkOptions::new().signals(Signals::Reset).name("worker").new_session(true);
/// // SAFETY: the child touches no descriptor borrowed in the parent.
/// let mut child = unsafe { options.spawn(|| 7) }?;
/// assert_eq!(child.wait()?.code(), Some(7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ForkOptions<'fd> {
    pub(crate) timeout: Option<Duration>,
    pub(crate) signals: Signals,
    pub(crate) mask: Option<Vec<i32>>,
    pub(crate) keep: Vec<RawFd>,
    pub(crate) close_others: bool,
    pub(crate) death_signal: Option<i32>,
    pub(crate) name: Option<String>,
    pub(crate) new_session: bool,
    pub(crate) stdio_null: bool,
    pub(crate) pidfd: bool,
    borrowed: PhantomData<&'fd ()>,
}

impl Default for ForkOptions<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'fd> ForkOptions<'fd> {
    /// A budget of one second, signals as they are, nothing else.
    pub fn new() -> Self {
        Self {
            timeout: Some(Duration::from_secs(1)),
            signals: Signals::Inherit,
            mask: None,
            keep: Vec::new(),
            close_others: false,
            death_signal: None,
            name: None,
            new_session: false,
            stdio_null: false,
            pidfd: true,
            borrowed: PhantomData,
        }
    }

    /// The budget: how long other threads' regions and hooked locks may keep the fork waiting before it gives up with
    /// [`ForkError::Busy`] (G6). What a [`Hook::prepare`](crate::Hook::prepare) function of your own or [`stdio::guard`](crate::stdio::guard) waits for
    /// is not bounded by it; that of other libraries' handlers neither.
    pub fn timeout(mut self, budget: Duration) -> Self {
        self.timeout = Some(budget);
        self
    }

    /// Waits as long as it takes.
    pub fn timeout_never(mut self) -> Self {
        self.timeout = None;
        self
    }

    /// What the child does with signals; at first [`Signals::Inherit`].
    pub fn signals(mut self, signals: Signals) -> Self {
        self.signals = signals;
        self
    }

    /// The signals that the child begins with blocked, instead of what [`Signals`] says.
    pub fn mask(mut self, blocked: &[i32]) -> Self {
        self.mask = Some(blocked.to_vec());
        self
    }

    /// Keeps this descriptor open in the child: the clean-up leaves it alone if it is a care-fd, [`ForkOptions::close_others`]
    /// if it is not. A kept care-fd stays registered: the child's own child closes it unless it is kept again (F4). One
    /// with [`OnFork::Close`](crate::OnFork::Close) is closed at the fork all the same.
    pub fn keep(mut self, fd: &'fd impl AsFd) -> Self {
        self.keep.push(fd.as_fd().as_raw_fd());
        self
    }

    /// Closes every descriptor in the child but 0, 1, 2 and those kept. Values that own the closed ones must not be dropped
    /// there (`mem::forget` them); care-fds know by themselves.
    pub fn close_others(mut self, yes: bool) -> Self {
        self.close_others = yes;
        self
    }

    /// The signal that the child gets when the forking *thread* ends (prctl(2), `PR_SET_PDEATHSIG`), also if its process has ended
    /// by then. The fork returns once the child has asked for it (but waits no longer than a second), so the thread's end
    /// cannot be missed. A later change of uid or an exec of a set-uid program clears it.
    pub fn death_signal(mut self, signal: i32) -> Self {
        self.death_signal = Some(signal);
        self
    }

    /// The child's name as ps(1) shows it, at most 15 bytes; and as the parent is told of its end ([`Exit`](crate::Exit)).
    pub fn name(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// The child leads a session of its own (setsid(2)).
    pub fn new_session(mut self, yes: bool) -> Self {
        self.new_session = yes;
        self
    }

    /// The child's standard streams are /dev/null.
    pub fn stdio_null(mut self, yes: bool) -> Self {
        self.stdio_null = yes;
        self
    }

    /// Whether the parent watches the child by a pidfd; at first it does.
    ///
    /// Without one a fork of a small process takes some five per cent less time (opening, checking and closing it), and waiting and killing go by
    /// the child's number: as exact, unless something else in this process waits for children that are not its own. Then a number that
    /// came round again is noticed where carefork forked the second child, too, and not where foreign code did.
    pub fn pidfd(mut self, yes: bool) -> Self {
        self.pidfd = yes;
        self
    }

    /// Checks the options and gets ready what the child needs. Before the fork: allocates and may fail.
    #[inline(never)]
    pub(crate) fn ready(&self) -> Result<Ready, ForkError> {
        self.signals.check()?;
        let mask = match &self.mask {
            Some(list) if !list.iter().all(|s| (1..=LAST).contains(s)) => {
                return Err(ForkError::Invalid("mask names a number that is no signal"));
            }
            Some(list) => Some(sys_signals::mask_of(list)),
            None => None,
        };
        if let (Some(mask), Signals::List(reset)) = (&self.mask, &self.signals)
            && mask.iter().any(|s| reset.contains(s))
        {
            return Err(ForkError::Invalid("mask blocks a signal that Signals::List unblocks"));
        }
        if self.death_signal.is_some_and(|s| !(1..=LAST).contains(&s)) {
            return Err(ForkError::Invalid("death_signal is no signal"));
        }
        if self.stdio_null && self.keep.iter().any(|fd| (0..=2).contains(fd)) {
            return Err(ForkError::Invalid("stdio_null replaces a standard stream that keep names"));
        }
        let name = match &self.name {
            Some(n) => Some(CString::new(n.as_str()).map_err(|_| ForkError::Invalid("name has a NUL byte"))?),
            None => None,
        };
        let mut keep = self.keep.clone();
        keep.sort_unstable();
        keep.dedup();
        let null =
            if self.stdio_null { Some(CareFd::open_cloexec(sys::open_null).map_err(ForkError::Os)?) } else { None };
        let armed = self.death_signal.map(|_| Armed::new()).transpose().map_err(ForkError::Os)?;
        Ok(Ready { mask, name, keep, null, parent: self.death_signal.map_or(0, |_| sys::getpid()), armed })
    }
}

/// What `fork` made ready, so that the child has nothing left that can fail.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) mask: Option<sys_signals::SigSet>,
    pub(crate) name: Option<CString>,
    pub(crate) keep: Vec<RawFd>,
    /// A care-fd: no other thread's child keeps it.
    pub(crate) null: Option<CareFd<OwnedFd>>,
    pub(crate) parent: u32,
    pub(crate) armed: Option<Armed>,
}

/// A word that parent and child share, by which the child says that its death signal is set. Nothing in a child tells whether the
/// *thread* that forked has ended, so that one does not come back from its fork before.
#[derive(Debug)]
pub(crate) struct Armed(NonNull<AtomicU32>);

impl Armed {
    fn new() -> io::Result<Self> {
        let page = sys::map(size_of::<AtomicU32>(), true)?;
        NonNull::new(page.cast()).map(Armed).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: a zeroed page of our own, mapped until this value is dropped.
        unsafe { self.0.as_ref() }
    }

    /// Async-signal-safe.
    pub(crate) fn tell(&self) {
        self.word().store(1, Release);
        sys::futex_wake_shared(self.word());
    }

    /// Not for ever: the child may be stopped by a debugger.
    pub(crate) fn wait(&self, is_dead: impl Fn() -> bool) {
        let end = sys::monotonic().saturating_add(1_000_000_000);
        while self.word().load(Acquire) == 0 && !is_dead() && sys::monotonic() < end {
            sys::futex_wait_shared(self.word(), 0, 1_000_000);
        }
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length; no reference outlives a call of the methods above.
        unsafe { sys::unmap(self.0.as_ptr().cast(), size_of::<AtomicU32>()) };
    }
}
