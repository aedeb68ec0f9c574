//! The pre-forking server as a test sees it: a process, what it says, its workers and descriptors.

#![allow(
    // Each test binary uses a part of this.
    dead_code,
    unreachable_pub,
    unsafe_code,
    clippy::disallowed_methods,
    // A test that cannot be set up should panic.
    clippy::expect_used,
    clippy::missing_panics_doc
)]

pub mod client;
pub mod wrk;

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// What takes longer has failed.
pub const LIMIT: Duration = Duration::from_secs(120);

/// The server, and what it says.
pub struct Server {
    process: Child,
    lines: mpsc::Receiver<String>,
    pub address: String,
    pub said: Vec<String>,
    /// A client had a wrong answer, or none.
    pub failed: Arc<AtomicBool>,
}

fn program() -> &'static PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let built = Command::new(env!("CARGO")).args(["build", "--quiet", "--example", "prefork"]).status();
        assert!(built.expect("cargo runs").success());
        // The test's own binary is in deps/, the example in examples/ beside it.
        let exe = std::env::current_exe().expect("a path");
        exe.ancestors().nth(2).expect("a target directory").join("examples/prefork")
    })
}

impl Server {
    /// With four workers, all there.
    pub fn start() -> Server {
        let server = Server::start_with(None);
        server.until_whole();
        server
    }

    /// One whose workers die at a step: `sent/7`, at every seventh passing. They may be dying already.
    pub fn dying(die: &str) -> Server {
        Server::start_with(Some(die))
    }

