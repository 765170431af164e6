//! Carries out plans on the kernel: observe, apply, undo. Decisions are made in `plan`; here is only the order of messages,
//! few of them, and what to do when one is refused.
//!
//! A [`Host`] acts in the network namespace of the thread that opened it; it never switches a thread's namespace. Pods are
//! reached through sockets that are opened inside for one call.

mod pod;

use crate::error::Result;
use crate::model::net::{Family, Route, Rule};
use crate::netlink::{Socket, route, rule};

/// The network of the namespace it was opened in.
#[derive(Debug)]
pub struct Host {
    route: Socket,
}

impl Host {
    /// Opens the route socket in the calling thread's namespace.
    pub fn open() -> Result<Host> {
        Ok(Host { route: Socket::route()? })
    }
}

/// Unicast routes of all tables, and all rules, of both families.
fn routes_and_rules(socket: &mut Socket) -> Result<(Vec<Route>, Vec<Rule>)> {
    let (mut routes, mut rules) = (Vec::new(), Vec::new());
    for family in [Family::V4, Family::V6] {
        routes.extend(route::list(socket, family, None)?);
        rules.extend(rule::list(socket, family)?);
    }
    Ok((routes, rules))
}
