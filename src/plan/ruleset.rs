//! The packet filter rules of a node as values (`spec/dataplane.md` 20 to 24): what our tables must hold, and how a dump of
//! them differs. Nothing here talks to the kernel; the text form is that of the `nft` tool, so that every rule set can be
//! read, diffed and reloaded.

use super::egress;
use super::host::{Egress, Intent, link_of, veths_of};
use crate::error::{Error, Result};
use crate::model::map::Set;
use crate::model::naming::{self, NFT_TABLE, VLAN_PREFIX};
use crate::model::net::{Family, Link};
use crate::model::nft::{Base, Chain, ChainKind, Expr, Hook, Rule, Table};
use crate::model::order::Gather as _;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Comment of the tables; tells an operator whose they are.
pub const COMMENT: &str = "VPC CNI: SNAT and return-path marks";

/// The link that kube-proxy in ipvs mode has services' addresses on.
pub const IPVS_LINK: &str = "kube-ipvs0";

/// Prefixes of host veths besides the setting's that rules are made for, in the order of the alphabet. Each is a change of the
/// setting that pods have outlived.
const FORMER_PREFIXES_MAX: usize = 7;

/// Egress addresses of IPv6 clusters' pods (`spec/dataplane.md` 11.1).
pub const EGRESS_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 172, 0), 22);
const MULTICAST_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4);
/// Egress addresses of IPv4 clusters' pods.
pub const EGRESS_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0xac, 0), 118);
const MULTICAST_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8);

// Priorities and why they are right: spec/dataplane.md 20 (D3 to D5), 23.
const AFTER_MANGLE: i32 = -149;
const AFTER_DNAT: i32 = -90;
const BEFORE_OUTPUT_DNAT: i32 = -110;
const BEFORE_FILTER: i32 = -10;
const EGRESS_SNAT: i32 = 105;
const AFTER_SRCNAT: i32 = 110;

/// The tables that `intent` wants, with the name of the primary ENI's link, on a node with these links. A family without a
/// chain to hold has none. An error when SNAT is wanted without any CIDR to leave alone: all traffic inside the VPC would
/// lose its address.
pub fn tables(intent: &Intent, primary: &str, links: &[Link]) -> Result<Vec<Table>> {
    let mut tables = Vec::new();
    if !intent.v6 && (intent.node_port || !intent.external_snat) {
        tables.push(ipv4(intent, primary, links)?);
    }
    tables.extend(egress(intent, links));
    Ok(tables)
}

fn ipv4(intent: &Intent, primary: &str, links: &[Link]) -> Result<Table> {
    let snat = !intent.external_snat;
    let mut chains = Vec::new();
    let kept = if snat { kept_cidrs(intent)? } else { Vec::new() };
    if snat {
        let mut rules = kept.clone();
        rules
            .push(rule([Expr::COUNTER, Expr::CtMarkSet { bits: intent.mark }], Some("leaves through the primary ENI")));
        chains.push(Chain { name: "snat-mark".into(), base: None, rules });
        if links.iter().any(|link| link.name == IPVS_LINK) {
            chains.extend(ipvs(intent));
        }
    }
    if intent.node_port {
        chains.push(Chain {
            name: "mangle-prerouting".into(),
            base: Some(Base { kind: ChainKind::Filter, hook: Hook::Prerouting, priority: AFTER_MANGLE }),
            rules: vec![rule(
                [
                    Expr::IifName { name: primary.into(), prefix: false, negate: false },
                    Expr::FibDaddrLocal { iif: true, negate: false },
                    Expr::COUNTER,
                    Expr::CtMarkSet { bits: intent.mark },
                ],
                Some("primary ENI"),
            )],
        });
    }
    chains.push(nat_prerouting(intent, snat, links));
    if snat {
        chains.push(snat_primary(intent, links, kept)?);
        chains.push(Chain {
            name: "nat-postrouting".into(),
            base: Some(Base { kind: ChainKind::Nat, hook: Hook::Postrouting, priority: AFTER_SRCNAT }),
            rules: vec![rule(
                [
                    Expr::OifName { name: VLAN_PREFIX.into(), prefix: true, negate: true },
                    Expr::Jump("snat-primary".into()),
                ],
                None,
            )],
        });
    }
    Ok(Table { family: Family::V4, name: NFT_TABLE.into(), comment: Some(COMMENT.into()), chains })
}

