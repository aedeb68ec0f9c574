//! Where lines go: a descriptor, by one write(2) each and with no lock that a fork waits for, or somebody's `Write`, inside a region.

use crate::{CareFd, Mutex, sys_write};
use std::cell::Cell;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, PoisonError};

/// Where a logger writes.
///
/// A descriptor is a care-fd: the clean-up of a child that does not exec closes it, exec closes it in the others.
///
/// ```
/// use carefork::log::Output;
/// let path = std::env::temp_dir().join("carefork-output-example.log");
/// let output = Output::file(&path)?;
/// # drop(output);
/// # std::fs::remove_file(path)?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Output(pub(super) Sink);

impl Output {
    /// Standard error, fd 2, whatever that is at the time of each write. std's lock of it is not taken.
    pub fn stderr() -> Output {
        Output(Sink::Stderr)
    }

    /// A file, made if it is not there and appended to if it is, so that several processes may write to it. A named pipe is waited for until
    /// somebody reads it.
    ///
    /// # Errors
    /// What open(2) says.
    pub fn file(path: impl AsRef<Path>) -> io::Result<Output> {
        let path = path.as_ref();
        let open = || OpenOptions::new().append(true).create(true).open(path);
        // Whatever opening has to wait for (a pipe for its reader, a line for its carrier) no fork does. A child that is forked right after it
        // keeps the descriptor.
        if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
            return Output::fd(open()?);
        }
        Ok(Output::on(CareFd::open(open)?))
    }

    /// An open descriptor: a pipe, a socket, a file that was opened with `O_APPEND`.
    ///
    /// A non-blocking one is waited for by poll(2), outside of any region, unless [`WhenFull`](crate::log::WhenFull) says otherwise.
    ///
    /// # Errors
    /// As for [`CareFd::new`]; the descriptor is closed then.
    pub fn fd(fd: impl Into<OwnedFd>) -> io::Result<Output> {
        Ok(Output::on(CareFd::new(File::from(fd.into()))?))
    }

    /// Anything that can be written to. Each line is one `write`, or several where that takes a part, inside a region: forks wait meanwhile, and
    /// a writer that is stuck for longer than a fork's budget makes it fail. Flushed by [`flush`](crate::log::flush), by the turn to another output
    /// and by the end of the process, by a background thread also whenever its queue is empty.
    ///
    /// No child ever calls it, flushes it or drops it; a child that it forks itself on a background thread, and returns in, ends there with exit
    /// code 101. What it logs itself goes to fd 2, by whichever of carefork's loggers, and flushing any of them does nothing there.
    pub fn writer(writer: impl Write + Send + 'static) -> Output {
        Output(Sink::Writer(Mutex::new(Writer { to: Box::new(writer), cut: false })))
    }

    fn on(file: CareFd<File>) -> Output {
        let fd = file.as_raw_fd();
        let most = if sys_write::is_regular(fd) { usize::MAX } else { libc::PIPE_BUF };
        let one = (most == libc::PIPE_BUF && !sys_write::is_pipe(fd)).then(std::sync::Mutex::default);
        Output(Sink::File { file, most, one, cut: AtomicBool::new(false) })
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Sink::Stderr => f.write_str("Output(stderr)"),
            Sink::File { file, .. } => f.debug_tuple("Output").field(file).finish(),
            Sink::Writer(_) => f.write_str("Output(writer)"),
        }
    }
}

pub(super) enum Sink {
    Stderr,
    File {
        file: CareFd<File>,
        /// What one write(2) takes in one piece.
        most: usize,
        /// One thread at a time, where it may not: a socket or a terminal takes a part where there is no room for all. Std's, and no region, so
        /// that no fork waits for the room: a child has no use for its parent's sink.
        one: Option<std::sync::Mutex<()>>,
        /// The last thing written there ends in the middle of a line: the disk, or a socket, was full.
        cut: AtomicBool,
    },
    Writer(Mutex<Writer>),
}

pub(super) struct Writer {
    to: Box<dyn Write + Send>,
    /// As for a file: it took a part of a line and failed, or panicked.
    cut: bool,
}

