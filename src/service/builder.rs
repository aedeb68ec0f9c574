//! What a service is told before it starts, and starting it, here and in children.

use super::worker::{State, Worker};
use super::{Control, Inner, Line, RUNNING, Service, ServiceError};
use crate::gate::HANDLER;
use crate::hook::Hook;
use crate::locks::{Mutex, Own};
use crate::registration::register;
use crate::runtime;
use crossbeam_channel::bounded;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::time::Duration;

/// What a [`Service`] does in a child that goes on without exec and has cleaned up.
///
/// Whatever is chosen, what was queued at the fork is the parent's to handle, and a child's copies of the queue and of the state are
/// neither used nor dropped: a half-full `BufWriter` in the state is not written twice. Descriptors in them stay open
/// in the child unless they are care-fds.
#[derive(Default)]
#[non_exhaustive]
pub enum OnChild<S> {
    /// It does not run there: sending is [`ServiceError::NotRestarted`].
    Nothing,
    /// It starts with an empty channel and a state made anew.
    #[default]
    Restart,
    /// It starts with an empty channel and the state that the function makes of the parent's.
    ///
    /// The state is never in the middle of a message: it lives behind a [`Mutex`] that is held while a message
    /// or [`ServiceBuilder::every`]'s function is at work. So a fork waits for one of them at most, and they must be short and
    /// must not wait for a fork. Taking it begins an outermost region: so under this one, and no other, the service's thread waits
    /// before its next message while a pending fork keeps the gate shut, unless that fork waits for a region anyway that is no service's.
    ///
    /// The function runs in the child, on the thread that starts the service there, inside a region. What it looks at is the state of
    /// the last process on the way here in which the service ran.
    HandOver(fn(&S) -> S),
}

impl<S> Clone for OnChild<S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for OnChild<S> {}

impl<S> fmt::Debug for OnChild<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OnChild::Nothing => "Nothing",
            OnChild::Restart => "Restart",
            OnChild::HandOver(_) => "HandOver",
        })
    }
}

pub(super) type Regular<S> = Arc<dyn Fn(&mut S) + Send + Sync>;
pub(super) type Handler<S, M> = Arc<dyn Fn(&mut S, M) + Send + Sync>;

/// A [`Service`] to be; see [`Service::builder`].
#[must_use = "a service runs once it is started"]
pub struct ServiceBuilder<S> {
    name: &'static str,
    make: Box<dyn Fn() -> S + Send + Sync>,
    capacity: Option<usize>,
    on_child: OnChild<S>,
    every: Option<(Duration, Regular<S>)>,
    eager: bool,
}

impl<S> fmt::Debug for ServiceBuilder<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceBuilder")
            .field("name", &self.name)
            .field("capacity", &self.capacity)
            .field("on_child", &self.on_child)
            .field("eager", &self.eager)
            .finish_non_exhaustive()
    }
}

