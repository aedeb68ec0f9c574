//! Declares the cfg that loom-tests compiles the protocol files with.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(loom)");
}
