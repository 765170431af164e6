//! A change in the kernel as it is told to those who subscribed.

use super::net::{Address, Link, Route, Rule};
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
    /// A route is new or was replaced.
    Route(Route),
    /// A route has gone. (Those that go with their link are not told.)
    RouteGone(Route),
    /// A rule is new.
    Rule(Rule),
    /// A rule has gone.
    RuleGone(Rule),
    /// An interface's IPv4 settings below `net/ipv4/conf` are new or have changed.
    Conf {
        /// Index of its link; negative for `all` and `default`.
        dev: i32,
        /// `rp_filter`, if it is told.
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
