//! Secondary ENIs: their links, addresses, tables and rules (`spec/dataplane.md` 8).

use super::planner::Planner;
use super::{Action, HostEni, Observation, What, link_of, missing, single, source};
use crate::model::map::Set;
use crate::model::naming::{self, priority};
use crate::model::net::{Address, Link, Route, Rule, TABLE_LOCAL, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::plan::branch::way_out;
use ipnet::IpNet;
use std::net::IpAddr;

impl Planner<'_> {
    pub(super) fn eni(&mut self, eni: &HostEni) {
        let seen = self.seen;
        if eni.table == TABLE_MAIN || eni.table == TABLE_LOCAL || eni.table == 0 {
            self.failed.insert(eni.id.clone(), format!("route table {} is not one of an ENI's own", eni.table));
            return;
        }
        let Some(link) = link_of(&seen.links, eni.mac) else {
            self.failed.insert(eni.id.clone(), missing(eni.mac, &seen.links).to_string());
            return;
        };
        let id = Some(&eni.id);
        if link.mtu != self.intent.eni_mtu {
            let text = format!("set mtu {} on {}", self.intent.eni_mtu, link.name);
            self.add(What::EniMtu, id, Action::SetMtu(link.index, self.intent.eni_mtu), text);
        }
        self.eni_link_local(eni, link);
        if !link.works() {
            self.set_up(What::EniLink, id, link);
        }
        self.want_forwarding(id, link);
        // A trunk without an address of its own has the link's, which comes with its route.
        let own = global(eni.own.addr());
        if own {
            self.eni_addresses(eni, link);
        }
        self.eni_routes(eni, link);
        if own {
            self.no_connected_route(eni, link);
        }
        if !eni.trunk {
            self.want_rule(What::EniRule, id, Rule::from(IpNet::from(eni.own.addr()), priority::FROM_ENI, eni.table));
        }
    }

    /// The gateway is asked for its MAC from the link's own address (RFC 4861, 7.2.2), which a link that comes up has only
    /// after two seconds of duplicate detection: pods' packets would wait so long. Given before, it is there at once.
    fn eni_link_local(&mut self, eni: &HostEni, link: &Link) {
        let own = IpAddr::V6(eni.mac.link_local());
        let there = |address: &Address| address.dev == link.index && address.addr.addr() == own;
        let there = if link.up { self.speaking.contains(&link.index) } else { self.seen.addresses.iter().any(there) };
        if !there && eni.own.addr().is_ipv6() {
            self.want_link_local(What::EniAddress, Some(&eni.id), link, eni.mac);
        }
    }

    fn eni_addresses(&mut self, eni: &HostEni, link: &Link) {
        let seen = self.seen;
        let v6 = eni.own.addr().is_ipv6();
        let here = seen.addresses.iter().filter(|address| address.dev == link.index);
        let here = here.filter(|address| address.addr.addr().is_ipv6() == v6).collect::<Vec<_>>();
        // An IPv6 address is there once, with whatever length: DHCP gives a /128.
        let own = |address: &Address| address.addr == eni.own || (v6 && address.addr.addr() == eni.own.addr());
        if !here.iter().any(|address| own(address)) {
            // Without a connected route in main: where both ENIs share a subnet it would win over the primary's own. EC2 has
            // given the address to this ENI alone, so nobody else needs to be asked.
            let address = Address { dev: link.index, addr: eni.own, no_prefix_route: true, no_dad: v6 };
            let text = format!("add address {} to {}", eni.own, link.name);
            self.add(What::EniAddress, Some(&eni.id), Action::AddAddress(address), text);
        }
        for address in here.into_iter().filter(|address| !own(address) && global(address.addr.addr())) {
            let text = format!("delete address {} from {}", address.addr, link.name);
            self.delete(What::EniAddress, Some(&eni.id), Action::DeleteAddress(*address), text);
        }
    }

    fn eni_routes(&mut self, eni: &HostEni, link: &Link) {
        let seen = self.seen;
        for route in way_out(eni.table, eni.gateway, link.index) {
            if seen.routes.contains(&route) {
                self.no_barrier(What::EniRoute, Some(&eni.id), &route);
            } else {
                let text = format!("replace route {}", route_text(&route, link));
                self.add(What::EniRoute, Some(&eni.id), Action::ReplaceRoute(route), text);
            }
        }
    }

    fn no_connected_route(&mut self, eni: &HostEni, link: &Link) {
        for route in self.seen.routes.iter().filter(|route| is_connected(route, eni, link.index)) {
            let text = format!("delete route {}", route_text(route, link));
            self.delete(What::EniRoute, Some(&eni.id), Action::DeleteRoute(*route), text);
        }
    }

    /// A rule for the own address of an ENI that is no longer here would send a pod that gets the address to a wrong table
    /// (`spec/dataplane.md` 8.4). One whose address sits on a link belongs to an ENI that somebody else runs. One for an address
    /// that is ours to route goes wherever it leads, any other only if its table is one of ours: it may be an operator's, for an
    /// address that moves between nodes.
    pub(super) fn stale_eni_rules(&mut self) {
        let intent = self.intent;
        let seen = self.seen;
        let family = self.family();
        let pods = intent.pods.iter().map(|pod| pod.address).chain(intent.branches.iter().map(|pod| pod.address));
        let pods = pods.gather::<Set<_>>();
        let of_ours = |table: u32| intent.enis.iter().any(|eni| eni.table == table) || to_eni(table, seen);
        self.drop_rules(What::EniRule, |rule| {
            let Some(source) = rule.src.and_then(single) else { return false };
            let ours = *rule == Rule::from(IpNet::from(source), priority::FROM_ENI, rule.table);
            let attached = intent.enis.iter().find(|eni| eni.own.addr() == source);
            rule.family == family
                && ours
                && naming::in_eni_ranges(rule.table)
                && match attached {
                    Some(eni) => !eni.trunk && eni.table != rule.table,
                    None => {
                        !seen.addresses.iter().any(|address| address.addr.addr() == source)
                            && (pods.contains(&source) || of_ours(rule.table))
                    }
                }
        });
    }
}

