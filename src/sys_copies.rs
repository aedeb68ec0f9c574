//! Whether another copy of this library came into the process before this one (K7): each leaves an ELF note in the object that it is
//! linked into, and the dynamic linker lists the objects, the program first and then in the order in which they came.
//!
//! Nothing is mapped or written for it, which every fork would copy, and a child that loads a plugin finds out as its parent would.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

/// An ELF note: the lengths of name and description, a type of the owner's choice, the name padded to four bytes.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq)]
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
    if object.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: an array of that many program headers, live as the description is.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
    for header in headers {
        if header.p_type == libc::PT_NOTE
            && headers.iter().any(|other| is_loaded_by(header, other))
            // SAFETY: just seen to be loaded.
            && let Some(note) = unsafe { find(object, header) }
        {
            // SAFETY: what `is_first_copy` passed.
            unsafe { *first.cast::<*const Note>() = note };
            return 1;
        }
    }
    0
}

/// Tools that rewrite objects have left headers of notes that are nowhere in memory.
fn is_loaded_by(notes: &libc::Elf64_Phdr, load: &libc::Elf64_Phdr) -> bool {
    let room = notes.p_vaddr.checked_sub(load.p_vaddr).and_then(|before| load.p_memsz.checked_sub(before));
    load.p_type == libc::PT_LOAD && load.p_flags & libc::PF_R != 0 && room.is_some_and(|room| notes.p_memsz <= room)
}

/// The first note of ours in a segment of notes.
///
/// # Safety
/// The segment is loaded, to its end.
unsafe fn find(object: &libc::dl_phdr_info, notes: &libc::Elf64_Phdr) -> Option<*const Note> {
    // The difference between where an object was linked and where it lies, which may be less: the sum wraps.
    let start = object.dlpi_addr.wrapping_add(notes.p_vaddr) as *const u8;
    // There are no others; what else stands there has no meaning, to libc either.
    let align = if notes.p_align == 8 { 8 } else { 4 };
    let mut at = 0;
    while at + size_of::<Note>() as u64 <= notes.p_memsz {
        // SAFETY: inside the segment (the caller's promise).
        let note = unsafe { start.add(at as usize) }.cast::<Note>();
        // SAFETY: as above; any bytes are a `Note`. Not by reference: nothing makes others align theirs.
        let seen = unsafe { note.read_unaligned() };
        if seen == NOTE {
            return Some(note);
        }
        let name_end = at + 12 + u64::from(seen.name_len);
        at = name_end.next_multiple_of(align) + u64::from(seen.desc_len).next_multiple_of(align);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found where an object has these bytes as its notes, `linked_at` that address; its place among the bytes.
    fn found(bytes: &[u8], align: u64, linked_at: u64, loaded: u64) -> Option<usize> {
        let header = |p_type, p_memsz, p_align| libc::Elf64_Phdr {
            p_type,
            p_flags: libc::PF_R,
            p_offset: 0,
            p_vaddr: linked_at,
            p_paddr: 0,
            p_filesz: p_memsz,
            p_memsz,
            p_align,
        };
        let headers = [header(libc::PT_NOTE, bytes.len() as u64, align), header(libc::PT_LOAD, loaded, 4096)];
        // SAFETY: integers and pointers, for which null is a value.
        let mut object: libc::dl_phdr_info = unsafe { std::mem::zeroed() };
        object.dlpi_addr = (bytes.as_ptr() as u64).wrapping_sub(linked_at);
        object.dlpi_phdr = headers.as_ptr();
        object.dlpi_phnum = 2;
        let mut first = std::ptr::null::<Note>();
        // SAFETY: a live description, and the place that it asks for.
        let end = unsafe { visit(&raw mut object, size_of_val(&object), (&raw mut first).cast()) };
        assert_eq!(end != 0, !first.is_null());
        (end != 0).then(|| first as usize - bytes.as_ptr() as usize)
    }

    fn note(name: &[u8], desc: &[u8], align: usize) -> Vec<u8> {
        let mut note: Vec<u8> =
            [name.len() as u32, desc.len() as u32, 1].iter().flat_map(|n| n.to_ne_bytes()).collect();
        for part in [name, desc] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(align), 0);
        }
        note
    }

    fn ours() -> Vec<u8> {
        note(b"carefork\0", b"", 4)
    }

    #[test]
    fn ours_is_found_behind_others() {
        for align in [4, 8] {
            let bytes = [note(b"GNU\0", b"12345", align), note(b"Go\0\0", b"", align), ours()].concat();
            let place = Some(bytes.len() - 24);
            assert_eq!(found(&bytes, align as u64, 0, 4096), place);
            assert_eq!(found(&bytes[..bytes.len() - 1], align as u64, 0, 4096), None);
        }
        assert_eq!(found(&note(b"carefork\0", b"x", 4), 4, 0, 4096), None);
    }

    /// What a linker makes of notes that somebody wrote as bytes, and of other oddities.
    #[test]
    fn strange_notes_do_no_harm() {
        let bytes = [&[0; 8][..], &note(b"GNU\0", b"12345", 4), &ours()].concat();
        for before in 0..4 {
            for align in [0, 1, 3, 64, 1 << 63, u64::MAX] {
                let mut shifted = vec![0; before];
                shifted.extend(&bytes[8..]);
                assert_eq!(found(&shifted[before..], align, 0, 4096), Some(bytes.len() - 8 - 24));
            }
        }
        let endless = note(b"", b"", 4).iter().map(|_| 0xff).collect::<Vec<u8>>();
        assert_eq!(found(&[endless, ours()].concat(), 4, 0, 4096), None);
    }

    #[test]
    fn an_object_may_lie_below_where_it_was_linked() {
        assert_eq!(found(&ours(), 4, 0xffff_ffff_ff70_0120, 4096), Some(0));
    }

    #[test]
    fn what_is_not_loaded_is_not_looked_at() {
        assert_eq!(found(&ours(), 4, 0x120, 23), None);
        assert_eq!(found(&ours(), 4, 0x120, 24), Some(0));
    }

    #[test]
    fn this_program_has_one() {
        assert!(is_first_copy());
        let mut first = std::ptr::null::<Note>();
        // SAFETY: as in `is_first_copy`.
        unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut first).cast()) };
        assert!(std::ptr::eq(first, &raw const OURS));
    }
}
