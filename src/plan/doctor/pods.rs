//! Pod by pod: the host's end of its veth, the way to it, and what its own namespace holds.

use super::{Finding, single};
use crate::model::map::{Map, Set};
use crate::model::naming;
use crate::model::net::{Family, Link, Mac, Route, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::plan::branch::{self, Branch, is_vlan};
use crate::plan::egress;
use crate::plan::host::{Action, HostBranch, HostPod, Intent, Observation, wiring};
use crate::plan::pod::inside::{Mend, flaws};
use crate::plan::pod::{Pod, PodBranch, PodInterface, Side};
use ipnet::IpNet;
use std::net::IpAddr;

/// Interfaces of one pod, at most: ENIs that a multi-card instance gives one pod.
const INTERFACES_MAX: usize = 16;

/// A namespace that was looked into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Its path.
    pub path: String,
    /// Device and inode: the path may be another one's later.
    pub id: (u64, u64),
    /// What it holds.
    pub side: Side,
}

/// Where a change is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// On the host.
    Host,
    /// In the namespace of this number.
    Inside(usize),
}

/// What was found of all pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The findings.
    pub findings: Vec<Finding>,
    /// What mends them, with the place.
    pub mends: Vec<(Place, Mend)>,
    /// Pods whose namespace was not among those looked into.
    pub hidden: usize,
}

/// Where a pod's network stands: its host link, and its namespace with the link there.
pub struct Seat<'a> {
    /// The host's end.
    pub outer: Option<&'a Link>,
    /// Number of the namespace, and the pod's end.
    pub inner: Option<(usize, &'a Link)>,
}

/// All links of pods, found once: a node has a thousand.
pub struct Seats<'a> {
    by_suffix: Map<&'a str, &'a Link>,
    by_address: Map<IpAddr, &'a Link>,
    inner: Map<u32, (usize, &'a Link)>,
}

impl<'a> Seats<'a> {
    /// From the host and the namespaces.
    pub fn new(seen: &'a Observation, namespaces: &'a [Inside]) -> Self {
        let veths = seen.links.iter().filter(|link| link.kind.as_deref() == Some("veth"));
        let indexes = veths.clone().map(|link| (link.index, link)).gather::<Map<_, _>>();
        let suffix = |link: &'a Link| Some((link.name.get(link.name.len().checked_sub(naming::SUFFIX_LEN)?..)?, link));
        let routes = seen.routes.iter().filter(|route| route.table == TABLE_MAIN && route.gateway.is_none());
        let by_address = routes.filter_map(|route| Some((single(route.dst)?, *indexes.get(&route.dev)?))).gather();
        let mut inner = Map::new();
        for (number, namespace) in namespaces.iter().enumerate() {
            for link in namespace.side.links.iter().filter(|link| link.kind.as_deref() == Some("veth")) {
                // The other end is on this host only if that one names this one too.
                let outer =
                    link.parent.filter(|outer| indexes.get(outer).is_some_and(|o| o.parent == Some(link.index)));
                if let Some(outer) = outer {
                    // The first wins: a namespace nested in a pod may name the same numbers by chance.
                    inner.entry(outer).or_insert((number, link));
                }
            }
        }
        let first = |link: &'a Link| {
            let name = naming::name_of_veth_alias(&link.alias)?;
            Some((name.get(name.len().checked_sub(naming::SUFFIX_LEN)?..)?, link))
        };
        // The name that it has counts more than one that it had.
        let by_suffix = veths.clone().filter_map(first).chain(veths.filter_map(suffix)).gather();
        Seats { by_suffix, by_address, inner }
    }

    /// Where addresses are: index of the host's end, and number of the namespace.
    fn holders(&self, namespaces: &[Inside]) -> Map<IpAddr, Vec<(u32, usize)>> {
        let mut holders = Map::<_, Vec<_>>::new();
        for (outer, (number, link)) in &self.inner {
            let addresses = namespaces[*number].side.addresses.iter().filter(|address| address.dev == link.index);
            for address in addresses {
                holders.entry(address.addr.addr()).or_default().push((*outer, *number));
            }
        }
        holders
    }

    /// Of the pod with these last digits of its veth's name and this address.
    pub fn of(&self, veth: &str, address: IpAddr) -> Seat<'a> {
        let outer = self.by_suffix.get(veth).or_else(|| self.by_address.get(&address)).copied();
        Seat { outer, inner: outer.and_then(|outer| self.inner.get(&outer.index).copied()) }
    }
}

