//! The flows that the demo sends, and the source that the other side must see (`spec/dataplane.md` 26, default
//! settings): a pod is seen by its own address inside the VPC's CIDRs and as its node's primary address outside.

use super::agents::WiredPod;
use super::nodeport;
use super::probe::{Flow, PORT, Proto};
use super::world::{HOSTS, Host, World};
use crate::error::Result;
use crate::netlink::netns::Namespace;
use ipnet::Ipv4Net;
use serde::Serialize;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// How long a flow may take; short once many have failed, so that a broken run comes to an end.
const PATIENCE: Duration = Duration::from_secs(3);
const IMPATIENCE: Duration = Duration::from_millis(300);
/// Failures after which the run is taken for broken.
const FAILURES: usize = 2;

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
    /// The source that the receiver must see.
    pub expect: String,
    /// The one it saw, or what went wrong.
    pub seen: String,
    /// Whether they are the same.
    pub ok: bool,
}

/// What the daemon's settings mean for the flows.
#[derive(Clone, Debug)]
pub struct Expectation {
    /// The family of the pods is IPv6: nothing is translated.
    pub v6: bool,
    /// All traffic of pods with a branch ENI passes that ENI, also their node's (POD_SECURITY_GROUP_ENFORCING_MODE).
    pub strict: bool,
    /// Pods are seen as their node outside of the VPC (AWS_VPC_K8S_CNI_EXTERNALSNAT is off).
    pub snat: bool,
    /// Outside of the VPC but left alone (AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS).
    pub excluded: Vec<Ipv4Net>,
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
}

impl End {
    fn new(name: String, net: Namespace, address: IpAddr) -> End {
        End { name, net, address, further: false, branch: false }
    }
}

struct Planned<'a> {
    kind: &'static str,
    client: &'a End,
    server: &'a End,
    target: SocketAddr,
    listen: SocketAddr,
    expect: IpAddr,
    label: String,
}

impl Planned<'_> {
    fn source(&self) -> &'static str {
        match self.client.name.split_once('/') {
            Some(_) if self.expect == self.client.address => "the pod's own address",
            Some(_) => "the node's primary address",
            None if self.client.name.starts_with("node-") => "the node's primary address",
            None => "the client's own address",
        }
    }
}

fn plain<'a>(kind: &'static str, client: &'a End, server: &'a End, expect: IpAddr) -> Planned<'a> {
    let at = SocketAddr::from((server.address, PORT));
    Planned { kind, client, server, target: at, listen: at, expect, label: server.name.clone() }
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
        for (node, wired) in world.nodes.iter().zip(pods) {
            ends.nodes.push(End::new(node.name.clone(), world.namespace(&node.name)?, node.at(v6)));
            let (mut here, mut further) = (Vec::new(), Vec::new());
            for pod in wired {
                let name = format!("{}/{}", node.name, pod.name);
                for (interface, address) in &pod.further {
                    let (name, net) = (format!("{name} {interface}"), pod.pod.place.handle()?);
                    further.push(End { further: true, ..End::new(name, net, *address) });
                }
                here.push(End { branch: pod.branch, ..End::new(name, pod.pod.place.handle()?, pod.address) });
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
            plan.extend(self.node_ports(at, expectation));
        }
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
                    expect: client.address,
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
    let mut failures = 0;
    for planned in ends.plan(expectation) {
        for proto in [Proto::Tcp, Proto::Udp] {
            going()?;
            let flow = Flow {
                client: &planned.client.net,
                source: planned.client.further.then_some(planned.client.address),
                target: planned.target,
                server: &planned.server.net,
                listen: planned.listen,
            };
            let seen = flow.run(proto, if failures < FAILURES { PATIENCE } else { IMPATIENCE });
            let ok = seen.as_ref().is_ok_and(|seen| seen.ip() == planned.expect);
            failures += usize::from(!ok);
            outcomes.push(Outcome {
                kind: planned.kind,
                source: planned.source(),
                from: planned.client.name.clone(),
                to: planned.label.clone(),
                proto: proto.as_str(),
                expect: planned.expect.to_string(),
                seen: seen.map_or_else(|error| error.to_string(), |seen| seen.ip().to_string()),
                ok,
            });
        }
    }
    for node in &ends.nodes {
        nodeport::close(&node.net)?;
    }
    Ok(outcomes)
}
