//! Descriptors that this process was started with (X3): socket activation, and numbers on the command line.
//!
//! A parent that opens the sockets itself can let clients connect before the program is ready, and needs no wait loop. It
//! names what it passes in one of two ways: systemd's variables ([`listen_fds`]), or a number in an option or argument ([`fd`]).
//! Either gives care-fds; `try_into` makes them the sockets they are meant to be, checked by family, type and whether
//! they listen.
//!
//! ```no_run
//! use carefork::{CareFd, inherited};
//! use std::net::TcpListener;
//!
//! for (name, fd) in inherited::listen_fds()? {
//!     let listener: CareFd<TcpListener> = fd.try_into()?;
//!     println!("{name}: {:?}", listener.local_addr());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it can know
//! A descriptor that was passed was open before anything of the program's own ran, which carefork notes then (for numbers below 1024), and has
//! close-on-exec clear, as no number has any more that this library gave out. Between the two it may have been closed by its number, and
//! have become somebody else's, who opened it without close-on-exec: take what was passed first thing in `main`, before other code makes
//! free with numbers. In a library that is loaded by dlopen, what is noted is what was open at its loading.

#![allow(unsafe_code)]

use crate::carefd::{CareFd, OnFork};
use crate::command_env::OWN;
use crate::locks::{Mutex, OnceLock};
use crate::region::no_forking;
use crate::{runtime, started_with, sys};
use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// The first number of socket activation.
const START: RawFd = 3;

/// Why a descriptor that was to be inherited was refused. Nothing was taken, and nothing was changed, but for
/// [`Os`](InheritError::Os).
#[derive(Debug)]
#[non_exhaustive]
pub enum InheritError {
    /// Not a decimal number of a descriptor.
    NotANumber {
        /// What it is.
        given: String,
    },
    /// 0, 1 or 2: standard streams are not passed in this way.
    StandardStream {
        /// Which.
        fd: RawFd,
    },
    /// No descriptor of that number is open.
    NotOpen {
        /// The number.
        fd: RawFd,
    },
    /// It was opened in this process: it was not there at the start, or close-on-exec is set.
    NotInherited {
        /// The number.
        fd: RawFd,
    },
    /// Whether a number above 1023 was there at the start is not noted.
    TooLarge {
        /// The number.
        fd: RawFd,
    },
    /// It was taken by an earlier call.
    Taken {
        /// The number.
        fd: RawFd,
    },
    /// [`listen_fds`] gave everything to an earlier call.
    TakenBefore,
    /// `LISTEN_PID` names another process.
    OtherProcess {
        /// Which.
        pid: u32,
        /// This one.
        own: u32,
    },
    /// A variable does not say what it should.
    Variable {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: OsString,
    },
    /// `LISTEN_FDNAMES` has more or fewer names than there are descriptors.
    Names {
        /// How many names.
        names: usize,
        /// How many descriptors.
        fds: usize,
    },
    /// This process was forked, without exec, from the one that was started with the descriptors: they are that one's.
    ForkedChild,
    /// It is there, and could not be made a care-fd. Those that [`listen_fds`] had taken before it were closed.
    Os {
        /// The number.
        fd: RawFd,
        /// What the kernel said.
        error: io::Error,
    },
}

impl fmt::Display for InheritError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InheritError::NotANumber { given } => {
                write!(f, "{given:?} is not the number of a descriptor: give decimal digits, 3 or more")
            }
            InheritError::StandardStream { fd } => {
                write!(f, "descriptor {fd} is a standard stream: pass the socket as 3 or more")
            }
            InheritError::NotOpen { fd } => write!(
                f,
                "descriptor {fd} is not open: check the number, and that the parent cleared close-on-exec on it"
            ),
            InheritError::NotInherited { fd } => write!(
                f,
                "descriptor {fd} was not inherited: this process has opened it; check the number, and that the parent passed it"
            ),
            InheritError::TooLarge { fd } => {
                write!(f, "descriptor {fd} is above {}: pass it as a smaller number", started_with::NOTED - 1)
            }
            InheritError::Taken { fd } => {
                write!(f, "descriptor {fd} has been taken already: hand on the care-fd from the first time")
            }
            InheritError::TakenBefore => {
                f.write_str("listen_fds has given its descriptors already: hand on the care-fds from the first time")
            }
            InheritError::OtherProcess { pid, own } => write!(
                f,
                "LISTEN_PID is {pid} and this is process {own}: the descriptors are another's; if this one was meant, let the program \
                 in between (a shell?) exec it"
            ),
            InheritError::Variable { name, value } => {
                write!(
                    f,
                    "{name}={value:?} is not what socket activation sets: it should be a decimal number above 0, or UTF-8 names"
                )
            }
            InheritError::Names { names, fds } => write!(
                f,
                "LISTEN_FDNAMES has {names} names and LISTEN_FDS is {fds}: name each descriptor, or unset LISTEN_FDNAMES"
            ),
            InheritError::ForkedChild => f.write_str(
                "this process was forked without exec; inherited descriptors are its ancestor's: take them there",
            ),
            InheritError::Os { fd, error } => write!(f, "descriptor {fd} cannot be taken: {error}"),
        }
    }
}

