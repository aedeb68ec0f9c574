//! What tracing-subscriber's registry leaves to the end of a thread: its crates `thread_local` and `sharded-slab` number threads, and take
//! a lock to give a number back.
//!
//! Thread-local destructors run in the reverse order of their registration (glibc's, std's own list). So a number is taken between two
//! destructors of ours, the later of which begins a region and the earlier ends it. Were the order another one there would be no region.

use crate::{LazyLock, NoForking, no_forking};
use std::cell::Cell;
use std::thread::LocalKey;

use ::thread_local::ThreadLocal;
use sharded_slab::Slab;

struct Begins(fn() -> &'static LocalKey<Ends>);
struct Ends(Cell<Option<NoForking>>);

impl Drop for Begins {
    fn drop(&mut self) {
        let region = no_forking();
        // Where it is gone already the region ends here.
        let _ = (self.0)().try_with(move |ends| ends.0.set(Some(region)));
    }
}

// Const and without a destructor, for the question that each call asks.
thread_local! {
    static IN_THREAD_LOCAL: Cell<bool> = const { Cell::new(false) };
    static IN_SLAB: Cell<bool> = const { Cell::new(false) };
}

thread_local! {
    static THREAD_LOCAL_ENDS: Ends = const { Ends(Cell::new(None)) };
    static THREAD_LOCAL_BEGINS: Begins = const { Begins(|| &THREAD_LOCAL_ENDS) };
    static SLAB_ENDS: Ends = const { Ends(Cell::new(None)) };
    static SLAB_BEGINS: Begins = const { Begins(|| &SLAB_ENDS) };
}

/// Before any call: filters and contexts keep values by thread. To be called inside a region, as the other.
#[inline]
pub(super) fn number_for_values() {
    if !IN_THREAD_LOCAL.get() {
        number(&IN_THREAD_LOCAL, &THREAD_LOCAL_ENDS, &THREAD_LOCAL_BEGINS, || {
            static VALUES: ThreadLocal<()> = ThreadLocal::new();
            VALUES.get_or(|| ());
        });
    }
}

/// Before a span is made or closed. Not before others: there are 4096 of these numbers, and more threads may log.
#[inline]
pub(super) fn number_for_spans() {
    if !IN_SLAB.get() {
        number(&IN_SLAB, &SLAB_ENDS, &SLAB_BEGINS, || {
            static SPANS: LazyLock<Slab<()>> = LazyLock::new(Slab::new);
            // It is empty: this asks whose it was, and so for the thread's number, and allocates nothing.
            SPANS.remove(0);
        });
    }
}

#[cold]
fn number(
    known: &'static LocalKey<Cell<bool>>,
    ends: &'static LocalKey<Ends>,
    begins: &'static LocalKey<Begins>,
    number: impl FnOnce(),
) {
    // First, for an allocator that logs.
    known.set(true);
    if ends.try_with(|_| ()).is_ok() {
        number();
        // It begins a region at the thread's end, or the thread is past that.
        let _ = begins.try_with(|_| ());
    }
}
