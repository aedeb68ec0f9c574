//! F1-F6: care-fds in the process that opened them and in its children.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::{AdoptError, CareFd, ForkOptions, OnFork, no_forking, postfork_child_noexec};
use common::{
    Refuse, Setup, Verdict, between, check, count_syscalls, isolated, isolated_with, raw, reap, self_fds, strace_mark,
};
use kit::{SOON, assert_gate_open, code, foreign, forked};
use nix::sys::resource::{Resource, getrlimit};
use std::fs::File;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

fn null() -> io::Result<File> {
    File::open("/dev/null")
}

fn care() -> CareFd<File> {
    CareFd::open(null).expect("/dev/null")
}

/// A foreign fork whose child cleans up, then runs `f`.
fn in_noexec_child(f: impl FnOnce()) {
    let pid = kit::foreign(|| {
        // SAFETY: no borrowed descriptor of a care-fd is used afterwards.
        check(90, unsafe { postfork_child_noexec() }.is_ok());
        f();
        0
    });
    assert_eq!(common::reap(pid, SOON), common::Verdict::Exited(0));
}

/// Puts `file` at a number of our choice.
fn at(number: RawFd) -> io::Result<File> {
    let file = null()?;
    // SAFETY: the kernel takes the lowest free number from there.
    let fd = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this number.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// A name for `fd` that lets its owner be dropped in the child.
fn borrowed(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: open wherever it is used.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: only asks.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

fn cloexec(fd: RawFd) -> bool {
    // SAFETY: only asks.
    unsafe { libc::fcntl(fd, libc::F_GETFD) & libc::FD_CLOEXEC != 0 }
}

fn close(fd: RawFd) {
    // SAFETY: this is the misuse under test.
    assert_eq!(unsafe { libc::close(fd) }, 0);
}

fn panic_text(f: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("it must panic");
    panic.downcast_ref::<String>().expect("a formatted message").clone()
}

// -- F1: wrapping

#[test]
fn costs_eight_bytes_beside_the_value() {
    assert!(size_of::<CareFd<OwnedFd>>() <= size_of::<OwnedFd>() + 8);
    assert!(size_of::<CareFd<File>>() <= size_of::<File>() + 8);
    struct Boxed(Box<OwnedFd>);
    impl AsFd for Boxed {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }
    impl From<Boxed> for OwnedFd {
        fn from(b: Boxed) -> OwnedFd {
            *b.0
        }
    }
    assert!(size_of::<CareFd<Boxed>>() <= size_of::<Boxed>() + 8);
    let boxed = CareFd::open(|| Ok(Boxed(Box::new(null()?.into())))).expect("opened");
    assert!(is_open(boxed.as_raw_fd()));
}

#[test]
fn is_what_it_wraps_as_far_as_threads_go() {
    fn both<T: Send + Sync>() {}
    both::<CareFd<File>>();
    both::<CareFd<TcpListener>>();
}

#[test]
fn wraps_whatever_owns_a_descriptor() {
    isolated("wraps_whatever_owns_a_descriptor", 20, || {
        let before = self_fds().as_slice().to_vec();
        let listener = CareFd::open(|| TcpListener::bind("127.0.0.1:0")).expect("a listener");
        let udp = CareFd::open(|| UdpSocket::bind("127.0.0.1:0")).expect("a socket");
        let (a, b) = CareFd::open_pair(UnixStream::pair).expect("a pair");
        let (r, w) = CareFd::open_pair(io::pipe).expect("a pipe");
        let many = CareFd::open_all(|| (0..5).map(|_| null()).collect::<io::Result<Vec<_>>>()).expect("five files");
        assert!(listener.local_addr().is_ok() && udp.local_addr().is_ok());
        let mut fds = vec![listener.as_raw_fd(), udp.as_raw_fd(), a.as_raw_fd(), b.as_raw_fd()];
        fds.extend([r.as_raw_fd(), w.as_raw_fd()]);
        fds.extend(many.iter().map(AsRawFd::as_raw_fd));
        assert!(fds.iter().all(|&fd| is_open(fd) && cloexec(fd)));
        in_noexec_child(|| check(1, fds.iter().all(|&fd| !is_open(fd))));
        drop((listener, udp, a, b, (r, w), many));
        assert_eq!(self_fds().as_slice(), before);
    });
}

#[test]
fn sets_close_on_exec_on_what_came_without() {
    isolated("sets_close_on_exec_on_what_came_without", 20, || {
        let bare = || {
            // SAFETY: the path is a C string.
            let fd = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY) };
            // SAFETY: the kernel just gave us this number.
            unsafe { OwnedFd::from_raw_fd(fd) }
        };
        assert!(cloexec(CareFd::open(|| Ok(bare())).expect("opened").as_raw_fd()));
        assert!(cloexec(CareFd::new(bare()).expect("adopted").as_raw_fd()));
        assert!(cloexec(CareFd::new(bare()).expect("adopted").into_inner().as_raw_fd()));
        assert!(std::panic::catch_unwind(|| CareFd::open_cloexec(|| Ok(bare()))).is_err());
        let own = CareFd::open_cloexec(|| File::open("/dev/null")).expect("opened");
        assert!(cloexec(own.as_raw_fd()));
        let region = no_forking();
        assert!(cloexec(region.care(bare()).expect("adopted").as_raw_fd()));
        assert!(cloexec(region.care_on(OnFork::Close, bare()).expect("adopted").as_raw_fd()));
    });
}

