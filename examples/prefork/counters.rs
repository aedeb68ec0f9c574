//! How much of a connection was written and taken, whoever did it: what the kernel knows when a worker is dead.
//!
//! | | is | exact because |
//! |---|---|---|
//! | written | bytes acknowledged (TCP_INFO) + bytes not yet acknowledged (SIOCOUTQ) | both begin at the oldest byte without acknowledgement, so an acknowledgement moves bytes from one to the other |
//! | taken | bytes received (TCP_INFO) - bytes not yet read (SIOCINQ) | a peer's FIN counts as a byte received, and the state says whether one came; urgent data must be in line (SO_OOBINLINE) |
//!
//! Each is two questions, and the network goes on in between: asked until nothing has moved. Only differences mean anything: a SYN
//! may or may not be counted, and our own FIN is, once, as written.

#![allow(unsafe_code)]

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// Bytes since the connection began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) written: u64,
    pub(crate) taken: u64,
}

impl Counters {
    /// For the one process that reads and writes this connection; its peer may do what it likes meanwhile.
    pub(crate) fn of(stream: &TcpStream) -> io::Result<Counters> {
        let mut before = info(stream)?;
        loop {
            let (unacknowledged, unread) = (queued(stream, libc::TIOCOUTQ)?, queued(stream, libc::FIONREAD)?);
            let after = info(stream)?;
            let moved = |i: &libc::tcp_info| (i.tcpi_bytes_acked, i.tcpi_bytes_received, i.tcpi_state);
            if moved(&before) == moved(&after) {
                let received = after.tcpi_bytes_received - u64::from(has_fin(after.tcpi_state));
                return Ok(Counters {
                    written: after.tcpi_bytes_acked + unacknowledged,
                    taken: received.saturating_sub(unread),
                });
            }
            before = after;
        }
    }
}

/// Whether a connection in this state has received the peer's FIN. Not of a closed one: nobody can be answered there.
fn has_fin(state: u8) -> bool {
    // From the kernel's tcp_states.h: TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING.
    matches!(state, 6 | 8 | 9 | 11)
}

fn info(stream: &TcpStream) -> io::Result<libc::tcp_info> {
    // SAFETY: numbers only, so zeroes are valid; a kernel that knows less fills in less.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&info) as libc::socklen_t;
    let place = std::ptr::from_mut(&mut info).cast();
    // SAFETY: `place` has room for `len` bytes.
    match unsafe { libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &mut len) } {
        0 => Ok(info),
        _ => Err(io::Error::last_os_error()),
    }
}

fn queued(stream: &TcpStream, which: libc::Ioctl) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both questions are answered by one int.
    match unsafe { libc::ioctl(stream.as_raw_fd(), which, &mut bytes) } {
        0 => Ok(u64::from(bytes.unsigned_abs())),
        _ => Err(io::Error::last_os_error()),
    }
}
