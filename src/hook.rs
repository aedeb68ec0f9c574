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
use std::sync::atomic::{AtomicBool, Ordering};

/// What a hook does after the fork, or where there was none.
pub(crate) trait Call: Send + Sync {
    fn call(&self);
}

impl<F: Fn() + Send + Sync> Call for F {
    fn call(&self) {
        self();
    }
}

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

/// What a hook does before a fork. On the forking thread, without allocating.
trait Prepare: Send + Sync {
    fn prepare(&self, attempt: &Attempt<'_>) -> Result<(), Refusal>;

    /// The foreign lock that it takes.
    fn lock(&self) -> Option<&Arc<Taken<dyn Foreign>>> {
        None
    }
}

/// One way through the hooks before a fork.
pub(crate) struct Attempt<'a> {
    pub(crate) hooks: &'a HookList<Calls>,
    pub(crate) how: How,
}

pub(crate) enum Refusal {
    Veto(Veto),
    /// The lock was not to be had.
    Conflict,
}

/// Cannot say no.
struct Simple<F>(F);

impl<F: Fn() + Send + Sync> Prepare for Simple<F> {
    fn prepare(&self, _: &Attempt<'_>) -> Result<(), Refusal> {
        (self.0)();
        Ok(())
    }
}

struct Trial<F>(F);

impl<F: Fn() -> Result<(), Veto> + Send + Sync> Prepare for Trial<F> {
    fn prepare(&self, _: &Attempt<'_>) -> Result<(), Refusal> {
        (self.0)().map_err(Refusal::Veto)
    }
}

