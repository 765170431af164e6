//! Why a pod gets no address: one word for the counters, one sentence for the pod's event (`field.md` B11).

use super::{Core, Phase};
use crate::model::time::Mono;

impl Core {
    /// The most telling cause that is known now: (word, sentence).
    pub(super) fn why_no_address(&self, every_card: bool) -> (&'static str, String) {
        let now = self.now.mono;
        // Of a pod for all cards the first that has nothing is to blame.
        let without = |card: &u32| {
            let stats = self.pool.stats(now, *card);
            every_card && stats.available() <= stats.cooling
        };
        let card = self.open_cards().into_iter().find(without).unwrap_or(0);
        let seconds = |until: Mono| until.since(now).as_secs() + 1;
        let stats = self.pool.stats(now, card);
        let enis = self.pool.enis().filter(|(_, eni)| eni.card == card).count();
        let held = format!(
            "{} of {} addresses are in use, {} rest after their last pod, {enis} of {} ENIs are attached",
            stats.assigned,
            stats.total,
            stats.cooling,
            self.sizing(card).eni_limit,
        );
        let on = if card > 0 { format!(" on network card {card}") } else { String::new() };
        let with = |cause: &'static str, why: String| (cause, format!("{why}; {held}{on}"));
        if self.phase == Phase::Stopping {
            return with("stopping", "the daemon is stopping".into());
        }
        if self.described.is_none() && !self.config.imds_only {
            return with("starting", "the daemon is starting and waits for EC2 to list the node's ENIs".into());
        }
        if let Some((action, until)) = self.pacer.paused(now).next().filter(|_| self.growing_now()) {
            return with("throttled", format!("EC2 throttles {action}: next call in {} s", seconds(until)));
        }
        if let Some((subnet, until)) = self.exhausted.iter().find(|(_, until)| **until > now) {
            let again = seconds(*until);
            return with("subnet_exhausted", format!("subnet {subnet} has no free addresses: next try in {again} s"));
        }
        if let Some((subnet, until)) = self.fragmented.first_closed(now) {
            let again = seconds(until);
            let why = format!("subnet {subnet} has no free block for a prefix: next try in {again} s");
            return with("subnet_fragmented", why);
        }
        if !self.config.provisioning {
            return with("provisioning_disabled", "the settings forbid to ask EC2 for more addresses".into());
        }
        if self.cordoned() {
            return with("cordoned", "the node is cordoned: it asks EC2 for nothing".into());
        }
        if let (Some(failure), Some(until)) = (&self.last_failure, self.growth_pause(card)) {
            return with("ec2_error", format!("{failure}: next try in {} s", seconds(until)));
        }
        if self.growing_now() {
            return with("growing", "more addresses are on their way".into());
        }
        if stats.total >= self.max_pods() {
            return with("max_pods", format!("the node may run {} pods", self.max_pods()));
        }
        if stats.cooling > 0 {
            return with("cooling", "every free address rests after its last pod".into());
        }
        with("eni_limit", "the instance type takes no more ENIs or addresses".into())
    }
}
