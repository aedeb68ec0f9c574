//! Children in an event loop made of bare epoll: `cargo run --example loop_epoll`

#![allow(unsafe_code)]

use carefork::{CareFd, ForkOptions, Reaper};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

const CHILDREN: u64 = 1;

/// nix's epoll as an owner of its descriptor.
struct Loop(Epoll);

impl AsFd for Loop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

impl From<Loop> for OwnedFd {
    fn from(l: Loop) -> OwnedFd {
        l.0.0
    }
}

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    // A care-fd: no child that goes on without exec keeps the loop's epoll.
    let epoll = CareFd::open(|| Ok(Loop(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?)))?;
    let reaper = Reaper::new()?;
    epoll.0.add(&reaper, EpollEvent::new(EpollFlags::EPOLLIN, CHILDREN))?;

    let ended = Arc::new(Mutex::new(Vec::new()));
    for code in 0..3 {
        let options = ForkOptions::new().name("worker");
        // SAFETY: the child uses nothing of the parent's.
        let child = unsafe { options.spawn(|| code) }?;
        let ended = Arc::clone(&ended);
        reaper.watch(child, move |exit| {
            println!("{exit}");
            ended.lock().expect("no panic").push(exit);
        })?;
    }

    let mut events = [EpollEvent::empty(); 16];
    while !reaper.is_empty() {
        let ready = epoll.0.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..ready] {
            if event.data() == CHILDREN {
                reaper.dispatch()?;
            }
        }
    }
    assert_eq!(ended.lock().expect("no panic").len(), 3);
    Ok(())
}
