//! Tables for the watch: which of the kernel's notices lead to a look, and when.

use super::*;
use crate::model::map::Set;
use crate::model::net::{Address, Family, Scope};
use crate::plan::host::{Action, Egress, HostBranch, HostPod};

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac(last: u8) -> Mac {
    Mac([0x02, 0, 0, 0, 0, last])
}

const DIGITS: &str = "0123456789a";

fn veth() -> Link {
    Link {
        kind: Some("veth".into()),
        mtu: 1500,
        alias: naming::veth_alias(mac(9), 1500),
        ..link(9, &format!("eni{DIGITS}"), mac(9))
    }
}

fn link(index: u32, name: &str, mac: Mac) -> Link {
    Link { index, name: name.into(), mac: Some(mac), mtu: 9001, up: true, ..Link::default() }
}

fn pod() -> HostPod {
    HostPod { address: ip("10.20.12.60"), table: 2, name: "default/one".into(), veth: DIGITS.into() }
}

fn watch() -> Watch {
    let intent = Intent {
        node_ip: ip("10.20.11.162"),
        primary_mac: mac(1),
        external_service_cidrs: vec![net("192.0.2.0/24")],
        enis: vec![HostEni {
            id: "eni-2".into(),
            mac: mac(2),
            card: 0,
            device: 1,
            own: net("10.20.12.5/24"),
            gateway: ip("10.20.12.1"),
            table: 2,
            trunk: false,
        }],
        pods: vec![pod()],
        egress: Egress::Off,
        ..Intent::default()
    };
    let links = vec![link(1, "lo", Mac::default()), link(3, "eth0", mac(1)), link(4, "eth1", mac(2)), veth()];
    Watch::new(&intent, &Observation { links, ..Observation::default() })
}

fn route(table: u32, dst: &str, gateway: Option<&str>, dev: u32) -> Route {
    let scope = if gateway.is_none() { Scope::Link } else { Scope::Universe };
    Route { table, dst: net(dst), gateway: gateway.map(ip), dev, scope, prefsrc: None, metric: 0 }
}

fn marked(bits: u32) -> Rule {
    Rule { fwmark: Some((bits, bits)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) }
}

#[track_caller]
fn check(notice: &Notice, look: bool) {
    assert_eq!(watch().concerns(notice), look, "{notice:?}");
}

#[test]
fn rules() {
    let single = |text: &str| net(&format!("{text}/32"));
    let (ours, other) = ("10.20.12.60", "10.20.12.61");
    // Whether a new one and whether a lost one is a reason to look.
    for (rule, new, gone) in [
        (Rule::to(single(ours), 512, TABLE_MAIN), false, true),
        (Rule::to(single(other), 512, TABLE_MAIN), false, false), // an ADD or a DEL
        (Rule::from(single(ours), 1536, 2), false, true),
        (Rule::from(single(ours), 1536, 3), true, false),
        (Rule::from(single(other), 1536, 2), false, false),
        (marked(0x80), false, true),
        (marked(0x40), true, false),
        (Rule { fwmark: Some((0x80, 0xff)), ..marked(0) }, false, false),
        (Rule::to(net("192.0.2.0/24"), 1535, TABLE_MAIN), false, true),
        (Rule::to(net("198.51.100.0/24"), 1535, TABLE_MAIN), true, false),
        (Rule::from(single("10.20.12.5"), 32765, 2), false, true),
        (Rule::from(single("10.20.12.5"), 32765, 3), true, false),
        (Rule::from(single("10.20.12.5"), 32765, 101), false, false),
        (Rule::any(Family::V4, 0, TABLE_LOCAL), false, true),
        (Rule::any(Family::V4, 100, 100), false, false),
        (Rule { foreign: true, ..marked(0x80) }, false, false),
    ] {
        check(&Notice::Rule(rule.clone()), new);
        check(&Notice::RuleGone(rule), gone);
    }
}

#[test]
fn routes() {
    for (route, new, gone) in [
        (route(TABLE_MAIN, "10.20.12.60/32", None, 9), false, true),
        (route(TABLE_MAIN, "10.20.12.60/32", None, 7), true, false),
        (route(TABLE_MAIN, "10.20.12.61/32", None, 7), false, false), // an ADD or a DEL
        (route(2, "10.20.12.1/32", None, 4), false, true),
        (route(2, "0.0.0.0/0", Some("10.20.12.1"), 4), false, true),
        (route(2, "0.0.0.0/0", Some("10.20.12.9"), 4), true, true),
        (route(2, "0.0.0.0/0", Some("10.20.12.1"), 3), true, true),
        (route(2, "172.16.0.0/12", Some("10.20.12.1"), 4), false, true),
        (route(TABLE_MAIN, "10.20.12.0/24", None, 4), true, false),
        (route(TABLE_MAIN, "10.20.11.0/24", None, 3), false, false),
        (route(100, "0.0.0.0/0", Some("10.20.12.1"), 4), false, false),
    ] {
        check(&Notice::Route(route), new);
        check(&Notice::RouteGone(route), gone);
    }
}

