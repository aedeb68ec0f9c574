//! The background writer: a queue that belongs to one process, and a thread that starts with the first record.
//!
//! A child never sends to its parent's queue, receives from it or drops it: channel and thread are made afresh where they are needed
//! (receivers that were parked at a fork are ghosts, and waking one hangs). So nothing here needs to be at rest at a fork.

use super::builder::WhenFull;
use super::line::Style;
use super::output::{Sink, Stopped};
use crate::gate::WRITER;
use crate::{Mutex, OnceLock, runtime, sys, sys_signals};
use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded, unbounded};
use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

/// A line and the length of its head.
pub(super) type Record = (Box<[u8]>, u32);

pub(super) enum Message {
    Record(Record),
    /// To be answered when everything before it was written.
    Flush(Sender<()>),
    /// What comes after this goes there.
    Turn(Arc<Sink>),
}

/// What was not written, until a line says so; and how much that was in all.
#[derive(Debug, Default)]
pub(super) struct Losses {
    all: AtomicU64,
    full: AtomicU64,
    failed: AtomicU64,
    errno: AtomicI32,
}

impl Losses {
    pub(super) fn full(&self) {
        self.all.fetch_add(1, Relaxed);
        self.full.fetch_add(1, Relaxed);
    }

    pub(super) fn failed(&self, records: u64, why: &io::Error) {
        self.all.fetch_add(records, Relaxed);
        if why.kind() == io::ErrorKind::WouldBlock {
            self.full.fetch_add(records, Relaxed);
        } else {
            self.errno.store(why.raw_os_error().unwrap_or(0), Relaxed);
            self.failed.fetch_add(records, Relaxed);
        }
    }

    /// Told or not.
    pub(super) fn all(&self) -> u64 {
        self.all.load(Relaxed)
    }

    /// Tells what was lost, if something was, now that `sink` has taken something.
    pub(super) fn tell(&self, sink: &Sink, style: &Style, mark: bool, hurried: bool) {
        if self.full.load(Relaxed) == 0 && self.failed.load(Relaxed) == 0 {
            return;
        }
        let failure = match self.errno.load(Relaxed) {
            0 => "the writer failed".to_owned(),
            errno => io::Error::from_raw_os_error(errno).to_string(),
        };
        let tell = |count: &AtomicU64, why: &dyn std::fmt::Display| {
            let untold = Untold(count, count.swap(0, Relaxed));
            if untold.1 == 0 {
                return;
            }
            let mut line = Vec::new();
            style.loss(&mut line, mark, untold.1, why);
            if sink.put(&line, hurried).is_ok() {
                untold.told();
            }
        };
        tell(&self.full, &"the queue or the pipe was full");
        tell(&self.failed, &failure);
    }
}

/// Why a record of a writer that panicked is lost.
pub(super) fn panicked() -> io::Error {
    io::Error::other("the writer panicked")
}

/// A count that goes back where it came from unless it was told; a writer may panic.
struct Untold<'a>(&'a AtomicU64, u64);

impl Untold<'_> {
    fn told(mut self) {
        self.1 = 0;
    }
}

impl Drop for Untold<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(self.1, Relaxed);
    }
}

pub(super) struct Queue {
    tx: Sender<Message>,
    /// For the thread, when it is started.
    rx: Receiver<Message>,
    when_full: WhenFull,
    started: OnceLock<bool>,
    /// The thread's side, until it is started: then nobody but the thread keeps its output open.
    worker: Mutex<Option<Worker>>,
    losses: Arc<Losses>,
    shared: Arc<Shared>,
}

/// What the thread tells, and is told by itself.
#[derive(Default)]
pub(super) struct Shared {
    /// Counts what it took out of the queue: it takes no more while a write is stuck. A writer has written what was taken.
    steps: AtomicU64,
    /// What it took before its turn, to make room for itself.
    kept: std::sync::Mutex<VecDeque<Message>>,
}

