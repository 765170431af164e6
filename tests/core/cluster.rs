//! What the API server has a say in: cordon and size of the node, custom networking, branch ENIs, annotations, events.

use super::world::{DEFAULT, TRUNK_LINK, World, key};
use enibox::model::ec2::Call;
use enibox::model::ids::{EniId, PodName};
use enibox::model::kube::{EniConfig, Pod, Regarding};
use enibox::model::map::Map;
use enibox::model::wire::{AddNetworkReply, DelNetworkRequest, UNKNOWN_POD};
use enibox::plan::core::{Answer, Event};
use enibox::plan::sizing::Targets;
use enibox::sim::api::Api;
use std::time::Duration;

const MINUTE: Duration = Duration::from_mins(1);

fn second(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn reply(world: &mut World, pod: &str) -> AddNetworkReply {
    match world.answer(pod) {
        Answer::Add(reply) => reply,
        other => panic!("{pod}: {other:?}"),
    }
}

#[test]
fn a_cordoned_node_asks_ec2_for_nothing_until_it_is_uncordoned() {
    let mut world = World::new("t3.small", DEFAULT);
    world.api = Some(Api::default());
    world.pass(second(5));
    assert_eq!(world.enis(), [(0, 3)]);
    world.api.as_mut().unwrap().node.unschedulable = true;
    world.tell_node();
    for n in 0..3 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.pass(MINUTE);
    assert_eq!(world.enis(), [(0, 3)], "no growth while cordoned");
    world.ask("pod-3");
    world.pass(second(4));
    let reply = reply(&mut world, "pod-3");
    assert!(!reply.success && reply.failure.contains("cordoned"), "{}", reply.failure);
    let notices = &world.api.as_ref().unwrap().notices;
    assert!(notices.iter().any(|notice| notice.action == "cordoned"), "{notices:?}");
    world.api.as_mut().unwrap().node.unschedulable = false;
    world.tell_node();
    assert!(world.add("pod-4"), "{:#?}", world.log);
    for pod in ["pod-0", "pod-1", "pod-2", "pod-4"] {
        world.del(pod);
    }
    world.api.as_mut().unwrap().node.unschedulable = true;
    world.tell_node();
    let before = world.calls("DetachNetworkInterface");
    world.pass(MINUTE * 5);
    assert_eq!(world.calls("DetachNetworkInterface"), before, "no ENI is given back while cordoned");
}

#[test]
fn the_node_object_says_how_many_pods_there_may_be() {
    let mut world = World::new("t3.small", DEFAULT);
    world.api = Some(Api::default());
    world.api.as_mut().unwrap().node.max_pods = Some(3);
    world.tell_node();
    world.pass(second(5));
    for n in 0..3 {
        assert!(world.add(&format!("pod-{n}")));
    }
    world.pass(MINUTE);
    assert_eq!(world.enis(), [(0, 3)], "three pods need three addresses");
    world.api.as_mut().unwrap().node.max_pods = Some(0);
    world.tell_node();
    world.pass(MINUTE);
    assert_eq!(world.enis(), [(0, 3), (1, 3)], "0 is no figure");
}

#[test]
fn pods_bound_to_the_node_are_provided_for_before_they_ask() {
    let mut world = World::new("m5.large", Targets { warm_ip: 1, minimum_ip: 1, ..DEFAULT });
    world.pass(second(5));
    assert_eq!(world.enis(), [(0, 1)]);
    world.happen(Event::PodsSeen(20));
    world.pass(second(5));
    let held: usize = world.enis().iter().map(|(_, addresses)| addresses).sum();
    assert_eq!(held, 21, "20 pods and one warm address at once: {:?}", world.enis());
    assert_eq!(world.calls("CreateNetworkInterface"), 2, "two more ENIs, with what they carry");
    for n in 0..20 {
        world.ask(&format!("pod-{n}"));
    }
    world.pass(second(1));
    for n in 0..20 {
        assert!(world.wired(&format!("pod-{n}")));
    }
}

fn custom(world: &mut World) {
    world.configure = |config| {
        let name = "k8s.amazonaws.com/eniConfig".to_owned();
        config.custom_networking = Some((name.clone(), name));
    };
}

#[test]
fn custom_networking_takes_subnet_and_groups_from_the_eniconfig() {
    let mut world = World::asleep("t3.small", DEFAULT);
    custom(&mut world);
    let subnet = world.vpc.add_subnet("eu-west-1a", "10.20.8.0/24".parse().unwrap(), None, &[]);
    let group = world.vpc.add_group();
    let mut api = Api::default();
    let config = EniConfig { subnet: subnet.clone(), groups: vec![group.clone()] };
    api.eni_configs.insert("eu-west-1a".into(), config);
    world.api = Some(api);
    world.start();
    world.pass(second(10));
    assert!(!world.ready, "without the Node object the ENIConfig is not known");
    assert_eq!(world.enis(), [(0, 0)], "never by the default ENIConfig");
    let api = world.api.as_mut().unwrap();
    api.node.labels.insert("k8s.amazonaws.com/eniConfig".into(), "nowhere".into());
    world.tell_node();
    world.pass(second(10));
    assert!(!world.ready, "a node with a wrong ENIConfig is not ready");
    let api = world.api.as_mut().unwrap();
    assert!(api.notices.iter().any(|notice| notice.note.contains("nowhere")), "{:?}", api.notices);
    api.node.annotations.insert("k8s.amazonaws.com/eniConfig".into(), "eu-west-1a".into());
    world.tell_node();
    world.pass(MINUTE);
    assert!(world.ready);
    assert_eq!(world.enis(), [(0, 0), (1, 3)], "the primary ENI serves no pods");
    let new = world.vpc.interfaces().find(|interface| interface.subnet == subnet).unwrap();
    assert_eq!(new.groups, [group]);
    for n in 0..6 {
        assert!(world.add(&format!("pod-{n}")), "{:#?}", world.log);
    }
    assert_eq!(world.enis(), [(0, 0), (1, 3), (2, 3)]);
    assert_eq!(world.calls("DescribeSubnets"), 1, "once for the tags that exclude; the ENIConfig names the subnet");
    // The API server goes away: what was read last serves on.
    world.api = None;
    world.crash();
    world.start();
    world.pass(second(10));
    assert!(world.ready);
    world.del("pod-0");
    world.pass(MINUTE);
    assert!(world.add("pod-7"));
    world.settle();
    world.check_at_rest();
}

#[test]
fn another_eniconfig_ends_the_pause_after_failures_with_the_former() {
    let mut world = World::asleep("t3.small", DEFAULT);
    custom(&mut world);
    let subnet = world.vpc.add_subnet("eu-west-1a", "10.20.8.0/24".parse().unwrap(), None, &[]);
    let mut api = Api::default();
    api.eni_configs.insert("right".into(), EniConfig { subnet, groups: Vec::new() });
    api.node.labels.insert("k8s.amazonaws.com/eniConfig".into(), "wrong".into());
    world.api = Some(api);
    world.start();
    world.tell_node();
    world.pass(MINUTE * 10);
    assert!(!world.ready);
    world.api.as_mut().unwrap().node.labels.insert("k8s.amazonaws.com/eniConfig".into(), "right".into());
    world.tell_node();
    world.pass(second(10));
    assert!(world.ready);
    assert_eq!(world.enis(), [(0, 0), (1, 3)], "what has come serves, so that no further ENI is made");
}

const BRANCH: &str = r#"[{"eniId":"eni-b","ifAddress":"02:aa:bb:cc:dd:ee","privateIp":"10.20.9.7","vlanId":3,"subnetCidr":"10.20.8.0/22"}]"#;

fn branch_pod(uid: &str, annotation: Option<&str>) -> Pod {
    let annotations: Map<_, _> =
        annotation.map(|text| ("vpc.amazonaws.com/pod-eni".to_owned(), text.to_owned())).into_iter().collect();
    Pod { uid: uid.into(), annotations, wants_branch: true }
}

fn attach_trunk(world: &mut World) -> EniId {
    let identity = world.vpc.identity(&world.instance).unwrap();
    let tags = [("node.k8s.amazonaws.com/instance_id".to_owned(), world.instance.0.clone())].into_iter().collect();
    let now = world.now();
    let eni = world.vpc.add_interface(now, &identity.subnet, "aws-k8s-trunk-eni", &tags).unwrap();
    world.vpc.meddle(now, &eni, |eni| eni.interface_type = "trunk".into());
    let attach = Call::Attach { eni: eni.clone(), instance: world.instance.clone(), device: 1, card: 0 };
    world.vpc.execute(now, &attach).result.unwrap();
    eni
}

fn with_trunk() -> World {
    let mut world = World::asleep("m5.large", DEFAULT);
    world.configure = |config| {
        config.pod_eni = true;
        config.trunk_capable = true;
    };
    world.api = Some(Api::default());
    world.start();
    world.pass(second(10));
    let features: Vec<_> = world.api.as_ref().unwrap().features.iter().map(|f| f.name.clone()).collect();
    assert_eq!(features, ["SecurityGroupsForPods"]);
    attach_trunk(&mut world);
    world.pass(second(10));
    world
}

#[test]
fn a_branch_pod_gets_what_its_annotation_says() {
    let mut world = with_trunk();
    let api = world.api.as_mut().unwrap();
    api.pods.insert("branch".into(), branch_pod("u1", Some(BRANCH)));
    api.pods.insert("plain".into(), Pod::default());
    api.pods.insert("late".into(), branch_pod("u2", None));
    api.pods.insert("bad".into(), branch_pod("u3", Some("[]")));
    for pod in ["branch", "plain", "late", "bad", "unknown"] {
        world.ask(pod);
    }
    world.pass(second(10));
    let branch = reply(&mut world, "branch");
    assert!(branch.success);
    assert_eq!((branch.pod_vlan_id, branch.parent_if_index), (3, i32::try_from(TRUNK_LINK).unwrap()));
    assert_eq!((branch.pod_eni_mac.as_str(), branch.pod_eni_subnet_gw.as_str()), ("02:aa:bb:cc:dd:ee", "10.20.8.1"));
    let given = &branch.allocations[0];
    assert_eq!((given.ipv4.as_str(), given.device_number, given.route_table_id), ("10.20.9.7", -1, 0));
    assert!(world.wired("plain"), "an ordinary pod takes its address from the pool");
    for (pod, why) in [("late", "annotation is missing"), ("bad", "empty"), ("unknown", "not found")] {
        let reply = reply(&mut world, pod);
        assert!(!reply.success && reply.failure.contains(why), "{pod}: {}", reply.failure);
    }
    assert_eq!(world.core.as_ref().unwrap().pool().allocations().count(), 1, "a branch ENI is none of the pool's");
}

#[test]
fn the_host_of_branch_pods_is_kept_right() {
    let mut world = with_trunk();
    let intent = |world: &World| world.core.as_ref().unwrap().intent(Duration::ZERO).unwrap().branches;
    assert_eq!(intent(&world), []);
    let pod = |name: &str| PodName { namespace: "default".into(), name: name.into() };
    let bad = BRANCH.replace(":3,", ":154,");
    let told = vec![(pod("sample-pod"), BRANCH.to_owned()), (pod("bad"), bad), (pod("worse"), "[]".to_owned())];
    world.happen(Event::BranchesSeen(told));
    let branches = intent(&world);
    let [branch] = branches.as_slice() else { panic!("{branches:?}") };
    assert_eq!((branch.name.as_str(), branch.veth.as_str()), ("default/sample-pod", "cc21c2d7785"));
    assert_eq!((branch.address.to_string().as_str(), branch.eni.table), ("10.20.9.7", 103));
    assert_eq!((branch.eni.gateway.to_string().as_str(), branch.eni.vlan), ("10.20.8.1", 3));
    for why in ["no route table for VLAN 154", "PodENIData is empty"] {
        assert!(world.log.iter().any(|line| line.contains(why)), "{why}: {:#?}", world.log);
    }
    // The kernel is looked at again, not only with the next round.
    world.pass(second(1));
    assert_eq!(world.branches, 1);
    world.happen(Event::BranchesSeen(Vec::new()));
    assert_eq!(intent(&world), []);
}

#[test]
fn deleting_branch_pods() {
    let mut world = with_trunk();
    let api = world.api.as_mut().unwrap();
    api.pods.insert("branch".into(), branch_pod("u1", Some(BRANCH)));
    api.pods.insert("other".into(), branch_pod("u2", Some(BRANCH)));
    api.pods.insert("bad".into(), branch_pod("u3", Some("x")));
    api.pods.insert("empty".into(), branch_pod("u4", Some("[]")));
    api.pods.insert("plain".into(), Pod { uid: "u5".into(), ..Pod::default() });
    for (call, pod) in (9_000_000..).zip(["branch", "other", "bad", "empty", "plain", "gone"]) {
        let uid = match pod {
            "branch" => "u1",
            "bad" => "u3",
            "empty" => "u4",
            "plain" => "u5",
            _ => "u0",
        };
        let key = key(pod);
        let request = DelNetworkRequest {
            pod_name: pod.into(),
            pod_namespace: "default".into(),
            network_name: key.network,
            container_id: key.container,
            if_name: key.ifname,
            pod_uid: uid.into(),
            ..DelNetworkRequest::default()
        };
        world.asked.insert(call, pod.into());
        world.happen(Event::Del(call, request));
    }
    world.pass(second(1));
    let Answer::Del(branch) = world.answer("branch") else { panic!("branch") };
    assert!(branch.success && branch.pod_vlan_id == 3 && branch.allocations[0].ipv4 == "10.20.9.7");
    for (pod, why) in
        [("other", "UID mismatch"), ("bad", "expected value"), ("empty", "is empty"), ("plain", UNKNOWN_POD)]
    {
        let Answer::Error(text) = world.answer(pod) else { panic!("{pod}") };
        assert!(text.contains(why), "{pod}: {text}");
    }
    let Answer::Del(gone) = world.answer("gone") else { panic!("gone") };
    assert!(gone.success && gone.allocations.is_empty(), "a pod that is gone has nothing left");
}

#[test]
fn a_slot_is_kept_for_the_trunk_until_it_is_there() {
    let mut world = World::asleep("t3.small", DEFAULT); // three ENIs of three addresses
    world.configure = |config| {
        config.pod_eni = true;
        config.trunk_capable = true;
    };
    world.api = Some(Api::default());
    for n in 0..9 {
        world.api.as_mut().unwrap().pods.insert(format!("pod-{n}"), Pod::default());
    }
    world.start();
    world.pass(second(5));
    for n in 0..6 {
        assert!(world.add(&format!("pod-{n}")), "{:#?}", world.log);
    }
    world.pass(MINUTE);
    assert_eq!(world.enis(), [(0, 3), (1, 3)], "the third slot is the trunk's");
}

#[test]
fn annotations_follow_the_address() {
    let mut world = World::asleep("t3.small", DEFAULT);
    world.configure = |config| config.annotate_pod_ip = true;
    world.api = Some(Api::default());
    world.api.as_mut().unwrap().pods.insert("pod".into(), Pod::default());
    world.start();
    world.pass(second(5));
    assert!(world.add("pod"));
    let address = world.pods["pod"].to_string();
    let annotation =
        |world: &World| world.api.as_ref().unwrap().pods["pod"].annotations["vpc.amazonaws.com/pod-ips"].clone();
    assert_eq!(annotation(&world), address);
    // A pod that cannot be annotated gets no address, and takes none with it.
    world.ask("missing");
    world.pass(second(5));
    let refused = reply(&mut world, "missing");
    assert!(!refused.success && refused.failure.contains("annotate"), "{}", refused.failure);
    assert_eq!(world.core.as_ref().unwrap().pool().allocations().count(), 1);
    let del = DelNetworkRequest {
        pod_name: "pod".into(),
        pod_namespace: "default".into(),
        network_name: key("pod").network,
        container_id: key("pod").container,
        if_name: key("pod").ifname,
        ..DelNetworkRequest::default()
    };
    world.asked.insert(9_000_000, "pod".into());
    world.happen(Event::Del(9_000_000, del));
    world.pass(second(1));
    assert!(matches!(world.answer("pod"), Answer::Del(reply) if reply.success));
    assert_eq!(annotation(&world), "", "emptied, not removed");
}

#[test]
fn a_missing_permission_is_told() {
    let mut world = World::asleep("t3.small", DEFAULT);
    world.api = Some(Api::default());
    world.vpc.knobs.refuse_next("AssignPrivateIpAddresses", "UnauthorizedOperation", 403);
    world.start();
    world.pass(MINUTE);
    let notices = &world.api.as_ref().unwrap().notices;
    let notice = notices.iter().find(|notice| notice.reason == "MissingIAMPermissions").expect("an event");
    assert_eq!(notice.action, "ec2:AssignPrivateIpAddresses");
}

#[test]
fn a_repair_is_told() {
    let mut world = World::asleep("t3.small", DEFAULT);
    world.api = Some(Api::default());
    world.start();
    world.pass(MINUTE);
    world.happen(Event::Repaired("from-rule", "add rule 1536 from 10.0.1.5 lookup 2".into()));
    world.pass(second(1));
    let notices = &world.api.as_ref().unwrap().notices;
    let notice = notices.iter().find(|notice| notice.reason == "HostNetworkRepaired").expect("an event");
    assert_eq!((notice.regarding, notice.action.as_str()), (Regarding::Node, "from-rule"));
    assert_eq!(notice.note, "add rule 1536 from 10.0.1.5 lookup 2");
}
