//! The SIGCHLD handler, for reapers that own the signal.
//!
//! | the disposition is | we are | what happens |
//! |---|---|---|
//! | somebody's, we have no user | out | nothing |
//! | ours, on top of what was there | held | the handler pokes a socket, then calls what was there |
//! | somebody's, installed over ours | displaced | left alone, said once; they may call ours, which works on |
//! | the default or ignored, after that | out | the next user installs the handler: there is nobody to call it |
//! | ours again, or of before | | the last user restores what was there, exactly |
//!
//! The handler takes no lock, allocates nothing and keeps errno. What was there before it finds in one piece, behind one pointer; of its
//! own socket it reads statics that are written one by one, so it may find them half changed: the number it pokes is then not the socket
//! that it should be, which it sees (fstat) and counts. In a child of the process that installed it, it only calls what was there before.

#![allow(unsafe_code)]

use super::per_process::PerProcess;
use crate::carefd::CareFd;
use crate::locks::Mutex;
use crate::{runtime, sys, sys_reap, sys_signals};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use Ordering::{AcqRel, Acquire, Relaxed, Release};

/// What the handler reads.
struct Handler {
    /// The process that it works for, by generation and number.
    generation: AtomicU64,
    pid: AtomicU32,
    /// The socket to poke, and what it must be.
    fd: AtomicI32,
    device: AtomicU64,
    inode: AtomicU64,
    /// Pokes that found something else under the number.
    missed: AtomicU32,
    /// What was there before; null is the default. Leaked, and so of one piece whenever it is read.
    before: AtomicPtr<Before>,
    /// Somebody's handler lies over ours. It is true in children, too.
    displaced: AtomicBool,
}

static HANDLER: Handler = Handler {
    generation: AtomicU64::new(u64::MAX),
    pid: AtomicU32::new(0),
    fd: AtomicI32::new(-1),
    device: AtomicU64::new(0),
    inode: AtomicU64::new(0),
    missed: AtomicU32::new(0),
    before: AtomicPtr::new(std::ptr::null_mut()),
    displaced: AtomicBool::new(false),
};

/// A disposition that ours replaced.
struct Before {
    action: sys_signals::KernelAction,
    /// It was for one signal only (SA_RESETHAND), which has come.
    spent: AtomicBool,
}

impl Before {
    fn get() -> Option<&'static Before> {
        // SAFETY: null, or leaked by `remember`.
        unsafe { HANDLER.before.load(Acquire).as_ref() }
    }

    /// As the kernel has it now.
    fn action(&self) -> sys_signals::KernelAction {
        let handler = if self.spent.load(Relaxed) { libc::SIG_DFL } else { self.action.handler };
        sys_signals::KernelAction { handler, ..self.action }
    }

    /// Async-signal-safe, if what was there is.
    fn call(&self, signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let (handler, flags) = (self.action.handler, self.action.flags as i32);
        if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
            return;
        }
        if flags & libc::SA_RESETHAND != 0 && self.spent.swap(true, Relaxed) {
            return;
        }
        if flags & libc::SA_SIGINFO == 0 {
            // SAFETY: without SA_SIGINFO, neither SIG_DFL nor SIG_IGN: the kernel held it for a handler of this type.
            let f: Plain = unsafe { std::mem::transmute(handler) };
            f(signal);
        } else {
            // SAFETY: the same with SA_SIGINFO.
            let f: Informed = unsafe { std::mem::transmute(handler) };
            f(signal, info, context);
        }
    }
}

type Plain = extern "C" fn(i32);
type Informed = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// May interrupt itself.
extern "C" fn on_sigchld(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let errno = sys::errno();
    if runtime::is_still(HANDLER.generation.load(Acquire)) && sys::getpid() == HANDLER.pid.load(Relaxed) {
        poke();
    }
    if let Some(before) = Before::get() {
        before.call(signal, info, context);
    }
    sys::set_errno(errno);
}

/// Async-signal-safe.
fn poke() {
    let fd = HANDLER.fd.load(Acquire);
    if sys::identity(fd) == Some((HANDLER.device.load(Relaxed), HANDLER.inode.load(Relaxed))) {
        // A full socket is as readable as one more byte would make it. What took the number this instant is no socket, or gets a byte.
        sys_reap::poke_socket(fd);
    } else {
        HANDLER.missed.fetch_add(1, Relaxed);
    }
}

fn address() -> usize {
    on_sigchld as Informed as usize
}

