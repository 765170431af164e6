//! A node is taken over from the original while connections are open, and given back.

use crate::matrix::{differences, services};
use crate::proxy::{self, Backend};
use crate::support::{Netns, tool, tool_with_input};
use crate::talk::Connection;
use crate::upstream::{Version, install, saved};
use crate::world::*;
use enibox::apply::Host;
use enibox::model::net::Family;
use enibox::netlink::{Socket, nft, nft_outline, xtables};
use enibox::plan::former;
use std::net::SocketAddr;

/// Only the services of the first column are there.
const COLUMN: usize = 0;

/// A node that the original runs: routing rules, ENIs and pods are the same, the packet filter is its own.
fn before(version: Version, backend: Backend) -> World {
    let world = World::bare();
    proxy::start(backend, &world.node, &services(COLUMN));
    world.node.run(|| Host::open()?.host(&intent())).map(|report| well(&report)).unwrap();
    forget_our_tables(&world.node);
    world.wire_pods();
    install(version, &world.node);
    world
}

fn forget_our_tables(node: &Netns) {
    let mut socket = node.run(Socket::netfilter).unwrap();
    for family in [Family::V4, Family::V6] {
        nft::delete(&mut socket, family, "aws-cni").unwrap();
    }
}

/// Connections of the kinds that depend on translations and marks.
pub fn connections(world: &World) -> Vec<Connection> {
    let at = |address: &str, port| SocketAddr::new(ip(address), port);
    let mut open = vec![
        Connection::open(&world.pod1, at(INTERNET, 7001), &world.internet, at(INTERNET, 7001)),
        Connection::open(&world.pod2, at(INTERNET, 7002), &world.internet, at(INTERNET, 7002)),
        Connection::open(&world.pod2, at(VPC, 7003), &world.vpc, at(VPC, 7003)),
    ];
    // A node port, to a pod of the second ENI, of one that keeps the client's address and one that does not.
    let services = services(COLUMN);
    let to_pod2 = services.iter().filter(|one| one.endpoint.ip() == ip(POD2) && one.at.ip() == ip(NODE_IP));
    open.extend(to_pod2.map(|one| Connection::open(&world.internet, one.at, &world.pod2, one.endpoint)));
    assert_eq!(open.len(), 6);
    open
}

fn taken_over(version: Version, backend: Backend) {
    if !proxy::here(backend) {
        return;
    }
    let alone = Netns::new("alone");
    proxy::start(backend, &alone, &services(COLUMN));
    let world = before(version, backend);
    let open = connections(&world);
    let mut host = world.node.run(Host::open).unwrap();
    well(&host.host(&intent()).unwrap());
    open.iter().for_each(Connection::talk);
    let removed = host.take_over().unwrap();
    open.iter().for_each(Connection::talk);
    let tables = if version == Version::IptablesLegacy { 0 } else { 2 };
    assert_eq!(removed.len(), tables, "{removed:?}");
    assert_eq!(host.take_over().unwrap(), Vec::<String>::new(), "nothing is left");
    assert!(host.host(&intent()).unwrap().steps.is_empty());
    for program in ["iptables-nft-save", "iptables-legacy-save"] {
        let legacy = version == Version::IptablesLegacy && program == "iptables-legacy-save";
        if legacy {
            continue;
        }
        let (now, wanted) = (saved(&world.node, program), saved(&alone, program));
        // The tool makes base chains, which stay, as it goes.
        let base = [":PREROUTING", ":INPUT", ":FORWARD", ":OUTPUT", ":POSTROUTING", "*", "COMMIT"];
        let of_somebody = |line: &&str| !base.iter().any(|start| line.starts_with(start));
        let rules = |text: &str| text.lines().filter(of_somebody).collect::<Vec<_>>().join("\n");
        assert_eq!(rules(&now), rules(&wanted), "{program}");
        assert!(!now.contains("AWS"), "{now}");
    }
    world.node.run(|| tool("iptables-nft", &["-t", "nat", "-S"]));
    let kube_proxy = |netns: &Netns| netns.run(|| tool("nft", &["list", "table", "ip", "kube-proxy"]));
    if backend == Backend::Nftables {
        assert_eq!(kube_proxy(&world.node), kube_proxy(&alone));
    }
    drop(open); // its ports are those of the matrix
    let wrong = differences(&world, COLUMN);
    assert!(wrong.is_empty(), "after {version:?} beside {backend:?}:\n  {}", wrong.join("\n  "));
}

#[test]
fn from_iptables_nft_beside_the_same() {
    taken_over(Version::IptablesNft, Backend::IptablesNft);
}

#[test]
fn from_iptables_nft_beside_nftables() {
    taken_over(Version::IptablesNft, Backend::Nftables);
}

#[test]
fn from_a_connmark_in_nf_tables() {
    taken_over(Version::Connmark, Backend::IptablesNft);
}

#[test]
fn from_nested_chains_of_old_versions() {
    taken_over(Version::Nested, Backend::IptablesNft);
}