/// An address of a pod, on an ENI of the node or on a branch ENI of its own.
struct Wired<'a> {
    address: IpAddr,
    table: u32,
    name: &'a str,
    veth: &'a str,
    branch: Option<Branch>,
}

/// A route without scope and metric: for IPv6 the kernel keeps no scope and sets a metric of its own.
type Way = (u32, IpNet, Option<IpAddr>, u32);

fn way(route: &Route) -> Way {
    (route.table, route.dst, route.gateway, route.dev)
}

/// What the host has, arranged for look-ups.
struct Known<'a> {
    links: &'a [Link],
    ways: Set<Way>,
}

/// Looks at every pod of the intent, or only at the one of this name. `mtu` is that of pods, in bytes.
pub fn pods(intent: &Intent, seen: &Observation, namespaces: &[Inside], mtu: u32, only: Option<&str>) -> Found {
    let seats = Seats::new(seen, namespaces);
    let host = Known { links: &seen.links, ways: seen.routes.iter().map(way).gather() };
    let holders = seats.holders(namespaces);
    let (mut found, mut names) = (Found::default(), Map::new());
    let plain = intent.pods.iter().map(|pod| {
        let HostPod { address, table, name, veth } = pod;
        Wired { address: *address, table: *table, name, veth, branch: None }
    });
    let branches = intent.branches.iter().map(|pod| {
        let HostBranch { address, eni, name, veth } = pod;
        Wired { address: *address, table: eni.table, name, veth, branch: Some(*eni) }
    });
    for pod in plain.chain(branches).filter(|pod| only.is_none_or(|only| only == pod.name)) {
        if let Some(eni) = pod.branch.filter(|eni| !seen.links.iter().any(|l| l.name == eni.device() && is_vlan(l))) {
            let mut finding = Finding::new("branch-link", pod.name, format!("VLAN device {} is missing", eni.device()));
            // Where it can be made again the host's plan says so.
            finding.mendable = false;
            found.findings.push(finding);
        }
        one(intent, &pod, &seats, &host, namespaces, mtu, &mut found);
        let Seat { outer, inner } = seats.of(pod.veth, pod.address);
        names.extend(inner.map(|(number, _)| (number, pod.name)));
        let others = holders.get(&pod.address).into_iter().flatten();
        for (_, number) in others.filter(|at| outer.is_some_and(|outer| outer.index != at.0)) {
            let text = format!("{} is also in {}", pod.address, namespaces[*number].path);
            found.findings.push(Finding::new("address-twice", pod.name, text));
        }
    }
    egress_ways(seen, &names, &seats, namespaces, &mut found);
    found
}

