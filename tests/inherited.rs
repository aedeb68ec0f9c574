//! X3: taking what a parent passed. Each case is a real program, this test binary, started by a real exec.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod peers;

use carefork::inherited::{self, InheritError};
use carefork::{CareFd, ConvertError, Mismatch};
use common::{Setup, Verdict, check, isolated, isolated_with, raw, self_fds};
use kit::{SOON, foreign};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, UnixAddr};
use nix::sys::socket::{bind, getsockname, listen, setsockopt, socket, sockopt};
use peers::{Dir, Program};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;

const WHAT: &str = "CAREFORK_RECEIVER";

/// Not a test by itself: what this binary does when it is started as the program that receives. The others start it.
#[test]
fn receiver() {
    let Ok(what) = std::env::var(WHAT) else { return };
    let mut words = what.split(' ');
    match words.next() {
        Some("listen") => {
            // What was given out is kept open, as a program would.
            let mut held = Vec::new();
            for _ in 0..2 {
                match inherited::listen_fds() {
                    Ok(fds) => {
                        let list: Vec<_> = fds.iter().map(|(n, fd)| format!("{n}={}", fd.as_raw_fd())).collect();
                        println!("\nreceiver: ok {}", list.join(" "));
                        held.push(fds);
                    }
                    Err(e) => println!("\nreceiver: {e:?}\nreceiver: {e}"),
                }
            }
        }
        Some("fd") => {
            let mut held = Vec::new();
            for number in words {
                match inherited::fd(number) {
                    Ok(fd) => {
                        println!("\nreceiver: ok {}", fd.as_raw_fd());
                        held.push(fd);
                    }
                    Err(e) => println!("\nreceiver: {e:?}\nreceiver: {e}"),
                }
            }
        }
        Some("serve") => serve(),
        Some("environment") => {
            let fds = |text: &str| println!("\nreceiver: {text} {}", grandchild_environment());
            fds("before");
            // SAFETY: libtest's other threads do not touch the environment.
            unsafe { inherited::remove_variables() };
            fds("after");
            println!("\nreceiver: {:?}", inherited::listen_fds().map(|fds| fds.len()));
        }
        Some("hand") => {
            let names = ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"];
            let here = names.iter().filter(|n| std::env::var_os(n).is_some()).copied().collect::<Vec<_>>().join(" ");
            let there = carefork::Command::new("env").output().expect("env").stdout;
            let there =
                String::from_utf8_lossy(&there).lines().filter(|l| l.starts_with("LISTEN_")).collect::<String>();
            println!("\nreceiver: {here} here, there: {there}");
        }
        Some("children") => children(),
        _ => panic!("unknown: {what}"),
    }
}

/// The lines that the receiver printed.
#[track_caller]
fn received(program: Program<'_>, what: &str) -> Vec<String> {
    let (status, text) = program.env(WHAT, what).start().output();
    assert!(status.success(), "{text}");
    text.lines().filter_map(|l| l.strip_prefix("receiver: ")).map(str::to_owned).collect()
}

fn this_binary<'a>() -> Program<'a> {
    let exe = std::env::current_exe().expect("this binary");
    Program::new(exe).args(["--exact", "receiver", "--nocapture", "--test-threads=1"])
}

fn listener() -> OwnedFd {
    TcpListener::bind("127.0.0.1:0").expect("a listener").into()
}

