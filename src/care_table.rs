//! The registry of care-fds: one word per descriptor number (F4, F5). No allocation, no lock, no wait.
//!
//! What a word says and who may write it: `care_word.rs`.
//!
//! # Memory
//! Words lie in chunks of 64 KiB. The first lies with the statics, since most programs need no other and each mapping is one more
//! that a fork copies; the rest are mapped when first needed and never unmapped. A page of them that was never written costs nothing.

#![allow(unsafe_code)]

pub(crate) use crate::care_word::{Kind, State};

use crate::care_word::{self, Dirty};
use crate::{sys, sys_close};
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use Ordering::{AcqRel, Acquire, Relaxed};

/// Words in a chunk, and chunks for every number there can be.
const CHUNK: u32 = 16384;
const CHUNKS: usize = (1 << 31) / CHUNK as usize;
/// Words looked at together: a cache line.
const LINE: u32 = 16;

/// The registry of this process.
pub(crate) static TABLE: CareTable = CareTable::new();

/// A word for every number, two levels deep. Those of the numbers in use first: next to other statics, they are often on a page that a
/// fork's parent writes anyway, and not alone behind a megabyte of pointers.
#[derive(Debug)]
#[repr(C)]
struct Words {
    first: Chunk,
    /// The first is null for ever.
    chunks: [AtomicPtr<Chunk>; CHUNKS],
}

type Chunk = [AtomicU32; CHUNK as usize];

impl Words {
    const fn new() -> Self {
        Self {
            first: [const { AtomicU32::new(0) }; CHUNK as usize],
            chunks: [const { AtomicPtr::new(std::ptr::null_mut()) }; CHUNKS],
        }
    }

    /// The chunk with that index, if it was ever needed.
    #[inline(always)]
    fn chunk(&self, index: usize) -> Option<&Chunk> {
        if index == 0 {
            return Some(&self.first);
        }
        // Acquire pairs with `grow`: who finds the chunk finds it zeroed.
        let chunk = self.chunks.get(index)?.load(Acquire);
        // SAFETY: null, or a mapping of CHUNK words by `grow`, which came zeroed (a valid AtomicU32), is aligned to a page
        // and is never unmapped.
        unsafe { chunk.as_ref() }
    }

    /// The word of `fd`; `None` if it is negative or in a chunk that was never needed.
    #[inline(always)]
    fn get(&self, fd: RawFd) -> Option<&AtomicU32> {
        let fd = fd as u32;
        // A negative number is an index behind the last chunk.
        self.chunk((fd / CHUNK) as usize).map(|c| &c[(fd % CHUNK) as usize])
    }

    /// The word of `fd`, mapped if need be.
    fn get_or_map(&self, fd: RawFd) -> io::Result<&AtomicU32> {
        if let Some(word) = self.get(fd) {
            return Ok(word);
        }
        let invalid = || io::Error::from_raw_os_error(libc::EBADF);
        let place = self.chunks.get((fd as u32 / CHUNK) as usize).ok_or_else(invalid)?;
        Self::grow(place)?;
        self.get(fd).ok_or_else(invalid)
    }

    #[cold]
    fn grow(place: &AtomicPtr<Chunk>) -> io::Result<()> {
        let len = size_of::<Chunk>();
        let fresh = sys::map(len, false)?;
        if place.compare_exchange(std::ptr::null_mut(), fresh.cast(), AcqRel, Acquire).is_err() {
            // SAFETY: another thread was faster; nobody else knows this mapping.
            unsafe { sys::unmap(fresh, len) };
        }
        Ok(())
    }
}

/// What every look at the words needs stands beside the first of them.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct CareTable {
    /// By kind: one more than the highest number ever registered. Numbers are given out lowest first, so this is written
    /// a few times in a process's life and then only read.
    above: [AtomicU32; 2],
    dirty: Dirty,
    words: Words,
    /// What each number referred to when it was registered: a hash, 0 if that could not be told.
    #[cfg(debug_assertions)]
    identities: Words,
}

