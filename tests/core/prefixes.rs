//! Prefix delegation: growth and release, fragmented subnets, and a change of the mode while pods run.

use super::world::{PREFIXES, World};

use enibox::model::ids::SubnetId;
use enibox::plan::sizing::Targets;
use std::net::Ipv4Addr;
use std::time::Duration;

fn pods(from: usize, to: usize) -> Vec<String> {
    (from..to).map(|n| format!("pod-{n}")).collect()
}

fn add_all(world: &mut World, pods: &[String]) {
    for pod in pods {
        world.ask(pod);
    }
    world.pass(Duration::from_secs(10));
    for pod in pods {
        assert!(world.wired(pod), "{pod}: {:#?}", world.log);
    }
}

fn subnet(world: &World) -> SubnetId {
    world.vpc.identity(&world.instance).unwrap().subnet
}

/// Somebody takes one address out of every free block of the node's subnet; the result gives them back.
fn fragment(world: &mut World) -> Vec<Ipv4Addr> {
    let cidr = world.vpc.subnet_cidr(&subnet(world)).unwrap();
    let base = u32::from(cidr.network());
    let middle = (base..base + 1024).step_by(16).map(|block| Ipv4Addr::from(block + 7));
    middle.filter(|addr| world.vpc.reserve(*addr)).collect()
}

fn restart(world: &mut World) {
    world.crash();
    world.start();
    world.settle();
}

fn logged(world: &World, what: &str) -> bool {
    world.log.iter().any(|line| line.contains(what))
}

#[test]
fn prefixes_come_with_the_pods_and_go_after_them() {
    let mut world = World::with_prefixes("t3.small", PREFIXES);
    world.settle();
    assert_eq!(world.kinds(), [(0, 0, 1)]);
    add_all(&mut world, &pods(0, 60));
    world.settle();
    assert_eq!(world.kinds(), [(0, 0, 3), (1, 0, 2)]);
    for pod in pods(0, 60) {
        world.del(&pod);
    }
    world.pass(Duration::from_mins(10));
    world.settle();
    assert_eq!(world.kinds(), [(0, 0, 1)], "one to spare, and no second ENI");
    world.check_at_rest();
}

#[test]
fn a_burst_of_pods_is_one_call_for_all_the_prefixes_that_it_needs() {
    let mut world = World::with_prefixes("m5.large", Targets { warm_ip: 1, minimum_ip: 0, ..PREFIXES });
    world.settle();
    add_all(&mut world, &pods(0, 90));
    assert_eq!(world.calls("AssignPrivateIpAddresses"), 3, "the first one, what was short at the first pod, the rest");
    world.settle();
    world.check_at_rest();
}

#[test]
fn single_addresses_stand_in_while_the_subnet_is_fragmented() {
    let mut world = World::stopped("m5.large", PREFIXES, true);
    let taken = fragment(&mut world);
    world.start();
    world.settle();
    assert!(world.ready, "with single addresses");
    assert_eq!(world.kinds(), [(0, 4, 0)], "a few to spare");
    assert!(logged(&world, "has no free block for a prefix"));
    add_all(&mut world, &pods(0, 12));
    world.settle();
    assert_eq!(world.kinds().iter().map(|(_, singles, _)| singles).sum::<usize>(), 16, "{:?}", world.kinds());
    let before = (world.pods.clone(), world.calls("AssignPrivateIpAddresses"));
    restart(&mut world);
    assert_eq!((world.pods.clone(), world.calls("AssignPrivateIpAddresses")), before, "known after a restart as well");
    world.check_at_rest();
    // The back-off: a node that needs a prefix asks a handful of times in three hours.
    world.pass(Duration::from_hours(3));
    let asked = world.calls("AssignPrivateIpAddresses") + world.calls("CreateNetworkInterface") - before.1;
    assert!((4..16).contains(&asked), "{asked}");

    for addr in taken {
        world.vpc.unreserve(addr);
    }
    world.pass(Duration::from_mins(45));
    world.settle();
    assert!(logged(&world, "has room for prefixes again"));
    assert_eq!(singles(&world), 12, "those in use stay, the others are given back");
    for pod in pods(0, 12) {
        world.del(&pod);
        add_all(&mut world, &[format!("new-{pod}")]);
    }
    world.pass(Duration::from_mins(10));
    world.settle();
    assert_eq!(singles(&world), 0, "back in prefixes: {:?}", world.kinds());
    world.check_at_rest();
}

