//! The original's pool algorithm, to compare with: `spec/ipamd.md` 2.3 and 6 to 9 without the lines marked BETTER, in IPv4
//! on the first network card.
//!
//! One thread does everything in turn: a pool step, 2.5 s, a reconciliation, 2.5 s. At most one ENI is touched in a step,
//! and every call, wait and back-off holds the thread up. An ADD takes what is there or fails at once. It speaks the
//! core's vocabulary, so that the same node runs it. What it does not do: write a checkpoint (the comparison is about EC2)
//! and DescribeInstances before each attach, which is one call less than the original needs.

use crate::model::ec2::{Call, Count, Create, Failure, Interface, Reply};
use crate::model::ids::{AttachmentId, EniId, GroupId, PodKey, SubnetId};
use crate::model::imds::{self, Query};
use crate::model::map::{Map, Set};
use crate::model::order::{self, Gather as _};
use crate::model::time::{Mono, Now};
use crate::model::wire::{AddNetworkReply, DelNetworkReply, IpAllocation, UNKNOWN_POD};
use crate::plan::backoff::{Backoff, Random};
use crate::plan::core::{Answer, Config, Effect, Event, OpId};
use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// Half of the pool loop (6.1).
const HALF: Duration = Duration::from_millis(2500);
/// Between two decreases (6.1).
const DECREASE: Duration = Duration::from_secs(30);
/// Reconciliation after this long without a pool action, and the cooldown of a freed CIDR (6.1).
const RECONCILE: Duration = Duration::from_mins(1);
/// No growth after the subnet was exhausted (6.1).
const EXHAUSTED: Duration = Duration::from_mins(2);
/// An ENI younger than this stays (6.1).
const ENI_AGE: Duration = Duration::from_mins(1);
const PREFIX: usize = 16;
/// Back-offs of 15: wait for IMDS, detach, delete; 12 tries each.
const WAIT: Backoff = Backoff { first: Duration::from_millis(100), cap: Duration::from_mins(1), jitter_percent: 15 };
const DETACH: Backoff = Backoff { first: Duration::from_millis(200), cap: Duration::from_mins(1), jitter_percent: 15 };
const DELETE: Backoff = Backoff { first: Duration::from_millis(500), cap: Duration::from_mins(1), jitter_percent: 15 };
const TRIES: u32 = 12;

#[derive(Debug, Default)]
struct Slot {
    owner: Option<PodKey>,
    freed: Option<Mono>,
}

#[derive(Debug)]
struct Eni {
    device: u32,
    primary: bool,
    own: Ipv4Addr,
    added: Mono,
    cidrs: Map<IpNet, Map<IpAddr, Slot>>,
}

/// T, A, P and F of 6.2.
#[derive(Clone, Copy, Debug, Default)]
struct Stats {
    total: usize,
    assigned: usize,
    prefixes: usize,
    free_prefixes: usize,
}

#[derive(Debug)]
enum Doing {
    Nothing,
    BootDescribe,
    BootScan(Vec<EniId>),
    BootTags(Vec<EniId>),
    BootCheck(usize),
    BootGroups,
    Sleep(Next),
    Assign { eni: EniId, want: u32, single: bool },
    Inspect(EniId),
    Subnets(u32),
    Create { count: u32, rest: Vec<SubnetId> },
    Attach(EniId),
    Modify(EniId, u32),
    Wait { eni: EniId, count: u32, tries: u32, asked: bool },
    Check,
    Unassign(Vec<(EniId, Vec<IpNet>)>),
    Look(EniId),
    Detach { eni: EniId, attachment: AttachmentId, tries: u32 },
    Delete { eni: EniId, tries: u32 },
    Reconcile,
    Adopt(Vec<imds::Eni>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Pool,
    Reconcile,
    /// Go on with what is being done.
    Again,
}

/// The original's daemon.
#[derive(Debug)]
pub struct Original {
    config: Config,
    random: Random,
    now: Now,
    out: Vec<Effect>,
    enis: Map<EniId, Eni>,
    index: Map<PodKey, (EniId, IpNet, IpAddr)>,
    groups: Vec<GroupId>,
    doing: Doing,
    paused: Option<Doing>,
    op: OpId,
    ready: bool,
    exhausted: Option<Mono>,
    decreased: Option<Mono>,
    acted: Option<Mono>,
    freed: Map<IpNet, Mono>,
    foreign: Set<EniId>,
    figures: Option<Stats>,
}

impl Original {
    /// A daemon that knows nothing yet.
    pub fn new(config: &Config) -> Original {
        Original {
            random: Random::new(config.seed),
            config: config.clone(),
            now: Now::default(),
            out: Vec::new(),
            enis: Map::new(),
            index: Map::new(),
            groups: Vec::new(),
            doing: Doing::BootDescribe,
            paused: None,
            op: 0,
            ready: false,
            exhausted: None,
            decreased: None,
            acted: None,
            freed: Map::new(),
            foreign: Set::new(),
            figures: None,
        }
    }

