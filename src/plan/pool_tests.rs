//! The vectors of `spec/ipamd.md` 17 that concern one pool, and its invariants as properties.

use super::*;
use proptest::prelude::*;

pub(crate) fn at(seconds: u64) -> Now {
    Now {
        mono: Mono::from_nanos((1000 + seconds) * 1_000_000_000),
        wall: Wall::from_unix_seconds(1_785_571_200 + i64::try_from(seconds).unwrap()),
    }
}

pub(crate) fn owner(id: &str) -> Owner {
    let key = PodKey { network: "aws-cni".into(), container: id.into(), ifname: "eth0".into() };
    Owner {
        key,
        pod: PodName { namespace: "default".into(), name: id.into() },
        interfaces: 1,
        since: Wall::from_unix_seconds(0),
    }
}

pub(crate) fn eni(device: u32, added: Now) -> Eni {
    eni_on((0, device), added)
}

pub(crate) fn eni_on((card, device): (u32, u32), added: Now) -> Eni {
    let mac = Mac([2, 0, 0, 0, 0, u8::try_from(device).unwrap()]);
    let own = format!("10.0.{device}.4/24").parse().unwrap();
    let table = if device == 0 { 254 } else { device + 1 };
    Eni::new(mac, (card, device), card == 0 && device == 0, Kind::Plain, table, "subnet-1".into(), own, added.mono)
}