impl Prepare for Arc<Taken<dyn Foreign>> {
    fn prepare(&self, attempt: &Attempt<'_>) -> Result<(), Refusal> {
        if !take(attempt, &self.lock) {
            return Err(Refusal::Conflict);
        }
        self.taken.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn lock(&self) -> Option<&Arc<Taken<dyn Foreign>>> {
        Some(self)
    }
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
/// A lock that hooks hold may be taken inside regions and around them (H4). Where threads do both in loops without a pause, a fork may find no
/// instant when neither is under way, and use up its budget: beside two such threads 3 forks of 98 did, beside up to eight that rest for
/// 10 µs none of 600. With carefork's own locks there is but one order.
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
pub struct Hook {
    rank: i32,
    calls: Calls,
}

/// A hook in the list. Small, because a fork copies the page tables of all that is mapped, at 0.2 µs a page, and goes through this
/// memory three times, twice with nothing of it in the processor's caches.
#[repr(C)]
pub(crate) struct Calls {
    // What both sides call after a fork lies by the list's own words for the way back.
    child: Option<Box<dyn Call>>,
    parent: Option<Box<dyn Call>>,
    prepare: Option<Box<dyn Prepare>>,
    pub(crate) name: &'static str,
    /// Most hooks have nothing of it.
    rare: Option<Box<Rare>>,
}

#[derive(Default)]
struct Rare {
    undo: Option<Box<dyn Call>>,
    /// Shared, so that a clean-up can run it without the list.
    cleanup: Option<Arc<dyn Fn() + Send + Sync>>,
    /// What its prepare took, where that was worth a page that the fork would copy.
    waited: Option<Clocked>,
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hook").field("name", &self.calls.name).field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl Hook {
    /// A hook that does nothing yet, of rank 0. The name is what errors and reports call it.
    pub fn new(name: &'static str) -> Self {
        Hook { rank: 0, calls: Calls { child: None, parent: None, prepare: None, name, rare: None } }
    }

    /// Its place in lock order: prepare runs by rising rank, outer locks first; among equals the newest first (H2).
    pub fn rank(mut self, rank: i32) -> Self {
        self.rank = rank;
        self
    }

    /// Runs before the fork. It may block; a lock that can be tried is better served by
    /// [`Hook::std_mutex`] and its kin, which keep to the fork's budget.
    pub fn prepare(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.calls.prepare = Some(Box::new(Simple(f)));
        self
    }

    /// Runs before the fork and may say no to it (H3). Replaces [`Hook::prepare`].
    pub fn try_prepare(mut self, f: impl Fn() -> Result<(), Veto> + Send + Sync + 'static) -> Self {
        self.calls.prepare = Some(Box::new(Trial(f)));
        self
    }

    /// Runs instead of `parent` where the fork did not happen. Without one, `parent` runs.
    ///
    /// It may also run after a foreign fork that did happen, and `parent` after one that did not, where another library registered its at-fork
    /// handlers before this one and leaves errno changed: errno is all that libc tells handlers of a fork's end. So both should leave
    /// locks in the same state. A fork by this crate is always told apart.
    pub fn undo(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        let undo = self.and_let_go(f, |lock| lock.release());
        self.calls.rare().undo = Some(undo);
        self
    }

    /// Runs in the parent after the fork.
    pub fn parent(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.calls.parent = Some(self.and_let_go(f, |lock| lock.release()));
        self
    }

    /// Runs in every child, also one that will exec in a moment.
    pub fn child(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.calls.child = Some(self.and_let_go(f, |lock| lock.release_in_child()));
        self
    }

    /// As `child`, for a function that lies with the rest of what every child runs.
    pub(crate) fn child_by(mut self, call: impl Call + 'static) -> Self {
        self.calls.child = Some(Box::new(call));
        self
    }

    /// Runs in a child that goes on without exec, as part of its clean-up; there it may allocate and start threads.
    pub fn cleanup(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.calls.rare().cleanup = Some(Arc::new(f));
        self
    }

    pub(crate) fn foreign(name: &'static str, lock: impl Foreign + 'static) -> Self {
        let lock: Arc<Taken<dyn Foreign>> = Arc::new(Taken { taken: AtomicBool::new(false), lock });
        let mut hook = Hook::new(name);
        hook.calls.prepare = Some(Box::new(lock));
        hook.parent(|| {}).child(|| {})
    }

    /// `f`; for the hook of a foreign lock, then its release, also where `f` panics.
    fn and_let_go(&self, f: impl Fn() + Send + Sync + 'static, release: fn(&dyn Foreign)) -> Box<dyn Call> {
        match self.calls.lock() {
            Some(lock) => {
                let lock = Arc::clone(lock);
                Box::new(move || {
                    let _after = LetGo(&*lock, release);
                    f();
                })
            }
            None => Box::new(f),
        }
    }

    /// What the list keeps of it, and its rank. With `timed`, there is room to note what its prepare takes.
    pub(crate) fn into_calls(mut self, timed: bool) -> (i32, Calls) {
        if timed {
            self.calls.rare().waited = Some(Clocked::new());
        }
        (self.rank, self.calls)
    }
}

impl Calls {
    fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    fn lock(&self) -> Option<&Arc<Taken<dyn Foreign>>> {
        self.prepare.as_ref()?.lock()
    }

    pub(crate) fn cleanup(&self) -> Option<&Arc<dyn Fn() + Send + Sync>> {
        self.rare.as_ref()?.cleanup.as_ref()
    }

    fn waited_place(&self) -> Option<&Clocked> {
        self.rare.as_ref()?.waited.as_ref()
    }

    /// In a child whose fork has not prepared this hook: a foreign lock that another thread's fork had is let go of. That fork is
    /// not here to do it, and nobody was inside.
    pub(crate) fn abandon(&self) {
        if let Some(lock) = self.lock() {
            drop(LetGo(&**lock, |lock| lock.release_in_child()));
        }
    }
}

/// With more hooks than this none is timed: reading the clock would cost as much as calling them. Nor has one that comes behind so many
/// the memory for it.
pub(crate) const TIMED: u32 = 64;
/// A prepare that took less than this many ns has waited for nothing: a few system calls and page faults. Noting it would cost as much again,
/// for a page that the fork copies.
pub(crate) const WORTH_NOTING: u64 = 10_000;

impl Calls {
    /// By the role's holder, in the process of that generation.
    pub(crate) fn took(&self, ns: u64, generation: u32) {
        if ns >= WORTH_NOTING
            && let Some(waited) = self.waited_place()
        {
            waited.note(ns, generation);
        }
    }

    /// What its prepare took in this process, whose generation that is.
    pub(crate) fn waited(&self, generation: u32) -> Durations {
        self.waited_place().map_or_else(Durations::default, |waited| waited.read(generation))
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

/// Why a hook is not prepared.
pub(crate) enum Unprepared {
    /// Somebody waits for a fork to give way.
    Left,
    Refused(Refusal),
    Panicked(Box<dyn std::any::Any + Send>),
}

impl Attempt<'_> {
    /// Prepares one hook. Runs in the prepare handler; allocates nothing unless the hook panics.
    #[inline(always)]
    pub(crate) fn prepare(&self, hook: &Calls) -> Result<(), Unprepared> {
        if self.hooks.is_left() {
            return Err(Unprepared::Left);
        }
        let Some(f) = &hook.prepare else { return Ok(()) };
        match catch_unwind(AssertUnwindSafe(|| f.prepare(self))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(refusal)) => Err(Unprepared::Refused(refusal)),
            Err(payload) => Err(Unprepared::Panicked(payload)),
        }
    }
}

/// Notes why, and whether the fork goes on: a foreign one does with a veto.
#[cold]
#[inline(never)]
pub(crate) fn refuse(
    hook: &Calls,
    why: Unprepared,
    coordinated: bool,
    report: &mut Report,
    vetoed: &mut bool,
    end: &mut Hooks,
) -> Step {
    let veto = match why {
        Unprepared::Left => {
            *end = Hooks::Unregistering;
            return Step::Stop;
        }
        Unprepared::Refused(Refusal::Conflict) => {
            report.hook = Some(hook.name);
            *end = Hooks::Conflict;
            return Step::Stop;
        }
        Unprepared::Refused(Refusal::Veto(veto)) => Some(veto.0),
        Unprepared::Panicked(payload) => {
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
    report.hook = Some(hook.name);
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
fn take(attempt: &Attempt<'_>, lock: &dyn Foreign) -> bool {
    let mut tries = TRIES.0;
    if take_soon(lock, tries) {
        return true;
    }
    let How::Wait(until) = attempt.how else { return false };
    let mut pause = PAUSES.0;
    while !attempt.hooks.is_left() && clock::now() < until {
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
pub(crate) fn call(hook: &Calls, phase: Phase) -> bool {
    let f = match phase {
        Phase::Undo => hook.rare.as_ref().and_then(|r| r.undo.as_ref()).or(hook.parent.as_ref()),
        Phase::Parent => hook.parent.as_ref(),
        Phase::Child => hook.child.as_ref(),
    };
    if let Some(f) = f
        && let Err(payload) = catch_unwind(AssertUnwindSafe(|| f.call()))
    {
        return panicked(hook.name, phase, payload);
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

// With malloc's own word, two cache lines.
const _: () = assert!(size_of::<crate::hook_list::Node<Calls>>() <= 120);
