//! Programs: started without a copy of this process, with the descriptors they are given and no others (X1, X2).

use crate::command_env::Env;
use crate::command_error::{CommandError, Step};
use crate::command_stdio::{Kind, Stdio, Streams};
use crate::error::ForkError;
use crate::exec_child::{Failure, Stage};
use crate::exec_plan::{Limit, Moves, Plan, Strings, StringsBuilder};
use crate::exec_start::{self, NotStarted, PANICKED, PreExec};
use crate::reap::child::Child;
use crate::resource::Resource;
use crate::signals::{LAST, Signals};
use crate::{care_table, sys, sys_exec};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output};
use std::time::Duration;

/// A program to be started: std's `Command`, and what it lacks.
///
/// # The program
/// starts without this process being copied: its size does not matter (vfork(2); [`Command::pre_exec`] is the exception). It finds
/// - standard input, output and error as given, the descriptors of [`Command::pass_fd`], [`Command::pass_fd_as`] and
///   [`Command::listen_fds`] under their numbers, **and no others**, whether they were close-on-exec or not;
/// - every signal at its default and none blocked, unless [`Command::signals`] says otherwise;
/// - this process's environment with the changes made here, without the `LISTEN_` variables by which this process itself was handed
///   descriptors.
///
/// # Beside forks
/// A start is a fork to other threads' regions: it waits until they are over, within a budget ([`Command::timeout`]), so that it does not
/// catch a working directory, umask or limit in the middle of a change. They are kept out until the clone, not until the exec. No
/// hook runs, and no at-fork handler of another library. Locks that this thread holds over a start are held until the exec.
///
/// # Errors
/// come back as [`CommandError`], which names the step and its argument, and never as an exit code. There is no child then and
/// no descriptor left; a handler for SIGCHLD may have seen a child that ended before it was one.
///
/// # As in std
/// A name without a slash is searched for in the PATH that the program will have. A path with one is relative to the program's working
/// directory. A change of user as root drops the supplementary groups unless they are given. A script without `#!` is not run by
/// a shell. A command can be started again.
///
/// ```
/// use carefork::{Command, Stdio};
/// let output = Command::new("tr").args(["a-z", "A-Z"]).stdin(Stdio::from(std::fs::File::open("/dev/null")?)).output()?;
/// assert!(output.status.success() && output.stdout.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A listening socket by the rules of systemd's socket activation, so that clients can connect before the server has started:
/// ```
/// use carefork::Command;
/// use std::os::fd::AsFd;
/// let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// let mut server = Command::new("sh");
/// server.args(["-c", "test $LISTEN_PID = $$ && test -S /proc/self/fd/3 && echo $LISTEN_FDNAMES"]);
/// server.listen_fds([("web", listener.as_fd())]);
/// let output = server.output()?;
/// assert_eq!(output.stdout, b"web\n");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Command<'fd> {
    program: OsString,
    arg0: Option<OsString>,
    args: Vec<OsString>,
    env: Env,
    current_dir: Option<PathBuf>,
    streams: [Option<Stdio>; 3],
    passed: Vec<(RawFd, RawFd)>,
    listen: Vec<(String, RawFd)>,
    signals: Signals,
    session: bool,
    process_group: Option<i32>,
    umask: Option<u32>,
    limits: Vec<(Resource, u64, u64)>,
    groups: Option<Vec<u32>>,
    gid: Option<u32>,
    uid: Option<u32>,
    death_signal: Option<i32>,
    timeout: Option<Duration>,
    pre_exec: Vec<PreExec>,
    borrowed: PhantomData<BorrowedFd<'fd>>,
}

