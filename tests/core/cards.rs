//! IPv6 mode, several network cards, EFA, and ENIs that are not ours to use (`spec/ipamd.md` 7.2, 7.3, 7.7, 17).

use super::lives::{live, pick};
use super::world::{DEFAULT, World};
use enibox::model::ec2::{Attachment, Call, Reply};
use enibox::model::ids::EniId;
use enibox::model::map::Map;
use enibox::plan::backoff::Random;
use enibox::plan::core::{Answer, Config};
use enibox::plan::pool::Eni;
use enibox::sim::vpc::Planned;
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// Three ENIs on card 0 and two on card 1, each with three addresses for pods.
const TWO_CARDS: &str = "two.cards";

fn several(config: &mut Config) {
    config.multi_nic = true;
    config.cards = [(0, 3), (1, 2)].into();
}

fn prefixes(config: &mut Config) {
    config.prefix_mode = true;
    config.tunables.targets.warm_prefix = 1;
}

fn several_prefixes(config: &mut Config) {
    several(config);
    prefixes(config);
}

fn six(config: &mut Config) {
    (config.v6, config.prefix_mode, config.clean_leaked) = (true, true, false);
}

fn several_six(config: &mut Config) {
    several(config);
    six(config);
}

fn asleep(kind: &str, configure: fn(&mut Config)) -> World {
    let mut world = World::asleep(kind, DEFAULT);
    world.configure = configure;
    let (primary, now) = (primary(&world), world.now());
    world.vpc.meddle(now, &primary, |eni| eni.ipv6s.push("2001:db8:0:1::f".parse().unwrap()));
    world
}

fn node(kind: &str, configure: fn(&mut Config)) -> World {
    let mut world = asleep(kind, configure);
    world.start();
    world
}

fn primary(world: &World) -> EniId {
    world.vpc.identity(&world.instance).unwrap().primary_eni
}

/// Somebody else attaches an ENI. It is ours to use or not, as its tags say.
fn attach(world: &mut World, card: u32, device: u32, tags: &[(&str, &str)]) -> EniId {
    let (now, subnet) = (world.now(), world.vpc.identity(&world.instance).unwrap().subnet);
    let tags = tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let eni = world.vpc.add_interface(now, &subnet, "by hand", &tags).unwrap();
    let call = Call::Attach { eni: eni.clone(), instance: world.instance.clone(), device, card };
    assert!(matches!(world.vpc.execute(now, &call).result, Ok(Reply::Attached(_))));
    eni
}

/// Turns an ENI into an EFA; one without addresses if so wished.
fn make_efa(world: &mut World, eni: &EniId, only: bool) {
    let now = world.now();
    world.vpc.meddle(now, eni, |eni| {
        eni.interface_type = if only { "efa-only" } else { "efa" }.into();
        if only {
            eni.primary_ipv4 = None;
        }
    });
}

fn add_on_all(world: &mut World, pod: &str) -> bool {
    world.ask_for(pod, true);
    world.pass(Duration::from_secs(5));
    world.wired(pod)
}

/// Card, device and CIDRs of what the pool holds.
fn held(world: &World) -> Vec<(u32, u32, usize)> {
    let pool = world.core.as_ref().unwrap().pool();
    let mut held: Vec<_> = pool.enis().map(|(_, eni)| (eni.card, eni.device, eni.cidr_count())).collect();
    held.sort_unstable();
    held
}

fn all_calls(world: &World) -> u64 {
    world.vpc.journal().counts().values().sum()
}

#[track_caller]
fn untouched(world: &World, eni: &EniId) {
    let named = |entry: &&enibox::sim::vpc::Entry| entry.call.contains(&eni.0) && !entry.action.starts_with("Describe");
    let calls: Vec<_> =
        world.vpc.journal().entries().filter(named).filter(|entry| entry.at > World::moment(1).wall).collect();
    // The first is the test's own attach.
    assert!(calls.iter().all(|entry| entry.action == "AttachNetworkInterface") && calls.len() <= 1, "{calls:?}");
}

#[track_caller]
fn quiet_from_here(world: &mut World) {
    let before = all_calls(world);
    world.pass(Duration::from_hours(3));
    assert_eq!(all_calls(world), before, "idle: {:#?}", world.log);
}

