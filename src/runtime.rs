//! The one static of the process, its start, its threads' seats, and the three at-fork handlers.
//!
//! **Invariant:** from the start of `on_prepare` to the end of `on_parent`/`on_child` nothing here allocates, frees, logs,
//! or touches thread-locals that are made on first use (G9): the two below are const and have no destructor.

#![allow(unsafe_code)]

use crate::care_table;
use crate::durations::Clocked;
use crate::error::{ForkError, Report};
use crate::gate::{Busy, FIRST_BOUND, Gate, Slot, VACANT};
use crate::hook::{self, Hook, Phase};
use crate::hook_list::HookList;
use crate::prepare::{self, Hooks, How, Outcome, Plan, Steps, Wait};
use crate::print_wait::{self, WaitWord};
use crate::slots::SlotTable;
use crate::verdict::Pages;
use crate::{clock, sys};
use std::cell::{Cell, UnsafeCell};
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use Ordering::{AcqRel, Acquire, Relaxed, Release};

/// All that this library writes around a fork, next to each other: every page that both sides of a fork write is copied twice,
/// at a microsecond or more each. The gate's first seats come last and share the first page.
#[repr(C, align(4096))]
struct State {
    hooks: HookList<Hook>,
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
    print_wait: WaitWord,
    verdicts: Pages,
    tickets: AtomicU32,
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
    print_wait: WaitWord::new(),
    verdicts: Pages::new(),
    tickets: AtomicU32::new(1),
    gate: Gate::new(SlotTable::new()),
};

static NOT_STARTED: AtomicU32 = AtomicU32::new(0);
/// Where there is no such page: at-fork children set it right themselves, a bypass is not noticed.
static UNWIPED: AtomicU32 = AtomicU32::new(1);
const HERE: u32 = 1;
const MENDING: u32 = 2;

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
    /// How far this thread's fork is. Beside the passage, because hooks come back here while a handler is at work on that.
    static STAGE: Cell<Stage> = const { Cell::new(Stage::None) };
    /// Forks that a hook or another library's handler made while this one was under way.
    static NESTED: Cell<u32> = const { Cell::new(0) };
    /// What the prepare handler leaves for the parent or child handler on the same thread.
    static PASSAGE: UnsafeCell<Passage> = const { UnsafeCell::new(Passage::NONE) };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    None,
    /// A handler is at work, on the way to a commitment or back from it: a fork on this thread is nested, made by a hook.
    Working,
    /// Gate shut by this word, hooks prepared, role held.
    Committed(u32),
    /// A coordinated fork that will not be: libc forks all the same, the child ends at once.
    Refused,
    /// A foreign fork past its budget, or against a veto.
    Dirty,
    /// In the child, `on_child` has done its work already (another library's child handler came here first).
    Mended,
}

struct Passage {
    errno: i32,
    /// Where errno is: a child that asks libc for it touches another page of code.
    errno_at: *mut i32,
    /// Something was left out: budget, veto.
    dirty: bool,
    /// The gate is open: the registry marks what is registered meanwhile.
    marking: bool,
    /// The mask from before, while signals are blocked. A coordinated fork takes it from here (`passed`).
    mask: Option<sys::SigSet>,
    /// When the prepare handler returned.
    begun: u64,
    /// In the parent: a waiter had reopened the gate when its handler came.
    reopened: bool,
    /// In the child: a coordinated fork made it.
    coordinated: bool,
    /// What a coordinated fork has collected. Here and not with its request, so that the frames below libc's fork are small: each
    /// page of them is copied on both sides.
    report: ManuallyDrop<Report>,
    busy: Busy,
}

impl Passage {
    const NONE: Passage = Passage {
        errno: 0,
        errno_at: std::ptr::null_mut(),
        dirty: false,
        marking: false,
        mask: None,
        begun: 0,
        reopened: false,
        coordinated: false,
        report: ManuallyDrop::new(Report::new()),
        busy: Busy::NONE,
    };

