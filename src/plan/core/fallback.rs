//! Prefix mode in a subnet without a free block: single addresses stand in until prefixes are to be had again.
//!
//! A /28 is sixteen addresses in a row that begin at a multiple of sixteen. A subnet that many nodes share has none left
//! long before it is full, and the original then gives pods nothing at all (`field.md` A10, C25). Here what EC2 refuses
//! as prefixes is asked for as single addresses, as many as pods need and a few more. The subnet is asked for a prefix
//! again and again, less and less often. New pods take prefixes first wherever there are any; single addresses that
//! nobody uses go back once there are enough prefixes. The same way goes what a change of the mode has left behind.

use super::{Core, Level, Op, Timer};
use crate::model::ec2::{Count, Failure};
use crate::model::ids::{EniId, SubnetId};
use crate::model::map::Map;
use crate::model::order;
use crate::model::time::{Mono, Now, Wall};
use crate::plan::backoff::Backoff;
use crate::plan::pool::{Eni, Kind, Pool};
use crate::plan::sizing::{Growth, Outlook, Sizing, WARM_SINGLES};
use ipnet::IpNet;
use std::cmp::Reverse;
use std::time::Duration;

/// Pauses before a subnet without free blocks is asked for a prefix again.
const AGAIN: Backoff = Backoff { first: Duration::from_mins(2), cap: Duration::from_mins(30), jitter_percent: 20 };
/// A subnet that was not asked for so long after its pause is one like others again.
const FORGET: Duration = Duration::from_mins(30);

/// What is remembered of a subnet that refused a prefix.
#[derive(Clone, Copy, Debug)]
struct Refused {
    // Refusals of a single prefix in a row; 0: only several at a time were refused.
    times: u32,
    // No prefix is asked for before.
    until: Mono,
}

/// Subnets that lately had no free block for a prefix.
#[derive(Debug, Default)]
pub(super) struct Fragmented(Map<SubnetId, Refused>);

impl Fragmented {
    /// Whether the subnet is not to be asked for prefixes now.
    pub(super) fn closed(&self, subnet: &SubnetId, now: Mono) -> bool {
        self.0.get(subnet).is_some_and(|refused| refused.until > now)
    }

    /// Prefixes that one call may ask for: a subnet that refused several may still have one.
    pub(super) fn at_most(&self, subnet: &SubnetId, count: usize) -> usize {
        if self.0.contains_key(subnet) { count.min(1) } else { count }
    }

    /// A subnet that is not to be asked now, and until when.
    pub(super) fn first_closed(&self, now: Mono) -> Option<(&SubnetId, Mono)> {
        self.0.iter().find(|(_, refused)| refused.until > now).map(|(subnet, refused)| (subnet, refused.until))
    }

    /// For the checkpoint: refusals in a row, and the end of the pause in Unix nanoseconds.
    pub(super) fn saved(&self, now: Now) -> impl Iterator<Item = (SubnetId, (u32, i64))> {
        self.0.iter().map(move |(subnet, refused)| {
            let until = now.wall.plus(refused.until.since(now.mono));
            (subnet.clone(), (refused.times, until.as_unix_nanos()))
        })
    }
}

impl Core {
    /// Takes over what the former run knew; the pauses go on, however the clock was set meanwhile.
    pub(super) fn restore_fragmented(&mut self, saved: Map<SubnetId, (u32, i64)>) {
        for (subnet, (times, until)) in saved {
            let left = Wall::from_unix_nanos(until).since(self.now.wall).min(AGAIN.cap);
            self.fragmented.0.insert(subnet, Refused { times, until: self.now.mono.plus(left) });
        }
        self.let_singles_serve();
    }

    /// EC2 has no block for so many prefixes in a subnet.
    pub(super) fn no_prefix(&mut self, subnet: &SubnetId, asked: u32, failure: &Failure) {
        let refused = self.fragmented.0.entry(subnet.clone()).or_insert(Refused { times: 0, until: self.now.mono });
        if asked > 1 {
            self.changed();
            return; // one may still be there
        }
        let pause = AGAIN.pause(refused.times, &mut self.random);
        refused.times = refused.times.saturating_add(1);
        refused.until = self.now.mono.plus(pause);
        let until = refused.until;
        let text = format!(
            "subnet {subnet} has no free block for a prefix: single addresses stand in, next try in {} s: {failure}",
            pause.as_secs()
        );
        self.log(Level::Warn, text);
        self.tally(super::Tally::Error("subnetFragmented"));
        self.wake_for(Timer::Shrink, until);
        self.let_singles_serve();
        self.changed();
    }

    /// A subnet gave prefixes.
    pub(super) fn prefix_came(&mut self, subnet: &SubnetId) {
        let now = self.now.mono;
        let refused = self.fragmented.0.get_mut(subnet).filter(|refused| refused.times > 0);
        if let Some(refused) = refused {
            *refused = Refused { times: 0, until: now };
            self.log(Level::Info, format!("subnet {subnet} has room for prefixes again"));
            self.let_singles_serve();
            self.changed();
        }
    }

    /// Forgets refusals of long ago.
    pub(super) fn forget_fragmented(&mut self) {
        let (now, before) = (self.now.mono, self.fragmented.0.len());
        self.fragmented.0.retain(|_, refused| now.since(refused.until) < FORGET);
        if self.fragmented.0.len() != before {
            self.let_singles_serve();
            self.changed();
        }
    }

