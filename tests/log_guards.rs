//! The loggers people already have, each made safe by one line and run as what it is (B2); each 2000 forks, both kinds.

// Forks.
#![allow(unsafe_code, clippy::disallowed_methods, clippy::expect_used)]

mod common;
mod drive;
mod logs;

use carefork::log::{Builder, Guarded, Output};
use carefork::tracing::{Guarded as GuardedSubscriber, guarded, per_process};
use common::isolated;
use log::LevelFilter;
use logs::{Scratch, assert_each_once, by_pid, numbers, standard_error_to, storm};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};
use tracing_subscriber::fmt::MakeWriter;

const FORKS: u32 = 2000;
/// Children log under this thread's number, each what it was given.
const CHILD: usize = logs::THREADS;

/// Eight threads and every child log into the same file; each record of each comes once.
fn all_in_one(file: &Scratch, record: impl Fn(usize, u64) + Sync) {
    let mut made = storm(FORKS, &record, |i| {
        record(CHILD, i.into());
        0
    });
    made.push(FORKS.into());
    assert_each_once(&file.text(), &made, |line| Some(numbers(line, "record").expect("a record")));
}

fn by_log(thread: usize, number: u64) {
    log::info!("record {thread} {number}");
}

fn by_tracing(thread: usize, number: u64) {
    let _span = tracing::info_span!("span", thread).entered();
    tracing::info!("record {thread} {number}");
}

// -- log

#[test]
fn env_logger_to_a_file() {
    isolated("env_logger_to_a_file", 240, || {
        let file = Scratch::new("env_logger");
        let target = env_logger::Target::Pipe(Box::new(file.append()));
        let logger = env_logger::Builder::new().filter_level(LevelFilter::Info).target(target).build();
        Guarded::new(logger).init(LevelFilter::Info).expect("the first logger");
        all_in_one(&file, by_log);
    });
}

#[test]
fn env_logger_to_stderr() {
    isolated("env_logger_to_stderr", 240, || {
        let file = Scratch::new("env_logger");
        let _redirected = standard_error_to(&file);
        let logger = env_logger::Builder::new().filter_level(LevelFilter::Info).build();
        Guarded::new(logger).init(LevelFilter::Info).expect("the first logger");
        all_in_one(&file, by_log);
    });
}

#[test]
fn simplelog_to_a_file() {
    isolated("simplelog_to_a_file", 240, || {
        let file = Scratch::new("simplelog");
        // It writes a record in pieces; processes that share a file need them as one.
        let to = io::LineWriter::new(file.append());
        let logger = simplelog::WriteLogger::new(LevelFilter::Info, simplelog::Config::default(), to);
        Guarded::new(logger).init(LevelFilter::Info).expect("the first logger");
        all_in_one(&file, by_log);
    });
}

#[test]
fn simplelog_to_several() {
    isolated("simplelog_to_several", 240, || {
        let (file, error) = (Scratch::new("simplelog"), Scratch::new("error"));
        let _redirected = standard_error_to(&error);
        let config = simplelog::Config::default;
        let loggers: Vec<Box<dyn simplelog::SharedLogger>> = vec![
            simplelog::TermLogger::new(
                LevelFilter::Info,
                config(),
                simplelog::TerminalMode::Stderr,
                simplelog::ColorChoice::Never,
            ),
            simplelog::WriteLogger::new(LevelFilter::Info, config(), io::LineWriter::new(file.append())),
        ];
        let logger = simplelog::CombinedLogger::new(loggers);
        Guarded::new(logger).init(LevelFilter::Info).expect("the first logger");
        all_in_one(&file, by_log);
        // There each record is in pieces between those of other processes, but as many lines.
        assert_eq!(error.text().lines().count(), file.text().lines().count());
    });
}

