//! Masks and dispositions, in the kernel's own form and without libc: a fresh child runs this, and each page of libc's code that it
//! touches is a fault. Async-signal-safe; errno stays as it is.

#![allow(unsafe_code)]

use crate::sys::raw;

/// The kernel's own form: signal n is bit n - 1.
pub(crate) type SigSet = u64;

/// Signals that libc keeps for itself (cancellation, setuid and its like in all threads; musl has one more).
const LIBC_OWN: SigSet = if cfg!(target_env = "musl") { 0b111 << 31 } else { 0b11 << 31 };

#[inline]
fn sigprocmask(new: &SigSet, old: Option<&mut SigSet>) {
    let old = old.map_or(std::ptr::null_mut(), std::ptr::from_mut);
    let a = [libc::SIG_SETMASK as usize, std::ptr::from_ref(new) as usize, old as usize, size_of::<SigSet>(), 0, 0];
    // SAFETY: `new` and `old` are live and of the kernel's size; with these arguments the call cannot fail.
    unsafe { raw(libc::SYS_rt_sigprocmask, a) };
}

/// Blocks every signal (but those libc keeps for itself) in this thread; the mask from before.
pub(crate) fn block_all() -> SigSet {
    let mut before = 0;
    sigprocmask(&!LIBC_OWN, Some(&mut before));
    before
}

/// Blocks every signal there is, libc's own as well; the mask from before.
pub(crate) fn block_everything() -> SigSet {
    let mut before = 0;
    sigprocmask(&u64::MAX, Some(&mut before));
    before
}

pub(crate) fn current_mask() -> SigSet {
    let mut now = 0;
    let a = [libc::SIG_BLOCK as usize, 0, &raw mut now as usize, size_of::<SigSet>(), 0, 0];
    // SAFETY: `now` is live and of the kernel's size; nothing is changed.
    unsafe { raw(libc::SYS_rt_sigprocmask, a) };
    now
}

#[inline]
pub(crate) fn set_mask(mask: &SigSet) {
    sigprocmask(mask, None);
}

/// The kernel's own sigaction: a handler of 0 is the default. Eight words to the kernel, none through libc, whose copy costs
/// a fresh child page faults.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KernelAction {
    pub(crate) handler: usize,
    pub(crate) flags: libc::c_ulong,
    pub(crate) restorer: usize,
    pub(crate) mask: u64,
}

#[inline(always)]
pub(crate) fn default_disposition(signal: i32) {
    // On the stack, which the child has: a static would be another page to fault in.
    let default = KernelAction { handler: libc::SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    let a = [signal as usize, &raw const default as usize, 0, size_of::<SigSet>(), 0, 0];
    // SAFETY: `default` is what the kernel expects on x86_64 and aarch64, and a default disposition runs no code of ours.
    unsafe { raw(libc::SYS_rt_sigaction, a) };
}

pub(crate) fn is_libc_own(signal: i32) -> bool {
    LIBC_OWN >> (signal - 1) & 1 == 1
}

#[inline]
pub(crate) fn is_ignored(signal: i32) -> bool {
    disposition(signal).handler == libc::SIG_IGN
}

/// As the kernel has it.
#[inline]
pub(crate) fn disposition(signal: i32) -> KernelAction {
    let mut now = KernelAction { handler: libc::SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    let a = [signal as usize, 0, &raw mut now as usize, size_of::<SigSet>(), 0, 0];
    // SAFETY: `now` is live and has the kernel's layout; nothing is changed.
    unsafe { raw(libc::SYS_rt_sigaction, a) };
    now
}

/// Puts back what `disposition` said, to the last bit; what was there.
pub(crate) fn put_disposition(signal: i32, action: &KernelAction) -> KernelAction {
    let mut was = KernelAction { handler: libc::SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    let a = [signal as usize, std::ptr::from_ref(action) as usize, &raw mut was as usize, size_of::<SigSet>(), 0, 0];
    // SAFETY: both have the kernel's layout and are live, and the kernel had `action` from whoever may install such a handler.
    unsafe { raw(libc::SYS_rt_sigaction, a) };
    was
}

pub(crate) fn is_caught(signal: i32) -> bool {
    !matches!(disposition(signal).handler, libc::SIG_DFL | libc::SIG_IGN)
}

extern "C" fn do_nothing(_: i32) {}

/// Where a handler returns to: rt_sigreturn, in the very bytes by which debuggers know it. libc has the same, but keeps it to
/// itself.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn restorer() {
    std::arch::naked_asm!("mov rax, 15", "syscall")
}

/// A handler that does nothing: unlike SIG_IGN it does not survive an exec.
#[inline(always)]
pub(crate) fn ignore_by_handler(signal: i32) {
    #[cfg(target_arch = "x86_64")]
    const SA_RESTORER: libc::c_ulong = 0x0400_0000;
    let action = KernelAction {
        handler: do_nothing as extern "C" fn(i32) as usize,
        #[cfg(target_arch = "x86_64")]
        flags: SA_RESTORER | libc::SA_RESTART as libc::c_ulong,
        #[cfg(target_arch = "x86_64")]
        restorer: restorer as unsafe extern "C" fn() as usize,
        // The kernel's own, in the vdso.
        #[cfg(not(target_arch = "x86_64"))]
        flags: libc::SA_RESTART as libc::c_ulong,
        #[cfg(not(target_arch = "x86_64"))]
        restorer: 0,
        mask: 0,
    };
    let a = [signal as usize, &raw const action as usize, 0, size_of::<SigSet>(), 0, 0];
    // SAFETY: `action` has the kernel's layout, names a handler that touches nothing, and the way back from it.
    unsafe { raw(libc::SYS_rt_sigaction, a) };
}

pub(crate) fn mask_of(signals: &[i32]) -> SigSet {
    signals.iter().fold(0, |set, s| set | 1 << (s - 1)) & !LIBC_OWN
}

pub(crate) fn mask_without(mask: &SigSet, signals: &[i32]) -> SigSet {
    mask & !mask_of(signals)
}
