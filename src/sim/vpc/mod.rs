//! EC2 as a model: subnets, instances, ENIs and what the API does to them, with the errors EC2 gives
//! (`spec/aws.md` 7, 8, 11).
//!
//! Pure and deterministic: no I/O, no clock, the moment is passed in, ids and addresses come from a seed. So the
//! simulator, the HTTP fakes and the topology share it, and a run can be repeated. It is not lenient: what EC2 refuses is
//! refused here.

mod actions;
mod describe;
mod faults;
mod space;
mod trunk;
mod view;

pub use describe::Filter;
pub use faults::{Behaviour, Bucket, Knobs, Planned};
pub use space::{RESERVED, Space};
pub use view::{ImdsEni, Wire};

use crate::model::ec2::{Call, Create, Failure, InstanceType, Interface, Reply};
use crate::model::ids::{AttachmentId, EniId, GroupId, InstanceId, SubnetId, VpcId};
use crate::model::limits;
use crate::model::map::{Map, Set};
use crate::model::net::Mac;
use crate::model::order::Gather as _;
use crate::model::time::{Mono, Now, Wall};
use faults::Lagged;
use ipnet::{Ipv4Net, Ipv6Net};
use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::time::Duration;

/// Entries that the journal keeps; the counts go on.
pub const JOURNAL_LIMIT: usize = 20_000;

/// Security groups that EC2 takes per ENI by default.
pub const GROUPS_PER_ENI: usize = 5;

/// Tags that EC2 takes per resource.
pub const TAGS_PER_RESOURCE: usize = 50;

/// An answer, and how long it takes until it arrives. The effect is there at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The answer. A failure with status 0 stands for silence.
    pub result: Result<Reply, Failure>,
    /// Delay.
    pub after: Duration,
}

/// One call, as the journal remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When.
    pub at: Wall,
    /// The API action.
    pub action: &'static str,
    /// What was asked.
    pub call: String,
    /// EC2's code, or nothing when it went well.
    pub error: Option<String>,
}

/// All calls so far.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    entries: VecDeque<Entry>,
    counts: Map<&'static str, u64>,
    failures: u64,
    throttled: u64,
    counts_only: bool,
}

impl Journal {
    /// The latest entries, at most [`JOURNAL_LIMIT`].
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// Calls per action, failed ones included.
    pub fn counts(&self) -> &Map<&'static str, u64> {
        &self.counts
    }

    /// Calls that failed.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Calls that were throttled; they count as failed too.
    pub fn throttled(&self) -> u64 {
        self.throttled
    }

    fn note(&mut self, at: Wall, action: &'static str, call: impl FnOnce() -> String, failure: Option<&Failure>) {
        *self.counts.entry(action).or_default() += 1;
        self.failures += u64::from(failure.is_some());
        self.throttled += u64::from(failure.is_some_and(Failure::throttled));
        if self.counts_only {
            return;
        }
        if self.entries.len() == JOURNAL_LIMIT {
            self.entries.pop_front();
        }
        let error = failure.map(|failure| match failure.code.as_str() {
            "" => "no answer".to_owned(),
            code => code.to_owned(),
        });
        self.entries.push_back(Entry { at, action, call: call(), error });
    }
}

#[derive(Clone, Debug)]
struct SubnetState {
    zone: String,
    space: Space,
    v6: Option<Ipv6Net>,
    v6_given: u64, // IPv6 addresses and prefixes are never reused: a /64 lasts
    tags: Map<String, String>,
}

#[derive(Clone, Debug)]
struct Instance {
    kind: InstanceType,
    zone: String,
    primary: EniId,
    seen: Lagged<Vec<ImdsEni>>,
    enis: Set<EniId>,      // attached in truth
    described: Set<EniId>, // attached to it in anything that Describe tells or will tell; may hold more
}

impl Instance {
    fn enis_on(&self, card: u32) -> Option<u32> {
        self.kind.cards.iter().find(|(index, _)| *index == card).map(|(_, enis)| *enis)
    }
}

#[derive(Clone, Debug)]
struct EniState {
    interface: Interface,
    attached_at: Option<Mono>,
    detached_at: Option<Mono>, // a detach is under way until then
}