    /// Before a fork's first try: nobody is in its way yet. Looks first, since most forks meet nobody.
    fn forget(&mut self) {
        self.report.forget();
        if self.busy.count != 0 {
            self.busy = Busy::NONE;
        }
    }
}

/// What the handlers leave for the coordinated fork on this thread.
#[derive(Debug)]
pub(crate) struct Passed {
    /// The mask from before: signals are blocked still.
    pub(crate) mask: Option<sys::SigSet>,
    /// The parent found its gate reopened after commitment: the child knows whether before the fork or after.
    pub(crate) ask_child: bool,
}

/// After libc's fork, in the thread that called it. Async-signal-safe.
pub(crate) fn passed() -> Passed {
    // SAFETY: as in `on_prepare`.
    let passage = unsafe { &mut *PASSAGE.with(UnsafeCell::get) };
    Passed { mask: passage.mask.take(), ask_child: std::mem::take(&mut passage.reopened) }
}

/// Before a coordinated fork's first try. Async-signal-safe.
pub(crate) fn forget_report() {
    // SAFETY: as in `on_prepare`.
    unsafe { &mut *PASSAGE.with(UnsafeCell::get) }.forget();
}

/// Why this thread's coordinated fork was refused.
pub(crate) fn take_report() -> Report {
    // SAFETY: as in `on_prepare`.
    let passage = unsafe { &mut *PASSAGE.with(UnsafeCell::get) };
    passage.report.busy = passage.busy;
    ManuallyDrop::into_inner(std::mem::replace(&mut passage.report, ManuallyDrop::new(Report::new())))
}

/// A coordinated fork's side of the handlers; lives on the stack of `fork`, named by the seat (`Slot::request`).
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) deadline: Option<u64>,
    pub(crate) let_go_at: Option<u64>,
    pub(crate) bound: u64,
    /// Names this fork in the verdict word.
    pub(crate) ticket: u32,
    /// What became of it, for the parent.
    pub(crate) outcome: Option<Outcome>,
}

#[inline(always)]
pub(crate) fn gate() -> &'static Gate<SlotTable> {
    &STATE.gate
}

#[inline(always)]
pub(crate) fn hooks() -> &'static HookList<Hook> {
    &STATE.hooks
}

pub(crate) fn count() -> &'static Counters {
    &STATE.count
}

pub(crate) fn waited() -> &'static Waited {
    &STATE.waited
}

/// Which fork waits for std's streams.
pub(crate) fn print_wait() -> &'static WaitWord {
    &STATE.print_wait
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

/// Names a coordinated fork in its verdict word.
pub(crate) fn next_ticket() -> u32 {
    STATE.tickets.fetch_add(1, Relaxed)
}

pub(crate) fn verdicts() -> &'static Pages {
    &STATE.verdicts
}

pub(crate) fn foreign_budget() -> &'static AtomicU64 {
    &STATE.foreign_budget
}

