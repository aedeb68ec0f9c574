//! X5: descriptors handed to QEMU's programs (Debian package qemu-utils), which know nothing of carefork.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod peers;

use carefork::{CareFd, recv_fds, send_fds};
use common::{Rng, fds_of, isolated, status_of};
use nix::sys::signal::{SigSet, Signal};
use peers::nbd::Export;
use peers::qmp::Monitor;
use peers::{Dir, Program, Running};
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// With wait=on QEMU takes the client that is there before it goes on. With wait=off it takes it in one thread while another
/// begins to serve the monitor, and in QEMU 10.0 about three of a hundred clients got two greetings, or no answers.
const MONITOR: [&str; 4] = ["--chardev", "socket,fd=3,server=on,wait=on,id=mon", "--monitor", "chardev=mon"];

fn listen(path: &Path) -> CareFd<UnixListener> {
    CareFd::open_cloexec(|| UnixListener::bind(path)).expect("a listener")
}

/// An image of random bytes.
fn image(dir: &Dir) -> (String, Vec<u8>) {
    let mut rng = Rng::new();
    let bytes: Vec<u8> = (0..1 << 17).flat_map(|_| rng.next().to_le_bytes()).collect();
    let path = dir.file("image");
    std::fs::write(&path, &bytes).expect("an image");
    (path.to_str().expect("text").to_owned(), bytes)
}

/// What a program finds that was started clean: no signal blocked, none ignored, the standard streams and what was passed.
#[track_caller]
fn assert_clean(program: &Running, passed: &[i32]) {
    let pid = program.id() as i32;
    let status = status_of(pid).expect("it runs");
    // What QEMU itself blocks for its signalfd, and ignores.
    let own = [libc::SIGBUS, libc::SIGUSR1, libc::SIGALRM, libc::SIGIO].iter().fold(0, |set, s| set | 1u64 << (s - 1));
    assert_eq!(status.sig_blk & !own, 0, "blocked: {:#x}", status.sig_blk);
    assert_eq!(status.sig_ign & !(1 << (libc::SIGPIPE - 1)), 0, "ignored: {:#x}", status.sig_ign);
    // What is open at all: every socket, pipe and file is QEMU's own or was meant for it.
    let fds = fds_of(pid).expect("it runs");
    for number in passed {
        assert!(fds.iter().any(|(n, _)| n == number), "{number} is not there: {fds:?}");
    }
    let ours: Vec<_> = fds_of(std::process::id() as i32).expect("we run");
    for (number, target) in &fds {
        let of_ours = ours.iter().any(|(n, t)| *n > 2 && t == target);
        assert!(*number <= 2 || passed.contains(number) || !of_ours, "{number} is ours: {target:?}");
    }
}

/// Things that a program started carelessly would inherit: descriptors, a signal mask, ignored signals.
fn clutter() -> Vec<CareFd<File>> {
    let blocked: SigSet = [Signal::SIGTERM, Signal::SIGUSR2, Signal::SIGCHLD].into_iter().collect();
    blocked.thread_block().expect("blocked");
    for signal in [Signal::SIGHUP, Signal::SIGWINCH] {
        // SAFETY: no handler is lost.
        unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigIgn) }.expect("ignored");
    }
    (0..20).map(|_| CareFd::open(|| File::open("/dev/zero")).expect("/dev/zero")).collect()
}

