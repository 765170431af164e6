//! Every verb of `netlink` on a real kernel, in namespaces made for it, read back by our own dump and by `ip` or `nft`.

mod support;

use enibox::model::net::{Address, Family, Link, Mac, Neighbour, Route, Rule, Scope, TABLE_MAIN};
use enibox::netlink::link::{End, Veth};
use enibox::netlink::netns::Namespace;
use enibox::netlink::{KernelError, Socket, addr, link, neigh, route, rule, sysctl};
use ipnet::IpNet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use support::{Netns, in_fresh_netns, must, tool, tool_json};

const HOST_MAC: Mac = Mac([0x02, 0, 0, 0, 0, 0x0a]);
const POD_MAC: Mac = Mac([0x02, 0, 0, 0, 0, 0x0b]);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn kernel_error(error: &enibox::error::Error) -> &KernelError {
    error.find::<KernelError>().unwrap_or_else(|| panic!("not a kernel error: {error}"))
}

fn plain_end(name: &str) -> End<'_> {
    End { name, mac: None, netns: None }
}

/// A veth pair `a` and `b`, both up, in the calling thread's namespace; their links.
fn veth_here(socket: &mut Socket) -> (Link, Link) {
    must(socket, &[link::create_veth(&Veth { end: plain_end("a"), peer: plain_end("b"), mtu: 0, up: true })]);
    let a = link::by_name(socket, "a").unwrap().unwrap();
    must(socket, &[link::set_up(a.parent.unwrap())]);
    (a, link::by_name(socket, "b").unwrap().unwrap())
}

#[test]
fn a_veth_is_complete_after_one_message() {
    let pod = Netns::new("pod");
    in_fresh_netns(|| {
        let mut host = Socket::route().unwrap();
        let veth = Veth {
            end: End { name: "eni0123456789a", mac: Some(HOST_MAC), netns: None },
            peer: End { name: "eth0", mac: Some(POD_MAC), netns: Some(pod.handle().as_fd()) },
            mtu: 9001,
            up: true,
        };
        // One send: create it and learn both indices.
        let mut outcomes = host.batch(&[link::create_veth(&veth), link::query("eni0123456789a")]).unwrap();
        let answer = outcomes.pop().unwrap().unwrap();
        assert_eq!(outcomes, [Ok(vec![])]);
        let near = link::decode(&answer[0]).unwrap();
        let mut inside = pod.route();
        let far = link::by_name(&mut inside, "eth0").unwrap().unwrap();
        assert!(!far.up, "the kernel cannot open the peer before the two are joined");
        must(&mut inside, &[link::set_up(far.index)]);
        let far = link::by_index(&mut inside, far.index).unwrap().unwrap();
        let expected = |index, name: &str, mac, parent| Link {
            index,
            name: name.into(),
            mac: Some(mac),
            mtu: 9001,
            up: true,
            parent: Some(parent),
            kind: Some("veth".into()),
            master: None,
        };
        assert_eq!(near, expected(near.index, "eni0123456789a", HOST_MAC, far.index));
        assert_eq!(far, expected(far.index, "eth0", POD_MAC, near.index));
        if let Some(seen) = tool_json("ip", &["-j", "link", "show", "eni0123456789a"]) {
            assert_eq!((seen[0]["mtu"].as_u64(), seen[0]["address"].as_str()), (Some(9001), Some("02:00:00:00:00:0a")));
            assert_eq!(seen[0]["operstate"], "UP");
            assert_eq!(seen[0]["txqlen"], 1000);
        }
        let error = host.run(&[link::create_veth(&veth)]).unwrap_err();
        assert_eq!(error.to_string(), "add link eni0123456789a type veth peer eth0: File exists");

        must(&mut host, &[link::delete_by_name("eni0123456789a")]);
        assert_eq!(link::by_name(&mut pod.route(), "eth0").unwrap(), None, "the peer goes too");
    });
}

