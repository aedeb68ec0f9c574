//! A child's end as a future, for any executor whose reaper is dispatched.

use super::exit::Exit;
use super::reaper::{Reaper, WatchError};
use crate::locks::Mutex;
use crate::reap::child::Child;
use crate::runtime;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

#[derive(Default)]
struct State {
    exit: Option<Exit>,
    /// The callback is gone.
    over: bool,
    waker: Option<Waker>,
}

/// A watched child's [`Exit`], from [`Reaper::exit_of`]. Dropping it leaves the child watched.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct ExitFuture {
    state: Arc<Mutex<State>>,
    generation: u64,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("exit", &self.exit).finish_non_exhaustive()
    }
}

/// Wakes the future when the callback has run, or was dropped because the reaper closed.
struct Tell(Arc<Mutex<State>>);

impl Drop for Tell {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.over = true;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Reaper {
    /// Watches `child`; the future is ready when it has ended and this reaper was dispatched: by the event loop, by the thread of
    /// [`Reaper::receiver`], or under tokio by `Reaper::run`.
    ///
    /// # Errors
    /// As for [`Reaper::watch`].
    pub fn exit_of(&self, child: Child) -> Result<ExitFuture, WatchError> {
        let state = Arc::new(Mutex::new(State::default()));
        let tell = Tell(Arc::clone(&state));
        self.watch(child, move |exit| tell.0.lock().exit = Some(exit))?;
        Ok(ExitFuture { state, generation: runtime::generation() })
    }
}

impl Future for ExitFuture {
    /// `BrokenPipe` if the reaper was closed before the child ended; ECHILD in a child of this process.
    type Output = io::Result<Exit>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.generation != runtime::generation() {
            // The callback is the parent's, and so may be whoever holds the lock.
            return Poll::Ready(Err(io::Error::from_raw_os_error(libc::ECHILD)));
        }
        // Made before the lock is taken, and the old one dropped after it: a waker may own anything, this reaper too.
        let waker = context.waker().clone();
        let mut state = self.state.lock();
        if let Some(exit) = state.exit.take() {
            return Poll::Ready(Ok(exit));
        }
        if state.over {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, "the reaper was closed")));
        }
        let old = state.waker.replace(waker);
        drop(state);
        drop(old);
        Poll::Pending
    }
}
