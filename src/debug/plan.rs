//! `enibox plan`: what one node of a type holds with these settings, idle and with so many pods, what that costs in calls
//! to EC2, what runs short, and what other settings would give. Nothing is estimated: the real core runs in virtual time.

use super::simulate::{delays, settings};
use super::{complain, print};
use crate::error::exit;
use crate::model::kube::EniConfig;
use crate::model::limits::{self, Limits};
use crate::model::settings::{Mode, Settings, Valid};
use crate::sim::conditions::Latencies;
use crate::sim::fleet::Fleet;
use crate::sim::node::Setup;
use crate::sim::trial::roomy_vpc;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// A longer file is no curve.
const CURVE_BYTES_MAX: usize = 1 << 20;
/// Virtual time in which a pool comes to rest.
const REST: Duration = Duration::from_mins(12);
/// Addresses that the node can never need: the subnet is large.
const ROOM: usize = 40_000;

/// What to plan.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Instance type
    #[arg(long)]
    instance_type: String,
    /// Pods on the node [default: as many as fit]
    #[arg(long, conflicts_with = "curve")]
    pods: Option<u32>,
    /// File with lines "seconds pods": how many pods there are from when on
    #[arg(long, value_name = "FILE")]
    curve: Option<PathBuf>,
    /// A setting of the daemon, may be repeated
    #[arg(long, value_name = "VAR=VALUE")]
    set: Vec<String>,
    /// How long EC2 takes, in milliseconds by action: CreateNetworkInterface=600,...
    #[arg(long, value_name = "ACTION=MS", value_delimiter = ',')]
    ec2_delays: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What the pool holds at one time.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    pods: usize,
    without: usize,
    enis: usize,
    addresses: usize,
    prefixes: usize,
    free: usize,
}

/// A node and how it is driven.
struct Planned {
    settings: Settings,
    valid: Valid,
    limits: Limits,
    max_pods: u32,
    delays: BTreeMap<String, Duration>,
    curve: Vec<(u64, usize)>,
}

/// What came of it.
struct Outcome {
    idle: Held,
    at: Vec<Held>,
    calls: BTreeMap<&'static str, u64>,
    ready_ms: u64,
}

fn curve(path: &Path) -> Result<Vec<(u64, usize)>, String> {
    let what = |error: &dyn std::fmt::Display| format!("read curve {}: {error}", path.display());
    let text = super::read(path, CURVE_BYTES_MAX).map_err(|error| what(&error))?;
    let mut points: Vec<(u64, usize)> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let parts = line.split_once(char::is_whitespace);
        let point = parts.and_then(|(at, pods)| Some((at.parse().ok()?, pods.trim().parse().ok()?)));
        let Some(point) = point.filter(|(at, _)| points.last().is_none_or(|(last, _)| last <= at)) else {
            return Err(what(&format!("{line:?}: not \"seconds pods\", or out of order")));
        };
        points.push(point);
    }
    if points.is_empty() { Err(what(&"no point in it")) } else { Ok(points) }
}

impl Planned {
    fn new(args: &Args, settings: Settings) -> Result<Planned, String> {
        let kind = &args.instance_type;
        let limits = limits::of(kind).ok_or_else(|| format!("instance type {kind:?} is not known"))?;
        let valid = settings.validate(&limits)?;
        if valid.mode == Mode::Ipv6Prefixes {
            return Err("ENABLE_IPv6: one prefix serves all pods of a node, there is nothing to plan".into());
        }
        let trunk = settings.pod_eni && limits::takes_trunk(kind);
        let reserved = u32::from(settings.custom_networking) + u32::from(trunk);
        let mut able = limits.clone();
        able.enis = valid.enis_per_card.first().copied().unwrap_or(limits.enis);
        let max_pods = able.max_pods_with(reserved, valid.mode != Mode::Ipv4Addresses);
        let curve = match &args.curve {
            Some(path) => curve(path)?,
            // Two pods are on the host's network by convention and need no address.
            None => vec![(0, args.pods.unwrap_or(max_pods.saturating_sub(2)) as usize)],
        };
        Ok(Planned { settings, valid, limits, max_pods, delays: delays(&args.ec2_delays)?, curve })
    }

