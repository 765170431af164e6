//! A random schedule: a node, its pods, its neighbours and all the trouble they can have, decided by one number.

use crate::judge::{self, FOREIGN, Judge};
use crate::world::{self, Controller, Pairs, Sort};
use enibox::model::ec2::{Call, Count, Interface};
use enibox::model::ids::SubnetId;
use enibox::model::map::Map;
use enibox::model::settings::Settings;
use enibox::plan::backoff::Random;
use enibox::sim::conditions::{Latencies, Lie, WriteFate};
use enibox::sim::fleet::Fleet;
use enibox::sim::node::{File, Setup, carried};
use enibox::sim::vpc::{Planned, Vpc};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

pub const ACTIONS: [&str; 11] = [
    "AssignPrivateIpAddresses",
    "AttachNetworkInterface",
    "CreateNetworkInterface",
    "CreateTags",
    "DeleteNetworkInterface",
    "DescribeNetworkInterfaces",
    "DescribeSubnets",
    "DetachNetworkInterface",
    "ModifyNetworkInterfaceAttribute",
    "UnassignPrivateIpAddresses",
    "AssignIpv6Addresses",
];

/// EC2's codes (`spec/aws.md` 11) and their HTTP status.
const CODES: [(&str, u16); 22] = [
    ("RequestLimitExceeded", 503),
    ("Throttling", 400),
    ("EC2ThrottledException", 400),
    ("InsufficientFreeAddressesInSubnet", 400),
    ("InsufficientCidrBlocks", 400),
    ("UnauthorizedOperation", 403),
    ("AuthFailure", 401),
    ("ExpiredToken", 400),
    ("PrivateIpAddressLimitExceeded", 400),
    ("AttachmentLimitExceeded", 400),
    ("NetworkInterfaceLimitExceeded", 400),
    ("InvalidNetworkInterfaceID.NotFound", 400),
    ("InvalidNetworkInterface.InUse", 400),
    ("InvalidAttachmentID.NotFound", 400),
    ("InvalidSubnetID.NotFound", 400),
    ("InvalidGroup.NotFound", 400),
    ("InvalidParameterValue", 400),
    ("IncorrectState", 400),
    ("OperationNotPermitted", 400),
    ("InternalError", 500),
    ("Unavailable", 503),
    ("ServiceUnavailable", 503),
];

/// Schedules from this number on draw from all modes, those before it from addresses and prefixes alone.
pub const WIDE: u64 = 100_000;

/// Schedules from this number on also change settings of a running process, and draw from two more kinds of nodes.
pub const LIVE: u64 = 700_000;

/// The tag by which a subnet is for pods or not.
pub const ROLE: &str = "kubernetes.io/role/cni";

/// A node's life and everything around it.
pub struct Life {
    pub fleet: Fleet,
    pub judge: Judge,
    pub dice: Random,
    // That of the node, then others of its zone.
    pub subnets: Vec<SubnetId>,
    pods: u32,
    pub most: usize,
    // Of narrow schedules only the plain sort is.
    pub sort: Sort,
    pub wide: bool,
    pub live: bool,
    // With which the process was started.
    pub mode: Pairs,
    pub controller: Controller,
    /// What was done, for the log of a failure.
    pub story: Vec<String>,
    pub crashes: u64,
}

/// What one schedule was.
#[derive(Clone, Copy, Default)]
pub struct Outcome {
    pub steps: u64,
    pub crashes: u64,
}

pub fn settings(pairs: &[(&str, &str)]) -> Rc<Settings> {
    let lookup = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
    Rc::new(Settings::parse(lookup).0)
}

pub fn pick<'a, T>(dice: &mut Random, from: &'a [T]) -> &'a T {
    &from[usize::try_from(dice.below(from.len() as u64)).unwrap()]
}

