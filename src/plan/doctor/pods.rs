//! Pod by pod: the host's end of its veth, the way to it, and what its own namespace holds.

use super::{Finding, single};
use crate::model::naming;
use crate::model::net::{Link, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::plan::host::{HostPod, Intent, Observation};
use crate::plan::pod::inside::{Mend, flaws};
use crate::plan::pod::{PodInterface, Side, has_route};
use std::collections::BTreeMap;

/// Digits at the end of a host veth's name.
const SUFFIX: usize = 11;
/// Interfaces of one pod, at most: ENIs that a multi-card instance gives one pod.
const INTERFACES_MAX: usize = 16;

/// A namespace that was looked into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Its path.
    pub path: String,
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
    by_suffix: BTreeMap<&'a str, &'a Link>,
    by_address: BTreeMap<std::net::IpAddr, &'a Link>,
    inner: BTreeMap<u32, (usize, &'a Link)>,
}

impl<'a> Seats<'a> {
    /// From the host and the namespaces.
    pub fn new(seen: &'a Observation, namespaces: &'a [Inside]) -> Self {
        let veths = seen.links.iter().filter(|link| link.kind.as_deref() == Some("veth"));
        let indexes = veths.clone().map(|link| (link.index, link)).gather::<BTreeMap<_, _>>();
        let suffix = |link: &'a Link| Some((link.name.get(link.name.len().checked_sub(SUFFIX)?..)?, link));
        let routes = seen.routes.iter().filter(|route| route.table == TABLE_MAIN && route.gateway.is_none());
        let by_address = routes.filter_map(|route| Some((single(route.dst)?, *indexes.get(&route.dev)?))).gather();
        let mut inner = BTreeMap::new();
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
        Seats { by_suffix: veths.filter_map(suffix).gather(), by_address, inner }
    }

    /// Of one pod.
    pub fn of(&self, pod: &HostPod) -> Seat<'a> {
        let outer = self.by_suffix.get(pod.veth.as_str()).or_else(|| self.by_address.get(&pod.address)).copied();
        Seat { outer, inner: outer.and_then(|outer| self.inner.get(&outer.index).copied()) }
    }
}

/// Looks at every pod of the intent, or only at the one of this name. `mtu` is that of pods, in bytes.
pub fn pods(intent: &Intent, seen: &Observation, namespaces: &[Inside], mtu: u32, only: Option<&str>) -> Found {
    let seats = Seats::new(seen, namespaces);
    let host = Side { routes: seen.routes.clone(), ..Side::default() };
    let mut found = Found::default();
    for pod in intent.pods.iter().filter(|pod| only.is_none_or(|only| only == pod.name)) {
        let seat = seats.of(pod);
        let mut note = |name, text: String, at: Place, mend: Option<Mend>| {
            let mut finding = Finding::new(name, pod.name.as_str(), text);
            finding.mendable &= mend.is_some();
            found.findings.push(finding);
            found.mends.extend(mend.map(|mend| (at, mend)));
        };
        let Some(outer) = seat.outer else {
            note("pod-veth", format!("{} is given out, and no veth leads to it", pod.address), Place::Host, None);
            continue;
        };
        let name = format!("{}{}", intent.veth_prefix, pod.veth);
        if !pod.veth.is_empty() && outer.name != name {
            note("veth-name", format!("{} instead of {name}", outer.name), Place::Host, None);
        }
        if !outer.up {
            note("veth-link", format!("{} is down", outer.name), Place::Host, Some(Mend::Up(outer.index)));
        }
        let Some(interface) = interface(pod, outer, seat.inner.map(|(_, link)| link), mtu) else { continue };
        let route = interface.1.host_route(outer.index);
        if !has_route(&host, &route) {
            let text = format!("route {} dev {} scope link is missing", pod.address, outer.name);
            note("host-route", text, Place::Host, Some(Mend::Route(route)));
        }
        let inner = seat.inner.map(|(number, link)| (Place::Inside(number), link));
        for (place, link) in [(Place::Host, outer)].into_iter().chain(inner) {
            if link.mtu != mtu {
                let text = format!("{} has {} instead of {mtu}", link.name, link.mtu);
                note("pod-mtu", text, place, Some(Mend::Mtu(link.index, mtu)));
            }
        }
        let Some((number, _)) = seat.inner else {
            found.hidden += 1;
            continue;
        };
        let namespace = &namespaces[number];
        for flaw in flaws(interface.0, &interface.1, Some(outer), &namespace.path, &namespace.side) {
            note(flaw.name, flaw.text, Place::Inside(number), flaw.mend);
        }
    }
    found
}

// The number of the pod's interface and what it should be.
fn interface(pod: &HostPod, outer: &Link, inner: Option<&Link>, mtu: u32) -> Option<(usize, PodInterface)> {
    let (namespace, name) = pod.name.split_once('/').unwrap_or_default();
    let number = (0..INTERFACES_MAX).find(|number| naming::suffix(namespace, name, *number) == pod.veth).unwrap_or(0);
    Some((
        number,
        PodInterface {
            host_veth: outer.name.clone(),
            ifname: inner.map_or_else(|| naming::container_veth("eth0", number), |link| link.name.clone()),
            address: pod.address,
            gateway: naming::gateway(pod.address.is_ipv6(), number).ok()?,
            table: pod.table,
            mtu,
            host_mac: crate::model::net::Mac::default(),
            branch: None,
        },
    ))
}
