//! From nothing to serving: the checkpoint, what IMDS shows, the host's network, then requests. A restart needs no EC2:
//! what EC2 told before stands in the checkpoint, and is checked as soon as EC2 answers (`spec/ipamd.md` 2, 5.3).

use super::freeing::Free;
use super::subnets::Judgement;
use super::{Applied, Core, Effect, LINK_CHECK, Level, Op, PATIENCE, PLUGIN_MAX, Phase, RECONCILE};
use super::{SETTLED, Seen, TRUST, Timer};
use crate::model::checkpoint::{Allocation, Checkpoint, Own};
use crate::model::ids::{EniId, PodKey, PodName};
use crate::model::imds::{self, Query};
use crate::model::map::{Map, Set};
use crate::model::naming;
use crate::model::order::{self, Gather as _};
use crate::model::spool::Record;
use crate::model::time::{Mono, Wall};
use crate::plan::host::{HostEni, HostPod, Intent};
use crate::plan::pool::{Eni, Held, Kind, Owner, Refused};
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

// The key of a living pod of which only the address is known.
fn nameless(address: IpAddr) -> PodKey {
    PodKey { network: "unknown".into(), container: address.to_string(), ifname: "unknown".into() }
}

impl Core {
    pub(super) fn started(&mut self, checkpoints: &Map<u32, String>, seen: &Seen, spool: Vec<Record>) {
        self.phase = Phase::Booting;
        if checkpoints.is_empty() {
            self.log(Level::Info, "no checkpoint: a fresh node".into());
        }
        // A host where no pod ever ran has no rule either.
        let mut unreadable = checkpoints.is_empty();
        let mut now = self.now.wall;
        for (card, text) in checkpoints {
            self.restarted = true;
            match Checkpoint::parse(text) {
                Ok(checkpoint) => {
                    let own = checkpoint.enibox.unwrap_or_default();
                    now = own.written.map_or(now, |written| self.former_clock(written));
                    self.restore(*card, &checkpoint.allocations, seen, now);
                    self.restore_own(own, now);
                }
                Err(error) => {
                    let text = format!(
                        "read checkpoint of card {card}: {error}; keeping the addresses that the rules lead to"
                    );
                    self.log(Level::Error, text);
                    self.out.push(Effect::SetAside(*card, error));
                    unreadable = true;
                }
            }
        }
        if unreadable {
            self.reserve(seen); // after all that is known by name
        }
        // First, so that a record outlives what only memory has released: a crash brings the allocation back.
        self.changed();
        self.drain_spool(spool);
        self.ask_imds(Op::Scan, Query::Scan);
        self.ask_imds(Op::VpcCidrs, Query::VpcCidrs { v6: self.config.v6 });
        self.ask_imds(Op::Groups, Query::SecurityGroups);
        if self.restarted {
            self.ask_ec2_first();
        }
        self.set_timer(Timer::Links, LINK_CHECK);
    }

    // On a fresh node the host comes first: its first SNAT rules switch connection tracking on, which then takes open
    // connections for new ones and moves their ports; an answer of EC2 would be lost. On a restart the rules are there.
    fn ask_ec2_first(&mut self) {
        self.asked_ec2 = true;
        if self.config.imds_only {
            return;
        }
        self.describe();
        self.judge_first();
        self.set_timer(Timer::Patience, PATIENCE);
        self.set_timer(Timer::Trust, TRUST);
    }

    // Living pods keep their addresses, first without a place: their CIDRs are not known yet.
    fn restore(&mut self, card: u32, allocations: &[Allocation], seen: &Seen, now: Wall) {
        for entry in allocations {
            let Some(address) = entry.address() else {
                self.log(
                    Level::Error,
                    format!("checkpoint: the entry of container {:?} has no address", entry.container),
                );
                continue;
            };
            let owner = Owner {
                key: PodKey {
                    network: entry.network.clone(),
                    container: entry.container.clone(),
                    ifname: entry.ifname.clone(),
                },
                pod: PodName { namespace: entry.metadata.namespace.clone(), name: entry.metadata.name.clone() },
                interfaces: entry.metadata.interfaces.max(1),
                since: Wall::from_unix_nanos(entry.timestamp),
            };
            let nameless = owner.key == nameless(address);
            if Self::gone_at_restart(&owner, address, seen, now) || (nameless && !seen.linked.contains(&address)) {
                self.log(Level::Info, format!("release {address} of {}: its pod is gone", owner.pod));
                self.gone.insert(address);
                self.cooling.insert(address, self.now.mono);
            } else if let Err(other) = self.pool.restore(card, address, owner.clone()) {
                // The one that came first stays; the other pod keeps its packets until it is deleted.
                let text = format!("checkpoint: {address} is given to {other} and to {}", owner.key);
                self.log(Level::Error, text);
            } else if nameless {
                self.reserved.insert(address, owner.key);
            }
        }
    }

