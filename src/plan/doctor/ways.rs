//! What others have put on the ways of packets: routes that lead elsewhere or nowhere, and neighbours that are asked no more.
//! What stands exactly where one of ours is to be, the host's plan replaces; the rest is other people's (`spec/dataplane.md` 29),
//! and is told with the command that takes it away.

use super::{Finding, RULESET_MAX, Severity, single};
use crate::model::map::Map;
use crate::model::naming::VLAN_PREFIX;
use crate::model::net::{Link, Route, TABLE_MAIN};
use crate::plan::branch::link_route;
use crate::plan::egress::HostEnd;
use crate::plan::host::{Egress, Intent, Observation, is_connected, link_of, veths_of};
use ipnet::IpNet;
use std::net::IpAddr;

/// A table of ours.
struct Own<'a> {
    subject: &'a str,
    /// Index of the link that its traffic leaves by; 0 if that is missing.
    dev: u32,
    gateway: IpAddr,
    /// What the link reaches without the gateway.
    subnet: Option<IpNet>,
}

/// A route that was seen, of whatever type.
struct Way {
    table: u32,
    dst: IpNet,
    metric: u32,
    /// Link and gateway; none if it lets nothing through.
    to: Option<(u32, Option<IpAddr>)>,
}

struct Ways<'a> {
    intent: &'a Intent,
    seen: &'a Observation,
    /// Index of the primary ENI's link.
    primary: Option<u32>,
    tables: Map<u32, Own<'a>>,
    /// Routes of ours by table and destination.
    ours: Map<(u32, IpNet), (Route, &'a str)>,
}

/// All of them.
pub(super) fn findings(intent: &Intent, seen: &Observation) -> Vec<Finding> {
    let ways = Ways::new(intent, seen);
    let name = |dev: u32| seen.links.iter().find(|link| link.index == dev).map_or("?", |link| link.name.as_str());
    let mut found = Vec::new();
    let mut tell = |way: &Way, text: &dyn Fn() -> String| {
        if let Some(subject) = ways.whom(way) {
            let text = text();
            let ip = if way.dst.addr().is_ipv6() { "ip -6" } else { "ip" };
            let mut finding = Finding::new("foreign-route", subject, format!("route {text}"));
            if let Some((route, _)) = ways.ours.get(&(way.table, way.dst)) {
                // It takes all of what ours is for.
                finding.severity = Severity::Fail;
                let ours =
                    route.to_string().replace(&format!("dev if{}", route.dev), &format!("dev {}", name(route.dev)));
                finding.seen = format!("route {text}, before {ours}");
            }
            found.push(finding.mended_by(format!("{ip} route del {text}")));
        }
    };
    let mut astray = Vec::new();
    for route in &seen.routes {
        let to = Some((route.dev, route.gateway));
        let way = Way { table: route.table, dst: route.dst, metric: route.metric, to };
        // There are thousands, and hardly ever one to tell of.
        let text = || route.to_string().replace(&format!("dev if{}", route.dev), &format!("dev {}", name(route.dev)));
        match ways.leads_astray(route, &way) {
            Some(why) => astray.push((route.dst.addr().is_ipv6(), text(), why)),
            None => tell(&way, &text),
        }
    }
    for barrier in &seen.barriers {
        let way = Way { table: barrier.table, dst: barrier.dst, metric: barrier.metric, to: None };
        // IPv6 takes any route to the destination if the link is not named.
        let dev = || if barrier.dev == 0 { String::new() } else { format!(" dev {}", name(barrier.dev)) };
        tell(&way, &|| format!("{barrier}{}", dev()));
    }
    for (v6, text, why) in astray {
        let finding = Finding::new("foreign-route", "", format!("route {text} {why}"));
        let ip = if v6 { "ip -6" } else { "ip" };
        let finding = finding.mended_by(format!("{ip} route del {text}"));
        found.insert(0, Finding { severity: Severity::Fail, ..finding });
    }
    let more = found.len().saturating_sub(RULESET_MAX);
    found.truncate(RULESET_MAX);
    if more > 0 {
        found.push(
            Finding::new("foreign-route", "", format!("{more} more routes")).mended_by("ip route show table all"),
        );
    }
    for entry in &seen.neighbours {
        if let Some(subject) = ways.asks(entry.dev, entry.addr) {
            let mac = entry.mac.map(|mac| mac.to_string()).unwrap_or_default();
            let (gateway, link) = (entry.addr, name(entry.dev));
            let text = format!("gateway {gateway} is {mac} on {link} for good: the kernel asks nobody");
            let finding = Finding::new("gateway-neighbour", subject, text);
            found.push(finding.mended_by(format!("ip neigh del {gateway} dev {link}")));
        }
    }
    found
}