/// One `return` for each CIDR that keeps the pod's address: VPC CIDRs, then excluded ones, each sorted, none twice.
fn kept_cidrs(intent: &Intent) -> Result<Vec<Rule>> {
    let mut seen = Set::new();
    let mut rules = Vec::new();
    for (cidrs, comment) in [(&intent.vpc_cidrs, "VPC CIDR"), (&intent.excluded_cidrs, "excluded CIDR")] {
        let wanted = cidrs.iter().filter(|net| net.addr().is_ipv4()).map(IpNet::trunc).gather::<Set<_>>();
        for net in wanted.into_iter().filter(|net| seen.insert(*net)) {
            let matched = (net.prefix_len() > 0).then_some(Expr::Daddr { net, negate: false });
            rules.push(rule(matched.into_iter().chain([Expr::COUNTER, Expr::Return]), Some(comment)));
        }
    }
    if rules.is_empty() {
        return Err(Error::new("SNAT without any VPC or excluded CIDR would hide every pod's address"));
    }
    Ok(rules)
}

/// What the names of pods' host veths begin with. The setting is for new pods; those that were made with another prefix live on
/// under the names that they have, and without their mark what they send to the outside leaves by the ENI of their own with the
/// primary address, where the VPC drops it. So a former prefix counts until the last pod that has it is gone. A veth is a pod's
/// if it says so itself, also of one that nobody has told of yet, or if it has the digits of one.
fn prefixes<'a>(intent: &'a Intent, links: &'a [Link]) -> Vec<&'a str> {
    let setting = intent.veth_prefix.as_str();
    let veths = links.iter().filter(|link| link.kind.as_deref() == Some("veth"));
    let noted = veths.filter_map(|link| {
        let name = naming::name_of_veth_alias(&link.alias)?;
        let (prefix, digits) = name.split_at_checked(name.len().checked_sub(naming::SUFFIX_LEN)?)?;
        digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(prefix)
    });
    let mut former = noted.gather::<Set<_>>();
    former.extend(veths_of(intent, links).iter().filter_map(|(digits, link)| link.name.strip_suffix(digits)));
    former.retain(|prefix| {
        let taken = prefix.is_empty() || naming::VETH_PREFIXES_TAKEN.contains(prefix);
        !taken && prefix.len() <= naming::VETH_PREFIX_MAX && !prefix.starts_with(setting)
    });
    std::iter::once(setting).chain(former.into_iter().take(FORMER_PREFIXES_MAX)).collect()
}

fn nat_prerouting(intent: &Intent, snat: bool, links: &[Link]) -> Chain {
    let from = |prefix: &str| Expr::IifName { name: prefix.into(), prefix: true, negate: false };
    let mut rules = Vec::new();
    let mut prefixes = prefixes(intent, links);
    for prefix in prefixes.iter().filter(|_| snat) {
        rules.push(rule(
            [
                from(prefix),
                Expr::CtStateNew,
                Expr::FibDaddrLocal { iif: false, negate: true },
                Expr::Jump("snat-mark".into()),
            ],
            None,
        ));
    }
    if intent.node_port && intent.veth_prefix != VLAN_PREFIX {
        prefixes.push(VLAN_PREFIX);
    }
    for prefix in prefixes {
        // One pair per bit: a restore of several bits at once needs a bitwise operation on two registers, which only
        // new kernels have.
        for bit in bits(intent.mark) {
            rules.push(rule(
                [from(prefix), Expr::CtMark { mask: bit, value: bit }, Expr::COUNTER, Expr::MetaMarkSet { bits: bit }],
                Some("restore"),
            ));
            rules.push(rule(
                [
                    from(prefix),
                    Expr::CtMark { mask: bit, value: 0 },
                    Expr::MetaMark { mask: bit, value: bit },
                    Expr::COUNTER,
                    Expr::MetaMarkClear { bits: bit },
                ],
                Some("restore"),
            ));
        }
    }
    Chain {
        name: "nat-prerouting".into(),
        base: Some(Base { kind: ChainKind::Filter, hook: Hook::Prerouting, priority: AFTER_DNAT }),
        rules,
    }
}

