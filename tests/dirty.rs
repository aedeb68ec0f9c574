//! Bounds and budgets by a driven clock: Busy with its culprits, dirty forks and their children, the gate that reopens
//! (G6, G11).

#![allow(unsafe_code, clippy::disallowed_methods)]

mod common;
mod drive;

use carefork::testing::advance;
use carefork::{
    ForkError, ForkOptions, Hook, lineage, no_forking, register, set_foreign_budget, stats, try_no_forking,
};
use common::{Verdict, check, isolated, raw, reap};
use drive::{
    BOTH, Kind, MS, SOON, Stop, a_while, coordinated, foreign, fork_with, freeze, gettid, inside, no_child_left,
    run_clock, run_slowly, run_with, until, until_it_looked, until_shut,
};
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// Standard error goes into a pipe for as long as this lives.
struct Caught {
    read: std::fs::File,
    before: OwnedFd,
}

fn catch_stderr() -> Caught {
    let mut ends = [0; 2];
    // SAFETY: two numbers are written to `ends`.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) }, 0);
    // SAFETY: integers only.
    let before = unsafe { libc::fcntl(2, libc::F_DUPFD_CLOEXEC, 3) };
    // SAFETY: integers only; 2 is replaced for good by this test.
    assert_eq!(unsafe { libc::dup2(ends[1], 2) }, 2);
    // SAFETY: the kernel just gave us this number.
    let read = unsafe { OwnedFd::from_raw_fd(ends[0]) };
    // SAFETY: as above.
    let write = unsafe { OwnedFd::from_raw_fd(ends[1]) };
    drop(write);
    // SAFETY: as above.
    let before = unsafe { OwnedFd::from_raw_fd(before) };
    Caught { read: read.into(), before }
}

impl Caught {
    fn text(&mut self) -> String {
        let mut text = Vec::new();
        // Ends with EAGAIN, as this process holds the other end.
        drop(self.read.read_to_end(&mut text));
        String::from_utf8(text).expect("text")
    }
}

impl Drop for Caught {
    fn drop(&mut self) {
        // SAFETY: integers only.
        unsafe { libc::dup2(self.before.as_raw_fd(), 2) };
    }
}

// -- G6

#[test]
fn busy_names_those_in_the_way() {
    isolated("busy_names_those_in_the_way", 60, || {
        // Not faster than this thread, which forks, looks at it.
        let clock = run_with(gettid(), 5 * MS);
        let one = inside("culprit");
        let Err(ForkError::Busy { culprits }) = coordinated(|| 1) else { panic!("it is in the way") };
        assert_eq!((culprits.count, culprits.threads.len(), culprits.hook), (1, 1, None));
        assert!(!culprits.queue);
        let named = &culprits.threads[0];
        assert_eq!((named.tid as i32, named.name.as_str()), (one.tid, "culprit"));
        let text = ForkError::Busy { culprits: culprits.clone() }.to_string();
        assert!(text.contains(&format!("thread {} \"culprit\"", one.tid)), "{text}");
        if cfg!(debug_assertions) {
            let at = named.entered.expect("recorded in this build");
            assert!(at.file().ends_with("drive/mod.rs"));
            assert_eq!(at.line(), one.line);
            assert!(text.contains(&format!("drive/mod.rs:{}:", one.line)), "{text}");
        }
        // The name is cut by the kernel, and as many are named as there is room for.
        let more: Vec<_> = (0..10).map(|_| inside("a-name-that-is-much-too-long")).collect();
        let Err(ForkError::Busy { culprits }) = coordinated(|| 1) else { panic!("they are in the way") };
        assert_eq!((culprits.count, culprits.threads.len()), (11, 8));
        assert!(culprits.threads.iter().any(|t| t.name == "a-name-that-is-"), "{culprits:?}");
        assert!(culprits.to_string().contains("3 more threads"), "{culprits}");
        assert_eq!((stats().refused, stats().forks), (2, 0));
        // Each let go of other libraries' handlers now and then, and came back; not often.
        assert!((3..=12).contains(&stats().thrown_away), "{:?}", stats());
        assert!(no_child_left());
        drop((one, more));
        drop(clock);
        ends_well(coordinated(|| 0).expect("nobody is left"));
    });
}

