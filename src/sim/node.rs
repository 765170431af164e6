//! One node in virtual time: the real [`Core`] (or the original's algorithm), its disk, kernel and spool, and the way from
//! each effect to the event that ends it. Its pods are in [`super::kubelet`].
//!
//! Nothing is asserted here, since the planner and `simulate` use it too. What happens is told as [`Happening`]s, and the
//! state can be looked at; tests judge.

use super::api::Api;
use super::conditions::{Faults, Latencies, Lie, WriteFate, jittered};
use super::fleet::Sky;
use super::kubelet::{Asked, Kubelet};
use super::original::Original;
use super::vpc::ImdsEni;
use crate::model::checkpoint::Draft;
use crate::model::ec2::{Call, Failure, Interface, Reply};
use crate::model::ids::{GroupId, InstanceId, PodKey};
use crate::model::imds::{self, Query};
use crate::model::kube;
use crate::model::limits::{self, Limits};
use crate::model::map::{Map, Set};
use crate::model::order::{self, Gather as _};
use crate::model::settings::{Mode, Settings};
use crate::model::spool::Record;
use crate::model::time::{Mono, Now, Wall};
use crate::model::wire::IpAllocation;
use crate::plan::backoff::Random;
use crate::plan::configure;
use crate::plan::core::{Answer, Applied, CallId, Core, Effect, Event, Level, OpId, Seen};
use crate::plan::host::Intent;
use ipnet::IpNet;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

/// Log lines that a node keeps.
const LOG_LINES: usize = 2000;
/// Attempts of the EC2 client at one call (`spec/aws.md` 6.4, 11.3).
const EC2_ATTEMPTS: u32 = 3;

/// How often the daemon looks into the spool.
const SPOOL_EVERY: Duration = Duration::from_secs(5);

/// The link of the ENI with device index 0 has this index, the others follow.
const LINK: u32 = 2;

/// Who decides on a node.
#[derive(Debug)]
pub enum Brain {
    /// Ours, as the daemon runs it.
    Core(Box<Core>),
    /// The algorithm of the original.
    Original(Box<Original>),
}

/// What a node is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Settings, as the daemon would read them.
    pub settings: Rc<Settings>,
    /// The original's algorithm instead of ours.
    pub original: bool,
    /// How long things take.
    pub latencies: Latencies,
    /// Keep the last log lines.
    pub logged: bool,
}

/// Something that happened, for those who judge.
#[derive(Clone, Debug)]
pub enum Happening {
    /// The daemon gave these addresses to a plugin.
    Handed(PodKey, Vec<IpAddr>),
    /// The daemon told a plugin of the branch ENI that the pod's annotation describes.
    Branch(PodKey, IpAddr),
    /// The daemon refused a plugin an address, for this reason.
    Refused(PodKey, String),
    /// The daemon told a plugin that the addresses of this key are free.
    Released(PodKey, Vec<IpAddr>),
    /// The runtime begins to delete this sandbox: its addresses are not used any more.
    Ended(PodKey),
    /// EC2 carried out a call of this node's.
    Called(Call),
    /// EC2 took this from the node, by a call of its own.
    Took(Vec<IpNet>),
    /// A checkpoint is on disk.
    Saved,
    /// The kernel has the host's network so.
    Applied(Box<Intent>),
    /// The process died.
    Crashed,
}

/// Something that will happen on a node.
#[derive(Debug)]
pub(super) enum Item {
    Core(u32, Box<Event>),
    Tick(u32, Mono),
    Ec2 { life: u32, op: OpId, call: Box<Call>, attempt: u32, unclear: bool },
    Imds(u32, OpId, Query),
    Kernel(u32, OpId, Box<Intent>),
    Write(u32, u64),
    Links(u32),
    Spool(u32),
    Kube(u32, OpId, Box<kube::Call>),
    PodsTold(u32),
    NodeTold(u32),
    Replied(Asked, Box<Answer>),
    Start,
    Bind(Box<str>),
    Sandbox(u32),
    Add(u64),
    Del(u64),
    Wired(u64),
}

