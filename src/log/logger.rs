//! The logger: which process a record belongs to, and where that process writes.

use super::builder::WhenFull;
use super::line::{self, Style};
use super::output::{self, Output, Sink};
use super::queue::{self, Losses, Queue, Worker};
use crate::{OnceLock, RwLock, fork_generation};
use std::cell::RefCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Weak};

/// A logger for the `log` facade, made by a [`Builder`](super::Builder). Clones are the same logger.
///
/// See the [module](super) for who writes where, and what a fork does to it: nothing.
///
/// ```
/// use carefork::log::{Builder, Output};
/// use ::log::Log;
/// let lines = std::sync::Arc::new(std::sync::Mutex::new(Vec::<u8>::new()));
/// # struct Shared(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);
/// # impl std::io::Write for Shared {
/// #     fn write(&mut self, b: &[u8]) -> std::io::Result<usize> { self.0.lock().unwrap().write(b) }
/// #     fn flush(&mut self) -> std::io::Result<()> { Ok(()) }
/// # }
/// let logger = Builder::new().output(Output::writer(Shared(lines.clone()))).build();
/// logger.log(&log::Record::builder().args(format_args!("ready")).build());
/// assert!(lines.lock().unwrap().ends_with(b": ready\n"));
/// ```
#[derive(Clone)]
pub struct Logger {
    inner: Arc<Inner>,
}

struct Inner {
    filter: env_filter::Filter,
    style: Arc<Style>,
    /// The generation of the process that built it, whose lines carry no mark.
    home: u64,
    /// The background writer's, if there is to be one.
    capacity: Option<usize>,
    when_full: WhenFull,
    /// The generation that `here` belongs to.
    generation: AtomicU64,
    here: RwLock<Arc<Here>>,
    /// Counts the changes of `here`, under its lock. Release pairs with the Acquire in `Inner::here`.
    version: AtomicU64,
}

/// Where a thread's last record went. With it the next one needs no lock, and so no region: no fork waits for a thread that logs.
struct Seen {
    logger: u32,
    version: u64,
    /// Weak, so that an idle thread does not keep an old file open.
    here: Weak<Here>,
}

thread_local! {
    static SEEN: RefCell<Seen> = const { RefCell::new(Seen { logger: 0, version: 0, here: Weak::new() }) };
}

/// One process's side of it. In a child the parent's is neither used nor dropped.
struct Here {
    sink: Arc<Sink>,
    queue: Option<Arc<Queue>>,
    losses: Arc<Losses>,
}

impl Logger {
    pub(super) fn new(
        filter: env_filter::Filter,
        style: Style,
        output: Output,
        capacity: Option<usize>,
        when_full: WhenFull,
    ) -> Logger {
        let home = fork_generation();
        let (style, sink) = (Arc::new(style), Arc::new(output.0));
        let here = Here::new(sink, &style, false, capacity.map(|n| (n, when_full)), Arc::default());
        let generation = AtomicU64::new(home);
        let (here, version) = (RwLock::new(here), AtomicU64::new(0));
        Logger { inner: Arc::new(Inner { filter, style, home, capacity, when_full, generation, here, version }) }
    }

    /// Points the log somewhere else, from the next record on.
    ///
    /// In a process with a background writer what was logged before still goes to the old output, and nothing is waited for but room
    /// in the queue, and that not by an [`Output::writer`] that turns its own log. Without one an old [`Output::writer`] is flushed. In a child
    /// this is how the log gets a place, and a background writer, of its own; until then it is fd 2. The parent's output is not touched.
    ///
    /// # Panics
    /// In the child of a dirty fork or a bypass, if a thread that is gone held the logger's state.
    pub fn set_output(&self, output: Output) {
        let inner = &*self.inner;
        let now = fork_generation();
        let sink = Arc::new(output.0);
        let Some(old) = inner.replace(now, &sink) else { return };
        if let Some(queue) = old.queue.clone().filter(|queue| queue.may_start()) {
            // Nothing but the thread, until it turns, is to keep the old output open.
            drop(old);
            queue.turn(sink);
        } else if !output::inside() {
            old.flush();
        }
    }

