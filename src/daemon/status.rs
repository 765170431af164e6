//! The daemon's state as JSON for `enibox status`. Figures and causes; no container id leaves here.

use super::introspect::{Shown, View};
use super::metrics::Metrics;
use crate::model::settings::Mode;
use crate::model::time::{Mono, Now};
use crate::plan::core::Status;
use crate::plan::pool::{Kind, Stats};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// An address that has rested for less before its next pod was taken early: the default of `IP_COOLDOWN_PERIOD`.
const REST: Duration = Duration::from_secs(30);
/// That matters as long as somebody may still take the address for the last pod's: connections that are being opened end
/// after two minutes.
const LATELY: Duration = Duration::from_mins(10);
/// Of these so many are shown.
const REUSED_MAX: usize = 8;

/// `/v1/enibox/status`.
pub(super) fn document(shown: &Shown, metrics: &Metrics, now: Now) -> Value {
    let known = &shown.known;
    let lines = known.layered.settings.effective().filter(|line| !line.is_default);
    let mut document = json!({
        "version": crate::VERSION,
        "node": shown.about.node,
        "uptime_s": now.mono.since(metrics.start.mono).as_secs(),
        "phase": shown.view.status.as_ref().map_or("starting", |status| status.phase),
        "pool": pool(&shown.view, now),
        "doing": shown.view.status.as_ref().map(|status| doing(status, now.mono)),
        "errors": errors(metrics),
        "repairs": repairs(metrics),
        "settings": lines.map(|line| known.layered.line(&line)).collect::<Vec<_>>(),
        "pending": known.pending.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "wrong": known.wrong,
    });
    if let Some((identity, mode)) = &shown.about.instance {
        document["instance"] = json!({
            "id": identity.instance, "type": identity.instance_type, "zone": identity.zone, "vpc": identity.vpc,
            "mode": match mode {
                Mode::Ipv4Addresses => "IPv4 addresses",
                Mode::Ipv4Prefixes => "IPv4 prefixes",
                Mode::Ipv6Prefixes => "IPv6 prefixes",
            },
        });
    }
    document
}

fn figures(stats: &Stats) -> Value {
    json!({
        "total": stats.total, "used": stats.assigned, "cooling": stats.cooling,
        "free": stats.available() - stats.cooling, "prefixes": stats.prefixes,
    })
}

fn pool(view: &View, now: Now) -> Value {
    let enis = view.pool.enis().map(|(id, eni)| {
        let mut value = figures(&view.pool.stats_of(now.mono, |other, _| other == id));
        value["id"] = json!(id);
        value["card"] = json!(eni.card);
        value["device"] = json!(eni.device);
        value["subnet"] = json!(eni.subnet);
        value["excluded"] = json!(eni.excluded);
        value["kind"] = json!(match eni.kind {
            _ if eni.primary => "primary",
            Kind::Plain => "secondary",
            Kind::Efa => "efa",
            Kind::Trunk => "trunk",
        });
        value
    });
    let enis: Vec<Value> = enis.collect();
    let mut value = figures(&view.pool.stats_of(now.mono, |_, _| true));
    value["enis"] = Value::Array(enis);
    value["eni_limit"] = json!(view.eni_limit);
    value["reused"] = json!(reused(view));
    value
}

// Addresses that pods have got lately, within [`REST`] after their last pod, and how long they rested, in seconds.
fn reused(view: &View) -> Map<String, Value> {
    let mut reused = Map::new();
    let slots = view.pool.enis().flat_map(|(_, eni)| eni.cidrs().flat_map(|(_, cidr)| cidr.slots()));
    for (address, slot) in slots {
        let (Some(owner), Some(freed)) = (&slot.owner, slot.freed) else { continue };
        let age = view.at.wall.since(owner.since);
        // With a wall clock that was set meanwhile there is no telling.
        let rest = view.at.mono.since(freed).checked_sub(age).filter(|rest| *rest < REST && age < LATELY);
        if let Some(rest) = rest.filter(|_| reused.len() < REUSED_MAX) {
            reused.insert(address.to_string(), json!(rest.as_secs()));
        }
    }
    reused
}

fn doing(status: &Status, now: Mono) -> Value {
    let left = |until: Mono| until.since(now).as_secs();
    let mut exhausted = Map::new();
    for (subnet, until) in &status.exhausted {
        exhausted.insert(subnet.0.clone(), json!(left(*until)));
    }
    let mut throttled = Map::new();
    for (action, until) in &status.throttled {
        throttled.insert((*action).to_owned(), json!(left(*until)));
    }
    let mut subnets = Map::new();
    for (subnet, free, told) in &status.subnets {
        subnets.insert(subnet.0.clone(), json!({"free": free, "age_s": now.since(*told).as_secs()}));
    }
    let (cause, why) = &status.cause;
    let targets = &status.targets;
    json!({
        "waiting": status.waiting, "growing": status.growing, "freeing": status.freeing,
        "paused_s": status.paused_until.map(left), "exhausted_subnets_s": exhausted,
        "cordoned": status.cordoned, "max_pods": status.max_pods, "subnets": subnets,
        "node_seen": status.node_seen, "kubelet_pods": status.kubelet_pods,
        "last_failure": status.last_failure, "throttled_s": throttled, "if_short": {"cause": cause, "text": why},
        "targets": {
            "warm_eni": targets.warm_eni, "warm_ip": targets.warm_ip, "minimum_ip": targets.minimum_ip,
            "warm_prefix": targets.warm_prefix,
        },
    })
}

fn repairs(metrics: &Metrics) -> Vec<Value> {
    let repairs = metrics.repairs().into_iter();
    repairs.map(|repair| json!({"at": repair.at.to_string(), "what": repair.what, "text": repair.text})).collect()
}

fn errors(metrics: &Metrics) -> Vec<Value> {
    let troubles = metrics.troubles().into_iter();
    let tell = |(cause, trouble): (String, super::metrics::Trouble)| json!({"cause": cause, "count": trouble.count, "last": trouble.last.to_string(), "text": trouble.text});
    troubles.map(tell).collect()
}