/// Modes that a schedule may run in.
const MODES: [&[(&str, &str)]; 8] = [
    &[],
    &[("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "4")],
    &[("WARM_ENI_TARGET", "0")],
    &[("WARM_ENI_TARGET", "2")],
    &[("WARM_IP_TARGET", "1")],
    &[("ENABLE_SUBNET_DISCOVERY", "false")],
    &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")],
    &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_IP_TARGET", "3"), ("MINIMUM_IP_TARGET", "6")],
];

fn wide_kind(dice: &mut Random, live: bool) -> (Sort, &'static str, Pairs) {
    if dice.below(3) == 0 {
        let kind = *pick(dice, &["t3.small", "m5.large", "t3.medium", "t3.nano"]);
        return (Sort::Plain, kind, *pick(dice, &world::PLAIN));
    }
    let kinds = if live { world::SPECIAL.len() } else { world::SPECIAL.len() - 2 };
    let kind = pick(dice, &world::SPECIAL[..kinds]);
    (kind.sort, *pick(dice, kind.types), kind.settings)
}

impl Life {
    fn new(seed: u64) -> Life {
        let mut dice = Random::new(seed);
        for _ in 0..4 {
            dice.bits(); // neighbouring seeds start alike
        }
        let (wide, live) = (seed >= WIDE, seed >= LIVE);
        let (sort, kind, mode) = if wide {
            wide_kind(&mut dice, live)
        } else {
            (Sort::Plain, *pick(&mut dice, &["t3.small", "m5.large", "t3.medium", "t3.nano"]), *pick(&mut dice, &MODES))
        };
        let mut vpc = Vpc::new("eu-west-1", vec!["10.20.0.0/16".parse().unwrap()], seed);
        vpc.count_only();
        vpc.add_type(world::two_cards());
        let group = vpc.add_group();
        let cidr = *pick(&mut dice, &["10.20.0.0/24", "10.20.0.0/22", "10.20.0.0/20"]);
        let v6 = (sort == Sort::V6).then(|| "2001:db8:0:1::/64".parse().unwrap());
        let mut subnets = vec![vpc.add_subnet("eu-west-1a", cidr.parse().unwrap(), v6, &[])];
        if wide {
            for cidr in ["10.20.64.0/20", "10.20.80.0/24"] {
                subnets.push(vpc.add_subnet("eu-west-1a", cidr.parse().unwrap(), None, &[]));
            }
        }
        let mut fleet = Fleet::new(vpc);
        let instance = fleet.sky.vpc.launch(fleet.now(), kind, &subnets[0], &[group]).unwrap();
        fleet.sky.watched = true;
        let mut latencies = Latencies { jitter_percent: *pick(&mut dice, &[0, 20, 300]), ..Latencies::default() };
        latencies.link = Duration::from_millis(*pick(&mut dice, &[0, 200, 5000]));
        latencies.disk = Duration::from_millis(*pick(&mut dice, &[1, 20, 300]));
        let setup = Setup { settings: settings(mode), original: false, latencies, logged: true };
        let node = fleet.add(instance, setup, dice.bits()).unwrap();
        if wide {
            world::prepare(&mut fleet, sort, &subnets[1]);
        }
        let most = world::capacity(&fleet.sky.vpc, &fleet.nodes[node], sort);
        let story = vec![format!("{kind} {mode:?} {cidr} at most {most} pods")];
        let (judge, controller) = (Judge::default(), Controller::default());
        let mut life =
            Life { fleet, judge, dice, subnets, pods: 0, most, sort, wide, live, mode, controller, story, crashes: 0 };
        for action in ACTIONS {
            let delay = life.dice.below(400);
            life.fleet.sky.vpc.knobs.action(action).delay = Duration::from_millis(delay);
        }
        life.fleet.start(0);
        life.judge.look(&mut life.fleet);
        life
    }

    pub fn tell(&mut self, text: impl Into<String>) {
        self.story.push(format!("{:>9} ms {}", self.fleet.nanos() / 1_000_000, text.into()));
    }

    pub fn pass(&mut self, time: Duration) {
        let until = self.fleet.nanos() + u64::try_from(time.as_nanos()).unwrap();
        while self.fleet.step(until) {
            self.judge.look(&mut self.fleet);
        }
    }

    fn act(&mut self) {
        match self.dice.below(100) {
            0..=24 => self.bind(),
            25..=38 => self.delete(),
            39..=41 => {
                let pick = usize::try_from(self.dice.below(64)).unwrap();
                self.tell(format!("repeat {pick}"));
                // Without its checkpoint the daemon does not know a running pod's name.
                self.fleet.repeat(0, pick, !self.judge.checkpoint_lost);
            }
            42..=46 => self.crash_soon(),
            47..=54 => self.ec2_trouble(),
            55..=56 => {
                let (imds, described) = (self.dice.below(40), self.dice.below(40));
                let knobs = &mut self.fleet.sky.vpc.knobs;
                knobs.imds_lag = Duration::from_secs(imds);
                knobs.describe_lag = Duration::from_secs(described);
                knobs.detach_time = Duration::from_secs(imds / 4);
                self.tell(format!("IMDS lags {imds} s, Describe {described} s"));
            }
            57..=59 => self.lie(),
            60..=64 => self.node_trouble(),
            65..=69 => self.others(),
            70..=71 => self.damage(),
            72 => {
                let jump = i64::try_from(self.dice.below(7200)).unwrap() - 3600;
                self.tell(format!("the wall clock jumps {jump} s"));
                self.fleet.nodes[0].wall_shift += jump * 1_000_000_000;
            }
            73..=79 => {
                let time = self.dice.below(200);
                self.pass(Duration::from_secs(time));
            }
            _ => {
                let time = self.dice.below(6000);
                self.pass(Duration::from_millis(time));
            }
        }
        self.judge.look(&mut self.fleet);
    }

    fn bind(&mut self) {
        for _ in 0..=self.dice.below(3) {
            if self.fleet.nodes[0].kubelet.bound() < self.most {
                self.pods += 1;
                let name = format!("pod-{}", self.pods);
                self.tell(format!("bind {name}"));
                let number = self.fleet.bind(0, &name);
                self.ask_for_more(number, &name);
            }
        }
    }

    fn delete(&mut self) {
        let wanted: Vec<u32> =
            self.fleet.nodes[0].kubelet.pods.iter().filter(|(_, pod)| pod.wanted).map(|(number, _)| *number).collect();
        if !wanted.is_empty() {
            let (number, impatient) = (*pick(&mut self.dice, &wanted), self.dice.below(2) == 0);
            self.tell(format!("delete pod-{number} impatient {impatient}"));
            self.fleet.delete(0, number, impatient);
        }
    }

    fn crash_soon(&mut self) {
        if self.fleet.nodes[0].brain.is_none() {
            return;
        }
        let after = self.dice.below(40);
        let fate = *pick(&mut self.dice, &[WriteFate::Lost, WriteFate::Done]);
        self.tell(format!("crash in {after} effects, a write is {fate:?}"));
        let node = &mut self.fleet.nodes[0];
        node.crash_at = Some(node.effects + 1 + after);
        node.write_fate = fate;
        self.crashes += 1;
    }

    fn ec2_trouble(&mut self) {
        let action = *pick(&mut self.dice, &ACTIONS);
        let planned = match self.dice.below(4) {
            0 => Planned::AnswerLost,
            1 => Planned::RequestLost,
            _ => {
                let (code, status) = *pick(&mut self.dice, &CODES);
                Planned::Refused { code: code.into(), message: "by chance".into(), status }
            }
        };
        let times = self.dice.below(5) / 2 + 1;
        self.tell(format!("{times} times {action}: {planned:?}"));
        for _ in 0..times {
            self.fleet.sky.vpc.knobs.action(action).next.push_back(planned.clone());
        }
    }

    fn lie(&mut self) {
        let now = self.fleet.now();
        let lie = match self.dice.below(8) {
            // Without EC2 nobody can tell what is out of date.
            4 if self.fleet.nodes[0].setup.settings.imds_only => Lie::Empty,
            0 => Lie::Empty,
            1 => Lie::OmitEni(usize::try_from(self.dice.below(3)).unwrap()),
            2 => Lie::OmitAddresses,
            3 => Lie::Down,
            4 => {
                let instance = self.fleet.nodes[0].instance.clone();
                Lie::Stale(self.fleet.sky.vpc.imds(now, &instance).cloned().unwrap_or_default())
            }
            _ => Lie::None,
        };
        self.tell(format!("IMDS: {}", format!("{lie:?}").split('(').next().unwrap_or_default()));
        self.fleet.nodes[0].faults.imds = lie;
    }

    fn node_trouble(&mut self) {
        let which = self.dice.below(5);
        let faults = &mut self.fleet.nodes[0].faults;
        let switch = match which {
            0 => &mut faults.ec2_down,
            1 => &mut faults.disk_full,
            2 => &mut faults.kernel,
            3 => &mut faults.api_down,
            _ => &mut self.fleet.nodes[0].api.node.unschedulable,
        };
        *switch = !*switch;
        let text = format!("trouble {which}: {switch}");
        self.tell(text);
        self.fleet.tell(0);
    }

    // Other people's hands.
    fn others(&mut self) {
        let (now, instance) = (self.fleet.now(), self.fleet.nodes[0].instance.clone());
        let enis: Vec<_> = self.fleet.sky.vpc.attached_to(&instance).cloned().collect();
        let eni = pick(&mut self.dice, &enis).clone();
        let call = match self.dice.below(6) {
            0 if !eni.secondary_ipv4s.is_empty() => Call::UnassignAddresses {
                eni: eni.id.clone(),
                addresses: vec![*pick(&mut self.dice, &eni.secondary_ipv4s)],
            },
            1 => match &eni.attachment {
                Some(at) if at.device > 0 && eni.interface_type != "trunk" => Call::Detach(at.id.clone()),
                _ => return,
            },
            2 => Call::Assign { eni: eni.id.clone(), count: Count::Addresses(1) },
            3 => Call::CreateTags { eni: eni.id.clone(), tags: Map::from([("team".into(), "blue".into())]) },
            4 => {
                let Ok(eni) = self.fleet.sky.vpc.add_interface(now, &self.subnets[0], "by hand", &Map::new()) else {
                    return;
                };
                let device = u32::try_from(enis.len() + 3).unwrap();
                Call::Attach { eni, instance, device, card: 0 }
            }
            _ => {
                let group = self.fleet.sky.vpc.add_group();
                Call::ModifyGroups { eni: eni.id.clone(), groups: vec![group] }
            }
        };
        let lost = match &call {
            Call::UnassignAddresses { addresses, .. } => {
                addresses.iter().map(|ip| std::net::IpAddr::V4(*ip).into()).collect()
            }
            Call::Detach(_) => carried(&eni),
            _ => Vec::new(),
        };
        let done = world::by_hand(&mut self.fleet, &call);
        if done && matches!(call, Call::Detach(_)) {
            self.judge.foreign_enis.insert(eni.id.clone(), self.fleet.nanos());
        }
        if done {
            self.judge.taken_by_others(&lost, self.fleet.nanos());
        }
        self.tell(format!("others: {call:?} -> {}", if done { "done" } else { "refused" }));
    }

    // The checkpoint is lost or damaged while no process runs.
    fn damage(&mut self) {
        let fate = *pick(&mut self.dice, &[WriteFate::Lost, WriteFate::Torn]);
        self.fleet.crash(0, fate);
        self.crashes += 1;
        self.pass(Duration::from_secs(2)); // what plugins had in hand is on the host, where it can be found
        let files = &mut self.fleet.nodes[0].disk.files;
        let text = match self.dice.below(3) {
            0 => {
                files.clear();
                "is missing"
            }
            1 => {
                for file in files.values_mut() {
                    let text = file.text();
                    *file = File::Text(text.chars().take(text.len() / 2).collect());
                }
                "is torn"
            }
            _ => {
                for file in files.values_mut() {
                    *file = File::Text(file.text().replace("vpc-cni-ipam/1", "vpc-cni-ipam/9"));
                }
                "is of the future"
            }
        };
        self.tell(format!("crash, and the checkpoint {text}"));
        self.judge.lose_checkpoint();
        self.judge.forget_cooldowns();
        self.fleet.start(0);
    }

    // All trouble ends, and what others broke is mended as an operator would.
    fn calm(&mut self) {
        self.tell("calm");
        let node = &mut self.fleet.nodes[0];
        node.faults = enibox::sim::conditions::Faults::default();
        node.crash_at = None;
        node.api.node.unschedulable = false;
        for subnet in &self.subnets {
            self.fleet.sky.vpc.tag_subnet(subnet, ROLE, None);
        }
        let knobs = &mut self.fleet.sky.vpc.knobs;
        (knobs.imds_lag, knobs.describe_lag) = (Duration::ZERO, Duration::ZERO);
        for action in ACTIONS {
            knobs.action(action).next.clear();
        }
        if self.fleet.nodes[0].brain.is_none() {
            self.fleet.start(0);
        }
        self.fleet.tell(0);
        self.pass(Duration::from_mins(2));
        self.mend();
        // The node may give out what others took until it has looked at EC2, and busy nodes look every few minutes only.
        self.pass(Duration::from_nanos(FOREIGN));
        self.mend();
        self.pass(Duration::from_mins(40));
    }

    // Pods whose address somebody took away never work again; their owner deletes them.
    fn mend(&mut self) {
        self.controller.work(&mut self.fleet, &self.subnets[0]);
        let node = &self.fleet.nodes[0];
        let here = |eni: &Interface, address: IpAddr| {
            let card = judge::card_of(node, address);
            let on_card = eni.attachment.as_ref().is_some_and(|at| card.is_none_or(|card| at.card == card));
            on_card && carried(eni).iter().any(|net| net.contains(&address))
        };
        let enis: Vec<_> = self.fleet.sky.vpc.attached_to(&node.instance).collect();
        let pooled = node.kubelet.live().filter(|(sandbox, _)| !sandbox.branch);
        let dead = pooled.filter(|(_, address)| !enis.iter().any(|eni| here(eni, *address)));
        for pod in dead.map(|(sandbox, _)| sandbox.pod).collect::<Vec<_>>() {
            self.tell(format!("pod-{pod} has lost its address to others"));
            self.fleet.delete(0, pod, false);
        }
        self.make_room();
    }
}

/// Runs one schedule; panics if anything is wrong. `told` gets the story as far as it went.
pub fn run(seed: u64, told: &mut Option<Life>) -> Outcome {
    let life = told.insert(Life::new(seed));
    let actions = 20 + life.dice.below(60);
    for step in 0..actions {
        if life.wide && life.dice.below(8) == 0 {
            life.act_wide();
        } else {
            life.act();
        }
        life.controller.work(&mut life.fleet, &life.subnets[0]);
        if life.fleet.nodes[0].brain.is_none() && (step % 3 == 0 || life.dice.below(2) == 0) {
            life.tell("start");
            life.fleet.start(0);
            life.judge.look(&mut life.fleet);
        }
    }
    life.calm();
    life.judge.at_rest(&mut life.fleet);
    life.judge.peace(&mut life.fleet, Duration::from_mins(25));
    Outcome { steps: life.fleet.sky.steps, crashes: life.crashes }
}
