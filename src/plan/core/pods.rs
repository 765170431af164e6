//! Requests of the plugins: an address for a pod, and back (`spec/ipamd.md` 10.2, 10.3).

use super::saver::Undo;
use super::{Answer, CallId, Core, Effect, Level, Op, PLUGIN_MAX, Phase, REST_MIN, SETTLED, Seen, Tally, Timer};
use crate::model::ids::{PodKey, PodName};
use crate::model::kube::Regarding;
use crate::model::map::{Map, Set};
use crate::model::naming;
use crate::model::order::Gather as _;
use crate::model::spool::Record;
use crate::model::time::{Mono, Wall};
use crate::model::wire::{
    AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest, IpAllocation, UNKNOWN_POD,
};
use crate::plan::pool::{Owner, Place, Released};
use std::net::IpAddr;
use std::time::Duration;

/// Most ADDs that wait for an address at one time; more are refused at once. The kubelet starts far fewer pods in parallel.
const WAITING_MAX: usize = 1024;
/// An allocation younger than this is not called dead for want of a veth: it is written before its veth exists (B18).
const VETH_GRACE: Duration = Duration::from_mins(5);
/// The same at a restart, where the plugin that was in the middle of an ADD has lost its connection and undoes.
const VETH_GRACE_RESTART: Duration = Duration::from_mins(1);

/// After that rules of nobody are swept once more that have outlived a sweep.
const SWEEP_AGAIN: Duration = Duration::from_hours(1);

/// An ADD that waits for an address.
#[derive(Debug)]
pub(super) struct Waiting {
    call: CallId,
    owner: Owner,
    // One address on every card, and not just one.
    pub(super) every_card: bool,
    pub(super) deadline: Mono,
}

impl Core {
    pub(super) fn add(&mut self, call: CallId, request: AddNetworkRequest) {
        self.tally(Tally::Add);
        let key = PodKey { network: request.network_name, container: request.container_id, ifname: request.if_name };
        if matches!(self.phase, Phase::Starting | Phase::Booting) {
            return self.out.push(Effect::Reply(call, Answer::Error("the daemon is starting".into())));
        }
        if key.network.is_empty() || key.container.is_empty() || key.ifname.is_empty() {
            return self.refuse(call, &key, "network name, container id and interface name must be given");
        }
        let every_card = request.requires_multi_nic;
        if every_card && !self.config.multi_nic {
            return self.refuse(call, &key, "several interfaces are wanted, but ENABLE_MULTI_NIC is off");
        }
        let pod = PodName { namespace: request.pod_namespace, name: request.pod_name };
        let interfaces = if every_card { u32::try_from(self.open_cards().len()).unwrap_or(u32::MAX) } else { 1 };
        let owner = Owner { key, pod, interfaces, since: self.now.wall };
        if self.config.pod_eni {
            return self.look_up(call, owner, every_card);
        }
        self.add_ordinary(call, owner, every_card);
    }

    /// A pod that takes its address from the pool.
    pub(super) fn add_ordinary(&mut self, call: CallId, owner: Owner, every_card: bool) {
        // Those who came earlier are served first.
        let first = self.waiting.is_empty() || !self.pool.cards_of(&owner.key).is_empty();
        if first && self.try_assign(call, &owner, every_card) {
            return;
        }
        if self.waiting.len() >= WAITING_MAX {
            return self.refuse(call, &owner.key, "too many requests wait already");
        }
        let deadline = self.now.mono.plus(self.config.tunables.add_wait);
        self.waiting.push_back(Waiting { call, owner, every_card, deadline });
    }

    // Gives what is wanted if all of it is there; the reply leaves when it is durable.
    fn try_assign(&mut self, call: CallId, owner: &Owner, every_card: bool) -> bool {
        self.judge_again();
        // What it has is not listed; a second address would cut off what runs with the first, and one of the two would
        // outlive its DEL.
        if self.pool.has_orphan(&owner.key) {
            let decided = self.described.is_some() || self.config.imds_only;
            if decided {
                self.refuse(call, &owner.key, "it has an address already, which is not listed as this node's");
            }
            return decided;
        }
        let held = self.pool.cards_of(&owner.key);
        // An ordinary pod takes the first card that has an address. Whoever asks twice gets the same again.
        let whole = self.pool.owner(&owner.key).is_some_and(|had| had.interfaces as usize <= held.len());
        let wanted = if whole { held.into_iter().collect() } else { self.open_cards() };
        let (mut places, mut fresh) = (Vec::new(), Vec::new());
        for card in wanted {
            match self.pool.assign(self.now, card, owner.clone()) {
                Ok((place, new)) => {
                    fresh.extend(new.then_some(card));
                    places.push(place);
                    if !every_card && !whole {
                        break;
                    }
                }
                Err(_) if !every_card => {}
                Err(_) => {
                    for card in fresh {
                        self.pool.undo_assign(&owner.key, card);
                    }
                    return false;
                }
            }
        }
        if places.is_empty() {
            return false;
        }
        self.missing_veth.remove(&owner.key); // a look at the links that is under way may be older than this ADD
        let mut undo = Undo::Nothing;
        if !fresh.is_empty() {
            for place in &places {
                let text = format!("assign {} to {} ({}) on {}", place.address, owner.pod, owner.key, place.eni);
                self.log(Level::Info, text);
                self.gone.remove(&place.address);
                self.strays.remove(&place.address);
                self.released.remove(&place.address);
            }
            self.wake_for(Timer::Host, self.now.mono.plus(SETTLED));
            self.changed();
            undo = Undo::Assign(owner.key.clone(), fresh);
        }
        let reply = self.add_reply(&places);
        self.confirm(call, owner, reply, undo);
        true
    }

