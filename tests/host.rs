//! The host plan on a real kernel: a node with two ENIs whose links lead to a router, which is the rest of the world too.

mod support;

use enibox::apply::{Host, HostReport};
use enibox::model::net::{Address, Family, Mac, Route, Rule, Scope, TABLE_MAIN};
use enibox::netlink::{Socket, addr, conntrack, link, nft, route, rule, sysctl};
use enibox::plan::host::{HostEni, HostPod, Intent, Observation};
use enibox::plan::pod::{Removal, RemovedAddress};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use support::Netns;
use support::pods::{add, pod_of};
use support::traffic::{tcp, udp};

const NODE_IP: &str = "10.20.11.162";
const ENI_IP: &str = "10.20.12.5";
const OUTSIDE: &str = "203.0.113.10";
const IN_VPC: &str = "10.20.30.10";
const PRIMARY: Mac = Mac([2, 0, 0, 0, 11, 162]);
const SECOND: Mac = Mac([2, 0, 0, 0, 12, 5]);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod(address: &str, table: u32) -> HostPod {
    HostPod { address: ip(address), table, name: String::new(), veth: String::new() }
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn address(dev: u32, text: &str) -> Address {
    Address { dev, addr: net(text), no_prefix_route: false, no_dad: false }
}

fn via(dst: &str, gateway: &str, dev: u32) -> Route {
    let gateway = Some(ip(gateway));
    Route { table: TABLE_MAIN, dst: net(dst), gateway, dev, scope: Scope::Universe, prefsrc: None, metric: 0 }
}

/// A node as an instance has it before the daemon starts: the primary ENI configured, the second one bare.
struct World {
    node: Netns,
    router: Netns,
}

impl World {
    fn new() -> World {
        let (node, router) = (Netns::new("node"), Netns::new("router"));
        let (mut inside, mut outside) = (node.route(), router.route());
        let mut index = |name: &str, peer: &str, mac: Mac| {
            let end = |name, mac, netns| link::End { name, mac, netns };
            let veth = link::Veth {
                end: end(name, Some(mac), None),
                peer: end(peer, None, Some(router.handle().as_fd())),
                mtu: 1500,
                up: false,
            };
            inside.run(&[link::create_veth(&veth)]).unwrap();
            let link = link::by_name(&mut inside, name).unwrap().unwrap();
            (link.index, link.parent.unwrap())
        };
        let (eth0, near) = index("eth0", "near", PRIMARY);
        let (_, far) = index("eth1", "far", SECOND);
        inside.run(&[link::set_up(eth0), addr::add(&address(eth0, "10.20.11.162/24"))]).unwrap();
        let lo = link::by_name(&mut outside, "lo").unwrap().unwrap().index;
        outside
            .run(&[
                link::set_up(near),
                link::set_up(far),
                addr::add(&address(near, "10.20.11.1/24")),
                addr::add(&address(far, "10.20.12.1/24")),
                addr::add(&address(lo, "203.0.113.10/32")),
                addr::add(&address(lo, "10.20.30.10/32")),
                // As in a VPC, frames go to the ENI that has the address, without asking who answers for it.
                route::replace(&via("10.20.11.50/32", NODE_IP, near)),
            ])
            .unwrap();
        inside.run(&[route::add(&via("0.0.0.0/0", "10.20.11.1", eth0))]).unwrap();
        for netns in [&node, &router] {
            netns.run(|| sysctl::set("net/ipv4/ip_forward", "1")).unwrap();
        }
        World { node, router }
    }

    /// The router sends a pod's address to the second ENI once that one is set up.
    fn assign(&self, pod: &str) {
        let mut socket = self.router.route();
        let far = link::by_name(&mut socket, "far").unwrap().unwrap().index;
        socket.run(&[route::replace(&via(&format!("{pod}/32"), ENI_IP, far))]).unwrap();
    }

    fn host(&self, intent: &Intent) -> HostReport {
        self.node.run(|| Host::open()?.host(intent)).unwrap()
    }

    fn observe(&self) -> Observation {
        self.node.run(|| Host::open()?.observe()).unwrap()
    }
}

fn intent() -> Intent {
    Intent {
        node_ip: ip(NODE_IP),
        primary_mac: PRIMARY,
        eni_mtu: 1400,
        vpc_cidrs: vec![net("10.20.0.0/16")],
        excluded_cidrs: vec![net("172.16.0.0/12")],
        external_service_cidrs: vec![net("192.0.2.0/24")],
        enis: vec![HostEni {
            id: "eni-2".into(),
            mac: SECOND,
            card: 0,
            device: 1,
            own: net("10.20.12.5/24"),
            gateway: ip("10.20.12.1"),
            table: 2,
            trunk: false,
        }],
        pods: vec![pod("10.20.11.50", TABLE_MAIN), pod("10.20.12.60", 2)],
        ..Intent::default()
    }
}

fn texts(report: &HostReport) -> Vec<&str> {
    report.steps.iter().map(|step| step.text.as_str()).collect()
}

fn well(report: &HostReport) {
    assert!(report.errors.is_empty(), "{:?}", report.errors);
    for (eni, result) in &report.enis {
        assert!(result.is_ok(), "{eni}: {result:?}");
    }
}

/// Without counters, which packets move.
fn rule_set(seen: &Observation) -> String {
    let text = seen.tables.iter().map(ToString::to_string).collect::<String>();
    text.split(' ')
        .scan(0, |skip, word| {
            let counted = std::mem::take(skip);
            if counted > 0 {
                *skip = counted - 1;
                return Some(String::new());
            }
            if word == "packets" {
                *skip = 3;
                return Some(String::new());
            }
            Some(format!("{word} "))
        })
        .collect()
}

/// Addresses, routes and rules of IPv4, in an order of their own.
fn ipv4(seen: &Observation) -> (BTreeSet<Address>, BTreeSet<Route>, BTreeSet<Rule>) {
    (
        seen.addresses.iter().filter(|one| one.addr.addr().is_ipv4()).copied().collect(),
        seen.routes.iter().filter(|one| one.dst.addr().is_ipv4()).copied().collect(),
        seen.rules.iter().filter(|one| one.family == Family::V4).cloned().collect(),
    )
}

#[test]
fn the_second_time_nothing_is_done() {
    let world = World::new();
    let report = world.host(&intent());
    well(&report);
    assert_eq!(report.primary, "eth0");
    assert_eq!(
        texts(&report),
        [
            "set sysctl net/ipv4/conf/eth0/rp_filter to 2 instead of 0",
            "set mtu 1400 on eth0",
            "add rule 1024: from all fwmark 0x80/0x80 lookup main",
            "set mtu 1400 on eth1",
            "set eth1 up",
            "add address 10.20.12.5/24 to eth1",
            "replace route 10.20.12.1 dev eth1 table 2 scope link",
            "replace route default via 10.20.12.1 dev eth1 table 2",
            "add rule 32765: from 10.20.12.5 lookup 2",
            "add rule 1535: from all to 192.0.2.0/24 lookup main",
            "set nf_tables rules: table ip aws-cni is missing",
        ]
    );
    let before = world.observe();
    assert!(!before.routes.iter().any(|route| route.dst == net("10.20.12.0/24")), "no connected route in main");
    let mut host = world.node.run(Host::open).unwrap();
    for _ in 0..2 {
        let report = host.host(&intent()).unwrap();
        well(&report);
        assert_eq!(texts(&report), Vec::<&str>::new());
    }
    let after = world.observe();
    assert_eq!((ipv4(&after), after.tables), (ipv4(&before), before.tables));
}

#[test]
fn pods_reach_the_vpc_and_the_world() {
    let world = World::new();
    world.host(&intent());
    world.assign("10.20.12.60");
    let (one, two) = (Netns::new("pod"), Netns::new("pod"));
    add(&world.node, &pod_of("one", &[("10.20.11.50", 254)]), &one).unwrap();
    add(&world.node, &pod_of("two", &[("10.20.12.60", 2)]), &two).unwrap();
    for exchange in [tcp, udp] {
        for (pod, own) in [(&one, "10.20.11.50"), (&two, "10.20.12.60")] {
            assert_eq!(exchange(pod, &world.router, ip(IN_VPC)).unwrap(), ip(own));
            assert_eq!(
                exchange(pod, &world.router, ip(OUTSIDE)).unwrap(),
                ip(NODE_IP),
                "{own} leaves by the primary ENI"
            );
            assert_eq!(exchange(pod, &world.node, ip(NODE_IP)).unwrap(), ip(own));
        }
        assert_eq!(exchange(&one, &two, ip("10.20.12.60")).unwrap(), ip("10.20.11.50"));
        assert_eq!(exchange(&two, &one, ip("10.20.11.50")).unwrap(), ip("10.20.12.60"));
        assert_eq!(exchange(&world.router, &two, ip("10.20.12.60")).unwrap(), ip("10.20.12.1"));
    }
    // With SNAT left to somebody else the pod's address is seen outside, and comes by its own ENI.
    well(&world.host(&Intent { external_snat: true, ..intent() }));
    assert_eq!(tcp(&two, &world.router, ip(OUTSIDE)).unwrap(), ip("10.20.12.60"));
}

#[test]
fn open_connections_survive_a_restart_and_a_repair() {
    use std::io::{Read, Write};
    let world = World::new();
    world.host(&intent());
    world.assign("10.20.12.60");
    let pod = Netns::new("pod");
    add(&world.node, &pod_of("two", &[("10.20.12.60", 2)]), &pod).unwrap();
    let listener = world.router.run(|| std::net::TcpListener::bind((OUTSIDE, 0))).unwrap();
    let server = listener.local_addr().unwrap();
    let mut client =
        pod.run(|| std::net::TcpStream::connect_timeout(&server, std::time::Duration::from_secs(5))).unwrap();
    let (mut stream, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), ip(NODE_IP));
    let mut talk = || {
        for socket in [&mut client, &mut stream] {
            socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        }
        let mut buffer = [0; 4];
        client.write_all(b"ping").unwrap();
        stream.read_exact(&mut buffer).unwrap();
        stream.write_all(&buffer).unwrap();
        client.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"ping");
    };
    talk();
    assert_eq!(texts(&world.host(&intent())), Vec::<&str>::new());
    talk();
    let address = net("10.20.12.60/32");
    let rules = [Rule::to(address, 512, TABLE_MAIN), Rule::from(address, 1536, 2)];
    world.node.route().run(&rules.each_ref().map(rule::delete)).unwrap();
    assert_eq!(
        texts(&world.host(&intent())),
        ["add rule 1536: from 10.20.12.60 lookup 2", "add rule 512: from all to 10.20.12.60 lookup main"]
    );
    talk();
    let wider = Intent { vpc_cidrs: vec![net("10.20.0.0/16"), net("100.64.0.0/16")], ..intent() };
    let report = world.host(&wider);
    well(&report);
    assert_eq!(report.steps.len(), 1, "{:?}", report.steps);
    talk();
}