#[test]
fn a_veth_can_be_created_from_the_pod_with_its_peer_in_the_host() {
    let (host, pod) = (Netns::new("host"), Netns::new("pod"));
    let end = End { name: "eth0", mac: None, netns: Some(pod.handle().as_fd()) };
    let peer = End { name: "eni1", mac: Some(HOST_MAC), netns: None };
    must(&mut host.route(), &[link::create_veth(&Veth { end, peer, mtu: 1400, up: true })]);
    let pod_end = link::by_name(&mut pod.route(), "eth0").unwrap().unwrap();
    let host_end = link::by_name(&mut host.route(), "eni1").unwrap().unwrap();
    assert_eq!((pod_end.up, pod_end.mtu), (true, 1400));
    assert_eq!((host_end.up, host_end.mtu, host_end.mac), (false, 1400, Some(HOST_MAC)));
}

#[test]
fn links_are_changed_moved_and_deleted() {
    let other = Netns::new("other");
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let (a, b) = veth_here(&mut socket);
        let requests = [
            link::set_down(a.index),
            link::set_mtu(a.index, 1300),
            link::set_mac(a.index, POD_MAC),
            link::rename(a.index, "renamed"),
        ];
        must(&mut socket, &requests);
        let seen = link::by_index(&mut socket, a.index).unwrap().unwrap();
        assert_eq!((seen.name.as_str(), seen.mtu, seen.mac, seen.up), ("renamed", 1300, Some(POD_MAC), false));
        must(&mut socket, &[link::set_up(a.index)]);
        assert!(link::by_index(&mut socket, a.index).unwrap().unwrap().up);
        let names = link::list(&mut socket).unwrap().into_iter().map(|link| link.name).collect::<Vec<_>>();
        assert_eq!(names.len(), 3);
        assert!(["lo", "renamed", "b"].iter().all(|name| names.contains(&(*name).to_owned())), "{names:?}");

        must(&mut socket, &[link::move_to(b.index, other.handle().as_fd())]);
        assert_eq!(link::by_name(&mut socket, "b").unwrap(), None);
        assert!(link::by_name(&mut other.route(), "b").unwrap().is_some());

        must(&mut socket, &[link::delete(a.index)]);
        assert_eq!(link::by_index(&mut socket, a.index).unwrap(), None);
        let error = socket.run(&[link::delete(a.index)]).unwrap_err();
        assert!(kernel_error(&error).not_found(), "{error}");
        socket.run(&[link::delete_by_name("renamed").or_not_found()]).unwrap();
    });
}

/// Whether a refusal says that this kernel has no such type of link.
fn unsupported(outcome: &enibox::netlink::Outcome, kind: &str) -> bool {
    let lacking = matches!(outcome, Err(error) if error.errno == libc::EOPNOTSUPP);
    if lacking {
        println!("SKIP {kind}: this kernel has no {kind} links");
    }
    lacking
}

#[test]
fn vlan_links_are_created_where_the_kernel_has_them() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let (a, _) = veth_here(&mut socket);
        let outcome = socket.batch(&[link::create_vlan("vlan.eth.5", a.index, 5, Some(POD_MAC))]).unwrap().remove(0);
        if unsupported(&outcome, "vlan") {
            return;
        }
        outcome.unwrap();
        let seen = link::by_name(&mut socket, "vlan.eth.5").unwrap().unwrap();
        assert_eq!((seen.parent, seen.mac, seen.kind.as_deref()), (Some(a.index), Some(POD_MAC), Some("vlan")));
        if let Some(seen) = tool_json("ip", &["-j", "-d", "link", "show", "vlan.eth.5"]) {
            assert_eq!(seen[0]["linkinfo"]["info_data"]["id"], 5);
        }
    });
}

#[test]
fn dummy_links_are_created_where_the_kernel_has_them() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let outcome = socket.batch(&[link::create_dummy("d0")]).unwrap().remove(0);
        if unsupported(&outcome, "dummy") {
            return;
        }
        outcome.unwrap();
        assert_eq!(link::by_name(&mut socket, "d0").unwrap().unwrap().kind.as_deref(), Some("dummy"));
    });
}