    // What the wall clock would show had nobody set it since the checkpoint was written. After a reboot, which begins the
    // monotonic clock anew, what it shows has to do.
    fn former_clock(&self, (mono, wall): (u64, i64)) -> Wall {
        let mono = Mono::from_nanos(mono);
        if mono > self.now.mono { self.now.wall } else { Wall::from_unix_nanos(wall).plus(self.now.mono.since(mono)) }
    }

    fn restore_own(&mut self, own: Own, now: Wall) {
        for (id, facts) in &own.enis {
            self.trusted.insert(id.clone(), facts.cidrs.iter().copied().gather());
        }
        for (address, freed) in own.cooling {
            let age = now.since(Wall::from_unix_nanos(freed));
            self.cooling.entry(address).or_insert(self.now.mono.minus(age));
        }
        // As if it were now: the clock may have been set since, and lists may be behind.
        self.unassigned.extend(own.given_back.into_keys().map(|net| (net, self.now.mono)));
        if own.leak_suspected {
            self.suspect_leak();
        }
        self.restore_fragmented(own.fragmented);
        if own.excluded_subnets.is_some() {
            self.judgement = Judgement::restored(own.excluded_subnets, self.now.mono);
        }
        self.facts.extend(own.enis);
        self.resume.extend(own.creating);
        self.freeing.extend(own.freeing.into_iter().map(|(id, free)| (id, Free::resumed(free.attachment))));
    }

    // The checkpoint is lost or unreadable: whatever address a rule leads to belongs to a living pod that we cannot name (B19).
    fn reserve(&mut self, seen: &Seen) {
        for address in &seen.routed {
            let key = nameless(*address);
            let owner = Owner { key: key.clone(), pod: PodName::default(), interfaces: 1, since: self.now.wall };
            if self.pool.restore(0, *address, owner).is_ok() {
                self.reserved.insert(*address, key);
            }
        }
    }

    pub(super) fn scan_done(&mut self, enis: Vec<imds::Eni>) {
        if enis.is_empty() {
            // An instance always has its primary ENI: this is no observation (`spec/ipamd.md` 17 "IMDS answers nothing").
            self.log(Level::Warn, "IMDS lists no ENI: ignored".into());
            return self.scan_failed();
        }
        self.succeeded(Timer::Scan);
        let before = std::mem::replace(&mut self.attached, enis.into_iter().map(|eni| (eni.id.clone(), eni)).gather());
        self.note_attached(&before);
        let first = !std::mem::replace(&mut self.scanned, true);
        if self.phase == Phase::Booting && (first || !self.asked_ec2) {
            self.set_timer(Timer::Scan, self.scan_every()); // the start may take long
        } else {
            self.compare_scan();
        }
    }

    pub(super) fn vpc_cidrs_done(&mut self, mut cidrs: Vec<IpNet>) {
        order::sort(&mut cidrs);
        cidrs.dedup();
        self.succeeded(Timer::VpcCidrs);
        self.set_timer(Timer::VpcCidrs, super::WATCH);
        if cidrs.is_empty() && !self.config.v6 {
            // IPv6 pods are never translated, so that nothing depends on their VPC's.
            self.log(Level::Warn, "IMDS lists no CIDR of the VPC: ignored".into());
        } else if self.vpc_cidrs.as_ref() != Some(&cidrs) {
            self.log(Level::Info, format!("the VPC has {cidrs:?}"));
            self.vpc_cidrs = Some(cidrs);
            self.host_dirty = true;
        }
    }

