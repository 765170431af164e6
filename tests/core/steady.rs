//! The steady states of `spec/ipamd.md` 6.11 with the real core: pods arrive at once, then everything comes to rest.

use super::world::{DEFAULT, World};

use enibox::plan::sizing::Targets;
use std::time::Duration;

/// CIDRs per ENI once all pods run and nothing moves any more.
fn steady(kind: &str, targets: Targets, prefix_mode: bool, pods: usize) -> Vec<usize> {
    let mut world = World::stopped(kind, targets, prefix_mode);
    world.start();
    world.settle();
    let names: Vec<String> = (0..pods).map(|n| format!("pod-{n}")).collect();
    for pod in &names {
        world.ask(pod);
    }
    world.pass(Duration::from_secs(10));
    for pod in &names {
        assert!(world.wired(pod), "{kind} {targets:?}: {pod} of {pods}: {:#?}", world.log);
    }
    world.pass(Duration::from_mins(15));
    world.settle();
    let calls: u64 = world.vpc.journal().counts().values().sum();
    world.pass(Duration::from_hours(1));
    assert_eq!(world.vpc.journal().counts().values().sum::<u64>(), calls, "{kind} {targets:?}, {pods} pods: at rest");
    world.check_at_rest();
    world.enis().into_iter().map(|(_, cidrs)| cidrs).filter(|cidrs| *cidrs > 0).collect()
}

#[test]
fn pools_come_to_rest_where_the_specification_says() {
    let targets = |warm_ip, minimum_ip| Targets { warm_ip, minimum_ip, ..DEFAULT };
    let prefixes = |warm_ip, minimum_ip| Targets { warm_ip, minimum_ip, warm_prefix: 1, ..DEFAULT };
    let (small, large) = ("t3.small", "p3dn.24xlarge");
    #[expect(clippy::type_complexity, reason = "a table row")]
    let rows: &[(&str, Targets, bool, &[(usize, &[usize])])] = &[
        (small, targets(0, 0), false, &[(0, &[3]), (5, &[3, 3, 3]), (9, &[3, 3, 3])]),
        (small, targets(1, 1), false, &[(0, &[1]), (5, &[3, 3]), (9, &[3, 3, 3])]),
        (small, targets(2, 5), false, &[(0, &[3, 2]), (5, &[3, 3, 1]), (9, &[3, 3, 3])]),
        (large, targets(0, 0), false, &[(0, &[49]), (3, &[49, 49]), (95, &[49, 49, 49])]),
        (large, targets(5, 10), false, &[(0, &[10]), (7, &[12]), (15, &[20]), (45, &[49, 1])]),
        (small, prefixes(0, 0), true, &[(0, &[1]), (5, &[2]), (16, &[2]), (17, &[3]), (58, &[3, 2])]),
        (small, prefixes(1, 1), true, &[(0, &[1]), (5, &[1]), (17, &[2]), (58, &[3, 1])]),
        (small, prefixes(7, 20), true, &[(0, &[2]), (5, &[2]), (17, &[2]), (58, &[3, 2])]),
        (large, prefixes(0, 0), true, &[(0, &[1]), (3, &[2]), (95, &[7])]),
        (large, prefixes(5, 10), true, &[(0, &[1]), (7, &[1]), (15, &[2]), (45, &[4])]),
    ];
    for (kind, targets, prefix_mode, cases) in rows {
        for (pods, want) in *cases {
            assert_eq!(steady(kind, *targets, *prefix_mode, *pods), *want, "{kind} {targets:?} with {pods} pods");
        }
    }
}