#[test]
fn what_others_broke_is_repaired() {
    let world = World::new();
    world.host(&intent());
    let right = world.observe();
    let mut socket = world.node.route();
    let eth1 = link::by_name(&mut socket, "eth1").unwrap().unwrap().index;
    let mut host = world.node.run(Host::open).unwrap();
    let mut broken = |requests: &[enibox::netlink::Request], steps: &[&str]| {
        socket.run(requests).unwrap();
        let report = host.host(&intent()).unwrap();
        well(&report);
        assert_eq!(texts(&report), steps);
        let now = world.observe();
        assert_eq!(rule_set(&now), rule_set(&right));
        assert_eq!(ipv4(&now), ipv4(&right));
    };
    let marked = Rule { fwmark: Some((0x80, 0x80)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) };
    broken(&[rule::delete(&marked)], &["add rule 1024: from all fwmark 0x80/0x80 lookup main"]);
    let old = Rule { fwmark: Some((0x100, 0x100)), ..marked };
    broken(&[rule::add(&old)], &["delete rule 1024: from all fwmark 0x100/0x100 lookup main"]);
    let gone = Rule::from(net("10.20.12.99/32"), 32765, 3);
    broken(&[rule::add(&gone)], &["delete rule 32765: from 10.20.12.99 lookup 3"]);
    broken(
        &[link::set_down(eth1)],
        &[
            "set eth1 up",
            "replace route 10.20.12.1 dev eth1 table 2 scope link",
            "replace route default via 10.20.12.1 dev eth1 table 2",
        ],
    );
    broken(&[addr::add(&address(eth1, "10.20.40.7/24"))], &["delete address 10.20.40.7/24 from eth1"]);
    // Somebody flushed everything; the same process notices, though it read the rules a moment ago.
    let mut filter = world.node.run(Socket::netfilter).unwrap();
    nft::delete(&mut filter, Family::V4, "aws-cni").unwrap();
    broken(&[], &["set nf_tables rules: table ip aws-cni is missing"]);
    // Deleting the only address took the ENI's routes with it.
    broken(
        &[addr::delete(&address(eth1, "10.20.12.5/24"))],
        &[
            "add address 10.20.12.5/24 to eth1",
            "replace route 10.20.12.1 dev eth1 table 2 scope link",
            "replace route default via 10.20.12.1 dev eth1 table 2",
        ],
    );
}

