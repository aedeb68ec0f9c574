//! What a child does, and its own child.

#![allow(unsafe_code)]

use crate::board::{Slot, Stage};
use crate::fault::Fault;
use crate::fds::Held;
use crate::forkers::{self, Side};
use crate::lines::Line;
use crate::locks::Broken;
use crate::threads;
use crate::world::World;
use std::fs::File;
use std::io::{PipeWriter, Write};
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// What a child sends that got through, over the one descriptor that it was told to keep.
pub(crate) const WORD: &[u8] = b"good";

/// All is well. Descriptors that are not right are on the board; any other code is a crash.
pub(crate) const GOOD: i32 = 0;
const BROKEN: i32 = 21;
const PANIC: i32 = 22;
const OUTPUT: i32 = 23;
const THREAD: i32 = 24;
const NOT_FORKED: i32 = 25;
const GRANDCHILD: i32 = 26;
const NOT_LISTED: i32 = 27;
const STALE: i32 = 28;
const CHANNEL: i32 = 29;
pub(crate) const NOT_CLEANED: i32 = 30;
/// No crash: forked by foreign code, after a waiting thread had opened the gate.
pub(crate) const LATE: i32 = 31;

/// What those codes mean.
pub(crate) fn meaning(code: i32) -> &'static str {
    match code {
        BROKEN => "found data behind a lock half changed",
        PANIC => "panicked",
        OUTPUT => "could not print",
        THREAD => "could not start or join a thread",
        NOT_FORKED => "could not fork again",
        GRANDCHILD => "its own child failed",
        NOT_LISTED => "could not read /proc/self/fd",
        STALE => "a closed care-fd does not know that it is",
        NOT_CLEANED => "could not clean up",
        CHANNEL => "a message went astray between its threads",
        _ => "ended with a strange code",
    }
}

/// One child: whose it is, and the descriptors that it knows of.
#[derive(Clone, Copy)]
pub(crate) struct Life<'a> {
    pub(crate) world: &'static World,
    pub(crate) slot: &'static Slot,
    pub(crate) forker: usize,
    pub(crate) n: usize,
    /// The parent's, to be found closed.
    pub(crate) closed: &'a [Held<File>],
    /// Where it says that it got through, if that was kept for it.
    pub(crate) keep: Option<&'a Held<PipeWriter>>,
}

/// Ends this process with what was printed flushed, and without destructors of the parent's values.
pub(crate) fn quit(slot: &Slot, life: usize, code: i32) -> ! {
    slot.at(life, Stage::Flush);
    let flushed = std::io::stdout().flush();
    let code = if code == GOOD && flushed.is_err() { OUTPUT } else { code };
    // SAFETY: no precondition.
    unsafe { libc::_exit(code) }
}

/// The child's whole life after its clean-up; its exit code.
pub(crate) fn live(life: Life<'_>) -> i32 {
    match catch_unwind(AssertUnwindSafe(|| go(life))) {
        Ok(Ok(())) => GOOD,
        Ok(Err(code)) => code,
        Err(_) => PANIC,
    }
}

fn go(life: Life<'_>) -> Result<(), i32> {
    let Life { world, slot, keep, .. } = life;
    if let (Some(fault), 0, 0) = (world.args.fault, life.forker, life.n) {
        fault.in_a_child(slot);
    }
    slot.at(0, Stage::Descriptors);
    let own: Vec<RawFd> = keep.map(Held::number).into_iter().collect();
    world.fds.check(&own, slot).map_err(|_| NOT_LISTED)?;
    if !life.closed.iter().all(Held::knows) {
        return Err(STALE);
    }
    slot.at(0, Stage::Print);
    life.print(0);
    slot.at(0, Stage::Log);
    life.log(0);
    slot.at(0, Stage::Print);
    life.print_in_pieces(1)?;
    world.locks.own.mutex(&mut || life.log(1)).map_err(|b| life.broken(b))?;
    world.locks.tour(slot, 0).map_err(|b| life.broken(b))?;
    slot.at(0, Stage::Allocate);
    let strings = threads::allocate(100);
    if strings.len() != 100 || !strings.is_sorted() {
        return Err(life.broken(Broken("the allocator's memory")));
    }
    slot.at(0, Stage::StartThreads);
    fight_and_fork(life)?;
    match keep {
        Some(pipe) => { pipe.get() }.write_all(WORD).map_err(|_| OUTPUT),
        None => Ok(()),
    }
}