    /// Takes in attached ENIs that are ours to use: first on the host, then in the pool.
    pub(super) fn adopt(&mut self) {
        if !self.scanned {
            return;
        }
        let coming = self.coming();
        let new: Vec<imds::Eni> = self
            .attached
            .values()
            .filter(|eni| {
                !self.wanted.contains_key(&eni.id)
                    && self.managed(&eni.id)
                    && !self.freeing.contains_key(&eni.id)
                    && !coming.contains(&eni.id)
                    && self.own_address(eni).is_some()
            })
            .cloned()
            .collect();
        for eni in new {
            self.want(eni);
        }
    }

    /// ENIs that are being created.
    pub(super) fn coming(&self) -> Set<EniId> {
        let growing = self.growths.values().filter_map(|growth| growth.creating());
        growing.chain(&self.resume).filter_map(|creating| creating.eni.as_ref()).map(|(id, _)| id.clone()).gather()
    }

    /// From now on the host's network includes this ENI.
    pub(super) fn want(&mut self, mut eni: imds::Eni) {
        eni.device = self.device_of(&eni.id).unwrap_or(eni.device);
        self.log(Level::Info, format!("eni {}: device {}, {} addresses", eni.id, eni.device, eni.ipv4s.len()));
        self.wanted.insert(eni.id.clone(), eni);
        self.host_dirty = true;
        self.succeeded(Timer::Host); // what failed for others is no reason to keep this one waiting
    }

    // The device index that we asked for, else the one that EC2 tells: IMDS may be at an earlier attachment.
    fn device_of(&self, id: &EniId) -> Option<u32> {
        let asked = self.growths.values().find(|growth| growth.eni().is_some_and(|(eni, _)| eni == *id));
        asked.and_then(super::growth::Growth::device).or_else(|| self.devices.get(id).copied())
    }

    /// The table of an ENI goes by its device index. One that was prepared before EC2 told a different index is prepared
    /// again; one that serves keeps what its pods were given.
    pub(super) fn place_again(&mut self) {
        let moved = |(id, eni): (&EniId, &imds::Eni)| {
            let device = self.device_of(id).filter(|device| *device != eni.device && self.pool.eni(id).is_none())?;
            Some((id.clone(), device))
        };
        for (id, device) in self.wanted.iter().filter_map(moved).collect::<Vec<_>>() {
            self.log(Level::Info, format!("eni {id}: device {device}"));
            if let Some(eni) = self.wanted.get_mut(&id) {
                eni.device = device;
            }
            self.ready.remove(&id);
            for op in self.ops.values_mut() {
                if let Op::Host { enis, .. } = op {
                    enis.remove(&id); // this round prepares the other table
                }
            }
            self.host_dirty = true;
        }
    }

    /// The address by which the host sets up an ENI. A trunk's serves nobody: in IPv6 mode the resource controller may have
    /// given it none, and the link's own does.
    pub(super) fn own_address(&self, eni: &imds::Eni) -> Option<IpAddr> {
        let of_link = || (self.config.v6 && self.kind(&eni.id) == Kind::Trunk).then(|| eni.mac.link_local().into());
        eni.own_address(self.config.v6).or_else(of_link)
    }

    fn own_net(&self, eni: &imds::Eni) -> Option<IpNet> {
        let subnet = if self.config.v6 { eni.subnet_v6 } else { eni.subnet_v4 };
        let length = subnet.map_or(if self.config.v6 { 64 } else { 32 }, |net| net.prefix_len());
        IpNet::new(self.own_address(eni)?, length).ok()
    }

    // The subnet's first address is its router, in IPv4 (`spec/dataplane.md` 8.3).
    fn gateway(&self, eni: &imds::Eni) -> Option<IpAddr> {
        if self.config.v6 {
            return "fe80:ec2::1".parse().ok();
        }
        match eni.subnet_v4?.network() {
            IpAddr::V4(base) => Some(IpAddr::V4((u32::from(base).checked_add(1)?).into())),
            IpAddr::V6(_) => None,
        }
    }

