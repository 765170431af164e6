//! Nodes on one EC2, with one queue of what will happen.

use super::conditions::WriteFate;
use super::node::{Happening, Item, Node, Outcome, Setup, limits_of, moment, mutates};
use super::queue::Queue;
use super::vpc::Vpc;
use crate::model::ec2::{Call, Failure};
use crate::model::ids::InstanceId;
use crate::model::map::Map;
use crate::model::settings::Settings;
use crate::model::time::Now;
use crate::plan::core::Tally;
use ipnet::IpNet;
use std::rc::Rc;
use std::time::Duration;

/// Everything that the nodes share.
#[derive(Debug)]
pub struct Sky {
    /// EC2.
    pub vpc: Vpc,
    /// Events that the nodes' processes have taken.
    pub steps: u64,
    /// What has been counted.
    pub counts: Counts,
    /// What happened since it was last taken out; only if [`Sky::watched`].
    pub happened: Vec<(u32, Happening)>,
    /// Keep what happens for those who judge.
    pub watched: bool,
    pub(super) queue: Queue<(u32, Item)>,
    pub(super) nanos: u64,
}

/// Figures over all nodes.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// How long each ADD that got an address took, in milliseconds.
    pub add_waits_ms: Vec<u32>,
    /// From the binding of a pod to its network, in milliseconds.
    pub pod_starts_ms: Vec<u32>,
    /// When the last pod got its network, in nanoseconds.
    pub last_pod: u64,
    /// ADDs that were refused.
    pub refused: u64,
    /// Calls to EC2 that would change something, failed ones included.
    pub mutating: u64,
    /// When each node became ready for the first time, in nanoseconds.
    pub ready: Map<u32, u64>,
    /// ADDs without an address, by cause.
    pub causes: Map<&'static str, u64>,
}

impl Sky {
    pub(super) fn tell(&mut self, node: u32, happening: Happening) {
        if self.watched {
            self.happened.push((node, happening));
        }
    }

    pub(super) fn called(&mut self, node: u32, call: &Call, outcome: &Outcome, at_stake: Vec<IpNet>) {
        self.counts.mutating += u64::from(mutates(call));
        // An answer that was lost may stand for a call that went well.
        if self.watched && outcome.as_ref().err().is_none_or(|failure| failure.maybe_applied) {
            self.happened.push((node, Happening::Called(call.clone())));
            if !at_stake.is_empty() {
                self.happened.push((node, Happening::Took(at_stake)));
            }
        }
    }

    pub(super) fn waited(&mut self, since: u64) {
        let took = self.millis_since(since);
        self.counts.add_waits_ms.push(took);
    }

    pub(super) fn started(&mut self, since: u64) {
        let took = self.millis_since(since);
        self.counts.pod_starts_ms.push(took);
        self.counts.last_pod = self.nanos;
    }

    fn millis_since(&self, since: u64) -> u32 {
        u32::try_from(self.nanos.saturating_sub(since) / 1_000_000).unwrap_or(u32::MAX)
    }

    pub(super) fn refused(&mut self) {
        self.counts.refused += 1;
    }

    pub(super) fn ready(&mut self, node: u32) {
        let nanos = self.nanos;
        self.counts.ready.entry(node).or_insert(nanos);
    }

    pub(super) fn tallied(&mut self, tally: &Tally) {
        if let Tally::NoAddress(cause) = tally {
            *self.counts.causes.entry(cause).or_default() += 1;
        }
    }
}

/// Nodes and what they share.
#[derive(Debug)]
pub struct Fleet {
    /// What they share.
    pub sky: Sky,
    /// The nodes.
    pub nodes: Vec<Node>,
}

impl Fleet {
    /// No node yet.
    pub fn new(vpc: Vpc) -> Fleet {
        let sky = Sky {
            vpc,
            steps: 0,
            counts: Counts::default(),
            happened: Vec::new(),
            watched: false,
            queue: Queue::default(),
            nanos: 0,
        };
        Fleet { sky, nodes: Vec::new() }
    }

