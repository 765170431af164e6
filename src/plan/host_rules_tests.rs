//! Tables for the rules of the host plan: those that are compared, the kernel's own, and those that stand in the way of pods.

use super::*;
use crate::plan::branch::way_out;

#[test]
fn rules_are_compared_and_not_rewritten() {
    check(without(marked(0x80)), &["add rule 1024: from all fwmark 0x80/0x80 lookup main"]);
    check(with(marked(0x100)), &["delete rule 1024: from all fwmark 0x100/0x100 lookup main"]);
    check(with(Rule { fwmark: Some((1, 3)), ..marked(1) }), &[]);
    check(with(Rule { foreign: true, ..marked(0x100) }), &[]);
    check(without(Rule::from(net("10.20.12.5/32"), 32765, 2)), &["add rule 32765: from 10.20.12.5 lookup 2"]);
    check(without(Rule::from(net("10.20.12.60/32"), 1536, 2)), &["add rule 1536: from 10.20.12.60 lookup 2"]);
    check(
        |seen| seen.rules.iter_mut().filter(|rule| rule.priority == 1536).for_each(|rule| rule.table = 3),
        &["add rule 1536: from 10.20.12.60 lookup 2", "delete rule 1536: from 10.20.12.60 lookup 3"],
    );
    check(with(Rule::from(net("10.20.11.50/32"), 1536, 3)), &["delete rule 1536: from 10.20.11.50 lookup 3"]);
    // Old versions of the original made one for each CIDR of the VPC: what goes elsewhere took the primary ENI.
    let of_old = |table| Rule { dst: Some(net("10.20.0.0/16")), ..Rule::from(net("10.20.12.60/32"), 1536, table) };
    check(
        |seen| seen.rules.iter_mut().filter(|rule| rule.priority == 1536).for_each(|rule| *rule = of_old(2)),
        &["add rule 1536: from 10.20.12.60 lookup 2", "delete rule 1536: from 10.20.12.60 to 10.20.0.0/16 lookup 2"],
    );
    check(with(of_old(3)), &["delete rule 1536: from 10.20.12.60 to 10.20.0.0/16 lookup 3"]);
    check(with(Rule { foreign: true, ..of_old(3) }), &[]);
    check(with(Rule { fwmark: Some((1, 1)), ..of_old(3) }), &[]);
    check(
        without(Rule::to(net("10.20.12.60/32"), 512, TABLE_MAIN)),
        &["add rule 512: from all to 10.20.12.60 lookup main"],
    );
    // An address that is assigned but not wired up: an ADD or a DEL is under way, and sees to it.
    check(
        |seen| {
            seen.routes.remove(3);
            without(Rule::to(net("10.20.12.60/32"), 512, TABLE_MAIN))(seen);
            without(Rule::from(net("10.20.12.60/32"), 1536, 2))(seen);
        },
        &[],
    );
    check(
        |seen| {
            seen.routes.remove(3);
            with(Rule::from(net("10.20.12.60/32"), 1536, 3))(seen);
        },
        &["delete rule 1536: from 10.20.12.60 lookup 3"],
    );
    check(
        without(Rule::to(net("192.0.2.0/24"), 1535, TABLE_MAIN)),
        &["add rule 1535: from all to 192.0.2.0/24 lookup main"],
    );
    check(
        with(Rule::to(net("198.51.100.0/24"), 1535, TABLE_MAIN)),
        &["delete rule 1535: from all to 198.51.100.0/24 lookup main"],
    );
}

