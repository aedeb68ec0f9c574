//! What the start of a program asks of the kernel, by hand.
//!
//! **Invariant:** nothing here goes through libc, allocates, or can panic. Between clone and exec the child has the memory and the
//! thread-local storage of the thread that started it: libc's functions would write that thread's errno, act on its
//! cancellation, and hand a change of user to its process's other threads (musl does; glibc takes locks that are shared with them).

#![allow(unsafe_code)]

use crate::sys::raw;
use crate::sys_close;
use std::ffi::{CStr, c_char, c_void};
use std::os::fd::RawFd;

/// What the kernel said.
pub(crate) type Errno = i32;

fn answer(r: isize) -> Result<usize, Errno> {
    usize::try_from(r).map_err(|_| r.wrapping_neg() as Errno)
}

/// A call without pointers.
fn call<const N: usize>(number: libc::c_long, args: [usize; N]) -> Result<usize, Errno> {
    let mut a = [0; 6];
    for (to, from) in a.iter_mut().zip(args) {
        *to = from;
    }
    // SAFETY: for the callers in this file: integers only, and what they change is the calling process's own.
    answer(unsafe { raw(number, a) })
}

// -- clone

/// vfork(2), and a pidfd: a child that shares memory with this process and runs `entry(arg)`, while this thread sleeps until it has
/// exec'ed or ended. The child's pid; -1 in `pidfd` where the kernel gives none.
///
/// The child goes on on this thread's own stack, below the frame that called, as after vfork(2). What makes that sound is that it
/// never comes back up: `entry` is called by the very instructions that the child wakes up in, and does not return. This thread's
/// registers, stack pointer and shadow stack pointer are kept by the kernel; what the child leaves below the stack pointer is no
/// longer anybody's. The kernel lets this thread go on before the child's exec only to die of SIGKILL.
///
/// # Safety
/// All signals are blocked. `entry` makes no libc call, does not unwind, and writes only what this thread expects to find changed. `pidfd` and `arg`
/// are live until this returns.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn clone_vfork(
    flags: i32,
    pidfd: *mut i32,
    entry: unsafe extern "C" fn(*mut c_void) -> !,
    arg: *mut c_void,
) -> Result<u32, Errno> {
    let pid: isize;
    // SAFETY: the kernel's convention, as in `sys::raw`. Without `nostack` the stack is aligned for a call and the red zone is not in
    // use; a stack of 0 means the same one.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone as isize => pid,
            in("rdi") flags as usize, in("rsi") 0usize, in("rdx") pidfd, in("r10") 0usize, in("r8") 0usize,
            in("r12") arg, in("r13") entry,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    answer(pid).map(|pid| pid as u32)
}

/// As above.
///
/// # Safety
/// As above.
#[cfg(target_arch = "aarch64")]
pub(crate) unsafe fn clone_vfork(
    flags: i32,
    pidfd: *mut i32,
    entry: unsafe extern "C" fn(*mut c_void) -> !,
    arg: *mut c_void,
) -> Result<u32, Errno> {
    let pid: isize;
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "svc 0",
            "cbnz x0, 2f",
            "mov x0, x20",
            "blr x21",
            "brk #1",
            "2:",
            inlateout("x0") flags as isize => pid,
            in("x8") libc::SYS_clone,
            in("x1") 0usize, in("x2") pidfd, in("x3") 0usize, in("x4") 0usize,
            in("x20") arg, in("x21") entry,
        );
    }
    answer(pid).map(|pid| pid as u32)
}

pub(crate) fn exit_group(code: i32) -> ! {
    loop {
        // The second try is for a filter that refuses the first.
        let _ = call(libc::SYS_exit_group, [code as usize]);
        let _ = call(libc::SYS_exit, [code as usize]);
    }
}

