//! What the daemon says of itself, as findings: what waits, what holds the pool back and until when, what EC2 refuses
//! (`spec/operations.md` 8.1).

use super::super::{items, text};
use crate::model::settings::Settings;
use crate::model::time::Wall;
use crate::plan::doctor::Finding;
use serde_json::Value;
use std::time::Duration;

/// What went wrong longer ago is history.
const RECENT: Duration = Duration::from_hours(1);
/// A thing that is put back so often within [`RECENT`] is taken away by somebody.
const REPAIRS_MIN: usize = 3;
/// The API server is given so long, in seconds, to tell a new daemon of its node.
const NODE_SEEN_S: u64 = 60;

/// Findings from its status. `now` is the wall clock.
pub(super) fn troubles(status: &Value, settings: &Settings, now: Wall) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut note = |name, text: String| findings.push(Finding::new(name, "", text));
    pool(status, &mut note);
    let recent = |of: &Value, when| Wall::parse_rfc3339(text(of, when)).is_some_and(|at| now.since(at) < RECENT);
    for error in items(status, "errors").iter().filter(|error| recent(error, "last")) {
        let cause = text(error, "cause");
        let name = match cause.strip_prefix("ec2: ") {
            Some(call) if call.ends_with(" UnauthorizedOperation") => "ec2-refused",
            None if cause == "threads" => "daemon-stuck",
            _ => continue,
        };
        let (told, last) = (text(error, "text"), text(error, "last"));
        note(name, format!("{cause}: {told} ({} times, last {last})", error["count"]));
    }
    let repairs = items(status, "repairs").iter().filter(|repair| recent(repair, "at")).collect::<Vec<_>>();
    for (number, repair) in repairs.iter().enumerate() {
        let what = text(repair, "what");
        let same = |other: &&&Value| text(other, "what") == what;
        let count = repairs.iter().filter(same).count();
        if count >= REPAIRS_MIN && !repairs[number + 1..].iter().any(|other| same(&other)) {
            note("repairs", format!("{what} put back {count} times within an hour, last {}", text(repair, "at")));
        }
    }
    let up = status["uptime_s"].as_u64().unwrap_or(0);
    if settings.needs_api_server() && status["doing"]["node_seen"] == false && up >= NODE_SEEN_S {
        let endpoint = &settings.cluster_endpoint;
        note("api-server", format!("it has told nothing of the node in {up} s; CLUSTER_ENDPOINT is {endpoint:?}"));
    }
    for wrong in items(status, "wrong") {
        note("setting-ignored", wrong.as_str().unwrap_or_default().to_owned());
    }
    findings
}

