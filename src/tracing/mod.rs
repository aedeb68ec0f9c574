//! tracing-subscriber's formatting layer, safe in every child (B1, B2).
//!
//! | you have | you write |
//! |---|---|
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
//! Spans, levels and filters need nothing: they take no lock that a child could find held but one of tracing-core's, where a
//! subscriber is being installed: do that before the first fork, or inside a region.

mod guarded;
mod per_process;

pub use guarded::{Guarded, GuardedWriter, guarded};
pub use per_process::{PerProcess, per_process};
