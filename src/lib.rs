//! `fork()` made sound practice in multithreaded programs.
//!
//! A fork copies every lock in whatever state it is in and every descriptor that is open, and only one thread. With this library
//! a fork from any thread, by [`fork`] or by anybody's fork(2), waits until no other thread is in a *region*, has registered
//! *hooks* take the locks it cannot see into, and lets everything go on both sides.
//!
//! - **Regions**: [`no_forking`]. The critical sections of [`Mutex`], [`RwLock`] and the initialisers of [`OnceLock`] and
//!   [`LazyLock`] are regions; so are opening and closing a [`CareFd`].
//! - **Hooks**: [`register`] a [`Hook`] for locks of other kinds; [`stdio::guard`] for std's output.
//! - **Descriptors**: [`CareFd`] wraps one that must not linger in a child.
//! - **Threads**: [`thread::spawn`] starts one whose beginning and end no fork cuts in two; a [`Service`] has one, and a channel, that come back in a
//!   child; [`PerProcess`] makes a pool or a connection anew in each process; [`recipes`] has rayon's and others.
//! - **Logging**: [`mod@log`] is a logger for the `log` facade, and has guards for other people's; `carefork::tracing` (feature `tracing`) has
//!   the same for tracing-subscriber.
//! - **Programs**: [`Command`], started without a copy of this process.
//! - **Other programs**: [`inherited`] takes what a parent passed, [`send_fds`] and [`recv_fds`] pass between running processes,
//!   [`NamedFds`] keeps descriptors by name.
//! - **Forking**: [`fork`], [`spawn`], [`ForkOptions`]; the child holds an [`InChild`] token, the parent a [`Child`].
//! - **Seeing**: [`audit()`] for what children would get, [`report()`] for what is going on, [`stats`] for what went on.
//! - **Children**: a [`Child`] is waited for and signalled by pidfd; a [`Reaper`] watches any number of them, and calls back once for each.
//!
//! # What a child may do
//! A child made by [`spawn`], or one that called [`InChild::cleanup`], may use every carefork lock, registered foreign locks,
//! the allocator (glibc's, jemalloc and mimalloc have at-fork handlers of their own) and new care-fds, and may fork again. It may start
//! threads if those of the parent began and ended by [`thread`], or none began or ended during the fork: else, rarely, the first hangs.
//! It must not use what [`fork`]'s safety section lists.
//!
//! # Letters and numbers
//! Such as (G6): the promise that the sentence is about, as the project counts them, by section: G gate, H hooks, L locks, F care-fds, K forks, C children,
//! X programs and passed descriptors, B logging, D seeing what happens, P platforms.
//!
//! # Limitations
//! Linux. Children of vfork, posix_spawn and clone with shared memory must not call this library. Built into a library
//! that is loaded by dlopen, that library must not be unloaded, and the first region of a thread may allocate its
//! thread-local storage.

// ground
mod sys;
mod sys_close;
mod sys_copies;
mod sys_signals;
mod sys_socket;
#[cfg(feature = "log")]
mod sys_write;
mod sys_reap;
mod sys_msg;
mod started_with;
mod clock;
mod sync;
// state
mod durations;
mod verdict;
mod passage;
mod seat;
mod gate;
mod prepare;
mod hook_list;
mod care_word;
mod care_table;
mod verdict_page;
mod chunks;
mod slots;
mod print_wait;
mod at_work;
mod streams;
mod error;
// register
mod hook;
mod runtime;
mod registration;
mod region;
pub mod thread;
mod carefd;
mod carefd_io;
pub mod stdio;
mod locks;
mod adapters;
// fork
mod signals;
mod options;
mod replace;
// parent
mod reap;
// child
mod cleanup;
mod in_child;
// and the step between them, which hands out both
mod fork;
// exec
mod sys_exec;
mod resource;
mod dumpable;
mod exec_plan;
mod exec_child;
mod exec_start;
mod command_error;
mod command_env;
mod command_stdio;
mod command;
mod socket;
pub mod inherited;
mod pass;
mod named;
// subsystems
#[cfg(feature = "service")]
mod service;
#[cfg(feature = "log")]
pub mod log;
#[cfg(feature = "tracing")]
pub mod tracing;
// seeing
mod lineage;
mod columns;
pub mod audit;
pub mod report;

pub use audit::{Audit, audit, audit_of};
pub use carefd::{AdoptError, CareFd, OnFork};
pub use cleanup::{Cleanup, postfork_child_noexec};
pub use command::Command;
pub use command_error::{CommandError, Step};
pub use command_stdio::Stdio;
pub use durations::Durations;
pub use error::{Culprit, Culprits, ForkError, NotAChild};
pub use fork::{Fork, fork, spawn};
pub use hook::{Hook, Veto};
pub use in_child::InChild;
pub use lineage::{Lineage, Stats, fork_generation, lineage, set_foreign_budget, stats};
pub use locks::*;
pub use named::{BadName, NamedFds, PutError, send_named_fds};
pub use options::ForkOptions;
pub use pass::{MAX_FDS, Received, recv_fds, send_fds};
pub use reap::child::Child;
pub use reap::exit::{Ending, Exit, Usage};
pub use reap::future::ExitFuture;
pub use reap::owner::{Claim, SigchldOwner, UnknownChild};
pub use reap::reaper::{Reaper, WatchError};
pub use reap::sigchld::Sigchld;
pub use reap::watched::Watched;
pub use region::{NoForking, force_unlock, no_forking, try_no_forking};
pub use registration::{Registration, register};
pub use replace::{ForkReplacement, set_fork_replacement};
pub use report::{Report, report};
pub use resource::Resource;
#[cfg(feature = "service")]
pub use service::{OnChild, Reply, SendError, Service, ServiceBuilder, ServiceError};
pub use signals::Signals;
pub use socket::{ConvertError, Mismatch};

pub mod recipes;

/// What tests and benches need and programs do not: the clock, and the bare registry.
#[cfg(feature = "testing")]
pub mod testing {
    pub use crate::carefd::{bench_register as register, bench_unregister as unregister};
    pub use crate::clock::{advance, release};
}

/// The README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
