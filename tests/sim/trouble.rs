//! What only wide schedules do: reboots, other settings, tags of subnets, ENIs that are none of ours, long rests.

use crate::judge::Judge;
use crate::schedule::{Life, ROLE, pick, settings};
use crate::world::{self, Sort};
use enibox::model::ec2::Call;
use enibox::model::kube::EniConfig;
use enibox::sim::conditions::WriteFate;
use enibox::sim::node::carried;
use std::time::Duration;

impl Life {
    pub fn act_wide(&mut self) {
        match self.dice.below(10) {
            0..=1 => self.reboot(),
            2..=3 => self.other_settings(),
            4..=5 => self.other_subnets(),
            6..=7 => self.stranger(),
            8 => self.lose_prefix(),
            _ => {
                let time = self.dice.below(3600);
                self.pass(Duration::from_secs(time));
            }
        }
        self.judge.look(&mut self.fleet);
    }

    /// A pod may want an interface on every card, or a branch ENI.
    pub fn ask_for_more(&mut self, number: u32, name: &str) {
        let node = &mut self.fleet.nodes[0];
        if node.setup.settings.multi_nic && self.dice.below(2) == 0 {
            node.kubelet.pods.get_mut(&number).unwrap().every_card = true;
        }
        if node.setup.settings.pod_eni && self.dice.below(3) == 0 {
            node.api.pods.get_mut(name).unwrap().wants_branch = true;
        }
    }

    fn reboot(&mut self) {
        let forgotten = self.dice.below(3) > 0;
        let fate = *pick(&mut self.dice, &[WriteFate::Lost, WriteFate::Done, WriteFate::Torn]);
        self.tell(format!("reboot, a write is {fate:?}, the checkpoint is lost: {forgotten}"));
        let node = &mut self.fleet.nodes[0];
        node.write_fate = fate;
        let recorded = Judge::recorded(node);
        node.reboot(&mut self.fleet.sky, forgotten);
        self.crashes += 1;
        self.judge.look(&mut self.fleet);
        if forgotten || fate == WriteFate::Torn || !recorded {
            self.judge.lose_checkpoint();
            self.judge.forget_cooldowns();
        }
    }

    fn other_settings(&mut self) {
        if self.live && self.dice.below(2) == 0 {
            let pairs = [*pick(&mut self.dice, &world::LIVE), self.mode].concat();
            self.tell(format!("settings change to {pairs:?}"));
            return self.fleet.retune(0, settings(&pairs));
        }
        if self.sort != Sort::Plain {
            return;
        }
        let pairs = *pick(&mut self.dice, &world::PLAIN);
        self.tell(format!("restart with {pairs:?}"));
        self.fleet.crash(0, WriteFate::Done);
        self.crashes += 1;
        self.mode = pairs;
        self.fleet.nodes[0].setup.settings = settings(pairs);
        self.most = world::capacity(&self.fleet.sky.vpc, &self.fleet.nodes[0], self.sort);
        self.fleet.start(0);
    }

    fn other_subnets(&mut self) {
        let n = usize::try_from(self.dice.below(3)).unwrap();
        match self.sort {
            Sort::Plain => {
                let role = *pick(&mut self.dice, &[None, Some("0"), Some("1")]);
                self.tell(format!("subnet {n} has the role {role:?}"));
                self.fleet.sky.vpc.tag_subnet(&self.subnets[n], ROLE, role);
            }
            Sort::Custom => {
                self.tell(format!("the ENIConfig names subnet {n}"));
                let config = EniConfig { subnet: self.subnets[n].clone(), groups: Vec::new() };
                self.fleet.nodes[0].api.eni_configs.insert("default".into(), config);
            }
            _ => {}
        }
    }

    // Somebody attaches an ENI of his own, or takes it away again.
    fn stranger(&mut self) {
        if matches!(self.sort, Sort::Cards | Sort::V6) {
            return; // these count no ENIs
        }
        if let Some(eni) = self.judge.strangers.first().cloned().filter(|_| self.dice.below(2) == 0) {
            let interface = self.fleet.sky.vpc.interface(&eni).cloned();
            let lost = interface.as_ref().map(carried).unwrap_or_default();
            let at = interface.and_then(|interface| interface.attachment);
            let done = at.is_some_and(|at| world::by_hand(&mut self.fleet, &Call::Detach(at.id)));
            if done {
                // With IMDS alone nobody tells the node whose it is, and it uses it.
                self.judge.foreign_enis.insert(eni.clone(), self.fleet.nanos());
                self.judge.taken_by_others(&lost, self.fleet.nanos());
            }
            return self.tell(format!("{eni}, which is none of ours, is detached: {done}"));
        }
        let (now, instance) = (self.fleet.now(), self.fleet.nodes[0].instance.clone());
        let Ok(eni) = self.fleet.sky.vpc.add_interface(now, &self.subnets[1], "by hand", &world::no_manage()) else {
            return;
        };
        let device = 50 + u32::try_from(self.judge.strangers.len()).unwrap();
        let done = world::by_hand(&mut self.fleet, &Call::Attach { eni: eni.clone(), instance, device, card: 0 });
        self.tell(format!("{eni}, which is none of ours, is attached: {done}"));
        self.judge.strangers.insert(eni);
    }

    // Somebody takes the IPv6 prefix of an ENI away.
    fn lose_prefix(&mut self) {
        let instance = self.fleet.nodes[0].instance.clone();
        let enis: Vec<_> =
            self.fleet.sky.vpc.attached_to(&instance).filter(|eni| !eni.v6_prefixes.is_empty()).collect();
        if enis.is_empty() || self.dice.below(3) > 0 {
            return;
        }
        let eni = (*pick(&mut self.dice, &enis)).clone();
        let now = self.fleet.now();
        self.tell(format!("{} loses its prefix to others", eni.id));
        self.fleet.sky.vpc.meddle(now, &eni.id, |eni| eni.v6_prefixes.clear());
        self.judge.taken_by_others(&carried(&eni), self.fleet.nanos());
    }

    /// The operator takes away what the node has no room for: others hold ENIs of it, or nobody gives it addresses.
    pub fn make_room(&mut self) {
        if !self.wide {
            return;
        }
        let node = &self.fleet.nodes[0];
        let branch = |name: &str| node.api.pods.get(name).is_some_and(|pod| pod.wants_branch);
        let wanted = || node.kubelet.pods.iter().filter(|(_, pod)| pod.wanted);
        // Without a trunk there is no branch; that it is asked for is not this test's question.
        let mut doomed: Vec<u32> = Vec::new();
        if self.controller.trunk.is_none() {
            doomed.extend(wanted().filter(|(_, pod)| branch(&pod.name)).map(|(number, _)| *number));
        }
        let mut pooled: Vec<_> = wanted().filter(|(_, pod)| !branch(&pod.name)).collect();
        pooled.sort_by_key(|(number, pod)| (pod.running.is_none(), **number));
        let room = world::capacity(&self.fleet.sky.vpc, node, self.sort);
        doomed.extend(pooled.iter().skip(room).map(|(number, _)| **number));
        for pod in doomed {
            self.tell(format!("no room for pod-{pod}"));
            self.fleet.delete(0, pod, false);
        }
    }
}
