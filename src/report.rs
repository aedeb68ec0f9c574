//! What this process's carefork has in its hands now: hooks, regions, care-fds, children, counters (D2).
//!
//! [`report`] is for people: a table in a log or on a terminal of a process that does not fork when it should, or whose forks go
//! ahead dirty. It costs nothing until it is asked for.

pub use crate::at_work::Preparing;
use crate::audit::{self, Kind};
use crate::carefd::OnFork;
use crate::columns::{COLUMNS, printable, shorten, span};
use crate::durations::Durations;
use crate::lineage::{Lineage, Stats, lineage, stats};
use crate::region::no_forking;
use crate::stdio::{self, Waiting};
use crate::{clock, registration, runtime};
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::panic::Location;

/// Hooks, regions in progress, care-fds and counters of this process.
///
/// Waits for nobody, but a few milliseconds for the hooks where a fork has them. Each part is of an instant of its own. Allocates,
/// so not for hooks and signal handlers. In a child it tells of the child.
///
/// ```
/// let _region = carefork::no_forking();
/// let report = carefork::report();
/// assert_eq!(report.regions.len(), 1);
/// println!("{report}");
/// ```
pub fn report() -> Report {
    let lineage = lineage();
    // Before anything that opens something, which is a region of its own.
    let regions = regions();
    let waiting = stdio::waiting();
    let preparing = runtime::at_work().look(clock::now());
    // Care-fds before children, for whose files numbers are used that may have been closed behind carefork's back.
    let (hooks, care_fds) = (hooks(), care_fds());
    let (children, unlisted) = match children() {
        Ok(children) => (children, None),
        Err(e) => (None, Some(e.to_string())),
    };
    Report {
        pid: std::process::id(),
        lineage,
        off: runtime::is_off(),
        regions,
        hooks,
        waiting,
        preparing,
        care_fds,
        children,
        unlisted,
        stats: stats(),
    }
}

/// What [`report`] found. Shows itself as tables of at most 100 columns; `<=MEDIAN` and `<=P99` are upper bounds, at most twice what is
/// true ([`Durations`]).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// This process.
    pub pid: u32,
    /// How it came to be.
    pub lineage: Lineage,
    /// Gate and hooks are turned off: `CAREFORK=off` was in the environment. No fork is guarded.
    pub off: bool,
    /// The hooks in the order in which a fork prepares them. `None` while a fork is in progress, which has them in its hands.
    pub hooks: Option<Vec<HookEntry>>,
    /// The fork that waits for a thread that is stuck printing, if one does.
    pub waiting: Option<Waiting>,
    /// The fork that is preparing a hook at this moment, if one does; not told where there are more than 64 hooks.
    pub preparing: Option<Preparing>,
    /// The threads that are in regions or hold carefork's locks: the ones a fork would wait for now.
    pub regions: Vec<RegionEntry>,
    /// The registered descriptors, rising.
    pub care_fds: Vec<CareFdEntry>,
    /// This process's children that nobody has waited for, rising; from `/proc/self/task/*/children`. `None` where the kernel has no such
    /// file, or one cannot be read now, as without a free descriptor; the table says which.
    pub children: Option<Vec<ChildEntry>>,
    /// Why a file of `children` could not be read.
    unlisted: Option<String>,
    /// What was counted.
    pub stats: Stats,
}

/// A registered [`Hook`](crate::Hook).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HookEntry {
    /// Its place in lock order.
    pub rank: i32,
    /// Its name.
    pub name: &'static str,
    /// What its prepare took, those times that it took ten microseconds or more: waiting for its lock. Not timed in a process with
    /// more than 64 hooks, nor if it was registered behind 64 others.
    pub waited: Durations,
}

/// A thread in a region.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionEntry {
    /// The kernel's number of the thread.
    pub tid: u32,
    /// Its name as it was when it first entered a region, at most 15 bytes.
    pub name: String,
    /// Regions that it is in, one inside the other.
    pub regions: u32,
    /// Locks of carefork's that it holds or is about to.
    pub locks: u32,
    /// Where the outermost of them began, in builds with debug assertions.
    pub entered: Option<&'static Location<'static>>,
}

