//! The node's addresses and who has them: ENIs, CIDRs, owners, cooldown (`spec/ipamd.md` 3, 4).
//!
//! One value for all network cards: the original keeps a store per card, here an ENI knows its card, and whoever assigns
//! or counts names one. Totals are derived from the map and never kept beside it. An address has at most one owner; a key
//! has at most one address on each card, found through one index; [`Pool::check`] asserts both after every step of the
//! core. The pool decides nothing: how large it should be is `sizing`'s, when EC2 is called is `core`'s.

mod check;
mod moves;

use crate::model::ids::{EniId, PodKey, PodName, SubnetId};
use crate::model::map::{Map, Set};
use crate::model::net::Mac;
use crate::model::order::{self, Gather as _};
use crate::model::time::{Mono, Now, Wall};
use ipnet::IpNet;
use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What an ENI is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// An ordinary interface.
    #[default]
    Plain,
    /// Elastic fabric adapter with addresses: used for pods, never freed.
    Efa,
    /// Carries branch ENIs: never grown, never freed.
    Trunk,
}

/// One attached, managed ENI.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each told by somebody else")]
pub struct Eni {
    /// Hardware address.
    pub mac: Mac,
    /// Network card.
    pub card: u32,
    /// Device index on its card; 0 on card 0 is the primary ENI.
    pub device: u32,
    /// The node's own ENI.
    pub primary: bool,
    /// Kind.
    pub kind: Kind,
    /// Its subnet is tagged as not for pods: nothing new is handed out (`spec/ipamd.md` 7.6).
    pub excluded: bool,
    /// EC2 does not list it any more: nothing new is handed out until that is clear.
    pub missing: bool,
    /// The host cannot be set up for it, for want of its link say: nothing new is handed out.
    pub unwired: bool,
    /// Host route table of its pods.
    pub table: u32,
    /// Subnet.
    pub subnet: SubnetId,
    /// Its own address, never given to a pod.
    pub own: IpNet,
    /// When it entered the pool.
    pub added: Mono,
    cidrs: Map<IpNet, Cidr>,
}

impl Eni {
    /// An ENI without CIDRs.
    #[expect(clippy::too_many_arguments, reason = "every field is a fact of the ENI; a builder would only hide one")]
    pub fn new(
        mac: Mac,
        (card, device): (u32, u32),
        primary: bool,
        kind: Kind,
        table: u32,
        subnet: SubnetId,
        own: IpNet,
        added: Mono,
    ) -> Self {
        let cidrs = Map::new();
        let (excluded, missing, unwired) = (false, false, false);
        Eni { mac, card, device, primary, kind, excluded, missing, unwired, table, subnet, own, added, cidrs }
    }

    /// Whether it may serve new pods.
    pub fn serves(&self) -> bool {
        !self.excluded && !self.missing && !self.unwired
    }

    /// CIDRs by network.
    pub fn cidrs(&self) -> impl Iterator<Item = (&IpNet, &Cidr)> {
        self.cidrs.iter()
    }

    /// Number of CIDRs of any kind: what counts against the slots of the instance type.
    pub fn cidr_count(&self) -> usize {
        self.cidrs.len()
    }

    /// Addresses in use by pods.
    pub fn assigned(&self) -> usize {
        self.cidrs.values().map(Cidr::assigned).sum()
    }

    /// The CIDR that holds an address.
    pub fn cidr_of(&self, address: IpAddr) -> Option<IpNet> {
        self.cidrs.keys().find(|net| net.contains(&address)).copied()
    }
}

/// What EC2 assigns to an ENI: a single address or a prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cidr {
    /// A /28 or /80 and not a single address.
    pub prefix: bool,
    /// EC2 has not confirmed it, or does not list it any more: who has an address of it keeps it, nobody gets a new one.
    pub barred: bool,
    slots: Map<IpAddr, Slot>,
}

