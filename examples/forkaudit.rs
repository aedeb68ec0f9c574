//! What would a child of that process get? Its descriptors and signals, with what fork and exec make of them.

use carefork::{audit, audit_of};
use std::io::{self, Write as _};
use std::process::ExitCode;

const HELP: &str = "\
forkaudit: what would a child of that process get?

USAGE: cargo run --example forkaudit -- [--json] PID | --self

  PID       a process of yours (or anybody's, as root)
  --self    this program itself
  --json    one JSON object, no table
  --help    this

The table, one row for each open descriptor:
  FD        its number
  MODE      r, w, rw: open for reading, writing; path: only a name (O_PATH); L: it holds a lock that lives as long as
            any copy of the descriptor
  KIND      what it is
  CLOEXEC   whether close-on-exec is set
  CARE      whether it is a care-fd, closed by a child's clean-up or at the fork; ? in another process
  NOEXEC    what becomes of it in a child that goes on without exec and cleans up, as carefork's do
  EXEC      what becomes of it in a child that execs
  TARGET    path, addresses, or the kernel's name for it; a long one is shortened in the middle

  kept      the child has it, and that is nothing to worry about
  closed    the child does not have it
  LEAKED    the child has it and should not: in an exec child whatever is not close-on-exec and no standard stream;
            in a noexec child a socket, pipe, terminal or locked file that is no care-fd

Below it: signals that are caught (default after exec), ignored and blocked (both stay so across exec).

Exit status: 0; 1 if something would leak into an exec child; 2 for bad usage, or no such process of yours; 3 if
what was found could not be written.
";

fn main() -> ExitCode {
    let mut json = false;
    let mut own = false;
    let mut pid = None;
    for arg in std::env::args_os().skip(1) {
        // What is not UTF-8 is neither a flag nor a number.
        match &*arg.to_string_lossy() {
            "--help" | "-h" => {
                return tell(HELP, ExitCode::SUCCESS);
            }
            "--json" => json = true,
            "--self" => own = true,
            flag if flag.starts_with('-') => return usage(&format!("unknown flag {flag}")),
            number => match number.parse::<u32>() {
                Ok(n) if n > 0 && pid.is_none() => pid = Some(n),
                Ok(n) if n > 0 => return usage("one process at a time"),
                _ => return usage(&format!("\"{number}\" is no process's number")),
            },
        }
    }
    let found = match (own, pid) {
        (true, None) => audit(),
        (false, Some(pid)) => audit_of(pid),
        (true, Some(_)) => return usage("either a PID or --self"),
        (false, None) => return usage("which process?"),
    };
    match found {
        Ok(found) => {
            let text = if json { found.to_json() } else { found.to_string() };
            tell(&format!("{text}\n"), ExitCode::from(u8::from(found.leaked().next().is_some())))
        }
        Err(e) => {
            eprintln!("forkaudit: {e}");
            ExitCode::from(2)
        }
    }
}

/// On standard output; `status` where it came there.
fn tell(text: &str, status: ExitCode) -> ExitCode {
    let mut out = io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => status,
        // A reader that has seen enough (`| head`).
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => status,
        Err(e) => {
            eprintln!("forkaudit: standard output: {e}");
            ExitCode::from(3)
        }
    }
}

fn usage(what: &str) -> ExitCode {
    eprintln!("forkaudit: {what}\nUSAGE: forkaudit [--json] PID | --self      (--help says more)");
    ExitCode::from(2)
}