#[test]
fn addresses_are_added_listed_and_deleted() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let (a, _) = veth_here(&mut socket);
        let v4 = Address { dev: a.index, addr: net("10.20.12.5/24"), no_prefix_route: true, no_dad: false };
        let pod = Address { dev: a.index, addr: net("10.20.12.60/32"), no_prefix_route: false, no_dad: false };
        let v6 = Address { dev: a.index, addr: net("fd00::5/128"), no_prefix_route: false, no_dad: true };
        must(&mut socket, &[addr::add(&v4), addr::add(&pod), addr::add(&v6)]);
        assert_eq!(addr::list(&mut socket, Some(Family::V4)).unwrap(), [v4, pod]);
        let all = addr::list(&mut socket, None).unwrap();
        assert!(all.contains(&v4) && all.contains(&v6), "{all:?}");
        assert!(route::list(&mut socket, Family::V4, Some(TABLE_MAIN)).unwrap().is_empty(), "no connected route");
        if let Some(seen) = tool_json("ip", &["-j", "-4", "address", "show", "dev", "a"]) {
            let info = &seen[0]["addr_info"];
            assert_eq!((&info[0]["local"], &info[0]["broadcast"]), (&"10.20.12.5".into(), &"10.20.12.255".into()));
            assert_eq!((&info[0]["noprefixroute"], &info[0]["scope"]), (&true.into(), &"global".into()));
            assert_eq!((&info[1]["local"], info[1].get("broadcast")), (&"10.20.12.60".into(), None));
        }
        let error = socket.run(&[addr::add(&pod)]).unwrap_err();
        assert!(kernel_error(&error).exists(), "{error}");
        must(&mut socket, &[addr::delete(&v4), addr::delete(&v6)]);
        assert_eq!(addr::list(&mut socket, Some(Family::V4)).unwrap(), [pod]);
        let error = socket.run(&[addr::delete(&v4)]).unwrap_err();
        assert!(kernel_error(&error).not_found(), "{error}");
    });
}

#[test]
fn duplicate_address_detection_can_be_watched() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let (a, _) = veth_here(&mut socket);
        let checked = Address { dev: a.index, addr: net("fd00::9/64"), no_prefix_route: false, no_dad: false };
        must(&mut socket, &[addr::add(&checked)]);
        assert!(addr::tentative(&mut socket, a.index).unwrap() > 0);
        assert_eq!(addr::tentative(&mut socket, 1).unwrap(), 0, "lo has none");
    });
}

#[test]
fn routes_are_added_replaced_and_deleted_with_wildcards() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let (a, b) = veth_here(&mut socket);
        let gateway = Route {
            table: 10_001,
            dst: net("10.20.12.1/32"),
            gateway: None,
            dev: a.index,
            scope: Scope::Link,
            prefsrc: None,
            metric: 0,
        };
        let default =
            Route { dst: net("0.0.0.0/0"), gateway: Some(ip("10.20.12.1")), scope: Scope::Universe, ..gateway };
        let pod = Route { table: TABLE_MAIN, dst: net("10.20.12.60/32"), ..gateway };
        assert!(route::list(&mut socket, Family::V4, Some(10_001)).unwrap().is_empty(), "a table that never was");
        must(&mut socket, &[route::replace(&gateway), route::replace(&default), route::add(&pod)]);
        assert_eq!(route::list(&mut socket, Family::V4, Some(10_001)).unwrap(), [default, gateway]);
        assert_eq!(route::list(&mut socket, Family::V4, Some(TABLE_MAIN)).unwrap(), [pod]);
        assert_eq!(route::list(&mut socket, Family::V4, None).unwrap().len(), 3);
        if let Some(text) = tool("ip", &["route", "show", "table", "10001"]) {
            // No `proto`: what protocol boot looks like.
            let lines = text.lines().map(str::trim_end).collect::<Vec<_>>();
            assert_eq!(lines, ["default via 10.20.12.1 dev a", "10.20.12.1 dev a scope link"]);
        }
        let error = socket.run(&[route::add(&pod)]).unwrap_err();
        assert!(kernel_error(&error).exists(), "{error}");
        must(&mut socket, &[route::replace(&Route { dev: b.index, ..pod })]);
        assert_eq!(route::list(&mut socket, Family::V4, Some(TABLE_MAIN)).unwrap()[0].dev, b.index);

        let found = route::lookup(&mut socket, ip("10.20.12.60"), None, 0, 0).unwrap().unwrap();
        assert_eq!((found.dev, found.gateway), (b.index, None));
        assert_eq!(route::lookup(&mut socket, ip("192.0.2.1"), None, 0, 0).unwrap(), None);

        must(&mut socket, &[route::delete(&Route { dev: 0, ..pod })]);
        assert!(route::list(&mut socket, Family::V4, Some(TABLE_MAIN)).unwrap().is_empty());
        let error = socket.run(&[route::delete(&Route { dev: 0, ..pod })]).unwrap_err();
        assert_eq!(kernel_error(&error).errno, libc::ESRCH);
        socket.run(&[route::delete(&pod).or_not_found()]).unwrap();
    });
}

