//! The topology of the flow matrix: a node with two ENIs and a branch ENI, a router that checks sources as EC2 does, hosts
//! far and near, three pods. One namespace each; our part of the node is made by the product's own code.

use crate::support::pods::{add, pod_of};
use crate::support::{Netns, must};
use enibox::apply::{Host, HostReport};
use enibox::model::net::{Address, Family, Link, Mac, Neighbour, Route, Rule, Scope, TABLE_LOCAL, TABLE_MAIN};
use enibox::netlink::{addr, link, neigh, route, rule, sysctl};
use enibox::plan::host::{HostEni, HostPod, Intent};
use ipnet::IpNet;
use std::net::IpAddr;
use std::os::fd::AsFd;

pub const NODE_IP: &str = "10.20.11.162";
pub const ENI_IP: &str = "10.20.12.5";
pub const POD1: &str = "10.20.11.50";
pub const POD2: &str = "10.20.12.60";
pub const POD3: &str = "10.20.13.70";
pub const INTERNET: &str = "203.0.113.10";
/// Also the internet; the node's way to it names the address of the second ENI as the source.
pub const INTERNET_FROM_ENI: &str = "203.0.113.99";
pub const PEERED: &str = "198.18.7.7";
pub const VPC: &str = "10.20.30.10";
pub const SECOND_CIDR: &str = "100.64.9.9";
pub const EXCLUDED: &str = "172.16.5.5";
/// An address of the node's that is in no CIDR of the VPC, like that of a cache for DNS.
pub const NODE_LOCAL: &str = "192.168.77.1";
pub const PRIMARY: Mac = Mac([2, 0, 0, 0, 11, 162]);
pub const SECOND: Mac = Mac([2, 0, 0, 0, 12, 5]);

const BRANCH_TABLE: u32 = 101;
const GATEWAYS: [&str; 4] = ["10.20.11.1", "10.20.12.1", "10.20.13.1", "192.0.2.1"];

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub fn address(dev: u32, text: &str) -> Address {
    Address { dev, addr: net(text), no_prefix_route: false, no_dad: false }
}

fn direct(table: u32, dst: &str, dev: u32) -> Route {
    Route { table, dst: net(dst), gateway: None, dev, scope: Scope::Link, prefsrc: None, metric: 0 }
}

pub fn via(table: u32, dst: &str, gateway: &str, dev: u32) -> Route {
    Route { gateway: Some(ip(gateway)), scope: Scope::Universe, ..direct(table, dst, dev) }
}

fn neighbour(dev: u32, addr: &str, mac: Mac) -> Neighbour {
    Neighbour { dev, addr: ip(addr), mac: Some(mac), permanent: true, noarp: false }
}

/// A veth between two namespaces, both ends up.
fn plug(one: &Netns, name: &str, mac: Option<Mac>, other: &Netns, peer: &str) -> (Link, Link) {
    let end = |name, mac, netns| link::End { name, mac, netns };
    let peer_end = end(peer, None, Some(other.handle().as_fd()));
    let veth = link::Veth { end: end(name, mac, None), peer: peer_end, mtu: 1500, up: false };
    let (mut near, mut far) = (one.route(), other.route());
    must(&mut near, &[link::create_veth(&veth)]);
    let one = link::by_name(&mut near, name).unwrap().unwrap();
    let other = link::by_name(&mut far, peer).unwrap().unwrap();
    must(&mut far, &[link::set_up(other.index)]);
    must(&mut near, &[link::set_up(one.index)]);
    (one, other)
}

pub struct World {
    pub node: Netns,
    pub router: Netns,
    pub internet: Netns,
    pub peered: Netns,
    pub vpc: Netns,
    pub second: Netns,
    pub excluded: Netns,
    pub pod1: Netns,
    pub pod2: Netns,
    pub pod3: Netns,
}

