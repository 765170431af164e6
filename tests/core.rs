//! The core against a model of EC2, in virtual time: scenarios, and one long scenario killed at every effect.

#![cfg(feature = "sandbox")]

use enibox::model::ec2::{Call, Reply};
use enibox::model::ids::{EniId, InstanceId, PodKey, PodName};
use enibox::model::imds::{Answer as Told, Query};
use enibox::model::naming;
use enibox::model::spool::Record;
use enibox::model::time::{Mono, Now, Wall};
use enibox::model::wire::{AddNetworkRequest, DelNetworkRequest, UNKNOWN_POD};
use enibox::plan::backoff::Random;
use enibox::plan::core::{Answer, CallId, Config, Core, Effect, Event, Seen};
use enibox::plan::host::Intent;
use enibox::plan::sizing::Targets;
use enibox::sandbox::vpc::{Planned, Vpc};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

const LATENCY: Duration = Duration::from_millis(50);

/// A node in a VPC: the core, its disk, its kernel and its pods. Only the core and what is in flight dies in a crash.
struct World {
    vpc: Vpc,
    instance: InstanceId,
    targets: Targets,
    nanos: u64,
    core: Option<Core>,
    ready: bool,
    wake_at: Option<Mono>,
    coming: BTreeMap<(u64, u64), Event>,
    serial: u64,
    disk: Option<String>,
    disk_full: bool,
    spool: Vec<Record>,
    pods: BTreeMap<String, IpAddr>,
    asked: BTreeMap<CallId, String>,
    answers: BTreeMap<String, VecDeque<Answer>>,
    links: BTreeSet<String>,
    swept: BTreeSet<IpAddr>,
    effects: u64,
    crash_at: Option<u64>,
    ec2_down: bool,
    log: Vec<String>,
}

fn key(pod: &str) -> PodKey {
    PodKey { network: "aws-cni".into(), container: format!("sandbox-of-{pod}"), ifname: "eth0".into() }
}

impl World {
    fn new(kind: &str, targets: Targets) -> World {
        let mut vpc = Vpc::new("eu-west-1", vec!["10.20.0.0/16".parse().unwrap()], 7);
        let group = vpc.add_group();
        let subnet = vpc.add_subnet("eu-west-1a", "10.20.0.0/22".parse().unwrap(), None, &[]);
        let start = World::moment(0);
        let instance = vpc.launch(start, kind, &subnet, &[group]).unwrap();
        let mut world = World {
            vpc,
            instance,
            targets,
            nanos: 0,
            core: None,
            ready: false,
            wake_at: None,
            coming: BTreeMap::new(),
            serial: 0,
            disk: None,
            disk_full: false,
            spool: Vec::new(),
            pods: BTreeMap::new(),
            asked: BTreeMap::new(),
            answers: BTreeMap::new(),
            links: BTreeSet::new(),
            swept: BTreeSet::new(),
            effects: 0,
            crash_at: None,
            ec2_down: false,
            log: Vec::new(),
        };
        world.start();
        world
    }

    fn moment(nanos: u64) -> Now {
        let wall = 1_785_571_200_000_000_000 + i64::try_from(nanos).unwrap();
        Now { mono: Mono::from_nanos(1_000_000_000_000 + nanos), wall: Wall::from_unix_nanos(wall) }
    }

    fn now(&self) -> Now {
        World::moment(self.nanos)
    }

    fn seen(&self) -> Seen {
        Seen { links: self.links.iter().cloned().collect(), routed: self.pods.values().copied().collect() }
    }

