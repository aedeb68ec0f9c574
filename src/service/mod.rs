//! `Service`: a subsystem that owns a thread and a channel, and comes back in a child (H5).
//!
//! No operation of the channel needs a region and no hook guards it, because no process touches a channel of another generation: a
//! child's copy may hold ghosts, parked or half way through a send, so it is left where it is, never used and never dropped. The
//! child makes a channel and a thread of its own when it first needs them.

mod builder;
mod error;
mod reply;
mod worker;

pub use builder::{OnChild, ServiceBuilder};
pub use error::{SendError, ServiceError};
pub use reply::Reply;

use crate::locks::{Mutex, Own};
use crate::registration::Registration;
use crate::runtime;
use crossbeam_channel::{Receiver, Sender, TrySendError};
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::thread::{self, JoinHandle, ThreadId};

/// A thread with a state and a channel of messages to it, which works in the parent and in children.
///
/// In the parent nothing stops for a fork: its thread goes on, and every message is handled once, there. (Under
/// [`OnChild::HandOver`] a message is handled in a region, which waits while a fork keeps the gate shut.) What a child finds is
/// declared by [`OnChild`]. A child that goes on without exec and has cleaned up ([`spawn`](crate::spawn),
/// [`InChild::cleanup`](crate::InChild::cleanup), [`postfork_child_noexec`](crate::postfork_child_noexec)) starts with an empty channel;
/// its thread comes back with the first message ([`ServiceBuilder::eager`]: with the clean-up), so that a child which never uses the
/// service pays nothing and has one thread. A child that did not clean up, as one soon to exec, gets [`ServiceError::NotRestarted`].
///
/// A fork waits for a service only under [`OnChild::HandOver`], and then for one message at most.
///
/// Share it by reference, in an `Arc` or in a static. Dropping it is [`Service::stop`]; what is in a static is not dropped, so end the
/// program, and a child, with [`Service::stop`] or [`Service::flush`], or what is still queued is lost.
///
/// ```
/// use carefork::Service;
/// use std::collections::BTreeSet;
/// let seen = Service::builder("seen", BTreeSet::new).start(|names, name: String| {
///     names.insert(name);
/// })?;
/// seen.send("parent".into())?;
/// // SAFETY: the child uses no descriptor of the parent's.
/// let mut child = unsafe {
///     carefork::spawn(|| {
///         // Works at once, with a set of its own.
///         i32::from(seen.send("child".into()).is_err() || seen.flush().is_err())
///     })
/// }?;
/// assert!(child.wait()?.success());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Service<M: Send + 'static> {
    inner: Arc<Inner<M>>,
    /// Of an eager service.
    registration: Option<Registration>,
}

/// What a service's handles share. Its thread knows `control` only, so that whoever drops the service may be its thread.
struct Inner<M> {
    control: Arc<Control>,
    line: Own<Line<M>>,
    restarts: bool,
    start: Box<dyn Fn() -> Result<Line<M>, ServiceError> + Send + Sync>,
}

/// The way to one process's thread.
struct Line<M> {
    messages: Sender<Item<M>>,
    /// Disconnects as the thread's last act.
    end: Receiver<Infallible>,
    id: ThreadId,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Item<M> {
    Message(M),
    /// Answered once all before it are handled.
    Flush(Sender<()>),
    /// Have a look at `Control`.
    Look,
}

/// Whether the service is to go on: copied to a child, so that what has ended stays so there.
struct Control {
    name: &'static str,
    /// SeqCst: set before the thread is woken, and looked at after each item. A full channel cannot be told, but then an
    /// item is to come.
    state: AtomicU8,
}

const RUNNING: u8 = 0;
const STOPPED: u8 = 1;
const PANICKED: u8 = 2;

impl Control {
    fn is_running(&self) -> bool {
        self.state.load(SeqCst) == RUNNING
    }

    /// Why nothing is sent any more.
    fn ended(&self) -> Option<ServiceError> {
        match self.state.load(SeqCst) {
            RUNNING => None,
            PANICKED => Some(ServiceError::Panicked { service: self.name }),
            _ => Some(ServiceError::Stopped { service: self.name }),
        }
    }

