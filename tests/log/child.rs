//! What a child keeps of the log, and where it writes.

use crate::common::{self, check, isolated, isolated_with, thread_count};
use crate::drive::{self, BOTH, Kind};
use crate::logs::{Scratch, by_pid, fork_then, noexec, standard_error_to, storm};
use crate::{assert_whole, ends_well, in_both, log_by, logger_of, messages, numbered};
use carefork::log::{Builder, Output};
use std::os::fd::AsRawFd;
use std::time::Duration;

#[test]
fn a_child_keeps_levels_and_filters_and_goes_to_fd_2() {
    isolated("child::a_child_keeps_levels_and_filters_and_goes_to_fd_2", 60, || {
        let (file, error) = (Scratch::new("parent"), Scratch::new("error"));
        let _redirected = standard_error_to(&error);
        let builder = Builder::new().filters("warn,net=debug,net::http=off").expect("filters");
        builder.output(Output::file(&file.0).expect("a file")).init().expect("the first logger");
        let all = |who: &str| {
            ::log::info!(target: "app", "{who} no");
            ::log::warn!(target: "app", "{who} yes");
            ::log::debug!(target: "net", "{who} yes");
            ::log::trace!(target: "net", "{who} no");
            ::log::error!(target: "net::http", "{who} no");
        };
        all("parent");
        in_both(|| {
            all("child");
            ends_well(noexec(Kind::Coordinated, || {
                all("grandchild");
                0
            }));
            0
        });
        all("parent");
        let text = file.text();
        assert_eq!(text.lines().filter(|l| l.ends_with("parent yes")).count(), 4, "{text}");
        assert_eq!(text.lines().count(), 4);
        let text = error.text();
        assert!(!text.contains(" no\n") && text.lines().count() == 8, "{text}");
        let found = by_pid(&text);
        assert_eq!(found.len(), 4, "children and grandchildren by their own pids: {text}");
        assert!(found.values().all(|lines| lines.len() == 2));
    });
}

#[test]
fn a_child_points_the_log_at_a_file_of_its_own_and_its_child_goes_to_fd_2() {
    isolated("child::a_child_points_the_log_at_a_file_of_its_own_and_its_child_goes_to_fd_2", 60, || {
        for background in [None, Some(16)] {
            let (file, error, own) = (Scratch::new("parent"), Scratch::new("error"), Scratch::new("own"));
            let _redirected = standard_error_to(&error);
            let builder = background.map_or(Builder::new(), |n| Builder::new().background(n));
            let logger = builder.output(Output::file(&file.0).expect("a file")).build();
            log_by(&logger, "parent 0 0");
            in_both(|| {
                log_by(&logger, "child 0 0");
                logger.set_output(Output::file(&own.0).expect("a file"));
                log_by(&logger, "child 0 1");
                in_both(|| {
                    log_by(&logger, "grandchild 0 0");
                    0
                });
                log_by(&logger, "child 0 2");
                logger.flush();
                0
            });
            log_by(&logger, "parent 0 1");
            logger.flush();
            let ends = |text: String| {
                text.lines().map(|l| l.rsplit("storm: ").next().expect("one").to_owned()).collect::<Vec<_>>()
            };
            assert_eq!(ends(file.text()), ["parent 0 0", "parent 0 1"]);
            assert_eq!(ends(own.text()), ["child 0 1", "child 0 2"].repeat(2));
            assert_eq!(ends(error.text()), ["child 0 0", "grandchild 0 0", "grandchild 0 0"].repeat(2));
            assert_eq!(by_pid(&error.text()).len(), 6);
        }
    });
}

/// Pointed at a file before its clean-up: the file is the child's own, and stays.
#[test]
fn a_file_set_before_the_clean_up_stays() {
    isolated("child::a_file_set_before_the_clean_up_stays", 60, || {
        let (error, own) = (Scratch::new("error"), Scratch::new("own"));
        let _redirected = standard_error_to(&error);
        let logger = Builder::new().build();
        ends_well(fork_then(Kind::Foreign, false, || {
            logger.set_output(Output::file(&own.0).expect("a file"));
            log_by(&logger, "record 0 0");
            // SAFETY: this is a child, and the log looks before it writes.
            unsafe { carefork::postfork_child_noexec() }.expect("a child");
            log_by(&logger, "record 0 1");
            0
        }));
        assert_eq!((numbered(&own.text()), numbered(&error.text())), (vec![0, 1], vec![]));
    });
}

