//! The take-over of a node from a former installation (`spec/dataplane.md` 25), after our own tables are there. Best effort:
//! both sets of rules together do no harm.

use super::{Host, netfilter};
use crate::error::{Context, Result};
use crate::model::net::Family;
use crate::model::nft::Forward;
use crate::netlink::nft_outline;
use crate::netlink::xtables;
use crate::plan::former::{self, TABLES};

/// How often leftovers are looked for until none is found.
pub(super) const LOOKS_MAX: u32 = 10;

impl Host {
    /// Removes what a former installation has left in tables of `iptables-nft`, in one transaction; what was removed, in
    /// words. To be called after [`Host::host`], at the start and at every later tick: once nothing is found, or after ten
    /// times, it does nothing any more. An error is one of this attempt only.
    pub fn take_over(&mut self) -> Result<Vec<String>> {
        if self.looks == 0 {
            return Ok(Vec::new());
        }
        self.looks -= 1;
        let what = "remove rules of a former installation";
        let ours = self.tables().context(what)?;
        let socket = netfilter(&mut self.netfilter, &self.namespace)?;
        let (generation, found) = nft_outline::outlines(socket, &TABLES).context(what)?;
        let removals = former::leftovers(&found, &ours);
        nft_outline::remove(socket, &removals, generation).context(what)?;
        if removals.is_empty() {
            self.looks = 0;
        }
        Ok(removals.iter().map(former::text).collect())
    }

    /// Chains of a former installation in `iptables-legacy`, where nobody can remove them safely but an operator
    /// ([`former::legacy_commands`]).
    pub fn legacy_chains(&self) -> Result<Vec<String>> {
        self.chains_of_legacy().map(former::legacy_chains)
    }

    /// All chains of users in table `nat` of `iptables-legacy`.
    pub fn chains_of_legacy(&self) -> Result<Vec<String>> {
        // What /proc shows, and what a socket asks, is that of the thread's namespace.
        self.namespace.run(|| xtables::chains(Family::V4, "nat"))?
    }

    /// What `iptables-legacy` or `ip6tables-legacy` does to what is forwarded.
    pub fn legacy_forward(&self, family: Family) -> Result<Forward> {
        self.namespace.run(|| xtables::forward(family))?
    }
}
