//! What the threads of the parent do all day.

use crate::fault::Fault;
use crate::fds::{self, Held};
use crate::lines::Line;
use crate::locks::Broken;
use crate::world::{Rng, World};
use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;

/// How many descriptors each thread keeps open at a time.
const OPEN: usize = 8;

struct Busy {
    world: &'static World,
    who: usize,
    printed: usize,
    logged: usize,
    open: Vec<Box<dyn Any>>,
}

/// Until the half is over.
pub(crate) fn run(world: &'static World, who: usize) {
    let mut rng = Rng::new(world.args.seed ^ (who as u64 + 1) << 32);
    let mut busy = Busy { world, who, printed: 0, logged: 0, open: Vec::new() };
    if let (Some(fault), 0) = (world.args.fault, who) {
        busy.printed += fault.in_a_thread(&busy.line(0).to_string());
    }
    while !world.stop.load(Relaxed) {
        if let Err(Broken(what)) = busy.step(&mut rng) {
            world.complain(&format!("in the parent: {what} was half changed"));
        }
    }
    busy.printed += usize::from(world.args.fault == Some(Fault::Lose) && who == 0);
    busy.open.clear();
    world.said[who].0.store(busy.printed, Relaxed);
    world.said[who].1.store(busy.logged, Relaxed);
}

impl Busy {
    fn step(&mut self, rng: &mut Rng) -> Result<(), Broken> {
        let world = self.world;
        let locks = &world.locks;
        match rng.below(24) {
            0 => self.print(rng.below(3) > 0),
            1 => self.print_in_pieces(),
            2 => self.log(),
            3 => return locks.own.mutex(&mut || {}),
            4 => return locks.own.snapshot(&mut || {}),
            5 => return locks.own.read(),
            6 => return locks.own.write(&mut || {}),
            7 => locks.own.notify(),
            8 if rng.below(8) == 0 => locks.own.wait_a_little(),
            8 | 9 => return locks.own.once(),
            10 => locks.own.renew(),
            11 => return locks.std_mutex(&mut || {}),
            12 => return locks.std_rwlock(rng.below(2) == 0),
            13 => return locks.parking_lot(rng.below(2) == 0),
            14 => locks.channel(),
            // One thing inside another, in the one order in which this program takes them.
            15 => return locks.own.mutex(&mut || self.log()),
            16 => return locks.std_mutex(&mut || drop(world.fds.region())),
            17 => {
                let _region = world.fds.region();
                self.print(true);
                return locks.std_mutex(&mut || {});
            }
            18 => {
                let mut inner = Ok(());
                locks.own.write(&mut || inner = locks.std_mutex(&mut || self.log()))?;
                return inner;
            }
            19 => drop(allocate(rng.below(200))),
            _ => self.open(rng),
        }
        Ok(())
    }

    fn line(&self, n: usize) -> Line {
        Line { kind: 'P', who: self.who, n, k: 0, pid: self.world.pid }
    }

    fn print(&mut self, newline: bool) {
        let line = self.line(self.printed);
        if newline {
            println!("{line}")
        } else {
            print!("{line}")
        }
        self.printed += 1;
    }

    fn print_in_pieces(&mut self) {
        let text = self.line(self.printed).to_string();
        let (head, tail) = text.split_at(text.len() / 2);
        let mut out = std::io::stdout().lock();
        let written = out.write_all(head.as_bytes()).and_then(|()| writeln!(out, "{tail}"));
        drop(out);
        if let Err(e) = written {
            self.world.complain(&format!("in the parent: standard output: {e}"));
        }
        self.printed += 1;
    }

    fn log(&mut self) {
        log::info!("{}", self.line(self.logged));
        self.logged += 1;
    }

    /// Opens something; drops something else, so that numbers change hands all the time.
    fn open(&mut self, rng: &mut Rng) {
        let table = &self.world.fds;
        fn boxed<T: Any>(t: T) -> Box<dyn Any> {
            Box::new(t)
        }
        fn both<T: Any, U: Any>((t, u): (T, U)) -> Box<dyn Any> {
            Box::new((t, u))
        }
        let opened = match rng.below(8) {
            0 => table.open(|| File::open("/dev/null")).map(boxed),
            1 => table.open(|| TcpListener::bind(("127.0.0.1", 0))).map(boxed),
            2 => table.open_pair(UnixStream::pair).map(both),
            3 => table.open_pair(std::io::pipe).map(both),
            4 => table.open(|| fds::memfd(false)).map(boxed),
            5 => table.open_closed_at_fork(|| fds::memfd(false)).map(boxed),
            6 => table.open_ordinary(|| fds::memfd(true)).map(boxed),
            _ => table.open(|| File::open("/proc/self/stat")).map(boxed),
        };
        match opened {
            Ok(fd) => self.open.push(fd),
            Err(e) => self.world.complain(&format!("in the parent: cannot open: {e}")),
        }
        if self.open.len() > OPEN {
            drop(self.open.swap_remove(rng.below(self.open.len())));
        }
    }
}

/// Some work for the allocator, in pieces of many sizes; what was made, for a check.
pub(crate) fn allocate(pieces: usize) -> Vec<String> {
    let mut all = std::collections::HashMap::new();
    for i in 0..pieces {
        all.insert(i, "x".repeat(i * 7 % 300));
    }
    let mut all: Vec<String> = all.into_values().collect();
    all.sort();
    all
}

/// A few descriptors of a forking thread itself, which its children must find closed.
pub(crate) fn a_few(world: &'static World) -> Vec<Held<File>> {
    (0..3).filter_map(|_| world.fds.open(|| File::open("/dev/null")).ok()).collect()
}
