//! Tables for the pod plan: names and numbers of ADD, single faults for CHECK, cached results for DEL.

use super::*;
use crate::model::cni::Interface;
use crate::plan::doctor::pods::check;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn request() -> Request {
    Request {
        namespace: "default".into(),
        name: "sample-pod".into(),
        netns: "/var/run/netns/cni-5a1f".into(),
        ifname: "eth0".into(),
        veth_prefix: "eni".into(),
        mtu: 9001,
        enforcing_mode: EnforcingMode::Strict,
    }
}

fn allocation(ipv4: &str, ipv6: &str, table: i32) -> IpAllocation {
    IpAllocation { ipv4: ipv4.into(), ipv6: ipv6.into(), device_number: 0, route_table_id: table }
}

fn reply(allocations: &[IpAllocation]) -> AddNetworkReply {
    AddNetworkReply { success: true, allocations: allocations.to_vec(), ..AddNetworkReply::default() }
}

fn pod(allocations: &[IpAllocation]) -> Pod {
    Pod::from_reply(&reply(allocations), &request(), || Ok([0xff; 6])).unwrap()
}

#[test]
fn a_reply_becomes_interfaces() {
    let pod = pod(&[allocation("10.0.12.34", "", 3), allocation("10.0.77.5", "2001:db8::9", 10_101)]);
    let [first, second] = pod.interfaces.as_slice() else { panic!("two interfaces") };
    assert_eq!((first.host_veth.as_str(), first.ifname.as_str()), ("enicc21c2d7785", "eth0"));
    assert_eq!((second.host_veth.as_str(), second.ifname.as_str()), ("enia0b7655f3c9", "mNicIf1"));
    assert_eq!((first.gateway, second.gateway), (ip("169.254.1.1"), ip("169.254.1.2")));
    assert_eq!(first.host_mac.to_string(), "fe:ff:ff:ff:ff:ff");
    assert_eq!(first.to_rule().to_string(), "512: from all to 10.0.12.34 lookup main");
    assert_eq!(first.from_rule().unwrap().to_string(), "1536: from 10.0.12.34 lookup 3");
    assert_eq!(first.host_route(7).to_string(), "10.0.12.34 dev if7 scope link");
    assert_eq!(
        first.pod_routes(0, 2).map(|route| route.to_string()),
        ["169.254.1.1 dev if2 scope link", "default via 169.254.1.1 dev if2"]
    );
    assert_eq!(first.pod_rule(0), None);
    assert_eq!(
        second.pod_routes(1, 4).map(|route| route.to_string()),
        ["169.254.1.2 dev if4 table 1 scope link", "default via 169.254.1.2 dev if4 table 1"]
    );
    assert_eq!(second.pod_rule(1).unwrap().to_string(), "1: from 10.0.77.5 lookup 1");
}

#[test]
fn tables_of_the_primary_eni_mean_main() {
    for (number, rule) in [(254, None), (0, None), (1, None), (-1, None), (2, Some("1536: from 10.0.12.34 lookup 2"))] {
        let pod = pod(&[allocation("10.0.12.34", "", number)]);
        assert_eq!(pod.interfaces[0].from_rule().map(|rule| rule.to_string()).as_deref(), rule, "{number}");
    }
}

#[test]
fn an_ipv6_pod_skips_duplicate_detection() {
    let pod = pod(&[allocation("", "2600:1f14:aa:bb00:1c2d::7", 254)]);
    let interface = &pod.interfaces[0];
    assert_eq!(interface.gateway, ip("fe80::1"));
    assert_eq!(interface.pod_address(2).to_string(), "2600:1f14:aa:bb00:1c2d::7/128 dev if2 nodad");
}

