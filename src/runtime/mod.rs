//! The one static of the process, its start and its threads' seats; in the files beside it the generations, the three at-fork
//! handlers and the start of a program, which share that static.
//!
//! **Invariant:** from the start of `on_prepare` to the end of `on_parent`/`on_child` nothing here allocates, frees, logs,
//! or touches thread-locals that are made on first use (G9): those of this module are const and have no destructor.

#![allow(unsafe_code)]

use crate::at_work::AtWork;
use crate::care_table;
use crate::durations::Clocked;
use crate::error::{ForkError, Report};
use crate::gate::{ANYBODY, Busy, FIRST_BOUND, Gate, Slot, VACANT};
use crate::hook::{self, Calls, Phase};
use crate::hook_list::{HookList, Step};
use crate::passage::{Passage, Stage};
use crate::prepare::{self, Hooks, How, Outcome, Plan, Steps, Wait};
use crate::print_wait;
use crate::slots::SlotTable;
use crate::streams::Streams;
use crate::{clock, started_with, sys, sys_copies, sys_signals};
use std::cell::{Cell, UnsafeCell};
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use Ordering::{AcqRel, Acquire, Relaxed, Release};

mod collected;
mod generation;
mod handlers;
mod nesting;
mod program;

use collected::{Collected, collected};
pub(crate) use generation::*;
pub(crate) use handlers::*;
pub(crate) use nesting::*;
pub(crate) use program::*;

/// All that this library writes around a fork, next to each other: every page that both sides of a fork write is copied twice,
/// at a microsecond or more each. The gate's first seats come last and share the first page.
#[repr(C, align(4096))]
struct State {
    hooks: HookList<Calls>,
    /// Points to the word that the kernel zeroes in a child (G10): 1 where this process is the one it was set in. Until
    /// the start it points to a 0 of ours, so that one comparison finds both.
    alive: AtomicPtr<AtomicU32>,
    /// The process that a child handler has set right, until it is marked alive, or 0: one that is not marked alive and not this
    /// one is a bypass child.
    told: AtomicU32,
    /// How often this line of processes has forked; copied to children, who add one.
    generation: AtomicU64,
    /// The generation whose clean-up has begun.
    cleaning: AtomicU64,
    /// The one whose care-fds it has gone through: what is registered from here on it does not meet.
    cleaned: AtomicU64,
    start: AtomicU32,
    key: AtomicU32,
    off: AtomicBool,
    /// What this process's memory went through, all generations together.
    dirty: AtomicBool,
    bypassed: AtomicBool,
    /// A care-fd that every child closes was registered once: the registry has something to look for.
    closes_at_fork: AtomicBool,
    /// This child registered care-fds before its clean-up.
    young: AtomicBool,
    /// The budget of foreign forks in ns; `u64::MAX` is never (G6).
    foreign_budget: AtomicU64,
    count: Counters,
    waited: Waited,
    at_work: AtWork,
    streams: Streams,
    streams_free_in: AtomicU64,
    gate: Gate<SlotTable>,
}

static STATE: State = State {
    hooks: HookList::new(),
    alive: AtomicPtr::new(&raw const NOT_STARTED as *mut AtomicU32),
    told: AtomicU32::new(0),
    generation: AtomicU64::new(0),
    cleaning: AtomicU64::new(0),
    cleaned: AtomicU64::new(0),
    start: AtomicU32::new(0),
    key: AtomicU32::new(u32::MAX),
    off: AtomicBool::new(false),
    dirty: AtomicBool::new(false),
    bypassed: AtomicBool::new(false),
    closes_at_fork: AtomicBool::new(false),
    young: AtomicBool::new(false),
    foreign_budget: AtomicU64::new(5_000_000_000),
    count: Counters {
        forks: AtomicU64::new(0),
        foreign: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        dirty: AtomicU64::new(0),
        late: AtomicU64::new(0),
        in_region: AtomicU64::new(0),
        thrown_away: AtomicU64::new(0),
        unreported: AtomicU64::new(0),
        programs: AtomicU64::new(0),
    },
    waited: Waited { turn: Clocked::new(), regions: Clocked::new(), hooks: Clocked::new(), fork: Clocked::new() },
    at_work: AtWork::new(),
    streams: Streams::new(),
    streams_free_in: AtomicU64::new(0),
    gate: Gate::new(SlotTable::new()),
};

