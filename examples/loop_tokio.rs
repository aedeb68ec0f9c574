//! Children in a tokio program: `cargo run --features tokio --example loop_tokio`

#![allow(unsafe_code)]

use carefork::{ForkOptions, Reaper};
use std::error::Error;
use std::time::Duration;
use tokio::task::JoinSet;

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    // One thread. With more, only what the other threads do inside regions is at rest in a child.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(children())
}

async fn children() -> Result<(), Box<dyn Error>> {
    // One reaper for all, dispatched by a task of its own.
    let reaper = Reaper::new()?;
    let dispatching = tokio::spawn({
        let reaper = reaper.clone();
        async move { reaper.run().await }
    });
    let mut ends = JoinSet::new();
    for code in 0..3 {
        let options = ForkOptions::new().name("worker");
        // SAFETY: the child uses nothing of the parent's: not the runtime either.
        let end = reaper.exit_of(unsafe { options.spawn(|| code) }?)?;
        ends.spawn(end);
    }
    let mut ended = 0;
    while let Some(exit) = ends.join_next().await {
        println!("{}", exit??);
        ended += 1;
    }
    assert_eq!(ended, 3);
    reaper.close();
    dispatching.await??;

    // Or one child by itself, with a limit.
    // SAFETY: as above.
    let mut child = unsafe { ForkOptions::new().name("alone").spawn(|| 7) }?;
    let exit = tokio::time::timeout(Duration::from_secs(100), child.ended()).await??;
    println!("{exit}");
    assert_eq!(exit.code(), Some(7));
    Ok(())
}