    fn start_with(die: Option<&str>) -> Server {
        let mut command = Command::new(program());
        command.args(["127.0.0.1:0", "4"]).env_remove("PREFORK_DIE").envs(die.map(|die| ("PREFORK_DIE", die)));
        let mut process = command.process_group(0).stdout(Stdio::piped()).spawn().expect("it starts");
        let out = process.stdout.take().expect("a pipe");
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(out).lines() {
                if line.is_ok_and(|line| send.send(line).is_err()) {
                    return;
                }
            }
        });
        let mut server = Server { process, lines, address: String::new(), said: Vec::new(), failed: Arc::default() };
        let first = server.line(|line| line.starts_with("listening on "));
        server.address = first.split([' ', ',']).nth(2).expect("an address").to_owned();
        server
    }

    /// The next line that `wanted` wants.
    pub fn line(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => {
                    self.said.push(line.clone());
                    if wanted(&line) {
                        return line;
                    }
                }
                Err(e) => {
                    assert!(!self.failed.load(Relaxed), "a client failed; the server said {:#?}", self.said);
                    let goes_on = e == RecvTimeoutError::Timeout && Instant::now() < end;
                    assert!(goes_on, "{e}; the server said {:#?}", self.said);
                }
            }
        }
    }

    pub fn signal(&self, signal: i32) {
        kill(self.process.id(), signal);
    }

    /// To its workers, too, as a terminal does.
    pub fn signal_group(&self, signal: i32) {
        // SAFETY: a group of this test's.
        assert_eq!(unsafe { libc::kill(-self.process.id().cast_signed(), signal) }, 0);
    }

    /// What the master opens from now on gets a number below this one, or fails.
    pub fn limit_descriptors(&self, below: u64) {
        let pid = self.process.id().cast_signed();
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` is live.
        assert_eq!(unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) }, 0);
        limit.rlim_cur = below.min(limit.rlim_max);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) }, 0);
    }

    /// Its children: pid and state.
    pub fn workers(&self) -> Vec<(u32, char)> {
        let pid = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("/proc");
        let state = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, stat.rsplit_once(") ")?.1.chars().next()?))
        };
        children.split_whitespace().filter_map(|pid| state(pid.parse().ok()?)).collect()
    }

    /// Four workers, and no zombie.
    pub fn is_whole(&self) -> bool {
        let workers = self.workers();
        workers.len() == 4 && workers.iter().all(|(_, state)| !"ZX".contains(*state))
    }

    pub fn until_whole(&self) {
        until(|| self.is_whole(), || format!("{:?}", self.workers()));
    }

    /// A worker that serves connections, once there is one: it has its channel, and sockets besides. One that was forked this moment has its
    /// master's still, and another epoll with them.
    pub fn busy_worker(&self) -> u32 {
        let sockets = |pid| {
            let fds = targets(pid);
            let count = |kind: &str| fds.iter().filter(|to| to.contains(kind)).count();
            if (count("eventpoll"), count("signalfd")) == (1, 1) { count("socket:") } else { 0 }
        };
        let mut busiest = None;
        let is_busy = || {
            busiest = self.workers().into_iter().map(|(pid, _)| (sockets(pid), pid)).max();
            busiest.is_some_and(|(sockets, _)| sockets > 1)
        };
        until(is_busy, || "nobody is connected".to_owned());
        busiest.expect("there is one").1
    }

    /// Sends `signal` to a worker that serves connections, and waits until the master knows.
    pub fn kill_busy(&mut self, signal: i32) {
        self.until_whole();
        let one = self.busy_worker();
        kill(one, signal);
        let name = if signal == libc::SIGKILL { "SIGKILL" } else { "SIGSEGV" };
        self.line(|line| line.starts_with(&format!("worker[{one}] killed by {name}")));
    }

    /// How many workers were said to be killed.
    pub fn killed(&self) -> usize {
        self.said.iter().filter(|line| line.contains("] killed by SIG")).count()
    }

    /// Once nobody is connected: how many descriptors the master has, and each worker.
    pub fn idle_descriptors(&self) -> (usize, Vec<usize>) {
        let mut found = None;
        let idle = || {
            found = self.descriptors_if_idle();
            found.is_some()
        };
        until(idle, || format!("{:?}, {:?}", targets(self.process.id()), self.workers()));
        found.expect("there it is")
    }

    /// Not half way through a fork or the end of a worker: each worker has its channel, the master has theirs and the listener.
    fn descriptors_if_idle(&self) -> Option<(usize, Vec<usize>)> {
        let count = |fds: &[String], kind: &str| fds.iter().filter(|to| to.contains(kind)).count();
        let master = targets(self.process.id());
        let workers: Vec<_> = self.workers().iter().map(|(pid, _)| targets(*pid)).collect();
        let has_begun =
            |fds: &Vec<String>| ["socket:", "signalfd", "eventpoll"].iter().all(|kind| count(fds, kind) == 1);
        let idle = count(&master, "socket:") == 5 && count(&master, "pidfd") == 4;
        let idle = idle && workers.len() == 4 && workers.iter().all(has_begun);
        idle.then(|| (master.len(), workers.iter().map(Vec::len).collect()))
    }

    /// Nobody is connected any more: what was opened is closed, in master and workers alike.
    pub fn has_leaked_nothing_since(&self, before: &(usize, Vec<usize>)) {
        let now = || self.idle_descriptors();
        until(|| now() == *before, || format!("before {before:?}, now {:?}", now()));
    }

    /// It drains and ends.
    pub fn end(mut self) {
        self.signal(libc::SIGTERM);
        self.line(|line| line == "ended");
        assert!(self.process.wait().expect("a status").success());
        assert!(!self.said.iter().any(|line| line.contains("lost")), "{:#?}", self.said);
    }

    /// As `end`, and no more than so many workers were killed.
    pub fn end_with(mut self, killed: usize) {
        self.signal(libc::SIGTERM);
        self.line(|line| line == "ending");
        assert_eq!(self.killed(), killed, "{:#?}", self.said);
        self.end();
    }

    /// It ends by itself.
    pub fn status(mut self) -> ExitStatus {
        let process = &mut self.process;
        let mut status = None;
        let ended = || {
            status = process.try_wait().expect("a status");
            status.is_some()
        };
        until(ended, || "it goes on".to_owned());
        status.expect("it has ended")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Where the test failed: workers end when their master is gone.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// What the descriptors of `pid` are.
fn targets(pid: u32) -> Vec<String> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.filter_map(|fd| Some(std::fs::read_link(fd.path()).ok()?.to_string_lossy().into_owned())).collect()
}

/// Looks again and again; what does not come true at all is a failure.
pub fn until(mut true_: impl FnMut() -> bool, what: impl Fn() -> String) {
    let end = Instant::now() + LIMIT;
    while !true_() {
        assert!(Instant::now() < end, "{}", what());
        thread::yield_now();
    }
}

pub fn kill(pid: u32, signal: i32) {
    // SAFETY: the server, or a worker that it has not reaped, or that was reaped this instant: its number is not used again at once.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}
