//! Children: watched, reaped, signalled.
//!
//! # Who holds what
//!
//! | a child is | held by | its status goes to | it leaves by |
//! |---|---|---|---|
//! | fresh | a `Child` | `wait`, `try_wait`, `terminate` | a wait, a drop, `watch` |
//! | watched | a slot of a reaper's table | its callback, the channel, the future | its death, `Reaper::close` |
//! | deregistered | the same slot, with nothing to call | nobody | its death |
//! | an orphan | the process's orphans | nobody | its death |
//! | found (SIGCHLD is owned) | `known`, until the holder asks | as above | the holder's question |
//! | unknown | `known`, while a fork is under way that began before it was found | `on_unknown`, or a report | at once after |
//!
//! | a reaper is | `watch` | `dispatch` | its descriptor |
//! |---|---|---|---|
//! | open | yes | yes | readable when there is something to do |
//! | closed (also from inside a callback) | refused, the child comes back | nothing | open until the last handle is gone |
//! | in a child of the process that made it | refused | refused | its own copy: only closed, never changed |
//!
//! # Locks, threads, forks
//! - A table's lock is carefork's own, so a clean fork finds it free. It is held for one child's waitid and epoll_ctl, never
//!   while a callback runs, so callbacks may call anything. `known`'s lock is taken inside it and takes none itself.
//! - Whoever takes an entry out of the table under its lock owns the one callback: any number of threads may dispatch.
//! - A child of any kind of fork (`_Fork` too) begins with `known` and orphans of its own (`PerProcess`) and never looks into a
//!   parent's table, so it does not matter in which state a thread that is gone has left that.
//! - The SIGCHLD handler knows statics only, see `sigchld`.
//!
//! Where there is no pidfd a reaper asks by number: what is kept then and what is not, `Reaper`'s documentation says.

pub(crate) mod exit;
pub(crate) mod per_process;
pub(crate) mod known;
pub(crate) mod body;
pub(crate) mod engine;
pub(crate) mod orphans;
pub(crate) mod child;
pub(crate) mod sigchld;
pub(crate) mod timer;
pub(crate) mod channel;
pub(crate) mod owner;
pub(crate) mod watched;
pub(crate) mod reaper;
pub(crate) mod future;
#[cfg(feature = "tokio")]
mod tokio;