#[test]
fn activation_by_systemds_rules() {
    isolated("activation_by_systemds_rules", 120, || {
        let (a, b) = (listener(), listener());
        let cases = [
            // (variables, descriptors from 3, the first answer, the second one)
            ("", 2, "ok ", "ok "),
            ("LISTEN_FDS=2", 2, "ok ", "ok "),
            ("LISTEN_PID=$$", 2, "ok ", "ok "),
            ("LISTEN_PID=$$ LISTEN_FDS=1", 1, "ok unknown=3", "TakenBefore"),
            ("LISTEN_PID=$$ LISTEN_FDS=2", 2, "ok unknown=3 unknown=4", "TakenBefore"),
            ("LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=", 2, "ok unknown=3 unknown=4", "TakenBefore"),
            ("LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=web:admin", 2, "ok web=3 admin=4", "TakenBefore"),
            ("LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=a:a", 2, "ok a=3 a=4", "TakenBefore"),
            ("LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=web", 2, "ok web=3", "TakenBefore"),
            ("LISTEN_PID=1 LISTEN_FDS=1", 1, "OtherProcess { pid: 1", "the program in between"),
            ("LISTEN_PID=$PPID LISTEN_FDS=1", 1, "OtherProcess", "the descriptors are another's"),
            ("LISTEN_PID=x LISTEN_FDS=1", 1, "Variable { name: \"LISTEN_PID\"", "should be"),
            ("LISTEN_PID= LISTEN_FDS=1", 1, "Variable { name: \"LISTEN_PID\"", "should be"),
            ("LISTEN_PID=0 LISTEN_FDS=1", 1, "Variable { name: \"LISTEN_PID\"", "should be"),
            ("LISTEN_PID=+$$ LISTEN_FDS=1", 1, "Variable { name: \"LISTEN_PID\"", "should be"),
            ("LISTEN_PID=$$ LISTEN_FDS=0", 1, "Variable { name: \"LISTEN_FDS\"", "should be"),
            ("LISTEN_PID=$$ LISTEN_FDS=-1", 1, "Variable { name: \"LISTEN_FDS\"", "should be"),
            ("LISTEN_PID=$$ LISTEN_FDS=4294967295", 1, "Variable { name: \"LISTEN_FDS\"", "should be"),
            ("LISTEN_PID=$$ LISTEN_FDS=1000000000", 1, "NotOpen { fd: 4 }", "cleared close-on-exec"),
            ("LISTEN_PID=$$ LISTEN_FDS=1", 0, "NotOpen { fd: 3 }", "cleared close-on-exec"),
            ("LISTEN_PID=$$ LISTEN_FDS=2", 1, "NotOpen { fd: 4 }", "cleared close-on-exec"),
            ("LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=web", 2, "Names { names: 1, fds: 2 }", "name each"),
            ("LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=a:b", 2, "Names { names: 2, fds: 1 }", "name each"),
        ];
        for (variables, n, first, second) in cases {
            let mut program = this_binary().assign(variables);
            for (fd, number) in [a.as_fd(), b.as_fd()].into_iter().zip(3..).take(n) {
                program = program.pass(fd, number);
            }
            let lines = received(program, "listen");
            assert!(lines[0].starts_with(first), "{variables}: {lines:?}");
            assert!(lines[1].contains(second), "{variables}: {lines:?}");
            if second == "TakenBefore" {
                assert!(lines[2].contains("hand on the care-fds"), "{variables}: {lines:?}");
            } else if first != second {
                // A refusal takes nothing: the second call says the same.
                assert_eq!(lines[..2], lines[2..], "{variables}");
            }
        }
    });
}

