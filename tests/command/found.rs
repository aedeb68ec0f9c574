//! What a program finds when it starts: signals, identity, limits, streams (X1, X2).

use crate::common::{self, can_change_user, isolated, raw, status_here};
use crate::kit::{self};
use crate::{by_fork, sh, text};
use carefork::{Command, Resource, Signals, Stdio};
use std::fs::{self};
use std::io::{Read as _, Write as _};
use std::thread;

extern "C" fn caught(_: i32) {
    // Its name in the output of a failing test.
    raw::Line::new().text("a handler of the parent ran").send();
}

#[test]
fn programs_find_their_signals_clean() {
    isolated("found::programs_find_their_signals_clean", 30, || {
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
    isolated("found::the_process_is_as_asked_for", 60, || {
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
    isolated("found::users_and_what_the_parent_keeps", 120, || {
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
fn streams_are_piped_and_read() {
    isolated("found::streams_are_piped_and_read", 60, || {
        // Both at once, more than a pipe holds.
        let both = "head -c 300000 /dev/zero; head -c 400000 /dev/zero >&2; head -c 100000 /dev/zero; exit 5";
        let output = sh(both).output().expect("it starts");
        assert_eq!((output.stdout.len(), output.stderr.len(), output.status.code()), (400_000, 400_000, Some(5)));
        // Standard input of `output` is empty, not ours.
        assert_eq!(Command::new("cat").output().expect("cat").stdout, b"");
        let mut cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("cat");
        (&*cat.stdin.take().expect("asked for")).write_all(b"through").expect("it reads");
        let mut read = String::new();
        cat.stdout.as_mut().expect("asked for").read_to_string(&mut read).expect("it writes");
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

/// One program's output is another's input, by the pipe that the first one's `Child` has.
#[test]
fn programs_in_a_row() {
    isolated("found::programs_in_a_row", 30, || {
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

/// PATH twice: the first counts, as for getenv, std and execvp.
#[test]
fn the_first_path_is_searched() {
    isolated("found::the_first_path_is_searched", 30, || {
        unsafe extern "C" {
            static mut environ: *const *const libc::c_char;
        }
        let new = [c"PATH=/bin:/usr/bin".as_ptr(), c"PATH=/nonexistent".as_ptr(), std::ptr::null()];
        // SAFETY: an isolated test has one thread that looks at the environment.
        let old = unsafe { environ };
        // SAFETY: as above; put back.
        unsafe { environ = new.as_ptr() };
        let found = Command::new("true").status();
        // SAFETY: as above.
        unsafe { environ = old };
        assert!(found.expect("found").success());
    });
}