/// A checkpoint on disk.
#[derive(Clone, Debug)]
pub enum File {
    /// As it was written; most are never read, and so need no text.
    Whole(Box<Draft>),
    /// As somebody else has left it.
    Text(String),
}

impl File {
    /// What a reader finds.
    pub fn text(&self) -> String {
        match self {
            File::Whole(checkpoint) => checkpoint.to_text(),
            File::Text(text) => text.clone(),
        }
    }
}

/// What survives the process, but not the host.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// Checkpoints by network card.
    pub files: Map<u32, File>,
    /// Checkpoints that were put aside as unreadable.
    pub aside: usize,
    /// Records of DELs that no daemon took.
    pub spool: Vec<Record>,
    writing: Option<(u64, Vec<(u32, Draft)>)>,
}

/// What the kernel has of pods.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Host ends of veths, and whose they are.
    pub links: Map<String, u64>,
    /// Addresses with rules.
    pub routed: Set<IpAddr>,
    /// Addresses with a route, which goes with the veth.
    pub linked: Set<IpAddr>,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Its place in the fleet.
    pub index: u32,
    /// Its instance.
    pub instance: InstanceId,
    /// What it is made of.
    pub setup: Setup,
    /// Limits of its type.
    pub limits: Limits,
    /// The process, while it lives.
    pub brain: Option<Brain>,
    /// The daemon serves requests.
    pub ready: bool,
    /// It did at some time: the kubelet tries to start pods from then on.
    pub was_ready: bool,
    /// The disk.
    pub disk: Disk,
    /// The kernel.
    pub host: Host,
    /// The pods.
    pub kubelet: Kubelet,
    /// The API server.
    pub api: Api,
    /// What is broken.
    pub faults: Faults,
    /// Effects so far.
    pub effects: u64,
    /// The process dies before this effect is carried out.
    pub crash_at: Option<u64>,
    /// What becomes of a write that is under way then.
    pub write_fate: WriteFate,
    /// How far the wall clock is off, in nanoseconds.
    pub wall_shift: i64,
    /// The latest log lines, if they are kept.
    pub log: VecDeque<String>,
    pub(super) life: u32,
    pub(super) dice: Random,
    pub(super) open: Map<CallId, Asked>,
    pub(super) last_call: CallId,
    wake: Option<Mono>,
    pods_untold: bool,
    // The life in which a look into the spool is to come.
    spool_watched: Option<u32>,
}

/// Virtual time begins here on the monotonic clock of every node: late enough that subtracting makes sense.
const BOOT: u64 = 1_000_000_000_000;
/// And here on the wall clock.
const EPOCH: i64 = 1_785_571_200_000_000_000;

/// Both clocks at a moment of virtual time.
pub fn moment(nanos: u64, wall_shift: i64) -> Now {
    let wall = EPOCH.saturating_add(i64::try_from(nanos).unwrap_or(i64::MAX)).saturating_add(wall_shift);
    Now { mono: Mono::from_nanos(BOOT.saturating_add(nanos)), wall: Wall::from_unix_nanos(wall) }
}

impl Node {
    pub(super) fn new(index: u32, instance: InstanceId, limits: Limits, setup: Setup, seed: u64) -> Node {
        let mut api = Api::default();
        let prefixes = setup.settings.mode_wished() != Mode::Ipv4Addresses;
        api.node.max_pods = Some(limits.max_pods_with(0, prefixes));
        Node {
            index,
            instance,
            setup,
            limits,
            brain: None,
            ready: false,
            was_ready: false,
            disk: Disk::default(),
            host: Host::default(),
            kubelet: Kubelet::default(),
            api,
            faults: Faults::default(),
            effects: 0,
            crash_at: None,
            write_fate: WriteFate::default(),
            wall_shift: 0,
            log: VecDeque::new(),
            life: 0,
            dice: Random::new(seed),
            open: Map::new(),
            last_call: 0,
            wake: None,
            pods_untold: false,
            spool_watched: None,
        }
    }

    /// Our core, if it is that which runs.
    pub fn core(&self) -> Option<&Core> {
        match &self.brain {
            Some(Brain::Core(core)) => Some(core),
            _ => None,
        }
    }

