//! `/proc/PID`, read while other threads go on.

use super::sockets::{self, Sockets};
use super::{Audit, Care, Descriptor, Kind, exec_fate, noexec_fate};
use crate::care_table::{self, TABLE};
use crate::carefd::{CareFd, OnFork};
use crate::region::no_forking;
use crate::sys;
use crate::sys_socket::{self, Said};
use std::ffi::CString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};

/// How often a number that changes hands is looked at. Threads that open and close as fast as they can spoiled 16 looks in a
/// row once in some hundred audits.
const LOOKS: u32 = 256;

/// Not /proc/self: that is the main thread's, which may have ended.
const OWN: &str = "/proc/thread-self";

/// A process to look at.
struct Process {
    /// `None`: this one.
    pid: Option<u32>,
    /// Its directory, or that of one of its threads.
    dir: String,
    /// Keeps `dir` this process's: the number of one that ends may be another's at once, what is open is not.
    held: Option<CareFd<File>>,
}

/// What a number referred to at one instant.
struct Object {
    link: String,
    kind: Kind,
    info: String,
    /// Of a socket, the kernel's name for what it speaks.
    protocol: Option<String>,
    /// Of this process's sockets.
    said: Option<Said>,
}

impl Object {
    /// Whether `info`, the number's own, is of the same object. Kernels before 5.14 do not tell; what has no inode of its own
    /// (eventfd, epoll) looks all the same.
    fn is(&self, info: &str) -> bool {
        ["ino:", "mnt_id:"].iter().all(|name| field(info, name) == field(&self.info, name))
    }
}

pub(super) fn read(pid: Option<u32>) -> io::Result<Audit> {
    let mut process = Process::open(pid)?;
    let mut found = process.audit();
    for _ in 0..LOOKS {
        match &found {
            Err(e) if is_gone(e) && process.turn_to_a_living_thread() => found = process.audit(),
            _ => break,
        }
    }
    found.map_err(|e| process.explain(e))
}

/// This process's care-fds.
pub(super) fn care_fds() -> Vec<(RawFd, OnFork, Option<Descriptor>)> {
    let this = Process { pid: None, dir: OWN.to_owned(), held: None };
    let mut registered = Vec::new();
    TABLE.each(&[care_table::Kind::Cleanup, care_table::Kind::Close], |number, kind| {
        // Before anything is opened here, which would take the number of one that was closed behind carefork's back.
        let word = TABLE.word(number);
        let is_open = sys::get_fd_flags(number).is_ok();
        if TABLE.word(number) == word {
            registered.push((number, on_fork(kind), word, is_open));
        }
    });
    let mut sockets = Sockets::new();
    let mut found = Vec::with_capacity(registered.len());
    for (number, on, word, is_open) in registered {
        let seen = if is_open { this.look(number, &mut sockets).unwrap_or(None) } else { None };
        // Else it was given up meanwhile.
        if !is_open || TABLE.word(number) == word {
            found.push((number, on, seen));
        }
    }
    found
}

fn on_fork(kind: care_table::Kind) -> OnFork {
    match kind {
        care_table::Kind::Cleanup => OnFork::Cleanup,
        care_table::Kind::Close => OnFork::Close,
    }
}

impl Process {
    fn open(pid: Option<u32>) -> io::Result<Process> {
        let Some(number) = pid else {
            return Ok(Process { pid, dir: OWN.to_owned(), held: None });
        };
        let held = CareFd::open(|| File::open(format!("/proc/{number}"))).map_err(|e| explain(pid, e))?;
        let dir = format!("{OWN}/fd/{}", held.as_raw_fd());
        Ok(Process { pid, dir, held: Some(held) })
    }

    /// The process's own directory is its first thread's, which has nothing open once it has ended; others may go on. False if none
    /// does.
    fn turn_to_a_living_thread(&mut self) -> bool {
        let Some(held) = &self.held else { return false };
        let tasks = format!("{OWN}/fd/{}/task", held.as_raw_fd());
        let lives = |task: &RawFd| slurp(&format!("{tasks}/{task}/status")).is_ok_and(|status| !has_ended(&status));
        let Some(task) = numbers(&tasks).unwrap_or_default().into_iter().find(lives) else { return false };
        self.dir = format!("{tasks}/{task}");
        true
    }

