//! The network of the model with real packets: one namespace is the VPC's router, each ENI a veth between the router and
//! its node.
//!
//! Like EC2's, the router takes from an ENI only packets whose source is assigned to that ENI, and delivers packets for an
//! address only to the ENI that has it: an address has a route to its ENI, a rule checks the sources (`sources`), and there
//! is no default route. So a wrong rule or route on a node shows as a lost packet. ARP is answered for everything
//! (`proxy_arp`), and delivery goes to the MAC of the ENI without asking, as on EC2.
//!
//! IPv6 is the same with a difference that Linux forces: nobody but the router is on the link, because a router cannot answer
//! for every address of a subnet. So a node's subnet has no connected route, and everything goes through the gateway, which
//! is `fe80:ec2::1` as on EC2.
//!
//! A branch ENI is a VLAN link on the router's end of its trunk, and for all the rest an ENI like the others.

mod place;
mod sources;

pub use place::{Node, Place, Pod};

use crate::error::{Context, Error, List, Result};
use crate::model::ids::{EniId, InstanceId};
use crate::model::map::{Map, Set};
use crate::model::net::{Address, Mac, Neighbour, Route, Scope, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::netlink::socket::Socket;
use crate::netlink::{addr, link, neigh, route};
use crate::sandbox::runs::Run;
use crate::sim::vpc::Wire;
use ipnet::{IpNet, Ipv4Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;

/// MTU inside a VPC, in bytes.
pub const MTU: u32 = 9001;

/// Where IMDS is.
pub const IMDS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Where the sandbox's EC2 is: an address for documentation, outside of any VPC.
pub const EC2: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// Where the sandbox's API server is.
pub const KUBE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

/// The gateway of every IPv6 subnet (`spec/dataplane.md` 8.3).
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0xec2, 0, 0, 0, 0, 0, 1);

// One ENI as it is wired now.
#[derive(Debug)]
struct Port {
    instance: InstanceId,
    name: String,  // the router's end
    index: u32,    // of the router's end
    inner: String, // the node's end; a branch has none
    own: Ipv4Addr,
    mac: Mac,
    routed: Set<IpNet>,
}

/// Router, hosts and nodes. Everything ends when it is dropped.
#[derive(Debug)]
pub struct Topology {
    router: Place,
    /// This kernel has IPv6.
    v6: bool,
    socket: Socket,
    gateways: Set<Ipv4Addr>,
    ports: Map<EniId, Port>,
    nodes: Map<InstanceId, Arc<Node>>,
    hosts: Map<String, Place>,
    run: Run,
}

impl Topology {
    /// A router that knows nobody.
    pub fn create(run: Run) -> Result<Topology> {
        let router = Place::create(&run, "router")?;
        router.sysctls(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/default/proxy_arp", "1"),
            // Redirects would teach nodes shortcuts that EC2 does not know.
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
            ("net/ipv6/conf/all/disable_ipv6", "0"),
            ("net/ipv6/conf/default/disable_ipv6", "0"),
            ("net/ipv6/conf/all/forwarding", "1"),
            // It is the only one that could be asked.
            ("net/ipv6/conf/default/accept_dad", "0"),
        ])?;
        sources::check(&router.net)?;
        let socket = router.socket()?;
        let (gateways, ports) = (Set::new(), Map::new());
        let (nodes, hosts) = (Map::new(), Map::new());
        let v6 = router.has_v6()?;
        let mut topology = Topology { router, v6, socket, gateways, ports, nodes, hosts, run };
        for service in [IMDS, EC2, KUBE] {
            topology.answer_for(service)?;
        }
        Ok(topology)
    }

    /// The directory of the run.
    pub fn run(&self) -> &Run {
        &self.run
    }

    /// The router's namespace.
    pub fn router(&self) -> &Place {
        &self.router
    }

    // Gives the router an address, on `lo`: it then answers for it on every link.
    fn answer_for(&mut self, address: Ipv4Addr) -> Result<()> {
        let lo = link::by_name(&mut self.socket, "lo")?.ok_or_else(|| Error::new("no lo in the router"))?.index;
        let addr = IpNet::from(IpAddr::V4(address));
        self.socket.run(&[addr::add(&Address { dev: lo, addr, no_prefix_route: false, no_dad: false }).or_exists()])
    }

    /// A listener on an address of the router's, for [`IMDS`], [`EC2`] and [`KUBE`].
    pub fn listen(&self, address: Ipv4Addr, port: u16) -> Result<TcpListener> {
        let at = SocketAddr::from((address, port));
        let listener = self.router.net.run(|| TcpListener::bind(at))?;
        listener.with_context(|| format!("listen on {at} in the router"))
    }

    /// A host that is no instance of ours: the internet, a peered network, an instance of somebody else.
    pub fn add_host(&mut self, name: &str, address: Ipv4Addr, address_v6: Ipv6Addr) -> Result<()> {
        let what = || format!("add host {name}");
        let host = Place::create(&self.run, name)?;
        let port = format!("h-{name}").chars().take(15).collect::<String>();
        let index = self.plug(&port, "eth0", None, &host)?;
        let (target, target_v6) = (IpNet::from(IpAddr::V4(address)), IpNet::from(IpAddr::V6(address_v6)));
        self.socket.run(&[link::set_up(index), route::add(&direct(target, index))]).with_context(what)?;
        host.configure("eth0", target, None).with_context(what)?;
        if self.v6 {
            self.socket
                .run(&[addr::add(&gateway_on(index)), route::add(&direct(target_v6, index))])
                .with_context(what)?;
            host.sysctls(&[("net/ipv6/conf/eth0/accept_dad", "0")])?;
            host.configure("eth0", target_v6, Some(GATEWAY_V6.into())).with_context(what)?;
        }
        self.hosts.insert(name.to_owned(), host);
        Ok(())
    }

    /// A host by name.
    pub fn host(&self, name: &str) -> Option<&Place> {
        self.hosts.get(name)
    }

    /// Makes the node of an instance; its ENIs come with [`Topology::apply`].
    pub fn add_node(&mut self, instance: &InstanceId, name: &str) -> Result<()> {
        let node = Node::create(&self.run, name)?;
        self.nodes.insert(instance.clone(), Arc::new(node));
        Ok(())
    }

    /// The node of an instance.
    pub fn node(&self, instance: &InstanceId) -> Option<&Arc<Node>> {
        self.nodes.get(instance)
    }

    /// Names of the ENIs' links on their nodes.
    pub fn link_names(&self, instance: &InstanceId) -> Map<EniId, String> {
        let ours = self.ports.iter().filter(|(_, port)| port.instance == *instance && !port.inner.is_empty());
        ours.map(|(eni, port)| (eni.clone(), port.inner.clone())).gather()
    }

    // A veth between the router (`name`) and a place (`inner`); the index of the router's end, which is down.
    fn plug(&mut self, name: &str, inner: &str, mac: Option<Mac>, place: &Place) -> Result<u32> {
        use std::os::fd::AsFd;
        let veth = link::Veth {
            end: link::End { name, mac: None, netns: None },
            peer: link::End { name: inner, mac, netns: Some(place.net.as_fd()) },
            mtu: MTU,
            up: false,
        };
        let what = || format!("plug {name} into {}", place.name);
        self.socket.run(&[link::create_veth(&veth)]).with_context(what)?;
        let made = link::by_name(&mut self.socket, name).with_context(what)?;
        // Answers for others are otherwise held back for up to 0.8 s (arp(7)). Only the first namespace of a machine has
        // a default for it (`lookup_neigh_parms` in net/core/neighbour.c), so it is set for each link.
        self.router.sysctls(&[(&format!("net/ipv4/neigh/{name}/proxy_delay"), "0")])?;
        made.map(|link| link.index).ok_or_else(|| Error::new("it is gone").context(what()))
    }

    /// Brings the wiring to what the model says: links come and go, addresses are routed to the ENI that has them. What
    /// cannot be done does not keep the rest from being done.
    pub fn apply(&mut self, wires: &[Wire]) -> Result<()> {
        let mut errors = List::new();
        let wanted = wires.iter().map(|wire| (wire.eni.clone(), wire)).gather::<Map<_, _>>();
        let gone = |eni: &EniId, port: &Port| wanted.get(eni).is_none_or(|wire| wire.instance != port.instance);
        let gone =
            self.ports.iter().filter(|(eni, port)| gone(eni, port)).map(|(eni, _)| eni.clone()).collect::<Vec<_>>();
        for eni in gone {
            errors.note(self.unplug(&eni));
        }
        // Branches after their trunks.
        let (trunks, branches): (Vec<_>, Vec<_>) = wires.iter().partition(|wire| wire.trunk.is_none());
        // An address may move from one ENI to another in one step: everything is taken away before anything is given.
        for wire in wires {
            errors.note(self.withdraw(wire));
        }
        for wire in trunks.into_iter().chain(branches) {
            errors.note(self.provide(wire).with_context(|| format!("wire {}", wire.eni)));
        }
        errors.into_result()
    }

    fn unplug(&mut self, eni: &EniId) -> Result<()> {
        let Some(port) = self.ports.remove(eni) else { return Ok(()) };
        self.socket.run(&[link::delete_by_name(&port.name).or_not_found()]).with_context(|| format!("unplug {eni}"))
    }

    fn withdraw(&mut self, wire: &Wire) -> Result<()> {
        let Some(port) = self.ports.get_mut(&wire.eni) else { return Ok(()) };
        let wanted = wire.assigned.iter().copied().gather::<Set<_>>();
        let surplus = port.routed.difference(&wanted).copied().collect::<Vec<_>>();
        let requests = surplus.iter().map(|net| route::delete(&via(*net, port)).or_not_found()).collect::<Vec<_>>();
        port.routed.retain(|net| wanted.contains(net));
        self.socket.run(&requests).with_context(|| format!("withdraw addresses from {}", wire.eni))
    }

    fn provide(&mut self, wire: &Wire) -> Result<()> {
        if !self.ports.contains_key(&wire.eni) {
            self.attach(wire)?;
        }
        let Some(port) = self.ports.get_mut(&wire.eni) else { return Ok(()) };
        let wanted = wire.assigned.iter().filter(|net| self.v6 || net.addr().is_ipv4());
        let missing = wanted.filter(|net| !port.routed.contains(net)).copied().collect::<Vec<_>>();
        let requests = missing.iter().map(|net| route::add(&via(*net, port))).collect::<Vec<_>>();
        self.socket.run(&requests)?;
        port.routed.extend(missing);
        Ok(())
    }

    fn attach(&mut self, wire: &Wire) -> Result<()> {
        let gateway = Ipv4Addr::from(u32::from(wire.subnet.network()) + 1);
        if self.gateways.insert(gateway) {
            self.answer_for(gateway)?;
        }
        let Some(node) = self.nodes.get(&wire.instance).cloned() else {
            return Err(Error::new(format!("instance {} has no node", wire.instance)));
        };
        let port = match &wire.trunk {
            Some((trunk, vlan)) => self.plug_branch(wire, trunk, *vlan)?,
            None => self.plug_eni(wire, &node, gateway)?,
        };
        self.ports.insert(wire.eni.clone(), port);
        Ok(())
    }

    fn plug_eni(&mut self, wire: &Wire, node: &Node, gateway: Ipv4Addr) -> Result<Port> {
        let taken = node.place.links()?.into_iter().map(|link| link.name).gather::<Set<_>>();
        let mut names = (0..=taken.len()).map(|number| format!("eth{number}"));
        let inner = names.find(|name| !taken.contains(name)).ok_or_else(|| Error::new("no free name"))?;
        let name = port_name(&wire.eni);
        let index = self.plug(&name, &inner, Some(wire.mac), &node.place)?;
        self.deliver(wire, index)?;
        if (wire.card, wire.device) == (0, 0) {
            // What DHCP does on an instance; all others are left to the daemon.
            let address = IpNet::V4(Ipv4Net::new(wire.own, wire.subnet.prefix_len())?);
            node.place.configure(&inner, address, Some(gateway.into()))?;
            if self.v6 {
                lead_v6(wire, node, &inner)?;
            }
        }
        Ok(Port::of(wire, name, index, inner))
    }

    // The router's end of a branch ENI; the node's is made by the plugin.
    fn plug_branch(&mut self, wire: &Wire, trunk: &EniId, vlan: u16) -> Result<Port> {
        let below = self.ports.get(trunk).ok_or_else(|| Error::new(format!("trunk {trunk} is not wired")))?.index;
        let name = port_name(&wire.eni);
        self.socket.run(&[link::create_vlan(&name, below, vlan, None)])?;
        let made = link::by_name(&mut self.socket, &name)?.ok_or_else(|| Error::new("it is gone"))?;
        self.router.sysctls(&[(&format!("net/ipv4/neigh/{name}/proxy_delay"), "0")])?;
        self.deliver(wire, made.index)?;
        Ok(Port::of(wire, name, made.index, String::new()))
    }

    // What comes for an ENI goes to its MAC.
    fn deliver(&mut self, wire: &Wire, index: u32) -> Result<()> {
        let neighbour = |addr| Neighbour { dev: index, addr, mac: Some(wire.mac), permanent: true, noarp: false };
        self.socket.run(&[
            link::set_up(index),
            route::add(&direct(IpNet::from(IpAddr::V4(wire.own)), index)),
            neigh::replace(&neighbour(wire.own.into())),
        ])?;
        if !self.v6 {
            return Ok(());
        }
        let own = neighbour(wire.mac.link_local().into());
        self.socket.run(&[addr::add(&gateway_on(index)), neigh::replace(&own)])
    }

    /// Whether this kernel has the VLAN links that branch ENIs need.
    pub fn takes_branches(&mut self) -> Result<bool> {
        let end = |name| link::End { name, mac: None, netns: None };
        let veth = link::Veth { end: end("try-a"), peer: end("try-b"), mtu: 0, up: false };
        self.socket.run(&[link::create_veth(&veth)])?;
        let below = link::by_name(&mut self.socket, "try-a")?.map_or(0, |link| link.index);
        let takes = self.socket.run(&[link::create_vlan("try-vlan", below, 1, None)]).is_ok();
        self.socket.run(&[link::delete_by_name("try-a")])?;
        Ok(takes)
    }
}

