//! Every system call, and EINTR, live here and nowhere else.
//!
//! All functions are async-signal-safe and allocate nothing. Those that may run inside somebody's libc call or in a
//! signal handler (futex, membarrier, mapping, identity) leave errno as they found it.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU32;

/// Runs `f` and puts errno back as it was.
pub(crate) fn keep_errno<R>(f: impl FnOnce() -> R) -> R {
    let place = errno_place();
    // SAFETY: the calling thread's own, as long as it runs.
    let saved = unsafe { *place };
    let r = f();
    // Looks first: around a fork a page that is not written is not copied.
    // SAFETY: as above.
    if unsafe { *place } != saved {
        // SAFETY: as above.
        unsafe { *place = saved };
    }
    r
}

/// Where the calling thread's errno is, for as long as the thread lives, its copy in a child included.
pub(crate) fn errno_place() -> *mut i32 {
    // SAFETY: no arguments.
    unsafe { libc::__errno_location() }
}

pub(crate) fn errno() -> i32 {
    // SAFETY: the location is the calling thread's own.
    unsafe { *errno_place() }
}

pub(crate) fn set_errno(e: i32) {
    // SAFETY: the location is the calling thread's own.
    unsafe { *errno_place() = e }
}

/// -1 becomes the error that errno names.
pub(crate) fn cerr(r: libc::c_long) -> io::Result<libc::c_long> {
    if r == -1 { Err(io::Error::from_raw_os_error(errno())) } else { Ok(r) }
}

/// `f` again as long as a signal interrupts it.
pub(crate) fn retry(mut f: impl FnMut() -> libc::c_long) -> io::Result<libc::c_long> {
    loop {
        match cerr(f()) {
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            r => return r,
        }
    }
}

// -- without libc

/// A system call by hand: the kernel's answer, `-errno` where it fails; errno itself stays as it is. The fork path uses it because
/// each page of libc's code that a fresh child touches costs it a page fault.
///
/// # Safety
/// As for the call.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) unsafe fn raw(number: libc::c_long, a: [usize; 6]) -> isize {
    let answer: isize;
    // SAFETY: the kernel's convention for x86_64: number and answer in rax, rcx and r11 lost. What the call does to memory is
    // the caller's.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => answer,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    answer
}

/// As above.
///
/// # Safety
/// As for the call.
#[cfg(target_arch = "aarch64")]
#[inline]
pub(crate) unsafe fn raw(number: libc::c_long, a: [usize; 6]) -> isize {
    let answer: isize;
    // SAFETY: the kernel's convention for aarch64: number in x8, answer in x0.
    unsafe {
        std::arch::asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") a[0] as isize => answer,
            in("x1") a[1], in("x2") a[2], in("x3") a[3], in("x4") a[4], in("x5") a[5],
            options(nostack),
        );
    }
    answer
}

/// The answer of a call made by hand.
fn rerr(answer: isize) -> io::Result<usize> {
    usize::try_from(answer).map_err(|_| io::Error::from_raw_os_error(-answer as i32))
}

// -- time and sleep

pub(crate) fn monotonic() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a live timespec; CLOCK_MONOTONIC cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    (t.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(t.tv_nsec as u64)
}

/// What a thread of this process has used, the kernel's part and its own, in ms of the kernel's ticks; zero where it is not told.
pub(crate) fn processor_time(tid: u32) -> (u32, u32) {
    // What pthread_getcpuclockid makes of a thread (CPUCLOCK_PERTHREAD_MASK), for the clocks of both and of user time.
    let ms = |kind: u32| {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let clock: libc::clockid_t = (!tid << 3 | 4 | kind).cast_signed();
        // SAFETY: `t` is a live timespec. An unknown thread or clock is EINVAL, and 0.
        keep_errno(|| unsafe { libc::clock_gettime(clock, &mut t) });
        (t.tv_sec as u32).wrapping_mul(1000).wrapping_add(t.tv_nsec as u32 / 1_000_000)
    };
    let (all, user) = (ms(0), ms(1));
    (all.wrapping_sub(user), user)
}

