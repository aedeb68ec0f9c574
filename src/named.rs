//! Descriptors by name: a table with the rules of QEMU's `getfd`, and its way over a Unix socket (X4).

use crate::carefd::CareFd;
use crate::pass::{MAX_FDS, Received, recv_fds, send_fds};
use crate::sys_msg;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A frame begins with this.
const MAGIC: [u8; 4] = *b"CFfd";
const HEADER: usize = 8;
const NAME_MAX: usize = 255;
/// The longest frame: every name at its longest, with its length before it.
const FRAME_MAX: usize = HEADER + MAX_FDS * (1 + NAME_MAX);

/// What is wrong with a name for a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BadName {
    /// It is empty.
    Empty,
    /// It begins with a digit, and would be taken for a descriptor's number.
    Number,
    /// It is longer than 255 bytes.
    TooLong,
    /// It has a control character in it, at this byte.
    Control(usize),
}

impl BadName {
    fn check(name: &str) -> Result<(), BadName> {
        match name.bytes().next() {
            None => Err(BadName::Empty),
            Some(b'0'..=b'9') => Err(BadName::Number),
            Some(_) if name.len() > NAME_MAX => Err(BadName::TooLong),
            Some(_) => match name.bytes().position(|b| b.is_ascii_control()) {
                Some(at) => Err(BadName::Control(at)),
                None => Ok(()),
            },
        }
    }
}

impl fmt::Display for BadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadName::Empty => f.write_str("a descriptor's name must not be empty"),
            BadName::Number => {
                f.write_str("a descriptor's name must not begin with a digit: it would be taken for a number")
            }
            BadName::TooLong => write!(f, "a descriptor's name has at most {NAME_MAX} bytes"),
            BadName::Control(at) => write!(f, "a control character at byte {at} of a descriptor's name"),
        }
    }
}

impl std::error::Error for BadName {}

impl From<BadName> for io::Error {
    fn from(e: BadName) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidInput, e)
    }
}

/// A descriptor could not be put under that name; it comes back.
#[derive(Debug)]
pub struct PutError {
    /// What is wrong with the name.
    pub why: BadName,
    /// The descriptor.
    pub fd: CareFd<OwnedFd>,
}

impl fmt::Display for PutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.why, f)
    }
}

impl std::error::Error for PutError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.why)
    }
}

/// For `?`. The descriptor is closed.
impl From<PutError> for io::Error {
    fn from(e: PutError) -> io::Error {
        e.why.into()
    }
}

/// Descriptors by name, as QEMU's monitor keeps them for `getfd`.
///
/// The same name replaces, and closes what was there; using one takes it out; a name may not begin with a digit, so that an option
/// that accepts both can tell a name from a number. The table is not shared by itself: put it into a
/// [`Mutex`](crate::Mutex). A child that does not exec keeps the names; the descriptors are care-fds, closed by the clean-up.
///
/// ```
/// use carefork::{CareFd, NamedFds, send_named_fds};
/// use std::os::fd::AsFd;
/// use std::os::unix::net::UnixStream;
///
/// let (here, there) = UnixStream::pair()?;
/// let disk = std::fs::File::open("/dev/null")?;
/// send_named_fds(&here, &[("disk", disk.as_fd())])?;
///
/// let mut table = NamedFds::new();
/// table.receive(&there)?;
/// let disk: CareFd<std::fs::File> = table.take("disk").expect("it was sent").into();
/// assert!(table.take("disk").is_none());
/// # drop(disk);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct NamedFds {
    table: BTreeMap<String, CareFd<OwnedFd>>,
}

impl NamedFds {
    /// An empty table.
    pub const fn new() -> Self {
        NamedFds { table: BTreeMap::new() }
    }

