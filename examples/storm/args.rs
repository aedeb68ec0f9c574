//! The flags, and what `--help` says.

use crate::fault::Fault;
use std::time::Duration;

pub(crate) const HELP: &str = "\
storm: fork without pause from a process whose threads never rest, under plain fork() and under carefork

USAGE: cargo run --release --example storm -- [FLAGS]

  --seconds N     how long, both halves together (default 10)
  --threads N     threads that log, print, lock, open and close (default 4)
  --forkers N     threads that fork (default 2)
  --only WHICH    carefork or plain: one half alone, for all the time
  --seed N        for the order of events (they still depend on the scheduler)
  --json          one JSON object on standard output, no table
  --fault WHAT    do it wrong on purpose, once: hang, crash, leak, close, tear or lose; the table has to say so
  --hold          leave the first hung child, or a hung half, alive and say its pid: for a debugger
  --help          this

What happens: a process starts threads which all the time print and log numbered lines, take locks (carefork's Mutex,
RwLock, Condvar, OnceLock, LazyLock; std's, by hook; parking_lot's and crossbeam channels, inside regions) and open and drop
files, listeners, sockets, pipes and memfds. Other threads fork. Each child closes what it should not have, looks at every
descriptor left in /proc/self/fd, prints, logs, takes every lock, starts two threads that fight over them, allocates, forks a
child of its own which does the same in short, and says how it went. The plain half is the same program with carefork turned
off: fork() is libc's, std's locks stand where carefork has its own, descriptors are recorded in a table of atomics.

The table, one row for each half:
  forks           children made by the forking threads (each of them forks once more)
  refused         forks that carefork would not make, or made without waiting for everyone
  hung            children that stood still for 2 s and were killed: they sleep on a lock whose holder was not copied
  crashed         children that panicked, were killed by a signal, or found data behind a lock half changed
  leaked fds      descriptors open in a child that should not be there: opened, but not yet on record, as it was forked
  wrongly closed  descriptors that a child needs, gone or replaced by something else
  bad lines       printed or logged lines lost, doubled, out of order or torn; parents' and children's
  fork p50, p99   how long the call of fork took in the forking thread: half and 99 % of the calls were faster

Where a machine is so busy that a forking thread stands still for a tenth of a second in the middle of libc's fork, a waiting
thread opens the gate. Such a child knows it, and looks at nothing; how many there were stands below the table.

Exit status: 0; 1 if carefork's row has anything but zeros between forks and fork p50, or if one child in ten was late; 2 for
bad flags.
";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Plain,
    Carefork,
}

impl Half {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Half::Plain => "plain",
            Half::Carefork => "carefork",
        }
    }

    fn parse(text: &str) -> Result<Half, String> {
        match text {
            "plain" => Ok(Half::Plain),
            "carefork" => Ok(Half::Carefork),
            _ => Err(format!("\"{text}\" is neither carefork nor plain")),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Args {
    pub(crate) time: Duration,
    pub(crate) threads: usize,
    pub(crate) forkers: usize,
    pub(crate) only: Option<Half>,
    pub(crate) seed: u64,
    pub(crate) json: bool,
    pub(crate) hold: bool,
    pub(crate) fault: Option<Fault>,
    pub(crate) help: bool,
    /// Set in the process that is one half; not for users.
    pub(crate) half: Option<Half>,
}

pub(crate) fn parse(mut given: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut args = Args {
        time: Duration::from_secs(10),
        threads: 4,
        forkers: 2,
        only: None,
        seed: 1,
        json: false,
        hold: false,
        fault: None,
        help: false,
        half: None,
    };
    while let Some(flag) = given.next() {
        let (flag, mut value) = match flag.split_once('=') {
            Some((f, v)) => (f.to_owned(), Some(v.to_owned())),
            None => (flag, None),
        };
        let mut value = || value.take().or_else(|| given.next()).ok_or(format!("{flag} wants a value"));
        match flag.as_str() {
            "--seconds" => {
                let s: f64 = number(&flag, &value()?)?;
                if !(0.1..=1e6).contains(&s) {
                    return Err("--seconds wants 0.1 or more".to_owned());
                }
                args.time = Duration::from_secs_f64(s);
            }
            "--threads" => args.threads = count(&flag, &value()?)?,
            "--forkers" => args.forkers = count(&flag, &value()?)?,
            "--only" => args.only = Some(Half::parse(&value()?)?),
            "--half" => args.half = Some(Half::parse(&value()?)?),
            "--seed" => args.seed = number(&flag, &value()?)?,
            "--fault" => args.fault = Some(Fault::parse(&value()?)?),
            "--json" => args.json = true,
            "--hold" => args.hold = true,
            "--help" | "-h" => args.help = true,
            _ => return Err(format!("unknown flag {flag}")),
        }
    }
    Ok(args)
}

fn number<T: std::str::FromStr>(flag: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{flag}: \"{text}\" is not a number"))
}

fn count(flag: &str, text: &str) -> Result<usize, String> {
    match number(flag, text)? {
        n @ 1..=64 => Ok(n),
        n => Err(format!("{flag} wants 1 to 64, not {n}")),
    }
}
