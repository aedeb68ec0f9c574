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

/// C6: a child that drops what tokio has registered leaves the epoll alone that it shares with its parent.
#[test]
fn a_child_leaves_tokios_epoll_alone() {
    isolated("a_child_leaves_tokios_epoll_alone", 30, || {
        let runtime = ::tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let word = &kit::shared()[0];
            let mut awaited = kit::forked(&carefork::ForkOptions::new(), |_| {
                while word.load(std::sync::atomic::Ordering::SeqCst) == 0 {
                    std::thread::yield_now();
                }
                7
            });
            let reaper = carefork::Reaper::new().expect("a reaper");
            let end = reaper.exit_of(kit::forked(&carefork::ForkOptions::new(), |_| 8)).expect("watched");
            let mut ended = Box::pin(awaited.ended());
            let mut run = Box::pin(reaper.run());
            // Polled, they are registered.
            ::tokio::select! {
                biased;
                _ = &mut ended => panic!("it waits for the word"),
                _ = &mut run => panic!("the reaper is open"),
                exit = end => assert_eq!(exit.expect("an end").code(), Some(8)),
            }
            // SAFETY: the child drops what it has, and exits.
            match unsafe { carefork::fork() }.expect("a fork") {
                carefork::Fork::Child(token) => {
                    drop((ended, run));
                    drop(token);
                    common::raw::exit_now(0);
                }
                carefork::Fork::Parent(mut child) => assert!(child.wait().expect("a status").success()),
            }
            let end = reaper.exit_of(kit::forked(&carefork::ForkOptions::new(), |_| 9)).expect("watched");
            let both = async {
                ::tokio::select! {
                    _ = &mut run => panic!("the reaper is open"),
                    exit = end => assert_eq!(exit.expect("an end").code(), Some(9)),
                }
                word.store(1, std::sync::atomic::Ordering::SeqCst);
                assert_eq!(ended.await.expect("an end").code(), Some(7));
            };
            ::tokio::time::timeout(kit::SOON, both).await.expect("the parent is told");
        });
    });
}

/// C6: nor does it get the end of a child that the parent had waited for.
#[test]
fn in_a_child_the_parents_children_do_not_end() {
    isolated("in_a_child_the_parents_children_do_not_end", 30, || {
        let ends = |child: &mut carefork::Child| {
            let runtime = ::tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
            runtime.block_on(child.ended())
        };
        let mut waited = kit::forked(&carefork::ForkOptions::new(), |_| 7);
        assert_eq!(kit::code(&mut waited), 7);
        let mut child = kit::forked(&carefork::ForkOptions::new(), |_| {
            i32::from(!ends(&mut waited).is_err_and(|e| e.raw_os_error() == Some(libc::ECHILD)))
        });
        assert_eq!(kit::code(&mut child), 0);
        assert_eq!(ends(&mut waited).expect("an end").code(), Some(7));
    });
}
