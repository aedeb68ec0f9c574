//! What the child of a dirty fork makes of a list that another thread was changing (G6): the copy is taken after each store of a
//! change, as the kernel might take it.

use super::*;

type Plain = HookList<u32>;

/// A list of the hooks 1 and 3, in this order.
fn one_and_three() -> (Plain, [*const Node<u32>; 2]) {
    let list = Plain::new();
    let nodes = [1, 3].map(|n| list.join(key(n, 1), n as u32));
    list.settle();
    (list, nodes)
}

/// Whom a fork prepares, and whom it finishes.
fn fork(list: &Plain) -> (Vec<u32>, Vec<u32>) {
    let (mut prepared, mut finished) = (Vec::new(), Vec::new());
    assert!(list.prepare(|n| {
        prepared.push(*n);
        Step::Prepared
    }));
    list.finish(|n| finished.push(*n));
    (prepared, finished)
}

/// Afterwards everything works as in a list that nobody had in his hands.
fn is_right_for(list: &Plain, mut expected: Vec<u32>) {
    list.reset();
    for _ in 0..2 {
        let (prepared, mut finished) = fork(list);
        finished.reverse();
        assert_eq!((&prepared, &finished), (&expected, &expected));
        assert_eq!(list.len() as usize, expected.len());
        assert!(!list.has_leftovers() || list.pending.load(Relaxed).is_null());
    }
    let last = list.join(key(9, 1), 9);
    expected.push(9);
    assert_eq!(fork(list).0, expected);
    // SAFETY: just joined.
    unsafe { list.leave(last, true) };
    list.settle();
    expected.pop();
    assert_eq!(fork(list).1, expected.into_iter().rev().collect::<Vec<_>>());
}

#[test]
fn a_hook_half_linked_takes_part() {
    // What `link_newcomers` and `link` store, in their order.
    for stores in 0..=5 {
        let (list, [one, three]) = one_and_three();
        let two = list.join(key(2, 1), 2);
        // SAFETY: nobody frees any of them here.
        let [one, two, three] = [one, two, three].map(|n| unsafe { &*n });
        let at = |n: &Node<u32>| std::ptr::from_ref(n).cast_mut();
        let steps: [&dyn Fn(); 5] = [
            &|| two.prev.store(at(one), Relaxed),
            &|| two.next.store(at(three), Relaxed),
            &|| list.linked.store(3, Relaxed),
            &|| one.next.store(at(two), Relaxed),
            &|| three.prev.store(at(two), Relaxed),
        ];
        steps[..stores].iter().for_each(|step| step());
        is_right_for(&list, vec![1, 2, 3]);
    }
}

#[test]
fn a_hook_half_unlinked_is_gone_or_not() {
    for stores in 0..=3 {
        let (list, [one, three]) = one_and_three();
        // SAFETY: from `join`; left once. Nobody frees it here.
        unsafe { list.leave(one, false) };
        // SAFETY: as above.
        let three = unsafe { &*three };
        let steps: [&dyn Fn(); 3] = [
            &|| list.head.store(std::ptr::from_ref(three).cast_mut(), Relaxed),
            &|| three.prev.store(null_mut(), Relaxed),
            &|| list.linked.store(1, Relaxed),
        ];
        steps[..stores].iter().for_each(|step| step());
        is_right_for(&list, vec![3]);
    }
}

#[test]
fn a_key_rises_with_the_rank_and_tells_it() {
    let ranks = [i32::MIN, -2, -1, 0, 1, i32::MAX];
    for sequence in [0, 1, u32::MAX] {
        assert_eq!(ranks.map(|r| rank(key(r, sequence))), ranks);
    }
    let keys = ranks.map(|r| [key(r, 2), key(r, 1)]).concat();
    assert!(keys.is_sorted_by(|a, b| a < b) && keys[0] > 0);
}

/// Of those who are pending the first may be linked already.
#[test]
fn newcomers_are_linked_once() {
    let (list, _) = one_and_three();
    for n in 4..8 {
        list.join(key(n, 1), n as u32);
    }
    let top = list.pending.load(Relaxed);
    // SAFETY: pending nodes are alive.
    list.link(unsafe { &*top });
    is_right_for(&list, vec![1, 3, 4, 5, 6, 7]);
}

#[test]
fn who_left_before_being_linked_is_freed() {
    let counted = std::sync::Arc::new(());
    let list = HookList::<std::sync::Arc<()>>::new();
    for n in 0..4 {
        let node = list.join(key(n, 1), std::sync::Arc::clone(&counted));
        if n % 2 == 0 {
            // SAFETY: just joined.
            unsafe { list.leave(node, true) };
        }
    }
    list.settle();
    list.collect(drop);
    assert_eq!((list.len(), std::sync::Arc::strong_count(&counted)), (2, 3));
}
