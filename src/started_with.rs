//! Which descriptors the program was started with: those that are open before anything of its own has run.

use crate::sys;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers below this are looked at.
pub(crate) const NOTED: RawFd = 1024;

static OPEN: [AtomicU64; NOTED as usize / 64] = [const { AtomicU64::new(0) }; NOTED as usize / 64];

/// At the start, once: four system calls.
pub(crate) fn note() {
    for (at, words) in OPEN.chunks(sys::ASKED / 64).enumerate() {
        let open = sys::which_are_open((at * sys::ASKED) as RawFd);
        for (word, bits) in words.iter().zip(open.chunks(64)) {
            word.store(bits.iter().rev().fold(0, |w, &bit| w << 1 | u64::from(bit)), Ordering::Relaxed);
        }
    }
}

/// `None` where that was not noted.
pub(crate) fn has(fd: RawFd) -> Option<bool> {
    let word = OPEN.get(usize::try_from(fd).ok()? / 64)?;
    Some(word.load(Ordering::Relaxed) >> (fd % 64) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_is_opened_later_is_not_there() {
        // As `cargo test` starts it.
        assert_eq!([0, 1, 2].map(has), [Some(true); 3]);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(has(file.as_raw_fd()), Some(false));
        assert_eq!([-1, NOTED].map(has), [None; 2]);
        assert_eq!(has(NOTED - 1), Some(false));
    }

    #[test]
    fn the_kernel_is_asked_one_way_or_the_other() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let open = sys::which_are_open(0);
        assert!(open[0] && open[file.as_raw_fd() as usize] && !open[sys::ASKED - 1]);
    }
}