    /// The process starts: with the disk, and without a memory.
    fn start(&mut self) {
        let identity = self.vpc.identity(&self.instance).unwrap();
        let limits = enibox::model::limits::of(&identity.instance_type).unwrap();
        let config = Config {
            identity,
            v6: false,
            prefix_mode: false,
            targets: self.targets,
            slots: limits.slots_per_eni() as usize,
            eni_limit: limits.enis as usize,
            max_pods: limits.max_pods() as usize,
            ip_cooldown: Duration::from_secs(30),
            add_wait: Duration::from_secs(3),
            provisioning: true,
            subnet_discovery: true,
            manage_untagged: true,
            cluster_name: "test".into(),
            additional_tags: BTreeMap::new(),
            network_policy_mode: String::new(),
            host: Intent::default(),
            seed: 42 + self.effects,
        };
        self.core = Some(Core::new(config));
        self.ready = false;
        self.wake_at = None;
        let spool = self.spool.clone();
        self.happen(Event::Started { checkpoint: self.disk.clone(), seen: self.seen(), spool });
    }

    /// The process is killed: what was in flight is lost, what EC2 has done stands. Plugins that waited see a broken
    /// connection, and their runtime deletes the pod.
    fn crash(&mut self) {
        self.log.push(format!("{} ms CRASH", self.nanos / 1_000_000));
        self.core = None;
        self.coming.clear();
        self.ready = false;
        self.crash_at = None;
        for (_, pod) in std::mem::take(&mut self.asked) {
            self.answers.entry(pod).or_default().push_back(Answer::Error("connection lost".into()));
        }
    }

    fn later(&mut self, after: Duration, event: Event) {
        self.serial += 1;
        let at = self.nanos + u64::try_from(after.as_nanos()).unwrap();
        self.coming.insert((at, self.serial), event);
    }

