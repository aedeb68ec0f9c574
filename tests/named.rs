//! X4: descriptors by name, with the rules of QEMU's getfd, and their way over a socket.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;

use carefork::{BadName, CareFd, MAX_FDS, NamedFds, recv_fds, send_fds, send_named_fds};
use common::{Rng, isolated, self_fds};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::fs::File;
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::thread;
use std::time::Duration;

fn stream() -> (OwnedFd, OwnedFd) {
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

const KINDS: [fn() -> (OwnedFd, OwnedFd); 3] = [stream, packets, datagrams];

fn open_now() -> Vec<i32> {
    self_fds().as_slice().to_vec()
}

fn inode(fd: impl AsFd) -> u64 {
    File::from(fd.as_fd().try_clone_to_owned().expect("a duplicate")).metadata().expect("stat").ino()
}

/// The reader tells when the last writer is closed.
fn pipe() -> (PipeReader, CareFd<OwnedFd>) {
    let (reader, writer): (PipeReader, PipeWriter) = io::pipe().expect("a pipe");
    (reader, CareFd::new(OwnedFd::from(writer)).expect("open"))
}

fn is_closed(mut reader: PipeReader) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).expect("poll") == 1 && reader.read(&mut [0; 1]).expect("the end") == 0
}

fn put_error(table: &mut NamedFds, name: &str) -> BadName {
    let (reader, writer) = pipe();
    let number = writer.as_raw_fd();
    let refused = table.put(name, writer).expect_err("a bad name");
    assert_eq!(refused.fd.as_raw_fd(), number, "the descriptor comes back");
    let why = refused.why;
    assert_eq!(io::Error::from(refused).kind(), ErrorKind::InvalidInput);
    assert!(is_closed(reader));
    why
}

#[test]
fn the_table_keeps_qemus_rules() {
    isolated("the_table_keeps_qemus_rules", 20, || {
        let before = open_now();
        let mut table = NamedFds::new();
        assert!(table.is_empty() && table.take("disk").is_none() && table.get("disk").is_none());

        let (first, writer) = pipe();
        table.put("disk", writer).expect("a good name");
        let (second, writer) = pipe();
        let number = writer.as_raw_fd();
        table.put("disk", writer).expect("the same name");
        assert!(is_closed(first), "the old one is closed");
        assert_eq!((table.len(), table.get("disk").expect("there").as_raw_fd()), (1, number));

        let taken = table.take("disk").expect("there");
        assert_eq!(taken.as_raw_fd(), number);
        assert!(table.take("disk").is_none(), "use takes it out");
        drop(taken);
        assert!(is_closed(second));

        let (third, writer) = pipe();
        table.put("z", writer).expect("a good name");
        let (fourth, writer) = pipe();
        table.put("a net", writer).expect("a good name");
        assert_eq!(table.list().map(|(name, _)| name).collect::<Vec<_>>(), ["a net", "z"]);
        assert!(table.close("z") && !table.close("z"));
        assert!(is_closed(third));
        drop(table);
        assert!(is_closed(fourth), "the table owns them");
        assert_eq!(open_now(), before);
    });
}

#[test]
fn names_that_could_be_numbers_are_refused() {
    isolated("names_that_could_be_numbers_are_refused", 20, || {
        let mut table = NamedFds::new();
        assert_eq!(put_error(&mut table, ""), BadName::Empty);
        for number in ["7", "0x", "3disk"] {
            assert_eq!(put_error(&mut table, number), BadName::Number);
        }
        assert_eq!(put_error(&mut table, &"x".repeat(256)), BadName::TooLong);
        assert_eq!(put_error(&mut table, "a\nb"), BadName::Control(1));
        assert_eq!(put_error(&mut table, "a\0"), BadName::Control(1));
        for good in ["x".repeat(255).as_str(), "-7", "Platte 1", "ä", "fd7"] {
            table.put(good, pipe().1).expect("a good name");
        }
        assert_eq!(table.len(), 5);
    });
}

