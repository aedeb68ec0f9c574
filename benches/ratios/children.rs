//! Children: how soon a death is told of, what a dispatch costs, children by the thousand.

use crate::forks::{Server, pairs};
use crate::measure::{median, row, turns};
use carefork::{Child, Fork, ForkOptions, Reaper};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

fn now() -> u64 {
    unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

fn shared() -> &'static AtomicU64 {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    unsafe { &*libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0).cast() }
}

fn poll_in(fd: RawFd) {
    let mut p = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    unsafe { libc::poll(&mut p, 1, -1) };
}

/// Says when it ends, and ends when it is told to.
fn mortal(word: &AtomicU64, told: &mut impl Read) -> ! {
    let _ = told.read_exact(&mut [0]);
    word.store(now(), Ordering::SeqCst);
    unsafe { libc::_exit(0) }
}

/// From death to callback, ns.
fn by_reaper(reaper: &Reaper, word: &'static AtomicU64) -> f64 {
    let (mut read, mut write) = std::io::pipe().unwrap();
    let child = match unsafe { ForkOptions::new().fork() }.unwrap() {
        Fork::Child(_) => mortal(word, &mut read),
        Fork::Parent(child) => child,
    };
    static HEARD: AtomicU64 = AtomicU64::new(0);
    HEARD.store(0, Ordering::SeqCst);
    reaper.watch(child, |_| HEARD.store(now(), Ordering::SeqCst)).unwrap();
    write.write_all(&[0]).unwrap();
    while HEARD.load(Ordering::SeqCst) == 0 {
        poll_in(reaper.as_raw_fd());
        reaper.dispatch().unwrap();
    }
    (HEARD.load(Ordering::SeqCst) - word.load(Ordering::SeqCst)) as f64
}

/// The same by poll on a bare pidfd, and waitid.
fn by_poll(word: &'static AtomicU64) -> f64 {
    let (mut read, mut write) = std::io::pipe().unwrap();
    let child = match unsafe { ForkOptions::new().pidfd(false).fork() }.unwrap() {
        Fork::Child(_) => mortal(word, &mut read),
        Fork::Parent(child) => child.into_id(),
    };
    let pidfd = unsafe { OwnedFd::from_raw_fd(libc::syscall(libc::SYS_pidfd_open, child, 0) as i32) };
    write.write_all(&[0]).unwrap();
    poll_in(pidfd.as_raw_fd());
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let r = unsafe { libc::waitid(libc::P_PIDFD, pidfd.as_raw_fd() as u32, &mut info, libc::WEXITED) };
    assert_eq!(r, 0);
    (now() - word.load(Ordering::SeqCst)) as f64
}

fn asleep() -> Child {
    match unsafe { ForkOptions::new().fork() }.unwrap() {
        Fork::Child(_) => loop {
            unsafe { libc::pause() };
        },
        Fork::Parent(child) => child,
    }
}

fn room() {
    let limit = libc::rlimit { rlim_cur: 4096, rlim_max: 4096 };
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
}

fn mark() {
    unsafe { libc::write(-1, "mark".as_ptr().cast(), 4) };
}

/// Under strace: 1000 alive, 100 of them die, one dispatch between two marks.
pub(crate) fn dispatch_once() {
    room();
    let reaper = Reaper::new().unwrap();
    let watched: Vec<_> = (0..1000).map(|_| reaper.watch(asleep(), |_| {}).unwrap()).collect();
    for w in &watched[..100] {
        w.kill().unwrap();
        unsafe { libc::waitid(libc::P_PID, w.id(), std::ptr::null_mut(), libc::WEXITED | libc::WNOWAIT) };
    }
    mark();
    assert_eq!(reaper.dispatch().unwrap(), 100);
    mark();
    watched.iter().for_each(|w| w.kill_deregister().unwrap());
    while !reaper.is_empty() {
        poll_in(reaper.as_raw_fd());
        reaper.dispatch().unwrap();
    }
}

fn calls_of_a_dispatch() -> Option<usize> {
    let file = std::env::temp_dir().join(format!("carefork-bench-{}", std::process::id()));
    let strace =
        Command::new("strace").arg("-o").arg(&file).arg(std::env::current_exe().ok()?).arg("dispatch").status();
    let text = std::fs::read_to_string(&file).ok()?;
    drop(std::fs::remove_file(&file));
    if !strace.ok()?.success() {
        return None;
    }
    // Signals are no calls.
    let part = text.split("write(-1, \"mark\"").nth(1)?;
    Some(part.lines().skip(1).filter(|line| !line.starts_with("---")).count())
}