/// A care-fd.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CareFdEntry {
    /// Its number.
    pub number: RawFd,
    /// When children close it.
    pub on_fork: OnFork,
    /// What it is; `None` if it cannot be seen, or is registered and not open: it was closed behind its owner's back.
    pub kind: Option<Kind>,
    /// What it leads to, as in [`Descriptor`](crate::audit::Descriptor); empty without a kind.
    pub target: String,
}

/// A child of this process, whoever made it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChildEntry {
    /// Its number.
    pub pid: u32,
    /// Its name as ps(1) shows it, at most 15 bytes.
    pub name: String,
    /// Its state as ps(1) shows it: `R` runs, `S` sleeps, `Z` has ended and was not waited for.
    pub state: char,
}

fn children() -> io::Result<Option<Vec<ChildEntry>>> {
    let mut found = Vec::new();
    let mut seen = false;
    // Every task has the children that it made itself. One that ends meanwhile hands them to another.
    for task in unless_gone(tasks())?.unwrap_or_default() {
        let Some(list) = unless_gone(audit::slurp(&format!("/proc/self/task/{task}/children")))? else { continue };
        seen = true;
        for pid in list.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            found.extend(ChildEntry::of(pid)?);
        }
    }
    found.sort_by_key(|c: &ChildEntry| c.pid);
    found.dedup_by_key(|c| c.pid);
    Ok(seen.then_some(found))
}

/// Of a task or child that has ended there is nothing, as of what this kernel does not have.
fn unless_gone<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
        read => read.map(Some),
    }
}

fn tasks() -> io::Result<Vec<String>> {
    // What lists them cannot be a care-fd: instead no child gets it.
    let _region = no_forking();
    std::fs::read_dir("/proc/self/task")?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

impl ChildEntry {
    /// `None` if it was waited for meanwhile.
    fn of(pid: u32) -> io::Result<Option<Self>> {
        Ok(unless_gone(audit::slurp(&format!("/proc/{pid}/stat")))?.and_then(|stat| ChildEntry::parse(pid, &stat)))
    }

    /// "pid (name) state parent ...": the name may hold brackets and blanks.
    fn parse(pid: u32, stat: &str) -> Option<Self> {
        let (head, tail) = stat.rsplit_once(')')?;
        let name = head.split_once('(')?.1.to_owned();
        Some(ChildEntry { pid, name, state: tail.trim_start().chars().next()? })
    }
}

fn hooks() -> Option<Vec<HookEntry>> {
    Some(registration::list()?.into_iter().map(|(name, rank, waited)| HookEntry { rank, name, waited }).collect())
}

fn regions() -> Vec<RegionEntry> {
    let mut found = Vec::new();
    runtime::gate().each_busy(|seen, regions, locks| {
        found.push(RegionEntry { tid: seen.tid, name: seen.name(), regions, locks, entered: seen.entered });
    });
    found
}

fn care_fds() -> Vec<CareFdEntry> {
    let entry = |(number, on_fork, seen): (RawFd, OnFork, Option<audit::Descriptor>)| CareFdEntry {
        number,
        on_fork,
        kind: seen.as_ref().map(|d| d.kind),
        target: seen.map(|d| d.target).unwrap_or_default(),
    };
    audit::care_fds().into_iter().map(entry).collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lineage { generation, dirty, bypass } = self.lineage;
        write!(f, "carefork in process {}: generation {generation}", self.pid)?;
        f.write_str(if dirty { ", after a dirty fork" } else { "" })?;
        f.write_str(if bypass { ", after a fork without handlers" } else { "" })?;
        writeln!(f, "{}", if self.off { ", CAREFORK=off" } else { "" })?;
        self.show_stats(f)?;
        self.show_hooks(f)?;
        self.show_regions(f)?;
        self.show_children(f)?;
        self.show_care_fds(f)
    }
}

