//! Every public item, named once, with its auto traits: what changes here changes for users.

#![allow(
    clippy::expect_used,
    // Whole types, as a user would see them.
    clippy::type_complexity
)]

use ::log::LevelFilter;
use carefork::audit::{Care, Descriptor, Fate, Kind};
use carefork::inherited::InheritError;
use carefork::log::{
    AlreadySet, BadFilter, Builder, Guarded, Logger, NoLogger, Output, RecordWriter, WhenFull, flush, set_output,
};
use carefork::report::{CareFdEntry, ChildEntry, HookEntry, RegionEntry};
use carefork::stdio::{Stream, Waiting};
use carefork::tracing::{Guarded as GuardedMake, GuardedWriter, PerProcess as PerProcessMake, guarded, per_process};
#[allow(clippy::wildcard_imports)]
use carefork::*;
use std::cell::Cell;
use std::error::Error;
use std::fmt::Debug;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::process::ExitStatus;
use std::time::Duration;
use std::{io, net};
use tracing_subscriber::Registry;
use tracing_subscriber::fmt::MakeWriter;

/// Compiles if the types have the traits.
macro_rules! is {
    ($($type:ty),+ $(,)? => $($bound:tt)+) => {
        const _: fn() = || {
            fn has<T: ?Sized + $($bound)+>() {}
            $(has::<$type>();)+
        };
    };
}

/// Compiles if none of the types has the trait: with it two `choose` would fit.
macro_rules! is_not {
    ($($type:ty),+ $(,)? => $bound:path) => {
        const _: fn() = || {
            trait Either<A> {
                fn choose() {}
            }
            impl<T: ?Sized> Either<()> for T {}
            struct Has;
            impl<T: ?Sized + $bound> Either<Has> for T {}
            $(<$type as Either<_>>::choose();)+
        };
    };
}