#[test]
fn ipv6_is_one_prefix_and_no_loop() {
    let mut world = node("m5.large", six);
    world.settle();
    assert!(world.ready);
    for n in 0..40 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    let prefix = world.vpc.interfaces().next().unwrap().v6_prefixes[0];
    let nth = |n: u128| {
        let IpAddr::V6(base) = prefix.network() else { panic!("{prefix}") };
        IpAddr::V6((u128::from(base) + n).into())
    };
    assert_eq!([world.pods["pod-0"], world.pods["pod-1"], world.pods["pod-39"]], [nth(0), nth(1), nth(39)]);
    assert_eq!((world.calls("AssignIpv6Addresses"), world.calls("CreateNetworkInterface")), (1, 0));
    for n in 0..40 {
        world.del(&format!("pod-{n}"));
    }
    quiet_from_here(&mut world);
    world.check_at_rest();
    let before = all_calls(&world);
    world.crash();
    world.start();
    world.settle();
    assert_eq!(all_calls(&world) - before, 1, "a restart is one call");
    world.check_at_rest();
}

#[test]
fn a_prefix_that_is_there_is_used_and_of_several_the_first() {
    let mut world = asleep("m5.large", six);
    let (primary, now) = (primary(&world), world.now());
    let listed: Vec<IpNet> = ["2001:db8:0:1:9::/80", "2001:db8:0:1:8::/80"].map(|net| net.parse().unwrap()).into();
    world.vpc.meddle(now, &primary, |eni| eni.v6_prefixes.clone_from(&listed));
    world.start();
    world.settle();
    assert!(world.add("a"));
    assert_eq!(world.pods["a"], listed[0].network());
    assert_eq!((held(&world), world.calls("AssignIpv6Addresses")), (vec![(0, 0, 1)], 0));
    let now = world.now();
    world.vpc.meddle(now, &primary, |eni| eni.v6_prefixes.reverse());
    world.crash();
    world.start();
    world.settle();
    assert!(world.add("b"));
    assert!(listed[0].contains(&world.pods["b"]), "what is in use stays in use, whatever the order");
    quiet_from_here(&mut world);
}

#[test]
fn a_lost_answer_about_a_prefix_is_looked_up() {
    for (planned, calls) in [(Planned::AnswerLost, 1), (Planned::RequestLost, 2)] {
        let mut world = asleep("m5.large", six);
        world.vpc.knobs.action("AssignIpv6Addresses").next.push_back(planned.clone());
        world.vpc.knobs.describe_lag = Duration::from_secs(3);
        world.start();
        world.pass(Duration::from_mins(2));
        world.settle();
        assert!(world.add("a"), "{planned:?}: {:#?}", world.log);
        assert_eq!(world.calls("AssignIpv6Addresses"), calls, "{planned:?}");
        assert_eq!(world.vpc.interfaces().next().unwrap().v6_prefixes.len(), 1, "{planned:?}");
        world.check_at_rest();
    }
}

#[test]
fn an_ipv6_node_restarts_with_ec2_away() {
    let mut world = node("m5.large", six);
    world.settle();
    assert!(world.add("a") && world.add("b"));
    world.settle();
    let pods = world.pods.clone();
    world.crash();
    world.ec2_down = true;
    world.start();
    world.pass(Duration::from_secs(1));
    assert!(world.ready && world.add("a"));
    assert_eq!(world.pods, pods, "the same address");
    world.del("b");
    assert!(world.add("c"), "what EC2 had listed is trusted");
    world.ec2_down = false;
    world.pass(Duration::from_mins(2));
    world.settle();
    world.check_at_rest();
}

#[test]
fn a_lost_prefix_is_replaced_and_its_pods_keep_their_addresses() {
    let mut world = node("m5.large", six);
    world.settle();
    assert!(world.add("a"));
    let (eni, now, address) = (primary(&world), world.now(), world.pods["a"]);
    world.vpc.meddle(now, &eni, |eni| eni.v6_prefixes.clear());
    world.pass(Duration::from_mins(5));
    assert!(world.add("b"), "{:#?}", world.log);
    let pool = world.core.as_ref().unwrap().pool();
    assert!(pool.allocations().any(|held| held.address == address), "a keeps its address");
    assert_eq!(world.calls("AssignIpv6Addresses"), 2);
    world.del("a");
    world.settle();
    world.check_at_rest();
}

