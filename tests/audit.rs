//! F7: what an audit says of descriptors and signals, and that children really get just that.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::audit::{Care, Descriptor, Fate, Kind};
use carefork::{Audit, CareFd, OnFork, audit, audit_of};
use common::{Setup, check, fds_of, isolated, isolated_with, self_fds, status_here, status_of};
use kit::{Stop, bits, block, catch, code, ignore};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

/// What a system call made.
#[track_caller]
fn own(fd: impl TryInto<RawFd>) -> OwnedFd {
    let fd = fd.try_into().ok().expect("a number");
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel just gave us this number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A directory that goes with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("carefork-audit-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a directory of our own");
        Scratch(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("it was there");
    }
}

fn set_cloexec(fd: impl AsFd, on: bool) {
    // SAFETY: an integer argument.
    assert_eq!(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETFD, i32::from(on)) }, 0);
}

#[track_caller]
fn find(audit: &Audit, fd: &impl AsRawFd) -> Descriptor {
    let number = fd.as_raw_fd();
    audit.descriptors.iter().find(|d| d.number == number).cloned().unwrap_or_else(|| panic!("{number} of\n{audit}"))
}

/// A pair of sockets of any type.
fn socket_pair(kind: i32) -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: room for two numbers.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) }, 0);
    (own(ends[0]), own(ends[1]))
}

fn socket(family: i32, kind: i32, protocol: i32) -> OwnedFd {
    // SAFETY: integers only.
    own(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })
}

/// One of every kind: itself, the kind, what its target must be, and what a noexec child is said to do with it.
fn zoo(dir: &Scratch) -> Vec<(OwnedFd, Kind, String, Fate)> {
    use Fate::{Kept, Leaked};
    let mut zoo = Vec::new();
    let mut add = |fd: OwnedFd, kind, target: &str, fate| zoo.push((fd, kind, target.to_owned(), fate));

    let file = dir.path("file");
    add(File::create(&file).expect("created").into(), Kind::File, &file, Kept);
    let gone = dir.path("gone");
    add(File::create(&gone).expect("created").into(), Kind::File, &format!("{gone} (deleted)"), Kept);
    fs::remove_file(&gone).expect("removed");
    add(File::open(&dir.0).expect("open").into(), Kind::Directory, dir.path("").trim_end_matches('/'), Kept);
    add(File::open("/dev/null").expect("open").into(), Kind::Device, "/dev/null", Kept);
    // SAFETY: integers only.
    let master = own(unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) });
    add(master, Kind::Terminal, "/dev/", Leaked);

    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let here = listener.local_addr().expect("bound");
    let client = TcpStream::connect(here).expect("connected");
    let there = client.local_addr().expect("bound");
    let (server, _) = listener.accept().expect("accepted");
    add(listener.into(), Kind::TcpListener, &here.to_string(), Leaked);
    add(client.into(), Kind::Tcp, &format!("{there} -> {here}"), Leaked);
    add(server.into(), Kind::Tcp, &format!("{here} -> {there}"), Leaked);
    add(socket(libc::AF_INET, libc::SOCK_STREAM, 0), Kind::Tcp, "socket:[", Leaked);
    // Containers may come without.
    if let Ok(six) = TcpListener::bind("[::1]:0") {
        let here = six.local_addr().expect("bound").to_string();
        add(six.into(), Kind::TcpListener, &here, Leaked);
    }
    let udp = UdpSocket::bind("127.0.0.1:0").expect("bound");
    let here = udp.local_addr().expect("bound").to_string();
    add(udp.into(), Kind::Udp, &here, Leaked);
    let path = dir.path("a socket with  spaces");
    add(UnixListener::bind(&path).expect("bound").into(), Kind::UnixListener, &path, Leaked);
    let name = format!("carefork-audit-{}", std::process::id());
    let abstract_name = SocketAddr::from_abstract_name(&name).expect("short enough");
    let datagram = UnixDatagram::bind_addr(&abstract_name).expect("bound");
    add(datagram.into(), Kind::UnixDatagram, &format!("@{name}"), Leaked);
    let (a, b) = UnixStream::pair().expect("a pair");
    add(a.into(), Kind::UnixStream, "socket:[", Leaked);
    add(b.into(), Kind::UnixStream, "socket:[", Leaked);
    let (a, b) = socket_pair(libc::SOCK_SEQPACKET);
    add(a, Kind::UnixSeqpacket, "socket:[", Leaked);
    add(b, Kind::UnixSeqpacket, "socket:[", Leaked);
    add(socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE), Kind::Netlink, "socket:[", Leaked);
    let bound = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    // SAFETY: sockaddr_nl is plain data.
    let mut any: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    any.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    // SAFETY: `any` is live and of that size.
    let done = unsafe { libc::bind(bound.as_raw_fd(), (&raw const any).cast(), size_of_val(&any) as libc::socklen_t) };
    assert_eq!(done, 0);
    add(bound, Kind::Netlink, "protocol 0 port", Leaked);
    // Its protocol has no table. Kernels may come without it.
    // SAFETY: integers only.
    let mptcp = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_MPTCP) };
    if mptcp >= 0 {
        add(own(mptcp), Kind::Socket, "MPTCP socket:[", Leaked);
    }

    let (r, w) = io::pipe().expect("a pipe");
    add(r.into(), Kind::Pipe, "pipe:[", Leaked);
    add(w.into(), Kind::Pipe, "pipe:[", Leaked);
    let path = dir.path("fifo");
    nix::unistd::mkfifo(path.as_str(), nix::sys::stat::Mode::S_IRWXU).expect("made");
    let fifo = fs::OpenOptions::new().read(true).write(true).open(&path).expect("open");
    add(fifo.into(), Kind::Fifo, &path, Leaked);

    // SAFETY: integers only.
    let eventfd = own(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) });
    // SAFETY: integers only.
    let epoll = own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) });
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
    // SAFETY: `event` is live.
    let added = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, eventfd.as_raw_fd(), &raw mut event) };
    assert_eq!(added, 0);
    add(epoll, Kind::Epoll, &format!("of {}", eventfd.as_raw_fd()), Kept);
    add(eventfd, Kind::Eventfd, "anon_inode:[eventfd]", Kept);
    // SAFETY: integers only.
    let timer = own(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) });
    add(timer, Kind::Timerfd, "anon_inode:[timerfd]", Kept);
    // SAFETY: sigset_t is plain data; all-zero is the empty set.
    let none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `none` is live.
    let signals = own(unsafe { libc::signalfd(-1, &raw const none, libc::SFD_CLOEXEC) });
    add(signals, Kind::Signalfd, "anon_inode:[signalfd]", Kept);
    // SAFETY: integers only.
    let inotify = own(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) });
    add(inotify, Kind::Inotify, "anon_inode:inotify", Kept);
    // SAFETY: a C string.
    let memfd = own(unsafe { libc::memfd_create(c"beast".as_ptr(), libc::MFD_CLOEXEC) });
    add(memfd, Kind::Memfd, "/memfd:beast (deleted)", Kept);
    let pidfd = common::raw::pidfd_open(common::raw::getpid()).expect("a pidfd");
    add(pidfd, Kind::Pidfd, &format!("of process {}", std::process::id()), Kept);
    add(File::open("/proc/self/ns/net").expect("open").into(), Kind::Namespace, "net:[", Kept);
    let path_only = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&dir.0).expect("open");
    add(path_only.into(), Kind::Directory, dir.path("").trim_end_matches('/'), Kept);
    zoo
}