/// Each call of the logger's is in a region, a question for the level and a flush too: it may take its lock there.
#[test]
fn every_call_is_in_a_region() {
    static CALLS: Mutex<Vec<(&str, bool)>> = Mutex::new(Vec::new());
    struct Asks;
    fn note(call: &'static str) {
        // SAFETY: nothing is borrowed, and the child, if there is one, ends at once.
        let in_region = match unsafe { carefork::fork() } {
            Ok(carefork::Fork::Child(child)) => child.exit(0),
            Ok(carefork::Fork::Parent(mut child)) => child.wait().is_err(),
            Err(e) => matches!(e, carefork::ForkError::Forbidden { .. }),
        };
        CALLS.lock().expect("not poisoned").push((call, in_region));
    }
    impl log::Log for Asks {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            note("enabled");
            true
        }

        fn log(&self, _: &log::Record<'_>) {
            note("log");
        }

        fn flush(&self) {
            note("flush");
        }
    }
    isolated("every_call_is_in_a_region", 60, || {
        Guarded::new(Asks).init(LevelFilter::Info).expect("the first logger");
        assert!(log::log_enabled!(log::Level::Info));
        log::info!("a record");
        log::logger().flush();
        note("outside");
        let calls = CALLS.lock().expect("not poisoned");
        assert_eq!(*calls, [("enabled", true), ("log", true), ("flush", true), ("outside", false)]);
    });
}

// -- tracing

fn tracing_to<M: for<'a> MakeWriter<'a> + Send + Sync + 'static>(writer: M) {
    tracing_subscriber::fmt().with_ansi(false).with_writer(writer).init();
}

#[test]
fn tracing_fmt_to_a_file_behind_a_mutex() {
    isolated("tracing_fmt_to_a_file_behind_a_mutex", 240, || {
        let file = Scratch::new("fmt");
        tracing_to(guarded(Mutex::new(file.append())));
        all_in_one(&file, by_tracing);
    });
}

#[test]
fn tracing_fmt_to_stderr() {
    isolated("tracing_fmt_to_stderr", 240, || {
        let file = Scratch::new("fmt");
        let _redirected = standard_error_to(&file);
        tracing_to(guarded(io::stderr));
        all_in_one(&file, by_tracing);
    });
}

#[test]
fn tracing_fmt_to_stdout() {
    isolated("tracing_fmt_to_stdout", 240, || {
        let file = Scratch::new("fmt");
        let _redirected = logs::standard_output_to(&file);
        tracing_to(guarded(io::stdout));
        all_in_one(&file, by_tracing);
    });
}

/// A file, and how many records were written to it in this process.
struct Counted(std::fs::File);

static WRITTEN: AtomicU64 = AtomicU64::new(0);

impl io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.0.write(bytes)?;
        WRITTEN.fetch_add(bytes[..n].iter().filter(|&&b| b == b'\n').count() as u64, SeqCst);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// How long tracing-appender's guard waits for its thread at least, before it leaves it to itself.
const ITS_PATIENCE: Duration = Duration::from_millis(100);

/// The children write to a file of their own, by a thread of their own, and end it.
fn appender(lossy: bool, room: usize) {
    let (file, theirs) = (Scratch::new("appender"), Scratch::new("theirs"));
    let (path, their_path) = (file.0.clone(), theirs.0.clone());
    let events = per_process(move || {
        let path = if carefork::fork_generation() == 0 { &path } else { &their_path };
        let to = std::fs::OpenOptions::new().append(true).create(true).open(path).expect("a file");
        tracing_appender::non_blocking::NonBlockingBuilder::default()
            .lossy(lossy)
            .buffered_lines_limit(room)
            .finish(Counted(to))
    });
    tracing_to(events.clone());
    // All is written then, but on a machine so busy that the guard has lost its patience: that thread goes on writing.
    let finish = |all: u64| {
        let begun = Instant::now();
        events.finish();
        assert!(WRITTEN.load(SeqCst) == all || begun.elapsed() >= ITS_PATIENCE, "it did not wait for its thread");
        drive::until(|| WRITTEN.load(SeqCst) == all);
    };
    // Threads that outrun the one that writes have their records dropped where that is asked for: they wait for it.
    let sent = AtomicU64::new(0);
    let record = |thread: usize, number: u64| {
        drive::until(|| !lossy || sent.load(SeqCst).saturating_sub(WRITTEN.load(SeqCst)) < room as u64 / 2);
        sent.fetch_add(1, SeqCst);
        by_tracing(thread, number);
    };
    let made = storm(FORKS, record, |i| {
        // What the parent had written by then was copied with it.
        let before = WRITTEN.load(SeqCst);
        by_tracing(CHILD, i.into());
        finish(before + 1);
        0
    });
    finish(made.iter().sum());
    assert_each_once(&file.text(), &made, |line| Some(numbers(line, "record").expect("a record")));
    let mut none = vec![0; CHILD];
    none.push(FORKS.into());
    assert_each_once(&theirs.text(), &none, |line| Some(numbers(line, "record").expect("a record")));
}

