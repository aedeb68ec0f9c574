//! Verdicts of forked children: each way to fail has an exit code of its own, and waiting has a bound.

use super::{raw, trace};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::Location;
use std::time::{Duration, Instant};

/// In a child: goes on if `cond` holds, else says where with one `write(2)` and ends with `code`. Async-signal-safe.
#[track_caller]
pub fn check(code: i32, cond: bool) {
    if !cond {
        let at = Location::caller();
        raw::Line::new()
            .text("child ")
            .num(raw::getpid().into())
            .text(": check ")
            .num(code.into())
            .text(" failed at ")
            .text(at.file())
            .text(":")
            .num(at.line().into())
            .send();
        // 0 would be a pass.
        raw::exit_now(if code == 0 { 255 } else { code });
    }
}

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Exited(i32),
    Signaled(i32),
    /// It had not ended within the bound and was killed, with all its descendants. `trace` says what they waited for.
    Hung {
        trace: String,
    },
    /// Somebody else reaped it: ECHILD.
    Lost,
}

/// Waits for one child, no longer than `bound`.
pub fn reap(pid: libc::pid_t, bound: Duration) -> Verdict {
    wait_bounded(pid, bound).unwrap_or_else(|| kill_hung(pid, true))
}

/// As [`reap`], but None if it has not ended within the bound, and nothing is done about it.
pub fn wait_bounded(pid: libc::pid_t, bound: Duration) -> Option<Verdict> {
    wait_unstretched(pid, raw::patience(bound))
}

/// As [`wait_bounded`], for a bound that is known to pass.
pub fn wait_unstretched(pid: libc::pid_t, bound: Duration) -> Option<Verdict> {
    let deadline = Instant::now() + bound;
    let pidfd = raw::pidfd_open(pid);
    wait_until(pid, pidfd.as_ref(), deadline)
}

fn wait_until(pid: libc::pid_t, pidfd: Option<&OwnedFd>, deadline: Instant) -> Option<Verdict> {
    loop {
        let ended = wait_now(pid);
        let left = deadline.saturating_duration_since(Instant::now());
        if ended.is_some() || left.is_zero() {
            return ended;
        }
        match pidfd {
            Some(fd) => raw::poll_readable(&mut [raw::pollfd(fd.as_raw_fd())], left),
            // No pidfd here (an old kernel, a filter): look again soon.
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn wait_now(pid: libc::pid_t) -> Option<Verdict> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is ours to write.
        let got = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        return match got {
            0 => None,
            -1 if raw::errno() == libc::EINTR => continue,
            -1 => Some(Verdict::Lost),
            _ if libc::WIFSIGNALED(status) => Some(Verdict::Signaled(libc::WTERMSIG(status))),
            _ => Some(Verdict::Exited(libc::WEXITSTATUS(status))),
        };
    }
}

fn kill_hung(pid: libc::pid_t, with_trace: bool) -> Verdict {
    let family = trace::tree(pid);
    let trace = if with_trace { trace::report(&family) } else { String::new() };
    trace::kill(&family);
    let gone = wait_bounded(pid, Duration::from_secs(5));
    let note = if gone.is_none() { "(and SIGKILL did not end it within 5 s)\n" } else { "" };
    Verdict::Hung { trace: trace + note }
}

/// After so many hung children [`fork_many`] stops: the point is made, and each costs a bound.
const ENOUGH_HUNG: u32 = 3;

/// How many children ended how.
#[derive(Debug, Default)]
pub struct Tally {
    pub exits: BTreeMap<i32, u32>,
    pub signals: BTreeMap<i32, u32>,
    pub lost: u32,
    pub hung: u32,
    /// What the first of the hung waited for.
    pub traces: Vec<String>,
}

impl Tally {
    pub fn total(&self) -> u32 {
        self.exits.values().sum::<u32>() + self.signals.values().sum::<u32>() + self.lost + self.hung
    }

    pub fn add(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Exited(code) => *self.exits.entry(code).or_default() += 1,
            Verdict::Signaled(signal) => *self.signals.entry(signal).or_default() += 1,
            Verdict::Lost => self.lost += 1,
            Verdict::Hung { trace } => {
                self.hung += 1;
                self.traces.extend((!trace.is_empty()).then_some(trace));
            }
        }
    }

    /// For several forking threads.
    #[must_use]
    pub fn merge(mut self, other: Tally) -> Tally {
        other.exits.into_iter().for_each(|(code, n)| *self.exits.entry(code).or_default() += n);
        other.signals.into_iter().for_each(|(signal, n)| *self.signals.entry(signal).or_default() += n);
        self.lost += other.lost;
        self.hung += other.hung;
        self.traces.extend(other.traces);
        self
    }

    /// # Panics
    /// Unless exactly `n` children ended, each with exit code 0.
    #[track_caller]
    pub fn expect_clean(&self, n: u32) {
        let clean = self.total() == n && self.exits.get(&0).copied().unwrap_or(0) == n;
        let Tally { exits, signals, lost, hung, .. } = self;
        assert!(
            clean,
            "of {n} children not all were well: exit codes {exits:?}, signals {signals:?}, lost {lost}, hung {hung}\n{}",
            self.traces.join("\n")
        );
    }
}

struct Live {
    pid: libc::pid_t,
    pidfd: Option<OwnedFd>,
    deadline: Instant,
}

/// Forks `n` times by `fork(i)`, which returns the child's pid, with at most `most` children alive at once, each of
/// which may take `bound`. Waits by poll, starts no thread. Ends early when children hang.
///
/// The children alive are open pidfds in the children that come after them; with `most` 1 there is none at a fork.
pub fn fork_many(n: u32, most: usize, bound: Duration, mut fork: impl FnMut(u32) -> libc::pid_t) -> Tally {
    let bound = raw::patience(bound);
    let mut live: Vec<Live> = Vec::with_capacity(most);
    let mut tally = Tally::default();
    for i in 0..n {
        if tally.hung >= ENOUGH_HUNG {
            break;
        }
        let pid = fork(i);
        assert!(pid > 0, "fork {i} failed");
        live.push(Live { pid, pidfd: raw::pidfd_open(pid), deadline: Instant::now() + bound });
        drain(&mut live, most.max(1) - 1, &mut tally);
    }
    drain(&mut live, 0, &mut tally);
    tally
}

/// Reaps until no more than `keep` are left.
fn drain(live: &mut Vec<Live>, keep: usize, tally: &mut Tally) {
    while live.len() > keep {
        let now = Instant::now();
        let before = live.len();
        live.retain(|child| match wait_now(child.pid) {
            Some(verdict) => {
                tally.add(verdict);
                false
            }
            None if child.deadline <= now => {
                tally.add(kill_hung(child.pid, tally.hung == 0));
                false
            }
            None => true,
        });
        if live.len() == before {
            let next = live.iter().map(|c| c.deadline).min().unwrap_or(now);
            let mut left = next.saturating_duration_since(now);
            let mut fds: Vec<_> =
                live.iter().filter_map(|c| c.pidfd.as_ref()).map(|fd| raw::pollfd(fd.as_raw_fd())).collect();
            if fds.len() < live.len() {
                left = left.min(Duration::from_millis(1));
            }
            raw::poll_readable(&mut fds, left);
        }
    }
}
