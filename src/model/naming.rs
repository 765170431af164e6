//! Names, marks, tables and priorities that others compute too (`spec/plugin.md` 6, 7; `spec/dataplane.md` 1).
//!
//! Calico, the network policy agent and cached CNI results depend on every value here; none may change. Nothing here
//! looks at the system.

use super::net::{Mac, TABLE_MAIN};
use crate::error::{Error, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Longest interface name, in bytes (IFNAMSIZ without its NUL).
pub const NAME_MAX: usize = 15;
/// Length of [`suffix`], in bytes.
pub const SUFFIX_LEN: usize = 11;
/// Longest prefix of a host veth's name, in bytes: with the eleven digits it fills an interface name.
pub const VETH_PREFIX_MAX: usize = 4;
/// What no prefix of host veths may be: the names of links that are no pod's begin with it, or SNAT passes by it.
pub const VETH_PREFIXES_TAKEN: [&str; 3] = ["eth", "lo", VLAN_PREFIX];
/// Prefix of host veths when none is configured.
pub const DEFAULT_VETH_PREFIX: &str = "eni";
/// Prefix of the host veth of a branch-ENI pod in strict mode, and of VLAN devices; opts out of SNAT.
pub const VLAN_PREFIX: &str = "vlan";
/// The connmark's value and mask when none is configured.
pub const DEFAULT_MARK: u32 = 0x80;
/// Socket of the daemon.
pub const DAEMON_SOCKET: &str = "/var/run/aws-node/ipamd.sock";
/// Written by the daemon when it is told to stop: its successor is about to start.
pub const DAEMON_STOPPED: &str = "/var/run/aws-node/stopped";
/// Socket of the network policy agent.
pub const POLICY_AGENT_SOCKET: &str = "/var/run/aws-node/npa.sock";
/// Our nf_tables table in the families `ip` and `ip6`.
pub const NFT_TABLE: &str = "aws-cni";

/// Priorities of routing rules, the same for both families (`spec/dataplane.md` 1.1).
pub mod priority {
    /// `lookup local` as the kernel makes it.
    pub const LOCAL: u32 = 0;
    /// In a pod: `from <address> lookup <interface number>`.
    pub const INSIDE_POD: u32 = 1;
    /// `iif <vlan or host veth> lookup <100 + vlan>`.
    pub const BRANCH: u32 = 10;
    /// `lookup local` moved behind the branch rules.
    pub const LOCAL_MOVED: u32 = 20;
    /// `to <pod> lookup main`.
    pub const TO_POD: u32 = 512;
    /// `fwmark <mark>/<mark> lookup main`.
    pub const MARK: u32 = 1024;
    /// `to <external service CIDR> lookup main`.
    pub const EXTERNAL_SERVICE: u32 = 1535;
    /// `from <pod> lookup <table of its ENI>`.
    pub const FROM_POD: u32 = 1536;
    /// `from <own address of an ENI> lookup <its table>`.
    pub const FROM_ENI: u32 = 32765;
    /// `lookup main` as the kernel makes it.
    pub const MAIN: u32 = 32766;
}

/// The first eleven hex digits of SHA-1 of `namespace.pod`, or of `namespace.pod.index` for the second interface and on.
pub fn suffix(namespace: &str, pod: &str, index: usize) -> String {
    let text = if index == 0 { format!("{namespace}.{pod}") } else { format!("{namespace}.{pod}.{index}") };
    // By hand: every pod of the node is named whenever the host's network is looked at.
    let bytes = sha1_smol::Sha1::from(text).digest().bytes();
    let digit = |n: usize| char::from(b"0123456789abcdef"[usize::from(bytes[n / 2] >> (4 - n % 2 * 4) & 15)]);
    (0..SUFFIX_LEN).map(digit).collect()
}

/// Name of the host end of a pod's interface; `index` is the position in the daemon's reply. An error when the prefix is
/// longer than [`VETH_PREFIX_MAX`].
pub fn host_veth(prefix: &str, namespace: &str, pod: &str, index: usize) -> Result<String> {
    if prefix.len() > VETH_PREFIX_MAX {
        return Err(Error::new(format!("veth prefix {prefix:?} is longer than {VETH_PREFIX_MAX} characters")));
    }
    Ok(format!("{prefix}{}", suffix(namespace, pod, index)))
}

const NAME: &str = " name ";

/// Alias of a host veth: what it was made with. The pod's neighbour entry for its gateway names this MAC, and nothing else
/// on the host knows it once somebody has changed the link's own. The name tells whose veth it is when it has been renamed.
pub fn veth_alias(mac: Mac, mtu: u32, name: &str) -> String {
    format!("aws-cni mac {mac} mtu {mtu} name {name}")
}

/// MAC and MTU of an alias that [`veth_alias`] has made; earlier versions gave it no name.
pub fn of_veth_alias(alias: &str) -> Option<(Mac, u32)> {
    let (mac, mtu) = alias.strip_prefix("aws-cni mac ")?.split_once(" mtu ")?;
    let mtu = mtu.split_once(NAME).map_or(mtu, |(mtu, _)| mtu);
    Some((mac.parse().ok()?, mtu.parse().ok()?))
}

/// Alias of the host's end of a pod's way out in the other family: what a veth's says, and the addresses of the pod and of the
/// end itself, which nothing else on the node knows together. As a plain veth's it is none.
pub fn egress_alias(mac: Mac, mtu: u32, pod: IpAddr, gateway: IpAddr, name: Option<&str>) -> String {
    let (word, name) = name.map_or(("", ""), |name| (NAME, name));
    format!("aws-cni mac {mac} mtu {mtu} pod {pod} gateway {gateway}{word}{name}")
}

/// MAC, MTU, the pod's address, the end's own and its name, of an alias that [`egress_alias`] has made; earlier versions gave it
/// no name.
pub fn of_egress_alias(alias: &str) -> Option<(Mac, u32, IpAddr, IpAddr, Option<&str>)> {
    let (veth, rest) = alias.split_once(" pod ")?;
    let ((mac, mtu), (pod, gateway)) = (of_veth_alias(veth)?, rest.split_once(" gateway ")?);
    let (gateway, name) = gateway.split_once(NAME).map_or((gateway, None), |(gateway, name)| (gateway, Some(name)));
    Some((mac, mtu, pod.parse().ok()?, gateway.parse().ok()?, name))
}

/// The name in an alias that [`veth_alias`] has made: that which the link had first.
pub fn name_of_veth_alias(alias: &str) -> Option<&str> {
    of_veth_alias(alias).and_then(|_| Some(alias.split_once(NAME)?.1))
}

/// Name of the pod's end: `CNI_IFNAME` for the first interface, `mNicIf<index>` for the others.
pub fn container_veth(ifname: &str, index: usize) -> String {
    if index == 0 { ifname.to_owned() } else { format!("mNicIf{index}") }
}

/// Name of the entry of a CNI result that stands for no device and carries data for DEL (`spec/plugin.md` 12).
pub fn dummy(namespace: &str, pod: &str) -> String {
    format!("dummy{}", suffix(namespace, pod, 0))
}

/// Name of the VLAN device of a branch ENI.
pub fn vlan_device(vlan: u32) -> String {
    format!("vlan.eth.{vlan}")
}

/// Gateway that a pod sees on its interface `index`: 169.254.1.(index + 1) or fe80::(index + 1).
pub fn gateway(v6: bool, index: usize) -> Result<IpAddr> {
    let last = u8::try_from(index + 1)
        .ok()
        .filter(|last| *last < u8::MAX)
        .ok_or_else(|| Error::new(format!("no gateway for interface number {index}")))?;
    Ok(if v6 {
        IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, u16::from(last)))
    } else {
        IpAddr::V4(Ipv4Addr::new(169, 254, 1, last))
    })
}

