//! Pods in real namespaces through the real plugin: results, packets, failures that leave nothing, DEL with and without the
//! daemon, CHECK, STATUS, GC.

#[path = "support/node.rs"]
mod node;
mod support;

use enibox::model::ids::PodKey;
use enibox::model::naming::DAEMON_STOPPED;
use enibox::model::net::{Address, Family};
use enibox::model::spool::{self, Record};
use enibox::model::wire::{
    AddNetworkReply, DelNetworkReply, DelNetworkRequest, DeleteNpRequest, EnforceNpRequest, IpAllocation,
};
use enibox::netlink::{Socket, addr, link, route, rule};
use enibox::rpc::grpc::{Code, Status};
use node::{AWS_NODE, Answers, Call, Node, Seen, Served, given, on_a_node, taken};
use serde_json::{Value, json};
use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;
use support::Netns;

const POD_IP: &str = "10.0.12.34";
const NODE_IP: &str = "10.0.12.1";
const TIMEOUT: Duration = Duration::from_secs(5);

fn allocation(address: &str, device: i32, table: i32) -> IpAllocation {
    IpAllocation { ipv4: address.into(), ipv6: String::new(), device_number: device, route_table_id: table }
}

/// A daemon that gives and takes these.
fn giving(allocations: &[IpAllocation]) -> Answers {
    Answers { add: Ok(given(allocations)), del: Ok(taken(allocations)), ..Answers::default() }
}

/// One address of the ENI at device 2.
fn secondary() -> Answers {
    giving(&[allocation(POD_IP, 2, 3)])
}

/// Gives the node its address.
fn address_the_node() {
    let mut socket = Socket::route().unwrap();
    let lo = link::by_name(&mut socket, "lo").unwrap().unwrap().index;
    let address =
        Address { dev: lo, addr: format!("{NODE_IP}/32").parse().unwrap(), no_prefix_route: false, no_dad: false };
    socket.run(&[link::set_up(lo), addr::add(&address)]).unwrap();
}

/// Links, rules and IPv4 routes of the calling thread's namespace, a line each.
fn state() -> Vec<String> {
    let mut socket = Socket::route().unwrap();
    let mut lines: Vec<String> = link::list(&mut socket).unwrap().into_iter().map(|link| link.name).collect();
    for family in [Family::V4, Family::V6] {
        lines.extend(rule::list(&mut socket, family).unwrap().iter().map(ToString::to_string));
    }
    for family in [Family::V4, Family::V6] {
        lines.extend(route::list(&mut socket, family, None).unwrap().iter().map(ToString::to_string));
    }
    // Each link's own, which goes with it.
    lines.retain(|line| !line.starts_with("fe80::/64"));
    lines.sort();
    lines
}

/// After a DEL: as `before`, but for the pod's veth, which goes with the pod's namespace; `on_a_node` sees to that.
fn assert_cleared(before: &[String]) {
    let mut after = state();
    after.retain(|line| before.contains(line) || !(line.len() == "eni".len() + 11 && line.starts_with("eni")));
    assert_eq!(after, before);
}

fn has(line: &str) -> bool {
    state().iter().any(|found| found == line)
}

fn has_link(name: &str) -> bool {
    link::by_name(&mut Socket::route().unwrap(), name).unwrap().is_some()
}

/// The daemon's checkpoint with these entries: container, pod, address.
fn write_checkpoint(entries: &[(&str, &str, &str)]) {
    let allocations: Vec<_> = entries
        .iter()
        .map(|(container, pod, address)| {
            json!({"networkName": "aws-cni", "containerID": container, "ifName": "eth0", "ipv4": address,
                   "allocationTimestamp": 1, "metadata": {"k8sPodNamespace": "default", "k8sPodName": pod}})
        })
        .collect();
    fs::create_dir_all(AWS_NODE).unwrap();
    let document = json!({"version": "vpc-cni-ipam/1", "allocations": allocations});
    fs::write(Path::new(AWS_NODE).join("ipam.json"), document.to_string()).unwrap();
}

fn records() -> Vec<Record> {
    let Ok(entries) = fs::read_dir(spool::DIRECTORY) else { return Vec::new() };
    entries.map(|entry| Record::parse(&fs::read(entry.unwrap().path()).unwrap()).unwrap()).collect()
}

