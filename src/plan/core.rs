//! The node's brain: `step(now, event) -> effects`, a state machine without I/O that the daemon, the simulator and the
//! planner run unchanged.
//!
//! Effects are data. What takes time is an operation with a number: the effect that starts it and the event that ends it
//! carry the same number. Two rules run through everything: an allocation is durable before its reply leaves
//! ([`saver`]), and what is begun with EC2 is written down before the call ([`growth`], [`freeing`]). EC2 decides what
//! exists; IMDS only hints ([`upkeep`]).

mod boot;
mod branch;
mod cards;
mod cause;
mod cluster;
mod event;
mod fallback;
mod freeing;
mod growth;
mod pods;
mod saver;
mod status;
mod subnets;
mod sweep;
mod upkeep;
mod v6;

pub use event::{Answer, Applied, CallId, Effect, Event, Level, OpId, Seen, Tally};
pub use status::Status;

use super::backoff::{Backoff, Random};
use super::host::Intent;
use super::pace::Pacer;
use super::pool::Pool;
use super::sizing::{Sizing, Targets};
use crate::model::checkpoint::{Creating, EniFacts};
use crate::model::ec2::{Call, ConntrackTimeouts, Failure, Interface, Reply, Subnet};
use crate::model::ids::{EniId, GroupId, PodKey, SubnetId};
use crate::model::imds::{self, Identity, Query};
use crate::model::kube;
use crate::model::map::{Map, Set};
use crate::model::order::Gather as _;
use crate::model::time::{Mono, Now};
use ipnet::IpNet;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

/// What the core is told once.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are the settings' own switches")]
pub struct Config {
    /// The instance.
    pub identity: Identity,
    /// IPv6 mode.
    pub v6: bool,
    /// Prefix delegation.
    pub prefix_mode: bool,
    /// CIDRs per ENI besides its own address.
    pub slots: usize,
    /// ENIs that each managed network card may hold, by card index; card 0 is always there.
    pub cards: Map<u32, usize>,
    /// Pods that the node may run, until its Node object tells.
    pub max_pods: usize,
    /// ENIs and addresses may be created, tagged and given back.
    pub provisioning: bool,
    /// No call to EC2 at all: IMDS is all there is (ENABLE_IMDS_ONLY_MODE).
    pub imds_only: bool,
    /// Subnet and groups of new ENIs come from the ENIConfig that the node names by this annotation or this label.
    pub custom_networking: Option<(String, String)>,
    /// Serve pods with branch ENIs.
    pub pod_eni: bool,
    /// The instance type can carry a trunk ENI.
    pub trunk_capable: bool,
    /// Write each pod's address into an annotation of the pod.
    pub annotate_pod_ip: bool,
    /// Pods may ask for one interface on every card.
    pub multi_nic: bool,
    /// Look for ENIs that dead nodes have left.
    pub clean_leaked: bool,
    /// The subnet of a new ENI is looked for by tags.
    pub subnet_discovery: bool,
    /// ENIs without our tags are used too.
    pub manage_untagged: bool,
    /// CLUSTER_NAME; empty when not set.
    pub cluster_name: String,
    /// ADDITIONAL_ENI_TAGS, checked.
    pub additional_tags: Map<String, String>,
    /// NETWORK_POLICY_ENFORCING_MODE verbatim; empty when not set.
    pub network_policy_mode: String,
    /// What may change while the daemon runs.
    pub tunables: Tunables,
    /// Seed of jitter and client tokens.
    pub seed: u64,
}

/// Settings that take effect without a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunables {
    /// Warm targets.
    pub targets: Targets,
    /// How long a released address rests.
    pub ip_cooldown: Duration,
    /// How long an ADD waits for an address that is on its way.
    pub add_wait: Duration,
    /// Grow and free ENIs also while the node is cordoned (AWS_MANAGE_ENIS_NON_SCHEDULABLE).
    pub manage_unschedulable: bool,
    /// The host's network as the settings want it; the core fills in ENIs, pods and VPC CIDRs.
    pub host: Intent,
}

