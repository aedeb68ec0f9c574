//! K7, P2: a second copy of the library in one process, brought by a plugin, is noticed and works.

#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;

use common::*;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

#[test]
fn a_second_copy_is_reported_and_works() {
    // The test's own binary is in deps/, the plugin in examples/ beside it.
    let exe = std::env::current_exe().unwrap();
    let plugin = exe.parent().unwrap().parent().unwrap().join("examples/libplugin.so");
    if std::env::var_os("CAREFORK_ISOLATED").is_none() && !plugin.exists() {
        // `cargo test` has built it; `cargo test --test plugin` has not.
        let built = std::process::Command::new(env!("CARGO")).args(["build", "--example", "plugin"]).status();
        assert!(built.unwrap().success());
    }
    let outcome = run_isolated("a_second_copy_is_reported_and_works", 20, Setup::default(), || {
        assert_eq!(carefork::fork_generation(), 0);
        let path = CString::new(plugin.as_os_str().as_bytes()).unwrap();
        // SAFETY: a C string; the plugin's constructors are carefork's.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!library.is_null());
        // SAFETY: the handle is live.
        let symbol = unsafe { libc::dlsym(library, c"plugin_generation".as_ptr()) };
        assert!(!symbol.is_null());
        // SAFETY: the plugin defines it with this signature.
        let generation: extern "C" fn() -> u64 = unsafe { std::mem::transmute(symbol) };
        assert_eq!(generation(), 0);
        // Each copy's handlers run around a fork through either.
        // SAFETY: the closure calls into the plugin only.
        let mut child = unsafe { carefork::spawn(|| i32::from(generation() != 1)) }.unwrap();
        assert!(child.wait().unwrap().success());
    });
    assert_eq!(outcome.failure(), None);
    assert!(outcome.output.contains("two copies of carefork"), "{}", outcome.output);
}
