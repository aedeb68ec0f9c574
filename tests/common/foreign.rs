//! At-fork handlers of other libraries. POSIX: the earliest registered prepares last, and is the first in the parent
//! and the child.

/// Registers now: after every library that registers before `main`, so this one prepares before them.
pub fn foreign_handlers(prepare: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) {
    // SAFETY: the handlers are functions of this test binary, which is never unloaded.
    let failed = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    assert_eq!(failed, 0, "pthread_atfork");
}

/// `early_foreign_handlers!(prepare, parent, child);` at the top level of a test binary, with three
/// `extern "C" fn()`: registers them before any constructor of this executable or of a shared library runs. These
/// prepare last, and are the first in the parent and the child.
///
/// Seen with glibc 2.36, linked by rust-lld and by GNU ld: against a library crate that registers in plain
/// `.init_array`, functions in `.preinit_array` and in `.init_array.00001` of the test binary both ran first, in this
/// order, and the prepare handlers ran library, .00001, preinit. musl and static executables may have no
/// `.preinit_array`; `tests/harness.rs` asserts the order.
///
/// Once in a binary, for all its tests: let the handlers ask a switch of their own whether they are meant.
#[macro_export]
macro_rules! early_foreign_handlers {
    ($prepare:path, $parent:path, $child:path) => {
        #[used]
        // SAFETY: an entry of this section is a function that takes no more than (argc, argv, envp), which the C
        // calling convention lets it overlook. libc can be called by then; std is not, but for its types.
        #[unsafe(link_section = ".preinit_array")]
        static EARLY_FOREIGN_HANDLERS: extern "C" fn() = {
            extern "C" fn register() {
                $crate::common::foreign::foreign_handlers($prepare, $parent, $child);
            }
            register
        };
    };
}