/// What has to be looked at again at a certain time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// The start waits no longer for EC2.
    Patience,
    /// New pods wait no longer for EC2's word.
    Trust,
    /// IMDS: all ENIs.
    Scan,
    /// IMDS: CIDRs of the VPC.
    VpcCidrs,
    /// IMDS: security groups.
    Groups,
    /// EC2: all ENIs of the instance.
    Describe,
    /// The host's network.
    Host,
    /// Links of the host, to find pods that are gone.
    Links,
    /// The pause after a failed growth ends.
    Growth,
    /// Growths in progress want to go on.
    Growing,
    /// Calls to EC2 wait for their turn.
    Pace,
    /// A checkpoint that could not be written is tried again.
    Save,
    /// CIDRs or an ENI may be given back: enough time has passed.
    Shrink,
    /// ENIs on their way out.
    Freeing,
    /// EC2: ENIs that we made and do not know of.
    Leaked,
    /// EC2: ENIs that dead nodes have left.
    Sweep,
    /// The API server: features of the CNINode.
    Features,
}

/// Number of a growth.
type GrowthId = OpId;

/// An operation in progress: what its end means.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Op {
    Scan,
    VpcCidrs,
    Groups,
    Describe,
    Host { enis: Set<EniId>, gone: Set<IpAddr>, swept: Map<IpAddr, Mono>, young: bool },
    Tags(EniId),
    ModifyGroups(EniId),
    Unassign(EniId, Vec<IpNet>),
    Subnets,
    Growth(GrowthId),
    Look(GrowthId),
    Modify(GrowthId),
    Free(EniId),
    Leaked,
    Sweep,
    SweepDelete(EniId),
    EniConfig(String),
    CniNode,
    SetFeatures,
    Notice,
    Lookup(branch::Lookup),
    Annotate(branch::Annotated),
    Unannotate { namespace: String, name: String, address: IpAddr },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing is known yet.
    Starting,
    /// Observing, setting up the host; no requests are served.
    Booting,
    /// Requests are served.
    Ready,
    /// No growth any more; requests are served until the process ends.
    Stopping,
}

/// Something of the pool that EC2 did not list: an ENI, or a CIDR on it.
#[derive(Clone, Copy, Debug)]
struct Absent {
    /// When that was first seen.
    since: Mono,
    /// Seen twice, well apart, and kept all the same because pods use it.
    confirmed: bool,
}

/// Pauses between attempts to reach IMDS, EC2, the kernel or the disk again.
const RETRY: Backoff = Backoff { first: Duration::from_millis(500), cap: Duration::from_secs(30), jitter_percent: 20 };
/// How often VPC CIDRs, security groups and the host's rules are looked at (`spec/ipamd.md` 9).
const WATCH: Duration = Duration::from_secs(30);
/// Reconcile after this long without a pool action, and at least every [`RECONCILE_MAX`] (B39).
const RECONCILE: Duration = Duration::from_mins(1);
const RECONCILE_MAX: Duration = Duration::from_mins(5);
/// When to look for an ENI that a lost answer may have left behind: EC2 may list it late.
const LEAK_CHECKS: [Duration; 2] = [Duration::from_secs(30), Duration::from_mins(5)];
/// How long a start waits for EC2's word on what IMDS lists; living pods must not wait longer.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long new pods wait for that word: an address that EC2 has taken away leads nowhere. After that, what IMDS lists and
/// EC2 listed before the restart is trusted.
const TRUST: Duration = Duration::from_secs(3);
/// When tags or security groups that EC2 refused to set are tried again.
const AMEND_AGAIN: Duration = Duration::from_mins(10);
/// A pod's address rests for so long after its DEL, however short the cooldown is: what the daemon put back while it did not know
/// of the DEL goes again meanwhile, and must not be the next pod's.
pub const REST_MIN: Duration = Duration::from_secs(3);
/// A plugin needs less than this between the answer of the daemon and the end of its work on the host.
const PLUGIN_MAX: Duration = Duration::from_secs(5);
/// When a new pod's network is looked at for the first time: when its plugin has ended for sure, and then some, so that one
/// look serves pods that come one after the other.
const SETTLED: Duration = Duration::from_secs(6);
/// How often the host's links are compared with the allocations (B18).
const LINK_CHECK: Duration = Duration::from_secs(150);

