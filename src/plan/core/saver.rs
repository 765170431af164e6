//! Durable before told: every change that must survive a crash gets a generation, and what depends on it (a reply, a call
//! to EC2) waits until a checkpoint of that generation or a later one is on disk. One write is in flight at a time, so
//! that requests which arrive meanwhile share the next one.

use super::{Answer, Core, Effect, Level, Op, Timer};
use crate::model::checkpoint::{Allocation, Draft, EniFacts, Freeing, Metadata, Own};
use crate::model::ec2::{Call, Failure};
use crate::model::ids::{EniId, PodKey};
use crate::model::kube;
use crate::model::map::Map;
use crate::model::order::Gather as _;
use crate::plan::pool::{Eni, Held, Owner, Released};
use std::net::IpAddr;
use std::sync::Arc;

// An effect that waits for a generation. If that cannot be made durable, the change is undone and the caller is told.
#[derive(Debug)]
struct Pending {
    generation: u64,
    effect: Effect,
    undo: Undo,
}

// The entries of a file, in the pool's order, each with the address and the owner that it was made of. A node has a thousand,
// and a step changes one: to find which, neither owners nor texts are looked at, and a list that nobody writes any more is
// changed in place.
#[derive(Debug, Default)]
struct Listed {
    made_of: Vec<(IpAddr, Arc<Owner>)>,
    texts: Arc<Vec<Arc<str>>>,
}

/// How to take back a change that could not be made durable.
#[derive(Debug)]
pub(super) enum Undo {
    Nothing,
    Assign(PodKey, Vec<u32>),
    Release(Vec<Released>),
}

#[derive(Debug, Default)]
pub(super) struct Saver {
    current: u64,
    written: u64,
    in_flight: bool,
    // What was last written for the cards above 0. Only what differs is written: a node may have 32 of them.
    cards: Map<u32, Draft>,
    // What the last draft of each card's file was made of.
    listed: Map<u32, Listed>,
    pending: Vec<Pending>,
}

impl Saver {
    pub(super) fn idle(&self) -> bool {
        !self.in_flight && self.current == self.written
    }

    /// Whether everything up to `generation` is on disk.
    pub(super) fn durable(&self, generation: u64) -> bool {
        self.written >= generation
    }
}

// A call that had to wait for the disk, which failed.
fn never_sent(call: &Call, error: &str) -> Failure {
    Failure {
        action: call.action(),
        code: String::new(),
        message: format!("not sent: write checkpoint: {error}"),
        status: 0,
        request_id: String::new(),
        maybe_applied: false,
    }
}

fn entry_of(held: &Held<'_>) -> Arc<str> {
    let owner = held.owner;
    let (ipv4, ipv6) = match held.address {
        IpAddr::V4(ip) => (Some(ip), None),
        IpAddr::V6(ip) => (None, Some(ip)),
    };
    let allocation = Allocation {
        network: owner.key.network.clone(),
        container: owner.key.container.clone(),
        ifname: owner.key.ifname.clone(),
        ipv4,
        ipv6,
        timestamp: owner.since.as_unix_nanos(),
        metadata: Metadata {
            namespace: owner.pod.namespace.clone(),
            name: owner.pod.name.clone(),
            interfaces: owner.interfaces,
        },
    };
    allocation.to_text().into()
}

impl Listed {
    // Brings the list up to date; whatever differs between the two is made anew.
    fn update<'a>(&mut self, all: impl Iterator<Item = Held<'a>>) {
        let texts = Arc::make_mut(&mut self.texts);
        let mut at = 0;
        for held in all {
            let same =
                |(address, owner): &(IpAddr, Arc<Owner>)| Arc::ptr_eq(owner, held.owner) && *address == held.address;
            if let Some(gone) = self.made_of.get(at..).and_then(|rest| rest.iter().position(same)) {
                self.made_of.drain(at..at + gone);
                texts.drain(at..at + gone);
            } else {
                self.made_of.insert(at, (held.address, Arc::clone(held.owner)));
                texts.insert(at, entry_of(&held));
            }
            at += 1;
        }
        self.made_of.truncate(at);
        texts.truncate(at);
    }
}