impl World {
    /// Everything but our rules and the pods' wiring.
    pub fn bare() -> World {
        let [node, router, internet, peered, vpc] = ["node", "router", "internet", "peered", "vpc"].map(Netns::new);
        let [second, excluded, pod1, pod2, pod3] = ["second", "excluded", "pod1", "pod2", "pod3"].map(Netns::new);
        let world = World { node, router, internet, peered, vpc, second, excluded, pod1, pod2, pod3 };
        let set = |netns: &Netns, values: &[(&str, &str)]| {
            for (path, value) in values {
                netns.run(|| sysctl::set(path, value)).unwrap();
            }
        };
        let forward = ("net/ipv4/ip_forward", "1");
        set(&world.router, &[forward, ("net/ipv4/conf/all/rp_filter", "1"), ("net/ipv4/conf/all/send_redirects", "0")]);
        // As systemd sets it on every distribution that EKS has images for.
        let loose = ("net/ipv4/conf/default/rp_filter", "2");
        set(&world.node, &[forward, ("net/ipv4/conf/all/rp_filter", "0"), loose]);
        let mut router = world.router.route();
        let lo = link::by_name(&mut router, "lo").unwrap().unwrap().index;
        let gateways = GATEWAYS.map(|gateway| addr::add(&address(lo, &format!("{gateway}/32"))));
        must(&mut router, &gateways);
        world.plug_enis();
        let remotes: [(&Netns, &[&str]); 5] = [
            (&world.internet, &[INTERNET, INTERNET_FROM_ENI]),
            (&world.peered, &[PEERED]),
            (&world.vpc, &[VPC]),
            (&world.second, &[SECOND_CIDR]),
            (&world.excluded, &[EXCLUDED]),
        ];
        for (number, (remote, addresses)) in remotes.into_iter().enumerate() {
            world.plug_remote(number, remote, addresses);
        }
        world
    }

    /// Everything for an intent, with pods whose host veths have this prefix.
    pub fn new(intent: &Intent, prefix: &str) -> World {
        let world = World::bare();
        well(&world.node.run(|| Host::open()?.host(intent)).unwrap());
        world.wire_pods_with(prefix);
        world
    }

    // The node as an instance has it before the daemon starts: the primary ENI configured, the second one bare.
    fn plug_enis(&self) {
        let (eth0, near) = plug(&self.node, "eth0", Some(PRIMARY), &self.router, "near");
        let (eth1, far) = plug(&self.node, "eth1", Some(SECOND), &self.router, "far");
        let (branch, trunk) = plug(&self.node, "vlan.eth.1", None, &self.router, "trunk");
        let (local, _) = plug(&self.node, "local0", None, &self.node, "local1");
        let mut node = self.node.route();
        must(
            &mut node,
            &[
                addr::add(&address(eth0.index, "10.20.11.162/24")),
                route::add(&via(TABLE_MAIN, "0.0.0.0/0", "10.20.11.1", eth0.index)),
                addr::add(&address(local.index, &format!("{NODE_LOCAL}/32"))),
                link::set_down(eth1.index),
                // A branch ENI's link has no address to ask with, and EC2 would answer all the same.
                neigh::replace(&neighbour(branch.index, "10.20.13.1", trunk.mac.unwrap())),
            ],
        );
        let mut requests = Vec::new();
        // As in a VPC, frames go to the ENI that has the address, without asking who answers for it.
        for (link, mac, addresses) in [
            (&near, PRIMARY, [NODE_IP, POD1].as_slice()),
            (&far, SECOND, &[ENI_IP, POD2]),
            (&trunk, branch.mac.unwrap(), &[POD3]),
        ] {
            for address in addresses {
                requests.push(route::add(&direct(TABLE_MAIN, &format!("{address}/32"), link.index)));
                requests.push(neigh::replace(&neighbour(link.index, address, mac)));
            }
        }
        must(&mut self.router.route(), &requests);
    }

    fn plug_remote(&self, number: usize, remote: &Netns, addresses: &[&str]) {
        let (inside, outside) = plug(remote, "eth0", None, &self.router, &format!("remote{number}"));
        let (mut requests, mut routes) = (Vec::new(), Vec::new());
        for one in addresses {
            requests.push(addr::add(&address(inside.index, &format!("{one}/32"))));
            routes.push(route::add(&direct(TABLE_MAIN, &format!("{one}/32"), outside.index)));
        }
        let gateway = "192.0.2.1";
        requests.push(route::add(&direct(TABLE_MAIN, &format!("{gateway}/32"), inside.index)));
        requests.push(route::add(&via(TABLE_MAIN, "0.0.0.0/0", gateway, inside.index)));
        must(&mut remote.route(), &requests);
        must(&mut self.router.route(), &routes);
    }

