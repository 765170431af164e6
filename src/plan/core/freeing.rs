//! An ENI on its way out: out of the pool and the host first, then detached and deleted (`spec/aws.md` 8.4).
//!
//! It is written down from the moment it leaves the pool until EC2 has deleted it. EC2 is asked once more before the
//! detach: an ENI that is somebody else's by now is left alone.

use super::saver::Undo;
use super::{Core, Effect, Level, Op, Phase, Tally, Timer};
use crate::model::ec2::{Call, Failure, Interface, Reply};
use crate::model::ids::{AttachmentId, EniId};
use crate::model::time::Mono;
use crate::plan::backoff::Backoff;
use crate::plan::pool::Eni;
use crate::plan::sizing::{ENI_AGE_MIN, Sizing};
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// Between two passes that give addresses back (`spec/ipamd.md` 6.1).
const SHRINK_EVERY: Duration = Duration::from_secs(30);
/// A CIDR that was given back is not taken in again for so long (`spec/ipamd.md` 9.5).
const UNASSIGNED: Duration = Duration::from_mins(1);
/// Between a detach and the first attempt to delete.
const AFTER_DETACH: Duration = Duration::from_secs(2);
/// Between two looks at an ENI that EC2 neither lists nor finds: only both of them, twice, mean that it is gone.
const NOT_FOUND_AGAIN: Duration = Duration::from_secs(10);
/// Pauses between attempts to detach and to delete.
const AGAIN: Backoff = Backoff { first: Duration::from_millis(500), cap: Duration::from_mins(1), jitter_percent: 15 };
/// Refusals after which EC2 is left alone for [`AGAIN_LATER`].
const TRIES: u32 = 12;
const AGAIN_LATER: Duration = Duration::from_mins(10);

/// An ENI that left the pool.
#[derive(Debug)]
pub(super) struct Free {
    pub(super) attachment: Option<AttachmentId>,
    // Its own address, where this run has set it up on the host.
    own: Option<IpAddr>,
    stage: Stage,
    tries: u32,
    seen: Seen,
}

/// What EC2 told when it was last asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Listed,
    /// Neither listed nor found, once.
    Absent,
}

/// Nothing was found that could be given back, and that holds as long as nothing of this changes. Most steps of a node
/// change nothing.
#[derive(Debug)]
pub(super) struct Enough {
    version: u64,
    cordoned: bool,
    sizings: Vec<Sizing>,
    from: Mono,
    until: Mono,
    wake: Option<Mono>,
}

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// Waits for the checkpoint of this generation.
    Journal(u64),
    /// Waits for this time, then looks at what EC2 has.
    Pause(Mono),
    /// DescribeNetworkInterfaces is out.
    Inspect,
    /// DetachNetworkInterface is out.
    Detach,
    /// DeleteNetworkInterface is out.
    Delete,
}

impl Free {
    /// One that was begun before, by a former run or as the end of a creation.
    pub(super) fn resumed(attachment: Option<AttachmentId>) -> Free {
        Free { attachment, own: None, stage: Stage::Pause(Mono::default()), tries: 0, seen: Seen::Nothing }
    }
}

impl Core {
    /// Gives back what is too much: single CIDRs at most every 30 s, then a whole ENI.
    pub(super) fn shrink(&mut self) {
        // A node that boots may have to make room for what it needs to serve.
        let serving = self.phase == Phase::Ready || (self.phase == Phase::Booting && self.grown_once);
        let idle = serving && !self.growing_now() && self.freeing.is_empty();
        let settled = self.absent.values().all(|absent| absent.confirmed);
        let allowed = self.config.provisioning && !self.config.v6 && self.described.is_some() && settled;
        if !idle || !allowed || !self.waiting.is_empty() || self.ops.values().any(|op| matches!(op, Op::Unassign(..))) {
            return;
        }
        let now = self.now.mono;
        let (cordoned, version) = (self.cordoned(), self.pool.version());
        let sizings: Vec<Sizing> = self.config.cards.keys().map(|card| self.sizing(*card)).collect();
        if let Some(enough) = &self.enough
            && (enough.from..enough.until).contains(&now)
            && (enough.version, enough.cordoned, &enough.sizings) == (version, cordoned, &sizings)
        {
            // An earlier wake-up for something else may have taken the place of this one.
            if let Some(at) = enough.wake {
                self.wake_for(Timer::Shrink, at);
            }
            return;
        }
        let rested = self.last_shrink.is_none_or(|last| now.since(last) > SHRINK_EVERY);
        for sizing in sizings.iter().filter(|_| rested) {
            let surplus = sizing.surplus(&self.pool, now);
            for (eni, nets) in surplus.into_iter().chain(sizing.strays(&self.pool, now)) {
                self.unassign(&eni, &nets);
            }
        }
        // An address that a pod has and nobody lists yet may be on any ENI.
        let whole = !cordoned && self.pool.orphan_count() == 0;
        let spare = sizings.iter().filter(|_| whole).find_map(|sizing| sizing.spare_eni(&self.pool, now));
        if let Some(eni) = spare {
            return self.free_eni(&eni);
        }
        let until = self.next_surplus();
        // One millisecond later, so that "more than" holds.
        let wake = until.filter(|_| self.may_shrink()).map(|at| at.plus(Duration::from_millis(1)));
        if let Some(at) = wake {
            self.wake_for(Timer::Shrink, at);
        }
        if version == self.pool.version() {
            let until = until.unwrap_or(Mono::from_nanos(u64::MAX));
            self.enough = Some(Enough { version, cordoned, sizings, from: now, until, wake });
        }
    }

