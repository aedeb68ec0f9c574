//! K7, P2: a second copy of the library in one process, brought by a plugin, is noticed and works.

#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;

use common::*;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

/// The test's own binary is in deps/, the plugin in examples/ beside it.
fn plugin() -> CString {
    let exe = std::env::current_exe().unwrap();
    let plugin = exe.parent().unwrap().parent().unwrap().join("examples/libplugin.so");
    if std::env::var_os("CAREFORK_ISOLATED").is_none() && !plugin.exists() {
        // `cargo test` has built it; `cargo test --test plugin` has not.
        let built = std::process::Command::new(env!("CARGO")).args(["build", "--example", "plugin"]).status();
        assert!(built.unwrap().success());
    }
    CString::new(plugin.as_os_str().as_bytes()).unwrap()
}

type Generation = extern "C" fn() -> u64;

fn load(plugin: &CString) -> Generation {
    // SAFETY: a C string; the plugin's constructors are carefork's.
    let library = unsafe { libc::dlopen(plugin.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!library.is_null());
    // SAFETY: the handle is live.
    let symbol = unsafe { libc::dlsym(library, c"plugin_generation".as_ptr()) };
    assert!(!symbol.is_null());
    // SAFETY: the plugin defines it with this signature.
    unsafe { std::mem::transmute(symbol) }
}

#[test]
fn a_second_copy_is_reported_and_works() {
    let plugin = plugin();
    let outcome = run_isolated("a_second_copy_is_reported_and_works", 20, Setup::default(), || {
        assert_eq!(carefork::fork_generation(), 0);
        let generation = load(&plugin);
        assert_eq!(generation(), 0);
        // Each copy's handlers run around a fork through either.
        // SAFETY: the closure calls into the plugin only.
        let mut child = unsafe { carefork::spawn(|| i32::from(generation() != 1)) }.unwrap();
        assert!(child.wait().unwrap().success());
    });
    assert_eq!(outcome.failure(), None);
    assert_eq!(outcome.output.matches("two copies of carefork").count(), 1, "{}", outcome.output);
}

#[test]
fn a_child_that_loads_a_second_copy_is_told_too() {
    let plugin = plugin();
    let outcome = run_isolated("a_child_that_loads_a_second_copy_is_told_too", 20, Setup::default(), || {
        // SAFETY: this process has one thread.
        let mut child = unsafe { carefork::spawn(|| i32::from(load(&plugin)() != 0)) }.unwrap();
        assert!(child.wait().unwrap().success());
    });
    assert_eq!(outcome.failure(), None);
    assert_eq!(outcome.output.matches("two copies of carefork").count(), 1, "{}", outcome.output);
}