#[test]
fn an_opening_that_fails_leaves_nothing() {
    isolated("an_opening_that_fails_leaves_nothing", 20, || {
        let before = self_fds().as_slice().to_vec();
        let e = CareFd::open(|| File::open("/nonexistent")).expect_err("no such file");
        assert_eq!(e.kind(), io::ErrorKind::NotFound);
        let failing = || {
            let _half = null()?;
            Err::<(File, File), _>(io::Error::other("half way"))
        };
        assert_eq!(CareFd::open_pair(failing).expect_err("half way").to_string(), "half way");

        let panics = || -> io::Result<File> {
            let _half = null()?;
            std::panic::resume_unwind(Box::new(()))
        };
        assert!(catch_unwind(AssertUnwindSafe(|| CareFd::open(panics))).is_err());
        let lot =
            || Ok((0..3).map(|i| if i < 2 { null().expect("open") } else { std::panic::resume_unwind(Box::new(())) }));
        assert!(catch_unwind(AssertUnwindSafe(|| CareFd::open_all(lot))).is_err());

        assert_eq!(self_fds().as_slice(), before);
        assert_gate_open();
        let pid = kit::foreign(|| {
            // SAFETY: nothing is borrowed.
            check(1, unsafe { postfork_child_noexec() }.is_ok_and(|c| c.closed == 0 && c.kept == 0));
            0
        });
        assert_eq!(common::reap(pid, SOON), common::Verdict::Exited(0));
    });
}

/// A `File` whose number is not open.
fn dead_file() -> File {
    let fd = null().expect("open").into_raw_fd();
    close(fd);
    // SAFETY: it is not; that is the misuse under test.
    unsafe { File::from_raw_fd(fd) }
}

#[test]
fn what_is_not_open_is_given_back() {
    isolated("what_is_not_open_is_given_back", 20, || {
        let file = dead_file();
        let fd = file.as_raw_fd();
        let error: AdoptError<File> = CareFd::new(file).expect_err("not open");
        assert_eq!(error.error.raw_os_error(), Some(libc::EBADF));
        assert!(error.to_string().contains(&format!("descriptor {fd} ")), "{error}");
        assert!(format!("{error:?}").contains("EBADF") || format!("{error:?}").contains("code: 9"), "{error:?}");
        // std would abort on dropping it.
        assert_eq!(error.value.into_raw_fd(), fd);

        // In an opening there is nobody to give it back to; neither is it closed, nor does std abort.
        let e = CareFd::open(|| Ok(dead_file())).expect_err("not open");
        assert!(e.to_string().contains(&format!("descriptor {fd} ")), "{e}");
        let (alive, e) =
            (null().expect("open"), CareFd::open_pair(|| Ok((null()?, dead_file()))).expect_err("not open"));
        assert!(e.to_string().contains("is not open"), "{e}");
        assert_eq!(alive.as_raw_fd(), fd, "nothing was left open before it");
    });
}

#[test]
fn into_inner_hands_over() {
    isolated("into_inner_hands_over", 20, || {
        let file = care().into_inner();
        let other = care().try_into_inner().expect("live");
        let (a, b) = (file.as_raw_fd(), other.as_raw_fd());
        assert!(is_open(a) && cloexec(a) && is_open(b));
        in_noexec_child(|| check(1, is_open(a) && is_open(b)));
        let again = CareFd::new(file).expect("adopted again");
        in_noexec_child(|| check(1, again.get().is_none() && !is_open(a) && is_open(b)));
    });
}

