//! The storm: a process whose threads log, print, lock, open and close without pause, forked from all the time.
//!
//! The same work is done under plain `fork()` and under carefork, each half in a process of its own; one table compares them.
//! `cargo run --release --example storm`; `--help` explains flags and columns.

mod args;
mod board;
mod child;
mod fault;
mod fds;
mod forkers;
mod lines;
mod locks;
mod report;
mod threads;
mod world;

use args::{Args, Half};
use lines::{Checker, Truth};
use report::{Asked, Row};
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, PipeReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let args = match args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(why) => {
            eprintln!("storm: {why} (see --help)");
            return ExitCode::from(2);
        }
    };
    if args.help {
        print!("{}", args::HELP);
        return ExitCode::SUCCESS;
    }
    let done = match args.half {
        Some(half) => world::run(args, half).map(|code| u8::try_from(code).unwrap_or(3)),
        None => both(&args),
    };
    match done {
        Ok(code) => code.into(),
        Err(e) => {
            eprintln!("storm: {e}");
            ExitCode::from(3)
        }
    }
}

/// Runs the halves one after the other, so that they do not slow each other down, and compares them.
fn both(args: &Args) -> io::Result<u8> {
    let halves = args.only.map_or(vec![Half::Plain, Half::Carefork], |h| vec![h]);
    let time = args.time / u32::try_from(halves.len()).unwrap_or(1);
    let rows = halves.into_iter().map(|half| run_half(args, half, time)).collect::<io::Result<Vec<_>>>()?;
    if args.json {
        println!("{}", report::json(&rows));
    } else {
        print!("{}", report::table(&rows));
    }
    let clean = rows.iter().filter(|r| r.half == Half::Carefork).all(Row::is_clean);
    Ok(u8::from(!clean))
}

/// A directory that goes with its value.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        // It is only litter that stays.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

fn run_half(args: &Args, half: Half, time: Duration) -> io::Result<Row> {
    let dir = Dir(std::env::temp_dir().join(format!("storm-{}-{}", std::process::id(), half.name())));
    std::fs::create_dir(&dir.0)?;
    let (out, err) = (dir.0.join("out"), dir.0.join("err"));
    let (reader, writer) = io::pipe()?;
    let mut process = start(args, half, time, OwnedFd::from(writer), &out, &err)?;
    let parent = process.id();
    let done = AtomicBool::new(false);
    let checker = || Checker::new(parent, args.threads, args.forkers);
    let (row, printed, logged, truths) = std::thread::scope(|scope| {
        let printed = scope.spawn(|| lines::follow(&out, checker(), &done));
        let logged = scope.spawn(|| lines::follow(&err, checker(), &done));
        let read = listen(half, reader, args.hold);
        let ended = process.wait();
        // Set whatever happened, or the readers would go on for ever.
        done.store(true, Ordering::Release);
        let (mut row, truths) = read?;
        let status = ended?;
        if !status.success() {
            row.note(format!("the process ended with {status}"));
            row.whole = false;
        }
        let join = |r: std::thread::ScopedJoinHandle<'_, io::Result<Checker>>| {
            r.join().map_err(|_| io::Error::other("a reader of lines panicked"))?
        };
        io::Result::Ok((row, join(printed)?, join(logged)?, truths))
    })?;
    Ok(judge(row, [printed, logged], &truths))
}

/// Starts this program again as one half.
fn start(args: &Args, half: Half, time: Duration, report: OwnedFd, out: &Path, err: &Path) -> io::Result<Child> {
    let log = |path| File::options().create(true).append(true).open(path);
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--half", half.name()])
        .args(["--seconds", &time.as_secs_f64().to_string()])
        .args(["--threads", &args.threads.to_string()])
        .args(["--forkers", &args.forkers.to_string()])
        .args(["--seed", &args.seed.to_string()])
        .args(args.hold.then_some("--hold"))
        .args(args.fault.map(|fault| format!("--fault={}", fault.name())))
        .stdin(Stdio::from(report))
        .stdout(Stdio::from(log(out)?))
        .stderr(Stdio::from(log(err)?));
    match half {
        // The library's own switch: gate and hooks do nothing.
        Half::Plain => command.env("CAREFORK", "off"),
        Half::Carefork => command.env_remove("CAREFORK"),
    };
    command.spawn()
}

/// Reads the half's report to its end, and shows on a terminal how it goes.
fn listen(half: Half, reader: PipeReader, hold: bool) -> io::Result<(Row, [Truth; 2])> {
    let terminal = io::stderr().is_terminal();
    let begin = Instant::now();
    let mut row = Row::new(half);
    let (mut out, mut log) = Default::default();
    for line in BufReader::new(reader).lines() {
        match row.read(&line?, &mut out, &mut log) {
            Asked::Progress if terminal => {
                eprint!("\r{}\x1b[K", row.progress(begin.elapsed().as_secs_f64()));
                io::stderr().flush()?;
            }
            Asked::Hold(what) if hold => eprintln!("\nstorm: {what}; held for a debugger, end with ^C"),
            _ => {}
        }
        if row.whole {
            break;
        }
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
    Ok((row, [out, log]))
}

fn judge(mut row: Row, checkers: [Checker; 2], truths: &[Truth; 2]) -> Row {
    for ((mut checker, truth), stream) in checkers.into_iter().zip(truths).zip(["printed", "logged"]) {
        if row.whole {
            checker.finish(truth);
        }
        row.lines += checker.lines;
        row.bad_lines += checker.bad;
        for sample in checker.samples {
            row.note(format!("{stream}, {sample}"));
        }
    }
    row
}
