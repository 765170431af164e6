//! Tables for the host plan: each fault of a node that is otherwise right, and the steps that repair it.

use super::*;
use crate::model::net::{Barrier, Conf6, Family, Scope, TABLE_LOCAL, TABLE_MAIN};
use crate::plan::sample::{eni, ip, link, mac, marked, net, route};
use proptest::prelude::*;

#[cfg(test)]
#[path = "host_rules_tests.rs"]
mod rules;

fn pod(address: &str, table: u32) -> HostPod {
    HostPod { address: ip(address), table, name: String::new(), veth: String::new() }
}

fn intent() -> Intent {
    Intent {
        node_ip: ip("10.20.11.162"),
        primary_mac: mac(1),
        vpc_cidrs: vec![net("10.20.0.0/16"), net("100.64.0.0/16")],
        excluded_cidrs: vec![net("172.16.0.0/12")],
        external_service_cidrs: vec![net("192.0.2.0/24")],
        enis: vec![eni()],
        pods: vec![pod("10.20.11.50", TABLE_MAIN), pod("10.20.12.60", 2)],
        ..Intent::default()
    }
}

/// The node that [`intent`] describes, with nothing missing.
fn right() -> Observation {
    Observation {
        links: vec![
            link(1, "lo", Mac::default()),
            // A VLAN on top of the primary link carries the same MAC and stands first.
            Link { parent: Some(3), kind: Some("vlan".into()), ..link(2, "vlan.eth.9", mac(1)) },
            link(3, "eth0", mac(1)),
            link(4, "eth1", mac(2)),
            Link { kind: Some("veth".into()), parent: Some(2), ..link(10, "eni0123456789a", mac(10)) },
            Link { kind: Some("veth".into()), parent: Some(2), ..link(11, "enib123456789a", mac(11)) },
        ],
        addresses: vec![
            Address { dev: 3, addr: net("10.20.11.162/24"), no_prefix_route: false, no_dad: false },
            Address { dev: 4, addr: net("10.20.12.5/24"), no_prefix_route: true, no_dad: false },
        ],
        routes: vec![
            route(254, "0.0.0.0/0", Some("10.20.11.1"), 3),
            Route { prefsrc: Some(ip("10.20.11.162")), ..route(254, "10.20.11.0/24", None, 3) },
            route(254, "10.20.11.50/32", None, 10),
            route(254, "10.20.12.60/32", None, 11),
            route(2, "10.20.12.1/32", None, 4),
            route(2, "0.0.0.0/0", Some("10.20.12.1"), 4),
        ],
        rules: vec![
            Rule::any(Family::V4, 0, TABLE_LOCAL),
            Rule::to(net("10.20.11.50/32"), 512, TABLE_MAIN),
            Rule::to(net("10.20.12.60/32"), 512, TABLE_MAIN),
            marked(0x80),
            Rule::to(net("192.0.2.0/24"), 1535, TABLE_MAIN),
            Rule::from(net("10.20.12.60/32"), 1536, 2),
            Rule::from(net("10.20.12.5/32"), 32765, 2),
            Rule::any(Family::V4, 32766, TABLE_MAIN),
            Rule::any(Family::V4, 32767, 253),
            Rule::any(Family::V6, 0, TABLE_LOCAL),
        ],
        tables: ruleset::tables(&intent(), "eth0", &[]).unwrap(),
        sysctls: Map::from([("net/ipv4/conf/eth0/rp_filter".into(), "2".into())]),
        ..Observation::default()
    }
}

fn texts(plan: &Plan) -> Vec<&str> {
    plan.steps.iter().map(|step| step.text.as_str()).collect()
}

/// The steps after a change of the right node.
fn check(fault: impl Fn(&mut Observation), steps: &[&str]) {
    let mut seen = right();
    fault(&mut seen);
    let plan = diff(&intent(), &seen).unwrap();
    assert_eq!(texts(&plan), steps);
    assert_eq!(plan.primary, (3, "eth0".into()));
    assert!(plan.failed.is_empty(), "{:?}", plan.failed);
}

/// The steps of the right node after a change of intent.
fn check_intent(change: impl Fn(&mut Intent), steps: &[&str]) {
    let mut wanted = intent();
    change(&mut wanted);
    assert_eq!(texts(&diff(&wanted, &right()).unwrap()), steps);
}

fn without(rule: Rule) -> impl Fn(&mut Observation) {
    move |seen| seen.rules.retain(|there| *there != rule)
}

fn with(rule: Rule) -> impl Fn(&mut Observation) {
    move |seen| seen.rules.push(rule.clone())
}

