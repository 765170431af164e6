//! Rules of others that decide about traffic of pods, ENIs or the node before ours do. Each is told with the command that takes it
//! away; nothing here is ours to delete.

use super::{Finding, single};
use crate::model::map::{Map, Set};
use crate::model::naming::{in_eni_ranges, priority};
use crate::model::net::{Family, Rule, TABLE_LOCAL, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::plan::branch::is_vlan;
use crate::plan::host::{Intent, Observation, link_of, veths_of};
use ipnet::IpNet;
use std::net::IpAddr;

/// Tables of nm-cloud-setup.
const NM_TABLES: [u32; 2] = [30_200, 30_400];

/// All of them.
pub(super) fn findings(intent: &Intent, seen: &Observation, found: &mut Vec<Finding>) {
    let nm = |table: u32| NM_TABLES.contains(&table);
    if let Some(rule) = seen.rules.iter().find(|rule| nm(rule.table)) {
        found.push(Finding::new("nm-cloud-setup", "", format!("rule {rule}")));
    } else if let Some(route) = seen.routes.iter().find(|route| nm(route.table)) {
        found.push(Finding::new("nm-cloud-setup", "", format!("route {route}")));
    }
    let own = intent.enis.iter().map(|eni| (eni.own.addr(), eni.table)).gather::<Map<_, _>>();
    let pods = intent.pods.iter().map(|pod| pod.address).gather::<Set<_>>();
    let traffic = Traffic::new(intent, seen);
    for rule in seen.rules.iter().filter(|rule| !nm(rule.table) && !kernels(rule)) {
        let source = rule.src.and_then(single);
        let pod = rule.src.or(rule.dst).and_then(single).is_some_and(|address| pods.contains(&address));
        let before = rule.priority < priority::FROM_ENI;
        let ours = source.is_some_and(|source| own.contains_key(&source) || pods.contains(&source));
        let other = !matches!(rule.priority, priority::FROM_POD | priority::FROM_ENI);
        let elsewhere = ours && other && rule.table != TABLE_MAIN && in_eni_ranges(rule.table);
        let diverts = pod && before && !matches!(rule.priority, priority::TO_POD | priority::FROM_POD);
        // Its tables are numbered from 10000.
        if elsewhere && rule.table >= 10_000 {
            found.push(Finding::new("ec2-net-utils", "", format!("rule {rule}")));
        } else if elsewhere || diverts || traffic.loses_to(rule) || traffic.meets(rule) {
            let (ip, text) = (if rule.family == Family::V6 { "ip -6" } else { "ip" }, rule.to_string());
            // What is not understood of it need not be named to delete it.
            let known = text.split(" lookup ").next().filter(|_| rule.foreign).unwrap_or(&text);
            let command = format!("{ip} rule del pref {}", known.replacen(": ", " ", 1));
            let more = if rule.foreign { ", and there is more to it: ip rule" } else { "" };
            let finding = Finding::new("foreign-rule", "", format!("rule {rule}{more}"));
            // Of those that the words fit the kernel takes the first, which may be another one, even of ours.
            let named = Rule { table: if rule.foreign { 0 } else { rule.table }, ..rule.clone() };
            let taken = seen.rules.iter().find(|there| named.deletes(there));
            let sure = taken.is_some_and(|taken| std::ptr::eq(taken, rule));
            found.push(if sure { finding.mended_by(command) } else { finding });
        }
    }
}

fn kernels(rule: &Rule) -> bool {
    matches!(rule.table, TABLE_LOCAL | 253) || (rule.priority == 32_766 && rule.table == TABLE_MAIN)
}

/// Whether a rule that is not ours decides about traffic of pods: it stands among ours, and either selects everything or
/// has one of our priorities with a shape that ours never have.
pub(super) fn foreign(rule: &Rule) -> bool {
    for_everything(rule) || misshapen(rule)
}

/// Whether it selects everything and stands among ours.
fn for_everything(rule: &Rule) -> bool {
    let before = rule.priority < priority::FROM_ENI && !everywhere(rule);
    before && *rule == Rule::any(rule.family, rule.priority, rule.table)
}

/// Ours, for external services that may be everywhere.
fn everywhere(rule: &Rule) -> bool {
    *rule == Rule::any(Family::V4, priority::EXTERNAL_SERVICE, TABLE_MAIN)
}

/// Whether it has one of our priorities with a shape that ours never have.
fn misshapen(rule: &Rule) -> bool {
    if everywhere(rule) {
        return false;
    }
    let shape = Rule { fwmark: None, src: None, dst: None, iif: None, ..rule.clone() };
    let plain = shape == Rule::any(rule.family, rule.priority, rule.table);
    match rule.priority {
        priority::TO_POD | priority::EXTERNAL_SERVICE => !plain || rule.dst.is_none() || rule.table != TABLE_MAIN,
        priority::MARK => !plain || rule.fwmark.is_none() || rule.table != TABLE_MAIN,
        priority::FROM_POD => !plain || rule.src.is_none(),
        priority::BRANCH => !plain || rule.iif.is_none(),
        _ => false,
    }
}

/// What packets of the data plane look like to a rule.
struct Traffic<'a> {
    intent: &'a Intent,
    seen: &'a Observation,
    /// Addresses of pods, of ENIs and of the node.
    addresses: Set<IpAddr>,
    /// Links that pods' packets come by, and `lo`, by which the kernel knows those of the node itself.
    links: Set<&'a str>,
    /// The primary ENI's link.
    primary: Option<u32>,
}

