//! F7: what an audit says of descriptors and signals, and that children really get just that.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod audits;
mod common;
mod kit;

use audits::{Scratch, find, in_child, own, set_cloexec};
use carefork::audit::{Care, Descriptor, Fate, Kind};
use carefork::{Audit, CareFd, OnFork, audit, audit_of};
use common::{Setup, can_change_user, check, fds_of, isolated, isolated_with, self_fds, status_here, status_of};
use kit::{Stop, bits, block, catch, ignore};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

/// What is open here, in an order of no meaning.
fn open_here() -> Vec<(RawFd, PathBuf)> {
    fds_of(common::raw::getpid()).expect("/proc").into_iter().filter(|(_, to)| !to.starts_with("/proc")).collect()
}

/// A few of everything that makes a difference: care-fds of both kinds, locks, close-on-exec on and off.
struct Mixed {
    cleanup: CareFd<File>,
    close: CareFd<TcpListener>,
    bare_care: CareFd<File>,
    handed_over: File,
    plain: File,
    bare: File,
    flocked: File,
    ofd_locked: File,
    posix_locked: File,
    socket: UnixStream,
    bare_socket: UnixStream,
    _dir: Scratch,
}

impl Mixed {
    fn new() -> Mixed {
        let dir = Scratch::new("mixed");
        let null = || File::open("/dev/null");
        let file = |name| File::create(dir.path(name)).expect("created");
        let bare_care = CareFd::open(null).expect("open");
        set_cloexec(&bare_care, false);
        let bare = null().expect("open");
        set_cloexec(&bare, false);
        let (flocked, ofd_locked, posix_locked) = (file("flock"), file("ofd"), file("posix"));
        flocked.lock().expect("locked");
        // SAFETY: flock is plain data.
        let mut whole: libc::flock = unsafe { std::mem::zeroed() };
        whole.l_type = libc::F_WRLCK as libc::c_short;
        for (file, command) in [(&ofd_locked, libc::F_OFD_SETLK), (&posix_locked, libc::F_SETLK)] {
            // SAFETY: `whole` is live.
            assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut whole) }, 0);
        }
        let (socket, bare_socket) = UnixStream::pair().expect("a pair");
        set_cloexec(&bare_socket, false);
        // A care-fd's number, used again by somebody else's.
        drop(CareFd::open(null).expect("open"));
        Mixed {
            plain: null().expect("open"),
            cleanup: CareFd::open(null).expect("open"),
            close: CareFd::open_on(OnFork::Close, || TcpListener::bind("127.0.0.1:0")).expect("open"),
            handed_over: CareFd::open(null).expect("open").into_inner(),
            bare_care,
            bare,
            flocked,
            ofd_locked,
            posix_locked,
            socket,
            bare_socket,
            _dir: dir,
        }
    }
}

#[test]
fn care_fds_locks_and_close_on_exec_decide() {
    isolated("care_fds_locks_and_close_on_exec_decide", 20, || {
        use Fate::{Closed, Kept, Leaked};
        let m = Mixed::new();
        let found = audit().expect("an audit");
        let row = |fd: &dyn AsRawFd| {
            let number = fd.as_raw_fd();
            let d = found.descriptors.iter().find(|d| d.number == number).expect("it is open");
            (d.care, d.locked, d.noexec, d.exec)
        };
        let (cleanup, close) = (Care::On(OnFork::Cleanup), Care::On(OnFork::Close));
        assert_eq!(row(&m.cleanup), (cleanup, false, Some(Closed), Closed));
        assert_eq!(row(&m.close), (close, false, Some(Closed), Closed));
        assert_eq!(row(&m.bare_care), (cleanup, false, Some(Closed), Leaked));
        assert_eq!(row(&m.handed_over), (Care::No, false, Some(Kept), Closed));
        assert_eq!(row(&m.plain), (Care::No, false, Some(Kept), Closed));
        assert_eq!(row(&m.bare), (Care::No, false, Some(Kept), Leaked));
        assert_eq!(row(&m.flocked), (Care::No, true, Some(Leaked), Closed));
        assert_eq!(row(&m.ofd_locked), (Care::No, true, Some(Leaked), Closed));
        assert_eq!(row(&m.posix_locked), (Care::No, false, Some(Kept), Closed));
        assert_eq!(row(&m.socket), (Care::No, false, Some(Leaked), Closed));
        assert_eq!(row(&m.bare_socket), (Care::No, false, Some(Leaked), Leaked));
        assert_eq!((found.leaked().count(), found.leaked_noexec().count()), (3, 4));
    });
}

