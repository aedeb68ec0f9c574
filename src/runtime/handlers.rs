//! What runs round every fork, whoever calls it: prepare, parent, child (G2, G6, G8, G11).

#![allow(unsafe_code)]

use super::*;

/// What the handlers leave for the coordinated fork on this thread.
#[derive(Debug)]
pub(crate) struct Passed {
    /// The mask from before: signals are blocked still.
    pub(crate) mask: Option<sys_signals::SigSet>,
    /// A waiter reopened the gate before the child's copy was whole: the child ends at once.
    pub(crate) late: bool,
}

/// After libc's fork, in the thread that called it; `made` where there is a child, or this is it. Async-signal-safe.
#[inline(always)]
pub(crate) fn passed(me: &Slot, made: bool) -> Passed {
    conclude_undecided(me, made);
    Passed { mask: me.passage.take_mask(), late: me.passage.late.replace(false) }
}

/// Before a coordinated fork's first try. Async-signal-safe.
pub(crate) fn forget_report(me: &Slot) {
    // SAFETY: as in `on_prepare`.
    if let Some(collected) = unsafe { collected(me) } {
        collected.forget();
    }
}

/// Why this thread's coordinated fork was refused.
pub(crate) fn take_report(me: &Slot) -> Report {
    // SAFETY: as in `on_prepare`.
    let Some(collected) = (unsafe { collected(me) }) else { return Report::new() };
    let Collected { report, busy } = std::mem::replace(collected, Collected::NEW);
    Report { busy, ..ManuallyDrop::into_inner(report) }
}

/// A coordinated fork's side of the handlers; lives on the stack of `fork`, named by the seat (`Slot::request`).
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) deadline: Option<u64>,
    pub(crate) let_go_at: Option<u64>,
    pub(crate) bound: u64,
    /// What became of it, for the parent.
    pub(crate) outcome: Option<Outcome>,
    /// Since when it waits for the regions, if that is not counted yet: the next try goes on with it.
    pub(crate) since: Option<u64>,
    /// To be asked right before the child is made; whether it was before. Async-signal-safe.
    pub(crate) note: Option<fn(bool) -> u64>,
    /// Its answer.
    pub(crate) noted: Option<u64>,
}

/// There is no next try for a fork that has waited since then.
#[cold]
pub(crate) fn waited_in_vain(since: u64) {
    STATE.waited.regions.note_beside(clock::now().saturating_sub(since), generation_here());
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
    passage: &'a Passage,
    tid: u32,
    coordinated: bool,
    report: &'a mut Report,
    /// A foreign fork that met a veto: goes ahead without that hook, dirty.
    vetoed: bool,
}