    /// Takes one event and says what is to be done.
    pub fn step(&mut self, now: Now, event: Event) -> Vec<Effect> {
        self.now = now;
        match event {
            Event::Started { .. } => {
                self.ask_imds(Query::SecurityGroups);
                self.doing = Doing::BootDescribe;
            }
            Event::Add(call, request) => {
                let key =
                    PodKey { network: request.network_name, container: request.container_id, ifname: request.if_name };
                let answer = self.add(&key);
                self.out.push(Effect::Reply(call, answer));
            }
            Event::Del(call, request) => {
                let key =
                    PodKey { network: request.network_name, container: request.container_id, ifname: request.if_name };
                let answer = self.del(&key);
                self.out.push(Effect::Reply(call, answer));
            }
            Event::Imds(op, result) if op == self.op => self.told(result),
            Event::Ec2(op, result) if op == self.op => self.answered(result),
            Event::Tick => self.woken(),
            _ => {}
        }
        std::mem::take(&mut self.out)
    }

    fn ask_imds(&mut self, query: Query) {
        self.op += 1;
        self.out.push(Effect::Imds(self.op, query));
    }

    fn call(&mut self, doing: Doing, call: Call) {
        self.op += 1;
        self.doing = doing;
        self.out.push(Effect::Ec2(self.op, call));
    }

    fn sleep(&mut self, time: Duration, next: Next) {
        self.doing = Doing::Sleep(next);
        self.out.push(Effect::WakeAt(self.now.mono.plus(time)));
    }

    // Goes on with `doing` after a pause.
    fn pause(&mut self, time: Duration, doing: Doing) {
        self.paused = Some(doing);
        self.sleep(time, Next::Again);
    }

    fn add(&mut self, key: &PodKey) -> Answer {
        let (now, cooldown) = (self.now.mono, self.config.tunables.ip_cooldown);
        if !self.index.contains_key(key)
            && let Some((eni, net, address)) = self.choose(now, cooldown)
        {
            if let Some(slots) = self.enis.get_mut(&eni).and_then(|e| e.cidrs.get_mut(&net)) {
                slots.insert(address, Slot { owner: Some(key.clone()), freed: None });
            }
            self.index.insert(key.clone(), (eni, net, address));
            self.figures = None;
        }
        let mut reply = AddNetworkReply::default();
        if let Some((_, _, address)) = self.index.get(key) {
            reply.success = true;
            reply.allocations = vec![IpAllocation { ipv4: address.to_string(), ..IpAllocation::default() }];
        } else {
            reply.failure = "no available IP/Prefix addresses".into();
        }
        Answer::Add(reply)
    }

    // 4.2: the ids of ENIs are as good as a random order.
    fn choose(&self, now: Mono, cooldown: Duration) -> Option<(EniId, IpNet, IpAddr)> {
        for (id, eni) in &self.enis {
            for (net, slots) in eni.cidrs.iter().filter(|(net, _)| self.current(net)) {
                let rested =
                    |slot: &Slot| slot.owner.is_none() && slot.freed.is_some_and(|at| now.since(at) > cooldown);
                let known = slots.iter().find(|(_, slot)| rested(slot)).map(|(address, _)| *address);
                let IpAddr::V4(base) = net.network() else { continue };
                let size = 1u32 << (32 - net.prefix_len()).min(4);
                let fresh = || {
                    let all = (0..size).map(|n| IpAddr::V4(Ipv4Addr::from(u32::from(base).wrapping_add(n))));
                    all.into_iter().find(|address| !slots.contains_key(address))
                };
                if let Some(address) = known.or_else(fresh) {
                    return Some((id.clone(), *net, address));
                }
            }
        }
        None
    }