#[test]
fn tracing_appender_lossy() {
    isolated("tracing_appender_lossy", 240, || appender(true, 20_000));
}

#[test]
fn tracing_appender_lossless_and_full() {
    isolated("tracing_appender_lossless_and_full", 240, || appender(false, 2));
}

/// tracing's levels, spans and format, carefork's outputs and rules for children.
#[test]
fn tracing_into_careforks_logger() {
    isolated("tracing_into_careforks_logger", 400, || {
        let (file, error) = (Scratch::new("tracing"), Scratch::new("error"));
        let _redirected = standard_error_to(&error);
        let logger = Builder::new().output(Output::file(&file.0).expect("a file")).background(64).build();
        tracing_to(logger.clone());
        let made = storm(FORKS, by_tracing, |i| {
            by_tracing(CHILD, i.into());
            0
        });
        logger.flush();
        let record = |line: &str| Some(numbers(line, "record").expect("a record"));
        assert_each_once(&file.text(), &made, record);
        let mut none = vec![0; CHILD];
        none.push(FORKS.into());
        let text = error.text();
        assert_each_once(&text, &none, record);
        let found = by_pid(&text);
        assert_eq!(found.values().map(Vec::len).sum::<usize>(), FORKS as usize);
        assert!(text.lines().all(|line| line.starts_with("[pid ") && line.contains("span{thread=8}")));
    });
}

/// What `finish` and a fork do to the writer that each process makes.
#[test]
fn each_process_makes_its_own_and_drops_only_that() {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    isolated("each_process_makes_its_own_and_drops_only_that", 60, || {
        struct Ends(Arc<AtomicU32>);
        impl Drop for Ends {
            fn drop(&mut self) {
                self.0.fetch_add(1, SeqCst);
            }
        }
        #[derive(Clone)]
        struct Nowhere;
        impl io::Write for Nowhere {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (made, ended) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let events = per_process({
            let (made, ended) = (Arc::clone(&made), Arc::clone(&ended));
            move || {
                made.fetch_add(1, SeqCst);
                (Nowhere, Ends(Arc::clone(&ended)))
            }
        });
        let now = || (made.load(SeqCst), ended.load(SeqCst));
        events.finish();
        assert_eq!(now(), (0, 0));
        let _writer = events.make_writer();
        let _writer = events.make_writer();
        assert_eq!(now(), (1, 0));
        for kind in drive::BOTH {
            let pid = logs::noexec(kind, || {
                events.finish();
                common::check(1, now() == (1, 0));
                let _writer = events.make_writer();
                let _writer = events.make_writer();
                common::check(2, now() == (2, 0));
                events.finish();
                common::check(3, now() == (2, 1));
                let _writer = events.make_writer();
                common::check(4, now() == (3, 1));
                0
            });
            assert_eq!(common::reap(pid, drive::SOON), common::Verdict::Exited(0));
        }
        events.finish();
        assert_eq!(now(), (1, 1));
        let _writer = events.make_writer();
        drop(events);
        assert_eq!(now(), (2, 2));
    });
}

// -- tracing's own locks

/// In a thread of its own: the forking thread gets none of the numbers that it would find in its children. The writer is a lock
/// that nothing else guards.
fn install() {
    let installs = || {
        let to = std::fs::OpenOptions::new().append(true).open("/dev/null").expect("the null device");
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(Mutex::new(to)).finish();
        tracing::subscriber::set_global_default(GuardedSubscriber::new(subscriber)).expect("the first subscriber");
        // Nor does this one give back any.
        loop {
            thread::park();
        }
    };
    thread::spawn(installs);
    drive::until(tracing::dispatcher::has_been_set);
}

/// 2000 forks, both kinds, of children that do `child`, beside two threads that do `busy` without end.
fn beside(busy: impl Fn() + Sync, child: impl Fn()) {
    carefork::set_foreign_budget(None);
    let stop = AtomicBool::new(false);
    let turns = [AtomicU64::new(0), AtomicU64::new(0)];
    let tally = thread::scope(|s| {
        let _stop = drive::Stop(&stop);
        for turns in &turns {
            let (stop, busy) = (&stop, &busy);
            s.spawn(move || {
                while !stop.load(SeqCst) {
                    busy();
                    turns.fetch_add(1, SeqCst);
                }
            });
        }
        drive::until(|| turns.iter().all(|n| n.load(SeqCst) > 0));
        common::fork_many(FORKS, 1, drive::SOON, |i| {
            logs::noexec(drive::BOTH[i as usize % 2], || {
                child();
                0
            })
        })
    });
    tally.expect_clean(FORKS);
}

/// A value that is written slowly, and short: a span keeps all that was recorded.
struct Slow;

impl std::fmt::Debug for Slow {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        thread::sleep(Duration::from_micros(50));
        Ok(())
    }
}

