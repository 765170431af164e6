//! A larger pool: more addresses on ENIs, and new ENIs (`spec/ipamd.md` 6.6, 6.7; `spec/aws.md` 8).
//!
//! The whole deficit is dealt with at once: several growths run side by side, each knowing what the others will bring. An
//! ENI is assigned to by one growth at a time. A new ENI is three calls: create, attach, delete-on-termination; its intent
//! (client token, tags) is durable before the first, so that after a crash the same call with the same token gives the
//! same ENI. Then IMDS must show it and the host must be set up before a pod may have an address of it.

use super::fallback::count_of;
use super::freeing::Free;
use super::{Core, GrowthId, Level, Op, Phase, Tally, Timer};
use crate::model::checkpoint::Creating;
use crate::model::ec2::{Call, Count, Create, Failure, Interface, Limit, Reply};
use crate::model::ids::{AttachmentId, EniId, SubnetId};
use crate::model::imds::{self, Query};
use crate::model::kube::Regarding;
use crate::model::map::{Map, Set};
use crate::model::net::Mac;
use crate::model::order::Gather as _;
use crate::model::time::Mono;
use crate::plan::backoff::Backoff;
use crate::plan::sizing::{self, Outlook};
use ipnet::IpNet;
use std::time::Duration;

/// Growths at one time; what they will bring counts for the next.
const GROWTHS_MAX: usize = 16;
/// Pauses after a growth that failed for another reason than an exhausted subnet.
pub(super) const AFTER_FAILURE: Backoff =
    Backoff { first: Duration::from_secs(5), cap: Duration::from_mins(2), jitter_percent: 20 };
/// Pauses between looks at IMDS for a new ENI: an attach takes 1 to 5 s as a rule (`spec/aws.md` 8.5).
const LOOK: Backoff = Backoff { first: Duration::from_millis(100), cap: Duration::from_secs(2), jitter_percent: 15 };
/// Pauses between attempts to set delete-on-termination.
const MODIFY: Backoff = Backoff { first: Duration::from_secs(1), cap: Duration::from_secs(30), jitter_percent: 20 };
/// How long an attached ENI whose link does not appear holds up growth.
const ADOPT_MAX: Duration = Duration::from_secs(10);
/// A new ENI that IMDS or the kernel does not show for so long is left to the reconciliation.
const SETTLE_MAX: Duration = Duration::from_secs(162);
/// The pause after a refusal that only people can mend.
const FOR_PEOPLE: Duration = Duration::from_mins(2);
/// How long a limit is believed that EC2 has shown to be lower than the type's.
const LOWERED: Duration = Duration::from_mins(30);
/// How long an ENI that EC2 calls full is left alone; what it holds and we do not know of is found out meanwhile.
const FULL: Duration = Duration::from_mins(1);
/// Attempts to set delete-on-termination. A working ENI is not given up for a throttled call.
const MODIFY_TRIES: u32 = 5;
/// Device indexes of a card (`spec/aws.md` 7.3).
const DEVICES: u32 = 100;

/// A growth in progress.
#[derive(Debug)]
pub(super) struct Growth {
    card: u32,
    stage: Stage,
    creating: Option<Creating>,
    // The device index that was asked for, from the attach on.
    device: Option<u32>,
}

#[derive(Debug)]
enum Stage {
    /// AssignPrivateIpAddresses is out; `single`: already the second try, with one address or prefix.
    Assign { eni: EniId, count: Count, single: bool },
    /// The outcome of an assign is doubtful: what does the ENI have?
    Inspect(EniId),
    /// The intent is being written down, at this generation.
    Journal(u64),
    /// CreateNetworkInterface is out; `again`: an earlier attempt may have made the ENI already.
    Create { again: bool },
    /// AttachNetworkInterface is out; indexes that turned out to be taken.
    Attach { taken: Set<u32> },
    /// The attach failed or its outcome is not known: is the ENI attached?
    Attached { taken: Set<u32>, failure: Option<Failure> },
    /// Attached: waits for IMDS.
    Settle { since: Mono, looks: u32, look_at: Mono, modify: Modify },
    /// IMDS shows it: waits for the host's network.
    SetUp { since: Mono, modify: Modify },
}

/// Delete-on-termination of a new ENI, set while IMDS catches up.
#[derive(Clone, Debug)]
struct Modify {
    attachment: AttachmentId,
    tries: u32,
    done: bool,
    again_at: Option<Mono>,
}

