//! Neither regions nor forks starve the other (G3).

use crate::common::isolated;
use crate::drive::{BOTH, Kind, MS, Stop, freeze, gettid, on_signal, signal_thread, until, until_it_looked};
use crate::{all_is_well, ends_well};
use carefork::testing::advance;
use carefork::{Hook, no_forking, register, try_no_forking};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// At most how many regions three threads begin, back to back in regions of 3 ms, from when a fork has shut the gate until it commits.
/// Everybody lives by one clock, which moves on when all have looked at it, so nobody is overtaken by time that he was not there
/// for. Carefork's own stands still unless `passes`.
fn regions_begun_while_forking(kind: Kind, passes: bool) -> u64 {
    const STEP: u64 = 500;
    const LENGTH: u64 = 3000;
    let (begun, at_commitment) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
    let (now, stop, go) = (AtomicU64::new(0), AtomicBool::new(false), AtomicU32::new(0));
    let (forked, tids) = (AtomicU32::new(0), [const { AtomicI32::new(0) }; 4]);
    let begun: &'static AtomicU64 = Box::leak(Box::new(begun));
    let seen = Arc::clone(&at_commitment);
    // The gate is shut, and nobody is in a region: the last time it comes to this is the commitment.
    let _hook = register(Hook::new("counts").prepare(move || seen.store(begun.load(SeqCst), SeqCst)));
    let mut most = 0;
    freeze();
    thread::scope(|s| {
        let _end = Stop(&stop);
        let (now, stop, go, forked, tids) = (&now, &stop, &go, &forked, &tids);
        for n in 0..3 {
            s.spawn(move || {
                tids[n as usize].store(gettid(), SeqCst);
                // Not all at once.
                until(|| now.load(SeqCst) >= n * LENGTH / 3);
                while !stop.load(SeqCst) {
                    let _region = no_forking();
                    let end = now.load(SeqCst) + LENGTH;
                    begun.fetch_add(1, SeqCst);
                    until(|| now.load(SeqCst) >= end || stop.load(SeqCst));
                }
            });
        }
        s.spawn(move || {
            tids[3].store(gettid(), SeqCst);
            for n in 1.. {
                until(|| go.load(SeqCst) == n || stop.load(SeqCst));
                if stop.load(SeqCst) {
                    break;
                }
                let pid = kind.fork(|| 0);
                forked.store(n, SeqCst);
                ends_well(pid);
            }
        });
        until(|| tids.iter().all(|tid| tid.load(SeqCst) != 0));
        let step = |both: bool| {
            now.fetch_add(STEP, SeqCst);
            if both {
                carefork::testing::advance(Duration::from_micros(STEP));
            }
            tids.iter().for_each(|tid| until_it_looked(tid.load(SeqCst)));
        };
        for n in 1..=8 {
            // At another moment of the regions each time.
            (0..7 + n).for_each(|_| step(false));
            go.store(n, SeqCst);
            until(|| try_no_forking().is_none() || forked.load(SeqCst) == n);
            let before = begun.load(SeqCst);
            while forked.load(SeqCst) != n {
                step(passes);
            }
            most = most.max(at_commitment.load(SeqCst).saturating_sub(before));
        }
    });
    most
}

#[test]
fn back_to_back_regions_delay_a_fork_by_few_of_them() {
    isolated("fairness::back_to_back_regions_delay_a_fork_by_few_of_them", 120, || {
        for kind in BOTH {
            // Each of three threads begins few: those let in before the bound has grown to a region's length.
            let begun = regions_begun_while_forking(kind, true);
            assert!(begun <= 3 * 4, "{begun} regions while one fork waited ({kind:?})");
            // Where the bound never passes, no new region begins at all; one that came before the gate was shut may not be counted yet.
            let begun = regions_begun_while_forking(kind, false);
            assert!(begun <= 3, "{begun} regions while one fork waited ({kind:?})");
        }
    });
}

#[test]
fn forks_in_a_loop_let_regions_in() {
    isolated("fairness::forks_in_a_loop_let_regions_in", 60, || {
        // Standing still: the courtesy that a fork shows to those who wait has no end but their entering.
        freeze();
        // Children are gone without being waited for: nothing comes between two forks.
        // SAFETY: ignoring calls nothing.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
        let (stop, forks) = (AtomicBool::new(false), AtomicU32::new(0));
        let mut waits: Vec<u32> = Vec::new();
        thread::scope(|s| {
            let _end = Stop(&stop);
            for kind in BOTH {
                let (stop, forks) = (&stop, &forks);
                s.spawn(move || {
                    while !stop.load(SeqCst) {
                        kind.fork(|| 0);
                        forks.fetch_add(1, SeqCst);
                    }
                });
            }
            while waits.len() < 200 {
                // Only those that had to wait count.
                if let Some(_region) = try_no_forking() {
                    continue;
                }
                let before = forks.load(SeqCst);
                let region = no_forking();
                waits.push(forks.load(SeqCst) - before);
                drop(region);
            }
        });
        waits.sort_unstable();
        // This thread may be set aside between asking and entering; not often.
        assert!(waits[150] <= 2, "forks that overtook a waiting region: {waits:?}");
    });
}