#[test]
fn the_kernels_own_way_to_main_is_put_back() {
    let lost = |family| without(Rule::any(family, 32766, TABLE_MAIN));
    let instead = |rule: Rule| {
        move |seen: &mut Observation| {
            lost(Family::V4)(seen);
            seen.rules.push(rule.clone());
        }
    };
    let (four, six) = ("add rule 32766: from all lookup main", "add IPv6 rule 32766: from all lookup main");
    check(lost(Family::V4), &[four]);
    let any = Rule::any(Family::V4, 100, TABLE_MAIN);
    // What leads some packets there, or of another family, or to the other table, is not that.
    for rule in [
        Rule { foreign: true, ..any.clone() },
        Rule { src: Some(net("10.0.0.0/8")), ..any.clone() },
        Rule { iif: Some("eth0".into()), ..any.clone() },
        Rule { ipproto: Some(6), ..any.clone() },
        Rule { table: 253, ..any.clone() },
        Rule { family: Family::V6, ..any.clone() },
    ] {
        check(instead(rule), &[four]);
    }
    // Whoever has moved it knows why.
    for priority in [1, 100, 30_000, 40_000] {
        check(instead(Rule { priority, ..any.clone() }), &[]);
    }
    // The rule for external services everywhere is ours, and goes with the setting.
    let mut wanted = Intent { external_service_cidrs: vec![net("0.0.0.0/0")], ..intent() };
    let mut seen = right();
    seen.rules.retain(|rule| rule.priority != 1535 && rule.priority != 32766);
    seen.rules.push(Rule { priority: 1535, ..any });
    assert_eq!(texts(&diff(&wanted, &seen).unwrap()), [four]);
    // Of IPv6 only where packets of pods are IPv6's; of IPv4 always, since that is how IMDS is asked.
    let (six_only, mut seen_six) = right_v6();
    lost(Family::V6)(&mut seen_six);
    assert_eq!(texts(&diff(&six_only, &seen_six).unwrap()), [six]);
    lost(Family::V4)(&mut seen_six);
    assert_eq!(texts(&diff(&six_only, &seen_six).unwrap()), [four, six]);
    (wanted, seen) = (intent(), right());
    for (egress, steps) in [(Egress::Off, 0), (Egress::Guard, 1), (Egress::Snat(ip("2001:db8::162")), 1)] {
        wanted.egress = egress;
        let steps_there = diff(&wanted, &seen).unwrap().steps;
        let found = steps_there.iter().filter(|step| step.what == What::MainRule).map(|step| step.text.as_str());
        assert_eq!(found.collect::<Vec<_>>(), vec![six; steps], "{egress:?}");
    }
}

/// The rule, and a way out over this link in its table.
fn over(dev: u32, rule: Rule) -> impl Fn(&mut Observation) {
    move |seen| {
        if !matches!(rule.table, 2 | TABLE_MAIN) {
            seen.routes.push(route(rule.table, "0.0.0.0/0", Some("10.20.12.1"), dev));
        }
        seen.rules.push(rule.clone());
    }
}

#[test]
fn what_an_address_had_before_its_pod_goes() {
    let (first, second) = (net("10.20.11.50/32"), net("10.20.12.60/32"));
    // As `amazon-ec2-net-utils` makes them for secondary addresses. The pod of the primary ENI has no rule before that.
    for priority in [1537, 10_001, 32_764] {
        for (pod, table) in [(first, 10_002), (first, 2), (second, 3), (second, 10_002)] {
            let rule = Rule::from(pod, priority, table);
            check(over(4, rule.clone()), &[&format!("delete rule {rule}")]);
        }
    }
    let rule = Rule::from(first, 20_000, 10_002);
    // To where a VPN's link leads, or none yet, or the pod's own ENI.
    check(over(9, Rule { table: 51_820, ..rule.clone() }), &[]);
    check(with(Rule { table: 51_820, ..rule.clone() }), &[]);
    check(over(3, rule.clone()), &[]);
    for other in [
        Rule { priority: 1535, ..rule.clone() }, // somebody's who wants it before ours
        Rule { table: 77_777, src: Some(net("10.20.11.0/24")), ..rule.clone() },
        Rule { table: 200, ..rule.clone() },
        Rule { table: TABLE_MAIN, ..rule.clone() },
        Rule { src: Some(net("10.20.11.51/32")), ..rule.clone() }, // of no pod
        Rule { dst: Some(net("192.0.2.0/24")), ..rule.clone() },
        Rule { fwmark: Some((1, 1)), ..rule.clone() },
        Rule { iif: Some("eth1".into()), ..rule.clone() },
        Rule { foreign: true, ..rule.clone() },
        Rule::from(second, 20_000, 2), // where it goes anyway
    ] {
        check(over(4, other), &[]);
    }
    // That for an ENI's own address is the ENIs' to say.
    check(with(Rule::from(first, 32765, 10_002)), &["delete rule 32765: from 10.20.11.50 lookup 10002"]);
    // A pod on a further network card, whose tables have such numbers.
    let mut wanted = intent();
    wanted.pods[1].table = 10_102;
    let mut seen = right();
    seen.rules.iter_mut().filter(|rule| rule.priority == 1536).for_each(|rule| rule.table = 10_102);
    seen.rules.push(Rule::from(second, 10_001, 10_102));
    assert!(diff(&wanted, &seen).unwrap().steps.is_empty());
    over(4, Rule::from(second, 10_001, 10_002))(&mut seen);
    assert_eq!(texts(&diff(&wanted, &seen).unwrap()), ["delete rule 10001: from 10.20.12.60 lookup 10002"]);
}

