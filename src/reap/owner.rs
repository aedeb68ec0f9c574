//! Who owns SIGCHLD, and what becomes of children that nobody knows.
//!
//! Known children are found by their pidfds in every arrangement but the main loop's; owning the signal is for those that
//! are not carefork's (C4), and for programs that keep `waitpid` to themselves.

use super::exit::{Ending, Exit, Record};
use super::known::{self, HandedIn, Holder, children};
use super::orphans;
use super::reaper::{self, After, Reaper, SIGCHLD, Shared};
use super::sigchld::{self, Checked, Sigchld};
use crate::carefd::CareFd;
use crate::{runtime, sys, sys_reap};
use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

/// Who owns SIGCHLD and who reaps, for [`Reaper::set_owner`]. From libxl's `libxl_sigchld_owner`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SigchldOwner {
    /// Nobody here: children are watched by pidfd, no signal is used, no other child is touched.
    #[default]
    Nobody,
    /// The reaper, while it has children: its handler is installed for as long, and it reaps *every* child of the process that ends.
    WhileChildren,
    /// The reaper, for as long as it lives; it reaps every child of the process that ends.
    Always,
    /// The reaper, for as long as it lives; it reaps its own children only. Where SIGCHLD was ignored before, the handler would make zombies of
    /// all others, which it reaps for the kernel, for as long as it is not displaced.
    Selective,
    /// The program's main loop: it waits, and tells the reaper with [`Reaper::reaped`], or has it look with
    /// [`Reaper::sigchld_occurred`]. The reaper reaps nobody by itself, and its descriptor does not tell of deaths.
    MainLoop,
}

impl SigchldOwner {
    /// It is asked about strangers.
    fn reaps_all(self) -> bool {
        matches!(self, SigchldOwner::WhileChildren | SigchldOwner::Always)
    }

    /// It reaps them at this moment.
    fn reaps_all_now(self, children: bool) -> bool {
        self.reaps_all() && self.wants_signal(children)
    }

    fn wants_signal(self, children: bool) -> bool {
        match self {
            SigchldOwner::Nobody | SigchldOwner::MainLoop => false,
            SigchldOwner::WhileChildren => children,
            SigchldOwner::Always | SigchldOwner::Selective => true,
        }
    }
}

/// A reaper's arrangement.
pub(crate) struct Owner {
    mode: SigchldOwner,
    /// It is one of the handler's users.
    holds: bool,
    /// The handler's socket was made anew, and epoll had no room for it here.
    deaf: bool,
}

impl Owner {
    pub(crate) const NOBODY: Owner = Owner { mode: SigchldOwner::Nobody, holds: false, deaf: false };

    pub(crate) fn reaps_itself(&self) -> bool {
        self.mode != SigchldOwner::MainLoop
    }

    /// It does not hear the handler; or a stranger was found that might be the child of a fork under way, and nothing tells of the end of
    /// that. Whoever found it may have given up since: any reaper will do.
    pub(crate) fn has_to_look_again(&self) -> bool {
        self.holds && self.deaf || known::strangers_wait()
    }

    /// By a reaper that holds.
    fn hear_handler(&mut self, shared: &Shared) -> io::Result<()> {
        let heard = sigchld::with_reader(|fd| match shared.hear(fd, SIGCHLD) {
            // Another thread's dispatch has found the socket made anew, and was faster.
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            heard => heard,
        });
        let heard = heard.unwrap_or(Ok(()));
        self.deaf = heard.is_err();
        heard
    }
}

/// What a callback of [`Reaper::on_unknown`] makes of a child.
#[derive(Debug)]
#[non_exhaustive]
pub enum Claim {
    /// It is the callback's: nothing more is to be done.
    Mine,
    /// It is not: others are asked, and if nobody claims it, that is reported on fd 2.
    NotMine,
    /// It should not exist: [`Reaper::dispatch`] fails with this once all were asked about (with the first; the others are
    /// reported on fd 2).
    Disaster(Box<dyn Error + Send + Sync>),
}

pub(crate) type UnknownFn = dyn Fn(&Exit) -> Claim + Send + Sync;

/// A status was brought for a child that this reaper does not watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnknownChild {
    /// Its number.
    pub pid: u32,
    /// The status, unused.
    pub status: ExitStatus,
}

impl fmt::Display for UnknownChild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "child {} ({}) is not one of this reaper's", self.pid, self.status)
    }
}

impl Error for UnknownChild {}