    fn current(&self, net: &IpNet) -> bool {
        (net.prefix_len() < net.max_prefix_len()) == self.config.prefix_mode
    }

    fn del(&mut self, key: &PodKey) -> Answer {
        let Some((eni, net, address)) = self.index.remove(key) else { return Answer::Error(UNKNOWN_POD.into()) };
        self.figures = None;
        if let Some(slots) = self.enis.get_mut(&eni).and_then(|eni| eni.cidrs.get_mut(&net)) {
            slots.insert(address, Slot { owner: None, freed: Some(self.now.mono) });
        }
        let allocations = vec![IpAllocation { ipv4: address.to_string(), ..IpAllocation::default() }];
        Answer::Del(DelNetworkReply { success: true, allocations, ..DelNetworkReply::default() })
    }

    // The figures of all ENIs; `self.figures` is emptied by whatever changes the pool, since most looks find it as it was.
    fn total(&mut self) -> Stats {
        let figures = self.figures.unwrap_or_else(|| self.stats(None));
        self.figures = Some(figures);
        figures
    }

    fn stats(&self, without: Option<&EniId>) -> Stats {
        let mut stats = Stats::default();
        for (_, eni) in self.enis.iter().filter(|(id, _)| Some(*id) != without) {
            for (net, slots) in eni.cidrs.iter().filter(|(net, _)| self.current(net)) {
                let assigned = slots.values().filter(|slot| slot.owner.is_some()).count();
                let prefix = net.prefix_len() < net.max_prefix_len();
                stats.total += if prefix { PREFIX } else { 1 };
                stats.assigned += assigned;
                stats.prefixes += usize::from(prefix);
                stats.free_prefixes += usize::from(prefix && assigned == 0);
            }
        }
        stats
    }

    // 6.3: missing and surplus CIDRs, if an IP target is set.
    fn deviation(&self, stats: &Stats) -> Option<(usize, usize)> {
        let targets = self.config.tunables.targets;
        let (warm, minimum) = (targets.warm_ip, targets.minimum_ip);
        if warm == 0 && minimum == 0 {
            return None;
        }
        let free = stats.total - stats.assigned;
        let short = warm.saturating_sub(free).max(minimum.saturating_sub(stats.total));
        let over = free.saturating_sub(warm).min(stats.total.saturating_sub(minimum));
        if !self.config.prefix_mode {
            return Some((short, over));
        }
        let need_warm = (stats.assigned + warm).div_ceil(PREFIX);
        let over = stats.free_prefixes.min(stats.prefixes.saturating_sub(need_warm));
        Some((short.div_ceil(PREFIX), over.min(stats.prefixes.saturating_sub(minimum.div_ceil(PREFIX)))))
    }

    fn too_low(&self, stats: &Stats) -> bool {
        if stats.total >= self.config.max_pods {
            return false;
        }
        if let Some((short, _)) = self.deviation(stats) {
            return short > 0;
        }
        let targets = self.config.tunables.targets;
        let (n, unit) =
            if self.config.prefix_mode { (targets.warm_prefix, PREFIX) } else { (targets.warm_eni, self.config.slots) };
        let free = stats.total - stats.assigned;
        free < unit * n || (n == 0 && free == 0)
    }

    // 6.6 "CIDRs wanted".
    fn wanted(&self, stats: &Stats) -> usize {
        match (self.deviation(stats), self.config.prefix_mode) {
            (Some((short, _)), true) => short.max(1),
            (Some((short, _)), false) => short,
            (None, true) => self.config.tunables.targets.warm_prefix.saturating_sub(stats.free_prefixes).max(1),
            (None, false) => self.config.slots,
        }
    }