#[test]
fn ipv6_makes_an_eni_on_each_further_card() {
    let mut world = asleep(TWO_CARDS, several_six);
    world.vpc.knobs.refuse_next("CreateNetworkInterface", "UnauthorizedOperation", 403);
    world.start();
    world.settle();
    assert!(world.ready && world.add("early"), "card 0 does not wait for card 1");
    world.pass(Duration::from_mins(1));
    world.settle();
    assert_eq!(held(&world), [(0, 0, 1), (1, 0, 1)], "{:#?}", world.log);
    let made = world.vpc.interfaces().find(|i| i.id != primary(&world)).unwrap();
    assert_eq!((made.ipv6s.len(), made.secondary_ipv4s.len()), (1, 0));
    assert!(add_on_all(&mut world, "a"));
    assert_eq!(world.more["a"].len(), 1);
    world.settle();
    world.check_at_rest();
    quiet_from_here(&mut world);
    let card_1 = world.more["a"][0];
    world.crash();
    world.start();
    world.settle();
    assert!(add_on_all(&mut world, "a"));
    assert_eq!(world.more["a"], [card_1]);
    world.del("a");
    world.settle();
    world.check_at_rest();
}

#[test]
fn ipv6_takes_in_what_others_attach_and_can_serve() {
    let mut world = node("m5.large", six);
    world.settle();
    let without = attach(&mut world, 0, 1, &[]);
    let with = attach(&mut world, 0, 2, &[]);
    let now = world.now();
    world.vpc.meddle(now, &with, |eni| eni.ipv6s.push("2001:db8:0:1::e".parse().unwrap()));
    world.pass(Duration::from_mins(10));
    world.settle();
    let pool = world.core.as_ref().unwrap().pool();
    assert!(pool.eni(&without).is_none(), "it has no IPv6 address of its own");
    assert_eq!(pool.eni(&with).map(Eni::cidr_count), Some(1));
    quiet_from_here(&mut world);
}

#[test]
fn ipv6_gives_up_an_eni_that_somebody_detached() {
    let mut world = node("m5.large", six);
    world.settle();
    let eni = attach(&mut world, 0, 1, &[]);
    let now = world.now();
    world.vpc.meddle(now, &eni, |eni| eni.ipv6s.push("2001:db8:0:1::e".parse().unwrap()));
    world.pass(Duration::from_mins(5));
    assert_eq!(held(&world), [(0, 0, 1), (0, 1, 1)]);
    let now = world.now();
    let attachment = world.vpc.interfaces().find(|i| i.id == eni).unwrap().attachment.clone().unwrap().id;
    assert_eq!(world.vpc.execute(now, &Call::Detach(attachment)).result, Ok(Reply::Done));
    world.pass(Duration::from_mins(10));
    assert_eq!(held(&world), [(0, 0, 1)], "{:#?}", world.log);
    quiet_from_here(&mut world);
}

#[test]
fn each_card_has_its_own_pool_and_targets() {
    let mut world = node(TWO_CARDS, several);
    world.settle();
    assert_eq!(held(&world), [(0, 0, 3), (1, 0, 1)], "W = M = 1 above card 0");
    assert!(add_on_all(&mut world, "a") && world.add("b"));
    world.settle();
    let places: Vec<_> =
        [world.pods["a"], world.more["a"][0], world.pods["b"]].map(|ip| world.place_of(ip).unwrap().0).into();
    assert_eq!(places, [0, 1, 0]);
    let pool = world.core.as_ref().unwrap().pool();
    let tables: Vec<_> = pool.allocations().filter(|held| held.card == 1).filter_map(|held| held.table).collect();
    assert_eq!(tables, [10_100]);
    assert_eq!(world.disks.keys().copied().collect::<Vec<_>>(), [1]);
    world.check_at_rest();
    quiet_from_here(&mut world);
    world.crash();
    world.start();
    world.settle();
    world.check_at_rest();
    world.del("a");
    world.del("b");
    world.pass(Duration::from_mins(10));
    world.settle();
    assert_eq!(held(&world), [(0, 0, 3), (1, 0, 1)]);
    world.check_at_rest();
}

#[test]
fn a_prefix_on_a_further_card_is_not_given_back_and_asked_for_again() {
    let mut world = node(TWO_CARDS, several_prefixes);
    world.settle();
    assert_eq!(held(&world), [(0, 0, 1), (1, 0, 1)]);
    quiet_from_here(&mut world);
    world.check_at_rest();
}

