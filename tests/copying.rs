//! The gate while the kernel copies a large process: page by page, for longer than waiters wait (G11).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;

use carefork::testing::advance;
use carefork::{Fork, ForkOptions, lineage, no_forking, stats, try_no_forking};
use common::{Verdict, check, isolated, raw, reap};
use drive::{BOTH, Kind, MS, SOON, Stop, foreign, freeze, until};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Instant;

extern "C" fn early_prepare() {
    let act = ACT.load(SeqCst);
    if !act.is_null() {
        // SAFETY: only functions of this type are stored there.
        let act: fn() = unsafe { std::mem::transmute(act) };
        act();
    }
}
extern "C" fn nothing() {}
early_foreign_handlers!(early_prepare, nothing, nothing);

/// What a handler does between carefork's commitment and the fork.
static ACT: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());
/// Driven time in 0.1 ms.
static TIME: AtomicU32 = AtomicU32::new(0);
static AT_WORK: AtomicBool = AtomicBool::new(false);
static THROUGH: AtomicBool = AtomicBool::new(false);

fn fork(kind: Kind, f: impl FnOnce() -> i32) -> i32 {
    match kind {
        // SAFETY: each `f` keeps to what a child may do.
        Kind::Coordinated => match unsafe { ForkOptions::new().timeout_never().fork() }.expect("a child") {
            Fork::Parent(child) => libc::pid_t::try_from(child.into_id()).expect("a pid"),
            Fork::Child(_token) => raw::exit_now(f()),
        },
        Kind::Foreign => foreign(f),
    }
}

/// Forks while the handler does `act`, time goes on until `end`, slower than the real one, and another thread waits at the gate.
fn fork_with_a_waiter(kind: Kind, act: fn(), end: u32) {
    freeze();
    TIME.store(0, SeqCst);
    AT_WORK.store(false, SeqCst);
    THROUGH.store(false, SeqCst);
    ACT.store(act as *mut (), SeqCst);
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        let _stop = Stop(&stop);
        s.spawn(|| {
            while !stop.load(SeqCst) && TIME.load(SeqCst) < end {
                advance(MS / 10);
                TIME.fetch_add(1, SeqCst);
                thread::sleep(MS / 5);
            }
        });
        s.spawn(|| {
            until(|| AT_WORK.load(SeqCst));
            drop(no_forking());
            THROUGH.store(true, SeqCst);
        });
        let pid = fork(kind, || i32::from(lineage().dirty));
        let dirty = kind == Kind::Foreign && stats().late > 0;
        assert_eq!(reap(pid, SOON), Verdict::Exited(dirty.into()));
        until(|| THROUGH.load(SeqCst));
    });
}

/// Three times as long as waiters wait for a fork that does nothing.
const LONG: u32 = 3000;

/// Keeps the kernel busy for this thread.
fn one_call(bytes: usize) {
    static ROOM: [AtomicU64; 1 << 17] = [const { AtomicU64::new(0) }; 1 << 17];
    // SAFETY: atomics may be written by anyone; nobody looks at them.
    unsafe { libc::getrandom(ROOM.as_ptr().cast_mut().cast(), bytes.min(size_of_val(&ROOM)), 0) };
}

/// As the kernel does while it copies page tables.
fn works_in_the_kernel() {
    AT_WORK.store(true, SeqCst);
    while TIME.load(SeqCst) < LONG {
        one_call(usize::MAX);
    }
}

#[test]
fn a_fork_at_work_is_waited_for() {
    isolated("a_fork_at_work_is_waited_for", 240, || {
        for kind in BOTH {
            fork_with_a_waiter(kind, works_in_the_kernel, LONG);
        }
        let s = stats();
        assert_eq!((s.forks, s.foreign, s.reopened, s.late, s.thrown_away), (1, 1, 0, 0, 0));
    });
}

/// Another library's handler may wait for the very thread that waits at the gate, and use the processor meanwhile.
#[test]
fn a_handler_that_spins_is_not() {
    fn spins() {
        AT_WORK.store(true, SeqCst);
        while !THROUGH.load(SeqCst) {
            one_call(16_384);
            (0..10_000).for_each(|_| std::hint::spin_loop());
        }
    }
    isolated("a_handler_that_spins_is_not", 240, || {
        for kind in BOTH {
            fork_with_a_waiter(kind, spins, u32::MAX);
        }
        // The coordinated one gives way and comes back to a handler that has nothing to wait for.
        let s = stats();
        assert_eq!((s.forks, s.foreign, s.reopened, s.late, s.thrown_away), (1, 1, 2, 1, 1));
    });
}

