//! The step itself: libc's fork between the handlers, and what each side does right after (K1-K4).

#![allow(unsafe_code)]

use crate::error::ForkError;
use crate::gate::{FIRST_BOUND, LAST_BOUND, Slot};
use crate::in_child::InChild;
use crate::locks::OnceLock;
use crate::options::{ForkOptions, Ready};
use crate::prepare::Outcome;
use crate::reap::child::Child;
use crate::reap::known::{Began, UnderWay};
use crate::reap::{known, orphans};
use crate::runtime::{self, Passed, Request, count};
use crate::{care_table, clock, replace, stdio, sys, sys_signals};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;

/// The two sides of a fork.
#[derive(Debug)]
#[must_use = "in the child somebody must clean up, exec or exit"]
pub enum Fork {
    /// In the parent: the child.
    Parent(Child),
    /// In the child: what it may do next.
    Child(InChild),
}

// The caller's `?` moves it in the child too: more than this is a call of libc's memcpy, a page of code that the child touches first.
const _: () = assert!(size_of::<Result<Fork, ForkError>>() <= 128);

/// Forks: every carefork lock, region and hook is at rest at that instant, in parent and child.
///
/// Waits until no other thread is in a region, takes the hooks' locks, forks with libc's fork (other libraries' at-fork handlers
/// run), and lets everything go on both sides. See [`ForkOptions`] for budget, signals and descriptors. From fork(2), POSIX.
///
/// # Errors
/// [`ForkError`]; there is no child then, and nothing has changed (K2). A child that ended before it began may have been
/// seen by a SIGCHLD handler (G2). `Forbidden` inside this thread's own region; `Busy` after the budget; `WouldDeadlock`,
/// `Vetoed`, `Invalid`, `Os`.
///
/// # Safety
/// The child is a copy of one thread. What carefork knows of is at rest there; what remains is for the caller:
/// - locks of other code that no hook guards may be held by threads that are gone: libc's time zone, environment, locale, syslog,
///   name service, dlopen; a memory allocator without at-fork handlers. The child must not wait for them.
/// - references into the stacks of other threads (scoped threads) dangle in the child.
/// - a descriptor that is closed in the child (by the clean-up, by `OnFork::Close`, by `close_others`) must not be used there
///   through a borrowed or raw descriptor made in the parent.
/// - memory shared with the parent and open file descriptions (offsets, locks) are shared still.
/// - it is to end in the function that forked, by exit, exec or a loop of its own: a return, `?` or panic goes on in the parent's frames a second time,
///   whose buffers are written twice, and a `thread::scope` among them waits for ever for threads that are not there. [`spawn`] cannot go wrong so.
/// - it starts threads only as far as [`thread`](crate::thread) allows.
///
/// ```
/// // SAFETY: the child exits at once.
/// match unsafe { carefork::fork() }? {
///     carefork::Fork::Child(child) => child.exit(3),
///     carefork::Fork::Parent(mut child) => assert_eq!(child.wait()?.code(), Some(3)),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[unsafe(link_section = ".text_carefork")]
pub unsafe fn fork() -> Result<Fork, ForkError> {
    // SAFETY: the caller's promise.
    unsafe { ForkOptions::new().fork() }
}

/// Runs `f` in a child that does not exec; see [`ForkOptions::spawn`].
///
/// # Errors
/// As for [`fork`].
///
/// # Safety
/// As for [`fork`]; and `f` uses no borrowed or raw descriptor of a care-fd that the clean-up closes. (The `CareFd` itself panics.)
///
/// ```
/// // SAFETY: the closure touches nothing of the parent's.
/// let mut child = unsafe { carefork::spawn(|| 0) }?;
/// assert!(child.wait()?.success());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub unsafe fn spawn(f: impl FnOnce() -> i32) -> Result<Child, ForkError> {
    // SAFETY: the caller's promise.
    unsafe { ForkOptions::new().spawn(f) }
}

