//! A change in the kernel as it is told to those who subscribed.

use super::net::{Address, Barrier, Family, Link, Neighbour, Route, Rule};
use crate::model::map::Set;

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A link is new or has changed.
    Link(Link),
    /// A link has gone.
    LinkGone(Link),
    /// An address is new or has changed.
    Address(Address),
    /// An address has gone.
    AddressGone(Address),
    /// A route is new or was replaced; one of several ways has 0 for its link.
    Route(Route),
    /// A route that lets nothing through is new, or was put in the place of another.
    Barrier(Barrier),
    /// A route has gone. (Those that go with their link are not told.)
    RouteGone(Route),
    /// A neighbour entry is new, or has become one, for which the kernel asks nobody.
    Neighbour(Neighbour),
    /// A rule is new.
    Rule(Rule),
    /// A rule has gone.
    RuleGone(Rule),
    /// An interface's settings below `net/ipv4/conf` or `net/ipv6/conf` are new or have changed.
    Conf {
        /// Of IPv4 or IPv6.
        family: Family,
        /// Index of its link; -1 for `all`, -2 for `default` (`linux/netconf.h`).
        dev: i32,
        /// `forwarding`, if it is told; of IPv4's `all` that is `net/ipv4/ip_forward`.
        forwarding: Option<u32>,
        /// `rp_filter`, if it is told: IPv4 alone has it.
        rp_filter: Option<u32>,
    },
    /// A transaction of nf_tables was committed.
    Ruleset {
        /// The new generation.
        generation: u32,
        /// Names of the tables that were touched, of all families.
        tables: Set<String>,
        /// Name of the process that did it, if the kernel tells.
        process: Option<String>,
    },
    /// Notifications were lost: read everything anew.
    Overrun,
}
