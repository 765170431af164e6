//! Figures of the specification, and answers to questions that are asked wrongly.

use super::*;

fn asked(kind: &str, set: &[&str], pods: u32) -> Question {
    let set = set.iter().map(|word| (*word).to_owned()).collect();
    let args = Args { instance_type: kind.into(), pods: Some(pods), set, ..Args::default() };
    understand(&args).unwrap_or_else(|error| panic!("{kind} {pods}: {error}"))
}

const SMALL: &str = "t3.small";
const LARGE: &str = "p3dn.24xlarge";
const PD: &str = "ENABLE_PREFIX_DELEGATION=true";
const WP1: &str = "WARM_PREFIX_TARGET=1";

#[track_caller]
fn steady(kind: &str, set: &[&str], rows: &[(u32, u64, u64, u64)]) {
    for (pods, enis, cidrs, free) in rows {
        let question = asked(kind, set, *pods);
        let story = question.scene.run(&question.steps(), false).unwrap();
        let prefixes = question.mode == Mode::Ipv4Prefixes;
        for held in [Some(story.most().1), (*pods == 0).then_some(story.idle)].into_iter().flatten() {
            let found = (held.pods, held.enis, if prefixes { held.prefixes } else { held.addresses }, held.free);
            assert_eq!(found, (u64::from(*pods), *enis, *cidrs, *free), "{kind} {set:?} with {pods} pods");
            assert_eq!(held.addresses, held.pods + held.free);
        }
        assert!(story.stages.iter().all(|stage| stage.unserved == 0), "{kind} {set:?}: {:?}", story.stages);
    }
}

/// Pods, ENIs, addresses or prefixes, free addresses: `spec/operations.md` 9.2 and `spec/ipamd.md` 6.11.
#[test]
fn steady_states_of_single_addresses() {
    let all = [(0, 1, 3, 3), (1, 2, 6, 5), (3, 2, 6, 3), (4, 3, 9, 5), (5, 3, 9, 4), (9, 3, 9, 0)];
    steady(SMALL, &["WARM_ENI_TARGET=1"], &all);
    steady(SMALL, &["WARM_IP_TARGET=1", "MINIMUM_IP_TARGET=1"], &[(0, 1, 1, 1), (5, 2, 6, 1), (9, 3, 9, 0)]);
    steady(SMALL, &["WARM_IP_TARGET=2", "MINIMUM_IP_TARGET=5"], &[(0, 2, 5, 5), (5, 3, 7, 2), (9, 3, 9, 0)]);
    steady(LARGE, &["WARM_ENI_TARGET=1"], &[(0, 1, 49, 49), (3, 2, 98, 95), (95, 3, 147, 52)]);
    let all = [(0, 1, 10, 10), (7, 1, 12, 5), (15, 1, 20, 5), (45, 2, 50, 5)];
    steady(LARGE, &["WARM_IP_TARGET=5", "MINIMUM_IP_TARGET=10"], &all);
}

#[test]
fn steady_states_of_prefixes() {
    let all = [(0, 1, 1, 16), (5, 1, 2, 27), (16, 1, 2, 16), (17, 1, 3, 31), (58, 2, 5, 22)];
    steady(SMALL, &[PD, WP1], &all);
    let all = [(0, 1, 1, 16), (5, 1, 1, 11), (17, 1, 2, 15), (58, 2, 4, 6)];
    steady(SMALL, &[PD, "WARM_IP_TARGET=1", "MINIMUM_IP_TARGET=1"], &all);
    let all = [(0, 1, 2, 32), (5, 1, 2, 27), (17, 1, 2, 15), (58, 2, 5, 22)];
    steady(SMALL, &[PD, "WARM_IP_TARGET=7", "MINIMUM_IP_TARGET=20"], &all);
    steady(LARGE, &[PD, WP1], &[(0, 1, 1, 16), (3, 1, 2, 29), (95, 1, 7, 17)]);
    let all = [(0, 1, 1, 16), (7, 1, 1, 9), (15, 1, 2, 17), (45, 1, 4, 19)];
    steady(LARGE, &[PD, "WARM_IP_TARGET=5", "MINIMUM_IP_TARGET=10"], &all);
}
