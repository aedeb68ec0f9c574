//! Children in a calloop loop: `cargo run --example loop_calloop`

#![allow(unsafe_code)]

use calloop::generic::Generic;
use calloop::{EventLoop, Interest, LoopSignal, Mode, PostAction};
use carefork::{Exit, ForkOptions, Reaper};
use std::error::Error;
use std::sync::mpsc;

struct Program {
    left: u32,
    stop: LoopSignal,
}

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let mut events: EventLoop<'_, Program> = EventLoop::try_new()?;
    let reaper = Reaper::new()?;
    // Callbacks are Send and know nothing of the loop's data: they hand over what the loop goes on with.
    let (tell, told) = mpsc::channel::<Exit>();
    let source = Generic::new(reaper.clone(), Interest::READ, Mode::Level);
    events.handle().insert_source(source, move |_, reaper, program: &mut Program| {
        reaper.dispatch()?;
        for exit in told.try_iter() {
            println!("{exit}");
            program.left -= 1;
        }
        if program.left == 0 {
            program.stop.stop();
        }
        Ok(PostAction::Continue)
    })?;
    for code in 0..3 {
        let options = ForkOptions::new().name("worker");
        // SAFETY: the child uses nothing of the parent's: not the loop either.
        let child = unsafe { options.spawn(|| code) }?;
        let tell = tell.clone();
        reaper.watch(child, move |exit| tell.send(exit).expect("the loop runs"))?;
    }
    let mut program = Program { left: 3, stop: events.get_signal() };
    events.run(None, &mut program, |_| {})?;
    assert_eq!(program.left, 0);
    Ok(())
}