/// The state of the node.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state in disguise; that is `phase`")]
pub struct Core {
    config: Config,
    random: Random,
    phase: Phase,
    now: Now,
    out: Vec<Effect>,
    ops: Map<OpId, Op>,
    next_op: OpId,
    timers: Map<Timer, Mono>,
    attempts: Map<Timer, u32>,
    woken_for: Option<Mono>,
    // Looks for forgotten ENIs that are still to come.
    leak_checks: usize,
    // ENIs that dead nodes have left, to be deleted one after the other.
    leftovers: Vec<EniId>,

    pool: Pool,
    saver: saver::Saver,
    waiting: VecDeque<pods::Waiting>,
    // What the API server told.
    cluster: cluster::Cluster,
    // Pods bound to this node that need an address, as the API server tells.
    bound: usize,
    restarted: bool,
    // Addresses that a pod seems to have although the checkpoint was unreadable.
    reserved: Map<IpAddr, PodKey>,
    // Cooldowns from the checkpoint, until the CIDR of the address is known.
    cooling: Map<IpAddr, Mono>,
    missing_veth: Set<PodKey>,
    // Addresses that rules lead to or from, and nobody has: from when on they are swept if they still are there.
    strays: Map<IpAddr, Mono>,

    // What IMDS and EC2 told.
    attached: Map<EniId, imds::Eni>,
    scanned: bool,
    facts: Map<EniId, EniFacts>,
    asked_ec2: bool,
    described: Option<Mono>,
    // What EC2 listed on each ENI when it was last asked.
    listed: Map<EniId, Set<IpNet>>,
    // The device index of each ENI that EC2 listed as attached: IMDS may omit one.
    devices: Map<EniId, u32>,
    // How often EC2 was asked again about ENIs among them that IMDS does not show.
    looks: u32,
    // What EC2 had listed when the last run of this process ended.
    trusted: Map<EniId, Set<IpNet>>,
    conntrack: ConntrackTimeouts,
    vpc_cidrs: Option<Vec<IpNet>>,
    groups: Option<Vec<GroupId>>,
    // Absent inside: EC2 would not tell.
    subnets: Option<(Mono, Option<Vec<Subnet>>)>,
    exhausted: Map<SubnetId, Mono>,
    fragmented: fallback::Fragmented,
    judgement: subnets::Judgement,
    // ENIs that take no more CIDRs by EC2's word, although we know of fewer: until when that is believed.
    full: Map<EniId, Mono>,
    // ENIs that EC2 has shown to be the most that a card takes, and until when that is believed.
    lowered: Map<u32, (usize, Mono)>,
    absent: Map<(EniId, Option<IpNet>), Absent>,
    unassigned: Map<IpNet, Mono>,
    // What EC2 assigned by its answer to a call: who lists it elsewhere may be behind.
    arrived: Map<IpNet, Mono>,

    // The host's network: what it should hold, and what it holds.
    wanted: Map<EniId, imds::Eni>,
    // Since when the host could not be set up for some of them.
    refused: Map<EniId, Mono>,
    ready: Set<EniId>,
    // Link indexes of trunk ENIs.
    trunks: Map<EniId, u32>,
    // Pods with a branch ENI, as the API server told last.
    branches: Vec<super::host::HostBranch>,
    gone: Set<IpAddr>,
    // Addresses that were given back lately: what is left of them on the host is swept.
    released: Map<IpAddr, Mono>,
    host_dirty: bool,