    /// Adds the three pods, the third as one on a branch ENI in strict mode, and the node's route from its second ENI.
    /// The node's rules must be there.
    pub fn wire_pods(&self) {
        self.wire_pods_with("eni");
    }

    fn wire_pods_with(&self, prefix: &str) {
        for (name, address, table, netns) in [("one", POD1, 254, &self.pod1), ("two", POD2, 2, &self.pod2)] {
            let mut pod = pod_of(name, &[(address, table)]);
            pod.interfaces[0].host_veth = pod.interfaces[0].host_veth.replacen("eni", prefix, 1);
            add(&self.node, &pod, netns).unwrap();
        }
        self.wire_branch_pod();
        let mut node = self.node.route();
        let eth0 = link::by_name(&mut node, "eth0").unwrap().unwrap().index;
        let bound = Route {
            prefsrc: Some(ip(ENI_IP)),
            ..via(TABLE_MAIN, &format!("{INTERNET_FROM_ENI}/32"), "10.20.11.1", eth0)
        };
        must(&mut node, &[route::add(&bound)]);
    }

    // What `spec/dataplane.md` 9.3 wants of a strict pod; this kernel may have no VLAN links, but the name is what counts.
    fn wire_branch_pod(&self) {
        let mut pod = pod_of("three", &[(POD3, 254)]);
        pod.interfaces[0].host_veth = pod.interfaces[0].host_veth.replacen("eni", "vlan", 1);
        add(&self.node, &pod, &self.pod3).unwrap();
        let veth = &pod.interfaces[0].host_veth;
        let mut node = self.node.route();
        let (outer, branch) =
            (link::by_name(&mut node, veth).unwrap(), link::by_name(&mut node, "vlan.eth.1").unwrap());
        let (outer, branch) = (outer.unwrap().index, branch.unwrap().index);
        let to = format!("{POD3}/32");
        let from = |name: &str| Rule { iif: Some(name.into()), ..Rule::any(Family::V4, 10, BRANCH_TABLE) };
        must(
            &mut node,
            &[
                route::delete(&direct(TABLE_MAIN, &to, outer)),
                rule::delete(&Rule::to(net(&to), 512, TABLE_MAIN)),
                route::add(&direct(BRANCH_TABLE, "10.20.13.1/32", branch)),
                route::add(&via(BRANCH_TABLE, "0.0.0.0/0", "10.20.13.1", branch)),
                route::add(&direct(BRANCH_TABLE, &to, outer)),
                rule::add(&from("vlan.eth.1")),
                rule::add(&from(veth)),
                rule::add(&Rule::any(Family::V4, 20, TABLE_LOCAL)),
                rule::delete(&Rule::any(Family::V4, 0, TABLE_LOCAL)),
            ],
        );
    }
}

/// Nothing was refused.
pub fn well(report: &HostReport) {
    assert!(report.errors.is_empty(), "{:?}", report.errors);
    for (eni, result) in &report.enis {
        assert!(result.is_ok(), "{eni}: {result:?}");
    }
}

fn pod(address: &str, table: u32) -> HostPod {
    HostPod { address: ip(address), table, name: String::new(), veth: String::new() }
}

/// The node of the matrix with the defaults of the settings.
pub fn intent() -> Intent {
    Intent {
        node_ip: ip(NODE_IP),
        primary_mac: PRIMARY,
        eni_mtu: 1500,
        vpc_cidrs: vec![net("10.20.0.0/16"), net("100.64.0.0/16")],
        excluded_cidrs: vec![net("172.16.0.0/12")],
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
        pods: vec![pod(POD1, TABLE_MAIN), pod(POD2, 2)],
        ..Intent::default()
    }
}
