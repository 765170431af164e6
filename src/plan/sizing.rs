//! How large a pool should be: targets against figures, and the one growth or shrink that follows (`spec/ipamd.md` 6).
//!
//! Pure arithmetic. The letters of the specification stand in the comments: T total, A assigned, V available, P prefixes,
//! F free prefixes, W/M/WE/WP the targets, E the ENI limit.

use super::pool::{Eni, Kind, Pool, Stats};
use crate::model::ids::EniId;
use crate::model::map::Map;
use crate::model::order;
use crate::model::time::Mono;
use ipnet::IpNet;
use std::cmp::Reverse;
use std::time::Duration;

/// Addresses in an IPv4 prefix (/28).
pub const PREFIX_ADDRESSES: usize = 16;
/// An ENI younger than this is not freed (`spec/ipamd.md` 6.1).
pub const ENI_AGE_MIN: Duration = Duration::from_mins(1);

/// Single addresses kept ready in place of WARM_PREFIX_TARGET while prefixes are not to be had. Sixteen for each prefix
/// would take the slots that prefixes need to come back.
pub const WARM_SINGLES: usize = 4;

/// The warm targets; 0 in `warm_ip` and `minimum_ip` means that they are not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets {
    /// WARM_ENI_TARGET (WE).
    pub warm_eni: usize,
    /// WARM_IP_TARGET (W).
    pub warm_ip: usize,
    /// MINIMUM_IP_TARGET (M).
    pub minimum_ip: usize,
    /// WARM_PREFIX_TARGET (WP).
    pub warm_prefix: usize,
}

/// Everything besides the pool itself that decides about its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// Network card of the pool.
    pub card: u32,
    /// Targets as set; cards above 0 have their own (6.1).
    pub targets: Targets,
    /// CIDRs that fit on one ENI besides its own address.
    pub slots: usize,
    /// ENIs that the card may hold: E minus the unmanaged ones.
    pub eni_limit: usize,
    /// Slots kept for a trunk ENI that is still to come (6.8).
    pub reserved: usize,
    /// Pods that the node may run.
    pub max_pods: usize,
    /// Pods that need an address and have none: they count as if they had.
    pub demand: usize,
}

/// What is wanted and what is on its way, besides what the pool shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// A pod waits: addresses in their cooldown do not count as available (B59).
    pub starved: bool,
    /// CIDRs that are being assigned to ENIs of the pool.
    pub assigning: Map<EniId, usize>,
    /// New ENIs that are being made, with the CIDRs that each will carry.
    pub creating: Vec<usize>,
    /// In prefix mode: single addresses that are on their way, which the two above do not count.
    pub singles: usize,
}

/// What to ask EC2 for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Growth {
    /// More CIDRs on an ENI that has room.
    Assign {
        /// The ENI.
        eni: EniId,
        /// CIDRs.
        count: usize,
    },
    /// A new ENI.
    NewEni {
        /// CIDRs that it carries from the start.
        count: usize,
    },
}

impl Sizing {
    // W and M in force, if the IP targets are set at all (6.3).
    pub(super) fn ip_targets(&self) -> Option<(usize, usize)> {
        match (self.card, self.targets.warm_ip, self.targets.minimum_ip) {
            (1.., _, _) => Some((1, 1)),
            (0, 0, 0) => None,
            (0, warm, minimum) => Some((warm, minimum)),
        }
    }

    fn addresses_per_eni(&self, prefix_mode: bool) -> usize {
        if prefix_mode { self.slots * PREFIX_ADDRESSES } else { self.slots }
    }

    // WP = 0 without an IP target would free and assign the same prefix for ever (B28).
    fn warm_prefix(&self) -> usize {
        self.targets.warm_prefix
    }

    /// Missing and surplus CIDRs under the IP targets; `None` when none is set (6.3, with B21 for every card).
    pub fn deviation(&self, stats: &Stats, prefix_mode: bool) -> Option<(usize, usize)> {
        let (warm, minimum) = self.ip_targets()?;
        let (total, assigned, available) = (stats.total, stats.assigned, stats.available());
        let short = (warm + assigned).saturating_sub(total).max(minimum.saturating_sub(total));
        let over = available.saturating_sub(warm).min(total.saturating_sub(minimum));
        if !prefix_mode {
            return Some((short, over));
        }
        let need_warm = (assigned + warm).div_ceil(PREFIX_ADDRESSES);
        let need_minimum = minimum.div_ceil(PREFIX_ADDRESSES);
        let over = stats
            .free_prefixes
            .min(stats.prefixes.saturating_sub(need_warm))
            .min(stats.prefixes.saturating_sub(need_minimum));
        Some((short.div_ceil(PREFIX_ADDRESSES), over))
    }

    /// Whether the pool is too small (6.4).
    pub fn too_low(&self, stats: &Stats, prefix_mode: bool) -> bool {
        if stats.total >= self.max_pods {
            return false;
        }
        if let Some((short, _)) = self.deviation(stats, prefix_mode) {
            return short > 0;
        }
        let (warm, unit) = self.warm_unit(prefix_mode);
        stats.total < stats.assigned + unit * warm || (warm == 0 && stats.total <= stats.assigned)
    }