impl Shared {
    fn kept(&self) -> MutexGuard<'_, VecDeque<Message>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

thread_local! {
    /// On a log's thread, what it shares. Const, no destructor.
    static OWN: Cell<*const Shared> = const { Cell::new(std::ptr::null()) };
}

/// So long, and so often in a row, the end of a program that chose to lose records waits for an output that takes nothing. Often: for a
/// process that stands still, stopped or starved, time passes that its output has no part in.
const PATIENCE: Duration = Duration::from_millis(100);
const LOOKS: u32 = 10;

impl Queue {
    pub(super) fn new(capacity: usize, when_full: WhenFull, worker: Worker) -> Queue {
        let (tx, rx) = match when_full {
            WhenFull::Block | WhenFull::Drop => bounded(capacity.max(1)),
            WhenFull::GrowTo(_) => unbounded(),
        };
        let (losses, shared) = (Arc::clone(&worker.losses), Arc::clone(&worker.shared));
        Queue { tx, rx, when_full, started: OnceLock::new(), worker: Mutex::new(Some(worker)), losses, shared }
    }

    /// Starts the thread if this is the first record; false if there can be none.
    pub(super) fn is_started(&self) -> bool {
        // The initialiser is a region: no fork finds the thread half started.
        *self.started.get_or_init(|| {
            let Some(worker) = self.worker.lock().take() else { return false };
            let rx = self.rx.clone();
            // The program's signal handlers are not for this thread.
            let mask = sys_signals::block_all();
            let thread = crate::thread::start("carefork-log", WRITER, (), move || worker.run(&rx));
            sys_signals::set_mask(&mask);
            thread.is_ok()
        })
    }

    pub(super) fn was_started(&self) -> bool {
        self.started.get() == Some(&true)
    }

    /// Puts a record in, or does with it what is to be done when there is no room. Not to be called inside a region of the logger's:
    /// it may wait.
    pub(super) fn offer(&self, record: Record) {
        let message = Message::Record(record);
        let full = match self.when_full {
            WhenFull::Block => return self.send(message),
            WhenFull::Drop => self.tx.try_send(message).is_err(),
            WhenFull::GrowTo(most) => self.tx.len() >= most.max(1) || self.tx.send(message).is_err(),
        };
        if full {
            self.losses.full();
        }
    }

    /// Not if it could not.
    pub(super) fn may_start(&self) -> bool {
        self.started.get() != Some(&false)
    }

    /// What is offered after this goes there. Waits for room, but for the thread itself (its writer turns the log): nobody else makes any.
    pub(super) fn turn(&self, sink: Arc<Sink>) {
        if self.started.get().is_none() {
            let mut waiting = self.worker.lock();
            if let Some(worker) = &mut *waiting {
                let old = std::mem::replace(&mut worker.sink, sink);
                drop(waiting);
                // Outside of the lock: a writer may end with words.
                drop(old);
                return;
            }
        }
        // It may be starting this moment.
        if !self.is_started() {
            return;
        }
        let turn = Message::Turn(sink);
        if OWN.get() != Arc::as_ptr(&self.shared) {
            return self.send(turn);
        }
        if let Err(full) = self.tx.try_send(turn) {
            let mut kept = self.shared.kept();
            kept.extend(self.rx.try_iter().take(self.rx.len()));
            kept.push_back(full.into_inner());
        }
    }

    /// Waits for room.
    fn send(&self, message: Message) {
        // The queue holds a receiver itself, so it is never disconnected.
        drop(self.tx.send(message));
    }

    /// Returns when everything sent before was written.
    pub(super) fn flush(&self) {
        let (done, wait) = bounded(1);
        self.send(Message::Flush(done));
        let _ = wait.recv();
    }

    /// As [`flush`](Self::flush), for an end that a full pipe shall not put off where the program chose to lose records: whether all was
    /// written.
    pub(super) fn flush_while_it_moves(&self) -> bool {
        if self.when_full == WhenFull::Block {
            self.flush();
            return true;
        }
        let (mut seen, mut still) = (self.shared.steps.load(Relaxed), 0);
        let mut moves = || {
            let now = self.shared.steps.load(Relaxed);
            still = if std::mem::replace(&mut seen, now) == now { still + 1 } else { 0 };
            still < LOOKS
        };
        let (done, wait) = bounded(1);
        let mut message = Message::Flush(done);
        while let Err(SendTimeoutError::Timeout(back)) = self.tx.send_timeout(message, PATIENCE) {
            if !moves() {
                return false;
            }
            message = back;
        }
        while let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(PATIENCE) {
            if !moves() {
                return false;
            }
        }
        true
    }