    /// Returns when every record that was logged before has been written, and an [`Output::writer`] was flushed. In a child that has
    /// no output of its own there is nothing to wait for.
    ///
    /// Written is handed to the kernel: it outlives this process, not a loss of power. The background writer is waited for under every
    /// [`WhenFull`], also while it waits for a full pipe.
    pub fn flush(&self) {
        self.inner.settle(Queue::flush);
    }

    /// Before the process ends.
    fn end(&self) {
        ENDED.store(true, Relaxed);
        self.inner.settle(end_queue);
    }

    /// How many records this process has lost so far: those that found no room under [`WhenFull::Drop`] or [`WhenFull::GrowTo`], and those
    /// that the output did not take (a full disk, a closed pipe). The log tells of them in lines of its own; this is for a program that
    /// watches over itself. A child begins at 0, and [`set_output`](Self::set_output) leaves the number as it is.
    ///
    /// What is still queued is neither lost nor written: after [`flush`](Self::flush) the number says what became of everything before.
    ///
    /// ```
    /// use carefork::log::{Builder, Output};
    /// use ::log::Log;
    /// let (reader, writer) = std::io::pipe()?;
    /// let logger = Builder::new().output(Output::fd(writer)?).build();
    /// drop(reader);
    /// logger.log(&log::Record::builder().args(format_args!("nobody reads this")).build());
    /// assert_eq!(logger.lost(), 1);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn lost(&self) -> u64 {
        let inner = &*self.inner;
        if inner.generation.load(Acquire) == fork_generation() { inner.here().losses.all() } else { 0 }
    }

    /// The most verbose level that any target is logged at.
    pub fn max_level(&self) -> ::log::LevelFilter {
        self.inner.filter.filter()
    }
}

impl ::log::Log for Logger {
    fn enabled(&self, metadata: &::log::Metadata<'_>) -> bool {
        self.inner.filter.enabled(metadata)
    }

    fn log(&self, record: &::log::Record<'_>) {
        let inner = &*self.inner;
        // A filter by text formats the record.
        let before = fork_generation();
        if !inner.filter.matches(record) {
            return;
        }
        line::with_buffer(|line| {
            let head = inner.style.line(line, before != inner.home, record);
            // What a record's own `Display` forked is the parent's to write.
            if fork_generation() == before {
                inner.put(line, head, before);
            }
        });
    }

    fn flush(&self) {
        Logger::flush(self);
    }
}

impl Inner {
    /// Hands on one line, in the process of generation `now`.
    fn put(&self, line: &[u8], head: usize, now: u64) {
        // What a writer logs must not come back to it; and a child that finds the state held by a ghost goes without.
        if output::inside() || self.generation.load(Acquire) != now && !self.renew(now) {
            drop(Sink::Stderr.put_line(line, head, self.hurried()));
            return;
        }
        let here = self.here();
        // A thread past its end writes itself: the channel needs std's handle of it.
        if let Some(queue) = &here.queue
            && !line::is_past()
            && queue.is_started()
        {
            let head = u32::try_from(head).unwrap_or(u32::MAX);
            queue.offer((line.into(), head));
        } else {
            here.put(line, head, &self.style, now != self.home, self.hurried());
        }
        if ENDED.load(Relaxed) {
            self.settle(end_queue);
        }
    }

    fn settle(&self, flush: impl FnOnce(&Queue)) {
        // A writer that flushes the log that it is the writer of would wait for itself.
        if output::inside() || self.generation.load(Acquire) != fork_generation() {
            return;
        }
        let here = self.here();
        match &here.queue {
            Some(queue) if queue.was_started() && !line::is_past() => flush(queue),
            _ => {
                here.losses.tell(&here.sink, &self.style, self.generation.load(Acquire) != self.home, self.hurried());
                here.flush();
            }
        }
    }

    /// Whether the thread that logs, where it writes itself, waits for no full pipe.
    fn hurried(&self) -> bool {
        self.when_full != WhenFull::Block
    }

