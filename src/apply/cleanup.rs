//! Takes away what is ours on a node (`plan::cleanup`).

use super::{Host, netfilter};
use crate::error::{Error, Result};
use crate::netlink::{nft, nft_outline};
use crate::plan::cleanup::Cleanup;

impl Host {
    /// Carries it out, routing first, so that what is left of the packet filter never meets pods that have lost their rules.
    /// What could not be removed does not keep the rest; an error is one of the netlink sockets.
    pub fn clean_up(&mut self, cleanup: &Cleanup) -> Result<Vec<Error>> {
        let mut errors = self.carry_out(&cleanup.steps, &mut Vec::new())?.node;
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
}