    fn audit(&self) -> io::Result<Audit> {
        self.look_at_all().map_err(|e| match e.kind() {
            ErrorKind::PermissionDenied if self.is_ending() => io::Error::from_raw_os_error(libc::ESRCH),
            _ => e,
        })
    }

    /// One of this user's that has let go of its memory is root's for the rest of its end.
    fn is_ending(&self) -> bool {
        let (Ok(its), Ok(own)) = (self.read("status"), slurp(&format!("{OWN}/status"))) else { return false };
        field(&its, "Uid:") == field(&own, "Uid:") && field(&its, "VmSize:").is_empty()
    }

    fn look_at_all(&self) -> io::Result<Audit> {
        let numbers = numbers(&self.path("fd"))?;
        let mut descriptors = Vec::with_capacity(numbers.len());
        // Later than the list: what is in it is older than the tables.
        let mut sockets = Sockets::new();
        for number in numbers {
            descriptors.extend(self.look(number, &mut sockets)?);
        }
        let status = self.read("status")?;
        if self.pid.is_some() && has_ended(&status) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // The process's; the directory may be the thread's.
        let name = match &self.held {
            None => slurp("/proc/self/comm").unwrap_or_else(|_| field(&status, "Name:").to_owned()),
            Some(held) => slurp(&format!("{OWN}/fd/{}/comm", held.as_raw_fd()))?,
        };
        let set = |name| signals(u64::from_str_radix(field(&status, name), 16).unwrap_or(0));
        Ok(Audit {
            pid: self.pid.unwrap_or_else(std::process::id),
            name: name.trim_end().to_owned(),
            threads: field(&status, "Threads:").parse().unwrap_or(0),
            descriptors,
            caught: set("SigCgt:"),
            ignored: set("SigIgn:"),
            blocked: set("SigBlk:"),
        })
    }

    /// One descriptor; `None` if it is not open any more, or never was for long enough to be looked at.
    fn look(&self, number: RawFd, sockets: &mut Sockets) -> io::Result<Option<Descriptor>> {
        for _ in 0..LOOKS {
            let word = self.word(number);
            let Some(object) = self.object(number)? else { return Ok(None) };
            let Some(info) = gone_is_none(self.read(&format!("fdinfo/{number}")))? else { continue };
            let care = match (self.pid, care_table::Kind::of(word)) {
                (Some(_), _) => Care::Unknown,
                (None, None) => Care::No,
                (None, Some(kind)) => Care::On(on_fork(kind)),
            };
            if object.is(&info) && self.word(number) == word {
                return Ok(Some(self.describe(number, care, object, &info, sockets)));
            }
        }
        Ok(None)
    }

    /// Moves on whenever the number is registered.
    fn word(&self, number: RawFd) -> u32 {
        if self.pid.is_some() { 0 } else { TABLE.word(number) }
    }

