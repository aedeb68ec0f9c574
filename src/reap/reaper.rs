//! `Reaper`: one callback for each child, exactly once, for any event loop or none.

use super::engine::{Engine, Entry, Key};
use super::exit::Exit;
use super::owner::{self, Owner, UnknownFn};
use super::per_process::PerProcess;
use super::timer::Timer;
use super::watched::Watched;
use super::{channel, orphans};
use crate::locks::Mutex;
use crate::reap::child::Child;
use crate::sys_reap;
use std::any::Any;
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};

/// What happens at a child's end.
pub(crate) enum Then {
    Call(Box<dyn FnOnce(Exit) + Send>),
    /// Into the channel.
    Send,
    /// Deregistered.
    Nothing,
}

/// Watches children and calls back once for each, when it has ended and was reaped.
///
/// It waits by pidfd: no signal, no signal handler, no `waitpid(-1)`, nothing that other code in the process could notice or disturb;
/// programs that have to share SIGCHLD say so with [`Reaper::set_owner`]. Reapers live side by side: 500 of them, or 100 that are watched by
/// event loops with epoll, which is what Linux allows of epolls that watch each other (EINVAL). The descriptor
/// is readable when [`Reaper::dispatch`] has something to do, level-triggered, in any event loop; programs without one use
/// [`Reaper::receiver`]. A death costs three system calls and a dispatch two more, however many children live.
///
/// Handles are cheap to clone, and may be used from any thread and from inside callbacks. When the last one is dropped, or at
/// [`Reaper::close`], the children that are left are nobody's: no callback, and they are reaped once they end. A callback that owns a
/// handle keeps the reaper alive until its child has ended.
///
/// In a child of this process a reaper is the parent's: everything is refused there, no callback runs, callbacks are
/// not dropped either. Make a new one. A callback may fork; its child, should it return through the dispatch, finds that refused.
///
/// # Without pidfds
/// `pidfd_open` may be refused (Linux before 5.3, a filter), or a child was forked with
/// [`ForkOptions::pidfd`](crate::ForkOptions::pidfd) off. Such children are asked for by number, every 10 ms by a reaper:
///
/// | promise | by number |
/// |---|---|
/// | one callback, never a hang | kept |
/// | a stolen status is lost, and no other child's | kept against children that carefork forks in this process (but for one that an owner of SIGCHLD finds dead while its fork is under way), not against foreign forks |
/// | signals hit the child or nobody | kept, unless another wait reaps it between the look and the kill |
/// | no work for each live child | not kept: one system call each every 10 ms |
///
/// ```
/// use std::sync::mpsc;
/// let reaper = carefork::Reaper::new()?;
/// let (said, heard) = mpsc::channel();
/// // SAFETY: the child uses nothing of the parent's.
/// let child = unsafe { carefork::ForkOptions::new().name("worker").spawn(|| 3) }?;
/// reaper.watch(child, move |exit| said.send(exit).unwrap())?;
/// let exit = loop {
///     // An event loop would wait for the reaper's descriptor.
///     reaper.dispatch()?;
///     if let Ok(exit) = heard.try_recv() {
///         break exit;
///     }
/// };
/// assert_eq!(exit.code(), Some(3));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Reaper {
    handle: Arc<Handle>,
}

/// What all handles share; the last one closes.
struct Handle(ManuallyDrop<Arc<Shared>>);

impl Drop for Handle {
    fn drop(&mut self) {
        if self.0.is_ours() {
            self.0.close();
        }
        // Asked again: closing runs destructors, which may fork.
        if self.0.is_ours() {
            // SAFETY: dropped once, here. In a child nothing is: what callbacks own is the parent's, and a thread that is gone may
            // have the channel's locks.
            #[allow(unsafe_code)]
            unsafe {
                ManuallyDrop::drop(&mut self.0);
            }
        }
    }
}