impl CareTable {
    pub(crate) const fn new() -> Self {
        Self {
            above: [const { AtomicU32::new(0) }; 2],
            dirty: Dirty::new(),
            words: Words::new(),
            #[cfg(debug_assertions)]
            identities: Words::new(),
        }
    }

    /// Registers `fd`; its stamp. The caller owns the number and is in a region. Async-signal-safe.
    ///
    /// A number that is registered already was closed behind its owner's back: that owner's stamp fits no more.
    #[inline]
    pub(crate) fn register(&self, fd: RawFd, kind: Kind) -> io::Result<u32> {
        self.register_by(fd, kind, care_word::register)
    }

    /// As `register`, by a child for itself, before the end of its clean-up, which is to leave it alone. Async-signal-safe.
    #[cold]
    pub(crate) fn register_young(&self, fd: RawFd, kind: Kind) -> io::Result<u32> {
        self.register_by(fd, kind, care_word::register_young)
    }

    #[inline(always)]
    fn register_by(
        &self,
        fd: RawFd,
        kind: Kind,
        register: impl Fn(&AtomicU32, &Dirty, Kind) -> u32,
    ) -> io::Result<u32> {
        let word = self.words.get_or_map(fd)?;
        #[cfg(debug_assertions)]
        self.remember(fd, word.load(Relaxed));
        let above = &self.above[kind as usize - 1];
        if above.load(Relaxed) <= fd as u32 {
            above.fetch_max(fd as u32 + 1, Relaxed);
        }
        Ok(register(word, &self.dirty, kind))
    }

    /// In a child of a child that did so: they are like any other now.
    fn grow_up(&self) {
        self.scan(&[Kind::Cleanup, Kind::Close], |_, word| care_word::grow_up(word));
    }

    /// Ends the registration that gave `stamp`. False, and nothing done, if it is not live here. Async-signal-safe.
    #[inline]
    pub(crate) fn unregister(&self, fd: RawFd, stamp: u32) -> bool {
        self.unregister_and(fd, stamp, || ())
    }

    /// Ends the registration that gave `stamp` and lets `close` close the number, in this order (G6). False, and nothing done, if
    /// it is not live here. Async-signal-safe if `close` is.
    #[inline]
    pub(crate) fn unregister_and(&self, fd: RawFd, stamp: u32, close: impl FnOnce()) -> bool {
        self.words.get(fd).is_some_and(|word| care_word::unregister(word, stamp, close))
    }

    /// Whether the registration that gave `stamp` still holds here: `fd` is open and the same. Async-signal-safe.
    #[inline(always)]
    pub(crate) fn is_live(&self, fd: RawFd, stamp: u32) -> bool {
        self.words.get(fd).is_some_and(|word| care_word::fits(word.load(Relaxed), stamp))
    }

    /// As `is_live`, and why not.
    pub(crate) fn state(&self, fd: RawFd, stamp: u32) -> State {
        care_word::state(self.words.get(fd).map_or(0, |word| word.load(Relaxed)), stamp)
    }

    /// The word of `fd`, for [`Kind::of`]. While it is the same, so is the registration, or there is none. Async-signal-safe.
    pub(crate) fn word(&self, fd: RawFd) -> u32 {
        self.words.get(fd).map_or(0, |word| word.load(Acquire))
    }

    /// When children close `fd`, if it is registered.
    #[cfg(test)]
    fn kind(&self, fd: RawFd) -> Option<Kind> {
        Kind::of(self.word(fd))
    }

    /// Calls `f` with each registered number of `kinds`, rising. Async-signal-safe if `f` is.
    pub(crate) fn each(&self, kinds: &[Kind], mut f: impl FnMut(RawFd, Kind)) {
        self.scan(kinds, |fd, word| {
            if let Some(kind) = Kind::of(word.load(Relaxed)) {
                f(fd as RawFd, kind);
            }
        });
    }

    /// How many numbers are registered.
    #[cfg(test)]
    fn count(&self) -> usize {
        let mut n = 0;
        self.each(&[Kind::Cleanup, Kind::Close], |_, _| n += 1);
        n
    }

