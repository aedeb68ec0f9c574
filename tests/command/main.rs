//! Programs started by `Command`: what they find, what is left when they cannot start, and what their starter keeps (X1, X2).

#![allow(
    unsafe_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../kit/mod.rs"]
mod kit;

mod anywhere;
mod children;
mod failing;
mod found;

use carefork::Command;

fn sh(script: &str) -> Command<'static> {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

#[track_caller]
fn text(command: &mut Command<'_>) -> String {
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8").trim_end().to_owned()
}

/// The same by a fork.
fn by_fork(command: &mut Command<'_>) {
    // SAFETY: does nothing.
    unsafe { command.pre_exec(|| Ok(())) };
}
