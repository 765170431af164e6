//! How large a pool should be: targets against figures, and the one growth or shrink that follows (`spec/ipamd.md` 6).
//!
//! Pure arithmetic. The letters of the specification stand in the comments: T total, A assigned, V available, P prefixes,
//! F free prefixes, W/M/WE/WP the targets, E the ENI limit.

use super::pool::{Kind, Pool, Stats};
use crate::model::ids::EniId;
use crate::model::order;
use crate::model::time::Mono;
use ipnet::IpNet;
use std::cmp::Reverse;
use std::time::Duration;

/// Addresses in an IPv4 prefix (/28).
pub const PREFIX_ADDRESSES: usize = 16;
/// An ENI younger than this is not freed (`spec/ipamd.md` 6.1).
pub const ENI_AGE_MIN: Duration = Duration::from_mins(1);

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
    /// With custom networking the primary ENI serves no pods.
    pub primary_serves_pods: bool,
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
    fn ip_targets(&self) -> Option<(usize, usize)> {
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
        let short = warm.saturating_sub(available).max(minimum.saturating_sub(total));
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

    /// Whether the pool is too small (6.4). `starved`: an ADD found no address while some were cooling; those then do not
    /// count as available (B59).
    pub fn too_low(&self, stats: &Stats, prefix_mode: bool, starved: bool) -> bool {
        if stats.total >= self.max_pods {
            return false;
        }
        let stats = if starved { without_cooling(stats) } else { *stats };
        if let Some((short, _)) = self.deviation(&stats, prefix_mode) {
            return short > 0;
        }
        let (warm, unit) = if prefix_mode {
            (self.warm_prefix(), PREFIX_ADDRESSES)
        } else {
            (self.targets.warm_eni, self.addresses_per_eni(false))
        };
        stats.available() < unit * warm || (warm == 0 && stats.available() == 0)
    }

    // CIDRs wanted in one step (6.6). Without an IP target a single address is never asked for alone: an ENI's worth is.
    fn wanted(&self, stats: &Stats, prefix_mode: bool) -> usize {
        match (self.deviation(stats, prefix_mode), prefix_mode) {
            (Some((short, _)), true) => short.max(1),
            (Some((short, _)), false) => short,
            (None, true) => self.warm_prefix().saturating_sub(stats.free_prefixes).max(1),
            (None, false) => self.addresses_per_eni(false),
        }
    }

    /// The growth that is due, if any (6.4, 6.6 to 6.8). `skip` names ENIs that cannot take more now (their subnet is
    /// exhausted).
    pub fn growth(&self, pool: &Pool, now: Mono, starved: bool, skip: impl Fn(&EniId) -> bool) -> Option<Growth> {
        let prefix_mode = pool.prefix_mode();
        let stats = pool.stats(now);
        if !self.too_low(&stats, prefix_mode, starved) {
            return None;
        }
        let counted = if starved { without_cooling(&stats) } else { stats };
        let wanted = self.wanted(&counted, prefix_mode);
        if wanted == 0 {
            return None;
        }
        let mut candidates: Vec<_> = pool
            .enis()
            .filter(|(id, eni)| {
                eni.kind != Kind::Trunk
                    && (self.primary_serves_pods || !eni.primary)
                    && !eni.excluded
                    && eni.cidr_count() < self.slots
                    && !skip(id)
            })
            .collect();
        order::sort_by_key(&mut candidates, |(_, eni)| eni.device);
        if let Some((id, eni)) = candidates.first() {
            let count = wanted.min(self.slots - eni.cidr_count());
            return Some(Growth::Assign { eni: (*id).clone(), count });
        }
        let room = pool.enis().count() + self.reserved < self.eni_limit;
        room.then(|| Growth::NewEni { count: wanted.min(self.slots) })
    }

    /// CIDRs to give back, by ENI (6.5, 6.9 with B26: from the ENI with fewest pods, never a cooling address).
    pub fn surplus(&self, pool: &Pool, now: Mono) -> Vec<(EniId, Vec<IpNet>)> {
        let stats = pool.stats(now);
        let mut over = match (self.deviation(&stats, pool.prefix_mode()), pool.prefix_mode()) {
            (Some((_, over)), _) => over,
            (None, true) => stats.free_prefixes.saturating_sub(self.warm_prefix().max(1)),
            (None, false) => 0,
        };
        let mut enis: Vec<_> = pool.enis().filter(|(_, eni)| !eni.excluded).collect();
        order::sort_by_key(&mut enis, |(_, eni)| (eni.assigned(), Reverse(eni.device)));
        let mut surplus = Vec::new();
        for (id, _) in enis {
            let mut idle = pool.idle_cidrs(id, now);
            idle.truncate(over);
            over -= idle.len();
            if !idle.is_empty() {
                surplus.push((id.clone(), idle));
            }
        }
        surplus
    }

    /// An ENI that the pool can do without, if there is one (6.9 "remove-extra" and "free one ENI", B27).
    pub fn spare_eni(&self, pool: &Pool, now: Mono) -> Option<EniId> {
        let prefix_mode = pool.prefix_mode();
        let stats = pool.stats(now);
        let targets = self.ip_targets();
        let worth_a_look = targets.is_some() || {
            let warm = if prefix_mode { self.warm_prefix() } else { self.targets.warm_eni };
            let idle_eni = |pool: &Pool| {
                pool.enis().any(|(_, eni)| !eni.primary && eni.assigned() == 0 && eni.kind == Kind::Plain)
            };
            stats.available() >= (warm + 1) * self.addresses_per_eni(prefix_mode) || (prefix_mode && idle_eni(pool))
        };
        if !worth_a_look {
            return None;
        }
        let mut spare: Vec<_> = pool.enis().filter(|(id, _)| self.dispensable(pool, id, now)).collect();
        order::sort_by_key(&mut spare, |(_, eni)| Reverse(eni.device));
        spare.first().map(|(id, _)| (*id).clone())
    }

    /// Whether one ENI may go.
    pub fn dispensable(&self, pool: &Pool, id: &EniId, now: Mono) -> bool {
        let Some(eni) = pool.eni(id) else { return false };
        if eni.primary
            || eni.kind != Kind::Plain
            || eni.assigned() > 0
            || now.since(eni.added) < ENI_AGE_MIN
            || pool.eni_cooling(id, now)
        {
            return false;
        }
        let prefix_mode = pool.prefix_mode();
        let others = pool.stats_of(now, |other, eni| other != id && !eni.excluded);
        let whole = |addresses: usize| {
            if prefix_mode { addresses.next_multiple_of(PREFIX_ADDRESSES) } else { addresses }
        };
        match self.ip_targets() {
            Some((warm, minimum)) => others.available() >= whole(warm) && others.total >= whole(minimum),
            None if prefix_mode => others.free_prefixes >= self.warm_prefix(),
            None => others.available() >= self.targets.warm_eni * self.slots && others.available() > 0,
        }
    }
}

fn without_cooling(stats: &Stats) -> Stats {
    Stats { total: stats.total - stats.cooling, cooling: 0, ..*stats }
}

#[cfg(test)]
#[path = "sizing_tests.rs"]
mod tests;