    fn pool_step(&mut self) {
        let stats = self.total();
        if self.too_low(&stats) {
            return self.increase(&stats);
        }
        let over = match (self.deviation(&stats), self.config.prefix_mode) {
            (Some((_, over)), _) => over,
            (None, true) => stats.free_prefixes.saturating_sub(self.config.tunables.targets.warm_prefix),
            (None, false) => 0,
        };
        if over > 0 && self.decreased.is_none_or(|at| self.now.mono.since(at) > DECREASE) {
            return self.decrease(over);
        }
        self.remove_extra();
    }

    fn increase(&mut self, stats: &Stats) {
        if self.exhausted.is_some_and(|at| self.now.mono.since(at) <= EXHAUSTED) {
            return self.remove_extra();
        }
        let want = self.wanted(stats);
        let room = |eni: &Eni| self.config.slots.saturating_sub(eni.cidrs.len());
        let candidate = self.enis.iter().find(|(_, eni)| room(eni) > 0).map(|(id, eni)| (id.clone(), room(eni)));
        match candidate {
            Some((eni, room)) if want > 0 => self.assign(eni, small(room.min(want)), false),
            _ => self.allocate(small(want.min(self.config.slots))),
        }
    }

    fn count(&self, count: u32) -> Count {
        if self.config.prefix_mode { Count::Prefixes(count) } else { Count::Addresses(count) }
    }

    fn assign(&mut self, eni: EniId, want: u32, single: bool) {
        let call = Call::Assign { eni: eni.clone(), count: self.count(want) };
        self.call(Doing::Assign { eni, want, single }, call);
    }

    // 6.7, if there is room (6.8).
    fn allocate(&mut self, count: u32) {
        let limit = self.config.cards.get(&0).copied().unwrap_or(0).saturating_sub(self.foreign.len());
        if count == 0 || self.enis.len() >= limit {
            return self.remove_extra();
        }
        let identity = &self.config.identity;
        if self.config.subnet_discovery {
            let call = Call::DescribeSubnets { vpc: identity.vpc.clone(), zone: identity.zone.clone() };
            return self.call(Doing::Subnets(count), call);
        }
        let primary = identity.subnet.clone();
        self.create(count, vec![primary]);
    }

    fn create(&mut self, count: u32, mut subnets: Vec<SubnetId>) {
        if subnets.is_empty() {
            return self.remove_extra();
        }
        let subnet = subnets.remove(0);
        let instance = self.config.identity.instance.clone();
        let tags = [
            ("node.k8s.amazonaws.com/createdAt".to_owned(), self.now.wall.to_string()),
            ("node.k8s.amazonaws.com/instance_id".to_owned(), instance.0.clone()),
        ];
        let create = Create {
            subnet,
            description: format!("aws-K8S-{instance}"),
            groups: self.groups.clone(),
            count: self.count(count),
            conntrack: crate::model::ec2::ConntrackTimeouts::default(),
            tags: tags.into_iter().gather(),
            client_token: self.random.uuid(),
        };
        self.call(Doing::Create { count, rest: subnets }, Call::Create(create));
    }

    // 6.9 "CIDRs".
    fn decrease(&mut self, over: usize) {
        let mut left = over;
        self.figures = None;
        let mut gone = Vec::new();
        for (id, eni) in &mut self.enis {
            let idle = |slots: &Map<IpAddr, Slot>| slots.values().all(|slot| slot.owner.is_none());
            let nets: Vec<IpNet> = eni.cidrs.iter().filter(|(_, s)| idle(s)).map(|(net, _)| *net).take(left).collect();
            left -= nets.len();
            for net in &nets {
                eni.cidrs.remove(net);
                self.freed.insert(*net, self.now.mono);
            }
            if !nets.is_empty() {
                gone.push((id.clone(), nets));
            }
        }
        self.decreased = Some(self.now.mono);
        self.acted = Some(self.now.mono);
        self.unassign(gone);
    }

    fn unassign(&mut self, mut gone: Vec<(EniId, Vec<IpNet>)>) {
        let Some((eni, nets)) = gone.pop() else { return self.remove_extra() };
        let (mut addresses, mut prefixes) = (Vec::new(), Vec::new());
        for net in nets {
            match net {
                IpNet::V4(net) if net.prefix_len() < 32 => prefixes.push(net),
                IpNet::V4(net) => addresses.push(net.addr()),
                IpNet::V6(_) => {}
            }
        }
        let call = if prefixes.is_empty() {
            Call::UnassignAddresses { eni, addresses }
        } else {
            Call::UnassignPrefixes { eni, prefixes }
        };
        self.call(Doing::Unassign(gone), call);
    }