/// The calling thread's seat. One comparison finds a thread without one, a process that has not started, and a child
/// that nobody told (G10). Async-signal-safe.
///
/// # Panics
/// If there is no memory for a new thread's seat (a page for each 32 threads).
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
    let mask = sys::block_all();
    let s = STATE.gate.seats.claim(sys::gettid());
    if let Some(s) = s {
        let name = sys::thread_name();
        for (word, bytes) in s.name.iter().zip(name.as_chunks::<8>().0) {
            word.store(u64::from_ne_bytes(*bytes), Relaxed);
        }
        SEAT.set(s);
        arm_thread_end(s);
    }
    sys::set_mask(&mask);
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
    if !sys::is_only_copy() {
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

// -- generation

/// A bypass child comes here on its first call (G10).
#[inline]
pub(crate) fn check_generation() {
    // SAFETY: as in `me`.
    let alive = unsafe { &*STATE.alive.load(Relaxed) };
    if alive.load(Acquire) != HERE {
        mend(alive);
    }
}

pub(crate) fn generation() -> u64 {
    start();
    check_generation();
    STATE.generation.load(Relaxed)
}

/// Whether this process is the one of `generation`: false in every child of it, also one that has not found out yet. Async-signal-safe.
pub(crate) fn is_still(generation: u64) -> bool {
    // SAFETY: as in `me`.
    let alive = unsafe { &*STATE.alive.load(Relaxed) };
    alive.load(Acquire) == HERE && STATE.generation.load(Relaxed) == generation
}

/// The generation's low bits, for a thread that has called `me` already.
#[inline]
pub(crate) fn generation_here() -> u32 {
    STATE.generation.load(Relaxed) as u32
}

pub(crate) fn dirty() -> bool {
    STATE.dirty.load(Relaxed)
}

pub(crate) fn bypassed() -> bool {
    STATE.bypassed.load(Relaxed)
}

#[cold]
fn mend(alive: &AtomicU32) {
    if was_told() && alive.compare_exchange(0, HERE, AcqRel, Acquire).is_ok() {
        // Only the mark was missing.
        forget_told();
        return;
    }
    // A handler that came here in the middle would wait for the thread that it has interrupted.
    let mask = sys::block_all();
    if alive.compare_exchange(0, MENDING, AcqRel, Acquire).is_err() {
        sys::set_mask(&mask);
        while alive.load(Acquire) == MENDING {
            sys::yield_now();
        }
        return;
    }
    if !matches!(STAGE.get(), Stage::None | Stage::Working | Stage::Mended) {
        // A real at-fork child in which another library's handler came here before ours.
        // SAFETY: as in `on_prepare`; it has returned, and `on_child` has not begun.
        become_child(unsafe { &mut *PASSAGE.with(UnsafeCell::get) });
    } else {
        // Turned off, no child is told, and every one may be a real one.
        if is_off() { &STATE.dirty } else { &STATE.bypassed }.store(true, Relaxed);
        take_over(true);
        abandon_hooks();
        if let Some(s) = seated() {
            s.set_entered(false);
        }
    }
    alive.store(HERE, Release);
    forget_told();
    sys::set_mask(&mask);
}

/// The mark is set: the number has served. A bypass child in a PID namespace of its own may have the same one.
fn forget_told() {
    // Release pairs with the Acquire in `was_told`: who finds it forgotten finds the mark.
    STATE.told.store(0, Release);
}

/// The child handler has set this process right, and nothing but the mark is missing: setting it costs a page, which most
/// children never need.
fn was_told() -> bool {
    STATE.told.load(Acquire) == sys::getpid()
}

/// As `generation() == 0`, without setting the mark of a child that has none yet. Async-signal-safe.
pub(crate) fn is_no_child() -> bool {
    generation_unmarked() == 0
}

fn generation_unmarked() -> u64 {
    if was_told() { STATE.generation.load(Relaxed) } else { generation() }
}

/// In a child: its thread is alone, whatever the words say.
fn take_over(ghosts: bool) {
    let pid = sys::getpid();
    STATE.told.store(pid, Relaxed);
    STATE.generation.fetch_add(1, Relaxed);
    let me = seated();
    STATE.gate.seats.keep_only(me, ghosts);
    if ghosts {
        STATE.gate.set_ghosts();
    }
    STATE.gate.reset();
    STATE.verdicts.forget();
    if let Some(s) = me {
        // A child's one thread has the number of the process.
        s.tid.store(pid, Relaxed);
        s.request.store(std::ptr::null_mut(), Relaxed);
    }
    for c in [
        &STATE.count.forks,
        &STATE.count.foreign,
        &STATE.count.refused,
        &STATE.count.dirty,
        &STATE.count.late,
        &STATE.count.in_region,
        &STATE.count.thrown_away,
        &STATE.count.unreported,
        &STATE.count.programs,
        &STATE.gate.reopened,
    ] {
        c.store(0, Relaxed);
    }
    let Waited { turn, regions, hooks, fork } = &STATE.waited;
    [turn, regions, hooks, fork].into_iter().for_each(Clocked::reset);
    STATE.print_wait.clear();
    grow_up();
}

/// What a parent registered for itself before its clean-up is its parent's here.
fn grow_up() {
    if STATE.young.load(Relaxed) {
        STATE.young.store(false, Relaxed);
        care_table::grow_up();
    }
}

// -- the handlers

/// What libc's fork would have called, round a fork that calls nothing. Async-signal-safe, as are the other two.
pub(crate) fn prepare_by_hand() {
    on_prepare();
}

/// In the parent, also where no child was made: errno says so.
pub(crate) fn parent_by_hand() {
    on_parent();
}

pub(crate) fn child_by_hand() {
    on_child();
}

struct Handlers<'a> {
    mask: &'a mut Option<sys::SigSet>,
    coordinated: bool,
    report: &'a mut Report,
    /// A foreign fork that met a veto: goes ahead without that hook, dirty.
    vetoed: bool,
}