/// The marks of what IPVS sends out for pods. A service's address is the node's own, so that prerouting leaves the connection
/// alone; IPVS takes the packet at input and sends it at output with another destination. There the kernel looks for a route
/// again (`nf_nat_ipv4_local_fn` in net/netfilter/nf_nat_proto.c, at -100), by the pod's address and the mark: without one it
/// leaves by the pod's ENI, with the primary address, and the VPC drops it. So the mark is set before, on new connections;
/// later packets have it from prerouting. What IPVS sends comes from no address of the node's and from no socket, other than
/// what transparent proxies send, which is theirs to route.
fn ipvs(intent: &Intent) -> [Chain; 2] {
    let mut rules = vec![
        rule([Expr::FromSocket, Expr::COUNTER, Expr::Return], Some("not sent by IPVS")),
        rule([Expr::Jump("snat-mark".into())], None),
    ];
    rules.extend(bits(intent.mark).map(|bit| {
        rule([Expr::CtMark { mask: bit, value: bit }, Expr::COUNTER, Expr::MetaMarkSet { bits: bit }], Some("restore"))
    }));
    let from_elsewhere = [Expr::CtStateNew, Expr::FibSaddrLocal { negate: true }, Expr::Jump("ipvs-mark".into())];
    let base = Base { kind: ChainKind::Filter, hook: Hook::Output, priority: BEFORE_OUTPUT_DNAT };
    [
        Chain { name: "ipvs-mark".into(), base: None, rules },
        Chain { name: "ipvs-output".into(), base: Some(base), rules: vec![rule(from_elsewhere, None)] },
    ]
}

/// The single bits of a mark.
fn bits(mark: u32) -> impl Iterator<Item = u32> {
    (0..u32::BITS).map(|shift| 1 << shift).filter(move |bit| mark & bit != 0)
}

fn snat_primary(intent: &Intent, links: &[Link], mut rules: Vec<Rule>) -> Result<Chain> {
    if !intent.node_ip.is_ipv4() {
        return Err(Error::new(format!("SNAT of IPv4 pods to {}: an IPv4 address is needed", intent.node_ip)));
    }
    if intent.keep_host_source {
        rules.extend(kept_sources(intent, links));
    }
    rules.push(rule(
        [
            Expr::FibDaddrLocal { iif: false, negate: true },
            Expr::COUNTER,
            Expr::Snat { to: intent.node_ip, ports: intent.snat_ports },
        ],
        Some("SNAT to the primary IP"),
    ));
    Ok(Chain { name: "snat-primary".into(), base: None, rules })
}

/// What SNAT only harms (23): a port is changed for nothing where the source is the primary address already; and what leaves
/// by another ENI with the primary address is dropped by the VPC, which looks at each ENI's sources. Pods' connections to the
/// outside are marked and leave by the primary ENI, so that these rules never see them.
fn kept_sources(intent: &Intent, links: &[Link]) -> impl Iterator<Item = Rule> {
    let mut names = intent.enis.iter().filter_map(|eni| Some(&link_of(links, eni.mac)?.name)).collect::<Vec<_>>();
    names.sort_unstable();
    let primary = (Expr::Saddr { net: intent.node_ip.into(), negate: false }, "primary IP already");
    let by = |name: &String| (Expr::OifName { name: name.clone(), prefix: false, negate: false }, "secondary ENI");
    let matches = std::iter::once(primary).chain(names.into_iter().map(by));
    matches.map(|(matched, comment)| rule([matched, Expr::COUNTER, Expr::Return], Some(comment)))
}

