use super::*;
use crate::model::net::{Barrier, Neighbour, Route};
use crate::model::nft::{AnyChain, Forward};
use crate::model::settings::Settings;
use crate::plan::branch::Branch;
use crate::plan::egress;
use crate::plan::host::{HostEni, What};
use crate::plan::pod::Side;
use crate::plan::pod::inside::Mend;
use crate::plan::sample::{eni, ip, link, mac, net, route};

#[test]
fn every_step_of_the_plan_has_its_texts() {
    for what in [
        What::PrimaryMtu,
        What::MarkRule,
        What::LocalRule,
        What::MainRule,
        What::ServiceRule,
        What::EniMtu,
        What::EniLink,
        What::EniAddress,
        What::EniRoute,
        What::EniRule,
        What::ToPodRule,
        What::FromPodRule,
        What::BranchLink,
        What::BranchRoute,
        What::BranchRule,
        What::GatewayRule,
        What::PodRoute,
        What::PodLink,
        What::PodMac,
        What::PodMtu,
        What::EgressLink,
        What::EgressAddress,
        What::EgressRoute,
        What::PodName,
        What::GonePod,
        What::Sysctl,
        What::LinkForwarding,
        What::LinkSysctl,
        What::PodNeighbour,
        What::Ruleset,
    ] {
        let finding = Finding::new(what.name(), "", "");
        assert!(finding.mendable && !finding.breaks.is_empty(), "{}", what.name());
    }
    for name in [
        "imds-silent",
        "daemon-silent",
        "settings",
        "setting-ignored",
        "introspection-off",
        "pod-unknown",
        "unknown",
        "pod-unseen",
        "stray-rule",
        "former-rules",
    ] {
        assert!(!Finding::new(name, "", "").breaks.is_empty(), "{name}");
    }
    let names: Vec<_> = texts::names().collect();
    assert!(names.iter().all(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-' || b.is_ascii_digit())));
    assert_eq!(names.iter().collect::<Set<_>>().len(), names.len(), "none twice");
}

#[test]
fn what_the_instance_may_not_have_is_told_of_its_counters() {
    let facts = environment::Facts {
        counters: vec![
            ("eth0".into(), "bw_in_allowance_exceeded".into(), 0),
            ("eth0".into(), "conntrack_allowance_exceeded".into(), 7),
            ("eth0".into(), "conntrack_allowance_available".into(), 90),
            ("eth0".into(), "queue_0_tx_cnt".into(), 12),
        ],
        ..environment::Facts::default()
    };
    let settings = crate::model::settings::Settings::parse(|_| None).0;
    let found = environment::findings(None, &Observation::default(), &settings, &facts);
    let found: Vec<_> = found.iter().map(|finding| (finding.name, finding.seen.as_str())).collect();
    assert_eq!(found, [("allowance-exceeded", "eth0: conntrack_allowance_exceeded 7")]);
}

#[test]
fn marks_of_kube_proxy_are_told() {
    for (mark, told) in [("0x80", false), ("0x4000", true), ("0x18080", true), ("0x10000", false)] {
        let settings =
            crate::model::settings::Settings::parse(|name| (name == "AWS_VPC_K8S_CNI_CONNMARK").then(|| mark.into()));
        let found = environment::findings(None, &Observation::default(), &settings.0, &environment::Facts::default());
        assert_eq!(found.iter().any(|finding| finding.name == "mark-bits"), told, "{mark}");
    }
}

#[test]
fn strict_pods_do_not_go_with_ipvs() {
    let names = |strict_branches, name: &str| {
        let intent = Intent { strict_branches, ..Intent::default() };
        let seen = Observation { links: vec![made(7, name, "dummy")], ..Observation::default() };
        let settings = crate::model::settings::Settings::parse(|_| None).0;
        let found = environment::findings(Some(&intent), &seen, &settings, &environment::Facts::default());
        found.iter().any(|finding| finding.name == "ipvs")
    };
    assert!(names(true, "kube-ipvs0") && !names(false, "kube-ipvs0") && !names(true, "nodelocaldns"));
}

/// A link whose MAC ends in its index.
fn made(index: u8, name: &str, kind: &str) -> Link {
    let kind = Some(kind.to_owned()).filter(|kind| !kind.is_empty());
    Link { kind, ..link(index.into(), name, mac(index)) }
}

/// A node with an ENI and a pod of it.
pub(super) fn node() -> (Intent, Observation) {
    let veth = "0123456789a";
    let intent = Intent {
        primary_mac: mac(3),
        vpc_cidrs: vec![net("10.20.0.0/16"), net("100.64.0.0/16")],
        enis: vec![HostEni { mac: mac(4), ..eni() }],
        pods: vec![HostPod { address: ip("10.20.12.60"), table: 2, name: "default/one".into(), veth: veth.into() }],
        ..Intent::default()
    };
    let links = vec![
        made(1, "lo", ""),
        made(3, "eth0", ""),
        made(4, "eth1", ""),
        made(5, "eth2", ""),
        made(6, "docker0", "bridge"),
        Link { parent: Some(2), ..made(9, &format!("eni{veth}"), "veth") },
    ];
    let routes = vec![
        route(254, "0.0.0.0/0", Some("10.20.11.1"), 3),
        route(254, "10.20.11.0/24", None, 3),
        route(254, "10.20.12.60/32", None, 9),
        route(2, "10.20.12.1/32", None, 4),
        route(2, "0.0.0.0/0", Some("10.20.12.1"), 4),
    ];
    (intent, Observation { links, routes, ..Observation::default() })
}

/// A pod in standard mode has its rules in these two places, and its veth; that of VLAN 8 is the daemon's to tell.
#[test]
fn rules_of_branch_pods_are_strays_only_without_a_veth() {
    let address = net("10.20.13.90/32");
    let ours = [Rule::to(address, 512, TABLE_MAIN), Rule::from(address, 1536, 108)];
    let plain = [Rule::to(net("10.99.0.8/32"), 512, TABLE_MAIN), Rule::from(net("10.99.0.9/32"), 1536, 2)];
    let check = |change: &dyn Fn(&mut Intent, &mut Observation), branch: bool| {
        let (mut intent, mut seen) = node();
        seen.links.push(made(10, "eni0000000000b", "veth"));
        seen.rules = [&ours[..], &plain].concat();
        change(&mut intent, &mut seen);
        let expected = if branch { [&ours[..], &plain].concat() } else { plain.to_vec() };
        assert_eq!(strays(&intent, &seen), expected, "{:?}", seen.links);
    };
    let led = route(254, "10.20.13.90/32", None, 10);
    check(&|_, seen| seen.routes.push(led), false);
    // Somebody has flushed the routes.
    check(&|_, _| {}, false);
    check(&|_, seen| seen.routes.retain(|route| route.dst.prefix_len() < 32), false);
    let told = |intent: &mut Intent| {
        let (address, name, veth) = (address.addr(), "default/two".into(), "0000000000b".into());
        let eni = Branch::new(8, mac(8), ip("10.20.13.1")).unwrap();
        intent.branches = vec![HostBranch { address, eni, name, veth }];
    };
    check(&|intent, _| told(intent), false);
    // The pod has gone; what veths there are is known.
    check(&|_, seen| seen.links.retain(|link| link.index != 10), true);
    check(&|_, seen| seen.routes.push(Route { dst: net("10.20.13.91/32"), table: 109, ..led }), true);
    check(&|intent, _| intent.pods[0].veth = "0000000000b".into(), true);
}

#[test]
fn what_others_put_on_the_ways_is_told_with_the_command() {
    let told = |seen: &Observation| -> Vec<(String, String)> {
        let found = ways::findings(&node().0, seen);
        found.into_iter().map(|finding| (finding.subject, finding.remedy)).collect()
    };
    assert_eq!(told(&node().1), []);
    let check = |route: Route, wanted: Option<(&str, &str)>| {
        let mut seen = node().1;
        seen.routes.push(route);
        let wanted = wanted.map(|(subject, command)| (subject.to_owned(), format!("ip route del {command}")));
        assert_eq!(told(&seen), wanted.into_iter().collect::<Vec<_>>(), "{route}");
    };
    // In the ENI's table: by another link or another gateway. What goes the ENI's way only says it again.
    check(route(2, "192.0.2.0/24", None, 3), Some(("eni-2", "192.0.2.0/24 dev eth0 table 2 scope link")));
    check(route(2, "192.0.2.0/24", None, 4), Some(("eni-2", "192.0.2.0/24 dev eth1 table 2 scope link")));
    check(
        route(2, "192.0.2.0/24", Some("10.20.12.9"), 4),
        Some(("eni-2", "192.0.2.0/24 via 10.20.12.9 dev eth1 table 2")),
    );
    check(route(2, "0.0.0.0/0", Some("10.20.12.9"), 4), Some(("eni-2", "default via 10.20.12.9 dev eth1 table 2")));
    check(route(2, "192.0.2.0/24", Some("10.20.12.1"), 4), None);
    check(route(2, "10.20.12.0/25", None, 4), None);
    check(Route { metric: 5, ..route(2, "0.0.0.0/0", Some("10.20.12.9"), 4) }, None);
    // In main: to the pod, or a part of the VPC over what is no ENI.
    check(route(254, "10.20.12.60/32", None, 3), Some(("default/one", "10.20.12.60 dev eth0 scope link")));
    check(Route { metric: 5, ..route(254, "10.20.12.60/32", None, 3) }, None);
    check(route(254, "10.20.12.61/32", None, 3), None);
    check(route(254, "10.20.14.0/24", None, 5), None);
    check(route(254, "10.20.14.0/24", None, 6), Some(("", "10.20.14.0/24 dev docker0 scope link")));
    check(route(254, "100.64.0.0/10", None, 6), Some(("", "100.64.0.0/10 dev docker0 scope link")));
    check(route(254, "172.17.0.0/16", None, 6), None);
    check(Route { metric: 5, ..route(254, "10.20.11.0/24", None, 6) }, None);
    check(route(77, "10.20.14.0/24", None, 6), None);
}

#[test]
fn what_lets_nothing_through_is_told_unless_the_plan_replaces_it() {
    let check = |table: u32, dst: &str, metric: u32, change: &dyn Fn(&mut Observation), wanted: &[&str]| {
        let (intent, mut seen) = node();
        seen.barriers.push(Barrier { kind: 7, table, dst: net(dst), dev: 0, metric });
        change(&mut seen);
        let found: Vec<_> = ways::findings(&intent, &seen).into_iter().map(|finding| finding.remedy).collect();
        assert_eq!(found, wanted, "{dst} table {table} metric {metric}");
    };
    let none = |_: &mut Observation| {};
    check(2, "192.0.2.0/24", 0, &none, &["ip route del unreachable 192.0.2.0/24 table 2"]);
    check(2, "0.0.0.0/0", 0, &none, &[]); // ours is put in its place
    check(2, "0.0.0.0/0", 5, &none, &[]); // loses
    check(254, "10.20.12.60/32", 0, &none, &[]);
    check(254, "10.20.12.61/32", 0, &none, &["ip route del unreachable 10.20.12.61"]);
    check(254, "10.20.0.0/16", 9, &none, &["ip route del unreachable 10.20.0.0/16 metric 9"]);
    check(254, "10.0.0.0/8", 0, &none, &["ip route del unreachable 10.0.0.0/8"]);
    check(254, "10.20.11.0/24", 9, &none, &[]);
    check(254, "172.16.0.0/12", 0, &none, &[]);
    check(254, "0.0.0.0/0", 4_278_198_272, &none, &[]);
    // What says more exactly where the VPC is wins.
    let exact = |seen: &mut Observation| {
        let way = |dst| route(254, dst, Some("10.20.11.1"), 3);
        seen.routes.extend([way("10.20.0.0/16"), way("100.64.0.0/16")]);
    };
    check(254, "10.0.0.0/8", 0, &exact, &[]);
}

#[test]
fn holes_on_the_ways_out_in_the_other_family_are_told() {
    let (pod, gateway) = (ip("fd00::ac:2"), ip("fe80::1"));
    let end = egress::HostEnd { mac: mac(9), mtu: 9001, pod, gateway, number: Some(9) };
    let link = |index: u8| Link { alias: end.alias(), ..made(index, "veth00000009", "veth") };
    let check = |metric: u32, links: &[Link], wanted: &[(&str, &str)]| {
        let (intent, mut seen) = node();
        seen.routes.push(end.route(20));
        seen.links.extend_from_slice(links);
        seen.barriers.push(Barrier { kind: 6, table: 254, dst: net("fd00::ac:2/128"), dev: 1, metric });
        let found = ways::findings(&intent, &seen);
        let found = found.iter().map(|finding| (finding.seen.as_str(), finding.remedy.as_str()));
        assert_eq!(found.collect::<Vec<_>>(), wanted, "{metric}");
    };
    let told = (
        "route blackhole fd00::ac:2 metric 10 dev lo, before fd00::ac:2 dev veth00000009 metric 1024",
        "ip -6 route del blackhole fd00::ac:2 metric 10 dev lo",
    );
    check(10, &[link(20)], &[told]);
    check(1024, &[link(20)], &[]); // ours is put in its place
    check(2000, &[link(20)], &[]); // loses
    check(10, &[link(20), link(21)], &[]);
    check(10, &[], &[]);
}

#[test]
fn ends_of_other_plugins_are_not_set_up() {
    let check = |alias: &str, address: &str, wanted: &[&str]| {
        let (intent, mut seen) = node();
        let other = Link { parent: Some(7), alias: alias.into(), up: false, ..made(20, "veth1a2b3c4d", "veth") };
        seen.links.push(other);
        let found = pods::pods(&intent, &seen, &[inside("/run/netns/other", 20, 7, address)], 9001, None);
        let texts = found.findings.iter().filter(|finding| finding.name == "egress-way");
        assert_eq!(texts.map(|finding| finding.seen.as_str()).collect::<Vec<_>>(), wanted, "{alias} {address}");
        assert_eq!(found.mends.iter().filter(|mend| mend.1 == Mend::Up(20)).count(), wanted.len().min(1));
    };
    let (down, way) = ("veth1a2b3c4d is down", "route fd00::ac:2 dev veth1a2b3c4d is missing");
    check("", "10.88.0.5/16", &[]);
    check("", "fd00::ac:2/118", &[down, way]);
    let end = egress::HostEnd { mac: mac(9), mtu: 9001, pod: ip("fd00::ac:2"), gateway: ip("fe80::1"), number: None };
    check(&end.alias(), "fd00::ac:2/118", &[]); // the host's plan sees to it
}

/// A pod and a namespace that was forgotten, both with the address.
#[test]
fn of_two_ends_for_an_address_neither_takes_the_others_route() {
    let check = |aliases: [&str; 2], way: Option<u32>, wanted: &[u32]| {
        let (intent, mut seen) = node();
        for ((index, name), alias) in [(20, "veth00000014"), (21, "veth00000015")].into_iter().zip(aliases) {
            seen.links.push(Link { parent: Some(7), alias: alias.into(), ..made(index, name, "veth") });
        }
        seen.routes.extend(way.map(|dev| route(254, "fd00::ac:2/128", None, dev)));
        let address = "fd00::ac:2/118";
        let namespaces = [inside("/run/netns/old", 20, 7, address), inside("/run/netns/one", 21, 7, address)];
        let found = pods::pods(&intent, &seen, &namespaces, 9001, None);
        let ways = found.mends.iter().filter_map(|mend| match &mend.1 {
            Mend::Route(route) if route.dst == net("fd00::ac:2/128") => Some(route.dev),
            _ => None,
        });
        assert_eq!(ways.collect::<Vec<_>>(), wanted, "{aliases:?} {way:?}");
        let told = found.findings.iter().filter(|finding| finding.name == "egress-way");
        assert_eq!(told.count(), wanted.len(), "{aliases:?} {way:?}");
    };
    let end = egress::HostEnd { mac: mac(9), mtu: 9001, pod: ip("fd00::ac:2"), gateway: ip("fe80::1"), number: None };
    let alias = end.alias();
    for way in [None, Some(20), Some(21)] {
        for aliases in [[alias.as_str(); 2], [&alias, ""], ["", &alias]] {
            check(aliases, way, &[]);
        }
    }
    for way in [Some(20), Some(21), Some(99)] {
        check(["", ""], way, &[]);
    }
    check(["", ""], None, &[20, 21]);
}

#[test]
fn neighbours_that_are_asked_no_more_are_told_if_they_are_gateways() {
    let check = |dev: u32, addr: &str, wanted: Option<(&str, &str)>| {
        let (intent, mut seen) = node();
        let addr = addr.parse().unwrap();
        seen.neighbours.push(Neighbour { dev, addr, mac: None, permanent: true, noarp: false });
        let found: Vec<_> = ways::findings(&intent, &seen);
        let found = found.first().map(|finding| (finding.subject.as_str(), finding.remedy.as_str()));
        assert_eq!(found, wanted);
    };
    check(4, "10.20.12.1", Some(("eni-2", "ip neigh del 10.20.12.1 dev eth1")));
    check(3, "10.20.11.1", Some(("", "ip neigh del 10.20.11.1 dev eth0")));
    check(3, "10.20.11.7", None);
    check(5, "10.20.12.1", None);
}

/// A namespace with the other end of a veth of the node's.
fn inside(path: &str, outer: u32, index: u8, address: &str) -> pods::Inside {
    let links = vec![Link { parent: Some(outer), ..made(index, "eth0", "veth") }];
    let addr = net(address);
    let addresses = vec![crate::model::net::Address { dev: index.into(), addr, no_prefix_route: false, no_dad: false }];
    pods::Inside { path: path.into(), id: (4, u64::from(index)), side: Side { links, addresses, ..Side::default() } }
}

#[test]
fn two_namespaces_with_the_address_of_a_pod() {
    let check = |address: &str, on_this_host: bool, twice: bool| {
        let (intent, mut seen) = node();
        let parent = if on_this_host { Some(7) } else { Some(8) };
        seen.links.push(Link { parent, ..made(20, "eni9876543210f", "veth") });
        let namespaces = [inside("/run/netns/one", 9, 2, "10.20.12.60/32"), inside("/run/netns/old", 20, 7, address)];
        let found = pods::pods(&intent, &seen, &namespaces, 9001, None).findings;
        let found: Vec<_> = found.iter().filter(|finding| finding.name == "address-twice").collect();
        assert_eq!(found.len(), usize::from(twice), "{found:?}");
        for finding in found {
            assert_eq!(
                (finding.subject.as_str(), finding.seen.as_str()),
                ("default/one", "10.20.12.60 is also in /run/netns/old")
            );
        }
    };
    check("10.20.12.60/32", true, true);
    check("10.20.12.61/32", true, false);
    check("10.20.12.60/32", false, false);
}

#[test]
fn enis_without_a_carrier() {
    let check = |name: &str, wanted: &[&str]| {
        let (intent, mut seen) = node();
        for link in seen.links.iter_mut().filter(|link| link.name == name) {
            link.no_carrier = true;
        }
        let found = carriers(&intent, &seen);
        assert_eq!(found.iter().map(|finding| finding.subject.as_str()).collect::<Vec<_>>(), wanted, "{name}");
    };
    check("eth1", &["eni-2"]);
    check("eth0", &[""]);
    check("eth2", &[]); // not ours
    check("eni0123456789a", &[]); // its pod's end is down, which is told of the pod
    check("docker0", &[]);
}

#[test]
fn files_of_the_host_that_speak_of_others() {
    let check = |change: &dyn Fn(&mut environment::Facts), wanted: &[(&str, Severity)]| {
        let mut facts = environment::Facts::default();
        facts.files.insert("/etc/cni/net.d/10-aws.conflist".into(), String::new());
        change(&mut facts);
        let settings =
            crate::model::settings::Settings::parse(|name| (name == "ENABLE_POD_ENI").then(|| "true".into())).0;
        let mut found = environment::findings(Some(&node().0), &node().1, &settings, &facts);
        let trunk = |finding: &Finding| finding.name == "trunk-missing" && !facts.trunk;
        found.retain(|finding| !trunk(finding) || wanted.iter().any(|wanted| wanted.0 == finding.name));
        let found = found.iter().map(|finding| (finding.name, finding.severity)).collect::<Vec<_>>();
        assert_eq!(found, wanted);
    };
    let here = |path: &'static str| move |facts: &mut environment::Facts| facts.there.extend([path.to_owned()]);
    let runs = |key: &'static str, value: &'static str| {
        move |facts: &mut environment::Facts| facts.runtime.push((key.into(), value.into()))
    };
    let stat = |text: &'static str| {
        move |facts: &mut environment::Facts| drop(facts.files.insert("/sys/fs/cgroup/cpu.stat".into(), text.into()))
    };
    check(&|_| {}, &[]);
    check(&here("/etc/udev/rules.d/53-ec2-network-interfaces.rules"), &[("ec2-net-utils", Severity::Warn)]);
    check(&here("/etc/udev/rules.d/10-cloud-init-hook-hotplug.rules"), &[("cloud-init", Severity::Warn)]);
    let timer = "/etc/systemd/system/timers.target.wants/nm-cloud-setup.timer";
    check(&here(timer), &[("nm-cloud-timer", Severity::Warn)]);
    check(&runs("conf_dir", "/etc/cni/net.d/"), &[]);
    check(&runs("conf_dir", "/etc/other"), &[("runtime-folders", Severity::Fail)]);
    check(&runs("bin_dir", "/usr/lib/cni"), &[("runtime-folders", Severity::Fail)]);
    // Where ours is not there the folders may be mounted from anywhere.
    let elsewhere = |facts: &mut environment::Facts| {
        facts.files.clear();
        facts.runtime.push(("conf_dir".into(), "/etc/other".into()));
    };
    check(&elsewhere, &[]);
    check(&stat("nr_periods 600\nnr_throttled 150\n"), &[("cpu-throttled", Severity::Note)]);
    check(&stat("nr_periods 600\nnr_throttled 149\n"), &[]);
    check(&stat("nr_periods 599\nnr_throttled 599\n"), &[]);
    let trunks = |capable| move |facts: &mut environment::Facts| facts.trunk_capable = capable;
    check(&trunks(true), &[("trunk-missing", Severity::Warn)]);
    check(&trunks(false), &[("trunk-missing", Severity::Note)]);
    check(&|facts| (facts.trunk, facts.trunk_capable) = (true, true), &[]);
    let kube = |legacy, chain: &'static str| {
        move |facts: &mut environment::Facts| {
            facts.legacy_kube = legacy;
            let (family, table, name) = ("ip".into(), "nat".into(), chain.into());
            facts.chains.push(AnyChain { family, table, name, hook: None, forward: Forward::default() });
        }
    };
    check(&kube(true, "KUBE-SERVICES"), &[("kube-proxy-twice", Severity::Warn)]);
    check(&kube(true, "KUBE-KUBELET-CANARY"), &[]); // the kubelet's
    check(&kube(false, "KUBE-SERVICES"), &[]);
}

