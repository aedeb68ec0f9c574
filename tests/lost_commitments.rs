//! Commitments that a waiter takes away before the copy is whole, and the word, shared by parent and child, that says so (G11).

#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;
mod handlers;

use carefork::{CareFd, Stats, lineage, no_forking, postfork_child_noexec, stats, try_no_forking};
use common::{Verdict, check, isolated, raw, reap};
use drive::{BOTH, Kind, MS, SOON, coordinated, foreign, freeze, no_child_left, until};
use handlers::{early, late, nothing};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, Ordering::SeqCst};
use std::thread;

fn ends_well(pid: i32) {
    assert_eq!(reap(pid, SOON), Verdict::Exited(0));
}

/// Shared with children: how far the test is.
static STEP: AtomicPtr<AtomicU32> = AtomicPtr::new(ptr::null_mut());

fn step() -> &'static AtomicU32 {
    // SAFETY: `share_step` has run, and the page stays mapped.
    unsafe { &*STEP.load(SeqCst) }
}

fn share_step() {
    let (read_write, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let page = unsafe { libc::mmap(ptr::null_mut(), 4096, read_write, kind, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    STEP.store(page.cast(), SeqCst);
}

fn until_step(n: u32) {
    until(|| step().load(SeqCst) >= n);
}

static AT_GATE: AtomicI32 = AtomicI32::new(0);
static THROUGH: AtomicBool = AtomicBool::new(false);
static WAITED: AtomicU32 = AtomicU32::new(0);

/// After the commitment: lets a thread come to the gate and waits until it is through. Once.
fn waits_for_a_thread_at_the_gate() {
    if WAITED.fetch_add(1, SeqCst) == 0 {
        AT_GATE.store(1, SeqCst);
        until(|| THROUGH.load(SeqCst));
    }
}

fn fork_while_one_comes_to_the_gate(kind: Kind, child: impl FnOnce() -> i32) {
    fork_while_one_does(kind, || drop(no_forking()), child);
}

/// `at_gate` runs in another thread, between carefork's prepare handler and the fork. Time passes while it waits.
fn fork_while_one_does(kind: Kind, at_gate: impl FnOnce() + Send, child: impl FnOnce() -> i32) {
    ends_well(forked_while_one_does(kind, at_gate, child));
}

/// The same, and the child is left to be reaped.
fn forked_while_one_does(kind: Kind, at_gate: impl FnOnce() + Send, child: impl FnOnce() -> i32) -> i32 {
    AT_GATE.store(0, SeqCst);
    THROUGH.store(false, SeqCst);
    WAITED.store(0, SeqCst);
    freeze();
    let forked = AtomicBool::new(false);
    let pid = thread::scope(|s| {
        s.spawn(|| {
            until(|| AT_GATE.load(SeqCst) == 1);
            assert!(try_no_forking().is_none());
            at_gate();
            THROUGH.store(true, SeqCst);
        });
        s.spawn(|| {
            until(|| AT_GATE.load(SeqCst) == 1);
            until(|| {
                // One that gave way comes back after a rest; there is nobody at the gate then.
                carefork::testing::advance(if THROUGH.load(SeqCst) { MS / 50 } else { MS });
                forked.load(SeqCst)
            });
        });
        let pid = kind.fork(child);
        forked.store(true, SeqCst);
        pid
    });
    assert_ne!(WAITED.load(SeqCst), 0);
    pid
}

#[test]
fn a_commitment_lost_before_the_fork() {
    isolated("a_commitment_lost_before_the_fork", 30, || {
        share_step();
        let child = |dirty| {
            step().fetch_add(1, SeqCst);
            i32::from(lineage().dirty != dirty)
        };
        early([waits_for_a_thread_at_the_gate, nothing, nothing]);
        fork_while_one_comes_to_the_gate(Kind::Coordinated, || child(false));
        // It gave way, and came back; its first child ended before anybody else's code ran there.
        assert_eq!((stats().reopened, stats().thrown_away, stats().forks), (1, 1, 1));
        assert_eq!(step().load(SeqCst), 1);
        fork_while_one_comes_to_the_gate(Kind::Foreign, || child(true));
        assert_eq!((stats().reopened, stats().thrown_away, stats().late), (2, 1, 1));
        assert_eq!(step().load(SeqCst), 2);
        // None of that is the next child's.
        early([nothing, nothing, nothing]);
        ends_well(foreign(|| i32::from(stats() != Stats::default())));
        assert!(no_child_left() && try_no_forking().is_some());
    });
}

/// The child cannot know whether its descriptors were copied before or after: it may leak one, and never closes a stranger's.
#[test]
fn what_is_registered_after_a_lost_commitment_is_left_alone() {
    isolated("what_is_registered_after_a_lost_commitment_is_left_alone", 30, || {
        early([waits_for_a_thread_at_the_gate, nothing, nothing]);
        let before = CareFd::open(|| File::open("/dev/null")).expect("opened");
        let late = std::sync::Mutex::new(None);
        let number = AtomicI32::new(-1);
        let opens = || {
            let fd = CareFd::open(|| File::open("/dev/null")).expect("opened");
            number.store(fd.as_raw_fd(), SeqCst);
            *late.lock().expect("no panic") = Some(fd);
        };
        let earlier = before.as_raw_fd();
        // SAFETY: integers only.
        let is_open = |fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } != -1;
        fork_while_one_does(Kind::Foreign, opens, || {
            // SAFETY: no descriptor borrowed before is used.
            check(2, unsafe { postfork_child_noexec() }.is_ok_and(|c| c.closed == 1));
            check(3, !is_open(earlier));
            i32::from(!is_open(number.load(SeqCst)))
        });
        assert_eq!((stats().late, stats().dirty), (1, 0));
        early([nothing, nothing, nothing]);
        // Nothing is left of it: to the child of a clean fork it is a care-fd like any.
        ends_well(foreign(|| {
            // SAFETY: as above.
            check(2, unsafe { postfork_child_noexec() }.is_ok_and(|c| c.closed == 2));
            i32::from(is_open(number.load(SeqCst)))
        }));
        assert_eq!(stats().late, 1);
        // What is registered from now on is not marked: the next such child closes it.
        let after = CareFd::open(|| File::open("/dev/null")).expect("opened");
        early([waits_for_a_thread_at_the_gate, nothing, nothing]);
        fork_while_one_comes_to_the_gate(Kind::Foreign, || {
            // SAFETY: as above.
            i32::from(!unsafe { postfork_child_noexec() }.is_ok_and(|c| c.closed == 2))
        });
        assert_eq!(stats().late, 2);
        drop((before, after));
    });
}

/// Its report is lost where nobody reads it, and counted.
#[test]
fn a_late_child_that_cannot_say_so_counts_it() {
    isolated("a_late_child_that_cannot_say_so_counts_it", 30, || {
        early([waits_for_a_thread_at_the_gate, nothing, nothing]);
        for (closed, unreported) in [(false, 0), (true, 1)] {
            let stderr = raw::aside(std::io::stderr().as_fd());
            // SAFETY: integers only; it is put back below.
            assert!(!closed || unsafe { libc::close(2) } == 0);
            fork_while_one_comes_to_the_gate(Kind::Foreign, || {
                i32::from(!lineage().dirty || stats().unreported != unreported)
            });
            // SAFETY: integers only.
            assert_eq!(unsafe { libc::dup2(stderr.as_raw_fd(), 2) }, 2);
        }
        assert_eq!((stats().late, stats().unreported), (2, 0));
    });
}

#[test]
fn a_gate_reopened_after_the_fork_costs_nothing() {
    /// The child has come through its handlers, long ago.
    fn after_the_childs_end() {
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::uninit();
        // SAFETY: room for the answer. The child is left to be reaped.
        unsafe { libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), libc::WEXITED | libc::WNOWAIT) };
        waits_for_a_thread_at_the_gate();
    }
    isolated("a_gate_reopened_after_the_fork_costs_nothing", 30, || {
        early([nothing, after_the_childs_end, nothing]);
        for kind in BOTH {
            fork_while_one_comes_to_the_gate(kind, || i32::from(lineage().dirty));
        }
        assert_eq!((stats().reopened, stats().thrown_away, stats().forks), (2, 0, 1));
        assert!(no_child_left() && try_no_forking().is_some());
    });
}

