//! Each example of an event loop, as it stands.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

#[path = "../examples/loop_calloop.rs"]
mod calloop_loop;
#[path = "../examples/loop_epoll.rs"]
mod epoll_loop;
#[path = "../examples/loop_mio.rs"]
mod mio_loop;
#[path = "../examples/loop_select.rs"]
mod select_loop;
#[path = "../examples/loop_tokio.rs"]
mod tokio_loop;

use common::{Refuse, Setup, isolated, isolated_with};
use std::error::Error;

fn ends_well(main: fn() -> Result<(), Box<dyn Error>>) {
    main().expect("the example works");
    kit::assert_no_child();
}

/// As on an old kernel.
fn without_pidfds() -> Setup {
    Setup { refuse: vec![Refuse::call(libc::SYS_pidfd_open, libc::ENOSYS)], ..Setup::default() }
}

#[test]
fn epoll() {
    isolated("epoll", 30, || ends_well(epoll_loop::main));
}

#[test]
fn epoll_without_pidfds() {
    isolated_with("epoll_without_pidfds", 30, without_pidfds(), || ends_well(epoll_loop::main));
}

#[test]
fn mio() {
    isolated("mio", 30, || ends_well(mio_loop::main));
}

#[test]
fn mio_without_pidfds() {
    isolated_with("mio_without_pidfds", 30, without_pidfds(), || ends_well(mio_loop::main));
}

#[test]
fn tokio() {
    isolated("tokio", 30, || ends_well(tokio_loop::main));
}

#[test]
fn tokio_without_pidfds() {
    isolated_with("tokio_without_pidfds", 30, without_pidfds(), || ends_well(tokio_loop::main));
}

#[test]
fn calloop() {
    isolated("calloop", 30, || ends_well(calloop_loop::main));
}

#[test]
fn select() {
    isolated("select", 30, || {
        select_loop::run(true).expect("the example works");
        kit::assert_no_child();
        // Named here, for the example is a program.
        let _: fn() -> Result<(), Box<dyn Error>> = select_loop::main;
    });
}