/// The result of `spec/plugin.md` 12 in the shape of a version.
fn wanted_result(version: &str, netns: &Netns) -> Value {
    let interfaces = json!([
        {"name": "enicc21c2d7785"},
        {"name": "eth0", "mac": "3", "sandbox": netns.path()},
        {"name": "dummycc21c2d7785", "mac": "0", "sandbox": "2"},
    ]);
    match version {
        "0.1.0" | "0.2.0" => json!({"cniVersion": version, "ip4": {"ip": "10.0.12.34/32"}, "dns": {}}),
        "0.3.0" | "0.3.1" | "0.4.0" => json!({"cniVersion": version, "interfaces": interfaces, "dns": {},
            "ips": [{"version": "4", "interface": 1, "address": "10.0.12.34/32"}]}),
        _ => json!({"cniVersion": version, "interfaces": interfaces,
            "ips": [{"interface": 1, "address": "10.0.12.34/32"}]}),
    }
}

#[test]
fn a_life_in_every_version() {
    on_a_node(|node| {
        address_the_node();
        let before = state();
        for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let daemon = Served::daemon(secondary());
            let netns = Netns::new("pod");
            let path = netns.path();
            let call = |command| node.call(command, version).env("CNI_NETNS", &path);
            let result = call("ADD").run().result();
            assert_eq!(result, wanted_result(version, &netns), "{version}");
            assert!(has("512: from all to 10.0.12.34 lookup main"), "{:?}", state());
            assert!(has("1536: from 10.0.12.34 lookup 3"), "{:?}", state());
            let keeps_result = !matches!(version, "0.1.0" | "0.2.0" | "0.3.0" | "0.3.1");
            if keeps_result {
                call("CHECK").config("prevResult", result.clone()).run().silent();
                call("DEL").config("prevResult", result).run().silent();
            } else {
                call("DEL").run().silent();
            }
            assert_cleared(&before);
            daemon.answer(Answers::default());
            call("DEL").run().silent();
            drop(netns);
            call("DEL").run().silent();
            assert_cleared(&before);
        }
        assert_eq!(records(), []);
    });
}

#[test]
fn the_daemon_is_told_everything_and_given_time() {
    on_a_node(|node| {
        let daemon = Served::daemon(secondary());
        let netns = Netns::new("pod");
        let annotations =
            json!({"io.kubernetes.cri.pod-annotations": {"k8s.amazonaws.com/nicConfig": "multi-nic-attachment"}});
        let call = |command| node.call(command, "1.0.0").env("CNI_NETNS", netns.path());
        call("ADD").config("runtimeConfig", annotations).run().result();
        let left = daemon.last_deadline().unwrap();
        assert!(left > Duration::from_secs(50) && left <= Duration::from_mins(1), "{left:?}");
        call("DEL").run().silent();
        let left = daemon.last_deadline().unwrap();
        assert!(left > Duration::from_secs(20) && left <= Duration::from_secs(30), "{left:?}");
        let seen = daemon.seen();
        let [Seen::Add(add), Seen::Del(del)] = seen.as_slice() else { panic!("{seen:?}") };
        assert_eq!((add.pod_name.as_str(), add.pod_namespace.as_str()), ("sample-pod", "default"));
        assert_eq!((add.infra_container_id.as_str(), add.container_id.as_str()), ("cni-5a1f", "cni-5a1f"));
        assert_eq!((add.if_name.as_str(), add.network_name.as_str()), ("eth0", "aws-cni"));
        assert_eq!(
            (add.netns.as_str(), add.client_version.as_str()),
            (netns.path().to_str().unwrap(), enibox::VERSION)
        );
        assert!(add.requires_multi_nic);
        let wanted = DelNetworkRequest {
            pod_name: "sample-pod".into(),
            pod_namespace: "default".into(),
            infra_container_id: "cni-5a1f".into(),
            reason: "PodDeleted".into(),
            if_name: "eth0".into(),
            network_name: "aws-cni".into(),
            container_id: "cni-5a1f".into(),
            client_version: enibox::VERSION.into(),
            pod_uid: "7c0e".into(),
        };
        assert_eq!(*del, wanted);
    });
}

