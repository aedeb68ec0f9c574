//! Children without an event loop, beside a ctrl-c channel: `cargo run --example loop_select`, then ctrl-c
//!
//! A worker that crashes is replaced. Ctrl-c ends all of them. With `--demo` a worker presses it.

#![allow(unsafe_code)]

use carefork::{ForkOptions, Reaper, Watched};
use crossbeam_channel::{bounded, select};
use std::error::Error;
use std::thread;
use std::time::Duration;

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    run(std::env::args().any(|arg| arg == "--demo"))
}

pub(crate) fn run(demo: bool) -> Result<(), Box<dyn Error>> {
    let (press, pressed) = bounded(1);
    ctrlc::set_handler(move || {
        // Pressed twice is pressed.
        let _full = press.try_send(());
    })?;
    let reaper = Reaper::new()?;
    let exits = reaper.receiver()?;
    let mut workers: Vec<Watched> = (0..2).map(|_| start(&reaper, demo)).collect::<Result<_, _>>()?;
    let mut ending = false;
    while !workers.is_empty() {
        select! {
            recv(exits) -> exit => {
                let exit = exit?;
                println!("{exit}");
                workers.retain(|worker| worker.id() != exit.pid);
                if !ending {
                    // One that stays this time.
                    workers.push(start(&reaper, false)?);
                }
            }
            recv(pressed) -> _ => {
                ending = true;
                println!("ending");
                for worker in &workers {
                    worker.terminate(Duration::from_secs(3))?;
                }
            }
        }
    }
    Ok(())
}

/// One that crashes presses ctrl-c first.
fn start(reaper: &Reaper, crashes: bool) -> Result<Watched, Box<dyn Error>> {
    let work = || {
        if crashes {
            let parent = nix::unistd::getppid();
            nix::sys::signal::kill(parent, nix::sys::signal::Signal::SIGINT).expect("the parent lives");
            return 1;
        }
        loop {
            thread::sleep(Duration::from_secs(1));
        }
    };
    let options = ForkOptions::new().name("worker").signals(carefork::Signals::Reset);
    // SAFETY: the child uses nothing of the parent's.
    let child = unsafe { options.spawn(work) }?;
    Ok(reaper.send(child)?)
}
