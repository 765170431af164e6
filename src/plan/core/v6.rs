//! IPv6 mode: one /80 for each ENI, and nothing to size (`spec/ipamd.md` 7.7, B37).
//!
//! A prefix holds more addresses than a node can ever use, so no target and no loop exists: an ENI without a prefix gets
//! one, a network card without an ENI gets one. EC2 is looked at before it is asked: a second prefix would be of no use
//! and nobody would give it back. Nothing here may count the addresses of a prefix one by one.

use super::{Core, GrowthId, Timer};
use crate::model::ec2::{Count, Interface};
use crate::model::ids::EniId;
use crate::model::imds;
use crate::model::map::Set;
use crate::model::order::Gather as _;
use crate::plan::pool::{Eni, Kind};
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// After an assignment whose answer was lost and that EC2 does not show: it may list the prefix a little later.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

impl Core {
    /// What EC2 says that an ENI carries for pods.
    pub(super) fn cidrs_of(&self, interface: &Interface) -> Set<IpNet> {
        if self.config.v6 {
            return self.used_prefixes(&interface.id, &interface.v6_prefixes);
        }
        super::cidrs_of(interface)
    }

    /// What IMDS tells of the same.
    pub(super) fn told_cidrs(&self, eni: &imds::Eni) -> Set<IpNet> {
        if self.config.v6 {
            return self.used_prefixes(&eni.id, &eni.v6_prefixes);
        }
        let singles = eni.ipv4s.iter().skip(1).map(|ip| IpNet::from(IpAddr::V4(*ip)));
        singles.chain(eni.v4_prefixes.iter().copied()).gather()
    }

    /// Of several IPv6 prefixes on an ENI the first is used and the others are left alone. But what is in use stays so,
    /// whatever the order in which they are listed.
    pub(super) fn used_prefixes(&self, id: &EniId, listed: &[IpNet]) -> Set<IpNet> {
        let holds = |eni: &Eni, net: &IpNet| eni.cidrs().any(|(held, _)| held == net);
        let lived_in = |net: &IpNet| {
            let mut pods = self.pool.allocations();
            pods.any(|pod| pod.table.is_none() && net.contains(&pod.address))
        };
        let in_use = |net: &&IpNet| self.pool.eni(id).is_some_and(|eni| holds(eni, net)) || lived_in(net);
        let used: Set<IpNet> = listed.iter().filter(in_use).copied().gather();
        if !used.is_empty() {
            return used;
        }
        let known = |net: &&IpNet| self.trusted.get(id).is_some_and(|nets| nets.contains(*net));
        listed.iter().find(known).or(listed.first()).copied().into_iter().gather()
    }

    /// Begins the next growth of a card, if one is due: a prefix for an ENI without one, or an ENI for a card without one.
    pub(super) fn grow_card_v6(&mut self, card: u32) -> bool {
        let outlook = self.outlook(card);
        let lost = |id: &EniId, net: &IpNet| self.absent.get(&(id.clone(), Some(*net))).is_some_and(|a| a.confirmed);
        let bare = self.pool.enis().find(|(id, eni)| {
            eni.card == card
                && eni.kind != Kind::Trunk
                && eni.serves()
                && self.listed.get(*id).is_some_and(Set::is_empty)
                && eni.cidrs().all(|(net, _)| lost(id, net))
                && !outlook.assigning.contains_key(*id)
                && !self.exhausted.contains_key(&eni.subnet)
        });
        if let Some(eni) = bare.map(|(id, _)| id.clone()) {
            let id = self.begin_growth(card, None);
            self.assign(id, eni, Count::Ipv6Addresses(1), true);
            return true;
        }
        let serving = |eni: &Eni| eni.card == card && eni.kind != Kind::Trunk && !eni.excluded;
        if self.pool.enis().any(|(_, eni)| serving(eni)) || !outlook.creating.is_empty() {
            return false;
        }
        let held = self.pool.enis().filter(|(_, eni)| eni.card == card).count();
        let sizing = self.sizing(card);
        held + sizing.reserved < sizing.eni_limit && self.place_known() && self.create(card, Count::Ipv6Addresses(1))
    }

    /// EC2 was asked what an assignment of unknown outcome gave, and lists nothing: it is asked once more before the next.
    pub(super) fn prefix_unclear(&mut self, id: GrowthId, eni: &EniId) {
        self.listed.remove(eni);
        self.growth_failed(Some(id), &format!("eni {eni}: no prefix is listed after a lost answer"), None);
        self.set_timer(Timer::Describe, LOOK_AGAIN);
    }
}
