//! A pod's network as a value (`spec/plugin.md` 6, 7, 9, 10, 12, 13): what ADD makes, what CHECK expects, what DEL removes,
//! also when only a cached CNI result is left to know it from. Pure; `apply` carries it out.

use crate::error::{Context, Error, Result};
use crate::model::cni::{IpConfig, Output};
use crate::model::naming::{self, normal_table, priority};
use crate::model::net::{Address, Link, Mac, Neighbour, Route, Rule, Scope, TABLE_MAIN};
use crate::model::wire::{AddNetworkReply, DelNetworkReply, IpAllocation};
use ipnet::IpNet;
use std::net::IpAddr;

/// What the runtime and the configuration say about the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Path of the pod's network namespace; may be empty in DEL.
    pub netns: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// Prefix of host veths, at most 4 bytes.
    pub veth_prefix: String,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
}

/// A pod's network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Path of the pod's network namespace.
    pub netns: String,
    /// Its interfaces in the order of the daemon's reply; the position is the interface's number.
    pub interfaces: Vec<PodInterface>,
}

/// One veth pair and what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInterface {
    /// Name of the host's end.
    pub host_veth: String,
    /// Name of the pod's end.
    pub ifname: String,
    /// The pod's address, /32 or /128.
    pub address: IpAddr,
    /// What the pod sends everything to; nobody owns it, a static neighbour entry answers.
    pub gateway: IpAddr,
    /// Route table of the address's ENI; main for the primary ENI.
    pub table: u32,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
    /// MAC of the host's end. Only ADD uses it.
    pub host_mac: Mac,
}

impl Pod {
    /// The network that the daemon's reply asks for. `random` gives six fresh bytes for each host MAC.
    pub fn from_reply(
        reply: &AddNetworkReply,
        request: &Request,
        mut random: impl FnMut() -> Result<[u8; 6]>,
    ) -> Result<Pod> {
        if reply.pod_vlan_id != 0 {
            return Err(Error::new(format!("pods on a branch ENI (VLAN {}) are not supported", reply.pod_vlan_id)));
        }
        if reply.allocations.is_empty() {
            return Err(Error::new("the daemon's reply has no address"));
        }
        let interfaces = reply.allocations.iter().enumerate().map(|(number, allocation)| {
            let address = address_of(allocation)?
                .ok_or_else(|| Error::new(format!("the daemon's reply has no address for interface {number}")))?;
            interface(request, number, address, normal_table(allocation.route_table_id), host_mac(random()?))
        });
        Ok(Pod {
            namespace: request.namespace.clone(),
            name: request.name.clone(),
            netns: request.netns.clone(),
            interfaces: interfaces.collect::<Result<_>>()?,
        })
    }

    /// The network that a cached result tells of, for CHECK.
    pub fn from_previous(previous: &Output, request: &Request) -> Result<Pod> {
        let known = interfaces_of(previous, request)?;
        if known.is_empty() {
            return Err(Error::new(format!(
                "the previous result has no interface {:?} with an address",
                request.ifname
            )));
        }
        let interfaces = known
            .into_iter()
            .map(|(number, address, table)| interface(request, number, address, normal_table(table), Mac::default()));
        Ok(Pod {
            namespace: request.namespace.clone(),
            name: request.name.clone(),
            netns: request.netns.clone(),
            interfaces: interfaces.collect::<Result<_>>()?,
        })
    }
}

fn interface(request: &Request, number: usize, address: IpAddr, table: u32, host_mac: Mac) -> Result<PodInterface> {
    Ok(PodInterface {
        host_veth: naming::host_veth(&request.veth_prefix, &request.namespace, &request.name, number)?,
        ifname: naming::container_veth(&request.ifname, number),
        address,
        gateway: naming::gateway(address.is_ipv6(), number)?,
        table,
        mtu: request.mtu,
        host_mac,
    })
}

