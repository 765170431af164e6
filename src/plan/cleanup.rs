//! What has to go when this program leaves a node (`spec/operations.md` 11): rules, ENI tables, routes to pods, VLAN devices and
//! our part of nf_tables. Other links, addresses and sysctls stay: pods' links go with their pods, an ENI's address does no harm.
//! Of ENIs: [`enis`].
//!
//! Without a daemon nothing says what was intended, so everything is told by its shape (`spec/dataplane.md` 29): what
//! could be somebody else's stays.

pub mod enis;
mod pods;

use super::branch::{link_route, way_out};
use super::egress;
use super::host::{Action, Observation, Step, What, gateway_rule, leads_out, to_eni};
use crate::model::map::Set;
use crate::model::naming::{self, priority};
use crate::model::net::{Family, Link, Route, Rule, TABLE_LOCAL, TABLE_MAIN};
use crate::model::nft::{ChainKind, Removal, Table};
use crate::model::order::Gather as _;
use ipnet::IpNet;
use std::net::IpAddr;

/// What is ours on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleanup {
    /// Rules, routes and links: first what is to be added, then what is to be deleted.
    pub steps: Vec<Step>,
    /// Tables of nf_tables that go as a whole.
    pub tables: Vec<(Family, String)>,
    /// A table stays because living pods need it, whoever runs: without it they open no connection to the other family.
    pub needed: bool,
    /// Our chains in a table that the original uses again.
    pub chains: Vec<Removal>,
    /// Host ends of pods that are alive: they lose their network with the steps.
    pub pods: Vec<String>,
    /// What stays although it is ours or looks like it, and why; a line each.
    pub stays: Vec<String>,
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
    let led = led_to(seen);
    let pods = seen.links.iter().filter(|link| of_pod(link, veth_prefix) || led.contains(&link.index));
    let pods = pods.map(|link| (link.index, link.name.clone())).collect::<Vec<_>>();
    rules(seen, &mut cleanup);
    routes(seen, &mut cleanup);
    pods::remove(seen, &pods.iter().map(|(index, _)| *index).gather(), &mut cleanup);
    cleanup.pods = pods.into_iter().map(|(_, name)| name).collect();
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
    let outer = |dev: u32| seen.links.iter().any(|link| link.index == dev && egress::is_host_end(link));
    table.chains.iter().any(|chain| chain.name == egress::SNAT_CHAIN)
        && seen.routes.iter().any(|route| host(&route.dst) && range.contains(&route.dst.addr()) && outer(route.dev))
}

/// A pod's host end by its name or, if somebody has renamed it or it was made with another prefix, by what is noted on it. Set
/// down by somebody it is a living pod's as well: with its pod the whole link goes.
fn of_pod(link: &Link, veth_prefix: &str) -> bool {
    let mut rests = [veth_prefix, naming::VLAN_PREFIX].into_iter().filter_map(|prefix| link.name.strip_prefix(prefix));
    link.kind.as_deref() == Some("veth") && (rests.any(digits) || naming::of_veth_alias(&link.alias).is_some())
}

/// Veths to which a route leads for an address that has a pod's rule, whatever they are called and whoever has made them.
fn led_to(seen: &Observation) -> Set<u32> {
    let ruled = seen.rules.iter().filter_map(of_rule).gather::<Set<_>>();
    let ways = ways(seen).filter(|route| ruled.contains(&route.dst.addr()));
    let veth =
        |route: &&Route| seen.links.iter().any(|link| link.index == route.dev && link.kind.as_deref() == Some("veth"));
    ways.filter(veth).map(|route| route.dev).gather()
}

/// Routes that lead to a single neighbour.
fn ways(seen: &Observation) -> impl Iterator<Item = &Route> {
    seen.routes.iter().filter(|route| host(&route.dst) && route.gateway.is_none())
}

