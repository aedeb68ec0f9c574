//! The answer to a call.

use crate::runtime;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fmt;

/// How a handler answers a [`Service::call`](crate::Service::call); dropping it unanswered is
/// [`ServiceError::NoReply`](crate::ServiceError::NoReply) there.
///
/// It may be kept and answered later, from any thread, as long as the service runs. In a child it answers nobody: who called is in the parent.
pub struct Reply<R> {
    /// Taken when answered or dropped.
    caller: Option<Sender<R>>,
    generation: u64,
}

impl<R> Reply<R> {
    pub(super) fn new() -> (Self, Receiver<R>) {
        let (caller, answer) = bounded(1);
        (Reply { caller: Some(caller), generation: runtime::generation() }, answer)
    }

    /// Answers.
    pub fn send(mut self, answer: R) {
        if let Some(caller) = self.caller() {
            // Room for one, and nobody else sends; who does not wait any more does not want it.
            drop(caller.send(answer));
        }
    }

    /// A sender of another process is leaked: the caller that it would wake is a ghost, and may have held the channel's lock.
    fn caller(&mut self) -> Option<Sender<R>> {
        let caller = self.caller.take()?;
        if self.generation == runtime::generation() {
            return Some(caller);
        }
        #[allow(clippy::mem_forget)]
        std::mem::forget(caller);
        None
    }
}

impl<R> Drop for Reply<R> {
    fn drop(&mut self) {
        drop(self.caller());
    }
}

impl<R> fmt::Debug for Reply<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").finish_non_exhaustive()
    }
}
