//! `enibox doctor --pod`: one pod from the store to its namespace, and what every packet of it meets on the host
//! (`spec/operations.md` 8.3).

use super::super::read;
use super::known::store_of;
use super::{FORWARD, Look, named};
use crate::model::checkpoint::Checkpoint;
use crate::model::net::{Address, Link, Route, TABLE_MAIN};
use crate::model::settings::Settings;
use crate::netlink::sysctl;
use crate::plan::doctor;
use crate::plan::host::Intent;
use crate::plan::pod::Side;
use std::net::IpAddr;

/// A larger file is no checkpoint: 737 pods take 200 KiB.
const CHECKPOINT_BYTES_MAX: usize = 64 << 20;
/// Network cards, each with a checkpoint of its own: as many as the largest type has.
const CARDS_MAX: u32 = 32;

/// The lines, in the order in which one thing leads to the next.
pub(super) fn lines(look: &Look, intent: &Intent, settings: &Settings, name: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for card in 0..CARDS_MAX {
        let text = read(&store_of(&settings.backing_store, card), CHECKPOINT_BYTES_MAX).unwrap_or_default();
        let found = Checkpoint::parse(&text).map(|found| found.allocations).unwrap_or_default();
        for held in &found {
            if format!("{}/{}", held.metadata.namespace, held.metadata.name) == name {
                let address = held.address().map_or_else(|| "?".to_owned(), |address| address.to_string());
                lines.push(format!("store     {address} for container {}, {}", held.container, held.ifname));
            }
        }
    }
    let plain = intent.pods.iter().filter(|pod| pod.name == name);
    let eni = |table| intent.enis.iter().find(|eni| eni.table == table).map(|eni| eni.id.as_str());
    let plain = plain.map(|pod| {
        let (address, table) = (pod.address, pod.table);
        let of = eni(table).unwrap_or("the primary ENI");
        (address, pod.veth.as_str(), table, format!("address   {address} of {of}, table {table}"))
    });
    let branches = intent.branches.iter().filter(|pod| pod.name == name).map(|pod| {
        let (address, table, device) = (pod.address, pod.eni.table, pod.eni.device());
        let text =
            format!("address   {address} of a branch ENI, VLAN {}, device {device}, table {table}", pod.eni.vlan);
        (address, pod.veth.as_str(), table, text)
    });
    let at = lines.len();
    for (address, veth, table, text) in plain.chain(branches) {
        lines.push(text);
        one(look, address, veth, table, &mut lines);
    }
    if lines.len() == at {
        lines.push(format!("no address is given to {name}"));
        return lines;
    }
    let way = sysctl::read(FORWARD).map_or_else(|error| error.to_string(), |value| format!("{FORWARD} = {value}"));
    lines.push(format!("sysctl    {way}"));
    for (path, value) in &look.seen.sysctls {
        lines.push(format!("sysctl    {path} = {value}"));
    }
    for table in &look.seen.tables {
        let text = table.to_string();
        let rules = text.lines().map(str::trim).filter(|line| !matches!(*line, "" | "}"));
        lines.extend(rules.map(|line| format!("nft       {line}")));
    }
    lines
}

// What there is of one address.
fn one(look: &Look, address: IpAddr, veth: &str, table: u32, lines: &mut Vec<String>) {
    let seen = &look.seen;
    let seat = doctor::pods::Seats::new(seen, &look.namespaces).of(veth, address);
    let outer = seat.outer.map_or("", |outer| outer.name.as_str());
    lines.extend(seat.outer.map(|outer| format!("veth      {}", link(outer))));
    for rule in &seen.rules {
        let about = |net: Option<ipnet::IpNet>| net.is_some_and(|net| net == ipnet::IpNet::from(address));
        let of_table = rule.iif.is_some() && (rule.table == table || rule.iif.as_deref() == Some(outer));
        if about(rule.src) || about(rule.dst) || of_table {
            lines.push(format!("rule      {rule}"));
        }
    }
    let to = |route: &&Route| route.dst == ipnet::IpNet::from(address) || (route.table == table && table != TABLE_MAIN);
    let routes =
        seen.routes.iter().filter(to).map(|route| format!("route     {}", named(&route.to_string(), &seen.links)));
    lines.extend(routes);
    let told = seen.neighbours.iter().filter(|entry| entry.addr == address);
    lines.extend(told.map(|entry| format!("neighbour {} {}", entry.addr, entry.mac.unwrap_or_default())));
    let Some((number, inner)) = seat.inner else { return };
    let inside = &look.namespaces[number];
    lines.push(format!("inside    {}: {}", inside.path, link(inner)));
    let Side { addresses, routes, rules, neighbours, links, .. } = &inside.side;
    let own = |address: &&Address| address.dev == inner.index;
    lines.extend(
        addresses.iter().filter(own).map(|address| format!("          address {}", named(&address.to_string(), links))),
    );
    lines.extend(
        rules.iter().filter(|rule| rule.priority != 0 && rule.table < 253).map(|rule| format!("          rule {rule}")),
    );
    let routes = routes.iter().filter(|route| route.dev == inner.index);
    lines.extend(routes.map(|route| format!("          route {}", named(&route.to_string(), links))));
    for entry in neighbours.iter().filter(|entry| entry.permanent && entry.dev == inner.index) {
        lines.push(format!("          neighbour {} {}", entry.addr, entry.mac.unwrap_or_default()));
    }
}