impl Steps for Handlers<'_> {
    fn block_signals(&mut self) {
        if !self.passage.has_mask() {
            self.passage.put_mask(sys_signals::block_all());
        }
    }

    fn restore_signals(&mut self) {
        if let Some(mask) = self.passage.take_mask() {
            sys_signals::set_mask(&mask);
        }
    }

    fn hooks(&mut self, how: How) -> Hooks {
        self.vetoed = false;
        // What was in the way of an earlier walk may be so no more.
        if self.report.hook.is_some() {
            self.report.hook = None;
        }
        let mut end = Hooks::Ready;
        let timed = STATE.hooks.len() <= hook::TIMED;
        let mut now = clock::now();
        let attempt = hook::Attempt { hooks: &STATE.hooks, how };
        let (tid, coordinated, report, vetoed) = (self.tid, self.coordinated, &mut *self.report, &mut self.vetoed);
        let mut one = |h: &Calls| match attempt.prepare(h) {
            Ok(()) => Step::Prepared,
            Err(why) => hook::refuse(h, why, coordinated, report, vetoed, &mut end),
        };
        // Apart: of many hooks each is a few instructions.
        let all = if timed {
            STATE.hooks.prepare(|h| {
                STATE.at_work.begin(tid, h.name, now);
                let step = one(h);
                let begun = std::mem::replace(&mut now, clock::now());
                h.took(now.saturating_sub(begun), generation_here());
                step
            })
        } else {
            STATE.hooks.prepare(one)
        };
        STATE.at_work.ends();
        if STATE.streams.wait.take_long() {
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

    fn waited(&mut self, what: Wait, ns: u64, role: bool) {
        let clocked = match what {
            Wait::Turn => &STATE.waited.turn,
            Wait::Regions => &STATE.waited.regions,
            Wait::Hooks => &STATE.waited.hooks,
        };
        if role {
            clocked.note(ns, generation_here());
        } else {
            clocked.note_beside(ns, generation_here());
        }
    }
}

/// In a child whose fork has not prepared the hooks. Apart: most children have no use for the page that its code is on.
#[cold]
#[inline(never)]
pub(super) fn abandon_hooks() {
    STATE.hooks.reset();
    STATE.hooks.each_linked(Calls::abandon);
}

#[unsafe(link_section = ".text_carefork")]
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
    if let Some(me) = seated() {
        if matches!(me.passage.stage.get(), Stage::Committed(_)) && !is_inner(me) {
            // A replacement for fork that calls libc's again, because the first made no child.
            conclude_undecided(me, false);
        }
        if me.passage.stage.get() != Stage::None {
            me.passage.nested.set(me.passage.nested.get() + 1);
            return;
        }
    }
    let errno = sys::errno();
    // No memory for a seat: the child finds no stage, and is dirty.
    let Some(me) = try_me() else { return };
    let passage = &me.passage;
    // First: a signal handler that forks in the middle of this, or a hook, sees that a handler is at work.
    passage.stage.set(Stage::Working);
    // SAFETY: this thread's own seat, and one handler at a time is at work on it (the stage).
    let Some(collected) = (unsafe { collected(me) }) else {
        passage.stage.set(Stage::None);
        return;
    };
    passage.undecided.set(false);
    passage.errno.set(errno);
    passage.errno_at.set(sys::errno_place());
    // In the child nobody comes back to it: `take_over` forgets what the seat names.
    let inner = is_inner(me).then(|| me.request.swap(std::ptr::null_mut(), Relaxed));
    passage.outer.set(inner.unwrap_or(std::ptr::null_mut()));
    // SAFETY: the request lives on the stack of `fork`, which is below this frame on the same thread, and `fork` looks
    // at it again only after libc's fork has returned.
    let request = unsafe { me.request.load(Relaxed).cast::<Request>().as_mut() };
    match request {
        Some(request) => prepare_coordinated(me, request, collected),
        None if passage.outer.get().is_null() => prepare_foreign(me, collected),
        None => prepare_inner(me),
    }
    passage.begun.set(clock::now());
    leave_errno(passage, UNTOUCHED);
}

/// Looks first: a page that is not written is not copied.
#[inline(always)]
fn leave_errno(passage: &Passage, errno: i32) {
    let at = passage.errno_at.get();
    // SAFETY: null where no prepare handler of ours has run for this thread, or its errno, which the child's one thread has at the
    // same address; who takes a seat forgets what another left there.
    let Some(at) = (unsafe { at.as_mut() }) else { return };
    if *at != errno {
        *at = errno;
    }
}

fn prepare_coordinated(me: &Slot, request: &mut Request, collected: &mut Collected) {
    let Request { deadline, let_go_at, bound, since, .. } = *request;
    let plan = Plan { coordinated: true, deadline, let_go_at, bound, since };
    let mut steps = Handlers {
        passage: &me.passage,
        tid: me.tid.load(Relaxed),
        coordinated: true,
        report: &mut collected.report,
        vetoed: false,
    };
    let outcome = prepare::prepare(&STATE.gate, me, &mut steps, &plan, &mut collected.busy);
    look_for_another(outcome, &mut collected.report);
    request.outcome = Some(outcome);
    if let Some(note) = request.note {
        request.noted = Some(note(request.noted.is_some()));
    }
    request.since = match outcome {
        Outcome::Again { since, .. } => Some(since),
        _ => None,
    };
    me.passage.stage.set(match outcome {
        Outcome::Committed(shut) => Stage::Committed(shut),
        _ => Stage::Refused,
    });
}

/// A foreign fork inside a coordinated one, whose own report may stand in this thread's place already: it was refused, and this fork is
/// made by another library's handler after ours in the parent. Apart, for its buffers.
#[cold]
#[inline(never)]
fn prepare_inner(me: &Slot) {
    let mut apart = Collected::NEW;
    prepare_foreign(me, &mut apart);
}