// -- what children really get

/// The numbers and targets that are left where `closed` does not say otherwise.
fn foretold(all: &[(RawFd, PathBuf)], found: &Audit, closed: impl Fn(&Descriptor) -> bool) -> Vec<(RawFd, PathBuf)> {
    let is_left = |fd: &RawFd| found.descriptors.iter().any(|d| d.number == *fd && !closed(d));
    all.iter().filter(|(fd, _)| is_left(fd)).cloned().collect()
}

#[test]
fn a_noexec_child_keeps_what_was_foretold() {
    isolated("a_noexec_child_keeps_what_was_foretold", 20, || {
        let mixed = Mixed::new();
        let found = audit().expect("an audit");
        let expected = foretold(&open_here(), &found, |d| d.noexec == Some(Fate::Closed));
        assert_eq!(expected.len() + 3, found.descriptors.len());
        in_child(|| assert_eq!(open_here(), expected));
        // A child of foreign code, which cleans up by itself.
        let pid = kit::foreign(|| {
            // SAFETY: no descriptor of a care-fd is used.
            check(1, unsafe { carefork::postfork_child_noexec() }.is_ok());
            check(2, open_here() == expected);
            // It finds nothing more to close there, and its own audit agrees.
            let here = audit().expect("an audit in the child");
            check(3, here.descriptors.iter().all(|d| d.care == Care::No));
            check(4, here.descriptors.len() == expected.len());
            0
        });
        assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Exited(0));
        drop(mixed);
    });
}

extern "C" fn nothing(_: i32) {}

#[test]
fn an_exec_child_gets_what_was_foretold() {
    isolated("an_exec_child_gets_what_was_foretold", 20, || {
        let mixed = Mixed::new();
        catch(libc::SIGUSR1, nothing);
        ignore(libc::SIGUSR2);
        ignore(libc::SIGTSTP);
        block(&[libc::SIGTERM, libc::SIGRTMIN() + 3]);
        let (mut to, stdin, mut from, stdout) = pipes();
        let found = audit().expect("an audit");
        assert_eq!(found.caught.iter().filter(|s| **s == libc::SIGUSR1).count(), 1);
        assert_eq!(found.blocked, [libc::SIGTERM, libc::SIGRTMIN() + 3]);
        let here = status_here().expect("/proc");
        let of = |list: &[i32]| bits(list);
        assert_eq!(
            (of(&found.caught), of(&found.ignored), of(&found.blocked)),
            (here.sig_cgt, here.sig_ign, here.sig_blk)
        );
        assert_eq!(found.threads, here.threads as usize);

        let all = open_here();
        let expected = foretold(&all[3..], &found, |d| d.exec == Fate::Closed);
        assert_eq!(expected.len(), found.leaked().count());
        let argv = [c"cat".as_ptr(), std::ptr::null()];
        let pid = kit::foreign(|| {
            kit::redirect(stdin.as_raw_fd(), 0);
            kit::redirect(stdout.as_raw_fd(), 1);
            // SAFETY: a NULL-terminated list of C strings.
            unsafe { libc::execv(c"/bin/cat".as_ptr(), argv.as_ptr()) };
            99
        });
        // Once it answers, it has begun, and has opened and closed all it wanted to.
        to.write_all(b"x").expect("cat reads");
        from.read_exact(&mut [0]).expect("cat answers");
        let there = fds_of(pid).expect("/proc");
        assert_eq!(there[..3].iter().map(|(fd, _)| *fd).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(there[3..], expected);
        let signals = status_of(pid).expect("/proc");
        let kept = (signals.sig_cgt, signals.sig_ign, signals.sig_blk);
        assert_eq!(kept, (0, of(&found.ignored), of(&found.blocked)));
        // And that is what an audit of it says in turn.
        let of_cat = audit_of(pid.cast_unsigned()).expect("an audit of cat");
        assert_eq!((of_cat.name.as_str(), of_cat.threads, of_cat.pid), ("cat", 1, pid.cast_unsigned()));
        assert_eq!(
            of_cat.leaked().map(|d| d.number).collect::<Vec<_>>(),
            expected.iter().map(|e| e.0).collect::<Vec<_>>()
        );
        assert!(of_cat.caught.is_empty() && of_cat.ignored == found.ignored && of_cat.blocked == found.blocked);
        drop(to);
        assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Exited(0));
        // Reaped: it is not there any more.
        let error = audit_of(pid.cast_unsigned()).expect_err("it has ended");
        assert_eq!((error.kind(), error.to_string()), (io::ErrorKind::NotFound, format!("there is no process {pid}")));
        drop(mixed);
    });
}

