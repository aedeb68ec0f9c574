//! On musl: what the library takes for granted of libc's fork, by a C program (`musl-tools` of Debian builds it).

use std::process::Command;

#[test]
fn musl_runs_at_fork_handlers_as_glibc_does() {
    let out = std::env::temp_dir().join(format!("carefork-musl-{}", std::process::id()));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/musl/atfork.c");
    let built = Command::new("musl-gcc").args(["-Wall", "-static", "-o"]).arg(&out).arg(source).status();
    assert!(built.expect("musl-gcc: install Debian's musl-tools").success());
    let status = Command::new(&out).status().unwrap();
    std::fs::remove_file(&out).unwrap();
    // Each way to fail has an exit code of its own: see the program. It needs root, to become somebody with a limit.
    assert_eq!(status.code(), Some(0));
}
