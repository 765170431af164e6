//! What the entries of a host plan have in common, and those that concern the node as a whole: the rules for marked
//! packets and for external services.

use super::{Action, Intent, Observation, Step, What};
use crate::model::ids::EniId;
use crate::model::map::{Map, Set};
use crate::model::naming::priority;
use crate::model::net::{Address, Family, Link, Mac, Rule, TABLE_MAIN};
use crate::model::order::Gather as _;
use ipnet::IpNet;
use std::net::IpAddr;

pub(super) struct Planner<'a> {
    pub(super) intent: &'a Intent,
    pub(super) seen: &'a Observation,
    pub(super) rules: Set<&'a Rule>,
    pub(super) planned: Set<Rule>,
    /// Indexes of the links with an IPv6 address of their own, from which the host asks for MACs.
    pub(super) speaking: Set<u32>,
    pub(super) add: Vec<Step>,
    pub(super) delete: Vec<Step>,
    pub(super) failed: Map<EniId, String>,
}

impl<'a> Planner<'a> {
    pub(super) fn new(intent: &'a Intent, seen: &'a Observation) -> Self {
        let own = |address: &&Address| matches!(address.addr.addr(), IpAddr::V6(v6) if v6.is_unicast_link_local());
        let speaking = seen.addresses.iter().filter(|_| intent.v6).filter(own).map(|address| address.dev).gather();
        let (rules, planned) = (seen.rules.iter().gather(), Set::new());
        let (add, delete, failed) = (Vec::new(), Vec::new(), Map::new());
        Planner { intent, seen, rules, planned, speaking, add, delete, failed }
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
            let ours = rule
                .dst
                .filter(|dst| dst.addr().is_ipv4())
                .is_some_and(|dst| *rule == Rule::to(dst, priority::EXTERNAL_SERVICE, TABLE_MAIN));
            ours && !wanted.contains(rule)
        });
    }
}
