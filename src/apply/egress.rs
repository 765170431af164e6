//! A pod's way out in the other family on the kernel (`plan::egress`; `spec/egress.md` 2 to 6).
//!
//! ADD sends three batches, as for the pod's main interface: the veth, the host's side, the pod's side. Everything that it
//! makes hangs on the veth, so that undoing it is to delete that. DEL asks small questions only; the one list is that of the
//! address's connections.

use super::{Host, netfilter};
use crate::error::{Context, Error, List, Result};
use crate::model::naming::NFT_TABLE;
use crate::model::net::{Family, Link};
use crate::netlink::netns::Namespace;
use crate::netlink::{Request, Socket, addr, link, neigh, nft, nft_outline, route, sysctl, xtables};
use crate::plan::egress::{self, Egress, Removal, SNAT_CHAIN};
use std::net::IpAddr;
use std::os::fd::AsFd;

/// How many names the host's end may be given.
const NAMES_MAX: u32 = 10;
/// How often a removal is tried while others change the packet filter.
const REMOVALS_MAX: usize = 5;

impl Host {
    /// An error unless the daemon's rules for this family are there: without them a pod's packets would leave with an
    /// address that means nothing outside.
    pub fn require_egress_rules(&mut self, family: Family) -> Result<()> {
        if nft::has_chain(netfilter(&mut self.netfilter, &self.namespace)?, family, NFT_TABLE, SNAT_CHAIN)? {
            return Ok(());
        }
        let (table, setting) =
            if family == Family::V4 { ("ip", "ENABLE_V4_EGRESS") } else { ("ip6", "ENABLE_V6_EGRESS") };
        Err(Error::new(format!(
            "the daemon's rules are missing (table {table} {NFT_TABLE}, chain {SNAT_CHAIN}): it has to run with {setting} once"
        )))
    }

    /// Wires the pod up and says what the host's end is called. A veth of the name that the pod has from before is replaced; on
    /// failure what this call made is gone again.
    pub fn add_egress(&mut self, egress: &Egress, netns: &Namespace) -> Result<String> {
        let mut inside = Socket::route_in(netns)?;
        let outer = self.egress_veth(egress, netns, &mut inside)?;
        match self.wire_egress(egress, &outer, netns, &mut inside) {
            Ok(()) => Ok(outer.name),
            Err(error) => Err(match self.route.run(&[link::delete(outer.index).or_not_found()]) {
                Ok(()) => error,
                Err(also) => Error::new(format!("{error}; undo: {also}")),
            }),
        }
    }

    fn egress_veth(&mut self, egress: &Egress, netns: &Namespace, inside: &mut Socket) -> Result<Link> {
        let inner = egress::interface(egress.family);
        for attempt in 0..NAMES_MAX {
            let name = egress::host_veth(egress.number.wrapping_add(attempt));
            let veth = link::Veth {
                // Not up before its sysctls are written.
                up: false,
                end: link::End { name: &name, mac: Some(egress.host_mac), netns: None },
                peer: link::End { name: inner, mac: Some(egress.pod_mac), netns: Some(netns.as_fd()) },
                mtu: egress.mtu,
            };
            if let Some(link) = self.create_veth(&veth)? {
                return Ok(link);
            }
            remove_inner(inside, inner)?;
        }
        Err(Error::new(format!("create the veth of {inner}: {NAMES_MAX} names are in use")))
    }

    fn wire_egress(&mut self, egress: &Egress, outer: &Link, netns: &Namespace, inside: &mut Socket) -> Result<()> {
        let v6 = egress.family == Family::V6;
        let dev = outer.parent.ok_or_else(|| Error::new(format!("{:?} shows no other end", outer.name)))?;
        if !v6 {
            let forwarding = self.inside(|| sysctl::set("net/ipv4/ip_forward", "1"))?;
            forwarding.context("could not enable IP forwarding")?;
        }
        self.inside(|| host_sysctls(&outer.name, v6))??;
        let end = egress.host_end(&outer.name);
        let gateway = end.address(outer.index);
        let gateway = if v6 { addr::add(&gateway) } else { addr::add_for_link(&gateway) };
        // Somebody who keeps the end as its note says may have been faster.
        let gateway = gateway.or_exists();
        let requests = [
            // The daemon keeps the end as this says. Before the link is up: then it would count as a change, for which the
            // kernel looks at every IPv6 route there is.
            link::set_alias(outer.index, &end.alias()),
            gateway,
            link::set_up(outer.index),
            // An address has one owner at a time: what leads elsewhere is the route of an earlier one, whose veth is dying.
            route::replace(&end.route(outer.index)),
        ];
        self.route.run(&requests).context("failed to add route on host")?;
        if v6 {
            netns.run(pod_sysctls)??;
        }
        inside.run(&pod_side(egress, dev)).with_context(|| format!("in {}", netns.path().display()))?;
        if v6 {
            super::pod::settled(inside, egress.address.addr(), egress::interface(egress.family))?;
            // Last, so that there is nothing to undo: the main interface of the pod must not compete.
            netns.run(|| sysctl::set(&format!("net/ipv6/conf/{}/disable_ipv6", egress.main), "1"))??;
        }
        Ok(())
    }