    fn happen(&mut self, event: Event) {
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

    fn carry_out(&mut self, effect: Effect) {
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
                let enis: Vec<_> =
                    self.vpc.imds(now, &self.instance.clone()).unwrap().into_iter().map(|seen| seen.eni).collect();
                let told = match query {
                    Query::Scan => Told::Enis(enis),
                    Query::Eni(mac) => Told::Eni(enis.into_iter().find(|eni| eni.mac == mac)),
                    Query::VpcCidrs { .. } => Told::Cidrs(self.vpc.cidrs().iter().map(|net| (*net).into()).collect()),
                    Query::SecurityGroups => Told::Groups(self.primary_groups()),
                };
                self.later(LATENCY, Event::Imds(op, Ok(told)));
            }
            Effect::Kernel(op, intent) => {
                // Every pod's table must be that of the ENI that EC2 has its address on.
                for (address, table) in &intent.pods {
                    if let Some(device) = self.device_of(*address) {
                        assert_eq!(*table, naming::table_of(0, device).unwrap(), "table of {address}");
                    }
                }
                let living = |ip: &IpAddr| self.pods.values().any(|held| held == ip);
                assert!(
                    !intent.gone.iter().any(living),
                    "rules of a living pod are swept: {:?}, living {:?}, {:#?}",
                    intent.gone,
                    self.pods,
                    self.log
                );
                self.swept.extend(intent.gone.iter().copied());
                self.later(LATENCY, Event::Kernel(op, Ok(BTreeMap::new())));
            }
            Effect::Save(generation, content) => {
                if self.disk_full {
                    return self.later(LATENCY, Event::Saved(generation, Err("no space left on device".into())));
                }
                self.disk = Some(content);
                self.later(LATENCY, Event::Saved(generation, Ok(())));
            }
            Effect::SetAside(_) => self.disk = None,
            Effect::ListLinks => {
                let seen = self.seen();
                self.later(LATENCY, Event::Seen(Ok(seen)));
            }
            Effect::SpoolDone(keys) => self.spool.retain(|record| !keys.contains(&record.key)),
            Effect::WakeAt(at) => self.wake_at = Some(at),
            Effect::Ready => self.ready = true,
            Effect::Log(level, text) => self.log.push(format!("{} ms {level:?} {text}", self.nanos / 1_000_000)),
        }
    }

    fn primary_groups(&self) -> Vec<enibox::model::ids::GroupId> {
        let primary = self.vpc.identity(&self.instance).unwrap().primary_eni;
        self.vpc.interfaces().find(|interface| interface.id == primary).unwrap().groups.clone()
    }

    fn device_of(&self, address: IpAddr) -> Option<u32> {
        let IpAddr::V4(address) = address else { return None };
        let holds = |i: &&enibox::model::ec2::Interface| i.secondary_ipv4s.contains(&address);
        self.vpc.interfaces().find(holds)?.attachment.as_ref().map(|attachment| attachment.device)
    }

    /// Lets virtual time pass.
    fn pass(&mut self, time: Duration) {
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

    fn settle(&mut self) {
        for _ in 0..600 {
            if self.core.as_ref().is_some_and(Core::quiet) && self.coming.is_empty() {
                return;
            }
            self.pass(Duration::from_secs(1));
        }
        panic!("the core does not come to rest: {:#?}", self.log);
    }

    /// What the runtime and the plugin do for a new pod, without waiting for the answer.
    fn ask(&mut self, pod: &str) {
        if self.core.is_none() || !self.ready {
            self.answers.entry(pod.into()).or_default().push_back(Answer::Error("no daemon".into()));
            return;
        }
        self.serial += 1;
        let (call, key) = (self.serial, key(pod));
        self.spool.retain(|record| record.key != key); // as the plugin does
        self.asked.insert(call, pod.into());
        let request = AddNetworkRequest {
            pod_name: pod.into(),
            pod_namespace: "default".into(),
            network_name: key.network,
            container_id: key.container,
            if_name: key.ifname,
            ..AddNetworkRequest::default()
        };
        self.happen(Event::Add(call, request));
    }

    /// The end of an ADD: the pod lives, or the runtime cleans up.
    fn wired(&mut self, pod: &str) -> bool {
        match self.answers.get_mut(pod).and_then(VecDeque::pop_front) {
            Some(Answer::Add(reply)) if reply.success => {
                let address: IpAddr = reply.allocations[0].ipv4.parse().unwrap();
                if let Some((other, _)) = self.pods.iter().find(|(other, held)| **held == address && *other != pod) {
                    panic!("{address} is given to {other} and to {pod}");
                }
                assert!(self.device_of(address).is_some(), "EC2 does not know {address}");
                self.pods.insert(pod.into(), address);
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

    fn add(&mut self, pod: &str) -> bool {
        self.ask(pod);
        self.pass(Duration::from_secs(5));
        self.wired(pod)
    }

    /// DEL: through the daemon, or into the spool when it is away. The kernel's part is done in any case.
    fn del(&mut self, pod: &str) {
        self.pods.remove(pod);
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

    fn enis(&self) -> Vec<(u32, usize)> {
        let attached = self
            .vpc
            .interfaces()
            .filter_map(|i| i.attachment.as_ref().map(|attachment| (attachment.device, i.secondary_ipv4s.len())));
        let mut enis: Vec<_> = attached.collect();
        enis.sort_unstable();
        enis
    }

    fn calls(&self, action: &str) -> u64 {
        self.vpc.journal().counts().get(action).copied().unwrap_or(0)
    }

    /// What must hold whenever the core is at rest.
    fn check_at_rest(&self) {
        let core = self.core.as_ref().unwrap();
        let given: BTreeMap<PodKey, IpAddr> =
            core.pool().allocations().map(|(ip, owner, _)| (owner.key.clone(), ip)).collect();
        let living: BTreeMap<PodKey, IpAddr> = self.pods.iter().map(|(pod, ip)| (key(pod), *ip)).collect();
        assert_eq!(given, living, "the pool and the living pods");
        let mut held: BTreeSet<(EniId, IpAddr)> = BTreeSet::new();
        for (id, eni) in core.pool().enis() {
            held.extend(eni.cidrs().map(|(net, _)| (id.clone(), net.addr())));
        }
        let attached = self.vpc.interfaces().filter(|i| i.attachment.is_some());
        let truth: BTreeSet<(EniId, IpAddr)> =
            attached.flat_map(|i| i.secondary_ipv4s.iter().map(|ip| (i.id.clone(), IpAddr::V4(*ip)))).collect();
        assert_eq!(held, truth, "the pool and EC2");
        let orphans: Vec<_> = self.vpc.interfaces().filter(|i| i.attachment.is_none()).map(|i| &i.id).collect();
        assert!(orphans.is_empty(), "leaked ENIs: {orphans:?}: {:#?}", self.log);
        let disk = enibox::model::checkpoint::Checkpoint::parse(self.disk.as_deref().unwrap()).unwrap();
        assert_eq!(disk.allocations.len(), self.pods.len(), "the checkpoint reproduces the pool");
        assert!(disk.enibox.unwrap().creating.is_empty(), "no intent is left");
    }
}

const DEFAULT: Targets = Targets { warm_eni: 1, warm_ip: 0, minimum_ip: 0, warm_prefix: 0 };

#[test]
fn a_fresh_node_gets_addresses_and_then_serves() {
    let mut world = World::new("t3.small", DEFAULT);
    assert!(!world.ready, "nothing to hand out yet");
    world.settle();
    assert!(world.ready);
    assert_eq!(world.enis(), [(0, 3)]);
    assert!(world.add("a"));
    world.settle();
    assert_eq!(world.enis(), [(0, 3), (1, 3)], "a whole spare ENI");
    world.check_at_rest();
}

#[test]
fn a_new_eni_is_three_calls_and_idling_is_none() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    for n in 0..27 {
        assert!(world.add(&format!("pod-{n}")), "pod {n}");
    }
    world.settle();
    assert_eq!(world.enis(), [(0, 9), (1, 9), (2, 9)]);
    let counts = [
        ("CreateNetworkInterface", 2),
        ("AttachNetworkInterface", 2),
        ("ModifyNetworkInterfaceAttribute", 2),
        ("AssignPrivateIpAddresses", 1),
        ("DescribeSubnets", 1),
        ("CreateTags", 1),
        ("DescribeNetworkInterfaces", 1),
    ];
    for (action, count) in counts {
        assert_eq!(world.calls(action), count, "{action}");
    }
    let before: u64 = world.vpc.journal().counts().values().sum();
    world.pass(Duration::from_hours(3));
    assert_eq!(world.vpc.journal().counts().values().sum::<u64>(), before, "idle");
    world.check_at_rest();
}

#[test]
fn thirty_pods_at_once_wait_for_the_addresses_that_are_on_their_way() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    let pods: Vec<String> = (0..27).map(|n| format!("pod-{n}")).collect();
    for pod in &pods {
        world.ask(pod);
    }
    world.pass(Duration::from_secs(6));
    for pod in &pods {
        assert!(world.wired(pod), "{pod}");
    }
    world.ask("one-too-many");
    world.pass(Duration::from_secs(1));
    assert!(!world.wired("one-too-many"), "refused, and at once: nothing is on its way");
    world.settle();
    world.check_at_rest();
}

#[test]
fn spare_enis_go_back_when_the_pods_are_gone() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    for n in 0..20 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    for n in 0..20 {
        world.del(&format!("pod-{n}"));
    }
    world.pass(Duration::from_mins(10));
    world.settle();
    assert_eq!(world.enis(), [(0, 9)], "WARM_ENI_TARGET=1 is met by the primary ENI's nine");
    assert_eq!((world.calls("DetachNetworkInterface"), world.calls("DeleteNetworkInterface")), (2, 2));
    world.check_at_rest();
}

#[test]
fn single_addresses_go_back_under_ip_targets() {
    let mut world = World::new("m5.large", Targets { warm_ip: 2, minimum_ip: 5, ..DEFAULT });
    world.settle();
    assert_eq!(world.enis(), [(0, 5)]);
    for n in 0..8 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    assert_eq!(world.enis().iter().map(|(_, n)| n).sum::<usize>(), 10, "eight pods and two to spare");
    for n in 0..8 {
        world.del(&format!("pod-{n}"));
    }
    world.pass(Duration::from_mins(10));
    world.settle();
    assert_eq!(world.enis(), [(0, 5)]);
    world.check_at_rest();
}

#[test]
fn a_restart_serves_living_pods_at_once_with_ec2_away() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    for n in 0..12 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    let pods = world.pods.clone();
    world.crash();
    world.ec2_down = true;
    world.start();
    world.pass(Duration::from_secs(1));
    assert!(world.ready, "ready within a second");
    assert!(world.add("pod-3"), "the same key again");
    assert_eq!(world.pods, pods, "and the same address");
    world.del("pod-4");
    assert!(world.add("new"), "addresses of known ENIs are good without EC2");
    world.ec2_down = false;
    world.pass(Duration::from_mins(2));
    world.settle();
    world.check_at_rest();
}

