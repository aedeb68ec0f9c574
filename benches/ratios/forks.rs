//! Forks: two processes of this program take turns on the same work, one with `CAREFORK=off`.

use crate::children;
use crate::measure::{Turns, median, row, turns};
use carefork::{CareFd, Fork, ForkOptions, Hook, Signals};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

/// One of the two processes: answers a line with a line.
pub(crate) struct Server {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Server {
    pub(crate) fn start(off: bool, setup: &str) -> Server {
        Self::start_as("serve", off, setup)
    }

    pub(crate) fn start_as(what: &str, off: bool, setup: &str) -> Server {
        let mut c = Command::new(std::env::current_exe().unwrap());
        c.args([what, setup]).stdin(Stdio::piped()).stdout(Stdio::piped());
        if off {
            c.env("CAREFORK", "off");
        }
        let mut child = c.spawn().unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Server { child, to, from }
    }

    pub(crate) fn ask(&mut self, what: &str) -> f64 {
        writeln!(self.to, "{what}").unwrap();
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        line.trim().parse().unwrap_or_else(|_| panic!("{what}: {line:?}"))
    }

    /// The time of each of `n` forks, µs.
    pub(crate) fn each(&mut self, n: usize, what: &str) -> Vec<f64> {
        writeln!(self.to, "each {n} {what}").unwrap();
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        let all: Vec<f64> = line.split_whitespace().map(|x| x.parse::<f64>().unwrap() / 1000.0).collect();
        assert_eq!(all.len(), n, "{what}");
        all
    }

    /// Its threads stand still until `go_on`.
    pub(crate) fn stop(&self) {
        let pid = self.child.id() as i32;
        let mut status = 0;
        unsafe { libc::kill(pid, libc::SIGSTOP) };
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, libc::WUNTRACED) }, pid);
        assert!(libc::WIFSTOPPED(status), "{status:#x}");
    }

    pub(crate) fn go_on(&self) {
        unsafe { libc::kill(self.child.id() as i32, libc::SIGCONT) };
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

const FORKS: usize = 40;
const PAIRS: usize = 12;
const TURNS: usize = 10;

fn wait(pid: i32) {
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0);
}

fn bare() {
    match unsafe { libc::fork() } {
        0 => unsafe { libc::_exit(0) },
        pid => wait(pid),
    }
}

/// What a pidfd costs whoever opens one for a child.
fn bare_pidfd() {
    match unsafe { libc::fork() } {
        0 => unsafe { libc::_exit(0) },
        pid => unsafe {
            let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32;
            let mut info: libc::siginfo_t = std::mem::zeroed();
            assert_eq!(libc::waitid(libc::P_PIDFD, pidfd as u32, &mut info, libc::WEXITED), 0);
            libc::close(pidfd);
        },
    }
}

fn careful(options: &ForkOptions) {
    // Matched where it is: `unwrap` would move it out first, which costs a child libc's memcpy, another page of code.
    match unsafe { options.fork() } {
        Ok(Fork::Child(c)) => c.exit(0),
        Ok(Fork::Parent(mut c)) => assert!(c.wait().unwrap().success()),
        Err(e) => panic!("{e}"),
    }
}

/// Page faults of a child that ends at once, from its birth on.
fn faults_of(child: impl Fn() -> i32) -> f64 {
    let one = |_| unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        let pid = child();
        assert_eq!(libc::wait4(pid, std::ptr::null_mut(), 0, &mut usage), pid);
        usage.ru_minflt as f64
    };
    median((0..FORKS).map(one).collect())
}

/// qemu_fork: block everything, fork, 64 handlers to default in the child, unblock on both sides.
fn qemu() {
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        let pid = libc::fork();
        if pid == 0 {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = libc::SIG_DFL;
            for s in 1..=64 {
                libc::sigaction(s, &action, std::ptr::null_mut());
            }
            libc::sigemptyset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
            libc::_exit(0);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &old, std::ptr::null_mut());
        wait(pid);
    }
}

/// The times of `n` forks with `f`, ns.
fn times(n: usize, f: impl Fn()) -> Vec<f64> {
    let one = |_| {
        let t = Instant::now();
        f();
        t.elapsed().as_nanos() as f64
    };
    (0..n).map(one).collect()
}

/// The median time of a fork with `f`, ns.
fn time(f: impl Fn()) -> f64 {
    median(times(FORKS, f))
}

/// Runs `f` in a child and hands back the number it makes.
fn in_child(f: impl FnOnce() -> f64) -> f64 {
    let (read, write) = std::io::pipe().unwrap();
    match unsafe { libc::fork() } {
        0 => {
            let x = f();
            let _ = (&write).write_all(&x.to_ne_bytes());
            unsafe { libc::_exit(0) }
        }
        pid => {
            drop(write);
            let mut bytes = [0; 8];
            std::io::Read::read_exact(&mut &read, &mut bytes).unwrap();
            wait(pid);
            f64::from_ne_bytes(bytes)
        }
    }
}