#[test]
fn packets_go_both_ways() {
    on_a_node(|node| {
        address_the_node();
        for (device, table) in [(0, 254), (2, 3)] {
            let _daemon = Served::daemon(giving(&[allocation(POD_IP, device, table)]));
            let netns = Netns::new("pod");
            let call = |command| node.call(command, "1.0.0").env("CNI_NETNS", netns.path()).config("mtu", 1400);
            call("ADD").run().result();
            let pod = netns.run(|| UdpSocket::bind((POD_IP, 7000)).unwrap());
            let host = UdpSocket::bind((NODE_IP, 7000)).unwrap();
            let mut buffer = [0; 2000];
            for (from, to, name) in [(&host, &pod, POD_IP), (&pod, &host, NODE_IP)] {
                to.set_read_timeout(Some(TIMEOUT)).unwrap();
                from.send_to(&[7; 1200], (name, 7000)).unwrap();
                let (length, _) = to.recv_from(&mut buffer).unwrap_or_else(|e| panic!("to {name}: {e}"));
                assert_eq!(length, 1200);
            }
            let inside = link::by_name(&mut netns.route(), "eth0").unwrap().unwrap();
            assert_eq!(inside.mtu, 1400);
            call("DEL").run().silent();
        }
    });
}

#[test]
fn several_interfaces_make_one_result() {
    on_a_node(|node| {
        let _daemon = Served::daemon(giving(&[allocation(POD_IP, 0, 254), allocation("10.0.77.5", 1, 10101)]));
        let netns = Netns::new("pod");
        let call = |command| node.call(command, "1.0.0").env("CNI_NETNS", netns.path());
        let before = state();
        let result = call("ADD").run().result();
        let wanted = json!({"cniVersion": "1.0.0", "interfaces": [
            {"name": "enicc21c2d7785"},
            {"name": "eth0", "mac": "254", "sandbox": netns.path()},
            {"name": "enia0b7655f3c9"},
            {"name": "mNicIf1", "mac": "10101", "sandbox": netns.path()},
            {"name": "dummycc21c2d7785", "mac": "0", "sandbox": "0"},
        ], "ips": [{"interface": 1, "address": "10.0.12.34/32"}, {"interface": 3, "address": "10.0.77.5/32"}]});
        assert_eq!(result, wanted);
        call("CHECK").config("prevResult", result.clone()).run().silent();
        call("DEL").config("prevResult", result).run().silent();
        assert_cleared(&before);
    });
}

#[test]
fn an_ipv6_pod_has_the_result_of_its_family() {
    on_a_node(|node| {
        let address = "2600:1f14:aa:bb00:1c2d::7";
        let given = IpAllocation { ipv4: String::new(), ipv6: address.into(), device_number: 0, route_table_id: 254 };
        let _daemon = Served::daemon(giving(&[given]));
        let netns = Netns::new("pod");
        let call = |command| node.call(command, "0.4.0").env("CNI_NETNS", netns.path());
        let before = state();
        let result = call("ADD").run().result();
        let wanted = json!({"cniVersion": "0.4.0", "interfaces": [
            {"name": "enicc21c2d7785"},
            {"name": "eth0", "mac": "254", "sandbox": netns.path()},
            {"name": "dummycc21c2d7785", "mac": "0", "sandbox": "0"},
        ], "ips": [{"version": "6", "interface": 1, "address": format!("{address}/128")}], "dns": {}});
        assert_eq!(result, wanted);
        assert!(has(&format!("512: from all to {address} lookup main")), "{:?}", state());
        call("CHECK").config("prevResult", result.clone()).run().silent();
        call("DEL").config("prevResult", result).run().silent();
        assert_cleared(&before);
    });
}