#[test]
fn a_restart_is_one_call() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    for n in 0..20 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    let before: u64 = world.vpc.journal().counts().values().sum();
    world.crash();
    world.start();
    world.settle();
    assert_eq!(world.vpc.journal().counts().values().sum::<u64>() - before, 1);
    world.check_at_rest();
}

#[test]
fn a_del_that_met_no_daemon_comes_back_through_the_spool() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a") && world.add("b"));
    world.settle();
    world.crash();
    world.del("a");
    assert_eq!(world.spool.len(), 1);
    world.start();
    world.settle();
    assert!(world.spool.is_empty());
    world.check_at_rest();
}

#[test]
fn what_a_deleted_pod_left_on_the_host_is_swept() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a") && world.add("b"));
    let address = world.pods["a"];
    world.del("a");
    world.pass(Duration::from_secs(10));
    assert_eq!(world.swept, BTreeSet::from([address]));
}

#[test]
fn an_old_record_does_not_touch_a_later_pod() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    let time = world.now().wall;
    world.pass(Duration::from_secs(10));
    assert!(world.add("a"));
    world.spool.push(Record { key: key("a"), pod: PodName::default(), uid: String::new(), time });
    let spool = world.spool.clone();
    world.happen(Event::Spool(spool));
    world.settle();
    assert!(world.spool.is_empty());
    world.check_at_rest();
}