impl Core {
    /// Notes a change; the result is its generation.
    pub(super) fn changed(&mut self) -> u64 {
        self.saver.current += 1;
        self.saver.current
    }

    /// Lets `effect` out once everything that was changed so far is durable; if that fails, takes the change back and, if
    /// it was to be a reply, says so instead.
    pub(super) fn when_durable(&mut self, effect: Effect, undo: Undo) {
        let generation = self.saver.current;
        if self.saver.durable(generation) {
            self.let_out(effect);
        } else {
            self.saver.pending.push(Pending { generation, effect, undo });
            self.timers.remove(&Timer::Save); // somebody waits: no pause before the next attempt
        }
    }

    // Calls to EC2 take their turn.
    fn let_out(&mut self, effect: Effect) {
        match effect {
            Effect::Ec2(op, call) => self.pacer.submit(op, call),
            effect => self.out.push(effect),
        }
    }

    pub(super) fn save(&mut self) {
        let paused = self.timers.contains_key(&Timer::Save);
        if !self.saver.in_flight && !paused && self.saver.written < self.saver.current {
            self.saver.in_flight = true;
            let cards: Vec<u32> = self.config.cards.keys().copied().collect();
            let mut content: Vec<(u32, Draft)> = cards.into_iter().map(|card| (card, self.checkpoint(card))).collect();
            content.retain(|(card, file)| *card == 0 || self.saver.cards.get(card) != Some(file));
            self.saver.cards.extend(content.iter().filter(|(card, _)| *card > 0).cloned());
            self.out.push(Effect::Save(self.saver.current, content));
        }
    }

    pub(super) fn saved(&mut self, generation: u64, result: Result<(), String>) {
        self.saver.in_flight = false;
        let Err(error) = result else {
            self.succeeded(Timer::Save);
            self.saver.written = self.saver.written.max(generation);
            for pending in std::mem::take(&mut self.saver.pending) {
                if self.saver.durable(pending.generation) {
                    self.let_out(pending.effect);
                } else {
                    self.saver.pending.push(pending);
                }
            }
            return;
        };
        self.log(Level::Error, format!("write checkpoint: {error}"));
        self.saver.cards.clear(); // whichever of them was written
        // Newest first, so that each change is undone on the state that it made.
        for Pending { effect, undo, .. } in std::mem::take(&mut self.saver.pending).into_iter().rev() {
            match undo {
                Undo::Nothing => {}
                Undo::Assign(key, cards) => cards.iter().for_each(|card| self.pool.undo_assign(&key, *card)),
                Undo::Release(all) => {
                    for released in all {
                        self.released.remove(&released.address);
                        self.cooling.remove(&released.address);
                        self.pool.undo_release(released);
                    }
                }
            }
            match effect {
                Effect::Reply(call, _) => {
                    self.out.push(Effect::Reply(call, Answer::Error(format!("write checkpoint: {error}"))));
                }
                Effect::Kube(op, _) => {
                    if let Some(Op::Annotate(annotated)) = self.ops.remove(&op) {
                        let failure = kube::Failure { status: 0, message: format!("write checkpoint: {error}") };
                        self.annotated(annotated, Some(failure));
                    }
                }
                Effect::Ec2(op, call) => self.ec2_done(op, Err(never_sent(&call, &error))),
                _ => {} // comes again with its cause
            }
        }
        // Whether the failed write reached the disk is not known, so the undone state is written too.
        self.changed();
        self.retry(Timer::Save);
    }

    // Each card's file holds its allocations; what is ours stands in that of card 0.
    fn checkpoint(&mut self, card: u32) -> Draft {
        let listed = self.saver.listed.entry(card).or_default();
        listed.update(self.pool.allocations().filter(|held| held.card == card));
        let allocations = Arc::clone(&listed.texts);
        Draft { allocations, enibox: (card == 0).then(|| self.own()) }
    }