#[test]
fn a_node_that_is_right_is_left_alone() {
    check(|_| {}, &[]);
}

#[test]
fn links_are_repaired() {
    check(|seen| seen.links[2].mtu = 1500, &["set mtu 9001 on eth0"]);
    check(|seen| seen.links[3].mtu = 1500, &["set mtu 9001 on eth1"]);
    check(|seen| seen.links[3].up = false, &["set eth1 up"]);
    check(|seen| seen.links[3].no_arp = true, &["set eth1 arp on"]);
}

#[test]
fn addresses_and_routes_of_an_eni_are_repaired() {
    check(|seen| seen.addresses.truncate(1), &["add address 10.20.12.5/24 to eth1"]);
    check(
        |seen| seen.addresses[1].addr = net("10.20.12.77/24"),
        &["add address 10.20.12.5/24 to eth1", "delete address 10.20.12.77/24 from eth1"],
    );
    check(
        |seen| seen.addresses[1].addr = net("10.20.12.5/32"),
        &["add address 10.20.12.5/24 to eth1", "delete address 10.20.12.5/32 from eth1"],
    );
    // Set up by somebody who lets the kernel make the connected route: the address stays, the route goes.
    check(|seen| seen.addresses[1].no_prefix_route = false, &[]);
    check(
        |seen| seen.routes.push(Route { prefsrc: Some(ip("10.20.12.5")), ..route(254, "10.20.12.0/24", None, 4) }),
        &["delete route 10.20.12.0/24 dev eth1 scope link src 10.20.12.5"],
    );
    check(
        |seen| {
            for addr in ["169.254.7.7/16", "127.0.0.2/8", "fe80::1/64", "2001:db8::7/64"] {
                seen.addresses.push(Address { dev: 4, addr: net(addr), no_prefix_route: false, no_dad: false });
            }
        },
        &[],
    );
    check(
        |seen| seen.routes.truncate(4),
        &[
            "replace route 10.20.12.1 dev eth1 table 2 scope link",
            "replace route default via 10.20.12.1 dev eth1 table 2",
        ],
    );
    check(
        |seen| seen.routes[5].gateway = Some(ip("10.20.12.9")),
        &["replace route default via 10.20.12.1 dev eth1 table 2"],
    );
    // Somebody else's routes over the same link stay.
    check(|seen| seen.routes.push(route(254, "10.99.0.0/16", Some("10.20.12.1"), 4)), &[]);
}

#[test]
fn rules_of_others_stay() {
    for rule in [
        Rule::to(net("10.20.12.99/32"), 512, TABLE_MAIN),
        Rule::from(net("10.20.12.99/32"), 1536, 2),
        Rule::from(net("10.20.12.0/24"), 1536, 2),
        Rule::from(net("10.20.12.0/24"), 32765, 2),
        Rule::from(net("10.20.12.99/32"), 32764, 2),
        Rule::from(net("10.20.12.99/32"), 32765, 200),
        Rule::to(net("192.0.2.0/24"), 1535, 77),
        Rule { iif: Some("eth9".into()), ..Rule::to(net("198.51.100.0/24"), 1535, TABLE_MAIN) },
        Rule::any(Family::V4, 20, TABLE_MAIN),
    ] {
        check(with(rule), &[]);
    }
}