    /// Puts a descriptor under a name; what was there under the same name is closed.
    ///
    /// # Errors
    /// [`PutError`] for a name that is empty, begins with a digit, is longer than 255 bytes or has control characters in it.
    pub fn put(&mut self, name: &str, fd: CareFd<OwnedFd>) -> Result<(), PutError> {
        if let Err(why) = BadName::check(name) {
            return Err(PutError { why, fd });
        }
        drop(self.table.insert(name.to_owned(), fd));
        Ok(())
    }

    /// Takes a descriptor out.
    pub fn take(&mut self, name: &str) -> Option<CareFd<OwnedFd>> {
        self.table.remove(name)
    }

    /// Looks at a descriptor and leaves it in.
    pub fn get(&self, name: &str) -> Option<&CareFd<OwnedFd>> {
        self.table.get(name)
    }

    /// Closes a descriptor; whether there was one of that name.
    pub fn close(&mut self, name: &str) -> bool {
        self.table.remove(name).is_some()
    }

    /// The names in order, each with its descriptor.
    pub fn list(&self) -> impl ExactSizeIterator<Item = (&str, &CareFd<OwnedFd>)> {
        self.table.iter().map(|(name, fd)| (name.as_str(), fd))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Receives what one [`send_named_fds`] sent into the table; how many, 0 at the end of the stream.
    ///
    /// All of them or none: after an error the table is as it was and everything that came is closed. The peer need not be
    /// trusted, but can keep this call waiting in the middle of a frame: give the socket a read time-out. On a non-blocking socket only the
    /// beginning of a frame does not wait.
    ///
    /// After an error on a stream nobody knows where the next frame begins: close it.
    ///
    /// # Errors
    /// [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if the peer died half way, [`InvalidData`](io::ErrorKind::InvalidData) for what
    /// is no frame: names that [`NamedFds::put`] refuses, one name twice, more or fewer descriptors than names. As
    /// [`recv_fds`] otherwise.
    #[track_caller]
    pub fn receive(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let socket = socket.as_fd();
        let (frame, fds) = match sys_msg::socket_type(socket)? {
            libc::SOCK_STREAM => from_stream(socket)?,
            _ => from_packet(socket)?,
        };
        if frame.is_empty() {
            return Ok(0);
        }
        let names = names(&frame)?;
        if names.len() != fds.len() {
            return Err(bad(format!("{} names came with {} descriptors", names.len(), fds.len())));
        }
        let count = fds.len();
        for (name, fd) in names.into_iter().zip(fds) {
            self.put(name, fd)?;
        }
        Ok(count)
    }
}

/// Sends descriptors with their names in one message, for [`NamedFds::receive`] on the other side.
///
/// `socket` is a Unix socket: a stream, a seqpacket or datagrams. A stream that is full half way through a frame is waited for, even a
/// non-blocking one.
///
/// # The frame
/// Numbers are little-endian. Eight bytes: `CFfd`, the number of names (2 bytes, 1 to 253), the length of what follows
/// (2 bytes). Then for each name its length (1 byte) and the name (UTF-8). The descriptors travel with the first byte, in the order of the
/// names. In a packet the frame is the whole packet.
///
/// # Errors
/// [`InvalidInput`](io::ErrorKind::InvalidInput) for no descriptors, more than [`MAX_FDS`], a name that [`NamedFds::put`] would refuse,
/// or one name twice; else as [`send_fds`].
pub fn send_named_fds<S: AsRef<str>>(socket: impl AsFd, fds: &[(S, BorrowedFd<'_>)]) -> io::Result<()> {
    let socket = socket.as_fd();
    let refuse = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text.to_owned()));
    if fds.is_empty() {
        return refuse("no descriptors to send");
    }
    let mut frame = Vec::with_capacity(HEADER + fds.len() * 16);
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&[0; 4]);
    for (i, (name, _)) in fds.iter().enumerate() {
        let name = name.as_ref();
        BadName::check(name)?;
        if fds[..i].iter().any(|(earlier, _)| earlier.as_ref() == name) {
            return refuse(&format!("two descriptors are named {name:?}: the second would replace the first"));
        }
        // A name that passed the check has at most 255 bytes.
        frame.push(name.len() as u8);
        frame.extend_from_slice(name.as_bytes());
    }
    let numbers: Vec<_> = fds.iter().map(|(_, fd)| *fd).collect();
    // Both fit where send_fds takes the descriptors: 253 names of 256 bytes.
    let length = frame.len() - HEADER;
    frame[4..6].copy_from_slice(&(numbers.len() as u16).to_le_bytes());
    frame[6..8].copy_from_slice(&(length as u16).to_le_bytes());
    let mut sent = send_fds(socket, &frame, &numbers)?;
    while sent < frame.len() {
        match send_fds(socket, &frame[sent..], &[]) {
            Ok(n) => sent += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                sys_msg::wait(socket, true, None)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn bad(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// What is whole, or an error that drops the descriptors.
fn whole(received: Received) -> io::Result<(usize, Vec<CareFd<OwnedFd>>)> {
    if received.truncated {
        return Err(bad("descriptors were lost on the way: is this process at its limit of open ones?"));
    }
    if received.payload_truncated {
        return Err(bad("a packet longer than any frame"));
    }
    Ok((received.len, received.fds))
}

/// The header first: it says how much of the stream is this frame's. The descriptors come with its first byte.
#[track_caller]
fn from_stream(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<CareFd<OwnedFd>>)> {
    let mut frame = vec![0; HEADER];
    let (mut have, fds) = whole(recv_fds(socket, &mut frame, MAX_FDS)?)?;
    if have == 0 && fds.is_empty() {
        return Ok((Vec::new(), fds));
    }
    loop {
        if have == HEADER {
            frame.resize(HEADER + length(&frame)?, 0);
        }
        if have == frame.len() {
            return Ok((frame, fds));
        }
        match recv_fds(socket, &mut frame[have..], 0) {
            Ok(more) if more.truncated => return Err(bad("descriptors in the middle of a frame")),
            Ok(more) if more.len == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(more) => have += more.len,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && sys_msg::is_nonblocking(socket)? => {
                sys_msg::wait(socket, false, None)?;
            }
            Err(e) => return Err(e),
        }
    }
}

#[track_caller]
fn from_packet(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<CareFd<OwnedFd>>)> {
    let mut frame = vec![0; FRAME_MAX];
    let (have, fds) = whole(recv_fds(socket, &mut frame, MAX_FDS)?)?;
    frame.truncate(have);
    if frame.is_empty() && fds.is_empty() {
        return Ok((frame, fds));
    }
    if have < HEADER || have != HEADER + length(&frame)? {
        return Err(bad("a packet that is no frame"));
    }
    Ok((frame, fds))
}

/// The length of what follows the header.
fn length(header: &[u8]) -> io::Result<usize> {
    if header[..4] != MAGIC {
        return Err(bad("what came is no frame of named descriptors"));
    }
    Ok(u16::from_le_bytes([header[6], header[7]]).into())
}

fn names(frame: &[u8]) -> io::Result<Vec<&str>> {
    let count = usize::from(u16::from_le_bytes([frame[4], frame[5]]));
    let mut names: Vec<&str> = Vec::with_capacity(count.min(MAX_FDS));
    let mut rest = &frame[HEADER..];
    while let Some((&length, after)) = rest.split_first() {
        let (name, after) = after.split_at_checked(length.into()).ok_or_else(|| bad("a name is cut short"))?;
        let name = std::str::from_utf8(name).map_err(|_| bad("a name is not UTF-8"))?;
        BadName::check(name).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        if names.contains(&name) {
            return Err(bad(format!("two descriptors are named {name:?}")));
        }
        names.push(name);
        rest = after;
    }
    if names.len() != count || count == 0 {
        return Err(bad(format!("{} names where {count} were announced", names.len())));
    }
    Ok(names)
}
