//! A fork that waits for one of std's streams, as other threads see it (L6). One word, pure.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// One of std's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// `std::io::stdout()`, descriptor 1.
    Output,
    /// `std::io::stderr()`, descriptor 2.
    Error,
}

impl Stream {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Stream::Output => "standard output",
            Stream::Error => "standard error",
        }
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A fork that waits until a thread that prints lets go of a stream; see [`stdio::waiting`](crate::stdio::waiting).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Waiting {
    /// The kernel's number of the forking thread.
    pub tid: u32,
    /// What it waits for.
    pub stream: Stream,
    /// For how long, in whole milliseconds.
    pub waited: Duration,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Waiting { tid, stream, waited } = self;
        write!(f, "the fork of thread {tid} has waited {waited:?} for {stream}: some thread is stuck printing")
    }
}

/// What errors call the hook that waits.
pub(crate) const HOOK: &str = "std's standard streams";

#[derive(Debug)]
pub(crate) struct WaitWord {
    /// 22 bits of tid (the kernel's PID_MAX_LIMIT), one for the stream, and the time it began in ms, so that one load gives all
    /// three as they belong together. 0 while nobody waits.
    word: AtomicU64,
    /// The last wait was long. For the holder of the gate's role alone.
    long: AtomicBool,
}

const TID: u64 = (1 << 22) - 1;
const ERROR: u64 = 1 << 22;
const TIME: u32 = 23;
const MS: u64 = 1_000_000;

/// A wait of so many ns is worth a word: a tenth of a coordinated fork's budget, unless that was set.
pub(crate) const LONG: u64 = 100 * MS;

impl WaitWord {
    pub(crate) const fn new() -> Self {
        Self { word: AtomicU64::new(0), long: AtomicBool::new(false) }
    }

    /// By the holder of the gate's role only, until the value is dropped. Async-signal-safe.
    pub(crate) fn begin(&self, tid: u32, stream: Stream, now: u64) -> Wait<'_> {
        let wait = Wait { of: self, tid, begun: now };
        wait.goes_on(stream, now);
        wait
    }

    /// In the child, whose copy is about a thread that it may not have.
    pub(crate) fn clear(&self) {
        self.word.store(0, Relaxed);
    }

    /// Whether a long wait has ended since this was asked last. By the holder of the gate's role only.
    pub(crate) fn take_long(&self) -> bool {
        let long = self.long.load(Relaxed);
        if long {
            self.long.store(false, Relaxed);
        }
        long
    }

    /// Async-signal-safe.
    pub(crate) fn look(&self, now: u64) -> Option<Waiting> {
        let word = self.word.load(Relaxed);
        if word == 0 {
            return None;
        }
        let stream = if word & ERROR == 0 { Stream::Output } else { Stream::Error };
        let waited = Duration::from_millis((now / MS).saturating_sub(word >> TIME));
        // 22 bits.
        #[allow(clippy::cast_possible_truncation)]
        Some(Waiting { tid: (word & TID) as u32, stream, waited })
    }
}

/// A wait under way.
#[must_use]
pub(crate) struct Wait<'a> {
    of: &'a WaitWord,
    tid: u32,
    begun: u64,
}

impl Wait<'_> {
    /// Relaxed: nothing else is read by what this says.
    pub(crate) fn goes_on(&self, stream: Stream, now: u64) {
        let stream = if stream == Stream::Error { ERROR } else { 0 };
        self.of.word.store((now / MS) << TIME | stream | (u64::from(self.tid) & TID), Relaxed);
    }

    pub(crate) fn ends(self, now: u64) {
        if now.saturating_sub(self.begun) >= LONG {
            self.of.long.store(true, Relaxed);
        }
    }
}

/// Where it ends by a panic too.
impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.of.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        let word = WaitWord::new();
        assert_eq!(word.look(5), None);
        for (tid, stream) in [(1, Stream::Output), (4_194_303, Stream::Error), (77, Stream::Output)] {
            // Uptimes of no time, a day, and sixty years.
            for begun in [0, 86_400_000, 1_900_000_000_000] {
                let wait = word.begin(tid, stream, begun * MS + 999_999);
                let waited = Duration::from_millis(1234);
                assert_eq!(word.look((begun + 1234) * MS), Some(Waiting { tid, stream, waited }));
                // A clock that stands still, or seems to run backwards.
                assert_eq!(word.look(0).map(|w| w.waited), Some(Duration::ZERO));
                wait.goes_on(Stream::Error, (begun + 2000) * MS);
                let waited = Duration::from_millis(5);
                assert_eq!(word.look((begun + 2005) * MS), Some(Waiting { tid, stream: Stream::Error, waited }));
                drop(wait);
                assert_eq!(word.look(5), None);
                assert!(!word.take_long());
                word.begin(tid, stream, begun).ends(begun + LONG - 1);
                assert!(!word.take_long());
                word.begin(tid, stream, begun).ends(begun + LONG);
                assert_eq!([word.take_long(), word.take_long()], [true, false]);
            }
        }
    }
}
