//! Load by wrk (Debian package wrk), for as long as something else goes on.

use super::Server;
use std::process::{Command, Stdio};

/// What wrk found: requests answered; errors on connecting, reading, writing, and time-outs.
#[derive(Debug)]
pub struct Load {
    pub requests: u64,
    /// Connect, read, write, time-out.
    pub errors: [u64; 4],
    /// Answers other than 2xx and 3xx.
    pub strange: bool,
}

/// 16 connections at work while `meanwhile` lasts; `header` goes with each request.
pub fn load(server: &mut Server, header: Option<&str>, meanwhile: impl FnOnce(&mut Server)) -> Load {
    let mut command = Command::new("wrk");
    // Longer than any test; a time-out that no busy machine reaches.
    command.args(["-t2", "-c16", "-d1h", "--timeout", "100s"]);
    if let Some(header) = header {
        command.args(["-H", header]);
    }
    let url = format!("http://{}/", server.address);
    let wrk = command.arg(url).stdout(Stdio::piped()).spawn().expect("wrk (Debian package wrk) is needed");
    let mut wrk = End(Some(wrk));
    meanwhile(server);
    let wrk = wrk.0.take().expect("until here");
    // It stops and tells what it saw.
    super::kill(wrk.id(), libc::SIGINT);
    let out = wrk.wait_with_output().expect("a status");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    println!("{text}");
    assert!(out.status.success(), "{text}");
    // A line that is there only if there were some.
    let errors = text.lines().find_map(|l| l.trim().strip_prefix("Socket errors:")).unwrap_or_default();
    let number = |name: &str| {
        let found = errors.split(',').find_map(|part| part.trim().strip_prefix(name));
        found.map_or(0, |n| n.trim().parse().expect("a number"))
    };
    let requests = text.lines().find_map(|l| l.trim().split_once(" requests in")).expect("a count").0;
    Load {
        requests: requests.parse().expect("a number"),
        errors: ["connect", "read", "write", "timeout"].map(number),
        strange: text.contains("Non-2xx"),
    }
}

impl Load {
    /// Not one request was refused, lost or answered wrongly.
    pub fn is_clean(&self) {
        assert!(self.requests > 100, "{self:?}");
        assert!(!self.strange && self.errors == [0; 4], "{self:?}");
    }
}

/// Where the test failed, wrk ends too.
struct End(Option<std::process::Child>);

impl Drop for End {
    fn drop(&mut self) {
        if let Some(mut wrk) = self.0.take() {
            drop(wrk.kill());
            drop(wrk.wait());
        }
    }
}