#[test]
fn tables_of_the_kernel_that_are_too_small() {
    let check = |v6: bool, files: &[(&str, &str)], wanted: &[&str]| {
        let intent = Intent { v6, ..node().0 };
        let files = files.iter().map(|(path, text)| (format!("/proc/sys/net/{path}"), (*text).to_owned())).collect();
        let facts = environment::Facts { files, ..environment::Facts::default() };
        let found = environment::findings(Some(&intent), &node().1, &Settings::parse(|_| None).0, &facts);
        let found = found.iter().filter(|finding| matches!(finding.name, "neighbour-table" | "conntrack-full"));
        assert_eq!(found.map(|finding| finding.remedy.as_str()).collect::<Vec<_>>(), wanted, "{:?}", facts.files);
    };
    let entries = |count| [("netfilter/nf_conntrack_count", count), ("netfilter/nf_conntrack_max", "100")];
    check(false, &entries("90"), &["sysctl -w net.netfilter.nf_conntrack_max=200"]);
    check(false, &entries("89"), &[]);
    check(false, &entries("89")[..1], &[]);
    let neighbours = [("ipv4/neigh/default/gc_thresh3", "1"), ("ipv6/neigh/default/gc_thresh3", "1")];
    check(false, &neighbours, &["sysctl -w net.ipv4.neigh.default.gc_thresh3=1024"]);
    check(true, &neighbours, &["sysctl -w net.ipv6.neigh.default.gc_thresh3=1024"]);
    check(false, &[("ipv4/neigh/default/gc_thresh3", "2")], &[]);
}

