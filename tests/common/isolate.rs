//! A test in a process of its own: the test binary runs itself again for the one test, and watches over it.
//!
//! The second process is started by a bare `clone` and `execve`, never by libc's `fork`: were an at-fork handler under
//! test to hang, the watchdog would hang with it. It has a session of its own, descriptors 0, 1 and 2 only, an empty
//! signal mask and default dispositions (but what Rust's runtime sets). If the watching process dies, it dies too,
//! and so does everything in its process group.

use super::child::Verdict;
use super::seccomp::{Filter, Refuse};
use super::{child, raw, strace, trace};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{env, ptr};

pub(super) const NAME: &str = "CAREFORK_ISOLATED";
const TAG: &str = "CAREFORK_ISOLATED_TAG";
/// Who watches.
const BY: &str = "CAREFORK_ISOLATED_BY";
const BEGUN: &str = "carefork-isolated: begun";
const DONE: &str = "carefork-isolated: done";
const ESCAPED: &str = "carefork-isolated: a forked child came back out of the test";
const OUTPUT_BYTES: usize = 64 * 1024;
/// How often those that a test has left behind are looked for before it fails.
const GRACE: u32 = 200;

#[cfg(target_env = "gnu")]
type Resource = libc::__rlimit_resource_t;
#[cfg(not(target_env = "gnu"))]
type Resource = libc::c_int;

/// What the process of an isolated test is started with. All of it is there before the first constructor runs.
#[derive(Default, Clone)]
pub struct Setup {
    /// System calls that fail.
    pub refuse: Vec<Refuse>,
    pub env: Vec<(String, String)>,
    /// Soft and hard limit alike.
    pub rlimits: Vec<(Resource, u64)>,
    /// User and group to run as; needs root. The user may own other processes: for RLIMIT_NPROC take a number of
    /// your own.
    pub uid: Option<u32>,
    /// Where strace writes; [`strace::count_syscalls`] sets it.
    pub strace: Option<PathBuf>,
    /// Numbers at which the process finds a listening socket, as one that was passed.
    pub sockets: Vec<RawFd>,
    /// The bound begins when this file is there: for a test that is made to hang, and says when it does.
    pub hangs: Option<PathBuf>,
}

/// What became of the process of an isolated test.
#[derive(Debug)]
pub struct Outcome {
    name: String,
    pub verdict: Verdict,
    pub output: String,
    /// What processes were doing that were still there when the test had ended. They are killed.
    pub left_behind: Option<String>,
}

impl Outcome {
    /// Why the test failed; None if it passed.
    pub fn failure(&self) -> Option<String> {
        let why = match &self.verdict {
            Verdict::Hung { trace } => format!("hung; what it was doing:\n{trace}"),
            Verdict::Signaled(signal) => format!("was killed by signal {signal}"),
            _ if self.output.contains(ESCAPED) => "let a forked child escape".to_owned(),
            Verdict::Exited(0) if !self.output.contains(BEGUN) => "was not run: is this its whole path?".to_owned(),
            Verdict::Exited(0) if !self.output.contains(DONE) => "exited before its end".to_owned(),
            Verdict::Exited(0) => match &self.left_behind {
                Some(trace) => format!("left processes behind:\n{trace}"),
                None => return None,
            },
            Verdict::Exited(code) => format!("ended with exit code {code}"),
            Verdict::Lost => "was reaped by somebody else".to_owned(),
        };
        Some(format!("isolated test {:?} {why}\n--- its output ---\n{}", self.name, self.output))
    }
}

/// Runs `f` in a process that runs this one test, and waits for it no longer than `seconds`. `test_name` is the whole
/// path of the calling test, as `--list` shows it. Code of the test before and after this call runs in the watching
/// process; code before it in both.
///
/// # Panics
/// If `f` panics, hangs, ends the process, or leaves a process behind; with what it printed, and for a hang with the
/// stacks of all its threads and descendants.
#[track_caller]
pub fn isolated(test_name: &str, seconds: u32, f: impl FnOnce()) {
    isolated_with(test_name, seconds, Setup::default(), f);
}

/// As [`isolated`], in a process that is started with `setup`.
#[track_caller]
pub fn isolated_with(test_name: &str, seconds: u32, setup: Setup, f: impl FnOnce()) {
    let outcome = run_isolated(test_name, seconds, setup, f);
    if let Some(failure) = outcome.failure() {
        panic!("{failure}");
    }
    // Captured like any test's output, shown with --nocapture.
    print!("{}", outcome.output);
}

/// As [`isolated_with`], but hands back what became of it. In the process of its own it does not return.
pub fn run_isolated(test_name: &str, seconds: u32, setup: Setup, f: impl FnOnce()) -> Outcome {
    match env::var(NAME) {
        Ok(name) if name == test_name => inside(f),
        Ok(name) => panic!("test {test_name:?} runs in the process of {name:?}"),
        Err(_) => outside(test_name, seconds, setup),
    }
}