    /// Takes what is queued from the thread, and counts it as lost: before the end of the process.
    pub(super) fn give_up(&self) {
        let kept = std::mem::take(&mut *self.shared.kept());
        // Others may go on logging.
        for message in kept.into_iter().chain(self.rx.try_iter().take(self.rx.len())) {
            match message {
                Message::Record(_) => self.losses.full(),
                // A flush that is not answered, an output with a buffer that is not to be flushed into a full pipe here.
                #[allow(clippy::mem_forget)]
                other => std::mem::forget(other),
            }
        }
    }
}

/// The thread's side.
pub(super) struct Worker {
    pub(super) sink: Arc<Sink>,
    pub(super) style: Arc<Style>,
    pub(super) mark: bool,
    pub(super) losses: Arc<Losses>,
    pub(super) shared: Arc<Shared>,
    pub(super) generation: u64,
}

/// So much is gathered for one write(2).
const BATCH: usize = 64 * 1024;

impl Worker {
    /// Ends when the queue is dropped and everything in it was written.
    fn run(mut self, rx: &Receiver<Message>) {
        OWN.set(Arc::as_ptr(&self.shared));
        let mut batch = Batch::default();
        while let Some(first) = self.kept().or_else(|| rx.recv().ok()) {
            self.take(first, &mut batch);
            while let Some(next) = self.kept().or_else(|| rx.try_recv().ok()) {
                self.take(next, &mut batch);
            }
            self.write(&mut batch);
            if self.sink.is_writer() {
                self.flush();
            }
        }
    }

    fn kept(&self) -> Option<Message> {
        self.shared.kept().pop_front()
    }

    fn take(&mut self, message: Message, batch: &mut Batch) {
        self.shared.steps.fetch_add(1, Relaxed);
        match message {
            Message::Record((line, _)) if self.sink.is_writer() => {
                // Each by itself: forks wait for no more than one.
                if self.guarded(1, |sink| sink.put(&line, false)) {
                    self.tell();
                }
            }
            Message::Record((line, head)) => {
                let most = self.sink.most().min(BATCH);
                if batch.bytes.len() + line.len() > most {
                    self.write(batch);
                }
                if line.len() > most {
                    self.guarded(1, |sink| sink.put_line(&line, head as usize, false));
                } else {
                    batch.bytes.extend_from_slice(&line);
                    batch.ends.push(batch.bytes.len());
                }
            }
            Message::Flush(done) => {
                self.write(batch);
                self.flush();
                // Whoever asked may have gone.
                let _ = done.send(());
            }
            Message::Turn(sink) => {
                self.write(batch);
                self.flush();
                let old = std::mem::replace(&mut self.sink, sink);
                self.caught(0, || {
                    old.end();
                    Ok(())
                });
            }
        }
    }

    fn write(&self, batch: &mut Batch) {
        if batch.ends.is_empty() {
            return;
        }
        match self.sink.put(&batch.bytes, false) {
            Ok(()) => self.tell(),
            Err(stopped) => {
                let lost = batch.ends.iter().filter(|&&end| end > stopped.written).count();
                self.losses.failed(lost as u64, &stopped.why);
            }
        }
        batch.bytes.clear();
        batch.ends.clear();
    }

    fn tell(&self) {
        self.guarded(0, |sink| {
            self.losses.tell(sink, &self.style, self.mark, false);
            Ok(())
        });
    }

    fn flush(&self) {
        self.tell();
        self.guarded(0, |sink| sink.flush().map_err(|why| Stopped { written: 0, why }));
    }

    fn guarded(&self, records: u64, f: impl FnOnce(&Sink) -> Result<(), Stopped>) -> bool {
        self.caught(records, || f(&self.sink))
    }

    /// Whether it went well. A writer that panics loses its record, not the thread.
    fn caught(&self, records: u64, f: impl FnOnce() -> Result<(), Stopped>) -> bool {
        let went = catch_unwind(AssertUnwindSafe(f));
        self.check_process();
        let why = match went {
            Ok(Ok(())) => return true,
            Ok(Err(stopped)) => stopped.why,
            Err(payload) => {
                // It may panic when it is dropped.
                #[allow(clippy::mem_forget)]
                std::mem::forget(payload);
                panicked()
            }
        };
        self.losses.failed(records, &why);
        false
    }

    /// The copy of this thread in a child that the writer forked must not go on: the records are the parent's.
    fn check_process(&self) {
        if runtime::generation() != self.generation {
            sys::say(b"carefork: log: the writer forked and returned in the child, which ends here\n");
            sys::exit_now(101)
        }
    }
}

#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}