#[test]
fn bad_replies_are_errors() {
    for (allocations, error) in [
        (vec![], "the daemon's reply has no address"),
        (vec![allocation("", "", 2)], "the daemon's reply has no address for interface 0"),
        (
            vec![allocation("10.0.0.300", "", 2)],
            "address \"10.0.0.300\" of the daemon's reply: invalid IP address syntax",
        ),
    ] {
        let result = Pod::from_reply(&reply(&allocations), &request(), || Ok([0; 6]));
        assert_eq!(result.unwrap_err().to_string(), error);
    }
    let long = Request { veth_prefix: "toolong".into(), ..request() };
    assert!(Pod::from_reply(&reply(&[allocation("10.0.0.3", "", 2)]), &long, || Ok([0; 6])).is_err());
    assert!(Pod::from_reply(&reply(&[allocation("10.0.0.3", "", 2)]), &request(), || Err(Error::new("no"))).is_err());
}

fn entry(name: &str, mac: &str, sandbox: &str) -> Interface {
    Interface { name: name.into(), mac: mac.into(), sandbox: sandbox.into(), ..Interface::default() }
}

fn previous(entries: &[(&str, &str, &str)], ips: &[(i64, &str)]) -> Output {
    let ips = ips.iter().map(|(interface, address)| IpConfig {
        interface: Some(*interface),
        address: address.parse().unwrap(),
        gateway: None,
    });
    Output {
        interfaces: entries.iter().map(|(name, mac, sandbox)| entry(name, mac, sandbox)).collect(),
        ips: ips.collect(),
        ..Output::default()
    }
}

const NETNS: &str = "/var/run/netns/cni-5a1f";

#[test]
fn a_cached_result_tells_what_to_remove() {
    let check = |entries: &[(&str, &str, &str)], ips: &[(i64, &str)], expected: &[(&str, u32)]| {
        let removal = Removal::from_previous(&previous(entries, ips), &request()).unwrap();
        let got = removal.addresses.iter().map(|one| (one.address, one.table)).collect::<Vec<_>>();
        assert_eq!(got, expected.iter().map(|(address, table)| (ip(address), *table)).collect::<Vec<_>>());
    };
    let veth = ("enicc21c2d7785", "", "");
    check(&[veth, ("eth0", "3", NETNS), ("dummycc21c2d7785", "0", "2")], &[(1, "10.0.12.34/32")], &[("10.0.12.34", 3)]);
    // Made before the table was written down: the device number gives it.
    check(&[veth, ("eth0", "", NETNS), ("dummycc21c2d7785", "0", "2")], &[(1, "10.0.12.34/32")], &[("10.0.12.34", 3)]);
    check(
        &[veth, ("eth0", "", NETNS), ("dummycc21c2d7785", "0", "0")],
        &[(1, "10.0.12.34/32")],
        &[("10.0.12.34", 254)],
    );
    check(
        &[
            veth,
            ("eth0", "254", NETNS),
            ("enia0b7655f3c9", "", ""),
            ("mNicIf1", "10101", NETNS),
            ("dummycc21c2d7785", "0", "0"),
        ],
        &[(1, "10.0.12.34/32"), (3, "10.0.77.5/32")],
        &[("10.0.12.34", 254), ("10.0.77.5", 10_101)],
    );
    // The egress plugin's interfaces follow ours.
    check(
        &[veth, ("eth0", "3", NETNS), ("dummycc21c2d7785", "0", "2"), ("vethe", "", ""), ("v4if0", "", NETNS)],
        &[(1, "10.0.12.34/32"), (4, "169.254.172.7/22")],
        &[("10.0.12.34", 3)],
    );
    // Two addresses on one interface are not of our making.
    check(
        &[veth, ("eth0", "3", NETNS), ("dummycc21c2d7785", "0", "2")],
        &[(1, "10.0.12.34/32"), (1, "10.0.12.35/32")],
        &[],
    );
    check(&[("dummycc21c2d7785", "0", "2")], &[], &[]);
}

