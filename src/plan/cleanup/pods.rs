//! What pods have on a node besides their rules: the routes that lead to them, and the VLAN devices of branch ENIs. A link that
//! may be somebody else's stays, as it does when the daemon looks for leftovers (`plan::host`); so does what goes with a pod or
//! was there before, and it is told why.

use super::{Cleanup, host, kind, push};
use crate::model::map::Set;
use crate::model::naming;
use crate::model::net::{Family, Link, Route, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::plan::branch::{is_vlan, link_route};
use crate::plan::egress;
use crate::plan::host::{Action, Observation, What, global};

/// After rules and the tables of ENIs; `pods` are the host's ends of living pods.
pub(super) fn remove(seen: &Observation, pods: &Set<u32>, cleanup: &mut Cleanup) {
    let bridged = |link: &Link| link.master.is_some() && naming::of_veth_alias(&link.alias).is_none();
    let links = seen.links.iter().filter(|link| pods.contains(&link.index) && !bridged(link));
    let pods = links.map(|link| link.index).gather::<Set<_>>();
    let ends = seen.links.iter().filter(|link| egress::is_host_end(link) && !pods.contains(&link.index));
    let ends = ends.map(|link| link.index).gather::<Set<_>>();
    let enis = of_enis(seen, cleanup);
    for route in seen.routes.iter().filter(|route| host(&route.dst)) {
        let egress = route.table == TABLE_MAIN && egress::range(Family::of(route.dst.addr())).contains(&route.dst);
        let what = match route.table {
            TABLE_MAIN if ends.contains(&route.dev) && egress => What::EgressRoute,
            TABLE_MAIN if pods.contains(&route.dev) => What::PodRoute,
            table if pods.contains(&route.dev) && naming::vlan_of_table(table).is_some() => What::BranchRoute,
            _ => continue,
        };
        // In a table that goes as a whole it is listed already.
        let action = Action::DeleteRoute(*route);
        let listed = || cleanup.steps.iter().any(|step| step.action == action);
        if *route == link_route(route.table, route.dst.addr(), route.dev) && (route.table == TABLE_MAIN || !listed()) {
            let text = format!("delete route {}", super::route_text(route, seen));
            push(&mut cleanup.steps, what, action, text);
        }
    }
    for link in seen.links.iter().filter(|link| pods.contains(&link.index) || ends.contains(&link.index)) {
        cleanup.stays.push(format!("{}{} stays: it goes with its pod", link.name, addresses(seen, link)));
    }
    devices(seen, &pods, cleanup);
    for link in seen.links.iter().filter(|link| enis.contains(&link.index) && !is_vlan(link)) {
        let with = addresses(seen, link);
        cleanup
            .stays
            .push(format!("{}{with} stays up: EC2 has given that to this ENI, and it does no harm", link.name));
    }
    if !cleanup.steps.is_empty() {
        cleanup.stays.push("sysctls and MTUs stay: what they were before is noted nowhere".into());
    }
}

/// Links that the default routes of those tables lead over that go.
fn of_enis(seen: &Observation, cleanup: &Cleanup) -> Set<u32> {
    let of_eni = |route: &Route| route.gateway.is_some() && naming::in_eni_ranges(route.table);
    let routes = cleanup.steps.iter().filter_map(|step| match &step.action {
        Action::DeleteRoute(route) if of_eni(route) => Some(route.dev),
        _ => None,
    });
    // A trunk without an address of its own may be below devices alone.
    let trunks = seen.links.iter().filter(|link| is_vlan(link) && naming::vlan_of_device(&link.name).is_some());
    routes.chain(trunks.filter_map(|link| link.parent)).gather()
}

fn addresses(seen: &Observation, link: &Link) -> String {
    let own = seen.addresses.iter().filter(|address| address.dev == link.index);
    let own = own.map(|address| address.addr.to_string()).collect::<Vec<_>>();
    if own.is_empty() { String::new() } else { format!(" with {}", own.join(", ")) }
}

fn devices(seen: &Observation, pods: &Set<u32>, cleanup: &mut Cleanup) {
    for link in seen.links.iter().filter(|link| is_vlan(link)) {
        let Some(vlan) = naming::vlan_of_device(&link.name) else { continue };
        if let Some(why) = of_others(seen, pods, link, vlan + 100) {
            cleanup.stays.push(format!("{} stays: {why}", link.name));
            continue;
        }
        let text = format!("delete VLAN device {} (index {})", link.name, link.index);
        push(&mut cleanup.steps, What::BranchLeftover, Action::DeleteLink(link.index), text);
    }
}

/// Why a VLAN device of our name cannot be taken for ours.
fn of_others(seen: &Observation, pods: &Set<u32>, device: &Link, table: u32) -> Option<&'static str> {
    let index = device.index;
    // Which ENIs were trunks nobody knows any more; none is a link of these kinds.
    let virtual_kind =
        |link: &Link| matches!(link.kind.as_deref(), Some("bridge" | "bond" | "team" | "vlan" | "dummy"));
    let below = |link: &&Link| Some(link.index) == device.parent && !virtual_kind(link);
    // The number of a veth's other end is that of another namespace.
    let upon = |link: &Link| link.parent == Some(index) && link.kind.as_deref() != Some("veth");
    let own = |route: &Route| route.table == table || (route.dst.prefix_len() > 0 && !global(route.dst.addr()));
    let foreign = |route: &Route| {
        if route.dev == index { !own(route) } else { route.table == table && !pods.contains(&route.dev) }
    };
    if !seen.links.iter().any(|link| below(&link)) {
        Some("the link below it is no ENI")
    } else if device.master.is_some() || seen.links.iter().any(upon) {
        Some("somebody has joined it to another link")
    } else if seen.addresses.iter().any(|address| address.dev == index && global(address.addr.addr())) {
        Some("somebody has given it an address")
    } else if seen.routes.iter().any(foreign) {
        Some("somebody has routes over it or in its table")
    } else if seen
        .rules
        .iter()
        .any(|rule| (rule.table == table || rule.iif.as_ref() == Some(&device.name)) && kind(rule, seen).is_none())
    {
        Some("somebody has rules for it or to its table")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::naming::priority;
    use crate::model::net::{Address, Mac, Rule, Scope};
    use crate::plan::cleanup::cleanup;
    use crate::plan::egress::HostEnd;
    use std::net::IpAddr;

    const POD: &str = "enicc21c2d7785";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn link(index: u32, name: &str, kind: &str) -> Link {
        let kind = Some(kind.to_owned()).filter(|kind| !kind.is_empty());
        Link { index, name: name.into(), kind, up: true, ..Link::default() }
    }

    /// A node with an ordinary pod, one with a branch ENI in strict mode, and a way out in the other family; no rule of theirs.
    fn node() -> Observation {
        let device = Link { parent: Some(3), ..link(10, "vlan.eth.7", "vlan") };
        let (pod, gateway) = (ip("fd00::ac:2"), ip("fe80::1"));
        let end = HostEnd { mac: Mac::default(), mtu: 9001, pod, gateway, number: Some(9) };
        let egress = Link { alias: end.alias(), ..link(22, "veth00000009", "veth") };
        let branch = crate::plan::branch::Branch::new(7, Mac::default(), ip("10.20.13.1")).unwrap();
        let mut routes = branch.routes(10).to_vec();
        routes.extend([
            branch.pod_route(ip("10.20.13.70"), 21),
            link_route(TABLE_MAIN, ip("10.20.11.50"), 20),
            link_route(TABLE_MAIN, pod, 22),
        ]);
        let mut links = vec![link(2, "eth0", ""), link(3, "eth1", ""), device, link(20, POD, "veth")];
        links.extend([link(21, "vlancc21c2d7786", "veth"), egress, link(23, "docker0", "bridge")]);
        Observation { links, routes, addresses: vec![end.address(22)], ..Observation::default() }
    }

    #[track_caller]
    fn check(change: impl Fn(&mut Observation), gone: &[&str], come: &[&str]) {
        let texts = |seen: &Observation| {
            let found = cleanup(seen, "eni", false);
            found.texts().into_iter().chain(found.stays).collect::<Vec<_>>()
        };
        let (mut seen, before) = (node(), texts(&node()));
        change(&mut seen);
        let after = texts(&seen);
        let only = |these: &[String], those: &[String]| {
            these.iter().filter(|line| !those.contains(line)).cloned().collect::<Vec<_>>()
        };
        assert_eq!((only(&before, &after), only(&after, &before)), (words(gone), words(come)));
    }

    fn words(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    const TO_POD: &str = "delete route 10.20.11.50 dev enicc21c2d7785 scope link";
    const TO_BRANCH: &str = "delete route 10.20.13.70 dev vlancc21c2d7786 table 107 scope link";
    const DEVICE: &str = "delete VLAN device vlan.eth.7 (index 10)";

    #[test]
    fn routes_and_devices_go_and_links_of_pods_stay() {
        let found = cleanup(&node(), "eni", false);
        let egress = "delete route fd00::ac:2 dev veth00000009 metric 1024";
        assert_eq!(found.texts(), [TO_BRANCH, TO_POD, egress, DEVICE]);
        let stays = [
            "enicc21c2d7785 stays: it goes with its pod",
            "vlancc21c2d7786 stays: it goes with its pod",
            "veth00000009 with fe80::1/64 stays: it goes with its pod",
            "eth1 stays up: EC2 has given that to this ENI, and it does no harm",
            "sysctls and MTUs stay: what they were before is noted nowhere",
        ];
        assert_eq!(found.stays, stays);
        let filter = cleanup(&node(), "eni", true);
        assert_eq!((filter.is_empty(), filter.stays.is_empty()), (true, true));
        assert_eq!(cleanup(&Observation::default(), "eni", false).stays, Vec::<String>::new());
    }

    #[test]
    fn routes_of_others_stay() {
        let pod = |change: &dyn Fn(&mut Route), kept: bool| {
            check(|seen| change(&mut seen.routes[3]), if kept { &[TO_POD] } else { &[] }, &[]);
        };
        pod(&|route| route.dst = "10.20.11.0/24".parse().unwrap(), true);
        pod(&|route| route.gateway = Some(ip("10.20.11.1")), true);
        pod(&|route| route.metric = 5, true);
        pod(&|route| route.scope = Scope::Universe, true);
        pod(&|route| route.dev = 2, true);
        pod(&|route| route.table = 42, true);
        pod(&|_| {}, false);
        // A veth of another name, without and with our note; a port of a bridge.
        let stays = "enicc21c2d7785 stays: it goes with its pod";
        check(|seen| seen.links[3].name = "odd0".into(), &[TO_POD, stays], &[]);
        let noted = |seen: &mut Observation| {
            seen.links[3].name = "odd0".into();
            seen.links[3].alias = naming::veth_alias(Mac::default(), 9001, POD);
        };
        let renamed = ["delete route 10.20.11.50 dev odd0 scope link", "odd0 stays: it goes with its pod"];
        check(noted, &[TO_POD, stays], &renamed);
        check(|seen| seen.links[3].master = Some(23), &[TO_POD, stays], &[]);
        // Outside of the range no pod has an address of that kind.
        let egress = "delete route fd00::ac:2 dev veth00000009 metric 1024";
        check(|seen| seen.routes[4].dst = "fd00::bc:2/128".parse().unwrap(), &[egress], &[]);
    }

    #[test]
    fn devices_of_others_stay() {
        let kept = |change: &dyn Fn(&mut Observation), why: &str| {
            check(change, &[DEVICE], &[&format!("vlan.eth.7 stays: {why}")]);
        };
        let device = |change: fn(&mut Link)| move |seen: &mut Observation| change(&mut seen.links[2]);
        kept(&|seen| seen.links[1].kind = Some("bridge".into()), "the link below it is no ENI");
        kept(&device(|link| link.master = Some(23)), "somebody has joined it to another link");
        let upon = Link { parent: Some(10), ..link(30, "mac0", "macvlan") };
        kept(&|seen| seen.links.push(upon.clone()), "somebody has joined it to another link");
        let address = |seen: &mut Observation, addr: &str| {
            let addr = addr.parse().unwrap();
            seen.addresses.push(Address { dev: 10, addr, no_prefix_route: false, no_dad: true });
        };
        kept(&|seen| address(seen, "10.9.0.1/24"), "somebody has given it an address");
        check(|seen| address(seen, "fe80::7/64"), &[], &[]);
        let routes = "somebody has routes over it or in its table";
        kept(&|seen| seen.routes.push(link_route(TABLE_MAIN, ip("10.9.0.1"), 10)), routes);
        kept(&|seen| seen.routes.push(link_route(107, ip("10.9.0.1"), 2)), routes);
        let rules = "somebody has rules for it or to its table";
        let iif = |table| Rule { iif: Some("vlan.eth.7".into()), ..Rule::any(Family::V4, priority::BRANCH, table) };
        kept(&|seen| seen.rules.push(Rule { priority: 11, ..iif(107) }), rules);
        kept(&|seen| seen.rules.push(Rule { foreign: true, ..iif(107) }), rules);
        kept(&|seen| seen.rules.push(iif(42)), rules);
        // Of another kind or name it is nothing to us.
        let lost = [DEVICE, "eth1 stays up: EC2 has given that to this ENI, and it does no harm"];
        check(|seen| seen.links[2].kind = Some("dummy".into()), &lost, &[]);
        check(|seen| seen.links[2].name = "vlan.eth.07".into(), &lost, &[]);
        // With rules of ours it goes after them.
        let ours = "delete rule 10: from all iif vlan.eth.7 lookup 107";
        let more =
            ["10.20.13.1 dev vlan.eth.7 table 107 scope link", "default via 10.20.13.1 dev vlan.eth.7 table 107"];
        let more = more.map(|route| format!("delete route {route}"));
        check(|seen| seen.rules.push(iif(107)), &[], &[ours, &more[0], &more[1]]);
        let mut seen = node();
        seen.rules.push(iif(107));
        assert_eq!(cleanup(&seen, "eni", false).texts().last().unwrap(), DEVICE);
    }

    #[test]
    fn enis_stay_as_they_are() {
        let route = Route { scope: Scope::Universe, ..link_route(2, ip("10.20.12.1"), 3) };
        let dst = "0.0.0.0/0".parse().unwrap();
        let routes = [link_route(2, ip("10.20.12.1"), 3), Route { dst, gateway: Some(ip("10.20.12.1")), ..route }];
        let addr = "10.20.12.5/24".parse().unwrap();
        let address = Address { dev: 3, addr, no_prefix_route: true, no_dad: false };
        let (links, addresses) = (vec![link(3, "eth1", "")], vec![address]);
        let found =
            cleanup(&Observation { links, addresses, routes: routes.to_vec(), ..Observation::default() }, "eni", false);
        assert_eq!(found.steps.len(), 2);
        let line = "eth1 with 10.20.12.5/24 stays up: EC2 has given that to this ENI, and it does no harm";
        assert_eq!(found.stays[0], line);
    }
}