#[test]
fn shows_itself() {
    isolated("shows_itself", 20, || {
        let file = care();
        assert!(format!("{file:?}").contains("/dev/null"));
        in_noexec_child(|| check(1, format!("{file:?}").contains("closed in this child")));
    });
}

// -- F2, F4: numbers that are used again

#[test]
fn a_closed_number_is_a_strangers_and_children_know() {
    isolated("a_closed_number_is_a_strangers_and_children_know", 20, || {
        let fd = care().as_raw_fd();
        let stranger = null().expect("open");
        assert_eq!(stranger.as_raw_fd(), fd, "the number is in use again");
        in_noexec_child(|| check(1, is_open(fd)));
    });
}

#[test]
fn a_dead_one_is_never_somebody_elses() {
    isolated("a_dead_one_is_never_somebody_elses", 20, || {
        let (file, close) = (care(), CareFd::open_on(OnFork::Close, null).expect("open"));
        let (a, b) = (file.as_raw_fd(), close.as_raw_fd());
        in_noexec_child(|| {
            check(1, !file.is_open_here() && file.get().is_none() && close.get().is_none());
            let text = panic_text(|| drop(file.metadata()));
            check(
                2,
                text.contains(&format!("care-fd {a} was closed in this child")) && text.contains("ForkOptions::keep"),
            );
            check(3, panic_text(|| _ = close.as_fd()).contains("OnFork::Close"));
            check(4, panic_text(|| _ = close.as_raw_fd()).contains(&format!("care-fd {b} ")));

            // Their numbers are used again, by a stranger and by a care-fd.
            let stranger = null().expect("open");
            check(5, stranger.as_raw_fd() == a && file.get().is_none());
            let newer = care();
            check(6, newer.as_raw_fd() == b && newer.is_open_here() && close.get().is_none());
            check(7, panic_text(|| drop(close.metadata())).contains("another care-fd's"));
            drop((file, close));
            check(8, is_open(a) && is_open(b) && newer.is_open_here());

            // A second fork further down.
            in_noexec_child(|| check(9, newer.get().is_none() && !is_open(b) && is_open(a)));
        });
    });
}

#[test]
fn a_dead_one_hands_nothing_over() {
    isolated("a_dead_one_hands_nothing_over", 20, || {
        let (one, other) = (care(), care());
        let fd = one.as_raw_fd();
        in_noexec_child(|| {
            let stranger = null().expect("open");
            check(1, stranger.as_raw_fd() == fd);
            check(2, one.try_into_inner().is_none() && is_open(fd));
            check(3, panic_text(|| drop(other.into_inner())).contains("was closed in this child"));
        });
    });
}

#[test]
fn kept_ones_live_on_for_one_generation() {
    isolated("kept_ones_live_on_for_one_generation", 20, || {
        let files: Vec<_> = (0..6).map(|_| care()).collect();
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let (one, four) = (borrowed(fds[1]), borrowed(fds[4]));
        let options = ForkOptions::new().keep(&one).keep(&four).keep(&one);
        let mut files = Some(files);
        let mut child = forked(&options, |token| {
            let files = files.take().expect("the child's copy");
            // SAFETY: no borrowed descriptor is used afterwards.
            let done = unsafe { token.cleanup() };
            check(1, (done.closed, done.kept) == (4, 2));
            check(
                2,
                (0..6).all(|i| files[i].is_open_here() == (i == 1 || i == 4) && is_open(fds[i]) == (i == 1 || i == 4)),
            );
            check(3, files[4].metadata().is_ok());
            let mut grandchild = forked(&ForkOptions::new().keep(&files[4]), |token| {
                drop(token);
                check(4, files[1].get().is_none() && !is_open(fds[1]));
                check(5, files[4].is_open_here() && is_open(fds[4]));
                0
            });
            check(6, code(&mut grandchild) == 0 && files[1].is_open_here());
            // Dropping a kept one closes it; a number that is free here the pidfd has taken, and keeps.
            drop(files);
            check(7, !is_open(fds[1]) && !is_open(fds[4]));
            drop(grandchild);
            check(8, fds.iter().all(|&fd| !is_open(fd)));
            0
        });
        assert_eq!(code(&mut child), 0);
        assert!(fds.iter().all(|&fd| is_open(fd)), "nothing happened to the parent's");
    });
}

