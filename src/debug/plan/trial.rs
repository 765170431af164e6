//! One node with the real core in virtual time: it starts, comes to rest, gets its pods, comes to rest again.
//!
//! Nothing is random but the pauses of retries, and EC2 takes as long as it is told to, so the same question has the same
//! answer. What is read at the end is EC2's own account, not the core's.

use crate::model::ec2::Call;
use crate::model::ids::EniId;
use crate::model::kube::{DEFAULT_ENI_CONFIG, EniConfig, FEATURE_TRUNK};
use crate::model::limits::{self, Limits};
use crate::model::map::Map;
use crate::model::settings::{Mode, Settings};
use crate::sim::conditions::Latencies;
use crate::sim::fleet::Fleet;
use crate::sim::node::Setup;
use crate::sim::vpc::Vpc;
use ipnet::Ipv4Net;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::rc::Rc;
use std::time::Duration;

/// EC2's actions by their short names, and how long each takes as a rule, in milliseconds.
pub(super) const DELAYS: [(&str, &str, u64); 11] = [
    ("describe", "DescribeNetworkInterfaces", 150),
    ("subnets", "DescribeSubnets", 100),
    ("create", "CreateNetworkInterface", 600),
    ("attach", "AttachNetworkInterface", 800),
    ("modify", "ModifyNetworkInterfaceAttribute", 250),
    ("assign", "AssignPrivateIpAddresses", 400),
    ("assign6", "AssignIpv6Addresses", 400),
    ("unassign", "UnassignPrivateIpAddresses", 400),
    ("tags", "CreateTags", 250),
    ("detach", "DetachNetworkInterface", 500),
    ("delete", "DeleteNetworkInterface", 300),
];
/// The name of what is no action: until IMDS and the host show what EC2 has done.
pub(super) const IMDS: (&str, u64) = ("imds", 1500);

/// After a change the node is left alone for so long; an ENI that is too much goes after a few minutes.
const REST: Duration = Duration::from_mins(20);
/// Pods that have no address by then are taken back: they would ask for ever.
const PATIENCE: Duration = Duration::from_mins(3);
/// A node that does not serve by then never will.
const READY_MAX: Duration = Duration::from_mins(10);

/// A node and its surroundings.
#[derive(Clone, Debug)]
pub(super) struct Scene {
    /// Instance type.
    pub kind: String,
    /// Its limits.
    pub limits: Limits,
    /// The daemon's settings.
    pub settings: Rc<Settings>,
    /// The kubelet's `--max-pods`.
    pub max_pods: u32,
    /// How long EC2 takes, in milliseconds, by the short names of [`DELAYS`] and [`IMDS`].
    pub delays: Map<&'static str, u64>,
    /// Bits of the prefix of the subnet that pods' addresses come from: 16 to 28.
    pub subnet_bits: u8,
}

/// What a node holds in EC2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    /// Pods that have an address.
    pub pods: u64,
    /// ENIs, the primary one and a trunk included.
    pub enis: u64,
    /// Addresses for pods, those in prefixes included.
    pub addresses: u64,
    /// Prefixes.
    pub prefixes: u64,
    /// IPv4 addresses that the subnets lose: those for pods and each ENI's own.
    pub taken: u64,
    /// Addresses that a pod could have at once.
    pub free: u64,
}

/// What became of a change in the number of pods.
#[derive(Clone, Debug, Default)]
pub(super) struct Stage {
    /// At its end.
    pub held: Held,
    /// Pods that were asked for and had no address in the end.
    pub unserved: u64,
    /// The longest time from the binding of a pod to its network, in milliseconds.
    pub last_ms: u32,
    /// ADDs that were refused; the kubelet repeats them after ten seconds or more.
    pub refused: u64,
    /// Why pods had no address, if some had none.
    pub cause: String,
}

/// The whole story.
#[derive(Clone, Debug, Default)]
pub(super) struct Story {
    /// With no pod.
    pub idle: Held,
    /// For each change.
    pub stages: Vec<Stage>,
    /// The most of each figure at any moment.
    pub peak: Held,
    /// Calls by action, from the start of the node to its rest after the last change.
    pub calls: Map<&'static str, u64>,
    /// What happens when some pods are replaced at once, after that.
    pub churn: Option<(usize, Stage)>,
}

struct Run {
    fleet: Fleet,
    pods: VecDeque<u32>,
    last_pod: u64,
    peak: Held,
    foreign_attaches: u64,
    /// Calls to EC2 at the latest look at what is held.
    looked_at: u64,
    strict: bool,
}

impl Scene {
    /// Whether a trunk ENI will be attached.
    pub fn trunk(&self) -> bool {
        self.settings.pod_eni && limits::takes_trunk(&self.kind)
    }

    fn millis(&self, name: &str) -> Duration {
        Duration::from_millis(self.delays.get(name).copied().unwrap_or_default())
    }

