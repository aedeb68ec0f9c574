//! Hooks: what a subsystem wants done around a fork, for the locks that carefork cannot see into, and how a fork calls them (H1-H4).

use crate::durations::{Clocked, Durations};
use crate::error::{Report, Text};
use crate::hook_list::{HookList, Step};
use crate::prepare::{Hooks, How};
use crate::{clock, sys};
use std::borrow::Cow;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

type Call = Box<dyn Fn() + Send + Sync>;
type Trial = Box<dyn Fn() -> Result<(), Veto> + Send + Sync>;

/// Why a hook does not want a fork to happen; made from text.
///
/// ```
/// let veto: carefork::Veto = "a transaction is open".into();
/// assert_eq!(veto.to_string(), "a transaction is open");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veto(Cow<'static, str>);

impl From<&'static str> for Veto {
    fn from(reason: &'static str) -> Self {
        Veto(Cow::Borrowed(reason))
    }
}

impl From<String> for Veto {
    fn from(reason: String) -> Self {
        Veto(Cow::Owned(reason))
    }
}

impl fmt::Display for Veto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Veto {}

/// A lock that somebody else made, as a fork sees it. All of them run on the forking thread, without allocating.
pub(crate) trait Foreign: Send + Sync {
    /// Takes the lock if it is free.
    fn take(&self) -> bool;
    /// Lets go of it in the parent, or where the fork did not happen.
    fn release(&self);
    /// Lets go of it in the child, where nobody else is.
    fn release_in_child(&self);
}

enum Prepare {
    Nothing,
    Call(Call),
    Trial(Trial),
    Lock(Arc<Taken<dyn Foreign>>),
}

/// A foreign lock, and whether a fork has it: one whose `prepare` was replaced is never taken, and so never let go of.
struct Taken<L: ?Sized> {
    taken: AtomicBool,
    lock: L,
}

/// Lets go of a foreign lock when dropped, after whatever else the hook does.
struct LetGo<'a>(&'a Taken<dyn Foreign>, fn(&dyn Foreign));

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        if self.0.taken.swap(false, Ordering::Relaxed) {
            (self.1)(&self.0.lock);
        }
    }
}

/// A subsystem's part in a fork, to be given to [`register`](crate::register).
///
/// `prepare` runs before the fork on the forking thread, by rising rank; then `parent` in the parent, `child` in every child (soon
/// to exec or not, so it must be tiny), `undo` where the fork did not happen, all by falling rank; `cleanup` only in a child
/// that goes on without exec, when it calls [`InChild::cleanup`](crate::InChild::cleanup) or
/// [`postfork_child_noexec`](crate::postfork_child_noexec): heavy work belongs there.
///
/// None of them may fork, wait for another thread that waits for a fork, or unwind: a panic in prepare counts as a veto, in
/// the others it is caught and reported on fd 2 (H3; with panic=abort it ends the process). What they run as part of a fork
/// should not allocate.
///
/// ```
/// use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
/// static CHILDREN: AtomicU32 = AtomicU32::new(0);
/// let registration = carefork::register(carefork::Hook::new("counter").parent(|| {
///     CHILDREN.fetch_add(1, Relaxed);
/// }));
/// // SAFETY: the child exits at once.
/// match unsafe { carefork::fork() }? {
///     carefork::Fork::Child(child) => child.exit(0),
///     carefork::Fork::Parent(mut child) => assert!(child.wait()?.success()),
/// }
/// assert_eq!(CHILDREN.load(Relaxed), 1);
/// drop(registration);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a hook counts once it is registered"]
// What both sides call after a fork comes first, on one cache line with the list's own words; the rest of the node is another.
#[repr(C)]
pub struct Hook {
    child: Option<Call>,
    parent: Option<Call>,
    prepare: Prepare,
    undo: Option<Call>,
    /// Apart: a fork with many hooks goes through the memory of all of them three times.
    pub(crate) rest: Box<Rest>,
}

/// What a fork does not look at on its way.
pub(crate) struct Rest {
    pub(crate) name: &'static str,
    pub(crate) rank: i32,
    /// Shared, so that a clean-up can run it without the list.
    pub(crate) cleanup: Option<Arc<dyn Fn() + Send + Sync>>,
    /// What its prepare took, where that was worth a page that the fork would copy; of the generation `counted_in`. A child need not
    /// copy that page to begin anew.
    waited: Clocked,
    counted_in: AtomicU32,
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hook").field("name", &self.rest.name).field("rank", &self.rest.rank).finish_non_exhaustive()
    }
}

