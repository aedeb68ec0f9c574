//! A record as one line: head, message, newline; formatted in a buffer of the thread's own.

use crate::sys;
use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use jiff::tz::TimeZone;
use std::cell::Cell;
use std::fmt::{self, Write as _};

/// What a logger's lines have in common.
#[derive(Debug)]
pub(super) struct Style {
    /// Read once, when the logger was built: jiff reads the zone's file itself, so no child meets libc's lock.
    zone: TimeZone,
}

thread_local! {
    /// The thread's buffer; empty while a record is being formatted, so that a `Display` that logs finds another.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A buffer that grew past this is not kept.
const KEEP: usize = 64 * 1024;

/// Runs `f` with an empty buffer.
pub(super) fn with_buffer(f: impl FnOnce(&mut Vec<u8>)) {
    // A thread at its end has none to keep.
    let mut buffer = BUFFER.try_with(Cell::take).unwrap_or_default();
    buffer.clear();
    f(&mut buffer);
    if buffer.capacity() <= KEEP {
        let _ = BUFFER.try_with(|kept| kept.set(buffer));
    }
}

const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(6));

impl Style {
    pub(super) fn local() -> Style {
        Style { zone: TimeZone::system() }
    }

    pub(super) fn utc() -> Style {
        Style { zone: TimeZone::UTC }
    }

    /// Appends a record's line; where its head ends. In a child `mark` is set.
    pub(super) fn line(&self, line: &mut Vec<u8>, mark: bool, record: &::log::Record<'_>) -> usize {
        self.stamp(line);
        push(line, format_args!(" {:<5} [", record.level()));
        if mark {
            push(line, format_args!("pid {} ", sys::getpid()));
        }
        thread(line);
        line.extend_from_slice(b"] ");
        push(line, format_args!("{}", record.target()));
        line.extend_from_slice(b": ");
        let head = line.len();
        let message = match record.args().as_str() {
            Some(text) => Escaped(line).write_str(text),
            None => Escaped(line).write_fmt(*record.args()),
        };
        if message.is_err() {
            line.extend_from_slice(b"(the message could not be formatted)");
        }
        line.push(b'\n');
        head
    }

    /// The line that tells what became of `n` records, in the log's own name.
    pub(super) fn loss(&self, line: &mut Vec<u8>, mark: bool, n: u64, why: &dyn fmt::Display) {
        let many = if n == 1 { "record" } else { "records" };
        self.line(
            line,
            mark,
            &::log::Record::builder()
                .level(::log::Level::Warn)
                .target("carefork::log")
                .args(format_args!("{n} {many} lost: {why}"))
                .build(),
        );
    }

    fn stamp(&self, line: &mut Vec<u8>) {
        let now = Timestamp::now();
        let offset = self.zone.to_offset(now);
        // Writing to a Vec cannot fail.
        drop(PRINTER.print_timestamp_with_offset(&now, offset, line));
    }
}

/// For what cannot fail.
fn push(line: &mut Vec<u8>, text: fmt::Arguments<'_>) {
    let _ = Escaped(line).write_fmt(text);
}

/// The mark of a child before a line that somebody else formatted.
#[cfg(feature = "tracing")]
pub(super) fn mark(line: &mut Vec<u8>) {
    push(line, format_args!("[pid {}] ", sys::getpid()));
}

fn thread(line: &mut Vec<u8>) {
    let thread = std::thread::current();
    match thread.name() {
        Some(name) => push(line, format_args!("{name}")),
        None => push(line, format_args!("{:?}", thread.id())),
    }
}

/// Text without control characters: what is written through it cannot end the line, nor talk to a terminal.
struct Escaped<'a>(&'a mut Vec<u8>);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // The lead byte of U+0080 to U+00BF, among which are control characters too.
        if text.bytes().all(|b| b >= b' ' && b != 0x7f && b != 0xc2) {
            self.0.extend_from_slice(text.as_bytes());
            return Ok(());
        }
        for c in text.chars() {
            if c.is_control() && c != '\t' {
                self.0.extend(c.escape_default().map(|c| c as u8));
            } else {
                self.0.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(text: &str) -> String {
        let mut line = Vec::new();
        Escaped(&mut line).write_str(text).unwrap();
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn no_message_ends_its_line_or_talks_to_the_terminal() {
        assert_eq!(escaped("as it\tis: ä€ \\n"), "as it\tis: ä€ \\n");
        assert_eq!(escaped("a\nb\r\n"), "a\\nb\\r\\n");
        assert_eq!(escaped("\u{1b}[31mred\u{7f}\u{9b}\0"), "\\u{1b}[31mred\\u{7f}\\u{9b}\\u{0}");
    }

    #[test]
    fn a_display_that_logs_finds_a_buffer_of_its_own() {
        with_buffer(|outer| {
            outer.extend_from_slice(b"outer");
            with_buffer(|inner| {
                assert!(inner.is_empty());
                inner.push(b'x');
            });
            assert_eq!(outer, b"outer");
        });
        with_buffer(|again| assert!(again.is_empty()));
    }
}
