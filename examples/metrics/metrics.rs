//! The counters of a program, written to a file every so often by a thread of their own: in each process that counts, from 0 and
//! to a file of its own.

use carefork::{OnChild, SendError, Service, ServiceError};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs, io, process};

/// What a program counts with; share it by reference.
#[derive(Debug)]
pub(crate) struct Metrics {
    service: Service<Event>,
}

/// So many of them.
type Event = (&'static str, u64);

impl Metrics {
    /// Counts into `metrics.PID` in `dir`, which is brought up to date every `interval`.
    pub(crate) fn start(dir: &Path, interval: Duration) -> io::Result<Self> {
        let dir = dir.to_owned();
        let service = Service::builder("metrics", move || Counters::new(&dir))
            // What the parent has counted is the parent's to write.
            .on_child(OnChild::Restart)
            .every(interval, Counters::write_if_changed)
            .start(Counters::count)?;
        Ok(Metrics { service })
    }

    /// Counts one event. Where there is no room it is lost: a program does not wait for its metrics.
    pub(crate) fn count(&self, event: &'static str) {
        match self.service.try_send((event, 1)) {
            Ok(()) | Err(SendError { error: ServiceError::Full { .. }, .. }) => {}
            Err(e) => eprintln!("{e}"),
        }
    }

    /// Returns when all that was counted here is in the file. A child that ends by `_exit` (`carefork::spawn`) needs it.
    pub(crate) fn flush(&self) -> Result<(), ServiceError> {
        self.service.flush()
    }
}

struct Counters {
    file: PathBuf,
    counts: BTreeMap<&'static str, u64>,
    changed: bool,
}

impl Counters {
    fn new(dir: &Path) -> Self {
        Counters { file: file_of(dir, process::id()), counts: BTreeMap::new(), changed: false }
    }

    fn count(&mut self, (event, n): Event) {
        *self.counts.entry(event).or_default() += n;
        self.changed = true;
    }

    fn write_if_changed(&mut self) {
        if std::mem::take(&mut self.changed)
            && let Err(e) = self.write()
        {
            eprintln!("{}: {e}", self.file.display());
            self.changed = true;
        }
    }

    /// By a rename, so that no reader finds half of it.
    fn write(&self) -> io::Result<()> {
        let new = self.file.with_extension(format!("{}.new", process::id()));
        fs::write(&new, self.to_string())?;
        fs::rename(&new, &self.file)
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.counts.iter().try_for_each(|(event, n)| writeln!(f, "{event} {n}"))
    }
}

/// Where the process `pid` writes.
pub(crate) fn file_of(dir: &Path, pid: u32) -> PathBuf {
    dir.join(format!("metrics.{pid}"))
}
