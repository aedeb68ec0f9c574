//! Reading, writing and seeking through a care-fd, where the value can do that by a shared reference: files, pipes, sockets.

use crate::carefd::CareFd;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};

/// As the value's own. So `BufReader::new(care_fd)` works.
///
/// ```
/// use std::io::{BufRead, BufReader, Write};
/// let mut child = carefork::Command::new("cat")
///     .stdin(carefork::Stdio::piped())
///     .stdout(carefork::Stdio::piped())
///     .spawn()?;
/// let (mut to, from) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
/// writeln!(to, "there and back")?;
/// drop(to);
/// assert_eq!(BufReader::new(from).lines().next().expect("a line")?, "there and back");
/// # child.wait()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Panics
/// If this child closed it; so do all of these.
impl<T: AsFd + Into<OwnedFd>> Read for CareFd<T>
where
    for<'a> &'a T: Read,
{
    #[track_caller]
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&**self).read(buf)
    }

    #[track_caller]
    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&**self).read_vectored(bufs)
    }

    #[track_caller]
    fn read_to_end(&mut self, buf: &mut Vec<u8>) -> io::Result<usize> {
        (&**self).read_to_end(buf)
    }

    #[track_caller]
    fn read_to_string(&mut self, buf: &mut String) -> io::Result<usize> {
        (&**self).read_to_string(buf)
    }
}

/// As the value's own.
impl<T: AsFd + Into<OwnedFd>> Write for CareFd<T>
where
    for<'a> &'a T: Write,
{
    #[track_caller]
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (&**self).write(buf)
    }

    #[track_caller]
    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        (&**self).write_vectored(bufs)
    }

    #[track_caller]
    fn flush(&mut self) -> io::Result<()> {
        (&**self).flush()
    }
}

/// As the value's own.
impl<T: AsFd + Into<OwnedFd>> Seek for CareFd<T>
where
    for<'a> &'a T: Seek,
{
    #[track_caller]
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        (&**self).seek(to)
    }
}

/// Through a shared reference.
impl<T: AsFd + Into<OwnedFd>> Read for &CareFd<T>
where
    for<'a> &'a T: Read,
{
    #[track_caller]
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&***self).read(buf)
    }
}

/// Through a shared reference.
impl<T: AsFd + Into<OwnedFd>> Write for &CareFd<T>
where
    for<'a> &'a T: Write,
{
    #[track_caller]
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (&***self).write(buf)
    }

    #[track_caller]
    fn flush(&mut self) -> io::Result<()> {
        (&***self).flush()
    }
}
