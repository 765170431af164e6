//! A trial: many nodes boot on one EC2 with its documented throttling, settle, and get their pods as fast as a scheduler
//! binds them. How long until the last pod runs, and what did it cost?

use super::conditions::Latencies;
use super::fleet::Fleet;
use super::node::Setup;
use super::vpc::Vpc;
use crate::model::ec2::Failure;
use crate::model::limits::Limits;
use crate::model::map::Map;
use crate::model::settings::{Mode, Settings};
use crate::plan::backoff::Random;
use std::rc::Rc;
use std::time::Duration;

/// Virtual time after which a trial is given up.
const LIMIT: Duration = Duration::from_hours(24);
/// Nodes start within this time of each other.
const BOOT_SPREAD: Duration = Duration::from_mins(1);
/// Virtual time between the last daemon's start and the first pod.
const PAUSE: Duration = Duration::from_mins(2);
/// Virtual time between the last pod and the look at what is held at rest.
const REST: Duration = Duration::from_mins(5);
/// How often it is looked whether all is done.
const LOOK: Duration = Duration::from_secs(1);

/// What is tried.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Nodes.
    pub nodes: usize,
    /// Pods on each.
    pub pods: usize,
    /// Pods that the scheduler binds in a second, over all nodes.
    pub pods_per_second: u32,
    /// Instance type of all nodes.
    pub instance_type: String,
    /// Settings of all nodes.
    pub settings: Settings,
    /// The original's algorithm instead of ours.
    pub original: bool,
    /// How long EC2 takes, by action.
    pub ec2_delays: Map<String, Duration>,
    /// Seed.
    pub seed: u64,
}

/// What came of it. Times are milliseconds of virtual time.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Every pod runs.
    pub converged: bool,
    /// From the start of the first node until all daemons serve, in milliseconds.
    pub ready_ms: u64,
    /// From the binding of the first pod until the last one runs, in milliseconds.
    pub pods_ms: u64,
    /// From the binding of each pod until it runs, sorted.
    pub pod_starts_ms: Vec<u32>,
    /// How long each ADD that got an address took, sorted.
    pub add_waits_ms: Vec<u32>,
    /// ADDs that were refused.
    pub refused: u64,
    /// Calls by action, failed ones included.
    pub calls: Map<&'static str, u64>,
    /// Of these, calls that would change something.
    pub mutating: u64,
    /// Of all, calls that were throttled.
    pub throttled: u64,
    /// Addresses (those of the ENIs themselves included) and ENIs held at most.
    pub peak: (usize, usize),
    /// The same at rest, with all pods running.
    pub rest: (usize, usize),
    /// Events that the nodes took.
    pub steps: u64,
}

/// EC2's usual delays, by action, in milliseconds.
pub const DELAYS_MS: [(&str, u64); 12] = [
    ("DescribeNetworkInterfaces", 150),
    ("DescribeSubnets", 100),
    ("DescribeInstanceTypes", 100),
    ("CreateNetworkInterface", 600),
    ("AttachNetworkInterface", 800),
    ("ModifyNetworkInterfaceAttribute", 250),
    ("AssignPrivateIpAddresses", 400),
    ("AssignIpv6Addresses", 400),
    ("UnassignPrivateIpAddresses", 400),
    ("CreateTags", 250),
    ("DetachNetworkInterface", 500),
    ("DeleteNetworkInterface", 300),
];
/// How long a new ENI takes to be seen by IMDS, and a detach.
const SLOW: Duration = Duration::from_millis(1500);

/// A VPC with room for so many addresses, throttled as AWS documents it; the subnets are in one zone each.
pub fn roomy_vpc(addresses: usize, delays: &Map<String, Duration>, seed: u64) -> Vpc {
    let nets = addresses.div_ceil(50_000).clamp(1, 250);
    let cidr = |n: usize| format!("10.{n}.0.0/16").parse().ok();
    let cidrs: Vec<ipnet::Ipv4Net> = (0..nets).filter_map(cidr).collect();
    let mut vpc = Vpc::new("eu-west-1", cidrs.clone(), seed);
    vpc.count_only();
    vpc.set_eni_quota(usize::MAX);
    for (n, cidr) in cidrs.into_iter().enumerate() {
        vpc.add_subnet(&format!("eu-west-1{}", ["a", "b", "c"][n % 3]), cidr, None, &[]);
    }
    vpc.knobs.throttle_like_aws();
    vpc.knobs.imds_lag = SLOW;
    vpc.knobs.detach_time = SLOW;
    for (action, delay) in delays {
        vpc.knobs.action(action).delay = *delay;
    }
    vpc
}

// Addresses that the node may come to hold at most.
fn most_addresses(settings: &Settings, limits: &Limits, pods: usize) -> usize {
    let enis = limits.enis as usize;
    match settings.mode_wished() {
        Mode::Ipv4Addresses => enis * limits.ipv4_per_eni as usize,
        _ => 16 * (pods.div_ceil(16) + 4) + enis,
    }
}

