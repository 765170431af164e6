//! Routing rules: ours beside others', that for local addresses, and which one an add or a delete means.

use super::{NODE_IP, World, intent, ip, net, texts, warnings, well};
use crate::support::pods::{add, pod_of};
use crate::support::traffic::tcp;
use crate::support::{self, Netns};
use enibox::apply::Host;
use enibox::model::net::{Family, Rule, TABLE_MAIN};
use enibox::netlink::{link, rule};
use enibox::plan::host::{HostEni, Intent};
use enibox::plan::pod::{Removal, RemovedAddress};

#[test]
fn the_local_rule_moves_behind_the_branches_and_back() {
    let world = World::new();
    let eni = HostEni { own: net("2001:db8:12::5/64"), gateway: ip("fe80:ec2::1"), ..intent().enis[0].clone() };
    let six = Intent { v6: true, node_ip: ip("2001:db8:11::162"), vpc_cidrs: Vec::new(), enis: vec![eni], ..intent() };
    let locals = |family: Family| {
        let rules = world.observe().rules.into_iter().filter(|rule| rule.family == family && rule.priority <= 20);
        rules.map(|rule| rule.to_string()).collect::<Vec<_>>()
    };
    for (family, plain) in [(Family::V4, intent()), (Family::V6, six)] {
        let strict = Intent { strict_branches: true, ..plain.clone() };
        let before = locals(family);
        assert_eq!(before, ["0: from all lookup local"]);
        well(&world.host(&strict));
        let router = "0: from fe80:ec2::1 ipproto 58 lookup local";
        let moved = "20: from all lookup local";
        let wanted = if family == Family::V4 { vec![moved] } else { vec![router, moved] };
        assert_eq!(locals(family), wanted);
        assert_eq!(texts(&world.host(&strict)), Vec::<&str>::new());
        tcp(&world.node, &world.node, ip(NODE_IP)).unwrap();
        // A pod made in strict mode keeps it as it is.
        let rule = Rule { iif: Some("vlan0123456789a".into()), ..Rule::any(family, 10, 107) };
        let stub = link::Veth {
            end: link::End { name: "vlan0123456789a", mac: None, netns: None },
            peer: link::End { name: "stub", mac: None, netns: None },
            mtu: 1500,
            up: false,
        };
        world.node.route().run(&[link::create_veth(&stub), rule::add(&rule)]).unwrap();
        world.host(&plain);
        assert!(locals(family).contains(&moved.to_owned()));
        world.node.route().run(&[link::delete_by_name("stub")]).unwrap();
        // Its veth is gone, so the rule goes as well; the next round finds nothing that keeps the local rule where it is.
        world.host(&plain);
        world.host(&plain);
        assert_eq!(texts(&world.host(&plain)), Vec::<&str>::new());
        assert_eq!(locals(family), before);
    }
}

/// Puts rules there, before or behind what is there, and asks for the rules of that family afterwards.
fn lay(world: &World, rules: &[&Rule]) {
    let requests = rules.iter().map(|rule| rule::add_beside(rule)).collect::<Vec<_>>();
    support::must(&mut world.node.route(), &requests);
}

fn rules(world: &World, family: Family, priority: u32) -> Vec<Rule> {
    let mut rules = rule::list(&mut world.node.route(), family).unwrap();
    rules.retain(|rule| rule.priority == priority);
    rules
}

#[test]
fn a_rule_that_only_looks_like_ours_is_not_taken_for_it() {
    let world = World::new();
    let marked = Rule { fwmark: Some((0x80, 0x80)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) };
    let foreign = Rule { src: Some(net("10.0.0.0/8")), ..marked.clone() };
    let service = Rule::to(net("192.0.2.0/24"), 1535, TABLE_MAIN);
    let narrow = Rule { src: Some(net("10.9.0.0/16")), ..service.clone() };
    lay(&world, &[&foreign, &narrow]);
    let report = world.host(&intent());
    well(&report);
    assert_eq!(warnings(&report), "");
    assert_eq!(rules(&world, Family::V4, 1024), [foreign, marked]);
    assert_eq!(rules(&world, Family::V4, 1535), [narrow, service]);
    assert_eq!(texts(&world.host(&intent())), Vec::<&str>::new());
    // One of a pod, when it comes and while it lives.
    let ours = Rule::to(net("10.20.12.60/32"), 512, TABLE_MAIN);
    let narrow = Rule { src: Some(net("10.8.0.0/16")), ..ours.clone() };
    lay(&world, &[&narrow]);
    let pod = Netns::new("pod");
    add(&world.node, &pod_of("two", &[("10.20.12.60", 2)]), &pod).unwrap();
    assert_eq!(rules(&world, Family::V4, 512), [narrow.clone(), ours.clone()]);
    world.node.route().run(&[rule::delete(&narrow)]).unwrap();
    world.node.route().run(&[rule::delete(&ours)]).unwrap();
    let foreign = Rule { src: Some(net("10.9.0.0/16")), ..ours.clone() };
    lay(&world, &[&foreign]);
    well(&world.host(&intent()));
    assert_eq!(rules(&world, Family::V4, 512), [foreign, ours]);
    assert_eq!(texts(&world.host(&intent())), Vec::<&str>::new());
}

