//! nf_tables: what we send, what the kernel gives back, and what the `nft` tool says to both.

use super::support::{in_fresh_netns, tool, tool_with_input};
use super::{ip, net};
use enibox::model::net::Family;
use enibox::model::nft::{Base, Chain, ChainKind, Expr, Hook, Rule, SnatPorts, Table};
use enibox::netlink::{Socket, nft};
use ipnet::IpNet;
use std::net::IpAddr;

/// The script of the default rule set, as an operator would load it.
const DEFAULT_SCRIPT: &str = include_str!("../../testdata/nft/default.nft");
const EGRESS_SCRIPT: &str = include_str!("../../testdata/nft/egress6.nft");

pub fn expr_counter_zero(mut table: Table) -> Table {
    for expr in table.chains.iter_mut().flat_map(|chain| &mut chain.rules).flat_map(|rule| &mut rule.exprs) {
        if let Expr::Counter { packets, bytes } = expr {
            (*packets, *bytes) = (0, 0);
        }
    }
    table
}

pub fn chain(name: &str, base: Option<(ChainKind, Hook, i32)>, rules: Vec<Rule>) -> Chain {
    let base = base.map(|(kind, hook, priority)| Base { kind, hook, priority });
    Chain { name: name.into(), base, rules }
}

pub fn nft_rule(exprs: Vec<Expr>, comment: &str) -> Rule {
    Rule { exprs, comment: (!comment.is_empty()).then(|| comment.to_owned()) }
}

pub fn daddr(text: &str) -> Expr {
    Expr::Daddr { net: net(text), negate: false }
}

/// The default rule set of `spec/dataplane.md` 22.1.
pub fn default_table() -> Table {
    let returns = || {
        [("10.20.0.0/16", "VPC CIDR"), ("100.64.0.0/16", "VPC CIDR"), ("172.16.0.0/12", "excluded CIDR")]
            .map(|(net, comment)| nft_rule(vec![daddr(net), Expr::COUNTER, Expr::Return], comment))
            .to_vec()
    };
    let mut mark = returns();
    mark.push(nft_rule(vec![Expr::COUNTER, Expr::CtMarkSet { bits: 0x80 }], "leaves through the primary ENI"));
    let iif = |name: &str, prefix| Expr::IifName { name: name.into(), prefix, negate: false };
    let primary = vec![
        iif("eth0", false),
        Expr::FibDaddrLocal { iif: true, negate: false },
        Expr::COUNTER,
        Expr::CtMarkSet { bits: 0x80 },
    ];
    let not_local = Expr::FibDaddrLocal { iif: false, negate: true };
    let mut prerouting =
        vec![nft_rule(vec![iif("eni", true), Expr::CtStateNew, not_local.clone(), Expr::Jump("snat-mark".into())], "")];
    for name in ["eni", "vlan"] {
        let set = vec![
            iif(name, true),
            Expr::CtMark { mask: 0x80, value: 0x80 },
            Expr::COUNTER,
            Expr::MetaMarkSet { bits: 0x80 },
        ];
        let clear = vec![
            iif(name, true),
            Expr::CtMark { mask: 0x80, value: 0 },
            Expr::MetaMark { mask: 0x80, value: 0x80 },
            Expr::COUNTER,
            Expr::MetaMarkClear { bits: 0x80 },
        ];
        prerouting.extend([nft_rule(set, "restore"), nft_rule(clear, "restore")]);
    }
    let mut snat = returns();
    let to = Expr::Snat { to: ip("10.20.11.162"), ports: SnatPorts::FullyRandom };
    snat.push(nft_rule(vec![not_local, Expr::COUNTER, to], "SNAT to the primary IP"));
    let outside = Expr::OifName { name: "vlan".into(), prefix: true, negate: true };
    let postrouting = vec![nft_rule(vec![outside, Expr::Jump("snat-primary".into())], "")];
    Table {
        family: Family::V4,
        name: "aws-cni".into(),
        comment: Some("VPC CNI: SNAT and return-path marks".into()),
        chains: vec![
            chain("snat-mark", None, mark),
            chain(
                "mangle-prerouting",
                Some((ChainKind::Filter, Hook::Prerouting, -149)),
                vec![nft_rule(primary, "primary ENI")],
            ),
            chain("nat-prerouting", Some((ChainKind::Filter, Hook::Prerouting, -90)), prerouting),
            chain("snat-primary", None, snat),
            chain("nat-postrouting", Some((ChainKind::Nat, Hook::Postrouting, 110)), postrouting),
        ],
    }
}

