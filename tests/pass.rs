//! X4: descriptors over Unix sockets. Nothing leaks, whatever the peer does.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;
mod peers;

use carefork::{CareFd, MAX_FDS, Received, no_forking, recv_fds, send_fds};
use common::{Setup, Verdict, check, isolated, isolated_with, self_fds};
use kit::{SOON, assert_gate_open, foreign};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use peers::Program;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

fn pair() -> (OwnedFd, OwnedFd) {
    let (a, b) = UnixStream::pair().expect("a pair");
    (a.into(), b.into())
}

fn packets() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("a seqpacket pair")
}

fn datagrams() -> (OwnedFd, OwnedFd) {
    let (a, b) = UnixDatagram::pair().expect("a pair");
    (a.into(), b.into())
}

const KINDS: [fn() -> (OwnedFd, OwnedFd); 3] = [pair, packets, datagrams];

fn files(n: usize) -> Vec<File> {
    (0..n).map(|_| File::open("/dev/null").expect("/dev/null")).collect()
}

fn borrowed(files: &[File]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(AsFd::as_fd).collect()
}

fn open_now() -> Vec<i32> {
    self_fds().as_slice().to_vec()
}

fn inode(fd: impl AsFd) -> (u64, u64) {
    let file = File::from(fd.as_fd().try_clone_to_owned().expect("a duplicate"));
    let data = file.metadata().expect("stat");
    (data.dev(), data.ino())
}

/// What a message's descriptors must be: close-on-exec, and care-fds.
fn assert_care(message: &Received) {
    for fd in &message.fds {
        let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFD).expect("open");
        assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
    }
    let fds: Vec<i32> = message.fds.iter().map(AsRawFd::as_raw_fd).collect();
    let pid = foreign(|| {
        // SAFETY: no care-fd is used in this child.
        check(90, unsafe { carefork::postfork_child_noexec() }.is_ok_and(|c| c.closed >= fds.len()));
        check(91, fds.iter().all(|&fd| !self_fds().contains(fd)));
        0
    });
    assert_eq!(common::reap(pid, SOON), Verdict::Exited(0));
}

#[test]
fn payload_and_descriptors_arrive_in_order_on_every_kind_of_socket() {
    isolated("payload_and_descriptors_arrive_in_order_on_every_kind_of_socket", 60, || {
        let before = open_now();
        for kind in KINDS {
            for n in [0, 1, 2, 10, 252, MAX_FDS] {
                let (here, there) = kind();
                // Distinct objects: each pipe has an inode of its own.
                let pipes: Vec<_> = (0..n.min(20)).map(|_| io::pipe().expect("a pipe")).collect();
                let fds: Vec<BorrowedFd<'_>> = (0..n).map(|i| pipes[i % pipes.len()].0.as_fd()).collect();
                assert_eq!(send_fds(&here, b"payload", &fds).expect("sent"), 7);
                let mut text = [0; 32];
                let message = recv_fds(&there, &mut text, n).expect("received");
                assert_eq!(&text[..message.len], b"payload");
                assert_eq!((message.fds.len(), message.truncated, message.payload_truncated), (n, false, false));
                for (sent, got) in fds.iter().zip(&message.fds) {
                    assert_eq!(inode(sent), inode(got));
                }
                if n < 20 {
                    assert_care(&message);
                }
            }
        }
        assert_eq!(open_now(), before);
        assert_gate_open();
    });
}

#[test]
fn the_254th_is_refused_with_the_reason() {
    isolated("the_254th_is_refused_with_the_reason", 20, || {
        let before = open_now();
        for kind in KINDS {
            let (here, there) = kind();
            let files = files(MAX_FDS + 1);
            let refused = send_fds(&here, b"x", &borrowed(&files)).expect_err("one too many");
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
            assert!(refused.to_string().contains("254") && refused.to_string().contains("253"), "{refused}");
            nonblocking(&there);
            assert_eq!(recv_fds(&there, &mut [0; 8], 9).expect_err("nothing was sent").kind(), ErrorKind::WouldBlock);
        }
        assert_eq!(open_now(), before);
    });
}

