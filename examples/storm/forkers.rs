//! The threads that fork, and what becomes of their children.

// Forks of the plain kind are half of what this is about.
#![allow(unsafe_code, clippy::disallowed_methods)]

use crate::args::Half;
use crate::board::{Slot, Stage};
use crate::child::{self, Life};
use crate::fds::Held;
use crate::threads;
use crate::world::{Rng, World};
use carefork::{Child, Fork, ForkOptions, InChild, Signals};
use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Children of one forker at a time, hung ones included.
pub(crate) const AT_A_TIME: usize = 8;

/// Those of them in which something moves: as many in both halves, or the one whose children work would have the busier
/// machine, and the slower forks.
const MOVING: usize = 2;

/// Where nothing has moved for so long, it may be hung.
const STILL: Duration = Duration::from_millis(20);

/// A child in which nothing moves for so long is hung.
const HUNG: Duration = Duration::from_secs(2);

/// Far more than the usual: the storm is about what happens, not about a busy machine.
pub(crate) const BUDGET: Duration = Duration::from_secs(60);

/// A child to wait for.
pub(crate) enum Handle {
    Care(Child),
    Raw(libc::pid_t),
}

impl Handle {
    fn id(&self) -> u32 {
        match self {
            Handle::Care(child) => child.id(),
            Handle::Raw(pid) => pid.unsigned_abs(),
        }
    }

    fn try_wait(&mut self) -> std::io::Result<Option<ExitStatus>> {
        let pid = match self {
            Handle::Care(child) => return child.try_wait(),
            Handle::Raw(pid) => *pid,
        };
        let mut status = 0;
        // SAFETY: `status` is live; the child is ours, and reaped nowhere else.
        match unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) } {
            0 => Ok(None),
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(Some(ExitStatus::from_raw(status))),
        }
    }

    pub(crate) fn wait(&mut self) -> std::io::Result<ExitStatus> {
        let pid = match self {
            Handle::Care(child) => return child.wait(),
            Handle::Raw(pid) => *pid,
        };
        let mut status = 0;
        // SAFETY: as above.
        match unsafe { libc::waitpid(pid, &mut status, 0) } {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(ExitStatus::from_raw(status)),
        }
    }

    fn kill(&self) {
        match self {
            Handle::Care(child) => drop(child.kill()),
            // SAFETY: the child was not reaped yet, so the number is its own.
            Handle::Raw(pid) => _ = unsafe { libc::kill(*pid, libc::SIGKILL) },
        }
    }
}

pub(crate) enum Side {
    Parent(Handle),
    /// With carefork's token, unless libc's fork was called.
    Child(Option<InChild>),
}

/// One fork by the half's means; `foreign` is libc's fork in the carefork half, as a C library would call it.
///
/// # Safety
/// The child uses no borrowed descriptor that its clean-up closes, and, in the plain half, must be ready to hang.
pub(crate) unsafe fn fork(world: &World, options: &ForkOptions<'_>, foreign: bool) -> Result<Side, String> {
    if world.half == Half::Carefork && !foreign {
        // SAFETY: the caller's promise.
        return match unsafe { options.fork() } {
            Ok(Fork::Parent(child)) => Ok(Side::Parent(Handle::Care(child))),
            Ok(Fork::Child(token)) => Ok(Side::Child(Some(token))),
            Err(e) => Err(e.to_string()),
        };
    }
    // SAFETY: the caller's promise.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error().to_string()),
        0 => Ok(Side::Child(None)),
        pid => Ok(Side::Parent(Handle::Raw(pid))),
    }
}

/// What all forks have in common. The death signal is no option here: its fork waits for the child to be ready for it, and
/// what is measured is the fork.
pub(crate) fn options<'a>() -> ForkOptions<'a> {
    ForkOptions::new().timeout(BUDGET)
}