    /// After the channel was found without a receiver.
    fn gone(&self) -> ServiceError {
        self.ended().unwrap_or(ServiceError::Stopped { service: self.name })
    }
}

impl<M> Line<M> {
    /// The caller is the service's thread: waiting for it would be for ever.
    fn is_own_thread(&self) -> bool {
        thread::current().id() == self.id
    }
}

impl<M> Inner<M> {
    /// The line of this process, the thread behind it started if need be.
    fn line(&self) -> Result<&Line<M>, ServiceError> {
        if let Some(ended) = self.control.ended() {
            return Err(ended);
        }
        match self.line.here() {
            Some(line) => Ok(line),
            None => {
                self.check_restarts()?;
                self.line.get_or_make(&self.start)
            }
        }
    }

    /// In a child without a thread.
    fn check_restarts(&self) -> Result<(), ServiceError> {
        if self.restarts && runtime::is_cleaned_up() {
            return Ok(());
        }
        Err(ServiceError::NotRestarted { service: self.control.name })
    }
}

impl Service<()> {
    /// Begins a service called `name` (of its thread, its errors and reports), whose state `make` makes: in [`ServiceBuilder::start`],
    /// and in each child that starts it empty.
    ///
    /// `make` runs on the thread that starts the service or sends a child's first message, inside a region: it must be short, and
    /// must not wait for a fork or use the service.
    pub fn builder<S>(name: &'static str, make: impl Fn() -> S + Send + Sync + 'static) -> ServiceBuilder<S>
    where
        S: Send + 'static,
    {
        ServiceBuilder::new(name, make)
    }
}

impl<M: Send + 'static> Service<M> {
    /// Sends a message; waits while the channel is full. Messages of one thread are handled in the order in which it sent them.
    ///
    /// Inside a region a full channel keeps forks waiting: [`Service::try_send`] does not. On the service's own thread, inside its
    /// handler, a full channel is an error.
    ///
    /// # Errors
    /// With the message: [`ServiceError::NotRestarted`] in a child for which the service does not run, `Stopped`, `Panicked`;
    /// with a child's first message also `StateLost` and `Os`.
    ///
    /// # Panics
    /// With a child's first message: if making the state does, or if a *dirty* fork (see [`lineage`](crate::lineage())) came while another
    /// thread started the service.
    pub fn send(&self, message: M) -> Result<(), SendError<M>> {
        let line = match self.inner.line() {
            Ok(line) => line,
            Err(error) => return Err(SendError { message, error }),
        };
        match self.put(line, Item::Message(message), true) {
            Err((Item::Message(message), error)) => Err(SendError { message, error }),
            _ => Ok(()),
        }
    }

    /// Sends a message if there is room for it; never waits, but to start a child's thread.
    ///
    /// # Errors
    /// As for [`Service::send`], and [`ServiceError::Full`].
    ///
    /// # Panics
    /// As for [`Service::send`].
    pub fn try_send(&self, message: M) -> Result<(), SendError<M>> {
        let line = match self.inner.line() {
            Ok(line) => line,
            Err(error) => return Err(SendError { message, error }),
        };
        match self.put(line, Item::Message(message), false) {
            Err((Item::Message(message), error)) => Err(SendError { message, error }),
            _ => Ok(()),
        }
    }

    /// Sends a request and waits for its answer. The message carries a [`Reply`], by which the handler answers, at once or later.
    ///
    /// ```
    /// use carefork::{Reply, Service};
    /// enum Message {
    ///     Add(u64),
    ///     Sum(Reply<u64>),
    /// }
    /// let sum = Service::builder("sum", || 0).start(|sum, message| match message {
    ///     Message::Add(n) => *sum += n,
    ///     Message::Sum(reply) => reply.send(*sum),
    /// })?;
    /// sum.send(Message::Add(2))?;
    /// assert_eq!(sum.call(Message::Sum)?, 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As for [`Service::send`], `Stopped` also if the service ends before it answers; [`ServiceError::NoReply`] if the handler drops the
    /// [`Reply`], and in a child that making the message has forked; [`ServiceError::OwnThread`] inside the handler, which would wait
    /// for itself.
    ///
    /// # Panics
    /// As for [`Service::send`].
    pub fn call<R>(&self, message: impl FnOnce(Reply<R>) -> M) -> Result<R, ServiceError> {
        let line = self.inner.line()?;
        self.check_other_thread(line)?;
        let (generation, (reply, answer)) = (runtime::generation(), Reply::new());
        let message = message(reply);
        if runtime::generation() != generation {
            // It forked: line and answer are the parent's.
            #[allow(clippy::mem_forget)]
            std::mem::forget(answer);
            return Err(ServiceError::NoReply { service: self.name() });
        }
        self.put(line, Item::Message(message), true).map_err(|(_, error)| error)?;
        self.wait(line, &answer)
            .ok_or_else(|| self.inner.control.ended().unwrap_or(ServiceError::NoReply { service: self.name() }))
    }

