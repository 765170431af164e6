//! Keeping the host's network as it should be while others change it: what a notice of the kernel's means against the intent
//! ([`Watch`]), when to look ([`Pace`]), and whom not to fight ([`Quarrels`]). Pure.
//!
//! A notice only ever leads to a full look; what is then done is [`diff`](super::host::diff)'s. So a notice that says too much
//! costs a look, and one that is lost or misread costs the time until the next regular one. Plugins make a dozen
//! notices with every ADD and DEL, and none of them may cost a look: they concern pods that are not in the intent, because
//! an ADD is not over yet or because the pod was released.

use super::host::{HostEni, Intent, Observation, Step, What, forwarding, global, link_of, made_with, single, veths_of};
use crate::model::map::Map;
use crate::model::naming::{self, priority};
use crate::model::net::{Family, Link, Mac, Route, Rule, TABLE_LOCAL, TABLE_MAIN};
use crate::model::notice::Notice;
use crate::model::order::Gather as _;
use crate::model::time::Mono;
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// In place of an interface's index: the settings of all (NETCONFA_IFINDEX_ALL in `linux/netconf.h`).
const ALL: i32 = -1;

/// What is watched.
#[derive(Debug, Default)]
pub struct Watch {
    intent: Intent,
    /// Pods by address: table, and index of the link that leads there, 0 if it is not known.
    pods: Map<IpAddr, (u32, u32)>,
    /// Links that matter, as they should be.
    links: Map<u32, Wanted>,
    /// Index of the primary ENI's link.
    primary: u32,
}

#[derive(Debug)]
struct Wanted {
    name: String,
    mac: Option<Mac>,
    mtu: Option<u32>,
    /// Position in the intent's ENIs.
    eni: Option<usize>,
    /// Whether the link must be up.
    up: bool,
    /// A VLAN device, which is made again when it goes.
    device: bool,
}

impl Watch {
    /// Watches for changes of `seen`, which is about as `intent` wants it.
    pub fn new(intent: &Intent, seen: &Observation) -> Watch {
        let mut links = Map::new();
        let eni_link = |mac, eni, up| {
            let link = link_of(&seen.links, mac)?;
            let mtu = Some(intent.eni_mtu);
            Some((link.index, Wanted { name: link.name.clone(), mac: Some(mac), mtu, eni, up, device: false }))
        };
        let primary = eni_link(intent.primary_mac, None, false);
        let index = primary.as_ref().map_or(0, |(index, _)| *index);
        links.extend(primary);
        let enis = intent.enis.iter().enumerate();
        links.extend(enis.filter_map(|(position, eni)| eni_link(eni.mac, Some(position), true)));
        let veths = veths_of(intent, &seen.links);
        links.extend(veths.values().map(|link| {
            let (mac, mtu) = made_with(link).unzip();
            (link.index, Wanted { name: link.name.clone(), mac, mtu, eni: None, up: true, device: false })
        }));
        let devices = intent.branches.iter().filter_map(|pod| {
            let name = pod.eni.device();
            let link = seen.links.iter().find(|link| link.name == name)?;
            let mtu = Some(intent.eni_mtu);
            let wanted = Wanted { name, mac: Some(pod.eni.mac), mtu, eni: None, up: true, device: true };
            Some((link.index, wanted))
        });
        links.extend(devices.filter(|(_, wanted)| wanted.mac != Some(Mac::default())));
        let dev = |veth: &str| veths.get(veth).map_or(0, |link| link.index);
        let pods = intent.pods.iter().map(|pod| (pod.address, (pod.table, dev(&pod.veth))));
        let branches = intent.branches.iter().map(|pod| (pod.address, (pod.eni.table, dev(&pod.veth))));
        let pods = pods.chain(branches);
        Watch { intent: intent.clone(), pods: pods.gather(), links, primary: index }
    }

    /// What the host's network should be.
    pub fn intent(&self) -> &Intent {
        &self.intent
    }

    /// The pod with this address is being deleted: what goes of it now is to go. The index of its veth if it has a branch ENI.
    pub fn release(&mut self, address: IpAddr) -> Option<u32> {
        let (_, dev) = self.pods.remove(&address)?;
        self.links.remove(&dev);
        self.intent.pods.retain(|pod| pod.address != address);
        let at = self.intent.branches.iter().position(|pod| pod.address == address)?;
        let device = self.intent.branches.remove(at).eni.device();
        self.links.retain(|_, wanted| wanted.name != device);
        Some(dev)
    }

