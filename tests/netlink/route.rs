//! Addresses, routes, rules and neighbours.

use super::support::{in_fresh_netns, must, tool, tool_json};
use super::{HOST_MAC, POD_MAC, ip, kernel_error, net, veth_here};
use enibox::model::net::{Address, Family, Neighbour, Route, Rule, Scope, TABLE_MAIN};
use enibox::netlink::netns::Namespace;
use enibox::netlink::{Socket, addr, link, neigh, route, rule, sysctl};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
        // A second for each: for as long as the test looks.
        sysctl::set("net/ipv6/conf/a/dad_transmits", "60").unwrap();
        must(&mut socket, &[addr::add(&checked)]);
        assert!(!route::is_local(&mut socket, ip("fd00::9")).unwrap(), "it is being checked");
        must(&mut socket, &[addr::add(&Address { addr: net("fd00::a/64"), no_dad: true, ..checked })]);
        let end = enibox::clock::instant() + std::time::Duration::from_secs(10);
        while !route::is_local(&mut socket, ip("fd00::a")).unwrap() {
            assert!(enibox::clock::instant() < end, "nothing is to be checked");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
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
        let before = rule::list(&mut socket, Family::V4).unwrap().len();
        rule::delete_all(&mut socket, &any_table, &|_| true).unwrap();
        assert_eq!(rule::list(&mut socket, Family::V4).unwrap().len(), before - 2);
        let error = socket.run(&[rule::delete(&any_table)]).unwrap_err();
        assert_eq!(error.to_string(), "delete rule 512 to 10.20.12.60: No such file or directory");
        rule::delete_all(&mut socket, &Rule::any(Family::V4, 10, 101), &|_| true).unwrap(); // without its iif
        assert_eq!(rule::list(&mut socket, Family::V4).unwrap().len(), 3 + rules.len() - 2);
    });
}

type List = fn(&mut Socket, Family) -> enibox::error::Result<Vec<Rule>>;

/// Bytes that are read for a list.
fn bytes(socket: &mut Socket, list: List) -> usize {
    let before = socket.bytes_read();
    list(socket, Family::V4).unwrap();
    socket.bytes_read() - before
}

#[test]
fn few_rules_are_listed_once() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        assert_eq!(rule::list_few(&mut socket, Family::V4).unwrap(), rule::list(&mut socket, Family::V4).unwrap());
        assert_eq!(2 * bytes(&mut socket, rule::list_few), bytes(&mut socket, rule::list));
        let rules = (0..1000u16).map(|n| {
            let [high, low] = n.to_be_bytes();
            Rule::to(IpNet::from(IpAddr::from([10, 0, high, low])), 512, TABLE_MAIN)
        });
        must(&mut socket, &rules.map(|rule| rule::add(&rule)).collect::<Vec<_>>());
        assert_eq!(
            2 * bytes(&mut socket, rule::list_few),
            3 * bytes(&mut socket, rule::list),
            "in parts it is watched"
        );
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
        let seen = rule::list(&mut socket, Family::V4).unwrap();
        assert_eq!(seen.len(), 453, "a dump of several messages");
        assert_eq!(rule::list_few(&mut socket, Family::V4).unwrap(), seen);
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
            let entry = Neighbour { dev: a.index, addr, mac: Some(HOST_MAC), permanent: true, noarp: false };
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
            let silent = Neighbour { permanent: false, noarp: true, ..entry };
            must(&mut socket, &[neigh::replace(&silent)]);
            assert!(neigh::list(&mut socket, None).unwrap().contains(&silent));
            must(&mut socket, &[neigh::delete(a.index, addr), neigh::delete(b.index, addr)]);
            assert!(!neigh::list(&mut socket, None).unwrap().iter().any(|entry| entry.addr == addr));
            let error = socket.run(&[neigh::delete(a.index, addr)]).unwrap_err();
            assert!(kernel_error(&error).not_found(), "{error}");
        }
    });
}

