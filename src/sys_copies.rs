//! Whether another copy of this library came into the process before this one (K7): each leaves an ELF note in the object that it is
//! linked into, and the dynamic linker lists the objects, the program first and then in the order in which they came.
//!
//! Nothing is mapped or written for it, which every fork would copy, and a child that loads a plugin finds out as its parent would.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

/// An ELF note: the lengths of name and description, a type of the owner's choice, the name padded to four bytes.
#[repr(C, align(4))]
#[derive(PartialEq)]
struct Note {
    name_len: u32,
    desc_len: u32,
    kind: u32,
    name: [u8; 12],
}

const NOTE: Note = Note { name_len: 9, desc_len: 0, kind: 1, name: *b"carefork\0\0\0\0" };

#[used]
#[unsafe(link_section = ".note.carefork")]
static OURS: Note = NOTE;

/// False if an object that was loaded earlier has a note like ours.
pub(crate) fn is_first_copy() -> bool {
    let mut first: *const Note = &raw const OURS;
    // SAFETY: `visit` has the signature asked for, and gets `first`, which outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut first).cast()) };
    std::ptr::eq(first, &raw const OURS)
}

/// Ends the walk at the first object with a note of ours, and leaves its address.
unsafe extern "C" fn visit(object: *mut libc::dl_phdr_info, _: usize, first: *mut c_void) -> c_int {
    // SAFETY: dl_iterate_phdr's promise: a live description.
    let object = unsafe { &*object };
    for i in 0..usize::from(object.dlpi_phnum) {
        // SAFETY: an array of that many program headers.
        let header = unsafe { object.dlpi_phdr.add(i) };
        // SAFETY: as above, live.
        let header = unsafe { &*header };
        if header.p_type != libc::PT_NOTE {
            continue;
        }
        let (mut at, end) = (object.dlpi_addr + header.p_vaddr, object.dlpi_addr + header.p_vaddr + header.p_memsz);
        let align = header.p_align.max(4);
        while at + size_of::<Note>() as u64 <= end {
            let note = at as *const Note;
            // SAFETY: inside a loaded segment of notes, which are aligned to four bytes at least; any bytes are a `Note`.
            let seen = unsafe { &*note };
            if *seen == NOTE {
                // SAFETY: what `is_first_copy` passed.
                unsafe { *first.cast::<*const Note>() = note };
                return 1;
            }
            let padded = |n: u32| u64::from(n).next_multiple_of(align);
            at = (at + 12 + u64::from(seen.name_len)).next_multiple_of(align) + padded(seen.desc_len);
        }
    }
    0
}
