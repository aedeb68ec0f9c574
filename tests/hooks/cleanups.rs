//! Clean-ups: in children that go on without exec, and only there (H1).

use crate::common::{Verdict, check, isolated, raw, reap};
use crate::drive::{SOON, coordinated, foreign};
use crate::{Log, ends_well};
use carefork::{Fork, ForkOptions, Hook, no_forking, register};
use std::thread;

#[test]
fn cleanup_runs_in_children_that_go_on_only() {
    isolated("cleanups::cleanup_runs_in_children_that_go_on_only", 30, || {
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
    isolated("cleanups::a_cleanup_may_start_threads_and_register", 30, || {
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
