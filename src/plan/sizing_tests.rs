//! The worked decisions of `spec/ipamd.md` 6.10 and the steady states of 6.11, for secondary addresses and, as far as
//! they are about arithmetic alone, for prefixes.

use super::super::pool::tests::{at, eni, eni_on, owner, pool_of};
use super::*;
use crate::model::map::Set;

const OLD: u64 = 3600; // seconds after which every ENI of a test is old enough

fn sizing(enis: usize, slots: usize, warm_eni: usize, warm_ip: usize, minimum_ip: usize) -> Sizing {
    Sizing {
        card: 0,
        targets: Targets { warm_eni, warm_ip, minimum_ip, warm_prefix: 0 },
        slots,
        eni_limit: enis,
        reserved: 0,
        max_pods: 110,
        demand: 0,
    }
}

#[expect(clippy::unnecessary_wraps, reason = "compared with an Option")]
fn assign(eni: usize, count: usize) -> Option<Growth> {
    Some(Growth::Assign { eni: EniId(format!("eni-{eni}")), count })
}

#[expect(clippy::unnecessary_wraps, reason = "compared with an Option")]
fn new_eni(count: usize) -> Option<Growth> {
    Some(Growth::NewEni { count })
}

#[test]
fn worked_decisions_of_secondary_address_mode() {
    let nothing: Option<Growth> = None;
    let trunk_to_come = Sizing { reserved: 1, ..sizing(3, 3, 1, 0, 0) };
    // (row, sizing, state as assigned/total per ENI, growth, CIDRs given back, ENI freed)
    #[expect(clippy::type_complexity, reason = "a table row")]
    let rows: &[(u32, Sizing, &[(usize, usize)], &Option<Growth>, usize, Option<usize>)] = &[
        (1, sizing(3, 3, 1, 0, 0), &[(0, 0)], &assign(0, 3), 0, None),
        (2, sizing(3, 3, 1, 0, 0), &[(0, 3)], &nothing, 0, None),
        (3, sizing(3, 3, 1, 0, 0), &[(1, 3)], &new_eni(3), 0, None),
        (4, sizing(3, 3, 1, 0, 0), &[(3, 3), (2, 3), (0, 3)], &nothing, 0, None),
        (5, sizing(3, 3, 1, 0, 0), &[(3, 3), (0, 3), (0, 3)], &nothing, 0, Some(2)),
        (6, sizing(3, 3, 1, 0, 0), &[(3, 3), (3, 3), (3, 3)], &nothing, 0, None),
        (7, sizing(4, 3, 0, 0, 0), &[(1, 3)], &nothing, 0, None),
        (8, sizing(4, 3, 0, 0, 0), &[(3, 3)], &new_eni(3), 0, None),
        (8, sizing(4, 3, 0, 0, 0), &[(3, 3), (0, 3)], &nothing, 0, None), // B27: it stays
        (12, sizing(4, 14, 1, 1, 0), &[(1, 2), (1, 2)], &nothing, 1, None),
        (13, sizing(3, 3, 1, 2, 5), &[(0, 3)], &new_eni(2), 0, None),
        (14, sizing(4, 20, 1, 5, 10), &[(7, 20)], &nothing, 8, None),
        (15, sizing(4, 14, 1, 0, 3), &[(1, 4)], &nothing, 1, None),
        (16, sizing(4, 20, 1, 2, 16), &[(15, 16)], &assign(0, 1), 0, None),
        (17, Sizing { max_pods: 3, ..sizing(4, 3, 1, 5, 0) }, &[(3, 3)], &nothing, 0, None),
        (34, trunk_to_come, &[(3, 3), (3, 3)], &nothing, 0, None),
        (35, sizing(4 - 1, 3, 1, 0, 0), &[(3, 3), (3, 3)], &new_eni(3), 0, None),
    ];
    for (row, sizing, state, growth, surplus, freed) in rows {
        let pool = pool_of(state, 30);
        let now = at(OLD).mono;
        assert_eq!(&sizing.growth(&pool, now, &Outlook::default(), |_| false), *growth, "growth of row {row}");
        let given: usize = sizing.surplus(&pool, now).iter().map(|(_, nets)| nets.len()).sum();
        assert_eq!(given, *surplus, "surplus of row {row}");
        let spare = sizing.spare_eni(&pool, now).map(|id| id.0);
        assert_eq!(spare, freed.map(|device| format!("eni-{device}")), "spare ENI of row {row}");
    }
}

