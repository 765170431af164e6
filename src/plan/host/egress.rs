//! The host's ends of pods' ways out in the other family (`spec/egress.md` 3.5, 3.6, 4.6), which `egress-cni` makes and of which
//! the daemon is told nothing: each link says in its alias what it was made with ([`HostEnd`]). Only links that do, or of which
//! it can be told without doubt, are touched.
//!
//! A DEL of the plugin may be at work at the same time. It deletes the link, and everything here hangs on that: what is put back on
//! a link that dies goes with it, and for one that is gone the kernel refuses it. An ADD may be at work as well, which notes what it
//! makes before it has made it: the daemon gives every link a moment ([`Fresh`]).

use super::planner::Planner;
use super::{Action, Observation, Plan, Step, What, link_of, single};
use crate::model::map::{Map, Set};
use crate::model::net::{Family, Link, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::model::time::Mono;
use crate::plan::egress::{GATEWAY_V6, HostEnd, is_host_end, number_of, range};
use ipnet::IpNet;
use std::borrow::Cow;
use std::net::IpAddr;
use std::time::Duration;

/// Links by address.
type Devs = Map<IpAddr, Vec<u32>>;

impl Planner<'_> {
    /// Every host end is up with its name, its MAC, its MTU and its address, and the route to its pod leads over it.
    pub(super) fn egress(&mut self) {
        let seen = self.seen;
        let candidates = seen.links.iter().filter(|link| is_host_end(link));
        let (bare, told) = candidates.partition::<Vec<_>, _>(|link| link.alias.is_empty());
        let ends = told.into_iter().filter_map(|link| Some((link.index, (link, HostEnd::of(link)?))));
        let ends = ends.gather::<Map<u32, (&Link, HostEnd)>>();
        if ends.is_empty() && bare.is_empty() {
            return;
        }
        let ways = ways(seen);
        for link in bare {
            if let Some(end) = guess(link, seen, &ways) {
                self.note_egress(link, end);
            }
        }
        self.forwarding_v4(&ends);
        let own = seen.addresses.iter().filter(|address| {
            ends.get(&address.dev).is_some_and(|(_, end)| end.address(address.dev).addr == address.addr)
        });
        let gateways = own.map(|address| address.dev).gather::<Set<_>>();
        let mut owners = Devs::new();
        for (dev, (_, end)) in &ends {
            owners.entry(end.pod).or_default().push(*dev);
        }
        for (dev, (link, end)) in &ends {
            self.egress_link(link, end);
            if !gateways.contains(dev) {
                let address = end.address(*dev);
                let text = format!("add address {} to {}", address.addr, link.name);
                self.add(What::EgressAddress, None, Action::AddAddress(address), text);
            }
            // Of several links for one address the others are dying, or were forgotten: an ADD takes the route for the link that
            // it has just made, and the kernel's numbers grow.
            let Some(devs) = owners.get(&end.pod).filter(|devs| devs.last() == Some(dev)) else { continue };
            let stands = ways.get(&end.pod).is_some_and(|ways| {
                // What leads over a link that was not there a moment ago is of the address's next owner; and what leads over any
                // of these is left, as somebody has seen to it.
                ways.iter().any(|led| devs.contains(led) || !seen.links.iter().any(|link| link.index == *led))
            });
            self.want_asking(end.pod, link);
            let route = end.route(*dev);
            if stands {
                self.no_barrier(What::EgressRoute, None, &route);
            } else {
                let text = format!("replace route {} dev {}", end.pod, link.name);
                self.add(What::EgressRoute, None, Action::ReplaceRoute(route), text);
            }
        }
    }

    fn note_egress(&mut self, link: &Link, end: HostEnd) {
        let text = format!("note mac {} mtu {} pod {} on {}", end.mac, end.mtu, end.pod, link.name);
        self.add(What::PodNote, None, Action::NoteEgress(link.index, end), text);
    }

    /// IPv4 packets come in by these links and the primary ENI's, and the kernel lets through what every single one of them
    /// lets. For IPv6 it only asks the setting of all (`ip6_forward` in net/ipv6/ip6_output.c).
    fn forwarding_v4(&mut self, ends: &Map<u32, (&Link, HostEnd)>) {
        let (intent, seen) = (self.intent, self.seen);
        let mut links = ends.values().filter(|(_, end)| end.pod.is_ipv4()).map(|(link, _)| *link).peekable();
        // In IPv4 mode it is the system's own. Where it is off for all, it is switched on for all.
        let on = seen.links.iter().any(|link| link.name == "lo" && link.forwards == Some(true));
        if !on || !intent.v6 || links.peek().is_none() {
            return;
        }
        for link in links.chain(link_of(&seen.links, intent.primary_mac)) {
            self.let_through(None, link);
        }
    }

    fn egress_link(&mut self, link: &Link, end: &HostEnd) {
        let (HostEnd { mac, mtu, .. }, name) = (end, &link.name);
        match end.name() {
            Some(first) if first != *name => self.give_name_back(What::EgressLink, link, first),
            // An earlier version has noted no name: as long as this is one of ours, it is the first one.
            None => {
                let number = number_of(name).filter(|_| link.up);
                if number.is_some() {
                    self.note_egress(link, HostEnd { number, ..*end });
                }
            }
            Some(_) => {}
        }
        if link.mac != Some(*mac) {
            self.add(What::EgressLink, None, Action::SetMac(link.index, *mac), format!("set address {mac} on {name}"));
        }
        if link.mtu != *mtu {
            self.add(What::EgressLink, None, Action::SetMtu(link.index, *mtu), format!("set mtu {mtu} on {name}"));
        }
        if !link.works() {
            self.set_up(What::EgressLink, None, link);
        }
    }
}

