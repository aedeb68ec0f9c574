//! F7: the program `forkaudit`, pointed at programs that nobody here wrote.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::audit::{Fate, Kind};
use carefork::audit_of;
use common::{isolated, status_of, temp_dir};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};

/// The program, built if it is not there.
fn forkaudit() -> PathBuf {
    // The test's own binary is in deps/, the program in examples/ beside it.
    let exe = std::env::current_exe().expect("the path of this test binary");
    let program = exe.parent().and_then(|deps| deps.parent()).expect("two folders up").join("examples/forkaudit");
    // `cargo test` has built it; `cargo test --test forkaudit` has not. The isolated process finds it built.
    if std::env::var_os("CAREFORK_ISOLATED").is_none() {
        static BUILT: std::sync::Once = std::sync::Once::new();
        BUILT.call_once(|| {
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["build", "--quiet", "--example", "forkaudit"]);
            if !cfg!(debug_assertions) {
                cargo.arg("--release");
            }
            assert!(cargo.status().expect("cargo runs").success());
        });
    }
    program
}

/// Its exit code, standard output and standard error.
fn run(program: &PathBuf, args: &[&str]) -> (i32, String, String) {
    let done = Command::new(program).args(args).output().expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (done.status.code().expect("it exits"), text(done.stdout), text(done.stderr))
}

