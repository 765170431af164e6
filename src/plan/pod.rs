//! A pod's network as a value (`spec/plugin.md` 6, 7, 9, 10, 12, 13): what ADD makes, what CHECK expects, what DEL removes,
//! also when only a cached CNI result is left to know it from. Pure; `apply` carries it out.
//!
//! A pod has addresses of the node's ENIs, or one branch ENI of its own. The latter is wired in one of two ways: in strict
//! mode all its traffic passes the ENI, in standard mode the traffic of its own node does not.

pub mod inside;

use crate::error::{Context, Error, Result};
use crate::model::cni::{EnforcingMode, IpConfig, Output};
use crate::model::naming::{self, normal_table, priority};
use crate::model::net::{Address, Link, Mac, Neighbour, Route, Rule, Scope, TABLE_MAIN};
use crate::model::wire::{AddNetworkReply, DelNetworkReply, IpAllocation};
use crate::plan::branch::Branch;
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
    /// How a pod with a branch ENI is wired.
    pub enforcing_mode: EnforcingMode,
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
    /// The branch ENI that the address belongs to.
    pub branch: Option<PodBranch>,
}

/// The branch ENI of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodBranch {
    /// The ENI.
    pub eni: Branch,
    /// Index of the trunk ENI's link. Only ADD uses it.
    pub parent: u32,
    /// All traffic of the pod passes the ENI, also that of its own node.
    pub strict: bool,
}

