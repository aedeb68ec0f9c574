//! Workers of the pre-forking server that die at each step of a request: the next one goes on from there.

#![allow(clippy::expect_used)]

mod preforking;

use preforking::client::{self, Connection, Use, check, request};
use preforking::{Server, kill, until};

/// Workers die at `die` until there were enough of them, and every answer is right.
fn dying_at(die: &str, uses: &[Use]) {
    const DEATHS: usize = 15;
    let mut server = Server::dying(die);
    let answers = client::ask(&mut server, uses, |server| {
        while server.killed() < DEATHS {
            server.line(|line| line.contains("] killed by SIGKILL"));
        }
    });
    println!("{answers} answers while workers died at {die}");
    server.until_whole();
    server.end();
}

/// One death in so many passings that five in a row at the same request do not happen; and, with one client at a time, three in a
/// row: the successor, and its successor.
fn each_way(step: &str) {
    dying_at(&format!("{step}/50"), &client::OF_EACH);
    dying_at(&format!("{step}/7x3"), &[Use::Close]);
}

/// A step that each request has.
fn each_way_and_on_a_connection_that_stays(step: &str) {
    each_way(step);
    for how in [Use::KeepAlive, Use::Pipelined(5)] {
        dying_at(&format!("{step}/7x3"), &[how]);
    }
}

#[test]
fn before_anything_was_done() {
    each_way("received");
}

#[test]
fn with_the_request_looked_at() {
    each_way_and_on_a_connection_that_stays("peeked");
}

#[test]
fn with_the_answer_promised() {
    each_way_and_on_a_connection_that_stays("promised");
}

#[test]
fn with_half_of_the_answer_sent() {
    each_way_and_on_a_connection_that_stays("half");
}

#[test]
fn with_the_answer_sent() {
    each_way_and_on_a_connection_that_stays("sent");
}

#[test]
fn with_the_request_taken() {
    each_way_and_on_a_connection_that_stays("taken");
}

#[test]
fn with_the_promise_kept() {
    // Only where a connection stays is there anything to go on with.
    dying_at("kept/50", &client::OF_EACH);
    dying_at("kept/7x3", &[Use::KeepAlive]);
    dying_at("kept/7x3", &[Use::Pipelined(5)]);
}

#[test]
fn with_the_connection_shut_down() {
    each_way("shut");
}

#[test]
fn with_the_connection_closed() {
    each_way("closed");
}

/// A request that kills whoever looks at it gets an error; the server goes on.
#[test]
fn a_poisonous_request_is_given_up() {
    let mut server = Server::dying("peeked/1");
    server.until_whole();
    for poisoned in 1..=2 {
        let mut connection = Connection::new(&server.address);
        connection.write(&request("/", ""));
        let answer = connection.answer();
        assert_eq!((answer.status.as_str(), answer.last), ("500 Internal Server Error", true));
        connection.shut();
        connection.end();
        until(|| server.is_whole(), || format!("{:?}", server.workers()));
        while server.killed() < poisoned * 5 {
            server.line(|line| line.contains("] killed by SIGKILL"));
        }
    }
    server.end_with(10);
}

/// A connection that kills whoever is given it is closed; the server goes on.
#[test]
fn a_poisonous_connection_is_given_up() {
    let mut server = Server::dying("received/1");
    server.until_whole();
    Connection::new(&server.address).end();
    while server.killed() < 6 {
        server.line(|line| line.contains("] killed by SIGKILL"));
    }
    server.until_whole();
    server.end_with(6);
}

/// Workers that never begin: the server says so and ends, instead of forking for ever.
#[test]
fn a_broken_program_ends() {
    let server = Server::dying("begun/1");
    assert_eq!(server.status().code(), Some(1));
}

/// A client that asks and does not read: the worker stops within an answer, is killed there, and again, and nothing is missing.
#[test]
fn killed_in_the_middle_of_what_a_slow_client_does_not_read() {
    const REQUESTS: usize = 1500;
    let mut server = Server::start();
    let before = server.idle_descriptors();
    let mut connection = Connection::new(&server.address);
    let path = |n: usize| format!("/{n}?bytes=15000");
    let all: String = (0..REQUESTS).map(|n| request(&path(n), "")).collect();
    connection.write(&all);
    for _ in 0..3 {
        let worker = server.busy_worker();
        // It has answered as much as there is room for, and sleeps.
        connection.until_no_more_comes();
        kill(worker, libc::SIGKILL);
        server.line(|line| line.starts_with(&format!("worker[{worker}] killed by SIGKILL")));
    }
    for n in 0..REQUESTS {
        check(&connection.answer(), &path(n), false);
    }
    connection.shut();
    connection.end();
    server.has_leaked_nothing_since(&before);
    server.end();
}

/// Urgent data are bytes as any, and counted as any by who comes after.
#[test]
fn urgent_data() {
    let server = Server::dying("taken/2");
    let mut connection = Connection::new(&server.address);
    for n in 0..10 {
        let path = format!("/{n}");
        let text = request(&path, "");
        let (begin, end) = text.split_at(1);
        connection.write_urgent(begin);
        connection.write(end);
        check(&connection.answer(), &path, false);
    }
    connection.shut();
    connection.end();
    server.end();
}
