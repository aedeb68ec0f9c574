//! What std's `Command` and this library's come to for the same program: exit status, output, environment (X1).
//!
//! One difference is meant: glibc's posix_spawn, and so std, starts programs with libc's own two signals ignored, this library with none.
//!
//! Each case is written down once, as a macro that is expanded for both types: they have the same names.

#![allow(unsafe_code, clippy::expect_used)]

mod common;

use common::isolated;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::process::{ExitStatus, Output};

type Result = std::result::Result<Output, io::Error>;

/// What a program came to, errors by their kind.
fn told(result: &Result) -> std::result::Result<(ExitStatus, String, String), io::ErrorKind> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match result {
        Ok(o) => Ok((o.status, text(&o.stdout), text(&o.stderr))),
        Err(e) => Err(e.kind()),
    }
}

/// `|command| command.arg(..)`, for both.
macro_rules! cases {
    ($($program:expr, |$c:ident| $with:expr;)*) => {
        vec![$({
            let std: fn() -> Result = || {
                #[allow(unused_mut)]
                let mut $c = std::process::Command::new($program);
                { let _ = $with; }
                $c.output()
            };
            let ours: fn() -> Result = || {
                #[allow(unused_mut)]
                let mut $c = carefork::Command::new($program);
                { let _ = $with; }
                Ok($c.output()?)
            };
            (concat!(stringify!($program), " ", stringify!($with)), std, ours)
        }),*]
    };
}

