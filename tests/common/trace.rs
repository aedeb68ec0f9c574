//! What a process that should have ended is waiting for: what the watchdogs print before they kill.

use super::{proc, raw};
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Seek as _};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How many processes of a tree get a stack from gdb, each of which takes about a second on an idle machine.
const STACKS: usize = 4;
const GDB_BOUND: Duration = Duration::from_secs(20);
const STACK_BYTES: usize = 24 * 1024;

/// `root` and all its descendants that still have a chain of parents up to it, `root` first.
pub fn tree(root: libc::pid_t) -> Vec<libc::pid_t> {
    let parents: Vec<_> = all().into_iter().filter_map(|pid| Some((pid, parent_of(pid)?))).collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let children = parents.iter().filter(|&&(_, parent)| parent == found[next]).map(|&(pid, _)| pid);
        let new: Vec<_> = children.filter(|pid| !found.contains(pid)).collect();
        found.extend(new);
        next += 1;
    }
    found
}

/// Processes whose environment has the line `tag`: descendants also of parents that are gone, in whatever session.
/// Those that have ended and wait to be reaped show no environment and are left out.
pub fn tagged(tag: &str) -> Vec<libc::pid_t> {
    let has = |pid: &libc::pid_t| {
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|&b| b == 0).any(|line| line == tag.as_bytes())
    };
    all().into_iter().filter(has).collect()
}

fn all() -> Vec<libc::pid_t> {
    let entries = fs::read_dir("/proc").expect("/proc");
    entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn parent_of(pid: libc::pid_t) -> Option<libc::pid_t> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold blanks and brackets; the state and the parent follow the last bracket.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// For each process and each of its threads: name, state, wait channel and system call; for the first few processes
/// the stacks too, where gdb is present.
pub fn report(pids: &[libc::pid_t]) -> String {
    let mut out = String::new();
    for (n, &pid) in pids.iter().enumerate() {
        let parent = parent_of(pid).unwrap_or(0);
        writeln!(out, "process {pid}, child of {parent}").expect("writing to a String");
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
        for tid in tasks.filter_map(|e| e.ok()?.file_name().into_string().ok()) {
            out.push_str(&thread(pid, &tid));
        }
        if n < STACKS {
            out.push_str(&stacks(pid));
        }
    }
    out
}

fn thread(pid: libc::pid_t, tid: &str) -> String {
    let read = |file: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/{file}")).unwrap_or_else(|e| format!("({e})"));
        text.trim_end().to_owned()
    };
    let stat = read("stat");
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('?');
    let call = read("syscall");
    let name = call.split(' ').next().and_then(|nr| nr.parse().ok()).and_then(call_name).unwrap_or("");
    format!("  thread {tid} {:?}: state {state}, wchan {}, syscall {name} {call}\n", read("comm"), read("wchan"))
}

/// Names of the calls in which a child is likely to hang.
fn call_name(nr: libc::c_long) -> Option<&'static str> {
    const NAMES: &[(libc::c_long, &str)] = &[
        (libc::SYS_futex, "futex"),
        (libc::SYS_read, "read"),
        (libc::SYS_write, "write"),
        (libc::SYS_wait4, "wait4"),
        (libc::SYS_waitid, "waitid"),
        (libc::SYS_ppoll, "ppoll"),
        (libc::SYS_clock_nanosleep, "clock_nanosleep"),
        (libc::SYS_rt_sigsuspend, "rt_sigsuspend"),
        (libc::SYS_flock, "flock"),
        (libc::SYS_recvmsg, "recvmsg"),
        (libc::SYS_epoll_pwait, "epoll_pwait"),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_poll, "poll"),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_pause, "pause"),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_epoll_wait, "epoll_wait"),
    ];
    NAMES.iter().find(|&&(n, _)| n == nr).map(|&(_, name)| name)
}

fn stacks(pid: libc::pid_t) -> String {
    match proc::status_of(pid) {
        Ok(status) if status.tracer != 0 => return format!("  (traced by {}: no stacks)\n", status.tracer),
        Err(_) => return "  (gone)\n".to_owned(),
        Ok(_) => {}
    }
    // Into a file, not a pipe: a gdb that hangs itself must not hang the watchdog.
    let mut file = fs::File::from(raw::memfd());
    let run = |file: &fs::File| {
        Command::new("gdb")
            .args(["-nx", "-q", "-batch", "-iex", "set debuginfod enabled off", "-iex", "set auto-load off"])
            .args(["-ex", "thread apply all bt 40", "-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(Stdio::null())
            .spawn()
    };
    let Ok(mut gdb) = run(&file) else { return "  (no gdb: no stacks)\n".to_owned() };
    if let Some(pidfd) = i32::try_from(gdb.id()).ok().and_then(raw::pidfd_open) {
        raw::poll_readable(&mut [raw::pollfd(pidfd.as_raw_fd())], raw::patience(GDB_BOUND));
    }
    // Ended already, or over its bound: either way it ends here.
    drop(gdb.kill());
    drop(gdb.wait());
    let mut bytes = Vec::new();
    let read = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    if read.is_err() {
        return "  (gdb's output is lost)\n".to_owned();
    }
    let cut = bytes.len() > STACK_BYTES;
    bytes.truncate(STACK_BYTES);
    let text = String::from_utf8_lossy(&bytes);
    // What comes before the first thread is about loading symbols.
    let from = text.find("\nThread ").map_or(0, |at| at + 1);
    format!("{}{}\n", &text[from..], if cut { "\n  (cut here)" } else { "" })
}

/// SIGKILL to each.
pub fn kill(pids: &[libc::pid_t]) {
    for &pid in pids {
        // SAFETY: takes no pointers. Our caller names processes that descend from this one.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}