    /// Addresses and ENIs that the node holds in EC2, the primary one's own address included.
    pub fn held(&self, sky: &Sky) -> (usize, usize) {
        let mut held = (0, 0);
        for interface in sky.vpc.attached_to(&self.instance) {
            held.0 += 1 + interface.secondary_ipv4s.len() + 16 * interface.v4_prefixes.len();
            held.1 += 1;
        }
        held
    }

    fn now(&self, sky: &Sky) -> Now {
        moment(sky.nanos, self.wall_shift)
    }

    pub(super) fn later(&mut self, sky: &mut Sky, after: Duration, item: Item) {
        let after = jittered(after, self.setup.latencies.jitter_percent, &mut self.dice);
        sky.queue.push(sky.nanos.saturating_add(after), (self.index, item));
    }

    fn tell(&mut self, sky: &mut Sky, after: Duration, event: Event) {
        self.later(sky, after, Item::Core(self.life, Box::new(event)));
    }

    pub(super) fn note(&mut self, text: impl FnOnce() -> String, nanos: u64) {
        if self.setup.logged {
            if self.log.len() == LOG_LINES {
                self.log.pop_front();
            }
            self.log.push_back(format!("{:>9} ms {}", nanos / 1_000_000, text()));
        }
    }

    /// The process starts: with what is on disk and on the host, and without a memory.
    pub(super) fn start(&mut self, sky: &mut Sky) {
        let valid = self.setup.settings.validate(&self.limits);
        let (Some(identity), Ok(valid)) = (sky.vpc.identity(&self.instance), valid) else { return };
        self.life += 1;
        self.ready = false;
        self.wake = None;
        let seed = self.dice.bits();
        let config = configure::config(&self.setup.settings, &valid, &self.limits, &identity, seed);
        self.brain = Some(if self.setup.original {
            Brain::Original(Box::new(Original::new(&config)))
        } else {
            Brain::Core(Box::new(Core::new(config)))
        });
        let checkpoints = self.disk.files.iter().map(|(card, file)| (*card, file.text())).gather();
        let (seen, spool) = (self.seen(), self.disk.spool.clone());
        self.note(|| "START".into(), sky.nanos);
        self.feed(sky, Event::Started { checkpoints, seen, spool });
        let api = self.setup.latencies.api;
        self.later(sky, api, Item::NodeTold(self.life));
        self.later(sky, api, Item::PodsTold(self.life));
        self.watch_spool(sky);
    }

    pub(super) fn retune(&mut self, sky: &mut Sky, settings: Rc<Settings>) {
        let identity = sky.vpc.identity(&self.instance).filter(|_| self.brain.is_some());
        if let Some(identity) = identity {
            let tunables = configure::tunables(&settings, &identity);
            self.feed(sky, Event::Retuned(Box::new(tunables)));
        }
        self.setup.settings = settings;
    }

    /// The process is killed. What was on its way to EC2 gets there; what came back meets nobody; plugins that waited see
    /// a broken connection.
    pub(super) fn crash(&mut self, sky: &mut Sky) {
        if self.brain.take().is_none() {
            return;
        }
        self.note(|| "CRASH".into(), sky.nanos);
        self.life += 1;
        self.ready = false;
        self.crash_at = None;
        if let Some((_, files)) = self.disk.writing.take() {
            for (card, checkpoint) in files {
                let file = match self.write_fate {
                    WriteFate::Lost => continue,
                    WriteFate::Done => File::Whole(Box::new(checkpoint)),
                    WriteFate::Torn => {
                        let text = checkpoint.to_text();
                        let half = text.len() / 2; // checkpoints are ASCII
                        File::Text(text.get(..half).unwrap_or_default().to_owned())
                    }
                };
                self.disk.files.insert(card, file);
            }
        }
        sky.tell(self.index, Happening::Crashed);
        for (_, asked) in std::mem::take(&mut self.open) {
            let answer = Answer::Error("connection lost".into());
            self.later(sky, self.setup.latencies.rpc, Item::Replied(asked, Box::new(answer)));
        }
    }

