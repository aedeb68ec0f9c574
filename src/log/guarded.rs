//! Other people's loggers, made safe by a region round each record (B2).

use super::builder::AlreadySet;
use crate::no_forking;
use ::log::{LevelFilter, Log, Metadata, Record};

/// Any logger, with a region round each call: whatever lock it takes is free at every fork, and no record is half written.
///
/// ```
/// use carefork::log::Guarded;
/// let logger = env_logger::Builder::from_default_env().build();
/// let level = logger.filter();
/// Guarded::new(logger).init(level)?;
/// ::log::error!("no child will hang on this");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// The logger formats inside the region: forks wait for that as for any region, and a message whose `Display` forks gets
/// [`ForkError::Forbidden`](crate::ForkError::Forbidden). A logger that is stuck, writing into a full pipe, makes a coordinated fork fail with
/// [`ForkError::Busy`](crate::ForkError::Busy) after its budget, and a foreign one dirty.
///
/// In a child the logger goes on writing to where the parent's does, without a mark. A buffer that it keeps is copied to the child, which
/// would write it a second time: give it a writer that has none across records, or flush before forking. A logger that writes a record
/// in pieces (simplelog does) mixes them with those of other processes: put a [`LineWriter`](std::io::LineWriter) in front of the
/// file. A logger with a thread needs more than this.
#[derive(Debug, Default)]
pub struct Guarded<L>(L);

impl<L: Log> Guarded<L> {
    /// Guards `logger`.
    pub const fn new(logger: L) -> Self {
        Guarded(logger)
    }

    /// The logger itself, out of its guard.
    pub fn into_inner(self) -> L {
        self.0
    }
}

impl<L: Log + 'static> Guarded<L> {
    /// Installs it as `log`'s logger, with this level.
    ///
    /// # Errors
    /// [`AlreadySet`] if the program has a logger.
    pub fn init(self, max_level: LevelFilter) -> Result<(), AlreadySet> {
        ::log::set_boxed_logger(Box::new(self)).map_err(|_| AlreadySet { private: () })?;
        ::log::set_max_level(max_level);
        Ok(())
    }
}

impl<L: Log> Log for Guarded<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let _region = no_forking();
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let _region = no_forking();
        self.0.log(record);
    }

    fn flush(&self) {
        let _region = no_forking();
        self.0.flush();
    }
}