#[test]
fn budgets_end_when_they_should() {
    isolated("budgets_end_when_they_should", 60, || {
        freeze();
        let busy = inside("busy");
        let hour = Duration::from_secs(3600);
        let plain = ForkOptions::new();
        let short = plain.clone().timeout(300 * MS);
        for (options, budget) in [(&plain, 1000 * MS), (&short, 300 * MS)] {
            let ended = AtomicBool::new(false);
            thread::scope(|s| {
                s.spawn(|| {
                    let end = fork_with(options, || 1);
                    ended.store(true, SeqCst);
                    assert!(matches!(end, Err(ForkError::Busy { .. })), "{end:?}");
                });
                until_shut();
                advance(budget - MS);
                a_while();
                assert!(!ended.load(SeqCst), "{budget:?}");
                advance(MS);
                until(|| ended.load(SeqCst));
            });
        }
        // A budget of nothing: one try.
        assert!(fork_with(&plain.clone().timeout(Duration::ZERO), || 1).is_err());
        // For ever.
        let (ended, never) = (AtomicBool::new(false), plain.clone().timeout_never());
        thread::scope(|s| {
            s.spawn(|| {
                let end = fork_with(&never, || 0);
                ended.store(true, SeqCst);
                ends_well(end.expect("it waited"));
            });
            until_shut();
            advance(hour);
            a_while();
            assert!(!ended.load(SeqCst));
            busy.leave();
            let _clock = run_clock(MS);
            until(|| ended.load(SeqCst));
        });
    });
}

#[test]
fn the_budget_of_foreign_forks() {
    isolated("the_budget_of_foreign_forks", 60, || {
        let mut stderr = catch_stderr();
        freeze();
        for (set, ms) in [(false, 5000), (true, 200)] {
            if set {
                set_foreign_budget(Some(ms * MS));
            }
            let (busy, ended, dirty) = (inside("busy"), AtomicBool::new(false), stats().dirty);
            thread::scope(|s| {
                s.spawn(|| {
                    let pid = foreign(|| i32::from(!lineage().dirty));
                    ended.store(true, SeqCst);
                    ends_well(pid);
                });
                until_shut();
                advance((ms - 1) * MS);
                a_while();
                assert!(!ended.load(SeqCst));
                advance(MS);
                until(|| ended.load(SeqCst));
            });
            assert_eq!(stats().dirty, dirty + 1);
            busy.leave();
        }
        set_foreign_budget(None);
        let (busy, ended) = (inside("busy"), AtomicBool::new(false));
        thread::scope(|s| {
            s.spawn(|| {
                let pid = foreign(|| i32::from(lineage().dirty));
                ended.store(true, SeqCst);
                ends_well(pid);
            });
            until_shut();
            (0..10).for_each(|_| advance(3600 * 1000 * MS));
            a_while();
            assert!(!ended.load(SeqCst));
            busy.leave();
            let _clock = run_clock(MS);
            until(|| ended.load(SeqCst));
        });
        assert_eq!(stats().dirty, 2);
        assert_eq!(stderr.text().matches("carefork:").count(), 2);
    });
}

#[test]
fn a_dirty_fork_is_reported_once() {
    isolated("a_dirty_fork_is_reported_once", 60, || {
        let mut stderr = catch_stderr();
        let clock = run_clock(20 * MS);
        let busy = inside("culprit");
        let pid = foreign(|| {
            check(1, lineage().dirty && !lineage().bypass);
            check(2, lineage().generation == 1);
            check(3, stats().dirty == 0 && stats().foreign == 0);
            // Whatever comes of it is dirty too, however clean its own fork.
            let pid = Kind::Coordinated.fork(|| i32::from(!lineage().dirty || lineage().generation != 2));
            check(4, reap(pid, SOON) == Verdict::Exited(0));
            0
        });
        ends_well(pid);
        drop(clock);
        let text = stderr.text();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("carefork: ") && text.contains(&format!("thread {} culprit", busy.tid)), "{text}");
        if cfg!(debug_assertions) {
            assert!(text.contains(&format!("drive/mod.rs:{}]", busy.line)), "{text}");
        }
        assert_eq!((stats().dirty, stats().foreign), (1, 1));
        // This process is as it was.
        assert!(!lineage().dirty);
        busy.leave();
        ends_well(foreign(|| i32::from(lineage().dirty)));
        assert_eq!((stats().dirty, stats().foreign), (1, 2));
    });
}

