//! The locks that everybody takes: carefork's own or std's in their place, std's by hook, parking_lot's and channels in regions.

use crate::args::Half;
use crate::board::{Slot, Stage};
use carefork::{Hook, NoForking, Registration};
use crossbeam_channel::{Receiver, Sender};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Two numbers that are equal whenever nobody holds the lock.
#[derive(Debug, Default)]
pub(crate) struct Pair(u64, u64);

/// Data behind a lock was half changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) &'static str);

impl Pair {
    fn check(&self, whose: &'static str) -> Result<(), Broken> {
        if self.0 == self.1 { Ok(()) } else { Err(Broken(whose)) }
    }

    fn change(&mut self, whose: &'static str) -> Result<(), Broken> {
        self.check(whose)?;
        self.0 += 1;
        linger();
        self.1 += 1;
        Ok(())
    }
}

/// About as long as a small critical section.
fn linger() {
    for _ in 0..40 {
        std::hint::spin_loop();
    }
}

const ANSWER: u64 = 42;

fn answer() -> u64 {
    linger();
    ANSWER
}

/// The locks that carefork has of its own, behind one face so that std's can stand in for them.
pub(crate) trait Own: Send + Sync {
    /// With the mutex held.
    fn mutex(&self, inside: &mut dyn FnMut()) -> Result<(), Broken>;
    /// With the mutex held that is also held over some forks; never taken inside a region.
    fn snapshot(&self, inside: &mut dyn FnMut()) -> Result<(), Broken>;
    fn read(&self) -> Result<(), Broken>;
    fn write(&self, inside: &mut dyn FnMut()) -> Result<(), Broken>;
    /// Waits a little for somebody's `notify`.
    fn wait_a_little(&self);
    fn notify(&self);
    /// One side of a game for two: waits for its turn, without limit, and passes it on.
    fn play(&self, odd: bool, rounds: u32);
    fn once(&self) -> Result<(), Broken>;
    /// A fresh `OnceLock` and `LazyLock` for everybody.
    fn renew(&self);
}

/// The same text for both worlds; `$ok` makes a guard of what `lock` returns, `$wait` waits for at most some time.
macro_rules! own {
    ($name:ident, $from:ident, $ok:path, $wait:path) => {
        pub(crate) struct $name {
            mutex: $from::Mutex<Pair>,
            snapshot: $from::Mutex<Pair>,
            rwlock: $from::RwLock<Pair>,
            turn: $from::Mutex<u64>,
            turned: $from::Condvar,
            once: $from::RwLock<Arc<$from::OnceLock<u64>>>,
            lazy: $from::RwLock<Arc<$from::LazyLock<u64>>>,
        }

        impl Default for $name {
            fn default() -> Self {
                $name {
                    mutex: $from::Mutex::new(Pair::default()),
                    snapshot: $from::Mutex::new(Pair::default()),
                    rwlock: $from::RwLock::new(Pair::default()),
                    turn: $from::Mutex::new(0),
                    turned: $from::Condvar::new(),
                    once: $from::RwLock::new(Arc::new($from::OnceLock::new())),
                    lazy: $from::RwLock::new(Arc::new($from::LazyLock::new(answer))),
                }
            }
        }

        impl Own for $name {
            fn mutex(&self, inside: &mut dyn FnMut()) -> Result<(), Broken> {
                let mut pair = $ok(self.mutex.lock());
                pair.change("Mutex")?;
                inside();
                Ok(())
            }

            fn snapshot(&self, inside: &mut dyn FnMut()) -> Result<(), Broken> {
                let mut pair = $ok(self.snapshot.lock());
                pair.change("Mutex held over the fork")?;
                inside();
                pair.check("Mutex held over the fork")
            }

            fn read(&self) -> Result<(), Broken> {
                let pair = $ok(self.rwlock.read());
                linger();
                pair.check("RwLock")
            }

            fn write(&self, inside: &mut dyn FnMut()) -> Result<(), Broken> {
                let mut pair = $ok(self.rwlock.write());
                pair.change("RwLock")?;
                inside();
                Ok(())
            }

            fn wait_a_little(&self) {
                let turn = $ok(self.turn.lock());
                $wait(&self.turned, turn);
            }

            fn notify(&self) {
                *$ok(self.turn.lock()) += 2;
                self.turned.notify_all();
            }

            fn play(&self, odd: bool, rounds: u32) {
                for _ in 0..rounds {
                    let mut turn = $ok(self.turn.lock());
                    while (*turn % 2 == 1) != odd {
                        turn = on(&self.turned, turn);
                    }
                    *turn += 1;
                    drop(turn);
                    self.turned.notify_all();
                }
            }

            fn once(&self) -> Result<(), Broken> {
                let once = { Arc::clone(&*$ok(self.once.read())) };
                let lazy = { Arc::clone(&*$ok(self.lazy.read())) };
                let right = *once.get_or_init(answer) == ANSWER && **lazy == ANSWER;
                if right { Ok(()) } else { Err(Broken("OnceLock or LazyLock")) }
            }

            fn renew(&self) {
                *$ok(self.once.write()) = Arc::new($from::OnceLock::new());
                *$ok(self.lazy.write()) = Arc::new($from::LazyLock::new(answer));
            }
        }
    };
}

const A_LITTLE: Duration = Duration::from_micros(100);