impl Steps for Handlers<'_> {
    fn block_signals(&mut self) {
        if self.mask.is_none() {
            *self.mask = Some(sys::block_all());
        }
    }

    fn restore_signals(&mut self) {
        if let Some(mask) = self.mask.take() {
            sys::set_mask(&mask);
        }
    }

    fn hooks(&mut self, how: How) -> Hooks {
        self.vetoed = false;
        let mut end = Hooks::Ready;
        let timed = STATE.hooks.len() <= hook::TIMED;
        let mut now = clock::now();
        let all = STATE.hooks.prepare(|h| {
            let step = hook::prepare(&STATE.hooks, h, how, self.coordinated, self.report, &mut self.vetoed, &mut end);
            if timed {
                let begun = std::mem::replace(&mut now, clock::now());
                h.took(now.saturating_sub(begun));
            }
            step
        });
        if STATE.print_wait.take_long() {
            // Where the budget ends before the fork, this is what has used it up.
            self.report.hook = Some(print_wait::HOOK);
        }
        if !all {
            self.undo();
        }
        end
    }

    fn undo(&mut self) {
        finish_hooks(Phase::Undo);
    }

    fn waited(&mut self, what: Wait, ns: u64) {
        match what {
            Wait::Turn => &STATE.waited.turn,
            Wait::Regions => &STATE.waited.regions,
            Wait::Hooks => &STATE.waited.hooks,
        }
        .note(ns);
    }
}

/// In a child whose fork has not prepared the hooks.
fn abandon_hooks() {
    STATE.hooks.reset();
    STATE.hooks.each_linked(Hook::abandon);
}

fn finish_hooks(phase: Phase) {
    STATE.hooks.finish(|h| {
        if !hook::call(h, phase) {
            STATE.count.unreported.fetch_add(1, Relaxed);
        }
    });
}

/// Shuts the gate and prepares the hooks, for coordinated and foreign forks alike (G2).
extern "C" fn on_prepare() {
    if is_off() {
        return;
    }
    if STAGE.get() != Stage::None {
        NESTED.set(NESTED.get() + 1);
        return;
    }
    // SAFETY: the passage is this thread's own, and one handler at a time is at work on it: what comes back here meanwhile, from a
    // hook, goes by `STAGE` and `NESTED`.
    let passage = unsafe { &mut *PASSAGE.with(UnsafeCell::get) };
    passage.errno = sys::errno();
    passage.errno_at = sys::errno_place();
    STAGE.set(Stage::Working);
    let Some(me) = try_me() else {
        STAGE.set(Stage::Dirty);
        return;
    };
    // SAFETY: the request lives on the stack of `fork`, which is below this frame on the same thread, and `fork` looks
    // at it again only after libc's fork has returned.
    let request = unsafe { me.request.load(Relaxed).cast::<Request>().as_mut() };
    match request {
        Some(request) => prepare_coordinated(me, request, passage),
        None => prepare_foreign(me, passage),
    }
    passage.begun = clock::now();
    // After a failure libc leaves its errno for the parent handlers; after a success nothing touches this 0.
    sys::set_errno(0);
}