    /// Whether CIDRs of the card are being given back.
    pub(super) fn unassigning(&self, card: u32) -> bool {
        self.ops.values().any(|op| match op {
            Op::Unassign(eni, _) => self.pool.eni(eni).is_some_and(|eni| eni.card == card),
            _ => false,
        })
    }

    /// Whether CIDRs of the other kind will soon leave slots to those of the mode: a new ENI can wait, unless pods do.
    pub(super) fn strays_leave(&self, card: u32) -> bool {
        let stray = |(id, _): &(EniId, Vec<IpNet>)| self.pool.eni(id).is_some_and(Eni::serves);
        let strays = self.sizing(card).strays(&self.pool, self.now.mono);
        strays.iter().any(stray)
    }

    fn let_singles_serve(&mut self) {
        let refused = self.fragmented.0.values().any(|refused| refused.times > 0);
        self.pool.set_singles(refused);
    }

    /// Begins a growth by single addresses, if prefixes are missing and not to be had.
    pub(super) fn grow_singles(&mut self, card: u32, outlook: &Outlook) -> bool {
        if !self.pool.prefix_mode() || !self.pool.singles() {
            return false;
        }
        let sizing = self.sizing(card);
        match sizing.growth_by_singles(&self.pool, self.now.mono, outlook, &|id| self.skipped(id)) {
            None => false,
            Some(Growth::Assign { eni, count }) => {
                self.begin_assign(card, eni, count_of(false, count));
                true
            }
            Some(Growth::NewEni { count }) => self.place_known() && self.create(card, count_of(false, count)),
        }
    }
}

impl Sizing {
    /// Growth by single addresses in prefix mode: for the pods that are there, and a few to spare as long as that leaves
    /// a slot for a prefix to come back.
    fn growth_by_singles(
        &self,
        pool: &Pool,
        now: Mono,
        outlook: &Outlook,
        skip: &dyn Fn(&EniId) -> bool,
    ) -> Option<Growth> {
        let stats = self.with_outlook(pool, pool.stats(now, self.card), outlook);
        let total = stats.total + outlook.singles;
        if total >= self.max_pods || !self.lacks(pool, now, outlook) {
            return None;
        }
        let (warm, minimum) = self.ip_targets().unwrap_or((WARM_SINGLES, 0));
        let needed = stats.assigned.saturating_sub(total);
        let warm = (stats.assigned + warm).saturating_sub(total).max(minimum.saturating_sub(total));
        let room = self.free_slots(pool, outlook).saturating_sub(1);
        let wanted = needed.max(warm.min(room));
        self.place(pool, outlook, wanted, None, skip)
    }

    // Slots for CIDRs on the card's ENIs and on those that it could still get.
    fn free_slots(&self, pool: &Pool, outlook: &Outlook) -> usize {
        let held = || pool.enis().filter(|(_, eni)| eni.card == self.card);
        let on_enis = held().filter(|(_, eni)| eni.kind != Kind::Trunk && eni.serves());
        let free: usize = on_enis.map(|(_, eni)| self.slots.saturating_sub(eni.cidr_count())).sum();
        let more = self.eni_limit.saturating_sub(held().count() + self.reserved);
        let coming = outlook.assigning.values().chain(&outlook.creating).sum::<usize>() + outlook.singles;
        (free + more * self.slots).saturating_sub(coming)
    }

    // Single addresses in prefix mode that nobody needs: all of them, unless they stand in for prefixes.
    fn spare_singles(&self, pool: &Pool, now: Mono) -> usize {
        if !pool.singles() || !self.lacks(pool, now, &Outlook::default()) {
            return usize::MAX;
        }
        let stats = self.with_demand(pool.stats(now, self.card));
        let (warm, minimum) = self.ip_targets().unwrap_or((WARM_SINGLES, 0));
        let over = stats.total.saturating_sub((stats.assigned + warm).max(minimum));
        // A prefix needs a slot to come back.
        if self.free_slots(pool, &Outlook::default()) == 0 { over.max(1) } else { over }
    }

    /// CIDRs to give back because they are of the other kind than the mode's, or their ENI is excluded (`spec/ipamd.md`
    /// 4.5, 7.6, B15, B16, B49). What a pod uses or has just used stays.
    pub(super) fn strays(&self, pool: &Pool, now: Mono) -> Vec<(EniId, Vec<IpNet>)> {
        let stray = |eni: &Eni| eni.excluded || eni.cidrs().any(|(_, cidr)| cidr.prefix != pool.prefix_mode());
        let mut enis: Vec<(&EniId, &Eni)> =
            pool.enis().filter(|(_, eni)| eni.card == self.card && stray(eni)).collect();
        if enis.is_empty() {
            return Vec::new();
        }
        let mut over = if pool.prefix_mode() { self.spare_singles(pool, now) } else { usize::MAX };
        order::sort_by_key(&mut enis, |(_, eni)| (eni.assigned(), Reverse(eni.device)));
        let mut strays = Vec::new();
        for (id, eni) in enis {
            let mut idle = pool.idle_cidrs(id, now, !pool.prefix_mode());
            if eni.excluded {
                idle.extend(pool.idle_cidrs(id, now, pool.prefix_mode()));
            } else {
                idle.truncate(over);
                over -= idle.len();
            }
            if !idle.is_empty() {
                strays.push((id.clone(), idle));
            }
        }
        strays
    }
}

/// So many CIDRs of the mode.
pub(super) fn count_of(prefix_mode: bool, cidrs: usize) -> Count {
    let cidrs = u32::try_from(cidrs).unwrap_or(u32::MAX);
    if prefix_mode { Count::Prefixes(cidrs) } else { Count::Addresses(cidrs) }
}
