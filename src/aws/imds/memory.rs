//! What IMDS told the run before. A daemon that restarts while IMDS is silent would not know its own name, and its node
//! would have no new pods; all that it reads there is the same as a minute ago, or nearly so.
//!
//! These are older hints than those of IMDS and no more: EC2 is asked before anything is made of them. They serve from the
//! first failure until IMDS has answered a whole scan. Nothing secret is kept.

use super::{IDENTITY_DOCUMENT, MACS};
use crate::model::time::Mono;
use serde_json::{Map, Value};
use std::time::Duration;

/// After a failure IMDS is left alone for so long, since each attempt takes its time and a scan reads dozens of paths.
const QUIET: Duration = Duration::from_secs(5);

/// Paths that are remembered, besides those of the ENIs.
const IDENTITY: [&str; 6] =
    [IDENTITY_DOCUMENT, "placement/availability-zone", "local-ipv4", "instance-id", "instance-type", "mac"];

/// Answers by path; an absent path is null.
#[derive(Debug, Default)]
pub(super) struct Memory {
    before: Map<String, Value>,
    now: Map<String, Value>,
    failed: Option<Mono>,
    /// Something was answered from memory since the last scan began.
    recalled: bool,
    changed: bool,
}

impl Memory {
    /// With the answers of the run before.
    pub(super) fn of(before: Map<String, Value>) -> Memory {
        Memory { before, ..Memory::default() }
    }

    /// Whether a failure to read `path` can be made up for.
    pub(super) fn knows(&self, path: &str) -> bool {
        self.before.contains_key(path)
    }

    /// What is remembered of `path`, if IMDS has just failed to answer; null for a path that was not there.
    pub(super) fn while_silent(&mut self, path: &str, now: Mono) -> Option<Value> {
        self.failed.filter(|at| now.since(*at) < QUIET).and_then(|_| self.recall(path))
    }

    /// IMDS did not answer: what is remembered of `path`.
    pub(super) fn failed(&mut self, path: &str, now: Mono) -> Option<Value> {
        self.failed = Some(now);
        self.recall(path)
    }

    fn recall(&mut self, path: &str) -> Option<Value> {
        let told = self.before.get(path)?.clone();
        self.recalled = true;
        if path == MACS {
            // A new ENI is read by its MAC, and stands in a listing only with the next scan.
            let id =
                |path: &str| path.strip_suffix("/interface-id").map(|mac| mac.rsplit('/').next().map(str::to_owned));
            let there = self.before.iter().filter(|(_, told)| told.is_string());
            let macs = there.filter_map(|(path, _)| id(path).flatten()).collect::<Vec<_>>();
            return Some(Value::String(macs.join("\n")));
        }
        Some(told)
    }

    /// IMDS has answered.
    pub(super) fn heard(&mut self, path: &str, told: Option<&str>) {
        self.failed = None;
        if path != "ipv6" && !path.starts_with(MACS) && !IDENTITY.contains(&path) {
            return;
        }
        let told = told.map_or(Value::Null, |text| Value::String(text.to_owned()));
        if self.now.get(path) != Some(&told) {
            self.now.insert(path.to_owned(), told);
            self.changed = true;
        }
    }

    /// A scan begins.
    pub(super) fn scanning(&mut self) {
        self.recalled = false;
    }

    /// A scan has read all of these ENIs' paths.
    pub(super) fn scanned(&mut self, listing: &str) {
        if self.recalled {
            return;
        }
        self.before = Map::new();
        let below = |path: &str| path.strip_prefix(MACS).and_then(|rest| rest.strip_prefix('/')).map(str::to_owned);
        let listed = |rest: &str| listing.split_whitespace().any(|mac| rest.starts_with(mac.trim_end_matches('/')));
        self.now.retain(|path, _| below(path).is_none_or(|rest| listed(&rest)));
    }

    /// What the next run should know, if that has changed since the last call.
    pub(super) fn take_news(&mut self) -> Option<Map<String, Value>> {
        std::mem::take(&mut self.changed).then(|| self.now.clone())
    }
}
