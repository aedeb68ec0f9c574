//! System calls that the kernel refuses: how a test meets an old kernel, a container's filter, or a full table.
//!
//! `(SYS_clone, EAGAIN)` makes glibc's `fork()` fail and lets threads start, which take `clone3`.

use std::io;

/// One refusal: this call, or this call with this value of one argument, fails with this errno.
#[derive(Debug, Clone, Copy)]
pub struct Refuse {
    nr: libc::c_long,
    arg: Option<(u32, u32)>,
    errno: i32,
}

impl Refuse {
    pub const fn call(nr: libc::c_long, errno: i32) -> Refuse {
        Refuse { nr, arg: None, errno }
    }

    /// Only where the low half of argument `index` (0 to 5) is `value`: `madvise` with one advice, `prctl` with one
    /// option, `membarrier` with one command.
    pub const fn when(nr: libc::c_long, index: u32, value: u32, errno: i32) -> Refuse {
        Refuse { nr, arg: Some((index, value)), errno }
    }
}

impl From<(libc::c_long, i32)> for Refuse {
    fn from((nr, errno): (libc::c_long, i32)) -> Refuse {
        Refuse::call(nr, errno)
    }
}

/// Refuses these calls with these errnos to all threads of this process and whatever it forks or execs, for good.
pub fn seccomp_refuse(refuse: &[(libc::c_long, i32)]) -> io::Result<()> {
    let refuse: Vec<_> = refuse.iter().copied().map(Refuse::from).collect();
    let filter = Filter::new(&refuse);
    // SAFETY: installing it is what our caller asked for.
    unsafe { filter.install() }.map_err(io::Error::from_raw_os_error)
}

/// Refuses glibc's and musl's `fork()` with this errno. Threads start, by `clone3`.
pub fn refuse_forks(errno: i32) -> io::Result<()> {
    seccomp_refuse(&[
        (libc::SYS_clone, errno),
        // musl's, where there is such a call.
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_fork, errno),
    ])
}

/// A filter made ready, to be installed where nothing may be allocated.
pub struct Filter(Vec<libc::sock_filter>);

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;

// Offsets in struct seccomp_data.
const NR: u32 = 0;
const ARCH_AT: u32 = 4;
const ARGS: u32 = 16;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const JUMP_EQ: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

impl Filter {
    pub fn new(refuse: &[Refuse]) -> Filter {
        // Another architecture's numbers mean something else: let them through.
        let mut code =
            vec![op(LOAD, ARCH_AT, 0, 0), op(JUMP_EQ, ARCH, 1, 0), op(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0)];
        for r in refuse {
            let answer = libc::SECCOMP_RET_ERRNO | (r.errno as u32 & libc::SECCOMP_RET_DATA);
            code.push(op(LOAD, NR, 0, 0));
            match r.arg {
                None => code.push(op(JUMP_EQ, r.nr as u32, 0, 1)),
                Some((index, value)) => {
                    // Both architectures are little-endian: the low half comes first.
                    code.push(op(JUMP_EQ, r.nr as u32, 0, 3));
                    code.push(op(LOAD, ARGS + 8 * index, 0, 0));
                    code.push(op(JUMP_EQ, value, 0, 1));
                }
            }
            code.push(op(RETURN, answer, 0, 0));
        }
        code.push(op(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0));
        Filter(code)
    }

    /// Async-signal-safe. The error is an errno.
    ///
    /// # Safety
    /// The process will get errors from these calls from now on, libc's own calls included.
    pub unsafe fn install(&self) -> Result<(), i32> {
        let len = u16::try_from(self.0.len()).map_err(|_| libc::E2BIG)?;
        // The kernel only reads the program, whatever the pointer's type says.
        let program = libc::sock_fprog { len, filter: self.0.as_ptr().cast_mut() };
        // SAFETY: this option takes numbers only.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
            return Err(super::raw::errno());
        }
        let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_TSYNC);
        // SAFETY: `program` points to `len` instructions that live as long as `self`, and the kernel copies them.
        match unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) } {
            0 => Ok(()),
            -1 => Err(super::raw::errno()),
            // The id of a thread that could not be brought along.
            _ => Err(libc::ESRCH),
        }
    }
}

fn op(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}
