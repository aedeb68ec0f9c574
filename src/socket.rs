//! From a descriptor that somebody passed to the socket type that it is meant to be (X3).

use crate::carefd::CareFd;
use crate::sys_msg;
use std::fmt;
use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

/// Why a descriptor is not the socket that was asked for.
#[derive(Debug)]
#[non_exhaustive]
pub enum Mismatch {
    /// No socket at all.
    NotASocket {
        /// What it is instead: "regular file", "pipe".
        is: &'static str,
    },
    /// Another address family.
    Family {
        /// `AF_...`.
        is: i32,
        /// The right ones.
        wanted: &'static str,
    },
    /// Another type of socket.
    Type {
        /// `SOCK_...`.
        is: i32,
        /// The right one.
        wanted: &'static str,
    },
    /// Family and type are right, and it speaks another protocol (SCTP, ICMP).
    Protocol {
        /// `IPPROTO_...`.
        is: i32,
        /// The right ones.
        wanted: &'static str,
    },
    /// A listener was asked for and nobody called listen(2) on it: it would never serve.
    NotListening,
    /// A stream was asked for, and this is a listener.
    Listening,
    /// A stream was asked for, and this one has no peer.
    NotConnected,
    /// The kernel did not say.
    Os(io::Error),
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::NotASocket { is } => write!(f, "it is a {is}: pass a socket, or check the number"),
            Mismatch::Family { is, wanted } => {
                write!(f, "its address family is {}, not {wanted}: pass the other kind", family(*is))
            }
            Mismatch::Type { is, wanted } => write!(f, "its type is {}, not {wanted}: pass the other kind", kind(*is)),
            Mismatch::Protocol { is, wanted } => write!(f, "its protocol is number {is}, not {wanted}"),
            Mismatch::NotListening => f.write_str("it does not listen: call listen(2) before passing it"),
            Mismatch::Listening => f.write_str("it listens: pass one of its connections, or take it as a listener"),
            Mismatch::NotConnected => f.write_str("it has no peer: connect it before passing it"),
            Mismatch::Os(e) => write!(f, "{e}"),
        }
    }
}

fn family(number: i32) -> String {
    match number {
        libc::AF_UNIX => "AF_UNIX".into(),
        libc::AF_INET => "AF_INET".into(),
        libc::AF_INET6 => "AF_INET6".into(),
        libc::AF_NETLINK => "AF_NETLINK".into(),
        libc::AF_VSOCK => "AF_VSOCK".into(),
        n => format!("number {n}"),
    }
}

fn kind(number: i32) -> String {
    match number {
        libc::SOCK_STREAM => "SOCK_STREAM".into(),
        libc::SOCK_DGRAM => "SOCK_DGRAM".into(),
        libc::SOCK_SEQPACKET => "SOCK_SEQPACKET".into(),
        libc::SOCK_RAW => "SOCK_RAW".into(),
        n => format!("number {n}"),
    }
}

/// A descriptor could not become the socket type asked for; it comes back untouched.
#[derive(Debug)]
pub struct ConvertError {
    /// What is wrong with it.
    pub why: Mismatch,
    /// The descriptor, for another try.
    pub fd: CareFd<OwnedFd>,
    wanted: &'static str,
}

impl fmt::Display for ConvertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fd.get() {
            Some(fd) => write!(f, "descriptor {}", fd.as_raw_fd())?,
            None => f.write_str("a descriptor")?,
        }
        write!(f, " is not a {}: {}", self.wanted, self.why)
    }
}

impl std::error::Error for ConvertError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.why {
            Mismatch::Os(e) => Some(e),
            _ => None,
        }
    }
}

/// For `?`. The descriptor is closed.
impl From<ConvertError> for io::Error {
    fn from(e: ConvertError) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidInput, e.to_string())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Listener,
    Connection,
    Datagrams,
}