/// Whether [`Setup::uid`] can be used: asked before the call, so the same in the process that has given root up.
pub fn can_change_user() -> bool {
    env::var(BY).unwrap_or_else(|_| own_user()) == "0"
}

fn own_user() -> String {
    // SAFETY: takes nothing.
    unsafe { libc::geteuid() }.to_string()
}

fn inside(f: impl FnOnce()) -> ! {
    let own = raw::getpid();
    raw::Line::new().text(BEGUN).send();
    let result = catch_unwind(AssertUnwindSafe(f));
    if raw::getpid() != own {
        raw::Line::new().text(ESCAPED).send();
        raw::exit_now(86);
    }
    if result.is_err() {
        raw::exit_now(101);
    }
    raw::Line::new().text(DONE).send();
    // With the atexit handlers: coverage and sanitizers report there.
    std::process::exit(0);
}

fn outside(test_name: &str, seconds: u32, setup: Setup) -> Outcome {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let tag = format!("{}-{count}", std::process::id());
    let mut output = File::from(raw::memfd());
    let pid = Launch::new(test_name, &tag, &setup, &output).start();
    let mut sentinel = Sentinel::new(pid);
    let tag = format!("{TAG}={tag}");

    let bound = Duration::from_secs(seconds.into());
    let ended = match &setup.hangs {
        Some(file) => until_it_hangs(pid, file).or_else(|| child::wait_unstretched(pid, bound)),
        None => child::wait_bounded(pid, bound),
    };
    let mut rest = trace::tagged(&tag);
    if ended.is_some() {
        // A child that was killed, or is on its way out, gets its time to be gone: in looks, each of which takes longer where it
        // has to wait for a processor, too.
        for _ in 0..GRACE {
            if rest.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
            rest = trace::tagged(&tag);
        }
    }
    let (verdict, left_behind) = match ended {
        Some(verdict) => (verdict, (!rest.is_empty()).then(|| trace::report(&rest))),
        None => {
            let mut family = trace::tree(pid);
            rest.retain(|pid| !family.contains(pid));
            family.append(&mut rest);
            let seconds = if setup.hangs.is_some() { bound } else { raw::patience(bound) }.as_secs();
            let trace = format!("(not ended after {seconds} s)\n{}", trace::report(&family));
            trace::kill(&family);
            child::wait_bounded(pid, Duration::from_secs(5));
            (Verdict::Hung { trace }, None)
        }
    };
    trace::kill(&trace::tagged(&tag));
    sentinel.dismiss();

    let mut bytes = Vec::new();
    output.rewind().and_then(|()| output.read_to_end(&mut bytes)).expect("the output can be read back");
    let skip = bytes.len().saturating_sub(OUTPUT_BYTES);
    // The markers of a test that prints much must not be cut off with the beginning.
    let begun = if skip > 0 { format!("{BEGUN}\n(the first {skip} bytes are left out)\n") } else { String::new() };
    let output = begun + &String::from_utf8_lossy(&bytes[skip..]);
    Outcome { name: test_name.to_owned(), verdict, output, left_behind }
}

/// Waits until the file is there. What became of the process, if it has ended without.
fn until_it_hangs(pid: libc::pid_t, file: &Path) -> Option<Verdict> {
    while !file.exists() {
        if let Some(verdict) = child::wait_unstretched(pid, Duration::from_millis(10)) {
            return Some(verdict);
        }
    }
    None
}

/// A shell that kills the test's process group when this process is gone: the death signal reaches only the test's
/// first process, not what that has forked.
struct Sentinel(Option<Child>);

impl Sentinel {
    fn new(group: libc::pid_t) -> Sentinel {
        let shell = Command::new("/bin/sh")
            .args(["-c", "read -r _; kill -s KILL -- -$0", &group.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Sentinel(shell.ok())
    }

    fn dismiss(&mut self) {
        if let Some(mut shell) = self.0.take() {
            drop(shell.kill());
            drop(shell.wait());
        }
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.dismiss();
    }
}

/// Everything the new process needs between clone and exec, where nothing may be allocated.
struct Launch<'a> {
    program: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    setup: &'a Setup,
    filter: Option<Filter>,
    null: File,
    output: &'a File,
    socket: OwnedFd,
    parent: libc::pid_t,
}

impl<'a> Launch<'a> {
    fn new(test_name: &str, tag: &str, setup: &'a Setup, output: &'a File) -> Launch<'a> {
        let exe = env::current_exe().expect("the path of this test binary").into_os_string();
        let test = ["--exact", test_name, "--nocapture", "--test-threads=1"].map(OsString::from);
        let mut args = vec![exe.clone()];
        // Not by the path: another user may not reach it, and a build may have replaced what is there.
        let mut program = OsString::from("/proc/self/exe");
        if let Some(file) = &setup.strace {
            let front = ["strace", "-f", "-q", "-s", "96", "-o"].map(OsString::from);
            args.splice(0..0, front.into_iter().chain([file.clone().into_os_string(), "--".into()]));
            program = strace::find().expect("strace was found before").into_os_string();
        }
        args.extend(test);
        let own =
            [(NAME, test_name), (TAG, tag), (BY, &own_user())].map(|(k, v)| (OsString::from(k), OsString::from(v)));
        let given = setup.env.iter().map(|(k, v)| (OsString::from(k), OsString::from(v)));
        let mut env: Vec<(OsString, OsString)> = env::vars_os().collect();
        for (key, value) in own.into_iter().chain(given) {
            env.retain(|(k, _)| *k != key);
            env.push((key, value));
        }
        let joined = env.into_iter().map(|(mut k, v)| {
            k.push("=");
            k.push(v);
            k
        });
        Launch {
            program: c_string(program),
            args: args.into_iter().map(c_string).collect(),
            env: joined.map(c_string).collect(),
            setup,
            filter: (!setup.refuse.is_empty()).then(|| Filter::new(&setup.refuse)),
            null: File::open("/dev/null").expect("/dev/null"),
            output,
            socket: raw::aside(TcpListener::bind("127.0.0.1:0").expect("a listener").as_fd()),
            parent: raw::getpid(),
        }
    }