#[test]
fn a_target_without_an_eni_to_grow_on() {
    let pool = pool_of(&[], 30);
    assert_eq!(
        sizing(4, 14, 1, 3, 0).growth(&pool, at(OLD).mono, &Outlook::default(), |_| false),
        new_eni(3),
        "row 10"
    );
    let card_one = Sizing { card: 1, ..sizing(4, 14, 9, 9, 9) };
    assert_eq!(card_one.growth(&pool, at(OLD).mono, &Outlook::default(), |_| false), new_eni(1), "row 31");
    let mut three = Pool::new(false, Duration::from_secs(30));
    let on_card_one = eni_on((1, 0), at(0));
    three.add_eni("eni-0".into(), on_card_one).unwrap();
    for n in 0..3 {
        three.add_cidr(&"eni-0".into(), format!("10.0.0.{n}/32").parse().unwrap()).unwrap();
    }
    let given: usize = card_one.surplus(&three, at(OLD).mono).iter().map(|(_, nets)| nets.len()).sum();
    assert_eq!(given, 2, "row 32");
}

#[test]
fn warm_ip_deviation() {
    for (free, want) in [(0, (5, 0)), (2, (3, 0)), (5, (0, 0))] {
        let pool = pool_of(&[(0, free)], 30);
        let stats = pool.stats(at(OLD).mono, 0);
        assert_eq!(sizing(4, 14, 1, 5, 0).deviation(&stats, false), Some(want), "row 11 with {free} free");
    }
}

#[test]
fn an_excluded_primary_does_not_count() {
    let mut pool = pool_of(&[(0, 10), (0, 10)], 30);
    pool.set_excluded(&"eni-0".into(), true);
    let sizing = sizing(4, 10, 2, 0, 0);
    assert_eq!(sizing.growth(&pool, at(OLD).mono, &Outlook::default(), |_| false), new_eni(10), "row 18, V 10 of 20");
    let mut more = pool_of(&[(0, 10), (0, 10), (0, 10)], 30);
    more.set_excluded(&"eni-0".into(), true);
    assert_eq!(sizing.growth(&more, at(OLD).mono, &Outlook::default(), |_| false), None, "row 18, V 20");
}

#[test]
fn which_enis_may_go() {
    #[expect(clippy::type_complexity, reason = "a table row")]
    let cases: &[(u32, &[(usize, usize)], (usize, usize), &[usize])] = &[
        (37, &[(2, 2), (0, 2), (0, 1)], (3, 1), &[]),
        (37, &[(2, 2), (0, 2), (0, 1)], (1, 5), &[]),
        (38, &[(2, 2), (0, 2), (0, 1)], (2, 4), &[2]),
        (39, &[(2, 2), (0, 2)], (0, 3), &[]),
        (39, &[(2, 2), (0, 2)], (0, 2), &[1]),
    ];
    for (row, state, (warm, minimum), may_go) in cases {
        let pool = pool_of(state, 30);
        let sizing = sizing(8, 14, 1, *warm, *minimum);
        let going: Set<String> = pool
            .enis()
            .filter(|(id, _)| sizing.dispensable(&pool, id, at(OLD).mono))
            .map(|(id, _)| id.0.clone())
            .collect();
        let want: Set<String> = may_go.iter().map(|device| format!("eni-{device}")).collect();
        assert_eq!(going, want, "row {row} with W {warm} M {minimum}");
    }
}

#[test]
fn trunk_and_efa_stay() {
    let mut pool = pool_of(&[(2, 2), (0, 1), (0, 1), (0, 0)], 30);
    pool.set_kind(&"eni-1".into(), Kind::Trunk);
    pool.set_kind(&"eni-2".into(), Kind::Efa);
    let sizing = sizing(8, 14, 1, 0, 2);
    let going: Vec<_> =
        pool.enis().filter(|(id, _)| sizing.dispensable(&pool, id, at(OLD).mono)).map(|(id, _)| id.as_str()).collect();
    assert_eq!(going, ["eni-3"], "row 40");
}

#[test]
fn young_or_cooling_enis_stay() {
    let sizing = sizing(3, 3, 1, 0, 0);
    let mut pool = pool_of(&[(3, 3), (0, 3), (0, 3)], 30);
    assert_eq!(sizing.spare_eni(&pool, at(59).mono), None);
    pool.assign(at(OLD), 0, owner("a")).unwrap(); // lands on eni-1, the first with room
    pool.release(at(OLD), &owner("a").key, 0).unwrap();
    assert_eq!(sizing.spare_eni(&pool, at(OLD + 1).mono), Some("eni-2".into()));
    pool.remove_eni(&"eni-2".into()).unwrap();
    assert!(!sizing.dispensable(&pool, &"eni-1".into(), at(OLD + 1).mono));
}

