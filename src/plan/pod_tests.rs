//! Tables for the pod plan: names and numbers of ADD, single faults for CHECK, cached results for DEL.

use super::*;
use crate::model::cni::Interface;

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
    let branch = AddNetworkReply { pod_vlan_id: 7, ..reply(&[allocation("10.0.0.3", "", 0)]) };
    let error = Pod::from_reply(&branch, &request(), || Ok([0; 6])).unwrap_err().to_string();
    assert_eq!(error, "pods on a branch ENI (VLAN 7) are not supported");
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
        (vec![("dummycc21c2d7785", "7", "")], "the previous result is of a pod on a branch ENI (VLAN 7)"),
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
        rules: vec![interface.to_rule(), interface.from_rule().unwrap()],
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
    fault(&|host, _| host.links.clear(), &["host interface \"enicc21c2d7785\" is missing"]);
    fault(&|host, _| host.links[0].up = false, &["host interface \"enicc21c2d7785\" is down"]);
    fault(&|host, _| host.routes.clear(), &["host route 10.0.12.34 dev enicc21c2d7785 is missing"]);
    fault(&|host, _| host.rules.truncate(1), &["rule \"1536: from 10.0.12.34 lookup 3\" is missing"]);
    fault(&|host, _| drop(host.rules.remove(0)), &["rule \"512: from all to 10.0.12.34 lookup main\" is missing"]);
    fault(
        &|host, _| host.rules.push(Rule::from("10.0.12.34/32".parse().unwrap(), 1536, 2)),
        &["rule \"1536: from 10.0.12.34 lookup 2\" sends the pod's traffic to another table"],
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
