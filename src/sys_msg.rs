//! System calls on sockets: messages with descriptors (SCM_RIGHTS), and what a socket says of itself.
//!
//! Not by nix's `recvmsg`: it hides the descriptors of a message whose control data was cut short, and they stay open for ever.

#![allow(unsafe_code)]

use crate::sys::{cerr, monotonic, retry};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What the kernel takes in one message (its SCM_MAX_FD).
pub(crate) const MAX_FDS: usize = 253;

/// A pidfd of the sender, which SO_PASSPIDFD adds to each message: a descriptor too.
const SCM_PIDFD: libc::c_int = 4;

/// Room for `MAX_FDS` descriptors and the other things that may come along: credentials, a security label, a pidfd.
#[repr(C)]
struct Control {
    /// Control data is aligned like its headers.
    align: [libc::cmsghdr; 0],
    bytes: [MaybeUninit<u8>; 2048],
}

impl Control {
    fn new() -> Self {
        Control { align: [], bytes: [MaybeUninit::uninit(); 2048] }
    }
}

/// A message of one part, and where it points to.
fn message(part: &mut libc::iovec, control: &mut Control, room: usize) -> libc::msghdr {
    // SAFETY: null pointers and zeroes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    if room > 0 {
        message.msg_control = std::ptr::from_mut(control).cast();
        // musl's type is narrower; `room` is at most 2048.
        message.msg_controllen = room as _;
    }
    message
}

/// sendmsg of `payload` with at most [`MAX_FDS`] descriptors; without SIGPIPE.
pub(crate) fn send(socket: BorrowedFd<'_>, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    assert!(fds.len() <= MAX_FDS, "the caller counts them");
    let mut control = Control::new();
    let mut part = libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() };
    let size = size_of_val(fds);
    // SAFETY: a computation.
    let room = if fds.is_empty() { 0 } else { unsafe { libc::CMSG_SPACE(size as u32) } };
    let message = message(&mut part, &mut control, room as usize);
    if !fds.is_empty() {
        // SAFETY: `message` has room for one header, aligned.
        let head = unsafe { libc::CMSG_FIRSTHDR(&message) };
        // SAFETY: a computation.
        let length = unsafe { libc::CMSG_LEN(size as u32) };
        // SAFETY: all zeroes are a valid header.
        let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
        header.cmsg_level = libc::SOL_SOCKET;
        header.cmsg_type = libc::SCM_RIGHTS;
        header.cmsg_len = length as _;
        // SAFETY: `head` is the start of `control`, which is live and aligned.
        unsafe { head.write(header) };
        // SAFETY: the data begins inside `control`.
        let data = unsafe { libc::CMSG_DATA(head) };
        // SAFETY: `size` bytes from there are inside `control`; a BorrowedFd is represented as the number.
        unsafe { data.copy_from_nonoverlapping(fds.as_ptr().cast(), size) };
    }
    // SAFETY: everything that `message` points to is live.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) as libc::c_long })
        .map(|n| n as usize)
}

/// What [`recv`] found, beside the descriptors.
pub(crate) struct Message {
    pub(crate) len: usize,
    /// MSG_CTRUNC: control data, and so perhaps descriptors, did not fit or could not be installed.
    pub(crate) control_cut: bool,
    /// MSG_TRUNC: the payload was longer than `buf`.
    pub(crate) payload_cut: bool,
}

/// recvmsg without waiting. Every descriptor that came is handed to `take`, close-on-exec.
pub(crate) fn recv(socket: BorrowedFd<'_>, buf: &mut [u8], mut take: impl FnMut(OwnedFd)) -> io::Result<Message> {
    let mut control = Control::new();
    let mut part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut message = message(&mut part, &mut control, size_of::<Control>());
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: everything that `message` points to is live and ours to write.
    let len = retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) as libc::c_long })?;
    // SAFETY: the kernel filled in `message`.
    let mut head = unsafe { libc::CMSG_FIRSTHDR(&message) };
    while !head.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give whole headers inside `control`, or null.
        let header = unsafe { &*head };
        // SAFETY: a computation.
        let empty = unsafe { libc::CMSG_LEN(0) } as usize;
        if header.cmsg_level == libc::SOL_SOCKET && matches!(header.cmsg_type, libc::SCM_RIGHTS | SCM_PIDFD) {
            // SAFETY: the data begins inside `control`.
            let data = unsafe { libc::CMSG_DATA(head) };
            // SAFETY: the header counts that many bytes, and the kernel wrote them.
            let data = unsafe { std::slice::from_raw_parts(data, header.cmsg_len as usize - empty) };
            for number in data.as_chunks().0 {
                let number = RawFd::from_ne_bytes(*number);
                // A pidfd that could not be made is an error's number.
                if number >= 0 {
                    // SAFETY: the kernel just gave us this number.
                    let fd = unsafe { OwnedFd::from_raw_fd(number) };
                    if header.cmsg_type == libc::SCM_RIGHTS {
                        take(fd);
                    }
                }
            }
        }
        // SAFETY: `head` is one of `message`'s headers.
        head = unsafe { libc::CMSG_NXTHDR(&message, head) };
    }
    Ok(Message {
        len: len as usize,
        control_cut: message.msg_flags & libc::MSG_CTRUNC != 0,
        payload_cut: message.msg_flags & libc::MSG_TRUNC != 0,
    })
}

