//! Counters, tracked connections and notifications: what happens while traffic flows and others make changes.

use super::nft::{chain, daddr, default_table, expr_counter_zero, nft_rule};
use super::support::{in_fresh_netns, must};
use super::{POD_MAC, ip, net, veth_here};
use enibox::model::net::{Address, Family, Neighbour, Route, Rule, Scope};
use enibox::model::nft::{ChainKind, Expr, Hook, Table};
use enibox::netlink::monitor::{Monitor, Notice};
use enibox::netlink::{Socket, addr, conntrack, link, neigh, nft, route, rule, sysctl};
use ipnet::IpNet;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

/// A UDP packet from `from` to `to`, each an address of this namespace.
fn send_udp(from: &str, to: &str) -> (UdpSocket, UdpSocket) {
    let receiver = UdpSocket::bind((ip(to), 0)).unwrap();
    receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let sender = UdpSocket::bind((ip(from), 0)).unwrap();
    sender.send_to(b"hello", receiver.local_addr().unwrap()).unwrap();
    receiver.recv(&mut [0; 8]).unwrap();
    (sender, receiver)
}

fn loopback_up(socket: &mut Socket) {
    must(socket, &[link::set_up(1)]);
}

#[test]
fn counters_are_read_and_connections_forgotten() {
    in_fresh_netns(|| {
        loopback_up(&mut Socket::route().unwrap());
        let mut socket = Socket::netfilter().unwrap();
        let rule = nft_rule(vec![daddr("127.0.0.0/8"), Expr::CtStateNew, Expr::COUNTER], "");
        let table = Table {
            family: Family::V4,
            name: "count".into(),
            comment: None,
            chains: vec![chain("in", Some((ChainKind::Filter, Hook::Input, 0)), vec![rule])],
        };
        nft::commit(&mut socket, &table).unwrap();
        let kept = [send_udp("127.0.0.1", "127.0.0.2"), send_udp("127.0.0.3", "127.0.0.1")];
        let seen = nft::table(&mut socket, Family::V4, "count").unwrap().unwrap();
        assert_eq!(seen.chains[0].rules[0].exprs[2], Expr::Counter { packets: 2, bytes: 2 * (20 + 8 + 5) });
        assert_eq!(expr_counter_zero(seen), table);

        assert_eq!(conntrack::delete_all(&mut socket, ip("127.0.0.9")).unwrap(), 0);
        assert_eq!(conntrack::delete_all(&mut socket, ip("127.0.0.2")).unwrap(), 1, "by its destination");
        assert_eq!(conntrack::delete_all(&mut socket, ip("127.0.0.1")).unwrap(), 1, "only the other is left");
        assert_eq!(conntrack::delete_all(&mut socket, ip("127.0.0.3")).unwrap(), 0);
        assert_eq!(conntrack::delete_all(&mut socket, ip("fd00::1")).unwrap(), 0);
        drop(kept);
    });
}

#[test]
fn changes_are_told_as_they_happen() {
    in_fresh_netns(|| {
        let mut monitor = Monitor::open(true).unwrap();
        assert_eq!(monitor.next(Duration::ZERO).unwrap(), None);
        let mut socket = Socket::route().unwrap();
        let (a, _) = veth_here(&mut socket);
        let address = Address { dev: a.index, addr: net("10.0.0.1/32"), no_prefix_route: true, no_dad: false };
        let route = Route {
            table: 9,
            dst: net("10.0.0.2/32"),
            gateway: None,
            dev: a.index,
            scope: Scope::Link,
            prefsrc: None,
            metric: 0,
        };
        let ours = Rule::to(net("10.0.0.2/32"), 512, 9);
        let entry = Neighbour { dev: a.index, addr: ip("10.0.0.2"), mac: Some(POD_MAC), permanent: true, noarp: false };
        let requests = [addr::add(&address), route::add(&route), rule::add(&ours), neigh::add(&entry)];
        must(&mut socket, &requests);
        let gone =
            [neigh::delete(a.index, entry.addr), rule::delete(&ours), route::delete(&route), addr::delete(&address)];
        must(&mut socket, &gone);
        must(&mut socket, &[link::delete(a.index)]);
        nft::commit(&mut Socket::netfilter().unwrap(), &default_table()).unwrap();

        let mut notices = Vec::new();
        while let Some(notice) = monitor.next(Duration::from_millis(300)).unwrap() {
            notices.push(notice);
        }
        // Route and nf_tables notices come by different sockets, so the last one may stand anywhere.
        let ruleset = |notice: &Notice| matches!(notice, Notice::Ruleset { tables, .. } if tables.contains("aws-cni"));
        let rulesets = notices.iter().filter(|notice| ruleset(notice)).count();
        assert_eq!(rulesets, 1);
        let mut told = |expected: &Notice| {
            let at = notices.iter().position(|notice| notice == expected);
            notices.drain(..=at.unwrap_or_else(|| panic!("{expected:?} is not (in order) among {notices:?}")));
        };
        for expected in [
            Notice::Address(address),
            Notice::Route(route),
            Notice::Rule(ours.clone()),
            Notice::Neighbour(entry),
            Notice::RuleGone(ours),
            Notice::RouteGone(route),
            Notice::AddressGone(address),
        ] {
            told(&expected);
        }
        assert!(
            notices.iter().any(|notice| matches!(notice, Notice::LinkGone(link) if link.name == "a")),
            "{notices:?}"
        );
    });
}

