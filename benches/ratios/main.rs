//! Every figure of the README's table: a ratio to a rival that runs in turn with it, in the same run; medians.
//!
//! `cargo bench` prints the table; `cargo bench -- fork` only the rows whose name contains `fork`. Forks are measured in two
//! processes of this same program that take turns, one with `CAREFORK=off`, because at-fork handlers cannot be taken out
//! again: there a fork is libc's fork and three handlers that return at once.

#![allow(unsafe_code, clippy::disallowed_methods, clippy::undocumented_unsafe_blocks)]
#![allow(clippy::multiple_unsafe_ops_per_block, clippy::type_complexity, let_underscore_drop)]

mod children;
mod exec;
mod forks;
mod logs;
mod measure;
mod messages;
mod plain;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    if args.first().map(String::as_str) == Some("serve") {
        forks::serve();
        return;
    }
    if args.first().map(String::as_str) == Some("serve-exec") {
        exec::serve();
        return;
    }
    if args.first().map(String::as_str) == Some("dispatch") {
        children::dispatch_once();
        return;
    }
    let wanted = |name: &str| args.is_empty() || args.iter().any(|a| name.contains(a.as_str()));
    println!("| what | ours | rival | ratio | to reach | |");
    println!("|---|---|---|---|---|---|");
    plain::rows(&wanted);
    messages::rows(&wanted);
    forks::rows(&wanted);
    logs::rows(&wanted);
    exec::rows(&wanted);
    children::rows(&wanted);
}
