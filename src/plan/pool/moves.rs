//! CIDRs that EC2 has put elsewhere while pods have addresses in them: on another ENI, or into a prefix.

use super::{Eni, Pool, Refused};
use crate::model::ids::EniId;
use crate::model::map::Map;
use ipnet::IpNet;

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

    /// Puts a prefix over single addresses of the same card that EC2 has made part of it: their pods and cooldowns go on in
    /// it. Refused, and nothing changed, while anything else overlaps it.
    pub fn absorb(&mut self, id: &EniId, net: IpNet) -> Result<(), Refused> {
        let net = net.trunc();
        let card = self.enis.get(id).ok_or(Refused::UnknownEni)?.card;
        let stays = |eni: &Eni, held: &IpNet| held.contains(&net) || (eni.card != card && net.contains(held));
        let odd = self.enis.iter().find(|(_, eni)| eni.cidrs.keys().any(|held| stays(eni, held)));
        if let Some((odd, _)) = odd {
            return Err(Refused::Duplicate(odd.clone()));
        }
        let mut slots = Map::new();
        for eni in self.enis.values_mut() {
            slots.extend(eni.cidrs.extract_if(.., |held, _| net.contains(held)).flat_map(|(_, cidr)| cidr.slots));
        }
        self.add_cidr(id, net)?;
        for slot in slots.values() {
            let at = slot.owner.as_ref().and_then(|owner| self.index.get_mut(&(owner.key.clone(), card)));
            if let Some((eni, place, _)) = at {
                eni.clone_from(id);
                *place = net;
            }
        }
        if let Some(cidr) = self.enis.get_mut(id).and_then(|eni| eni.cidrs.get_mut(&net)) {
            cidr.slots.extend(slots);
        }
        Ok(())
    }
}