/// A unicast, locally administered MAC of random bytes. 46 bits need no look at the other links' MACs.
pub fn host_mac(mut random: [u8; 6]) -> Mac {
    random[0] = (random[0] | 0x02) & 0xfe;
    Mac(random)
}

fn address_of(allocation: &IpAllocation) -> Result<Option<IpAddr>> {
    let text = if allocation.ipv4.is_empty() { &allocation.ipv6 } else { &allocation.ipv4 };
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).with_context(|| format!("address {text:?} of the daemon's reply"))
}

impl PodInterface {
    /// The address as a /32 or /128.
    pub fn host_net(&self) -> IpNet {
        IpNet::from(self.address)
    }

    /// Host: the way to the pod, in main.
    pub fn host_route(&self, host_dev: u32) -> Route {
        link_route(TABLE_MAIN, self.address, host_dev)
    }

    /// Host: traffic to the pod looks in main before any mark or ENI table has a say.
    pub fn to_rule(&self) -> Rule {
        Rule::to(self.host_net(), priority::TO_POD, TABLE_MAIN)
    }

    /// Host: traffic of the pod leaves by its own ENI; none for the primary ENI, which main serves.
    pub fn from_rule(&self) -> Option<Rule> {
        (self.table != TABLE_MAIN).then(|| Rule::from(self.host_net(), priority::FROM_POD, self.table))
    }

    /// Pod: the table that interface `number` uses there.
    fn inner_table(number: usize) -> u32 {
        u32::try_from(number).ok().filter(|number| *number > 0).unwrap_or(TABLE_MAIN)
    }

    /// Pod: the gateway on the link, then the default route through it.
    pub fn pod_routes(&self, number: usize, pod_dev: u32) -> [Route; 2] {
        let gateway = link_route(Self::inner_table(number), self.gateway, pod_dev);
        let dst = if self.address.is_ipv4() {
            IpNet::V4(ipnet::Ipv4Net::default())
        } else {
            IpNet::V6(ipnet::Ipv6Net::default())
        };
        [gateway, Route { dst, gateway: Some(self.gateway), scope: Scope::Universe, ..gateway }]
    }

    /// Pod: the second interface and on answer from the address they were asked at.
    pub fn pod_rule(&self, number: usize) -> Option<Rule> {
        (number > 0).then(|| Rule::from(self.host_net(), priority::INSIDE_POD, Self::inner_table(number)))
    }

    /// Pod: its address.
    pub fn pod_address(&self, pod_dev: u32) -> Address {
        // The daemon gives an address to one pod only: duplicate detection would only make it wait.
        let no_dad = self.address.is_ipv6();
        Address { dev: pod_dev, addr: self.host_net(), no_prefix_route: false, no_dad }
    }

    /// Pod: the gateway's hardware address is the host end's.
    pub fn pod_neighbour(&self, pod_dev: u32, host_mac: Mac) -> Neighbour {
        Neighbour { dev: pod_dev, addr: self.gateway, mac: Some(host_mac), permanent: true }
    }
}

/// `<address> dev <link> scope link` in `table`.
pub fn link_route(table: u32, to: IpAddr, dev: u32) -> Route {
    Route { table, dst: IpNet::from(to), gateway: None, dev, scope: Scope::Link, prefsrc: None, metric: 0 }
}