impl Cidr {
    /// Addresses in use by pods.
    pub fn assigned(&self) -> usize {
        self.slots.values().filter(|slot| slot.owner.is_some()).count()
    }

    /// Addresses that were used and are known; owners and cooling ones.
    pub fn slots(&self) -> impl Iterator<Item = (&IpAddr, &Slot)> {
        self.slots.iter()
    }

    fn cooling(&self, now: Mono, cooldown: Duration) -> usize {
        self.slots.values().filter(|slot| slot.cooling(now, cooldown)).count()
    }
}

/// An address that was ever used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Who has it.
    pub owner: Option<Arc<Owner>>,
    /// When it was last released; later than that if it is to rest beyond the cooldown.
    pub freed: Option<Mono>,
}

impl Slot {
    fn cooling(&self, now: Mono, cooldown: Duration) -> bool {
        self.owner.is_none() && self.freed.is_some_and(|freed| now < freed.plus(cooldown))
    }
}

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Allocation key.
    pub key: PodKey,
    /// Pod, for logs and the check for dead pods; empty if the runtime did not tell.
    pub pod: PodName,
    /// Number of addresses that the pod holds over all cards.
    pub interfaces: u32,
    /// When it was assigned.
    pub since: Wall,
}

/// An address that a pod has.
#[derive(Clone, Copy, Debug)]
pub struct Held<'a> {
    /// The address.
    pub address: IpAddr,
    /// Who has it.
    pub owner: &'a Arc<Owner>,
    /// Network card.
    pub card: u32,
    /// Host route table of its ENI; absent as long as its CIDR has not been seen.
    pub table: Option<u32>,
}

/// An address and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// ENI.
    pub eni: EniId,
    /// CIDR on it.
    pub cidr: IpNet,
    /// The address.
    pub address: IpAddr,
    /// Network card of the ENI.
    pub card: u32,
    /// Device index of the ENI.
    pub device: u32,
    /// Host route table of the ENI.
    pub table: u32,
}

/// Nothing can be handed out now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoAddress {
    /// Addresses in the pool.
    pub total: usize,
    /// Of these, waiting for the end of their cooldown.
    pub cooling: usize,
}

/// Why a change of the pool was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No such ENI.
    UnknownEni,
    /// No such CIDR on that ENI.
    UnknownCidr,
    /// Already there (on the ENI that is named).
    Duplicate(EniId),
    /// Pods use it.
    InUse,
}

/// What a release gave back; enough to undo it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Released {
    /// The address and its place; absent for an address whose CIDR is not in the pool.
    pub place: Option<Place>,
    /// The address.
    pub address: IpAddr,
    /// Network card.
    pub card: u32,
    /// The former owner.
    pub owner: Arc<Owner>,
    before: Option<Mono>,
}

/// Figures of the pool over the ENIs that may serve pods, counting only CIDRs of the current mode (`spec/ipamd.md` 6.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// T: addresses.
    pub total: usize,
    /// A: in use.
    pub assigned: usize,
    /// C: free but cooling.
    pub cooling: usize,
    /// P: prefixes.
    pub prefixes: usize,
    /// F: prefixes without an address in use.
    pub free_prefixes: usize,
}

impl Stats {
    /// V: free addresses, cooling ones included.
    pub fn available(&self) -> usize {
        self.total.saturating_sub(self.assigned)
    }
}

/// A key on a card.
type At = (PodKey, u32);

/// The addresses of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    prefix_mode: bool,
    singles: bool,
    cooldown: Duration,
    enis: Map<EniId, Eni>,
    index: Map<At, (EniId, IpNet, IpAddr)>,
    // Addresses of living pods whose CIDR has not been seen since the restart: kept, so that they are neither forgotten
    // nor handed out when their CIDR turns up (B6).
    orphans: Map<At, (IpAddr, Arc<Owner>)>,
    // Nobody gets these, however long they have rested.
    held_back: Set<IpAddr>,
    // What changed since the last check.
    touched: Touched,
    memo: Memo,
}

