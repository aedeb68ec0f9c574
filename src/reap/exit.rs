//! What became of a child, and how a person would say it.

use crate::{clock, sys_reap};
use std::fmt;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::Duration;

/// What became of a child: handed out once, by whoever reaped it.
///
/// ```
/// // SAFETY: the child uses nothing of the parent's.
/// let mut child = unsafe { carefork::ForkOptions::new().name("worker").spawn(|| 3) }?;
/// child.wait()?;
/// let exit = child.exit().expect("it was waited for");
/// assert_eq!((exit.code(), exit.name.as_deref()), (Some(3), Some("worker")));
/// // worker[1234] exited with code 3 after 2 ms
/// println!("{exit}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Exit {
    /// Its process id, which may be somebody else's by now.
    pub pid: u32,
    /// The name it was given ([`ForkOptions::name`](crate::ForkOptions::name)); a program's, without its directory.
    pub name: Option<Box<str>>,
    /// How it ended.
    pub status: Ending,
    /// From the fork's return to the moment its end was seen, as `CLOCK_MONOTONIC` counts: by a reaper at once, by a wait when it came to that.
    pub ran: Duration,
    /// What it used, its own reaped children included. `None` with a status that is lost or was handed in
    /// ([`Reaper::reaped`](crate::Reaper::reaped)).
    pub usage: Option<Usage>,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ending {
    /// By exit, with this code.
    Exited(i32),
    /// By a signal.
    Killed {
        /// Its number.
        signal: i32,
        /// A core was dumped.
        core: bool,
    },
    /// It ended, and another wait took its status: a `waitpid(-1)` elsewhere in this process, or the kernel because SIGCHLD is ignored.
    Lost,
}

/// What a child used, as getrusage(2) counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// CPU time in the program.
    pub user: Duration,
    /// CPU time in the kernel.
    pub system: Duration,
    /// The most memory it had resident, bytes.
    pub max_rss: u64,
    /// Page faults without I/O.
    pub minor_faults: u64,
    /// Page faults with I/O.
    pub major_faults: u64,
}

impl Exit {
    /// It exited with code 0.
    pub fn success(&self) -> bool {
        self.status == Ending::Exited(0)
    }

    /// Its exit code, if it exited.
    pub fn code(&self) -> Option<i32> {
        match self.status {
            Ending::Exited(code) => Some(code),
            _ => None,
        }
    }

    /// The signal that killed it, if one did.
    pub fn signal(&self) -> Option<i32> {
        match self.status {
            Ending::Killed { signal, .. } => Some(signal),
            _ => None,
        }
    }

    /// Somebody else took its status ([`Ending::Lost`]).
    pub fn is_lost(&self) -> bool {
        self.status == Ending::Lost
    }

    /// The status in std's form; `None` if it was lost.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.status.raw().map(ExitStatus::from_raw)
    }
}

impl Ending {
    /// From wait(2)'s encoding.
    pub(crate) fn from_raw(raw: i32) -> Self {
        match raw & 0x7f {
            0 => Ending::Exited(raw >> 8 & 0xff),
            signal => Ending::Killed { signal, core: raw & 0x80 != 0 },
        }
    }

    fn raw(self) -> Option<i32> {
        match self {
            Ending::Exited(code) => Some((code & 0xff) << 8),
            Ending::Killed { signal, core } => Some(signal | if core { 0x80 } else { 0 }),
            Ending::Lost => None,
        }
    }
}

/// An ending and when it was seen, before name and start are put to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub(crate) status: Ending,
    pub(crate) usage: Option<Usage>,
    pub(crate) seen: u64,
}

impl Record {
    pub(crate) fn new(status: Ending) -> Self {
        Record { status, usage: None, seen: clock::now() }
    }

    pub(crate) fn of(ended: &sys_reap::Ended) -> Self {
        let time = |t: libc::timeval| {
            Duration::new(t.tv_sec.try_into().unwrap_or(0), u32::try_from(t.tv_usec).unwrap_or(0) * 1000)
        };
        let count = |n: libc::c_long| u64::try_from(n).unwrap_or(0);
        let usage = Usage {
            user: time(ended.usage.ru_utime),
            system: time(ended.usage.ru_stime),
            max_rss: count(ended.usage.ru_maxrss) * 1024,
            minor_faults: count(ended.usage.ru_minflt),
            major_faults: count(ended.usage.ru_majflt),
        };
        Record { usage: Some(usage), ..Record::new(Ending::from_raw(ended.status)) }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_deref().unwrap_or("child");
        write!(f, "{name}[{}] {} after {}", self.pid, self.status, Span(self.ran))
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Ending::Exited(code) => write!(f, "exited with code {code}"),
            Ending::Killed { signal, core } => {
                write!(f, "killed by {}{}", SignalName(signal), if core { " (core dumped)" } else { "" })
            }
            Ending::Lost => f.write_str("ended, status lost (another wait took it, or SIGCHLD is ignored)"),
        }
    }
}

struct SignalName(i32);

impl fmt::Display for SignalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match nix::sys::signal::Signal::try_from(self.0) {
            Ok(signal) => f.write_str(signal.as_str()),
            Err(_) => write!(f, "signal {}", self.0),
        }
    }
}

/// A time in two figures or so: 12 ms, 3.2 s, 4 min 5 s, 2 h 10 min.
struct Span(Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ms, s) = (self.0.as_millis(), self.0.as_secs());
        match s {
            0 => write!(f, "{ms} ms"),
            1..60 => write!(f, "{s}.{} s", ms % 1000 / 100),
            60..3600 => write!(f, "{} min {} s", s / 60, s % 60),
            _ => write!(f, "{} h {} min", s / 3600, s / 60 % 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: i32, ran: u64) -> String {
        let (name, ran) = (Some("worker".into()), Duration::from_millis(ran));
        Exit { pid: 1234, name, status: Ending::from_raw(status), ran, usage: None }.to_string()
    }

    #[test]
    fn prints_as_a_person_would_say_it() {
        assert_eq!(said(libc::SIGSEGV | 0x80, 3_249), "worker[1234] killed by SIGSEGV (core dumped) after 3.2 s");
        assert_eq!(said(3 << 8, 12), "worker[1234] exited with code 3 after 12 ms");
        assert_eq!(said(40, 245_000), "worker[1234] killed by signal 40 after 4 min 5 s");
        assert_eq!(said(libc::SIGTERM, 7_800_000), "worker[1234] killed by SIGTERM after 2 h 10 min");
        let lost = Exit { pid: 7, name: None, status: Ending::Lost, ran: Duration::ZERO, usage: None };
        assert_eq!(
            lost.to_string(),
            "child[7] ended, status lost (another wait took it, or SIGCHLD is ignored) after 0 ms"
        );
        assert!(lost.exit_status().is_none() && lost.is_lost() && !lost.success());
    }

    #[test]
    fn the_encoding_goes_both_ways() {
        for raw in [0, 255 << 8, libc::SIGKILL, libc::SIGABRT | 0x80] {
            assert_eq!(Ending::from_raw(raw).raw(), Some(raw));
        }
    }
}