/// Route table of an ENI on network card `card` at device index `device` (`spec/dataplane.md` 1.2). Only the ENI at
/// device 0 of card 0 lives in main; a number that would hit another of the kernel's own tables is refused.
pub fn table_of(card: u32, device: u32) -> Result<u32> {
    if card == 0 && device == 0 {
        return Ok(TABLE_MAIN);
    }
    let table = if card == 0 {
        device.checked_add(1)
    } else {
        // A device index of 100 would be the next card's device 0.
        card.checked_mul(100).filter(|_| device < 100).and_then(|base| base.checked_add(10_000 + device))
    };
    table
        .filter(|table| usable(*table))
        .ok_or_else(|| Error::new(format!("no route table for device {device} on network card {card}")))
}

/// Route table of a branch ENI: 100 + VLAN id.
pub fn vlan_table(vlan: u32) -> Result<u32> {
    Some(vlan)
        .filter(|vlan| (1..4095).contains(vlan))
        .map(|vlan| vlan + 100)
        .filter(|table| usable(*table))
        .ok_or_else(|| Error::new(format!("no route table for VLAN {vlan}")))
}

/// The VLAN whose table this number is, if it can be one.
pub fn vlan_of_table(table: u32) -> Option<u32> {
    table.checked_sub(100).filter(|vlan| vlan_table(*vlan).is_ok())
}

/// The VLAN of a device whose name [`vlan_device`] has made, if it can have a table.
pub fn vlan_of_device(name: &str) -> Option<u32> {
    let vlan = name.rsplit('.').next()?.parse().ok()?;
    Some(vlan).filter(|vlan| vlan_device(*vlan) == name && vlan_table(*vlan).is_ok())
}

/// Whether a table number of a message or a cached result means an ENI's own table; 0, 1 and 254 stand for main
/// (`spec/plugin.md` 13.2, 13.5).
pub fn normal_table(number: i32) -> u32 {
    match u32::try_from(number) {
        Ok(0 | 1) | Err(_) => TABLE_MAIN,
        Ok(table) => table,
    }
}

/// A table number that our ENIs can have: 2 to 99, or from 10000 on (`spec/dataplane.md` 8.4).
pub fn in_eni_ranges(table: u32) -> bool {
    (2..100).contains(&table) || table >= 10_000
}

