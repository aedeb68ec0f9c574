//! Endings by channel, for threads that wait with `select!`, and the thread that dispatches for them.

use super::exit::Exit;
use super::reaper::{Reaper, Shared};
use crate::gate::HANDLER;
use crate::locks::Mutex;
use crate::{sys, sys_signals};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

pub(crate) struct Channel(Mutex<State>);

struct State {
    ends: Option<(Sender<Exit>, Receiver<Exit>)>,
    /// The thread runs.
    started: bool,
    closed: bool,
}

impl Channel {
    pub(crate) fn new() -> Self {
        Channel(Mutex::new(State { ends: None, started: false, closed: false }))
    }

    /// Inside a region, as the lock is one: a fork finds the channel at rest.
    pub(crate) fn send(&self, exit: Exit) {
        let mut state = self.0.lock();
        if !state.closed {
            let (sender, _) = state.ends.get_or_insert_with(unbounded);
            // Cannot fail: we have a receiver ourselves.
            drop(sender.send(exit));
        }
    }

    pub(crate) fn close(&self) {
        let mut state = self.0.lock();
        state.closed = true;
        // Receivers find out that nothing comes any more.
        state.ends = None;
    }
}

impl Reaper {
    /// Where the endings of [`Reaper::send`]'s children arrive; for crossbeam's `select!`, beside other channels.
    ///
    /// The first call starts a thread that dispatches from then on, so no event loop is needed; callbacks of [`Reaper::watch`] run on
    /// it too. Signals are blocked on it, and so they are in a child forked there, but for [`Signals::Reset`](crate::Signals::Reset). All receivers share what arrives. When the reaper is closed they are disconnected, and the thread ends. A child
    /// of this process must not use a receiver of its parent's: with a reaper of its own it gets one of its own.
    ///
    /// # Errors
    /// As timerfd_create(2) and `thread::Builder::spawn`; `BrokenPipe` if the reaper is closed; ECHILD in a child.
    ///
    /// ```
    /// use crossbeam_channel::{never, select};
    /// let reaper = carefork::Reaper::new()?;
    /// // SAFETY: the child uses nothing of the parent's.
    /// reaper.send(unsafe { carefork::spawn(|| 7) }?)?;
    /// let (ends, other) = (reaper.receiver()?, never::<()>());
    /// select! {
    ///     recv(ends) -> exit => assert_eq!(exit?.code(), Some(7)),
    ///     recv(other) -> _ => {}
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn receiver(&self) -> io::Result<Receiver<Exit>> {
        let shared = self.shared();
        if !shared.is_ours() {
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        let mut state = shared.channel.0.lock();
        if state.closed {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the reaper is closed; make a new one"));
        }
        if !state.started {
            // What wakes the thread when the reaper closes.
            shared.timer.make_ready(shared)?;
            start(Arc::clone(shared))?;
            state.started = true;
        }
        Ok(state.ends.get_or_insert_with(unbounded).1.clone())
    }
}

/// Its signals are blocked: handlers run on the program's own threads.
fn start(shared: Arc<Shared>) -> io::Result<()> {
    let mask = sys_signals::block_all();
    let thread = crate::thread::start("carefork-reaper", HANDLER, (), move || run(&shared));
    sys_signals::set_mask(&mask);
    thread.map(drop)
}

fn run(shared: &Arc<Shared>) {
    // A callback may fork, and its child come back here.
    while shared.is_ours() && !shared.is_closed() {
        // A signal or an error ends the sleep as well: whatever it was, a dispatch looks.
        drop(sys::poll_in(shared.descriptor(), -1));
        match catch_unwind(AssertUnwindSafe(|| shared.dispatch())) {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => {
                sys::say(format!("carefork: a reaper's thread cannot dispatch: {e}\n").as_bytes());
                // Level-triggered: it would be tried again at once.
                thread::sleep(Duration::from_millis(10));
            }
            // A callback that panics has said so, and the others are to be called still. Dropping what it threw may panic in turn.
            #[allow(clippy::mem_forget)]
            Err(payload) => std::mem::forget(payload),
        }
    }
}
