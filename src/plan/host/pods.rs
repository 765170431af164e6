//! Entries of pods in shared tables, which the plugin makes and the daemon watches (`spec/dataplane.md` 9).

use super::planner::Planner;
use super::{Action, HostPod, Intent, Observation, What, single};
use crate::model::map::{Map, Set};
use crate::model::naming::{self, priority};
use crate::model::net::{Link, Mac, Route, Rule, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::plan::pod::link_route;
use ipnet::IpNet;
use std::net::IpAddr;

impl Planner<'_> {
    /// Every pod address that is wired up has its way in and exactly the rule of its ENI's table. One that is not may be in
    /// the middle of an ADD, which makes them itself, or of a DEL, after which they would be left over.
    pub(super) fn pods(&mut self, branches: &[HostPod]) {
        let (intent, seen) = (self.intent, self.seen);
        let (index, veths) = (PodEntries::new(seen), veths_of(intent, &seen.links));
        for HostPod { address, table, veth, .. } in intent.pods.iter().chain(branches) {
            let host = IpNet::from(*address);
            let from = (*table != TABLE_MAIN).then(|| Rule::from(host, priority::FROM_POD, *table));
            let link = veths.get(veth.as_str()).copied();
            if let Some(link) = link {
                self.pod_link(link);
                self.pod_route(*address, link, &index);
            }
            if link.is_some() || index.routes.contains_key(address) {
                if let Some(rule) = &from {
                    self.want_rule(What::FromPodRule, None, rule.clone());
                }
                self.want_rule(What::ToPodRule, None, Rule::to(host, priority::TO_POD, TABLE_MAIN));
            }
            for rule in index.rules.get(address).into_iter().flatten().filter(|rule| Some(**rule) != from.as_ref()) {
                let text = format!("delete rule {rule}");
                self.delete(What::FromPodRule, None, Action::DeleteRule((*rule).clone()), text);
            }
        }
    }

    /// The host's end of a veth is up, with the MAC and the MTU that it was made with, and with an address from which the host
    /// asks for an IPv6 pod's MAC. One of the original's does not tell what it was made with: what it has when we meet it is
    /// noted on it, and kept from then on.
    pub(super) fn pod_link(&mut self, link: &Link) {
        if let Some((mac, mtu)) = made_with(link) {
            if link.alias.is_empty() && link.up {
                let text = format!("note mac {mac} mtu {mtu} on {}", link.name);
                self.add(What::PodNote, None, Action::NoteVeth(link.index, mac, mtu), text);
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
        if !link.up {
            self.add(What::PodLink, None, Action::SetUp(link.index), format!("set {} up", link.name));
        } else if self.intent.v6
            && !self.speaking.contains(&link.index)
            && let Some(mac) = link.mac
        {
            self.want_link_local(What::PodLink, None, link, mac);
        }
    }

    fn pod_route(&mut self, address: IpAddr, link: &Link, index: &PodEntries<'_>) {
        if index.routes.get(&address).is_none_or(|devs| !devs.contains(&link.index)) {
            let route = link_route(TABLE_MAIN, address, link.index);
            let text = format!("replace route {address} dev {}", link.name);
            self.add(What::PodRoute, None, Action::ReplaceRoute(route), text);
        }
    }

    pub(super) fn gone(&mut self) {
        let pods = self.intent.pods.iter().map(|pod| pod.address);
        let alive = pods.chain(self.intent.branches.iter().map(|pod| pod.address)).gather::<Set<_>>();
        let gone = self.intent.gone.iter().filter(|address| !alive.contains(address)).copied().gather::<Set<_>>();
        self.drop_rules(What::GonePod, |rule| {
            let to = rule.dst.filter(|dst| *rule == Rule::to(*dst, priority::TO_POD, TABLE_MAIN));
            let from = rule.src.filter(|src| *rule == Rule::from(*src, priority::FROM_POD, rule.table));
            to.or(from).and_then(single).is_some_and(|address| gone.contains(&address))
        });
    }
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
pub(in crate::plan) fn veths_of<'a>(intent: &'a Intent, links: &'a [Link]) -> Map<&'a str, &'a Link> {
    let mut found = Map::<&str, (u32, Option<&Link>)>::new();
    let branches = intent.branches.iter().map(|pod| &pod.veth);
    for veth in intent.pods.iter().map(|pod| &pod.veth).chain(branches).filter(|veth| !veth.is_empty()) {
        found.entry(veth).or_default().0 += 1;
    }
    for link in links.iter().filter(|link| link.kind.as_deref() == Some("veth")) {
        // The prefix has at most four characters, the digits are eleven.
        let digits = (0..=naming::VETH_PREFIX_MAX).filter_map(|length| link.name.get(length..));
        for digits in digits {
            if let Some((count, there)) = found.get_mut(digits) {
                *count += u32::from(there.replace(link).is_some());
            }
        }
    }
    found.into_iter().filter_map(|(digits, (count, link))| Some((digits, link.filter(|_| count == 1)?))).gather()
}

/// Rules at 1536 by pod address, and the veths that routes to single addresses lead over: a node has hundreds of each.
struct PodEntries<'a> {
    rules: Map<IpAddr, Vec<&'a Rule>>,
    routes: Map<IpAddr, Vec<u32>>,
}

impl<'a> PodEntries<'a> {
    fn new(seen: &'a Observation) -> Self {
        let mut rules = Map::<_, Vec<_>>::new();
        for rule in seen.rules.iter().filter(|rule| !rule.foreign) {
            if let Some(source) = rule.src.and_then(single)
                && *rule == Rule::from(IpNet::from(source), priority::FROM_POD, rule.table)
            {
                rules.entry(source).or_default().push(rule);
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
}
