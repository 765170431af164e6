//! The flows that the demo sends, and the source that the other side must see (`spec/dataplane.md` 26, default
//! settings): a pod is seen by its own address inside the VPC's CIDRs and as its node's primary address outside. What the
//! settings leave without an answer must have none.

use super::agents::WiredPod;
use super::nodeport;
use super::probe::{Flow, PORT, Proto};
use super::world::{HOSTS, Host, World};
use crate::clock;
use crate::error::{Error, Result};
use crate::netlink::netns::Namespace;
use ipnet::Ipv4Net;
use serde::Serialize;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// How long a flow may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long one may take that is expected to get no answer; and every one, once so much time has gone by for flows that failed that the
/// run is taken for broken, and should come to an end.
const IMPATIENCE: Duration = Duration::from_millis(300);
const WASTE: Duration = Duration::from_mins(1);

/// What is written where no answer is expected.
const NO_ANSWER: &str = "no answer";

/// Pods of a node that flows are sent from and to. Where a node has more, these are spread evenly among them.
pub const SAMPLE: usize = 100;

/// The first of the node ports; each node has one for its first pod and one for its last, which sits on another ENI if
/// the node has several.
const NODE_PORT: u16 = 30_080;

/// What came of one flow.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// What kind of flow: the line of the table.
    #[serde(skip)]
    pub kind: &'static str,
    /// Whose address the receiver must see, in words.
    #[serde(skip)]
    pub source: &'static str,
    /// Who sent.
    pub from: String,
    /// To whom.
    pub to: String,
    /// `tcp` or `udp`.
    pub proto: &'static str,
    /// The source that the receiver must see, or what must become of the flow instead.
    pub expect: String,
    /// The one it saw, or what went wrong.
    pub seen: String,
    /// Whether they are the same.
    pub ok: bool,
}

/// What the daemon's settings mean for the flows.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent settings of the operator's")]
pub struct Expectation {
    /// The family of the pods is IPv6: nothing is translated.
    pub v6: bool,
    /// All traffic of pods with a branch ENI passes that ENI, also their node's (POD_SECURITY_GROUP_ENFORCING_MODE).
    pub strict: bool,
    /// Pods are seen as their node outside of the VPC (AWS_VPC_K8S_CNI_EXTERNALSNAT is off).
    pub snat: bool,
    /// Outside of the VPC but left alone (AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS).
    pub excluded: Vec<Ipv4Net>,
    /// What pods send there goes by the primary ENI (AWS_EXTERNAL_SERVICE_CIDRS).
    pub services: Vec<Ipv4Net>,
    /// Answers to what came to a node port go back by the primary ENI (AWS_VPC_CNI_NODE_PORT_SUPPORT).
    pub node_port: bool,
}

impl Expectation {
    // The source that a host sees of a pod.
    fn seen_by(&self, host: &Host, node: &End, pod: &End) -> IpAddr {
        let by_itself = pod.branch && self.strict;
        let kept = by_itself
            || host.in_vpc
            || self.v6
            || !self.snat
            || self.excluded.iter().any(|net| net.contains(&host.address));
        if kept { pod.address } else { node.address }
    }

    // Whether a rule leads what pods send to this address to the primary ENI.
    fn served(&self, to: IpAddr) -> bool {
        matches!(to, IpAddr::V4(to) if !self.v6 && self.services.iter().any(|net| net.contains(&to)))
    }

    // Whether what an end sends under its own address leaves by the primary ENI, which does not have that address: the VPC
    // drops it (`spec/dataplane.md` 2, priority 1535 before 1536). Pods of one node reach each other without any ENI,
    // unless one of them has all its traffic pass its own.
    fn strays(&self, from: &End, to: &End, address: IpAddr) -> bool {
        let by_itself = |end: &End| end.branch && self.strict;
        let inside = from.node == to.node && !by_itself(to);
        from.secondary && !by_itself(from) && !inside && self.served(address)
    }

    // Whether a flow is answered; node ports aside.
    fn answers(&self, flow: &Planned<'_>) -> bool {
        let Some(seen) = flow.expect else { return false };
        let there = seen == flow.client.address && self.strays(flow.client, flow.server, flow.server.address);
        !there && !self.strays(flow.server, flow.client, seen)
    }

