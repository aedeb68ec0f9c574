//! Writers with a thread behind them, one for each process.

use crate::{RwLock, fork_generation};
use std::fmt;
use std::io::Write;
use std::sync::Arc;
use tracing_subscriber::fmt::MakeWriter;

/// Lets each process make its own writer: for tracing-appender's `non_blocking`, whose thread a child does not have.
///
/// `make` gives the writer and the guard that keeps it going. It is called at the first event of each process, so it opens
/// what a child shall write to. The parent's pair is neither used nor dropped in a child: its guard would wait for a thread that is not
/// there, and its queue is the parent's to write.
///
/// ```
/// let events = carefork::tracing::per_process(|| tracing_appender::non_blocking(std::io::stderr()));
/// tracing_subscriber::fmt().with_writer(events.clone()).init();
/// tracing::info!("written by this process's thread");
/// // Before the process ends, in a child too:
/// events.finish();
/// ```
///
/// `make` runs inside a region and must not log.
pub fn per_process<W, G>(make: impl Fn() -> (W, G) + Send + Sync + 'static) -> PerProcess<W, G> {
    PerProcess(Arc::new(Shared { make: Box::new(make), made: RwLock::new(None) }))
}

/// See [`per_process`]. Clones are the same.
pub struct PerProcess<W, G>(Arc<Shared<W, G>>);

struct Shared<W, G> {
    make: Box<dyn Fn() -> (W, G) + Send + Sync>,
    made: RwLock<Option<Made<W, G>>>,
}

struct Made<W, G> {
    generation: u64,
    writer: W,
    guard: G,
}

impl<W, G> PerProcess<W, G> {
    /// Drops this process's writer and guard, which with tracing-appender writes what is queued (its guard waits for that no longer
    /// than a second). A later event makes new ones.
    ///
    /// In a child that has made none it does nothing.
    pub fn finish(&self) {
        let made = self.0.made.write().take();
        // Outside the lock: the guard waits for its thread.
        if let Some(made) = made {
            end(made);
        }
    }
}

fn end<W, G>(made: Made<W, G>) {
    if made.generation == fork_generation() {
        // First the guard, which tells the thread to write what there is.
        drop(made.guard);
        drop(made.writer);
    } else {
        #[allow(clippy::mem_forget)]
        std::mem::forget(made);
    }
}

impl<W: Clone, G> PerProcess<W, G> {
    fn writer(&self) -> W {
        let now = fork_generation();
        if let Some(made) = &*self.0.made.read()
            && made.generation == now
        {
            return made.writer.clone();
        }
        let mut place = self.0.made.write();
        if let Some(made) = &*place
            && made.generation == now
        {
            return made.writer.clone();
        }
        let (writer, guard) = (self.0.make)();
        let old = place.replace(Made { generation: now, writer: writer.clone(), guard });
        #[allow(clippy::mem_forget)]
        std::mem::forget(old);
        writer
    }
}

impl<'a, W: Write + Clone + 'a, G: 'a> MakeWriter<'a> for PerProcess<W, G> {
    type Writer = W;

    fn make_writer(&'a self) -> Self::Writer {
        self.writer()
    }
}

impl<W, G> Clone for PerProcess<W, G> {
    fn clone(&self) -> Self {
        PerProcess(Arc::clone(&self.0))
    }
}

impl<W, G> fmt::Debug for PerProcess<W, G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerProcess").finish_non_exhaustive()
    }
}

impl<W, G> Drop for Shared<W, G> {
    fn drop(&mut self) {
        if let Some(made) = self.made.get_mut().take() {
            end(made);
        }
    }
}