#[test]
fn leftovers_go() {
    check(with(Rule::from(net("10.20.12.99/32"), 32765, 2)), &["delete rule 32765: from 10.20.12.99 lookup 2"]);
    check(with(Rule::from(net("10.20.12.5/32"), 32765, 7)), &["delete rule 32765: from 10.20.12.5 lookup 7"]);
    // The address of an ENI that is not ours to manage.
    check(
        |seen| {
            seen.addresses.push(Address { dev: 9, addr: net("10.20.40.4/24"), no_prefix_route: false, no_dad: false });
            with(Rule::from(net("10.20.40.4/32"), 32765, 4))(seen);
        },
        &[],
    );
    check(
        |seen| {
            seen.rules.remove(0);
            with(Rule::any(Family::V4, 20, TABLE_LOCAL))(seen);
        },
        &["add rule 0: from all lookup local", "delete rule 20: from all lookup local"],
    );
    check(
        |seen| {
            seen.rules.remove(0);
            with(Rule::any(Family::V4, 20, TABLE_LOCAL))(seen);
            with(Rule { iif: Some("vlan.eth.9".into()), ..Rule::any(Family::V4, 10, 109) })(seen);
        },
        &[],
    );
    check_intent(
        |intent| intent.gone = vec![ip("10.20.12.60"), ip("10.20.11.50")],
        &[], // They are assigned: that counts.
    );
    check_intent(
        |intent| {
            intent.gone = vec![ip("10.20.12.60")];
            intent.pods.pop();
        },
        &["delete rule 512: from all to 10.20.12.60 lookup main", "delete rule 1536: from 10.20.12.60 lookup 2"],
    );
    // The address of an ENI that was given back, unless another one has it.
    for (address, gone) in [("10.20.12.9", true), ("10.20.12.5", false), ("10.20.11.162", false)] {
        let own = net(&format!("{address}/32"));
        let mut seen = right();
        let ours = [Rule::from(own, 1000, 2), Rule { dst: Some(net("10.0.0.0/8")), ..Rule::from(own, 1536, 3) }];
        let others = [Rule::from(own, 1000, 101), Rule { fwmark: Some((1, 1)), ..Rule::from(own, 1000, 2) }];
        seen.rules.extend(ours.iter().chain(&others).cloned());
        let wanted = Intent { gone: vec![ip(address)], ..intent() };
        let steps = ours.iter().filter(|_| gone).map(|rule| format!("delete rule {rule}")).collect::<Vec<_>>();
        assert_eq!(texts(&diff(&wanted, &seen).unwrap()), steps, "{address}");
    }
}

#[test]
fn settings_change_the_node() {
    check_intent(
        |intent| intent.mark = 0x100,
        &[
            "add rule 1024: from all fwmark 0x100/0x100 lookup main",
            "set nf_tables rules: table ip aws-cni chain snat-mark rule 4: counter ct mark set ct mark | 0x00000080 comment \
         \"leaves through the primary ENI\" instead of counter ct mark set ct mark | 0x00000100 comment \"leaves through \
         the primary ENI\" (and 5 more)",
            "delete rule 1024: from all fwmark 0x80/0x80 lookup main",
        ],
    );
    check_intent(
        |intent| (intent.external_snat, intent.node_port) = (true, false),
        &[
            "set nf_tables rules: table ip aws-cni is there and should not be",
            "delete rule 1024: from all fwmark 0x80/0x80 lookup main",
        ],
    );
    check_intent(
        |intent| intent.external_service_cidrs.clear(),
        &["delete rule 1535: from all to 192.0.2.0/24 lookup main"],
    );
}

#[test]
fn an_eni_without_a_link_does_not_hold_up_the_rest() {
    let mut wanted = intent();
    let later =
        HostEni { id: "eni-3".into(), mac: mac(3), own: net("10.20.13.5/24"), table: 3, ..wanted.enis[0].clone() };
    let bad = HostEni { id: "eni-4".into(), table: TABLE_MAIN, ..later.clone() };
    wanted.enis.splice(0..0, [later, bad]);
    let mut seen = right();
    seen.addresses.pop();
    let plan = diff(&wanted, &seen).unwrap();
    assert_eq!(texts(&plan), ["add address 10.20.12.5/24 to eth1"]);
    assert_eq!(plan.steps[0].eni, Some("eni-2".into()));
    assert!(plan.failed[&"eni-3".into()].starts_with("no link has MAC 02:00:00:00:00:03 (links: lo 00:"));
    assert_eq!(plan.failed[&"eni-4".into()], "route table 254 is not one of an ENI's own");
}

/// The node in IPv6 mode with nothing missing.
fn right_v6() -> (Intent, Observation) {
    let wanted = Intent {
        v6: true,
        node_ip: ip("2001:db8::162"),
        vpc_cidrs: Vec::new(),
        external_service_cidrs: Vec::new(),
        enis: vec![HostEni { own: net("2001:db8::5/64"), gateway: ip("fe80:ec2::1"), ..intent().enis[0].clone() }],
        pods: vec![pod("2001:db8::1:50", TABLE_MAIN), pod("2001:db8::2:60", 2)],
        egress: Egress::Guard,
        ..intent()
    };
    let route =
        |table, dst, gateway, dev| Route { scope: Scope::Universe, metric: 1024, ..route(table, dst, gateway, dev) };
    let marked = Rule { family: Family::V6, ..marked(0x80) };
    let seen = Observation {
        links: right().links,
        addresses: vec![
            Address { dev: 4, addr: net("fe80::ff:fe00:2/64"), no_prefix_route: false, no_dad: true },
            Address { dev: 4, addr: net("2001:db8::5/64"), no_prefix_route: true, no_dad: true },
        ],
        routes: vec![
            route(254, "2001:db8::1:50/128", None, 10),
            route(254, "2001:db8::2:60/128", None, 11),
            route(2, "fe80:ec2::1/128", None, 4),
            route(2, "::/0", Some("fe80:ec2::1"), 4),
        ],
        rules: vec![
            Rule::any(Family::V6, 0, TABLE_LOCAL),
            Rule::to(net("2001:db8::1:50/128"), 512, TABLE_MAIN),
            Rule::to(net("2001:db8::2:60/128"), 512, TABLE_MAIN),
            marked,
            Rule::from(net("2001:db8::2:60/128"), 1536, 2),
            Rule::from(net("2001:db8::5/128"), 32765, 2),
            Rule::any(Family::V6, 32766, TABLE_MAIN),
            Rule::any(Family::V4, 32766, TABLE_MAIN),
        ],
        tables: ruleset::tables(&wanted, "eth0", &[]).unwrap(),
        ..Observation::default()
    };
    (wanted, seen)
}