fn nonblocking(fd: &OwnedFd) {
    let flags = fcntl(fd, FcntlArg::F_GETFL).expect("flags");
    let flags = nix::fcntl::OFlag::from_bits_retain(flags) | nix::fcntl::OFlag::O_NONBLOCK;
    fcntl(fd, FcntlArg::F_SETFL(flags)).expect("flags");
}

#[test]
fn a_stream_needs_a_byte_a_packet_none() {
    isolated("a_stream_needs_a_byte_a_packet_none", 20, || {
        let file = files(1);
        let (here, _there) = pair();
        let refused = send_fds(&here, b"", &borrowed(&file)).expect_err("they would be lost");
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        for kind in [packets, datagrams] {
            let (here, there) = kind();
            assert_eq!(send_fds(&here, b"", &borrowed(&file)).expect("sent"), 0);
            let message = recv_fds(&there, &mut [0; 8], 1).expect("received");
            assert_eq!((message.len, message.fds.len()), (0, 1));
        }
    });
}

#[test]
fn more_than_expected_are_closed_and_said() {
    isolated("more_than_expected_are_closed_and_said", 60, || {
        let before = open_now();
        for kind in KINDS {
            for (sent, max) in [(1, 0), (2, 1), (3, 1), (4, 2), (MAX_FDS, 0), (MAX_FDS, 7), (MAX_FDS, 252)] {
                let (here, there) = kind();
                let files = files(sent);
                send_fds(&here, b"abc", &borrowed(&files)).expect("sent");
                let message = recv_fds(&there, &mut [0; 8], max).expect("received");
                assert_eq!((message.len, message.fds.len(), message.truncated), (3, max, true), "{sent} for {max}");
                assert_eq!(open_now().len(), before.len() + 2 + sent + max);
            }
        }
        assert_eq!(open_now(), before);
    });
}

/// MSG_CTRUNC by the kernel: it cannot install what came. What it could is handed over or closed.
#[test]
fn at_the_limit_of_descriptors_nothing_leaks() {
    isolated("at_the_limit_of_descriptors_nothing_leaks", 60, || {
        let before = open_now();
        for kind in KINDS {
            for room in [0, 1, 5] {
                let (here, there) = kind();
                let many = files(10);
                send_fds(&here, b"abc", &borrowed(&many)).expect("sent");
                drop(many);
                let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
                let used = open_now().len() as u64;
                setrlimit(Resource::RLIMIT_NOFILE, used + room, hard).expect("limit");
                let message = recv_fds(&there, &mut [0; 8], 10).expect("received");
                setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("limit");
                assert_eq!((message.len, message.fds.len(), message.truncated), (3, room as usize, true));
                assert_eq!(open_now().len() as u64, used + room);
            }
        }
        assert_eq!(open_now(), before);
    });
}

/// Credentials take room in the control data; a pidfd is a descriptor that nobody sent.
#[test]
fn what_the_kernel_adds_is_no_descriptor_of_the_sender() {
    isolated("what_the_kernel_adds_is_no_descriptor_of_the_sender", 60, || {
        const SO_PASSPIDFD: libc::c_int = 76;
        let before = open_now();
        for kind in KINDS {
            for n in [1, MAX_FDS] {
                let (here, there) = kind();
                setsockopt(&there, sockopt::PassCred, &true).expect("SO_PASSCRED");
                let on: libc::c_int = 1;
                let size = size_of_val(&on) as libc::socklen_t;
                let place = (&raw const on).cast();
                // SAFETY: `on` is live. An older kernel says ENOPROTOOPT, and adds nothing.
                unsafe { libc::setsockopt(there.as_raw_fd(), libc::SOL_SOCKET, SO_PASSPIDFD, place, size) };
                let files = files(n);
                send_fds(&here, b"abc", &borrowed(&files)).expect("sent");
                let message = recv_fds(&there, &mut [0; 8], n).expect("received");
                assert_eq!((message.fds.len(), message.truncated), (n, false));
                assert!(message.fds.iter().all(|fd| inode(fd) == inode(&files[0])));
                assert_eq!(open_now().len(), before.len() + 2 + 2 * n);
            }
        }
        assert_eq!(open_now(), before);
    });
}

