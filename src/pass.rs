//! Descriptors between running processes: SCM_RIGHTS over Unix sockets (X4).

use crate::carefd::{CareFd, OnFork};
use crate::region::no_forking;
use crate::sys_msg;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How many descriptors the kernel takes in one message.
pub const MAX_FDS: usize = sys_msg::MAX_FDS;

/// Sends `payload` and `fds` in one message; how much of the payload went.
///
/// `socket` is a Unix socket of any type: [`UnixStream`](std::os::unix::net::UnixStream),
/// [`UnixDatagram`](std::os::unix::net::UnixDatagram) or a seqpacket. The receiver gets duplicates; `fds` stay as they are. All of
/// them travel with the first byte. A stream that takes less than the whole payload (it is non-blocking, or a signal came) says so:
/// write the rest, without descriptors.
///
/// A peer that is gone is EPIPE, never SIGPIPE. A call that a signal interrupted before anything went is made again.
///
/// What was sent lives in the socket until it is received or the socket is closed, and holds what it refers to open for as long. A child
/// that keeps `socket` could send on it as well.
///
/// # Errors
/// [`InvalidInput`](io::ErrorKind::InvalidInput) for more than [`MAX_FDS`] descriptors, and where the kernel would drop them
/// silently: with no payload on a stream and, in builds with debug assertions, over a socket that is not a Unix one. What
/// sendmsg(2) says: EAGAIN on a non-blocking socket, ETOOMANYREFS when too many descriptors are under way.
///
/// ```
/// use carefork::{recv_fds, send_fds};
/// use std::os::fd::AsFd;
/// use std::os::unix::net::UnixStream;
///
/// let (here, there) = UnixStream::pair()?;
/// let file = std::fs::File::open("/dev/null")?;
/// send_fds(&here, b"a file", &[file.as_fd()])?;
///
/// let mut text = [0; 16];
/// let message = recv_fds(&there, &mut text, 1)?;
/// assert_eq!(&text[..message.len], b"a file");
/// assert_eq!(message.fds.len(), 1);
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn send_fds(socket: impl AsFd, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let socket = socket.as_fd();
    if fds.len() > MAX_FDS {
        let text = format!("{} descriptors in one message, and the kernel takes {MAX_FDS}: send several", fds.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // A tenth of the call: what a program does wrong here it does in every build.
    if cfg!(debug_assertions) && !fds.is_empty() && sys_msg::socket_family(socket)? != libc::AF_UNIX {
        let text = "descriptors go over Unix sockets only: any other would lose them";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    if payload.is_empty() && !fds.is_empty() && sys_msg::socket_type(socket)? == libc::SOCK_STREAM {
        let text = "descriptors without payload on a stream would be lost: send a byte with them";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    sys_msg::send(socket, payload, fds)
}

/// What [`recv_fds`] received.
#[derive(Debug)]
#[non_exhaustive]
pub struct Received {
    /// Bytes of payload. 0 without descriptors is the end of a stream.
    pub len: usize,
    /// The descriptors, in the sender's order: close-on-exec, and care-fds.
    pub fds: Vec<CareFd<OwnedFd>>,
    /// There were more descriptors than were asked for, or this process is at its limit of open ones (RLIMIT_NOFILE), so that
    /// the kernel dropped some. The others are closed.
    pub truncated: bool,
    /// The datagram was longer than `buf`; the rest of it is gone.
    pub payload_truncated: bool,
}

/// Receives one message: payload into `buf`, and at most `max` descriptors.
///
/// Waits like a read does: for as long as the socket's read time-out says, not at all if it is non-blocking. The wait is outside of any
/// region; what is taken out of the socket is registered in the same region in which the kernel hands it over, so that no fork
/// sees a descriptor that came and is not a care-fd. Turn one into the socket it is meant to be with `try_into`.
///
/// A peer may send what nobody asked for. More than `max` descriptors are closed at once, and
/// [`truncated`](Received::truncated) says so. (Closing can block, on a lingering socket for one, and delays forks for as long.)
/// On a stream a message ends where descriptors begin, but several without descriptors run together, as bytes do.
///
/// Do not call it inside a region of your own: forks would wait as long as it does.
///
/// # Errors
/// What recvmsg(2) says; [`WouldBlock`](io::ErrorKind::WouldBlock) at the socket's time-out or if it is non-blocking; ENOMEM from the
/// registry: then the message is lost and its descriptors are closed. [`InvalidInput`](io::ErrorKind::InvalidInput) for an empty `buf` on a
/// stream, where nothing received would look like the end.
///
/// # Panics
/// If there is no memory for the first region of a new thread.
///
/// ```
/// # use carefork::{CareFd, recv_fds, send_fds};
/// # use std::os::fd::AsFd;
/// # use std::os::unix::net::{UnixDatagram, UnixListener};
/// # let (here, there) = UnixDatagram::pair()?;
/// # let path = std::env::temp_dir().join(format!("carefork-doc-{}", std::process::id()));
/// # let theirs = UnixListener::bind(&path)?;
/// # std::fs::remove_file(&path)?;
/// # send_fds(&here, b"", &[theirs.as_fd()])?;
/// let message = recv_fds(&there, &mut [0; 64], 1)?;
/// for fd in message.fds {
///     let listener: CareFd<UnixListener> = fd.try_into()?;
///     # drop(listener);
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
#[track_caller]
pub fn recv_fds(socket: impl AsFd, buf: &mut [u8], max: usize) -> io::Result<Received> {
    let socket = socket.as_fd();
    if buf.is_empty() && sys_msg::socket_type(socket)? == libc::SOCK_STREAM {
        let text = "an empty buffer gets nothing from a stream: make room for a byte, with which descriptors come";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // Not inside the region: a region should be short.
    let mut fds = Vec::with_capacity(max.min(MAX_FDS));
    loop {
        match try_recv(socket, buf, &mut fds) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if sys_msg::is_nonblocking(socket)? || !sys_msg::wait(socket, false, sys_msg::receive_limit(socket)?)? {
                    return Err(e);
                }
            }
            Err(e) => return Err(e),
            Ok(message) => {
                let truncated = message.control_cut || fds.len() > max;
                fds.truncate(max);
                return Ok(Received { len: message.len, fds, truncated, payload_truncated: message.payload_cut });
            }
        }
    }
}

/// What is there now, received and registered in one region.
#[track_caller]
fn try_recv(socket: BorrowedFd<'_>, buf: &mut [u8], fds: &mut Vec<CareFd<OwnedFd>>) -> io::Result<sys_msg::Message> {
    let region = no_forking();
    let mut refused = None;
    let message = sys_msg::recv(socket, buf, |fd| match region.care_cloexec(OnFork::Cleanup, fd) {
        Ok(fd) => fds.push(fd),
        // Closed here: what nobody registered must not outlive the region.
        Err(e) => refused = Some(io::Error::from(e)),
    })?;
    drop(region);
    match refused {
        None => Ok(message),
        Some(e) => Err(e),
    }
}
