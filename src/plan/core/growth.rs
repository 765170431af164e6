//! A larger pool: more addresses on an ENI, or a new ENI (`spec/ipamd.md` 6.6, 6.7; `spec/aws.md` 8).
//!
//! One growth at a time. A new ENI is three calls: create, attach, delete-on-termination; its intent (client token, tags)
//! is durable before the first, so that after a crash the same call with the same token gives the same ENI. Then IMDS must
//! show it and the host must be set up before a pod may have an address of it.

use super::freeing::Free;
use super::{Core, Level, Op, Phase, Tally, Timer, cidrs_of};
use crate::model::checkpoint::Creating;
use crate::model::ec2::{Call, Count, Create, Failure, Interface, Reply, Subnet};
use crate::model::ids::{AttachmentId, EniId, SubnetId};
use crate::model::imds::{self, Query};
use crate::model::net::Mac;
use crate::model::order::{self, Gather as _};
use crate::model::time::Mono;
use crate::plan::backoff::Backoff;
use crate::plan::sizing;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Pauses after a growth that failed for another reason than an exhausted subnet.
const AFTER_FAILURE: Backoff =
    Backoff { first: Duration::from_secs(5), cap: Duration::from_mins(2), jitter_percent: 20 };
/// Pauses between looks at IMDS for a new ENI: an attach takes 1 to 5 s as a rule (`spec/aws.md` 8.5).
const LOOK: Backoff = Backoff { first: Duration::from_millis(100), cap: Duration::from_secs(2), jitter_percent: 15 };
/// Pauses between attempts to set delete-on-termination.
const MODIFY: Backoff = Backoff { first: Duration::from_secs(1), cap: Duration::from_secs(30), jitter_percent: 20 };
/// A new ENI that IMDS or the kernel does not show for so long is left to the reconciliation.
const SETTLE_MAX: Duration = Duration::from_secs(162);
/// How long a subnet without free addresses is left alone (`spec/ipamd.md` 6.1, per subnet by B23).
const EXHAUSTED: Duration = Duration::from_mins(2);
/// How long a list of subnets is good (`spec/aws.md` 8.2).
const SUBNETS_AGE_MAX: Duration = Duration::from_mins(5);
/// Attempts to set delete-on-termination. A working ENI is not given up for a throttled call.
const MODIFY_TRIES: u32 = 5;
/// Device indexes of a card (`spec/aws.md` 7.3).
const DEVICES: u32 = 100;

/// The growth in progress.
#[derive(Debug)]
pub(super) struct Growth {
    stage: Stage,
    creating: Option<Creating>,
}

#[derive(Debug)]
enum Stage {
    /// AssignPrivateIpAddresses is out; `single`: already the second try, with one address.
    Assign { eni: EniId, count: u32, single: bool },
    /// The outcome of an assign is doubtful: what does the ENI have?
    Inspect(EniId),
    /// DescribeSubnets is out.
    Subnets { count: u32 },
    /// The intent is being written down, at this generation.
    Journal(u64),
    /// CreateNetworkInterface is out; `again`: an earlier attempt may have made the ENI already.
    Create { again: bool },
    /// AttachNetworkInterface is out; indexes that turned out to be taken.
    Attach { taken: BTreeSet<u32>, device: u32 },
    /// The attach failed or its outcome is not known: is the ENI attached?
    Attached { taken: BTreeSet<u32>, failure: Option<Failure> },
    /// Attached: waits for IMDS.
    Settle { since: Mono, looks: u32, modify: Modify },
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
}