#[test]
fn a_datagram_longer_than_the_buffer_says_so() {
    isolated("a_datagram_longer_than_the_buffer_says_so", 20, || {
        for kind in [packets, datagrams] {
            let (here, there) = kind();
            send_fds(&here, b"0123456789", &borrowed(&files(1))).expect("sent");
            let message = recv_fds(&there, &mut [0; 4], 1).expect("received");
            assert_eq!((message.len, message.fds.len()), (4, 1));
            assert!(message.payload_truncated && !message.truncated);
        }
        let (here, there) = pair();
        send_fds(&here, b"0123456789", &borrowed(&files(1))).expect("sent");
        let message = recv_fds(&there, &mut [0; 4], 1).expect("received");
        assert_eq!((message.len, message.fds.len(), message.payload_truncated), (4, 1, false));
        assert_eq!(recv_fds(&there, &mut [0; 8], 1).expect("the rest").len, 6);
    });
}

/// A peer that is gone: what it sent arrives, then the end; sending is an error and no signal.
#[test]
fn a_dead_peer_is_an_end_and_an_error() {
    isolated("a_dead_peer_is_an_end_and_an_error", 20, || {
        let before = open_now();
        for kind in [pair, packets] {
            let (here, there) = kind();
            let files = files(3);
            send_fds(&here, b"abc", &borrowed(&files)).expect("sent");
            drop(here);
            let message = recv_fds(&there, &mut [0; 8], 3).expect("what it had sent");
            assert_eq!((message.len, message.fds.len()), (3, 3));
            let end = recv_fds(&there, &mut [0; 8], 3).expect("the end");
            assert_eq!((end.len, end.fds.len(), end.truncated), (0, 0, false));
            // SIGPIPE to its default: it would end this process.
            // SAFETY: no handler is lost.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
            let gone = send_fds(&there, b"abc", &borrowed(&files)).expect_err("nobody there");
            assert_eq!(gone.kind(), ErrorKind::BrokenPipe);
        }
        // And a receiver that never looks: what is under way is closed with the socket. The pipe's reader sees the end.
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let (here, there) = pair();
        send_fds(&here, b"w", &[writer.as_fd()]).expect("sent");
        drop((writer, here, there));
        assert_eq!(reader.read(&mut [0; 1]).expect("the end"), 0);
        drop(reader);
        assert_eq!(open_now(), before);
    });
}

/// Nobody sends: a fork is not kept waiting, because the wait is outside of the region.
#[test]
fn waiting_for_a_message_does_not_keep_forks_waiting() {
    isolated("waiting_for_a_message_does_not_keep_forks_waiting", 60, || {
        for kind in KINDS {
            let (here, there) = kind();
            let tid = AtomicU32::new(0);
            thread::scope(|s| {
                let waiter = s.spawn(|| {
                    // SAFETY: takes nothing.
                    tid.store(unsafe { libc::gettid() } as u32, SeqCst);
                    recv_fds(&there, &mut [0; 8], 1).map(|m| (m.len, m.fds.len()))
                });
                wait_until_asleep(&tid);
                for _ in 0..20 {
                    let mut child = kit::forked(&carefork::ForkOptions::new().timeout(SOON), |_| 0);
                    assert_eq!(kit::code(&mut child), 0);
                }
                assert!(!waiter.is_finished());
                send_fds(&here, b"abc", &borrowed(&files(1))).expect("sent");
                assert_eq!(waiter.join().expect("no panic").expect("received"), (3, 1));
            });
        }
    });
}

/// Until the thread sleeps in poll, recvmsg or sendmsg.
fn wait_until_asleep(tid: &AtomicU32) {
    loop {
        let call = std::fs::read_to_string(format!("/proc/self/task/{}/syscall", tid.load(SeqCst))).unwrap_or_default();
        let number = call.split(' ').next().and_then(|n| n.parse().ok());
        let asleep_in = [
            #[cfg(target_arch = "x86_64")]
            libc::SYS_poll,
            libc::SYS_ppoll,
            libc::SYS_recvmsg,
            libc::SYS_sendmsg,
        ];
        if number.is_some_and(|n| asleep_in.contains(&n)) {
            return;
        }
        thread::yield_now();
    }
}