/// A shell that has run `script` and now waits for the end of its input.
fn shell(script: &str) -> (Child, ChildStdin) {
    let mut child = Command::new("/bin/sh")
        .args(["-c", &format!("{script}\necho ready\nread -r _")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell");
    let stdin = child.stdin.take().expect("piped");
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("it says");
    assert_eq!(line, "ready\n");
    (child, stdin)
}

#[test]
fn a_shell_with_a_leaked_descriptor_is_told_on() {
    let program = forkaudit();
    isolated("a_shell_with_a_leaked_descriptor_is_told_on", 60, || {
        let (mut child, stdin) = shell("trap '' USR1; exec 9</etc/passwd");
        let pid = child.id().to_string();
        let (code, table, errors) = run(&program, &[&pid]);
        assert_eq!((code, errors.as_str()), (1, ""), "\n{table}");
        let leaks: Vec<&str> = table.lines().filter(|l| l.contains("LEAKED")).collect();
        assert_eq!(leaks, ["  9 r    file           no      ?       ?      LEAKED /etc/passwd"], "\n{table}");
        assert!(table.starts_with(&format!("process {pid} (sh): 1 thread, 4 descriptors\n")), "\n{table}");
        assert!(table.lines().any(|l| l.starts_with("signals ignored:") && l.contains("SIGUSR1")), "\n{table}");
        assert!(table.ends_with("would leak: 1 into an exec child, unknown into a noexec child\n"), "\n{table}");
        assert!(table.lines().all(|l| l.len() <= 100), "\n{table}");

        let (code, json, errors) = run(&program, &["--json", &pid]);
        assert_eq!((code, errors.as_str()), (1, ""), "{json}");
        let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(json["descriptors"][3]["fd"], 9);
        assert_eq!(json["descriptors"][3]["exec"], "leaked");
        assert_eq!(json["descriptors"][3]["care"], serde_json::Value::Null);
        drop(stdin);
        child.wait().expect("a status");
    });
}

#[test]
fn a_clean_process_is_not() {
    let program = forkaudit();
    isolated("a_clean_process_is_not", 60, || {
        let (mut child, stdin) = shell("");
        let (code, table, errors) = run(&program, &[&child.id().to_string()]);
        assert_eq!((code, errors.as_str()), (0, ""), "\n{table}");
        assert!(table.contains(": 1 thread, 3 descriptors\n") && !table.contains("LEAKED"), "\n{table}");
        drop(stdin);
        child.wait().expect("a status");

        // Of itself it knows more.
        let (code, table, errors) = run(&program, &["--self"]);
        assert_eq!((code, errors.as_str()), (0, ""), "\n{table}");
        assert!(table.ends_with("would leak: 0 into an exec child, 0 into a noexec child\n"), "\n{table}");
    });
}

#[test]
fn bad_usage_is_told_from_a_leak() {
    let program = forkaudit();
    isolated("bad_usage_is_told_from_a_leak", 60, || {
        // As high as a pid can be, and one more.
        let cases: [(&[&str], &str); 8] = [
            (&[], "which process?"),
            (&["--unknown"], "unknown flag --unknown"),
            (&["12x"], "\"12x\" is no process's number"),
            (&["0"], "\"0\" is no process's number"),
            (&["--self", "1"], "either a PID or --self"),
            (&["1", "2"], "one process at a time"),
            (&["4194305"], "there is no process 4194305"),
            (&["--json", "4294967295"], "there is no process 4294967295"),
        ];
        for (args, says) in cases {
            let (code, out, errors) = run(&program, args);
            assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {errors}");
            assert!(errors.starts_with(&format!("forkaudit: {says}\n")), "{args:?}: {errors}");
        }
        let done = Command::new(&program).arg(std::ffi::OsStr::from_bytes(b"\xff1")).output().expect("it runs");
        let errors = String::from_utf8(done.stderr).expect("UTF-8");
        assert_eq!(done.status.code(), Some(2), "{errors}");
        assert!(errors.starts_with("forkaudit: \"\u{fffd}1\" is no process's number\n"), "{errors}");
        let (code, help, _) = run(&program, &["--help"]);
        assert_eq!(code, 0);
        assert!(help.contains("Exit status:") && help.lines().all(|l| l.len() <= 120), "{help}");
    });
}

/// A full disk says nothing of leaks; a reader that has seen enough is no failure.
#[test]
fn what_could_not_be_written_is_told_from_a_leak() {
    let program = forkaudit();
    isolated("what_could_not_be_written_is_told_from_a_leak", 60, || {
        for args in [&["--self"][..], &["--self", "--json"], &["--help"]] {
            let onto = |out: Stdio| {
                let done =
                    Command::new(&program).args(args).stdin(Stdio::null()).stdout(out).output().expect("it runs");
                (done.status.code().expect("it exits"), String::from_utf8(done.stderr).expect("UTF-8"))
            };
            let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("open");
            let (code, errors) = onto(full.into());
            assert_eq!(code, 3, "{args:?}: {errors}");
            assert!(errors.starts_with("forkaudit: standard output: No space left"), "{args:?}: {errors}");
            let (reader, writer) = std::io::pipe().expect("a pipe");
            drop(reader);
            assert_eq!(onto(writer.into()), (0, String::new()), "{args:?}");
        }
    });
}

/// qemu-nbd with a client: a listening Unix socket, a connection, an image under a lock, all of them close-on-exec.
#[test]
fn qemu_nbd_starts_clean() {
    let program = forkaudit();
    isolated("qemu_nbd_starts_clean", 60, || {
        let dir = temp_dir().join(format!("carefork-forkaudit-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("a directory of our own");
        let (image, socket) = (dir.join("disk.img"), dir.join("nbd.sock"));
        std::fs::write(&image, vec![0; 1 << 20]).expect("an image");
        let mut server = Command::new("qemu-nbd")
            .args(["--persistent", "--format=raw", "--read-only", "--socket"])
            .args([&socket, &image])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd (Debian package qemu-utils)");
        let mut client = loop {
            match UnixStream::connect(&socket) {
                Ok(client) => break client,
                // Not there yet, or not listening yet.
                Err(e) => assert!(server.try_wait().expect("a status").is_none(), "qemu-nbd ended: {e}"),
            }
            std::thread::yield_now();
        };
        let mut greeting = [0; 16];
        client.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT");

        let found = audit_of(server.id()).expect("an audit");
        let of_kind = |kind| found.descriptors.iter().filter(move |d| d.kind == kind).collect::<Vec<_>>();
        let path = socket.to_str().expect("UTF-8");
        assert_eq!(of_kind(Kind::UnixListener).iter().map(|d| &*d.target).collect::<Vec<_>>(), [path], "\n{found}");
        assert_eq!(of_kind(Kind::UnixStream).iter().map(|d| &*d.target).collect::<Vec<_>>(), [path], "\n{found}");
        let disk = found.descriptors.iter().find(|d| d.target == image.to_str().expect("UTF-8")).expect("the image");
        assert!(disk.kind == Kind::File && disk.locked && disk.read && !disk.write, "\n{found}");
        assert!(!of_kind(Kind::Eventfd).is_empty() && !of_kind(Kind::Signalfd).is_empty(), "\n{found}");
        // Against the kernel's own words.
        for d in &found.descriptors {
            let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{}", found.pid, d.number)).expect("it is open");
            let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).expect("flags").trim();
            let cloexec = i32::from_str_radix(flags, 8).expect("octal") & libc::O_CLOEXEC != 0;
            let exec = match cloexec {
                true => Fate::Closed,
                false if d.number <= 2 => Fate::Kept,
                false => Fate::Leaked,
            };
            assert_eq!((d.close_on_exec, d.exec, d.noexec), (cloexec, exec, None), "\n{found}");
        }
        let status = status_of(server.id() as i32).expect("/proc");
        let sets = [&found.caught, &found.ignored, &found.blocked].map(|list| kit::bits(list));
        assert_eq!(sets, [status.sig_cgt, status.sig_ign, status.sig_blk]);

        let (code, table, errors) = run(&program, &[&server.id().to_string()]);
        assert_eq!((code, errors.as_str()), (0, ""), "\n{table}");
        assert!(table.contains(" (qemu-nbd): ") && table.contains(" unix listen    yes "), "\n{table}");
        drop(client);
        server.kill().expect("killed");
        server.wait().expect("a status");
        std::fs::remove_dir_all(&dir).expect("it was there");
    });
}
