//! Numbered lines: what everybody prints and logs, and the check that each arrived whole, once, in order.
//!
//! Each ends with a mark, and mostly with a newline: those without wait in standard output's buffer for the next one that has
//! it, and a child that inherits them there must neither print them again nor lose them.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Ends each line.
const MARK: u8 = b'|';

/// How carefork's own line begins in a child that was forked by foreign code after a waiting thread had opened the gate.
const OVERTAKEN: &str = "carefork: this child of a fork by foreign code is dirty: ";

/// What each child says on each of the two streams: two lines itself, one by each of its threads, one by its own child.
pub(crate) const PER_CHILD: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// `P`: a thread of the parent, by its number, its `n`th line. `C`: the `k`th line of the `n`th child of a forker.
    pub(crate) kind: char,
    pub(crate) who: usize,
    pub(crate) n: usize,
    pub(crate) k: u32,
    pub(crate) pid: u32,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Line { kind, who, n, k, pid } = self;
        // Lines of many lengths, each known from its numbers.
        let fill = (n * 31 + who * 7 + *k as usize * 13) % 48;
        write!(f, "{kind} {who:02} {n:08} {k} pid {pid} {:=<fill$}{}", "", char::from(MARK))
    }
}

impl Line {
    /// The line, if it is one to the last letter.
    fn parse(text: &str) -> Option<Line> {
        let mut words = text.split(' ');
        let line = Line {
            kind: words.next()?.parse().ok()?,
            who: words.next()?.parse().ok()?,
            n: words.next()?.parse().ok()?,
            k: words.next()?.parse().ok()?,
            pid: words.nth(1)?.parse().ok()?,
        };
        (line.to_string() == text).then_some(line)
    }
}

/// What was printed in truth, as the half itself says at its end.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    /// Lines by each thread.
    pub(crate) said: Vec<usize>,
    /// Children of each forker.
    pub(crate) forks: Vec<usize>,
    /// Children that ended early, of whom not everything can be expected.
    pub(crate) excused: Vec<(usize, usize)>,
}

/// One stream under check.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    parent: u32,
    next: Vec<usize>,
    /// For each forker's children a bit for each line seen.
    seen: Vec<Vec<u8>>,
    pub(crate) lines: usize,
    pub(crate) bad: usize,
    /// The first few bad ones, for the report.
    pub(crate) samples: Vec<String>,
}

impl Checker {
    pub(crate) fn new(parent: u32, threads: usize, forkers: usize) -> Checker {
        Checker { parent, next: vec![0; threads], seen: vec![Vec::new(); forkers], ..Checker::default() }
    }

    fn complain(&mut self, count: usize, what: impl FnOnce() -> String) {
        self.bad += count;
        if count > 0 && self.samples.len() < 5 {
            self.samples.push(what());
        }
    }

    fn take(&mut self, text: &[u8]) {
        let text = String::from_utf8_lossy(text);
        let text = text.trim_start_matches('\n');
        // Children of overtaken forks say so, each in one write, wherever that comes between two lines.
        let text = match text.split_once('\n') {
            Some((said, line)) if said.starts_with(OVERTAKEN) => return self.take(line.as_bytes()),
            _ => text,
        };
        self.lines += 1;
        match Line::parse(text) {
            Some(l) if l.kind == 'P' && l.who < self.next.len() && l.pid == self.parent => {
                let next = self.next[l.who];
                self.next[l.who] = next.max(l.n + 1);
                match l.n.cmp(&next) {
                    std::cmp::Ordering::Less => self.complain(1, || format!("doubled: {text}")),
                    std::cmp::Ordering::Equal => {}
                    std::cmp::Ordering::Greater => self.complain(l.n - next, || format!("missing before: {text}")),
                }
            }
            Some(l) if l.kind == 'C' && l.who < self.seen.len() && l.k < PER_CHILD => {
                let seen = &mut self.seen[l.who];
                if seen.len() <= l.n {
                    seen.resize(l.n + 1, 0);
                }
                let twice = seen[l.n] & 1 << l.k != 0;
                seen[l.n] |= 1 << l.k;
                self.complain(twice.into(), || format!("doubled: {text}"));
            }
            _ => self.complain(1, || format!("torn or strange: {text}")),
        }
    }

    /// Counts what never came.
    pub(crate) fn finish(&mut self, truth: &Truth) {
        for (who, &said) in truth.said.iter().enumerate() {
            let lost = said.saturating_sub(self.next[who]);
            self.complain(lost, || format!("missing: the last {lost} lines of thread {who}"));
        }
        for (who, &forks) in truth.forks.iter().enumerate() {
            if self.seen[who].len() < forks {
                self.seen[who].resize(forks, 0);
            }
            for n in (0..forks).filter(|&n| !truth.excused.contains(&(who, n))) {
                let missing = (PER_CHILD - self.seen[who][n].count_ones()) as usize;
                let seen = self.seen[who][n];
                self.complain(missing, || {
                    format!("missing: {missing} lines of child {n} of forker {who} (saw {seen:05b})")
                });
            }
        }
    }
}

/// How much of the file is given back to the disk at a time.
const CHUNK: u64 = 4 << 20;

/// Reads the file as it grows, until `done` and no more comes. A file, not a pipe: a reader that falls behind must not
/// make anybody wait who holds the lock of standard output.
pub(crate) fn follow(path: &Path, mut checker: Checker, done: &AtomicBool) -> std::io::Result<Checker> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let mut buf = vec![0; 1 << 18];
    let mut rest = VecDeque::new();
    let (mut read, mut freed) = (0u64, 0u64);
    loop {
        let last = done.load(Ordering::Acquire);
        let n = file.read(&mut buf)?;
        if n == 0 && last {
            break;
        }
        if n == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        read += n as u64;
        rest.extend(&buf[..n]);
        while let Some(end) = rest.iter().position(|&b| b == MARK) {
            let line: Vec<u8> = rest.drain(..=end).collect();
            checker.take(&line);
        }
        if read - freed >= 2 * CHUNK {
            free(&file, freed, CHUNK);
            freed += CHUNK;
        }
    }
    let rest = String::from_utf8_lossy(rest.make_contiguous()).into_owned();
    let rest: Vec<&str> = rest.lines().filter(|line| !line.is_empty() && !line.starts_with(OVERTAKEN)).collect();
    if !rest.is_empty() {
        checker.take(rest.join("\n").as_bytes());
    }
    Ok(checker)
}

/// A long storm prints a lot; where the file system cannot do this, it costs disk.
fn free(file: &File, from: u64, len: u64) {
    use nix::fcntl::{FallocateFlags, fallocate};
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (Ok(from), Ok(len)) = (from.try_into(), len.try_into()) else { return };
    _ = fallocate(file, mode, from, len);
}