impl<S: Send + 'static> ServiceBuilder<S> {
    pub(super) fn new(name: &'static str, make: impl Fn() -> S + Send + Sync + 'static) -> Self {
        let (capacity, on_child) = (Some(1024), OnChild::default());
        ServiceBuilder { name, make: Box::new(make), capacity, on_child, every: None, eager: false }
    }

    /// How many messages may wait; 1024 unless set. Memory for them is taken at the start.
    ///
    /// # Panics
    /// If `n` is 0.
    #[track_caller]
    pub fn capacity(mut self, n: usize) -> Self {
        assert!(n > 0, "a service's channel holds at least one message");
        self.capacity = Some(n);
        self
    }

    /// Any number of messages may wait: sending never does.
    pub fn unbounded(mut self) -> Self {
        self.capacity = None;
        self
    }

    /// What a child finds; [`OnChild::Restart`] unless set.
    pub fn on_child(mut self, on_child: OnChild<S>) -> Self {
        self.on_child = on_child;
        self
    }

    /// Runs `f` on the service's thread about every `interval`, between messages; also for [`Service::flush`], and once more when
    /// the service is stopped. For what is written in batches.
    pub fn every(mut self, interval: Duration, f: impl Fn(&mut S) + Send + Sync + 'static) -> Self {
        self.every = Some((interval, Arc::new(f)));
        self
    }

    /// The clean-up of a child starts the thread there, not the first message: for a service that has work to do by itself. If the
    /// thread cannot be started, that is reported on fd 2 and counted in [`Cleanup::panicked`](crate::Cleanup::panicked).
    pub fn eager(mut self) -> Self {
        self.eager = true;
        self
    }

    /// Starts the thread, which calls `handler` with each message.
    ///
    /// A handler that panics ends the service ([`ServiceError::Panicked`]). One that forks must neither return nor
    /// panic in the child, which would go on handling the parent's messages, or end with the parent's state: it is ended with a message
    /// on fd 2 and exit code 101.
    ///
    /// # Errors
    /// Those of starting a thread: EAGAIN.
    ///
    /// # Panics
    /// If making the state does, or the name has a NUL in it.
    pub fn start<M>(self, handler: impl Fn(&mut S, M) + Send + Sync + 'static) -> io::Result<Service<M>>
    where
        M: Send + 'static,
    {
        let control = Arc::new(Control { name: self.name, state: AtomicU8::new(RUNNING) });
        let restarts = !matches!(self.on_child, OnChild::Nothing);
        let eager = self.eager && restarts;
        let handler: Handler<S, M> = Arc::new(handler);
        let (shared, known) = (Mutex::new(None), Arc::clone(&control));
        let start = Box::new(move || self.begin(&shared, &known, &handler));
        let inner = Arc::new(Inner { control, line: Own::new(), restarts, start });
        inner.line.get_or_make(&inner.start).map_err(|e| match e {
            ServiceError::Os { error, .. } => error,
            other => io::Error::other(other),
        })?;
        let registration = eager.then(|| {
            let known = Arc::downgrade(&inner);
            register(Hook::new(inner.control.name).cleanup(move || {
                let Some(inner) = known.upgrade() else { return };
                if let Err(e @ (ServiceError::Os { .. } | ServiceError::StateLost { .. })) = inner.line() {
                    panic!("{e}");
                }
            }))
        });
        Ok(Service { inner, registration })
    }

    /// A thread and a channel for this process. Inside a region, one at a time (`Own`).
    fn begin<M: Send + 'static>(
        &self,
        shared: &Mutex<Option<Arc<Mutex<Option<S>>>>>,
        control: &Arc<Control>,
        handler: &Handler<S, M>,
    ) -> Result<Line<M>, ServiceError> {
        let service = self.name;
        let (state, to_share) = match self.on_child {
            OnChild::HandOver(hand_over) => {
                let state = match &*shared.lock() {
                    None => (self.make)(),
                    Some(last) => {
                        // Nobody else of this process looks at it: whoever holds it is a ghost, or this thread's handler.
                        let last = last.try_lock().ok_or(ServiceError::StateLost { service })?;
                        hand_over(last.as_ref().ok_or(ServiceError::Stopped { service })?)
                    }
                };
                let state = Arc::new(Mutex::new(Some(state)));
                (State::Shared(Arc::clone(&state)), Some(state))
            }
            _ => (State::Own((self.make)()), None),
        };
        let (messages, received) = match self.capacity {
            Some(n) => bounded(n),
            None => crossbeam_channel::unbounded(),
        };
        let worker = Worker {
            received,
            state,
            handler: Arc::clone(handler),
            every: self.every.clone(),
            control: Arc::clone(control),
            generation: runtime::generation(),
        };
        let (ends, end) = bounded(0);
        let thread = crate::thread::start(service, HANDLER, ends, move || worker.run_to_end());
        let thread = thread.map_err(|error| ServiceError::Os { service, error })?;
        // The one before, if any, is a ghost's, which holds on to it: it is not dropped by this.
        *shared.lock() = to_share;
        Ok(Line { messages, end, id: thread.thread().id(), thread: Mutex::new(Some(thread)) })
    }
}
