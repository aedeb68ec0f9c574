//! A logger that every fork leaves whole on both sides, and guards for the loggers people already have (B1-B3).
//!
//! ```
//! use carefork::log::{self, Builder};
//! Builder::new().filters("info,net=debug")?.init()?;
//! ::log::info!("ready");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! One record is one line, written once:
//!
//! ```text
//! 2026-11-21T07:03:12.345678+01:00 WARN  [main] net::http: no answer from 10.0.0.7
//! 2026-11-21T07:03:12.345901+01:00 INFO  [pid 4711 main] worker: begins
//! ```
//!
//! Control characters in a message are escaped (`\n`, `\u{1b}`), so no message can end its line. The second line is from a child. In a
//! destructor of pthread_key_create(3) a thread has its number for a name (`tid 4712`), and writes itself, before what is queued.
//!
//! # Who may write where
//!
//! Each process writes its own records and nobody else's. Which process a record belongs to is told by
//! [`fork_generation`](crate::fork_generation), not by what a fork's handlers did, so it holds for every kind of fork, `_Fork` included, and
//! a fork costs nothing for the log: there is no lock to take and no hook to run.
//!
//! | | its records go | what is queued | background thread | levels, filters, time zone |
//! |---|---|---|---|---|
//! | the process that built the logger | to the output | is its to write, across any number of forks | its own; nothing stops for a fork | as built |
//! | child, before its clean-up (or before it execs) | to fd 2, at once, marked with its pid | starts empty; the parent's is never touched, nor freed | none | as in the parent |
//! | noexec child, after its clean-up | the same; the parent's log file is closed | the same | none | the same |
//! | child that called [`set_output`] | there, marked with its pid | its own | started by its first record | the same |
//! | grandchild, of any of them | to fd 2 again, marked with its own pid | starts empty | none | the same |
//!
//! This is libvirt's rule (`virLogReset` in virFork's child), but for the mark. A child that shall keep to a file calls [`set_output`]
//! with one of its own; two processes may append to one file or pipe, since each line is one write(2).
//!
//! # What is held over a write
//! Nothing that a fork waits for, where the output is a descriptor: a record is formatted into a buffer of its thread and goes out by one
//! write(2). Files (opened with `O_APPEND`) and pipes (up to [`PIPE_BUF`](libc::PIPE_BUF), 4096 bytes) keep that whole, whoever else writes there.
//! A socket or a terminal may take a part of it: there the threads of a process write one after the other, each until its line is out, but two
//! processes, or the threads of one whose output is fd 2, may cut each other's lines (a TCP connection, a non-blocking terminal that is full). So a
//! full pipe stops the thread that logs, unless [`WhenFull`] says otherwise, and never a fork, unless that thread is inside a region of its
//! program's. (A region of an instant is the first record of a thread after [`set_output`]: it looks up the output.) A line that is longer than
//! `PIPE_BUF` goes to anything but a file in several lines, each with the same head, all but the last ending in a backslash.
//!
//! An [`Output::writer`] is a stranger's code: it is called inside a region, and forks wait for it as for any region.
//!
//! What a disk or a closed pipe does not take is counted, and told in a line of its own when the output takes something again;
//! [`Logger::lost`] has the number.
//!
//! # The background writer
//! [`Builder::background`] puts records into a queue that a thread of the logger's writes out, many lines to a write(2). What happens when
//! the queue is full is [`WhenFull`]. [`flush`] (or `log::logger().flush()`) returns when everything logged before it was written.
//! The end of the process by exit(3) or the return of `main` does the same for the logger that [`Builder::init`] installed, and so does the
//! end of a child of [`spawn`](crate::spawn()); with no background writer too, where an [`Output::writer`] may
//! have a buffer, or losses are not told yet. They wait for as long
//! as it takes, unless the program chose to lose records: under [`WhenFull::Drop`] and [`WhenFull::GrowTo`] they give up when the background
//! writer has got rid of nothing for a second, and so does the drop of the last handle of a logger that was not installed, whose thread goes on
//! writing, though. A record that is logged later yet, by another atexit handler, is waited for by itself. A process that is killed or calls
//! `_exit` loses what was queued; nothing is ever written twice.
//!
//! # Loggers that are there already
//! [`Guarded`] makes each record of any [`Log`](::log::Log) a region; for tracing-subscriber's formatting layer there is the module
//! `carefork::tracing` (feature `tracing`).
//!
//! # Limits
//! - A child of a fork that went ahead dirty, or of `_Fork`, may find the logger's own state held by a thread that is gone: then it writes to fd 2 as
//!   above, and [`set_output`] panics.
//! - A record whose arguments fork while they are formatted (a `Display` that forks) is the parent's. An event of tracing's is both's:
//!   tracing-subscriber's `fmt` asks for the writer when it has formatted, so the child, too, writes it, marked.
//! - Not for signal handlers: formatting allocates.
//! - The structured fields of `log`'s feature `kv` are not written.

mod builder;
mod guarded;
mod line;
mod logger;
mod output;
mod queue;

pub use builder::{AlreadySet, BadFilter, Builder, WhenFull};
pub use guarded::Guarded;
pub use logger::{Logger, NoLogger, flush, set_output};
pub use output::Output;

#[cfg(feature = "tracing")]
pub use logger::RecordWriter;