pub(crate) struct Shared {
    pub(crate) engine: Engine<Then>,
    pub(crate) timer: Timer,
    closed: AtomicBool,
    pub(crate) channel: channel::Channel,
    pub(crate) owner: Mutex<Owner>,
    pub(crate) unknown: Mutex<Option<Arc<UnknownFn>>>,
    pub(crate) id: u32,
}

/// The reapers of this process, in the order of their making.
pub(crate) struct All {
    reapers: Mutex<Vec<Weak<Shared>>>,
    next: AtomicU32,
}

static ALL: PerProcess<All> = PerProcess::new(|| All { reapers: Mutex::new(Vec::new()), next: AtomicU32::new(1) });

pub(crate) fn all() -> Vec<Arc<Shared>> {
    ALL.get().reapers.lock().iter().filter_map(Weak::upgrade).collect()
}

pub(crate) fn rearm_all() {
    all().iter().for_each(|r| r.timer.rearm(r));
}

/// Keys of what else a reaper's epoll watches: no slot's. A dispatch looks after all of it anyway.
const ORPHANS: u64 = u64::MAX;
pub(crate) const TIMER: u64 = u64::MAX - 1;
pub(crate) const SIGCHLD: u64 = u64::MAX - 2;

impl Reaper {
    /// A reaper with nobody to watch.
    ///
    /// # Errors
    /// As epoll_create1(2): no room for one or two descriptors; EINVAL where there are 500 already.
    pub fn new() -> io::Result<Reaper> {
        let all = ALL.get();
        let id = all.next.fetch_add(1, Ordering::Relaxed);
        let shared = Shared {
            engine: Engine::new(id)?,
            timer: Timer::new(),
            closed: AtomicBool::new(false),
            channel: channel::Channel::new(),
            owner: Mutex::new(Owner::NOBODY),
            unknown: Mutex::new(None),
            id,
        };
        shared.hear(orphans::descriptor()?, ORPHANS)?;
        orphans::when_asking(rearm_all);
        let shared = Arc::new(shared);
        let mut reapers = all.reapers.lock();
        reapers.retain(|r| r.strong_count() > 0);
        reapers.push(Arc::downgrade(&shared));
        drop(reapers);
        // Orphans that others ask for already.
        shared.timer.rearm(&shared);
        Ok(Reaper { handle: Arc::new(Handle(ManuallyDrop::new(shared))) })
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.handle.0
    }

    /// Watches `child`. When it has ended and is out of the table, `then` runs once, in [`Reaper::dispatch`], with no lock held:
    /// it may watch more, fork, change the owner of SIGCHLD, dispatch, close or drop the reaper. If it panics, the dispatch that it
    /// runs in unwinds and the next one goes on. Pipes to a program that are still in `child` are closed: take them before.
    ///
    /// # Errors
    /// [`WatchError`], with the child: the reaper is closed or the parent's, the child is the parent's, epoll has no room (ENOSPC, ENOMEM), or there is no
    /// descriptor by which to hear of a child that has no pidfd (EMFILE).
    pub fn watch(&self, child: Child, then: impl FnOnce(Exit) + Send + 'static) -> Result<Watched, WatchError> {
        self.shared().add(child, Then::Call(Box::new(then)))
    }

    /// Watches `child`; its [`Exit`] goes to the [`Reaper::receiver`], and is kept until somebody receives it or the reaper closes.
    ///
    /// # Errors
    /// As for [`Reaper::watch`].
    pub fn send(&self, child: Child) -> Result<Watched, WatchError> {
        self.shared().add(child, Then::Send)
    }

    /// Reaps every child that has ended and calls back for each; how many. Does not wait.
    ///
    /// For the event loop, when the reaper's descriptor is readable; from any number of threads. A callback that dispatches handles the
    /// next death inside itself, and so on: as many frames on the stack as there are dead children. The loop comes back anyway.
    ///
    /// # Errors
    /// As epoll_wait(2) and waitid(2); ECHILD in a child of the process that made the reaper; what a callback of
    /// [`Reaper::on_unknown`] called a disaster.
    pub fn dispatch(&self) -> io::Result<usize> {
        self.shared().dispatch()
    }

