//! Subnets that their tags keep pods out of (`spec/ipamd.md` 7.6).

use super::world::{DEFAULT, World};

use enibox::model::ids::SubnetId;
use std::time::Duration;

const ROLE: &str = "kubernetes.io/role/cni";

/// A node whose own subnet has a neighbour that is tagged for pods.
fn node() -> (World, SubnetId, SubnetId) {
    let mut world = World::stopped("m5.large", DEFAULT, false);
    let primary = world.vpc.identity(&world.instance).unwrap().subnet;
    let other = world.vpc.add_subnet("eu-west-1a", "10.20.8.0/22".parse().unwrap(), None, &[(ROLE, "1")]);
    (world, primary, other)
}

fn excluded(world: &World) -> usize {
    world.core.as_ref().unwrap().pool().enis().filter(|(_, eni)| eni.excluded).count()
}

#[test]
fn an_excluded_primary_eni_serves_no_pod_from_the_start() {
    let (mut world, primary, other) = node();
    world.vpc.tag_subnet(&primary, ROLE, Some("0"));
    world.start();
    world.settle();
    for n in 0..4 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    assert_eq!(world.enis(), [(0, 0), (1, 9), (2, 9)]);
    let pods = world.vpc.interfaces().filter(|interface| !interface.secondary_ipv4s.is_empty());
    assert!(pods.into_iter().all(|interface| interface.subnet == other));
    world.crash();
    let asked = world.calls("DescribeSubnets");
    world.start();
    world.settle();
    assert_eq!((excluded(&world), world.calls("DescribeSubnets")), (1, asked), "remembered");
    world.check_at_rest();
}

#[test]
fn tags_take_effect_in_both_directions_while_the_node_runs() {
    let (mut world, primary, other) = node();
    world.start();
    world.settle();
    for n in 0..12 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    world.vpc.tag_subnet(&other, ROLE, Some("0"));
    world.vpc.tag_subnet(&primary, ROLE, Some("1"));
    world.pass(Duration::from_mins(20));
    assert_eq!(excluded(&world), 0, "a node on which nothing happens asks nobody");
    world.del("pod-11");
    world.settle();
    let elsewhere = world.vpc.interfaces().filter(|interface| interface.subnet == other).count();
    assert_eq!(excluded(&world), elsewhere);
    assert!(elsewhere > 0, "the neighbour has more free addresses, so that is where new ENIs went");
    let pods = world.pods.clone();
    for n in 0..12 {
        world.del(&format!("pod-{n}"));
    }
    world.pass(Duration::from_mins(10));
    world.settle();
    assert_eq!(world.vpc.interfaces().filter(|interface| interface.subnet == other).count(), 0, "empty ones go");
    assert_eq!(pods.len(), 11, "pods kept their addresses until then");

    world.vpc.tag_subnet(&primary, ROLE, Some("0"));
    world.vpc.tag_subnet(&other, ROLE, Some("1"));
    assert!(world.add("a"));
    world.pass(Duration::from_mins(20));
    assert_eq!(excluded(&world), 1);
    world.vpc.tag_subnet(&primary, ROLE, None);
    world.del("a");
    world.pass(Duration::from_mins(20));
    assert_eq!(excluded(&world), 0);
    world.settle();
    world.check_at_rest();
}

#[test]
fn refused_subnets_are_told_once_and_exclude_nothing() {
    let (mut world, primary, _) = node();
    world.vpc.tag_subnet(&primary, ROLE, Some("0"));
    for _ in 0..50 {
        world.vpc.knobs.refuse_next("DescribeSubnets", "UnauthorizedOperation", 403);
    }
    world.start();
    world.settle();
    for n in 0..20 {
        assert!(world.add(&format!("pod-{n}")), "new ENIs come from the primary ENI's subnet");
        world.pass(Duration::from_mins(2));
    }
    let told = world.log.iter().filter(|line| line.contains("Warn look for subnets")).count();
    assert_eq!((told, excluded(&world)), (1, 0));
    world.settle();
    world.check_at_rest();
}

#[test]
fn without_discovery_an_excluded_primary_subnet_takes_no_new_eni() {
    let (mut world, primary, _) = node();
    world.vpc.tag_subnet(&primary, ROLE, Some("0"));
    world.discovery = false;
    world.start();
    world.pass(Duration::from_mins(1));
    for n in 0..9 {
        assert!(world.add(&format!("pod-{n}")), "an ENI that is there serves pods");
    }
    assert!(!world.add("one-more"));
    assert_eq!((world.enis(), world.calls("CreateNetworkInterface")), (vec![(0, 9)], 0));
    world.vpc.tag_subnet(&primary, ROLE, None);
    world.pass(Duration::from_mins(10));
    assert!(world.add("one-more"));
}