#[test]
fn an_ipv6_node_is_repaired() {
    let check = |fault: &dyn Fn(&mut Observation), steps: &[&str]| {
        let (wanted, mut seen) = right_v6();
        fault(&mut seen);
        assert_eq!(texts(&diff(&wanted, &seen).unwrap()), steps);
    };
    check(&|_| {}, &[]);
    // What DHCP gives is the same address with another length.
    check(&|seen| seen.addresses[1].addr = net("2001:db8::5/128"), &[]);
    check(
        &|seen| {
            // A link that is down has no address of its own, and keeps none.
            seen.links[3].up = false;
            seen.addresses.clear();
        },
        &["add address fe80::ff:fe00:2/64 to eth1", "set eth1 up", "add address 2001:db8::5/64 to eth1"],
    );
    check(
        &|seen| seen.addresses.retain(|address| address.addr.addr() == ip("2001:db8::5")),
        &["add address fe80::ff:fe00:2/64 to eth1"],
    );
    check(
        &|seen| seen.addresses.push(Address { addr: net("2001:db8::77/64"), ..seen.addresses[1] }),
        &["delete address 2001:db8::77/64 from eth1"],
    );
    check(
        &|seen| seen.routes.push(Route { metric: 256, ..route(254, "2001:db8::/64", None, 4) }),
        &["delete route 2001:db8::/64 dev eth1 scope link metric 256"],
    );
    check(
        &|seen| seen.rules.truncate(1),
        &[
            "add rule 1024: from all fwmark 0x80/0x80 lookup main",
            "add rule 32766: from all lookup main",
            "add IPv6 rule 32766: from all lookup main",
            "add rule 32765: from 2001:db8::5 lookup 2",
            "add rule 512: from all to 2001:db8::1:50 lookup main",
            "add rule 1536: from 2001:db8::2:60 lookup 2",
            "add rule 512: from all to 2001:db8::2:60 lookup main",
        ],
    );
    check(
        &|seen| seen.rules.push(Rule::from(net("2001:db8::2:60/128"), 1536, 3)),
        &["delete rule 1536: from 2001:db8::2:60 lookup 3"],
    );
    check(&|seen| seen.tables.clear(), &["set nf_tables rules: table ip aws-cni is missing"]);
}

#[test]
fn links_of_enis_whose_source_is_kept_are_followed() {
    let wanted = Intent { keep_host_source: true, ..intent() };
    let check = |fault: &dyn Fn(&mut Observation), steps: &[&str]| {
        let mut seen = right();
        seen.tables = ruleset::tables(&wanted, "eth0", &seen.links).unwrap();
        fault(&mut seen);
        assert_eq!(texts(&diff(&wanted, &seen).unwrap()), steps);
        seen.tables = ruleset::tables(&wanted, "eth0", &seen.links).unwrap();
        assert_eq!(
            ruleset::differences(&ruleset::tables(&intent(), "eth0", &seen.links).unwrap(), &seen.tables).len(),
            3
        );
    };
    check(&|_| {}, &[]);
    check(
        &|seen| seen.links[3].name = "ens6".into(),
        &["set nf_tables rules: table ip aws-cni chain snat-primary rule 5: oifname \"eth1\" counter return comment \
           \"secondary ENI\" instead of oifname \"ens6\" counter return comment \"secondary ENI\""],
    );
    // The primary ENI's link and those of others are none of these.
    check(&|seen| seen.links.push(link(20, "eth2", mac(20))), &[]);
    // Without the setting nothing depends on them.
    let text = |links: &[Link]| ruleset::tables(&intent(), "eth0", links).unwrap();
    assert_eq!(text(&right().links), text(&[]));
}