    /// What the number refers to now.
    fn object(&self, number: RawFd) -> io::Result<Option<Object>> {
        let path = self.path(&format!("fd/{number}"));
        // The path alone is opened, not what it leads to: no driver notices, nobody waits for its close, no lock is lost by it.
        let held = CareFd::open(|| OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path));
        let Some(held) = gone_is_none(held)? else { return Ok(None) };
        let own = held.as_raw_fd();
        let link = fs::read_link(format!("{OWN}/fd/{own}"))?.to_string_lossy().into_owned();
        // A filesystem that is gone does not keep the others from being shown.
        let kind = kind_of(&link, held.metadata().ok().as_ref());
        let is_socket = kind == Kind::Socket;
        let path = CString::new(format!("{OWN}/fd/{own}")).ok().filter(|_| is_socket);
        let protocol = path.and_then(|path| sys_socket::protocol(&path));
        // What has the number now is what was opened, or else that is found out later.
        let said = if is_socket && self.pid.is_none() { sys_socket::said(number) } else { None };
        Ok(Some(Object { link, kind, info: slurp(&format!("{OWN}/fdinfo/{own}"))?, protocol, said }))
    }

    fn describe(&self, number: RawFd, care: Care, object: Object, info: &str, sockets: &mut Sockets) -> Descriptor {
        let Object { link, kind, protocol, said, .. } = object;
        let (kind, target) = match kind {
            Kind::Socket => self.socket(link, protocol, said, sockets),
            Kind::Pidfd => match field(info, "Pid:") {
                "" => (kind, link),
                "-1" => (kind, "of a process that was reaped".to_owned()),
                pid => (kind, format!("of process {pid}")),
            },
            Kind::Epoll => (kind, watched(info).unwrap_or(link)),
            _ => (kind, link),
        };
        let flags = i32::from_str_radix(field(info, "flags:"), 8).unwrap_or(0);
        let mode = flags & libc::O_ACCMODE;
        let is_path = flags & libc::O_PATH != 0;
        let close_on_exec = flags & libc::O_CLOEXEC != 0;
        // POSIX locks are a process's own: no child has them.
        let locked = lines(info, "lock:").any(|l| ["FLOCK", "OFDLCK", "LEASE"].iter().any(|&k| l.contains(k)));
        Descriptor {
            number,
            kind,
            target,
            read: !is_path && mode != libc::O_WRONLY,
            write: !is_path && mode != libc::O_RDONLY,
            close_on_exec,
            locked,
            care,
            noexec: noexec_fate(number, care, kind, locked),
            exec: exec_fate(number, close_on_exec),
        }
    }

    fn socket(
        &self,
        link: String,
        protocol: Option<String>,
        said: Option<Said>,
        sockets: &mut Sockets,
    ) -> (Kind, String) {
        let is_unix = match (&said, &protocol) {
            (Some(said), _) => Some(said.family == libc::AF_UNIX),
            (None, Some(protocol)) => Some(protocol.starts_with("UNIX")),
            (None, None) => None,
        };
        if let Some(Said { family: libc::AF_UNIX, kind, listens, name }) = said {
            let name = name.map(|name| String::from_utf8_lossy(&name).into_owned());
            return (sockets::unix_kind(kind, listens), name.unwrap_or(link));
        }
        let inode = link.strip_prefix("socket:[").and_then(|l| l.strip_suffix(']')).and_then(|i| i.parse().ok());
        let mut listed_as =
            |is_unix| sockets.find(inode?, is_unix, |table| self.read(&format!("net/{table}")).unwrap_or_default());
        let listed = match is_unix {
            Some(is_unix) => listed_as(is_unix),
            None => listed_as(false).or_else(|| listed_as(true)),
        };
        if let Some((kind, address)) = listed {
            return (kind, address.unwrap_or(link));
        }
        // Not bound yet, of a family without a table, or of another network namespace.
        let listens = said.map(|said| said.listens);
        let kind = protocol.as_deref().map_or(Kind::Socket, |name| sockets::kind_of_protocol(name, listens));
        let target = match protocol {
            Some(p) if kind == Kind::Socket => format!("{p} {link}"),
            _ => link,
        };
        (kind, target)
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    fn read(&self, name: &str) -> io::Result<String> {
        slurp(&self.path(name))
    }

    fn explain(&self, e: io::Error) -> io::Error {
        explain(self.pid, e)
    }
}