    fn warm_unit(&self, prefix_mode: bool) -> (usize, usize) {
        if prefix_mode { (self.warm_prefix(), PREFIX_ADDRESSES) } else { (self.targets.warm_eni, self.slots) }
    }

    // CIDRs wanted in one step (6.6). Without an IP target a single address is never asked for alone: an ENI's worth is.
    fn wanted(&self, stats: &Stats, prefix_mode: bool) -> usize {
        match (self.deviation(stats, prefix_mode), prefix_mode) {
            (Some((short, _)), true) => short.max(1),
            (Some((short, _)), false) => short,
            (None, true) => {
                let warm = self.warm_prefix();
                let missing = (stats.assigned + warm * PREFIX_ADDRESSES).saturating_sub(stats.total);
                // Pods that wait need more than the warm target; without them the original's figure counts.
                let waiting = if stats.assigned > stats.total { missing.div_ceil(PREFIX_ADDRESSES) } else { 0 };
                warm.saturating_sub(stats.free_prefixes).max(waiting).max(1)
            }
            (None, false) => self.slots,
        }
    }

    pub(super) fn with_demand(&self, stats: Stats) -> Stats {
        Stats { assigned: stats.assigned + self.demand, ..stats }
    }

    // The pool as it will be once everything has come, and with every waiting pod served.
    fn foreseen(&self, pool: &Pool, now: Mono, outlook: &Outlook) -> Stats {
        self.with_outlook(pool, pool.stats_of_mode(now, self.card), outlook)
    }

    /// Adds to figures of the pool what is on its way and what is wanted.
    pub(super) fn with_outlook(&self, pool: &Pool, mut stats: Stats, outlook: &Outlook) -> Stats {
        if outlook.starved {
            stats.total -= stats.cooling;
            stats.cooling = 0;
        }
        let coming = outlook.assigning.values().chain(&outlook.creating).sum::<usize>();
        let prefixes = if pool.prefix_mode() { coming } else { 0 };
        stats.total += if pool.prefix_mode() { coming * PREFIX_ADDRESSES } else { coming };
        stats.prefixes += prefixes;
        stats.free_prefixes += prefixes;
        stats.assigned += self.demand;
        stats
    }

    /// The next growth that is due beside those on their way, if any (6.4, 6.6 to 6.8): asked again with its answer in the
    /// outlook, it gives the whole deficit. `skip` names ENIs that cannot take more now (their subnet is exhausted).
    pub fn growth(&self, pool: &Pool, now: Mono, outlook: &Outlook, skip: impl Fn(&EniId) -> bool) -> Option<Growth> {
        let prefix_mode = pool.prefix_mode();
        let stats = self.foreseen(pool, now, outlook);
        if !self.too_low(&stats, prefix_mode) {
            return None;
        }
        let wanted = self.wanted(&stats, prefix_mode);
        // With ENI targets a whole ENI's worth is asked for where less would do.
        let by_eni = !prefix_mode && self.ip_targets().is_none();
        let target = stats.assigned + (self.slots * self.targets.warm_eni).max(1);
        let deficit = by_eni.then(|| target.saturating_sub(stats.total));
        self.place(pool, outlook, wanted, deficit, &skip)
    }

    /// Whether CIDRs of the mode are missing, those on their way counted as there.
    pub(super) fn lacks(&self, pool: &Pool, now: Mono, outlook: &Outlook) -> bool {
        self.too_low(&self.foreseen(pool, now, outlook), pool.prefix_mode())
    }

    /// Where `wanted` more CIDRs can go: to the first ENI with room, else to a new one. `deficit` is what is missing, if
    /// that is not the same.
    pub(super) fn place(
        &self,
        pool: &Pool,
        outlook: &Outlook,
        wanted: usize,
        deficit: Option<usize>,
        skip: &dyn Fn(&EniId) -> bool,
    ) -> Option<Growth> {
        if wanted == 0 {
            return None;
        }
        let coming = |id: &EniId| outlook.assigning.get(id).copied();
        let room = |id: &EniId, eni: &Eni| self.slots.saturating_sub(eni.cidr_count() + coming(id).unwrap_or(0));
        let mut candidates: Vec<_> = pool
            .enis()
            .filter(|(id, eni)| {
                let takes = eni.card == self.card && eni.kind != Kind::Trunk && eni.serves();
                takes && room(id, eni) > 0 && !skip(id)
            })
            .collect();
        order::sort_by_key(&mut candidates, |(_, eni)| eni.device);
        if let Some((id, eni)) = candidates.iter().find(|(id, _)| coming(id).is_none()) {
            return Some(Growth::Assign { eni: (*id).clone(), count: wanted.min(room(id, eni)) });
        }
        // An ENI that is being assigned to or made takes the rest when that is done: no further one is made for what it has
        // room for.
        let made = outlook.creating.iter().map(|count| self.slots.saturating_sub(*count));
        let later: usize = candidates.iter().map(|(id, eni)| room(id, eni)).chain(made).sum();
        if deficit.unwrap_or(wanted) <= later {
            return None;
        }
        let wanted = if deficit.is_some() { wanted } else { wanted - later };
        let held = pool.enis().filter(|(_, eni)| eni.card == self.card).count();
        let room = held + outlook.creating.len() + self.reserved < self.eni_limit;
        room.then(|| Growth::NewEni { count: wanted.min(self.slots) })
    }