#[test]
fn a_cached_result_that_cannot_be_used_says_why() {
    for (entries, error) in [
        (vec![("eth0", "3", NETNS)], "the previous result has no entry \"dummycc21c2d7785\""),
        (vec![("dummycc21c2d7785", "7", "")], "found 0 containerIPs for eth0 in prevResult"),
        (
            vec![("dummycc21c2d7785", "x", "0")],
            "VLAN \"x\" of entry \"dummycc21c2d7785\": invalid digit found in string",
        ),
        (
            vec![("dummycc21c2d7785", "0", "x")],
            "device \"x\" of entry \"dummycc21c2d7785\": invalid digit found in string",
        ),
        (
            vec![("eth0", "aa:bb", NETNS), ("dummycc21c2d7785", "0", "0")],
            "route table \"aa:bb\" of interface \"eth0\": invalid digit found in string",
        ),
    ] {
        let result = Removal::from_previous(&previous(&entries, &[(0, "10.0.12.34/32")]), &request());
        assert_eq!(result.unwrap_err().to_string(), error);
    }
}

#[test]
fn a_reply_to_del_tells_what_to_remove() {
    let reply = DelNetworkReply {
        success: true,
        allocations: vec![
            allocation("10.0.12.34", "", 1),
            allocation("", "", 4),
            allocation("", "2001:db8::7", 0),
            allocation("10.0.12.36", "", 3),
        ],
        ..DelNetworkReply::default()
    };
    let removal = Removal::from_reply(&reply, &request()).unwrap();
    let tables = removal.addresses.iter().map(|one| one.table).collect::<Vec<_>>();
    assert_eq!(tables, [254, 0, 3]);
    assert_eq!(removal.veths[0], ("enicc21c2d7785".into(), "eth0".into()));
    assert_eq!(removal.veths[2].1, "mNicIf3");
}

/// Both sides of a pod on a secondary ENI with nothing missing.
fn sides(pod: &Pod) -> (Side, Side) {
    let interface = &pod.interfaces[0];
    let mac = Mac([2, 0, 0, 0, 0, 9]);
    let veth = |index, name: &str, peer| Link {
        index,
        name: name.into(),
        mac: Some(mac),
        mtu: 9001,
        up: true,
        parent: Some(peer),
        kind: Some("veth".into()),
        ..Link::default()
    };
    let host = Side {
        links: vec![veth(7, &interface.host_veth, 2)],
        routes: vec![interface.host_route(7)],
        rules: interface.host_rules(),
        ..Side::default()
    };
    let inside = Side {
        links: vec![veth(2, "eth0", 7)],
        addresses: vec![interface.pod_address(2)],
        routes: interface.pod_routes(0, 2).to_vec(),
        neighbours: vec![interface.pod_neighbour(2, mac)],
        ..Side::default()
    };
    (host, inside)
}