fn usable(table: u32) -> bool {
    table != 0 && !(253..=255).contains(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_others_compute() {
        for (prefix, namespace, pod, index, name) in [
            ("eni", "default", "sample-pod", 0, "enicc21c2d7785"),
            ("eni", "default", "sample-pod", 1, "enia0b7655f3c9"),
            ("vlan", "default", "sample-pod", 0, "vlancc21c2d7785"),
            ("eni", "kube-system", "coredns-57ff979f67-qqbdh", 0, "enib5faff8a083"),
            ("", "kube-system", "coredns-57ff979f67-8ns9b", 0, "9571956a6cc"),
        ] {
            assert_eq!(host_veth(prefix, namespace, pod, index).unwrap(), name);
        }
        assert_eq!(dummy("default", "sample-pod"), "dummycc21c2d7785");
        assert_eq!(vlan_device(7), "vlan.eth.7");
        assert_eq!(container_veth("eth0", 0), "eth0");
        assert_eq!(container_veth("eth0", 2), "mNicIf2");
        assert_eq!(
            host_veth("calic", "a", "b", 0).unwrap_err().to_string(),
            "veth prefix \"calic\" is longer than 4 characters"
        );
    }

    #[test]
    fn an_alias_tells_what_a_veth_was_made_with() {
        let mac = Mac([2, 0, 0, 0, 0, 0x1f]);
        let alias = veth_alias(mac, 9001, "enicc21c2d7785");
        assert_eq!(alias, "aws-cni mac 02:00:00:00:00:1f mtu 9001 name enicc21c2d7785");
        assert_eq!((of_veth_alias(&alias), name_of_veth_alias(&alias)), (Some((mac, 9001)), Some("enicc21c2d7785")));
        let earlier = "aws-cni mac 02:00:00:00:00:1f mtu 1500";
        assert_eq!((of_veth_alias(earlier), name_of_veth_alias(earlier)), (Some((mac, 1500)), None));
        assert_eq!(name_of_veth_alias("uplink name enicc21c2d7785"), None);
        for other in ["", "uplink", "aws-cni mac 02:00 mtu 9001", "aws-cni mac 02:00:00:00:00:1f mtu -1"] {
            assert_eq!(of_veth_alias(other), None, "{other}");
        }
        for (pod, gateway) in [("169.254.172.7", "169.254.172.1"), ("fd00::ac:7", "fe80::1")] {
            let (pod, gateway) = (pod.parse().unwrap(), gateway.parse().unwrap());
            for (name, end) in [(None, ""), (Some("veth000000a1"), " name veth000000a1")] {
                let alias = egress_alias(mac, 9001, pod, gateway, name);
                let text = format!("aws-cni mac 02:00:00:00:00:1f mtu 9001 pod {pod} gateway {gateway}{end}");
                assert_eq!(alias, text);
                assert_eq!(of_egress_alias(&alias), Some((mac, 9001, pod, gateway, name)));
                assert_eq!(of_veth_alias(&alias), None, "not a plain veth's");
            }
        }
        for other in [
            "",
            "uplink",
            &veth_alias(mac, 1500, "enicc21c2d7785"),
            "aws-cni mac 02:00:00:00:00:1f mtu 9001 pod x gateway fe80::1",
        ] {
            assert_eq!(of_egress_alias(other), None, "{other}");
        }
    }

    #[test]
    fn tables_avoid_those_of_the_kernel() {
        for (card, device, table) in [
            (0, 0, Some(254)),
            (0, 1, Some(2)),
            (0, 2, Some(3)),
            (0, 251, Some(252)),
            (0, 252, None),
            (0, 253, None),
            (0, 254, None),
            (0, u32::MAX, None),
            (1, 1, Some(10_101)),
            (1, 0, Some(10_100)),
            (2, 3, Some(10_203)),
            (1, 100, None),
            (u32::MAX, 1, None),
        ] {
            assert_eq!(table_of(card, device).ok(), table, "card {card} device {device}");
        }
        for (vlan, table) in [(0, None), (1, Some(101)), (152, Some(252)), (153, None), (155, None), (156, Some(256))] {
            assert_eq!(vlan_table(vlan).ok(), table, "vlan {vlan}");
            assert!(table.is_none_or(|table| vlan_of_table(table) == Some(vlan)), "vlan {vlan}");
        }
        for table in [0, 2, 100, 253, 254, 255, 4195, 10_101] {
            assert_eq!(vlan_of_table(table), None, "{table}");
        }
        for (number, table) in [(-1, 254), (0, 254), (1, 254), (2, 2), (254, 254), (10_101, 10_101)] {
            assert_eq!(normal_table(number), table);
        }
    }

    #[test]
    fn gateways_count_interfaces() {
        assert_eq!(gateway(false, 0).unwrap().to_string(), "169.254.1.1");
        assert_eq!(gateway(false, 1).unwrap().to_string(), "169.254.1.2");
        assert_eq!(gateway(true, 1).unwrap().to_string(), "fe80::2");
        assert!(gateway(false, 254).is_err());
        assert!(gateway(false, usize::from(u8::MAX)).is_err());
    }
}
