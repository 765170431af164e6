//! What the core is told and what it wants done.

use super::Tunables;
use crate::model::checkpoint::Draft;
use crate::model::ec2::{Call, Failure, Reply};
use crate::model::ids::{EniId, PodName};
use crate::model::imds::{self, Query};
use crate::model::kube;
use crate::model::map::{Map, Set};
use crate::model::naming::{self, priority};
use crate::model::net::{Link, Route, Rule, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::model::spool::Record;
use crate::model::time::Mono;
use crate::model::wire::{AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest};
use crate::plan::host::{Intent, source};
use ipnet::IpNet;
use std::net::IpAddr;

/// Number of a request of a plugin.
pub type CallId = u64;
/// Number of an operation.
pub type OpId = u64;

/// What the host shows about its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Names of all links, and those that veths had first and do not have any more.
    pub links: Vec<String>,
    /// Addresses with a rule "to address, priority 512": pods as the routing sees them.
    pub routed: Set<IpAddr>,
    /// Addresses with a route of their own over a veth. The kernel removes it with the veth, while the rules stay.
    pub linked: Set<IpAddr>,
    /// Addresses with a rule of ours to or from them and to an ENI's table, as pods of our ENIs have. Those of pods with a branch
    /// ENI are not among them.
    pub ruled: Set<IpAddr>,
}

impl Seen {
    /// What links, routes and rules tell; routes of other tables than main are passed over.
    pub fn of(links: &[Link], routes: &[Route], rules: &[Rule]) -> Seen {
        let host = |net: IpNet| (net.prefix_len() == net.max_prefix_len()).then(|| net.addr());
        let to_pod = rules.iter().filter(|rule| rule.priority == priority::TO_POD && !rule.foreign);
        // The links were listed before, so that one which is not among them is a new veth.
        let others = links.iter().filter(|link| link.kind.as_deref() != Some("veth"));
        let others = others.map(|link| link.index).gather::<Set<_>>();
        let renamed = links.iter().filter_map(|link| Some(naming::name_of_veth_alias(&link.alias)?.to_owned()));
        let direct = |route: &&Route| route.table == TABLE_MAIN && route.gateway.is_none();
        let main = routes.iter().filter(direct).filter(|route| !others.contains(&route.dev));
        let sent = rules.iter().filter_map(|rule| Some((source(rule)?, naming::in_eni_ranges(rule.table))));
        let mut ruled = sent.clone().map(|(address, _)| address).gather::<Set<_>>();
        let whole = |rule: &&Rule| rule.dst.is_some_and(|dst| **rule == Rule::to(dst, priority::TO_POD, TABLE_MAIN));
        ruled.extend(rules.iter().filter(whole).filter_map(|rule| rule.dst.and_then(host)));
        for (address, _) in sent.filter(|(_, ours)| !ours) {
            ruled.remove(&address);
        }
        Seen {
            ruled,
            links: links.iter().map(|link| link.name.clone()).chain(renamed).collect(),
            routed: to_pod.filter_map(|rule| rule.dst.and_then(host)).gather(),
            linked: main.filter_map(|route| host(route.dst)).gather(),
        }
    }
}

/// Something happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// The process started.
    Started {
        /// Content of the checkpoint files by network card; empty on a fresh node.
        checkpoints: Map<u32, String>,
        /// The host.
        seen: Seen,
        /// DELs that came while no daemon ran.
        spool: Vec<Record>,
    },
    /// A plugin asks for an address.
    Add(CallId, AddNetworkRequest),
    /// A plugin gives an address back.
    Del(CallId, DelNetworkRequest),
    /// Records of DELs that could not reach us.
    Spool(Vec<Record>),
    /// The host, as asked by [`Effect::ListLinks`].
    Seen(Result<Seen, String>),
    /// The checkpoint of this generation is on disk, or is not.
    Saved(u64, Result<(), String>),
    /// IMDS answered.
    Imds(OpId, Result<imds::Answer, String>),
    /// EC2 answered.
    Ec2(OpId, Result<Reply, Failure>),
    /// The API server answered.
    Kube(OpId, Result<kube::Reply, kube::Failure>),
    /// The node's own Node object, when it was read and whenever it changes.
    NodeSeen(Box<kube::Node>),
    /// Number of pods bound to this node that need an address: not on the host's network, not ended.
    PodsSeen(usize),
    /// The pods of this node that have a branch ENI, each with its annotation [`kube::POD_ENI`]; all of them, whenever that
    /// changes.
    BranchesSeen(Vec<(PodName, String)>),
    /// Settings that may change while we run have changed.
    Retuned(Box<Tunables>),
    /// Something in the host's network that others had changed was put back: its kind, and what was done.
    Repaired(&'static str, String),
    /// The host's network was applied, or could not be.
    Kernel(OpId, Result<Applied, String>),
    /// The time of [`Effect::WakeAt`] has come.
    Tick,
    /// The process is to end.
    Stop,
}