    /// How many children are watched.
    pub fn len(&self) -> usize {
        if self.shared().is_ours() { self.shared().engine.live() } else { 0 }
    }

    /// Nobody is watched.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives up: no callback runs any more, the children that are left are nobody's and are reaped once they end. For all
    /// handles; done by the last one that is dropped. A callback that another thread's dispatch has come to already is not waited for.
    pub fn close(&self) {
        self.shared().close();
    }
}

impl Shared {
    pub(crate) fn is_ours(&self) -> bool {
        self.engine.is_ours()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// What users see: pidfds, orphans, timer and the SIGCHLD handler's socket behind one descriptor.
    #[track_caller]
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.engine.epoll()
    }

    /// From now on `fd` makes the reaper's descriptor readable.
    pub(crate) fn hear(&self, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
        sys_reap::epoll_add(self.descriptor(), fd, key)
    }

    pub(crate) fn hear_no_more(&self, fd: BorrowedFd<'_>) {
        sys_reap::epoll_del(self.descriptor(), fd);
    }

    fn add(self: &Arc<Self>, mut child: Child, then: Then) -> Result<Watched, WatchError> {
        if !self.is_ours() {
            return Err(WatchError::new(child, io::Error::from_raw_os_error(libc::ECHILD)));
        }
        if !child.is_ours() {
            return Err(WatchError::new(child, io::Error::from_raw_os_error(libc::ECHILD)));
        }
        if self.is_closed() {
            let closed = io::Error::new(io::ErrorKind::BrokenPipe, "the reaper is closed; make a new one");
            return Err(WatchError::new(child, closed));
        }
        let pid = child.id();
        let pipes = child.take_pipes();
        let (mut body, exit) = child.into_parts();
        if exit.is_none() {
            body.want_pidfd();
        }
        // No pidfd will tell of the end: a timer must.
        if (exit.is_some() || !body.has_pidfd())
            && let Err(error) = self.timer.make_ready(self)
        {
            return Err(WatchError::new(Child::from_body(body, exit).with_pipes(pipes), error));
        }
        // Waited for before.
        let record = exit.map(|exit| Box::new(body.take_back(exit)));
        match self.engine.add(body, then, record) {
            Ok(key) => {
                owner::children_changed(self);
                self.timer.rearm(self);
                if self.is_closed() {
                    // Closed meanwhile: whoever comes later empties the table.
                    self.abandon(None);
                }
                Ok(Watched::new(self, key, pid))
            }
            // Never one that was waited for: only a pidfd can be refused.
            Err((body, _, error)) => Err(WatchError::new(Child::from_body(body, None).with_pipes(pipes), error)),
        }
    }