#[test]
fn a_full_disk_gives_nothing_away_and_loses_nothing() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a"));
    let before = world.pods["a"];
    world.disk_full = true;
    world.ask("b");
    world.pass(Duration::from_secs(2));
    assert!(matches!(world.answers["b"].front(), Some(Answer::Error(text)) if text.contains("no space")));
    world.answers.clear();
    world.disk_full = false;
    world.pass(Duration::from_mins(1));
    assert!(world.add("b"));
    assert_ne!(world.pods["b"], before);
    world.settle();
    world.check_at_rest();
}

#[test]
fn an_unreadable_checkpoint_keeps_the_addresses_that_rules_lead_to() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a") && world.add("b"));
    world.settle();
    world.crash();
    world.disk = Some("{torn".into());
    world.start();
    world.settle();
    for n in 0..8 {
        assert!(world.add(&format!("new-{n}")), "none of them gets an address of a or b: `wired` checks");
    }
    world.del("a");
    world.pass(Duration::from_mins(10));
    let held = world.core.as_ref().unwrap().pool().allocations().count();
    assert_eq!(held, 9, "b is still reserved, a is free again");
}

#[test]
fn an_exhausted_subnet_is_left_alone_for_a_while() {
    let mut world = World::new("m5.large", DEFAULT);
    world.vpc.knobs.refuse_next("AssignPrivateIpAddresses", "InsufficientFreeAddressesInSubnet", 400);
    world.vpc.knobs.refuse_next("AssignPrivateIpAddresses", "InsufficientFreeAddressesInSubnet", 400);
    world.pass(Duration::from_secs(100));
    assert_eq!(world.calls("AssignPrivateIpAddresses"), 2, "nine, then one, then peace");
    assert!(!world.add("a"), "an ADD is refused, not left hanging");
    world.pass(Duration::from_mins(1));
    world.settle();
    assert!(world.add("a"));
    world.settle();
    world.check_at_rest();
}

