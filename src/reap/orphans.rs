//! Children whose `Child` was dropped, or whose reaper: nobody will ask, and no zombie is to stay.
//!
//! They are reaped by every fork and wait of carefork's, at the cost of one system call while there are any, and by every reaper, whose
//! descriptor becomes readable for them too.

use super::body::Body;
use super::engine::Engine;
use super::per_process::PerProcess;
use crate::locks::OnceLock;
use crate::sys_reap::How;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

struct Orphans {
    engine: OnceLock<Option<Engine<()>>>,
}

/// There were some once, in this process or its parent.
static USED: AtomicBool = AtomicBool::new(false);
static ORPHANS: PerProcess<Orphans> = PerProcess::new(|| Orphans { engine: OnceLock::new() });

fn engine() -> Option<&'static Engine<()>> {
    USED.store(true, Ordering::Relaxed);
    ORPHANS.get().engine.get_or_init(|| Engine::new(0).ok()).as_ref()
}

/// For reapers to watch.
pub(crate) fn descriptor() -> Option<BorrowedFd<'static>> {
    engine().map(Engine::epoll)
}

/// Reaps the child now or later.
pub(crate) fn adopt(mut body: Body) {
    // Most have ended, or were waited for.
    if !body.is_ours() || !matches!(body.look(How::Now), Ok(None)) {
        return;
    }
    if let Some(engine) = engine() {
        body.want_pidfd();
        // Out of memory or of watches: asked by number from now on, if there is room for that.
        if let Err((body, (), _)) = engine.add(body, (), None) {
            drop(engine.add(body.without_pidfd(), (), None));
        }
    }
}

/// Reaps those that have ended. One load where there are none.
pub(crate) fn reap() {
    if !USED.load(Ordering::Relaxed) {
        return;
    }
    let Some(Some(engine)) = ORPHANS.get().engine.get() else { return };
    if engine.live() != 0 {
        // What epoll or waitid refuse now is asked again next time.
        drop(engine.dispatch(|_, ()| true));
    }
}

pub(crate) fn is_asking() -> bool {
    USED.load(Ordering::Relaxed) && matches!(ORPHANS.get().engine.get(), Some(Some(engine)) if engine.is_asking())
}
