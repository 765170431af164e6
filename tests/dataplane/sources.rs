//! Sources and ports of the node's own processes, with SNAT as it is and with the setting that leaves them alone.

use crate::support::{Netns, tool, tool_with_input};
use crate::talk::{Connection, PATIENCE};
use crate::world::*;
use enibox::apply::Host;
use enibox::model::nft::Expr;
use enibox::netlink::link;
use enibox::plan::host::{Intent, What};
use std::net::{SocketAddr, UdpSocket};

const TRIES: u16 = 20;

fn kept() -> Intent {
    Intent { keep_host_source: true, ..intent() }
}

/// How many of some exchanges the server sees come from the client's own address and port. Each is answered.
fn own_sources(world: &World, client: &Netns, from: &str, to: &str, base: u16) -> u16 {
    let server = world.internet.run(|| UdpSocket::bind((to, base))).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let same = (1..=TRIES).filter(|number| {
        let from = SocketAddr::new(ip(from), base + number);
        let client = client.run(|| UdpSocket::bind(from)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.send_to(b"which port?", (to, base)).unwrap();
        let (_, seen) = server.recv_from(&mut [0; 16]).unwrap();
        server.send_to(b"this one", seen).unwrap();
        client.recv(&mut [0; 16]).unwrap();
        seen == from
    });
    u16::try_from(same.count()).unwrap()
}

/// Names in the rules about links that packets leave by, in order.
fn links_left_alone(node: &Netns) -> Vec<String> {
    let tables = node.run(|| Host::open()?.observe()).unwrap().tables;
    let exprs =
        tables.iter().flat_map(|table| &table.chains).flat_map(|chain| &chain.rules).flat_map(|rule| &rule.exprs);
    let name = |expr: &Expr| match expr {
        Expr::OifName { name, prefix: false, negate: false } => Some(name.clone()),
        _ => None,
    };
    exprs.filter_map(name).collect()
}

#[test]
fn the_nodes_own_sources_are_kept_when_asked_for() {
    let world = World::new(&intent(), "eni");
    let mut host = world.node.run(Host::open).unwrap();
    let at = |port| SocketAddr::new(ip(INTERNET), port);
    let old = Connection::open(&world.node, at(23_000), &world.internet, at(23_000));
    assert!(own_sources(&world, &world.node, NODE_IP, INTERNET, 23_100) <= 2, "a port may be hit by chance");
    well(&host.host(&kept()).unwrap());
    old.talk();
    let new = Connection::open(&world.node, at(23_001), &world.internet, at(23_001));
    assert_eq!(own_sources(&world, &world.node, NODE_IP, INTERNET, 23_200), TRIES);
    assert_eq!(own_sources(&world, &world.node, ENI_IP, INTERNET_FROM_ENI, 23_300), TRIES);
    // Pods are none of this.
    assert_eq!(own_sources(&world, &world.pod2, POD2, INTERNET, 23_400), 0);
    well(&host.host(&intent()).unwrap());
    old.talk();
    new.talk();
    assert!(own_sources(&world, &world.node, NODE_IP, INTERNET, 23_500) <= 2);
}

#[test]
fn a_secondary_eni_is_left_alone_under_whatever_name() {
    let world = World::bare();
    let mut host = world.node.run(Host::open).unwrap();
    let alone = Intent { enis: Vec::new(), pods: Vec::new(), ..kept() };
    well(&host.host(&alone).unwrap());
    assert_eq!(links_left_alone(&world.node), Vec::<String>::new());
    // The tables know the ENI before its address has its way out.
    let steps = host.host(&kept()).unwrap().steps.iter().map(|step| step.what).collect::<Vec<_>>();
    let place = |what| steps.iter().position(|step| *step == what).unwrap();
    assert!(place(What::Ruleset) < place(What::EniRule), "{steps:?}");
    assert_eq!(links_left_alone(&world.node), ["eth1"]);
    world.wire_pods();
    assert_eq!(own_sources(&world, &world.node, ENI_IP, INTERNET_FROM_ENI, 24_100), TRIES);
    let mut node = world.node.route();
    let index = link::by_name(&mut node, "eth1").unwrap().unwrap().index;
    node.run(&[link::set_down(index), link::rename(index, "ens6"), link::set_up(index)]).unwrap();
    well(&host.host(&kept()).unwrap());
    assert_eq!(links_left_alone(&world.node), ["ens6"]);
    assert_eq!(own_sources(&world, &world.node, ENI_IP, INTERNET_FROM_ENI, 24_200), TRIES);
    assert!(host.host(&kept()).unwrap().steps.is_empty());
    // Detached: first the link goes, then the daemon knows.
    node.run(&[link::delete_by_name("ens6")]).unwrap();
    let report = host.host(&kept()).unwrap();
    assert!(report.errors.is_empty() && report.enis.values().all(Result::is_err), "{report:?}");
    assert_eq!(links_left_alone(&world.node), Vec::<String>::new());
    let pods = kept().pods.into_iter().filter(|pod| pod.address != ip(POD2)).collect();
    well(&host.host(&Intent { pods, ..alone }).unwrap());
    assert!(own_sources(&world, &world.node, NODE_IP, INTERNET, 24_300) == TRIES);
}

/// What IPVS sends comes from no socket. A proxy's socket that is bound to a pod's address is somebody else's to route.
#[test]
fn transparent_proxies_are_left_alone_beside_ipvs() {
    const PROXY: &str = "import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.setsockopt(socket.SOL_IP, 19, 1)  # IP_TRANSPARENT
client.setsockopt(socket.SOL_SOCKET, 36, 0x539)  # SO_MARK
client.bind((sys.argv[1], 25000))
client.sendto(b'on behalf of a pod', (sys.argv[2], 25000))
";
    const WATCH: &str = "add table ip other
table ip other {
    chain before {
        type filter hook postrouting priority 90; policy accept;
        ip saddr 10.20.12.60 ip daddr 203.0.113.10 meta mark 0x539 ct mark 0 counter
    }
}";
    let world = World::new(&intent(), "eni");
    // Its name is all that is looked at; not every kernel has links of kube-proxy's kind.
    world.node.run(|| tool("ip", &["link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "ipvs-peer"]));
    well(&world.node.run(|| Host::open()?.host(&intent())).unwrap());
    world.node.run(|| tool_with_input("nft", &["-f", "-"], WATCH));
    if world.node.run(|| tool("python3", &["-c", PROXY, POD2, INTERNET])).is_none() {
        return;
    }
    let listing = |arguments: &[&str]| world.node.run(|| tool("nft", arguments)).unwrap();
    let chain = listing(&["list", "chain", "ip", "aws-cni", "ipvs-mark"]);
    assert!(chain.contains("meta skuid != 4294967295 counter packets 1 "), "{chain}");
    let seen = listing(&["list", "table", "ip", "other"]);
    assert!(seen.contains("counter packets 1 "), "with its own mark and no bit of ours: {seen}");
}