#[test]
fn the_thread_comes_back_in_a_child_when_it_is_first_needed() {
    isolated("child::the_thread_comes_back_in_a_child_when_it_is_first_needed", 60, || {
        let (error, own) = (Scratch::new("error"), Scratch::new("own"));
        let _redirected = standard_error_to(&error);
        let before = thread_count();
        let logger = Builder::new().background(16).build();
        assert_eq!(thread_count(), before, "nothing was logged yet");
        log_by(&logger, "record 0 0");
        assert_eq!(thread_count(), before + 1);
        logger.flush();
        in_both(|| {
            check(1, thread_count() == 1);
            log_by(&logger, "record 0 0");
            logger.flush();
            check(2, thread_count() == 1);
            logger.set_output(Output::file(&own.0).expect("a file"));
            check(3, thread_count() == 1);
            log_by(&logger, "record 0 0");
            check(4, thread_count() == 2);
            logger.flush();
            0
        });
        assert_eq!(thread_count(), before + 1);
        assert_eq!(numbered(&own.text()), [0, 0]);
    });
}

/// Nor by a turn before the first record.
#[test]
fn a_turn_starts_no_thread() {
    isolated("child::a_turn_starts_no_thread", 60, || {
        let (a, b) = (Scratch::new("a"), Scratch::new("b"));
        let before = thread_count();
        let logger = Builder::new().output(Output::file(&a.0).expect("a file")).background(8).build();
        logger.set_output(Output::file(&b.0).expect("a file"));
        assert_eq!(thread_count(), before, "nothing was logged yet");
        log_by(&logger, "record 0 0");
        logger.flush();
        assert_eq!((thread_count(), numbered(&b.text())), (before + 1, vec![0]));
    });
}

/// Two threads of a fresh child point the log at once: there is one queue behind it, and `flush` answers for what each has logged.
#[test]
fn two_threads_may_point_the_log_at_once() {
    isolated("child::two_threads_may_point_the_log_at_once", 60, || {
        let logger = Builder::new().background(100).build();
        for round in 0..400 {
            let files = [Scratch::new("a"), Scratch::new("b")];
            ends_well(noexec(BOTH[round % 2], || {
                let start = std::sync::Barrier::new(2);
                let turn = |n: usize| {
                    let output = Output::file(&files[n].0).expect("a file");
                    start.wait();
                    logger.set_output(output);
                    log_by(&logger, &format!("record 0 {n}"));
                    logger.flush();
                };
                std::thread::scope(|s| {
                    s.spawn(|| turn(0));
                    turn(1);
                });
                0
            }));
            let mut found: Vec<_> = files.iter().flat_map(|file| numbered(&file.text())).collect();
            found.sort_unstable();
            assert_eq!(found, [0, 1], "round {round}");
        }
    });
}

/// `TZ` is read once, before any fork, and by no libc function: children log right while the parent's threads are in `localtime_r`.
#[test]
fn time_stamps_are_right_in_a_child_and_take_no_libc_lock() {
    let mut setup = common::Setup::default();
    setup.env.push(("TZ".into(), "Asia/Kathmandu".into()));
    isolated_with("child::time_stamps_are_right_in_a_child_and_take_no_libc_lock", 240, setup, || {
        let error = Scratch::new("error");
        let _redirected = standard_error_to(&error);
        let logger = Builder::new().init().expect("the first logger");
        // To the microsecond, as they are written.
        let begun = jiff::Timestamp::now() - Duration::from_micros(1);
        let made = storm(
            2000,
            |_, n| {
                let (time, mut broken_down) = (n as libc::time_t, std::mem::MaybeUninit::<libc::tm>::uninit());
                // More in libc's function than out of it.
                for _ in 0..200 {
                    // SAFETY: both are live for the call.
                    unsafe { libc::localtime_r(&raw const time, broken_down.as_mut_ptr()) };
                }
            },
            |i| {
                ::log::info!(target: "storm", "record 0 {i}");
                0
            },
        );
        let ended = jiff::Timestamp::now();
        assert!(made.iter().all(|&n| n > 0));
        drop(logger);
        let text = error.text();
        assert_eq!(numbered(&text), (0..2000).collect::<Vec<_>>());
        for line in text.lines() {
            assert_whole(line);
            assert!(line.contains("+05:45 INFO"), "{line}");
            let stamp: jiff::Timestamp = line.split(' ').next().expect("one").parse().expect("a time");
            assert!((begun..=ended).contains(&stamp), "{line}");
        }
    });
}

