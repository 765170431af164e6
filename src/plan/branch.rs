//! A branch ENI on the host as values (`spec/dataplane.md` 9.3): its VLAN device, its route table and the rules that lead
//! there. The plugin makes them, CHECK expects them, and the daemon puts back what others took away; all three ask here.

use crate::error::Result;
use crate::model::naming::{self, priority};
use crate::model::net::{Family, Link, Mac, Route, Rule, Scope};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// The kernel's metric for IPv6 routes that name none (IP6_RT_PRIO_USER).
const IPV6_METRIC: u32 = 1024;

/// A branch ENI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// VLAN on the trunk, 1 to 4094.
    pub vlan: u16,
    /// MAC of the branch ENI. CHECK does not know it and has the zero one.
    pub mac: Mac,
    /// Gateway of the branch ENI's subnet, of the pod's family.
    pub gateway: IpAddr,
    /// Its route table ([`naming::vlan_table`]).
    pub table: u32,
}

impl Branch {
    /// An error when the VLAN id is out of range or its table would be one of the kernel's own.
    pub fn new(vlan: u16, mac: Mac, gateway: IpAddr) -> Result<Branch> {
        Ok(Branch { vlan, mac, gateway, table: naming::vlan_table(vlan.into())? })
    }

    /// Name of its VLAN device.
    pub fn device(&self) -> String {
        naming::vlan_device(self.vlan.into())
    }

    /// The gateway on the device with this index, then the default route through it.
    pub fn routes(&self, device: u32) -> [Route; 2] {
        way_out(self.table, self.gateway, device)
    }

    /// Strict mode: the way to the pod, over its veth.
    pub fn pod_route(&self, pod: IpAddr, veth: u32) -> Route {
        link_route(self.table, pod, veth)
    }

    /// Strict mode: what comes from the ENI and what comes from the pod looks in the ENI's table before all others.
    pub fn rules(&self, veth: &str) -> [Rule; 2] {
        [self.device(), veth.to_owned()]
            .map(|iif| Rule { iif: Some(iif), ..Rule::any(Family::of(self.gateway), priority::BRANCH, self.table) })
    }

    /// Selects, in a delete, the rules of both interfaces and of any table that `veth` had before.
    pub fn earlier_rules(family: Family, veth: &str) -> Rule {
        Rule { iif: Some(veth.to_owned()), ..Rule::any(family, priority::BRANCH, 0) }
    }
}

/// What the table of an ENI with this link leads out by: the gateway on the link, then the default route through it.
pub fn way_out(table: u32, gateway: IpAddr, dev: u32) -> [Route; 2] {
    let way = link_route(table, gateway, dev);
    let dst = match gateway {
        IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    };
    [way, Route { dst, gateway: Some(gateway), scope: Scope::Universe, ..way }]
}

/// `<address> dev <link> scope link` in `table`, as the kernel reports it: IPv6 routes have no scope, and a metric.
pub fn link_route(table: u32, to: IpAddr, dev: u32) -> Route {
    let v6 = to.is_ipv6();
    let scope = if v6 { Scope::Universe } else { Scope::Link };
    Route {
        table,
        dst: IpNet::from(to),
        gateway: None,
        dev,
        scope,
        prefsrc: None,
        metric: if v6 { IPV6_METRIC } else { 0 },
    }
}

/// Whether a link is a VLAN device: only such a one is ever deleted or changed.
pub fn is_vlan(link: &Link) -> bool {
    link.kind.as_deref() == Some("vlan")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn branch(vlan: u16, gateway: &str) -> Result<Branch> {
        Branch::new(vlan, Mac([2, 0, 0, 0, 0, 9]), gateway.parse().unwrap())
    }

    #[test]
    fn routes_and_rules_are_those_of_a_strict_pod() {
        let check = |vlan: u16, gateway: &str, pod: &str, expected: [&str; 5]| {
            let branch = branch(vlan, gateway).unwrap();
            let [way, default] = branch.routes(7);
            let [from_eni, from_pod] = branch.rules("vlancc21c2d7785");
            let pod = branch.pod_route(pod.parse().unwrap(), 8);
            let got =
                [way.to_string(), default.to_string(), pod.to_string(), from_eni.to_string(), from_pod.to_string()];
            assert_eq!(got, expected);
        };
        check(
            1,
            "192.168.0.1",
            "192.168.26.162",
            [
                "192.168.0.1 dev if7 table 101 scope link",
                "default via 192.168.0.1 dev if7 table 101",
                "192.168.26.162 dev if8 table 101 scope link",
                "10: from all iif vlan.eth.1 lookup 101",
                "10: from all iif vlancc21c2d7785 lookup 101",
            ],
        );
        check(
            300,
            "fe80:ec2::1",
            "2001:db8::7",
            [
                "fe80:ec2::1 dev if7 table 400 metric 1024",
                "default via fe80:ec2::1 dev if7 table 400 metric 1024",
                "2001:db8::7 dev if8 table 400 metric 1024",
                "10: from all iif vlan.eth.300 lookup 400",
                "10: from all iif vlancc21c2d7785 lookup 400",
            ],
        );
    }

    #[test]
    fn tables_of_the_kernel_are_refused() {
        for (vlan, refused) in
            [(0, true), (1, false), (152, false), (153, true), (155, true), (156, false), (4095, true)]
        {
            let result = branch(vlan, "10.0.0.1");
            assert_eq!(result.is_err(), refused, "{vlan}: {result:?}");
        }
    }
}