    /// CIDRs to give back, by ENI (6.5, 6.9 with B26: from the ENI with fewest pods, never a cooling address).
    pub fn surplus(&self, pool: &Pool, now: Mono) -> Vec<(EniId, Vec<IpNet>)> {
        let stats = self.with_demand(pool.stats_of_mode(now, self.card));
        let mut over = match (self.deviation(&stats, pool.prefix_mode()), pool.prefix_mode()) {
            (Some((_, over)), _) => over,
            (None, true) => stats.free_prefixes.saturating_sub(self.warm_prefix().max(1)).min(self.undemanded(&stats)),
            (None, false) => 0,
        };
        if over == 0 {
            return Vec::new();
        }
        let mut enis: Vec<_> = pool.enis().filter(|(_, eni)| eni.card == self.card && eni.serves()).collect();
        order::sort_by_key(&mut enis, |(_, eni)| (eni.assigned(), Reverse(eni.device)));
        let mut surplus = Vec::new();
        for (id, _) in enis {
            let mut idle = pool.idle_cidrs(id, now, pool.prefix_mode());
            idle.truncate(over);
            over -= idle.len();
            if !idle.is_empty() {
                surplus.push((id.clone(), idle));
            }
        }
        surplus
    }

    // Prefixes that go beyond the targets and what pods are going to ask for: those would be asked for again at once.
    fn undemanded(&self, stats: &Stats) -> usize {
        if self.demand == 0 {
            return usize::MAX;
        }
        stats.available().saturating_sub(self.warm_prefix() * PREFIX_ADDRESSES) / PREFIX_ADDRESSES
    }

    /// An ENI that the pool can do without, if there is one (6.9 "remove-extra" and "free one ENI", B27).
    pub fn spare_eni(&self, pool: &Pool, now: Mono) -> Option<EniId> {
        let prefix_mode = pool.prefix_mode();
        let stats = self.with_demand(pool.stats(now, self.card));
        let targets = self.ip_targets();
        let worth_a_look = targets.is_some() || {
            let warm = if prefix_mode { self.warm_prefix() } else { self.targets.warm_eni };
            let idle_eni = |pool: &Pool| {
                pool.enis().any(|(_, eni)| {
                    eni.card == self.card && !eni.primary && eni.assigned() == 0 && eni.kind == Kind::Plain
                })
            };
            stats.available() >= (warm + 1) * self.addresses_per_eni(prefix_mode) || (prefix_mode && idle_eni(pool))
        };
        let spare = pool.enis().filter(|(id, eni)| (worth_a_look || eni.excluded) && self.dispensable(pool, id, now));
        let mut spare: Vec<_> = spare.collect();
        order::sort_by_key(&mut spare, |(_, eni)| Reverse(eni.device));
        spare.first().map(|(id, _)| (*id).clone())
    }

    /// Whether one ENI may go.
    pub fn dispensable(&self, pool: &Pool, id: &EniId, now: Mono) -> bool {
        let Some(eni) = pool.eni(id) else { return false };
        if eni.primary
            || eni.card != self.card
            || eni.kind != Kind::Plain
            || eni.assigned() > 0
            || now.since(eni.added) < ENI_AGE_MIN
            || pool.eni_cooling(id, now)
        {
            return false;
        }
        if eni.excluded {
            return true; // nobody counts on its addresses
        }
        // As long as prefixes are not to be had, an ENI without one is counted by its addresses.
        let prefix_mode = pool.prefix_mode() && !(pool.singles() && eni.cidrs().all(|(_, cidr)| !cidr.prefix));
        let others = pool.stats_of(now, |other, eni| other != id && eni.card == self.card && eni.serves());
        let others = self.with_demand(others);
        let whole = |addresses: usize| {
            if prefix_mode { addresses.next_multiple_of(PREFIX_ADDRESSES) } else { addresses }
        };
        match self.ip_targets() {
            Some((warm, minimum)) => others.available() >= whole(warm) && others.total >= whole(minimum),
            None if prefix_mode => {
                let demanded = self.demand == 0 || others.available() >= self.warm_prefix() * PREFIX_ADDRESSES;
                let any = self.warm_prefix() > 0 || others.available() > 0;
                others.free_prefixes >= self.warm_prefix() && any && demanded
            }
            None if pool.prefix_mode() => others.available() >= WARM_SINGLES,
            None => others.available() >= self.targets.warm_eni * self.slots && others.available() > 0,
        }
    }
}

#[cfg(test)]
#[path = "sizing_tests.rs"]
mod tests;