fn link(link: &Link) -> String {
    let Link { name, index, mac, mtu, up, .. } = link;
    let state = if *up { "up" } else { "down" };
    let passes = if link.forwards == Some(false) { ", does not forward" } else { "" };
    format!("{name} (index {index}), {state}, MAC {}, mtu {mtu}{passes}", mac.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::net::{Family, Mac, Rule, Scope};
    use crate::plan::branch::Branch;
    use crate::plan::doctor::pods::Inside;
    use crate::plan::host::{HostBranch, HostPod, Observation};

    const VETH: &str = "0123456789a";

    // A veth whose other end has this index.
    fn veth(index: u32, parent: u32, name: &str) -> Link {
        let (kind, mac) = (Some("veth".to_owned()), Some(Mac([2, 0, 0, 0, 0, 9])));
        Link { index, name: name.into(), mac, mtu: 9001, up: true, parent: Some(parent), kind, ..Link::default() }
    }

    fn route(dst: &str, table: u32) -> Route {
        let (dst, scope) = (dst.parse().unwrap(), Scope::Link);
        Route { dst, table, dev: 9, gateway: None, scope, prefsrc: None, metric: 0 }
    }

    #[test]
    fn a_pod_is_followed_from_its_address_to_its_namespace() {
        let check = |intent: &Intent, name: &str, wanted: &[&str]| {
            let branch = Rule { iif: Some("vlan.eth.7".into()), ..Rule::any(Family::V4, 10, 107) };
            let out = Rule { src: Some("10.0.0.8/32".parse().unwrap()), ..Rule::any(Family::V4, 1536, 2) };
            let other = Rule { src: Some("10.0.0.9/32".parse().unwrap()), ..Rule::any(Family::V4, 1536, 2) };
            let routes = vec![route("10.0.0.8/32", TABLE_MAIN), route("0.0.0.0/0", 107), route("0.0.0.0/0", 3)];
            let links = vec![veth(9, 2, &format!("eni{VETH}"))];
            let rules = vec![branch, out, other];
            let seen = Observation { links, routes, rules, ..Observation::default() };
            let side = Side { links: vec![veth(2, 9, "eth0")], ..Side::default() };
            let namespaces = vec![Inside { path: "/run/netns/one".into(), id: (4, 5), side }];
            let (findings, mends, strays, followed) = <_>::default();
            let look = Look {
                daemon: true,
                intent: Some(intent.clone()),
                seen,
                namespaces,
                findings,
                mends,
                strays,
                followed,
            };
            let settings = Settings { backing_store: "/nonexistent/ipam.json".into(), ..Settings::parse(|_| None).0 };
            let mut found = lines(&look, look.intent.as_ref().unwrap(), &settings, name);
            found.retain(|line| !line.starts_with("sysctl"));
            assert_eq!(found, wanted);
        };
        let (name, veth) = ("default/one".to_owned(), VETH.to_owned());
        let pod = HostPod { address: "10.0.0.8".parse().unwrap(), table: 2, name: name.clone(), veth: veth.clone() };
        let mut intent = Intent { pods: vec![pod], ..Intent::default() };
        let outer = "veth      eni0123456789a (index 9), up, MAC 02:00:00:00:00:09, mtu 9001";
        let inner = "inside    /run/netns/one: eth0 (index 2), up, MAC 02:00:00:00:00:09, mtu 9001";
        let address = "address   10.0.0.8 of the primary ENI, table 2";
        let rule = "rule      1536: from 10.0.0.8 lookup 2";
        let way = "route     10.0.0.8 dev eni0123456789a scope link";
        check(&intent, "default/one", &[address, outer, rule, way, inner]);
        check(&intent, "default/two", &["no address is given to default/two"]);
        let eni = Branch::new(7, Mac([2, 0, 0, 0, 0, 1]), "10.0.1.1".parse().unwrap()).unwrap();
        intent.pods.clear();
        intent.branches = vec![HostBranch { address: "10.0.1.8".parse().unwrap(), eni, name, veth }];
        let address = "address   10.0.1.8 of a branch ENI, VLAN 7, device vlan.eth.7, table 107";
        let rule = "rule      10: from all iif vlan.eth.7 lookup 107";
        let way = "route     default dev eni0123456789a table 107 scope link";
        check(&intent, "default/one", &[address, outer, rule, way, inner]);
    }
}