#[test]
fn external_services_may_be_everywhere() {
    let world = World::new();
    let wanted = Intent { external_service_cidrs: vec![net("0.0.0.0/0")], ..intent() };
    world.host(&wanted);
    let rule = Rule::any(Family::V4, 1535, TABLE_MAIN);
    for _ in 0..3 {
        assert_eq!(rules(&world, Family::V4, 1535), std::slice::from_ref(&rule));
        let report = world.host(&wanted);
        assert_eq!((texts(&report), warnings(&report)), (Vec::new(), String::new()));
    }
    assert_eq!(
        texts(&world.host(&Intent { external_service_cidrs: Vec::new(), ..wanted })),
        [format!("delete rule {rule}")]
    );
    assert_eq!(rules(&world, Family::V4, 1535), []);
}

#[test]
fn a_delete_meets_no_other_rule() {
    let world = World::new();
    world.host(&intent());
    let pod = Netns::new("pod");
    add(&world.node, &pod_of("two", &[("10.20.12.60", 2)]), &pod).unwrap();
    let stale = Rule::from(net("10.20.12.60/32"), 1536, 3);
    let tcp = Rule { ipproto: Some(6), ..stale.clone() };
    let old = Rule { fwmark: Some((0x100, 0x100)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) };
    let narrow = Rule { src: Some(net("10.9.0.0/16")), ..old.clone() };
    lay(&world, &[&tcp, &stale, &narrow, &old]);
    let (from, marks) = (rules(&world, Family::V4, 1536), rules(&world, Family::V4, 1024));
    for _ in 0..2 {
        let report = world.host(&intent());
        well(&report);
        assert_eq!(texts(&report), Vec::<&str>::new());
        let told = warnings(&report);
        let held = "from-pod-rule: delete rule 1536: from 10.20.12.60 lookup 3: the kernel would delete \"1536: from \
                    10.20.12.60 ipproto 6 lookup 3\" instead, which is not ours\n";
        assert!(told.contains(held) && told.contains("10.9.0.0/16 fwmark 0x100/0x100"), "{told}");
        assert_eq!((&rules(&world, Family::V4, 1536), &rules(&world, Family::V4, 1024)), (&from, &marks));
    }
    // As soon as they are out of the way.
    world.node.route().run(&[rule::delete(&tcp), rule::delete(&narrow)]).unwrap();
    let report = world.host(&intent());
    assert_eq!((texts(&report).len(), warnings(&report)), (2, String::new()));
    assert_eq!((rules(&world, Family::V4, 1536).len(), rules(&world, Family::V4, 1024).len()), (1, 1));
}

