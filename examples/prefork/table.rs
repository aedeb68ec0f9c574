//! The connections as the master has them: a duplicate of each, so that it outlives its worker.

use crate::board::{Board, SLOTS};
use carefork::CareFd;
use std::collections::VecDeque;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};

pub(crate) struct Table {
    board: &'static Board,
    held: Vec<Option<Held>>,
    free: Vec<usize>,
    /// How many there have been, from 1.
    round: u64,
    /// Those that no worker has yet, or any more.
    pub(crate) waiting: VecDeque<u64>,
}

struct Held {
    number: u64,
    /// A care-fd: a new worker begins without other people's clients.
    stream: CareFd<TcpStream>,
    /// The pid of the worker that has it.
    worker: Option<u32>,
}

/// The slot that belongs to a connection.
pub(crate) fn index(number: u64) -> usize {
    number as usize % SLOTS
}

impl Table {
    pub(crate) fn new(board: &'static Board) -> Table {
        let held = std::iter::repeat_with(|| None).take(SLOTS).collect();
        // Low ones first: a slot that was used before has its memory.
        Table { board, held, free: (0..SLOTS).rev().collect(), round: 0, waiting: VecDeque::new() }
    }

    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// A new connection; it waits for a worker. To be asked first: [`Table::has_room`].
    pub(crate) fn add(&mut self, stream: CareFd<TcpStream>) {
        let Some(index) = self.free.pop() else { return };
        self.round += 1;
        // Never given again, so that what a worker says of an old connection is not taken for a new one's.
        let number = self.round * SLOTS as u64 + index as u64;
        self.board.slot(index).clear();
        self.held[index] = Some(Held { number, stream, worker: None });
        self.waiting.push_back(number);
    }

    fn find(&mut self, number: u64) -> Option<&mut Held> {
        self.held[index(number)].as_mut().filter(|held| held.number == number)
    }

    pub(crate) fn stream(&self, number: u64) -> Option<BorrowedFd<'_>> {
        let held = self.held[index(number)].as_ref().filter(|held| held.number == number)?;
        Some(held.stream.as_fd())
    }

    pub(crate) fn give_to(&mut self, number: u64, worker: u32) {
        if let Some(held) = self.find(number) {
            held.worker = Some(worker);
        }
    }

    /// The connection is over; whether it was there.
    pub(crate) fn close(&mut self, number: u64) -> bool {
        let there = self.find(number).is_some();
        if there {
            self.held[index(number)] = None;
            self.free.push(index(number));
        }
        there
    }

    /// The numbers of all that `worker` has.
    pub(crate) fn of(&self, worker: u32) -> Vec<u64> {
        self.held.iter().flatten().filter(|held| held.worker == Some(worker)).map(|held| held.number).collect()
    }

    /// Its worker is gone: another's turn.
    pub(crate) fn take_back(&mut self, number: u64) {
        if let Some(held) = self.find(number) {
            held.worker = None;
            self.waiting.push_back(number);
        }
    }
}
