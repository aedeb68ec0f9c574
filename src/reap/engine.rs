//! An epoll of pidfds and the table behind it: what a reaper and the orphans have in common.
//!
//! Three system calls a death: waitid, EPOLL_CTL_DEL, close. A pidfd is taken out before it is closed, because an epoll goes on watching
//! one of which any process has a copy.

use super::body::Body;
use super::exit::{Exit, Record};
use super::known::{self, Holder};
use crate::carefd::CareFd;
use crate::locks::{Mutex, OnceLock};
use crate::sys_reap::{self, Event, How, NO_EVENT};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// How many deaths one look at the epoll tells of. On the stack, of which a fork makes each page cost a fault.
const BATCH: usize = 64;

/// Names an entry: slot in the low half, how often the slot was used before in the high one. What else an epoll watches has a key
/// of a slot that no table is long enough for.
pub(crate) type Key = u64;

/// A child and what to do at its end.
pub(crate) struct Entry<T> {
    pub(crate) body: Body,
    pub(crate) then: T,
    /// It ended before it came here.
    record: Option<Box<Record>>,
}

struct Slot<T> {
    used: u32,
    entry: Option<Entry<T>>,
}

struct Table<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// Those of whose end no pidfd tells: it was refused, or a debugger has the status first.
    ask: Vec<Key>,
}

pub(crate) struct Engine<T> {
    epoll: CareFd<OwnedFd>,
    /// Where the pidfds are while nobody is to see them.
    aside: OnceLock<CareFd<OwnedFd>>,
    hidden: AtomicBool,
    /// Which reaper; 0 for the orphans.
    reaper: u32,
    table: Mutex<Table<T>>,
    live: AtomicUsize,
    asking: AtomicUsize,
    generation: u64,
}

fn split(key: Key) -> (usize, u32) {
    ((key & 0xffff_ffff) as usize, (key >> 32) as u32)
}

impl<T> Entry<T> {
    /// For somebody else to reap.
    pub(crate) fn abandon(mut self) -> (Body, T) {
        self.body.spare_group();
        self.body.hold(Holder::Asks);
        (self.body, self.then)
    }
}

impl<T> Table<T> {
    fn at(&mut self, key: Key) -> Option<&mut Entry<T>> {
        let (index, used) = split(key);
        self.slots.get_mut(index).filter(|s| s.used == used)?.entry.as_mut()
    }