/// The static egress rules (22.3): in IPv6 mode for IPv4, in IPv4 mode for IPv6.
fn egress(intent: &Intent, links: &[Link]) -> Option<Table> {
    let target = match intent.egress_beside(links) {
        Egress::Off => return None,
        Egress::Guard => None,
        Egress::Snat(target) | Egress::Ending(target) => Some(target),
    };
    let (family, range, multicast) = if intent.v6 {
        (Family::V4, IpNet::V4(EGRESS_V4), IpNet::V4(MULTICAST_V4))
    } else {
        (Family::V6, IpNet::V6(EGRESS_V6), IpNet::V6(MULTICAST_V6))
    };
    let to = |net| Expr::Daddr { net, negate: false };
    let mut chains = vec![Chain {
        name: "egress-forward".into(),
        base: Some(Base { kind: ChainKind::Filter, hook: Hook::Forward, priority: BEFORE_FILTER }),
        rules: vec![rule(
            [to(range), Expr::CtStateNew, Expr::COUNTER, Expr::Reject],
            Some("no new connections to egress addresses"),
        )],
    }];
    if let Some(target) = target.filter(|target| Family::of(*target) == family) {
        chains.push(Chain {
            name: egress::SNAT_CHAIN.into(),
            base: Some(Base { kind: ChainKind::Nat, hook: Hook::Postrouting, priority: EGRESS_SNAT }),
            rules: vec![
                rule([Expr::Saddr { net: range, negate: true }, Expr::Return], None),
                rule([to(multicast), Expr::COUNTER, Expr::Accept], Some("multicast")),
                rule([to(range), Expr::COUNTER, Expr::Accept], Some("host side of an egress link")),
                rule([Expr::COUNTER, Expr::Snat { to: target, ports: intent.snat_ports }], None),
            ],
        });
    }
    Some(Table { family, name: NFT_TABLE.into(), comment: None, chains })
}

fn rule(exprs: impl IntoIterator<Item = Expr>, comment: Option<&str>) -> Rule {
    Rule { exprs: exprs.into_iter().collect(), comment: comment.map(str::to_owned) }
}

/// What is different between the tables wanted and those found, a line each; empty when they do the same. Counters do
/// not count, nor does the order of chains, nor the table's comment (kernels before 5.10 drop it).
pub fn differences(wanted: &[Table], found: &[Table]) -> Vec<String> {
    let mut lines = Vec::new();
    for family in [Family::V4, Family::V6] {
        let wanted = wanted.iter().find(|table| table.family == family);
        let found = found.iter().find(|table| table.family == family && table.name == NFT_TABLE);
        let name = if family == Family::V4 { "ip" } else { "ip6" };
        match (wanted, found) {
            (None, None) => {}
            (Some(_), None) => lines.push(format!("table {name} {NFT_TABLE} is missing")),
            (None, Some(_)) => lines.push(format!("table {name} {NFT_TABLE} is there and should not be")),
            (Some(wanted), Some(found)) => {
                let before = lines.len();
                compare_chains(wanted, found, &mut lines);
                for line in &mut lines[before..] {
                    line.insert_str(0, &format!("table {name} {NFT_TABLE} "));
                }
            }
        }
    }
    lines
}

fn compare_chains(wanted: &Table, found: &Table, lines: &mut Vec<String>) {
    for chain in &wanted.chains {
        let Some(there) = found.chains.iter().find(|there| there.name == chain.name) else {
            lines.push(format!("chain {} is missing", chain.name));
            continue;
        };
        if chain.base != there.base {
            let text = |base: Option<Base>| base.map_or_else(|| "no hook".to_owned(), |base| base.to_string());
            lines.push(format!("chain {}: {} instead of {}", chain.name, text(there.base), text(chain.base)));
        }
        for index in 0..chain.rules.len().max(there.rules.len()) {
            let (wanted, found) = (chain.rules.get(index).map(uncounted), there.rules.get(index).map(uncounted));
            if wanted != found {
                let text = |rule: Option<Rule>| rule.map_or_else(|| "no rule".to_owned(), |rule| format!("{rule}"));
                lines.push(format!(
                    "chain {} rule {}: {} instead of {}",
                    chain.name,
                    index + 1,
                    text(found),
                    text(wanted)
                ));
            }
        }
    }
    for chain in &found.chains {
        if !wanted.chains.iter().any(|wanted| wanted.name == chain.name) {
            lines.push(format!("chain {} is there and should not be", chain.name));
        }
    }
}