pub(crate) fn timespec(ns: u64) -> libc::timespec {
    libc::timespec {
        tv_sec: (ns / 1_000_000_000).min(i64::MAX as u64 / 2) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    }
}

/// FUTEX_WAIT_BITSET on a private futex; `relative` in ns. EINTR, EAGAIN and time-out all mean: look again.
pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, bits: u32, relative: Option<u64>) {
    // WAIT_BITSET takes an absolute time of CLOCK_MONOTONIC.
    let until = relative.map(|ns| timespec(monotonic().saturating_add(ns)));
    let until = until.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let op = libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG;
    let a = [word.as_ptr() as usize, op as usize, expected as usize, until as usize, 0, bits as usize];
    // SAFETY: `word` and `until` are live for the call; the kernel only reads them.
    unsafe { raw(libc::SYS_futex, a) };
}

/// Wakes at most `count` sleepers whose bits meet `bits`; how many it woke.
pub(crate) fn futex_wake(word: &AtomicU32, count: u32, bits: u32) -> usize {
    futex_wake_at(word.as_ptr(), count, bits)
}

/// The same by address; the address is only a name here, the kernel finds out whether it is mapped.
pub(crate) fn futex_wake_at(word: *const u32, count: u32, bits: u32) -> usize {
    let op = libc::FUTEX_WAKE_BITSET | libc::FUTEX_PRIVATE_FLAG;
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    // SAFETY: FUTEX_WAKE does not read or write the word; an unmapped address is EFAULT.
    let n = unsafe { raw(libc::SYS_futex, [word as usize, op as usize, count as usize, 0, 0, bits as usize]) };
    usize::try_from(n).unwrap_or(0)
}

/// FUTEX_WAIT/WAKE across processes, for a word in shared memory.
pub(crate) fn futex_wait_shared(word: &AtomicU32, expected: u32, relative: u64) {
    let until = timespec(relative);
    let a = [word.as_ptr() as usize, libc::FUTEX_WAIT as usize, expected as usize, &raw const until as usize, 0, 0];
    // SAFETY: as in `futex_wait`; FUTEX_WAIT takes a relative time.
    unsafe { raw(libc::SYS_futex, a) };
}

pub(crate) fn futex_wake_shared(word: &AtomicU32) {
    let a = [word.as_ptr() as usize, libc::FUTEX_WAKE as usize, i32::MAX as usize, 0, 0, 0];
    // SAFETY: as in `futex_wake_at`.
    unsafe { raw(libc::SYS_futex, a) };
}

pub(crate) fn yield_now() {
    // SAFETY: no arguments.
    keep_errno(|| unsafe { libc::sched_yield() });
}

// -- the fence on the fork's side

const MEMBARRIER_PRIVATE_EXPEDITED: i32 = 1 << 3;
const MEMBARRIER_REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;

fn membarrier_call(command: i32) -> Result<(), i32> {
    // SAFETY: membarrier takes integers only.
    match unsafe { raw(libc::SYS_membarrier, [command as usize, 0, 0, 0, 0, 0]) } {
        0 => Ok(()),
        e => Err(-e as i32),
    }
}

pub(crate) fn membarrier_register() -> bool {
    membarrier_call(MEMBARRIER_REGISTER_PRIVATE_EXPEDITED).is_ok()
}

/// A full fence on every running thread of this process; false where the kernel or a filter refuses.
pub(crate) fn membarrier() -> bool {
    match membarrier_call(MEMBARRIER_PRIVATE_EXPEDITED) {
        Ok(()) => true,
        // Not registered in this memory: a bypass child.
        Err(libc::EPERM) => membarrier_register() && membarrier_call(MEMBARRIER_PRIVATE_EXPEDITED).is_ok(),
        Err(_) => false,
    }
}