#[test]
fn a_wrong_address_that_came_first_takes_nothing_with_it() {
    let world = World::new();
    let mut socket = world.node.route();
    let eth1 = link::by_name(&mut socket, "eth1").unwrap().unwrap().index;
    // The first address of a subnet is its primary one: the kernel deletes the others with it.
    socket.run(&[link::set_up(eth1), addr::add(&address(eth1, "10.20.12.99/24"))]).unwrap();
    well(&world.host(&intent()));
    assert_eq!(texts(&world.host(&intent())), Vec::<&str>::new());
    let seen = world.observe();
    let here = seen.addresses.iter().filter(|one| one.dev == eth1 && one.addr.addr().is_ipv4()).map(|one| one.addr);
    assert_eq!(here.collect::<Vec<_>>(), [net("10.20.12.5/24")]);
    assert_eq!(seen.routes.iter().filter(|route| route.table == 2).count(), 2);
    assert!(!seen.routes.iter().any(|route| route.dst == net("10.20.12.0/24")));
}

#[test]
fn an_eni_that_has_no_link_yet_is_told_and_the_rest_is_done() {
    let world = World::new();
    let mut wanted = intent();
    let later = HostEni {
        id: "eni-3".into(),
        mac: Mac([2, 0, 0, 0, 13, 5]),
        own: net("10.20.13.5/24"),
        table: 3,
        ..wanted.enis[0].clone()
    };
    wanted.enis.insert(0, later);
    let report = world.host(&wanted);
    assert!(report.enis[&"eni-2".into()].is_ok());
    let error = report.enis[&"eni-3".into()].as_ref().unwrap_err().to_string();
    assert!(error.starts_with("no link has MAC 02:00:00:00:0d:05 (links: lo "), "{error}");
    assert!(report.errors.is_empty());
    assert!(texts(&report).contains(&"add address 10.20.12.5/24 to eth1"));
}

