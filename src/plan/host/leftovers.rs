//! What pods with a branch ENI have left on the host: their VLAN devices and the rules to those tables (`spec/plugin.md` 13.4).
//! A DEL without a network namespace, or none at all, leaves them behind.
//!
//! A device that is deleted by mistake cuts a living pod off, and a VLAN id that is handed out again makes it anew anyway. So a
//! device goes only when nothing on the host speaks for a pod, by what the kernel shows: what the API server tells may be old,
//! or missing. Each of these keeps it:
//!
//! - it is not of our name, or not on a trunk of ours, or somebody has put an address, a route or another link on it;
//! - a route of its table leads over another link: a pod's in strict mode goes with its veth;
//! - a rule to its table selects a link that is there, or the address of a pod in standard mode, to which a route leads;
//! - a rule to its table is not one of ours;
//! - a pod that is to be on this node has its VLAN, by the API server's word;
//! - a host's end of some pod's veth is there of which neither the intent nor a rule nor a route says what it belongs to. An ADD
//!   makes the veth before all else, and what somebody has flushed may have been such a pod's. Others give such names too
//!   (Calico's have the same digits): what leads to addresses outside the VPC alone, or is a port of a bridge, which keeps all
//!   frames for itself, is theirs, unless it is noted on it that it is ours.
//!
//! The daemon waits, besides, until a device has looked like that for a while ([`Idle`]).

use super::branches::{bare, needed};
use super::enis::global;
use super::planner::Planner;
use super::{Action, Intent, Observation, Plan, Step, What, link_of, single};
use crate::model::map::{Map, Set};
use crate::model::naming::{self, priority};
use crate::model::net::{Link, Route, Rule};
use crate::model::order::Gather as _;
use crate::model::time::Mono;
use crate::plan::branch::is_vlan;
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

impl Planner<'_> {
    /// Rules that lead to the table of a VLAN device that is gone, and that no link and no pod needs.
    pub(super) fn stale_branch_rules(&mut self) {
        let (intent, seen, family) = (self.intent, self.seen, self.family());
        // A pod in standard mode whose route somebody has flushed needs its rule again.
        if !seen.rules.iter().any(|rule| naming::vlan_of_table(rule.table).is_some()) || strangers(intent, seen) {
            return;
        }
        let (signs, needed) = (Signs::new(intent, seen), needed(intent, seen));
        self.drop_rules(What::BranchRule, |rule| {
            rule.family == family
                && signs.left(rule)
                && !needed.contains(&rule.table)
                && device_of(rule).is_some_and(|device| !signs.names.contains(device.as_str()))
        });
    }

    /// VLAN devices without any pod. Their rules follow when they are gone.
    pub(super) fn stale_devices(&mut self) {
        let devices = idle(self.intent, self.seen);
        if devices.is_empty() || strangers(self.intent, self.seen) {
            return;
        }
        for device in devices {
            let text = format!("delete VLAN device {} (index {}), which no pod has", device.name, device.index);
            self.delete(What::BranchLeftover, None, Action::DeleteLink(device.index), text);
        }
    }
}

/// What rules may still serve.
struct Signs<'a> {
    names: Set<&'a str>,
    /// Addresses of pods: of those that are known, and all to which a link leads.
    alive: Set<IpAddr>,
}

impl<'a> Signs<'a> {
    fn new(intent: &Intent, seen: &'a Observation) -> Self {
        let names = seen.links.iter().map(|link| link.name.as_str()).gather();
        let vlans = seen.links.iter().filter(|link| is_vlan(link)).map(|link| link.index).gather::<Set<_>>();
        let known = intent.branches.iter().map(|pod| pod.address).chain(intent.pods.iter().map(|pod| pod.address));
        // The way to the ENI's gateway leads over the device itself.
        let linked = seen.routes.iter().filter(|route| !vlans.contains(&route.dev)).filter_map(to_pod);
        Signs { names, alive: known.chain(linked).gather() }
    }