    /// Whether the change may have made something wrong.
    pub fn concerns(&self, notice: &Notice) -> bool {
        match notice {
            Notice::Overrun => true,
            Notice::Ruleset { tables, .. } => tables.contains(naming::NFT_TABLE),
            Notice::Link(link) => self.link(link),
            // Of the others nothing can be put back; what is missing then is told by the regular look.
            Notice::LinkGone(link) => self.links.get(&link.index).is_some_and(|wanted| wanted.device),
            Notice::Address(address) => self.eni_of(address.dev).is_some_and(|eni| {
                let family = eni.own.addr().is_ipv4() == address.addr.addr().is_ipv4();
                family && eni.own != address.addr && global(address.addr.addr())
            }),
            Notice::AddressGone(address) => {
                let gone = address.addr;
                let own = matches!(gone.addr(), IpAddr::V6(v6) if v6.is_unicast_link_local());
                (own && self.intent.v6 && self.links.contains_key(&address.dev))
                    || self.eni_of(address.dev).is_some_and(|eni| eni.own == gone)
            }
            Notice::Route(route) => self.route(route),
            Notice::RouteGone(route) => self.route_gone(route),
            Notice::Rule(rule) => !rule.foreign && self.claims(rule) && !self.wants(rule),
            Notice::RuleGone(rule) => !rule.foreign && self.wants(rule),
            Notice::Conf { family: Family::V4, dev, rp_filter: Some(value), .. }
                if i64::from(*dev) == i64::from(self.primary) =>
            {
                *value != 2
            }
            Notice::Conf { family, dev: ALL, forwarding: Some(0), .. } => forwarding(&self.intent, *family).is_some(),
            Notice::Conf { .. } => false,
        }
    }

    fn eni_of(&self, dev: u32) -> Option<&HostEni> {
        self.intent.enis.get(self.links.get(&dev)?.eni?)
    }

    fn link(&self, link: &Link) -> bool {
        match self.links.get(&link.index) {
            Some(wanted) => {
                link.name != wanted.name
                    || (wanted.up && !link.up)
                    || wanted.mac.is_some_and(|mac| link.mac != Some(mac))
                    || wanted.mtu.is_some_and(|mtu| link.mtu != mtu)
            }
            // An ENI's that was missing.
            None => link
                .mac
                .is_some_and(|mac| mac == self.intent.primary_mac || self.intent.enis.iter().any(|eni| eni.mac == mac)),
        }
    }

    fn pod_of(&self, net: Option<IpNet>) -> Option<(u32, u32)> {
        self.pods.get(&single(net?)?).copied()
    }

    fn route(&self, route: &Route) -> bool {
        if let Some(eni) = self.intent.enis.iter().find(|eni| eni.table == route.table) {
            let ours = self.eni_of(route.dev).is_some_and(|other| other.id == eni.id);
            let wanted = match route.gateway {
                None => single(route.dst) == Some(eni.gateway),
                Some(gateway) => route.dst.prefix_len() == 0 && gateway == eni.gateway,
            };
            // Others' routes to other places may stand beside ours.
            return !(ours && wanted) && (route.dst.prefix_len() == 0 || single(route.dst) == Some(eni.gateway));
        }
        if route.table != TABLE_MAIN {
            return self.is_of_branch(route.table);
        }
        match self.pod_of(Some(route.dst)) {
            Some((_, dev)) => dev != route.dev,
            None => self.eni_of(route.dev).is_some_and(|eni| eni.own.trunc() == route.dst),
        }
    }

    fn route_gone(&self, route: &Route) -> bool {
        if route.table == TABLE_MAIN {
            return self.pod_of(Some(route.dst)).is_some_and(|(_, dev)| dev == 0 || dev == route.dev);
        }
        self.intent.enis.iter().any(|eni| eni.table == route.table) || self.is_of_branch(route.table)
    }

    fn is_of_branch(&self, table: u32) -> bool {
        self.intent.branches.iter().any(|pod| pod.eni.table == table)
    }

    // Whether a rule belongs to a class in which the plan deletes what it does not want.
    fn claims(&self, rule: &Rule) -> bool {
        match rule.priority {
            priority::MARK => rule.fwmark.is_some_and(|(mark, mask)| mark == mask),
            priority::EXTERNAL_SERVICE => rule.dst.is_some(),
            priority::FROM_POD => self.pod_of(rule.src).is_some(),
            priority::FROM_ENI => naming::in_eni_ranges(rule.table),
            priority::LOCAL | priority::LOCAL_MOVED => rule.table == TABLE_LOCAL,
            _ => false,
        }
    }

    fn wants(&self, rule: &Rule) -> bool {
        let intent = &self.intent;
        match rule.priority {
            priority::TO_POD => rule.table == TABLE_MAIN && self.pod_of(rule.dst).is_some(),
            priority::FROM_POD => self.pod_of(rule.src).is_some_and(|(table, _)| table == rule.table),
            priority::MARK => {
                (intent.node_port || !intent.external_snat)
                    && rule.table == TABLE_MAIN
                    && rule.fwmark == Some((intent.mark, intent.mark))
            }
            priority::EXTERNAL_SERVICE => {
                let dst = rule.dst.map(|net| net.trunc());
                intent.external_service_cidrs.iter().any(|net| Some(net.trunc()) == dst)
            }
            priority::FROM_ENI => intent
                .enis
                .iter()
                .any(|eni| !eni.trunk && eni.table == rule.table && rule.src.and_then(single) == Some(eni.own.addr())),
            // The rule for the VPC's IPv6 router stands where that for all local addresses has left.
            priority::LOCAL => rule.table == TABLE_LOCAL && rule.src.is_some() == intent.strict_branches,
            priority::LOCAL_MOVED => rule.table == TABLE_LOCAL && intent.strict_branches,
            priority::BRANCH => self.is_of_branch(rule.table),
            _ => false,
        }
    }
}