#[test]
fn a_report_never_waits() {
    isolated("a_report_never_waits", 60, || {
        let stderr = catch_stderr();
        let _clock = run_clock(20 * MS);
        let _busy = inside("culprit");
        // Blocking from now on, and full.
        // SAFETY: integers only.
        unsafe { libc::fcntl(2, libc::F_SETFL, libc::O_NONBLOCK) };
        // SAFETY: the buffer is whole.
        while unsafe { libc::write(2, [0u8; 4096].as_ptr().cast(), 4096) } > 0 {}
        // SAFETY: as above.
        unsafe { libc::fcntl(2, libc::F_SETFL, 0) };
        ends_well(foreign(|| 0));
        assert_eq!((stats().dirty, stats().unreported), (1, 1));
        // SAFETY: `stderr` puts it back.
        unsafe { libc::close(2) };
        ends_well(foreign(|| 0));
        assert_eq!((stats().dirty, stats().unreported), (2, 2));
        drop(stderr);
    });
}

static PHASES: [AtomicU32; 4] = [const { AtomicU32::new(0) }; 4];

fn phases() -> [u32; 4] {
    std::array::from_fn(|i| PHASES[i].swap(0, SeqCst))
}

#[test]
fn hooks_that_did_not_prepare_do_not_run() {
    isolated("hooks_that_did_not_prepare_do_not_run", 60, || {
        let _stderr = catch_stderr();
        let count = |n: usize| {
            move || {
                PHASES[n].fetch_add(1, SeqCst);
            }
        };
        let counted = |name| Hook::new(name).prepare(count(0)).undo(count(1)).parent(count(2)).child(count(3));
        let _hook = register(counted("counted"));
        let pid = foreign(|| i32::from(phases() != [1, 0, 0, 1]));
        assert_eq!(phases(), [1, 0, 1, 0]);
        ends_well(pid);
        let busy = inside("busy");
        let clock = run_clock(20 * MS);
        let pid = foreign(|| i32::from(phases()[2..] != [0, 0]));
        let [prepared, undone, parent, child] = phases();
        assert_eq!((prepared, parent, child), (undone, 0, 0));
        ends_well(pid);
        assert!(coordinated(|| 1).is_err());
        let [prepared, undone, parent, child] = phases();
        assert_eq!((prepared, parent, child), (undone, 0, 0));
        drop(clock);
        busy.leave();
        carefork::testing::release();
        // One says no: a foreign fork goes ahead without that one.
        let _veto = register(Hook::new("veto").try_prepare(|| Err("no".into())).parent(count(2)).child(count(3)));
        assert!(coordinated(|| 1).is_err());
        assert_eq!(phases()[2..], [0, 0]);
        let pid = foreign(|| i32::from(phases() != [1, 0, 0, 1] || !lineage().dirty));
        assert_eq!(phases(), [1, 0, 1, 0]);
        ends_well(pid);
        assert_eq!(stats().dirty, 2);
    });
}