#[test]
fn links_addresses_and_the_rest() {
    let (eth0, eth1) = (link(3, "eth0", mac(1)), link(4, "eth1", mac(2)));
    for (link, look) in [
        (eth0.clone(), false),
        (Link { name: "ens5".into(), ..eth0.clone() }, true),
        (Link { mtu: 1500, ..eth0.clone() }, true),
        (Link { up: false, ..eth0 }, false), // not ours to set up
        (Link { up: false, ..eth1.clone() }, true),
        (Link { mac: Some(mac(7)), ..eth1.clone() }, true),
        (Link { index: 12, ..eth1.clone() }, true), // it is there at last
        (veth(), false),
        (Link { up: false, ..veth() }, true),
        (Link { mac: Some(mac(7)), ..veth() }, true),
        (Link { mtu: 1400, ..veth() }, true),
        (Link { index: 12, mac: Some(mac(12)), up: false, ..veth() }, false), // an ADD
    ] {
        check(&Notice::Link(link), look);
    }
    check(&Notice::LinkGone(eth1), false);
    let address = |dev, text: &str| Address { dev, addr: net(text), no_prefix_route: false, no_dad: false };
    for (address, new, gone) in [
        (address(4, "10.20.12.5/24"), false, true),
        (address(4, "10.20.12.77/24"), true, false),
        (address(4, "169.254.3.4/16"), false, false),
        (address(4, "fe80::1/64"), false, false),
        (address(3, "10.20.11.162/24"), false, false),
    ] {
        check(&Notice::Address(address), new);
        check(&Notice::AddressGone(address), gone);
    }
    // From it the host asks for the MAC of an IPv6 pod.
    let (six, own) = (Intent { v6: true, ..watch().intent }, address(9, "fe80::1/64"));
    let watch_six = Watch::new(&six, &Observation { links: vec![veth()], ..Observation::default() });
    assert!(watch_six.concerns(&Notice::AddressGone(own)) && !watch().concerns(&Notice::AddressGone(own)));
    assert!(!watch_six.concerns(&Notice::AddressGone(address(8, "fe80::1/64"))), "a stranger's");
    for (dev, rp_filter, look) in [(3, Some(1), true), (3, Some(2), false), (3, None, false), (4, Some(1), false)] {
        check(&Notice::Conf { family: Family::V4, dev, forwarding: Some(0), rp_filter }, look);
    }
    check(&Notice::Conf { family: Family::V4, dev: ALL, forwarding: Some(1), rp_filter: Some(1) }, false);
    let off = |family| Notice::Conf { family, dev: ALL, forwarding: Some(0), rp_filter: None };
    let egress = Intent { egress: Egress::Snat(ip("10.20.11.162")), ..six.clone() };
    for (intent, ours) in [(Intent::default(), [false, false]), (six, [false, true]), (egress, [true, true])] {
        let watch = Watch::new(&intent, &Observation::default());
        assert_eq!([off(Family::V4), off(Family::V6)].map(|notice| watch.concerns(&notice)), ours, "{intent:?}");
    }
    check(&Notice::Overrun, true);
    for (table, look) in [("aws-cni", true), ("kube-proxy", false)] {
        let tables = Set::from([table.to_owned()]);
        check(&Notice::Ruleset { generation: 7, tables, process: None }, look);
    }
}

#[test]
fn a_vlan_device_that_goes_is_looked_for() {
    let eni = crate::plan::branch::Branch::new(7, mac(7), ip("10.20.13.1")).unwrap();
    let (address, veth) = (ip("10.20.13.70"), "b123456789a".to_owned());
    let branches = vec![HostBranch { address, eni, name: "default/branch".into(), veth: veth.clone() }];
    let device = Link { kind: Some("vlan".into()), ..link(20, "vlan.eth.7", mac(7)) };
    let end = Link { kind: Some("veth".into()), ..link(21, &format!("vlan{veth}"), mac(21)) };
    let seen = Observation { links: vec![device.clone(), end.clone()], ..Observation::default() };
    let mut watch = Watch::new(&Intent { branches, ..Intent::default() }, &seen);
    assert!(!watch.concerns(&Notice::Link(device.clone())));
    assert!(watch.concerns(&Notice::Link(Link { mtu: 1500, ..device.clone() })));
    assert!(watch.concerns(&Notice::LinkGone(device.clone())) && !watch.concerns(&Notice::LinkGone(end)));
    assert_eq!(watch.release(address), Some(21), "it is to go");
    assert!(!watch.concerns(&Notice::LinkGone(device)) && watch.intent().branches.is_empty());
}

