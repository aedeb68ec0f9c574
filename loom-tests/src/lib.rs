//! The library's own protocol files, compiled against loom, and the models that run them.
//!
//! The models are this library's unit tests: what they drive is private to its crate. `models/mod.rs` says how a fork is
//! modelled; `models/faults.rs` shows that the models can fail.

// Half of each file is for callers that are not compiled here.
#![allow(dead_code, unused_imports)]
// Under loom a spin loop is no loop at all.
#![allow(clippy::absurd_extreme_comparisons)]
// The models share what loom checks by itself.
#![allow(clippy::arc_with_non_send_sync)]

#[path = "../../src/sync.rs"]
pub mod sync;

#[path = "../../src/care_word.rs"]
pub mod care_word;
#[path = "../../src/gate.rs"]
pub mod gate;
#[path = "../../src/hook_list.rs"]
pub mod hook_list;
#[path = "../../src/passage.rs"]
pub mod passage;
#[path = "../../src/prepare.rs"]
pub mod prepare;
#[path = "../../src/seat.rs"]
pub mod seat;
#[path = "../../src/verdict.rs"]
pub mod verdict;

#[path = "../../src/locks"]
pub mod locks {
    pub mod word_condvar;
    pub mod word_mutex;
    pub mod word_rw;
}

#[cfg(test)]
mod models;
