//! The free addresses of one subnet.

use ipnet::Ipv4Net;
use std::net::Ipv4Addr;

/// Addresses of a subnet that EC2 keeps: the network, the router, DNS, one for the future, and the last one.
pub const RESERVED: u32 = 5;

/// Addresses in a prefix (/28).
const BLOCK: u32 = 16;

/// Which addresses of an IPv4 subnet are taken.
#[derive(Clone, Debug)]
pub struct Space {
    cidr: Ipv4Net,
    used: Vec<u16>, // one bit per address, one word per /28
    taken: u32,
}

impl Space {
    /// All free but what EC2 keeps. EC2 allows /16 to /28; of a larger one only the first /16 is used.
    pub fn new(cidr: Ipv4Net) -> Space {
        let cidr = cidr.trunc();
        let mut space = Space { cidr, used: Vec::new(), taken: 0 };
        space.used = vec![0; space.size().div_ceil(BLOCK) as usize];
        let last = space.size() - 1;
        for offset in [0, 1, 2, 3, last] {
            space.mark(offset, true);
        }
        space.taken = 0;
        space
    }

    /// The CIDR.
    pub fn cidr(&self) -> Ipv4Net {
        self.cidr
    }

    fn size(&self) -> u32 {
        1 << (32 - u32::from(self.cidr.prefix_len())).min(16)
    }

    fn usable(&self, offset: u32) -> bool {
        self.used.get((offset / BLOCK) as usize).is_some_and(|word| word & (1 << (offset % BLOCK)) == 0)
    }

    fn mark(&mut self, offset: u32, taken: bool) {
        let Some(word) = self.used.get_mut((offset / BLOCK) as usize) else { return };
        let bit = 1 << (offset % BLOCK);
        if taken {
            *word |= bit;
            self.taken += 1;
        } else {
            *word &= !bit;
            self.taken -= 1;
        }
    }

    fn at(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.cidr.network()) + offset)
    }

    fn offset(&self, addr: Ipv4Addr) -> Option<u32> {
        self.cidr.contains(&addr).then(|| u32::from(addr) - u32::from(self.cidr.network()))
    }

    /// How many addresses are taken, besides those that EC2 keeps.
    pub fn taken(&self) -> u32 {
        self.taken
    }

    /// How many addresses are free (`availableIpAddressCount`).
    pub fn free(&self) -> u32 {
        self.size().saturating_sub(RESERVED).saturating_sub(self.taken)
    }

    /// How many aligned /28 blocks are free.
    pub fn free_blocks(&self) -> usize {
        self.used.iter().filter(|word| **word == 0).count()
    }

    /// Takes one address: the first free one from the place that `dice` points at, so that holes appear as they do in a
    /// subnet that many nodes share. A `dice` of 0 takes the lowest.
    pub fn take(&mut self, dice: u64) -> Option<Ipv4Addr> {
        let size = self.size();
        let start = u32::try_from(dice % u64::from(size)).unwrap_or(0);
        // Word by word: a nearly full /16 is looked through in 4096 steps.
        let from = |word: u32, least: u32| {
            let free = !self.used.get(word as usize)? & (u16::MAX << least);
            (free != 0).then(|| word * BLOCK + free.trailing_zeros())
        };
        let (words, first) = (size.div_ceil(BLOCK), start / BLOCK);
        let after = from(first, start % BLOCK).or_else(|| (first + 1..words).find_map(|word| from(word, 0)));
        let found = after.or_else(|| (0..=first).find_map(|word| from(word, 0)))?;
        self.mark(found, true);
        Some(self.at(found))
    }

    /// Takes one aligned /28, in the same manner.
    pub fn take_block(&mut self, dice: u64) -> Option<Ipv4Net> {
        let blocks = self.size() / BLOCK;
        let start = u32::try_from(dice % u64::from(blocks.max(1))).unwrap_or(0);
        let found = (start..blocks).chain(0..start).find(|block| self.used[*block as usize] == 0)?;
        self.used[found as usize] = u16::MAX;
        self.taken += BLOCK;
        Ipv4Net::new(self.at(found * BLOCK), 28).ok()
    }

    /// Takes a certain address; false if it is taken, kept by EC2, or of another subnet.
    pub fn reserve(&mut self, addr: Ipv4Addr) -> bool {
        match self.offset(addr) {
            Some(offset) if self.usable(offset) => {
                self.mark(offset, true);
                true
            }
            _ => false,
        }
    }

    /// Gives one address back.
    pub fn release(&mut self, addr: Ipv4Addr) {
        let taken = self.offset(addr).filter(|offset| !self.usable(*offset));
        assert!(taken.is_some(), "address {addr} was not taken from {}", self.cidr);
        self.mark(taken.unwrap_or_default(), false);
    }

    /// Gives a block back.
    pub fn release_block(&mut self, block: Ipv4Net) {
        for addr in Ipv4AddrsOf(block) {
            self.release(addr);
        }
    }
}

// `Ipv4Net::hosts` leaves out the first and the last address; a prefix on an ENI has all sixteen.
struct Ipv4AddrsOf(Ipv4Net);

impl IntoIterator for Ipv4AddrsOf {
    type Item = Ipv4Addr;
    type IntoIter = std::iter::Map<std::ops::RangeInclusive<u32>, fn(u32) -> Ipv4Addr>;

    fn into_iter(self) -> Self::IntoIter {
        (u32::from(self.0.network())..=u32::from(self.0.broadcast())).map(Ipv4Addr::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::map::Set;

    fn space(cidr: &str) -> Space {
        Space::new(cidr.parse().unwrap())
    }

    #[test]
    fn ec2_keeps_five_addresses() {
        let mut space = space("10.0.1.0/28");
        assert_eq!(space.free(), 11);
        for kept in ["10.0.1.0", "10.0.1.1", "10.0.1.2", "10.0.1.3", "10.0.1.15", "10.0.2.5"] {
            assert!(!space.reserve(kept.parse().unwrap()), "{kept}");
        }
        let all = std::iter::from_fn(|| space.take(7)).collect::<Set<_>>();
        assert_eq!(all.len(), 11);
        assert_eq!(space.free(), 0);
        assert!(all.contains(&"10.0.1.4".parse().unwrap()) && all.contains(&"10.0.1.14".parse().unwrap()));
    }

    #[test]
    fn blocks_are_aligned_and_whole() {
        let mut space = space("10.0.1.0/24");
        assert_eq!(space.free_blocks(), 14, "the first and the last block hold kept addresses");
        assert!(space.reserve("10.0.1.40".parse().unwrap()));
        let mut blocks = Set::new();
        while let Some(block) = space.take_block(11) {
            assert_eq!(u32::from(block.addr()) % 16, 0);
            blocks.insert(block);
        }
        assert_eq!(blocks.len(), 13);
        assert!(!blocks.contains(&"10.0.1.32/28".parse().unwrap()), "one address was taken");
        for block in blocks {
            space.release_block(block);
        }
        assert_eq!(space.free(), 250);
    }
}