    /// Adds a node on an instance that was launched; its place. It does not run yet. Fails for an unknown instance type.
    pub fn add(&mut self, instance: InstanceId, setup: Setup, seed: u64) -> Result<usize, Failure> {
        let index = self.nodes.len();
        let kind = self.sky.vpc.identity(&instance).map(|identity| identity.instance_type).unwrap_or_default();
        let Some(limits) = limits_of(&self.sky.vpc, &kind) else {
            return Err(Failure {
                action: "DescribeInstanceTypes",
                code: "InvalidInstanceType".into(),
                message: format!("the instance type {kind:?} is not known"),
                status: 400,
                request_id: String::new(),
                maybe_applied: false,
            });
        };
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        self.nodes.push(Node::new(number, instance, limits, setup, seed));
        Ok(index)
    }

    /// Virtual time, in nanoseconds since the beginning.
    pub fn nanos(&self) -> u64 {
        self.sky.nanos
    }

    /// The moment as EC2's clocks have it.
    pub fn now(&self) -> Now {
        moment(self.sky.nanos, 0)
    }

    /// Starts the process of a node.
    pub fn start(&mut self, node: usize) {
        self.nodes[node].start(&mut self.sky);
    }

    /// Starts the process of a node at a time that lies ahead (nanoseconds of virtual time).
    pub fn start_at(&mut self, node: usize, nanos: u64) {
        self.sky.queue.push(nanos, (self.nodes[node].index, Item::Start));
    }

    /// Binds a pod to a node at a time that lies ahead (nanoseconds of virtual time).
    pub fn bind_at(&mut self, node: usize, name: &str, nanos: u64) {
        self.sky.queue.push(nanos, (self.nodes[node].index, Item::Bind(name.into())));
    }

    /// Kills the process of a node.
    pub fn crash(&mut self, node: usize, fate: WriteFate) {
        self.nodes[node].write_fate = fate;
        self.nodes[node].crash(&mut self.sky);
    }

    /// Binds a pod to a node; its number there.
    pub fn bind(&mut self, node: usize, name: &str) -> u32 {
        self.nodes[node].bind(&mut self.sky, name)
    }

    /// Deletes a pod. `impatient`: an ADD that is under way is not waited for.
    pub fn delete(&mut self, node: usize, pod: u32, impatient: bool) {
        self.nodes[node].delete(&mut self.sky, pod, impatient);
    }

    /// The runtime repeats an ADD or a DEL of some sandbox of the node; `running`: also the ADD of a pod that runs.
    pub fn repeat(&mut self, node: usize, pick: usize, running: bool) -> bool {
        self.nodes[node].repeat(&mut self.sky, pick, running)
    }

    /// The operator changes settings of a node; those that a running process can take are told to it.
    pub fn retune(&mut self, node: usize, settings: Rc<Settings>) {
        self.nodes[node].retune(&mut self.sky, settings);
    }

    /// The node's Node object has changed, or the API server is back.
    pub fn tell(&mut self, node: usize) {
        self.nodes[node].tell_node(&mut self.sky);
        self.nodes[node].tell_pods(&mut self.sky);
    }

    /// Lets the next thing happen, if it does not lie behind `until` (nanoseconds); false if it does.
    pub fn step(&mut self, until: u64) -> bool {
        let Some((at, (node, item))) = self.sky.queue.pop(until) else {
            self.sky.nanos = self.sky.nanos.max(until);
            return false;
        };
        self.sky.nanos = self.sky.nanos.max(at);
        if let Some(node) = self.nodes.get_mut(node as usize) {
            node.happen(&mut self.sky, item);
        }
        true
    }

    /// Lets time pass.
    pub fn pass(&mut self, time: Duration) {
        let until = self.sky.nanos.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        while self.step(until) {}
    }

    /// Whether no pod waits for its network.
    pub fn served(&self) -> bool {
        self.nodes.iter().all(|node| node.kubelet.running() == node.kubelet.bound())
    }
}