static NOT_STARTED: AtomicU32 = AtomicU32::new(0);
/// Where there is no such page: at-fork children set it right themselves, a bypass is not noticed.
static UNWIPED: AtomicU32 = AtomicU32::new(1);
const HERE: u32 = 1;
const MENDING: u32 = 2;
/// Mended by a thread that was begun in the child; what the child's first thread has is not known until it comes itself.
const FIRST_AWAY: u32 = 3;

/// Counters for `stats`. Copied to children, who set them to 0.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) forks: AtomicU64,
    pub(crate) foreign: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) dirty: AtomicU64,
    pub(crate) late: AtomicU64,
    pub(crate) in_region: AtomicU64,
    pub(crate) thrown_away: AtomicU64,
    pub(crate) unreported: AtomicU64,
    pub(crate) programs: AtomicU64,
}

/// What forks waited for, for `stats`; written by the role's holder.
#[derive(Debug)]
pub(crate) struct Waited {
    pub(crate) turn: Clocked,
    pub(crate) regions: Clocked,
    pub(crate) hooks: Clocked,
    /// From the commitment to carefork's handler in the parent: other libraries' handlers and libc's fork.
    pub(crate) fork: Clocked,
}

thread_local! {
    static SEAT: Cell<*const Slot> = const { Cell::new(std::ptr::null()) };
    static ROUNDS: Cell<u32> = const { Cell::new(0) };
}

#[inline(always)]
pub(crate) fn gate() -> &'static Gate<SlotTable> {
    &STATE.gate
}

#[inline(always)]
pub(crate) fn hooks() -> &'static HookList<Calls> {
    &STATE.hooks
}

pub(crate) fn count() -> &'static Counters {
    &STATE.count
}

pub(crate) fn waited() -> &'static Waited {
    &STATE.waited
}

/// The hook that a fork is preparing.
pub(crate) fn at_work() -> &'static AtWork {
    &STATE.at_work
}

/// std's streams, and which fork waits for them.
#[inline(always)]
pub(crate) fn streams() -> &'static Streams {
    &STATE.streams
}

/// True for the first to ask in this process.
pub(crate) fn first_clean_up() -> bool {
    let generation = generation_unmarked();
    STATE.cleaning.swap(generation, AcqRel) != generation
}

/// The clean-up has gone through the care-fds.
pub(crate) fn care_fds_cleaned() {
    STATE.cleaned.store(STATE.cleaning.load(Relaxed), Release);
}

/// Whether what this process registers now is its own and not its parent's: a child before its clean-up. To be called inside a
/// region.
#[inline]
pub(crate) fn is_young() -> bool {
    // Acquire: the clean-up's writes to the word come before the registration's.
    let young = STATE.generation.load(Relaxed) != STATE.cleaned.load(Acquire);
    if young {
        STATE.young.store(true, Relaxed);
    }
    young
}

/// This process was cleaned up, or no fork has made it.
#[cfg(feature = "service")]
pub(crate) fn is_cleaned_up() -> bool {
    let generation = generation();
    STATE.cleaned.load(Acquire) == generation
}

/// Before the first registration of its kind.
pub(crate) fn will_close_at_fork() {
    STATE.closes_at_fork.store(true, Relaxed);
}

pub(crate) fn foreign_budget() -> &'static AtomicU64 {
    &STATE.foreign_budget
}

/// The calling thread's seat. One comparison finds a thread without one, a process that has not started, and a child
/// that nobody told (G10). Async-signal-safe.
///
/// # Panics
/// If there is no memory for a new thread's seat and what its forks collect (about 1.5 KiB, of which most threads touch 128 bytes).
#[inline(always)]
pub(crate) fn me() -> &'static Slot {
    let seat = SEAT.get();
    // SAFETY: `alive` points to a static or to a mapping that is never unmapped.
    let alive = unsafe { &*STATE.alive.load(Relaxed) };
    if !seat.is_null() && alive.load(Relaxed) == HERE {
        // SAFETY: seats are never unmapped.
        return unsafe { &*seat };
    }
    me_slow()
}

/// The calling thread's seat if it has one.
#[inline(always)]
fn seated() -> Option<&'static Slot> {
    // SAFETY: seats are never unmapped.
    unsafe { SEAT.get().as_ref() }
}

#[cold]
#[inline(never)]
fn me_slow() -> &'static Slot {
    match try_me_slow() {
        Some(s) => s,
        None => panic!("carefork: no memory for a thread's seat (mmap failed)"),
    }
}