/// Tries to become the program at `path`; returns only with an error.
///
/// # Safety
/// `argv` and `envp` are NULL-terminated arrays of C strings.
pub(crate) unsafe fn execve(path: &CStr, argv: *const *const c_char, envp: *const *const c_char) -> Errno {
    // SAFETY: the caller's promise.
    let r = unsafe { raw(libc::SYS_execve, [path.as_ptr() as usize, argv as usize, envp as usize, 0, 0, 0]) };
    r.wrapping_neg() as Errno
}

// -- who and where

pub(crate) fn new_session() -> Result<(), Errno> {
    call(libc::SYS_setsid, []).map(drop)
}

pub(crate) fn set_process_group(group: i32) -> Result<(), Errno> {
    call(libc::SYS_setpgid, [0, group as usize]).map(drop)
}

pub(crate) fn umask(mask: u32) {
    // Cannot fail.
    let _ = call(libc::SYS_umask, [mask as usize]);
}

pub(crate) fn set_limit(resource: i32, soft: u64, hard: u64) -> Result<(), Errno> {
    let limit = [soft, hard];
    // SAFETY: the kernel reads two words from `limit`, which is live, and gives no old ones back.
    let r = unsafe { raw(libc::SYS_prlimit64, [0, resource as usize, (&raw const limit) as usize, 0, 0, 0]) };
    answer(r).map(drop)
}

pub(crate) fn set_groups(groups: &[u32]) -> Result<(), Errno> {
    // SAFETY: the kernel reads as many words as `groups` has.
    let r = unsafe { raw(libc::SYS_setgroups, [groups.len(), groups.as_ptr() as usize, 0, 0, 0, 0]) };
    answer(r).map(drop)
}

pub(crate) fn set_gid(gid: u32) -> Result<(), Errno> {
    call(libc::SYS_setgid, [gid as usize]).map(drop)
}

pub(crate) fn set_uid(uid: u32) -> Result<(), Errno> {
    call(libc::SYS_setuid, [uid as usize]).map(drop)
}

pub(crate) fn real_uid() -> u32 {
    // Cannot fail.
    call(libc::SYS_getuid, []).unwrap_or(u32::MAX as usize) as u32
}

pub(crate) fn change_dir(path: &CStr) -> Result<(), Errno> {
    // SAFETY: a C string.
    answer(unsafe { raw(libc::SYS_chdir, [path.as_ptr() as usize, 0, 0, 0, 0, 0]) }).map(drop)
}

/// The signal that this process gets when the thread that made it ends; sent at once if process `parent` has ended already.
pub(crate) fn death_signal(signal: i32, parent: u32) -> Result<(), Errno> {
    call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as usize, signal as usize, 0, 0, 0])?;
    let now = call(libc::SYS_getppid, [])?;
    // 0 is a parent in another pid namespace.
    if now != 0 && now != parent as usize {
        call(libc::SYS_kill, [getpid(), signal as usize])?;
    }
    Ok(())
}

fn getpid() -> usize {
    // Cannot fail.
    call(libc::SYS_getpid, []).unwrap_or(0)
}

/// Writes this process's number and a zero byte at `at`.
///
/// # Safety
/// Room for eleven bytes there, which nobody else reads meanwhile.
pub(crate) unsafe fn write_pid(at: *mut u8) {
    let mut digits = [0u8; 11];
    let mut n = getpid();
    let mut count = 0;
    for place in digits[..10].iter_mut().rev() {
        *place = b'0' + (n % 10) as u8;
        n /= 10;
        count += 1;
        if n == 0 {
            break;
        }
    }
    for (i, digit) in digits.iter().skip(10 - count).enumerate() {
        let place = at.wrapping_add(i);
        // SAFETY: at most ten digits and the last element, which is zero.
        unsafe { place.write(*digit) };
    }
}

/// Whether this process's memory may be looked into by others of its user (prctl(2), PR_GET_DUMPABLE).
pub(crate) fn dumpable() -> usize {
    call(libc::SYS_prctl, [libc::PR_GET_DUMPABLE as usize, 0, 0, 0, 0]).unwrap_or(0)
}

pub(crate) fn set_dumpable() {
    // Cannot fail: 1 is allowed to everyone.
    let _ = call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as usize, 1, 0, 0, 0]);
}

