//! The pool's invariants, asserted after every step of the core. A step of a node with a thousand pods changes one of them, so
//! only what changed is looked at.

use super::{Eni, Pool};
use crate::model::order;
use std::net::IpAddr;

impl Pool {
    /// Asserts what must always hold: the index and the owners are two views of one thing, and no address has two owners.
    /// Looks only at what changed since the last time.
    pub fn check(&mut self) {
        let touched = std::mem::take(&mut self.touched);
        if touched.all {
            return self.check_all();
        }
        for address in &touched.addresses {
            self.check_one(*address);
        }
        if !touched.addresses.is_empty() {
            let owners = self.enis.values().map(Eni::assigned).sum::<usize>() + self.orphans.len();
            assert_eq!(owners, self.held(), "the index and the owners differ");
        }
    }

    fn check_one(&self, address: IpAddr) {
        let mut owners = self.orphans.values().filter(|(ip, _)| *ip == address).count();
        for (id, eni) in &self.enis {
            for (net, cidr) in eni.cidrs.iter().filter(|(net, _)| net.contains(&address)) {
                let Some(owner) = cidr.slots.get(&address).and_then(|slot| slot.owner.as_ref()) else { continue };
                owners += 1;
                let leads = self.index.get(&(owner.key.clone(), eni.card));
                let here = leads.is_some_and(|(eni, cidr, ip)| (eni, cidr, *ip) == (id, net, address));
                assert!(here, "the index does not lead {} to {address}", owner.key);
            }
        }
        assert!(owners <= 1, "an address has two owners: {address}");
    }

    fn check_all(&self) {
        let mut held: Vec<IpAddr> = self.allocations().map(|held| held.address).collect();
        order::sort(&mut held);
        let twice = held.windows(2).find(|pair| pair[0] == pair[1]);
        assert_eq!(twice, None, "an address has two owners");
        // As many entries as owners, and each leads to another owner: so none is missing.
        assert_eq!(held.len(), self.held(), "the index and the owners differ");
        for ((key, card), (eni, net, address)) in &self.index {
            let eni = self.enis.get(eni).filter(|eni| eni.card == *card);
            let owner = eni.and_then(|eni| eni.cidrs.get(net)?.slots.get(address)?.owner.as_ref());
            assert!(owner.is_some_and(|owner| owner.key == *key), "the index leads {key} to {address} of another");
        }
    }
}
