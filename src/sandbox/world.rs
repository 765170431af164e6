//! A small world to try things in: a VPC with two CIDRs and two zones, nodes, hosts near and far, EC2 and IMDS.

use super::kube::Api;
use super::runs::Run;
use super::serve::kube::Kube;
use super::serve::{Cloud, Seat};
use super::topology::{EC2, IMDS, KUBE, Node, Topology};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::ids::InstanceId;
use crate::netlink::netns::Namespace;
use crate::rpc::http1::Server;
use crate::sim::vpc::{Vpc, Wire};
use ipnet::Ipv4Net;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The region.
pub const REGION: &str = "eu-west-1";

/// CIDRs of the VPC.
pub const VPC_CIDRS: [Ipv4Net; 2] =
    [Ipv4Net::new_assert(Ipv4Addr::new(10, 20, 0, 0), 16), Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 16)];

/// Zones and their subnets for nodes; nodes take turns.
const ZONES: [(&str, Ipv4Net); 2] = [
    ("eu-west-1a", Ipv4Net::new_assert(Ipv4Addr::new(10, 20, 0, 0), 20)),
    ("eu-west-1b", Ipv4Net::new_assert(Ipv4Addr::new(10, 20, 32, 0), 20)),
];

/// A host that is no node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Name of its namespace.
    pub name: &'static str,
    /// What it stands for.
    pub what: &'static str,
    /// Its address.
    pub address: Ipv4Addr,
    /// Inside the VPC's CIDRs: pods are seen by their own address there.
    pub in_vpc: bool,
}

/// All hosts.
pub const HOSTS: [Host; 4] = [
    Host { name: "vpc-host", what: "host in the VPC", address: Ipv4Addr::new(10, 20, 30, 10), in_vpc: true },
    Host { name: "second-cidr", what: "host in the second CIDR", address: Ipv4Addr::new(100, 64, 9, 9), in_vpc: true },
    Host { name: "internet", what: "internet", address: Ipv4Addr::new(203, 0, 113, 10), in_vpc: false },
    Host { name: "peered", what: "peered network", address: Ipv4Addr::new(198, 18, 7, 7), in_vpc: false },
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
        let subnets = ZONES.map(|(zone, cidr)| vpc.add_subnet(zone, cidr, None, &[]));
        let mut topology = Topology::create(Run::start(plan.home)?)?;
        for host in HOSTS {
            topology.add_host(host.name, host.address)?;
        }
        let mut nodes = Vec::new();
        for number in 0..plan.nodes {
            let name = format!("node-{}", number + 1);
            let instance = vpc
                .launch(clock::now(), plan.instance_type, &subnets[number % subnets.len()], &[])
                .with_context(|| format!("launch {name}"))?;
            topology.add_node(&instance, &name)?;
            let identity = vpc.identity(&instance).ok_or_else(|| Error::new("the instance is gone"))?;
            nodes.push(WorldNode { name, instance, address: identity.local_ipv4 });
        }
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