    /// The node reboots: no process, no pod and no rule is left, and nothing of what is kept in memory. `forgotten`: so are
    /// the checkpoints, which lie in `/run` unless the operator has moved them.
    pub fn reboot(&mut self, sky: &mut Sky, forgotten: bool) {
        self.crash(sky);
        self.note(|| "REBOOT".into(), sky.nanos);
        self.host = Host::default();
        self.disk.spool.clear();
        if forgotten {
            self.disk.files.clear();
        }
        self.sandboxes_died(sky);
    }

    /// What the host shows.
    pub fn seen(&self) -> Seen {
        Seen {
            links: self.host.links.keys().cloned().collect(),
            routed: self.host.routed.clone(),
            linked: self.host.linked.clone(),
            ruled: self.host.routed.clone(),
        }
    }

    /// Gives an event to the process and carries out what it wants.
    pub(super) fn feed(&mut self, sky: &mut Sky, event: Event) {
        let now = self.now(sky);
        let effects = match &mut self.brain {
            None => return,
            Some(Brain::Core(core)) => core.step(now, event),
            Some(Brain::Original(original)) => original.step(now, event),
        };
        sky.steps += 1;
        for effect in effects {
            self.effects += 1;
            if self.crash_at.is_some_and(|at| self.effects >= at) {
                return self.crash(sky);
            }
            self.carry_out(sky, effect);
        }
    }

    fn carry_out(&mut self, sky: &mut Sky, effect: Effect) {
        let (times, life) = (self.setup.latencies, self.life);
        match effect {
            Effect::Reply(call, answer) => {
                if let Some(asked) = self.open.remove(&call) {
                    self.tell_answer(sky, asked, &answer);
                    self.later(sky, times.rpc, Item::Replied(asked, Box::new(answer)));
                }
            }
            Effect::Ec2(op, call) => {
                let call = Box::new(call);
                self.later(sky, times.ec2 / 2, Item::Ec2 { life, op, call, attempt: 1, unclear: false });
            }
            Effect::Imds(op, query) => self.later(sky, times.imds / 2, Item::Imds(life, op, query)),
            Effect::Kube(op, call) => self.later(sky, times.api, Item::Kube(life, op, Box::new(call))),
            Effect::Kernel(op, intent) => self.later(sky, times.kernel, Item::Kernel(life, op, intent)),
            Effect::Save(generation, files) => {
                self.disk.writing = Some((generation, files));
                self.later(sky, times.disk, Item::Write(life, generation));
            }
            Effect::SetAside(card, _) => {
                self.disk.files.remove(&card);
                self.disk.aside += 1;
            }
            Effect::ListLinks => self.later(sky, times.kernel, Item::Links(life)),
            Effect::SpoolDone(done) => self.disk.spool.retain(|record| !done.contains(record)),
            Effect::WakeAt(at) => {
                self.wake = Some(at);
                let nanos = at.as_nanos().saturating_sub(BOOT).max(sky.nanos);
                sky.queue.push(nanos, (self.index, Item::Tick(life, at)));
            }
            Effect::Ready => {
                self.ready = true;
                self.was_ready = true;
                sky.ready(self.index);
            }
            Effect::Log(Level::Debug, _) => {}
            Effect::Log(level, text) => self.note(|| format!("{level:?} {text}"), sky.nanos),
            Effect::Tally(tally) => sky.tallied(&tally),
        }
    }

    fn tell_answer(&self, sky: &mut Sky, asked: Asked, answer: &Answer) {
        if !sky.watched {
            return;
        }
        let (Asked::Add(id) | Asked::AddAgain(id) | Asked::Del(id)) = asked;
        let Some(key) = self.kubelet.sandboxes.get(&id).map(|sandbox| sandbox.key.clone()) else { return };
        let happening = match answer {
            Answer::Add(reply) if reply.success && reply.pod_vlan_id != 0 => {
                let Some(address) = addresses(&reply.allocations).first().copied() else { return };
                Happening::Branch(key, address)
            }
            Answer::Add(reply) if reply.success => Happening::Handed(key, addresses(&reply.allocations)),
            Answer::Add(reply) => Happening::Refused(key, reply.failure.clone()),
            Answer::Del(reply) if reply.success => Happening::Released(key, addresses(&reply.allocations)),
            Answer::Del(_) => return,
            Answer::Error(text) => Happening::Refused(key, text.clone()),
        };
        sky.tell(self.index, happening);
    }

