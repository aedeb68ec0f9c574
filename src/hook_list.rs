//! The hooks in lock order, and how far a fork has come along them (H1, H2).
//!
//! Pure protocol, compiled by loom. A doubly linked list in rank order that only the role's holder changes or walks; newcomers
//! wait in a stack, and whoever leaves is marked and unlinked by the next holder. So nothing is allocated or freed by a fork.
//!
//! # Invariants
//! - Linked nodes are changed and walked by the holder of the gate's role only.
//! - `progress` is the key of the last hook whose prepare began and whose undo, parent or child has not returned; 0 if none.
//!   Keys rise along the list, so a hook is in a fork's hands exactly while `progress >= key`.
//! - The way forward along the list is whole at any instant, and who is pending stays so until linked: the child of a dirty fork gets
//!   both as another thread left them half way through a change, and makes everything else anew from them (`reset`).
//! - A marked node is not called again once `progress < key` was seen after the mark: the forker stores `progress`, fences
//!   and looks at the mark; the one who leaves stores the mark, fences and looks at `progress`.

#![allow(unsafe_code)]

use crate::sync::{
    self, ANY, AtomicPtr, AtomicU32, AtomicU64, Ordering, Wake, fault, fence, fence_by_other_means, heavy_fence,
    light_fence,
};
use std::ptr::null_mut;

use Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

/// What each step of the way back reads comes first. Not aligned to cache lines: few allocators put aligned memory close together, and
/// nodes that lie close are fetched ahead anyway.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Node<T> {
    pub(crate) key: u64,
    prev: AtomicPtr<Node<T>>,
    /// The node `AHEAD` steps before this one and the one as many after it, as they were when last looked at: to be fetched into the
    /// cache in time, and for nothing else. They may be gone.
    before: AtomicPtr<Node<T>>,
    /// The number of the fork that this hook did not prepare for and must not be called by.
    skipped: AtomicU32,
    gone: AtomicU32,
    pub(crate) value: T,
    next: AtomicPtr<Node<T>>,
    /// The next in `pending`, until linked and no longer there; then the counterpart of `before`.
    below: AtomicPtr<Node<T>>,
}

/// How many nodes ahead memory is fetched.
const AHEAD: usize = 16;

/// The place in lock order of a hook: rising rank, among equals the newest first (H2). Never 0.
pub(crate) fn key(rank: i32, sequence: u32) -> u64 {
    let rank = u64::from(rank.cast_unsigned() ^ 0x8000_0000);
    rank << 32 | u64::from((u32::MAX - sequence).max(1))
}

/// The rank in a `key`.
pub(crate) fn rank(key: u64) -> i32 {
    ((key >> 32) as u32 ^ 0x8000_0000).cast_signed()
}

#[derive(Debug)]
pub(crate) struct HookList<T> {
    head: AtomicPtr<Node<T>>,
    tail: AtomicPtr<Node<T>>,
    /// Registered, not linked yet: a stack through `below`.
    pending: AtomicPtr<Node<T>>,
    /// Unlinked, not freed yet: a stack through `next`.
    garbage: AtomicPtr<Node<T>>,
    linked: AtomicU32,
    progress: AtomicU64,
    /// Moves on when `progress` falls while somebody waits for it.
    event: AtomicU32,
    /// Threads that wait in `leave`; what asks an uncommitted fork to undo.
    leaving: AtomicU32,
    /// Counts forks; names one in `skipped`, where 4 billion forks later it is forgotten.
    fork: AtomicU32,
}

/// What calling a hook's prepare came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Prepared,
    /// Not prepared, and the fork goes on without it.
    Skip,
    /// Not prepared; undo the rest.
    Stop,
}

impl<T> HookList<T> {
    #[cfg(not(loom))]
    pub(crate) const fn new() -> Self {
        Self {
            head: AtomicPtr::new(null_mut()),
            tail: AtomicPtr::new(null_mut()),
            pending: AtomicPtr::new(null_mut()),
            garbage: AtomicPtr::new(null_mut()),
            linked: AtomicU32::new(0),
            progress: AtomicU64::new(0),
            event: AtomicU32::new(0),
            leaving: AtomicU32::new(0),
            fork: AtomicU32::new(1),
        }
    }

    #[cfg(loom)]
    pub(crate) fn new() -> Self {
        Self {
            head: AtomicPtr::new(null_mut()),
            tail: AtomicPtr::new(null_mut()),
            pending: AtomicPtr::new(null_mut()),
            garbage: AtomicPtr::new(null_mut()),
            linked: AtomicU32::new(0),
            progress: AtomicU64::new(0),
            event: AtomicU32::new(0),
            leaving: AtomicU32::new(0),
            fork: AtomicU32::new(1),
        }
    }

