//! The master's part: takes connections in, hands them out, and hands out again what a dead worker had.
//!
//! It answers nobody and parses nothing, so that no client can kill it.

use crate::board::{Board, MAX_DEATHS};
use crate::channel::{Channel, Message, READY};
use crate::faults::Faults;
use crate::table::{Table, index};
use crate::worker;
use carefork::{CareFd, Exit, ForkOptions, Reaper, Signals, Watched};
use std::collections::VecDeque;
use std::error::Error;
use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long a worker may take to end.
const GRACE: Duration = Duration::from_secs(30);
/// So many workers in a row that end before they begin: the program is broken, not unlucky.
const TOO_MANY: u32 = 5;
/// Connections taken in before others have their turn.
const AT_ONCE: usize = 64;
/// How long nobody is let in when there was no descriptor or memory for one more.
const PAUSE: Duration = Duration::from_millis(100);

pub(crate) struct Master {
    /// A care-fd that workers do not keep: an open listener in a worker would hold the port when the master is gone.
    listener: Option<CareFd<TcpListener>>,
    pub(crate) reaper: Reaper,
    /// From the reaper's callbacks to the loop.
    tell: crossbeam_channel::Sender<Exit>,
    board: &'static Board,
    faults: Faults,
    pub(crate) table: Table,
    pub(crate) workers: Vec<Worker>,
    /// Those that SIGHUP has yet to replace; the first of them is told to leave.
    old: VecDeque<u32>,
    failing: u32,
    /// Out of descriptors or memory: until a connection is closed, or until then, since others may have had them.
    full: Option<Instant>,
    /// Since when.
    ending: Option<Instant>,
}

pub(crate) struct Worker {
    watched: Watched,
    pub(crate) channel: Channel,
    /// It has said that it has begun.
    ready: bool,
    /// It is to get no more connections.
    leaving: bool,
    serves: usize,
}

impl Master {
    pub(crate) fn new(
        listener: CareFd<TcpListener>,
        tell: crossbeam_channel::Sender<Exit>,
    ) -> Result<Master, Box<dyn Error>> {
        let board = Board::new()?;
        let faults = Faults::new(board)?;
        Ok(Master {
            listener: Some(listener),
            reaper: Reaper::new()?,
            tell,
            board,
            faults,
            table: Table::new(board),
            workers: Vec::new(),
            old: VecDeque::new(),
            failing: 0,
            full: None,
            ending: None,
        })
    }

    pub(crate) fn start(&mut self) -> Result<(), Box<dyn Error>> {
        let (ours, theirs) = Channel::pair()?;
        // Of all that the master has open, the worker keeps its end of the channel; carefork closes the other care-fds: listener, signals,
        // clients, other workers' channels. Its signals begin at their defaults. SIGTERM it reads from a descriptor of its own, and until it
        // has one, the signal waits; ctrl-c and SIGHUP may come to the whole group, and are the master's.
        let options = ForkOptions::new()
            .name("worker")
            .signals(Signals::Reset)
            .mask(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
            .keep(&theirs)
            .death_signal(libc::SIGTERM);
        let (board, faults) = (self.board, self.faults);
        // SAFETY: the worker uses its end of the channel, which it keeps, and the shared memory; nothing else of the master's.
        #[allow(unsafe_code)]
        let child = unsafe { options.spawn(|| worker::run(&theirs, board, faults)) }?;
        let tell = self.tell.clone();
        // The reaper's word, not the end of the channel, says that a worker is dead: then it has done its last system call, and
        // what the kernel has counted is what it did.
        let watched = self.reaper.watch(child, move |exit| drop(tell.send(exit)))?;
        self.workers.push(Worker { watched, channel: ours, ready: false, leaving: false, serves: 0 });
        Ok(())
    }

    /// The listener, if connections can be taken in.
    pub(crate) fn door(&self) -> Option<BorrowedFd<'_>> {
        let open = self.table.has_room() && self.table.waiting.is_empty() && self.pause().is_none();
        self.listener.as_ref().filter(|_| open).map(|listener| listener.as_fd())
    }