    fn vacant(&mut self) -> Key {
        let index = self.free.pop().unwrap_or_else(|| {
            if self.slots.len() == self.slots.capacity() {
                // By a quarter: what lies empty counts as memory per child.
                self.slots.reserve_exact(self.slots.len() / 4 + 16);
            }
            self.slots.push(Slot { used: 0, entry: None });
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        u64::from(self.slots[index as usize].used) << 32 | u64::from(index)
    }

    /// One whose status is here already.
    fn recorded(&self) -> Option<Key> {
        self.ask.iter().copied().find(|&key| {
            let (index, used) = split(key);
            let entry = self.slots.get(index).filter(|s| s.used == used).and_then(|s| s.entry.as_ref());
            entry.is_some_and(|e| e.record.is_some())
        })
    }

    fn remove(&mut self, key: Key) -> Option<Entry<T>> {
        let (index, used) = split(key);
        let slot = self.slots.get_mut(index).filter(|s| s.used == used)?;
        let entry = slot.entry.take()?;
        slot.used = slot.used.wrapping_add(1);
        self.free.push(index as u32);
        Some(entry)
    }
}

impl<T> Engine<T> {
    pub(crate) fn new(reaper: u32) -> io::Result<Self> {
        Ok(Engine {
            epoll: CareFd::open_cloexec(sys_reap::epoll)?,
            aside: OnceLock::new(),
            hidden: AtomicBool::new(false),
            reaper,
            table: Mutex::new(Table { slots: Vec::new(), free: Vec::new(), ask: Vec::new() }),
            live: AtomicUsize::new(0),
            asking: AtomicUsize::new(0),
            generation: crate::runtime::generation(),
        })
    }

    pub(crate) fn is_ours(&self) -> bool {
        crate::runtime::generation() == self.generation
    }

    /// What becomes readable.
    ///
    /// # Panics
    /// In a child that closed it.
    #[track_caller]
    pub(crate) fn epoll(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Where the pidfds are.
    fn watching(&self) -> Option<BorrowedFd<'_>> {
        let epoll = if self.hidden.load(Ordering::Acquire) { self.aside.get()? } else { &self.epoll };
        epoll.get().map(AsFd::as_fd)
    }

    /// Has deaths make the descriptor readable no more, or again; a dispatch finds them either way.
    ///
    /// # Errors
    /// As epoll_create1(2).
    pub(crate) fn hide(&self, yes: bool) -> io::Result<()> {
        let mut table = self.table.lock();
        if self.hidden.load(Ordering::Acquire) == yes {
            return Ok(());
        }
        if yes && self.aside.get().is_none() {
            let aside = CareFd::open_cloexec(sys_reap::epoll)?;
            // Set under the table's lock, by nobody else.
            drop(self.aside.set(aside));
        }
        let from = self.watching();
        self.hidden.store(yes, Ordering::Release);
        let (Some(from), Some(to)) = (from, self.watching()) else { return Ok(()) };
        let Table { slots, ask, .. } = &mut *table;
        for (index, slot) in slots.iter().enumerate() {
            let key = u64::from(slot.used) << 32 | index as u64;
            let Some(fd) = slot.entry.as_ref().and_then(|e| e.body.pidfd()).filter(|_| !ask.contains(&key)) else {
                continue;
            };
            sys_reap::epoll_del(from, fd);
            if sys_reap::epoll_add(to, fd, key).is_err() {
                ask.push(key);
                self.asking.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    pub(crate) fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Somebody has to ask now and then: no descriptor tells of these.
    pub(crate) fn is_asking(&self) -> bool {
        self.asking.load(Ordering::Relaxed) != 0
    }

    /// # Errors
    /// With the child, which is watched by nobody then.
    pub(crate) fn add(
        &self,
        mut body: Body,
        then: T,
        record: Option<Box<Record>>,
    ) -> Result<Key, (Body, T, io::Error)> {
        let mut table = self.table.lock();
        let key = table.vacant();
        let mut asks = record.is_some() || !body.has_pidfd();
        // First: whoever the epoll wakes must not find that there is nobody, and sleep on.
        self.live.fetch_add(1, Ordering::Relaxed);
        if !asks
            && let (Some(epoll), Some(fd)) = (self.watching(), body.pidfd())
            && let Err(e) = sys_reap::epoll_add(epoll, fd, key)
        {
            self.live.fetch_sub(1, Ordering::Relaxed);
            table.free.push(split(key).0 as u32);
            return Err((body, then, e));
        }
        let (index, _) = split(key);
        if record.is_none() && !body.has_pidfd() {
            known::want();
        }
        if record.is_none() && known::is_wanted() {
            body.write_down();
        }
        body.hold(self.holder(index));
        // From here on a status comes to this table, which is locked; before, it was put aside for whoever asks.
        let mut record = record;
        if record.is_none()
            && let Some(found) = body.found()
        {
            record = Some(Box::new(found));
            // Readable, the pidfd tells of it, where a main loop keeps deaths to itself too: this one it has not to wait for.
            if let (false, true, Some(fd)) = (asks, self.hidden.load(Ordering::Acquire), body.pidfd())
                && let (Some(aside), Some(epoll)) = (self.watching(), self.epoll.get())
            {
                sys_reap::epoll_del(aside, fd);
                // Without room a timer does.
                drop(sys_reap::epoll_add(epoll.as_fd(), fd, key));
            }
            asks = true;
        }
        table.slots[index].entry = Some(Entry { body, then, record });
        if asks {
            table.ask.push(key);
            self.asking.fetch_add(1, Ordering::Relaxed);
        }
        Ok(key)
    }

    fn holder(&self, index: usize) -> Holder {
        match self.reaper {
            0 => Holder::Asks,
            reaper => Holder::Reaper { reaper, index: index as u32 },
        }
    }

    /// Writes down those who came before anybody wanted it.
    pub(crate) fn write_down(&self) {
        for (index, slot) in self.table.lock().slots.iter_mut().enumerate() {
            if let Some(Entry { body, record: None, .. }) = &mut slot.entry {
                body.write_down();
                body.hold(self.holder(index));
            }
        }
    }

    /// Looks at an entry. `f` runs under the lock.
    pub(crate) fn with<R>(&self, key: Key, f: impl FnOnce(&mut Entry<T>) -> R) -> Option<R> {
        self.table.lock().at(key).map(f)
    }

    /// The key of what is in slot `index`, if that is `pid`.
    pub(crate) fn key_at(&self, index: u32, pid: u32) -> Option<Key> {
        let table = self.table.lock();
        let slot = table.slots.get(index as usize)?;
        (slot.entry.as_ref()?.body.pid == pid).then_some(u64::from(slot.used) << 32 | u64::from(index))
    }

    /// Reaps what has ended and hands each out, with no lock held; how many. Stops where `each` says false.
    ///
    /// # Errors
    /// As epoll_wait(2) and waitid(2).
    pub(crate) fn dispatch(&self, mut each: impl FnMut(Exit, T) -> bool) -> io::Result<usize> {
        let mut reaped = 0;
        let mut buffer = [NO_EVENT; BATCH];
        loop {
            let Some(epoll) = self.watching() else { return Ok(reaped) };
            let before = reaped;
            let ready = sys_reap::epoll_ready(epoll, &mut buffer)?;
            for event in ready {
                let Event { u64: key, .. } = *event;
                // The pidfd is closed after the callback, which has waited for its end.
                let Some((exit, Entry { body: _closed_later, then, .. })) = self.finish(key)? else { continue };
                reaped += 1;
                if !each(exit, then) {
                    return Ok(reaped);
                }
            }
            if ready.len() < BATCH || reaped == before {
                break;
            }
        }
        if self.is_asking() {
            let keys = self.table.lock().ask.clone();
            for key in keys {
                let Some((exit, Entry { then, .. })) = self.finish(key)? else { continue };
                reaped += 1;
                if !each(exit, then) {
                    return Ok(reaped);
                }
            }
        }
        Ok(reaped)
    }

    /// Somebody's status is here already, and nothing tells of that.
    pub(crate) fn has_records(&self) -> bool {
        self.is_asking() && self.table.lock().recorded().is_some()
    }

    /// Hands out what was here before, as `dispatch` does, and reaps nobody.
    pub(crate) fn dispatch_records(&self, mut each: impl FnMut(Exit, T) -> bool) -> io::Result<usize> {
        let mut told = 0;
        loop {
            let recorded = self.table.lock().recorded();
            let Some(key) = recorded else { break };
            // Another thread may have been faster.
            let Some((exit, Entry { then, .. })) = self.finish(key)? else { continue };
            told += 1;
            if !each(exit, then) {
                break;
            }
        }
        Ok(told)
    }

    /// Takes the entry out if its child has ended; the caller is the only one to get it.
    pub(crate) fn finish(&self, key: Key) -> io::Result<Option<(Exit, Entry<T>)>> {
        let mut table = self.table.lock();
        let Some(entry) = table.at(key) else { return Ok(None) };
        let record = match entry.record.take() {
            Some(record) => Some(*record),
            None if entry.body.end_group() => entry.body.look(How::Now)?,
            None => None,
        };
        let Some(record) = record else {
            // A pidfd that is readable before the child can be waited for: a debugger waits first. It would fire on and on.
            self.ask_from_now_on(&mut table, key);
            return Ok(None);
        };
        let taken = self.take_out(&mut table, key);
        drop(table);
        Ok(taken.map(|mut entry| (entry.body.exit(record), entry)))
    }

    /// The same for a child whose status somebody else brings.
    pub(crate) fn finish_with(&self, key: Key, record: Record) -> Option<(Exit, T)> {
        let mut table = self.table.lock();
        let taken = self.take_out(&mut table, key);
        drop(table);
        taken.map(|Entry { mut body, then, .. }| {
            body.end_group();
            body.cross_out();
            (body.exit(record), then)
        })
    }

    fn ask_from_now_on(&self, table: &mut Table<T>, key: Key) {
        if table.ask.contains(&key) {
            return;
        }
        if let Some(fd) = table.at(key).and_then(|e| e.body.pidfd())
            && let Some(epoll) = self.watching()
        {
            sys_reap::epoll_del(epoll, fd);
        }
        table.ask.push(key);
        self.asking.fetch_add(1, Ordering::Relaxed);
    }

    fn take_out(&self, table: &mut Table<T>, key: Key) -> Option<Entry<T>> {
        let entry = table.remove(key)?;
        self.live.fetch_sub(1, Ordering::Relaxed);
        if self.is_asking()
            && let Some(at) = table.ask.iter().position(|k| *k == key)
        {
            table.ask.swap_remove(at);
            self.asking.fetch_sub(1, Ordering::Relaxed);
            // It may be there all the same (`add`).
            if let (Some(epoll), Some(fd)) = (self.epoll.get(), entry.body.pidfd()) {
                sys_reap::epoll_del(epoll.as_fd(), fd);
            }
        } else if let (Some(epoll), Some(fd)) = (self.watching(), entry.body.pidfd()) {
            sys_reap::epoll_del(epoll, fd);
        }
        Some(entry)
    }

    /// Takes everybody out.
    pub(crate) fn drain(&self) -> Vec<Entry<T>> {
        let mut table = self.table.lock();
        let keys: Vec<Key> = (0..table.slots.len())
            .map(|i| u64::from(table.slots[i].used) << 32 | i as u64)
            .filter(|&key| table.slots[split(key).0].entry.is_some())
            .collect();
        keys.into_iter().filter_map(|key| self.take_out(&mut table, key)).collect()
    }
}
