//! An audit as a table, and as JSON.

use super::{Audit, Care, Descriptor, Fate};
use crate::carefd::OnFork;
use crate::columns::{COLUMNS, printable, shorten};
use std::fmt::{self, Write as _};

pub(super) fn table(audit: &Audit, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let (exec, noexec) = (audit.leaked().count(), audit.leaked_noexec().count());
    let s = |n: usize| if n == 1 { "" } else { "s" };
    let (threads, fds) = (audit.threads, audit.descriptors.len());
    let (head, tail) =
        (format!("process {} (", audit.pid), format!("): {threads} thread{}, {fds} descriptor{}", s(threads), s(fds)));
    let room = COLUMNS.saturating_sub(head.len() + tail.len());
    writeln!(f, "{head}{}{tail}", shorten(&printable(&audit.name), room))?;
    // As wide as the longest number.
    let wide = audit.descriptors.iter().map(|d| d.number).max().unwrap_or(0).to_string().len().max(3);
    writeln!(
        f,
        "{:>wide$} {:<4} {:<14} {:<7} {:<7} {:<6} {:<6} TARGET",
        "FD", "MODE", "KIND", "CLOEXEC", "CARE", "NOEXEC", "EXEC"
    )?;
    for d in &audit.descriptors {
        let head = format!(
            "{:>wide$} {:<4} {:<14} {:<7} {:<7} {:<6} {:<6} ",
            d.number,
            mode(d),
            d.kind,
            if d.close_on_exec { "yes" } else { "no" },
            care(d.care).unwrap_or("?"),
            d.noexec.map_or("?", fate),
            fate(d.exec),
        );
        // Only ASCII so far.
        writeln!(f, "{head}{}", shorten(&printable(&d.target), COLUMNS - head.len()))?;
    }
    let none = [("caught", &audit.caught), ("ignored", &audit.ignored), ("blocked", &audit.blocked)];
    for (what, list) in none {
        signal_lines(f, what, list)?;
    }
    write!(f, "would leak: {exec} into an exec child")?;
    match audit.descriptors.iter().any(|d| d.noexec.is_none()) {
        true => f.write_str(", unknown into a noexec child"),
        false => write!(f, ", {noexec} into a noexec child"),
    }
}

/// `signals caught: ...`, in as many lines as it needs.
fn signal_lines(f: &mut fmt::Formatter<'_>, what: &str, list: &[i32]) -> fmt::Result {
    let mut line = format!("signals {:<8}", format!("{what}:"));
    let indent = line.len();
    if list.is_empty() {
        line.push_str(" none");
    }
    for &signal in list {
        let name = signal_name(signal);
        if line.len() + 1 + name.len() > COLUMNS {
            writeln!(f, "{line}")?;
            line = " ".repeat(indent);
        }
        line.push(' ');
        line.push_str(&name);
    }
    writeln!(f, "{line}")
}

fn mode(d: &Descriptor) -> &'static str {
    match (d.read, d.write, d.locked) {
        (true, true, false) => "rw",
        (true, false, false) => "r",
        (false, true, false) => "w",
        (false, false, false) => "path",
        (true, true, true) => "rw L",
        (true, false, true) => "r L",
        (false, _, true) => "w L",
    }
}

fn care(care: Care) -> Option<&'static str> {
    match care {
        Care::No => Some("no"),
        Care::On(OnFork::Cleanup) => Some("cleanup"),
        Care::On(OnFork::Close) => Some("close"),
        Care::Unknown => None,
    }
}

/// The one to look for stands out.
fn fate(fate: Fate) -> &'static str {
    match fate {
        Fate::Kept => "kept",
        Fate::Closed => "closed",
        Fate::Leaked => "LEAKED",
    }
}