const LARGE: usize = 640 << 20;

/// Two words far apart in memory, copied by the kernel at different times.
struct Words {
    first: NonNull<AtomicU64>,
    last: NonNull<AtomicU64>,
}

// SAFETY: atomics in a mapping that is never unmapped.
unsafe impl Sync for Words {}

impl Words {
    fn new() -> Words {
        let (read_write, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), LARGE, read_write, kind, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: small pages, so that there are many to copy.
        assert_eq!(unsafe { libc::madvise(start, LARGE, libc::MADV_NOHUGEPAGE) }, 0);
        let start = NonNull::new(start.cast::<u8>()).expect("a mapping");
        for page in (0..LARGE).step_by(4096) {
            // SAFETY: inside the mapping.
            unsafe { start.add(page).write(1) };
        }
        // SAFETY: inside the mapping.
        let last = unsafe { start.add(LARGE - 4096) };
        let words = Words { first: start.cast(), last: last.cast() };
        words.both().iter().for_each(|w| w.store(0, SeqCst));
        words
    }

    fn both(&self) -> [&AtomicU64; 2] {
        // SAFETY: aligned words of a mapping that is never unmapped, used as atomics only.
        [self.first, self.last].map(|w| unsafe { w.as_ref() })
    }

    fn are_the_same(&self) -> bool {
        let [first, last] = self.both();
        first.load(SeqCst) == last.load(SeqCst)
    }
}

/// Set while a call is under way that the kernel puts off until a copy is made.
static ASKING: AtomicBool = AtomicBool::new(false);

/// Asks for nothing, time and again, but needs what the copying kernel holds.
fn asks(words: &Words, over: &AtomicBool) {
    let mut resident = 0u8;
    while !over.load(SeqCst) {
        ASKING.store(true, SeqCst);
        // SAFETY: a page of a mapping that is never unmapped, and one byte for it.
        unsafe { libc::mincore(words.first.as_ptr().cast(), 4096, &raw mut resident) };
        ASKING.store(false, SeqCst);
        thread::sleep(MS / 20);
    }
}

/// The kernel copies, or somebody is off its processor.
fn seems_to_copy() -> bool {
    let begun = Instant::now();
    while ASKING.load(SeqCst) {
        if begun.elapsed() > MS {
            return true;
        }
    }
    false
}

/// Forks, and lets so much time pass in the middle of the copy that whoever waits at the gate reopens it.
fn fork_with_one_impatient(words: &Words, kind: Kind, child: impl FnOnce() -> i32) -> i32 {
    let over = AtomicBool::new(false);
    thread::scope(|s| {
        let _over = Stop(&over);
        s.spawn(|| asks(words, &over));
        s.spawn(|| {
            while !over.load(SeqCst) {
                match try_no_forking() {
                    // Where the fork has stepped back it comes again when some time has passed.
                    Some(_) => advance(MS),
                    None if seems_to_copy() => advance(100 * MS),
                    None => {}
                }
                thread::sleep(MS / 20);
            }
        });
        fork(kind, child)
    })
}

/// A waiter reopens the gate in the middle of the copy, where the child's copy of the gate is long made: the child must know.
#[test]
fn a_gate_reopened_while_the_kernel_copies() {
    isolated("a_gate_reopened_while_the_kernel_copies", 240, || {
        let words = Words::new();
        freeze();
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _stop = Stop(&stop);
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    let _region = no_forking();
                    // What is copied last first: the other one's page may be the child's too by now, and the write wait for the copy.
                    for w in words.both().into_iter().rev() {
                        w.fetch_add(1, SeqCst);
                    }
                }
            });
            let mut round = 0;
            // As often as it takes: how far the copy is when the waiter looks is the scheduler's choice.
            while stats().late < 2 || stats().thrown_away < 2 {
                let kind = BOTH[round % 2];
                let pid = fork_with_one_impatient(&words, kind, || {
                    check(1, lineage().dirty || words.are_the_same());
                    0
                });
                assert_eq!(reap(pid, SOON), Verdict::Exited(0), "round {round}, {kind:?}");
                round += 1;
            }
        });
    });
}
