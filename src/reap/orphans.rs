//! Children whose `Child` was dropped, or whose reaper: nobody will ask, and no zombie is to stay.
//!
//! They are reaped by every fork and wait of carefork's, at the cost of one system call while there are any, and by every reaper, whose
//! descriptor becomes readable for them too.

use super::body::Body;
use super::engine::Engine;
use super::per_process::PerProcess;
use crate::locks::{Mutex, OnceLock};
use crate::sys_reap::How;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

struct Orphans {
    engine: OnceLock<Engine<()>>,
    /// Those who came when there was no descriptor for an engine.
    waiting: Mutex<Vec<Body>>,
    /// There are some.
    any_waits: AtomicBool,
}

/// There were some once, in this process or its parent.
static USED: AtomicBool = AtomicBool::new(false);
static ORPHANS: PerProcess<Orphans> = PerProcess::new(|| Orphans {
    engine: OnceLock::new(),
    waiting: Mutex::new(Vec::new()),
    any_waits: AtomicBool::new(false),
});

/// What reapers have called when there is somebody of whose end no descriptor tells.
static ASKING: OnceLock<fn()> = OnceLock::new();

/// The first to say so is the one.
pub(crate) fn when_asking(f: fn()) {
    let _ = ASKING.set(f);
}

/// # Errors
/// As epoll_create1(2); the next to ask tries again.
fn engine() -> io::Result<&'static Engine<()>> {
    USED.store(true, Ordering::Relaxed);
    let engine = &ORPHANS.get().engine;
    match engine.get() {
        Some(engine) => Ok(engine),
        None => {
            let new = Engine::new(0)?;
            Ok(engine.get_or_init(|| new))
        }
    }
}

/// For reapers to watch.
///
/// # Errors
/// As epoll_create1(2).
pub(crate) fn descriptor() -> io::Result<BorrowedFd<'static>> {
    engine().map(Engine::epoll)
}

/// Reaps the child now or later.
pub(crate) fn adopt(mut body: Body) {
    // Most have ended, or were waited for.
    if !body.is_ours() || !matches!(body.look(How::Now), Ok(None)) {
        return;
    }
    match engine() {
        Ok(engine) => {
            body.want_pidfd();
            // Out of memory or of watches: asked by number from now on.
            if let Err((body, (), _)) = engine.add(body, (), None) {
                drop(engine.add(body.without_pidfd(), (), None));
            }
        }
        Err(_) => {
            let orphans = ORPHANS.get();
            let mut waiting = orphans.waiting.lock();
            waiting.push(body);
            orphans.any_waits.store(true, Ordering::Relaxed);
        }
    }
    if is_asking() {
        tell();
    }
}

/// Has reapers set their alarms anew.
pub(crate) fn tell() {
    if let Some(tell) = ASKING.get() {
        tell();
    }
}

/// Those who came when there was no descriptor try again.
#[cold]
fn adopt_waiting(orphans: &Orphans) {
    let waiting = {
        let mut waiting = orphans.waiting.lock();
        orphans.any_waits.store(false, Ordering::Relaxed);
        std::mem::take(&mut *waiting)
    };
    waiting.into_iter().for_each(adopt);
}

/// Reaps those that have ended. One load where there are none.
pub(crate) fn reap() {
    if !USED.load(Ordering::Relaxed) {
        return;
    }
    let orphans = ORPHANS.get();
    if orphans.any_waits.load(Ordering::Relaxed) {
        adopt_waiting(orphans);
    }
    if let Some(engine) = orphans.engine.get()
        && engine.live() != 0
    {
        let asked = engine.is_asking();
        // What epoll or waitid refuse now is asked again next time.
        drop(engine.dispatch(|_, ()| true));
        if !asked && engine.is_asking() {
            // A debugger has the end first: no descriptor tells when it lets go.
            tell();
        }
    }
}

/// Writes down those who came before anybody wanted it.
pub(crate) fn write_down() {
    if USED.load(Ordering::Relaxed) {
        let orphans = ORPHANS.get();
        orphans.waiting.lock().iter_mut().for_each(Body::write_down);
        if let Some(engine) = orphans.engine.get() {
            engine.write_down();
        }
    }
}

pub(crate) fn is_asking() -> bool {
    let asking = |o: &Orphans| o.any_waits.load(Ordering::Relaxed) || o.engine.get().is_some_and(Engine::is_asking);
    USED.load(Ordering::Relaxed) && asking(ORPHANS.get())
}
