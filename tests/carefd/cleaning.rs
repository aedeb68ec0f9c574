//! A clean-up closes what it must and nothing else: many, far, refused (F5).

use crate::common::{
    Refuse, Setup, Verdict, between, check, count_syscalls, isolated, isolated_with, raw, reap, self_fds, strace_mark,
};
use crate::kit::{SOON, code, foreign, forked};
use crate::{at, borrowed, care, is_open, null};
use carefork::{CareFd, ForkOptions, OnFork, postfork_child_noexec};
use nix::sys::resource::{Resource, getrlimit};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

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
    isolated("cleaning::a_clean_up_closes_exactly_the_care_fds", 20, || exactly(&[]));
}

/// What a child opens before its clean-up is its own: the clean-up leaves it alone, its children's does not.
#[test]
fn a_child_keeps_what_it_opened_itself() {
    isolated("cleaning::a_child_keeps_what_it_opened_itself", 30, || {
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
    isolated("cleaning::a_clean_up_leaves_alone_what_other_threads_open_meanwhile", 60, || {
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
        "cleaning::switched_off_a_childs_own_are_closed_in_its_children",
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
    isolated_with("cleaning::far_numbers_are_closed_like_near_ones", 20, high(), || exactly(&far));
}

#[test]
fn without_close_range() {
    let setup = Setup { refuse: vec![(libc::SYS_close_range, libc::ENOSYS).into()], ..high() };
    isolated_with("cleaning::without_close_range", 20, setup, || exactly(&within_limit(&[5000, 17_000])));
}

#[test]
fn with_close_range_forbidden() {
    let setup = Setup { refuse: vec![(libc::SYS_close_range, libc::EPERM).into()], ..high() };
    isolated_with("cleaning::with_close_range_forbidden", 20, setup, || exactly(&within_limit(&[5000, 17_000])));
}

#[test]
fn ten_thousand() {
    isolated_with("cleaning::ten_thousand", 60, high(), || {
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
    let Some(calls) = count_syscalls("cleaning::neighbours_are_closed_by_one_call", 60, Setup::default(), body) else {
        return;
    };
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
    isolated_with("cleaning::close_others_knows_care_fds", 20, high(), closes_all_others);
}

/// Where the limit is a billion, trying each number would take minutes.
#[test]
fn close_others_without_close_range_looks_where_they_are() {
    let setup = Setup { refuse: vec![Refuse::call(libc::SYS_close_range, libc::ENOSYS)], ..high() };
    let name = "cleaning::close_others_without_close_range_looks_where_they_are";
    let Some(calls) = count_syscalls(name, 60, setup, closes_all_others) else { return };
    let closes = calls.iter().filter(|c| c.name == "close").count();
    assert!((50..500).contains(&closes), "{closes} calls of close");
}