#[test]
fn what_the_kernel_must_have() {
    let check = |pairs: &[(&str, &str)], files: &[(&str, &str)], modules: &[&str], wanted: &[&str]| {
        let get = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let settings = crate::model::settings::Settings::parse(get).0;
        let files = files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
        let modules = modules.iter().map(|name| (*name).to_owned()).collect();
        let facts = environment::Facts { files, modules, ..environment::Facts::default() };
        let found = environment::findings(None, &Observation::default(), &settings, &facts);
        let found = found.iter().filter(|finding| finding.name != "policy-agent");
        let first = |finding: &Finding| format!("{} {}", finding.name, finding.seen.split(' ').next().unwrap());
        assert_eq!(found.map(first).collect::<Vec<_>>(), wanted, "{pairs:?}");
    };
    let stat = ("/proc/stat", "cpu 1");
    let here = ("/proc/net/if_inet6", "00000000000000000000000000000001 01 80 10 80       lo");
    check(&[("ENABLE_V6_EGRESS", "true")], &[stat, here], &[], &[]);
    check(&[("ENABLE_V6_EGRESS", "true")], &[stat, ("/proc/net/if_inet6", "")], &[], &["ipv6-off /proc/net/if_inet6"]);
    check(&[("ENABLE_IPv6", "true")], &[stat], &[], &["ipv6-off /proc/net/if_inet6"]);
    check(&[("ENABLE_IPv6", "true")], &[], &[], &[]); // /proc is not seen at all
    check(&[], &[stat], &[], &[]);
    let all = ["veth", "nf_tables", "nft_ct", "nft_fib_ipv4", "nft_nat", "nft_chain_nat"];
    check(&[], &[], &all, &[]);
    check(&[], &[], &all[1..], &["module-missing veth"]);
    check(&[("ENABLE_V6_EGRESS", "true")], &[], &all, &["module-missing nft_reject_ipv6"]);
    check(&[("ENABLE_IPv6", "true")], &[], &all, &["module-missing nft_reject_ipv4"]);
    let agent = ("NETWORK_POLICY_ENFORCING_MODE", "standard");
    check(&[agent], &[], &all, &["module-missing cls_bpf", "module-missing sch_ingress"]);
}