impl<'fd> Command<'fd> {
    /// A program by its name, which is searched for in PATH, or by its path.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Command {
            program: program.as_ref().to_owned(),
            arg0: None,
            args: Vec::new(),
            env: Env::default(),
            current_dir: None,
            streams: [None, None, None],
            passed: Vec::new(),
            listen: Vec::new(),
            signals: Signals::Reset,
            session: false,
            process_group: None,
            umask: None,
            limits: Vec::new(),
            groups: None,
            gid: None,
            uid: None,
            death_signal: None,
            timeout: Some(Duration::from_secs(1)),
            pre_exec: Vec::new(),
            borrowed: PhantomData,
        }
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// What the program finds as its own name, instead of what it was started by.
    pub fn arg0(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.arg0 = Some(arg.as_ref().to_owned());
        self
    }

    // -- environment and place

    /// Sets an environment variable.
    pub fn env(&mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.env.set(key.as_ref(), value.as_ref());
        self
    }

    /// Sets environment variables.
    pub fn envs(&mut self, variables: impl IntoIterator<Item = (impl AsRef<OsStr>, impl AsRef<OsStr>)>) -> &mut Self {
        for (key, value) in variables {
            self.env.set(key.as_ref(), value.as_ref());
        }
        self
    }

    /// Removes an environment variable.
    pub fn env_remove(&mut self, key: impl AsRef<OsStr>) -> &mut Self {
        self.env.remove(key.as_ref());
        self
    }

    /// Begins with an empty environment; also forgets what was set before.
    pub fn env_clear(&mut self) -> &mut Self {
        self.env.clear();
        self
    }

    /// The program's working directory. It is entered with the permissions of the program's user.
    pub fn current_dir(&mut self, dir: impl AsRef<Path>) -> &mut Self {
        self.current_dir = Some(dir.as_ref().to_owned());
        self
    }

    // -- descriptors

    /// Standard input; at first this process's own, for [`Command::output`] /dev/null.
    pub fn stdin(&mut self, stream: impl Into<Stdio>) -> &mut Self {
        self.streams[0] = Some(stream.into());
        self
    }

    /// Standard output; at first this process's own, for [`Command::output`] a pipe.
    pub fn stdout(&mut self, stream: impl Into<Stdio>) -> &mut Self {
        self.streams[1] = Some(stream.into());
        self
    }

    /// Standard error; at first this process's own, for [`Command::output`] a pipe.
    pub fn stderr(&mut self, stream: impl Into<Stdio>) -> &mut Self {
        self.streams[2] = Some(stream.into());
        self
    }

    /// The program finds this descriptor, under the number that it has here. Close-on-exec stays set in this process.
    ///
    /// ```
    /// use carefork::Command;
    /// use std::os::fd::AsRawFd;
    /// let file = std::fs::File::open("/etc/passwd")?;
    /// let mut command = Command::new("head");
    /// command.arg("-1").arg(format!("/dev/fd/{}", file.as_raw_fd())).pass_fd(&file);
    /// assert!(command.status()?.success());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pass_fd(&mut self, fd: &'fd impl AsFd) -> &mut Self {
        let fd = fd.as_fd().as_raw_fd();
        self.passed.push((fd, fd));
        self
    }

    /// The program finds this descriptor as number `n`: any number, also 0 to 2, also one that is another descriptor's here. One can be
    /// passed under several numbers.
    pub fn pass_fd_as(&mut self, fd: &'fd impl AsFd, n: RawFd) -> &mut Self {
        self.passed.push((fd.as_fd().as_raw_fd(), n));
        self
    }

    /// Passes descriptors with names, as systemd passes sockets (sd_listen_fds(3)): as 3, 4 and so on, with `LISTEN_FDS`, `LISTEN_FDNAMES` and
    /// `LISTEN_PID`, the number of the process that execs. A second call adds to the first.
    pub fn listen_fds<N: Into<String>>(&mut self, fds: impl IntoIterator<Item = (N, BorrowedFd<'fd>)>) -> &mut Self {
        self.listen.extend(fds.into_iter().map(|(name, fd)| (name.into(), fd.as_raw_fd())));
        self
    }

    // -- the process

    /// What the program finds its signals as: at first [`Signals::Reset`], all at their defaults and none blocked.
    ///
    /// [`Signals::Inherit`] leaves ignored signals ignored and the mask as this thread's (what is caught is at its default after any exec).
    pub fn signals(&mut self, signals: Signals) -> &mut Self {
        self.signals = signals;
        self
    }

    /// The program leads a session of its own (setsid(2)), and with it a process group: [`Child::terminate`] ends that.
    pub fn session(&mut self, yes: bool) -> &mut Self {
        self.session = yes;
        self
    }

    /// The process group to be in; 0 is a new one, which [`Child::terminate`] ends together with the program.
    pub fn process_group(&mut self, group: i32) -> &mut Self {
        self.process_group = Some(group);
        self
    }

    /// The program's umask.
    pub fn umask(&mut self, mask: u32) -> &mut Self {
        self.umask = Some(mask);
        self
    }

    /// Limits a resource; `u64::MAX` is without limit.
    pub fn rlimit(&mut self, resource: Resource, soft: u64, hard: u64) -> &mut Self {
        self.limits.push((resource, soft, hard));
        self
    }

    /// The user to be. While the program starts, nobody can attach to this process and it writes no core dump (`dumpable` in prctl(2)).
    pub fn uid(&mut self, uid: u32) -> &mut Self {
        self.uid = Some(uid);
        self
    }

    /// The group to be.
    pub fn gid(&mut self, gid: u32) -> &mut Self {
        self.gid = Some(gid);
        self
    }

    /// The supplementary groups.
    pub fn groups(&mut self, groups: &[u32]) -> &mut Self {
        self.groups = Some(groups.to_vec());
        self
    }

    /// The signal that the program gets when the *thread* that starts it ends (prctl(2), `PR_SET_PDEATHSIG`), also if this process ends
    /// before the program begins. A program that is set-uid does not get it.
    pub fn death_signal(&mut self, signal: i32) -> &mut Self {
        self.death_signal = Some(signal);
        self
    }

    /// The budget: how long regions of other threads may keep the start waiting before it gives up with
    /// [`ForkError::Busy`](crate::ForkError::Busy); at first one second.
    pub fn timeout(&mut self, budget: Duration) -> &mut Self {
        self.timeout = Some(budget);
        self
    }

    /// Waits as long as it takes.
    pub fn timeout_never(&mut self) -> &mut Self {
        self.timeout = None;
        self
    }

    /// Runs a closure in the child, last of all before the exec. The last resort: the process is then *copied*, by a fork with everything that
    /// goes with it ([`fork`](crate::fork)), which takes longer the larger it is. An error that is no system's own arrives as EINVAL, a
    /// panic as an error as well; its message is one write(2) to fd 2, by carefork's panic hook, as in a child of [`spawn`](crate::spawn()).
    ///
    /// The start is over when the exec has closed a pipe. A child of another thread's fork that neither cleans up nor execs holds that pipe
    /// open too, and keeps this call waiting for as long as it lives, as with std.
    ///
    /// A descriptor to be passed must not be a care-fd with [`OnFork::Close`](crate::OnFork::Close), which is closed at the fork.
    ///
    /// # Safety
    /// The closure keeps to what the child of a fork may do: see [`fork`](crate::fork). It closes no descriptor that it has not opened.
    #[allow(unsafe_code)]
    pub unsafe fn pre_exec(&mut self, f: impl FnMut() -> io::Result<()> + Send + Sync + 'static) -> &mut Self {
        self.pre_exec.push(Box::new(f));
        self
    }

    // -- starting

    /// Starts the program. Its standard streams are this process's own unless given.
    ///
    /// # Errors
    /// [`CommandError`].
    ///
    /// # Panics
    /// If there is no memory for the first region of a new thread.
    pub fn spawn(&mut self) -> Result<Child, CommandError> {
        self.start([&Kind::Inherit; 3])
    }

    /// Starts the program and waits for its end.
    ///
    /// # Errors
    /// As for [`Command::spawn`]; [`Step::Wait`] if somebody else took the status.
    ///
    /// # Panics
    /// As for [`Command::spawn`].
    pub fn status(&mut self) -> Result<ExitStatus, CommandError> {
        self.spawn()?.wait().map_err(|e| CommandError::step(Step::Wait, e))
    }

    /// Starts the program, reads what it says, and waits for its end.
    ///
    /// # Errors
    /// As for [`Command::status`].
    ///
    /// # Panics
    /// As for [`Command::spawn`].
    pub fn output(&mut self) -> Result<Output, CommandError> {
        let child = self.start([&Kind::Null, &Kind::Piped, &Kind::Piped])?;
        child.wait_with_output().map_err(|e| CommandError::step(Step::Wait, e))
    }

    #[allow(unsafe_code)]
    fn start(&mut self, default: [&Kind; 3]) -> Result<Child, CommandError> {
        self.check()?;
        let [stdin, stdout, stderr] = &self.streams;
        let given = [stdin, stdout, stderr].map(|s| s.as_ref().map(|Stdio(kind)| kind));
        let [a, b, c] = default;
        let wanted = [given[0].unwrap_or(a), given[1].unwrap_or(b), given[2].unwrap_or(c)];
        let streams = Streams::open(wanted)?;
        let plan = self.plan(&streams)?;
        let started = if self.pre_exec.is_empty() {
            exec_start::start(&plan, self.timeout)
        } else {
            check_survive_fork(&plan)?;
            // SAFETY: the promise of whoever called `pre_exec`.
            unsafe { exec_start::start_by_fork(&plan, self.timeout, &mut self.pre_exec) }
        };
        let child = started.map_err(|why| match why {
            NotStarted::Fork(e) => CommandError::Fork(e),
            NotStarted::Pipe(e) => CommandError::step(Step::Pipe, e),
            NotStarted::Child(failure) => self.explain(&plan, failure),
        })?;
        let name = Path::new(&self.program).file_name().map(OsStr::to_string_lossy);
        let mut child = child.known_as(name.as_deref(), self.session || self.process_group == Some(0));
        streams.hand_over(&mut child);
        Ok(child)
    }

    /// What can be seen without starting anything.
    fn check(&self) -> Result<(), CommandError> {
        let invalid = |what: &'static str| Err(CommandError::Invalid(Cow::Borrowed(what)));
        if let Err(e) = self.signals.check() {
            let what = if let ForkError::Invalid(what) = e { what.into() } else { e.to_string().into() };
            return Err(CommandError::Invalid(what));
        }
        if self.session && self.process_group.is_some() {
            return invalid(
                "the leader of a new session leads its own process group: session and process_group exclude each other",
            );
        }
        if self.process_group.is_some_and(|g| g < 0) {
            return invalid("process_group is negative");
        }
        if self.death_signal.is_some_and(|s| !(1..=LAST).contains(&s)) {
            return invalid("death_signal is no signal");
        }
        for (name, _) in &self.listen {
            if name.len() > 255 || name.bytes().any(|b| b == b':' || !(b' '..127).contains(&b)) {
                let what =
                    format!("listen_fds: {name:?} is no name (255 printable ASCII characters at most, no colon)");
                return Err(CommandError::Invalid(what.into()));
            }
        }
        Ok(())
    }

    fn plan(&self, streams: &Streams) -> Result<Plan, CommandError> {
        let names: Vec<String> = self.listen.iter().map(|(name, _)| name.clone()).collect();
        let (envp, path) = self.env.build(&names)?;
        Ok(Plan {
            signals: self.signals.clone(),
            session: self.session,
            process_group: self.process_group,
            moves: Moves::new(&self.descriptors(streams)?),
            umask: self.umask,
            limits: self.limits.iter().map(|&(r, soft, hard)| Limit { resource: r.number(), soft, hard }).collect(),
            groups: self.groups.clone(),
            gid: self.gid,
            uid: self.uid,
            current_dir: self.current_dir.as_ref().map(|dir| c_string("current_dir", dir.as_os_str())).transpose()?,
            death_signal: self.death_signal,
            parent: sys::getpid(),
            argv: self.argv()?,
            envp,
            programs: candidates(&self.program, path.as_deref())?,
        })
    }

    fn argv(&self) -> Result<Strings, CommandError> {
        let mut argv = StringsBuilder::default();
        for arg in [self.arg0.as_ref().unwrap_or(&self.program)].into_iter().chain(&self.args) {
            check_nul("argument", arg)?;
            argv.push(&[arg.as_bytes()]);
        }
        Ok(argv.finish())
    }

    /// Which descriptor each number is to be.
    fn descriptors(&self, streams: &Streams) -> Result<BTreeMap<RawFd, RawFd>, CommandError> {
        let mut wanted = BTreeMap::new();
        let listen = (3..).zip(&self.listen).map(|(n, (_, fd))| (*fd, n));
        for (from, to) in self.passed.iter().copied().chain(listen) {
            if to < 0 || from < 0 {
                return Err(CommandError::Invalid("a descriptor is to be passed as a negative number".into()));
            }
            if wanted.insert(to, from).is_some_and(|other| other != from) {
                let what = format!("two descriptors are to be number {to} (listen_fds begins at 3)");
                return Err(CommandError::Invalid(what.into()));
            }
        }
        for (to, from) in (0..).zip(streams.given) {
            let Some(from) = from else { continue };
            let explicit = self.streams[to as usize].is_some();
            match wanted.get(&to) {
                Some(_) if !explicit => {}
                Some(other) if *other != from => {
                    let what = format!("two descriptors are to be number {to}: a standard stream and one to be passed");
                    return Err(CommandError::Invalid(what.into()));
                }
                _ => drop(wanted.insert(to, from)),
            }
        }
        Ok(wanted)
    }

    /// The child's failure with what was asked for.
    fn explain(&self, plan: &Plan, failure: Failure) -> CommandError {
        let Failure { stage, index, errno } = failure;
        let index = index as usize;
        let mut source = io::Error::from_raw_os_error(errno);
        let step = match stage {
            Stage::Session => Step::Session,
            Stage::ProcessGroup => Step::ProcessGroup(self.process_group.unwrap_or_default()),
            Stage::Descriptor => match plan.moves.steps.get(index).map(|m| m.asked()) {
                Some((from, to)) if errno == libc::EBADF && !sys_exec::is_open(from) => Step::NotOpen { from, to },
                Some((from, to)) => Step::Descriptor { from, to },
                None => Step::Pipe,
            },
            Stage::Limit => Step::Limit(self.limits.get(index).map_or(Resource::NoFile, |l| l.0)),
            Stage::Groups => Step::Groups,
            Stage::Gid => Step::Gid(self.gid.unwrap_or_default()),
            Stage::Uid => Step::Uid(self.uid.unwrap_or_default()),
            Stage::CurrentDir => Step::CurrentDir(self.current_dir.clone().unwrap_or_default()),
            Stage::DeathSignal => Step::DeathSignal(self.death_signal.unwrap_or_default()),
            Stage::PreExec => {
                if errno == PANICKED {
                    source = io::Error::other("it panicked");
                }
                Step::PreExec(index)
            }
            Stage::Exec | Stage::GaveWay => Step::Exec(self.program.clone()),
        };
        CommandError::Step { step, source }
    }
}