/// No hung child outlives the storm.
pub(crate) fn die_with_parent() {
    // SAFETY: changes nothing but this process's own death signal.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// What `spawn` runs, after it has cleaned up.
fn spawned(life: Life<'_>) -> i32 {
    die_with_parent();
    life.world.fds.survivors(life.slot);
    child::live(life)
}

/// Closes what the child should not have.
///
/// # Safety
/// In a child, before anything else; no closed descriptor is used or dropped afterwards but through its care-fd.
pub(crate) unsafe fn clean_up(life: &Life<'_>, token: Option<InChild>) -> Result<(), String> {
    let Life { world, slot, keep, .. } = life;
    die_with_parent();
    match (world.half, token) {
        (Half::Plain, _) => world.fds.close_recorded(keep.map(Held::number)),
        (Half::Carefork, None) if carefork::lineage().dirty => {
            // The fork was overtaken, and the child was told: nothing is promised to it, so nothing is looked at.
            // SAFETY: no precondition.
            unsafe { libc::_exit(child::LATE) }
        }
        (Half::Carefork, token) => {
            world.fds.survivors(slot);
            match token {
                // SAFETY: the caller's promise.
                Some(token) => _ = unsafe { token.cleanup() },
                // SAFETY: the caller's promise.
                None => _ = unsafe { carefork::postfork_child_noexec() }.map_err(|e| e.to_string())?,
            }
        }
    }
    Ok(())
}

/// A child under way.
struct Pending {
    handle: Handle,
    slot: &'static Slot,
    n: usize,
    pipe: Option<Held<PipeReader>>,
    steps: u32,
    moved: Instant,
    /// How often it was found asleep since.
    asleep: u32,
    looked: Instant,
}

/// What one forking thread saw.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Children, numbered from 0.
    pub(crate) forks: usize,
    pub(crate) latencies: Vec<u64>,
    /// Children that may have said less than they should.
    pub(crate) excused: Vec<usize>,
    /// Where they hung.
    pub(crate) places: Vec<String>,
}

struct Forker {
    world: &'static World,
    who: usize,
    pending: Vec<Pending>,
    free: Vec<&'static Slot>,
    /// This thread's own descriptors.
    mine: Vec<Held<File>>,
    rng: Rng,
    tally: Tally,
}

/// Forks until it is enough, then waits for the last of them.
pub(crate) fn run(world: &'static World, who: usize) -> Tally {
    let mut forker = Forker {
        world,
        who,
        pending: Vec::new(),
        free: world.board[who * AT_A_TIME..][..AT_A_TIME].iter().collect(),
        mine: threads::a_few(world),
        rng: Rng::new(world.args.seed.wrapping_add(who as u64) ^ 0xf0f0),
        tally: Tally::default(),
    };
    loop {
        let over = world.enough.load(Relaxed);
        if over && forker.pending.is_empty() {
            return forker.tally;
        }
        let moving = forker.pending.iter().filter(|p| p.moved.elapsed() < STILL).count();
        if !over
            && moving < MOVING
            && let Some(slot) = forker.free.pop()
        {
            forker.fork(slot);
        } else {
            std::thread::sleep(Duration::from_micros(200));
        }
        forker.look();
    }
}

impl Forker {
    fn fork(&mut self, slot: &'static Slot) {
        slot.clear();
        let world = self.world;
        // In the carefork half: spawn, fork, fork with a lock held over it, libc's fork; in the plain half only the last two differ.
        let kind = self.rng.below(4);
        let (reader, writer) = match world.fds.open_pair(std::io::pipe) {
            Ok(ends) => ends,
            Err(e) => return self.refused(slot, &e.to_string()),
        };
        let foreign = kind == 3;
        // Nobody can tell libc's fork to keep one.
        let keep = (!foreign || world.half == Half::Plain).then_some(&writer);
        let life = Life { world, slot, forker: self.who, n: self.tally.forks, closed: &self.mine, keep };
        let signals = if self.rng.below(2) == 0 { Signals::Reset } else { Signals::Inherit };
        let options = options().signals(signals);
        let options = match (&writer, world.half) {
            (Held::Care(w), Half::Carefork) => options.keep(w),
            _ => options,
        };
        let (mut begin, mut took) = (Instant::now(), Duration::ZERO);
        let mut side = Err(String::new());
        if kind == 0 && world.half == Half::Carefork {
            // SAFETY: the child uses only what the clean-up left, and what carefork made ready: own locks, hooked locks, locks
            // and channels that are used in regions, std's output under guard.
            let child = unsafe { options.spawn(|| spawned(life)) };
            took = begin.elapsed();
            side = child.map(|c| Side::Parent(Handle::Care(c))).map_err(|e| e.to_string());
        } else {
            let mut step = || {
                // Waiting for the lock of one's own choice is no part of the fork.
                begin = Instant::now();
                // SAFETY: as above; in the plain half it may hang, and is watched.
                side = unsafe { fork(world, &options, foreign) };
                took = begin.elapsed();
            };
            if kind == 2 {
                if world.locks.own.snapshot(&mut step).is_err() {
                    world.complain("the Mutex held over a fork protected nothing");
                }
            } else {
                step();
            }
        }
        match side {
            Ok(Side::Child(token)) => {
                slot.at(0, Stage::CleanUp);
                // SAFETY: the first thing in this child; the values of the parent are never dropped, it ends by _exit.
                let cleaned = unsafe { clean_up(&life, token) };
                let code = match cleaned {
                    Ok(()) => child::live(life),
                    Err(why) => {
                        slot.note(&why);
                        child::NOT_CLEANED
                    }
                };
                child::quit(slot, 0, code);
            }
            Err(why) => self.refused(slot, &why),
            Ok(Side::Parent(handle)) => {
                self.tally.latencies.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
                let pipe = keep.is_some().then_some(reader);
                let (n, now) = (self.tally.forks, Instant::now());
                let pending = Pending { handle, slot, n, pipe, steps: 0, moved: now, asleep: 0, looked: now };
                self.pending.push(pending);
                self.tally.forks += 1;
                world.count.forks.fetch_add(1, Relaxed);
            }
        }
    }

