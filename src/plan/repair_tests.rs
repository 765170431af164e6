//! Tables for the watch: which of the kernel's notices lead to a look, and when.

use super::*;
use crate::model::map::Set;
use crate::model::net::{Address, Family, Neighbour};
use crate::plan::host::{Action, Egress, HostBranch, HostPod};
use crate::plan::sample::{eni, ip, link, mac, marked, net, route};

const DIGITS: &str = "0123456789a";

fn veth() -> Link {
    Link {
        kind: Some("veth".into()),
        mtu: 1500,
        alias: naming::veth_alias(mac(9), 1500, &format!("eni{DIGITS}")),
        ..link(9, &format!("eni{DIGITS}"), mac(9))
    }
}

fn pod() -> HostPod {
    HostPod { address: ip("10.20.12.60"), table: 2, name: "default/one".into(), veth: DIGITS.into() }
}

fn watch() -> Watch {
    let intent = Intent {
        node_ip: ip("10.20.11.162"),
        primary_mac: mac(1),
        external_service_cidrs: vec![net("192.0.2.0/24")],
        enis: vec![eni()],
        pods: vec![pod()],
        egress: Egress::Off,
        ..Intent::default()
    };
    let links = vec![link(1, "lo", Mac::default()), link(3, "eth0", mac(1)), link(4, "eth1", mac(2)), veth()];
    Watch::new(&intent, &Observation { links, ..Observation::default() })
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
        (Rule { dst: Some(net("10.20.0.0/16")), ..Rule::from(single(ours), 1536, 2) }, true, false),
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
        (Rule::any(Family::V4, 32766, TABLE_MAIN), false, true),
        (Rule::any(Family::V4, 100, TABLE_MAIN), false, true), // somebody has moved it
        (Rule::any(Family::V6, 32766, TABLE_MAIN), false, false),
        (Rule { src: Some(net("10.0.0.0/8")), ..Rule::any(Family::V4, 32766, TABLE_MAIN) }, false, false),
        (Rule::from(single(ours), 10_001, 10_002), true, false),
        (Rule::from(single(ours), 10_001, 2), false, false),
        (Rule::from(single(other), 10_001, 10_002), false, false),
        (Rule { foreign: true, ..Rule::from(single(ours), 10_001, 10_002) }, false, false),
        (Rule::any(Family::V4, 100, 100), false, false),
        (Rule { foreign: true, ..marked(0x80) }, false, false),
    ] {
        check(&Notice::Rule(rule.clone()), new);
        check(&Notice::RuleGone(rule), gone);
    }
    let main = Notice::RuleGone(Rule::any(Family::V6, 32766, TABLE_MAIN));
    for (intent, look) in [
        (Intent { v6: true, ..Intent::default() }, true),
        (Intent { egress: Egress::Snat(ip("2001:db8::1")), ..Intent::default() }, true),
        (Intent::default(), false),
    ] {
        assert_eq!(Watch::new(&intent, &Observation::default()).concerns(&main), look, "{intent:?}");
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
fn what_lets_nothing_through() {
    for (table, dst, look) in [
        (TABLE_MAIN, "10.20.12.60/32", true),
        (TABLE_MAIN, "10.20.12.61/32", false),
        (TABLE_MAIN, "10.20.12.0/24", false),
        (2, "0.0.0.0/0", true),
        (2, "10.20.12.1/32", true),
        (2, "192.0.2.0/24", false),
        (100, "0.0.0.0/0", false),
    ] {
        check(&Notice::Barrier(Barrier { kind: 6, table, dst: net(dst), dev: 0, metric: 0 }), look);
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
        (Link { no_arp: true, ..veth() }, true),
        (Link { mac: Some(mac(7)), ..veth() }, true),
        (Link { mtu: 1400, ..veth() }, true),
        (Link { index: 12, mac: Some(mac(12)), alias: String::new(), up: false, ..veth() }, false), // an ADD
    ] {
        check(&Notice::Link(link), look);
    }
    check(&Notice::LinkGone(eth1), false);
    let ipvs = link(20, "kube-ipvs0", mac(20));
    check(&Notice::Link(ipvs.clone()), true);
    // The veth of a pod whose ADD has only just ended: its MAC alone counts.
    let young = Link { name: "eniabcdef01234".into(), index: 20, up: false, mtu: 1400, ..veth() };
    check(&Notice::Link(young.clone()), false);
    check(&Notice::Link(Link { mac: Some(mac(77)), ..young.clone() }), true);
    check(&Notice::Link(Link { mac: Some(mac(77)), alias: String::new(), ..young }), false);
    let seen = Observation { links: vec![link(3, "eth0", mac(1)), ipvs.clone()], ..Observation::default() };
    assert!(!Watch::new(watch().intent(), &seen).concerns(&Notice::Link(ipvs)), "known by now");
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
        check(&Notice::Conf { family: Family::V4, dev, forwarding: Some(1), rp_filter }, look);
    }
    for (dev, look) in [(3, false), (4, true), (9, true), (8, false)] {
        check(&Notice::Conf { family: Family::V4, dev, forwarding: Some(0), rp_filter: None }, look);
        check(&Notice::Conf { family: Family::V6, dev, forwarding: Some(0), rp_filter: None }, false);
    }
    check(&Notice::Conf { family: Family::V4, dev: ALL, forwarding: Some(1), rp_filter: Some(1) }, false);
    let off = |family| Notice::Conf { family, dev: ALL, forwarding: Some(0), rp_filter: None };
    let egress = Intent { egress: Egress::Snat(ip("10.20.11.162")), ..six.clone() };
    for (intent, ours) in [(&Intent::default(), [false, false]), (&six, [false, true]), (&egress, [true, true])] {
        let watch = Watch::new(intent, &Observation::default());
        assert_eq!([off(Family::V4), off(Family::V6)].map(|notice| watch.concerns(&notice)), ours, "{intent:?}");
    }
    // In IPv6 mode: the links that IPv4 packets of pods come in by, and only with such a way out.
    let end = HostEnd { mac: mac(20), mtu: 9001, pod: ip("169.254.172.7"), gateway: ip("169.254.172.1"), number: None };
    let end = Link { kind: Some("veth".into()), alias: end.alias(), ..link(20, "veth0a1b2c3d", mac(20)) };
    let links = || vec![link(3, "eth0", mac(1)), link(4, "eth1", mac(2)), end.clone()];
    for (intent, looks) in [(&six, [false; 3]), (&egress, [true, false, true])] {
        let watch = Watch::new(intent, &Observation { links: links(), ..Observation::default() });
        let conf = |dev| Notice::Conf { family: Family::V4, dev, forwarding: Some(0), rp_filter: None };
        assert_eq!([3, 4, 20].map(|dev| watch.concerns(&conf(dev))), looks);
    }
    check(&Notice::Overrun, true);
    for (dev, addr, look) in [(9, "10.20.12.60", true), (4, "10.20.12.60", false), (9, "10.20.12.61", false)] {
        let entry = Neighbour { dev, addr: ip(addr), mac: Some(mac(7)), permanent: true, noarp: false };
        check(&Notice::Neighbour(entry), look);
    }
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
fn the_end_of_a_way_out_makes_a_doubt_first() {
    let end =
        HostEnd { mac: mac(20), mtu: 9001, pod: ip("fd00::ac:7"), gateway: ip("fe80::1"), number: Some(0x0a1b_2c3d) };
    let outer = Link { kind: Some("veth".into()), alias: end.alias(), ..link(20, "veth0a1b2c3d", mac(20)) };
    let (up, down) = (Notice::Link(outer.clone()), Notice::Link(Link { up: false, ..outer.clone() }));
    let (way, elsewhere) = (Notice::RouteGone(end.route(20)), Notice::Route(end.route(3)));
    let harm = [
        down.clone(),
        way.clone(),
        Notice::AddressGone(end.address(20)),
        Notice::Link(Link { mac: Some(mac(7)), ..outer.clone() }),
        Notice::Link(Link { mtu: 1500, ..outer.clone() }),
        Notice::Link(Link { name: "odd0".into(), ..outer.clone() }),
    ];
    // An ADD: the link, what it says of itself, its address, up, the route. A DEL takes everything away.
    let mut watch = watch();
    let plain = Notice::Link(Link { alias: String::new(), up: false, ..outer.clone() });
    for notice in [plain, Notice::Address(end.address(20)), up.clone(), Notice::Route(end.route(20))] {
        assert!(!watch.hear(&notice) && !watch.doubts(), "{notice:?}");
    }
    assert!(watch.hear(&elsewhere), "nobody's DEL does that");
    for notice in harm {
        assert!(!watch.hear(&notice) && watch.doubts(), "{notice:?}");
        assert!(!watch.hear(&Notice::LinkGone(outer.clone())) && !watch.doubts(), "{notice:?}");
        assert!(!watch.hear(&way) && !watch.doubts(), "of nobody");
        assert!(!watch.hear(&up));
    }
    // One that was renamed when it is met is known all the same.
    let renamed = Link { name: "odd0".into(), ..outer.clone() };
    let mut met = Watch::new(&watch.intent, &Observation { links: vec![renamed.clone()], ..Observation::default() });
    assert!(!met.hear(&up) && !met.doubts(), "it has its name again");
    assert!(!met.hear(&Notice::Link(renamed)) && met.doubts());
    // One that was there before; and of other links everything is as it was.
    let mut watch = Watch::new(&watch.intent, &Observation { links: vec![outer, veth()], ..Observation::default() });
    assert!(!watch.hear(&down) && watch.doubts());
    assert!(watch.hear(&Notice::Link(Link { up: false, ..veth() })));
    assert!(watch.hear(&Notice::Link(link(4, "eth1", mac(2)))), "an ENI's that was missing");
}

#[test]
fn a_doubt_becomes_a_reason_unless_it_is_settled() {
    let mut pace = Pace::default();
    pace.doubt(at(50), true);
    pace.doubt(at(60), true);
    assert_eq!(pace.due(), Some(at(150)));
    pace.doubt(at(70), false);
    assert_eq!(pace.due(), None);
    pace.leave(at(500));
    pace.doubt(at(80), true);
    assert_eq!(pace.due(), Some(at(180)));
    pace.looked(at(200), Duration::from_millis(50));
    assert_eq!(pace.due(), None, "answered");
    pace.doubt(at(210), true);
    assert_eq!(pace.due(), Some(at(700)), "looks that take long are made less often");
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
    looks_after(Pace::ask, every, length, took)
}

fn looks_after(tell: fn(&mut Pace, Mono), every: u64, length: u64, took: u64) -> Vec<u64> {
    let (mut pace, mut found, mut now) = (Pace::default(), Vec::new(), 0);
    while now < length {
        if now % every == 0 {
            tell(&mut pace, at(now));
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
fn a_storm_of_doubts_does_not_either() {
    let doubt = |pace: &mut Pace, now| pace.doubt(now, true);
    for every in [1, 50] {
        let storm = looks_after(doubt, every, 60_000, 5);
        assert!((60..=75).contains(&storm.len()), "{} looks in a minute: {storm:?}", storm.len());
        assert!(storm[1] - storm[0] <= 210, "{storm:?}");
    }
    // As notices, those that are told one by one.
    let calm = looks_after(doubt, 5_000, 60_000, 1);
    assert!(calm.len() == 12 && calm.iter().all(|at| at % 5_000 == 100), "{calm:?}");
    // Pods that come and go make doubts that settle by themselves, and do not make the next look late.
    let mut pace = Pace::default();
    pace.looked(at(0), Duration::ZERO);
    for now in (0..60_000).step_by(50) {
        pace.doubt(at(now), true);
        pace.doubt(at(now + 1), false);
    }
    pace.ask(at(60_000));
    pace.looked(at(60_010), Duration::ZERO);
    pace.ask(at(60_011));
    assert_eq!(pace.due(), Some(at(60_110)));
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
    // What was not made after all was not undone.
    let held = step(What::FromPodRule, "delete rule 1536");
    for _ in 0..3 * Quarrels::TIMES_MAX {
        assert_eq!(quarrels.judge(later, &held, false), Verdict::Mend);
        quarrels.not_made(&held);
    }
    // Memory has a bound.
    for n in 0..2 * Quarrels::LENGTH_MAX {
        quarrels.judge(later, &step(What::ToPodRule, &n.to_string()), false);
    }
    assert!(quarrels.repairs.len() <= Quarrels::LENGTH_MAX);
}