    /// In a child: ends the registration of every number of `kinds` that `keep` does not name, rising, and calls
    /// `close(first, last)` once for each run of neighbours. How many it ended, and how many `keep` named.
    ///
    /// What this child registered itself it keeps. A number between two that is not registered splits the run: it may be somebody's. Async-signal-safe if `keep` and
    /// `close` are.
    // Into its callers, some of which lie with the code that every child runs.
    #[inline(always)]
    pub(crate) fn close_runs(
        &self,
        kinds: &[Kind],
        mut keep: impl FnMut(RawFd) -> bool,
        mut close: impl FnMut(u32, u32),
    ) -> (usize, usize) {
        let (mut closed, mut kept) = (0, 0);
        let mut run: Option<(u32, u32)> = None;
        self.scan(kinds, |fd, word| {
            if !care_word::is_inherited(word) {
                return;
            }
            if keep(fd as RawFd) {
                kept += 1;
                return;
            }
            closed += 1;
            care_word::closed(word);
            match &mut run {
                Some((_, last)) if *last + 1 == fd => *last = fd,
                _ => {
                    if let Some((first, last)) = run.replace((fd, fd)) {
                        close(first, last);
                    }
                }
            }
        });
        if let Some((first, last)) = run {
            close(first, last);
        }
        (closed, kept)
    }

    /// In the child of a dirty fork, before anything is closed: what is marked is not registered here. Async-signal-safe.
    fn dirty_child(&self) {
        self.dirty.reset();
        self.scan(&[Kind::Cleanup, Kind::Close], |_, word| care_word::forget_marked(word));
    }

    /// Each word of `kinds` up to the highest ever, a cache line at a time, skipping chunks that were never needed.
    #[inline(always)]
    fn scan(&self, kinds: &[Kind], mut f: impl FnMut(u32, &AtomicU32)) {
        let mask = kinds.iter().fold(0, |m, &k| m | k as u32);
        let above = kinds.iter().map(|&k| self.above[k as usize - 1].load(Relaxed)).max().unwrap_or(0);
        for index in 0..above.div_ceil(CHUNK) {
            let Some(chunk) = self.words.chunk(index as usize) else { continue };
            let base = index * CHUNK;
            let words = &chunk[..(above - base).div_ceil(LINE).min(CHUNK / LINE) as usize * LINE as usize];
            for (line, at) in words.chunks_exact(LINE as usize).zip((base..).step_by(LINE as usize)) {
                if line.iter().fold(0, |any, w| any | w.load(Relaxed)) & mask == 0 {
                    continue;
                }
                for (word, fd) in line.iter().zip(at..) {
                    if word.load(Relaxed) & mask != 0 {
                        f(fd, word);
                    }
                }
            }
        }
    }
}

/// `keep` for `close_runs`, which asks with rising numbers: whether the sorted `list` has them.
fn in_sorted(list: &[RawFd]) -> impl FnMut(RawFd) -> bool + '_ {
    let mut rest = list;
    move |fd| {
        while let [first, tail @ ..] = rest
            && *first < fd
        {
            rest = tail;
        }
        rest.first() == Some(&fd)
    }
}

/// In every child, at the fork: closes what is [`Kind::Close`]. Programs without any pay two loads. Async-signal-safe.
pub(crate) fn close_at_fork() {
    TABLE.close_runs(&[Kind::Close], |_| false, sys::close_range);
}

/// See `Dirty`.
pub(crate) fn dirty_begins() {
    TABLE.dirty.begins();
}

pub(crate) fn loosen() {
    TABLE.dirty.begins_behind_the_gate();
}

pub(crate) fn dirty_ends() {
    TABLE.dirty.ends();
}

pub(crate) fn dirty_child() {
    TABLE.dirty_child();
}

#[cold]
pub(crate) fn grow_up() {
    TABLE.grow_up();
}

/// In a child whose registry is as its descriptors are: other forks' marks are none of its business.
pub(crate) fn no_dirty_forks() {
    TABLE.dirty.reset();
}

