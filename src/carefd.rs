//! Care-fds: descriptors that must not linger in a child (F1-F6).

#![allow(unsafe_code)]

#[cfg(debug_assertions)]
use crate::care_table;
use crate::care_table::{Kind, State, TABLE};
use crate::region::{NoForking, no_forking};
use crate::{runtime, sys};
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// When a care-fd is closed in a child.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnFork {
    /// By the clean-up of a child that does not exec; exec closes it in the others.
    #[default]
    Cleanup,
    /// At the fork, in every child at once: what POSIX.1-2024 calls `FD_CLOFORK`, which Linux lacks.
    Close,
}

impl OnFork {
    fn kind(self) -> Kind {
        match self {
            OnFork::Cleanup => Kind::Cleanup,
            OnFork::Close => Kind::Close,
        }
    }
}

/// Owns a descriptor that is closed in children: at exec, by the clean-up of a child that does not exec, or at the fork.
///
/// Wraps whatever owns one descriptor and does no more on drop than close it: `OwnedFd`, `File`, `TcpListener`, `UnixStream`.
/// It derefs to that, immutably only: the descriptor must stay the one that was registered. Costs eight bytes beside the value.
///
/// In a child where it was closed the value knows (F4): dropping it does nothing, [`CareFd::get`] is `None`, and using it
/// panics, also when the number is in use again. One that the child keeps ([`ForkOptions::keep`](crate::ForkOptions::keep)) stays
/// registered there.
///
/// `T`'s `as_fd` must be the descriptor that it owns, the same for as long as it lives.
///
/// A close that blocks (a lingering socket, NFS) keeps forks waiting like any region: where that may be, take the value out
/// with [`CareFd::into_inner`] and drop it outside.
///
/// With debug assertions, a number that was closed or dup'ed over behind the owner's back is reported on fd 2 when the
/// `CareFd` is dropped, and is not closed again (F6). Objects that share one inode (eventfd, epoll) are not told apart.
///
/// ```
/// use carefork::CareFd;
/// let file = CareFd::open(|| std::fs::File::open("/dev/null"))?;
/// assert!(file.metadata()?.len() == 0);
/// # Ok::<(), std::io::Error>(())
/// ```
/// It cannot be swapped behind the registry's back:
/// ```compile_fail
/// let mut file = carefork::CareFd::open(|| std::fs::File::open("/dev/null")).unwrap();
/// *file = std::fs::File::open("/dev/zero").unwrap();
/// ```
/// ```
/// let mut file = carefork::CareFd::open(|| std::fs::File::open("/dev/null")).unwrap();
/// file = carefork::CareFd::open(|| std::fs::File::open("/dev/zero")).unwrap();
/// # drop(file);
/// ```
pub struct CareFd<T: AsFd + Into<OwnedFd>> {
    value: ManuallyDrop<T>,
    fd: RawFd,
    stamp: u32,
}

impl<T: AsFd + Into<OwnedFd>> CareFd<T> {
    /// Opens and registers in one region: no fork sees it half done. Close-on-exec is set on return, and from the start where
    /// `f` asks the kernel for it (std's functions do).
    ///
    /// `f` must not block, since forks wait for it: wait outside, and inside take what is there without waiting.
    ///
    /// # Errors
    /// What `f` says; an error that names the number if what `f` made is not open, or there is no memory for its word
    /// (64 KiB for each 16384 numbers). Nothing is registered then and nothing is left open. If `f` panics, the region ends
    /// like any.
    ///
    /// # Panics
    /// If there is no memory for the first region of a new thread.
    ///
    /// ```
    /// use carefork::CareFd;
    /// use std::io::ErrorKind::WouldBlock;
    /// use std::net::{TcpListener, TcpStream};
    ///
    /// let listener = CareFd::open(|| TcpListener::bind("127.0.0.1:0"))?;
    /// listener.set_nonblocking(true)?;
    /// // Connecting waits: outside, and adopted.
    /// let client = CareFd::new(TcpStream::connect(listener.local_addr()?)?)?;
    /// let connection = loop {
    ///     match CareFd::open(|| Ok(listener.accept()?.0)) {
    ///         // Here poll(2) or an event loop waits, outside.
    ///         Err(e) if e.kind() == WouldBlock => std::thread::yield_now(),
    ///         other => break other?,
    ///     }
    /// };
    /// # drop((client, connection));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[track_caller]
    pub fn open(f: impl FnOnce() -> io::Result<T>) -> io::Result<Self> {
        Self::open_on(OnFork::Cleanup, f)
    }