impl Growth {
    /// The intent, if an ENI is being created.
    pub(super) fn creating(&self) -> Option<&Creating> {
        self.creating.as_ref()
    }

    /// The network card that it is for.
    pub(super) fn card(&self) -> u32 {
        self.card
    }

    /// The device index that was asked for, from the attach on.
    pub(super) fn device(&self) -> Option<u32> {
        self.device
    }

    /// The new ENI, once EC2 has made it.
    pub(super) fn eni(&self) -> Option<(EniId, Mac)> {
        self.creating.as_ref()?.eni.clone()
    }
}

impl Core {
    pub(super) fn grow(&mut self) {
        self.go_on();
        let allowed = self.config.provisioning && self.phase != Phase::Stopping;
        let informed = self.described.is_some() && self.groups.is_some() && self.scanned && self.vpc_cidrs.is_some();
        let informed = informed && self.subnets_judged();
        let primary = self.pool.eni(&self.config.identity.primary_eni).is_some();
        if !allowed || !informed || !primary || self.cordoned() || self.timers.contains_key(&Timer::Growth) {
            return;
        }
        while self.growths.len() < GROWTHS_MAX {
            let next = self.resume.iter().position(|creating| self.growth_pause(creating.card).is_none());
            let Some(creating) = next.and_then(|index| self.resume.remove(index)) else { break };
            self.resume_creating(creating);
        }
        if self.adopting() || (self.awaits_imds() && self.waiting.is_empty()) {
            return; // what is attached already may be enough
        }
        self.exhausted.retain(|_, until| *until > self.now.mono);
        self.full.retain(|_, until| *until > self.now.mono);
        self.forget_fragmented();
        for card in self.open_cards() {
            while self.growths.len() < GROWTHS_MAX && self.growth_pause(card).is_none() {
                if !self.grow_card(card) {
                    break;
                }
            }
        }
        // Where nothing can be had, a node that boots must go on all the same: what is in the way (a prefix of another mode
        // in the only slot) is given back by a node that is ready.
        self.grown_once |= !self.growing_now();
    }

    // Begins the next growth of a card, if one is due.
    fn grow_card(&mut self, card: u32) -> bool {
        if self.config.v6 {
            return self.grow_card_v6(card);
        }
        let sizing = self.sizing(card);
        let patient = sizing.demand == 0;
        if patient && self.unassigning(card) {
            return false; // EC2 might still count what is leaving
        }
        let prefixes = self.config.prefix_mode;
        let closed = |subnet: &SubnetId| prefixes && self.fragmented.closed(subnet, self.now.mono);
        let skip = |id: &EniId| self.skipped(id) || self.pool.eni(id).is_some_and(|eni| closed(&eni.subnet));
        let outlook = self.outlook(card);
        match sizing.growth(&self.pool, self.now.mono, &outlook, skip) {
            Some(sizing::Growth::Assign { eni, count }) => {
                let subnet = self.pool.eni(&eni).map(|eni| &eni.subnet);
                let count = subnet.map_or(count, |subnet| self.fragmented.at_most(subnet, count));
                self.begin_assign(card, eni, count_of(prefixes, count));
                true
            }
            Some(sizing::Growth::NewEni { count }) => {
                // As long as no subnet has room for a prefix, and nobody waits, there is nothing to ask about.
                let closed = patient && prefixes && self.subnets.is_some() && self.choose_subnet(true).is_none();
                if (patient && self.strays_leave(card)) || (!closed && !self.place_known()) {
                    return false;
                }
                let subnet = self.choose_subnet(prefixes);
                if subnet.is_none() && prefixes && self.choose_subnet(false).is_some() {
                    return self.grow_singles(card, &outlook);
                }
                let count = subnet.map_or(count, |subnet| self.fragmented.at_most(&subnet, count));
                self.create(card, count_of(prefixes, count))
            }
            None => self.grow_singles(card, &outlook),
        }
    }

    /// Whether an ENI of the pool can take no more now.
    pub(super) fn skipped(&self, id: &EniId) -> bool {
        let in_exhausted = self.pool.eni(id).is_some_and(|eni| self.exhausted.contains_key(&eni.subnet));
        in_exhausted || self.full.contains_key(id) || self.absent.contains_key(&(id.clone(), None))
    }

    /// Begins to assign CIDRs to an ENI of the pool.
    pub(super) fn begin_assign(&mut self, card: u32, eni: EniId, count: Count) {
        let id = self.begin_growth(card, None);
        self.assign(id, eni, count, false);
    }