/// Two pipes: to a child's standard input, and from its output.
fn pipes() -> (io::PipeWriter, io::PipeReader, io::PipeReader, io::PipeWriter) {
    let (stdin, to) = io::pipe().expect("a pipe");
    let (from, stdout) = io::pipe().expect("a pipe");
    (to, stdin, from, stdout)
}

#[test]
fn a_zombie_is_no_process_any_more() {
    for setup in users() {
        isolated_with("a_zombie_is_no_process_any_more", 20, setup, || {
            let pid = kit::foreign(|| 0);
            let pidfd = common::raw::pidfd_open(pid).expect("a pidfd");
            common::raw::poll_readable(&mut [common::raw::pollfd(pidfd.as_raw_fd())], kit::SOON);
            let error = audit_of(pid.cast_unsigned()).expect_err("it has ended");
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
            assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Exited(0));
        });
    }
}

/// Whoever runs the tests, and somebody who is not root: to them what has ended looks different.
fn users() -> Vec<Setup> {
    let uid = can_change_user().then(|| Setup { uid: Some(54_321), ..Setup::default() });
    [Setup::default()].into_iter().chain(uid).collect()
}

/// Its other threads go on, with its descriptors.
#[test]
fn a_process_whose_first_thread_has_ended_is_one_still() {
    for setup in users() {
        isolated_with("a_process_whose_first_thread_has_ended_is_one_still", 60, setup, || {
            let (_end, to) = io::pipe().expect("a pipe");
            fs::write("/proc/thread-self/comm", "the process").expect("a name");
            let pid = kit::foreign(|| {
                let lives = thread::Builder::new().name("the thread".to_owned()).spawn(|| {
                    block(&[libc::SIGUSR1]);
                    loop {
                        thread::park();
                    }
                });
                lives.expect("a thread");
                // SAFETY: ends this thread alone.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
                1
            });
            let blocks = || {
                let mut tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("our child").flatten();
                tasks.any(|t| {
                    fs::read_to_string(t.path().join("status")).is_ok_and(|s| s.contains("SigBlk:\t0000000000000200"))
                })
            };
            while !fs::read_to_string(format!("/proc/{pid}/stat")).expect("our child").contains(") Z") || !blocks() {
                thread::yield_now();
            }
            let found = audit_of(pid.cast_unsigned());
            // SAFETY: our own child.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Signaled(libc::SIGKILL));
            let found = found.expect("it runs");
            assert_eq!((found.pid, found.name.as_str(), found.threads), (pid.cast_unsigned(), "the process", 2));
            assert_eq!((find(&found, &to).kind, found.blocked), (Kind::Pipe, vec![libc::SIGUSR1]));
        });
    }
}

#[test]
fn another_users_process_is_refused() {
    let user = common::can_change_user().then_some(4242);
    isolated_with("another_users_process_is_refused", 20, Setup { uid: user, ..Setup::default() }, || {
        let error = audit_of(1).expect_err("root's");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().starts_with("process 1 is not yours to look at"), "{error}");
        // Root is told so as well, in a container.
        assert!(error.to_string().contains("ptrace(2)"), "{error}");
    });
}

// -- while others open and close

#[test]
fn a_thousand_descriptors() {
    isolated("a_thousand_descriptors", 30, || {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, 4096.min(hard), hard).expect("up to the hard one");
        let files: Vec<_> = (0..500).map(|_| CareFd::open(|| File::open("/dev/null")).expect("open")).collect();
        let sockets: Vec<_> = (0..250).map(|_| UnixStream::pair().expect("a pair")).collect();
        let found = audit().expect("an audit");
        assert_eq!(found.descriptors.len(), 1003);
        assert!(found.descriptors.is_sorted_by_key(|d| d.number));
        assert!(files.iter().all(|f| find(&found, f).noexec == Some(Fate::Closed)));
        assert!(sockets.iter().all(|(a, b)| [a, b].map(|s| find(&found, s).kind) == [Kind::UnixStream; 2]));
        assert_eq!(self_fds().as_slice().len(), 1003, "nothing of its own is left open");
    });
}