fn faults() -> f64 {
    unsafe {
        let mut r: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut r);
        r.ru_minflt as f64
    }
}

/// `n` neighbouring descriptors above 1000.
fn neighbours(n: i32) -> Vec<OwnedFd> {
    use std::os::fd::FromRawFd;
    (0..n).map(|i| unsafe { OwnedFd::from_raw_fd(libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 1000 + i)) }).collect()
}

/// The process at the other end: `setup` once, then a line in, a number out.
pub(crate) fn serve() {
    static STOP: AtomicBool = AtomicBool::new(false);
    static READY: AtomicU32 = AtomicU32::new(0);
    let setup = std::env::args().nth(2).unwrap();
    for _ in 0..4 {
        std::thread::spawn(|| {
            READY.fetch_add(1, Ordering::SeqCst);
            loop {
                std::thread::park();
            }
        });
    }
    while READY.load(Ordering::SeqCst) < 4 {
        std::thread::yield_now();
    }
    let mut hooks = Vec::new();
    let mut locks: (Vec<Box<carefork::Mutex<u32>>>, Vec<Box<parking_lot::Mutex<u32>>>) = Default::default();
    let mut fds: (Vec<CareFd<OwnedFd>>, Vec<OwnedFd>) = Default::default();
    match setup.split_once(':').unwrap_or((&setup, "")) {
        ("regions", _) => {
            for _ in 0..2 {
                std::thread::spawn(|| {
                    while !STOP.load(Ordering::Relaxed) {
                        drop(carefork::no_forking());
                    }
                });
            }
        }
        ("hooks", n) => {
            for _ in 0..n.parse().unwrap() {
                hooks.push(carefork::register(Hook::new("bench").prepare(|| {}).parent(|| {}).child(|| {})));
            }
        }
        ("locks", "carefork") => locks.0 = (0..100_000).map(|i| Box::new(carefork::Mutex::new(i))).collect(),
        ("locks", _) => locks.1 = (0..100_000).map(|i| Box::new(parking_lot::Mutex::new(i))).collect(),
        ("care", n) => {
            fds.0 = neighbours(n.parse().unwrap()).into_iter().map(|f| CareFd::new(f).unwrap()).collect();
        }
        ("bare", n) => fds.1 = neighbours(n.parse().unwrap()),
        _ => crate::logs::set_up(&setup),
    }
    let inherit = ForkOptions::new();
    let reset = ForkOptions::new().signals(Signals::Reset);
    let (inherit_by_pid, reset_by_pid) = (inherit.clone().pidfd(false), reset.clone().pidfd(false));
    let n = (fds.0.len() + fds.1.len()) as u32;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        if let Some((n, how)) = line.strip_prefix("each ").and_then(|asked| asked.split_once(' ')) {
            let n = n.parse().unwrap();
            let all = if how == "bare" { times(n, bare) } else { times(n, || careful(&inherit)) };
            println!("{}", all.iter().map(f64::to_string).collect::<Vec<_>>().join(" "));
            continue;
        }
        let x = match line.as_str() {
            "bare" => time(bare),
            "inherit" => time(|| careful(&inherit)),
            "reset" => time(|| careful(&reset)),
            "inherit by pid" => time(|| careful(&inherit_by_pid)),
            "reset by pid" => time(|| careful(&reset_by_pid)),
            "qemu" => time(qemu),
            "children by reaper" => children::started_and_reaped(84),
            "children by epoll" => children::forked_and_polled(84),
            "children by waitpid" => children::forked_and_waited(84),
            "faults of bare" => faults_of(|| match unsafe { libc::fork() } {
                0 => unsafe { libc::_exit(0) },
                pid => pid,
            }),
            "faults of inherit" => faults_of(|| match unsafe { inherit.fork() } {
                Ok(Fork::Child(c)) => c.exit(0),
                Ok(Fork::Parent(c)) => c.into_id() as i32,
                Err(e) => panic!("{e}"),
            }),
            "bare pidfd" => time(bare_pidfd),
            "cleanup" => in_child(|| {
                let t = Instant::now();
                unsafe { carefork::postfork_child_noexec() }.unwrap();
                t.elapsed().as_nanos() as f64
            }),
            "range" => in_child(|| {
                let t = Instant::now();
                unsafe { libc::syscall(libc::SYS_close_range, 1000, 1000 + n - 1, 0) };
                t.elapsed().as_nanos() as f64
            }),
            "cleanup faults" => in_child(|| {
                let before = faults();
                unsafe { carefork::postfork_child_noexec() }.unwrap();
                faults() - before
            }),
            "range faults" => in_child(|| {
                let before = faults();
                unsafe { libc::syscall(libc::SYS_close_range, 1000, 1000 + n - 1, 0) };
                faults() - before
            }),
            other => panic!("{other}"),
        };
        println!("{x}");
    }
}