fn uncounted(rule: &Rule) -> Rule {
    let exprs = rule.exprs.iter().map(|expr| match expr {
        Expr::Counter { .. } => Expr::COUNTER,
        other => other.clone(),
    });
    Rule { exprs: exprs.collect(), comment: rule.comment.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::net::Mac;
    use crate::model::nft::SnatPorts;
    use crate::plan::host::{HostEni, HostPod};

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn default_intent() -> Intent {
        Intent {
            node_ip: "10.20.11.162".parse().unwrap(),
            vpc_cidrs: nets(&["100.64.0.0/16", "10.20.0.0/16", "10.20.0.0/16"]),
            excluded_cidrs: nets(&["172.16.0.0/12"]),
            ..Intent::default()
        }
    }

    /// Three ENIs, one of them without a link yet.
    fn enis() -> Vec<HostEni> {
        let eni = |number| HostEni {
            id: "eni-x".into(),
            mac: Mac([2, 0, 0, 0, 0, number]),
            card: 0,
            device: u32::from(number),
            own: "10.20.12.5/24".parse().unwrap(),
            gateway: "10.20.12.1".parse().unwrap(),
            table: u32::from(number) + 1,
            trunk: false,
        };
        vec![eni(1), eni(2), eni(3)]
    }

    fn links() -> Vec<Link> {
        let link = |index, name: &str, mac| Link {
            index,
            name: name.into(),
            mac: Some(Mac([2, 0, 0, 0, 0, mac])),
            ..Link::default()
        };
        vec![link(2, "eth0", 0), link(3, "eth2", 1), link(4, "eth1", 2), link(5, "docker0", 9)]
    }

    #[test]
    fn pods_of_a_former_prefix_keep_their_marks_until_the_last_is_gone() {
        const DIGITS: [&str; 3] = ["0123456789a", "0123456789b", "0123456789c"];
        let pods = DIGITS.map(|veth| HostPod {
            address: "10.20.12.60".parse().unwrap(),
            table: 2,
            name: String::new(),
            veth: veth.into(),
        });
        let intent = Intent { pods: pods.into(), ..default_intent() };
        let check = |names: &[(String, &str)], expected: &[&str]| {
            let veth = |(name, alias): &(String, &str)| Link {
                name: name.clone(),
                kind: Some("veth".into()),
                alias: (*alias).into(),
                ..Link::default()
            };
            let links = names.iter().map(veth).collect::<Vec<_>>();
            assert_eq!(prefixes(&intent, &links), expected, "{names:?}");
            let chain = nat_prerouting(&intent, true, &links);
            // A jump and two rules for the mark's bit each, and those for branch ENIs.
            assert_eq!(chain.rules.len(), 3 * expected.len() + 2, "{names:?}");
        };
        let [one, two, three] = DIGITS;
        let of = |prefix: &str, digits: &str| (format!("{prefix}{digits}"), "");
        check(&[], &["eni"]);
        check(&[of("eni", one), of("eni", two)], &["eni"]);
        check(&[of("pod", one), of("eni", two), of("az", three)], &["eni", "az", "pod"]);
        check(&[of("pod", one), of("pod", two)], &["eni", "pod"]);
        // Covered by the setting's; branch pods in strict mode; names that would be those of all links, or of ENIs.
        check(&[of("enix", one)], &["eni"]);
        check(&[of("vlan", one), of("", two), of("eth", three)], &["eni"]);
        // Renamed by somebody: the name that it gets back counts. One of a pod that is not known yet.
        let alias = |prefix: &str, digits: &str| naming::veth_alias(Mac::default(), 9001, &of(prefix, digits).0);
        check(&[("odd0".into(), &alias("pod", one))], &["eni", "pod"]);
        check(&[("pod0123456789d".into(), &alias("pod", "0123456789d"))], &["eni", "pod"]);
        check(&[("odd0".into(), &alias("longer", one)), ("odd1".into(), &alias("x", "0123456789"))], &["eni"]);
        // Of nobody's pod, or two that could be one pod's.
        check(&[of("cali", "0123456789d"), ("docker0".into(), "")], &["eni"]);
        check(&[of("cali", one), of("pod", one)], &["eni"]);
        let many = (0..20).map(|number| format!("{number:011}")).collect::<Vec<_>>();
        let pod = |veth: &String| HostPod { veth: veth.clone(), ..intent.pods[0].clone() };
        let many_pods = Intent { pods: many.iter().map(pod).collect(), ..intent.clone() };
        let link = |(digits, letter): (&String, char)| Link {
            name: format!("{letter}{digits}"),
            kind: Some("veth".into()),
            ..Link::default()
        };
        let links = many.iter().zip('a'..).map(link).collect::<Vec<_>>();
        assert_eq!(prefixes(&many_pods, &links).len(), 1 + FORMER_PREFIXES_MAX);
    }

    #[test]
    fn what_is_switched_off_is_kept_while_a_pod_of_before_lives() {
        let end = |pod: &str, gateway: &str| Link {
            kind: Some("veth".into()),
            name: "veth00000001".into(),
            alias: naming::egress_alias(Mac::default(), 9001, pod.parse().unwrap(), gateway.parse().unwrap(), None),
            ..Link::default()
        };
        let four = end("169.254.172.7", "169.254.172.1");
        let six = end("fd00::ac:7", "fe80::1");
        // By its name it could be that of another network.
        let unknown = Link { alias: String::new(), ..four.clone() };
        let check = |v6: bool, own: &str, link: &Link, expected: Egress| {
            let ending = Intent { v6, egress: Egress::Ending(own.parse().unwrap()), ..default_intent() };
            let links = [&links()[..], std::slice::from_ref(link)].concat();
            assert_eq!(ending.egress_beside(&links), expected, "{link:?}");
            let as_if = Intent { egress: expected, ..ending.clone() };
            assert_eq!(tables(&ending, "eth0", &links).unwrap(), tables(&as_if, "eth0", &links).unwrap());
        };
        let snat = |own: &str| Egress::Snat(own.parse().unwrap());
        check(true, "10.20.11.162", &four, snat("10.20.11.162"));
        check(true, "10.20.11.162", &six, Egress::Guard);
        check(true, "10.20.11.162", &unknown, Egress::Guard);
        check(false, "2001:db8::5", &six, snat("2001:db8::5"));
        check(false, "2001:db8::5", &four, Egress::Off);
        check(false, "2001:db8::5", &unknown, Egress::Off);
    }

    /// Compares with `testdata/ruleset/<name>.nft`; `UPDATE=1` rewrites the file.
    fn golden(name: &str, intent: &Intent) {
        golden_with(name, intent, &links());
    }

    fn golden_with(name: &str, intent: &Intent, links: &[Link]) {
        let text = tables(intent, "eth0", links).unwrap().iter().map(ToString::to_string).collect::<String>();
        let path = format!("{}/testdata/ruleset/{name}.nft", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert_eq!(text, std::fs::read_to_string(&path).unwrap(), "{name}");
    }

    #[test]
    fn rule_sets_are_those_of_the_specification() {
        let base = default_intent();
        golden("default", &base);
        golden("random", &Intent { snat_ports: SnatPorts::Random, ..base.clone() });
        golden("keep-host-source", &Intent { keep_host_source: true, enis: enis(), ..base.clone() });
        let proxy = [Link { name: IPVS_LINK.into(), ..Link::default() }];
        golden_with("ipvs", &base, &proxy);
        let external = Intent { external_snat: true, ..base.clone() };
        golden_with("external-snat", &external, &proxy);
        golden("keep-ports", &Intent { snat_ports: SnatPorts::Keep, ..base.clone() });
        golden("no-node-port", &Intent { node_port: false, ..base.clone() });
        golden("external-snat", &Intent { external_snat: true, ..base.clone() });
        golden("nothing", &Intent { external_snat: true, node_port: false, ..base.clone() });
        golden("several-bits", &Intent { mark: 0x8000_0090, veth_prefix: "pod".into(), ..base.clone() });
        golden("excluded-all", &Intent { excluded_cidrs: nets(&["0.0.0.0/0", "2001:db8::/32"]), ..base.clone() });
        golden("egress-v6", &Intent { egress: Egress::Snat("2001:db8::5".parse().unwrap()), ..base.clone() });
        golden("egress-v6-guard", &Intent { egress: Egress::Guard, external_snat: true, node_port: false, ..base });
        let v6 = Intent { v6: true, node_ip: "2001:db8::5".parse().unwrap(), ..default_intent() };
        golden("egress-v4", &Intent { egress: Egress::Snat("10.20.11.162".parse().unwrap()), ..v6.clone() });
        golden("v6", &v6);
    }

    #[test]
    fn snat_needs_cidrs_and_an_address() {
        let bare = Intent { vpc_cidrs: Vec::new(), excluded_cidrs: nets(&["2001:db8::/32"]), ..default_intent() };
        assert!(tables(&bare, "eth0", &[]).is_err());
        assert!(tables(&Intent { external_snat: true, ..bare }, "eth0", &[]).is_ok());
        assert!(tables(&Intent { node_ip: "2001:db8::5".parse().unwrap(), ..default_intent() }, "eth0", &[]).is_err());
    }

    #[test]
    fn differences_are_told_line_by_line() {
        let wanted = tables(&default_intent(), "eth0", &[]).unwrap();
        let check = |change: &dyn Fn(&mut Vec<Table>), lines: &[&str]| {
            let mut found = wanted.clone();
            change(&mut found);
            assert_eq!(differences(&wanted, &found), lines);
        };
        check(&|_| {}, &[]);
        check(&|found| found[0].comment = None, &[]);
        check(&|found| found[0].chains.reverse(), &[]);
        check(&|found| found[0].chains[0].rules[0].exprs[1] = Expr::Counter { packets: 5, bytes: 400 }, &[]);
        check(&Vec::clear, &["table ip aws-cni is missing"]);
        check(&|found| drop(found[0].chains.remove(3)), &["table ip aws-cni chain snat-primary is missing"]);
        check(
            &|found| drop(found[0].chains[0].rules.pop()),
            &["table ip aws-cni chain snat-mark rule 4: no rule instead of counter ct mark set ct mark | 0x00000080 \
               comment \"leaves through the primary ENI\""],
        );
        check(
            &|found| found[0].chains[1].base.as_mut().unwrap().priority = -150,
            &["table ip aws-cni chain mangle-prerouting: type filter hook prerouting priority mangle; policy accept; \
               instead of type filter hook prerouting priority mangle + 1; policy accept;"],
        );
        check(
            &|found| found[0].chains.push(Chain { name: "other".into(), base: None, rules: Vec::new() }),
            &["table ip aws-cni chain other is there and should not be"],
        );
        check(
            &|found| found[0].chains[0].rules[0].exprs.push(Expr::Foreign("limit".into())),
            &[
                "table ip aws-cni chain snat-mark rule 1: ip daddr 10.20.0.0/16 counter return <limit> comment \"VPC CIDR\" \
               instead of ip daddr 10.20.0.0/16 counter return comment \"VPC CIDR\"",
            ],
        );
        let unwanted = differences(&[], &wanted);
        assert_eq!(unwanted, ["table ip aws-cni is there and should not be"]);
    }
}