/// A thread opens and closes one thing and another, mostly at the same number; `which` tells from a line of the audit which of
/// the two it is, and panics if it is neither.
fn fight(open: [&(dyn Fn() + Sync); 2], which: impl Fn(&Descriptor) -> usize) {
    let stop = Stop::default();
    let mut seen = [0; 2];
    let before: Vec<RawFd> = self_fds().as_slice().to_vec();
    thread::scope(|s| {
        let _stop = stop.on_drop();
        s.spawn(|| {
            while !stop.is_set() {
                open.iter().for_each(|open| open());
            }
        });
        let mut rounds = 0;
        while seen.iter().any(|n| *n < 100) {
            rounds += 1;
            assert!(rounds < 500_000, "seen only {seen:?}");
            for d in audit().expect("an audit").descriptors.iter().filter(|d| !before.contains(&d.number)) {
                seen[which(d)] += 1;
            }
        }
    });
}

#[test]
fn no_line_mixes_two_descriptors() {
    isolated("no_line_mixes_two_descriptors", 60, || {
        let pipe = io::pipe().expect("a pipe").0;
        let null = File::open("/dev/null").expect("open");
        let care = || {
            let file = CareFd::open(|| File::open("/dev/null")).expect("open");
            thread::yield_now();
            drop(file);
        };
        let plain = || {
            let file = File::open("/dev/null").expect("open");
            thread::yield_now();
            drop(file);
        };
        let bare = |of: RawFd| {
            move || {
                // SAFETY: an open descriptor.
                let copy = own(unsafe { libc::dup(of) });
                thread::yield_now();
                drop(copy);
            }
        };
        let (bare_pipe, bare_null) = (bare(pipe.as_raw_fd()), bare(null.as_raw_fd()));
        // A care-fd is open before it is registered and after it is not any more.
        fight([&care, &bare_pipe], |d| match (d.kind, d.care, d.close_on_exec) {
            (Kind::Device, Care::On(_) | Care::No, true) => 0,
            (Kind::Pipe, Care::No, false) => 1,
            _ => panic!("{d:?}"),
        });
        // Only what they refer to tells these apart.
        fight([&plain, &bare_pipe], |d| match (d.kind, d.close_on_exec) {
            (Kind::Device, true) => 0,
            (Kind::Pipe, false) => 1,
            _ => panic!("{d:?}"),
        });
        // Only the registration does.
        fight([&care, &bare_null], |d| match (d.care, d.close_on_exec) {
            (Care::On(_) | Care::No, true) => 0,
            (Care::No, false) => 1,
            _ => panic!("{d:?}"),
        });
    });
}

/// Processes and threads that come and go while they are looked at are no error, and no other's descriptors.
#[test]
fn what_goes_meanwhile_is_left_out() {
    isolated("what_goes_meanwhile_is_left_out", 60, || {
        kit::freeze();
        let stop = Stop::default();
        thread::scope(|s| {
            let _stop = stop.on_drop();
            for _ in 0..2 {
                s.spawn(|| {
                    while !stop.is_set() {
                        let many: Vec<_> = (0..20).map(|_| UnixStream::pair().expect("a pair")).collect();
                        drop(many);
                        drop(audit().expect("an audit beside another"));
                    }
                });
            }
            for _ in 0..50 {
                let pid = kit::foreign(|| 0);
                match audit_of(pid.cast_unsigned()) {
                    Ok(found) => assert_eq!(found.pid, pid.cast_unsigned()),
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::NotFound, "{e}"),
                }
                assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Exited(0));
                drop(audit().expect("an audit"));
            }
        });
    });
}

/// Whoever forks during an audit leaves nothing of it in the child.
#[test]
fn children_get_nothing_of_the_audits_own() {
    isolated("children_get_nothing_of_the_audits_own", 60, || {
        let stop = Stop::default();
        let expected: Vec<RawFd> = self_fds().as_slice().to_vec();
        kit::freeze();
        thread::scope(|s| {
            let _stop = stop.on_drop();
            s.spawn(|| {
                while !stop.is_set() {
                    drop(audit().expect("an audit"));
                }
            });
            for _ in 0..300 {
                let pid = kit::foreign(|| {
                    // SAFETY: no descriptor of a care-fd is used.
                    check(1, unsafe { carefork::postfork_child_noexec() }.is_ok());
                    check(2, self_fds().as_slice() == expected);
                    0
                });
                assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Exited(0));
            }
        });
    });
}
