//! How a logger is made.

use super::line::Style;
use super::logger::{self, Logger};
use super::output::Output;
use ::log::LevelFilter;
use std::fmt;

/// What a logger does with a record for which there is no room: in the queue of the background writer, or, where the thread that logs writes
/// itself, in a pipe, a terminal or a socket.
///
/// The thread that logs writes itself without [`Builder::background`], and in a child on fd 2. Then there is no room where poll(2) says that a
/// write would wait. (On a kernel before 6.4, and on a terminal, one may wait yet where several threads take the last room at once.) A file
/// has room, or fails. An [`Output::writer`] is a stranger's code, which nothing here keeps from waiting: behind a queue it is the background
/// thread that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenFull {
    /// The thread that logs waits, outside of any region of carefork's. So does the end of the process, until what is queued is written.
    #[default]
    Block,
    /// The record is dropped and counted ([`Logger::lost`]); a line of the log tells how many, as soon as there is room. So is one that goes
    /// out in several lines where there is room for the first of them only, which stands there then, with its backslash. The end of the
    /// process waits for what is queued only while the output goes on taking some of it: once it has taken nothing for a second, the rest is
    /// lost and counted, but for what the thread was writing.
    Drop,
    /// The queue grows to this many records, at least one (a thread more, where several find the last place), and takes memory for as many as
    /// there are; then as [`WhenFull::Drop`]. The capacity that [`Builder::background`] was given says nothing then. Where there is no
    /// queue, as [`WhenFull::Drop`].
    GrowTo(usize),
}

/// Makes a [`Logger`].
///
/// ```
/// use carefork::log::{Builder, Output, WhenFull};
/// # let path = std::env::temp_dir().join(format!("carefork-builder-{}.log", std::process::id()));
/// let logger = Builder::new()
///     .filters("info,net::http=trace")?
///     .output(Output::file(&path)?)
///     .background(4096)
///     .when_full(WhenFull::Drop)
///     .init()?;
/// ::log::info!("ready");
/// logger.flush();
/// # assert!(std::fs::read_to_string(&path)?.contains("ready"));
/// # std::fs::remove_file(path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "a logger is made by build or init"]
pub struct Builder {
    filter: env_filter::Builder,
    output: Output,
    capacity: Option<usize>,
    when_full: WhenFull,
    utc: bool,
}

impl Builder {
    /// Level info for every target, to fd 2, written by the thread that logs, in the local time zone.
    pub fn new() -> Builder {
        let mut filter = env_filter::Builder::new();
        filter.filter_level(LevelFilter::Info);
        Builder { filter, output: Output::stderr(), capacity: None, when_full: WhenFull::Block, utc: false }
    }

    /// Levels as env_logger's `RUST_LOG` has them: `info`, `warn,net=debug`, `off,net::http=trace`. What is not mentioned stays as it is.
    ///
    /// # Errors
    /// [`BadFilter`], which says what is wrong.
    pub fn filters(mut self, filters: &str) -> Result<Builder, BadFilter> {
        self.filter.try_parse(filters).map_err(|e| BadFilter(e.to_string()))?;
        Ok(self)
    }

    /// The level of all targets that have none of their own.
    pub fn level(mut self, level: LevelFilter) -> Builder {
        self.filter.filter_level(level);
        self
    }

    /// The level of one target and those below it (`net` is also `net::http`).
    pub fn target_level(mut self, target: &str, level: LevelFilter) -> Builder {
        self.filter.filter_module(target, level);
        self
    }

    /// Where it writes.
    pub fn output(mut self, output: Output) -> Builder {
        self.output = output;
        self
    }

    /// Lets a thread write, with a queue of `capacity` records, at least one, in front of it ([`WhenFull::GrowTo`] has a bound of its own). The
    /// thread starts with the first record.
    pub fn background(mut self, capacity: usize) -> Builder {
        self.capacity = Some(capacity);
        self
    }

    /// What to do when the background writer's queue is full, or without one the pipe: at first [`WhenFull::Block`].
    pub fn when_full(mut self, policy: WhenFull) -> Builder {
        self.when_full = policy;
        self
    }

    /// Time stamps in UTC instead of the local zone. The local zone is read once, here: from `TZ`, or the system's.
    pub fn utc(mut self, utc: bool) -> Builder {
        self.utc = utc;
        self
    }

    /// The logger, not installed.
    pub fn build(mut self) -> Logger {
        let style = if self.utc { Style::utc() } else { Style::local() };
        Logger::new(self.filter.build(), style, self.output, self.capacity, self.when_full)
    }

    /// Makes the logger and installs it as `log`'s, with its level. What is queued, or in a writer's buffer, when the process ends in order is
    /// written; what was lost and not told yet is told, if there is room.
    ///
    /// # Errors
    /// [`AlreadySet`] if the program has a logger.
    pub fn init(self) -> Result<Logger, AlreadySet> {
        let logger = self.build();
        ::log::set_boxed_logger(Box::new(logger.clone())).map_err(|_| AlreadySet { private: () })?;
        ::log::set_max_level(logger.max_level());
        logger::installed(&logger);
        Ok(logger)
    }
}

impl Default for Builder {
    fn default() -> Self {
        Builder::new()
    }
}

/// A filter that means nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadFilter(String);

impl fmt::Display for BadFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; filters are written like info,net=debug", self.0)
    }
}

impl std::error::Error for BadFilter {}

/// The program has a logger already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlreadySet {
    pub(super) private: (),
}

impl fmt::Display for AlreadySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the log facade has a logger already; it can be set once in a process")
    }
}

impl std::error::Error for AlreadySet {}
