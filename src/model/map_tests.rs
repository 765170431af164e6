//! Everything is compared with the standard library's types.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug)]
enum Do {
    Insert(u8, String),
    Remove(u8),
    Change(u8, String),
    OrInsert(u8, String),
    OrDefault(u8),
    Modify(u8, String),
    Entry(u8, String),
    Extend(Vec<(u8, String)>),
    Retain(u8),
    Extract(u8),
    PopFirst,
    Clear,
}

fn deed() -> impl Strategy<Value = Do> {
    // Few keys, so that most deeds meet some.
    let (key, text) = (0..24_u8, "[a-c]{0,2}");
    prop_oneof![
        8 => (key.clone(), text).prop_map(|(key, text)| Do::Insert(key, text)),
        3 => key.clone().prop_map(Do::Remove),
        2 => (key.clone(), text).prop_map(|(key, text)| Do::Change(key, text)),
        2 => (key.clone(), text).prop_map(|(key, text)| Do::OrInsert(key, text)),
        2 => key.clone().prop_map(Do::OrDefault),
        2 => (key.clone(), text).prop_map(|(key, text)| Do::Modify(key, text)),
        2 => (key.clone(), text).prop_map(|(key, text)| Do::Entry(key, text)),
        2 => proptest::collection::vec((key.clone(), text), 0..8).prop_map(Do::Extend),
        1 => key.clone().prop_map(Do::Retain),
        1 => key.prop_map(Do::Extract),
        1 => Just(Do::PopFirst),
        1 => Just(Do::Clear),
    ]
}

// The deed on a map of either type, and what it answered.
macro_rules! carry_out {
    ($map:expr, $entry:path, $extract:expr, $deed:expr) => {{
        use $entry as E;
        match $deed.clone() {
            Do::Insert(key, text) => format!("{:?}", $map.insert(key, text)),
            Do::Remove(key) => format!("{:?}", $map.remove(&key)),
            Do::Change(key, text) => format!("{:?}", $map.get_mut(&key).map(|value| value.push_str(&text))),
            Do::OrInsert(key, text) => format!("{:?}", $map.entry(key).or_insert(text)),
            Do::Modify(key, text) => {
                format!("{:?}", $map.entry(key).and_modify(|value| value.push_str(&text)).or_insert_with(String::new))
            }
            Do::OrDefault(key) => format!("{:?}", $map.entry(key).or_default()),
            Do::Entry(key, text) => match $map.entry(key) {
                E::Vacant(entry) => format!("vacant, {}", entry.insert(text)),
                E::Occupied(mut entry) => {
                    entry.get_mut().push_str(&text);
                    format!("{} has {}", entry.key(), entry.get())
                }
            },
            Do::Extend(pairs) => format!("{:?}", $map.extend(pairs)),
            Do::Retain(odd) => format!(
                "{:?}",
                $map.retain(|key, value| {
                    value.push('.');
                    key % 3 != odd % 3
                })
            ),
            Do::Extract(odd) => format!("{:?}", $extract(&mut $map, odd)),
            Do::PopFirst => format!("{:?}", $map.pop_first()),
            Do::Clear => format!("{:?}", $map.clear()),
        }
    }};
}

fn bounds() -> impl Strategy<Value = (Bound<u8>, Bound<u8>)> {
    let bound = || {
        prop_oneof![Just(Bound::Unbounded), (0..24_u8).prop_map(Bound::Included), (0..24_u8).prop_map(Bound::Excluded)]
    };
    (bound(), bound())
}

fn key_of(bound: Bound<u8>) -> Option<u8> {
    match bound {
        Bound::Included(key) | Bound::Excluded(key) => Some(key),
        Bound::Unbounded => None,
    }
}

