//! Keeping the host's network as it should be while others change it: what a notice of the kernel's means against the intent
//! ([`Watch`]), when to look ([`Pace`]), and whom not to fight ([`Quarrels`]). Pure.
//!
//! A notice only ever leads to a full look; what is then done is [`diff`](super::host::diff)'s. So a notice that says too much
//! costs a look, and one that is lost or misread costs the time until the next regular one. Plugins make a dozen
//! notices with every ADD and DEL, and none of them may cost a look: they concern pods that are not in the intent, because
//! an ADD is not over yet or because the pod was released.

use super::egress::HostEnd;
use super::host::{
    HostEni, Intent, Observation, Step, What, diverted, forwarding, global, leads_to_main, link_of, made_with, serves,
    single, strange_mac, veths_of,
};
use super::ruleset::IPVS_LINK;
use crate::model::map::{Map, Set};
use crate::model::naming::{self, priority};
use crate::model::net::{Barrier, Family, Link, Mac, Route, Rule, TABLE_LOCAL, TABLE_MAIN};
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
    /// The link of a kube-proxy in ipvs mode was there, for which the tables have chains of their own.
    ipvs: bool,
    /// Host ends of ways out in the other family that are not as they should be, or on their way out.
    doubtful: Set<u32>,
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
    /// The address of the host's end of a way out in the other family.
    gateway: Option<IpAddr>,
}

impl Wanted {
    /// Of a link that must be up.
    fn new(name: &str, mac: Option<Mac>, mtu: Option<u32>) -> Wanted {
        Wanted { name: name.into(), mac, mtu, eni: None, up: true, device: false, gateway: None }
    }
}

impl Watch {
    /// Watches for changes of `seen`, which is about as `intent` wants it.
    pub fn new(intent: &Intent, seen: &Observation) -> Watch {
        let mut links = Map::new();
        let eni_link = |mac, eni, up| {
            let link = link_of(&seen.links, mac)?;
            let mtu = Some(intent.eni_mtu);
            Some((link.index, Wanted { eni, up, ..Wanted::new(&link.name, Some(mac), mtu) }))
        };
        let primary = eni_link(intent.primary_mac, None, false);
        let index = primary.as_ref().map_or(0, |(index, _)| *index);
        links.extend(primary);
        let enis = intent.enis.iter().enumerate();
        links.extend(enis.filter_map(|(position, eni)| eni_link(eni.mac, Some(position), true)));
        let veths = veths_of(intent, &seen.links);
        links.extend(veths.values().map(|link| {
            let (mac, mtu) = made_with(link).unzip();
            (link.index, Wanted::new(&link.name, mac, mtu))
        }));
        let devices = intent.branches.iter().filter_map(|pod| {
            let name = pod.eni.device();
            let link = seen.links.iter().find(|link| link.name == name)?;
            let mtu = Some(intent.eni_mtu);
            let wanted = Wanted { device: true, ..Wanted::new(&name, Some(pod.eni.mac), mtu) };
            Some((link.index, wanted))
        });
        links.extend(devices.filter(|(_, wanted)| wanted.mac != Some(Mac::default())));
        let dev = |veth: &str| veths.get(veth).map_or(0, |link| link.index);
        let pods = intent.pods.iter().map(|pod| (pod.address, (pod.table, dev(&pod.veth))));
        let branches = intent.branches.iter().map(|pod| (pod.address, (pod.eni.table, dev(&pod.veth))));
        let pods = pods.chain(branches);
        let (pods, doubtful) = (pods.gather(), Set::new());
        let ipvs = seen.links.iter().any(|link| link.name == IPVS_LINK);
        let mut watch = Watch { intent: intent.clone(), pods, links, primary: index, ipvs, doubtful };
        seen.links.iter().for_each(|link| watch.learn(link));
        watch
    }

    /// Watches over a pod's way out in the other family as well, of which only the link itself tells.
    fn learn(&mut self, link: &Link) {
        if let Some(end) = HostEnd::of(link) {
            let name = end.name();
            let wanted = Wanted::new(name.as_ref().unwrap_or(&link.name), Some(end.mac), Some(end.mtu));
            self.links.insert(link.index, Wanted { gateway: Some(end.gateway), ..wanted });
            self.pods.insert(end.pod, (TABLE_MAIN, link.index));
        }
    }

    /// Whether the change may have made something wrong. What goes of a pod's way out in the other family may go with its pod, of
    /// which nobody tells: that makes a doubt, and no more if the link goes as well.
    pub fn hear(&mut self, notice: &Notice) -> bool {
        let concerns = self.concerns(notice);
        let dev = match notice {
            Notice::Link(link) | Notice::LinkGone(link) => link.index,
            Notice::AddressGone(address) => address.dev,
            Notice::RouteGone(route) => route.dev,
            _ => return concerns,
        };
        let known = self.links.get(&dev).is_some_and(|wanted| wanted.gateway.is_some());
        match notice {
            Notice::LinkGone(_) if known => {
                self.links.remove(&dev);
                self.pods.retain(|_, (_, led)| *led != dev);
                self.doubtful.remove(&dev);
            }
            // An ADD sets the link up when all else but the route is there.
            Notice::Link(link) if link.up && !self.links.contains_key(&dev) => self.learn(link),
            _ if known && concerns => drop(self.doubtful.insert(dev)),
            _ => {}
        }
        concerns && !known
    }