fn prepare_coordinated(me: &Slot, request: &mut Request, passage: &mut Passage) {
    let plan =
        Plan { coordinated: true, deadline: request.deadline, let_go_at: request.let_go_at, bound: request.bound };
    let mut steps = Handlers { mask: &mut passage.mask, coordinated: true, report: &mut passage.report, vetoed: false };
    let outcome = prepare::prepare(&STATE.gate, me, &mut steps, &plan, &mut passage.busy);
    look_for_print_wait(outcome, &mut passage.report);
    request.outcome = Some(outcome);
    STAGE.set(match outcome {
        Outcome::Committed(shut) => Stage::Committed(shut),
        _ => Stage::Refused,
    });
}

fn prepare_foreign(me: &Slot, passage: &mut Passage) {
    STATE.count.foreign.fetch_add(1, Relaxed);
    if me.in_guard() {
        STATE.count.in_region.fetch_add(1, Relaxed);
    }
    passage.forget();
    let budget = STATE.foreign_budget.load(Relaxed);
    let deadline = (budget != u64::MAX).then(|| clock::now().saturating_add(budget));
    let plan = Plan { coordinated: false, deadline, let_go_at: None, bound: FIRST_BOUND };
    let mut steps =
        Handlers { mask: &mut passage.mask, coordinated: false, report: &mut passage.report, vetoed: false };
    let outcome = prepare::prepare(&STATE.gate, me, &mut steps, &plan, &mut passage.busy);
    let vetoed = steps.vetoed;
    STAGE.set(match outcome {
        Outcome::Committed(shut) => Stage::Committed(shut),
        _ => Stage::Dirty,
    });
    if vetoed || STAGE.get() == Stage::Dirty {
        passage.dirty = true;
        STATE.count.dirty.fetch_add(1, Relaxed);
        passage.report.busy = passage.busy;
        look_for_print_wait(outcome, &mut passage.report);
        if !passage.report.say(outcome) {
            STATE.count.unreported.fetch_add(1, Relaxed);
        }
        passage.report.forget();
    }
    if STAGE.get() == Stage::Dirty {
        passage.marking = true;
        care_table::dirty_begins();
    }
    if STAGE.get() == Stage::Dirty
        && let Some(mask) = passage.mask.take()
    {
        sys::set_mask(&mask);
    }
}

/// A fork that ran out of time may have queued behind one that waits for a stream; its own wait is over. One that has only
/// begun is not to blame.
fn look_for_print_wait(outcome: Outcome, report: &mut Report) {
    if outcome == Outcome::Busy {
        let waiting = STATE.print_wait.look(clock::now());
        report.print_wait = waiting.filter(|w| w.waited >= Duration::from_nanos(print_wait::LONG));
    }
}

extern "C" fn on_parent() {
    if is_off() {
        return;
    }
    if NESTED.get() > 0 {
        NESTED.set(NESTED.get() - 1);
        return;
    }
    // SAFETY: as in `on_prepare`.
    let passage = unsafe { &mut *PASSAGE.with(UnsafeCell::get) };
    let errno = sys::errno();
    let stage = STAGE.replace(Stage::Working);
    let Some(me) = seated() else {
        STAGE.set(Stage::None);
        return;
    };
    let mut ours = true;
    if let Stage::Committed(shut) = stage {
        STATE.waited.fork.note(clock::now().saturating_sub(passage.begun));
        let phase = if has_failed(errno) { Phase::Undo } else { Phase::Parent };
        finish_hooks(phase);
        ours = STATE.gate.reopen(shut);
        if !ours {
            STATE.gate.was_reopened(shut);
        }
        STATE.gate.drop_role(me);
    }
    if passage.marking {
        care_table::dirty_ends();
    }
    passage.reopened = !ours;
    let coordinated = !me.request.load(Relaxed).is_null();
    if !ours && !coordinated {
        STATE.count.late.fetch_add(1, Relaxed);
    }
    pass_mask(passage, coordinated);
    STAGE.set(Stage::None);
    sys::set_errno(if errno == 0 { passage.errno } else { errno });
}