#[test]
fn a_full_card_sends_pods_to_the_next_and_a_pod_for_all_cards_gets_all_or_none() {
    let mut world = node(TWO_CARDS, several);
    world.settle();
    for n in 0..9 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    assert!(!add_on_all(&mut world, "all"), "card 0 is full");
    let core = world.core.as_ref().unwrap();
    assert!(core.pool().allocations().all(|held| held.card == 0), "nothing is kept of what cannot be completed");
    for n in 9..15 {
        assert!(world.add(&format!("pod-{n}")), "pod-{n}: {:#?}", world.log);
    }
    assert!(!world.add("one-too-many"));
    world.settle();
    assert_eq!(held(&world), [(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 3), (1, 1, 3)]);
    world.del("pod-0");
    world.del("pod-12");
    world.pass(Duration::from_secs(31));
    assert!(add_on_all(&mut world, "all"));
    world.settle();
    world.check_at_rest();
}

#[test]
fn a_card_that_cannot_grow_holds_up_itself_alone() {
    let mut world = asleep(TWO_CARDS, several);
    for _ in 0..40 {
        world.vpc.knobs.refuse_next("AttachNetworkInterface", "InternalError", 500);
    }
    world.start();
    world.pass(Duration::from_mins(10));
    let before = world.calls("AttachNetworkInterface");
    assert!((4..=20).contains(&before), "with growing pauses: {before}");
    assert!(world.ready && world.add("a"));
    world.ask_for("b", true);
    world.pass(Duration::from_secs(5));
    let Some(Answer::Add(reply)) = world.answers.get("b").and_then(|answers| answers.front()) else {
        panic!("no answer")
    };
    assert!(reply.failure.contains("network card 1") && reply.failure.contains("InternalError"), "{}", reply.failure);
    assert!(!world.wired("b"));
    world.vpc.knobs.action("AttachNetworkInterface").next.clear();
    world.pass(Duration::from_mins(5));
    world.settle();
    assert!(add_on_all(&mut world, "b"));
    world.settle();
    world.check_at_rest();
}

#[test]
fn many_pods_that_overflow_at_once_are_served_together() {
    let mut world = node(TWO_CARDS, several);
    world.settle();
    let pods: Vec<String> = (0..15).map(|n| format!("pod-{n}")).collect();
    for pod in &pods {
        world.ask(pod);
    }
    world.pass(Duration::from_secs(6));
    for pod in &pods {
        assert!(world.wired(pod), "{pod}: {:#?}", world.log);
    }
    world.settle();
    world.check_at_rest();
}

#[test]
fn a_pod_for_all_cards_is_refused_where_the_feature_is_off() {
    let mut world = node(TWO_CARDS, |_| {});
    world.settle();
    assert_eq!(held(&world).iter().filter(|(card, ..)| *card > 0).count(), 0);
    world.ask_for("a", true);
    world.pass(Duration::from_secs(1));
    assert!(matches!(world.answers["a"].front(), Some(Answer::Add(reply)) if !reply.success));
}

#[test]
fn a_checkpoint_with_half_of_a_pod_is_completed_or_taken_back() {
    let mut world = node(TWO_CARDS, several);
    world.settle();
    assert!(add_on_all(&mut world, "a") && add_on_all(&mut world, "b"));
    world.settle();
    let (a, b) = (world.pods["a"], world.pods["b"]);
    world.crash();
    world.disks.clear(); // the file of card 1 was not written
    world.more.clear();
    world.start();
    world.settle();
    assert!(add_on_all(&mut world, "a"), "the missing part is given again");
    assert_eq!((world.pods["a"], world.more["a"].len()), (a, 1));
    assert_eq!(world.pods["b"], b);
    world.del("b");
    world.settle();
    world.check_at_rest();
}

#[test]
fn an_efa_serves_pods_and_is_never_freed() {
    let mut world = node("m5.large", |_| {});
    world.settle();
    let efa = attach(&mut world, 0, 1, &[]);
    make_efa(&mut world, &efa, false);
    world.pass(Duration::from_mins(3));
    for n in 0..12 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    let on = |world: &World| world.core.as_ref().unwrap().pool().eni(&efa).map(Eni::assigned);
    assert!(on(&world).unwrap() > 0);
    for n in 0..12 {
        world.del(&format!("pod-{n}"));
    }
    world.pass(Duration::from_mins(10));
    world.settle();
    assert_eq!(on(&world), Some(0), "still there");
    world.check_at_rest();
}