fn pool(status: &Value, note: &mut impl FnMut(&'static str, String)) {
    let doing = &status["doing"];
    let short = &doing["if_short"];
    let (cause, sentence) = (text(short, "cause"), text(short, "text"));
    if doing["waiting"].as_u64().is_some_and(|waiting| waiting > 0) {
        note("no-addresses", format!("{} pods wait: {cause}: {sentence}", doing["waiting"]));
    } else if status["pool"]["free"] == 0 && status["phase"] == "ready" {
        note("pool-full", format!("{cause}: {sentence}"));
    }
    if cause == "subnet_fragmented" {
        note("subnet-fragmented", sentence.to_owned());
    }
    if doing["paused_s"].is_u64() {
        let failure = text(doing, "last_failure");
        let name = if failure.starts_with("ENIConfig ") { "eni-config" } else { "growth-paused" };
        note(name, format!("{failure}; next try in {} s", doing["paused_s"]));
    }
    let subnets = doing["subnets"].as_object().into_iter().flatten();
    let free = subnets.map(|(subnet, told)| format!("{subnet} {}", told["free"])).collect::<Vec<_>>().join(", ");
    for (subnet, left) in doing["exhausted_subnets_s"].as_object().into_iter().flatten() {
        let free = if free.is_empty() { "not known" } else { &free };
        note("subnet-exhausted", format!("{subnet}, left alone for {left} s; free addresses by subnet: {free}"));
    }
    for (action, left) in doing["throttled_s"].as_object().into_iter().flatten() {
        let of =
            |error: &&Value| text(error, "cause").strip_prefix("ec2: ").is_some_and(|call| call.starts_with(action));
        let times = items(status, "errors").iter().filter(of).filter_map(|error| error["count"].as_u64()).sum::<u64>();
        note("ec2-throttled", format!("{action}, next call in {left} s; it has failed {times} times"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A daemon with nothing to complain of.
    fn healthy() -> Value {
        json!({
            "phase": "ready", "uptime_s": 500, "pool": {"free": 5}, "errors": [], "repairs": [], "wrong": [],
            "doing": {
                "waiting": 0, "paused_s": null, "exhausted_subnets_s": {}, "throttled_s": {}, "node_seen": false,
                "subnets": {"subnet-1": {"free": 250, "age_s": 3}},
                "last_failure": "create: no", "if_short": {"cause": "provisioning_disabled", "text": "the settings forbid it"},
            },
        })
    }

    #[test]
    fn what_the_daemon_says_of_itself() {
        let now = Wall::parse_rfc3339("2026-11-21T12:00:00Z").unwrap();
        let check = |path: &str, value: Value, name: &str, seen: &str| {
            let mut status = healthy();
            *status.pointer_mut(path).unwrap() = value;
            let found = troubles(&status, &Settings::parse(|_| None).0, now);
            let found: Vec<_> = found.iter().map(|finding| (finding.name, finding.seen.as_str())).collect();
            let expected: &[_] = if name.is_empty() { &[] } else { &[(name, seen)] };
            assert_eq!(found, expected, "{path}");
        };
        let error = |cause: &str, last: &str| json!([{"cause": cause, "count": 4, "last": last, "text": "no"}]);
        let repairs =
            |count: usize| Value::Array(vec![json!({"at": "2026-11-21T11:59:00Z", "what": "pod-route"}); count]);
        let short = |cause: &str| json!({"cause": cause, "text": "why"});
        check("/pool/free", json!(5), "", "");
        check("/pool/free", json!(0), "pool-full", "provisioning_disabled: the settings forbid it");
        check("/doing/waiting", json!(2), "no-addresses", "2 pods wait: provisioning_disabled: the settings forbid it");
        check("/doing/if_short", short("subnet_fragmented"), "subnet-fragmented", "why");
        check("/doing/paused_s", json!(7), "growth-paused", "create: no; next try in 7 s");
        check(
            "/doing/exhausted_subnets_s",
            json!({"subnet-2": 90}),
            "subnet-exhausted",
            "subnet-2, left alone for 90 s; free addresses by subnet: subnet-1 250",
        );
        check("/doing/throttled_s", json!({"X": 3}), "ec2-throttled", "X, next call in 3 s; it has failed 0 times");
        let refused = "ec2: CreateNetworkInterface UnauthorizedOperation";
        let told = "no (4 times, last 2026-11-21T11:30:00Z)";
        check("/errors", error(refused, "2026-11-21T11:30:00Z"), "ec2-refused", &format!("{refused}: {told}"));
        check("/errors", error(refused, "2026-11-21T10:30:00Z"), "", "");
        check("/errors", error("ec2: AttachNetworkInterface Other", "2026-11-21T11:30:00Z"), "", "");
        check("/errors", error("threads", "2026-11-21T11:30:00Z"), "daemon-stuck", &format!("threads: {told}"));
        check("/repairs", repairs(2), "", "");
        let often = "pod-route put back 3 times within an hour, last 2026-11-21T11:59:00Z";
        check("/repairs", repairs(3), "repairs", often);
        check("/wrong", json!(["X is odd"]), "setting-ignored", "X is odd");
    }

    #[test]
    fn what_is_missing_has_its_own_name() {
        let now = Wall::parse_rfc3339("2026-11-21T12:00:00Z").unwrap();
        let names = |status: &Value, variable: &str| {
            let settings = Settings::parse(|name| (name == variable).then(|| "true".to_owned())).0;
            troubles(status, &settings, now).iter().map(|finding| finding.name).collect::<Vec<_>>()
        };
        let mut status = healthy();
        assert_eq!(names(&status, "ENABLE_POD_ENI"), ["api-server"]);
        assert_eq!(names(&status, "ENABLE_NOTHING"), <[&str; 0]>::default());
        status["doing"]["node_seen"] = json!(true);
        assert_eq!(names(&status, "ENABLE_POD_ENI"), <[&str; 0]>::default());
        status["doing"]["paused_s"] = json!(4);
        status["doing"]["last_failure"] = json!("ENIConfig eu-1a: not found (HTTP 404)");
        assert_eq!(names(&status, "ENABLE_POD_ENI"), ["eni-config"]);
        // A daemon that has just started has not heard of anything yet.
        assert_eq!(names(&json!({"phase": "starting", "uptime_s": 1}), "ENABLE_POD_ENI"), <[&str; 0]>::default());
    }
}