#[test]
fn by_number_with_every_refusal_its_own() {
    isolated("by_number_with_every_refusal_its_own", 60, || {
        let (a, b) = (listener(), File::open("/dev/null").expect("/dev/null"));
        let cases: &[(&str, &[&str])] = &[
            ("fd 7", &["ok 7"]),
            ("fd 007", &["ok 7"]),
            ("fd 7 9", &["ok 7", "ok 9"]),
            ("fd 7 7", &["ok 7", "Taken { fd: 7 }", "taken already: hand on the care-fd"]),
            ("fd 8 7", &["NotOpen { fd: 8 }", "descriptor 8 is not open: check the number", "ok 7"]),
            ("fd 0", &["StandardStream { fd: 0 }", "pass the socket as 3 or more"]),
            ("fd 1", &["StandardStream { fd: 1 }", "standard stream"]),
            ("fd 002", &["StandardStream { fd: 2 }", "standard stream"]),
            ("fd x", &["NotANumber { given: \"x\" }", "\"x\" is not the number of a descriptor: give decimal digits"]),
            ("fd 7x", &["NotANumber { given: \"7x\" }", "decimal digits"]),
            ("fd -1", &["NotANumber { given: \"-1\" }", "decimal digits"]),
            ("fd +7", &["NotANumber { given: \"+7\" }", "decimal digits"]),
            ("fd 0x7", &["NotANumber { given: \"0x7\" }", "decimal digits"]),
            ("fd ", &["NotANumber { given: \"\" }", "decimal digits"]),
            ("fd 2147483648", &["NotANumber", "decimal digits"]),
            ("fd 99999999999999999999", &["NotANumber", "decimal digits"]),
        ];
        for (what, expected) in cases {
            let lines = received(this_binary().pass(a.as_fd(), 7).pass(b.as_fd(), 9), what);
            assert_eq!(lines.len(), expected.len(), "{what}: {lines:?}");
            for (line, expected) in lines.iter().zip(*expected) {
                assert!(line.contains(expected), "{what}: {line}");
            }
        }
    });
}

#[test]
fn a_number_that_is_too_large() {
    isolated("a_number_that_is_too_large", 20, || {
        // Most shells give their programs 1024, which these may raise.
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("as far as it goes");
        if most <= 1500 {
            return;
        }
        let file = File::open("/dev/null").expect("/dev/null");
        let lines = received(this_binary().pass(file.as_fd(), 1500), "fd 1500");
        let [error, text] = &lines[..] else { panic!("{lines:?}") };
        assert!(error.contains("TooLarge { fd: 1500 }"), "{error}");
        assert!(text.contains("descriptor 1500 is above 1023: pass it as a smaller number"), "{text}");
    });
}

fn flags(fd: RawFd) -> Option<i32> {
    // SAFETY: the number is only asked about.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(fd, FcntlArg::F_GETFD).ok()
}

/// A process that is passed listeners.
fn with(sockets: impl IntoIterator<Item = RawFd>) -> Setup {
    Setup { sockets: sockets.into_iter().collect(), ..Setup::default() }
}

/// What another program does that opens without close-on-exec.
fn opened_as(number: RawFd) {
    // Not what is just closed: that may have this very number.
    let other = raw::aside(listener().as_fd());
    // SAFETY: the number is free in a process of this test's own.
    assert_eq!(unsafe { libc::dup2(other.as_raw_fd(), number) }, number);
    assert_eq!(flags(number), Some(0));
}

#[test]
fn what_is_taken_is_a_care_fd_and_close_on_exec() {
    isolated_with("what_is_taken_is_a_care_fd_and_close_on_exec", 20, with([7]), || {
        assert_eq!(flags(7), Some(0));
        let fd = inherited::fd("7").expect("passed");
        assert_eq!(flags(7), Some(FdFlag::FD_CLOEXEC.bits()));
        let taken: CareFd<TcpListener> = fd.try_into().expect("a listener");
        let pid = foreign(|| {
            // SAFETY: no care-fd is used in this child.
            check(90, unsafe { carefork::postfork_child_noexec() }.is_ok());
            check(91, !self_fds().contains(7) && taken.get().is_none());
            0
        });
        assert_eq!(common::reap(pid, SOON), Verdict::Exited(0));
        let listing = Command::new("ls").arg("/proc/self/fd").output().expect("ls");
        assert!(!String::from_utf8_lossy(&listing.stdout).lines().any(|l| l == "7"));
        drop(taken);
        assert_eq!(flags(7), None);
    });
}