/// Where membarrier is refused after threads already rely on it: taking a page's write permission away makes the
/// kernel interrupt every processor that runs this process (x86), which is the same fence; elsewhere a rest of a
/// millisecond drains every store buffer there is. Used once, at the change to real fences.
pub(crate) fn fence_by_other_means() {
    if let Ok(page) = map(PAGE, false) {
        // SAFETY: `page` is a fresh mapping that nobody else knows.
        unsafe { page.cast::<u8>().write_volatile(1) };
        // SAFETY: as above.
        unsafe { libc::mprotect(page.cast(), PAGE, libc::PROT_READ) };
        // SAFETY: as above; not used afterwards.
        unsafe { unmap(page, PAGE) };
    }
    sleep(1_000_000);
}

pub(crate) fn sleep(ns: u64) {
    keep_errno(|| {
        let t = timespec(ns);
        // SAFETY: `t` is live; no remainder is asked for. An early return is harmless to every caller.
        unsafe { libc::nanosleep(&t, std::ptr::null_mut()) };
    });
}

// -- memory

/// What is mapped at a time for one word: no kernel's page is larger.
pub(crate) const PAGE: usize = 65536;

/// Fresh zeroed memory, shared with children or private.
pub(crate) fn map(len: usize, shared: bool) -> io::Result<*mut libc::c_void> {
    keep_errno(|| {
        let kind = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no memory of ours.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                kind | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED { Err(io::Error::from_raw_os_error(errno())) } else { Ok(p) }
    })
}

/// # Safety
/// `page` is a mapping of `len` bytes from `map` that nothing refers to any more.
pub(crate) unsafe fn unmap(page: *mut libc::c_void, len: usize) {
    // SAFETY: the caller's promise.
    keep_errno(|| unsafe { libc::munmap(page, len) });
}

/// A page that the kernel zeroes in every child with its own memory; `None` where that cannot be had. The call with
/// nonsense advice finds emulators that say yes to everything.
pub(crate) fn map_wiped(len: usize) -> io::Result<(*mut libc::c_void, bool)> {
    let page = map(len, false)?;
    // SAFETY: `page` is ours, of `len` bytes; the advice is unknown to every kernel.
    let nonsense = keep_errno(|| unsafe { libc::madvise(page, len, -1) });
    // SAFETY: as above; wiping on fork changes nothing in this process.
    let wiped = keep_errno(|| unsafe { libc::madvise(page, len, libc::MADV_WIPEONFORK) });
    Ok((page, nonsense != 0 && wiped == 0))
}

// -- the world

/// Whether the environment holds `name=value`. Reads the strings the process was started with or set since; at start only.
pub(crate) fn env_is(name: &std::ffi::CStr, value: &str) -> bool {
    // SAFETY: `name` is a C string; called by the constructor, before other threads can change the environment.
    let p = unsafe { libc::getenv(name.as_ptr()) };
    if p.is_null() {
        return false;
    }
    // SAFETY: getenv's answer is a C string.
    unsafe { std::ffi::CStr::from_ptr(p) }.to_bytes() == value.as_bytes()
}

/// A line on fd 2 if it takes it at once; false if it does not.
pub(crate) fn say(line: &[u8]) -> bool {
    write_if_writable(libc::STDERR_FILENO, line)
}

// -- identity

pub(crate) fn gettid() -> u32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { raw(libc::SYS_gettid, [0; 6]) as u32 }
}

#[inline]
pub(crate) fn getpid() -> u32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { raw(libc::SYS_getpid, [0; 6]) as u32 }
}

pub(crate) fn getppid() -> u32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::getppid() as u32 }
}

/// Whether thread `tid` of this process is gone.
pub(crate) fn thread_is_gone(tid: u32) -> bool {
    keep_errno(|| {
        let pid = getpid();
        // SAFETY: signal 0 is only a question.
        let r = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, 0) };
        r == -1 && errno() == libc::ESRCH
    })
}

/// The calling thread's name, NUL-padded.
pub(crate) fn thread_name() -> [u8; 16] {
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes to `name`.
    keep_errno(|| unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) });
    name
}

// -- descriptors

/// F_SETFD FD_CLOEXEC: also finds out whether `fd` is open.
pub(crate) fn set_cloexec(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD with an integer touches no memory.
    let answer =
        unsafe { raw(libc::SYS_fcntl, [fd as usize, libc::F_SETFD as usize, libc::FD_CLOEXEC as usize, 0, 0, 0]) };
    rerr(answer).map(drop)
}