/// Two threads fight over every lock while this one forks again.
fn fight_and_fork(life: Life<'_>) -> Result<(), i32> {
    let Life { world, slot, forker, n, .. } = life;
    let stop: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    // Not the parent's: whoever slept there is a ghost.
    let (left, right) = (crossbeam_channel::bounded(1), crossbeam_channel::bounded(1));
    let ends = [(left.0, right.1, 1), (right.0, left.1, 2)];
    let mut fighters = Vec::new();
    for (to, from, which) in ends {
        let life = Life { closed: &[], world, slot, forker, n, keep: None };
        let fighter = std::thread::Builder::new().spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| fight(life, which, &to, &from, stop)));
            let result = result.unwrap_or(Err(PANIC));
            slot.at(which, Stage::Start);
            result
        });
        fighters.push(fighter.map_err(|_| THREAD)?);
    }
    slot.at(0, Stage::ForkAgain);
    let forked = fork_again(life);
    stop.store(true, Relaxed);
    slot.at(0, Stage::JoinThreads);
    for f in fighters {
        f.join().map_err(|_| THREAD)??;
    }
    forked
}

/// The fight goes on for so many rounds at least, and no more than that.
const ROUNDS: std::ops::Range<u32> = 20..5000;

fn fight(
    life: Life<'_>,
    which: usize,
    to: &crossbeam_channel::Sender<u32>,
    from: &crossbeam_channel::Receiver<u32>,
    stop: &AtomicBool,
) -> Result<(), i32> {
    let Life { world, slot, .. } = life;
    let k = u32::try_from(which).unwrap_or(0) + 1;
    slot.at(which, Stage::Print);
    life.print(k);
    slot.at(which, Stage::Log);
    life.log(k);
    slot.at(which, Stage::Condvar);
    // Both sides play as often; the tours' `notify` leaves the turn where it is.
    world.locks.own.play(which == 1, 20);
    slot.at(which, Stage::Channel);
    for i in 0..20 {
        let sent = to.send(i).is_ok();
        if !sent || from.recv() != Ok(i) {
            return Err(CHANNEL);
        }
    }
    for round in 0..ROUNDS.end {
        if round >= ROUNDS.start && stop.load(Relaxed) {
            break;
        }
        world.locks.tour(slot, which).map_err(|b| life.broken(b))?;
    }
    Ok(())
}

/// The child's own child: a short check of the same things.
fn fork_again(life: Life<'_>) -> Result<(), i32> {
    let Life { world, slot, .. } = life;
    let mine = threads::a_few(world);
    // SAFETY: the child's child uses what carefork made ready, and no borrowed descriptor; in the plain half it is watched.
    let side = unsafe { forkers::fork(world, &forkers::options().death_signal(libc::SIGKILL), false) };
    let mut handle = match side {
        Err(why) => {
            slot.note(&why);
            return Err(NOT_FORKED);
        }
        Ok(Side::Parent(handle)) => handle,
        Ok(Side::Child(token)) => {
            let life = Life { closed: &mine, keep: None, ..life };
            slot.at(3, Stage::CleanUp);
            // SAFETY: the first thing in this child, which ends by _exit.
            let cleaned = unsafe { forkers::clean_up(&life, token) };
            let code = catch_unwind(AssertUnwindSafe(|| cleaned.map_err(|_| NOT_CLEANED).and_then(|()| short(life))));
            quit(slot, 3, code.unwrap_or(Err(PANIC)).err().unwrap_or(GOOD));
        }
    };
    slot.at(0, Stage::GrandChild);
    match handle.wait().ok().and_then(|status| status.code()) {
        Some(GOOD) => Ok(()),
        code => {
            slot.note(
                &code
                    .map_or("its own child was killed or lost".to_owned(), |c| format!("its own child {}", meaning(c))),
            );
            Err(GRANDCHILD)
        }
    }
}

fn short(life: Life<'_>) -> Result<(), i32> {
    let Life { world, slot, .. } = life;
    slot.at(3, Stage::Descriptors);
    // What the child kept, its child was not told to keep.
    world.fds.check(&[], slot).map_err(|_| NOT_LISTED)?;
    if !life.closed.iter().all(Held::knows) {
        return Err(STALE);
    }
    slot.at(3, Stage::Print);
    life.print(4);
    slot.at(3, Stage::Log);
    life.log(4);
    world.locks.tour(slot, 3).map_err(|b| life.broken(b))
}

impl Life<'_> {
    fn line(&self, k: u32) -> Line {
        Line { kind: 'C', who: self.forker, n: self.n, k, pid: std::process::id() }
    }

    fn print(&self, k: u32) {
        if (self.world.args.fault, self.forker, self.n, k) == (Some(Fault::Lose), 0, 0, 0) {
            return;
        }
        let line = self.line(k);
        if k == 2 { print!("{line}") } else { println!("{line}") }
    }

    fn print_in_pieces(&self, k: u32) -> Result<(), i32> {
        let text = self.line(k).to_string();
        let (head, tail) = text.split_at(text.len() / 2);
        let mut out = std::io::stdout().lock();
        out.write_all(head.as_bytes()).and_then(|()| writeln!(out, "{tail}")).map_err(|_| OUTPUT)
    }

    fn log(&self, k: u32) {
        log::info!("{}", self.line(k));
    }

    fn broken(&self, Broken(what): Broken) -> i32 {
        self.slot.note(&format!("{what}: half changed"));
        BROKEN
    }
}