impl std::error::Error for InheritError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            InheritError::Os { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// For `?` in functions that return `io::Result`.
impl From<InheritError> for io::Error {
    fn from(e: InheritError) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidInput, e)
    }
}

/// What has left this module; numbers only, they may be anybody's by now.
struct Taken {
    fds: Vec<RawFd>,
    listen: bool,
}

static TAKEN: Mutex<Taken> = Mutex::new(Taken { fds: Vec::new(), listen: false });

/// The variables as they were when somebody first asked.
struct Variables {
    pid: Option<OsString>,
    fds: Option<OsString>,
    names: Option<OsString>,
}

fn variables() -> &'static Variables {
    static READ: OnceLock<Variables> = OnceLock::new();
    READ.get_or_init(|| Variables {
        pid: env::var_os("LISTEN_PID"),
        fds: env::var_os("LISTEN_FDS"),
        names: env::var_os("LISTEN_FDNAMES"),
    })
}

/// Everything passed by socket activation, with names, in the order of the numbers: by systemd's rules, once per process.
///
/// Nothing passed (no `LISTEN_PID`, no `LISTEN_FDS`) is an empty list. Without `LISTEN_FDNAMES` every name is `unknown`; names may
/// repeat. Close-on-exec is set. The variables are read at the first call and stay as they are: see [`remove_variables`].
///
/// Where systemd's `sd_listen_fds` says 0 because `LISTEN_PID` is another process's, this is an error: more often than not it means a
/// wrapper that forgot to `exec`. A program that may be started by an activated one, and listens by itself then, says so:
///
/// ```
/// use carefork::inherited::{self, InheritError};
///
/// let passed = match inherited::listen_fds() {
///     Err(InheritError::OtherProcess { .. }) => Vec::new(),
///     answer => answer?,
/// };
/// # assert!(passed.is_empty());
/// # Ok::<(), InheritError>(())
/// ```
///
/// # Errors
/// [`InheritError`]; all or nothing is taken.
///
/// # Panics
/// If there is no memory for the first region of a new thread.
pub fn listen_fds() -> Result<Vec<(String, CareFd<OwnedFd>)>, InheritError> {
    original()?;
    let mut taken = TAKEN.lock();
    let Some(Announced { count, names }) = announced(variables())? else { return Ok(Vec::new()) };
    if taken.listen {
        return Err(InheritError::TakenBefore);
    }
    let numbers = START..START + count as RawFd;
    // Before anything is allocated for what is not there.
    numbers.clone().try_for_each(|fd| taken.check(fd))?;
    taken.listen = true;
    taken.fds.extend(numbers.clone());
    let fds = numbers.map(take).collect::<Result<Vec<_>, _>>()?;
    let names = names.unwrap_or_else(|| vec!["unknown".to_owned(); count]);
    Ok(names.into_iter().zip(fds).collect())
}

/// One descriptor by its number, as a program gets it in an option or an argument: `--fd 7`.
///
/// Any kind is taken; `try_into` checks that it is the socket it is meant to be. Close-on-exec is set.
///
/// # Errors
/// [`InheritError`]; the descriptor is as it was.
///
/// # Panics
/// If there is no memory for the first region of a new thread.
///
/// ```
/// use carefork::inherited::{self, InheritError};
///
/// assert!(matches!(inherited::fd("seven"), Err(InheritError::NotANumber { .. })));
/// assert!(matches!(inherited::fd("2"), Err(InheritError::StandardStream { fd: 2 })));
/// assert!(matches!(inherited::fd("1000"), Err(InheritError::NotOpen { fd: 1000 })));
/// ```
pub fn fd(number: impl AsRef<OsStr>) -> Result<CareFd<OwnedFd>, InheritError> {
    let number = number.as_ref();
    let Some(fd) = decimal(number).and_then(|n| RawFd::try_from(n).ok()) else {
        return Err(InheritError::NotANumber { given: number.to_string_lossy().into_owned() });
    };
    if fd < START {
        return Err(InheritError::StandardStream { fd });
    }
    original()?;
    let mut taken = TAKEN.lock();
    taken.check(fd)?;
    let owned = take(fd)?;
    taken.fds.push(fd);
    Ok(owned)
}