#[test]
fn exhausted_enis_are_skipped() {
    let pool = pool_of(&[(0, 0), (0, 0)], 30);
    let sizing = sizing(3, 14, 1, 0, 0);
    assert_eq!(sizing.growth(&pool, at(OLD).mono, &Outlook::default(), |id| id.as_str() == "eni-0"), assign(1, 14));
    assert_eq!(sizing.growth(&pool, at(OLD).mono, &Outlook::default(), |_| true), new_eni(14), "row 42");
}

#[test]
fn a_waiting_pod_does_not_wait_for_cooldowns() {
    let mut pool = pool_of(&[(0, 2)], 30);
    for id in ["a", "b"] {
        pool.assign(at(OLD), 0, owner(id)).unwrap();
        pool.release(at(OLD), &owner(id).key, 0).unwrap();
    }
    let sizing = sizing(3, 14, 0, 0, 0);
    let starved = Outlook { starved: true, ..Outlook::default() };
    assert_eq!(
        sizing.growth(&pool, at(OLD + 1).mono, &Outlook::default(), |_| false),
        None,
        "V counts cooling addresses"
    );
    assert_eq!(sizing.growth(&pool, at(OLD + 1).mono, &starved, |_| false), assign(0, 12), "B59");
}

// Prefix arithmetic: (row, W, M, WP, T, A, P, F) -> (too low, prefixes wanted, prefixes to free).
#[test]
fn worked_decisions_of_prefix_mode() {
    #[expect(clippy::type_complexity, reason = "a table row")]
    let rows: &[(u32, (usize, usize, usize), (usize, usize, usize, usize), bool, usize)] = &[
        (19, (0, 0, 1), (16, 1, 1, 0), true, 0),
        (20, (0, 0, 1), (16, 0, 1, 1), false, 0),
        (21, (0, 0, 1), (64, 10, 4, 3), false, 2),
        (22, (0, 0, 0), (16, 1, 1, 0), false, 0),
        (24, (5, 0, 1), (0, 0, 0, 0), true, 0),
        (25, (5, 0, 1), (32, 0, 2, 2), false, 1),
        (26, (7, 20, 1), (0, 0, 0, 0), true, 0),
        (27, (16, 0, 1), (32, 1, 2, 1), false, 0),
        (28, (15, 0, 1), (48, 3, 3, 0), false, 0),
        (29, (1, 0, 1), (16, 16, 1, 0), true, 0),
        (30, (0, 20, 1), (16, 0, 1, 1), true, 0),
        (30, (0, 20, 1), (32, 0, 2, 2), false, 0),
        (30, (0, 20, 1), (48, 0, 3, 3), false, 1),
    ];
    for (row, (warm_ip, minimum_ip, warm_prefix), (total, assigned, prefixes, free), low, over) in rows {
        let targets = Targets { warm_eni: 1, warm_ip: *warm_ip, minimum_ip: *minimum_ip, warm_prefix: *warm_prefix };
        let sizing = Sizing { targets, ..sizing(3, 3, 1, 0, 0) };
        let stats = Stats { total: *total, assigned: *assigned, cooling: 0, prefixes: *prefixes, free_prefixes: *free };
        assert_eq!(sizing.too_low(&stats, true), *low, "row {row}");
        let surplus = sizing.deviation(&stats, true).map_or(free.saturating_sub(*warm_prefix), |(_, over)| over);
        assert_eq!(surplus, *over, "row {row}");
    }
    let four_pods = Sizing { max_pods: 4, ..sizing(3, 3, 1, 0, 0) };
    let stats = Stats { total: 16, assigned: 3, cooling: 0, prefixes: 1, free_prefixes: 0 };
    assert!(!four_pods.too_low(&stats, true), "row 23");
}