    // What is being done with EC2.
    pacer: Pacer<OpId>,
    growths: Map<GrowthId, growth::Growth>,
    growth_failures: u32,
    // Failures of the cards above 0, and until when each is left alone.
    held_up: Map<u32, (u32, Mono)>,
    last_failure: Option<String>,
    grown_once: bool,
    resume: VecDeque<Creating>,
    freeing: Map<EniId, freeing::Free>,
    last_action: Mono,
    last_reconcile: Mono,
    last_shrink: Option<Mono>,
    enough: Option<freeing::Enough>,
}

impl Core {
    /// A core that knows nothing yet; it acts on [`Event::Started`].
    pub fn new(config: Config) -> Core {
        Core {
            random: Random::new(config.seed),
            pool: Pool::new(config.prefix_mode, config.tunables.ip_cooldown),
            config,
            phase: Phase::Starting,
            now: Now::default(),
            out: Vec::new(),
            ops: Map::new(),
            next_op: 1,
            timers: Map::new(),
            attempts: Map::new(),
            woken_for: None,
            leak_checks: 0,
            leftovers: Vec::new(),
            saver: saver::Saver::default(),
            waiting: VecDeque::new(),
            cluster: cluster::Cluster::default(),
            bound: 0,
            restarted: false,
            reserved: Map::new(),
            cooling: Map::new(),
            missing_veth: Set::new(),
            strays: Map::new(),
            attached: Map::new(),
            scanned: false,
            facts: Map::new(),
            asked_ec2: false,
            described: None,
            listed: Map::new(),
            devices: Map::new(),
            looks: 0,
            trusted: Map::new(),
            conntrack: ConntrackTimeouts::default(),
            vpc_cidrs: None,
            groups: None,
            subnets: None,
            exhausted: Map::new(),
            fragmented: fallback::Fragmented::default(),
            judgement: subnets::Judgement::default(),
            full: Map::new(),
            lowered: Map::new(),
            absent: Map::new(),
            unassigned: Map::new(),
            arrived: Map::new(),
            wanted: Map::new(),
            refused: Map::new(),
            ready: Set::new(),
            trunks: Map::new(),
            branches: Vec::new(),
            gone: Set::new(),
            released: Map::new(),
            host_dirty: false,
            pacer: Pacer::default(),
            growths: Map::new(),
            growth_failures: 0,
            held_up: Map::new(),
            last_failure: None,
            grown_once: false,
            resume: VecDeque::new(),
            freeing: Map::new(),
            last_action: Mono::default(),
            last_reconcile: Mono::default(),
            last_shrink: None,
            enough: None,
        }
    }

    /// Takes one event and says what is to be done. Panics only if an invariant is broken: a wrong answer to a pod is
    /// worse than a restart from the checkpoint.
    pub fn step(&mut self, now: Now, event: Event) -> Vec<Effect> {
        self.now = now;
        match event {
            Event::Started { checkpoints, seen, spool } => self.started(&checkpoints, &seen, spool),
            Event::Add(call, request) => self.add(call, request),
            Event::Del(call, request) => self.del(call, &request),
            Event::Spool(records) => self.drain_spool(records),
            Event::Seen(Ok(seen)) => self.check_links(&seen),
            Event::Seen(Err(error)) => self.log(Level::Warn, format!("list links: {error}")),
            Event::Saved(generation, result) => self.saved(generation, result),
            Event::Imds(op, result) => self.imds_done(op, result),
            Event::Ec2(op, result) => self.ec2_done(op, result),
            Event::Kernel(op, result) => self.kernel_done(op, result),
            Event::Repaired(what, text) => self.notice(kube::Regarding::Node, "HostNetworkRepaired", what, &text),
            Event::PodsSeen(bound) => self.bound = bound,
            Event::BranchesSeen(pods) => self.branches_seen(&pods),
            Event::Retuned(tunables) => self.retune(*tunables),
            Event::Kube(op, result) => self.kube_done(op, result),
            Event::NodeSeen(node) => self.node_seen(*node),
            Event::Tick => {}
            Event::Stop => self.stop(),
        }
        self.advance();
        self.pool.check();
        std::mem::take(&mut self.out)
    }

