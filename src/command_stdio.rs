//! Standard streams of a program: what to give it, and reading what it says.

use crate::carefd::CareFd;
use crate::command_error::{CommandError, Step};
use crate::reap::child::Child;
use crate::sys;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::process::Output;

/// What a program's standard stream is; see [`Command::stdin`](crate::Command::stdin).
///
/// Anything that owns a descriptor can be one: `Stdio::from(file)`.
#[derive(Debug)]
pub struct Stdio(pub(crate) Kind);

#[derive(Debug)]
pub(crate) enum Kind {
    Inherit,
    Null,
    Piped,
    Own(OwnedFd),
    Care(CareFd<OwnedFd>),
}

impl Stdio {
    /// This process's own, as it is: closed if it is closed here.
    pub fn inherit() -> Stdio {
        Stdio(Kind::Inherit)
    }

    /// /dev/null.
    pub fn null() -> Stdio {
        Stdio(Kind::Null)
    }

    /// A pipe, the other end of which is in the [`Child`].
    pub fn piped() -> Stdio {
        Stdio(Kind::Piped)
    }
}

impl<T: Into<OwnedFd>> From<T> for Stdio {
    fn from(owner: T) -> Stdio {
        Stdio(Kind::Own(owner.into()))
    }
}

/// Stays a care-fd, for as long as the command has it: another program's output, say, from [`Child::stdout`].
impl<T: AsFd + Into<OwnedFd>> From<CareFd<T>> for Stdio
where
    OwnedFd: From<T>,
{
    fn from(owner: CareFd<T>) -> Stdio {
        Stdio(Kind::Care(owner.cast()))
    }
}

/// What is open for the program's sake until it has started, and this process's ends of the pipes.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    /// To be numbers 0, 1 and 2; `None` as in this process.
    pub(crate) given: [Option<RawFd>; 3],
    theirs: Vec<Theirs>,
    stdin: Option<CareFd<PipeWriter>>,
    outputs: [Option<CareFd<PipeReader>>; 2],
}

const CLOSED_HERE: &str = "a standard stream is to be a care-fd that this child's clean-up has closed";

/// Held, not looked at.
#[derive(Debug)]
enum Theirs {
    File(#[allow(dead_code)] CareFd<File>),
    Reader(#[allow(dead_code)] CareFd<PipeReader>),
    Writer(#[allow(dead_code)] CareFd<PipeWriter>),
}

impl Streams {
    pub(crate) fn open(wanted: [&Kind; 3]) -> Result<Streams, CommandError> {
        let mut streams = Streams::default();
        for (n, kind) in wanted.into_iter().enumerate() {
            streams.given[n] = match kind {
                Kind::Inherit => None,
                Kind::Own(fd) => Some(fd.as_raw_fd()),
                Kind::Care(fd) => match fd.get() {
                    Some(fd) => Some(fd.as_raw_fd()),
                    None => return Err(CommandError::Invalid(CLOSED_HERE.into())),
                },
                Kind::Null => Some(streams.null(n).map_err(|e| CommandError::step(Step::Null, e))?),
                Kind::Piped => Some(streams.pipe(n).map_err(|e| CommandError::step(Step::Pipe, e))?),
            };
        }
        Ok(streams)
    }

    fn null(&mut self, n: usize) -> io::Result<RawFd> {
        let open = || File::options().read(n == 0).write(n != 0).open("/dev/null");
        let file = CareFd::open_cloexec(open)?;
        let number = file.as_raw_fd();
        self.theirs.push(Theirs::File(file));
        Ok(number)
    }

    fn pipe(&mut self, n: usize) -> io::Result<RawFd> {
        let (from, to) = CareFd::open_pair(io::pipe)?;
        let number = if n == 0 { from.as_raw_fd() } else { to.as_raw_fd() };
        if n == 0 {
            self.stdin = Some(to);
            self.theirs.push(Theirs::Reader(from));
        } else {
            self.outputs[n - 1] = Some(from);
            self.theirs.push(Theirs::Writer(to));
        }
        Ok(number)
    }

    /// The program has its ends now.
    pub(crate) fn hand_over(self, child: &mut Child) {
        child.stdin = self.stdin;
        let [stdout, stderr] = self.outputs;
        child.stdout = stdout;
        child.stderr = stderr;
    }
}

impl Child {
    /// Closes its `stdin`, reads its `stdout` and `stderr`, where they are pipes and still here, to their ends, and waits for it.
    ///
    /// Reads whichever has something, so a child that fills one while the other is read goes on. The ends of pipes come when nobody
    /// writes to them any more: a program that the child left behind with them keeps this waiting. As in std.
    ///
    /// # Errors
    /// As for [`Child::wait`]; as read(2). The child is reaped later then, as a dropped one is.
    ///
    /// ```
    /// use carefork::{Command, Stdio};
    /// use std::io::Write;
    /// let mut child = Command::new("sort").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    /// child.stdin.as_mut().expect("it was asked for").write_all(b"b\na\n")?;
    /// let output = child.wait_with_output()?;
    /// assert!(output.status.success() && output.stdout == b"a\nb\n");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_with_output(mut self) -> io::Result<Output> {
        // What the pipe has is the parent's.
        self.check_parent()?;
        drop(self.stdin.take());
        let (stdout, stderr) = read_both(self.stdout.take(), self.stderr.take())?;
        let status = self.wait()?;
        Ok(Output { status, stdout, stderr })
    }
}

/// Reads both to their ends, whichever has something: a program that waits for one to be read while it fills the other goes on.
fn read_both(out: Option<CareFd<PipeReader>>, err: Option<CareFd<PipeReader>>) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let mut pipes = [out, err];
    let mut texts = [Vec::new(), Vec::new()];
    // As much as a full pipe has.
    let mut part = vec![0; 1 << 16];
    while pipes.iter().any(Option::is_some) {
        let ready = sys::poll_either([0, 1].map(|i: usize| pipes[i].as_ref().map(AsFd::as_fd)))?;
        for i in [0, 1] {
            let (true, Some(pipe)) = (ready[i], &pipes[i]) else { continue };
            match (&**pipe).read(&mut part) {
                Ok(0) => pipes[i] = None,
                Ok(n) => texts[i].extend_from_slice(&part[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
    let [out, err] = texts;
    Ok((out, err))
}
