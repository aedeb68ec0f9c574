//! tracing-subscriber, safe in every child (B1, B2).
//!
//! | you have | you write |
//! |---|---|
//! | spans | [`Guarded::new`]`(subscriber)`, whatever it writes to: a region round each call |
//! | a new program | `fmt().with_writer(logger)` with a [`log::Logger`](crate::log::Logger): its outputs, its background writer, its rules for children |
//! | `fmt()` to stdout, stderr, a `Mutex<File>` | [`guarded`]`(io::stderr)`: a region round each event |
//! | tracing-appender's `non_blocking` | [`per_process`]: each process makes its own |
//!
//! ```
//! use carefork::log::{Builder, Output};
//! let logger = Builder::new().output(Output::stderr()).background(1000).build();
//! tracing_subscriber::fmt().with_writer(logger.clone()).init();
//! tracing::info!(answer = 42, "ready");
//! logger.flush();
//! ```
//!
//! The registry behind spans has locks of its own, which a child may find held: one in each span (`Span::record` in one thread, an event
//! inside the same span in another), and those of its numbers for threads; filters by span have theirs. So a program with spans guards its
//! subscriber. Levels take no lock. tracing-core has one, taken where a subscriber is being installed: do that before the first
//! fork, or inside a region.

mod guarded;
mod per_process;
mod subscriber;
mod thread_end;

pub use guarded::{Guarded, GuardedWriter, guarded};
pub use per_process::{PerProcess, per_process};
