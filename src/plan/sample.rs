//! What the tests of the plan make nodes of: one sample host in a few lines.

use crate::model::net::{Family, Link, Mac, Route, Rule, Scope, TABLE_MAIN};
use crate::plan::host::HostEni;
use ipnet::IpNet;
use std::net::IpAddr;

pub(in crate::plan) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(in crate::plan) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(in crate::plan) fn mac(last: u8) -> Mac {
    Mac([0x02, 0, 0, 0, 0, last])
}

pub(in crate::plan) fn link(index: u32, name: &str, mac: Mac) -> Link {
    Link { index, name: name.into(), mac: Some(mac), mtu: 9001, up: true, ..Link::default() }
}

/// The ENI with `mac(2)` and table 2.
pub(in crate::plan) fn eni() -> HostEni {
    HostEni {
        id: "eni-2".into(),
        mac: mac(2),
        card: 0,
        device: 1,
        own: net("10.20.12.5/24"),
        gateway: ip("10.20.12.1"),
        table: 2,
        trunk: false,
    }
}

pub(in crate::plan) fn route(table: u32, dst: &str, gateway: Option<&str>, dev: u32) -> Route {
    let scope = if gateway.is_none() { Scope::Link } else { Scope::Universe };
    Route { table, dst: net(dst), gateway: gateway.map(ip), dev, scope, prefsrc: None, metric: 0 }
}

/// The rule for packets with this mark.
pub(in crate::plan) fn marked(bits: u32) -> Rule {
    Rule { fwmark: Some((bits, bits)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) }
}