    fn fleet(&self) -> Result<Fleet, String> {
        let net = |second: u8, bits| Ipv4Net::new(Ipv4Addr::new(10, second, 0, 0), bits).map_err(|e| e.to_string());
        let v6 = "2001:db8::/64".parse().ok();
        let mut vpc = Vpc::new("eu-west-1", vec![net(0, 8)?], 1);
        vpc.count_only();
        for (name, action, _) in DELAYS {
            vpc.knobs.action(action).delay = self.millis(name);
        }
        let slow = self.millis(IMDS.0);
        vpc.knobs.imds_lag = slow;
        vpc.knobs.detach_time = slow;
        let group = vpc.add_group();
        let pods = vpc.add_subnet("eu-west-1a", net(1, self.subnet_bits)?, v6, &[]);
        let custom = self.settings.custom_networking;
        let nodes = if custom { vpc.add_subnet("eu-west-1a", net(2, 16)?, None, &[]) } else { pods.clone() };
        let mut fleet = Fleet::new(vpc);
        let now = fleet.now();
        let instance = fleet.sky.vpc.launch(now, &self.kind, &nodes, &[group]).map_err(|e| e.to_string())?;
        if let Some(primary) = fleet.sky.vpc.identity(&instance).map(|identity| identity.primary_eni) {
            // As an IPv6 node is launched; without ENABLE_IPv6 nobody looks at it.
            fleet.sky.vpc.meddle(now, &primary, |eni| eni.ipv6s.extend("2001:db8::f".parse::<Ipv6Addr>()));
        }
        let latencies = Latencies { link: slow, sandbox: Duration::ZERO, jitter_percent: 0, ..Latencies::default() };
        let setup = Setup { settings: Rc::clone(&self.settings), original: false, latencies, logged: false };
        let node = fleet.add(instance, setup, 1).map_err(|e| e.to_string())?;
        let api = &mut fleet.nodes[node].api;
        api.node.max_pods = Some(self.max_pods);
        api.eni_configs.insert(DEFAULT_ENI_CONFIG.into(), EniConfig { subnet: pods, groups: Vec::new() });
        fleet.start(node);
        Ok(fleet)
    }

    /// From the start of the node until its first pod has an address; `None` if it has none after a while.
    pub fn ready(&self) -> Result<Option<Duration>, String> {
        let mut fleet = self.fleet()?;
        let limit = nanos(READY_MAX);
        while fleet.sky.counts.ready.is_empty() && fleet.step(limit) {}
        if fleet.sky.counts.ready.is_empty() || self.max_pods <= HOST_PODS {
            return Ok(None);
        }
        fleet.bind(0, "first");
        while fleet.sky.counts.add_waits_ms.is_empty() && fleet.step(limit) {}
        let served = !fleet.sky.counts.add_waits_ms.is_empty();
        Ok(served.then(|| Duration::from_nanos(fleet.nanos())))
    }

    /// Changes the number of pods step by step, each given as the seconds since the first and the number, and watches.
    /// `churn`: replaces a tenth of the pods in the end. `strict`: ends with the first ADD that is refused.
    pub fn run(&self, steps: &[(u64, usize)], churn: bool, strict: bool) -> Result<Story, String> {
        let fleet = self.fleet()?;
        let mut run = Run {
            fleet,
            pods: VecDeque::new(),
            last_pod: 0,
            peak: Held::default(),
            foreign_attaches: 0,
            looked_at: 0,
            strict,
        };
        let mut story = Story::default();
        run.pass(REST / 4);
        if self.trunk() {
            run.attach_trunk()?;
        }
        run.pass(REST);
        story.idle = run.held();
        let begun = run.fleet.nanos();
        for (at, step) in steps.iter().enumerate() {
            let until = steps.get(at + 1).map(|next| begun.saturating_add(next.0.saturating_mul(1_000_000_000)));
            run.wait(begun.saturating_add(step.0.saturating_mul(1_000_000_000)));
            story.stages.push(run.stage(step.1, 0, until));
            if run.failed() {
                return Ok(story);
            }
        }
        story.peak = run.peak;
        story.calls.clone_from(run.fleet.sky.vpc.journal().counts());
        if let Some(attaches) = story.calls.get_mut("AttachNetworkInterface") {
            *attaches -= run.foreign_attaches;
        }
        story.calls.retain(|_, count| *count > 0);
        let pods = run.pods.len();
        if churn && pods > 0 {
            let replaced = pods.div_ceil(10);
            story.churn = Some((replaced, run.stage(pods, replaced, None)));
        }
        Ok(story)
    }
}

/// Pods on the host's network that every node has and that count among the kubelet's (`spec/operations.md` 9.1).
pub(super) const HOST_PODS: u32 = 2;

impl Run {
    // Whether an ADD was refused that should not have been.
    fn failed(&self) -> bool {
        self.strict && self.fleet.sky.counts.refused > 0
    }