// -- whose word it is

static PARENT: AtomicI32 = AtomicI32::new(0);

/// A child counts its forks on from where its parent was. Both make the next one at the same time, and what the child says about
/// its own, which is whole, is nothing about the parent's.
#[test]
fn a_childs_fork_says_nothing_about_its_parents() {
    fn in_the_parent() {
        if raw::getpid() == PARENT.load(SeqCst) && WAITED.load(SeqCst) == 0 {
            step().store(1, SeqCst);
            until_step(2);
            waits_for_a_thread_at_the_gate();
        }
    }
    isolated("a_childs_fork_says_nothing_about_its_parents", 60, || {
        share_step();
        freeze();
        PARENT.store(raw::getpid(), SeqCst);
        for (kind, dirty) in [(Kind::Foreign, 1), (Kind::Coordinated, 0)] {
            step().store(0, SeqCst);
            let other = kind.fork(|| {
                until_step(1);
                let own = coordinated(|| i32::from(lineage().dirty));
                check(1, own.is_ok_and(|pid| reap(pid, SOON) == Verdict::Exited(0)));
                step().store(2, SeqCst);
                0
            });
            early([in_the_parent, nothing, nothing]);
            let pid = forked_while_one_does(kind, || drop(no_forking()), || i32::from(lineage().dirty));
            early([nothing, nothing, nothing]);
            assert_eq!(reap(pid, SOON), Verdict::Exited(dirty), "{kind:?}");
            ends_well(other);
        }
        assert_eq!((stats().late, stats().thrown_away, stats().dirty), (1, 1, 0));
        assert!(no_child_left());
    });
}