/// Since when host ends have been seen. What one of them lacks at first its ADD may be about to make.
#[derive(Debug, Default)]
pub struct Fresh {
    since: Map<u32, Mono>,
}

impl Fresh {
    /// How long an end must have been seen. An ADD makes the rest with the one call that notes the end; and what somebody takes
    /// away of a new end is to be back within a second.
    pub const MIN: Duration = Duration::from_millis(300);

    /// Notes what a look has shown, and takes what is too early out of its plan: when that is to be looked at again.
    pub fn look(&mut self, now: Mono, seen: &Observation, plan: &mut Plan) -> Option<Mono> {
        let ends = seen.links.iter().filter(|link| HostEnd::of(link).is_some());
        let ends = ends.map(|link| link.index).gather::<Set<_>>();
        self.since.retain(|index, _| ends.contains(index));
        for index in ends {
            self.since.entry(index).or_insert(now);
        }
        let early =
            |step: &Step| Some(self.since.get(&end_of(&step.action)?)?.plus(Self::MIN)).filter(|due| now < *due);
        let due = plan.steps.iter().filter_map(early).min();
        plan.steps.retain(|step| early(step).is_none());
        due
    }
}

/// The link on which a step puts something back.
fn end_of(action: &Action) -> Option<u32> {
    match action {
        Action::SetMac(index, _) | Action::SetMtu(index, _) | Action::SetUp(index) | Action::Rename(index, _) => {
            Some(*index)
        }
        Action::AddAddress(address) => Some(address.dev),
        Action::ReplaceRoute(route) => Some(route.dev),
        _ => None,
    }
}

/// The links, as if on every host end stood what it was made with: whether pods still use the way out must not hang on when that is
/// noted, as an earlier version noted nothing.
pub(super) fn told(seen: &Observation) -> Cow<'_, [Link]> {
    let bare = |link: &Link| link.alias.is_empty() && is_host_end(link);
    if !seen.links.iter().any(bare) {
        return Cow::Borrowed(&seen.links);
    }
    let (ways, mut links) = (ways(seen), seen.links.clone());
    for link in links.iter_mut().filter(|link| bare(link)) {
        link.alias = guess(link, seen, &ways).map(|end| end.alias()).unwrap_or_default();
    }
    Cow::Owned(links)
}

