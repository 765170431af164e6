//! A node in a VPC, in virtual time: the core, its disk, its kernel, its pods, and a runtime that asks.

use enibox::model::ec2::{InstanceType, Interface};
use enibox::model::ids::{EniId, InstanceId, PodKey, PodName};
use enibox::model::imds::{Answer as Told, Query};
use enibox::model::kube;
use enibox::model::map::Map;
use enibox::model::naming;
use enibox::model::spool::Record;
use enibox::model::time::{Mono, Now, Wall};
use enibox::model::wire::{AddNetworkRequest, DelNetworkRequest, IpAllocation, UNKNOWN_POD};
use enibox::plan::core::{Answer, Applied, CallId, Config, Core, Effect, Event, Seen, Tunables};
use enibox::plan::host::{HostPod, Intent};
use enibox::plan::sizing::Targets;
use enibox::sim::api::Api;
use enibox::sim::vpc::Vpc;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

/// Index of the link of a trunk ENI.
pub const TRUNK_LINK: u32 = 7;
const LATENCY: Duration = Duration::from_millis(50);

/// A node in a VPC: the core, its disk, its kernel and its pods. Only the core and what is in flight dies in a crash.
#[expect(clippy::struct_excessive_bools, reason = "independent facts of the world")]
pub struct World {
    pub vpc: Vpc,
    pub instance: InstanceId,
    pub targets: Targets,
    pub prefix_mode: bool,
    pub provisioning: bool,
    pub discovery: bool,
    pub nanos: u64,
    /// How far the wall clock was set back.
    pub set_back: Duration,
    pub core: Option<Core>,
    pub ready: bool,
    pub wake_at: Option<Mono>,
    pub coming: BTreeMap<(u64, u64), Event>,
    pub serial: u64,
    pub disk: Option<String>,
    /// Checkpoints of the network cards above 0.
    pub disks: BTreeMap<u32, String>,
    pub disk_full: bool,
    pub spool: Vec<Record>,
    pub pods: BTreeMap<String, IpAddr>,
    /// Further addresses of pods that have several.
    pub more: BTreeMap<String, Vec<IpAddr>>,
    /// ENIs that are none of the core's business, as the test says.
    pub foreign: BTreeSet<EniId>,
    pub asked: BTreeMap<CallId, String>,
    pub answers: BTreeMap<String, VecDeque<Answer>>,
    pub links: BTreeSet<String>,
    pub swept: BTreeSet<IpAddr>,
    /// Rules of pods that are gone.
    pub stale_rules: BTreeSet<IpAddr>,
    /// Those of them that cannot be deleted.
    pub stuck_rules: BTreeSet<IpAddr>,
    pub effects: u64,
    pub crash_at: Option<u64>,
    pub ec2_down: bool,
    /// An ENI whose link never appears on the host.
    pub linkless: Option<EniId>,
    /// The API server; without it every request fails at once.
    pub api: Option<Api>,
    /// What differs from the default configuration.
    pub configure: fn(&mut Config),
    pub log: Vec<String>,
    /// Branch ENIs in the last host plan.
    pub branches: usize,
    /// Pods in it.
    pub watched: BTreeSet<IpAddr>,
    /// Host plans so far.
    pub plans: usize,
}

pub fn key(pod: &str) -> PodKey {
    PodKey { network: "aws-cni".into(), container: format!("sandbox-of-{pod}"), ifname: "eth0".into() }
}

impl World {
    pub fn new(kind: &str, targets: Targets) -> World {
        let mut world = World::asleep(kind, targets);
        world.start();
        world
    }

    /// The same with prefix delegation.
    pub fn with_prefixes(kind: &str, targets: Targets) -> World {
        let mut world = World::stopped(kind, targets, true);
        world.start();
        world
    }

    /// Before its first start, in either mode.
    pub fn stopped(kind: &str, targets: Targets, prefix_mode: bool) -> World {
        let mut world = World::asleep(kind, targets);
        world.prefix_mode = prefix_mode;
        world
    }