    /// Has the kernel made what the state wants, one round at a time.
    pub(super) fn reconfigure_host(&mut self) {
        let busy = self.ops.values().any(|op| matches!(op, Op::Host { .. }));
        let paused = self.attempts.contains_key(&Timer::Host) && self.timers.contains_key(&Timer::Host);
        if busy || paused || !self.host_dirty {
            return;
        }
        // What a plugin may still be working on is its own.
        let Some(mut intent) = self.intent(PLUGIN_MAX) else { return };
        self.host_dirty = false;
        let included = self.wanted.keys().cloned().gather();
        let swept = self.sweepable();
        let gone: Set<IpAddr> = self.gone.iter().copied().chain(swept.keys().copied()).gather();
        intent.gone = gone.iter().copied().collect();
        let young = self.pool.allocations().any(|held| !self.settled(held.owner, PLUGIN_MAX));
        // Who got one of them now might lose the rules that its ADD makes.
        self.pool.hold_back(gone.clone());
        let op = self.begin(Op::Host { enis: included, gone, swept, young });
        self.out.push(Effect::Kernel(op, Box::new(intent)));
    }

    /// What the host's network should be now, without the leftovers of former pods. None as long as IMDS has not told the
    /// VPC's CIDRs and the primary ENI. Pods that were added within `settling` are left out.
    pub fn intent(&self, settling: Duration) -> Option<Intent> {
        self.wanted.get(&self.config.identity.primary_eni)?;
        let mut intent = self.config.tunables.host.clone();
        intent.vpc_cidrs = self.vpc_cidrs.clone()?;
        for eni in self.wanted.values() {
            if eni.id == self.config.identity.primary_eni {
                continue;
            }
            let facts = (self.own_net(eni), self.gateway(eni), naming::table_of(eni.card, eni.device));
            let (Some(own), Some(gateway), Ok(table)) = facts else { continue };
            intent.enis.push(HostEni {
                id: eni.id.clone(),
                mac: eni.mac,
                card: eni.card,
                device: eni.device,
                own,
                gateway,
                table,
                trunk: self.kind(&eni.id) == Kind::Trunk,
            });
        }
        let pods = self.pool.allocations().filter(|held| self.settled(held.owner, settling));
        intent.pods = pods.filter_map(|held| self.host_pod(held)).collect();
        intent.branches.clone_from(&self.branches);
        Some(intent)
    }

    /// Whether the ADD of a pod is so long ago. One from the future was made before the clock was set back, which must not leave the pod
    /// without anybody's care until the clock has caught up.
    fn settled(&self, owner: &Owner, settling: Duration) -> bool {
        let now = self.now.wall;
        owner.since > now || now.since(owner.since) >= settling
    }

    fn host_pod(&self, held: Held<'_>) -> Option<HostPod> {
        let pod = &held.owner.pod;
        let named = !pod.namespace.is_empty() && !pod.name.is_empty();
        // Nothing lies below card 0, which is that of most pods.
        let below = (held.card > 0).then(|| self.pool.cards_of(&held.owner.key));
        let position = below.map_or(0, |cards| cards.iter().filter(|card| **card < held.card).count());
        Some(HostPod {
            address: held.address,
            table: held.table?,
            name: if named { [pod.namespace.as_str(), "/", &pod.name].concat() } else { String::new() },
            veth: if named { naming::suffix(&pod.namespace, &pod.name, position) } else { String::new() },
        })
    }

    // A rule that was put back while its pod was being deleted would lead the next owner of the address astray. Only
    // addresses that nobody can get before the kernel has done its work: well inside their cooldown.
    fn sweepable(&mut self) -> Map<IpAddr, Mono> {
        let (now, rest) = (self.now.mono, self.pool.cooldown().saturating_sub(PLUGIN_MAX));
        self.released.retain(|_, at| now.since(*at) < rest);
        let due = self.released.extract_if(.., |_, at| now.since(*at) >= PLUGIN_MAX);
        due.gather()
    }

