//! What the specification and the budgets promise, one story each.

use super::world::{DEFAULT, World, key};

use enibox::model::ec2::{Call, Reply};
use enibox::model::ids::PodName;
use enibox::model::map::Map;
use enibox::model::naming;
use enibox::model::spool::Record;
use enibox::plan::core::{Answer, Event};
use enibox::plan::sizing::Targets;
use enibox::sim::vpc::Planned;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

#[test]
fn a_fresh_node_gets_addresses_and_then_serves() {
    let mut world = World::new("t3.small", DEFAULT);
    assert!(!world.ready, "nothing to hand out yet");
    world.settle();
    assert!(world.ready);
    assert_eq!(world.enis(), [(0, 3)]);
    assert!(world.add("a"));
    world.settle();
    assert_eq!(world.enis(), [(0, 3), (1, 3)], "a whole spare ENI");
    world.check_at_rest();
}

#[test]
fn a_new_eni_is_three_calls_and_idling_is_none() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    for n in 0..27 {
        assert!(world.add(&format!("pod-{n}")), "pod {n}");
    }
    world.settle();
    assert_eq!(world.enis(), [(0, 9), (1, 9), (2, 9)]);
    let counts = [
        ("CreateNetworkInterface", 2),
        ("AttachNetworkInterface", 2),
        ("ModifyNetworkInterfaceAttribute", 2),
        ("AssignPrivateIpAddresses", 1),
        ("DescribeSubnets", 1),
        ("CreateTags", 1),
        ("DescribeNetworkInterfaces", 1),
    ];
    for (action, count) in counts {
        assert_eq!(world.calls(action), count, "{action}");
    }
    world.pass(Duration::from_mins(15)); // the tags of the subnets, once more after the last pod
    let before: u64 = world.vpc.journal().counts().values().sum();
    world.pass(Duration::from_hours(3));
    assert_eq!(world.vpc.journal().counts().values().sum::<u64>(), before, "idle");
    world.check_at_rest();
}

#[test]
fn thirty_pods_at_once_wait_for_the_addresses_that_are_on_their_way() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    let pods: Vec<String> = (0..27).map(|n| format!("pod-{n}")).collect();
    for pod in &pods {
        world.ask(pod);
    }
    world.pass(Duration::from_secs(6));
    for pod in &pods {
        assert!(world.wired(pod), "{pod}");
    }
    world.ask("one-too-many");
    world.pass(Duration::from_secs(1));
    assert!(!world.wired("one-too-many"), "refused, and at once: nothing is on its way");
    world.settle();
    world.check_at_rest();
}

#[test]
fn spare_enis_go_back_when_the_pods_are_gone() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    for n in 0..20 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    for n in 0..20 {
        world.del(&format!("pod-{n}"));
    }
    world.pass(Duration::from_mins(10));
    world.settle();
    assert_eq!(world.enis(), [(0, 9)], "WARM_ENI_TARGET=1 is met by the primary ENI's nine");
    assert_eq!((world.calls("DetachNetworkInterface"), world.calls("DeleteNetworkInterface")), (2, 2));
    world.check_at_rest();
}

#[test]
fn what_others_have_made_for_the_address_of_an_eni_is_swept_when_it_is_gone() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    let own = |world: &World| -> BTreeSet<IpAddr> {
        world.vpc.interfaces().filter_map(|interface| Some(interface.primary_ipv4?.into())).collect()
    };
    for n in 0..20 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    let before = own(&world);
    for n in 0..20 {
        world.del(&format!("pod-{n}"));
    }
    for _ in 0..6000 {
        world.pass(Duration::from_millis(100));
        let (swept, here) = (&world.swept, own(&world));
        assert!(swept.is_disjoint(&here), "the address still sits on its link: {swept:?}, {here:?}");
    }
    let after = own(&world);
    let gone: BTreeSet<_> = before.difference(&after).copied().collect();
    assert!(gone.len() == 2 && world.swept.is_superset(&gone), "{gone:?}, {:?}", world.swept);
}

#[test]
fn single_addresses_go_back_under_ip_targets() {
    let mut world = World::new("m5.large", Targets { warm_ip: 2, minimum_ip: 5, ..DEFAULT });
    world.settle();
    assert_eq!(world.enis(), [(0, 5)]);
    for n in 0..8 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    assert_eq!(world.enis().iter().map(|(_, n)| n).sum::<usize>(), 10, "eight pods and two to spare");
    for n in 0..8 {
        world.del(&format!("pod-{n}"));
    }
    world.pass(Duration::from_mins(10));
    world.settle();
    assert_eq!(world.enis(), [(0, 5)]);
    world.check_at_rest();
}