    /// Something that was to happen happens.
    pub(super) fn happen(&mut self, sky: &mut Sky, item: Item) {
        match item {
            Item::Core(life, event) if life == self.life => self.feed(sky, *event),
            Item::Tick(life, at) if life == self.life && self.wake == Some(at) => {
                self.wake = None;
                self.feed(sky, Event::Tick);
            }
            // A dead process repeats nothing; what it has sent gets there.
            Item::Ec2 { life, attempt, .. } if attempt > 1 && life != self.life => {}
            Item::Ec2 { life, op, call, attempt, unclear } => self.ec2(sky, (life, op), call, attempt, unclear),
            Item::Imds(life, op, query) if life == self.life => self.imds(sky, op, &query),
            Item::Kernel(life, op, intent) if life == self.life => self.kernel(sky, op, intent),
            Item::Write(life, generation) if life == self.life => self.write(sky, generation),
            Item::Links(life) if life == self.life => {
                let seen = self.seen();
                self.feed(sky, Event::Seen(Ok(seen)));
            }
            Item::Spool(life) if life == self.life => {
                self.spool_watched = None;
                if !self.disk.spool.is_empty() {
                    let records = self.disk.spool.clone();
                    self.feed(sky, Event::Spool(records));
                }
                self.watch_spool(sky);
            }
            Item::Kube(life, op, call) => self.kube(sky, life, op, &call),
            Item::PodsTold(life) if life == self.life => {
                self.pods_untold = false;
                if !self.faults.api_down {
                    let bound = self.kubelet.bound();
                    self.feed(sky, Event::PodsSeen(bound));
                }
            }
            Item::NodeTold(life) if life == self.life => {
                if !self.faults.api_down {
                    let node = Box::new(self.api.node.clone());
                    self.feed(sky, Event::NodeSeen(node));
                }
            }
            Item::Replied(asked, answer) => self.replied(sky, asked, *answer),
            Item::Start => self.start(sky),
            Item::Bind(name) => {
                self.bind(sky, &name);
            }
            Item::Sandbox(pod) => self.sandbox(sky, pod),
            Item::Add(sandbox) => self.add(sky, sandbox),
            Item::Del(sandbox) => self.del(sky, sandbox),
            Item::Wired(sandbox) => self.wired(sky, sandbox),
            // Meant for a process that is no more.
            Item::Core(..)
            | Item::Tick(..)
            | Item::Imds(..)
            | Item::Kernel(..)
            | Item::Write(..)
            | Item::Links(_)
            | Item::Spool(_)
            | Item::PodsTold(_)
            | Item::NodeTold(_) => {}
        }
    }

    // `unclear`: an earlier attempt may have been carried out, which stays so whatever the answer to a later one.
    fn ec2(&mut self, sky: &mut Sky, (life, op): (u32, OpId), call: Box<Call>, attempt: u32, unclear: bool) {
        let times = self.setup.latencies;
        if self.faults.ec2_down {
            let failure = Failure {
                action: call.action(),
                code: String::new(),
                message: "connect: timed out".into(),
                status: 0,
                request_id: String::new(),
                maybe_applied: unclear,
            };
            return self.later(sky, times.ec2_timeout, Item::Core(life, Box::new(Event::Ec2(op, Err(failure)))));
        }
        let at_stake = if sky.watched { at_stake(sky, &call) } else { Vec::new() };
        let mut outcome = sky.vpc.execute(self.now(sky), &call);
        let silent = outcome.result.as_ref().is_err_and(|failure| failure.status == 0);
        sky.called(self.index, &call, &outcome.result, at_stake);
        if let Err(failure) = &mut outcome.result {
            failure.maybe_applied |= unclear;
            let (index, failure) = (self.index, &*failure);
            self.note(|| format!("EC2 to {index}: {failure}"), sky.nanos);
            // Ours paces throttled calls in the core; the SDK repeats them by itself.
            let again = if failure.throttled() { self.setup.original } else { silent || failure.internal() };
            let again = again && (call.idempotent() || self.setup.original);
            if again && attempt < EC2_ATTEMPTS {
                // The SDKs' pause: random, below 1, 2, 4 ... seconds.
                let after = if silent { times.ec2_timeout } else { outcome.after };
                let pause = Duration::from_millis(self.dice.below(1000 << attempt.min(4)));
                let unclear = failure.maybe_applied;
                return self.later(sky, after + pause, Item::Ec2 { life, op, call, attempt: attempt + 1, unclear });
            }
        }
        let after = if silent { times.ec2_timeout } else { outcome.after + times.ec2 / 2 };
        self.later(sky, after, Item::Core(life, Box::new(Event::Ec2(op, outcome.result))));
    }

