//! A service's thread.

use super::builder::{Handler, Regular};
use super::{Control, Item, PANICKED};
use crate::error::Text;
use crate::locks::Mutex;
use crate::{runtime, sys};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

pub(super) struct Worker<S, M> {
    pub(super) received: Receiver<Item<M>>,
    pub(super) state: State<S>,
    pub(super) handler: Handler<S, M>,
    pub(super) every: Option<(Duration, Regular<S>)>,
    pub(super) control: Arc<Control>,
    pub(super) generation: u64,
}

/// The state, and whether a child may look at it.
pub(super) enum State<S> {
    /// The thread's own: no fork waits for it.
    Own(S),
    /// To be handed over: no fork finds it locked. Empty when the thread has ended.
    Shared(Arc<Mutex<Option<S>>>),
}

impl<S> State<S> {
    fn with(&mut self, f: impl FnOnce(&mut S)) {
        match self {
            State::Own(state) => f(state),
            State::Shared(state) => f(state.lock().as_mut().expect("taken by `end` alone")),
        }
    }

    /// Drops the state, outside of the lock.
    fn end(self) {
        if let State::Shared(state) = self {
            let state = state.lock().take();
            drop(state);
        }
    }
}

/// What the thread does next.
enum Next<M> {
    Item(Item<M>),
    Regular,
    End,
}

impl<S, M> Worker<S, M> {
    /// Handles messages until the service ends; drops everything. Does not unwind.
    pub(super) fn run_to_end(mut self) {
        let ran = catch_unwind(AssertUnwindSafe(|| self.run()));
        // A panic came past the look after the handler.
        self.check_process();
        let Worker { received, state, control, .. } = self;
        let dropped = catch_unwind(AssertUnwindSafe(|| {
            let _note = NotePanic(&control);
            // Messages that came too late, and the state, may panic when they are dropped. The channel would keep the former as
            // long as the service.
            while received.try_recv().is_ok() {}
            drop(received);
            state.end();
        }));
        // So may what a panic carries.
        #[allow(clippy::mem_forget)]
        std::mem::forget((ran, dropped));
    }

    fn run(&mut self) {
        let mut due = self.due();
        loop {
            match self.next(due) {
                Next::Item(item) => self.item(item),
                Next::Regular => {
                    self.regular();
                    due = self.due();
                    // An interval that is over already must not keep messages from their turn.
                    if let Ok(item) = self.received.try_recv() {
                        self.item(item);
                    }
                }
                Next::End => break,
            }
        }
        self.regular();
    }

    fn item(&mut self, item: Item<M>) {
        match item {
            Item::Message(message) => self.handle(message),
            Item::Flush(done) => {
                self.regular();
                // Room for one; who does not wait any more does not want it.
                let _ = done.send(());
            }
            Item::Look => {}
        }
    }

    /// When `every`'s function is to run next; an interval past the end of time is never.
    fn due(&self) -> Option<Instant> {
        Instant::now().checked_add(self.every.as_ref()?.0)
    }

    fn next(&self, due: Option<Instant>) -> Next<M> {
        if !self.control.is_running() {
            return self.received.try_recv().map_or(Next::End, Next::Item);
        }
        let Some(due) = due else {
            return self.received.recv().map_or(Next::End, Next::Item);
        };
        // A channel that is never empty must not keep it from its time.
        if Instant::now() >= due {
            return Next::Regular;
        }
        match self.received.recv_deadline(due) {
            Ok(item) => Next::Item(item),
            Err(RecvTimeoutError::Timeout) => Next::Regular,
            Err(RecvTimeoutError::Disconnected) => Next::End,
        }
    }

    fn handle(&mut self, message: M) {
        let (handler, control) = (&*self.handler, &*self.control);
        self.state.with(|state| {
            let _note = NotePanic(control);
            handler(state, message);
        });
        self.check_process();
    }

    fn regular(&mut self) {
        let Some((_, f)) = &self.every else { return };
        let control = &*self.control;
        self.state.with(|state| {
            let _note = NotePanic(control);
            f(state);
        });
        self.check_process();
    }

    /// The copy of this thread in a child that the handler forked must not go on: the messages are the parent's.
    fn check_process(&self) {
        if runtime::generation() == self.generation {
            return;
        }
        let mut line = Text::new();
        line.push(b"carefork: service ");
        line.push(self.control.name.as_bytes());
        line.push(b": the handler forked and returned or panicked in the child, which ends here\n");
        sys::say(line.as_bytes());
        sys::exit_now(101)
    }
}

/// Says that the service has panicked, before the state is unlocked: no child is to be handed what was half done.
struct NotePanic<'a>(&'a Control);

impl Drop for NotePanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.state.store(PANICKED, SeqCst);
        }
    }
}
