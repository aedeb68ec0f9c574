//! This crate, and no other, is compiled with cfg(loom): no RUSTFLAGS are needed to run the models.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(loom)");
    println!("cargo:rustc-cfg=loom");
}