#[test]
fn waits_as_the_socket_is_set_to() {
    isolated("waits_as_the_socket_is_set_to", 20, || {
        let (_here, there) = UnixStream::pair().expect("a pair");
        there.set_read_timeout(Some(Duration::from_millis(20))).expect("a time-out");
        let late = recv_fds(&there, &mut [0; 8], 1).expect_err("nothing came");
        assert_eq!(late.kind(), ErrorKind::WouldBlock);
        there.set_read_timeout(None).expect("no time-out");
        there.set_nonblocking(true).expect("non-blocking");
        let none = recv_fds(&there, &mut [0; 8], 1).expect_err("nothing came");
        assert_eq!(none.kind(), ErrorKind::WouldBlock);
        let closed = recv_fds(File::open("/dev/null").expect("/dev/null"), &mut [0; 8], 1).expect_err("no socket");
        assert_eq!(closed.raw_os_error(), Some(libc::ENOTSOCK));
    });
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: i32) {
    SIGNALS.fetch_add(1, SeqCst);
}

/// Interrupts a sleeping thread five times, by a signal without SA_RESTART.
fn interrupt(tid: &AtomicU32) {
    for _ in 0..5 {
        wait_until_asleep(tid);
        let seen = SIGNALS.load(SeqCst);
        // SAFETY: takes no pointers.
        unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid.load(SeqCst), libc::SIGUSR1) };
        while SIGNALS.load(SeqCst) == seen {
            thread::yield_now();
        }
    }
}

#[test]
fn signals_interrupt_neither_side() {
    isolated("signals_interrupt_neither_side", 60, || {
        // SAFETY: all-zero is an empty mask and no flags: calls are interrupted.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = count as extern "C" fn(i32) as usize;
        // SAFETY: the handler is async-signal-safe.
        unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
        let (here, there) = packets();
        let (sender, receiver) = (AtomicU32::new(0), AtomicU32::new(0));
        // SAFETY: takes nothing.
        let tid = || unsafe { libc::gettid() } as u32;
        thread::scope(|s| {
            // More than fits.
            let send = s.spawn(|| {
                sender.store(tid(), SeqCst);
                let file = files(1);
                (0..300).try_for_each(|_| send_fds(&here, &[7; 4000], &borrowed(&file)).map(drop))
            });
            interrupt(&sender);
            let receive = s.spawn(|| {
                for _ in 0..300 {
                    let message = recv_fds(&there, &mut [0; 4000], 1)?;
                    assert_eq!((message.len, message.fds.len()), (4000, 1));
                }
                receiver.store(tid(), SeqCst);
                recv_fds(&there, &mut [0; 8], 1).map(|m| m.len)
            });
            send.join().expect("no panic").expect("sent");
            interrupt(&receiver);
            send_fds(&here, b"last", &[]).expect("sent");
            assert_eq!(receive.join().expect("no panic").expect("received"), 4);
        });
    });
}

/// Set when dropped, so that a failed assertion does not leave `thread::scope` waiting.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Forks in a storm of messages: no noexec child ever has a descriptor that came and was no care-fd.
#[test]
fn no_fork_sees_a_descriptor_between_its_arrival_and_its_registration() {
    isolated("no_fork_sees_a_descriptor_between_its_arrival_and_its_registration", 120, || {
        // Nothing is promised for the child of a dirty fork, and a busy machine may keep a thread from its processor for long.
        kit::freeze();
        let (here, there) = packets();
        // Both ends of a pipe are one inode; this one is alone.
        let mark = io::pipe().expect("a pipe").0;
        let mark_inode = inode(&mark);
        let sent_from = mark.as_raw_fd();
        let (stop, mark) = (AtomicBool::new(false), &mark);
        thread::scope(|s| {
            let told = &stop;
            let stop = Stop(told);
            // With the sender its end of the socket goes, and the receiver finds the end.
            s.spawn(move || {
                while !told.load(SeqCst) {
                    send_fds(&here, b"m", &[mark.as_fd(), mark.as_fd()]).expect("sent");
                }
            });
            s.spawn(|| while recv_fds(&there, &mut [0; 8], 2).expect("received").len > 0 {});
            for _ in 0..300 {
                let pid = foreign(|| {
                    // SAFETY: no care-fd is used in this child.
                    check(90, unsafe { carefork::postfork_child_noexec() }.is_ok());
                    for &fd in self_fds().as_slice() {
                        // SAFETY: stat is plain data.
                        let mut st: libc::stat = unsafe { std::mem::zeroed() };
                        // SAFETY: `st` is live.
                        unsafe { libc::fstat(fd, &raw mut st) };
                        check(91, fd == sent_from || (st.st_dev, st.st_ino) != mark_inode);
                    }
                    0
                });
                assert_eq!(common::reap(pid, SOON), Verdict::Exited(0));
            }
            drop(stop);
        });
    });
}