    /// How long it will be until there may be descriptors and memory again.
    pub(crate) fn pause(&self) -> Option<Duration> {
        self.full?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// Takes in who is at the door; true if there may be more.
    pub(crate) fn accept(&mut self) -> Result<bool, Box<dyn Error>> {
        let Some(listener) = &self.listener else { return Ok(false) };
        for _ in 0..AT_ONCE {
            if !self.table.has_room() {
                return Ok(false);
            }
            // Never waits, so that it may be done where no fork can come in between: a new worker has the connection registered, and
            // closes it, or does not have it.
            match CareFd::open_cloexec(|| Ok(listener.accept()?.0)) {
                Ok(stream) => {
                    stream.set_nonblocking(true)?;
                    self.table.add(stream);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
                Err(e)
                    if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)) =>
                {
                    self.full = Some(Instant::now() + PAUSE);
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// Gives those who wait to the workers with the least to do. Who has no room in its channel, or is dead and not yet known to be, is
    /// passed over.
    pub(crate) fn place(&mut self) {
        while let Some(&number) = self.table.waiting.front() {
            let Some(stream) = self.table.stream(number) else {
                self.table.waiting.pop_front();
                continue;
            };
            let mut workers: Vec<_> = self.workers.iter_mut().filter(|w| !w.leaving).collect();
            workers.sort_by_key(|w| w.serves);
            let Some(worker) = workers.into_iter().find(|w| w.channel.send_connection(number, stream).is_ok()) else {
                return;
            };
            worker.serves += 1;
            self.table.give_to(number, worker.pid());
            self.table.waiting.pop_front();
        }
    }

    /// What a worker has to say.
    pub(crate) fn hear(&mut self, pid: u32) -> io::Result<()> {
        let Some(worker) = self.workers.iter_mut().find(|w| w.pid() == pid) else { return Ok(()) };
        while let Some(message) = worker.channel.receive()? {
            match message {
                Message::Number(READY) => {
                    worker.ready = true;
                    self.failing = 0;
                }
                Message::Number(number) => {
                    if self.table.close(number) {
                        worker.serves -= 1;
                        self.full = None;
                    }
                }
                Message::Connection(..) => {}
                Message::End => break,
            }
        }
        Ok(())
    }

    pub(crate) fn ended(&mut self, exit: &Exit) -> Result<(), Box<dyn Error>> {
        println!("{exit}");
        self.hear(exit.pid)?;
        let Some(at) = self.workers.iter().position(|w| w.pid() == exit.pid) else { return Ok(()) };
        let Worker { ready, .. } = self.workers.swap_remove(at);
        self.full = None;
        for number in self.table.of(exit.pid) {
            let slot = self.board.slot(index(number));
            slot.blame();
            // Done with at the end; or even to be refused kills whoever does it.
            if self.is_over(exit) || slot.deaths() > MAX_DEATHS {
                self.table.close(number);
            } else {
                self.table.take_back(number);
            }
        }
        if self.ending.is_some() {
            return self.replace_at_end();
        }
        let replaced = self.old.front() == Some(&exit.pid);
        self.old.retain(|pid| *pid != exit.pid);
        if replaced {
            return self.next_old();
        }
        self.failing += u32::from(!ready);
        if self.failing == TOO_MANY {
            return Err(format!("{TOO_MANY} workers in a row ended before they began, the last one: {exit}").into());
        }
        self.start()
    }

    /// One by one: the next begins when the last has ended.
    pub(crate) fn restart(&mut self) -> Result<(), Box<dyn Error>> {
        println!("restarting");
        let idle = self.old.is_empty();
        let pids: Vec<u32> = self.workers.iter().map(|w| w.pid()).collect();
        let new: Vec<u32> = pids.into_iter().filter(|pid| !self.old.contains(pid)).collect();
        self.old.extend(new);
        if idle { self.next_old() } else { Ok(()) }
    }

    /// The next of the old ones leaves, and a new one has its connections.
    fn next_old(&mut self) -> Result<(), Box<dyn Error>> {
        let Some(&pid) = self.old.front() else {
            println!("restarted");
            return Ok(());
        };
        self.start()?;
        if let Some(worker) = self.workers.iter_mut().find(|w| w.pid() == pid) {
            worker.leaving = true;
            worker.watched.terminate(GRACE)?;
        }
        Ok(())
    }

    /// Whoever has come is served; nobody else is let in.
    pub(crate) fn end(&mut self) -> Result<(), Box<dyn Error>> {
        println!("ending");
        self.ending = Some(Instant::now());
        while self.listener.is_some() && self.accept()? {}
        self.listener = None;
        self.place();
        self.workers.iter_mut().try_for_each(Worker::drain)?;
        Ok(())
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// What a worker that has ended had is not for others any more: it drained, or there is no more time.
    fn is_over(&self, exit: &Exit) -> bool {
        self.ending.is_some_and(|since| exit.success() || since.elapsed() >= GRACE)
    }

    /// No worker begins any more, unless another one has left connections behind: the rest are draining and take none.
    fn replace_at_end(&mut self) -> Result<(), Box<dyn Error>> {
        if self.table.waiting.is_empty() {
            return Ok(());
        }
        self.start()?;
        self.place();
        if let Some(worker) = self.workers.last_mut() {
            worker.drain()?;
        }
        Ok(())
    }
}

impl Worker {
    pub(crate) fn pid(&self) -> u32 {
        self.watched.id()
    }

    /// It serves those it has to their end. It hears that no more will come before the signal makes it look.
    fn drain(&mut self) -> io::Result<()> {
        self.leaving = true;
        self.channel.hang_up()?;
        self.watched.terminate(GRACE)
    }
}
