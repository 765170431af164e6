//! The other family's way out (`spec/egress.md`): what pods that were chained through `egress-cni` reach, as whom they are
//! seen, who does not reach them, and what must be gone afterwards.

use super::agents::WiredPod;
use super::flows::{self, Outcome};
use super::probe::{Flow, PORT, Proto};
use super::topology::Node;
use super::world::{HOSTS, World};
use crate::error::{Context, Error, Result};
use crate::model::net::Family;
use crate::netlink::netns::Namespace;
use crate::plan::egress;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// How long a flow may take that must arrive, and how long one is waited for that must not.
const PATIENCE: Duration = Duration::from_secs(3);
const IMPATIENCE: Duration = Duration::from_millis(300);

/// Name of the files in the plugin's directory that belong to no pod.
const OF_NOBODY: [&str; 2] = ["lock", "last_reserved_ip.0"];

/// The family that pods reach through their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// IPv4, for pods with IPv6 addresses
    V4,
    /// IPv6, for pods with IPv4 addresses
    V6,
}

impl Way {
    /// Whether it is IPv6.
    pub fn is_v6(self) -> bool {
        self == Way::V6
    }

    /// The setting that has pods chained through `egress-cni`.
    pub fn setting(self) -> &'static str {
        if self.is_v6() { "ENABLE_V6_EGRESS" } else { "ENABLE_V4_EGRESS" }
    }

    /// The family.
    pub fn family(self) -> Family {
        if self.is_v6() { Family::V6 } else { Family::V4 }
    }
}

struct Planned<'a> {
    kind: &'static str,
    source: &'static str,
    from: (String, &'a Namespace),
    to: (String, &'a Namespace),
    target: IpAddr,
    /// None: the flow must fail.
    expect: Option<IpAddr>,
}

impl Planned<'_> {
    fn run(&self, proto: Proto) -> Outcome {
        let at = SocketAddr::new(self.target, PORT);
        let flow = Flow { client: self.from.1, source: None, target: at, server: self.to.1, listen: at };
        let seen = flow.run(proto, if self.expect.is_some() { PATIENCE } else { IMPATIENCE });
        Outcome {
            kind: self.kind,
            source: self.source,
            from: self.from.0.clone(),
            to: self.to.0.clone(),
            proto: proto.as_str(),
            expect: self.expect.map_or_else(|| "refused".to_owned(), |expect| expect.to_string()),
            ok: seen.as_ref().ok().map(SocketAddr::ip) == self.expect,
            seen: seen.map_or_else(|error| error.to_string(), |seen| seen.ip().to_string()),
        }
    }
}

/// Sends every flow over TCP and UDP, and to the internet over ICMP as well. `going` is asked before each whether to go on.
pub fn run(world: &World, pods: &[Vec<WiredPod>], way: Way, going: &dyn Fn() -> Result<()>) -> Result<Vec<Outcome>> {
    let internet = HOSTS.iter().find(|host| host.name == "internet").ok_or_else(|| Error::new("no internet"))?;
    let outside = world.namespace(internet.name)?;
    let mut outcomes = Vec::new();
    for (node, pods) in world.nodes.iter().zip(pods) {
        let own = node.at(way.is_v6());
        let inside = world.namespace(&node.name)?;
        let mut ends = Vec::new();
        for pod in flows::sample(pods) {
            let address = pod.egress.ok_or_else(|| Error::new(format!("{} has no egress address", pod.name)))?;
            ends.push((format!("{}/{}", node.name, pod.name), pod.pod.place.handle()?, address));
        }
        let mut plan = Vec::new();
        for (number, (name, net, address)) in ends.iter().enumerate() {
            let pod = || (name.clone(), net);
            let one = |kind, source, from, to, target, expect| Planned { kind, source, from, to, target, expect };
            let far = (internet.name.to_owned(), &outside);
            let seen = "the node's address of the family";
            plan.push(one("egress to internet", seen, pod(), far.clone(), internet.at(way.is_v6()), Some(own)));
            // The host's end of an IPv4 link has an address of its own, which the kernel prefers.
            let gateway = if way.is_v6() { own } else { Ipv4Addr::new(169, 254, 172, 1).into() };
            let near = (node.name.clone(), &inside);
            plan.push(one("node to egress address", "the node", near, pod(), *address, Some(gateway)));
            if number == 0 {
                let refused = "refused";
                plan.push(one("internet to egress address", refused, far, pod(), *address, None));
                if let Some((other, net, _)) = ends.get(1) {
                    plan.push(one("pod to egress address", refused, (other.clone(), net), pod(), *address, None));
                }
            }
        }
        for planned in &plan {
            for proto in [Proto::Tcp, Proto::Udp, Proto::Icmp] {
                going()?;
                if proto != Proto::Icmp || planned.kind == "egress to internet" {
                    outcomes.push(planned.run(proto));
                }
            }
        }
    }
    Ok(outcomes)
}

/// Files of pods that are there on a node.
pub fn files(node: &Node, way: Way) -> Result<Vec<String>> {
    let directory = std::path::Path::new(egress::data_dir(way.family())).join("aws-cni");
    node.inside(|| {
        let entries = std::fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter(|name| !OF_NOBODY.contains(&name.as_str())).collect())
    })
}
