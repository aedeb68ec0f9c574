//! Which process this is: generations, and what happened at the forks (G6, G10, D1's first counters).

use crate::durations::Durations;
use crate::runtime::{self, count, gate, waited};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// How many forks lie between the process that loaded this library and this one.
///
/// Differs between parent and child after every kind of fork that gives the child memory of its own, `_Fork` and raw clone
/// included where the kernel has `MADV_WIPEONFORK`. Costs a load and a compare; made for caches and random generators that
/// must not repeat themselves in a child. Async-signal-safe.
///
/// ```
/// let before = carefork::fork_generation();
/// // SAFETY: the child exits at once.
/// match unsafe { carefork::fork() }? {
///     carefork::Fork::Child(child) => child.exit(i32::from(carefork::fork_generation() != before + 1)),
///     carefork::Fork::Parent(mut child) => assert!(child.wait()?.success()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[inline]
pub fn fork_generation() -> u64 {
    runtime::generation()
}

/// What became of this process's memory on its way here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lineage {
    /// See [`fork_generation`].
    pub generation: u64,
    /// A fork on the way here went ahead without waiting for every region and hook (G6): locks may be held by threads that
    /// are gone (carefork's own panic when they are waited for), a descriptor may have leaked.
    pub dirty: bool,
    /// A fork on the way here ran no at-fork handlers (`_Fork`, raw clone; G10). The same may be wrong.
    pub bypass: bool,
}

/// The lineage of this process.
///
/// ```
/// assert!(!carefork::lineage().dirty);
/// ```
pub fn lineage() -> Lineage {
    let generation = runtime::generation();
    Lineage { generation, dirty: runtime::dirty(), bypass: runtime::bypassed() }
}

/// How long a fork by foreign code may be kept waiting before it goes ahead dirty; `None` is for ever. At first 5 s (G6).
pub fn set_foreign_budget(budget: Option<Duration>) {
    let ns = budget.map_or(u64::MAX, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX - 1));
    runtime::foreign_budget().store(ns, Relaxed);
}

/// What was counted in this process; a child starts from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Coordinated forks that made a child.
    pub forks: u64,
    /// Forks by foreign code.
    pub foreign: u64,
    /// Coordinated forks that ended in an error.
    pub refused: u64,
    /// Foreign forks that went ahead dirty.
    pub dirty: u64,
    /// Foreign forks in which another library's handler took so long that a waiting thread reopened the gate: their children are
    /// dirty, and know it by their [`lineage`].
    pub late: u64,
    /// Foreign forks inside a region of the forking thread (G4).
    pub in_region: u64,
    /// Children that ended before they began, because libc's fork cannot be called off (G2).
    pub thrown_away: u64,
    /// How often a thread waiting at the gate reopened it (G11).
    pub reopened: u64,
    /// Reports that found no room on fd 2.
    pub unreported: u64,
    /// How long forks waited for other forks, refused ones too.
    pub turns: Durations,
    /// How long forks waited for regions of other threads to end, refused ones too. `longest` says how long a region, or a row of them,
    /// kept one waiting: from the first try to the last, with the rests and the children thrown away between them. Regions that no fork
    /// has met cost nothing and are not timed.
    pub regions: Durations,
    /// How long each walk along the hooks took, what they do and the locks that they wait for: each one before the fork, and of those in
    /// the parent after it (`parent`, `undo`), which threads at the gate wait for too, each one of ten microseconds or more.
    pub hooks: Durations,
    /// How long libc's fork took, with the at-fork handlers that others registered before carefork's; regions that want to begin wait
    /// for that.
    pub copying: Durations,
    /// Programs started by [`Command`](crate::Command).
    pub programs: u64,
}

/// The counters of this process.
///
/// What each single hook took is in [`report`](crate::report())'s `hooks`, for `prepare` only, and not to be had while a fork is in progress.
///
/// ```
/// let stats = carefork::stats();
/// assert_eq!(stats.dirty, 0);
/// println!("{} forks, the slowest copied for {:?}", stats.forks, stats.copying.longest);
/// ```
pub fn stats() -> Stats {
    runtime::generation();
    let here = runtime::generation_here();
    Stats {
        forks: count().forks.load(Relaxed),
        foreign: count().foreign.load(Relaxed),
        refused: count().refused.load(Relaxed),
        dirty: count().dirty.load(Relaxed),
        late: count().late.load(Relaxed),
        in_region: count().in_region.load(Relaxed),
        thrown_away: count().thrown_away.load(Relaxed),
        reopened: gate().reopened.load(Relaxed),
        unreported: count().unreported.load(Relaxed),
        turns: waited().turn.read(here),
        regions: waited().regions.read(here),
        hooks: waited().hooks.read(here),
        copying: waited().fork.read(here),
        programs: count().programs.load(Relaxed),
    }
}
