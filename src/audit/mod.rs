//! What a child would get: every open descriptor, with what becomes of it (F7), and the signals that a child inherits.
//!
//! [`audit`] looks at this process, [`audit_of`] at another one. What they return shows itself as a table of at most 100
//! columns, and as JSON by [`Audit::to_json`]. The program `examples/forkaudit.rs` is both of them for the command line.
//!
//! # The rule
//! For an **exec child** (any fork, vfork or posix_spawn with an exec after it):
//!
//! | descriptor | fate |
//! |---|---|
//! | close-on-exec | closed |
//! | 0, 1, 2 without it | kept |
//! | any other without it | **leaked** |
//!
//! Passing a descriptor on purpose is no exception: as long as close-on-exec is off in the parent, every program that any
//! thread starts gets it. Clear the flag in the child.
//!
//! For a **noexec child**, one that goes on with this program and has cleaned up
//! ([`InChild::cleanup`](crate::InChild::cleanup), [`postfork_child_noexec`](crate::postfork_child_noexec)):
//!
//! | descriptor | fate |
//! |---|---|
//! | a care-fd, of either [`OnFork`] | closed |
//! | 0, 1, 2 | kept |
//! | any other whose end somebody may wait for: socket, pipe, terminal, file with a lock that children share | **leaked** |
//! | any other: a file, a directory, a memfd, an epoll | kept |
//!
//! Children share the locks of flock(2), open file description locks and leases, not those of POSIX.
//!
//! So what is *leaked* is what makes a forgotten child felt outside: a port that stays in use, a reader that gets no end of
//! file, a lock that nobody gives back. Since care-fds are left out, those that remain are other libraries'. A child of a process
//! without carefork closes nothing; in another process it cannot be seen what is a care-fd, so nothing is said about its noexec
//! children.
//!
//! What [`ForkOptions`](crate::ForkOptions) keeps or closes besides is not considered.
//!
//! # Limits
//! Programs that [`Command`](crate::Command) starts get nothing that *leaked*, only the descriptors that they are given: what is said of
//! exec children is true of everybody else's.
//!
//! Other threads open and close meanwhile. What is closed before it was looked at is left out, what is opened after the list
//! was read is not in it, and a number that changes hands while it is looked at is looked at again, so that no line mixes two
//! descriptors (of those that share one inode, such as eventfds, and before Linux 5.14, it may). Descriptors
//! that the audit opens for itself are not listed; they are care-fds. A file on a network filesystem that does not
//! answer holds the audit up, as it does lsof. Allocates, so not for hooks and signal handlers.

mod process;
mod show;
mod sockets;

use crate::carefd::OnFork;
use std::fmt;
use std::io;
use std::os::fd::RawFd;

/// Every open descriptor of this process with what becomes of it in children, and the signals that they inherit.
///
/// Descriptors and blocked signals are those of the calling thread, which threads share unless one has called unshare(2).
///
/// # Errors
/// If `/proc` is not mounted or cannot be read.
///
/// ```
/// use carefork::audit::{Fate, Kind};
/// let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// let audit = carefork::audit()?;
/// let found = audit.descriptors.iter().find(|d| d.kind == Kind::TcpListener).expect("it is open");
/// assert_eq!(found.target, listener.local_addr()?.to_string());
/// // std opens close-on-exec; a child that does not exec keeps the port, because it is no care-fd.
/// assert_eq!((found.exec, found.noexec), (Fate::Closed, Some(Fate::Leaked)));
/// println!("{audit}");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn audit() -> io::Result<Audit> {
    process::read(None)
}

/// As [`audit`], for another process: by its `/proc/PID`. What is a care-fd there is unknown, and so is what a noexec child of it
/// would keep. Blocked signals are those of its first thread, or of another where that has ended.
///
/// # Errors
/// [`NotFound`](io::ErrorKind::NotFound) if there is no such process or it ends meanwhile;
/// [`PermissionDenied`](io::ErrorKind::PermissionDenied) if it is another user's: the rule is ptrace(2)'s
/// `PTRACE_MODE_READ_FSCREDS`, which may refuse root as well, in a container or
/// under a security module.
///
/// ```no_run
/// for leak in carefork::audit_of(1234)?.leaked() {
///     println!("{} {}", leak.number, leak.target);
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn audit_of(pid: u32) -> io::Result<Audit> {
    if pid == std::process::id() { audit() } else { process::read(Some(pid)) }
}

/// The whole of a file of /proc, by a care-fd: no child that cleans up keeps it.
pub(crate) fn slurp(path: &str) -> io::Result<String> {
    process::slurp(path)
}

/// Each care-fd with what it leads to; `None` if it is not open, or there is no `/proc` to tell.
pub(crate) fn care_fds() -> Vec<(RawFd, OnFork, Option<Descriptor>)> {
    process::care_fds()
}

/// What [`audit`] found. Shows itself as a table of at most 100 columns.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Audit {
    /// The process.
    pub pid: u32,
    /// Its name, as the kernel has it: at most 15 bytes.
    pub name: String,
    /// How many threads it has.
    pub threads: usize,
    /// Its open descriptors, rising.
    pub descriptors: Vec<Descriptor>,
    /// Signals with a handler, which an exec child has at their default.
    pub caught: Vec<i32>,
    /// Ignored signals: they stay ignored across exec.
    pub ignored: Vec<i32>,
    /// Blocked signals: they stay blocked across exec.
    pub blocked: Vec<i32>,
}

impl Audit {
    /// The descriptors that would leak into an exec child.
    pub fn leaked(&self) -> impl Iterator<Item = &Descriptor> {
        self.descriptors.iter().filter(|d| d.exec == Fate::Leaked)
    }

