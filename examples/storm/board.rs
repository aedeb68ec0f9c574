//! A board in memory that parent and children share: how far a child came, and what it found.

#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

/// Where a child, or one of its threads, is. What is on the board when a child hangs is what it hangs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Stage {
    Start,
    CleanUp,
    Descriptors,
    Print,
    Log,
    OwnMutex,
    OwnRwLock,
    Condvar,
    OnceLock,
    StdMutex,
    StdRwLock,
    ParkingLot,
    Channel,
    Allocate,
    StartThreads,
    ForkAgain,
    GrandChild,
    JoinThreads,
    Flush,
}

/// As the report names them, in the order of [`Stage`].
pub(crate) const STAGES: [&str; 19] = [
    "start",
    "clean-up",
    "looking at descriptors",
    "println!",
    "log",
    "Mutex",
    "RwLock",
    "Condvar",
    "OnceLock or LazyLock",
    "std Mutex",
    "std RwLock",
    "parking_lot",
    "channel",
    "allocating",
    "starting threads",
    "forking again",
    "waiting for its own child",
    "waiting for its threads",
    "flushing",
];

/// The child's main thread, its two others, and its own child.
pub(crate) const LIVES: usize = 4;

#[derive(Debug)]
pub(crate) struct Slot {
    stage: [AtomicU32; LIVES],
    /// Moves on with everything that happens in the child.
    pub(crate) steps: AtomicU32,
    pub(crate) leaked: AtomicU32,
    pub(crate) wrong: AtomicU32,
    note: [AtomicU8; 128],
}

impl Slot {
    pub(crate) fn clear(&self) {
        for word in self.stage.iter().chain([&self.steps, &self.leaked, &self.wrong]) {
            word.store(0, Relaxed);
        }
        self.note[0].store(0, Relaxed);
    }

    pub(crate) fn at(&self, life: usize, stage: Stage) {
        self.stage[life].store(stage as u32, Relaxed);
        self.steps.fetch_add(1, Relaxed);
    }

    /// Where it is: of a thread that only waits for others, where those are.
    pub(crate) fn place(&self) -> String {
        let name = |life: usize| STAGES[self.stage[life].load(Relaxed) as usize % STAGES.len()];
        let main = self.stage[0].load(Relaxed);
        if main == Stage::GrandChild as u32 {
            return format!("its own child: {}", name(3));
        }
        if main != Stage::JoinThreads as u32 {
            return name(0).to_owned();
        }
        // A thread that has ended stands at 0.
        let at = if self.stage[1].load(Relaxed) != 0 { 1 } else { 2 };
        format!("its threads: {}", name(at))
    }

    /// Keeps the first note.
    pub(crate) fn note(&self, text: &str) {
        if self.note[0].load(Relaxed) != 0 {
            return;
        }
        let (last, body) = self.note.split_last().expect("the board has room");
        for (to, from) in body.iter().zip(text.bytes().chain([0])) {
            to.store(from, Relaxed);
        }
        last.store(0, Relaxed);
    }

    pub(crate) fn read_note(&self) -> String {
        let bytes: Vec<u8> = self.note.iter().map(|b| b.load(Relaxed)).take_while(|&b| b != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Shared slots, zeroed; there for good.
pub(crate) fn shared(count: usize) -> io::Result<&'static [Slot]> {
    let len = count * size_of::<Slot>();
    // SAFETY: a new anonymous mapping, of which nobody else knows; nothing is replaced.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `count` slots fit into the mapping, page aligned, zeroed (valid for atomics), never unmapped; all access, also
    // by children, is atomic.
    Ok(unsafe { std::slice::from_raw_parts(page.cast::<Slot>(), count) })
}
