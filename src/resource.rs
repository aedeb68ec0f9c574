//! What setrlimit(2) limits.

/// What [`Command::rlimit`](crate::Command::rlimit) limits; each is the `RLIMIT_` of setrlimit(2) with its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Resource {
    /// Address space in bytes (`RLIMIT_AS`).
    AddressSpace,
    /// Size of a core dump in bytes.
    Core,
    /// Processor time in seconds.
    Cpu,
    /// Data segment in bytes.
    Data,
    /// Size of a file in bytes (`RLIMIT_FSIZE`).
    FileSize,
    /// Locked memory in bytes.
    MemLock,
    /// Bytes in message queues.
    MsgQueue,
    /// Ceiling of the nice value, as 20 less it.
    Nice,
    /// One more than the highest descriptor.
    NoFile,
    /// Processes of the user.
    NProc,
    /// Ceiling of the real-time priority.
    RtPrio,
    /// Processor time at real-time priority without a system call that blocks, in microseconds.
    RtTime,
    /// Queued signals.
    SigPending,
    /// Stack in bytes.
    Stack,
}

impl Resource {
    /// The kernel's number.
    pub(crate) fn number(self) -> i32 {
        (match self {
            Resource::AddressSpace => libc::RLIMIT_AS,
            Resource::Core => libc::RLIMIT_CORE,
            Resource::Cpu => libc::RLIMIT_CPU,
            Resource::Data => libc::RLIMIT_DATA,
            Resource::FileSize => libc::RLIMIT_FSIZE,
            Resource::MemLock => libc::RLIMIT_MEMLOCK,
            Resource::MsgQueue => libc::RLIMIT_MSGQUEUE,
            Resource::Nice => libc::RLIMIT_NICE,
            Resource::NoFile => libc::RLIMIT_NOFILE,
            Resource::NProc => libc::RLIMIT_NPROC,
            Resource::RtPrio => libc::RLIMIT_RTPRIO,
            Resource::RtTime => libc::RLIMIT_RTTIME,
            Resource::SigPending => libc::RLIMIT_SIGPENDING,
            Resource::Stack => libc::RLIMIT_STACK,
        }) as i32
    }
}
