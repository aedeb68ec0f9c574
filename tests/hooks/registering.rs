//! Registered and dropped from anywhere, hooks and forks included (H1).

use crate::common::{Setup, Verdict, check, fork_many, isolated, isolated_with, reap};
use crate::drive::{BOTH, Kind, SOON, Stop, a_while, coordinated, freeze, run_slowly, until};
use crate::{Log, ends_well, stderr_of};
use carefork::{ForkError, Hook, Registration, register};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

type Seat = Arc<Mutex<Vec<Registration>>>;

fn clear(seat: &Seat) {
    let gone: Vec<_> = seat.lock().expect("no panic").drain(..).collect();
    drop(gone);
}

#[test]
fn a_hook_registered_in_a_hook_counts_from_the_next_fork() {
    isolated("registering::a_hook_registered_in_a_hook_counts_from_the_next_fork", 30, || {
        for phase in [b'p', b'r', b'c'] {
            let log = Log::new();
            let seat: Seat = Arc::default();
            let (in_hook, once) = (Arc::clone(&seat), AtomicBool::new(false));
            let add = move || {
                if !once.swap(true, SeqCst) {
                    in_hook.lock().expect("no panic").push(register(log.hook("N").rank(-1)));
                    in_hook.lock().expect("no panic").push(register(log.hook("M").rank(1)));
                }
            };
            let hook = Hook::new("adds");
            let _adds = register(match phase {
                b'p' => hook.prepare(add),
                b'r' => hook.parent(add),
                _ => hook.child(add),
            });
            ends_well(
                coordinated(|| {
                    if phase == b'c' {
                        let Ok(pid) = coordinated(|| 0) else { return 40 };
                        check(41, reap(pid, SOON) == Verdict::Exited(0));
                    }
                    0
                })
                .expect("a child"),
            );
            if phase == b'c' {
                assert!(log.of(true).contains("pN pM"), "{}", log.of(true));
                continue;
            }
            log.expect("", "");
            ends_well(coordinated(|| 0).expect("a child"));
            log.expect("pN pM rM rN", "cM cN");
            clear(&seat);
            ends_well(coordinated(|| 0).expect("a child"));
            log.expect("", "");
        }
    });
}

/// Sets a flag when the hook is freed.
struct Freed(Arc<AtomicBool>);