    // Whether time alone may make something superfluous.
    fn may_shrink(&self) -> bool {
        let targets = &self.config.tunables.targets;
        let odd = |eni: &Eni| eni.excluded || eni.cidrs().any(|(_, cidr)| cidr.prefix || self.config.prefix_mode);
        targets.warm_ip + targets.minimum_ip > 0
            || self.pool.enis().count() > 1
            || self.pool.enis().any(|(_, eni)| odd(eni))
    }

    // Ages and cooldowns end without an event: when the next one does.
    fn next_surplus(&self) -> Option<Mono> {
        let cooldown = self.pool.cooldown();
        let rested = self.pool.cooling(self.now.mono).map(|(_, freed)| freed.plus(cooldown));
        let aged = self.pool.enis().map(|(_, eni)| eni.added.plus(ENI_AGE_MIN));
        let next = rested.chain(aged).chain(self.last_shrink.map(|at| at.plus(SHRINK_EVERY)));
        next.filter(|at| *at >= self.now.mono).min()
    }

    fn unassign(&mut self, eni: &EniId, nets: &[IpNet]) {
        let gone: Vec<IpNet> = nets.iter().filter(|net| self.pool.remove_cidr(eni, net).is_ok()).copied().collect();
        let mut addresses = Vec::new();
        let mut prefixes = Vec::new();
        for net in &gone {
            self.unassigned.insert(*net, self.now.mono);
            match net {
                IpNet::V4(net) if net.prefix_len() == 32 => addresses.push(net.addr()),
                IpNet::V4(net) => prefixes.push(*net),
                IpNet::V6(_) => {} // the prefix of an ENI is never given back in IPv6 mode
            }
        }
        self.log(Level::Info, format!("eni {eni}: give back {gone:?}"));
        self.changed();
        let (single, whole): (Vec<IpNet>, Vec<IpNet>) = gone.into_iter().partition(|net| net.prefix_len() == 32);
        if !prefixes.is_empty() {
            let op = self.begin(Op::Unassign(eni.clone(), whole));
            let call = Call::UnassignPrefixes { eni: eni.clone(), prefixes };
            self.when_durable(Effect::Ec2(op, call), Undo::Nothing);
        }
        if !addresses.is_empty() {
            let op = self.begin(Op::Unassign(eni.clone(), single));
            let call = Call::UnassignAddresses { eni: eni.clone(), addresses };
            self.when_durable(Effect::Ec2(op, call), Undo::Nothing);
        }
        self.last_shrink = Some(self.now.mono);
        self.acted();
    }

    /// Whether a CIDR is being given back, or was so lately that who lists it may be behind.
    pub(super) fn resting(&self, net: &IpNet) -> bool {
        let going = |op: &Op| matches!(op, Op::Unassign(_, nets) if nets.contains(net));
        self.unassigned.get(net).is_some_and(|at| self.now.mono.since(*at) < UNASSIGNED || self.ops.values().any(going))
    }

    /// Whether another ENI of the pool was assigned this so lately that who lists it here may be behind.
    pub(super) fn elsewhere(&self, id: &EniId, net: &IpNet) -> bool {
        self.arrived.get(net).is_some_and(|at| self.now.mono.since(*at) < UNASSIGNED) && self.held_beside(id, net)
    }

    /// Whether another ENI of the pool holds a CIDR.
    pub(super) fn held_beside(&self, id: &EniId, net: &IpNet) -> bool {
        self.pool.enis().any(|(other, eni)| other != id && eni.cidrs().any(|(held, _)| held == net))
    }