    /// Whether this rule to a VLAN's table is of our shape, and of a pod that has neither link nor route.
    fn left(&self, rule: &Rule) -> bool {
        let Some(device) = device_of(rule) else { return false };
        if let Some(source) = rule.src.and_then(single) {
            return *rule == Rule::from(IpNet::from(source), priority::FROM_POD, rule.table)
                && !self.alive.contains(&source);
        }
        let Some(iif) = &rule.iif else { return false };
        let veth = iif.starts_with(naming::VLAN_PREFIX) && iif.len() == naming::NAME_MAX;
        let shape = Rule { iif: Some(iif.clone()), ..Rule::any(rule.family, priority::BRANCH, rule.table) };
        *rule == shape && (*iif == device || (veth && !self.names.contains(iif.as_str())))
    }
}

/// Name of the VLAN device whose table a rule leads to.
fn device_of(rule: &Rule) -> Option<String> {
    naming::vlan_of_table(rule.table).map(naming::vlan_device)
}

fn to_pod(route: &Route) -> Option<IpAddr> {
    single(route.dst).filter(|_| route.gateway.is_none())
}

/// VLAN devices of ours that show no pod themselves.
fn idle<'a>(intent: &Intent, seen: &'a Observation) -> Vec<&'a Link> {
    let trunks = intent.enis.iter().filter(|eni| eni.trunk);
    let trunks = trunks.filter_map(|eni| link_of(&seen.links, eni.mac)).map(|link| link.index).gather::<Set<_>>();
    let ours = |link: &&Link| is_vlan(link) && link.parent.is_some_and(|parent| trunks.contains(&parent));
    let devices = seen.links.iter().filter(ours);
    let mut devices = devices.filter_map(|link| Some((link, naming::vlan_of_device(&link.name)?))).peekable();
    if devices.peek().is_none() {
        return Vec::new();
    }
    let signs = Signs::new(intent, seen);
    devices.filter(|(link, vlan)| !in_use(intent, seen, &signs, link, *vlan)).map(|(link, _)| link).collect()
}

fn in_use(intent: &Intent, seen: &Observation, signs: &Signs<'_>, device: &Link, vlan: u32) -> bool {
    let (index, table) = (device.index, vlan + 100);
    // The number of a veth's other end is that of another namespace.
    let upon = |link: &Link| link.parent == Some(index) && link.kind.as_deref() != Some("veth");
    let own = |route: &Route| route.table == table || (route.dst.prefix_len() > 0 && !global(route.dst.addr()));
    intent.branches.iter().any(|pod| u32::from(pod.eni.vlan) == vlan)
        || device.master.is_some()
        || seen.links.iter().any(upon)
        || seen.addresses.iter().any(|address| address.dev == index && global(address.addr.addr()))
        || seen.routes.iter().any(|route| if route.dev == index { !own(route) } else { route.table == table })
        || seen
            .rules
            .iter()
            .any(|rule| if rule.table == table { !signs.left(rule) } else { rule.iif.as_ref() == Some(&device.name) })
}

/// Whether there is a pod's veth that might belong to a pod of any VLAN.
pub(in crate::plan) fn strangers(intent: &Intent, seen: &Observation) -> bool {
    let branch = |table: u32| naming::vlan_of_table(table).is_some();
    let known = intent.pods.iter().map(|pod| pod.veth.as_str()).gather::<Set<_>>();
    let addresses = intent.pods.iter().map(|pod| pod.address);
    let standard = seen.rules.iter().filter(|rule| rule.priority == priority::FROM_POD && branch(rule.table));
    let addresses = addresses.chain(standard.filter_map(|rule| single(rule.src?))).gather::<Set<_>>();
    let strict = seen.rules.iter().filter(|rule| rule.priority == priority::BRANCH && branch(rule.table));
    let names = strict.filter_map(|rule| rule.iif.as_deref()).gather::<Set<_>>();
    let led = |route: &&Route| to_pod(route).is_some_and(|to| branch(route.table) || addresses.contains(&to));
    let devs = seen.routes.iter().filter(led).map(|route| route.dev).gather::<Set<_>>();
    let theirs = others(intent, seen);
    seen.links.iter().any(|link| {
        let (digits, noted) = (digits(&link.name), naming::of_veth_alias(&link.alias).is_some());
        link.kind.as_deref() == Some("veth")
            && (noted || (digits.is_some() && !theirs.contains(&link.index)))
            && !digits.is_some_and(|digits| known.contains(digits))
            && !names.contains(link.name.as_str())
            && !devs.contains(&link.index)
    })
}