impl Hook {
    /// A hook that does nothing yet, of rank 0. The name is what errors and reports call it.
    pub fn new(name: &'static str) -> Self {
        Hook {
            prepare: Prepare::Nothing,
            undo: None,
            parent: None,
            child: None,
            rest: Box::new(Rest {
                name,
                rank: 0,
                cleanup: None,
                waited: Clocked::new(),
                counted_in: AtomicU32::new(0),
            }),
        }
    }

    /// Its place in lock order: prepare runs by rising rank, outer locks first; among equals the newest first (H2).
    pub fn rank(mut self, rank: i32) -> Self {
        self.rest.rank = rank;
        self
    }

    /// Runs before the fork. It may block; a lock that can be tried is better served by
    /// [`Hook::std_mutex`] and its kin, which keep to the fork's budget.
    pub fn prepare(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.prepare = Prepare::Call(Box::new(f));
        self
    }

    /// Runs before the fork and may say no to it (H3). Replaces [`Hook::prepare`].
    pub fn try_prepare(mut self, f: impl Fn() -> Result<(), Veto> + Send + Sync + 'static) -> Self {
        self.prepare = Prepare::Trial(Box::new(f));
        self
    }

    /// Runs instead of `parent` where the fork did not happen. Without one, `parent` runs.
    ///
    /// It may also run after a foreign fork that did happen, and `parent` after one that did not, where another library registered its at-fork
    /// handlers before this one and leaves errno changed: errno is all that libc tells handlers of a fork's end. So both should leave
    /// locks in the same state. A fork by this crate is always told apart.
    pub fn undo(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.undo = Some(self.and_let_go(f, |lock| lock.release()));
        self
    }

    /// Runs in the parent after the fork.
    pub fn parent(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.parent = Some(self.and_let_go(f, |lock| lock.release()));
        self
    }

    /// Runs in every child, also one that will exec in a moment.
    pub fn child(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.child = Some(self.and_let_go(f, |lock| lock.release_in_child()));
        self
    }

    /// Runs in a child that goes on without exec, as part of its clean-up; there it may allocate and start threads.
    pub fn cleanup(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.rest.cleanup = Some(Arc::new(f));
        self
    }

    pub(crate) fn foreign(name: &'static str, lock: impl Foreign + 'static) -> Self {
        let lock = Arc::new(Taken { taken: AtomicBool::new(false), lock });
        let hook = Hook { prepare: Prepare::Lock(lock), ..Hook::new(name) };
        hook.parent(|| {}).child(|| {})
    }

    /// `f`; for the hook of a foreign lock, then its release, also where `f` panics.
    fn and_let_go(&self, f: impl Fn() + Send + Sync + 'static, release: fn(&dyn Foreign)) -> Call {
        match &self.prepare {
            Prepare::Lock(lock) => {
                let lock = Arc::clone(lock);
                Box::new(move || {
                    let _after = LetGo(&*lock, release);
                    f();
                })
            }
            _ => Box::new(f),
        }
    }
}

impl Hook {
    /// In a child whose fork has not prepared this hook: a foreign lock that another thread's fork had is let go of. That fork is
    /// not here to do it, and nobody was inside.
    pub(crate) fn abandon(&self) {
        if let Prepare::Lock(lock) = &self.prepare {
            drop(LetGo(&**lock, |lock| lock.release_in_child()));
        }
    }
}

/// With more hooks than this none is timed: reading the clock would cost as much as calling them.
pub(crate) const TIMED: u32 = 64;
/// A prepare that took less than this many ns has waited for nothing: a few system calls and page faults. Noting it would cost as much again,
/// for a page that the fork copies.
const WORTH_NOTING: u64 = 10_000;

impl Hook {
    /// By the role's holder, in the process of that generation.
    pub(crate) fn took(&self, ns: u64, generation: u32) {
        if ns >= WORTH_NOTING {
            let Rest { waited, counted_in, .. } = &*self.rest;
            if counted_in.swap(generation, Ordering::Relaxed) != generation {
                waited.reset();
            }
            waited.note(ns);
        }
    }

    /// What its prepare took in this process, whose generation that is. As `took`.
    pub(crate) fn waited(&self, generation: u32) -> Durations {
        let here = self.rest.counted_in.load(Ordering::Relaxed) == generation;
        if here { self.rest.waited.read() } else { Durations::default() }
    }
}

/// What to call after prepare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Undo,
    Parent,
    Child,
}

impl Phase {
    fn name(self) -> &'static [u8] {
        match self {
            Phase::Undo => b"undo",
            Phase::Parent => b"parent",
            Phase::Child => b"child",
        }
    }
}

/// How often a lock is tried in a row: with the gate shut, and at most with the gate open.
const TRIES: (u32, u32) = (64, 4096);
/// The first and the longest pause between two rows of tries with the gate open, in ns.
const PAUSES: (u64, u64) = (20_000, 1_000_000);

