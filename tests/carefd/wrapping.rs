//! What a care-fd wraps, and that it does no more (F1).

use crate::common::{Verdict, check, isolated, reap, self_fds};
use crate::kit::{SOON, assert_gate_open, foreign};
use crate::{care, cloexec, close, in_noexec_child, is_open, null};
use carefork::{AdoptError, CareFd, OnFork, no_forking, postfork_child_noexec};
use std::fs::File;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};

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
    isolated("wrapping::wraps_whatever_owns_a_descriptor", 20, || {
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
    isolated("wrapping::sets_close_on_exec_on_what_came_without", 20, || {
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
    isolated("wrapping::an_opening_that_fails_leaves_nothing", 20, || {
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
        let pid = foreign(|| {
            // SAFETY: nothing is borrowed.
            check(1, unsafe { postfork_child_noexec() }.is_ok_and(|c| c.closed == 0 && c.kept == 0));
            0
        });
        assert_eq!(reap(pid, SOON), Verdict::Exited(0));
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
    isolated("wrapping::what_is_not_open_is_given_back", 20, || {
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
    isolated("wrapping::into_inner_hands_over", 20, || {
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
    isolated("wrapping::shows_itself", 20, || {
        let file = care();
        assert!(format!("{file:?}").contains("/dev/null"));
        in_noexec_child(|| check(1, format!("{file:?}").contains("closed in this child")));
    });
}