impl Core {
    pub(super) fn grow(&mut self) {
        self.go_on();
        let allowed = self.config.provisioning && !self.config.v6 && self.phase != Phase::Stopping;
        let informed = self.described.is_some() && self.groups.is_some() && self.scanned && self.vpc_cidrs.is_some();
        let primary = self.pool.eni(&self.config.identity.primary_eni).is_some();
        if self.growth.is_some() || !allowed || !informed || !primary || self.timers.contains_key(&Timer::Growth) {
            return;
        }
        if let Some(creating) = self.resume.pop_front() {
            return self.resume_creating(creating);
        }
        if self.adopting() {
            return; // what is attached already may be enough
        }
        self.exhausted.retain(|_, until| *until > self.now.mono);
        let starved = !self.waiting.is_empty();
        let skip = |id: &EniId| {
            self.pool.eni(id).is_some_and(|eni| self.exhausted.contains_key(&eni.subnet))
                || self.absent.contains_key(&(id.clone(), None))
        };
        match self.sizing().growth(&self.pool, self.now.mono, starved, skip) {
            None => {}
            Some(sizing::Growth::Assign { eni, count }) => {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                self.assign(eni, count, false);
            }
            Some(sizing::Growth::NewEni { count }) => {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                let fresh = self.subnets.as_ref().is_some_and(|(at, _)| self.now.mono.since(*at) < SUBNETS_AGE_MAX);
                if self.config.subnet_discovery && !fresh {
                    self.stage(Stage::Subnets { count }, None);
                    let identity = &self.config.identity;
                    let call = Call::DescribeSubnets { vpc: identity.vpc.clone(), zone: identity.zone.clone() };
                    self.ask_ec2(Op::Growth, call);
                } else {
                    self.create(count);
                }
            }
        }
    }

    // ENIs that are attached but not yet in the pool.
    fn adopting(&self) -> bool {
        self.wanted.keys().any(|id| self.pool.eni(id).is_none())
    }

    fn stage(&mut self, stage: Stage, creating: Option<Creating>) {
        self.growth = Some(Growth { stage, creating });
    }

    fn count(&self, count: u32) -> Count {
        if self.config.prefix_mode { Count::Prefixes(count) } else { Count::Addresses(count) }
    }

    fn assign(&mut self, eni: EniId, count: u32, single: bool) {
        self.log(Level::Info, format!("eni {eni}: assign {count} more"));
        self.stage(Stage::Assign { eni: eni.clone(), count, single }, None);
        let call = Call::Assign { eni, count: self.count(count) };
        self.ask_ec2(Op::Growth, call);
    }

    fn create(&mut self, count: u32) {
        let Some(subnet) = self.choose_subnet() else {
            let Some(until) = self.exhausted.values().min().copied() else {
                return self.growth_failed("create an ENI: no subnet may be used for pods", None);
            };
            self.growth = None;
            self.grown_once = true;
            self.wake_for(Timer::Growth, until); // no use before that
            return;
        };
        let creating = Creating {
            token: self.random.uuid(),
            subnet,
            groups: self.groups.clone().unwrap_or_default(),
            count,
            tags: self.tags(true),
            eni: None,
        };
        let text = format!("create an ENI with {count} CIDRs in {}", creating.subnet);
        self.log(Level::Info, text);
        let generation = self.changed();
        self.stage(Stage::Journal(generation), Some(creating));
    }

