//! A pod's way out in the other family, as a value (`spec/egress.md` 2 to 6): a second veth with an address that only the
//! node knows. What translates it are rules that the daemon keeps for all pods (`ruleset`); none is made here.
//!
//! Other than the original's, nothing waits for duplicate detection: the pod's gateway is an address that every host end is
//! given, and both ends know each other's MAC from the start.

use super::pod::{host_mac, link_route};
use super::ruleset::{EGRESS_V4, EGRESS_V6};
use crate::error::{Error, Result};
use crate::model::naming;
use crate::model::net::{Address, Family, Link, Mac, Neighbour, Route, Scope, TABLE_MAIN};
use ipnet::IpNet;
use std::net::{IpAddr, Ipv6Addr};

/// What every pod with an IPv6 egress address sends to.
pub(super) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Beginning of the host ends' names.
const VETH: &str = "veth";

/// Name of the pod's end.
pub fn interface(family: Family) -> &'static str {
    if family == Family::V4 { "v4if0" } else { "v6if0" }
}

/// The chain of the daemon's table that translates.
pub const SNAT_CHAIN: &str = "egress-postrouting";

/// The addresses that the daemon's rules translate and protect.
pub fn range(family: Family) -> IpNet {
    if family == Family::V4 { EGRESS_V4.into() } else { EGRESS_V6.into() }
}

/// Where the shipped configuration has host-local keep its files.
pub fn data_dir(family: Family) -> &'static str {
    if family == Family::V4 { "/run/cni/v6pd/egress-v4-ipam" } else { "/run/cni/v4pd/egress-v6-ipam" }
}

/// The family of the egress on a node that has this address for it; an error when IPv6 cannot leave as it.
pub fn family(node_ip: Option<IpAddr>) -> Result<Family> {
    match node_ip {
        Some(IpAddr::V4(_)) => Ok(Family::V4),
        Some(IpAddr::V6(own))
            if !own.is_loopback() && !own.is_multicast() && !own.is_unspecified() && !own.is_unicast_link_local() =>
        {
            Ok(Family::V6)
        }
        _ => Err(Error::new(
            "global unicast IPv6 not found in host primary interface which is mandatory to support IPv6 egress",
        )),
    }
}

/// Name of the host end; `number` is random.
pub fn host_veth(number: u32) -> String {
    format!("{VETH}{number:08x}")
}

