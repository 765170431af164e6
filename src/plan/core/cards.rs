//! Network cards: which ones serve pods, what takes their slots, and which card a pod is meant for
//! (`spec/ipamd.md` 7.2, 7.3; `spec/config.md` 5.6).

use super::growth::AFTER_FAILURE;
use super::{Core, Level, Timer};
use crate::model::ids::EniId;
use crate::model::imds;
use crate::model::map::{Map, Set};
use crate::model::order::Gather as _;
use crate::model::time::Mono;
use crate::plan::sizing::Outlook;

/// The type of an ENI that carries no addresses at all.
pub(super) const EFA_ONLY: &str = "efa-only";

impl Core {
    /// The network card of an attached ENI, as IMDS or else EC2 tells.
    pub(super) fn card_of(&self, id: &EniId) -> Option<u32> {
        let seen = self.attached.get(id).map(|eni| eni.card);
        seen.or_else(|| self.facts.get(id).map(|facts| facts.card))
    }

    /// The managed cards in ascending order. A card is left out while it holds an ENI without addresses (`efa-only`) and
    /// no other that is ours to use.
    pub(super) fn open_cards(&self) -> Vec<u32> {
        let on = |card: u32| self.facts.keys().filter(move |id| self.card_of(id) == Some(card));
        let efa_only = |id: &EniId| self.facts.get(id).is_some_and(|facts| facts.interface_type == EFA_ONLY);
        let open = |card: u32| card == 0 || !on(card).any(efa_only) || on(card).any(|id| self.managed(id));
        self.config.cards.keys().copied().filter(|card| open(*card)).collect()
    }

    /// Attached ENIs of a card that take a slot and are neither in the pool nor on their way in or out: those that are not
    /// ours to use, those that cannot serve this family, and those that IMDS does not show.
    pub(super) fn strangers(&self, card: u32) -> usize {
        let coming = self.coming();
        let stranger = |id: &&EniId| {
            self.pool.eni(id).is_none()
                && self.facts.contains_key(*id)
                && !self.freeing.contains_key(*id)
                && !coming.contains(*id)
        };
        let omitted = self.devices.keys().filter(|id| !self.attached.contains_key(*id));
        let on_card = |id: &&EniId| self.card_of(id) == Some(card);
        self.attached.keys().chain(omitted).filter(stranger).filter(on_card).count()
    }

    /// Whether EC2 lists an attached ENI of ours that IMDS has not shown yet: it may be enough.
    pub(super) fn awaits_imds(&self) -> bool {
        let coming = self.coming();
        let omitted = |id: &EniId| {
            !self.attached.contains_key(id)
                && self.pool.eni(id).is_none()
                && !self.freeing.contains_key(id)
                && !coming.contains(id)
                && self.managed(id)
        };
        self.devices.keys().any(omitted)
    }

    /// A new scan of IMDS: what it shows for the first time on a card that is not managed is told, and what is gone of the
    /// ENIs that are not in the pool is looked up, because it may open a card or a slot.
    pub(super) fn note_attached(&mut self, before: &Map<EniId, imds::Eni>) {
        let odd: Vec<String> = self
            .attached
            .values()
            .filter(|eni| !before.contains_key(&eni.id) && !self.config.cards.contains_key(&eni.card))
            .map(|eni| format!("eni {} is on network card {}, which is not managed: left alone", eni.id, eni.card))
            .collect();
        for text in odd {
            self.log(Level::Info, text);
        }
        let gone = before.keys().filter(|id| !self.attached.contains_key(*id));
        let strange = |id: &EniId| self.facts.contains_key(id) && !self.freeing.contains_key(id);
        if gone.filter(|id| self.pool.eni(id).is_none()).any(strange) {
            self.describe();
        }
    }

    /// Until when a card does not grow because it failed to. A card above 0 holds up itself alone: the node's own needs
    /// nothing of it.
    pub(super) fn growth_pause(&self, card: u32) -> Option<Mono> {
        let own = self.held_up.get(&card).map(|(_, until)| *until).filter(|until| *until > self.now.mono);
        self.timers.get(&Timer::Growth).copied().or(own)
    }

    /// A growth of a card above 0 has failed.
    pub(super) fn hold_up(&mut self, card: u32) {
        if self.growth_pause(card).is_some() {
            return; // several failed together
        }
        let failures = self.held_up.get(&card).map_or(0, |(failures, _)| *failures);
        let until = self.now.mono.plus(AFTER_FAILURE.pause(failures, &mut self.random));
        self.held_up.insert(card, (failures.saturating_add(1), until));
        self.wake_for(Timer::Shrink, until);
    }

    /// What was going to be taken in and turns out not to be ours: IMDS or the checkpoint had told otherwise.
    pub(super) fn unwant_strangers(&mut self, coming: &Set<EniId>) {
        let ours = |id: &EniId| self.managed(id) || self.pool.eni(id).is_some() || coming.contains(id);
        let strange: Vec<EniId> = self.wanted.keys().filter(|id| !ours(id)).cloned().collect();
        for id in strange {
            self.wanted.remove(&id);
            self.ready.remove(&id);
            self.host_dirty = true;
        }
    }

    /// How many pods wait for an address of a card. Those that need only one are meant for the first card that can grow.
    pub(super) fn waiting_for(&self, card: u32) -> usize {
        let everywhere = self.waiting.iter().filter(|waiting| waiting.every_card).count();
        let ordinary = self.waiting.len() - everywhere;
        if ordinary == 0 || self.config.cards.len() == 1 {
            return self.waiting.len();
        }
        let busy: Set<u32> = self.growths.values().map(super::growth::Growth::card).gather();
        let can_grow = |card: &u32| {
            if self.growth_pause(*card).is_some() {
                return false;
            }
            let outlook = Outlook { starved: true, ..Outlook::default() };
            let sizing = self.sizing_with(*card, self.waiting.len());
            let skip = |id: &EniId| self.skipped(id);
            busy.contains(card) || sizing.growth(&self.pool, self.now.mono, &outlook, skip).is_some()
        };
        let meant = self.open_cards().into_iter().find(can_grow).unwrap_or(0);
        everywhere + if card == meant { ordinary } else { 0 }
    }
}