#[test]
fn a_lost_answer_to_a_creation_makes_no_second_eni() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    world.vpc.knobs.action("CreateNetworkInterface").next.push_back(Planned::AnswerLost);
    assert!(world.add("a"));
    world.pass(Duration::from_mins(1));
    world.settle();
    assert_eq!(world.enis(), [(0, 9), (1, 9)]);
    world.check_at_rest();
}

#[test]
fn a_lost_answer_to_an_assign_is_looked_up_and_not_repeated() {
    let mut world = World::new("m5.large", DEFAULT);
    world.vpc.knobs.action("AssignPrivateIpAddresses").next.push_back(Planned::AnswerLost);
    world.settle();
    assert_eq!(world.calls("AssignPrivateIpAddresses"), 1);
    assert_eq!(world.enis(), [(0, 9)]);
    world.check_at_rest();
}

#[test]
fn an_attach_that_fails_leaves_no_eni_behind() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    world.vpc.knobs.refuse_next("AttachNetworkInterface", "AttachmentLimitExceeded", 400);
    assert!(world.add("a"));
    world.pass(Duration::from_mins(2));
    world.settle();
    assert_eq!(world.enis(), [(0, 9), (1, 9)], "tried again after a pause");
    world.check_at_rest();
}

#[test]
fn an_eni_that_somebody_else_attached_is_taken_in() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    let subnet = world.vpc.identity(&world.instance).unwrap().subnet;
    let now = world.now();
    let eni = world.vpc.add_interface(now, &subnet, "by hand", &BTreeMap::new()).unwrap();
    let instance = world.instance.clone();
    let call = Call::Attach { eni: eni.clone(), instance, device: 1, card: 0 };
    assert!(matches!(world.vpc.execute(now, &call).result, Ok(Reply::Attached(_))));
    world.pass(Duration::from_mins(5));
    world.settle();
    assert!(world.core.as_ref().unwrap().pool().eni(&eni).is_some());
    world.check_at_rest();
}

/// One scenario through growth, restart and shrinking, killed at effect `crash_at`.
fn scenario(crash_at: Option<u64>) -> u64 {
    let mut world = World::new("t3.small", DEFAULT);
    world.crash_at = crash_at;
    let go_on = |world: &mut World| {
        if world.core.is_none() {
            world.start();
            world.pass(Duration::from_secs(2));
        }
    };
    world.pass(Duration::from_secs(5));
    go_on(&mut world);
    world.pass(Duration::from_secs(10));
    for n in 0..7 {
        let pod = format!("pod-{n}");
        for _ in 0..3 {
            if world.add(&pod) {
                break;
            }
            go_on(&mut world);
        }
        go_on(&mut world);
        assert!(world.pods.contains_key(&pod), "{pod} with a crash at {crash_at:?}: {:#?}", world.log);
    }
    for n in 0..6 {
        world.del(&format!("pod-{n}"));
        go_on(&mut world);
    }
    for _ in 0..20 {
        world.pass(Duration::from_secs(20));
        go_on(&mut world);
    }
    world.pass(Duration::from_mins(10));
    go_on(&mut world);
    world.settle();
    world.check_at_rest();
    world.effects
}

#[test]
fn a_crash_at_any_effect_loses_and_leaks_nothing() {
    let effects = scenario(None);
    for at in 1..=effects {
        scenario(Some(at));
    }
    println!("{effects} crash points explored");
}

