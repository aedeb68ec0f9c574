//! F1-F6: care-fds in the process that opened them and in its children.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../kit/mod.rs"]
mod kit;

#[cfg(debug_assertions)]
mod behind;
mod cleaning;
mod reuse;
mod threads;
mod wrapping;

use carefork::{CareFd, postfork_child_noexec};
use common::{Verdict, check, reap};
use kit::{SOON, foreign};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

fn null() -> io::Result<File> {
    File::open("/dev/null")
}

fn care() -> CareFd<File> {
    CareFd::open(null).expect("/dev/null")
}

/// A foreign fork whose child cleans up, then runs `f`.
fn in_noexec_child(f: impl FnOnce()) {
    let pid = foreign(|| {
        // SAFETY: no borrowed descriptor of a care-fd is used afterwards.
        check(90, unsafe { postfork_child_noexec() }.is_ok());
        f();
        0
    });
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// Puts `file` at a number of our choice.
fn at(number: RawFd) -> io::Result<File> {
    let file = null()?;
    // SAFETY: the kernel takes the lowest free number from there.
    let fd = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this number.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// A name for `fd` that lets its owner be dropped in the child.
fn borrowed(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: open wherever it is used.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: only asks.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

fn cloexec(fd: RawFd) -> bool {
    // SAFETY: only asks.
    unsafe { libc::fcntl(fd, libc::F_GETFD) & libc::FD_CLOEXEC != 0 }
}

fn close(fd: RawFd) {
    // SAFETY: this is the misuse under test.
    assert_eq!(unsafe { libc::close(fd) }, 0);
}

/// The file that a panic names.
fn panic_place(f: impl FnOnce()) -> String {
    static PLACE: std::sync::Mutex<String> = std::sync::Mutex::new(String::new());
    std::panic::set_hook(Box::new(|info| {
        info.location().expect("always there").file().clone_into(&mut PLACE.lock().expect("not poisoned"));
    }));
    catch_unwind(AssertUnwindSafe(f)).expect_err("it must panic");
    drop(std::panic::take_hook());
    PLACE.lock().expect("not poisoned").clone()
}

fn panic_text(f: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("it must panic");
    panic.downcast_ref::<String>().expect("a formatted message").clone()
}
