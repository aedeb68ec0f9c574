//! The environment that a program is given.

use crate::command_error::CommandError;
use crate::exec_plan::{Strings, StringsBuilder};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// What tells this process of descriptors that it was given itself: not its programs' business, who would take some other
/// descriptor for theirs.
pub(crate) const OWN: [&str; 4] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"];

/// Changes to this process's environment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Env {
    clear: bool,
    changes: BTreeMap<OsString, Option<OsString>>,
}

impl Env {
    pub(crate) fn set(&mut self, key: &OsStr, value: &OsStr) {
        self.changes.insert(key.to_owned(), Some(value.to_owned()));
    }

    pub(crate) fn remove(&mut self, key: &OsStr) {
        self.changes.insert(key.to_owned(), None);
    }

    pub(crate) fn clear(&mut self) {
        self.clear = true;
        self.changes.clear();
    }

    /// The variables, sorted as in std where there are changes, in their own order where there are none.
    fn variables(&self) -> Vec<(OsString, OsString)> {
        let own = |key: &OsStr| OWN.iter().any(|own| key == *own);
        let inherited = std::env::vars_os().filter(|(key, _)| !self.clear && !own(key));
        if self.changes.is_empty() {
            return inherited.collect();
        }
        let mut all: BTreeMap<_, _> = inherited.collect();
        for (key, value) in &self.changes {
            match value {
                Some(value) => all.insert(key.clone(), value.clone()),
                None => all.remove(key),
            };
        }
        all.into_iter().collect()
    }

    /// The strings for exec, and PATH as the program will have it. `listen` names the descriptors from 3 on.
    ///
    /// Reads the environment under std's lock: before the gate is shut.
    pub(crate) fn build(&self, listen: &[String]) -> Result<(Strings, Option<OsString>), CommandError> {
        let mut strings = StringsBuilder::default();
        let mut path = None;
        for (key, value) in self.variables() {
            if !listen.is_empty() && OWN.iter().any(|own| key == *own) {
                continue;
            }
            for text in [&key, &value] {
                if text.as_bytes().contains(&0) {
                    let what = format!("environment variable {key:?} has a NUL byte");
                    return Err(CommandError::Invalid(what.into()));
                }
            }
            strings.push(&[key.as_bytes(), b"=", value.as_bytes()]);
            if key == "PATH" {
                // The first, as getenv has it.
                path.get_or_insert(value);
            }
        }
        if !listen.is_empty() {
            strings.push(&[b"LISTEN_FDS=", listen.len().to_string().as_bytes()]);
            strings.push(&[b"LISTEN_FDNAMES=", listen.join(":").as_bytes()]);
            strings.push_pid(b"LISTEN_PID=");
        }
        Ok((strings.finish(), path))
    }
}