#[test]
fn every_kind_has_its_name_target_and_fate() {
    isolated("every_kind_has_its_name_target_and_fate", 20, || {
        let dir = Scratch::new("zoo");
        let zoo = zoo(&dir);
        // Some come into the world without close-on-exec.
        for (i, (fd, ..)) in zoo.iter().enumerate() {
            set_cloexec(fd, i % 3 != 0);
        }
        let check_all = |found: &Audit, own: bool| {
            let numbers: Vec<RawFd> = found.descriptors.iter().map(|d| d.number).collect();
            let mut open: Vec<RawFd> = (0..=2).chain(zoo.iter().map(|z| z.0.as_raw_fd())).collect();
            open.sort_unstable();
            assert_eq!(numbers, open, "none too many, none of its own");
            for (i, (fd, kind, target, noexec)) in zoo.iter().enumerate() {
                let d = find(found, fd);
                let (kind, target) = match (*kind, target.as_str()) {
                    // Of another process's nobody can say that it does not listen, in another network namespace.
                    (Kind::Tcp, "socket:[") if !own => (Kind::Socket, "TCP socket:["),
                    as_it_is => as_it_is,
                };
                assert_eq!(d.kind, kind, "{d:?}");
                let is_whole = !target.ends_with(['[', '/']) && !target.ends_with("port");
                assert!(if is_whole { d.target == target } else { d.target.starts_with(target) }, "{d:?} not {target}");
                assert_eq!(d.close_on_exec, i % 3 != 0, "{d:?}");
                assert_eq!(d.exec, if i % 3 == 0 { Fate::Leaked } else { Fate::Closed }, "{d:?}");
                assert_eq!(d.noexec, own.then_some(*noexec), "{d:?}");
                assert_eq!(d.care, if own { Care::No } else { Care::Unknown }, "{d:?}");
                assert!(!d.locked, "{d:?}");
            }
            assert_eq!(found.leaked().count(), zoo.len().div_ceil(3));
            assert!(found.descriptors[..3].iter().all(|d| d.exec == Fate::Kept));
            let paths: Vec<RawFd> =
                found.descriptors.iter().filter(|d| !d.read && !d.write).map(|d| d.number).collect();
            assert_eq!(paths, [zoo.last().expect("many").0.as_raw_fd()], "O_PATH");
        };
        check_all(&audit().expect("an audit"), true);
        // As a stranger sees it: a child.
        let pid = std::process::id();
        in_child(|| {
            let mut found = audit_of(pid).expect("an audit of the parent");
            // By now the parent may have opened one for this very child.
            let me = format!("of process {}", std::process::id());
            found.descriptors.retain(|d| d.target != me);
            check_all(&found, false);
        });
    });
}