    fn run(&self, kind: &str) -> Result<Outcome, String> {
        let mut vpc = roomy_vpc(ROOM, &self.delays, 1);
        let (group, subnet) = (vpc.add_group(), vpc.subnets().into_iter().next().unwrap_or_default());
        let mut fleet = Fleet::new(vpc);
        let failed = |error: crate::model::ec2::Failure| error.to_string();
        let instance = fleet.sky.vpc.launch(fleet.now(), kind, &subnet, &[group]).map_err(failed)?;
        let latencies = Latencies { jitter_percent: 0, ..Latencies::default() };
        let settings = Rc::new(self.settings.clone());
        let node =
            fleet.add(instance, Setup { settings, original: false, latencies, logged: false }, 1).map_err(failed)?;
        let api = &mut fleet.nodes[node].api;
        api.node.max_pods = Some(self.max_pods);
        api.eni_configs.insert("default".into(), EniConfig { subnet, groups: Vec::new() });
        fleet.start(node);
        fleet.pass(REST);
        let (mut pods, mut named, begun) = (Vec::new(), 0, fleet.nanos());
        let mut outcome = Outcome { idle: held(&fleet), at: Vec::new(), calls: BTreeMap::new(), ready_ms: 0 };
        for (n, (second, wanted)) in self.curve.iter().enumerate() {
            let at = begun.saturating_add(second.saturating_mul(1_000_000_000));
            fleet.pass(Duration::from_nanos(at.saturating_sub(fleet.nanos())));
            if let Some(last) = n.checked_sub(1).and_then(|last| outcome.at.get_mut(last)) {
                *last = held(&fleet);
            }
            while pods.len() < *wanted {
                named += 1;
                pods.push(fleet.bind(node, &format!("pod-{named}")));
            }
            for pod in pods.drain((*wanted).min(pods.len())..) {
                fleet.delete(node, pod, false);
            }
            outcome.at.push(Held::default());
        }
        fleet.pass(REST);
        if let Some(last) = outcome.at.last_mut() {
            *last = held(&fleet);
        }
        outcome.calls.clone_from(fleet.sky.vpc.journal().counts());
        outcome.ready_ms = fleet.sky.counts.ready.values().copied().next().unwrap_or(0) / 1_000_000;
        Ok(outcome)
    }
}

// What the pool of the only node holds now.
fn held(fleet: &Fleet) -> Held {
    let node = &fleet.nodes[0];
    let (pods, running) = (node.kubelet.bound(), node.kubelet.running());
    let mut held = Held { pods, without: pods.saturating_sub(running), ..Held::default() };
    let Some(core) = node.core() else { return held };
    for (_, eni) in core.pool().enis() {
        held.enis += 1;
        for (_, cidr) in eni.cidrs() {
            held.prefixes += usize::from(cidr.prefix);
            held.addresses += if cidr.prefix { 16 } else { 1 };
        }
    }
    held.free = held.addresses.saturating_sub(running);
    held
}

/// Settings that are worth a try beside those that were given.
const CANDIDATES: [&[&str]; 4] = [
    &["WARM_IP_TARGET=2", "MINIMUM_IP_TARGET=10"],
    &["WARM_IP_TARGET=5"],
    &["ENABLE_PREFIX_DELEGATION=true", "WARM_PREFIX_TARGET=1"],
    &["ENABLE_PREFIX_DELEGATION=true", "WARM_IP_TARGET=5"],
];

// Better: no pod without an address that had one, and fewer addresses idle and with pods.
fn better(args: &Args, planned: &Planned, found: &Outcome) -> Vec<(String, Outcome)> {
    let score = |outcome: &Outcome| {
        let without: usize = outcome.at.iter().map(|held| held.without).sum();
        (without, outcome.idle.addresses + outcome.at.iter().map(|held| held.addresses).sum::<usize>())
    };
    let mut better = Vec::new();
    for candidate in CANDIDATES {
        let words: Vec<String> =
            args.set.iter().cloned().chain(candidate.iter().map(|word| (*word).to_owned())).collect();
        let tried = settings(&words).and_then(|settings| Planned::new(args, settings));
        let Ok(mut tried) = tried else { continue };
        tried.curve.clone_from(&planned.curve);
        match tried.run(&args.instance_type) {
            Ok(outcome) if score(&outcome) < score(found) => better.push((candidate.join(" "), outcome)),
            _ => {}
        }
    }
    better
}