/// Whether libc's fork failed, by the errno that it leaves for the parent handlers. Those of other libraries that ran before ours
/// may have left any other.
fn has_failed(errno: i32) -> bool {
    matches!(errno, libc::EAGAIN | libc::ENOMEM | libc::ENOSYS | libc::EPERM)
}

/// The mask is put back at once after a foreign fork; a coordinated one does it itself, when it knows the child (`passed`).
fn pass_mask(passage: &mut Passage, coordinated: bool) {
    passage.dirty = false;
    passage.marking = false;
    if !coordinated && let Some(mask) = passage.mask.take() {
        sys::set_mask(&mask);
    }
}

/// Registered first, so it runs first in the child: a child that is not to be ends before anyone else's handler.
extern "C" fn on_child() {
    if is_off() {
        grow_up();
        close_at_fork();
        return;
    }
    // SAFETY: as in `on_prepare`. In the child of a hook's own fork a handler is at work still, and goes on if that hook returns
    // here: with whatever this leaves.
    let passage = unsafe { &mut *PASSAGE.with(UnsafeCell::get) };
    if NESTED.replace(0) > 0 {
        // Forked by a hook: nothing was agreed with anyone.
        STAGE.set(Stage::Dirty);
        passage.dirty = true;
        abandon_hooks();
    }
    let errno = passage.errno;
    if STAGE.get() != Stage::Mended {
        become_child(passage);
    }
    STAGE.set(Stage::None);
    let coordinated = std::mem::take(&mut passage.coordinated);
    pass_mask(passage, coordinated);
    // SAFETY: `on_prepare` stored this thread's own errno location, and the child's one thread has it at the same address.
    unsafe { *passage.errno_at = errno };
}

/// What `on_child` does, whichever handler of the child comes first.
fn become_child(passage: &mut Passage) {
    let me = seated();
    let request = me.map_or(std::ptr::null_mut(), |m| m.request.load(Relaxed)).cast::<Request>();
    // SAFETY: as in `on_prepare`; the request is this child's copy of the forking thread's stack.
    let request = unsafe { request.as_ref() };
    passage.coordinated = request.is_some();
    let mut clean = !passage.dirty;
    let mut hooks = false;
    let mut late = false;
    match STAGE.get() {
        Stage::Refused => sys::exit_now(0),
        Stage::Committed(shut) => {
            hooks = true;
            if !STATE.gate.still_shut(shut) {
                clean = false;
                late = true;
                if let Some(request) = request {
                    STATE.verdicts.say(me, request.ticket, false);
                    sys::exit_now(0);
                }
            }
        }
        Stage::Dirty => clean = false,
        // Nothing was shut: as after a plain fork, but nobody is to be blamed.
        Stage::None | Stage::Working | Stage::Mended => clean = false,
    }
    if let (Some(request), true) = (request, hooks) {
        STATE.verdicts.say(me, request.ticket, true);
    }
    if !clean {
        STATE.dirty.store(true, Relaxed);
    }
    take_over(!clean);
    // From here on hooks may use regions: also where this runs under `mend`.
    // SAFETY: as in `me`.
    let alive = unsafe { &*STATE.alive.load(Relaxed) };
    if alive.load(Relaxed) == MENDING {
        alive.store(HERE, Release);
    }
    if hooks {
        STATE.hooks.forget_waiters();
        finish_hooks(Phase::Child);
    } else {
        abandon_hooks();
    }
    if passage.marking || late {
        care_table::dirty_child();
    } else {
        care_table::no_dirty_forks();
    }
    close_at_fork();
    if late
        && !sys::say(
            b"carefork: this child of a fork by foreign code is dirty: the fork took so long that a waiting thread reopened the gate\n",
        )
    {
        STATE.count.unreported.fetch_add(1, Relaxed);
    }
    if let Some(me) = me {
        me.set_entered(false);
    }
    STAGE.set(Stage::Mended);
}