    /// What is wanted on a card and what is on its way.
    pub(super) fn outlook(&self, card: u32) -> Outlook {
        let mut outlook = Outlook { starved: self.waiting_for(card) > 0, ..Outlook::default() };
        for growth in self.growths.values().filter(|growth| growth.card == card) {
            match (&growth.stage, &growth.creating) {
                (Stage::Assign { eni, count, .. }, _) => {
                    let coming = self.coming_cidrs(*count, &mut outlook);
                    outlook.assigning.insert(eni.clone(), coming);
                }
                (Stage::Inspect(eni), _) => drop(outlook.assigning.insert(eni.clone(), 0)),
                (_, Some(creating)) => {
                    let coming = self.coming_cidrs(creating.count, &mut outlook);
                    outlook.creating.push(coming);
                }
                (_, None) => {}
            }
        }
        outlook
    }

    // CIDRs of the mode; those that stand in for prefixes are counted apart.
    fn coming_cidrs(&self, count: Count, outlook: &mut Outlook) -> usize {
        let cidrs = usize::try_from(count.cidrs()).unwrap_or(usize::MAX);
        if self.config.prefix_mode && matches!(count, Count::Addresses(_)) {
            outlook.singles += cidrs;
            return 0;
        }
        cidrs
    }

    // ENIs that are attached but not yet in the pool, besides those that a growth is waiting for. One whose link does not
    // appear (it may have been moved into a container) is not waited for long.
    fn adopting(&self) -> bool {
        let growing = |id: &EniId| self.growths.values().any(|g| g.eni().is_some_and(|(new, _)| new == *id));
        let hopeful = |id: &EniId| self.refused.get(id).is_none_or(|at| self.now.mono.since(*at) < ADOPT_MAX);
        self.wanted.keys().any(|id| self.pool.eni(id).is_none() && hopeful(id) && !growing(id))
    }

    pub(super) fn begin_growth(&mut self, card: u32, creating: Option<Creating>) -> GrowthId {
        let id = self.next_op;
        self.next_op += 1;
        // Every path sets the stage before anything can look at it.
        let growth = Growth { card, stage: Stage::Create { again: false }, creating, device: None };
        self.growths.insert(id, growth);
        id
    }

    fn stage(&mut self, id: GrowthId, stage: Stage) {
        if let Some(growth) = self.growths.get_mut(&id) {
            growth.stage = stage;
        }
    }

    fn new_eni(&self, id: GrowthId) -> Option<(EniId, Mac)> {
        self.growths.get(&id)?.eni()
    }

    pub(super) fn assign(&mut self, id: GrowthId, eni: EniId, count: Count, single: bool) {
        self.log(Level::Info, format!("eni {eni}: assign {count:?} more"));
        self.stage(id, Stage::Assign { eni: eni.clone(), count, single });
        let call = if self.config.v6 { Call::AssignIpv6Prefix(eni) } else { Call::Assign { eni, count } };
        self.ask_ec2(Op::Growth(id), call);
    }

    /// Begins the creation of an ENI; false if there is no subnet for it.
    pub(super) fn create(&mut self, card: u32, count: Count) -> bool {
        let config = self.cluster.eni_config.as_ref().filter(|_| self.config.custom_networking.is_some());
        let own_groups = config.map(|(_, config)| config.groups.clone()).filter(|groups| !groups.is_empty());
        let Some(subnet) = self.choose_subnet(matches!(count, Count::Prefixes(_))) else {
            if let Some(until) = self.exhausted.values().min().copied() {
                self.grown_once = true;
                self.wake_for(Timer::Growth, until); // no use before that
            } else {
                self.growth_failed(None, "create an ENI: no subnet may be used for pods", None);
            }
            return false;
        };
        if let Some((_, Some(subnets))) = &mut self.subnets {
            // So that ENIs which are created side by side see each other.
            for known in subnets.iter_mut().filter(|known| known.id == subnet) {
                known.free = known.free.saturating_sub(addresses_of(count).saturating_add(1));
            }
        }
        let creating = Creating {
            token: self.random.uuid(),
            card,
            subnet,
            groups: own_groups.or_else(|| self.groups.clone()).unwrap_or_default(),
            count,
            tags: self.tags(true),
            eni: None,
        };
        let text = format!("create an ENI with {count:?} in {}", creating.subnet);
        self.log(Level::Info, text);
        let generation = self.changed();
        let id = self.begin_growth(card, Some(creating));
        self.stage(id, Stage::Journal(generation));
        true
    }