// Eleven digits of the id tell ENIs apart.
fn port_name(eni: &EniId) -> String {
    let digits = eni.as_str();
    format!("eni-{}", &digits[digits.len().saturating_sub(11)..])
}

impl Port {
    fn of(wire: &Wire, name: String, index: u32, inner: String) -> Port {
        let routed = std::iter::once(IpNet::from(IpAddr::V4(wire.own))).gather();
        Port { instance: wire.instance.clone(), name, index, inner, own: wire.own, mac: wire.mac, routed }
    }
}

// The primary ENI's IPv6 side, as on an instance that has been up for a while: the router's advertisement has been heard
// (and will be, with forwarding on, which is the init container's doing), its link-local address is checked.
fn lead_v6(wire: &Wire, node: &Node, inner: &str) -> Result<()> {
    let Some(own) = wire.own_v6 else { return Ok(()) };
    let sysctl = |name: &str| format!("net/ipv6/conf/{inner}/{name}");
    node.place.sysctls(&[(&sysctl("accept_ra"), "2"), (&sysctl("accept_dad"), "0")])?;
    node.place.configure(inner, IpNet::from(IpAddr::V6(own)), Some(GATEWAY_V6.into()))
}

fn direct(dst: IpNet, dev: u32) -> Route {
    Route { table: TABLE_MAIN, dst, gateway: None, dev, scope: Scope::Link, prefsrc: None, metric: 0 }
}

// The gateway's address, which the router has on every link.
fn gateway_on(dev: u32) -> Address {
    Address { dev, addr: IpNet::from(IpAddr::V6(GATEWAY_V6)), no_prefix_route: true, no_dad: true }
}

// To the ENI by an address whose neighbour entry is fixed: delivery asks nobody.
fn via(dst: IpNet, port: &Port) -> Route {
    let gateway: IpAddr = match dst {
        IpNet::V4(_) => port.own.into(),
        IpNet::V6(_) => port.mac.link_local().into(),
    };
    let (gateway, dev) = (Some(gateway), port.index);
    Route { table: TABLE_MAIN, dst, gateway, dev, scope: Scope::Universe, prefsrc: None, metric: 0 }
}