    /// The node before its daemon starts for the first time.
    pub fn asleep(kind: &str, targets: Targets) -> World {
        let mut vpc = Vpc::new("eu-west-1", vec!["10.20.0.0/16".parse().unwrap()], 7);
        let group = vpc.add_group();
        let v6 = Some("2001:db8:0:1::/64".parse().unwrap());
        let subnet = vpc.add_subnet("eu-west-1a", "10.20.0.0/22".parse().unwrap(), v6, &[]);
        vpc.add_type(InstanceType {
            name: "two.cards".into(),
            hypervisor: "nitro".into(),
            bare_metal: false,
            ipv4_per_eni: 4,
            default_card: 0,
            cards: vec![(0, 3), (1, 2)],
        });
        let start = World::moment(0);
        let instance = vpc.launch(start, kind, &subnet, &[group]).unwrap();
        World {
            vpc,
            instance,
            targets,
            prefix_mode: false,
            provisioning: true,
            discovery: true,
            nanos: 0,
            set_back: Duration::ZERO,
            core: None,
            ready: false,
            wake_at: None,
            coming: BTreeMap::new(),
            serial: 0,
            disk: None,
            disks: BTreeMap::new(),
            disk_full: false,
            spool: Vec::new(),
            pods: BTreeMap::new(),
            more: BTreeMap::new(),
            foreign: BTreeSet::new(),
            asked: BTreeMap::new(),
            answers: BTreeMap::new(),
            links: BTreeSet::new(),
            swept: BTreeSet::new(),
            stale_rules: BTreeSet::new(),
            stuck_rules: BTreeSet::new(),
            effects: 0,
            crash_at: None,
            ec2_down: false,
            linkless: None,
            api: None,
            configure: |_| {},
            log: Vec::new(),
            branches: 0,
            watched: BTreeSet::new(),
            plans: 0,
        }
    }

    pub fn moment(nanos: u64) -> Now {
        let wall = 1_785_571_200_000_000_000 + i64::try_from(nanos).unwrap();
        Now { mono: Mono::from_nanos(1_000_000_000_000 + nanos), wall: Wall::from_unix_nanos(wall) }
    }

    pub fn now(&self) -> Now {
        let Now { mono, wall } = World::moment(self.nanos);
        let back = i64::try_from(self.set_back.as_nanos()).unwrap();
        Now { mono, wall: Wall::from_unix_nanos(wall.as_unix_nanos() - back) }
    }

    pub fn seen(&self) -> Seen {
        let linked: BTreeSet<IpAddr> = self.pods.values().chain(self.more.values().flatten()).copied().collect();
        let routed = linked.union(&self.stale_rules).copied().collect();
        let ruled = linked.union(&self.stale_rules).copied().collect();
        let linked = linked.into_iter().collect();
        Seen { links: self.links.iter().cloned().collect(), routed, linked, ruled }
    }

    /// The process starts: with the disk, and without a memory.
    pub fn start(&mut self) {
        let identity = self.vpc.identity(&self.instance).unwrap();
        let kind = self.vpc.instance_type(&identity.instance_type).unwrap();
        let limits = enibox::model::limits::from_ec2(&kind).unwrap();
        let mut config = Config {
            identity,
            v6: false,
            prefix_mode: self.prefix_mode,
            slots: limits.slots_per_eni() as usize,
            cards: [(0, limits.enis as usize)].into(),
            max_pods: limits.max_pods_with(0, self.prefix_mode) as usize,
            provisioning: self.provisioning,
            imds_only: false,
            custom_networking: None,
            pod_eni: false,
            trunk_capable: false,
            annotate_pod_ip: false,
            multi_nic: false,
            clean_leaked: false,
            subnet_discovery: self.discovery,
            manage_untagged: true,
            cluster_name: "test".into(),
            additional_tags: Map::new(),
            network_policy_mode: String::new(),
            tunables: Tunables {
                targets: self.targets,
                ip_cooldown: Duration::from_secs(30),
                add_wait: Duration::from_secs(3),
                manage_unschedulable: false,
                host: Intent::default(),
            },
            seed: 42 + self.effects,
        };
        (self.configure)(&mut config);
        self.core = Some(Core::new(config));
        self.ready = false;
        self.wake_at = None;
        let spool = self.spool.clone();
        self.happen(Event::Started {
            checkpoints: self.disk.clone().map(|text| (0, text)).into_iter().chain(self.disks.clone()).collect(),
            seen: self.seen(),
            spool,
        });
    }

