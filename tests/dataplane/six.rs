//! The flow matrix of IPv6 mode (`spec/dataplane.md` 13): no mark and no translation of ours, so what counts is that services work
//! beside our rules, whichever came first. A node with two ENIs, a router that checks sources as EC2 does, a host in the VPC and
//! one outside, two pods.

use crate::proxy::{self, Backend, Kind, Service};
use crate::support::pods::{add, pod_of};
use crate::support::{Netns, find_program, tool_with_input};
use crate::talk::{BOTH, Flow, IMPATIENCE, PATIENCE};
use crate::world::{PRIMARY, SECOND, ip, net, well};
use enibox::apply::Host;
use enibox::model::net::TABLE_MAIN;
use enibox::plan::host::{HostEni, HostPod, Intent};
use std::net::{IpAddr, SocketAddr};

const NODE: &str = "2001:db8:11::162";
const ENI: &str = "2001:db8:12::5";
const POD1: &str = "2001:db8:11::50";
const POD2: &str = "2001:db8:12::60";
const VPC: &str = "2001:db8:30::10";
const INTERNET: &str = "2001:db8:113::10";
const CLUSTER: &str = "fd00:172:20::a";

/// How the client addresses the server.
#[derive(Clone, Copy, Debug)]
enum Way {
    Direct,
    Cluster,
    Local,
    Masqueraded,
}
use Way::{Cluster, Direct, Local, Masqueraded};

/// Which source the server sees.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// The client's own.
    Own,
    /// One of the node's.
    Node,
    /// Nothing arrives, or no answer does: without a mark, answers to a node port leave by the pod's own ENI.
    Nothing,
}
use Seen::{Node, Nothing, Own};

const ROWS: &[(&str, Way, &str, Seen)] = &[
    (POD1, Direct, INTERNET, Own),
    (POD2, Direct, INTERNET, Own),
    (POD2, Direct, VPC, Own),
    (POD2, Direct, POD1, Own),
    (POD1, Direct, POD2, Own),
    (POD2, Direct, NODE, Own),
    (NODE, Direct, POD2, Node),
    (NODE, Direct, INTERNET, Own),
    (VPC, Direct, POD2, Own),
    (INTERNET, Direct, POD1, Own),
    (POD1, Cluster, POD2, Own),
    (POD2, Cluster, POD1, Own),
    (POD1, Cluster, VPC, Own),
    (POD2, Cluster, VPC, Own),
    (POD1, Cluster, INTERNET, Own),
    (POD2, Cluster, INTERNET, Own),
    (INTERNET, Local, POD1, Own),
    (VPC, Local, POD1, Own),
    (INTERNET, Local, POD2, Nothing),
    (INTERNET, Masqueraded, POD1, Node),
    (INTERNET, Masqueraded, VPC, Node),
    (INTERNET, Masqueraded, POD2, Nothing),
];

pub struct World {
    pub node: Netns,
    pub _router: Netns,
    vpc: Netns,
    internet: Netns,
    pub pod1: Netns,
    pub pod2: Netns,
}

impl World {
    pub fn new() -> World {
        let [node, router, vpc, internet] = ["node", "router", "vpc", "internet"].map(Netns::new);
        let sysctl = "sysctl -q -w net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0 \
                      net.ipv6.conf.all.forwarding=1\n";
        for netns in [&node, &router, &vpc, &internet] {
            shell(netns, sysctl);
        }
        let path = |netns: &Netns| netns.path().display().to_string();
        let mut script = Vec::new();
        for (name, peer, other) in
            [("near", "eth0", &node), ("far", "eth1", &node), ("tovpc", "eth0", &vpc), ("out", "eth0", &internet)]
        {
            script.push(format!("ip link add {name} type veth peer name {peer} netns {}\n", path(other)));
            script.push(format!("ip link set {name} up; ip addr add fe80:ec2::1/128 dev {name} nodad\n"));
        }
        // As in a VPC, frames go to the ENI that has the address, and only its own addresses come from it.
        for (dev, mac, addresses) in [("near", PRIMARY, [NODE, POD1]), ("far", SECOND, [ENI, POD2])] {
            for address in addresses {
                script.push(format!("ip -6 route add {address} dev {dev}\n"));
                script.push(format!("ip neigh replace {address} lladdr {mac} dev {dev} nud permanent\n"));
            }
        }
        script.push(format!("ip -6 route add {VPC} dev tovpc; ip -6 route add {INTERNET} dev out\n"));
        let guard = "nft add table ip6 check; nft add chain ip6 check pre '{ type filter hook prerouting priority -300; }'\n\
                   nft add rule ip6 check pre ip6 saddr != fe80::/10 fib saddr . iif oif missing drop\n";
        shell(&router, &(script.concat() + guard));
        for (netns, address) in [(&vpc, VPC), (&internet, INTERNET), (&node, NODE)] {
            let mac = if address == NODE { format!("ip link set eth0 address {PRIMARY}\n") } else { String::new() };
            shell(
                netns,
                &format!(
                    "{mac}ip link set eth0 up; ip addr add {address}/128 dev eth0 nodad\n\
                     ip -6 route add default via fe80:ec2::1 dev eth0\n"
                ),
            );
        }
        shell(&node, &format!("ip link set eth1 address {SECOND}\n"));
        World { node, _router: router, vpc, internet, pod1: Netns::new("pod1"), pod2: Netns::new("pod2") }
    }