/// The manager listens, the client is connected before QEMU exists, and gets its greeting.
#[test]
fn a_monitor_on_a_passed_socket_serves_who_came_early() {
    isolated("a_monitor_on_a_passed_socket_serves_who_came_early", 60, || {
        let dir = Dir::new("monitor");
        let path = dir.file("monitor");
        let _clutter = clutter();
        let listener = listen(&path);
        let early = UnixStream::connect(&path).expect("at once: somebody listens");
        let mut daemon = Program::new("qemu-storage-daemon").args(MONITOR).pass(listener.as_fd(), 3).start();
        drop(listener);
        let mut monitor = Monitor::open(early).expect("a greeting");
        assert!(monitor.greeting.starts_with(r#"{"QMP": {"version": {"qemu": {"#), "{}", monitor.greeting);
        assert_eq!(monitor.ask("qmp_capabilities").expect("an answer").trim_end(), r#"{"return": {}}"#);
        let chardevs = monitor.ask("query-chardev").expect("an answer");
        assert!(chardevs.contains(r#""label": "mon""#) && chardevs.contains(r#""frontend-open": true"#), "{chardevs}");
        assert_clean(&daemon, &[3]);
        // Its commands are checked: what it does not know is an error, and it goes on.
        assert!(monitor.ask("no-such-command").expect("an answer").contains("CommandNotFound"));
        assert_eq!(monitor.ask("quit").expect("an answer").trim_end(), r#"{"return": {}}"#);
        assert_eq!(daemon.end().code(), Some(0));
    });
}

/// QEMU dies of a bad option: the client that was connected before is told at once, and so is one that comes after.
#[test]
fn a_client_of_a_daemon_that_dies_is_told_at_once() {
    isolated("a_client_of_a_daemon_that_dies_is_told_at_once", 60, || {
        let dir = Dir::new("dies");
        let path = dir.file("monitor");
        let listener = listen(&path);
        let early = UnixStream::connect(&path).expect("somebody listens");
        let daemon = Program::new("qemu-storage-daemon")
            .args(MONITOR)
            .args(["--blockdev", "driver=no-such-driver,node-name=x"])
            .pass(listener.as_fd(), 3)
            .start();
        // As long as the manager listens too, a client would wait for somebody who never comes.
        drop(listener);
        let mut text = String::new();
        match { early }.read_to_string(&mut text) {
            // Closed in an accepted connection, or reset in the backlog.
            Ok(_) => assert!(text.is_empty() || text.starts_with(r#"{"QMP""#), "{text}"),
            Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset, "{e}"),
        }
        let (status, output) = daemon.output();
        assert_eq!(status.code(), Some(1), "{output}");
        assert!(output.contains("no-such-driver"), "{output}");
        assert_eq!(UnixStream::connect(&path).expect_err("nobody").kind(), ErrorKind::ConnectionRefused);
    });
}

#[track_caller]
fn assert_reads_back(export: &mut Export<impl io::Read + io::Write>, bytes: &[u8]) {
    assert_eq!(export.size, bytes.len() as u64);
    for (offset, length) in [(0, 512), (512, 1 << 16), (bytes.len() - 512, 512)] {
        let read = export.read(offset as u64, length as u32).expect("data");
        assert!(read == bytes[offset..offset + length], "other bytes at {offset}");
    }
}

/// qemu-nbd by socket activation: LISTEN_PID is the pid of the program that runs in the end.
#[test]
fn qemu_nbd_is_activated_and_serves_the_image() {
    isolated("qemu_nbd_is_activated_and_serves_the_image", 60, || {
        let dir = Dir::new("nbd");
        let (path, bytes) = image(&dir);
        let _clutter = clutter();

        let listener = listen(&dir.file("socket"));
        let early = UnixStream::connect(dir.file("socket")).expect("somebody listens");
        let mut server =
            Program::new("qemu-nbd").args(["-f", "raw", "-r", &path]).activate("nbd", listener.as_fd()).start();
        drop(listener);
        let mut export = Export::open(early, "").expect("an export");
        assert_reads_back(&mut export, &bytes);
        assert_clean(&server, &[3]);
        export.disconnect().expect("sent");
        // Not persistent: it ends with its last client.
        assert_eq!(server.end().code(), Some(0));

        let listener = CareFd::open_cloexec(|| TcpListener::bind("127.0.0.1:0")).expect("a listener");
        let early = TcpStream::connect(listener.local_addr().expect("its address")).expect("somebody listens");
        let mut server =
            Program::new("qemu-nbd").args(["-f", "raw", "-r", &path]).activate("nbd", listener.as_fd()).start();
        drop(listener);
        let mut export = Export::open(early, "").expect("an export");
        assert_reads_back(&mut export, &bytes);
        export.disconnect().expect("sent");
        assert_eq!(server.end().code(), Some(0));
    });
}

/// LISTEN_PID of another process: qemu-nbd does not take the socket, and says nothing to who waits there.
#[test]
fn qemu_nbd_minds_whom_the_variables_are_for() {
    isolated("qemu_nbd_minds_whom_the_variables_are_for", 60, || {
        let dir = Dir::new("nbd-pid");
        let (path, _) = image(&dir);
        let listener = listen(&dir.file("socket"));
        let early = UnixStream::connect(dir.file("socket")).expect("somebody listens");
        let own = dir.file("own");
        let server = Program::new("qemu-nbd")
            .args(["-f", "raw", "-r", "-k", own.to_str().expect("text"), &path])
            .assign("LISTEN_PID=1 LISTEN_FDS=1")
            .pass(listener.as_fd(), 3)
            .start();
        let stream = loop {
            match UnixStream::connect(&own) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
        };
        Export::open(stream, "").expect("an export").disconnect().expect("sent");
        let (status, output) = server.output();
        assert!(status.success(), "{output}");
        drop(listener);
        assert_eq!({ early }.read(&mut [0; 1]).expect_err("nobody served it").kind(), ErrorKind::ConnectionReset);
    });
}

/// The storage daemon serves the same on a second passed socket, told to by its monitor on the first.
#[test]
fn a_storage_daemon_exports_over_a_second_passed_socket() {
    isolated("a_storage_daemon_exports_over_a_second_passed_socket", 60, || {
        let dir = Dir::new("export");
        let (path, bytes) = image(&dir);
        let (control, data) = (listen(&dir.file("monitor")), listen(&dir.file("nbd")));
        let early = UnixStream::connect(dir.file("monitor")).expect("somebody listens");
        let reader = UnixStream::connect(dir.file("nbd")).expect("somebody listens");
        let daemon = Program::new("qemu-storage-daemon")
            .args(MONITOR)
            .args(["--blockdev", &format!("driver=file,node-name=disk,read-only=on,filename={path}")])
            .args(["--nbd-server", "addr.type=fd,addr.str=4"])
            // Each lies where the other is to go.
            .pass(control.as_fd(), 3)
            .pass(data.as_fd(), 4)
            .start();
        drop((control, data));
        let mut monitor = Monitor::open(early).expect("a greeting");
        monitor.ask("qmp_capabilities").expect("an answer");
        let export = r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "disk"}}"#;
        assert_eq!(monitor.ask(export).expect("an answer").trim_end(), r#"{"return": {}}"#);
        let mut export = Export::open(reader, "disk").expect("an export");
        assert_reads_back(&mut export, &bytes);
        assert_clean(&daemon, &[3, 4]);
        export.disconnect().expect("sent");
        let answer = monitor.ask("quit");
        let (status, output) = daemon.output();
        assert!(answer.is_ok() && status.success(), "{answer:?} {status} {output}");
    });
}

/// The example, as a user would run it.
#[test]
fn the_example_runs() {
    // The test's own binary is in deps/, the example in examples/ beside it.
    let exe = std::env::current_exe().expect("this binary");
    let example = exe.parent().and_then(Path::parent).expect("target/debug").join("examples/qemu_monitor");
    if !example.exists() {
        // `cargo test` has built it; `cargo test --test qemu` has not.
        let built = std::process::Command::new(env!("CARGO")).args(["build", "--example", "qemu_monitor"]).status();
        assert!(built.expect("cargo").success());
    }
    let (status, output) = Program::new(&example).start().output();
    assert!(status.success(), "{output}");
    for said in [r#"{"QMP": "#, r#"query-chardev: {"return": ["#, r#"quit: {"return": {}}"#, "exit status: 0"] {
        assert!(output.contains(said), "{said} is not in:\n{output}");
    }
    // Where the daemon is not to be had, it says so and leaves nothing behind.
    let (status, output) = Program::new(&example).env("PATH", "/nonexistent").start().output();
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(output.contains("qemu-storage-daemon"), "{output}");
}

// -- SCM_RIGHTS, both ways

/// A message of the vhost-user protocol, and the reply with what came along.
struct VhostUser(UnixStream);

impl VhostUser {
    fn send(&self, request: u32, payload: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) {
        let version = 1u32;
        let head = [request, version, payload.len() as u32].map(u32::to_le_bytes).concat();
        let message = [&head[..], payload].concat();
        assert_eq!(send_fds(&self.0, &message, fds).expect("sent"), message.len());
    }

    fn reply(&self, request: u32) -> (Vec<u8>, Vec<CareFd<std::os::fd::OwnedFd>>) {
        let mut head = [0; 12];
        let message = recv_fds(&self.0, &mut head, 8).expect("a reply");
        assert_eq!((message.len, message.truncated), (12, false));
        assert_eq!(head[..4], request.to_le_bytes());
        let mut payload = vec![0; u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize];
        (&self.0).read_exact(&mut payload).expect("the payload");
        (payload, message.fds)
    }
}

/// A block device in user space gets its interrupt by SCM_RIGHTS, and gives its memory away in the same way.
#[test]
fn a_vhost_user_device_takes_and_gives_descriptors() {
    isolated("a_vhost_user_device_takes_and_gives_descriptors", 60, || {
        const GET_FEATURES: u32 = 1;
        const SET_VRING_CALL: u32 = 13;
        const GET_INFLIGHT_FD: u32 = 31;
        let dir = Dir::new("vhost");
        let (path, _) = image(&dir);
        let listener = listen(&dir.file("vhost"));
        let device = VhostUser(UnixStream::connect(dir.file("vhost")).expect("somebody listens"));
        let daemon = Program::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("driver=file,node-name=disk,read-only=on,filename={path}")])
            .args(["--export", "type=vhost-user-blk,id=e,node-name=disk,addr.type=fd,addr.str=3"])
            .pass(listener.as_fd(), 3)
            .start();
        drop(listener);
        device.send(GET_FEATURES, &[], &[]);
        assert!(device.reply(GET_FEATURES).1.is_empty());

        // It gives: memory for requests under way, of the size that it says.
        let ask = [&[0u8; 16][..], &1u16.to_le_bytes(), &128u16.to_le_bytes(), &[0; 4]].concat();
        device.send(GET_INFLIGHT_FD, &ask, &[]);
        let (payload, mut fds) = device.reply(GET_INFLIGHT_FD);
        assert_eq!(fds.len(), 1);
        let memory: CareFd<File> = fds.remove(0).into();
        let size = u64::from_le_bytes(payload[..8].try_into().expect("eight"));
        assert!(size > 0 && memory.metadata().expect("stat").len() == size);

        // It takes: the pipe is open there, once the answer to the next request is here.
        let (_reader, writer) = io::pipe().expect("a pipe");
        let inode =
            File::from(writer.as_fd().try_clone_to_owned().expect("a duplicate")).metadata().expect("stat").ino();
        let target = format!("pipe:[{inode}]");
        let has = || fds_of(daemon.id() as i32).expect("it runs").iter().any(|(_, t)| t.as_os_str() == target.as_str());
        assert!(!has());
        device.send(SET_VRING_CALL, &0u64.to_le_bytes(), &[writer.as_fd()]);
        device.send(GET_FEATURES, &[], &[]);
        device.reply(GET_FEATURES);
        assert!(has());
    });
}