fn close_at_fork() {
    if STATE.closes_at_fork.load(Relaxed) {
        care_table::close_at_fork();
    }
}

// -- the start of a program

/// The gate, shut as for a fork, for the start of a program by a child that shares this memory (exec_start.rs). No hook is run: the
/// child reaches no lock.
#[derive(Debug)]
pub(crate) struct Start {
    /// `None` where the gate is turned off.
    shut: Option<(&'static Slot, u32)>,
    mask: sys::SigSet,
}

impl Start {
    /// Waits until no other thread is in a region. After `Ok` the gate is shut, and every signal blocked on this thread, libc's own as
    /// well: no handler of theirs may run in the child, which has this thread's thread-local storage.
    pub(crate) fn begin(deadline: Option<u64>) -> Result<Start, ForkError> {
        generation();
        if is_off() {
            return Ok(Start { shut: None, mask: sys::block_everything() });
        }
        let me = me();
        if in_fork() || !me.request.load(Relaxed).is_null() {
            return Err(ForkError::InFork);
        }
        if me.in_guard() {
            return Err(ForkError::Forbidden { entered: me.entered() });
        }
        // A signal handler that forks meanwhile forks in the middle of this one.
        STAGE.set(Stage::Working);
        // Not coordinated: there is no lock of another library's handler to let go of.
        let plan = Plan { coordinated: false, deadline, let_go_at: None, bound: FIRST_BOUND };
        let mut steps = NoHooks { mask: None };
        let mut report = Report::new();
        let outcome = prepare::prepare(&STATE.gate, me, &mut steps, &plan, &mut report.busy);
        if let Outcome::Committed(shut) = outcome {
            let mask = sys::block_everything();
            return Ok(Start { shut: Some((me, shut)), mask: steps.mask.unwrap_or(mask) });
        }
        steps.restore_signals();
        STAGE.set(Stage::None);
        STATE.count.refused.fetch_add(1, Relaxed);
        Err(report.into_error(outcome))
    }

    /// The mask from before.
    pub(crate) fn mask(&self) -> &sys::SigSet {
        &self.mask
    }

    /// Opens the gate and gives the role back; false if a waiter had reopened it. Async-signal-safe, and for the child, which does it
    /// in this thread's place while that sleeps: atomics and wake-ups only.
    pub(crate) fn open(&self) -> bool {
        let Some((me, shut)) = self.shut else { return true };
        let ours = STATE.gate.reopen(shut);
        if !ours {
            STATE.gate.was_reopened(shut);
        }
        STATE.gate.drop_role(me);
        ours
    }

    /// On this thread, when the child has exec'ed or ended, or there is none; `opened` if the child said that it came through
    /// `open`.
    pub(crate) fn end(self, opened: bool) {
        if let Some((me, shut)) = self.shut {
            if !opened {
                STATE.gate.finish_for(me, shut);
            }
            STAGE.set(Stage::None);
        }
        sys::set_mask(&self.mask);
    }
}

struct NoHooks {
    mask: Option<sys::SigSet>,
}

impl Steps for NoHooks {
    fn block_signals(&mut self) {
        if self.mask.is_none() {
            self.mask = Some(sys::block_all());
        }
    }

    fn restore_signals(&mut self) {
        if let Some(mask) = self.mask.take() {
            sys::set_mask(&mask);
        }
    }

    fn hooks(&mut self, _: How) -> Hooks {
        Hooks::Ready
    }

    fn undo(&mut self) {}
}

/// This thread is between the prepare handler and the parent or child handler.
pub(crate) fn in_fork() -> bool {
    STAGE.get() != Stage::None
}