/// `SIGTERM`, `SIGRTMIN+2`; `SIG32` for those that libc keeps for itself.
fn signal_name(signal: i32) -> String {
    const NAMES: [(i32, &str); 31] = [
        (libc::SIGHUP, "HUP"),
        (libc::SIGINT, "INT"),
        (libc::SIGQUIT, "QUIT"),
        (libc::SIGILL, "ILL"),
        (libc::SIGTRAP, "TRAP"),
        (libc::SIGABRT, "ABRT"),
        (libc::SIGBUS, "BUS"),
        (libc::SIGFPE, "FPE"),
        (libc::SIGKILL, "KILL"),
        (libc::SIGUSR1, "USR1"),
        (libc::SIGSEGV, "SEGV"),
        (libc::SIGUSR2, "USR2"),
        (libc::SIGPIPE, "PIPE"),
        (libc::SIGALRM, "ALRM"),
        (libc::SIGTERM, "TERM"),
        (libc::SIGSTKFLT, "STKFLT"),
        (libc::SIGCHLD, "CHLD"),
        (libc::SIGCONT, "CONT"),
        (libc::SIGSTOP, "STOP"),
        (libc::SIGTSTP, "TSTP"),
        (libc::SIGTTIN, "TTIN"),
        (libc::SIGTTOU, "TTOU"),
        (libc::SIGURG, "URG"),
        (libc::SIGXCPU, "XCPU"),
        (libc::SIGXFSZ, "XFSZ"),
        (libc::SIGVTALRM, "VTALRM"),
        (libc::SIGPROF, "PROF"),
        (libc::SIGWINCH, "WINCH"),
        (libc::SIGIO, "IO"),
        (libc::SIGPWR, "PWR"),
        (libc::SIGSYS, "SYS"),
    ];
    match NAMES.iter().find(|(n, _)| *n == signal) {
        Some((_, name)) => format!("SIG{name}"),
        None if signal == libc::SIGRTMIN() => "SIGRTMIN".to_owned(),
        None if signal > libc::SIGRTMIN() => format!("SIGRTMIN+{}", signal - libc::SIGRTMIN()),
        None => format!("SIG{signal}"),
    }
}

pub(super) fn json(audit: &Audit) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = write_json(audit, &mut out);
    out
}

fn write_json(audit: &Audit, out: &mut String) -> fmt::Result {
    write!(out, "{{\"pid\":{},\"name\":", audit.pid)?;
    quote(out, &audit.name)?;
    write!(out, ",\"threads\":{},\"descriptors\":[", audit.threads)?;
    for (i, d) in audit.descriptors.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        write!(out, "{comma}{{\"fd\":{},\"kind\":\"{}\",\"target\":", d.number, d.kind)?;
        quote(out, &d.target)?;
        write!(out, ",\"read\":{},\"write\":{},", d.read, d.write)?;
        write!(out, "\"close_on_exec\":{},\"locked\":{},\"care\":", d.close_on_exec, d.locked)?;
        or_null(out, care(d.care))?;
        out.push_str(",\"noexec\":");
        or_null(out, d.noexec)?;
        write!(out, ",\"exec\":\"{}\"}}", d.exec)?;
    }
    out.push(']');
    for (what, list) in [("caught", &audit.caught), ("ignored", &audit.ignored), ("blocked", &audit.blocked)] {
        let names: Vec<String> = list.iter().map(|&s| format!("\"{}\"", signal_name(s))).collect();
        write!(out, ",\"{what}\":[{}]", names.join(","))?;
    }
    out.push('}');
    Ok(())
}

fn or_null(out: &mut String, text: Option<impl fmt::Display>) -> fmt::Result {
    match text {
        Some(t) => write!(out, "\"{t}\""),
        None => out.write_str("null"),
    }
}

/// RFC 8259, section 7.
fn quote(out: &mut String, text: &str) -> fmt::Result {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            '\0'..='\x1f' => write!(out, "\\u{:04x}", u32::from(c))?,
            _ => out.push(c),
        }
    }
    out.push('"');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_their_names() {
        assert_eq!(signal_name(libc::SIGCHLD), "SIGCHLD");
        assert_eq!(signal_name(32), "SIG32");
        assert_eq!(signal_name(libc::SIGRTMIN()), "SIGRTMIN");
        assert_eq!(signal_name(64), format!("SIGRTMIN+{}", 64 - libc::SIGRTMIN()));
    }
}