/// Links that cannot be those of pods of ours, unless it is noted on them.
fn others(intent: &Intent, seen: &Observation) -> Set<u32> {
    // The CIDRs of the other family are not known.
    let same = |net: &&IpNet, to: IpAddr| net.addr().is_ipv4() == to.is_ipv4();
    let beyond = |to: IpAddr| {
        let mut cidrs = intent.vpc_cidrs.iter().filter(|net| same(net, to)).peekable();
        cidrs.peek().is_some() && global(to) && !cidrs.any(|net| net.contains(&to))
    };
    let ways = seen.routes.iter().filter_map(|route| Some((route.dev, beyond(to_pod(route)?))));
    let (far, near) = ways.partition::<Vec<_>, _>(|(_, beyond)| *beyond);
    let near = near.into_iter().map(|(dev, _)| dev).gather::<Set<_>>();
    let bridge = |link: &&Link| link.kind.as_deref() == Some("bridge");
    let bridges = seen.links.iter().filter(bridge).map(|link| link.index).gather::<Set<_>>();
    let ports = seen.links.iter().filter(|link| link.master.is_some_and(|master| bridges.contains(&master)));
    let far = far.into_iter().map(|(dev, _)| dev).filter(|dev| !near.contains(dev));
    ports.map(|link| link.index).chain(far).gather()
}