#[test]
fn what_lets_nothing_through_is_listed_and_deleted() {
    in_fresh_netns(|| {
        if tool("ip", &["link", "set", "lo", "up"]).is_none() {
            return;
        }
        let mut socket = Socket::route().unwrap();
        let (a, _) = veth_here(&mut socket);
        for (family, at, version) in [(Family::V4, "10.20.12.60", "-4"), (Family::V6, "fd00::60", "-6")] {
            let metric = if family == Family::V6 { 1024 } else { 0 };
            let scope = if family == Family::V6 { Scope::Universe } else { Scope::Link };
            let dst = IpNet::from(ip(at));
            let route = Route { table: TABLE_MAIN, dst, gateway: None, dev: a.index, scope, prefsrc: None, metric };
            must(&mut socket, &[route::add(&route)]);
            for (kind, word) in (6..).zip(["blackhole", "unreachable", "prohibit", "throw"]) {
                tool("ip", &[version, "route", "replace", word, at]).unwrap();
                tool("ip", &[version, "route", "add", word, at, "table", "10001", "metric", "7"]).unwrap();
                let (open, mut closed) = route::list_all(&mut socket, family, None).unwrap();
                closed.sort_by_key(|barrier| barrier.table);
                assert!(!open.contains(&route), "it is in the place of ours");
                let [one, other] = closed[..] else { panic!("{closed:?}") };
                let texts = [format!("{word} {at}"), format!("{word} {at} table 10001 metric 7")];
                let metric = if metric > 0 { format!(" metric {metric}") } else { String::new() };
                assert_eq!([one.to_string(), other.to_string()], [format!("{}{metric}", texts[0]), texts[1].clone()]);
                assert!(one.kind == kind && one.in_place_of(&route) && !other.in_place_of(&route));
                // Ours takes its place back, or is found behind it when it goes.
                must(&mut socket, &[route::replace(&route), route::delete_barrier(&other)]);
                tool("ip", &[version, "route", "append", word, at]).unwrap();
                must(&mut socket, &[route::delete_barrier(&one)]);
                let (open, closed) = route::list_all(&mut socket, family, None).unwrap();
                assert!(open.contains(&route) && closed.is_empty(), "{open:?} {closed:?}");
            }
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
fn a_list_that_changes_meanwhile_is_whole_or_refused() {
    in_fresh_netns(|| {
        let namespace = Namespace::own().unwrap();
        let mut socket = Socket::route().unwrap();
        let rules = (0..1000u16).map(|n| {
            let [high, low] = n.to_be_bytes();
            Rule::to(IpNet::from(IpAddr::from([10, 0, high, low])), 512, TABLE_MAIN)
        });
        let rules = rules.collect::<Vec<_>>();
        must(&mut socket, &rules.iter().map(rule::add).collect::<Vec<_>>());
        // Changes that come faster than lists, about as fast, and slower ones on any machine.
        let begin = enibox::clock::instant();
        assert_eq!(rule::list(&mut socket, Family::V4).unwrap().len(), rules.len() + 3);
        let (fast, even) = (Duration::from_millis(1), begin.elapsed());
        let slow = Duration::from_millis(20).max(5 * even);
        let lists = [
            (fast, 10, rule::list as List),
            (even, 10, rule::list),
            (slow, 20, rule::list),
            (slow, 20, rule::list_few),
        ];
        for (pause, count, list) in lists {
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut socket = Socket::route_in(&namespace).unwrap();
                    let early = Rule::to(net("192.0.2.1/32"), 1, TABLE_MAIN);
                    while !done.load(Ordering::Relaxed) {
                        must(&mut socket, &[rule::add(&early)]);
                        std::thread::sleep(pause);
                        must(&mut socket, &[rule::delete(&early)]);
                        std::thread::sleep(pause);
                    }
                });
                let lists = (0..count).map(|_| list(&mut socket, Family::V4)).collect::<Vec<_>>();
                done.store(true, Ordering::Relaxed);
                let whole = lists.iter().filter(|list| list.is_ok()).count();
                println!("changes every {pause:?}: {whole} of {count} lists were whole");
                for list in lists {
                    match list {
                        Ok(seen) => {
                            let ours = seen.iter().filter(|rule| rule.priority == 512).collect::<BTreeSet<_>>();
                            assert_eq!(ours.len(), rules.len());
                        }
                        Err(error) => assert!(error.to_string().contains("changed during each"), "{error}"),
                    }
                }
                assert!(whole > 0 || pause != slow, "every list was refused");
            });
        }
    });
}

// The notices of others' changes fill the queue of the socket that lists, and what it is then not told must not be waited for.
#[test]
fn a_list_in_a_storm_of_changes_leaves_the_socket_usable() {
    in_fresh_netns(|| {
        let namespace = Namespace::own().unwrap();
        let mut socket = Socket::route().unwrap();
        let rule_of = |third: u8, n: u16| {
            let [high, low] = n.to_be_bytes();
            Rule::to(IpNet::from(IpAddr::from([10, third, high, low])), 512, TABLE_MAIN)
        };
        let rules = (0..2000).map(|n| rule_of(0, n)).collect::<Vec<_>>();
        must(&mut socket, &rules.iter().map(rule::add).collect::<Vec<_>>());
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for third in [1, 2] {
                let (done, namespace) = (&done, &namespace);
                scope.spawn(move || {
                    let mut socket = Socket::route_in(namespace).unwrap();
                    let rules = (0..2000).map(|n| rule_of(third, n)).collect::<Vec<_>>();
                    let (add, delete) = (rules.iter().map(rule::add), rules.iter().map(rule::delete));
                    let (add, delete) = (add.collect::<Vec<_>>(), delete.collect::<Vec<_>>());
                    while !done.load(Ordering::Relaxed) {
                        must(&mut socket, &add);
                        must(&mut socket, &delete);
                    }
                });
            }
            let look = |_| (rule::list(&mut socket, Family::V4), link::list(&mut socket));
            let looks = (0..10).map(look).collect::<Vec<_>>();
            done.store(true, Ordering::Relaxed);
            for (list, links) in looks {
                if let Err(error) = list {
                    assert!(error.to_string().contains("changed during each"), "{error}");
                }
                assert_eq!(links.unwrap().len(), 1, "the next answer is there, whatever became of the list");
            }
        });
        let mut seen = rule::list(&mut socket, Family::V4).unwrap();
        seen.retain(|rule| rule.priority == 512);
        assert_eq!(seen.len(), rules.len());
    });
}
