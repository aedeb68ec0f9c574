//! A region round each event's write.

use crate::{NoForking, no_forking};
use std::io::{self, IoSlice, Write};
use tracing_core::Metadata;
use tracing_subscriber::fmt::MakeWriter;

/// Guards a writer of `fmt`'s: what it locks is free at every fork, and no event is half written. For programs with spans
/// guard the subscriber: [`Guarded::new`].
///
/// ```
/// let file = std::sync::Mutex::new(std::fs::File::create("/dev/null")?);
/// tracing_subscriber::fmt().with_writer(carefork::tracing::guarded(file)).init();
/// tracing::info!("no child will hang on this");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// Forks wait while an event is written, so they wait for a writer that is stuck, up to their budget. In a child it writes where
/// the parent does. A writer that buffers across events gives the child a copy of the buffer; std's stdout does not, since
/// events end with a newline.
pub const fn guarded<M>(writer: M) -> Guarded<M> {
    Guarded(writer)
}

/// A subscriber with a region round each call, or a writer with one round each event (see [`guarded`]).
///
/// ```
/// use carefork::tracing::Guarded;
/// let file = std::sync::Mutex::new(std::fs::File::create("/dev/null")?);
/// let subscriber = tracing_subscriber::fmt().with_writer(file).finish();
/// tracing::subscriber::set_global_default(Guarded::new(subscriber))?;
/// let span = tracing::info_span!("request", status = tracing::field::Empty);
/// span.record("status", 200);
/// // SAFETY: the child uses no descriptor of the parent's but the file, which it shares.
/// let mut child = unsafe { carefork::spawn(move || {
///     // Whatever other threads were doing with this span.
///     span.in_scope(|| tracing::info!("from a child"));
///     0
/// }) }?;
/// assert!(child.wait()?.success());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Guard the whole subscriber, layers and filters included: a layer on top of this is outside. The locks of the registry, its layers and
/// their writers are free at every fork then, also those that the registry takes where a thread ends that used spans. The writer needs
/// no guard of its own; one more does no harm.
///
/// It is a region like any other. Values are formatted inside it, and one whose `Debug` forks gets
/// [`ForkError::Forbidden`](crate::ForkError::Forbidden). A writer that is stuck makes a coordinated fork fail with
/// [`ForkError::Busy`](crate::ForkError::Busy) after its budget, and a foreign one dirty; that holds for a
/// [`log::Logger`](crate::log::Logger) too, which by itself stops no fork.
///
/// Outside remains what does not come through the subscriber, and wants a region round it in the parent:
/// - installing a subscriber, `set_default` included, and changing one by a `reload::Handle` where there are other threads;
/// - what is got at by `downcast_ref` (tracing-error's `SpanTrace`, tracing-opentelemetry's `OpenTelemetrySpanExt`);
/// - locks that another layer takes in a thread-local destructor.
#[derive(Clone, Debug, Default)]
pub struct Guarded<T>(pub(super) T);

impl<T> Guarded<T> {
    /// Guards `subscriber`.
    pub const fn new(subscriber: T) -> Self {
        Guarded(subscriber)
    }

    /// What is guarded, out of its guard.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for Guarded<M> {
    type Writer = GuardedWriter<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        let region = no_forking();
        GuardedWriter { writer: self.0.make_writer(), _region: region }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        let region = no_forking();
        GuardedWriter { writer: self.0.make_writer_for(meta), _region: region }
    }
}

/// A writer and the region that it is used in.
#[derive(Debug)]
pub struct GuardedWriter<W> {
    // Dropped in this order: the region outlives what the writer holds.
    writer: W,
    _region: NoForking,
}

impl<W: Write> Write for GuardedWriter<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.writer.write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.writer.write_vectored(bufs)
    }

    fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        self.writer.write_all(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}