/// The eleven digits that the name of a pod's veth ends in.
fn digits(name: &str) -> Option<&str> {
    let at = name.len().checked_sub(naming::SUFFIX_LEN).filter(|at| *at <= naming::VETH_PREFIX_MAX)?;
    name.get(at..).filter(|digits| digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
}

/// Of rules to VLANs' tables that were just deleted as leftovers, those to add again: between the look and the deletion an ADD
/// has found them there, and taken them for its own. It makes the device and the links before the rules.
pub fn regrets(intent: &Intent, seen: &Observation, deleted: &[&Rule]) -> Vec<Step> {
    let signs = Signs::new(intent, seen);
    let there = |name: &String| signs.names.contains(name.as_str());
    let needed = |rule: &&&Rule| {
        device_of(rule).as_ref().is_some_and(there)
            && (rule.iif.as_ref().is_some_and(there)
                || rule.src.and_then(single).is_some_and(|to| signs.alive.contains(&to)))
    };
    let add = |rule: &&Rule| {
        let text = format!("add rule {rule}");
        Step { what: What::BranchRule, eni: None, action: Action::AddRule((*rule).clone()), text }
    };
    deleted.iter().filter(needed).map(add).collect()
}

/// Since when VLAN devices have shown no pod. One is deleted when that is longer ago than an ADD may take: the runtime gives
/// one four minutes at most (twice the kubelet's `runtimeRequestTimeout`). And since when pods have had no such device: one is made
/// when no plugin can be at work any more, which takes hundredths of a second.
#[derive(Debug, Default)]
pub struct Idle {
    since: Map<u32, Mono>,
    bare: Map<u16, Mono>,
}

impl Idle {
    /// How long a device must have shown no pod.
    pub const MIN: Duration = Duration::from_mins(5);
    /// How long of a pod nothing but its veth must have been there.
    pub const BARE_MIN: Duration = Duration::from_secs(10);

    /// Notes what a look has shown, and takes what is too early out of its plan.
    pub fn look(&mut self, now: Mono, intent: &Intent, seen: &Observation, plan: &mut Plan) {
        let devices = idle(intent, seen).iter().map(|device| device.index).gather::<Set<_>>();
        self.since.retain(|index, _| devices.contains(index));
        for index in devices {
            self.since.entry(index).or_insert(now);
        }
        let bare = bare(intent, seen);
        self.bare.retain(|vlan, _| bare.contains(vlan));
        for vlan in bare {
            self.bare.entry(vlan).or_insert(now);
        }
        let due = |index: &u32| self.since.get(index).is_some_and(|since| now.since(*since) >= Self::MIN);
        let young = |vlan: u16| self.bare.get(&vlan).is_some_and(|since| now.since(*since) < Self::BARE_MIN);
        plan.steps.retain(|step| match &step.action {
            Action::DeleteLink(index) => due(index),
            Action::AddVlan(eni, _) => !young(eni.vlan),
            _ => true,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;
    use crate::model::net::{Scope, TABLE_MAIN};
    use crate::plan::pod::link_route;

    const TRUNK: Mac = Mac([2, 0, 0, 0, 0, 3]);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn link(index: u32, name: &str, kind: &str) -> Link {
        let mac = Some(Mac([2, 0, 0, 0, 0, u8::try_from(index).unwrap()]));
        let kind = Some(kind.to_owned()).filter(|kind| !kind.is_empty());
        Link { index, name: name.into(), mac, mtu: 9001, up: true, kind, ..Link::default() }
    }

    fn iif(name: &str, table: u32) -> Rule {
        Rule { iif: Some(name.into()), ..Rule::any(Family::V4, 10, table) }
    }

    fn from(address: &str, table: u32) -> Rule {
        Rule::from(IpNet::from(ip(address)), 1536, table)
    }

    /// A node with an ordinary pod, a branch pod in each mode on VLANs 8 and 9, and what one of each has left on VLAN 7.
    fn node(v6: bool) -> (Intent, Observation) {
        let text = |v4: &'static str, other: &'static str| if v6 { other } else { v4 };
        let gateway = ip(text("10.20.13.1", "fe80:ec2::1"));
        let net = if v6 { "2001:db8:12::5/64" } else { "10.20.12.5/24" };
        let trunk = HostEni {
            id: "eni-2".into(),
            mac: TRUNK,
            card: 0,
            device: 1,
            own: net.parse().unwrap(),
            gateway,
            table: 2,
            trunk: true,
        };
        let pod = HostPod {
            address: ip(text("10.20.11.50", "2001:db8::50")),
            table: TABLE_MAIN,
            name: "default/plain".into(),
            veth: naming::suffix("default", "plain", 0),
        };
        let intent = Intent {
            v6,
            node_ip: ip(text("10.20.11.162", "2001:db8::1")),
            primary_mac: Mac([2, 0, 0, 0, 0, 2]),
            external_snat: true,
            enis: vec![trunk],
            pods: vec![pod.clone()],
            ..Intent::default()
        };
        let device =
            |index: u32, vlan: u16| Link { parent: Some(3), ..link(index, &naming::vlan_device(vlan.into()), "vlan") };
        let mut links = vec![link(2, "eth0", ""), link(3, "eth1", ""), device(10, 7), device(11, 8), device(12, 9)];
        links.push(link(20, &format!("eni{}", pod.veth), "veth"));
        links.extend([
            link(21, "vlan0000000000a", "veth"),
            link(22, "eni0000000000b", "veth"),
            link(23, "docker0", "bridge"),
        ]);
        links.push(link(24, "veth1a2b3c4", "veth"));
        let (strict, standard) = (text("10.20.13.80", "2001:db8::80"), text("10.20.13.90", "2001:db8::90"));
        let branch = |vlan| Branch::new(vlan, Mac::default(), gateway).unwrap();
        let mut routes = [(10, 7), (11, 8), (12, 9)].map(|(index, vlan)| branch(vlan).routes(index)).concat();
        routes.extend([link_route(108, ip(strict), 21), link_route(TABLE_MAIN, ip(standard), 22)]);
        routes.push(link_route(TABLE_MAIN, pod.address, 20));
        let mut rules = branch(7).rules("vlan0000000000c").to_vec();
        rules.extend(branch(8).rules("vlan0000000000a"));
        rules.extend([from(text("10.20.13.70", "2001:db8::70"), 107), from(standard, 109)]);
        (intent, Observation { links, routes, rules, ..Observation::default() })
    }

    /// What the plan deletes of the leftovers.
    fn deleted(intent: &Intent, seen: &Observation) -> Vec<String> {
        let steps = diff(intent, seen).unwrap().steps;
        let steps = steps.into_iter().filter(|step| matches!(step.what, What::BranchLeftover | What::BranchRule));
        steps.map(|step| step.text).collect()
    }

    fn goes(fault: impl Fn(&mut Intent, &mut Observation)) -> bool {
        let (mut intent, mut seen) = node(false);
        fault(&mut intent, &mut seen);
        match &deleted(&intent, &seen)[..] {
            [] => false,
            [text] if text == "delete VLAN device vlan.eth.7 (index 10), which no pod has" => true,
            others => panic!("{others:?}"),
        }
    }

    #[test]
    fn the_device_goes_and_then_its_rules() {
        for v6 in [false, true] {
            let (intent, mut seen) = node(v6);
            let plan = diff(&intent, &seen).unwrap();
            let gone = plan.steps.iter().filter(|step| step.what == What::BranchLeftover).collect::<Vec<_>>();
            assert_eq!(gone.iter().map(|step| &step.action).collect::<Vec<_>>(), [&Action::DeleteLink(10)]);
            assert!(!plan.steps.iter().any(|step| step.what == What::BranchRule));
            seen.links.retain(|link| link.index != 10);
            seen.routes.retain(|route| route.dev != 10);
            let pod = if v6 { "2001:db8::70" } else { "10.20.13.70" };
            let left = [
                "delete rule 10: from all iif vlan.eth.7 lookup 107".to_owned(),
                "delete rule 10: from all iif vlan0000000000c lookup 107".to_owned(),
                format!("delete rule 1536: from {pod} lookup 107"),
            ];
            assert_eq!(deleted(&intent, &seen), left);
            seen.rules.retain(|rule| rule.table != 107);
            assert!(deleted(&intent, &seen).is_empty());
        }
    }

    #[test]
    fn any_sign_of_a_pod_keeps_the_device() {
        assert!(goes(|_, _| {}));
        // A pod in strict mode: of its veth, route and rule any two are enough, and the veth is enough by itself.
        let veth = |seen: &mut Observation, name: &str| seen.links.push(link(30, name, "veth"));
        let pod = link_route(107, ip("10.20.13.71"), 30);
        assert!(!goes(|_, seen| veth(seen, "vlan0000000000d")));
        assert!(!goes(|_, seen| {
            veth(seen, "vlan0000000000d");
            seen.routes.push(pod);
        }));
        assert!(!goes(|_, seen| veth(seen, "vlan0000000000c")));
        assert!(!goes(|_, seen| {
            veth(seen, "renamed0");
            seen.routes.push(pod);
        }));
        assert!(!goes(|_, seen| {
            veth(seen, "renamed0");
            seen.rules.push(iif("renamed0", 107));
        }));
        // One in standard mode: by the route to its address, whatever the link is called.
        assert!(!goes(|_, seen| seen.routes.push(link_route(TABLE_MAIN, ip("10.20.13.70"), 24))));
        assert!(!goes(|_, seen| veth(seen, "eni0000000000d")));
        assert!(!goes(|_, seen| {
            veth(seen, "eni0000000000d");
            seen.routes.push(link_route(TABLE_MAIN, ip("10.20.13.71"), 30));
        }));
        // Somebody has flushed what shows whose the veth of a living pod is.
        assert!(!goes(|_, seen| seen.rules.retain(|rule| rule.table != 109)));
        assert!(!goes(|_, seen| {
            seen.rules.retain(|rule| rule.table != 108);
            seen.routes.retain(|route| route.table != 108);
        }));
        // Either of the two is enough.
        assert!(goes(|_, seen| seen.rules.retain(|rule| rule.table != 108)));
        assert!(goes(|_, seen| seen.routes.retain(|route| route.table != 108)));
        // A veth that was renamed, and shows by its alias that it is a pod's.
        assert!(!goes(|_, seen| {
            let alias = naming::veth_alias(TRUNK, 9001, "enicc21c2d7785");
            seen.links.push(Link { alias, ..link(30, "odd0", "veth") });
        }));
    }

    #[test]
    fn veths_that_are_provably_of_others_stop_nothing() {
        let with = |veth: &dyn Fn(&mut Link), to: Option<(&str, u32)>, vpc: &str| {
            goes(|intent, seen| {
                intent.vpc_cidrs.extend(vpc.parse::<IpNet>());
                let mut theirs = link(30, "cali0000000000d", "veth");
                veth(&mut theirs);
                seen.links.push(theirs);
                seen.routes.extend(to.map(|(to, dev)| link_route(TABLE_MAIN, ip(to), dev)));
            })
        };
        let (vpc, plain) = ("10.20.0.0/16", &|_: &mut Link| {});
        assert!(!with(plain, None, vpc));
        let noted = |link: &mut Link| link.alias = naming::veth_alias(TRUNK, 9001, "enicc21c2d7785");
        // A route to a pod that cannot be one of ours: not in the VPC, which is known, and over this very link.
        assert!(with(plain, Some(("192.168.7.9", 30)), vpc));
        assert!(!with(plain, Some(("10.20.13.99", 30)), vpc));
        assert!(!with(plain, Some(("192.168.7.9", 30)), ""));
        assert!(!with(plain, Some(("192.168.7.9", 30)), "2001:db8::/32"));
        assert!(!with(plain, Some(("169.254.7.9", 30)), vpc));
        assert!(!with(plain, Some(("192.168.7.9", 23)), vpc));
        assert!(!with(&noted, Some(("192.168.7.9", 30)), vpc));
        // What leads to a pod of ours may lead elsewhere as well.
        assert!(!goes(|intent, seen| {
            intent.vpc_cidrs.extend(vpc.parse::<IpNet>());
            seen.links.push(link(30, "eni0000000000d", "veth"));
            seen.routes.extend(["10.20.13.99", "192.168.7.9"].map(|to| link_route(TABLE_MAIN, ip(to), 30)));
        }));
        // A port of a bridge, and one of something else.
        assert!(with(&|link| link.master = Some(23), None, vpc));
        assert!(!with(&|link| link.master = Some(2), None, vpc));
        assert!(!with(&|link| link.master = Some(99), None, vpc));
    }

    #[test]
    fn what_is_known_of_pods_counts() {
        // By the API server there is a pod with this VLAN, or there are two.
        let known = |intent: &mut Intent, vlan| {
            let eni = Branch::new(vlan, Mac::default(), ip("10.20.13.1")).unwrap();
            let veth = naming::suffix("default", "new", 0);
            intent.branches.push(HostBranch { address: ip("10.20.13.71"), eni, name: "default/new".into(), veth });
        };
        assert!(!goes(|intent, _| known(intent, 7)));
        assert!(goes(|intent, _| known(intent, 6)));
        // The address of a rule to the table.
        assert!(!goes(|intent, _| {
            let veth = String::new();
            intent.pods.push(HostPod { address: ip("10.20.13.70"), table: 107, name: String::new(), veth });
        }));
        // Ordinary pods that are not known, one whose name is not, and one whose link somebody has renamed.
        assert!(!goes(|intent, _| intent.pods.clear()));
        assert!(goes(|intent, _| intent.pods[0].veth.clear()));
        assert!(goes(|_, seen| seen.links[5].name = "odd0".into()));
    }

    #[test]
    fn what_is_not_ours_stays() {
        let device = |change: fn(&mut Link)| !goes(|_, seen| change(&mut seen.links[2]));
        for name in ["vlan7", "vlan.eth.07", "vlan.eth.154", "vlan.eth.", "vlan.eth.4096"] {
            assert!(!goes(|_, seen| {
                seen.rules.retain(|rule| rule.table != 107);
                seen.links[2].name = name.into();
            }));
        }
        assert!(device(|link| link.kind = Some("dummy".into())));
        assert!(device(|link| link.parent = Some(2)));
        assert!(device(|link| link.parent = None));
        assert!(device(|link| link.master = Some(23)));
        // No trunk, one that is not there, and one that was renamed.
        assert!(!goes(|intent, _| intent.enis[0].trunk = false));
        assert!(!goes(|intent, _| intent.enis.clear()));
        assert!(!goes(|_, seen| seen.links[1].mac = None));
        assert!(goes(|_, seen| seen.links[1].name = "ens6".into()));
        // Something stands on the device, or leads over it.
        assert!(!goes(|_, seen| seen.links.push(Link { parent: Some(10), ..link(30, "mac0", "macvlan") })));
        assert!(goes(|_, seen| seen.links.push(Link { parent: Some(10), ..link(30, "mac0", "veth") })));
        let address = |seen: &mut Observation, addr: &str| {
            let addr = addr.parse().unwrap();
            seen.addresses.push(Address { dev: 10, addr, no_prefix_route: false, no_dad: true });
        };
        assert!(!goes(|_, seen| address(seen, "10.9.0.1/24")));
        assert!(goes(|_, seen| address(seen, "fe80::1/64")));
        let over = |seen: &mut Observation, dst: &str| {
            let (dst, scope) = (dst.parse().unwrap(), Scope::Universe);
            seen.routes.push(Route { table: TABLE_MAIN, dst, gateway: None, dev: 10, scope, prefsrc: None, metric: 0 });
        };
        assert!(!goes(|_, seen| over(seen, "10.9.0.0/24")));
        assert!(!goes(|_, seen| over(seen, "0.0.0.0/0")));
        assert!(goes(|_, seen| over(seen, "fe80::/64")));
        // Rules to the table that are not of our shape, and one that takes its packets elsewhere.
        for rule in [
            iif("eth5", 107),
            Rule { foreign: true, ..iif("vlan.eth.7", 107) },
            Rule { priority: 11, ..iif("vlan.eth.7", 107) },
            Rule::any(Family::V4, 10, 107),
            Rule::from("10.20.13.0/24".parse().unwrap(), 1536, 107),
            Rule { fwmark: Some((1, 1)), ..from("10.20.13.72", 107) },
            iif("vlan.eth.7", 42),
        ] {
            assert!(!goes(|_, seen| seen.rules.push(rule.clone())), "{rule}");
        }
        assert!(!goes(|_, seen| seen.routes.push(link_route(107, ip("10.20.13.72"), 3))));
    }

    #[test]
    fn a_rule_of_a_pod_in_standard_mode_is_no_leftover_while_a_route_leads_there() {
        let (intent, mut seen) = node(false);
        seen.links.retain(|link| link.index != 12);
        seen.routes.retain(|route| route.dev != 12);
        assert_eq!(deleted(&intent, &seen).len(), 1, "that of VLAN 7");
        // The veth is there, and somebody has taken the route away.
        seen.routes.retain(|route| route.dev != 22);
        assert!(deleted(&intent, &seen).is_empty());
        seen.links.retain(|link| link.index != 22);
        let rules = deleted(&intent, &seen);
        assert!(rules.contains(&"delete rule 1536: from 10.20.13.90 lookup 109".to_owned()), "{rules:?}");
    }

    #[test]
    fn a_rule_that_an_add_has_found_is_put_back() {
        let rules = [iif("vlan.eth.7", 107), iif("vlan0000000000c", 107), from("10.20.13.70", 107)];
        let check = |fault: &dyn Fn(&mut Observation), expected: &[usize]| {
            let (intent, mut seen) = node(false);
            seen.rules.clear();
            fault(&mut seen);
            let steps = regrets(&intent, &seen, &rules.iter().collect::<Vec<_>>());
            let wanted = expected.iter().map(|number| Action::AddRule(rules[*number].clone())).collect::<Vec<_>>();
            assert_eq!(steps.into_iter().map(|step| step.action).collect::<Vec<_>>(), wanted);
        };
        let veth = |seen: &mut Observation| seen.links.push(link(30, "vlan0000000000c", "veth"));
        let way = |seen: &mut Observation| seen.routes.push(link_route(TABLE_MAIN, ip("10.20.13.70"), 24));
        check(&|_| {}, &[0]);
        check(&veth, &[0, 1]);
        check(&way, &[0, 2]);
        check(
            &|seen| {
                seen.links.remove(2);
                veth(seen);
                way(seen);
            },
            &[],
        );
    }

    #[test]
    fn a_pod_with_a_veth_alone_is_given_time() {
        let (mut intent, mut seen) = node(false);
        let eni = Branch::new(9, Mac([2, 0, 0, 0, 0, 12]), ip("10.20.13.1")).unwrap();
        let (address, veth) = (ip("10.20.13.90"), "0000000000b".to_owned());
        intent.branches.push(HostBranch { address, eni, name: "default/standard".into(), veth });
        seen.links[7].alias = naming::veth_alias(Mac::default(), 9001, "eni0000000000b");
        let whole = seen.clone();
        seen.links.retain(|link| link.index != 12);
        seen.rules.retain(|rule| rule.table != 109);
        seen.routes.retain(|route| route.table != 109 && route.dev != 22);
        let planned = |idle: &mut Idle, seconds: u64, seen: &Observation| {
            let mut plan = diff(&intent, seen).unwrap();
            idle.look(Mono::from_nanos(seconds * 1_000_000_000), &intent, seen, &mut plan);
            plan.steps.iter().any(|step| matches!(&step.action, Action::AddVlan(made, 3) if *made == eni))
        };
        let mut idle = Idle::default();
        assert!(!planned(&mut idle, 1000, &seen));
        assert!(!planned(&mut idle, 1009, &seen));
        assert!(planned(&mut idle, 1010, &seen));
        assert!(!planned(&mut idle, 1011, &whole));
        assert!(!planned(&mut idle, 1012, &seen), "another time");
        // A device that was deleted beside its rules is made at once.
        let mut lost = whole.clone();
        lost.links.retain(|link| link.index != 12);
        lost.routes.retain(|route| route.dev != 12);
        assert!(planned(&mut idle, 1013, &lost));
    }

    #[test]
    fn a_device_is_given_time() {
        let (intent, seen) = node(false);
        let at = |seconds: u64| Mono::from_nanos(seconds * 1_000_000_000);
        let planned = |idle: &mut Idle, seconds: u64, seen: &Observation| {
            let mut plan = diff(&intent, seen).unwrap();
            let others = plan.steps.len();
            idle.look(at(seconds), &intent, seen, &mut plan);
            assert!(plan.steps.len() + 1 >= others, "nothing else is taken out");
            plan.steps.iter().any(|step| step.what == What::BranchLeftover)
        };
        let mut used = seen.clone();
        used.routes.push(link_route(107, ip("10.20.13.71"), 24));
        let mut unclear = seen.clone();
        unclear.links.push(link(30, "eni0000000000d", "veth"));
        let mut idle = Idle::default();
        assert!(!planned(&mut idle, 1000, &seen));
        assert!(!planned(&mut idle, 1299, &seen));
        assert!(planned(&mut idle, 1300, &seen));
        // A pod had it meanwhile.
        assert!(!planned(&mut idle, 1310, &used));
        assert!(!planned(&mut idle, 1320, &seen));
        assert!(!planned(&mut idle, 1600, &seen));
        // Another pod comes up: that tells nothing of this device, but is not the time.
        assert!(!planned(&mut idle, 1620, &unclear));
        assert!(planned(&mut idle, 1621, &seen));
        // Another device of the name.
        let mut again = seen.clone();
        again.links[2].index = 40;
        again.routes.retain(|route| route.dev != 10);
        assert!(!planned(&mut idle, 1630, &again));
        assert!(planned(&mut idle, 1930, &again));
    }
}