mod ours {
    use super::*;
    use carefork::{Condvar, MutexGuard};
    use std::convert::identity;

    fn briefly(condvar: &Condvar, mut turn: MutexGuard<'_, u64>) {
        condvar.wait_for(&mut turn, A_LITTLE);
    }

    fn on<'a>(condvar: &Condvar, mut turn: MutexGuard<'a, u64>) -> MutexGuard<'a, u64> {
        condvar.wait(&mut turn);
        turn
    }

    own!(Ours, carefork, identity, briefly);
}

mod theirs {
    use super::*;
    use std::sync::{self, Condvar, LockResult, MutexGuard};

    fn open<G>(locked: LockResult<G>) -> G {
        locked.unwrap_or_else(PoisonError::into_inner)
    }

    fn briefly(condvar: &Condvar, turn: MutexGuard<'_, u64>) {
        drop(open(condvar.wait_timeout(turn, A_LITTLE)));
    }

    fn on<'a>(condvar: &Condvar, turn: MutexGuard<'a, u64>) -> MutexGuard<'a, u64> {
        open(condvar.wait(turn))
    }

    own!(Theirs, sync, open, briefly);
}

/// Every lock of one half.
pub(crate) struct Locks {
    half: Half,
    pub(crate) own: Box<dyn Own>,
    std_mutex: &'static std::sync::Mutex<Pair>,
    std_rwlock: &'static std::sync::RwLock<Pair>,
    pl_mutex: parking_lot::Mutex<Pair>,
    pl_rwlock: parking_lot::RwLock<Pair>,
    sender: Sender<u64>,
    receiver: Receiver<u64>,
    /// What makes the std locks and standard output safe; empty in the plain half.
    _hooks: Vec<Registration>,
}

impl Locks {
    pub(crate) fn new(half: Half) -> Locks {
        let std_mutex: &'static _ = Box::leak(Box::default());
        let std_rwlock: &'static _ = Box::leak(Box::default());
        let (sender, receiver) = crossbeam_channel::bounded(64);
        let (own, hooks): (Box<dyn Own>, _) = match half {
            Half::Plain => (Box::new(theirs::Theirs::default()), Vec::new()),
            Half::Carefork => {
                let hooks = vec![
                    carefork::register(Hook::std_mutex("storm's std Mutex", std_mutex).rank(1)),
                    carefork::register(Hook::std_rwlock("storm's std RwLock", std_rwlock).rank(2)),
                    // println!, eprintln! and the log's standard error, all in one.
                    carefork::stdio::guard(),
                ];
                (Box::new(ours::Ours::default()), hooks)
            }
        };
        let (pl_mutex, pl_rwlock) = Default::default();
        Locks { half, own, std_mutex, std_rwlock, pl_mutex, pl_rwlock, sender, receiver, _hooks: hooks }
    }

    fn region(&self) -> Option<NoForking> {
        (self.half == Half::Carefork).then(carefork::no_forking)
    }

    pub(crate) fn std_mutex(&self, inside: &mut dyn FnMut()) -> Result<(), Broken> {
        let mut pair = self.std_mutex.lock().unwrap_or_else(PoisonError::into_inner);
        pair.change("std Mutex")?;
        inside();
        Ok(())
    }

    pub(crate) fn std_rwlock(&self, write: bool) -> Result<(), Broken> {
        if write {
            return self.std_rwlock.write().unwrap_or_else(PoisonError::into_inner).change("std RwLock");
        }
        let pair = self.std_rwlock.read().unwrap_or_else(PoisonError::into_inner);
        linger();
        pair.check("std RwLock")
    }

    /// parking_lot keeps its waiting threads in a table that no hook can take: taking, waiting and letting go all happen in
    /// a region.
    pub(crate) fn parking_lot(&self, write: bool) -> Result<(), Broken> {
        let _region = self.region();
        self.pl_mutex.lock().change("parking_lot Mutex")?;
        if write {
            return self.pl_rwlock.write().change("parking_lot RwLock");
        }
        let pair = self.pl_rwlock.read();
        linger();
        pair.check("parking_lot RwLock")
    }

    /// Never waits: a thread that sleeps in `recv` would be a ghost on the channel's list in a child.
    pub(crate) fn channel(&self) {
        let _region = self.region();
        if self.sender.try_send(1).is_err() {
            self.receiver.try_iter().take(32).for_each(drop);
        }
    }

    /// Every lock once, as a child does; `life` is whose place on the board is written.
    pub(crate) fn tour(&self, slot: &Slot, life: usize) -> Result<(), Broken> {
        let nothing = &mut || {};
        slot.at(life, Stage::OwnMutex);
        self.own.mutex(nothing)?;
        self.own.snapshot(nothing)?;
        slot.at(life, Stage::OwnRwLock);
        self.own.read()?;
        self.own.write(nothing)?;
        slot.at(life, Stage::Condvar);
        self.own.notify();
        slot.at(life, Stage::OnceLock);
        self.own.once()?;
        slot.at(life, Stage::StdMutex);
        self.std_mutex(nothing)?;
        slot.at(life, Stage::StdRwLock);
        self.std_rwlock(false)?;
        self.std_rwlock(true)?;
        slot.at(life, Stage::ParkingLot);
        self.parking_lot(false)?;
        self.parking_lot(true)?;
        slot.at(life, Stage::Channel);
        self.channel();
        Ok(())
    }
}