fn prepare_foreign(me: &Slot, collected: &mut Collected) {
    // Without it the child goes by its own copy of the gate.
    drop(STATE.gate.seats.verdicts.ready());
    STATE.count.foreign.fetch_add(1, Relaxed);
    if me.in_guard() {
        STATE.count.in_region.fetch_add(1, Relaxed);
    }
    collected.forget();
    let budget = STATE.foreign_budget.load(Relaxed);
    let deadline = (budget != u64::MAX).then(|| clock::now().saturating_add(budget));
    let plan = Plan { coordinated: false, deadline, let_go_at: None, bound: FIRST_BOUND, since: None };
    let passage = &me.passage;
    let report = &mut *collected.report;
    let tid = me.tid.load(Relaxed);
    let mut steps = Handlers { passage, tid, coordinated: false, report, vetoed: false };
    let outcome = prepare::prepare(&STATE.gate, me, &mut steps, &plan, &mut collected.busy);
    let vetoed = steps.vetoed;
    let committed = match outcome {
        Outcome::Committed(shut) => {
            passage.stage.set(Stage::Committed(shut));
            true
        }
        _ => {
            passage.stage.set(Stage::Dirty);
            false
        }
    };
    if vetoed || !committed {
        passage.dirty.set(true);
        STATE.count.dirty.fetch_add(1, Relaxed);
        collected.report.busy = collected.busy;
        look_for_another(outcome, &mut collected.report);
        if !collected.report.say(outcome) {
            STATE.count.unreported.fetch_add(1, Relaxed);
        }
        collected.report.forget();
    }
    if !committed {
        passage.marking.set(true);
        care_table::dirty_begins();
        if let Some(mask) = passage.take_mask() {
            sys_signals::set_mask(&mask);
        }
    }
}

/// What is worth a word in another fork's error.
const LONG: Duration = Duration::from_nanos(print_wait::LONG);

/// A fork that ran out of time may have queued behind one that waits for a stream, or in a hook; its own wait is over. One that has only
/// begun is not to blame.
fn look_for_another(outcome: Outcome, report: &mut Report) {
    if outcome == Outcome::Busy {
        let waiting = STATE.streams.wait.look(clock::now());
        report.print_wait = waiting.filter(|w| w.waited >= LONG);
        if report.print_wait.is_none() {
            report.preparing = STATE.at_work.look(clock::now()).filter(|p| p.taken >= LONG);
        }
    }
}