#[test]
fn routes_of_main_by_secondary_enis() {
    let check = |change: &dyn Fn(&mut Intent, &mut Observation), wanted: &[&str]| {
        let (mut intent, mut seen) = node();
        change(&mut intent, &mut seen);
        let found = ways::findings(&intent, &seen);
        let told = found.iter().map(|finding| (finding.severity, finding.remedy.as_str())).collect::<Vec<_>>();
        assert_eq!(told, wanted.iter().map(|remedy| (Severity::Fail, *remedy)).collect::<Vec<_>>());
    };
    let by = |dst: &'static str, gateway: Option<&'static str>, dev, metric| Route {
        metric,
        ..route(254, dst, gateway, dev)
    };
    let with = |route: Route| move |_: &mut Intent, seen: &mut Observation| seen.routes.push(route);
    let dhcp = |metric| by("0.0.0.0/0", Some("10.20.12.1"), 4, metric);
    let primary = |seen: &mut Observation, metric| seen.routes[0].metric = metric;
    check(&with(dhcp(100)), &[]); // loses
    check(
        &|_, seen| {
            primary(seen, 512);
            seen.routes.push(dhcp(100));
            seen.routes.push(by("0.0.0.0/0", Some("10.20.13.1"), 5, 600));
        },
        &["ip route del default via 10.20.12.1 dev eth1 metric 100"],
    );
    check(&with(dhcp(0)), &[]); // comes after the primary's
    check(&|_, seen| seen.routes.insert(0, dhcp(0)), &["ip route del default via 10.20.12.1 dev eth1"]);
    check(&|_, seen| seen.routes[0] = dhcp(7), &["ip route del default via 10.20.12.1 dev eth1 metric 7"]);
    // Of an ENI that is not ours, a tunnel's; and what cannot be judged without the primary's link.
    let tunnel = |_: &mut Intent, seen: &mut Observation| {
        primary(seen, 9);
        seen.routes.push(by("0.0.0.0/0", None, 6, 0));
    };
    check(&tunnel, &["ip route del default dev docker0 scope link"]);
    check(
        &|intent, seen| {
            tunnel(intent, seen);
            seen.links.retain(|link| link.name != "eth0");
        },
        &[],
    );
    // The other family's counts if pods leave by it.
    let v6 = |_: &mut Intent, seen: &mut Observation| seen.routes.push(by("::/0", Some("fe80::1"), 4, 1024));
    check(&v6, &[]);
    let egress = |intent: &mut Intent, seen: &mut Observation| {
        v6(intent, seen);
        intent.egress = super::super::host::Egress::Snat(ip("2001:db8::5"));
    };
    check(&egress, &["ip -6 route del default via fe80::1 dev eth1 metric 1024"]);
    let both = |intent: &mut Intent, seen: &mut Observation| {
        egress(intent, seen);
        seen.routes.push(by("::/0", Some("fe80::1"), 3, 1024));
    };
    check(&both, &[]); // either may be taken
    // Parts of the VPC.
    check(&with(by("10.20.16.0/20", None, 4, 0)), &["ip route del 10.20.16.0/20 dev eth1 scope link"]);
    check(
        &with(by("10.20.0.2/32", Some("10.20.12.1"), 4, 100)),
        &["ip route del 10.20.0.2 via 10.20.12.1 dev eth1 metric 100"],
    );
    check(&with(by("10.20.12.0/24", None, 4, 0)), &[]); // the plan takes it away
    check(
        &with(Route { prefsrc: Some(ip("10.20.12.9")), ..by("10.20.12.0/24", None, 4, 0) }),
        &["ip route del 10.20.12.0/24 dev eth1 scope link src 10.20.12.9"],
    );
    check(&with(by("10.20.12.5/32", None, 4, 0)), &[]); // its own address
    check(&with(by("10.20.11.0/24", None, 4, 9)), &[]); // the primary's is before
    check(&with(by("192.168.0.0/16", None, 4, 0)), &[]);
    check(&with(by("10.20.16.0/20", None, 3, 0)), &[]);
    check(&with(by("10.20.16.0/20", None, 5, 0)), &[]); // of an ENI that is not ours
}

