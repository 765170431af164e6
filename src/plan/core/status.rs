//! What the core is doing and why it is not doing more, for operators. A copy: nothing is decided by it.

use super::{Core, Op, Phase, Timer};
use crate::model::ids::{EniId, SubnetId};
use crate::model::order::Gather as _;
use crate::model::time::Mono;
use crate::plan::sizing::Targets;

/// The core at one moment. Counts and moments; the addresses themselves are in the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// `starting`, `booting`, `ready` or `stopping`.
    pub phase: &'static str,
    /// Warm targets that count now.
    pub targets: Targets,
    /// Pods that the node may run.
    pub max_pods: usize,
    /// The API server has told of the node.
    pub node_seen: bool,
    /// Pods that the kubelet takes, if the API server told.
    pub kubelet_pods: Option<u32>,
    /// The node is cordoned: nothing grows, and no ENI is given back.
    pub cordoned: bool,
    /// Free addresses of the subnets that ENIs may be put into, and when EC2 told.
    pub subnets: Vec<(SubnetId, u32, Mono)>,
    /// ADDs that wait for an address.
    pub waiting: usize,
    /// Growths in progress.
    pub growing: usize,
    /// After a failed growth: no other one before this moment.
    pub paused_until: Option<Mono>,
    /// What EC2 answered to the last growth that failed.
    pub last_failure: Option<String>,
    /// Actions that EC2 throttles, and until when each is left alone.
    pub throttled: Vec<(&'static str, Mono)>,
    /// Subnets without free addresses, and until when each is left alone.
    pub exhausted: Vec<(SubnetId, Mono)>,
    /// ENIs on their way out.
    pub freeing: Vec<EniId>,
    /// Why a pod that finds no address gets none, as a word and as a sentence.
    pub cause: (&'static str, String),
    /// EC2 or IMDS is being asked what exists.
    pub observing: bool,
}

impl Core {
    /// What the core is doing.
    pub fn status(&self) -> Status {
        let mut subnets = Vec::new();
        if let Some((at, Some(told))) = &self.subnets {
            subnets.extend(told.iter().map(|subnet| (subnet.id.clone(), subnet.free, *at)));
        }
        Status {
            subnets,
            max_pods: self.max_pods(),
            node_seen: self.cluster.node.is_some(),
            kubelet_pods: self.cluster.node.as_ref().and_then(|node| node.max_pods),
            cordoned: self.cordoned(),
            phase: match self.phase {
                Phase::Starting => "starting",
                Phase::Booting => "booting",
                Phase::Ready => "ready",
                Phase::Stopping => "stopping",
            },
            targets: self.config.tunables.targets,
            waiting: self.waiting.len(),
            growing: self.growths.len(),
            paused_until: self.timers.get(&Timer::Growth).copied(),
            last_failure: self.last_failure.clone(),
            throttled: self.pacer.paused(self.now.mono).gather(),
            cause: self.why_no_address(false),
            exhausted: self.exhausted.iter().map(|(subnet, until)| (subnet.clone(), *until)).gather(),
            freeing: self.freeing.keys().cloned().gather(),
            observing: self.ops.values().any(|op| matches!(op, Op::Scan | Op::Describe)),
        }
    }
}