fn mode(valid: &Valid) -> &'static str {
    if valid.mode == Mode::Ipv4Addresses { "addresses" } else { "prefixes" }
}

fn document(args: &Args, planned: &Planned, found: &Outcome, better: &[(String, Outcome)]) -> Value {
    let point = |held: &Held| {
        json!({
            "pods": held.pods, "enis": held.enis, "addresses": held.addresses, "prefixes": held.prefixes,
            "free": held.free, "without_address": held.without,
        })
    };
    let at = match found.at.as_slice() {
        [only] if args.curve.is_none() => point(only),
        points => Value::Array(points.iter().map(point).collect()),
    };
    let idle = &found.idle;
    let better = better.iter().map(|(words, outcome)| {
        json!({"set": words, "idle_addresses": outcome.idle.addresses, "at": outcome.at.last().map(point)})
    });
    json!({
        "instance_type": args.instance_type, "max_pods": planned.max_pods,
        "enis_max": planned.valid.enis_per_card.first().copied().unwrap_or(planned.limits.enis),
        "mode": mode(&planned.valid),
        "idle": {"enis": idle.enis, "addresses": idle.addresses, "prefixes": idle.prefixes},
        "at": at, "ec2_calls": found.calls, "ready_s": f64::from(u32::try_from(found.ready_ms).unwrap_or(u32::MAX)) / 1000.0,
        "better": better.collect::<Vec<_>>(),
    })
}

fn page(args: &Args, planned: &Planned, found: &Outcome, better: &[(String, Outcome)]) -> String {
    let mut page = String::new();
    let mut line = |text: String| {
        let _ = writeln!(page, "{text}"); // writing to a string cannot fail
    };
    let enis = planned.valid.enis_per_card.first().copied().unwrap_or(planned.limits.enis);
    let (kind, max) = (&args.instance_type, planned.max_pods);
    line(format!("{kind}: {max} pods at most, {enis} ENIs, {} mode", mode(&planned.valid)));
    line(format!("serves pods {}.{:03} s after the start", found.ready_ms / 1000, found.ready_ms % 1000));
    let show = |name: &str, held: &Held| {
        let (enis, addresses, prefixes, free) = (held.enis, held.addresses, held.prefixes, held.free);
        format!("{name:<12} {enis:>3} ENIs {addresses:>5} addresses {prefixes:>4} prefixes {free:>5} free")
    };
    line(show("idle", &found.idle));
    for held in &found.at {
        line(show(&format!("{} pods", held.pods), held));
        if held.without > 0 {
            line(format!("  runs short: {} pods get no address", held.without));
        }
    }
    line(format!(
        "EC2 calls    {}",
        found.calls.iter().map(|(a, n)| format!("{a} {n}")).collect::<Vec<_>>().join(", ")
    ));
    for (words, outcome) in better {
        let last = outcome.at.last().copied().unwrap_or_default();
        let (idle, with, without) = (outcome.idle.addresses, last.addresses, last.without);
        line(format!("better: {words}: {idle} addresses idle, {with} with {} pods, {without} pods short", last.pods));
    }
    page
}

