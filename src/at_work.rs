//! Which hook a fork prepares, as other threads see it. Pure.

#![allow(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::time::Duration;

use Ordering::{Acquire, Relaxed, Release};

/// A fork that is preparing a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Preparing {
    /// The kernel's number of the forking thread.
    pub tid: u32,
    /// The hook's name.
    pub hook: &'static str,
    /// For how long.
    pub taken: Duration,
}

impl fmt::Display for Preparing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Preparing { tid, hook, taken } = self;
        write!(f, "the fork of thread {tid} has been preparing hook \"{hook}\" for {taken:.1?}")
    }
}

/// Written by the holder of the gate's role only.
#[derive(Debug)]
pub(crate) struct AtWork {
    /// Odd while the rest is being written.
    writes: AtomicU32,
    tid: AtomicU32,
    since: AtomicU64,
    name: AtomicPtr<u8>,
    /// 0 between hooks.
    len: AtomicUsize,
}

impl AtWork {
    pub(crate) const fn new() -> Self {
        Self {
            writes: AtomicU32::new(0),
            tid: AtomicU32::new(0),
            since: AtomicU64::new(0),
            name: AtomicPtr::new(std::ptr::null_mut()),
            len: AtomicUsize::new(0),
        }
    }

    /// Async-signal-safe.
    pub(crate) fn begin(&self, tid: u32, hook: &'static str, now: u64) {
        // A child's copy may be of one half written.
        let writes = self.writes.load(Relaxed) & !1;
        self.writes.store(writes.wrapping_add(1), Relaxed);
        // Pairs with the fence in `look`: who finds one of these finds the odd number, or a later one.
        fence(Release);
        self.tid.store(tid, Relaxed);
        self.since.store(now, Relaxed);
        self.name.store(hook.as_ptr().cast_mut(), Relaxed);
        self.len.store(hook.len(), Relaxed);
        self.writes.store(writes.wrapping_add(2), Release);
    }

    /// Also in the child, whose copy is about a thread that it may not have.
    pub(crate) fn ends(&self) {
        if self.len.load(Relaxed) != 0 {
            self.len.store(0, Relaxed);
        }
    }

    /// Async-signal-safe.
    pub(crate) fn look(&self, now: u64) -> Option<Preparing> {
        // Pairs with `begin`'s last.
        let writes = self.writes.load(Acquire);
        let (tid, since) = (self.tid.load(Relaxed), self.since.load(Relaxed));
        let (name, len) = (self.name.load(Relaxed), self.len.load(Relaxed));
        fence(Acquire);
        if writes & 1 == 1 || len == 0 || self.writes.load(Relaxed) != writes {
            return None;
        }
        // SAFETY: both are of one `begin`, since no other began meanwhile, and so of a `&'static str`.
        let bytes = unsafe { std::slice::from_raw_parts(name, len) };
        // SAFETY: as above.
        let hook = unsafe { std::str::from_utf8_unchecked(bytes) };
        Some(Preparing { tid, hook, taken: Duration::from_nanos(now.saturating_sub(since)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_is_seen_until_it_ends() {
        let at = AtWork::new();
        assert_eq!(at.look(5), None);
        for (tid, hook) in [(7, "first"), (8, "the second one")] {
            at.begin(tid, hook, 1_000_000_000);
            let seen = at.look(3_500_000_000).unwrap();
            assert_eq!((seen.tid, seen.hook, seen.taken), (tid, hook, Duration::from_millis(2500)));
            let text = format!("the fork of thread {tid} has been preparing hook \"{hook}\" for 2.5s");
            assert_eq!(seen.to_string(), text);
        }
        at.ends();
        assert_eq!(at.look(5), None);
    }

    /// Names are whole, whoever looks when.
    #[test]
    fn no_name_is_half_of_two() {
        const NAMES: [&str; 3] = ["a", "bbbbbbbbbb", "ccccc"];
        let at = AtWork::new();
        std::thread::scope(|s| {
            let writer = s.spawn(|| (0..200_000).for_each(|i: usize| at.begin(i as u32 % 3, NAMES[i % 3], 0)));
            while !writer.is_finished() {
                if let Some(seen) = at.look(0) {
                    assert_eq!(seen.hook, NAMES[seen.tid as usize]);
                }
            }
        });
    }
}
