//! Starts QEMU's storage daemon with its monitor on a socket that was opened beforehand, talks to it, and shuts it down.
//!
//! `cargo run --example qemu_monitor` (Debian package qemu-utils). Because the socket listens before the daemon exists, there is no
//! wait loop: connect() succeeds at once, the first read waits for the greeting, and if the daemon dies instead, it fails at once.

use carefork::{CareFd, Child, Command, CommandError};
use std::error::Error;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::RawFd;
use std::os::unix::net::{UnixListener, UnixStream};

/// Where the daemon finds its socket.
const NUMBER: RawFd = 3;

fn main() -> Result<(), Box<dyn Error>> {
    // For the owner only: who reaches the monitor owns the daemon.
    let path = std::env::temp_dir().join(format!("qemu-monitor-{}", std::process::id()));
    let listener = CareFd::open_cloexec(|| UnixListener::bind(&path))?;
    let connection = UnixStream::connect(&path)?;
    // Whoever is to come is here; nobody else finds it.
    std::fs::remove_file(&path)?;

    let mut daemon = start(listener)?;
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
fn start(listener: CareFd<UnixListener>) -> Result<Child, CommandError> {
    Command::new("qemu-storage-daemon")
        // The client is there, so wait=on does not wait; with wait=off QEMU 10.0 now and then greets twice, or never answers.
        .args(["--chardev", &format!("socket,fd={NUMBER},server=on,wait=on,id=monitor")])
        .args(["--monitor", "chardev=monitor"])
        .pass_fd_as(&listener, NUMBER)
        .spawn()
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
