//! `enibox doctor`: what is wrong with this node, what it breaks, how it was seen, how to mend it. With `--fix` it mends what
//! is ours.
//!
//! What should be comes from the daemon, what is from the kernel, and both are put before IMDS and EC2. The judgement is
//! `plan::doctor`'s. Mending takes the steps that the daemon takes, and leaves it the first word.

mod daemon;
mod follow;
pub(super) mod gather;
pub(super) mod known;

use self::known::Cloud;
use super::{Asking, METRICS, ask, complain, config, environment, print};
use crate::apply::{self, Host};
use crate::clock;
use crate::error::{Error, Result, exit};
use crate::model::limits;
use crate::model::naming::DAEMON_SOCKET;
use crate::model::net::Link;
use crate::model::settings::Settings;
use crate::netlink::netns::Namespace;
use crate::netlink::sysctl;
use crate::plan::doctor::environment::{self as surroundings, Facts};
use crate::plan::doctor::pods::{Inside, Place};
use crate::plan::doctor::{self, Finding, Severity, room};
use crate::plan::host::{Action, HostEni, Intent, Observation, Step, What};
use crate::plan::pod::inside::Mend;
use crate::rpc::grpc::Client;
use crate::rpc::health::SERVING;
use crate::rpc::proto::{HealthCheckRequest, HealthCheckResponse, path};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the daemon mends by itself it has mended after this time.
const DAEMON_MENDS: Duration = Duration::from_millis(1500);

/// Until the daemon has said that it serves.
const HEALTH_MAX: Duration = Duration::from_secs(2);