    fn refused(&mut self, slot: &'static Slot, why: &str) {
        self.world.count.refused.fetch_add(1, Relaxed);
        self.world.note(&format!("not forked: {why}"));
        self.free.push(slot);
    }

    /// Takes in who has ended, ends who is hung.
    fn look(&mut self) {
        let mut i = 0;
        while i < self.pending.len() {
            match self.pending[i].handle.try_wait() {
                Ok(None) if !self.pending[i].is_hung(self.world) => i += 1,
                Ok(None) => {
                    let p = self.pending.swap_remove(i);
                    self.hung(p);
                }
                Ok(Some(status)) => {
                    let p = self.pending.swap_remove(i);
                    self.ended(p, status);
                }
                Err(e) => {
                    let p = self.pending.swap_remove(i);
                    self.crashed(&p, &format!("its status is lost: {e}"));
                    self.free.push(p.slot);
                }
            }
        }
    }

    fn ended(&mut self, p: Pending, status: ExitStatus) {
        let count = &self.world.count;
        let (leaked, wrong) = (p.slot.leaked.load(Relaxed), p.slot.wrong.load(Relaxed));
        count.leaked.fetch_add(leaked as usize, Relaxed);
        count.wrong.fetch_add(wrong as usize, Relaxed);
        if leaked + wrong > 0 {
            self.world.note(&p.slot.read_note());
        }
        match status.code() {
            Some(child::GOOD) => {
                let mut word = [0; child::WORD.len()];
                let said =
                    p.pipe.as_ref().is_none_or(|r| { r.get() }.read_exact(&mut word).is_ok() && word == child::WORD);
                if !said {
                    self.crashed(&p, "it ended well without saying so");
                }
            }
            Some(child::LATE) => {
                count.late.fetch_add(1, Relaxed);
                self.tally.excused.push(p.n);
            }
            Some(code) => self.crashed(&p, child::meaning(code)),
            None => self.crashed(&p, &status.to_string()),
        }
        self.free.push(p.slot);
    }

    fn crashed(&mut self, p: &Pending, why: &str) {
        self.world.count.crashed.fetch_add(1, Relaxed);
        self.world.note(&format!("a child (at {}) {why}: {}", p.slot.place(), p.slot.read_note()));
        self.tally.excused.push(p.n);
    }

    fn hung(&mut self, mut p: Pending) {
        let place = p.slot.place();
        self.world.count.hung.fetch_add(1, Relaxed);
        if self.world.half == Half::Carefork {
            self.world.note(&format!("pid {} hung: {place}", p.handle.id()));
        }
        if self.world.args.hold {
            self.world.hold(&format!("child {} hung ({place})", p.handle.id()));
        }
        p.handle.kill();
        drop(p.handle.wait());
        self.tally.excused.push(p.n);
        self.tally.places.push(place);
        self.free.push(p.slot);
    }
}

impl Pending {
    fn is_hung(&mut self, world: &World) -> bool {
        let steps = self.slot.steps.load(Relaxed);
        if steps != self.steps {
            (self.steps, self.moved, self.asleep) = (steps, Instant::now(), 0);
        }
        if self.moved.elapsed() < HUNG {
            return false;
        }
        if world.half == Half::Plain {
            return true;
        }
        // From one look to the next, not from the first on: this thread may be kept from running, too.
        if self.asleep > 0 && self.looked.elapsed() < LOOK_AGAIN {
            return false;
        }
        self.looked = Instant::now();
        // On an overloaded machine a child may be kept from running for as long as that: who waits for a lock sleeps.
        let _region = world.fds.region();
        if is_asleep(self.handle.id()).unwrap_or(true) {
            self.asleep += 1;
        } else {
            (self.moved, self.asleep) = (Instant::now(), 0);
        }
        self.asleep > LOOKS
    }
}

/// A child that stands still has to be asleep at so many looks more.
const LOOKS: u32 = 4;
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// No thread of this process, or of a child of its, runs or wants to.
fn is_asleep(pid: u32) -> std::io::Result<bool> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        let stat = std::fs::read_to_string(task.join("stat"))?;
        // The state follows the name, which is in brackets and may have any letters in it.
        let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
        if !matches!(state, Some('S' | 'Z' | 'X')) {
            return Ok(false);
        }
        // Not every kernel has this file.
        let children = std::fs::read_to_string(task.join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|c| c.parse().ok()) {
            if !is_asleep(child).unwrap_or(true) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
