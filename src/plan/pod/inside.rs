//! What a pod's own namespace must hold, and what is wrong there: for CHECK, which tells it, and for the doctor, which also
//! mends it.

use super::{PodInterface, Side, has_route, pair};
use crate::model::naming;
use crate::model::net::{Address, Link, Neighbour, Route, Rule};

/// One change, in the namespace where the flaw was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mend {
    /// Sets the link of this index up.
    Up(u32),
    /// Sets the MTU (bytes) of the link of this index.
    Mtu(u32, u32),
    /// Adds an address.
    Address(Address),
    /// Adds a route or replaces it.
    Route(Route),
    /// Adds a rule.
    Rule(Rule),
    /// Adds a neighbour entry or replaces it.
    Neighbour(Neighbour),
}

/// Something that is missing or wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// Name of the finding (`plan::doctor`).
    pub name: &'static str,
    /// What was seen, with the thing named.
    pub text: String,
    /// What mends it, if anything does.
    pub mend: Option<Mend>,
}

/// Everything of interface `number` that is missing or wrong in the pod; `outer` is its host end. What later plugins of
/// the chain may change (MTU, the pod's MAC, more addresses and routes) is not looked at.
pub fn flaws(number: usize, interface: &PodInterface, outer: Option<&Link>, netns: &str, inside: &Side) -> Vec<Flaw> {
    let name = &interface.ifname;
    let mut flaws = Vec::new();
    let mut note = |name, text, mend| flaws.push(Flaw { name, text, mend });
    let Some(link) = inside.links.iter().find(|link| link.name == *name) else {
        note("inside-interface", format!("interface {name:?} is missing in {netns}"), None);
        return flaws;
    };
    if !link.works() {
        note("inside-link", format!("interface {name:?} {}", link.fault().0), Some(Mend::Up(link.index)));
    }
    if let Some(outer) = outer.filter(|outer| !pair(outer, link)) {
        let text = format!("interface {name:?} is not the other end of {:?}", outer.name);
        note("inside-interface", text, None);
    }
    let here = |address: &Address| address.dev == link.index && address.addr == interface.host_net();
    if !inside.addresses.iter().any(here) {
        let text = format!("address {} is missing on {name:?}", interface.host_net());
        note("inside-address", text, Some(Mend::Address(interface.pod_address(link.index))));
    }
    for route in interface.pod_routes(number, link.index) {
        if !has_route(inside, &route) {
            let text = route.to_string().replace(&format!("dev if{}", link.index), &format!("dev {name}"));
            note("inside-route", format!("route {text} is missing in the pod"), Some(Mend::Route(route)));
        }
    }
    if let Some(rule) = interface.pod_rule(number)
        && !inside.rules.contains(&rule)
    {
        note("inside-rule", format!("rule \"{rule}\" is missing in the pod"), Some(Mend::Rule(rule)));
    }
    let entry = inside.neighbours.iter().find(|entry| entry.dev == link.index && entry.addr == interface.gateway);
    // The MAC that the veth was made with, whatever somebody has made of it since.
    let wanted = outer.and_then(|outer| naming::of_veth_alias(&outer.alias).map(|(mac, _)| mac).or(outer.mac));
    let mend = wanted.map(|mac| Mend::Neighbour(interface.pod_neighbour(link.index, mac)));
    match (entry.filter(|entry| entry.permanent).and_then(|entry| entry.mac), wanted) {
        (None, _) => note("inside-neighbour", format!("neighbour {} is missing on {name:?}", interface.gateway), mend),
        (Some(mac), Some(wanted)) if mac != wanted => {
            note("inside-neighbour", format!("neighbour {} is {mac} instead of {wanted}", interface.gateway), mend);
        }
        _ => {}
    }
    flaws
}