pub(super) extern "C" fn on_parent() {
    if is_off() {
        return;
    }
    let Some(me) = seated() else { return };
    let passage = &me.passage;
    if passage.nested.get() > 0 {
        passage.nested.set(passage.nested.get() - 1);
        return;
    }
    let stage = passage.stage.get();
    if stage == Stage::None {
        // Our prepare handler found no memory for a seat.
        return;
    }
    let errno = sys::errno();
    passage.stage.set(Stage::Working);
    let coordinated = !me.request.load(Relaxed).is_null();
    if let Stage::Committed(shut) = stage
        && coordinated
        && errno != UNTOUCHED
    {
        // The copy is whole, if there is one: `conclude` finds the same.
        STATE.gate.settle(shut);
        passage.undecided.set(true);
        passage.stage.set(stage);
        return;
    }
    conclude(me, stage, !says_failed(errno));
    let outer = passage.outer.replace(std::ptr::null_mut());
    if !outer.is_null() {
        me.request.store(outer, Relaxed);
        me.set_entered(true);
    }
    // Other libraries' handlers come after this one, and may tell by errno whether there is a child.
    leave_errno(passage, if errno == UNTOUCHED { passage.errno.get() } else { errno });
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
#[inline(never)]
fn conclude(me: &Slot, stage: Stage, made: bool) {
    let passage = &me.passage;
    passage.stage.set(Stage::Working);
    let mut late = false;
    if let Stage::Committed(shut) = stage {
        late = !STATE.gate.settle(shut);
        let copied = clock::now();
        STATE.waited.fork.note(copied.saturating_sub(passage.begun.get()), generation_here());
        finish_hooks(if made { Phase::Parent } else { Phase::Undo });
        if !STATE.hooks.is_empty() {
            // The gate is shut still. Looked at first, as most have next to nothing to do here.
            let took = clock::now().saturating_sub(copied);
            if took >= hook::WORTH_NOTING {
                STATE.waited.hooks.note(took, generation_here());
            }
        }
        if !STATE.gate.reopen(shut) {
            STATE.gate.was_reopened(shut);
        }
        STATE.gate.drop_role(me);
    }
    if passage.marking.get() {
        care_table::dirty_ends();
    }
    passage.late.set(late);
    let coordinated = !me.request.load(Relaxed).is_null();
    if late && made && !coordinated {
        STATE.count.late.fetch_add(1, Relaxed);
    }
    pass_mask(passage, coordinated);
    passage.stage.set(Stage::None);
}

/// If the parent handler could not tell whether there is a child.
#[inline(always)]
fn conclude_undecided(me: &Slot, made: bool) {
    if me.passage.undecided.get() {
        me.passage.undecided.set(false);
        conclude(me, me.passage.stage.get(), made);
    }
}

/// The mask is put back at once after a foreign fork; a coordinated one does it itself, when it knows the child (`passed`).
#[inline(always)]
fn pass_mask(passage: &Passage, coordinated: bool) {
    passage.dirty.set(false);
    passage.marking.set(false);
    if !coordinated && let Some(mask) = passage.take_mask() {
        sys_signals::set_mask(&mask);
    }
}

/// Registered first, so it runs first in the child: a child that is not to be ends before anyone else's handler.
#[unsafe(link_section = ".text_carefork")]
pub(super) extern "C" fn on_child() {
    if is_off() {
        grow_up();
        close_at_fork();
        return;
    }
    // Behind a clean fork they are blocked. A handler in the middle of this would take the child for one that nobody told.
    let open = seated().is_none_or(|me| !me.passage.has_mask());
    let mask = open.then(sys_signals::block_all);
    child_is_told();
    if let Some(mask) = mask {
        sys_signals::set_mask(&mask);
    }
}

#[inline(always)]
fn child_is_told() {
    if is_nested() || stage() != Stage::Mended {
        become_child(false);
    }
    let Some(me) = seated() else { return };
    let passage = &me.passage;
    passage.stage.set(Stage::None);
    let coordinated = passage.coordinated.replace(false);
    pass_mask(passage, coordinated);
    leave_errno(passage, passage.errno.get());
}

/// What `on_child` does, whichever handler of the child comes first.
#[inline(always)]
pub(super) fn become_child(mending: bool) {
    let me = seated();
    let unseated = Passage::new();
    let passage = me.map_or(&unseated, |me| &me.passage);
    passage.coordinated.set(me.is_some_and(|m| !m.request.load(Relaxed).is_null()));
    if passage.nested.replace(0) > 0 {
        // Nothing was agreed with anyone. A handler is at work still, and goes on if the hook that forked returns here: with whatever
        // this leaves.
        passage.stage.set(Stage::Dirty);
    }
    let mut clean = !passage.dirty.get();
    let mut hooks = false;
    let mut late = false;
    // No `match`: a table of jumps would be another page to fault in.
    let stage = passage.stage.get();
    if stage == Stage::Refused {
        sys::exit_now(0);
    }
    if let Stage::Committed(shut) = stage {
        hooks = true;
        if !STATE.gate.settle(shut) {
            clean = false;
            late = true;
            if passage.coordinated.get() {
                sys::exit_now(0);
            }
        }
    } else {
        // Dirty; or nothing was shut, as after a plain fork, and nobody is to be blamed.
        clean = false;
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
        STATE.streams.abandon();
    }
    if passage.marking.get() || late {
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
    passage.stage.set(Stage::Mended);
}

#[inline(always)]
fn close_at_fork() {
    if STATE.closes_at_fork.load(Relaxed) {
        care_table::close_at_fork();
    }
}

/// How far the fork of this thread is.
#[inline(always)]
pub(super) fn stage() -> Stage {
    seated().map_or(Stage::None, |me| me.passage.stage.get())
}

/// The fork that this is a child of was made by a hook or another library's handler, inside another.
#[inline(always)]
pub(super) fn is_nested() -> bool {
    seated().is_some_and(|me| me.passage.nested.get() > 0)
}

/// This thread is between the prepare handler and the parent or child handler.
pub(crate) fn in_fork() -> bool {
    stage() != Stage::None
}
