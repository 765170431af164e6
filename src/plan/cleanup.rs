//! What has to go when this program leaves a node (`spec/operations.md` 11): rules, ENI tables and our part of nf_tables.
//! Links, addresses and sysctls stay: pods' links go with their pods, an ENI's address does no harm.
//!
//! Without a daemon nothing says what was intended, so everything is told by its shape (`spec/dataplane.md` 29): what
//! could be somebody else's stays.

use super::egress;
use super::host::{Action, Observation, Step, What, gateway_rule};
use crate::model::map::Set;
use crate::model::naming::{self, priority};
use crate::model::net::{Family, Link, Route, Rule, TABLE_LOCAL, TABLE_MAIN};
use crate::model::nft::{ChainKind, Removal, Table};
use crate::model::order::Gather as _;
use ipnet::IpNet;

/// What is ours on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleanup {
    /// Rules and routes: first what is to be added, then what is to be deleted.
    pub steps: Vec<Step>,
    /// Tables of nf_tables that go as a whole.
    pub tables: Vec<(Family, String)>,
    /// A table stays because living pods need it, whoever runs: without it they open no connection to the other family.
    pub needed: bool,
    /// Our chains in a table that the original uses again.
    pub chains: Vec<Removal>,
    /// Host ends of pods that are alive: they lose their network with the steps.
    pub pods: Vec<String>,
}

impl Cleanup {
    /// Whether nothing is ours.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.tables.is_empty() && self.chains.is_empty()
    }

    /// Every change, in words.
    pub fn texts(&self) -> Vec<String> {
        let word = |family: Family| if family == Family::V4 { "ip" } else { "ip6" };
        let mut texts = self.steps.iter().map(|step| step.text.clone()).collect::<Vec<_>>();
        for removal in &self.chains {
            let chains = removal.chains.join(" ");
            texts.push(format!("delete chains {chains} of table {} {}", word(removal.family), removal.table));
        }
        texts.extend(self.tables.iter().map(|(family, name)| format!("delete table {} {name}", word(*family))));
        texts
    }
}

/// What is ours in what is seen, on a node with this prefix of host veths; with `packet_filter_only`, of nf_tables alone.
pub fn cleanup(seen: &Observation, veth_prefix: &str, packet_filter_only: bool) -> Cleanup {
    let mut cleanup = Cleanup::default();
    for table in &seen.tables {
        match chains_beside_the_original(table) {
            Some(chains) if chains.is_empty() => {}
            None if packet_filter_only && translates_for_pods(table, seen) => {
                cleanup.needed = true;
            }
            Some(chains) => {
                let (family, table) = (table.family, table.name.clone());
                cleanup.chains.push(Removal { family, table, rules: Vec::new(), chains });
            }
            None => cleanup.tables.push((table.family, table.name.clone())),
        }
    }
    if packet_filter_only {
        return cleanup;
    }
    cleanup.pods = seen.links.iter().filter(|link| of_pod(link, veth_prefix)).map(|link| link.name.clone()).collect();
    rules(seen, &mut cleanup.steps);
    routes(seen, &mut cleanup.steps);
    cleanup
}

/// The original keeps its connmark in a table of the same name, in a chain of type nat where ours is a filter.
fn chains_beside_the_original(table: &Table) -> Option<Vec<String>> {
    let theirs = ["nat-prerouting", "snat-mark"];
    let connmark = table.chains.iter().find(|chain| chain.name == theirs[0]);
    connmark?.base.is_some_and(|base| base.kind == ChainKind::Nat).then(|| {
        let chains = table.chains.iter().map(|chain| chain.name.clone());
        chains.filter(|name| !theirs.contains(&name.as_str()) && !name.starts_with('<')).collect()
    })
}

/// The original has a chain for each pod that it has added itself, and none for those of ours or those that were taken over.
fn translates_for_pods(table: &Table, seen: &Observation) -> bool {
    let range = egress::range(table.family);
    let outer = |dev: u32| {
        seen.links.iter().any(|link| link.index == dev && egress::is_host_veth(&link.name, link.kind.as_deref()))
    };
    table.chains.iter().any(|chain| chain.name == egress::SNAT_CHAIN)
        && seen.routes.iter().any(|route| host(&route.dst) && range.contains(&route.dst.addr()) && outer(route.dev))
}

fn of_pod(link: &Link, veth_prefix: &str) -> bool {
    let mut rests = [veth_prefix, naming::VLAN_PREFIX].into_iter().filter_map(|prefix| link.name.strip_prefix(prefix));
    let digits = |rest: &str| rest.len() == 11 && rest.bytes().all(|byte| byte.is_ascii_hexdigit());
    link.kind.as_deref() == Some("veth") && link.up && rests.any(digits)
}

