//! Entries of pods in shared tables, which the plugin makes and the daemon watches (`spec/dataplane.md` 9).

use super::planner::Planner;
use super::{Action, HostPod, Intent, Observation, What, link_of, single};
use crate::model::map::{Map, Set};
use crate::model::naming::{self, priority};
use crate::model::net::{Link, Mac, Route, Rule, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::plan::branch::link_route;
use ipnet::IpNet;
use std::cell::LazyCell;
use std::net::IpAddr;

impl Planner<'_> {
    /// Every pod address that is wired up has its way in and exactly the rule of its ENI's table. One that is not may be in
    /// the middle of an ADD, which makes them itself, or of a DEL, after which they would be left over.
    pub(super) fn pods(&mut self, branches: &[HostPod]) {
        let (intent, seen) = (self.intent, self.seen);
        let (index, veths) = (PodEntries::new(intent, seen), veths_of(intent, &seen.links));
        for pod in &intent.branches {
            if let Some(link) = veths.get(pod.veth.as_str()) {
                self.pod_name(link, &pod.veth);
            }
        }
        for HostPod { address, table, veth, .. } in intent.pods.iter().chain(branches) {
            let host = IpNet::from(*address);
            let from = (*table != TABLE_MAIN).then(|| Rule::from(host, priority::FROM_POD, *table));
            let link = veths.get(veth.as_str()).copied();
            let link = link.or_else(|| index.led_to(*address, seen).filter(|_| !veth.is_empty()));
            if let Some(link) = link {
                self.pod_name(link, veth);
                self.pod_link(link);
                self.pod_route(*address, link, &index);
                self.want_asking(*address, link);
            }
            if link.is_some() || index.routes.contains_key(address) {
                if let Some(rule) = &from {
                    self.want_rule(What::FromPodRule, None, rule.clone());
                }
                self.want_rule(What::ToPodRule, None, Rule::to(host, priority::TO_POD, TABLE_MAIN));
            }
            // One behind ours that leads to the same table leads no packet astray.
            let wrong = |rule: &Rule| {
                if rule.priority == priority::FROM_POD { Some(rule) != from.as_ref() } else { rule.table != *table }
            };
            for rule in index.rules.get(address).into_iter().flatten().filter(|rule| wrong(rule)) {
                let text = format!("delete rule {rule}");
                self.delete(What::FromPodRule, None, Action::DeleteRule((*rule).clone()), text);
            }
        }
    }

    /// The host's end of a veth has the name that it was made with: rules for traffic of pods go by its beginning.
    pub(super) fn pod_name(&mut self, link: &Link, veth: &str) {
        if link.name.ends_with(veth) {
            return;
        }
        let noted = naming::name_of_veth_alias(&link.alias).filter(|name| name.ends_with(veth)).map(str::to_owned);
        let name = noted.unwrap_or_else(|| [self.intent.veth_prefix.as_str(), veth].concat());
        self.give_name_back(What::PodName, link, name);
    }

    /// The host's end of a veth is up, with the MAC and the MTU that it was made with, and with an address from which the host
    /// asks for an IPv6 pod's MAC. One of the original's does not tell what it was made with: what it has when we meet it is
    /// noted on it, and kept from then on.
    pub(super) fn pod_link(&mut self, link: &Link) {
        if let Some((mac, mtu)) = made_with(link) {
            let whole = link.name.len() >= naming::SUFFIX_LEN; // and so its own name
            if naming::name_of_veth_alias(&link.alias).is_none() && link.up && whole {
                let text = format!("note mac {mac} mtu {mtu} on {}", link.name);
                self.add(What::PodNote, None, Action::NoteVeth(link.index, mac, mtu, link.name.clone()), text);
            }
            if link.mac != Some(mac) {
                let text = format!("set address {mac} on {}", link.name);
                self.add(What::PodMac, None, Action::SetMac(link.index, mac), text);
            }
            if link.mtu != mtu {
                let text = format!("set mtu {mtu} on {}", link.name);
                self.add(What::PodMtu, None, Action::SetMtu(link.index, mtu), text);
            }
        }
        self.want_forwarding(None, link);
        self.want_conf6(link);
        if !link.works() {
            self.set_up(What::PodLink, None, link);
        } else if self.intent.v6
            && !self.speaking.contains(&link.index)
            && let Some(mac) = link.mac
        {
            self.want_link_local(What::PodLink, None, link, mac);
        }
    }

    fn pod_route(&mut self, address: IpAddr, link: &Link, index: &PodEntries<'_>) {
        let route = link_route(TABLE_MAIN, address, link.index);
        if index.routes.get(&address).is_some_and(|devs| devs.contains(&link.index)) {
            self.no_barrier(What::PodRoute, None, &route);
        } else {
            let text = format!("replace route {address} dev {}", link.name);
            self.add(What::PodRoute, None, Action::ReplaceRoute(route), text);
        }
    }

    /// A veth of a pod whose ADD has only just ended, if it has: udev may have given it another MAC than the one that the pod has as
    /// its gateway's. Nothing else of such a pod is looked at.
    pub(super) fn young(&mut self) {
        let seen = self.seen;
        for link in seen.links.iter().filter(|link| strange_mac(link)) {
            let known =
                self.add.iter().any(|step| matches!(&step.action, Action::SetMac(index, _) if *index == link.index));
            if let Some((mac, _)) = naming::of_veth_alias(&link.alias).filter(|_| !known) {
                let text = format!("set address {mac} on {}", link.name);
                self.add(What::PodMac, None, Action::SetMac(link.index, mac), text);
            }
        }
    }

    /// Nobody has these addresses: entries of pods go, and whatever else sends from them to the table of an ENI, at any priority
    /// (`spec/dataplane.md` 8.4). One that sits on a link belongs to an ENI that somebody else runs, and so does all but what has
    /// the shape of ours.
    pub(super) fn gone(&mut self) {
        let pods = self.intent.pods.iter().map(|pod| pod.address);
        let enis = self.intent.enis.iter().map(|eni| eni.own.addr()).chain([self.intent.node_ip]);
        let alive = pods.chain(self.intent.branches.iter().map(|pod| pod.address)).chain(enis).gather::<Set<_>>();
        let gone = self.intent.gone.iter().filter(|address| !alive.contains(address)).copied().gather::<Set<_>>();
        let here = self.seen.addresses.iter().map(|address| address.addr.addr()).gather::<Set<_>>();
        self.drop_rules(What::GonePod, |rule| {
            let to = rule.dst.filter(|dst| *rule == Rule::to(*dst, priority::TO_POD, TABLE_MAIN)).and_then(single);
            let to_eni = naming::in_eni_ranges(rule.table) && rule.priority != priority::FROM_ENI; // that is for the ENIs to say
            let plain = |source: &IpNet| to_eni && *rule == Rule::from(*source, rule.priority, rule.table);
            let from = || rule.src.filter(plain).and_then(single).filter(|address| !here.contains(address));
            to.or_else(|| source(rule)).or_else(from).is_some_and(|address| gone.contains(&address))
        });
    }
}

