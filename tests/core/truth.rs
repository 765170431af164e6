//! What is believed and what is: IMDS that lags, omits or invents, EC2 that is not there, ENIs of the dead.

use super::world::{DEFAULT, World};
use enibox::model::ec2::{Call, Reply};
use enibox::model::map::Map;
use std::net::IpAddr;
use std::time::Duration;

const MINUTE: Duration = Duration::from_mins(1);

fn second(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn with_imds_alone_no_call_to_ec2_is_made() {
    let mut world = World::new("t3.small", DEFAULT);
    world.pass(MINUTE);
    for n in 0..4 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    // The node restarts in the mode; the same ENIs and addresses serve on.
    world.crash();
    world.configure = |config| {
        config.imds_only = true;
        config.provisioning = false;
        config.clean_leaked = false;
    };
    let before = world.vpc.journal().counts().clone();
    world.start();
    world.pass(second(2));
    assert!(world.ready);
    world.del("pod-0");
    assert!(world.add("pod-4"));
    // Somebody assigns an address: it is taken in. Somebody takes one away: nobody gets it, and its pod keeps it.
    let eni = world.vpc.interfaces().next().unwrap().id.clone();
    let (taken, now) = (world.vpc.interface(&eni).unwrap().secondary_ipv4s[0], world.now());
    world.vpc.execute(now, &Call::UnassignAddresses { eni, addresses: vec![taken] }).result.unwrap();
    let mut expected = before.clone();
    *expected.entry("UnassignPrivateIpAddresses").or_default() += 1;
    world.pass(MINUTE * 10);
    let pool = world.core.as_ref().unwrap().pool();
    let held = pool.allocations().any(|held| held.address == std::net::IpAddr::V4(taken));
    assert_eq!(pool.enis().any(|(_, eni)| eni.cidr_of(taken.into()).is_some()), held, "{taken}: {:#?}", world.log);
    assert_eq!(*world.vpc.journal().counts(), expected, "EC2 was called: {:#?}", world.log);
}

#[test]
fn a_fresh_node_with_imds_alone_serves_what_is_attached() {
    let mut world = World::asleep("t3.small", DEFAULT);
    world.configure = |config| {
        config.imds_only = true;
        config.provisioning = false;
    };
    let (primary, now) = (world.vpc.identity(&world.instance).unwrap().primary_eni, world.now());
    let count = enibox::model::ec2::Count::Addresses(2);
    world.vpc.execute(now, &Call::Assign { eni: primary, count }).result.unwrap();
    world.start();
    world.pass(second(2));
    assert!(world.add("pod-0") && world.add("pod-1"));
    world.ask("pod-2");
    world.pass(second(5));
    assert!(!world.wired("pod-2"));
    assert_eq!(world.vpc.journal().counts().len(), 1, "{:?}", world.vpc.journal().counts());
}

#[test]
fn enis_of_dead_nodes_are_deleted_and_young_ones_kept() {
    let mut world = World::asleep("t3.small", DEFAULT);
    world.configure = |config| config.clean_leaked = true;
    world.start();
    world.pass(MINUTE);
    let subnet = world.vpc.identity(&world.instance).unwrap().subnet;
    let leave = |world: &mut World, description: &str, created: Option<String>| {
        let mut tags = Map::from([("node.k8s.amazonaws.com/instance_id".to_owned(), "i-dead".to_owned())]);
        tags.insert("cluster.k8s.amazonaws.com/name".into(), "test".into());
        tags.extend(created.map(|created| ("node.k8s.amazonaws.com/createdAt".to_owned(), created)));
        let now = world.now();
        world.vpc.add_interface(now, &subnet, description, &tags).unwrap()
    };
    let old = world.now().wall.to_string();
    let dead = leave(&mut world, "aws-K8S-i-dead", Some(old.clone()));
    let foreign = leave(&mut world, "somebody's", Some(old));
    let undated = leave(&mut world, "aws-K8S-i-dead", None);
    let garbled = leave(&mut world, "aws-K8S-i-dead", Some("yesterday".into()));
    let there = |world: &World, eni| world.vpc.interface(eni).is_some();
    while there(&world, &dead) {
        world.pass(MINUTE);
        assert!(world.nanos < 95 * 60 * 1_000_000_000, "{:#?}", world.log);
    }
    assert!(there(&world, &foreign) && there(&world, &undated) && there(&world, &garbled));
    let dated = |world: &World, eni| world.vpc.interface(eni).unwrap().tags["node.k8s.amazonaws.com/createdAt"].clone();
    assert!(dated(&world, &undated).starts_with("20") && dated(&world, &garbled).starts_with("20"));
    world.pass(MINUTE * 95);
    assert!(!there(&world, &undated) && !there(&world, &garbled) && there(&world, &foreign));
}

#[test]
fn groups_that_could_not_be_set_are_tried_again() {
    let mut world = World::new("t3.small", DEFAULT);
    world.pass(MINUTE);
    assert!(world.add("pod"));
    world.settle();
    let group = world.vpc.add_group();
    let (primary, now) = (world.vpc.identity(&world.instance).unwrap().primary_eni, world.now());
    let modify = Call::ModifyGroups { eni: primary, groups: vec![group.clone()] };
    world.vpc.execute(now, &modify).result.unwrap();
    world.vpc.knobs.refuse_next("ModifyNetworkInterfaceAttribute", "UnauthorizedOperation", 403);
    world.pass(MINUTE * 2);
    let others = |world: &World| world.vpc.interfaces().filter(|eni| eni.groups == [group.clone()]).count();
    assert_eq!(others(&world), 1, "refused once");
    world.pass(MINUTE * 12);
    assert_eq!(others(&world), world.vpc.interfaces().count());
    let calls = world.calls("ModifyNetworkInterfaceAttribute");
    world.pass(MINUTE * 30);
    assert_eq!(world.calls("ModifyNetworkInterfaceAttribute"), calls, "what matches is left alone");
}

#[test]
fn an_attached_eni_that_only_ec2_knows_waits_for_imds() {
    let mut world = World::new("t3.small", DEFAULT);
    world.pass(second(5));
    world.vpc.knobs.imds_lag = MINUTE * 3;
    for n in 0..3 {
        assert!(world.add(&format!("pod-{n}")), "{:#?}", world.log);
    }
    world.pass(MINUTE * 12);
    world.settle();
    world.check_at_rest();
    assert_eq!(world.enis().len(), 2, "one ENI is enough, however late IMDS shows it: {:?}", world.enis());
}

#[test]
fn an_instance_that_takes_fewer_enis_than_its_type_is_not_asked_again_and_again() {
    let mut world = World::new("t3.small", DEFAULT);
    world.pass(second(5));
    for _ in 0..100 {
        world.vpc.knobs.refuse_next("AttachNetworkInterface", "AttachmentLimitExceeded", 400);
    }
    assert!(world.add("pod-0"), "the first ENI serves");
    world.pass(MINUTE * 20);
    assert_eq!(world.calls("CreateNetworkInterface"), 1, "{:#?}", world.log);
    assert_eq!(world.calls("DeleteNetworkInterface"), 1, "what could not be attached is given back");
    world.vpc.knobs.action("AttachNetworkInterface").next.clear();
    world.pass(MINUTE * 20);
    world.settle();
    assert_eq!(world.enis().len(), 2, "the type's limit is tried again later");
    world.check_at_rest();
}

#[test]
fn a_region_without_room_for_enis_is_told_and_left_in_peace() {
    let mut world = World::asleep("t3.small", DEFAULT);
    world.api = Some(enibox::sim::api::Api::default());
    world.start();
    world.pass(second(5));
    for _ in 0..100 {
        world.vpc.knobs.refuse_next("CreateNetworkInterface", "NetworkInterfaceLimitExceeded", 400);
    }
    assert!(world.add("pod-0"));
    world.pass(MINUTE * 20);
    let calls = world.calls("CreateNetworkInterface");
    assert!((5..=11).contains(&calls), "about every two minutes, not {calls} times");
    let notices = &world.api.as_ref().unwrap().notices;
    assert!(notices.iter().any(|notice| notice.reason == "ENICreationRefused"), "{notices:?}");
}

// Found with an IMDS that was too far behind: the living pod was given a second address.
#[test]
fn a_repeated_add_gets_its_address_while_imds_is_behind_and_ec2_away() {
    let mut world = World::asleep("t3.small", DEFAULT);
    world.vpc.knobs.imds_lag = MINUTE * 10;
    world.start();
    world.pass(MINUTE);
    for n in 0..3 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    let had = world.pods.clone();
    world.crash();
    world.ec2_down = true;
    world.start();
    world.pass(second(2));
    assert!(world.ready);
    for (pod, address) in &had {
        assert!(world.add(pod), "{:#?}", world.log);
        assert_eq!(world.pods[pod], *address, "{:#?}", world.log);
    }
    // Its place is known too, so that rules can lead there.
    let pool = world.core.as_ref().unwrap().pool();
    assert!(pool.allocations().all(|held| held.table.is_some()));
}

// A second address for the same key: the DEL released one of the two, and the other stayed for ever.
#[test]
fn a_repeated_add_of_a_pod_whose_address_others_took_before_a_restart_is_refused() {
    let mut world = World::new("t3.small", DEFAULT);
    world.settle();
    assert!(world.add("pod"));
    world.settle();
    let IpAddr::V4(taken) = world.pods["pod"] else { panic!("{:?}", world.pods) };
    world.crash();
    let (now, eni) = (world.now(), world.vpc.identity(&world.instance).unwrap().primary_eni);
    let call = Call::UnassignAddresses { eni, addresses: vec![taken] };
    assert_eq!(world.vpc.execute(now, &call).result, Ok(Reply::Done));
    world.start();
    world.pass(MINUTE);
    assert!(!world.add("pod"), "{:#?}", world.log);
    let pool = world.core.as_ref().unwrap().pool();
    assert_eq!(pool.allocations().count(), 0, "the DEL took all back: {:#?}", world.log);
    assert!(world.add("pod"), "{:#?}", world.log);
}

// The veth bears the pod's name, so that the first sandbox's allocation looks alive through the second's.
#[test]
fn an_address_of_an_earlier_sandbox_of_a_pod_is_released() {
    let mut world = World::new("t3.small", DEFAULT);
    world.pass(MINUTE);
    assert!(world.add("pod"));
    let first = world.pods["pod"];
    world.pass(MINUTE * 5);
    let mut again = super::world::key("pod");
    again.container = "second".into();
    world.ask_in("pod", again, false);
    world.pass(second(5));
    assert!(world.wired("pod"));
    let now = world.pods["pod"];
    assert_ne!(now, first);
    let held = |world: &World| -> Vec<_> {
        world.core.as_ref().unwrap().pool().allocations().map(|held| held.address).collect()
    };
    assert_eq!(held(&world).len(), 2);
    world.pass(MINUTE * 10);
    assert_eq!(held(&world), [now], "{:#?}", world.log);
}

// The link of a new ENI appeared minutes after it, and EC2's list had it as detached until then: taken for a leaked one, it
// was to be detached and deleted while it served.
#[test]
fn an_eni_that_was_taken_for_leaked_and_serves_is_kept() {
    let mut world = World::new("t3.small", DEFAULT);
    world.pass(second(5));
    world.ask("pod-0");
    let made = |world: &World| world.vpc.interfaces().find(|eni| eni.attachment.is_none()).map(|eni| eni.id.clone());
    let new = (0..500).find_map(|_| {
        world.pass(Duration::from_millis(10));
        made(&world)
    });
    let new = new.expect("an ENI is made");
    world.linkless = Some(new.clone());
    world.vpc.knobs.describe_lag = MINUTE * 10;
    let logged =
        |world: &World, text: &str| world.log.iter().any(|line| line.contains(new.0.as_str()) && line.contains(text));
    while !logged(&world, "made by us and forgotten") {
        world.pass(second(5));
        assert!(world.nanos < 10 * 60 * 1_000_000_000, "{:#?}", world.log);
    }
    world.linkless = None;
    world.pass(MINUTE);
    for n in 1..6 {
        assert!(world.add(&format!("pod-{n}")), "{:#?}", world.log);
    }
    let serves = world.core.as_ref().unwrap().pool().allocations().any(|held| held.table == Some(2));
    assert!(serves, "{:#?}", world.log);
    world.pass(MINUTE * 15);
    world.vpc.knobs.describe_lag = Duration::ZERO;
    world.settle();
    assert!(logged(&world, "it is kept"), "{:#?}", world.log);
    assert_eq!(world.calls("DetachNetworkInterface"), 0, "{:#?}", world.log);
    world.check_at_rest();
}
