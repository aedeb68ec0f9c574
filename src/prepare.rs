//! The way to a commitment: gate, regions, hooks, bound and budget (G2, G5, G6, G11, H4).
//!
//! Pure: what it does to hooks and signals goes through `Steps`, so that loom runs the same code.
//!
//! # The two ways round
//! *Gate first*: shut, wait for the regions, then *try* the hooks. A lock taken inside regions is free by then; one whose
//! holder waits for a region is not, and trying tells. Then *hooks first*: with the gate open wait for the hooks, then
//! shut with them held. That fails where a thread inside a region waits for a hooked lock, and the bound tells; then
//! everything is undone and the first way tried again. Hooks that can only block do so with the gate shut; the waiter that
//! they wait for reopens it (G11), and the second way is what goes on from there.

use crate::gate::{Busy, Drain, FIRST_BOUND, Gate, LAST_BOUND, Seats, Slot};
use crate::sync;

/// What `prepare` has done to the process, and how to undo it.
pub(crate) trait Steps {
    /// Idempotent, as is `restore_signals`.
    fn block_signals(&mut self);
    fn restore_signals(&mut self);
    /// Prepares every hook, or none.
    fn hooks(&mut self, how: How) -> Hooks;
    /// Undoes what `hooks` prepared.
    fn undo(&mut self);
    /// After `Hooks::Unregistering`: waits for those who drop, at most until then.
    fn let_leave(&mut self, _until: u64) {}
    /// The fork has waited for something; `role` if it holds the role.
    fn waited(&mut self, _what: Wait, _ns: u64, _role: bool) {}
}

/// What a fork waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Other forks.
    Turn,
    /// Regions of other threads, bounds and rests included, and what lay between two tries.
    Regions,
    /// Hooks: one walk along them.
    Hooks,
}

/// How far hooks may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// The gate is shut: locks that can be tried are tried.
    Try,
    /// The gate is open: locks are waited for, at most until then.
    Wait(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hooks {
    Ready,
    /// A lock was not to be had; nothing is prepared.
    Conflict,
    /// A hook said no; nothing is prepared.
    Vetoed,
    /// A hook's `Registration` is being dropped; nothing is prepared.
    Unregistering,
}

/// What a fork wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) coordinated: bool,
    /// When the budget ends; `None` is never.
    pub(crate) deadline: Option<u64>,
    /// From here on a coordinated fork that gets nowhere lets go of other libraries' handler locks too (G2).
    pub(crate) let_go_at: Option<u64>,
    /// The bound to begin with.
    pub(crate) bound: u64,
    /// Since when it waits for the regions: what an earlier try has left to be counted by this one.
    pub(crate) since: Option<u64>,
}

/// How it ended. Only `Committed` leaves the gate shut, the hooks prepared and the role held; the signals are
/// blocked after every end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The word of the shut gate.
    Committed(u32),
    /// The budget ended.
    Busy,
    /// This thread and another each wait for what the other holds.
    WouldDeadlock,
    Vetoed,
    /// To be tried again from the very beginning, other libraries' handlers included.
    Again {
        /// With this bound.
        bound: u64,
        /// Since when it waits for the regions, which nobody has counted yet.
        since: u64,
    },
}

/// Runs on the forking thread, in carefork's prepare handler. Allocates nothing.
pub(crate) fn prepare<S: Seats>(
    gate: &Gate<S>,
    me: &Slot,
    steps: &mut impl Steps,
    plan: &Plan,
    busy: &mut Busy,
) -> Outcome {
    let begun = sync::now();
    let role = gate.take_role(me, plan.deadline);
    let now = sync::now();
    match plan.since {
        // A turn that is waited for between two tries is a part of the one wait.
        Some(since) if !role => steps.waited(Wait::Regions, now.saturating_sub(since), role),
        Some(_) => {}
        None => steps.waited(Wait::Turn, now.saturating_sub(begun), role),
    }
    if !role {
        steps.block_signals();
        return Outcome::Busy;
    }
    let mut run = Run { gate, me, plan, bound: plan.bound, held: false, role, shut_out: plan.since };
    let outcome = run.go(steps, busy);
    if !matches!(outcome, Outcome::Again { .. }) {
        run.regions_ended(steps);
    }
    if !matches!(outcome, Outcome::Committed(_)) {
        if run.held {
            steps.undo();
        }
        if run.role {
            gate.drop_role(me);
        }
    }
    steps.block_signals();
    outcome
}

struct Run<'a, S> {
    gate: &'a Gate<S>,
    me: &'a Slot,
    plan: &'a Plan,
    bound: u64,
    /// The hooks are prepared.
    held: bool,
    role: bool,
    /// When this wait for the regions began.
    shut_out: Option<u64>,
}

