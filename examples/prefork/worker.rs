//! One worker: a loop that serves the connections it is given. It may end at any instant, so ending takes no preparation.

use crate::board::Board;
use crate::channel::{Channel, Message, READY};
use crate::connection::Connection;
use crate::faults::{Faults, Step};
use crate::http::REQUEST;
use crate::table::index;
use carefork::CareFd;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

/// No connection's numbers.
const CHANNEL: Token = Token(0);
const TERM: Token = Token(1);
/// While it drains, those who ask nothing are let go after a moment.
const QUIET: Duration = Duration::from_millis(500);

/// The exit code of one that was told to leave, and has left its connections to the others.
const LEFT: i32 = 2;

/// The worker's exit code: 0 if nobody is connected to it any more.
pub(crate) fn run(channel: &Channel, board: &'static Board, faults: Faults) -> i32 {
    match Worker::new(channel, board, faults).and_then(Worker::serve) {
        Ok(true) => 0,
        Ok(false) => LEFT,
        Err(e) => {
            eprintln!("worker {}: {e}", std::process::id());
            1
        }
    }
}

struct Worker<'a> {
    channel: &'a Channel,
    board: &'static Board,
    faults: Faults,
    poll: Poll,
    connections: HashMap<u64, Connection>,
    /// For the master, as soon as there is room in the channel.
    unsaid: VecDeque<u64>,
    /// The master has hung up: nobody comes after those who are here.
    draining: bool,
    buffer: Vec<u8>,
}

impl<'a> Worker<'a> {
    fn new(channel: &'a Channel, board: &'static Board, faults: Faults) -> io::Result<Worker<'a>> {
        let poll = Poll::new()?;
        let both = Interest::READABLE | Interest::WRITABLE;
        poll.registry().register(&mut SourceFd(&channel.as_fd().as_raw_fd()), CHANNEL, both)?;
        let (connections, unsaid) = (HashMap::new(), VecDeque::from([READY]));
        let buffer = vec![0; REQUEST];
        Ok(Worker { channel, board, faults, poll, connections, unsaid, draining: false, buffer })
    }

    /// False if it leaves while some are connected.
    fn serve(mut self) -> io::Result<bool> {
        let mut term = SigSet::empty();
        term.add(Signal::SIGTERM);
        let term = SignalFd::with_flags(&term, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        self.poll.registry().register(&mut SourceFd(&term.as_raw_fd()), TERM, Interest::READABLE)?;
        let mut events = Events::with_capacity(256);
        self.faults.pass(Step::Begun);
        self.speak();
        while !(self.draining && self.connections.is_empty()) {
            match self.poll.poll(&mut events, self.draining.then_some(QUIET)) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            }
            if self.draining && events.is_empty() && self.connections.values().all(Connection::is_idle) {
                break;
            }
            for event in &events {
                match event.token() {
                    CHANNEL => self.listen()?,
                    TERM => {
                        // Connections that are here are the master's too: another worker goes on with them. Only if the master wants no
                        // more of them, they are served to their end.
                        self.listen()?;
                        if term.read_signal()?.is_some() && !self.draining {
                            return Ok(self.connections.is_empty());
                        }
                    }
                    Token(number) => self.turn(number as u64, event.is_read_closed()),
                }
            }
            self.speak();
        }
        Ok(true)
    }

    /// All that the master has said.
    fn listen(&mut self) -> io::Result<()> {
        while !self.draining {
            match self.channel.receive()? {
                None => break,
                Some(Message::End) => self.draining = true,
                Some(Message::Connection(number, fd)) => self.begin(number, fd),
                // The kernel dropped the descriptor: no room for one more here. Another worker will do.
                Some(Message::Number(_)) => return Err(io::Error::other("a connection did not come")),
            }
        }
        Ok(())
    }

    /// What the master has no room for waits: an event tells when there is some. If the master is gone, so is who needs to know.
    fn speak(&mut self) {
        while let Some(number) = self.unsaid.front() {
            match self.channel.send(*number) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                _ => drop(self.unsaid.pop_front()),
            }
        }
    }

    fn begin(&mut self, number: u64, fd: CareFd<OwnedFd>) {
        let slot = self.board.slot(index(number));
        slot.set_busy(true);
        self.faults.pass(Step::Received);
        let both = Interest::READABLE | Interest::WRITABLE;
        let begun = Connection::new(number, fd, self.board).and_then(|connection| {
            // What is there already is an event, too.
            let token = Token(number as usize);
            self.poll.registry().register(&mut SourceFd(&connection.as_raw_fd()), token, both)?;
            Ok(connection)
        });
        match begun {
            Ok(connection) => drop(self.connections.insert(number, connection)),
            // Its peer left before it came here.
            Err(_) => self.unsaid.push_back(number),
        }
        slot.set_busy(false);
    }

    fn turn(&mut self, number: u64, hung_up: bool) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        // If this worker dies before it says otherwise, it may have been because of this connection.
        let slot = self.board.slot(index(number));
        slot.set_busy(true);
        connection.hung_up |= hung_up;
        if !connection.turn(self.draining, &mut self.buffer, &self.faults) {
            // An epoll watches what is open in any process, and the master has it open.
            drop(self.poll.registry().deregister(&mut SourceFd(&connection.as_raw_fd())));
            drop(self.connections.remove(&number));
            self.faults.pass(Step::Closed);
            self.unsaid.push_back(number);
        }
        slot.set_busy(false);
    }
}
