//! What other libraries need to work in a child that does not exec. Each recipe is run by `tests/recipes.rs`, through thousands of
//! forks of both kinds, as it stands here.
//!
//! # A thread that serves
//! [`Service`](crate::Service), or for a whole example, a metrics flusher, `examples/metrics`.
//!
//! # Initialised once
//! A child that is forked while another thread initialises a `std::sync::OnceLock` or `LazyLock` waits for it for ever, or
//! finds it half done. No child finds [`OnceLock`](crate::OnceLock) and [`LazyLock`](crate::LazyLock) so; std's can be looked at inside a
//! region, which must not hold a fork up for long and must not fork.
//!
//! ```
#![doc = include_str!("../examples/recipes/once.rs")]
//!
//! static HOST: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| "somebody else's".into());
//! assert!(force(&HOST).ends_with("else's") && PRIMES.len() == 25);
//! ```
//!
//! # rayon
//! A pool's threads are its parent's: in a child whatever is given to it waits for ever, rayon's global pool (`par_iter` outside of
//! `install`) included. Give each process a pool, by [`PerProcess`](crate::PerProcess), and use no other:
//!
//! ```
#![doc = include_str!("../examples/recipes/rayon_pool.rs")]
//!
//! assert_eq!(sum_of_squares(&[1, 2, 3]), 14);
//! ```
//!
//! A child that is forked by one of the pool's own threads must not use rayon: rayon takes that thread for a worker still, which helps
//! with its pool's jobs, the parent's.
//!
//! # A pool of workers on a crossbeam channel
//! The same, for any pool and any channel: one that a worker is parked on wakes ghosts in a child. A parent's channel is neither used nor
//! dropped there, and what is queued in it is the parent's to do.
//!
//! ```
#![doc = include_str!("../examples/recipes/worker_pool.rs")]
//!
//! let (done, wait) = crossbeam_channel::bounded(1);
//! run(move || done.send(6 * 7).unwrap());
//! assert_eq!(wait.recv(), Ok(42));
//! ```
//!
//! # Random numbers
//! A generator in memory is copied: parent and child go on with the same numbers, and so do all children of one parent.
//! rand's `ThreadRng` knows nothing of forks. Compare [`fork_generation`](crate::fork_generation) before each use, and take the new seed
//! from the kernel, as `reseed` does (`SysRng` for other generators), never from a generator that may have been copied:
//!
//! ```
#![doc = include_str!("../examples/recipes/random.rs")]
//!
//! use rand::RngExt;
//! assert_ne!(rng().random::<u64>(), rng().random::<u64>());
//! ```