/// Without duplicate detection: its two seconds would be those of every pod. The bound is for a loaded machine.
#[test]
fn an_ipv6_pod_waits_for_no_duplicate_detection() {
    on_a_node(|node| {
        let allocations = [("2001:db8:0:1::7", 254), ("2001:db8:0:2::8", 10101)].map(|(address, table)| IpAllocation {
            ipv4: String::new(),
            ipv6: address.into(),
            device_number: 0,
            route_table_id: table,
        });
        let _daemon = Served::daemon(giving(&allocations));
        let netns = Netns::new("pod");
        let call = |command| node.call(command, "1.0.0").env("CNI_NETNS", netns.path());
        let before = state();
        let mut fastest = Duration::MAX;
        for _ in 0..3 {
            let answer = call("ADD").run();
            let result = answer.result();
            fastest = fastest.min(answer.took);
            let ips = json!([{"interface": 1, "address": "2001:db8:0:1::7/128"},
                {"interface": 3, "address": "2001:db8:0:2::8/128"}]);
            assert_eq!(result["ips"], ips);
            let shown = |words: &[&str], wanted: &[&str]| {
                let text = netns.run(|| support::tool("ip", words)).unwrap_or_else(|| wanted.join(" "));
                assert!(wanted.iter().all(|line| text.contains(line)), "{wanted:?} is not in\n{text}");
            };
            let routes = ["default via fe80::1 dev eth0", "default via fe80::2 dev mNicIf1 table 1"];
            shown(&["-6", "route", "show", "table", "all"], &routes);
            shown(&["-6", "rule"], &["1:\tfrom 2001:db8:0:2::8 lookup 1"]);
            if let Some(addresses) = netns.run(|| support::tool("ip", &["-6", "-o", "address"])) {
                for line in addresses.lines().filter(|line| line.contains("2001:db8")) {
                    assert!(line.contains("/128") && line.contains("nodad") && !line.contains("tentative"), "{line}");
                }
            }
            call("CHECK").config("prevResult", result.clone()).run().silent();
            call("DEL").config("prevResult", result).run().silent();
            assert_cleared(&before);
        }
        eprintln!("the fastest ADD of two IPv6 interfaces took {fastest:?}");
        assert!(fastest < Duration::from_secs(1), "{fastest:?}: somebody waits for duplicate detection");
    });
}

#[test]
fn an_earlier_result_is_passed_on() {
    on_a_node(|node| {
        let _daemon = Served::daemon(secondary());
        let netns = Netns::new("pod");
        let earlier = json!({"cniVersion": "1.0.0", "interfaces": [{"name": "tun0"}],
            "ips": [{"interface": 0, "address": "192.0.2.1/24"}], "dns": {"search": ["example.org"]}});
        let call = node.call("ADD", "1.0.0").env("CNI_NETNS", netns.path()).config("prevResult", earlier);
        let result = call.run().result();
        assert_eq!(result["interfaces"][3], json!({"name": "tun0"}));
        assert_eq!(result["ips"][1], json!({"interface": 3, "address": "192.0.2.1/24"}));
        assert_eq!(result["dns"], json!({"search": ["example.org"]}));
    });
}

#[test]
fn adding_twice_and_taking_over_a_name_works() {
    on_a_node(|node| {
        let daemon = Served::daemon(secondary());
        let (one, other) = (Netns::new("one"), Netns::new("other"));
        let before = state();
        let add = |netns: &Netns, id: &str| {
            node.call("ADD", "1.0.0").env("CNI_NETNS", netns.path()).env("CNI_CONTAINERID", id)
        };
        let first = add(&one, "a").run().result();
        assert_eq!(add(&one, "a").run().result(), first);
        assert_eq!(state().iter().filter(|line| line.contains("10.0.12.34")).count(), 3);

        // A pod of the same name in a new sandbox, while the old one still is there; then the old one's DEL.
        daemon.answer(giving(&[allocation("10.0.12.35", 2, 3)]));
        let second = add(&other, "b").run().result();
        daemon.answer(secondary());
        let del = |netns: &Netns, id: &str, previous: Value| {
            let call = node.call("DEL", "1.0.0").env("CNI_NETNS", netns.path()).env("CNI_CONTAINERID", id);
            call.config("prevResult", previous).run().silent();
        };
        del(&one, "a", first);
        assert!(has_link("enicc21c2d7785"), "the new pod's veth stays");
        assert!(has("512: from all to 10.0.12.35 lookup main") && !has("512: from all to 10.0.12.34 lookup main"));
        daemon.answer(giving(&[allocation("10.0.12.35", 2, 3)]));
        del(&other, "b", second);
        assert_cleared(&before);
    });
}