    /// The process is killed: what was in flight is lost, what EC2 has done stands. Plugins that waited see a broken
    /// connection, and their runtime deletes the pod.
    pub fn crash(&mut self) {
        self.log.push(format!("{} ms CRASH", self.nanos / 1_000_000));
        self.core = None;
        self.coming.clear();
        self.ready = false;
        self.crash_at = None;
        for (_, pod) in std::mem::take(&mut self.asked) {
            self.answers.entry(pod).or_default().push_back(Answer::Error("connection lost".into()));
        }
    }

    pub fn later(&mut self, after: Duration, event: Event) {
        self.serial += 1;
        let at = self.nanos + u64::try_from(after.as_nanos()).unwrap();
        self.coming.insert((at, self.serial), event);
    }

    pub fn happen(&mut self, event: Event) {
        let now = self.now();
        let Some(core) = &mut self.core else { return };
        let effects = core.step(now, event);
        for effect in effects {
            self.effects += 1;
            if self.crash_at.is_some_and(|at| self.effects >= at) {
                return self.crash();
            }
            self.carry_out(effect);
        }
    }

    pub fn carry_out(&mut self, effect: Effect) {
        let now = self.now();
        match effect {
            Effect::Reply(call, answer) => {
                if let Some(pod) = self.asked.remove(&call) {
                    self.answers.entry(pod).or_default().push_back(answer);
                }
            }
            Effect::Ec2(op, call) => {
                if self.ec2_down {
                    let failure = enibox::model::ec2::Failure {
                        action: call.action(),
                        code: String::new(),
                        message: "timed out".into(),
                        status: 0,
                        request_id: String::new(),
                        maybe_applied: false,
                    };
                    return self.later(LATENCY, Event::Ec2(op, Err(failure)));
                }
                let result = self.vpc.execute(now, &call).result;
                self.later(LATENCY, Event::Ec2(op, result));
            }
            Effect::Imds(op, query) => {
                let told = self.imds_tells(&query);
                self.later(LATENCY, Event::Imds(op, Ok(told)));
            }
            Effect::Kernel(op, intent) => {
                self.check_intent(&intent);
                self.swept.extend(intent.gone.iter().copied());
                self.stale_rules.retain(|address| !intent.gone.contains(address) || self.stuck_rules.contains(address));
                let trunks = intent.enis.iter().filter(|eni| eni.trunk).map(|eni| (eni.id.clone(), TRUNK_LINK));
                let failed = intent.enis.iter().filter(|eni| Some(&eni.id) == self.linkless.as_ref());
                let failed = failed.map(|eni| (eni.id.clone(), "no link has its MAC".to_owned())).collect();
                let applied = Applied { failed, trunks: trunks.collect() };
                self.later(LATENCY, Event::Kernel(op, Ok(applied)));
            }
            Effect::Save(generation, content) => {
                if self.disk_full {
                    return self.later(LATENCY, Event::Saved(generation, Err("no space left on device".into())));
                }
                for (card, file) in content {
                    let text = file.to_text();
                    match card {
                        0 => self.disk = Some(text),
                        card => drop(self.disks.insert(card, text)),
                    }
                }
                self.later(LATENCY, Event::Saved(generation, Ok(())));
            }
            Effect::SetAside(0, _) => self.disk = None,
            Effect::SetAside(card, _) => drop(self.disks.remove(&card)),
            Effect::ListLinks => {
                let seen = self.seen();
                self.later(LATENCY, Event::Seen(Ok(seen)));
            }
            Effect::SpoolDone(done) => self.spool.retain(|record| !done.contains(record)),
            Effect::WakeAt(at) => self.wake_at = Some(at),
            Effect::Ready => self.ready = true,
            Effect::Tally(_) => {}
            Effect::Kube(op, call) => {
                let away = || Err(kube::Failure { status: 0, message: "no API server".into() });
                let result = self.api.as_mut().map_or_else(away, |api| api.answer(&call));
                self.later(LATENCY, Event::Kube(op, result));
            }
            Effect::Log(level, text) => self.log.push(format!("{} ms {level:?} {text}", self.nanos / 1_000_000)),
        }
    }

