//! `enibox doctor`: what is wrong with this node, what it breaks, how it was seen, how to mend it. With `--fix` it mends what
//! is ours.
//!
//! What should be comes from the daemon, what is from the kernel, and both are put before IMDS and EC2. The judgement is
//! `plan::doctor`'s. Mending takes the steps that the daemon takes, and leaves it the first word.

pub(super) mod gather;
pub(super) mod known;

use self::known::Cloud;
use super::{Asking, complain, config, environment, items, print, text};
use crate::apply::{self, Host};
use crate::error::{Result, exit};
use crate::model::settings::Settings;
use crate::netlink::netns::Namespace;
use crate::plan::doctor::pods::{Inside, Place};
use crate::plan::doctor::{self, Finding, Severity, environment as surroundings};
use crate::plan::host::{Intent, Observation};
use crate::plan::pod::inside::Mend;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the daemon mends by itself it has mended after this time.
const DAEMON_MENDS: Duration = Duration::from_millis(1500);

/// Arguments of `doctor`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    asking: Asking,
    /// Mend what is ours
    #[arg(long)]
    fix: bool,
    /// Follow one pod
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pod: Option<String>,
    /// Where the host's files are
    #[arg(long, value_name = "DIRECTORY", default_value = "/")]
    root: PathBuf,
    /// Do not ask EC2, not even to read
    #[arg(long)]
    no_ec2: bool,
    /// How long a plugin at work, and the daemon's own repairs, are waited for
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    wait: u64,
}

/// Everything that one look has found.
struct Look {
    daemon: bool,
    intent: Option<Intent>,
    seen: Observation,
    namespaces: Vec<Inside>,
    findings: Vec<Finding>,
    mends: Vec<(Place, Mend)>,
}

/// Runs the subcommand; the exit code: 3 when something is wrong.
pub fn run(args: &Args) -> u8 {
    let told = attempt(args);
    match told {
        Ok((look, mended)) => report(args, &look, &mended),
        Err(error) => {
            complain(&error.to_string());
            exit::FAILURE
        }
    }
}

fn attempt(args: &Args) -> Result<(Look, Vec<String>)> {
    let settings = environment();
    let mut host = Host::open()?;
    let mut look = look(args, &settings, &mut host)?;
    let wait = Duration::from_secs(args.wait);
    // Half of an ADD or DEL looks like a fault.
    if look.daemon && look.findings.iter().any(|finding| finding.subject.contains('/')) {
        std::thread::sleep(wait);
        look = self::look(args, &settings, &mut host)?;
    }
    let mut mended = Vec::new();
    if args.fix && look.findings.iter().any(|finding| finding.mendable) {
        if look.daemon {
            std::thread::sleep(DAEMON_MENDS.min(wait));
            look = self::look(args, &settings, &mut host)?;
        }
        mended = mend(&look, &mut host);
        look = self::look(args, &settings, &mut host)?;
    }
    Ok((look, mended))
}

/// Where what should be is known from.
pub(super) struct Source {
    daemon: bool,
    settings: Settings,
    cloud: Option<Cloud>,
    /// What should be, if anybody could tell.
    pub(super) intent: Option<Intent>,
    /// What went wrong in finding out.
    pub(super) findings: Vec<Finding>,
}

impl Source {
    /// Asks the daemon, and IMDS and EC2 as far as `with_ec2` says; without the daemon, the checkpoint.
    pub(super) fn find(asking: &Asking, environment: &Settings, seen: &Observation, with_ec2: bool) -> Result<Source> {
        let asked = asking.ask(environment, "/v1/enibox/intent");
        let daemon = asked.is_ok();
        let (layered, wrong) = config::layered(environment);
        let settings = layered.settings;
        let mut findings = Vec::new();
        for line in wrong.into_iter().chain(settings.check().err()) {
            findings.push(Finding::new("settings", "", line));
        }
        let cloud = Cloud::ask(&settings, with_ec2, |why| findings.push(Finding::new("imds-silent", "", why)));
        let intent = match asked {
            Ok(intent) => serde_json::from_value(intent)?,
            Err(error) => {
                findings.push(Finding::new("daemon-silent", "", error.to_string()));
                let intent = cloud
                    .as_ref()
                    .map_err(ToString::to_string)
                    .and_then(|cloud| known::without_daemon(cloud, &settings, seen).map_err(|error| error.to_string()));
                match intent {
                    Ok((intent, found)) => {
                        findings.extend(found);
                        Some(intent)
                    }
                    Err(error) => {
                        findings.push(Finding::new("unknown", "", error));
                        None
                    }
                }
            }
        };
        Ok(Source { daemon, settings, cloud: cloud.ok(), intent, findings })
    }
}