#[test]
fn the_rule_set_goes_when_nothing_needs_it() {
    let world = World::new();
    let on = world.host(&intent());
    well(&on);
    let off = Intent { external_snat: true, node_port: false, ..intent() };
    let report = world.host(&off);
    well(&report);
    assert_eq!(
        texts(&report),
        [
            "set nf_tables rules: table ip aws-cni is there and should not be",
            "delete rule 1024: from all fwmark 0x80/0x80 lookup main",
        ]
    );
    assert!(world.observe().tables.is_empty());
    assert_eq!(texts(&world.host(&off)), Vec::<&str>::new());
}

#[test]
fn every_variant_reads_back_as_it_was_written() {
    use enibox::model::nft::SnatPorts;
    use enibox::plan::host::Egress;
    let world = World::new();
    let mut host = world.node.run(Host::open).unwrap();
    let v6 = Intent { v6: true, node_ip: ip("2001:db8::5"), enis: Vec::new(), pods: Vec::new(), ..intent() };
    for wanted in [
        Intent { snat_ports: SnatPorts::Random, ..intent() },
        Intent { snat_ports: SnatPorts::Keep, node_port: false, ..intent() },
        Intent { mark: 0x8000_0090, veth_prefix: "pod".into(), ..intent() },
        Intent { excluded_cidrs: vec![net("0.0.0.0/0")], ..intent() },
        Intent { egress: Egress::Snat(ip("2001:db8::5")), ..intent() },
        Intent { egress: Egress::Snat(ip(NODE_IP)), ..v6.clone() },
        Intent { egress: Egress::Guard, ..v6 },
    ] {
        well(&host.host(&wanted).unwrap());
        let again = host.host(&wanted).unwrap();
        well(&again);
        assert_eq!(texts(&again), Vec::<&str>::new(), "{wanted:?}");
    }
}

#[test]
fn connections_of_a_pod_end_with_it() {
    let world = World::new();
    world.host(&intent());
    world.assign("10.20.12.60");
    let (one, two) = (Netns::new("pod"), Netns::new("pod"));
    add(&world.node, &pod_of("one", &[("10.20.11.50", 254)]), &one).unwrap();
    add(&world.node, &pod_of("two", &[("10.20.12.60", 2)]), &two).unwrap();
    udp(&one, &world.router, ip(OUTSIDE)).unwrap();
    udp(&two, &world.router, ip(OUTSIDE)).unwrap();
    let addresses = vec![RemovedAddress { address: ip("10.20.12.60"), table: 2 }];
    let removal = Removal { addresses, ..Removal::default() };
    world.node.run(|| Host::open()?.del_pod(&removal, None)).unwrap();
    let mut socket = world.node.run(Socket::netfilter).unwrap();
    assert_eq!(conntrack::delete_all(&mut socket, ip("10.20.12.60")).unwrap(), 0, "DEL has done it");
    assert_eq!(conntrack::delete_all(&mut socket, ip("10.20.11.50")).unwrap(), 1, "the other pod keeps its own");
}

