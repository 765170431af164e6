//! Sorting and ordered collections at a small price in code.
//!
//! `slice::sort` and `collect` into a `BTreeMap` or `BTreeSet` (which sorts first) leave about 5 KB of merge sort in the
//! executable for every type that they are used with. Here one sort of indices serves all types, and collections are
//! filled one by one. Both are stable and take n log n steps; lists are of links, addresses and ENIs, thousands at most.

use std::cmp::Ordering;

/// Sorts by the order of the items themselves; equal ones keep their places.
pub fn sort<T: Ord>(items: &mut [T]) {
    sort_by(items, T::cmp);
}

/// Sorts by a key, which is made once for each item; items with equal keys keep their places.
pub fn sort_by_key<T, K: Ord>(items: &mut [T], key: impl Fn(&T) -> K) {
    if items.len() < 2 {
        return;
    }
    let keys: Vec<K> = items.iter().map(key).collect();
    arrange(items, ranked(keys.len(), &|a, b| keys[a].cmp(&keys[b])));
}

/// Sorts by a comparison, which must be a total order; equal items keep their places.
pub fn sort_by<T>(items: &mut [T], compare: impl Fn(&T, &T) -> Ordering) {
    let from = ranked(items.len(), &|a, b| compare(&items[a], &items[b]));
    arrange(items, from);
}

fn arrange<T>(items: &mut [T], mut from: Vec<usize>) {
    // Place `i` gets what stood at `from[i]`: every cycle of that permutation is walked once.
    for start in 0..from.len() {
        let mut place = start;
        loop {
            let next = std::mem::replace(&mut from[place], place);
            if next == start || next == place {
                break;
            }
            items.swap(place, next);
            place = next;
        }
    }
}

// Not generic, so that it exists once.
fn ranked(count: usize, compare: &dyn Fn(usize, usize) -> Ordering) -> Vec<usize> {
    let mut ranks: Vec<usize> = (0..count).collect();
    ranks.sort_by(|a, b| compare(*a, *b));
    ranks
}

/// Fills collections without sorting first.
pub trait Gather: Iterator + Sized {
    /// As `collect`: of items with equal keys the last one's value stays.
    fn gather<C: Default + Extend<Self::Item>>(self) -> C {
        let mut all = C::default();
        all.extend(self);
        all
    }
}

impl<I: Iterator> Gather for I {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    proptest::proptest! {
        #[test]
        fn sorts_as_the_standard_library_does(items: Vec<(u8, String)>) {
            let check = |ours: fn(&mut [(u8, String)]), std: fn(&mut [(u8, String)])| {
                let (mut left, mut right) = (items.clone(), items.clone());
                ours(&mut left);
                std(&mut right);
                assert_eq!(left, right);
            };
            check(sort, <[_]>::sort);
            // Many equal keys, whose items must keep their places.
            check(|all| sort_by_key(all, |item| item.0 % 4), |all| all.sort_by_key(|item| item.0 % 4));
            check(|all| sort_by(all, |a, b| b.1.cmp(&a.1)), |all| all.sort_by(|a, b| b.1.cmp(&a.1)));
        }

        #[test]
        fn gathers_what_collect_collects(items: Vec<(u8, u8)>) {
            let map: BTreeMap<u8, u8> = items.iter().copied().gather();
            assert_eq!(map, items.iter().copied().collect());
            let set: BTreeSet<(u8, u8)> = items.iter().copied().gather();
            assert_eq!(set, items.iter().copied().collect());
        }
    }
}