    pub(super) fn add_reply(&self, places: &[Place]) -> AddNetworkReply {
        let texts = |nets: &[ipnet::IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut cidrs = texts(self.vpc_cidrs.as_deref().unwrap_or_default());
        let host = &self.config.tunables.host;
        if !self.config.v6 && !host.external_snat {
            cidrs.extend(texts(&host.excluded_cidrs));
        }
        AddNetworkReply {
            success: true,
            allocations: places.iter().map(allocation).collect(),
            use_external_snat: !self.config.v6 && host.external_snat,
            vpc_v4_cidrs: if self.config.v6 { Vec::new() } else { cidrs.clone() },
            vpc_v6_cidrs: if self.config.v6 { cidrs } else { Vec::new() },
            network_policy_mode: self.config.network_policy_mode.clone(),
            ..AddNetworkReply::default()
        }
    }

    pub(super) fn refuse(&mut self, call: CallId, key: &PodKey, why: &str) {
        self.log(Level::Warn, format!("no address for {key}: {why}"));
        let reply = AddNetworkReply { failure: why.to_owned(), ..AddNetworkReply::default() };
        self.out.push(Effect::Reply(call, Answer::Add(reply)));
    }

    /// Serves the waiting in their order, as far as there are addresses.
    pub(super) fn serve_waiting(&mut self) {
        while let Some(waiting) = self.waiting.pop_front() {
            if !self.try_assign(waiting.call, &waiting.owner, waiting.every_card) {
                return self.waiting.push_front(waiting);
            }
        }
    }

    /// Refuses those whose time is up or for whom nothing is on its way.
    pub(super) fn refuse_hopeless(&mut self) {
        let (now, stopping) = (self.now.mono, self.phase == Phase::Stopping);
        let expected = |core: &Core, deadline| !stopping && now < deadline && core.address_expected(deadline);
        let (rest, hopeless): (Vec<Waiting>, Vec<Waiting>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|waiting| expected(self, waiting.deadline));
        self.waiting = rest.into();
        for Waiting { call, owner, every_card, .. } in hopeless {
            let (cause, why) = self.why_no_address(every_card);
            self.tally(Tally::NoAddress(cause));
            self.notice(Regarding::Node, "NoPodAddress", cause, &why);
            self.refuse(call, &owner.key, &why);
        }
    }

    // Whether an address may turn up before the deadline: an allocation is under way, one ends its cooldown, what somebody has
    // left of one is being swept, or EC2's word on those that are there is still awaited.
    fn address_expected(&self, deadline: Mono) -> bool {
        let cooldown = self.pool.cooldown();
        let trusted = self.timers.get(&Timer::Trust).is_some_and(|at| self.described.is_none() && *at <= deadline);
        let swept = |op: &Op| matches!(op, Op::Host { gone, .. } if !gone.is_empty());
        trusted
            || self.growing_now()
            || self.ops.values().any(swept)
            || self.pool.cooling(self.now.mono).any(|(_, freed)| freed.plus(cooldown) <= deadline)
    }

    pub(super) fn del(&mut self, call: CallId, request: &DelNetworkRequest) {
        self.tally(Tally::Del(request.reason.clone()));
        if self.phase == Phase::Starting {
            return self.out.push(Effect::Reply(call, Answer::Error("the daemon is starting".into())));
        }
        let key = PodKey {
            network: request.network_name.clone(),
            container: request.container_id.clone(),
            ifname: request.if_name.clone(),
        };
        self.cancel_waiting(&key);
        self.cancel_lookups(&key);
        let released = self.take_back(&key);
        if released.is_empty() && self.config.pod_eni {
            return self.look_up_deleted(call, request);
        }
        if released.is_empty() {
            // Perhaps unknown since a moment ago: the runtime may forget the pod only when that is durable.
            return self.when_durable(Effect::Reply(call, Answer::Error(UNKNOWN_POD.into())), Undo::Nothing);
        }
        self.changed();
        let mut allocations = Vec::new();
        for Released { address, owner, place, .. } in &released {
            self.log(Level::Info, format!("release {address} of {} ({key}): {}", owner.pod, request.reason));
            self.released.insert(*address, self.now.mono);
            self.rest(*address);
            // Without a place, table 0: the plugin removes the pod's rules whatever table they name.
            let mut given = place.as_ref().map(allocation).unwrap_or_default();
            set_address(&mut given, *address);
            allocations.push(given);
        }
        self.wake_for(Timer::Host, self.now.mono.plus(PLUGIN_MAX));
        let reply = DelNetworkReply {
            success: true,
            allocations,
            network_policy_mode: self.config.network_policy_mode.clone(),
            ..DelNetworkReply::default()
        };
        if self.config.annotate_pod_ip
            && let Some(first) = released.first()
        {
            self.unannotate(first);
        }
        self.when_durable(Effect::Reply(call, Answer::Del(reply)), Undo::Release(released));
    }

    // Lets a pod's address rest beyond a short cooldown.
    fn rest(&mut self, address: IpAddr) {
        let more = REST_MIN.saturating_sub(self.pool.cooldown());
        if !more.is_zero() {
            self.pool.restore_cooling(address, self.now.mono.plus(more));
            self.wake_for(Timer::Shrink, self.now.mono.plus(REST_MIN)); // somebody may wait for it
        }
    }

    // Takes the addresses of a key back. Where a CIDR has not been seen yet, its cooldown is kept here until it has.
    pub(super) fn take_back(&mut self, key: &PodKey) -> Vec<Released> {
        self.judge_again();
        let cards = self.pool.cards_of(key).into_iter();
        let released: Vec<Released> = cards.filter_map(|card| self.pool.release(self.now, key, card)).collect();
        for unplaced in released.iter().filter(|released| released.place.is_none()) {
            self.cooling.insert(unplaced.address, self.now.mono);
        }
        released
    }

    // The same for a pod that is gone without a DEL of ours: what is left of it on the host goes too.
    fn take_back_gone(&mut self, level: Level, key: &PodKey, why: &str) {
        for released in self.take_back(key) {
            self.log(level, format!("release {} of {key}: {why}", released.address));
            self.gone.insert(released.address);
            self.host_dirty = true;
            self.changed();
        }
    }

    // The runtime has given up the ADD that still waits.
    fn cancel_waiting(&mut self, key: &PodKey) {
        let (given_up, rest): (Vec<Waiting>, Vec<Waiting>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|waiting| waiting.owner.key == *key);
        self.waiting = rest.into();
        for waiting in given_up {
            self.refuse(waiting.call, key, "deleted while it waited");
        }
    }

    /// DELs that came while no daemon ran: the plugin has cleared the kernel, the addresses come back now. An allocation
    /// that is younger than the DEL belongs to a later ADD and stays.
    pub(super) fn drain_spool(&mut self, records: Vec<Record>) {
        let mut done = Vec::new();
        for record in records {
            // An allocation from the future was made before the clock was set back.
            let meant = |owner: &Owner| owner.since <= record.time || owner.since > self.now.wall;
            let meant = self.pool.owner(&record.key).is_some_and(meant);
            if meant {
                self.take_back_gone(Level::Info, &record.key, "deleted while the daemon was away");
            }
            done.push(record);
        }
        // A record that went too early would be lost with a crash; one that stays is harmless, since its key is unknown
        // the second time.
        if !done.is_empty() {
            self.when_durable(Effect::SpoolDone(done), Undo::Nothing);
        }
    }

    /// Whether no link bears the pod's name. Somebody may have renamed its veth: a route to its address tells that it lives.
    fn without_veth(owner: &Owner, seen: &Seen) -> bool {
        let PodName { namespace, name } = &owner.pod;
        if namespace.is_empty() || name.is_empty() {
            return false;
        }
        let suffix = naming::suffix(namespace, name, 0);
        !seen.links.iter().any(|link| link.ends_with(&suffix))
    }

    /// At a restart: which of the pods in the checkpoint are gone (`spec/ipamd.md` 5.3). `now` by the clock that wrote it.
    pub(super) fn gone_at_restart(owner: &Owner, address: IpAddr, seen: &Seen, now: Wall) -> bool {
        let named = !Self::without_veth(owner, seen);
        !named && !seen.linked.contains(&address) && now.since(owner.since) > VETH_GRACE_RESTART
    }

    // A pod's veth bears its name, so that an allocation of an earlier sandbox looks alive through the later one's. It is
    // told by its address: the way to the later one is there, its own is not. Which is the later one the wall clock tells, or
    // that an ADD takes no minutes: the clock may have been set back between the two.
    fn superseded(&self, seen: &Seen, old: impl Fn(&Owner) -> bool) -> Vec<PodKey> {
        let mut latest = Map::<&PodName, Wall>::new();
        let named = || self.pool.allocations().filter(|held| !held.owner.pod.name.is_empty());
        for held in named().filter(|held| seen.linked.contains(&held.address)) {
            let since = latest.entry(&held.owner.pod).or_insert(held.owner.since);
            *since = held.owner.since.max(*since);
        }
        let later = |owner: &Owner| latest.get(&owner.pod).is_some_and(|since| *since > owner.since || old(owner));
        named().filter(|held| later(held.owner)).map(|held| held.owner.key.clone()).collect()
    }

    // Those to whose address, or one of several, a route leads.
    fn linked(&self, seen: &Seen) -> Set<&PodKey> {
        let held = self.pool.allocations().filter(|held| seen.linked.contains(&held.address));
        held.map(|held| &held.owner.key).gather()
    }

    /// Releases addresses of pods whose veth is missing in two scans in a row, by its name and by the route to the address
    /// (B18), and those that were reserved without a known owner once the veth that led to them is gone (B19).
    pub(super) fn check_links(&mut self, seen: &Seen) {
        let now = self.now.wall;
        let old = |owner: &Owner| now.since(owner.since) > VETH_GRACE || owner.since > now; // the clock was set back
        let linked = self.linked(seen);
        let missing: Set<PodKey> = self
            .pool
            .allocations()
            .filter(|held| old(held.owner) && Self::without_veth(held.owner, seen))
            .map(|held| held.owner.key.clone())
            .chain(self.superseded(seen, old))
            .filter(|key| !linked.contains(key))
            .gather();
        let mut dead: Vec<PodKey> = missing.intersection(&self.missing_veth).cloned().collect();
        self.missing_veth = missing;
        // A DEL takes only the veth of such a pod: its rules might be somebody else's, as far as the plugin knows.
        let unlinked = self.reserved.iter().filter(|(address, _)| !seen.linked.contains(address));
        let unlinked: Vec<(IpAddr, PodKey)> = unlinked.map(|(address, key)| (*address, key.clone())).collect();
        for (address, key) in unlinked {
            self.reserved.remove(&address);
            dead.push(key);
        }
        for key in dead {
            self.take_back_gone(Level::Warn, &key, "its pod is gone and no DEL came");
        }
        self.sweep_strays(seen);
    }

    /// Rules that a pod of a former run of this process has left, or of somebody else's installation, as they lead to an
    /// address of the VPC that nobody has here: whoever else gets it would not be reached from here (`spec/dataplane.md` 9.5). Such
    /// as stood there the last time too, so that no plugin is at work on them. One that cannot be deleted is told by those who
    /// have tried; it is left for long then, since an address whose rules are swept is nobody's meanwhile.
    fn sweep_strays(&mut self, seen: &Seen) {
        if self.phase != Phase::Ready {
            return;
        }
        let known = self.pool.allocations().map(|held| held.address);
        let known = known.chain(self.branches.iter().map(|pod| pod.address)).gather::<Set<_>>();
        let nets = self.pool.enis().flat_map(|(_, eni)| eni.cidrs().map(|(net, _)| *net));
        let nets = nets.chain(self.vpc_cidrs.iter().flatten().copied()).collect::<Vec<_>>();
        let ours = |address: &&IpAddr| nets.iter().any(|net| net.contains(*address));
        let free = |address: &&IpAddr| !known.contains(*address) && !seen.linked.contains(*address);
        let strays = seen.ruled.iter().filter(free).filter(ours);
        let strays = strays.map(|address| (*address, self.strays.get(address).copied())).collect::<Vec<_>>();
        self.strays.clear();
        let now = self.now.mono;
        for (address, before) in strays {
            let sweep = before.is_some_and(|due| due <= now);
            let due = if sweep { now.plus(SWEEP_AGAIN) } else { before.unwrap_or(now) };
            self.strays.insert(address, due);
            if !sweep {
                continue;
            }
            self.log(Level::Info, format!("rules of {address} lead to no pod: swept"));
            self.pool.restore_cooling(address, now); // nobody gets it while the kernel is at work
            self.gone.insert(address);
            self.host_dirty = true;
        }
    }
}

fn set_address(allocation: &mut IpAllocation, address: IpAddr) {
    match address {
        IpAddr::V4(ip) => allocation.ipv4 = ip.to_string(),
        IpAddr::V6(ip) => allocation.ipv6 = ip.to_string(),
    }
}

fn allocation(place: &Place) -> IpAllocation {
    let mut allocation = IpAllocation {
        device_number: i32::try_from(place.device).unwrap_or(i32::MAX),
        route_table_id: i32::try_from(place.table).unwrap_or(i32::MAX),
        ..IpAllocation::default()
    };
    set_address(&mut allocation, place.address);
    allocation
}
