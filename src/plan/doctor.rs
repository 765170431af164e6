//! What is wrong with a node: findings from what its network should be, what it is, and what surrounds it. Pure: whoever
//! looks hands everything in, and the same look always finds the same.
//!
//! What is ours on the host is judged by the steps of `plan::host` alone, those that the daemon takes too, so that doctor
//! and repair never disagree.

pub mod cloud;
pub mod environment;
mod forward;
mod managers;
pub mod pods;
pub mod reasons;
pub mod room;
mod rules;
mod texts;
mod ways;

use super::host::{Action, HostBranch, HostPod, Intent, Observation, Step, What, diff, link_of, source, strangers};
use super::ruleset;
use crate::model::map::{Map, Set};
use crate::model::naming::{self, priority};
use crate::model::net::{Link, Rule, TABLE_MAIN};
use crate::model::order::{self, Gather as _};
use ipnet::IpNet;
use std::net::IpAddr;

/// Differences of the rule set that are told one by one; a table that is gone has dozens.
const RULESET_MAX: usize = 8;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something has no network or a wrong one.
    Fail,
    /// Something will go wrong, or may.
    Warn,
    /// Worth knowing; nothing is wrong.
    Note,
}

impl Severity {
    /// In capitals.
    pub fn word(self) -> &'static str {
        match self {
            Severity::Fail => "FAIL",
            Severity::Warn => "WARN",
            Severity::Note => "NOTE",
        }
    }
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its name, which never changes: lower case with hyphens.
    pub name: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// Whom it concerns: a pod as `namespace/name`, an ENI's id, or empty for the node.
    pub subject: String,
    /// What was seen.
    pub seen: String,
    /// What does not work because of it.
    pub breaks: &'static str,
    /// How to mend it.
    pub remedy: String,
    /// `doctor --fix` mends it.
    pub mendable: bool,
}

impl Finding {
    /// A finding with the texts of its name.
    pub fn new(name: &'static str, subject: impl Into<String>, seen: impl Into<String>) -> Finding {
        let (severity, breaks, remedy) = texts::of(name);
        let mendable = remedy.is_empty();
        let remedy = if mendable { "enibox doctor --fix" } else { remedy };
        Finding { name, severity, subject: subject.into(), seen: seen.into(), breaks, remedy: remedy.into(), mendable }
    }

    /// With the very command that mends it.
    #[must_use]
    pub fn mended_by(self, remedy: impl Into<String>) -> Finding {
        Finding { remedy: remedy.into(), ..self }
    }
}

/// The worst first, then by name and subject.
pub fn rank(findings: &mut [Finding]) {
    order::sort_by(findings, |a, b| (a.severity, a.name, &a.subject).cmp(&(b.severity, b.name, &b.subject)));
}

/// What the steps of the host's plan are for.
pub fn host(intent: &Intent, seen: &Observation) -> Vec<Finding> {
    let plan = match diff(intent, seen) {
        Ok(plan) => plan,
        Err(error) => return vec![Finding::new("no-plan", "", error.to_string())],
    };
    let (rules, steps) = plan.steps.into_iter().partition::<Vec<_>, _>(|step| step.what == What::Ruleset);
    let mut findings = told(intent, seen, &steps);
    if !rules.is_empty() {
        findings.extend(rules_of(intent, seen, &plan.primary.1));
    }
    findings.extend(ways::findings(intent, seen));
    findings.extend(carriers(intent, seen));
    for (eni, why) in &plan.failed {
        let finding = Finding::new("eni-unplugged", eni.as_str(), why.as_str());
        let mac = intent.enis.iter().find(|known| known.id == *eni).map(|known| known.mac);
        let taken = |link: &&Link| link.mac == mac && link.master.is_some() && link.kind.as_deref() != Some("bridge");
        findings.push(match seen.links.iter().find(taken) {
            Some(link) => finding.mended_by(format!("ip link set {} nomaster", link.name)),
            None => finding,
        });
    }
    let twins = seen.links.iter().filter(|link| link.mac == Some(intent.primary_mac));
    let twins = twins.filter(|link| link_of(std::slice::from_ref(link), intent.primary_mac).is_some());
    let twins = twins.map(|link| link.name.as_str()).collect::<Vec<_>>();
    if twins.len() > 1 {
        findings.push(Finding::new("primary-ambiguous", "", format!("{} have its MAC", twins.join(", "))));
    }
    findings
}

// ENIs whose link is up and has nothing at its other end.
fn carriers(intent: &Intent, seen: &Observation) -> Vec<Finding> {
    let enis = intent.enis.iter().map(|eni| (eni.id.as_str(), eni.mac));
    let dark = |(subject, mac)| {
        let link = link_of(&seen.links, mac).filter(|link| link.no_carrier)?;
        Some(Finding::new("no-carrier", subject, format!("{} is up and has no carrier", link.name)))
    };
    enis.chain([("", intent.primary_mac)]).filter_map(dark).collect()
}