/// The kernel's table of Unix sockets has their paths as they are: what one is called must not speak for another.
#[test]
fn a_sockets_name_says_nothing_of_others() {
    isolated("a_sockets_name_says_nothing_of_others", 60, || {
        let dir = Scratch::new("forged");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let raw = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
        // The kernel's order is by inode: of so many, some come before what they speak for, some behind it.
        let pairs: Vec<_> = (0..32).map(|_| UnixStream::pair().expect("a pair")).collect();
        let victims = pairs.iter().map(|(one, _)| one.as_fd()).chain([udp.as_fd(), raw.as_fd()]);
        for victim in victims {
            let link = fs::read_link(format!("/proc/self/fd/{}", victim.as_raw_fd())).expect("/proc");
            let link = link.to_str().expect("UTF-8");
            let inode = link.trim_start_matches("socket:[").trim_end_matches(']');
            let before = find(&audit().expect("an audit"), &victim);
            let path = dir.path(&format!("x\n0: 0 0 00010000 0001 01 {inode} @forged"));
            let listener = UnixListener::bind(&path).expect("bound");
            let found = audit().expect("an audit");
            assert_eq!(find(&found, &victim), before);
            let named = find(&found, &listener);
            assert_eq!((named.kind, named.target), (Kind::UnixListener, path.clone()));
            // Who cannot ask the socket does not know which of the two lines is true.
            let pid = std::process::id();
            in_child(|| {
                let d = find(&audit_of(pid).expect("an audit of the parent"), &victim);
                assert!(d.kind != Kind::UnixListener && !d.target.contains("forged"), "{d:?}");
                assert!(d.kind == before.kind || d.kind == Kind::Socket, "{d:?}");
            });
            fs::remove_file(&path).expect("it was there");
        }
    });
}

/// One that listens in a network namespace that its process has left since.
#[test]
fn a_listener_of_another_namespace_is_no_connection() {
    isolated("a_listener_of_another_namespace_is_no_connection", 60, || {
        let dir = Scratch::new("namespace");
        let path = dir.path("listener");
        let (tcp, unix) = (TcpListener::bind("127.0.0.1:0").expect("bound"), UnixListener::bind(&path).expect("bound"));
        let fds = [tcp.as_raw_fd(), unix.as_raw_fd()];
        // The tables of a process are those of its first thread.
        in_child(|| {
            // SAFETY: integers only.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return;
            }
            let found = audit().expect("an audit");
            assert_eq!(fds.map(|fd| find(&found, &fd).kind), [Kind::TcpListener, Kind::UnixListener]);
            assert_eq!(find(&found, &fds[1]).target, path);
            let pid = std::process::id();
            in_child(|| {
                let found = audit_of(pid).expect("an audit of the parent");
                assert_eq!(fds.map(|fd| find(&found, &fd).kind), [Kind::Socket; 2]);
            });
        });
    });
}

/// Serial lines and consoles of virtual machines are terminals.
#[test]
fn terminals_of_all_drivers() {
    isolated("terminals_of_all_drivers", 20, || {
        let dir = Scratch::new("terminals");
        for (name, major, kind) in [
            ("ttyS", 4, Kind::Terminal),
            ("ttyACM", 166, Kind::Terminal),
            ("ttyUSB", 188, Kind::Terminal),
            ("ttyAMA", 204, Kind::Terminal),
            ("hvc", 229, Kind::Terminal),
            ("null", 1, Kind::Device),
        ] {
            let (path, mode) = (dir.path(name), nix::sys::stat::Mode::S_IRUSR);
            let device = nix::sys::stat::makedev(major, 3);
            // Containers may refuse.
            if nix::sys::stat::mknod(path.as_str(), nix::sys::stat::SFlag::S_IFCHR, mode, device).is_err() {
                return;
            }
            // No driver needs to be there.
            let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).expect("open");
            assert_eq!(find(&audit().expect("an audit"), &file).kind, kind, "{name}");
        }
    });
}

/// Runs `f` in a child that has cleaned up; a panic there is one here.
#[track_caller]
fn in_child(f: impl FnOnce()) {
    // SAFETY: no descriptor of a care-fd is used in the child.
    let mut child = unsafe {
        carefork::spawn(|| {
            f();
            0
        })
    }
    .expect("a child");
    assert_eq!(code(&mut child), 0);
}

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
    isolated("a_zombie_is_no_process_any_more", 20, || {
        let pid = kit::foreign(|| 0);
        let pidfd = common::raw::pidfd_open(pid).expect("a pidfd");
        common::raw::poll_readable(&mut [common::raw::pollfd(pidfd.as_raw_fd())], kit::SOON);
        let error = audit_of(pid.cast_unsigned()).expect_err("it has ended");
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
        assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Exited(0));
    });
}

/// Its other threads go on, with its descriptors.
#[test]
fn a_process_whose_first_thread_has_ended_is_one_still() {
    isolated("a_process_whose_first_thread_has_ended_is_one_still", 60, || {
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
