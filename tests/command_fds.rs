//! What descriptors a program finds: exactly those it was to find, under their numbers (X2).
//!
//! The programs list what they have (examples/fdlist.rs); the model is the table that was asked for.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used, clippy::cast_possible_wrap)]

mod common;

use carefork::{CareFd, Command, CommandError, OnFork, Stdio, Step};
use common::{Rng, Setup, isolated, isolated_with, raw};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

type Table = BTreeMap<i32, (u64, u64)>;

/// The program that lists.
fn lister() -> PathBuf {
    let exe = std::env::current_exe().expect("this binary");
    let program = exe.parent().and_then(Path::parent).expect("target/debug").join("examples/fdlist");
    if std::env::var_os("CAREFORK_ISOLATED").is_none() && !program.exists() {
        // `cargo test` has built it; `cargo test --test command_fds` has not.
        let release: &[&str] = if cfg!(debug_assertions) { &[] } else { &["--release"] };
        let mut build = std::process::Command::new(env!("CARGO"));
        assert!(build.args(["build", "--example", "fdlist"]).args(release).status().expect("cargo").success());
    }
    program
}

/// Starts the lister, and hands back what it had.
#[track_caller]
fn listed(command: &mut Command<'_>, to: &Path) -> Table {
    let mut child = command.arg(to).spawn().expect("it starts");
    assert_eq!(child.wait().expect("its status").code(), Some(0));
    let text = std::fs::read_to_string(to).expect("it has written its list");
    let line = |line: &str| {
        let n: Vec<u64> = line.split(' ').map(|n| n.parse().expect("numbers")).collect();
        (n[0] as i32, (n[1], n[2]))
    };
    text.lines().map(line).collect()
}

