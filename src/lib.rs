//! `fork()` made sound practice in multithreaded programs.

#![cfg_attr(docsrs, feature(doc_cfg))]

// ground
mod sync;
mod sys;
mod clock;
// state
mod gate;
mod prepare;
mod hook_list;
mod slots;
mod care_table;
mod error;
mod verdict;
// register
mod hook;
mod runtime;
mod region;
mod carefd;
mod adapters;
pub mod stdio;
mod locks;
// fork
mod signals;
mod options;
mod fork;
// parent
mod child;
// child
mod in_child;
mod cleanup;
mod lineage;

pub use carefd::{AdoptError, CareFd, OnFork};
pub use child::Child;
pub use cleanup::{Cleanup, postfork_child_noexec};
pub use error::{Culprit, Culprits, ForkError, NotAChild};
pub use fork::{Fork, fork, spawn};
pub use hook::{Hook, Registration, Veto, register};
pub use in_child::InChild;
pub use lineage::{Lineage, Stats, fork_generation, lineage, set_foreign_budget, stats};
pub use locks::*;
pub use options::ForkOptions;
pub use region::{NoForking, force_unlock, no_forking, try_no_forking};
pub use signals::Signals;

/// The clock that bounds and budgets are measured by, driven by a test (G11).
#[cfg(feature = "testing")]
pub mod testing {
    pub use crate::clock::{advance, release};
}