impl ForkOptions<'_> {
    /// Forks with these options; see [`fork`].
    ///
    /// # Errors
    /// As for [`fork`]; contradictory options are [`ForkError::Invalid`] and cost no fork.
    ///
    /// # Safety
    /// As for [`fork`].
    #[unsafe(link_section = ".text_carefork")]
    pub unsafe fn fork(&self) -> Result<Fork, ForkError> {
        // Not in one value of all three ends: the child would have to move that, and a call of libc's memcpy is another page of code.
        let end = match self.ready() {
            // SAFETY: the caller's promise.
            Ok(ready) => match unsafe { self.fork_ready(&ready) } {
                Ok(Side::Child(before)) => return Ok(Fork::Child(self.begin_child(ready, before.as_ref()))),
                Ok(Side::Parent(pid, under_way)) => {
                    let began = Began::of(under_way.as_ref());
                    let child = Child::new(pid, self.pidfd, began).known_as(self.name.as_deref(), self.new_session);
                    drop(under_way);
                    Ok(child)
                }
                Err(e) => Err(e),
            },
            Err(e) => Err(e),
        };
        if end.is_err() {
            count().refused.fetch_add(1, Relaxed);
        }
        if runtime::hooks().has_leftovers() {
            crate::registration::tidy();
        }
        end.map(Fork::Parent)
    }

    /// Forks a child that cleans up, runs `f` and ends with its result as exit code; the child never returns from here.
    ///
    /// A panic in `f` is caught there, its message goes to fd 2 by write(2) (no backtrace), and the exit code is 101. For that the first call puts
    /// carefork's panic hook before the process's own, which is not called in such children; a hook that is set later takes its place, and may
    /// wait there for a lock of std's without [`stdio::guard`](crate::stdio::guard). Of the exit code the kernel keeps eight bits. No
    /// destructor of the parent's frames and no atexit handler runs in the child. With [`stdio::guard`](crate::stdio::guard)
    /// registered, what `f` printed is flushed; without it std's lock may be held by a thread that is gone, so only `f` can
    /// know whether flushing is safe.
    ///
    /// # Errors
    /// As for [`fork`].
    ///
    /// # Safety
    /// As for [`fork`]; and `f` uses no borrowed or raw descriptor of a care-fd that the clean-up closes. (The `CareFd` itself panics.)
    pub unsafe fn spawn(&self, f: impl FnOnce() -> i32) -> Result<Child, ForkError> {
        stdio::panics_by_write();
        // SAFETY: the caller's promise.
        let token = match unsafe { self.fork() }? {
            Fork::Parent(child) => return Ok(child),
            Fork::Child(token) => token,
        };
        stdio::in_spawned_child();
        let code = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: the caller's promise: borrowed descriptors are not used.
            unsafe { token.cleanup() };
            f()
        }));
        if stdio::is_guarded() {
            // Nobody to tell: a closed standard output loses what was printed to it, as in any program.
            drop(catch_unwind(|| std::io::stdout().flush()));
        }
        if let Some(f) = AT_CHILD_END.get() {
            drop(catch_unwind(f));
        }
        sys::exit_now(code.unwrap_or_else(|payload| {
            // Its destructor may panic in turn, and would unwind the parent's frames.
            #[allow(clippy::mem_forget)]
            std::mem::forget(payload);
            101
        }))
    }

    /// # Safety
    /// As for `fork`.
    #[inline(always)]
    unsafe fn fork_ready(&self, ready: &Ready) -> Result<Side, ForkError> {
        runtime::generation();
        let me = runtime::me();
        // The seat names the fork before carefork's own handler knows of it: other libraries' handlers come first.
        if runtime::in_fork() || !me.request.load(Relaxed).is_null() {
            return Err(ForkError::InFork);
        }
        if me.in_guard() && !runtime::is_off() {
            return Err(ForkError::Forbidden { entered: me.entered() });
        }
        orphans::reap();
        runtime::forget_report(me);
        runtime::gate().seats.verdicts.ready().map_err(ForkError::Os)?;
        let begin = clock::now();
        let ns = |d: std::time::Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let mut request = Request {
            deadline: self.timeout.map(|d| begin.saturating_add(ns(d))),
            let_go_at: None,
            bound: FIRST_BOUND,
            outcome: None,
            since: None,
            note: None,
            noted: None,
        };
        loop {
            request.let_go_at = Some(let_go_at(request.deadline));
            // An owner of SIGCHLD must not take the child for a stranger's.
            let mut under_way = known::making_one();
            request.note = under_way.is_some().then_some(known::note_made);
            request.noted = None;
            if let (true, Some(fork)) = (runtime::is_off(), &mut under_way) {
                fork.is_made();
            }
            // SAFETY: the caller's promise.
            let (end, passed) = unsafe { once(me, &mut request) };
            if let (Some(found), Some(fork)) = (request.noted, &mut under_way) {
                fork.was_made(found);
            }
            let pid = match end {
                Ok(0) => {
                    // The parent's count, on a page that need not be copied.
                    std::mem::forget(under_way);
                    return Ok(Side::Child(passed.mask));
                }
                Ok(pid) => pid,
                Err(e) => {
                    if let Some(since) = request.since {
                        runtime::waited_in_vain(since);
                    }
                    restore(&passed);
                    return Err(ForkError::Os(e));
                }
            };
            let again = match request.outcome {
                None | Some(Outcome::Committed(_)) => {
                    if !passed.late {
                        restore(&passed);
                        count().forks.fetch_add(1, Relaxed);
                        if let Some(armed) = &ready.armed {
                            armed.wait(|| sys::is_dead(pid));
                        }
                        return Ok(Side::Parent(pid, under_way));
                    }
                    FIRST_BOUND
                }
                Some(Outcome::Again { bound, .. }) => bound,
                Some(_) => 0,
            };
            // A child that was none: gone, or taken by a waitpid(-1) elsewhere, which is the same.
            drop(sys::reap(pid, true));
            known::forget_thrown_away(pid, under_way.as_ref());
            drop(under_way);
            count().thrown_away.fetch_add(1, Relaxed);
            let over = request.deadline.is_some_and(|d| clock::now() >= d);
            // Before the mask is restored: the handler of a signal that comes then may fork, which collects in the same place.
            let end = (again == 0 || over).then(|| {
                if let Some(since) = request.since {
                    runtime::waited_in_vain(since);
                }
                let outcome = request.outcome.take().unwrap_or(Outcome::Busy);
                refused(me, outcome)
            });
            restore(&passed);
            if let Some(error) = end {
                return Err(error);
            }
            // Others that wait for a lock of another library's handler get it now.
            let rested = clock::now();
            sleep(again, request.deadline);
            request.bound = again;
            // Kept out by others, it waits until they are through, and does not count twice for it.
            request.since.get_or_insert(rested);
            request.outcome = None;
        }
    }

    /// The child's first steps, signals blocked. Async-signal-safe: nothing here can fail or allocate.
    #[inline(always)]
    fn begin_child(&self, ready: Ready, before: Option<&sys_signals::SigSet>) -> InChild {
        self.signals.reset_dispositions();
        if self.new_session {
            sys::new_session();
        }
        if let Some(name) = &ready.name {
            sys::set_name(name);
        }
        if let Some(null) = ready.null {
            sys::become_stdio(null.as_raw_fd());
            // With a number of a standard stream, which was closed in the parent, it is that stream now, and not closed here.
            care_table::forget_stdio();
            drop(null);
        }
        if self.close_others {
            care_table::close_all_but(&ready.keep, None);
        }
        if let Some(signal) = self.death_signal {
            sys::set_death_signal(signal);
            // 0 is a parent outside this child's PID namespace: nothing tells whether it lives.
            if ![ready.parent, 0].contains(&sys::getppid()) {
                sys::raise_at_self(signal);
            }
            if let Some(armed) = &ready.armed {
                armed.tell();
            }
        }
        if let Some(before) = before {
            sys_signals::set_mask(&self.signals.mask(before, ready.mask.as_ref()));
        }
        InChild::new(ready.keep)
    }
}