#[test]
fn check_finds_each_single_fault() {
    let previous = previous(
        &[("enicc21c2d7785", "", ""), ("eth0", "3", NETNS), ("dummycc21c2d7785", "0", "2")],
        &[(1, "10.0.12.34/32")],
    );
    let pod = Pod::from_previous(&previous, &request()).unwrap();
    let fault = |break_it: &dyn Fn(&mut Side, &mut Side), lines: &[&str]| {
        let (mut host, mut inside) = sides(&pod);
        break_it(&mut host, &mut inside);
        assert_eq!(check(&pod, &host, &inside), lines);
    };
    fault(&|_, _| {}, &[]);
    fault(&|host, _| host.links.clear(), &["pod-veth: 10.0.12.34 is given out, and no veth leads to it"]);
    fault(&|host, _| host.links[0].up = false, &["pod-link: not so: enicc21c2d7785 up"]);
    fault(&|host, _| host.routes.clear(), &["pod-route: missing: route 10.0.12.34 dev enicc21c2d7785"]);
    fault(&|host, _| host.rules.truncate(1), &["from-pod-rule: missing: rule 1536: from 10.0.12.34 lookup 3"]);
    fault(
        &|host, _| drop(host.rules.remove(0)),
        &["to-pod-rule: missing: rule 512: from all to 10.0.12.34 lookup main"],
    );
    fault(
        &|host, _| host.rules.push(Rule::from("10.0.12.34/32".parse().unwrap(), 1536, 2)),
        &["from-pod-rule: should not be: rule 1536: from 10.0.12.34 lookup 2"],
    );
    fault(&|_, inside| inside.links.clear(), &["interface \"eth0\" is missing in /var/run/netns/cni-5a1f"]);
    fault(&|_, inside| inside.links[0].up = false, &["interface \"eth0\" is down"]);
    fault(
        &|_, inside| inside.links[0].parent = Some(8),
        &["interface \"eth0\" is not the other end of \"enicc21c2d7785\""],
    );
    fault(&|_, inside| inside.addresses.clear(), &["address 10.0.12.34/32 is missing on \"eth0\""]);
    fault(
        &|_, inside| inside.routes.retain(|route| route.gateway.is_some()),
        &["route 169.254.1.1 dev eth0 scope link is missing in the pod"],
    );
    fault(&|_, inside| inside.routes.truncate(1), &["route default via 169.254.1.1 dev eth0 is missing in the pod"]);
    fault(&|_, inside| inside.neighbours.clear(), &["neighbour 169.254.1.1 is missing on \"eth0\""]);
    fault(&|_, inside| inside.neighbours[0].permanent = false, &["neighbour 169.254.1.1 is missing on \"eth0\""]);
    fault(
        &|_, inside| inside.neighbours[0].mac = Some(Mac([2, 0, 0, 0, 0, 8])),
        &["neighbour 169.254.1.1 is 02:00:00:00:00:08 instead of 02:00:00:00:00:09"],
    );
    // A plugin of the chain may change the pod's own MAC and MTU, and add addresses.
    fault(
        &|_, inside| {
            (inside.links[0].mac, inside.links[0].mtu) = (Some(Mac([2, 0, 0, 0, 0, 7])), 1400);
            inside.addresses.insert(0, Address { addr: "192.0.2.1/32".parse().unwrap(), ..inside.addresses[0] });
        },
        &[],
    );
    let empty = Output { interfaces: vec![entry("dummycc21c2d7785", "0", "0")], ..Output::default() };
    assert_eq!(
        Pod::from_previous(&empty, &request()).unwrap_err().to_string(),
        "the previous result has no interface \"eth0\" with an address"
    );
}

fn branch_reply(vlan: i32, address: &str, gateway: &str) -> AddNetworkReply {
    let allocation = if address.contains(':') { allocation("", address, 0) } else { allocation(address, "", 0) };
    AddNetworkReply {
        pod_vlan_id: vlan,
        pod_eni_mac: "02:aa:bb:cc:dd:ee".into(),
        pod_eni_subnet_gw: gateway.into(),
        parent_if_index: 4,
        ..reply(&[allocation])
    }
}