#[test]
fn an_address_that_somebody_else_runs_by_now_loses_only_what_a_pod_has_left() {
    let address = net("10.20.12.9/32");
    let [to, from] = [Rule::to(address, 512, TABLE_MAIN), Rule::from(address, 1536, 2)];
    let theirs = [Rule::from(address, 1000, 10_002), Rule::from(address, 20_000, 2)];
    let wanted = Intent { gone: vec![ip("10.20.12.9")], ..intent() };
    let mut seen = right();
    seen.rules.extend([to.clone(), from.clone()].into_iter().chain(theirs.clone()));
    let delete = |rules: &[&Rule]| rules.iter().map(|rule| format!("delete rule {rule}")).collect::<Vec<_>>();
    assert_eq!(texts(&diff(&wanted, &seen).unwrap()), delete(&[&to, &from, &theirs[0], &theirs[1]]), "nobody's");
    // On the link of an ENI that is not managed, with whatever length.
    seen.links.push(link(5, "eth2", mac(5)));
    seen.addresses.push(Address { dev: 5, addr: net("10.20.12.9/20"), no_prefix_route: false, no_dad: false });
    assert_eq!(texts(&diff(&wanted, &seen).unwrap()), delete(&[&to, &from]));
}

/// Rules of our shape at 32765, which the kernel also gives to those that name no priority.
#[test]
fn a_stale_rule_goes_if_its_table_is_ours() {
    let judge = |source: &str, routes: &[Route], rule: Option<Rule>, stale: bool| {
        let stray = Rule::from(net(source), 32765, 50);
        let text = format!("delete rule {stray}");
        let text = if stale { vec![text.as_str()] } else { vec![] };
        let add = |seen: &mut Observation| {
            seen.routes.extend(routes);
            seen.rules.extend([stray.clone()].into_iter().chain(rule.clone()));
        };
        check(add, &text);
    };
    // Those of an address that moves between nodes, which is on the other one just now.
    let moved = "10.20.50.7/32";
    let [way, default] = way_out(50, ip("10.20.12.1"), 4);
    let subnet = route(50, "10.20.50.0/24", None, 2);
    judge(moved, &[route(50, "0.0.0.0/0", Some("10.20.11.1"), 2)], None, false);
    judge(moved, &[subnet, default], None, false);
    judge(moved, &[Route { metric: 100, ..way }, Route { metric: 100, ..default }], None, false);
    // Those of an ENI that has gone, whose table is empty or another's now.
    judge(moved, &[], None, true);
    judge(moved, &[way, default, subnet], None, true);
    judge(moved, &[subnet], Some(Rule::from(net("10.20.12.99/32"), 1536, 50)), true);
    judge(moved, &[subnet], Some(Rule::from(net("10.20.12.99/32"), 1537, 50)), false);
    // What an ENI's own address or a pod's has is ours.
    judge("10.20.12.5/32", &[subnet, default], None, true);
    judge("10.20.12.60/32", &[subnet, default], None, true);
    // The table of an ENI whose routes somebody has taken is known all the same.
    let stray = Rule::from(net(moved), 32765, 2);
    let mut seen = right();
    seen.routes.iter_mut().filter(|route| route.table == 2).for_each(|route| route.dst = net("10.20.50.0/24"));
    seen.rules.retain(|rule| rule.priority != 1536);
    seen.rules.push(stray.clone());
    let found = diff(&intent(), &seen).unwrap();
    assert!(found.steps.iter().any(|step| step.action == Action::DeleteRule(stray.clone())), "{found:?}");
}