/// Waits until `socket` may be read (or written), at most `limit` ns; false at the time-out.
pub(crate) fn wait(socket: BorrowedFd<'_>, write: bool, limit: Option<u64>) -> io::Result<bool> {
    let deadline = limit.map(|ns| monotonic().saturating_add(ns));
    let events = if write { libc::POLLOUT } else { libc::POLLIN };
    loop {
        let left = deadline.map(|d| d.saturating_sub(monotonic()));
        let ms = left.map_or(-1, |ns| i32::try_from(ns.div_ceil(1_000_000)).unwrap_or(i32::MAX));
        let mut p = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
        // SAFETY: one live pollfd.
        match cerr(unsafe { libc::poll(&mut p, 1, ms) }.into()) {
            Ok(0) if left.is_none_or(|ns| ns > 0) => {}
            Ok(n) => return Ok(n > 0),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Whether calls on `fd` are not to wait (O_NONBLOCK).
pub(crate) fn is_nonblocking(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: F_GETFL touches no memory.
    cerr(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }.into()).map(|f| f as i32 & libc::O_NONBLOCK != 0)
}

fn option<T: Copy>(socket: BorrowedFd<'_>, name: libc::c_int, mut value: T) -> io::Result<T> {
    let mut len = size_of::<T>() as libc::socklen_t;
    let place = std::ptr::from_mut(&mut value).cast();
    // SAFETY: `place` has room for `len` bytes; the callers ask for plain integers and a timeval.
    cerr(unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, place, &mut len) }.into())?;
    Ok(value)
}

/// How long the socket's owner wants to wait for data (SO_RCVTIMEO), in ns; `None` is for ever.
pub(crate) fn receive_limit(socket: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let t = option(socket, libc::SO_RCVTIMEO, libc::timeval { tv_sec: 0, tv_usec: 0 })?;
    let ns = (t.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_usec as u64 * 1000);
    Ok((ns > 0).then_some(ns))
}

/// Family, type and protocol; ENOTSOCK for what is no socket.
pub(crate) fn socket_kind(socket: BorrowedFd<'_>) -> io::Result<[i32; 3]> {
    Ok([option(socket, libc::SO_DOMAIN, 0)?, option(socket, libc::SO_TYPE, 0)?, option(socket, libc::SO_PROTOCOL, 0)?])
}

/// SO_DOMAIN.
pub(crate) fn socket_family(socket: BorrowedFd<'_>) -> io::Result<i32> {
    option(socket, libc::SO_DOMAIN, 0)
}

/// SO_TYPE.
pub(crate) fn socket_type(socket: BorrowedFd<'_>) -> io::Result<i32> {
    option(socket, libc::SO_TYPE, 0)
}

/// Whether listen(2) was called on it.
pub(crate) fn is_listening(socket: BorrowedFd<'_>) -> io::Result<bool> {
    option(socket, libc::SO_ACCEPTCONN, 0).map(|n: i32| n != 0)
}

/// Whether it has a peer.
pub(crate) fn is_connected(socket: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: all zeroes are a valid sockaddr_storage.
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&address) as libc::socklen_t;
    let place = std::ptr::from_mut(&mut address).cast();
    // SAFETY: `place` has room for `len` bytes.
    match cerr(unsafe { libc::getpeername(socket.as_raw_fd(), place, &mut len) }.into()) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The S_IFMT part of the mode.
pub(crate) fn file_type(fd: BorrowedFd<'_>) -> io::Result<libc::mode_t> {
    // SAFETY: stat is plain data.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `st` is live.
    cerr(unsafe { libc::fstat(fd.as_raw_fd(), &mut st) }.into())?;
    Ok(st.st_mode & libc::S_IFMT)
}