/// Started, watched and reaped, one after the other; ns each.
pub(crate) fn started_and_reaped(n: u32) -> f64 {
    let reaper = Reaper::new().unwrap();
    let ended = Arc::new(AtomicU32::new(0));
    let begin = now();
    for i in 0..n {
        let child = match unsafe { ForkOptions::new().fork() }.unwrap() {
            Fork::Child(child) => child.exit(0),
            Fork::Parent(child) => child,
        };
        let ended = Arc::clone(&ended);
        let counted = Arc::clone(&ended);
        reaper
            .watch(child, move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
        while ended.load(Ordering::Relaxed) == i {
            poll_in(reaper.as_raw_fd());
            reaper.dispatch().unwrap();
        }
    }
    (now() - begin) as f64 / f64::from(n)
}

/// fork and waitpid, ns each.
pub(crate) fn forked_and_waited(n: u32) -> f64 {
    let begin = now();
    for _ in 0..n {
        match unsafe { libc::fork() } {
            0 => unsafe { libc::_exit(0) },
            pid => assert_eq!(unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) }, pid),
        }
    }
    (now() - begin) as f64 / f64::from(n)
}

/// The same by what the kernel offers to whoever wants neither signals nor a thread for each child: what of the row is its own. ns each.
pub(crate) fn forked_and_polled(n: u32) -> f64 {
    let epoll = unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
    let epoll = epoll.as_raw_fd();
    let begin = now();
    for _ in 0..n {
        let pid = match unsafe { libc::fork() } {
            0 => unsafe { libc::_exit(0) },
            pid => pid,
        };
        unsafe {
            let pidfd = OwnedFd::from_raw_fd(libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32);
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
            libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, pidfd.as_raw_fd(), &mut event);
            poll_in(epoll);
            assert_eq!(libc::epoll_wait(epoll, &mut event, 1, 0), 1);
            let mut info: libc::siginfo_t = std::mem::zeroed();
            assert_eq!(libc::waitid(libc::P_PIDFD, pidfd.as_raw_fd() as u32, &mut info, libc::WEXITED), 0);
            libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, pidfd.as_raw_fd(), std::ptr::null_mut());
        }
    }
    (now() - begin) as f64 / f64::from(n)
}

#[cfg(target_env = "gnu")]
fn heap() -> usize {
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

pub(crate) fn rows(wanted: &dyn Fn(&str) -> bool) {
    let what = "death to callback, against poll on a bare pidfd and waitid";
    if wanted(what) {
        let (reaper, word) = (Reaper::new().unwrap(), shared());
        let many = |f: &dyn Fn() -> f64| median((0..40).map(|_| f()).collect()) / 1000.0;
        let r = turns(61, || many(&|| by_reaper(&reaper, word)), || many(&|| by_poll(word)));
        row(what, r, "µs", 1.1);
    }
    let what = "system calls of one dispatch, 1000 live and 100 dead";
    if wanted(what) {
        match calls_of_a_dispatch() {
            Some(n) => {
                let verdict = if n <= 310 { "reached" } else { "**missed**" };
                println!("| {what} | {n} | 91 000 (libxl) | | ≤ 3 a death, a few besides | {verdict} |");
            }
            None => println!("| {what} | strace cannot run here | 91 000 (libxl) | | | |"),
        }
    }
    let what = "10 000 children started, watched and reaped, against fork and waitpid";
    if wanted(what) {
        let by = |how: &'static str| move |s: &mut Server| s.ask(how) / 1000.0;
        let plain = by("children by waitpid");
        row(what, pairs((false, ""), (true, ""), by("children by reaper"), plain), "µs", 1.1);
        let (ours, rival, ratio) = pairs((true, ""), (true, ""), by("children by epoll"), plain);
        println!("| of it the kernel's: fork, pidfd, epoll by hand | {ours:.1} µs | {rival:.1} µs | {ratio:.3} | | |");
    }
    let what = "memory of a watched child";
    #[cfg(target_env = "gnu")]
    if wanted(what) {
        room();
        let reaper = Reaper::new().unwrap();
        let mut pids = Vec::with_capacity(1000);
        let before = heap();
        for _ in 0..1000 {
            let known = Arc::new(AtomicU32::new(0));
            pids.push(reaper.watch(asleep(), move |_| known.store(1, Ordering::Relaxed)).unwrap().id());
        }
        // The callback's own 32 bytes with it.
        let each = (heap() - before) / 1000;
        let verdict = if each <= 200 { "reached" } else { "**missed**" };
        println!("| {what} | {each} bytes and a descriptor | | | ≤ 200 bytes and one | {verdict} |");
        for &pid in &pids {
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
        while !reaper.is_empty() {
            poll_in(reaper.as_raw_fd());
            reaper.dispatch().unwrap();
        }
    }
}