/// A VPC with everything in it.
///
/// The `BTreeMap`s are those with something for every ENI of thousands of nodes, which comes in random order.
#[derive(Clone, Debug)]
pub struct Vpc {
    id: VpcId,
    region: String,
    cidrs: Vec<Ipv4Net>,
    subnets: Map<SubnetId, SubnetState>,
    groups: Set<GroupId>,
    default_group: GroupId,
    instances: BTreeMap<InstanceId, Instance>,
    types: Map<String, InstanceType>,
    enis: BTreeMap<EniId, EniState>,
    attachments: BTreeMap<AttachmentId, EniId>,
    detaching: Set<(Mono, EniId)>,
    described: BTreeMap<EniId, Lagged<Option<Interface>>>,
    loose: Set<EniId>, // detached in anything that Describe tells or will tell; may hold more
    vanishing: Set<(Mono, EniId)>, // deleted, and told of until then
    tokens: BTreeMap<String, (Create, EniId)>,
    branches: Map<EniId, (EniId, u16)>, // branch ENI: its trunk and VLAN
    touched: Set<EniId>,
    touched_instances: Set<InstanceId>,
    journal: Journal,
    seed: u64,
    serial: u64,
    eni_quota: usize,
    /// How EC2 misbehaves.
    pub knobs: Knobs,
}

/// What EC2 refuses, before it becomes a [`Failure`].
#[derive(Clone, Debug, PartialEq, Eq)]
struct Refusal {
    code: &'static str,
    message: String,
}

fn refuse<T>(code: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { code, message: message.into() })
}