fn look(args: &Args, environment: &Settings, host: &mut Host) -> Result<Look> {
    let root = args.root.as_path();
    let seen = host.observe()?;
    let source = Source::find(&args.asking, environment, &seen, !args.no_ec2)?;
    let Source { daemon, settings, cloud, intent, mut findings } = source;
    // Which sysctls are ours depends on the intent.
    let seen = intent.as_ref().map_or(Ok(seen), |intent| host.observe_for(intent))?;
    if daemon && let Ok(status) = args.asking.ask(environment, "/v1/enibox/status") {
        troubles(&status, &mut findings);
    }
    let mut facts = gather::facts(
        root,
        &known::store_of(&settings.backing_store, 0),
        Path::new(&settings.cni_bin_path),
        &seen.links,
    );
    gather::chains(&mut facts, host, &seen.tables)?;
    findings.extend(surroundings::findings(intent.as_ref(), &seen, &settings, &facts));
    let mut look = Look { daemon, intent, seen, namespaces: Vec::new(), findings, mends: Vec::new() };
    if let Some(intent) = &look.intent {
        look.namespaces = gather::namespaces(root);
        look.findings.extend(doctor::host(intent, &look.seen));
        for rule in doctor::strays(intent, &look.seen) {
            look.findings.push(Finding::new("stray-rule", "", format!("rule {rule}")));
            look.mends.push((Place::Host, Mend::NoRule(rule)));
        }
        let mtu = if settings.pod_mtu == 0 { intent.eni_mtu } else { settings.pod_mtu };
        let found = doctor::pods::pods(intent, &look.seen, &look.namespaces, mtu, args.pod.as_deref());
        // What the host's plan has found already is told once.
        let planned = std::mem::take(&mut look.findings);
        let new = |finding: &Finding| {
            !planned.iter().any(|known| (known.name, &known.subject) == (finding.name, &finding.subject))
        };
        look.findings.extend(found.findings.into_iter().filter(new));
        look.findings.extend(planned);
        look.mends.extend(found.mends);
        if found.hidden > 0 {
            let text = format!("the namespaces of {} pods are not seen from here", found.hidden);
            look.findings.push(Finding::new("pod-unseen", "", text));
        }
        look.findings.extend(cloud.iter().flat_map(|cloud| cloud.findings(intent)));
    }
    doctor::rank(&mut look.findings);
    Ok(look)
}

// What the daemon says of itself.
fn troubles(status: &Value, findings: &mut Vec<Finding>) {
    let doing = &status["doing"];
    let mut note = |name, text: String| findings.push(Finding::new(name, "", text));
    if doing["waiting"].as_u64().is_some_and(|waiting| waiting > 0) {
        let short = &doing["if_short"];
        note(
            "no-addresses",
            format!("{} pods wait: {}: {}", doing["waiting"], text(short, "cause"), text(short, "text")),
        );
    }
    if doing["paused_s"].is_u64() {
        note("growth-paused", format!("for {} s: {}", doing["paused_s"], text(doing, "last_failure")));
    }
    for (subnet, left) in doing["exhausted_subnets_s"].as_object().into_iter().flatten() {
        note("subnet-exhausted", format!("{subnet}, left alone for {left} s"));
    }
    for (action, left) in doing["throttled_s"].as_object().into_iter().flatten() {
        note("ec2-throttled", format!("{action}, next call in {left} s"));
    }
    for wrong in items(status, "wrong") {
        note("settings", wrong.as_str().unwrap_or_default().to_owned());
    }
}

// First what the host's plan says, as the daemon would do it, then what it does not cover.
fn mend(look: &Look, host: &mut Host) -> Vec<String> {
    let mut told = Vec::new();
    let Some(intent) = &look.intent else { return told };
    match host.host_with(intent, &mut |_, plan| plan.steps.retain(|step| !doctor::notes(step))) {
        Ok(report) => {
            told.extend(report.steps.into_iter().map(|step| format!("done: {}", step.text)));
            let refused = report.enis.into_iter().filter_map(|(eni, result)| Some(format!("{eni}: {}", result.err()?)));
            told.extend(report.errors.iter().map(|error| format!("failed: {error}")));
            told.extend(refused.map(|text| format!("failed: {text}")));
        }
        Err(error) => told.push(format!("failed: {error}")),
    }
    if look.findings.iter().any(|finding| finding.name == "former-rules") {
        match host.take_over() {
            Ok(lines) => told.extend(lines.into_iter().map(|line| format!("done: removed {line}"))),
            Err(error) => told.push(format!("failed: {error}")),
        }
    }
    for (place, mend) in &look.mends {
        let (path, name) = match place {
            Place::Host => ("/proc/thread-self/ns/net", "the host"),
            Place::Inside(number) => (look.namespaces[*number].path.as_str(), look.namespaces[*number].path.as_str()),
        };
        let result = Namespace::open(path).and_then(|namespace| apply::mend(&namespace, &[mend]));
        told.push(match result {
            Ok(()) => format!("done: {mend:?} in {name}"),
            Err(error) => format!("failed: in {name}: {error}"),
        });
    }
    told
}