impl Trial {
    /// Carries it out. Fails for an instance type that is not known, or settings that do not fit it.
    pub fn run(&self) -> Result<Report, Failure> {
        let mut dice = Random::new(self.seed);
        let mut fleet = self.fleet(&mut dice)?;
        let mut report = Report::default();
        self.boot(&mut fleet, &mut dice, &mut report);
        if fleet.sky.counts.ready.len() == self.nodes {
            let begun = fleet.nanos();
            self.bind(&mut fleet, &mut dice);
            let wanted = self.nodes * self.pods;
            let done = |fleet: &Fleet| fleet.sky.counts.pod_starts_ms.len() >= wanted;
            report.converged = until(&mut fleet, &mut report, done);
            let latest = fleet.sky.counts.last_pod;
            report.pods_ms = latest.saturating_sub(begun) / 1_000_000;
        }
        let end = fleet.nanos().saturating_add(nanos(REST));
        until(&mut fleet, &mut report, |fleet| fleet.nanos() >= end);
        report.rest = fleet.sky.vpc.held();
        report.ready_ms = fleet.sky.counts.ready.values().max().copied().unwrap_or(0) / 1_000_000;
        let counts = fleet.sky.counts;
        (report.pod_starts_ms, report.add_waits_ms) = (counts.pod_starts_ms, counts.add_waits_ms);
        report.pod_starts_ms.sort_unstable();
        report.add_waits_ms.sort_unstable();
        (report.refused, report.mutating, report.steps) = (counts.refused, counts.mutating, fleet.sky.steps);
        let journal = fleet.sky.vpc.journal();
        (report.calls, report.throttled) = (journal.counts().clone(), journal.throttled());
        Ok(report)
    }

    fn fleet(&self, dice: &mut Random) -> Result<Fleet, Failure> {
        let unknown = |vpc: &Vpc| super::node::limits_of(vpc, &self.instance_type);
        let empty = Vpc::new("eu-west-1", Vec::new(), self.seed);
        let most = unknown(&empty).map_or(64, |limits| most_addresses(&self.settings, &limits, self.pods));
        let mut vpc = roomy_vpc(most.saturating_mul(self.nodes), &self.ec2_delays, self.seed);
        let group = vpc.add_group();
        let subnets = vpc.subnets();
        let latencies = Latencies { link: SLOW, ..Latencies::default() };
        let settings = Rc::new(self.settings.clone());
        let mut fleet = Fleet::new(vpc);
        for n in 0..self.nodes {
            let subnet = &subnets[n % subnets.len()];
            let now = fleet.now();
            let instance = fleet.sky.vpc.launch(now, &self.instance_type, subnet, std::slice::from_ref(&group))?;
            let setup = Setup { settings: Rc::clone(&settings), original: self.original, latencies, logged: false };
            fleet.add(instance, setup, dice.bits())?;
        }
        Ok(fleet)
    }

    // All nodes start, and have their first addresses.
    fn boot(&self, fleet: &mut Fleet, dice: &mut Random, report: &mut Report) {
        for node in 0..self.nodes {
            fleet.start_at(node, dice.below(nanos(BOOT_SPREAD)));
        }
        until(fleet, report, |fleet| fleet.sky.counts.ready.len() == self.nodes);
        let end = fleet.nanos().saturating_add(nanos(PAUSE));
        until(fleet, report, |fleet| fleet.nanos() >= end);
    }

    fn bind(&self, fleet: &mut Fleet, dice: &mut Random) {
        let now = fleet.nanos();
        let seconds = (self.nodes * self.pods) as u64 / u64::from(self.pods_per_second);
        let spread = nanos(Duration::from_secs(seconds.max(1)));
        for node in 0..self.nodes {
            for pod in 0..self.pods {
                fleet.bind_at(node, &format!("pod-{pod}"), now + dice.below(spread));
            }
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

// Lets time pass until `done`; false if it takes too long.
fn until(fleet: &mut Fleet, report: &mut Report, done: impl Fn(&Fleet) -> bool) -> bool {
    let limit = fleet.nanos().saturating_add(nanos(LIMIT));
    while !done(fleet) {
        if fleet.nanos() >= limit {
            return false;
        }
        fleet.pass(LOOK);
        let held = fleet.sky.vpc.held();
        report.peak = (report.peak.0.max(held.0), report.peak.1.max(held.1));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowded_fleet_calls_ec2_less_often_than_the_originals() {
        // Attaching 200 ENIs while 3,000 pods come in 30 s is just what EC2's limits allow.
        let (settings, _) = Settings::parse(|_| None);
        let trial = Trial {
            nodes: 100,
            pods: 30,
            pods_per_second: 100,
            instance_type: "m5.xlarge".into(),
            settings,
            original: false,
            ec2_delays: DELAYS_MS.map(|(action, ms)| (action.to_owned(), Duration::from_millis(ms))).into(),
            seed: 1,
        };
        let ours = trial.run().unwrap();
        let theirs = Trial { original: true, ..trial }.run().unwrap();
        let figures = |report: &Report| (report.mutating, report.throttled, report.pods_ms);
        println!("mutating calls, throttled, ms: {:?}, the original's {:?}", figures(&ours), figures(&theirs));
        assert!(ours.converged && ours.mutating < theirs.mutating * 9 / 10);
        assert!(ours.pods_ms < theirs.pods_ms * 3 / 2, "the last pod must not pay for it");
    }
}