#[test]
fn a_trunk_has_no_rule_of_its_own() {
    let mut wanted = intent();
    wanted.enis[0].trunk = true;
    let mut seen = right();
    assert!(diff(&wanted, &seen).unwrap().steps.is_empty(), "a rule from before it was a trunk stays");
    seen.rules.retain(|rule| rule.priority != 32765);
    assert!(diff(&wanted, &seen).unwrap().steps.is_empty());
}

#[test]
fn a_trunk_without_an_address_of_its_own_has_the_links() {
    let (mut wanted, mut seen) = right_v6();
    let own = net("fe80::ff:fe00:2/64");
    (wanted.enis[0].own, wanted.enis[0].trunk) = (own, true);
    seen.routes.push(route(254, "fe80::/64", None, 4));
    let plan = diff(&wanted, &seen).unwrap();
    assert!(plan.steps.is_empty() && plan.failed.is_empty(), "{:?}", texts(&plan));
    seen.addresses.remove(0);
    assert_eq!(texts(&diff(&wanted, &seen).unwrap()), ["add address fe80::ff:fe00:2/64 to eth1"]);
}

#[test]
fn without_the_primary_link_nothing_is_planned() {
    let mut seen = right();
    seen.links.remove(2);
    let error = diff(&intent(), &seen).unwrap_err().to_string();
    assert!(error.starts_with("no link has MAC 02:00:00:00:00:01 (links: lo "), "{error}");
}

/// What the kernel makes of a step, as far as the plan is concerned.
fn carry_out(seen: &mut Observation, step: &Step) {
    let by_index = |links: &mut Vec<Link>, index: u32| links.iter().position(|link| link.index == index).unwrap();
    match &step.action {
        Action::SetMtu(index, mtu) => {
            let at = by_index(&mut seen.links, *index);
            seen.links[at].mtu = *mtu;
        }
        Action::SetUp(index) => {
            let at = by_index(&mut seen.links, *index);
            (seen.links[at].up, seen.links[at].no_arp) = (true, false);
        }
        Action::SetMac(index, mac) => {
            let at = by_index(&mut seen.links, *index);
            seen.links[at].mac = Some(*mac);
        }
        Action::SetSysctl(path, value) => drop(seen.sysctls.insert(path.clone(), value.clone())),
        Action::AddAddress(address) => seen.addresses.push(*address),
        Action::DeleteAddress(address) => seen.addresses.retain(|there| there != address),
        Action::ReplaceRoute(route) => {
            seen.routes
                .retain(|there| (there.table, there.dst, there.metric) != (route.table, route.dst, route.metric));
            seen.routes.push(*route);
            if let Some(at) = seen.barriers.iter().position(|barrier| barrier.in_place_of(route)) {
                seen.barriers.remove(at);
            }
        }
        Action::DeleteRoute(route) => seen.routes.retain(|there| there != route),
        Action::DeleteBarrier(barrier) => seen.barriers.retain(|there| there != barrier),
        Action::DeleteNeighbour(dev, addr) => seen.neighbours.retain(|there| (there.dev, there.addr) != (*dev, *addr)),
        Action::AddRule(rule) => {
            assert!(!seen.rules.contains(rule), "{rule} is there already");
            seen.rules.push(rule.clone());
        }
        Action::DeleteRule(rule) => {
            let at =
                seen.rules.iter().position(|there| there == rule).expect("a rule is deleted only when it is there");
            seen.rules.remove(at);
        }
        Action::SetTables(tables) => seen.tables.clone_from(tables),
        Action::NoteVeth(index, mac, mtu, name) => {
            let at = by_index(&mut seen.links, *index);
            seen.links[at].alias = naming::veth_alias(*mac, *mtu, name);
        }
        Action::Rename(index, name) => {
            assert!(!seen.links.iter().any(|link| link.name == *name), "{name} is taken");
            let at = by_index(&mut seen.links, *index);
            seen.links[at].name.clone_from(name);
        }
        Action::NoteEgress(index, end) => {
            let at = by_index(&mut seen.links, *index);
            seen.links[at].alias = end.alias();
        }
        Action::AddVlan(..) | Action::DeleteLink(_) => panic!("there are no branch ENIs here"),
    }
}

