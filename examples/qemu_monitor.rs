//! Starts QEMU's storage daemon with its monitor on a socket that was opened beforehand, talks to it, and shuts it down.
//!
//! `cargo run --example qemu_monitor` (Debian package qemu-utils). Because the socket listens before the daemon exists, there is no
//! wait loop: connect() succeeds at once, the first read waits for the greeting, and if the daemon dies instead, it fails at once.

#![allow(unsafe_code)]

use carefork::CareFd;
use std::error::Error;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Where the daemon finds its socket.
const NUMBER: RawFd = 3;

fn main() -> Result<(), Box<dyn Error>> {
    // For the owner only: who reaches the monitor owns the daemon.
    let path = std::env::temp_dir().join(format!("qemu-monitor-{}", std::process::id()));
    let listener = CareFd::open_cloexec(|| UnixListener::bind(&path))?;
    let connection = UnixStream::connect(&path)?;
    // Whoever is to come is here; nobody else finds it.
    std::fs::remove_file(&path)?;

    let mut daemon = start(listener.into_inner().into())?;
    let answer = talk(connection);
    // The daemon ends by `quit`, or has ended, or is of no use.
    if answer.is_err() {
        drop(daemon.kill());
    }
    let status = daemon.wait()?;
    answer?;
    println!("the daemon ended: {status}");
    if status.success() { Ok(()) } else { Err("the daemon failed".into()) }
}

/// The daemon gets the listener, and this process gives it up: were it open here too, clients of a dead daemon would wait for ever.
fn start(listener: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new("qemu-storage-daemon");
    // The client is there, so wait=on does not wait; with wait=off QEMU 10.0 now and then greets twice, or never answers.
    command.args(["--chardev", &format!("socket,fd={NUMBER},server=on,wait=on,id=monitor")]);
    command.args(["--monitor", "chardev=monitor"]);
    let fd = listener.as_raw_fd();
    let pass = move || {
        let done = if fd == NUMBER {
            // SAFETY: takes numbers only. It is in its place; close-on-exec goes.
            unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }
        } else {
            // SAFETY: takes numbers only. The copy has close-on-exec clear.
            unsafe { libc::dup2(fd, NUMBER) }
        };
        if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: one system call, nothing is allocated.
    unsafe { command.pre_exec(pass) };
    command.spawn()
}

fn talk(mut connection: UnixStream) -> io::Result<()> {
    let mut lines = BufReader::new(connection.try_clone()?).lines();
    let mut next = || lines.next().unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()));
    println!("{}", next()?);
    for command in ["qmp_capabilities", "query-chardev", "quit"] {
        // In one write: QEMU answers to the last brace, and after `quit` nobody is there for a line's end.
        connection.write_all(format!("{{\"execute\": \"{command}\"}}\n").as_bytes())?;
        // Events may come in between.
        let answer = loop {
            let line = next()?;
            if !line.starts_with(r#"{"timestamp""#) {
                break line;
            }
        };
        println!("{command}: {answer}");
    }
    Ok(())
}
