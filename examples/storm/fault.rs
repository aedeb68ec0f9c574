//! What the storm is there to find, done on purpose: so that one can see what it looks like, and that it is found.

#![allow(unsafe_code, clippy::disallowed_methods)]

use crate::board::Slot;
use crate::fds;
use std::io;
use std::os::fd::IntoRawFd;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A child waits for something that nobody does.
    Hang,
    /// A child panics.
    Crash,
    /// The half has a descriptor that is on no record.
    Leak,
    /// A child loses a descriptor that it needs.
    Close,
    /// A thread prints a line in two halves, with something in between.
    Tear,
    /// A thread says that it has printed a first and a last line, and has not; nor has a child its first.
    Lose,
}

const ALL: [(&str, Fault); 6] = [
    ("hang", Fault::Hang),
    ("crash", Fault::Crash),
    ("leak", Fault::Leak),
    ("close", Fault::Close),
    ("tear", Fault::Tear),
    ("lose", Fault::Lose),
];

impl Fault {
    pub(crate) fn name(self) -> &'static str {
        ALL.iter().find(|(_, fault)| *fault == self).map_or("", |(name, _)| name)
    }

    pub(crate) fn parse(text: &str) -> Result<Fault, String> {
        let found = ALL.iter().find(|(name, _)| *name == text);
        found.map(|(_, fault)| *fault).ok_or(format!("no fault is called \"{text}\""))
    }

    /// As the half begins, when it has noted what is open.
    pub(crate) fn in_the_half(self) -> io::Result<()> {
        if self == Fault::Leak {
            let _: i32 = fds::memfd(false)?.into_raw_fd();
        }
        Ok(())
    }

    /// In the first child of the first forker.
    pub(crate) fn in_a_child(self, slot: &Slot) {
        match self {
            Fault::Hang => loop {
                std::thread::park();
            },
            Fault::Crash => panic!("as it was told to"),
            Fault::Close => {
                // SAFETY: standard input, which nobody in this child owns or uses.
                let closed = unsafe { libc::close(0) };
                slot.note(if closed == 0 { "told to close 0" } else { "0 was gone already" });
            }
            _ => {}
        }
    }

    /// In the first busy thread, before its first line: how many lines it now claims to have printed. Says nothing else.
    pub(crate) fn in_a_thread(self, line: &str) -> usize {
        let (head, tail) = line.split_at(line.len() / 2);
        match self {
            Fault::Tear => println!("{head}torn {tail}"),
            Fault::Lose => {}
            _ => return 0,
        }
        1
    }
}