#[test]
fn a_branch_pod_has_rules_of_its_mode() {
    let check = |mode: EnforcingMode, address: &str, gateway: &str, expected: [&str; 4]| {
        let request = Request { enforcing_mode: mode, ..request() };
        let pod = Pod::from_reply(&branch_reply(7, address, gateway), &request, || Ok([1; 6])).unwrap();
        let interface = &pod.interfaces[0];
        assert_eq!(interface.branch.unwrap().parent, 4);
        let rules = interface.host_rules().iter().map(ToString::to_string).collect::<Vec<_>>();
        let [first, second] = rules.as_slice() else { panic!("{rules:?}") };
        let route = interface.host_route(9).to_string();
        assert_eq!([interface.host_veth.as_str(), &route, first, second], expected);
        let branch = interface.removed_branch().unwrap();
        assert_eq!((branch.device.as_str(), branch.table, branch.address), ("vlan.eth.7", 107, ip(address)));
    };
    let v6 = "2001:db8::9";
    check(
        EnforcingMode::Strict,
        "10.0.32.9",
        "10.0.32.1",
        [
            "vlancc21c2d7785",
            "10.0.32.9 dev if9 table 107 scope link",
            "10: from all iif vlan.eth.7 lookup 107",
            "10: from all iif vlancc21c2d7785 lookup 107",
        ],
    );
    check(
        EnforcingMode::Standard,
        "10.0.32.9",
        "10.0.32.1",
        [
            "enicc21c2d7785",
            "10.0.32.9 dev if9 scope link",
            "512: from all to 10.0.32.9 lookup main",
            "1536: from 10.0.32.9 lookup 107",
        ],
    );
    check(
        EnforcingMode::Standard,
        v6,
        "fe80:ec2::1",
        [
            "enicc21c2d7785",
            "2001:db8::9 dev if9 scope link",
            "512: from all to 2001:db8::9 lookup main",
            "1536: from 2001:db8::9 lookup 107",
        ],
    );
}

#[test]
fn bad_replies_about_branches_are_errors() {
    let good = || branch_reply(7, "10.0.32.9", "10.0.32.1");
    for (reply, error) in [
        (branch_reply(153, "10.0.32.9", "10.0.32.1"), "no route table for VLAN 153"),
        (branch_reply(155, "10.0.32.9", "10.0.32.1"), "no route table for VLAN 155"),
        (branch_reply(-1, "10.0.32.9", "10.0.32.1"), "VLAN -1: out of range integral type conversion attempted"),
        (branch_reply(70_000, "10.0.32.9", "10.0.32.1"), "VLAN 70000: out of range integral type conversion attempted"),
        (branch_reply(7, "10.0.32.9", ""), "gateway \"\" of the branch ENI: invalid IP address syntax"),
        (branch_reply(7, "10.0.32.9", "fe80:ec2::1"), "gateway fe80:ec2::1 of branch ENI with address 10.0.32.9"),
        (AddNetworkReply { pod_eni_mac: "zz".into(), ..good() }, "MAC of the branch ENI: \"zz\" is not a MAC address"),
        (AddNetworkReply { parent_if_index: 0, ..good() }, "trunk link 0 of branch ENI with VLAN 7"),
        (AddNetworkReply { allocations: Vec::new(), ..good() }, "the daemon's reply has no address"),
    ] {
        let result = Pod::from_reply(&reply, &request(), || Ok([0; 6]));
        assert_eq!(result.unwrap_err().to_string(), error);
    }
}

fn branch_result(veth: &str, vlan: &str) -> Output {
    let entries = [(veth, "", ""), ("eth0", "0", NETNS), ("dummycc21c2d7785", vlan, "")];
    let mut output = previous(&entries, &[(1, "10.0.32.9/32")]);
    output.ips[0].gateway = Some(ip("10.0.32.1"));
    output
}

#[test]
fn a_cached_result_tells_of_the_branch_eni() {
    for (vlan, expected) in [
        ("7", Some(("vlan.eth.7", 107))),
        ("300", Some(("vlan.eth.300", 400))),
        ("154", None), // never wired
        ("4095", None),
    ] {
        for veth in ["enicc21c2d7785", "vlancc21c2d7785"] {
            let removal = Removal::from_previous(&branch_result(veth, vlan), &request()).unwrap();
            assert_eq!(removal.branch.as_ref().map(|branch| (branch.device.as_str(), branch.table)), expected);
            let tables = removal.addresses.iter().map(|one| one.table).collect::<Vec<_>>();
            assert_eq!(tables, expected.map(|(_, table)| table).into_iter().collect::<Vec<_>>());
        }
    }
    let reply = DelNetworkReply {
        success: true,
        allocations: vec![allocation("10.0.32.9", "", 0)],
        pod_vlan_id: 7,
        ..DelNetworkReply::default()
    };
    let removal = Removal::from_reply(&reply, &request()).unwrap();
    assert_eq!(
        removal,
        Removal {
            veths: removal.veths.clone(),
            ..Removal::from_previous(&branch_result("", "7"), &request()).unwrap()
        }
    );
    let nothing = DelNetworkReply { allocations: Vec::new(), ..reply };
    assert_eq!(Removal::from_reply(&nothing, &request()).unwrap(), Removal::default());
}