    // 6.9 "remove-extra" and "Free one ENI".
    fn remove_extra(&mut self) {
        let (stats, targets) = (self.total(), self.config.tunables.targets);
        let free = stats.total - stats.assigned;
        let per_eni = self.config.slots * if self.config.prefix_mode { PREFIX } else { 1 };
        let n = 1 + if self.config.prefix_mode { targets.warm_prefix } else { targets.warm_eni };
        let pods = |eni: &Eni| eni.cidrs.values().flat_map(Map::values).any(|slot| slot.owner.is_some());
        let idle = self.config.prefix_mode && self.enis.values().any(|eni| !eni.primary && !pods(eni));
        let defined = targets.warm_ip > 0 || targets.minimum_ip > 0;
        let spare = if defined || free >= n * per_eni || idle { self.spare() } else { None };
        match spare {
            Some(eni) => {
                self.enis.remove(&eni);
                self.figures = None;
                self.acted = Some(self.now.mono);
                self.call(Doing::Look(eni.clone()), Call::DescribeOne(eni));
            }
            None => self.pool_done(),
        }
    }

    fn spare(&self) -> Option<EniId> {
        let (now, cooldown, targets) = (self.now.mono, self.config.tunables.ip_cooldown, self.config.tunables.targets);
        let whole = |n: usize| if self.config.prefix_mode { n.next_multiple_of(PREFIX) } else { n };
        let may_go = |id: &EniId, eni: &Eni| {
            let mut slots = eni.cidrs.values().flat_map(Map::values);
            let busy = slots.any(|s| s.owner.is_some() || s.freed.is_some_and(|at| now.since(at) <= cooldown));
            let others = self.stats(Some(id));
            let free = others.total - others.assigned;
            !eni.primary
                && now.since(eni.added) >= ENI_AGE
                && !busy
                && (targets.warm_ip == 0 || free >= whole(targets.warm_ip))
                && (targets.minimum_ip == 0 || others.total >= whole(targets.minimum_ip))
                && (!self.config.prefix_mode || others.free_prefixes >= targets.warm_prefix)
        };
        self.enis.iter().find(|(id, eni)| may_go(id, eni)).map(|(id, _)| id.clone())
    }

    fn pool_done(&mut self) {
        if !self.ready {
            self.ready = true;
            self.out.push(Effect::Ready);
        }
        self.sleep(HALF, Next::Reconcile);
    }

    fn woken(&mut self) {
        match self.doing {
            Doing::Sleep(Next::Pool) => self.pool_step(),
            Doing::Sleep(Next::Reconcile) => {
                if self.config.provisioning && self.acted.is_some_and(|at| self.now.mono.since(at) <= RECONCILE) {
                    return self.sleep(HALF, Next::Pool);
                }
                self.doing = Doing::Reconcile;
                self.ask_imds(Query::Scan);
            }
            Doing::Sleep(Next::Again) => match self.paused.take() {
                Some(Doing::Wait { eni, count, tries, .. }) => {
                    self.doing = Doing::Wait { eni, count, tries, asked: true };
                    self.ask_imds(Query::Scan);
                }
                Some(Doing::Detach { eni, attachment, tries }) => {
                    let call = Call::Detach(attachment.clone());
                    self.call(Doing::Detach { eni, attachment, tries }, call);
                }
                Some(Doing::Delete { eni, tries }) => {
                    self.call(Doing::Delete { eni: eni.clone(), tries }, Call::Delete(eni));
                }
                Some(Doing::BootDescribe) => self.boot(),
                _ => self.pool_done(),
            },
            _ => {}
        }
    }

    fn boot(&mut self) {
        let instance = self.config.identity.instance.clone();
        self.call(Doing::BootDescribe, Call::DescribeAttached(instance));
    }