#[test]
fn from_iptables_legacy_which_is_left_to_the_operator() {
    let (version, backend) = (Version::IptablesLegacy, Backend::IptablesLegacy);
    if !proxy::here(backend) {
        return;
    }
    taken_over(version, backend);
    let world = World::bare();
    proxy::start(backend, &world.node, &[]);
    let kube_proxy = saved(&world.node, "iptables-legacy-save");
    let host = world.node.run(Host::open).unwrap();
    assert_eq!(host.legacy_chains().unwrap(), Vec::<String>::new(), "only those of kube-proxy");
    for (version, count) in [(version, 1), (Version::NestedLegacy, 3)] {
        install(version, &world.node);
        let chains = host.legacy_chains().unwrap();
        let names = ["AWS-CONNMARK-CHAIN-", "AWS-SNAT-CHAIN-"];
        let names = names.iter().flat_map(|name| (0..count).map(move |number| format!("{name}{number}")));
        assert_eq!(chains, names.collect::<Vec<_>>());
        let commands = former::legacy_commands("eni", 0x80, "eth0", &chains);
        world.node.run(|| tool_with_input("sh", &["-e"], &commands.join("\n")));
        assert_eq!(saved(&world.node, "iptables-legacy-save"), kube_proxy, "the commands take everything away");
        assert_eq!(host.legacy_chains().unwrap(), Vec::<String>::new());
    }
}

#[test]
fn tables_of_iptables_legacy_are_not_made_by_looking() {
    let netns = Netns::new("bare");
    let opened = || netns.run(|| std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default());
    let before = opened();
    assert_eq!(netns.run(|| xtables::chains(Family::V4, "nat")).unwrap(), Vec::<String>::new());
    assert_eq!(opened(), before);
}

#[test]
fn pods_of_the_original_that_have_an_egress_address_keep_their_way_out_until_ours_is_there() {
    use enibox::plan::host::{Egress, Intent};
    let world = World::bare();
    let chain = "CNI-E6-5740307710ebfd5fb24f5";
    let comment = "-m comment --comment 'name: \"aws-cni\" id: \"containerId-123\"'";
    let script = format!(
        "ip6tables-nft -t nat -N {chain}\n\
         ip6tables-nft -t nat -A {chain} -d ff00::/8 {comment} -j ACCEPT\n\
         ip6tables-nft -t nat -A {chain} {comment} -j SNAT --to-source 2001:db8::5 --random-fully\n\
         ip6tables-nft -t nat -A POSTROUTING -s fd00::ac:5 {comment} -j {chain}\n\
         ip6tables-nft -I FORWARD 1 -d fd00::ac:0/118 -m conntrack --ctstate NEW \
         -m comment --comment \"Block Node Local Pod access via IPv6\" -j REJECT\n"
    );
    world.node.run(|| tool_with_input("sh", &["-e"], &script));
    let mut host = world.node.run(Host::open).unwrap();
    well(&host.host(&Intent { egress: Egress::Guard, ..intent() }).unwrap());
    assert_eq!(host.take_over().unwrap(), ["table ip6 filter: chains none; 1 rules of chains FORWARD"]);
    assert!(saved(&world.node, "ip6tables-nft-save").contains(chain));
    let mut host = world.node.run(Host::open).unwrap();
    well(&host.host(&Intent { egress: Egress::Snat(ip("2001:db8::5")), ..intent() }).unwrap());
    assert_eq!(host.take_over().unwrap(), [format!("table ip6 nat: chains {chain}; 1 rules of chains POSTROUTING")]);
    assert!(!saved(&world.node, "ip6tables-nft-save").contains("CNI-E6"));
}

#[test]
fn what_changed_since_the_look_is_not_removed() {
    let world = World::bare();
    install(Version::IptablesNft, &world.node);
    let installed = saved(&world.node, "iptables-nft-save");
    let mut socket = world.node.run(Socket::netfilter).unwrap();
    let (generation, found) = nft_outline::outlines(&mut socket, &former::TABLES).unwrap();
    let removals = former::leftovers(&found, &[]);
    world.node.run(|| tool("iptables-nft", &["-A", "FORWARD", "-j", "ACCEPT"]));
    let error = nft_outline::remove(&mut socket, &removals, generation).unwrap_err().to_string();
    assert!(error.starts_with("commit the removal: "), "{error}");
    let changed = saved(&world.node, "iptables-nft-save");
    assert!(changed.len() > installed.len());
    assert!(installed.lines().all(|line| changed.contains(line)));
}

/// The single flow in which we differ from the original: its mark comes too late for a service's endpoint outside.
#[test]
fn the_original_drops_what_we_deliver() {
    let world = before(Version::IptablesNft, Backend::IptablesNft);
    let wrong = differences(&world, COLUMN);
    assert_eq!(wrong.len(), 2, "{wrong:#?}");
    for line in &wrong {
        assert!(
            line.contains("10.20.12.60 Cluster 203.0.113.10") && line.contains("instead of 10.20.11.162"),
            "{line}"
        );
    }
}