// Values that go where they are wanted.
is!(Child, InChild, Fork, ForkOptions<'static>, Hook, Registration, Veto, Signals, OnFork, Cleanup => Send + Unpin);
is!(Child, InChild, Fork, ForkOptions<'static>, Hook, Registration, Veto, Signals, OnFork, Cleanup => Sync);
is!(Lineage, Stats, Culprit, Culprits, NotAChild, ForkError, AdoptError<File>, WaitTimeoutResult => Send + Sync + Debug + Unpin);
is!(BadName, ConvertError, InheritError, PutError => Error + Send + Sync + Unpin);
is!(BadName => Copy + Eq);
is!(NamedFds, Received, Mismatch => Send + Sync + Unpin + Debug);
is!(NamedFds => Default);
is!(CareFd<net::TcpListener>, CareFd<net::TcpStream>, CareFd<net::UdpSocket> => TryFrom<CareFd<OwnedFd>, Error = ConvertError>);
is!(CareFd<UnixListener>, CareFd<UnixStream>, CareFd<UnixDatagram> => TryFrom<CareFd<OwnedFd>, Error = ConvertError>);
is!(CareFd<File> => From<CareFd<OwnedFd>>);
is!(CareFd<File>, CareFd<OwnedFd>, CareFd<net::TcpListener> => Send + Sync + Unpin + Debug + AsFd + AsRawFd);
is!(Child, InChild, Fork, ForkOptions<'static>, Hook, Registration, Veto, Signals, OnFork, Cleanup, NoForking => Debug);
is!(Child, ForkOptions<'static>, Signals, OnFork, Cleanup, Lineage, Stats, Durations, CareFd<File> => UnwindSafe + RefUnwindSafe);
is!(Child, ForkOptions<'static>, Signals, OnFork, Cleanup, Lineage, Stats, CareFd<File> => UnwindSafe + RefUnwindSafe);
is!(Report, HookEntry, RegionEntry, CareFdEntry, ChildEntry => Send + Sync + Debug + Unpin + Clone + Eq);
is!(Audit, Descriptor, Care, Fate, Kind => Send + Sync + Debug + Unpin + Clone + Eq + UnwindSafe + RefUnwindSafe);
is!(Care, Fate, Kind => Copy);
is!(Audit, Fate, Kind, Report => std::fmt::Display);
is!(ForkError, NotAChild, AdoptError<File>, Veto => Error);
is!(ForkOptions<'static>, Signals, OnFork, Cleanup, Lineage, Stats, Culprit, Culprits, Veto, NotAChild => Clone);
is!(ForkOptions<'static>, Signals, Stats, Durations, Cleanup, Culprits => Default);
is!(Stream, Waiting => Send + Sync + Debug + Unpin + UnwindSafe + RefUnwindSafe + std::fmt::Display);
is!(OnFork, Cleanup, Lineage, Stats, NotAChild, Stream, Waiting => Copy + Eq);
// The log.
is!(Logger, Output, Builder, WhenFull, BadFilter, AlreadySet, NoLogger, PerProcessMake<io::Sink, ()> => Send + Unpin + Debug);
is!(Logger, WhenFull, BadFilter, AlreadySet, NoLogger, Guarded<Logger>, PerProcessMake<io::Sink, ()> => Sync);
is!(Logger, WhenFull, BadFilter, AlreadySet, NoLogger, PerProcessMake<io::Sink, ()>, GuardedMake<io::Sink> => Clone);
is!(BadFilter, AlreadySet, NoLogger => Error + Eq);
is!(Logger, Guarded<Logger> => ::log::Log);
is!(Builder, WhenFull => Default);
is!(Logger, PerProcessMake<io::Sink, ()>, GuardedMake<fn() -> io::Stderr> => for<'a> MakeWriter<'a>);
is!(GuardedMake<Registry> => ::tracing::Subscriber + Send + Sync + Debug);
is!(RecordWriter<'static>, GuardedWriter<io::Stderr> => io::Write);
// It has a region in it.
is_not!(GuardedWriter<io::Stderr> => Send);
is!(OnFork, Cleanup, Lineage, Stats, NotAChild => Copy + Eq);
// A reaper is shared by handles, also from inside callbacks.
is!(Reaper, Watched, Exit => Clone + Send + Sync + Unpin + Debug);
is!(Reaper, Child => AsFd);
is!(ExitFuture => Send + Sync + Unpin + Debug + std::future::Future<Output = io::Result<Exit>>);
is!(Claim, WatchError => Send + Sync + Debug);
is!(WatchError, UnknownChild => Error);
is!(Ending, Usage, Sigchld, SigchldOwner, UnknownChild => Copy + Eq + Debug + Send + Sync);
is!(ForkReplacement => Copy + Debug + Send + Sync);
is!(Exit => std::fmt::Display + PartialEq);
is!(SigchldOwner => Default);
is!(ForkOptions<'static>, Signals, Stats, Cleanup, Culprits => Default);

is!(Command<'static>, CommandError, Step, Stdio, Resource => Send + Sync + Unpin + Debug);
is!(CommandError => Error);
is!(Step, Resource => Clone + Eq);

// Regions belong to their thread, and so does what holds one.
is_not!(NoForking => Send);
is_not!(MutexGuard<'static, u8>, MappedMutexGuard<'static, u8>, RwLockReadGuard<'static, u8> => Send);
is_not!(RwLockWriteGuard<'static, u8>, RwLockUpgradableReadGuard<'static, u8> => Send);
is_not!(MappedRwLockReadGuard<'static, u8>, MappedRwLockWriteGuard<'static, u8>, Held => Send);
// The registry and the children are not to be had twice.
is_not!(CareFd<File>, Child, InChild, Registration, Hook, NoForking, NamedFds, Received => Clone);
is_not!(CareFd<File>, Child, InChild, Registration => Copy);
// A `DerefMut` would let the value be swapped behind the registry.
is_not!(CareFd<File> => std::ops::DerefMut);

// Locks share what may be shared.
is!(Mutex<Cell<u8>>, RwLock<u8>, OnceLock<u8>, LazyLock<u8>, Condvar => Send + Sync);
is!(RawMutex, RawRwLock, RawCondvar => Send + Sync);
is_not!(Mutex<*const u8>, RwLock<Cell<u8>>, OnceLock<Cell<u8>>, LazyLock<Cell<u8>> => Sync);
is_not!(Mutex<*const u8>, OnceLock<*const u8> => Send);
is!(MutexGuard<'static, u8>, RwLockReadGuard<'static, u8> => Sync);
is!(RawMutex => lock_api::RawMutex + lock_api::RawMutexTimed);
is!(RawRwLock => lock_api::RawRwLock + lock_api::RawRwLockTimed + lock_api::RawRwLockDowngrade + lock_api::RawRwLockUpgrade);
is_not!(RawMutex => lock_api::RawMutexFair);
is_not!(RawRwLock => lock_api::RawRwLockFair);

// A service is shared; what it is told to do goes to its thread.
is!(Service<Cell<u8>>, OnChild<u8>, SendError<Cell<u8>>, ServiceError => Send + Debug + Unpin);
is!(Service<Cell<u8>>, OnChild<u8>, ServiceError => Sync);
is!(ServiceBuilder<u8>, Reply<Cell<u8>> => Send + Debug);
is!(SendError<*const u8>, ServiceError => Error);
is!(OnChild<String> => Copy + Default);
is_not!(Service<u8>, Reply<u8>, ServiceBuilder<u8> => Clone);
is!(PerProcess<u8>, PerProcess<String> => Send + Sync + Debug + UnwindSafe + RefUnwindSafe);
is_not!(PerProcess<Cell<u8>>, PerProcess<*const u8> => Sync);
is_not!(PerProcess<*const u8> => Send);

// Const-constructible.
static _MUTEX: Mutex<u8> = Mutex::new(0);
static _RW_LOCK: RwLock<u8> = RwLock::new(0);
static _CONDVAR: Condvar = Condvar::new();
static _ONCE: OnceLock<u8> = OnceLock::new();
static _LAZY: LazyLock<u8> = LazyLock::new(|| 0);
static _PER_PROCESS: PerProcess<u8> = PerProcess::new(|| 0);

/// The functions, by their whole types.
#[test]
fn functions_have_the_types_they_are_known_by() {
    let _: unsafe fn() -> Result<Fork, ForkError> = carefork::fork;
    let _: unsafe fn(fn() -> i32) -> Result<Child, ForkError> = carefork::spawn;
    let _: unsafe fn() -> Result<Cleanup, NotAChild> = carefork::postfork_child_noexec;
    let _: fn() -> NoForking = no_forking;
    let _: fn() -> Option<NoForking> = try_no_forking;
    let _: unsafe fn() = force_unlock;
    let _: fn() -> u64 = fork_generation;
    let _: fn() -> Lineage = carefork::lineage;
    let _: fn() -> Stats = carefork::stats;
    let _: fn() -> io::Result<Audit> = carefork::audit;
    let _: fn(u32) -> io::Result<Audit> = carefork::audit_of;
    let _: fn(&Audit) -> String = Audit::to_json;
    let _: fn() -> Report = carefork::report;
    let _: fn(Option<Duration>) = set_foreign_budget;
    let _: fn(Hook) -> Registration = carefork::register;
    let _: fn() -> Registration = carefork::stdio::guard;
    let _: fn() -> Option<Waiting> = carefork::stdio::waiting;

    let _: unsafe fn(&ForkOptions<'static>) -> Result<Fork, ForkError> = ForkOptions::fork;
    let _: unsafe fn(&ForkOptions<'static>, fn() -> i32) -> Result<Child, ForkError> = ForkOptions::spawn;
    let _: fn(ForkOptions<'static>, Duration) -> ForkOptions<'static> = ForkOptions::timeout;
    let _: fn(ForkOptions<'static>) -> ForkOptions<'static> = ForkOptions::timeout_never;
    let _: fn(ForkOptions<'static>, Signals) -> ForkOptions<'static> = ForkOptions::signals;
    let _: fn(ForkOptions<'static>, &[i32]) -> ForkOptions<'static> = ForkOptions::mask;
    let _: fn(ForkOptions<'static>, &'static File) -> ForkOptions<'static> = ForkOptions::keep;
    let _: fn(ForkOptions<'static>, i32) -> ForkOptions<'static> = ForkOptions::death_signal;
    let _: fn(ForkOptions<'static>, &str) -> ForkOptions<'static> = ForkOptions::name;
    let switches: [fn(ForkOptions<'static>, bool) -> ForkOptions<'static>; 4] =
        [ForkOptions::close_others, ForkOptions::new_session, ForkOptions::stdio_null, ForkOptions::pidfd];
    assert_eq!(switches.len(), 4);

    let _: fn(&Child) -> u32 = Child::id;
    let _: fn(&mut Child) -> io::Result<ExitStatus> = Child::wait;
    let _: fn(&mut Child) -> io::Result<Option<ExitStatus>> = Child::try_wait;
    let _: fn(Child) -> io::Result<std::process::Output> = Child::wait_with_output;
    let _: fn(&mut Child, Duration) -> io::Result<Option<ExitStatus>> = Child::wait_timeout;
    let _: fn(&Child) -> io::Result<()> = Child::kill;
    let _: fn(&Child, i32) -> io::Result<()> = Child::signal;
    let _: for<'a> fn(&'a Child) -> Option<BorrowedFd<'a>> = Child::pidfd;
    let _: fn(Child) -> u32 = Child::into_id;
    let _: fn(&Child) -> Option<&str> = Child::name;
    let _: fn(&Child) -> Option<&Exit> = Child::exit;
    let _: fn(&Child, i32) -> io::Result<()> = Child::signal_group;
    let _: fn(&mut Child, Duration) -> io::Result<ExitStatus> = Child::terminate;
    let _: unsafe fn(InChild) -> Cleanup = InChild::cleanup;
    let _: fn(InChild, i32) -> ! = InChild::exit;

    let _: fn(File) -> Result<CareFd<File>, AdoptError<File>> = CareFd::new;
    let _: fn(OnFork, File) -> Result<CareFd<File>, AdoptError<File>> = CareFd::new_on;
    let _: fn(fn() -> io::Result<File>) -> io::Result<CareFd<File>> = CareFd::open;
    let _: fn(OnFork, fn() -> io::Result<File>) -> io::Result<CareFd<File>> = CareFd::open_on;
    let _: fn(fn() -> io::Result<Vec<File>>) -> io::Result<Vec<CareFd<File>>> = CareFd::open_all;
    let _: fn(CareFd<File>) -> File = CareFd::into_inner;
    let _: fn(CareFd<File>) -> Option<File> = CareFd::try_into_inner;
    let _: fn(&CareFd<File>) -> Option<&File> = CareFd::get;
    let _: fn(&CareFd<File>) -> bool = CareFd::is_open_here;
    let _: fn(&NoForking, File) -> Result<CareFd<File>, AdoptError<File>> = NoForking::care;
    let _: fn(AdoptError<File>) -> io::Error = io::Error::from;

    // std's names, with std's shapes.
    type C = Command<'static>;
    let _: fn(&'static str) -> C = Command::new;
    let _: [for<'a> fn(&'a mut C, &'static str) -> &'a mut C; 3] = [Command::arg, Command::arg0, Command::env_remove];
    let _: for<'a> fn(&'a mut C, [&'static str; 2]) -> &'a mut C = Command::args;
    let _: for<'a> fn(&'a mut C, &'static str, &'static str) -> &'a mut C = Command::env;
    let _: for<'a> fn(&'a mut C, [(&'static str, &'static str); 1]) -> &'a mut C = Command::envs;
    let _: for<'a> fn(&'a mut C) -> &'a mut C = Command::env_clear;
    let _: for<'a> fn(&'a mut C, &'static str) -> &'a mut C = Command::current_dir;
    let _: [for<'a> fn(&'a mut C, Stdio) -> &'a mut C; 3] = [Command::stdin, Command::stdout, Command::stderr];
    let _: [fn() -> Stdio; 3] = [Stdio::inherit, Stdio::null, Stdio::piped];
    let _: fn(File) -> Stdio = Stdio::from;
    let _: fn(CareFd<io::PipeReader>) -> Stdio = Stdio::from;
    let _: [for<'a> fn(&'a mut C, u32) -> &'a mut C; 3] = [Command::uid, Command::gid, Command::umask];
    let _: for<'a> fn(&'a mut C, &[u32]) -> &'a mut C = Command::groups;
    let _: [for<'a> fn(&'a mut C, i32) -> &'a mut C; 2] = [Command::process_group, Command::death_signal];
    let _: for<'a> fn(&'a mut C, bool) -> &'a mut C = Command::session;
    let _: for<'a> fn(&'a mut C, Resource, u64, u64) -> &'a mut C = Command::rlimit;
    let _: for<'a> fn(&'a mut C, Signals) -> &'a mut C = Command::signals;
    let _: for<'a> fn(&'a mut C, &'static File) -> &'a mut C = Command::pass_fd;
    let _: for<'a> fn(&'a mut C, &'static File, i32) -> &'a mut C = Command::pass_fd_as;
    let _: for<'a> fn(&'a mut C, [(&'static str, BorrowedFd<'static>); 1]) -> &'a mut C = Command::listen_fds;
    let _: for<'a> fn(&'a mut C, Duration) -> &'a mut C = Command::timeout;
    let _: for<'a> fn(&'a mut C) -> &'a mut C = Command::timeout_never;
    let _: for<'a> unsafe fn(&'a mut C, fn() -> io::Result<()>) -> &'a mut C = Command::pre_exec;
    let _: fn(&mut C) -> Result<Child, CommandError> = Command::spawn;
    let _: fn(&mut C) -> Result<ExitStatus, CommandError> = Command::status;
    let _: fn(&mut C) -> Result<std::process::Output, CommandError> = Command::output;
    let _: fn(&CommandError) -> io::ErrorKind = CommandError::kind;
    let _: fn(&CommandError) -> Option<i32> = CommandError::raw_os_error;
    let _: fn(CommandError) -> io::Error = io::Error::from;
    let _: fn() -> Result<Vec<(String, CareFd<OwnedFd>)>, InheritError> = inherited::listen_fds;
    let _: fn(&'static str) -> Result<CareFd<OwnedFd>, InheritError> = inherited::fd;
    let _: unsafe fn() = inherited::remove_variables;
    let _: fn(&'static UnixStream, &[u8], &[BorrowedFd<'_>]) -> io::Result<usize> = carefork::send_fds;
    let _: fn(&'static UnixDatagram, &mut [u8], usize) -> io::Result<Received> = carefork::recv_fds;
    let _: fn(BorrowedFd<'static>, &[(&'static str, BorrowedFd<'_>)]) -> io::Result<()> = carefork::send_named_fds;
    assert_eq!(carefork::MAX_FDS, 253);
    const EMPTY: NamedFds = NamedFds::new();
    assert!(EMPTY.is_empty());
    assert_eq!((EMPTY.len(), EMPTY.list().len()), (0, 0));
    let _: fn(&mut NamedFds, &str, CareFd<OwnedFd>) -> Result<(), PutError> = NamedFds::put;
    let _: fn(&mut NamedFds, &str) -> Option<CareFd<OwnedFd>> = NamedFds::take;
    let _: for<'a> fn(&'a NamedFds, &str) -> Option<&'a CareFd<OwnedFd>> = NamedFds::get;
    let _: fn(&mut NamedFds, &str) -> bool = NamedFds::close;
    let _: fn(&mut NamedFds, &'static UnixStream) -> io::Result<usize> = NamedFds::receive;

    let _: fn(&'static str) -> Hook = Hook::new;
    let _: fn(Hook, i32) -> Hook = Hook::rank;
    let _: [fn(Hook, fn()) -> Hook; 5] = [Hook::prepare, Hook::undo, Hook::parent, Hook::child, Hook::cleanup];
    let _: fn(Hook, fn() -> Result<(), Veto>) -> Hook = Hook::try_prepare;
    let _: fn(&'static str, fn() -> u8) -> ServiceBuilder<u8> = Service::builder;
    let _: fn(ServiceBuilder<u8>, usize) -> ServiceBuilder<u8> = ServiceBuilder::capacity;
    let _: [fn(ServiceBuilder<u8>) -> ServiceBuilder<u8>; 2] = [ServiceBuilder::unbounded, ServiceBuilder::eager];
    let _: fn(ServiceBuilder<u8>, OnChild<u8>) -> ServiceBuilder<u8> = ServiceBuilder::on_child;
    let _: fn(ServiceBuilder<u8>, Duration, fn(&mut u8)) -> ServiceBuilder<u8> = ServiceBuilder::every;
    let _: fn(ServiceBuilder<u8>, fn(&mut u8, String)) -> io::Result<Service<String>> = ServiceBuilder::start;
    let _: fn(fn(&u8) -> u8) -> OnChild<u8> = OnChild::HandOver;
    let _: [fn(&Service<u8>, u8) -> Result<(), SendError<u8>>; 2] = [Service::send, Service::try_send];
    let _: fn(&Service<u8>, fn(Reply<String>) -> u8) -> Result<String, ServiceError> = Service::call;
    let _: [fn(&Service<u8>) -> Result<(), ServiceError>; 2] = [Service::flush, Service::stop];
    let _: fn(&Service<u8>) -> &'static str = Service::name;
    let _: fn(Reply<u8>, u8) = Reply::send;
    let _: fn(SendError<u8>) -> ServiceError = ServiceError::from;
    let _: for<'a> fn(&'a PerProcess<u8>) -> &'a u8 = PerProcess::get;

    let _: fn(&'static str) -> Veto = Veto::from;
    let _: fn(String) -> Veto = Veto::from;
}

/// The same for the log.
#[test]
fn the_log_has_the_functions_it_is_known_by() {
    let _: fn() = flush;
    let _: fn(Output) -> Result<(), NoLogger> = set_output;
    let _: fn(&Logger) = Logger::flush;
    let _: fn(&Logger, Output) = Logger::set_output;
    let _: fn(&Logger) -> u64 = Logger::lost;
    let _: fn(&Logger) -> LevelFilter = Logger::max_level;
    let _: fn() -> Builder = Builder::new;
    let _: fn(Builder, &str) -> Result<Builder, BadFilter> = Builder::filters;
    let _: fn(Builder, LevelFilter) -> Builder = Builder::level;
    let _: fn(Builder, &str, LevelFilter) -> Builder = Builder::target_level;
    let _: fn(Builder, Output) -> Builder = Builder::output;
    let _: fn(Builder, usize) -> Builder = Builder::background;
    let _: fn(Builder, WhenFull) -> Builder = Builder::when_full;
    let _: fn(Builder, bool) -> Builder = Builder::utc;
    let _: fn(Builder) -> Logger = Builder::build;
    let _: fn(Builder) -> Result<Logger, AlreadySet> = Builder::init;
    let _: fn() -> Output = Output::stderr;
    let _: fn(&'static str) -> io::Result<Output> = Output::file;
    let _: fn(File) -> io::Result<Output> = Output::fd;
    let _: fn(Vec<u8>) -> Output = Output::writer;
    let _ = [WhenFull::Block, WhenFull::Drop, WhenFull::GrowTo(1)];
    let _: fn(Logger) -> Guarded<Logger> = Guarded::new;
    let _: fn(Guarded<Logger>) -> Logger = Guarded::into_inner;
    let _: fn(Guarded<Logger>, LevelFilter) -> Result<(), AlreadySet> = Guarded::init;
    let _: fn(io::Stderr) -> GuardedMake<io::Stderr> = guarded;
    let _: fn(Registry) -> GuardedMake<Registry> = GuardedMake::new;
    let _: fn(GuardedMake<Registry>) -> Registry = GuardedMake::into_inner;
    let _: fn(fn() -> (io::Sink, ())) -> PerProcessMake<io::Sink, ()> = per_process;
    let _: fn(&PerProcessMake<io::Sink, ()>) = PerProcessMake::finish;
}

/// The same for what watches children.
#[test]
fn reapers_have_the_types_they_are_known_by() {
    let _: fn() -> io::Result<Reaper> = Reaper::new;
    let _: fn(&Reaper, Child, fn(Exit)) -> Result<Watched, WatchError> = Reaper::watch;
    let _: fn(&Reaper, Child) -> Result<Watched, WatchError> = Reaper::send;
    let _: fn(&Reaper, Child) -> Result<ExitFuture, WatchError> = Reaper::exit_of;
    let _: fn(&Reaper) -> io::Result<crossbeam_channel::Receiver<Exit>> = Reaper::receiver;
    let _: [fn(&Reaper) -> io::Result<usize>; 2] = [Reaper::dispatch, Reaper::sigchld_occurred];
    let _: fn(&Reaper) -> usize = Reaper::len;
    let _: fn(&Reaper) -> bool = Reaper::is_empty;
    let _: fn(&Reaper) = Reaper::close;
    let _: fn(&Reaper, SigchldOwner) -> io::Result<()> = Reaper::set_owner;
    let _: fn(&Reaper, fn(&Exit) -> Claim) = Reaper::on_unknown;
    let _: fn(&Reaper, u32, ExitStatus) -> Result<(), UnknownChild> = Reaper::reaped;
    let _: fn(&Reaper) -> Sigchld = Reaper::sigchld;
    let _: fn(&Watched) -> u32 = Watched::id;
    let _: [fn(&Watched, i32) -> io::Result<()>; 2] = [Watched::signal, Watched::signal_group];
    let _: [fn(&Watched) -> io::Result<()>; 2] = [Watched::kill, Watched::kill_deregister];
    let _: fn(&Watched, Duration) -> io::Result<()> = Watched::terminate;
    let _: fn(&Watched) -> bool = Watched::is_watched;
    let _: fn(WatchError) -> Child = WatchError::into_child;
    let _: fn(WatchError) -> io::Error = io::Error::from;
    let _: fn(&Exit) -> Option<ExitStatus> = Exit::exit_status;
    let _: [fn(&Exit) -> Option<i32>; 2] = [Exit::code, Exit::signal];
    let _: [fn(&Exit) -> bool; 2] = [Exit::success, Exit::is_lost];
    let _: unsafe fn(Option<ForkReplacement>) = carefork::set_fork_replacement;
}

#[test]
fn threads_have_the_functions_they_are_known_by() {
    use carefork::thread::{self, Builder};
    let _: fn(fn() -> u8) -> thread::JoinHandle<u8> = thread::spawn;
    let _: fn() -> Builder = Builder::new;
    let _: fn(Builder, String) -> Builder = Builder::name;
    let _: fn(Builder, usize) -> Builder = Builder::stack_size;
    let _: fn(Builder, fn() -> u8) -> io::Result<thread::JoinHandle<u8>> = Builder::spawn;
}

/// F5: a word beside the value.
#[test]
fn a_care_fd_is_at_most_eight_bytes_more() {
    assert!(size_of::<CareFd<OwnedFd>>() <= size_of::<OwnedFd>() + 8);
    assert!(size_of::<CareFd<net::TcpListener>>() <= size_of::<net::TcpListener>() + 8);
}

/// Errors say what to do, and what is behind them.
#[test]
fn errors_tell() {
    let os = ForkError::Os(io::Error::from_raw_os_error(libc::EAGAIN));
    assert!(os.to_string().contains("Resource temporarily unavailable") && os.source().is_some());
    let forbidden = ForkError::Forbidden { entered: None };
    assert!(forbidden.to_string().contains("end it first") && forbidden.source().is_none());
    assert!(ForkError::InFork.to_string().contains("hook"));
    let busy = ForkError::Busy { culprits: Culprits::default() };
    assert!(busy.to_string().contains("ForkOptions::timeout"));
    let deadlock = ForkError::WouldDeadlock { culprits: Culprits::default() };
    assert!(deadlock.to_string().contains("release the lock first"));
    let vetoed = ForkError::Vetoed { hook: "database", reason: "a transaction is open".into() };
    assert!(vetoed.to_string().contains("\"database\"") && vetoed.to_string().contains("a transaction is open"));
    assert!(ForkError::Invalid("what").to_string().ends_with("what"));

    let (service, error) = ("metrics", io::Error::from_raw_os_error(libc::EAGAIN));
    let os = ServiceError::Os { service, error };
    assert!(os.to_string().contains("Resource temporarily unavailable") && os.source().is_some());
    let not_restarted = ServiceError::NotRestarted { service };
    assert!(
        not_restarted.to_string().contains("\"metrics\"")
            && not_restarted.to_string().contains("postfork_child_noexec")
    );
    let unsent = SendError { message: 0, error: ServiceError::Full { service } };
    assert!(unsent.to_string().contains("\"metrics\": the channel is full") && unsent.source().is_none());
    for e in [
        ServiceError::Stopped { service },
        ServiceError::Panicked { service },
        ServiceError::StateLost { service },
        ServiceError::NoReply { service },
        ServiceError::OwnThread { service },
    ] {
        assert!(e.to_string().starts_with("service \"metrics\""), "{e}");
    }
}

/// Whatever the crate exports is named above.
#[test]
fn nothing_public_is_missing_here() {
    let here = include_str!("api.rs");
    let mut names = 0;
    for source in [
        include_str!("../src/lib.rs"),
        include_str!("../src/locks/mod.rs"),
        include_str!("../src/log/mod.rs"),
        include_str!("../src/tracing/mod.rs"),
    ] {
        // What a feature for tests and benches exports is indented.
        for item in source.split("\npub use ").skip(1) {
            let list = item.split(';').next().expect("split gives one");
            let list = list.rsplit("::").next().expect("split gives one");
            for name in list.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|n| !n.is_empty()) {
                let named = here.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name);
                assert!(named, "{name} is exported and not in tests/api.rs");
                names += 1;
            }
        }
    }
    assert!(names > 40, "found {names} only: is the list read as it is written?");
}
