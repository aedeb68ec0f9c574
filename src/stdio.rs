//! Rust's standard output and error, and the panic message, safe in every child (L6).
//!
//! ```
//! let registration = carefork::stdio::guard();
//! // For the life of the process:
//! std::mem::forget(registration);
//! ```
//!
//! std keeps a lock round each of the two streams and a buffer in front of the first. A child forked while another thread
//! prints finds the lock held for ever (78 % of children that `println!` hung, 89 % that `eprintln!`), and a half-full buffer
//! is written by parent and child both. [`guard`] holds the locks over the fork and empties the buffer before it.
//!
//! # Limits
//! - **Of carefork's own hooks this is the one that waits without a budget**: std's locks can neither be tried nor waited for with an end. A
//!   thread that is stuck while it prints, into a pipe that nobody reads, holds up a fork for as long as it is stuck, past
//!   its budget too. Regions go on meanwhile. The fork cannot say so itself: [`waiting`] tells any other thread. Forks that queue
//!   behind it end at their budgets and name it, coordinated ones in [`Culprits::waiting`], foreign ones, which go ahead
//!   dirty, on fd 2 (such a child must not print to that stream); nobody says anything before. A program that cannot have that does not call [`guard`], and prints nothing
//!   in its children.
//! - Lock order is standard output, then standard error. A thread that holds `stderr().lock()` and then prints to standard
//!   output can deadlock with a fork; [`waiting`] shows that too.
//! - Standard input is never taken: a reader sleeps in it. A child must not read it while another thread may have been reading.
//! - Only what poll(2) says can be written at once is flushed. What cannot is the parent's to write: a child's copy of
//!   it is thrown away, and the child says so on fd 2.
//! - A fork in a signal handler that interrupts its own thread's printing finds the stream borrowed, which is a panic in
//!   prepare: a veto (H3).
//! - C's stdio has buffers of its own, which this does not see.
//! - While a panic hook runs, its thread is in a region: it must not fork, and one stuck writing its message keeps forks waiting.
//!   A hook that is set later by `std::panic::set_hook` takes the place of carefork's and runs in children, too; `set_hook` itself is not covered.

#![allow(unsafe_code)]

#[cfg(doc)]
use crate::Culprits;
use crate::error::Text;
use crate::hook::{self, Call, Hook};
use crate::registration::{self, Registration};
use crate::{clock, print_wait, region, runtime, sys};
use std::io::{self, StdoutLock, Write};
use std::panic::{self, PanicHookInfo};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

pub use crate::print_wait::{Stream, Waiting};

/// Makes `println!`, `eprintln!` and `panic!` safe in every child, until the registration is dropped; no line of theirs is
/// lost at a fork, and none comes twice.
///
/// Prepares last of all hooks (rank `i32::MAX`), so other hooks may print. Also wraps the panic hook of this moment in a
/// region, once for the process: no thread can be forked away in the middle of its panic message or its backtrace.
/// See the [module](self) for what it costs. Calling it twice is harmless.
///
/// ```
/// let registration = carefork::stdio::guard();
/// print!("half a line");
/// // SAFETY: the child exits at once.
/// match unsafe { carefork::fork() }? {
///     carefork::Fork::Child(child) => {
///         println!("from the child");
///         child.exit(0)
///     }
///     carefork::Fork::Parent(mut child) => assert!(child.wait()?.success()),
/// }
/// drop(registration);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn guard() -> Registration {
    {
        // std makes both on first use: not for the prepare handler, and not for another thread's fork to cut in two.
        let _region = region::no_forking();
        drop(io::stdout().lock());
        drop(io::stderr().lock());
    }
    panics_by_write();
    registration::register(
        Hook::new(print_wait::HOOK)
            .rank(i32::MAX)
            .prepare(|| runtime::streams().take(runtime::me().tid.load(Relaxed), clock::now))
            .parent(|| runtime::streams().release())
            .child_by(ReleaseInChild),
    )
}

/// The fork that waits for a stream at this moment, if one does; most are there for an instant only. One that stays means
/// that a thread is stuck printing (see the [limits](self#limits)).
///
/// For a watchdog, or whoever else wants to know why forks do not come. Async-signal-safe; costs a load and a look at the
/// clock.
///
/// ```
/// use std::time::Duration;
/// if let Some(stuck) = carefork::stdio::waiting().filter(|w| w.waited > Duration::from_secs(10)) {
///     log::warn!("{stuck}");
/// }
/// ```
pub fn waiting() -> Option<Waiting> {
    // A child's copy may tell of a thread that it does not have.
    runtime::generation();
    runtime::streams().wait.look(clock::now())
}

struct ReleaseInChild;

impl Call for ReleaseInChild {
    // With the rest of what every child runs: no page of code of its own.
    #[unsafe(link_section = ".text_carefork")]
    fn call(&self) {
        runtime::streams().release_in_child(throw_away);
        runtime::streams_are_free();
    }
}

/// Apart, for its buffers.
#[cold]
#[inline(never)]
fn throw_away(out: &mut StdoutLock<'static>) {
    let thrown = sys::divert(libc::STDOUT_FILENO, || drop(out.flush()));
    say_unflushed(thrown.ok());
}

fn say_unflushed(thrown: Option<usize>) {
    let mut line = Text::new();
    line.push(b"carefork: standard output could not be flushed before a fork: ");
    match thrown {
        // Nothing was in the buffer.
        Some(0) => return,
        Some(n) => {
            line.number(u32::try_from(n).unwrap_or(u32::MAX));
            line.push(b" bytes are left to the parent to write, and dropped in child ");
        }
        None => line.push(b"for want of descriptors what it holds may be written twice, also by child "),
    }
    line.number(sys::getpid());
    line.push(b"\n");
    say(&line);
}

fn say(line: &Text) {
    if !sys::say(line.as_bytes()) {
        runtime::count().unreported.fetch_add(1, Relaxed);
    }
}

/// In a child: the locks of standard output and error are known to be free, because the guard took part in the fork.
pub(crate) fn is_guarded() -> bool {
    let generation = runtime::generation();
    generation != 0 && runtime::streams_free_in() == generation
}

static SPAWNED: AtomicBool = AtomicBool::new(false);

/// This process is a child of `spawn`: its panics are told by one write(2), without std's locks.
pub(crate) fn in_spawned_child() {
    SPAWNED.store(true, Relaxed);
}

/// Wraps the panic hook, once for the process: in a spawned child the message is one write(2); elsewhere the hook from
/// before runs in a region. Not from a panicking thread, which may not change the hook: there it does nothing.
pub(crate) fn panics_by_write() {
    static WRAPPED: Once = Once::new();
    if WRAPPED.is_completed() || std::thread::panicking() {
        return;
    }
    // No other thread may fork between the two steps: the child would wait for this `Once`, or for std's own lock, for ever.
    let _region = region::no_forking();
    WRAPPED.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if SPAWNED.load(Relaxed) {
                tell(info);
            } else {
                // std's backtrace lock, the locks of the streams, and whatever else the hook takes: free at every fork.
                let _region = region::no_forking();
                previous(info);
            }
        }));
    });
}

fn tell(info: &PanicHookInfo<'_>) {
    let mut line = Text::new();
    line.push(b"carefork: child ");
    line.number(sys::getpid());
    line.push(b" panicked at ");
    if let Some(at) = info.location() {
        line.push(at.file().as_bytes());
        line.push(b":");
        line.number(at.line());
        line.push(b": ");
    }
    line.push(hook::message(info.payload()).as_bytes());
    line.push(b"\n");
    say(&line);
}