    fn wait(&mut self, until: u64) {
        while !self.failed() && self.fleet.step(until) {
            let calls = self.fleet.sky.vpc.journal().counts().values().sum();
            if calls != std::mem::replace(&mut self.looked_at, calls) {
                self.look();
            }
        }
    }

    // What is held changes only with a call.
    fn look(&mut self) {
        let now = self.held();
        let most = &mut self.peak;
        most.enis = most.enis.max(now.enis);
        most.addresses = most.addresses.max(now.addresses);
        most.prefixes = most.prefixes.max(now.prefixes);
        most.taken = most.taken.max(now.taken);
    }

    fn pass(&mut self, time: Duration) {
        self.wait(self.fleet.nanos().saturating_add(nanos(time)));
    }

    fn held(&self) -> Held {
        let node = &self.fleet.nodes[0];
        let mut held = Held { pods: node.kubelet.running() as u64, ..Held::default() };
        for interface in self.fleet.sky.vpc.attached_to(&node.instance) {
            let v4 = (interface.secondary_ipv4s.len() + 16 * interface.v4_prefixes.len()) as u64;
            let v6 = interface.v6_prefixes.len() as u64;
            held.enis += 1;
            held.addresses = held.addresses.saturating_add(v4).saturating_add(v6 << 48); // a /80 each
            held.prefixes += interface.v4_prefixes.len() as u64 + v6;
            held.taken += 1 + v4;
        }
        let now = self.fleet.now().mono;
        let cooling = node.core().map_or(0, |core| core.pool().stats(now, 0).cooling as u64);
        held.free = held.addresses.saturating_sub(held.pods + cooling);
        held
    }

    // What the VPC resource controller does when the node asks for a trunk ENI (`spec/kubernetes.md` 4.3).
    fn attach_trunk(&mut self) -> Result<(), String> {
        let now = self.fleet.now();
        let node = &self.fleet.nodes[0];
        if !node.api.features.iter().any(|feature| feature.name == FEATURE_TRUNK) {
            return Ok(());
        }
        let instance = node.instance.clone();
        let vpc = &mut self.fleet.sky.vpc;
        let Some(identity) = vpc.identity(&instance) else { return Ok(()) };
        let eni: EniId = vpc
            .add_interface(now, &identity.subnet, "aws-k8s-trunk-eni", &Map::new())
            .map_err(|failure| failure.to_string())?;
        vpc.meddle(now, &eni, |eni| eni.interface_type = "trunk".into());
        let device = vpc.attached_to(&instance).filter_map(|eni| Some(eni.attachment.as_ref()?.device + 1)).max();
        let call = Call::Attach { eni, instance, device: device.unwrap_or(1), card: 0 };
        self.foreign_attaches += 1;
        vpc.execute(now, &call).result.map(|_| ()).map_err(|failure| failure.to_string())
    }

    // From now on there are so many pods, of which so many are new; until rest, or until another change.
    fn stage(&mut self, pods: usize, replaced: usize, until: Option<u64>) -> Stage {
        let before = self.fleet.sky.counts.pod_starts_ms.len();
        let refused = self.fleet.sky.counts.refused;
        for _ in 0..(self.pods.len() + replaced).saturating_sub(pods) {
            if let Some(pod) = self.pods.pop_front() {
                self.fleet.delete(0, pod, true);
            }
        }
        while self.pods.len() < pods {
            self.last_pod += 1;
            let name = format!("pod-{}", self.last_pod);
            self.pods.push_back(self.fleet.bind(0, &name));
        }
        let patience = self.fleet.nanos().saturating_add(nanos(PATIENCE));
        self.wait(until.map_or(patience, |until| until.min(patience)));
        let node = &self.fleet.nodes[0];
        let mut stage = Stage {
            unserved: pods.saturating_sub(node.kubelet.running()) as u64,
            refused: self.fleet.sky.counts.refused - refused,
            ..Stage::default()
        };
        if stage.unserved > 0 && until.is_none_or(|until| until > patience) {
            stage.cause = node.core().map(|core| core.status().cause.1).unwrap_or_default();
            self.take_back();
        }
        let rest = self.fleet.nanos().saturating_add(nanos(REST));
        self.wait(until.unwrap_or(rest));
        stage.last_ms = self.fleet.sky.counts.pod_starts_ms[before..].iter().copied().max().unwrap_or(0);
        stage.held = self.held();
        stage
    }

    fn take_back(&mut self) {
        let kubelet = &self.fleet.nodes[0].kubelet;
        let idle = |pod: &u32| kubelet.pods.get(pod).is_none_or(|pod| pod.running.is_none());
        let unserved: Vec<u32> = self.pods.iter().copied().filter(idle).collect();
        self.pods.retain(|pod| !unserved.contains(pod));
        for pod in unserved {
            self.fleet.delete(0, pod, true);
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What the pool hands out, in a word.
pub(super) fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Ipv4Addresses => "secondary-ip",
        Mode::Ipv4Prefixes => "prefix",
        Mode::Ipv6Prefixes => "ipv6",
    }
}