/// Prepares one hook. Runs in the prepare handler; allocates nothing unless the hook panics.
pub(crate) fn prepare(
    hooks: &HookList<Hook>,
    hook: &Hook,
    how: How,
    coordinated: bool,
    report: &mut Report,
    vetoed: &mut bool,
    end: &mut Hooks,
) -> Step {
    if hooks.is_left() {
        *end = Hooks::Unregistering;
        return Step::Stop;
    }
    let refusal = match &hook.prepare {
        Prepare::Nothing => return Step::Prepared,
        Prepare::Lock(lock) => {
            if take(hooks, &lock.lock, how) {
                lock.taken.store(true, Ordering::Relaxed);
                return Step::Prepared;
            }
            report.hook = Some(hook.rest.name);
            *end = Hooks::Conflict;
            return Step::Stop;
        }
        Prepare::Call(f) => catch_unwind(AssertUnwindSafe(|| {
            f();
            Ok(())
        })),
        Prepare::Trial(f) => catch_unwind(AssertUnwindSafe(f)),
    };
    let veto = match refusal {
        Ok(Ok(())) => return Step::Prepared,
        Ok(Err(veto)) => Some(veto.0),
        Err(payload) => {
            report.panic = message(&*payload);
            // Freeing is not for here; a hook that panics is a bug worth a few bytes.
            #[allow(clippy::mem_forget)]
            std::mem::forget(payload);
            None
        }
    };
    // Nor is freeing what another hook said before: a foreign fork goes on to the next.
    #[allow(clippy::mem_forget)]
    std::mem::forget(std::mem::replace(&mut report.veto, veto));
    report.hook = Some(hook.rest.name);
    *vetoed = true;
    if coordinated {
        *end = Hooks::Vetoed;
        Step::Stop
    } else {
        Step::Skip
    }
}

/// Takes a foreign lock: a few tries with the gate shut; with the gate open, tries with growing pauses until the time is up.
///
/// Its own wait would be fairer, but most locks offer none with an end, and the budget is a promise (G6). A lock that others
/// take again and again is free for an instant at a time, while its holder runs: so it is tried many times in a row, about a
/// tenth of the time, not once a pause.
fn take(hooks: &HookList<Hook>, lock: &dyn Foreign, how: How) -> bool {
    let mut tries = TRIES.0;
    if take_soon(lock, tries) {
        return true;
    }
    let How::Wait(until) = how else { return false };
    let mut pause = PAUSES.0;
    while !hooks.is_left() && clock::now() < until {
        sys::sleep(pause);
        if take_soon(lock, tries) {
            return true;
        }
        pause = (pause * 2).min(PAUSES.1);
        tries = (tries * 2).min(TRIES.1);
    }
    false
}

fn take_soon(lock: &dyn Foreign, tries: u32) -> bool {
    for _ in 0..tries {
        if lock.take() {
            return true;
        }
        std::hint::spin_loop();
    }
    false
}

/// Calls a hook after prepare; a panic is reported on fd 2 and goes no further. False if there was no room for that.
pub(crate) fn call(hook: &Hook, phase: Phase) -> bool {
    let f = match phase {
        Phase::Undo => hook.undo.as_ref().or(hook.parent.as_ref()),
        Phase::Parent => hook.parent.as_ref(),
        Phase::Child => hook.child.as_ref(),
    };
    if let Some(f) = f
        && let Err(payload) = catch_unwind(AssertUnwindSafe(f))
    {
        return panicked(hook.rest.name, phase, payload);
    }
    true
}

/// Apart from `call`, for its buffers: a frame that large would have the child copy another page of its stack.
#[cold]
#[inline(never)]
fn panicked(hook: &str, phase: Phase, payload: Box<dyn std::any::Any + Send>) -> bool {
    let said = say_panic(hook, phase.name(), &message(&*payload));
    // As in `prepare`.
    #[allow(clippy::mem_forget)]
    std::mem::forget(payload);
    said
}

/// One line on fd 2; false if there is no room for it.
pub(crate) fn say_panic(hook: &str, phase: &[u8], message: &Text) -> bool {
    let mut line = Text::new();
    line.push(b"carefork: hook ");
    line.push(hook.as_bytes());
    line.push(b" panicked in ");
    line.push(phase);
    line.push(b": ");
    line.push(message.as_bytes());
    line.push(b"\n");
    sys::say(line.as_bytes())
}

/// The text of a panic, without allocation.
pub(crate) fn message(payload: &(dyn std::any::Any + Send)) -> Text {
    let mut text = Text::new();
    let said = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    text.push(said.unwrap_or("(no text)").as_bytes());
    text
}

// Two cache lines with the list's own words.
const _: () = assert!(size_of::<crate::hook_list::Node<Hook>>() == 128);
