//! Every crash point of the main scenarios: the process is killed before each effect in turn, once with a write under way
//! lost and once with it done, and started again a second later. In the end everything must be as if nothing had happened.

use crate::judge::Judge;
use crate::schedule::settings;
use crate::world::{self, Controller, Pairs, Sort};
use enibox::model::ids::SubnetId;
use enibox::sim::conditions::{Latencies, WriteFate};
use enibox::sim::fleet::Fleet;
use enibox::sim::node::Setup;
use enibox::sim::vpc::Vpc;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

struct Scenario {
    name: &'static str,
    sort: Sort,
    kind: &'static str,
    settings: Pairs,
    script: fn(&mut Script),
}

const PREFIXES: Pairs = &[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];

const SCENARIOS: [Scenario; 11] = [
    Scenario { name: "first ADD", sort: Sort::Plain, kind: "t3.small", settings: &[], script: |script| script.pods(1) },
    Scenario {
        name: "ENI growth",
        sort: Sort::Plain,
        kind: "t3.small",
        settings: &[],
        script: |script| {
            script.minutes(1);
            script.pods(5);
        },
    },
    Scenario {
        name: "prefix growth",
        sort: Sort::Plain,
        kind: "t3.nano",
        settings: PREFIXES,
        script: |script| {
            script.minutes(1);
            script.pods(17);
        },
    },
    Scenario {
        name: "release of ENIs",
        sort: Sort::Plain,
        kind: "t3.small",
        settings: &[],
        script: |script| {
            script.pods(7);
            script.delete(6);
            script.minutes(6);
        },
    },
    Scenario {
        name: "release of addresses",
        sort: Sort::Plain,
        kind: "m5.large",
        settings: &[("WARM_IP_TARGET", "1"), ("MINIMUM_IP_TARGET", "2")],
        script: |script| {
            script.pods(5);
            script.delete(4);
            script.minutes(3);
        },
    },
    Scenario {
        name: "DEL",
        sort: Sort::Plain,
        kind: "m5.large",
        settings: &[],
        script: |script| {
            script.pods(2);
            script.delete(2);
        },
    },
    Scenario {
        name: "restart",
        sort: Sort::Plain,
        kind: "t3.small",
        settings: &[],
        script: |script| {
            script.pods(4);
            script.fleet.crash(0, WriteFate::Lost);
            script.minutes(2);
            script.pods(1);
        },
    },
    Scenario {
        name: "IPv6",
        sort: Sort::V6,
        kind: "t3.small",
        settings: &world::SIX,
        script: |script| {
            script.pods(2);
            script.delete(1);
        },
    },
    Scenario {
        name: "custom networking",
        sort: Sort::Custom,
        kind: "t3.small",
        settings: &[world::CUSTOM],
        script: |script| {
            script.minutes(1);
            script.pods(4);
            script.delete(2);
        },
    },
    Scenario {
        name: "two cards",
        sort: Sort::Cards,
        kind: world::TWO_CARDS,
        settings: &[world::MULTI_NIC],
        script: |script| {
            script.pods(4);
            script.delete(2);
        },
    },
    Scenario {
        name: "branch ENIs",
        sort: Sort::Branch,
        kind: "m5.large",
        settings: &[world::POD_ENI_ON],
        script: |script| {
            script.minutes(1);
            script.pods(3);
            script.delete(2);
        },
    },
];

struct Script {
    fleet: Fleet,
    judge: Judge,
    controller: Controller,
    subnet: SubnetId,
    sort: Sort,
    pods: Vec<u32>,
    named: u32,
}