    /// [`CareFd::open`] where `f` asks the kernel for close-on-exec itself, as all of std does: saves the call that makes sure.
    ///
    /// What `f` opened without it leaks into programs that other threads start; builds with debug assertions panic on it.
    ///
    /// # Errors
    /// As for [`CareFd::open`].
    ///
    /// ```
    /// let log = carefork::CareFd::open_cloexec(|| std::fs::File::open("/dev/null"))?;
    /// # drop(log);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[track_caller]
    pub fn open_cloexec(f: impl FnOnce() -> io::Result<T>) -> io::Result<Self> {
        let region = no_forking();
        let value = f()?;
        debug_assert!(
            sys::get_fd_flags(value.as_fd().as_raw_fd()).is_ok_and(|flags| flags & libc::FD_CLOEXEC != 0),
            "CareFd::open_cloexec: what the closure opened is not close-on-exec; open it so, or use CareFd::open"
        );
        Ok(region.care_cloexec(OnFork::Cleanup, value)?)
    }

    /// [`CareFd::open`] with a say in when children close it.
    ///
    /// # Errors
    /// As for [`CareFd::open`].
    #[track_caller]
    pub fn open_on(on: OnFork, f: impl FnOnce() -> io::Result<T>) -> io::Result<Self> {
        let region = no_forking();
        Ok(region.care_on(on, f()?)?)
    }

    /// Opens and registers two at once, such as a pair of sockets or a pipe.
    ///
    /// # Errors
    /// As for [`CareFd::open`]; both are closed then.
    ///
    /// ```
    /// let (a, b) = carefork::CareFd::open_pair(std::os::unix::net::UnixStream::pair)?;
    /// # drop((a, b));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[track_caller]
    pub fn open_pair<U: AsFd + Into<OwnedFd>>(f: impl FnOnce() -> io::Result<(T, U)>) -> io::Result<(Self, CareFd<U>)> {
        let region = no_forking();
        let (a, b) = f()?;
        Ok((region.care(a)?, region.care(b)?))
    }

    /// Opens and registers any number at once.
    ///
    /// # Errors
    /// As for [`CareFd::open`]; all are closed then.
    #[track_caller]
    pub fn open_all<I: IntoIterator<Item = T>>(f: impl FnOnce() -> io::Result<I>) -> io::Result<Vec<Self>> {
        let region = no_forking();
        f()?.into_iter().map(|t| Ok(region.care(t)?)).collect()
    }

    /// Adopts an open descriptor and sets close-on-exec. Children forked before this keep it.
    ///
    /// # Errors
    /// EBADF if it is not open, ENOMEM; the value comes back with the error.
    #[track_caller]
    pub fn new(value: T) -> Result<Self, AdoptError<T>> {
        no_forking().care(value)
    }

    /// [`CareFd::new`] with a say in when children close it.
    ///
    /// # Errors
    /// As for [`CareFd::new`].
    #[track_caller]
    pub fn new_on(on: OnFork, value: T) -> Result<Self, AdoptError<T>> {
        no_forking().care_on(on, value)
    }

    /// Hands the value over; it is not registered any more. Close-on-exec stays set.
    ///
    /// # Panics
    /// If this child closed it.
    #[track_caller]
    pub fn into_inner(self) -> T {
        let (fd, stamp) = (self.fd, self.stamp);
        // No closure: that would be where the panic comes from.
        match self.try_into_inner() {
            Some(value) => value,
            None => dead(fd, stamp),
        }
    }