    // Whether what comes to a node port of a pod is answered: without support for it, the answer of a pod goes by the ENI that has
    // the pod's address, and not under it (`spec/dataplane.md` 26).
    fn port_answers(&self, client: &End, pod: &End) -> bool {
        self.node_port || !pod.secondary || self.served(client.address)
    }
}

/// An end of flows.
#[derive(Debug)]
struct End {
    name: String,
    net: Namespace,
    address: IpAddr,
    // A further interface of a pod: nothing leaves by it that does not ask for its address.
    further: bool,
    // A pod with a branch ENI.
    branch: bool,
    // The node that it is, or is on; none for a host.
    node: Option<usize>,
    // The address of a pod that is not the primary ENI's.
    secondary: bool,
}

impl End {
    fn new(name: String, net: Namespace, address: IpAddr) -> End {
        End { name, net, address, further: false, branch: false, node: None, secondary: false }
    }
}

struct Planned<'a> {
    kind: &'static str,
    client: &'a End,
    server: &'a End,
    target: SocketAddr,
    listen: SocketAddr,
    // None: nothing may come back.
    expect: Option<IpAddr>,
    label: String,
}

impl Planned<'_> {
    fn source(&self) -> &'static str {
        match self.client.name.split_once('/') {
            _ if self.expect.is_none() => "no answer, by the settings",
            Some(_) if self.expect == Some(self.client.address) => "the pod's own address",
            Some(_) => "the node's primary address",
            None if self.client.name.starts_with("node-") => "the node's primary address",
            None => "the client's own address",
        }
    }

    fn run(&self, proto: Proto, patience: Duration) -> Outcome {
        let flow = Flow {
            client: &self.client.net,
            source: self.client.further.then_some(self.client.address),
            target: self.target,
            server: &self.server.net,
            listen: self.listen,
        };
        let seen = flow.run(proto, if self.expect.is_some() { patience } else { IMPATIENCE });
        let ok = match &seen {
            Ok(seen) => self.expect == Some(seen.ip()),
            Err(error) => self.expect.is_none() && is_silence(error),
        };
        Outcome {
            kind: self.kind,
            source: self.source(),
            from: self.client.name.clone(),
            to: self.label.clone(),
            proto: proto.as_str(),
            expect: self.expect.map_or_else(|| NO_ANSWER.to_owned(), |expect| expect.to_string()),
            seen: match seen {
                Ok(seen) => seen.ip().to_string(),
                Err(_) if ok => NO_ANSWER.to_owned(),
                Err(error) => error.to_string(),
            },
            ok,
        }
    }
}

// Nothing came in time; a read that is out of time says that it would block (socket(7), SO_RCVTIMEO).
fn is_silence(error: &Error) -> bool {
    let kind = error.find::<std::io::Error>().map(std::io::Error::kind);
    matches!(kind, Some(ErrorKind::TimedOut | ErrorKind::WouldBlock))
}

fn plain<'a>(kind: &'static str, client: &'a End, server: &'a End, expect: IpAddr) -> Planned<'a> {
    let at = SocketAddr::from((server.address, PORT));
    Planned { kind, client, server, target: at, listen: at, expect: Some(expect), label: server.name.clone() }
}

/// Everything that is there to talk: `pods` are those of each node, in the order of the world's nodes.
struct Ends {
    nodes: Vec<End>,
    pods: Vec<Vec<End>>,
    // Of each node, the further interfaces of its pods.
    further: Vec<Vec<End>>,
    hosts: Vec<End>,
}

