//! The gate for the start of a program by a child that shares this memory (X1).

#![allow(unsafe_code)]

use super::*;

/// The gate, shut as for a fork, for the start of a program by a child that shares this memory (exec_start.rs). No hook is run: the
/// child reaches no lock.
#[derive(Debug)]
pub(crate) struct Start {
    /// `None` where the gate is turned off.
    shut: Option<(&'static Slot, u32)>,
    mask: sys_signals::SigSet,
}

impl Start {
    /// Waits until no other thread is in a region. After `Ok` the gate is shut, and every signal blocked on this thread, libc's own as
    /// well: no handler of theirs may run in the child, which has this thread's thread-local storage.
    pub(crate) fn begin(deadline: Option<u64>) -> Result<Start, ForkError> {
        generation();
        if is_off() {
            return Ok(Start { shut: None, mask: sys_signals::block_everything() });
        }
        Self::shut(deadline).inspect_err(|_| _ = STATE.count.refused.fetch_add(1, Relaxed))
    }

    fn shut(deadline: Option<u64>) -> Result<Start, ForkError> {
        let me = me();
        if in_fork() || !me.request.load(Relaxed).is_null() {
            return Err(ForkError::InFork);
        }
        if me.in_guard() {
            return Err(ForkError::Forbidden { entered: me.entered() });
        }
        // A signal handler that forks meanwhile forks in the middle of this one.
        me.passage.stage.set(Stage::Working);
        // Not coordinated: there is no lock of another library's handler to let go of.
        let plan = Plan { coordinated: false, deadline, let_go_at: None, bound: FIRST_BOUND, since: None };
        let mut steps = NoHooks { mask: None };
        let mut report = Report::new();
        let outcome = prepare::prepare(&STATE.gate, me, &mut steps, &plan, &mut report.busy);
        if let Outcome::Committed(shut) = outcome {
            let mask = sys_signals::block_everything();
            return Ok(Start { shut: Some((me, shut)), mask: steps.mask.unwrap_or(mask) });
        }
        steps.restore_signals();
        me.passage.stage.set(Stage::None);
        Err(report.into_error(outcome))
    }

    /// The mask from before.
    pub(crate) fn mask(&self) -> &sys_signals::SigSet {
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
            me.passage.stage.set(Stage::None);
        }
        sys_signals::set_mask(&self.mask);
    }
}

struct NoHooks {
    mask: Option<sys_signals::SigSet>,
}

impl Steps for NoHooks {
    fn block_signals(&mut self) {
        if self.mask.is_none() {
            self.mask = Some(sys_signals::block_all());
        }
    }

    fn restore_signals(&mut self) {
        if let Some(mask) = self.mask.take() {
            sys_signals::set_mask(&mask);
        }
    }

    fn hooks(&mut self, _: How) -> Hooks {
        Hooks::Ready
    }

    fn undo(&mut self) {}
}
