//! A record as one line: head, message, newline; formatted in a buffer of the thread's own.

use crate::sys;
use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use jiff::tz::TimeZone;
use std::cell::Cell;
use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread::Thread;

/// What a logger's lines have in common.
#[derive(Debug)]
pub(super) struct Style {
    /// Read once, when the logger was built: jiff reads the zone's file itself, so no child meets libc's lock.
    zone: TimeZone,
    /// Tells the loggers of one process apart.
    pub(super) id: u32,
}

/// A second as text, `2026-11-21T07:03:12+01:00`; the fraction goes between.
#[derive(Clone, Copy)]
struct Second {
    style: u32,
    second: i64,
    text: [u8; LENGTH],
}

const LENGTH: usize = "2026-11-21T07:03:12+01:00".len();
const TO_FRACTION: usize = "2026-11-21T07:03:12".len();

thread_local! {
    /// The last second that this thread has seen: going from a time stamp to a date costs as much as the rest of a line.
    static SECOND: Cell<Second> = const { Cell::new(Second { style: 0, second: 0, text: [0; LENGTH] }) };
    /// The thread's buffer; empty while a record is being formatted, so that a `Display` that logs finds another.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    /// std does not know the thread any more. No destructor.
    static PAST: Cell<bool> = const { Cell::new(false) };
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

const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(0));

impl Style {
    pub(super) fn local() -> Style {
        Style::of(TimeZone::system())
    }

    pub(super) fn utc() -> Style {
        Style::of(TimeZone::UTC)
    }

    fn of(zone: TimeZone) -> Style {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        Style { zone, id: NEXT.fetch_add(1, Relaxed) }
    }

    /// Appends a record's line; where its head ends. In a child `mark` is set.
    pub(super) fn line(&self, line: &mut Vec<u8>, mark: bool, record: &::log::Record<'_>) -> usize {
        self.stamp(line, Timestamp::now());
        line.extend_from_slice(match record.level() {
            ::log::Level::Error => b" ERROR [",
            ::log::Level::Warn => b" WARN  [",
            ::log::Level::Info => b" INFO  [",
            ::log::Level::Debug => b" DEBUG [",
            ::log::Level::Trace => b" TRACE [",
        });
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

    fn stamp(&self, line: &mut Vec<u8>, now: Timestamp) {
        let (second, micro) = (now.as_second(), now.subsec_microsecond().unsigned_abs());
        let mut known = SECOND.get();
        if known.second != second || known.style != self.id {
            let mut text = Vec::with_capacity(2 * LENGTH);
            // Writing to a Vec cannot fail.
            drop(PRINTER.print_timestamp_with_offset(&now, self.zone.to_offset(now), &mut text));
            let Ok(text) = text.as_slice().try_into() else {
                // Not a year of four digits.
                line.extend_from_slice(&text);
                return;
            };
            known = Second { style: self.id, second, text };
            SECOND.set(known);
        }
        let (date, zone) = known.text.split_at(TO_FRACTION);
        line.extend_from_slice(date);
        let digit = |of: u32| b'0' + (micro / of % 10) as u8;
        line.extend_from_slice(&[b'.', digit(100_000), digit(10_000), digit(1000), digit(100), digit(10), digit(1)]);
        line.extend_from_slice(zone);
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
    let thread = current();
    match thread.as_ref().map(|thread| (thread.name(), thread.id())) {
        Some((Some(name), _)) => push(line, format_args!("{name}")),
        Some((None, id)) => push(line, format_args!("{id:?}")),
        None => push(line, format_args!("tid {}", sys::gettid())),
    }
}

/// std does not know the thread any more, as the head of its record had to find out.
pub(super) fn is_past() -> bool {
    PAST.get()
}

/// Not in the destructor of a key of pthread's, where std panics when it is asked. Nothing else tells (thread-locals are gone in the handlers of
/// exit(3), too), so it says that on standard error, once: the mark stays. It is there meanwhile because a panic hook may log.
fn current() -> Option<Thread> {
    if PAST.replace(true) {
        return None;
    }
    let thread = std::panic::catch_unwind(std::thread::current).ok();
    PAST.set(thread.is_none());
    thread
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
    fn a_time_stamp_is_what_jiff_makes_of_it() {
        let styles = [
            Style::of(TimeZone::get("Asia/Kathmandu").unwrap()),
            Style::of(TimeZone::get("America/New_York").unwrap()),
        ];
        // The end of summer time in New York lies between the last two.
        let times = [
            "2026-11-21T07:03:12.000009Z",
            "2026-11-21T07:03:12.999999Z",
            "2026-11-21T07:03:13Z",
            "2026-11-01T05:59:59.5Z",
            "2026-11-01T06:00:00Z",
        ];
        for time in times.map(|t| t.parse::<Timestamp>().unwrap()) {
            for style in &styles {
                let mut line = Vec::new();
                style.stamp(&mut line, time);
                let printer = DateTimePrinter::new().precision(Some(6));
                let expected = printer.timestamp_with_offset_to_string(&time, style.zone.to_offset(time));
                assert_eq!(String::from_utf8(line).unwrap(), expected);
            }
        }
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