/// Number, address and route table number of each of our interfaces in a cached result (`spec/plugin.md` 10.1). An error
/// says why the result cannot be used.
fn interfaces_of(previous: &Output, request: &Request) -> Result<Vec<(usize, IpAddr, i32)>> {
    let name = naming::dummy(&request.namespace, &request.name);
    let dummy = previous
        .interfaces
        .iter()
        .find(|interface| interface.name == name)
        .ok_or_else(|| Error::new(format!("the previous result has no entry {name:?}")))?;
    let vlan = dummy.mac.parse::<u32>().with_context(|| format!("VLAN {:?} of entry {name:?}", dummy.mac))?;
    if vlan != 0 {
        return Err(Error::new(format!("the previous result is of a pod on a branch ENI (VLAN {vlan})")));
    }
    let device =
        dummy.sandbox.parse::<u32>().with_context(|| format!("device {:?} of entry {name:?}", dummy.sandbox))?;
    let mut table = i32::try_from(naming::table_of(0, device)?).context("route table of the previous result")?;
    let mut found = Vec::new();
    for (position, interface) in previous.interfaces.iter().enumerate() {
        let Some(number) = interface_number(&interface.name, &request.ifname) else { continue };
        let here = |ip: &&IpConfig| ip.interface.and_then(|index| usize::try_from(index).ok()) == Some(position);
        let mut addresses = previous.ips.iter().filter(here);
        let (Some(ip), None) = (addresses.next(), addresses.next()) else { continue };
        // The "MAC" of a container interface is its route table (`spec/plugin.md` 12); it also counts for those after it.
        if !interface.mac.is_empty() {
            table = interface
                .mac
                .parse()
                .with_context(|| format!("route table {:?} of interface {:?}", interface.mac, interface.name))?;
        }
        found.push((number, ip.address.addr(), table));
    }
    Ok(found)
}

fn interface_number(name: &str, ifname: &str) -> Option<usize> {
    if name == ifname {
        return Some(0);
    }
    name.strip_prefix("mNicIf")?.parse().ok().filter(|number| (1..usize::from(u8::MAX)).contains(number))
}

/// What DEL takes away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Addresses whose rules, routes, connections and neighbour entries go.
    pub addresses: Vec<RemovedAddress>,
    /// Pairs (host end, pod end) that the sandbox may still have. They are deleted only when the two are proven to be the
    /// ends of one veth, the pod's end inside the very sandbox: a new pod of the same name owns the same host name.
    pub veths: Vec<(String, String)>,
}

/// An address to clean up after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemovedAddress {
    /// The address.
    pub address: IpAddr,
    /// The table its `from` rule leads to: main means that it has none, 0 that it may be any.
    pub table: u32,
}

impl Removal {
    /// From the daemon's reply. Entries without an address are passed over.
    pub fn from_reply(reply: &DelNetworkReply, request: &Request) -> Result<Removal> {
        let mut removal = Removal::default();
        for (number, allocation) in reply.allocations.iter().enumerate() {
            if let Some(address) = address_of(allocation)? {
                removal.push(request, number, address, allocation.route_table_id)?;
            }
        }
        Ok(removal)
    }

    /// From a cached result, when the daemon cannot tell. An error says why it is of no use.
    pub fn from_previous(previous: &Output, request: &Request) -> Result<Removal> {
        let mut removal = Removal::default();
        for (number, address, table) in interfaces_of(previous, request)? {
            removal.push(request, number, address, table)?;
        }
        Ok(removal)
    }

    fn push(&mut self, request: &Request, number: usize, address: IpAddr, table: i32) -> Result<()> {
        // Unlike in ADD, 0 is "any table" here; 1 is main in the numbering of old versions (`spec/plugin.md` 13.5).
        let table = if table == 0 { 0 } else { normal_table(table) };
        self.addresses.push(RemovedAddress { address, table });
        let veth = naming::host_veth(&request.veth_prefix, &request.namespace, &request.name, number)?;
        self.veths.push((veth, naming::container_veth(&request.ifname, number)));
        Ok(())
    }
}

/// What one network namespace holds, as far as CHECK looks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// Links.
    pub links: Vec<Link>,
    /// Addresses.
    pub addresses: Vec<Address>,
    /// Routes.
    pub routes: Vec<Route>,
    /// Rules.
    pub rules: Vec<Rule>,
    /// Neighbour entries.
    pub neighbours: Vec<Neighbour>,
}

/// Everything of the pod's network that is missing or wrong, a line each. What later plugins of the chain may change (MTU,
/// the pod's MAC, more addresses and routes) is not looked at.
pub fn check(pod: &Pod, host: &Side, inside: &Side) -> Vec<String> {
    let mut lines = Vec::new();
    for (number, interface) in pod.interfaces.iter().enumerate() {
        let outer = check_host(interface, host, &mut lines);
        check_inside(number, interface, outer, &pod.netns, inside, &mut lines);
    }
    lines
}

