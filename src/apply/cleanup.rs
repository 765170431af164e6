//! Takes away what is ours on a node (`plan::cleanup`).

use super::{Host, netfilter};
use crate::error::{Error, Result};
use crate::netlink::{nft, nft_outline};
use crate::plan::cleanup::Cleanup;
use crate::plan::host::Step;

impl Host {
    /// Carries it out, routing first, so that what is left of the packet filter never meets pods that have lost their rules.
    /// What could not be removed does not keep the rest; an error is one of the netlink sockets.
    pub fn clean_up(&mut self, cleanup: &Cleanup) -> Result<Vec<Error>> {
        let mut errors = self.take_away(&cleanup.steps)?.1;
        self.known = None;
        let socket = netfilter(&mut self.netfilter, &self.namespace)?;
        for (family, name) in &cleanup.tables {
            errors.extend(nft::delete(socket, *family, name).err());
        }
        if !cleanup.chains.is_empty() {
            let generation = nft::generation(socket)?;
            errors.extend(nft_outline::remove(socket, &cleanup.chains, generation).err());
        }
        Ok(errors)
    }

    /// Carries steps out that no plan has: those that were made, and what the kernel refused of the rest.
    pub fn take_away(&mut self, steps: &[Step]) -> Result<(Vec<Step>, Vec<Error>)> {
        let mut done = Vec::new();
        let refused = self.carry_out(steps, &mut done)?;
        let errors = refused.node.into_iter().chain(refused.warnings).map(|(_, error)| error);
        Ok((done, errors.collect()))
    }
}