/// With `pre_exec` there is a fork, at which some care-fds are closed.
fn check_survive_fork(plan: &Plan) -> Result<(), CommandError> {
    let closed = |fd: RawFd| care_table::Kind::of(care_table::TABLE.word(fd)) == Some(care_table::Kind::Close);
    match plan.moves.steps.iter().map(|m| m.asked().0).find(|&from| closed(from)) {
        Some(fd) => {
            let what = format!(
                "descriptor {fd} is a care-fd with OnFork::Close, which the fork of pre_exec closes: register it with OnFork::Cleanup"
            );
            Err(CommandError::Invalid(what.into()))
        }
        None => Ok(()),
    }
}

/// Where execvp(3) would look: the program itself if it has a slash, else in each directory of `path`.
fn candidates(program: &OsStr, path: Option<&OsStr>) -> Result<Vec<CString>, CommandError> {
    let name = program.as_bytes();
    if name.is_empty() || name.contains(&b'/') {
        return Ok(vec![c_string("program", program)?]);
    }
    let path = path.map_or(&b"/bin:/usr/bin"[..], OsStr::as_bytes);
    let join = |dir: &[u8]| {
        let mut whole = dir.to_vec();
        if !dir.is_empty() {
            whole.push(b'/');
        }
        whole.extend_from_slice(name);
        c_string("program", &OsString::from_vec(whole))
    };
    path.split(|&b| b == b':').map(join).collect()
}

fn check_nul(what: &str, text: &OsStr) -> Result<(), CommandError> {
    if text.as_bytes().contains(&0) {
        return Err(CommandError::Invalid(format!("{what} {text:?} has a NUL byte").into()));
    }
    Ok(())
}

fn c_string(what: &str, text: &OsStr) -> Result<CString, CommandError> {
    check_nul(what, text)?;
    CString::new(text.as_bytes()).map_err(|e| CommandError::Invalid(e.to_string().into()))
}

/// As one would type it, without the changes to the environment.
impl fmt::Debug for Command<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.program)?;
        self.args.iter().try_for_each(|arg| write!(f, " {arg:?}"))
    }
}
