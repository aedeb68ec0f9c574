//! Whether the gate stayed shut until a fork had copied all, said once, in a word that parent and child share (G11).
//!
//! The child's copy of the gate is no evidence: the kernel copies page by page, the gate early, and what a region wrote after a waiter
//! reopened the gate may be in the child where the reopening is not. (Rarely: a write to a page that is copied waits for the
//! whole copy, but for processors that still have the old translation.) So the first of them settles it for good: a waiter, before
//! it reopens; the child or the parent, each after the copy.
//!
//! | what it says of this fork | who says it                                   |
//! |---------------------------|-----------------------------------------------|
//! | `PENDING`                 | the forker, which commits                     |
//! | `WHOLE`                   | child or parent, instead of `PENDING`         |
//! | `LATE`                    | a waiter past the bound, instead of `PENDING` or before it |
//!
//! Pure protocol, as the gate. Words are reused by later forks, so each names its fork by the gate's word.

use crate::sync::{AtomicU32, Ordering};
use Ordering::{AcqRel, Acquire};

/// The gate's states, whose place `PENDING`, `WHOLE` and `LATE` take.
const STATE: u32 = 3;
const PENDING: u32 = 0;
const WHOLE: u32 = 1;
const LATE: u32 = 2;

fn says(shut: u32, what: u32) -> u32 {
    (shut & !STATE) | what
}

/// By the forker with the gate shut; false where a waiter has said `LATE` already.
pub(crate) fn commit(word: &AtomicU32, shut: u32) -> bool {
    let mut seen = word.load(Acquire);
    while seen != says(shut, LATE) {
        match word.compare_exchange(seen, says(shut, PENDING), AcqRel, Acquire) {
            Ok(_) => return true,
            Err(now) => seen = now,
        }
    }
    false
}

/// By a waiter that is about to reopen the gate.
pub(crate) fn late(word: &AtomicU32, shut: u32) {
    let mut seen = word.load(Acquire);
    // A slow waiter leaves the word of a later fork alone. A new page's zero is nobody's, however far the gate's word has come by then.
    let is_later = |seen: u32| seen != 0 && (seen & !STATE).wrapping_sub(shut & !STATE).cast_signed() > 0;
    while seen != says(shut, WHOLE) && !is_later(seen) {
        match word.compare_exchange(seen, says(shut, LATE), AcqRel, Acquire) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

/// By child or parent, each after the copy: whether it is whole. `None` where the word has gone to a later fork.
pub(crate) fn settle(word: &AtomicU32, shut: u32) -> Option<bool> {
    match word.compare_exchange(says(shut, PENDING), says(shut, WHOLE), AcqRel, Acquire) {
        Ok(_) => Some(true),
        Err(seen) if seen == says(shut, WHOLE) => Some(true),
        Err(seen) if seen == says(shut, LATE) => Some(false),
        Err(_) => None,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    /// The gate's words of shuttings all along their range, which wraps.
    const FORKS: [u32; 6] = [7, 0x3FFF_FFFF, 0x7FFF_FFFF, 0x8000_0007, 0xC000_000F, 0xFFFF_FFFF];

    #[test]
    fn a_waiter_is_first_in_a_page_that_is_new() {
        for shut in FORKS {
            let word = AtomicU32::new(0);
            late(&word, shut);
            assert!(!commit(&word, shut), "{shut:#x}");
            assert_eq!(settle(&word, shut), Some(false));
        }
    }

    #[test]
    fn whoever_says_it_first_is_believed() {
        for shut in FORKS {
            let word = AtomicU32::new(says(shut.wrapping_sub(8192), WHOLE));
            assert!(commit(&word, shut));
            assert_eq!(settle(&word, shut), Some(true));
            late(&word, shut);
            assert_eq!(settle(&word, shut), Some(true));

            assert!(commit(&word, shut.wrapping_add(8192)));
            late(&word, shut.wrapping_add(8192));
            assert_eq!(settle(&word, shut.wrapping_add(8192)), Some(false));
            assert_eq!(settle(&word, shut), None);
        }
    }

    #[test]
    fn a_slow_waiter_leaves_a_later_fork_alone() {
        for shut in FORKS {
            let later = shut.wrapping_add(8192);
            let word = AtomicU32::new(0);
            assert!(commit(&word, later));
            late(&word, shut);
            assert_eq!(word.load(Relaxed), says(later, PENDING));
        }
    }
}
