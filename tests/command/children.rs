//! Programs as children: reaped, killed with their starter's thread, ended as a group.

use crate::common::{can_change_user, isolated, raw};
use crate::kit::{self};
use crate::sh;
use carefork::{Command, Reaper, Stdio};
use std::os::unix::process::ExitStatusExt as _;
use std::thread;
use std::time::Duration;

#[test]
fn programs_die_with_the_thread_that_started_them() {
    isolated("children::programs_die_with_the_thread_that_started_them", 60, || {
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
    isolated("children::a_reaper_watches_programs", 60, || {
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

/// A program that leads a group takes it with it when it is asked to end, and is called by its name.
#[test]
fn a_programs_group_goes_with_it() {
    isolated("children::a_programs_group_goes_with_it", 60, || {
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
