//! The log: a record to a file, a queue of them, and forks while threads log.

use crate::forks::{Server, pairs};
use crate::measure::{row, row_of_pairs, turns, wall_on_threads};
use carefork::Service;
use carefork::log::{Builder, Logger, Output};
use log::{Level, LevelFilter, Log, Record};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;
use tracing_appender::non_blocking::NonBlockingBuilder;
use tracing_subscriber::fmt::MakeWriter;

struct Scratch(PathBuf, File);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("carefork-bench-{name}-{}", std::process::id()));
        let file = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        Scratch(path, file)
    }

    fn file(&self) -> File {
        self.1.try_clone().unwrap()
    }

    fn output(&self) -> Output {
        Output::file(&self.0).unwrap()
    }

    /// Who opened it goes on; a process that will be killed leaves nothing behind.
    fn unlink(&self) {
        std::fs::remove_file(&self.0).unwrap();
    }

    /// Before each round: the disk is not what is measured.
    fn empty(&self) {
        self.1.set_len(0).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn one(logger: &dyn Log, n: u32) {
    let args = format_args!("request {n} from 10.0.0.7 took 12 ms");
    logger.log(&Record::builder().level(Level::Info).target("net::http").args(args).build());
}

const LINE: &[u8] = b"2026-11-21T07:03:12.345678Z  INFO net::http: request 12345 from 10.0.0.7 took 12 ms\n";
const QUEUED: usize = 4096;

/// ns for each of `n` lines from each of four threads, until the last is written.
fn queued(n: u32, write: impl Fn() + Sync, end: impl FnOnce()) -> f64 {
    let t = Instant::now();
    wall_on_threads(4, n, |_, n| (0..n).for_each(|_| write()));
    end();
    t.elapsed().as_nanos() as f64 / f64::from(n) / 4.0
}

/// What the serving process does besides: log without pause, or have everything registered.
pub(crate) fn set_up(setup: &str) {
    match setup {
        "logging" => {
            let scratch = Scratch::new("logging");
            let logger = Builder::new().output(scratch.output()).build();
            scratch.unlink();
            for _ in 0..4 {
                let logger = logger.clone();
                std::thread::spawn(move || {
                    loop {
                        one(&logger, 0);
                    }
                });
            }
            std::thread::spawn(move || {
                loop {
                    std::thread::sleep(std::time::Duration::from_millis(200));
                    scratch.empty();
                }
            });
        }
        "subsystems" => {
            let logger = Builder::new().output(Output::file("/dev/null").unwrap()).background(100).init().unwrap();
            one(&logger, 0);
            std::mem::forget(carefork::stdio::guard());
            let service = Service::builder("bench", || 0u64).start(|count, by: u64| *count += by).unwrap();
            service.send(1).unwrap();
            std::mem::forget(service);
        }
        _ => {}
    }
}

const PAIRS: usize = 20;
const TURNS: usize = 6;
const FORKS: usize = 25;

/// The times of all forks of one process and of its rival, each while its own threads log and the other's stand still.
///
/// With more threads than processors about every second child, and every second parent, waits for another thread's time slice, 4 ms
/// here: the times lie in heaps that far apart, the median between two of them. How the threads are spread over the processors
/// decides which heap is the larger one, and stays for a while; so the turns are short, and each lets the threads begin anew.
fn forks_under_load() -> (Vec<f64>, Vec<f64>) {
    let (mut a, mut b) = (Server::start(false, "logging"), Server::start(true, "logging"));
    let (mut ours, mut rival) = (Vec::new(), Vec::new());
    a.each(FORKS, "inherit");
    a.stop();
    b.each(FORKS, "bare");
    b.stop();
    let turn = |server: &mut Server, how: &str, times: &mut Vec<f64>| {
        server.go_on();
        times.extend(server.each(FORKS, how));
        server.stop();
    };
    for i in 0..TURNS {
        if i % 2 == 0 {
            turn(&mut a, "inherit", &mut ours);
        }
        turn(&mut b, "bare", &mut rival);
        if i % 2 == 1 {
            turn(&mut a, "inherit", &mut ours);
        }
    }
    (ours, rival)
}

pub(crate) fn rows(wanted: &dyn Fn(&str) -> bool) {
    for threads in [1, 8] {
        let what = format!("one record to a file, {threads} threads, against env_logger");
        if wanted(&what) {
            let (a, b) = (Scratch::new("ours"), Scratch::new("rival"));
            let ours = Builder::new().output(a.output()).build();
            let rival = env_logger::Builder::new()
                .filter_level(LevelFilter::Info)
                .target(env_logger::Target::Pipe(Box::new(b.file())))
                .build();
            let n = 40_000 / threads as u32;
            let run = |scratch: &Scratch, logger: &dyn Log| {
                scratch.empty();
                wall_on_threads(threads, n, |_, n| (0..n).for_each(|i| one(logger, i)))
            };
            row(&what, turns(21, || run(&a, &ours), || run(&b, &rival)), "ns", 1.0);
        }
    }
    let what = "a line through the background writer, 4 threads, against tracing-appender";
    if wanted(what) {
        let (a, b) = (Scratch::new("ours"), Scratch::new("rival"));
        let n = 40_000;
        let ours = || {
            a.empty();
            let logger: Logger = Builder::new().output(a.output()).background(QUEUED).build();
            let end = logger.clone();
            queued(n, || logger.make_writer().write_all(LINE).unwrap(), move || end.flush())
        };
        let rival = || {
            b.empty();
            let appender = NonBlockingBuilder::default().lossy(false).buffered_lines_limit(QUEUED).finish(b.file());
            let (writer, guard) = appender;
            queued(n, || writer.make_writer().write_all(LINE).unwrap(), move || drop(guard))
        };
        row(what, turns(15, ours, rival), "ns", 1.0);
    }
    let quantiles =
        [("p50", 0.5), ("p99", 0.99)].map(|(q, x)| (format!("fork while 4 threads log, {q}, against plain fork"), x));
    if quantiles.iter().any(|(what, _)| wanted(what)) {
        let pairs: Vec<_> = (0..PAIRS).map(|_| forks_under_load()).collect();
        for (what, q) in quantiles.iter().filter(|(what, _)| wanted(what)) {
            row_of_pairs(what, &pairs, *q, "µs", 1.5);
        }
    }
    // By whoever forks; and by carefork's own, whose child has a pidfd and tells of its end.
    for (how, fork) in [("libc's ", "bare"), ("", "inherit")] {
        let what = format!("{how}fork+_exit+wait with log, stdio and one service registered, against bare");
        if wanted(&what) {
            let ours = |s: &mut Server| s.ask(fork) / 1000.0;
            let bare = |s: &mut Server| s.ask("bare") / 1000.0;
            row(&what, pairs((false, "subsystems"), (true, "subsystems"), ours, bare), "µs", 1.10);
        }
    }
}