#[test]
fn a_card_with_nothing_but_an_efa_without_addresses_is_left_alone() {
    let mut world = asleep(TWO_CARDS, several);
    let efa = attach(&mut world, 1, 0, &[]);
    make_efa(&mut world, &efa, true);
    world.foreign.insert(efa.clone());
    world.start();
    world.settle();
    assert_eq!(held(&world), [(0, 0, 3)]);
    assert!(add_on_all(&mut world, "a"), "one address: there is one card");
    assert_eq!(world.more["a"], [] as [IpAddr; 0]);
    quiet_from_here(&mut world);
    let plain = attach(&mut world, 1, 1, &[]);
    world.pass(Duration::from_mins(5));
    world.settle();
    assert!(held(&world).contains(&(1, 1, 1)), "an ordinary ENI opens the card: {plain}");
    assert!(add_on_all(&mut world, "b"));
    assert_eq!(world.more["b"].len(), 1);
    world.settle();
    untouched(&world, &efa);
    world.check_at_rest();
}

// Somebody moved it into a container's namespace, say.
#[test]
fn an_eni_whose_link_never_appears_takes_a_slot_and_holds_nobody_up() {
    let mut world = node("m5.large", |_| {});
    world.settle();
    let stuck = attach(&mut world, 0, 1, &[]);
    world.linkless = Some(stuck.clone());
    world.foreign.insert(stuck.clone());
    world.pass(Duration::from_mins(5));
    for n in 0..18 {
        assert!(world.add(&format!("pod-{n}")), "pod-{n}: {:#?}", world.log);
    }
    assert!(!world.add("one-too-many"), "the stuck ENI takes a slot");
    world.settle();
    assert_eq!((world.calls("AttachNetworkInterface"), world.calls("DetachNetworkInterface")), (2, 0));
}

#[test]
fn an_efa_without_addresses_that_comes_later_takes_a_slot_and_nothing_else() {
    let mut world = node(TWO_CARDS, several);
    world.settle();
    let efa = attach(&mut world, 1, 1, &[]);
    make_efa(&mut world, &efa, true);
    world.foreign.insert(efa.clone());
    world.pass(Duration::from_mins(5));
    for n in 0..12 {
        assert!(world.add(&format!("pod-{n}")), "pod-{n}: {:#?}", world.log);
    }
    assert!(!world.add("one-too-many"), "card 1 has room for one ENI only");
    world.settle();
    untouched(&world, &efa);
    world.check_at_rest();
    for n in 0..12 {
        world.del(&format!("pod-{n}"));
    }
    world.pass(Duration::from_mins(10));
    quiet_from_here(&mut world);
    let now = world.now();
    let attachment = world.vpc.interfaces().find(|i| i.id == efa).unwrap().attachment.clone().unwrap().id;
    assert_eq!(world.vpc.execute(now, &Call::Detach(attachment)).result, Ok(Reply::Done));
    world.pass(Duration::from_mins(2));
    assert_eq!(world.core.as_ref().unwrap().room().0, 5, "its slot is free again");
}

#[test]
fn enis_that_are_not_ours_are_known_by_their_tags_and_never_touched() {
    const NO_MANAGE: &str = "node.k8s.amazonaws.com/no_manage";
    const INSTANCE: &str = "node.k8s.amazonaws.com/instance_id";
    #[track_caller]
    fn check(untagged: bool, tags: &[(&str, &str)], ours: bool) {
        let mut world =
            asleep("m5.large", if untagged { |_| {} } else { |config: &mut Config| config.manage_untagged = false });
        let own = world.instance.0.clone();
        let tags: Vec<_> =
            tags.iter().map(|(key, value)| (*key, if *value == "own" { own.as_str() } else { value })).collect();
        let eni = attach(&mut world, 0, 1, &tags);
        if !ours {
            world.foreign.insert(eni.clone());
        }
        world.start();
        world.settle();
        for n in 0..18 {
            assert!(world.add(&format!("pod-{n}")));
        }
        world.pass(Duration::from_mins(2));
        world.settle();
        assert_eq!(world.core.as_ref().unwrap().pool().eni(&eni).is_some(), ours, "{tags:?}");
        if !ours {
            untouched(&world, &eni);
            assert!(!world.add("one-too-many"), "its slot is taken");
            world.settle();
        }
        world.check_at_rest();
    }
    check(true, &[(NO_MANAGE, "true")], false);
    check(true, &[(NO_MANAGE, "true"), (INSTANCE, "own")], false);
    check(true, &[(NO_MANAGE, "false")], true);
    check(true, &[], true);
    check(true, &[(INSTANCE, "i-other")], true);
    check(false, &[(NO_MANAGE, "false")], true);
    check(false, &[(INSTANCE, "own")], true);
    check(false, &[(INSTANCE, "i-other")], false);
    check(false, &[], false);
}