    fn imds_tells(&mut self, query: &Query) -> Told {
        let now = self.now();
        let enis: Vec<_> =
            self.vpc.imds(now, &self.instance.clone()).unwrap().iter().map(|seen| seen.eni.clone()).collect();
        match query {
            Query::Scan => Told::Enis(enis),
            Query::Eni(mac) => Told::Eni(enis.into_iter().find(|eni| eni.mac == *mac)),
            Query::VpcCidrs { v6: true } => Told::Cidrs(self.vpc.v6_cidrs()),
            Query::VpcCidrs { v6: false } => Told::Cidrs(self.vpc.cidrs().iter().map(|net| (*net).into()).collect()),
            Query::SecurityGroups => Told::Groups(self.primary_groups()),
        }
    }

    /// Every pod's table must be that of the ENI that EC2 has its address on, and no living pod may lose its rules.
    fn check_intent(&mut self, intent: &Intent) {
        self.branches = intent.branches.len();
        self.watched = intent.pods.iter().map(|pod| pod.address).collect();
        self.plans += 1;
        for HostPod { address, table, .. } in &intent.pods {
            if let Some((card, device)) = self.place_of(*address) {
                assert_eq!(*table, naming::table_of(card, device).unwrap(), "table of {address}");
            }
        }
        let living = |ip: &IpAddr| self.pods.values().chain(self.more.values().flatten()).any(|held| held == ip);
        let (gone, pods, log) = (&intent.gone, &self.pods, &self.log);
        assert!(!gone.iter().any(living), "rules of a living pod are swept: {gone:?}, living {pods:?}, {log:#?}");
    }

    pub fn primary_groups(&self) -> Vec<enibox::model::ids::GroupId> {
        let primary = self.vpc.identity(&self.instance).unwrap().primary_eni;
        self.vpc.interfaces().find(|interface| interface.id == primary).unwrap().groups.clone()
    }

    /// Network card and device index of the ENI that EC2 has an address on.
    pub fn place_of(&self, address: IpAddr) -> Option<(u32, u32)> {
        let holds = |i: &&Interface| nets_of(i).iter().chain(&i.v6_prefixes).any(|net| net.contains(&address));
        let attachment = self.vpc.interfaces().find(holds)?.attachment.as_ref();
        attachment.map(|attachment| (attachment.card, attachment.device))
    }

    /// Lets virtual time pass.
    pub fn pass(&mut self, time: Duration) {
        let end = self.nanos + u64::try_from(time.as_nanos()).unwrap();
        for _ in 0..1_000_000 {
            let event_at = self.coming.keys().next().map(|(at, _)| *at);
            let base = World::moment(0).mono;
            let wake_at = self.wake_at.map(|at| u64::try_from(at.since(base).as_nanos()).unwrap());
            let next = event_at.into_iter().chain(wake_at.filter(|_| self.core.is_some())).min();
            let Some(at) = next.filter(|at| *at <= end) else {
                self.nanos = end;
                return;
            };
            self.nanos = self.nanos.max(at);
            if event_at == Some(at) {
                let (_, event) = self.coming.pop_first().unwrap();
                self.happen(event);
            } else {
                self.wake_at = None;
                self.happen(Event::Tick);
            }
        }
        panic!("the core is busy for ever");
    }

    pub fn settle(&mut self) {
        for _ in 0..600 {
            if self.core.as_ref().is_some_and(Core::quiet) && self.coming.is_empty() {
                return;
            }
            self.pass(Duration::from_secs(1));
        }
        panic!("the core does not come to rest: {:#?}", self.log);
    }

    /// The Node object changed, or was read.
    pub fn tell_node(&mut self) {
        let node = self.api.as_ref().map(|api| api.node.clone()).unwrap_or_default();
        self.happen(Event::NodeSeen(Box::new(node)));
    }

    /// The answer to an ADD or a DEL.
    pub fn answer(&mut self, pod: &str) -> Answer {
        self.answers.get_mut(pod).and_then(VecDeque::pop_front).unwrap_or_else(|| panic!("no answer for {pod}"))
    }

    /// What the runtime and the plugin do for a new pod, without waiting for the answer.
    pub fn ask(&mut self, pod: &str) {
        self.ask_for(pod, false);
    }

    /// The same for a pod that wants an address on every network card.
    pub fn ask_for(&mut self, pod: &str, every_card: bool) {
        self.ask_in(pod, key(pod), every_card);
    }