    /// Whether there are doubts.
    pub fn doubts(&self) -> bool {
        !self.doubtful.is_empty()
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
    fn concerns(&self, notice: &Notice) -> bool {
        match notice {
            Notice::Overrun => true,
            Notice::Ruleset { tables, .. } => tables.contains(naming::NFT_TABLE),
            Notice::Link(link) => self.link(link) || (!self.ipvs && link.name == IPVS_LINK),
            // Of the others nothing can be put back; what is missing then is told by the regular look.
            Notice::LinkGone(link) => self.links.get(&link.index).is_some_and(|wanted| wanted.device),
            Notice::Address(address) => self.eni_of(address.dev).is_some_and(|eni| {
                let family = eni.own.addr().is_ipv4() == address.addr.addr().is_ipv4();
                family && eni.own != address.addr && global(address.addr.addr())
            }),
            Notice::AddressGone(address) => {
                let gone = address.addr;
                let own = matches!(gone.addr(), IpAddr::V6(v6) if v6.is_unicast_link_local());
                let wanted = self.links.get(&address.dev);
                (own && self.intent.v6 && wanted.is_some())
                    || wanted.is_some_and(|wanted| wanted.gateway == Some(gone.addr()))
                    || self.eni_of(address.dev).is_some_and(|eni| eni.own == gone)
            }
            Notice::Route(route) => self.route(route),
            Notice::Barrier(barrier) => self.barrier(barrier),
            Notice::RouteGone(route) => self.route_gone(route),
            Notice::Neighbour(entry) => self.pods.get(&entry.addr).is_some_and(|(_, dev)| *dev == entry.dev),
            Notice::Rule(rule) => !rule.foreign && self.claims(rule) && !self.wants(rule),
            Notice::RuleGone(rule) => !rule.foreign && self.wants(rule),
            Notice::Conf { family: Family::V4, dev, rp_filter: Some(value), .. }
                if i64::from(*dev) == i64::from(self.primary) =>
            {
                *value != 2
            }
            Notice::Conf { family, dev: ALL, forwarding: Some(0), .. } => self.forwards(*family).is_some(),
            Notice::Conf { family: family @ Family::V4, dev, forwarding: Some(0), .. } => {
                let primary = |dev: u32| dev == self.primary;
                let egress = |dev: &u32| self.links.get(dev).is_some_and(|wanted| wanted.gateway.is_some());
                let six = |dev| self.forwards(*family).is_some() && (primary(dev) || egress(&dev));
                let four = |dev| !primary(dev) && self.links.contains_key(&dev);
                u32::try_from(*dev).is_ok_and(|dev| if self.intent.v6 { six(dev) } else { four(dev) })
            }
            Notice::Conf { .. } => false,
        }
    }

    fn forwards(&self, family: Family) -> Option<&'static str> {
        forwarding(self.intent.v6, self.intent.egress, family)
    }

    fn eni_of(&self, dev: u32) -> Option<&HostEni> {
        self.intent.enis.get(self.links.get(&dev)?.eni?)
    }

    fn link(&self, link: &Link) -> bool {
        let Some(wanted) = self.links.get(&link.index) else {
            // That of a pod whose ADD has only just ended, or an ENI's that was missing.
            let enis = || self.intent.enis.iter().map(|eni| eni.mac);
            let known = |mac: Mac| mac == self.intent.primary_mac || enis().any(|other| other == mac);
            return strange_mac(link) || link.mac.is_some_and(known);
        };
        link.name != wanted.name
            || (wanted.up && !link.works())
            || wanted.mac.is_some_and(|mac| link.mac != Some(mac))
            || wanted.mtu.is_some_and(|mtu| link.mtu != mtu)
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

    // It has taken the place of one of ours, which is not told by itself.
    fn barrier(&self, barrier: &Barrier) -> bool {
        if barrier.table == TABLE_MAIN {
            return self.pod_of(Some(barrier.dst)).is_some();
        }
        let of = |eni: &HostEni| barrier.dst.prefix_len() == 0 || single(barrier.dst) == Some(eni.gateway);
        self.intent.enis.iter().any(|eni| eni.table == barrier.table && of(eni)) || self.is_of_branch(barrier.table)
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
            priority::EXTERNAL_SERVICE => true,
            priority::FROM_POD => self.pod_of(rule.src).is_some(),
            priority::FROM_ENI => naming::in_eni_ranges(rule.table),
            priority::LOCAL | priority::LOCAL_MOVED => rule.table == TABLE_LOCAL,
            _ => {
                let led = diverted(rule).and_then(|pod| self.pods.get(&pod));
                led.is_some_and(|(table, _)| *table != rule.table)
            }
        }
    }

