//! What the pre-forking server goes by when a worker is dead: the kernel's counters of a connection are exact, also while the peer is
//! at work.

#![allow(clippy::expect_used, clippy::cast_possible_truncation, unsafe_code)]

#[path = "../examples/prefork/counters.rs"]
mod counters;

use counters::Counters;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

/// Ours, as the server's are, and the peer's.
fn connection(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).expect("a listener");
    setsockopt(&listener, sockopt::OobInline, &true).expect("an option, inherited by connections");
    let peer = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
    let ours = listener.accept().expect("there is one").0;
    ours.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
    (ours, peer)
}

/// Waits for this much, without taking it.
fn until_there(ours: &TcpStream, bytes: usize) {
    let mut buffer = vec![0; bytes + 1];
    while ours.peek(&mut buffer).expect("something comes") < bytes {
        thread::yield_now();
    }
}

fn assert_since(begin: Counters, ours: &TcpStream, written: u64, taken: u64) {
    let now = Counters::of(ours).expect("counted");
    assert_eq!((now.written - begin.written, now.taken - begin.taken), (written, taken));
}

/// What is written counts at once, what has come counts when it was taken, a look does not count.
fn plain(address: &str) {
    let (mut ours, mut peer) = connection(address);
    let begin = Counters::of(&ours).expect("counted");
    assert_since(begin, &ours, 0, 0);
    peer.write_all(&[1; 1000]).expect("written");
    until_there(&ours, 1000);
    assert_since(begin, &ours, 0, 0);
    ours.read_exact(&mut [0; 300]).expect("there");
    assert_since(begin, &ours, 0, 300);
    ours.write_all(&[2; 5000]).expect("written");
    assert_since(begin, &ours, 5000, 300);
    peer.read_exact(&mut [0; 5000]).expect("there");
    assert_since(begin, &ours, 5000, 300);
}

#[test]
fn written_and_taken() {
    plain("127.0.0.1:0");
}

#[test]
fn over_ipv6() {
    // Where there is none, there is nothing to count.
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        plain("[::1]:0");
    }
}

/// The peer's FIN is none of the bytes, before and after the last ones are taken, alone or together with them.
#[test]
fn the_peers_end() {
    for together in [false, true] {
        let (mut ours, mut peer) = connection("127.0.0.1:0");
        let begin = Counters::of(&ours).expect("counted");
        if together {
            // Held back, so that the end comes in the same segment.
            cork(&peer);
        }
        peer.write_all(&[1; 100]).expect("written");
        if !together {
            until_there(&ours, 100);
        }
        peer.shutdown(Shutdown::Write).expect("shut");
        until_there(&ours, 100);
        until_ended(&ours);
        assert_since(begin, &ours, 0, 0);
        for taken in [40, 60] {
            ours.read_exact(&mut vec![0; taken]).expect("there");
            assert_since(begin, &ours, 0, if taken == 40 { 40 } else { 100 });
        }
        assert_eq!(ours.read(&mut [0; 10]).expect("the end"), 0);
        assert_since(begin, &ours, 0, 100);
        ours.write_all(&[2; 10]).expect("the other way is open");
        assert_since(begin, &ours, 10, 100);
    }
}

/// The peer's FIN is here, behind what is not taken yet.
fn until_ended(ours: &TcpStream) {
    let mut fd = libc::pollfd { fd: ours.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one live pollfd.
    assert_eq!(unsafe { libc::poll(&mut fd, 1, 60_000) }, 1);
}

fn cork(peer: &TcpStream) {
    let on: libc::c_int = 1;
    let (place, len) = (std::ptr::from_ref(&on).cast(), size_of_val(&on) as libc::socklen_t);
    // SAFETY: `place` has `len` bytes.
    assert_eq!(unsafe { libc::setsockopt(peer.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_CORK, place, len) }, 0);
}

/// Urgent data are bytes like any.
#[test]
fn urgent_data() {
    let (mut ours, mut peer) = connection("127.0.0.1:0");
    let begin = Counters::of(&ours).expect("counted");
    peer.write_all(&[1; 10]).expect("written");
    assert_eq!(send(peer.as_raw_fd(), b"!", MsgFlags::MSG_OOB).expect("sent"), 1);
    peer.write_all(&[1; 10]).expect("written");
    until_there(&ours, 10);
    assert_since(begin, &ours, 0, 0);
    ours.read_exact(&mut [0; 21]).expect("in line");
    assert_since(begin, &ours, 0, 21);
}

/// More than there is room for: what was written is what write said.
#[test]
fn a_peer_that_does_not_read() {
    let (mut ours, mut peer) = connection("127.0.0.1:0");
    let begin = Counters::of(&ours).expect("counted");
    ours.set_nonblocking(true).expect("an option");
    let mut written = 0;
    loop {
        match ours.write(&[3; 9999]) {
            Ok(n) => written += n as u64,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
        assert_since(begin, &ours, written, 0);
    }
    let rest = thread::spawn(move || std::io::copy(&mut peer, &mut std::io::sink()).expect("read"));
    // It acknowledges while this asks.
    for _ in 0..1000 {
        assert_since(begin, &ours, written, 0);
    }
    ours.shutdown(Shutdown::Write).expect("shut");
    assert_eq!(rest.join().expect("read"), written);
}

/// Both sides write and read as fast as they can, and the counters are asked between any two steps.
#[test]
fn while_everything_moves() {
    let (mut ours, peer) = connection(&format!("{}:0", Ipv4Addr::LOCALHOST));
    let begin = Counters::of(&ours).expect("counted");
    let mut writer = peer.try_clone().expect("a duplicate");
    let write = thread::spawn(move || while writer.write_all(&[4; 777]).is_ok() {});
    let mut reader = peer;
    let read = thread::spawn(move || drop(std::io::copy(&mut reader, &mut std::io::sink())));
    let (mut written, mut taken) = (0, 0);
    let mut buffer = [0; 4096];
    for i in 0..5000 {
        taken += ours.read(&mut buffer[..1 + i % 4096]).expect("more") as u64;
        assert_since(begin, &ours, written, taken);
        written += ours.write(&buffer[..1 + i * 7 % 4096]).expect("room") as u64;
        assert_since(begin, &ours, written, taken);
    }
    ours.shutdown(Shutdown::Both).expect("shut");
    drop(ours);
    write.join().expect("ended");
    read.join().expect("ended");
}