    /// Tags of an ENI of ours; `new`: with the time of creation (`spec/aws.md` 7.4).
    pub(super) fn tags(&self, new: bool) -> Map<String, String> {
        let mut tags = Map::new();
        tags.insert("node.k8s.amazonaws.com/instance_id".to_owned(), self.config.identity.instance.0.clone());
        if !self.config.cluster_name.is_empty() {
            tags.insert("cluster.k8s.amazonaws.com/name".to_owned(), self.config.cluster_name.clone());
            tags.insert("eks:eni:owner".to_owned(), "amazon-vpc-cni".to_owned());
        }
        tags.extend(self.config.additional_tags.clone());
        if new {
            tags.insert("node.k8s.amazonaws.com/createdAt".to_owned(), self.now.wall.to_string());
        }
        tags
    }

    fn send_create(&mut self, id: GrowthId, again: bool) {
        let Some(creating) = self.growths.get(&id).and_then(|growth| growth.creating.clone()) else { return };
        let create = Create {
            subnet: creating.subnet,
            description: format!("aws-K8S-{}", self.config.identity.instance),
            groups: creating.groups,
            count: creating.count,
            conntrack: self.conntrack,
            tags: creating.tags,
            client_token: creating.token,
        };
        self.stage(id, Stage::Create { again });
        self.ask_ec2(Op::Growth(id), Call::Create(create));
    }

    fn send_attach(&mut self, id: GrowthId, taken: Set<u32>) {
        let (Some((eni, _)), Some(card)) = (self.new_eni(id), self.growths.get(&id).map(|growth| growth.card)) else {
            return;
        };
        if !self.config.cards.contains_key(&card) {
            // It was begun under other settings.
            return self.abandon(id, "its network card is not managed any more", None);
        }
        let attached = self.attached.values().filter(|eni| eni.card == card).map(|eni| eni.device);
        let asked = self.growths.iter().filter(|(other, growth)| **other != id && growth.card == card);
        let others = self.devices.iter().filter(|(id, _)| self.card_of(id) == Some(card)).map(|(_, device)| *device);
        let used: Set<u32> = attached.chain(others).chain(asked.filter_map(|(_, growth)| growth.device)).gather();
        let free = || (0..DEVICES).find(|device| !used.contains(device) && !taken.contains(device));
        let listed = self.devices.get(&eni).copied().filter(|device| !taken.contains(device));
        let Some(device) = listed.or_else(free) else {
            return self.abandon(id, "no device index is free", None);
        };
        if let Some(growth) = self.growths.get_mut(&id) {
            growth.stage = Stage::Attach { taken };
            growth.device = Some(device);
        }
        let instance = self.config.identity.instance.clone();
        self.ask_ec2(Op::Growth(id), Call::Attach { eni, instance, device, card });
    }

    // A crash came between two calls: the same call again, or a look at how far it went.
    fn resume_creating(&mut self, creating: Creating) {
        let eni = creating.eni.clone();
        let id = self.begin_growth(creating.card, Some(creating));
        match eni {
            None => {
                self.log(Level::Info, "go on with an ENI that was being created".into());
                self.send_create(id, true);
            }
            Some((eni, _)) => {
                self.log(Level::Info, format!("eni {eni}: go on with its creation"));
                self.stage(id, Stage::Attached { taken: Set::new(), failure: None });
                self.ask_ec2(Op::Growth(id), Call::DescribeOne(eni));
            }
        }
    }

    // Intents that are durable by now.
    fn go_on(&mut self) {
        let durable = |growth: &Growth| match growth.stage {
            Stage::Journal(generation) => self.saver.durable(generation),
            _ => false,
        };
        let ready = self.growths.iter().filter(|(_, growth)| durable(growth)).map(|(id, _)| *id);
        for id in ready.collect::<Vec<_>>() {
            self.send_create(id, false);
        }
    }