/// An ADD that must fail, leave nothing and give the address back.
fn fails_cleanly(node: &Node, daemon: &Served, netns: &Netns, code: u64, text: &str) {
    let (host, pod) = (state(), netns.run(state));
    let before = daemon.seen().len();
    let (got, message) = node.call("ADD", "1.0.0").env("CNI_NETNS", netns.path()).run().failure();
    assert_eq!(got, code, "{message}");
    assert!(message.contains(text), "{message}");
    assert_eq!(state(), host, "{text}");
    assert_eq!(netns.run(state), pod, "{text}");
    match &daemon.seen()[before..] {
        [Seen::Add(_), Seen::Del(del)] => {
            assert_eq!((del.reason.as_str(), del.pod_uid.as_str()), ("SetupNSFailed", ""));
            assert_eq!(del.container_id, "cni-5a1f");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_failed_add_leaves_nothing() {
    on_a_node(|node| {
        let daemon = Served::daemon(secondary());
        let netns = Netns::new("pod");
        for (allocations, text) in [
            (vec![], "no address"),
            (vec![IpAllocation::default()], "no address"),
            (vec![allocation("10.0.0.256", 0, 254)], "10.0.0.256"),
            (vec![allocation(POD_IP, 0, 254), allocation("nonsense", 1, 10101)], "nonsense"),
        ] {
            daemon.answer(giving(&allocations));
            fails_cleanly(node, &daemon, &netns, 102, text);
        }
        daemon.answer(Answers {
            add: Ok(AddNetworkReply { pod_vlan_id: 7, ..given(&[allocation(POD_IP, -1, 0)]) }),
            ..Answers::default()
        });
        fails_cleanly(node, &daemon, &netns, 102, "MAC of the branch ENI");
        // The agent is wanted, and is not there, or refuses.
        let with_policy = Answers {
            add: Ok(AddNetworkReply { network_policy_mode: "strict".into(), ..given(&[allocation(POD_IP, 2, 3)]) }),
            ..secondary()
        };
        daemon.answer(with_policy.clone());
        fails_cleanly(node, &daemon, &netns, 101, "add cmd: failed to setup network policy");
        let _agent = Served::agent(Answers { policy: false, ..Answers::default() });
        fails_cleanly(node, &daemon, &netns, 101, "add cmd: failed to setup network policy");
        // The name is taken by somebody else's interface.
        daemon.answer(secondary());
        let end = |name| link::End { name, mac: None, netns: None };
        support::must(
            &mut netns.route(),
            &[link::create_veth(&link::Veth { end: end("eth0"), peer: end("peer"), mtu: 1500, up: false })],
        );
        fails_cleanly(node, &daemon, &netns, 100, "add command: failed to setup network: SetupPodNetwork: ");
        // A path that is no namespace.
        let file = node.path("plain-file");
        fs::write(&file, "").unwrap();
        let before = daemon.seen();
        let answer = node.call("ADD", "1.0.0").env("CNI_NETNS", &file).run();
        assert_eq!(answer.failure().0, 8);
        assert_eq!(daemon.seen(), before);
    });
}

#[test]
fn what_the_daemon_may_say_instead_of_an_address() {
    on_a_node(|node| {
        let daemon = Served::daemon(Answers::default());
        let netns = Netns::new("pod");
        let before = state();
        let check = |answers: Answers, code: u64, text: &str| {
            daemon.answer(answers);
            let failure = node.call("ADD", "1.0.0").env("CNI_NETNS", netns.path()).run().failure();
            assert!(failure.0 == code && failure.1.starts_with(text), "{failure:?}");
        };
        let refused = |code| Answers { add: Err(Status::new(code, "because")), ..Answers::default() };
        let rpc = "add cmd: Error received from AddNetwork gRPC call: because";
        check(refused(Code::UNKNOWN), 11, rpc);
        check(refused(Code::UNAVAILABLE), 11, rpc);
        check(refused(Code::FAILED_PRECONDITION), 11, rpc); // a daemon of another version that insists on its own
        check(refused(Code::UNIMPLEMENTED), 102, rpc);
        let none = Answers { add: Ok(AddNetworkReply::default()), ..Answers::default() };
        check(none, 11, "add cmd: failed to assign an IP address to container");
        // Before v1.20 the second field was the address as text.
        let old = Answers { add_raw: Some([&[8, 1, 18, 10][..], POD_IP.as_bytes()].concat()), ..Answers::default() };
        daemon.answer(old);
        let (code, text) = node.call("ADD", "1.0.0").env("CNI_NETNS", netns.path()).run().failure();
        assert!(code == 102, "{code} {text}");
        check(Answers { add_raw: Some(vec![0xff; 40]), ..Answers::default() }, 102, "add cmd: ");
        // A slow one is waited for.
        daemon.answer(Answers { delay: Duration::from_millis(700), ..secondary() });
        node.call("ADD", "1.0.0").env("CNI_NETNS", netns.path()).run().result();
        node.call("DEL", "1.0.0").env("CNI_NETNS", netns.path()).run().silent();
        assert_cleared(&before);
        daemon.answer(Answers { del: Ok(DelNetworkReply::default()), ..Answers::default() });
        let failure = node.call("DEL", "1.0.0").run().failure();
        assert_eq!(failure, (11, "del cmd: failed to process delete request".into()));
    });
}

#[test]
fn the_policy_agent_is_told_of_pods() {
    on_a_node(|node| {
        let reply = |mode: &str| Answers {
            add: Ok(AddNetworkReply { network_policy_mode: mode.into(), ..given(&[allocation(POD_IP, 2, 3)]) }),
            del: Ok(DelNetworkReply { network_policy_mode: mode.into(), ..taken(&[allocation(POD_IP, 2, 3)]) }),
            ..Answers::default()
        };
        let daemon = Served::daemon(reply("none"));
        let netns = Netns::new("pod");
        let call = |command| node.call(command, "1.0.0").env("CNI_NETNS", netns.path());
        call("ADD").run().result(); // no agent, and none needed
        call("DEL").run().silent();
        let agent = Served::agent(Answers::default());
        for mode in ["strict", "standard", "none"] {
            daemon.answer(reply(mode));
            let before = agent.seen().len();
            call("ADD").run().result();
            let left = agent.last_deadline().unwrap();
            assert!(left <= Duration::from_secs(10), "{left:?}");
            call("DEL").run().silent();
            let (pod_name, pod_namespace) = ("sample-pod".to_owned(), "default".to_owned());
            let enforce = EnforceNpRequest {
                pod_name: pod_name.clone(),
                pod_namespace: pod_namespace.clone(),
                network_policy_mode: mode.into(),
                interface_count: 1,
            };
            let delete = DeleteNpRequest { pod_name, pod_namespace };
            assert_eq!(agent.seen()[before..], [Seen::Enforce(enforce), Seen::Delete(delete)]);
        }
        // DEL does not depend on it.
        drop(agent);
        daemon.answer(reply("none"));
        call("ADD").run().result();
        daemon.answer(reply("strict"));
        call("DEL").run().silent();
    });
}

#[test]
fn a_del_without_the_daemon_clears_the_host_and_leaves_a_record() {
    on_a_node(|node| {
        let netns = Netns::new("pod");
        let before = state();
        let call = |command| node.call(command, "1.0.0").env("CNI_NETNS", netns.path());
        let add = || {
            let _daemon = Served::daemon(secondary());
            call("ADD").run().result()
        };
        // With the cached result.
        let result = add();
        assert_ne!(state(), before);
        call("DEL").config("prevResult", result).run().silent();
        assert_cleared(&before);
        let left = records();
        assert_eq!(left.len(), 1);
        let key = PodKey { network: "aws-cni".into(), container: "cni-5a1f".into(), ifname: "eth0".into() };
        assert_eq!((&left[0].key, left[0].uid.as_str()), (&key, "7c0e"));
        assert_eq!(left[0].pod.to_string(), "default/sample-pod");
        // The same key again: the record must not take the new address away.
        add();
        assert_eq!(records(), []);
        // With the checkpoint only, and without the pod's name.
        write_checkpoint(&[("cni-5a1f", "sample-pod", POD_IP), ("another", "other-pod", "10.0.12.99")]);
        call("DEL").without("CNI_ARGS").run().silent();
        assert_cleared(&before);
        assert_eq!(records().len(), 1);
        // With nothing at all it still is a success, and repeated it is the same record.
        fs::remove_file(Path::new(AWS_NODE).join("ipam.json")).unwrap();
        call("DEL").run().silent();
        assert_eq!(records().len(), 1);
    });
}

#[test]
fn an_old_result_does_not_hit_the_next_owner_of_the_address() {
    on_a_node(|node| {
        let (old, new) = (Netns::new("old"), Netns::new("new"));
        let daemon = Served::daemon(secondary());
        let call = |command, netns: &Netns, pod| node.call(command, "1.0.0").env("CNI_NETNS", netns.path()).pod(pod);
        let cached = call("ADD", &old, "first").run().result();
        call("DEL", &old, "first").config("prevResult", cached.clone()).run().silent();
        call("ADD", &new, "second").run().result();
        write_checkpoint(&[("container-of-second", "second", POD_IP)]);
        let before = state();
        daemon.answer(Answers::default()); // the daemon knows the first no more
        call("DEL", &old, "first").config("prevResult", cached.clone()).run().silent();
        assert_cleared(&before);
        drop(daemon);
        call("DEL", &old, "first").config("prevResult", cached.clone()).run().silent();
        assert_cleared(&before);
        // Without an owner, what an earlier DEL left behind goes.
        write_checkpoint(&[]);
        let _daemon = Served::daemon(Answers::default());
        call("DEL", &old, "first").config("prevResult", cached).run().silent();
        assert!(!state().iter().any(|line| line.contains(POD_IP)), "{:?}", state());
    });
}

#[test]
fn check_tells_what_is_missing() {
    on_a_node(|node| {
        let _daemon = Served::daemon(secondary());
        let netns = Netns::new("pod");
        let call = |command| node.call(command, "1.0.0").env("CNI_NETNS", netns.path());
        let result = call("ADD").run().result();
        write_checkpoint(&[("cni-5a1f", "sample-pod", POD_IP)]);
        let check = || call("CHECK").config("prevResult", result.clone()).run();
        check().silent();
        let differs = |texts: &[&str]| {
            let answer = check();
            assert_eq!(answer.failure().0, 103);
            let details = answer.json()["details"].as_str().unwrap().to_owned();
            for text in texts {
                assert!(details.contains(text), "{details}");
            }
        };
        let mut socket = Socket::route().unwrap();
        let rules = rule::list(&mut socket, Family::V4).unwrap();
        let to = rules.iter().find(|rule| rule.priority == 512).unwrap();
        socket.run(&[rule::delete(to)]).unwrap();
        differs(&["512: from all to 10.0.12.34 lookup main"]);
        socket.run(&[rule::add(to)]).unwrap();
        check().silent();
        write_checkpoint(&[]);
        differs(&["the daemon has not given 10.0.12.34"]);
        write_checkpoint(&[("cni-5a1f", "sample-pod", POD_IP)]);
        socket.run(&[link::delete_by_name("enicc21c2d7785")]).unwrap();
        differs(&["10.0.12.34 is given out, and no veth leads to it", "eth0"]);
        assert_eq!(call("CHECK").run().failure().0, 7);
    });
}

#[test]
fn status_says_whether_an_add_would_be_served() {
    on_a_node(|node| {
        let status = |node: &Node| node.call("STATUS", "1.1.0").run();
        assert_eq!(status(node).failure(), (50, "status cmd: the daemon does not serve".into()));
        // It waits half a second for an answer, and a busy machine may take longer; runtimes ask again too.
        let served =
            |node: &Node| (0..20).map(|_| status(node)).find(|answer| answer.code == 0).expect("served").silent();
        let daemon = Served::daemon(Answers::default());
        served(node);
        daemon.answer(Answers { health: 2, ..Answers::default() });
        assert_eq!(status(node).failure().0, 50);
        daemon.answer(Answers { delay: Duration::from_secs(3), ..Answers::default() });
        let hung: Vec<_> = (0..3).map(|_| status(node)).collect();
        assert!(hung.iter().all(|answer| answer.failure().0 == 50));
        assert!(hung.iter().any(|answer| answer.took < Duration::from_secs(2)), "{hung:?}");
        let seen = daemon.seen();
        assert!(seen.len() >= 3 && seen.iter().all(|seen| *seen == Seen::Health), "{seen:?}");
        // A daemon that was told to stop comes back soon, and a node that is not ready serves nobody meanwhile.
        drop(daemon);
        fs::write(DAEMON_STOPPED, "").unwrap();
        status(node).silent();
        let long_ago = enibox::clock::system_time() - Duration::from_mins(3);
        fs::File::options().write(true).open(DAEMON_STOPPED).unwrap().set_modified(long_ago).unwrap();
        assert_eq!(status(node).failure().0, 50);
    });
}

fn collected(daemon: &Served) -> Vec<String> {
    let containers = daemon.seen().into_iter().map(|seen| match seen {
        Seen::Del(del) => {
            assert_eq!((del.reason.as_str(), del.network_name.as_str()), ("PodDeleted", "aws-cni"));
            del.container_id
        }
        other => panic!("{other:?}"),
    });
    containers.collect()
}

#[test]
fn gc_takes_only_what_is_dead_and_ours() {
    on_a_node(|node| {
        let gc = |list: Value| node.call("GC", "1.1.0").config("cni.dev/valid-attachments", list);
        gc(json!([])).run().silent(); // no checkpoint, nothing to do
        let living = Netns::new("living");
        {
            let _daemon = Served::daemon(secondary());
            node.call("ADD", "1.1.0").env("CNI_NETNS", living.path()).run().result();
        }
        write_checkpoint(&[
            ("cni-5a1f", "sample-pod", POD_IP),
            ("listed", "listed-pod", "10.0.12.40"),
            ("dead", "dead-pod", "10.0.12.41"),
        ]);
        let before = state();
        let list = json!([{"containerID": "listed", "ifname": "eth0"}]);
        // Without the daemon it fails and says so.
        let answer = gc(list.clone()).run();
        assert_eq!(answer.failure().0, 104);
        assert!(answer.failure().1.contains("release dead/eth0"), "{answer:?}");
        let daemon = Served::daemon(giving(&[allocation("10.0.12.41", 2, 3)]));
        gc(list.clone()).config("name", "another-network").run().silent();
        assert_eq!(collected(&daemon), Vec::<String>::new());
        let answer = gc(list.clone()).run();
        answer.silent();
        assert!(answer.stderr.contains("spare cni-5a1f/eth0"), "{answer:?}");
        assert_eq!(collected(&daemon), ["dead"]);
        assert_cleared(&before);
        gc(json!([])).run().silent();
        assert_eq!(collected(&daemon), ["dead", "dead", "listed"]);
        // Somebody else released it meanwhile.
        daemon.answer(Answers::default());
        gc(list).run().silent();
        assert_eq!(node.call("GC", "1.1.0").run().failure().0, 7, "no list is not an empty list");
    });
}

#[test]
fn many_pods_at_once() {
    const PODS: usize = 12;
    on_a_node(|node| {
        let before = state();
        let namespaces: Vec<_> = (0..PODS).map(|number| Netns::new(&format!("pod{number}"))).collect();
        let calls = |command: &str| -> Vec<Call> {
            let call = |(number, netns): (usize, &Netns)| {
                node.call(command, "1.0.0").env("CNI_NETNS", netns.path()).pod(&format!("pod-{number}"))
            };
            namespaces.iter().enumerate().map(call).collect()
        };
        let by_pod: fn(&str) -> Vec<IpAllocation> =
            |pod| vec![allocation(&format!("10.0.13.{}", pod.rsplit('-').next().unwrap()), 2, 3)];
        let delay = Duration::from_millis(100);
        let daemon = Served::daemon(Answers { by_pod: Some(by_pod), delay, ..Answers::default() });
        let run = |command: &str| -> Vec<node::Answer> {
            let calls = calls(command);
            std::thread::scope(|scope| {
                let running: Vec<_> = calls.iter().map(|call| scope.spawn(|| call.run())).collect();
                running.into_iter().map(|call| call.join().unwrap()).collect()
            })
        };
        for answer in run("ADD") {
            answer.result();
        }
        assert_eq!(state().iter().filter(|line| line.contains("from 10.0.13.")).count(), PODS);
        assert_eq!(daemon.seen().len(), PODS);
        for answer in run("DEL") {
            answer.silent();
        }
        assert_cleared(&before);
    });
}
