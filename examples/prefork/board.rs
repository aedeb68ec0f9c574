//! What must outlive a worker, in memory that all processes share: for each connection, the answer that was promised.
//!
//! A slot belongs to the worker that has its connection; the master looks at it only while none has. A worker that dies leaves it
//! as it is, so one store (of `promise`) decides whether there is a promise: all else is written before it.

#![allow(unsafe_code)]

use std::io;
use std::ptr::null_mut;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64};

/// How many connections at a time; more wait in the listener's queue.
pub(crate) const SLOTS: usize = 4096;
/// The longest answer. Longer ones would be promised and sent piece by piece.
pub(crate) const ANSWER: usize = 16 * 1024;

/// A request of which so many workers died in a row is not tried again: its connection is closed with an error.
pub(crate) const MAX_DEATHS: u32 = 5;

/// Atomics only, for which zeroed memory is valid.
#[repr(C)]
pub(crate) struct Board {
    slots: [Slot; SLOTS],
    /// For `faults`: how often any worker came past the step that is to fail.
    pub(crate) passed: AtomicU64,
}

#[repr(C)]
pub(crate) struct Slot {
    /// Length of the request, length of the answer, whether it is the last one. 0: nothing is promised.
    promise: AtomicU64,
    written: AtomicU64,
    taken: AtomicU64,
    answer: [AtomicU8; ANSWER],
    /// A worker is at work on it at this moment.
    busy: AtomicBool,
    deaths: AtomicU32,
}

/// "This request is answered by these bytes, which begin where `written` bytes have been written."
#[derive(Debug)]
pub(crate) struct Promise {
    /// The kernel's counters when it was made.
    pub(crate) written: u64,
    pub(crate) taken: u64,
    /// The length of the request.
    pub(crate) request: usize,
    pub(crate) answer: Vec<u8>,
    /// The connection is to be closed after it.
    pub(crate) last: bool,
}

impl Board {
    /// For ever. To be made before the first fork: those who are forked later find it where it is here.
    pub(crate) fn new() -> io::Result<&'static Board> {
        // A page that was never written costs nothing.
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: new memory, at no address in particular.
        let place = unsafe { libc::mmap(null_mut(), size_of::<Board>(), access, flags, -1, 0) };
        if place == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: mapped in this size, aligned to a page, zeroed, never unmapped; only atomics, whoever writes to them.
        Ok(unsafe { &*place.cast::<Board>() })
    }

    pub(crate) fn slot(&self, index: usize) -> &Slot {
        &self.slots[index]
    }
}

impl Slot {
    /// By the master, for a new connection.
    pub(crate) fn clear(&self) {
        self.promise.store(0, Relaxed);
        self.busy.store(false, Relaxed);
        self.deaths.store(0, Relaxed);
    }

    /// From here on the answer is sent exactly once.
    pub(crate) fn promise(&self, promise: &Promise) {
        self.withdraw();
        self.written.store(promise.written, Relaxed);
        self.taken.store(promise.taken, Relaxed);
        self.answer.iter().zip(&promise.answer).for_each(|(to, from)| to.store(*from, Relaxed));
        let word = (promise.request as u64) << 32 | (promise.answer.len() as u64) << 1 | u64::from(promise.last);
        // Who sees this sees the above. A worker that dies has come to some point of its program, so its successor sees all before.
        self.promise.store(word, Release);
    }

    pub(crate) fn promised(&self) -> Option<Promise> {
        let word = self.promise.load(Acquire);
        let length = (word as u32 >> 1) as usize;
        (word != 0).then(|| Promise {
            written: self.written.load(Relaxed),
            taken: self.taken.load(Relaxed),
            request: (word >> 32) as usize,
            answer: self.answer[..length].iter().map(|byte| byte.load(Relaxed)).collect(),
            last: word & 1 != 0,
        })
    }

    /// Kept: the answer was sent and the request taken. This connection kills nobody.
    pub(crate) fn kept(&self) {
        self.withdraw();
        self.deaths.store(0, Relaxed);
    }

    fn withdraw(&self) {
        self.promise.store(0, Release);
    }

    pub(crate) fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Relaxed);
    }

    /// By the master: the worker that had this connection is dead, perhaps because of it.
    pub(crate) fn blame(&self) {
        if self.busy.swap(false, Relaxed) {
            self.deaths.fetch_add(1, Relaxed);
        }
    }

    /// How many workers in a row died of the request that is next.
    pub(crate) fn deaths(&self) -> u32 {
        self.deaths.load(Relaxed)
    }
}
