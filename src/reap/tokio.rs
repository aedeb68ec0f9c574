//! Under tokio (feature `tokio`).

use super::exit::Exit;
use super::reaper::Reaper;
use super::timer::ASK_EVERY;
use crate::carefd::CareFd;
use crate::reap::child::Child;
use crate::{runtime, sys_reap};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Leaves tokio's epoll alone in a child, which shares it with the parent (C6).
struct Registered<T: AsRawFd> {
    fd: ManuallyDrop<AsyncFd<T>>,
    generation: u64,
}

impl<T: AsRawFd> Registered<T> {
    fn new(fd: T) -> io::Result<Self> {
        // SAFETY: both kinds of `T` here own or borrow one descriptor for as long as they live, and answer with no other.
        #[allow(unsafe_code)]
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Registered { fd: ManuallyDrop::new(fd), generation: runtime::generation() })
    }
}

impl<T: AsRawFd> Drop for Registered<T> {
    fn drop(&mut self) {
        if runtime::generation() == self.generation {
            // SAFETY: dropped once, here.
            #[allow(unsafe_code)]
            unsafe {
                ManuallyDrop::drop(&mut self.fd);
            }
        }
    }
}

impl Reaper {
    /// Dispatches for as long as it is polled: `tokio::spawn` it once. Ends when the reaper is closed; it keeps a handle, so dropping
    /// the others does not close it.
    ///
    /// # Errors
    /// As for [`Reaper::dispatch`]; as epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime, or in one without I/O enabled.
    ///
    /// ```
    /// # let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    /// # runtime.block_on(async {
    /// let reaper = carefork::Reaper::new()?;
    /// // SAFETY: the child uses nothing of the parent's.
    /// let end = reaper.exit_of(unsafe { carefork::spawn(|| 7) }?)?;
    /// let dispatching = tokio::spawn({
    ///     let reaper = reaper.clone();
    ///     async move { reaper.run().await }
    /// });
    /// assert_eq!(end.await?.code(), Some(7));
    /// # dispatching.abort();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub async fn run(&self) -> io::Result<()> {
        // What ends this when the reaper closes.
        self.shared().timer.make_ready(self.shared())?;
        let registered = Registered::new(self.clone())?;
        while !self.shared().is_closed() {
            let mut ready = registered.fd.readable().await?;
            self.dispatch()?;
            // Whatever comes from now on makes it ready again: dispatch leaves nothing that is.
            ready.clear_ready();
        }
        Ok(())
    }
}

impl Child {
    /// Waits for the child as [`Child::wait`] does, without holding up the thread; all about its end.
    ///
    /// One that was lost is an `Exit` too. Cancelled, the child is as before. Where there is no pidfd, it
    /// is asked for every 10 ms.
    ///
    /// # Errors
    /// ECHILD in a process that is not the parent; as epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime, or in one without I/O enabled.
    ///
    /// ```
    /// # let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    /// # runtime.block_on(async {
    /// // SAFETY: the child uses nothing of the parent's.
    /// let mut child = unsafe { carefork::spawn(|| 7) }?;
    /// assert_eq!(child.ended().await?.code(), Some(7));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub async fn ended(&mut self) -> io::Result<Exit> {
        // Of one that was waited for, too.
        self.check_parent()?;
        let mut told = false;
        loop {
            match (self.try_wait(), self.exit()) {
                (_, Some(exit)) => return Ok(exit.clone()),
                (Err(e), None) => return Err(e),
                (Ok(_), None) => {}
            }
            match self.pidfd() {
                Some(fd) if !told => {
                    let registered = Registered::new(fd)?;
                    drop(registered.fd.readable().await?);
                    // If it cannot be waited for then, a debugger waits first.
                    told = true;
                }
                _ => {
                    let alarm = CareFd::open_cloexec(sys_reap::timer)?;
                    sys_reap::timer_set(alarm.as_fd(), Some(ASK_EVERY));
                    let registered = Registered::new(alarm)?;
                    drop(registered.fd.readable().await?);
                }
            }
        }
    }
}