impl Pod {
    /// The network that the daemon's reply asks for. `random` gives six fresh bytes for each host MAC.
    pub fn from_reply(
        reply: &AddNetworkReply,
        request: &Request,
        mut random: impl FnMut() -> Result<[u8; 6]>,
    ) -> Result<Pod> {
        let branch = branch_of(reply, request)?;
        if reply.allocations.is_empty() {
            return Err(Error::new("the daemon's reply has no address"));
        }
        // A branch ENI has one address.
        let count = if branch.is_some() { 1 } else { reply.allocations.len() };
        let interfaces = reply.allocations.iter().take(count).enumerate().map(|(number, allocation)| {
            let address = address_of(allocation)?
                .ok_or_else(|| Error::new(format!("the daemon's reply has no address for interface {number}")))?;
            let table = normal_table(allocation.route_table_id);
            Ok(PodInterface { host_mac: host_mac(random()?), ..interface(request, number, address, table, branch)? })
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
        let Known { vlan, interfaces } = interfaces_of(previous, request)?;
        if interfaces.is_empty() {
            return Err(Error::new(format!(
                "the previous result has no interface {:?} with an address",
                request.ifname
            )));
        }
        let branch = if vlan == 0 { None } else { Some(earlier_branch(previous, request, vlan)?) };
        let interfaces = interfaces
            .into_iter()
            .map(|(number, address, table)| interface(request, number, address, normal_table(table), branch));
        Ok(Pod {
            namespace: request.namespace.clone(),
            name: request.name.clone(),
            netns: request.netns.clone(),
            interfaces: interfaces.collect::<Result<_>>()?,
        })
    }
}

fn interface(
    request: &Request,
    number: usize,
    address: IpAddr,
    table: u32,
    branch: Option<PodBranch>,
) -> Result<PodInterface> {
    if let Some(branch) = branch.filter(|branch| branch.eni.gateway.is_ipv4() != address.is_ipv4()) {
        return Err(Error::new(format!("gateway {} of branch ENI with address {address}", branch.eni.gateway)));
    }
    let strict = branch.is_some_and(|branch| branch.strict);
    let prefix = if strict { naming::VLAN_PREFIX } else { &request.veth_prefix };
    Ok(PodInterface {
        host_veth: naming::host_veth(prefix, &request.namespace, &request.name, number)?,
        ifname: naming::container_veth(&request.ifname, number),
        address,
        gateway: naming::gateway(address.is_ipv6(), number)?,
        table: branch.map_or(table, |branch| branch.eni.table),
        mtu: request.mtu,
        host_mac: Mac::default(),
        branch,
    })
}

fn branch_of(reply: &AddNetworkReply, request: &Request) -> Result<Option<PodBranch>> {
    if reply.pod_vlan_id == 0 {
        return Ok(None);
    }
    let vlan = u16::try_from(reply.pod_vlan_id).with_context(|| format!("VLAN {}", reply.pod_vlan_id))?;
    let mac = reply.pod_eni_mac.parse().context("MAC of the branch ENI")?;
    let gateway = reply.pod_eni_subnet_gw.parse();
    let gateway = gateway.with_context(|| format!("gateway {:?} of the branch ENI", reply.pod_eni_subnet_gw))?;
    let parent = u32::try_from(reply.parent_if_index).ok().filter(|index| *index != 0);
    let parent = parent
        .ok_or_else(|| Error::new(format!("trunk link {} of branch ENI with VLAN {vlan}", reply.parent_if_index)))?;
    let strict = request.enforcing_mode == EnforcingMode::Strict;
    Ok(Some(PodBranch { eni: Branch::new(vlan, mac, gateway)?, parent, strict }))
}

// As far as a cached result tells: neither MAC nor trunk. The mode may have been another one when the pod was made; the
// name of its veth tells.
fn earlier_branch(previous: &Output, request: &Request, vlan: u16) -> Result<PodBranch> {
    let gateway = previous.ips.first().and_then(|ip| ip.gateway);
    let gateway = gateway.ok_or_else(|| Error::new("the previous result has no gateway of the branch ENI"))?;
    let strict = naming::host_veth(naming::VLAN_PREFIX, &request.namespace, &request.name, 0)?;
    let strict = previous.interfaces.iter().any(|interface| interface.name == strict);
    Ok(PodBranch { eni: Branch::new(vlan, Mac::default(), gateway)?, parent: 0, strict })
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

    /// The branch ENI of a pod in strict mode.
    pub fn strict(&self) -> Option<Branch> {
        self.branch.filter(|branch| branch.strict).map(|branch| branch.eni)
    }

    /// Host: the address of the link itself for an IPv6 pod, without the duplicate detection that the kernel's own would have.
    pub fn host_link_local(&self, host_dev: u32) -> Option<Address> {
        let addr = IpNet::new(self.host_mac.link_local().into(), 64).ok().filter(|_| self.address.is_ipv6())?;
        Some(Address { dev: host_dev, addr, no_prefix_route: false, no_dad: true })
    }

    /// Host: the way to the pod, in main or, in strict mode, in the table of its ENI.
    pub fn host_route(&self, host_dev: u32) -> Route {
        link_route(self.strict().map_or(TABLE_MAIN, |eni| eni.table), self.address, host_dev)
    }

    /// Host: the rules of the pod.
    pub fn host_rules(&self) -> Vec<Rule> {
        match self.strict() {
            Some(eni) => eni.rules(&self.host_veth).into(),
            None => [Some(self.to_rule()), self.from_rule()].into_iter().flatten().collect(),
        }
    }

    /// Host: traffic to the pod looks in main before any mark or ENI table has a say.
    pub fn to_rule(&self) -> Rule {
        Rule::to(self.host_net(), priority::TO_POD, TABLE_MAIN)
    }

    /// Host: traffic of the pod leaves by its own ENI; none for the primary ENI, which main serves.
    pub fn from_rule(&self) -> Option<Rule> {
        (self.table != TABLE_MAIN).then(|| Rule::from(self.host_net(), priority::FROM_POD, self.table))
    }

    /// What DEL takes away of its branch ENI.
    pub fn removed_branch(&self) -> Option<RemovedBranch> {
        let eni = self.branch?.eni;
        Some(RemovedBranch { device: eni.device(), table: eni.table, address: self.address })
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
        Neighbour { dev: pod_dev, addr: self.gateway, mac: Some(host_mac), permanent: true, noarp: false }
    }
}

/// `<address> dev <link> scope link` in `table`.
pub fn link_route(table: u32, to: IpAddr, dev: u32) -> Route {
    Route { table, dst: IpNet::from(to), gateway: None, dev, scope: Scope::Link, prefsrc: None, metric: 0 }
}

/// What a cached result tells.
struct Known {
    /// VLAN of the pod's branch ENI; 0: it has none.
    vlan: u16,
    /// Number, address and route table number of each of our interfaces.
    interfaces: Vec<(usize, IpAddr, i32)>,
}

/// Reads a cached result (`spec/plugin.md` 10, 10.1). An error says why it cannot be used.
fn interfaces_of(previous: &Output, request: &Request) -> Result<Known> {
    let name = naming::dummy(&request.namespace, &request.name);
    let dummy = previous
        .interfaces
        .iter()
        .find(|interface| interface.name == name)
        .ok_or_else(|| Error::new(format!("the previous result has no entry {name:?}")))?;
    let vlan = dummy.mac.parse::<u16>().with_context(|| format!("VLAN {:?} of entry {name:?}", dummy.mac))?;
    // The entry of a pod with a branch ENI names no device.
    let device = if vlan == 0 { dummy.sandbox.as_str() } else { "0" };
    let device = device.parse::<u32>().with_context(|| format!("device {device:?} of entry {name:?}"))?;
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
    Ok(Known { vlan, interfaces: found })
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
    /// The branch ENI, whichever way it was wired: its address is one of those above.
    pub branch: Option<RemovedBranch>,
}

/// A branch ENI to clean up after. Its VLAN may have been given to another pod meanwhile, which the routes and rules of its
/// table show: then it is that pod's, and stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemovedBranch {
    /// Name of the VLAN device.
    pub device: String,
    /// Its route table.
    pub table: u32,
    /// The pod's address.
    pub address: IpAddr,
}

impl RemovedBranch {
    /// Whether routes and rules show that the table serves another pod than the one that is to be removed. `device` is the
    /// index of the VLAN device, if it is still there.
    pub fn is_of_another(&self, device: Option<u32>, routes: &[Route], rules: &[Rule]) -> bool {
        let other = |net: IpNet| net != IpNet::from(self.address);
        // What does not lead over the device leads to a pod in strict mode.
        let mut routes = routes.iter().filter(|route| route.table == self.table && Some(route.dev) != device);
        let mut rules = rules.iter().filter(|rule| rule.table == self.table && rule.priority == priority::FROM_POD);
        routes.any(|route| other(route.dst)) || rules.any(|rule| rule.src.is_some_and(other))
    }
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
        Ok(removal.with_branch(u32::try_from(reply.pod_vlan_id).unwrap_or(u32::MAX)))
    }

