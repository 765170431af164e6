//! What will happen, in the order of time; what happens at one moment keeps the order in which it was put in.

use crate::model::map::Map;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

#[derive(Debug)]
struct Entry<T> {
    at: u64,
    serial: u64,
    item: T,
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<T> Eq for Entry<T> {}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Entry<T> {
    // The heap gives its greatest first: that is the earliest.
    fn cmp(&self, other: &Self) -> Ordering {
        let rank = |entry: &Self| (u128::from(entry.at) << 64) | u128::from(entry.serial);
        rank(other).cmp(&rank(self))
    }
}

/// What happens within 2^28 ns, a quarter of a second, is sorted together.
const SLOT_BITS: u32 = 28;

/// The queue. Times are nanoseconds of virtual time.
///
/// Only what happens soon is kept sorted: a heap of all that thousands of nodes have ahead of them fits no cache.
#[derive(Debug)]
pub struct Queue<T> {
    near: BinaryHeap<Entry<T>>,
    // By slot of time; all of them lie behind what is near.
    far: Map<u64, Vec<Entry<T>>>,
    // The first slot that is not near.
    edge: u64,
    serial: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Queue { near: BinaryHeap::new(), far: Map::new(), edge: 0, serial: 0 }
    }
}

impl<T> Queue<T> {
    /// Puts in what will happen at `at`.
    pub fn push(&mut self, at: u64, item: T) {
        self.serial += 1;
        let entry = Entry { at, serial: self.serial, item };
        let slot = at >> SLOT_BITS;
        if slot < self.edge {
            self.near.push(entry);
        } else {
            self.far.entry(slot).or_default().push(entry);
        }
    }

    /// Takes out what happens next, if it does not lie behind `until`.
    pub fn pop(&mut self, until: u64) -> Option<(u64, T)> {
        if self.near.is_empty()
            && let Some((slot, entries)) = self.far.pop_first()
        {
            self.edge = slot + 1;
            self.near = entries.into();
        }
        self.near.peek().filter(|entry| entry.at <= until)?;
        self.near.pop().map(|entry| (entry.at, entry.item))
    }

    /// How much is still to come.
    pub fn len(&self) -> usize {
        self.near.len() + self.far.values().map(Vec::len).sum::<usize>()
    }

    /// Whether nothing will happen any more.
    pub fn is_empty(&self) -> bool {
        self.near.is_empty() && self.far.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earlier_first_and_then_in_order() {
        let mut queue = Queue::default();
        for (at, item) in [(5, 'c'), (1, 'a'), (5, 'd'), (2, 'b'), (9, 'e')] {
            queue.push(at, item);
        }
        let taken: String = std::iter::from_fn(|| queue.pop(5)).map(|(_, item)| item).collect();
        assert_eq!((taken.as_str(), queue.len()), ("abcd", 1));
        // Over many slots of time, and put in while others are taken out.
        let mut queue = Queue::default();
        let mut dice = 1_u64;
        let (mut taken, mut now) = (Vec::new(), 0);
        for _ in 0..2000 {
            for _ in 0..2 {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                queue.push(now + (dice >> 33), ());
            }
            now = queue.pop(u64::MAX).map_or(now, |(at, ())| at);
            taken.push(now);
        }
        taken.extend(std::iter::from_fn(|| queue.pop(u64::MAX)).map(|(at, ())| at));
        assert!(taken.is_sorted() && taken.len() == 4000 && queue.is_empty());
    }
}