    /// The pool, for those who show it.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// ENIs that the node may hold, and addresses of each.
    pub fn room(&self) -> (usize, usize) {
        (self.config.cards.keys().map(|card| self.sizing(*card).eni_limit).sum(), self.config.slots)
    }

    /// Whether nothing is in progress and nobody waits: the state to which the core always comes back.
    pub fn quiet(&self) -> bool {
        self.phase == Phase::Ready
            && self.ops.is_empty()
            && self.growths.is_empty()
            && self.freeing.is_empty()
            && self.waiting.is_empty()
            && self.saver.idle()
    }

    // Everything that follows from the state and the time, whatever event it was.
    fn advance(&mut self) {
        if self.phase != Phase::Starting {
            self.run_timers();
            self.adopt();
            self.enrol_ready();
            self.drop_absent();
            self.serve_waiting();
            self.grow(); // knows now who still waits
            self.refuse_hopeless();
            self.keep_features();
            self.become_ready();
            self.shrink();
            self.advance_freeing();
            self.reconfigure_host();
            self.save();
            self.send_paced();
        }
        let deadlines = self.timers.values().copied().chain(self.waiting.iter().map(|waiting| waiting.deadline));
        let next = deadlines.min();
        if let Some(at) = next.filter(|_| next != self.woken_for) {
            self.out.push(Effect::WakeAt(at));
        }
        self.woken_for = next;
    }

    fn run_timers(&mut self) {
        let due: Vec<Timer> =
            self.timers.iter().filter(|(_, at)| **at <= self.now.mono).map(|(timer, _)| *timer).collect();
        for timer in due {
            self.timers.remove(&timer);
            match timer {
                Timer::Scan => self.ask_imds(Op::Scan, Query::Scan),
                Timer::VpcCidrs => self.ask_imds(Op::VpcCidrs, Query::VpcCidrs { v6: self.config.v6 }),
                Timer::Groups => self.ask_imds(Op::Groups, Query::SecurityGroups),
                Timer::Describe => self.describe(),
                Timer::Host => self.host_dirty = true,
                Timer::Links => {
                    self.out.push(Effect::ListLinks);
                    self.set_timer(Timer::Links, LINK_CHECK);
                }
                Timer::Growing => self.growing_timer(),
                Timer::Leaked => self.look_for_leaked(),
                Timer::Sweep => self.sweep(),
                Timer::Trust => self.trust(),
                Timer::Features => self.read_features(),
                // Looked at in every step.
                Timer::Patience | Timer::Growth | Timer::Pace | Timer::Save | Timer::Shrink | Timer::Freeing => {}
            }
        }
    }

    fn set_timer(&mut self, timer: Timer, after: Duration) {
        self.timers.insert(timer, self.now.mono.plus(after));
    }

    // Wakes up no later than `at` for `timer`.
    fn wake_for(&mut self, timer: Timer, at: Mono) {
        let at = self.timers.get(&timer).map_or(at, |set| at.min(*set));
        self.timers.insert(timer, at);
    }

    // The next attempt of something that failed; the pause grows until it succeeds.
    fn retry(&mut self, timer: Timer) {
        let attempt = self.attempts.entry(timer).or_insert(0);
        let pause = RETRY.pause(*attempt, &mut self.random);
        *attempt = attempt.saturating_add(1);
        self.set_timer(timer, pause);
    }

    fn succeeded(&mut self, timer: Timer) {
        self.attempts.remove(&timer);
    }

    fn begin(&mut self, op: Op) -> OpId {
        let id = self.next_op;
        self.next_op += 1;
        self.ops.insert(id, op);
        id
    }

    fn ask_imds(&mut self, op: Op, query: Query) {
        if !self.ops.values().any(|running| *running == op) {
            let id = self.begin(op);
            self.out.push(Effect::Imds(id, query));
        }
    }

    fn ask_kube(&mut self, op: Op, call: kube::Call) {
        let id = self.begin(op);
        self.out.push(Effect::Kube(id, call));
    }