#[test]
fn of_neighbours_only_those_that_are_asked_no_more_are_told() {
    in_fresh_netns(|| {
        let mut socket = Socket::route().unwrap();
        let (a, b) = veth_here(&mut socket);
        let mut monitor = Monitor::open(false).unwrap();
        let states = [(false, false), (true, false), (false, true)];
        for (addr, (permanent, noarp)) in
            ["10.0.0.2", "fe80::2"].iter().flat_map(|addr| states.map(|state| (*addr, state)))
        {
            let entry = Neighbour { dev: a.index, addr: ip(addr), mac: Some(POD_MAC), permanent, noarp };
            while monitor.next(Duration::ZERO).unwrap().is_some() {}
            must(&mut socket, &[neigh::replace(&entry), neigh::delete(a.index, entry.addr)]);
            // Something else behind it, so that nothing has to be waited for.
            let mark = Rule::to(net("10.0.0.2/32"), 512, 9);
            must(&mut socket, &[rule::add(&mark), rule::delete(&mark)]);
            let told = std::iter::from_fn(|| monitor.next(Duration::from_secs(5)).unwrap());
            let told = told.take_while(|notice| *notice != Notice::RuleGone(mark.clone()));
            let told = told.filter(|notice| matches!(notice, Notice::Neighbour(_))).collect::<Vec<_>>();
            let expected = if permanent || noarp { vec![Notice::Neighbour(entry)] } else { Vec::new() };
            assert_eq!(told, expected);
        }
        // The kernel's own work with them never reaches the queue: else this would be told as lost notices.
        must(
            &mut socket,
            &[addr::add(&Address { dev: a.index, addr: net("10.0.0.1/32"), no_prefix_route: true, no_dad: false })],
        );
        let many = (0..250u8).map(|n| Neighbour {
            dev: b.index,
            addr: [10, 9, 0, n].into(),
            mac: Some(POD_MAC),
            permanent: false,
            noarp: false,
        });
        let many =
            many.flat_map(|entry| [neigh::replace(&entry), neigh::delete(b.index, entry.addr)]).collect::<Vec<_>>();
        for _ in 0..40 {
            must(&mut socket, &many);
        }
        let told = std::iter::from_fn(|| monitor.next(Duration::ZERO).unwrap()).collect::<Vec<_>>();
        assert!(!told.iter().any(|notice| matches!(notice, Notice::Neighbour(_) | Notice::Overrun)), "{told:?}");
        let all = neigh::list_static(&mut socket).unwrap();
        assert!(all.iter().all(|entry| entry.dev != b.index), "{all:?}");
    });
}

#[test]
fn settings_of_both_families_are_told() {
    in_fresh_netns(|| {
        let mut monitor = Monitor::open(false).unwrap();
        // The kernel tells of a change alone, and a new namespace may have what the first one has.
        for (path, family) in [("net/ipv4/ip_forward", Family::V4), ("net/ipv6/conf/all/forwarding", Family::V6)] {
            for value in [1, 0] {
                sysctl::set(path, &value.to_string()).unwrap();
                while monitor.next(Duration::ZERO).unwrap().is_some() {}
                sysctl::set(path, &(1 - value).to_string()).unwrap();
                let told = std::iter::from_fn(|| monitor.next(Duration::from_millis(300)).unwrap()).any(|notice| {
                    matches!(notice, Notice::Conf { family: of, dev: -1, forwarding: Some(now), .. }
                        if of == family && now == 1 - value)
                });
                assert!(told, "{path} = {}", 1 - value);
            }
        }
    });
}

#[test]
fn lost_notices_are_told() {
    in_fresh_netns(|| {
        let mut monitor = Monitor::open(false).unwrap();
        let mut socket = Socket::route().unwrap();
        let rules = (0..100u8).map(|n| Rule::to(IpNet::from(IpAddr::from([10, 0, 0, n])), 512, 9));
        let rules = rules.collect::<Vec<_>>();
        let add = rules.iter().map(rule::add).collect::<Vec<_>>();
        let delete = rules.iter().map(rule::delete).collect::<Vec<_>>();
        for _ in 0..40 {
            must(&mut socket, &add);
            must(&mut socket, &delete);
        }
        let mut overruns = 0;
        while let Some(notice) = monitor.next(Duration::ZERO).unwrap() {
            overruns += usize::from(notice == Notice::Overrun);
        }
        assert!(overruns > 0, "8000 notices do not fit into the queue");
        must(&mut socket, &add[..1]);
        assert_eq!(monitor.next(Duration::from_secs(5)).unwrap(), Some(Notice::Rule(rules[0].clone())));
    });
}