#[test]
fn a_restart_serves_living_pods_at_once_with_ec2_away() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    for n in 0..12 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    let pods = world.pods.clone();
    world.crash();
    world.ec2_down = true;
    world.start();
    world.pass(Duration::from_secs(1));
    assert!(world.ready, "ready within a second");
    assert!(world.add("pod-3"), "the same key again");
    assert_eq!(world.pods, pods, "and the same address");
    world.del("pod-4");
    assert!(world.add("new"), "addresses of known ENIs are good without EC2");
    world.ec2_down = false;
    world.pass(Duration::from_mins(2));
    world.settle();
    world.check_at_rest();
}

#[test]
fn a_restart_is_one_call() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    for n in 0..20 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    let before: u64 = world.vpc.journal().counts().values().sum();
    world.crash();
    world.start();
    world.settle();
    assert_eq!(world.vpc.journal().counts().values().sum::<u64>() - before, 1);
    world.check_at_rest();
}

#[test]
fn a_record_outlives_a_release_that_is_not_durable() {
    let mut world = World::new("t3.small", DEFAULT);
    world.pass(Duration::from_mins(1));
    assert!(world.add("a"));
    world.settle();
    world.crash();
    world.del("a");
    world.pass(Duration::from_mins(2));
    world.start(); // the pod shows no sign of life, so its address is released before the spool is read
    world.crash(); // and with it goes the write, so that the allocation is back
    assert_eq!(world.spool.len(), 1, "{:#?}", world.log);
    world.start();
    world.pass(Duration::from_mins(1));
    world.settle();
    assert!(world.spool.is_empty());
    world.check_at_rest();
}

#[test]
fn a_del_that_met_no_daemon_comes_back_through_the_spool() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a") && world.add("b"));
    world.settle();
    world.crash();
    world.del("a");
    assert_eq!(world.spool.len(), 1);
    world.start();
    world.settle();
    assert!(world.spool.is_empty());
    world.check_at_rest();
}

#[test]
fn an_address_released_before_its_cidr_is_seen_rests_all_the_same() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a") && world.add("b"));
    world.settle();
    let address = world.pods["a"];
    world.crash();
    world.del("a");
    world.start(); // the spool is drained before IMDS has answered
    world.pass(Duration::from_millis(120));
    for restart in 0..3 {
        world.settle();
        let now = world.now().mono;
        let cooling: Vec<_> = world.core.as_ref().unwrap().pool().cooling(now).map(|(ip, _)| ip).collect();
        assert_eq!(cooling, [address], "after {restart} more restarts");
        world.crash();
        world.start();
    }
    world.pass(Duration::from_secs(40));
    let now = world.now().mono;
    assert_eq!(world.core.as_ref().unwrap().pool().cooling(now).count(), 0);
}

#[test]
fn what_a_deleted_pod_left_on_the_host_is_swept() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a") && world.add("b"));
    let address = world.pods["a"];
    world.del("a");
    world.pass(Duration::from_secs(10));
    assert_eq!(world.swept, BTreeSet::from([address]));
}

#[test]
fn pods_are_watched_over_when_the_clock_was_set_back() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a") && world.add("b"));
    world.pass(Duration::from_mins(1));
    let old = BTreeSet::from(["a", "b"].map(|pod| world.pods[pod]));
    assert_eq!(world.watched, old);
    world.set_back = Duration::from_hours(2);
    let before = world.plans;
    world.pass(Duration::from_mins(10));
    assert_eq!(world.watched, old, "as long as the clock has not caught up");
    let often = world.plans - before;
    println!("{often} looks in ten minutes");
    assert!((15..=25).contains(&often), "no ADD is under way: {often} looks in ten minutes");
    assert!(world.add("c"));
    world.pass(Duration::from_mins(1));
    assert!(world.watched.contains(&world.pods["c"]) && world.watched.is_superset(&old));
    // And after a restart, which reads from the checkpoint when they came.
    world.crash();
    world.start();
    world.pass(Duration::from_mins(1));
    assert_eq!(world.watched.len(), 3);
    world.settle();
    world.check_at_rest();
}

