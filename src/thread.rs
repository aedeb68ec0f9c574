//! Threads that begin and end inside regions, so that no fork comes in the middle of that.
//!
//! std takes a lock in a thread's first and last steps (its table of stack guards) that later threads of a child need: a fork in the
//! middle of them leaves it locked there for ever, and the first thread that the child starts hangs. Of 6000 forks beside three threads that start
//! and join others by std, whose children start threads, 1 to 3 children hung; a region round `std::thread::spawn` does not help, because the
//! new thread's first steps, and its last, come later. With these threads: none.
//!
//! carefork's own ([`Service`](crate::Service), loggers, reapers) are of this kind. Threads that other libraries start while others fork are
//! not: have them started (a pool's first use) before the first fork, or keep children from starting threads.

use crate::gate::{ANYBODY, ENDING};
use crate::region::{awaited, no_forking};
use std::io;
use std::sync::mpsc::channel;
pub use std::thread::JoinHandle;
use std::thread::{self, Scope, ScopedJoinHandle};

/// Starts a thread, as [`std::thread::spawn`] does; it has begun when this returns, and no fork comes before. To be joined outside of hooks: a
/// thread that ends waits for the fork under way. Joined in a region, its end does not; regions that it begins before do ([`no_forking`]).
///
/// # Panics
/// If the thread cannot be started: [`Builder`] says why.
///
/// ```
/// let sum = carefork::thread::spawn(|| (1..=4).sum::<u32>());
/// assert_eq!(sum.join().unwrap(), 10);
/// ```
#[track_caller]
pub fn spawn<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    match Builder::new().spawn(f) {
        Ok(thread) => thread,
        Err(e) => panic!("carefork::thread::spawn: {e}; thread::Builder gives the error back"),
    }
}

/// As [`std::thread::Builder`]: a name and a stack size first.
///
/// ```
/// let mut lines = vec!["b", "a"];
/// std::thread::scope(|s| {
///     let sorter = carefork::thread::Builder::new().name("sorter".into()).spawn_scoped(s, || lines.sort());
///     sorter.map(|thread| thread.join().unwrap())
/// })?;
/// assert_eq!(lines, ["a", "b"]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "it starts nothing before spawn"]
pub struct Builder(thread::Builder);

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// Without a name, and with std's stack.
    pub fn new() -> Self {
        Builder(thread::Builder::new())
    }

    /// For panics, debuggers and ps, which shows 15 bytes of it. See [`std::thread::Builder::name`].
    pub fn name(self, name: String) -> Self {
        Builder(self.0.name(name))
    }

    /// Bytes of stack. See [`std::thread::Builder::stack_size`].
    pub fn stack_size(self, size: usize) -> Self {
        Builder(self.0.stack_size(size))
    }

    /// Starts the thread; see [`spawn`].
    ///
    /// # Errors
    /// EAGAIN, where there may be no more threads; ENOMEM.
    pub fn spawn<T: Send + 'static>(self, f: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
        begun(f, ANYBODY, (), |f| self.0.spawn(f))
    }

    /// Starts the thread in a scope of std's, for as long as that lasts.
    ///
    /// # Errors
    /// As for [`Builder::spawn`].
    pub fn spawn_scoped<'scope, T: Send + 'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        f: impl FnOnce() -> T + Send + 'scope,
    ) -> io::Result<ScopedJoinHandle<'scope, T>> {
        begun(f, ANYBODY, (), |f| self.0.spawn_scoped(scope, f))
    }
}

/// One of carefork's own, for which others may wait (`rank`). `last` is dropped as its last act, inside the region that ends with the thread.
///
/// # Errors
/// As for `Builder::spawn`.
pub(crate) fn start<L: Send + 'static>(
    name: &str,
    rank: u8,
    last: L,
    f: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    begun(f, rank, last, |f| thread::Builder::new().name(name.to_owned()).spawn(f))
}

/// `start` starts a thread with what it is given.
fn begun<'a, T, L: Send + 'a, J>(
    f: impl FnOnce() -> T + Send + 'a,
    rank: u8,
    last: L,
    start: impl FnOnce(Box<dyn FnOnce() -> T + Send + 'a>) -> io::Result<J>,
) -> io::Result<J> {
    let _region = no_forking();
    let (begins, begun) = channel::<()>();
    let thread = start(Box::new(move || {
        if rank != ANYBODY {
            awaited(rank);
        }
        drop(begins);
        let _end = End(last);
        f()
    }))?;
    // Ends by the drop.
    let _ = begun.recv();
    Ok(thread)
}

/// Also where the body unwinds.
struct End<L>(#[allow(dead_code)] L);

impl<L> Drop for End<L> {
    fn drop(&mut self) {
        // Others may join it in regions of theirs.
        awaited(ENDING);
        // A forgotten guard is a region until the thread is gone (G7).
        #[allow(clippy::mem_forget)]
        std::mem::forget(no_forking());
    }
}
