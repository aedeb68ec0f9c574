use carefork::PerProcess;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

static POOL: PerProcess<ThreadPool> = PerProcess::new(|| {
    let pool = ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
    // Made inside a region: no fork comes before each thread has begun.
    pool.broadcast(|_| ());
    pool
});

pub fn sum_of_squares(numbers: &[u64]) -> u64 {
    POOL.get().install(|| numbers.par_iter().map(|n| n * n).sum())
}