#[test]
fn what_the_plugin_has_made_of_a_pod_is_put_back() {
    let digits = "0123456789a";
    let named = |name: &str| HostPod { name: name.into(), veth: digits.into(), ..pod("10.20.12.60", 2) };
    let mut wanted = intent();
    wanted.pods = vec![named("default/one")];
    let wired = || {
        let mut seen = right();
        seen.routes.retain(|route| route.dev != 10 && route.dev != 11);
        seen.routes.push(route(254, "10.20.12.60/32", None, 10));
        seen.links[4].alias = naming::veth_alias(mac(10), 9001, "eni0123456789a");
        seen
    };
    let check = |fault: &dyn Fn(&mut Observation), steps: &[&str]| {
        let mut seen = wired();
        fault(&mut seen);
        let plan = diff(&wanted, &seen).unwrap();
        assert_eq!(texts(&plan), steps);
        plan.steps.iter().for_each(|step| carry_out(&mut seen, step));
        assert_eq!(texts(&diff(&wanted, &seen).unwrap()), Vec::<&str>::new());
    };
    let lost = |seen: &mut Observation| seen.routes.retain(|route| route.dev != 10);
    let route_back = "replace route 10.20.12.60 dev eni0123456789a";
    check(&|_| {}, &[]);
    check(&lost, &[route_back]);
    check(
        &|seen| {
            lost(seen);
            seen.rules.retain(|rule| !matches!(rule.priority, 512 | 1536));
        },
        &[route_back, "add rule 1536: from 10.20.12.60 lookup 2", "add rule 512: from all to 10.20.12.60 lookup main"],
    );
    check(&|seen| seen.links[4].mac = Some(mac(77)), &["set address 02:00:00:00:00:0a on eni0123456789a"]);
    check(&|seen| seen.links[4].mtu = 1500, &["set mtu 9001 on eni0123456789a"]);
    check(
        &|seen| {
            lost(seen);
            seen.links[4].up = false;
        },
        &["set eni0123456789a up", route_back],
    );
    // A link of the original's tells neither MAC nor MTU: what it has then is noted. That of somebody else is left alone.
    let bare = |seen: &mut Observation, alias: &str| {
        seen.links[4].alias = alias.into();
        seen.links[4].mac = Some(mac(77));
        seen.links[4].mtu = 1500;
    };
    check(&|seen| bare(seen, ""), &["note mac 02:00:00:00:00:4d mtu 1500 on eni0123456789a"]);
    check(&|seen| bare(seen, "uplink of somebody"), &[]);
    // What an earlier version has noted has no name.
    let earlier = "aws-cni mac 02:00:00:00:00:0a mtu 9001";
    let note = "note mac 02:00:00:00:00:0a mtu 9001 on eni0123456789a";
    check(&|seen| seen.links[4].alias = earlier.into(), &[note]);
    // One that was renamed is told by the name that is noted on it, else by the route that leads over it.
    let rename = |seen: &mut Observation| seen.links[4].name = "odd0".into();
    let back = "set name eni0123456789a on odd0";
    check(&rename, &[back]);
    check(
        &|seen| {
            rename(seen);
            lost(seen);
        },
        &[back, "replace route 10.20.12.60 dev odd0"],
    );
    let told = |fault: &dyn Fn(&mut Observation), steps: &[&str]| {
        let mut seen = wired();
        rename(&mut seen);
        fault(&mut seen);
        assert_eq!(texts(&diff(&wanted, &seen).unwrap()), steps);
    };
    told(&|seen| seen.links[4].alias = earlier.into(), &[back]);
    told(
        &|seen| {
            seen.links[4].alias = earlier.into();
            lost(seen);
        },
        &[],
    );
    told(&|seen| seen.links[4].alias.clear(), &[]);
    told(&|seen| seen.links[4].alias = "uplink of somebody".into(), &[]);
    // Another link has its name: a later veth of the pod's, or somebody else's.
    told(
        &|seen| seen.links[5].name = "eni0123456789a".into(),
        &["note mac 02:00:00:00:00:0b mtu 9001 on eni0123456789a", "replace route 10.20.12.60 dev eni0123456789a"],
    );
    told(
        &|seen| {
            seen.links[5].name = "eni0123456789a".into();
            seen.links[5].kind = None;
        },
        &[],
    );
    // Of one that is not in the intent yet only the MAC is kept.
    let young = |seen: &mut Observation| {
        seen.links[5].alias = naming::veth_alias(mac(12), 9001, "enib123456789a");
        (seen.links[5].up, seen.links[5].mtu) = (false, 1400);
    };
    check(&young, &["set address 02:00:00:00:00:0c on enib123456789a"]);
    // Without its link a pod is on its way in or out.
    check(
        &|seen| {
            lost(seen);
            seen.links.remove(4);
        },
        &[],
    );
    // Another prefix is as good, the same digits elsewhere in a name are not.
    check(
        &|seen| {
            lost(seen);
            seen.links[4].name = format!("vlan{digits}");
        },
        &[&format!("replace route 10.20.12.60 dev vlan{digits}")],
    );
    check(
        &|seen| {
            lost(seen);
            seen.links[4].name = format!("{digits}x");
            seen.links[4].alias = "uplink of somebody".into();
        },
        &[],
    );
    // Which of two links it is, or which of two pods, nobody knows.
    check(
        &|seen| {
            lost(seen);
            seen.links[5].name = format!("veth{digits}");
        },
        &[],
    );
    let mut both = wanted.clone();
    both.pods.push(HostPod { address: ip("10.20.12.61"), ..named("default/one") });
    let mut seen = wired();
    lost(&mut seen);
    assert_eq!(texts(&diff(&both, &seen).unwrap()), Vec::<&str>::new());
}