/// How the host's network was applied, ENI by ENI.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// ENIs that could not be set up, and why.
    pub failed: Map<EniId, String>,
    /// Index of the link of each trunk ENI that was found.
    pub trunks: Map<EniId, u32>,
}

/// Answer to a plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To an ADD; without success there is no address.
    Add(AddNetworkReply),
    /// To a DEL.
    Del(DelNetworkReply),
    /// An error with its text.
    Error(String),
}

/// How loud a log line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Level {
    Debug,
    Info,
    Warn,
    Error,
}

/// Something that is counted for the metrics (`spec/ipamd.md` 12).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tally {
    /// A request for an address.
    Add,
    /// A request to give one back, by its reason.
    Del(String),
    /// A request found no address, by its cause (`subnet_exhausted`, `eni_limit`, ...).
    NoAddress(&'static str),
    /// Something failed, by the original's name for the place.
    Error(&'static str),
    /// The reconciliation changed something, by the original's name for it.
    Reconcile(&'static str),
}

/// Something is to be done.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Answer a request.
    Reply(CallId, Answer),
    /// Call EC2.
    Ec2(OpId, Call),
    /// Ask IMDS.
    Imds(OpId, Query),
    /// Ask the API server.
    Kube(OpId, kube::Call),
    /// Make the host's network so.
    Kernel(OpId, Box<Intent>),
    /// Write the checkpoints: generation, and those that changed by network card.
    Save(u64, Vec<(u32, Draft)>),
    /// The checkpoint of this card that was read cannot be used, for this reason: keep it under another name.
    SetAside(u32, String),
    /// Look at the host's links and rules.
    ListLinks,
    /// These records are done with; one that was written since under the same key is not.
    SpoolDone(Vec<Record>),
    /// Send [`Event::Tick`] at this time; replaces the former wish.
    WakeAt(Mono),
    /// Requests can be served from now on.
    Ready,
    /// A line for the log.
    Log(Level, String),
    /// One more of these.
    Tally(Tally),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::net::Scope;

    #[test]
    fn a_pod_shows_by_the_name_its_veth_had_and_by_a_route_over_it() {
        let link = |index, name: &str, kind: Option<&str>, alias: String| Link {
            index,
            name: name.into(),
            kind: kind.map(str::to_owned),
            alias,
            ..Link::default()
        };
        let noted = naming::veth_alias(crate::model::net::Mac::default(), 9001, "enicc21c2d7785");
        let links = [
            link(3, "eth0", None, String::new()),
            link(9, "odd0", Some("veth"), noted),
            link(10, "enib5faff8a083", Some("veth"), "uplink".into()),
        ];
        let route = |table, dst: &str, dev, gateway: Option<&str>| Route {
            table,
            dst: dst.parse().unwrap(),
            gateway: gateway.map(|ip| ip.parse().unwrap()),
            dev,
            scope: Scope::Link,
            prefsrc: None,
            metric: 0,
        };
        let routes = [
            route(TABLE_MAIN, "10.20.12.60/32", 9, None),
            route(TABLE_MAIN, "10.20.12.61/32", 3, None),
            route(TABLE_MAIN, "10.20.12.62/32", 10, Some("10.20.12.1")),
            route(TABLE_MAIN, "10.20.12.64/30", 10, None),
            route(2, "10.20.12.66/32", 10, None),
            route(TABLE_MAIN, "10.20.12.67/32", 77, None), // a veth that came after the list of links
        ];
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let rules = [
            Rule::to(net("10.20.12.60/32"), priority::TO_POD, TABLE_MAIN),
            Rule::from(net("10.20.12.61/32"), priority::FROM_POD, 2),
            Rule { dst: Some(net("10.0.0.0/8")), ..Rule::from(net("10.20.12.62/32"), priority::FROM_POD, 10_101) },
            // A pod with a branch ENI in standard mode.
            Rule::to(net("10.20.12.63/32"), priority::TO_POD, TABLE_MAIN),
            Rule::from(net("10.20.12.63/32"), priority::FROM_POD, 107),
            // Others'.
            Rule::to(net("10.20.12.64/30"), priority::TO_POD, TABLE_MAIN),
            Rule::to(net("10.20.12.68/32"), priority::TO_POD, 77),
            Rule::to(net("10.20.12.69/32"), 513, TABLE_MAIN),
            Rule { foreign: true, ..Rule::to(net("10.20.12.70/32"), priority::TO_POD, TABLE_MAIN) },
        ];
        let seen = Seen::of(&links, &routes, &rules);
        let ruled = seen.ruled.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(ruled, ["10.20.12.60", "10.20.12.61", "10.20.12.62"]);
        assert_eq!(seen.links, ["eth0", "odd0", "enib5faff8a083", "enicc21c2d7785"]);
        let linked = seen.linked.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(linked, ["10.20.12.60", "10.20.12.67"]);
    }
}
