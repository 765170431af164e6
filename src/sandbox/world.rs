//! A small world to try things in: a VPC with two CIDRs and two zones, nodes, hosts near and far, EC2 and IMDS.

use super::kube::Api;
use super::runs::Run;
use super::serve::kube::Kube;
use super::serve::{Cloud, Seat};
use super::topology::{EC2, IMDS, KUBE, Node, Topology};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::ec2::{Call, Count};
use crate::model::ids::InstanceId;
use crate::netlink::netns::Namespace;
use crate::rpc::http1::Server;
use crate::sim::vpc::{Vpc, Wire};
use ipnet::{Ipv4Net, Ipv6Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The region.
pub const REGION: &str = "eu-west-1";

/// CIDRs of the VPC.
pub const VPC_CIDRS: [Ipv4Net; 2] =
    [Ipv4Net::new_assert(Ipv4Addr::new(10, 20, 0, 0), 16), Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 16)];

/// Zones and their subnets for nodes, of both families; nodes take turns.
const ZONES: [(&str, Ipv4Net, Ipv6Net); 2] = [
    ("eu-west-1a", Ipv4Net::new_assert(Ipv4Addr::new(10, 20, 0, 0), 20), v6_subnet(0)),
    ("eu-west-1b", Ipv4Net::new_assert(Ipv4Addr::new(10, 20, 32, 0), 20), v6_subnet(1)),
];

// A subnet of the VPC's IPv6 CIDR, 2001:db8:20::/56.
const fn v6_subnet(number: u16) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0x20, number, 0, 0, 0, 0), 64)
}

const fn v6(third: u16, fourth: u16, last: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, third, fourth, 0, 0, 0, last)
}

/// A host that is no node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Name of its namespace.
    pub name: &'static str,
    /// What it stands for.
    pub what: &'static str,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    pub address_v6: Ipv6Addr,
    /// Inside the VPC's CIDRs: pods are seen by their own address there.
    pub in_vpc: bool,
}

impl Host {
    /// Its address of a family.
    pub fn at(&self, v6: bool) -> IpAddr {
        if v6 { self.address_v6.into() } else { self.address.into() }
    }

    const fn new(name: &'static str, what: &'static str, addresses: ([u8; 4], Ipv6Addr), in_vpc: bool) -> Host {
        let [a, b, c, d] = addresses.0;
        Host { name, what, address: Ipv4Addr::new(a, b, c, d), address_v6: addresses.1, in_vpc }
    }
}

/// All hosts.
pub const HOSTS: [Host; 4] = [
    Host::new("vpc-host", "host in the VPC", ([10, 20, 30, 10], v6(0x20, 0x30, 0x10)), true),
    Host::new("second-cidr", "host in the second CIDR", ([100, 64, 9, 9], v6(0x64, 9, 9)), true),
    Host::new("internet", "internet", ([203, 0, 113, 10], v6(0x113, 0, 0x10)), false),
    Host::new("peered", "peered network", ([198, 18, 7, 7], v6(0x18, 7, 7)), false),
];

/// A node of the world.
#[derive(Clone, Debug)]
pub struct WorldNode {
    /// `node-1`.
    pub name: String,
    /// The instance.
    pub instance: InstanceId,
    /// Its primary address.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    pub address_v6: Ipv6Addr,
}

impl WorldNode {
    /// Its address of a family.
    pub fn at(&self, v6: bool) -> IpAddr {
        if v6 { self.address_v6.into() } else { self.address.into() }
    }
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// Number of nodes.
    pub nodes: usize,
    /// Their instance type.
    pub instance_type: &'a str,
    /// Decides ids and addresses.
    pub seed: u64,
    /// Where runs have their directories.
    pub home: &'a Path,
}

/// Everything that stands. It is taken down when dropped.
pub struct World {
    // Fields are dropped in order: first nobody answers any more, then the network goes.
    servers: Vec<Server>,
    /// EC2 and IMDS.
    pub cloud: Arc<Cloud>,
    topology: Arc<Mutex<Topology>>,
    /// The nodes.
    pub nodes: Vec<WorldNode>,
}