impl Ends {
    fn of(world: &World, pods: &[Vec<WiredPod>], v6: bool) -> Result<Ends> {
        let mut ends = Ends { nodes: Vec::new(), pods: Vec::new(), further: Vec::new(), hosts: Vec::new() };
        let wires = world.cloud.vpc().wires();
        for (at, (node, wired)) in world.nodes.iter().zip(pods).enumerate() {
            let own = wires.iter().filter(|wire| wire.instance == node.instance && (wire.card, wire.device) == (0, 0));
            let own = own.filter(|wire| wire.trunk.is_none()).flat_map(|wire| &wire.assigned).collect::<Vec<_>>();
            let place = |end: End| {
                let secondary = !own.iter().any(|net| net.contains(&end.address));
                End { node: Some(at), secondary, ..end }
            };
            ends.nodes.push(place(End::new(node.name.clone(), world.namespace(&node.name)?, node.at(v6))));
            let (mut here, mut further) = (Vec::new(), Vec::new());
            for pod in sample(wired) {
                let name = format!("{}/{}", node.name, pod.name);
                for (interface, address) in &pod.further {
                    let (name, net) = (format!("{name} {interface}"), pod.pod.place.handle()?);
                    further.push(place(End { further: true, ..End::new(name, net, *address) }));
                }
                here.push(place(End { branch: pod.branch, ..End::new(name, pod.pod.place.handle()?, pod.address) }));
            }
            ends.pods.push(here);
            ends.further.push(further);
        }
        for host in HOSTS {
            ends.hosts.push(End::new(host.name.to_owned(), world.namespace(host.name)?, host.at(v6)));
        }
        Ok(ends)
    }

    fn plan(&self, expectation: &Expectation) -> Vec<Planned<'_>> {
        let mut plan = Vec::new();
        for (at, (node, pods)) in self.nodes.iter().zip(&self.pods).enumerate() {
            let elsewhere = self.pods.iter().enumerate().filter(|(other, _)| *other != at);
            let far = elsewhere.flat_map(|(_, pods)| pods).collect::<Vec<_>>();
            for (number, pod) in pods.iter().enumerate() {
                let next = &pods[(number + 1) % pods.len()];
                if pods.len() > 1 {
                    plan.push(plain("pod to pod, same node", pod, next, pod.address));
                }
                if let Some(other) = far.get(number % far.len().max(1)) {
                    plan.push(plain("pod to pod, other node", pod, other, pod.address));
                }
                for (host, end) in HOSTS.iter().zip(&self.hosts) {
                    let kind = match host.name {
                        "vpc-host" => "pod to host in the VPC",
                        "second-cidr" => "pod to host in the second CIDR",
                        "internet" => "pod to internet",
                        _ => "pod to peered network",
                    };
                    plan.push(plain(kind, pod, end, expectation.seen_by(host, node, pod)));
                    if matches!(host.name, "peered" | "vpc-host") {
                        plan.push(plain("network to pod", end, pod, end.address));
                    }
                }
                plan.push(plain("pod to its node", pod, node, pod.address));
                plan.push(plain("node to its pod", node, pod, node.address));
                let others = self.nodes.iter().enumerate().filter(|(other, _)| *other != at);
                plan.extend(others.map(|(_, other)| plain("pod to other node", pod, other, pod.address)));
            }
            plan.extend(self.further(at, expectation));
        }
        for flow in plan.iter_mut().filter(|flow| !expectation.answers(flow)) {
            flow.expect = None;
        }
        plan.extend((0..self.nodes.len()).flat_map(|at| self.node_ports(at, expectation)));
        plan
    }

    // What a pod sends from the address of a further interface, and what comes to it.
    fn further(&self, at: usize, expectation: &Expectation) -> Vec<Planned<'_>> {
        let (node, here) = (&self.nodes[at], &self.further[at]);
        let mut plan = Vec::new();
        for (number, end) in here.iter().enumerate() {
            for (host, far) in HOSTS.iter().zip(&self.hosts) {
                let expect = expectation.seen_by(host, node, end);
                let kind = if host.in_vpc { "further interface to the VPC" } else { "further interface to outside" };
                plan.push(plain(kind, end, far, expect));
                plan.push(plain("host to further interface", far, end, far.address));
            }
            plan.push(plain("further interface to its node", end, node, end.address));
            plan.push(plain("node to further interface", node, end, node.address));
            let elsewhere = self.further.iter().enumerate().filter(|(other, _)| *other != at);
            let far = elsewhere.flat_map(|(_, ends)| ends).collect::<Vec<_>>();
            let peers = [here.get((number + 1) % here.len()), far.get(number % far.len().max(1)).copied()];
            for peer in peers.into_iter().flatten().filter(|peer| peer.name != end.name) {
                plan.push(plain("between further interfaces", end, peer, end.address));
            }
        }
        plan
    }

    fn node_ports(&self, at: usize, expectation: &Expectation) -> Vec<Planned<'_>> {
        let clients = self.hosts.iter().zip(HOSTS).filter(|(_, host)| matches!(host.name, "internet" | "vpc-host"));
        let mut plan = Vec::new();
        for (client, _) in clients {
            for (port, pod) in ports_of(&self.pods[at], expectation) {
                plan.push(Planned {
                    kind: "node port to pod",
                    client,
                    server: pod,
                    target: SocketAddr::from((self.nodes[at].address, port)),
                    listen: SocketAddr::from((pod.address, PORT)),
                    expect: expectation.port_answers(client, pod).then_some(client.address),
                    label: format!("{}:{port} -> {}", self.nodes[at].name, pod.name),
                });
            }
        }
        plan
    }
}

