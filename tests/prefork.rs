//! The pre-forking server under load, while its workers are ended, restarted and killed: nothing is refused, nothing lost.

#![allow(clippy::expect_used)]

mod preforking;

use preforking::client::{self, Connection, check, request};
use preforking::wrk::load;
use preforking::{Server, kill};
use std::thread;
use std::time::Duration;

const KILLS: usize = 18;

/// SIGHUP, and SIGTERM to single workers: nobody notices.
#[test]
fn restarts_refuse_and_lose_nobody() {
    let mut server = Server::start();
    // The first one opens the reaper's timer, for the grace period.
    server.signal(libc::SIGHUP);
    server.line(|line| line == "restarted");
    let before = server.idle_descriptors();
    let load = load(&mut server, None, |server| {
        for _ in 0..5 {
            server.busy_worker();
            let before: Vec<u32> = server.workers().iter().map(|w| w.0).collect();
            server.signal(libc::SIGHUP);
            server.line(|line| line == "restarted");
            let after = server.workers();
            assert!(!after.iter().any(|(pid, _)| before.contains(pid)), "{before:?} {after:?}");
            // One that leaves by itself is replaced.
            let one = server.busy_worker();
            kill(one, libc::SIGTERM);
            server.line(|line| line.starts_with(&format!("worker[{one}] exited with code")));
            server.until_whole();
        }
    });
    load.is_clean();
    assert_eq!(server.killed(), 0);
    server.has_leaked_nothing_since(&before);
    server.end();
}

/// Two of three by SIGKILL, and crashes.
fn kill_them(server: &mut Server) {
    for i in 0..KILLS {
        server.kill_busy(if i % 3 == 2 { libc::SIGSEGV } else { libc::SIGKILL });
    }
    server.until_whole();
}

fn killed_under_wrk(header: Option<&str>) {
    let mut server = Server::start();
    let before = server.idle_descriptors();
    load(&mut server, header, kill_them).is_clean();
    // Each death is told of once, and no zombie is left.
    assert_eq!(server.killed(), KILLS, "{:#?}", server.said);
    server.has_leaked_nothing_since(&before);
    server.end();
}

#[test]
fn killed_workers_lose_nothing_of_connections_that_stay() {
    killed_under_wrk(None);
}

#[test]
fn killed_workers_lose_nothing_of_connections_for_one_request() {
    killed_under_wrk(Some("Connection: close"));
}

/// The same by clients that look at each answer.
#[test]
fn killed_workers_answer_nothing_wrongly() {
    let mut server = Server::start();
    let before = server.idle_descriptors();
    let answers = client::ask(&mut server, &client::OF_EACH, kill_them);
    println!("{answers} answers");
    assert_eq!(server.killed(), KILLS, "{:#?}", server.said);
    server.has_leaked_nothing_since(&before);
    server.end();
}

/// A crash while SIGHUP replaces another worker: as many workers as before.
#[test]
fn a_crash_during_a_restart_is_made_up_for() {
    let mut server = Server::start();
    let before: Vec<u32> = server.workers().iter().map(|w| w.0).collect();
    server.signal(libc::SIGHUP);
    server.line(|line| line == "restarting");
    // The first one, which was told to leave, and those whose turn it is not yet.
    before.iter().for_each(|pid| kill(*pid, libc::SIGKILL));
    server.line(|line| line == "restarted");
    server.until_whole();
    assert!(!server.workers().iter().any(|(pid, _)| before.contains(pid)));
    server.end();
}

/// Who comes while there is no descriptor is let in when there is one again, also if no connection is closed meanwhile.
#[test]
fn a_shortage_of_descriptors_passes() {
    let server = Server::start();
    let before = server.idle_descriptors();
    let mut open = Vec::new();
    for path in ["/first", "/second"] {
        // As many as it polls, and fewer than it has open.
        server.limit_descriptors(8);
        let mut connection = Connection::new(&server.address);
        connection.write(&request(path, ""));
        // It tries in vain.
        thread::sleep(Duration::from_millis(300));
        server.limit_descriptors(u64::MAX);
        check(&connection.answer(), path, false);
        open.push(connection);
    }
    for connection in open {
        connection.shut();
        connection.end();
    }
    server.has_leaked_nothing_since(&before);
    server.end();
}