// -- in what order they come to it

static IN_HANDLER: AtomicBool = AtomicBool::new(false);
static STAY: AtomicBool = AtomicBool::new(false);

/// Keeps the thread, wherever it waits, from going on.
extern "C" fn stays(_: i32) {
    IN_HANDLER.store(true, SeqCst);
    until(|| !STAY.load(SeqCst));
}

/// The thread, which waits in carefork, is kept from going on until `let_go`.
fn keep(tid: i32) {
    until_it_looked(tid);
    IN_HANDLER.store(false, SeqCst);
    STAY.store(true, SeqCst);
    signal_thread(tid, libc::SIGUSR1);
    until(|| IN_HANDLER.load(SeqCst));
}

fn let_go() {
    STAY.store(false, SeqCst);
}

/// Who came to it, in order.
#[derive(Clone, Default)]
struct Order(Arc<Mutex<Vec<&'static str>>>);

impl Order {
    fn came(&self, who: &'static str) {
        self.0.lock().expect("no panic").push(who);
    }

    fn is(&self, order: &[&str]) -> bool {
        *self.0.lock().expect("no panic") == order
    }

    fn until(&self, order: &[&str]) {
        until(|| self.is(order));
    }

    /// Nobody else has come; if not, nobody is kept, so that the test can end.
    fn still(&self, order: &[&str]) {
        if !self.is(order) {
            let_go();
            panic!("came too early: {:?}", self.0);
        }
    }
}

thread_local! {
    static NAME: Cell<&'static str> = const { Cell::new("") };
}

/// Time stands still. The first fork stands in its hook, with the gate shut, until `go` is set; each fork notes its name there.
fn first_fork_stands(order: &Order, go: &Arc<AtomicBool>) -> carefork::Registration {
    freeze();
    on_signal(libc::SIGUSR1, stays);
    let (order, go) = (order.clone(), Arc::clone(go));
    register(Hook::new("order").prepare(move || {
        order.came(NAME.get());
        until(|| NAME.get() != "first" || go.load(SeqCst));
    }))
}

/// Starts a thread of that name, which does `f`; its tid.
fn start<'s>(s: &'s thread::Scope<'s, '_>, name: &'static str, f: impl FnOnce() + Send + 's) -> i32 {
    let (tell, tid) = std::sync::mpsc::channel();
    s.spawn(move || {
        NAME.set(name);
        tell.send(gettid()).expect("the test waits");
        f();
    });
    tid.recv().expect("it starts")
}

/// Who waits at the gate when a fork ends gets in before the next one, however slow to wake; not for ever.
#[test]
fn a_fork_lets_those_in_whom_the_last_one_kept_out() {
    isolated("fairness::a_fork_lets_those_in_whom_the_last_one_kept_out", 60, || {
        for (kind, patient) in [(BOTH[0], true), (BOTH[1], true), (BOTH[0], false), (BOTH[1], false)] {
            let (order, go) = (Order::default(), Arc::new(AtomicBool::new(false)));
            let _hook = first_fork_stands(&order, &go);
            thread::scope(|s| {
                start(s, "first", || ends_well(kind.fork(|| 0)));
                order.until(&["first"]);
                let enters = order.clone();
                let region = start(s, "region", move || {
                    let _region = no_forking();
                    enters.came("region");
                });
                keep(region);
                let second = start(s, "second", || ends_well(kind.fork(|| 0)));
                until_it_looked(second);
                go.store(true, SeqCst);
                until(|| try_no_forking().is_some());
                until_it_looked(second);
                order.still(&["first"]);
                if patient {
                    let_go();
                    order.until(&["first", "region", "second"]);
                } else {
                    advance(MS);
                    order.until(&["first", "second"]);
                    let_go();
                }
            });
        }
        all_is_well();
    });
}

/// Forks take their turns as they came, however slow one is to wake; not for ever.
#[test]
fn forks_come_in_turn() {
    isolated("fairness::forks_come_in_turn", 60, || {
        for (kind, patient) in [(BOTH[0], true), (BOTH[1], true), (BOTH[0], false), (BOTH[1], false)] {
            let (order, go) = (Order::default(), Arc::new(AtomicBool::new(false)));
            let _hook = first_fork_stands(&order, &go);
            thread::scope(|s| {
                start(s, "first", || ends_well(kind.fork(|| 0)));
                order.until(&["first"]);
                keep(start(s, "second", || ends_well(kind.fork(|| 0))));
                let third = start(s, "third", || ends_well(kind.fork(|| 0)));
                until_it_looked(third);
                go.store(true, SeqCst);
                until(|| try_no_forking().is_some());
                until_it_looked(third);
                order.still(&["first"]);
                if patient {
                    let_go();
                    order.until(&["first", "second", "third"]);
                } else {
                    advance(MS);
                    order.until(&["first", "third"]);
                    let_go();
                    order.until(&["first", "third", "second"]);
                }
            });
        }
        all_is_well();
    });
}
