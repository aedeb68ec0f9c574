//! Threads of carefork's own, started and ended inside regions.
//!
//! std takes a lock in a thread's first and last steps (its table of stack guards) that later threads of a child need: a fork in the
//! middle of them would leave it locked there for ever.

use crate::region::no_forking;
use std::io;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

/// Starts a thread, which has begun when this returns; its last region ends with it. `last` is dropped as its last act before.
///
/// # Errors
/// Those of starting a thread: EAGAIN.
pub(crate) fn start<L: Send + 'static>(
    name: &str,
    last: L,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let _region = no_forking();
    let (begins, begun) = channel::<()>();
    let body = move || {
        drop(begins);
        let _end = End(last);
        body();
    };
    let thread = thread::Builder::new().name(name.to_owned()).spawn(body)?;
    // Ends by the drop.
    let _ = begun.recv();
    Ok(thread)
}

/// Also where the body unwinds.
struct End<L>(#[allow(dead_code)] L);

impl<L> Drop for End<L> {
    fn drop(&mut self) {
        // A forgotten guard is a region until the thread is gone (G7).
        #[allow(clippy::mem_forget)]
        std::mem::forget(no_forking());
    }
}