#[test]
fn nothing_stands_in_the_place_of_our_routes() {
    let barrier = |table, dst: &str, metric| Barrier { kind: 6, table, dst: net(dst), dev: 0, metric };
    let with = |barrier: Barrier| move |seen: &mut Observation| seen.barriers.push(barrier);
    check(with(barrier(2, "0.0.0.0/0", 0)), &["delete route blackhole default table 2"]);
    check(with(barrier(2, "10.20.12.1/32", 0)), &["delete route blackhole 10.20.12.1 table 2"]);
    // In its place, not before it.
    check(
        |seen| {
            seen.routes.pop();
            seen.barriers.push(barrier(2, "0.0.0.0/0", 0));
        },
        &["replace route default via 10.20.12.1 dev eth1 table 2"],
    );
    // Of others.
    for other in [barrier(2, "0.0.0.0/0", 9), barrier(2, "192.0.2.0/24", 0), barrier(254, "10.20.200.0/24", 0)] {
        check(with(other), &[]);
    }
}

#[test]
fn what_comes_in_by_our_links_goes_on() {
    let set = |passing: Option<bool>| {
        move |seen: &mut Observation| {
            seen.links[0].forwards = passing;
            seen.links[2].forwards = Some(false);
            seen.links[3].forwards = Some(false);
        }
    };
    check(set(Some(true)), &["set sysctl net/ipv4/conf/eth1/forwarding to 1 instead of 0"]);
    // Off everywhere, or nobody knows.
    check(set(Some(false)), &[]);
    check(set(None), &[]);
}

#[test]
fn what_add_has_set_on_links_of_pods_is_kept() {
    let set = |index: u32, queue, routing, conf: [u32; 3]| {
        move |seen: &mut Observation| {
            let [forwarding, accept_ra, accept_redirects] = conf;
            let link = seen.links.iter_mut().find(|link| link.index == index).unwrap();
            link.conf6 = Some(Conf6 { forwarding, accept_ra, accept_redirects });
            link.queue = queue;
            seen.links[0].conf6 = Some(Conf6 { forwarding: routing, ..Conf6::default() });
        }
    };
    let [forwarding, ra, redirects] = ["forwarding", "accept_ra", "accept_redirects"]
        .map(|key| format!("set sysctl net/ipv6/conf/enib123456789a/{key} to 0 instead of 1"));
    check_veths(set(11, 1000, 0, [0, 0, 0]), &[]);
    check_veths(set(11, 1000, 0, [1, 1, 1]), &[&ra, &redirects, &forwarding]);
    check_veths(set(11, 1000, 1, [1, 0, 0]), &[]); // somebody has written it for all
    check_veths(set(11, 0, 0, [0, 1, 1]), &[&ra]); // the original's
    check_veths(set(10, 1000, 0, [1, 1, 1]), &[]); // no pod's that is known
}

/// As [`check`], with one pod that is known to have the veth 11.
fn check_veths(fault: impl Fn(&mut Observation), steps: &[&str]) {
    let veth = "b123456789a".to_owned();
    let pods = vec![HostPod { veth, ..pod("10.20.12.60", 2) }, pod("10.20.11.50", TABLE_MAIN)];
    let mut seen = right();
    seen.links[5].alias = naming::veth_alias(mac(11), seen.links[5].mtu, "enib123456789a");
    fault(&mut seen);
    assert_eq!(texts(&diff(&Intent { pods, ..intent() }, &seen).unwrap()), steps);
}

