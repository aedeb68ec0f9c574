//! F7: each kind of descriptor by its name, as a process sees its own and another's.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod audits;
mod common;
mod kit;

use audits::{Scratch, find, in_child, own, set_cloexec};
use carefork::audit::{Care, Fate, Kind};
use carefork::{Audit, audit, audit_of};
use common::{isolated, raw};
use std::fs::{self, File};
use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::thread;

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
    let pidfd = raw::pidfd_open(raw::getpid()).expect("a pidfd");
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

/// What a system call made, or errno's reason why not.
fn made(fd: impl TryInto<RawFd>) -> io::Result<OwnedFd> {
    let fd = fd.try_into().ok().expect("a number");
    let e = io::Error::last_os_error();
    // SAFETY: the kernel just gave us this number.
    if fd < 0 { Err(e) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}

/// Runs `look` on this process's audit and, in a child, on one of its parent.
#[track_caller]
fn from_both_sides(look: impl Fn(&Audit, bool)) {
    look(&audit().expect("an audit"), true);
    let pid = std::process::id();
    in_child(|| look(&audit_of(pid).expect("an audit of the parent"), false));
}

/// A child that sleeps until it is killed.
fn sleeper() -> i32 {
    kit::foreign(|| {
        // SAFETY: takes nothing.
        unsafe { libc::pause() };
        1
    })
}

#[track_caller]
fn reaped(pid: i32) {
    // SAFETY: our own child.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    assert_eq!(common::reap(pid, kit::SOON), common::Verdict::Signaled(libc::SIGKILL));
}

/// Each that this kernel makes, with its name and what it leads to. `Other` is none of them.
#[test]
fn what_only_a_system_call_makes_has_its_name() {
    isolated("what_only_a_system_call_makes_has_its_name", 60, || {
        let mut all: Vec<(OwnedFd, Kind, String)> = Vec::new();
        let mut missing = Vec::new();
        let mut add = |what: io::Result<OwnedFd>, kind: Kind, target: &str| match what {
            Ok(fd) => all.push((fd, kind, target.to_owned())),
            // A kernel without it, a sandbox that refuses it.
            Err(e) => missing.push(format!("{kind}: {e}")),
        };
        let cloexec = libc::O_CLOEXEC;
        // SAFETY: integers only.
        add(made(unsafe { libc::fanotify_init(libc::FAN_CLOEXEC, 0) }), Kind::Fanotify, "anon_inode:[fanotify]");
        // SAFETY: `params` is plain data, larger than the kernel's.
        let ring = unsafe {
            let mut params = [0u64; 64];
            made(libc::syscall(libc::SYS_io_uring_setup, 2, params.as_mut_ptr()))
        };
        add(ring, Kind::IoUring, "anon_inode:[io_uring]");
        // SAFETY: integers only.
        let faults = made(unsafe { libc::syscall(libc::SYS_userfaultfd, cloexec) });
        add(faults, Kind::Userfaultfd, "anon_inode:[userfaultfd]");
        // SAFETY: sigset_t is plain data; all-zero is the empty set.
        let none: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `none` is live.
        let signals = made(unsafe { libc::signalfd(-1, &raw const none, libc::SFD_CLOEXEC) });
        add(signals, Kind::Signalfd, "anon_inode:[signalfd]");
        for clock in [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME] {
            // SAFETY: integers only.
            let timer = made(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) });
            add(timer, Kind::Timerfd, "anon_inode:[timerfd]");
        }
        for name in [c"plain", c"", c"a name] (deleted)", c"/etc/passwd"] {
            let target = format!("/memfd:{} (deleted)", name.to_str().expect("text"));
            // SAFETY: a C string.
            add(made(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_ALLOW_SEALING) }), Kind::Memfd, &target);
        }
        // SAFETY: integers only.
        let watches = made(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) });
        if let Ok(watches) = &watches {
            // SAFETY: a C string.
            assert!(unsafe { libc::inotify_add_watch(watches.as_raw_fd(), c"/".as_ptr(), libc::IN_CREATE) } > 0);
        }
        add(watches, Kind::Inotify, "anon_inode:inotify");
        // SAFETY: integers only.
        let epoll = || made(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }).expect("an epoll");
        let (nested, outer) = (epoll(), epoll());
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
        // SAFETY: `event` is live.
        let done =
            unsafe { libc::epoll_ctl(outer.as_raw_fd(), libc::EPOLL_CTL_ADD, nested.as_raw_fd(), &raw mut event) };
        assert_eq!(done, 0);
        let target = format!("of {}", nested.as_raw_fd());
        add(Ok(outer), Kind::Epoll, &target);
        add(Ok(nested), Kind::Epoll, "anon_inode:[eventpoll]");

        let (runs, dead, gone) = (sleeper(), sleeper(), sleeper());
        let pidfd = |pid: i32| Ok(raw::pidfd_open(pid).expect("a pidfd"));
        add(pidfd(runs), Kind::Pidfd, &format!("of process {runs}"));
        // Dead, and not waited for yet.
        add(pidfd(dead), Kind::Pidfd, &format!("of process {dead}"));
        add(pidfd(gone), Kind::Pidfd, "of a process that was reaped");
        reaped(gone);
        // SAFETY: our own child.
        unsafe { libc::kill(dead, libc::SIGKILL) };
        while !fs::read_to_string(format!("/proc/{dead}/stat")).expect("a zombie").contains(") Z") {
            thread::yield_now();
        }

        println!("not here: {missing:?}");
        assert!(all.len() >= 12, "{missing:?}");
        from_both_sides(|found, own| {
            for (fd, kind, target) in &all {
                let d = find(found, fd);
                assert_eq!((d.kind, &d.target), (*kind, target), "{d:?}");
                // Nobody waits for the end of one of these.
                assert_eq!(d.noexec, own.then_some(Fate::Kept), "{d:?}");
                assert!(!d.locked);
            }
            // The names are those of the table and of JSON.
            for name in
                ["fanotify", "io_uring", "userfaultfd", "signalfd", "timerfd", "memfd", "inotify", "epoll", "pidfd"]
            {
                let kinds = found.descriptors.iter().filter(|d| d.kind.to_string() == name).count();
                let in_table = found.to_string().lines().filter(|l| l.split_whitespace().nth(2) == Some(name)).count();
                let in_json = found.to_json().matches(&format!("\"kind\":\"{name}\"")).count();
                assert_eq!((in_table, in_json), (kinds, kinds), "{name}\n{found}");
            }
        });
        reaped(runs);
        assert_eq!(common::reap(dead, kit::SOON), common::Verdict::Signaled(libc::SIGKILL));
    });
}