    /// The same for a given sandbox of the pod.
    pub fn ask_in(&mut self, pod: &str, key: PodKey, every_card: bool) {
        if self.core.is_none() || !self.ready {
            self.answers.entry(pod.into()).or_default().push_back(Answer::Error("no daemon".into()));
            return;
        }
        self.serial += 1;
        let call = self.serial;
        self.spool.retain(|record| record.key != key); // as the plugin does
        self.asked.insert(call, pod.into());
        let request = AddNetworkRequest {
            pod_name: pod.into(),
            pod_namespace: "default".into(),
            network_name: key.network,
            container_id: key.container,
            if_name: key.ifname,
            requires_multi_nic: every_card,
            ..AddNetworkRequest::default()
        };
        self.happen(Event::Add(call, request));
    }

    /// The end of an ADD: the pod lives, or the runtime cleans up.
    pub fn wired(&mut self, pod: &str) -> bool {
        match self.answers.get_mut(pod).and_then(VecDeque::pop_front) {
            Some(Answer::Add(reply)) if reply.success => {
                let parse = |given: &IpAllocation| {
                    if given.ipv4.is_empty() { given.ipv6.parse() } else { given.ipv4.parse() }
                };
                let addresses: Vec<IpAddr> = reply.allocations.iter().map(|given| parse(given).unwrap()).collect();
                for address in &addresses {
                    let holders =
                        self.pods.iter().chain(self.more.iter().flat_map(|(p, ips)| ips.iter().map(move |ip| (p, ip))));
                    if let Some((other, _)) =
                        holders.into_iter().find(|(other, held)| *held == address && *other != pod)
                    {
                        panic!("{address} is given to {other} and to {pod}");
                    }
                    assert!(self.place_of(*address).is_some(), "EC2 does not know {address}");
                }
                self.pods.insert(pod.into(), addresses[0]);
                self.more.insert(pod.into(), addresses[1..].to_vec());
                self.links.insert(naming::host_veth("eni", "default", pod, 0).unwrap());
                true
            }
            Some(_) => {
                self.del(pod);
                false
            }
            None => panic!("no answer for {pod}"),
        }
    }

    /// Somebody gives the host's end of a pod's veth another name.
    pub fn rename(&mut self, pod: &str, to: &str) {
        assert!(self.links.remove(&naming::host_veth("eni", "default", pod, 0).unwrap()), "{pod} has a veth");
        self.links.insert(to.into());
    }

    /// The namespace of a pod's sandbox goes, and nobody tells: the rules stay.
    pub fn vanish(&mut self, pod: &str, link: &str) {
        self.stale_rules.extend(self.pods.remove(pod));
        self.stale_rules.extend(self.more.remove(pod).into_iter().flatten());
        assert!(self.links.remove(link), "{link} is there");
    }

    pub fn add(&mut self, pod: &str) -> bool {
        self.ask(pod);
        self.pass(Duration::from_secs(5));
        self.wired(pod)
    }

    /// DEL: through the daemon, or into the spool when it is away. The kernel's part is done in any case.
    pub fn del(&mut self, pod: &str) {
        self.pods.remove(pod);
        self.more.remove(pod);
        self.links.remove(&naming::host_veth("eni", "default", pod, 0).unwrap());
        let key = key(pod);
        if self.core.is_some() && self.ready {
            self.serial += 1;
            self.asked.insert(self.serial, pod.into());
            let request = DelNetworkRequest {
                network_name: key.network.clone(),
                container_id: key.container.clone(),
                if_name: key.ifname.clone(),
                reason: "PodDeleted".into(),
                ..DelNetworkRequest::default()
            };
            self.happen(Event::Del(self.serial, request));
            self.pass(Duration::from_secs(1));
            match self.answers.get_mut(pod).and_then(VecDeque::pop_front) {
                Some(Answer::Del(reply)) => return assert!(reply.success),
                Some(Answer::Error(text)) if text == UNKNOWN_POD => return,
                _ => {} // the daemon died meanwhile
            }
        }
        let time = self.now().wall;
        self.spool.retain(|record| record.key != key);
        self.spool.push(Record { key, pod: PodName::default(), uid: String::new(), time });
    }