/// SIGTERM: who has asked is answered, and told that it was the last one.
#[test]
fn the_end_answers_who_has_asked() {
    let mut server = Server::start();
    let mut half = Connection::new(&server.address);
    let mut idle = Connection::new(&server.address);
    // The worker has both: an answer came.
    for (connection, path) in [(&mut half, "/half"), (&mut idle, "/idle")] {
        connection.write(&request(path, ""));
        check(&connection.answer(), path, false);
    }
    // A worker that crashes at the end leaves its connections to another one.
    let text = request("/begun", "");
    half.write(&text[..20]);
    server.signal(libc::SIGTERM);
    server.line(|line| line == "ending");
    server.workers().iter().for_each(|(pid, _)| kill(*pid, libc::SIGKILL));
    half.write(&text[20..]);
    check(&half.answer(), "/begun", true);
    half.end();
    idle.end();
    server.line(|line| line == "ended");
}

/// Ctrl-c, and systemd's SIGTERM to all: nobody is killed, and who has been asking is answered, if need be by one more worker.
#[test]
fn an_end_that_all_hear() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut server = Server::start();
        let mut asking = Connection::new(&server.address);
        asking.write(&request("/first", ""));
        check(&asking.answer(), "/first", false);
        server.until_whole();
        let text = request("/begun", "");
        asking.write(&text[..20]);
        server.signal_group(signal);
        server.line(|line| line == "ending");
        asking.write(&text[20..]);
        // A worker that takes over answers before it hears that it is to be the last one.
        let answer = asking.answer();
        check(&answer, "/begun", answer.last);
        asking.end();
        server.line(|line| line == "ended");
        let ends: Vec<_> = server.said.iter().filter(|line| line.starts_with("worker[")).collect();
        assert!((4..=5).contains(&ends.len()) && ends.iter().all(|line| line.contains("exited with")), "{ends:?}");
        assert!(signal == libc::SIGTERM || ends.iter().all(|line| line.contains("with code 0")), "{ends:?}");
    }
}

/// SIGTERM: who is silent is let go after a moment, who is in the middle of a request is not.
#[test]
fn the_end_waits_for_who_is_asking() {
    let mut server = Server::start();
    // On different workers, since each goes to the one with the least to do.
    let [mut half, idle] = ["/half", "/idle"].map(|path| {
        let mut connection = Connection::new(&server.address);
        connection.write(&request(path, ""));
        check(&connection.answer(), path, false);
        connection
    });
    let text = request("/begun", "");
    half.write(&text[..20]);
    server.signal(libc::SIGTERM);
    server.line(|line| line == "ending");
    idle.end();
    half.write(&text[20..]);
    check(&half.answer(), "/begun", true);
    half.end();
    server.line(|line| line == "ended");
}

/// What nobody will read does not make the kernel drop the last answers, which a slow client has yet to take.
#[test]
fn more_than_the_last_request_does_no_harm() {
    const REQUESTS: usize = 100;
    let server = Server::start();
    let mut connection = Connection::new(&server.address);
    let path = |n: usize| format!("/{n}?bytes=15000");
    let last = |n: usize| n == REQUESTS - 1;
    let header = |n: usize| if last(n) { "Connection: close\r\n" } else { "" };
    let all: String = (0..REQUESTS).map(|n| request(&path(n), header(n))).collect();
    connection.write(&(all + &request("/in-vain", "")));
    // The rest of it is with the kernel, the server has no more to do.
    connection.until_no_more_comes();
    for n in 0..REQUESTS {
        check(&connection.answer(), &path(n), last(n));
    }
    connection.end();
    server.end();
}