/// What changed since the last [`Pool::check`]: everything, or who has these addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Touched {
    all: bool,
    addresses: Vec<IpAddr>,
}

/// The figures that were asked for last, by card, and until when they hold if nothing changes: most steps of the core ask
/// several times and change nothing. And how often the pool was changed.
#[derive(Debug, Default)]
struct Memo(Mutex<Map<u32, (Mono, Mono, Stats)>>, u64);

impl Clone for Memo {
    fn clone(&self) -> Memo {
        Memo::default()
    }
}

impl PartialEq for Memo {
    fn eq(&self, _: &Memo) -> bool {
        true // what is remembered makes no difference
    }
}

impl Eq for Memo {}

/// The number of addresses of a CIDR that can be given to pods; every address of a prefix can.
fn size_of_cidr(net: &IpNet) -> usize {
    let bits = net.max_prefix_len() - net.prefix_len();
    1usize.checked_shl(u32::from(bits)).unwrap_or(usize::MAX)
}

fn nth_address(net: &IpNet, n: u128) -> IpAddr {
    match net.network() {
        IpAddr::V4(base) => IpAddr::V4((u32::from(base).wrapping_add(u32::try_from(n).unwrap_or(u32::MAX))).into()),
        IpAddr::V6(base) => IpAddr::V6((u128::from(base).wrapping_add(n)).into()),
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(prefix_mode: bool, cooldown: Duration) -> Self {
        Pool {
            prefix_mode,
            singles: !prefix_mode,
            cooldown,
            enis: Map::new(),
            index: Map::new(),
            orphans: Map::new(),
            held_back: Set::new(),
            touched: Touched::default(),
            memo: Memo::default(),
        }
    }

    fn touch(&mut self) {
        self.touched.all = true;
        self.forget();
    }

    /// Like [`Pool::touch`], where only the owner of one address changes.
    fn touch_one(&mut self, address: IpAddr) {
        self.touched.addresses.push(address);
        self.forget();
    }

    fn forget(&mut self) {
        self.memo.1 += 1;
        self.memo.0.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Grows with every change: what was derived from the pool at the same value, and time, still holds.
    pub fn version(&self) -> u64 {
        self.memo.1
    }

    /// ENIs by id.
    pub fn enis(&self) -> impl Iterator<Item = (&EniId, &Eni)> {
        self.enis.iter()
    }

    /// One ENI.
    pub fn eni(&self, id: &EniId) -> Option<&Eni> {
        self.enis.get(id)
    }

    /// Whether CIDRs of the current mode are prefixes.
    pub fn prefix_mode(&self) -> bool {
        self.prefix_mode
    }

    /// Lets single addresses serve pods beside prefixes, as long as the subnets have no room for prefixes.
    pub fn set_singles(&mut self, singles: bool) {
        self.touch();
        self.singles = singles || !self.prefix_mode;
    }

    /// Whether single addresses serve pods.
    pub fn singles(&self) -> bool {
        self.singles
    }

    fn usable(&self, cidr: &Cidr) -> bool {
        !cidr.barred && if cidr.prefix { self.prefix_mode } else { self.singles }
    }

    /// How long a released address rests.
    pub fn cooldown(&self) -> Duration {
        self.cooldown
    }

    /// Changes how long a released address rests; those that rest already included.
    pub fn set_cooldown(&mut self, cooldown: Duration) {
        self.touch();
        self.cooldown = cooldown;
    }

    /// Adds an ENI without CIDRs.
    pub fn add_eni(&mut self, id: EniId, eni: Eni) -> Result<(), Refused> {
        self.touch();
        assert!(eni.cidrs.is_empty(), "CIDRs are added one by one, so that the index sees them");
        match self.enis.entry(id) {
            crate::model::map::Entry::Occupied(entry) => Err(Refused::Duplicate(entry.key().clone())),
            crate::model::map::Entry::Vacant(entry) => {
                entry.insert(eni);
                Ok(())
            }
        }
    }

    /// Gives none of these addresses away, instead of those that were named before.
    pub fn hold_back(&mut self, addresses: Set<IpAddr>) {
        self.held_back = addresses;
    }

    /// Marks whether the host cannot be set up for an ENI.
    pub fn set_unwired(&mut self, id: &EniId, unwired: bool) {
        if let Some(eni) = self.enis.get_mut(id).filter(|eni| eni.unwired != unwired) {
            eni.unwired = unwired;
            self.touch();
        }
    }

    /// Marks whether EC2 has lost sight of an ENI.
    pub fn set_missing(&mut self, id: &EniId, missing: bool) {
        self.touch();
        if let Some(eni) = self.enis.get_mut(id) {
            eni.missing = missing;
        }
    }

    /// Bars a CIDR from new pods, or lets it serve them again.
    pub fn bar(&mut self, id: &EniId, net: &IpNet, barred: bool) {
        self.touch();
        if let Some(cidr) = self.enis.get_mut(id).and_then(|eni| eni.cidrs.get_mut(net)) {
            cidr.barred = barred;
        }
    }

    /// Takes an unused ENI out of the pool. One with pods is refused: nobody loses an address because an ENI goes.
    pub fn remove_eni(&mut self, id: &EniId) -> Result<Eni, Refused> {
        self.touch();
        let eni = self.enis.get(id).ok_or(Refused::UnknownEni)?;
        if eni.assigned() > 0 {
            return Err(Refused::InUse);
        }
        self.enis.remove(id).ok_or(Refused::UnknownEni)
    }

    /// Marks whether an ENI may serve new pods.
    pub fn set_excluded(&mut self, id: &EniId, excluded: bool) {
        self.touch();
        if let Some(eni) = self.enis.get_mut(id) {
            eni.excluded = excluded;
        }
    }

    /// Sets the kind of an ENI, which only EC2 knows.
    pub fn set_kind(&mut self, id: &EniId, kind: Kind) {
        self.touch();
        if let Some(eni) = self.enis.get_mut(id) {
            eni.kind = kind;
        }
    }

    /// Adds a CIDR to an ENI; one that overlaps another is a duplicate. Addresses of living pods inside it that were orphans find their place again.
    pub fn add_cidr(&mut self, id: &EniId, net: IpNet) -> Result<(), Refused> {
        let net = net.trunc();
        // A late observation may still list an address that EC2 has since made part of a prefix.
        let overlaps = |held: &IpNet| held.contains(&net) || net.contains(held);
        if let Some((holder, _)) = self.enis.iter().find(|(_, eni)| eni.cidrs.keys().any(overlaps)) {
            return Err(Refused::Duplicate(holder.clone()));
        }
        self.touch();
        let eni = self.enis.get_mut(id).ok_or(Refused::UnknownEni)?;
        let prefix = net.prefix_len() != net.max_prefix_len();
        let mut cidr = Cidr { prefix, barred: false, slots: Map::new() };
        // An orphan found on another card than it was on keeps the card that it is found on.
        let returning: Vec<At> =
            self.orphans.iter().filter(|(_, (ip, _))| net.contains(ip)).map(|(key, _)| key.clone()).collect();
        for key in returning {
            if let Some((address, owner)) = self.orphans.remove(&key) {
                cidr.slots.insert(address, Slot { owner: Some(owner), freed: None });
                self.index.insert((key.0, eni.card), (id.clone(), net, address));
            }
        }
        eni.cidrs.insert(net, cidr);
        Ok(())
    }

    /// Takes an unused CIDR from an ENI.
    pub fn remove_cidr(&mut self, id: &EniId, net: &IpNet) -> Result<(), Refused> {
        self.touch();
        let eni = self.enis.get_mut(id).ok_or(Refused::UnknownEni)?;
        let cidr = eni.cidrs.get(net).ok_or(Refused::UnknownCidr)?;
        if cidr.assigned() > 0 {
            return Err(Refused::InUse);
        }
        eni.cidrs.remove(net);
        Ok(())
    }

    /// Where the address of a key on a card is.
    pub fn find(&self, key: &PodKey, card: u32) -> Option<Place> {
        self.index.get(&(key.clone(), card)).map(|(eni, cidr, address)| self.place(eni, *cidr, *address))
    }

    /// The cards on which a key has an address.
    pub fn cards_of(&self, key: &PodKey) -> Set<u32> {
        let all = (key.clone(), 0)..=(key.clone(), u32::MAX);
        let placed = self.index.range(all.clone()).map(|((_, card), _)| *card);
        placed.chain(self.orphans.range(all).map(|((_, card), _)| *card)).gather()
    }

    /// Who has the addresses of a key.
    pub fn owner(&self, key: &PodKey) -> Option<&Owner> {
        let all = (key.clone(), 0)..=(key.clone(), u32::MAX);
        let placed = self.index.range(all.clone()).next().and_then(|(_, (eni, cidr, address))| {
            self.enis.get(eni)?.cidrs.get(cidr)?.slots.get(address)?.owner.as_deref()
        });
        placed.or_else(|| self.orphans.range(all).next().map(|(_, (_, owner))| &**owner))
    }

    fn place(&self, id: &EniId, cidr: IpNet, address: IpAddr) -> Place {
        let eni = &self.enis[id];
        Place { eni: id.clone(), cidr, address, card: eni.card, device: eni.device, table: eni.table }
    }

    /// Gives an address of a card to a key: the one that it has already, else the best free one (`spec/ipamd.md` 4.2 with
    /// B13: deterministic and packing). The flag says whether it is new.
    pub fn assign(&mut self, now: Now, card: u32, owner: Owner) -> Result<(Place, bool), NoAddress> {
        if let Some(place) = self.find(&owner.key, card) {
            return Ok((place, false));
        }
        let Some((eni_id, net, address)) = self.choose(now.mono, card) else {
            let stats = self.stats(now.mono, card);
            return Err(NoAddress { total: stats.total, cooling: stats.cooling });
        };
        self.touch_one(address);
        let place = self.place(&eni_id, net, address);
        self.index.insert((owner.key.clone(), card), (eni_id.clone(), net, address));
        let cidr = self.enis.get_mut(&eni_id).and_then(|eni| eni.cidrs.get_mut(&net));
        let slot = cidr.expect("choose names a CIDR of the pool").slots.entry(address).or_default();
        assert!(slot.owner.is_none(), "{address} has an owner already");
        slot.owner = Some(Arc::new(owner));
        Ok((place, true))
    }

    // ENIs with most pods first, then by device: ENIs and prefixes with few pods drain. Single addresses come after all
    // prefixes where both serve.
    fn choose(&self, now: Mono, card: u32) -> Option<(EniId, IpNet, IpAddr)> {
        let mut enis: Vec<_> = self.enis.iter().filter(|(_, eni)| eni.card == card && eni.serves()).collect();
        order::sort_by_key(&mut enis, |(_, eni)| (Reverse(eni.assigned()), eni.device));
        let found = |choose: fn(&Pool, &Eni, Mono) -> Option<(IpNet, IpAddr)>| {
            enis.iter().find_map(|(id, eni)| choose(self, eni, now).map(|(net, ip)| ((*id).clone(), net, ip)))
        };
        let in_prefix = self.prefix_mode.then(|| found(Pool::choose_prefix)).flatten();
        in_prefix.or_else(|| self.singles.then(|| found(Pool::choose_single)).flatten())
    }

    // The fullest prefix first; in it, the address that has rested longest, then the lowest never used.
    fn choose_prefix(&self, eni: &Eni, now: Mono) -> Option<(IpNet, IpAddr)> {
        let mut cidrs: Vec<_> = eni.cidrs.iter().filter(|(_, cidr)| cidr.prefix && !cidr.barred).collect();
        order::sort_by_key(&mut cidrs, |(net, cidr)| (Reverse(cidr.assigned()), **net));
        cidrs.into_iter().find_map(|(net, cidr)| self.choose_in_prefix(net, cidr, now).map(|ip| (*net, ip)))
    }

    // Among single addresses the never used ones have rested longest.
    fn choose_single(&self, eni: &Eni, now: Mono) -> Option<(IpNet, IpAddr)> {
        let singles = eni.cidrs.iter().filter(|(_, cidr)| !cidr.prefix && !cidr.barred);
        let free = singles.filter_map(|(net, cidr)| match cidr.slots.get(&net.addr()) {
            _ if self.held_back.contains(&net.addr()) => None,
            None => Some((None, net)),
            Some(slot) if slot.owner.is_some() || slot.cooling(now, self.cooldown) => None,
            Some(slot) => Some((slot.freed, net)),
        });
        free.min_by_key(|(freed, net)| (*freed, **net)).map(|(_, net)| (*net, net.addr()))
    }

    fn choose_in_prefix(&self, net: &IpNet, cidr: &Cidr, now: Mono) -> Option<IpAddr> {
        let free = |address: &IpAddr| !self.held_back.contains(address);
        let rested = cidr.slots.iter().filter(|(_, slot)| slot.owner.is_none() && !slot.cooling(now, self.cooldown));
        let rested = rested.filter(|(address, _)| free(address));
        if let Some((address, _)) = rested.min_by_key(|(address, slot)| (slot.freed, **address)) {
            return Some(*address);
        }
        // Known addresses are at most a few more than the pods ever were, so the first gap is near.
        let limit = size_of_cidr(net).min(cidr.slots.len() + self.held_back.len() + 1);
        let fresh = |address: &IpAddr| !cidr.slots.contains_key(address) && free(address);
        (0..limit as u128).map(|n| nth_address(net, n)).find(fresh)
    }

    /// Takes the address of a key on a card back; its cooldown starts now. `None`: it has none there.
    pub fn release(&mut self, now: Now, key: &PodKey, card: u32) -> Option<Released> {
        let at = (key.clone(), card);
        if let Some((address, owner)) = self.orphans.remove(&at) {
            self.touch_one(address);
            return Some(Released { place: None, address, card, owner, before: None });
        }
        let (eni, net, address) = self.index.remove(&at)?;
        self.touch_one(address);
        let place = self.place(&eni, net, address);
        let slot = self.slot_mut(&eni, &net, address);
        let owner = slot.owner.take().expect("the index leads to an owned address");
        let before = slot.freed.replace(now.mono);
        Some(Released { place: Some(place), address, card, owner, before })
    }

    /// Undoes an assignment that could not be made durable: as if the address had never been used by it.
    pub fn undo_assign(&mut self, key: &PodKey, card: u32) {
        self.touch();
        if let Some((eni, net, address)) = self.index.remove(&(key.clone(), card)) {
            let slot = self.slot_mut(&eni, &net, address);
            slot.owner = None;
            if slot.freed.is_none() {
                self.enis.get_mut(&eni).and_then(|eni| eni.cidrs.get_mut(&net)).map(|cidr| cidr.slots.remove(&address));
            }
        }
    }

    /// Undoes a release that could not be made durable.
    pub fn undo_release(&mut self, released: Released) {
        self.touch();
        let (key, card) = (released.owner.key.clone(), released.card);
        let Some(place) = released
            .place
            .filter(|place| self.enis.get(&place.eni).is_some_and(|eni| eni.cidrs.contains_key(&place.cidr)))
        else {
            // Its CIDR may have been seen meanwhile. Nobody else has the address: it rests.
            let restored = self.restore_shared(card, released.address, released.owner);
            debug_assert!(restored.is_ok(), "{key}: {restored:?}");
            return;
        };
        self.index.insert((key, card), (place.eni.clone(), place.cidr, place.address));
        let slot = self.slot_mut(&place.eni, &place.cidr, place.address);
        slot.owner = Some(released.owner);
        slot.freed = released.before;
    }

    fn slot_mut(&mut self, eni: &EniId, net: &IpNet, address: IpAddr) -> &mut Slot {
        let cidr = self.enis.get_mut(eni).and_then(|eni| eni.cidrs.get_mut(net));
        cidr.expect("a CIDR with an owner is not removed").slots.entry(address).or_default()
    }

    /// Puts back an allocation read from the checkpoint: in its CIDR if that is known, else among the orphans. The error
    /// names the other owner of the address.
    pub fn restore(&mut self, card: u32, address: IpAddr, owner: Owner) -> Result<(), PodKey> {
        self.restore_shared(card, address, Arc::new(owner))
    }

    fn restore_shared(&mut self, card: u32, address: IpAddr, owner: Arc<Owner>) -> Result<(), PodKey> {
        self.touch();
        let found = self.enis.iter().find_map(|(id, eni)| eni.cidr_of(address).map(|net| (id.clone(), eni.card, net)));
        if let Some((_, other)) = self.orphans.values().find(|(ip, _)| *ip == address) {
            return Err(other.key.clone());
        }
        let Some((id, card, net)) = found else {
            self.orphans.insert((owner.key.clone(), card), (address, owner));
            return Ok(());
        };
        let slot = self.slot_mut(&id, &net, address);
        if let Some(other) = &slot.owner {
            return Err(other.key.clone());
        }
        let key = (owner.key.clone(), card);
        slot.owner = Some(owner);
        self.index.insert(key, (id, net, address));
        Ok(())
    }

    /// Puts back the rest of a cooldown read from the checkpoint.
    pub fn restore_cooling(&mut self, address: IpAddr, freed: Mono) {
        self.touch();
        for eni in self.enis.values_mut() {
            if let Some((_, cidr)) = eni.cidrs.iter_mut().find(|(net, _)| net.contains(&address)) {
                let slot = cidr.slots.entry(address).or_default();
                if slot.owner.is_none() {
                    slot.freed = Some(freed);
                }
            }
        }
    }

    /// Every address that a pod has.
    pub fn allocations(&self) -> impl Iterator<Item = Held<'_>> {
        let placed = self.enis.values().flat_map(|eni| {
            let (card, table) = (eni.card, Some(eni.table));
            let slots = eni.cidrs.values().flat_map(Cidr::slots);
            slots.filter_map(move |(ip, slot)| {
                slot.owner.as_ref().map(|owner| Held { address: *ip, owner, card, table })
            })
        });
        let orphans =
            self.orphans.iter().map(|((_, card), (ip, owner))| Held { address: *ip, owner, card: *card, table: None });
        placed.chain(orphans)
    }

    /// Number of addresses that pods have on a card.
    pub fn held_on(&self, card: u32) -> usize {
        if self.orphans.is_empty() && self.enis.values().all(|eni| eni.card == card) {
            return self.index.len();
        }
        self.index.keys().chain(self.orphans.keys()).filter(|(_, on)| *on == card).count()
    }

    /// Addresses in their cooldown and since when.
    pub fn cooling(&self, now: Mono) -> impl Iterator<Item = (IpAddr, Mono)> {
        let slots = self.enis.values().flat_map(|eni| eni.cidrs.values().flat_map(Cidr::slots));
        slots.filter_map(move |(ip, slot)| slot.freed.filter(|_| slot.cooling(now, self.cooldown)).map(|at| (*ip, at)))
    }

    /// Whether an address of a key is of a CIDR that has not been seen.
    pub fn has_orphan(&self, key: &PodKey) -> bool {
        self.orphans.range((key.clone(), 0)..=(key.clone(), u32::MAX)).next().is_some()
    }

    /// Whether a CIDR has an address that somebody holds and that has no place yet.
    pub fn orphan_in(&self, net: &IpNet) -> bool {
        self.orphans.values().any(|(address, _)| net.contains(address))
    }

    /// Number of addresses of living pods whose CIDR has not been seen.
    pub fn orphan_count(&self) -> usize {
        self.orphans.len()
    }

    /// Figures of a card over the ENIs that may serve pods.
    pub fn stats(&self, now: Mono, card: u32) -> Stats {
        let mut memo = self.memo.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, _, stats)) = memo.get(&card).filter(|(from, until, _)| *from <= now && now < *until) {
            return *stats;
        }
        let stats = self.stats_of(now, |_, eni| eni.card == card && eni.serves());
        let mut until = Mono::from_nanos(u64::MAX);
        if stats.cooling > 0 {
            until = self.cooling(now).map(|(_, freed)| freed.plus(self.cooldown)).min().unwrap_or(now);
        }
        memo.insert(card, (now, until, stats));
        stats
    }

    /// The same without the single addresses that stand in for prefixes.
    pub fn stats_of_mode(&self, now: Mono, card: u32) -> Stats {
        if !(self.prefix_mode && self.singles) {
            return self.stats(now, card); // only CIDRs of the mode serve pods
        }
        let include = |_: &EniId, eni: &Eni| eni.card == card && eni.serves();
        self.figures(now, &include, &|cidr| cidr.prefix == self.prefix_mode && !cidr.barred)
    }

    /// Figures over some of the ENIs.
    pub fn stats_of(&self, now: Mono, include: impl Fn(&EniId, &Eni) -> bool) -> Stats {
        self.figures(now, &include, &|cidr| self.usable(cidr))
    }

    fn figures(&self, now: Mono, include: &dyn Fn(&EniId, &Eni) -> bool, counts: &dyn Fn(&Cidr) -> bool) -> Stats {
        let mut stats = Stats::default();
        for (_, eni) in self.enis.iter().filter(|(id, eni)| include(id, eni)) {
            for (net, cidr) in eni.cidrs.iter().filter(|(_, cidr)| counts(cidr)) {
                let assigned = cidr.assigned();
                stats.total = stats.total.saturating_add(size_of_cidr(net));
                stats.assigned += assigned;
                stats.cooling += cidr.cooling(now, self.cooldown);
                stats.prefixes += usize::from(cidr.prefix);
                stats.free_prefixes += usize::from(cidr.prefix && assigned == 0);
            }
        }
        stats
    }

    /// Whether an address of the ENI is in its cooldown.
    pub fn eni_cooling(&self, id: &EniId, now: Mono) -> bool {
        self.enis.get(id).is_some_and(|eni| eni.cidrs.values().any(|cidr| cidr.cooling(now, self.cooldown) > 0))
    }

    /// Prefixes, or single addresses, of an ENI that nobody uses and that are not cooling, lowest first.
    pub fn idle_cidrs(&self, id: &EniId, now: Mono, prefixes: bool) -> Vec<IpNet> {
        let Some(eni) = self.enis.get(id) else { return Vec::new() };
        let idle = |cidr: &Cidr| cidr.assigned() == 0 && cidr.cooling(now, self.cooldown) == 0;
        let idle = eni.cidrs.iter().filter(|(_, cidr)| cidr.prefix == prefixes && !cidr.barred && idle(cidr));
        idle.map(|(net, _)| *net).collect()
    }

    /// Number of addresses that pods have.
    pub fn held(&self) -> usize {
        self.index.len() + self.orphans.len()
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
pub(super) mod tests;
