//! Keeping what is believed in step with what is: IMDS as the cheap hint, EC2 as the judge (`spec/ipamd.md` 9).
//!
//! IMDS is compared with the pool about once a minute; only a difference makes a call to EC2. What EC2 lists and the pool
//! lacks is taken in. What the pool has and EC2 does not list must be missing twice, well apart, before it is dropped, and
//! is never dropped while a pod uses it.

use super::cards::EFA_ONLY;
use super::{Absent, Core, Level, Op, Phase, RECONCILE_MAX, Tally, Timer, WATCH};
use crate::model::checkpoint::EniFacts;
use crate::model::ec2::{Call, Interface};
use crate::model::ids::{EniId, GroupId};
use crate::model::map::{Entry, Map, Set};
use crate::model::order::{self, Gather as _};
use crate::model::time::Mono;
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// Two observations must be at least so far apart to count as two.
const OBSERVE_AGAIN: Duration = Duration::from_secs(30);
/// IMDS does not show yet what EC2 lists: look again.
const SCAN_AGAIN: Duration = Duration::from_secs(2);
/// How often EC2 is asked again about an ENI that it lists and IMDS does not show: for some minutes, longer than either lags.
const LOOKS_MAX: u32 = 5;
/// The tag by which an ENI's owner keeps it from us, or gives it to us.
const NO_MANAGE: &str = "node.k8s.amazonaws.com/no_manage";

impl Core {
    pub(super) fn describe(&mut self) {
        if !self.config.imds_only && !self.ops.values().any(|op| *op == Op::Describe) {
            let instance = self.config.identity.instance.clone();
            self.ask_ec2(Op::Describe, Call::DescribeAttached(instance));
        }
    }

    pub(super) fn describe_done(&mut self, interfaces: &[Interface]) {
        self.succeeded(Timer::Describe);
        let primary = &self.config.identity.primary_eni;
        if !interfaces.iter().any(|interface| interface.id == *primary) {
            // An instance always has its primary ENI: this is no observation.
            self.log(Level::Warn, format!("EC2 does not list the primary ENI {primary}: ignored"));
            return self.retry(Timer::Describe);
        }
        self.described = Some(self.now.mono);
        let placed = |interface: &Interface| Some((interface.id.clone(), interface.attachment.as_ref()?.device));
        let devices = interfaces.iter().filter_map(placed).gather();
        if devices != self.devices {
            (self.devices, self.looks) = (devices, 0);
        }
        self.place_again();
        self.listed = interfaces.iter().map(|interface| (interface.id.clone(), self.cidrs_of(interface))).gather();
        let before = self.facts.clone();
        for interface in interfaces {
            self.learn(interface);
        }
        let listed: Set<&EniId> = interfaces.iter().map(|interface| &interface.id).gather();
        let ours = listed.iter().copied().filter(|id| self.managed(id)).gather();
        self.miss_enis(&ours);
        let coming = self.coming();
        self.unwant_strangers(&coming);
        self.facts.retain(|id, _| {
            listed.contains(id) || self.pool.eni(id).is_some() || self.freeing.contains_key(id) || coming.contains(id)
        });
        // Named by IMDS alone and used by nobody: what never gets a link must not be waited for.
        let ghosts = self.wanted.keys().filter(|id| !self.facts.contains_key(*id) && self.pool.eni(id).is_none());
        for id in ghosts.cloned().collect::<Vec<_>>() {
            self.log(Level::Warn, format!("eni {id}: EC2 does not list it, forgotten"));
            self.wanted.remove(&id);
            self.ready.remove(&id);
            self.attached.remove(&id);
            self.host_dirty = true;
        }
        for interface in interfaces {
            self.sync_cidrs(interface);
            self.keep_tags(interface);
            self.keep_groups(interface);
        }
        if self.facts != before {
            self.changed();
        }
        let unseen = interfaces.iter().any(|interface| {
            self.managed(&interface.id)
                && !self.attached.contains_key(&interface.id)
                && !self.freeing.contains_key(&interface.id)
        });
        if unseen && self.growths.is_empty() {
            self.set_timer(Timer::Scan, SCAN_AGAIN);
        }
        // What we gave back ourselves is no riddle.
        self.absent.retain(|(id, net), _| {
            let eni = self.pool.eni(id);
            eni.is_some_and(|eni| net.is_none_or(|net| eni.cidrs().any(|(held, _)| *held == net)))
        });
        if self.absent.values().any(|absent| !absent.confirmed) {
            self.set_timer(Timer::Describe, OBSERVE_AGAIN.saturating_add(Duration::from_secs(1)));
        }
    }

