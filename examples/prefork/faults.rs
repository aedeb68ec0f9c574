//! Workers that die where it hurts: for the test, and for whoever wants to see it.
//!
//! `PREFORK_DIE=sent/7`: every seventh time that any worker comes past the step `sent`, it kills itself with SIGKILL. `sent/7x3`: the
//! next two to come there die as well; it may be the successor.

use crate::board::Board;
use nix::sys::signal::{Signal, raise};
use std::sync::atomic::Ordering::Relaxed;

/// The steps of a worker, of a connection and of each request on it, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The worker was forked, and has not told the master that it is there.
    Begun,
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
    die: Option<Die>,
}

#[derive(Clone, Copy)]
struct Die {
    at: Step,
    every: u64,
    in_a_row: u64,
}

impl Faults {
    pub(crate) fn new(board: &'static Board) -> Result<Faults, String> {
        let Ok(text) = std::env::var("PREFORK_DIE") else { return Ok(Faults { board, die: None }) };
        match Die::parse(&text) {
            None => Err(format!("PREFORK_DIE={text}: wanted STEP/NUMBER or STEP/NUMBERxNUMBER, such as sent/7")),
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
        let Some(die) = self.die.filter(|die| die.at == step) else { return false };
        let before = self.board.passed.fetch_add(1, Relaxed);
        before + 1 >= die.every && (before + 1) % die.every < die.in_a_row
    }
}

impl Die {
    fn parse(text: &str) -> Option<Die> {
        let (at, numbers) = text.split_once('/')?;
        let (every, in_a_row) = numbers.split_once('x').unwrap_or((numbers, "1"));
        let die = Die { at: Step::named(at)?, every: every.parse().ok()?, in_a_row: in_a_row.parse().ok()? };
        (die.every > 0).then_some(die)
    }
}

pub(crate) fn die() -> ! {
    let _ = raise(Signal::SIGKILL);
    unreachable!("nobody survives SIGKILL")
}

impl Step {
    fn named(name: &str) -> Option<Step> {
        use Step::{Begun, Closed, Half, Kept, Peeked, Promised, Received, Sent, Shut, Taken};
        let all = [Begun, Received, Peeked, Promised, Half, Sent, Taken, Kept, Shut, Closed];
        all.into_iter().find(|step| format!("{step:?}").eq_ignore_ascii_case(name))
    }
}