    fn imds(&mut self, sky: &mut Sky, op: OpId, query: &Query) {
        let now = self.now(sky);
        let after = self.setup.latencies.imds / 2;
        if matches!(self.faults.imds, Lie::Down) {
            return self.tell(sky, after, Event::Imds(op, Err("connection refused".into())));
        }
        let answer = match query {
            Query::VpcCidrs { v6: false } => {
                imds::Answer::Cidrs(sky.vpc.cidrs().iter().map(|net| (*net).into()).collect())
            }
            Query::VpcCidrs { v6: true } => imds::Answer::Cidrs(sky.vpc.v6_cidrs()),
            Query::SecurityGroups => imds::Answer::Groups(self.groups(sky, now)),
            Query::Scan => imds::Answer::Enis(self.told(sky, now).into_iter().map(|seen| seen.eni).collect()),
            Query::Eni(mac) if matches!(self.faults.imds, Lie::None) => {
                let mut all = sky.vpc.imds(now, &self.instance).into_iter().flatten();
                imds::Answer::Eni(all.find(|seen| seen.eni.mac == *mac).map(|seen| seen.eni.clone()))
            }
            Query::Eni(mac) => {
                imds::Answer::Eni(self.told(sky, now).into_iter().map(|seen| seen.eni).find(|eni| eni.mac == *mac))
            }
        };
        self.tell(sky, after, Event::Imds(op, Ok(answer)));
    }

    fn groups(&self, sky: &mut Sky, now: Now) -> Vec<GroupId> {
        let mut all = sky.vpc.imds(now, &self.instance).into_iter().flatten();
        let primary = all.find(|seen| (seen.eni.card, seen.eni.device) == (0, 0));
        let mut groups = primary.map(|seen| seen.groups.clone()).unwrap_or_default();
        order::sort(&mut groups);
        groups
    }

    /// What IMDS tells of the ENIs.
    pub fn told(&self, sky: &mut Sky, now: Now) -> Vec<ImdsEni> {
        let mut all = sky.vpc.imds(now, &self.instance).cloned().unwrap_or_default();
        self.faults.imds.tell(&mut all);
        all
    }

    fn kernel(&mut self, sky: &mut Sky, op: OpId, intent: Box<Intent>) {
        if self.faults.kernel {
            return self.feed(sky, Event::Kernel(op, Err("netlink: device or resource busy".into())));
        }
        let now = self.now(sky).mono;
        let link = self.setup.latencies.link;
        let mut failed = Map::new();
        for eni in &intent.enis {
            let plugged = sky.vpc.plugged(&self.instance, &eni.id);
            if plugged.is_none_or(|at| now < at.plus(link)) {
                failed.insert(eni.id.clone(), format!("no link has the MAC {}", eni.mac));
            }
        }
        for address in &intent.gone {
            self.host.routed.remove(address);
        }
        let there = intent.enis.iter().filter(|eni| eni.trunk && !failed.contains_key(&eni.id));
        let trunks = there.map(|eni| (eni.id.clone(), LINK + eni.device)).gather();
        sky.tell(self.index, Happening::Applied(intent));
        self.feed(sky, Event::Kernel(op, Ok(Applied { failed, trunks })));
    }