#[test]
fn ipv6_routes_come_back_as_written() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let (a, _) = veth_here(&mut socket);
        let pod = Route {
            table: 300,
            dst: net("2001:db8::60/128"),
            gateway: None,
            dev: a.index,
            scope: Scope::Universe,
            prefsrc: None,
            metric: 1024,
        };
        let default = Route { dst: net("::/0"), gateway: Some(ip("fe80::1")), ..pod };
        must(&mut socket, &[route::add(&pod), route::add(&default)]);
        let mut seen = route::list(&mut socket, Family::V6, Some(300)).unwrap();
        seen.sort();
        assert_eq!(seen, [default, pod]);
        must(&mut socket, &[route::delete(&Route { metric: 0, dev: 0, ..pod })]);
        assert_eq!(route::list(&mut socket, Family::V6, Some(300)).unwrap(), [default]);
    });
}

#[test]
fn rules_are_added_listed_and_deleted() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let pod = net("10.20.12.60/32");
        let rules = [
            Rule { iif: Some("vlan.eth.1".into()), ..Rule::any(Family::V4, 10, 101) },
            Rule::to(pod, 512, TABLE_MAIN),
            Rule { fwmark: Some((0x80, 0x80)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) },
            Rule::from(pod, 1536, 10_002),
            Rule { dst: Some(net("10.0.0.0/8")), ..Rule::from(pod, 1537, 2) },
            Rule { ipproto: Some(6), ..Rule::any(Family::V4, 1538, 2) },
        ];
        must(&mut socket, &rules.iter().map(rule::add).collect::<Vec<_>>());
        let seen = rule::list(&mut socket, Family::V4).unwrap();
        assert_eq!(seen[1..=rules.len()], rules, "behind the local rule, before main and default");
        assert!(seen.iter().all(|rule| !rule.foreign));
        if let Some(text) = tool("ip", &["rule"]) {
            let lines = text.lines().map(|line| line.replace('\t', " ").trim_end().to_owned()).collect::<Vec<_>>();
            let ours = seen.iter().map(ToString::to_string).collect::<Vec<_>>();
            let ours = ours.iter().map(|line| line.replace("iif vlan.eth.1", "iif vlan.eth.1 [detached]"));
            let ours = ours.map(|line| line.replace("ipproto 6", "ipproto tcp")).collect::<Vec<_>>();
            assert_eq!(lines, ours);
        }
        let outcomes = socket.batch(&[rule::add(&rules[1]), rule::add(&Rule::to(pod, 512, 7))]).unwrap();
        assert!(outcomes[0].as_ref().unwrap_err().exists());
        assert!(outcomes[1].is_ok(), "another table is another rule, and the refusal before it stops nothing");
        let error = socket.run(&[rule::add(&rules[1])]).unwrap_err();
        assert_eq!(error.to_string(), "add rule 512 to 10.20.12.60 lookup 254: File exists");
        socket.run(&[rule::add(&rules[1]).or_exists()]).unwrap();

        let any_table = Rule::to(pod, 512, 0);
        assert_eq!(rule::delete_all(&mut socket, &any_table).unwrap(), 2);
        let error = socket.run(&[rule::delete(&any_table)]).unwrap_err();
        assert_eq!(error.to_string(), "delete rule 512 to 10.20.12.60: No such file or directory");
        assert_eq!(rule::delete_all(&mut socket, &Rule::any(Family::V4, 10, 101)).unwrap(), 1, "without its iif");
        assert_eq!(rule::list(&mut socket, Family::V4).unwrap().len(), 3 + rules.len() - 2);
    });
}

