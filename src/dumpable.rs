//! The dumpable flag of memory that parent and child share.
//!
//! A change of user clears it (prctl(2), `PR_SET_DUMPABLE`), so that the new user cannot look into memory that was another's. It belongs to
//! the memory, which the child shares until its exec: the parent would lose its core dumps, and its /proc files their owner. So
//! the parent sets it again, but not before the last child that changed its user has left: the new user could look into the
//! parent's memory through that child.
//!
//! A program that clears the flag itself meanwhile is overruled; what cannot be set from outside the kernel (2) is not set.

use crate::locks::Mutex;
use crate::{runtime, sys_exec};

#[derive(Debug)]
struct State {
    /// The process that this is true in.
    generation: u64,
    /// Children on their way that change their user.
    children: usize,
    /// The flag was set before the first of them.
    was_set: bool,
}

static STATE: Mutex<State> = Mutex::new(State { generation: 0, children: 0, was_set: false });

/// From before such a child's clone to after its exec.
#[derive(Debug)]
pub(crate) struct Dumpable {
    generation: u64,
}

impl Dumpable {
    pub(crate) fn hold() -> Dumpable {
        let generation = runtime::generation();
        let mut state = STATE.lock();
        if state.generation != generation || state.children == 0 {
            *state = State { generation, children: 0, was_set: sys_exec::dumpable() == 1 };
        }
        state.children += 1;
        Dumpable { generation }
    }
}

impl Drop for Dumpable {
    fn drop(&mut self) {
        let mut state = STATE.lock();
        if state.generation != self.generation {
            return;
        }
        state.children -= 1;
        if state.children == 0 && state.was_set && sys_exec::dumpable() != 1 {
            sys_exec::set_dumpable();
        }
    }
}