fn check_host<'a>(interface: &PodInterface, host: &'a Side, lines: &mut Vec<String>) -> Option<&'a Link> {
    let link = host.links.iter().find(|link| link.name == interface.host_veth);
    match link {
        None => lines.push(format!("host interface {:?} is missing", interface.host_veth)),
        Some(link) => {
            if !link.up {
                lines.push(format!("host interface {:?} is down", interface.host_veth));
            }
            if !has_route(host, &interface.host_route(link.index)) {
                lines.push(format!("host route {} dev {} is missing", interface.address, interface.host_veth));
            }
        }
    }
    let from = interface.from_rule();
    for rule in [Some(interface.to_rule()), from.clone()].into_iter().flatten() {
        if !host.rules.contains(&rule) {
            lines.push(format!("rule \"{rule}\" is missing"));
        }
    }
    for rule in &host.rules {
        let rival = *rule == Rule::from(interface.host_net(), priority::FROM_POD, rule.table);
        if rival && Some(rule) != from.as_ref() {
            lines.push(format!("rule \"{rule}\" sends the pod's traffic to another table"));
        }
    }
    link
}

fn check_inside(
    number: usize,
    interface: &PodInterface,
    outer: Option<&Link>,
    netns: &str,
    inside: &Side,
    lines: &mut Vec<String>,
) {
    let name = &interface.ifname;
    let Some(link) = inside.links.iter().find(|link| link.name == *name) else {
        lines.push(format!("interface {name:?} is missing in {netns}"));
        return;
    };
    if !link.up {
        lines.push(format!("interface {name:?} is down"));
    }
    if outer.is_some_and(|outer| !pair(outer, link)) {
        lines.push(format!("interface {name:?} is not the other end of {:?}", interface.host_veth));
    }
    let here = |address: &Address| address.dev == link.index && address.addr == interface.host_net();
    if !inside.addresses.iter().any(here) {
        lines.push(format!("address {} is missing on {name:?}", interface.host_net()));
    }
    for route in interface.pod_routes(number, link.index) {
        if !has_route(inside, &route) {
            let text = route.to_string().replace(&format!("dev if{}", link.index), &format!("dev {name}"));
            lines.push(format!("route {text} is missing in the pod"));
        }
    }
    if let Some(rule) = interface.pod_rule(number)
        && !inside.rules.contains(&rule)
    {
        lines.push(format!("rule \"{rule}\" is missing in the pod"));
    }
    let neighbour = inside.neighbours.iter().find(|entry| entry.dev == link.index && entry.addr == interface.gateway);
    match (neighbour.filter(|entry| entry.permanent).and_then(|entry| entry.mac), outer.and_then(|outer| outer.mac)) {
        (None, _) => lines.push(format!("neighbour {} is missing on {name:?}", interface.gateway)),
        (Some(mac), Some(wanted)) if mac != wanted => {
            lines.push(format!("neighbour {} is {mac} instead of {wanted}", interface.gateway));
        }
        _ => {}
    }
}

/// Whether two links, one of the host's and one of the pod's namespace, name each other as their other end.
pub fn pair(outer: &Link, inner: &Link) -> bool {
    let veth = |link: &Link| link.kind.as_deref() == Some("veth");
    veth(outer) && veth(inner) && outer.parent == Some(inner.index) && inner.parent == Some(outer.index)
}

fn has_route(side: &Side, wanted: &Route) -> bool {
    // Scope and metric are left out: for IPv6 the kernel keeps no scope and sets a metric of its own.
    side.routes.iter().any(|route| {
        (route.table, route.dst, route.gateway, route.dev) == (wanted.table, wanted.dst, wanted.gateway, wanted.dev)
    })
}

#[cfg(test)]
#[path = "pod_tests.rs"]
mod tests;