#[test]
fn an_eni_that_is_claimed_later_serves_nobody_new_and_is_left_attached() {
    let mut world = node("m5.large", |_| {});
    world.settle();
    for n in 0..10 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.settle();
    let primary = primary(&world);
    let eni = world.vpc.interfaces().find(|i| i.id != primary && i.secondary_ipv4s.len() == 9).unwrap().id.clone();
    let now = world.now();
    world.vpc.meddle(now, &eni, |eni| {
        eni.tags.insert("node.k8s.amazonaws.com/no_manage".into(), "true".into());
    });
    world.crash(); // tags are seen when EC2 is asked, as at a restart
    world.start();
    world.pass(Duration::from_mins(3));
    world.foreign.insert(eni.clone());
    for n in 10..18 {
        assert!(world.add(&format!("pod-{n}")), "{:#?}", world.log);
        let (_, device) = world.place_of(world.pods[&format!("pod-{n}")]).unwrap();
        assert_ne!(world.vpc.interfaces().find(|i| i.id == eni).unwrap().attachment.as_ref().unwrap().device, device);
    }
    for n in 0..18 {
        world.del(&format!("pod-{n}"));
    }
    world.pass(Duration::from_mins(10));
    world.settle();
    let found =
        world.vpc.interfaces().find(|i| i.id == eni).unwrap_or_else(|| panic!("{eni} is gone: {:#?}", world.log));
    assert!(found.attachment.is_some() && found.secondary_ipv4s.len() == 9, "as it was");
    world.check_at_rest();
}

#[test]
fn cards_that_are_not_known_and_enis_without_addresses_do_no_harm() {
    let mut world = node("m5.large", |_| {});
    world.settle();
    let (now, instance) = (world.now(), world.instance.clone());
    let subnet = world.vpc.identity(&instance).unwrap().subnet;
    let tags = Map::new();
    let far = world.vpc.add_interface(now, &subnet, "on a card that nobody knows", &tags).unwrap();
    let bare = attach(&mut world, 0, 1, &[]);
    world.vpc.meddle(now, &far, |eni| {
        eni.status = "in-use".into();
        let (id, instance) = ("eni-attach-far".into(), instance.clone());
        eni.attachment = Some(Attachment { id, instance, device: 0, card: 99, delete_on_termination: false });
    });
    world.vpc.meddle(now, &bare, |eni| {
        eni.primary_ipv4 = None;
        eni.ipv6s.push("2001:db8:0:1::e".parse().unwrap());
    });
    world.foreign.extend([far.clone(), bare.clone()]);
    world.pass(Duration::from_mins(5));
    assert_eq!(held(&world), [(0, 0, 9)]);
    for n in 0..18 {
        assert!(world.add(&format!("pod-{n}")));
    }
    assert!(!world.add("one-too-many"), "the ENI without IPv4 takes a slot");
    assert_eq!(world.calls("AttachNetworkInterface"), 2, "ours and the test's");
    world.settle();
    world.check_at_rest();
    untouched(&world, &far);
    world.pass(Duration::from_mins(15)); // IMDS never shows an ENI that EC2 lists: that is looked at some times
    quiet_from_here(&mut world);
}

#[test]
fn an_eni_begun_on_a_card_that_is_not_managed_any_more_is_given_back() {
    let mut world = asleep(TWO_CARDS, several);
    world.vpc.knobs.refuse_next("AttachNetworkInterface", "InternalError", 500);
    world.start();
    for _ in 0..200 {
        world.pass(Duration::from_millis(10));
        if world.calls("AttachNetworkInterface") > 0 {
            break;
        }
    }
    assert_eq!(world.calls("AttachNetworkInterface"), 1);
    world.crash();
    world.configure = |_| {};
    world.start();
    world.pass(Duration::from_mins(5));
    world.settle();
    assert_eq!(held(&world), [(0, 0, 3)]);
    world.disks.clear();
    world.check_at_rest();
}