fn push(steps: &mut Vec<Step>, what: What, action: Action, text: String) {
    steps.push(Step { what, eni: None, action, text });
}

fn rules(seen: &Observation, steps: &mut Vec<Step>) {
    let ours = seen.rules.iter().filter_map(|rule| Some((rule, kind(rule)?)));
    let (moved, others) = ours.partition::<Vec<_>, _>(|(rule, _)| **rule == moved_local(rule.family));
    for (rule, what) in &moved {
        let first = Rule::any(rule.family, priority::LOCAL, TABLE_LOCAL);
        if !seen.rules.contains(&first) {
            push(steps, *what, Action::AddRule(first.clone()), format!("add rule {first}"));
        }
    }
    // The moved local rule goes last: until then pods on branch ENIs pass by it.
    for (rule, what) in others.into_iter().chain(moved) {
        push(steps, what, Action::DeleteRule(rule.clone()), format!("delete rule {rule}"));
    }
}

fn moved_local(family: Family) -> Rule {
    Rule::any(family, priority::LOCAL_MOVED, TABLE_LOCAL)
}

fn host(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// What a rule is for, if it is one of ours: exactly of the shape that we give it, at its priority.
fn kind(rule: &Rule) -> Option<What> {
    let (family, table) = (rule.family, rule.table);
    let (source, destination) = (rule.src.filter(host), rule.dst.filter(host));
    let (what, shape) = match rule.priority {
        priority::LOCAL => (What::GatewayRule, gateway_rule()),
        priority::LOCAL_MOVED => (What::LocalRule, moved_local(family)),
        priority::BRANCH => {
            let iif = rule.iif.clone().filter(|iif| iif.starts_with(naming::VLAN_PREFIX) && table > 100)?;
            (What::BranchRule, Rule { iif: Some(iif), ..Rule::any(family, priority::BRANCH, table) })
        }
        priority::TO_POD => (What::ToPodRule, Rule::to(destination?, priority::TO_POD, TABLE_MAIN)),
        priority::MARK => {
            let fwmark = rule.fwmark.filter(|(mark, mask)| mark == mask)?;
            (What::MarkRule, Rule { fwmark: Some(fwmark), ..Rule::any(family, priority::MARK, TABLE_MAIN) })
        }
        priority::EXTERNAL_SERVICE => (What::ServiceRule, Rule::to(rule.dst?, priority::EXTERNAL_SERVICE, TABLE_MAIN)),
        priority::FROM_POD => (What::FromPodRule, Rule::from(source?, priority::FROM_POD, table)),
        priority::FROM_ENI if naming::in_eni_ranges(table) => {
            (What::EniRule, Rule::from(source?, priority::FROM_ENI, table))
        }
        _ => return None,
    };
    (*rule == shape).then_some(what)
}

/// ENI tables: those that rules of ours lead to, and those that hold just what we put there, like that of a trunk.
fn routes(seen: &Observation, steps: &mut Vec<Step>) {
    let led_to = seen
        .rules
        .iter()
        .filter(|rule| matches!(kind(rule), Some(What::FromPodRule | What::EniRule | What::BranchRule)));
    let led_to = led_to.map(|rule| rule.table).gather::<Set<_>>();
    let inside = |table: u32| seen.routes.iter().filter(move |route| route.table == table);
    let tables = seen.routes.iter().map(|route| route.table).gather::<Set<_>>();
    for table in tables.into_iter().filter(|table| !(253..=255).contains(table)) {
        if led_to.contains(&table) || (naming::in_eni_ranges(table) && of_eni(&inside(table).collect::<Vec<_>>())) {
            for route in inside(table) {
                let link = seen.links.iter().find(|link| link.index == route.dev);
                let name = link.map_or_else(|| format!("if{}", route.dev), |link| link.name.clone());
                let text = route.to_string().replace(&format!("dev if{}", route.dev), &format!("dev {name}"));
                push(steps, What::EniRoute, Action::DeleteRoute(*route), format!("delete route {text}"));
            }
        }
    }
}

/// A gateway on the link, the default route through it, and nothing else.
fn of_eni(routes: &[&Route]) -> bool {
    let default = routes.iter().find(|route| route.dst.prefix_len() == 0);
    let way = routes.iter().find(|route| host(&route.dst) && route.gateway.is_none());
    let fits = |default: &Route, way: &Route| default.gateway == Some(way.dst.addr()) && default.dev == way.dev;
    routes.len() == 2 && default.zip(way).is_some_and(|(default, way)| fits(default, way))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn check(rules: Vec<Rule>, expected: &[&str]) {
        let seen = Observation { rules, ..Observation::default() };
        assert_eq!(cleanup(&seen, "eni", false).texts(), expected);
    }

    #[test]
    fn rules_are_ours_by_their_whole_shape() {
        let pod = net("10.0.0.5/32");
        check(vec![Rule::to(pod, 512, TABLE_MAIN)], &["delete rule 512: from all to 10.0.0.5 lookup main"]);
        check(vec![Rule::to(net("10.0.0.0/24"), 512, TABLE_MAIN), Rule::to(pod, 513, TABLE_MAIN)], &[]);
        check(vec![Rule { foreign: true, ..Rule::to(pod, 512, TABLE_MAIN) }], &[]);
        check(vec![Rule::from(pod, 1536, 2)], &["delete rule 1536: from 10.0.0.5 lookup 2"]);
        check(vec![Rule::from(pod, 32765, 2)], &["delete rule 32765: from 10.0.0.5 lookup 2"]);
        check(vec![Rule::from(pod, 32765, 200)], &[]);
        let marked = |mark, mask| Rule { fwmark: Some((mark, mask)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) };
        check(vec![marked(0x80, 0x80)], &["delete rule 1024: from all fwmark 0x80/0x80 lookup main"]);
        check(vec![marked(0x80, 0xff)], &[]);
        let branch = |iif: &str| Rule { iif: Some(iif.into()), ..Rule::any(Family::V4, 10, 101) };
        check(vec![branch("vlan.eth.1")], &["delete rule 10: from all iif vlan.eth.1 lookup 101"]);
        check(vec![branch("eth1")], &[]);
    }

    #[test]
    fn what_translates_for_pods_stays_while_they_live() {
        let chain = crate::model::nft::Chain { name: egress::SNAT_CHAIN.into(), base: None, rules: Vec::new() };
        let (name, chains) = ("aws-cni".into(), vec![chain]);
        let table = Table { family: Family::V6, name, comment: None, chains };
        let link = |name: &str| Link { index: 7, name: name.into(), kind: Some("veth".into()), ..Link::default() };
        let check = |name: &str, dst: &str, packet_filter: bool, needed: bool| {
            let way = Route {
                table: TABLE_MAIN,
                dst: net(dst),
                gateway: None,
                dev: 7,
                scope: crate::model::net::Scope::Link,
                prefsrc: None,
                metric: 0,
            };
            let (tables, links) = (vec![table.clone()], vec![link(name)]);
            let seen = Observation { tables, links, routes: vec![way], ..Observation::default() };
            let found = cleanup(&seen, "eni", packet_filter);
            assert_eq!((found.needed, found.tables.is_empty()), (needed, needed), "{name} {dst}");
        };
        check("veth0a1b2c3d", "fd00::ac:2/128", true, true);
        check("veth0a1b2c3d", "fd00::ac:2/128", false, false);
        check("veth0a1b2c3d", "fd00::ad:2/128", true, false);
        check("veth0a1b2c3d", "169.254.172.2/32", true, false);
        check("eth0", "fd00::ac:2/128", true, false);
    }

    #[test]
    fn the_local_rule_is_back_before_it_goes() {
        let local = |priority| Rule::any(Family::V6, priority, TABLE_LOCAL);
        check(vec![local(20)], &["add rule 0: from all lookup local", "delete rule 20: from all lookup local"]);
        check(vec![local(0), local(20)], &["delete rule 20: from all lookup local"]);
        check(vec![local(0)], &[]);
    }

    #[test]
    fn tables_without_a_rule_are_ours_when_they_hold_what_we_put_there() {
        let route = |dst: &str, gateway: Option<&str>| Route {
            table: 3,
            dst: net(dst),
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            dev: 7,
            scope: crate::model::net::Scope::Link,
            prefsrc: None,
            metric: 0,
        };
        let (way, default) = (route("10.0.0.1/32", None), route("0.0.0.0/0", Some("10.0.0.1")));
        let count = |routes: &[Route]| {
            let seen = Observation { routes: routes.to_vec(), ..Observation::default() };
            cleanup(&seen, "eni", false).steps.len()
        };
        assert_eq!(count(&[way, default]), 2);
        assert_eq!(count(&[way]), 0);
        assert_eq!(count(&[way, default, route("10.9.0.0/16", None)]), 0);
        assert_eq!(count(&[Route { table: 200, ..way }, Route { table: 200, ..default }]), 0);
    }
}
