//! A client that looks at each answer: the right one, whole, once. It panics at the first that is not.

use super::{LIMIT, Server};
use nix::sys::socket::{MsgFlags, send};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

/// How it uses its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// One for all requests, one at a time.
    KeepAlive,
    /// One for all requests, several under way.
    Pipelined(u32),
    /// One for each request.
    Close,
    /// One for each request, and nothing more to say after it: the request and the end come together.
    HalfClose,
}

/// Two of each kind.
pub const OF_EACH: [Use; 8] = {
    use Use::{Close, HalfClose, KeepAlive, Pipelined};
    [KeepAlive, KeepAlive, Pipelined(3), Pipelined(8), Close, Close, HalfClose, HalfClose]
};

pub struct Connection {
    stream: TcpStream,
    /// What has come and is not looked at yet.
    came: Vec<u8>,
}

/// An answer without error.
#[derive(Debug)]
pub struct Answer {
    pub status: String,
    pub body: String,
    /// "Connection: close".
    pub last: bool,
}

impl Connection {
    pub fn new(address: &str) -> Connection {
        let stream = TcpStream::connect(address).expect("nobody is refused");
        stream.set_read_timeout(Some(LIMIT)).expect("a time-out");
        stream.set_nodelay(true).expect("an option");
        Connection { stream, came: Vec::new() }
    }

    pub fn write(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).expect("the request is taken");
    }

    /// As TCP's urgent data.
    pub fn write_urgent(&mut self, text: &str) {
        let sent = send(self.stream.as_raw_fd(), text.as_bytes(), MsgFlags::MSG_OOB);
        assert_eq!(sent.expect("the request is taken"), text.len());
    }

    pub fn shut(&self) {
        self.stream.shutdown(Shutdown::Write).expect("still connected");
    }

    /// The next answer.
    pub fn answer(&mut self) -> Answer {
        let head = loop {
            match self.came.windows(4).position(|w| w == b"\r\n\r\n") {
                Some(at) => break at + 4,
                None => assert!(self.more(), "the end instead of an answer, after {:?}", self.text()),
            }
        };
        let head: Vec<u8> = self.came.drain(..head).collect();
        let head = String::from_utf8(head).expect("a head is text");
        let field = |name: &str| head.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        let length: usize = field("Content-Length:").and_then(|n| n.parse().ok()).expect("a length");
        while self.came.len() < length {
            assert!(self.more(), "the end within an answer: {head}");
        }
        let body = String::from_utf8(self.came.drain(..length).collect()).expect("a body is text");
        let status =
            head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.lines().next()).expect("an answer begins here");
        Answer { status: status.to_owned(), body, last: field("Connection:") == Some("close") }
    }

    /// Until the peer has sent all that it can while nobody reads; or so it seems.
    pub fn until_no_more_comes(&self) {
        let unread = || {
            let mut n: libc::c_int = 0;
            // SAFETY: the question is answered by one int.
            assert_eq!(unsafe { libc::ioctl(self.stream.as_raw_fd(), libc::FIONREAD, &mut n) }, 0);
            n
        };
        let (mut last, mut same) = (0, 0);
        while same < 20 {
            thread::sleep(Duration::from_millis(10));
            let now = unread();
            (last, same) = (now, if now == last && now > 0 { same + 1 } else { 0 });
        }
    }

    /// Nothing more comes.
    pub fn end(mut self) {
        let more = self.more();
        assert!(!more, "more than was asked for: {:?}", self.text());
    }

    fn more(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => panic!("{e}, after {:?}", self.text()),
                Ok(n) => {
                    self.came.extend(&buffer[..n]);
                    return n > 0;
                }
            }
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.came).into_owned()
    }
}

pub fn request(path: &str, header: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: here\r\n{header}\r\n")
}

/// The answer to the request with this path, and to no other.
pub fn check(answer: &Answer, path: &str, last: bool) {
    assert_eq!((answer.status.as_str(), answer.last), ("200 OK", last), "{path}: {answer:?}");
    let (said, rest) = answer.body.split_once(" by worker ").expect("what was asked");
    assert_eq!(said, path);
    let (pid, filling) = rest.split_once('\n').expect("a line");
    assert!(pid.parse::<u32>().is_ok(), "{path}: {pid}");
    let wanted = path.split_once("?bytes=").map_or(0, |(_, n)| n.parse().expect("a number"));
    assert_eq!(answer.body.len(), wanted.max(said.len() + 12 + pid.len()), "{path}");
    assert!(filling.bytes().all(|b| b == b'.'), "{path}");
}

/// One of many: asks until `stop`, and counts the answers.
fn one(address: &str, how: Use, client: usize, stop: &AtomicBool, answers: &AtomicU64) {
    let mut number = 0;
    let mut path = || {
        number += 1;
        // Short ones and long ones.
        format!("/{client}-{number}?bytes={}", [0, 100, 3000, 9000][number % 4])
    };
    let mut kept = Connection::new(address);
    while !stop.load(Relaxed) {
        let several = if let Use::Pipelined(several) = how { several } else { 1 };
        let paths: Vec<String> = (0..several).map(|_| path()).collect();
        let once = matches!(how, Use::Close | Use::HalfClose);
        let header = if how == Use::Close { "Connection: close\r\n" } else { "" };
        let text: String = paths.iter().map(|path| request(path, header)).collect();
        let mut single = once.then(|| Connection::new(address));
        let connection = single.as_mut().unwrap_or(&mut kept);
        connection.write(&text);
        if how == Use::HalfClose {
            connection.shut();
        }
        for path in &paths {
            check(&connection.answer(), path, how == Use::Close);
            answers.fetch_add(1, Relaxed);
        }
        if let Some(single) = single {
            single.end();
        }
    }
    kept.shut();
    kept.end();
}

/// A client for each of `uses` at work while `meanwhile` lasts; how many answers they had.
pub fn ask(server: &mut Server, uses: &[Use], meanwhile: impl FnOnce(&mut Server)) -> u64 {
    let (stop, answers) = (&AtomicBool::new(false), &AtomicU64::new(0));
    let (address, failed) = (server.address.clone(), Arc::clone(&server.failed));
    let (address, failed) = (&address, &failed);
    thread::scope(|scope| {
        let work = |(client, how)| {
            scope.spawn(move || {
                let _failed = SetOnPanic(failed);
                one(address, how, client, stop, answers);
            })
        };
        let clients: Vec<_> = uses.iter().copied().enumerate().map(work).collect();
        let stop = SetOnDrop(stop);
        meanwhile(server);
        drop(stop);
        for client in clients {
            client.join().expect("each answer is right");
        }
    });
    answers.load(Relaxed)
}

/// Also when `meanwhile` panics, the clients end.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// When a client panics, nobody waits for what the server says.
struct SetOnPanic<'a>(&'a AtomicBool);

impl Drop for SetOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Relaxed);
        }
    }
}