    fn wants(&self, rule: &Rule) -> bool {
        let intent = &self.intent;
        match rule.priority {
            priority::TO_POD => rule.table == TABLE_MAIN && self.pod_of(rule.dst).is_some(),
            priority::FROM_POD => {
                rule.dst.is_none() && self.pod_of(rule.src).is_some_and(|(table, _)| table == rule.table)
            }
            priority::MARK => {
                (intent.node_port || !intent.external_snat)
                    && rule.table == TABLE_MAIN
                    && rule.fwmark == Some((intent.mark, intent.mark))
            }
            priority::EXTERNAL_SERVICE => {
                let wanted = |net: &IpNet| Rule::to(net.trunc(), rule.priority, TABLE_MAIN) == *rule;
                intent.external_service_cidrs.iter().any(wanted)
            }
            priority::FROM_ENI => intent
                .enis
                .iter()
                .any(|eni| !eni.trunk && eni.table == rule.table && rule.src.and_then(single) == Some(eni.own.addr())),
            // The rule for the VPC's IPv6 router stands where that for all local addresses has left.
            priority::LOCAL => rule.table == TABLE_LOCAL && rule.src.is_some() == intent.strict_branches,
            // Where strict mode was, its pods may need it still.
            priority::LOCAL_MOVED => rule.table == TABLE_LOCAL,
            priority::BRANCH => self.is_of_branch(rule.table),
            // The kernel's, wherever somebody has moved it.
            _ => leads_to_main(rule) && serves(intent, rule.family),
        }
    }
}

/// When to look: soon after a notice, but not at every one of many. The pause between two looks is [`Pace::FIRST`]; when
/// [`Pace::SPURT`] looks have followed each other like that, it becomes twice as long with each, up to [`Pace::LAST`]. Up to
/// that, it is never less than ten times what a look takes. A doubt counts as a notice does, once it has led to a look.
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
    /// When a doubt becomes a reason.
    doubt: Option<Mono>,
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
    /// How long a doubt may settle by itself.
    pub const DOUBT: Duration = Duration::from_millis(100);

    /// A notice asks for a look.
    pub fn ask(&mut self, now: Mono) {
        if self.due.is_some() {
            return;
        }
        let due = now.plus(Self::SETTLE);
        self.due = Some(self.ended.map_or(due, |ended| self.next(ended).max(due)));
        self.count(now);
    }

    /// One more reason to look, at this time.
    fn count(&mut self, now: Mono) {
        let Some(ended) = self.ended else { return };
        let calm = ended.plus(self.pause.saturating_mul(2));
        self.streak = if now > calm { 0 } else { self.streak.saturating_add(1) };
        self.pause = match self.streak {
            0..Self::SPURT => Self::FIRST,
            _ => self.pause.saturating_mul(2).min(Self::LAST),
        };
    }

    fn next(&self, ended: Mono) -> Mono {
        ended.plus(self.pause.max(self.took.saturating_mul(10)).min(Self::LAST))
    }

    /// There are doubts, or there are none any more.
    pub fn doubt(&mut self, now: Mono, doubts: bool) {
        let until = now.plus(Self::DOUBT);
        let until = self.doubt.unwrap_or_else(|| self.ended.map_or(until, |ended| self.next(ended).max(until)));
        self.doubt = doubts.then_some(until);
    }

    /// When the next look is due.
    pub fn due(&self) -> Option<Mono> {
        self.due.into_iter().chain(self.later).chain(self.doubt).min()
    }

    /// Something was left for later.
    pub fn leave(&mut self, until: Mono) {
        self.later = Some(self.later.map_or(until, |later| later.min(until)));
    }

    /// A look has ended that took so long; whatever was asked for before is answered by it.
    pub fn looked(&mut self, now: Mono, took: Duration) {
        // Mostly a doubt settles by itself: only one that did not is a reason.
        let doubt = self.doubt.filter(|doubt| self.due.is_none() && *doubt <= now.minus(took));
        if let Some(doubt) = doubt {
            self.count(doubt.minus(Self::DOUBT));
        }
        (self.due, self.later, self.doubt) = (None, None, None);
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

    fn key(step: &Step) -> (What, String) {
        // What differs in the tables is not always the same rule of them.
        (step.what, if step.what == What::Ruleset { String::new() } else { step.text.clone() })
    }

    /// A repair that was to be made, and was not after all: there was nothing that somebody could undo.
    pub fn not_made(&mut self, step: &Step) {
        if let Some(quarrel) = self.repairs.get_mut(&Self::key(step)) {
            quarrel.times = quarrel.times.saturating_sub(1);
        }
    }

    /// Judges a repair that a notice has led to; `regular` ones are always made, and noted.
    pub fn judge(&mut self, now: Mono, step: &Step, regular: bool) -> Verdict {
        let key = Self::key(step);
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