    /// The answer to the call of the current stage of a growth.
    pub(super) fn growth_done(&mut self, id: GrowthId, result: Result<Reply, Failure>) {
        let Some(growth) = self.growths.get_mut(&id) else { return };
        let stage = std::mem::replace(&mut growth.stage, Stage::Create { again: false });
        match (stage, result) {
            (Stage::Assign { eni, count, .. }, Ok(Reply::Assigned(nets))) => self.assigned(id, &eni, count, &nets),
            (Stage::Assign { eni, count, single }, Err(failure)) => {
                self.assign_failed(id, eni, count, single, &failure);
            }
            (Stage::Inspect(eni), Ok(Reply::Interfaces(found))) => {
                let found = found.iter().find(|interface| interface.id == eni);
                if let Some(interface) = found {
                    self.sync_cidrs(interface);
                }
                if self.config.v6 && found.is_none_or(|interface| interface.v6_prefixes.is_empty()) {
                    return self.prefix_unclear(id, &eni);
                }
                self.growth_succeeded(id);
            }
            (Stage::Create { .. }, Ok(Reply::Created(interface))) => self.created(id, &interface),
            (Stage::Create { again }, Err(failure)) => self.create_failed(id, again, &failure),
            (Stage::Attach { .. }, Ok(Reply::Attached(attachment))) => self.settle(id, attachment),
            (Stage::Attach { taken }, Err(failure)) => self.attach_failed(id, taken, failure),
            (Stage::Attached { taken, failure }, Ok(Reply::Interfaces(found))) => {
                self.attach_inspected(id, taken, failure, found);
            }
            (stage, Err(failure)) => {
                self.set_aside(id);
                self.growth_failed(Some(id), &format!("{stage:?}"), Some(&failure));
            }
            (stage, Ok(reply)) => {
                self.set_aside(id);
                self.growth_failed(Some(id), &format!("EC2 answered {reply:?} in {stage:?}"), None);
            }
        }
    }

    // How far a creation went is not known: it stays in the books, and is tried again after the pause.
    fn set_aside(&mut self, id: GrowthId) {
        let creating = self.growths.get_mut(&id).and_then(|growth| growth.creating.take());
        self.resume.extend(creating);
    }

    fn assigned(&mut self, id: GrowthId, eni: &EniId, asked: Count, nets: &[IpNet]) {
        self.log(Level::Info, format!("eni {eni}: {} of {asked:?} assigned", nets.len()));
        for net in nets {
            self.unassigned.remove(net);
            self.arrived.insert(*net, self.now.mono);
            self.add_cidr(eni, *net);
        }
        if nets.is_empty() {
            return self.growth_failed(Some(id), &format!("eni {eni}: EC2 assigned nothing"), None);
        }
        if matches!(asked, Count::Prefixes(_)) {
            self.subnet_of(eni).iter().for_each(|subnet| self.prefix_came(subnet));
        }
        self.growth_succeeded(id);
    }

    fn assign_failed(&mut self, id: GrowthId, eni: EniId, count: Count, single: bool, failure: &Failure) {
        let full = failure.code == "PrivateIpAddressLimitExceeded";
        if full {
            let until = self.now.mono.plus(FULL);
            self.full.insert(eni.clone(), until);
            self.wake_for(Timer::Shrink, until);
        }
        if full || failure.maybe_applied {
            // The store is out of step with EC2: see what the ENI has instead of asking for more.
            self.log(Level::Warn, format!("eni {eni}: {failure}; looking at what it has"));
            self.stage(id, Stage::Inspect(eni.clone()));
            return self.ask_ec2(Op::Growth(id), Call::DescribeOne(eni));
        }
        if failure.subnet_exhausted() {
            if count.cidrs() > 1 && !single {
                if let (Count::Prefixes(several), Some(subnet)) = (count, self.subnet_of(&eni)) {
                    self.no_prefix(&subnet, several, failure);
                }
                let one = if matches!(count, Count::Prefixes(_)) { Count::Prefixes(1) } else { Count::Addresses(1) };
                return self.assign(id, eni, one, true);
            }
            if let Some(subnet) = self.subnet_of(&eni) {
                self.no_room(subnet, count, failure);
            }
            self.growths.remove(&id);
            self.grown_once = true;
            return;
        }
        self.tally(Tally::Error("increaseIPPoolAllocIPAddressesFailed"));
        self.growth_failed(Some(id), &format!("eni {eni}: assign"), Some(failure));
    }

    fn subnet_of(&self, eni: &EniId) -> Option<SubnetId> {
        self.pool.eni(eni).map(|eni| eni.subnet.clone())
    }

    // No free block need not mean no free address.
    fn no_room(&mut self, subnet: SubnetId, asked: Count, failure: &Failure) {
        match asked {
            Count::Prefixes(count) if failure.code == "InsufficientCidrBlocks" => {
                self.no_prefix(&subnet, count, failure);
            }
            _ => self.exhaust(subnet, failure),
        }
    }