#[test]
fn a_dirty_child_works_on() {
    isolated("a_dirty_child_works_on", 60, || {
        let _stderr = catch_stderr();
        let clock = run_clock(20 * MS);
        let _busy: Vec<_> = (0..5).map(|_| inside("busy")).collect();
        // Waiting at the gate, and forking, at that moment.
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let _end = Stop(&stop);
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    drop(no_forking());
                }
            });
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    drop(coordinated(|| 1));
                }
            });
            for _ in 0..10 {
                ends_well(foreign(|| {
                    check(1, try_no_forking().is_some());
                    drop(no_forking());
                    thread::scope(|s| {
                        let threads: Vec<_> = (0..70).map(|_| s.spawn(|| drop(no_forking()))).collect();
                        for kind in BOTH {
                            check(2, reap(kind.fork(|| 0), SOON) == Verdict::Exited(0));
                        }
                        threads.into_iter().for_each(|t| check(3, t.join().is_ok()));
                    });
                    // Those left behind in regions do not hold it up.
                    check(4, stats().dirty == 0);
                    0
                }));
            }
        });
        drop(clock);
    });
}

/// In the way for a while, and no more when the time was over.
#[test]
fn a_hook_whose_lock_was_had_is_not_to_blame() {
    isolated("a_hook_whose_lock_was_had_is_not_to_blame", 60, || {
        let lock = Arc::new(std::sync::Mutex::new(()));
        let _hook = register(Hook::std_mutex("innocent", Arc::clone(&lock)));
        freeze();
        let tid = &AtomicI32::new(0);
        thread::scope(|s| {
            let held = lock.lock().expect("not poisoned");
            let fork = s.spawn(move || {
                tid.store(gettid(), SeqCst);
                coordinated(|| 1)
            });
            until(|| tid.load(SeqCst) != 0);
            // It has met the lock, and sleeps between two tries.
            until_it_looked(tid.load(SeqCst));
            let one = inside("to-blame");
            drop(held);
            let clock = run_clock(20 * MS);
            let Err(ForkError::Busy { culprits }) = fork.join().expect("no panic") else { panic!("it is in the way") };
            drop(clock);
            assert_eq!((culprits.hook, culprits.threads.len()), (None, 1), "{culprits:?}");
            drop(one);
        });
    });
}

/// Of two forks on one thread, the second names nobody whom the first has met.
#[test]
fn a_hook_is_not_to_blame_for_a_later_fork() {
    isolated("a_hook_is_not_to_blame_for_a_later_fork", 60, || {
        let lock = Arc::new(std::sync::Mutex::new(()));
        let _hook = register(Hook::std_mutex("innocent", Arc::clone(&lock)));
        freeze();
        set_foreign_budget(Some(20 * MS));
        let mut stderr = catch_stderr();
        let clock = run_clock(20 * MS);
        let held = lock.lock().expect("not poisoned");
        ends_well(foreign(|| i32::from(!lineage().dirty)));
        drop(held);
        assert!(stderr.text().contains("no lock for hook innocent"));
        let one = inside("to-blame");
        let Err(ForkError::Busy { culprits }) = coordinated(|| 1) else { panic!("it is in the way") };
        drop((clock, one));
        assert_eq!((culprits.hook, culprits.threads.len()), (None, 1), "{culprits:?}");
    });
}

#[test]
fn a_fork_that_never_comes_to_its_turn() {
    static HOLD: AtomicBool = AtomicBool::new(true);
    isolated("a_fork_that_never_comes_to_its_turn", 60, || {
        static REACHED: AtomicBool = AtomicBool::new(false);
        let mut stderr = catch_stderr();
        let _hook = register(Hook::new("slow").prepare(|| {
            REACHED.store(true, SeqCst);
            until(|| !HOLD.load(SeqCst));
        }));
        freeze();
        thread::scope(|s| {
            let forks = fork_with_time(s);
            until(|| REACHED.load(SeqCst));
            let clock = run_clock(20 * MS);
            let Err(ForkError::Busy { culprits }) = coordinated(|| 1) else { panic!("the other is stuck") };
            assert!(culprits.queue && culprits.count == 0, "{culprits:?}");
            let preparing = culprits.preparing.clone().expect("for a long while");
            assert_eq!(preparing.hook, "slow");
            assert_eq!(culprits.to_string(), preparing.to_string());
            ends_well(foreign(|| i32::from(!lineage().dirty)));
            drop(clock);
            HOLD.store(false, SeqCst);
            drop(forks.join());
        });
        let text = stderr.text();
        assert!(text.contains("another fork did not end: a fork of thread ") && text.lines().count() == 1, "{text}");
        assert!(text.ends_with(" is held up by hook slow\n"), "{text}");
        carefork::testing::release();
        ends_well(Kind::Coordinated.fork(|| 0));
    });
}