#[test]
fn an_address_that_is_being_swept_is_nobodys() {
    let mut world = World::asleep("t3.small", DEFAULT);
    world.configure = |config| config.tunables.ip_cooldown = Duration::ZERO;
    world.start();
    world.settle();
    let pods = (0..9).map(|number| format!("pod-{number}")).collect::<Vec<_>>();
    assert!(pods.iter().all(|pod| world.add(pod)));
    world.settle();
    world.pass(Duration::from_mins(2));
    assert!(!world.add("more"), "the node is full");
    let address = world.pods["pod-4"];
    world.vanish("pod-4", &naming::host_veth("eni", "default", "pod-4", 0).unwrap());
    world.swept.clear();
    for _ in 0..100_000 {
        world.pass(Duration::from_millis(5)); // the kernel takes ten times that
        if world.swept.contains(&address) {
            break;
        }
    }
    assert!(world.swept.contains(&address), "{:#?}", world.log);
    let given = |world: &World| world.core.as_ref().unwrap().pool().allocations().any(|held| held.address == address);
    world.ask("next");
    world.pass(Duration::from_millis(10));
    assert!(!given(&world), "rules that its ADD makes might be swept: {:#?}", world.log);
    world.pass(Duration::from_secs(1));
    assert!(world.wired("next"));
    assert_eq!(world.pods["next"], address);
    world.settle();
    world.check_at_rest();
}

#[test]
fn an_address_rests_for_a_moment_after_its_del_even_without_a_cooldown() {
    for cooldown in [0, 1, 2] {
        let mut world = World::asleep("t3.small", DEFAULT);
        world.configure = match cooldown {
            0 => |config| config.tunables.ip_cooldown = Duration::ZERO,
            1 => |config| config.tunables.ip_cooldown = Duration::from_secs(1),
            _ => |config| config.tunables.ip_cooldown = Duration::from_secs(2),
        };
        world.start();
        world.settle();
        assert!((0..9).all(|number| world.add(&format!("pod-{number}"))));
        world.settle();
        world.pass(Duration::from_mins(2));
        let address = world.pods["pod-4"];
        let given =
            |world: &World| world.core.as_ref().unwrap().pool().allocations().any(|held| held.address == address);
        world.del("pod-4");
        assert!(!given(&world));
        world.pass(Duration::from_secs(1)); // the DEL has taken as long
        world.ask("next");
        world.pass(Duration::from_millis(900));
        assert!(!given(&world), "the kernel thread may still sweep its rules: {:#?}", world.log);
        world.pass(Duration::from_millis(500));
        assert!(world.wired("next"), "as soon as it may: {:#?}", world.log);
        assert_eq!(world.pods["next"], address);
        world.settle();
        world.check_at_rest();
    }
}

#[test]
fn an_old_record_does_not_touch_a_later_pod() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    let time = world.now().wall;
    world.pass(Duration::from_secs(10));
    assert!(world.add("a"));
    world.spool.push(Record { key: key("a"), pod: PodName::default(), uid: String::new(), time });
    let spool = world.spool.clone();
    world.happen(Event::Spool(spool));
    world.settle();
    assert!(world.spool.is_empty());
    world.check_at_rest();
}

#[test]
fn a_full_disk_gives_nothing_away_and_loses_nothing() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a"));
    let before = world.pods["a"];
    world.disk_full = true;
    world.ask("b");
    world.pass(Duration::from_secs(2));
    assert!(matches!(world.answers["b"].front(), Some(Answer::Error(text)) if text.contains("no space")));
    world.answers.clear();
    world.disk_full = false;
    world.pass(Duration::from_mins(1));
    assert!(world.add("b"));
    assert_ne!(world.pods["b"], before);
    world.settle();
    world.check_at_rest();
}

#[test]
fn an_unreadable_checkpoint_keeps_the_addresses_that_rules_lead_to() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a") && world.add("b"));
    world.settle();
    world.crash();
    world.disk = Some("{torn".into());
    world.start();
    world.settle();
    for n in 0..8 {
        assert!(world.add(&format!("new-{n}")), "none of them gets an address of a or b: `wired` checks");
    }
    let held = |world: &World| world.core.as_ref().unwrap().pool().allocations().count();
    // The plugin cannot know whose the rules are, and leaves them.
    let deleted = |world: &mut World, pod: &str| {
        let address = world.pods[pod];
        world.stale_rules.insert(address);
        world.del(pod);
        address
    };
    let a = deleted(&mut world, "a");
    world.pass(Duration::from_mins(10));
    assert_eq!(held(&world), 9, "b is still reserved, a is free again");
    assert!(world.swept.contains(&a));
    world.crash();
    world.start();
    world.settle();
    assert_eq!(held(&world), 9, "b is reserved after another restart as well");
    let b = deleted(&mut world, "b");
    world.crash();
    world.start();
    world.settle();
    assert_eq!(held(&world), 8);
    assert!(world.swept.contains(&b));
    world.check_at_rest();
}

