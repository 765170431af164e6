//! Links, addresses, routes, rules and neighbours as values, printed in the syntax of `ip`. The planner makes them, the
//! netlink modules encode and decode them; neither knows the other.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// Route table `main`.
pub const TABLE_MAIN: u32 = 254;
/// Route table `local`.
pub const TABLE_LOCAL: u32 = 255;

/// A 48-bit hardware address, printed in lower case with colons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The IPv6 address that a link with this MAC gives itself (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let mut address = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0, 0, 0];
        address[8..11].copy_from_slice(&self.0[..3]);
        address[13..].copy_from_slice(&self.0[3..]);
        address[8] ^= 2;
        address.into()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&pairs.join(":"))
    }
}

/// A text that is no MAC address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadMac(pub String);

impl fmt::Display for BadMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a MAC address", self.0)
    }
}

impl std::error::Error for BadMac {}

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
                .ok_or_else(|| BadMac(text.to_owned()))?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| BadMac(text.to_owned()))?;
        }
        if parts.next().is_some() { Err(BadMac(text.to_owned())) } else { Ok(Mac(bytes)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = BadMac;

    fn try_from(text: String) -> Result<Self, BadMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// AF_INET.
    V4,
    /// AF_INET6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(addr: IpAddr) -> Family {
        if addr.is_ipv4() { Family::V4 } else { Family::V6 }
    }
}

/// A link as the kernel reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index in its namespace.
    pub index: u32,
    /// Name, at most 15 bytes.
    pub name: String,
    /// Hardware address, if it has one of six bytes.
    pub mac: Option<Mac>,
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// IFF_UP.
    pub up: bool,
    /// IFLA_LINK: the link below (vlan, macvlan) or the veth peer's index.
    pub parent: Option<u32>,
    /// IFLA_INFO_KIND: `veth`, `vlan`, `dummy`, … ; absent for physical links.
    pub kind: Option<String>,
    /// IFLA_MASTER: the bridge or bond it belongs to.
    pub master: Option<u32>,
    /// IFLA_IFALIAS: a text for people and programs, empty if there is none.
    pub alias: String,
    /// `net/ipv4/conf/<name>/forwarding`, if the kernel tells: whether IPv4 packets that come in here may go on.
    pub forwards: Option<bool>,
    /// What it does with IPv6, if the kernel tells.
    pub conf6: Option<Conf6>,
    /// IFLA_TXQLEN: packets that wait for a queueing discipline that names no number. 0 on what the original has made.
    pub queue: u32,
    /// It is up, and what it is plugged into is not there (IFF_UP without IFF_LOWER_UP).
    pub no_carrier: bool,
    /// IFF_NOARP: the kernel asks nobody on it for a MAC and answers nobody.
    pub no_arp: bool,
}

impl Link {
    /// Whether it is up and finds its neighbours.
    pub fn works(&self) -> bool {
        self.up && !self.no_arp
    }

    /// Why it does not, and what `ip link set` is to be told.
    pub fn fault(&self) -> (&'static str, &'static str) {
        if self.up { ("has arp off", "arp on") } else { ("is down", "up") }
    }
}

/// Settings below `net/ipv6/conf/<name>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conf6 {
    /// `forwarding`.
    pub forwarding: u32,
    /// `accept_ra`.
    pub accept_ra: u32,
    /// `accept_redirects`.
    pub accept_redirects: u32,
}

/// An address on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Index of the link.
    pub dev: u32,
    /// Address with the length of its prefix (the host bits are kept).
    pub addr: IpNet,
    /// IFA_F_NOPREFIXROUTE: no connected route in main.
    pub no_prefix_route: bool,
    /// IFA_F_NODAD: usable at once, no duplicate address detection (IPv6).
    pub no_dad: bool,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev if{}", self.addr, self.dev)?;
        if self.no_prefix_route {
            f.write_str(" noprefixroute")?;
        }
        if self.no_dad {
            f.write_str(" nodad")?;
        }
        Ok(())
    }
}