impl<'a> Ways<'a> {
    fn new(intent: &'a Intent, seen: &'a Observation) -> Self {
        let veths = veths_of(intent, &seen.links);
        let primary = link_of(&seen.links, intent.primary_mac).map(|link| link.index);
        let mut ways = Ways { intent, seen, primary, tables: Map::new(), ours: Map::new() };
        for eni in &intent.enis {
            let dev = link_of(&seen.links, eni.mac).map_or(0, |link| link.index);
            let subject = eni.id.as_str();
            let own = Own { subject, dev, gateway: eni.gateway, subnet: Some(eni.own.trunc()) };
            ways.own(eni.table, own);
        }
        for pod in &intent.branches {
            let device = pod.eni.device();
            let dev = seen.links.iter().find(|link| link.name == device).map_or(0, |link| link.index);
            let own = Own { subject: &pod.name, dev, gateway: pod.eni.gateway, subnet: None };
            ways.own(pod.eni.table, own);
            if let Some(veth) = veths.get(pod.veth.as_str()) {
                let strict = veth.name.starts_with(VLAN_PREFIX);
                ways.pod(if strict { pod.eni.table } else { TABLE_MAIN }, pod.address, veth, &pod.name);
            }
        }
        for pod in &intent.pods {
            if let Some(veth) = veths.get(pod.veth.as_str()) {
                ways.pod(TABLE_MAIN, pod.address, veth, &pod.name);
            }
        }
        // Of two for one address only the host's plan knows which counts.
        let mut ends = Map::new();
        for (link, end) in seen.links.iter().filter_map(|link| Some((link, HostEnd::of(link)?))) {
            ends.entry(end.pod).and_modify(|only| *only = None).or_insert(Some(link));
        }
        for (address, link) in ends.into_iter().filter_map(|(address, link)| Some((address, link?))) {
            ways.pod(TABLE_MAIN, address, link, "");
        }
        ways
    }

    // With the two routes that every such table has.
    fn own(&mut self, table: u32, own: Own<'a>) {
        let way = link_route(table, own.gateway, own.dev);
        let dst = IpNet::new(own.gateway, 0).map_or(way.dst, |net| net.trunc());
        self.ours.insert((table, way.dst), (way, own.subject));
        self.ours.insert((table, dst), (Route { dst, gateway: Some(own.gateway), ..way }, own.subject));
        self.tables.insert(table, own);
    }

    fn pod(&mut self, table: u32, address: IpAddr, veth: &Link, name: &'a str) {
        let route = link_route(table, address, veth.index);
        self.ours.insert((table, route.dst), (route, name));
    }

