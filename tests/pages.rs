//! What a fork costs besides the kernel's work: pages that either side writes and the kernel copies (G, ARCHITECTURE.md).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod kit;

use carefork::ForkOptions;
use common::isolated;
use kit::forked;
use std::fs;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;

/// Pages of the program's statics that only this process has: written since the fork by either side, each of which has its own then.
fn copied_statics(pid: u32) -> u64 {
    let exe = fs::read_link("/proc/self/exe").expect("a path");
    let exe = exe.to_str().expect("text");
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a process of this user");
    // SAFETY: takes a number.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).expect("a size");
    let (mut kib, mut counted, mut end) = (0, false, String::new());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().expect("a word");
        match first.split_once('-') {
            Some((from, to)) => {
                // The file's own, and what lies right behind it: .bss has no name. (The heap, where addresses are not random, has one.)
                counted = words.next() == Some("rw-p") && (line.ends_with(exe) || from == end && !line.ends_with(']'));
                if line.ends_with(exe) || counted {
                    end = to.to_owned();
                }
            }
            None if counted && first == "Private_Dirty:" => {
                kib += words.next().expect("a number").parse::<u64>().expect("a number");
            }
            None => {}
        }
    }
    assert_ne!(end, "", "the program's own mappings");
    kib * 1024 / page
}

/// Of the child of the third fork: the first two do what is done once.
fn copied() -> u64 {
    for last in [false, false, true] {
        let there = &kit::shared()[0];
        let mut child = forked(&ForkOptions::new(), |_| {
            there.store(1, SeqCst);
            loop {
                // SAFETY: takes nothing.
                unsafe { libc::pause() };
            }
        });
        while there.load(SeqCst) == 0 {
            thread::yield_now();
        }
        let pages = copied_statics(child.id());
        child.kill().expect("ours");
        child.wait().expect("a status");
        if last {
            return pages;
        }
    }
    unreachable!()
}

/// The gate's, with hooks and seats; and in the parent the word of the pidfd, a care-fd. With debug assertions that is remembered
/// a second time.
const AT_MOST: u64 = if cfg!(debug_assertions) { 3 } else { 2 };

#[test]
fn a_fork_copies_few_pages_of_statics() {
    isolated("a_fork_copies_few_pages_of_statics", 60, || {
        let pages = copied();
        assert!((1..=AT_MOST).contains(&pages), "{pages}");
    });
}

/// And those that std's two locks are on.
#[test]
fn std_streams_are_two_pages_more() {
    isolated("std_streams_are_two_pages_more", 60, || {
        let _guard = carefork::stdio::guard();
        let pages = copied();
        assert!((1..=AT_MOST + 2).contains(&pages), "{pages}");
    });
}
