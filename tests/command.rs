//! Programs started by `Command`: what they find, and what is left when they cannot start (X1).

#![allow(unsafe_code, clippy::expect_used)]

mod common;

use carefork::{Command, CommandError, Stdio, Step};
use common::isolated;

#[test]
fn smoke() {
    isolated("smoke", 30, || {
        let output = Command::new("echo").arg("hello").output().expect("it starts");
        assert_eq!(output.stdout, b"hello\n");
        let e = Command::new("true").current_dir("/nonexistent").spawn().expect_err("no such directory");
        println!("{e}");
        let e = Command::new("no-such-program").spawn().expect_err("no such program");
        println!("{e}");
        assert!(matches!(e, CommandError::Step { step: Step::Exec(_), .. }));
        assert!(Command::new("cat").stdin(Stdio::null()).status().expect("cat").success());
    });
}
