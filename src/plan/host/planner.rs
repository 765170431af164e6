//! What the entries of a host plan have in common, and those that concern the node as a whole: the rules for marked
//! packets, for external services, and the kernel's own to the main table.

use super::{Action, Intent, Observation, Step, What, forwarding};
use crate::model::ids::EniId;
use crate::model::map::{Map, Set};
use crate::model::naming::priority;
use crate::model::net::{Address, Conf6, Family, Link, Mac, Route, Rule, TABLE_MAIN};
use crate::model::order::Gather as _;
use ipnet::IpNet;
use std::net::IpAddr;

/// The steps that put back the kernel's own rule `lookup main`, which a flush of all rules takes along: the kernel makes it once, with
/// the network namespace, and without it no way leads anywhere but to this node, neither for pods nor for whoever asks IMDS. One at
/// a priority of somebody else's choice counts; the rule for external services, which may be everywhere, is ours and may go.
pub fn main_rules(rules: &[Rule], v6: bool) -> Vec<Step> {
    let families = [Family::V4, Family::V6].into_iter().filter(|family| *family == Family::V4 || v6);
    let lost = families.filter(|family| !rules.iter().any(|rule| rule.family == *family && leads_to_main(rule)));
    let add = |family| {
        let rule = Rule::any(family, priority::MAIN, TABLE_MAIN);
        // Both may be missing, and look the same.
        let of = if family == Family::V6 { "IPv6 rule" } else { "rule" };
        let text = format!("add {of} {rule}");
        Step { what: What::MainRule, eni: None, action: Action::AddRule(rule), text }
    };
    lost.map(add).collect()
}

/// Whether a rule leads all packets to the main table, and is not ours.
pub(in crate::plan) fn leads_to_main(rule: &Rule) -> bool {
    *rule == Rule::any(rule.family, rule.priority, TABLE_MAIN) && rule.priority != priority::EXTERNAL_SERVICE
}

/// Whether packets of the family pass by us. IPv4's are those of pods, or those to IMDS and EC2.
pub(in crate::plan) fn serves(intent: &Intent, family: Family) -> bool {
    family == Family::V4 || forwarding(intent.v6, intent.egress, family).is_some()
}

pub(super) struct Planner<'a> {
    pub(super) intent: &'a Intent,
    pub(super) seen: &'a Observation,
    pub(super) rules: Set<&'a Rule>,
    pub(super) planned: Set<Rule>,
    /// Indexes of the links with an IPv6 address of their own, from which the host asks for MACs.
    pub(super) speaking: Set<u32>,
    /// IPv4 packets of pods pass this node. The setting for all is that of every link, `lo` among them, and not ours to say.
    pub(super) passing: bool,
    /// IPv6 packets pass this node, or did.
    pub(super) routing: bool,
    pub(super) add: Vec<Step>,
    pub(super) delete: Vec<Step>,
    pub(super) failed: Map<EniId, String>,
}

impl<'a> Planner<'a> {
    pub(super) fn new(intent: &'a Intent, seen: &'a Observation) -> Self {
        let own = |address: &&Address| matches!(address.addr.addr(), IpAddr::V6(v6) if v6.is_unicast_link_local());
        let speaking = seen.addresses.iter().filter(|_| intent.v6).filter(own).map(|address| address.dev).gather();
        let lo = seen.links.iter().find(|link| link.name == "lo");
        let passing = !intent.v6 && lo.is_some_and(|lo| lo.forwards == Some(true));
        let routing = lo.and_then(|lo| lo.conf6).is_some_and(|conf| conf.forwarding != 0);
        let (rules, planned) = (seen.rules.iter().gather(), Set::new());
        let (add, delete, failed) = (Vec::new(), Vec::new(), Map::new());
        Planner { intent, seen, rules, planned, speaking, passing, routing, add, delete, failed }
    }
}