/// The links that the routes to pods' addresses lead over.
fn ways(seen: &Observation) -> Devs {
    let mut ways = Devs::new();
    for route in seen.routes.iter().filter(|route| route.table == TABLE_MAIN && route.gateway.is_none()) {
        if let Some(pod) = single(route.dst).filter(|pod| range(Family::of(*pod)).contains(pod)) {
            ways.entry(pod).or_default().push(route.dev);
        }
    }
    ways
}

/// What a link without an alias was made with, by an earlier release or by the original, if all of it is there: up, with the one
/// route over it that leads to an address of the range, and with an address that pods send to.
fn guess(link: &Link, seen: &Observation, ways: &Devs) -> Option<HostEnd> {
    let mut pods = ways.iter().filter(|(_, devs)| devs.contains(&link.index));
    let (pod, devs) = pods.next().filter(|_| link.up)?;
    if devs.len() > 1 || pods.next().is_some() {
        return None;
    }
    let on_link = seen.addresses.iter().filter(|address| address.dev == link.index).map(|address| address.addr);
    let could_be = |own: &IpNet| match (pod, own.addr()) {
        (IpAddr::V4(_), IpAddr::V4(_)) => single(*own).is_some_and(|own| range(Family::V4).contains(&own)),
        (IpAddr::V6(_), IpAddr::V6(own)) => own.is_unicast_link_local(),
        _ => false,
    };
    let own = on_link.filter(could_be).map(|own| own.addr()).collect::<Vec<_>>();
    let gateway = match own[..] {
        [only] => only,
        // The kernel has given it one of its own beside ours.
        _ => own.into_iter().find(|address| *address == IpAddr::V6(GATEWAY_V6))?,
    };
    Some(HostEnd { mac: link.mac?, mtu: link.mtu, pod: *pod, gateway, number: number_of(&link.name) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::net::{Address, Barrier, Mac, Rule};
    use crate::plan::host::{Egress, Intent, diff};
    use crate::plan::ruleset;

    const OURS: HostEnd = HostEnd {
        mac: Mac([2, 0, 0, 0, 0, 9]),
        mtu: 9001,
        pod: IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 172, 7)),
        gateway: IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 172, 1)),
        number: Some(9),
    };

    const PRIMARY: Option<Mac> = Some(Mac([2, 0, 0, 0, 0, 3]));

    fn six() -> HostEnd {
        HostEnd { pod: "fd00::ac:7".parse().unwrap(), gateway: GATEWAY_V6.into(), ..OURS }
    }

    fn link(index: u32, end: &HostEnd) -> Link {
        Link {
            index,
            name: format!("veth0000000{index}"),
            kind: Some("veth".into()),
            mac: Some(end.mac),
            mtu: end.mtu,
            up: true,
            alias: end.alias(),
            ..Link::default()
        }
    }

    /// A node with one pod at link 9.
    fn wired(end: &HostEnd) -> Observation {
        let eth0 = Link { index: 3, name: "eth0".into(), up: true, ..Link::default() };
        let (links, addresses, routes) = (vec![eth0, link(9, end)], vec![end.address(9)], vec![end.route(9)]);
        Observation { links, addresses, routes, rules: vec![Rule::any(Family::V4, 0, 255)], ..Observation::default() }
    }

    fn steps(seen: &Observation) -> Vec<Step> {
        let intent = Intent::default();
        let mut planner = Planner::new(&intent, seen);
        planner.egress();
        assert!(planner.delete.is_empty());
        planner.add
    }

    #[track_caller]
    fn check(end: &HostEnd, fault: impl Fn(&mut Observation), wanted: &[&str]) {
        let mut seen = wired(end);
        fault(&mut seen);
        let found = steps(&seen);
        assert_eq!(found.iter().map(|step| step.text.as_str()).collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn what_the_alias_says_is_put_back() {
        let (six, route) = (six(), "replace route 169.254.172.7 dev veth00000009");
        for end in [&OURS, &six] {
            check(end, |_| {}, &[]);
            check(end, |seen| seen.links[1].mac = None, &["set address 02:00:00:00:00:09 on veth00000009"]);
            check(end, |seen| seen.links[1].mtu = 1500, &["set mtu 9001 on veth00000009"]);
            check(end, |seen| seen.links[1].no_arp = true, &["set veth00000009 arp on"]);
        }
        check(&OURS, |seen| seen.routes.clear(), &[route]);
        check(&OURS, |seen| seen.routes[0].dev = 3, &[route]);
        check(&OURS, |seen| seen.addresses.clear(), &["add address 169.254.172.1/32 to veth00000009"]);
        let down = |seen: &mut Observation| {
            seen.links[1].up = false;
            seen.addresses.retain(|address| address.addr.addr().is_ipv4());
            seen.routes.clear();
        };
        check(&OURS, down, &["set veth00000009 up", route]);
        let all = [
            "set veth00000009 up",
            "add address fe80::1/64 to veth00000009",
            "replace route fd00::ac:7 dev veth00000009",
        ];
        check(&six, down, &all);
    }

    #[test]
    fn what_lets_nothing_through_in_place_of_a_route_goes() {
        for (end, metric, others) in [(OURS, 0, 1024), (six(), 1024, 0)] {
            let mut seen = wired(&end);
            let barrier = |metric| Barrier { kind: 6, table: TABLE_MAIN, dst: IpNet::from(end.pod), dev: 0, metric };
            seen.barriers = vec![barrier(metric), barrier(others)];
            let intent = Intent::default();
            let mut planner = Planner::new(&intent, &seen);
            planner.egress();
            assert!(planner.add.is_empty(), "{:?}", planner.add);
            let gone = planner.delete.into_iter().map(|step| step.action);
            assert_eq!(gone.collect::<Vec<_>>(), [Action::DeleteBarrier(barrier(metric))]);
        }
    }

    #[test]
    fn a_renamed_end_is_followed_and_gets_its_name_back() {
        let name = "set name veth00000009 on odd0";
        let rename = |seen: &mut Observation| seen.links[1].name = "odd0".into();
        for end in [&OURS, &six()] {
            check(end, rename, &[name]);
        }
        check(&OURS, |seen| seen.links[1].name = "veth000000a1".into(), &["set name veth00000009 on veth000000a1"]);
        let lost = |seen: &mut Observation| {
            rename(seen);
            seen.routes.clear();
        };
        check(&OURS, lost, &[name, "replace route 169.254.172.7 dev odd0"]);
        // Somebody has the name; and a name that nobody has noted: what is left is kept.
        let taken = |seen: &mut Observation| {
            lost(seen);
            seen.links[0].name = "veth00000009".into();
        };
        check(&OURS, taken, &["replace route 169.254.172.7 dev odd0"]);
        let earlier = HostEnd { number: None, ..OURS };
        check(&earlier, lost, &["replace route 169.254.172.7 dev odd0"]);
        // Before that it is noted.
        check(&earlier, |_| {}, &["note mac 02:00:00:00:00:09 mtu 9001 pod 169.254.172.7 on veth00000009"]);
        let mut seen = wired(&earlier);
        assert_eq!(steps(&seen)[0].action, Action::NoteEgress(9, OURS));
        seen.links[1].up = false;
        assert_eq!(steps(&seen).len(), 1, "it may be on its way out");
    }

    #[test]
    fn in_ipv6_mode_every_link_lets_ipv4_through() {
        let check = |v6: bool, end: &HostEnd, all: bool, expected: &[&str]| {
            let mut seen = wired(end);
            for link in &mut seen.links {
                (link.forwards, link.mac) = (Some(false), Some(end.mac).filter(|_| link.index == 9).or(PRIMARY));
            }
            seen.links.push(Link { index: 1, name: "lo".into(), forwards: Some(all), up: true, ..Link::default() });
            let intent = Intent { v6, primary_mac: PRIMARY.unwrap(), ..Intent::default() };
            let mut planner = Planner::new(&intent, &seen);
            planner.egress();
            assert_eq!(planner.add.iter().map(|step| step.text.as_str()).collect::<Vec<_>>(), expected);
        };
        let both = ["veth00000009", "eth0"]
            .map(|name| format!("set sysctl net/ipv4/conf/{name}/forwarding to 1 instead of 0"));
        check(true, &OURS, true, &both.each_ref().map(String::as_str));
        // Off for all: that is another step. In IPv4 mode it is others' business, and that of IPv6 is not asked for a link.
        check(true, &OURS, false, &[]);
        check(false, &six(), true, &[]);
    }

    #[test]
    fn what_is_not_provably_ours_is_left_alone() {
        let lost = |seen: &mut Observation| {
            seen.routes.clear();
            seen.addresses.clear();
        };
        let links: [&dyn Fn(&mut Link); 4] = [
            &|link| link.kind = None,
            &|link| link.alias = "of somebody".into(),
            &|link| link.alias = HostEnd { pod: "169.254.176.1".parse().unwrap(), ..OURS }.alias(),
            &|link| link.alias = HostEnd { gateway: GATEWAY_V6.into(), ..OURS }.alias(),
        ];
        for change in links {
            check(
                &OURS,
                |seen| {
                    lost(seen);
                    change(&mut seen.links[1]);
                },
                &[],
            );
        }
        // The way to the next owner, whose link was made after the links were listed.
        check(&OURS, |seen| seen.routes[0].dev = 12, &[]);
    }

    #[test]
    fn of_two_ends_with_one_address_the_youngest_gets_a_route_that_is_lost() {
        let two = |fault: &dyn Fn(&mut Observation), wanted: &[&str]| {
            let other = |seen: &mut Observation| {
                seen.links.push(link(8, &OURS));
                seen.addresses.push(OURS.address(8));
                fault(seen);
            };
            check(&OURS, other, wanted);
        };
        let route = "replace route 169.254.172.7 dev veth00000009";
        two(&|seen| seen.routes.clear(), &[route]);
        two(&|seen| seen.routes[0].dev = 3, &[route]);
        // It leads over one of them, or over a third one that has just come.
        for dev in [8, 9, 12] {
            two(&|seen| seen.routes[0].dev = dev, &[]);
        }
        let barrier = Barrier { kind: 6, table: TABLE_MAIN, dst: OURS.route(9).dst, dev: 0, metric: 0 };
        let mut seen = wired(&OURS);
        seen.links.push(link(8, &OURS));
        seen.addresses.push(OURS.address(8));
        seen.barriers.push(barrier);
        let intent = Intent::default();
        let mut planner = Planner::new(&intent, &seen);
        planner.egress();
        assert_eq!((planner.add.len(), planner.delete.len()), (0, 1), "once");
    }

    #[test]
    fn what_an_add_has_just_begun_is_left_to_it() {
        let at = |millis: u64| Mono::from_nanos(millis * 1_000_000);
        let look = |fresh: &mut Fresh, millis: u64, seen: &Observation| {
            let other = Step {
                what: What::PrimaryMtu,
                eni: None,
                action: Action::SetMtu(3, 9001),
                text: "of another link".into(),
            };
            let mut plan = Plan { steps: steps(seen), ..Plan::default() };
            plan.steps.push(other);
            let due = fresh.look(at(millis), seen, &mut plan);
            assert!(plan.steps.iter().any(|step| step.text == "of another link"));
            (plan.steps.len() - 1, due)
        };
        let mut begun = wired(&OURS);
        begun.links[1].up = false;
        begun.addresses.clear();
        begun.routes.clear();
        let mut fresh = Fresh::default();
        assert_eq!(look(&mut fresh, 5000, &begun), (0, Some(at(5300))));
        assert_eq!(look(&mut fresh, 5299, &begun), (0, Some(at(5300))));
        assert_eq!(look(&mut fresh, 5300, &begun), (3, None), "nobody has made it");
        assert_eq!(look(&mut fresh, 6001, &wired(&OURS)), (0, None));
        assert_eq!(look(&mut fresh, 6002, &begun), (3, None), "one that is old is mended at once");
        // An old one of one address beside a new one of another.
        let mut both = begun.clone();
        both.links.push(link(10, &HostEnd { pod: "169.254.172.8".parse().unwrap(), ..OURS }));
        assert_eq!(look(&mut fresh, 7000, &both), (3, Some(at(7300))));
        // It went meanwhile: the number is another link's.
        assert_eq!(look(&mut fresh, 7100, &Observation::default()), (0, None));
        assert_eq!(look(&mut fresh, 7200, &begun), (0, Some(at(7500))));
    }

    #[test]
    fn a_way_out_that_ends_is_kept_for_a_pod_of_an_earlier_release_from_the_first_look_on() {
        let mac = PRIMARY.unwrap();
        let own = "2001:db8::5".parse().unwrap();
        let intent = Intent { primary_mac: mac, egress: Egress::Ending(own), external_snat: true, ..Intent::default() };
        let mut seen = wired(&six());
        seen.links[0].mac = Some(mac);
        seen.links[1].alias.clear();
        seen.tables =
            ruleset::tables(&Intent { egress: Egress::Snat(own), ..intent.clone() }, "eth0", &seen.links).unwrap();
        let sets = |seen: &Observation| {
            diff(&intent, seen).unwrap().steps.iter().any(|step| matches!(step.action, Action::SetTables(_)))
        };
        assert!(!sets(&seen), "the rules that translate for it stay");
        // A veth of somebody else's, as the plugin `bridge` names them, keeps nothing.
        seen.routes.clear();
        assert!(sets(&seen));
    }

    #[test]
    fn ends_of_earlier_releases_are_noted_where_all_of_them_is_there() {
        let six = six();
        let own = |text: &str| Address { addr: text.parse().unwrap(), ..six.address(9) };
        let bare = |end: &HostEnd, fault: &dyn Fn(&mut Observation), noted: Option<&HostEnd>| {
            let mut seen = wired(end);
            seen.links[1].alias.clear();
            fault(&mut seen);
            let actions = steps(&seen).into_iter().map(|step| step.action).collect::<Vec<_>>();
            assert_eq!(actions, noted.map(|end| Action::NoteEgress(9, *end)).into_iter().collect::<Vec<_>>());
        };
        bare(&OURS, &|_| {}, Some(&OURS));
        bare(&six, &|_| {}, Some(&six));
        // Beside its own; that of the original's is all there is.
        bare(&six, &|seen| seen.addresses.insert(0, own("fe80::a/64")), Some(&six));
        let theirs = HostEnd { gateway: "fe80::a".parse().unwrap(), ..six };
        bare(&six, &|seen| seen.addresses = vec![own("fe80::a/64")], Some(&theirs));
        let faults: [&dyn Fn(&mut Observation); 6] = [
            &|seen| seen.routes.clear(),
            &|seen| seen.addresses = vec![own("fe80::a/64"), own("fe80::b/64")],
            &|seen| seen.addresses.clear(),
            &|seen| seen.links[1].up = false,
            &|seen| seen.routes.push(six.route(12)),
            &|seen| seen.routes.push(HostEnd { pod: "fd00::ac:8".parse().unwrap(), ..six }.route(9)),
        ];
        for fault in faults {
            bare(&six, fault, None);
        }
    }
}