static SLOW: AtomicBool = AtomicBool::new(false);

/// In its first handler a child of the fork that is armed waits until the test goes on.
fn is_slow() {
    if SLOW.load(SeqCst) {
        until_step(1);
    }
}

/// Where errno says nothing, the parent's handler leaves the gate shut until libc's fork has returned. The copy is whole by then all the same, also
/// where a waiter reopens the gate before child or parent has come so far.
#[test]
fn a_commitment_lost_where_errno_says_nothing_is_not_lost() {
    fn spoils_errno() {
        // SAFETY: takes nothing.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: the location is this thread's own.
        unsafe { *errno = libc::EBADF };
    }
    isolated("a_commitment_lost_where_errno_says_nothing_is_not_lost", 30, || {
        share_step();
        SLOW.store(true, SeqCst);
        early([nothing, spoils_errno, is_slow]);
        late([nothing, waits_for_a_thread_at_the_gate, nothing]);
        let pid = forked_while_one_does(Kind::Coordinated, || drop(no_forking()), || i32::from(lineage().dirty));
        step().store(1, SeqCst);
        ends_well(pid);
        assert_eq!((stats().reopened, stats().thrown_away, stats().forks), (1, 0, 1));
    });
}

/// More forks than there are words, while a child has not looked at its own yet: it goes by its copy of the gate.
#[test]
fn a_child_slower_than_a_thousand_forks_knows_how_it_was_made() {
    isolated("a_child_slower_than_a_thousand_forks_knows_how_it_was_made", 120, || {
        freeze();
        for late in [false, true] {
            share_step();
            SLOW.store(true, SeqCst);
            let looks = || i32::from(lineage().dirty != late);
            let slow = if late {
                early([waits_for_a_thread_at_the_gate, nothing, is_slow]);
                forked_while_one_does(Kind::Foreign, || drop(no_forking()), looks)
            } else {
                early([nothing, nothing, is_slow]);
                foreign(looks)
            };
            SLOW.store(false, SeqCst);
            (0..1100).for_each(|_| ends_well(foreign(|| i32::from(lineage().dirty))));
            step().store(1, SeqCst);
            ends_well(slow);
        }
        assert_eq!((stats().late, stats().dirty, stats().foreign), (1, 0, 2202));
    });
}

/// Shared mappings of memory.
fn shared_maps() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc");
    maps.lines().filter(|line| line.contains(" rw-s ")).count()
}

/// A process gives its parent's page back when it has one of its own: a long line of processes has no more of them than a short one.
#[test]
fn each_process_has_one_page_of_words() {
    fn generation(n: i32) -> i32 {
        let child = coordinated(|| if n < 10 { generation(n + 1) } else { 0 });
        match child.map(|pid| reap(pid, SOON)) {
            Ok(Verdict::Exited(0)) if shared_maps() != 1 => n,
            Ok(Verdict::Exited(code)) => code,
            _ => 100 + n,
        }
    }
    isolated("each_process_has_one_page_of_words", 60, || {
        assert_eq!(shared_maps(), 0);
        // A foreign fork has it made as well.
        ends_well(foreign(|| {
            ends_well(foreign(|| 0));
            i32::from(shared_maps() != 1)
        }));
        assert_eq!(shared_maps(), 1);
        assert_eq!(generation(1), 0);
    });
}