proptest! {
    #[test]
    fn a_map_does_what_the_standard_one_does(deeds in proptest::collection::vec(deed(), 0..60), range in bounds()) {
        let (mut ours, mut std) = (Map::new(), BTreeMap::new());
        for deed in &deeds {
            let extract = |map: &mut Map<u8, String>, odd: u8| -> Map<u8, String> {
                map.extract_if(.., |key, _| key % 3 == odd % 3).collect()
            };
            let extract_std = |map: &mut BTreeMap<u8, String>, odd: u8| -> BTreeMap<u8, String> {
                map.extract_if(.., |key, _| key % 3 == odd % 3).collect()
            };
            let left = carry_out!(ours, Entry, extract, deed);
            let right = carry_out!(std, std::collections::btree_map::Entry, extract_std, deed);
            prop_assert_eq!(left, right, "{:?}", deed);
            prop_assert!(ours.iter().eq(std.iter()), "{:?} and {:?} after {:?}", ours, std, deed);
        }
        prop_assert_eq!(format!("{ours:?} {ours:#?}"), format!("{std:?} {std:#?}"));
        prop_assert_eq!((ours.len(), ours.is_empty()), (std.len(), std.is_empty()));
        prop_assert!(ours.keys().eq(std.keys()) && ours.values().rev().eq(std.values().rev()));
        prop_assert!(ours.iter().rev().eq(std.iter().rev()) && ours.values_mut().eq(std.values_mut()));
        prop_assert!(ours.iter_mut().eq(std.iter_mut()));
        prop_assert_eq!(ours.first_key_value(), std.first_key_value());
        prop_assert_eq!(ours.last_key_value(), std.last_key_value());
        for key in 0..24 {
            prop_assert_eq!(ours.get(&key), std.get(&key));
            prop_assert_eq!(ours.contains_key(&key), std.contains_key(&key));
        }
        let empty = match (key_of(range.0), key_of(range.1)) {
            (Some(low), Some(high)) => low >= high && range != (Bound::Included(low), Bound::Included(low)),
            _ => false,
        };
        if empty {
            prop_assert_eq!(ours.range(range).next(), None);
        } else {
            prop_assert!(ours.range(range).eq(std.range(range)), "{:?}", range);
        }
        let pairs: Vec<_> = std.clone().into_iter().rev().collect();
        prop_assert_eq!(&pairs.into_iter().collect::<Map<_, _>>(), &ours);
        prop_assert!(ours.clone().into_keys().eq(std.clone().into_keys()));
        prop_assert!(ours.clone().into_values().eq(std.clone().into_values()));
        let text = serde_json::to_string(&ours).unwrap();
        prop_assert_eq!(&text, &serde_json::to_string(&std).unwrap());
        prop_assert_eq!(&serde_json::from_slice::<Map<u8, String>>(text.as_bytes()).unwrap(), &ours);
        prop_assert!(ours.into_iter().eq(std));
    }

    #[test]
    fn a_set_does_what_the_standard_one_does(deeds: Vec<(bool, u8)>, others: Vec<u8>) {
        let (mut ours, mut std) = (Set::new(), BTreeSet::new());
        for (inserts, item) in deeds {
            let item = (item % 40).to_string();
            if inserts {
                prop_assert_eq!(ours.insert(item.clone()), std.insert(item));
            } else {
                prop_assert_eq!(ours.remove(item.as_str()), std.remove(item.as_str()));
            }
            prop_assert!(ours.iter().eq(std.iter()), "{:?} and {:?}", ours, std);
        }
        let others = others.iter().map(|item| (item % 40).to_string());
        let (other, other_std) = (others.clone().collect::<Set<_>>(), others.collect::<BTreeSet<_>>());
        prop_assert_eq!(format!("{ours:?}"), format!("{std:?}"));
        prop_assert_eq!((ours.len(), ours.is_empty()), (std.len(), std.is_empty()));
        prop_assert_eq!((ours.first(), ours.last()), (std.first(), std.last()));
        prop_assert!(ours.difference(&other).eq(std.difference(&other_std)));
        prop_assert!(ours.intersection(&other).eq(std.intersection(&other_std)));
        prop_assert_eq!(ours.is_subset(&other), std.is_subset(&other_std));
        prop_assert_eq!(ours == other, std == other_std);
        for item in &other {
            prop_assert_eq!(ours.contains(item), std.contains(item));
        }
        let text = serde_json::to_string(&ours).unwrap();
        prop_assert_eq!(&text, &serde_json::to_string(&std).unwrap());
        prop_assert_eq!(&serde_json::from_slice::<Set<String>>(text.as_bytes()).unwrap(), &ours);
        let wanted = |item: &String| item.len() == 1;
        ours.retain(wanted);
        std.retain(wanted);
        prop_assert_eq!(ours.pop_first(), std.pop_first());
        prop_assert!(ours.into_iter().eq(std));
    }
}

#[test]
fn the_last_of_equal_keys_stays_and_what_is_no_map_is_refused() {
    assert_eq!(Map::from([(2, 'a'), (1, 'b'), (2, 'c')]), Map::from([(1, 'b'), (2, 'c')]));
    assert_eq!(Set::from([2, 1, 2]), Set::from([1, 2]));
    let read = |text: &str| serde_json::from_slice::<Map<String, u8>>(text.as_bytes());
    assert_eq!(read(r#"{"b": 1, "a": 2, "b": 3}"#).unwrap(), Map::from([("a".into(), 2), ("b".into(), 3)]));
    assert_eq!(read(r#"{"a": 2}"#).unwrap()["a"], 2);
    for wrong in ["[]", "1", r#"{"a": "x"}"#] {
        assert!(read(wrong).is_err(), "{wrong}");
    }
}
