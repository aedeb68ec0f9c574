//! One descriptor number, its word, and what a child closes (F4, G6).

use super::*;
use crate::care_word::{self, Dirty, Kind};
use loom::sync::Mutex;

const FREE: u32 = 0;
const OURS: u32 = 1;
const STRANGERS: u32 = 2;

/// A process with one number.
struct Number {
    world: Arc<World>,
    /// What the number refers to. Behind the kernel's lock, as opening, closing and a fork's copying are.
    file: Mutex<u32>,
    word: AtomicU32,
    dirty: Dirty,
}

impl Number {
    fn new() -> Arc<Number> {
        let file = Mutex::new(FREE);
        Arc::new(Number { world: World::new(3), file, word: AtomicU32::new(0), dirty: Dirty::new() })
    }

    /// False if the number is in use: the kernel gives out another.
    fn open(&self, what: u32) -> bool {
        let mut file = self.file.lock().unwrap();
        let free = *file == FREE;
        if free {
            *file = what;
        }
        free
    }

    fn close(&self, what: u32) {
        let mut file = self.file.lock().unwrap();
        assert_eq!(*file, what, "a stranger's was closed");
        *file = FREE;
    }

    /// As carefd.rs does, regions aside.
    fn care(&self, enter: impl Fn(), leave: impl Fn()) {
        enter();
        let stamp = self.open(OURS).then(|| care_word::register(&self.word, &self.dirty, Kind::Cleanup));
        leave();
        if let Some(stamp) = stamp {
            enter();
            assert!(care_word::unregister(&self.word, stamp, || self.close(OURS)));
            leave();
        }
    }

    /// Knows nothing of this library.
    fn stranger(&self) {
        if self.open(STRANGERS) {
            self.close(STRANGERS);
        }
    }

    /// The fork's copies: descriptors first, memory then.
    fn copied(&self) -> (u32, AtomicU32) {
        let file = *self.file.lock().unwrap();
        (file, AtomicU32::new(self.word.load(Ordering::Acquire)))
    }
}

fn is_closed_by_child(word: &AtomicU32) -> bool {
    Kind::of(word.load(Ordering::Relaxed)).is_some()
}

/// Without a gate: a care-fd may leak into the child, but a stranger's is never closed.
#[test]
fn the_child_of_a_dirty_fork() {
    check(3, || {
        let n = Number::new();
        let (one, two) = (Arc::clone(&n), Arc::clone(&n));
        let a = thread::spawn(move || one.care(|| (), || ()));
        let b = thread::spawn(move || two.stranger());
        n.dirty.begins();
        let (file, word) = n.copied();
        n.dirty.ends();
        care_word::forget_marked(&word);
        assert!(!is_closed_by_child(&word) || file != STRANGERS, "the child closes a stranger's");
        a.join().unwrap();
        b.join().unwrap();
    });
}

/// Between the copies of descriptors and memory a stranger's number becomes a care-fd's.
#[test]
fn registered_during_a_dirty_fork() {
    check(3, || {
        let n = Number::new();
        assert!(n.open(STRANGERS));
        n.dirty.begins();
        let (file, _) = n.copied();
        n.close(STRANGERS);
        let one = Arc::clone(&n);
        let a = thread::spawn(move || one.care(|| (), || ()));
        let (_, word) = n.copied();
        care_word::forget_marked(&word);
        assert!(!is_closed_by_child(&word) || file != STRANGERS, "the child closes a stranger's");
        n.dirty.ends();
        a.join().unwrap();
    });
}

struct Copies<'a>(&'a Number);

impl Steps for Copies<'_> {
    fn block_signals(&mut self) {}
    fn restore_signals(&mut self) {}
    fn hooks(&mut self, _: How) -> Hooks {
        Hooks::Ready
    }
    fn undo(&mut self) {}
}

impl Step for Copies<'_> {
    fn at_fork(&mut self) {
        let (file, word) = self.0.copied();
        assert_eq!(is_closed_by_child(&word), file == OURS, "neither leaked nor a stranger's: {file}");
    }
}

/// With the gate: the child closes the care-fd exactly where it has it.
#[test]
fn the_child_of_a_clean_fork() {
    check(2, || {
        let n = Number::new();
        let (one, two) = (Arc::clone(&n), Arc::clone(&n));
        let a = n.world.thread(1, move |w, me| one.care(|| w.enter(me, GUARD), || w.leave(me, GUARD)));
        let b = thread::spawn(move || two.stranger());
        assert_eq!(n.world.fork(n.world.seat(0), &mut Copies(&n), None), Ended::Forked);
        a.join().unwrap();
        b.join().unwrap();
    });
}
