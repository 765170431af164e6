//! `enibox status`: what the node's pool holds, what the daemon is doing, and why it is not doing more.
//!
//! The daemon is asked; when it does not answer, the checkpoint tells which pods have which addresses, and the exit code
//! says that something is wrong.

use super::{Asking, complain, environment, items, print, read, text};
use crate::error::{Context, Error, Result, exit};
use crate::model::checkpoint::Checkpoint;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;

/// A larger file is no checkpoint: 737 pods take 200 KiB.
const CHECKPOINT_BYTES_MAX: usize = 64 << 20;

/// Runs the subcommand; the exit code. A daemon that is away is a failure, whatever the checkpoint tells.
pub fn run(args: &Asking) -> u8 {
    let settings = environment();
    let error = match args.ask(&settings, "/v1/enibox/status") {
        Ok(document) if args.json => return print(&format!("{document:#}\n")),
        Ok(document) => return print(&page(&document)),
        Err(error) => error,
    };
    let hint = if settings.introspection_disabled { " (DISABLE_INTROSPECTION is set)" } else { "" };
    complain(&format!("{error}{hint}"));
    match checkpoint(&settings.backing_store) {
        Ok(found) if args.json => {
            print(&format!("{:#}\n", away(&error.to_string(), &settings.backing_store, &found)));
        }
        Ok(found) => {
            print(&away_page(&settings.backing_store, &found));
        }
        Err(error) => complain(&error.to_string()),
    }
    exit::FAILURE
}

fn checkpoint(path: &str) -> Result<Checkpoint> {
    let what = || format!("read checkpoint {path}");
    let content = read(Path::new(path), CHECKPOINT_BYTES_MAX).with_context(what)?;
    Checkpoint::parse(&content).map_err(Error::new).with_context(what)
}

fn away(error: &str, path: &str, found: &Checkpoint) -> Value {
    let pods = found.allocations.iter().map(|allocation| {
        json!({
            "namespace": allocation.metadata.namespace, "pod": allocation.metadata.name,
            "address": allocation.address(),
        })
    });
    json!({"daemon": Value::Null, "error": error, "checkpoint": path, "pods": pods.collect::<Vec<_>>()})
}

fn away_page(path: &str, found: &Checkpoint) -> String {
    let mut page = format!("the daemon does not answer; {path} names {} addresses in use\n", found.allocations.len());
    for allocation in &found.allocations {
        let address = allocation.address().map_or_else(|| "?".to_owned(), |address| address.to_string());
        line(&mut page, address, &format!("{}/{}", allocation.metadata.namespace, allocation.metadata.name));
    }
    page
}

// Writing to a string cannot fail.
fn line(page: &mut String, name: impl AsRef<str>, what: &str) {
    let _ = writeln!(page, "{:<10} {what}", name.as_ref());
}

fn page(document: &Value) -> String {
    let mut page = String::new();
    let instance = &document["instance"];
    let uptime = duration(document["uptime_s"].as_u64().unwrap_or(0));
    let mut head = format!("enibox {}, {} for {uptime}", text(document, "version"), text(document, "phase"));
    if let Some(node) = Some(text(document, "node")).filter(|node| !node.is_empty()) {
        let _ = write!(head, ", node {node}");
    }
    line(&mut page, "daemon", &head);
    if instance.is_object() {
        let what = ["id", "type", "zone", "mode"].map(|name| text(instance, name)).join(", ");
        line(&mut page, "instance", &what);
    }
    let pool = &document["pool"];
    let attached = items(pool, "enis").len();
    line(&mut page, "pool", &format!("{}; {attached} of {} ENIs", figures(pool), pool["eni_limit"]));
    for eni in items(pool, "enis") {
        let excluded = if eni["excluded"] == json!(true) { ", takes no new pods" } else { "" };
        let (id, subnet, kind) = (text(eni, "id"), text(eni, "subnet"), text(eni, "kind"));
        let (card, device) = (&eni["card"], &eni["device"]);
        let what = format!("{id} card {card} device {device} in {subnet}, {kind}{excluded}: {}", figures(eni));
        line(&mut page, "", &what);
    }
    doing(&mut page, &document["doing"], pool["free"] == json!(0));
    for error in items(document, "errors") {
        let (cause, last, told) = (text(error, "cause"), text(error, "last"), text(error, "text"));
        line(&mut page, "error", &format!("{cause}: {told} ({} times, last {last})", error["count"]));
    }
    for repair in items(document, "repairs") {
        let [at, what, done] = ["at", "what", "text"].map(|name| text(repair, name));
        line(&mut page, "repaired", &format!("{at} {what}: {done}"));
    }
    for setting in items(document, "settings") {
        let value = text(setting, "value");
        line(&mut page, "setting", &format!("{}={value} ({})", text(setting, "variable"), text(setting, "layer")));
    }
    notes(&mut page, document);
    page
}

/// What waits for the next start and what was not understood.
pub(super) fn notes(page: &mut String, document: &Value) {
    for pending in items(document, "pending") {
        line(page, "next start", pending.as_str().unwrap_or_default());
    }
    for wrong in items(document, "wrong") {
        line(page, "wrong", wrong.as_str().unwrap_or_default());
    }
}

fn figures(value: &Value) -> String {
    let prefixes = value["prefixes"].as_u64().filter(|count| *count > 0);
    let prefixes = prefixes.map_or_else(String::new, |count| format!(" in {count} prefixes"));
    let [total, used, cooling, free] = ["total", "used", "cooling", "free"].map(|name| &value[name]);
    format!("{total} addresses{prefixes}: {used} used, {cooling} cooling, {free} free")
}

