//! The metrics flusher of `examples/metrics`: as a part of this program, and as a program of its own.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;

#[path = "../examples/metrics/metrics.rs"]
mod metrics;

use common::{Verdict, check, isolated, raw, reap};
use drive::{BOTH, SOON, until};
use metrics::{Metrics, file_of};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

/// A directory that is gone at the end.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let path = env::temp_dir().join(format!("carefork-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a directory");
        Dir(path)
    }

    fn written(&self, pid: i32) -> String {
        fs::read_to_string(file_of(&self.0, pid.unsigned_abs())).unwrap_or_default()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("removed");
    }
}

#[test]
fn each_process_writes_its_own() {
    isolated("each_process_writes_its_own", 60, || {
        let dir = Dir::new("metrics");
        let own = raw::getpid();
        {
            let metrics = Metrics::start(&dir.0, Duration::from_millis(1)).expect("a thread");
            metrics.count("a");
            metrics.count("b");
            metrics.count("a");
            // By itself, here and there.
            until(|| dir.written(own) == "a 2\nb 1\n");
            for kind in BOTH {
                let pid = kind.noexec(|| {
                    let own = raw::getpid();
                    check(1, dir.written(own).is_empty());
                    metrics.count("c");
                    until(|| dir.written(own) == "c 1\n");
                    metrics.count("c");
                    check(2, metrics.flush().is_ok() && dir.written(own) == "c 2\n");
                    0
                });
                assert_eq!(reap(pid, SOON), Verdict::Exited(0));
                assert_eq!(dir.written(pid), "c 2\n");
            }
            metrics.count("b");
        }
        assert_eq!(dir.written(own), "a 2\nb 2\n");
    });
}

#[test]
fn the_program() {
    // The test's own binary is in deps/, the example beside it.
    let exe = env::current_exe().expect("this binary");
    let program = exe.parent().and_then(|deps| deps.parent()).expect("deps/").join("examples/metrics");
    if !program.exists() {
        // `cargo test` has built it; `cargo test --test metrics` has not.
        let built = Command::new(env!("CARGO")).args(["build", "--example", "metrics"]).status();
        assert!(built.expect("cargo").success());
    }
    let dir = Dir::new("metrics-program");
    let output = Command::new("timeout").arg("600").arg(program).arg(&dir.0).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(said.matches("job 500\n").count(), 5, "{said}");
    assert_eq!(said.matches("request ").count(), 1, "{said}");
}