/// A span's values are behind a lock of its own.
#[test]
fn children_log_inside_a_span_that_threads_record_to() {
    isolated("children_log_inside_a_span_that_threads_record_to", 240, || {
        install();
        let span = tracing::info_span!("shared", n = tracing::field::Empty);
        beside(
            || {
                span.record("n", tracing::field::debug(Slow));
            },
            || span.in_scope(|| tracing::info!("from the child")),
        );
    });
}

/// Threads have numbers, given and taken back under a lock: the latter by a thread-local destructor.
#[test]
fn children_make_spans_while_threads_come_and_go() {
    isolated("children_make_spans_while_threads_come_and_go", 240, || {
        install();
        beside(
            || {
                thread::spawn(|| drop(tracing::info_span!("parent's").entered())).join().expect("no panic");
            },
            || tracing::info_span!("child's").in_scope(|| tracing::info!("from the child")),
        );
    });
}

/// The same where no thread makes a span: it logs only, or closes what another has made.
#[test]
fn children_make_spans_while_threads_log_and_end() {
    isolated("children_make_spans_while_threads_log_and_end", 240, || {
        install();
        beside(
            || {
                let span = tracing::info_span!("parent's");
                thread::scope(|s| {
                    s.spawn(|| tracing::info!("from a thread"));
                    s.spawn(|| drop(span));
                });
            },
            || tracing::info_span!("child's").in_scope(|| tracing::info!("from the child")),
        );
    });
}

/// The system's allocator, in which a thread that ends stays for a while each time, so that a fork can meet it there.
struct Lingering;