/// The ways of pods in the other family that no alias tells of: what leads to them tells their own side. Ends with an alias are the
/// host's plan's, which alone knows the one that counts of several with an address.
fn egress_ways(
    seen: &Observation,
    names: &Map<usize, &str>,
    seats: &Seats<'_>,
    namespaces: &[Inside],
    found: &mut Found,
) {
    let bare =
        |link: &&Link| egress::is_host_veth(&link.name, link.kind.as_deref()) && egress::HostEnd::of(link).is_none();
    let told = seen.links.iter().filter_map(|link| Some(egress::HostEnd::of(link)?.pod)).gather::<Set<_>>();
    for outer in seen.links.iter().filter(bare) {
        let Some((number, inner)) = seats.inner.get(&outer.index) else { continue };
        let addresses = namespaces[*number].side.addresses.iter().filter(|address| address.dev == inner.index);
        let addresses = addresses.map(|address| address.addr.addr());
        let addresses = addresses.filter(|address| egress::range(Family::of(*address)).contains(address));
        let addresses = addresses.collect::<Vec<_>>();
        let mut note = |text: String, mend: Mend| {
            let name = names.get(number).copied().unwrap_or_default();
            found.findings.push(Finding::new("egress-way", name, text));
            found.mends.push((Place::Host, mend));
        };
        // The plugin `bridge` names its ends like that too.
        if !addresses.is_empty() && !outer.works() {
            note(format!("{} {}", outer.name, outer.fault().0), Mend::Up(outer.index));
        }
        for address in addresses {
            let route = branch::link_route(TABLE_MAIN, address, outer.index);
            // One over another link is of the address's next owner.
            let leads = || seen.routes.iter().any(|there| (there.table, there.dst) == (TABLE_MAIN, route.dst));
            if !told.contains(&address) && !leads() {
                note(format!("route {address} dev {} is missing", outer.name), Mend::Route(route));
            }
        }
    }
}

/// For CHECK: everything of one pod's network that is missing or wrong, a line each, with no more known than its cached result
/// tells. What later plugins of the chain may change (MTU, the pod's MAC, more addresses and routes) is not looked at.
pub fn check(pod: &Pod, host: &Side, inside: &Side) -> Vec<String> {
    let Side { links, addresses, routes, rules, neighbours } = host.clone();
    let mut seen = Observation { links, addresses, routes, neighbours, rules, ..Observation::default() };
    let mut intent = Intent::default();
    for PodInterface { host_veth, ifname, address, table, branch, .. } in &pod.interfaces {
        let inner = inside.links.iter().find(|link| link.name == *ifname);
        seen.peers.extend(inner.and_then(|inner| Some((inner.parent?, inner.mac?))));
        let (prefix, veth) =
            host_veth.split_at_checked(host_veth.len().saturating_sub(naming::SUFFIX_LEN)).unwrap_or_default();
        let (address, veth, name) = (*address, veth.to_owned(), format!("{}/{}", pod.namespace, pod.name));
        intent.v6 = address.is_ipv6();
        intent.veth_prefix = prefix.into();
        match branch {
            Some(PodBranch { eni, .. }) => intent.branches.push(HostBranch { address, eni: *eni, name, veth }),
            None => intent.pods.push(HostPod { address, table: *table, name, veth }),
        }
    }
    let mut steps = wiring(&intent, &seen);
    steps.retain(|step| !matches!(step.action, Action::SetMtu(..)));
    let mut findings = super::told(&intent, &seen, &steps);
    let known = findings.iter().map(|finding| finding.name).gather::<Set<_>>();
    let more = pods(&intent, &seen, &[], 0, None).findings.into_iter();
    findings.extend(more.filter(|finding| finding.name != "pod-mtu" && !known.contains(finding.name)));
    let mut lines = findings.iter().map(|finding| format!("{}: {}", finding.name, finding.seen)).collect::<Vec<_>>();
    for (number, interface) in pod.interfaces.iter().enumerate() {
        let outer = host.links.iter().find(|link| link.name == interface.host_veth);
        lines.extend(flaws(number, interface, outer, &pod.netns, inside).into_iter().map(|flaw| flaw.text));
    }
    lines
}