/// The numbers that a directory of /proc lists, of descriptors or threads, rising.
fn numbers(dir: &str) -> io::Result<Vec<RawFd>> {
    let mut numbers = Vec::new();
    {
        // The list's own descriptor cannot be a care-fd: instead no child gets it. Once it is closed, it is passed over
        // with all that was closed since.
        let _region = no_forking();
        for entry in fs::read_dir(dir)? {
            numbers.extend(entry?.file_name().to_str().and_then(|n| n.parse::<RawFd>().ok()));
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn has_ended(status: &str) -> bool {
    field(status, "State:").starts_with(['Z', 'X'])
}

/// An error that says whose descriptors could not be read, and why.
fn explain(pid: Option<u32>, e: io::Error) -> io::Error {
    let gone = is_gone(&e);
    match pid {
        Some(pid) if gone => io::Error::new(ErrorKind::NotFound, format!("there is no process {pid}")),
        Some(pid) if e.kind() == ErrorKind::PermissionDenied => io::Error::new(
            ErrorKind::PermissionDenied,
            format!(
                "process {pid} is not yours to look at: run this as its owner or as root; if you do, the rules of ptrace(2) or of a \
                 container are in the way ({e})"
            ),
        ),
        Some(pid) => io::Error::new(e.kind(), format!("process {pid}: {e}")),
        None if gone => io::Error::new(ErrorKind::NotFound, format!("is /proc mounted? ({e})")),
        None => e,
    }
}

fn is_gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// A descriptor that was closed; a process that has ended is an error.
fn gone_is_none<T>(r: io::Result<T>) -> io::Result<Option<T>> {
    match r {
        Ok(t) => Ok(Some(t)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The whole of a file of /proc. A fork meanwhile does not wait; its child closes the file in its clean-up.
pub(super) fn slurp(path: &str) -> io::Result<String> {
    let file = CareFd::open(|| File::open(path))?;
    let mut bytes = Vec::new();
    (&*file).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The values of all lines that begin with `name`.
fn lines<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |l| l.strip_prefix(name)).map(str::trim)
}

fn field<'a>(text: &'a str, name: &'a str) -> &'a str {
    lines(text, name).next().unwrap_or("")
}

fn watched(info: &str) -> Option<String> {
    let mut numbers: Vec<RawFd> =
        lines(info, "tfd:").filter_map(|l| l.split_whitespace().next()?.parse().ok()).collect();
    // The kernel goes by the address of what is watched.
    numbers.sort_unstable();
    let numbers: Vec<String> = numbers.iter().map(RawFd::to_string).collect();
    if numbers.is_empty() { None } else { Some(format!("of {}", numbers.join(" "))) }
}

/// Bit n-1 is signal n.
fn signals(set: u64) -> Vec<i32> {
    (1..=64).filter(|n| set >> (n - 1) & 1 == 1).collect()
}

/// By the kernel's name for it, and by its type. A socket's kind is found later.
fn kind_of(link: &str, metadata: Option<&Metadata>) -> Kind {
    if let Some(name) = link.strip_prefix("anon_inode:") {
        return match name.trim_matches(['[', ']']) {
            "eventfd" => Kind::Eventfd,
            "timerfd" => Kind::Timerfd,
            "signalfd" => Kind::Signalfd,
            "eventpoll" => Kind::Epoll,
            "inotify" => Kind::Inotify,
            "fanotify" => Kind::Fanotify,
            "pidfd" => Kind::Pidfd,
            "io_uring" => Kind::IoUring,
            "userfaultfd" => Kind::Userfaultfd,
            _ => Kind::Other,
        };
    }
    // What has no path: `socket:[1]`, `pipe:[1]`, `net:[1]`. A path begins with a slash, or with "(unreachable)".
    if !link.starts_with(['/', '('])
        && let Some((kind, _)) = link.split_once(":[")
    {
        return match kind {
            "socket" => Kind::Socket,
            "pipe" => Kind::Pipe,
            "pidfd" => Kind::Pidfd,
            "cgroup" | "ipc" | "mnt" | "net" | "pid" | "pid_for_children" | "time" | "time_for_children" | "user"
            | "uts" => Kind::Namespace,
            _ => Kind::Other,
        };
    }
    let Some(m) = metadata else { return Kind::Other };
    let kind = m.file_type();
    match () {
        // A file of that name in the root directory has links.
        () if kind.is_file() && link.starts_with("/memfd:") && m.nlink() == 0 => Kind::Memfd,
        () if kind.is_file() => Kind::File,
        () if kind.is_dir() => Kind::Directory,
        () if kind.is_fifo() => Kind::Fifo,
        () if kind.is_char_device() && is_terminal(libc::major(m.rdev())) => Kind::Terminal,
        () if kind.is_char_device() || kind.is_block_device() => Kind::Device,
        () => Kind::Other,
    }
}

/// By the numbers that Linux gives out for ever: consoles and serial lines, /dev/tty and /dev/ptmx, /dev/pts; ttyACM, ttyUSB, ttyAMA
/// and the like of it, consoles of virtual machines (hvc).
fn is_terminal(major: u32) -> bool {
    matches!(major, 4 | 5 | 136..=143 | 166 | 188 | 204 | 229)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux shows them: by where they lie in its memory.
    #[test]
    fn what_an_epoll_watches_rises() {
        let info = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t9\n\
                    tfd:       11 events:       19 data:                b  pos:0 ino:33 sdev:8\n\
                    tfd:        4 events:       19 data:                4  pos:0 ino:34 sdev:8\n\
                    tfd:      100 events:       19 data:                7  pos:0 ino:35 sdev:8\n";
        assert_eq!(watched(info).as_deref(), Some("of 4 11 100"));
        assert_eq!(watched("pos:\t0\n"), None);
    }
}
