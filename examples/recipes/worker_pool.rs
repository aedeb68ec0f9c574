use carefork::PerProcess;
use crossbeam_channel::{Sender, unbounded};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

static JOBS: PerProcess<Sender<Job>> = PerProcess::new(|| start(2));

fn start(workers: usize) -> Sender<Job> {
    let (jobs, received) = unbounded::<Job>();
    // Made inside a region: no fork comes before each thread has begun.
    let begun = Arc::new(Barrier::new(workers + 1));
    for _ in 0..workers {
        let (received, begins) = (received.clone(), Arc::clone(&begun));
        thread::spawn(move || {
            begins.wait();
            for job in received {
                // Its message has been said; the worker goes on.
                drop(catch_unwind(AssertUnwindSafe(job)));
            }
        });
    }
    begun.wait();
    jobs
}

pub fn run(job: impl FnOnce() + Send + 'static) {
    JOBS.get().send(Box::new(job)).expect("the workers live as long as the process");
}