/// A thread that was in the way of an earlier fork is not told of by a later one that met nobody.
#[test]
fn a_refusal_names_nobody_whom_an_earlier_one_met() {
    static HOLD: AtomicBool = AtomicBool::new(true);
    isolated("a_refusal_names_nobody_whom_an_earlier_one_met", 60, || {
        static REACHED: AtomicBool = AtomicBool::new(false);
        let mut stderr = catch_stderr();
        freeze();
        let one = inside("long-gone");
        let clock = run_clock(20 * MS);
        let Err(ForkError::Busy { culprits }) = coordinated(|| 1) else { panic!("it is in the way") };
        assert_eq!(culprits.count, 1);
        ends_well(foreign(|| i32::from(!lineage().dirty)));
        drop((clock, one));
        assert!(stderr.text().contains("long-gone"));
        let _hook = register(Hook::new("slow").prepare(|| {
            REACHED.store(true, SeqCst);
            until(|| !HOLD.load(SeqCst));
        }));
        let refusals = thread::scope(|s| {
            let forks = fork_with_time(s);
            until(|| REACHED.load(SeqCst));
            let clock = run_clock(20 * MS);
            // The second one comes after the foreign one, which meets nobody either.
            let refusals = [(); 2].map(|()| {
                let refusal = coordinated(|| 1);
                (refusal, reap(foreign(|| i32::from(!lineage().dirty)), SOON))
            });
            drop(clock);
            HOLD.store(false, SeqCst);
            drop(forks.join());
            refusals
        });
        for (refusal, child) in refusals {
            let Err(ForkError::Busy { culprits }) = refusal else { panic!("the other was stuck") };
            assert!(culprits.queue && culprits.count == 0, "{culprits:?}");
            assert_eq!(child, Verdict::Exited(0));
        }
        let text = stderr.text();
        assert!(text.matches("another fork did not end").count() == 2 && !text.contains("long-gone"), "{text}");
    });
}

/// As above, of two foreign ones.
#[test]
fn a_dirty_fork_names_nobody_whom_an_earlier_one_met() {
    static HOLD: AtomicBool = AtomicBool::new(true);
    isolated("a_dirty_fork_names_nobody_whom_an_earlier_one_met", 60, || {
        static REACHED: AtomicBool = AtomicBool::new(false);
        let mut stderr = catch_stderr();
        freeze();
        set_foreign_budget(Some(Duration::ZERO));
        let one = inside("long-gone");
        ends_well(foreign(|| i32::from(!lineage().dirty)));
        one.leave();
        assert!(stderr.text().contains("long-gone"));
        let _hook = register(Hook::new("slow").prepare(|| {
            REACHED.store(true, SeqCst);
            until(|| !HOLD.load(SeqCst));
        }));
        let (child, refusal) = thread::scope(|s| {
            let forks = fork_with_time(s);
            until(|| REACHED.load(SeqCst));
            let child = reap(foreign(|| i32::from(!lineage().dirty)), SOON);
            let refusal = fork_with(&ForkOptions::new().timeout(Duration::ZERO), || 1);
            HOLD.store(false, SeqCst);
            drop(forks.join());
            (child, refusal)
        });
        assert_eq!(child, Verdict::Exited(0));
        let text = stderr.text();
        assert!(text.ends_with(": another fork did not end\n") && text.lines().count() == 1, "{text}");
        // Nor is the hook named, which has only begun.
        let Err(ForkError::Busy { culprits }) = refusal else { panic!("the other was at it") };
        assert!(culprits.queue && culprits.preparing.is_none() && culprits.count == 0, "{culprits:?}");
    });
}