impl Writer {
    fn put(&mut self, line: &[u8]) -> io::Result<()> {
        if self.cut {
            self.to.write_all(b"\n")?;
            self.cut = false;
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.to.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    rest = &rest[n..];
                    self.cut = !rest.is_empty();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

thread_local! {
    /// This thread is inside somebody's writer: what that logs must not come here again. Const, no destructor.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether the caller was called by an [`Output::writer`].
pub(super) fn inside() -> bool {
    INSIDE.get()
}

/// What was so before.
struct Inside(bool);

impl Inside {
    fn begin() -> Inside {
        Inside(INSIDE.replace(true))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

/// How far a write got, and why no further.
pub(super) struct Stopped {
    pub(super) written: usize,
    pub(super) why: io::Error,
}

impl Sink {
    /// What one call of [`put`](Self::put) may hold if nothing is to be torn.
    pub(super) fn most(&self) -> usize {
        match self {
            Sink::Stderr => libc::PIPE_BUF,
            Sink::File { most, .. } => *most,
            Sink::Writer(_) => usize::MAX,
        }
    }

    /// Writes whole lines; waits for a full pipe, outside of any region, unless it is `hurried`.
    pub(super) fn put(&self, lines: &[u8], hurried: bool) -> Result<(), Stopped> {
        match self {
            Sink::Stderr => put(libc::STDERR_FILENO, lines, hurried),
            Sink::File { file, most, one, cut } => {
                // A file has room, or fails; and what would not wait may take a part.
                let hurried = hurried && *most != usize::MAX;
                // In a child that pointed the log at it and cleaned up afterwards it is closed.
                let Some(file) = file.get() else { return put(libc::STDERR_FILENO, lines, hurried) };
                let _one = one.as_ref().map(|one| one.lock().unwrap_or_else(PoisonError::into_inner));
                let fd = file.as_raw_fd();
                if cut.load(Relaxed) && cut.swap(false, Relaxed) && put(fd, b"\n", hurried).is_err() {
                    cut.store(true, Relaxed);
                }
                put(fd, lines, hurried).inspect_err(|stopped| {
                    if stopped.written > 0 && lines[stopped.written - 1] != b'\n' {
                        cut.store(true, Relaxed);
                    }
                })
            }
            Sink::Writer(writer) => {
                let mut writer = writer.lock();
                let _inside = Inside::begin();
                writer.put(lines).map_err(|why| Stopped { written: 0, why })
            }
        }
    }

    /// Writes one line whose head is `head` bytes long, in pieces where one write(2) would not keep it whole.
    pub(super) fn put_line(&self, line: &[u8], head: usize, hurried: bool) -> Result<(), Stopped> {
        let most = self.most();
        if line.len() <= most {
            return self.put(line, hurried);
        }
        pieces(line, head, most, |piece| self.put(piece, hurried))
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        match self {
            Sink::Writer(writer) => {
                let mut writer = writer.lock();
                let _inside = Inside::begin();
                writer.to.flush()
            }
            _ => Ok(()),
        }
    }

    /// Drops it, and a writer as one that is being called.
    pub(super) fn end(self: Arc<Self>) {
        let _inside = Inside::begin();
        drop(self);
    }

    pub(super) fn is_writer(&self) -> bool {
        matches!(self, Sink::Writer(_))
    }
}

fn put(fd: RawFd, lines: &[u8], hurried: bool) -> Result<(), Stopped> {
    let mut written = 0;
    while written < lines.len() {
        let rest = &lines[written..];
        let went = if !hurried {
            sys_write::write(fd, rest)
        } else if sys_write::wait_writable(fd, 0) {
            sys_write::write_now(fd, rest)
        } else {
            Err(io::ErrorKind::WouldBlock.into())
        };
        match went {
            Ok(n) => written += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && !hurried => {
                sys_write::wait_writable(fd, -1);
            }
            Err(why) => return Err(Stopped { written, why }),
        }
    }
    Ok(())
}

/// Cuts a line into lines of at most `most` bytes, each with the same head, all but the last ending in a backslash.
fn pieces(
    line: &[u8],
    head: usize,
    most: usize,
    mut put: impl FnMut(&[u8]) -> Result<(), Stopped>,
) -> Result<(), Stopped> {
    let (head, rest) = line.split_at(boundary(line, head.min(most / 2)));
    let mut rest = rest.strip_suffix(b"\n").unwrap_or(rest);
    let room = most - head.len() - 2;
    let mut piece = Vec::with_capacity(most);
    loop {
        let last = rest.len() <= room + 1;
        let (now, later) = rest.split_at(if last { rest.len() } else { boundary(rest, room) });
        piece.clear();
        piece.extend_from_slice(head);
        piece.extend_from_slice(now);
        piece.extend_from_slice(if last { b"\n" } else { b"\\\n" });
        put(&piece)?;
        if last {
            return Ok(());
        }
        rest = later;
    }
}

/// The last place not after `at` where no character is cut in two.
fn boundary(text: &[u8], at: usize) -> usize {
    let is_inside = |b: u8| b & 0xc0 == 0x80;
    (at.saturating_sub(3)..=at).rev().find(|&i| !is_inside(text[i])).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_comes_in_pieces_that_make_it_whole_again() {
        for length in (0..400).chain([9000]) {
            let text: String = "aäb€".chars().cycle().take(length).collect();
            let line = format!("HEAD {text}\n");
            let mut joined = String::new();
            let mut count = 0;
            let end = pieces(line.as_bytes(), 5, 64, |piece| {
                assert!(piece.len() <= 64, "{}", piece.len());
                let piece = std::str::from_utf8(piece).expect("no character is cut");
                let part = piece.strip_prefix("HEAD ").expect("each has the head").strip_suffix('\n').expect("a line");
                joined += part.strip_suffix('\\').unwrap_or(part);
                count += 1;
                Ok(())
            });
            assert!(end.is_ok());
            assert_eq!(joined, text);
            assert!(count >= line.len() / 64);
        }
    }

    #[test]
    fn a_long_head_is_cut_between_two_characters() {
        for pad in ["", "a", "aa"] {
            let head = format!("{pad}{}", "€".repeat(50));
            let end = pieces(format!("{head}{}\n", "x".repeat(100)).as_bytes(), head.len(), 64, |piece| {
                std::str::from_utf8(piece).expect("no character is cut");
                Ok(())
            });
            assert!(end.is_ok());
        }
    }
}