    fn told(&mut self, result: Result<imds::Answer, String>) {
        match (std::mem::replace(&mut self.doing, Doing::Nothing), result) {
            (Doing::BootDescribe, Ok(imds::Answer::Groups(groups))) => {
                self.groups = groups;
                self.boot();
            }
            (Doing::BootScan(untagged), Ok(imds::Answer::Enis(enis))) => {
                for eni in enis {
                    self.set_up(&eni);
                }
                self.boot_tags(untagged);
            }
            (Doing::Wait { eni, count, tries, asked: true }, Ok(imds::Answer::Enis(enis))) => {
                let ready = |seen: &&imds::Eni| {
                    seen.id == eni && seen.ipv4s.len().saturating_sub(1) + seen.v4_prefixes.len() >= count as usize
                };
                if let Some(seen) = enis.iter().find(ready) {
                    self.set_up(seen);
                    self.acted = Some(self.now.mono);
                    self.check();
                } else if tries >= TRIES {
                    self.remove_extra();
                } else {
                    let pause = WAIT.pause(tries, &mut self.random);
                    self.pause(pause, Doing::Wait { eni, count, tries: tries + 1, asked: false });
                }
            }
            (Doing::Reconcile, Ok(imds::Answer::Enis(enis))) => self.reconcile(enis),
            (Doing::Reconcile, Err(_)) => self.sleep(HALF, Next::Pool),
            (Doing::Wait { eni, count, tries, .. }, Err(_)) => {
                self.pause(WAIT.cap, Doing::Wait { eni, count, tries: tries + 1, asked: false });
            }
            (_, Err(_)) => self.pause(HALF, Doing::BootDescribe),
            (doing, Ok(_)) => self.doing = doing,
        }
    }

    fn set_up(&mut self, seen: &imds::Eni) {
        let (Some(own), 0) = (seen.ipv4s.first().copied(), seen.card) else { return };
        let singles = seen.ipv4s.iter().skip(1).map(|ip| IpNet::from(IpAddr::V4(*ip)));
        let cidrs = singles.chain(seen.v4_prefixes.iter().copied()).map(|net| (net, Map::new())).gather();
        let primary = seen.id == self.config.identity.primary_eni;
        let eni = Eni { device: seen.device, primary, own, added: self.now.mono, cidrs };
        self.figures = None;
        self.enis.entry(seen.id.clone()).or_insert(eni);
    }

    // 7.6: every set-up of an ENI looks whether its subnet is excluded.
    fn check(&mut self) {
        if !self.config.subnet_discovery {
            return self.remove_extra();
        }
        let identity = &self.config.identity;
        let call = Call::DescribeSubnets { vpc: identity.vpc.clone(), zone: identity.zone.clone() };
        self.call(Doing::Check, call);
    }

    fn boot_tags(&mut self, mut untagged: Vec<EniId>) {
        let Some(eni) = untagged.pop().filter(|_| self.config.provisioning) else {
            return self.boot_check(self.enis.len());
        };
        let instance = self.config.identity.instance.0.clone();
        let tags = Map::from([("node.k8s.amazonaws.com/instance_id".to_owned(), instance)]);
        self.call(Doing::BootTags(untagged), Call::CreateTags { eni, tags });
    }

    fn boot_check(&mut self, left: usize) {
        if left == 0 || !self.config.subnet_discovery {
            return self.boot_groups();
        }
        let identity = &self.config.identity;
        let call = Call::DescribeSubnets { vpc: identity.vpc.clone(), zone: identity.zone.clone() };
        self.call(Doing::BootCheck(left - 1), call);
    }

    // 9.4: the first refresh applies the groups to every ENI; one call stands for a fresh node's only one.
    fn boot_groups(&mut self) {
        if !self.config.provisioning {
            return self.pool_done();
        }
        let eni = self.config.identity.primary_eni.clone();
        self.call(Doing::BootGroups, Call::ModifyGroups { eni, groups: self.groups.clone() });
    }

