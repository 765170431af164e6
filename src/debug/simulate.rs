//! `enibox simulate`: N nodes with the real core against one EC2 with its documented throttling, in virtual time, and the
//! original's algorithm under the same conditions.

use super::{complain, print};
use crate::error::exit;
use crate::model::limits;
use crate::model::map::Map;
use crate::model::order::Gather as _;
use crate::model::settings::{Mode, Settings};
use crate::sim::trial::{DELAYS_MS, Report, Trial};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Duration;

/// More nodes than an account has ENIs for.
const NODES_MAX: u32 = 20_000;

/// What to simulate.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Nodes
    #[arg(long, default_value_t = 100)]
    nodes: u32,
    /// Pods that every node gets
    #[arg(long, default_value_t = 30)]
    pods: u32,
    /// Pods that the scheduler binds in a second, over all nodes
    #[arg(long, default_value_t = 100)]
    pods_per_second: u32,
    /// Instance type of all nodes
    #[arg(long, default_value = "m5.4xlarge")]
    instance_type: String,
    /// A setting of the daemons, may be repeated
    #[arg(long, value_name = "VAR=VALUE")]
    set: Vec<String>,
    /// How long EC2 takes, in milliseconds by action: CreateNetworkInterface=600,...
    #[arg(long, value_name = "ACTION=MS", value_delimiter = ',')]
    ec2_delays: Vec<String>,
    /// Seed of everything random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Leave the original out
    #[arg(long)]
    alone: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Settings from `VAR=VALUE` words; an error for a word that is none, or a value that is not understood.
pub(super) fn settings(words: &[String]) -> Result<Settings, String> {
    let mut pairs = Map::new();
    for word in words {
        let (name, value) = word.split_once('=').ok_or_else(|| format!("--set {word}: not VAR=VALUE"))?;
        if Settings::docs().all(|doc| doc.variable != name) {
            return Err(format!("--set {word}: there is no such setting"));
        }
        pairs.insert(name.to_owned(), value.to_owned());
    }
    let (settings, complaints) = Settings::parse(|name| pairs.get(name).cloned());
    match complaints.first() {
        Some(complaint) => Err(complaint.to_string()),
        None => Ok(settings),
    }
}

/// EC2's usual delays, and those that are given.
pub(super) fn delays(words: &[String]) -> Result<Map<String, Duration>, String> {
    let mut delays: Map<String, Duration> =
        DELAYS_MS.iter().map(|(action, ms)| ((*action).to_owned(), Duration::from_millis(*ms))).gather();
    for word in words {
        let parts = word.split_once('=').and_then(|(action, ms)| Some((action, ms.parse().ok()?)));
        let (action, ms) = parts.ok_or_else(|| format!("--ec2-delays {word}: not ACTION=MS"))?;
        let delay = delays.get_mut(action).ok_or_else(|| format!("--ec2-delays {word}: no such action is used"))?;
        *delay = Duration::from_millis(ms);
    }
    Ok(delays)
}

fn trial(args: &Args) -> Result<Trial, String> {
    let settings = settings(&args.set)?;
    let limits = limits::of(&args.instance_type)
        .ok_or_else(|| format!("instance type {:?} is not known", args.instance_type))?;
    let valid = settings.validate(&limits)?;
    if valid.mode == Mode::Ipv6Prefixes {
        return Err("ENABLE_IPv6: one prefix serves all pods of a node, there is no pool to simulate".into());
    }
    let fit = limits.max_pods_with(0, valid.mode != Mode::Ipv4Addresses).saturating_sub(2);
    if args.pods > fit {
        return Err(format!("{} takes {fit} pods, not {}", args.instance_type, args.pods));
    }
    if args.nodes == 0 || args.nodes > NODES_MAX {
        return Err(format!("--nodes {}: from 1 to {NODES_MAX}", args.nodes));
    }
    Ok(Trial {
        nodes: args.nodes as usize,
        pods: args.pods as usize,
        pods_per_second: args.pods_per_second.max(1),
        instance_type: args.instance_type.clone(),
        settings,
        original: false,
        ec2_delays: delays(&args.ec2_delays)?,
        seed: args.seed,
    })
}

/// Runs the subcommand; the exit code: a failure if not every pod got its address.
pub fn run(args: &Args) -> u8 {
    let ours = match trial(args) {
        Ok(trial) => trial,
        Err(error) => {
            complain(&error);
            return exit::USAGE;
        }
    };
    let theirs = Trial { original: true, ..ours.clone() };
    let (ours, theirs) = std::thread::scope(|scope| {
        let theirs = (!args.alone).then(|| scope.spawn(|| theirs.run()));
        (ours.run(), theirs.and_then(|thread| thread.join().ok()))
    });
    let reports = ours.and_then(|ours| Ok((ours, theirs.transpose()?)));
    match reports {
        Ok((ours, theirs)) => {
            let text = if args.json {
                format!("{:#}\n", document(args, &ours, theirs.as_ref()))
            } else {
                page(args, &ours, theirs.as_ref())
            };
            let printed = print(&text);
            if ours.converged { printed } else { exit::FAILURE }
        }
        Err(error) => {
            complain(&error.to_string());
            exit::FAILURE
        }
    }
}