    /// Whom a route of somebody else's concerns, if it takes anything away.
    fn whom(&self, way: &Way) -> Option<&'a str> {
        if let Some((route, subject)) = self.ours.get(&(way.table, way.dst)) {
            let same = |there: &Route| (there.table, there.dst, there.dev, there.gateway, there.metric);
            let there = || self.seen.routes.iter().any(|there| same(there) == same(route));
            // A greater metric loses, and most are ours themselves. In the very place of ours it goes with the host's plan.
            if way.metric > route.metric || way.to == Some((route.dev, route.gateway)) {
                return None;
            }
            let replaced = way.metric == route.metric && (way.to.is_none() || !there());
            return (!replaced).then_some(subject);
        }
        if let Some(own) = self.tables.get(&way.table) {
            // It only says more exactly what ours say.
            let inside = own.subnet.is_some_and(|subnet| subnet.contains(&way.dst));
            let fits = |(dev, gateway): (u32, Option<IpAddr>)| {
                dev == own.dev && gateway.map_or(inside, |gateway| gateway == own.gateway)
            };
            return (!way.to.is_some_and(fits)).then_some(own.subject);
        }
        let strange = match way.to {
            None => true,
            Some((dev, _)) => single(way.dst).is_none() && self.is_strange(dev),
        };
        (way.table == TABLE_MAIN && way.dst.prefix_len() > 0 && strange && self.takes_of_vpc(way)).then_some("")
    }

    /// Whether it takes what main is to send by the primary ENI to another link, and how. What the VPC gets there has an address
    /// that is not of the ENI it comes by, and is dropped.
    fn leads_astray(&self, route: &Route, way: &Way) -> Option<&'static str> {
        let primary = self.primary.filter(|_| route.table == TABLE_MAIN)?;
        let v6 = route.dst.addr().is_ipv6();
        if route.dst.prefix_len() == 0 {
            let used = v6 == self.intent.v6 || matches!(self.intent.egress, Egress::Snat(ip) if ip.is_ipv6() == v6);
            let defaults = self.seen.routes.iter().filter(|there| (there.table, there.dst) == (TABLE_MAIN, route.dst));
            let ours = defaults.clone().filter(|there| there.dev == primary).map(|there| there.metric).min();
            // Of equal ones the first counts in IPv4; in IPv6 either may.
            let first = || {
                defaults.clone().find(|there| there.metric == route.metric && (there.dev == primary || *there == route))
            };
            let wins =
                ours.is_none_or(|ours| route.metric < ours || (route.metric == ours && !v6 && first() == Some(route)));
            return (used && route.dev != primary && wins)
                .then_some("is the default and not by the primary ENI: of DHCP or a network manager?");
        }
        let mut enis = self.intent.enis.iter();
        let eni = enis.find(|eni| self.tables.get(&eni.table).is_some_and(|own| own.dev == route.dev))?;
        // The former the plan takes away; the latter is the kernel's with an address of that length.
        let plain = is_connected(route, eni, route.dev) || single(route.dst) == Some(eni.own.addr());
        let known = self.ours.contains_key(&(way.table, way.dst));
        (route.dev != 0 && !plain && !known && self.takes_of_vpc(way))
            .then_some("takes a part of the VPC by a secondary ENI: of DHCP or a network manager?")
    }

    /// Whether the link is neither hardware nor of a pod nor on top of an ENI: a bridge, a tunnel.
    fn is_strange(&self, dev: u32) -> bool {
        let kind = self.seen.links.iter().find(|link| link.index == dev).and_then(|link| link.kind.as_deref());
        kind.is_some_and(|kind| !matches!(kind, "veth" | "vlan" | "macvlan" | "ipvlan" | "bond" | "team"))
    }

    /// Whether it leads parts of the VPC away from main's other routes.
    fn takes_of_vpc(&self, way: &Way) -> bool {
        let main = || self.seen.routes.iter().filter(|route| route.table == TABLE_MAIN);
        let beaten = main().any(|route| route.dst == way.dst && route.metric < way.metric);
        let exact =
            |vpc: &IpNet| main().any(|route| route.dst.contains(vpc) && route.dst.prefix_len() > way.dst.prefix_len());
        let takes = |vpc: &IpNet| vpc.contains(&way.dst) || (way.dst.contains(vpc) && !exact(vpc));
        !beaten && self.intent.vpc_cidrs.iter().any(takes)
    }

    /// Whose gateway it is.
    fn asks(&self, dev: u32, address: IpAddr) -> Option<&'a str> {
        let own = self.tables.values().find(|own| (own.dev, own.gateway) == (dev, address));
        let leads = |route: &Route| route.dev == dev && route.gateway == Some(address);
        let primary = || self.primary == Some(dev) && self.seen.routes.iter().any(leads);
        own.map(|own| own.subject).or_else(|| primary().then_some(""))
    }
}
