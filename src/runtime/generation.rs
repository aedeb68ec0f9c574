//! Which process this is: what a child takes over, and the child that nobody told (G10).

#![allow(unsafe_code)]

use super::*;

/// A bypass child comes here on its first call (G10).
#[inline]
pub(crate) fn check_generation() {
    // SAFETY: as in `me`.
    let alive = unsafe { &*STATE.alive.load(Relaxed) };
    if alive.load(Acquire) != HERE {
        mend(alive);
    }
}

pub(crate) fn generation() -> u64 {
    start();
    check_generation();
    STATE.generation.load(Relaxed)
}

/// Whether this process is the one of `generation`: false in every child of it, also one that has not found out yet. Async-signal-safe.
pub(crate) fn is_still(generation: u64) -> bool {
    // SAFETY: as in `me`.
    let alive = unsafe { &*STATE.alive.load(Relaxed) };
    matches!(alive.load(Acquire), HERE | FIRST_AWAY) && STATE.generation.load(Relaxed) == generation
}

/// The generation's low bits, for a thread that has called `me` already.
#[inline]
pub(crate) fn generation_here() -> u32 {
    STATE.generation.load(Relaxed) as u32
}

/// In a hook's child function: std's streams were let go of. Without a look at the wiped page, which would be a page fault or two.
#[inline]
pub(crate) fn streams_are_free() {
    STATE.streams_free_in.store(STATE.generation.load(Relaxed), Relaxed);
}

/// The generation of the child in which std's streams were let go of last: they are known to be free there.
pub(crate) fn streams_free_in() -> u64 {
    STATE.streams_free_in.load(Relaxed)
}

pub(crate) fn dirty() -> bool {
    STATE.dirty.load(Relaxed)
}

pub(crate) fn bypassed() -> bool {
    STATE.bypassed.load(Relaxed)
}

#[cold]
pub(super) fn mend(alive: &AtomicU32) {
    // The child's first thread is the one that the fork copied, seat and all.
    let first = sys::gettid() == sys::getpid();
    if alive.load(Acquire) == FIRST_AWAY && !first {
        return;
    }
    if was_told() && alive.compare_exchange(0, HERE, AcqRel, Acquire).is_ok() {
        // Only the mark was missing.
        forget_told();
        return;
    }
    // A handler that came here in the middle would wait for the thread that it has interrupted.
    let mask = sys_signals::block_all();
    if alive.compare_exchange(0, MENDING, AcqRel, Acquire).is_ok() {
        mend_here();
        if first {
            STATE.streams.abandon();
        }
        alive.store(if first { HERE } else { FIRST_AWAY }, Release);
        forget_told();
    }
    while alive.load(Acquire) == MENDING {
        sys::yield_now();
    }
    if first && alive.load(Acquire) == FIRST_AWAY {
        // Another thread took its seat for one that was left behind.
        if let Some(s) = seated() {
            s.tid.store(sys::getpid(), Relaxed);
        }
        STATE.streams.abandon();
        alive.store(HERE, Release);
    }
    sys_signals::set_mask(&mask);
}

fn mend_here() {
    if is_nested() || !matches!(stage(), Stage::None | Stage::Working | Stage::Mended) {
        // A real at-fork child in which another library's handler came here before ours.
        become_child(true);
        return;
    }
    // Turned off, no child is told, and every one may be a real one.
    if is_off() { &STATE.dirty } else { &STATE.bypassed }.store(true, Relaxed);
    take_over(true);
    abandon_hooks();
    if let Some(s) = seated() {
        s.set_entered(false);
    }
}

/// The mark is set: the number has served. A bypass child in a PID namespace of its own may have the same one.
fn forget_told() {
    // Release pairs with the Acquire in `was_told`: who finds it forgotten finds the mark.
    STATE.told.store(0, Release);
}

/// The child handler has set this process right, and nothing but the mark is missing: setting it costs a page, which most
/// children never need.
#[inline(always)]
pub(super) fn was_told() -> bool {
    STATE.told.load(Acquire) == sys::getpid()
}

/// As `generation() == 0`, without setting the mark of a child that has none yet. Async-signal-safe.
// Into its callers, with what it calls: they lie with the code that children run.
#[inline(always)]
pub(crate) fn is_no_child() -> bool {
    generation_unmarked() == 0
}

#[inline(always)]
pub(super) fn generation_unmarked() -> u64 {
    if was_told() { STATE.generation.load(Relaxed) } else { generation() }
}

/// In a child: its thread is alone, whatever the words say.
#[inline(always)]
pub(super) fn take_over(ghosts: bool) {
    let pid = sys::getpid();
    STATE.told.store(pid, Relaxed);
    STATE.generation.fetch_add(1, Relaxed);
    let me = seated();
    STATE.gate.seats.keep_only(me, ghosts);
    if ghosts {
        STATE.gate.set_ghosts();
        if let Some(s) = me {
            s.end_sleep();
        }
    }
    STATE.gate.reset();
    STATE.gate.seats.verdicts.forget();
    if let Some(s) = me {
        // A child's one thread has the number of the process.
        s.tid.store(pid, Relaxed);
        s.request.store(std::ptr::null_mut(), Relaxed);
        // Whatever it did for others, they are not here.
        s.rank.store(ANYBODY, Relaxed);
    }
    for c in [
        &STATE.count.forks,
        &STATE.count.foreign,
        &STATE.count.refused,
        &STATE.count.dirty,
        &STATE.count.late,
        &STATE.count.in_region,
        &STATE.count.thrown_away,
        &STATE.count.unreported,
        &STATE.count.programs,
        &STATE.gate.reopened,
    ] {
        c.store(0, Relaxed);
    }
    STATE.streams.wait.clear();
    STATE.at_work.ends();
    grow_up();
}

/// What a parent registered for itself before its clean-up is its parent's here.
#[inline(always)]
pub(super) fn grow_up() {
    if STATE.young.load(Relaxed) {
        STATE.young.store(false, Relaxed);
        care_table::grow_up();
    }
}