fn identity(fd: i32) -> Option<(u64, u64)> {
    let meta = std::fs::metadata(format!("/proc/self/fd/{fd}")).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// A file of its own inode, at this very number.
fn place(number: i32, close_on_exec: bool) {
    place_from(number, close_on_exec, 200);
}

fn place_from(number: i32, close_on_exec: bool, spare: i32) {
    let file = above(raw::memfd().as_fd(), spare);
    let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: the test's own process, in which these numbers are nobody else's.
    let done = unsafe { libc::dup3(file.as_raw_fd(), number, flags) };
    assert_eq!(done, number);
}

/// A copy above all numbers that are played with.
fn above(fd: BorrowedFd<'_>, least: i32) -> OwnedFd {
    // SAFETY: an integer argument.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) };
    assert!(copy >= least);
    // SAFETY: the kernel just gave us this number.
    unsafe { OwnedFd::from_raw_fd(copy) }
}

fn close(number: i32) {
    // SAFETY: as above.
    unsafe { libc::close(number) };
}

fn borrowed(number: i32) -> BorrowedFd<'static> {
    // SAFETY: a number that the test keeps open while the command lives.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// The standard streams, put aside while a case plays with their numbers.
struct Streams([OwnedFd; 3]);

impl Streams {
    fn aside() -> Streams {
        Streams([0, 1, 2].map(|n| above(borrowed(n), 200)))
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for (n, fd) in (0..).zip(&self.0) {
            // SAFETY: the numbers are the standard streams'.
            unsafe { libc::dup2(fd.as_raw_fd(), n) };
        }
    }
}

/// What is open here (with or without close-on-exec), and which number is to be which of them.
#[derive(Clone, Debug)]
struct Case {
    here: BTreeMap<i32, bool>,
    wanted: BTreeMap<i32, i32>,
    by_stdio: bool,
    by_fork: bool,
}

/// Few numbers, so that they meet: the standard streams, those that pipes of the library's own get, and some above.
fn numbers() -> Vec<i32> {
    (0..8).chain(20..24).collect()
}

fn case() -> impl Strategy<Value = Case> {
    let here = prop::collection::btree_map(prop::sample::select(numbers()), any::<bool>(), 1..10);
    (here, any::<bool>(), prop::bool::weighted(0.2)).prop_flat_map(|(here, by_stdio, by_fork)| {
        let sources: Vec<i32> = here.keys().copied().collect();
        let pairs = (prop::sample::select(numbers()), prop::sample::select(sources));
        prop::collection::btree_map(pairs.0, pairs.1, 0..12).prop_map(move |wanted| Case {
            here: here.clone(),
            wanted,
            by_stdio,
            by_fork,
        })
    })
}

fn run(case: &Case, program: &Path, to: &Path) -> (Table, Table) {
    let _streams = Streams::aside();
    numbers().into_iter().for_each(close);
    for (&number, &close_on_exec) in &case.here {
        place(number, close_on_exec);
    }
    let mut expected: Table = case.wanted.iter().map(|(&to, &from)| (to, identity(from).expect("open"))).collect();
    for stream in 0..3 {
        // Not given: as it is here.
        if case.here.get(&stream) == Some(&false) {
            expected.entry(stream).or_insert_with(|| identity(stream).expect("open"));
        }
    }
    let before: Vec<_> = numbers().into_iter().map(|n| (n, identity(n))).collect();
    let fds: BTreeMap<i32, BorrowedFd<'_>> = case.wanted.iter().map(|(&to, &from)| (to, borrowed(from))).collect();
    let mut command = Command::new(program);
    for (&number, fd) in &fds {
        let own = || Stdio::from(above(fd.as_fd(), 100));
        match number {
            0 if case.by_stdio => drop(command.stdin(own())),
            1 if case.by_stdio => drop(command.stdout(own())),
            2 if case.by_stdio => drop(command.stderr(own())),
            n if n == fd.as_raw_fd() => drop(command.pass_fd(fd)),
            n => drop(command.pass_fd_as(fd, n)),
        }
    }
    if case.by_fork {
        // SAFETY: does nothing.
        unsafe { command.pre_exec(|| Ok(())) };
    }
    let found = listed(&mut command, to);
    drop(command);
    let after: Vec<_> = numbers().into_iter().map(|n| (n, identity(n))).collect();
    assert_eq!(before, after, "this process's own descriptors changed");
    for (&number, &close_on_exec) in &case.here {
        // SAFETY: an integer argument.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC != 0, close_on_exec, "close-on-exec of {number} changed here");
    }
    numbers().into_iter().for_each(close);
    (found, expected)
}

#[test]
fn programs_find_what_was_asked_for_and_nothing_else() {
    let program = lister();
    isolated("programs_find_what_was_asked_for_and_nothing_else", 240, || {
        let mut seed = [0; 32];
        let mut rng = Rng::new();
        seed.chunks_exact_mut(8).for_each(|part| part.copy_from_slice(&rng.next().to_ne_bytes()));
        let config = Config { cases: 400, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
        let to = std::env::temp_dir().join(format!("carefork-fdlist-{}", std::process::id()));
        let result = runner.run(&case(), |case| {
            let (found, expected) = run(&case, &program, &to);
            prop_assert_eq!(found, expected);
            Ok(())
        });
        drop(std::fs::remove_file(&to));
        if let Err(e) = result {
            panic!("{e}");
        }
    });
}

/// A child that marks one number after the other finds the same.
#[test]
fn without_close_range_too() {
    let program = lister();
    let setup = Setup { refuse: vec![(libc::SYS_close_range, libc::ENOSYS).into()], ..Setup::default() };
    isolated_with("without_close_range_too", 60, setup, || {
        let to = std::env::temp_dir().join(format!("carefork-fdlist-{}", std::process::id()));
        for by_fork in [false, true] {
            let here = numbers().into_iter().map(|n| (n, n % 2 == 0)).collect();
            let wanted = BTreeMap::from([(0, 1), (1, 2), (2, 0), (5, 5), (21, 3)]);
            let (found, expected) = run(&Case { here, wanted, by_stdio: false, by_fork }, &program, &to);
            assert_eq!(found, expected);
        }
        drop(std::fs::remove_file(&to));
    });
}

/// The six orders of the three standard streams among each other, and each of them under all three numbers.
#[test]
fn standard_streams_in_every_permutation() {
    let program = lister();
    isolated("standard_streams_in_every_permutation", 120, || {
        let to = std::env::temp_dir().join(format!("carefork-fdlist-{}", std::process::id()));
        for code in 0..27 {
            let wanted: BTreeMap<i32, i32> = [(0, code % 3), (1, code / 3 % 3), (2, code / 9)].into();
            for close_on_exec in [false, true] {
                let here = (0..3).map(|n| (n, close_on_exec)).collect();
                let case = Case { here, wanted: wanted.clone(), by_stdio: false, by_fork: false };
                let (found, expected) = run(&case, &program, &to);
                assert_eq!(found, expected, "{case:?}");
            }
        }
        drop(std::fs::remove_file(&to));
    });
}

#[test]
fn a_thousand_descriptors_in_one_ring() {
    let program = lister();
    let setup = Setup { rlimits: vec![(libc::RLIMIT_NOFILE, 1100)], ..Setup::default() };
    isolated_with("a_thousand_descriptors_in_one_ring", 60, setup, || {
        let to = std::env::temp_dir().join(format!("carefork-fdlist-{}", std::process::id()));
        let (first, last) = (40, 1039);
        (first..=last).for_each(|n| place_from(n, n % 3 == 0, 1050));
        let fds: Vec<BorrowedFd<'_>> = (first..=last).map(borrowed).collect();
        let mut command = Command::new(&program);
        let mut expected: Table = (0..3).map(|n| (n, identity(n).expect("open"))).collect();
        for (n, fd) in (first..).zip(&fds) {
            let to = if n == last { first } else { n + 1 };
            command.pass_fd_as(fd, to);
            expected.insert(to, identity(n).expect("open"));
        }
        assert_eq!(expected.values().collect::<BTreeSet<_>>().len(), 1002);
        assert_eq!(listed(&mut command, &to), expected);
        drop(std::fs::remove_file(&to));
    });
}

/// Where a ring's spare number is the very last one that there is, it is found.
#[test]
fn a_ring_below_the_limit() {
    let program = lister();
    isolated("a_ring_below_the_limit", 60, || {
        let to = std::env::temp_dir().join(format!("carefork-fdlist-{}", std::process::id()));
        let last = 63;
        (10..last).for_each(|n| place(n, true));
        let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
        // SAFETY: a live limit.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
        let free: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        // One number is left: the lister's pidfd would like it, and does without.
        close(30);
        let (a, b) = (borrowed(10), borrowed(62));
        let mut command = Command::new(&program);
        command.pass_fd_as(&a, 62).pass_fd_as(&b, 10);
        let mut expected: Table = (0..3).map(|n| (n, identity(n).expect("open"))).collect();
        expected.extend([(62, identity(10).expect("open")), (10, identity(62).expect("open"))]);
        let child = command.arg(&to).spawn();
        drop(free);
        assert_eq!(child.expect("it starts").wait().expect("its status").code(), Some(0));
        assert_eq!(std::fs::read_to_string(&to).expect("its list").lines().count(), expected.len());
        drop(std::fs::remove_file(&to));
    });
}

#[test]
fn sockets_by_systemds_rules() {
    isolated("sockets_by_systemds_rules", 30, || {
        // SAFETY: an isolated test has one thread.
        unsafe { std::env::set_var("LISTEN_FDS", "7") };
        // SAFETY: as above.
        unsafe { std::env::set_var("LISTEN_PID", std::process::id().to_string()) };
        // SAFETY: as above.
        unsafe { std::env::set_var("LISTEN_FDNAMES", "mine") };
        // What this process was given is not handed on.
        let all = Command::new("env").output().expect("env");
        assert!(!String::from_utf8_lossy(&all.stdout).contains("LISTEN_"));
        // Unless it is said explicitly.
        let one = Command::new("env").env("LISTEN_FDS", "1").output().expect("env");
        assert!(String::from_utf8_lossy(&one.stdout).contains("LISTEN_FDS=1\n"));

        let files = [raw::memfd(), raw::memfd()];
        for by_fork in [false, true] {
            let mut command = Command::new("sh");
            command.args(["-c", "echo $$ $LISTEN_PID $LISTEN_FDS $LISTEN_FDNAMES; stat -L -c %i /dev/fd/3 /dev/fd/4"]);
            command.listen_fds([("one", files[0].as_fd())]).listen_fds([("", files[1].as_fd())]);
            if by_fork {
                // SAFETY: does nothing.
                unsafe { command.pre_exec(|| Ok(())) };
            }
            let output = command.output().expect("sh");
            let text = String::from_utf8(output.stdout).expect("ASCII");
            let words: Vec<_> = text.split_whitespace().collect();
            assert_eq!(words[0], words[1], "LISTEN_PID is the program's own number: {text}");
            let inode = |i: usize| identity(files[i].as_raw_fd()).expect("open").1.to_string();
            assert_eq!(words[2..], ["2", "one:", &inode(0), &inode(1)]);
        }
        let long = "x".repeat(256);
        for name in ["a:b", "a\nb", "ä", &long] {
            let e = Command::new("true").listen_fds([(name, files[0].as_fd())]).spawn().expect_err(name);
            assert!(e.to_string().contains("listen_fds"), "{e}");
        }
    });
}

/// The fork of `pre_exec` closes it; without one it is passed like any.
#[test]
fn what_a_fork_closes_is_not_passed_by_one() {
    isolated("what_a_fork_closes_is_not_passed_by_one", 30, || {
        let care = CareFd::new_on(OnFork::Close, raw::memfd()).expect("a number");
        let input = || CareFd::new_on(OnFork::Close, File::open("/dev/null").expect("there")).expect("a number");
        for passed in [true, false] {
            let mut command = Command::new("true");
            if passed {
                command.pass_fd(&care);
            } else {
                command.stdin(input());
            }
            assert!(command.status().expect("passed").success());
            // SAFETY: does nothing.
            unsafe { command.pre_exec(|| Ok(())) };
            let e = command.spawn().expect_err("closed at the fork");
            assert!(matches!(e, CommandError::Invalid(_)), "{e}");
            assert!(e.to_string().contains("OnFork::Cleanup") && e.to_string().contains("pre_exec"), "{e}");
        }
    });
}

/// Numbers that change places, and one of them is not open: the copy that is put aside must not have that number.
#[test]
fn a_ring_with_a_gap_starts_nothing() {
    isolated("a_ring_with_a_gap_starts_nothing", 30, || {
        let (a, gap, b) = (raw::memfd(), raw::memfd(), raw::memfd());
        let [first, free, last] = [&a, &gap, &b].map(AsRawFd::as_raw_fd);
        drop(gap);
        // SAFETY: the number is only asked for.
        let gone = unsafe { BorrowedFd::borrow_raw(free) };
        for to in [[last, first, free], [free, last, first]] {
            let mut command = Command::new("true");
            command.pass_fd_as(&a, to[0]).pass_fd_as(&gone, to[1]).pass_fd_as(&b, to[2]);
            let e = command.status().expect_err("it is not open");
            assert!(matches!(e, CommandError::Step { step: Step::NotOpen { from, .. }, .. } if from == free), "{e}");
        }
    });
}

/// The pipe that tells of an exec's failure keeps out of the way of what is to be passed.
#[test]
fn a_failed_exec_is_told_whatever_is_passed() {
    isolated("a_failed_exec_is_told_whatever_is_passed", 60, || {
        let (file, _many) = (raw::memfd(), (3..40).map(|_| raw::memfd()).collect::<Vec<_>>());
        for to in 3..60 {
            let mut command = Command::new("/nonexistent");
            command.pass_fd_as(&file, to);
            // SAFETY: does nothing.
            unsafe { command.pre_exec(|| Ok(())) };
            let e = command.spawn().map(drop).expect_err("no such program");
            assert!(matches!(e, CommandError::Step { step: Step::Exec(_), .. }), "{to}: {e}");
        }
    });
}

#[test]
fn two_descriptors_for_one_number_are_refused() {
    isolated("two_descriptors_for_one_number_are_refused", 30, || {
        let (a, b) = (raw::memfd(), raw::memfd());
        let mut twice = Command::new("true");
        assert!(twice.pass_fd_as(&a, 9).pass_fd_as(&a, 9).status().expect("the same").success());
        let e = twice.pass_fd_as(&b, 9).spawn().expect_err("another");
        assert!(e.to_string().contains("number 9"), "{e}");
        let mut listens = Command::new("true");
        let e = listens.pass_fd_as(&a, 3).listen_fds([("x", b.as_fd())]).spawn().expect_err("3 is taken");
        assert!(e.to_string().contains("number 3"), "{e}");
        let mut streams = Command::new("true");
        let e = streams.stdin(Stdio::null()).pass_fd_as(&a, 0).spawn().expect_err("0 is taken");
        assert!(e.to_string().contains("standard stream"), "{e}");
        let e = Command::new("true").pass_fd_as(&a, -1).spawn().expect_err("no number");
        assert!(e.to_string().contains("negative"), "{e}");
    });
}
