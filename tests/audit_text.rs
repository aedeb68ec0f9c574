//! F7: an audit as a table and as JSON, whatever it finds.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::audit::Care;
use carefork::{Audit, CareFd, OnFork, audit, audit_of};
use common::isolated;
use kit::{block, catch, code};
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

fn set_cloexec(fd: impl AsFd, on: bool) {
    // SAFETY: an integer argument.
    assert_eq!(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETFD, i32::from(on)) }, 0);
}

extern "C" fn nothing(_: i32) {}

#[test]
fn the_table_reads_well() {
    isolated("the_table_reads_well", 20, || {
        let dir = PathBuf::from(format!("/tmp/carefork-golden-{}-{}", std::process::id(), "x".repeat(60)));
        fs::create_dir(&dir).expect("a directory of our own");
        let log = File::create(dir.join("the-end-of-the-path.log")).expect("created");
        fs::remove_dir_all(&dir).expect("it was there");
        set_cloexec(&log, false);
        let listener = CareFd::open(|| TcpListener::bind("127.0.0.1:0")).expect("bound");
        let port = listener.local_addr().expect("bound").port().to_string();
        let null = CareFd::open_on(OnFork::Close, || File::open("/dev/null")).expect("open");
        let lock = File::open("/etc/passwd").expect("open");
        lock.lock_shared().expect("locked");
        block(&[libc::SIGTERM]);
        let found = audit().expect("an audit");
        let mut text =
            format!("{found}\n").replace(&format!("process {} ", found.pid), "process PID ").replace(&port, "PORT");
        // What libc keeps for itself is its own affair.
        for own in [" SIG32", " SIG33", " SIG34"] {
            text = text.replace(own, "");
        }
        assert_eq!(text, GOLDEN, "\n{text}");
        drop((log, listener, null, lock));
    });
}

const GOLDEN: &str = "\
process PID (exe): 2 threads, 7 descriptors
 FD MODE KIND           CLOEXEC CARE    NOEXEC EXEC   TARGET
  0 r    device         no      no      kept   kept   /dev/null
  1 rw   memfd          no      no      kept   kept   /memfd:carefork-test (deleted)
  2 rw   memfd          no      no      kept   kept   /memfd:carefork-test (deleted)
  3 w    file           no      no      kept   LEAKED /tmp/carefork-golden-...the-path.log (deleted)
  4 rw   tcp listen     yes     cleanup closed closed 127.0.0.1:PORT
  5 r    device         yes     close   closed closed /dev/null
  6 r L  file           yes     no      LEAKED closed /etc/passwd
signals caught:  SIGBUS SIGSEGV
signals ignored: SIGPIPE
signals blocked: SIGTERM
would leak: 1 into an exec child, 1 into a noexec child
";

/// The widest that a terminal may show it.
fn width(line: &str) -> usize {
    line.chars().map(|c| if c < '\u{1100}' { 1 } else { 2 }).sum()
}

#[test]
fn a_table_of_anything_fits_a_hundred_columns() {
    isolated("a_table_of_anything_fits_a_hundred_columns", 20, || {
        let dir = std::env::temp_dir().join(format!("carefork-audit-wide-{}", std::process::id()));
        fs::create_dir(&dir).expect("a directory of our own");
        let names = [
            "a".repeat(255).into_bytes(),
            "長い名前".repeat(20).into_bytes(),
            "ümlaut".repeat(30).into_bytes(),
            b"line\nfeed\x1b[31m\"quotes\" and \\ \ttab".to_vec(),
            b"not \xff\xfe UTF-8".to_vec(),
        ];
        let files: Vec<File> = names
            .iter()
            .map(|name| File::create(dir.join(std::ffi::OsStr::from_bytes(name))).expect("created"))
            .collect();
        // A number as wide as they come, and more signals than fit a line.
        // SAFETY: an open descriptor.
        let far = unsafe { libc::fcntl(files[0].as_raw_fd(), libc::F_DUPFD_CLOEXEC, 1000) };
        assert!(far >= 1000);
        // SAFETY: the kernel just gave us this number.
        let far = unsafe { OwnedFd::from_raw_fd(far) };
        let many: Vec<i32> = (1..=64).filter(|s| ![9, 19, 32, 33].contains(s)).collect();
        block(&many);
        let found = audit().expect("an audit");
        let text = found.to_string();
        assert!(text.lines().all(|line| width(line) <= 100), "\n{text}");
        assert!(text.lines().any(|line| width(line) == 100), "\n{text}");
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "\n{text}");
        assert_eq!(
            text.lines()
                .filter(|l| l.starts_with(|c: char| c == ' ' || c.is_ascii_digit()) && l.contains(" file "))
                .count(),
            files.len() + 1,
            "a line for each\n{text}"
        );
        assert!(text.contains("SIGRTMIN+30") || text.contains("SIGRTMIN+29"), "\n{text}");
        assert_json(&found);
        fs::remove_dir_all(&dir).expect("it was there");
        drop(far);
    });
}

