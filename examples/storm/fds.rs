//! Descriptors: opened and dropped without pause, and what a child should find of them.

// The plain half closes by hand.
#![allow(unsafe_code, clippy::disallowed_methods)]

use crate::args::Half;
use crate::board::Slot;
use carefork::{CareFd, OnFork};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

/// More than this program ever opens.
const MAX: usize = 4096;

// What a number stands for: 0 for nothing that the table knows of, else one of these in the low two bits.
/// An ordinary descriptor, meant for children too; the rest is its inode.
const ORDINARY: u64 = 1;
/// The plain half's record of what its children close.
const CARE: u64 = 2;
/// Gone in every child from the start.
const CLOSED_AT_FORK: u64 = 3;

/// What this process has on record about its descriptors. Under carefork each entry changes in the same region in which the
/// descriptor does, so a child finds it exact. The plain half can only do its best: on record after the opening, off it before
/// the close.
pub(crate) struct Table {
    half: Half,
    numbers: [AtomicU64; MAX],
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("half", &self.half).finish_non_exhaustive()
    }
}

impl Table {
    /// Whatever is open now (a shell may have left something) is for children too.
    pub(crate) fn new(half: Half) -> io::Result<Table> {
        let table = Table { half, numbers: [const { AtomicU64::new(0) }; MAX] };
        for fd in open_numbers()? {
            if let Some(inode) = inode(fd) {
                table.set(fd, inode << 2 | ORDINARY)?;
            }
        }
        Ok(table)
    }

    fn set(&self, fd: RawFd, what: u64) -> io::Result<()> {
        let entry = usize::try_from(fd).ok().and_then(|i| self.numbers.get(i));
        entry.ok_or(io::ErrorKind::QuotaExceeded)?.store(what, SeqCst);
        Ok(())
    }

    /// A region under carefork, nothing in the plain half.
    pub(crate) fn region(&self) -> Option<carefork::NoForking> {
        (self.half == Half::Carefork).then(carefork::no_forking)
    }

