//! The host plan on a real kernel: a node with two ENIs whose links lead to a router, which is the rest of the world too.

mod egress;
mod links;
mod rules;
#[path = "../support/mod.rs"]
mod support;

use enibox::apply::{Host, HostReport};
use enibox::clock;
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

/// What is not made, and why.
fn warnings(report: &HostReport) -> String {
    let lines = report.warnings.iter().map(|(what, error)| format!("{}: {error}\n", what.name()));
    lines.collect::<Vec<_>>().concat()
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
            "add rule 1535: from all to 192.0.2.0/24 lookup main",
            "set nf_tables rules: table ip aws-cni is missing",
            "add rule 32765: from 10.20.12.5 lookup 2",
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
    let peer = || support::tool("ip", &["addr", "add", "10.20.40.7", "peer", "10.20.40.8/32", "dev", "eth1"]);
    if world.node.run(peer).is_some() {
        broken(&[], &["delete address 10.20.40.7/32 from eth1"]);
    }
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
        Intent { keep_host_source: true, ..intent() },
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
fn a_pod_that_goes_during_a_look_is_no_fault() {
    let world = World::new();
    world.host(&intent());
    let netns = Netns::new("pod");
    let wired = pod_of("two", &[("10.20.12.60", 2)]);
    add(&world.node, &wired, &netns).unwrap();
    let name = &wired.interfaces[0].host_veth;
    let mut wanted = intent();
    wanted.pods[1].veth = name[name.len() - 11..].to_owned();
    let mut host = world.node.run(Host::open).unwrap();
    assert_eq!(texts(&host.host(&wanted).unwrap()), Vec::<&str>::new());
    // DEL has taken rules and route when the look is made, and the link when the steps are.
    let addresses = vec![RemovedAddress { address: ip("10.20.12.60"), table: 2 }];
    world.node.run(Host::open).unwrap().del_pod(&Removal { addresses, ..Removal::default() }, None).unwrap();
    let mut planned = Vec::new();
    let report = host.host_with(&wanted, &mut |_, plan| {
        planned.extend(plan.steps.iter().map(|step| step.text.clone()));
        world.node.route().run(&[link::delete_by_name(name)]).unwrap();
    });
    let report = report.unwrap();
    let route = format!("replace route 10.20.12.60 dev {name}");
    assert!(planned.iter().any(|text| text.starts_with(&route)), "{planned:?}");
    assert!(!texts(&report).iter().any(|text| text.starts_with(&route)), "{:?}", texts(&report));
    assert_eq!(warnings(&report), "");
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
            "add rule 1535: from all to 192.0.2.0/24 lookup main",
            "add rule 32765: from 2001:db8:12::5 lookup 2",
        ]
    );
    assert_eq!(texts(&world.host(&wanted)), Vec::<&str>::new());
    assert!(!world.observe().routes.iter().any(|route| route.dst == net("2001:db8:12::/64")));
}

#[test]
fn what_one_pod_is_refused_holds_up_nothing_else() {
    let world = World::new();
    world.host(&intent());
    let netns = Netns::new("pod");
    let wired = pod_of("two", &[("10.20.12.60", 2)]);
    add(&world.node, &wired, &netns).unwrap();
    let name = wired.interfaces[0].host_veth.clone();
    let mut wanted = intent();
    wanted.pods[1].veth = name[name.len() - 11..].to_owned();
    assert_eq!(texts(&world.host(&wanted)), Vec::<&str>::new());
    let mut socket = world.node.route();
    let veth = link::by_name(&mut socket, &name).unwrap().unwrap();
    let old = Rule { fwmark: Some((0x100, 0x100)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) };
    let stale = Rule::from(net("10.20.11.50/32"), 1536, 3);
    let alias = enibox::model::naming::veth_alias(veth.mac.unwrap(), 99_999, &veth.name);
    socket.run(&[link::set_alias(veth.index, &alias), rule::add(&old), rule::add(&stale)]).unwrap();
    let report = world.host(&wanted);
    well(&report);
    let told = warnings(&report);
    assert!(told.starts_with(&format!("pod-mtu: set mtu 99999 on {name}: ")), "{told}");
    assert_eq!(
        texts(&report),
        ["delete rule 1024: from all fwmark 0x100/0x100 lookup main", "delete rule 1536: from 10.20.11.50 lookup 3",]
    );
}