pub(crate) fn get_fd_flags(fd: RawFd) -> io::Result<i32> {
    // SAFETY: F_GETFD touches no memory.
    cerr(unsafe { libc::fcntl(fd, libc::F_GETFD) }.into()).map(|f| f as i32)
}

/// Closes `first..=last`, whatever is open among them.
///
/// Two ways: close_range where the kernel has it and no filter refuses it, else one close at a time.
#[unsafe(link_section = ".text_carefork")]
pub(crate) fn close_range(first: u32, last: u32) {
    // SAFETY: the caller owns the numbers: it is the child's clean-up, and no other code of the child relies on them.
    if unsafe { raw(libc::SYS_close_range, [first as usize, last as usize, 0, 0, 0, 0]) } != 0 {
        close_each(first, last);
    }
}

#[cold]
#[inline(never)]
fn close_each(first: u32, last: u32) {
    for fd in first..=last.min(keep_errno(highest_fd)) {
        // SAFETY: as in `close_range`. EBADF is harmless, EINTR closes on Linux.
        unsafe { raw(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]) };
    }
}

/// No descriptor is above this: the hard limit, which the soft one may have been once.
fn highest_fd() -> u32 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is live.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    u32::try_from(limit.rlim_max).map_or(1 << 20, |m| m.clamp(1 << 16, 1 << 30))
}

/// Device and inode of what `fd` refers to.
pub(crate) fn identity(fd: RawFd) -> Option<(u64, u64)> {
    // SAFETY: stat is plain data.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `st` is live.
    let r = keep_errno(|| unsafe { libc::fstat(fd, &mut st) });
    (r == 0).then_some((st.st_dev, st.st_ino))
}

/// What poll(2) finds of writing to `fd`, at once.
fn poll_out(fd: RawFd) -> i16 {
    let mut p = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one live pollfd, no waiting.
    if keep_errno(|| unsafe { libc::poll(&mut p, 1, 0) }) == 1 { p.revents } else { 0 }
}

/// One write to `fd` if it can be written at once; whether all of `text` went out. Never ends the process by SIGPIPE.
pub(crate) fn write_if_writable(fd: RawFd, text: &[u8]) -> bool {
    // Its reader, or peer, is gone where poll says more.
    if poll_out(fd) != libc::POLLOUT {
        return false;
    }
    keep_errno(|| {
        without_sigpipe(|| {
            // SAFETY: `text` is live and of that length.
            let n = unsafe { libc::write(fd, text.as_ptr().cast(), text.len()) };
            n == text.len() as isize
        })
    })
}

/// The reader may go away between poll and write: the signal that `f` causes in this thread is taken out again.
fn without_sigpipe<R>(f: impl FnOnce() -> R) -> R {
    const SIZE: usize = size_of::<u64>();
    let pipe: u64 = 1 << (libc::SIGPIPE - 1);
    let (mut before, mut pending) = (0u64, 0u64);
    let ptr = |set: &u64| std::ptr::from_ref(set) as usize;
    let out = |set: &mut u64| std::ptr::from_mut(set) as usize;
    let block = [libc::SIG_BLOCK as usize, ptr(&pipe), out(&mut before), SIZE, 0, 0];
    // SAFETY: two live signal sets of the kernel's size.
    unsafe { raw(libc::SYS_rt_sigprocmask, block) };
    // SAFETY: one live signal set.
    unsafe { raw(libc::SYS_rt_sigpending, [out(&mut pending), SIZE, 0, 0, 0, 0]) };
    let r = f();
    if pending & pipe == 0 {
        let now = timespec(0);
        // SAFETY: a live signal set and time; it does not wait.
        unsafe { raw(libc::SYS_rt_sigtimedwait, [ptr(&pipe), 0, std::ptr::from_ref(&now) as usize, SIZE, 0, 0]) };
    }
    // SAFETY: a live signal set.
    unsafe { raw(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as usize, ptr(&before), 0, SIZE, 0, 0]) };
    r
}