#[test]
fn rules_of_others_that_take_what_is_ours() {
    let check = |rule: Rule, told: bool| {
        let (mut intent, mut seen) = node();
        intent.node_ip = ip("10.20.11.7");
        seen.routes.push(route(5, "192.168.0.0/16", None, 6));
        seen.routes.push(route(6, "10.20.64.0/20", None, 6));
        seen.routes.push(route(8, "0.0.0.0/0", Some("10.20.11.1"), 3));
        seen.barriers.push(Barrier { kind: 9, table: 5, dst: net("0.0.0.0/0"), dev: 0, metric: 0 });
        seen.barriers.push(Barrier { kind: 6, table: 7, dst: net("0.0.0.0/0"), dev: 0, metric: 0 });
        seen.rules.push(rule.clone());
        let mut found = Vec::new();
        rules::findings(&intent, &seen, &mut found);
        let found = found.iter().map(|finding| (finding.name, finding.severity)).collect::<Vec<_>>();
        assert_eq!(found, [("foreign-rule", Severity::Warn)][..usize::from(told)], "{rule} {}", rule.foreign);
    };
    let any = |priority, table| Rule::any(crate::model::net::Family::V4, priority, table);
    let from = |src: &str, priority, table| Rule::from(net(src), priority, table);
    let to = |dst: &str, priority, table| Rule::to(net(dst), priority, table);
    let marked = |value, mask, table| Rule { fwmark: Some((value, mask)), ..any(1000, table) };
    let by = |iif: &str, table| Rule { iif: Some(iif.into()), ..any(200, table) };
    let strange = |rule: Rule| Rule { foreign: true, ..rule };
    // By the source: of a pod, an ENI, the node.
    check(from("10.20.0.0/16", 200, 2), true);
    check(from("10.20.0.0/16", 1536, 2), true);
    check(from("10.20.12.5/32", 200, 8), true);
    check(from("10.20.11.0/24", 5000, 2), true);
    check(from("10.20.11.7/32", 200, 8), false); // by the node's own link
    check(from("10.20.11.7/32", 200, 2), true);
    check(from("10.20.12.60/32", 1536, 2), false); // one of ours
    check(from("10.20.12.5/32", 32_765, 2), false);
    check(from("10.30.0.0/16", 200, 2), false);
    check(from("10.20.0.0/16", 32_767, 2), false);
    check(from("10.20.0.0/16", 200, 254), false);
    // By what the table has.
    check(from("10.20.0.0/16", 200, 77), false);
    check(from("10.20.0.0/16", 200, 5), false);
    check(from("10.20.0.0/16", 200, 6), true);
    check(from("10.20.0.0/16", 200, 7), true);
    check(Rule { dst: Some(net("192.168.5.0/24")), ..from("10.20.0.0/16", 200, 5) }, true);
    check(Rule { dst: Some(net("192.0.2.0/24")), ..from("10.20.0.0/16", 200, 5) }, false);
    // By the destination.
    check(to("10.20.0.0/16", 300, 2), true);
    check(to("10.0.0.0/8", 300, 2), true);
    check(to("192.168.0.0/16", 300, 2), false);
    check(to("10.20.0.0/17", 300, 5), false);
    check(Rule { src: Some(net("192.168.7.0/24")), ..to("10.20.12.0/24", 300, 2) }, true);
    check(Rule { src: Some(net("192.168.7.0/24")), ..to("10.20.12.0/24", 600, 2) }, false); // 512 comes before
    // By the mark.
    check(marked(0x80, 0x80, 2), true);
    check(marked(0x80, u32::MAX, 2), true);
    check(marked(0, 0x80, 2), true);
    check(marked(0x4000, 0x4000, 2), false);
    check(marked(0x200, 0xf00, 2), false);
    check(marked(0x539, u32::MAX, 2), false);
    check(Rule { src: Some(net("10.20.0.0/16")), ..marked(0x200, 0xf00, 2) }, false);
    check(marked(0x80, 0x80, 77), false);
    // By the link.
    check(by("eni0123456789a", 2), true);
    check(by("eth0", 2), true);
    check(by("eth1", 2), true);
    check(by("lo", 2), true);
    check(by("docker0", 2), false);
    check(Rule { src: Some(net("10.20.0.0/16")), ..by("docker0", 2) }, false);
    // By what is not understood, as an inverted mark; of encryption between nodes the table has only the peers.
    check(strange(marked(0xca6c, u32::MAX, 2)), true);
    check(strange(marked(0x10_0000, 0x10_0000, 6)), false);
    check(strange(any(32_000, 2)), true);
    check(strange(any(1000, 0)), false); // goto, and the kernel's own for VRFs
    check(strange(any(100, 254)), false);
    check(any(32_765, 2), true);
    check(from("2001:db8::/32", 200, 2), false);
    // What selects everything: Tailscale's table has its peers alone, or the default of an exit node.
    check(any(5270, 5), false);
    check(any(5270, 77), false);
    check(any(5270, 8), true);
    check(any(5270, 7), true);
    check(any(5270, 254), true);
    // At our first priority by marks, as of Cilium's proxy.
    let first = |fwmark, table| Rule { fwmark, ..any(10, table) };
    check(first(Some((0xa00, 0xf00)), 2), false);
    check(first(Some((0x80, 0x80)), 2), true);
    check(first(Some((0, 0xf00)), 2), true);
    check(strange(first(Some((0xa00, 0xf00)), 2)), true);
    check(from("10.20.0.0/16", 10, 2), true);
    check(Rule { iif: Some("eth0".into()), ipproto: Some(6), ..any(10, 2) }, true);
    check(marked(0x200, 0xf00, 254), false);
    check(Rule { fwmark: Some((0x200, 0xf00)), ..any(9, 2) }, false);
}