/// `me`, or `None` where there is no memory. Async-signal-safe.
pub(crate) fn try_me() -> Option<&'static Slot> {
    // SAFETY: as in `me`.
    let alive = unsafe { &*STATE.alive.load(Relaxed) };
    match seated() {
        Some(s) if alive.load(Relaxed) == HERE => Some(s),
        _ => try_me_slow(),
    }
}

fn try_me_slow() -> Option<&'static Slot> {
    start();
    check_generation();
    if let Some(s) = seated() {
        return Some(s);
    }
    // A signal handler that needs a seat in the middle of this would take a second one.
    let mask = sys_signals::block_all();
    let mut s = STATE.gate.seats.claim(sys::gettid());
    if let Some(without) = s
        && !collected::ready(without)
    {
        without.tid.store(VACANT, Release);
        s = None;
    }
    if let Some(s) = s {
        s.passage.clear();
        s.rank.store(ANYBODY, Relaxed);
        let name = sys::thread_name();
        for (word, bytes) in s.name.iter().zip(name.as_chunks::<8>().0) {
            word.store(u64::from_ne_bytes(*bytes), Relaxed);
        }
        SEAT.set(s);
        arm_thread_end(s);
    }
    sys_signals::set_mask(&mask);
    s
}

// -- the thread's end

/// POSIX runs thread-specific destructors for this many rounds at least, and glibc and musl for no more.
const LAST_ROUND: u32 = 3;

fn arm_thread_end(s: &Slot) {
    let key = STATE.key.load(Relaxed);
    if key != u32::MAX {
        // SAFETY: `key` was created by `start` and is never deleted. Keys made as early as ours have their place in the
        // thread's own block: no allocation.
        unsafe { libc::pthread_setspecific(key, std::ptr::from_ref(s).cast()) };
    }
}

/// Other destructors may still enter regions (G12): the seat is kept to the last round.
extern "C" fn thread_ends(seat: *mut libc::c_void) {
    let round = ROUNDS.get() + 1;
    ROUNDS.set(round);
    // SAFETY: the value was set by `arm_thread_end`; seats are never unmapped.
    let s = unsafe { &*seat.cast::<Slot>() };
    if round < LAST_ROUND {
        arm_thread_end(s);
        return;
    }
    SEAT.set(std::ptr::null());
    ROUNDS.set(0);
    s.clear();
    STATE.gate.left();
    s.tid.store(VACANT, Release);
}

// -- the start

#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = at_start;

/// As early as can be: the handler registered first prepares last, and runs first in the child.
extern "C" fn at_start() {
    start();
}

#[inline]
fn start() {
    if STATE.start.load(Acquire) != 2 {
        start_slow();
    }
}

#[cold]
fn start_slow() {
    if STATE.start.compare_exchange(0, 1, AcqRel, Acquire).is_err() {
        while STATE.start.load(Acquire) == 1 {
            sys::yield_now();
        }
        return;
    }
    started_with::note();
    let mut key: libc::pthread_key_t = 0;
    // SAFETY: `key` is live; `thread_ends` has the signature asked for and code that stays loaded.
    if unsafe { libc::pthread_key_create(&mut key, Some(thread_ends)) } == 0 {
        STATE.key.store(key, Relaxed);
    }
    let alive = match sys::map_wiped(sys::PAGE) {
        Ok((page, true)) => page.cast::<AtomicU32>(),
        _ => &raw const UNWIPED as *mut AtomicU32,
    };
    // SAFETY: a fresh zeroed mapping or a static.
    unsafe { &*alive }.store(HERE, Relaxed);
    STATE.alive.store(alive, Release);
    if !sys::membarrier_register() || !sys::membarrier() {
        STATE.gate.use_fences();
    }
    STATE.off.store(sys::env_is(c"CAREFORK", "off"), Relaxed);
    if !sys_copies::is_first_copy() {
        sys::say(
            b"carefork: two copies of carefork are loaded in this process (a plugin brought its own?): the regions and \
              care-fds of each are unknown to the other's users\n",
        );
    }
    // SAFETY: the three handlers stay loaded; an executable's or library's code that is never unloaded (P2).
    let r = unsafe { libc::pthread_atfork(Some(on_prepare), Some(on_parent), Some(on_child)) };
    if r != 0 {
        // Without handlers nothing of what this library promises holds.
        sys::say(b"carefork: pthread_atfork failed: out of memory at start; forks are not guarded\n");
    }
    STATE.start.store(2, Release);
}

/// Whether the gate works: it is registered, and not turned off.
pub(crate) fn is_off() -> bool {
    STATE.off.load(Relaxed)
}