#[test]
fn ipv6_rules_have_their_own_list() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let ours = Rule::from(net("2001:db8::60/128"), 1536, 300);
        must(&mut socket, &[rule::add(&ours)]);
        assert!(rule::list(&mut socket, Family::V6).unwrap().contains(&ours));
        assert!(!rule::list(&mut socket, Family::V4).unwrap().iter().any(|rule| rule.priority == 1536));
    });
}

#[test]
fn rules_beyond_the_model_are_foreign() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let foreign: &[&[&str]] = &[
            &["from", "10.0.0.1", "oif", "lo", "lookup", "9"],
            &["from", "10.0.0.1", "tos", "0x10", "lookup", "9"],
            &["not", "from", "10.0.0.1", "lookup", "9"],
            &["from", "10.0.0.1", "blackhole"],
            &["from", "10.0.0.1", "lookup", "9", "suppress_prefixlength", "0"],
            &["from", "10.0.0.1", "uidrange", "1-2", "lookup", "9"],
            &["from", "10.0.0.1", "ipproto", "tcp", "dport", "53", "lookup", "9"],
        ];
        for words in foreign {
            let priority = ["rule", "add", "priority", "77"];
            if tool("ip", &[&priority[..], words].concat()).is_none() {
                return;
            }
            let seen = rule::list(&mut socket, Family::V4).unwrap();
            let seen = seen.into_iter().filter(|rule| rule.priority == 77).collect::<Vec<_>>();
            assert_eq!((seen.len(), seen[0].foreign), (1, true), "{words:?}");
            tool("ip", &["rule", "del", "priority", "77"]);
        }
    });
}

#[test]
fn large_batches_are_cut_and_each_outcome_is_told() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let addresses = (0..450u16).map(|n| {
            let [high, low] = n.to_be_bytes();
            Rule::to(IpNet::from(IpAddr::from([10, 0, high, low])), 512, TABLE_MAIN)
        });
        let requests = addresses.map(|rule| rule::add(&rule)).collect::<Vec<_>>();
        must(&mut socket, &requests);
        assert_eq!(rule::list(&mut socket, Family::V4).unwrap().len(), 453, "a dump of several messages");
        let outcomes = socket.batch(&requests).unwrap();
        assert_eq!(outcomes.len(), 450);
        for (request, outcome) in requests.iter().zip(&outcomes) {
            let error = outcome.as_ref().unwrap_err();
            assert!(error.exists() && error.what == request.what, "{error}");
        }
        assert!(socket.batch(&[]).unwrap().is_empty());
    });
}

