//! Children in a mio loop: `cargo run --example loop_mio`

#![allow(unsafe_code)]

use carefork::{ForkOptions, Reaper};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use std::error::Error;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

const CHILDREN: Token = Token(1);

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let mut poll = Poll::new()?;
    let reaper = Reaper::new()?;
    poll.registry().register(&mut SourceFd(&reaper.as_raw_fd()), CHILDREN, Interest::READABLE)?;

    let ended = Arc::new(AtomicU32::new(0));
    for code in 0..3 {
        let options = ForkOptions::new().name("worker");
        // SAFETY: the child uses nothing of the parent's: not the loop either.
        let child = unsafe { options.spawn(|| code) }?;
        let ended = Arc::clone(&ended);
        reaper.watch(child, move |exit| {
            println!("{exit}");
            ended.fetch_add(1, Relaxed);
        })?;
    }

    let mut events = Events::with_capacity(16);
    while !reaper.is_empty() {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == CHILDREN {
                // mio is edge-triggered: one dispatch takes all there is.
                reaper.dispatch()?;
            }
        }
    }
    assert_eq!(ended.load(Relaxed), 3);
    Ok(())
}
