//! A server, as it were, that counts its requests in four threads and forks workers, which count their jobs.
//!
//!     cargo run --example metrics [DIRECTORY]
//!
//! Prints what each process has written, and ends with 1 if that is not what it counted.

mod metrics;

use metrics::{Metrics, file_of};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Duration;
use std::{env, fs, process, thread};

const WORKERS: u32 = 5;
/// Fewer than the service's channel holds, so none is lost.
const JOBS: u32 = 500;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let _streams = carefork::stdio::guard();
    let dir = env::args_os().nth(1).map_or_else(env::temp_dir, PathBuf::from);
    let metrics = Metrics::start(&dir, Duration::from_millis(50))?;
    let (workers, requests) = serve(&metrics)?;
    drop(metrics);

    let mut good = show(&dir, process::id())? == format!("request {requests}\n");
    for pid in workers {
        good &= show(&dir, pid)? == format!("job {JOBS}\n");
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Forks the workers while requests come in; their pids, and how many requests came.
#[allow(unsafe_code)]
fn serve(metrics: &Metrics) -> Result<(Vec<u32>, u32), Box<dyn Error>> {
    let (stop, requests) = (AtomicBool::new(false), AtomicU32::new(0));
    let pids: Result<_, Box<dyn Error>> = thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                while !stop.load(Relaxed) {
                    metrics.count("request");
                    requests.fetch_add(1, Relaxed);
                    thread::sleep(Duration::from_micros(200));
                }
            });
        }
        let pids = (0..WORKERS).map(|_| {
            // SAFETY: the worker uses no descriptor of the parent's, and nothing of other threads' stacks.
            let mut worker = unsafe {
                carefork::spawn(|| {
                    (0..JOBS).for_each(|_| metrics.count("job"));
                    i32::from(metrics.flush().is_err())
                })
            }?;
            let pid = worker.id();
            let status = worker.wait()?;
            if status.success() { Ok(pid) } else { Err(format!("worker {pid}: {status}").into()) }
        });
        let pids = pids.collect();
        stop.store(true, Relaxed);
        pids
    });
    Ok((pids?, requests.into_inner()))
}

fn show(dir: &Path, pid: u32) -> Result<String, Box<dyn Error>> {
    let file = file_of(dir, pid);
    let found = fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    print!("{}\n{found}", file.display());
    fs::remove_file(file)?;
    Ok(found)
}