/// The number of what was taken, closed and used again is somebody else's; and what this process opened was not inherited.
#[test]
fn nothing_of_this_process_is_taken() {
    isolated_with("nothing_of_this_process_is_taken", 20, with([7]), || {
        drop(inherited::fd("7").expect("passed"));
        opened_as(7);
        assert!(matches!(inherited::fd("7"), Err(InheritError::Taken { fd: 7 })));

        let own = listener();
        let number = own.as_raw_fd();
        let refused = inherited::fd(number.to_string()).expect_err("opened here");
        assert!(matches!(refused, InheritError::NotInherited { fd } if fd == number));
        assert!(refused.to_string().contains("this process has opened it"), "{refused}");
        opened_as(8);
        assert!(matches!(inherited::fd("8"), Err(InheritError::NotInherited { fd: 8 })));
        assert!(flags(number).is_some());
        let own = CareFd::new(own).expect("adopted");
        assert!(matches!(inherited::fd(number.to_string()), Err(InheritError::NotInherited { .. })));
        drop(own);
    });
}

/// Fewer numbers than poll is asked about at a time.
#[test]
fn a_low_limit_on_open_files() {
    let setup = Setup { rlimits: vec![(libc::RLIMIT_NOFILE, 64)], ..with([7]) };
    isolated_with("a_low_limit_on_open_files", 20, setup, || {
        opened_as(8);
        assert!(matches!(inherited::fd("8"), Err(InheritError::NotInherited { fd: 8 })));
        assert!(inherited::fd("7").is_ok());
    });
}

/// The two ways share one ledger, and several threads get each descriptor once.
#[test]
fn each_is_given_out_once() {
    isolated_with("each_is_given_out_once", 20, with([3, 4, 9]), || {
        let own = std::process::id().to_string();
        for (name, value) in [("LISTEN_PID", own.as_str()), ("LISTEN_FDS", "2")] {
            // SAFETY: libtest's other thread only waits.
            unsafe { std::env::set_var(name, value) };
        }
        drop(inherited::fd("4").expect("passed"));
        opened_as(4);
        assert!(matches!(inherited::listen_fds(), Err(InheritError::Taken { fd: 4 })));
        assert_eq!(flags(3), Some(0), "nothing was taken");
        let taken: usize = std::thread::scope(|s| {
            let threads: Vec<_> = (0..8).map(|_| s.spawn(|| inherited::fd("9").map(|fd| fd.into_inner()))).collect();
            let results: Vec<_> = threads.into_iter().map(|t| t.join().expect("no panic")).collect();
            results.iter().filter(|r| r.is_ok()).count()
        });
        assert_eq!(taken, 1);
    });
}

#[test]
fn after_activation_the_numbers_are_taken() {
    isolated_with("after_activation_the_numbers_are_taken", 20, with(3..6), || {
        let own = std::process::id().to_string();
        for (name, value) in [("LISTEN_PID", own.as_str()), ("LISTEN_FDS", "2")] {
            // SAFETY: libtest's other thread only waits.
            unsafe { std::env::set_var(name, value) };
        }
        let fds = inherited::listen_fds().expect("passed");
        assert_eq!(fds.iter().map(|(_, fd)| fd.as_raw_fd()).collect::<Vec<_>>(), [3, 4]);
        assert!(matches!(inherited::fd("3"), Err(InheritError::Taken { fd: 3 })));
        assert!(inherited::fd("5").is_ok());
        // The variables were read; what they say now is nobody's business.
        // SAFETY: as above.
        unsafe { std::env::set_var("LISTEN_FDS", "1") };
        drop(fds);
        assert!(matches!(inherited::listen_fds(), Err(InheritError::TakenBefore)));
    });
}

