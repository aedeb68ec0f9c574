//! Vetoes, panics, and hooks that fork (H3).

use crate::common::{check, isolated};
use crate::drive::{self, BOTH, Kind, coordinated, foreign};
use crate::{Log, all_is_well, ends_well, quiet_panics, stderr_of, vetoed};
use carefork::{ForkError, Hook, register};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

#[test]
fn a_veto_undoes_a_coordinated_fork_in_order() {
    isolated("vetoes::a_veto_undoes_a_coordinated_fork_in_order", 30, || {
        let log = Log::new();
        let _hooks = [("A", 0), ("B", 1), ("D", 3)].map(|(name, rank)| register(log.hook(name).rank(rank)));
        let reason = Arc::new(Mutex::new(None::<String>));
        let says = Arc::clone(&reason);
        let _veto = register(
            log.hook("C")
                .rank(2)
                .try_prepare(move || says.lock().expect("no panic").clone().map_or(Ok(()), |r| Err(r.into()))),
        );
        for text in ["a transaction is open", ""] {
            *reason.lock().expect("no panic") = Some(text.to_owned());
            assert_eq!(vetoed(coordinated(|| 0).expect_err("vetoed")), ("C", text.to_owned()));
            // C said no: it is told nothing. D was never asked.
            log.expect("pA pB uB uA", "");
            assert!(drive::no_child_left());
        }
        *reason.lock().expect("no panic") = None;
        all_is_well();
        assert_eq!(carefork::stats().refused, 2);
    });
}

#[test]
fn a_veto_makes_a_foreign_fork_dirty() {
    isolated("vetoes::a_veto_makes_a_foreign_fork_dirty", 30, || {
        let log = Log::new();
        let _hooks = [("A", 0), ("C", 2)].map(|(name, rank)| register(log.hook(name).rank(rank)));
        let veto = register(log.hook("B reads").rank(1).try_prepare(|| Err("busy reading".into())));
        let said = stderr_of(|| {
            ends_well(Kind::Foreign.fork(|| {
                check(20, carefork::lineage().dirty);
                0
            }));
        });
        // The hook that said no runs neither parent nor child; those after it are prepared.
        log.expect("pA pC rC rA", "cC cA");
        assert!(said.contains("hook B reads"), "the report does not name the hook: {said:?}");
        assert_eq!(carefork::stats().dirty, 1);
        assert!(!carefork::lineage().dirty, "the parent is not dirty");
        drop(veto);
        all_is_well();
    });
}

/// A fork that has to go along the hooks once more asks once more, and the last answer counts.
#[test]
fn a_veto_that_is_taken_back_makes_nothing_dirty() {
    isolated("vetoes::a_veto_that_is_taken_back_makes_nothing_dirty", 30, || {
        let asked = Arc::new(AtomicU32::new(0));
        let counts = Arc::clone(&asked);
        let _veto = register(Hook::new("says no first").try_prepare(move || match counts.fetch_add(1, SeqCst) {
            0 => Err("no".into()),
            _ => Ok(()),
        }));
        let lock = Arc::new(Mutex::new(()));
        let _lock = register(Hook::std_mutex("held", Arc::clone(&lock)).rank(1));
        drive::freeze();
        std::thread::scope(|s| {
            let held = lock.lock().expect("not poisoned");
            let fork = s.spawn(|| ends_well(foreign(|| i32::from(carefork::lineage().dirty))));
            // The second time, with the gate open, the lock is waited for.
            drive::until(|| asked.load(SeqCst) == 2);
            drop(held);
            fork.join().expect("the child is well");
        });
        assert_eq!(carefork::stats().dirty, 0);
    });
}

#[test]
fn a_panic_in_prepare_is_a_veto() {
    isolated("vetoes::a_panic_in_prepare_is_a_veto", 30, || {
        quiet_panics();
        for formatted in [false, true] {
            let log = Log::new();
            let _a = register(log.hook("A"));
            let panics = move || {
                if formatted { panic!("it is {}", 3) } else { panic!("plain") }
            };
            let _b = register(log.hook("B").rank(1).prepare(panics));
            let _c = register(log.hook("C").rank(2));
            let (hook, reason) = vetoed(coordinated(|| 0).expect_err("vetoed"));
            assert_eq!(hook, "B");
            assert!(reason.contains(if formatted { "it is 3" } else { "plain" }), "{reason}");
            log.expect("pA uA", "");
            let said = stderr_of(|| ends_well(foreign(|| i32::from(!carefork::lineage().dirty))));
            log.expect("pA pC rC rA", "cC cA");
            assert!(said.contains("hook B"), "{said:?}");
        }
        all_is_well();
    });
}

#[test]
fn a_panic_elsewhere_is_reported_and_the_others_run() {
    isolated("vetoes::a_panic_elsewhere_is_reported_and_the_others_run", 30, || {
        quiet_panics();
        let log = Log::new();
        let _a = register(log.hook("A"));
        let on = Arc::new(AtomicBool::new(false));
        let refuses = Arc::clone(&on);
        let _b = register(
            Hook::new("B")
                .rank(1)
                .undo(|| panic!("in my undo"))
                .parent(|| panic!("in my parent"))
                .child(|| panic!("in my child {}", 1))
                .cleanup(|| panic!("in my cleanup")),
        );
        let _c = register(log.hook("C").rank(2));
        let _d = register(
            Hook::new("D").rank(3).try_prepare(move || if refuses.load(SeqCst) { Err("no".into()) } else { Ok(()) }),
        );
        for kind in BOTH {
            let said = stderr_of(|| {
                ends_well(kind.fork(|| {
                    // SAFETY: nothing borrowed is used.
                    let done = unsafe { carefork::postfork_child_noexec() };
                    check(30, done.is_ok_and(|c| (c.hooks, c.panicked) == (3, 1)));
                    0
                }));
            });
            log.expect("pA pC rC rA", "cC cA eC eA");
            for line in ["parent: in my parent", "child: in my child 1", "cleanup: in my cleanup"] {
                assert!(said.contains(&format!("carefork: hook B panicked in {line}\n")), "no {line:?} in {said:?}");
            }
        }
        on.store(true, SeqCst);
        let said = stderr_of(|| assert_eq!(vetoed(coordinated(|| 0).expect_err("vetoed")).0, "D"));
        assert!(said.contains("hook B panicked in undo: in my undo\n"), "{said:?}");
        log.expect("pA pC uC uA", "");
        on.store(false, SeqCst);
        all_is_well();
        assert_eq!(carefork::stats().dirty, 0);
    });
}

#[test]
fn no_fork_from_a_hook() {
    isolated("vetoes::no_fork_from_a_hook", 30, || {
        static FOUND: AtomicU32 = AtomicU32::new(0);
        fn try_it() {
            match coordinated(|| 1) {
                Err(ForkError::InFork) => FOUND.fetch_add(1, SeqCst),
                _ => FOUND.fetch_add(1000, SeqCst),
            };
        }
        let _hook = register(Hook::new("forks").prepare(try_it).parent(try_it));
        ends_well(coordinated(|| 0).expect("a child"));
        assert_eq!(FOUND.load(SeqCst), 2);
        all_is_well();
    });
}
