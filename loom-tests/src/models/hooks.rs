//! The hook list: a registration dropped while a fork is under way (H1).

use super::*;
use crate::hook_list::{HookList, Node, Step as Call, key};

/// A hook that writes what its registration's owner frees.
struct Called(UnsafeCell<u32>);

impl Called {
    fn touch(&self) {
        // SAFETY: loom checks it.
        self.0.with_mut(|c| unsafe { *c += 1 });
    }
}

struct Listed {
    list: HookList<Arc<Called>>,
    world: Arc<World>,
}

// SAFETY: loom checks each access to the cells.
unsafe impl Sync for Listed {}
// SAFETY: as above.
unsafe impl Send for Listed {}

impl Listed {
    fn new(threads: u32) -> Arc<Listed> {
        Arc::new(Listed { list: HookList::new(), world: World::new(threads) })
    }

    fn join(&self, sequence: u32) -> (Arc<Called>, *const Node<Arc<Called>>) {
        let called = Arc::new(Called(UnsafeCell::new(0)));
        let node = self.list.join(key(0, sequence), Arc::clone(&called));
        (called, node)
    }

    fn fork(&self, me: &Slot) {
        assert_eq!(self.world.fork(me, &mut Steps_(self), None), Ended::Forked);
    }

    /// As hook.rs does after a change.
    fn tidy(&self, me: &Slot) {
        if self.world.gate.try_role(me) {
            self.list.settle();
            self.world.gate.drop_role(me);
        }
        self.list.collect(drop);
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.list.settle();
        self.list.collect(drop);
    }
}

struct Steps_<'a>(&'a Listed);

impl Steps for Steps_<'_> {
    fn block_signals(&mut self) {}
    fn restore_signals(&mut self) {}

    fn hooks(&mut self, _: How) -> Hooks {
        // As hook.rs does.
        let all = self.0.list.prepare(|h| {
            if self.0.list.is_left() {
                return Call::Stop;
            }
            h.touch();
            Call::Prepared
        });
        if !all {
            self.undo();
            return Hooks::Unregistering;
        }
        Hooks::Ready
    }

    fn let_leave(&mut self, until: u64) {
        self.0.list.let_leave(until);
    }

    fn undo(&mut self) {
        self.0.list.finish(|h| h.touch());
    }
}

impl Step for Steps_<'_> {
    fn finish(&mut self) {
        self.undo();
    }
}

/// Once `leave` has returned no fork calls the hook.
#[test]
fn unregister_during_a_fork() {
    check(3, || {
        let l = Listed::new(2);
        let (called, node) = l.join(1);
        let theirs = Arc::clone(&l);
        let a = l.world.thread(1, move |_, me| {
            // SAFETY: `node` is from `join` and leaves here for the first time.
            unsafe { theirs.list.leave(node, true) };
            called.touch();
            theirs.tidy(me);
        });
        l.fork(l.world.seat(0));
        a.join().unwrap();
    });
}

/// The first of two leaves while the other is called too; then a second fork, which must not know it.
#[test]
fn unregister_one_of_two() {
    check(3, || {
        let l = Listed::new(2);
        let (_, _) = l.join(1);
        let (called, node) = l.join(2);
        let theirs = Arc::clone(&l);
        let a = l.world.thread(1, move |_, me| {
            // SAFETY: as above.
            unsafe { theirs.list.leave(node, true) };
            called.touch();
            theirs.tidy(me);
        });
        l.fork(l.world.seat(0));
        l.fork(l.world.seat(0));
        a.join().unwrap();
    });
}

/// A hook that comes during a fork is called from the next one on, by both its phases or by none.
#[test]
fn register_during_a_fork() {
    check(3, || {
        let l = Listed::new(2);
        let (_, _) = l.join(1);
        let theirs = Arc::clone(&l);
        let a = l.world.thread(1, move |_, me| {
            let (called, node) = theirs.join(2);
            theirs.tidy(me);
            // SAFETY: as above.
            unsafe { theirs.list.leave(node, true) };
            called.touch();
        });
        l.fork(l.world.seat(0));
        a.join().unwrap();
    });
}