/// Whether a link of this name and kind can be a host end.
pub fn is_host_veth(name: &str, kind: Option<&str>) -> bool {
    let digits = name.strip_prefix(VETH).filter(|digits| digits.len() == 8);
    kind == Some("veth") && digits.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Whether a link is a host end, by its name or, if somebody has renamed it, by what is noted on it.
pub fn is_host_end(link: &Link) -> bool {
    is_host_veth(&link.name, link.kind.as_deref()) || HostEnd::of(link).is_some()
}

/// Whether one of these links is the host end of a pod's way out in this family. A link goes with its pod.
pub fn lives(family: Family, links: &[Link]) -> bool {
    links.iter().filter_map(HostEnd::of).any(|end| Family::of(end.pod) == family)
}

/// The number that [`host_veth`] has made this name of.
pub(super) fn number_of(name: &str) -> Option<u32> {
    let number = u32::from_str_radix(name.strip_prefix(VETH)?, 16).ok()?;
    (host_veth(number) == name).then_some(number)
}

/// Name of the chain that the original made for a container of a network.
pub fn former_chain(family: Family, network: &str, container: &str) -> String {
    use std::fmt::Write as _;
    let digest = ring::digest::digest(&ring::digest::SHA512, format!("{network}{container}").as_bytes());
    let mut name = String::from(if family == Family::V4 { "CNI-E4-" } else { "CNI-E6-" });
    for byte in &digest.as_ref()[..11] {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name.truncate(28);
    name
}

/// The commands that take such a chain out of `iptables-legacy`, whose tables nobody else can change safely.
pub fn legacy_commands(removal: &Removal) -> Vec<String> {
    let tool = if removal.family == Family::V4 { "iptables-legacy" } else { "ip6tables-legacy" };
    let Removal { chain, comment, .. } = removal;
    let jumps = removal.addresses.iter().map(|address| {
        format!("{tool} -t nat -D POSTROUTING -s {address} -m comment --comment '{comment}' -j {chain}")
    });
    jumps.chain([format!("{tool} -t nat -F {chain}"), format!("{tool} -t nat -X {chain}")]).collect()
}

/// What ADD makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Egress {
    /// Family of the address.
    pub family: Family,
    /// The pod's address with the length of its range's prefix.
    pub address: IpNet,
    /// What the pod sends everything to: an address of the host's end.
    pub gateway: IpAddr,
    /// Routes besides those that every pod gets: destination, and next hop if it is not the gateway.
    pub routes: Vec<(IpNet, Option<IpAddr>)>,
    /// MTU of both ends in bytes.
    pub mtu: u32,
    /// Random: [`host_veth`] makes the name of it.
    pub number: u32,
    /// MAC of the host's end.
    pub host_mac: Mac,
    /// MAC of the pod's end.
    pub pod_mac: Mac,
    /// The pod's main interface, which loses IPv6 for an IPv6 address here.
    pub main: String,
}

impl Egress {
    /// For an address that was given with this gateway. `random` decides name and MACs.
    pub fn new(address: IpNet, gateway: Option<IpAddr>, main: &str, mtu: u32, random: [u8; 16]) -> Result<Egress> {
        let family = Family::of(address.addr());
        let covered = range(family);
        if !covered.contains(&address.addr()) {
            return Err(Error::new(format!("address {address} is not in {covered}: nobody would translate it")));
        }
        let gateway = match family {
            Family::V4 => {
                gateway.filter(IpAddr::is_ipv4).ok_or_else(|| Error::new(format!("{address} has no gateway")))?
            }
            Family::V6 => GATEWAY_V6.into(),
        };
        let [a, b, c, d, rest @ ..] = random;
        let mac = |at: usize| host_mac([0, 1, 2, 3, 4, 5].map(|offset| rest[at + offset]));
        let (number, host_mac, pod_mac) = (u32::from_be_bytes([a, b, c, d]), mac(0), mac(6));
        let (routes, main) = (Vec::new(), main.to_owned());
        Ok(Egress { family, address, gateway, routes, mtu, number, host_mac, pod_mac, main })
    }

    /// Host: what its end of this name is to keep.
    pub fn host_end(&self, name: &str) -> HostEnd {
        let number = number_of(name);
        HostEnd { mac: self.host_mac, mtu: self.mtu, pod: self.address.addr(), gateway: self.gateway, number }
    }

    /// Pod: its address. Its neighbours in the range are other pods behind the gateway, so no route comes with it.
    pub fn pod_address(&self, dev: u32) -> Address {
        Address { dev, addr: self.address, no_prefix_route: true, no_dad: self.family == Family::V6 }
    }

    /// Pod: everything goes to the gateway, the range's other addresses too.
    pub fn pod_routes(&self, dev: u32) -> Vec<Route> {
        let on_link = link_route(TABLE_MAIN, self.gateway, dev);
        let through = |dst, gateway: Option<IpAddr>| Route {
            dst,
            gateway: gateway.or(Some(self.gateway)),
            scope: Scope::Universe,
            ..on_link
        };
        let mut routes = match self.family {
            Family::V4 => {
                let prefsrc = Some(self.address.addr());
                let range = through(self.address.trunc(), None);
                vec![Route { prefsrc, ..on_link }, Route { prefsrc, ..range }]
            }
            Family::V6 => vec![through(ipnet::Ipv6Net::default().into(), None)],
        };
        for (dst, gateway) in &self.routes {
            // The gateway of an IPv6 range is nobody's address.
            let route = through(*dst, gateway.filter(|_| self.family == Family::V4));
            if Family::of(dst.addr()) == self.family && !routes.iter().any(|known| known.dst == route.dst) {
                routes.push(route);
            }
        }
        routes
    }

    /// Pod: the gateway's MAC.
    pub fn pod_neighbour(&self, dev: u32) -> Neighbour {
        Neighbour { dev, addr: self.gateway, mac: Some(self.host_mac), permanent: true, noarp: false }
    }
}

/// What the host's end of a pod's veth was made with, and is to keep. It stands in the link's alias: nothing else on the node
/// knows which link belongs to which address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostEnd {
    /// Its MAC, which the pod has as its gateway's.
    pub mac: Mac,
    /// MTU in bytes.
    pub mtu: u32,
    /// The pod's address.
    pub pod: IpAddr,
    /// Its own address.
    pub gateway: IpAddr,
    /// What its name was made of ([`host_veth`]); earlier versions did not note it.
    pub number: Option<u32>,
}

impl HostEnd {
    /// What a link's alias tells, whatever the link is called by now; none if the alias is not that of a host end.
    pub fn of(link: &Link) -> Option<HostEnd> {
        let (mac, mtu, pod, gateway, name) = naming::of_egress_alias(&link.alias)?;
        let ours = link.kind.as_deref() == Some("veth")
            && range(Family::of(pod)).contains(&pod)
            && Family::of(pod) == Family::of(gateway);
        ours.then_some(HostEnd { mac, mtu, pod, gateway, number: name.and_then(number_of) })
    }

    /// The alias that tells it.
    pub fn alias(&self) -> String {
        naming::egress_alias(self.mac, self.mtu, self.pod, self.gateway, self.name().as_deref())
    }

    /// The name that it was made with.
    pub fn name(&self) -> Option<String> {
        self.number.map(host_veth)
    }

    /// The gateway.
    pub fn address(&self, dev: u32) -> Address {
        let v6 = self.gateway.is_ipv6();
        let addr = IpNet::new(self.gateway, if v6 { 64 } else { 32 }).unwrap_or_else(|_| IpNet::from(self.gateway));
        Address { dev, addr, no_prefix_route: false, no_dad: v6 }
    }