#[test]
fn neighbours_are_added_replaced_and_deleted() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let (a, b) = veth_here(&mut socket);
        for addr in ["169.254.1.1", "fe80::1"].map(ip) {
            let entry = Neighbour { dev: a.index, addr, mac: Some(HOST_MAC), permanent: true };
            must(&mut socket, &[neigh::add(&entry)]);
            assert!(neigh::list(&mut socket, Some(Family::of(addr))).unwrap().contains(&entry));
            if let Some(seen) = tool_json("ip", &["-j", "neigh", "show", &addr.to_string()]) {
                assert_eq!(seen[0]["lladdr"], HOST_MAC.to_string());
                assert_eq!(seen[0]["state"][0], "PERMANENT");
            }
            let error = socket.run(&[neigh::add(&entry)]).unwrap_err();
            assert!(kernel_error(&error).exists(), "{error}");
            let other = Neighbour { mac: Some(POD_MAC), ..entry };
            must(&mut socket, &[neigh::replace(&other), neigh::add(&Neighbour { dev: b.index, ..entry })]);
            assert!(neigh::list(&mut socket, None).unwrap().contains(&other));
            assert_eq!(neigh::delete_everywhere(&mut socket, addr).unwrap(), 2);
            assert!(!neigh::list(&mut socket, None).unwrap().iter().any(|entry| entry.addr == addr));
            let error = socket.run(&[neigh::delete(a.index, addr)]).unwrap_err();
            assert!(kernel_error(&error).not_found(), "{error}");
        }
    });
}

#[test]
fn the_kernel_explains_refusals() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let (a, _) = veth_here(&mut socket);
        let unreachable = Route {
            table: TABLE_MAIN,
            dst: net("0.0.0.0/0"),
            gateway: Some(ip("192.0.2.1")),
            dev: a.index,
            scope: Scope::Universe,
            prefsrc: None,
            metric: 0,
        };
        let error = socket.run(&[route::add(&unreachable)]).unwrap_err();
        let expected = format!(
            "add route default via 192.0.2.1 dev if{}: Network is unreachable (Nexthop has invalid gateway)",
            a.index
        );
        assert_eq!(error.to_string(), expected);
    });
}

#[test]
fn namespaces_are_named_entered_and_deleted() {
    let namespace = Netns::new("named");
    let own = Namespace::own().unwrap();
    assert_ne!(namespace.handle().id().unwrap(), own.id().unwrap());
    let inside = namespace.run(|| Namespace::own().unwrap().id().unwrap());
    assert_eq!(inside, namespace.handle().id().unwrap());
    assert_eq!(Namespace::own().unwrap().id().unwrap(), own.id().unwrap(), "the caller stays where it was");
    let path = namespace.path();
    assert_eq!(Namespace::open(&path).unwrap().id().unwrap(), inside);
    let directory = path.parent().unwrap().to_owned();
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    let error = Namespace::create_named(&directory, &name).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EEXIST), "{error}");
    drop(namespace);
    assert!(!path.exists());
    Namespace::delete_named(&directory, &name).unwrap();
}

#[test]
fn a_plain_file_is_no_namespace() {
    let file = std::env::temp_dir().join(format!("enibox-plain-{}", std::process::id()));
    std::fs::write(&file, "").unwrap();
    let error = Namespace::open(&file).unwrap_err();
    std::fs::remove_file(&file).unwrap();
    assert!(error.to_string().contains("the file is no namespace"), "{error}");
    assert_eq!(Namespace::open(&file).unwrap_err().errno(), Some(libc::ENOENT));
}

#[test]
fn sysctls_belong_to_the_namespace() {
    let namespace = Netns::new("sysctl");
    const FORWARD: &str = "net/ipv4/ip_forward";
    in_fresh_netns(|| {
        sysctl::set(FORWARD, "0").unwrap();
        namespace.run(|| {
            sysctl::set(FORWARD, "0").unwrap();
            assert!(sysctl::set(FORWARD, "1").unwrap(), "changed");
            assert!(!sysctl::set(FORWARD, "1").unwrap(), "already so");
            assert_eq!(sysctl::read(FORWARD).unwrap(), "1");
        });
        assert_eq!(sysctl::read(FORWARD).unwrap(), "0", "the other namespace");
        let error = sysctl::set("net/ipv4/conf/nope/rp_filter", "2").unwrap_err();
        assert!(sysctl::missing(&error), "{error}");
        let error = sysctl::set(FORWARD, "no number").unwrap_err();
        assert!(!sysctl::missing(&error) && error.to_string().starts_with("write \"no number\" to sysctl"), "{error}");
    });
}