// -- F3: when

#[test]
fn close_means_at_the_fork() {
    isolated("close_means_at_the_fork", 20, || {
        let (cleanup, close) = (care(), CareFd::new_on(OnFork::Close, null().expect("open")).expect("adopted"));
        let (a, b) = (cleanup.as_raw_fd(), close.as_raw_fd());
        // Without any clean-up, as in a child that will exec.
        let pid = kit::foreign(|| {
            check(1, is_open(a) && cleanup.is_open_here());
            check(2, !is_open(b) && !close.is_open_here());
            0
        });
        assert_eq!(common::reap(pid, SOON), common::Verdict::Exited(0));
        let mut child = forked(&ForkOptions::new().keep(&close), |token| {
            check(1, !is_open(b) && is_open(a));
            token.exit(0)
        });
        assert_eq!(code(&mut child), 0);
    });
}

// -- F5: many, far, refused

/// Neighbours, holes, strangers between them, far numbers, one kept: closes exactly what it must.
fn exactly(far: &[RawFd]) {
    let mut cares: Vec<CareFd<File>> = (0..40).map(|_| care()).collect();
    let strangers: Vec<File> = (0..5).map(|_| null().expect("open")).collect();
    cares.extend((0..40).map(|_| care()));
    // Holes.
    drop(cares.drain(10..14));
    drop(cares.drain(50..53));
    cares.extend(far.iter().map(|&n| CareFd::open(|| at(n)).expect("a far number")));
    assert!(far.iter().all(|f| cares.iter().any(|c| c.as_raw_fd() == *f)));
    let kept = [3, 4, 60, cares.len() - 1];
    let options = kept.iter().fold(ForkOptions::new(), |o, &i| o.keep(&cares[i]));
    let mut expected = vec![0, 1, 2];
    expected.extend(strangers.iter().map(AsRawFd::as_raw_fd));
    expected.extend(kept.map(|i| cares[i].as_raw_fd()));
    expected.sort_unstable();
    let mut child = forked(&options, |token| {
        // SAFETY: no borrowed descriptor is used afterwards.
        let done = unsafe { token.cleanup() };
        check(1, (done.closed, done.kept) == (cares.len() - 4, 4));
        check(2, self_fds().as_slice() == expected);
        0
    });
    assert_eq!(code(&mut child), 0);
}

#[test]
fn a_clean_up_closes_exactly_the_care_fds() {
    isolated("a_clean_up_closes_exactly_the_care_fds", 20, || exactly(&[]));
}

/// What a child opens before its clean-up is its own: the clean-up leaves it alone, its children's does not.
#[test]
fn a_child_keeps_what_it_opened_itself() {
    isolated("a_child_keeps_what_it_opened_itself", 30, || {
        let inherited = CareFd::open(|| File::open("/dev/null")).expect("opened");
        let number = inherited.as_raw_fd();
        let child = |clean_up: &dyn Fn() -> carefork::Cleanup| {
            let own = CareFd::open(|| File::open("/dev/null")).expect("opened");
            check(2, clean_up().closed == 1);
            check(3, !is_open(number) && own.is_open_here() && is_open(own.as_raw_fd()));
            // SAFETY: nothing that is closed is used.
            let mut grandchild = unsafe { carefork::spawn(|| i32::from(own.is_open_here())) }.expect("a child");
            check(4, grandchild.wait().expect("a status").success());
            drop(own);
            0
        };
        // SAFETY: as above.
        match unsafe { carefork::fork() }.expect("a fork") {
            // A child that has forked without cleaning up hands nothing on that its own child would keep.
            carefork::Fork::Child(token) => {
                let before = CareFd::open(|| File::open("/dev/null")).expect("opened");
                // SAFETY: as above.
                let mut grandchild = unsafe { carefork::spawn(|| i32::from(before.is_open_here())) }.expect("a child");
                check(5, grandchild.wait().expect("a status").success());
                drop(before);
                let token = std::cell::Cell::new(Some(token));
                // SAFETY: as above.
                raw::exit_now(child(&|| unsafe { token.take().expect("once").cleanup() }))
            }
            carefork::Fork::Parent(mut c) => assert!(c.wait().expect("a status").success()),
        }
        let pid = foreign(|| {
            // SAFETY: as above.
            child(&|| unsafe { carefork::postfork_child_noexec() }.expect("a child"))
        });
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        assert!(inherited.is_open_here());
    });
}