// -- descriptors

/// `from` becomes `to` as well, which is open across exec.
pub(crate) fn dup_onto(from: RawFd, to: RawFd) -> Result<(), Errno> {
    loop {
        match call(libc::SYS_dup3, [from as usize, to as usize, 0]) {
            Err(libc::EINTR) => {}
            r => return r.map(drop),
        }
    }
}

/// A copy of `from` that exec closes, at the lowest free number not below `least`.
pub(crate) fn dup_above(from: RawFd, least: RawFd) -> Result<RawFd, Errno> {
    call(libc::SYS_fcntl, [from as usize, libc::F_DUPFD_CLOEXEC as usize, least as usize]).map(|n| n as RawFd)
}

pub(crate) fn keep_across_exec(fd: RawFd) -> Result<(), Errno> {
    call(libc::SYS_fcntl, [fd as usize, libc::F_SETFD as usize, 0]).map(drop)
}

fn close_at_exec(fd: RawFd) -> Result<(), Errno> {
    call(libc::SYS_fcntl, [fd as usize, libc::F_SETFD as usize, libc::FD_CLOEXEC as usize]).map(drop)
}

pub(crate) fn is_open(fd: RawFd) -> bool {
    call(libc::SYS_fcntl, [fd as usize, libc::F_GETFD as usize]).is_ok()
}

/// Of a number that the caller got from `dup_above`.
pub(crate) fn close(fd: RawFd) {
    let _ = call(libc::SYS_close, [fd as usize]);
}

/// Writes to a pipe that takes it at once; nobody is told if its reader is gone.
pub(crate) fn tell(pipe: RawFd, bytes: &[u8]) {
    // SAFETY: the kernel reads as many bytes as there are.
    let _ = unsafe { raw(libc::SYS_write, [pipe as usize, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0]) };
}

/// Exec closes every descriptor from 3 on that the sorted `keep` does not name.
///
/// Marked and not closed: a mark is a bit, set for thousands at once, and exec walks over them anyway. Three ways: close_range with
/// its flag (Linux 5.11); the numbers that /proc lists; without /proc, each number up to the limit on open files.
pub(crate) fn close_others_at_exec(keep: &[RawFd]) {
    let mut from = 3u32;
    for &fd in keep.iter().filter(|fd| **fd >= 3) {
        let fd = fd as u32;
        if fd > from && !mark_range(from, fd.wrapping_sub(1)) {
            return mark_one_by_one(keep);
        }
        from = fd.wrapping_add(1);
    }
    if !mark_range(from, u32::MAX) {
        mark_one_by_one(keep);
    }
}

fn mark_range(first: u32, last: u32) -> bool {
    const CLOSE_RANGE_CLOEXEC: usize = 1 << 2;
    call(libc::SYS_close_range, [first as usize, last as usize, CLOSE_RANGE_CLOEXEC]).is_ok()
}

#[cold]
fn mark_one_by_one(keep: &[RawFd]) {
    let mark = |fd: u32| {
        let fd = fd as RawFd;
        if fd >= 3 && keep.binary_search(&fd).is_err() {
            // EBADF: not open.
            let _ = close_at_exec(fd);
        }
    };
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let a = [libc::AT_FDCWD as usize, c"/proc/self/fd".as_ptr() as usize, flags as usize, 0, 0, 0];
    // SAFETY: a C string.
    if let Ok(dir) = answer(unsafe { raw(libc::SYS_openat, a) }) {
        let complete = sys_close::walk(dir as RawFd, mark);
        close(dir as RawFd);
        if complete {
            return;
        }
    }
    let mut limit = [1u64 << 16; 2];
    // SAFETY: the kernel writes two words to `limit`, which is live.
    let _ = unsafe { raw(libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE as usize, 0, (&raw mut limit) as usize, 0, 0]) };
    for fd in 3..u32::try_from(limit[0]).unwrap_or(u32::MAX).min(1 << 30) {
        mark(fd);
    }
}