    fn created(&mut self, id: GrowthId, interface: &Interface) {
        let Some(mac) = interface.mac else {
            self.set_aside(id);
            return self.growth_failed(Some(id), "CreateNetworkInterface answered without a MAC", None);
        };
        self.log(Level::Info, format!("eni {}: created in {}", interface.id, interface.subnet));
        if let Some(creating) = self.growths.get_mut(&id).and_then(|growth| growth.creating.as_mut()) {
            creating.eni = Some((interface.id.clone(), mac));
        }
        if !interface.v4_prefixes.is_empty() {
            self.prefix_came(&interface.subnet);
        }
        let cidrs = self.cidrs_of(interface);
        self.arrived.extend(cidrs.iter().map(|net| (*net, self.now.mono)));
        self.listed.insert(interface.id.clone(), cidrs);
        self.changed();
        if self.devices.contains_key(&interface.id) {
            // A repeated call: the process before this one has attached it already.
            self.stage(id, Stage::Attached { taken: Set::new(), failure: None });
            return self.ask_ec2(Op::Growth(id), Call::DescribeOne(interface.id.clone()));
        }
        self.send_attach(id, Set::new());
    }

    fn create_failed(&mut self, id: GrowthId, again: bool, failure: &Failure) {
        let elsewhere = matches!(failure.code.as_str(), "InvalidSubnetID.NotFound" | "InvalidParameterValue");
        let creating = self.growths.get(&id).and_then(|growth| growth.creating.as_ref());
        let asked = creating.map(|creating| (creating.subnet.clone(), creating.count));
        if failure.maybe_applied || failure.code.is_empty() || failure.throttled() || failure.internal() {
            // It may exist: only the same call with the same token finds out without making a second one.
            self.set_aside(id);
        } else {
            if again {
                self.suspect_leak();
            }
            self.changed(); // the intent is void
        }
        match asked.filter(|_| failure.subnet_exhausted() || elsewhere) {
            Some((subnet, count)) => {
                self.no_room(subnet, count, failure);
                self.growths.remove(&id);
                self.grown_once = true;
            }
            None => self.growth_failed(Some(id), "create an ENI", Some(failure)),
        }
        let for_people = matches!(failure.limit(), Some(Limit::Region | Limit::Groups));
        if for_people || failure.code == "InvalidGroup.NotFound" {
            // Time does not heal it: somebody must raise a limit or mend the groups (`spec/aws.md` 11.1).
            let until = self.now.mono.plus(FOR_PEOPLE);
            self.timers.entry(Timer::Growth).and_modify(|at| *at = until.max(*at)).or_insert(until);
            self.notice(Regarding::OwnPod, "ENICreationRefused", "ec2:CreateNetworkInterface", &failure.to_string());
        }
        self.tally(Tally::Error("increaseIPPoolAllocENI"));
    }

    fn attach_failed(&mut self, id: GrowthId, mut taken: Set<u32>, failure: Failure) {
        let device = self.growths.get(&id).and_then(|growth| growth.device);
        if failure.code == "InvalidParameterValue" && failure.message.contains("device index") {
            taken.extend(device);
            return self.send_attach(id, taken);
        }
        if failure.limit() == Some(Limit::Instance) {
            self.lower_limit(id);
        }
        let eni = self.new_eni(id);
        self.stage(id, Stage::Attached { taken, failure: Some(failure) });
        if let Some((eni, _)) = eni {
            self.ask_ec2(Op::Growth(id), Call::DescribeOne(eni));
        }
    }

    // The instance takes fewer ENIs than its type's limits say: no further one is made to be refused.
    fn lower_limit(&mut self, id: GrowthId) {
        let Some(card) = self.growths.get(&id).map(|growth| growth.card) else { return };
        let attached = self.attached.values().filter(|eni| eni.card == card).count();
        self.log(Level::Warn, format!("card {card}: EC2 takes no more than {attached} ENIs"));
        let until = self.now.mono.plus(LOWERED);
        self.lowered.insert(card, (attached, until));
        self.wake_for(Timer::Shrink, until);
    }

