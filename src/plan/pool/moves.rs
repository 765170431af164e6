//! CIDRs that EC2 has put elsewhere while pods have addresses in them: on another ENI, or into a prefix.

use super::{Pool, Refused};
use crate::model::ids::EniId;
use ipnet::IpNet;
use std::collections::BTreeMap;

impl Pool {
    /// Moves a CIDR with its pods and cooldowns to another ENI of the same card, where EC2 has put it.
    pub fn move_cidr(&mut self, net: &IpNet, from: &EniId, to: &EniId) -> Result<(), Refused> {
        self.touch();
        let card = self.enis.get(to).ok_or(Refused::UnknownEni)?.card;
        let old = self.enis.get_mut(from).ok_or(Refused::UnknownEni)?;
        let cidr = old.cidrs.get(net).ok_or(Refused::UnknownCidr)?;
        if old.card != card && cidr.assigned() > 0 {
            return Err(Refused::InUse); // its pods have their interface on the other card
        }
        let Some(mut cidr) = old.cidrs.remove(net) else { return Err(Refused::UnknownCidr) };
        cidr.barred = false;
        for slot in cidr.slots.values() {
            let at = slot.owner.as_ref().and_then(|owner| self.index.get_mut(&(owner.key.clone(), card)));
            if let Some((eni, ..)) = at {
                eni.clone_from(to);
            }
        }
        if let Some(eni) = self.enis.get_mut(to) {
            eni.cidrs.insert(*net, cidr);
        }
        Ok(())
    }

    /// Puts a prefix over single addresses of the same ENI that EC2 has made part of it: their pods and cooldowns go on in
    /// it. Refused, and nothing changed, while anything else overlaps it.
    pub fn absorb(&mut self, id: &EniId, net: IpNet) -> Result<(), Refused> {
        let net = net.trunc();
        let odd = |held: &IpNet| held.contains(&net);
        let beside = |held: &IpNet| odd(held) || net.contains(held);
        for (other, eni) in &self.enis {
            let stays = |held: &IpNet| if other == id { odd(held) } else { beside(held) };
            if eni.cidrs.keys().any(stays) {
                return Err(Refused::Duplicate(other.clone()));
            }
        }
        let eni = self.enis.get_mut(id).ok_or(Refused::UnknownEni)?;
        let card = eni.card;
        let inside = eni.cidrs.extract_if(.., |held, _| net.contains(held));
        let slots: BTreeMap<_, _> = inside.flat_map(|(_, cidr)| cidr.slots).collect();
        self.add_cidr(id, net)?;
        for slot in slots.values() {
            let at = slot.owner.as_ref().and_then(|owner| self.index.get_mut(&(owner.key.clone(), card)));
            if let Some((_, place, _)) = at {
                *place = net;
            }
        }
        if let Some(cidr) = self.enis.get_mut(id).and_then(|eni| eni.cidrs.get_mut(&net)) {
            cidr.slots.extend(slots);
        }
        Ok(())
    }
}
