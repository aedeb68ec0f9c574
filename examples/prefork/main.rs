//! A pre-forking HTTP server: N workers share one listening socket.
//!
//! `cargo run --release --example prefork -- [ADDRESS [WORKERS]]`, then `wrk http://ADDRESS/` against it.
//!
//! | event | what the master does |
//! |---|---|
//! | a worker crashes, or is killed | says how, forks another |
//! | SIGHUP | replaces the workers one by one: the new one serves before the old one drains |
//! | SIGTERM, SIGINT | has all workers drain, ends with the last one |
//!
//! The listener is a care-fd that workers keep. A worker that drains accepts no more, answers what it was asked with
//! `Connection: close`, and ends when nobody is connected; connections that nobody has accepted wait in the shared socket for
//! the others, so none is refused or lost. A worker that is killed outright takes its own connections with it, as any server's.

#![allow(unsafe_code)]

mod worker;

use carefork::{CareFd, ForkOptions, Reaper, Signals, Watched};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::collections::VecDeque;
use std::error::Error;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::time::Duration;

/// How long a worker may drain.
const GRACE: Duration = Duration::from_secs(60);
/// So many workers in a row that end within a second: the program is broken, not unlucky.
const TOO_MANY: u32 = 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let address = args.next().unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let count = args.next().map_or(Ok(4), |n| n.parse())?;
    let listener = CareFd::open(|| TcpListener::bind(&address))?;
    listener.set_nonblocking(true)?;

    // Before there is a thread or a worker: no signal is missed, and none interrupts.
    let mut signals = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|s| signals.add(s));
    signals.thread_block()?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&signals, flags)?;

    let reaper = Reaper::new()?;
    // The master's thread does it all; the channel holds what the callbacks saw until it comes to it.
    let (tell, told) = crossbeam_channel::unbounded();
    let mut master = Master { listener, reaper, tell, workers: Vec::new(), old: VecDeque::new(), failing: 0 };
    println!("listening on {}, master {}", master.listener.local_addr()?, std::process::id());
    for _ in 0..count {
        master.start()?;
    }

    let mut ending = false;
    while !(ending && master.reaper.is_empty()) {
        let mut fds =
            [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(master.reaper.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE)?;
        master.reaper.dispatch()?;
        for exit in told.try_iter() {
            master.ended(&exit, ending)?;
        }
        while let Some(signal) = signals.read_signal()? {
            match Signal::try_from(signal.ssi_signo.cast_signed())? {
                Signal::SIGHUP if !ending => master.restart()?,
                Signal::SIGHUP => {}
                _ => {
                    ending = true;
                    println!("ending");
                    master.workers.iter().chain(&master.old).try_for_each(|w| w.terminate(GRACE))?;
                }
            }
        }
    }
    println!("ended");
    Ok(())
}

struct Master {
    listener: CareFd<TcpListener>,
    reaper: Reaper,
    tell: crossbeam_channel::Sender<carefork::Exit>,
    workers: Vec<Watched>,
    /// Those that SIGHUP has yet to replace; the first of them may be draining.
    old: VecDeque<Watched>,
    failing: u32,
}

impl Master {
    fn start(&mut self) -> Result<(), Box<dyn Error>> {
        // The worker reads SIGTERM from a descriptor of its own; until it has one, the signal waits.
        let options = ForkOptions::new()
            .name("worker")
            .signals(Signals::Reset)
            .mask(&[libc::SIGTERM])
            .keep(&self.listener)
            .death_signal(libc::SIGTERM);
        let listener = &self.listener;
        // SAFETY: the worker uses the listener, which it keeps, and nothing else of the master's.
        let child = unsafe { options.spawn(|| worker::run(listener)) }?;
        let tell = self.tell.clone();
        self.workers.push(self.reaper.watch(child, move |exit| drop(tell.send(exit)))?);
        Ok(())
    }

    fn ended(&mut self, exit: &carefork::Exit, ending: bool) -> Result<(), Box<dyn Error>> {
        println!("{exit}");
        let draining = self.old.front().is_some_and(|w| w.id() == exit.pid);
        let old = self.old.len();
        self.old.retain(|w| w.id() != exit.pid);
        if draining {
            return self.next_old();
        }
        if self.old.len() < old || ending {
            // Replaced already, or never to be.
            return Ok(());
        }
        self.workers.retain(|w| w.id() != exit.pid);
        self.failing = if exit.ran < Duration::from_secs(1) && !exit.success() { self.failing + 1 } else { 0 };
        if self.failing == TOO_MANY {
            return Err(format!("{TOO_MANY} workers in a row ended at once, the last one: {exit}").into());
        }
        self.start()
    }

    /// One by one: the next begins when the last has ended.
    fn restart(&mut self) -> Result<(), Box<dyn Error>> {
        println!("restarting");
        let idle = self.old.is_empty();
        self.old.extend(self.workers.drain(..));
        if idle { self.next_old() } else { Ok(()) }
    }

    fn next_old(&mut self) -> Result<(), Box<dyn Error>> {
        if self.old.is_empty() {
            println!("restarted");
            return Ok(());
        }
        self.start()?;
        Ok(self.old[0].terminate(GRACE)?)
    }
}