    // What EC2 has confirmed may be trusted after a restart, should EC2 not answer then.
    fn facts_with_cidrs(&self, id: &EniId, facts: &EniFacts) -> EniFacts {
        let cidrs = self.pool.eni(id).into_iter().flat_map(Eni::cidrs);
        let confirmed = cidrs.filter(|(_, cidr)| !cidr.barred).map(|(net, _)| *net);
        EniFacts { cidrs: confirmed.collect(), ..facts.clone() }
    }

    fn own(&self) -> Own {
        let unseen = self.cooling.iter().map(|(ip, freed)| (*ip, *freed));
        let unseen = unseen.filter(|(_, freed)| self.now.mono.since(*freed) < self.pool.cooldown());
        let cooling = self.pool.cooling(self.now.mono).chain(unseen);
        let freed_at = |freed| {
            let age = i64::try_from(self.now.mono.since(freed).as_nanos()).unwrap_or(i64::MAX);
            self.now.wall.as_unix_nanos().saturating_sub(age)
        };
        let given_back = self.unassigned.iter().map(|(net, at)| (*net, freed_at(*at)));
        let creating = self.growths.values().filter_map(|growth| growth.creating().cloned());
        let freeing =
            self.freeing.iter().map(|(id, free)| (id.clone(), Freeing { attachment: free.attachment.clone() }));
        Own {
            written: Some((self.now.mono.as_nanos(), self.now.wall.as_unix_nanos())),
            enis: self.facts.iter().map(|(id, facts)| (id.clone(), self.facts_with_cidrs(id, facts))).gather(),
            cooling: cooling.map(|(ip, freed)| (ip, freed_at(freed))).gather(),
            given_back: given_back.gather(),
            excluded_subnets: self.judgement.excluded(),
            fragmented: self.fragmented.saved(self.now).gather(),
            leak_suspected: self.leak_checks > 0,
            creating: creating.chain(self.resume.iter().cloned()).collect(),
            freeing: freeing.gather(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::PodName;
    use crate::model::time::Wall;

    #[test]
    fn a_list_is_that_of_the_pool_and_keeps_what_stays() {
        let pod = |name: &str| {
            let key = PodKey { network: "aws-cni".into(), container: name.into(), ifname: "eth0".into() };
            Arc::new(Owner { key, pod: PodName::default(), interfaces: 1, since: Wall::from_unix_seconds(5) })
        };
        let (a, b, c, again) = (pod("a"), pod("b"), pod("c"), pod("a"));
        let mut list = Listed::default();
        let mut check = |all: &[(u8, &Arc<Owner>)], kept: usize| {
            let address = |last| IpAddr::from([10, 0, 0, last]);
            let held = || all.iter().map(|(last, owner)| Held { address: address(*last), owner, card: 0, table: None });
            let before = list.texts.to_vec();
            list.update(held());
            let mut fresh = Listed::default();
            fresh.update(held());
            assert_eq!((&list.texts, &list.made_of), (&fresh.texts, &fresh.made_of), "{all:?}");
            let same = list.texts.iter().filter(|text| before.iter().any(|old| Arc::ptr_eq(old, text))).count();
            assert_eq!(same, kept, "{all:?}");
        };
        check(&[(1, &a)], 0);
        check(&[(1, &a), (3, &c)], 1);
        check(&[(1, &a), (2, &b), (3, &c)], 2);
        check(&[(2, &b), (3, &c)], 2);
        check(&[(1, &again), (2, &b), (3, &c)], 2);
        check(&[(1, &a), (2, &b), (3, &c)], 2);
        check(&[(1, &a), (3, &c)], 2);
        check(&[(1, &a), (4, &c)], 1);
        check(&[(4, &c), (1, &a)], 1);
        check(&[], 0);
    }
}