/// Where a fork has come back.
enum Side {
    /// With the mask from before, if signals are blocked still.
    Child(Option<sys_signals::SigSet>),
    /// With the child's number; it is under way until it is written down.
    Parent(u32, Option<UnderWay>),
}

/// What a child of `spawn` does last: `_exit` runs no atexit handler.
static AT_CHILD_END: OnceLock<fn()> = OnceLock::new();

/// Has `f` called at the end of each child of `spawn`; the first to ask is the one.
#[cfg(feature = "log")]
pub(crate) fn at_child_end(f: fn()) {
    let _ = AT_CHILD_END.set(f);
}

/// When a fork that gets nowhere lets go of what other libraries' handlers took for it: half way through what is left of its
/// budget. Without a budget too, or it would wait for ever for a region that waits for such a lock.
fn let_go_at(deadline: Option<u64>) -> u64 {
    let now = clock::now();
    let left = deadline.map_or(1_000_000_000, |d| d.saturating_sub(now));
    now.saturating_add((left / 2).max(LAST_BOUND / 10))
}

/// Apart, for its buffers: every page of the frames below libc's fork is copied on both sides.
#[cold]
#[inline(never)]
fn refused(me: &Slot, outcome: Outcome) -> ForkError {
    runtime::take_report(me).into_error(outcome)
}

/// By `clock`, which a test may drive; no longer than until `deadline`.
fn sleep(ns: u64, deadline: Option<u64>) {
    let until = clock::now().saturating_add(ns);
    let until = deadline.map_or(until, |d| d.min(until));
    while let left @ 1.. = until.saturating_sub(clock::now()) {
        sys::sleep(clock::real_wait(left));
    }
}

fn restore(passed: &Passed) {
    if let Some(mask) = &passed.mask {
        sys_signals::set_mask(mask);
    }
}

/// One call of libc's fork with `request` for the handlers to find.
///
/// # Safety
/// As for `fork`.
#[inline(always)]
unsafe fn once(me: &Slot, request: &mut Request) -> (std::io::Result<u32>, Passed) {
    // Turned off, the handlers do nothing, and the child must have its signals blocked all the same.
    let mask = runtime::is_off().then(sys_signals::block_all);
    let forks = runtime::count_forks(me);
    let place = std::ptr::from_mut(request);
    me.request.store(place.cast(), Relaxed);
    me.set_entered(true);
    // SAFETY: the caller's promise. The handlers use `request` through the seat while this call lasts, this frame does not.
    let end = unsafe { replace::fork() };
    let passed = runtime::passed(me, end.is_ok());
    me.set_entered(false);
    me.request.store(std::ptr::null_mut(), Relaxed);
    runtime::counted(me, forks);
    (end, Passed { mask: passed.mask.or(mask), ..passed })
}
