//! What master and worker say to each other: numbers of connections, and on the way down the connection itself.
//!
//! | who | message | means |
//! |---|---|---|
//! | master | number and descriptor | serve this one |
//! | master | end | no more will come: drain |
//! | worker | [`READY`] | I have begun |
//! | worker | number | closed: let go of yours |
//!
//! Messages may be lost with a worker, or be said again by its successor, so nothing depends on one: what was promised is on the
//! board, who has what is in the master's table, and a number is never given twice.

use carefork::{CareFd, recv_fds, send_fds};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// No connection's number.
pub(crate) const READY: u64 = 0;

/// One end. Never waits.
pub(crate) struct Channel(CareFd<OwnedFd>);

pub(crate) enum Message {
    Connection(u64, CareFd<OwnedFd>),
    Number(u64),
    End,
}

impl Channel {
    /// Both ends are care-fds: a worker has its own only, not those of the workers before it, or they would never see an end.
    pub(crate) fn pair() -> io::Result<(Channel, Channel)> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (a, b) = CareFd::open_pair(|| Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?))?;
        Ok((Channel(a), Channel(b)))
    }

    pub(crate) fn send(&self, number: u64) -> io::Result<()> {
        send_fds(&self.0, &number.to_ne_bytes(), &[]).map(drop)
    }

    pub(crate) fn send_connection(&self, number: u64, connection: BorrowedFd<'_>) -> io::Result<()> {
        send_fds(&self.0, &number.to_ne_bytes(), &[connection]).map(drop)
    }

    /// The next message, or `None` if there is none yet.
    pub(crate) fn receive(&self) -> io::Result<Option<Message>> {
        let mut number = [0; size_of::<u64>()];
        loop {
            return match recv_fds(&self.0, &mut number, 1) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
                // Told once, where the other end was closed with messages unread. What it said itself can still be read.
                Err(e) if e.kind() == ErrorKind::ConnectionReset => continue,
                Err(e) => Err(e),
                Ok(received) if received.len == 0 => Ok(Some(Message::End)),
                Ok(mut received) => Ok(Some(match received.fds.pop() {
                    Some(fd) => Message::Connection(u64::from_ne_bytes(number), fd),
                    None => Message::Number(u64::from_ne_bytes(number)),
                })),
            };
        }
    }

    /// The other end reads what is there, then the end; it may still send.
    pub(crate) fn hang_up(&self) -> io::Result<()> {
        Ok(shutdown(self.0.as_raw_fd(), Shutdown::Write)?)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
