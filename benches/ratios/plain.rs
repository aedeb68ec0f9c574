//! Regions, locks and descriptors: no forks.

use crate::measure::{on_threads, row, turns, wall_on_threads};
use carefork::{CareFd, testing};
use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

/// libxl's registry: records on the heap in a doubly linked list under one mutex.
struct Record {
    fd: i32,
    next: *mut Record,
    prev: *mut Record,
}

struct List(*mut Record);
unsafe impl Send for List {}

impl List {
    fn insert(&mut self, fd: i32) -> *mut Record {
        let r = Box::into_raw(Box::new(Record { fd, next: self.0, prev: std::ptr::null_mut() }));
        if !self.0.is_null() {
            unsafe { (*self.0).prev = r };
        }
        self.0 = r;
        r
    }

    fn remove(&mut self, r: *mut Record) {
        let r = unsafe { Box::from_raw(r) };
        black_box(r.fd);
        match r.prev.is_null() {
            true => self.0 = r.next,
            false => unsafe { (*r.prev).next = r.next },
        }
        if !r.next.is_null() {
            unsafe { (*r.next).prev = r.prev };
        }
    }
}

fn open_null() -> OwnedFd {
    use std::os::fd::FromRawFd;
    unsafe { OwnedFd::from_raw_fd(libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC)) }
}

pub(crate) fn rows(wanted: &dyn Fn(&str) -> bool) {
    let pl = parking_lot::Mutex::new(0u64);
    for (threads, limit) in [(1, 0.45), (8, 0.25)] {
        let what = format!("region enter+leave, {threads} threads, against parking_lot::Mutex");
        if wanted(&what) {
            let n = 400_000;
            let r = turns(
                21,
                || on_threads(threads, n, |_, n| (0..n).for_each(|_| drop(black_box(carefork::no_forking())))),
                || on_threads(threads, n, |_, n| (0..n).for_each(|_| *pl.lock() += 1)),
            );
            row(&what, r, "ns CPU", limit);
        }
    }
    let list = Mutex::new(List(std::ptr::null_mut()));
    for (threads, limit) in [(1, 0.6), (8, 0.1)] {
        let what = format!("register+unregister, {threads} threads, against Mutex + linked list");
        if wanted(&what) {
            let n = 200_000;
            let r = turns(
                21,
                || {
                    on_threads(threads, n, |i, n| {
                        for k in 0..n {
                            let fd = (i * 64) as i32 + (k % 32) as i32 + 5000;
                            let stamp = testing::register(fd);
                            testing::unregister(fd, black_box(stamp));
                        }
                    })
                },
                || {
                    on_threads(threads, n, |_, n| {
                        for k in 0..n {
                            let r = list.lock().unwrap().insert(k as i32);
                            list.lock().unwrap().remove(r);
                        }
                    })
                },
            );
            row(&what, r, "ns CPU", limit);
        }
    }
    if wanted("Mutex uncontended, against parking_lot") {
        let ours = carefork::Mutex::new(0u64);
        let n = 400_000;
        let r = turns(
            21,
            || on_threads(1, n, |_, n| (0..n).for_each(|_| *ours.lock() += 1)),
            || on_threads(1, n, |_, n| (0..n).for_each(|_| *pl.lock() += 1)),
        );
        row("Mutex uncontended, against parking_lot", r, "ns CPU", 1.5);
    }
    for write in [false, true] {
        let what = format!("RwLock uncontended {}, against parking_lot", if write { "write" } else { "read" });
        if wanted(&what) {
            let ours = carefork::RwLock::new(0u64);
            let theirs = parking_lot::RwLock::new(0u64);
            let n = 400_000;
            let r = turns(
                21,
                || {
                    on_threads(1, n, |_, n| {
                        (0..n).for_each(|_| {
                            if write {
                                *ours.write() += 1
                            } else {
                                black_box(*ours.read());
                            }
                        })
                    })
                },
                || {
                    on_threads(1, n, |_, n| {
                        (0..n).for_each(|_| {
                            if write {
                                *theirs.write() += 1
                            } else {
                                black_box(*theirs.read());
                            }
                        })
                    })
                },
            );
            row(&what, r, "ns CPU", 1.5);
        }
    }
    if wanted("CareFd open+drop, against open+close of /dev/null") {
        let n = 20_000;
        let r = turns(
            31,
            || on_threads(1, n, |_, n| (0..n).for_each(|_| drop(CareFd::open(|| Ok(open_null())).unwrap()))),
            || on_threads(1, n, |_, n| (0..n).for_each(|_| drop(open_null()))),
        );
        row("CareFd open+drop, against open+close of /dev/null", r, "ns CPU", 1.05);
    }
    if wanted("CareFd open_cloexec+drop, against open+close of /dev/null") {
        let n = 20_000;
        let r = turns(
            31,
            || on_threads(1, n, |_, n| (0..n).for_each(|_| drop(CareFd::open_cloexec(|| Ok(open_null())).unwrap()))),
            || on_threads(1, n, |_, n| (0..n).for_each(|_| drop(open_null()))),
        );
        row("CareFd open_cloexec+drop, against open+close of /dev/null", r, "ns CPU", 1.05);
    }
    throughput(wanted, "CareFd open+drop, 8 threads, throughput", || {
        wall_on_threads(8, 5_000, |_, n| (0..n).for_each(|_| drop(CareFd::open(|| Ok(open_null())).unwrap())))
    });
    throughput(wanted, "CareFd open_cloexec+drop, 8 threads, throughput", || {
        wall_on_threads(8, 5_000, |_, n| (0..n).for_each(|_| drop(CareFd::open_cloexec(|| Ok(open_null())).unwrap())))
    });
    let what = "memory per care-fd beyond the value";
    if wanted(what) {
        let extra = size_of::<CareFd<OwnedFd>>() - size_of::<OwnedFd>();
        let verdict = if extra <= 8 { "reached" } else { "**missed**" };
        println!(
            "| {what} | {extra} bytes | 32 bytes (libxl, heap) | {:.2} | ≤ 8 bytes | {verdict} |",
            extra as f64 / 32.0
        );
    }
}

fn throughput(wanted: &dyn Fn(&str) -> bool, what: &str, ours: impl FnMut() -> f64) {
    if !wanted(what) {
        return;
    }
    let bare = || wall_on_threads(8, 5_000, |_, n| (0..n).for_each(|_| drop(open_null())));
    let (ours, rival, ratio) = turns(21, ours, bare);
    let throughput = 1.0 / ratio;
    let verdict = if throughput >= 0.95 { "reached" } else { "**missed**" };
    println!("| {what} | {ours:.1} ns | {rival:.1} ns | {throughput:.3} | ≥ 0.95 | {verdict} |");
}