impl World {
    /// Builds it. Needs root.
    pub fn create(plan: &Plan<'_>) -> Result<World> {
        let mut vpc = Vpc::new(REGION, VPC_CIDRS.to_vec(), plan.seed);
        let subnets = ZONES.map(|(zone, cidr, v6)| vpc.add_subnet(zone, cidr, Some(v6), &[]));
        let mut topology = Topology::create(Run::start(plan.home)?)?;
        for host in HOSTS {
            topology.add_host(host.name, host.address, host.address_v6)?;
        }
        let mut nodes = Vec::new();
        for number in 0..plan.nodes {
            let name = format!("node-{}", number + 1);
            let instance = vpc
                .launch(clock::now(), plan.instance_type, &subnets[number % subnets.len()], &[])
                .with_context(|| format!("launch {name}"))?;
            topology.add_node(&instance, &name)?;
            nodes.push(settled(&mut vpc, name, instance)?);
        }
        // What launching took is no call of a daemon's.
        vpc.forget_calls();
        let cloud = Cloud::new(vpc);
        let servers = vec![
            cloud.serve_imds(topology.listen(IMDS, 80)?, Seat::Peer)?,
            cloud.serve_ec2(topology.listen(EC2, 80)?)?,
        ];
        let topology = Arc::new(Mutex::new(topology));
        let wired = Arc::clone(&topology);
        cloud.watch(Box::new(move |wires| hold(&wired).apply(wires)));
        match cloud.complaints().into_iter().next() {
            Some(complaint) => Err(Error::new(complaint)),
            None => Ok(World { servers, cloud, topology, nodes }),
        }
    }

    /// A handle of one's own on a namespace by name: a node, a host, or the router.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        Namespace::open(self.topology().run().path().join("netns").join(name))
    }

    /// A node by its place in [`World::nodes`].
    pub fn node(&self, index: usize) -> Result<Arc<Node>> {
        let node = self.nodes.get(index).and_then(|node| self.topology().node(&node.instance).cloned());
        node.ok_or_else(|| Error::new(format!("there is no node {index}")))
    }

    /// Starts an API server at `http://`[`KUBE`] that has these objects; there is none before.
    pub fn serve_kube(&mut self, api: Api) -> Result<Arc<Kube>> {
        let kube = Kube::new(api);
        let listener = self.topology().listen(KUBE, 80)?;
        self.servers.push(kube.serve(listener)?);
        Ok(kube)
    }

    /// From now on only wires that `pass` likes are there, asked after every change and at [`Cloud::tick`]: links that
    /// appear late, or never.
    pub fn pass_wires(&self, mut pass: impl FnMut(&Wire) -> bool + Send + 'static) {
        let wired = Arc::clone(&self.topology);
        self.cloud.watch(Box::new(move |wires| {
            let passed = wires.iter().filter(|wire| pass(wire)).cloned().collect::<Vec<_>>();
            hold(&wired).apply(&passed)
        }));
    }

    /// The network. EC2's changing calls wait while it is held.
    pub fn topology(&self) -> MutexGuard<'_, Topology> {
        hold(&self.topology)
    }
}

// A fresh instance with an IPv6 address, as subnets give one at launch.
fn settled(vpc: &mut Vpc, name: String, instance: InstanceId) -> Result<WorldNode> {
    let gone = || Error::new("the instance is gone");
    let eni = vpc.identity(&instance).ok_or_else(gone)?.primary_eni;
    let outcome = vpc.execute(clock::now(), &Call::Assign { eni, count: Count::Ipv6Addresses(1) });
    outcome.result.map_err(|failure| Error::new(failure.to_string()))?;
    let identity = vpc.identity(&instance).ok_or_else(gone)?;
    let address_v6 = identity.local_ipv6.ok_or_else(|| Error::new(format!("{name} has no IPv6 address")))?;
    Ok(WorldNode { name, instance, address: identity.local_ipv4, address_v6 })
}

fn hold(topology: &Mutex<Topology>) -> MutexGuard<'_, Topology> {
    // A panic elsewhere leaves at worst a half-wired ENI, which the next apply takes up.
    topology.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for World {
    fn drop(&mut self) {
        self.servers.clear();
        // The watcher holds the topology.
        self.cloud.unwatch();
    }
}