/// The pod whose way out a rule at 1536 is. Old versions of the original made one for each CIDR of the VPC, `from <pod> to <CIDR>`
/// (`spec/dataplane.md` 9.1).
pub(in crate::plan) fn source(rule: &Rule) -> Option<IpAddr> {
    let pod = rule.src?;
    let ours = *rule == Rule { dst: rule.dst, ..Rule::from(pod, priority::FROM_POD, rule.table) };
    single(pod).filter(|_| ours)
}

/// Whether a veth has another MAC than the one that it was made with, as is noted on it.
pub(in crate::plan) fn strange_mac(link: &Link) -> bool {
    let noted = naming::of_veth_alias(&link.alias).filter(|_| link.kind.as_deref() == Some("veth"));
    noted.is_some_and(|(mac, _)| link.mac != Some(mac))
}

/// MAC and MTU (bytes) that a pod's veth is to keep: those of its alias, or its own if it has none. An alias that somebody else has
/// given it tells nothing.
pub(in crate::plan) fn made_with(link: &Link) -> Option<(Mac, u32)> {
    match link.alias.as_str() {
        "" => Some((link.mac?, link.mtu)),
        alias => naming::of_veth_alias(alias),
    }
}

/// The host's ends of the pods' veths, by the digits that their names end in. Two pods with the same digits (a pod that came
/// back under its name before the DEL of the former), or two links, leave open which belongs to which: then there is none.
/// One that was renamed is found by what is noted on it, as long as no other has its name.
pub(in crate::plan) fn veths_of<'a>(intent: &'a Intent, links: &'a [Link]) -> Map<&'a str, &'a Link> {
    let mut found = Map::<&str, (u32, Option<&Link>)>::new();
    let branches = intent.branches.iter().map(|pod| &pod.veth);
    for veth in intent.pods.iter().map(|pod| &pod.veth).chain(branches).filter(|veth| !veth.is_empty()) {
        found.entry(veth).or_default().0 += 1;
    }
    let links = || links.iter().filter(|link| link.kind.as_deref() == Some("veth"));
    let mut named = Set::<&str>::new();
    let renamed = links().filter_map(|link| {
        let first = naming::name_of_veth_alias(&link.alias).filter(|first| *first != link.name);
        Some((link, first?, true))
    });
    for (link, name, renamed) in links().map(|link| (link, link.name.as_str(), false)).chain(renamed) {
        // The prefix has at most four characters, the digits are eleven.
        let digits = (0..=naming::VETH_PREFIX_MAX).filter_map(|length| name.get(length..));
        for digits in digits {
            if let Some((count, there)) = found.get_mut(digits)
                && !(renamed && named.contains(digits))
            {
                *count += u32::from(there.replace(link).is_some());
                if !renamed {
                    named.insert(digits);
                }
            }
        }
    }
    found.into_iter().filter_map(|(digits, (count, link))| Some((digits, link.filter(|_| count == 1)?))).gather()
}

