//! Regions that never wait, in signal handlers and elsewhere (G12).

use crate::common::{check, isolated, raw};
use crate::drive::{BOTH, MS, Stop, block, coordinated, freeze, gettid, inside, on_signal, signal_thread, until_shut};
use crate::{Pair, all_is_well, ends_well};
use carefork::{no_forking, try_no_forking};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread;

static TRIES: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];

extern "C" fn tries(_: i32) {
    let errno = raw::errno();
    match try_no_forking() {
        Some(region) => {
            TRIES[0].fetch_add(1, SeqCst);
            // Nested ones too.
            drop(try_no_forking());
            drop(region);
        }
        None => {
            TRIES[1].fetch_add(1, SeqCst);
        }
    }
    assert_eq!(raw::errno(), errno);
}

#[test]
fn signal_handlers_try() {
    isolated("trying::signal_handlers_try", 60, || {
        // No budget ends here, however busy the machine.
        freeze();
        on_signal(libc::SIGUSR1, tries);
        let (stop, pair) = (AtomicBool::new(false), Pair(AtomicU64::new(0), AtomicU64::new(0)));
        let tids: [AtomicI32; 3] = [const { AtomicI32::new(0) }; 3];
        thread::scope(|s| {
            let _end = Stop(&stop);
            // One in and out of regions, one waiting in a system call, one that forks below.
            s.spawn(|| {
                tids[0].store(gettid(), SeqCst);
                while !stop.load(SeqCst) {
                    let _region = no_forking();
                    pair.0.fetch_add(1, SeqCst);
                    drop(no_forking());
                    pair.1.fetch_add(1, SeqCst);
                }
            });
            // This one has never used carefork but in the handler.
            s.spawn(|| {
                tids[1].store(gettid(), SeqCst);
                while !stop.load(SeqCst) {
                    thread::sleep(MS);
                }
            });
            tids[2].store(gettid(), SeqCst);
            s.spawn(|| {
                block(&[libc::SIGUSR1]);
                while !stop.load(SeqCst) {
                    tids.iter()
                        .map(|t| t.load(SeqCst))
                        .filter(|&t| t != 0)
                        .for_each(|t| signal_thread(t, libc::SIGUSR1));
                    thread::sleep(MS / 20);
                }
            });
            for i in (0..).take_while(|&i| i < 400 || TRIES[0].load(SeqCst) <= 100) {
                ends_well(BOTH[i % 2].fork(|| {
                    check(1, pair.0.load(SeqCst) == pair.1.load(SeqCst));
                    check(2, try_no_forking().is_some());
                    0
                }));
            }
        });
        all_is_well();
    });
}

#[test]
fn while_the_gate_is_shut_trying_fails() {
    isolated("trying::while_the_gate_is_shut_trying_fails", 30, || {
        freeze();
        let busy = inside("busy");
        thread::scope(|s| {
            s.spawn(|| ends_well(coordinated(|| 0).expect("a fork")));
            until_shut();
            // A thread that was never seen, too; and failing leaves nothing behind that would hold the fork up.
            let fresh = s.spawn(|| assert!(try_no_forking().is_none()));
            assert!((0..100).all(|_| try_no_forking().is_none()));
            assert!(fresh.join().is_ok());
            busy.leave();
        });
        assert!(try_no_forking().is_some());
    });
}