    pub(crate) fn dispatch(self: &Arc<Self>) -> io::Result<usize> {
        if !self.is_ours() {
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        if self.is_closed() {
            return Ok(0);
        }
        orphans::reap();
        // A callback that panics, too.
        let after = After(self);
        // Its own children are told of whatever becomes of strangers.
        let before = owner::before_dispatch(self);
        self.check_ours()?;
        let itself = self.owner.lock().reaps_itself();
        let reaped = if itself { self.reap_own()? } else { self.told_of()? };
        self.timer.tick(self);
        drop(after);
        before?;
        Ok(reaped)
    }

    /// A callback may have forked, and this be the child: nothing here is its own.
    fn check_ours(&self) -> io::Result<()> {
        if self.is_ours() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ECHILD)) }
    }

    /// Those whose status somebody else has brought before they came here.
    fn told_of(&self) -> io::Result<usize> {
        let told = self.engine.dispatch_records(|exit, then| {
            self.deliver(exit, then);
            self.is_ours() && !self.is_closed()
        });
        self.check_ours()?;
        told
    }

    /// Every child of this reaper that has ended. A callback may leave the others to the main loop.
    pub(crate) fn reap_own(self: &Arc<Self>) -> io::Result<usize> {
        let reaps_itself = || self.owner.lock().reaps_itself();
        let before = reaps_itself();
        let reaped = self.engine.dispatch(|exit, then| {
            self.deliver(exit, then);
            self.is_ours() && !self.is_closed() && (reaps_itself() || !before)
        });
        self.check_ours()?;
        reaped
    }

    /// With no lock held.
    pub(crate) fn deliver(&self, exit: Exit, then: Then) {
        match then {
            Then::Call(f) => f(exit),
            Then::Send => self.channel.send(exit),
            Then::Nothing => {}
        }
    }

    pub(crate) fn finish_with(&self, key: Key, record: super::exit::Record) -> bool {
        match self.engine.finish_with(key, record) {
            Some((exit, then)) => {
                self.deliver(exit, then);
                true
            }
            None => false,
        }
    }

    fn close(self: &Arc<Self>) {
        if !self.is_ours() || self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        owner::leave(self);
        self.channel.close();
        // It may own a handle of this reaper, which would keep it, and itself, for ever.
        let unknown = self.unknown.lock().take();
        self.abandon(unknown);
    }

    fn abandon(&self, unknown: Option<Arc<UnknownFn>>) {
        let adopted = |entry: Entry<Then>| {
            let (body, then) = entry.abandon();
            orphans::adopt(body);
            then
        };
        let thens: Vec<Then> = self.engine.drain().into_iter().map(adopted).collect();
        self.timer.ring();
        // Last, where no lock is held: what callbacks own may be anything.
        let mut panic = self.let_go(unknown);
        for then in thens {
            panic = panic.or(self.let_go(then));
        }
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Drops what is a callback's; its panic, which is to keep none of the others. Its destructor may fork, and the child come back
    /// here: the others are its parent's, and none is dropped there.
    fn let_go<T>(&self, owned: T) -> Option<Box<dyn Any + Send>> {
        if !self.is_ours() {
            #[allow(clippy::mem_forget)]
            std::mem::forget(owned);
            return None;
        }
        catch_unwind(AssertUnwindSafe(|| drop(owned))).err()
    }
}

/// After a look at the children, however it ends: what may have changed with them.
pub(crate) struct After<'a>(pub(crate) &'a Arc<Shared>);

impl Drop for After<'_> {
    fn drop(&mut self) {
        // In a child the alarm is its parent's.
        if self.0.is_ours() {
            owner::children_changed(self.0);
            self.0.timer.rearm(self.0);
        }
    }
}

/// Readable when [`Reaper::dispatch`] has something to do. An epoll descriptor: watch it for reading, and leave it alone otherwise.
impl AsFd for Reaper {
    /// # Panics
    /// In a child that closed it.
    #[track_caller]
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared().descriptor()
    }
}

impl AsRawFd for Reaper {
    /// # Panics
    /// In a child that closed it.
    #[track_caller]
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl fmt::Debug for Reaper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reaper").field("children", &self.len()).finish_non_exhaustive()
    }
}

/// A child could not be watched; it comes back with the reason.
#[derive(Debug)]
pub struct WatchError {
    child: Box<Child>,
    /// Why.
    pub error: io::Error,
}

impl WatchError {
    fn new(child: Child, error: io::Error) -> Self {
        WatchError { child: Box::new(child), error }
    }

    /// The child, as it was.
    pub fn into_child(self) -> Child {
        *self.child
    }
}

impl fmt::Display for WatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "child {} cannot be watched: {}", self.child.id(), self.error)?;
        if self.error.raw_os_error() == Some(libc::ECHILD) {
            f.write_str(match self.child.is_ours() {
                true => " (the reaper is another process's; make one here)",
                false => " (it is another process's child: nobody's here)",
            })?;
        }
        Ok(())
    }
}

impl std::error::Error for WatchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl From<WatchError> for io::Error {
    fn from(e: WatchError) -> io::Error {
        io::Error::new(e.error.kind(), e)
    }
}