// -- fork, exit, wait

/// libc's fork, with its at-fork handlers.
///
/// # Safety
/// As for fork(2) in a process with threads.
#[inline(always)]
pub(crate) unsafe fn fork() -> io::Result<u32> {
    // SAFETY: the caller's promise.
    #[allow(clippy::disallowed_methods)]
    cerr(unsafe { libc::fork() }.into()).map(|pid| pid as u32)
}

#[inline]
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit ends the process without running anything of ours.
    unsafe { libc::_exit(code) }
}

/// Waits for `pid` to end; ECHILD (someone else took the status) is `None`.
pub(crate) fn reap(pid: u32, block: bool) -> io::Result<Option<Option<i32>>> {
    let mut status = 0;
    let flags = if block { 0 } else { libc::WNOHANG };
    // SAFETY: `status` is live.
    match retry(|| unsafe { libc::waitpid(pid as i32, &mut status, flags) }.into()) {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(Some(status))),
        Err(e) if e.raw_os_error() == Some(libc::ECHILD) => Ok(Some(None)),
        Err(e) => Err(e),
    }
}

/// A pidfd of `pid`, close-on-exec as the kernel makes it.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    let fd = rerr(unsafe { raw(libc::SYS_pidfd_open, [pid as usize, 0, 0, 0, 0, 0]) })?;
    // SAFETY: the kernel just gave us this number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no siginfo is passed.
    cerr(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    })
    .map(drop)
}

pub(crate) fn kill(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: integers only.
    cerr(unsafe { libc::kill(pid as i32, signal) }.into()).map(drop)
}

// -- the child's steps

pub(crate) fn raise_at_self(signal: i32) {
    let pid = getpid().cast_signed();
    // SAFETY: integers only.
    unsafe { libc::kill(pid, signal) };
}

pub(crate) fn set_death_signal(signal: i32) {
    // SAFETY: an integer argument.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) };
}

/// Names the calling thread; of a fresh child, the process.
pub(crate) fn set_name(name: &std::ffi::CStr) {
    // SAFETY: a C string; the kernel takes 15 bytes of it.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

pub(crate) fn new_session() {
    // SAFETY: no arguments; a fresh child leads no process group, so it cannot fail.
    unsafe { libc::setsid() };
}

/// `fd` becomes 0, 1 and 2 as well, open across exec. Of a child's own descriptors; the numbers exist, so this cannot fail.
pub(crate) fn become_stdio(fd: RawFd) {
    for n in 0..=2 {
        if n == fd {
            // SAFETY: an integer argument.
            unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
        } else {
            // SAFETY: 0, 1 and 2 are the standard streams, which this child was asked to replace.
            unsafe { libc::dup2(fd, n) };
        }
    }
}

pub(crate) fn open_null() -> io::Result<OwnedFd> {
    // SAFETY: a C string.
    let fd = cerr(unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) }.into())?;
    // SAFETY: the kernel just gave us this number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// execv with pointers that the caller made; returns only with an error.
///
/// # Safety
/// `argv` is a NULL-terminated array of C strings.
pub(crate) unsafe fn execv(path: &std::ffi::CStr, argv: *const *const libc::c_char) -> io::Error {
    // SAFETY: the caller's promise.
    unsafe { libc::execv(path.as_ptr(), argv) };
    io::Error::from_raw_os_error(errno())
}

/// Waits for `fd` (a pidfd) to become readable, at most `ms` (-1: for ever); false at the time-out.
pub(crate) fn poll_in(fd: BorrowedFd<'_>, ms: i32) -> io::Result<bool> {
    let mut p = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one live pollfd.
    cerr(unsafe { libc::poll(&mut p, 1, ms) }.into()).map(|n| n > 0)
}

/// How many numbers `which_are_open` looks at.
pub(crate) const ASKED: usize = 256;