/// Runs the decisions to the end, with an EC2 that gives everything at once; returns the CIDRs per ENI.
fn settle(sizing: &Sizing, prefix_mode: bool, pods: usize) -> Vec<usize> {
    let mut pool = Pool::new(prefix_mode, Duration::ZERO);
    pool.add_eni("eni-00".into(), eni(0, at(0))).unwrap();
    let mut next = 0u32;
    let mut waiting: Vec<String> = (0..pods).map(|n| format!("pod-{n}")).collect();
    let mut grow = |pool: &mut Pool, id: &EniId, count: usize| {
        for _ in 0..count {
            let base = u32::from_be_bytes([10, 1, 0, 0]) + next * 16;
            next += 1;
            let length = if prefix_mode { 28 } else { 32 };
            let net = ipnet::Ipv4Net::new(base.into(), length).unwrap();
            pool.add_cidr(id, net.into()).unwrap();
        }
    };
    for step in 0..500u64 {
        let now = at(OLD + step * 100);
        waiting.retain(|id| pool.assign(now, 0, owner(id)).is_err());
        if let Some(growth) = sizing.growth(&pool, now.mono, &Outlook::default(), |_| false) {
            match growth {
                Growth::Assign { eni, count } => grow(&mut pool, &eni, count),
                Growth::NewEni { count } => {
                    let device = u32::try_from(pool.enis().count()).unwrap();
                    let id = EniId(format!("eni-{device:02}"));
                    pool.add_eni(id.clone(), eni(device, now)).unwrap();
                    grow(&mut pool, &id, count);
                }
            }
            continue;
        }
        let surplus = sizing.surplus(&pool, now.mono);
        let spare = sizing.spare_eni(&pool, now.mono);
        if surplus.is_empty() && spare.is_none() && waiting.is_empty() {
            break;
        }
        for (id, nets) in surplus {
            for net in nets {
                pool.remove_cidr(&id, &net).unwrap();
            }
        }
        if let Some(id) = sizing.spare_eni(&pool, now.mono) {
            pool.remove_eni(&id).unwrap();
        }
        pool.check();
    }
    assert!(waiting.is_empty(), "{} pods wait for ever", waiting.len());
    pool.enis().map(|(_, eni)| eni.cidr_count()).filter(|count| *count > 0).collect()
}

#[test]
fn steady_states() {
    let small = |warm_eni, warm_ip, minimum_ip| sizing(3, 3, warm_eni, warm_ip, minimum_ip);
    let large =
        |warm_eni, warm_ip, minimum_ip| Sizing { max_pods: 737, ..sizing(15, 49, warm_eni, warm_ip, minimum_ip) };
    let prefix = |sizing: Sizing| Sizing { targets: Targets { warm_prefix: 1, ..sizing.targets }, ..sizing };
    #[expect(clippy::type_complexity, reason = "a table row")]
    let rows: &[(&str, Sizing, bool, &[(usize, &[usize])])] = &[
        ("t3.small WE1", small(1, 0, 0), false, &[(0, &[3]), (5, &[3, 3, 3]), (9, &[3, 3, 3])]),
        ("t3.small W1 M1", small(1, 1, 1), false, &[(0, &[1]), (5, &[3, 3]), (9, &[3, 3, 3])]),
        ("t3.small W2 M5", small(1, 2, 5), false, &[(0, &[3, 2]), (5, &[3, 3, 1]), (9, &[3, 3, 3])]),
        ("p3dn WE1", large(1, 0, 0), false, &[(0, &[49]), (3, &[49, 49]), (95, &[49, 49, 49])]),
        ("p3dn W5 M10", large(1, 5, 10), false, &[(0, &[10]), (7, &[12]), (15, &[20]), (45, &[49, 1])]),
        (
            "t3.small PD WP1",
            prefix(small(1, 0, 0)),
            true,
            &[(0, &[1]), (5, &[2]), (16, &[2]), (17, &[3]), (58, &[3, 2])],
        ),
        ("t3.small PD W1 M1", prefix(small(1, 1, 1)), true, &[(0, &[1]), (5, &[1]), (17, &[2]), (58, &[3, 1])]),
        ("t3.small PD W7 M20", prefix(small(1, 7, 20)), true, &[(0, &[2]), (5, &[2]), (17, &[2]), (58, &[3, 2])]),
        ("p3dn PD WP1", prefix(large(1, 0, 0)), true, &[(0, &[1]), (3, &[2]), (95, &[7])]),
        ("p3dn PD W5 M10", prefix(large(1, 5, 10)), true, &[(0, &[1]), (7, &[1]), (15, &[2]), (45, &[4])]),
    ];
    for (name, sizing, prefix_mode, cases) in rows {
        for (pods, want) in *cases {
            assert_eq!(settle(sizing, *prefix_mode, *pods), *want, "{name} with {pods} pods");
        }
    }
}

#[test]
fn a_busy_eni_with_room_is_waited_for() {
    let pool = pool_of(&[(1, 2)], 30);
    let busy = |count| Outlook { assigning: [("eni-0".into(), count)].into(), ..Outlook::default() };
    let sizing = Sizing { demand: 3, ..sizing(3, 9, 1, 2, 0) };
    assert_eq!(sizing.growth(&pool, at(OLD).mono, &Outlook::default(), |_| false), assign(0, 4));
    assert_eq!(sizing.growth(&pool, at(OLD).mono, &busy(1), |_| false), None, "it has room for the other three");
    let many = Sizing { demand: 12, ..sizing };
    assert_eq!(many.growth(&pool, at(OLD).mono, &busy(1), |_| false), new_eni(6), "what it has no room for");
}
