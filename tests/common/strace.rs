//! The system calls of an isolated test, counted by strace.

use super::isolate::{NAME, Setup, run_isolated};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

/// One system call out of strace's file.
#[derive(Debug, Clone)]
pub struct Syscall {
    pub pid: libc::pid_t,
    pub name: String,
    /// The line without the pid; what was resumed later is joined to its beginning.
    pub line: String,
}

/// As [`super::isolated`], under `strace -f`: every system call of the process and its children, in the order of beginning.
/// None where strace cannot run, which is said on standard error (a failure if `CAREFORK_REQUIRE_TOOLS` is set).
#[track_caller]
pub fn count_syscalls(test_name: &str, seconds: u32, mut setup: Setup, f: impl FnOnce()) -> Option<Vec<Syscall>> {
    let file = env::temp_dir().join(format!("carefork-strace-{}-{}", std::process::id(), test_name.replace("::", "-")));
    if env::var_os(NAME).is_none() && !strace_works(&file) {
        assert!(env::var_os("CAREFORK_REQUIRE_TOOLS").is_none(), "strace cannot be run here");
        eprintln!("skipped: strace cannot be run here");
        return None;
    }
    setup.strace = Some(file.clone());
    let outcome = run_isolated(test_name, seconds, setup, f);
    let text = fs::read(&file);
    drop(fs::remove_file(&file));
    if let Some(failure) = outcome.failure() {
        panic!("{failure}");
    }
    Some(parse_strace(&String::from_utf8_lossy(&text.expect("strace wrote its file"))))
}

fn strace_works(file: &Path) -> bool {
    let run = |strace| Command::new(strace).arg("-o").arg(file).arg("/bin/true").stderr(Stdio::null()).status();
    find().is_some_and(|strace| run(strace).is_ok_and(|status| status.success()))
}

pub fn find() -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join("strace")).find(|path| path.is_file())
}

fn parse_strace(text: &str) -> Vec<Syscall> {
    let mut calls: Vec<Syscall> = Vec::new();
    for line in text.lines() {
        let Some((pid, rest)) = line.split_once(' ') else { continue };
        let (Ok(pid), rest) = (pid.parse(), rest.trim_start()) else { continue };
        if let Some(resumed) = rest.strip_prefix("<... ") {
            let end = resumed.split_once(" resumed>").map_or("", |(_, end)| end);
            let unfinished = calls.iter_mut().rev().find(|c| c.pid == pid && c.line.ends_with("<unfinished ...>"));
            if let Some(call) = unfinished {
                let begin = call.line.trim_end_matches("<unfinished ...>").to_owned();
                call.line = begin + end;
            }
        } else if let Some((name, _)) = rest.split_once('(')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        {
            // Signals ("--- SIGCHLD") and ends ("+++ exited") do not look like calls.
            calls.push(Syscall { pid, name: name.to_owned(), line: rest.to_owned() });
        }
    }
    calls
}

/// Leaves a mark in strace's file: a write to no descriptor. Async-signal-safe. Changes errno.
pub fn strace_mark(label: &str) {
    // SAFETY: pointer and length are those of the label; the descriptor is none.
    unsafe { libc::write(-1, label.as_ptr().cast(), label.len()) };
}

/// The calls between two marks, by whatever process, without the marks.
///
/// # Panics
/// If a mark is missing, or they stand the other way round.
#[track_caller]
pub fn between<'a>(calls: &'a [Syscall], from: &str, to: &str) -> &'a [Syscall] {
    let at = |label: &str| {
        let mark = format!("write(-1, \"{label}\",");
        calls.iter().position(|c| c.line.starts_with(&mark)).unwrap_or_else(|| panic!("no mark {label:?}"))
    };
    &calls[at(from) + 1..at(to)]
}
