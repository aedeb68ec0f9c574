//! The program `storm`: what it is there to find it finds, and its exit status says so.

#![allow(clippy::expect_used)]

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Once;

/// The program, built if it is not there.
fn storm() -> PathBuf {
    // The test's own binary is in deps/, the program in examples/ beside it.
    let exe = std::env::current_exe().expect("the path of this test binary");
    // `cargo test` has built it; `cargo test --test storm` has not.
    static BUILT: Once = Once::new();
    BUILT.call_once(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--example", "storm"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("cargo runs").success());
    });
    exe.parent().and_then(|deps| deps.parent()).expect("two folders up").join("examples/storm")
}

fn run(args: &[&str]) -> Output {
    let short = ["--seconds", "1", "--threads", "2", "--forkers", "1"];
    Command::new(storm()).args(short).args(args).output().expect("it runs")
}

/// What one half came to, and the exit status.
fn half(which: &str, fault: &[&str]) -> (Value, i32) {
    let done = run(&[&["--json", "--only", which], fault].concat());
    let said = String::from_utf8(done.stdout).expect("UTF-8");
    let json: Value = serde_json::from_str(&said).expect("JSON");
    (json[which].clone(), done.status.code().expect("it exits"))
}

const COUNTS: [&str; 6] = ["refused", "hung", "crashed", "leaked_fds", "wrong_fds", "bad_lines"];

/// Which of the counts are not 0.
fn found(row: &Value) -> Vec<&'static str> {
    COUNTS.into_iter().filter(|&count| row[count].as_u64().expect("a number") != 0).collect()
}

#[test]
fn each_fault_is_found_and_nothing_else() {
    let faults = [
        ("hang", "hung"),
        ("crash", "crashed"),
        ("leak", "leaked_fds"),
        ("close", "wrong_fds"),
        ("tear", "bad_lines"),
        ("lose", "bad_lines"),
    ];
    for (fault, count) in faults {
        let (row, code) = half("carefork", &["--fault", fault]);
        assert_eq!((found(&row), code), (vec![count], 1), "{fault}: {row}");
        // A leak is in every child and in each one's own child. What is gone in a child is gone in its own child. A torn line is one,
        // and the one that it was is missing.
        match fault {
            "leak" => assert!(row[count].as_u64() >= row["forks"].as_u64(), "{row}"),
            // Between two lines, after the last, and a child's.
            "lose" => assert_eq!(row[count], 3, "{row}"),
            "close" | "tear" => assert_eq!(row[count], 2, "{fault}: {row}"),
            _ => assert_eq!(row[count], 1, "{fault}: {row}"),
        }
    }
}

#[test]
fn without_a_fault_all_is_zero() {
    let (row, code) = half("carefork", &[]);
    assert_eq!((found(&row), code), (vec![], 0), "{row}");
    assert!(row["forks"].as_u64() > Some(0) && row["lines"].as_u64() > Some(0) && row["finished"] == true, "{row}");
}

/// The exit status is about carefork's half.
#[test]
fn a_plain_half_may_hang() {
    let (row, code) = half("plain", &["--fault", "hang"]);
    assert!(row["hung"].as_u64() > Some(0), "{row}");
    assert_eq!(code, 0);
}

#[test]
fn the_table_says_what_is_wrong() {
    let done = run(&["--only", "carefork", "--fault", "hang"]);
    let table = String::from_utf8(done.stdout).expect("UTF-8");
    assert!(table.contains("carefork: not clean:\n") && table.contains(" hung: start\n"), "{table}");
}

#[test]
fn bad_flags_are_told_from_a_storm_that_failed() {
    for (flags, says) in [
        (&["--fault", "luck"][..], "no fault is called \"luck\""),
        (&["--fault"], "--fault wants a value"),
        (&["--threads", "0"], "--threads wants 1 to 64, not 0"),
        (&["--only", "both"], "\"both\" is neither carefork nor plain"),
        (&["--loud"], "unknown flag --loud"),
    ] {
        let done = run(flags);
        let said = String::from_utf8(done.stderr).expect("UTF-8");
        assert_eq!((done.status.code(), said.trim_end()), (Some(2), format!("storm: {says} (see --help)").as_str()));
    }
}