    fn ask_ec2(&mut self, op: Op, call: Call) {
        let id = self.begin(op);
        self.pacer.submit(id, call);
    }

    // What pods wait for goes first, what gives back last. A node that cannot serve yet will have pods wait.
    fn rank(&self, pressing: bool, op: OpId) -> u8 {
        match self.ops.get(&op) {
            Some(Op::Describe | Op::Subnets | Op::Growth(_) | Op::Modify(_)) => u8::from(!pressing),
            _ => 2,
        }
    }

    // Lets out the calls whose turn it is.
    fn send_paced(&mut self) {
        let pressing = !self.waiting.is_empty() || self.phase == Phase::Booting;
        let mut pacer = std::mem::take(&mut self.pacer);
        while let Some((op, call)) = pacer.next(self.now.mono, |op| self.rank(pressing, op)) {
            self.out.push(Effect::Ec2(op, call));
        }
        self.pacer = pacer;
        match self.pacer.wake_at(self.now.mono, |op| self.rank(pressing, op)) {
            Some(at) => drop(self.timers.insert(Timer::Pace, at)),
            None => drop(self.timers.remove(&Timer::Pace)),
        }
    }

    fn tally(&mut self, tally: Tally) {
        self.out.push(Effect::Tally(tally));
    }

    fn log(&mut self, level: Level, text: String) {
        self.out.push(Effect::Log(level, text));
    }

    fn imds_done(&mut self, op: OpId, result: Result<imds::Answer, String>) {
        match (self.ops.remove(&op), result) {
            (Some(Op::Scan), Ok(imds::Answer::Enis(enis))) => self.scan_done(enis),
            (Some(Op::VpcCidrs), Ok(imds::Answer::Cidrs(cidrs))) => self.vpc_cidrs_done(cidrs),
            (Some(Op::Groups), Ok(imds::Answer::Groups(groups))) => self.groups_done(groups),
            (Some(Op::Look(id)), Ok(imds::Answer::Eni(eni))) => self.look_done(id, eni),
            (Some(Op::Look(id)), Err(_)) => self.look_done(id, None),
            (Some(op), Err(error)) => {
                self.log(Level::Warn, format!("ask IMDS: {error}"));
                match op {
                    Op::VpcCidrs => self.retry(Timer::VpcCidrs),
                    Op::Groups => self.retry(Timer::Groups),
                    _ => self.scan_failed(),
                }
            }
            (op, Ok(answer)) => self.log(Level::Error, format!("IMDS answered {answer:?} to {op:?}")),
            (None, Err(_)) => {} // of an operation that was given up
        }
    }

    fn ec2_done(&mut self, op: OpId, result: Result<Reply, Failure>) {
        if self.pacer.answered(self.now.mono, op, &result, &mut self.random) {
            return; // throttled: it is sent again
        }
        if let Err(failure) = &result {
            self.tell_of_failure(failure);
        }
        match (self.ops.remove(&op), result) {
            (Some(Op::Describe), Ok(Reply::Interfaces(interfaces))) => self.describe_done(&interfaces),
            (Some(Op::Describe), Err(failure)) => {
                self.log(Level::Warn, format!("describe the instance's ENIs: {failure}"));
                self.tally(Tally::Error("reconcileFailedGetENIs"));
                self.retry(Timer::Describe);
            }
            (Some(Op::Subnets), result) => self.subnets_done(result),
            (Some(Op::Growth(id)), result) => self.growth_done(id, result),
            (Some(Op::Modify(id)), result) => self.modify_done(id, result),
            (Some(Op::Free(eni)), result) => self.free_done(&eni, result),
            (Some(Op::Unassign(eni, nets)), result) => self.unassign_done(&eni, &nets, result),
            (Some(Op::Leaked), Ok(Reply::Interfaces(found))) => self.take_leaked(&found),
            (Some(Op::Leaked), Err(failure)) => {
                self.log(Level::Warn, format!("look for leaked ENIs: {failure}"));
                self.retry(Timer::Leaked);
            }
            (Some(Op::Sweep), result) => self.sweep_done(result),
            (Some(Op::SweepDelete(eni)), result) => self.swept(&eni, result.err()),
            (Some(Op::Tags(eni) | Op::ModifyGroups(eni)), Err(failure)) => {
                // Compared and tried again with the next description of the ENIs.
                self.log(Level::Warn, format!("eni {eni}: {failure}"));
                self.wake_for(Timer::Describe, self.now.mono.plus(AMEND_AGAIN));
            }
            (Some(Op::Tags(_) | Op::ModifyGroups(_)) | None, _) => {}
            (Some(op), result) => self.log(Level::Error, format!("EC2 answered {result:?} to {op:?}")),
        }
    }