    fn start(&self) -> libc::pid_t {
        let ends = |list: &[CString]| list.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>();
        let (argv, envp) = (ends(&self.args), ends(&self.env));
        let none = ptr::null::<u8>();
        // SAFETY: the arguments of a fork. No at-fork handler runs and libc's caches are stale in the child, which
        // makes only system calls that do not ask them, and execs or exits.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, none, none, none, none) };
        if pid == 0 {
            let step = self.prepare();
            if step.is_ok() {
                // SAFETY: all three are C strings, and null-terminated lists of them, that `self` and this frame own.
                unsafe { libc::execve(self.program.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
            }
            let step = step.err().unwrap_or("exec");
            raw::Line::new().text("cannot start: ").text(step).text(": errno ").num(raw::errno().into()).send();
            raw::exit_now(127);
        }
        assert!(pid > 0, "clone: {}", std::io::Error::last_os_error());
        pid as libc::pid_t
    }

    /// In the new process. Async-signal-safe. The error names the step; errno has the rest.
    fn prepare(&self) -> Result<(), &'static str> {
        // SAFETY: takes nothing.
        step("setsid", unsafe { libc::setsid() }.into())?;
        redirect(self.null.as_raw_fd(), 0)?;
        redirect(self.output.as_raw_fd(), 1)?;
        redirect(self.output.as_raw_fd(), 2)?;
        let flags = libc::CLOSE_RANGE_CLOEXEC;
        // SAFETY: takes numbers only. Refused by an old kernel it changes nothing, and std opens close-on-exec anyway.
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, flags) };
        for &number in &self.setup.sockets {
            redirect(self.socket.as_raw_fd(), number)?;
        }
        default_signals();
        for &(resource, value) in &self.setup.rlimits {
            let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
            // SAFETY: `limit` outlives the call.
            step("setrlimit", unsafe { libc::setrlimit(resource, &raw const limit) }.into())?;
        }
        if let Some(uid) = self.setup.uid {
            // Not libc's functions: they would look for this process's other threads.
            // SAFETY: an empty list needs no pointer.
            step("setgroups", unsafe { libc::syscall(libc::SYS_setgroups, 0, ptr::null::<u8>()) })?;
            // SAFETY: takes numbers only.
            step("setresgid", unsafe { libc::syscall(libc::SYS_setresgid, uid, uid, uid) })?;
            // SAFETY: takes numbers only.
            step("setresuid", unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
        }
        // After the change of user, which clears it. It comes when the watching *thread* ends: that one waits for us.
        // SAFETY: this option takes a number.
        step("death signal", unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }.into())?;
        // SAFETY: takes nothing.
        let parent = unsafe { libc::getppid() };
        if parent != self.parent {
            return Err("the watching process is gone");
        }
        if let Some(filter) = &self.filter {
            // SAFETY: what the test asked for; from here on only execve is called.
            step("seccomp", unsafe { filter.install() }.map_or(-1, |()| 0))?;
        }
        Ok(())
    }
}

fn step(name: &'static str, result: libc::c_long) -> Result<(), &'static str> {
    if result < 0 { Err(name) } else { Ok(()) }
}

fn redirect(from: RawFd, to: RawFd) -> Result<(), &'static str> {
    // SAFETY: takes numbers only; 0 to 2 are this process's to redirect, which is about to exec.
    step("dup2", unsafe { libc::dup2(from, to) }.into())
}

/// Ignored signals and the mask would come through the exec.
fn default_signals() {
    for signal in 1..=64 {
        // SAFETY: in a process that is about to exec no handler is missed. SIGKILL, SIGSTOP and libc's own are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let none = 0u64;
    let size = size_of_val(&none);
    let old = ptr::null::<u8>();
    // SAFETY: `none` is a kernel signal set of the size given.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, old, size) };
}

fn c_string(s: OsString) -> CString {
    CString::new(s.into_vec()).expect("no zero byte in an argument")
}
