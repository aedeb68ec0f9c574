//! Programs started by `Command`: what they find, what is left when they cannot start, and what their starter keeps (X1, X2).

#![allow(
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]

mod common;
mod kit;

use carefork::{Command, CommandError, ForkError, Reaper, Resource, Signals, Stdio, Step};
use common::{Setup, can_change_user, isolated, isolated_with, raw, status_here};
use kit::State;
use std::fs::{self, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

fn sh(script: &str) -> Command<'static> {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

#[track_caller]
fn text(command: &mut Command<'_>) -> String {
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8").trim_end().to_owned()
}

/// The same by a fork.
fn by_fork(command: &mut Command<'_>) {
    // SAFETY: does nothing.
    unsafe { command.pre_exec(|| Ok(())) };
}

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
    isolated("each_step_that_fails_is_named_and_leaves_nothing", 60, || {
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
    isolated("users_that_cannot_be_become", 30, || {
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
    isolated_with("privileges_that_are_not_there", 30, Setup { uid, ..Setup::default() }, || {
        fails(Command::new("true").uid(0), &Step::Uid(0), libc::EPERM);
        fails(Command::new("true").gid(0), &Step::Gid(0), libc::EPERM);
        fails(Command::new("true").groups(&[0]), &Step::Groups, libc::EPERM);
        let more = Command::new("true").rlimit(Resource::NoFile, u64::MAX, u64::MAX).spawn();
        assert!(matches!(more, Err(CommandError::Step { step: Step::Limit(_), .. })));
    });
}

#[test]
fn what_cannot_be_asked_for_costs_no_child() {
    isolated("what_cannot_be_asked_for_costs_no_child", 30, || {
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
    isolated("without_descriptors_there_is_an_error_and_no_child", 30, || {
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
    isolated("closures_and_what_fails_after_them", 30, || {
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

extern "C" fn caught(_: i32) {
    // Its name in the output of a failing test.
    raw::Line::new().text("a handler of the parent ran").send();
}

#[test]
fn programs_find_their_signals_clean() {
    isolated("programs_find_their_signals_clean", 30, || {
        for s in 1..=64 {
            // Those that cannot be ignored are not.
            // SAFETY: ignores a signal.
            unsafe { libc::signal(s, libc::SIG_IGN) };
        }
        kit::catch(libc::SIGUSR2, caught);
        // SAFETY: back to default: an ignored SIGCHLD takes the status away.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        kit::block(&[libc::SIGUSR1, libc::SIGTERM]);
        let here = status_here().expect("/proc");
        let sets = |command: &mut Command<'_>| {
            let status = text(command.arg("/proc/self/status"));
            ["SigBlk:", "SigIgn:", "SigCgt:"].map(|name| {
                let line = status.lines().find(|l| l.starts_with(name)).expect("in every kernel");
                u64::from_str_radix(line[name.len()..].trim(), 16).expect("hexadecimal")
            })
        };
        for fork in [false, true] {
            let new = || {
                let mut cat = Command::new("cat");
                if fork {
                    by_fork(&mut cat);
                }
                cat
            };
            assert_eq!(sets(&mut new()), [0, 0, 0]);
            assert_eq!(sets(new().signals(Signals::Inherit)), [here.sig_blk, here.sig_ign, 0]);
            let some = Signals::List(vec![libc::SIGINT, libc::SIGUSR1]);
            let (int, usr1) = (kit::bits(&[libc::SIGINT]), kit::bits(&[libc::SIGUSR1]));
            assert_eq!(sets(new().signals(some)), [here.sig_blk & !usr1, here.sig_ign & !int & !usr1, 0]);
        }
        assert_eq!(status_here(), Ok(here), "the parent's own");
    });
}

#[test]
fn the_process_is_as_asked_for() {
    isolated("the_process_is_as_asked_for", 60, || {
        for fork in [false, true] {
            let new = |script: &str| {
                let mut command = sh(script);
                if fork {
                    by_fork(&mut command);
                }
                command
            };
            // pid, process group, session.
            let ids = "set -- $(cat /proc/$$/stat); echo $1 $5 $6";
            let list = text(&mut new(ids));
            let here: Vec<i32> = list.split(' ').map(|n| n.parse().expect("numbers")).collect();
            // SAFETY: takes nothing.
            let group = unsafe { libc::getpgrp() };
            // SAFETY: an integer argument.
            assert_eq!(here[1..], [group, unsafe { libc::getsid(0) }]);
            let session = text(new(ids).session(true));
            let ids_of: Vec<&str> = session.split(' ').collect();
            assert!(ids_of[0] == ids_of[1] && ids_of[1] == ids_of[2], "{session}");
            let group = text(new(ids).process_group(0));
            let ids_of: Vec<&str> = group.split(' ').collect();
            assert!(ids_of[0] == ids_of[1] && ids_of[2] == here[2].to_string(), "{group}");
            assert_eq!(text(new("umask").umask(0o027)), "0027");
            let limits = "ulimit -Sn; ulimit -Hn; ulimit -c";
            let limited = text(new(limits).rlimit(Resource::NoFile, 100, 200).rlimit(Resource::Core, 0, 0));
            assert_eq!(limited, "100\n200\n0");
            assert_eq!(text(new("pwd").current_dir("/usr")), "/usr");
            assert_eq!(text(new("echo $0").arg("me")), "me");
            let mut named = Command::new("sh");
            assert_eq!(
                text(named.arg0("other-name").args(["-c", "tr '\\0' ' ' </proc/$$/cmdline"])).split(' ').next(),
                Some("other-name")
            );
        }
    });
}

#[test]
fn users_and_what_the_parent_keeps() {
    let root = can_change_user();
    isolated("users_and_what_the_parent_keeps", 120, || {
        if !root {
            return;
        }
        // SAFETY: an option without further arguments.
        let dumpable = || unsafe { libc::prctl(libc::PR_GET_DUMPABLE) };
        assert_eq!(dumpable(), 1);
        let ids = "id -u; id -g; id -G";
        assert_eq!(text(sh(ids).uid(1234).gid(2345)), "1234\n2345\n2345");
        assert_eq!(text(sh(ids).uid(1234).gid(2345).groups(&[5, 6])), "1234\n2345\n2345 5 6");
        // Root's own groups do not stay with another user.
        // SAFETY: one group, in a live place.
        assert_eq!(unsafe { libc::setgroups(1, [7].as_ptr()) }, 0);
        assert_eq!(text(sh(ids).uid(1234)), "1234\n0\n0");
        assert_eq!(text(sh(ids).gid(2345)), "0\n2345\n2345 7");
        let mut forked = sh(ids);
        by_fork(forked.uid(1234).gid(2345));
        assert_eq!(text(&mut forked), "1234\n2345\n2345");
        assert_eq!(dumpable(), 1);
        // Other threads' ids are the process's own still: libc's setuid would have been theirs as well.
        thread::scope(|scope| {
            let sleeper = scope.spawn(|| {
                thread::park();
                // This thread's, not the first one's.
                let status = fs::read_to_string("/proc/thread-self/status").expect("/proc");
                let line = |name| status.lines().find(|l| l.starts_with(name)).map(str::to_owned);
                [line("Uid:"), line("Gid:")]
            });
            assert_eq!(text(sh("id -u").uid(99)), "99");
            sleeper.thread().unpark();
            let ids = ["Uid:\t0\t0\t0\t0", "Gid:\t0\t0\t0\t0"];
            assert_eq!(sleeper.join().expect("no panic"), ids.map(|line| Some(line.to_owned())));
        });
        // Starts that overlap, some of which fail: the flag comes back after the last.
        thread::scope(|scope| {
            for i in 0..4 {
                scope.spawn(move || {
                    for n in 0..20 {
                        let mut command = Command::new(if (i + n) % 3 == 0 { "/nonexistent" } else { "true" });
                        command.uid(1000 + i).timeout_never();
                        let status = command.status();
                        assert_eq!(status.is_ok_and(|s| s.success()), (i + n) % 3 != 0);
                    }
                });
            }
        });
        assert_eq!(dumpable(), 1);
        // What was not set before is not set afterwards.
        // SAFETY: an integer argument.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
        assert!(Command::new("true").uid(99).status().expect("it starts").success());
        assert_eq!(dumpable(), 0);
    });
}

#[test]
fn programs_die_with_the_thread_that_started_them() {
    isolated("programs_die_with_the_thread_that_started_them", 60, || {
        for uid in [None, Some(1234)] {
            if uid.is_some() && !can_change_user() {
                continue;
            }
            let start = move || {
                let mut sleep = Command::new("sleep");
                sleep.arg("100000").death_signal(libc::SIGTERM);
                if let Some(uid) = uid {
                    sleep.uid(uid);
                }
                sleep.spawn().expect("it starts")
            };
            let mut child = thread::spawn(start).join().expect("no panic");
            let status = child.wait_timeout(raw::patience(kit::SOON)).expect("a status").expect("it has ended");
            assert_eq!(status.signal(), Some(libc::SIGTERM));
        }
    });
}

/// A program is a child like any: a reaper tells of its end, and a grace period is kept.
#[test]
fn a_reaper_watches_programs() {
    isolated("a_reaper_watches_programs", 60, || {
        let reaper = Reaper::new().expect("a reaper");
        let (tell, told) = std::sync::mpsc::channel();
        let watch = |command: &mut Command<'_>| {
            let tell = tell.clone();
            let child = command.spawn().expect("it starts");
            reaper.watch(child, move |exit| tell.send(exit).expect("the test waits")).expect("watched")
        };
        let next = || loop {
            reaper.dispatch().expect("dispatched");
            if let Ok(exit) = told.recv_timeout(Duration::from_millis(1)) {
                return exit;
            }
        };
        let pid = watch(&mut sh("exit 3")).id();
        let exit = next();
        assert_eq!((exit.pid, exit.code()), (pid, Some(3)));
        watch(Command::new("sleep").arg("100000")).terminate(Duration::from_secs(3600)).expect("it is ours");
        assert_eq!(next().signal(), Some(libc::SIGTERM));
        watch(&mut sh("trap '' TERM; while :; do sleep 1; done"))
            .terminate(Duration::from_millis(50))
            .expect("it is ours");
        let signal = next().signal();
        assert!(matches!(signal, Some(libc::SIGKILL | libc::SIGTERM)), "{signal:?}");
        assert!(told.try_recv().is_err() && reaper.is_empty());
    });
}

#[test]
fn streams_are_piped_and_read() {
    isolated("streams_are_piped_and_read", 60, || {
        // Both at once, more than a pipe holds.
        let both = "head -c 300000 /dev/zero; head -c 400000 /dev/zero >&2; head -c 100000 /dev/zero; exit 5";
        let output = sh(both).output().expect("it starts");
        assert_eq!((output.stdout.len(), output.stderr.len(), output.status.code()), (400_000, 400_000, Some(5)));
        // Standard input of `output` is empty, not ours.
        assert_eq!(Command::new("cat").output().expect("cat").stdout, b"");
        let mut cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("cat");
        (&*cat.stdin.take().expect("asked for")).write_all(b"through").expect("it reads");
        let mut read = String::new();
        (&**cat.stdout.as_ref().expect("asked for")).read_to_string(&mut read).expect("it writes");
        assert_eq!(read, "through");
        assert!(cat.wait().expect("its status").success());
        // Waiting closes the pipe that the program waits for.
        let mut cat = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat");
        assert!(cat.wait().expect("its status").success());
        // Two errors into one file.
        let file = raw::memfd();
        let clone = || file.try_clone().expect("a number");
        assert!(sh("echo one; echo two >&2").stdout(clone()).stderr(clone()).status().expect("sh").success());
        assert_eq!(kit::contents(&file), "one\ntwo\n");
        // Started twice.
        let mut twice = Command::new("echo");
        assert_eq!((text(twice.arg("a")), text(twice.arg("b"))), ("a".to_owned(), "a b".to_owned()));
        assert_eq!(format!("{twice:?}"), r#""echo" "a" "b""#);
    });
}

#[test]
fn in_ones_own_region_it_is_refused() {
    isolated("in_ones_own_region_it_is_refused", 30, || {
        let region = carefork::no_forking();
        let e = Command::new("true").spawn().expect_err("inside a region");
        assert!(matches!(e, CommandError::Fork(ForkError::Forbidden { .. })), "{e}");
        drop(region);
        // A lock may be held, as over a fork (G5).
        let lock = carefork::Mutex::new(1);
        let guard = lock.lock();
        assert!(Command::new("true").status().expect("it starts").success());
        drop(guard);
        let elsewhere = kit::InRegion::new("reader");
        let before = State::now();
        let e = Command::new("true").timeout(Duration::from_millis(50)).spawn().expect_err("past the budget");
        let CommandError::Fork(ForkError::Busy { culprits }) = &e else { panic!("{e:?}") };
        assert_eq!((culprits.count, culprits.threads[0].name.as_str()), (1, "reader"), "{e}");
        // Its own way out, not a fork's, also where somebody prints the chain of causes.
        let text = format!("{e}; {:?}", std::error::Error::source(&e));
        assert!(text.contains("Command::timeout") && !text.contains("ForkOptions"), "{text}");
        assert_eq!(State::now(), before);
        kit::assert_no_child();
        drop(elsewhere);
        kit::assert_gate_open();
        assert!(Command::new("true").status().expect("it starts").success());
    });
}

/// A start is no fork in a hook's eyes, but a hook may not start programs in the middle of one.
#[test]
fn hooks_are_not_run_and_cannot_start_programs() {
    isolated("hooks_are_not_run_and_cannot_start_programs", 30, || {
        let calls = kit::Calls::new();
        let registration = calls.register("counted");
        assert!(Command::new("true").status().expect("it starts").success());
        assert_eq!(calls.ran(), kit::Ran::default());
        drop(registration);
        let refused = kit::shared();
        let starts = move || {
            let e = Command::new("true").spawn();
            let is = matches!(e, Err(CommandError::Fork(ForkError::InFork)));
            refused[0].store(1 + u64::from(is), std::sync::atomic::Ordering::SeqCst);
        };
        let registration = carefork::register(carefork::Hook::new("starts").prepare(starts));
        let mut child = kit::forked(&carefork::ForkOptions::new(), |_| 0);
        assert_eq!((kit::code(&mut child), refused[0].load(std::sync::atomic::Ordering::SeqCst)), (0, 2));
        drop(registration);
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
    isolated_with("refused_calls_are_done_without", 30, setup, || {
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
        isolated_with("a_clone_that_fails_leaves_everything_as_it_was", 30, setup, || {
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

#[test]
fn turned_off_programs_start_all_the_same() {
    let setup = Setup { env: vec![("CAREFORK".to_owned(), "off".to_owned())], ..Setup::default() };
    isolated_with("turned_off_programs_start_all_the_same", 30, setup, || {
        let _region = carefork::no_forking();
        let before = State::now();
        assert!(Command::new("true").status().expect("it starts").success());
        assert!(Command::new("/nonexistent").status().is_err());
        assert_eq!(State::now(), before);
    });
}

/// In a child that does not exec, from a thread with little stack, and many generations down.
#[test]
fn programs_are_started_from_anywhere() {
    isolated("programs_are_started_from_anywhere", 60, || {
        let started = || Command::new("true").status().is_ok_and(|s| s.success());
        let small = thread::Builder::new().stack_size(64 * 1024).spawn(started).expect("a thread");
        assert!(small.join().expect("no panic"));
        let shell = || {
            let status = Command::new("sh").args(["-c", "exit 7"]).status();
            status.ok().and_then(|s| s.code()).unwrap_or(1)
        };
        let child = || {
            // SAFETY: neither child uses a descriptor that the clean-up closes.
            let grandchild = unsafe { carefork::spawn(shell) };
            match grandchild.map(|mut c| c.wait().ok().and_then(|s| s.code())) {
                Ok(Some(7)) if started() => 9,
                _ => 2,
            }
        };
        // SAFETY: as above.
        let mut child = unsafe { carefork::spawn(child) }.expect("a child");
        assert_eq!(kit::code(&mut child), 9);
    });
}

/// A program that leads a group takes it with it when it is asked to end, and is called by its name.
#[test]
fn a_programs_group_goes_with_it() {
    isolated("a_programs_group_goes_with_it", 60, || {
        use std::io::Read as _;
        let script = "trap 'exit 3' TERM; (trap '' TERM; echo $BASHPID; exec sleep 1000) & wait";
        let leads: [for<'a> fn(&'a mut Command<'static>) -> &'a mut Command<'static>; 2] =
            [|c| c.session(true), |c| c.process_group(0)];
        for (lead, by_reaper) in leads.into_iter().flat_map(|lead| [(lead, false), (lead, true)]) {
            let mut command = Command::new("bash");
            command.args(["-c", script]).stdout(Stdio::piped());
            lead(&mut command);
            let mut child = command.spawn().expect("it starts");
            let (mut said, pipe) = (Vec::new(), child.stdout.take().expect("piped"));
            while !said.ends_with(b"\n") {
                let mut byte = [0];
                (&*pipe).read_exact(&mut byte).expect("a number");
                said.extend(byte);
            }
            let exit = if by_reaper {
                let reaper = Reaper::new().expect("a reaper");
                let (tell, told) = std::sync::mpsc::channel();
                let watched =
                    reaper.watch(child, move |exit| tell.send(exit).expect("the test waits")).expect("watched");
                watched.terminate(Duration::from_secs(3600)).expect("ours");
                loop {
                    reaper.dispatch().expect("dispatched");
                    if let Ok(exit) = told.recv_timeout(Duration::from_millis(1)) {
                        break exit;
                    }
                }
            } else {
                child.terminate(Duration::from_secs(3600)).expect("a status");
                child.exit().expect("it ended").clone()
            };
            assert_eq!((exit.code(), exit.name.as_deref()), (Some(3), Some("bash")));
            // The pipe's other end is in the member of the group alone.
            let end = [raw::pollfd(std::os::fd::AsRawFd::as_raw_fd(&*pipe))];
            raw::poll_readable(&mut { end }, raw::patience(kit::SOON));
            let mut rest = [0];
            let mut ends = end;
            raw::poll_readable(&mut ends, Duration::ZERO);
            assert_ne!(ends[0].revents, 0, "a member of the group lives on");
            assert_eq!((&*pipe).read(&mut rest).expect("read"), 0);
        }
    });
}

/// One program's output is another's input, by the pipe that the first one's `Child` has.
#[test]
fn programs_in_a_row() {
    isolated("programs_in_a_row", 30, || {
        let mut first = sh("printf 'b\\na\\n'").stdout(Stdio::piped()).spawn().expect("it starts");
        let pipe = first.stdout.take().expect("piped");
        let mut second = Command::new("sort");
        second.stdin(pipe);
        // As long as the command has it, it is a care-fd.
        let number = common::self_fds().as_slice().last().copied().expect("open");
        let audit = carefork::audit().expect("an audit");
        let care = audit.descriptors.iter().find(|d| d.number == number).expect("listed").care;
        assert_eq!(care, carefork::audit::Care::On(carefork::OnFork::Cleanup));
        assert_eq!(second.output().expect("it starts").stdout, b"a\nb\n");
        assert!(first.wait().expect("a status").success());
    });
}