#[test]
fn a_throttled_attach_does_not_give_the_eni_back() {
    let mut world = World::new("m5.large", DEFAULT);
    for _ in 0..3 {
        world.vpc.knobs.refuse_next("AttachNetworkInterface", "RequestLimitExceeded", 503);
    }
    world.settle();
    assert!(world.add("a"));
    world.pass(Duration::from_mins(2));
    world.settle();
    let calls = ["CreateNetworkInterface", "AttachNetworkInterface", "DeleteNetworkInterface"];
    assert_eq!(calls.map(|action| world.calls(action)), [1, 4, 0]);
    assert_eq!(world.enis().len(), 2);
    world.check_at_rest();
}

#[test]
fn an_exhausted_subnet_is_left_alone_for_a_while() {
    let mut world = World::new("m5.large", DEFAULT);
    world.vpc.knobs.refuse_next("AssignPrivateIpAddresses", "InsufficientFreeAddressesInSubnet", 400);
    world.vpc.knobs.refuse_next("AssignPrivateIpAddresses", "InsufficientFreeAddressesInSubnet", 400);
    world.pass(Duration::from_secs(100));
    assert_eq!(world.calls("AssignPrivateIpAddresses"), 2, "nine, then one, then peace");
    assert!(!world.add("a"), "an ADD is refused, not left hanging: {:#?}", world.log);
    world.pass(Duration::from_mins(1));
    world.settle();
    assert!(world.add("a"));
    world.settle();
    world.check_at_rest();
}

#[test]
fn a_lost_answer_to_a_creation_makes_no_second_eni() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    world.vpc.knobs.action("CreateNetworkInterface").next.push_back(Planned::AnswerLost);
    assert!(world.add("a"));
    world.pass(Duration::from_mins(1));
    world.settle();
    assert_eq!(world.enis(), [(0, 9), (1, 9)]);
    world.check_at_rest();
}

#[test]
fn a_lost_answer_to_an_assign_is_looked_up_and_not_repeated() {
    let mut world = World::new("m5.large", DEFAULT);
    world.vpc.knobs.action("AssignPrivateIpAddresses").next.push_back(Planned::AnswerLost);
    world.settle();
    assert_eq!(world.calls("AssignPrivateIpAddresses"), 1);
    assert_eq!(world.enis(), [(0, 9)]);
    world.check_at_rest();
}

#[test]
fn an_attach_that_fails_leaves_no_eni_behind() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    world.vpc.knobs.refuse_next("AttachNetworkInterface", "IncorrectState", 400);
    assert!(world.add("a"));
    world.pass(Duration::from_mins(2));
    world.settle();
    assert_eq!(world.enis(), [(0, 9), (1, 9)], "tried again after a pause");
    world.check_at_rest();
}

#[test]
fn an_eni_that_somebody_else_attached_is_taken_in() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    let subnet = world.vpc.identity(&world.instance).unwrap().subnet;
    let now = world.now();
    let eni = world.vpc.add_interface(now, &subnet, "by hand", &Map::new()).unwrap();
    let instance = world.instance.clone();
    let call = Call::Attach { eni: eni.clone(), instance, device: 1, card: 0 };
    assert!(matches!(world.vpc.execute(now, &call).result, Ok(Reply::Attached(_))));
    world.pass(Duration::from_mins(5));
    world.settle();
    assert!(world.core.as_ref().unwrap().pool().eni(&eni).is_some());
    world.check_at_rest();
}