/// A fork that is stuck has a hooked lock in its hands; the dirty child of another thread finds it free, as after a plain fork.
#[test]
fn a_dirty_child_finds_no_lock_held_by_another_fork() {
    static HOLD: AtomicBool = AtomicBool::new(true);
    isolated("a_dirty_child_finds_no_lock_held_by_another_fork", 60, || {
        static REACHED: AtomicBool = AtomicBool::new(false);
        let mutex = std::sync::Arc::new(std::sync::Mutex::new(0));
        let fast = std::sync::Arc::new(parking_lot::RwLock::new(0));
        let again = std::sync::Arc::new(parking_lot::ReentrantMutex::new(0));
        let _hooks = [
            register(Hook::lock_api_reentrant("again", std::sync::Arc::clone(&again))),
            register(Hook::std_mutex("mutex", std::sync::Arc::clone(&mutex))),
            register(Hook::lock_api_rwlock("rwlock", std::sync::Arc::clone(&fast))),
            register(Hook::new("slow").rank(1).prepare(|| {
                REACHED.store(true, SeqCst);
                until(|| !HOLD.load(SeqCst));
            })),
        ];
        set_foreign_budget(Some(Duration::ZERO));
        thread::scope(|s| {
            let forks = fork_with_time(s);
            until(|| REACHED.load(SeqCst));
            ends_well(foreign(|| {
                check(1, lineage().dirty);
                check(2, mutex.try_lock().is_ok());
                check(3, fast.try_write().is_some() && again.try_lock().is_some());
                // And is taken and let go of by the child's own forks.
                HOLD.store(false, SeqCst);
                ends_well(
                    Kind::Coordinated.fork(|| i32::from(mutex.try_lock().is_err() || fast.try_write().is_none())),
                );
                check(4, mutex.try_lock().is_ok() && fast.try_write().is_some());
                0
            }));
            assert!(mutex.try_lock().is_err() && fast.try_write().is_none());
            HOLD.store(false, SeqCst);
            drop(forks.join());
        });
        assert!(mutex.try_lock().is_ok() && fast.try_write().is_some());
    });
}

/// The same for std's streams, which a plain fork would have found free.
#[test]
fn a_dirty_child_prints_while_another_fork_has_the_streams() {
    static LET_GO: AtomicBool = AtomicBool::new(false);
    isolated("a_dirty_child_prints_while_another_fork_has_the_streams", 60, || {
        static REACHED: AtomicBool = AtomicBool::new(false);
        // Among hooks of one rank the newest prepares first.
        let _slow = register(Hook::new("slow").rank(i32::MAX).prepare(|| {
            REACHED.store(true, SeqCst);
            until(|| LET_GO.load(SeqCst));
        }));
        let _streams = [carefork::stdio::guard(), carefork::stdio::guard()];
        let print = || {
            drop(std::io::stdout().lock());
            drop(std::io::stderr().lock());
        };
        set_foreign_budget(Some(Duration::ZERO));
        thread::scope(|s| {
            let _let_go = Stop(&LET_GO);
            let forks = fork_with_time(s);
            until(|| REACHED.load(SeqCst));
            ends_well(foreign(|| {
                check(1, lineage().dirty);
                print();
                // They are taken and let go of by the child's own forks.
                LET_GO.store(true, SeqCst);
                ends_well(Kind::Coordinated.fork(|| i32::from(thread::spawn(print).join().is_err())));
                i32::from(thread::spawn(print).join().is_err())
            }));
            LET_GO.store(true, SeqCst);
            drop(forks.join());
        });
        thread::spawn(print).join().expect("free in the parent");
    });
}

fn fork_with_time<'s>(s: &'s thread::Scope<'s, '_>) -> thread::ScopedJoinHandle<'s, ()> {
    s.spawn(|| ends_well(fork_with(&ForkOptions::new().timeout_never(), || 0).expect("no budget")))
}

// -- G11