impl Report {
    fn show_stats(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.stats;
        let (forks, foreign, refused, programs) = (s.forks, s.foreign, s.refused, s.programs);
        writeln!(f, "forks: {forks} own, {foreign} by foreign code, {refused} refused; {programs} programs started")?;
        let (dirty, late, inside, away) = (s.dirty, s.late, s.in_region, s.thrown_away);
        writeln!(f, "       {dirty} dirty, {late} late, {inside} inside a region, {away} children thrown away")?;
        writeln!(f, "gate: {} times reopened by a waiter; {} lines on fd 2 dropped", s.reopened, s.unreported)?;
        writeln!(
            f,
            "{:<16} {:>9} {:>8} {:>8} {:>8} {:>8}",
            "forks waited for", "TIMES", "<=MEDIAN", "<=P99", "LONGEST", "TOTAL"
        )?;
        for (what, d) in
            [("  other forks", s.turns), ("  regions", s.regions), ("  hooks", s.hooks), ("  the copy", s.copying)]
        {
            let [median, p99, longest, total] = [d.median, d.p99, d.longest, d.total].map(span);
            writeln!(f, "{what:<16} {:>9} {median:>8} {p99:>8} {longest:>8} {total:>8}", d.count)?;
        }
        self.show_now(f)
    }