    fn attach_inspected(&mut self, id: GrowthId, taken: Set<u32>, failure: Option<Failure>, found: Vec<Interface>) {
        let eni = self.new_eni(id).map(|(eni, _)| eni);
        let interface = found.into_iter().find(|interface| Some(&interface.id) == eni.as_ref());
        if let Some(interface) = &interface {
            self.listed.insert(interface.id.clone(), self.cidrs_of(interface));
        }
        match (interface.map(|interface| interface.attachment), failure) {
            (Some(Some(attachment)), _) if attachment.instance == self.config.identity.instance => {
                if let Some(growth) = self.growths.get_mut(&id) {
                    growth.device = Some(attachment.device);
                }
                self.settle(id, attachment.id);
            }
            (Some(None), None) => self.send_attach(id, taken),
            // EC2 is busy, which is no reason to give the ENI back: after the pause it is looked at and attached.
            (Some(None), Some(failure)) if failure.throttled() || failure.status >= 500 => {
                self.set_aside(id);
                self.growth_failed(Some(id), "attach the new ENI", Some(&failure));
            }
            // Not listed may only mean not yet: what becomes of it is found out by deleting it.
            (_, failure) => self.abandon(id, "it cannot be attached", failure.as_ref()),
        }
    }

    // Gives the new ENI back; the intent becomes that of freeing it.
    fn abandon(&mut self, id: GrowthId, why: &str, failure: Option<&Failure>) {
        if let Some((eni, _)) = self.new_eni(id) {
            self.freeing.insert(eni, Free::resumed(None));
        }
        self.changed();
        self.tally(Tally::Error("increaseIPPoolAllocENI"));
        self.growth_failed(Some(id), &format!("attach the new ENI: {why}"), failure);
    }

    fn settle(&mut self, id: GrowthId, attachment: AttachmentId) {
        let (Some((eni, _)), Some(card)) = (self.new_eni(id), self.growths.get(&id).map(Growth::card)) else { return };
        self.log(Level::Info, format!("eni {eni}: attached ({attachment})"));
        let facts = self.facts.entry(eni.clone()).or_default();
        facts.managed = true;
        facts.card = card;
        "interface".clone_into(&mut facts.interface_type);
        facts.attachment = attachment.clone();
        self.changed();
        let call = Call::DeleteOnTermination { eni, attachment: attachment.clone() };
        self.ask_ec2(Op::Modify(id), call);
        let modify = Modify { attachment, tries: 1, done: false, again_at: None };
        let now = self.now.mono;
        self.stage(id, Stage::Settle { since: now, looks: 0, look_at: now, modify });
        self.look(id);
    }

    fn look(&mut self, id: GrowthId) {
        if let Some((_, mac)) = self.new_eni(id) {
            self.ask_imds(Op::Look(id), Query::Eni(mac));
        }
    }

    /// IMDS told about the new ENI, or not yet.
    pub(super) fn look_done(&mut self, id: GrowthId, seen: Option<imds::Eni>) {
        let Some(growth) = self.growths.get_mut(&id) else { return };
        let (Some((eni, _)), Some(wanted)) = (growth.eni(), growth.creating.as_ref().map(|c| c.count.cidrs())) else {
            return;
        };
        let Stage::Settle { since, looks, look_at, modify } = &mut growth.stage else { return };
        let complete = seen.filter(|seen| {
            let carried = seen.ipv4s.len().saturating_sub(1) + seen.v4_prefixes.len();
            let addressed = seen.own_address(self.config.v6).is_some();
            seen.id == eni && addressed && carried >= usize::try_from(wanted).unwrap_or(usize::MAX)
        });
        let Some(mut seen) = complete else {
            let at = self.now.mono.plus(LOOK.pause(*looks, &mut self.random));
            *looks += 1;
            *look_at = at;
            return self.wake_for(Timer::Growing, at);
        };
        let (since, modify) = (*since, modify.clone());
        growth.stage = Stage::SetUp { since, modify };
        // IMDS may still tell the index of an earlier attachment.
        seen.device = growth.device.unwrap_or(seen.device);
        self.attached.insert(seen.id.clone(), seen.clone());
        self.wake_for(Timer::Growing, since.plus(SETTLE_MAX));
        self.place_again();
        if self.wanted.contains_key(&seen.id) {
            self.finish_complete(); // the description of all ENIs was faster
        } else {
            self.want(seen);
        }
    }