fn pick<T: Copy>(dice: &mut Random, from: &[T]) -> T {
    from[usize::try_from(dice.below(from.len() as u64)).unwrap()]
}

/// A random life of a node: pods come and go, EC2 misbehaves, the process dies; then peace. `World` asserts all along that
/// no address has two pods and that EC2 knows every one; at the end all must agree.
fn random_life(seed: u64) {
    let mut dice = Random::new(seed);
    let kind = pick(&mut dice, &["t3.small", "m5.large", "t3.medium"]);
    let targets = match dice.below(3) {
        0 => DEFAULT,
        1 => Targets { warm_ip: 2, minimum_ip: 4, ..DEFAULT },
        _ => Targets { warm_eni: 0, ..DEFAULT },
    };
    let mut world = World::new(kind, targets);
    for step in 0..60 {
        match dice.below(20) {
            0..=7 => {
                let pod = format!("pod-{}", dice.below(12));
                if !world.pods.contains_key(&pod) {
                    world.add(&pod);
                }
            }
            8..=11 => {
                if let Some(pod) =
                    world.pods.keys().nth(pick(&mut dice, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])).cloned()
                {
                    world.del(&pod);
                }
            }
            12 => world.crash_at = Some(world.effects + 1 + dice.below(40)),
            13 => {
                let action = pick(&mut dice, &ACTIONS);
                let planned = match dice.below(3) {
                    0 => Planned::AnswerLost,
                    1 => Planned::RequestLost,
                    _ => {
                        let code = pick(&mut dice, &CODES);
                        Planned::Refused { code: code.into(), message: "by chance".into(), status: 400 }
                    }
                };
                world.vpc.knobs.action(action).next.push_back(planned);
            }
            14 => world.vpc.knobs.imds_lag = Duration::from_secs(dice.below(20)),
            15 => world.vpc.knobs.describe_lag = Duration::from_secs(dice.below(20)),
            16 => world.disk_full = !world.disk_full,
            17 => world.ec2_down = !world.ec2_down,
            18 => world.pass(Duration::from_secs(dice.below(200))),
            _ => world.pass(Duration::from_secs(dice.below(10))),
        }
        if world.core.is_none() && step % 3 == 0 {
            world.start();
        }
    }
    (world.disk_full, world.ec2_down, world.crash_at) = (false, false, None);
    (world.vpc.knobs.imds_lag, world.vpc.knobs.describe_lag) = (Duration::ZERO, Duration::ZERO);
    for action in ACTIONS {
        world.vpc.knobs.action(action).next.clear();
    }
    if world.core.is_none() {
        world.start();
    }
    world.pass(Duration::from_mins(30));
    world.settle();
    world.check_at_rest();
}

const ACTIONS: [&str; 9] = [
    "AssignPrivateIpAddresses",
    "AttachNetworkInterface",
    "CreateNetworkInterface",
    "CreateTags",
    "DeleteNetworkInterface",
    "DescribeNetworkInterfaces",
    "DescribeSubnets",
    "DetachNetworkInterface",
    "ModifyNetworkInterfaceAttribute",
];
const CODES: [&str; 5] = [
    "RequestLimitExceeded",
    "InsufficientFreeAddressesInSubnet",
    "UnauthorizedOperation",
    "PrivateIpAddressLimitExceeded",
    "InternalError",
];

#[test]
fn random_lives_end_in_order() {
    let first = std::env::var("ENIBOX_SEED").ok().and_then(|seed| seed.parse().ok());
    let lives = std::env::var("ENIBOX_LIVES").ok().and_then(|lives| lives.parse().ok()).unwrap_or(300);
    for seed in first.map_or(1..lives + 1, |seed: u64| seed..seed + 1) {
        let outcome = std::panic::catch_unwind(|| random_life(seed));
        assert!(outcome.is_ok(), "seed {seed} fails: replay it with ENIBOX_SEED={seed}");
    }
}