/// A child may have threads by the time it cleans up, that open and drop what is theirs.
#[test]
fn a_clean_up_leaves_alone_what_other_threads_open_meanwhile() {
    static STOP: AtomicBool = AtomicBool::new(false);
    static BEGUN: AtomicBool = AtomicBool::new(false);
    isolated("a_clean_up_leaves_alone_what_other_threads_open_meanwhile", 60, || {
        let inherited: Vec<CareFd<File>> = (0..400).map(|_| care()).collect();
        for _ in 0..100 {
            let pid = foreign(|| {
                let opens = thread::spawn(|| {
                    while !STOP.load(SeqCst) {
                        let own = care();
                        BEGUN.store(true, SeqCst);
                        check(1, own.is_open_here() && is_open(own.as_raw_fd()));
                    }
                });
                while !BEGUN.load(SeqCst) {
                    thread::yield_now();
                }
                // SAFETY: nothing that is closed is used.
                check(2, unsafe { postfork_child_noexec() }.is_ok_and(|done| done.closed == inherited.len()));
                STOP.store(true, SeqCst);
                check(3, opens.join().is_ok());
                0
            });
            assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        }
    });
}

#[test]
fn switched_off_a_childs_own_are_closed_in_its_children() {
    let env = vec![("CAREFORK".to_owned(), "off".to_owned())];
    isolated_with(
        "switched_off_a_childs_own_are_closed_in_its_children",
        30,
        Setup { env, ..Setup::default() },
        || {
            let pid = foreign(|| {
                let at_fork = CareFd::open_on(OnFork::Close, null).expect("opened");
                let at_clean_up = care();
                let pid = foreign(|| {
                    check(1, !at_fork.is_open_here() && at_clean_up.is_open_here());
                    // SAFETY: nothing that is closed is used.
                    check(2, unsafe { postfork_child_noexec() }.is_ok_and(|done| done.closed == 1));
                    check(3, !at_clean_up.is_open_here());
                    0
                });
                check(4, reap(pid, SOON) == Verdict::Exited(0));
                // SAFETY: as above.
                check(5, unsafe { postfork_child_noexec() }.is_ok_and(|done| done.closed == 0));
                check(6, at_fork.is_open_here() && at_clean_up.is_open_here());
                0
            });
            assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        },
    );
}

/// As many descriptors as this machine grants, within reason.
fn limit() -> RawFd {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    hard.min(1 << 18) as RawFd
}

fn high() -> Setup {
    Setup { rlimits: vec![(libc::RLIMIT_NOFILE, limit() as u64)], ..Setup::default() }
}

/// Those of `numbers` that can be had.
fn within_limit(numbers: &[RawFd]) -> Vec<RawFd> {
    numbers.iter().copied().filter(|&n| n < limit()).collect()
}

#[test]
fn far_numbers_are_closed_like_near_ones() {
    let far = within_limit(&[1023, 1024, 16_383, 16_384, 17_000, 19_999, 40_000, 100_000, (1 << 18) - 1]);
    isolated_with("far_numbers_are_closed_like_near_ones", 20, high(), || exactly(&far));
}

#[test]
fn without_close_range() {
    let setup = Setup { refuse: vec![(libc::SYS_close_range, libc::ENOSYS).into()], ..high() };
    isolated_with("without_close_range", 20, setup, || exactly(&within_limit(&[5000, 17_000])));
}

#[test]
fn with_close_range_forbidden() {
    let setup = Setup { refuse: vec![(libc::SYS_close_range, libc::EPERM).into()], ..high() };
    isolated_with("with_close_range_forbidden", 20, setup, || exactly(&within_limit(&[5000, 17_000])));
}

#[test]
fn ten_thousand() {
    isolated_with("ten_thousand", 60, high(), || {
        assert!(limit() > 10_010, "this machine lets nobody open 10 000 files");
        let cares: Vec<CareFd<File>> = (0..10_000).map(|_| care()).collect();
        let kept = borrowed(cares[7000].as_raw_fd());
        let mut child = forked(&ForkOptions::new().keep(&kept), |token| {
            // SAFETY: no borrowed descriptor is used afterwards.
            check(1, unsafe { token.cleanup() }.closed == 9999);
            check(2, self_fds().as_slice() == [0, 1, 2, 7003] && cares[7000].as_raw_fd() == 7003);
            check(3, cares.iter().filter(|c| c.is_open_here()).count() == 1);
            drop(cares);
            check(4, self_fds().as_slice() == [0, 1, 2]);
            0
        });
        assert_eq!(code(&mut child), 0);
    });
}

