//! A plugin with a copy of carefork of its own; `tests/plugin.rs` loads it with dlopen.

#![allow(unsafe_code)]

/// The generation that this copy of carefork counts.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_generation() -> u64 {
    let _region = carefork::no_forking();
    carefork::fork_generation()
}