    pub(crate) fn open<T: AsFd + Into<OwnedFd>>(
        &'static self,
        f: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<Held<T>> {
        match self.half {
            Half::Carefork => CareFd::open(f).map(Held::Care),
            Half::Plain => f().and_then(|t| self.record(t)),
        }
    }

    pub(crate) fn open_pair<T: AsFd + Into<OwnedFd>, U: AsFd + Into<OwnedFd>>(
        &'static self,
        f: impl FnOnce() -> io::Result<(T, U)>,
    ) -> io::Result<(Held<T>, Held<U>)> {
        match self.half {
            Half::Carefork => CareFd::open_pair(f).map(|(t, u)| (Held::Care(t), Held::Care(u))),
            Half::Plain => f().and_then(|(t, u)| Ok((self.record(t)?, self.record(u)?))),
        }
    }

    fn record<T: AsFd + Into<OwnedFd>>(&'static self, value: T) -> io::Result<Held<T>> {
        let fd = value.as_fd().as_raw_fd();
        self.set(fd, CARE)?;
        Ok(Held::Plain { value, _record: Record { table: self, fd } })
    }

    /// One that is closed in every child at the fork itself.
    pub(crate) fn open_closed_at_fork(
        &'static self,
        f: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<ClosedAtFork> {
        let _region = self.region();
        let fd = match self.half {
            Half::Carefork => Held::Care(CareFd::open_on(OnFork::Close, f)?),
            Half::Plain => f().and_then(|t| self.record(t))?,
        };
        self.set(fd.number(), CLOSED_AT_FORK)?;
        Ok(ClosedAtFork { table: self, fd: Some(fd) })
    }

    /// One that children are to have as well: on a number that was a care-fd's a moment ago, as like as not.
    pub(crate) fn open_ordinary(&'static self, f: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<Ordinary> {
        let _region = self.region();
        let fd = f()?;
        let inode = inode(fd.as_raw_fd()).ok_or(io::ErrorKind::NotFound)?;
        self.set(fd.as_raw_fd(), inode << 2 | ORDINARY)?;
        Ok(Ordinary { table: self, fd: Some(fd) })
    }

    /// What the plain half's child has instead of carefork's clean-up.
    pub(crate) fn close_recorded(&self, keep: Option<RawFd>) {
        for (fd, entry) in (0..).zip(&self.numbers) {
            if matches!(entry.load(Relaxed), CARE | CLOSED_AT_FORK) && keep != Some(fd) {
                // SAFETY: this child never uses or drops the values that own what is on record: it ends by _exit.
                unsafe { libc::close(fd) };
            }
        }
    }

    /// In a child that has not cleaned up yet: how many are open that the fork itself should have closed.
    pub(crate) fn survivors(&self, slot: &Slot) {
        for (fd, entry) in (0..).zip(&self.numbers) {
            if entry.load(Relaxed) != CLOSED_AT_FORK {
                continue;
            }
            // This child may open something else by that number, and fork.
            entry.store(0, Relaxed);
            if inode(fd).is_some() {
                slot.leaked.fetch_add(1, Relaxed);
                slot.note(&format!("fd {fd} survived the fork: {}", target(fd)));
            }
        }
    }

    /// In a child after its clean-up: compares what is open with what should be; `own` are this child's.
    pub(crate) fn check(&self, own: &[RawFd], slot: &Slot) -> io::Result<()> {
        for fd in open_numbers()? {
            let (Some(inode), Ok(i)) = (inode(fd), usize::try_from(fd)) else { continue };
            let entry = self.numbers.get(i).map_or(0, |e| e.load(Relaxed));
            if entry & 3 == ORDINARY {
                if entry >> 2 != inode {
                    slot.wrong.fetch_add(1, Relaxed);
                    slot.note(&format!("fd {fd} is not what it was but {}", target(fd)));
                }
            } else if !own.contains(&fd) && (self.half == Half::Carefork || !target(fd).contains(ORDINARY_NAME)) {
                slot.leaked.fetch_add(1, Relaxed);
                slot.note(&format!("fd {fd} leaked: {}", target(fd)));
            }
        }
        let wanted = (0..).zip(&self.numbers).filter(|(_, e)| e.load(Relaxed) & 3 == ORDINARY).map(|(fd, _)| fd);
        // Asked of the kernel again: the listing's own number may have been one that is gone.
        for fd in wanted.chain(own.iter().copied()).filter(|&fd| inode(fd).is_none()) {
            slot.wrong.fetch_add(1, Relaxed);
            slot.note(&format!("fd {fd} is gone"));
        }
        Ok(())
    }
}

/// A descriptor that a child must not keep.
#[derive(Debug)]
pub(crate) enum Held<T: AsFd + Into<OwnedFd>> {
    Care(CareFd<T>),
    /// The record goes before the descriptor does, or another thread's would be struck off.
    Plain {
        _record: Record,
        value: T,
    },
}

impl<T: AsFd + Into<OwnedFd>> Held<T> {
    pub(crate) fn get(&self) -> &T {
        match self {
            Held::Care(t) => t,
            Held::Plain { value, .. } => value,
        }
    }

    pub(crate) fn number(&self) -> RawFd {
        self.get().as_fd().as_raw_fd()
    }

    /// In a child after its clean-up: the value says that it is gone.
    pub(crate) fn knows(&self) -> bool {
        match self {
            Held::Care(t) => !t.is_open_here() && t.get().is_none(),
            Held::Plain { .. } => true,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Record {
    table: &'static Table,
    fd: RawFd,
}

impl Drop for Record {
    fn drop(&mut self) {
        drop(self.table.set(self.fd, 0));
    }
}

#[derive(Debug)]
pub(crate) struct ClosedAtFork {
    table: &'static Table,
    fd: Option<Held<OwnedFd>>,
}

impl Drop for ClosedAtFork {
    fn drop(&mut self) {
        let _region = self.table.region();
        if let Some(fd) = self.fd.take() {
            drop(self.table.set(fd.number(), 0));
            drop(fd);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Ordinary {
    table: &'static Table,
    fd: Option<OwnedFd>,
}

impl Drop for Ordinary {
    fn drop(&mut self) {
        let _region = self.table.region();
        if let Some(fd) = self.fd.take() {
            drop(self.table.set(fd.as_raw_fd(), 0));
            drop(fd);
        }
    }
}

/// What the plain half's ordinary memfds are called: one that is not on record yet is no leak.
const ORDINARY_NAME: &str = "storm-ordinary";

/// A file in memory, of an inode of its own.
pub(crate) fn memfd(ordinary: bool) -> io::Result<OwnedFd> {
    let name = if ordinary { c"storm-ordinary" } else { c"storm-care" };
    Ok(nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?)
}

/// All open descriptors, and the number by which they were listed, which is closed again.
fn open_numbers() -> io::Result<Vec<RawFd>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        numbers.extend(entry?.file_name().to_str().and_then(|n| n.parse::<RawFd>().ok()));
    }
    Ok(numbers)
}

fn inode(fd: RawFd) -> Option<u64> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `stat` has room for what fstat writes; any number may be asked for.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: fstat succeeded, so it wrote all of it.
    Some(unsafe { stat.assume_init() }.st_ino)
}

fn target(fd: RawFd) -> String {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).map_or_else(|e| e.to_string(), |p| p.display().to_string())
}