    pub fn wire_pods(&self) {
        for (name, address, table, netns) in [("one", POD1, 254, &self.pod1), ("two", POD2, 2, &self.pod2)] {
            add(&self.node, &pod_of(name, &[(address, table)]), netns).unwrap();
        }
    }

    fn place(&self, address: &str) -> &Netns {
        match address {
            NODE => &self.node,
            POD1 => &self.pod1,
            POD2 => &self.pod2,
            VPC => &self.vpc,
            INTERNET => &self.internet,
            other => panic!("nobody has {other}"),
        }
    }
}

fn shell(netns: &Netns, script: &str) {
    // The tool itself, where the shell has a smaller one built in.
    let ip = find_program("ip").unwrap();
    let script = format!("ip() {{ {} \"$@\"; }}\n{script}", ip.display());
    netns.run(|| tool_with_input("sh", &["-e"], &script));
}

pub fn intent() -> Intent {
    let pod = |address: &str, table| HostPod { address: ip(address), table, name: String::new(), veth: String::new() };
    Intent {
        v6: true,
        node_ip: ip(NODE),
        primary_mac: PRIMARY,
        eni_mtu: 1500,
        vpc_cidrs: vec![net("2001:db8:11::/48")],
        enis: vec![HostEni {
            id: "eni-2".into(),
            mac: SECOND,
            card: 0,
            device: 1,
            own: net(&format!("{ENI}/64")),
            gateway: ip("fe80:ec2::1"),
            table: 2,
            trunk: false,
        }],
        pods: vec![pod(POD1, TABLE_MAIN), pod(POD2, 2)],
        ..Intent::default()
    }
}

fn ends(row: usize) -> (Option<Service>, SocketAddr, SocketAddr) {
    let (_, way, server, _) = ROWS[row];
    let port = |base: u16| base + u16::try_from(row).unwrap();
    let endpoint = SocketAddr::new(ip(server), port(8000));
    let service = |kind, at: &str, base| {
        let at = SocketAddr::new(ip(at), port(base));
        (Some(Service { kind, at, endpoint }), at, endpoint)
    };
    match way {
        Direct => (None, endpoint, endpoint),
        Cluster => service(Kind::ClusterIp, CLUSTER, 9000),
        Local => service(Kind::NodePortLocal, NODE, 30000),
        Masqueraded => service(Kind::NodePortCluster, NODE, 30000),
    }
}

/// IPVS routes answers by the address that they leave from, so that node ports need no mark.
fn beside(backend: Backend, way: Way, wanted: Seen) -> Seen {
    match (backend, way, wanted) {
        (Backend::Ipvs, Local, Nothing) => Own,
        (Backend::Ipvs, Masqueraded, Nothing) => Node,
        _ => wanted,
    }
}

fn differences(world: &World, backend: Backend) -> Vec<String> {
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for (number, (client, way, server, wanted)) in ROWS.iter().enumerate() {
            let (_, target, listen) = ends(number);
            let wanted = beside(backend, *way, *wanted);
            for proto in BOTH {
                let flow = Flow { client: world.place(client), target, server: world.place(server), listen };
                running.push(scope.spawn(move || {
                    let limit = if matches!(wanted, Nothing) { IMPATIENCE } else { PATIENCE };
                    let seen: Result<IpAddr, String> = flow.run(proto, limit);
                    let right = match (wanted, &seen) {
                        (Own, Ok(source)) => *source == ip(client),
                        (Node, Ok(source)) => [ip(NODE), ip(ENI)].contains(source),
                        (Nothing, seen) => seen.is_err(),
                        _ => false,
                    };
                    (!right).then(|| format!("{proto:?} {client} {way:?} {server}: {seen:?} instead of {wanted:?}"))
                }));
            }
        }
        running.into_iter().filter_map(|flow| flow.join().unwrap()).collect()
    })
}

fn matrix(backend: Backend, proxy_first: bool) {
    if !proxy::here(backend) {
        return;
    }
    let world = World::new();
    let mut host = world.node.run(Host::open).unwrap();
    let services: Vec<Service> = (0..ROWS.len()).filter_map(|row| ends(row).0).collect();
    if proxy_first {
        proxy::start(backend, &world.node, &services);
    }
    well(&host.host(&intent()).unwrap());
    if !proxy_first {
        proxy::start(backend, &world.node, &services);
    }
    world.wire_pods();
    let wrong = differences(&world, backend);
    assert!(wrong.is_empty(), "beside {backend:?}, first: {proxy_first}:\n  {}", wrong.join("\n  "));
    let steps = host.host(&intent()).unwrap().steps;
    assert!(steps.is_empty(), "beside {backend:?}: {steps:?}");
}

#[test]
fn in_ipv6_beside_kube_proxy_in_iptables_nft() {
    matrix(Backend::IptablesNft, true);
    matrix(Backend::IptablesNft, false);
}

#[test]
fn in_ipv6_beside_kube_proxy_in_iptables_legacy() {
    matrix(Backend::IptablesLegacy, true);
    matrix(Backend::IptablesLegacy, false);
}

#[test]
fn in_ipv6_beside_kube_proxy_in_nftables() {
    matrix(Backend::Nftables, true);
    matrix(Backend::Nftables, false);
}

#[test]
fn in_ipv6_beside_kube_proxy_in_ipvs() {
    matrix(Backend::Ipvs, true);
    matrix(Backend::Ipvs, false);
}
