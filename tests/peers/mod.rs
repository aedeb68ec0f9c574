//! Programs that nobody here wrote, and how they are started with descriptors.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

pub mod nbd;
pub mod qmp;

use carefork::{Child, Command, Stdio};
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// A program and what it is started with.
pub struct Program<'a> {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(&'a str, OsString)>,
    assign: Option<String>,
    activate: Vec<(&'a str, BorrowedFd<'a>)>,
    pass: Vec<(BorrowedFd<'a>, RawFd)>,
}

impl<'a> Program<'a> {
    /// # Panics
    /// If it is not installed.
    #[track_caller]
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let program = find(program.as_ref()).into();
        Program { program, args: vec![], env: vec![], assign: None, activate: vec![], pass: vec![] }
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    pub fn env(mut self, name: &'a str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name, value.as_ref().to_owned()));
        self
    }

    /// Passes a descriptor under a number.
    pub fn pass(mut self, fd: BorrowedFd<'a>, number: RawFd) -> Self {
        self.pass.push((fd, number));
        self
    }

    /// Passes a descriptor by socket activation.
    pub fn activate(mut self, name: &'a str, fd: BorrowedFd<'a>) -> Self {
        self.activate.push((name, fd));
        self
    }

    /// Variables of socket activation, right or wrong, as a shell would assign them: `$$` is the pid of the program.
    pub fn assign(mut self, assignments: impl Into<String>) -> Self {
        self.assign = Some(assignments.into());
        self
    }

    /// Starts it with its output in a pipe.
    #[track_caller]
    pub fn start(self) -> Running {
        let mut command = match &self.assign {
            None => Command::new(&self.program),
            Some(assignments) => {
                // The shell becomes the program: LISTEN_PID is known before there is one.
                let mut shell = Command::new("/bin/sh");
                shell.arg("-c").arg(format!("{assignments} exec \"$0\" \"$@\"")).arg(&self.program);
                shell
            }
        };
        command.args(&self.args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.envs(self.env.iter().map(|(k, v)| (k, v))).listen_fds(self.activate.iter().copied());
        for (fd, number) in &self.pass {
            command.pass_fd_as(fd, *number);
        }
        Running { child: command.spawn().expect("the program starts") }
    }
}

/// A program that runs; killed when dropped.
pub struct Running {
    child: Child,
}

impl Running {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end, no longer than a loaded machine may need.
    #[track_caller]
    pub fn end(&mut self) -> ExitStatus {
        let limit = crate::common::raw::patience(Duration::from_secs(20));
        self.child.wait_timeout(limit).expect("a status").expect("it ends")
    }

    /// What it printed on both streams until it ended, and how.
    #[track_caller]
    pub fn output(mut self) -> (ExitStatus, String) {
        let mut text = String::new();
        for stream in [self.child.stdout.take(), self.child.stderr.take()] {
            stream.expect("piped").into_inner().read_to_string(&mut text).expect("text");
        }
        (self.end(), text)
    }

    pub fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Where a program is. A missing peer fails the test: it does not skip it.
#[track_caller]
pub fn find(program: &OsStr) -> PathBuf {
    let here = Path::new(program);
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let found = if here.is_absolute() {
        Some(here.to_owned())
    } else {
        std::env::split_paths(&dirs).map(|d| d.join(here)).find(|p| p.is_file())
    };
    found.unwrap_or_else(|| panic!("{here:?} is not installed; .ci/run installs what the tests need"))
}

/// A directory of this test's own, gone when dropped.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new(name: &str) -> Dir {
        let path = std::env::temp_dir().join(format!("carefork-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        Dir(path)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}