    fn write(&mut self, sky: &mut Sky, generation: u64) {
        let Some((_, files)) = self.disk.writing.take_if(|(writing, _)| *writing == generation) else { return };
        if self.faults.disk_full {
            return self.feed(sky, Event::Saved(generation, Err("no space left on device".into())));
        }
        self.disk.files.extend(files.into_iter().map(|(card, file)| (card, File::Whole(Box::new(file)))));
        sky.tell(self.index, Happening::Saved);
        self.feed(sky, Event::Saved(generation, Ok(())));
    }

    fn kube(&mut self, sky: &mut Sky, life: u32, op: OpId, call: &kube::Call) {
        let result = if self.faults.api_down {
            Err(kube::Failure { status: 0, message: "connect: timed out".into() })
        } else {
            self.api.answer(call)
        };
        self.later(sky, self.setup.latencies.api, Item::Core(life, Box::new(Event::Kube(op, result))));
    }

    // The daemon looks into the spool from time to time, as long as there is something in it.
    pub(super) fn watch_spool(&mut self, sky: &mut Sky) {
        let watched = self.spool_watched == Some(self.life);
        if self.brain.is_some() && !self.disk.spool.is_empty() && !watched {
            self.spool_watched = Some(self.life);
            self.later(sky, SPOOL_EVERY, Item::Spool(self.life));
        }
    }

    /// The number of pods has changed, or the API server is back.
    pub(super) fn tell_pods(&mut self, sky: &mut Sky) {
        if self.brain.is_some() && !std::mem::replace(&mut self.pods_untold, true) {
            self.later(sky, self.setup.latencies.api, Item::PodsTold(self.life));
        }
    }

    /// The Node object has changed.
    pub(super) fn tell_node(&mut self, sky: &mut Sky) {
        self.later(sky, self.setup.latencies.api, Item::NodeTold(self.life));
    }

    /// The error of a reply that never came, for the log of a test.
    pub fn journal(&self) -> String {
        self.log.iter().fold(String::new(), |all, line| all + line + "\n")
    }
}

// What the node loses by a call.
fn at_stake(sky: &Sky, call: &Call) -> Vec<IpNet> {
    match call {
        Call::UnassignAddresses { addresses, .. } => addresses.iter().map(|ip| IpNet::from(IpAddr::V4(*ip))).collect(),
        Call::UnassignPrefixes { prefixes, .. } => prefixes.iter().map(|net| IpNet::V4(*net)).collect(),
        Call::Detach(attachment) => {
            let eni = sky.vpc.attachment(attachment).and_then(|eni| sky.vpc.interface(eni));
            eni.map(carried).unwrap_or_default()
        }
        _ => Vec::new(),
    }
}

/// Everything that an ENI carries for pods.
pub fn carried(interface: &Interface) -> Vec<IpNet> {
    let singles = interface.secondary_ipv4s.iter().map(|ip| IpNet::from(IpAddr::V4(*ip)));
    let prefixes = interface.v4_prefixes.iter().map(|net| IpNet::V4(*net));
    singles.chain(prefixes).chain(interface.v6_prefixes.iter().copied()).collect()
}

/// The addresses in a reply to an ADD or a DEL.
pub(super) fn addresses(allocations: &[IpAllocation]) -> Vec<IpAddr> {
    let parse = |text: &str| text.parse::<IpAddr>().ok();
    allocations.iter().filter_map(|given| parse(&given.ipv4).or(parse(&given.ipv6))).collect()
}

/// Whether a call changes something.
pub fn mutates(call: &Call) -> bool {
    !matches!(
        call,
        Call::DescribeAttached(_)
            | Call::DescribeOne(_)
            | Call::DescribeLeaked { .. }
            | Call::DescribeInstanceType(_)
            | Call::DescribeSubnets { .. }
    )
}

/// Limits of an instance type, from the table or as EC2 tells them.
pub fn limits_of(vpc: &super::vpc::Vpc, kind: &str) -> Option<Limits> {
    limits::of(kind).or_else(|| limits::from_ec2(&vpc.instance_type(kind)?))
}

/// What a call gave, in short.
pub type Outcome = Result<Reply, Failure>;
