//! What cannot be started: the error names the step, and nothing is left (X1).

use crate::common::{self, Setup, can_change_user, isolated, isolated_with, raw};
use crate::kit::{self, State, Stop};
use crate::{by_fork, sh};
use carefork::{Command, CommandError, ForkError, Resource, Signals, Stdio, Step};
use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::thread;

/// A directory of files that cannot be run, each in a way of its own.
struct Files(PathBuf);

impl Files {
    fn new(name: &str) -> Files {
        let dir = std::env::temp_dir().join(format!("carefork-{name}-{}", std::process::id()));
        fs::create_dir(&dir).expect("a new directory");
        let files = Files(dir);
        files.file("garbage", b"\x01\x02\x03\x04", 0o755);
        files.file("script", b"echo ran\n", 0o755);
        files.file("closed", b"#!/bin/sh\n", 0o644);
        files.file("no-interpreter", b"#!/nonexistent/interpreter\n", 0o755);
        files
    }

    fn file(&self, name: &str, content: &[u8], mode: u32) {
        let path = self.path(name);
        File::create(&path).and_then(|mut f| f.write_all(content)).expect("a new file");
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is ours");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Nothing was left: no child, no descriptor, no signal blocked, the gate open.
#[track_caller]
fn fails(command: &mut Command<'_>, wanted: &Step, errno: i32) {
    for fork in [false, true] {
        if fork {
            by_fork(command);
        }
        let before = State::now();
        let e = command.spawn().expect_err("it cannot start");
        // With two pipes and /dev/null as well.
        assert_eq!(command.output().expect_err("it cannot start").raw_os_error(), Some(errno));
        assert_eq!(State::now(), before, "{e}");
        kit::assert_no_child();
        let CommandError::Step { step, source } = &e else { panic!("{e:?}") };
        assert_eq!((step, source.raw_os_error()), (wanted, Some(errno)), "{e}");
        assert_eq!((e.kind(), e.raw_os_error()), (source.kind(), Some(errno)));
        println!("{e}");
        // As std's.
        assert_eq!(io::Error::from(e).kind(), io::Error::from_raw_os_error(errno).kind());
    }
    kit::assert_gate_open();
}

#[test]
fn each_step_that_fails_is_named_and_leaves_nothing() {
    isolated("failing::each_step_that_fails_is_named_and_leaves_nothing", 60, || {
        let files = Files::new("fails");
        let exec = |name: &str| Step::Exec(files.path(name).into());
        let missing = Step::Exec("no-such-program".into());
        fails(&mut Command::new("no-such-program"), &missing, libc::ENOENT);
        fails(Command::new("no-such-program").env_clear(), &missing, libc::ENOENT);
        fails(&mut Command::new(""), &Step::Exec("".into()), libc::ENOENT);
        fails(&mut Command::new(files.path("missing")), &exec("missing"), libc::ENOENT);
        fails(&mut Command::new(files.path("no-interpreter")), &exec("no-interpreter"), libc::ENOENT);
        fails(&mut Command::new(files.path("closed")), &exec("closed"), libc::EACCES);
        fails(&mut Command::new(files.path("garbage")), &exec("garbage"), libc::ENOEXEC);
        // Not handed to a shell, as in std.
        fails(&mut Command::new(files.path("script")), &exec("script"), libc::ENOEXEC);
        let directory = Step::Exec(files.0.clone().into());
        fails(&mut Command::new(&files.0), &directory, libc::EACCES);
        // Found in PATH, and not to be run; what comes later in PATH is tried first.
        let path = format!("/nonexistent:{}:/dev/null:/nowhere", files.0.display());
        fails(Command::new("closed").env("PATH", path), &Step::Exec("closed".into()), libc::EACCES);
        let long = "x".repeat(200_000);
        fails(Command::new("true").arg(&long), &Step::Exec("true".into()), libc::E2BIG);

        let cwd = |dir: &str| Step::CurrentDir(dir.into());
        fails(Command::new("true").current_dir("/nonexistent"), &cwd("/nonexistent"), libc::ENOENT);
        fails(Command::new("true").current_dir("/dev/null"), &cwd("/dev/null"), libc::ENOTDIR);
        fails(Command::new("true").rlimit(Resource::NoFile, 20, 10), &Step::Limit(Resource::NoFile), libc::EINVAL);
        fails(
            Command::new("true").rlimit(Resource::Core, 0, u64::MAX).rlimit(Resource::Stack, 2, 1),
            &Step::Limit(Resource::Stack),
            libc::EINVAL,
        );
        // A group in another session.
        fails(Command::new("true").process_group(1), &Step::ProcessGroup(1), libc::EPERM);
        let (closed, open) = (borrowed(300), raw::memfd());
        fails(Command::new("true").pass_fd(&closed), &Step::NotOpen { from: 300, to: 300 }, libc::EBADF);
        fails(Command::new("true").pass_fd_as(&closed, 9), &Step::NotOpen { from: 300, to: 9 }, libc::EBADF);
        // In a ring, one of which is not there.
        let other = borrowed(open.as_raw_fd());
        fails(
            Command::new("true").pass_fd_as(&closed, open.as_raw_fd()).pass_fd_as(&other, 300),
            &Step::NotOpen { from: 300, to: open.as_raw_fd() },
            libc::EBADF,
        );
        // A forked child's error comes through a pipe, whose number may be asked for.
        let mut low = Command::new("/nonexistent");
        for n in 3..20 {
            low.pass_fd_as(&open, n);
        }
        fails(&mut low, &Step::Exec("/nonexistent".into()), libc::ENOENT);
        let far = 1 << 30;
        let too_high = Step::Descriptor { from: open.as_raw_fd(), to: far };
        fails(Command::new("true").pass_fd_as(&open, far), &too_high, libc::EBADF);
        drop(files);
    });
}

fn borrowed(fd: i32) -> BorrowedFd<'static> {
    // SAFETY: used as a number only, to see what becomes of one that is not open.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

#[test]
fn users_that_cannot_be_become() {
    let root = can_change_user();
    isolated("failing::users_that_cannot_be_become", 30, || {
        if root {
            // Minus one means "leave it" to the kernel's other calls, and is no user.
            fails(Command::new("true").uid(u32::MAX), &Step::Uid(u32::MAX), libc::EINVAL);
            fails(Command::new("true").gid(u32::MAX), &Step::Gid(u32::MAX), libc::EINVAL);
            fails(Command::new("true").groups(&vec![1; 70_000]), &Step::Groups, libc::EINVAL);
            let secret = Step::CurrentDir("/root".into());
            fails(Command::new("true").uid(12_345).current_dir("/root"), &secret, libc::EACCES);
        }
    });
}

#[test]
fn privileges_that_are_not_there() {
    let uid = can_change_user().then_some(12_346);
    isolated_with("failing::privileges_that_are_not_there", 30, Setup { uid, ..Setup::default() }, || {
        fails(Command::new("true").uid(0), &Step::Uid(0), libc::EPERM);
        fails(Command::new("true").gid(0), &Step::Gid(0), libc::EPERM);
        fails(Command::new("true").groups(&[0]), &Step::Groups, libc::EPERM);
        let more = Command::new("true").rlimit(Resource::NoFile, u64::MAX, u64::MAX).spawn();
        assert!(matches!(more, Err(CommandError::Step { step: Step::Limit(_), .. })));
    });
}

#[test]
fn what_cannot_be_asked_for_costs_no_child() {
    isolated("failing::what_cannot_be_asked_for_costs_no_child", 30, || {
        let invalid = |command: &mut Command<'_>, word: &str| {
            let before = State::now();
            let e = command.spawn().expect_err(word);
            assert_eq!(State::now(), before);
            assert!(matches!(e, CommandError::Invalid(_)) && e.to_string().contains(word), "{e:?} without {word}");
            assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
        };
        invalid(&mut Command::new("tr\0ue"), "NUL");
        invalid(Command::new("true").arg("a\0b"), "NUL");
        invalid(Command::new("true").arg0("a\0b"), "NUL");
        invalid(Command::new("true").env("A", "b\0"), "NUL");
        invalid(Command::new("true").env("A\0", "b"), "NUL");
        invalid(Command::new("true").current_dir("a\0b"), "NUL");
        invalid(Command::new("true").death_signal(65), "death_signal");
        invalid(Command::new("true").signals(Signals::List(vec![libc::SIGKILL])), "SIGKILL");
        invalid(Command::new("true").session(true).process_group(0), "session");
        invalid(Command::new("true").process_group(-3), "negative");
        kit::assert_no_child();
    });
}

#[test]
fn without_descriptors_there_is_an_error_and_no_child() {
    isolated("failing::without_descriptors_there_is_an_error_and_no_child", 30, || {
        let mut all: Vec<File> = Vec::new();
        let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
        // SAFETY: a live limit.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
        while let Ok(file) = File::open("/dev/null") {
            all.push(file);
        }
        let e = Command::new("true").stdin(Stdio::null()).spawn().expect_err("no number is free");
        assert!(matches!(&e, CommandError::Step { step: Step::Null, .. }), "{e}");
        assert_eq!(e.raw_os_error(), Some(libc::EMFILE));
        let e = Command::new("true").stdout(Stdio::piped()).spawn().expect_err("no number is free");
        assert!(matches!(&e, CommandError::Step { step: Step::Pipe, .. }), "{e}");
        kit::assert_no_child();
        // None is needed for a start as such, not even for the pidfd.
        let mut child = Command::new("true").spawn().expect("it starts");
        assert!(child.pidfd().is_none());
        assert!(child.wait().expect("its status").success());
        // Two are exchanged by way of a third.
        let (a, b) = (all[0].as_fd(), all[1].as_fd());
        let (an, bn) = (a.as_raw_fd(), b.as_raw_fd());
        let e = Command::new("true").pass_fd_as(&a, bn).pass_fd_as(&b, an).spawn().expect_err("no number is free");
        assert!(matches!(&e, CommandError::Step { step: Step::Descriptor { .. }, .. }), "{e}");
        assert_eq!(e.raw_os_error(), Some(libc::EMFILE));
        kit::assert_no_child();
    });
}

/// libvirt: after a hook had succeeded, a bad working directory was exit code 0.
#[test]
fn closures_and_what_fails_after_them() {
    isolated("failing::closures_and_what_fails_after_them", 30, || {
        let mut bad = Command::new("/bin/false");
        by_fork(bad.current_dir("/nonexistent"));
        assert!(bad.status().is_err());
        let mut missing = Command::new("/nonexistent");
        by_fork(&mut missing);
        assert!(missing.status().is_err());

        let mut command = sh("echo $MARK; exit 3");
        // SAFETY: writes one byte; sets no lock.
        unsafe {
            command.env("MARK", "x").pre_exec(|| io::stderr().write_all(b"1"));
        }
        // SAFETY: as above.
        unsafe {
            command.pre_exec(|| io::stderr().write_all(b"2"));
        }
        let output = command.output().expect("it starts");
        assert_eq!((output.stdout, output.stderr), (b"x\n".to_vec(), b"12".to_vec()));
        assert_eq!(output.status.code(), Some(3));

        let refuse = |f: fn() -> io::Result<()>| {
            let mut command = Command::new("true");
            by_fork(&mut command);
            // SAFETY: makes an error or panics.
            unsafe { command.pre_exec(f) };
            let before = State::now();
            let e = command.stderr(Stdio::null()).spawn().expect_err("refused by the closure");
            assert_eq!(State::now(), before);
            kit::assert_no_child();
            assert!(matches!(e, CommandError::Step { step: Step::PreExec(1), .. }), "{e}");
            e
        };
        assert_eq!(refuse(|| Err(io::Error::from_raw_os_error(libc::EDOM))).raw_os_error(), Some(libc::EDOM));
        assert_eq!(refuse(|| Err(io::Error::other("no"))).raw_os_error(), Some(libc::EINVAL));
        assert!(refuse(|| panic!("in a closure")).to_string().contains("panicked"));
    });
}

#[test]
fn refused_calls_are_done_without() {
    let flags = (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD) as u32;
    let refuse = vec![
        common::Refuse::when(libc::SYS_clone, 0, flags, libc::EINVAL),
        common::Refuse::call(libc::SYS_clone3, libc::ENOSYS),
        common::Refuse::call(libc::SYS_close_range, libc::EPERM),
    ];
    let setup = Setup { refuse: refuse.clone(), ..Setup::default() };
    isolated_with("failing::refused_calls_are_done_without", 30, setup, || {
        let mut child = Command::new("true").spawn().expect("it starts");
        assert!(child.pidfd().is_some(), "opened afterwards");
        assert!(child.wait().expect("its status").success());
        fails(&mut Command::new("/nonexistent"), &Step::Exec("/nonexistent".into()), libc::ENOENT);
    });
}

/// No child at all: the thread itself opens the gate.
#[test]
fn a_clone_that_fails_leaves_everything_as_it_was() {
    for errno in [libc::EAGAIN, libc::EPERM] {
        let refuse = vec![common::Refuse::call(libc::SYS_clone, errno)];
        let setup = Setup { refuse, env: vec![("ERRNO".to_owned(), errno.to_string())], ..Setup::default() };
        if std::env::var_os("CAREFORK_ISOLATED").is_some() && std::env::var("ERRNO") != Ok(errno.to_string()) {
            continue;
        }
        isolated_with("failing::a_clone_that_fails_leaves_everything_as_it_was", 30, setup, || {
            let before = State::now();
            for _ in 0..3 {
                let e = Command::new("true").spawn().expect_err("refused");
                assert!(matches!(e, CommandError::Fork(ForkError::Os(_))), "{e}");
                assert_eq!(e.raw_os_error(), Some(errno));
            }
            assert_eq!(State::now(), before);
            kit::assert_no_child();
            kit::assert_gate_open();
            assert_eq!(carefork::stats().reopened, 0);
        });
    }
}

/// Other threads are in the middle of their panics' messages: the locks for that are nobody's in the child.
#[test]
fn a_closure_panics_beside_others() {
    let setup = Setup { env: vec![("RUST_BACKTRACE".to_owned(), "1".to_owned())], ..Setup::default() };
    isolated_with("failing::a_closure_panics_beside_others", 60, setup, || {
        let stop = Stop::default();
        thread::scope(|s| {
            let _stop = stop.on_drop();
            for _ in 0..3 {
                s.spawn(|| {
                    while !stop.is_set() {
                        assert!(std::panic::catch_unwind(|| panic!("noise")).is_err());
                    }
                });
            }
            for _ in 0..20 {
                let mut command = Command::new("true");
                command.timeout_never();
                // SAFETY: panics.
                unsafe { command.pre_exec(|| panic!("in a closure")) };
                let e = command.spawn().map(drop).expect_err("refused by the closure");
                assert!(matches!(e, CommandError::Step { step: Step::PreExec(0), .. }), "{e}");
            }
        });
    });
}
