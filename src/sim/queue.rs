//! What will happen, in the order of time; what happens at one moment keeps the order in which it was put in.

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

/// The queue. Times are nanoseconds of virtual time.
#[derive(Debug)]
pub struct Queue<T> {
    heap: BinaryHeap<Entry<T>>,
    serial: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Queue { heap: BinaryHeap::new(), serial: 0 }
    }
}

impl<T> Queue<T> {
    /// Puts in what will happen at `at`.
    pub fn push(&mut self, at: u64, item: T) {
        self.serial += 1;
        self.heap.push(Entry { at, serial: self.serial, item });
    }

    /// When the next thing happens.
    pub fn next(&self) -> Option<u64> {
        self.heap.peek().map(|entry| entry.at)
    }

    /// Takes out what happens next, if it does not lie behind `until`.
    pub fn pop(&mut self, until: u64) -> Option<(u64, T)> {
        self.next().filter(|at| *at <= until)?;
        self.heap.pop().map(|entry| (entry.at, entry.item))
    }

    /// How much is still to come.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether nothing will happen any more.
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
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
    }
}
