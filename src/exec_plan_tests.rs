//! The moves, carried out on a model of a descriptor table.

use super::{Move, Moves, StringsBuilder};
use std::collections::{BTreeMap, BTreeSet};

/// What each number holds at the end, beginning with each holding itself.
fn carry_out(moves: &Moves) -> BTreeMap<i32, i32> {
    let mut table = BTreeMap::new();
    let mut aside = None;
    let read = |table: &BTreeMap<i32, i32>, n| *table.get(&n).unwrap_or(&n);
    for step in &moves.steps {
        match *step {
            Move::Stay(n) => assert_eq!(read(&table, n), n, "{n} was to stay and had been overwritten"),
            Move::Dup { from, to } => {
                let what = read(&table, from);
                table.insert(to, what);
            }
            Move::Aside { from, .. } => assert_eq!(aside.replace(read(&table, from)), None, "one at a time"),
            Move::Back { to, .. } => drop(table.insert(to, aside.take().expect("put aside before"))),
        }
    }
    table
}

#[track_caller]
fn check(wanted: &BTreeMap<i32, i32>) -> Moves {
    let moves = Moves::new(wanted);
    let table = carry_out(&moves);
    for (to, from) in wanted {
        assert_eq!(table.get(to).unwrap_or(to), from, "{wanted:?} by {:?}", moves.steps);
    }
    // Nothing else is written.
    assert!(table.keys().all(|to| wanted.contains_key(to)));
    moves
}

/// Every function from 0..5 to 0..5, and each of its restrictions: rings, chains, trees and all of them at once.
#[test]
fn every_small_table() {
    let mut rings = BTreeSet::new();
    for code in 0..6u32.pow(5) {
        let digits = (0..5).map(|i| (i, (code / 6u32.pow(i as u32) % 6) as i32));
        let wanted: BTreeMap<i32, i32> = digits.filter(|(_, from)| *from < 5).collect();
        let moves = check(&wanted);
        let aside = moves.steps.iter().filter(|m| matches!(m, Move::Aside { .. })).count();
        rings.insert(aside);
        // No more steps than needed: one for each number, one more for each ring.
        assert_eq!(moves.steps.len(), wanted.len() + aside);
    }
    assert_eq!(rings, BTreeSet::from([0, 1, 2]));
}

#[test]
fn a_ring_of_a_thousand() {
    let wanted = (0..1000).map(|n| (n, (n + 1) % 1000)).collect();
    assert_eq!(check(&wanted).steps.len(), 1001);
}

#[test]
fn strings_are_where_the_pointers_say() {
    let mut builder = StringsBuilder::default();
    builder.push(&[b"A", b"=", b"1"]);
    builder.push_pid(b"PID=");
    builder.push(&[b""]);
    let strings = builder.finish();
    let place = strings.pid_place().expect("asked for");
    // SAFETY: eleven bytes of room.
    #[allow(unsafe_code)]
    unsafe {
        std::ptr::copy_nonoverlapping(c"4194304".as_ptr().cast(), place, 8);
    }
    // SAFETY: four pointers, the last of them NULL.
    #[allow(unsafe_code)]
    let pointers = unsafe { std::slice::from_raw_parts(strings.as_ptr(), 4) };
    let read = |p: &*const std::ffi::c_char| {
        // SAFETY: a C string if it is not NULL.
        #[allow(unsafe_code)]
        (!p.is_null()).then(|| unsafe { std::ffi::CStr::from_ptr(*p) }.to_owned())
    };
    let all: Vec<_> = pointers.iter().map(read).collect();
    assert_eq!(all, [Some(c"A=1".into()), Some(c"PID=4194304".into()), Some(c"".into()), None]);
}