/// Tables of random names, some long, over all kinds of sockets.
#[test]
fn a_table_goes_over_a_socket_whole() {
    isolated("a_table_goes_over_a_socket_whole", 60, || {
        let before = open_now();
        let mut rng = Rng::new();
        for round in 0..60 {
            let (here, there) = KINDS[round % 3]();
            let n = *rng.pick(&[1, 2, 3, 10, 100, MAX_FDS]);
            let pipes: Vec<_> = (0..n.min(30)).map(|_| io::pipe().expect("a pipe")).collect();
            let long = *rng.pick(&[8, 8, 255]);
            let names: Vec<String> = (0..n).map(|i| format!("n{i}{}", "x".repeat(long))[..long].to_owned()).collect();
            let fds: Vec<(&str, BorrowedFd<'_>)> =
                names.iter().enumerate().map(|(i, name)| (name.as_str(), pipes[i % pipes.len()].0.as_fd())).collect();
            let mut table = NamedFds::new();
            table.put("n0", pipe().1).expect("a good name");
            thread::scope(|s| {
                // The largest frame is more than a datagram socket of other settings would hold.
                s.spawn(|| send_named_fds(&here, &fds).expect("sent"));
                assert_eq!(table.receive(&there).expect("received"), n);
            });
            assert_eq!(table.len(), n + 1);
            for (name, fd) in &fds {
                assert_eq!(inode(table.get(name).expect("there")), inode(fd));
            }
        }
        assert_eq!(open_now(), before);
    });
}

/// Several frames in a stream stay apart, and apart from what else goes over it.
#[test]
fn frames_of_a_stream_do_not_run_together() {
    isolated("frames_of_a_stream_do_not_run_together", 20, || {
        let (here, there) = stream();
        let (a, b) = io::pipe().expect("a pipe");
        send_named_fds(&here, &[("a", a.as_fd())]).expect("sent");
        send_named_fds(&here, &[("b", b.as_fd()), ("a", b.as_fd())]).expect("sent");
        send_fds(&here, b"text", &[]).expect("sent");
        drop(here);
        let mut table = NamedFds::new();
        assert_eq!(table.receive(&there).expect("the first"), 1);
        assert_eq!(inode(table.get("a").expect("there")), inode(&a));
        assert_eq!(table.receive(&there).expect("the second"), 2);
        assert_eq!(table.len(), 2);
        let mut text = [0; 8];
        assert_eq!(recv_fds(&there, &mut text, 0).expect("the rest").len, 4);
        assert_eq!(table.receive(&there).expect("the end"), 0);
    });
}

#[test]
fn what_cannot_be_sent_is_refused_before_anything_goes() {
    isolated("what_cannot_be_sent_is_refused_before_anything_goes", 20, || {
        let (here, there) = stream();
        let null = File::open("/dev/null").expect("/dev/null");
        let many: Vec<_> = (0..=MAX_FDS).map(|i| (format!("n{i}"), null.as_fd())).collect();
        let refused: [&[(&str, BorrowedFd<'_>)]; 5] = [
            &[],
            &[("", null.as_fd())],
            &[("3", null.as_fd())],
            &[("a", null.as_fd()), ("a", null.as_fd())],
            &[("a", null.as_fd()), ("a\n", null.as_fd())],
        ];
        for fds in refused {
            assert_eq!(send_named_fds(&here, fds).expect_err("bad").kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(send_named_fds(&here, &many).expect_err("too many").kind(), ErrorKind::InvalidInput);
        drop(here);
        assert_eq!(NamedFds::new().receive(&there).expect("nothing went"), 0);
    });
}

/// What a hostile or broken peer may send: an error each, the table as it was, nothing left open.
#[test]
fn broken_frames_change_nothing_and_leak_nothing() {
    isolated("broken_frames_change_nothing_and_leak_nothing", 60, || {
        let frame = |names: &[&[u8]], count: u16| {
            let body: Vec<u8> = names.iter().flat_map(|n| [&[n.len() as u8], *n].concat()).collect();
            [b"CFfd", &count.to_le_bytes()[..], &(body.len() as u16).to_le_bytes()[..], &body].concat()
        };
        let cases: Vec<(&str, Vec<u8>, usize)> = vec![
            ("other magic", b"XFfd\x01\0\x02\0\x01a".to_vec(), 1),
            ("no names", frame(&[], 0), 0),
            ("no names, one descriptor", frame(&[], 0), 1),
            ("more names than descriptors", frame(&[b"a", b"b"], 2), 1),
            ("fewer names than descriptors", frame(&[b"a"], 1), 2),
            ("count too high", frame(&[b"a"], 2), 1),
            ("count too low", frame(&[b"a", b"b"], 1), 2),
            ("a number", frame(&[b"7"], 1), 1),
            ("an empty name", frame(&[b""], 1), 1),
            ("twice", frame(&[b"a", b"a"], 2), 2),
            ("no text", frame(&[b"\xff\xfe"], 1), 1),
            ("a name cut short", b"CFfd\x01\0\x02\0\x09a".to_vec(), 1),
            ("half a header", b"CFf".to_vec(), 1),
            ("half a body", b"CFfd\x01\0\xff\0\x09a".to_vec(), 1),
        ];
        let null = File::open("/dev/null").expect("/dev/null");
        let before = open_now();
        for kind in KINDS {
            for (what, bytes, n) in &cases {
                let (here, there) = kind();
                let mut table = NamedFds::new();
                table.put("a", pipe().1).expect("a good name");
                let was = inode(table.get("a").expect("there"));
                let fds = vec![null.as_fd(); *n];
                send_fds(&here, bytes, &fds).expect("sent");
                // It dies half way, where the frame is not whole.
                drop(here);
                let error = table.receive(&there).expect_err(what);
                assert!(matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof), "{what}: {error}");
                assert_eq!((table.len(), inode(table.get("a").expect("there"))), (1, was), "{what}");
                drop((table, there));
                assert_eq!(open_now(), before, "{what}");
            }
        }
        // Descriptors after the first byte.
        let (here, there) = stream();
        send_fds(&here, b"CFfd\x01\0\x02\0", &[null.as_fd()]).expect("sent");
        send_fds(&here, b"\x01a", &[null.as_fd()]).expect("sent");
        assert_eq!(NamedFds::new().receive(&there).expect_err("not there").kind(), ErrorKind::InvalidData);
        drop((here, there));
        assert_eq!(open_now(), before);
    });
}

/// Bytes that come one by one, also on a non-blocking socket; and a peer that says nothing.
#[test]
fn a_slow_peer_is_waited_for_as_the_socket_says() {
    isolated("a_slow_peer_is_waited_for_as_the_socket_says", 20, || {
        let null = File::open("/dev/null").expect("/dev/null");
        for nonblocking in [false, true] {
            let (mut here, there) = UnixStream::pair().expect("a pair");
            there.set_nonblocking(nonblocking).expect("set");
            if nonblocking {
                let none = NamedFds::new().receive(&there).expect_err("nothing came");
                assert_eq!(none.kind(), ErrorKind::WouldBlock);
            }
            send_fds(&here, b"C", &[null.as_fd()]).expect("sent");
            thread::scope(|s| {
                s.spawn(|| {
                    for byte in b"Ffd\x01\0\x02\0\x01a" {
                        here.write_all(&[*byte]).expect("sent");
                        thread::yield_now();
                    }
                });
                let mut table = NamedFds::new();
                assert_eq!(table.receive(&there).expect("received"), 1);
                assert!(table.get("a").is_some());
            });
        }
        let before = open_now();
        let (here, there) = UnixStream::pair().expect("a pair");
        there.set_read_timeout(Some(Duration::from_millis(20))).expect("a time-out");
        send_fds(&here, b"CFfd", &[null.as_fd()]).expect("sent");
        assert_eq!(NamedFds::new().receive(&there).expect_err("late").kind(), ErrorKind::WouldBlock);
        drop((here, there));
        assert_eq!(open_now(), before);
    });
}

/// A non-blocking sender whose stream is full in the middle of a frame.
#[test]
fn a_frame_that_does_not_fit_at_once_is_sent_whole() {
    isolated("a_frame_that_does_not_fit_at_once_is_sent_whole", 20, || {
        let (here, there) = UnixStream::pair().expect("a pair");
        nix::sys::socket::setsockopt(&here, nix::sys::socket::sockopt::SndBuf, &4096).expect("SO_SNDBUF");
        here.set_nonblocking(true).expect("set");
        let null = File::open("/dev/null").expect("/dev/null");
        let names: Vec<String> = (0..MAX_FDS).map(|i| format!("n{i:03}{}", "x".repeat(251))).collect();
        let fds: Vec<_> = names.iter().map(|n| (n, null.as_fd())).collect();
        thread::scope(|s| {
            let sender = s.spawn(|| send_named_fds(&here, &fds));
            let mut table = NamedFds::new();
            assert_eq!(table.receive(&there).expect("received"), MAX_FDS);
            sender.join().expect("no panic").expect("sent");
        });
    });
}