    pub(super) fn modify_done(&mut self, id: GrowthId, result: Result<Reply, Failure>) {
        let Some(Stage::Settle { modify, .. } | Stage::SetUp { modify, .. }) =
            self.growths.get_mut(&id).map(|growth| &mut growth.stage)
        else {
            return;
        };
        match result {
            Ok(_) => modify.done = true,
            Err(failure) if modify.tries < MODIFY_TRIES => {
                let pause = MODIFY.pause(modify.tries - 1, &mut self.random);
                let at = self.now.mono.plus(pause);
                modify.tries += 1;
                modify.again_at = Some(at);
                self.wake_for(Timer::Growing, at);
                self.log(Level::Warn, format!("delete the new ENI on termination: {failure}"));
            }
            Err(failure) => {
                modify.done = true;
                let text = format!("the new ENI will outlive the instance, and be found as leaked: {failure}");
                self.log(Level::Error, text);
            }
        }
        self.finish_complete();
    }

    /// Running growths want to go on.
    pub(super) fn growing_timer(&mut self) {
        for id in self.growths.keys().copied().collect::<Vec<_>>() {
            self.growing(id);
        }
    }

    fn growing(&mut self, id: GrowthId) {
        let now = self.now.mono;
        let Some(growth) = self.growths.get_mut(&id) else { return };
        let (since, look_at, modify) = match &mut growth.stage {
            Stage::Settle { since, look_at, modify, .. } => (*since, Some(*look_at), modify),
            Stage::SetUp { since, modify } => (*since, None, modify),
            _ => return,
        };
        let mut next = modify.again_at;
        if modify.again_at.is_some_and(|at| at <= now) {
            (modify.again_at, next) = (None, None);
            let attachment = modify.attachment.clone();
            if let Some((eni, _)) = self.new_eni(id) {
                self.ask_ec2(Op::Modify(id), Call::DeleteOnTermination { eni, attachment });
            }
        }
        let end = since.plus(SETTLE_MAX);
        if now >= end {
            self.changed();
            self.tally(Tally::Error("increaseIPPoolwaitENIAttachedFailed"));
            self.suspect_leak(); // somebody may have detached it
            return self.growth_failed(Some(id), "the new ENI does not show up; it is taken in when it does", None);
        }
        match look_at {
            Some(at) if at <= now => self.look(id),
            at => next = next.into_iter().chain(at).min(),
        }
        self.wake_for(Timer::Growing, next.map_or(end, |at| at.min(end)));
    }

    /// Ends the growths whose new ENI is in the pool and goes with the instance.
    pub(super) fn finish_complete(&mut self) {
        let complete = |growth: &Growth| {
            let modified = matches!(&growth.stage, Stage::SetUp { modify, .. } if modify.done);
            modified && growth.eni().is_some_and(|(eni, _)| self.pool.eni(&eni).is_some())
        };
        let complete = self.growths.iter().filter(|(_, growth)| complete(growth)).map(|(id, _)| *id);
        for id in complete.collect::<Vec<_>>() {
            self.changed();
            self.growth_succeeded(id);
        }
    }

    fn growth_succeeded(&mut self, id: GrowthId) {
        match self.growths.remove(&id).map_or(0, |growth| growth.card) {
            0 => {
                self.timers.remove(&Timer::Growth);
                self.growth_failures = 0;
            }
            card => drop(self.held_up.remove(&card)),
        }
        self.grown_once = true;
        self.acted();
    }

    pub(super) fn growth_failed(&mut self, id: Option<GrowthId>, what: &str, failure: Option<&Failure>) {
        let cause = failure.map(|failure| format!(": {failure}")).unwrap_or_default();
        self.log(Level::Error, format!("grow the pool: {what}{cause}"));
        self.last_failure = Some(format!("{what}{cause}"));
        let growth = id.and_then(|id| self.growths.remove(&id));
        self.grown_once = true;
        if let Some(card) = growth.map(|growth| growth.card).filter(|card| *card > 0) {
            return self.hold_up(card);
        }
        if self.timers.contains_key(&Timer::Growth) {
            return; // several failed together
        }
        let pause = AFTER_FAILURE.pause(self.growth_failures, &mut self.random);
        self.growth_failures = self.growth_failures.saturating_add(1);
        self.set_timer(Timer::Growth, pause);
    }
}

// Addresses of its subnet that an ENI takes besides its own.
fn addresses_of(count: Count) -> u32 {
    match count {
        Count::Prefixes(prefixes) => prefixes.saturating_mul(16),
        Count::Addresses(_) | Count::Ipv6Addresses(_) => count.cidrs(),
    }
}