impl Planner<'_> {
    pub(super) fn family(&self) -> Family {
        if self.intent.v6 { Family::V6 } else { Family::V4 }
    }

    pub(super) fn add(&mut self, what: What, eni: Option<&EniId>, action: Action, text: String) {
        self.add.push(Step { what, eni: eni.cloned(), action, text });
    }

    pub(super) fn delete(&mut self, what: What, eni: Option<&EniId>, action: Action, text: String) {
        self.delete.push(Step { what, eni: eni.cloned(), action, text });
    }

    pub(super) fn want_rule(&mut self, what: What, eni: Option<&EniId>, rule: Rule) {
        if !self.rules.contains(&rule) && self.planned.insert(rule.clone()) {
            let text = format!("add rule {rule}");
            self.add(what, eni, Action::AddRule(rule), text);
        }
    }

    /// Takes away what lets nothing through in the place of this route, which is there too: of two with the same destination and
    /// metric the first one in counts.
    pub(super) fn no_barrier(&mut self, what: What, eni: Option<&EniId>, route: &Route) {
        let seen = self.seen;
        for barrier in seen.barriers.iter().filter(|barrier| barrier.in_place_of(route)) {
            self.delete(what, eni, Action::DeleteBarrier(*barrier), format!("delete route {barrier}"));
        }
    }

    pub(super) fn set_up(&mut self, what: What, eni: Option<&EniId>, link: &Link) {
        self.add(what, eni, Action::SetUp(link.index), format!("set {} {}", link.name, link.fault().1));
    }

    /// What comes in by this link of ours goes on.
    pub(super) fn want_forwarding(&mut self, eni: Option<&EniId>, link: &Link) {
        if self.passing {
            self.let_through(eni, link);
        }
    }

    pub(super) fn let_through(&mut self, eni: Option<&EniId>, link: &Link) {
        if link.forwards == Some(false) {
            let path = format!("net/ipv4/conf/{}/forwarding", link.name);
            let text = format!("set sysctl {path} to 1 instead of 0");
            self.add(What::LinkForwarding, eni, Action::SetSysctl(path, "1".into()), text);
        }
    }

    /// The IPv6 settings that ADD writes on the host's end of a pod's veth and on a VLAN device (`spec/plugin.md` 13.1): no router
    /// out there is listened to, and no pod redirects the host. That VLAN devices take redirects is no need of anybody's, so there
    /// they may be off, and on a veth that the original has made they are on.
    ///
    /// Whoever writes `forwarding` for all writes that of every link (`addrconf_forward_change` in net/ipv6/addrconf.c), `lo`
    /// among them. So it is only taken back on a single link: it says whether that one acts as a router, and lets no packet
    /// through (`ip6_forward` in net/ipv6/ip6_output.c asks for all).
    pub(super) fn want_conf6(&mut self, link: &Link) {
        let Some(Conf6 { forwarding, accept_ra, accept_redirects }) = link.conf6 else { return };
        let veth = link.kind.as_deref() == Some("veth") && link.queue != 0;
        for (key, there) in [
            ("accept_ra", accept_ra),
            ("accept_redirects", if veth { accept_redirects } else { 0 }),
            ("forwarding", if self.routing { 0 } else { forwarding }),
        ] {
            if there != 0 {
                let path = format!("net/ipv6/conf/{}/{key}", link.name);
                let text = format!("set sysctl {path} to 0 instead of {there}");
                self.add(What::LinkSysctl, None, Action::SetSysctl(path, "0".into()), text);
            }
        }
    }

    /// Nobody has told the kernel for good where a pod is but with the MAC that the pod has. Ours it has learned, all of them.
    pub(super) fn want_asking(&mut self, pod: IpAddr, link: &Link) {
        let seen = self.seen;
        let fixed = seen.neighbours.iter().filter(|entry| entry.permanent || entry.noarp);
        for entry in fixed.filter(|entry| (entry.dev, entry.addr) == (link.index, pod)) {
            let right = seen.peers.get(&link.index);
            if right.is_none() || entry.mac.as_ref() != right {
                let mac = entry.mac.unwrap_or_default();
                let text = format!("delete neighbour {pod} lladdr {mac} dev {}", link.name);
                self.delete(What::PodNeighbour, None, Action::DeleteNeighbour(link.index, pod), text);
            }
        }
    }

    /// A name that another link has is not taken from it.
    pub(super) fn give_name_back(&mut self, what: What, link: &Link, name: String) {
        if !self.seen.links.iter().any(|other| other.name == name) {
            let text = format!("set name {name} on {}", link.name);
            self.add(what, None, Action::Rename(link.index, name), text);
        }
    }

    /// Gives the link its own IPv6 address, by its MAC. It needs no check for duplicates.
    pub(super) fn want_link_local(&mut self, what: What, eni: Option<&EniId>, link: &Link, mac: Mac) {
        let Ok(addr) = IpNet::new(mac.link_local().into(), 64) else { return };
        let address = Address { dev: link.index, addr, no_prefix_route: false, no_dad: true };
        self.add(what, eni, Action::AddAddress(address), format!("add address {addr} to {}", link.name));
    }

    /// Deletes every rule seen, and not foreign, that `wrong` selects.
    pub(super) fn drop_rules(&mut self, what: What, wrong: impl Fn(&Rule) -> bool) {
        let seen = self.seen;
        for rule in seen.rules.iter().filter(|rule| !rule.foreign && wrong(rule)) {
            self.delete(what, None, Action::DeleteRule(rule.clone()), format!("delete rule {rule}"));
        }
    }

    /// Rule 1024: marked packets leave through the primary ENI. One of another mark is a leftover of a changed setting.
    pub(super) fn mark_rule(&mut self) {
        let bits = (self.intent.mark, self.intent.mark);
        let wanted = (self.intent.node_port || !self.intent.external_snat)
            .then(|| Rule { fwmark: Some(bits), ..Rule::any(self.family(), priority::MARK, TABLE_MAIN) });
        if let Some(rule) = &wanted {
            self.want_rule(What::MarkRule, None, rule.clone());
        }
        let family = self.family();
        self.drop_rules(What::MarkRule, |rule| {
            let ours = rule.fwmark.filter(|(mark, mask)| mark == mask).is_some_and(|fwmark| {
                *rule == Rule { fwmark: Some(fwmark), ..Rule::any(family, priority::MARK, TABLE_MAIN) }
            });
            ours && Some(rule) != wanted.as_ref()
        });
    }

    pub(super) fn external_services(&mut self) {
        let wanted = self.intent.external_service_cidrs.iter().filter(|net| net.addr().is_ipv4());
        let wanted = wanted.map(|net| Rule::to(net.trunc(), priority::EXTERNAL_SERVICE, TABLE_MAIN)).gather::<Set<_>>();
        for rule in &wanted {
            self.want_rule(What::ServiceRule, None, rule.clone());
        }
        self.drop_rules(What::ServiceRule, |rule| {
            let shape = Rule { dst: rule.dst, ..Rule::any(Family::V4, priority::EXTERNAL_SERVICE, TABLE_MAIN) };
            *rule == shape && !wanted.contains(rule)
        });
    }
}
