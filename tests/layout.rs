//! A file imports only from files above it, in the order of lib.rs: the sources can be read from top to bottom.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules that the file declares, in order.
fn modules(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let names = text
        .lines()
        .filter_map(|l| l.trim_start_matches("pub(crate) ").trim_start_matches("pub ").strip_prefix("mod "));
    names.filter_map(|l| l.strip_suffix(';')).filter(|n| !n.ends_with("tests")).map(String::from).collect()
}

/// The files of the module `name` of `dir`.
fn files(dir: &Path, name: &str) -> Vec<PathBuf> {
    let file = dir.join(format!("{name}.rs"));
    if file.exists() {
        return vec![file];
    }
    let dir = dir.join(name);
    let inner = modules(&dir.join("mod.rs"));
    inner.iter().flat_map(|n| files(&dir, n)).chain([dir.join("mod.rs")]).collect()
}

/// Every name that follows `crate::`, or stands first in an entry of `crate::{...}`.
fn imports(text: &str) -> Vec<String> {
    let code: Vec<&str> = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
    let code = code.join("\n");
    let first = |s: &str| s.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("").to_owned();
    let list = |rest: &str| match rest.strip_prefix('{') {
        Some(list) => list.split('}').next().unwrap().split(',').map(first).collect(),
        None => vec![first(rest)],
    };
    code.split("crate::").skip(1).flat_map(list).collect()
}

#[test]
fn a_file_imports_only_from_files_above_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let order = modules(&src.join("lib.rs"));
    assert!(order.len() > 20, "{order:?}");
    let place = |name: &str| order.iter().position(|n| n == name);
    let mut upward = Vec::new();
    let mut seen = 0;
    for (here, name) in order.iter().enumerate() {
        for file in files(&src, name) {
            let found = imports(&fs::read_to_string(&file).unwrap());
            seen += found.len();
            let below = found.iter().filter(|n| place(n).is_some_and(|p| p > here));
            upward.extend(below.map(|n| format!("{}: {n}", file.display())));
        }
    }
    assert!(seen > 60, "only {seen} imports found");
    assert!(upward.is_empty(), "imports from below: {upward:#?}");
}
