use carefork::fork_generation;
use rand::rngs::ThreadRng;
use std::cell::Cell;

/// rand's generator of this thread, with a seed of this process's own.
pub fn rng() -> ThreadRng {
    thread_local! {
        static SEEDED: Cell<u64> = const { Cell::new(u64::MAX) };
    }
    let mut rng = rand::rng();
    let here = fork_generation();
    if SEEDED.replace(here) != here {
        rng.reseed().expect("random numbers from the kernel");
    }
    rng
}