#[test]
fn nobody_tells_the_kernel_for_good_where_a_pod_is() {
    let fixed = |dev, address: &str, there: Option<Mac>, pod: Option<Mac>| {
        let address = ip(address);
        move |seen: &mut Observation| {
            seen.neighbours.push(Neighbour { dev, addr: address, mac: there, permanent: true, noarp: false });
            seen.peers.extend(pod.map(|mac| (dev, mac)));
        }
    };
    let wrong = "delete neighbour 10.20.12.60 lladdr 02:00:00:00:00:09 dev enib123456789a";
    check_veths(fixed(11, "10.20.12.60", Some(mac(9)), Some(mac(7))), &[wrong]);
    check_veths(fixed(11, "10.20.12.60", Some(mac(9)), None), &[wrong]);
    check_veths(fixed(11, "10.20.12.60", Some(mac(9)), Some(mac(9))), &[]); // it is true
    check_veths(fixed(11, "10.20.12.61", Some(mac(9)), Some(mac(7))), &[]); // not the pod's address
    for link in [4, 10, 77] {
        check_veths(fixed(link, "10.20.12.60", Some(mac(9)), Some(mac(7))), &[]); // not its link
    }
    let learned = |seen: &mut Observation| {
        fixed(11, "10.20.12.60", Some(mac(9)), Some(mac(7)))(seen);
        seen.neighbours[0].permanent = false;
    };
    check_veths(learned, &[]);
}

#[test]
fn sysctls_are_kept() {
    let path = "net/ipv4/conf/eth0/rp_filter";
    check(
        |seen| drop(seen.sysctls.insert(path.into(), "1".into())),
        &["set sysctl net/ipv4/conf/eth0/rp_filter to 2 instead of 1"],
    );
    check(|seen| seen.sysctls.clear(), &[]); // this kernel has none, or nobody looked
    let of = |intent: &Intent| sysctls(intent, "ens5", &[]).into_iter().map(|(path, _)| path).collect::<Vec<_>>();
    assert_eq!(of(&intent()), ["net/ipv4/conf/ens5/rp_filter"]);
    let six = ["net/ipv4/conf/ens5/rp_filter", "net/ipv6/conf/all/forwarding", "net/ipv6/conf/ens5/accept_ra"];
    assert_eq!(of(&Intent { egress: Egress::Guard, ..intent() }), six);
    let off = ["net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/ens5/disable_ipv6"];
    assert_eq!(of(&Intent { v6: true, ..intent() }), [&six[..1], &off, &six[1..]].concat());
}

proptest! {
    /// Whatever part of a node is missing and whatever leftovers it has, one plan makes it right, no pod ever loses its
    /// rule, nothing is deleted and added again, and what belongs to others is still there.
    #[test]
    fn one_plan_is_enough(
        missing in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
        strays in proptest::collection::vec((0u8..8, 2u32..6), 0..6),
        no_table in any::<bool>(),
        short_mtu in any::<bool>(),
    ) {
        let mut seen = right();
        for index in missing {
            match index.index(4) {
                0 => drop(seen.rules.remove(index.index(seen.rules.len()))),
                1 => seen.routes.truncate(4 + index.index(3).min(seen.routes.len() - 4)),
                2 => seen.addresses.truncate(1),
                _ => seen.links[3].up = false,
            }
        }
        for (last, table) in strays {
            let address = net(&format!("10.20.12.{}/32", 56 + last));
            for rule in [Rule::from(address, 1536, table), Rule::from(address, 32765, table)] {
                if !seen.rules.contains(&rule) {
                    seen.rules.push(rule);
                }
            }
        }
        if no_table { seen.tables.clear() }
        if short_mtu { seen.links[2].mtu = 1500 }
        let before = seen.clone();
        let plan = diff(&intent(), &seen).unwrap();
        let pod = Rule::from(net("10.20.12.60/32"), 1536, 2);
        let mut had = seen.rules.contains(&pod);
        for step in &plan.steps {
            carry_out(&mut seen, step);
            prop_assert!(!had || seen.rules.contains(&pod));
            had |= seen.rules.contains(&pod);
        }
        prop_assert!(had);
        let again = diff(&intent(), &seen).unwrap();
        prop_assert_eq!(texts(&again), Vec::<&str>::new());
        for rule in before.rules.iter().filter(|rule| rule.priority == 1536 && !rule.src.unwrap().to_string().contains(".60/")) {
            prop_assert!(seen.rules.contains(rule), "{} is nobody's known leftover", rule);
        }
    }
}