#[test]
fn the_bound_doubles() {
    isolated("the_bound_doubles", 60, || {
        freeze();
        set_foreign_budget(None);
        let never = &ForkOptions::new().timeout_never();
        for kind in BOTH {
            let (busy, tid) = (inside("busy"), AtomicI32::new(0));
            thread::scope(|s| {
                s.spawn(|| {
                    tid.store(gettid(), SeqCst);
                    ends_well(match kind {
                        Kind::Coordinated => fork_with(never, || 0).expect("no budget"),
                        Kind::Foreign => foreign(|| 0),
                    });
                });
                // It knows how long it is to wait when it waits.
                let until_it_waits = || until_it_looked(tid.load(SeqCst));
                let step = MS / 100;
                // In all less than the half second after which a coordinated fork begins anew.
                for bound in [1, 2, 4, 8, 16, 32, 64, 100] {
                    until_shut();
                    until_it_waits();
                    advance(bound * MS - step);
                    until_it_waits();
                    assert!(try_no_forking().is_none(), "open again before {bound} ms ({kind:?})");
                    advance(step);
                    until(|| try_no_forking().is_some());
                    // And others are let in for as long as they were kept out.
                    until_it_waits();
                    advance(bound * MS - step);
                    until_it_waits();
                    assert!(try_no_forking().is_some(), "shut again within {bound} ms ({kind:?})");
                    advance(step);
                }
                busy.leave();
            });
        }
    });
}

/// A is in a region and waits for a message from B, who must begin a region before sending it.
#[test]
fn threads_may_wait_for_each_other_inside_regions() {
    isolated("threads_may_wait_for_each_other_inside_regions", 60, || {
        let _clock = run_slowly();
        set_foreign_budget(None);
        let never = ForkOptions::new().timeout_never();
        for i in 0..40 {
            let kind = BOTH[i % 2];
            let (to_b, from_a) = mpsc::channel::<()>();
            let (to_a, from_b) = mpsc::channel::<()>();
            thread::scope(|s| {
                s.spawn(move || {
                    let _region = no_forking();
                    to_b.send(()).expect("B listens");
                    from_b.recv().expect("B answers");
                });
                from_a.recv().expect("A began");
                s.spawn(|| {
                    ends_well(match kind {
                        Kind::Coordinated => fork_with(&never, || 0).expect("no budget"),
                        Kind::Foreign => foreign(|| 0),
                    });
                });
                until_shut();
                // B: the gate is shut for as long as A stays in its region.
                let _region = no_forking();
                to_a.send(()).expect("A listens");
            });
        }
        assert_eq!(stats().dirty + stats().thrown_away, 0);
    });
}

/// The waiter itself reopens, were the forker never to run again.
#[test]
fn who_waits_at_the_gate_reopens_it() {
    static STUCK: AtomicBool = AtomicBool::new(false);
    static GO: AtomicBool = AtomicBool::new(false);
    isolated("who_waits_at_the_gate_reopens_it", 60, || {
        // A prepare that can only block is called with the gate shut, and here waits for a thread at the gate.
        let _hook = register(Hook::new("blocks").prepare(|| {
            STUCK.store(true, SeqCst);
            until(|| GO.load(SeqCst));
        }));
        for kind in BOTH {
            STUCK.store(false, SeqCst);
            GO.store(false, SeqCst);
            let reopened = stats().reopened;
            freeze();
            let waiter = AtomicI32::new(0);
            thread::scope(|s| {
                s.spawn(|| ends_well(kind.fork(|| i32::from(lineage().dirty))));
                until(|| STUCK.load(SeqCst));
                assert!(try_no_forking().is_none());
                s.spawn(|| {
                    waiter.store(gettid(), SeqCst);
                    drop(no_forking());
                    GO.store(true, SeqCst);
                });
                until(|| waiter.load(SeqCst) != 0);
                a_while();
                assert!(!GO.load(SeqCst), "{kind:?}");
                let _clock = run_slowly();
                until(|| GO.load(SeqCst));
            });
            assert_eq!(stats().reopened, reopened + 1, "{kind:?}");
        }
        carefork::testing::release();
        assert_eq!(stats().dirty + stats().thrown_away, 0);
    });
}

#[test]
fn fd_two_is_put_back() {
    isolated("fd_two_is_put_back", 10, || {
        let mut stderr = catch_stderr();
        raw::Line::new().text("caught").send();
        assert_eq!(stderr.text(), "caught\n");
    });
}