    /// This process's side, known to be of this generation.
    fn here(&self) -> Arc<Here> {
        let version = self.version.load(Acquire);
        let seen = SEEN.try_with(|seen| {
            let seen = seen.borrow();
            if seen.logger == self.style.id && seen.version == version { seen.here.upgrade() } else { None }
        });
        // At its end a thread has no such place any more.
        if let Ok(Some(here)) = seen {
            return here;
        }
        let here = Arc::clone(&self.here.read());
        // If it has changed since, the version does not fit, and the next record looks again.
        let now = Seen { logger: self.style.id, version, here: Arc::downgrade(&here) };
        drop(SEEN.try_with(|seen| seen.replace(now)));
        here
    }

    /// In a child, at its first record: fd 2, nothing queued. False if that cannot be had for a ghost.
    #[cold]
    fn renew(&self, now: u64) -> bool {
        let Some(mut here) = self.here.try_write() else { return false };
        if self.generation.load(Acquire) != now {
            let fresh = Here { sink: Arc::new(Sink::Stderr), queue: None, losses: Arc::default() };
            forget(std::mem::replace(&mut here, Arc::new(fresh)));
            self.version.fetch_add(1, Release);
            self.generation.store(now, Release);
        }
        true
    }

    /// Points this process elsewhere: what it had before, unless that is its parent's. Decided under the lock, where another thread of a
    /// fresh child may have been first.
    fn replace(&self, now: u64, sink: &Arc<Sink>) -> Option<Arc<Here>> {
        let mut here = self.here.write();
        let stale = self.generation.load(Acquire) != now;
        let (queue, losses) = match &**here {
            Here { queue, losses, .. } if !stale => (queue.clone(), Arc::clone(losses)),
            _ => Default::default(),
        };
        let sink = Arc::clone(sink);
        let fresh = match queue.filter(|queue| queue.may_start()) {
            Some(queue) => Arc::new(Here { sink, queue: Some(queue), losses }),
            None => {
                let background = self.capacity.map(|n| (n, self.when_full));
                Here::new(sink, &self.style, now != self.home, background, losses)
            }
        };
        let old = std::mem::replace(&mut *here, fresh);
        self.version.fetch_add(1, Release);
        self.generation.store(now, Release);
        drop(here);
        if stale {
            forget(old);
            return None;
        }
        Some(old)
    }
}

/// The parent's half-written buffers, queue and descriptors are not the child's to flush, to wake or to close.
fn forget(parents: Arc<Here>) {
    #[allow(clippy::mem_forget)]
    std::mem::forget(parents);
}

impl Drop for Inner {
    fn drop(&mut self) {
        let now = fork_generation();
        if *self.generation.get_mut() != now {
            let nothing = Here { sink: Arc::new(Sink::Stderr), queue: None, losses: Arc::default() };
            forget(std::mem::replace(self.here.get_mut(), Arc::new(nothing)));
            return;
        }
        // Its own writer may have dropped the last handle: the thread would wait for itself.
        if let Some(queue) = &self.here.get_mut().queue
            && queue.was_started()
            && !output::inside()
            && !line::is_past()
        {
            // What is left then the thread goes on with.
            queue.flush_while_it_moves();
        }
    }
}

impl Here {
    fn new(
        sink: Arc<Sink>,
        style: &Arc<Style>,
        mark: bool,
        background: Option<(usize, WhenFull)>,
        losses: Arc<Losses>,
    ) -> Arc<Here> {
        let queue = background.map(|(capacity, when_full)| {
            let (sink, style, losses) = (Arc::clone(&sink), Arc::clone(style), Arc::clone(&losses));
            let worker = Worker { sink, style, mark, losses, shared: Arc::default(), generation: fork_generation() };
            Arc::new(Queue::new(capacity, when_full, worker))
        });
        Arc::new(Here { sink, queue, losses })
    }

    fn put(&self, line: &[u8], head: usize, style: &Style, mark: bool, hurried: bool) {
        match catch_unwind(AssertUnwindSafe(|| self.sink.put_line(line, head, hurried))) {
            Ok(Ok(())) => self.losses.tell(&self.sink, style, mark, hurried),
            Ok(Err(stopped)) => self.losses.failed(1, &stopped.why),
            Err(payload) => {
                self.losses.failed(1, &queue::panicked());
                resume_unwind(payload)
            }
        }
    }