/// What a child of this process may not take: it is this process's.
fn children() {
    let refuses = || {
        check(90, matches!(inherited::fd("7"), Err(InheritError::ForkedChild)));
        check(91, matches!(inherited::listen_fds(), Err(InheritError::ForkedChild)));
        0
    };
    assert_eq!(common::reap(foreign(refuses), SOON), Verdict::Exited(0));
    let mut child = kit::forked(&carefork::ForkOptions::new(), |_| refuses());
    assert_eq!(kit::code(&mut child), 0);
    // By a system call that runs no handler.
    let none = std::ptr::null::<u8>();
    // SAFETY: the child makes system calls and exits.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, none, none, none, none) };
    if pid == 0 {
        common::raw::exit_now(refuses());
    }
    assert_eq!(common::reap(pid as i32, SOON), Verdict::Exited(0));
    println!("\nreceiver: {:?}", inherited::listen_fds().map(|fds| fds.len()));
    println!("\nreceiver: {:?}", inherited::fd("7").map(|fd| fd.as_raw_fd()));
}

#[test]
fn a_forked_child_takes_nothing() {
    isolated("a_forked_child_takes_nothing", 30, || {
        let (a, b) = (listener(), listener());
        let program = this_binary().pass(b.as_fd(), 7).activate("one", a.as_fd());
        assert_eq!(received(program, "children"), ["Ok(1)", "Ok(7)"]);
    });
}

fn grandchild_environment() -> String {
    let output = Command::new("env").output().expect("env");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut names: Vec<_> =
        text.lines().filter(|l| l.starts_with("LISTEN_")).filter_map(|l| l.split('=').next()).collect();
    names.sort_unstable();
    names.join(",")
}

#[test]
fn the_variables_go_when_told_and_what_was_passed_stays() {
    isolated("the_variables_go_when_told_and_what_was_passed_stays", 30, || {
        let a = listener();
        let variables = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=x LISTEN_PIDFDID=1";
        let lines = received(this_binary().pass(a.as_fd(), 3).assign(variables), "environment");
        assert_eq!(lines, ["before LISTEN_FDNAMES,LISTEN_FDS,LISTEN_PID,LISTEN_PIDFDID", "after ", "Ok(1)"]);
    });
}

/// What [`carefork::Command`] passes, a program takes: names, numbers, and none of it twice.
#[test]
fn what_command_passes_arrives() {
    isolated("what_command_passes_arrives", 30, || {
        let (a, b) = (listener(), listener());
        let program = || this_binary().activate("web", b.as_fd()).activate("admin", a.as_fd()).pass(a.as_fd(), 9);
        assert_eq!(received(program(), "listen")[0], "ok web=3 admin=4");
        assert_eq!(received(program(), "fd 9 4"), ["ok 9", "ok 4"]);
        // What this process was given is not handed on: the receiver's programs find no variables.
        let lines = received(program(), "hand on");
        assert_eq!(lines, ["LISTEN_FDS LISTEN_FDNAMES LISTEN_PID here, there: "]);
    });
}

// -- a real activator

/// Says on each socket what it is; the names come from the activator.
fn serve() {
    for (name, fd) in inherited::listen_fds().expect("activated") {
        let fd = match CareFd::<UnixListener>::try_from(fd) {
            Ok(listener) => {
                let mut connection = listener.accept().expect("a connection").0;
                connection.write_all(format!("unix {name}\n").as_bytes()).expect("sent");
                continue;
            }
            Err(ConvertError { fd, .. }) => fd,
        };
        let listener = CareFd::<TcpListener>::try_from(fd).expect("a listener");
        let mut connection = listener.accept().expect("a connection").0;
        connection.write_all(format!("tcp {name}\n").as_bytes()).expect("sent");
    }
}

fn said(mut stream: impl Read) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("text");
    text
}