/// Whatever a process calls itself.
#[test]
fn the_head_of_a_table_fits_a_hundred_columns() {
    isolated("the_head_of_a_table_fits_a_hundred_columns", 20, || {
        fs::write("/proc/self/comm", [0x1b; 15]).expect("a name");
        let found = audit().expect("an audit");
        assert_eq!(found.name, "\x1b".repeat(15));
        let text = found.to_string();
        let head = text.lines().next().expect("a line");
        assert!(
            head.len() == 100 && head.ends_with(&format!("): 2 threads, {} descriptors", found.descriptors.len())),
            "{head}"
        );
    });
}

/// What a parser reads is what the audit says.
#[track_caller]
fn assert_json(found: &Audit) {
    let json: serde_json::Value = serde_json::from_str(&found.to_json()).expect("JSON");
    assert_eq!((&json["pid"], &json["name"]), (&found.pid.into(), &found.name.as_str().into()));
    assert_eq!(json["threads"], found.threads);
    let list = json["descriptors"].as_array().expect("a list");
    assert_eq!(list.len(), found.descriptors.len());
    for (j, d) in list.iter().zip(&found.descriptors) {
        let care = match d.care {
            Care::No => "no".into(),
            Care::On(OnFork::Cleanup) => "cleanup".into(),
            Care::On(OnFork::Close) => "close".into(),
            _ => serde_json::Value::Null,
        };
        let expected = serde_json::json!({
            "fd": d.number, "kind": d.kind.to_string(), "target": d.target, "read": d.read, "write": d.write,
            "close_on_exec": d.close_on_exec, "locked": d.locked, "care": care,
            "noexec": d.noexec.map(|f| f.to_string()), "exec": d.exec.to_string(),
        });
        assert_eq!(*j, expected);
    }
    for (name, signals) in [("caught", &found.caught), ("ignored", &found.ignored), ("blocked", &found.blocked)] {
        let names = json[name].as_array().expect("a list");
        assert_eq!(names.len(), signals.len());
        assert_eq!(names.contains(&"SIGTERM".into()), signals.contains(&libc::SIGTERM));
    }
}

#[test]
fn json_says_the_same() {
    isolated("json_says_the_same", 20, || {
        let care = CareFd::open(|| File::open("/dev/null")).expect("open");
        let close = CareFd::open_on(OnFork::Close, || TcpListener::bind("127.0.0.1:0")).expect("bound");
        let lock = File::open("/etc/passwd").expect("open");
        lock.lock_shared().expect("locked");
        set_cloexec(&lock, false);
        catch(libc::SIGTERM, nothing);
        assert_json(&audit().expect("an audit"));
        let pid = std::process::id();
        // SAFETY: no descriptor of a care-fd is used in the child.
        let child = unsafe {
            carefork::spawn(|| {
                assert_json(&audit_of(pid).expect("an audit of the parent"));
                0
            })
        };
        assert_eq!(code(&mut child.expect("a child")), 0);
        drop((care, close, lock));
    });
}