    /// Tags of an ENI of ours; `new`: with the time of creation (`spec/aws.md` 7.4).
    pub(super) fn tags(&self, new: bool) -> BTreeMap<String, String> {
        let mut tags = BTreeMap::new();
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

    // Most free addresses first among the subnets that may be used (`spec/aws.md` 8.2).
    fn choose_subnet(&self) -> Option<SubnetId> {
        let primary = &self.config.identity.subnet;
        let open = |id: &SubnetId| !self.exhausted.contains_key(id);
        match &self.subnets {
            Some((_, subnets)) if self.config.subnet_discovery => {
                let mut valid: Vec<&Subnet> = subnets
                    .iter()
                    .filter(|s| open(&s.id) && usable_subnet(s, primary, &self.config.cluster_name))
                    .collect();
                order::sort_by_key(&mut valid, |subnet| std::cmp::Reverse(subnet.free));
                valid.first().map(|subnet| subnet.id.clone())
            }
            _ => Some(primary.clone()).filter(open),
        }
    }

    fn send_create(&mut self, creating: Creating, again: bool) {
        let create = Create {
            subnet: creating.subnet.clone(),
            description: format!("aws-K8S-{}", self.config.identity.instance),
            groups: creating.groups.clone(),
            count: self.count(creating.count),
            conntrack: self.conntrack,
            tags: creating.tags.clone(),
            client_token: creating.token.clone(),
        };
        self.stage(Stage::Create { again }, Some(creating));
        self.ask_ec2(Op::Growth, Call::Create(create));
    }

    fn send_attach(&mut self, taken: BTreeSet<u32>) {
        let Some((eni, _)) = self.new_eni() else { return };
        let used: BTreeSet<u32> = self.attached.values().filter(|e| e.card == 0).map(|e| e.device).gather();
        let Some(device) = (0..DEVICES).find(|device| !used.contains(device) && !taken.contains(device)) else {
            return self.abandon("no device index is free", None);
        };
        let creating = self.growth.take().and_then(|growth| growth.creating);
        self.stage(Stage::Attach { taken, device }, creating);
        let instance = self.config.identity.instance.clone();
        self.ask_ec2(Op::Growth, Call::Attach { eni, instance, device, card: 0 });
    }

    fn new_eni(&self) -> Option<(EniId, Mac)> {
        self.growth.as_ref()?.creating.as_ref()?.eni.clone()
    }

    // A crash came between two calls: the same call again, or a look at how far it went.
    fn resume_creating(&mut self, creating: Creating) {
        match creating.eni.clone() {
            None => {
                self.log(Level::Info, "go on with an ENI that was being created".into());
                self.send_create(creating, true);
            }
            Some((eni, _)) => {
                self.log(Level::Info, format!("eni {eni}: go on with its creation"));
                self.stage(Stage::Attached { taken: BTreeSet::new(), failure: None }, Some(creating));
                self.ask_ec2(Op::Growth, Call::DescribeOne(eni));
            }
        }
    }

    // What the growth waits for besides answers: the disk, time, the host.
    fn go_on(&mut self) {
        let durable = match &self.growth {
            Some(Growth { stage: Stage::Journal(generation), .. }) => self.saver.durable(*generation),
            _ => false,
        };
        if durable && let Some(creating) = self.growth.take().and_then(|growth| growth.creating) {
            self.send_create(creating, false);
        }
    }

    /// The answer to the call of the current stage.
    pub(super) fn growth_done(&mut self, result: Result<Reply, Failure>) {
        let Some(Growth { stage, creating }) = self.growth.take() else { return };
        match (stage, result) {
            (Stage::Assign { eni, count, .. }, Ok(Reply::Assigned(nets))) => self.assigned(&eni, count, &nets),
            (Stage::Assign { eni, count, single }, Err(failure)) => self.assign_failed(eni, count, single, &failure),
            (Stage::Inspect(eni), Ok(Reply::Interfaces(found))) => {
                if let Some(interface) = found.iter().find(|interface| interface.id == eni) {
                    self.sync_cidrs(interface);
                }
                self.growth_succeeded();
            }
            (Stage::Subnets { count }, Ok(Reply::Subnets(subnets))) => {
                self.subnets = Some((self.now.mono, subnets));
                self.create(count);
            }
            (Stage::Subnets { count }, Err(failure)) => {
                // Without leave to look for others, the primary ENI's subnet is the one to use (`spec/aws.md` 8.2).
                self.log(Level::Warn, format!("look for subnets: {failure}; using the primary ENI's"));
                self.subnets = None;
                self.create(count);
            }
            (Stage::Create { .. }, Ok(Reply::Created(interface))) => self.created(creating, &interface),
            (Stage::Create { again }, Err(failure)) => self.create_failed(creating, again, &failure),
            (Stage::Attach { .. }, Ok(Reply::Attached(attachment))) => self.settle(creating, attachment),
            (Stage::Attach { taken, device }, Err(failure)) => self.attach_failed(creating, taken, device, failure),
            (Stage::Attached { taken, failure }, Ok(Reply::Interfaces(found))) => {
                self.attach_inspected(creating, taken, failure, found);
            }
            (stage, Err(failure)) => {
                self.stage_lost(creating);
                self.growth_failed(&format!("{stage:?}"), Some(&failure));
            }
            (stage, Ok(reply)) => {
                self.stage_lost(creating);
                self.growth_failed(&format!("EC2 answered {reply:?} in {stage:?}"), None);
            }
        }
    }

    // A look at how far a creation went failed: it is still in the books, and is tried again after the pause.
    fn stage_lost(&mut self, creating: Option<Creating>) {
        self.resume.extend(creating);
    }

    fn assigned(&mut self, eni: &EniId, asked: u32, nets: &[IpNet]) {
        self.log(Level::Info, format!("eni {eni}: {} of {asked} assigned", nets.len()));
        for net in nets {
            self.unassigned.remove(net);
            self.add_cidr(eni, *net);
        }
        if nets.is_empty() {
            return self.growth_failed(&format!("eni {eni}: EC2 assigned nothing"), None);
        }
        self.growth_succeeded();
    }

    fn assign_failed(&mut self, eni: EniId, count: u32, single: bool, failure: &Failure) {
        let full = failure.code == "PrivateIpAddressLimitExceeded";
        if full || failure.maybe_applied {
            // The store is out of step with EC2: see what the ENI has instead of asking for more.
            self.log(Level::Warn, format!("eni {eni}: {failure}; looking at what it has"));
            self.stage(Stage::Inspect(eni.clone()), None);
            return self.ask_ec2(Op::Growth, Call::DescribeOne(eni));
        }
        if failure.subnet_exhausted() {
            if count > 1 && !single {
                return self.assign(eni, 1, true);
            }
            if let Some(subnet) = self.pool.eni(&eni).map(|eni| eni.subnet.clone()) {
                self.exhaust(subnet, failure);
            }
            self.grown_once = true;
            return;
        }
        self.tally(Tally::Error("increaseIPPoolAllocIPAddressesFailed"));
        self.growth_failed(&format!("eni {eni}: assign"), Some(failure));
    }

    fn exhaust(&mut self, subnet: SubnetId, failure: &Failure) {
        self.log(Level::Warn, format!("subnet {subnet} is left alone for {} s: {failure}", EXHAUSTED.as_secs()));
        let until = self.now.mono.plus(EXHAUSTED);
        self.exhausted.insert(subnet, until);
        self.subnets = None; // its figures of free addresses are out of date
        self.wake_for(Timer::Shrink, until);
    }

    fn created(&mut self, creating: Option<Creating>, interface: &Interface) {
        let (Some(mut creating), Some(mac)) = (creating, interface.mac) else {
            return self.growth_failed("CreateNetworkInterface answered without a MAC", None);
        };
        self.log(Level::Info, format!("eni {}: created in {}", interface.id, interface.subnet));
        creating.eni = Some((interface.id.clone(), mac));
        self.listed.insert(interface.id.clone(), cidrs_of(interface));
        self.changed();
        self.stage(Stage::Create { again: false }, Some(creating));
        self.send_attach(BTreeSet::new());
    }

    fn create_failed(&mut self, creating: Option<Creating>, again: bool, failure: &Failure) {
        let elsewhere = matches!(failure.code.as_str(), "InvalidSubnetID.NotFound" | "InvalidParameterValue");
        let subnet = creating.as_ref().map(|creating| creating.subnet.clone());
        if failure.maybe_applied || failure.code.is_empty() || failure.throttled() || failure.internal() {
            // It may exist: only the same call with the same token finds out without making a second one.
            self.stage_lost(creating);
        } else {
            if again {
                self.suspect_leak();
            }
            self.changed(); // the intent is void
        }
        match subnet.filter(|_| failure.subnet_exhausted() || elsewhere) {
            Some(subnet) => {
                self.exhaust(subnet, failure);
                self.grown_once = true;
            }
            None => self.growth_failed("create an ENI", Some(failure)),
        }
        self.tally(Tally::Error("increaseIPPoolAllocENI"));
    }

    fn attach_failed(&mut self, creating: Option<Creating>, mut taken: BTreeSet<u32>, device: u32, failure: Failure) {
        if failure.code == "InvalidParameterValue" && failure.message.contains("device index") {
            taken.insert(device);
            self.stage(Stage::Create { again: false }, creating);
            return self.send_attach(taken);
        }
        let eni = creating.as_ref().and_then(|creating| creating.eni.as_ref()).map(|(id, _)| id.clone());
        self.stage(Stage::Attached { taken, failure: Some(failure) }, creating);
        if let Some(eni) = eni {
            self.ask_ec2(Op::Growth, Call::DescribeOne(eni));
        }
    }

    fn attach_inspected(
        &mut self,
        creating: Option<Creating>,
        taken: BTreeSet<u32>,
        failure: Option<Failure>,
        found: Vec<Interface>,
    ) {
        let id = creating.as_ref().and_then(|c| c.eni.as_ref()).map(|(id, _)| id.clone());
        let interface = found.into_iter().find(|interface| Some(&interface.id) == id.as_ref());
        match (interface.map(|interface| interface.attachment), failure) {
            (Some(Some(attachment)), _) if attachment.instance == self.config.identity.instance => {
                self.settle(creating, attachment.id);
            }
            (Some(None), None) => {
                self.stage(Stage::Create { again: false }, creating);
                self.send_attach(taken);
            }
            // EC2 is busy, which is no reason to give the ENI back: after the pause it is looked at and attached.
            (Some(None), Some(failure)) if failure.throttled() || failure.status >= 500 => {
                self.stage_lost(creating);
                self.growth_failed("attach the new ENI", Some(&failure));
            }
            // Not listed may only mean not yet: what becomes of it is found out by deleting it.
            (_, failure) => {
                self.stage(Stage::Create { again: false }, creating);
                self.abandon("it cannot be attached", failure.as_ref());
            }
        }
    }

    // Gives the new ENI back; the intent becomes that of freeing it.
    fn abandon(&mut self, why: &str, failure: Option<&Failure>) {
        if let Some((eni, _)) = self.new_eni() {
            self.freeing.insert(eni, Free::resumed(None));
        }
        self.growth = None;
        self.changed();
        self.tally(Tally::Error("increaseIPPoolAllocENI"));
        self.growth_failed(&format!("attach the new ENI: {why}"), failure);
    }

    fn settle(&mut self, creating: Option<Creating>, attachment: AttachmentId) {
        let Some((eni, _)) = creating.as_ref().and_then(|creating| creating.eni.clone()) else { return };
        self.log(Level::Info, format!("eni {eni}: attached ({attachment})"));
        let facts = self.facts.entry(eni.clone()).or_default();
        facts.managed = true;
        "interface".clone_into(&mut facts.interface_type);
        facts.attachment = attachment.clone();
        self.changed();
        let call = Call::DeleteOnTermination { eni, attachment: attachment.clone() };
        self.ask_ec2(Op::Modify, call);
        let modify = Modify { attachment, tries: 1, done: false, again_at: None };
        let stage = Stage::Settle { since: self.now.mono, looks: 0, modify };
        self.stage(stage, creating);
        self.look();
    }

    fn look(&mut self) {
        if let Some((_, mac)) = self.new_eni() {
            self.ask_imds(Op::Look, Query::Eni(mac));
        }
    }

    /// IMDS told about the new ENI, or not yet.
    pub(super) fn look_done(&mut self, seen: Option<imds::Eni>) {
        let Some((eni, _)) = self.new_eni() else { return };
        let wanted = self.growth.as_ref().and_then(|g| g.creating.as_ref()).map_or(0, |creating| creating.count);
        let Some(Growth { stage: Stage::Settle { since, looks, modify, .. }, .. }) = &mut self.growth else { return };
        let complete = seen.filter(|seen| {
            let carried = seen.ipv4s.len().saturating_sub(1) + seen.v4_prefixes.len();
            seen.id == eni && carried >= usize::try_from(wanted).unwrap_or(usize::MAX)
        });
        if let Some(seen) = complete {
            let (since, modify) = (*since, modify.clone());
            if let Some(growth) = &mut self.growth {
                growth.stage = Stage::SetUp { since, modify };
            }
            self.attached.insert(seen.id.clone(), seen.clone());
            self.wake_for(Timer::Growth, since.plus(SETTLE_MAX));
            if self.wanted.contains_key(&seen.id) {
                self.finish_if_complete(); // the description of all ENIs was faster
            } else {
                self.want(seen);
            }
            return;
        }
        let pause = LOOK.pause(*looks, &mut self.random);
        *looks += 1;
        self.wake_for(Timer::Growth, self.now.mono.plus(pause));
    }

    pub(super) fn modify_done(&mut self, result: Result<Reply, Failure>) {
        let Some(Growth { stage: Stage::Settle { modify, .. } | Stage::SetUp { modify, .. }, .. }) = &mut self.growth
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
                self.wake_for(Timer::Growth, at);
                self.log(Level::Warn, format!("delete the new ENI on termination: {failure}"));
            }
            Err(failure) => {
                modify.done = true;
                let text = format!("the new ENI will outlive the instance, and be found as leaked: {failure}");
                self.log(Level::Error, text);
            }
        }
        self.finish_if_complete();
    }

    /// The pause after a failure is over, or the growth in progress wants to go on.
    pub(super) fn growth_timer(&mut self) {
        let now = self.now.mono;
        let Some(growth) = &mut self.growth else { return };
        let (since, settling, modify) = match &mut growth.stage {
            Stage::Settle { since, modify, .. } => (*since, true, modify),
            Stage::SetUp { since, modify } => (*since, false, modify),
            _ => return,
        };
        if modify.again_at.is_some_and(|at| at <= now) {
            modify.again_at = None;
            let attachment = modify.attachment.clone();
            if let Some((eni, _)) = self.new_eni() {
                self.ask_ec2(Op::Modify, Call::DeleteOnTermination { eni, attachment });
            }
        }
        if now.since(since) >= SETTLE_MAX {
            self.growth = None;
            self.changed();
            self.tally(Tally::Error("increaseIPPoolwaitENIAttachedFailed"));
            self.growth_failed("the new ENI does not show up; it is taken in when it does", None);
        } else if settling {
            self.look();
        } else {
            self.wake_for(Timer::Growth, since.plus(SETTLE_MAX));
        }
    }

    /// An ENI entered the pool: perhaps the new one.
    pub(super) fn growth_enrolled(&mut self) {
        self.finish_if_complete();
    }

    fn finish_if_complete(&mut self) {
        let Some((eni, _)) = self.new_eni() else { return };
        let modified = matches!(&self.growth, Some(Growth { stage: Stage::SetUp { modify, .. }, .. }) if modify.done);
        if modified && self.pool.eni(&eni).is_some() {
            self.growth = None;
            self.changed();
            self.growth_succeeded();
        }
    }

    fn growth_succeeded(&mut self) {
        self.growth = None;
        self.timers.remove(&Timer::Growth);
        self.growth_failures = 0;
        self.grown_once = true;
        self.acted();
    }

    fn growth_failed(&mut self, what: &str, failure: Option<&Failure>) {
        let cause = failure.map(|failure| format!(": {failure}")).unwrap_or_default();
        self.log(Level::Error, format!("grow the pool: {what}{cause}"));
        self.growth = None;
        self.grown_once = true;
        let pause = AFTER_FAILURE.pause(self.growth_failures, &mut self.random);
        self.growth_failures = self.growth_failures.saturating_add(1);
        self.set_timer(Timer::Growth, pause);
    }
}

/// Whether new ENIs may be put into a subnet (`spec/aws.md` 8.2 "Valid subnet").
fn usable_subnet(subnet: &Subnet, primary: &SubnetId, cluster: &str) -> bool {
    const CLUSTER_TAG: &str = "cni.networking.k8s.aws/cluster/";
    match subnet.tags.get("kubernetes.io/role/cni").map(String::as_str) {
        Some("0") => false,
        None | Some("") => subnet.id == *primary,
        Some(_) => {
            let mut clusters = subnet.tags.keys().filter_map(|key| key.strip_prefix(CLUSTER_TAG)).peekable();
            cluster.is_empty() || clusters.peek().is_none() || clusters.any(|name| name == cluster)
        }
    }
}