    /// The descriptors that would leak into a noexec child: empty for another process, where that cannot be seen.
    pub fn leaked_noexec(&self) -> impl Iterator<Item = &Descriptor> {
        self.descriptors.iter().filter(|d| d.noexec == Some(Fate::Leaked))
    }

    /// One JSON object: `pid`, `name`, `threads`, `descriptors` (each with `fd`, `kind`, `target`, `read`, `write`,
    /// `close_on_exec`, `locked`, `care`, `noexec`, `exec`; what is unknown is `null`), and the names of signals in `caught`,
    /// `ignored`, `blocked`.
    ///
    /// ```
    /// assert!(carefork::audit()?.to_json().starts_with("{\"pid\":"));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn to_json(&self) -> String {
        show::json(self)
    }
}

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show::table(self, f)
    }
}

/// One open descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Descriptor {
    /// Its number.
    pub number: RawFd,
    /// What it is.
    pub kind: Kind,
    /// What it leads to: a path (with ` (deleted)` behind it where the file has no name any more), a socket's addresses,
    /// the process of a pidfd, the numbers that an epoll watches, else the kernel's name for it (`pipe:[1234]`). Bytes that
    /// are not UTF-8 are replaced.
    pub target: String,
    /// Open for reading.
    pub read: bool,
    /// Open for writing. Neither: opened with `O_PATH`.
    pub write: bool,
    /// Whether close-on-exec is set.
    pub close_on_exec: bool,
    /// Whether a lock lives as long as a copy of it in any process: flock(2), an open file description lock, a lease.
    pub locked: bool,
    /// Whether it is a care-fd.
    pub care: Care,
    /// What becomes of it in a child that goes on without exec and cleans up; `None` where that cannot be seen.
    pub noexec: Option<Fate>,
    /// What becomes of it in a child that execs.
    pub exec: Fate,
}

/// Whether a descriptor is registered as a [`CareFd`](crate::CareFd).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Care {
    /// It is not.
    No,
    /// It is, to be closed then.
    On(OnFork),
    /// The descriptor is another process's.
    Unknown,
}

/// What becomes of a descriptor in a child; see [the rule](self#the-rule).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fate {
    /// It stays open, and that is nothing to worry about.
    Kept,
    /// The child does not have it.
    Closed,
    /// It stays open, though the child has no business with it or somebody may wait for its end.
    Leaked,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Fate::Kept => "kept",
            Fate::Closed => "closed",
            Fate::Leaked => "leaked",
        })
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])+ $name:ident = $text:literal,)+) => {
        /// What a descriptor is; shows itself as in the table and in JSON.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[$doc])+ $name,)+
        }

        impl fmt::Display for Kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self {
                    $(Kind::$name => $text,)+
                })
            }
        }
    };
}

kinds! {
    /// A regular file.
    File = "file",
    /// A directory.
    Directory = "directory",
    /// A terminal, or the master's side of one.
    Terminal = "terminal",
    /// Another character or block device.
    Device = "device",
    /// A TCP socket that listens.
    TcpListener = "tcp listen",
    /// A TCP socket that does not listen.
    Tcp = "tcp",
    /// A UDP socket.
    Udp = "udp",
    /// A Unix socket that listens.
    UnixListener = "unix listen",
    /// A Unix stream socket that does not listen.
    UnixStream = "unix stream",
    /// A Unix datagram socket.
    UnixDatagram = "unix datagram",
    /// A Unix seqpacket socket that does not listen.
    UnixSeqpacket = "unix seqpacket",
    /// A netlink socket.
    Netlink = "netlink",
    /// A socket of another family, or one that the kernel lists nowhere.
    Socket = "socket",
    /// An end of a pipe.
    Pipe = "pipe",
    /// A pipe with a name.
    Fifo = "fifo",
    /// See eventfd(2).
    Eventfd = "eventfd",
    /// See timerfd_create(2).
    Timerfd = "timerfd",
    /// See signalfd(2).
    Signalfd = "signalfd",
    /// See epoll(7).
    Epoll = "epoll",
    /// See inotify(7).
    Inotify = "inotify",
    /// See fanotify(7).
    Fanotify = "fanotify",
    /// See memfd_create(2).
    Memfd = "memfd",
    /// See pidfd_open(2).
    Pidfd = "pidfd",
    /// See io_uring(7).
    IoUring = "io_uring",
    /// See userfaultfd(2).
    Userfaultfd = "userfaultfd",
    /// A namespace; see namespaces(7).
    Namespace = "namespace",
    /// Anything else.
    Other = "other",
}

impl Kind {
    /// Somebody may wait for the last copy of it to be closed.
    fn has_a_peer(self) -> bool {
        use Kind::*;
        matches!(
            self,
            Terminal
                | TcpListener
                | Tcp
                | Udp
                | UnixListener
                | UnixStream
                | UnixDatagram
                | UnixSeqpacket
                | Netlink
                | Socket
                | Pipe
                | Fifo
        )
    }
}

fn is_standard(number: RawFd) -> bool {
    (0..=2).contains(&number)
}

/// The rule for exec children.
fn exec_fate(number: RawFd, close_on_exec: bool) -> Fate {
    match (close_on_exec, is_standard(number)) {
        (true, _) => Fate::Closed,
        (false, true) => Fate::Kept,
        (false, false) => Fate::Leaked,
    }
}

/// The rule for noexec children.
fn noexec_fate(number: RawFd, care: Care, kind: Kind, locked: bool) -> Option<Fate> {
    match care {
        Care::Unknown => None,
        Care::On(_) => Some(Fate::Closed),
        Care::No if is_standard(number) => Some(Fate::Kept),
        Care::No if kind.has_a_peer() || locked => Some(Fate::Leaked),
        Care::No => Some(Fate::Kept),
    }
}