fn singles(world: &World) -> usize {
    world.kinds().iter().map(|(_, singles, _)| singles).sum()
}

#[test]
fn a_full_node_in_a_fragmented_subnet_says_so_and_still_has_a_slot_for_a_prefix() {
    let mut world = World::stopped("t3.small", PREFIXES, true);
    let taken = fragment(&mut world);
    world.start();
    world.settle();
    let all = pods(0, 9);
    for pod in &all {
        assert!(world.add(pod), "{pod}: pods take the last slot: {:#?}", world.log);
    }
    assert!(!world.add("one-too-many"));
    assert!(logged(&world, "has no free block for a prefix: next try"));
    world.del("pod-3");
    world.del("pod-5");
    world.pass(Duration::from_mins(5));
    world.settle();
    assert_eq!(singles(&world), 8, "one of two free slots is kept for a prefix");
    for addr in taken {
        world.vpc.unreserve(addr);
    }
    world.pass(Duration::from_mins(45));
    world.settle();
    assert_eq!(world.kinds().iter().map(|(_, _, prefixes)| prefixes).sum::<usize>(), 1, "{:?}", world.kinds());
    add_all(&mut world, &pods(20, 36));
    world.settle();
    world.check_at_rest();
}

#[test]
fn what_is_left_of_several_prefixes_is_taken_one_by_one() {
    let mut world = World::stopped("m5.large", Targets { warm_ip: 1, minimum_ip: 60, ..PREFIXES }, true);
    let taken = fragment(&mut world);
    for addr in &taken[5..7] {
        world.vpc.unreserve(*addr);
    }
    world.start();
    world.settle();
    let kinds = world.kinds();
    assert_eq!(kinds.iter().map(|(_, _, prefixes)| prefixes).sum::<usize>(), 2, "{kinds:?}");
    assert!(singles(&world) > 0, "the rest of the minimum as single addresses: {kinds:?}");
    world.check_at_rest();
}

#[test]
fn a_change_of_the_mode_frees_what_nobody_uses_and_the_rest_with_its_pod() {
    let mut world = World::new("m5.large", super::world::DEFAULT);
    world.settle();
    add_all(&mut world, &pods(0, 3));
    world.settle();
    world.targets = PREFIXES;
    world.prefix_mode = true;
    restart(&mut world);
    world.pass(Duration::from_mins(3));
    world.settle();
    assert_eq!(world.kinds(), [(0, 3, 1)], "three pods keep their addresses; the spare ENI is gone");
    add_all(&mut world, &["new".to_owned()]);
    world.del("pod-1");
    world.pass(Duration::from_mins(3));
    world.settle();
    assert_eq!(singles(&world), 2, "it goes with its pod");
    world.check_at_rest();

    world.prefix_mode = false;
    world.targets = super::world::DEFAULT;
    restart(&mut world);
    world.pass(Duration::from_mins(3));
    world.settle();
    assert_eq!(world.kinds().iter().map(|(_, _, prefixes)| prefixes).sum::<usize>(), 1, "the prefix of \"new\"");
    world.del("new");
    world.pass(Duration::from_mins(3));
    world.settle();
    assert_eq!(world.kinds().iter().map(|(_, _, prefixes)| prefixes).sum::<usize>(), 0);
    world.check_at_rest();
}

#[test]
fn provisioning_disabled_frees_nothing_at_a_change_of_the_mode() {
    let mut world = World::new("m5.large", super::world::DEFAULT);
    world.settle();
    (world.prefix_mode, world.provisioning, world.targets) = (true, false, PREFIXES);
    restart(&mut world);
    world.pass(Duration::from_mins(10));
    assert_eq!(world.kinds(), [(0, 9, 0)]);
    assert_eq!(world.calls("UnassignPrivateIpAddresses"), 0);
    assert!(!world.add("a"), "no prefix, and nobody may ask for one");
}
