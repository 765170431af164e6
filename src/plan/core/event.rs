//! What the core is told and what it wants done.

use super::Tunables;
use crate::model::checkpoint::Draft;
use crate::model::ec2::{Call, Failure, Reply};
use crate::model::ids::{EniId, PodName};
use crate::model::imds::{self, Query};
use crate::model::kube;
use crate::model::map::{Map, Set};
use crate::model::naming::priority;
use crate::model::net::{Link, Route, Rule, TABLE_MAIN};
use crate::model::order::Gather as _;
use crate::model::spool::Record;
use crate::model::time::Mono;
use crate::model::wire::{AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest};
use crate::plan::host::Intent;
use ipnet::IpNet;
use std::net::IpAddr;

/// Number of a request of a plugin.
pub type CallId = u64;
/// Number of an operation.
pub type OpId = u64;

/// What the host shows about its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Names of all links.
    pub links: Vec<String>,
    /// Addresses with a rule "to address, priority 512": pods as the routing sees them.
    pub routed: Set<IpAddr>,
    /// Addresses with a route of their own. The kernel removes it with the pod's veth, while the rules stay.
    pub linked: Set<IpAddr>,
}

impl Seen {
    /// What links, routes and rules tell; routes of other tables than main are passed over.
    pub fn of(links: &[Link], routes: &[Route], rules: &[Rule]) -> Seen {
        let host = |net: IpNet| (net.prefix_len() == net.max_prefix_len()).then(|| net.addr());
        let to_pod = rules.iter().filter(|rule| rule.priority == priority::TO_POD && !rule.foreign);
        let main = routes.iter().filter(|route| route.table == TABLE_MAIN);
        Seen {
            links: links.iter().map(|link| link.name.clone()).collect(),
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