/// Whether the node is a router in IPv4.
const FORWARD: &str = "net/ipv4/ip_forward";

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
    /// What takes away rules of pods that nobody knows.
    strays: Vec<Step>,
    /// What there is of the pod that is followed, a line each.
    followed: Vec<String>,
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
    let of_pod = |finding: &Finding| finding.subject.contains('/') || finding.name.starts_with("egress-");
    if look.daemon && look.findings.iter().any(of_pod) {
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
        let (layered, wrong) = config::layered(environment);
        let settings = layered.settings;
        let mut findings = Vec::new();
        findings.extend(wrong.into_iter().map(|line| Finding::new("setting-ignored", "", line)));
        findings.extend(settings.check().err().map(|line| Finding::new("settings", "", line)));
        let cloud =
            Cloud::ask(&settings, &seen.links, with_ec2, |why| findings.push(Finding::new("imds-silent", "", why)));
        let mute = asked.is_err() && settings.introspection_disabled && serves();
        let daemon = mute || asked.is_ok();
        let intent = match asked {
            Ok(intent) => serde_json::from_value(intent)?,
            Err(error) => {
                let name = if mute { "introspection-off" } else { "daemon-silent" };
                findings.push(Finding::new(name, "", error.to_string()));
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

/// Whether the daemon answers for itself where pods ask for addresses.
fn serves() -> bool {
    let Ok(mut client) = Client::connect(Path::new(DAEMON_SOCKET), HEALTH_MAX) else { return false };
    let reply = client.call(path::HEALTH_CHECK, &HealthCheckRequest::default(), HEALTH_MAX);
    reply.is_ok_and(|reply: HealthCheckResponse| reply.status == SERVING)
}

fn look(args: &Args, environment: &Settings, host: &mut Host) -> Result<Look> {
    let root = args.root.as_path();
    let seen = host.observe()?;
    let source = Source::find(&args.asking, environment, &seen, !args.no_ec2)?;
    let Source { daemon, settings, cloud, intent, mut findings } = source;
    // Which sysctls are ours depends on the intent.
    let seen = intent.as_ref().map_or(Ok(seen), |intent| host.observe_for(intent))?;
    let status = if daemon { args.asking.ask(environment, "/v1/enibox/status") } else { Ok(Value::Null) };
    let status = status.unwrap_or_default();
    if !status.is_null() {
        let told = daemon::troubles(&status, &settings, clock::now().wall);
        // Its environment is this one's, as a rule.
        findings.extend(told.into_iter().filter(|finding| !findings.contains(finding)).collect::<Vec<_>>());
        if !settings.metrics_disabled
            && let Err(error) = ask::body(METRICS, "/metrics")
        {
            findings.push(Finding::new("metrics-port", "", error.to_string()));
        }
    }
    let mut facts = gather::facts(
        root,
        &known::store_of(&settings.backing_store, 0),
        Path::new(&settings.cni_bin_path),
        &seen.links,
    );
    gather::chains(&mut facts, host, &seen.tables)?;
    facts.trunk_capable = cloud.as_ref().is_some_and(|cloud| limits::takes_trunk(&cloud.identity.instance_type));
    facts.trunk = cloud.as_ref().is_some_and(Cloud::has_trunk);
    findings.extend(capacity(&settings, cloud.as_ref(), &status, &facts));
    findings.extend(surroundings::findings(intent.as_ref(), &seen, &settings, &facts));
    let (namespaces, mends, strays, followed) = <_>::default();
    let mut look = Look { daemon, intent, seen, namespaces, findings, mends, strays, followed };
    if let Some(intent) = &look.intent {
        look.namespaces = gather::namespaces(root);
        look.findings.extend(doctor::host(intent, &look.seen));
        for rule in doctor::strays(intent, &look.seen) {
            look.findings.push(Finding::new("stray-rule", "", format!("rule {rule}")));
            let text = format!("delete rule {rule}");
            look.strays.push(Step { what: What::GonePod, eni: None, action: Action::DeleteRule(rule), text });
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
    if let (Some(name), Some(intent)) = (&args.pod, &look.intent) {
        let mut names = intent.pods.iter().map(|pod| &pod.name).chain(intent.branches.iter().map(|pod| &pod.name));
        if !names.any(|known| known == name) {
            look.findings.push(Finding::new("pod-unknown", name, "no address of this node is given to it"));
        }
        look.followed = follow::lines(&look, intent, &settings, name);
    }
    doctor::rank(&mut look.findings);
    Ok(look)
}

// Room for pods, and the rest of their addresses. What the running daemon knows of the node counts more than tables and files.
fn capacity(settings: &Settings, cloud: Option<&Cloud>, status: &Value, facts: &Facts) -> Vec<Finding> {
    let number = |value: &Value| u32::try_from(value.as_u64()?).ok();
    let enis = number(&status["pool"]["eni_limit"]).filter(|enis| *enis > 0 && !settings.multi_nic);
    let limits = cloud.and_then(|cloud| cloud.limits(settings));
    let room = limits.and_then(|limits| room::of(settings, &limits, enis));
    let kubelet = number(&status["doing"]["kubelet_pods"]).or_else(|| room::of_kubelet(facts));
    let many = room.zip(kubelet).and_then(|(room, kubelet)| room::max_pods(&room, kubelet));
    let reused = status["pool"]["reused"].as_object().into_iter().flatten();
    let reused = reused.map(|(address, rest)| format!("{address} after {rest} s")).collect::<Vec<_>>();
    many.into_iter().chain(room::cool_down(settings, &reused.join(", "))).collect()
}

// First what the host's plan says, as the daemon would do it, then what it does not cover.
fn mend(look: &Look, host: &mut Host) -> Vec<String> {
    let mut told = Vec::new();
    // The daemon leaves it as the system has it; this is the operator's own wish.
    if look.findings.iter().any(|finding| finding.name == "ip-forward") {
        told.push(match sysctl::set(FORWARD, "1") {
            Ok(_) => format!("done: set sysctl {FORWARD} to 1"),
            Err(error) => format!("failed: {error}"),
        });
    }
    let Some(intent) = &look.intent else { return told };
    match host.host_with(intent, &mut |_, plan| plan.steps.retain(|step| !doctor::notes(step))) {
        Ok(report) => {
            told.extend(report.steps.into_iter().map(|step| format!("done: {}", step.text)));
            let refused = report.enis.into_iter().filter_map(|(eni, result)| Some(format!("{eni}: {}", result.err()?)));
            let failed = report.errors.iter().chain(&report.warnings);
            told.extend(failed.map(|(_, error)| format!("failed: {error}")));
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
    match host.take_away(&look.strays) {
        Ok((done, failed)) => {
            told.extend(done.into_iter().map(|step| format!("done: {}", step.text)));
            told.extend(failed.into_iter().map(|error| format!("failed: {error}")));
        }
        Err(error) => told.push(format!("failed: {error}")),
    }
    for (place, mend) in &look.mends {
        let (opened, name, links) = match place {
            Place::Host => (Namespace::own(), "the host", &look.seen.links),
            Place::Inside(number) => {
                let inside = &look.namespaces[*number];
                (same(inside), inside.path.as_str(), &inside.side.links)
            }
        };
        told.push(match opened.and_then(|namespace| apply::mend(&namespace, mend)) {
            Ok(text) => format!("done: {} in {name}", named(&text, links)),
            Err(error) => format!("failed: in {name}: {error}"),
        });
    }
    told
}

// The namespace that was looked at: a process's number, or a name, may be another's by now.
fn same(inside: &Inside) -> Result<Namespace> {
    let namespace = Namespace::open(Path::new(&inside.path))?;
    if namespace.id()? == inside.id { Ok(namespace) } else { Err(Error::new("the pod has gone meanwhile")) }
}

// With the links' names instead of their indexes.
fn named(text: &str, links: &[Link]) -> String {
    let name = |word: &str| {
        let index = word.strip_prefix("if")?.parse::<u32>().ok()?;
        links.iter().find(|link| link.index == index).map(|link| link.name.clone())
    };
    text.split(' ').map(|word| name(word).unwrap_or_else(|| word.to_owned())).collect::<Vec<_>>().join(" ")
}

// The pod's own, those of its ENI, and what the whole node has no network for.
fn concerns(finding: &Finding, pod: &str, intent: Option<&Intent>) -> bool {
    let table = |eni: &HostEni| eni.id.as_str() == finding.subject;
    let eni = intent.and_then(|intent| Some((intent, intent.enis.iter().find(|eni| table(eni))?.table)));
    let table_of = |intent: &Intent, table| intent.pods.iter().any(|held| held.name == pod && held.table == table);
    let trunk = |intent: &Intent| {
        let carries = intent.enis.iter().any(|eni| eni.trunk && eni.id.as_str() == finding.subject);
        carries && intent.branches.iter().any(|held| held.name == pod)
    };
    finding.subject == pod
        || (finding.subject.is_empty() && (finding.severity == Severity::Fail || finding.name == "sysctl"))
        || eni.is_some_and(|(intent, table)| table_of(intent, table))
        || intent.is_some_and(trunk)
}

fn report(args: &Args, look: &Look, mended: &[String]) -> u8 {
    let of_pod = |finding: &&Finding| args.pod.as_ref().is_none_or(|pod| concerns(finding, pod, look.intent.as_ref()));
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
            "findings": findings.collect::<Vec<_>>(), "mended": mended, "followed": look.followed,
        });
        format!("{document:#}\n")
    } else {
        page(look, &findings, mended)
    };
    match print(&page) {
        exit::OK if wrong => exit::DIFFERS,
        code => code,
    }
}

// Writing to a string cannot fail.
fn page(look: &Look, findings: &[&Finding], mended: &[String]) -> String {
    let mut page = String::new();
    for line in mended {
        let _ = writeln!(page, "{line}");
    }
    for line in &look.followed {
        let _ = writeln!(page, "{line}");
    }
    for finding in findings {
        let Finding { name, subject, seen, breaks, remedy, .. } = finding;
        let title = format!("{} {name} {subject}", finding.severity.word());
        let _ = writeln!(page, "{}\n     seen    {seen}", title.trim_end());
        let _ = writeln!(page, "     breaks  {breaks}\n     mend    {remedy}");
    }
    if findings.is_empty() {
        page.push_str("nothing is wrong\n");
    }
    page
}