/// ENIs `eni-<device>` with `total` single addresses each, `assigned` of them in use.
pub(crate) fn pool_of(shape: &[(usize, usize)], cooldown_s: u64) -> Pool {
    let mut pool = Pool::new(false, Duration::from_secs(cooldown_s));
    for (device, (assigned, total)) in shape.iter().enumerate() {
        let id = EniId(format!("eni-{device}"));
        pool.add_eni(id.clone(), eni(u32::try_from(device).unwrap(), at(0))).unwrap();
        for n in 0..*total {
            let net: IpNet = format!("10.0.{device}.{}/32", 10 + n).parse().unwrap();
            pool.add_cidr(&id, net).unwrap();
            if n < *assigned {
                pool.restore(0, net.addr(), owner(&format!("pod-{device}-{n}"))).unwrap();
            }
        }
    }
    pool.check();
    pool
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn ipv6_prefixes_serve_only_with_prefixes_on_and_are_never_counted_out() {
    for (prefix_mode, serves) in [(true, true), (false, false)] {
        let mut pool = Pool::new(prefix_mode, Duration::from_secs(30));
        pool.add_eni("eni-0".into(), eni(0, at(0))).unwrap();
        pool.add_cidr(&"eni-0".into(), "2001:db8:0:1:9::/80".parse().unwrap()).unwrap();
        let given = pool.assign(at(0), 0, owner("a")).map(|(place, _)| place.address);
        assert_eq!(given.is_ok(), serves);
        if !serves {
            continue;
        }
        assert_eq!(given, Ok(ip("2001:db8:0:1:9::")));
        assert_eq!(pool.assign(at(0), 0, owner("b")).unwrap().0.address, ip("2001:db8:0:1:9::1"));
        pool.release(at(1), &owner("a").key, 0).unwrap();
        assert_eq!(pool.assign(at(2), 0, owner("c")).unwrap().0.address, ip("2001:db8:0:1:9::2"), "a's rests");
        assert_eq!(pool.assign(at(40), 0, owner("d")).unwrap().0.address, ip("2001:db8:0:1:9::"));
        assert_eq!(pool.stats(at(40).mono, 0).total, 1 << 48);
    }
}

fn prefix_pool(cooldown_s: u64) -> Pool {
    let mut pool = Pool::new(true, Duration::from_secs(cooldown_s));
    pool.add_eni("eni-0".into(), eni(0, at(0))).unwrap();
    pool.add_cidr(&"eni-0".into(), "10.0.0.0/28".parse().unwrap()).unwrap();
    pool
}

#[test]
fn a_prefix_is_used_from_its_first_address_on() {
    let mut pool = prefix_pool(30);
    for (id, want) in [("a", "10.0.0.0"), ("b", "10.0.0.1"), ("c", "10.0.0.2")] {
        assert_eq!(pool.assign(at(1), 0, owner(id)).unwrap().0.address, ip(want));
    }
    pool.release(at(2), &owner("b").key, 0).unwrap();
    let stats = pool.stats(at(3).mono, 0);
    assert_eq!((stats.assigned, stats.total, stats.cooling), (2, 16, 1));
    assert_eq!(pool.assign(at(3), 0, owner("d")).unwrap().0.address, ip("10.0.0.3"), "within the cooldown");
    assert_eq!(pool.assign(at(40), 0, owner("e")).unwrap().0.address, ip("10.0.0.1"), "after it");
    pool.check();
}

#[test]
fn a_repeated_key_gets_its_address_again() {
    let mut pool = pool_of(&[(0, 3)], 30);
    let (first, fresh) = pool.assign(at(1), 0, owner("a")).unwrap();
    assert!(fresh);
    assert_eq!(pool.assign(at(2), 0, owner("a")).unwrap(), (first, false));
    assert_eq!(pool.stats(at(2).mono, 0).assigned, 1);
}

#[test]
fn the_address_that_rested_longest_is_taken_first() {
    let mut pool = pool_of(&[(0, 3)], 10);
    let addresses: Vec<_> = ["a", "b", "c"].map(|id| pool.assign(at(1), 0, owner(id)).unwrap().0.address).into();
    assert_eq!(pool.assign(at(1), 0, owner("d")), Err(NoAddress { total: 3, cooling: 0 }));
    pool.release(at(2), &owner("c").key, 0).unwrap();
    pool.release(at(3), &owner("a").key, 0).unwrap();
    assert_eq!(pool.assign(at(4), 0, owner("d")), Err(NoAddress { total: 3, cooling: 2 }));
    assert_eq!(pool.assign(at(20), 0, owner("d")).unwrap().0.address, addresses[2]);
    assert_eq!(pool.assign(at(20), 0, owner("e")).unwrap().0.address, addresses[0]);
}

#[test]
fn pods_are_packed_on_the_fullest_eni() {
    let mut pool = pool_of(&[(1, 3), (2, 3), (0, 3)], 0);
    assert_eq!(pool.assign(at(1), 0, owner("a")).unwrap().0.eni.as_str(), "eni-1");
    assert_eq!(pool.assign(at(1), 0, owner("b")).unwrap().0.eni.as_str(), "eni-0");
}

#[test]
fn cooldown_ends() {
    let mut pool = pool_of(&[(0, 2)], 1);
    pool.assign(at(0), 0, owner("a")).unwrap();
    pool.assign(at(0), 0, owner("b")).unwrap();
    pool.release(at(1), &owner("a").key, 0).unwrap();
    let stats = pool.stats(at(1).mono, 0);
    assert_eq!((stats.total, stats.assigned, stats.cooling), (2, 1, 1));
    assert_eq!(pool.stats(at(3).mono, 0).cooling, 0);
}

#[test]
fn other_kinds_of_cidrs_serve_their_pods_but_nobody_new() {
    let mut pool = prefix_pool(30);
    let single: IpNet = "10.0.0.99/32".parse().unwrap();
    pool.add_cidr(&"eni-0".into(), single).unwrap();
    pool.restore(0, single.addr(), owner("old")).unwrap();
    assert_eq!(pool.assign(at(1), 0, owner("new")).unwrap().0.address, ip("10.0.0.0"));
    assert_eq!(pool.remove_cidr(&"eni-0".into(), &single), Err(Refused::InUse));
    assert_eq!(pool.stats(at(1).mono, 0).total, 16, "the other kind is not counted");
    pool.release(at(2), &owner("old").key, 0).unwrap();
    pool.remove_cidr(&"eni-0".into(), &single).unwrap();
}

#[test]
fn an_excluded_eni_hands_nothing_out() {
    let mut pool = pool_of(&[(0, 3)], 30);
    pool.set_excluded(&"eni-0".into(), true);
    assert_eq!(pool.assign(at(1), 0, owner("a")), Err(NoAddress { total: 0, cooling: 0 }));
}

#[test]
fn a_pod_whose_cidr_is_missing_is_kept_and_finds_its_place() {
    let mut pool = pool_of(&[(0, 1)], 0);
    pool.restore(0, ip("10.0.7.7"), owner("lost")).unwrap();
    assert_eq!(pool.orphan_count(), 1);
    pool.add_cidr(&"eni-0".into(), "10.0.7.7/32".parse().unwrap()).unwrap();
    assert_eq!(pool.orphan_count(), 0);
    assert_eq!(pool.find(&owner("lost").key, 0).unwrap().address, ip("10.0.7.7"));
    assert_eq!(pool.assign(at(1), 0, owner("new")).unwrap().0.address, ip("10.0.0.10"), "never the kept one");
    assert_eq!(pool.restore(0, ip("10.0.7.7"), owner("thief")).unwrap_err(), owner("lost").key);
    pool.check();
}

#[test]
fn a_cidr_moves_with_its_pod_and_its_cooldown() {
    let mut pool = pool_of(&[(2, 2), (0, 0)], 30);
    let (from, to) = (EniId::from("eni-0"), EniId::from("eni-1"));
    let (used, rests): (IpNet, IpNet) = ("10.0.0.10/32".parse().unwrap(), "10.0.0.11/32".parse().unwrap());
    pool.release(at(1), &owner("pod-0-1").key, 0).unwrap();
    pool.bar(&from, &used, true);
    for net in [used, rests] {
        pool.move_cidr(&net, &from, &to).unwrap();
        assert_eq!(pool.move_cidr(&net, &from, &to), Err(Refused::UnknownCidr));
    }
    pool.check();
    let place = pool.find(&owner("pod-0-0").key, 0).unwrap();
    assert_eq!((place.eni, place.address, place.table), (to.clone(), used.addr(), 2));
    assert!(pool.assign(at(2), 0, owner("new")).is_err(), "the other one rests");
    // The pod's interface is on the card: its address does not follow to another.
    pool.add_eni("eni-2".into(), eni_on((1, 1), at(0))).unwrap();
    assert_eq!(pool.move_cidr(&used, &to, &"eni-2".into()), Err(Refused::InUse));
}

#[test]
fn a_prefix_takes_in_the_single_addresses_that_became_part_of_it() {
    let mut pool = pool_of(&[(1, 2), (0, 1)], 30);
    let (id, other, prefix): (EniId, EniId, IpNet) = ("eni-0".into(), "eni-1".into(), "10.0.0.0/28".parse().unwrap());
    pool.release(at(1), &owner("pod-0-0").key, 0).unwrap();
    let stays = pool.assign(at(1), 0, owner("stays")).unwrap().0;
    // What is held around it stays, and so does what is held on another card.
    assert_eq!(pool.absorb(&id, "10.0.0.10/32".parse().unwrap()), Err(Refused::Duplicate(id.clone())));
    let mut cards = pool.clone();
    cards.add_eni("eni-2".into(), eni_on((1, 1), at(0))).unwrap();
    let before = cards.clone();
    assert_eq!(cards.absorb(&"eni-2".into(), prefix), Err(Refused::Duplicate(id.clone())));
    assert_eq!(cards, before);
    for holder in [&other, &id] {
        let mut pool = pool.clone();
        pool.absorb(holder, prefix).unwrap();
        pool.check();
        let place = pool.find(&owner("stays").key, 0).unwrap();
        assert_eq!((&place.eni, place.cidr, place.address), (holder, prefix, stays.address));
        let rests = pool.cooling(at(2).mono).map(|(address, _)| address).collect::<Vec<_>>();
        assert_eq!(rests, [ip("10.0.0.10")], "the cooldown goes on");
        assert!(pool.enis().flat_map(|(_, eni)| eni.cidrs()).all(|(net, _)| *net == prefix || !prefix.contains(net)));
    }
}

#[test]
fn undo_leaves_no_trace() {
    let mut pool = pool_of(&[(0, 2)], 30);
    let before = pool.clone();
    pool.assign(at(1), 0, owner("a")).unwrap();
    pool.undo_assign(&owner("a").key, 0);
    pool.check();
    assert_eq!(pool, before);
    pool.assign(at(1), 0, owner("a")).unwrap();
    pool.check();
    let assigned = pool.clone();
    let released = pool.release(at(2), &owner("a").key, 0).unwrap();
    pool.undo_release(released);
    pool.check();
    assert_eq!(pool, assigned);
}

#[derive(Clone, Debug)]
enum Act {
    Assign(u8),
    Release(u8),
    UndoAssign(u8),
    AddCidr(u8, u8),
    RemoveCidr(u8, u8),
    RemoveEni(u8),
    AddEni(u8),
    Pass(u8),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        5 => any::<u8>().prop_map(|n| Act::Assign(n % 24)),
        4 => any::<u8>().prop_map(|n| Act::Release(n % 24)),
        1 => any::<u8>().prop_map(|n| Act::UndoAssign(n % 24)),
        3 => any::<(u8, u8)>().prop_map(|(e, n)| Act::AddCidr(e % 4, n % 8)),
        2 => any::<(u8, u8)>().prop_map(|(e, n)| Act::RemoveCidr(e % 4, n % 8)),
        1 => any::<u8>().prop_map(|n| Act::RemoveEni(n % 4)),
        2 => any::<u8>().prop_map(|n| Act::AddEni(n % 4)),
        2 => any::<u8>().prop_map(Act::Pass),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_owners_are_unique_and_rested(acts in prop::collection::vec(act(), 1..200), prefixes: bool) {
        let cooldown_s = 30;
        let mut pool = Pool::new(prefixes, Duration::from_secs(cooldown_s));
        let mut now_s = 0;
        let mut freed: Map<IpAddr, u64> = Map::new();
        let cidr = |e: u8, n: u8| -> IpNet {
            if prefixes { format!("10.{e}.0.{}/28", u32::from(n) * 16).parse().unwrap() }
            else { format!("10.{e}.0.{n}/32").parse().unwrap() }
        };
        for act in acts {
            match act {
                Act::Assign(n) => {
                    if let Ok((place, true)) = pool.assign(at(now_s), 0, owner(&n.to_string())) {
                        if let Some(at_s) = freed.get(&place.address) {
                            prop_assert!(now_s - at_s >= cooldown_s, "{} handed out in its cooldown", place.address);
                        }
                        prop_assert!(place.cidr.contains(&place.address));
                    }
                }
                Act::Release(n) => {
                    if let Some(released) = pool.release(at(now_s), &owner(&n.to_string()).key, 0) {
                        freed.insert(released.address, now_s);
                    }
                }
                Act::UndoAssign(n) => {
                    if let Some(place) = pool.find(&owner(&n.to_string()).key, 0) {
                        pool.undo_assign(&owner(&n.to_string()).key, 0);
                        freed.remove(&place.address);
                    }
                }
                Act::AddCidr(e, n) => { let _ = pool.add_cidr(&EniId(format!("eni-{e}")), cidr(e, n)); }
                Act::RemoveCidr(e, n) => {
                    let net = cidr(e, n);
                    if pool.remove_cidr(&EniId(format!("eni-{e}")), &net).is_ok() {
                        freed.retain(|ip, _| !net.contains(ip));
                    }
                }
                Act::RemoveEni(e) => {
                    if let Ok(eni) = pool.remove_eni(&EniId(format!("eni-{e}"))) {
                        prop_assert_eq!(eni.assigned(), 0);
                        freed.retain(|ip, _| !eni.cidrs().any(|(net, _)| net.contains(ip)));
                    }
                }
                Act::AddEni(e) => { let _ = pool.add_eni(EniId(format!("eni-{e}")), eni(u32::from(e), at(now_s))); }
                Act::Pass(seconds) => now_s += u64::from(seconds % 20),
            }
            pool.check();
        }
    }
}