/// What steps of the host's plan are for, all but those for the rule set.
fn told(intent: &Intent, seen: &Observation, steps: &[Step]) -> Vec<Finding> {
    let names = pod_names(intent);
    let seats = pods::Seats::new(seen, &[]);
    let seat = |pod: &HostPod| Some((seats.of(&pod.veth, pod.address).outer?.index, pod.address));
    let at = intent.pods.iter().filter_map(seat).gather::<Map<_, _>>();
    // `net/ipv4/conf/<link>/forwarding`.
    let link_of_setting = |path: &str| {
        let name = path.split('/').nth(3)?;
        seen.links.iter().find(|link| link.name == name).map(|link| link.index)
    };
    let finding = |step: &Step| {
        let address = match &step.action {
            Action::AddRule(rule) | Action::DeleteRule(rule) => address_of(rule),
            Action::ReplaceRoute(route) | Action::DeleteRoute(route) => single(route.dst),
            Action::SetUp(index) | Action::SetMtu(index, _) | Action::SetMac(index, _) | Action::Rename(index, _) => {
                at.get(index).copied()
            }
            Action::AddAddress(address) => at.get(&address.dev).copied(),
            Action::DeleteBarrier(barrier) => single(barrier.dst),
            Action::DeleteNeighbour(_, address) => Some(*address),
            Action::SetSysctl(path, _) => link_of_setting(path).and_then(|index| at.get(&index).copied()),
            _ => None,
        };
        let pod = address.and_then(|address| names.get(&address).copied());
        let pod = pod.or_else(|| of_branch(intent, seen, &step.action));
        let subject = step.eni.as_ref().map_or(pod.unwrap_or_default(), |eni| eni.as_str());
        let mut seen_as = evidence(&step.text);
        if let Action::ReplaceRoute(route) = &step.action
            && let Some(barrier) = seen.barriers.iter().find(|barrier| barrier.in_place_of(route))
        {
            seen_as = format!("{seen_as}; in its place is {barrier}");
        }
        Finding::new(step.what.name(), subject, seen_as)
    };
    steps.iter().filter(|step| !notes(step)).map(finding).collect()
}

/// Whether a step mends nothing, but notes what a veth of the original's has. That is the daemon's when it meets the veth: the
/// doctor sees more, both ends of the pair, and may find that what the host's end has is wrong.
pub fn notes(step: &Step) -> bool {
    step.what == What::PodNote
}

/// The pod whose branch ENI it is about: by its table, or by its device or the pod's veth.
fn of_branch<'a>(intent: &'a Intent, seen: &Observation, action: &Action) -> Option<&'a str> {
    let (table, link) = match action {
        Action::AddRule(rule) | Action::DeleteRule(rule) => (rule.table, 0),
        Action::ReplaceRoute(route) | Action::DeleteRoute(route) => (route.table, 0),
        Action::DeleteBarrier(barrier) => (barrier.table, 0),
        Action::AddVlan(eni, _) => (eni.table, 0),
        Action::SetUp(index) | Action::SetMtu(index, _) | Action::SetMac(index, _) => (0, *index),
        Action::AddAddress(address) => (0, address.dev),
        _ => return None,
    };
    let link = seen.links.iter().find(|there| there.index == link);
    let fits = |pod: &&HostBranch| {
        let named =
            |link: &Link| link.name == pod.eni.device() || (!pod.veth.is_empty() && link.name.ends_with(&pod.veth));
        pod.eni.table == table || link.is_some_and(named)
    };
    intent.branches.iter().find(fits).map(|pod| pod.name.as_str())
}

// The steps say what is to be done; turned round, that is what was seen.
fn evidence(text: &str) -> String {
    let (verb, thing) = text.split_once(' ').unwrap_or(("", text));
    match verb {
        "add" | "replace" => format!("missing: {thing}"),
        "delete" => format!("should not be: {thing}"),
        _ => format!("not so: {thing}"),
    }
}

fn rules_of(intent: &Intent, seen: &Observation, primary: &str) -> Vec<Finding> {
    let lines = ruleset::tables(intent, primary, &seen.links).map(|tables| ruleset::differences(&tables, &seen.tables));
    let mut lines = lines.unwrap_or_default();
    let more = lines.len().saturating_sub(RULESET_MAX);
    lines.truncate(RULESET_MAX);
    if more > 0 {
        lines.push(format!("{more} more differences"));
    }
    lines.into_iter().map(|line| Finding::new(What::Ruleset.name(), "", line)).collect()
}

fn pod_names(intent: &Intent) -> Map<IpAddr, &str> {
    let branches = intent.branches.iter().map(|pod| (pod.address, pod.name.as_str()));
    intent.pods.iter().map(|pod| (pod.address, pod.name.as_str())).chain(branches).gather()
}

fn address_of(rule: &Rule) -> Option<IpAddr> {
    rule.dst.and_then(single).or(rule.src.and_then(single))
}

/// Rules of ours that lead to or from an address which no pod has and no route serves: what a DEL has left behind. The
/// daemon knows the addresses of the pods that it has seen go; these are older. Those of pods with a branch ENI go when there is
/// no veth that may be such a pod's: while the daemon is away nobody knows these pods, and somebody may have flushed their routes.
pub fn strays(intent: &Intent, seen: &Observation) -> Vec<Rule> {
    let known = intent.pods.iter().map(|pod| pod.address).chain(intent.gone.iter().copied());
    let known = known.chain(intent.branches.iter().map(|pod| pod.address));
    let branch = |rule: &&Rule| naming::vlan_of_table(rule.table).is_some();
    let branches = strangers(intent, seen).then(|| seen.rules.iter().filter(branch).filter_map(source));
    let known = known.chain(branches.into_iter().flatten()).gather::<Set<_>>();
    let main = seen.routes.iter().filter(|route| route.table == TABLE_MAIN && route.gateway.is_none());
    let linked = main.filter_map(|route| single(route.dst)).gather::<Set<_>>();
    let stray = |rule: &&Rule| {
        let to = rule.dst.filter(|dst| **rule == Rule::to(*dst, priority::TO_POD, TABLE_MAIN)).and_then(single);
        let from = || source(rule).filter(|_| rule.table != TABLE_MAIN);
        to.or_else(from).is_some_and(|address| !known.contains(&address) && !linked.contains(&address))
    };
    seen.rules.iter().filter(stray).cloned().collect()
}

fn single(net: IpNet) -> Option<IpAddr> {
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
}

#[cfg(test)]
#[path = "doctor_tests.rs"]
mod tests;