    fn sizing(&self, card: u32) -> Sizing {
        self.sizing_with(card, self.demand(card))
    }

    fn sizing_with(&self, card: u32, demand: usize) -> Sizing {
        let on_card = |id: &EniId| self.attached.get(id).is_some_and(|eni| eni.card == card);
        let trunk = usize::from(card == 0 && self.trunk_to_come());
        // An ENI on its way out still takes its slot.
        let leaving = self.freeing.keys().filter(|id| on_card(id) || (card == 0 && !self.attached.contains_key(*id)));
        Sizing {
            card,
            targets: self.config.tunables.targets,
            slots: self.config.slots,
            eni_limit: self.eni_limit(card).saturating_sub(self.strangers(card)),
            reserved: leaving.count() + trunk,
            max_pods: self.max_pods(),
            demand,
        }
    }

    // Pods without an address on a card: those that wait, and those that will ask.
    fn demand(&self, card: u32) -> usize {
        let waiting = self.waiting_for(card);
        if card != 0 || self.bound == 0 {
            return waiting;
        }
        waiting.max(self.bound.saturating_sub(self.pool.held_on(0)))
    }

    // Whether pods may be put on an attached ENI, as far as is known. Without ENABLE_MULTI_NIC only card 0 is there.
    fn managed(&self, id: &EniId) -> bool {
        let usable = |facts: &EniFacts| facts.managed && facts.interface_type != cards::EFA_ONLY;
        let card_managed = self.card_of(id).is_none_or(|card| self.config.cards.contains_key(&card));
        let known = self.facts.get(id);
        // Without EC2 nobody tells what an ENI is for (`spec/aws.md` 9.2).
        let ours = if self.config.imds_only { self.attached.contains_key(id) } else { known.is_some_and(usable) };
        *id == self.config.identity.primary_eni || (card_managed && ours)
    }

    fn eni_limit(&self, card: u32) -> usize {
        let of_type = self.config.cards.get(&card).copied().unwrap_or(0);
        let shown = self.lowered.get(&card).filter(|(_, until)| *until > self.now.mono);
        shown.map_or(of_type, |(enis, _)| of_type.min(*enis))
    }

    fn retune(&mut self, tunables: Tunables) {
        self.log(Level::Info, format!("settings changed: {:?}", tunables.targets));
        self.pool.set_cooldown(tunables.ip_cooldown);
        self.host_dirty |= tunables.host != self.config.tunables.host;
        self.config.tunables = tunables;
    }

    fn stop(&mut self) {
        self.phase = Phase::Stopping;
        self.log(Level::Info, "stopping: no growth any more".into());
    }

    // Whether addresses are on their way, or what is needed to ask for them.
    fn growing_now(&self) -> bool {
        let asking = |op: &Op| matches!(op, Op::Subnets | Op::EniConfig(_));
        !self.growths.is_empty() || self.ops.values().any(asking)
    }

    fn acted(&mut self) {
        self.last_action = self.now.mono;
    }
}

// What EC2 says an ENI carries besides its own address.
fn cidrs_of(interface: &Interface) -> Set<IpNet> {
    let single = interface.secondary_ipv4s.iter().map(|ip| IpNet::from(IpAddr::V4(*ip)));
    single.chain(interface.v4_prefixes.iter().map(|net| IpNet::V4(*net))).gather()
}
