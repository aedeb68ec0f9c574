//! One half of the storm: a process of its own, in which everything happens.
//!
//! Standard output and error are files that the other process reads and checks; standard input, which nobody here wants, is
//! the pipe on which this half reports.

use crate::args::{Args, Half};
use crate::board::{self, Slot};
use crate::fds::Table;
use crate::forkers::{self, Tally};
use crate::locks::Locks;
use crate::threads;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How long after the end everything must have come to rest.
const AT_REST: Duration = Duration::from_secs(180);

#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) forks: AtomicUsize,
    pub(crate) refused: AtomicUsize,
    pub(crate) hung: AtomicUsize,
    pub(crate) crashed: AtomicUsize,
    pub(crate) leaked: AtomicUsize,
    pub(crate) wrong: AtomicUsize,
    pub(crate) late: AtomicUsize,
}

pub(crate) struct World {
    pub(crate) args: Args,
    pub(crate) half: Half,
    pub(crate) pid: u32,
    pub(crate) fds: Table,
    pub(crate) locks: Locks,
    pub(crate) board: &'static [Slot],
    /// No more forks.
    pub(crate) enough: AtomicBool,
    /// The threads may end: no fork comes any more.
    pub(crate) stop: AtomicBool,
    /// Lines printed and logged by each thread, set at its end.
    pub(crate) said: Vec<(AtomicUsize, AtomicUsize)>,
    pub(crate) count: Counts,
    started: AtomicUsize,
    ended: AtomicUsize,
    report: File,
}

impl World {
    /// One line for the other process; one write, no lock.
    fn say(&self, line: &str) {
        let mut line = line.replace('\n', " ");
        line.push('\n');
        // With nobody listening there is nothing left to do here but to end, which the death signal sees to.
        drop((&self.report).write_all(line.as_bytes()));
    }

    pub(crate) fn note(&self, text: &str) {
        self.say(&format!("note {text}"));
    }

    /// Something is wrong in this process itself.
    pub(crate) fn complain(&self, text: &str) {
        self.count.crashed.fetch_add(1, Relaxed);
        self.note(text);
    }

    /// Stands still for a debugger.
    pub(crate) fn hold(&self, what: &str) {
        self.say(&format!("hold {what}, process {}", self.pid));
        loop {
            std::thread::sleep(Duration::from_secs(3600));
        }
    }

    fn say_progress(&self) {
        let c = &self.count;
        let [forks, refused, hung, crashed, leaked, wrong, late] =
            [&c.forks, &c.refused, &c.hung, &c.crashed, &c.leaked, &c.wrong, &c.late].map(|n| n.load(Relaxed));
        self.say(&format!("counts {forks} {refused} {hung} {crashed} {leaked} {wrong} {late}"));
    }
}