#[test]
fn a_stream_that_is_full_takes_a_part_and_says_how_much() {
    isolated("a_stream_that_is_full_takes_a_part_and_says_how_much", 20, || {
        let (here, there) = pair();
        nonblocking(&here);
        let big = vec![7; 8 << 20];
        let sent = send_fds(&here, &big, &borrowed(&files(2))).expect("a part");
        assert!(sent > 0 && sent < big.len());
        let again = send_fds(&here, &big[sent..], &[]).expect_err("full");
        assert_eq!(again.kind(), ErrorKind::WouldBlock);
        let mut got = vec![0; 8 << 20];
        let first = recv_fds(&there, &mut got[..10], 2).expect("the beginning");
        assert_eq!((first.len, first.fds.len()), (10, 2));
        let mut rest = 10;
        while rest < sent {
            rest += recv_fds(&there, &mut got[rest..], 2).expect("more").len;
        }
        assert!(rest == sent && got[..sent].iter().all(|&b| b == 7));
    });
}

/// The kernel drops descriptors that are sent by TCP and says nothing; builds with debug assertions do.
#[test]
fn other_sockets_carry_no_descriptors() {
    isolated("other_sockets_carry_no_descriptors", 20, || {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let mut client = TcpStream::connect(listener.local_addr().expect("its address")).expect("connected");
        let (server, _) = listener.accept().expect("accepted");
        client.write_all(b"abc").expect("sent");
        let message = recv_fds(&server, &mut [0; 8], 4).expect("received");
        assert_eq!((message.len, message.fds.len()), (3, 0));
        if cfg!(debug_assertions) {
            let refused = send_fds(&server, b"x", &borrowed(&files(1))).expect_err("they would be lost");
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(send_fds(&server, b"x", &[]).expect("bytes go"), 1);
    });
}

#[test]
fn a_received_descriptor_becomes_the_socket_it_is() {
    isolated("a_received_descriptor_becomes_the_socket_it_is", 20, || {
        let (here, there) = datagrams();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        send_fds(&here, b"", &[listener.as_fd(), listener.as_fd()]).expect("sent");
        let mut message = recv_fds(&there, &mut [], 2).expect("received");
        let wrong: Result<CareFd<TcpStream>, _> = message.fds.remove(0).try_into();
        let back = wrong.expect_err("it listens").fd;
        let theirs: CareFd<TcpListener> = back.try_into().expect("a listener");
        assert_eq!(theirs.local_addr().expect("one"), listener.local_addr().expect("one"));
        // Still the care-fd it was: a region can end, a child closes it.
        let fd = theirs.as_raw_fd();
        drop(no_forking());
        let pid = foreign(|| {
            // SAFETY: no care-fd is used in this child.
            check(90, unsafe { carefork::postfork_child_noexec() }.is_ok());
            check(91, theirs.get().is_none() && !self_fds().contains(fd));
            0
        });
        assert_eq!(common::reap(pid, SOON), Verdict::Exited(0));
    });
}

/// The registry has no memory for the number: the message is lost, and nothing stays open.
#[test]
fn what_cannot_be_registered_is_closed() {
    // The words of numbers below are there from the start.
    const MAPPED: u64 = 16_384;
    let setup = Setup { rlimits: vec![(libc::RLIMIT_NOFILE, MAPPED + 100)], ..Setup::default() };
    isolated_with("what_cannot_be_registered_is_closed", 20, setup, || {
        let before = open_now();
        drop(no_forking());
        let (here, there) = datagrams();
        send_fds(&here, b"abc", &borrowed(&files(3))).expect("sent");
        let mut below = files(1);
        while below.last().is_some_and(|f| f.as_raw_fd() as u64 + 1 < MAPPED) {
            below.push(below[0].try_clone().expect("room for it"));
        }
        // No more address space: the first care-fd up here finds no memory for its word.
        let (soft, hard) = getrlimit(Resource::RLIMIT_AS).expect("limit");
        setrlimit(Resource::RLIMIT_AS, 1 << 20, hard).expect("limit");
        let refused = recv_fds(&there, &mut [0; 8], 3);
        setrlimit(Resource::RLIMIT_AS, soft, hard).expect("limit");
        let refused = refused.expect_err("no memory");
        assert_eq!(refused.kind(), ErrorKind::OutOfMemory, "{refused}");
        drop((here, there, below));
        assert_eq!(open_now(), before);
    });
}

// -- another program

/// Python's socket module sends and receives by code of its own.
fn python<'a>(script: &str, socket: &'a OwnedFd) -> Program<'a> {
    let head = "import os, signal, socket; s = socket.socket(fileno=3)\n";
    Program::new("python3").args(["-c", &format!("{head}{script}")]).pass(socket.as_fd(), 3)
}

