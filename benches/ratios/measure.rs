//! Taking turns, medians, one row of the table.

use std::time::Instant;

/// CPU time of the calling thread in ns.
pub(crate) fn cpu() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

pub(crate) fn median(v: Vec<f64>) -> f64 {
    quantile(v, 0.5)
}

pub(crate) fn quantile(mut v: Vec<f64>, q: f64) -> f64 {
    v.sort_by(f64::total_cmp);
    v[(v.len() as f64 * q) as usize]
}

/// `a` and `b` in turn, `rounds` times; the median of each, and of the ratios of the pairs.
pub(crate) fn turns(rounds: usize, a: impl FnMut() -> f64, b: impl FnMut() -> f64) -> (f64, f64, f64) {
    let mut all = Turns::default();
    all.take(rounds, a, b);
    all.medians()
}

/// What was measured in turn, of one pair or of several.
#[derive(Default)]
pub(crate) struct Turns {
    ours: Vec<f64>,
    rival: Vec<f64>,
    ratios: Vec<f64>,
}

impl Turns {
    /// `a` and `b` in turn, `rounds` times, after one that does not count.
    pub(crate) fn take(&mut self, rounds: usize, mut a: impl FnMut() -> f64, mut b: impl FnMut() -> f64) {
        a();
        b();
        for i in 0..rounds {
            let (x, y) = if i % 2 == 0 {
                let x = a();
                (x, b())
            } else {
                let y = b();
                (a(), y)
            };
            self.ours.push(x);
            self.rival.push(y);
            self.ratios.push(x / y);
        }
    }

    pub(crate) fn medians(self) -> (f64, f64, f64) {
        (median(self.ours), median(self.rival), median(self.ratios))
    }
}

pub(crate) fn row(what: &str, (ours, rival, ratio): (f64, f64, f64), unit: &str, limit: f64) {
    let verdict = if ratio <= limit { "reached" } else { "**missed**" };
    println!("| {what} | {ours:.1} {unit} | {rival:.1} {unit} | {ratio:.3} | ≤ {limit} | {verdict} |");
}

/// A row of the quantile `q` of everything that several pairs measured, with the least and the largest ratio of one pair.
pub(crate) fn row_of_pairs(what: &str, pairs: &[(Vec<f64>, Vec<f64>)], q: f64, unit: &str, limit: f64) {
    let of = |all: Vec<f64>| quantile(all, q);
    let ours = of(pairs.iter().flat_map(|(a, _)| a.iter().copied()).collect());
    let rival = of(pairs.iter().flat_map(|(_, b)| b.iter().copied()).collect());
    let ratios = || pairs.iter().map(|(a, b)| of(a.clone()) / of(b.clone()));
    let (least, most) = (ratios().fold(f64::MAX, f64::min), ratios().fold(0.0, f64::max));
    let ratio = ours / rival;
    let verdict = if ratio <= limit { "reached" } else { "**missed**" };
    println!(
        "| {what} | {ours:.1} {unit} | {rival:.1} {unit} | {ratio:.3} ({least:.2} to {most:.2}) | ≤ {limit} | {verdict} |"
    );
}

/// CPU ns for each of `n` calls of `f` on each of `threads` threads, summed over the threads and divided by the calls.
pub(crate) fn on_threads<F: Fn(usize, u32) + Sync>(threads: usize, n: u32, f: F) -> f64 {
    let start = std::sync::Barrier::new(threads);
    let total: u64 = std::thread::scope(|s| {
        let handles: Vec<_> = (0..threads)
            .map(|i| {
                let (start, f) = (&start, &f);
                s.spawn(move || {
                    f(i, n / 20);
                    start.wait();
                    let t = cpu();
                    f(i, n);
                    cpu() - t
                })
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap()).sum()
    });
    total as f64 / f64::from(n) / threads as f64
}

/// Wall ns for each of the calls, all threads together.
pub(crate) fn wall_on_threads<F: Fn(usize, u32) + Sync>(threads: usize, n: u32, f: F) -> f64 {
    let t = Instant::now();
    std::thread::scope(|s| {
        for i in 0..threads {
            let f = &f;
            s.spawn(move || f(i, n));
        }
    });
    t.elapsed().as_nanos() as f64 / f64::from(n) / threads as f64
}