    fn answered(&mut self, result: Result<Reply, Failure>) {
        // Every branch says what is done next.
        match (std::mem::replace(&mut self.doing, Doing::Nothing), result) {
            (Doing::BootDescribe, Ok(Reply::Interfaces(found))) => {
                let own = self.config.identity.instance.as_str();
                let tagged = |i: &&Interface| {
                    i.tags.get("node.k8s.amazonaws.com/instance_id").is_none_or(|instance| instance != own)
                };
                self.doing = Doing::BootScan(found.iter().filter(tagged).map(|i| i.id.clone()).collect());
                self.ask_imds(Query::Scan);
            }
            (Doing::BootDescribe, _) => self.pause(HALF, Doing::BootDescribe),
            (Doing::BootTags(rest), _) => self.boot_tags(rest),
            (Doing::BootCheck(left), _) => self.boot_check(left),
            (Doing::BootGroups, _) => self.pool_step(), // pre-scaling
            (doing @ (Doing::Assign { .. } | Doing::Inspect(_) | Doing::Subnets(_)), result) => {
                self.grown(doing, result);
            }
            (doing @ (Doing::Create { .. } | Doing::Attach(_) | Doing::Modify(..)), result) => {
                self.created(doing, result);
            }
            (Doing::Unassign(rest), _) => self.unassign(rest),
            (Doing::Look(eni), Ok(Reply::Interfaces(found))) => {
                match found.first().and_then(|interface| interface.attachment.as_ref()) {
                    Some(at) => {
                        let (attachment, call) = (at.id.clone(), Call::Detach(at.id.clone()));
                        self.call(Doing::Detach { eni, attachment, tries: 1 }, call);
                    }
                    None => self.pool_done(),
                }
            }
            (Doing::Detach { eni, .. }, Ok(_)) => self.pause(Duration::from_secs(2), Doing::Delete { eni, tries: 1 }),
            (Doing::Detach { eni, attachment, tries }, Err(_)) if tries < TRIES => {
                let pause = DETACH.pause(tries - 1, &mut self.random);
                self.pause(pause, Doing::Detach { eni, attachment, tries: tries + 1 });
            }
            (Doing::Delete { eni, tries }, Err(failure))
                if tries < TRIES && failure.code != "InvalidNetworkInterfaceID.NotFound" =>
            {
                let pause = DELETE.pause(tries - 1, &mut self.random);
                self.pause(pause, Doing::Delete { eni, tries: tries + 1 });
            }
            (Doing::Adopt(new), Ok(Reply::Interfaces(_))) => {
                for eni in &new {
                    self.set_up(eni);
                }
                self.acted = Some(self.now.mono);
                self.sleep(HALF, Next::Pool);
            }
            (Doing::Adopt(_), _) => self.sleep(HALF, Next::Pool),
            (Doing::Check, _) => self.remove_extra(),
            _ => self.pool_done(),
        }
    }

    fn grown(&mut self, doing: Doing, result: Result<Reply, Failure>) {
        match (doing, result) {
            (Doing::Assign { eni, .. }, Ok(Reply::Assigned(nets))) => {
                self.take_in(&eni, nets);
                self.acted = Some(self.now.mono);
                self.remove_extra();
            }
            (Doing::Assign { eni, want, single }, Err(failure)) => self.assign_failed(eni, want, single, &failure),
            (Doing::Inspect(eni), Ok(Reply::Interfaces(found))) => {
                if let Some(interface) = found.first() {
                    let nets = carried(interface);
                    self.take_in(&eni, nets);
                }
                self.remove_extra();
            }
            (Doing::Subnets(count), Ok(Reply::Subnets(subnets))) => {
                let primary = self.config.identity.subnet.clone();
                let role = |tags: &Map<String, String>| tags.get("kubernetes.io/role/cni").cloned().unwrap_or_default();
                let valid = |s: &&crate::model::ec2::Subnet| match role(&s.tags).as_str() {
                    "" => s.id == primary,
                    value => value != "0",
                };
                let valid: Vec<SubnetId> = subnets.iter().filter(valid).map(|s| s.id.clone()).collect();
                self.create(count, valid);
            }
            _ => self.remove_extra(),
        }
    }