    /// The way to the pod, as the kernel reports it.
    pub fn route(&self, dev: u32) -> Route {
        super::branch::link_route(TABLE_MAIN, self.pod, dev)
    }
}

/// What DEL takes away in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    /// The family.
    pub family: Family,
    /// Addresses that the files give to the pod; mostly one or none.
    pub addresses: Vec<IpAddr>,
    /// Name of the chain that the original would have made.
    pub chain: String,
    /// Comment of that chain's rules.
    pub comment: String,
}

impl Removal {
    /// For a container of a network.
    pub fn new(family: Family, network: &str, container: &str, addresses: Vec<IpAddr>) -> Removal {
        let comment = format!("name: {network:?} id: {container:?}");
        Removal { family, addresses, chain: former_chain(family, network, container), comment }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn chains_are_named_as_the_original_names_them() {
        assert_eq!(former_chain(Family::V4, "aws-cni", "containerId-123"), "CNI-E4-5740307710ebfd5fb24f5");
        assert_eq!(former_chain(Family::V6, "aws-cni", "containerId-789"), "CNI-E6-e335b08ae90730d0a659a");
        let removal = Removal::new(Family::V4, "aws-cni", "containerId-123", vec![ip("169.254.172.7")]);
        assert_eq!(
            legacy_commands(&removal),
            [
                "iptables-legacy -t nat -D POSTROUTING -s 169.254.172.7 -m comment --comment 'name: \"aws-cni\" id: \
                 \"containerId-123\"' -j CNI-E4-5740307710ebfd5fb24f5",
                "iptables-legacy -t nat -F CNI-E4-5740307710ebfd5fb24f5",
                "iptables-legacy -t nat -X CNI-E4-5740307710ebfd5fb24f5",
            ]
        );
    }

    #[test]
    fn the_nodes_address_decides_the_family() {
        let check = |text: &str, wanted: Option<Family>| assert_eq!(family(text.parse().ok()).ok(), wanted, "{text}");
        check("10.0.0.5", Some(Family::V4));
        check("2001:db8::5", Some(Family::V6));
        check("fd00::5", Some(Family::V6));
        for bad in ["", "::", "::1", "fe80::1", "ff02::1"] {
            check(bad, None);
        }
    }

    #[test]
    fn host_ends_are_known_by_name() {
        assert_eq!(host_veth(0xa1), "veth000000a1");
        assert_eq!(number_of("veth000000a1"), Some(0xa1));
        for other in ["veth000000A1", "vetha1", "veth+00000a1", "eth000000a1", "veth0000000a1"] {
            assert_eq!(number_of(other), None, "{other}");
        }
        assert!(is_host_veth("veth000000a1", Some("veth")));
        for (name, kind) in
            [("veth000000a1", None), ("veth0", Some("veth")), ("vethzzzzzzzz", Some("veth")), ("eth0", Some("veth"))]
        {
            assert!(!is_host_veth(name, kind), "{name}");
        }
    }

    #[test]
    fn everything_goes_to_the_gateway() {
        let check = |address: &str, gateway: &str, routes: &[&str], wanted: &[&str]| {
            let address: IpNet = address.parse().unwrap();
            let mut egress = Egress::new(address, Some(ip(gateway)), "eth0", 9001, [7; 16]).unwrap();
            egress.routes = routes.iter().map(|route| (route.parse().unwrap(), None)).collect();
            let lines: Vec<_> = egress.pod_routes(3).iter().map(ToString::to_string).collect();
            assert_eq!(lines, wanted);
            egress
        };
        let v4 = check(
            "169.254.172.7/22",
            "169.254.172.1",
            &["0.0.0.0/0", "::/0"],
            &[
                "169.254.172.1 dev if3 scope link src 169.254.172.7",
                "169.254.172.0/22 via 169.254.172.1 dev if3 src 169.254.172.7",
                "default via 169.254.172.1 dev if3",
            ],
        );
        let end = v4.host_end("veth000000a1");
        assert_eq!(end.address(5).to_string(), "169.254.172.1/32 dev if5");
        assert_eq!(end.route(5).to_string(), "169.254.172.7 dev if5 scope link");
        assert_eq!(end.name().as_deref(), Some("veth000000a1"));
        assert_eq!(v4.host_mac.to_string(), "06:07:07:07:07:07");
        let v6 = check("fd00::ac:7/118", "fd00::ac:1", &["::/0"], &["default via fe80::1 dev if3"]);
        assert_eq!(v6.pod_address(3).to_string(), "fd00::ac:7/118 dev if3 noprefixroute nodad");
        assert!(Egress::new("10.1.2.3/22".parse().unwrap(), Some(ip("10.1.2.1")), "eth0", 9001, [0; 16]).is_err());
        assert!(Egress::new("169.254.172.7/22".parse().unwrap(), None, "eth0", 9001, [0; 16]).is_err());
    }
}
