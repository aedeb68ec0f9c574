//! What the tests of audits share: files to look at, what an audit says of one, and a look from another process.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

use crate::common::temp_dir;
use crate::kit::code;
use carefork::Audit;
use carefork::audit::Descriptor;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

/// What a system call made.
#[track_caller]
pub fn own(fd: impl TryInto<RawFd>) -> OwnedFd {
    let fd = fd.try_into().ok().expect("a number");
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel just gave us this number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A directory that goes with the value.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        let path = temp_dir().join(format!("carefork-audit-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a directory of our own");
        Scratch(path)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("it was there");
    }
}

pub fn set_cloexec(fd: impl AsFd, on: bool) {
    // SAFETY: an integer argument.
    assert_eq!(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETFD, i32::from(on)) }, 0);
}

#[track_caller]
pub fn find(audit: &Audit, fd: &impl AsRawFd) -> Descriptor {
    let number = fd.as_raw_fd();
    audit.descriptors.iter().find(|d| d.number == number).cloned().unwrap_or_else(|| panic!("{number} of\n{audit}"))
}

/// Runs `f` in a child that has cleaned up; a panic there is one here.
#[track_caller]
pub fn in_child(f: impl FnOnce()) {
    // SAFETY: no descriptor of a care-fd is used in the child.
    let mut child = unsafe {
        carefork::spawn(|| {
            f();
            0
        })
    }
    .expect("a child");
    assert_eq!(code(&mut child), 0);
}