struct Want {
    what: &'static str,
    families: (&'static [i32], &'static str),
    kind: (i32, &'static str),
    protocols: (&'static [i32], &'static str),
    role: Role,
}

const INTERNET: (&[i32], &str) = (&[libc::AF_INET, libc::AF_INET6], "AF_INET or AF_INET6");
const UNIX: (&[i32], &str) = (&[libc::AF_UNIX], "AF_UNIX");
const STREAM: (i32, &str) = (libc::SOCK_STREAM, "SOCK_STREAM");
const DATAGRAM: (i32, &str) = (libc::SOCK_DGRAM, "SOCK_DGRAM");
const TCP: (&[i32], &str) = (&[libc::IPPROTO_TCP, libc::IPPROTO_MPTCP], "TCP");
const UDP: (&[i32], &str) = (&[libc::IPPROTO_UDP], "UDP");
/// Unix sockets have none.
const ANY: (&[i32], &str) = (&[], "");

impl Want {
    fn check(&self, fd: BorrowedFd<'_>) -> Result<(), Mismatch> {
        let [family, kind, protocol] = match sys_msg::socket_kind(fd) {
            Err(e) if e.raw_os_error() == Some(libc::ENOTSOCK) => {
                return Err(Mismatch::NotASocket { is: file_kind(fd) });
            }
            answer => answer.map_err(Mismatch::Os)?,
        };
        if !self.families.0.contains(&family) {
            return Err(Mismatch::Family { is: family, wanted: self.families.1 });
        }
        if kind != self.kind.0 {
            return Err(Mismatch::Type { is: kind, wanted: self.kind.1 });
        }
        if !self.protocols.0.is_empty() && !self.protocols.0.contains(&protocol) {
            return Err(Mismatch::Protocol { is: protocol, wanted: self.protocols.1 });
        }
        let listening = sys_msg::is_listening(fd).map_err(Mismatch::Os)?;
        match self.role {
            Role::Listener if !listening => Err(Mismatch::NotListening),
            Role::Connection if listening => Err(Mismatch::Listening),
            Role::Connection if !sys_msg::is_connected(fd).map_err(Mismatch::Os)? => Err(Mismatch::NotConnected),
            _ => Ok(()),
        }
    }
}

fn file_kind(fd: BorrowedFd<'_>) -> &'static str {
    match sys_msg::file_type(fd) {
        Ok(libc::S_IFREG) => "regular file",
        Ok(libc::S_IFDIR) => "directory",
        Ok(libc::S_IFIFO) => "pipe",
        Ok(libc::S_IFCHR) => "character device",
        Ok(libc::S_IFBLK) => "block device",
        // eventfd, epoll, pidfd, timerfd.
        _ => "descriptor of another kind",
    }
}

macro_rules! convert {
    ($($type:ty, $want:expr;)+) => {$(
        /// Checked by family, type, protocol and whether it listens or is connected, without touching what it carries. It
        /// stays registered as the care-fd that it is.
        ///
        /// # Panics
        /// If this child closed it.
        impl TryFrom<CareFd<OwnedFd>> for CareFd<$type> {
            type Error = ConvertError;

            #[track_caller]
            fn try_from(fd: CareFd<OwnedFd>) -> Result<Self, ConvertError> {
                const WANT: Want = $want;
                match WANT.check(fd.as_fd()) {
                    Ok(()) => Ok(fd.cast()),
                    Err(why) => Err(ConvertError { why, fd, wanted: WANT.what }),
                }
            }
        }
    )+};
}

convert! {
    TcpListener, Want {
        what: "listening TCP socket", families: INTERNET, kind: STREAM, protocols: TCP, role: Role::Listener,
    };
    TcpStream, Want {
        what: "TCP connection", families: INTERNET, kind: STREAM, protocols: TCP, role: Role::Connection,
    };
    UdpSocket, Want {
        what: "UDP socket", families: INTERNET, kind: DATAGRAM, protocols: UDP, role: Role::Datagrams,
    };
    UnixListener, Want {
        what: "listening Unix socket", families: UNIX, kind: STREAM, protocols: ANY, role: Role::Listener,
    };
    UnixStream, Want {
        what: "Unix connection", families: UNIX, kind: STREAM, protocols: ANY, role: Role::Connection,
    };
    UnixDatagram, Want {
        what: "Unix datagram socket", families: UNIX, kind: DATAGRAM, protocols: ANY, role: Role::Datagrams,
    };
}

/// Any descriptor will do.
impl From<CareFd<OwnedFd>> for CareFd<File> {
    fn from(fd: CareFd<OwnedFd>) -> Self {
        fd.cast()
    }
}
