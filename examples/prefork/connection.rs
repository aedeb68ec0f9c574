//! One connection in a worker: each step may be this worker's last, and the next worker goes on from there.
//!
//! | dies after | promise | written, taken since | its successor |
//! |---|---|---|---|
//! | peeking at the request | none | 0, 0 | finds it there |
//! | promising the answer | stands | 0, 0 | sends it, takes the request |
//! | sending a part of it | stands | some, 0 | sends the rest |
//! | sending it | stands | all, 0 | takes the request |
//! | taking the request | stands | all, all | the promise is kept |
//! | that | none | 0, 0 | waits for the next request |
//!
//! So no answer is sent twice and none is missing. The *work* for an answer may be done twice, if the worker dies before it promised:
//! what must not be done twice belongs into a transaction of its own.

use crate::board::{Board, MAX_DEATHS, Promise, Slot};
use crate::counters::Counters;
use crate::faults::{self, Faults, Step};
use crate::http::{self, Parsed};
use crate::table::index;
use carefork::CareFd;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

pub(crate) struct Connection {
    stream: CareFd<TcpStream>,
    slot: &'static Slot,
    /// The kernel's counters where the promise that stands began, or the next one will. Asked for once and counted since.
    counters: Counters,
    owed: Option<Owed>,
    /// A request has begun to come.
    asking: bool,
    /// The peer sends no more than has come.
    pub(crate) hung_up: bool,
    /// The last answer was sent; when the peer has closed too, it is over.
    shut: bool,
}

/// What is left of a promise.
struct Owed {
    answer: Vec<u8>,
    sent: usize,
    request: usize,
    taken: usize,
    last: bool,
}

impl Connection {
    /// A new connection, or one whose worker is gone.
    pub(crate) fn new(number: u64, fd: CareFd<OwnedFd>, board: &'static Board) -> io::Result<Connection> {
        let stream: CareFd<TcpStream> = fd.try_into()?;
        let slot = board.slot(index(number));
        let now = Counters::of(&stream)?;
        let (mut counters, mut owed) = (now, None);
        if let Some(promise) = slot.promised() {
            counters = Counters { written: promise.written, taken: promise.taken };
            // A last answer may be followed by our FIN, which counts, and by what the peer said in vain.
            let done = |now: u64, then: u64, all: usize| usize::try_from(now - then).map_or(all, |n| n.min(all));
            owed = Some(Owed {
                sent: done(now.written, promise.written, promise.answer.len()),
                taken: done(now.taken, promise.taken, promise.request),
                answer: promise.answer,
                request: promise.request,
                last: promise.last,
            });
        }
        let mut connection = Connection { stream, slot, counters, owed, asking: false, hung_up: false, shut: false };
        if slot.deaths() >= MAX_DEATHS {
            connection.give_up();
        }
        Ok(connection)
    }

    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Nobody waits for an answer.
    pub(crate) fn is_idle(&self) -> bool {
        self.shut || !self.asking && self.owed.is_none()
    }

    /// Goes as far as it can without waiting; false when the connection is over.
    pub(crate) fn turn(&mut self, draining: bool, buffer: &mut [u8], faults: &Faults) -> bool {
        match self.steps(draining, buffer, faults) {
            Ok(()) => false,
            // Non-blocking calls are not interrupted. Any other error is the peer's leaving.
            Err(e) => e.kind() == ErrorKind::WouldBlock,
        }
    }

    /// Ends when the peer has.
    fn steps(&mut self, draining: bool, buffer: &mut [u8], faults: &Faults) -> io::Result<()> {
        while !self.shut {
            if self.owed.is_none() && !self.promise(draining, buffer, faults)? {
                return Ok(());
            }
            self.send(faults)?;
            self.take(buffer)?;
            faults.pass(Step::Taken);
            if self.owed.as_ref().is_some_and(|owed| owed.last) {
                // Not closed, because that would make the kernel drop the answer if anything unread is there. The promise stands, and
                // so a successor comes here too.
                self.stream.shutdown(Shutdown::Write)?;
                self.shut = true;
                faults.pass(Step::Shut);
            } else {
                self.keep();
                faults.pass(Step::Kept);
            }
        }
        while (&*self.stream).read(buffer)? > 0 {}
        Ok(())
    }

    /// Looks at the next request without taking it, and promises its answer; false if the peer is done.
    fn promise(&mut self, draining: bool, buffer: &mut [u8], faults: &Faults) -> io::Result<bool> {
        let there = self.stream.peek(buffer)?;
        if there == 0 {
            return Ok(false);
        }
        self.asking = true;
        faults.pass(Step::Peeked);
        let (request, answer, last) = match http::parse(&buffer[..there]) {
            Parsed::Partial if self.hung_up => return Ok(false),
            // The rest brings another event. (A peek never goes past the mark of urgent data, so with that inside a request it has no
            // whole. HTTP knows no such thing.)
            Parsed::Partial => return Err(ErrorKind::WouldBlock.into()),
            Parsed::Bad(status) => (there, http::response(status, "", false), true),
            Parsed::Request { length, path, keep_alive } => {
                let keep_alive = keep_alive && !draining;
                (length, http::response("200 OK", &http::answer(&path), keep_alive), !keep_alive)
            }
        };
        self.owe(request, answer, last);
        faults.pass(Step::Promised);
        Ok(true)
    }

    fn owe(&mut self, request: usize, answer: Vec<u8>, last: bool) {
        let Counters { written, taken } = self.counters;
        let promise = Promise { written, taken, request, answer, last };
        self.slot.promise(&promise);
        self.owed = Some(Owed { answer: promise.answer, sent: 0, request, taken: 0, last });
    }

    fn send(&mut self, faults: &Faults) -> io::Result<()> {
        let Some(owed) = &mut self.owed else { return Ok(()) };
        while owed.sent < owed.answer.len() {
            let rest = &owed.answer[owed.sent..];
            if faults.due(Step::Half) {
                drop((&*self.stream).write(&rest[..rest.len() / 2]));
                faults::die();
            }
            owed.sent += (&*self.stream).write(rest)?;
        }
        faults.pass(Step::Sent);
        Ok(())
    }

    fn take(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let Some(owed) = &mut self.owed else { return Ok(()) };
        while owed.taken < owed.request {
            match (&*self.stream).read(&mut buffer[..owed.request - owed.taken])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => owed.taken += n,
            }
        }
        Ok(())
    }

    fn keep(&mut self) {
        if let Some(owed) = self.owed.take() {
            self.counters.written += owed.answer.len() as u64;
            self.counters.taken += owed.request as u64;
            self.slot.kept();
            self.asking = false;
        }
    }

    /// Worker after worker died of it: an error, unless an answer was begun, and the end. The request is not looked at.
    fn give_up(&mut self) {
        match &mut self.owed {
            Some(owed) if owed.sent > 0 => (owed.sent, owed.last) = (owed.answer.len(), true),
            _ => self.owe(0, http::response("500 Internal Server Error", "", false), true),
        }
    }
}