    /// What the two say of themselves, in so many columns.
    fn show_now(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.waiting, self.preparing) {
            (Some(Waiting { tid, stream, waited }), _) => {
                let waited = span(waited);
                writeln!(
                    f,
                    "now: the fork of thread {tid} has waited {waited} for {stream}: a thread is stuck printing"
                )
            }
            (None, Some(Preparing { tid, hook, taken })) => {
                let head = format!("now: the fork of thread {tid} has been preparing hook \"");
                let tail = format!("\" for {}", span(taken));
                let room = COLUMNS.saturating_sub(head.len() + tail.len());
                writeln!(f, "{head}{}{tail}", shorten(&printable(hook), room))
            }
            (None, None) => Ok(()),
        }
    }

    fn show_hooks(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(hooks) = &self.hooks else {
            return writeln!(f, "hooks: a fork is in progress and has them");
        };
        writeln!(f, "hooks: {}", hooks.len())?;
        if !hooks.is_empty() {
            writeln!(f, "{:>11} {:>9} {:>8} {:>8} NAME", "RANK", "WAITED", "LONGEST", "TOTAL")?;
        }
        for h in hooks {
            let (longest, total) = (span(h.waited.longest), span(h.waited.total));
            let head = format!("{:>11} {:>9} {longest:>8} {total:>8} ", h.rank, h.waited.count);
            writeln!(f, "{head}{}", shorten(&printable(h.name), COLUMNS - head.len()))?;
        }
        Ok(())
    }

    fn show_regions(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "threads in regions: {}", self.regions.len())?;
        if !self.regions.is_empty() {
            writeln!(f, "{:>11} {:<15} {:>7} {:>5} SINCE", "TID", "NAME", "REGIONS", "LOCKS")?;
        }
        for r in &self.regions {
            // A name may hold wide characters: it is shortened, and padded by hand.
            let name = shorten(&printable(&r.name), 15);
            let pad = 15 - crate::columns::width_of(&name).min(15);
            let head = format!("{:>7} {:>5} ", r.regions, r.locks);
            let since = r.entered.map_or("-".to_owned(), |at| format!("{}:{}", at.file(), at.line()));
            let room = COLUMNS - 12 - 16 - head.len();
            writeln!(f, "{:>11} {name}{:pad$} {head}{}", r.tid, "", shorten(&printable(&since), room))?;
        }
        Ok(())
    }

    fn show_children(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(children) = &self.children else {
            return match &self.unlisted {
                Some(why) => writeln!(f, "children: not listed: {why}"),
                None => writeln!(f, "children: the kernel does not list them"),
            };
        };
        writeln!(f, "children: {}", children.len())?;
        if !children.is_empty() {
            writeln!(f, "{:>11} STATE NAME", "PID")?;
        }
        for c in children {
            writeln!(f, "{:>11} {:<5} {}", c.pid, c.state, shorten(&printable(&c.name), COLUMNS - 18))?;
        }
        Ok(())
    }

    /// The last section: the line after it is the caller's.
    fn show_care_fds(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "care-fds: {}", self.care_fds.len())?;
        if !self.care_fds.is_empty() {
            write!(f, "\n{:>11} {:<7} {:<14} TARGET", "FD", "ON FORK", "KIND")?;
        }
        for c in &self.care_fds {
            let on = match c.on_fork {
                OnFork::Cleanup => "cleanup",
                OnFork::Close => "close",
            };
            let (kind, target) = match c.kind {
                Some(kind) => (kind.to_string(), c.target.as_str()),
                None => ("?".to_owned(), "not open, or not to be seen"),
            };
            let head = format!("{:>11} {on:<7} {kind:<14} ", c.number);
            write!(f, "\n{head}{}", shorten(&printable(target), COLUMNS - head.len()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn durations(n: u64) -> Durations {
        let us = |k| Duration::from_micros(n * 100 + k);
        Durations { count: n * 10, median: us(1), p99: us(2), longest: us(3), total: us(4) }
    }

    fn empty(stats: Stats) -> Report {
        Report {
            pid: 42,
            lineage: Lineage { generation: 11, dirty: false, bypass: true },
            off: true,
            hooks: None,
            waiting: None,
            preparing: None,
            regions: Vec::new(),
            care_fds: Vec::new(),
            children: None,
            unlisted: None,
            stats,
        }
    }

    /// However long it takes, whatever the thread's number, and whatever the hook is called.
    #[test]
    fn what_a_fork_does_now_fits_a_hundred_columns() {
        let mut report = empty(Stats::default());
        let (tid, taken) = (4_194_304, Duration::from_millis(86_400_123));
        let now = |report: &Report| {
            let text = report.to_string();
            let mut now = text.lines().filter(|line| line.starts_with("now: ")).map(str::to_owned);
            let line = now.next();
            assert_eq!(now.next(), None, "{text}");
            line
        };
        assert_eq!(now(&report), None);
        report.preparing = Some(Preparing { tid, hook: "data\nbase", taken });
        let line = "now: the fork of thread 4194304 has been preparing hook \"data\\nbase\" for 86400 s";
        assert_eq!(now(&report).as_deref(), Some(line));
        for hook in ["h".repeat(120), "\u{2066}長い".repeat(20)] {
            report.preparing = Some(Preparing { tid, hook: hook.leak(), taken });
            let line = now(&report).expect("it prepares");
            assert!(
                (98..=100).contains(&crate::columns::width_of(&line)) && line.ends_with("\" for 86400 s"),
                "{line}"
            );
        }
        for stream in [stdio::Stream::Output, stdio::Stream::Error] {
            report.waiting = Some(Waiting { tid, stream, waited: taken });
            let line =
                format!("now: the fork of thread 4194304 has waited 86400 s for {stream}: a thread is stuck printing");
            assert!(line.len() <= 100);
            assert_eq!(now(&report), Some(line));
        }
    }

    /// Every figure is another one, so that none stands in another's place.
    #[test]
    fn each_figure_stands_in_its_place() {
        let stats = Stats {
            forks: 1,
            foreign: 2,
            refused: 3,
            dirty: 4,
            late: 5,
            in_region: 6,
            thrown_away: 7,
            reopened: 8,
            unreported: 9,
            turns: durations(1),
            regions: durations(2),
            hooks: durations(3),
            copying: durations(4),
            programs: 10,
        };
        let report = empty(stats);
        assert_eq!(report.to_string(), TEXT, "\n{report}");
    }

    const TEXT: &str = "\
carefork in process 42: generation 11, after a fork without handlers, CAREFORK=off
forks: 1 own, 2 by foreign code, 3 refused; 10 programs started
       4 dirty, 5 late, 6 inside a region, 7 children thrown away
gate: 8 times reopened by a waiter; 9 lines on fd 2 dropped
forks waited for     TIMES <=MEDIAN    <=P99  LONGEST    TOTAL
  other forks           10   101 us   102 us   103 us   104 us
  regions               20   201 us   202 us   203 us   204 us
  hooks                 30   301 us   302 us   303 us   304 us
  the copy              40   401 us   402 us   403 us   404 us
hooks: a fork is in progress and has them
threads in regions: 0
children: the kernel does not list them
care-fds: 0";
}
