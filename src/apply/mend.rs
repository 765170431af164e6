//! Single changes of the host's or a pod's network that the doctor makes where the host's plan has none.

use crate::error::Result;
use crate::model::net::{Address, Family, Route, Rule};
use crate::netlink::netns::Namespace;
use crate::netlink::{KernelError, Request, Socket, addr, link, neigh, route, rule, sysctl};
use crate::plan::pod::Side;
use crate::plan::pod::inside::Mend;

fn request(mend: &Mend) -> Request {
    match mend {
        Mend::Up(index) => link::set_working(*index),
        Mend::Mtu(index, mtu) => link::set_mtu(*index, *mtu),
        Mend::Address(address) => addr::add(address).or_exists(),
        Mend::Route(wanted) => route::replace(wanted),
        Mend::Rule(wanted) => rule::add(wanted).or_exists(),
        Mend::Neighbour(wanted) => neigh::replace(wanted),
    }
}

/// Makes the change in `namespace`; what was done, in words.
pub fn mend(namespace: &Namespace, mend: &Mend) -> Result<String> {
    let request = [request(mend)];
    let mut socket = Socket::route_in(namespace)?;
    let mut outcome = socket.run(&request);
    if let Mend::Address(Address { dev, .. }) | Mend::Route(Route { dev, .. }) = mend
        && let Err(error) = &outcome
        && error.find::<KernelError>().is_some_and(|refused| refused.errno == libc::EACCES)
        && let Some(path) = super::v6_switch(&mut socket, *dev)?
        && namespace.run(|| sysctl::set(&path, "0"))?.is_ok()
    {
        outcome = socket.run(&request);
    }
    let [request] = request;
    outcome.map(|()| request.what)
}

/// What a pod's namespace holds of links, addresses, routes, rules and neighbours. A node has a thousand of these.
pub fn side(socket: &mut Socket) -> Result<Side> {
    let (mut routes, mut rules) = (Vec::new(), Vec::new());
    for family in [Family::V4, Family::V6] {
        rules.extend(rule::list_few(socket, family)?);
        routes.extend(route::list(socket, family, None)?);
    }
    beside(socket, routes, rules)
}

/// The same of the host, where plugins are at work.
pub(super) fn host_side(socket: &mut Socket) -> Result<Side> {
    let (routes, rules, _) = super::routes_and_rules(socket)?;
    beside(socket, routes, rules)
}

fn beside(socket: &mut Socket, routes: Vec<Route>, rules: Vec<Rule>) -> Result<Side> {
    Ok(Side {
        links: link::list(socket)?,
        addresses: addr::list(socket, None)?,
        routes,
        rules,
        neighbours: neigh::list(socket, None)?,
    })
}