fn one(
    intent: &Intent,
    pod: &Wired<'_>,
    seats: &Seats<'_>,
    host: &Known<'_>,
    namespaces: &[Inside],
    mtu: u32,
    found: &mut Found,
) {
    let seat = seats.of(pod.veth, pod.address);
    let mut note = |name, text: String, at: Place, mend: Option<Mend>| {
        found.findings.push(told_of(name, pod.name, text, mend.is_some()));
        found.mends.extend(mend.map(|mend| (at, mend)));
    };
    let Some(outer) = seat.outer else {
        return note("pod-veth", format!("{} is given out, and no veth leads to it", pod.address), Place::Host, None);
    };
    if let Some(name) = misnamed(intent, pod, outer) {
        note(name, format!("{} instead of {}{}", outer.name, intent.veth_prefix, pod.veth), Place::Host, None);
    }
    if let Some(master) = outer.master {
        let name = host.links.iter().find(|link| link.index == master).map_or("?", |link| link.name.as_str());
        note("pod-enslaved", format!("{} is a part of {name}", outer.name), Place::Host, None);
    }
    if !outer.works() {
        note("pod-link", format!("{} {}", outer.name, outer.fault().0), Place::Host, Some(Mend::Up(outer.index)));
    }
    let Some((number, interface)) = interface(pod, outer, seat.inner.map(|(_, link)| link), mtu) else { return };
    let route = interface.host_route(outer.index);
    if !host.ways.contains(&way(&route)) {
        let text = format!("route {} dev {} scope link is missing", pod.address, outer.name);
        note("pod-route", text, Place::Host, Some(Mend::Route(route)));
    }
    let inner = seat.inner.map(|(number, link)| (Place::Inside(number), link));
    // What it was made with counts for its life. One that the original has made does not tell: two ends that agree are right,
    // and a single one is not judged.
    let agree = seat.inner.is_none_or(|(_, link)| link.mtu == outer.mtu);
    let mtu = naming::of_veth_alias(&outer.alias).map_or(if agree { outer.mtu } else { mtu }, |(_, mtu)| mtu);
    for (place, link) in [(Place::Host, outer)].into_iter().chain(inner) {
        let host = place == Place::Host;
        // A later plugin of the chain (tuning) may have given the pod's end less, as CHECK knows.
        if link.mtu > mtu || (host && link.mtu < mtu) {
            let text = format!("{} has {} instead of {mtu}", link.name, link.mtu);
            let name = if host { "pod-mtu" } else { "inside-mtu" };
            note(name, text, place, Some(Mend::Mtu(link.index, mtu)));
        }
    }
    let Some((at, _)) = seat.inner else {
        found.hidden += 1;
        return;
    };
    let Inside { path, side, .. } = &namespaces[at];
    for flaw in flaws(number, &interface, Some(outer), path, side) {
        note(flaw.name, flaw.text, Place::Inside(at), flaw.mend);
    }
}

fn told_of(name: &'static str, pod: &str, text: String, mended: bool) -> Finding {
    let mut finding = Finding::new(name, pod, text);
    finding.mendable &= mended;
    if name == "veth-name" {
        return finding.mended_by("delete the pod, or free the name; the rename comes from a udev rule or .link file");
    }
    finding
}

// Where the name is free, the host's plan gives it back.
fn misnamed(intent: &Intent, pod: &Wired<'_>, outer: &Link) -> Option<&'static str> {
    let prefixes = [intent.veth_prefix.as_str(), naming::VLAN_PREFIX];
    let fitting = &prefixes[..if pod.branch.is_some() { 2 } else { 1 }];
    let fits = pod.veth.is_empty() || fitting.iter().any(|prefix| outer.name.strip_suffix(pod.veth) == Some(*prefix));
    (!fits).then_some(if outer.name.ends_with(pod.veth) { "veth-prefix" } else { "veth-name" })
}

// The number of the pod's interface and what it should be.
fn interface(pod: &Wired<'_>, outer: &Link, inner: Option<&Link>, mtu: u32) -> Option<(usize, PodInterface)> {
    let (namespace, name) = pod.name.split_once('/').unwrap_or_default();
    let number = (0..INTERFACES_MAX).find(|number| naming::suffix(namespace, name, *number) == pod.veth).unwrap_or(0);
    let strict = outer.name.starts_with(naming::VLAN_PREFIX);
    Some((
        number,
        PodInterface {
            host_veth: outer.name.clone(),
            ifname: inner.map_or_else(|| naming::container_veth("eth0", number), |link| link.name.clone()),
            address: pod.address,
            gateway: naming::gateway(pod.address.is_ipv6(), number).ok()?,
            table: pod.table,
            mtu,
            host_mac: Mac::default(),
            branch: pod.branch.map(|eni| PodBranch { eni, parent: 0, strict }),
        },
    ))
}