/// Takes `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES` and `LISTEN_PIDFDID` out of the environment, so that no program started from here believes they
/// are meant for it. [`listen_fds`] works afterwards as before.
///
/// # Safety
/// As for [`std::env::remove_var`]: no other thread reads or writes the environment meanwhile, but through std.
///
/// ```
/// // SAFETY: no other thread has been started.
/// unsafe { carefork::inherited::remove_variables() };
/// assert!(std::env::var_os("LISTEN_FDS").is_none());
/// ```
pub unsafe fn remove_variables() {
    variables();
    // std's lock on the environment must not be held at a fork.
    let _region = no_forking();
    for name in OWN {
        // SAFETY: the caller's promise.
        unsafe { env::remove_var(name) };
    }
}

fn original() -> Result<(), InheritError> {
    if runtime::generation() == 0 { Ok(()) } else { Err(InheritError::ForkedChild) }
}

/// Digits only: `parse` would take a sign as well.
fn decimal(text: &OsStr) -> Option<u32> {
    let digits = text.to_str()?;
    if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
}

struct Announced {
    count: usize,
    names: Option<Vec<String>>,
}

/// What the variables announce for this process; `None` if nothing was passed.
fn announced(variables: &Variables) -> Result<Option<Announced>, InheritError> {
    let (Some(pid), Some(fds)) = (&variables.pid, &variables.fds) else { return Ok(None) };
    let wrong = |name, value: &OsString| InheritError::Variable { name, value: value.clone() };
    let pid = decimal(pid).filter(|&n| n > 0).ok_or_else(|| wrong("LISTEN_PID", pid))?;
    let own = sys::getpid();
    if pid != own {
        return Err(InheritError::OtherProcess { pid, own });
    }
    // More than the kernel can number would overflow.
    let count = decimal(fds).filter(|&n| n > 0 && n < 1 << 30).ok_or_else(|| wrong("LISTEN_FDS", fds))? as usize;
    let Some(names) = variables.names.as_ref().filter(|names| !names.is_empty()) else {
        return Ok(Some(Announced { count, names: None }));
    };
    let names = names.to_str().ok_or_else(|| wrong("LISTEN_FDNAMES", names))?;
    let names: Vec<String> = names.split(':').map(str::to_owned).collect();
    if names.len() != count {
        return Err(InheritError::Names { names: names.len(), fds: count });
    }
    Ok(Some(Announced { count, names: Some(names) }))
}

impl Taken {
    fn check(&self, fd: RawFd) -> Result<(), InheritError> {
        if self.fds.contains(&fd) {
            return Err(InheritError::Taken { fd });
        }
        match sys::get_fd_flags(fd) {
            Ok(flags) if flags & libc::FD_CLOEXEC != 0 => Err(InheritError::NotInherited { fd }),
            Ok(_) => match started_with::has(fd) {
                Some(true) => Ok(()),
                Some(false) => Err(InheritError::NotInherited { fd }),
                None => Err(InheritError::TooLarge { fd }),
            },
            Err(e) if e.raw_os_error() == Some(libc::EBADF) => Err(InheritError::NotOpen { fd }),
            Err(error) => Err(InheritError::Os { fd, error }),
        }
    }
}

fn take(fd: RawFd) -> Result<CareFd<OwnedFd>, InheritError> {
    // SAFETY: it is open and was at the start (`check`), and so is nobody's in this process until this module gives it away, once; unless unsafe
    // code has closed it by its number meanwhile, which it had no right to.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    no_forking().care_on(OnFork::Cleanup, owned).map_err(|refused| {
        // As it was: not closed.
        let _number = std::os::fd::IntoRawFd::into_raw_fd(refused.value);
        InheritError::Os { fd, error: refused.error }
    })
}