#[test]
fn a_vlan_that_went_to_another_pod_is_seen() {
    let branch = RemovedBranch { device: "vlan.eth.7".into(), table: 107, address: ip("10.0.32.9") };
    let route = |dst: &str, dev: u32| link_route(107, ip(dst), dev);
    let default = Route { dst: "0.0.0.0/0".parse().unwrap(), gateway: Some(ip("10.0.32.1")), ..route("10.0.32.1", 5) };
    let from = |source: &str, table: u32| Rule::from(format!("{source}/32").parse().unwrap(), 1536, table);
    for (routes, rules, other) in [
        (vec![route("10.0.32.1", 5), default, route("10.0.32.9", 6)], vec![from("10.0.32.9", 107)], false),
        (vec![], vec![from("10.0.32.10", 108)], false),
        (vec![route("10.0.32.1", 5), default, route("10.0.32.10", 6)], vec![], true),
        (vec![route("10.0.32.1", 5), default], vec![from("10.0.32.10", 107)], true),
    ] {
        assert_eq!(branch.is_of_another(Some(5), &routes, &rules), other, "{routes:?} {rules:?}");
    }
}

#[test]
fn check_finds_each_fault_of_a_branch() {
    let fault = |veth: &str, break_it: &dyn Fn(&mut Side), lines: &[&str]| {
        let pod = Pod::from_previous(&branch_result(veth, "7"), &request()).unwrap();
        let interface = &pod.interfaces[0];
        let (mut host, inside) = sides(&pod);
        let branch = interface.branch.unwrap().eni;
        let vlan = Link {
            index: 8,
            name: branch.device(),
            kind: Some("vlan".into()),
            parent: Some(4),
            ..host.links[0].clone()
        };
        host.links.insert(0, vlan);
        host.routes.extend(branch.routes(8));
        break_it(&mut host);
        assert_eq!(check(&pod, &host, &inside), lines);
    };
    for veth in ["enicc21c2d7785", "vlancc21c2d7785"] {
        fault(veth, &|_| {}, &[]);
        fault(veth, &|host| drop(host.links.remove(0)), &["branch-link: VLAN device vlan.eth.7 is missing"]);
        fault(veth, &|host| host.links[0].kind = None, &["branch-link: VLAN device vlan.eth.7 is missing"]);
        fault(veth, &|host| host.links[0].up = false, &["branch-link: not so: vlan.eth.7 up"]);
        fault(
            veth,
            &|host| _ = host.routes.remove(1),
            &["branch-route: missing: route 10.0.32.1 dev vlan.eth.7 table 107 scope link"],
        );
        fault(
            veth,
            &|host| host.routes.truncate(2),
            &["branch-route: missing: route default via 10.0.32.1 dev vlan.eth.7 table 107"],
        );
    }
    fault(
        "vlancc21c2d7785",
        &|host| host.rules.truncate(1),
        &["branch-rule: missing: rule 10: from all iif vlancc21c2d7785 lookup 107"],
    );
    fault(
        "vlancc21c2d7785",
        &|host| _ = host.routes.remove(0),
        &[
            "branch-route: missing: route 10.0.32.9 dev vlancc21c2d7785 table 107 scope link",
            "pod-route: route 10.0.32.9 dev vlancc21c2d7785 scope link is missing",
        ],
    );
    fault(
        "enicc21c2d7785",
        &|host| host.rules.truncate(1),
        &["from-pod-rule: missing: rule 1536: from 10.0.32.9 lookup 107"],
    );
}