fn doing(page: &mut String, doing: &Value, none_free: bool) {
    if !doing.is_object() {
        return;
    }
    let targets = &doing["targets"];
    let shown = ["warm_eni", "warm_ip", "minimum_ip", "warm_prefix"]
        .map(|name| format!("{} {}", name.replace('_', " "), targets[name]));
    line(page, "targets", &shown.join(", "));
    for (subnet, told) in doing["subnets"].as_object().into_iter().flatten() {
        let age = duration(told["age_s"].as_u64().unwrap_or(0));
        line(page, "subnet", &format!("{subnet} had {} free addresses {age} ago", told["free"]));
    }
    let mut parts = Vec::new();
    let mut count = |what: &str, count: u64| {
        if count > 0 {
            parts.push(format!("{what} {count}"));
        }
    };
    count("new pods that wait for an address:", doing["waiting"].as_u64().unwrap_or(0));
    count("growths in progress:", doing["growing"].as_u64().unwrap_or(0));
    count("ENIs on their way out:", items(doing, "freeing").len() as u64);
    if let Some(left) = doing["paused_s"].as_u64() {
        parts.push(format!("no growth for {} after a failed one: {}", duration(left), text(doing, "last_failure")));
    }
    for (action, left) in doing["throttled_s"].as_object().into_iter().flatten() {
        parts.push(format!("EC2 throttles {action}: next call in {}", duration(left.as_u64().unwrap_or(0))));
    }
    if doing["cordoned"] == json!(true) {
        parts.push("the node is cordoned: nothing grows".into());
    }
    for (subnet, left) in doing["exhausted_subnets_s"].as_object().into_iter().flatten() {
        let left = duration(left.as_u64().unwrap_or(0));
        parts.push(format!("{subnet} has no free addresses and is left alone for {left}"));
    }
    if none_free {
        let short = &doing["if_short"];
        parts.push(format!("new pods get no address ({}): {}", text(short, "cause"), text(short, "text")));
    }
    if parts.is_empty() {
        parts.push("nothing; the pool is as the targets want it".into());
    }
    for part in parts {
        line(page, "doing", &part);
    }
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_for_people() {
        let eni = json!({
            "id": "eni-1", "card": 0, "device": 0, "subnet": "subnet-1", "kind": "primary", "excluded": false,
            "total": 9, "used": 3, "cooling": 1, "free": 5, "prefixes": 0,
        });
        let document = json!({
            "version": "1.2.3", "node": "n1", "phase": "ready", "uptime_s": 200,
            "instance": {"id": "i-1", "type": "m5.large", "zone": "z", "mode": "IPv4 addresses"},
            "pool": {"total": 32, "used": 3, "cooling": 29, "free": 0, "prefixes": 2, "eni_limit": 3, "enis": [eni]},
            "doing": {
                "waiting": 2, "growing": 0, "freeing": [], "paused_s": 7, "exhausted_subnets_s": {"subnet-1": 119},
                "cordoned": true, "subnets": {"subnet-2": {"free": 7, "age_s": 5}}, "last_failure": "create: no", "throttled_s": {"CreateNetworkInterface": 3},
                "if_short": {"cause": "throttled", "text": "EC2 throttles"},
                "targets": {"warm_eni": 1, "warm_ip": 0, "minimum_ip": 0, "warm_prefix": 0},
            },
            "errors": [{"cause": "refused: eni_limit", "count": 4, "last": "2026-11-21T01:30:00Z", "text": "full"}],
            "repairs": [{"at": "2026-11-21T01:30:00Z", "what": "mark-rule", "text": "add rule 1024"}],
            "settings": [{"variable": "WARM_IP_TARGET", "value": "5", "layer": "label"}],
            "pending": ["MAX_ENI=2"], "wrong": ["setting X: bad"],
        });
        let expected = "\
daemon     enibox 1.2.3, ready for 3 min, node n1
instance   i-1, m5.large, z, IPv4 addresses
pool       32 addresses in 2 prefixes: 3 used, 29 cooling, 0 free; 1 of 3 ENIs
           eni-1 card 0 device 0 in subnet-1, primary: 9 addresses: 3 used, 1 cooling, 5 free
targets    warm eni 1, warm ip 0, minimum ip 0, warm prefix 0
subnet     subnet-2 had 7 free addresses 5 s ago
doing      new pods that wait for an address: 2
doing      no growth for 7 s after a failed one: create: no
doing      EC2 throttles CreateNetworkInterface: next call in 3 s
doing      the node is cordoned: nothing grows
doing      subnet-1 has no free addresses and is left alone for 119 s
doing      new pods get no address (throttled): EC2 throttles
error      refused: eni_limit: full (4 times, last 2026-11-21T01:30:00Z)
repaired   2026-11-21T01:30:00Z mark-rule: add rule 1024
setting    WARM_IP_TARGET=5 (label)
next start MAX_ENI=2
wrong      setting X: bad
";
        assert_eq!(page(&document), expected);
    }

    #[test]
    fn a_daemon_that_says_little_is_shown_too() {
        let document = json!({"version": "1", "phase": "starting", "uptime_s": 1, "pool": {}, "doing": null});
        assert!(page(&document).starts_with("daemon     enibox 1, starting for 1 s\npool       null addresses"));
    }
}