/// The egress rule set for IPv6 of `spec/dataplane.md` 22.3.
fn egress_table() -> Table {
    let range = "fd00::ac:0/118";
    let forward = vec![nft_rule(
        vec![daddr(range), Expr::CtStateNew, Expr::COUNTER, Expr::Reject],
        "no new connections to egress addresses",
    )];
    let postrouting = vec![
        nft_rule(vec![Expr::Saddr { net: net(range), negate: true }, Expr::Return], ""),
        nft_rule(vec![daddr("ff00::/8"), Expr::COUNTER, Expr::Accept], "multicast"),
        nft_rule(vec![daddr(range), Expr::COUNTER, Expr::Accept], "host side of an egress link"),
        nft_rule(vec![Expr::COUNTER, Expr::Snat { to: ip("2001:db8::5"), ports: SnatPorts::FullyRandom }], ""),
    ];
    Table {
        family: Family::V6,
        name: "aws-cni".into(),
        comment: None,
        chains: vec![
            chain("egress-forward", Some((ChainKind::Filter, Hook::Forward, -10)), forward),
            chain("egress-postrouting", Some((ChainKind::Nat, Hook::Postrouting, 105)), postrouting),
        ],
    }
}

fn check_ruleset(table: &Table, script: &str) {
    let family = if table.family == Family::V4 { "ip" } else { "ip6" };
    let list = ["-s", "list", "table", family, "aws-cni"];
    in_fresh_netns(|| {
        let mut socket = Socket::netfilter().unwrap();
        assert_eq!(nft::table(&mut socket, table.family, "aws-cni").unwrap(), None);
        nft::commit(&mut socket, table).unwrap();
        assert_eq!(nft::table(&mut socket, table.family, "aws-cni").unwrap().as_ref(), Some(table));
        let Some(listed) = tool("nft", &list) else { return };
        assert_eq!(table.to_string(), listed, "our text is the tool's listing");
        // What the tool makes of the script is the same, for the kernel as for us.
        in_fresh_netns(|| {
            tool_with_input("nft", &["-f", "-"], script);
            assert_eq!(tool("nft", &list).unwrap(), listed);
            let mut socket = Socket::netfilter().unwrap();
            assert_eq!(nft::table(&mut socket, table.family, "aws-cni").unwrap().as_ref(), Some(table));
            // And our listing can be loaded as it stands.
            tool_with_input("nft", &["-f", "-"], &format!("delete table {family} aws-cni\n{table}"));
            assert_eq!(tool("nft", &list).unwrap(), listed);
        });
    });
}

#[test]
fn the_default_ruleset_is_that_of_the_script() {
    check_ruleset(&default_table(), DEFAULT_SCRIPT);
}

#[test]
fn the_egress_ruleset_is_that_of_the_script() {
    check_ruleset(&egress_table(), EGRESS_SCRIPT);
}

#[test]
fn every_expression_survives_the_kernel() {
    let negated = |name: &str, prefix| Expr::IifName { name: name.into(), prefix, negate: true };
    let snat = |ports| vec![Expr::Snat { to: ip("192.0.2.1"), ports }];
    let filter = [
        vec![negated("eth0", false), Expr::OifName { name: "exactly-15-byte".into(), prefix: false, negate: false }],
        vec![negated("eni", true), Expr::Saddr { net: net("192.0.2.7/32"), negate: true }, Expr::Accept],
        vec![daddr("10.0.0.0/8"), Expr::Saddr { net: net("10.128.0.0/9"), negate: false }, Expr::Return],
        vec![Expr::FibDaddrLocal { iif: true, negate: true }, Expr::MetaMark { mask: 0xff00_0000, value: 0x0100_0000 }],
        vec![Expr::MetaMarkClear { bits: 0x8000_0001 }, Expr::Counter { packets: 3, bytes: 1 << 33 }],
        vec![Expr::CtMark { mask: 0x8000_0000, value: 0x8000_0000 }, Expr::MetaMark { mask: 0xf0f0_0000, value: 0 }],
        vec![Expr::FibSaddrLocal { negate: true }, Expr::FromSocket, Expr::FibSaddrLocal { negate: false }],
        vec![Expr::CtMark { mask: 0x80, value: 0 }, Expr::MetaMarkSet { bits: 0x40 }, Expr::Reject],
    ];
    let rules = |list: &[Vec<Expr>]| list.iter().map(|exprs| nft_rule(exprs.clone(), "")).collect::<Vec<_>>();
    let table = Table {
        family: Family::V4,
        name: "every".into(),
        comment: None,
        chains: vec![
            // Every hook and a few priorities around those with names.
            chain("before", Some((ChainKind::Filter, Hook::Prerouting, 7)), rules(&filter[3..5])),
            chain("incoming", Some((ChainKind::Filter, Hook::Input, 0)), rules(&filter[..1])),
            chain("forwarded", Some((ChainKind::Filter, Hook::Forward, -11)), rules(&filter[..])),
            chain("outgoing", Some((ChainKind::Filter, Hook::Output, -300)), vec![]),
            chain("after", Some((ChainKind::Filter, Hook::Postrouting, 91)), rules(&filter[1..3])),
            chain("nat-in", Some((ChainKind::Nat, Hook::Input, 100)), rules(&[snat(SnatPorts::Keep)])),
            chain("nat-out", Some((ChainKind::Nat, Hook::Postrouting, 100)), rules(&[snat(SnatPorts::Random)])),
        ],
    };
    in_fresh_netns(|| {
        let mut socket = Socket::netfilter().unwrap();
        nft::commit(&mut socket, &table).unwrap();
        assert_eq!(nft::table(&mut socket, Family::V4, "every").unwrap().as_ref(), Some(&table));
        if let Some(listed) = tool("nft", &["-s", "list", "table", "ip", "every"]) {
            assert_eq!(expr_counter_zero(table.clone()).to_string(), listed);
            tool_with_input("nft", &["-f", "-"], &format!("delete table ip every\n{listed}"));
            let reloaded = nft::table(&mut socket, Family::V4, "every").unwrap().unwrap();
            assert_eq!(reloaded, expr_counter_zero(table), "the listing means the same");
        }
    });
}