impl Script {
    fn new(scenario: &Scenario, crash: Option<(u64, WriteFate)>) -> Script {
        let mut vpc = Vpc::new("eu-west-1", vec!["10.20.0.0/16".parse().unwrap()], 7);
        vpc.count_only();
        let group = vpc.add_group();
        vpc.add_type(world::two_cards());
        let v6 = (scenario.sort == Sort::V6).then(|| "2001:db8:0:1::/64".parse().unwrap());
        let subnet = vpc.add_subnet("eu-west-1a", "10.20.0.0/22".parse().unwrap(), v6, &[]);
        let other = (scenario.sort == Sort::Custom)
            .then(|| vpc.add_subnet("eu-west-1a", "10.20.64.0/22".parse().unwrap(), None, &[]));
        vpc.knobs.detach_time = Duration::from_secs(1);
        vpc.knobs.imds_lag = Duration::from_millis(700);
        for action in crate::schedule::ACTIONS {
            vpc.knobs.action(action).delay = Duration::from_millis(100);
        }
        let mut fleet = Fleet::new(vpc);
        let instance = fleet.sky.vpc.launch(fleet.now(), scenario.kind, &subnet, &[group]).unwrap();
        fleet.sky.watched = true;
        let latencies = Latencies { jitter_percent: 0, ..Latencies::default() };
        let setup = Setup { settings: settings(scenario.settings), original: false, latencies, logged: true };
        fleet.add(instance, setup, 11).unwrap();
        world::prepare(&mut fleet, scenario.sort, other.as_ref().unwrap_or(&subnet));
        if let Some((at, fate)) = crash {
            (fleet.nodes[0].crash_at, fleet.nodes[0].write_fate) = (Some(at), fate);
        }
        let (judge, controller, sort) = (Judge::default(), Controller::default(), scenario.sort);
        let mut script = Script { fleet, judge, controller, subnet, sort, pods: Vec::new(), named: 0 };
        script.fleet.start(0);
        script
    }

    fn pass(&mut self, time: Duration) {
        let until = self.fleet.nanos() + u64::try_from(time.as_nanos()).unwrap();
        loop {
            self.judge.look(&mut self.fleet);
            if self.fleet.nodes[0].brain.is_none() {
                let again = self.fleet.nanos() + 1_000_000_000;
                while self.fleet.step(again) {
                    self.judge.look(&mut self.fleet);
                }
                self.fleet.start(0);
            } else if !self.fleet.step(until) {
                return;
            }
        }
    }

    fn minutes(&mut self, minutes: u64) {
        for _ in 0..minutes * 4 {
            self.pass(Duration::from_secs(15));
            self.controller.work(&mut self.fleet, &self.subnet);
        }
    }

    fn pods(&mut self, count: u32) {
        for _ in 0..count {
            self.named += 1;
            let name = format!("pod-{}", self.named);
            let pod = self.fleet.bind(0, &name);
            self.pods.push(pod);
            let node = &mut self.fleet.nodes[0];
            node.kubelet.pods.get_mut(&pod).unwrap().every_card = self.sort == Sort::Cards;
            node.api.pods.get_mut(&name).unwrap().wants_branch = self.sort == Sort::Branch && pod % 2 == 1;
        }
        self.minutes(1);
    }

    fn delete(&mut self, count: usize) {
        for pod in self.pods.drain(..count) {
            self.fleet.delete(0, pod, true);
        }
        self.minutes(1);
    }
}

fn run(scenario: &Scenario, crash: Option<(u64, WriteFate)>, told: &mut Option<Script>) -> u64 {
    let script = told.insert(Script::new(scenario, crash));
    (scenario.script)(script);
    let effects = script.fleet.nodes[0].effects;
    script.minutes(15);
    script.judge.at_rest(&mut script.fleet);
    effects
}

/// Explores every `stride`-th crash point, with both fates of the write in turn or, if it is 1, both; those that failed.
pub fn explore(stride: usize) -> Vec<String> {
    let (mut points, mut failed) = (0_u64, Vec::new());
    let mut counts = BTreeMap::new();
    for scenario in &SCENARIOS {
        let effects = run(scenario, None, &mut None);
        let both = [WriteFate::Lost, WriteFate::Done];
        for at in (1..=effects).step_by(stride) {
            let fates = if stride == 1 { &both[..] } else { &both[usize::from(at % 2 == 0)..][..1] };
            for fate in fates.iter().copied() {
                points += 1;
                let mut told = None;
                let crash = Some((at, fate));
                if catch_unwind(AssertUnwindSafe(|| run(scenario, crash, &mut told))).is_err() {
                    failed.push(format!("{}: killed before effect {at}, write {fate:?}", scenario.name));
                    if failed.len() == 1 {
                        println!("{}", told.map(|script| script.fleet.nodes[0].journal()).unwrap_or_default());
                    }
                }
            }
        }
        counts.insert(scenario.name, effects);
    }
    println!("{points} crash points explored; effects of the scenarios: {counts:?}");
    failed
}