    /// Hands the value over, or `None` if this child closed it.
    pub fn try_into_inner(self) -> Option<T> {
        let mut this = ManuallyDrop::new(self);
        let region = no_forking();
        if !TABLE.is_live(this.fd, this.stamp) {
            return None;
        }
        TABLE.unregister(this.fd, this.stamp);
        drop(region);
        // Said here, where the mistake can still be told from what the new owner does.
        let _said = still_ours(this.fd);
        // SAFETY: `this` is neither dropped nor used again.
        Some(unsafe { ManuallyDrop::take(&mut this.value) })
    }

    /// The same descriptor in another type's hands; it stays registered all the while.
    pub(crate) fn cast<U: AsFd + Into<OwnedFd> + From<T>>(self) -> CareFd<U> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is neither dropped nor used again.
        let value = U::from(unsafe { ManuallyDrop::take(&mut this.value) });
        CareFd { value: ManuallyDrop::new(value), fd: this.fd, stamp: this.stamp }
    }

    /// The value, or `None` if this child closed it.
    #[inline]
    pub fn get(&self) -> Option<&T> {
        self.is_open_here().then_some(&*self.value)
    }

    /// Whether this process still has it: false in a child that closed it.
    #[inline]
    pub fn is_open_here(&self) -> bool {
        TABLE.is_live(self.fd, self.stamp)
    }
}

/// The descriptor is not to be touched: it may be anybody's by now.
#[cold]
#[track_caller]
fn dead(fd: RawFd, stamp: u32) -> ! {
    let taken = match TABLE.state(fd, stamp) {
        State::Taken => "; its number is another care-fd's by now",
        State::Closed | State::Live => "",
    };
    if Kind::of(stamp) == Some(Kind::Close) {
        panic!(
            "care-fd {fd} was closed in this child at the fork (OnFork::Close){taken}; open it again, or register it \
             with OnFork::Cleanup and keep it with ForkOptions::keep"
        )
    }
    panic!(
        "care-fd {fd} was closed in this child by carefork's clean-up (OnFork::Cleanup){taken}; keep it with \
         ForkOptions::keep, or open it again"
    )
}

/// The registration stands with the care-fds; the region is the caller's.
impl NoForking {
    /// Registers what was opened inside this region, as [`CareFd::new`] does.
    ///
    /// # Errors
    /// As for [`CareFd::new`].
    ///
    /// ```
    /// let region = carefork::no_forking();
    /// let (a, b) = std::io::pipe()?;
    /// let (a, b) = (region.care(a)?, region.care(b)?);
    /// drop(region);
    /// # drop((a, b));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn care<T: AsFd + Into<OwnedFd>>(&self, value: T) -> Result<CareFd<T>, AdoptError<T>> {
        self.care_on(OnFork::Cleanup, value)
    }

    /// [`NoForking::care`] with a say in when children close it.
    ///
    /// # Errors
    /// As for [`CareFd::new`].
    pub fn care_on<T: AsFd + Into<OwnedFd>>(&self, on: OnFork, value: T) -> Result<CareFd<T>, AdoptError<T>> {
        let fd = value.as_fd().as_raw_fd();
        if let Err(error) = sys::set_cloexec(fd) {
            return Err(AdoptError { error, fd, value });
        }
        self.care_cloexec(on, value)
    }

    /// Registers what has close-on-exec set already.
    pub(crate) fn care_cloexec<T: AsFd + Into<OwnedFd>>(
        &self,
        on: OnFork,
        value: T,
    ) -> Result<CareFd<T>, AdoptError<T>> {
        let fd = value.as_fd().as_raw_fd();
        if on == OnFork::Close {
            runtime::will_close_at_fork();
        }
        let registered =
            if runtime::is_young() { TABLE.register_young(fd, on.kind()) } else { TABLE.register(fd, on.kind()) };
        match registered {
            Ok(stamp) => Ok(CareFd { value: ManuallyDrop::new(value), fd, stamp }),
            Err(error) => Err(AdoptError { error, fd, value }),
        }
    }
}