    /// Takes away what there is of a pod, in both families: as much as possible, and every failure told. `netns` is the pod's
    /// namespace if it still can be opened.
    pub fn del_egress(&mut self, removals: &[Removal], netns: Option<&Namespace>) -> Result<()> {
        let mut errors = List::new();
        // The pod's end first: host's end, addresses and routes go with it.
        if let Some(netns) = netns
            && let Some(mut inside) = errors.note(Socket::route_in(netns))
        {
            for removal in removals {
                errors.note(remove_inner(&mut inside, egress::interface(removal.family)));
            }
        }
        for removal in removals {
            for address in &removal.addresses {
                errors.note(self.remove_outer(*address));
                self.forget_connections(*address);
            }
            errors.note(self.remove_chain(removal));
        }
        errors.into_result()
    }

    /// The host's end by the address that it leads to, where the pod's namespace could not be entered.
    fn remove_outer(&mut self, address: IpAddr) -> Result<()> {
        let Some(route) = route::lookup(&mut self.route, address, None, 0, 0)? else { return Ok(()) };
        match link::by_index(&mut self.route, route.dev)? {
            Some(outer) if egress::is_host_end(&outer) => self.route.run(&[link::delete(outer.index).or_not_found()]),
            _ => Ok(()),
        }
    }

    /// The chain of one pod that the original made, in tables of `iptables-nft`.
    fn remove_chain(&mut self, removal: &Removal) -> Result<()> {
        let socket = netfilter(&mut self.netfilter, &self.namespace)?;
        for attempt in 1.. {
            let Some((generation, found)) =
                nft_outline::chain(socket, removal.family, "nat", &removal.chain, "POSTROUTING")?
            else {
                break;
            };
            match nft_outline::remove(socket, &[found], generation) {
                // Somebody else was faster, mostly with something else.
                Err(_) if attempt < REMOVALS_MAX => {}
                outcome => return outcome,
            }
        }
        Ok(())
    }

    /// Whether such a chain is in `iptables-legacy`, where only an operator can remove it safely.
    pub fn has_legacy_chain(&self, removal: &Removal) -> Result<bool> {
        let chains = self.inside(|| xtables::chains(removal.family, "nat"))??;
        Ok(chains.contains(&removal.chain))
    }
}

/// The pod's side in order. The address comes before routes that name it as their source.
fn pod_side(egress: &Egress, dev: u32) -> Vec<Request> {
    let mut requests = vec![addr::add(&egress.pod_address(dev)), link::set_up(dev)];
    requests.extend(egress.pod_routes(dev).iter().map(|route| match egress.family {
        Family::V4 => route::add(route),
        // A default route by the main interface, from an advertisement say, leads nowhere from now on.
        Family::V6 => route::replace(route),
    }));
    requests.push(neigh::add(&egress.pod_neighbour(dev)));
    requests
}

/// Deletes the pod's end of an earlier ADD; anything else of the name is an error.
fn remove_inner(inside: &mut Socket, name: &str) -> Result<()> {
    match link::by_name(inside, name)? {
        None => Ok(()),
        Some(link) if link.kind.as_deref() == Some("veth") => {
            inside.run(&[link::delete(link.index).or_not_found()]).with_context(|| format!("remove {name} of the pod"))
        }
        Some(_) => Err(Error::new(format!("interface {name:?} already exists in the pod and is no veth"))),
    }
}

/// A pod must not be able to redirect the host. A kernel without IPv6 has none of them.
fn host_sysctls(name: &str, v6: bool) -> Result<()> {
    let keys = ["accept_ra", "accept_redirects", "accept_dad"];
    for key in &keys[..if v6 { 3 } else { 2 }] {
        match sysctl::set(&format!("net/ipv6/conf/{name}/{key}"), "0") {
            Err(error) if v6 && !sysctl::missing(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Duplicate detection would only cost two seconds: the address is the node's to give, and given once.
fn pod_sysctls() -> Result<()> {
    let name = egress::interface(Family::V6);
    for (name, key, value) in [
        ("lo", "disable_ipv6", "0"),
        (name, "disable_ipv6", "0"),
        (name, "keep_addr_on_down", "1"),
        (name, "accept_dad", "0"),
    ] {
        sysctl::set(&format!("net/ipv6/conf/{name}/{key}"), value)?;
    }
    Ok(())
}
