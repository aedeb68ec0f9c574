//! Programs that nobody here wrote, and how they are started with descriptors.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    // The child between fork and exec.
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

pub mod nbd;
pub mod qmp;

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A program and what it is started with.
pub struct Program<'a> {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(&'a str, OsString)>,
    listen: Option<String>,
    pass: Vec<(BorrowedFd<'a>, RawFd)>,
}

impl<'a> Program<'a> {
    /// # Panics
    /// If it is not installed.
    #[track_caller]
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Program { program: find(program.as_ref()).into(), args: vec![], env: vec![], listen: None, pass: vec![] }
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

    /// Variables of socket activation, as a shell would assign them: `$$` is the pid of the program.
    pub fn listen(mut self, assignments: impl Into<String>) -> Self {
        self.listen = Some(assignments.into());
        self
    }

    /// Starts it with its output in a pipe. The one place where the tests of passed descriptors start a program.
    #[track_caller]
    pub fn start(self) -> Running {
        let mut command = match &self.listen {
            None => Command::new(&self.program),
            Some(assignments) => {
                // The shell becomes the program: LISTEN_PID is known before there is one.
                let mut shell = Command::new("/bin/sh");
                shell.arg("-c").arg(format!("{assignments} exec \"$0\" \"$@\"")).arg(&self.program);
                shell
            }
        };
        command.args(&self.args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
            command.env_remove(name);
        }
        command.envs(self.env.iter().map(|(k, v)| (k, v)));
        let pass: Vec<(RawFd, RawFd)> = self.pass.iter().map(|(fd, to)| (fd.as_raw_fd(), *to)).collect();
        let prepare = move || {
            clean_signals();
            put(&pass)
        };
        // SAFETY: `prepare` makes system calls only and allocates nothing.
        unsafe { command.pre_exec(prepare) };
        Running { child: command.spawn().expect("the program starts") }
    }
}

/// In the child: no signal is ignored or blocked. By hand, because libc keeps its own two from being asked for.
fn clean_signals() {
    let default = [0usize; 4];
    for signal in 1..=64 {
        // SAFETY: the kernel's sigaction, all zero: the default. SIGKILL and SIGSTOP are refused.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, 8) };
    }
    let none = 0u64;
    // SAFETY: a kernel signal set of eight bytes.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, 0, 8) };
}

/// In the child: each source out of the way of the targets first, then to its place, without close-on-exec.
fn put(pass: &[(RawFd, RawFd)]) -> io::Result<()> {
    let mut aside = [0; 32];
    for (i, (from, _)) in pass.iter().enumerate() {
        // SAFETY: takes numbers only.
        aside[i] = unsafe { libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, 500) };
        if aside[i] == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    for (i, (_, to)) in pass.iter().enumerate() {
        // SAFETY: this process is about to exec; nobody else uses its descriptors.
        if unsafe { libc::dup2(aside[i], *to) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
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
        let deadline = Instant::now() + crate::common::raw::patience(Duration::from_secs(20));
        loop {
            if let Some(status) = self.child.try_wait().expect("a status") {
                return status;
            }
            assert!(Instant::now() < deadline, "process {} does not end", self.child.id());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What it printed on both streams until it ended, and how.
    #[track_caller]
    pub fn output(mut self) -> (ExitStatus, String) {
        let mut text = String::new();
        self.child.stdout.take().expect("piped").read_to_string(&mut text).expect("text");
        self.child.stderr.take().expect("piped").read_to_string(&mut text).expect("text");
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