fn report(args: &Args, look: &Look, mended: &[String]) -> u8 {
    let of_pod = |finding: &&Finding| args.pod.as_ref().is_none_or(|pod| finding.subject == *pod);
    let findings = look.findings.iter().filter(of_pod).collect::<Vec<_>>();
    let wrong = findings.iter().any(|finding| finding.severity != Severity::Note);
    let page = if args.asking.json {
        let findings = findings.iter().map(|finding| {
            json!({
                "name": finding.name, "severity": finding.severity.word(), "subject": finding.subject,
                "seen": finding.seen, "breaks": finding.breaks, "remedy": finding.remedy, "mendable": finding.mendable,
            })
        });
        let document = json!({
            "daemon": look.daemon, "pods": look.intent.as_ref().map(|intent| intent.pods.len() + intent.branches.len()),
            "enis": look.intent.as_ref().map(|intent| intent.enis.len()),
            "findings": findings.collect::<Vec<_>>(), "mended": mended,
        });
        format!("{document:#}\n")
    } else {
        page(args, look, &findings, mended)
    };
    match print(&page) {
        exit::OK if wrong => exit::DIFFERS,
        code => code,
    }
}

// Writing to a string cannot fail.
fn page(args: &Args, look: &Look, findings: &[&Finding], mended: &[String]) -> String {
    let mut page = String::new();
    for line in mended {
        let _ = writeln!(page, "{line}");
    }
    if let (Some(name), Some(intent)) = (&args.pod, &look.intent) {
        follow(&mut page, look, intent, name);
    }
    for finding in findings {
        let Finding { name, subject, seen, breaks, remedy, .. } = finding;
        let _ = writeln!(page, "{} {name} {subject}\n     seen    {seen}", finding.severity.word());
        let _ = writeln!(page, "     breaks  {breaks}\n     mend    {remedy}");
    }
    if findings.is_empty() {
        page.push_str("nothing is wrong\n");
    }
    page
}

// One pod from the store to its namespace.
fn follow(page: &mut String, look: &Look, intent: &Intent, name: &str) {
    let seats = doctor::pods::Seats::new(&look.seen, &look.namespaces);
    let mut pods = intent.pods.iter().filter(|pod| pod.name == name).peekable();
    if pods.peek().is_none() {
        let _ = writeln!(page, "no address is given to {name}");
    }
    for pod in pods {
        let eni = intent.enis.iter().find(|eni| eni.table == pod.table);
        let eni = eni.map_or("the primary ENI", |eni| eni.id.as_str());
        let _ = writeln!(page, "address   {} of {eni}, table {}", pod.address, pod.table);
        let seat = seats.of(&pod.veth, pod.address);
        if let Some(outer) = seat.outer {
            let mac = outer.mac.map(|mac| mac.to_string()).unwrap_or_default();
            let _ = writeln!(page, "veth      {} (index {}), MAC {mac}, mtu {}", outer.name, outer.index, outer.mtu);
        }
        let about = |net: Option<ipnet::IpNet>| net.is_some_and(|net| net == ipnet::IpNet::from(pod.address));
        for rule in look.seen.rules.iter().filter(|rule| about(rule.src) || about(rule.dst)) {
            let _ = writeln!(page, "rule      {rule}");
        }
        for route in look.seen.routes.iter().filter(|route| about(Some(route.dst))) {
            let _ = writeln!(page, "route     {route}");
        }
        if let Some((number, inner)) = seat.inner {
            let inside = &look.namespaces[number];
            let _ = writeln!(page, "inside    {} has {} (index {})", inside.path, inner.name, inner.index);
            for route in inside.side.routes.iter().filter(|route| route.dev == inner.index) {
                let _ = writeln!(page, "          route {route}");
            }
            for entry in inside.side.neighbours.iter().filter(|entry| entry.permanent) {
                let mac = entry.mac.map(|mac| mac.to_string()).unwrap_or_default();
                let _ = writeln!(page, "          neighbour {} {mac}", entry.addr);
            }
        }
    }
}