/// How far a route's destination is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// RT_SCOPE_UNIVERSE (0).
    Universe,
    /// RT_SCOPE_LINK (253).
    Link,
    /// RT_SCOPE_HOST (254).
    Host,
}

/// A unicast route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Table number, any 32 bits.
    pub table: u32,
    /// Destination; prefix length 0 is the default route.
    pub dst: IpNet,
    /// Next hop, if not on the link.
    pub gateway: Option<IpAddr>,
    /// Index of the outgoing link.
    pub dev: u32,
    /// Scope. The kernel keeps none for IPv6 and reports `Universe`.
    pub scope: Scope,
    /// Preferred source (RTA_PREFSRC).
    pub prefsrc: Option<IpAddr>,
    /// RTA_PRIORITY; 0 when absent.
    pub metric: u32,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&destination(self.dst))?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " dev if{}", self.dev)?;
        if self.table != TABLE_MAIN {
            write!(f, " table {}", self.table)?;
        }
        match self.scope {
            Scope::Universe => {}
            Scope::Link => f.write_str(" scope link")?,
            Scope::Host => f.write_str(" scope host")?,
        }
        if let Some(source) = self.prefsrc {
            write!(f, " src {source}")?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        Ok(())
    }
}

/// A route that lets nothing through: of type `blackhole`, `unreachable`, `prohibit` or `throw`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Barrier {
    /// RTN_BLACKHOLE (6) to RTN_THROW (9) of `linux/rtnetlink.h`.
    pub kind: u8,
    /// Table number, any 32 bits.
    pub table: u32,
    /// Destination.
    pub dst: IpNet,
    /// Index of the link that the kernel has noted with it: for IPv6 that of `lo`, for IPv4 0.
    pub dev: u32,
    /// RTA_PRIORITY; 0 when absent.
    pub metric: u32,
}

impl Barrier {
    /// Whether it stands where this route is to be.
    pub fn in_place_of(&self, route: &Route) -> bool {
        (self.table, self.dst, self.metric) == (route.table, route.dst, route.metric)
    }

    /// Its type as `ip` has it.
    pub fn word(&self) -> &'static str {
        match self.kind {
            6 => "blackhole",
            7 => "unreachable",
            8 => "prohibit",
            _ => "throw",
        }
    }
}

impl fmt::Display for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.word(), destination(self.dst))?;
        if self.table != TABLE_MAIN {
            write!(f, " table {}", self.table)?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        Ok(())
    }
}

/// A routing rule with the action "look up a table".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Family of the rule.
    pub family: Family,
    /// Priority; lower ones are asked first.
    pub priority: u32,
    /// Source selector.
    pub src: Option<IpNet>,
    /// Destination selector.
    pub dst: Option<IpNet>,
    /// Mark and mask.
    pub fwmark: Option<(u32, u32)>,
    /// Incoming interface by name.
    pub iif: Option<String>,
    /// IP protocol.
    pub ipproto: Option<u8>,
    /// Table to look up. In a delete, 0 stands for any.
    pub table: u32,
    /// Something is there that this type does not model (tos, oif, suppressors, port or uid ranges, invert, another
    /// action): such a rule is never ours.
    pub foreign: bool,
}

impl Rule {
    /// A rule of `family` that matches everything.
    pub fn any(family: Family, priority: u32, table: u32) -> Rule {
        Rule { family, priority, src: None, dst: None, fwmark: None, iif: None, ipproto: None, table, foreign: false }
    }

    /// `from <source> lookup <table>`. The kernel knows no source of length 0: that is a rule for all.
    pub fn from(source: IpNet, priority: u32, table: u32) -> Rule {
        Rule { src: part(source), ..Rule::any(Family::of(source.addr()), priority, table) }
    }

    /// `from all to <destination> lookup <table>`; of length 0 as [`Rule::from`].
    pub fn to(destination: IpNet, priority: u32, table: u32) -> Rule {
        Rule { dst: part(destination), ..Rule::any(Family::of(destination.addr()), priority, table) }
    }

