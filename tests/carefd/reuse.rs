//! When they are closed in a child, and numbers that are used again (F2 to F4).

use crate::common::{Verdict, check, isolated, reap};
use crate::kit::{SOON, code, foreign, forked};
use crate::{borrowed, care, in_noexec_child, is_open, null, panic_place, panic_text};
use carefork::{CareFd, ForkOptions, OnFork};
use std::os::fd::{AsFd, AsRawFd, RawFd};

#[test]
fn a_closed_number_is_a_strangers_and_children_know() {
    isolated("reuse::a_closed_number_is_a_strangers_and_children_know", 20, || {
        let fd = care().as_raw_fd();
        let stranger = null().expect("open");
        assert_eq!(stranger.as_raw_fd(), fd, "the number is in use again");
        in_noexec_child(|| check(1, is_open(fd)));
    });
}

#[test]
fn a_dead_one_is_never_somebody_elses() {
    isolated("reuse::a_dead_one_is_never_somebody_elses", 20, || {
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

/// Where it was used, not where carefork found out.
#[test]
fn a_dead_one_names_the_place() {
    isolated("reuse::a_dead_one_names_the_place", 20, || {
        let (file, other) = (care(), care());
        in_noexec_child(|| {
            check(1, panic_place(|| drop(file.metadata())) == file!());
            check(2, panic_place(|| _ = file.as_fd()) == file!());
            check(3, panic_place(|| _ = file.as_raw_fd()) == file!());
            check(4, panic_place(|| drop(other.into_inner())) == file!());
        });
    });
}

#[test]
fn a_dead_one_hands_nothing_over() {
    isolated("reuse::a_dead_one_hands_nothing_over", 20, || {
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
    isolated("reuse::kept_ones_live_on_for_one_generation", 20, || {
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

#[test]
fn close_means_at_the_fork() {
    isolated("reuse::close_means_at_the_fork", 20, || {
        let (cleanup, close) = (care(), CareFd::new_on(OnFork::Close, null().expect("open")).expect("adopted"));
        let (a, b) = (cleanup.as_raw_fd(), close.as_raw_fd());
        // Without any clean-up, as in a child that will exec.
        let pid = foreign(|| {
            check(1, is_open(a) && cleanup.is_open_here());
            check(2, !is_open(b) && !close.is_open_here());
            0
        });
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
        let mut child = forked(&ForkOptions::new().keep(&close), |token| {
            check(1, !is_open(b) && is_open(a));
            token.exit(0)
        });
        assert_eq!(code(&mut child), 0);
    });
}