impl<S: Seats> Run<'_, S> {
    fn go(&mut self, steps: &mut impl Steps, busy: &mut Busy) -> Outcome {
        let mut hooks_first = false;
        loop {
            self.gate.courtesy();
            if hooks_first && !self.held {
                match self.hooks(steps, How::Wait(self.until(LAST_BOUND))) {
                    Hooks::Ready => {}
                    Hooks::Vetoed => return Outcome::Vetoed,
                    found => {
                        if found == Hooks::Unregistering {
                            self.let_leave(steps);
                        }
                        if self.is_over() {
                            return Outcome::Busy;
                        }
                        hooks_first = found == Hooks::Unregistering;
                        continue;
                    }
                }
            }
            steps.block_signals();
            let shut = self.gate.shut(self.bound);
            let now = sync::now();
            self.shut_out.get_or_insert(now);
            let until = self.no_later(now.saturating_add(self.bound));
            let drain = self.gate.drain(self.me, shut, until, busy);
            if drain == Drain::Drained {
                self.regions_ended(steps);
            }
            let end = match drain {
                Drain::Drained if self.held => End::Ready,
                Drain::Drained => match self.hooks(steps, How::Try) {
                    Hooks::Ready => End::Ready,
                    Hooks::Vetoed => End::Vetoed,
                    Hooks::Conflict => End::OtherWay,
                    Hooks::Unregistering => End::Unregistering,
                },
                other => End::NotDrained(other),
            };
            if matches!(end, End::Ready) && self.gate.commit(shut) {
                return Outcome::Committed(shut);
            }
            self.gate.reopen(shut);
            steps.restore_signals();
            match end {
                // A waiter reopened the gate while a hook blocked: the hooks are held now, the gate comes second.
                End::Ready => {}
                End::Vetoed => return Outcome::Vetoed,
                End::OtherWay => hooks_first = true,
                End::Unregistering => self.let_leave(steps),
                End::NotDrained(Drain::Deadlock) => return Outcome::WouldDeadlock,
                End::NotDrained(why) => {
                    if self.held {
                        self.held = false;
                        steps.undo();
                    }
                    if let Some(outcome) = self.back_off(why, hooks_first, busy) {
                        return outcome;
                    }
                    hooks_first = false;
                }
            }
            if self.is_over() {
                return Outcome::Busy;
            }
        }
    }

    fn hooks(&mut self, steps: &mut impl Steps, how: How) -> Hooks {
        let begun = sync::now();
        let end = steps.hooks(how);
        steps.waited(Wait::Hooks, sync::now().saturating_sub(begun), true);
        self.held = end == Hooks::Ready;
        end
    }

    /// With the gate open: who drops a registration may be in a region.
    fn let_leave(&mut self, steps: &mut impl Steps) {
        let begun = sync::now();
        steps.let_leave(self.until(LAST_BOUND));
        steps.waited(Wait::Hooks, sync::now().saturating_sub(begun), true);
    }

    fn regions_ended(&mut self, steps: &mut impl Steps) {
        if let Some(begun) = self.shut_out.take() {
            steps.waited(Wait::Regions, sync::now().saturating_sub(begun), self.role);
        }
    }

    /// The regions did not end in time: others run for as long as they were kept out.
    fn back_off(&mut self, why: Drain, hooks_were_held: bool, busy: &mut Busy) -> Option<Outcome> {
        if why == Drain::GiveWay {
            self.role = self.gate.requeue(self.me, self.plan.deadline);
            return (!self.role).then_some(Outcome::Busy);
        }
        if self.is_over() {
            return Some(Outcome::Busy);
        }
        if self.gate.seats.bury() {
            self.gate.set_ghosts();
        }
        let rest = self.until(self.bound).saturating_sub(sync::now());
        if !hooks_were_held {
            self.bound = (self.bound * 2).min(LAST_BOUND);
        }
        // The one we wait for is in a handler of another library, perhaps for a lock that this fork took there.
        let let_go = self.plan.let_go_at.is_some_and(|t| sync::now() >= t);
        if self.plan.coordinated && (let_go || (busy.entered && self.bound > 2 * FIRST_BOUND)) {
            return Some(Outcome::Again { bound: self.bound, since: self.shut_out.unwrap_or_else(sync::now) });
        }
        self.gate.rest(self.me, rest, busy);
        None
    }

    fn is_over(&self) -> bool {
        self.plan.deadline.is_some_and(|d| sync::now() >= d)
    }

    /// `ns` from now, or the end of the budget.
    fn until(&self, ns: u64) -> u64 {
        self.no_later(sync::now().saturating_add(ns))
    }

    /// `t`, or the end of the budget.
    fn no_later(&self, t: u64) -> u64 {
        self.plan.deadline.map_or(t, |d| d.min(t))
    }
}

enum End {
    Ready,
    Vetoed,
    OtherWay,
    Unregistering,
    NotDrained(Drain),
}