#[test]
fn tables_that_somebody_deletes_at_once_are_set_again() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let world = World::new();
    let mut host = world.node.run(Host::open).unwrap();
    well(&host.host(&intent()).unwrap());
    let right = rule_set(&world.observe());
    for round in 1..=3 {
        let deleted = AtomicUsize::new(0);
        let end = clock::instant() + std::time::Duration::from_secs(20);
        let more = || deleted.load(Ordering::SeqCst) < 3 && clock::instant() < end;
        std::thread::scope(|scope| {
            // As soon as it is there, three times.
            scope.spawn(|| {
                let mut socket = world.node.run(Socket::netfilter).unwrap();
                while more() {
                    if nft::has_chain(&mut socket, Family::V4, "aws-cni", "nat-postrouting").unwrap() {
                        nft::delete(&mut socket, Family::V4, "aws-cni").unwrap();
                        deleted.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
            while more() {
                host.host(&intent()).unwrap();
            }
        });
        assert_eq!(deleted.load(Ordering::SeqCst), 3);
        let report = host.host(&intent()).unwrap();
        well(&report);
        assert_eq!((warnings(&report), rule_set(&world.observe())), (String::new(), right.clone()), "round {round}");
    }
}

#[test]
fn only_the_table_that_differs_is_set() {
    let world = World::new();
    let mut socket = world.node.run(Socket::netfilter).unwrap();
    let mut generation = || nft::generation(&mut socket).unwrap();
    let both = Intent { egress: enibox::plan::host::Egress::Snat(ip("2001:db8::5")), ..intent() };
    let before = generation();
    well(&world.host(&both));
    assert_eq!(generation(), before + 2);
    well(&world.host(&both));
    assert_eq!(generation(), before + 2);
    nft::delete(&mut world.node.run(Socket::netfilter).unwrap(), Family::V6, "aws-cni").unwrap();
    let report = world.host(&both);
    well(&report);
    assert_eq!(
        (report.ruleset, generation()),
        (Some(true), before + 4),
        "one by us: the other table keeps its counters"
    );
    // No table is deleted that is not there.
    well(&world.host(&intent()));
    well(&world.host(&Intent { mark: 0x100, ..intent() }));
    assert_eq!(generation(), before + 6);
}

#[test]
fn a_link_that_copied_the_mac_is_not_the_trunk() {
    let world = World::new();
    let mut wanted = intent();
    wanted.enis[0].trunk = true;
    let mut socket = world.node.route();
    // The bridge has the lower index: the ENI's link is made anew after it.
    let eth1 = link::by_name(&mut socket, "eth1").unwrap().unwrap().index;
    world.node.run(|| {
        support::tool("ip", &["link", "add", "br0", "type", "bridge"]).unwrap();
        support::tool("ip", &["link", "del", "eth1"]).unwrap();
        support::tool("ip", &["link", "add", "eth1", "address", &SECOND.to_string(), "type", "veth", "peer", "far"])
            .unwrap();
        support::tool("ip", &["link", "set", "br0", "address", &SECOND.to_string()]).unwrap();
    });
    let again = link::by_name(&mut socket, "eth1").unwrap().unwrap().index;
    let bridge = link::by_name(&mut socket, "br0").unwrap().unwrap().index;
    assert!(eth1 < bridge && bridge < again);
    let report = world.host(&wanted);
    well(&report);
    assert_eq!(report.trunks[&"eni-2".into()], again);
}

#[test]
fn a_renamed_veth_gets_its_name_and_its_routes_back() {
    let world = World::new();
    world.assign("10.20.12.60");
    let sandbox = Netns::new("pod");
    let wired = pod_of("two", &[("10.20.12.60", 2)]);
    add(&world.node, &wired, &sandbox).unwrap();
    let name = wired.interfaces[0].host_veth.as_str();
    let mut wanted = intent();
    wanted.pods = vec![HostPod { veth: name[name.len() - 11..].into(), ..pod("10.20.12.60", 2) }];
    let mut host = world.node.run(Host::open).unwrap();
    well(&host.host(&wanted).unwrap());
    let right = world.observe();
    let mut socket = world.node.route();
    let index = link::by_name(&mut socket, name).unwrap().unwrap().index;
    let back = format!("set name {name} on odd0");
    let [way, way_back] = ["odd0", name].map(|dev| format!("replace route 10.20.12.60 dev {dev}"));
    let rename = |socket: &mut Socket| {
        let requests = [link::set_down(index), link::rename(index, "odd0"), link::set_up(index)];
        socket.run(&requests).unwrap();
    };
    // Before Linux 6.2 a link must be down for it, whoever renames it, and loses its route.
    let live = socket.batch(&[link::rename(index, "odd0")]).unwrap().remove(0);
    let cases = match &live {
        Ok(_) => vec![(false, vec![back.clone()]), (true, vec![back, way])],
        Err(error) if error.errno == libc::EBUSY => vec![(true, vec![back, way, way_back])],
        Err(error) => panic!("{error}"),
    };
    for (down, steps) in cases {
        if down {
            rename(&mut socket);
        }
        let seen = world.observe();
        let seen = enibox::plan::core::Seen::of(&seen.links, &seen.routes, &seen.rules);
        assert!(seen.links.iter().any(|link| link == name), "its pod lives: {seen:?}");
        let report = host.host(&wanted).unwrap();
        well(&report);
        assert_eq!(texts(&report), steps);
        let now = world.observe();
        assert_eq!((&now.links, ipv4(&now)), (&right.links, ipv4(&right)));
        assert_eq!(tcp(&sandbox, &world.node, ip(NODE_IP)).unwrap(), ip("10.20.12.60"));
    }
    // Somebody has the name: it stays theirs.
    rename(&mut socket);
    let end = |name| link::End { name, mac: None, netns: None };
    socket.run(&[link::create_veth(&link::Veth { end: end(name), peer: end("other"), mtu: 0, up: false })]).unwrap();
    let report = host.host(&wanted).unwrap();
    well(&report);
    assert_eq!(link::by_index(&mut socket, index).unwrap().unwrap().name, "odd0");
    // As its alternative one, which no list of links shows: the pod is not cut off for a name that it cannot get.
    socket.run(&[link::delete_by_name(name)]).unwrap();
    let lends =
        |verb| world.node.run(|| support::tool("ip", &["link", "property", verb, "dev", "eth0", "altname", name]));
    if lends("add").is_none() {
        return;
    }
    well(&host.host(&wanted).unwrap());
    let report = host.host(&wanted).unwrap();
    well(&report);
    assert_eq!(texts(&report), [""; 0], "nothing had to be put back");
    lends("del").unwrap();
    well(&host.host(&wanted).unwrap());
    assert_eq!(link::by_index(&mut socket, index).unwrap().unwrap().name, name);
}