/// Runs the subcommand; the exit code.
pub fn run(args: &Args) -> u8 {
    let planned = match settings(&args.set).and_then(|settings| Planned::new(args, settings)) {
        Ok(planned) => planned,
        Err(error) => {
            complain(&error);
            return exit::USAGE;
        }
    };
    match planned.run(&args.instance_type) {
        Ok(found) => {
            let better = better(args, &planned, &found);
            let json = args.json.then(|| format!("{:#}\n", document(args, &planned, &found, &better)));
            print(&json.unwrap_or_else(|| page(args, &planned, &found, &better)))
        }
        Err(error) => {
            complain(&error);
            exit::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(kind: &str, pods: u32, set: &str) -> Args {
        let set = set.split_whitespace().map(str::to_owned).collect();
        let (ec2_delays, instance_type) = (Vec::new(), kind.to_owned());
        Args { instance_type, pods: Some(pods), curve: None, set, ec2_delays, json: false }
    }

    /// CIDRs and ENIs with each number of pods (`spec/ipamd.md` 6.11).
    #[track_caller]
    fn check(kind: &str, set: &str, expected: &[(u32, usize, usize)]) {
        for (pods, cidrs, enis) in expected {
            let args = args(kind, *pods, set);
            let planned = Planned::new(&args, settings(&args.set).unwrap()).unwrap();
            let found = planned.run(kind).unwrap();
            let at = found.at[0];
            let held = if at.prefixes > 0 { at.prefixes } else { at.addresses };
            assert_eq!((held, at.enis, at.without), (*cidrs, *enis, 0), "{kind} {set}: {pods} pods");
        }
    }

    #[test]
    fn steady_states() {
        check("t3.small", "WARM_ENI_TARGET=1", &[(0, 3, 1), (5, 9, 3), (9, 9, 3)]);
        check("t3.small", "WARM_IP_TARGET=1 MINIMUM_IP_TARGET=1", &[(0, 1, 1), (5, 6, 2), (9, 9, 3)]);
        check("t3.small", "WARM_IP_TARGET=2 MINIMUM_IP_TARGET=5", &[(0, 5, 2), (5, 7, 3), (9, 9, 3)]);
        check("p3dn.24xlarge", "", &[(0, 49, 1), (3, 98, 2), (95, 147, 3)]);
        check(
            "p3dn.24xlarge",
            "WARM_IP_TARGET=5 MINIMUM_IP_TARGET=10",
            &[(0, 10, 1), (7, 12, 1), (15, 20, 1), (45, 50, 2)],
        );
        let prefixes = |more: &str| format!("ENABLE_PREFIX_DELEGATION=true {more}");
        let (warm, one) = (prefixes("WARM_PREFIX_TARGET=1"), prefixes("WARM_IP_TARGET=1 MINIMUM_IP_TARGET=1"));
        check("t3.small", &warm, &[(0, 1, 1), (5, 2, 1), (16, 2, 1), (17, 3, 1), (58, 5, 2)]);
        check("t3.small", &one, &[(0, 1, 1), (5, 1, 1), (17, 2, 1), (58, 4, 2)]);
        check(
            "t3.small",
            &prefixes("WARM_IP_TARGET=7 MINIMUM_IP_TARGET=20"),
            &[(0, 2, 1), (5, 2, 1), (17, 2, 1), (58, 5, 2)],
        );
        check("p3dn.24xlarge", &warm, &[(0, 1, 1), (3, 2, 1), (95, 7, 1)]);
        check(
            "p3dn.24xlarge",
            &prefixes("WARM_IP_TARGET=5 MINIMUM_IP_TARGET=10"),
            &[(0, 1, 1), (7, 1, 1), (15, 2, 1), (45, 4, 1)],
        );
    }

    #[test]
    fn the_document_has_the_members_that_are_promised() {
        let args = args("m5.large", 10, "");
        let planned = Planned::new(&args, settings(&args.set).unwrap()).unwrap();
        let found = planned.run("m5.large").unwrap();
        let document = document(&args, &planned, &found, &better(&args, &planned, &found));
        for member in ["instance_type", "max_pods", "enis_max", "mode", "idle", "at", "ec2_calls", "ready_s"] {
            assert!(!document[member].is_null(), "{member}: {document}");
        }
        assert_eq!((&document["max_pods"], &document["at"]["pods"]), (&json!(29), &json!(10)));
        assert!(!document["better"].as_array().unwrap().is_empty(), "{document}");
    }

    #[test]
    fn what_cannot_be_planned_is_refused() {
        for (kind, set) in [
            ("m5.small", ""),
            ("m5.large", "NO_SUCH=1"),
            ("m5.large", "WARM_IP_TARGET"),
            ("m5.large", "ENABLE_IPv6=true"),
        ] {
            let args = args(kind, 1, set);
            assert!(settings(&args.set).and_then(|settings| Planned::new(&args, settings)).is_err(), "{kind} {set}");
        }
    }
}