    /// Whether a delete that names this rule would take `there`: absent selectors and table 0 are wildcards, and so is all that
    /// this type cannot say (`rule_find` in net/core/fib_rules.c). An explicit address of length 0 is a wildcard as well. Of several
    /// the kernel takes the first.
    pub fn deletes(&self, there: &Rule) -> bool {
        let net = |asked: Option<IpNet>, there: Option<IpNet>| asked.is_none_or(|net| there == Some(net.trunc()));
        let number = |asked: u32, there: u32| asked == 0 || asked == there;
        let bits = |fwmark: Option<(u32, u32)>| fwmark.unwrap_or((0, 0));
        let (asked, found) = (bits(self.fwmark), bits(there.fwmark));
        self.family == there.family
            && self.priority == there.priority
            && number(self.table, there.table)
            && net(self.src, there.src)
            && net(self.dst, there.dst)
            && number(asked.0, found.0)
            && number(asked.1, found.1)
            && (self.iif.is_none() || self.iif == there.iif)
            && (self.ipproto.is_none() || self.ipproto == there.ipproto)
    }
}

fn part(net: IpNet) -> Option<IpNet> {
    (net.prefix_len() > 0).then_some(net)
}

fn destination(net: IpNet) -> String {
    if net.prefix_len() == 0 { "default".into() } else { host_or_net(net) }
}

fn host_or_net(net: IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: from {}", self.priority, self.src.map_or_else(|| "all".to_owned(), host_or_net))?;
        if let Some(dst) = self.dst {
            write!(f, " to {}", host_or_net(dst))?;
        }
        if let Some((mark, mask)) = self.fwmark {
            write!(f, " fwmark {mark:#x}/{mask:#x}")?;
        }
        if let Some(iif) = &self.iif {
            write!(f, " iif {iif}")?;
        }
        if let Some(proto) = self.ipproto {
            write!(f, " ipproto {proto}")?;
        }
        match self.table {
            TABLE_MAIN => f.write_str(" lookup main"),
            TABLE_LOCAL => f.write_str(" lookup local"),
            253 => f.write_str(" lookup default"),
            table => write!(f, " lookup {table}"),
        }
    }
}

/// A static neighbour entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Neighbour {
    /// Index of the link.
    pub dev: u32,
    /// Address of the neighbour.
    pub addr: IpAddr,
    /// Its hardware address; absent while the kernel is still asking.
    pub mac: Option<Mac>,
    /// NUD_PERMANENT.
    pub permanent: bool,
    /// NUD_NOARP: the kernel asks nobody, as with a permanent one.
    pub noarp: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_parse_and_print() {
        assert_eq!("02:EF:2a:98:e5:5a".parse::<Mac>().unwrap().to_string(), "02:ef:2a:98:e5:5a");
        for bad in ["", "02:ef", "02:ef:2a:98:e5:5a:00", "2:ef:2a:98:e5:5a", "zz:ef:2a:98:e5:5a", "+2:ef:2a:98:e5:5a"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn text_is_that_of_ip() {
        let pod: IpNet = "10.20.12.60/32".parse().unwrap();
        assert_eq!(Rule::to(pod, 512, TABLE_MAIN).to_string(), "512: from all to 10.20.12.60 lookup main");
        assert_eq!(Rule::from(pod, 1536, 2).to_string(), "1536: from 10.20.12.60 lookup 2");
        let marked = Rule { fwmark: Some((0x80, 0x80)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) };
        assert_eq!(marked.to_string(), "1024: from all fwmark 0x80/0x80 lookup main");
        let route = Route {
            table: 2,
            dst: "0.0.0.0/0".parse().unwrap(),
            gateway: Some("10.20.12.1".parse().unwrap()),
            dev: 3,
            scope: Scope::Universe,
            prefsrc: None,
            metric: 0,
        };
        assert_eq!(route.to_string(), "default via 10.20.12.1 dev if3 table 2");
    }
}
