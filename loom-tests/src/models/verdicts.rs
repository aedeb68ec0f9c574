//! The word that says whether a child's copy is whole (G11), used again by a later fork while some are slow about an earlier one.

use super::*;
use crate::verdict;

/// Two forks with the same word: so much the gate moves on until it is used again. The second pair is where the count begins anew.
const REUSE: u32 = 8 * 1024;
const FIRST: [u32; 2] = [7, u32::MAX - 4];

/// Whatever a slow waiter and a slow child do about the first fork, the second is whole; and where parent and child of the first both
/// learn what became of it, they learn the same.
#[test]
fn of_a_fork_whose_word_is_used_again() {
    for first in FIRST {
        check(3, move || {
            let before = first.wrapping_sub(REUSE);
            let word = Arc::new(AtomicU32::new(0));
            assert!(verdict::commit(&word, before));
            assert_eq!(verdict::settle(&word, before), Some(true));

            let waiters = Arc::clone(&word);
            let waiter = thread::spawn(move || verdict::late(&waiters, first));
            let mut child = None;
            let mut parents = None;
            if verdict::commit(&word, first) {
                let childs = Arc::clone(&word);
                child = Some(thread::spawn(move || verdict::settle(&childs, first)));
                parents = verdict::settle(&word, first);
                assert!(parents.is_some(), "nobody has used the word since");
            }

            let second = first.wrapping_add(REUSE);
            assert!(verdict::commit(&word, second), "nobody is late for the second fork");
            assert_eq!(verdict::settle(&word, second), Some(true));
            waiter.join().unwrap();
            let childs = child.map(|child| child.join().unwrap());
            assert!(childs.is_none_or(|childs| childs.is_none() || childs == parents), "{childs:?}, {parents:?}");
            // The late ones have left it alone.
            assert_eq!(verdict::settle(&word, second), Some(true));
        });
    }
}