impl<T: AsFd + Into<OwnedFd>> Drop for CareFd<T> {
    fn drop(&mut self) {
        let _region = no_forking();
        let (fd, value) = (self.fd, &mut self.value);
        // Not live: closed by this child. The number may be anybody's then, and T does no more on drop than close it.
        TABLE.unregister_and(fd, self.stamp, || {
            if still_ours(fd) {
                // SAFETY: dropped once, here; `self` is not used afterwards.
                unsafe { ManuallyDrop::drop(value) };
            }
        });
    }
}

impl<T: AsFd + Into<OwnedFd>> Deref for CareFd<T> {
    type Target = T;

    /// # Panics
    /// If this child closed it.
    #[inline]
    #[track_caller]
    fn deref(&self) -> &T {
        match self.get() {
            Some(value) => value,
            None => dead(self.fd, self.stamp),
        }
    }
}

impl<T: AsFd + Into<OwnedFd>> AsFd for CareFd<T> {
    /// # Panics
    /// If this child closed it.
    #[inline]
    #[track_caller]
    fn as_fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
    }
}

impl<T: AsFd + Into<OwnedFd>> AsRawFd for CareFd<T> {
    /// # Panics
    /// If this child closed it.
    #[inline]
    #[track_caller]
    fn as_raw_fd(&self) -> RawFd {
        (**self).as_fd().as_raw_fd()
    }
}

impl<T: AsFd + Into<OwnedFd> + fmt::Debug> fmt::Debug for CareFd<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.get() {
            Some(value) => f.debug_tuple("CareFd").field(value).finish(),
            None => write!(f, "CareFd(<{} closed in this child>)", self.fd),
        }
    }
}

/// A descriptor could not be registered; it comes back untouched but for close-on-exec.
pub struct AdoptError<T> {
    /// What the kernel said.
    pub error: io::Error,
    /// The value that was to be adopted.
    pub value: T,
    fd: RawFd,
}

impl<T> fmt::Debug for AdoptError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdoptError").field("fd", &self.fd).field("error", &self.error).finish_non_exhaustive()
    }
}

impl<T> fmt::Display for AdoptError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "descriptor {} cannot become a care-fd: {}", self.fd, self.error)?;
        if self.error.raw_os_error() == Some(libc::EBADF) {
            f.write_str(": it is not open; was it closed by its number?")?;
        }
        Ok(())
    }
}

impl<T> std::error::Error for AdoptError<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// For `?`. The value is dropped, unless its number is not open: closing that could only hit a stranger's.
///
/// The text names the number; the kernel's error is its [`source`](std::error::Error::source).
impl<T> From<AdoptError<T>> for io::Error {
    fn from(e: AdoptError<T>) -> io::Error {
        let AdoptError { error, value, fd } = e;
        if error.raw_os_error() == Some(libc::EBADF) {
            std::mem::forget(value);
        }
        io::Error::new(error.kind(), AdoptError { error, value: (), fd })
    }
}

/// Whether the number is still ours to close; if not, that is said on fd 2 (F6). Only builds that can spare the system calls look.
#[cfg(debug_assertions)]
fn still_ours(fd: RawFd) -> bool {
    use care_table::{Behind, report};
    match TABLE.look_behind(fd) {
        Behind::Nothing => return true,
        Behind::Closed => report(fd, "was closed behind carefork's back"),
        Behind::Replaced => report(fd, "was replaced behind carefork's back: it is left open"),
    }
    false
}

#[cfg(not(debug_assertions))]
fn still_ours(_: RawFd) -> bool {
    true
}

/// For the bench: a region and the word, without a descriptor.
#[cfg(feature = "testing")]
pub fn bench_register(fd: RawFd) -> u32 {
    let _region = no_forking();
    TABLE.register(fd, Kind::Cleanup).unwrap_or(0)
}

/// For the bench: the other half.
#[cfg(feature = "testing")]
pub fn bench_unregister(fd: RawFd, stamp: u32) {
    let _region = no_forking();
    TABLE.unregister(fd, stamp);
}
