//! What runs round every fork, whoever calls it: prepare, parent, child (G2, G6, G8, G11).

#![allow(unsafe_code)]

use super::*;

thread_local! {
    /// How far this thread's fork is. Beside the passage, because hooks come back here while a handler is at work on that.
    pub(super) static STAGE: Cell<Stage> = const { Cell::new(Stage::None) };
    /// Forks that a hook or another library's handler made while this one was under way.
    pub(super) static NESTED: Cell<u32> = const { Cell::new(0) };
    /// What the prepare handler leaves for the parent or child handler on the same thread.
    pub(super) static PASSAGE: UnsafeCell<Passage> = const { UnsafeCell::new(Passage::NONE) };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
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

pub(super) struct Passage {
    errno: i32,
    /// What a seat names while this fork, a foreign one, is made inside that one by another library's handler.
    outer: *mut (),
    /// In the parent of a coordinated fork: its handler could not tell whether there is a child, and left everything to `passed`.
    undecided: bool,
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
    /// In the parent: a waiter reopened the gate before the copy was whole.
    late: bool,
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
        outer: std::ptr::null_mut(),
        undecided: false,
        errno_at: std::ptr::null_mut(),
        dirty: false,
        marking: false,
        mask: None,
        begun: 0,
        late: false,
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
    /// A waiter reopened the gate before the child's copy was whole: the child ends at once.
    pub(crate) late: bool,
}

/// After libc's fork, in the thread that called it; `made` where there is a child, or this is it. Async-signal-safe.
pub(crate) fn passed(me: &Slot, made: bool) -> Passed {
    // SAFETY: as in `on_prepare`.
    let passage = unsafe { &mut *PASSAGE.with(UnsafeCell::get) };
    conclude_undecided(me, passage, made);
    Passed { mask: passage.mask.take(), late: std::mem::take(&mut passage.late) }
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
    /// What became of it, for the parent.
    pub(crate) outcome: Option<Outcome>,
}

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
                h.took(now.saturating_sub(begun), generation_here());
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

    fn let_leave(&mut self, until: u64) {
        STATE.hooks.let_leave(until);
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
pub(super) fn abandon_hooks() {
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
pub(super) extern "C" fn on_prepare() {
    if is_off() {
        return;
    }
    if matches!(STAGE.get(), Stage::Committed(_)) && !is_inner() {
        try_again_after_failure();
    }
    if STAGE.get() != Stage::None {
        NESTED.set(NESTED.get() + 1);
        return;
    }
    // SAFETY: the passage is this thread's own, and one handler at a time is at work on it: what comes back here meanwhile, from a
    // hook, goes by `STAGE` and `NESTED`.
    let passage = unsafe { &mut *PASSAGE.with(UnsafeCell::get) };
    passage.undecided = false;
    passage.errno = sys::errno();
    passage.errno_at = sys::errno_place();
    STAGE.set(Stage::Working);
    let Some(me) = try_me() else {
        STAGE.set(Stage::Dirty);
        return;
    };
    // In the child nobody comes back to it: `take_over` forgets what the seat names.
    let inner = is_inner().then(|| me.request.swap(std::ptr::null_mut(), Relaxed));
    passage.outer = inner.unwrap_or(std::ptr::null_mut());
    // SAFETY: the request lives on the stack of `fork`, which is below this frame on the same thread, and `fork` looks
    // at it again only after libc's fork has returned.
    let request = unsafe { me.request.load(Relaxed).cast::<Request>().as_mut() };
    match request {
        Some(request) => prepare_coordinated(me, request, passage),
        None => prepare_foreign(me, passage),
    }
    passage.begun = clock::now();
    sys::set_errno(UNTOUCHED);
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
    // Without it the child goes by its own copy of the gate.
    drop(STATE.gate.seats.verdicts.ready());
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

pub(super) extern "C" fn on_parent() {
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
    let coordinated = !me.request.load(Relaxed).is_null();
    if let Stage::Committed(shut) = stage
        && coordinated
        && errno != UNTOUCHED
    {
        // The copy is whole, if there is one: `conclude` finds the same.
        STATE.gate.settle(shut);
        passage.undecided = true;
        STAGE.set(stage);
        return;
    }
    conclude(me, passage, stage, !says_failed(errno));
    let outer = std::mem::replace(&mut passage.outer, std::ptr::null_mut());
    if !outer.is_null() {
        me.request.store(outer, Relaxed);
        me.set_entered(true);
    }
    sys::set_errno(if errno == UNTOUCHED { passage.errno } else { errno });
}

/// What the prepare handler leaves in errno, and what is still there if libc's fork made a child and nobody else's handler, on the way
/// there or back, has set it: no errno of any system call, and nothing that a handler would set by chance.
const UNTOUCHED: i32 = 0x0CAF_F04C;

/// Whether libc's fork failed, by what is in errno when the parent handler runs: libc runs the same handlers either way, and tells them
/// by nothing else. `UNTOUCHED` is certain. Else it is libc's, or left by a handler that others registered before ours; a
/// coordinated fork learns the truth when libc's fork returns (`passed`), a foreign one is judged by this.
fn says_failed(errno: i32) -> bool {
    matches!(errno, libc::EAGAIN | libc::ENOMEM | libc::ENOSYS | libc::EPERM)
}

/// On this thread, in the parent: hooks finished, gate open, role given back.
fn conclude(me: &Slot, passage: &mut Passage, stage: Stage, made: bool) {
    STAGE.set(Stage::Working);
    let mut late = false;
    if let Stage::Committed(shut) = stage {
        late = !STATE.gate.settle(shut);
        STATE.waited.fork.note(clock::now().saturating_sub(passage.begun));
        finish_hooks(if made { Phase::Parent } else { Phase::Undo });
        if !STATE.gate.reopen(shut) {
            STATE.gate.was_reopened(shut);
        }
        STATE.gate.drop_role(me);
    }
    if passage.marking {
        care_table::dirty_ends();
    }
    passage.late = late;
    let coordinated = !me.request.load(Relaxed).is_null();
    if late && made && !coordinated {
        STATE.count.late.fetch_add(1, Relaxed);
    }
    pass_mask(passage, coordinated);
    STAGE.set(Stage::None);
}

fn conclude_undecided(me: &Slot, passage: &mut Passage, made: bool) {
    if std::mem::take(&mut passage.undecided) {
        conclude(me, passage, STAGE.get(), made);
    }
}

/// A replacement for fork that calls libc's again, because the first made no child.
#[cold]
fn try_again_after_failure() {
    // SAFETY: as in `on_prepare`; between two forks no handler is at work.
    let passage = unsafe { &mut *PASSAGE.with(UnsafeCell::get) };
    if let Some(me) = seated() {
        conclude_undecided(me, passage, false);
    }
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
pub(super) extern "C" fn on_child() {
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
        become_child(passage, false);
    }
    STAGE.set(Stage::None);
    let coordinated = std::mem::take(&mut passage.coordinated);
    pass_mask(passage, coordinated);
    // SAFETY: `on_prepare` stored this thread's own errno location, and the child's one thread has it at the same address.
    unsafe { *passage.errno_at = errno };
}

/// What `on_child` does, whichever handler of the child comes first.
#[inline(always)]
pub(super) fn become_child(passage: &mut Passage, mending: bool) {
    let me = seated();
    passage.coordinated = me.is_some_and(|m| !m.request.load(Relaxed).is_null());
    let mut clean = !passage.dirty;
    let mut hooks = false;
    let mut late = false;
    match STAGE.get() {
        Stage::Refused => sys::exit_now(0),
        Stage::Committed(shut) => {
            hooks = true;
            if !STATE.gate.settle(shut) {
                clean = false;
                late = true;
                if passage.coordinated {
                    sys::exit_now(0);
                }
            }
        }
        Stage::Dirty => clean = false,
        // Nothing was shut: as after a plain fork, but nobody is to be blamed.
        Stage::None | Stage::Working | Stage::Mended => clean = false,
    }
    if !clean {
        STATE.dirty.store(true, Relaxed);
    }
    take_over(!clean);
    if mending {
        // From here on hooks may use regions.
        // SAFETY: as in `me`.
        unsafe { &*STATE.alive.load(Relaxed) }.store(HERE, Release);
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

/// This thread is between the prepare handler and the parent or child handler.
pub(crate) fn in_fork() -> bool {
    STAGE.get() != Stage::None
}
