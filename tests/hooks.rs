//! Hooks: order, the two sides, vetoes, panics, registration from anywhere, clean-ups, and locks nested both ways round regions
//! (H1 to H4).

// Forks and shared memory.
#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;
mod drive;

use carefork::{Fork, ForkError, ForkOptions, Hook, Registration, no_forking, register};
use common::{Refuse, Setup, Verdict, check, fork_many, isolated, isolated_with, raw, reap};
use drive::{BOTH, Kind, SOON, Stop, a_while, coordinated, foreign, freeze, run_clock, run_slowly, until};
use std::cell::UnsafeCell;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::AsRawFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

// -- what happened, on both sides

/// Events of a parent and its children, in memory that they share. Async-signal-safe.
#[derive(Clone, Copy)]
struct Log(&'static [AtomicU64; 512]);

impl Log {
    fn new() -> Log {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, kind, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: the mapping has 4096 zeroed bytes and is never unmapped.
        let log = Log(unsafe { &*page.cast() });
        log.0[511].store(raw::getpid() as u64, SeqCst);
        log
    }

    fn add(self, phase: u8, hook: u8) {
        let at = self.0[0].fetch_add(1, SeqCst) as usize + 1;
        let here = u64::from(self.0[511].load(SeqCst) != raw::getpid() as u64);
        self.0[at].store(here << 32 | u64::from(phase) << 8 | u64::from(hook), SeqCst);
    }

    /// "pA pB" and so on: prepare, undo, parent (r), child, clean-up (e); of the process that made the log, or of its children.
    fn of(self, children: bool) -> String {
        let n = self.0[0].load(SeqCst) as usize;
        let events = self.0[1..=n].iter().map(|e| e.load(SeqCst));
        let words = events.filter(|e| e >> 32 == u64::from(children)).map(|e| {
            let bytes = [(e >> 8) as u8, e as u8];
            String::from_utf8_lossy(&bytes).into_owned()
        });
        words.collect::<Vec<_>>().join(" ")
    }

    fn clear(self) {
        self.0[0].store(0, SeqCst);
    }

    #[track_caller]
    fn expect(self, parent: &str, child: &str) {
        assert_eq!((self.of(false).as_str(), self.of(true).as_str()), (parent, child));
        self.clear();
    }

    fn hook(self, name: &'static str) -> Hook {
        let letter = name.as_bytes()[0];
        Hook::new(name)
            .prepare(move || self.add(b'p', letter))
            .undo(move || self.add(b'u', letter))
            .parent(move || self.add(b'r', letter))
            .child(move || self.add(b'c', letter))
            .cleanup(move || self.add(b'e', letter))
    }
}

#[track_caller]
fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// The gate is open on this and on other threads, and forks work.
#[track_caller]
fn all_is_well() {
    let other = thread::spawn(|| carefork::try_no_forking().is_some());
    assert!(other.join().expect("no panic"), "the gate is shut");
    for kind in BOTH {
        ends_well(kind.fork(|| {
            drop(no_forking());
            0
        }));
    }
}

/// What is written to fd 2 while `f` runs, by this process and its children.
fn stderr_of(f: impl FnOnce()) -> String {
    let mut file = File::from(raw::memfd());
    // SAFETY: numbers only; the copy is put back below.
    let aside = unsafe { libc::fcntl(2, libc::F_DUPFD_CLOEXEC, 10) };
    // SAFETY: as above.
    unsafe { libc::dup2(file.as_raw_fd(), 2) };
    let end = catch_unwind(AssertUnwindSafe(f));
    // SAFETY: as above.
    unsafe { libc::dup2(aside, 2) };
    // SAFETY: the copy is ours.
    unsafe { libc::close(aside) };
    let mut text = String::new();
    file.rewind().and_then(|()| file.read_to_string(&mut text)).expect("the file can be read");
    eprint!("{text}");
    if let Err(payload) = end {
        std::panic::resume_unwind(payload);
    }
    text
}

/// Panics say nothing by themselves: what is reported is carefork's own.
fn quiet_panics() {
    std::panic::set_hook(Box::new(|_| {}));
}

fn vetoed(error: ForkError) -> (&'static str, String) {
    match error {
        ForkError::Vetoed { hook, reason } => (hook, reason.into_owned()),
        other => panic!("not a veto: {other:?}"),
    }
}

// -- H2

#[test]
fn prepare_by_rank_newest_first_and_the_rest_in_reverse() {
    isolated("prepare_by_rank_newest_first_and_the_rest_in_reverse", 30, || {
        let log = Log::new();
        let ranks =
            [("A", 5), ("B", -3), ("C", 0), ("D", 0), ("E", i32::MIN), ("F", i32::MAX), ("G", 0), ("H", i32::MAX)];
        let _hooks = ranks.map(|(name, rank)| register(log.hook(name).rank(rank)));
        for kind in BOTH {
            ends_well(kind.fork(|| 0));
            log.expect("pE pB pG pD pC pA pH pF rF rH rA rC rD rG rB rE", "cF cH cA cC cD cG cB cE");
        }
        // SAFETY: nothing of the parent's is used.
        let mut child = unsafe { carefork::spawn(|| 0) }.expect("a child");
        assert!(child.wait().expect("a status").success());
        let cleanup = "eF eH eA eC eD eG eB eE";
        log.expect("pE pB pG pD pC pA pH pF rF rH rA rC rD rG rB rE", &format!("cF cH cA cC cD cG cB cE {cleanup}"));
    });
}

#[test]
fn a_child_forks_by_the_same_hooks() {
    isolated("a_child_forks_by_the_same_hooks", 30, || {
        let log = Log::new();
        let _hooks = ["A", "B"].map(|name| register(log.hook(name)));
        ends_well(
            coordinated(|| {
                log.clear();
                // A hook of the child's own, and one less.
                let own = register(log.hook("C"));
                let Ok(pid) = coordinated(|| 0) else { return 10 };
                check(11, reap(pid, SOON) == Verdict::Exited(0));
                drop(own);
                let Ok(pid) = coordinated(|| 0) else { return 12 };
                check(13, reap(pid, SOON) == Verdict::Exited(0));
                0
            })
            .expect("a child"),
        );
        let all = log.of(true);
        let count = |word: &str| all.split(' ').filter(|w| *w == word).count();
        // The parent's side of its own fork may have run before or after the clearing; it is not among these.
        for hook in ["A", "B"] {
            assert_eq!((count(&format!("p{hook}")), count(&format!("c{hook}"))), (2, 2), "{all}");
            assert_eq!(count(&format!("r{hook}")), 2, "{all}");
        }
        assert_eq!((count("pC"), count("cC"), count("rC")), (1, 1, 1), "{all}");
    });
}

// -- H1: undo, and failures of libc's fork

#[test]
fn undo_is_for_a_fork_that_did_not_happen() {
    isolated("undo_is_for_a_fork_that_did_not_happen", 30, || {
        let log = Log::new();
        let _a = register(log.hook("A"));
        // Without an undo, parent serves.
        let _b =
            register(Hook::new("B").prepare(move || log.add(b'p', b'B')).parent(move || log.add(b'r', b'B')).rank(1));
        let refuse = Arc::new(AtomicBool::new(true));
        let says_no = Arc::clone(&refuse);
        let veto = move || if says_no.load(SeqCst) { Err("not now".into()) } else { Ok(()) };
        let _c = register(Hook::new("C").rank(2).try_prepare(veto));
        assert_eq!(vetoed(coordinated(|| 0).expect_err("vetoed")), ("C", "not now".to_owned()));
        log.expect("pA pB rB uA", "");
        refuse.store(false, SeqCst);
        ends_well(coordinated(|| 0).expect("a child"));
        log.expect("pA pB rB rA", "cA");
    });
}

#[test]
fn a_failed_fork_is_undone() {
    let refuse = vec![Refuse::call(libc::SYS_clone, libc::EAGAIN)];
    isolated_with("a_failed_fork_is_undone", 30, Setup { refuse, ..Setup::default() }, || {
        let log = Log::new();
        let _hooks = ["A", "B"].map(|name| register(log.hook(name)));
        let error = coordinated(|| 0).expect_err("refused");
        assert!(matches!(&error, ForkError::Os(e) if e.raw_os_error() == Some(libc::EAGAIN)), "{error:?}");
        log.expect("pB pA uA uB", "");
        assert_eq!((foreign(|| 0), raw::errno()), (-1, libc::EAGAIN));
        log.expect("pB pA uA uB", "");
        assert!(thread::spawn(|| carefork::try_no_forking().is_some()).join().expect("no panic"));
    });
}

// -- H3

#[test]
fn a_veto_undoes_a_coordinated_fork_in_order() {
    isolated("a_veto_undoes_a_coordinated_fork_in_order", 30, || {
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
    isolated("a_veto_makes_a_foreign_fork_dirty", 30, || {
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

#[test]
fn a_panic_in_prepare_is_a_veto() {
    isolated("a_panic_in_prepare_is_a_veto", 30, || {
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
    isolated("a_panic_elsewhere_is_reported_and_the_others_run", 30, || {
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
    isolated("no_fork_from_a_hook", 30, || {
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

// -- H1: registration from anywhere

type Seat = Arc<Mutex<Vec<Registration>>>;

fn clear(seat: &Seat) {
    let gone: Vec<_> = seat.lock().expect("no panic").drain(..).collect();
    drop(gone);
}

#[test]
fn a_hook_registered_in_a_hook_counts_from_the_next_fork() {
    isolated("a_hook_registered_in_a_hook_counts_from_the_next_fork", 30, || {
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
    isolated("dropping_in_a_hook_marks_and_frees_after_the_fork", 30, || {
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
    isolated("a_hook_may_take_itself_out", 30, || {
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
        let name = "dropping_waits_for_a_fork_that_has_the_hook";
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
        let name = "dropping_asks_an_uncommitted_fork_to_undo";
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
    isolated("hooks_come_and_go_while_others_fork", 120, || {
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

// -- H1: clean-ups

#[test]
fn cleanup_runs_in_children_that_go_on_only() {
    isolated("cleanup_runs_in_children_that_go_on_only", 30, || {
        let log = Log::new();
        let _hook = register(log.hook("A"));
        let fork = |f: fn(carefork::InChild) -> i32| {
            // SAFETY: the children do nothing but what the test says.
            let child = match unsafe { ForkOptions::new().fork() }.expect("a child") {
                Fork::Parent(child) => child,
                Fork::Child(token) => raw::exit_now(f(token)),
            };
            ends_well(child.into_id() as i32);
        };
        fork(|mut token| {
            token.exec(c"/bin/true", &[c"true"]);
            50
        });
        log.expect("pA rA", "cA");
        fork(|token| token.exit(0));
        log.expect("pA rA", "cA");
        ends_well(foreign(|| 0));
        log.expect("pA rA", "cA");
        fork(|token| {
            // SAFETY: nothing borrowed is used.
            let done = unsafe { token.cleanup() };
            i32::from((done.hooks, done.panicked, done.already) != (1, 0, false))
        });
        log.expect("pA rA", "cA eA");
        fork(|token| {
            drop(token);
            // SAFETY: nothing borrowed is used.
            i32::from(!unsafe { carefork::postfork_child_noexec() }.is_ok_and(|done| done.already))
        });
        log.expect("pA rA", "cA eA");
        ends_well(foreign(|| {
            // SAFETY: nothing borrowed is used.
            i32::from(unsafe { carefork::postfork_child_noexec() }.is_err())
        }));
        log.expect("pA rA", "cA eA");
    });
}

#[test]
fn a_cleanup_may_start_threads_and_register() {
    isolated("a_cleanup_may_start_threads_and_register", 30, || {
        let log = Log::new();
        let work = move || {
            let region = thread::spawn(|| drop(no_forking())).join();
            check(60, region.is_ok());
            std::mem::forget(register(log.hook("N")));
            log.add(b'e', b'A');
        };
        let _hook = register(Hook::new("A").cleanup(work));
        // SAFETY: nothing of the parent's is used.
        let mut child = unsafe {
            carefork::spawn(|| match coordinated(|| 0) {
                Ok(pid) => i32::from(reap(pid, SOON) != Verdict::Exited(0)),
                Err(_) => 61,
            })
        }
        .expect("a child");
        assert_eq!(child.wait().expect("a status").code(), Some(0));
        let all = log.of(true);
        assert!(all.starts_with("eA pN") && all.contains("rN") && all.contains("cN"), "{all}");
    });
}

// -- H4

/// A lock that can only be waited for, as C libraries have it.
struct CLock(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: a pthread mutex is made for sharing.
unsafe impl Sync for CLock {}

impl CLock {
    fn lock(&self) {
        // SAFETY: statically initialised and never moved.
        assert_eq!(unsafe { libc::pthread_mutex_lock(self.0.get()) }, 0);
    }

    fn unlock(&self) {
        // SAFETY: as above; locked by this thread, or by the one that this child is a copy of.
        assert_eq!(unsafe { libc::pthread_mutex_unlock(self.0.get()) }, 0);
    }
}

static BLOCKS: CLock = CLock(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));
static TRIED: Mutex<(u64, u64)> = Mutex::new((0, 0));

/// One step of a thread that nests a hooked lock and a region, this way or that.
fn nest(way: u32) {
    let touch = || {
        let mut pair = TRIED.lock().unwrap_or_else(|e| e.into_inner());
        pair.0 += 1;
        pair.1 += 1;
    };
    match way {
        0 => {
            let _region = no_forking();
            BLOCKS.lock();
            BLOCKS.unlock();
        }
        1 => {
            BLOCKS.lock();
            drop(no_forking());
            BLOCKS.unlock();
        }
        2 => {
            let _region = no_forking();
            touch();
        }
        _ => {
            let mut pair = TRIED.lock().unwrap_or_else(|e| e.into_inner());
            pair.0 += 1;
            drop(no_forking());
            pair.1 += 1;
        }
    }
}

#[test]
fn hooked_locks_nest_both_ways_round_regions() {
    isolated("hooked_locks_nest_both_ways_round_regions", 240, || {
        let _blocks = register(
            Hook::new("blocks").prepare(|| BLOCKS.lock()).parent(|| BLOCKS.unlock()).child(|| BLOCKS.unlock()),
        );
        let _tried = register(Hook::std_mutex("tried", &TRIED).rank(1));
        // Such threads leave a fork few instants: it takes the time it takes, and must not hang.
        carefork::set_foreign_budget(None);
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _stop = Stop(&stop);
            for way in 0..4 {
                let stop = &stop;
                s.spawn(move || {
                    while !stop.load(SeqCst) {
                        nest(way);
                        thread::sleep(Duration::from_micros(20));
                    }
                });
            }
            let child = || {
                (0..4).for_each(nest);
                let pair = TRIED.lock().unwrap_or_else(|e| e.into_inner());
                i32::from(pair.0 != pair.1)
            };
            let forkers = BOTH.map(|kind| {
                s.spawn(move || {
                    fork_many(1000, 1, SOON, |_| match kind {
                        Kind::Coordinated => {
                            drive::fork_with(&ForkOptions::new().timeout_never(), child).expect("a child")
                        }
                        Kind::Foreign => kind.fork(child),
                    })
                })
            });
            for forker in forkers {
                forker.join().expect("forks").expect_clean(1000);
            }
        });
        let stats = carefork::stats();
        assert_eq!((stats.refused, stats.dirty), (0, 0));
    });
}

/// A thread in a region waits for a lock whose holder waits for a region: the fork steps back until they are through.
#[test]
fn a_fork_between_a_lock_and_a_region_steps_back() {
    isolated("a_fork_between_a_lock_and_a_region_steps_back", 60, || {
        let _blocks = register(
            Hook::new("blocks").prepare(|| BLOCKS.lock()).parent(|| BLOCKS.unlock()).child(|| BLOCKS.unlock()),
        );
        for kind in BOTH {
            let _clock = run_slowly();
            let inside = AtomicBool::new(false);
            thread::scope(|s| {
                BLOCKS.lock();
                s.spawn(|| {
                    let _region = no_forking();
                    inside.store(true, SeqCst);
                    BLOCKS.lock();
                    BLOCKS.unlock();
                });
                until(|| inside.load(SeqCst));
                let forker = s.spawn(move || ends_well(kind.fork(|| 0)));
                a_while();
                // This thread holds the lock and now wants a region: the gate may be shut for the fork.
                drop(no_forking());
                assert!(!forker.is_finished());
                BLOCKS.unlock();
                forker.join().expect("the child is well");
            });
        }
        assert_eq!(carefork::stats().dirty, 0);
    });
}

#[test]
fn a_lock_that_is_never_free_ends_at_the_budget() {
    isolated("a_lock_that_is_never_free_ends_at_the_budget", 60, || {
        let log = Log::new();
        let lock = Arc::new(Mutex::new(()));
        let _log = register(log.hook("A"));
        let hook = register(Hook::std_mutex("never free", Arc::clone(&lock)).rank(1));
        let prepared = |n| {
            let all = log.of(false);
            all.split(' ').filter(|w| *w == "pA").count() >= n
        };
        freeze();
        thread::scope(|s| {
            let _hold = lock.lock().expect("not poisoned");
            let forker = s.spawn(|| match coordinated(|| 0) {
                Err(ForkError::Busy { culprits }) => {
                    assert_eq!((culprits.hook, culprits.count, culprits.queue), (Some("never free"), 0, false));
                }
                other => panic!("{other:?}"),
            });
            // The second time it waits for the lock with the gate open.
            until(|| prepared(2));
            let _clock = run_clock(Duration::from_millis(10));
            forker.join().expect("it is busy");
        });
        let all = log.of(false);
        let count = |word: &str| all.split(' ').filter(|w| *w == word).count();
        assert_eq!(count("pA"), count("uA"), "{all}");
        assert!(count("pA") >= 2 && count("rA") == 0, "{all}");
        log.clear();
        // A foreign one goes ahead without any of them, and says so.
        let said = stderr_of(|| {
            thread::scope(|s| {
                let _hold = lock.lock().expect("not poisoned");
                let forker = s.spawn(|| ends_well(foreign(|| i32::from(!carefork::lineage().dirty))));
                until(|| prepared(2));
                let _clock = run_clock(Duration::from_millis(10));
                forker.join().expect("the child is well");
            });
        });
        assert!(said.contains("hook never free"), "{said:?}");
        assert_eq!(log.of(true), "");
        drop(hook);
        all_is_well();
    });
}
