//! Pods and the host's network on a real kernel, in namespaces of the test's own, with real packets.

mod support;

use enibox::apply::Host;
use enibox::error::Result;
use enibox::model::net::{Link, Mac, Neighbour, Route, Rule, Scope, TABLE_MAIN};
use enibox::netlink::{Request, addr, link, neigh, route, rule, sysctl};
use enibox::plan::pod::{Pod, PodInterface, Removal, RemovedAddress};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use support::Netns;
use support::pods::{add, pod_of};
use support::traffic::{tcp, udp};

const NODE_IP: &str = "10.20.11.162";

fn run(netns: &Netns, requests: &[Request]) {
    netns.route().run(requests).unwrap();
}

/// A link that leads nowhere: both ends of a veth. (Not every kernel has `dummy`.)
fn stub(name: &str) -> Request {
    let peer = format!("{name}-peer");
    let end = |name| link::End { name, mac: None, netns: None };
    link::create_veth(&link::Veth { end: end(name), peer: end(&peer), mtu: 0, up: true })
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A namespace with an address of the node's on a link of its own, which forwards.
fn node() -> Netns {
    let node = Netns::new("node");
    let mut socket = node.route();
    socket.run(&[stub("eth0")]).unwrap();
    let eth0 = link::by_name(&mut socket, "eth0").unwrap().unwrap().index;
    let address = enibox::model::net::Address {
        dev: eth0,
        addr: format!("{NODE_IP}/24").parse().unwrap(),
        no_prefix_route: false,
        no_dad: false,
    };
    socket.run(&[link::set_up(eth0), addr::add(&address)]).unwrap();
    node.run(|| sysctl::set("net/ipv4/ip_forward", "1")).unwrap();
    node
}

fn sandbox() -> Netns {
    Netns::new("pod")
}

fn removal_of(pod: &Pod) -> Removal {
    Removal {
        addresses: pod
            .interfaces
            .iter()
            .map(|interface| RemovedAddress { address: interface.address, table: interface.table })
            .collect(),
        veths: pod.interfaces.iter().map(|one| (one.host_veth.clone(), one.ifname.clone())).collect(),
        branch: pod.interfaces.iter().find_map(PodInterface::removed_branch),
    }
}

fn del(node: &Netns, removal: &Removal, sandbox: Option<&Netns>) -> Result<()> {
    node.run(|| Host::open()?.del_pod(removal, sandbox.map(Netns::handle)))
}

fn check(node: &Netns, pod: &Pod, sandbox: &Netns) -> Vec<String> {
    node.run(|| Host::open()?.check_pod(pod, sandbox.handle())).unwrap()
}

/// Everything of a namespace that a test could have changed.
#[derive(Debug, PartialEq)]
struct Holds {
    links: Vec<Link>,
    addresses: Vec<enibox::model::net::Address>,
    routes: Vec<Route>,
    rules: Vec<Rule>,
    neighbours: Vec<Neighbour>,
}

fn holds(namespace: &Netns) -> Holds {
    use enibox::model::net::Family::V4;
    let mut socket = namespace.route();
    Holds {
        links: link::list(&mut socket).unwrap(),
        addresses: addr::list(&mut socket, Some(V4)).unwrap(),
        routes: route::list(&mut socket, V4, None).unwrap(),
        rules: rule::list(&mut socket, V4).unwrap(),
        neighbours: neigh::list(&mut socket, Some(V4)).unwrap(),
    }
}

fn both_ways(one: &Netns, one_ip: &str, other: &Netns, other_ip: &str) {
    assert_eq!(tcp(one, other, ip(other_ip)).unwrap(), ip(one_ip));
    assert_eq!(tcp(other, one, ip(one_ip)).unwrap(), ip(other_ip));
    assert_eq!(udp(one, other, ip(other_ip)).unwrap(), ip(one_ip));
    assert_eq!(udp(other, one, ip(one_ip)).unwrap(), ip(other_ip));
}

#[test]
fn pods_and_node_reach_each_other() {
    let (node, one, other) = (node(), sandbox(), sandbox());
    let (first, second) = (pod_of("one", &[("10.20.11.50", 254)]), pod_of("other", &[("10.20.12.60", 2)]));
    add(&node, &first, &one).unwrap();
    add(&node, &second, &other).unwrap();
    both_ways(&one, "10.20.11.50", &node, NODE_IP);
    both_ways(&other, "10.20.12.60", &node, NODE_IP);
    both_ways(&one, "10.20.11.50", &other, "10.20.12.60");
    assert_eq!(check(&node, &first, &one), Vec::<String>::new());
    assert_eq!(check(&node, &second, &other), Vec::<String>::new());
    let veth = holds(&node).links.into_iter().find(|link| link.name == first.interfaces[0].host_veth).unwrap();
    assert_eq!((veth.mac, veth.mtu, veth.up), (Some(first.interfaces[0].host_mac), 1500, true));
    let rules = holds(&node).rules.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert!(rules.contains(&"512: from all to 10.20.12.60 lookup main".into()), "{rules:?}");
    assert!(rules.contains(&"1536: from 10.20.12.60 lookup 2".into()), "{rules:?}");
    assert!(!rules.iter().any(|rule| rule.starts_with("1536: from 10.20.11.50")), "{rules:?}");
    let sysctl = |key: &str| {
        let path = format!("net/ipv6/conf/{}/{key}", first.interfaces[0].host_veth);
        node.run(|| sysctl::read(&path)).unwrap()
    };
    assert_eq!(["accept_ra", "accept_redirects", "forwarding"].map(sysctl), ["0", "0", "0"]);
}

#[test]
fn a_second_interface_answers_from_its_own_address() {
    let (node, sandbox) = (node(), sandbox());
    let pod = pod_of("two", &[("10.20.11.50", 254), ("10.20.77.5", 10_101)]);
    add(&node, &pod, &sandbox).unwrap();
    both_ways(&sandbox, "10.20.11.50", &node, NODE_IP);
    assert_eq!(tcp(&node, &sandbox, ip("10.20.77.5")).unwrap(), ip(NODE_IP));
    assert_eq!(check(&node, &pod, &sandbox), Vec::<String>::new());
    del(&node, &removal_of(&pod), Some(&sandbox)).unwrap();
    assert_eq!(holds(&sandbox).links.len(), 1, "only lo is left");
}

#[test]
fn an_ipv6_pod_is_usable_at_once() {
    let node = node();
    let mut socket = node.route();
    let address = enibox::model::net::Address {
        dev: link::by_name(&mut socket, "eth0").unwrap().unwrap().index,
        addr: "2001:db8:1::1/64".parse().unwrap(),
        no_prefix_route: false,
        no_dad: true,
    };
    socket.run(&[addr::add(&address)]).unwrap();
    // A single packet that has to be repeated costs a second as well, and duplicate detection does so each time.
    let usable = [7, 8, 9].map(|number| {
        let (name, address, sandbox) = (format!("six-{number}"), format!("2001:db8:1::{number}"), sandbox());
        let pod = pod_of(&name, &[(&address, 254)]);
        let start = enibox::clock::instant();
        add(&node, &pod, &sandbox).unwrap();
        let mut inside = sandbox.route();
        assert!(enibox::netlink::route::is_local(&mut inside, ip(&address)).unwrap());
        assert_eq!(tcp(&sandbox, &node, ip("2001:db8:1::1")).unwrap(), ip(&address));
        let usable = start.elapsed();
        assert_eq!(check(&node, &pod, &sandbox), Vec::<String>::new());
        usable
    });
    println!("first answers after {usable:?}");
    let fastest = usable.into_iter().min().unwrap();
    assert!(
        fastest < Duration::from_secs(1),
        "first answers after {usable:?}: somebody waited for duplicate detection"
    );
}

#[test]
fn the_host_is_that_of_its_own_namespace_whoever_calls() {
    let (node, sandbox) = (node(), sandbox());
    let pod = pod_of("far", &[("10.20.12.60", 2)]);
    let mut host = node.run(Host::open).unwrap();
    host.add_pod(&pod, sandbox.handle()).unwrap();
    both_ways(&sandbox, "10.20.12.60", &node, NODE_IP);
    let path = format!("net/ipv6/conf/{}/accept_redirects", pod.interfaces[0].host_veth);
    assert_eq!(node.run(|| sysctl::read(&path)).unwrap(), "0");
    host.del_pod(&removal_of(&pod), Some(sandbox.handle())).unwrap();
    assert_eq!(holds(&sandbox).links.len(), 1, "only lo is left");
}

#[test]
fn a_repeated_add_builds_anew() {
    let (node, sandbox) = (node(), sandbox());
    let pod = pod_of("twice", &[("10.20.12.60", 2)]);
    add(&node, &pod, &sandbox).unwrap();
    let before = holds(&node);
    let again = pod_of("twice", &[("10.20.12.60", 2)]);
    add(&node, &again, &sandbox).unwrap();
    both_ways(&sandbox, "10.20.12.60", &node, NODE_IP);
    assert_eq!(holds(&node).rules, before.rules);
    assert_eq!(holds(&node).links.len(), before.links.len());
    assert_eq!(check(&node, &again, &sandbox), Vec::<String>::new());
}

#[test]
fn a_new_sandbox_of_the_same_pod_takes_over() {
    let (node, old, new) = (node(), sandbox(), sandbox());
    let before = pod_of("web-0", &[("10.20.12.60", 2)]);
    let after = pod_of("web-0", &[("10.20.12.61", 3)]);
    add(&node, &before, &old).unwrap();
    add(&node, &after, &new).unwrap();
    both_ways(&new, "10.20.12.61", &node, NODE_IP);
    // The late DEL of the old sandbox, which has no interface any more or another one, leaves the new one alone.
    del(&node, &removal_of(&before), Some(&old)).unwrap();
    run(&old, &[stub("eth0")]);
    del(&node, &removal_of(&before), Some(&old)).unwrap();
    both_ways(&new, "10.20.12.61", &node, NODE_IP);
    assert_eq!(check(&node, &after, &new), Vec::<String>::new());
    assert!(!holds(&node).rules.iter().any(|rule| rule.to_string().contains("10.20.12.60")));
}

#[test]
fn a_foreign_interface_in_the_pod_is_left_alone() {
    let (node, sandbox) = (node(), sandbox());
    run(&sandbox, &[stub("eth0")]);
    let (outside, inside) = (holds(&node), holds(&sandbox));
    let pod = pod_of("taken", &[("10.20.12.60", 2)]);
    let error = add(&node, &pod, &sandbox).unwrap_err().to_string();
    assert!(error.starts_with("interface \"eth0\" already exists in "), "{error}");
    assert_eq!((holds(&node), holds(&sandbox)), (outside, inside));
    // Nor does a sandbox of the same pod that is wired up elsewhere suffer from it.
    let elsewhere = Netns::new("pod");
    add(&node, &pod, &elsewhere).unwrap();
    let (outside, other) = (holds(&node), holds(&elsewhere));
    assert!(add(&node, &pod, &sandbox).is_err());
    assert_eq!((holds(&node).links, holds(&elsewhere)), (outside.links, other));
}

#[test]
fn what_a_failed_add_made_is_undone() {
    let (node, sandbox) = (node(), sandbox());
    let pod = pod_of("half", &[("10.20.11.50", 2), ("10.20.77.5", 10_101)]);
    // The second interface finds its name taken after the first one is complete.
    run(&sandbox, &[stub("mNicIf1")]);
    let (outside, inside) = (holds(&node), holds(&sandbox));
    let error = add(&node, &pod, &sandbox).unwrap_err().to_string();
    assert!(error.starts_with("interface \"mNicIf1\" already exists in "), "{error}");
    assert_eq!((holds(&node), holds(&sandbox)), (outside, inside));

    // A default route of somebody else's: the last but one step of the pod's side is refused.
    let mut socket = sandbox.route();
    let dummy = link::by_name(&mut socket, "mNicIf1").unwrap().unwrap().index;
    let default = Route {
        table: TABLE_MAIN,
        dst: "0.0.0.0/0".parse().unwrap(),
        gateway: None,
        dev: dummy,
        scope: Scope::Link,
        prefsrc: None,
        metric: 0,
    };
    socket.run(&[link::set_up(dummy), route::add(&default)]).unwrap();
    let (outside, inside) = (holds(&node), holds(&sandbox));
    let error = add(&node, &pod_of("half", &[("10.20.11.50", 2)]), &sandbox).unwrap_err().to_string();
    assert!(error.contains("add route default via 169.254.1.1") && error.ends_with("File exists"), "{error}");
    assert_eq!((holds(&node), holds(&sandbox)), (outside, inside));
}

#[test]
fn rules_of_an_earlier_owner_go() {
    let (node, sandbox) = (node(), sandbox());
    let address = "10.20.12.60/32".parse().unwrap();
    let stale = [3, 4, 2].map(|table| rule::add(&Rule::from(address, 1536, table)));
    run(&node, &stale);
    add(&node, &pod_of("heir", &[("10.20.12.60", 2)]), &sandbox).unwrap();
    let left = holds(&node).rules.into_iter().filter(|rule| rule.priority == 1536).collect::<Vec<_>>();
    assert_eq!(left, [Rule::from(address, 1536, 2)]);
    // Also when the new owner needs none.
    add(&node, &pod_of("heir", &[("10.20.12.60", 254)]), &sandbox).unwrap();
    assert!(!holds(&node).rules.iter().any(|rule| rule.priority == 1536));
}

#[test]
fn del_removes_all_and_may_be_repeated() {
    let (node, sandbox) = (node(), sandbox());
    let before = holds(&node);
    let pod = pod_of("gone", &[("10.20.12.60", 2)]);
    add(&node, &pod, &sandbox).unwrap();
    both_ways(&sandbox, "10.20.12.60", &node, NODE_IP);
    run(
        &node,
        &[rule::add(&Rule {
            dst: Some("10.0.0.0/8".parse().unwrap()),
            ..Rule::from("10.20.12.60/32".parse().unwrap(), 1536, 2)
        })],
    );
    del(&node, &removal_of(&pod), Some(&sandbox)).unwrap();
    assert_eq!(holds(&node), before);
    assert_eq!(holds(&sandbox).links.len(), 1, "only lo is left");
    del(&node, &removal_of(&pod), Some(&sandbox)).unwrap();
    drop(sandbox);
    del(&node, &removal_of(&pod), None).unwrap();
    assert_eq!(holds(&node), before);
}

#[test]
fn del_without_a_namespace_leaves_the_veth_to_the_kernel() {
    let (node, sandbox) = (node(), sandbox());
    let pod = pod_of("orphan", &[("10.20.12.60", 2)]);
    add(&node, &pod, &sandbox).unwrap();
    let any_table =
        Removal { addresses: vec![RemovedAddress { address: ip("10.20.12.60"), table: 0 }], ..removal_of(&pod) };
    del(&node, &any_table, None).unwrap();
    let left = holds(&node);
    assert!(left.links.iter().any(|link| link.name == pod.interfaces[0].host_veth));
    assert!(!left.rules.iter().any(|rule| rule.to_string().contains("10.20.12.60")));
    assert!(!left.routes.iter().any(|route| route.to_string().contains("10.20.12.60")));
}

/// What other pods have on the host.
fn fill(node: &Netns, pods: std::ops::Range<u8>) {
    let mut socket = node.route();
    for number in pods {
        let address = ip(&format!("10.20.13.{number}"));
        let net = ipnet::IpNet::from(address);
        let name = format!("other{number}");
        socket.run(&[stub(&name)]).unwrap();
        let dev = link::by_name(&mut socket, &name).unwrap().unwrap().index;
        let (gateway, scope, prefsrc) = (None, Scope::Link, None);
        let way = Route { table: TABLE_MAIN, dst: net, gateway, dev, scope, prefsrc, metric: 0 };
        let mac = Some(Mac([2, 0, 0, 0, 0, number]));
        socket
            .run(&[
                route::add(&way),
                rule::add(&Rule::to(net, 512, TABLE_MAIN)),
                rule::add(&Rule::from(net, 1536, 2)),
                neigh::add(&Neighbour { dev, addr: address, mac, permanent: true, noarp: false }),
            ])
            .unwrap();
    }
}

#[test]
fn add_and_del_read_as_much_beside_many_pods_as_beside_few() {
    let node = node();
    let mut read = Vec::new();
    for others in [0..10, 10..200] {
        fill(&node, others);
        let (pod, sandbox) = (pod_of("guest", &[("10.20.12.60", 2)]), sandbox());
        let bytes = node.run(|| {
            let mut host = Host::open().unwrap();
            host.add_pod(&pod, sandbox.handle()).unwrap();
            let added = host.bytes_read();
            host.del_pod(&removal_of(&pod), Some(sandbox.handle())).unwrap();
            (added, host.bytes_read() - added)
        });
        read.push(bytes);
    }
    assert!(read[0].0 > 0 && read[0].1 > 0, "{read:?}");
    assert_eq!(read[0], read[1], "bytes of ADD and DEL beside 10 and beside 200 pods");
}

#[test]
fn check_finds_what_is_taken_away() {
    let (node, sandbox) = (node(), sandbox());
    let pod = pod_of("checked", &[("10.20.12.60", 2)]);
    let interface = &pod.interfaces[0];
    add(&node, &pod, &sandbox).unwrap();
    let mut outer = node.route();
    let mut inner = sandbox.route();
    let veth = link::by_name(&mut outer, &interface.host_veth).unwrap().unwrap();
    let eth0 = link::by_name(&mut inner, "eth0").unwrap().unwrap();
    let [gateway, default] = interface.pod_routes(0, eth0.index);
    let mut fault = |outside: bool, broken: &[Request], repaired: &[Request], line: &str| {
        let socket = if outside { &mut outer } else { &mut inner };
        socket.run(broken).unwrap();
        assert_eq!(check(&node, &pod, &sandbox), [line]);
        socket.run(repaired).unwrap();
        assert_eq!(check(&node, &pod, &sandbox), Vec::<String>::new());
    };
    let name = &interface.host_veth;
    let to = interface.to_rule();
    fault(true, &[rule::delete(&to)], &[rule::add(&to)], &format!("to-pod-rule: missing: rule {to}"));
    let from = interface.from_rule().unwrap();
    fault(true, &[rule::delete(&from)], &[rule::add(&from)], &format!("from-pod-rule: missing: rule {from}"));
    let rival = Rule::from(interface.host_net(), 1536, 9);
    fault(true, &[rule::add(&rival)], &[rule::delete(&rival)], &format!("from-pod-rule: should not be: rule {rival}"));
    let host_route = interface.host_route(veth.index);
    fault(
        true,
        &[route::delete(&host_route)],
        &[route::replace(&host_route)],
        &format!("pod-route: missing: route 10.20.12.60 dev {name}"),
    );
    fault(
        false,
        &[route::delete(&default)],
        &[route::add(&default)],
        "route default via 169.254.1.1 dev eth0 is missing in the pod",
    );
    fault(
        false,
        &[route::delete(&gateway)],
        &[route::replace(&gateway)],
        "route 169.254.1.1 dev eth0 scope link is missing in the pod",
    );
    let entry = interface.pod_neighbour(eth0.index, veth.mac.unwrap());
    fault(
        false,
        &[neigh::delete(eth0.index, interface.gateway)],
        &[neigh::replace(&entry)],
        "neighbour 169.254.1.1 is missing on \"eth0\"",
    );
    let wrong = Mac([2, 0, 0, 0, 0, 1]);
    fault(
        false,
        &[neigh::replace(&Neighbour { mac: Some(wrong), ..entry })],
        &[neigh::replace(&entry)],
        &format!("neighbour 169.254.1.1 is {wrong} instead of {}", veth.mac.unwrap()),
    );
    outer.run(&[link::delete(veth.index)]).unwrap();
    let lines = check(&node, &pod, &sandbox);
    assert_eq!(
        lines,
        [
            "pod-veth: 10.20.12.60 is given out, and no veth leads to it".to_owned(),
            format!("interface \"eth0\" is missing in {}", pod.netns),
        ]
    );
}

#[test]
fn a_veth_that_others_set_up_at_once_is_wired_all_the_same() {
    let (node, sandbox) = (node(), sandbox());
    let pod = pod_of("hasty", &[("2001:db8::2:60", 2)]);
    let name = &pod.interfaces[0].host_veth;
    let (stop, early) = (AtomicBool::new(false), AtomicUsize::new(0));
    let added = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut socket = node.route();
            while !stop.load(Ordering::Relaxed) {
                if let Some(link) = link::by_name(&mut socket, name).unwrap().filter(|link| !link.up)
                    && socket.run(&[link::set_up(link.index)]).is_ok()
                {
                    early.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        // Who is first differs from one time to the next.
        let end = enibox::clock::instant() + Duration::from_mins(1);
        let wanted = |_: &usize| early.load(Ordering::Relaxed) < 5 && enibox::clock::instant() < end;
        let mut tries = 0..usize::MAX;
        let added = tries.by_ref().take_while(wanted).try_for_each(|_| {
            add(&node, &pod, &sandbox)?;
            del(&node, &removal_of(&pod), Some(&sandbox))
        });
        stop.store(true, Ordering::Relaxed);
        println!("{} veths up early in {} ADDs", early.load(Ordering::Relaxed), tries.start);
        added
    });
    added.unwrap();
    assert!(early.load(Ordering::Relaxed) > 0, "nobody was hasty");
}