impl<'a> Traffic<'a> {
    fn new(intent: &'a Intent, seen: &'a Observation) -> Self {
        let pods = intent.pods.iter().map(|pod| pod.address).chain(intent.branches.iter().map(|pod| pod.address));
        let enis = intent.enis.iter().map(|eni| eni.own.addr());
        let primary = link_of(&seen.links, intent.primary_mac);
        let links = intent.enis.iter().filter_map(|eni| link_of(&seen.links, eni.mac)).chain(primary);
        let links = links.chain(seen.links.iter().filter(|link| is_vlan(link)));
        let links = links.chain(veths_of(intent, &seen.links).into_values()).map(|link| link.name.as_str());
        Traffic {
            intent,
            seen,
            addresses: pods.chain(enis).chain([intent.node_ip]).gather(),
            links: links.chain(["lo"]).gather(),
            primary: primary.map(|link| link.index),
        }
    }

    /// Whether a rule that is [`foreign`] does take such packets. What selects everything is harmless if its table knows only a network
    /// of its own, as a tunnel's does; and at our first priority others have rules for marks of their own.
    fn loses_to(&self, rule: &Rule) -> bool {
        let all = for_everything(rule) && (rule.table == TABLE_MAIN || self.takes(rule, true));
        let marked = rule.priority != priority::BRANCH || rule.iif.is_some() || rule.foreign || self.marked(rule);
        all || (misshapen(rule) && marked)
    }

    /// Whether it takes a packet that is not marked, or has our mark.
    fn marked(&self, rule: &Rule) -> bool {
        let mark = self.intent.mark;
        rule.fwmark.is_none_or(|(value, mask)| value & mask == 0 || value & mask & mark != 0)
    }

    /// Whether a rule that is not of one of our shapes takes such packets out of the hands of ours, to a table that has a route
    /// for them. What selects a mark of somebody else's, or a link or addresses that are none of ours, is let be.
    fn meets(&self, rule: &Rule) -> bool {
        let v6 = rule.family == Family::V6;
        let sole = rule.src.and_then(single).is_some() && !rule.foreign;
        let shaped = match rule.priority {
            priority::BRANCH => true,
            priority::FROM_POD | priority::FROM_ENI => sole,
            _ => false,
        };
        if v6 != self.intent.v6 || rule.table == TABLE_MAIN || rule.priority > priority::FROM_ENI || shaped {
            return false;
        }
        // What is not understood of a rule may turn its mark round.
        let marked = self.marked(rule);
        let from = rule.src.is_none_or(|src| self.holds(src));
        // To pods what comes from elsewhere is led by rules of ours.
        let comes = rule.priority < priority::TO_POD && rule.dst.is_some_and(|dst| self.holds(dst));
        let by = rule.iif.as_deref().is_none_or(|iif| self.links.contains(iif));
        if !(by && (from || comes) && (marked || rule.foreign)) {
            return false;
        }
        let inside = |dst: IpNet| self.intent.vpc_cidrs.iter().any(|vpc| overlap(*vpc, dst));
        let anything = rule.src.is_none() && rule.iif.is_none() && rule.fwmark.is_none_or(|_| !marked);
        (rule.dst.is_none_or(inside) || rule.src.is_some()) && self.takes(rule, anything)
    }

    fn holds(&self, net: IpNet) -> bool {
        single(net).map_or_else(
            || self.addresses.iter().any(|address| net.contains(address)),
            |address| self.addresses.contains(&address),
        )
    }

    /// Whether the rule's table has a route, or a hole, for what pods send. One that knows only a network of its own, as of a tunnel,
    /// is no harm; nor, if the rule takes `anything`, are parts of the VPC: they are peers of an encryption between nodes.
    fn takes(&self, rule: &Rule, anything: bool) -> bool {
        // The node's own packets by its own link.
        let own = rule.src.and_then(single).filter(|src| *src == self.intent.node_ip).and(self.primary);
        let fits = |dst: IpNet| {
            let vpc = || self.intent.vpc_cidrs.iter().any(|vpc| dst.contains(vpc) || (!anything && vpc.contains(&dst)));
            dst.prefix_len() == 0 || rule.dst.map_or_else(vpc, |wanted| overlap(wanted, dst))
        };
        let family = |dst: IpNet| Family::of(dst.addr()) == rule.family;
        let routes = self.seen.routes.iter().filter(|route| route.table == rule.table && Some(route.dev) != own);
        // A hole of the type "throw" goes on with the next rule.
        let holes = self.seen.barriers.iter().filter(|hole| hole.table == rule.table && hole.kind != 9);
        let mut ways = routes.map(|route| route.dst).chain(holes.map(|hole| hole.dst));
        ways.any(|dst| family(dst) && fits(dst))
    }
}

fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other) || other.contains(&one)
}