/// What children share of a file's locks is said, and a child that keeps it is told of; a POSIX lock is no child's.
#[test]
fn locks_and_leases_are_seen() {
    isolated("locks_and_leases_are_seen", 60, || {
        let dir = Scratch::new("locks");
        let by_fcntl = |file: &File, command: i32, kind: i32| {
            // SAFETY: flock is plain data.
            let mut lock: libc::flock = unsafe { std::mem::zeroed() };
            lock.l_type = kind as libc::c_short;
            lock.l_start = 10;
            lock.l_len = 5;
            // SAFETY: `lock` is live.
            assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) }, 0);
        };
        let lease = |file: &File, kind: i32| {
            // SAFETY: integers only.
            let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
            assert_eq!(done, 0, "{}", io::Error::last_os_error());
        };
        let names =
            ["flock", "flock shared", "ofd", "ofd read", "posix", "write lease", "read lease", "none", "given back"];
        let create =
            |path: String| fs::OpenOptions::new().create_new(true).read(true).write(true).open(path).expect("created");
        let files = names.map(|name| create(dir.path(name)));
        files[0].lock().expect("locked");
        files[1].lock_shared().expect("locked");
        by_fcntl(&files[2], libc::F_OFD_SETLK, libc::F_WRLCK);
        by_fcntl(&files[3], libc::F_OFD_SETLK, libc::F_RDLCK);
        by_fcntl(&files[4], libc::F_SETLK, libc::F_WRLCK);
        lease(&files[5], libc::F_WRLCK);
        // A read lease wants a descriptor that reads only.
        let reads = File::open(dir.path("read lease")).expect("open");
        let [f0, f1, f2, f3, f4, f5, f6, f7, f8] = files;
        drop(f6);
        lease(&reads, libc::F_RDLCK);
        f8.lock().expect("locked");
        f8.unlock().expect("unlocked");
        // Two descriptors of one description share its lock; another description of the same file has none of it.
        let copy = f0.try_clone().expect("a copy");
        let other = File::open(dir.path("flock")).expect("open");

        let rows: [(&File, bool, &str); 11] = [
            (&f0, true, "rw L"),
            (&f1, true, "rw L"),
            (&f2, true, "rw L"),
            (&f3, true, "rw L"),
            (&f4, false, "rw"),
            (&f5, true, "rw L"),
            (&reads, true, "r L"),
            (&f7, false, "rw"),
            (&f8, false, "rw"),
            (&copy, true, "rw L"),
            (&other, false, "r"),
        ];
        from_both_sides(|found, own| {
            let table = found.to_string();
            for (file, locked, mode) in rows {
                let d = find(found, file);
                assert_eq!((d.kind, d.locked), (Kind::File, locked), "{d:?}");
                assert_eq!(d.noexec, own.then_some(if locked { Fate::Leaked } else { Fate::Kept }), "{d:?}");
                let row = format!("{:>3} {mode:<4} file ", d.number);
                assert!(table.lines().any(|line| line.starts_with(&row)), "{row:?} is not in\n{table}");
                assert!(found.to_json().contains(&format!("\"fd\":{},\"kind\":\"file\"", d.number)));
            }
        });
    });
}