#[test]
fn an_ipv6_node_is_set_up_once() {
    let world = World::new();
    let eni = HostEni { own: net("2001:db8:12::5/64"), gateway: ip("fe80:ec2::1"), ..intent().enis[0].clone() };
    let wanted = Intent {
        v6: true,
        node_ip: ip("2001:db8:11::162"),
        vpc_cidrs: vec![net("2001:db8::/32")],
        enis: vec![eni],
        pods: vec![pod("2001:db8:12::60", 2)],
        ..intent()
    };
    let report = world.host(&wanted);
    well(&report);
    assert_eq!(
        texts(&report),
        [
            "set sysctl net/ipv4/conf/eth0/rp_filter to 2 instead of 0",
            "set sysctl net/ipv6/conf/all/forwarding to 1 instead of 0",
            "set sysctl net/ipv6/conf/eth0/accept_ra to 2 instead of 1",
            "set mtu 1400 on eth0",
            "add rule 1024: from all fwmark 0x80/0x80 lookup main",
            "set mtu 1400 on eth1",
            "add address fe80::ff:fe00:c05/64 to eth1",
            "set eth1 up",
            "add address 2001:db8:12::5/64 to eth1",
            "replace route fe80:ec2::1 dev eth1 table 2 metric 1024",
            "replace route default via fe80:ec2::1 dev eth1 table 2 metric 1024",
            "add rule 32765: from 2001:db8:12::5 lookup 2",
            "add rule 1535: from all to 192.0.2.0/24 lookup main",
        ]
    );
    assert_eq!(texts(&world.host(&wanted)), Vec::<&str>::new());
    assert!(!world.observe().routes.iter().any(|route| route.dst == net("2001:db8:12::/64")));
}

#[test]
fn the_local_rule_moves_behind_the_branches_and_back() {
    let world = World::new();
    let eni = HostEni { own: net("2001:db8:12::5/64"), gateway: ip("fe80:ec2::1"), ..intent().enis[0].clone() };
    let six = Intent { v6: true, node_ip: ip("2001:db8:11::162"), vpc_cidrs: Vec::new(), enis: vec![eni], ..intent() };
    let locals = |family: Family| {
        let rules = world.observe().rules.into_iter().filter(|rule| rule.family == family && rule.priority <= 20);
        rules.map(|rule| rule.to_string()).collect::<Vec<_>>()
    };
    for (family, plain) in [(Family::V4, intent()), (Family::V6, six)] {
        let strict = Intent { strict_branches: true, ..plain.clone() };
        let before = locals(family);
        assert_eq!(before, ["0: from all lookup local"]);
        well(&world.host(&strict));
        let router = "0: from fe80:ec2::1 ipproto 58 lookup local";
        let moved = "20: from all lookup local";
        let wanted = if family == Family::V4 { vec![moved] } else { vec![router, moved] };
        assert_eq!(locals(family), wanted);
        assert_eq!(texts(&world.host(&strict)), Vec::<&str>::new());
        tcp(&world.node, &world.node, ip(NODE_IP)).unwrap();
        // A pod made in strict mode keeps it as it is.
        let rule = Rule { iif: Some("vlan0123456789a".into()), ..Rule::any(family, 10, 107) };
        let stub = link::Veth {
            end: link::End { name: "vlan0123456789a", mac: None, netns: None },
            peer: link::End { name: "stub", mac: None, netns: None },
            mtu: 1500,
            up: false,
        };
        world.node.route().run(&[link::create_veth(&stub), rule::add(&rule)]).unwrap();
        world.host(&plain);
        assert!(locals(family).contains(&moved.to_owned()));
        world.node.route().run(&[link::delete_by_name("stub")]).unwrap();
        // Its veth is gone, so the rule goes as well; the next round finds nothing that keeps the local rule where it is.
        world.host(&plain);
        world.host(&plain);
        assert_eq!(texts(&world.host(&plain)), Vec::<&str>::new());
        assert_eq!(locals(family), before);
    }
}