    /// Returns when all that this process sent before has been handled, and [`ServiceBuilder::every`]'s function has run after it.
    ///
    /// In a child whose thread has not started, because nothing was sent, there is nothing to wait for.
    ///
    /// # Errors
    /// `NotRestarted`, `Stopped`, `Panicked` as for [`Service::send`]; [`ServiceError::OwnThread`] inside the handler.
    pub fn flush(&self) -> Result<(), ServiceError> {
        let Some(line) = self.inner.line.here() else {
            return self.inner.control.ended().map_or_else(|| self.inner.check_restarts(), Err);
        };
        if let Some(ended) = self.inner.control.ended() {
            return Err(ended);
        }
        self.check_other_thread(line)?;
        let (done, flushed) = crossbeam_channel::bounded(1);
        self.put(line, Item::Flush(done), true).map_err(|(_, error)| error)?;
        self.wait(line, &flushed).ok_or_else(|| self.inner.control.gone())
    }

    /// Ends the service: what was sent before is handled, [`ServiceBuilder::every`]'s function runs once more, the state is dropped on
    /// the service's thread, and the thread is waited for. Sending is an error from now on, also in children forked later.
    ///
    /// A message that another thread sends meanwhile may be dropped. Inside the handler it does not wait: the thread ends when the
    /// handler has returned and the channel is empty. In a child where the thread has not started there is nothing to end. Inside a
    /// region it works, and keeps forks waiting. It must not be called by a hook.
    ///
    /// # Errors
    /// [`ServiceError::Panicked`] if the handler did, now or before.
    pub fn stop(&self) -> Result<(), ServiceError> {
        let control = &*self.inner.control;
        // One that panicked stays so.
        let _ = control.state.compare_exchange(RUNNING, STOPPED, SeqCst, SeqCst);
        if let Some(line) = self.inner.line.here() {
            // Full: it will look after the next item. Disconnected: it has ended.
            drop(line.messages.try_send(Item::Look));
            if !line.is_own_thread() {
                let _ = line.end.recv();
                let thread = line.thread.lock().take();
                if let Some(thread) = thread {
                    // Its closure catches panics.
                    drop(thread.join());
                }
            }
        }
        match control.ended() {
            Some(error @ ServiceError::Panicked { .. }) => Err(error),
            _ => Ok(()),
        }
    }

    /// The name that it was built with.
    pub fn name(&self) -> &'static str {
        self.inner.control.name
    }

    fn put(&self, line: &Line<M>, item: Item<M>, wait: bool) -> Result<(), (Item<M>, ServiceError)> {
        let service = self.name();
        match line.messages.try_send(item) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(item)) if wait && !line.is_own_thread() => {
                line.messages.send(item).map_err(|e| (e.0, self.inner.control.gone()))
            }
            Err(TrySendError::Full(item)) => Err((item, ServiceError::Full { service })),
            Err(TrySendError::Disconnected(item)) => Err((item, self.inner.control.gone())),
        }
    }

    /// Waits for the thread's answer or its end. An item that a sender queued as the thread ended is not dropped with the receiver
    /// (a bounded channel keeps it until the last sender goes), so the answer's end alone might never come.
    fn wait<R>(&self, line: &Line<M>, answer: &Receiver<R>) -> Option<R> {
        crossbeam_channel::select! {
            recv(answer) -> answer => answer.ok(),
            // What it said before its end counts.
            recv(line.end) -> _ => answer.try_recv().ok(),
        }
    }

    fn check_other_thread(&self, line: &Line<M>) -> Result<(), ServiceError> {
        if line.is_own_thread() {
            return Err(ServiceError::OwnThread { service: self.name() });
        }
        Ok(())
    }
}

impl<M: Send + 'static> Drop for Service<M> {
    /// [`Service::stop`]; in a child where the thread does not run, nothing.
    fn drop(&mut self) {
        // A clean-up on another thread starts it no more.
        self.registration = None;
        // Nobody to tell; the panic has said its message.
        drop(self.stop());
    }
}

impl<M: Send + 'static> fmt::Debug for Service<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("name", &self.name()).finish_non_exhaustive()
    }
}
