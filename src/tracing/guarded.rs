//! A region round each event's write.

use crate::{NoForking, no_forking};
use std::io::{self, IoSlice, Write};
use tracing_core::Metadata;
use tracing_subscriber::fmt::MakeWriter;

/// Guards a writer of `fmt`'s: what it locks is free at every fork, and no event is half written.
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

/// See [`guarded`].
#[derive(Clone, Debug, Default)]
pub struct Guarded<M>(M);

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