#[test]
fn neighbours_are_closed_by_one_call() {
    let body = || {
        let cares: Vec<CareFd<File>> = (0..100).map(|_| care()).collect();
        let stranger = null().expect("open");
        let more: Vec<CareFd<File>> = (0..100).map(|_| care()).collect();
        let mut child = forked(&ForkOptions::new().keep(&cares[50]), |token| {
            strace_mark("cleanup");
            drop(token);
            strace_mark("done");
            0
        });
        assert_eq!(code(&mut child), 0);
        drop((cares, stranger, more));
    };
    let Some(calls) = count_syscalls("neighbours_are_closed_by_one_call", 60, Setup::default(), body) else { return };
    let names: Vec<&str> = between(&calls, "cleanup", "done").iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names.iter().filter(|n| **n == "close_range").count(), 3, "{names:?}");
    assert!(!names.contains(&"close"), "{names:?}");
}

fn closes_all_others() {
    let strangers: Vec<File> = (0..20).map(|_| null().expect("open")).collect();
    let far = at(3000).expect("a far number");
    let cares: Vec<CareFd<File>> = (0..20).map(|_| care()).collect();
    let kept = [strangers[5].as_raw_fd(), cares[0].as_raw_fd(), cares[7].as_raw_fd()];
    let options = ForkOptions::new().close_others(true).keep(&strangers[5]).keep(&cares[7]).keep(&cares[0]);
    let mut child = forked(&options, |token| {
        check(1, self_fds().as_slice() == [0, 1, 2, kept[0], kept[1], kept[2]]);
        check(2, cares.iter().filter(|c| c.is_open_here()).count() == 2 && cares[7].is_open_here());
        token.exit(0)
    });
    assert_eq!(code(&mut child), 0);
    drop((strangers, far, cares));
}

#[test]
fn close_others_knows_care_fds() {
    isolated_with("close_others_knows_care_fds", 20, high(), closes_all_others);
}

/// Where the limit is a billion, trying each number would take minutes.
#[test]
fn close_others_without_close_range_looks_where_they_are() {
    let setup = Setup { refuse: vec![Refuse::call(libc::SYS_close_range, libc::ENOSYS)], ..high() };
    let name = "close_others_without_close_range_looks_where_they_are";
    let Some(calls) = count_syscalls(name, 60, setup, closes_all_others) else { return };
    let closes = calls.iter().filter(|c| c.name == "close").count();
    assert!((50..500).contains(&closes), "{closes} calls of close");
}

// -- G6: with threads that open and close all the time

#[test]
fn no_child_ever_inherits_one() {
    isolated("no_child_ever_inherits_one", 60, || {
        static STOP: AtomicBool = AtomicBool::new(false);
        let busy = |i: usize| {
            move || {
                while !STOP.load(SeqCst) {
                    match i % 3 {
                        0 => drop(care()),
                        1 => drop(CareFd::open_pair(UnixStream::pair)),
                        _ => drop(CareFd::new(care().into_inner())),
                    }
                    if i == 3 {
                        thread::sleep(Duration::from_micros(50));
                    }
                }
            }
        };
        let threads: Vec<_> = (0..2).chain(3..4).map(|i| thread::spawn(busy(i))).collect();
        // Time stands still: where this thread is kept from the processor in the middle of a fork, no waiter reopens the gate, which
        // would make the child a dirty one that may have one too many (G6, G11).
        carefork::testing::advance(Duration::ZERO);
        for _ in 0..300 {
            in_noexec_child(|| check(1, self_fds().as_slice() == [0, 1, 2]));
        }
        assert_eq!((carefork::stats().late, carefork::stats().dirty), (0, 0));
        STOP.store(true, SeqCst);
        threads.into_iter().for_each(|t| t.join().expect("no panic"));
        assert_eq!(self_fds().as_slice(), [0, 1, 2]);
    });
}