    /// From a cached result, when the daemon cannot tell. An error says why it is of no use.
    pub fn from_previous(previous: &Output, request: &Request) -> Result<Removal> {
        let mut removal = Removal::default();
        let Known { vlan, interfaces } = interfaces_of(previous, request)?;
        for (number, address, table) in interfaces {
            removal.push(request, number, address, table)?;
        }
        if vlan != 0 && removal.addresses.len() != 1 {
            let count = removal.addresses.len();
            return Err(Error::new(format!("found {count} containerIPs for {} in prevResult", request.ifname)));
        }
        Ok(removal.with_branch(vlan.into()))
    }

    // What there is to remove belongs to the pod's branch ENI.
    fn with_branch(mut self, vlan: u32) -> Removal {
        if vlan == 0 {
            return self;
        }
        // A VLAN that cannot be wired never was: an error would only hold up the end of its pod.
        let table = naming::vlan_table(vlan).ok();
        self.addresses.truncate(usize::from(table.is_some()));
        if let (Some(table), Some(first)) = (table, self.addresses.first_mut()) {
            first.table = table;
            self.branch = Some(RemovedBranch { device: naming::vlan_device(vlan), table, address: first.address });
        }
        self
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

/// Whether two links, one of the host's and one of the pod's namespace, name each other as their other end.
pub fn pair(outer: &Link, inner: &Link) -> bool {
    let veth = |link: &Link| link.kind.as_deref() == Some("veth");
    veth(outer) && veth(inner) && outer.parent == Some(inner.index) && inner.parent == Some(outer.index)
}

pub(super) fn has_route(side: &Side, wanted: &Route) -> bool {
    // Scope and metric are left out: for IPv6 the kernel keeps no scope and sets a metric of its own.
    side.routes.iter().any(|route| {
        (route.table, route.dst, route.gateway, route.dev) == (wanted.table, wanted.dst, wanted.gateway, wanted.dev)
    })
}

#[cfg(test)]
#[path = "pod_tests.rs"]
mod tests;