    pub(super) fn kernel_done(&mut self, op: super::OpId, result: Result<Applied, String>) {
        let Some(Op::Host { enis, gone, swept, young }) = self.ops.remove(&op) else { return };
        self.pool.hold_back(Set::new());
        match result {
            Err(error) => {
                self.log(Level::Error, format!("set up the host's network: {error}"));
                for (address, at) in swept {
                    self.released.entry(address).or_insert(at); // again with the next round, if there is time
                }
                self.host_dirty = true;
                self.retry(Timer::Host);
            }
            Ok(Applied { failed, trunks }) => {
                self.trunks = trunks;
                self.gone.retain(|ip| !gone.contains(ip));
                self.refused.retain(|id, _| failed.contains_key(id));
                for (eni, why) in &failed {
                    let lost = !self.refused.contains_key(eni) && self.pool.eni(eni).is_some();
                    self.refused.entry(eni.clone()).or_insert(self.now.mono);
                    self.log(Level::Warn, format!("set up eni {eni}: {why}"));
                    if lost && !self.config.imds_only {
                        self.describe(); // somebody may have detached it, which IMDS tells late or, while it is silent, never
                    }
                }
                for id in &enis {
                    self.pool.set_unwired(id, failed.contains_key(id));
                }
                for id in enis {
                    if !failed.contains_key(&id) && self.wanted.contains_key(&id) {
                        self.ready.insert(id);
                    }
                }
                if !self.asked_ec2 {
                    self.ask_ec2_first();
                }
                if failed.is_empty() {
                    self.succeeded(Timer::Host);
                    // Pods are watched over from the moment that their plugins have done their part, and what a DEL may
                    // have left is swept away then.
                    let soon = young || !self.released.is_empty();
                    self.set_timer(Timer::Host, if soon { SETTLED } else { super::WATCH });
                } else {
                    self.host_dirty = true;
                    self.retry(Timer::Host);
                }
            }
        }
    }

    pub(super) fn kind(&self, id: &EniId) -> Kind {
        match self.facts.get(id).map(|facts| facts.interface_type.as_str()) {
            Some("trunk") => Kind::Trunk,
            Some("efa") => Kind::Efa,
            _ => Kind::Plain,
        }
    }

    /// Takes ENIs into the pool for which the host is ready. IMDS may list addresses that EC2 has taken away already, so
    /// EC2 is given a moment to speak first.
    pub(super) fn enrol_ready(&mut self) {
        let heard = self.config.imds_only
            || self.described.is_some()
            || (self.asked_ec2 && !self.timers.contains_key(&Timer::Patience));
        if !heard {
            return;
        }
        let new: Vec<EniId> = self.ready.iter().filter(|id| self.pool.eni(id).is_none()).cloned().collect();
        for id in new {
            self.enrol(&id);
        }
    }

    fn enrol(&mut self, id: &EniId) {
        let Some(eni) = self.wanted.get(id).cloned() else { return };
        let table = naming::table_of(eni.card, eni.device);
        let (Some(own), Ok(table)) = (self.own_net(&eni), table) else { return };
        let primary = *id == self.config.identity.primary_eni;
        let mut entry = Eni::new(
            eni.mac,
            (eni.card, eni.device),
            primary,
            self.kind(id),
            table,
            eni.subnet.clone(),
            own,
            self.now.mono,
        );
        entry.excluded = self.not_for_pods(&entry);
        if self.pool.add_eni(id.clone(), entry).is_err() {
            return;
        }
        let cidrs = self.listed.get(id).cloned().unwrap_or_else(|| {
            // As IMDS tells it now: the host may have kept the node from starting for long.
            let mut told = self.told_cidrs(self.attached.get(id).unwrap_or(&eni));
            // What living pods have, and EC2 listed before, is there although IMDS is too far behind to say so.
            let listed = self.trusted.get(id).into_iter().flatten();
            told.extend(listed.filter(|net| self.pool.orphan_in(net)).copied());
            told
        });
        // What only IMDS lists may be gone: nobody new gets it before EC2 has said so.
        // The same holds for what EC2 listed long ago, while IMDS or the host kept the node from starting.
        let stale = |at: Mono| self.phase == Phase::Booting && self.now.mono.since(at) >= RECONCILE;
        let listed = self.listed.contains_key(id) && !self.described.is_some_and(stale);
        let arrived = |net: &IpNet| self.arrived.get(net).is_some_and(|at| !stale(*at));
        let grown = !cidrs.is_empty() && cidrs.iter().all(arrived);
        let confirmed = listed || grown || self.config.imds_only;
        for net in cidrs {
            // IMDS alone is no reason to take it from another ENI.
            if !self.resting(&net) && (confirmed || !self.held_beside(id, &net)) {
                self.add_cidr(id, net);
                self.pool.bar(id, &net, !confirmed);
            }
        }
        if !confirmed && self.described.is_some() {
            self.describe();
        }
        self.acted();
        self.finish_complete();
    }

