//! What the two halves came to: their reports read, one table or one JSON object made of them.

use crate::args::Half;
use crate::lines::Truth;

#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) half: Half,
    pub(crate) forks: usize,
    refused: usize,
    hung: usize,
    crashed: usize,
    leaked: usize,
    wrong: usize,
    late: usize,
    pub(crate) bad_lines: usize,
    pub(crate) lines: usize,
    p50: u64,
    p99: u64,
    /// How many hung where.
    places: Vec<(usize, String)>,
    pub(crate) notes: Vec<String>,
    notes_left_out: usize,
    /// The report came to its end.
    pub(crate) whole: bool,
}

/// What a report can ask of its reader.
pub(crate) enum Asked {
    Nothing,
    Progress,
    Hold(String),
}

const NOTES: usize = 12;

impl Row {
    pub(crate) fn new(half: Half) -> Row {
        Row {
            half,
            forks: 0,
            refused: 0,
            hung: 0,
            crashed: 0,
            leaked: 0,
            wrong: 0,
            late: 0,
            bad_lines: 0,
            lines: 0,
            p50: 0,
            p99: 0,
            places: Vec::new(),
            notes: Vec::new(),
            notes_left_out: 0,
            whole: false,
        }
    }

    /// Takes in one line of the half's report.
    pub(crate) fn read(&mut self, line: &str, out: &mut Truth, log: &mut Truth) -> Asked {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let numbers: Vec<usize> = rest.split(' ').map_while(|n| n.parse().ok()).collect();
        match (word, &numbers[..]) {
            ("counts", &[forks, refused, hung, crashed, leaked, wrong, late]) => {
                (self.forks, self.refused, self.hung, self.late) = (forks, refused, hung, late);
                (self.crashed, self.leaked, self.wrong) = (crashed, leaked, wrong);
                return Asked::Progress;
            }
            ("said", &[o, l]) => {
                out.said.push(o);
                log.said.push(l);
            }
            ("forker", &[n]) => [out, log].into_iter().for_each(|t| t.forks.push(n)),
            ("excused", &[who, n]) => [out, log].into_iter().for_each(|t| t.excused.push((who, n))),
            ("place", &[count, ..]) => {
                self.places.push((count, rest.split_once(' ').map_or("", |(_, p)| p).to_owned()));
            }
            ("latency", &[p50, p99]) => (self.p50, self.p99) = (p50 as u64, p99 as u64),
            ("end", _) => self.whole = true,
            ("hold", _) => return Asked::Hold(rest.to_owned()),
            ("stuck", _) => self.note(format!("the process itself is stuck: {rest}")),
            ("note", _) => self.note(rest.to_owned()),
            _ => self.note(format!("strange report: {line}")),
        }
        Asked::Nothing
    }

    pub(crate) fn note(&mut self, text: String) {
        if self.notes.len() < NOTES { self.notes.push(text) } else { self.notes_left_out += 1 }
    }

    /// Nothing but zeros, and something was tried. Forks that were overtaken are the machine's doing, unless they are many.
    pub(crate) fn is_clean(&self) -> bool {
        let all = [self.refused, self.hung, self.crashed, self.leaked, self.wrong, self.bad_lines];
        self.whole && self.forks > 0 && all == [0; 6] && self.late * 10 <= self.forks.max(20)
    }

    pub(crate) fn progress(&self, seconds: f64) -> String {
        format!(
            "{:<8} {seconds:5.1} s  {} forks, {} hung, {} crashed, {} leaked, {} wrongly closed",
            self.half.name(),
            self.forks,
            self.hung,
            self.crashed,
            self.leaked,
            self.wrong
        )
    }

    fn json(&self) -> String {
        let Row { forks, refused, hung, crashed, leaked, wrong, late, bad_lines, lines, .. } = self;
        let us = |ns: u64| ns as f64 / 1000.0;
        format!(
            "\"{}\":{{\"forks\":{forks},\"refused\":{refused},\"hung\":{hung},\"crashed\":{crashed},\"leaked_fds\":{leaked},\
             \"wrong_fds\":{wrong},\"late\":{late},\"bad_lines\":{bad_lines},\"lines\":{lines},\"fork_p50_us\":{:.1},\"fork_p99_us\":{:.1},\
             \"finished\":{}}}",
            self.half.name(),
            us(self.p50),
            us(self.p99),
            self.whole
        )
    }

    fn cells(&self) -> [String; 10] {
        let name = match self.half {
            Half::Plain => "plain fork()",
            Half::Carefork => "carefork",
        };
        let Row { forks, refused, hung, crashed, leaked, wrong, bad_lines, .. } = self;
        let refused = if self.half == Half::Plain { "-".to_owned() } else { refused.to_string() };
        [
            name.to_owned(),
            forks.to_string(),
            refused,
            hung.to_string(),
            crashed.to_string(),
            leaked.to_string(),
            wrong.to_string(),
            bad_lines.to_string(),
            time(self.p50),
            time(self.p99),
        ]
    }
}

fn time(ns: u64) -> String {
    match ns {
        0..10_000_000 => format!("{} µs", ns / 1000),
        10_000_000..10_000_000_000 => format!("{} ms", ns / 1_000_000),
        _ => format!("{} s", ns / 1_000_000_000),
    }
}

pub(crate) fn json(rows: &[Row]) -> String {
    let halves: Vec<String> = rows.iter().map(Row::json).collect();
    format!("{{{}}}", halves.join(","))
}

const HEAD: [&str; 10] =
    ["", "forks", "refused", "hung", "crashed", "leaked fds", "wrongly closed", "bad lines", "fork p50", "p99"];

/// The table and a few sentences below it.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut lines = vec![HEAD.map(str::to_owned)];
    lines.extend(rows.iter().map(Row::cells));
    let widths: Vec<usize> =
        (0..HEAD.len()).map(|i| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for line in &lines {
        text += &format!("{:<w$}", line[0], w = widths[0]);
        for (cell, w) in line.iter().zip(&widths).skip(1) {
            text += &format!("  {cell:>w$}");
        }
        text.push('\n');
    }
    for row in rows {
        text += &row.sentences();
    }
    text + "(--help says what each column means)\n"
}

impl Row {
    fn sentences(&self) -> String {
        let name = self.half.name();
        let mut text = String::new();
        if self.hung > 0 {
            let percent = self.hung * 100 / self.forks.max(1);
            let mut places = self.places.clone();
            places.sort_by_key(|p| std::cmp::Reverse(p.0));
            let named: Vec<String> = places.iter().take(6).map(|(n, place)| format!("{n} in {place}")).collect();
            text += &format!("\n{name}: {percent} % of the children hung: {}\n", named.join("; "));
        }
        if self.late > 0 {
            text += &format!(
                "\n{name}: {} of the children of libc's fork were late: the machine kept the forking thread waiting until another\n\
                 opened the gate. They were told, and nothing is promised to them, so they looked at nothing.\n",
                self.late
            );
        }
        if self.half == Half::Carefork && !self.is_clean() {
            text += &format!("\n{name}: not clean{}:\n", if self.whole { "" } else { ", and the half did not finish" });
            for note in &self.notes {
                text += &format!("  {note}\n");
            }
            if self.notes_left_out > 0 {
                text += &format!("  ... and {} more\n", self.notes_left_out);
            }
        }
        text
    }
}