/// When to look: soon after a notice, but not at every one of many. The pause between two looks is [`Pace::FIRST`]; when
/// [`Pace::SPURT`] looks have followed each other like that, it becomes twice as long with each, up to [`Pace::LAST`]. It is
/// never less than ten times what a look takes.
#[derive(Debug, Default)]
pub struct Pace {
    due: Option<Mono>,
    ended: Option<Mono>,
    pause: Duration,
    took: Duration,
    /// Looks that followed each other.
    streak: u32,
    /// When something is tried again that was left for later.
    later: Option<Mono>,
}

impl Pace {
    /// Between a notice and the look, so that a flush of many entries is seen as one.
    pub const SETTLE: Duration = Duration::from_millis(10);
    /// Shortest pause between two looks.
    pub const FIRST: Duration = Duration::from_millis(100);
    /// Looks that follow each other before the pauses grow.
    pub const SPURT: u32 = 10;
    /// Longest pause between two looks.
    pub const LAST: Duration = Duration::from_secs(1);

    /// A notice asks for a look.
    pub fn ask(&mut self, now: Mono) {
        if self.due.is_some() {
            return;
        }
        let mut due = now.plus(Self::SETTLE);
        if let Some(ended) = self.ended {
            let next = ended.plus(self.pause.max(self.took.saturating_mul(10)).min(Self::LAST));
            let calm = ended.plus(self.pause.saturating_mul(2));
            self.streak = if now > calm { 0 } else { self.streak.saturating_add(1) };
            self.pause = match self.streak {
                0..Self::SPURT => Self::FIRST,
                _ => self.pause.saturating_mul(2).min(Self::LAST),
            };
            due = due.max(next);
        }
        self.due = Some(due);
    }

    /// When the next look is due.
    pub fn due(&self) -> Option<Mono> {
        self.due.into_iter().chain(self.later).min()
    }

    /// Something was left for later.
    pub fn leave(&mut self, until: Mono) {
        self.later = Some(self.later.map_or(until, |later| later.min(until)));
    }

    /// A look has ended that took so long; whatever was asked for before is answered by it.
    pub fn looked(&mut self, now: Mono, took: Duration) {
        (self.due, self.later) = (None, None);
        self.ended = Some(now);
        self.took = took;
        self.pause = self.pause.max(Self::FIRST);
    }
}

/// Repairs that somebody else undoes again and again.
#[derive(Debug, Default)]
pub struct Quarrels {
    repairs: Map<(What, String), Quarrel>,
}

#[derive(Debug)]
struct Quarrel {
    times: u32,
    last: Mono,
    told: bool,
}

/// Whether a repair is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Mend,
    /// It was made too often, and waits until then. This is the first time that it does.
    GiveWay(Mono),
    /// It waits until then.
    Hold(Mono),
}

impl Quarrels {
    /// Repairs of one thing at full speed, each within [`Quarrels::MEMORY`] of the one before. After those the pauses grow
    /// from one second to [`Quarrels::PAUSE_MAX`].
    pub const TIMES_MAX: u32 = 5;
    /// Longest pause.
    pub const PAUSE_MAX: Duration = Duration::from_secs(30);
    /// How long a repair is remembered that nobody undoes.
    pub const MEMORY: Duration = Duration::from_mins(2);
    /// Repairs that are remembered; further ones are made as if nobody undid them.
    pub const LENGTH_MAX: usize = 4096;

    /// Forgets the repairs that nobody undoes.
    pub fn forget(&mut self, now: Mono) {
        self.repairs.retain(|_, quarrel| now.since(quarrel.last) < Self::MEMORY);
    }

    /// Judges a repair that a notice has led to; `regular` ones are always made, and noted.
    pub fn judge(&mut self, now: Mono, step: &Step, regular: bool) -> Verdict {
        // What differs in the tables is not always the same rule of them.
        let subject = if step.what == What::Ruleset { String::new() } else { step.text.clone() };
        let key = (step.what, subject);
        if self.repairs.len() >= Self::LENGTH_MAX && !self.repairs.contains_key(&key) {
            return Verdict::Mend;
        }
        let quarrel = self.repairs.entry(key).or_insert(Quarrel { times: 0, last: now, told: false });
        let pause = match quarrel.times.checked_sub(Self::TIMES_MAX) {
            None => Duration::ZERO,
            Some(more) => Duration::from_secs(1 << more.min(5)).min(Self::PAUSE_MAX),
        };
        let until = quarrel.last.plus(pause);
        if regular || until <= now {
            quarrel.times = quarrel.times.saturating_add(1);
            quarrel.last = now;
            return Verdict::Mend;
        }
        if std::mem::replace(&mut quarrel.told, true) { Verdict::Hold(until) } else { Verdict::GiveWay(until) }
    }
}

#[cfg(test)]
#[path = "repair_tests.rs"]
mod tests;
