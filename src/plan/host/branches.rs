//! Pods with a branch ENI of their own (`spec/dataplane.md` 9.3): what the plugin has made for them is put back when somebody
//! takes it away. The names of the links tell whether a pod was made in strict or in standard mode; the setting counts for
//! new pods only. A VLAN device whose pod is not known, or that two pods claim, is not touched here: see `leftovers`.

use super::planner::Planner;
use super::{Action, HostBranch, HostPod, Intent, Observation, What, link_of};
use crate::model::map::{Map, Set};
use crate::model::naming::{self, priority};
use crate::model::net::{Family, Link, Mac, Route, Rule, TABLE_LOCAL};
use crate::model::order::Gather as _;
use crate::plan::branch::is_vlan;
use ipnet::IpNet;
use std::net::{IpAddr, Ipv6Addr};

/// The router of every IPv6 subnet of a VPC, and the protocol of its neighbour discovery.
const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0xec2, 0, 0, 0, 0, 0, 1);
const ICMPV6: u8 = 58;

/// What the host has of a branch pod.
struct Wired<'a> {
    pod: &'a HostBranch,
    /// Absent if somebody has deleted it.
    device: Option<&'a Link>,
    veth: &'a Link,
    /// The device or a rule to its table is there.
    made: bool,
}

impl Wired<'_> {
    fn strict(&self) -> bool {
        self.veth.name.starts_with(naming::VLAN_PREFIX)
    }
}

/// Pods whose veth is there, and their VLAN device, or a rule to its table: an ADD makes the device before the rules, and a DEL
/// takes the rules away before the device. A veth alone is that of an ADD that begins or of a DEL that ends, or somebody has cleaned
/// the node up: that is told by its staying so ([`super::Idle`]), where it is noted on it that it is ours.
fn wired<'a>(branches: &'a [HostBranch], seen: &'a Observation) -> Vec<Wired<'a>> {
    let mut claims = Map::<u16, usize>::new();
    for pod in branches {
        *claims.entry(pod.eni.vlan).or_default() += 1;
    }
    let (mut devices, mut veths) = (Map::new(), Map::new());
    for link in &seen.links {
        if is_vlan(link) {
            devices.insert(link.name.as_str(), link);
        } else if link.kind.as_deref() == Some("veth")
            && let Some((_, suffix)) =
                link.name.len().checked_sub(naming::SUFFIX_LEN).and_then(|at| link.name.split_at_checked(at))
        {
            veths.insert(suffix, link);
        }
    }
    let sole = branches.iter().filter(|pod| claims.get(&pod.eni.vlan) == Some(&1));
    let leads = |rule: &Rule, table: u32| {
        rule.table == table && matches!(rule.priority, priority::BRANCH | priority::FROM_POD) && !rule.foreign
    };
    let whole = sole.filter_map(|pod| {
        let device = devices.get(pod.eni.device().as_str()).copied();
        let made = device.is_some() || seen.rules.iter().any(|rule| leads(rule, pod.eni.table));
        let noted = |veth: &&Link| veth.up && naming::of_veth_alias(&veth.alias).is_some();
        let veth = veths.get(pod.veth.as_str()).copied().filter(|veth| made || noted(veth))?;
        Some(Wired { pod, device, veth, made })
    });
    whole.collect()
}

/// Tables of devices that are there, or just made again.
pub(super) fn needed(intent: &Intent, seen: &Observation) -> Set<u32> {
    wired(&intent.branches, seen).iter().filter(|wired| wired.made).map(|wired| wired.pod.eni.table).gather()
}

/// VLANs of pods of which nothing but the veth is there.
pub(super) fn bare(intent: &Intent, seen: &Observation) -> Set<u16> {
    wired(&intent.branches, seen).iter().filter(|wired| !wired.made).map(|wired| wired.pod.eni.vlan).gather()
}