/// Growth, pods of both kinds, restarts and shrinking, killed at effect `crash_at`.
fn scenario((configure, multi): Mode, crash_at: Option<u64>) -> u64 {
    let mut world = node(TWO_CARDS, configure);
    world.crash_at = crash_at;
    let go_on = |world: &mut World| {
        if world.core.is_none() {
            world.start();
            world.pass(Duration::from_secs(2));
        }
    };
    world.pass(Duration::from_secs(20));
    go_on(&mut world);
    world.pass(Duration::from_secs(20));
    for n in 0..5 {
        let pod = format!("pod-{n}");
        for _ in 0..4 {
            world.ask_for(&pod, multi && n % 2 == 0);
            world.pass(Duration::from_secs(8));
            if world.wired(&pod) {
                break;
            }
            go_on(&mut world);
        }
        go_on(&mut world);
        assert!(world.pods.contains_key(&pod), "{pod} with a crash at {crash_at:?}: {:#?}", world.log);
    }
    for n in 0..4 {
        world.del(&format!("pod-{n}"));
        go_on(&mut world);
    }
    for _ in 0..20 {
        world.pass(Duration::from_secs(20));
        go_on(&mut world);
    }
    world.pass(Duration::from_mins(10));
    go_on(&mut world);
    world.settle();
    world.check_at_rest();
    world.effects
}

/// What differs from the default configuration, and whether pods may want an address on every card.
type Mode = (fn(&mut Config), bool);

const MODES: [Mode; 4] = [(six, false), (several, true), (several_prefixes, true), (several_six, true)];

#[test]
fn a_crash_at_any_effect_in_any_mode_loses_and_leaks_nothing() {
    for (mode, name) in MODES.iter().zip(["ipv6", "cards", "cards with prefixes", "cards with ipv6"]) {
        let effects = scenario(*mode, None);
        for at in 1..=effects {
            let outcome = std::panic::catch_unwind(|| scenario(*mode, Some(at)));
            assert!(outcome.is_ok(), "{name}: a crash at effect {at}");
        }
        println!("{name}: {effects} crash points explored");
    }
}

/// Somebody else attaches an ENI now and then: one to be used, one that is not ours, or one without addresses.
fn others(world: &mut World, dice: &mut Random) {
    if dice.below(40) != 0 {
        return;
    }
    let (now, subnet) = (world.now(), world.vpc.identity(&world.instance).unwrap().subnet);
    let kind = dice.below(3);
    let tags: Map<_, _> =
        (kind == 1).then(|| ("node.k8s.amazonaws.com/no_manage".to_owned(), "true".to_owned())).into_iter().collect();
    let Ok(eni) = world.vpc.add_interface(now, &subnet, "by hand", &tags) else { return };
    world.foreign.insert(eni.clone());
    let device = u32::try_from(5 + dice.below(3)).unwrap();
    let card = if kind == 0 { 0 } else { u32::try_from(dice.below(2)).unwrap() }; // card 1 may not be managed
    let attach = Call::Attach { eni: eni.clone(), instance: world.instance.clone(), device, card };
    let answer = world.vpc.execute(now, &attach).result; // may be lost although it worked
    if !world.vpc.interfaces().any(|i| i.id == eni && i.attachment.is_some()) {
        return assert!(answer.is_err());
    }
    match kind {
        0 => drop(world.foreign.remove(&eni)),
        2 => make_efa(world, &eni, true),
        _ => {}
    }
}

fn random_life(seed: u64) {
    let mut dice = Random::new(seed);
    let (configure, multi) = pick(&mut dice, &MODES);
    live(node(TWO_CARDS, configure), &mut dice, multi, others);
}

#[test]
fn random_lives_in_all_modes_end_in_order() {
    let first = std::env::var("ENIBOX_SEED").ok().and_then(|seed| seed.parse().ok());
    let lives = std::env::var("ENIBOX_LIVES").ok().and_then(|lives| lives.parse().ok()).unwrap_or(200);
    for seed in first.map_or(1..lives + 1, |seed: u64| seed..seed + 1) {
        let outcome = std::panic::catch_unwind(|| random_life(seed));
        assert!(outcome.is_ok(), "seed {seed} fails: replay it with ENIBOX_SEED={seed}");
    }
}
