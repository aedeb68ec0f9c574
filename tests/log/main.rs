//! The log across forks: each record once, where its process writes, whole (B1, B3).

// Forks, and signals sent to children.
#![allow(unsafe_code, clippy::disallowed_methods, clippy::mem_forget, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../drive/mod.rs"]
mod drive;
#[path = "../logs/mod.rs"]
mod logs;

mod amid_forks;
mod child;
mod ends;
mod full;
mod once;
mod output;
mod settings;

use carefork::log::{Builder, Logger, Output};
use common::{Verdict, reap};
use drive::{BOTH, SOON};
use logs::{Scratch, noexec, numbers};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::thread;

#[track_caller]
fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// A fork of each kind, one after the other; the children clean up.
#[track_caller]
fn in_both(f: impl Fn() -> i32) {
    for kind in BOTH {
        ends_well(noexec(kind, &f));
    }
}

/// A line of ours: time, level, thread, target, all of them well-formed.
#[track_caller]
fn assert_whole(line: &str) {
    let mut parts = line.splitn(3, ' ');
    let stamp = parts.next().expect("split finds one");
    let parsed: Result<jiff::Timestamp, _> = stamp.parse();
    assert!(parsed.is_ok() && stamp.len() == "2026-11-21T07:03:12.345678+01:00".len(), "{line:?}");
    assert_eq!(parts.next(), Some("INFO"), "{line:?}");
    let rest = parts.next().expect("more than that").trim_start();
    assert!(rest.starts_with('['), "{line:?}");
    assert!(rest.contains("] storm: "), "{line:?}");
}

/// A logger of each kind, four of them: to a file, and to a writer, which is one too.
fn logger_of(file: &Scratch, n: usize) -> Logger {
    let builder = Builder::new();
    match n {
        0 => builder.output(Output::file(&file.0).expect("a file")).build(),
        1 => builder.output(Output::file(&file.0).expect("a file")).background(8).build(),
        2 => builder.output(Output::writer(file.append())).build(),
        _ => builder.output(Output::writer(file.append())).background(1).build(),
    }
}

/// What comes after the head of each line.
fn messages(text: &str) -> Vec<&str> {
    text.lines().map(|line| line.rsplit_once(": ").expect("a head").1).collect()
}

/// A writer that is what its function makes of a line.
struct By<F>(F);

impl<F: FnMut(&[u8]) -> io::Result<usize>> Write for By<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.0)(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log_by(logger: &Logger, message: &str) {
    let builder = &mut ::log::Record::builder();
    let arguments = format_args!("{message}");
    ::log::Log::log(logger, &builder.level(::log::Level::Info).target("storm").args(arguments).build());
}

/// Fills a pipe to the brim, so that the next write sleeps.
fn full_pipe() -> (io::PipeReader, io::PipeWriter) {
    let (from, mut to) = io::pipe().expect("a pipe");
    let blocking = |fd: i32, on: bool| {
        // SAFETY: flags of a pipe of ours.
        unsafe { libc::fcntl(fd, libc::F_SETFL, if on { 0 } else { libc::O_NONBLOCK }) };
    };
    blocking(to.as_raw_fd(), false);
    while to.write(&[b'-'; 4096]).is_ok() {}
    blocking(to.as_raw_fd(), true);
    (from, to)
}

/// What is in the pipe by now.
fn in_pipe(from: &mut io::PipeReader) -> String {
    let mut bytes: libc::c_int = 0;
    // SAFETY: `bytes` is live, and what this request writes to.
    assert_eq!(unsafe { libc::ioctl(from.as_raw_fd(), libc::FIONREAD, &raw mut bytes) }, 0);
    let mut text = vec![0; bytes as usize];
    from.read_exact(&mut text).expect("they are there");
    String::from_utf8(text).expect("text")
}

/// Reads what is there after the filling, until the last writer is gone.
fn drained(mut from: io::PipeReader) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        from.read_to_string(&mut text).expect("text");
        text.trim_start_matches('-').to_owned()
    })
}

fn numbered(text: &str) -> Vec<u64> {
    let lines = text.lines().filter(|line| !line.contains(" lost: "));
    lines.map(|line| numbers(line, "record").unwrap_or_else(|| panic!("no record: {line:?} in\n{text}")).1).collect()
}

/// How many records the lines of the log's own say were lost.
fn lost(text: &str) -> u64 {
    let told = text.lines().filter_map(|line| line.split_once("carefork::log: ")?.1.split_once(" record"));
    told.map(|(n, _)| n.parse::<u64>().expect("a number")).sum()
}

fn limit_files(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is live.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
}
