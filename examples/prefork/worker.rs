//! One worker: a loop that serves any number of connections until it is told to drain.

use mio::net::{TcpListener, TcpStream};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

const LISTENER: Token = Token(0);
const TERM: Token = Token(1);
const FIRST: usize = 2;

/// The worker's exit code.
pub(crate) fn run(listener: &std::net::TcpListener) -> i32 {
    match serve(listener) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("worker {}: {e}", std::process::id());
            1
        }
    }
}

fn serve(listener: &std::net::TcpListener) -> io::Result<()> {
    let listener = TcpListener::from_std(listener.try_clone()?);
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    let term = SignalFd::with_flags(&term, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut poll = Poll::new()?;
    let socket = listener.as_raw_fd();
    poll.registry().register(&mut SourceFd(&socket), LISTENER, Interest::READABLE)?;
    poll.registry().register(&mut SourceFd(&term.as_raw_fd()), TERM, Interest::READABLE)?;
    let mut connections = HashMap::new();
    let (mut next, mut draining) = (FIRST, false);
    let mut events = Events::with_capacity(256);
    while !(draining && connections.is_empty()) {
        // Once it drains, those who have nothing to ask are let go after a moment.
        let limit = draining.then_some(Duration::from_millis(500));
        match poll.poll(&mut events, limit) {
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            other => other?,
        }
        if draining && events.is_empty() {
            break;
        }
        for event in &events {
            match event.token() {
                LISTENER if !draining => accept(&poll, &listener, &mut connections, &mut next)?,
                LISTENER => {}
                TERM => {
                    draining = term.read_signal()?.is_some() || draining;
                    poll.registry().deregister(&mut SourceFd(&socket))?;
                }
                token => {
                    if let Some(connection) = connections.get_mut(&token)
                        && !connection.turn(draining)
                    {
                        connections.remove(&token);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Takes what is there: other workers take from the same queue.
fn accept(
    poll: &Poll,
    listener: &TcpListener,
    connections: &mut HashMap<Token, Connection>,
    next: &mut usize,
) -> io::Result<()> {
    loop {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            // Gone before it was accepted; out of descriptors: the others may do better.
            Err(_) => return Ok(()),
        };
        let token = Token(*next);
        *next += 1;
        poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        connections.insert(token, Connection { stream, asked: Vec::new(), answer: Vec::new(), closing: false });
    }
}

struct Connection {
    stream: TcpStream,
    asked: Vec<u8>,
    answer: Vec<u8>,
    closing: bool,
}

impl Connection {
    /// Reads and answers as far as it goes without waiting; false when it is over.
    fn turn(&mut self, draining: bool) -> bool {
        let mut buffer = [0; 4096];
        let open = loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => break false,
                Ok(n) => self.asked.extend(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break true,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        };
        while !self.closing
            && let Some(end) = self.asked.windows(4).position(|w| w == b"\r\n\r\n")
        {
            self.asked.drain(..end + 4);
            let connection = if draining { "close" } else { "keep-alive" };
            let body = format!("worker {}\n", std::process::id());
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n", body.len());
            self.answer.extend([head, body].concat().bytes());
            self.closing = draining;
        }
        while !self.answer.is_empty() {
            match self.stream.write(&self.answer) {
                Ok(n) => drop(self.answer.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        open && !self.closing
    }
}