#[test]
fn an_address_that_somebody_took_away_is_given_up_or_kept_and_ec2_left_in_peace() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("a"));
    world.settle();
    let address = world.pods["a"];
    let IpAddr::V4(used) = address else { panic!("{address}") };
    let primary = world.vpc.identity(&world.instance).unwrap().primary_eni;
    let eni = world.vpc.interfaces().find(|interface| interface.id == primary).unwrap().clone();
    let free = eni.secondary_ipv4s.iter().copied().find(|ip| *ip != used).unwrap();
    let now = world.now();
    let call = Call::UnassignAddresses { eni: primary.clone(), addresses: vec![used, free] };
    assert_eq!(world.vpc.execute(now, &call).result, Ok(Reply::Done));
    world.pass(Duration::from_mins(10));
    let pool = world.core.as_ref().unwrap().pool();
    let held: BTreeSet<IpAddr> = pool.eni(&primary).unwrap().cidrs().map(|(net, _)| net.addr()).collect();
    assert!(held.contains(&address), "a living pod keeps its address");
    assert!(!held.contains(&IpAddr::V4(free)), "the free one is dropped");
    let before: u64 = world.vpc.journal().counts().values().sum();
    world.pass(Duration::from_hours(2));
    assert_eq!(world.vpc.journal().counts().values().sum::<u64>(), before, "nothing new, no call");
    world.del("a");
    world.pass(Duration::from_mins(5));
    for n in 0..9 {
        assert!(world.add(&format!("pod-{n}")), "`wired` checks that EC2 knows every address");
    }
    world.settle();
    world.check_at_rest();
}

#[test]
fn a_pod_whose_veth_was_renamed_keeps_its_address() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("renamed") && world.add("other"));
    world.rename("renamed", "odd0");
    world.pass(Duration::from_mins(20));
    world.settle();
    world.check_at_rest();
    // A start looks for pods that are gone as well.
    world.crash();
    world.pass(Duration::from_mins(2));
    world.start();
    world.settle();
    world.check_at_rest();
    assert!(world.swept.is_empty(), "{:?}", world.swept);
    // With its veth goes the route to it, and then it is gone, whatever the veth's name was.
    let address = world.pods["renamed"];
    world.vanish("renamed", "odd0");
    world.pass(Duration::from_mins(10));
    world.settle();
    world.check_at_rest();
    assert!(world.swept.contains(&address), "{:#?}", world.log);
}

#[test]
fn rules_that_cannot_be_deleted_are_not_swept_for_ever() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    let stray = "10.20.2.250".parse::<IpAddr>().unwrap();
    world.stale_rules.insert(stray);
    world.stuck_rules.insert(stray);
    let sweeps = |world: &World| world.log.iter().filter(|line| line.contains("lead to no pod: swept")).count();
    world.pass(Duration::from_mins(55));
    assert_eq!(sweeps(&world), 1, "{:#?}", world.log);
    // What was in the way may be gone.
    world.stuck_rules.clear();
    world.pass(Duration::from_mins(15));
    assert_eq!((sweeps(&world), world.stale_rules.len()), (2, 0), "{:#?}", world.log);
    // Rules that come later are others.
    world.stale_rules.insert(stray);
    world.pass(Duration::from_mins(10));
    assert_eq!((sweeps(&world), world.stale_rules.len()), (3, 0), "{:#?}", world.log);
}

#[test]
fn rules_of_nobody_are_swept_away_when_they_were_seen_twice() {
    let mut world = World::new("m5.large", DEFAULT);
    world.settle();
    assert!(world.add("living"));
    let mut listed = world.vpc.interfaces().flat_map(|interface| interface.secondary_ipv4s.clone()).map(IpAddr::from);
    let free = listed.find(|address| !world.pods.values().any(|held| held == address)).unwrap();
    drop(listed);
    let [elsewhere, foreign] = ["10.20.2.250", "192.0.2.9"].map(|ip| ip.parse::<IpAddr>().unwrap());
    world.stale_rules.extend([free, elsewhere, foreign]);
    world.pass(Duration::from_secs(151));
    assert!(world.swept.is_empty(), "seen once: {:?}", world.swept);
    // A crash forgets what was seen, and the rules stay.
    world.crash();
    world.start();
    world.settle();
    world.pass(Duration::from_secs(151));
    assert!(world.swept.is_empty(), "seen once again: {:?}", world.swept);
    world.pass(Duration::from_secs(151));
    world.settle();
    assert_eq!(world.swept, [free, elsewhere].into());
    assert_eq!(world.stale_rules, [foreign].into(), "outside the VPC it may be anybody's");
    world.pass(Duration::from_mins(15));
    world.settle();
    world.check_at_rest();
    assert_eq!(world.swept.len(), 2);
}