#[test]
fn a_command_takes_the_rule_that_it_is_told_for() {
    let check = |rules: &[Rule], wanted: &[&str]| {
        let (intent, mut seen) = node();
        seen.rules = rules.to_vec();
        let mut found = Vec::new();
        rules::findings(&intent, &seen, &mut found);
        let found = found.iter().map(|finding| finding.remedy.as_str()).collect::<Vec<_>>();
        assert_eq!(found, wanted, "{rules:?}");
    };
    let general = "find its owner: ip rule";
    let pods = Rule::from(net("10.20.0.0/16"), 200, 2);
    let strange = |rule: &Rule| Rule { foreign: true, ..rule.clone() };
    let tcp = Rule { ipproto: Some(6), ..pods.clone() };
    let own = Rule::from(net("10.20.12.60/32"), 1536, 2);
    let (plain, any) = ("ip rule del pref 200 from 10.20.0.0/16 lookup 2", "ip rule del pref 200 from 10.20.0.0/16");
    check(std::slice::from_ref(&pods), &[plain]);
    check(&[strange(&pods)], &[any]);
    // Two with what is not named, of which the first would go twice.
    check(&[strange(&pods), strange(&pods)], &[any, general]);
    check(&[pods.clone(), strange(&pods)], &[plain, general]);
    check(&[strange(&pods), pods.clone()], &[any, general]);
    check(&[tcp.clone(), pods.clone()], &["ip rule del pref 200 from 10.20.0.0/16 ipproto 6 lookup 2", general]);
    check(&[pods.clone(), tcp], &[plain, "ip rule del pref 200 from 10.20.0.0/16 ipproto 6 lookup 2"]);
    // Beside one of ours.
    check(&[own.clone(), strange(&own)], &[general]);
    check(&[strange(&own), own], &["ip rule del pref 1536 from 10.20.12.60"]);
}

