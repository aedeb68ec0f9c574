//! The pre-forking server under a real load (wrk), while its workers are ended, restarted and killed.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Nothing takes this long, on whatever machine.
const LIMIT: Duration = Duration::from_secs(600);
/// The least time that wrk is at work.
const LOAD: Duration = Duration::from_secs(4);

/// The server, and what it says.
struct Server {
    process: Child,
    lines: mpsc::Receiver<String>,
    address: String,
    said: Vec<String>,
}

impl Server {
    fn start() -> Server {
        let built = Command::new(env!("CARGO")).args(["build", "--example", "prefork"]).status();
        assert!(built.expect("cargo runs").success());
        // The test's own binary is in deps/, the example in examples/ beside it.
        let exe = std::env::current_exe().expect("a path");
        let exe = exe.ancestors().nth(2).expect("a target directory").join("examples/prefork");
        let mut process =
            Command::new(exe).args(["127.0.0.1:0", "4"]).stdout(Stdio::piped()).spawn().expect("it starts");
        let out = process.stdout.take().expect("a pipe");
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(out).lines() {
                if line.is_ok_and(|line| send.send(line).is_err()) {
                    return;
                }
            }
        });
        let mut server = Server { process, lines, address: String::new(), said: Vec::new() };
        let first = server.line(|line| line.starts_with("listening on "));
        server.address = first.split([' ', ',']).nth(2).expect("an address").to_owned();
        server
    }

    /// The next line that `wanted` wants.
    fn line(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.said.push(line.clone());
                    if wanted(&line) {
                        return line;
                    }
                }
                Err(e) => panic!("{e}; it said {:#?}", self.said),
            }
        }
    }

    fn signal(&self, signal: i32) {
        kill(self.process.id(), signal);
    }

    /// Its children: pid and state.
    fn workers(&self) -> Vec<(u32, char)> {
        let pid = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("/proc");
        let state = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, stat.rsplit_once(") ")?.1.chars().next()?))
        };
        children.split_whitespace().filter_map(|pid| state(pid.parse().ok()?)).collect()
    }

    /// Four workers, and no zombie.
    fn is_whole(&self) -> bool {
        let workers = self.workers();
        workers.len() == 4 && workers.iter().all(|(_, state)| !"ZX".contains(*state))
    }

    fn until_whole(&self) {
        let end = Instant::now() + LIMIT;
        while !self.is_whole() {
            assert!(Instant::now() < end, "{:?}", self.workers());
            thread::yield_now();
        }
    }

    /// A worker that serves connections, once there is one: the listener is open twice there, and each connection once.
    fn busy_worker(&self) -> u32 {
        let sockets = |pid: u32| {
            let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            fds.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket")))
                .count()
        };
        let end = Instant::now() + LIMIT;
        loop {
            let busiest = self.workers().into_iter().map(|(pid, _)| (sockets(pid), pid)).max();
            match busiest {
                Some((3.., pid)) => return pid,
                _ => assert!(Instant::now() < end, "nobody is connected: {busiest:?}"),
            }
            thread::yield_now();
        }
    }

    fn end(mut self) {
        self.signal(libc::SIGTERM);
        self.line(|line| line == "ended");
        assert!(self.process.wait().expect("a status").success());
        assert!(!self.said.iter().any(|line| line.contains("lost")), "{:#?}", self.said);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Where the test failed: workers die with their master.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: the server, or a worker that it has not reaped, or that was reaped this instant: its number is not used again at once.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

/// Killed where the test fails.
struct Running(Option<Child>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut process) = self.0.take() {
            drop(process.kill());
            drop(process.wait());
        }
    }
}

/// What wrk found: requests answered; errors on connecting, reading, writing, and time-outs.
#[derive(Debug)]
struct Load {
    requests: u64,
    connect: u64,
    read: u64,
    write: u64,
    timeout: u64,
    strange: bool,
}

/// `connections` at work until `meanwhile` is done, however long that takes.
fn load(server: &mut Server, connections: u32, meanwhile: impl FnOnce(&mut Server)) -> Load {
    let begun = Instant::now();
    let wrk = Command::new("wrk")
        .args(["-t2", &format!("-c{connections}"), "-d1h", "--timeout", "600s"])
        .arg(format!("http://{}/", server.address))
        .stdout(Stdio::piped())
        .spawn()
        .expect("wrk (Debian package wrk) is needed");
    let mut wrk = Running(Some(wrk));
    meanwhile(server);
    thread::sleep(LOAD.saturating_sub(begun.elapsed()));
    let wrk = wrk.0.take().expect("it was started");
    // It stops, and says what it has seen.
    kill(wrk.id(), libc::SIGINT);
    let out = wrk.wait_with_output().expect("a status");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    println!("{text}");
    assert!(out.status.success(), "{text}");
    let number = |before: &str| {
        let rest = text.split_once(before).map_or("", |(_, rest)| rest);
        rest.trim_start().split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let requests = text.lines().find_map(|l| l.trim().split_once(" requests in")).expect("a count").0;
    Load {
        requests: requests.parse().expect("a number"),
        connect: number("connect "),
        read: number("read "),
        write: number("write "),
        timeout: number("timeout "),
        strange: text.contains("Non-2xx"),
    }
}

/// SIGHUP, and SIGTERM to single workers: nobody notices.
#[test]
fn restarts_refuse_and_lose_nobody() {
    let mut server = Server::start();
    server.until_whole();
    let load = load(&mut server, 16, |server| {
        for _ in 0..2 {
            server.busy_worker();
            let before: Vec<u32> = server.workers().iter().map(|w| w.0).collect();
            server.signal(libc::SIGHUP);
            server.line(|line| line == "restarted");
            let after = server.workers();
            assert!(!after.iter().any(|(pid, _)| before.contains(pid)), "{before:?} {after:?}");
            // One that drains by itself is replaced.
            let one = server.busy_worker();
            kill(one, libc::SIGTERM);
            server.line(|line| line.starts_with(&format!("worker[{one}] exited with code 0")));
            server.until_whole();
        }
    });
    assert!(load.requests > 100, "{load:?}");
    assert!(!load.strange && (load.connect, load.read, load.write, load.timeout) == (0, 0, 0, 0), "{load:?}");
    assert!(server.is_whole());
    server.end();
}

/// SIGKILL and crashes: each is told of once and replaced, nobody is refused, no zombie stays, and what fails is at most what was
/// connected to those killed.
#[test]
fn killed_workers_are_replaced() {
    const KILLS: u32 = 12;
    let mut server = Server::start();
    server.until_whole();
    let load = load(&mut server, 16, |server| {
        for i in 0..KILLS {
            server.until_whole();
            let one = server.busy_worker();
            let signal = if i % 2 == 0 { libc::SIGKILL } else { libc::SIGSEGV };
            kill(one, signal);
            let name = if i % 2 == 0 { "SIGKILL" } else { "SIGSEGV" };
            server.line(|line| line.starts_with(&format!("worker[{one}] killed by {name}")));
        }
        server.until_whole();
    });
    assert!(load.requests > 100, "{load:?}");
    assert!(!load.strange && (load.connect, load.timeout) == (0, 0), "{load:?}");
    assert!(load.read + load.write <= u64::from(KILLS * 16), "{load:?}");
    let told = server.said.iter().filter(|line| line.contains("] killed by SIG")).count();
    assert_eq!(told, KILLS as usize, "{:#?}", server.said);
    // Idle, with nobody connected: not a single error.
    assert!(server.is_whole());
    server.end();
}