/// systemd's own activator hands over two sockets; clients were connected before the program began.
#[test]
fn systemd_socket_activate_hands_over() {
    isolated("systemd_socket_activate_hands_over", 60, || {
        let dir = Dir::new("activate");
        let path = dir.file("socket");
        // A port for the activator to bind again, which it may as this socket does not listen; and nobody else gets it meanwhile.
        let reserved = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
        setsockopt(&reserved, sockopt::ReuseAddr, &true).expect("SO_REUSEADDR");
        bind(reserved.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).expect("a port");
        let port: SocketAddrV4 = getsockname::<SockaddrIn>(reserved.as_raw_fd()).expect("its address").into();
        let exe = std::env::current_exe().expect("this binary");
        let mut activator = Program::new("systemd-socket-activate")
            .args(["-l", path.to_str().expect("text"), "-l", &port.to_string(), "--fdname=local:net"])
            .args(["-E", "CAREFORK_RECEIVER=serve"])
            .args([exe.as_os_str()])
            .args(["--exact", "receiver", "--nocapture", "--test-threads=1"])
            .start();
        let connect = |what: &dyn Fn() -> io::Result<OwnedFd>| loop {
            match what() {
                Ok(stream) => break stream,
                Err(e) => {
                    // It has not bound them yet.
                    assert!(matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused), "{e}");
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        };
        let local: UnixStream = connect(&|| UnixStream::connect(&path).map(OwnedFd::from)).into();
        let net: TcpStream = connect(&|| TcpStream::connect(port).map(OwnedFd::from)).into();
        assert_eq!((said(local).as_str(), said(net).as_str()), ("unix local\n", "tcp net\n"));
        assert!(activator.end().success());
    });
}

// -- what it is

/// One of each, by name.
fn zoo(dir: &Dir) -> Vec<(&'static str, OwnedFd)> {
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let client = TcpStream::connect(tcp.local_addr().expect("its address")).expect("connected");
    let unix = UnixListener::bind(dir.file("zoo")).expect("a listener");
    let (one, _other) = UnixStream::pair().expect("a pair");
    let plain = |family, kind| socket(family, kind, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    let packets = plain(AddressFamily::Unix, SockType::SeqPacket);
    bind(packets.as_raw_fd(), &UnixAddr::new(&dir.file("packets")).expect("a path")).expect("bound");
    listen(&packets, Backlog::new(1).expect("small")).expect("listening");
    let own = |client: &TcpStream| client.try_clone().expect("a duplicate");
    client.shutdown(Shutdown::Write).expect("half closed");
    vec![
        ("tcp connection", own(&client).into()),
        ("tcp listener", tcp.into()),
        ("tcp6 listener", TcpListener::bind("[::1]:0").expect("a listener").into()),
        ("tcp unconnected", plain(AddressFamily::Inet, SockType::Stream)),
        ("udp", UdpSocket::bind("127.0.0.1:0").expect("a socket").into()),
        ("udp6", UdpSocket::bind("[::1]:0").expect("a socket").into()),
        ("unix listener", unix.into()),
        ("unix connection", one.into()),
        ("unix unconnected", plain(AddressFamily::Unix, SockType::Stream)),
        ("unix datagram", UnixDatagram::unbound().expect("a socket").into()),
        ("unix packets", packets),
        ("netlink", plain(AddressFamily::Netlink, SockType::Datagram)),
        ("file", File::open("/etc/passwd").expect("a file").into()),
        ("directory", File::open("/").expect("a directory").into()),
        ("device", File::open("/dev/null").expect("a device").into()),
        ("pipe", io::pipe().expect("a pipe").0.into()),
        ("epoll", nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll").0),
    ]
}

/// Which of the zoo become a `T`; the others come back with what is wrong.
fn fits<T: AsFd + Into<OwnedFd> + 'static>(dir: &Dir) -> (Vec<&'static str>, Vec<(&'static str, Mismatch)>)
where
    CareFd<T>: TryFrom<CareFd<OwnedFd>, Error = ConvertError>,
{
    drop((std::fs::remove_file(dir.file("zoo")), std::fs::remove_file(dir.file("packets"))));
    let (mut fit, mut not) = (Vec::new(), Vec::new());
    for (name, fd) in zoo(dir) {
        let fd = CareFd::new(fd).expect("adopted");
        let number = fd.as_raw_fd();
        match CareFd::<T>::try_from(fd) {
            Ok(socket) => {
                assert_eq!(socket.as_raw_fd(), number);
                fit.push(name);
            }
            Err(e) => {
                assert_eq!(e.fd.as_raw_fd(), number);
                assert!(e.to_string().starts_with(&format!("descriptor {number} is not a ")), "{e}");
                assert_eq!(flags(number), Some(1), "it comes back open");
                not.push((name, e.why));
            }
        }
    }
    (fit, not)
}

#[test]
fn sockets_get_the_type_they_are_and_no_other() {
    isolated("sockets_get_the_type_they_are_and_no_other", 30, || {
        let dir = Dir::new("zoo");
        assert_eq!(fits::<TcpListener>(&dir).0, ["tcp listener", "tcp6 listener"]);
        assert_eq!(fits::<TcpStream>(&dir).0, ["tcp connection"]);
        assert_eq!(fits::<UdpSocket>(&dir).0, ["udp", "udp6"]);
        assert_eq!(fits::<UnixListener>(&dir).0, ["unix listener"]);
        assert_eq!(fits::<UnixStream>(&dir).0, ["unix connection"]);
        assert_eq!(fits::<UnixDatagram>(&dir).0, ["unix datagram"]);
    });
}

#[test]
fn each_mismatch_is_named() {
    isolated("each_mismatch_is_named", 30, || {
        let dir = Dir::new("mismatch");
        let not = fits::<UnixListener>(&dir).1;
        let why = |name| &not.iter().find(|(n, _)| *n == name).expect("in the zoo").1;
        assert!(matches!(why("unix connection"), Mismatch::NotListening));
        assert!(matches!(why("unix unconnected"), Mismatch::NotListening));
        assert!(matches!(why("unix datagram"), Mismatch::Type { is: libc::SOCK_DGRAM, .. }));
        assert!(matches!(why("unix packets"), Mismatch::Type { is: libc::SOCK_SEQPACKET, .. }));
        assert!(matches!(why("tcp listener"), Mismatch::Family { is: libc::AF_INET, .. }));
        for (name, kind) in [("file", "regular file"), ("directory", "directory"), ("pipe", "pipe")] {
            assert!(matches!(why(name), Mismatch::NotASocket { is } if *is == kind));
        }
        assert!(why("unix connection").to_string().contains("call listen(2) before passing it"));
        assert!(why("tcp listener").to_string().contains("AF_INET, not AF_UNIX"));
        let not = fits::<TcpStream>(&dir).1;
        let why = |name| &not.iter().find(|(n, _)| *n == name).expect("in the zoo").1;
        assert!(matches!(why("tcp listener"), Mismatch::Listening));
        assert!(matches!(why("tcp unconnected"), Mismatch::NotConnected));
        assert!(matches!(why("udp"), Mismatch::Type { is: libc::SOCK_DGRAM, .. }));
        assert!(matches!(why("unix connection"), Mismatch::Family { is: libc::AF_UNIX, .. }));
    });
}

/// Of UDP's family and type: UDP-Lite, and the sockets of ping, whichever this kernel has for this user.
#[test]
fn another_protocol_is_another_socket() {
    isolated("another_protocol_is_another_socket", 20, || {
        let other = [libc::IPPROTO_UDPLITE, libc::IPPROTO_ICMP].into_iter().find_map(|protocol| {
            // SAFETY: takes numbers only.
            let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, protocol) };
            // SAFETY: the kernel just gave us this number.
            (fd >= 0).then(|| (unsafe { OwnedFd::from_raw_fd(fd) }, protocol))
        });
        let (fd, protocol) = other.expect("one of the two");
        let refused = CareFd::<UdpSocket>::try_from(CareFd::new(fd).expect("adopted")).expect_err("no UDP");
        assert!(matches!(refused.why, Mismatch::Protocol { is, .. } if is == protocol), "{refused}");
    });
}