fn part(sorted: &[u32], percent: usize) -> u32 {
    let last = sorted.len().saturating_sub(1);
    sorted.get(last * percent / 100).copied().unwrap_or(0)
}

/// ADDs that had to wait for an address: longer than a write of the checkpoint takes.
const WAITED_MS: u32 = 100;

fn waited(report: &Report) -> &[u32] {
    let first = report.add_waits_ms.partition_point(|ms| *ms < WAITED_MS);
    report.add_waits_ms.get(first..).unwrap_or_default()
}

fn document(args: &Args, ours: &Report, theirs: Option<&Report>) -> Value {
    let times = |sorted: &[u32]| json!({"count": sorted.len(), "p50": part(sorted, 50), "p99": part(sorted, 99), "max": part(sorted, 100)});
    let side = |report: &Report| {
        json!({
            "converged": report.converged, "ready_ms": report.ready_ms, "pods_ms": report.pods_ms,
            "pod_start_ms": times(&report.pod_starts_ms), "adds_that_waited_ms": times(waited(report)),
            "adds_refused": report.refused, "ec2_calls": report.calls,
            "ec2_calls_total": report.calls.values().sum::<u64>(), "ec2_calls_mutating": report.mutating,
            "ec2_calls_throttled": report.throttled,
            "peak": {"addresses": report.peak.0, "enis": report.peak.1},
            "rest": {"addresses": report.rest.0, "enis": report.rest.1}, "steps": report.steps,
        })
    };
    json!({
        "nodes": args.nodes, "pods": args.pods, "instance_type": args.instance_type, "seed": args.seed,
        "enibox": side(ours), "original": theirs.map(side),
    })
}

fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}

fn times(sorted: &[u32]) -> String {
    [50, 99, 100].map(|percent| seconds(part(sorted, percent).into())).join(" / ")
}

fn page(args: &Args, ours: &Report, theirs: Option<&Report>) -> String {
    type Row<'a> = (&'a str, Box<dyn Fn(&Report) -> String>);
    let rows: Vec<Row<'_>> = vec![
        ("all daemons serve after", Box::new(|r| seconds(r.ready_ms))),
        (
            "all pods run after",
            Box::new(|r| if r.converged { seconds(r.pods_ms) } else { format!("not: {}", r.pod_starts_ms.len()) }),
        ),
        ("pod start p50 / p99 / max", Box::new(|r| times(&r.pod_starts_ms))),
        ("ADDs that waited", Box::new(|r| waited(r).len().to_string())),
        ("  waited p50 / p99 / max", Box::new(|r| times(waited(r)))),
        ("ADDs refused", Box::new(|r| r.refused.to_string())),
        ("EC2 calls", Box::new(|r| r.calls.values().sum::<u64>().to_string())),
        ("  that change something", Box::new(|r| r.mutating.to_string())),
        ("  throttled", Box::new(|r| r.throttled.to_string())),
        ("addresses at peak / at rest", Box::new(|r| format!("{} / {}", r.peak.0, r.rest.0))),
        ("ENIs at peak / at rest", Box::new(|r| format!("{} / {}", r.peak.1, r.rest.1))),
    ];
    let (nodes, pods, kind) = (args.nodes, args.pods, &args.instance_type);
    let mut page = format!("{nodes} nodes {kind}, {pods} pods each, one EC2 account; times are virtual\n");
    let mut line = |name: &str, ours: &str, theirs: Option<&str>| {
        // Writing to a string cannot fail.
        let _ = writeln!(page, "{name:<34} {ours:>30} {:>30}", theirs.unwrap_or_default());
    };
    line("", "enibox", theirs.map(|_| "original"));
    for (name, show) in &rows {
        line(name, &show(ours), theirs.map(show).as_deref());
    }
    let mut actions: Vec<&str> = ours.calls.keys().chain(theirs.iter().flat_map(|r| r.calls.keys())).copied().collect();
    actions.sort_unstable();
    actions.dedup();
    for action in actions {
        let count = |report: &Report| report.calls.get(action).copied().unwrap_or(0).to_string();
        line(&format!("  {action}"), &count(ours), theirs.map(count).as_deref());
    }
    page
}