// A bijective scrambler (splitmix64's finaliser), so that successive ids do not look alike.
fn scramble(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Vpc {
    /// An empty VPC. `seed` decides ids and addresses.
    pub fn new(region: &str, cidrs: Vec<Ipv4Net>, seed: u64) -> Vpc {
        let mut vpc = Vpc {
            id: VpcId::default(),
            region: region.to_owned(),
            cidrs,
            subnets: Map::new(),
            groups: Set::new(),
            default_group: GroupId::default(),
            instances: BTreeMap::new(),
            types: Map::new(),
            enis: BTreeMap::new(),
            attachments: BTreeMap::new(),
            detaching: Set::new(),
            described: BTreeMap::new(),
            loose: Set::new(),
            vanishing: Set::new(),
            tokens: BTreeMap::new(),
            branches: Map::new(),
            touched: Set::new(),
            touched_instances: Set::new(),
            journal: Journal::default(),
            seed,
            serial: 0,
            eni_quota: 5000,
            knobs: Knobs::default(),
        };
        vpc.id = VpcId(vpc.new_id("vpc"));
        vpc.default_group = vpc.add_group();
        vpc
    }

    fn dice(&mut self) -> u64 {
        self.serial += 1;
        scramble(self.seed ^ scramble(self.serial))
    }

    fn new_id(&mut self, kind: &str) -> String {
        let (high, low) = (self.dice(), self.serial & 0xffff);
        format!("{kind}-0{:012x}{low:04x}", high >> 16)
    }

    /// The VPC's id.
    pub fn id(&self) -> &VpcId {
        &self.id
    }

    /// The region.
    pub fn region(&self) -> &str {
        &self.region
    }

    /// IPv4 CIDRs of the VPC.
    pub fn cidrs(&self) -> &[Ipv4Net] {
        &self.cidrs
    }

    /// Somebody has associated other IPv4 CIDRs with the VPC; subnets stay.
    pub fn set_cidrs(&mut self, cidrs: Vec<Ipv4Net>) {
        self.cidrs = cidrs;
    }

    /// Adds a security group.
    pub fn add_group(&mut self) -> GroupId {
        let id = GroupId(self.new_id("sg"));
        self.groups.insert(id.clone());
        id
    }

    /// Adds a subnet. The caller keeps CIDRs inside the VPC and apart.
    pub fn add_subnet(&mut self, zone: &str, cidr: Ipv4Net, v6: Option<Ipv6Net>, tags: &[(&str, &str)]) -> SubnetId {
        let id = SubnetId(self.new_id("subnet"));
        let tags = tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).gather();
        let subnet = SubnetState { zone: zone.to_owned(), space: Space::new(cidr), v6, v6_given: 0, tags };
        self.subnets.insert(id.clone(), subnet);
        id
    }

    /// Makes a type known that the built-in table lacks, or changes one.
    pub fn add_type(&mut self, kind: InstanceType) {
        self.types.insert(kind.name.clone(), kind);
    }

    /// All subnets.
    pub fn subnets(&self) -> Vec<SubnetId> {
        self.subnets.keys().cloned().collect()
    }

    /// Whether a subnet has room for a prefix (/28).
    pub fn takes_prefix(&self, subnet: &SubnetId) -> bool {
        self.subnets.get(subnet).is_some_and(|subnet| subnet.space.free_blocks() > 0)
    }

    /// The CIDR of a subnet.
    pub fn subnet_cidr(&self, subnet: &SubnetId) -> Option<Ipv4Net> {
        self.subnets.get(subnet).map(|subnet| subnet.space.cidr())
    }

    /// Takes an address out of the subnet that holds it, for a host that is no instance of ours. False if it is taken.
    pub fn reserve(&mut self, addr: Ipv4Addr) -> bool {
        self.subnets.values_mut().any(|subnet| subnet.space.reserve(addr))
    }

    /// Gives back what [`Vpc::reserve`] took.
    pub fn unreserve(&mut self, addr: Ipv4Addr) {
        if let Some(subnet) = self.subnets.values_mut().find(|subnet| subnet.space.cidr().contains(&addr)) {
            subnet.space.release(addr);
        }
    }

    /// Changes a tag of a subnet, or takes it away.
    pub fn tag_subnet(&mut self, subnet: &SubnetId, key: &str, value: Option<&str>) {
        let Some(subnet) = self.subnets.get_mut(subnet) else { return };
        match value {
            Some(value) => drop(subnet.tags.insert(key.to_owned(), value.to_owned())),
            None => drop(subnet.tags.remove(key)),
        }
    }

    /// Starts an instance with its primary ENI. Fails like RunInstances.
    pub fn launch(
        &mut self,
        now: Now,
        kind: &str,
        subnet: &SubnetId,
        groups: &[GroupId],
    ) -> Result<InstanceId, Failure> {
        let result = self.launch_inner(now.mono, kind, subnet, groups);
        self.publish(now);
        result.map_err(|refusal| self.failure("RunInstances", refusal))
    }

    fn launch_inner(
        &mut self,
        now: Mono,
        kind: &str,
        subnet: &SubnetId,
        groups: &[GroupId],
    ) -> Result<InstanceId, Refusal> {
        let Some(kind) = self.instance_type(kind) else {
            return refuse("InvalidInstanceType", format!("The instance type '{kind}' does not exist"));
        };
        let id = InstanceId(self.new_id("i"));
        let Some(zone) = self.subnets.get(subnet).map(|subnet| subnet.zone.clone()) else {
            return refuse("InvalidSubnetID.NotFound", format!("The subnet ID '{subnet}' does not exist"));
        };
        let primary = self.new_interface(subnet, "", groups, &Map::new())?;
        let (primary_eni, seen) = (primary.clone(), Lagged::default());
        let (enis, described) = (Set::new(), Set::new());
        let instance = Instance { kind, zone, primary: primary_eni, seen, enis, described };
        self.instances.insert(id.clone(), instance);
        self.bind(now, &primary, &id, (0, 0), true);
        Ok(id)
    }

    /// What EC2 knows of a type: what was added here, else the built-in table.
    pub fn instance_type(&self, name: &str) -> Option<InstanceType> {
        if let Some(kind) = self.types.get(name) {
            return Some(kind.clone());
        }
        let limits = limits::of(name)?;
        let hypervisor = match limits.hypervisor {
            limits::Hypervisor::Nitro => "nitro",
            limits::Hypervisor::Xen => "xen",
            limits::Hypervisor::Unknown => "unknown",
        };
        Some(InstanceType {
            name: name.to_owned(),
            hypervisor: hypervisor.to_owned(),
            bare_metal: limits.bare_metal,
            ipv4_per_eni: limits.ipv4_per_eni,
            default_card: 0,
            cards: (0..).zip(limits.cards).collect(),
        })
    }

    /// An ENI without attachment, as another tool or a dead node would leave it.
    pub fn add_interface(
        &mut self,
        now: Now,
        subnet: &SubnetId,
        description: &str,
        tags: &Map<String, String>,
    ) -> Result<EniId, Failure> {
        let result = self.new_interface(subnet, description, &[], tags);
        self.publish(now);
        result.map_err(|refusal| self.failure("CreateNetworkInterface", refusal))
    }

    /// Changes an ENI as somebody else would: its kind, tags, addresses. Addresses that it loses stay taken in the subnet.
    pub fn meddle(&mut self, now: Now, eni: &EniId, change: impl FnOnce(&mut Interface)) {
        if let Some(state) = self.enis.get_mut(eni) {
            change(&mut state.interface);
            self.touched.insert(eni.clone());
        }
        self.publish(now);
    }

    /// All calls so far.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Forgets all calls so far: what was done to prepare a run is no part of it.
    pub fn forget_calls(&mut self) {
        self.journal = Journal { counts_only: self.journal.counts_only, ..Journal::default() };
    }

    /// From now on the journal only counts: a run with millions of calls has no use for their texts.
    pub fn count_only(&mut self) {
        self.journal.counts_only = true;
    }

    /// Addresses that are taken in all subnets, and ENIs, attached or not.
    pub fn held(&self) -> (usize, usize) {
        (self.subnets.values().map(|subnet| subnet.space.taken() as usize).sum(), self.enis.len())
    }

    /// Free addresses of a subnet.
    pub fn free(&self, subnet: &SubnetId) -> Option<u32> {
        self.subnets.get(subnet).map(|subnet| subnet.space.free())
    }

    /// The truth about all ENIs, whatever Describe tells.
    pub fn interfaces(&self) -> impl Iterator<Item = &Interface> {
        self.enis.values().map(|eni| &eni.interface)
    }

    /// The truth about the ENIs attached to an instance, those being detached included.
    pub fn attached_to(&self, instance: &InstanceId) -> impl Iterator<Item = &Interface> {
        let ids = self.instances.get(instance).into_iter().flat_map(|host| &host.enis);
        ids.filter_map(|id| self.enis.get(id)).map(|eni| &eni.interface)
    }

    /// The truth about one ENI.
    pub fn interface(&self, eni: &EniId) -> Option<&Interface> {
        self.enis.get(eni).map(|eni| &eni.interface)
    }

    /// The ENI of an attachment.
    pub fn attachment(&self, attachment: &AttachmentId) -> Option<&EniId> {
        self.attachments.get(attachment)
    }

    /// How many ENIs the account may have (EC2's default is 5000 per region).
    pub fn set_eni_quota(&mut self, quota: usize) {
        self.eni_quota = quota;
    }

    /// Carries out a call.
    pub fn execute(&mut self, now: Now, call: &Call) -> Outcome {
        let outcome = self.perform(now, call.action(), || format!("{call:?}"), |vpc| vpc.act(now, call));
        self.publish(now);
        outcome
    }

    /// DescribeNetworkInterfaces with any ids and filters, as they come over the wire.
    pub fn describe(&mut self, now: Now, ids: &[EniId], filters: &[Filter]) -> Outcome {
        let text = || format!("{ids:?} {filters:?}");
        self.perform(now, "DescribeNetworkInterfaces", text, |vpc| vpc.list(now, ids, filters).map(Reply::Interfaces))
    }

    /// Lets time pass: detaches that were under way come to an end.
    pub fn settle(&mut self, now: Now) {
        self.finish_detaches(now.mono);
        self.publish(now);
    }

    fn perform(
        &mut self,
        now: Now,
        action: &'static str,
        call: impl FnOnce() -> String,
        work: impl FnOnce(&mut Vpc) -> Result<Reply, Refusal>,
    ) -> Outcome {
        self.settle(now);
        let (after, planned) = self.knobs.meet(action, now.mono);
        let result = match planned {
            None => work(self).map_err(|refusal| self.failure(action, refusal)),
            Some(Planned::Refused { code, message, status }) => {
                let request_id = self.request_id();
                Err(Failure { action, code, message, status, request_id, maybe_applied: false })
            }
            Some(Planned::AnswerLost) => {
                // Whether it went well is what nobody learns.
                let _ = work(self);
                Err(silence(action))
            }
            Some(Planned::RequestLost) => Err(silence(action)),
        };
        self.journal.note(now.wall, action, call, result.as_ref().err());
        Outcome { result, after }
    }

    /// What happens to a request to IMDS; it is planned under the name `IMDS`.
    pub fn meet_imds(&mut self, now: Now) -> (Duration, Option<Planned>) {
        self.knobs.meet("IMDS", now.mono)
    }

    /// A fresh request id; none as long as calls are only counted.
    pub fn request_id(&mut self) -> String {
        let (high, low) = (self.dice(), self.dice());
        if self.journal.counts_only {
            return String::new(); // millions of refusals whose ids nobody reads
        }
        format!(
            "{:08x}-{:04x}-4{:03x}-a{:03x}-{:012x}",
            high >> 32,
            (high >> 16) & 0xffff,
            high & 0xfff,
            low >> 52,
            low & 0xffff_ffff_ffff
        )
    }

    fn failure(&mut self, action: &'static str, refusal: Refusal) -> Failure {
        let status = match refusal.code {
            "UnauthorizedOperation" => 403,
            "AuthFailure" => 401,
            "RequestLimitExceeded" | "Unavailable" => 503,
            "InternalError" => 500,
            _ => 400,
        };
        Failure {
            action,
            code: refusal.code.to_owned(),
            message: refusal.message,
            status,
            request_id: self.request_id(),
            maybe_applied: false,
        }
    }

    fn new_mac(&mut self) -> Mac {
        let (dice, serial) = (self.dice(), self.serial);
        let mut mac = [0x02; 6];
        mac[1..4].copy_from_slice(&dice.to_be_bytes()[..3]);
        mac[4..].copy_from_slice(&serial.to_be_bytes()[6..]);
        // 02: locally administered, as EC2's are; the serial at the end keeps them apart.
        Mac(mac)
    }

    fn new_attachment(&mut self) -> AttachmentId {
        AttachmentId(self.new_id("eni-attach"))
    }
}

fn silence(action: &'static str) -> Failure {
    Failure {
        action,
        code: String::new(),
        message: "no answer".into(),
        status: 0,
        request_id: String::new(),
        maybe_applied: true,
    }
}

#[cfg(test)]
mod tests;
