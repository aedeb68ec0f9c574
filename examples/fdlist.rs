//! Writes what descriptors this process was given into the file that its argument names, a line each: number, device, inode.
//!
//! What tests of `Command` start to see what a program finds. Without Rust's runtime, which opens /dev/null for standard streams
//! that are closed.

#![no_main]
#![allow(unsafe_code)]

use std::io::Write;

/// C's `main`.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> i32 {
    let mut found = Vec::new();
    for fd in 0..8192 {
        // SAFETY: stat is plain data.
        let mut st: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: `st` is live.
        if unsafe { libc::fstat(fd, &raw mut st) } == 0 {
            found.push((fd, st.st_dev, st.st_ino));
        }
    }
    let Some(path) = std::env::args_os().nth(1) else { return 2 };
    let Ok(mut file) = std::fs::File::create(path) else { return 3 };
    for (fd, device, inode) in found {
        if writeln!(file, "{fd} {device} {inode}").is_err() {
            return 4;
        }
    }
    0
}