struct State {
    users: u32,
    /// Kept once it was made: a handler on another thread may be about to poke it.
    pair: Option<(CareFd<OwnedFd>, CareFd<OwnedFd>)>,
    /// What the end that is read must be; the handler knows the other one.
    reader: (u64, u64),
    said: bool,
}

static STATE: PerProcess<Mutex<State>> =
    PerProcess::new(|| Mutex::new(State { users: 0, pair: None, reader: (0, 0), said: false }));

/// Who has SIGCHLD, as a reaper that wants it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sigchld {
    /// Nobody of carefork's wants it.
    Free,
    /// carefork's handler is installed.
    Held,
    /// Other code has installed a handler over carefork's, which was left as it is.
    Displaced,
}

/// One more user; the first installs the handler.
///
/// # Errors
/// As socketpair(2).
pub(crate) fn acquire() -> io::Result<()> {
    let mut state = STATE.get().lock();
    if state.pair.is_none() {
        let new = make_pair()?;
        state.reader = sys::identity(new.0.as_raw_fd()).unwrap_or_default();
        state.pair = Some(new);
    }
    state.users += 1;
    if state.users == 1 {
        HANDLER.pid.store(sys::getpid(), Relaxed);
        HANDLER.generation.store(runtime::generation(), Release);
        install();
    }
    Ok(())
}

/// One user less; the last puts back what was there. True if children are ignored now that were not.
pub(crate) fn release() -> bool {
    let mut state = STATE.get().lock();
    // 0 in a child that gives up what was its parent's.
    let Some(users) = state.users.checked_sub(1) else { return false };
    state.users = users;
    if users > 0 {
        return false;
    }
    let ignored = would_be_ignored();
    HANDLER.generation.store(u64::MAX, Release);
    HANDLER.displaced.store(!put_back(), Release);
    ignored
}

fn make_pair() -> io::Result<(CareFd<OwnedFd>, CareFd<OwnedFd>)> {
    let (reader, writer) = CareFd::open_pair(|| {
        let (a, b) = UnixDatagram::pair()?;
        a.set_nonblocking(true)?;
        b.set_nonblocking(true)?;
        Ok((OwnedFd::from(a), OwnedFd::from(b)))
    })?;
    let fd = writer.as_raw_fd();
    let (device, inode) = sys::identity(fd).unwrap_or_default();
    HANDLER.fd.store(-1, Release);
    HANDLER.device.store(device, Relaxed);
    HANDLER.inode.store(inode, Relaxed);
    HANDLER.fd.store(fd, Release);
    Ok((reader, writer))
}

fn current() -> sys_signals::KernelAction {
    sys_signals::disposition(libc::SIGCHLD)
}

fn is_ours(action: &sys_signals::KernelAction) -> bool {
    action.handler == address()
}

/// A record is leaked for each disposition that is not the one from last time, since a handler may be reading that.
fn remember(action: &sys_signals::KernelAction) {
    if Before::get().is_some_and(|before| before.action() == *action) {
        return;
    }
    let before = Box::new(Before { action: *action, spent: AtomicBool::new(false) });
    HANDLER.before.store(Box::into_raw(before), Release);
}

fn install() {
    let now = current();
    if is_ours(&now) {
        // Inherited from the parent, or given back by who had displaced it.
        HANDLER.displaced.store(false, Release);
        return;
    }
    let handled = now.handler != libc::SIG_DFL && now.handler != libc::SIG_IGN;
    if handled && HANDLER.displaced.load(Acquire) {
        // Theirs may call ours: calling theirs from ours would never end.
        return;
    }
    HANDLER.displaced.store(false, Release);
    // The handler finds what to call, whenever it first runs.
    remember(&now);
    let alone = libc::SA_NOCLDSTOP | libc::SA_RESTART | libc::SA_ONSTACK;
    let (flags, mask) = if handled { (now.flags as i32, now.mask) } else { (alone, 0) };
    // SAFETY: sigaction is plain data.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    let mut was = ours;
    ours.sa_sigaction = address();
    // Theirs is called under the mask it was installed with, for stops only if it wanted them, interrupts what it did before, and has
    // as much room: an alternate stack may be a small one.
    ours.sa_flags = libc::SA_SIGINFO | flags & (alone | libc::SA_NODEFER);
    // SAFETY: sa_mask is at least eight bytes, aligned for a word, and plain bits.
    unsafe { (&raw mut ours.sa_mask).cast::<u64>().write(mask) };
    // SAFETY: a handler that keeps to what handlers may do, in code that is never unloaded.
    unsafe { libc::sigaction(libc::SIGCHLD, &raw const ours, &raw mut was) };
    if was.sa_sigaction != now.handler {
        // Another thread has installed it since we looked, and ours does not call it.
        // SAFETY: as libc had it a moment ago.
        unsafe { libc::sigaction(libc::SIGCHLD, &raw const was, std::ptr::null_mut()) };
        install();
    }
}