    /// CIDRs of the attached ENIs, by device index.
    pub fn enis(&self) -> Vec<(u32, usize)> {
        self.kinds().into_iter().map(|(device, singles, prefixes)| (device, singles + prefixes)).collect()
    }

    /// Single addresses and prefixes of the attached ENIs, by device index.
    pub fn kinds(&self) -> Vec<(u32, usize, usize)> {
        let attached = self
            .vpc
            .interfaces()
            .filter_map(|i| i.attachment.as_ref().map(|at| (at.device, i.secondary_ipv4s.len(), i.v4_prefixes.len())));
        let mut enis: Vec<_> = attached.collect();
        enis.sort_unstable();
        enis
    }

    pub fn calls(&self, action: &str) -> u64 {
        self.vpc.journal().counts().get(action).copied().unwrap_or(0)
    }

    /// What must hold whenever the core is at rest.
    pub fn check_at_rest(&self) {
        let core = self.core.as_ref().unwrap();
        let given: BTreeSet<(PodKey, IpAddr)> =
            core.pool().allocations().map(|held| (held.owner.key.clone(), held.address)).collect();
        let mut living: BTreeSet<(PodKey, IpAddr)> = self.pods.iter().map(|(pod, ip)| (key(pod), *ip)).collect();
        living.extend(self.more.iter().flat_map(|(pod, ips)| ips.iter().map(|ip| (key(pod), *ip))));
        assert_eq!(given, living, "the pool and the living pods: {:#?}", self.log);
        let mut held: BTreeSet<(EniId, IpNet)> = BTreeSet::new();
        for (id, eni) in core.pool().enis() {
            held.extend(eni.cidrs().map(|(net, _)| (id.clone(), *net)));
        }
        let attached = self.vpc.interfaces().filter(|i| i.attachment.is_some() && !self.foreign.contains(&i.id));
        let truth: BTreeSet<(EniId, IpNet)> =
            attached.flat_map(|i| nets_of(i).into_iter().map(|net| (i.id.clone(), net))).collect();
        // Where EC2 lists several prefixes of the same ENI, any one of them will do.
        let spare = |(id, net): &(EniId, IpNet)| {
            let listed = self.vpc.interfaces().filter(|i| i.id == *id && i.v6_prefixes.contains(net));
            let listed = listed.map(|i| i.v6_prefixes.first().copied()).next();
            listed.flatten().map_or_else(|| (id.clone(), *net), |first| (id.clone(), first))
        };
        let held: BTreeSet<(EniId, IpNet)> = held.iter().map(spare).collect();
        assert_eq!(held, truth, "the pool and EC2: {:#?}", self.log);
        let left = self.vpc.interfaces().filter(|i| i.attachment.is_none() && !self.foreign.contains(&i.id));
        let orphans: Vec<_> = left.map(|i| &i.id).collect();
        assert!(orphans.is_empty(), "leaked ENIs: {orphans:?}: {:#?}", self.log);
        let disk = enibox::model::checkpoint::Checkpoint::parse(self.disk.as_deref().unwrap()).unwrap();
        let others = self.disks.values().map(|text| enibox::model::checkpoint::Checkpoint::parse(text).unwrap());
        let written = disk.allocations.len() + others.map(|disk| disk.allocations.len()).sum::<usize>();
        assert_eq!(written, living.len(), "the checkpoint reproduces the pool");
        assert!(disk.enibox.unwrap().creating.is_empty(), "no intent is left");
    }
}

/// What EC2 has given an ENI for pods: of several IPv6 prefixes the first.
pub fn nets_of(interface: &Interface) -> Vec<IpNet> {
    let singles = interface.secondary_ipv4s.iter().map(|ip| IpNet::from(IpAddr::V4(*ip)));
    let prefixes = interface.v4_prefixes.iter().map(|net| IpNet::V4(*net));
    singles.chain(prefixes).chain(interface.v6_prefixes.first().copied()).collect()
}

/// The targets of the default settings.
pub const DEFAULT: Targets = Targets { warm_eni: 1, warm_ip: 0, minimum_ip: 0, warm_prefix: 0 };
/// One prefix to spare.
pub const PREFIXES: Targets = Targets { warm_prefix: 1, ..DEFAULT };