/// The whole half; the exit code of its process.
pub(crate) fn run(args: Args, half: Half) -> io::Result<i32> {
    forkers::die_with_parent();
    carefork::set_foreign_budget(Some(forkers::BUDGET));
    let report = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Info)
        .write_style(env_logger::WriteStyle::Never)
        .format(|out, record| writeln!(out, "{}", record.args()))
        .init();
    let world: &'static World = Box::leak(Box::new(World {
        half,
        pid: std::process::id(),
        fds: Table::new(half)?,
        locks: Locks::new(half),
        board: board::shared(args.forkers * forkers::AT_A_TIME)?,
        enough: AtomicBool::new(false),
        stop: AtomicBool::new(false),
        said: (0..args.threads).map(|_| Default::default()).collect(),
        count: Counts::default(),
        started: AtomicUsize::new(0),
        ended: AtomicUsize::new(0),
        report,
        args,
    }));
    if let Some(fault) = world.args.fault {
        fault.in_the_half()?;
    }
    // In a child too: standard error is for numbered lines.
    std::panic::set_hook(Box::new(|info| world.note(&format!("panic in {}: {info}", std::process::id()))));

    let (threads, forkers) = (world.args.threads, world.args.forkers);
    let spawn = |name: String| std::thread::Builder::new().name(name);
    let forking: Vec<_> = (0..forkers)
        .map(|who| spawn(format!("forker {who}")).spawn(move || world.join_in(forkers, || forkers::run(world, who))))
        .collect::<io::Result<_>>()?;
    let busy: Vec<_> = (0..threads)
        .map(|who| spawn(format!("busy {who}")).spawn(move || world.join_in(forkers, || threads::run(world, who))))
        .collect::<io::Result<_>>()?;

    // Hung children need their time as well.
    let spare = if half == Half::Plain { Duration::from_secs(2).min(world.args.time / 3) } else { Duration::ZERO };
    world.watch(world.args.time - spare, 0);
    world.enough.store(true, Relaxed);
    world.watch(AT_REST, forkers);
    world.stop.store(true, Relaxed);
    world.watch(AT_REST, forkers + threads);
    if world.ended.load(Relaxed) < forkers + threads {
        let all = (0..threads).filter(|&i| !busy[i].is_finished()).map(|i| format!("busy {i}"));
        let all: Vec<_> =
            all.chain((0..forkers).filter(|&i| !forking[i].is_finished()).map(|i| format!("forker {i}"))).collect();
        world.say(&format!("stuck {}", all.join(", ")));
        if world.args.hold {
            world.hold("the half is stuck");
        }
        return Ok(3);
    }
    for (who, b) in busy.into_iter().enumerate() {
        if b.join().is_err() {
            world.complain(&format!("busy {who} panicked"));
        }
    }
    let mut tallies = Vec::new();
    for (who, f) in forking.into_iter().enumerate() {
        match f.join() {
            Ok(tally) => tallies.push(tally),
            Err(_) => world.complain(&format!("forker {who} panicked")),
        }
    }
    world.sum_up(&tallies);
    Ok(0)
}

impl World {
    /// Runs a thread's work. None begins before all have started, and none ends before the last child has been made:
    /// std's own lock for the start and end of threads is nobody's to hold over a fork.
    fn join_in<T>(&self, forkers: usize, work: impl FnOnce() -> T) -> T {
        let all = self.args.threads + forkers;
        self.started.fetch_add(1, Relaxed);
        while self.started.load(Relaxed) < all {
            std::thread::sleep(Duration::from_millis(1));
        }
        let done = work();
        self.ended.fetch_add(1, Relaxed);
        while self.ended.load(Relaxed) < forkers {
            std::thread::sleep(Duration::from_millis(1));
        }
        done
    }

    /// Reports until the time is over or, if there are any to wait for, so many threads have ended.
    fn watch(&self, time: Duration, ends: usize) {
        let begin = Instant::now();
        let mut said = begin;
        while begin.elapsed() < time && (ends == 0 || self.ended.load(Relaxed) < ends) {
            std::thread::sleep(Duration::from_millis(20).min(time.saturating_sub(begin.elapsed())));
            if said.elapsed() > Duration::from_millis(200) {
                said = Instant::now();
                self.say_progress();
            }
        }
    }

    fn sum_up(&self, tallies: &[Tally]) {
        let stats = carefork::stats();
        if self.half == Half::Carefork && stats.dirty > 0 {
            self.count.refused.fetch_add(usize::try_from(stats.dirty).unwrap_or(0), Relaxed);
            self.note(&format!("{} foreign forks did not wait for everyone", stats.dirty));
        }
        self.say_progress();
        for (out, log) in &self.said {
            self.say(&format!("said {} {}", out.load(Relaxed), log.load(Relaxed)));
        }
        let mut latencies = Vec::new();
        let mut places = std::collections::BTreeMap::new();
        for (who, t) in tallies.iter().enumerate() {
            self.say(&format!("forker {}", t.forks));
            for n in &t.excused {
                self.say(&format!("excused {who} {n}"));
            }
            latencies.extend(&t.latencies);
            for p in &t.places {
                *places.entry(p).or_insert(0) += 1;
            }
        }
        for (place, count) in places {
            self.say(&format!("place {count} {place}"));
        }
        latencies.sort_unstable();
        let at = |percent: usize| latencies.get(latencies.len() * percent / 100).copied().unwrap_or(0);
        self.say(&format!("latency {} {}", at(50), at(99)));
        self.say("end");
    }
}

/// xorshift64*: enough to mix things up, the same for the same seed.
#[derive(Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }
}