/// A noexec child's clean-up: closes every care-fd that the sorted `keep` does not name, also the ones to be closed at the
/// fork (a bypass passes by `close_at_fork`). How many were closed and kept. Async-signal-safe.
#[unsafe(link_section = ".text_carefork")]
pub(crate) fn clean_up(keep: &[RawFd]) -> (usize, usize) {
    TABLE.close_runs(&[Kind::Cleanup, Kind::Close], in_sorted(keep), sys::close_range)
}

/// In a child whose standard streams were replaced: a care-fd that had such a number is gone. Async-signal-safe.
pub(crate) fn forget_stdio() {
    TABLE.close_runs(&[Kind::Cleanup, Kind::Close], |fd| fd > 2, |_, _| {});
}

/// In a child: closes every descriptor but 0, 1, 2, those in the sorted `keep`, and `also`. Async-signal-safe.
pub(crate) fn close_all_but(keep: &[RawFd], also: Option<RawFd>) {
    let mut named = in_sorted(keep);
    TABLE.close_runs(
        &[Kind::Cleanup, Kind::Close],
        |fd| (0..=2).contains(&fd) || also == Some(fd) || named(fd),
        |_, _| {},
    );
    let mut from = 3;
    let mut rest = keep;
    let mut also = also;
    loop {
        // The two lists merged.
        let next = match (rest, also) {
            ([k, tail @ ..], a) if a.is_none_or(|a| *k <= a) => {
                rest = tail;
                *k
            }
            (_, Some(a)) => {
                also = None;
                a
            }
            _ => break,
        };
        let Ok(next) = u32::try_from(next) else { continue };
        if next > from {
            sys_close::close_span(from, next - 1);
        }
        from = from.max(next.saturating_add(1));
    }
    sys_close::close_span(from, u32::MAX);
}

/// What a number refers to, as it was at its registration and as it is (F6).
#[cfg(debug_assertions)]
mod behind {
    use super::{CareTable, RawFd, Relaxed, sys};
    use crate::care_word::KIND;

    /// What became of a registered number behind the library's back.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Behind {
        Nothing,
        Closed,
        Replaced,
    }

    /// Never 0. Objects without an inode of their own (eventfd, epoll, timerfd) have all the same: a replacement of one by
    /// another is not seen.
    fn hash((device, inode): (u64, u64)) -> u32 {
        let h = (device.rotate_left(32) ^ inode).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((h >> 32) as u32).max(1)
    }

    impl CareTable {
        pub(super) fn remember(&self, fd: RawFd, before: u32) {
            if before & KIND != 0 {
                report(fd, "was closed behind carefork's back: its number is registered again");
            }
            // Without memory for it there is nothing to compare with later.
            if let Ok(word) = self.identities.get_or_map(fd) {
                word.store(sys::identity(fd).map_or(0, hash), Relaxed);
            }
        }

        pub(crate) fn look_behind(&self, fd: RawFd) -> Behind {
            let Some(now) = sys::identity(fd) else {
                // A filter may refuse fstat; only a closed number has no flags.
                return match sys::get_fd_flags(fd) {
                    Err(e) if e.raw_os_error() == Some(libc::EBADF) => Behind::Closed,
                    _ => Behind::Nothing,
                };
            };
            match self.identities.get(fd).map_or(0, |word| word.load(Relaxed)) {
                0 => Behind::Nothing,
                then if then == hash(now) => Behind::Nothing,
                _ => Behind::Replaced,
            }
        }
    }

    /// One line on fd 2, without allocation. Async-signal-safe.
    pub(crate) fn report(fd: RawFd, what: &str) {
        use std::io::Write as _;
        let mut line = [0u8; 160];
        let mut rest = &mut line[..];
        // Cut off where it does not fit.
        let _cut = writeln!(rest, "carefork: care-fd {fd} {what}");
        let left = rest.len();
        sys::say(&line[..line.len() - left]);
    }
}
#[cfg(debug_assertions)]
pub(crate) use behind::{Behind, report};

#[cfg(test)]
#[path = "care_table_tests.rs"]
mod tests;