    fn created(&mut self, doing: Doing, result: Result<Reply, Failure>) {
        match (doing, result) {
            (Doing::Create { count, .. }, Ok(Reply::Created(interface))) => self.attach(interface.id, count),
            (Doing::Create { count, rest }, Err(failure)) => {
                if rest.is_empty() && failure.subnet_exhausted() {
                    self.exhausted = Some(self.now.mono);
                }
                self.create(count, rest);
            }
            (Doing::Attach(eni), Ok(Reply::Attached(attachment))) => {
                let count = self.pending_count();
                let call = Call::DeleteOnTermination { eni: eni.clone(), attachment };
                self.call(Doing::Modify(eni, count), call);
            }
            (Doing::Attach(eni), _) => self.call(Doing::Delete { eni: eni.clone(), tries: 1 }, Call::Delete(eni)),
            (Doing::Modify(eni, count), Ok(_)) => {
                self.doing = Doing::Wait { eni, count, tries: 0, asked: true };
                self.ask_imds(Query::Scan);
            }
            (Doing::Modify(eni, _), Err(_)) => self.call(Doing::Look(eni.clone()), Call::DescribeOne(eni)),
            _ => self.remove_extra(),
        }
    }

    fn assign_failed(&mut self, eni: EniId, want: u32, single: bool, failure: &Failure) {
        if failure.code == "PrivateIpAddressLimitExceeded" {
            return self.call(Doing::Inspect(eni.clone()), Call::DescribeOne(eni));
        }
        if !single {
            return self.assign(eni, 1, true);
        }
        if failure.subnet_exhausted() {
            if self.config.subnet_discovery {
                let stats = self.total();
                return self.allocate(want.max(small(self.wanted(&stats).min(self.config.slots))));
            }
            self.exhausted = Some(self.now.mono);
        }
        self.remove_extra();
    }

    fn take_in(&mut self, id: &EniId, nets: Vec<IpNet>) {
        self.figures = None;
        if let Some(eni) = self.enis.get_mut(id) {
            for net in nets {
                eni.cidrs.entry(net).or_default();
            }
        }
    }

    fn attach(&mut self, eni: EniId, count: u32) {
        let used: Set<u32> = self.enis.values().map(|eni| eni.device).gather();
        let device = (0..100).find(|device| !used.contains(device)).unwrap_or(99);
        self.paused = Some(Doing::Modify(eni.clone(), count));
        let instance = self.config.identity.instance.clone();
        self.call(Doing::Attach(eni.clone()), Call::Attach { eni, instance, device, card: 0 });
    }

    // CIDRs of the ENI that is being attached.
    fn pending_count(&mut self) -> u32 {
        match self.paused.take() {
            Some(Doing::Modify(_, count)) => count,
            _ => 0,
        }
    }

    // 9.1: IMDS is believed, except where EC2 is asked.
    fn reconcile(&mut self, listed: Vec<imds::Eni>) {
        let now = self.now.mono;
        self.figures = None;
        self.freed.retain(|_, at| now.since(*at) < RECONCILE);
        self.enis.retain(|id, _| listed.iter().any(|seen| seen.id == *id));
        let enis = &self.enis;
        self.index.retain(|_, (eni, _, _)| enis.contains_key(eni));
        let mut new = Vec::new();
        for seen in listed.into_iter().filter(|seen| seen.card == 0) {
            let Some(eni) = self.enis.get_mut(&seen.id) else {
                new.push(seen);
                continue;
            };
            let own = eni.own;
            let singles = seen.ipv4s.iter().filter(|ip| **ip != own).map(|ip| IpNet::from(IpAddr::V4(*ip)));
            for net in singles.chain(seen.v4_prefixes.iter().copied()) {
                if !self.freed.contains_key(&net) {
                    eni.cidrs.entry(net).or_default();
                }
            }
        }
        if new.is_empty() {
            self.acted = Some(now);
            return self.sleep(HALF, Next::Pool);
        }
        order::sort_by_key(&mut new, |seen| seen.device);
        let instance = self.config.identity.instance.clone();
        self.call(Doing::Adopt(new), Call::DescribeAttached(instance));
    }
}

fn small(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn carried(interface: &Interface) -> Vec<IpNet> {
    let singles = interface.secondary_ipv4s.iter().map(|ip| IpNet::from(IpAddr::V4(*ip)));
    singles.chain(interface.v4_prefixes.iter().map(|net| IpNet::V4(*net))).collect()
}