/// The pod's address in a rule to or from it.
fn of_rule(rule: &Rule) -> Option<IpAddr> {
    let net = match rule.priority {
        priority::TO_POD => rule.dst,
        priority::FROM_POD => rule.src,
        _ => None,
    };
    net.filter(host).map(|net| net.addr())
}

fn push(steps: &mut Vec<Step>, what: What, action: Action, text: String) {
    steps.push(Step { what, eni: None, action, text });
}

fn rules(seen: &Observation, cleanup: &mut Cleanup) {
    let Cleanup { steps, stays, .. } = cleanup;
    let ours = seen.rules.iter().filter_map(|rule| Some((rule, kind(rule, seen)?)));
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
    for rule in seen.rules.iter().filter(|rule| shape(rule).is_some() && kind(rule, seen).is_none()) {
        stays.push(format!("rule {rule} stays: its table holds other routes than ours"));
    }
}

fn moved_local(family: Family) -> Rule {
    Rule::any(family, priority::LOCAL_MOVED, TABLE_LOCAL)
}

fn host(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// What a rule is for, if it is one of ours.
fn kind(rule: &Rule, seen: &Observation) -> Option<What> {
    shape(rule).filter(|what| *what != What::EniRule || to_eni(rule.table, seen))
}

/// What a rule would be for, if it were ours: exactly of the shape that we give it, at its priority.
fn shape(rule: &Rule) -> Option<What> {
    let (family, table) = (rule.family, rule.table);
    let (source, destination) = (rule.src.filter(host), rule.dst.filter(host));
    let (what, shape) = match rule.priority {
        priority::LOCAL => (What::GatewayRule, gateway_rule()),
        priority::LOCAL_MOVED => (What::LocalRule, moved_local(family)),
        priority::BRANCH => {
            let device = naming::vlan_device(naming::vlan_of_table(table)?);
            let iif = rule.iif.clone().filter(|iif| *iif == device || of_strict(iif))?;
            (What::BranchRule, Rule { iif: Some(iif), ..Rule::any(family, priority::BRANCH, table) })
        }
        priority::TO_POD => (What::ToPodRule, Rule::to(destination?, priority::TO_POD, TABLE_MAIN)),
        priority::MARK => {
            let fwmark = rule.fwmark.filter(|(mark, mask)| mark == mask)?;
            (What::MarkRule, Rule { fwmark: Some(fwmark), ..Rule::any(family, priority::MARK, TABLE_MAIN) })
        }
        priority::EXTERNAL_SERVICE => {
            (What::ServiceRule, Rule { dst: rule.dst, ..Rule::any(Family::V4, rule.priority, TABLE_MAIN) })
        }
        priority::FROM_POD => return super::host::source(rule).map(|_| What::FromPodRule),
        priority::FROM_ENI if naming::in_eni_ranges(table) => {
            (What::EniRule, Rule::from(source?, priority::FROM_ENI, table))
        }
        _ => return None,
    };
    (*rule == shape).then_some(what)
}

/// Whether this is the name of a pod's veth in strict mode.
fn of_strict(name: &str) -> bool {
    name.strip_prefix(naming::VLAN_PREFIX).is_some_and(digits)
}

fn digits(rest: &str) -> bool {
    rest.len() == naming::SUFFIX_LEN && rest.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn inside(table: u32, seen: &Observation) -> Vec<Route> {
    seen.routes.iter().filter(|route| route.table == table).copied().collect()
}

/// ENI tables: those that rules of ours lead to, and those that hold just what we put there, like that of a trunk. What others
/// have put beside it stays.
fn routes(seen: &Observation, cleanup: &mut Cleanup) {
    let wanted = [What::FromPodRule, What::EniRule, What::BranchRule];
    let led_to = seen.rules.iter().filter(|rule| kind(rule, seen).is_some_and(|what| wanted.contains(&what)));
    let led_to = led_to.map(|rule| rule.table).gather::<Set<_>>();
    let tables = seen.routes.iter().map(|route| route.table).gather::<Set<_>>();
    for table in tables.into_iter().filter(|table| !(253..=255).contains(table)) {
        let routes = inside(table, seen);
        if led_to.contains(&table) || (naming::in_eni_ranges(table) && of_eni(&routes)) {
            for route in &routes {
                let text = route_text(route, seen);
                if made_by_us(route, &routes, seen) {
                    let text = format!("delete route {text}");
                    push(&mut cleanup.steps, What::EniRoute, Action::DeleteRoute(*route), text);
                } else {
                    cleanup.stays.push(format!("route {text} stays: it is not one of ours"));
                }
            }
        }
    }
}

/// Whether a route of a table of ours is the default, the way to its gateway, or that to a pod.
fn made_by_us(route: &Route, beside: &[Route], seen: &Observation) -> bool {
    let default = |gateway: IpAddr| way_out(route.table, gateway, route.dev)[1];
    if let Some(gateway) = route.gateway {
        return *route == default(gateway);
    }
    let to = route.dst.addr();
    let veth = |link: &Link| link.index == route.dev && link.kind.as_deref() == Some("veth");
    *route == link_route(route.table, to, route.dev)
        && (beside.contains(&default(to))
            || beside.iter().all(|other| other.dst.prefix_len() > 0)
            || seen.links.iter().any(veth))
}

fn route_text(route: &Route, seen: &Observation) -> String {
    let link = seen.links.iter().find(|link| link.index == route.dev);
    let name = link.map_or_else(|| format!("if{}", route.dev), |link| link.name.clone());
    route.to_string().replace(&format!("dev if{}", route.dev), &format!("dev {name}"))
}

/// A gateway on the link, the default route through it, and nothing else.
fn of_eni(routes: &[Route]) -> bool {
    routes.len() == 2 && leads_out(routes)
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
        check(vec![Rule::any(Family::V4, 32766, TABLE_MAIN), Rule::any(Family::V6, 32766, TABLE_MAIN)], &[]);
        check(vec![Rule::from(pod, 1536, 2)], &["delete rule 1536: from 10.0.0.5 lookup 2"]);
        check(vec![Rule::from(pod, 32765, 2)], &["delete rule 32765: from 10.0.0.5 lookup 2"]);
        check(vec![Rule::from(pod, 32765, 200)], &[]);
        // Old versions of the original made one for each CIDR of the VPC.
        let per_cidr = Rule { dst: Some(net("10.20.0.0/16")), ..Rule::from(pod, 1536, 2) };
        check(vec![per_cidr.clone()], &["delete rule 1536: from 10.0.0.5 to 10.20.0.0/16 lookup 2"]);
        check(vec![Rule { ipproto: Some(6), ..per_cidr }, Rule::from(net("10.0.0.0/24"), 1536, 2)], &[]);
        let marked = |mark, mask| Rule { fwmark: Some((mark, mask)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) };
        check(vec![marked(0x80, 0x80)], &["delete rule 1024: from all fwmark 0x80/0x80 lookup main"]);
        check(vec![marked(0x80, 0xff)], &[]);
        let branch = |iif: &str| Rule { iif: Some(iif.into()), ..Rule::any(Family::V4, 10, 101) };
        check(vec![branch("vlan.eth.1")], &["delete rule 10: from all iif vlan.eth.1 lookup 101"]);
        check(vec![branch("vlancc21c2d7785")], &["delete rule 10: from all iif vlancc21c2d7785 lookup 101"]);
        for other in ["eth1", "vlan100", "vlan.eth.2", "vlan.eth.01", "vlancc21c2d778x", "vlancc21c2d7785a"] {
            check(vec![branch(other)], &[]);
        }
        check(vec![Rule { table: 100, ..branch("vlancc21c2d7785") }], &[]);
        check(vec![Rule { table: 5000, ..branch("vlancc21c2d7785") }], &[]);
    }

    #[test]
    fn tables_of_others_stay() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let veth = Link { index: 8, name: "eni0a1b2c3d4e5".into(), kind: Some("veth".into()), ..Link::default() };
        let check = |rules: &[Rule], routes: &[Route], gone: &[&str], stays: &[&str]| {
            let (links, routes, rules) = (vec![veth.clone()], routes.to_vec(), rules.to_vec());
            let found = cleanup(&Observation { links, routes, rules, ..Observation::default() }, "eni", false);
            let ours = |line: &&String| !line.contains("eni0a") && !line.starts_with("sysctls");
            assert_eq!(found.texts(), gone);
            assert_eq!(found.stays.iter().filter(ours).collect::<Vec<_>>(), stays);
        };
        let from = |table| Rule::from(net("10.1.2.3/32"), 32765, table);
        let pod = |table| Rule::from(net("10.1.2.9/32"), 1536, table);
        let subnet = |table| Route { dst: net("10.1.2.0/24"), ..link_route(table, ip("10.1.2.0"), 7) };
        let [way, default] = way_out(10_001, ip("10.1.2.1"), 7);
        let rule = "delete rule 32765: from 10.1.2.3 lookup 10001";
        let stays = "rule 32765: from 10.1.2.3 lookup 10001 stays: its table holds other routes than ours";
        // amazon-ec2-net-utils, older and newer, and what people write.
        let dhcp = |route: Route| Route { prefsrc: Some(ip("10.1.2.3")), metric: 522, ..route };
        check(&[from(10_001)], &[default, subnet(10_001)], &[], &[stays]);
        check(&[from(10_001)], &[dhcp(way), dhcp(default), dhcp(subnet(10_001))], &[], &[stays]);
        check(&[from(10_001)], &[default], &[], &[stays]);
        // Ours, also when the link has gone, or with something in it.
        let ours = [
            "delete route 10.1.2.1 dev if7 table 10001 scope link",
            "delete route default via 10.1.2.1 dev if7 table 10001",
        ];
        check(&[from(10_001)], &[], &[rule], &[]);
        check(&[from(10_001)], &[way, default], &[rule, ours[0], ours[1]], &[]);
        let other = "route 10.1.2.0/24 dev if7 table 10001 scope link stays: it is not one of ours";
        check(&[from(10_001)], &[way, default, subnet(10_001)], &[rule, ours[0], ours[1]], &[other]);
        // A pod's rule says whose the table is.
        let pods = "delete rule 1536: from 10.1.2.9 lookup 10001";
        check(&[pod(10_001), from(10_001)], &[default, subnet(10_001)], &[pods, rule, ours[1]], &[other]);
        check(&[pod(10_001)], &[way], &[pods, ours[0]], &[]);
        let host = Route { dst: net("10.9.9.9/32"), ..way };
        let host_stays = "route 10.9.9.9 dev if7 table 10001 scope link stays: it is not one of ours";
        check(&[pod(10_001)], &[way, default, host], &[pods, ours[0], ours[1]], &[host_stays]);
        // An operator's VLAN, and a pod with a branch ENI of its own.
        let iif = |name: &str, table| Rule { iif: Some(name.into()), ..Rule::any(Family::V4, 10, table) };
        let [way, default] = way_out(200, ip("10.1.2.1"), 7);
        check(&[iif("vlan100", 200)], &[way, default], &[], &[]);
        let to_pod = link_route(200, ip("10.1.2.9"), 8);
        let gone = [
            "delete rule 10: from all iif vlan.eth.100 lookup 200",
            "delete route 10.1.2.1 dev if7 table 200 scope link",
            "delete route 10.1.2.9 dev eni0a1b2c3d4e5 table 200 scope link",
            "delete route default via 10.1.2.1 dev if7 table 200",
        ];
        check(&[iif("vlan.eth.100", 200)], &[way, to_pod, default], &gone, &[]);
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
    fn a_pod_is_known_whatever_was_done_to_its_veth() {
        let address = net("10.0.0.9/32");
        let noted = naming::veth_alias(crate::model::net::Mac::default(), 9001, "enicc21c2d7785");
        // Whether its network is not taken without --force, whether its address is known, and whether it is known that one is not.
        let check = |name: &str,
                     alias: &str,
                     change: &dyn Fn(&mut Observation),
                     (guarded, kept, nameless): (bool, bool, bool)| {
            let (name, alias, kind) = (name.into(), alias.into(), Some("veth".into()));
            let link = Link { index: 7, name, alias, kind, up: true, ..Link::default() };
            let eth0 = Link { index: 3, name: "eth0".into(), up: true, ..Link::default() };
            let routes = vec![crate::plan::pod::link_route(TABLE_MAIN, address.addr(), 7)];
            let rules = vec![Rule::to(address, priority::TO_POD, TABLE_MAIN)];
            let mut seen = Observation { links: vec![eth0, link], routes, rules, ..Observation::default() };
            change(&mut seen);
            let name = seen.links[1].name.clone();
            let named = |there: bool| there.then(|| name.clone()).into_iter().collect::<Vec<_>>();
            let veths = cleanup(&seen, "eni", false).pods;
            assert_eq!(veths, named(guarded), "{name}");
            let living = enis::living(&seen, &veths);
            assert_eq!(living.addresses, kept.then(|| address.addr()).into_iter().gather(), "{name}");
            assert_eq!(living.nameless, named(nameless), "{name}");
        };
        let name = "enicc21c2d7785";
        let (known, unknown) = ((true, true, false), (true, true, true));
        check(name, "", &|_| {}, known);
        check(name, "", &|seen| seen.rules.clear(), known);
        // Set down by somebody, which takes the route along; and the route flushed alone. Whose the rule is nobody can tell.
        let down = |seen: &mut Observation| {
            seen.links[1].up = false;
            seen.routes.clear();
        };
        check(name, "", &down, unknown);
        check(name, "", &|seen| seen.routes.clear(), unknown);
        let from = |seen: &mut Observation| seen.rules = vec![Rule::from(address, priority::FROM_POD, 2)];
        check(name, "", &|seen| (down(seen), from(seen)).1, unknown);
        // All flushed, as by a clean-up that was forced.
        let flushed = |seen: &mut Observation| (seen.routes.clear(), seen.rules.clear()).1;
        check(name, "", &flushed, (true, false, true));
        // Renamed, or made with another prefix: with our note, and one of the original's.
        check("odd0", &noted, &|_| {}, known);
        check("odd0", &noted, &|seen| seen.rules.clear(), known);
        check("odd0", &noted, &down, unknown);
        check("odd0", &noted, &flushed, (true, false, true));
        check("azvcc21c2d7785", "", &|_| {}, known);
        check("azvcc21c2d7785", "", &from, known);
        // Of somebody else, as far as can be told. That keeps an ENI, and nobody from cleaning up.
        check("azvcc21c2d7785", "", &|seen| seen.rules.clear(), (false, true, false));
        let others = (false, false, false);
        check("docker0", "", &|seen| (down(seen), seen.rules.clear()).1, others);
        check("odd0", "", &|seen| (seen.routes[0].dev = 3, seen.rules.clear()).1, others);
        check("odd0", "", &|seen| (seen.routes[0].gateway = Some(address.addr()), seen.rules.clear()).1, others);
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
        let [way, default] = way_out(3, "10.0.0.1".parse().unwrap(), 7);
        let count = |routes: &[Route]| {
            let seen = Observation { routes: routes.to_vec(), ..Observation::default() };
            cleanup(&seen, "eni", false).steps.len()
        };
        assert_eq!(count(&[way, default]), 2);
        assert_eq!(count(&[way]), 0);
        assert_eq!(count(&[way, default, Route { dst: net("10.9.0.0/16"), ..way }]), 0);
        assert_eq!(count(&[Route { table: 200, ..way }, Route { table: 200, ..default }]), 0);
    }
}