    // Facts that only EC2 knows: whose an ENI is, what kind, how to detach it (`spec/ipamd.md` 7.2).
    fn learn(&mut self, interface: &Interface) {
        let own = &self.config.identity.instance;
        let tag = |key: &str| interface.tags.get(key).map(String::as_str);
        let managed = match tag(NO_MANAGE) {
            Some(value) => value != "true",
            None => tag("node.k8s.amazonaws.com/instance_id") == Some(own.as_str()) || self.config.manage_untagged,
        };
        let primary = interface.id == self.config.identity.primary_eni;
        if primary {
            self.conntrack = interface.conntrack;
        }
        let attached = interface.attachment.as_ref();
        let facts = EniFacts {
            managed: managed || primary,
            interface_type: interface.interface_type.clone(),
            card: attached.map_or(0, |attachment| attachment.card),
            attachment: attached.map(|attachment| attachment.id.clone()).unwrap_or_default(),
            cidrs: Vec::new(),
        };
        let known = self.facts.get(&interface.id);
        let unnamed = known.is_none() && !facts.managed && tag(NO_MANAGE).is_none();
        let disowned = known.is_some_and(|known| known.managed) && !facts.managed;
        if known.is_none_or(|known| (known.managed, &known.interface_type) != (facts.managed, &facts.interface_type)) {
            let text = format!(
                "eni {}: {} {}",
                interface.id,
                facts.interface_type,
                if facts.managed { "managed" } else { "not ours" }
            );
            self.log(Level::Info, text);
        }
        if disowned || unnamed {
            // A list that is behind lacks our tags, those of an earlier life too.
            self.set_timer(Timer::Describe, OBSERVE_AGAIN);
        }
        self.facts.insert(interface.id.clone(), facts);
        let kind = self.kind(&interface.id);
        self.pool.set_kind(&interface.id, kind);
    }

    // ENIs of the pool that EC2 does not list any more.
    fn miss_enis(&mut self, listed: &Set<&EniId>) {
        let ids: Vec<EniId> = self.pool.enis().map(|(id, _)| id.clone()).collect();
        for id in ids {
            let key = (id.clone(), None);
            if listed.contains(&id) || id == self.config.identity.primary_eni {
                self.absent.remove(&key);
                continue;
            }
            let Some(again) = self.miss(key) else { continue };
            if !again {
                self.log(Level::Warn, format!("eni {id}: it is not listed as ours to use"));
                self.pool.set_missing(&id, true);
            } else if self.drop_eni(&id) {
                self.log(Level::Warn, format!("eni {id}: detached or claimed by somebody else, dropped"));
                self.tally(Tally::Reconcile("eniReconcileDel"));
            } else {
                self.log(Level::Error, format!("eni {id}: detached or claimed by somebody else while pods use it"));
            }
        }
        for id in listed {
            self.pool.set_missing(id, false);
        }
    }

    /// Brings the CIDRs of an ENI of the pool in line with what EC2 lists.
    pub(super) fn sync_cidrs(&mut self, interface: &Interface) {
        let listed = self.cidrs_of(interface);
        self.listed.insert(interface.id.clone(), listed.clone());
        self.sync_with(&interface.id, &listed);
    }