/// Without it answers of the router to the host's own questions would be taken for the pod's traffic.
pub fn gateway_rule() -> Rule {
    Rule { ipproto: Some(ICMPV6), ..Rule::from(IpNet::from(IpAddr::V6(ROUTER_V6)), priority::LOCAL, TABLE_LOCAL) }
}

impl Planner<'_> {
    /// Strict mode: neither the pod's traffic nor its ENI's may be taken for the node's own before the table of the ENI had its
    /// say. Without that mode, and without any pod of it, the node goes back to what the kernel makes.
    pub(super) fn local_rule(&mut self) {
        let family = self.family();
        let own = Rule::any(family, priority::LOCAL, TABLE_LOCAL);
        let moved = Rule::any(family, priority::LOCAL_MOVED, TABLE_LOCAL);
        let gateway = gateway_rule();
        if self.intent.strict_branches {
            self.want_rule(What::LocalRule, None, moved);
            if self.intent.v6 {
                self.want_rule(What::GatewayRule, None, gateway);
            }
            return self.drop_rules(What::LocalRule, |rule| *rule == own);
        }
        let branch = |rule: &Rule| rule.family == family && rule.priority == priority::BRANCH;
        // Without any the node hears nothing. Others keep theirs at a priority of their own.
        let local = |rule: &Rule| *rule == Rule::any(family, rule.priority, TABLE_LOCAL);
        let deaf = !self.seen.rules.iter().any(local);
        if self.seen.rules.iter().any(branch) {
            if deaf {
                self.want_rule(What::LocalRule, None, moved);
            }
            return;
        }
        if deaf || self.seen.rules.contains(&moved) {
            self.want_rule(What::LocalRule, None, own);
            self.drop_rules(What::LocalRule, |rule| *rule == moved);
        }
        if family == Family::V6 {
            self.drop_rules(What::GatewayRule, |rule| *rule == gateway);
        }
    }

    /// Puts back devices, routes and rules. Pods in standard mode are given as ordinary ones whose table is that of their ENI.
    pub(super) fn branches(&mut self) -> Vec<HostPod> {
        let (intent, seen) = (self.intent, self.seen);
        let mut ordinary = Vec::new();
        for wired in wired(&intent.branches, seen) {
            let Wired { pod, device, veth, made } = &wired;
            match device {
                Some(device) => self.branch_device(pod, device),
                None => self.lost_device(pod),
            }
            if !made {
                continue;
            }
            if wired.strict() {
                self.pod_link(veth);
                self.want_branch_route(pod.eni.pod_route(pod.address, veth.index), veth);
                self.want_asking(pod.address, veth);
                for rule in pod.eni.rules(&veth.name) {
                    self.want_rule(What::BranchRule, None, rule);
                }
            } else {
                let (address, table) = (pod.address, pod.eni.table);
                ordinary.push(HostPod { address, table, name: pod.name.clone(), veth: pod.veth.clone() });
            }
        }
        ordinary
    }

    fn branch_device(&mut self, pod: &HostBranch, device: &Link) {
        let (mac, mtu) = (pod.eni.mac, self.intent.eni_mtu);
        if !device.works() {
            self.set_up(What::BranchLink, None, device);
        } else if self.intent.v6 && !self.speaking.contains(&device.index) {
            self.want_link_local(What::BranchLink, None, device, device.mac.unwrap_or(mac));
        }
        if device.mac != Some(mac) && mac != Mac::default() {
            let text = format!("set address {mac} on {}", device.name);
            self.add(What::BranchLink, None, Action::SetMac(device.index, mac), text);
        }
        if device.mtu != mtu {
            let text = format!("set mtu {mtu} on {}", device.name);
            self.add(What::BranchLink, None, Action::SetMtu(device.index, mtu), text);
        }
        self.want_forwarding(None, device);
        self.want_conf6(device);
        for route in pod.eni.routes(device.index) {
            self.want_branch_route(route, device);
        }
    }

    /// Its address and routes have gone with it; they are put back by the look after this one, which knows its index.
    fn lost_device(&mut self, pod: &HostBranch) {
        let seen = self.seen;
        let trunk = self.intent.enis.iter().find(|eni| eni.trunk && eni.card == 0);
        let trunk = trunk.and_then(|eni| link_of(&seen.links, eni.mac));
        if let Some(trunk) = trunk.filter(|_| pod.eni.mac != Mac::default()) {
            let text = format!("add VLAN device {} on {}", pod.eni.device(), trunk.name);
            self.add(What::BranchLink, None, Action::AddVlan(pod.eni, trunk.index), text);
        }
    }

    fn want_branch_route(&mut self, route: Route, link: &Link) {
        if self.seen.routes.contains(&route) {
            self.no_barrier(What::BranchRoute, None, &route);
        } else {
            let text = route.to_string().replace(&format!("dev if{}", link.index), &format!("dev {}", link.name));
            self.add(What::BranchRoute, None, Action::ReplaceRoute(route), format!("replace route {text}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;
    use crate::model::net::{Scope, TABLE_MAIN};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn link(index: u32, name: &str, kind: &str) -> Link {
        let mac = Some(Mac([2, 0, 0, 0, 0, u8::try_from(index).unwrap()]));
        let kind = Some(kind.to_owned()).filter(|kind| !kind.is_empty());
        Link { index, name: name.into(), mac, mtu: 9001, up: true, kind, ..Link::default() }
    }

    fn branch(vlan: u16, pod: &str, address: &str, v6: bool) -> HostBranch {
        let gateway = ip(if v6 { "fe80:ec2::1" } else { "10.20.13.1" });
        let eni = Branch::new(vlan, Mac([2, 0, 0, 0, 0, 10]), gateway).unwrap();
        HostBranch {
            address: ip(address),
            eni,
            name: format!("default/{pod}"),
            veth: naming::suffix("default", pod, 0),
        }
    }

    /// A node with one branch pod in strict mode, and nothing missing.
    fn node(v6: bool) -> (Intent, Observation) {
        let address = if v6 { "2001:db8::7" } else { "10.20.13.70" };
        let intent = Intent {
            v6,
            node_ip: ip(if v6 { "2001:db8::1" } else { "10.20.11.162" }),
            primary_mac: Mac([2, 0, 0, 0, 0, 2]),
            external_snat: true,
            node_port: false,
            branches: vec![branch(7, "sample-pod", address, v6)],
            strict_branches: true,
            ..Intent::default()
        };
        let pod = &intent.branches[0];
        let mut routes = pod.eni.routes(10).to_vec();
        routes.push(pod.eni.pod_route(pod.address, 11));
        let family = if v6 { Family::V6 } else { Family::V4 };
        let other = if v6 { Family::V4 } else { Family::V6 };
        let mut rules = vec![
            Rule::any(other, 0, TABLE_LOCAL),
            Rule::any(other, 32766, TABLE_MAIN),
            Rule::any(family, 20, TABLE_LOCAL),
            Rule::any(family, 32766, TABLE_MAIN),
        ];
        rules.extend(pod.eni.rules("vlancc21c2d7785"));
        if v6 {
            let router = "fe80:ec2::1/128".parse().unwrap();
            rules.push(Rule { ipproto: Some(58), ..Rule::from(router, 0, TABLE_LOCAL) });
        }
        let alias = naming::veth_alias(Mac([2, 0, 0, 0, 0, 11]), 9001, "vlancc21c2d7785");
        let veth = Link { alias, ..link(11, "vlancc21c2d7785", "veth") };
        let links = vec![link(2, "eth0", ""), link(10, "vlan.eth.7", "vlan"), veth];
        let tables = ruleset::tables(&intent, "eth0", &links).unwrap();
        let speaks = |dev| Address { dev, addr: "fe80::1/64".parse().unwrap(), no_prefix_route: false, no_dad: true };
        let addresses = if v6 { vec![speaks(10), speaks(11)] } else { Vec::new() };
        (intent, Observation { links, addresses, routes, rules, tables, ..Observation::default() })
    }

    fn check(v6: bool, fault: impl Fn(&mut Intent, &mut Observation), steps: &[&str]) {
        let (mut intent, mut seen) = node(v6);
        fault(&mut intent, &mut seen);
        let plan = diff(&intent, &seen).unwrap();
        assert_eq!(plan.steps.iter().map(|step| step.text.as_str()).collect::<Vec<_>>(), steps);
    }

    #[test]
    fn what_is_missing_of_a_strict_pod_is_put_back() {
        for v6 in [false, true] {
            check(v6, |_, _| {}, &[]);
        }
        check(false, |_, seen| seen.links[1].up = false, &["set vlan.eth.7 up"]);
        check(false, |_, seen| seen.links[1].no_arp = true, &["set vlan.eth.7 arp on"]);
        check(false, |_, seen| seen.links[1].mtu = 1500, &["set mtu 9001 on vlan.eth.7"]);
        check(false, |_, seen| seen.links[1].mac = None, &["set address 02:00:00:00:00:0a on vlan.eth.7"]);
        check(
            true,
            |_, seen| seen.addresses.clear(),
            &["add address fe80::ff:fe00:a/64 to vlan.eth.7", "add address fe80::ff:fe00:b/64 to vlancc21c2d7785"],
        );
        check(
            false,
            |_, seen| seen.routes.clear(),
            &[
                "replace route 10.20.13.1 dev vlan.eth.7 table 107 scope link",
                "replace route default via 10.20.13.1 dev vlan.eth.7 table 107",
                "replace route 10.20.13.70 dev vlancc21c2d7785 table 107 scope link",
            ],
        );
        check(
            true,
            |_, seen| seen.routes.clear(),
            &[
                "replace route fe80:ec2::1 dev vlan.eth.7 table 107 metric 1024",
                "replace route default via fe80:ec2::1 dev vlan.eth.7 table 107 metric 1024",
                "replace route 2001:db8::7 dev vlancc21c2d7785 table 107 metric 1024",
            ],
        );
        for v6 in [false, true] {
            check(
                v6,
                |_, seen| seen.rules.retain(|rule| rule.priority != 10),
                &[
                    "add rule 10: from all iif vlan.eth.7 lookup 107",
                    "add rule 10: from all iif vlancc21c2d7785 lookup 107",
                ],
            );
        }
    }

    #[test]
    fn a_device_that_somebody_deleted_is_made_again() {
        let check = |fault: &dyn Fn(&mut Intent, &mut Observation), made: bool| {
            let (mut intent, mut seen) = node(false);
            let (own, gateway) = ("10.20.12.5/24".parse().unwrap(), ip("10.20.12.1"));
            let mac = Mac([2, 0, 0, 0, 0, 3]);
            intent.enis =
                vec![HostEni { id: "eni-2".into(), mac, card: 0, device: 1, own, gateway, table: 2, trunk: true }];
            seen.links[1] = link(3, "eth1", "");
            seen.routes.remove(0);
            seen.routes.remove(0);
            fault(&mut intent, &mut seen);
            let steps = diff(&intent, &seen).unwrap().steps;
            let found: Vec<_> = steps.iter().filter(|step| step.what == What::BranchLink).collect();
            assert!(!made || !steps.iter().any(|step| step.what == What::BranchRule), "the rules stay: {steps:?}");
            assert_eq!(found.len(), usize::from(made), "{steps:?}");
            if let [step] = found[..] {
                assert_eq!(step.text, "add VLAN device vlan.eth.7 on eth1");
                assert_eq!(step.action, Action::AddVlan(intent.branches[0].eni, 3));
            }
        };
        check(&|_, _| {}, true);
        check(&|_, seen| drop(seen.links.remove(2)), false); // the pod is going
        let alone = |seen: &mut Observation, alias: &str| {
            seen.links[2].alias = alias.into();
            seen.rules.retain(|rule| rule.priority != 10);
        };
        let noted = naming::veth_alias(Mac::default(), 9001, "vlancc21c2d7785");
        check(&|_, seen| alone(seen, &noted), true); // in its time
        check(&|_, seen| alone(seen, ""), false); // the same, or it is just coming
        check(&|_, seen| alone(seen, "uplink"), false);
        check(&|_, seen| (alone(seen, &noted), seen.links[2].up = false).1, false);
        check(&|_, seen| drop(seen.links.remove(1)), false); // no trunk
        check(&|intent, _| intent.enis[0].trunk = false, false);
        check(&|intent, _| intent.branches[0].eni.mac = Mac::default(), false);
        check(&|intent, _| intent.branches.clear(), false);
    }

    #[test]
    fn a_pod_in_standard_mode_has_the_rules_of_an_ordinary_one() {
        let standard = |_: &mut Intent, seen: &mut Observation| {
            seen.links[2].name = "enicc21c2d7785".into();
            seen.routes.truncate(2);
            seen.rules.retain(|rule| rule.priority != 10);
            let dst = "10.20.13.70/32".parse().unwrap();
            let scope = Scope::Link;
            let route = Route { table: TABLE_MAIN, dst, gateway: None, dev: 11, scope, prefsrc: None, metric: 0 };
            seen.routes.push(route);
        };
        let rules = ["add rule 1536: from 10.20.13.70 lookup 107", "add rule 512: from all to 10.20.13.70 lookup main"];
        check(false, standard, &rules);
        check(
            false,
            |intent, seen| {
                standard(intent, seen);
                seen.routes.remove(1);
                seen.rules.push(Rule::from("10.20.13.70/32".parse().unwrap(), 1536, 3));
            },
            &[
                "replace route default via 10.20.13.1 dev vlan.eth.7 table 107",
                rules[0],
                rules[1],
                "delete rule 1536: from 10.20.13.70 lookup 3",
            ],
        );
    }

    #[test]
    fn what_is_not_known_for_sure_is_left_alone() {
        let bare = |seen: &mut Observation| {
            seen.routes.clear();
            seen.rules.retain(|rule| rule.priority != 10);
        };
        // Not known, not yet or no longer wired, or claimed by two.
        check(
            false,
            |intent, seen| {
                bare(seen);
                intent.branches.clear();
            },
            &[],
        );
        for gone in [1, 2] {
            check(
                false,
                |_, seen| {
                    bare(seen);
                    seen.links.remove(gone);
                },
                &[],
            );
        }
        check(
            false,
            |_, seen| {
                bare(seen);
                seen.links[1].kind = Some("dummy".into());
            },
            &[],
        );
        check(
            false,
            |intent, seen| {
                bare(seen);
                intent.branches.push(branch(7, "other", "10.20.13.71", false));
            },
            &[],
        );
        // Of a pod that nobody knows.
        check(false, |intent, _| intent.branches.clear(), &[]);
    }

    #[test]
    fn rules_without_any_link_are_leftovers() {
        let stray = |iif: &str, table: u32| Rule { iif: Some(iif.into()), ..Rule::any(Family::V4, 10, table) };
        check(
            false,
            |_, seen| {
                let from = |address: &str, table: u32| Rule::from(address.parse().unwrap(), 1536, table);
                seen.rules.extend([
                    stray("vlan.eth.9", 109),
                    stray("vlan0123456789a", 109),
                    from("10.20.13.9/32", 109),
                ]);
                // Others': another device, another shape, a table that is not a VLAN's, a rule of a pod that is known.
                seen.rules.extend([stray("eth9", 109), stray("vlan.eth.9", 110), stray("vlan.eth.9", 5000)]);
                seen.rules.extend([from("10.20.13.0/24", 109), from("10.20.13.70/32", 107), from("10.20.13.9/32", 2)]);
                seen.rules.push(Rule { fwmark: Some((1, 1)), ..stray("vlan.eth.9", 109) });
            },
            &[
                "delete rule 10: from all iif vlan.eth.9 lookup 109",
                "delete rule 10: from all iif vlan0123456789a lookup 109",
                "delete rule 1536: from 10.20.13.9 lookup 109",
            ],
        );
    }

    #[test]
    fn the_local_rule_stands_behind_the_branches() {
        let fresh = |seen: &mut Observation, v6: bool| {
            seen.rules
                .retain(|rule| (rule.family == Family::V6) != v6 || rule.priority > 20 || rule.table == TABLE_MAIN);
            seen.rules.push(Rule::any(if v6 { Family::V6 } else { Family::V4 }, 0, TABLE_LOCAL));
            seen.links.truncate(1);
            seen.routes.clear();
        };
        let moved = "add rule 20: from all lookup local";
        let own = "delete rule 0: from all lookup local";
        check(false, |_, seen| fresh(seen, false), &[moved, own]);
        let router = "add rule 0: from fe80:ec2::1 ipproto 58 lookup local";
        check(true, |_, seen| fresh(seen, true), &[moved, router, own]);
        // Both are there: an earlier attempt ended between the two.
        check(false, |_, seen| seen.rules.push(Rule::any(Family::V4, 0, TABLE_LOCAL)), &[own]);
        // The mode was left: nothing changes before the last pod of it has gone.
        for v6 in [false, true] {
            check(v6, |intent, _| intent.strict_branches = false, &[]);
        }
        let left = |intent: &mut Intent, seen: &mut Observation| {
            intent.strict_branches = false;
            intent.branches.clear();
            seen.rules.retain(|rule| rule.priority != 10);
        };
        let back = ["add rule 0: from all lookup local", "delete rule 20: from all lookup local"];
        check(false, left, &back);
        check(true, left, &[back[0], back[1], "delete rule 0: from fe80:ec2::1 ipproto 58 lookup local"]);
    }

    #[test]
    fn a_node_that_hears_nothing_gets_its_local_rule_back() {
        let lost = |seen: &mut Observation| {
            let local = |rule: &Rule| rule.family == Family::V4 && rule.table == TABLE_LOCAL;
            seen.rules.retain(|rule| !local(rule));
        };
        let plain = |intent: &mut Intent, seen: &mut Observation| {
            intent.strict_branches = false;
            intent.branches.clear();
            seen.rules.retain(|rule| rule.priority != 10);
            lost(seen);
        };
        check(false, plain, &["add rule 0: from all lookup local"]);
        // Another program's that lets some in does not count; one that moved it elsewhere knows why.
        let with = |rule: Rule, steps: &[&str]| {
            check(
                false,
                |intent, seen| {
                    plain(intent, seen);
                    seen.rules.push(rule.clone());
                },
                steps,
            );
        };
        let some = Rule::from("10.9.9.9/32".parse().unwrap(), 0, TABLE_LOCAL);
        with(some, &["add rule 0: from all lookup local"]);
        with(Rule { foreign: true, ..Rule::any(Family::V4, 0, TABLE_LOCAL) }, &["add rule 0: from all lookup local"]);
        with(Rule::any(Family::V4, 100, TABLE_LOCAL), &[]);
        // Pods of strict mode, which was left, must not lose their place.
        let leaving = |intent: &mut Intent, seen: &mut Observation| {
            intent.strict_branches = false;
            lost(seen);
        };
        check(false, leaving, &["add rule 20: from all lookup local"]);
        check(false, |_, seen| lost(seen), &["add rule 20: from all lookup local"]);
    }
}