    pub(super) fn unassign_done(&mut self, eni: &EniId, nets: &[IpNet], result: Result<Reply, Failure>) {
        for net in nets {
            // EC2's lists are behind what it has done just now. What it has assigned again meanwhile is not in here.
            self.unassigned.entry(*net).and_modify(|at| *at = self.now.mono);
        }
        if let Err(failure) = result {
            self.log(Level::Warn, format!("eni {eni}: give back {nets:?}: {failure}"));
            self.tally(Tally::Error("decreaseIPPool"));
            // Where EC2 finds nothing to give back, others have taken it.
            if failure.maybe_applied || failure.code == "InvalidParameterValue" {
                return; // the reconciliation takes in what is still there after the cooldown
            }
            for net in nets {
                self.unassigned.remove(net);
                self.add_cidr(eni, *net);
                self.pool.bar(eni, net, true);
            }
            self.describe(); // serves pods again when EC2 lists it
        }
    }

    /// A creation may have left an ENI behind: it is looked for, soon and once more later, since EC2 may list it late.
    pub(super) fn suspect_leak(&mut self) {
        if self.config.imds_only {
            return;
        }
        self.leak_checks = super::LEAK_CHECKS.len();
        self.set_timer(Timer::Leaked, super::LEAK_CHECKS[0]);
    }

    /// Asks for detached ENIs of this instance's making. Those of other instances are left to them.
    pub(super) fn look_for_leaked(&mut self) {
        let own = ("node.k8s.amazonaws.com/instance_id".to_owned(), Some(self.config.identity.instance.0.clone()));
        let call = Call::DescribeLeaked { vpc: self.config.identity.vpc.clone(), tags: vec![own] };
        self.ask_ec2(Op::Leaked, call);
    }

    pub(super) fn take_leaked(&mut self, found: &[Interface]) {
        self.succeeded(Timer::Leaked);
        self.leak_checks = self.leak_checks.saturating_sub(1);
        let done = super::LEAK_CHECKS.len() - self.leak_checks;
        match super::LEAK_CHECKS.get(done) {
            Some(after) => self.set_timer(Timer::Leaked, *after),
            None => drop(self.changed()),
        }
        for interface in found {
            let id = &interface.id;
            let expected = self.coming().contains(id);
            let ours = interface.attachment.is_none() && interface.description.starts_with("aws-K8S-");
            if ours && !expected && !self.freeing.contains_key(id) && self.pool.eni(id).is_none() {
                self.log(Level::Warn, format!("eni {id}: made by us and forgotten; deleting it"));
                self.freeing.insert(id.clone(), Free::resumed(None));
                self.changed();
            }
        }
    }

    fn free_eni(&mut self, id: &EniId) {
        if self.pool.remove_eni(id).is_err() {
            return;
        }
        self.log(Level::Info, format!("eni {id}: give it back"));
        let own = self.wanted.remove(id).and_then(|eni| self.own_address(&eni));
        self.ready.remove(id);
        self.host_dirty = true;
        let attachment = self.facts.get(id).map(|facts| facts.attachment.clone());
        let stage = Stage::Journal(self.changed());
        self.freeing.insert(id.clone(), Free { attachment, own, stage, tries: 0, seen: Seen::Nothing });
        self.acted();
    }