#[test]
fn python_gives_and_takes() {
    isolated("python_gives_and_takes", 60, || {
        let before = open_now();
        for kind in KINDS {
            let (here, there) = kind();
            let script = "r, w = os.pipe(); os.write(w, b'from python'); socket.send_fds(s, [b'a pipe'], [r, w])\n\
                          text, fds, flags, _ = socket.recv_fds(s, 64, 4)\n\
                          assert (text, len(fds), flags & socket.MSG_CTRUNC) == (b'back', 1, 0), (text, fds, flags)\n\
                          os.write(fds[0], b'via python')";
            let mut peer = python(script, &there).start();
            drop(there);
            let mut text = [0; 64];
            let mut message = recv_fds(&here, &mut text, 2).expect("received");
            assert_eq!((&text[..message.len], message.fds.len(), message.truncated), (&b"a pipe"[..], 2, false));
            let mut said = [0; 64];
            let n = File::from(message.fds.remove(0).into_inner()).read(&mut said).expect("read");
            assert_eq!(&said[..n], b"from python");
            drop(message);
            let (mut reader, writer) = io::pipe().expect("a pipe");
            send_fds(&here, b"back", &[writer.as_fd()]).expect("sent");
            drop(writer);
            let mut said = String::new();
            reader.read_to_string(&mut said).expect("read");
            assert_eq!(said, "via python");
            assert!(peer.end().success());
        }
        assert_eq!(open_now(), before);
    });
}

/// The peer sends the beginning of a frame with descriptors, and is killed.
#[test]
fn a_peer_that_is_killed_half_way_leaves_nothing_open() {
    isolated("a_peer_that_is_killed_half_way_leaves_nothing_open", 60, || {
        let before = open_now();
        let (here, there) = pair();
        let script =
            "socket.send_fds(s, [b'CFfd\\x02\\0\\xff\\0\\4name'], [0, 1]); os.kill(os.getpid(), signal.SIGKILL)";
        let mut peer = python(script, &there).start();
        drop(there);
        let died = carefork::NamedFds::new().receive(&here).expect_err("half a frame");
        assert_eq!(died.kind(), ErrorKind::UnexpectedEof, "{died}");
        assert!(!peer.end().success());
        drop((here, peer));
        assert_eq!(open_now(), before);
    });
}

/// Without room for a byte a stream gives nothing, which would be taken for its end.
#[test]
fn a_stream_is_not_read_without_room() {
    let (a, b) = pair();
    send_fds(&a, b"x", &[]).expect("sent");
    let refused = recv_fds(&b, &mut [], 1).expect_err("no room");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{refused}");
    assert_eq!(recv_fds(&b, &mut [0; 4], 1).expect("received").len, 1);
    let (a, b) = datagrams();
    send_fds(&a, b"", &[a.as_fd()]).expect("sent");
    assert_eq!(recv_fds(&b, &mut [], 1).expect("received").fds.len(), 1);
}
