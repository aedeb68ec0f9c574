//! Rank, order, undo, and failures of libc's fork (H1, H2).

use crate::common::{Refuse, Setup, Verdict, check, isolated, isolated_with, raw, reap};
use crate::drive::{BOTH, SOON, coordinated, foreign};
use crate::{Log, ends_well, vetoed};
use carefork::{ForkError, Hook, register};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

#[test]
fn prepare_by_rank_newest_first_and_the_rest_in_reverse() {
    isolated("order::prepare_by_rank_newest_first_and_the_rest_in_reverse", 30, || {
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
    isolated("order::a_child_forks_by_the_same_hooks", 30, || {
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

#[test]
fn undo_is_for_a_fork_that_did_not_happen() {
    isolated("order::undo_is_for_a_fork_that_did_not_happen", 30, || {
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
    isolated_with("order::a_failed_fork_is_undone", 30, Setup { refuse, ..Setup::default() }, || {
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