thread_local! {
    static ENDING: Cell<bool> = const { Cell::new(false) };
}
static MET: AtomicU64 = AtomicU64::new(0);
static FORKED: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is handed to `System` as it came.
unsafe impl GlobalAlloc for Lingering {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ENDING.get() {
            let n = MET.fetch_add(1, SeqCst) + 1;
            // Where a fork waits for this thread it is not to wait for the fork.
            for _ in 0..200 {
                if FORKED.load(SeqCst) >= n {
                    break;
                }
                thread::sleep(drive::MS);
            }
        }
        // SAFETY: our caller's promise is the one `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: our caller's promise; the block came from `System`.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Lingering = Lingering;

/// The first number that comes back makes room for it, under the lock, in each of the two crates.
#[test]
fn forks_do_not_meet_a_thread_that_gives_its_numbers_back() {
    isolated("forks_do_not_meet_a_thread_that_gives_its_numbers_back", 60, || {
        install();
        let thread = thread::spawn(|| {
            drop(tracing::info_span!("parent's").entered());
            ENDING.set(true);
        });
        for _ in 0..2 {
            drive::until(|| MET.load(SeqCst) > FORKED.load(SeqCst));
            let pid = logs::noexec(drive::Kind::Coordinated, || {
                tracing::info_span!("child's").in_scope(|| tracing::info!("from the child"));
                0
            });
            FORKED.fetch_add(1, SeqCst);
            assert_eq!(common::reap(pid, drive::SOON), common::Verdict::Exited(0));
        }
        thread.join().expect("no panic");
    });
}

/// All that goes through a subscriber goes through its guard, inside a region; what asks for the type within finds it.
#[test]
fn each_call_of_a_subscriber_is_inside_a_region() {
    use tracing::metadata::LevelFilter;
    use tracing::subscriber::Interest;
    use tracing::{Dispatch, Event, Metadata, Subscriber, dispatcher, span};

    /// Which calls came, each inside a region.
    #[derive(Default)]
    struct Calls(Mutex<std::collections::BTreeSet<&'static str>>);
    impl Calls {
        fn note(&self, call: &'static str) {
            // SAFETY: nothing is forked: it is refused, or the test fails.
            let refused = unsafe { carefork::spawn(|| 0) };
            assert!(matches!(refused, Err(carefork::ForkError::Forbidden { .. })), "{call}: {refused:?}");
            self.0.lock().expect("no panic").insert(call);
        }
    }
    impl Subscriber for Calls {
        fn on_register_dispatch(&self, _: &Dispatch) {
            self.note("on_register_dispatch");
        }
        fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
            self.note("register_callsite");
            Interest::sometimes()
        }
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            self.note("enabled");
            true
        }
        fn max_level_hint(&self) -> Option<LevelFilter> {
            self.note("max_level_hint");
            None
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            self.note("new_span");
            span::Id::from_u64(7)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {
            self.note("record");
        }
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {
            self.note("record_follows_from");
        }
        fn event_enabled(&self, _: &Event<'_>) -> bool {
            self.note("event_enabled");
            true
        }
        fn event(&self, _: &Event<'_>) {
            self.note("event");
        }
        fn enter(&self, _: &span::Id) {
            self.note("enter");
        }
        fn exit(&self, _: &span::Id) {
            self.note("exit");
        }
        fn clone_span(&self, _: &span::Id) -> span::Id {
            self.note("clone_span");
            span::Id::from_u64(8)
        }
        fn drop_span(&self, _: span::Id) {
            self.note("drop_span");
        }
        fn try_close(&self, _: span::Id) -> bool {
            self.note("try_close");
            true
        }
        fn current_span(&self) -> tracing_core::span::Current {
            self.note("current_span");
            tracing_core::span::Current::none()
        }
    }

    isolated("each_call_of_a_subscriber_is_inside_a_region", 60, || {
        let dispatch = Dispatch::new(GuardedSubscriber::new(Calls::default()));
        dispatcher::set_global_default(dispatch.clone()).expect("the first subscriber");
        let span = tracing::info_span!("span", n = tracing::field::Empty);
        span.record("n", 1);
        span.follows_from(span::Id::from_u64(9));
        span.clone().in_scope(|| tracing::info!("event"));
        assert_eq!(tracing::Span::current().id(), None);
        #[allow(deprecated)]
        dispatch.drop_span(span::Id::from_u64(7));
        drop(span);
        let calls = dispatch.downcast_ref::<Calls>().expect("the type within");
        assert!(dispatch.is::<GuardedSubscriber<Calls>>() && !dispatch.is::<u8>());
        assert_eq!(calls.0.lock().expect("no panic").len(), 15);
    });
}
