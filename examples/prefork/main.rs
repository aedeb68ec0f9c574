//! A pre-forking HTTP server that loses no request, whatever kills its workers.
//!
//! `cargo run --release --example prefork -- [ADDRESS [WORKERS]]`, then `wrk http://ADDRESS/` against it, and `pkill -KILL -x worker -P PID` with the
//! number that it says is the master's.
//!
//! | event | what the master does |
//! |---|---|
//! | a connection | accepts it, keeps a duplicate, sends it to the worker with the least to do |
//! | a worker crashes, or is killed | says how, forks another, gives out its connections again |
//! | SIGHUP | replaces the workers one by one; who is connected stays so |
//! | SIGTERM, SIGINT | accepts no more, has all workers drain, ends with the last one |
//!
//! # How nothing is lost
//! A connection lives as long as somebody has it open: the master has. What a worker was doing with it is in two places that outlive the
//! worker. The kernel knows how many bytes were written and taken (`counters`); shared memory says what was to be (`board`): a worker
//! *peeks* at a request, writes the whole answer down there as a promise, sends it, takes the request out of the socket, and
//! strikes the promise out. The next worker compares the two and goes on at the byte (`connection` has the table). So each request is
//! answered once, and what a client has read of an answer is always the beginning of what it reads next.
//!
//! | dies | then |
//! |---|---|
//! | a worker, anywhere | the next one goes on |
//! | five workers in a row at the same request | that client gets an error, and its connection is closed |
//! | the master | its workers drain and end; who is in the listener's queue is lost. It parses nothing |
//! | the machine | this is not a database |
//!
//! The work for an answer may be done twice, if a worker dies between doing it and promising: see `connection`. What a real server
//! has besides and this one has not: time limits for clients that say nothing, and for workers that are stuck. With those a watchdog
//! may simply kill them.
//!
//! | file | has |
//! |---|---|
//! | `main` | the master's loop: signals, ended workers, what workers say, the door |
//! | `master` | workers: forked, watched, replaced, drained |
//! | `table` | connections, as the master has them |
//! | `channel` | what master and workers say to each other |
//! | `worker` | a worker's loop |
//! | `connection` | one connection, step by step |
//! | `board` | promises, in shared memory |
//! | `counters` | what the kernel knows of a connection |
//! | `http` | requests and answers |
//! | `faults` | workers that die at a given step |

// Descriptors, counts and lengths are small.
#![allow(clippy::cast_possible_truncation)]

mod board;
mod channel;
mod connection;
mod counters;
mod faults;
mod http;
mod master;
mod table;
mod worker;

use carefork::CareFd;
use master::Master;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{setsockopt, sockopt};
use std::error::Error;
use std::net::TcpListener;
use std::os::fd::AsFd;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let address = args.next().unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let count = args.next().map_or(Ok(4), |n| n.parse())?;

    // Before there is a thread or a worker: no signal is missed, and none interrupts.
    let mut signals = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|s| signals.add(s));
    signals.thread_block()?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = CareFd::open(|| Ok(SignalFd::with_flags(&signals, flags)?))?;

    // The master has a descriptor for each connection.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let listener = CareFd::open(|| TcpListener::bind(&address))?;
    listener.set_nonblocking(true)?;
    // Connections inherit these: an answer is not held back for more; and urgent data count as any (`counters`).
    setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
    setsockopt(&listener, sockopt::OobInline, &true)?;
    println!("listening on {}, master {}", listener.local_addr()?, std::process::id());

    // The master's thread does it all; the channel holds what the reaper's callbacks saw until it comes to it.
    let (tell, told) = crossbeam_channel::unbounded();
    let mut master = Master::new(listener, tell)?;
    for _ in 0..count {
        master.start()?;
    }

    while !(master.is_ending() && master.reaper.is_empty()) {
        let (speakers, knock) = wait(&signals, &master)?;
        for pid in speakers {
            master.hear(pid)?;
        }
        master.reaper.dispatch()?;
        // First: a SIGTERM to the whole group may be why workers have ended.
        while let Some(signal) = signals.read_signal()? {
            match Signal::try_from(signal.ssi_signo.cast_signed())? {
                _ if master.is_ending() => {}
                Signal::SIGHUP => master.restart()?,
                _ => master.end()?,
            }
        }
        for exit in told.try_iter() {
            master.ended(&exit)?;
        }
        if knock {
            master.accept()?;
        }
        master.place();
    }
    println!("ended");
    Ok(())
}

/// Until something happens: the workers that have something to say, and whether somebody is at the door.
fn wait(signals: &CareFd<SignalFd>, master: &Master) -> Result<(Vec<u32>, bool), Box<dyn Error>> {
    let mut fds =
        vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(master.reaper.as_fd(), PollFlags::POLLIN)];
    let first_worker = fds.len();
    // A full channel keeps connections waiting until there is room in it again.
    let room = if master.table.waiting.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
    fds.extend(master.workers.iter().map(|w| PollFd::new(w.channel.as_fd(), PollFlags::POLLIN | room)));
    let door = fds.len();
    fds.extend(master.door().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    // Rounded up, so that the pause is over.
    let pause = master.pause().map_or(PollTimeout::NONE, |left| PollTimeout::from(left.as_millis() as u16 + 1));
    poll(&mut fds, pause)?;
    let any = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
    let speakers = master.workers.iter().zip(&fds[first_worker..door]).filter(|(_, fd)| any(fd));
    Ok((speakers.map(|(worker, _)| worker.pid()).collect(), fds.get(door).is_some_and(any)))
}