/// The address whose packets a rule of somebody else's behind those of pods sends to a table that may be an ENI's: what an address had
/// before a pod got it (`spec/dataplane.md` 9.4). Those for ENIs' own addresses are looked at by themselves.
pub(in crate::plan) fn diverted(rule: &Rule) -> Option<IpAddr> {
    let plain = |source: &IpNet| *rule == Rule::from(*source, rule.priority, rule.table);
    let behind = rule.priority > priority::FROM_POD && rule.priority != priority::FROM_ENI;
    rule.src.filter(|source| behind && naming::in_eni_ranges(rule.table) && plain(source)).and_then(single)
}

/// The tables of the secondary ENIs, and those in which somebody else has routes over them. A table of such a number that leads
/// elsewhere, or nowhere, is an operator's or a VPN's (`spec/dataplane.md` 29).
fn eni_tables(intent: &Intent, seen: &Observation) -> Set<u32> {
    let links = intent.enis.iter().filter_map(|eni| link_of(&seen.links, eni.mac));
    let links = links.map(|link| link.index).gather::<Set<_>>();
    let led = seen.routes.iter().filter(|route| links.contains(&route.dev)).map(|route| route.table);
    intent.enis.iter().map(|eni| eni.table).chain(led).gather()
}

/// Rules at 1536 and behind by pod address, and the veths that routes to single addresses lead over: a node has hundreds of each.
struct PodEntries<'a> {
    rules: Map<IpAddr, Vec<&'a Rule>>,
    routes: Map<IpAddr, Vec<u32>>,
}

impl<'a> PodEntries<'a> {
    fn new(intent: &Intent, seen: &'a Observation) -> Self {
        let mut rules = Map::<_, Vec<_>>::new();
        let tables = LazyCell::new(|| eni_tables(intent, seen));
        for rule in seen.rules.iter().filter(|rule| !rule.foreign) {
            if let Some(pod) = source(rule).or_else(|| diverted(rule).filter(|_| tables.contains(&rule.table))) {
                rules.entry(pod).or_default().push(rule);
            }
        }
        let veths = seen.links.iter().filter(|link| link.kind.as_deref() == Some("veth"));
        let veths = veths.map(|link| link.index).gather::<Set<_>>();
        let mut routes = Map::<_, Vec<_>>::new();
        let plain = |route: &&Route| route.table == TABLE_MAIN && route.gateway.is_none();
        for route in seen.routes.iter().filter(plain).filter(|route| veths.contains(&route.dev)) {
            if let Some(address) = single(route.dst) {
                routes.entry(address).or_default().push(route.dev);
            }
        }
        PodEntries { rules, routes }
    }

    /// The veth that the route to an address leads over, if an earlier version of ours has made it: its alias tells no name.
    fn led_to(&self, address: IpAddr, seen: &'a Observation) -> Option<&'a Link> {
        let [dev] = self.routes.get(&address)?[..] else { return None };
        let link = seen.links.iter().find(|link| link.index == dev)?;
        let noted = naming::of_veth_alias(&link.alias).is_some() && naming::name_of_veth_alias(&link.alias).is_none();
        // A name of the usual length may be that of another pod.
        let odd = link.name.len() < naming::SUFFIX_LEN;
        Some(link).filter(|_| noted && odd)
    }
}