    fn sync_with(&mut self, id: &EniId, listed: &Set<IpNet>) {
        let held = |core: &Core| core.pool.eni(id).map(|eni| eni.cidrs().map(|(net, _)| *net).gather());
        let Some(before): Option<Set<IpNet>> = held(self) else { return };
        for net in listed.difference(&before) {
            if !self.resting(net) && !self.elsewhere(id, net) {
                self.unassigned.remove(net);
                if self.add_cidr(id, *net) {
                    self.log(Level::Info, format!("eni {id}: {net} is listed, taken in"));
                    self.tally(Tally::Reconcile("eniDataStorePoolReconcileAdd"));
                }
            }
        }
        let after: Set<IpNet> = held(self).unwrap_or_default();
        for net in &after {
            let key = (id.clone(), Some(*net));
            if listed.contains(net) {
                self.absent.remove(&key);
                self.pool.bar(id, net, false);
                continue;
            }
            self.pool.bar(id, net, true);
            if self.miss(key.clone()) != Some(true) {
                continue;
            }
            if self.take_out(id, net) {
                self.log(Level::Warn, format!("eni {id}: {net} is not listed any more, dropped"));
                self.tally(Tally::Reconcile("eniIPPoolReconcileDel"));
                self.absent.remove(&key);
            } else {
                self.log(Level::Error, format!("eni {id}: {net} is not listed, but a pod uses it"));
            }
        }
    }

    /// What EC2 took away goes as soon as the last pod has let it go, before anybody else can get it.
    pub(super) fn drop_absent(&mut self) {
        let confirmed = self.absent.iter().filter(|(_, absent)| absent.confirmed).map(|(key, _)| key.clone());
        for (id, net) in confirmed.collect::<Vec<_>>() {
            let dropped = match net {
                Some(net) => self.take_out(&id, &net),
                None => self.drop_eni(&id),
            };
            if dropped {
                self.log(
                    Level::Warn,
                    format!("eni {id}: {} dropped", net.map_or("the ENI".into(), |net| net.to_string())),
                );
                self.absent.remove(&(id, net));
            }
        }
    }

    /// Takes an unused CIDR out of the pool. EC2 may list it again at once, late as its lists are: the addresses that rest
    /// in it rest to the end.
    pub(super) fn take_out(&mut self, id: &EniId, net: &IpNet) -> bool {
        let resting = self.resting_on(id, Some(net));
        let taken = self.pool.remove_cidr(id, net).is_ok();
        if taken {
            self.cooling.extend(resting);
        }
        taken
    }

    // Addresses in their cooldown on an ENI or in one of its CIDRs, and since when. Those that were kept for the return of
    // a CIDR and have rested are forgotten: most never return.
    fn resting_on(&mut self, id: &EniId, within: Option<&IpNet>) -> Vec<(IpAddr, Mono)> {
        let (now, cooldown) = (self.now.mono, self.pool.cooldown());
        self.cooling.retain(|_, freed| now.since(*freed) < cooldown);
        let here = |address: IpAddr| {
            let net = self.pool.eni(id).and_then(|eni| eni.cidr_of(address));
            net.is_some_and(|net| within.is_none_or(|within| *within == net))
        };
        self.pool.cooling(now).filter(|(address, _)| here(*address)).collect()
    }

    fn drop_eni(&mut self, id: &EniId) -> bool {
        let resting = self.resting_on(id, None);
        let dropped = self.pool.remove_eni(id).is_ok();
        if dropped {
            self.cooling.extend(resting);
            self.absent.retain(|(eni, _), _| eni != id);
            self.wanted.remove(id);
            self.ready.remove(id);
            self.facts.remove(id);
            self.attached.remove(id);
            self.host_dirty = true;
            self.changed();
        }
        dropped
    }

