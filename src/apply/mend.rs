//! Single changes of the host's or a pod's network that the doctor makes where the host's plan has none.

use crate::error::{List, Result};
use crate::model::net::{Address, Route};
use crate::netlink::netns::Namespace;
use crate::netlink::{KernelError, Request, Socket, addr, link, neigh, route, rule, sysctl};
use crate::plan::pod::inside::Mend;

fn request(mend: &Mend) -> Request {
    match mend {
        Mend::Up(index) => link::set_up(*index),
        Mend::Mtu(index, mtu) => link::set_mtu(*index, *mtu),
        Mend::Address(address) => addr::add(address).or_exists(),
        Mend::Route(wanted) => route::replace(wanted),
        Mend::Rule(wanted) => rule::add(wanted).or_exists(),
        Mend::NoRule(wrong) => rule::delete(wrong).or_not_found(),
        Mend::Neighbour(wanted) => neigh::replace(wanted),
    }
}

/// Makes the changes in `namespace` in their order; all that can be made, and every failure told.
pub fn mend(namespace: &Namespace, mends: &[&Mend]) -> Result<()> {
    let requests = mends.iter().map(|mend| request(mend)).collect::<Vec<_>>();
    let mut errors = List::new();
    let mut socket = Socket::route_in(namespace)?;
    for (request, mend) in requests.iter().zip(mends) {
        let request = std::slice::from_ref(request);
        let mut outcome = socket.run(request);
        if let Mend::Address(Address { dev, .. }) | Mend::Route(Route { dev, .. }) = mend
            && let Err(error) = &outcome
            && error.find::<KernelError>().is_some_and(|refused| refused.errno == libc::EACCES)
            && let Some(path) = super::v6_switch(&mut socket, *dev)?
            && namespace.run(|| sysctl::set(&path, "0"))?.is_ok()
        {
            outcome = socket.run(request);
        }
        errors.note(outcome);
    }
    errors.into_result()
}

/// What one namespace holds of links, addresses, routes, rules and neighbours.
pub fn side(socket: &mut Socket) -> Result<crate::plan::pod::Side> {
    let (routes, rules) = super::routes_and_rules(socket)?;
    Ok(crate::plan::pod::Side {
        links: link::list(socket)?,
        addresses: addr::list(socket, None)?,
        routes,
        rules,
        neighbours: neigh::list(socket, None)?,
    })
}