#[test]
fn a_refused_transaction_changes_nothing_and_names_the_rule() {
    in_fresh_netns(|| {
        let mut socket = Socket::netfilter().unwrap();
        let good = default_table();
        nft::commit(&mut socket, &good).unwrap();
        let before = nft::generation(&mut socket).unwrap();
        let mut bad = good.clone();
        bad.chains[2].rules.push(nft_rule(vec![Expr::Jump("no-such-chain".into())], ""));
        let error = nft::commit(&mut socket, &bad).unwrap_err();
        let expected = "add rule ip aws-cni nat-prerouting jump no-such-chain: No such file or directory (needs the";
        assert!(error.to_string().starts_with(expected), "{error}");
        assert_eq!(nft::generation(&mut socket).unwrap(), before);
        assert_eq!(nft::table(&mut socket, Family::V4, "aws-cni").unwrap(), Some(good.clone()));
        // The socket is good for the next transaction, and one that everything in is wrong is told once.
        bad.chains[0].rules = (0..400).map(|_| nft_rule(vec![Expr::Jump("none".into())], "")).collect();
        assert!(nft::commit(&mut socket, &bad).unwrap_err().to_string().contains("jump none"));
        nft::commit(&mut socket, &good).unwrap();
        assert_ne!(nft::generation(&mut socket).unwrap(), before);
    });
}

#[test]
fn a_large_table_is_one_transaction() {
    in_fresh_netns(|| {
        let mut socket = Socket::netfilter().unwrap();
        let mut table = default_table();
        table.chains[0].rules = (0..2000u32)
            .map(|n| {
                let net = IpNet::new(IpAddr::from((n << 12).to_be_bytes()), 20).unwrap();
                nft_rule(vec![Expr::Daddr { net, negate: false }, Expr::COUNTER, Expr::Return], "VPC CIDR")
            })
            .collect();
        nft::commit(&mut socket, &table).unwrap();
        assert_eq!(nft::table(&mut socket, Family::V4, "aws-cni").unwrap(), Some(table));
    });
}

#[test]
fn tables_are_deleted_whether_or_not_they_are_there() {
    in_fresh_netns(|| {
        let mut socket = Socket::netfilter().unwrap();
        nft::delete(&mut socket, Family::V4, "aws-cni").unwrap();
        nft::commit(&mut socket, &default_table()).unwrap();
        nft::commit(&mut socket, &egress_table()).unwrap();
        nft::delete(&mut socket, Family::V4, "aws-cni").unwrap();
        assert_eq!(nft::table(&mut socket, Family::V4, "aws-cni").unwrap(), None);
        assert_eq!(
            nft::table(&mut socket, Family::V6, "aws-cni").unwrap(),
            Some(egress_table()),
            "the other family stays"
        );
    });
}

#[test]
fn what_others_write_into_a_table_is_foreign() {
    in_fresh_netns(|| {
        let mut socket = Socket::netfilter().unwrap();
        nft::commit(&mut socket, &default_table()).unwrap();
        let script = "add rule ip aws-cni snat-mark tcp dport 80 drop
            add chain ip aws-cni closed { type filter hook input priority 0; policy drop; }
            add chain ip aws-cni routed { type route hook output priority 0; }";
        if tool_with_input("nft", &["-f", "-"], script).is_none() {
            return;
        }
        let seen = nft::table(&mut socket, Family::V4, "aws-cni").unwrap().unwrap();
        let foreign = |chain: &Chain| {
            let exprs = chain.rules.iter().flat_map(|rule| &rule.exprs);
            exprs.filter(|expr| matches!(expr, Expr::Foreign(_))).map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(foreign(&seen.chains[0]), ["<meta>", "<cmp>", "<payload>", "<cmp>", "<drop>"]);
        assert_eq!(foreign(&seen.chains[5]), ["<policy drop>"]);
        assert_eq!(foreign(&seen.chains[6]), ["<base chain of another type or hook>"]);
        assert!(nft::commit(&mut socket, &seen).is_err(), "it is never sent");
    });
}