/// Whether a table is that of an ENI of ours, for a rule to it of our shape: while there are only its own rules the kernel gives
/// one that names no priority that of ours (`fib_default_rule_pref` in net/core/fib_rules.c), and others number the tables of
/// their ENIs as we do (amazon-ec2-net-utils: 10000 and more). Empty it leads nowhere, as when its link has gone.
pub(in crate::plan) fn to_eni(table: u32, seen: &Observation) -> bool {
    let routes = seen.routes.iter().filter(|route| route.table == table).copied().collect::<Vec<_>>();
    let pods = |rule: &Rule| rule.table == table && source(rule).is_some();
    routes.is_empty() || leads_out(&routes) || seen.rules.iter().any(pods)
}

/// Whether a gateway on the link and the default route through it are among these, just as we make them: amazon-ec2-net-utils
/// gives both a source and a metric.
pub(in crate::plan) fn leads_out(routes: &[Route]) -> bool {
    let pair = |route: &Route| route.gateway.map(|gateway| way_out(route.table, gateway, route.dev));
    routes.iter().any(|route| pair(route).is_some_and(|pair| pair[1] == *route && routes.contains(&pair[0])))
}

/// Whether it is the route in main that the kernel or DHCP makes for the subnet of an ENI with an address of its own.
pub(in crate::plan) fn is_connected(route: &Route, eni: &HostEni, dev: u32) -> bool {
    let own = eni.own.addr();
    (route.table, route.dev, route.dst) == (TABLE_MAIN, dev, eni.own.trunc())
        && route.gateway.is_none()
        && route.prefsrc.is_none_or(|source| source == own)
        && global(own)
}

fn route_text(route: &Route, link: &Link) -> String {
    route.to_string().replace(&format!("dev if{}", link.index), &format!("dev {}", link.name))
}

/// Whether an address is one that routes may lead to from elsewhere.
pub(in crate::plan) fn global(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(link_local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}