impl Drop for Freed {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[test]
fn dropping_in_a_hook_marks_and_frees_after_the_fork() {
    isolated("registering::dropping_in_a_hook_marks_and_frees_after_the_fork", 30, || {
        for kind in BOTH {
            for (phase, rank) in [(b'p', 1), (b'p', -1), (b'r', 1), (b'r', -1)] {
                let log = Log::new();
                let seat: Seat = Arc::default();
                let freed = Arc::new(AtomicBool::new(false));
                let (keep, early) = (Freed(Arc::clone(&freed)), Arc::new(AtomicBool::new(false)));
                let gone = log.hook("G").rank(rank).child(move || {
                    let _kept = &keep;
                    log.add(b'c', b'G');
                });
                seat.lock().expect("no panic").push(register(gone));
                let (takes_out, was_freed, seen) = (Arc::clone(&seat), Arc::clone(&freed), Arc::clone(&early));
                let take_out = move || {
                    clear(&takes_out);
                    seen.fetch_or(was_freed.load(SeqCst), SeqCst);
                };
                let hook = Hook::new("takes out");
                let _takes = register(if phase == b'p' { hook.prepare(take_out) } else { hook.parent(take_out) });
                ends_well(kind.fork(|| 0));
                assert!(!early.load(SeqCst), "freed in the fork");
                match (phase, rank) {
                    // Not asked yet: not part of this fork.
                    (b'p', 1) => log.expect("", ""),
                    // Prepared, or in the fork's hands: it is told the end.
                    _ => log.expect("pG rG", "cG"),
                }
                // A fork by foreign code leaves the freeing to the next call of this library.
                drop(register(Hook::new("next")));
                assert!(freed.load(SeqCst), "not freed: {kind:?} {phase} {rank}");
                ends_well(kind.fork(|| 0));
                log.expect("", "");
            }
        }
    });
}

#[test]
fn a_hook_may_take_itself_out() {
    isolated("registering::a_hook_may_take_itself_out", 30, || {
        for phase in [b'p', b'r', b'c', b'e'] {
            let log = Log::new();
            let seat: Seat = Arc::default();
            let own = Arc::clone(&seat);
            let act = move || {
                log.add(phase, b'S');
                clear(&own);
            };
            let hook = log.hook("S");
            seat.lock().expect("no panic").push(register(match phase {
                b'p' => hook.prepare(act),
                b'r' => hook.parent(act),
                b'c' => hook.child(act),
                _ => hook.cleanup(act),
            }));
            // SAFETY: nothing of the parent's is used.
            let spawn = || unsafe { carefork::spawn(|| 0) }.and_then(|mut c| c.wait().map_err(ForkError::Os));
            assert!(spawn().expect("a child").success());
            let child = if matches!(phase, b'p' | b'c') { "cS" } else { "cS eS" };
            log.expect("pS rS", child);
            assert!(spawn().expect("a child").success());
            if matches!(phase, b'p' | b'r') {
                log.expect("", "");
            } else {
                log.expect("pS rS", child);
            }
        }
    });
}

#[test]
fn dropping_waits_for_a_fork_that_has_the_hook() {
    for kind in BOTH {
        let name = "registering::dropping_waits_for_a_fork_that_has_the_hook";
        // Both kinds in one test: each in a process of its own.
        if std::env::var_os("CAREFORK_KIND").is_some_and(|k| k.as_encoded_bytes() != format!("{kind:?}").as_bytes()) {
            continue;
        }
        let env = vec![("CAREFORK_KIND".to_owned(), format!("{kind:?}"))];
        isolated_with(name, 30, Setup { env, ..Setup::default() }, || dropping_waits(kind));
    }
}

fn dropping_waits(kind: Kind) {
    freeze();
    let log = Log::new();
    let (inside, told) = mpsc::channel();
    let go = Arc::new(AtomicBool::new(false));
    let wait = Arc::clone(&go);
    let hook = log.hook("H").prepare(move || {
        log.add(b'p', b'H');
        inside.send(()).expect("the test waits");
        until(|| wait.load(SeqCst));
    });
    let registration = register(hook);
    thread::scope(|s| {
        let _go = Stop(&go);
        let forker = s.spawn(move || ends_well(kind.fork(|| 0)));
        told.recv().expect("prepare runs");
        let dropped = AtomicBool::new(false);
        thread::scope(|s| {
            s.spawn(|| {
                drop(registration);
                let seen = log.of(false);
                dropped.store(true, SeqCst);
                // It was told how the fork ended: undone, because it had not committed, or made.
                assert!(seen == "pH uH" || seen == "pH rH", "{seen}");
            });
            a_while();
            assert!(!dropped.load(SeqCst), "dropped while its prepare runs");
            go.store(true, SeqCst);
        });
        forker.join().expect("the child is well");
    });
    let seen = log.of(false);
    ends_well(kind.fork(|| 0));
    assert_eq!(log.of(false), seen, "called after it was dropped");
    assert_eq!(carefork::stats().dirty, 0);
}

#[test]
fn dropping_asks_an_uncommitted_fork_to_undo() {
    for kind in BOTH {
        let name = "registering::dropping_asks_an_uncommitted_fork_to_undo";
        if std::env::var_os("CAREFORK_KIND").is_some_and(|k| k.as_encoded_bytes() != format!("{kind:?}").as_bytes()) {
            continue;
        }
        let env = vec![("CAREFORK_KIND".to_owned(), format!("{kind:?}"))];
        isolated_with(name, 30, Setup { env, ..Setup::default() }, || dropping_asks(kind));
    }
}

/// The fork waits, hooks first, for a lock that stays held, with the budget standing still: only the drop can move it.
fn dropping_asks(kind: Kind) {
    freeze();
    let log = Log::new();
    let lock = Arc::new(Mutex::new(()));
    let _held = register(Hook::std_mutex("held", Arc::clone(&lock)).rank(1));
    let prepared = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&prepared);
    let registration = register(log.hook("H").prepare(move || {
        log.add(b'p', b'H');
        count.fetch_add(1, SeqCst);
    }));
    thread::scope(|s| {
        let hold = lock.lock().expect("not poisoned");
        let forker = s.spawn(move || ends_well(kind.fork(|| 0)));
        // The second time it waits for the lock with the gate open.
        until(|| prepared.load(SeqCst) >= 2);
        a_while();
        drop(registration);
        let seen = log.of(false);
        assert!(!forker.is_finished(), "forked without the lock");
        assert!(seen.ends_with("uH"), "{seen}");
        drop(hold);
        forker.join().expect("the child is well");
        assert_eq!(log.of(false), seen, "called after it was dropped");
        assert_eq!(log.of(true), "");
    });
    assert_eq!(carefork::stats().dirty, 0);
}

