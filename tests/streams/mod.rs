//! Standard streams that go elsewhere for a while: files that keep all that was written, pipes that can be full.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    // Descriptors are moved about.
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

use crate::common::raw;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;

/// # Panics
/// If std's standard output cannot be flushed.
#[track_caller]
pub fn flush() {
    std::io::stdout().flush().expect("flushed");
}

/// A standard stream that goes somewhere else, until dropped. Those of one stream are dropped in reverse.
pub struct Redirected {
    stream: i32,
    aside: OwnedFd,
}

impl Redirected {
    pub fn new(stream: i32, to: i32) -> Redirected {
        if stream == 1 {
            flush();
        }
        // SAFETY: numbers only.
        let aside = unsafe { libc::fcntl(stream, libc::F_DUPFD_CLOEXEC, 10) };
        assert!(aside >= 10, "errno {}", raw::errno());
        // SAFETY: the kernel just gave us this number.
        let aside = unsafe { OwnedFd::from_raw_fd(aside) };
        // SAFETY: numbers only; put back when dropped.
        unsafe { libc::dup2(to, stream) };
        Redirected { stream, aside }
    }
}

impl Drop for Redirected {
    fn drop(&mut self) {
        // Of a test that has failed, the stream may be a full pipe.
        if self.stream == 1 && !thread::panicking() {
            flush();
        }
        // SAFETY: numbers only.
        unsafe { libc::dup2(self.aside.as_raw_fd(), self.stream) };
    }
}

/// A file of which every write goes to the end, and what is in it.
pub struct Capture(File);

impl Capture {
    pub fn new() -> Capture {
        let file = File::from(raw::memfd());
        // SAFETY: numbers only.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_APPEND) };
        Capture(file)
    }

    pub fn on(&self, stream: i32) -> Redirected {
        Redirected::new(stream, self.0.as_raw_fd())
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut file = &self.0;
        file.rewind().and_then(|()| file.read_to_string(&mut text)).expect("the file can be read");
        text
    }

    /// How often each `<word>` is in it.
    pub fn words(&self) -> BTreeMap<String, u32> {
        let mut count = BTreeMap::new();
        for word in self.text().split('<').skip(1) {
            let word = word.split('>').next().unwrap_or_default();
            *count.entry(word.to_owned()).or_default() += 1;
        }
        count
    }
}

/// What fd 2 gets while `f` runs.
pub fn stderr_of(f: impl FnOnce()) -> String {
    let capture = Capture::new();
    let redirected = capture.on(2);
    let end = catch_unwind(AssertUnwindSafe(f));
    drop(redirected);
    let text = capture.text();
    eprint!("{text}");
    if let Err(payload) = end {
        resume_unwind(payload);
    }
    text
}

/// A pipe; reading never waits.
pub struct Pipe {
    read: File,
    pub write: OwnedFd,
}

impl Pipe {
    pub fn new() -> Pipe {
        let mut ends = [0; 2];
        // SAFETY: room for two numbers.
        assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
        // SAFETY: numbers only.
        unsafe { libc::fcntl(ends[0], libc::F_SETFL, libc::O_NONBLOCK) };
        // SAFETY: the kernel just gave us these.
        let [read, write] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
        Pipe { read: read.into(), write }
    }

    pub fn on(&self, stream: i32) -> Redirected {
        Redirected::new(stream, self.write.as_raw_fd())
    }

    /// With dots, until it takes no more.
    pub fn fill(&self) {
        let fd = self.write.as_raw_fd();
        // SAFETY: numbers only.
        unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) };
        let filling = [b'.'; 4096];
        // SAFETY: pointer and length of the array.
        while unsafe { libc::write(fd, filling.as_ptr().cast(), filling.len()) } > 0 {}
        // SAFETY: numbers only.
        unsafe { libc::fcntl(fd, libc::F_SETFL, 0) };
    }

    /// All that is in it now, but dots.
    pub fn drain(&self) -> String {
        let mut bytes = Vec::new();
        // Ends with EAGAIN.
        drop((&self.read).read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).replace('.', "")
    }
}