type Case = (&'static str, fn() -> Result, fn() -> Result);

fn check(cases: Vec<Case>) -> usize {
    let mut failures = Vec::new();
    let count = cases.len();
    for (what, std, ours) in cases {
        let (std, ours) = (told(&std()), told(&ours()));
        if std != ours {
            failures.push(format!("{what}\n    std  {std:?}\n    ours {ours:?}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    count
}

/// Bash's own ways of ending, its arguments, and what it makes of its environment.
fn bash() -> Vec<Case> {
    cases! {
        "bash", |c| c.args(["-c", "exit 0"]);
        "bash", |c| c.args(["-c", "exit 1"]);
        "bash", |c| c.args(["-c", "exit 127"]);
        "bash", |c| c.args(["-c", "exit 255"]);
        "bash", |c| c.args(["-c", "exit 256"]);
        "bash", |c| c.args(["-c", "kill -TERM $$"]);
        "bash", |c| c.args(["-c", "kill -KILL $$"]);
        "bash", |c| c.args(["-c", "kill -HUP $$"]);
        "bash", |c| c.args(["-c", "kill -PIPE $$; echo survived"]);
        "bash", |c| c.args(["-c", "kill -USR1 $$"]);
        "bash", |c| c.args(["-c", "echo out; echo err >&2"]);
        "bash", |c| c.args(["-c", "echo \"$#:$1:$2:$0\"", "zero", "one", "two"]);
        "bash", |c| c.args(["-c", "echo \"$1\"", "x", ""]);
        "bash", |c| c.args(["-c", "echo \"$1\"", "x", "with space"]);
        "bash", |c| c.args(["-c", "echo \"$1\"", "x", "with\nline"]);
        "bash", |c| c.args(["-c", "echo \"$1\"", "x", "quote\"'`$(id)"]);
        "bash", |c| c.args(["-c", "echo \"$1\"", "x", "ünïcödé"]);
        "bash", |c| c.args(["-c", "printf %s \"$1\" | wc -c", "x", &"y".repeat(100_000)]);
        "bash", |c| c.arg("-c").arg("echo $1").arg("x").arg("y");
        "bash", |c| c.arg0("other").args(["-c", "echo $0"]);
        "bash", |c| c.arg0("other").args(["-c", "tr '\\0' '|' </proc/$$/cmdline"]);
        "bash", |c| c.arg0("").args(["-c", "echo $0"]);
        "bash", |c| c.args(["-c", "pwd"]).current_dir("/");
        "bash", |c| c.args(["-c", "pwd"]).current_dir("/usr/bin");
        "bash", |c| c.args(["-c", "pwd"]).current_dir("/usr/../usr/./bin");
        "bash", |c| c.args(["-c", "pwd"]).current_dir("/nonexistent");
        "bash", |c| c.args(["-c", "pwd"]).current_dir("/dev/null");
        "bash", |c| c.args(["-c", "pwd"]).current_dir("");
        "bash", |c| c.args(["-c", "echo $A"]).env("A", "1");
        "bash", |c| c.args(["-c", "echo $A$B"]).env("A", "1").env("B", "2").env("A", "3");
        "bash", |c| c.args(["-c", "echo ${A-unset}"]).env("A", "1").env_remove("A");
        "bash", |c| c.args(["-c", "echo ${HOME-unset}"]).env_remove("HOME");
        "bash", |c| c.args(["-c", "echo ${HOME-unset}"]).env_remove("HOME").env("HOME", "/x");
        "bash", |c| c.args(["-c", "echo ${PATH-unset}"]).env_clear();
        "bash", |c| c.args(["-c", "echo $A"]).env_clear().env("A", "line\nbreak");
        "bash", |c| c.args(["-c", "echo $A"]).env("A", "");
        "bash", |c| c.args(["-c", "echo $A$B$C"]).envs([("A", "1"), ("B", "2"), ("C", "3")]);
        "bash", |c| c.args(["-c", "set -- $(cat /proc/$$/stat); test $1 = $5 && echo leader"]).process_group(0);
        "bash", |c| c.args(["-c", "set -- $(cat /proc/$$/stat); test $1 = $5 || echo member"]);
        "bash", |c| c.args(["-c", "cat"]);
        "bash", |c| c.args(["-c", "test -t 0 || echo no terminal"]);
        "bash", |c| c.args(["-c", "head -c 200000 /dev/zero | tr '\\0' x"]);
        "bash", |c| c.args(["-c", "head -c 100000 /dev/zero | tr '\\0' x >&2; echo done"]);
        "bash", |c| c.args(["-c", "echo early; exec >&-; echo late"]);
        "bash", |c| c.args(["-c", "ulimit -n; umask"]);
        "bash", |c| c.args(["-c", "yes | head -1"]);
        "bash", |c| c.args(["-c", "trap 'echo trapped' USR1; kill -USR1 $$"]);
        "bash", |c| c.args(["-c", "echo /proc/self/fd/*"]);
        "bash", |c| c.args(["-c", "grep SigBlk /proc/$$/status"]);
        "bash", |c| c.args(["--no-such-option"]);
    }
}

/// An interpreter that looks at its own environment, and others.
fn python() -> Vec<Case> {
    cases! {
        "python3", |c| c.args(["-c", "pass"]);
        "python3", |c| c.args(["-c", "import sys; sys.exit(7)"]);
        "python3", |c| c.args(["-c", "import sys; sys.exit('text')"]);
        "python3", |c| c.args(["-c", "import os; os.abort()"]);
        "python3", |c| c.args(["-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"]);
        "python3", |c| c.args(["-c", "raise SystemExit(300)"]);
        "python3", |c| c.args(["-c", "print('out'); import sys; print('err', file=sys.stderr)"]);
        "python3", |c| c.args(["-c", "import sys; print(sys.argv)", "a", "", "b c"]);
        "python3", |c| c.args(["-c", "import os; print(os.environb)"]).env_clear().env("LANG", "C");
        "python3", |c| c.args(["-c", "import os; print(list(os.environb.items()))"]).env("ZZ", "1").env("AA", "2");
        "python3", |c| c.args(["-c", "import os; print(list(os.environb.items()))"]);
        "python3", |c| c.args(["-c", "import os; print(list(os.environb))"]).env_remove("HOME");
        "python3", |c| c.args(["-c", "import os; print(os.getcwd())"]).current_dir("/tmp");
        "python3", |c| c.args(["-c", "import os; print(os.getpgrp() == os.getpid())"]).process_group(0);
        "python3", |c| c.args(["-c", "import os; print(os.getpgrp() == os.getpid())"]);
        "python3", |c| c.args(["-c", "import os; print(os.getuid(), os.getgid(), os.getgroups())"]);
        "python3", |c| c.args(["-c", "import sys; print(len(sys.stdin.read()))"]);
        "python3", |c| c.args(["-c", "import sys; sys.stdout.write('x' * 300000); sys.stderr.write('y' * 300000)"]);
        "python3", |c| c.args(["-c", "import os; print([n for n in range(3, 200) if os.path.exists(f'/proc/self/fd/{n}')])"]);
        "python3", |c| c.args(["-c", "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"]);
        "python3", |c| c.args(["-c", "import os; print(os.umask(0))"]);
        "python3", |c| c.args(["-c", "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"]);
        "python3", |c| c.args(["-c", "import os; os.write(1, b'\\xff\\xfe\\x00')"]);
        "python3", |c| c.args(["-c", "syntax error("]);
    }
}

/// Programs that are there, or are not, by name and by path.
fn names() -> Vec<Case> {
    cases! {
        "true", |c| &mut c;
        "false", |c| &mut c;
        "/bin/true", |c| &mut c;
        "true", |c| c.arg("ignored");
        "true", |c| c.env_clear();
        "true", |c| c.env("PATH", "/nonexistent");
        "true", |c| c.env("PATH", "/nonexistent:/bin");
        "true", |c| c.env("PATH", "");
        "true", |c| c.env("PATH", ":").current_dir("/bin");
        "true", |c| c.env("PATH", "/dev/null:/etc/passwd:/bin");
        "true", |c| c.env_remove("PATH");
        "true", |c| c.current_dir("/");
        "./true", |c| c.current_dir("/bin");
        "./true", |c| c.current_dir("/etc");
        "no-such-program", |c| &mut c;
        "/no/such/program", |c| &mut c;
        "/etc/passwd", |c| &mut c;
        "/etc", |c| &mut c;
        "/etc/passwd/x", |c| &mut c;
        "", |c| &mut c;
        ".", |c| &mut c;
        "/bin/", |c| &mut c;
        "true", |c| c.arg("x".repeat(300_000));
        "true", |c| c.arg("a\0b");
        "a\0b", |c| &mut c;
        "env", |c| c.env_clear().env("B", "1").env("A", "2");
        "env", |c| c.env("PATH", "/bin:/usr/bin").env("A", "=");
        "env", |c| &mut c;
        "cat", |c| c.arg("/nonexistent");
        "sleep", |c| c.arg("0");
        "id", |c| c.uid(1234).gid(1234);
        "id", |c| c.gid(1234);
        "id", |c| c.uid(1234);
    }
}

#[test]
fn a_hundred_programs_come_to_the_same() {
    isolated("a_hundred_programs_come_to_the_same", 240, || {
        let all = check(bash()) + check(python()) + check(names());
        assert!(all >= 100, "{all} cases");
    });
}

/// Streams that are given: from a file, from a pipe, inherited; std's types and ours are made of the same descriptors.
#[test]
fn given_streams_come_to_the_same() {
    isolated("given_streams_come_to_the_same", 60, || {
        let open = || std::fs::File::open("/etc/passwd").expect("it is there");
        let std = std::process::Command::new("cat").stdin(open()).output().expect("cat");
        let ours = carefork::Command::new("cat").stdin(open()).output().expect("cat");
        assert_eq!(std, ours);
        // The output of one program as the input of another: std's into ours.
        let mut first =
            std::process::Command::new("echo").arg("x").stdout(std::process::Stdio::piped()).spawn().expect("echo");
        let pipe = first.stdout.take().expect("piped");
        assert_eq!(carefork::Command::new("cat").stdin(pipe).output().expect("cat").stdout, b"x\n");
        first.wait().expect("its end");
        let mut command = carefork::Command::new("true");
        assert!(
            command.stdin(io::stdin().as_fd().try_clone_to_owned().expect("open")).status().expect("true").success()
        );
    });
}

/// The same with std's types and this library's: a program that is written to and says much, on one stream or both.
macro_rules! conversation {
    ($command:path, $stdio:path, $script:expr, $err:ident) => {{
        use $stdio as Stdio;
        let mut command = <$command>::new("bash");
        command.args(["-c", $script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::$err());
        let child = command.spawn().expect("bash");
        let pipe = child.stdin.as_ref().expect("piped").as_fd().try_clone_to_owned().expect("a descriptor");
        std::fs::File::from(pipe).write_all(b"line\n").expect("it reads");
        child.wait_with_output().expect("its end")
    }};
}

/// The program's input is closed, or it would wait for more, and both its pipes are read, or it would wait for one to be emptied.
#[test]
fn waiting_with_output_comes_to_the_same() {
    isolated("waiting_with_output_comes_to_the_same", 60, || {
        let script =
            "cat; for i in {1..30000}; do echo $i >&2; done; echo over; for i in {1..30000}; do echo $i; done; exit 4";
        let ours = conversation!(carefork::Command, carefork::Stdio, script, piped);
        assert_eq!(ours, conversation!(std::process::Command, std::process::Stdio, script, piped));
        assert!(
            ours.stdout.starts_with(b"line\nover\n1\n") && ours.stdout.len() > 1 << 17 && ours.stderr.len() > 1 << 17
        );
        let ours = conversation!(carefork::Command, carefork::Stdio, script, null);
        assert_eq!(ours, conversation!(std::process::Command, std::process::Stdio, script, null));
        assert!(ours.stdout.len() > 1 << 17 && ours.stderr.is_empty());
    });
}

/// What a pipe has is for the one whose child it is.
#[test]
fn only_the_parent_waits_with_output() {
    isolated("only_the_parent_waits_with_output", 60, || {
        let child = carefork::Command::new("echo").arg("x").stdout(carefork::Stdio::piped()).spawn().expect("echo");
        // SAFETY: the child uses nothing that its clean-up closes.
        match unsafe { carefork::fork() }.expect("a fork") {
            carefork::Fork::Child(token) => {
                let refused = child.wait_with_output().is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD));
                token.exit(i32::from(!refused))
            }
            carefork::Fork::Parent(mut other) => assert!(other.wait().expect("its end").success()),
        }
        assert_eq!(child.wait_with_output().expect("its end").stdout, b"x\n");
    });
}