impl Reaper {
    /// Says who owns SIGCHLD, from now on.
    ///
    /// Several reapers may want it: they share one handler, which calls the one that was there before (plain or
    /// `SA_SIGINFO`), and is taken away, and the other restored, when the last of them gives it up. A handler that other code
    /// installs over it is left alone and reported ([`Reaper::sigchld`]).
    ///
    /// Best done before the first fork: a child forked earlier that is held by a [`Child`](crate::Child), not watched, is a
    /// stranger to a reaper that reaps every child, and whoever holds it is told that its status is lost.
    ///
    /// # Errors
    /// As socketpair(2), epoll_create1(2) and epoll_ctl(2); ECHILD in a child of this process; `BrokenPipe` if the reaper is closed.
    /// The arrangement is what it was then.
    pub fn set_owner(&self, mode: SigchldOwner) -> io::Result<()> {
        let shared = self.shared();
        if !shared.is_ours() {
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        if mode != SigchldOwner::Nobody {
            known::want();
            reaper::all().iter().for_each(|r| r.engine.write_down());
            orphans::write_down();
        }
        let mut owner = shared.owner.lock();
        if shared.is_closed() {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the reaper is closed; make a new one"));
        }
        shared.engine.hide(mode == SigchldOwner::MainLoop)?;
        let before = std::mem::replace(&mut owner.mode, mode);
        adjust(shared, &mut owner).inspect_err(|_| {
            owner.mode = before;
            // To where they came from: there is an epoll there.
            drop(shared.engine.hide(before == SigchldOwner::MainLoop));
        })?;
        drop(owner);
        // Children without a pidfd are asked for from now on, or not any more.
        shared.timer.rearm(shared);
        Ok(())
    }

    /// Who is asked about children that ended and are not carefork's, when this reaper reaps every child; the status was taken
    /// by then. Runs in a dispatch of any reaper, with no lock held, and may call back in. Reapers are asked in the order of their making.
    ///
    /// One that owns a handle of this reaper keeps it alive until [`Reaper::close`].
    pub fn on_unknown(&self, f: impl Fn(&Exit) -> Claim + Send + Sync + 'static) {
        let shared = self.shared();
        if shared.is_ours() {
            let f: Arc<UnknownFn> = Arc::new(f);
            let _old = shared.unknown.lock().replace(f);
            if shared.is_closed() {
                // Nobody will be asked, and nobody else would drop it.
                let _unknown = shared.unknown.lock().take();
            }
        }
    }

    /// The main loop has waited for `pid` and got `status`: if it is one of this reaper's, its callback runs now. For [`SigchldOwner::MainLoop`],
    /// to be set before the child is forked: until then nobody keeps numbers. A status that says
    /// "stopped" or "continued" is taken note of and ends nobody. A child that a [`Child`](crate::Child) holds gets the status too, if it
    /// has not been asked between the two waits.
    ///
    /// # Errors
    /// [`UnknownChild`] if it is not this reaper's, and not held by a [`Child`](crate::Child) either; or if that child can be waited for, by its
    /// pidfd or by its number: then the status was another's with that number.
    pub fn reaped(&self, pid: u32, status: ExitStatus) -> Result<(), UnknownChild> {
        let shared = self.shared();
        let unknown = Err(UnknownChild { pid, status });
        if !shared.is_ours() || shared.is_closed() {
            return unknown;
        }
        let ends = status.code().is_some() || status.signal().is_some();
        let record = Record::new(Ending::from_raw(status.into_raw()));
        let _after = After(shared);
        match children().holder(pid) {
            Some(Holder::Reaper { reaper, index }) if reaper == shared.id => {
                let Some(key) = shared.engine.key_at(index, pid) else { return Ok(()) };
                if ends {
                    // The number may have come round again between the wait and this.
                    if shared.engine.with(key, |entry| entry.body.can_be_waited_for()) == Some(true) {
                        return unknown;
                    }
                    shared.finish_with(key, record);
                }
                Ok(())
            }
            Some(Holder::Asks) if !ends => Ok(()),
            Some(Holder::Reaper { .. }) => unknown,
            // Of nobody's, a fork that is under way may have made it.
            Some(Holder::Asks) | None => match ends.then(|| children().hand_in(pid, record)) {
                Some(HandedIn::Kept) => Ok(()),
                _ => unknown,
            },
        }
    }

    /// The main loop has seen SIGCHLD, or thinks that children may have ended: reaps this reaper's own and nobody else's; how many.
    ///
    /// # Errors
    /// As for [`Reaper::dispatch`].
    pub fn sigchld_occurred(&self) -> io::Result<usize> {
        if !self.shared().is_ours() {
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        if self.shared().is_closed() {
            return Ok(0);
        }
        let _after = After(self.shared());
        self.shared().reap_own()
    }

    /// Who has SIGCHLD now. One system call.
    pub fn sigchld(&self) -> Sigchld {
        sigchld::who()
    }
}

/// Takes or gives up the signal, by mode and children.
fn adjust(shared: &Arc<Shared>, owner: &mut Owner) -> io::Result<()> {
    let wants = !shared.is_closed() && owner.mode.wants_signal(shared.engine.live() > 0);
    if wants && !owner.holds {
        sigchld::acquire()?;
        owner.hear_handler(shared).inspect_err(|_| {
            sigchld::release();
        })?;
        owner.holds = true;
    } else if !wants && owner.holds {
        owner.holds = false;
        sigchld::with_reader(|fd| shared.hear_no_more(fd));
        if sigchld::release() {
            // Ignored from now on: for those that ended under our handler no signal comes any more. Who wants it while there are children
            // is there to tell of them.
            drop(reap_all(owner.mode == SigchldOwner::WhileChildren));
        }
    }
    Ok(())
}

/// A child came or went.
pub(crate) fn children_changed(shared: &Arc<Shared>) {
    let mut owner = shared.owner.lock();
    if owner.mode == SigchldOwner::WhileChildren {
        // Without descriptors for the handler's socket, strangers are found at the next dispatch.
        drop(adjust(shared, &mut owner));
    }
}

/// The reaper closes.
pub(crate) fn leave(shared: &Arc<Shared>) {
    let mut owner = shared.owner.lock();
    owner.mode = SigchldOwner::Nobody;
    // Giving up cannot fail.
    drop(adjust(shared, &mut owner));
    drop(owner);
    if known::strangers_wait() {
        // Others tell of them.
        reaper::rearm_all();
    }
}

/// What the signal is for: drains it, and reaps every child where that is asked for. This reaper's among them are for its own
/// dispatch to find.
pub(crate) fn before_dispatch(shared: &Arc<Shared>) -> io::Result<()> {
    let (mode, holds) = {
        let owner = shared.owner.lock();
        (owner.mode, owner.holds)
    };
    if holds {
        // Without a descriptor for a new one, its alarm has it look again.
        match sigchld::check().inspect_err(|_| shared.owner.lock().deaf = true)? {
            Checked::Renewed(old) => hear_new(old)?,
            Checked::Well => {
                let mut owner = shared.owner.lock();
                if owner.holds && owner.deaf {
                    drop(owner.hear_handler(shared));
                }
            }
        }
    }
    // Whoever has drained the socket does what any owner wants: the others are not woken any more.
    let reaps = |r: &Shared| r.owner.lock().mode.reaps_all_now(r.engine.live() > 0);
    let reaped = if reaps(shared) || holds && reaper::all().iter().any(|r| reaps(r)) {
        reap_all(true)
    } else if mode == SigchldOwner::Selective && sigchld::would_be_ignored() {
        // Without our handler the kernel would have thrown these away.
        reap_all(false)
    } else {
        Ok(())
    };
    // Whoever found them: an owner that has given up since, perhaps.
    if known::strangers_wait() {
        offer_all(children().strangers())?;
    }
    reaped
}

/// All that hold the handler hear its new socket, and no more the old one, where that is there still.
fn hear_new(old: Option<CareFd<OwnedFd>>) -> io::Result<()> {
    let mut heard = Ok(());
    for reaper in reaper::all() {
        let mut owner = reaper.owner.lock();
        if !owner.holds {
            continue;
        }
        if let Some(old) = old.as_ref().and_then(CareFd::get) {
            reaper.hear_no_more(old.as_fd());
        }
        let new = owner.hear_handler(&reaper);
        drop(owner);
        if new.is_err() {
            reaper.timer.rearm(&reaper);
        }
        heard = heard.and(new);
    }
    heard
}

/// Reaps every child of this process that has ended. What carefork knows goes to its holder, when that asks; strangers wait in
/// `known`, to be told of if `tell` says so.
fn reap_all(tell: bool) -> io::Result<()> {
    loop {
        match sys_reap::wait(sys_reap::Which::Any, sys_reap::How::Peek) {
            Ok(Some(ended)) => children().reap_found(ended.pid, tell)?,
            Ok(None) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

/// Each to whoever claims it. They are reaped, and nobody would find them again: so a callback that panics or says disaster keeps
/// none of the others from being asked about.
fn offer_all(found: Vec<(u32, Record)>) -> io::Result<()> {
    let (mut disaster, mut panic) = (Ok(()), None);
    let here = runtime::generation();
    for (pid, record) in found {
        // A callback may fork, and its child come back here: the others are the parent's to ask about.
        if !runtime::is_still(here) {
            break;
        }
        match catch_unwind(AssertUnwindSafe(|| offer(pid, record, here))) {
            Ok(Ok(())) => {}
            Ok(Err(e)) if disaster.is_ok() => disaster = Err(e),
            Ok(Err(e)) => drop(sys::say(format!("carefork: child {pid}: {e}\n").as_bytes())),
            Err(payload) if panic.is_none() => panic = Some(payload),
            // Its message was printed, and dropping it may panic in turn.
            #[allow(clippy::mem_forget)]
            Err(payload) => std::mem::forget(payload),
        }
    }
    match panic {
        Some(payload) => resume_unwind(payload),
        None => disaster,
    }
}

/// To whoever claims it.
fn offer(pid: u32, record: Record, here: u64) -> io::Result<()> {
    let exit = Exit { pid, name: None, status: record.status, ran: Duration::ZERO, usage: record.usage };
    for reaper in reaper::all() {
        if !reaper.owner.lock().mode.reaps_all() {
            continue;
        }
        let f = reaper.unknown.lock().clone();
        let claim = f.map(|f| f(&exit));
        if !runtime::is_still(here) {
            return Ok(());
        }
        match claim {
            Some(Claim::Mine) => return Ok(()),
            Some(Claim::Disaster(e)) => return Err(io::Error::other(e)),
            Some(Claim::NotMine) | None => {}
        }
    }
    let status = record.status;
    let line = format!("carefork: child {pid} {status} and was reaped; nobody knows it (Reaper::on_unknown)\n");
    sys::say(line.as_bytes());
    Ok(())
}