#[test]
fn hooks_come_and_go_while_others_fork() {
    isolated("registering::hooks_come_and_go_while_others_fork", 120, || {
        let _clock = run_slowly();
        let stop = AtomicBool::new(false);
        let wrong = Arc::new(AtomicU32::new(0));
        thread::scope(|s| {
            let _stop = Stop(&stop);
            for n in 0..2 {
                let (stop, wrong) = (&stop, Arc::clone(&wrong));
                s.spawn(move || {
                    let mut rank = n;
                    while !stop.load(SeqCst) {
                        rank = (rank * 7 + 3) % 5;
                        // 1 while registered; more while a fork has the hook in its hands.
                        let state = Arc::new(AtomicU32::new(1));
                        let calls = [(); 4].map(|()| (Arc::clone(&state), Arc::clone(&wrong)));
                        let [prepare, undo, parent, child] = calls.map(|(state, wrong)| {
                            move |from: u32, to: u32| {
                                if state.compare_exchange(from, to, SeqCst, SeqCst).is_err() {
                                    wrong.fetch_add(1, SeqCst);
                                }
                            }
                        });
                        let hook = register(
                            Hook::new("comes and goes")
                                .rank(rank)
                                .prepare(move || prepare(1, 2))
                                .undo(move || undo(2, 1))
                                .parent(move || parent(2, 1))
                                .child(move || child(2, 1)),
                        );
                        for _ in 0..rank * 50 {
                            std::hint::spin_loop();
                        }
                        drop(hook);
                        if state.swap(0, SeqCst) != 1 {
                            wrong.fetch_add(1, SeqCst);
                        }
                    }
                });
            }
            let bad = Arc::clone(&wrong);
            let child = move || i32::from(bad.load(SeqCst) != 0);
            let tally = fork_many(2000, 1, SOON, |i| BOTH[i as usize % 2].fork(&child));
            tally.expect_clean(2000);
        });
        assert_eq!(wrong.load(SeqCst), 0, "calls that a hook should not have had");
        assert_eq!(carefork::stats().dirty, 0);
    });
}

/// What a hook owns is dropped by the next fork of carefork's: a panic in there is told, and does not lose the child.
#[test]
fn what_a_hook_owns_panics_where_it_is_dropped() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("on purpose");
        }
    }
    isolated("registering::what_a_hook_owns_panics_where_it_is_dropped", 20, || {
        std::panic::set_hook(Box::new(|_| ()));
        let bomb = Bomb;
        let bomb = register(Hook::new("bomb").parent(move || _ = &bomb));
        let bomb = std::sync::Mutex::new(Some(bomb));
        let taker = register(Hook::new("taker").parent(move || drop(bomb.lock().expect("not poisoned").take())));
        let said = stderr_of(|| (0..2).for_each(|_| ends_well(coordinated(|| 0).expect("a child"))));
        assert_eq!(said, "carefork: hook bomb panicked in its own drop: on purpose\n");
        drop(taker);
    });
}