/// False if somebody's handler lies over ours.
#[inline(never)]
fn put_back() -> bool {
    if !is_ours(&current()) {
        return false;
    }
    if let Some(before) = Before::get() {
        let was = sys_signals::put_disposition(libc::SIGCHLD, &before.action());
        if !is_ours(&was) {
            // Another thread has installed it since we looked.
            sys_signals::put_disposition(libc::SIGCHLD, &was);
            return false;
        }
    }
    true
}

/// In the clean-up of a child (K5), which has no reaper yet.
// Into its caller, which lies with the code that such children run; the rest is a page that most need not touch.
#[inline(always)]
pub(crate) fn put_back_in_child() {
    if HANDLER.fd.load(Relaxed) != -1 && !runtime::is_still(HANDLER.generation.load(Acquire)) {
        put_back();
    }
}

/// Our handler is installed, and without it the kernel would throw statuses away.
pub(crate) fn would_be_ignored() -> bool {
    let ignores =
        |a: &sys_signals::KernelAction| a.handler == libc::SIG_IGN || a.flags as i32 & libc::SA_NOCLDWAIT != 0;
    is_ours(&current()) && Before::get().is_some_and(|before| ignores(&before.action))
}

pub(crate) fn who() -> Sigchld {
    if STATE.get().lock().users == 0 {
        Sigchld::Free
    } else if is_ours(&current()) {
        Sigchld::Held
    } else {
        Sigchld::Displaced
    }
}

/// The end that becomes readable. Under the lock, as the pair may be made anew.
pub(crate) fn with_reader<R>(f: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
    STATE.get().lock().pair.as_ref().map(|(reader, _)| f(reader.as_fd()))
}

/// What a dispatch looks after.
#[derive(Debug)]
pub(crate) enum Checked {
    Well,
    /// The pair was made anew: reapers must hear the new one, and no more the old one, where that is there still.
    Renewed(Option<CareFd<OwnedFd>>),
}

/// Drains the pair, finds out whether it is still the one, and says once if the handler was displaced.
pub(crate) fn check() -> io::Result<Checked> {
    let mut state = STATE.get().lock();
    if state.users == 0 {
        return Ok(Checked::Well);
    }
    if !is_ours(&current()) && !std::mem::replace(&mut state.said, true) {
        sys::say(
            b"carefork: a SIGCHLD handler was installed over carefork's, and left alone; children are watched by pidfd \
              still, but unknown ones are found late unless it calls what was there before\n",
        );
    }
    let Some((reader, writer)) = &state.pair else { return Ok(Checked::Well) };
    let expected = (HANDLER.device.load(Relaxed), HANDLER.inode.load(Relaxed));
    let missed = HANDLER.missed.swap(0, AcqRel) != 0;
    // Either number may be somebody's socket by now, whose bytes are not ours to take.
    if !missed
        && sys::identity(writer.as_raw_fd()) == Some(expected)
        && sys::identity(reader.as_raw_fd()) == Some(state.reader)
        && sys_reap::drain_socket(reader.as_raw_fd())
    {
        return Ok(Checked::Well);
    }
    // Somebody closed one of the numbers, or both (a daemon's clean-up): what is in their place is not ours to close.
    let before = [state.reader, expected];
    let new = make_pair()?;
    state.reader = sys::identity(new.0.as_raw_fd()).unwrap_or_default();
    let mut kept = [None, None];
    if let Some((reader, writer)) = state.pair.replace(new) {
        for ((end, was), kept) in [reader, writer].into_iter().zip(before).zip(&mut kept) {
            if end.get().is_some_and(|fd| sys::identity(fd.as_raw_fd()) == Some(was)) {
                *kept = Some(end);
            } else {
                let _gone = end.try_into_inner().map(IntoRawFd::into_raw_fd);
            }
        }
    }
    let [reader, _writer] = kept;
    poke();
    Ok(Checked::Renewed(reader))
}