/// Several pairs of processes, because where the kernel puts stack and libraries, and so how many pages a fork touches, is luck.
pub(crate) fn pairs(
    ours: (bool, &str),
    rival: (bool, &str),
    mut a: impl FnMut(&mut Server) -> f64,
    mut b: impl FnMut(&mut Server) -> f64,
) -> (f64, f64, f64) {
    let mut all = Turns::default();
    for _ in 0..PAIRS {
        let (mut x, mut y) = (Server::start(ours.0, ours.1), Server::start(rival.0, rival.1));
        all.take(TURNS, || a(&mut x), || b(&mut y));
    }
    all.medians()
}

pub(crate) fn rows(wanted: &dyn Fn(&str) -> bool) {
    let pair = |what: &str, ours: (bool, &str, &str), rival: (bool, &str, &str), limit: f64| {
        if !wanted(what) {
            return;
        }
        let r = pairs((ours.0, ours.1), (rival.0, rival.1), |s| s.ask(ours.2) / 1000.0, |s| s.ask(rival.2) / 1000.0);
        row(what, r, "µs", limit);
    };
    pair("fork+_exit+wait, Inherit, against bare", (false, "", "inherit"), (true, "", "bare"), 1.06);
    if wanted("fork+_exit+wait, Inherit, against bare") {
        let (a, b) = (|s: &mut Server| s.ask("bare pidfd") / 1000.0, |s: &mut Server| s.ask("bare") / 1000.0);
        let (ours, rival, ratio) = pairs((true, ""), (true, ""), a, b);
        println!(
            "| of it the kernel's: a pidfd opened, waited by, closed | {ours:.1} µs | {rival:.1} µs | {ratio:.3} | | |"
        );
    }
    for (what, setup) in [("a child", ""), ("a child, with log, stdio and one service registered", "subsystems")] {
        let what = format!("page faults of {what}, against bare");
        if wanted(&what) {
            let (a, b) = (|s: &mut Server| s.ask("faults of inherit"), |s: &mut Server| s.ask("faults of bare"));
            let (ours, rival, _) = pairs((false, setup), (true, setup), a, b);
            println!("| {what} | {ours} | {rival} | | | |");
        }
    }
    pair("fork+_exit+wait, Reset, against bare", (false, "", "reset"), (true, "", "bare"), 1.10);
    pair("fork+_exit+wait, Reset, against qemu_fork", (false, "", "reset"), (true, "", "qemu"), 1.0);
    for (what, ours, rival, limit) in [
        ("Inherit, against bare", "inherit by pid", "bare", 1.06),
        ("Reset, against bare", "reset by pid", "bare", 1.10),
        ("Reset, against qemu_fork", "reset by pid", "qemu", 1.0),
    ] {
        pair(&format!("fork+_exit+wait without pidfd, {what}"), (false, "", ours), (true, "", rival), limit);
    }
    pair(
        "fork beside two threads in and out of regions, against bare",
        (false, "regions", "inherit"),
        (true, "regions", "bare"),
        1.15,
    );
    pair(
        "fork with 100 000 locks alive, against parking_lot's",
        (false, "locks:carefork", "inherit"),
        (false, "locks:parking_lot", "inherit"),
        1.02,
    );
    let what = "fork with 1000 hooks, each";
    if wanted(what) {
        let fork = |s: &mut Server| s.ask("inherit");
        let (ours, rival, _) = pairs((false, "hooks:1000"), (false, "hooks:0"), fork, fork);
        let each = (ours - rival) / 1000.0;
        let verdict = if each <= 25.0 { "reached" } else { "**missed**" };
        println!(
            "| {what} | {:.1} µs | {:.1} µs (none) | {each:.1} ns | ≤ 25 ns | {verdict} |",
            ours / 1000.0,
            rival / 1000.0
        );
    }
    for (n, limit) in [(100, 1.5), (10_000, 1.15)] {
        let (care, bare) = (format!("care:{n}"), format!("bare:{n}"));
        pair(
            &format!("cleanup of {n} care-fds, against one close_range"),
            (false, &care, "cleanup"),
            (true, &bare, "range"),
            limit,
        );
        let what = format!("cleanup of {n} care-fds, page faults");
        if wanted(&what) {
            let (mut a, mut b) = (Server::start(false, &care), Server::start(true, &bare));
            let (ours, rival, _) = turns(11, || a.ask("cleanup faults"), || b.ask("range faults"));
            // Of 1024 words each, from the one with 1000 on, which is the first.
            let pages = (1000 + n - 1) / 1024 + 1;
            println!("| {what} | {ours} | {rival} (close_range) | | the registry's own pages: {pages} | |");
        }
    }
}