    pub(super) fn advance_freeing(&mut self) {
        if !self.config.provisioning {
            return; // what a former run began waits until it is allowed again
        }
        let due: Vec<EniId> = self
            .freeing
            .iter()
            .filter(|(_, free)| match free.stage {
                Stage::Journal(generation) => self.saver.durable(generation),
                Stage::Pause(until) => until <= self.now.mono && self.scanned,
                Stage::Inspect | Stage::Detach | Stage::Delete => false,
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            self.free_stage(&id, Stage::Inspect);
            self.ask_ec2(Op::Free(id.clone()), Call::DescribeOne(id));
        }
    }

    fn free_stage(&mut self, id: &EniId, stage: Stage) {
        if let Stage::Pause(until) = stage {
            self.wake_for(Timer::Freeing, until);
        }
        if let Some(free) = self.freeing.get_mut(id) {
            free.stage = stage;
        }
    }

    pub(super) fn free_done(&mut self, id: &EniId, result: Result<Reply, Failure>) {
        let Some(free) = self.freeing.get(id) else { return };
        match (&free.stage, result) {
            (Stage::Inspect, Ok(Reply::Interfaces(found))) => {
                let found = found.into_iter().find(|interface| interface.id == *id);
                self.free_inspected(id, found);
            }
            (Stage::Detach, Ok(_)) => {
                let until = self.now.mono.plus(AFTER_DETACH);
                self.free_stage(id, Stage::Pause(until));
            }
            (Stage::Delete, Ok(_)) => self.freed(id),
            (Stage::Delete, Err(failure)) if failure.code == "InvalidNetworkInterfaceID.NotFound" => {
                self.not_found(id, &failure);
            }
            (_, Err(failure)) => self.free_failed(id, &failure),
            (_, Ok(_)) => {}
        }
    }

    fn free_inspected(&mut self, id: &EniId, found: Option<Interface>) {
        let ours = &self.config.identity.instance;
        let used = |interface: &Interface| {
            let here = interface.attachment.as_ref().is_some_and(|attachment| attachment.instance == *ours);
            here && (self.pool.eni(id).is_some() || self.cidrs_of(interface).iter().any(|net| self.pool.orphan_in(net)))
        };
        if found.as_ref().is_some_and(used) {
            // It was given up for lost while EC2's list was behind: it serves already, or a crash has hidden its pods.
            self.log(Level::Warn, format!("eni {id}: it is attached after all, and in use; it is kept"));
            self.freeing.remove(id);
            self.changed();
            return self.describe();
        }
        match found.map(|interface| (interface.attachment, interface.status)) {
            Some((Some(attachment), status)) if attachment.instance == *ours => {
                if status == "detaching" {
                    let until = self.now.mono.plus(AFTER_DETACH);
                    self.free_stage(id, Stage::Pause(until));
                } else {
                    self.free_stage(id, Stage::Detach);
                    self.ask_ec2(Op::Free(id.clone()), Call::Detach(attachment.id));
                }
            }
            Some((Some(attachment), _)) => {
                self.log(Level::Error, format!("eni {id} is attached to {} by now: left alone", attachment.instance));
                self.freed(id);
            }
            // Not listed may only mean not yet: EC2 knows by the id.
            other => {
                if let Some(free) = self.freeing.get_mut(id) {
                    free.seen = match (other, free.seen) {
                        (Some(_), _) => Seen::Listed,
                        (None, Seen::Absent) => Seen::Absent,
                        (None, _) => Seen::Nothing,
                    };
                }
                self.free_stage(id, Stage::Delete);
                self.ask_ec2(Op::Free(id.clone()), Call::Delete(id.clone()));
            }
        }
    }

    fn not_found(&mut self, id: &EniId, failure: &Failure) {
        match self.freeing.get_mut(id).map(|free| &mut free.seen) {
            Some(Seen::Listed) => self.free_failed(id, failure),
            Some(seen @ Seen::Nothing) => {
                *seen = Seen::Absent;
                let until = self.now.mono.plus(NOT_FOUND_AGAIN);
                self.free_stage(id, Stage::Pause(until));
            }
            Some(Seen::Absent) => self.freed(id),
            None => {}
        }
    }

    fn free_failed(&mut self, id: &EniId, failure: &Failure) {
        let Some(free) = self.freeing.get_mut(id) else { return };
        let refused = !failure.code.is_empty() && !failure.throttled();
        free.tries = (free.tries + 1).min(if refused { TRIES } else { TRIES - 1 });
        let tries = free.tries;
        let mut pause = AGAIN.pause(tries - 1, &mut self.random);
        if tries >= TRIES {
            // Not forgotten: nobody else would delete it. But EC2 has said no often enough for now.
            free.tries = 0;
            pause = AGAIN_LATER;
            self.tally(Tally::Error("decreaseIPPoolFreeENIFailed"));
            self.log(
                Level::Error,
                format!("eni {id}: cannot be given back: {failure}; again in {} s", pause.as_secs()),
            );
        } else {
            self.log(Level::Warn, format!("eni {id}: give it back, attempt {tries}: {failure}"));
        }
        let until = self.now.mono.plus(pause);
        self.free_stage(id, Stage::Pause(until));
    }

    fn freed(&mut self, id: &EniId) {
        self.log(Level::Info, format!("eni {id}: gone"));
        let own = self.freeing.remove(id).and_then(|free| free.own);
        // Rules for its own address would lead the next one that has it astray. As long as the link was there the address
        // sat on it, and what others have made for it was theirs (`spec/dataplane.md` 8.4).
        if let Some(own) = own.filter(|own| !self.pool.allocations().any(|held| held.address == *own)) {
            self.gone.insert(own);
            self.host_dirty = true;
        }
        self.devices.remove(id);
        self.facts.remove(id);
        self.attached.remove(id);
        self.changed();
        self.acted();
        // IMDS may list it for a while; the next scan is trusted only with EC2's word on unknown ENIs.
    }
}
