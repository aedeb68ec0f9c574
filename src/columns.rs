//! Text for a terminal: in columns, and without what would move its cursor.

use std::time::Duration;

/// No line of a table is longer.
pub(crate) const COLUMNS: usize = 100;

/// Without what would move a terminal's cursor, turn its line round, or not be seen.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let steers =
            matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}');
        if c.is_control() || steers {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// How many columns a character takes at most. What may be wide counts as wide: a line then is rather too short than too long.
fn width(c: char) -> usize {
    if c < '\u{1100}' { 1 } else { 2 }
}

/// How many columns a text takes at most.
pub(crate) fn width_of(text: &str) -> usize {
    text.chars().map(width).sum()
}

/// At most `columns` wide, by leaving out the middle: both ends of a path say something.
pub(crate) fn shorten(text: &str, columns: usize) -> String {
    if width_of(text) <= columns {
        return text.to_owned();
    }
    let room = columns.saturating_sub(3);
    let take = |room: usize, chars: &mut dyn Iterator<Item = char>| {
        let mut left = room;
        chars.take_while(|&c| left.checked_sub(width(c)).inspect(|&l| left = l).is_some()).collect::<Vec<char>>()
    };
    let head = take(room / 2, &mut text.chars());
    let tail = take(room - room / 2, &mut text.chars().rev());
    head.iter().chain(&['.'; 3]).chain(tail.iter().rev()).collect()
}

/// A duration as ss(8) would say it, in at most eight characters: three digits and a unit.
pub(crate) fn span(d: Duration) -> String {
    let ns = d.as_nanos();
    let (whole, unit) = match ns {
        0 => return "0".to_owned(),
        1..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (1e3, "us"),
        1_000_000..1_000_000_000 => (1e6, "ms"),
        _ => (1e9, "s"),
    };
    let value = ns as f64 / whole;
    // By what will be shown: 9.996 is 10.0.
    let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_three_digits() {
        let shown = |ns| span(Duration::from_nanos(ns));
        let all =
            [0, 7, 999, 1_000, 9_994, 9_996, 99_940, 99_960, 999_400, 3_400_000, 12_345_678_900, 90_000_000_000_000];
        let golden = [
            "0", "7 ns", "999 ns", "1.00 us", "9.99 us", "10.0 us", "99.9 us", "100 us", "999 us", "3.40 ms", "12.3 s",
            "90000 s",
        ];
        assert_eq!(all.map(shown), golden);
    }

    #[test]
    fn the_middle_is_left_out() {
        assert_eq!(shorten("/short", 6), "/short");
        assert_eq!(shorten("/a/rather/long/path/to.txt", 15), "/a/rat...to.txt");
        // What may be wide counts twice.
        assert_eq!(shorten("日本語日本語", 12), "日本語日本語");
        assert_eq!(shorten("日本語日本語", 11), "日本...本語");
    }

    #[test]
    fn nothing_moves_the_cursor_or_turns_the_line() {
        assert_eq!(printable("a\x1b[2J\u{202e}é"), "a\\u{1b}[2J\\u{202e}é");
        for c in "\u{61c}\u{200e}\u{2028}\u{2066}\u{2067}\u{2068}\u{2069}".chars() {
            assert_eq!(printable(&c.to_string()), format!("\\u{{{:x}}}", u32::from(c)));
        }
    }
}
