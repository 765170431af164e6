//! A node that another installation has run before: its rules in nf_tables are removed, those in `iptables-legacy` reported
//! (`spec/dataplane.md` 25). Nothing here is ever fatal.

use super::metrics::Metrics;
use crate::apply::Host;
use crate::clock;
use crate::plan::former;
use crate::plan::host::Intent;
use std::time::{Duration, Instant};

/// The least time between two looks at the rules in nf_tables: there are only so many, and pods that come and go ask for one
/// each.
const LOOK_EVERY: Duration = Duration::from_secs(20);
/// How often rules in `iptables-legacy` are looked for, and warned of.
const LEGACY_EVERY: Duration = Duration::from_hours(1);

/// What was looked at, and when.
#[derive(Default)]
pub(super) struct Watch {
    tables: Option<Instant>,
    legacy: Option<Instant>,
}

impl Watch {
    /// To be called each time the host's network has been made what `intent` says; `primary` is the name of the primary
    /// ENI's link.
    pub(super) fn look(&mut self, host: &mut Host, intent: &Intent, primary: &str, metrics: &Metrics) {
        let due = |last: &mut Option<Instant>, every: Duration| {
            let now = clock::instant();
            let due = last.is_none_or(|looked| now.duration_since(looked) >= every);
            if due {
                *last = Some(now);
            }
            due
        };
        if due(&mut self.tables, LOOK_EVERY) {
            match host.take_over() {
                Ok(removed) => removed.iter().for_each(|text| log::info!("removed of a former installation: {text}")),
                Err(error) => log::warn!("{error}; tried again later"),
            }
        }
        if !due(&mut self.legacy, LEGACY_EVERY) {
            return;
        }
        match host.legacy_chains() {
            Ok(chains) => {
                metrics.legacy(!chains.is_empty());
                if !chains.is_empty() {
                    let commands = former::legacy_commands(&intent.veth_prefix, intent.mark, primary, &chains);
                    log::warn!("{}", former::legacy_warning(&commands));
                }
            }
            Err(error) => log::warn!("look for rules of a former installation: {error}"),
        }
    }
}