#[test]
fn more_routes_than_are_told_are_counted() {
    let check = |count: u8, told: usize, more: Option<&str>| {
        let (intent, mut seen) = node();
        seen.routes.extend((0..count).map(|number| route(2, &format!("192.0.{number}.0/24"), None, 3)));
        let found = ways::findings(&intent, &seen);
        let last = found.last().map(|finding| finding.seen.as_str()).filter(|seen| seen.ends_with("more routes"));
        assert_eq!((found.len(), last), (told, more), "{count}");
    };
    let most = u8::try_from(RULESET_MAX).unwrap();
    check(0, 0, None);
    check(most, RULESET_MAX, None);
    check(most + 3, RULESET_MAX + 1, Some("3 more routes"));
}

#[test]
fn what_imds_and_ec2_say_of_pods() {
    use crate::model::ec2::{Attachment, Interface};
    use crate::model::imds::{Eni, Identity};
    let me = Identity {
        region: String::new(),
        zone: String::new(),
        instance: "i-1".into(),
        instance_type: String::new(),
        local_ipv4: std::net::Ipv4Addr::LOCALHOST,
        local_ipv6: None,
        mac: mac(3),
        primary_eni: "eni-1".into(),
        subnet: "subnet-1".into(),
        vpc: "vpc-1".into(),
    };
    let listed = |addresses: &[&str], device| Eni {
        id: "eni-2".into(),
        mac: mac(4),
        device,
        card: 0,
        subnet: "subnet-1".into(),
        subnet_v4: None,
        subnet_v6: None,
        ipv4s: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        v4_prefixes: Vec::new(),
        ipv6s: Vec::new(),
        v6_prefixes: Vec::new(),
    };
    let interface = |addresses: &[&str], device| Interface {
        id: "eni-2".into(),
        secondary_ipv4s: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        attachment: Some(Attachment { device, ..Attachment::default() }),
        ..Interface::default()
    };
    let check = |imds: Option<Eni>, ec2: Option<Interface>, wanted: &[&str]| {
        let (imds, ec2) = (imds.map(|eni| [eni]), ec2.map(|eni| [eni]));
        let slice = |eni: &'_ [Eni; 1]| eni.to_vec();
        let imds = imds.as_ref().map(slice);
        let found = cloud::findings(&node().0, &me, imds.as_deref(), ec2.as_ref().map(<[_; 1]>::as_slice));
        assert_eq!(found.iter().map(|finding| finding.name).collect::<Vec<_>>(), wanted);
    };
    let pod = ["10.20.12.60"];
    check(Some(listed(&pod, 1)), None, &[]);
    check(Some(listed(&[], 1)), None, &["address-lost"]);
    check(Some(listed(&pod, 2)), None, &["pod-other-eni"]);
    check(Some(listed(&[], 1)), Some(interface(&pod, 1)), &["imds-stale"]);
    // IMDS is silent.
    check(None, None, &[]);
    check(None, Some(interface(&pod, 1)), &[]);
    check(None, Some(interface(&[], 1)), &["address-lost"]);
    check(None, Some(interface(&pod, 2)), &["pod-other-eni"]);
    check(None, Some(Interface { id: "eni-3".into(), ..interface(&pod, 1) }), &["eni-not-attached"]);
}