/// Without at-fork handlers too: by a raw clone, and where carefork is switched off.
#[test]
fn a_child_that_nobody_told_goes_to_fd_2() {
    let check_it = || {
        let (file, error) = (Scratch::new("untold"), Scratch::new("error"));
        let redirected = standard_error_to(&error);
        let logger = Builder::new().output(Output::file(&file.0).expect("a file")).background(8).build();
        log_by(&logger, "record 0 0");
        logger.flush();
        let in_child = || {
            log_by(&logger, "record 0 1");
            logger.flush();
            common::raw::exit_now(0)
        };
        drive::until_others_sleep();
        // SAFETY: the arguments of a fork; the only other threads sleep, so the allocator is at rest.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            in_child();
        }
        ends_well(i32::try_from(pid).expect("a pid"));
        // SAFETY: as above.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            in_child();
        }
        ends_well(pid);
        drop(redirected);
        assert_eq!((numbered(&file.text()), numbered(&error.text())), (vec![0], vec![1, 1]));
        assert_eq!(by_pid(&error.text()).len(), 2);
    };
    isolated("child::a_child_that_nobody_told_goes_to_fd_2", 60, check_it);
    let mut setup = common::Setup::default();
    setup.env.push(("CAREFORK".into(), "off".into()));
    isolated_with("child::a_child_that_nobody_told_goes_to_fd_2", 60, setup, check_it);
}

/// The numbers that lead to that file.
fn leading_to(file: &Scratch) -> Vec<i32> {
    let open = std::fs::read_dir("/proc/self/fd").expect("/proc").map(|entry| entry.expect("/proc").path());
    let open = open.filter(|link| std::fs::read_link(link).is_ok_and(|to| to == file.0));
    open.map(|link| link.file_name().and_then(|n| n.to_str()?.parse().ok()).expect("a number")).collect()
}

/// Closed by the clean-up, and by nothing else; the child's records go to fd 2, also once the number is somebody else's.
#[test]
fn a_child_that_has_cleaned_up_has_not_its_parents_log_open() {
    isolated("child::a_child_that_has_cleaned_up_has_not_its_parents_log_open", 60, || {
        for n in 0..2 {
            for kind in BOTH {
                for clean_up in [true, false] {
                    let (file, error, other) = (Scratch::new("closed"), Scratch::new("error"), Scratch::new("other"));
                    let redirected = standard_error_to(&error);
                    let logger = logger_of(&file, n);
                    log_by(&logger, "of the parent");
                    logger.flush();
                    let [number] = leading_to(&file)[..] else { panic!("the log has one descriptor") };
                    ends_well(fork_then(kind, clean_up, || {
                        check(1, leading_to(&file).is_empty() == clean_up);
                        // SAFETY: integers only.
                        let is_open = unsafe { libc::fcntl(number, libc::F_GETFD) } != -1;
                        check(2, is_open != clean_up);
                        let taken = other.append();
                        if clean_up {
                            // SAFETY: a number that nobody has, or `taken` itself.
                            unsafe { libc::dup2(taken.as_raw_fd(), number) };
                        }
                        log_by(&logger, "of the child");
                        logger.flush();
                        drop(taken);
                        0
                    }));
                    log_by(&logger, "again");
                    logger.flush();
                    drop(redirected);
                    assert_eq!(leading_to(&file), [number], "the parent's is its own");
                    assert_eq!(messages(&file.text()), ["of the parent", "again"]);
                    assert_eq!(messages(&error.text()), ["of the child"]);
                    assert_eq!(by_pid(&error.text()).len(), 1);
                    assert_eq!(other.text(), "");
                }
            }
        }
    });
}
