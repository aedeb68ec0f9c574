//! Workers that die where it hurts: for the test, and for whoever wants to see it.
//!
//! `PREFORK_DIE=sent/7`: every seventh time that any worker comes past the step `sent`, it kills itself with SIGKILL.

use crate::board::Board;
use nix::sys::signal::{Signal, raise};
use std::sync::atomic::Ordering::Relaxed;

/// The steps of a connection and of each request on it, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The connection has come from the master, and nothing was done to it.
    Received,
    /// There is a request, still unread.
    Peeked,
    /// Its answer is promised.
    Promised,
    /// Half of what was to be sent was sent.
    Half,
    /// The answer was sent.
    Sent,
    /// The request was taken.
    Taken,
    /// The promise was kept.
    Kept,
    /// The last answer was sent and the connection shut down.
    Shut,
    /// The connection is closed here, and the master does not know.
    Closed,
}

#[derive(Clone, Copy)]
pub(crate) struct Faults {
    board: &'static Board,
    die: Option<(Step, u64)>,
}

impl Faults {
    pub(crate) fn new(board: &'static Board) -> Result<Faults, String> {
        let Ok(text) = std::env::var("PREFORK_DIE") else { return Ok(Faults { board, die: None }) };
        let parsed = text.split_once('/').and_then(|(step, n)| Some((Step::named(step)?, n.parse().ok()?)));
        match parsed {
            Some((_, 0)) | None => Err(format!("PREFORK_DIE={text}: wanted STEP/NUMBER, such as sent/7")),
            die => Ok(Faults { board, die }),
        }
    }

    /// A worker comes past `step`.
    pub(crate) fn pass(&self, step: Step) {
        if self.due(step) {
            die();
        }
    }

    /// Whether it is to die at `step` this time.
    pub(crate) fn due(&self, step: Step) -> bool {
        match self.die {
            Some((at, every)) if at == step => (self.board.passed.fetch_add(1, Relaxed) + 1).is_multiple_of(every),
            _ => false,
        }
    }
}

pub(crate) fn die() -> ! {
    let _ = raise(Signal::SIGKILL);
    unreachable!("nobody survives SIGKILL")
}

impl Step {
    fn named(name: &str) -> Option<Step> {
        use Step::{Closed, Half, Kept, Peeked, Promised, Received, Sent, Shut, Taken};
        let all = [Received, Peeked, Promised, Half, Sent, Taken, Kept, Shut, Closed];
        all.into_iter().find(|step| format!("{step:?}").eq_ignore_ascii_case(name))
    }
}