    // One more observation that something is missing: `Some(false)` the first, `Some(true)` when it counts as confirmed, and
    // `None` in between and after that, when there is nothing new to do.
    fn miss(&mut self, key: (EniId, Option<IpNet>)) -> Option<bool> {
        let now = self.now.mono;
        match self.absent.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Absent { since: now, confirmed: false });
                if !self.config.imds_only {
                    // Seen in a look at one ENI, too: nothing else would ever ask again.
                    self.wake_for(Timer::Describe, now.plus(OBSERVE_AGAIN.saturating_add(Duration::from_secs(1))));
                }
                Some(false)
            }
            Entry::Occupied(mut entry) => {
                let again = !entry.get().confirmed && now.since(entry.get().since) >= OBSERVE_AGAIN;
                again.then(|| {
                    entry.get_mut().confirmed = true;
                    true
                })
            }
        }
    }

    fn keep_tags(&mut self, interface: &Interface) {
        let kind = interface.interface_type.as_str();
        if !self.config.provisioning || !self.managed(&interface.id) || matches!(kind, "trunk" | EFA_ONLY) {
            return;
        }
        let missing: Map<String, String> =
            self.tags(false).into_iter().filter(|(key, value)| interface.tags.get(key) != Some(value)).gather();
        if !missing.is_empty() {
            let eni = interface.id.clone();
            self.ask_ec2(Op::Tags(eni.clone()), Call::CreateTags { eni, tags: missing });
        }
    }

    // The groups of the primary ENI are those of all (`spec/ipamd.md` 9.4, B43).
    fn keep_groups(&mut self, interface: &Interface) {
        let Some(groups) = self.groups.as_ref().filter(|_| self.config.custom_networking.is_none()) else { return };
        let mut has = interface.groups.clone();
        order::sort(&mut has);
        let primary = interface.id == self.config.identity.primary_eni;
        let kind = interface.interface_type.as_str();
        let secondary = self.managed(&interface.id) && !primary && matches!(kind, "interface" | "efa");
        if self.config.provisioning && secondary && has != *groups && !groups.is_empty() {
            let call = Call::ModifyGroups { eni: interface.id.clone(), groups: groups.clone() };
            self.ask_ec2(Op::ModifyGroups(interface.id.clone()), call);
        }
    }

    pub(super) fn groups_done(&mut self, mut groups: Vec<GroupId>) {
        self.succeeded(Timer::Groups);
        self.set_timer(Timer::Groups, WATCH);
        order::sort(&mut groups);
        let before = self.groups.replace(groups);
        if before.is_some() && before != self.groups {
            self.log(Level::Info, format!("the primary ENI has the security groups {:?}", self.groups));
            self.describe(); // compares every ENI with them
        }
    }

    /// IMDS told nothing. What others change meanwhile only EC2 can tell.
    pub(super) fn scan_failed(&mut self) {
        self.retry(Timer::Scan);
        let overdue = self.now.mono.since(self.last_reconcile) >= RECONCILE_MAX;
        if overdue && self.phase == Phase::Ready && !self.config.imds_only {
            self.last_reconcile = self.now.mono;
            self.describe();
        }
    }

    /// A scan of IMDS after the first: differences from what is believed are put before EC2.
    pub(super) fn compare_scan(&mut self) {
        self.set_timer(Timer::Scan, self.scan_every());
        // A growth may take long: on a full disk it does not even begin.
        let quiet = self.growths.is_empty() && self.now.mono.since(self.last_action) >= self.scan_every();
        let overdue = self.now.mono.since(self.last_reconcile) >= RECONCILE_MAX;
        if !(quiet || overdue) || self.phase == Phase::Stopping {
            return;
        }
        self.last_reconcile = self.now.mono;
        self.unassigned.retain(|_, at| self.now.mono.since(*at) < RECONCILE_MAX);
        self.arrived.retain(|_, at| self.now.mono.since(*at) < RECONCILE_MAX);
        let difference = self.difference();
        if self.config.imds_only {
            return self.believe_imds(difference.as_deref());
        }
        if let Some(difference) = difference {
            let text = format!("IMDS and pool differ ({difference}); asking EC2");
            self.log(Level::Info, text);
            self.describe();
        } else if self.devices.keys().any(|id| !self.attached.contains_key(id) && !self.freeing.contains_key(id)) {
            // EC2 listed an ENI that IMDS does not show. If somebody has detached it, it takes no slot any more, which no
            // difference would ever tell; if IMDS never shows it, asking for ever is of use only to pods without an address.
            if self.looks < LOOKS_MAX || self.demand(0) > 0 {
                self.looks = self.looks.saturating_add(1);
                self.describe();
            }
        } else if self.looks < LOOKS_MAX && self.demand(0) > 0 && self.facts.keys().any(|id| !self.managed(id)) {
            // What is not ours takes slots that pods wait for: a list that was behind may have lacked our tags.
            if self.described.is_none_or(|at| self.now.mono.since(at) >= RECONCILE_MAX) {
                self.looks = self.looks.saturating_add(1);
                self.describe();
            }
        }
    }

    // IMDS is all there is: what it adds is taken in, what it lacks twice, well apart, is dropped as soon as nobody uses it.
    fn believe_imds(&mut self, difference: Option<&str>) {
        if let Some(difference) = difference {
            self.log(Level::Info, format!("IMDS and pool differ ({difference})"));
        } else if self.absent.is_empty() {
            return; // what was missing and pods use may be listed again, which is no difference
        }
        let listed: Set<EniId> = self.attached.keys().cloned().gather();
        self.miss_enis(&listed.iter().gather());
        for eni in self.attached.values().cloned().collect::<Vec<_>>() {
            let told = self.told_cidrs(&eni);
            self.sync_with(&eni.id, &told);
        }
        if self.absent.values().any(|absent| !absent.confirmed) {
            self.wake_for(Timer::Scan, self.now.mono.plus(OBSERVE_AGAIN.saturating_add(Duration::from_secs(1))));
        }
    }

    // Whether EC2 has put it elsewhere while a pod uses it where it was: the pool follows when the pod is gone.
    fn lost(&self, net: &IpNet) -> bool {
        self.absent.iter().any(|((_, held), absent)| *held == Some(*net) && absent.confirmed)
    }

    fn difference(&self) -> Option<String> {
        for (id, eni) in &self.attached {
            let useless = !self.managed(id) || self.own_address(eni).is_none();
            if self.freeing.contains_key(id) || (self.facts.contains_key(id) && useless) {
                continue; // EC2 knows it, and it is not for pods
            }
            let Some(entry) = self.pool.eni(id) else { return Some(format!("{id} is new")) };
            let listed = self.told_cidrs(eni);
            let held: Set<IpNet> = entry.cidrs().map(|(net, _)| *net).gather();
            let known = |net: &IpNet| self.absent.contains_key(&(id.clone(), Some(*net))) || self.lost(net);
            let differing = listed.difference(&held).chain(held.difference(&listed));
            let odd = differing.filter(|net| !self.resting(net) && !known(net)).min();
            if let Some(net) = odd {
                return Some(format!("{net} on {id}"));
            }
        }
        let known = self.pool.enis().map(|(id, _)| id).chain(self.wanted.keys());
        let missing = known
            .filter(|id| !self.attached.contains_key(*id) && !self.absent.contains_key(&((*id).clone(), None)))
            .find(|id| !self.freeing.contains_key(*id));
        if let Some(id) = missing {
            return Some(format!("{id} is missing"));
        }
        // Somebody may have detached it, and IMDS may be behind. Asked once, since a link may be in a container for good.
        let asked = |at: Mono| self.described.is_none_or(|described| described > at);
        let unlinked = self.refused.iter().find(|(id, at)| self.pool.eni(id).is_some() && !asked(**at));
        unlinked.map(|(id, _)| format!("{id} cannot be set up"))
    }
}