/// The kernel copies descriptors first and memory after: in between, a stranger's number can become a care-fd's. A large
/// process makes that long.
#[test]
fn the_child_of_a_dirty_fork_closes_no_strangers() {
    isolated("the_child_of_a_dirty_fork_closes_no_strangers", 60, || {
        static STOP: AtomicBool = AtomicBool::new(false);
        let ballast = vec![1u8; 128 << 20];
        carefork::set_foreign_budget(Some(Duration::from_millis(1)));
        let (ready, entered) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let region = no_forking();
            ready.send(()).expect("the test waits");
            while !STOP.load(SeqCst) {
                let stranger = File::open("/dev/zero").expect("open");
                drop(stranger);
                drop(region.care(null().expect("open")).expect("adopted"));
            }
        });
        entered.recv().expect("the thread runs");
        let zero = std::fs::metadata("/dev/zero")
            .map(|m| {
                use std::os::unix::fs::MetadataExt as _;
                m.rdev()
            })
            .expect("/dev/zero");
        let is_zero = |fd: RawFd| {
            // SAFETY: stat is plain data.
            let mut st: libc::stat = unsafe { std::mem::zeroed() };
            // SAFETY: `st` is live.
            unsafe { libc::fstat(fd, &raw mut st) == 0 && st.st_rdev == zero }
        };
        let mut strangers = 0;
        for _ in 0..150 {
            let pid = kit::foreign(|| {
                check(1, carefork::lineage().dirty);
                let held = is_zero(3);
                // SAFETY: nothing is borrowed.
                check(2, unsafe { postfork_child_noexec() }.is_ok());
                check(3, !held || is_zero(3));
                if held { 10 } else { 0 }
            });
            match common::reap(pid, SOON) {
                common::Verdict::Exited(10) => strangers += 1,
                other => assert_eq!(other, common::Verdict::Exited(0)),
            }
        }
        STOP.store(true, SeqCst);
        thread.join().expect("no panic");
        println!("{strangers} children had a stranger's");
        drop(ballast);
    });
}

// -- F6: behind the library's back

#[cfg(debug_assertions)]
mod behind {
    use super::*;
    use kit::captured;

    #[test]
    fn a_number_closed_behind_is_reported_and_not_closed_twice() {
        isolated("behind::a_number_closed_behind_is_reported_and_not_closed_twice", 20, || {
            let file = care();
            let fd = file.as_raw_fd();
            close(fd);
            // Before std's own abort.
            let said = captured(2, || drop(file));
            assert!(said.starts_with("carefork: ") && said.contains(&format!("care-fd {fd} ")), "{said}");
            assert_eq!(said.lines().count(), 1, "{said}");
            assert!(captured(2, || drop(care())).is_empty());
        });
    }

    #[test]
    fn a_number_taken_by_a_stranger_is_left_to_him() {
        isolated("behind::a_number_taken_by_a_stranger_is_left_to_him", 20, || {
            let file = care();
            let fd = file.as_raw_fd();
            close(fd);
            let stranger = File::open("/dev/zero").expect("open");
            assert_eq!(stranger.as_raw_fd(), fd);
            let said = captured(2, || drop(file));
            assert!(said.contains(&format!("care-fd {fd} was replaced")), "{said}");
            assert!(is_open(fd));
        });
    }

    #[test]
    fn a_number_taken_by_a_care_fd_is_left_to_it() {
        isolated("behind::a_number_taken_by_a_care_fd_is_left_to_it", 20, || {
            let file = care();
            let fd = file.as_raw_fd();
            let mut newer = None;
            let said = captured(2, || {
                close(fd);
                newer = Some(care());
            });
            assert!(said.contains(&format!("care-fd {fd} was closed")), "{said}");
            let newer = newer.expect("opened");
            assert_eq!(newer.as_raw_fd(), fd);
            assert!(file.get().is_none());
            drop(file);
            assert!(is_open(fd) && newer.is_open_here());
        });
    }

    #[test]
    fn what_changes_about_a_file_is_no_replacement() {
        isolated("behind::what_changes_about_a_file_is_no_replacement", 20, || {
            let said = captured(2, || {
                let path = std::env::temp_dir().join(format!("carefork-{}", std::process::id()));
                let file = CareFd::open(|| File::create(&path)).expect("a file");
                file.set_len(4096).expect("longer");
                std::fs::remove_file(&path).expect("unlinked");
                let socket = CareFd::open(|| UdpSocket::bind("127.0.0.1:0")).expect("a socket");
                socket.connect("127.0.0.1:9").expect("connected");
                let (read, write) = CareFd::open_pair(io::pipe).expect("a pipe");
                drop(write);
                drop((file, socket, read));
            });
            assert_eq!(said, "");
        });
    }
}