    fn flush(&self) {
        if let Err(e) = self.sink.flush() {
            self.losses.failed(0, &e);
        }
    }
}

impl fmt::Debug for Logger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logger").field("filter", &self.inner.filter).finish_non_exhaustive()
    }
}

/// The logger of this process, for those who come to it by the facade.
static INSTALLED: OnceLock<Logger> = OnceLock::new();

/// After the facade took it.
pub(super) fn installed(logger: &Logger) {
    if INSTALLED.set(logger.clone()).is_ok() {
        // Something may be kept back: in a queue, in a buffer of somebody's writer, or a number of losses. In children too.
        crate::sys_write::at_exit(at_exit);
        crate::fork::at_child_end(end);
    }
}

/// The process is at its end: nobody but whoever logs now waits for the thread.
static ENDED: AtomicBool = AtomicBool::new(false);

fn end_queue(queue: &Queue) {
    if !queue.flush_while_it_moves() {
        // Once is enough.
        ENDED.store(false, Relaxed);
        queue.give_up();
    }
}

extern "C" fn at_exit() {
    // A panic must not leave a C function, nor one from its payload.
    #[allow(clippy::mem_forget)]
    std::mem::forget(std::panic::catch_unwind(end));
}

fn end() {
    if let Some(logger) = INSTALLED.get() {
        logger.end();
    }
}

/// [`Logger::flush`] of the logger that [`Builder::init`](super::Builder::init) installed, if there is one.
pub fn flush() {
    if let Some(logger) = INSTALLED.get() {
        logger.flush();
    }
}

/// [`Logger::set_output`] of the logger that [`Builder::init`](super::Builder::init) installed.
///
/// ```
/// use carefork::log::{self, Builder, Output};
/// Builder::new().background(1000).init()?;
/// # let path = std::env::temp_dir().join(format!("carefork-child-{}.log", std::process::id()));
/// # let for_child = path.clone();
/// // SAFETY: the child uses no descriptor of the parent's.
/// let mut child = unsafe { carefork::spawn(move || {
///     ::log::info!("this goes to fd 2, marked with my pid");
///     log::set_output(Output::file(for_child).unwrap()).unwrap();
///     ::log::info!("this to my own file");
///     0
/// }) }?;
/// assert!(child.wait()?.success());
/// # assert!(std::fs::read_to_string(&path)?.ends_with("this to my own file\n"));
/// # std::fs::remove_file(path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`NoLogger`] if there is none; the output is closed then.
///
/// # Panics
/// As [`Logger::set_output`].
pub fn set_output(output: Output) -> Result<(), NoLogger> {
    INSTALLED.get().ok_or(NoLogger { private: () })?.set_output(output);
    Ok(())
}

/// No logger of carefork's was installed by [`Builder::init`](super::Builder::init).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoLogger {
    private: (),
}

impl fmt::Display for NoLogger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("carefork's logger was not installed: Builder::init does that")
    }
}

impl std::error::Error for NoLogger {}

/// One record that somebody else formats, tracing-subscriber's `fmt` for example: written as a whole when dropped, by the process that
/// began it.
#[cfg(feature = "tracing")]
#[derive(Debug)]
pub struct RecordWriter<'a> {
    logger: &'a Logger,
    generation: u64,
    line: Vec<u8>,
    head: usize,
}

#[cfg(feature = "tracing")]
impl std::io::Write for RecordWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.line.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "tracing")]
impl Drop for RecordWriter<'_> {
    fn drop(&mut self) {
        if self.line.len() > self.head && fork_generation() == self.generation {
            self.logger.inner.put(&self.line, self.head, self.generation);
        }
    }
}

/// Levels and format are tracing-subscriber's, not the logger's filters: only where the lines go, in which process, and the
/// mark of a child at their head are.
#[cfg(feature = "tracing")]
impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for Logger {
    type Writer = RecordWriter<'a>;

    fn make_writer(&'a self) -> RecordWriter<'a> {
        let generation = fork_generation();
        let mut line = Vec::new();
        if generation != self.inner.home {
            line::mark(&mut line);
        }
        let head = line.len();
        RecordWriter { logger: self, generation, line, head }
    }
}
