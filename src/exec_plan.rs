//! Everything about a program's start that can be worked out beforehand, so that the child only makes system calls.
//!
//! Plain data: strings with their zero byte, arrays of pointers to them, the order in which descriptors are moved. What allocates
//! happens here, before the gate is shut.

use crate::signals::Signals;
use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::os::fd::RawFd;

/// What the child is to do; `exec_child` has the order, and the reasons for it.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) signals: Signals,
    pub(crate) session: bool,
    pub(crate) process_group: Option<i32>,
    pub(crate) moves: Moves,
    pub(crate) umask: Option<u32>,
    pub(crate) limits: Vec<Limit>,
    pub(crate) groups: Option<Vec<u32>>,
    pub(crate) gid: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) current_dir: Option<CString>,
    pub(crate) death_signal: Option<i32>,
    /// This process, for the child to see whether it has lost its parent already.
    pub(crate) parent: u32,
    pub(crate) argv: Strings,
    pub(crate) envp: Strings,
    /// What to exec, tried in this order.
    pub(crate) programs: Vec<CString>,
}

impl Plan {
    /// The child changes who it is, which the kernel notes in the memory that it shares (`dumpable.rs`).
    pub(crate) fn changes_user(&self) -> bool {
        self.uid.is_some() || self.gid.is_some()
    }
}

/// A resource limit, by the kernel's number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    pub(crate) resource: i32,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

// -- strings

/// C strings one after the other, and the array of pointers to them, which ends with NULL.
#[derive(Debug)]
pub(crate) struct Strings {
    /// What the pointers point into; never touched again but through them.
    _bytes: Vec<u8>,
    pointers: Vec<*mut u8>,
    pid: Option<*mut u8>,
}

impl Strings {
    pub(crate) fn as_ptr(&self) -> *const *const c_char {
        self.pointers.as_ptr().cast()
    }

    /// Where the child writes its number: room for ten digits and the zero byte.
    pub(crate) fn pid_place(&self) -> Option<*mut u8> {
        self.pid
    }
}

#[derive(Debug, Default)]
pub(crate) struct StringsBuilder {
    bytes: Vec<u8>,
    starts: Vec<usize>,
    pid: Option<usize>,
}

impl StringsBuilder {
    /// Adds a string made of `parts`, none of which has a zero byte.
    pub(crate) fn push(&mut self, parts: &[&[u8]]) {
        self.starts.push(self.bytes.len());
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        self.bytes.push(0);
    }

    /// Adds `name` and room for a process's number behind it.
    pub(crate) fn push_pid(&mut self, name: &[u8]) {
        self.push(&[name]);
        self.pid = Some(self.bytes.len() - 1);
        self.bytes.extend_from_slice(&[0; 10]);
    }

    pub(crate) fn finish(mut self) -> Strings {
        let base = self.bytes.as_mut_ptr();
        // Within `bytes`, whose place does not change any more.
        let at = |start: usize| base.wrapping_add(start);
        let pointers = self.starts.iter().map(|&s| at(s)).chain([std::ptr::null_mut()]).collect();
        Strings { pid: self.pid.map(at), pointers, _bytes: self.bytes }
    }
}

// -- descriptors

/// One step towards every descriptor being where it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Move {
    /// It is in its place: exec is to leave it open.
    Stay(RawFd),
    /// `to` becomes what `from` is.
    Dup { from: RawFd, to: RawFd },
    /// A copy of `from`, which is to be `to`, is put aside; one at a time.
    Aside { from: RawFd, to: RawFd },
    /// `to` becomes what was put aside, which was `from`.
    Back { from: RawFd, to: RawFd },
}

impl Move {
    /// What the caller asked for, for the error.
    pub(crate) fn asked(self) -> (RawFd, RawFd) {
        match self {
            Move::Stay(fd) => (fd, fd),
            Move::Dup { from, to } | Move::Aside { from, to } | Move::Back { from, to } => (from, to),
        }
    }
}

/// Descriptors on their way to their numbers, all at once in effect: what a number holds is read before it is written.
#[derive(Debug, Default)]
pub(crate) struct Moves {
    pub(crate) steps: Vec<Move>,
    /// Every number that the program is to find, sorted.
    pub(crate) targets: Vec<RawFd>,
}

impl Moves {
    /// `wanted` says which descriptor each number is to be.
    ///
    /// A number is written once nobody has to read it any more. Where none is left like that, the rest are rings, each number of
    /// which is read by exactly one other: one is put aside, and the ring is a chain.
    pub(crate) fn new(wanted: &BTreeMap<RawFd, RawFd>) -> Moves {
        let mut steps = Vec::with_capacity(wanted.len());
        let mut pending: BTreeMap<RawFd, RawFd> = BTreeMap::new();
        let mut readers: BTreeMap<RawFd, usize> = BTreeMap::new();
        for (&to, &from) in wanted {
            if to == from {
                steps.push(Move::Stay(to));
            } else {
                pending.insert(to, from);
                *readers.entry(from).or_default() += 1;
            }
        }
        let mut free: Vec<RawFd> = pending.keys().copied().filter(|to| !readers.contains_key(to)).collect();
        loop {
            while let Some(to) = free.pop() {
                let Some(from) = pending.remove(&to) else { continue };
                steps.push(Move::Dup { from, to });
                if let Some(n) = readers.get_mut(&from) {
                    *n -= 1;
                    if *n == 0 {
                        free.push(from);
                    }
                }
            }
            let Some((&first, _)) = pending.iter().next() else { break };
            let aside = steps.len();
            steps.push(Move::Aside { from: first, to: first });
            let mut to = first;
            while let Some(from) = pending.remove(&to) {
                if from == first {
                    steps[aside] = Move::Aside { from, to };
                    steps.push(Move::Back { from, to });
                } else {
                    steps.push(Move::Dup { from, to });
                }
                to = from;
            }
        }
        Moves { steps, targets: wanted.keys().copied().collect() }
    }
}

#[cfg(test)]
#[path = "exec_plan_tests.rs"]
mod tests;