    /// EC2 has not answered: what it listed before the restart and IMDS lists now serves new pods all the same.
    pub(super) fn trust(&mut self) {
        if self.described.is_some() {
            return;
        }
        for (id, nets) in std::mem::take(&mut self.trusted) {
            let told = self.wanted.get(&id).map(|eni| self.told_cidrs(eni)).unwrap_or_default();
            for net in nets.intersection(&told) {
                self.pool.bar(&id, net, false);
            }
        }
    }

    /// Puts a CIDR into the pool, with the cooldowns that its addresses still have; whether it is new there.
    pub(super) fn add_cidr(&mut self, id: &EniId, net: IpNet) -> bool {
        let mut added = self.pool.add_cidr(id, net);
        if let Err(Refused::Duplicate(other)) = &added {
            if other != id && self.pool.move_cidr(&net, other, id).is_ok() {
                // Somebody took it from the other ENI, and EC2 has given it away again. A pod that had it all the time has
                // it again as soon as its rules lead to the other table.
                self.log(Level::Warn, format!("eni {id}: {net} has moved here from {other}"));
                self.absent.remove(&(other.clone(), Some(net)));
                self.host_dirty = true;
                added = Ok(());
            } else if self.swallows(&net) && self.pool.absorb(id, net).is_ok() {
                // Somebody took single addresses, and EC2 has made them part of a prefix.
                self.absent.retain(|(_, held), _| held.is_none_or(|held| !net.contains(&held)));
                self.host_dirty = true;
                added = Ok(());
            }
        }
        let new = added.is_ok();
        match added {
            Ok(()) => {
                self.absent.remove(&(id.clone(), Some(net)));
                let inside: Vec<IpAddr> = self.cooling.keys().filter(|ip| net.contains(*ip)).copied().collect();
                for address in inside {
                    if let Some(freed) = self.cooling.remove(&address) {
                        self.pool.restore_cooling(address, freed);
                    }
                }
            }
            Err(Refused::Duplicate(other)) if other == *id => {}
            Err(refused) => self.log(Level::Error, format!("eni {id}: add {net}: {refused:?}")),
        }
        new
    }

    // Whether all that the pool has inside this CIDR has been missing from EC2's lists twice, well apart: a list that is
    // behind may show a prefix out of which a single address has come since.
    fn swallows(&self, net: &IpNet) -> bool {
        let held = self.pool.enis().flat_map(|(id, eni)| eni.cidrs().map(move |(held, _)| (id.clone(), Some(*held))));
        let mut inside = held.filter(|(_, held)| held.is_some_and(|held| net.contains(&held)));
        inside.all(|key| self.absent.get(&key).is_some_and(|absent| absent.confirmed))
    }

    /// Requests are served once the host stands and either pods run already or there is an address for the first.
    pub(super) fn become_ready(&mut self) {
        if self.phase != Phase::Booting {
            return;
        }
        let primary = self.pool.eni(&self.config.identity.primary_eni).is_some();
        let usable = self.restarted || self.pool.stats(self.now.mono, 0).total > 0 || self.hopeless();
        if primary && usable {
            self.phase = Phase::Ready;
            let stats = self.pool.stats(self.now.mono, 0);
            let text = format!(
                "ready: {} ENIs, {} addresses, {} in use, {} of unseen CIDRs",
                self.pool.enis().count(),
                stats.total,
                stats.assigned,
                self.pool.orphan_count()
            );
            self.log(Level::Info, text);
            self.out.push(Effect::Ready);
            self.set_timer(Timer::Scan, self.scan_every());
            self.plan_sweep();
        }
    }

    // Whether the trunk and what is not ours take all slots: no ENIConfig is needed for pods with a branch ENI.
    fn only_branches(&self) -> bool {
        let held = self.pool.enis().filter(|(_, eni)| eni.card == 0);
        let trunk = self.pool.enis().any(|(_, eni)| eni.card == 0 && eni.kind == Kind::Trunk);
        trunk && held.count() >= self.sizing(0).eni_limit
    }

    // Nothing will make the pool larger soon: better serve DELs and refuse ADDs with a reason than not to answer.
    fn hopeless(&self) -> bool {
        // A node whose ENIConfig is wrong must not look ready (`spec/kubernetes.md` 4.2).
        if self.config.custom_networking.is_some() && !self.cordoned() && !self.only_branches() {
            return false;
        }
        (self.described.is_some() || self.config.imds_only)
            && !self.growing_now()
            && (self.grown_once || !self.config.provisioning)
    }
}