// The node ports of a node and the pods behind them. A pod in strict mode answers by its own ENI, which knows nothing of the
// node port (`spec/dataplane.md` 9.3), and so does any with a branch ENI in IPv6, where no mark leads back (13).
fn ports_of<'a>(pods: &'a [End], expectation: &Expectation) -> impl Iterator<Item = (u16, &'a End)> + use<'a> {
    let pods = pods.iter().filter(|pod| !(pod.branch && (expectation.strict || expectation.v6))).collect::<Vec<_>>();
    let picked = match pods.as_slice() {
        [] => Vec::new(),
        [only] => vec![*only],
        [first, .., last] => vec![*first, *last],
    };
    (NODE_PORT..).zip(picked)
}

/// The pods of a node that flows are sent from and to: all, or [`SAMPLE`] and those with a branch ENI, the first and the last
/// among them.
pub fn sample(pods: &[WiredPod]) -> impl Iterator<Item = &WiredPod> {
    let all = pods.len();
    pods.iter().enumerate().filter(move |(at, pod)| pod.branch || is_taken(*at, all)).map(|(_, pod)| pod)
}

// From the first pod to the last, `at * (SAMPLE - 1) / last` runs from 0 to SAMPLE - 1; it has a new value where the remainder of
// that division is less than what the dividend grows by.
fn is_taken(at: usize, all: usize) -> bool {
    all <= SAMPLE || (at * (SAMPLE - 1)) % (all - 1) < SAMPLE - 1
}

/// Sends every flow over TCP and UDP. `going` is asked before each whether to go on.
pub fn run(
    world: &World,
    pods: &[Vec<WiredPod>],
    expectation: &Expectation,
    going: &dyn Fn() -> Result<()>,
) -> Result<Vec<Outcome>> {
    let ends = Ends::of(world, pods, expectation.v6)?;
    for (node, pods) in ends.nodes.iter().zip(&ends.pods) {
        let ports = ports_of(pods, expectation).map(|(port, pod)| (port, SocketAddr::new(pod.address, PORT)));
        nodeport::open(&node.net, &ports.collect::<Vec<_>>())?;
    }
    let mut outcomes = Vec::new();
    let mut wasted = Duration::ZERO;
    for planned in ends.plan(expectation) {
        for proto in [Proto::Tcp, Proto::Udp] {
            going()?;
            let begin = clock::instant();
            let outcome = planned.run(proto, if wasted < WASTE { PATIENCE } else { IMPATIENCE });
            wasted += if outcome.ok { Duration::ZERO } else { begin.elapsed() };
            outcomes.push(outcome);
        }
    }
    for node in &ends.nodes {
        nodeport::close(&node.net)?;
    }
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_both_ends_and_is_spread_evenly() {
        for all in [1, 2, SAMPLE, SAMPLE + 1, 150, 250, 999, 1000] {
            let taken = (0..all).filter(|at| is_taken(*at, all)).collect::<Vec<_>>();
            let gap = taken.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(1);
            assert_eq!((taken.len(), taken[0], taken[taken.len() - 1]), (all.min(SAMPLE), 0, all - 1), "{all}");
            assert!(gap <= all.div_ceil(SAMPLE) + 1, "{all}: {gap}");
        }
    }
}