/// Which of the numbers from `first` on are open. Async-signal-safe.
pub(crate) fn which_are_open(first: RawFd) -> [bool; ASKED] {
    let mut p = [libc::pollfd { fd: 0, events: 0, revents: 0 }; ASKED];
    for (p, fd) in p.iter_mut().zip(first..) {
        p.fd = fd;
    }
    // SAFETY: so many live pollfds.
    if retry(|| unsafe { libc::poll(p.as_mut_ptr(), p.len() as libc::nfds_t, 0) }.into()).is_ok() {
        return p.map(|p| p.revents & libc::POLLNVAL == 0);
    }
    // A low limit on open files, which is one on poll's list, too.
    p.map(|p| get_fd_flags(p.fd).is_ok())
}

/// Waits for either of two to become readable; which of them are, or have come to their end.
pub(crate) fn poll_either(fds: [Option<BorrowedFd<'_>>; 2]) -> io::Result<[bool; 2]> {
    // A negative number is passed over.
    let mut p = fds.map(|fd| libc::pollfd { fd: fd.map_or(-1, |fd| fd.as_raw_fd()), events: libc::POLLIN, revents: 0 });
    // SAFETY: two live pollfds.
    retry(|| unsafe { libc::poll(p.as_mut_ptr(), 2, -1) }.into())?;
    Ok(p.map(|p| p.revents != 0))
}

/// Whether `pid` is a child of this process that lives or was not waited for yet.
pub(crate) fn is_unreaped(pid: u32) -> bool {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: waitid fills in nothing where there is no place given; WNOWAIT leaves the child as it is.
    unsafe { raw(libc::SYS_waitid, [libc::P_PID as usize, pid as usize, 0, flags as usize, 0, 0]) == 0 }
}

/// Whether child `pid` has ended, without reaping it.
pub(crate) fn is_dead(pid: u32) -> bool {
    keep_errno(|| {
        // SAFETY: siginfo_t is plain data.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `info` is live; WNOWAIT leaves the child as it is.
        let r = unsafe { libc::waitid(libc::P_PID, pid, &mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
        // SAFETY: waitid fills in si_pid or leaves it 0.
        r != 0 || unsafe { info.si_pid() } != 0
    })
}

// -- standard streams

/// Whether a write to `fd` comes back at once, if only with an error: there is room, or it is not open at all.
///
/// Not where poll finds an error, or that the other end is gone: writing to it may end the process by SIGPIPE.
pub(crate) fn takes_now(fd: RawFd) -> bool {
    matches!(poll_out(fd), libc::POLLOUT | libc::POLLNVAL)
}

/// Runs `f` with a pipe in the place of `fd`, and throws away what it writes there, 4096 bytes at most; how many bytes. An
/// error if there is no room for three more descriptors; then `f` did not run. In a fresh child: no other thread uses `fd`.
pub(crate) fn divert(fd: RawFd, f: impl FnOnce()) -> io::Result<usize> {
    keep_errno(|| {
        let flags = get_fd_flags(fd)?;
        // SAFETY: an integer argument.
        let aside = cerr(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) }.into())?;
        // SAFETY: the kernel just gave us this number.
        let aside = unsafe { OwnedFd::from_raw_fd(aside as RawFd) };
        let mut ends = [0; 2];
        // SAFETY: room for two numbers.
        cerr(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) }.into())?;
        // SAFETY: the kernel just gave us these numbers.
        let [from, to] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
        // SAFETY: `fd` is open, and by the promise above nobody uses it meanwhile; `aside` has what it was.
        retry(|| unsafe { libc::dup2(to.as_raw_fd(), fd) }.into())?;
        f();
        let cloexec = if flags & libc::FD_CLOEXEC == 0 { 0 } else { libc::O_CLOEXEC };
        // SAFETY: as above.
        retry(|| unsafe { libc::dup3(aside.as_raw_fd(), fd, cloexec) }.into())?;
        let mut count: libc::c_int = 0;
        // SAFETY: FIONREAD writes an int to `count`.
        cerr(unsafe { libc::ioctl(from.as_raw_fd(), libc::FIONREAD, &mut count) }.into())?;
        Ok(usize::try_from(count).unwrap_or(0))
    })
}