    // -- anybody, at any time

    /// Adds a hook; it counts from the next fork on. Waits for nobody. The address is valid until `leave` returns.
    pub(crate) fn join(&self, key: u64, value: T) -> *const Node<T> {
        let node = Box::into_raw(Box::new(Node {
            key,
            prev: AtomicPtr::new(null_mut()),
            before: AtomicPtr::new(null_mut()),
            skipped: AtomicU32::new(0),
            gone: AtomicU32::new(0),
            value,
            next: AtomicPtr::new(null_mut()),
            below: AtomicPtr::new(null_mut()),
        }));
        push(&self.pending, node, |n| &n.below);
        node
    }

    /// Takes a hook out. With `wait`, returns once no fork has it in its hands; a fork that has not committed is asked to undo.
    ///
    /// # Safety
    /// `node` is from `join` of this list and has not left before.
    pub(crate) unsafe fn leave(&self, node: *const Node<T>, wait: bool) {
        // SAFETY: the caller's promise: not left, so neither unlinked nor freed.
        let node = unsafe { &*node };
        let key = node.key;
        // The last time that this thread touches the node. The fence: see the invariants.
        node.gone.store(1, SeqCst);
        if !heavy_fence() {
            fence_by_other_means();
        }
        if !wait || self.progress.load(Acquire) < key {
            return;
        }
        self.leaving.fetch_add(1, SeqCst);
        // Pairs with the one in `fell`: it sees the count, or this sees `progress`.
        fence(SeqCst);
        loop {
            let event = self.event.load(SeqCst);
            // Acquire pairs with the Release in `fell`: what the hook did is visible to who drops it.
            if self.progress.load(SeqCst) < key {
                break;
            }
            sync::futex_wait(&self.event, event, ANY, None);
        }
        // 0 in the child of a fork that a signal handler has made here.
        if self.leaving.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)) == Ok(1) && !fault("left_no_wake") {
            sync::futex_wake(&self.leaving, u32::MAX, ANY);
        }
    }

    /// Waits until nobody waits in `leave` any more, at most until `until`. For a fork that has undone, so that they are on their way.
    pub(crate) fn let_leave(&self, until: u64) {
        loop {
            let leaving = self.leaving.load(SeqCst);
            if leaving == 0 || sync::futex_wait(&self.leaving, leaving, ANY, Some(until)) == Wake::TimedOut {
                break;
            }
        }
    }

    /// Somebody waits in `leave`.
    pub(crate) fn is_left(&self) -> bool {
        self.leaving.load(Relaxed) != 0
    }

    /// No hook was ever registered, or all have left and were unlinked.
    pub(crate) fn is_empty(&self) -> bool {
        self.head.load(Relaxed).is_null() && self.pending.load(Relaxed).is_null()
    }

    /// How many hooks take part in a fork.
    pub(crate) fn len(&self) -> u32 {
        self.linked.load(Relaxed)
    }

    /// There is something for `settle` or `collect` to do.
    pub(crate) fn has_leftovers(&self) -> bool {
        !self.pending.load(Relaxed).is_null() || !self.garbage.load(Relaxed).is_null()
    }

    /// Frees what was unlinked, by `free`, which does not unwind. Not in a fork.
    pub(crate) fn collect(&self, free: impl Fn(T)) {
        let mut node = self.garbage.swap(null_mut(), AcqRel);
        while !node.is_null() {
            // SAFETY: nodes in the garbage are linked nowhere and their owners have left; the swap made this thread the
            // only one that knows them. They came from `Box::into_raw`.
            let Node { value, next, .. } = *unsafe { Box::from_raw(node) };
            node = next.load(Relaxed);
            free(value);
        }
    }

    // -- the role's holder

    /// Links the newcomers and unlinks who left.
    pub(crate) fn settle(&self) {
        self.link_newcomers();
        self.each(|n| {
            if n.gone.load(Acquire) != 0 {
                self.unlink(n);
            }
        });
        if !cfg!(loom) {
            self.look_ahead();
        }
    }

    /// Notes for each node which come some steps later, in both directions. Looks first: a page that is not written is not copied.
    /// After `link_newcomers`: what is linked is pending no more, and `below` is free.
    fn look_ahead(&self) {
        let mut last = [const { null_mut::<Node<T>>() }; AHEAD];
        let mut count = 0;
        let note = |place: &AtomicPtr<Node<T>>, node: *mut Node<T>| {
            if place.load(Relaxed) != node {
                place.store(node, Relaxed);
            }
        };
        self.each(|n| {
            let me = std::ptr::from_ref(n).cast_mut();
            let earlier = std::mem::replace(&mut last[count % AHEAD], me);
            count += 1;
            note(&n.before, earlier);
            // SAFETY: linked, and this thread holds the role.
            if let Some(earlier) = unsafe { earlier.as_ref() } {
                note(&earlier.below, me);
            }
        });
    }

    fn link_newcomers(&self) {
        // From here down all are linked.
        let mut done = null_mut();
        let mut gone = null_mut();
        loop {
            let top = self.pending.load(Acquire);
            let mut node = top;
            while node != done {
                // SAFETY: pending nodes are alive until unlinked, and only the role's holder unlinks.
                let n = unsafe { &*node };
                // Not linked to be unlinked: threads that register and leave in a loop while a fork holds the role would pile up
                // thousands, and each link walks past the others.
                if n.gone.load(Acquire) == 0 {
                    self.link(n);
                } else {
                    n.next.store(gone, Relaxed);
                    gone = node;
                }
                node = n.below.load(Relaxed);
            }
            done = top;
            if top.is_null() || self.pending.compare_exchange(top, null_mut(), AcqRel, Relaxed).is_ok() {
                break;
            }
        }
        // Not before: while they are pending others may not free them.
        // SAFETY: as above; nobody but this thread knows them now.
        while let Some(n) = unsafe { gone.as_ref() } {
            let node = std::mem::replace(&mut gone, n.next.load(Relaxed));
            push(&self.garbage, node, |n| &n.next);
        }
    }

    /// Calls `prepare` on every hook by rising key. False if one said `Stop`: the hooks before it are prepared still.
    pub(crate) fn prepare(&self, mut prepare: impl FnMut(&T) -> Step) -> bool {
        let fork = self.fork.load(Relaxed).wrapping_add(1);
        self.fork.store(fork, Relaxed);
        self.link_newcomers();
        let mut at = self.head.load(Relaxed);
        // SAFETY: linked nodes live; only the role's holder, this thread, unlinks.
        while let Some(n) = unsafe { at.as_ref() } {
            // It may be unlinked here.
            at = n.next.load(Relaxed);
            let after = n.below.load(Relaxed);
            sync::prefetch(after);
            // Its second line, with what prepares it.
            sync::prefetch(after.wrapping_byte_add(64));
            let before = self.progress.load(Relaxed);
            if !fault("progress_late") {
                self.progress.store(n.key, Relaxed);
            }
            // Pairs with the heavy one in `leave`: leaving pays, not each hook of each fork.
            light_fence();
            if n.gone.load(Acquire) != 0 && !fault("hook_unmarked") {
                self.fell(before);
                self.unlink(n);
                continue;
            }
            match prepare(&n.value) {
                Step::Prepared => {
                    if fault("progress_late") {
                        self.progress.store(n.key, Relaxed);
                    }
                }
                Step::Skip => n.skipped.store(fork, Relaxed),
                Step::Stop => {
                    n.skipped.store(fork, Relaxed);
                    self.fell(before);
                    return false;
                }
            }
        }
        true
    }

    /// Calls `f` on every hook that was prepared, by falling key.
    #[inline]
    pub(crate) fn finish(&self, f: impl FnMut(&T)) {
        // The code of the walk is a page that a child of a program without hooks need not touch.
        if self.progress.load(Relaxed) != 0 {
            self.walk_back(f);
        }
    }

    #[inline(never)]
    #[unsafe(link_section = ".text_carefork")]
    fn walk_back(&self, mut f: impl FnMut(&T)) {
        let fork = self.fork.load(Relaxed);
        let reached = self.progress.load(Relaxed);
        let mut at = self.tail.load(Relaxed);
        while !at.is_null() {
            // SAFETY: linked nodes live; only the role's holder, this thread, unlinks.
            let n = unsafe { &*at };
            sync::prefetch(n.before.load(Relaxed));
            let before = n.prev.load(Relaxed);
            if n.key <= reached {
                if n.skipped.load(Relaxed) != fork {
                    f(&n.value);
                }
                // SAFETY: as above.
                self.fell(unsafe { before.as_ref() }.map_or(0, |b| b.key));
            }
            at = before;
        }
        self.fell(0);
    }

    /// Calls `f` on every hook that has not left and its key, by falling key.
    pub(crate) fn each_living(&self, mut f: impl FnMut(u64, &T)) {
        self.settle();
        let mut at = self.tail.load(Relaxed);
        while !at.is_null() {
            // SAFETY: as in `finish`.
            let n = unsafe { &*at };
            f(n.key, &n.value);
            at = n.prev.load(Relaxed);
        }
    }

    /// In a child that has no such fork in progress: nobody's hands hold any hook, nobody waits. Another thread may have been
    /// half way through a change (see the invariants); a node that it was about to free is never freed here.
    pub(crate) fn reset(&self) {
        self.progress.store(0, Relaxed);
        self.leaving.store(0, Relaxed);
        // A signal handler that forked in the middle of `leave`'s sleep goes back to it, and the kernel compares this again.
        self.event.fetch_add(1, Relaxed);
        let (mut last, mut linked) = (null_mut(), 0);
        self.each(|n| {
            n.prev.store(last, Relaxed);
            last = std::ptr::from_ref(n).cast_mut();
            linked += 1;
        });
        self.tail.store(last, Relaxed);
        self.linked.store(linked, Relaxed);
        let (mut node, mut kept) = (self.pending.load(Relaxed), null_mut());
        // SAFETY: pending nodes are alive.
        while let Some(n) = unsafe { node.as_ref() } {
            let below = n.below.load(Relaxed);
            let mut is_linked = false;
            self.each(|l| is_linked |= std::ptr::eq(l, n));
            if !is_linked {
                n.below.store(kept, Relaxed);
                kept = node;
            }
            node = below;
        }
        self.pending.store(kept, Relaxed);
    }

    /// Calls `f` on every hook, linked by this process or the one that it was copied from. In a child that `reset` is for.
    pub(crate) fn each_linked(&self, mut f: impl FnMut(&T)) {
        self.each(|n| f(&n.value));
    }

    /// In a child: those who waited are gone. `progress` is the forker's and stays.
    pub(crate) fn forget_waiters(&self) {
        self.leaving.store(0, Relaxed);
    }

    fn fell(&self, to: u64) {
        // Release: whoever sees it sees what the hook did.
        self.progress.store(to, Release);
        if to == 0 {
            // Pairs with the SeqCst count in `leave`: no sleeper is missed at the end. One that is missed on the way sleeps
            // until then; a fence for every hook would cost each fork more than the rare wait.
            fence(SeqCst);
        }
        if self.leaving.load(Relaxed) != 0 && !fault("fell_no_wake") {
            self.event.fetch_add(1, SeqCst);
            sync::futex_wake(&self.event, u32::MAX, ANY);
        }
    }

    fn each(&self, mut f: impl FnMut(&Node<T>)) {
        let mut at = self.head.load(Relaxed);
        while !at.is_null() {
            // SAFETY: as in `finish`; `f` may unlink this very node, so its successor is read first.
            let n = unsafe { &*at };
            let next = n.next.load(Relaxed);
            f(n);
            at = next;
        }
    }

    fn link(&self, n: &Node<T>) {
        let mut before = self.tail.load(Relaxed);
        // SAFETY: linked nodes live while this thread holds the role.
        while let Some(b) = unsafe { before.as_ref() }
            && b.key > n.key
        {
            before = b.prev.load(Relaxed);
        }
        // SAFETY: as above.
        let before_ref = unsafe { before.as_ref() };
        let next_place = before_ref.map_or(&self.head, |b| &b.next);
        let after = next_place.load(Relaxed);
        let me = std::ptr::from_ref(n).cast_mut();
        n.prev.store(before, Relaxed);
        n.next.store(after, Relaxed);
        self.linked.store(self.linked.load(Relaxed) + 1, Relaxed);
        // The node is whole before it can be reached: a dirty child may find the list at any point of this.
        next_place.store(me, Release);
        // SAFETY: as above.
        unsafe { after.as_ref() }.map_or(&self.tail, |a| &a.prev).store(me, Release);
    }

    fn unlink(&self, n: &Node<T>) {
        let (before, after) = (n.prev.load(Relaxed), n.next.load(Relaxed));
        // SAFETY: linked nodes live while this thread holds the role.
        unsafe { before.as_ref() }.map_or(&self.head, |b| &b.next).store(after, Release);
        // SAFETY: as above.
        unsafe { after.as_ref() }.map_or(&self.tail, |a| &a.prev).store(before, Release);
        self.linked.store(self.linked.load(Relaxed) - 1, Relaxed);
        push(&self.garbage, std::ptr::from_ref(n).cast_mut(), |n| &n.next);
    }
}

/// Pushes onto a stack through `link`. Only whole stacks are taken off again, so there is no ABA.
fn push<T>(stack: &AtomicPtr<Node<T>>, node: *mut Node<T>, link: fn(&Node<T>) -> &AtomicPtr<Node<T>>) {
    let mut top = stack.load(Relaxed);
    loop {
        // SAFETY: the caller owns `node`: fresh, or just unlinked by the role's holder.
        link(unsafe { &*node }).store(top, Relaxed);
        match stack.compare_exchange_weak(top, node, AcqRel, Relaxed) {
            Ok(_) => return,
            Err(now) => top = now,
        }
    }
}

#[cfg(all(test, not(loom)))]
#[path = "hook_list_tests.rs"]
mod tests;