/// Somebody has rules of our priorities with a pod's address and something more, some of which we cannot even say. The kernel takes
/// them for ours in a delete, and neither ADD nor DEL lists the rules of a thousand pods to see that.
#[test]
fn add_and_del_leave_rules_of_others() {
    for (address, family, flag) in [("10.20.12.60", Family::V4, "-4"), ("2001:db8:12::60", Family::V6, "-6")] {
        let world = World::new();
        world.host(&intent());
        let theirs = [
            format!("512 to {address} ipproto tcp lookup main"),
            format!("512 to {address} iif eth1 lookup main"),
            format!("1536 from {address} ipproto udp dport 53 lookup 2"),
            format!("1536 from {address} uidrange 7-8 lookup 2 suppress_prefixlength 0"),
            format!("1536 from {address} fwmark 0x100/0x100 lookup 9"),
            format!("1536 not from {address} iif eth1 lookup 2"),
        ];
        let wired = pod_of("two", &[(address, 2)]);
        let [to, from] = &wired.interfaces[0].host_rules()[..] else { panic!("two rules") };
        let say = |line: &str| {
            let (priority, rest) = line.split_once(' ').unwrap();
            let (not, rest) = rest.strip_prefix("not ").map_or(("", rest), |rest| ("not ", rest));
            let line = format!("rule add {not}pref {priority} {rest}");
            world
                .node
                .run(|| support::tool("ip", &[&[flag], &line.split(' ').collect::<Vec<_>>()[..]].concat()).unwrap());
        };
        let listed = |priority| {
            let show = ["-d", flag, "rule", "show", "pref", priority];
            let text = world.node.run(|| support::tool("ip", &show)).unwrap();
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let both = || [listed("512"), listed("1536")];
        let ours = || {
            [to, from].map(|rule| rules(&world, family, rule.priority).iter().filter(|there| *there == rule).count())
        };
        // Theirs are there first, and an earlier owner's rule among them, so that all of them are met.
        for line in &theirs {
            say(line);
        }
        let before = both();
        let earlier = Rule { table: 5, ..from.clone() };
        lay(&world, &[&earlier]);
        let pod = Netns::new("pod");
        add(&world.node, &wired, &pod).unwrap();
        assert_eq!(ours(), [1, 1]);
        assert!(!rules(&world, family, 1536).contains(&earlier), "it would win");
        let count = |lists: &[Vec<String>; 2]| lists.each_ref().map(Vec::len);
        let now = both();
        assert_eq!(count(&now), [3, 5], "{now:?}");
        let last = rules(&world, family, 1536).pop();
        assert_eq!(last.as_ref(), Some(from), "what stood before it still does");
        let addresses = vec![RemovedAddress { address: ip(address), table: 2 }];
        let removal = Removal { addresses, ..Removal::default() };
        world.node.run(|| Host::open()?.del_pod(&removal, None)).unwrap();
        assert_eq!(ours(), [0, 0]);
        let sorted = |mut lists: [Vec<String>; 2]| {
            for list in &mut lists {
                list.sort();
            }
            lists
        };
        assert_eq!(sorted(both()), sorted(before));
    }
}

#[test]
fn local_addresses_are_always_reached() {
    let world = World::new();
    let local = |priority| Rule::any(Family::V4, priority, 255);
    let part = |priority| Rule { src: Some(net("10.9.9.9/32")), ..local(priority) };
    let strict = Intent { strict_branches: true, ..intent() };
    lay(&world, &[&part(20)]);
    well(&world.host(&strict));
    assert_eq!(rules(&world, Family::V4, 20), [part(20), local(20)]);
    assert_eq!(rules(&world, Family::V4, 0), []);
    tcp(&world.node, &world.node, ip(NODE_IP)).unwrap();
    // The way back, by the daemon and by the clean-up.
    lay(&world, &[&part(0)]);
    let report = world.host(&intent());
    assert!(warnings(&report).contains("10.9.9.9"), "{}", warnings(&report));
    assert_eq!(
        (rules(&world, Family::V4, 0), rules(&world, Family::V4, 20)),
        (vec![part(0), local(0)], vec![part(20), local(20)])
    );
    let clear = [rule::delete(&local(0)), rule::delete(&local(0)), rule::delete(&part(20))];
    world.node.route().run(&clear).unwrap();
    lay(&world, &[&part(0)]);
    assert_eq!((rules(&world, Family::V4, 0), rules(&world, Family::V4, 20)), (vec![part(0)], vec![local(20)]));
    let found = enibox::plan::cleanup::cleanup(&world.observe(), "eni", false);
    assert_eq!(world.node.run(|| Host::open()?.clean_up(&found)).unwrap().len(), 0);
    assert_eq!((rules(&world, Family::V4, 0), rules(&world, Family::V4, 20)), (vec![part(0), local(0)], vec![]));
    tcp(&world.node, &world.node, ip(NODE_IP)).unwrap();
}

#[test]
fn the_rule_for_the_router_stays_when_the_local_rule_was_put_back() {
    let world = World::new();
    let eni = HostEni { own: net("2001:db8:12::5/64"), gateway: ip("fe80:ec2::1"), ..intent().enis[0].clone() };
    let strict = Intent {
        v6: true,
        node_ip: ip("2001:db8:11::162"),
        vpc_cidrs: Vec::new(),
        enis: vec![eni],
        strict_branches: true,
        ..intent()
    };
    well(&world.host(&strict));
    let right = rules(&world, Family::V6, 0);
    assert_eq!(right, [enibox::plan::host::gateway_rule()]);
    lay(&world, &[&Rule::any(Family::V6, 0, 255)]);
    let report = world.host(&strict);
    well(&report);
    assert_eq!(texts(&report), ["delete rule 0: from all lookup local"]);
    assert_eq!(rules(&world, Family::V6, 0), right);
    assert_eq!(texts(&world.host(&strict)), Vec::<&str>::new());
}