#[test]
fn what_goes_of_a_released_pod_is_to_go() {
    let mut watch = watch();
    watch.release(ip("10.20.12.61"));
    let gone = Notice::RuleGone(Rule::to(net("10.20.12.60/32"), 512, TABLE_MAIN));
    assert!(watch.concerns(&gone));
    watch.release(ip("10.20.12.60"));
    assert!(!watch.concerns(&gone));
    assert!(!watch.concerns(&Notice::RouteGone(route(TABLE_MAIN, "10.20.12.60/32", None, 9))));
    assert!(!watch.concerns(&Notice::Link(Link { up: false, ..veth() })));
    assert!(watch.intent().pods.is_empty());
}

fn at(millis: u64) -> Mono {
    Mono::from_nanos(millis * 1_000_000)
}

/// Looks that take `took` ms each, when there is a notice every `every` ms for `length` ms.
fn looks(every: u64, length: u64, took: u64) -> Vec<u64> {
    let (mut pace, mut found, mut now) = (Pace::default(), Vec::new(), 0);
    while now < length {
        if now % every == 0 {
            pace.ask(at(now));
        }
        now += 1;
        if pace.due().is_some_and(|due| due <= at(now)) {
            found.push(now);
            now += took;
            pace.looked(at(now), Duration::from_millis(took));
            now = now.next_multiple_of(every);
        }
    }
    found
}

#[test]
fn a_storm_does_not_make_a_storm_of_looks() {
    // One change is looked at after a moment, a second one soon.
    assert_eq!(looks(10_000, 5_000, 3), [10]);
    assert_eq!(looks(50, 100, 1), [10]);
    let storm = looks(1, 60_000, 1);
    assert!((65..=75).contains(&storm.len()), "{} looks in a minute: {storm:?}", storm.len());
    assert!(storm[1] - storm[0] <= 110, "{storm:?}");
    // Changes with quiet between are each looked at once and at once.
    let calm = looks(5_000, 60_000, 1);
    assert_eq!(calm.len(), 12);
    assert!(calm.iter().all(|at| at % 5_000 == 10), "{calm:?}");
    // What was left for later is a reason too, and answered by any look.
    let mut pace = Pace::default();
    pace.leave(at(2000));
    pace.leave(at(3000));
    assert_eq!(pace.due(), Some(at(2000)));
    pace.ask(at(100));
    assert_eq!(pace.due(), Some(at(110)));
    pace.looked(at(111), Duration::ZERO);
    assert_eq!(pace.due(), None);
    // Looks that take long are made less often at once.
    let slow = looks(1, 10_000, 50);
    assert!(slow[1] - slow[0] >= 500, "{slow:?}");
}

#[test]
fn whoever_undoes_a_repair_again_and_again_is_given_way() {
    let step = |what, text: &str| Step { what, eni: None, action: Action::SetUp(1), text: text.into() };
    let (rule, other) = (step(What::MarkRule, "add rule 1024"), step(What::ToPodRule, "add rule 512"));
    let mut quarrels = Quarrels::default();
    for n in 0..Quarrels::TIMES_MAX {
        assert_eq!(quarrels.judge(at(u64::from(n)), &rule, false), Verdict::Mend);
    }
    assert_eq!(quarrels.judge(at(10), &rule, false), Verdict::GiveWay(at(1004)), "told once");
    assert_eq!(quarrels.judge(at(11), &rule, false), Verdict::Hold(at(1004)));
    assert_eq!(quarrels.judge(at(12), &other, false), Verdict::Mend, "that is another thing");
    assert_eq!(quarrels.judge(at(13), &rule, true), Verdict::Mend, "regular looks mend always");
    assert_eq!(quarrels.judge(at(14), &rule, false), Verdict::Hold(at(2013)));
    let mut now = 2013;
    for pause in [4, 8, 16, 30, 30, 30] {
        assert_eq!(quarrels.judge(at(now), &rule, false), Verdict::Mend);
        assert_eq!(quarrels.judge(at(now + 1), &rule, false), Verdict::Hold(at(now + pause * 1000)));
        now += pause * 1000;
    }
    let later = at(now - 30_000).plus(Quarrels::MEMORY);
    quarrels.forget(later.minus(Duration::from_millis(1)));
    assert_eq!(quarrels.repairs.len(), 1, "the other is forgotten");
    quarrels.forget(later);
    assert!(quarrels.repairs.is_empty());
    assert_eq!(quarrels.judge(later, &rule, false), Verdict::Mend, "nobody has undone it for long");
    // The rule set's text is that of its first difference.
    for n in 0..=Quarrels::TIMES_MAX {
        let verdict = quarrels.judge(later, &step(What::Ruleset, &format!("difference {n}")), false);
        let wait = Verdict::GiveWay(later.plus(Duration::from_secs(1)));
        assert_eq!(verdict, if n < Quarrels::TIMES_MAX { Verdict::Mend } else { wait });
    }
    // Memory has a bound.
    for n in 0..2 * Quarrels::LENGTH_MAX {
        quarrels.judge(later, &step(What::ToPodRule, &n.to_string()), false);
    }
    assert!(quarrels.repairs.len() <= Quarrels::LENGTH_MAX);
}
